//! The delta log: the one structure that is write-ahead log, replication stream, proof leaves and
//! history at once. `docs/LOG_FORMAT.md` has the byte map with the crash argument for each field.
//!
//! ```text
//! 0          header A          who this log belongs to; written once, kept twice
//! 16 KiB     header B
//! 32 KiB     superblock 0      checkpoint, term, chain head; written alternately, the newer
//! 48 KiB     superblock 1      valid one counts
//! 64 KiB     HN4 template      a wormhole superblock for tools, if the volume holds HN4
//! 80 KiB     merge area        blocks that are being written in place, whole (`merge`)
//! 128 KiB    ring of frames    one frame an epoch, contiguous in log offsets, wrapping at the end
//! ```
//!
//! **Invariant:** every number that is read from a medium or a peer is checked before it is used as
//! a length, an offset or an index. Parsing returns typed errors and never panics.
//!
//! Not here: reading and writing. These are pure functions over byte slices.

pub mod frame;
pub mod header;
pub mod merge;
pub mod record;
pub mod superblock;

pub use frame::{FrameError, FrameHead, FrameHeader, Stamp};
pub use header::{HeaderError, LogHeader, LogIdentity};
pub use merge::{MERGE_AREA, MERGE_BLOCKS, MergeHead, MergeUse, MergedBlock};
pub use record::{LaneEntry, Record, RecordKind, TableError};
pub use superblock::{CopyState, Ground, Role, Superblock, SuperblockError};

/// Version of the log format that this crate reads and writes.
pub const FORMAT_VERSION: u16 = 1;

/// Offsets on the log device, in bytes. They are 16 KiB apart, so that a torn physical write of one
/// never reaches another even on devices with large physical sectors.
pub const HEADER_A: u64 = 0;
/// Second copy of the header.
pub const HEADER_B: u64 = HEADER_A + 16 * 1024;
/// First superblock slot.
pub const SUPERBLOCK_0: u64 = HEADER_B + 16 * 1024;
/// Second superblock slot.
pub const SUPERBLOCK_1: u64 = SUPERBLOCK_0 + 16 * 1024;
/// Where an HN4 wormhole superblock (8 KiB) stands as a template, if the volume holds HN4.
pub const HN4_TEMPLATE: u64 = SUPERBLOCK_1 + 16 * 1024;
/// Start of the ring of frames.
pub const RING_START: u64 = 128 * 1024;

/// Smallest legal ring: eight times the smallest useful epoch.
pub const MIN_RING_BYTES: u64 = 4 * 1024 * 1024;
/// Largest payload of one epoch. Bounds what a peer can make us buffer.
pub const MAX_EPOCH_BYTES: u64 = 64 * 1024 * 1024;
/// Most records in one epoch: four runs of sectors for each 4 KiB of payload, and as many zeroed
/// extents as there are blocks of payload.
pub const MAX_EPOCH_RECORDS: u32 = 5 * 16 * 1024;
/// Most lanes of a volume.
pub const MAX_LANES: u16 = 64;

const _: () = {
    assert!(HN4_TEMPLATE + 8192 <= RING_START);
    assert!(RING_START.is_multiple_of(crate::types::BLOCK_BYTES));
    assert!(MIN_RING_BYTES.is_multiple_of(crate::types::BLOCK_BYTES));
    assert!(MAX_EPOCH_BYTES / crate::types::BLOCK_BYTES * 5 == MAX_EPOCH_RECORDS as u64);
};
