//! Operations on the disks below a volume, as the core asks for them.

use crate::arena::SlotId;

/// One of the devices below a volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Disk {
    /// The delta log.
    Log,
    /// The backing device.
    Backing,
    /// What takes the differences of a full copy until they are switched in.
    Shadow,
}

/// A part of a slot that an operation moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seg {
    /// The slot.
    pub slot: SlotId,
    /// First byte within the slot.
    pub offset: u16,
    /// Number of bytes, at most 4096.
    pub bytes: u16,
}

/// What an operation is for; comes back with its completion.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum IoToken {
    /// Part of a batch of frames.
    LogWrite(u64),
    /// The flush behind a batch that needed several writes.
    LogFsync(u64),
    /// A superblock and its flush.
    Superblock,
    /// A zeroed range of a sweep.
    SweepZero,
    /// A write of a sweep.
    SweepWrite,
    /// The flush of the backing after a sweep.
    SweepFsync,
    /// A block of which a part is to be written, read whole: its place in the batch.
    MergeRead(u8),
    /// A batch of such blocks, into the merge area of the log, and its flush.
    MergeWrite,
    /// The flush of the backing before the next batch.
    MergeFsync,
    /// Part of a client's read.
    Read(u32),
    /// A piece of a full copy: which one of those that are being written.
    SeedWrite(u64),
    /// The flush of the backing behind pieces of a full copy.
    SeedFsync,
    /// Comparing a piece of a full copy, writing what differs into the shadow, or flushing that.
    Shadow,
    /// Writing the shadow over the backing: reading it, writing, and the flush at the end.
    Apply,
}

impl IoToken {
    /// On which disk, and for what; `reads_shadow`: what is under way there.
    pub(super) fn place(self, reads_shadow: bool) -> (Disk, &'static str) {
        match self {
            Self::LogWrite(_) | Self::LogFsync(_) => (Disk::Log, "writing an epoch"),
            Self::Superblock => (Disk::Log, "writing the superblock"),
            Self::SweepZero | Self::SweepWrite => (Disk::Backing, "destaging"),
            Self::MergeWrite => (Disk::Log, "writing the merge area"),
            Self::SweepFsync | Self::MergeFsync => (Disk::Backing, "flushing"),
            Self::SeedWrite(_) | Self::SeedFsync => (Disk::Backing, "writing a full copy"),
            Self::Apply if reads_shadow => (Disk::Shadow, "reading a full copy"),
            Self::Apply => (Disk::Backing, "writing a full copy"),
            Self::Shadow => (Disk::Shadow, "writing a full copy"),
            Self::Read(_) | Self::MergeRead(_) => (Disk::Backing, "reading"),
        }
    }
}

/// An operation on a disk. Buffers are slots, named by a range of [`super::event::Actions::segs`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Io {
    /// Fill the segments.
    Read {
        /// From where.
        disk: Disk,
        /// Byte offset.
        offset: u64,
        /// Range of [`super::event::Actions::segs`].
        segs: std::ops::Range<usize>,
    },
    /// Write the segments, and flush the disk after it if asked to; one completion for both.
    Write {
        /// To where.
        disk: Disk,
        /// Byte offset.
        offset: u64,
        /// Range of [`super::event::Actions::segs`].
        segs: std::ops::Range<usize>,
        /// Flush after the write.
        then_fsync: bool,
    },
    /// Make everything that was written durable.
    Fsync {
        /// Which disk.
        disk: Disk,
    },
    /// Make a range read as zeroes.
    Zero {
        /// Byte offset on the backing.
        offset: u64,
        /// Bytes.
        bytes: u64,
        /// The space may be given back.
        trim: bool,
    },
}
