//! Writing the shadow over the backing, once a superblock has switched it in.
//!
//! Entry by entry, in the order in which they were made: what an entry changes does not overlap, so
//! its writes may be on their way together; the next entry waits for them. Then the backing is
//! flushed, and one superblock says that the copy is usable and the shadow is nothing any more.
//! Whatever part was written when the node dies is written again: the shadow does not change.
//!
//! **Invariant:** the backing is touched only when both slots of the superblock say that the shadow
//! counts, and nobody reads it until the superblock says that it was written over.

use hn4::log::{CopyState, FrameHead, FrameHeader, LogIdentity};
use hn4::types::{BLOCK_BYTES, LogOffset};

use super::compare::whole;
use super::event::{Action, Actions, Disk, Io, IoToken, Seg};
use super::journal::WRITE_SLOTS;
use super::overlay::{DirtyBlock, runs};
use super::seal::frame_changes;
use super::sweep::split_zeros;
use super::volume::Volume;
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// Most of the shadow that is read at once: the largest entry.
const READ_SLOTS: usize = 68;

/// See the module.
#[derive(Debug)]
pub(super) struct Apply {
    /// Generation of the superblock when it was seen to switch.
    since: u64,
    /// Where the entries in the slots begin.
    at: u64,
    slots: Vec<SlotId>,
    /// Blocks of them that were dealt with.
    used: usize,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    Reading,
    /// So many operations on the backing are on their way.
    Writing(usize),
    Flushing,
    /// The superblock is to say that it is done.
    Done,
}

impl Volume {
    /// Whether the shadow is being written over the backing, or is about to be.
    #[must_use]
    pub fn is_applying(&self) -> bool {
        let applying = |copy| matches!(copy, CopyState::Applying { .. });
        applying(self.superblock.persisted().copy) || applying(self.superblock.desired.copy)
    }

    pub(super) fn apply_progress(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let persisted = *self.superblock.persisted();
        let CopyState::Applying { shadow_bytes, .. } = persisted.copy else {
            return;
        };
        if self.failed.is_some() || self.is_pinned() || !self.tree_lets_go(out) {
            return;
        }
        let Some(apply) = &mut self.replica.apply else {
            self.replica.apply = Some(Apply {
                since: persisted.generation,
                at: 0,
                slots: Vec::new(),
                used: 0,
                phase: Phase::Idle,
            });
            // Into the other slot: then no older one can be found.
            self.superblock.dirty = true;
            return;
        };
        let both = persisted.generation > apply.since;
        if apply.phase != Phase::Idle || !both {
            return;
        }
        if apply.used < apply.slots.len() {
            return self.apply_entry(mem, out);
        }
        if apply.at < shadow_bytes {
            return self.read_entries(shadow_bytes, mem, out);
        }
        apply.phase = Phase::Flushing;
        let io = Io::Fsync {
            disk: Disk::Backing,
        };
        let token = IoToken::Apply;
        out.push(Action::Io { token, io });
    }

    /// Whether what is on its way, or was read last, is a part of the shadow.
    pub(super) fn reads_shadow(&self) -> bool {
        let phase = self.replica.apply.as_ref().map(|apply| apply.phase);
        matches!(phase, Some(Phase::Reading | Phase::Idle))
    }

    fn read_entries(&mut self, end: u64, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let most = READ_SLOTS.min(self.config.reserve_slots / 2);
        let Some(apply) = &mut self.replica.apply else {
            return;
        };
        let left = usize::try_from((end - apply.at) / BLOCK_BYTES).unwrap_or(usize::MAX);
        let count = left.min(most);
        if mem.free_slots() < count {
            return;
        }
        let slots: Option<Vec<SlotId>> = (0..count).map(|_| mem.alloc()).collect();
        apply.slots = slots.expect("room was checked");
        apply.used = 0;
        apply.phase = Phase::Reading;
        let io = Io::Read {
            disk: Disk::Shadow,
            offset: apply.at,
            segs: whole(&apply.slots, out),
        };
        let token = IoToken::Apply;
        out.push(Action::Io { token, io });
    }

    /// Starts the writes of the next entry, or drops what is left if it is not whole.
    fn apply_entry(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let Some(apply) = &mut self.replica.apply else {
            return;
        };
        let place = apply.at + (apply.used * SLOT_BYTES) as u64;
        let head = first_frame(&self.config.identity, &apply.slots[apply.used..], mem);
        let head = head.filter(|head| self.is_entry(head, place));
        let Some(apply) = &mut self.replica.apply else {
            return;
        };
        let Some(head) = head else {
            let first = apply.used == 0;
            apply.at = place;
            let slots = std::mem::take(&mut apply.slots);
            super::volume::free_all(mem, &slots);
            if first {
                // EIO: the disk did not keep what it had flushed.
                return self.fail(IoToken::Apply, 5, out);
            }
            return self.apply_progress(mem, out);
        };
        let blocks = |bytes: u64| usize::try_from(bytes / BLOCK_BYTES).unwrap_or(usize::MAX);
        let payload = apply.used + blocks(head.header.head_bytes);
        let end = apply.used + blocks(head.header.frame_bytes);
        let (dirty, zeros) = frame_changes(&head, &apply.slots[payload..end]);
        let mut count = 0;
        for (range, trim) in zeros {
            for (offset, bytes, trim) in split_zeros(range, trim) {
                count += 1;
                let io = Io::Zero {
                    offset,
                    bytes,
                    trim,
                };
                let token = IoToken::Apply;
                out.push(Action::Io { token, io });
            }
        }
        count += write_blocks(&dirty, out);
        apply.used = end;
        if count > 0 {
            apply.phase = Phase::Writing(count);
        } else {
            self.apply_progress(mem, out);
        }
    }

    /// Whether an entry belongs to the copy that was switched in, at this place.
    fn is_entry(&self, head: &FrameHead, place: u64) -> bool {
        let CopyState::Applying {
            from, from_chain, ..
        } = self.superblock.desired.copy
        else {
            return false;
        };
        let header = &head.header;
        header.offset == LogOffset(place)
            && header.epoch == from.next()
            && header.previous == from_chain
    }

    pub(super) fn apply_io_done(&mut self, mem: &mut dyn SlotMemory) {
        let Some(apply) = &mut self.replica.apply else {
            return;
        };
        match &mut apply.phase {
            Phase::Writing(left) if *left > 1 => {
                *left -= 1;
                return;
            }
            Phase::Flushing => {
                apply.phase = Phase::Done;
                self.superblock.desired.copy = CopyState::Usable;
                self.superblock.dirty = true;
                return;
            }
            Phase::Reading | Phase::Writing(_) => apply.phase = Phase::Idle,
            Phase::Idle | Phase::Done => return,
        }
        if apply.used == apply.slots.len() {
            apply.at += (apply.used * SLOT_BYTES) as u64;
            apply.used = 0;
            let slots = std::mem::take(&mut apply.slots);
            super::volume::free_all(mem, &slots);
        }
    }

    /// The superblock says that the copy is usable: the shadow may go.
    pub(super) fn apply_persisted(&mut self, out: &mut Actions) {
        let persisted = self.superblock.persisted().copy;
        let done = |apply: &Apply| apply.phase == Phase::Done;
        if persisted == CopyState::Usable && self.replica.apply.as_ref().is_some_and(done) {
            self.replica.apply = None;
            out.push(Action::DropShadow);
            if let Some(oldest) = self.replica.behind.take() {
                self.wants_shadow(oldest);
            }
        }
    }
}

/// The frame at the beginning of these slots, if all of it is there and as it was written.
fn first_frame(
    identity: &LogIdentity,
    slots: &[SlotId],
    mem: &dyn SlotMemory,
) -> Option<FrameHead> {
    let header = FrameHeader::decode(identity, mem.bytes(*slots.first()?)).ok()?;
    let count = usize::try_from(header.frame_bytes / BLOCK_BYTES).ok()?;
    let frame: Vec<&[u8]> = slots
        .get(..count)?
        .iter()
        .map(|&slot| mem.bytes(slot))
        .collect();
    FrameHead::decode_frame(identity, &frame.concat()).ok()
}

/// Starts the writes of blocks, as few as there can be. Returns how many.
fn write_blocks(dirty: &[DirtyBlock], out: &mut Actions) -> usize {
    let mut count = 0;
    let mut run: Option<(u64, usize, u64)> = None;
    let mut push = |(offset, first, _): (u64, usize, u64), out: &mut Actions| {
        count += 1;
        let io = Io::Write {
            disk: Disk::Backing,
            offset,
            segs: first..out.segs.len(),
            then_fsync: false,
        };
        let token = IoToken::Apply;
        out.push(Action::Io { token, io });
    };
    for block in dirty {
        for part in runs(block.mask) {
            let offset = block.block.lba().byte_offset() + part.start as u64;
            if let Some((start, first, end)) = run
                && (end != offset || out.segs.len() - first >= WRITE_SLOTS)
            {
                push((start, first, end), out);
                run = None;
            }
            let (start, first, _) = run.unwrap_or((offset, out.segs.len(), offset));
            out.segs.push(Seg {
                slot: block.slot,
                offset: u16::try_from(part.start).expect("a slot has 4096 bytes"),
                bytes: u16::try_from(part.len()).expect("a slot has 4096 bytes"),
            });
            run = Some((start, first, offset + part.len() as u64));
        }
    }
    if let Some(run) = run {
        push(run, out);
    }
    count
}
