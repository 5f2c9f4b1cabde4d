//! `scxq2.block.v1`: "block X at epoch E was Y" in one document, verified with public keys only.
//!
//! It carries the claim, its [`BlockProof`], and the part of the ledger that the proof stands on,
//! as an aggregate with records.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hn4::types::{BLOCK_BYTES, BlockIndex, Epoch, SECTORS_PER_BLOCK, VolumeId};
use serde::{Deserialize, Serialize};

use super::aggregate::{Aggregate, AggregateError, MAX_AGGREGATE_BYTES};
use super::block::{BlockProof, Claim};
use super::{EnvelopeError, Proof, Subject, parse_blake3, parse_json};
use crate::anchor::blake3_text;
use crate::ledger::verify::Policy;
use crate::sign::PublicKey;

/// Name of the document.
pub const SCHEMA: &str = "scxq2.block.v1";
/// Its proof type.
pub const MERKLE_BLOCK: &str = "merkle-block";

/// `scxq2.block.v1`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockDocument {
    /// [`SCHEMA`].
    pub schema: String,
    /// The volume, the epoch as `<epoch>-<epoch>`, and the length of a block.
    pub subject: Subject,
    /// Which block.
    pub block: Sectors,
    /// Leaf of its content, `blake3:<hex>`.
    pub leaf: String,
    /// [`MERKLE_BLOCK`], and base64 of the block proof.
    pub proof: Proof,
    /// What it stands on.
    pub anchors: Aggregate,
}

/// A run of sectors of 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sectors {
    /// The first one.
    pub lba: u64,
    /// How many.
    pub sectors: u64,
}

fn sectors(block: BlockIndex) -> Sectors {
    Sectors {
        lba: block.lba().0,
        sectors: SECTORS_PER_BLOCK,
    }
}

impl BlockDocument {
    /// The document of a claim.
    #[must_use]
    pub fn new(volume: VolumeId, claim: &Claim, proof: &BlockProof, anchors: Aggregate) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            subject: Subject::new(volume, (claim.epoch, claim.epoch), BLOCK_BYTES),
            block: sectors(claim.block),
            leaf: blake3_text(&claim.leaf),
            proof: Proof {
                kind: MERKLE_BLOCK.to_owned(),
                proof_bytes: BASE64.encode(proof.encode()),
            },
            anchors,
        }
    }

    /// The document as JSON.
    ///
    /// # Errors
    /// [`EnvelopeError::Json`] if serialisation fails.
    pub fn to_json(&self) -> Result<String, EnvelopeError> {
        serde_json::to_string(self).map_err(|error| EnvelopeError::Json(error.to_string()))
    }

    /// Reads a document.
    ///
    /// # Errors
    /// [`EnvelopeError`] if it is none.
    pub fn from_json(text: &str) -> Result<Self, EnvelopeError> {
        parse_json::<Self>(text, MAX_AGGREGATE_BYTES)?.known()
    }

    pub(super) fn known(self) -> Result<Self, EnvelopeError> {
        for (name, known) in [(&self.schema, SCHEMA), (&self.proof.kind, MERKLE_BLOCK)] {
            if name != known {
                return Err(EnvelopeError::Schema(name.clone()));
            }
        }
        Ok(self)
    }

    /// Verifies signatures, the chain of records, and that the claim follows from them. Whether its
    /// leaf is that of the content in question is the caller's to compare.
    ///
    /// # Errors
    /// [`AggregateError`] naming the first thing wrong.
    pub fn verify(
        &self,
        (volume, block, epoch): (VolumeId, BlockIndex, Epoch),
        trusted: &[PublicKey],
        policy: Policy,
    ) -> Result<Claim, AggregateError> {
        let field = |name| AggregateError::Document(EnvelopeError::Field(name));
        if self.subject != Subject::new(volume, (epoch, epoch), BLOCK_BYTES) {
            return Err(field("subject"));
        }
        if self.block != sectors(block) {
            return Err(field("block"));
        }
        let leaf = parse_blake3(&self.leaf).ok_or(field("leaf"))?;
        let bytes = BASE64.decode(&self.proof.proof_bytes);
        let proof = BlockProof::decode(&bytes.map_err(|_| field("proof_bytes"))?);
        let proof = proof.map_err(EnvelopeError::Proof)?;
        let range = (volume, epoch, epoch);
        let proven = self.anchors.verify(range, trusted, policy)?;
        let claim = Claim { block, epoch, leaf };
        proof.verify(&claim, &proven.anchors, &proven.states)?;
        Ok(claim)
    }
}
