//! Reads: from the overlay where it is newer, else from the backing, per sector.
//!
//! What the overlay has is copied when the read arrives, not when the backing answers: by then the
//! slots may have been destaged and freed. A sector that was not dirty at that moment comes from
//! the backing; if it is written meanwhile, the read overlaps the write, and either contents are
//! right.

use std::collections::BTreeMap;

use hn4::types::{BlockIndex, Lba, SECTORS_PER_BLOCK};

use super::checks::{Check, Sample, Samples, Then, VerifyReads};
use super::event::{Action, Actions, Disk, Failure, Io, IoToken, RequestId, Seg};
use super::journal::WRITE_SLOTS;
use super::overlay::{Mask, Piece, mask, runs};
use super::volume::Volume;
use crate::arena::{SlotId, SlotMemory};

#[derive(Clone, Copy, Debug)]
struct Op {
    id: RequestId,
    lba: Lba,
    sectors: u32,
    left: u32,
    failed: bool,
}

/// Reads that wait for the backing.
#[derive(Debug, Default)]
pub(super) struct Reads {
    ops: Vec<Option<Op>>,
    free: Vec<u32>,
    /// What else is to be done with some of them.
    then: BTreeMap<u32, Then>,
    pub(super) samples: Samples,
    /// Whatever the policy is, every read is compared.
    pub(super) all_are_checked: bool,
}

impl Reads {
    fn start(&mut self, id: RequestId, lba: Lba, sectors: u32) -> u32 {
        let op = Some(Op {
            id,
            lba,
            sectors,
            left: 0,
            failed: false,
        });
        if let Some(index) = self.free.pop() {
            self.ops[index as usize] = op;
            return index;
        }
        self.ops.push(op);
        u32::try_from(self.ops.len() - 1).expect("front ends bound their requests")
    }

    fn end(&mut self, index: u32) -> Option<Op> {
        let op = self.ops.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(op)
    }

    /// This read was begun once more since the backing had failed.
    pub(super) fn mark_retried(&mut self, id: RequestId) {
        let ops = &self.ops;
        let is_it = |index: u32| ops[index as usize].is_some_and(|op| op.id == id);
        for (&index, then) in &mut self.then {
            if let Then::Check(check) = then
                && is_it(index)
            {
                check.retried = true;
            }
        }
    }

    /// A read whose blocks the tree was handed, and whether the backing gave them.
    pub(super) fn take_checked(&mut self, index: u32) -> Option<(RequestId, bool, Box<Check>)> {
        let op = self.ops.get(index as usize)?.as_ref()?;
        if op.left > 0 {
            return None;
        }
        match self.then.remove(&index)? {
            Then::Check(check) => {
                let op = self.end(index)?;
                Some((op.id, !op.failed, check))
            }
            Then::Sample(_) => None,
        }
    }
}

impl Volume {
    pub(super) fn read(
        &mut self,
        id: RequestId,
        lba: Lba,
        sectors: u32,
        slots: &[SlotId],
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        let policy = match self.reads.all_are_checked {
            true => VerifyReads::All,
            false => self.config.verify_reads,
        };
        match policy {
            VerifyReads::All => self.read_from::<true>(id, (lba, sectors, slots), mem, out),
            VerifyReads::Off | VerifyReads::Sample => {
                self.read_from::<false>(id, (lba, sectors, slots), mem, out);
            }
        }
    }

    /// `WHOLE`: what comes from the backing is to be compared before it is served. A constant, so
    /// that reads which are not pay nothing for it.
    fn read_from<const WHOLE: bool>(
        &mut self,
        id: RequestId,
        (lba, sectors, slots): (Lba, u32, &[SlotId]),
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        if self.is_applying() {
            // Neither what was nor what will be.
            return out.complete(id, Err(Failure::Io));
        }
        let first_action = out.list.len();
        let index = self.reads.start(id, lba, sectors);
        let mut check = WHOLE.then(|| Check::new(lba, sectors, slots));
        let pinned = self.pinned_epoch().is_some();
        let end = lba.0 + u64::from(sectors);
        let mut at = lba.0;
        // The run that is being collected: byte offset on the backing, first segment, next byte.
        let mut run: Option<(u64, usize, u64)> = None;
        for &slot in slots {
            let block = Lba(at).block();
            let from = Lba(at).sector_in_block();
            let to =
                u32::try_from((end - block.lba().0).min(SECTORS_PER_BLOCK)).expect("at most 8");
            let wanted = mask(from, to);
            // Readers of a replica see the epoch that its backing is at.
            let mut missing = match pinned {
                true => wanted,
                false => self.read_overlay(block, wanted, slot, mem),
            };
            if let Some(check) = &mut check
                && missing != 0
            {
                missing = check.take_whole((block, slot), wanted & !missing, mem);
            }
            for missing in runs(missing) {
                let offset = block.lba().byte_offset() + missing.start as u64;
                let full = run.is_some_and(|(_, first, _)| out.segs.len() - first >= WRITE_SLOTS);
                if let Some((start, first, next)) = run
                    && (next != offset || full)
                {
                    push_read(out, index, start, first);
                    run = None;
                }
                let (start, first, _) = run.unwrap_or((offset, out.segs.len(), offset));
                let bytes = u16::try_from(missing.len()).expect("a slot has 4096 bytes");
                let seg_start = u16::try_from(missing.start).expect("a slot has 4096 bytes");
                out.segs.push(Seg {
                    slot,
                    offset: seg_start,
                    bytes,
                });
                run = Some((start, first, offset + missing.len() as u64));
            }
            at = block.lba().0 + SECTORS_PER_BLOCK;
        }
        if let Some((start, first, _)) = run {
            push_read(out, index, start, first);
        }
        let started = u32::try_from(out.list.len() - first_action).expect("bounded by the request");
        if started == 0 {
            self.reads.ops[index as usize] = None;
            self.reads.free.push(index);
            return out.complete(id, Ok(()));
        }
        if let Some(op) = &mut self.reads.ops[index as usize] {
            op.left = started;
        }
        if WHOLE || self.config.verify_reads != VerifyReads::Off {
            self.will_check(index, check, (lba, sectors));
        }
    }

    #[inline(never)]
    fn will_check(&mut self, index: u32, check: Option<Box<Check>>, (lba, sectors): (Lba, u32)) {
        let then = check.map(Then::Check);
        let then = then.or_else(|| self.reads.samples.draw(lba, sectors));
        self.reads.then.extend(then.map(|then| (index, then)));
    }

    /// Copies what the overlay has of a block; the sectors that it does not have.
    #[inline]
    fn read_overlay(
        &self,
        block: BlockIndex,
        wanted: Mask,
        slot: SlotId,
        mem: &mut dyn SlotMemory,
    ) -> Mask {
        self.overlay.resolve(block, wanted, |piece| match piece {
            Piece::Slot(source, mask) => {
                for run in runs(mask) {
                    let start = run.start;
                    mem.copy(source, run, slot, start);
                }
            }
            Piece::Zero(mask) => {
                for run in runs(mask) {
                    mem.bytes_mut(slot)[run].fill(0);
                }
            }
        })
    }

    pub(super) fn read_done(&mut self, index: u32, result: Result<(), i32>, out: &mut Actions) {
        let slot = &mut self.reads.ops[index as usize];
        let op = slot
            .as_mut()
            .expect("completions name reads that are on their way");
        op.failed |= result.is_err();
        op.left -= 1;
        if op.left == 0 {
            // With [`VerifyReads::Off`] there never is anything else to be done.
            if op.failed || !self.reads.then.is_empty() {
                return self.read_to_be_checked(index, out);
            }
            out.complete(op.id, Ok(()));
            *slot = None;
            self.reads.free.push(index);
        }
    }

    /// What the backing did not give is looked at by the tree, too, which has it repaired; a read
    /// that is compared with it anyhow waits for that.
    #[inline(never)]
    fn read_to_be_checked(&mut self, index: u32, out: &mut Actions) {
        let failed = self.reads.ops[index as usize].is_some_and(|op| op.failed);
        if let Some(Then::Check(check)) = self.reads.then.get(&index) {
            return check.hand_over(index, failed, out);
        }
        let drawn = self.reads.then.remove(&index);
        let Some(op) = self.reads.end(index) else {
            return;
        };
        let result = if failed { Err(Failure::Io) } else { Ok(()) };
        out.complete(op.id, result);
        let sample = match drawn {
            Some(Then::Sample(sample)) => Some(sample),
            _ if failed && self.config.tree => Some(Sample::of(op.lba, op.sectors)),
            _ => None,
        };
        if let Some(sample) = sample {
            self.reads.samples.hand_over(sample, out);
        }
    }
}

fn push_read(out: &mut Actions, index: u32, offset: u64, first_seg: usize) {
    let segs = first_seg..out.segs.len();
    let io = Io::Read {
        disk: Disk::Backing,
        offset,
        segs,
    };
    out.push(Action::Io {
        token: IoToken::Read(index),
        io,
    });
}
