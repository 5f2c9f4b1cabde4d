//! The record table of a frame: which sectors an epoch changes, and where their new contents are.
//!
//! The table is the lane entries followed by the records, lane by lane. Within a lane records are
//! sorted by LBA, and no two records of an epoch touch the same sector, so the order in which they
//! are applied does not matter and an epoch can be applied in one sweep.
//!
//! Payload is packed canonically: one 4 KiB payload block for each volume block that is touched, in
//! the order of the records, each sector at its own place within its block. So a payload block can
//! be used as an overlay slot as it is, and equal epochs have equal bytes. A table that packs in
//! any other way is refused.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{LogIdentity, MAX_EPOCH_BYTES, MAX_EPOCH_RECORDS, MAX_LANES};
use crate::types::{BLOCK_BYTES, LaneId, Lba, SECTOR_BYTES, SECTORS_PER_BLOCK};

/// Longest record with payload, in sectors (1 MiB). Bounds what one checksum covers.
pub const MAX_DATA_SECTORS: u32 = 2048;

/// What a record does to its sectors.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RecordKind {
    /// Replaces them by payload.
    Data,
    /// They read as zeroes from now on; the space behind them should stay allocated.
    Zeroes,
    /// They read as zeroes from now on, and the device may give their space back.
    Trim,
}

/// One contiguous change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// First sector.
    pub lba: Lba,
    /// Number of sectors, at least 1.
    pub sectors: u32,
    /// What happens to them.
    pub kind: RecordKind,
    /// Where the payload begins, in sectors from the start of the frame's payload area; 0 if there
    /// is none.
    pub payload_sector: u32,
    /// CRC-32C of the payload; 0 if there is none.
    pub crc32c: u32,
}

impl Record {
    /// The sector after the last one. Valid records never overflow here: the table was checked
    /// against the volume's size.
    #[must_use]
    pub fn end(&self) -> Lba {
        Lba(self.lba.0 + u64::from(self.sectors))
    }
}

/// The records of one lane within a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneEntry {
    /// The lane.
    pub lane: LaneId,
    /// How many records it has in this frame.
    pub records: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireRecord {
    lba: U64,
    sectors: U32,
    payload_sector: U32,
    crc32c: U32,
    kind: u8,
    reserved: [u8; 3],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireLane {
    lane: U16,
    reserved: U16,
    records: U32,
}

/// Bytes of a record in the table.
pub const RECORD_BYTES: usize = size_of::<WireRecord>();
/// Bytes of a lane entry in the table.
pub const LANE_BYTES: usize = size_of::<WireLane>();
const _: () = assert!(RECORD_BYTES == 24 && LANE_BYTES == 8);
const _: () = assert!(MAX_EPOCH_BYTES / SECTOR_BYTES <= u32::MAX as u64);

/// Why a record table cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum TableError {
    /// The header announces more than the limits allow, or more bytes than there are.
    #[error("record table has {records} records in {lanes} lanes but {bytes} bytes")]
    Size {
        /// Records announced.
        records: u32,
        /// Lanes announced.
        lanes: u16,
        /// Bytes present.
        bytes: usize,
    },
    /// The lane entries do not add up to the records or are not in ascending order.
    #[error("lane table entry {0} is out of order or does not add up")]
    Lanes(usize),
    /// A record is of an unknown kind.
    #[error("record {index} at {lba} has the unknown kind {kind}")]
    Kind {
        /// Position in the table.
        index: usize,
        /// Its first sector.
        lba: Lba,
        /// The unknown kind.
        kind: u8,
    },
    /// A record is empty, too long, misaligned or beyond the end of the volume.
    #[error("record {index} at {lba} with {sectors} sectors does not fit the volume")]
    Range {
        /// Position in the table.
        index: usize,
        /// Its first sector.
        lba: Lba,
        /// Its length.
        sectors: u32,
    },
    /// A record starts before the end of the one before it.
    #[error("record {index} at {lba} overlaps the record before it or is out of order")]
    Order {
        /// Position in the table.
        index: usize,
        /// Its first sector.
        lba: Lba,
    },
    /// A record's payload is not within the frame.
    #[error("record {index} at {lba} names payload outside the frame")]
    Payload {
        /// Position in the table.
        index: usize,
        /// Its first sector.
        lba: Lba,
    },
}

/// Bytes of a table with so many lanes and records.
#[must_use]
pub fn table_bytes(lanes: usize, records: usize) -> usize {
    lanes * LANE_BYTES + records * RECORD_BYTES
}

/// Appends the table to `out`.
pub fn encode_table(lanes: &[LaneEntry], records: &[Record], out: &mut Vec<u8>) {
    for entry in lanes {
        let wire = WireLane {
            lane: entry.lane.0.into(),
            reserved: U16::ZERO,
            records: entry.records.into(),
        };
        out.extend_from_slice(wire.as_bytes());
    }
    for record in records {
        let wire = WireRecord {
            lba: record.lba.0.into(),
            sectors: record.sectors.into(),
            payload_sector: record.payload_sector.into(),
            crc32c: record.crc32c.into(),
            kind: match record.kind {
                RecordKind::Data => 0,
                RecordKind::Zeroes => 1,
                RecordKind::Trim => 2,
            },
            reserved: [0; 3],
        };
        out.extend_from_slice(wire.as_bytes());
    }
}

/// Reads and checks a table: afterwards every record lies within the volume, every payload within
/// `payload_bytes`, and no two records of a lane overlap.
///
/// # Errors
/// [`TableError`] names the first record that is wrong.
pub fn decode_table(
    identity: &LogIdentity,
    lane_count: u16,
    record_count: u32,
    payload_bytes: u64,
    table: &[u8],
) -> Result<(Vec<LaneEntry>, Vec<Record>), TableError> {
    let size = || TableError::Size {
        records: record_count,
        lanes: lane_count,
        bytes: table.len(),
    };
    if lane_count > MAX_LANES || record_count > MAX_EPOCH_RECORDS {
        return Err(size());
    }
    let record_count = usize::try_from(record_count).map_err(|_| size())?;
    let lane_bytes = usize::from(lane_count) * LANE_BYTES;
    if table.len() != table_bytes(usize::from(lane_count), record_count) {
        return Err(size());
    }
    let (lane_table, record_table) = table.split_at(lane_bytes);
    let lanes = decode_lanes(lane_table, record_count)?;
    let wire = <[WireRecord]>::ref_from_bytes(record_table).map_err(|_| size())?;
    let mut records = Vec::with_capacity(record_count);
    let mut index = 0;
    let mut packing = Packing::default();
    for entry in &lanes {
        let mut previous_end = Lba(0);
        packing.volume_block = None;
        for _ in 0..entry.records {
            // `decode_lanes` made sure that the entries add up to the records.
            let Some(wire) = wire.get(index) else {
                return Err(size());
            };
            let record = decode_record(identity, payload_bytes, index, wire)?;
            if record.lba < previous_end {
                return Err(TableError::Order {
                    index,
                    lba: record.lba,
                });
            }
            if record.kind == RecordKind::Data && !packing.follows(&record) {
                return Err(TableError::Payload {
                    index,
                    lba: record.lba,
                });
            }
            previous_end = record.end();
            records.push(record);
            index += 1;
        }
    }
    if packing.next_block * BLOCK_BYTES != payload_bytes {
        return Err(size());
    }
    if lanes.len() > 1 {
        check_lanes_disjoint(&records)?;
    }
    Ok((lanes, records))
}

/// Follows the canonical packing of payload through a table.
#[derive(Default)]
struct Packing {
    /// The payload block that the next new volume block must use.
    next_block: u64,
    /// The last volume block of the record before, within the same lane.
    volume_block: Option<u64>,
}

impl Packing {
    fn follows(&mut self, record: &Record) -> bool {
        let first = record.lba.0 / SECTORS_PER_BLOCK;
        let last = (record.end().0 - 1) / SECTORS_PER_BLOCK;
        let payload = u64::from(record.payload_sector);
        let shares = self.volume_block == Some(first);
        let expected = self.next_block - u64::from(shares);
        self.volume_block = Some(last);
        self.next_block = expected + (last - first) + 1;
        payload == expected * SECTORS_PER_BLOCK + record.lba.0 % SECTORS_PER_BLOCK
    }
}

/// Within a lane the order already proves it; across lanes only a sort does.
fn check_lanes_disjoint(records: &[Record]) -> Result<(), TableError> {
    let mut order: Vec<usize> = (0..records.len()).collect();
    order.sort_unstable_by_key(|&index| records[index].lba);
    let overlap = order
        .windows(2)
        .find(|pair| records[pair[1]].lba < records[pair[0]].end());
    match overlap {
        None => Ok(()),
        Some(pair) => Err(TableError::Order {
            index: pair[1],
            lba: records[pair[1]].lba,
        }),
    }
}

fn decode_lanes(table: &[u8], record_count: usize) -> Result<Vec<LaneEntry>, TableError> {
    let wire = <[WireLane]>::ref_from_bytes(table).map_err(|_| TableError::Lanes(0))?;
    let mut lanes: Vec<LaneEntry> = Vec::with_capacity(wire.len());
    let mut sum = 0_usize;
    for (index, entry) in wire.iter().enumerate() {
        let lane = LaneId(entry.lane.get());
        let ascending = lanes.last().is_none_or(|last| last.lane < lane);
        let records = entry.records.get();
        sum = sum.saturating_add(usize::try_from(records).unwrap_or(usize::MAX));
        if !ascending || lane.0 >= MAX_LANES || sum > record_count {
            return Err(TableError::Lanes(index));
        }
        lanes.push(LaneEntry { lane, records });
    }
    if sum == record_count {
        Ok(lanes)
    } else {
        Err(TableError::Lanes(lanes.len()))
    }
}

fn decode_record(
    identity: &LogIdentity,
    payload_bytes: u64,
    index: usize,
    wire: &WireRecord,
) -> Result<Record, TableError> {
    let lba = Lba(wire.lba.get());
    let kind = match wire.kind {
        0 => RecordKind::Data,
        1 => RecordKind::Zeroes,
        2 => RecordKind::Trim,
        kind => return Err(TableError::Kind { index, lba, kind }),
    };
    let sectors = wire.sectors.get();
    let range = TableError::Range {
        index,
        lba,
        sectors,
    };
    let volume_sectors = identity.size_bytes / SECTOR_BYTES;
    let end = lba.0.checked_add(u64::from(sectors));
    if sectors == 0 || end.is_none_or(|end| end > volume_sectors) {
        return Err(range);
    }
    let sectors_per_unit = u64::from(identity.sector_bytes) / SECTOR_BYTES;
    if !lba.0.is_multiple_of(sectors_per_unit)
        || !u64::from(sectors).is_multiple_of(sectors_per_unit)
    {
        return Err(range);
    }
    let record = Record {
        lba,
        sectors,
        kind,
        payload_sector: wire.payload_sector.get(),
        crc32c: wire.crc32c.get(),
    };
    if kind == RecordKind::Data {
        if sectors > MAX_DATA_SECTORS {
            return Err(range);
        }
        let payload_end = u64::from(record.payload_sector) + u64::from(sectors);
        if payload_end > payload_bytes / SECTOR_BYTES {
            return Err(TableError::Payload { index, lba });
        }
    } else if !lba.0.is_multiple_of(SECTORS_PER_BLOCK)
        || !u64::from(sectors).is_multiple_of(SECTORS_PER_BLOCK)
    {
        // Zeroed edges of a block are written as data, so that extents are whole blocks.
        return Err(range);
    } else if record.payload_sector != 0 || record.crc32c != 0 {
        return Err(TableError::Payload { index, lba });
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::VolumeId;

    fn identity() -> LogIdentity {
        LogIdentity {
            volume: VolumeId([1; 16]),
            birth_nonce: [2; 16],
            size_bytes: 1 << 20,
            sector_bytes: 512,
        }
    }

    fn data(lba: u64, sectors: u32, payload_sector: u32) -> Record {
        Record {
            lba: Lba(lba),
            sectors,
            kind: RecordKind::Data,
            payload_sector,
            crc32c: 5,
        }
    }

    fn decode(lanes: &[LaneEntry], records: &[Record]) -> Result<Vec<Record>, TableError> {
        let mut table = Vec::new();
        encode_table(lanes, records, &mut table);
        let lane_count = u16::try_from(lanes.len()).unwrap_or(u16::MAX);
        let record_count = u32::try_from(records.len()).unwrap_or(u32::MAX);
        let blocks = records
            .iter()
            .filter(|record| record.kind == RecordKind::Data);
        let end = blocks.map(|record| u64::from(record.payload_sector) + u64::from(record.sectors));
        let payload = end.max().unwrap_or(0).next_multiple_of(8).min(2048) * 512;
        decode_table(&identity(), lane_count, record_count, payload, &table)
            .map(|(_, records)| records)
    }

    fn one_lane(records: u32) -> [LaneEntry; 1] {
        [LaneEntry {
            lane: LaneId(0),
            records,
        }]
    }

    #[test]
    fn table_round_trips() {
        let zero = Record {
            lba: Lba(104),
            sectors: 1000,
            kind: RecordKind::Trim,
            payload_sector: 0,
            crc32c: 0,
        };
        let records = [data(0, 8, 0), data(8, 3, 8), zero];
        assert_eq!(decode(&one_lane(3), &records), Ok(records.to_vec()));
    }

    #[test]
    fn overlapping_and_unsorted_records_are_refused() {
        for second in [data(7, 1, 8), data(0, 1, 8)] {
            let result = decode(&one_lane(2), &[data(0, 8, 0), second]);
            assert!(
                matches!(result, Err(TableError::Order { index: 1, .. })),
                "{result:?}"
            );
        }
    }

    #[test]
    fn lanes_that_claim_the_same_sector_are_refused() {
        let lanes = [0, 1].map(|lane| LaneEntry {
            lane: LaneId(lane),
            records: 1,
        });
        let result = decode(&lanes, &[data(8, 8, 0), data(8, 8, 8)]);
        assert!(
            matches!(result, Err(TableError::Order { .. })),
            "{result:?}"
        );
        assert!(decode(&lanes, &[data(8, 8, 0), data(0, 8, 8)]).is_ok());
    }

    #[test]
    fn records_outside_volume_or_payload_are_refused() {
        let volume_end = (1 << 20) / 512;
        for bad in [
            data(volume_end, 1, 0),
            data(volume_end - 1, 2, 0),
            data(u64::MAX, 2, 0),
        ] {
            assert!(matches!(
                decode(&one_lane(1), &[bad]),
                Err(TableError::Range { .. })
            ));
        }
        for bad in [data(0, 8, 8), data(0, 8, 1), data(0, 1, u32::MAX)] {
            assert!(matches!(
                decode(&one_lane(1), &[bad]),
                Err(TableError::Payload { .. })
            ));
        }
        assert!(matches!(
            decode(&one_lane(1), &[data(0, 0, 0)]),
            Err(TableError::Range { .. })
        ));
    }

    #[test]
    fn lane_entries_must_ascend_and_add_up() {
        let records = [data(0, 8, 0), data(8, 8, 8)];
        assert!(matches!(
            decode(&one_lane(1), &records),
            Err(TableError::Lanes(_))
        ));
        assert!(matches!(
            decode(&one_lane(3), &records),
            Err(TableError::Lanes(_))
        ));
        let twice = [LaneEntry {
            lane: LaneId(1),
            records: 1,
        }; 2];
        assert!(matches!(
            decode(&twice, &records),
            Err(TableError::Lanes(1))
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            lanes in 0_u16..4,
            records in 0_u32..8,
            bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            // Whatever is accepted must lie within the volume.
            if let Ok((_, records)) = decode_table(&identity(), lanes, records, 4096, &bytes) {
                for record in records {
                    prop_assert!(record.end().byte_offset() <= identity().size_bytes);
                }
            }
        }
    }
}
