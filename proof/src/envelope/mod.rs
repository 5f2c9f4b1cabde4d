//! Proofs as documents, in JSON or protobuf. //= WORMHOLE_SPEC 4
//!
//! `scxq2.proof.v1` carries one anchor beside the data that it is about, or after it. The anchor's
//! encoding is the proof; every other field repeats a part of it in the reference's names. A
//! verifier rebuilds the document from the signed anchor and compares, so no field can say anything
//! else than what was signed, and a changed one is named.
//!
//! The order is fixed: signature, proof against `root_hash`, decode, hash the decoded data,
//! compare. The first two are [`verify`]; decoding is [`crate::scxq2`]'s; [`Verified::check`] does
//! the rest. A failure marks the state invalid and stops nothing.
//!
//! | file | what it is for |
//! |---|---|
//! | `mod.rs` | the envelope of one anchor |
//! | [`aggregate`] | `scxq2.aggregate.v1`: a range of anchors, verified with public keys only |
//! | [`block`] | "block X at epoch E was Y": the proof |
//! | [`claim`] | `scxq2.block.v1`: that proof with what it stands on |
//! | [`proto`] | all documents in protobuf |

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hn4::types::{Epoch, VolumeId};
use serde::{Deserialize, Serialize};

use crate::anchor::{Anchor, Disagreement, Phase, SignedAnchor, blake3_text, sha256_text};
use crate::batch::Batch;
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{BadDigest, Digest};
use crate::ledger::verify::Policy;
use crate::sign::keyring::{KeyError, Keyring};
use crate::sign::{Algorithm, KeyId, SignError, Signature};
use crate::time::iso8601;

pub mod aggregate;
pub mod block;
pub mod claim;
pub mod proto;

/// Name of the document.
pub const SCHEMA: &str = "scxq2.proof.v1";
/// The proof type of the envelope of one anchor.
pub const MERKLE_BATCH: &str = "merkle-batch";
/// The type of a succinct proof over many; builds with the feature `stark` make and check them.
pub const ZK_STARK: &str = "zk-stark";
/// Longest envelope, in bytes of JSON.
pub const MAX_ENVELOPE_BYTES: usize = 1 << 20;
const VERSION: u8 = 1;

/// `scxq2.proof.v1`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// [`SCHEMA`].
    pub schema: String,
    /// What it is about.
    pub subject: Subject,
    /// How the data was packed.
    pub compression: Compression,
    /// What the data must hash to.
    pub integrity: Integrity,
    /// The proof.
    pub proof: Proof,
    /// Over the anchor.
    pub signatures: Vec<SignatureText>,
    /// ISO 8601.
    pub timestamp: String,
}

/// What a document is about.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// `object://volume/<uuid>`.
    pub object: String,
    /// `<first epoch>-<last epoch>`.
    pub version: String,
    /// Payload bytes, raw.
    pub byte_length: u64,
}

impl Subject {
    pub(crate) fn new(volume: VolumeId, (first, last): (Epoch, Epoch), byte_length: u64) -> Self {
        let object = format!("object://volume/{volume}");
        Self {
            object,
            version: format!("{first}-{last}"),
            byte_length,
        }
    }
}

/// How the data was packed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compression {
    /// `scxq2`.
    pub algorithm: String,
    /// `sha256:<hex>`, or null.
    pub dictionary_id: Option<String>,
    /// Packed bytes per raw byte, to four decimals.
    pub ratio: f64,
}

/// What the data must hash to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Integrity {
    /// The batch root, `blake3:<hex>`.
    pub root_hash: String,
    /// The lane hashes, in the order of the lanes.
    pub chunk_hashes: Vec<String>,
}

/// The proof.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    /// [`MERKLE_BATCH`], or [`ZK_STARK`].
    #[serde(rename = "type")]
    pub kind: String,
    /// Base64: a version byte and the anchor; of other types what they say.
    pub proof_bytes: String,
}

/// A signature.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignatureText {
    /// `ed25519`, `ml-dsa-65` or `slh-dsa-sha2-128f`.
    pub algorithm: String,
    /// `blake3:<hex>`.
    pub key_id: String,
    /// Base64.
    pub signature: String,
}

impl From<&Signature> for SignatureText {
    fn from(signature: &Signature) -> Self {
        Self {
            algorithm: signature.algorithm().to_string(),
            key_id: blake3_text(&signature.key().0),
            signature: BASE64.encode(signature.bytes()),
        }
    }
}

impl SignatureText {
    pub(crate) fn parse(&self) -> Result<Signature, EnvelopeError> {
        let field = EnvelopeError::Field("signatures");
        let algorithm: Algorithm = self
            .algorithm
            .parse()
            .map_err(|_: SignError| field.clone())?;
        let key = KeyId(parse_blake3(&self.key_id).ok_or(field.clone())?);
        let bytes = BASE64.decode(&self.signature).map_err(|_| field.clone())?;
        Signature::new(algorithm, key, &bytes).ok_or(field)
    }
}

fn parse_blake3(text: &str) -> Option<Digest> {
    text.strip_prefix("blake3:")?
        .parse()
        .map_err(|_: BadDigest| ())
        .ok()
}

/// The step at which a document failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// The document is longer than any good one.
    #[error("the document has {0} bytes, more than is allowed")]
    TooLong(usize),
    /// It is not the JSON of such a document.
    #[error("not a proof document: {0}")]
    Json(String),
    /// It names another schema or proof type.
    #[error("schema or proof type `{0}` is not known to this build")]
    Schema(String),
    /// The proof's bytes are no proof.
    #[error("the proof is damaged: {0}")]
    Proof(#[from] DecodeError),
    /// Step 1: no good signature by a key that may sign.
    #[error("signature: {0}")]
    Signature(#[from] KeyError),
    /// Step 2: the proof is for another root.
    #[error("the signed proof is not for this root_hash")]
    Root,
    /// Step 2: a field says something else than the signed proof.
    #[error("the field `{0}` says something else than the signed proof")]
    Field(&'static str),
    /// Step 5: the decoded data hashes to something else.
    #[error("data: {0}")]
    Data(#[from] Disagreement),
}

/// An envelope whose signature and fields were found good.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verified(SignedAnchor);

impl Verified {
    /// The anchor that it carries.
    #[must_use]
    pub fn anchor(&self) -> &Anchor {
        &self.0.anchor
    }

    /// Last step: compares with the batch that was computed from the decoded data.
    ///
    /// # Errors
    /// [`EnvelopeError::Data`] naming the part that differs.
    pub fn check(&self, computed: &Batch) -> Result<(), EnvelopeError> {
        Ok(self.0.anchor.agrees_with(computed)?)
    }
}

impl Envelope {
    /// The envelope of a signed anchor.
    #[must_use]
    pub fn new(signed: &SignedAnchor) -> Self {
        let anchor = &signed.anchor;
        let mut proof = Writer::new();
        anchor.encode(proof.u8(VERSION));
        Self {
            schema: SCHEMA.to_owned(),
            subject: Subject::new(anchor.volume, (anchor.first, anchor.last), anchor.raw_bytes),
            compression: Compression {
                algorithm: "scxq2".to_owned(),
                dictionary_id: anchor.dictionary.as_ref().map(sha256_text),
                ratio: ratio(anchor.raw_bytes, anchor.packed_bytes),
            },
            integrity: Integrity {
                root_hash: blake3_text(&anchor.proof_hash),
                chunk_hashes: anchor
                    .lanes
                    .iter()
                    .map(|lane| blake3_text(&lane.hash))
                    .collect(),
            },
            proof: Proof {
                kind: MERKLE_BATCH.to_owned(),
                proof_bytes: BASE64.encode(proof.as_slice()),
            },
            signatures: signed.signatures.iter().map(SignatureText::from).collect(),
            timestamp: iso8601(anchor.time_ms),
        }
    }

    /// Reads a document in JSON, and checks nothing.
    ///
    /// # Errors
    /// [`EnvelopeError`] if it is none.
    pub fn from_json(text: &str) -> Result<Self, EnvelopeError> {
        parse_json(text, MAX_ENVELOPE_BYTES)
    }

    /// The document.
    ///
    /// # Errors
    /// [`EnvelopeError::Json`] if serialisation fails, which it does not for finite numbers.
    pub fn to_json(&self) -> Result<String, EnvelopeError> {
        serde_json::to_string(self).map_err(|error| EnvelopeError::Json(error.to_string()))
    }
}

pub(crate) fn ratio(raw: u64, packed: u64) -> f64 {
    if raw == 0 {
        1.0
    } else {
        (packed as f64 / raw as f64 * 10_000.0).round() / 10_000.0
    }
}

pub(crate) fn parse_json<'a, T: Deserialize<'a>>(
    text: &'a str,
    most: usize,
) -> Result<T, EnvelopeError> {
    if text.len() > most {
        return Err(EnvelopeError::TooLong(text.len()));
    }
    serde_json::from_str(text).map_err(|error| EnvelopeError::Json(error.to_string()))
}

/// Verifies an envelope in JSON up to and including its proof.
///
/// # Errors
/// [`EnvelopeError`] of the first step that fails.
pub fn verify(text: &str, keys: &Keyring, policy: &Policy) -> Result<Verified, EnvelopeError> {
    verify_envelope(Envelope::from_json(text)?, keys, policy)
}

/// The same for one that was read, from either form.
///
/// # Errors
/// [`EnvelopeError`] of the first step that fails.
pub fn verify_envelope(
    envelope: Envelope,
    keys: &Keyring,
    policy: &Policy,
) -> Result<Verified, EnvelopeError> {
    if envelope.schema != SCHEMA {
        return Err(EnvelopeError::Schema(envelope.schema));
    }
    if envelope.proof.kind != MERKLE_BATCH {
        return Err(EnvelopeError::Schema(envelope.proof.kind));
    }
    if envelope.signatures.len() > Signature::MAX {
        return Err(EnvelopeError::Field("signatures"));
    }
    let bytes = BASE64.decode(&envelope.proof.proof_bytes);
    let bytes = bytes.map_err(|_| EnvelopeError::Field("proof_bytes"))?;
    let mut reader = Reader::new("proof", &bytes);
    reader.version(VERSION)?;
    let anchor = Anchor::decode(&mut reader)?;
    reader.finish()?;
    let signatures = envelope
        .signatures
        .iter()
        .map(SignatureText::parse)
        .collect::<Result<Vec<_>, _>>()?;

    let required = policy.required(anchor.phase == Phase::Checkpoint);
    keys.verify(&anchor.hash(), anchor.term.node, &signatures, &required)?;

    let signed = SignedAnchor { anchor, signatures };
    let expected = Envelope::new(&signed);
    if envelope.integrity.root_hash != expected.integrity.root_hash {
        return Err(EnvelopeError::Root);
    }
    let fields = [
        (envelope.subject == expected.subject, "subject"),
        (envelope.compression == expected.compression, "compression"),
        (envelope.integrity == expected.integrity, "integrity"),
        (envelope.proof == expected.proof, "proof"),
        (envelope.signatures == expected.signatures, "signatures"),
        (envelope.timestamp == expected.timestamp, "timestamp"),
    ];
    match fields.iter().find(|(is_same, _)| !is_same) {
        Some((_, field)) => Err(EnvelopeError::Field(field)),
        None => Ok(Verified(signed)),
    }
}

#[cfg(test)]
mod tests;
