//! From records to epoch roots.
//!
//! ```text
//! pieces of a payload -> payload hash -> record leaf -> lane root -> lane leaf -> epoch root
//! ```
//!
//! A payload is hashed block by block: its pieces are what the 4 KiB grid of the volume cuts it
//! into, and a piece that is a whole block has the very leaf that the state tree has for that
//! block. So a block is hashed once for both, and a proof about one block of a long record is
//! short.
//!
//! The epoch root also binds the hash of the frame header, and with it the log's own chain.
//!
//! Not here: closing batches ([`crate::batch`]), the log's format (`hn4::log`).

use std::collections::BTreeMap;

use hn4::types::{BLOCK_BYTES, ChainHash, Epoch, LaneId, Lba, SECTOR_BYTES, SECTORS_PER_BLOCK};

use crate::blocks::{self, BLOCK, Block};
use crate::codec::{DecodeError, Reader, Writer};
use crate::fold::{Folder, InclusionProof, Kind};
use crate::hash::{self, Digest};

/// What a record does to its sectors. The numbers are hashed and never change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum LeafKind {
    /// Replaces them by payload.
    Data = 1,
    /// They read as zeroes from now on.
    Zeroes = 2,
    /// They read as zeroes from now on, and their space may be given back.
    Trim = 3,
}

impl LeafKind {
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        [Self::Data, Self::Zeroes, Self::Trim]
            .into_iter()
            .find(|kind| *kind as u8 == code)
    }
}

/// Where and when a record applies, and what it does there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Coordinates {
    /// Epoch that the record belongs to.
    pub epoch: Epoch,
    /// Lane that it went through.
    pub lane: LaneId,
    /// What it does.
    pub kind: LeafKind,
    /// First sector.
    pub lba: Lba,
    /// Number of sectors, at least 1.
    pub sectors: u64,
}

impl Coordinates {
    /// Whether the record touches any sector of the block that starts at `block`.
    #[must_use]
    pub fn touches(&self, block: Lba) -> bool {
        self.lba.0 < block.0.saturating_add(SECTORS_PER_BLOCK)
            && block.0 < self.lba.0.saturating_add(self.sectors)
    }

    /// Whether the record covers the whole block that starts at `block`.
    #[must_use]
    pub fn covers(&self, block: Lba) -> bool {
        self.lba <= block
            && block.0.saturating_add(SECTORS_PER_BLOCK) <= self.lba.0.saturating_add(self.sectors)
    }
}

/// A record as the proofs see it: 32 bytes stand for its payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordLeaf {
    /// Where, when and what.
    pub at: Coordinates,
    /// Fold of the payload's pieces; all zero for a record without payload.
    pub payload: Digest,
}

impl RecordLeaf {
    /// The value that is folded into the lane root.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let Coordinates {
            epoch,
            lane,
            kind,
            lba,
            sectors,
        } = self.at;
        hash::RECORD.hash(&[
            &epoch.0.to_le_bytes(),
            &lane.0.to_le_bytes(),
            &[kind as u8],
            &lba.0.to_le_bytes(),
            &sectors.to_le_bytes(),
            &self.payload.0,
        ])
    }

    /// Appends the encoding, 59 bytes: the same fields in the same order as they are hashed.
    pub fn encode(&self, writer: &mut Writer) {
        let Coordinates {
            epoch,
            lane,
            kind,
            lba,
            sectors,
        } = self.at;
        writer
            .u64(epoch.0)
            .u16(lane.0)
            .u8(kind as u8)
            .u64(lba.0)
            .u64(sectors);
        writer.digest(&self.payload);
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one, or the record is empty or runs past 2^64 sectors.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (epoch, lane) = (Epoch(reader.u64()?), LaneId(reader.u16()?));
        let kind = LeafKind::from_code(reader.u8()?).ok_or_else(|| reader.invalid("kind"))?;
        let (lba, sectors) = (Lba(reader.u64()?), reader.u64()?);
        if sectors == 0 || lba.0.checked_add(sectors).is_none() {
            return Err(reader.invalid("length"));
        }
        let payload = reader.digest()?;
        if (kind != LeafKind::Data) != (payload == Digest::ZERO) {
            return Err(reader.invalid("payload hash"));
        }
        Ok(Self {
            at: Coordinates {
                epoch,
                lane,
                kind,
                lba,
                sectors,
            },
            payload,
        })
    }
}

/// Folds the pieces of one payload.
#[derive(Debug, Clone)]
pub struct PayloadFold(Folder);

impl PayloadFold {
    /// For a payload of which nothing is known yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Folder::new(Kind::Pieces))
    }

    /// Appends a whole block, by the leaf that was computed for it before.
    pub fn push_block(&mut self, leaf: Digest) {
        self.0.push(leaf);
    }

    /// Appends a piece that is not a whole block: the first or the last.
    pub fn push_part(&mut self, bytes: &[u8]) {
        self.0.push(hash::PIECE.hash(&[bytes]));
    }

    /// The payload hash.
    #[must_use]
    pub fn finish(&self) -> Digest {
        self.0.root()
    }
}

impl Default for PayloadFold {
    fn default() -> Self {
        Self::new()
    }
}

/// Hash of the payload of a record that starts at `lba`.
#[must_use]
pub fn payload_hash(lba: Lba, payload: &[u8]) -> Digest {
    let mut fold = Folder::new(Kind::Pieces);
    each_piece(lba, payload, |piece| fold.push(piece));
    fold.root()
}

/// Hashes of many payloads: their pieces, one payload after the other, and of how many each
/// consists. The blocks of all of them are hashed side by side, which for short records is several
/// times faster than one by one.
#[must_use]
pub fn payload_hashes(pieces: &[&[u8]], counts: &[usize]) -> Vec<Digest> {
    let mut leaves = Vec::with_capacity(pieces.len());
    let blocks = pieces.iter().filter(|piece| piece.len() == BLOCK);
    let blocks = blocks.flat_map(|piece| piece.as_chunks().0);
    blocks::leaves(blocks, |leaf| leaves.push(leaf));
    let (mut leaves, mut pieces) = (leaves.into_iter(), pieces.iter());
    let mut fold = |&count: &usize| {
        let mut fold = PayloadFold::new();
        for piece in pieces.by_ref().take(count) {
            if piece.len() == BLOCK {
                fold.push_block(leaves.next().expect("a leaf for each whole block"));
            } else {
                fold.push_part(piece);
            }
        }
        fold.finish()
    };
    counts.iter().map(&mut fold).collect()
}

/// Digests of the pieces of such a payload, in order.
#[must_use]
pub fn pieces(lba: Lba, payload: &[u8]) -> Vec<Digest> {
    let mut pieces = Vec::new();
    each_piece(lba, payload, |piece| pieces.push(piece));
    pieces
}

fn each_piece(lba: Lba, payload: &[u8], mut each: impl FnMut(Digest)) {
    let Cut { head, blocks, tail } = Cut::new(lba, payload);
    head.into_iter()
        .for_each(|head| each(hash::PIECE.hash(&[head])));
    blocks::leaves(blocks, &mut each);
    tail.into_iter()
        .for_each(|tail| each(hash::PIECE.hash(&[tail])));
}

/// A payload as the grid of the volume cuts it: whole blocks, and what is before and behind them,
/// neither of them empty.
struct Cut<'a> {
    head: Option<&'a [u8]>,
    blocks: &'a [Block],
    tail: Option<&'a [u8]>,
}

impl<'a> Cut<'a> {
    fn new(lba: Lba, payload: &'a [u8]) -> Self {
        let into_block = lba.byte_offset() % BLOCK_BYTES;
        let (head, rest) = match usize::try_from(into_block) {
            Ok(0) | Err(_) => payload.split_at(0),
            Ok(skipped) => payload.split_at((BLOCK - skipped).min(payload.len())),
        };
        let (blocks, tail) = rest.as_chunks();
        let some = |part: &'a [u8]| (!part.is_empty()).then_some(part);
        Self {
            head: some(head),
            blocks,
            tail: some(tail),
        }
    }
}

/// Number of pieces of a record, and which of them is the block that starts at `block`; `None` if
/// the record does not cover that block.
#[must_use]
pub fn piece_of(at: &Coordinates, block: Lba) -> Option<(u64, u64)> {
    let first = at.lba.0 / SECTORS_PER_BLOCK;
    let last = (at.lba.0.checked_add(at.sectors)?.checked_sub(1)?) / SECTORS_PER_BLOCK;
    at.covers(block)
        .then(|| (last - first + 1, block.0 / SECTORS_PER_BLOCK - first))
}

/// One lane's part of an epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneRoot {
    /// The lane.
    pub lane: LaneId,
    /// Its records in this epoch, at least 1.
    pub records: u64,
    /// Fold of their leaves.
    pub root: Digest,
}

impl LaneRoot {
    /// The value that is folded into the epoch root and into the batch's lane hash.
    #[must_use]
    pub fn digest(&self, epoch: Epoch) -> Digest {
        hash::LANE.hash(&[
            &epoch.0.to_le_bytes(),
            &self.lane.0.to_le_bytes(),
            &self.records.to_le_bytes(),
            &self.root.0,
        ])
    }
}

/// An epoch with its root.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EpochRoot {
    /// The epoch.
    pub epoch: Epoch,
    /// Hash of its frame header.
    pub chain: ChainHash,
    /// Its lanes that have records, in ascending order.
    pub lanes: Vec<LaneRoot>,
    /// The root.
    pub root: Digest,
}

/// The hash that makes an epoch root of its parts.
pub(crate) fn epoch_digest(epoch: Epoch, chain: ChainHash, lanes: u64, fold: &Digest) -> Digest {
    hash::EPOCH.hash(&[
        &epoch.0.to_le_bytes(),
        &chain.0,
        &lanes.to_le_bytes(),
        &fold.0,
    ])
}

/// Why records do not make an epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LeafError {
    /// A record of another epoch.
    #[error("a record of epoch {found} was given to the builder of epoch {epoch}")]
    OtherEpoch {
        /// The epoch that is being built.
        epoch: Epoch,
        /// The record's.
        found: Epoch,
    },
}

/// Builds an epoch root. Lanes may come in any order; the records of one lane come in the order of
/// the frame's record table.
#[derive(Debug)]
pub struct EpochBuilder {
    epoch: Epoch,
    chain: ChainHash,
    lanes: BTreeMap<LaneId, Folder>,
}

impl EpochBuilder {
    /// For the epoch whose frame header has the hash `chain`.
    #[must_use]
    pub fn new(epoch: Epoch, chain: ChainHash) -> Self {
        Self {
            epoch,
            chain,
            lanes: BTreeMap::new(),
        }
    }

    /// Adds a record to its lane.
    ///
    /// # Errors
    /// [`LeafError::OtherEpoch`] if it belongs to another epoch.
    pub fn record(&mut self, record: &RecordLeaf) -> Result<(), LeafError> {
        let (epoch, found) = (self.epoch, record.at.epoch);
        if epoch != found {
            return Err(LeafError::OtherEpoch { epoch, found });
        }
        let lane = self.lanes.entry(record.at.lane);
        lane.or_insert_with(|| Folder::new(Kind::Records))
            .push(record.digest());
        Ok(())
    }

    /// The root of what was added.
    #[must_use]
    pub fn finish(self) -> EpochRoot {
        let lanes: Vec<LaneRoot> = self
            .lanes
            .iter()
            .map(|(&lane, fold)| LaneRoot {
                lane,
                records: fold.count(),
                root: fold.root(),
            })
            .collect();
        let mut fold = Folder::new(Kind::Lanes);
        lanes
            .iter()
            .for_each(|lane| fold.push(lane.digest(self.epoch)));
        let root = epoch_digest(self.epoch, self.chain, fold.count(), &fold.root());
        EpochRoot {
            epoch: self.epoch,
            chain: self.chain,
            lanes,
            root,
        }
    }
}

/// Proof that a record is part of an epoch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordProof {
    /// The record.
    pub record: RecordLeaf,
    chain: ChainHash,
    in_lane: InclusionProof,
    in_epoch: InclusionProof,
}

/// Sizes that a record proof commits to are hashed into the epoch root with the values below.
impl RecordProof {
    /// Proof for `records[index]` of an epoch. `records` are all of the epoch's, lane by lane.
    #[must_use]
    pub fn build(chain: ChainHash, records: &[RecordLeaf], index: usize) -> Option<Self> {
        let record = *records.get(index)?;
        let mut builder = EpochBuilder::new(record.at.epoch, chain);
        records
            .iter()
            .try_for_each(|record| builder.record(record))
            .ok()?;
        let epoch = builder.finish();
        let is_same_lane = |other: &&RecordLeaf| other.at.lane == record.at.lane;
        let lane: Vec<Digest> = records
            .iter()
            .filter(is_same_lane)
            .map(RecordLeaf::digest)
            .collect();
        let before = records[..index].iter().filter(is_same_lane).count();
        let in_lane = InclusionProof::build(Kind::Records, &lane, before as u64)?;
        let position = epoch
            .lanes
            .iter()
            .position(|lane| lane.lane == record.at.lane)?;
        let lanes: Vec<Digest> = epoch
            .lanes
            .iter()
            .map(|lane| lane.digest(epoch.epoch))
            .collect();
        let in_epoch = InclusionProof::build(Kind::Lanes, &lanes, position as u64)?;
        Some(Self {
            record,
            chain,
            in_lane,
            in_epoch,
        })
    }

    /// The epoch root that the record leads to; the caller compares it with one that it trusts.
    #[must_use]
    pub fn computed_root(&self) -> Digest {
        let lane = LaneRoot {
            lane: self.record.at.lane,
            records: self.in_lane.size(),
            root: self.in_lane.computed_root(&self.record.digest()),
        };
        let epoch = self.record.at.epoch;
        let fold = self.in_epoch.computed_root(&lane.digest(epoch));
        epoch_digest(epoch, self.chain, self.in_epoch.size(), &fold)
    }

    /// Appends the encoding.
    pub fn encode(&self, writer: &mut Writer) {
        self.record.encode(writer);
        writer.bytes(&self.chain.0);
        self.in_lane.encode(writer);
        self.in_epoch.encode(writer);
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let record = RecordLeaf::decode(reader)?;
        let chain = ChainHash(reader.array()?);
        let (in_lane, in_epoch) = (
            InclusionProof::decode(reader)?,
            InclusionProof::decode(reader)?,
        );
        if (in_lane.kind(), in_epoch.kind()) != (Kind::Records, Kind::Lanes) {
            return Err(reader.invalid("kind of fold"));
        }
        Ok(Self {
            record,
            chain,
            in_lane,
            in_epoch,
        })
    }
}

/// Bytes of a payload of so many sectors.
#[must_use]
pub fn payload_bytes(sectors: u64) -> u64 {
    sectors.saturating_mul(SECTOR_BYTES)
}

#[cfg(test)]
mod tests;
