//! Frames: one epoch each, atomic everywhere.
//!
//! ```text
//! 0      header (192 bytes), the same on every copy; its hash is the chain
//! 192    stamp (64 bytes), local to each copy, never shipped
//! 256    record table, padded with zeroes to 4 KiB
//! ..     payload, in 4 KiB blocks
//! ```
//!
//! A frame is valid only as a whole: the header's CRC-32C covers the header, its `table_hash` the
//! record table, and the records' CRC-32C the payload. So no marker after the payload is needed to
//! tell a torn frame, and a one-block flush costs two blocks of log instead of three.
//!
//! Stale frames of an earlier lap of the ring never validate, because a header names its own log
//! offset, its epoch and the hash of the header before it. BLAKE3 is computed over headers and
//! tables only, never over payload, so hashing stays off the acknowledgement path.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::record::{self, LaneEntry, Record, TableError};
use super::{FORMAT_VERSION, LogIdentity, MAX_EPOCH_BYTES, MAX_EPOCH_RECORDS, MAX_LANES};
use crate::types::{BLOCK_BYTES, ChainHash, Epoch, Incarnation, LogOffset, NodeId, Rank, Term};

const MAGIC: [u8; 8] = *b"HN4FRAME";
const CHAIN_CONTEXT: &str = "hn4-replicad 2026 delta log frame header chain v1";
const TABLE_CONTEXT: &str = "hn4-replicad 2026 delta log record table v1";
const FLAG_CHECKPOINT: u16 = 1;

/// Bytes of the header that all copies share.
pub const HEADER_BYTES: usize = 192;
/// Bytes of the local stamp after it.
pub const STAMP_BYTES: usize = 64;
/// Where the record table starts.
pub const TABLE_OFFSET: usize = HEADER_BYTES + STAMP_BYTES;
/// Largest head (header, stamp and table, padded) in bytes.
pub const MAX_HEAD_BYTES: u64 = (TABLE_OFFSET as u64
    + MAX_LANES as u64 * record::LANE_BYTES as u64
    + MAX_EPOCH_RECORDS as u64 * record::RECORD_BYTES as u64)
    .next_multiple_of(BLOCK_BYTES);
/// Largest frame in bytes.
pub const MAX_FRAME_BYTES: u64 = MAX_HEAD_BYTES + MAX_EPOCH_BYTES;

/// The header of a frame, checked on its own: magic, version, checksum, identity, plausible
/// lengths.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// The epoch that this frame holds.
    pub epoch: Epoch,
    /// Where the frame starts in the log.
    pub offset: LogOffset,
    /// Bytes of the whole frame, a multiple of 4096.
    pub frame_bytes: u64,
    /// Bytes of header, stamp and table, a multiple of 4096; the payload follows.
    pub head_bytes: u64,
    /// All epochs up to this one were durable on the primary when this epoch was sealed.
    pub durable_through: Epoch,
    /// Who appended it.
    pub term: Term,
    /// Which of the primary's openings appended it.
    pub incarnation: Incarnation,
    /// Hash of the header of the epoch before.
    pub previous: ChainHash,
    /// Hash of the record table.
    pub table_hash: [u8; 32],
    /// When the epoch was sealed, milliseconds since 1970 on the primary's clock; for lag in time.
    pub sealed_ms: u64,
    /// Number of records.
    pub records: u32,
    /// Number of lane entries.
    pub lanes: u16,
    /// The primary destaged to exactly this epoch: copies should do the same, to compare roots.
    pub checkpoint_mark: bool,
}

/// What each copy notes about its own log in the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// Session of the log (see [`super::Superblock::session`]) that wrote the frame here.
    pub session: u64,
    /// Epochs up to this one were durable in *this* log before the frame was written.
    pub durable_through: Epoch,
}

/// What the writer of a frame decides.
#[derive(Clone, Copy, Debug)]
pub struct FrameParams<'a> {
    /// The volume.
    pub identity: &'a LogIdentity,
    /// The epoch.
    pub epoch: Epoch,
    /// Where the frame will start.
    pub offset: LogOffset,
    /// Who appends.
    pub term: Term,
    /// Which opening of the primary appends.
    pub incarnation: Incarnation,
    /// What is durable on the primary.
    pub durable_through: Epoch,
    /// Hash of the previous header.
    pub previous: ChainHash,
    /// Wall clock of the primary, milliseconds since 1970.
    pub sealed_ms: u64,
    /// Whether the primary will destage to exactly this epoch.
    pub checkpoint_mark: bool,
    /// Lane entries, ascending.
    pub lanes: &'a [LaneEntry],
    /// Records, lane by lane, each lane sorted by LBA.
    pub records: &'a [Record],
    /// Bytes of payload that will follow the head, a multiple of 4096.
    pub payload_bytes: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    version: U16,
    flags: U16,
    incarnation: U32,
    volume: [u8; 16],
    birth_nonce: [u8; 16],
    epoch: U64,
    offset: U64,
    frame_bytes: U64,
    durable_through: U64,
    term_counter: U64,
    term_node: [u8; 16],
    previous: [u8; 32],
    table_hash: [u8; 32],
    sealed_ms: U64,
    records: U32,
    head_blocks: U16,
    lanes: U16,
    reserved: U32,
    crc32c: U32,
}

const _: () = assert!(size_of::<Wire>() == HEADER_BYTES);
const _: () = assert!(MAX_HEAD_BYTES / BLOCK_BYTES <= u16::MAX as u64);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireStamp {
    session: U64,
    durable_through: U64,
    reserved: [u8; 44],
    crc32c: U32,
}

const _: () = assert!(size_of::<WireStamp>() == STAMP_BYTES);

/// Why bytes are not a valid frame.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum FrameError {
    /// There is no frame header here.
    #[error("no frame header here")]
    NoMagic,
    /// The header's checksum does not match.
    #[error("frame header is damaged: CRC-32C is {found:#010x}, expected {expected:#010x}")]
    HeaderChecksum {
        /// Stored value.
        found: u32,
        /// Computed value.
        expected: u32,
    },
    /// Another format version.
    #[error("frame version {0} is not supported (this program reads {FORMAT_VERSION})")]
    Version(u16),
    /// A frame of another volume.
    #[error("frame belongs to another volume")]
    Foreign,
    /// A field has an impossible value.
    #[error("frame header field `{field}` has the impossible value {value}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The bytes end before the frame does.
    #[error("frame of {needed} bytes is cut off after {present}")]
    CutOff {
        /// Bytes the header announces.
        needed: u64,
        /// Bytes present.
        present: u64,
    },
    /// The record table does not match its hash.
    #[error("record table of epoch {0} does not match the hash in its header")]
    TableHash(Epoch),
    /// The record table is wrong in itself.
    #[error("record table of epoch {epoch}: {source}")]
    Table {
        /// The epoch.
        epoch: Epoch,
        /// What is wrong.
        source: TableError,
    },
    /// A record's payload does not match its checksum.
    #[error(
        "payload of epoch {epoch}, LBA {lba}, is damaged: CRC-32C is {found:#010x}, \
         expected {expected:#010x}"
    )]
    Payload {
        /// The epoch.
        epoch: Epoch,
        /// First sector of the damaged record.
        lba: u64,
        /// Computed value.
        found: u32,
        /// Value in the record.
        expected: u32,
    },
}

impl FrameHeader {
    /// Reads and checks the header at the start of `bytes`.
    ///
    /// # Errors
    /// [`FrameError`] says why it is not a header of a frame of this volume.
    pub fn decode(identity: &LogIdentity, bytes: &[u8]) -> Result<Self, FrameError> {
        let (wire, _) = Wire::read_from_prefix(bytes).map_err(|_| FrameError::NoMagic)?;
        if wire.magic != MAGIC {
            return Err(FrameError::NoMagic);
        }
        let expected = crc32c::crc32c(&wire.as_bytes()[..HEADER_BYTES - 4]);
        if wire.crc32c.get() != expected {
            return Err(FrameError::HeaderChecksum {
                found: wire.crc32c.get(),
                expected,
            });
        }
        if wire.version.get() != FORMAT_VERSION {
            return Err(FrameError::Version(wire.version.get()));
        }
        if wire.volume != identity.volume.0 || wire.birth_nonce != identity.birth_nonce {
            return Err(FrameError::Foreign);
        }
        let header = Self {
            epoch: Epoch(wire.epoch.get()),
            offset: LogOffset(wire.offset.get()),
            frame_bytes: wire.frame_bytes.get(),
            head_bytes: u64::from(wire.head_blocks.get()) * BLOCK_BYTES,
            durable_through: Epoch(wire.durable_through.get()),
            term: Term {
                counter: wire.term_counter.get(),
                node: NodeId(wire.term_node),
            },
            incarnation: Incarnation(wire.incarnation.get()),
            previous: ChainHash(wire.previous),
            table_hash: wire.table_hash,
            sealed_ms: wire.sealed_ms.get(),
            records: wire.records.get(),
            lanes: wire.lanes.get(),
            checkpoint_mark: wire.flags.get() & FLAG_CHECKPOINT != 0,
        };
        header.check(wire.flags.get())?;
        Ok(header)
    }

    fn check(&self, flags: u16) -> Result<(), FrameError> {
        let field = |field, value| Err(FrameError::Field { field, value });
        if flags & !FLAG_CHECKPOINT != 0 {
            return field("flags", flags.into());
        }
        if self.epoch.0 == 0 {
            return field("epoch", 0);
        }
        if self.durable_through >= self.epoch {
            return field("durable_through", self.durable_through.0);
        }
        if !self.offset.0.is_multiple_of(BLOCK_BYTES) || self.offset.0 > u64::MAX / 2 {
            return field("offset", self.offset.0);
        }
        if self.lanes > MAX_LANES {
            return field("lanes", self.lanes.into());
        }
        if self.records > MAX_EPOCH_RECORDS {
            return field("records", self.records.into());
        }
        if self.head_bytes != head_bytes(usize::from(self.lanes), self.records) {
            return field("head_blocks", self.head_bytes / BLOCK_BYTES);
        }
        if !self.frame_bytes.is_multiple_of(BLOCK_BYTES)
            || self.frame_bytes < self.head_bytes
            || self.frame_bytes - self.head_bytes > MAX_EPOCH_BYTES
        {
            return field("frame_bytes", self.frame_bytes);
        }
        Ok(())
    }

    /// Which opening of a primary sealed it.
    #[must_use]
    pub fn rank(&self) -> Rank {
        Rank {
            term: self.term.counter,
            incarnation: self.incarnation,
        }
    }

    /// Where the next frame starts.
    #[must_use]
    pub fn end(&self) -> LogOffset {
        LogOffset(self.offset.0 + self.frame_bytes)
    }

    /// Bytes of payload.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        self.frame_bytes - self.head_bytes
    }
}

/// The head of a frame (header and table), checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrameHead {
    /// The header.
    pub header: FrameHeader,
    /// Its place in the chain.
    pub chain: ChainHash,
    /// Lane entries, ascending.
    pub lanes: Vec<LaneEntry>,
    /// Records, lane by lane.
    pub records: Vec<Record>,
}

impl FrameHead {
    /// Reads and checks header and record table. `bytes` must hold the whole head.
    ///
    /// # Errors
    /// [`FrameError`] says what is wrong.
    pub fn decode(identity: &LogIdentity, bytes: &[u8]) -> Result<Self, FrameError> {
        let header = FrameHeader::decode(identity, bytes)?;
        let present = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let table_bytes = record::table_bytes(usize::from(header.lanes), count(header.records));
        let table = bytes.get(TABLE_OFFSET..TABLE_OFFSET + table_bytes);
        let table = table.ok_or(FrameError::CutOff {
            needed: header.head_bytes,
            present,
        })?;
        if table_hash(table) != header.table_hash {
            return Err(FrameError::TableHash(header.epoch));
        }
        let (lanes, records) = record::decode_table(
            identity,
            header.lanes,
            header.records,
            header.payload_bytes(),
            table,
        )
        .map_err(|source| FrameError::Table {
            epoch: header.epoch,
            source,
        })?;
        Ok(Self {
            chain: chain_hash(bytes),
            header,
            lanes,
            records,
        })
    }

    /// Reads and checks a whole frame, payload included.
    ///
    /// # Errors
    /// [`FrameError`] says what is wrong.
    pub fn decode_frame(identity: &LogIdentity, bytes: &[u8]) -> Result<Self, FrameError> {
        let head = Self::decode(identity, bytes)?;
        let present = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if present != head.header.frame_bytes {
            return Err(FrameError::CutOff {
                needed: head.header.frame_bytes,
                present,
            });
        }
        for record in &head.records {
            let range = head.payload_range(record);
            let payload = bytes.get(range).unwrap_or_default();
            head.check_pieces(record, [payload])?;
        }
        Ok(head)
    }

    /// Compares a record's payload, in pieces of any length, with its checksum.
    ///
    /// # Errors
    /// [`FrameError::Payload`] names epoch and LBA.
    pub fn check_pieces<'a>(
        &self,
        record: &Record,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<(), FrameError> {
        let sum = pieces.into_iter().fold(0, crc32c::crc32c_append);
        self.check_payload(record, sum)
    }

    /// Where a record's payload lies, in bytes from the start of the frame.
    #[must_use]
    pub fn payload_range(&self, record: &Record) -> std::ops::Range<usize> {
        let head = count_bytes(self.header.head_bytes);
        let start = head + count(record.payload_sector) * 512;
        start
            ..start
                + if record.crc_covers_payload() {
                    count(record.sectors) * 512
                } else {
                    0
                }
    }

    /// Compares a computed checksum with a record's.
    ///
    /// # Errors
    /// [`FrameError::Payload`] names epoch and LBA.
    pub fn check_payload(&self, record: &Record, found: u32) -> Result<(), FrameError> {
        if !record.crc_covers_payload() || found == record.crc32c {
            return Ok(());
        }
        let (epoch, lba) = (self.header.epoch, record.lba.0);
        Err(FrameError::Payload {
            epoch,
            lba,
            found,
            expected: record.crc32c,
        })
    }
}

impl Record {
    fn crc_covers_payload(&self) -> bool {
        self.kind == record::RecordKind::Data
    }
}

/// Bytes of a frame's head with so many lanes and records, padded to blocks.
#[must_use]
pub fn head_bytes(lanes: usize, records: u32) -> u64 {
    let bytes = TABLE_OFFSET + record::table_bytes(lanes, count(records));
    u64::try_from(bytes)
        .unwrap_or(u64::MAX)
        .next_multiple_of(BLOCK_BYTES)
}

/// Appends the head of a frame to `out`, padded to blocks, with an empty stamp, and returns its
/// header and its place in the chain.
///
/// # Panics
/// If the caller exceeds the limits of the format; that would be a defect of the writer.
pub fn encode_head(params: &FrameParams<'_>, out: &mut Vec<u8>) -> (FrameHeader, ChainHash) {
    let start = out.len();
    let records = u32::try_from(params.records.len()).expect("an epoch's records are bounded");
    let lanes = u16::try_from(params.lanes.len()).expect("lanes are bounded");
    assert!(records <= MAX_EPOCH_RECORDS && lanes <= MAX_LANES);
    assert!(params.payload_bytes <= MAX_EPOCH_BYTES);
    assert!(params.payload_bytes.is_multiple_of(BLOCK_BYTES));
    let head_bytes = head_bytes(params.lanes.len(), records);
    out.resize(start + TABLE_OFFSET, 0);
    record::encode_table(params.lanes, params.records, out);
    let table_hash = table_hash(&out[start + TABLE_OFFSET..]);
    out.resize(start + count_bytes(head_bytes), 0);
    let frame_bytes = head_bytes + params.payload_bytes;
    let mut wire = Wire {
        magic: MAGIC,
        version: FORMAT_VERSION.into(),
        flags: if params.checkpoint_mark {
            FLAG_CHECKPOINT
        } else {
            0
        }
        .into(),
        incarnation: params.incarnation.0.into(),
        volume: params.identity.volume.0,
        birth_nonce: params.identity.birth_nonce,
        epoch: params.epoch.0.into(),
        offset: params.offset.0.into(),
        frame_bytes: frame_bytes.into(),
        durable_through: params.durable_through.0.into(),
        term_counter: params.term.counter.into(),
        term_node: params.term.node.0,
        previous: params.previous.0,
        table_hash,
        sealed_ms: params.sealed_ms.into(),
        records: records.into(),
        head_blocks: u16::try_from(head_bytes / BLOCK_BYTES)
            .expect("proved above")
            .into(),
        lanes: lanes.into(),
        reserved: U32::ZERO,
        crc32c: U32::ZERO,
    };
    wire.crc32c = crc32c::crc32c(&wire.as_bytes()[..HEADER_BYTES - 4]).into();
    out[start..start + HEADER_BYTES].copy_from_slice(wire.as_bytes());
    let header = FrameHeader {
        epoch: params.epoch,
        offset: params.offset,
        frame_bytes,
        head_bytes,
        durable_through: params.durable_through,
        term: params.term,
        incarnation: params.incarnation,
        previous: params.previous,
        table_hash,
        sealed_ms: params.sealed_ms,
        records,
        lanes,
        checkpoint_mark: params.checkpoint_mark,
    };
    (header, chain_hash(&out[start..]))
}

impl Stamp {
    /// Writes the stamp into the first block of a frame.
    pub fn encode(&self, first_block: &mut [u8]) {
        let mut wire = WireStamp {
            session: self.session.into(),
            durable_through: self.durable_through.0.into(),
            reserved: [0; 44],
            crc32c: U32::ZERO,
        };
        wire.crc32c = stamp_crc(first_block, &wire).into();
        first_block[HEADER_BYTES..TABLE_OFFSET].copy_from_slice(wire.as_bytes());
    }

    /// Reads the stamp of a frame's first block; `None` if it is absent or damaged. It is bound to
    /// the header: a stamp that was left by another frame does not count.
    #[must_use]
    pub fn decode(first_block: &[u8]) -> Option<Self> {
        let bytes = first_block.get(HEADER_BYTES..TABLE_OFFSET)?;
        let wire = WireStamp::read_from_bytes(bytes).ok()?;
        (wire.crc32c.get() == stamp_crc(first_block, &wire)).then(|| Self {
            session: wire.session.get(),
            durable_through: Epoch(wire.durable_through.get()),
        })
    }

    /// Removes the stamp, as frames are shipped without it.
    pub fn clear(first_block: &mut [u8]) {
        first_block[HEADER_BYTES..TABLE_OFFSET].fill(0);
    }
}

fn stamp_crc(first_block: &[u8], stamp: &WireStamp) -> u32 {
    let header = crc32c::crc32c(first_block.get(..HEADER_BYTES).unwrap_or_default());
    crc32c::crc32c_append(header, &stamp.as_bytes()[..STAMP_BYTES - 4])
}

/// The chain hash of the header at the start of `frame`.
fn chain_hash(frame: &[u8]) -> ChainHash {
    let header = frame.get(..HEADER_BYTES).unwrap_or_default();
    ChainHash(blake3::derive_key(CHAIN_CONTEXT, header))
}

fn table_hash(table: &[u8]) -> [u8; 32] {
    blake3::derive_key(TABLE_CONTEXT, table)
}

fn count(value: u32) -> usize {
    // The crates here need pointers of at least 32 bits; everything counted is bounded far below.
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn count_bytes(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
