//! Writing the shadow over the backing, once a superblock has switched it in.
//!
//! Entry by entry, in the order in which they were made: what an entry changes does not overlap, so
//! its writes may be on their way together; the next entry waits for them. Where it changes a part
//! of a block, `merge` sees to the rest. Then the backing is
//! flushed, and one superblock says that the copy is usable and the shadow is nothing any more.
//! Whatever part was written when the node dies is written again: the shadow does not change.
//!
//! **Invariant:** the backing is touched only when both slots of the superblock say that the shadow
//! counts, and nobody reads it until the superblock says that it was written over.

use hn4::log::{CopyState, FrameHead, FrameHeader, LogIdentity, MergeUse};
use hn4::types::{BLOCK_BYTES, LogOffset};

use super::compare::whole;
use super::event::{Action, Actions, Disk, Io, IoToken, Seg};
use super::merge::{Merge, Placing};
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
    /// Blocks of an entry.
    pub(super) placing: Option<Placing>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    Reading,
    /// So much of the backing is being zeroed.
    Zeroing(usize),
    /// Blocks are on their way to the backing.
    Writing,
    Flushing,
    /// The superblock is to say that it is done.
    Done,
}

impl Apply {
    /// Lets the slots go when all that was read is dealt with.
    fn forget_used(&mut self, mem: &mut dyn SlotMemory) {
        if self.used == self.slots.len() {
            self.at += (self.used * SLOT_BYTES) as u64;
            self.used = 0;
            let slots = std::mem::take(&mut self.slots);
            super::volume::free_all(mem, &slots);
        }
    }
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
                placing: None,
            });
            // Into the other slot: then no older one can be found.
            self.superblock.dirty = true;
            return;
        };
        let both = persisted.generation > apply.since;
        if apply.phase == Phase::Writing
            && let Some(placing) = &mut apply.placing
        {
            if !placing.advance(&mut self.merge, persisted.merge_era, mem, out) {
                return;
            }
            apply.placing = None;
            apply.phase = Phase::Idle;
            apply.forget_used(mem);
        }
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
        let mut placing = Placing::new(MergeUse::Shadow, IoToken::Apply, self.config.sweep_depth);
        let merges = self.merge.is_some();
        for block in &dirty {
            placing.add(parts(block), merges);
        }
        apply.placing = Some(placing);
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
        apply.used = end;
        apply.phase = Phase::Zeroing(count);
        if count == 0 {
            apply.phase = Phase::Writing;
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

    pub(super) fn apply_io_done(&mut self) {
        let Some(apply) = &mut self.replica.apply else {
            return;
        };
        match &mut apply.phase {
            Phase::Zeroing(left) if *left > 1 => *left -= 1,
            Phase::Zeroing(_) => apply.phase = Phase::Writing,
            Phase::Writing => {
                if let Some(placing) = &mut apply.placing {
                    placing.io_done();
                }
            }
            Phase::Flushing => {
                self.merge.iter_mut().for_each(Merge::flushed);
                apply.phase = Phase::Done;
                self.superblock.desired.copy = CopyState::Usable;
                self.superblock.dirty = true;
            }
            Phase::Reading => apply.phase = Phase::Idle,
            Phase::Idle | Phase::Done => {}
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

/// What is written of a block.
fn parts(dirty: &DirtyBlock) -> impl Iterator<Item = (u64, Seg)> {
    let (start, slot) = (dirty.block.lba().byte_offset(), dirty.slot);
    runs(dirty.mask).map(move |run| {
        let seg = Seg {
            slot,
            offset: u16::try_from(run.start).expect("a slot has 4096 bytes"),
            bytes: u16::try_from(run.len()).expect("a slot has 4096 bytes"),
        };
        (start + run.start as u64, seg)
    })
}
