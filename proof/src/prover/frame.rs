//! A frame as the prover sees it: its root, and the leaves of its records.

use hn4::log::{FrameError, FrameHead, FrameHeader, LogIdentity, Record, RecordKind};
use hn4::types::{LaneId, LogOffset};

use crate::blocks::{BLOCK, Block};
use crate::hash::Digest;
use crate::leaf::{Coordinates, EpochBuilder, EpochRoot, LeafKind, RecordLeaf, payload_hashes};

const SECTOR: usize = BLOCK / 8;
/// Of records in memory the payload of every so many-th one is compared with its checksum.
const MEMORY_SAMPLE: u64 = 16;

/// A frame, and how far it is to be believed.
#[derive(Clone, Copy, Debug)]
pub enum Frame<'a> {
    /// As it lies on the medium, where anything can have happened to it: all of it is checked.
    Log(&'a [u8]),
    /// A copy of what lies in memory: all of it is checked.
    Memory(&'a [u8]),
    /// Its head, and the blocks of its payload as they lie in memory, where their checksums were
    /// computed, or compared when it came. Were all compared again, that would be a third of what
    /// proving takes. A sample shows whether frames are handed over as they were sealed, not every
    /// bit that flips in memory.
    InPlace(&'a [u8], &'a [&'a Block]),
}

impl<'a> Frame<'a> {
    /// Bytes from its head on.
    pub(super) fn head(self) -> &'a [u8] {
        match self {
            Self::Log(bytes) | Self::Memory(bytes) | Self::InPlace(bytes, _) => bytes,
        }
    }

    /// Its length.
    pub(super) fn len(self) -> u64 {
        let blocks = match self {
            Self::Log(_) | Self::Memory(_) => 0,
            Self::InPlace(_, blocks) => blocks.len() * BLOCK,
        };
        (self.head().len() + blocks) as u64
    }

    /// The blocks of its payload, if it is as long as its head says.
    fn payload(self, head: &FrameHeader) -> Result<Vec<&'a Block>, FrameError> {
        let cut_off = FrameError::CutOff {
            needed: head.frame_bytes,
            present: self.len(),
        };
        if self.len() != head.frame_bytes {
            return Err(cut_off);
        }
        let bytes = usize::try_from(head.head_bytes).unwrap_or(usize::MAX);
        let (_, rest) = self.head().split_at_checked(bytes).ok_or(cut_off.clone())?;
        match self {
            Self::Log(_) | Self::Memory(_) => Ok(rest.as_chunks().0.iter().collect()),
            Self::InPlace(_, blocks) if rest.is_empty() => Ok(blocks.to_vec()),
            Self::InPlace(..) => Err(cut_off),
        }
    }

    /// Of so many payloads one is compared with its checksum.
    fn sample(self) -> u64 {
        match self {
            Self::Log(_) | Self::Memory(_) => 1,
            Self::InPlace(..) => MEMORY_SAMPLE,
        }
    }

    /// Whether what is wrong with it may be so in memory only.
    pub(super) fn is_in_memory(self) -> bool {
        !matches!(self, Self::Log(_))
    }
}

/// The pieces of a record's payload: each sector lies at its own place in the block it is part of.
fn pieces<'a>(record: &Record, payload: &[&'a Block]) -> impl Iterator<Item = &'a [u8]> {
    let from = index(record.payload_sector) * SECTOR;
    let end = from + index(record.sectors) * SECTOR;
    let blocks = payload.iter().enumerate().skip(from / BLOCK);
    blocks
        .map(|(index, block)| (index * BLOCK, block))
        .take_while(move |(start, _)| *start < end)
        .map(move |(start, block)| &block[from.max(start) - start..(end - start).min(BLOCK)])
}

fn index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// An epoch that is hashed and not yet anchored.
#[derive(Clone, Debug)]
pub(super) struct Hashed {
    pub(super) root: EpochRoot,
    pub(super) start: LogOffset,
    pub(super) end: LogOffset,
    pub(super) payload_bytes: u64,
}

pub(super) fn hash_frame(identity: &LogIdentity, frame: Frame<'_>) -> Result<Hashed, FrameError> {
    let (head, leaves) = frame_leaves(identity, frame)?;
    let mut builder = EpochBuilder::new(head.header.epoch, head.chain);
    for leaf in &leaves {
        builder.record(leaf).expect("all records are of one epoch");
    }
    Ok(Hashed {
        root: builder.finish(),
        start: head.header.offset,
        end: head.header.end(),
        payload_bytes: head.header.payload_bytes(),
    })
}

/// A frame's head, and the leaves of its records in the order of its table.
///
/// # Errors
/// [`FrameError`] if anything in the frame is damaged; of payloads [in place](Frame::InPlace) a
/// sample is looked at.
pub fn frame_leaves(
    identity: &LogIdentity,
    frame: Frame<'_>,
) -> Result<(FrameHead, Vec<RecordLeaf>), FrameError> {
    let head = FrameHead::decode(identity, frame.head())?;
    let payload = frame.payload(&head.header)?;
    let epoch = head.header.epoch;
    let is_data = |record: &&Record| record.kind == RecordKind::Data;
    let (mut parts, mut counts) = (Vec::with_capacity(payload.len()), Vec::new());
    for (number, record) in (epoch.0..).zip(head.records.iter().filter(is_data)) {
        let first = parts.len();
        parts.extend(pieces(record, &payload));
        counts.push(parts.len() - first);
        if number.is_multiple_of(frame.sample()) {
            head.check_pieces(record, parts[first..].iter().copied())?;
        }
    }
    let mut payloads = payload_hashes(&parts, &counts).into_iter();
    let mut lanes = head.lanes.iter().flat_map(|entry| {
        std::iter::repeat_n(entry.lane, usize::try_from(entry.records).unwrap_or(0))
    });
    let mut leaf = |record: &Record| {
        let (kind, payload) = match record.kind {
            RecordKind::Data => (LeafKind::Data, payloads.next()),
            RecordKind::Zeroes => (LeafKind::Zeroes, None),
            RecordKind::Trim => (LeafKind::Trim, None),
        };
        let at = Coordinates {
            epoch,
            lane: lanes.next().unwrap_or(LaneId(0)),
            kind,
            lba: record.lba,
            sectors: u64::from(record.sectors),
        };
        let payload = payload.unwrap_or(Digest::ZERO);
        RecordLeaf { at, payload }
    };
    let leaves = head.records.iter().map(&mut leaf).collect();
    Ok((head, leaves))
}

#[cfg(test)]
mod tests {
    use hn4::log::LaneEntry;
    use hn4::log::frame::{FrameParams, encode_head};
    use hn4::types::{ChainHash, Epoch, Incarnation, Lba, LogOffset, NodeId, Term, VolumeId};

    use super::*;
    use crate::leaf::payload_hash;

    /// First sector, sectors, and the first sector in the payload.
    const RECORDS: [(u64, u32, u32); 4] = [(3, 13, 3), (24, 8, 16), (33, 2, 25), (36, 3, 28)];
    const BLOCKS: usize = 4;

    fn identity() -> LogIdentity {
        LogIdentity {
            volume: VolumeId([7; 16]),
            birth_nonce: [1; 16],
            size_bytes: 1 << 20,
            sector_bytes: 512,
        }
    }

    fn frame(epoch: u64) -> Vec<u8> {
        let payload: Vec<u8> = (0..BLOCKS * BLOCK)
            .map(|at| (at % 251).to_le_bytes()[0])
            .collect();
        let record = |&(lba, sectors, payload_sector): &(u64, u32, u32)| Record {
            lba: Lba(lba),
            sectors,
            kind: RecordKind::Data,
            payload_sector,
            crc32c: crc32c::crc32c(bytes_of(&payload, payload_sector, sectors)),
        };
        let mut records: Vec<Record> = RECORDS.iter().map(record).collect();
        records.push(Record {
            lba: Lba(64),
            sectors: 16,
            kind: RecordKind::Zeroes,
            payload_sector: 0,
            crc32c: 0,
        });
        let mut bytes = Vec::new();
        let params = FrameParams {
            identity: &identity(),
            epoch: Epoch(epoch),
            offset: LogOffset(0),
            term: Term {
                counter: 1,
                node: NodeId([1; 16]),
            },
            incarnation: Incarnation(1),
            durable_through: Epoch(0),
            previous: ChainHash::default(),
            sealed_ms: 0,
            checkpoint_mark: false,
            lanes: &[LaneEntry {
                lane: LaneId(0),
                records: 5,
            }],
            records: &records,
            payload_bytes: payload.len() as u64,
        };
        encode_head(&params, &mut bytes);
        bytes.extend_from_slice(&payload);
        bytes
    }

    fn bytes_of(payload: &[u8], sector: u32, sectors: u32) -> &[u8] {
        &payload[index(sector) * SECTOR..][..index(sectors) * SECTOR]
    }

    /// The same in all forms.
    fn in_each_form(bytes: &[u8], check: impl Fn(Frame<'_>)) {
        let (head, payload) = bytes.split_at(bytes.len() - BLOCKS * BLOCK);
        let blocks: Vec<&Block> = payload.as_chunks().0.iter().collect();
        check(Frame::Log(bytes));
        check(Frame::Memory(bytes));
        check(Frame::InPlace(head, &blocks));
    }

    #[test]
    fn leaves_are_the_same_wherever_the_payload_lies() {
        let bytes = frame(1);
        let payload = &bytes[bytes.len() - BLOCKS * BLOCK..];
        in_each_form(&bytes, |frame| {
            assert_eq!(frame.len(), bytes.len() as u64);
            let (_, leaves) = frame_leaves(&identity(), frame).expect("a good frame");
            for (leaf, &(lba, sectors, sector)) in leaves.iter().zip(&RECORDS) {
                let expected = payload_hash(Lba(lba), bytes_of(payload, sector, sectors));
                assert_eq!((leaf.at.lba, leaf.payload), (Lba(lba), expected));
            }
            assert_eq!(leaves[4].at.kind, LeafKind::Zeroes);
        });
    }

    #[test]
    fn a_frame_that_lacks_a_block_is_refused_in_each_form() {
        let bytes = frame(1);
        let (head, payload) = bytes.split_at(bytes.len() - BLOCKS * BLOCK);
        let blocks: Vec<&Block> = payload.as_chunks().0.iter().collect();
        let short = &bytes[..bytes.len() - BLOCK];
        let (less, more) = (&blocks[1..], &bytes[..head.len() + BLOCK]);
        for frame in [
            Frame::Log(short),
            Frame::Memory(short),
            Frame::InPlace(head, less),
            Frame::InPlace(more, &blocks),
            Frame::InPlace(more, less),
        ] {
            let found = frame_leaves(&identity(), frame);
            assert!(matches!(found, Err(FrameError::CutOff { .. })), "{found:?}");
        }
    }

    #[test]
    fn payloads_in_place_are_compared_in_turn_and_others_always() {
        let mut found = [0; 3];
        for epoch in 1..=MEMORY_SAMPLE {
            let mut bytes = frame(epoch);
            let first = bytes.len() - BLOCKS * BLOCK + 3 * SECTOR;
            bytes[first] ^= 1;
            let damage = std::cell::RefCell::new(Vec::new());
            in_each_form(&bytes, |frame| {
                let leaves = frame_leaves(&identity(), frame);
                damage.borrow_mut().push(usize::from(leaves.is_err()));
            });
            let damage = damage.into_inner();
            found
                .iter_mut()
                .zip(damage)
                .for_each(|(sum, it)| *sum += it);
        }
        assert_eq!(found, [16, 16, 1], "log, memory, in place");
    }
}
