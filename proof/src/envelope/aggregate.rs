//! `scxq2.aggregate.v1`: a range of anchors in one document, verified with public keys only.
//!
//! It names the proof hashes of the anchors and folds them, in order, into one root. It comes in
//! two forms. *With records* it carries the ledger's records from the first anchor to the last, key
//! changes and notes among them, byte for byte; then each anchor's own signature counts, and the
//! aggregate needs none. *Compact*, it carries the hashes only and one signature over their root.
//!
//! With records, the keys that are trusted are those that were active where the range begins.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hn4::types::{Epoch, NodeId, VolumeId};
use serde::{Deserialize, Serialize};

use super::block::ClaimError;
use super::{EnvelopeError, SignatureText, Subject, parse_blake3, parse_json};
use crate::anchor::{Anchor, SignedAnchor, StateAt, blake3_text};
use crate::fold::{self, InclusionProof, Kind};
use crate::hash::{self, Digest};
use crate::ledger::verify::{LedgerError, Policy, Verifier};
use crate::ledger::{Body, Record, RecordError};
use crate::sign::keyring::{KeyError, Keyring};
use crate::sign::{PublicKey, SecretKey, SignError, Signature};
use crate::time::iso8601;

/// Name of the document.
pub const SCHEMA: &str = "scxq2.aggregate.v1";
/// Longest document, in bytes of JSON.
pub const MAX_AGGREGATE_BYTES: usize = 256 << 20;
/// Most proofs in an aggregate.
pub const MAX_PROOFS: usize = 1 << 20;

/// `scxq2.aggregate.v1`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Aggregate {
    /// [`SCHEMA`].
    pub schema: String,
    /// What it is about.
    pub subject: Subject,
    /// Number of proofs.
    pub count: u64,
    /// Fold of the proof hashes, `blake3:<hex>`.
    pub root_hash: String,
    /// The proof hashes, in order.
    pub proof_hashes: Vec<String>,
    /// Records of the ledger, base64; empty in the compact form.
    pub records: Vec<String>,
    /// Over the whole; empty with records.
    pub signatures: Vec<SignatureText>,
    /// Of the last anchor, ISO 8601.
    pub timestamp: String,
}

/// Why an aggregate is refused.
#[derive(Debug, thiserror::Error)]
pub enum AggregateError {
    /// The document, or one of its fields.
    #[error(transparent)]
    Document(#[from] EnvelopeError),
    /// The records are no part of a ledger that the trusted keys signed.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// It is about another volume.
    #[error("the proof is about volume {found}, not {expected}")]
    OtherVolume {
        /// Asked for.
        expected: VolumeId,
        /// Found.
        found: VolumeId,
    },
    /// It does not cover the epochs that were asked for.
    #[error("the proof covers epochs {found}, not {first} to {last}")]
    Range {
        /// First epoch asked for.
        first: Epoch,
        /// Last epoch asked for.
        last: Epoch,
        /// What it covers.
        found: String,
    },
    /// There is nothing to aggregate.
    #[error("no anchor lies in the range")]
    Empty,
    /// What is claimed does not follow.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// Signing failed.
    #[error(transparent)]
    Sign(#[from] SignError),
}

/// An aggregate that was found good.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proven {
    /// First epoch.
    pub first: Epoch,
    /// Last epoch.
    pub last: Epoch,
    /// The proof hashes, in order.
    pub proof_hashes: Vec<Digest>,
    /// The anchors; empty in the compact form.
    pub anchors: Vec<Anchor>,
    /// States that anchors and checkpoints vouch for; empty in the compact form.
    pub states: Vec<StateAt>,
}

fn digest(subject: &Subject, count: u64, root: &Digest, timestamp: &str) -> Digest {
    let mut writer = crate::codec::Writer::new();
    writer
        .sized(subject.object.as_bytes())
        .sized(subject.version.as_bytes());
    writer
        .u64(subject.byte_length)
        .u64(count)
        .digest(root)
        .sized(timestamp.as_bytes());
    hash::AGGREGATE.hash(&[writer.as_slice()])
}

impl Aggregate {
    /// With records: `records` are consecutive records of a ledger, in their encoding, the first
    /// one an anchor, the last one an anchor or a checkpoint.
    ///
    /// # Errors
    /// [`AggregateError::Empty`] if there are none, [`AggregateError::Ledger`] if they are no
    /// records.
    pub fn with_records(records: &[Vec<u8>]) -> Result<Self, AggregateError> {
        let mut anchors = Vec::new();
        for bytes in records {
            if let Body::Anchor(signed) = decode(bytes)?.body {
                anchors.push(*signed);
            }
        }
        let mut aggregate = Self::of(&anchors)?;
        aggregate.records = records.iter().map(|bytes| BASE64.encode(bytes)).collect();
        Ok(aggregate)
    }

    /// Compact: signed once with `keys`, one for each algorithm, in order.
    ///
    /// # Errors
    /// [`AggregateError::Empty`], [`AggregateError::Sign`].
    pub fn compact(anchors: &[SignedAnchor], keys: &[&SecretKey]) -> Result<Self, AggregateError> {
        let mut aggregate = Self::of(anchors)?;
        let root = aggregate.fold_root()?;
        let digest = digest(
            &aggregate.subject,
            aggregate.count,
            &root,
            &aggregate.timestamp,
        );
        for key in keys {
            aggregate
                .signatures
                .push(SignatureText::from(&key.sign(&digest)?));
        }
        Ok(aggregate)
    }

    fn of(anchors: &[SignedAnchor]) -> Result<Self, AggregateError> {
        let (Some(first), Some(last)) = (anchors.first(), anchors.last()) else {
            return Err(AggregateError::Empty);
        };
        let hashes: Vec<Digest> = anchors
            .iter()
            .map(|signed| signed.anchor.proof_hash)
            .collect();
        let bytes = anchors.iter().map(|signed| signed.anchor.raw_bytes);
        let bytes = bytes.fold(0_u64, u64::saturating_add);
        let epochs = (first.anchor.first, last.anchor.last);
        Ok(Self {
            schema: SCHEMA.to_owned(),
            subject: Subject::new(first.anchor.volume, epochs, bytes),
            count: hashes.len() as u64,
            root_hash: blake3_text(&fold::root(Kind::Aggregate, &hashes)),
            proof_hashes: hashes.iter().map(blake3_text).collect(),
            records: Vec::new(),
            signatures: Vec::new(),
            timestamp: iso8601(last.anchor.time_ms),
        })
    }

    fn hashes(&self) -> Result<Vec<Digest>, EnvelopeError> {
        let parse = |text: &String| parse_blake3(text);
        let hashes = self.proof_hashes.iter().map(parse).collect::<Option<_>>();
        hashes.ok_or(EnvelopeError::Field("proof_hashes"))
    }

    fn fold_root(&self) -> Result<Digest, EnvelopeError> {
        Ok(fold::root(Kind::Aggregate, &self.hashes()?))
    }

    /// Proof that one of the proofs is part of this aggregate; log n hashes.
    #[must_use]
    pub fn prove(&self, index: u64) -> Option<InclusionProof> {
        InclusionProof::build(Kind::Aggregate, &self.hashes().ok()?, index)
    }

    /// The document.
    ///
    /// # Errors
    /// [`EnvelopeError::Json`] if serialisation fails.
    pub fn to_json(&self) -> Result<String, EnvelopeError> {
        serde_json::to_string(self).map_err(|error| EnvelopeError::Json(error.to_string()))
    }

    fn check_shape(&self) -> Result<(), EnvelopeError> {
        if self.schema != SCHEMA {
            return Err(EnvelopeError::Schema(self.schema.clone()));
        }
        let count = self.proof_hashes.len();
        if count == 0 || count > MAX_PROOFS || self.count != count as u64 {
            return Err(EnvelopeError::Field("count"));
        }
        if parse_blake3(&self.root_hash) != Some(self.fold_root()?) {
            return Err(EnvelopeError::Root);
        }
        Ok(())
    }
}

fn decode(bytes: &[u8]) -> Result<Record, LedgerError> {
    let wrong = |source| LedgerError::Record { index: 0, source };
    match Record::decode(bytes).map_err(wrong)? {
        (record, length) if length == bytes.len() => Ok(record),
        _ => Err(wrong(RecordError::Head)),
    }
}

/// Verifies an aggregate with records: every signature, the chain of records, and that anchors
/// follow each other without gap from the first epoch to the last. Needs nothing but public keys.
///
/// # Errors
/// [`AggregateError`] naming the first thing wrong.
pub fn verify_range(
    text: &str,
    (volume, first, last): (VolumeId, Epoch, Epoch),
    trusted: &[PublicKey],
    policy: Policy,
) -> Result<Proven, AggregateError> {
    Aggregate::from_json(text)?.verify((volume, first, last), trusted, policy)
}

impl Aggregate {
    /// Reads a document in JSON.
    ///
    /// # Errors
    /// [`EnvelopeError`] if it is none.
    pub fn from_json(text: &str) -> Result<Self, EnvelopeError> {
        parse_json(text, MAX_AGGREGATE_BYTES)
    }

    /// As [`verify_range`], for a document that was read, from either form.
    ///
    /// # Errors
    /// [`AggregateError`] naming the first thing wrong.
    pub fn verify(
        &self,
        (volume, first, last): (VolumeId, Epoch, Epoch),
        trusted: &[PublicKey],
        policy: Policy,
    ) -> Result<Proven, AggregateError> {
        self.check_shape()?;
        let field = |name| AggregateError::Document(EnvelopeError::Field(name));
        let mut raw = Vec::with_capacity(self.records.len());
        for record in &self.records {
            raw.push(BASE64.decode(record).map_err(|_| field("records"))?);
        }
        let start = decode(raw.first().ok_or(AggregateError::Empty)?)?;
        let mut verifier = Verifier::segment(volume, &start, trusted, policy);
        let (mut anchors, mut states) = (Vec::new(), Vec::new());
        let mut ends = false;
        for bytes in &raw {
            // Asked before the rules, for the clearer answer.
            if let Body::Anchor(signed) = &decode(bytes)?.body
                && signed.anchor.volume != volume
            {
                let (expected, found) = (volume, signed.anchor.volume);
                return Err(AggregateError::OtherVolume { expected, found });
            }
            ends = false;
            match verifier.push_bytes(bytes)?.body {
                Body::Anchor(signed) => {
                    states.extend(signed.anchor.state);
                    anchors.push(signed.anchor);
                    ends = true;
                }
                Body::Checkpoint(signed) => {
                    let epoch = signed.checkpoint.epoch;
                    let root = signed.checkpoint.root;
                    states.extend(root.map(|root| StateAt { epoch, root }));
                    ends = true;
                }
                Body::Key(_) | Body::Note(_) | Body::Inspection(_) => {}
            }
        }
        let begins = matches!(start.body, Body::Anchor(_));
        if *self != Self::with_records(&raw)? || !begins || !ends {
            return Err(field("subject, proof_hashes, records or timestamp"));
        }
        let covers = anchors.first().is_some_and(|anchor| anchor.first <= first)
            && anchors.last().is_some_and(|anchor| anchor.last >= last);
        if !covers || first > last {
            let found = self.subject.version.clone();
            return Err(AggregateError::Range { first, last, found });
        }
        Ok(Proven {
            first,
            last,
            proof_hashes: anchors.iter().map(|anchor| anchor.proof_hash).collect(),
            anchors,
            states,
        })
    }
}

/// Verifies a compact aggregate: the fold, and the signature of `node` over it.
///
/// # Errors
/// [`AggregateError`] naming the first thing wrong.
pub fn verify_compact(
    text: &str,
    volume: VolumeId,
    (keys, node): (&Keyring, NodeId),
    policy: &Policy,
) -> Result<Proven, AggregateError> {
    let aggregate: Aggregate = parse_json(text, MAX_AGGREGATE_BYTES)?;
    aggregate.check_shape()?;
    if aggregate.signatures.len() > Signature::MAX || !aggregate.records.is_empty() {
        return Err(EnvelopeError::Field("signatures").into());
    }
    let parsed = aggregate.signatures.iter().map(SignatureText::parse);
    let signatures: Vec<Signature> = parsed.collect::<Result<_, _>>()?;
    let root = aggregate.fold_root()?;
    let digest = digest(
        &aggregate.subject,
        aggregate.count,
        &root,
        &aggregate.timestamp,
    );
    let verified = keys.verify(&digest, node, &signatures, &policy.every_batch);
    verified.map_err(|error: KeyError| EnvelopeError::Signature(error))?;
    let epochs = aggregate.subject.version.split_once('-');
    let epochs = epochs
        .and_then(|(first, last)| Some((Epoch(first.parse().ok()?), Epoch(last.parse().ok()?))));
    let (first, last) = epochs.ok_or(EnvelopeError::Field("version"))?;
    let subject = Subject::new(volume, (first, last), aggregate.subject.byte_length);
    if aggregate.subject != subject {
        return Err(EnvelopeError::Field("subject").into());
    }
    Ok(Proven {
        first,
        last,
        proof_hashes: aggregate.hashes()?,
        anchors: Vec::new(),
        states: Vec::new(),
    })
}
