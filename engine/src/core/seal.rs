//! From an epoch's dirty blocks to a frame: records, checksums, head.

use std::ops::Range;

use hn4::log::frame::{self, FrameParams, encode_head};
use hn4::log::record::MAX_DATA_SECTORS;
use hn4::log::{FrameHead, FrameHeader, LaneEntry, Record, RecordKind};
use hn4::types::{BLOCK_BYTES, BlockIndex, ChainHash, LaneId, Lba, SECTORS_PER_BLOCK};

use super::overlay::{DirtyBlock, Mask, mask, runs};
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// Longest record without payload, in blocks: its sectors must fit in 32 bits.
const ZERO_BLOCKS: u64 = 1 << 28;

/// Zeroed extents, and whether their space may be given back.
pub(super) type Zeros = Vec<(Range<u64>, bool)>;

/// How a volume's blocks are dealt out to lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lanes {
    /// How many there are.
    pub count: u16,
    /// Blocks in a row that belong to one lane.
    pub stripe_blocks: u32,
}

impl Lanes {
    /// The lane that a block belongs to.
    #[must_use]
    pub fn of(&self, block: BlockIndex) -> LaneId {
        let lane = (block.0 / u64::from(self.stripe_blocks)) % u64::from(self.count);
        LaneId(u16::try_from(lane).expect("a remainder of a division by a u16"))
    }
}

/// Most records that an epoch with so many blocks and zeroed extents can have: sector runs of a
/// block are at most four.
#[must_use]
pub(super) fn max_records(blocks: usize, zero_extents: usize) -> usize {
    4 * blocks + zero_extents
}

/// Puts blocks into the order of the payload (lane by lane, by LBA) and makes the records.
pub(super) fn build_records(
    mem: &dyn SlotMemory,
    lanes: Lanes,
    blocks: &mut [DirtyBlock],
    zeros: &[(Range<u64>, bool)],
) -> (Vec<LaneEntry>, Vec<Record>) {
    if lanes.count > 1 {
        blocks.sort_unstable_by_key(|dirty| (lanes.of(dirty.block), dirty.block));
    }
    let mut records: Vec<(LaneId, Record)> = Vec::with_capacity(blocks.len() + zeros.len());
    let mut payload_sector = 0;
    for dirty in blocks.iter() {
        for run in runs(dirty.mask) {
            let bytes = &mem.bytes(dirty.slot)[run.clone()];
            let from = u32::try_from(run.start / 512).expect("a block has eight sectors");
            let sectors = u32::try_from(run.len() / 512).expect("a block has eight sectors");
            let lba = Lba(dirty.block.lba().0 + u64::from(from));
            let lane = lanes.of(dirty.block);
            let payload_sector = payload_sector + from;
            match records.last_mut() {
                Some((last_lane, last))
                    if *last_lane == lane
                        && last.end() == lba
                        && last.payload_sector + last.sectors == payload_sector
                        && last.sectors + sectors <= MAX_DATA_SECTORS =>
                {
                    last.sectors += sectors;
                    last.crc32c = crc32c::crc32c_append(last.crc32c, bytes);
                }
                _ => {
                    let crc32c = crc32c::crc32c(bytes);
                    let kind = RecordKind::Data;
                    records.push((
                        lane,
                        Record {
                            lba,
                            sectors,
                            kind,
                            payload_sector,
                            crc32c,
                        },
                    ));
                }
            }
        }
        payload_sector += 8;
    }
    if !zeros.is_empty() {
        records.extend(
            zeros
                .iter()
                .flat_map(|(range, trim)| zero_records(lanes, range, *trim)),
        );
        records.sort_by_key(|(lane, record)| (*lane, record.lba));
    }
    let mut entries: Vec<LaneEntry> = Vec::new();
    for (lane, _) in &records {
        match entries.last_mut() {
            Some(entry) if entry.lane == *lane => entry.records += 1,
            _ => entries.push(LaneEntry {
                lane: *lane,
                records: 1,
            }),
        }
    }
    (
        entries,
        records.into_iter().map(|(_, record)| record).collect(),
    )
}

fn zero_records(
    lanes: Lanes,
    range: &Range<u64>,
    trim: bool,
) -> impl Iterator<Item = (LaneId, Record)> {
    let kind = if trim {
        RecordKind::Trim
    } else {
        RecordKind::Zeroes
    };
    let (start, end) = (range.start, range.end);
    (0..(end - start).div_ceil(ZERO_BLOCKS)).map(move |index| {
        let first = start + index * ZERO_BLOCKS;
        let blocks = ZERO_BLOCKS.min(end - first);
        let block = BlockIndex(first);
        let sectors = u32::try_from(blocks * SECTORS_PER_BLOCK).expect("bounded above");
        let record = Record {
            lba: block.lba(),
            sectors,
            kind,
            payload_sector: 0,
            crc32c: 0,
        };
        (lanes.of(block), record)
    })
}

/// Encodes the head of a frame into slots taken from `mem`, or returns `None` if there are not
/// enough of them.
pub(super) fn encode_to_slots(
    mem: &mut dyn SlotMemory,
    params: &FrameParams<'_>,
    scratch: &mut Vec<u8>,
) -> Option<(FrameHeader, ChainHash, Vec<SlotId>)> {
    let records = u32::try_from(params.records.len()).ok()?;
    let slots = frame::head_bytes(params.lanes.len(), records) / BLOCK_BYTES;
    if (mem.free_slots() as u64) < slots {
        return None;
    }
    scratch.clear();
    let (header, chain) = encode_head(params, scratch);
    Some((header, chain, bytes_to_slots(mem, scratch)?))
}

/// Copies whole blocks into slots.
pub(super) fn bytes_to_slots(mem: &mut dyn SlotMemory, bytes: &[u8]) -> Option<Vec<SlotId>> {
    debug_assert!(bytes.len().is_multiple_of(SLOT_BYTES));
    if mem.free_slots() < bytes.len() / SLOT_BYTES {
        return None;
    }
    bytes
        .chunks_exact(SLOT_BYTES)
        .map(|chunk| {
            let slot = mem.alloc()?;
            mem.bytes_mut(slot).copy_from_slice(chunk);
            Some(slot)
        })
        .collect()
}

/// What a checked frame changes: blocks in payload order, and zeroed extents. `payload` holds a
/// slot for each payload block; canonical packing makes it an overlay slot as it is.
#[must_use]
pub(super) fn frame_changes(head: &FrameHead, payload: &[SlotId]) -> (Vec<DirtyBlock>, Zeros) {
    let (blocks, zeros) = frame_blocks(head);
    let blocks = blocks.into_iter().zip(payload);
    let dirty = blocks.map(|((block, mask), &slot)| DirtyBlock { block, slot, mask });
    (dirty.collect(), zeros)
}

/// The block and the sectors of each block of a checked frame's payload, and zeroed extents.
#[must_use]
pub(super) fn frame_blocks(head: &FrameHead) -> (Vec<(BlockIndex, Mask)>, Zeros) {
    let mut blocks: Vec<(BlockIndex, Mask)> = Vec::with_capacity(head.records.len());
    let mut zeros = Vec::new();
    for record in &head.records {
        if record.kind != RecordKind::Data {
            let start = record.lba.block().0;
            let end = record.end().0.div_ceil(SECTORS_PER_BLOCK);
            zeros.push((start..end, record.kind == RecordKind::Trim));
            continue;
        }
        let mut lba = record.lba;
        let mut sector = u64::from(record.payload_sector);
        while lba < record.end() {
            let from = lba.sector_in_block();
            let left = record.end().0 - lba.0;
            let count = left.min(SECTORS_PER_BLOCK - u64::from(from));
            let to = from + u32::try_from(count).expect("at most eight");
            let index = usize::try_from(sector / SECTORS_PER_BLOCK).expect("checked by the table");
            match blocks.get_mut(index) {
                Some((_, sectors)) => *sectors |= mask(from, to),
                None => blocks.push((lba.block(), mask(from, to))),
            }
            lba = Lba(lba.0 + count);
            sector += count;
        }
    }
    (blocks, zeros)
}
