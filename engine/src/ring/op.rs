//! What a ring can be asked to do, and what it answers.

use std::fmt;
use std::time::Duration;

use nix::errno::Errno;

use io_uring::types::Timespec;

use super::buffer::OwnedBuf;
use super::files::FileId;
use super::slab::Kind;
use super::state::State;
use crate::arena::{SLOT_BYTES, SlotId};

/// Most bytes in one transfer. The kernel's own limit is a little under 2 GiB.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 30;

/// Where the bytes of a segment are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SegSource {
    /// In a slot of the ring's arena.
    Slot(SlotId),
    /// In the buffer that moves into the operation.
    Buf,
}

/// A piece of memory that takes part in a transfer. Segments are filled or sent in order; those
/// that follow one another in memory become one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seg {
    /// Slot or buffer.
    pub source: SegSource,
    /// First byte within it.
    pub offset: u32,
    /// Bytes, at least 1.
    pub len: u32,
}

impl Seg {
    /// Part of a slot.
    #[must_use]
    pub const fn slot(slot: SlotId, offset: u32, len: u32) -> Self {
        Self {
            source: SegSource::Slot(slot),
            offset,
            len,
        }
    }

    /// A whole slot.
    #[must_use]
    pub const fn whole(slot: SlotId) -> Self {
        const LEN: u32 = 4096;
        const { assert!(LEN as usize == SLOT_BYTES) }
        Self::slot(slot, 0, LEN)
    }

    /// Part of the operation's own buffer.
    #[must_use]
    pub const fn buf(offset: u32, len: u32) -> Self {
        Self {
            source: SegSource::Buf,
            offset,
            len,
        }
    }
}

/// Where the bytes of a transfer go to or come from.
#[derive(Debug)]
pub struct Memory<'a> {
    /// The pieces, in order.
    pub segs: &'a [Seg],
    /// The buffer that [`SegSource::Buf`] refers to. It comes back with the completion.
    pub buf: Option<OwnedBuf>,
}

impl<'a> Memory<'a> {
    /// Slots only.
    #[must_use]
    pub fn slots(segs: &'a [Seg]) -> Self {
        Self { segs, buf: None }
    }

    /// Slots and pieces of one buffer.
    #[must_use]
    pub fn with_buf(segs: &'a [Seg], buf: OwnedBuf) -> Self {
        Self {
            segs,
            buf: Some(buf),
        }
    }
}

/// What to do with a range of a file, without data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FallocateMode {
    /// Reserve space and grow the file.
    Allocate,
    /// Give the space back; the range then reads as zeroes.
    PunchHole,
    /// Make the range read as zeroes, keeping its space if the device can.
    ZeroRange,
}

impl FallocateMode {
    pub(super) fn flags(self) -> i32 {
        match self {
            Self::Allocate => 0,
            Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// One operation. It completes exactly once, [`Op::Accept`] excepted.
#[derive(Debug)]
pub enum Op<'a> {
    /// Read all segments from `offset` on, in bytes. Short reads are continued; the end of the file
    /// before the last byte is [`OpError::UnexpectedEof`].
    Read {
        /// From here.
        file: FileId,
        /// Bytes from the start of the file.
        offset: u64,
        /// To here.
        memory: Memory<'a>,
    },
    /// Write all segments from `offset` on. Short writes are continued.
    Write {
        /// To here.
        file: FileId,
        /// Bytes from the start of the file.
        offset: u64,
        /// From here. It may be looked at, but not changed, until the completion.
        memory: Memory<'a>,
        /// Follow with a data sync that starts when the last byte was written. The one completion
        /// is a success only if every byte was written and the sync succeeded after that.
        then_sync: bool,
    },
    /// Make everything that completed before on this file durable.
    Sync {
        /// This file.
        file: FileId,
        /// Leave out times and other facts that are not needed to read the data back.
        data_only: bool,
    },
    /// Reserve, punch or zero a range.
    Fallocate {
        /// In this file.
        file: FileId,
        /// What to do.
        mode: FallocateMode,
        /// Bytes from the start of the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Accept connections until cancelled. Each yields a completion with `file` and `more` set; the
    /// last has `more` unset and says why it ended.
    Accept {
        /// A listening socket.
        file: FileId,
    },
    /// Receive what there is, at least one byte. 0 bytes: the peer has closed its side.
    Recv {
        /// A connected socket.
        file: FileId,
        /// To here, in order.
        memory: Memory<'a>,
    },
    /// Send every byte. Partial sends are continued.
    Send {
        /// A connected socket.
        file: FileId,
        /// From here, in order.
        memory: Memory<'a>,
    },
    /// Close the file. Operations on it are cancelled and complete first; new ones are refused.
    Close {
        /// This file.
        file: FileId,
    },
    /// Complete after this much time.
    Timeout {
        /// From the next [`Ring::wait`](super::Ring::wait) on.
        after: Duration,
    },
}

/// Names an operation until its completion, for [`Ring::cancel`](super::Ring::cancel).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OpId {
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// Why an operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpError {
    /// The kernel's word.
    #[error("{0}")]
    Os(Errno),
    /// The file ended before all bytes were read.
    #[error("the file ends before the range that was to be read")]
    UnexpectedEof,
    /// The kernel took no bytes and gave no reason.
    #[error("the device or socket took no more bytes and gave no reason")]
    WroteNothing,
    /// Cancelled by [`Ring::cancel`](super::Ring::cancel), [`Op::Close`] or the end of the ring.
    /// What it had done until then is unknown.
    #[error("cancelled")]
    Cancelled,
}

impl OpError {
    pub(super) fn from_result(result: i32) -> Self {
        match Errno::from_raw(-result) {
            Errno::ECANCELED => Self::Cancelled,
            errno => Self::Os(errno),
        }
    }
}

/// The answer to an operation.
#[derive(Debug)]
pub struct Completion {
    /// As given to [`Ring::submit`](super::Ring::submit).
    pub token: u64,
    /// Bytes moved, 0 for operations that move none.
    pub result: Result<u32, OpError>,
    /// The buffer that had moved into the operation.
    pub buf: Option<OwnedBuf>,
    /// A connection that was accepted.
    pub file: Option<FileId>,
    /// More completions with this token will follow.
    pub more: bool,
}

/// Why an operation was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// As many operations as the ring was made for are in flight. Try again after a completion.
    #[error("the ring is full: queue the operation and submit it after a completion")]
    Full,
    /// The file was closed, is being closed, or belongs to another ring.
    #[error("the file is closed or being closed")]
    NoSuchFile,
    /// No segments, an empty one, or more than the ring was made for.
    #[error("the segments are empty or too many for one operation")]
    BadSegments,
    /// A segment leaves the operation's buffer, or there is no buffer.
    #[error("a segment leaves the buffer it refers to")]
    OutsideBuffer,
    /// More than [`TRANSFER_BYTES_MAX`], or past the largest offset of a file.
    #[error("the transfer is longer than an operation may be")]
    TooLong,
}

/// An operation that was not taken, given back whole.
pub struct Refused<'a> {
    /// The operation with its buffer.
    pub op: Op<'a>,
    /// Why.
    pub why: Refusal,
}

impl fmt::Debug for Refused<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Refused({:?}: {:?})", self.why, self.op)
    }
}

impl Memory<'_> {
    /// Total length in bytes, if the memory can be used as it is. Slots are checked later, by the
    /// arena.
    pub(super) fn check(&self, segments_max: usize) -> Result<u32, Refusal> {
        if self.segs.is_empty() || self.segs.len() > segments_max {
            return Err(Refusal::BadSegments);
        }
        let mut total = 0_u32;
        for seg in self.segs {
            if seg.len == 0 {
                return Err(Refusal::BadSegments);
            }
            if seg.source == SegSource::Buf {
                let buf = self.buf.as_ref().ok_or(Refusal::OutsideBuffer)?;
                buf.address(seg.offset as usize, seg.len as usize)
                    .ok_or(Refusal::OutsideBuffer)?;
            }
            total = total
                .checked_add(seg.len)
                .filter(|&total| total <= TRANSFER_BYTES_MAX)
                .ok_or(Refusal::TooLong)?;
        }
        Ok(total)
    }
}

/// Writes a checked operation into a free entry.
pub(super) fn fill(state: &mut State, index: u32, op: Op<'_>) {
    let (kind, file, offset, memory) = match op {
        Op::Read {
            file,
            offset,
            memory,
        } => (Kind::Read, Some(file), offset, Some(memory)),
        Op::Write {
            file,
            offset,
            memory,
            then_sync,
        } => (Kind::Write { then_sync }, Some(file), offset, Some(memory)),
        Op::Sync { file, data_only } => (Kind::Sync { data_only }, Some(file), 0, None),
        Op::Fallocate {
            file,
            mode,
            offset,
            len,
        } => (Kind::Fallocate { mode, len }, Some(file), offset, None),
        Op::Accept { file } => (Kind::Accept, Some(file), 0, None),
        Op::Recv { file, memory } => (Kind::Recv, Some(file), 0, Some(memory)),
        Op::Send { file, memory } => (Kind::Send, Some(file), 0, Some(memory)),
        Op::Close { file } => (Kind::Close, Some(file), 0, None),
        Op::Timeout { after } => {
            state.slab.get_mut(index).time = Timespec::from(after);
            (Kind::Timeout, None, 0, None)
        }
    };
    if let Some(memory) = memory {
        fill_memory(state, index, memory, kind);
    }
    let entry = state.slab.get_mut(index);
    entry.kind = kind;
    entry.file = file;
    entry.offset = offset;
    state.storage_in_flight += u32::from(kind.is_storage());
    if let Some(file) = file {
        state.files.started(file);
    }
}

/// Pins the slots and builds the vector for the kernel, one element for each run of segments that
/// follow one another in memory. The vectors were allocated with room for all segments.
fn fill_memory(state: &mut State, index: u32, memory: Memory<'_>, kind: Kind) {
    let entry = state.slab.get_mut(index);
    for seg in memory.segs {
        let len = seg.len as usize;
        let start = match seg.source {
            SegSource::Slot(slot) => state.arena.address(slot, seg.offset as usize, len),
            SegSource::Buf => memory
                .buf
                .as_ref()
                .and_then(|buf| buf.address(seg.offset as usize, len))
                .expect("the segments were checked"),
        };
        entry.total += seg.len;
        let start = start.cast();
        match entry.iov.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == start => {
                last.iov_len += len;
            }
            _ => entry.iov.push(libc::iovec {
                iov_base: start,
                iov_len: len,
            }),
        }
    }
    // After the loop above, which panics on a wrong slot: nothing stays pinned then.
    for seg in memory.segs {
        if let SegSource::Slot(slot) = seg.source {
            state.arena.pin(slot, kind.access());
        }
    }
    entry.segs.extend_from_slice(memory.segs);
    entry.buf = memory.buf;
}
