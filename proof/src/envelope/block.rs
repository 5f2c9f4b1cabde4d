//! "Block X at epoch E was Y", for someone who trusts a range of anchors and nothing else.
//!
//! A proof has a *base*, which says what the block was at some epoch, and the record tables of all
//! epochs from there to E, which show that nothing touched it since. A base is either a path in the
//! state tree up to an anchored state root, or the record that wrote the block in its epoch: the
//! records of an epoch are disjoint, so what an epoch wrote is what the block was when the epoch
//! ended.
//!
//! Y is given as the block's leaf, `derive_key("state leaf", block)`, which whoever has the block
//! computes for himself.

use hn4::types::{BlockIndex, ChainHash, Epoch};

use crate::anchor::{Anchor, StateAt};
use crate::batch::{MAX_EPOCHS, holds_epoch};
use crate::codec::{DecodeError, Reader, Writer};
use crate::fold::{InclusionProof, Kind};
use crate::hash::Digest;
use crate::leaf::{EpochBuilder, LeafKind, RecordLeaf, RecordProof, piece_of};
use crate::tree::path::BlockPath;
use crate::tree::zero_node;

const VERSION: u8 = 1;

/// What is claimed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claim {
    /// The block.
    pub block: BlockIndex,
    /// When.
    pub epoch: Epoch,
    /// Leaf of its content then.
    pub leaf: Digest,
}

/// What the block was at the base epoch, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Base {
    /// The state tree at an anchored root says so.
    State {
        /// The checkpoint.
        epoch: Epoch,
        /// From the leaf to the root.
        path: BlockPath,
    },
    /// A record of the base epoch wrote it.
    Record(Box<RecordBase>),
}

/// A record that wrote the block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordBase {
    /// The record is in its epoch.
    pub record: RecordProof,
    /// The epoch is in its batch.
    pub epoch_in_batch: InclusionProof,
    /// The block is this piece of the record's payload; `None` if the record has no payload.
    pub piece: Option<InclusionProof>,
}

/// All records of one epoch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EpochTable {
    /// Hash of the epoch's frame header.
    pub chain: ChainHash,
    /// Its records, lane by lane in the order of the frame.
    pub records: Vec<RecordLeaf>,
    /// The epoch is in its batch.
    pub epoch_in_batch: InclusionProof,
}

/// Proof of a [`Claim`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockProof {
    /// Where it starts.
    pub base: Base,
    /// The epochs after the base, up to the claimed one, one by one.
    pub since: Vec<EpochTable>,
}

/// Why a claim is not proven.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClaimError {
    /// The anchors that are trusted do not speak of this epoch.
    #[error("no trusted anchor covers epoch {0}")]
    NotAnchored(Epoch),
    /// The base does not lead to what is anchored, or is about another block.
    #[error("the base of the proof does not lead to the anchored root at epoch {0}")]
    Base(Epoch),
    /// An epoch's records do not lead to what is anchored.
    #[error("the records of epoch {0} do not lead to the anchored root")]
    Epoch(Epoch),
    /// The block changed between the base and the claimed epoch.
    #[error("the block was written again in epoch {0}")]
    Touched(Epoch),
    /// The epochs do not reach from the base to the claimed one.
    #[error("the proof ends at epoch {end}, the claim is about epoch {claimed}")]
    End {
        /// Where it ends.
        end: Epoch,
        /// What is claimed.
        claimed: Epoch,
    },
}

fn anchor_of(anchors: &[Anchor], epoch: Epoch) -> Result<&Anchor, ClaimError> {
    let mut covering = anchors
        .iter()
        .filter(|anchor| anchor.first <= epoch && epoch <= anchor.last);
    covering.next().ok_or(ClaimError::NotAnchored(epoch))
}

fn is_anchored(
    anchors: &[Anchor],
    epoch: Epoch,
    root: &Digest,
    proof: &InclusionProof,
) -> Result<bool, ClaimError> {
    let anchor = anchor_of(anchors, epoch)?;
    let span = (anchor.volume, anchor.first, anchor.last);
    Ok(holds_epoch(span, &anchor.proof_hash, (epoch, root), proof))
}

impl BlockProof {
    /// Checks that the claim follows from `anchors` and `states`, which the caller has verified.
    ///
    /// # Errors
    /// [`ClaimError`].
    pub fn verify(
        &self,
        claim: &Claim,
        anchors: &[Anchor],
        states: &[StateAt],
    ) -> Result<(), ClaimError> {
        let mut end = self.verify_base(claim, anchors, states)?;
        for table in &self.since {
            end = end.next();
            let mut builder = EpochBuilder::new(end, table.chain);
            let added = table
                .records
                .iter()
                .try_for_each(|record| builder.record(record));
            added.map_err(|_| ClaimError::Epoch(end))?;
            if !is_anchored(anchors, end, &builder.finish().root, &table.epoch_in_batch)? {
                return Err(ClaimError::Epoch(end));
            }
            if table
                .records
                .iter()
                .any(|record| record.at.touches(claim.block.lba()))
            {
                return Err(ClaimError::Touched(end));
            }
        }
        let claimed = claim.epoch;
        if end == claimed {
            Ok(())
        } else {
            Err(ClaimError::End { end, claimed })
        }
    }

    fn verify_base(
        &self,
        claim: &Claim,
        anchors: &[Anchor],
        states: &[StateAt],
    ) -> Result<Epoch, ClaimError> {
        match &self.base {
            Base::State { epoch, path } => {
                let state = states.iter().find(|state| state.epoch == *epoch);
                let state = state.ok_or(ClaimError::NotAnchored(*epoch))?;
                let holds =
                    path.block() == claim.block && path.computed_root(&claim.leaf) == state.root;
                if holds {
                    Ok(*epoch)
                } else {
                    Err(ClaimError::Base(*epoch))
                }
            }
            Base::Record(base) => {
                let RecordBase {
                    record,
                    epoch_in_batch,
                    piece,
                } = base.as_ref();
                let epoch = record.record.at.epoch;
                let root = record.computed_root();
                let holds = is_anchored(anchors, epoch, &root, epoch_in_batch)?
                    && writes(&record.record, claim, piece.as_ref());
                if holds {
                    Ok(epoch)
                } else {
                    Err(ClaimError::Base(epoch))
                }
            }
        }
    }

    /// The encoding.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u8(VERSION);
        match &self.base {
            Base::State { epoch, path } => path.encode(writer.u8(1).u64(epoch.0)),
            Base::Record(base) => {
                let RecordBase {
                    record,
                    epoch_in_batch,
                    piece,
                } = base.as_ref();
                record.encode(writer.u8(2));
                epoch_in_batch.encode(&mut writer);
                writer.u8(u8::from(piece.is_some()));
                piece.iter().for_each(|piece| piece.encode(&mut writer));
            }
        }
        writer.count(self.since.len());
        for table in &self.since {
            writer.bytes(&table.chain.0).count(table.records.len());
            table
                .records
                .iter()
                .for_each(|record| record.encode(&mut writer));
            table.epoch_in_batch.encode(&mut writer);
        }
        writer.finish()
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("block proof", bytes);
        reader.version(VERSION)?;
        let base = match reader.u8()? {
            1 => Base::State {
                epoch: Epoch(reader.u64()?),
                path: BlockPath::decode(&mut reader)?,
            },
            2 => Base::Record(Box::new(RecordBase {
                record: RecordProof::decode(&mut reader)?,
                epoch_in_batch: InclusionProof::decode(&mut reader)?,
                piece: match reader.u8()? {
                    0 => None,
                    1 => Some(InclusionProof::decode(&mut reader)?),
                    _ => return Err(reader.invalid("piece flag")),
                },
            })),
            _ => return Err(reader.invalid("base")),
        };
        let epochs = reader.count(MAX_EPOCHS, "number of epochs")?;
        let mut since = Vec::new();
        for _ in 0..epochs {
            let chain = ChainHash(reader.array()?);
            // Each record takes 59 bytes of the input.
            let most = reader.remaining() / 59;
            let count = reader.count(most, "number of records")?;
            let records = (0..count).map(|_| RecordLeaf::decode(&mut reader));
            let records = records.collect::<Result<_, _>>()?;
            let epoch_in_batch = InclusionProof::decode(&mut reader)?;
            since.push(EpochTable {
                chain,
                records,
                epoch_in_batch,
            });
        }
        reader.finish()?;
        Ok(Self { base, since })
    }
}

/// Whether the record leaves the claimed content in the block.
fn writes(record: &RecordLeaf, claim: &Claim, piece: Option<&InclusionProof>) -> bool {
    let Some((pieces, index)) = piece_of(&record.at, claim.block.lba()) else {
        return false;
    };
    match (record.at.kind, piece) {
        (LeafKind::Data, Some(piece)) => {
            piece.kind() == Kind::Pieces
                && (piece.size(), piece.index()) == (pieces, index)
                && piece.computed_root(&claim.leaf) == record.payload
        }
        (LeafKind::Zeroes | LeafKind::Trim, None) => claim.leaf == zero_node(0),
        _ => false,
    }
}
