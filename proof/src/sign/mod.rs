//! Keys, key ids and signatures.
//!
//! Ed25519 signs every batch. ML-DSA-65 (feature `ml-dsa`) may sign batches too, and SLH-DSA
//! (feature `slh-dsa`) checkpoints; a build without the feature can name such signatures, but not
//! check them, and refuses to call what it cannot check good.
//!
//! What is signed is always `"hn4-replicad v1 signature"` followed by a digest that was made under
//! a context of its own, so a signature over one kind of thing is none over another.
//!
//! Not here: where key files lie and their mode 0600 (the binary's), and which key may sign when
//! ([`keyring`]).

use std::fmt;
use std::hint::black_box;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, Digest};

pub mod keyring;
#[cfg(feature = "ml-dsa")]
mod ml_dsa;
#[cfg(feature = "slh-dsa")]
mod slh_dsa;

const PREFIX: &[u8; 25] = b"hn4-replicad v1 signature";

/// A signature algorithm. The numbers are part of the encodings.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
#[repr(u8)]
pub enum Algorithm {
    /// Ed25519, RFC 8032.
    Ed25519 = 1,
    /// ML-DSA-65, FIPS 204.
    MlDsa65 = 2,
    /// SLH-DSA-SHA2-128f, FIPS 205.
    SlhDsaSha2128f = 3,
}

impl Algorithm {
    /// All that encodings may name.
    pub const ALL: [Self; 3] = [Self::Ed25519, Self::MlDsa65, Self::SlhDsaSha2128f];

    /// The name that documents use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ed25519 => "ed25519",
            Self::MlDsa65 => "ml-dsa-65",
            Self::SlhDsaSha2128f => "slh-dsa-sha2-128f",
        }
    }

    /// Bytes in a public key.
    #[must_use]
    pub fn public_bytes(self) -> usize {
        match self {
            Self::Ed25519 | Self::SlhDsaSha2128f => 32,
            Self::MlDsa65 => 1952,
        }
    }

    /// Bytes in a signature.
    #[must_use]
    pub fn signature_bytes(self) -> usize {
        match self {
            Self::Ed25519 => 64,
            Self::MlDsa65 => 3309,
            Self::SlhDsaSha2128f => 17_088,
        }
    }

    /// Whether it signs checkpoints only, because its signatures are large and slow.
    #[must_use]
    pub fn is_for_checkpoints(self) -> bool {
        self == Self::SlhDsaSha2128f
    }

    fn seed_bytes(self) -> usize {
        match self {
            Self::Ed25519 | Self::MlDsa65 => 32,
            Self::SlhDsaSha2128f => 48,
        }
    }

    /// Whether this build can sign and check with it.
    #[must_use]
    pub fn is_supported(self) -> bool {
        match self {
            Self::Ed25519 => true,
            Self::MlDsa65 => cfg!(feature = "ml-dsa"),
            Self::SlhDsaSha2128f => cfg!(feature = "slh-dsa"),
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let code = reader.u8()?;
        let found = Self::ALL
            .into_iter()
            .find(|algorithm| *algorithm as u8 == code);
        found.ok_or_else(|| reader.invalid("algorithm"))
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = SignError;

    fn from_str(text: &str) -> Result<Self, SignError> {
        let found = Self::ALL
            .into_iter()
            .find(|algorithm| algorithm.name() == text);
        found.ok_or(SignError::KeyText)
    }
}

/// What is wrong with a key or a signature.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SignError {
    /// The signature does not match.
    #[error("the {algorithm} signature by key {key} does not match")]
    Mismatch {
        /// Its algorithm.
        algorithm: Algorithm,
        /// The key it names.
        key: KeyId,
    },
    /// This build lacks the algorithm.
    #[error("this build cannot use {0}; build it with the feature of that name")]
    Unsupported(Algorithm),
    /// A text that is no key.
    #[error("not a key: expected `<algorithm>:<base64>`, with the algorithm's length")]
    KeyText,
    /// The system's random source failed.
    #[error("the system gives no random bytes for a new key")]
    Random,
    /// The library refused to sign.
    #[error("{0} failed to sign")]
    Signing(Algorithm),
}

/// Names a public key: a hash of its algorithm and bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub Digest);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({:?})", self.0)
    }
}

/// A public key.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub struct PublicKey {
    algorithm: Algorithm,
    bytes: Vec<u8>,
}

impl PublicKey {
    /// From raw bytes; `None` if their number is not the algorithm's.
    #[must_use]
    pub fn new(algorithm: Algorithm, bytes: &[u8]) -> Option<Self> {
        let is_whole = bytes.len() == algorithm.public_bytes();
        is_whole.then(|| Self {
            algorithm,
            bytes: bytes.to_vec(),
        })
    }

    /// Its algorithm.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Its raw bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> KeyId {
        KeyId(hash::KEY_ID.hash(&[&[self.algorithm as u8], &self.bytes]))
    }

    /// Checks a signature over `digest`.
    ///
    /// # Errors
    /// [`SignError::Mismatch`], also if the signature names another key, and
    /// [`SignError::Unsupported`].
    pub fn verify(&self, digest: &Digest, signature: &Signature) -> Result<(), SignError> {
        let (algorithm, key) = (signature.algorithm, signature.key);
        let mismatch = SignError::Mismatch { algorithm, key };
        if self.algorithm != algorithm || self.id() != key {
            return Err(mismatch);
        }
        let message = [PREFIX.as_slice(), &digest.0].concat();
        let is_good = match algorithm {
            Algorithm::Ed25519 => {
                let key = UnparsedPublicKey::new(&ED25519, &self.bytes);
                key.verify(&message, &signature.bytes).is_ok()
            }
            #[cfg(feature = "ml-dsa")]
            Algorithm::MlDsa65 => ml_dsa::verify(&self.bytes, &message, &signature.bytes),
            #[cfg(feature = "slh-dsa")]
            Algorithm::SlhDsaSha2128f => slh_dsa::verify(&self.bytes, &message, &signature.bytes),
            #[cfg(not(all(feature = "ml-dsa", feature = "slh-dsa")))]
            other => return Err(SignError::Unsupported(other)),
        };
        if is_good { Ok(()) } else { Err(mismatch) }
    }

    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.u8(self.algorithm as u8).bytes(&self.bytes);
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let algorithm = Algorithm::decode(reader)?;
        let bytes = reader.take(algorithm.public_bytes())?.to_vec();
        Ok(Self { algorithm, bytes })
    }
}

impl fmt::Display for PublicKey {
    /// `<algorithm>:<base64>`, the form of a public key file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, BASE64.encode(&self.bytes))
    }
}

impl FromStr for PublicKey {
    type Err = SignError;

    fn from_str(text: &str) -> Result<Self, SignError> {
        let (algorithm, bytes) = key_text(text)?;
        Self::new(algorithm, &bytes).ok_or(SignError::KeyText)
    }
}

fn key_text(text: &str) -> Result<(Algorithm, Vec<u8>), SignError> {
    let (algorithm, bytes) = text.trim().split_once(':').ok_or(SignError::KeyText)?;
    let bytes = BASE64.decode(bytes).map_err(|_| SignError::KeyText)?;
    Ok((algorithm.parse()?, bytes))
}

/// A secret key: the seed that everything else is derived from. Its `Debug` does not show it, and
/// it is overwritten when dropped.
#[derive(Clone)]
pub struct SecretKey {
    algorithm: Algorithm,
    seed: Vec<u8>,
    /// Deriving it costs as much as a signature.
    public: PublicKey,
}

impl SecretKey {
    /// Draws a new key from the system's random source.
    ///
    /// # Errors
    /// [`SignError::Random`], [`SignError::Unsupported`].
    pub fn generate(algorithm: Algorithm) -> Result<Self, SignError> {
        let mut seed = vec![0; algorithm.seed_bytes()];
        SystemRandom::new()
            .fill(&mut seed)
            .map_err(|_| SignError::Random)?;
        Self::from_seed(algorithm, &seed)
    }

    /// The key of a seed of 32 bytes (SLH-DSA: 48).
    ///
    /// # Errors
    /// [`SignError::KeyText`] for another length, [`SignError::Unsupported`], and
    /// [`SignError::Signing`] if the library refuses the seed.
    pub fn from_seed(algorithm: Algorithm, seed: &[u8]) -> Result<Self, SignError> {
        if !algorithm.is_supported() {
            return Err(SignError::Unsupported(algorithm));
        }
        if seed.len() != algorithm.seed_bytes() {
            return Err(SignError::KeyText);
        }
        Ok(Self {
            algorithm,
            seed: seed.to_vec(),
            public: derive_public(algorithm, seed)?,
        })
    }

    /// Reads the text of a key file, as [`Self::to_text`] writes it.
    ///
    /// # Errors
    /// [`SignError::KeyText`], [`SignError::Unsupported`].
    pub fn from_text(text: &str) -> Result<Self, SignError> {
        let text = text
            .trim()
            .strip_prefix("secret:")
            .ok_or(SignError::KeyText)?;
        let (algorithm, seed) = key_text(text)?;
        Self::from_seed(algorithm, &seed)
    }

    /// `secret:<algorithm>:<base64 of the seed>`. The caller keeps it in a file of mode 0600.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("secret:{}:{}", self.algorithm, BASE64.encode(&self.seed))
    }

    /// The public key.
    #[must_use]
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Signs `digest`.
    ///
    /// # Errors
    /// [`SignError::Signing`] if the library fails.
    pub fn sign(&self, digest: &Digest) -> Result<Signature, SignError> {
        let failed = SignError::Signing(self.algorithm);
        let message = [PREFIX.as_slice(), &digest.0].concat();
        let bytes = match self.algorithm {
            Algorithm::Ed25519 => ed25519(&self.seed)?.sign(&message).as_ref().to_vec(),
            #[cfg(feature = "ml-dsa")]
            Algorithm::MlDsa65 => ml_dsa::sign(&self.seed, &message).ok_or(failed)?,
            #[cfg(feature = "slh-dsa")]
            Algorithm::SlhDsaSha2128f => slh_dsa::sign(&self.seed, &message).ok_or(failed)?,
            #[cfg(not(all(feature = "ml-dsa", feature = "slh-dsa")))]
            other => return Err(SignError::Unsupported(other)),
        };
        Signature::new(self.algorithm, self.public.id(), &bytes).ok_or(failed)
    }
}

fn derive_public(algorithm: Algorithm, seed: &[u8]) -> Result<PublicKey, SignError> {
    let failed = SignError::Signing(algorithm);
    let bytes = match algorithm {
        Algorithm::Ed25519 => ed25519(seed)?.public_key().as_ref().to_vec(),
        #[cfg(feature = "ml-dsa")]
        Algorithm::MlDsa65 => ml_dsa::public(seed).ok_or(failed)?,
        #[cfg(feature = "slh-dsa")]
        Algorithm::SlhDsaSha2128f => slh_dsa::public(seed).ok_or(failed)?,
        #[cfg(not(all(feature = "ml-dsa", feature = "slh-dsa")))]
        other => return Err(SignError::Unsupported(other)),
    };
    PublicKey::new(algorithm, &bytes).ok_or(failed)
}

fn ed25519(seed: &[u8]) -> Result<Ed25519KeyPair, SignError> {
    let failed = SignError::Signing(Algorithm::Ed25519);
    Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| failed)
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({}, ..)", self.algorithm)
    }
}

impl Drop for SecretKey {
    fn drop(&mut self) {
        self.seed.fill(0);
        // Keeps the compiler from leaving the stores out.
        black_box(&self.seed);
    }
}

/// A signature, and the key that made it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signature {
    algorithm: Algorithm,
    key: KeyId,
    bytes: Vec<u8>,
}

impl Signature {
    /// Most signatures on one thing: one for each algorithm.
    pub const MAX: usize = Algorithm::ALL.len();

    /// From raw bytes; `None` if their number is not the algorithm's.
    #[must_use]
    pub fn new(algorithm: Algorithm, key: KeyId, bytes: &[u8]) -> Option<Self> {
        let is_whole = bytes.len() == algorithm.signature_bytes();
        is_whole.then(|| Self {
            algorithm,
            key,
            bytes: bytes.to_vec(),
        })
    }

    /// Its algorithm.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The key that made it.
    #[must_use]
    pub fn key(&self) -> KeyId {
        self.key
    }

    /// Its raw bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Appends the encoding of several: count, then each with algorithm, key id, bytes.
    pub(crate) fn encode_all(signatures: &[Self], writer: &mut Writer) {
        // At most a few: `decode_all` refuses more.
        writer.u8(u8::try_from(signatures.len()).unwrap_or(u8::MAX));
        for signature in signatures {
            writer
                .u8(signature.algorithm as u8)
                .digest(&signature.key.0)
                .bytes(&signature.bytes);
        }
    }

    /// Reads up to `most` signatures.
    pub(crate) fn decode_all(
        reader: &mut Reader<'_>,
        most: usize,
    ) -> Result<Vec<Self>, DecodeError> {
        let count = usize::from(reader.u8()?);
        if count > most {
            return Err(reader.invalid("number of signatures"));
        }
        (0..count)
            .map(|_| {
                let (algorithm, key) = (Algorithm::decode(reader)?, KeyId(reader.digest()?));
                let bytes = reader.take(algorithm.signature_bytes())?.to_vec();
                Ok(Self {
                    algorithm,
                    key,
                    bytes,
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> impl Iterator<Item = SecretKey> {
        let supported = Algorithm::ALL
            .into_iter()
            .filter(|algorithm| algorithm.is_supported());
        supported.map(|algorithm| {
            SecretKey::from_seed(algorithm, &vec![3; algorithm.seed_bytes()]).unwrap()
        })
    }

    #[test]
    fn a_signature_holds_for_its_digest_and_key_only() {
        let (digest, other) = (hash::ANCHOR.hash(&[b"1"]), hash::ANCHOR.hash(&[b"2"]));
        for key in supported() {
            let (public, signature) = (key.public(), key.sign(&digest).unwrap());
            assert_eq!(public.verify(&digest, &signature), Ok(()));
            assert!(public.verify(&other, &signature).is_err());
            let stranger = SecretKey::generate(key.algorithm).unwrap();
            let stranger = stranger.public();
            assert!(stranger.verify(&digest, &signature).is_err());
            let renamed = Signature {
                key: stranger.id(),
                ..signature.clone()
            };
            assert!(stranger.verify(&digest, &renamed).is_err());
        }
    }

    #[test]
    fn a_flipped_bit_in_a_signature_is_refused() {
        let digest = hash::ANCHOR.hash(&[b"1"]);
        for key in supported() {
            let (public, signature) = (key.public(), key.sign(&digest).unwrap());
            // SLH-DSA checks take a millisecond each: every bit of the small ones, some of the
            // large.
            let step = signature.bytes.len().div_ceil(200);
            for bit in (0..signature.bytes.len() * 8).step_by(step) {
                let mut bad = signature.clone();
                bad.bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(
                    public.verify(&digest, &bad).is_err(),
                    "{} bit {bit}",
                    key.algorithm
                );
            }
        }
    }

    #[test]
    fn keys_have_one_text_and_a_secret_is_not_shown() {
        for key in supported() {
            let public = key.public().clone();
            assert_eq!(public.to_string().parse(), Ok(public.clone()));
            let again = SecretKey::from_text(&key.to_text()).unwrap();
            assert_eq!(again.public(), &public);
            assert!(!format!("{key:?}").contains(&BASE64.encode(&key.seed)));
        }
        assert_eq!("ed25519:AAAA".parse::<PublicKey>(), Err(SignError::KeyText));
        assert_eq!("rsa:AAAA".parse::<PublicKey>(), Err(SignError::KeyText));
        assert!(SecretKey::from_text("ed25519:AAAA").is_err());
    }

    #[test]
    fn what_this_build_cannot_check_is_never_good() {
        for algorithm in Algorithm::ALL
            .into_iter()
            .filter(|algorithm| !algorithm.is_supported())
        {
            let public = PublicKey::new(algorithm, &vec![1; algorithm.public_bytes()]).unwrap();
            let bytes = vec![1; algorithm.signature_bytes()];
            let signature = Signature::new(algorithm, public.id(), &bytes).unwrap();
            let error = Err(SignError::Unsupported(algorithm));
            assert_eq!(public.verify(&Digest::ZERO, &signature), error);
            assert!(SecretKey::generate(algorithm).is_err());
        }
    }
}
