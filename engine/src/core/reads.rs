//! Reads: from the overlay where it is newer, else from the backing, per sector.
//!
//! What the overlay has is copied when the read arrives, not when the backing answers: by then the
//! slots may have been destaged and freed. A sector that was not dirty at that moment comes from
//! the backing; if it is written meanwhile, the read overlaps the write, and either contents are
//! right.

use hn4::types::{BlockIndex, Lba, SECTORS_PER_BLOCK};

use super::checks::{Check, Samples, Then, VerifyReads};
use super::event::{Action, Actions, Disk, Failure, Io, IoToken, RequestId, Seg};
use super::journal::WRITE_SLOTS;
use super::overlay::{Mask, Piece, mask, runs};
use super::volume::Volume;
use crate::arena::{SlotId, SlotMemory};

#[derive(Debug)]
struct Op {
    id: RequestId,
    left: u32,
    failed: bool,
    then: Then,
}

/// Reads that wait for the backing.
#[derive(Debug, Default)]
pub(super) struct Reads {
    ops: Vec<Option<Op>>,
    free: Vec<u32>,
    pub(super) samples: Samples,
}

impl Reads {
    fn start(&mut self, id: RequestId, left: u32) -> u32 {
        let op = Some(Op {
            id,
            left,
            failed: false,
            then: Then::Answer,
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

    /// A read that waits for the tree.
    pub(super) fn take_checked(&mut self, index: u32) -> Option<(RequestId, Box<Check>)> {
        let op = self.ops.get(index as usize)?.as_ref()?;
        if op.left > 0 || !matches!(op.then, Then::Check(_)) {
            return None;
        }
        match self.end(index)? {
            Op {
                id,
                then: Then::Check(check),
                ..
            } => Some((id, check)),
            _ => None,
        }
    }
}

/// A run that is being collected, for one operation on the backing.
struct Run {
    offset: u64,
    first_seg: usize,
    next: u64,
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
        if self.is_applying() {
            // Neither what was nor what will be.
            return out.complete(id, Err(Failure::Io));
        }
        let first_action = out.list.len();
        let index = self.reads.start(id, 0);
        let mut check = match self.config.verify_reads {
            VerifyReads::All => Some(Check::new(lba, sectors, slots)),
            VerifyReads::Off | VerifyReads::Sample => None,
        };
        let end = lba.0 + u64::from(sectors);
        let mut at = lba.0;
        let mut run: Option<Run> = None;
        for &slot in slots {
            let block = Lba(at).block();
            let from = Lba(at).sector_in_block();
            let to =
                u32::try_from((end - block.lba().0).min(SECTORS_PER_BLOCK)).expect("at most 8");
            let wanted = mask(from, to);
            let mut missing = self.read_overlay(block, wanted, slot, mem);
            if let Some(check) = &mut check
                && missing != 0
            {
                missing = check.take_whole((block, slot), wanted & !missing, mem);
            }
            for missing in runs(missing) {
                let offset = block.lba().byte_offset() + missing.start as u64;
                let is_full = |run: &Run| out.segs.len() - run.first_seg >= WRITE_SLOTS;
                if let Some(before) = run.take_if(|run| run.next != offset || is_full(run)) {
                    push_read(out, index, &before);
                }
                let first_seg = out.segs.len();
                let run = run.get_or_insert(Run {
                    offset,
                    first_seg,
                    next: offset,
                });
                run.next = offset + missing.len() as u64;
                out.segs.push(Seg {
                    slot,
                    offset: u16::try_from(missing.start).expect("a slot has 4096 bytes"),
                    bytes: u16::try_from(missing.len()).expect("a slot has 4096 bytes"),
                });
            }
            at = block.lba().0 + SECTORS_PER_BLOCK;
        }
        let Some(run) = run else {
            let _ = self.reads.end(index);
            return out.complete(id, Ok(()));
        };
        push_read(out, index, &run);
        let started = u32::try_from(out.list.len() - first_action).expect("bounded by the request");
        let then = match (self.config.verify_reads, check) {
            (_, Some(check)) => Then::Check(check),
            (VerifyReads::Sample, None) => self.reads.samples.draw(lba, sectors),
            (VerifyReads::Off | VerifyReads::All, None) => Then::Answer,
        };
        if let Some(op) = &mut self.reads.ops[index as usize] {
            (op.left, op.then) = (started, then);
        }
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
        // Readers of a replica see the epoch that its backing is at.
        if self.pinned_epoch().is_some() {
            return wanted;
        }
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
        let op = self.reads.ops[index as usize].as_mut();
        let op = op.expect("completions name reads that are on their way");
        op.failed |= result.is_err();
        op.left -= 1;
        if op.left > 0 {
            return;
        }
        if let Then::Check(check) = &op.then
            && !op.failed
        {
            return check.hand_over(index, out);
        }
        let Some(Op {
            id, failed, then, ..
        }) = self.reads.end(index)
        else {
            return;
        };
        out.complete(id, if failed { Err(Failure::Io) } else { Ok(()) });
        match then {
            Then::Answer => {}
            Then::Sample(sample) => self.reads.samples.hand_over(sample, out),
            // The backing did not give it: the tree finds out which blocks are to be repaired.
            Then::Check(check) => self.reads.samples.hand_over(check.sample(), out),
        }
    }
}

fn push_read(out: &mut Actions, index: u32, run: &Run) {
    let io = Io::Read {
        disk: Disk::Backing,
        offset: run.offset,
        segs: run.first_seg..out.segs.len(),
    };
    out.push(Action::Io {
        token: IoToken::Read(index),
        io,
    });
}
