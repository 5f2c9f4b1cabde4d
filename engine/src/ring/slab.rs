//! The operations in flight, each in a place of its own that never moves.
//!
//! An entry owns everything the kernel may look at while it works: the vector of addresses, the
//! message header, the time, the caller's buffer. All of it is allocated with the ring; taking an
//! entry allocates nothing.
//!
//! **Invariant:** an entry is given back only when every completion the kernel owes it has come.
//! So a completion always finds its entry, and the number of completions that can be outstanding is
//! bounded by [`CQES_PER_OP`] times the number of entries: the completion queue cannot overflow.

use io_uring::types::Timespec;

use super::buffer::OwnedBuf;
use super::files::FileId;
use super::op::{FallocateMode, OpError, OpId, Seg};
use crate::arena::Access;

/// Most completions the kernel can owe one entry: the operation, its linked sync, one cancellation.
pub(super) const CQES_PER_OP: u32 = 3;

/// Which of an entry's submissions a completion belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Main,
    Sync,
    Cancel,
    /// The read of the wake-up eventfd, which has no entry.
    Wake,
}

impl Part {
    pub(super) fn bit(self) -> u8 {
        1 << (self as u8)
    }
}

/// The 64 bits the kernel carries for us: generation (32), part (8), index (24).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tag {
    pub(super) index: u32,
    pub(super) part: Part,
    pub(super) generation: u32,
}

/// Most entries: what the index field of a [`Tag`] and the kernel's largest queues allow.
pub(super) const ENTRIES_MAX: u32 = 8192;

impl Tag {
    pub(super) const WAKE: Self = Self {
        index: 0,
        part: Part::Wake,
        generation: 0,
    };

    pub(super) fn pack(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.part as u8) << 24 | u64::from(self.index)
    }

    pub(super) fn unpack(bits: u64) -> Option<Self> {
        let [a, b, c, part, g0, g1, g2, g3] = bits.to_le_bytes();
        let part = match part {
            0 => Part::Main,
            1 => Part::Sync,
            2 => Part::Cancel,
            3 => Part::Wake,
            _ => return None,
        };
        Some(Self {
            index: u32::from_le_bytes([a, b, c, 0]),
            part,
            generation: u32::from_le_bytes([g0, g1, g2, g3]),
        })
    }
}

/// What an entry is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Free,
    Read,
    Write { then_sync: bool },
    Sync { data_only: bool },
    Fallocate { mode: FallocateMode, len: u64 },
    Accept,
    Recv,
    Send,
    Close,
    Timeout,
}

impl Kind {
    /// Which way the memory of the operation is used.
    pub(super) fn access(self) -> Access {
        match self {
            Self::Read | Self::Recv => Access::KernelWrites,
            _ => Access::KernelReads,
        }
    }

    /// Whether the kernel's disk scheduler should know that somebody waits for it.
    pub(super) fn is_storage(self) -> bool {
        matches!(
            self,
            Self::Read | Self::Write { .. } | Self::Sync { .. } | Self::Fallocate { .. }
        )
    }
}

pub(super) struct Entry {
    pub(super) generation: u32,
    pub(super) kind: Kind,
    pub(super) token: u64,
    pub(super) file: Option<FileId>,
    /// Byte offset of the first byte of the whole operation.
    pub(super) offset: u64,
    /// Bytes asked for and bytes moved so far.
    pub(super) total: u32,
    pub(super) done: u32,
    /// Bits of [`Part`]: completions the kernel owes.
    pub(super) owed: u8,
    /// Times the kernel asked us to try again.
    pub(super) retries: u8,
    pub(super) cancel_requested: bool,
    /// Hand the next try to a kernel thread, which may block.
    pub(super) force_async: bool,
    /// The data is written; only the sync is still to be done.
    pub(super) sync_only: bool,
    /// The kernel took the write without the sync that follows it, so that their order is unknown.
    pub(super) chain_cut: bool,
    /// Position of the write among all submissions, if a linked sync follows it.
    pub(super) linked_at: Option<u64>,
    pub(super) sync_result: Option<i32>,
    pub(super) error: Option<OpError>,
    /// The memory of the operation: what is pinned, and what the kernel is told.
    pub(super) segs: Vec<Seg>,
    pub(super) iov: Vec<libc::iovec>,
    /// First element of `iov` that is not done.
    pub(super) iov_next: usize,
    pub(super) header: libc::msghdr,
    pub(super) time: Timespec,
    pub(super) buf: Option<OwnedBuf>,
}

impl Entry {
    fn new(segments: usize) -> Self {
        Self {
            generation: 0,
            kind: Kind::Free,
            token: 0,
            file: None,
            offset: 0,
            total: 0,
            done: 0,
            owed: 0,
            retries: 0,
            cancel_requested: false,
            force_async: false,
            sync_only: false,
            chain_cut: false,
            linked_at: None,
            sync_result: None,
            error: None,
            segs: Vec::with_capacity(segments),
            iov: Vec::with_capacity(segments),
            iov_next: 0,
            // SAFETY: a message header is plain C data: null pointers, zero lengths, no flags.
            header: unsafe { std::mem::zeroed() },
            time: Timespec::new(),
            buf: None,
        }
    }

    /// Moves the cursor over the memory by `bytes` that the kernel has moved.
    pub(super) fn advance(&mut self, bytes: u32) {
        self.done += bytes;
        let mut left = bytes as usize;
        while left > 0 {
            let part = &mut self.iov[self.iov_next];
            if left < part.iov_len {
                part.iov_base = part.iov_base.wrapping_byte_add(left);
                part.iov_len -= left;
                return;
            }
            left -= part.iov_len;
            self.iov_next += 1;
        }
    }
}

pub(super) struct Slab {
    entries: Box<[Entry]>,
    free: Vec<u32>,
}

impl Slab {
    pub(super) fn new(entries: u32, segments: usize) -> Self {
        assert!(entries <= ENTRIES_MAX, "{entries} operations");
        Self {
            entries: (0..entries).map(|_| Entry::new(segments)).collect(),
            free: (0..entries).rev().collect(),
        }
    }

    /// Takes a free entry; all fields but the memory vectors are as after [`Slab::release`].
    pub(super) fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    pub(super) fn release(&mut self, index: u32) {
        let entry = self.get_mut(index);
        assert!(
            entry.owed == 0,
            "operation {index} is released while the kernel works on it"
        );
        entry.generation = entry.generation.wrapping_add(1);
        entry.kind = Kind::Free;
        entry.file = None;
        entry.offset = 0;
        entry.total = 0;
        entry.done = 0;
        entry.retries = 0;
        entry.cancel_requested = false;
        entry.force_async = false;
        entry.sync_only = false;
        entry.chain_cut = false;
        entry.linked_at = None;
        entry.sync_result = None;
        entry.error = None;
        entry.segs.clear();
        entry.iov.clear();
        entry.iov_next = 0;
        entry.buf = None;
        self.free.push(index);
    }

    pub(super) fn get(&self, index: u32) -> &Entry {
        &self.entries[index as usize]
    }

    pub(super) fn get_mut(&mut self, index: u32) -> &mut Entry {
        &mut self.entries[index as usize]
    }

    /// The entry an id names, if that operation is still in flight.
    pub(super) fn find(&self, id: OpId) -> Option<u32> {
        let entry = self.entries.get(id.index as usize)?;
        (entry.generation == id.generation && entry.kind != Kind::Free).then_some(id.index)
    }

    pub(super) fn tag(&self, index: u32, part: Part) -> u64 {
        Tag {
            index,
            part,
            generation: self.get(index).generation,
        }
        .pack()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(super) fn capacity(&self) -> usize {
        self.entries.len()
    }

    /// Indices of all entries in use. Walks the whole slab: for closing and for rare repairs.
    pub(super) fn indices(&self) -> impl Iterator<Item = u32> + '_ {
        (0_u32..)
            .zip(&self.entries)
            .filter(|(_, e)| e.kind != Kind::Free)
            .map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_survive_the_kernel() {
        for part in [Part::Main, Part::Sync, Part::Cancel, Part::Wake] {
            let tag = Tag {
                index: ENTRIES_MAX - 1,
                part,
                generation: 0xfedc_ba98,
            };
            assert_eq!(Tag::unpack(tag.pack()), Some(tag));
        }
        assert_eq!(Tag::unpack(u64::MAX), None);
    }

    #[test]
    fn an_id_stops_naming_its_entry_when_the_operation_is_over() {
        let mut slab = Slab::new(1, 1);
        let index = slab.take().expect("a free entry");
        slab.get_mut(index).kind = Kind::Accept;
        let id = OpId {
            index,
            generation: slab.get(index).generation,
        };
        assert_eq!(slab.find(id), Some(index));
        slab.release(index);
        assert_eq!(slab.find(id), None);
        assert_eq!(slab.take(), Some(index));
    }

    #[test]
    fn partial_transfers_continue_at_the_first_byte_that_is_missing() {
        let mut memory = [0_u8; 30];
        let base = memory.as_mut_ptr();
        let mut entry = Entry::new(2);
        for start in [0, 10] {
            let iov_base = base.wrapping_add(start * 2).cast();
            entry.iov.push(libc::iovec {
                iov_base,
                iov_len: 10,
            });
        }
        entry.advance(4);
        assert_eq!((entry.iov_next, entry.iov[0].iov_len), (0, 6));
        assert_eq!(entry.iov[0].iov_base, base.wrapping_add(4).cast());
        entry.advance(7);
        assert_eq!((entry.iov_next, entry.iov[1].iov_len), (1, 9));
        entry.advance(9);
        assert_eq!((entry.iov_next, entry.done), (2, 20));
    }
}
