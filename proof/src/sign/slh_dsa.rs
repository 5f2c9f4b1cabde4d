//! SLH-DSA-SHA2-128f in pure Rust: 17 KB and some milliseconds, hence for checkpoints only.

use fips205::slh_dsa_sha2_128f::{KG, PrivateKey, PublicKey};
use fips205::traits::{KeyGen, SerDes, Signer, Verifier};

/// The seed is `SK.seed`, `SK.prf`, `PK.seed`, 16 bytes each.
fn pair(seed: &[u8]) -> Option<(PublicKey, PrivateKey)> {
    let (parts, rest) = seed.as_chunks::<16>();
    let [sk_seed, sk_prf, pk_seed] = parts else {
        return None;
    };
    rest.is_empty()
        .then(|| KG::keygen_from_seed(sk_seed, sk_prf, pk_seed))
}

pub(super) fn public(seed: &[u8]) -> Option<Vec<u8>> {
    Some(pair(seed)?.0.into_bytes().to_vec())
}

pub(super) fn sign(seed: &[u8], message: &[u8]) -> Option<Vec<u8>> {
    Some(pair(seed)?.1.try_sign(message, b"", true).ok()?.to_vec())
}

pub(super) fn verify(public: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let (Ok(public), Ok(signature)) = (public.try_into(), signature.try_into()) else {
        return false;
    };
    PublicKey::try_from_bytes(public).is_ok_and(|key| key.verify(message, signature, b""))
}
