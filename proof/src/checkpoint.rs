//! A signed word on the state of a volume at an anchored epoch.
//!
//! Anchors follow each other quickly and are signed with fast algorithms. A checkpoint record comes
//! now and then, also when nothing is written any more: it names the record before it and so all of
//! history, says what the state root is, if there is a state tree, and carries the slow signatures.
//!
//! Not here: when one is due ([`crate::prover`]), its place in the ledger
//! ([`crate::ledger::verify`]).

use hn4::types::{ChainHash, Epoch, NodeId, Term, VolumeId};

use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, Digest};
use crate::sign::Signature;

const VERSION: u8 = 1;

/// What is signed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checkpoint {
    /// The volume.
    pub volume: VolumeId,
    /// Term under which it is made; its node signs.
    pub term: Term,
    /// Index of its record in the ledger.
    pub step: u64,
    /// Hash of the ledger's record before it.
    pub ledger_previous: Digest,
    /// An epoch that is anchored.
    pub epoch: Epoch,
    /// Hash of that epoch's frame header.
    pub chain: ChainHash,
    /// Root of the state tree at the epoch, if there is a tree.
    pub root: Option<Digest>,
    /// When it was made, in milliseconds since 1970.
    pub time_ms: u64,
}

impl Checkpoint {
    /// What the signatures sign.
    #[must_use]
    pub fn hash(&self) -> Digest {
        let mut writer = Writer::new();
        self.encode(&mut writer);
        hash::CHECKPOINT.hash(&[writer.as_slice()])
    }

    fn encode(&self, writer: &mut Writer) {
        writer.u8(VERSION).bytes(&self.volume.0);
        writer.u64(self.term.counter).bytes(&self.term.node.0);
        writer.u64(self.step).digest(&self.ledger_previous);
        writer.u64(self.epoch.0).bytes(&self.chain.0);
        match &self.root {
            Some(root) => writer.u8(1).digest(root),
            None => writer.u8(0),
        };
        writer.u64(self.time_ms);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.version(VERSION)?;
        Ok(Self {
            volume: VolumeId(reader.array()?),
            term: Term {
                counter: reader.u64()?,
                node: NodeId(reader.array()?),
            },
            step: reader.u64()?,
            ledger_previous: reader.digest()?,
            epoch: Epoch(reader.u64()?),
            chain: ChainHash(reader.array()?),
            root: match reader.u8()? {
                0 => None,
                1 => Some(reader.digest()?),
                _ => return Err(reader.invalid("root flag")),
            },
            time_ms: reader.u64()?,
        })
    }
}

/// A checkpoint with its signatures: the body of a ledger record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SignedCheckpoint {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// One for each algorithm, in the order of the algorithms.
    pub signatures: Vec<Signature>,
}

impl SignedCheckpoint {
    /// Appends the encoding: the checkpoint, then the signatures.
    pub fn encode(&self, writer: &mut Writer) {
        self.checkpoint.encode(writer);
        Signature::encode_all(&self.signatures, writer);
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let checkpoint = Checkpoint::decode(reader)?;
        let signatures = Signature::decode_all(reader, Signature::MAX)?;
        Ok(Self {
            checkpoint,
            signatures,
        })
    }
}
