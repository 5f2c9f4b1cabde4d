//! Reads of the backing that are compared with the state tree (P4).
//!
//! With [`VerifyReads::All`] a read takes whole blocks from the backing, and is answered when the
//! tree has compared them with their leaves. With [`VerifyReads::Sample`] a read now and then is
//! told to the tree after it was answered, and the tree reads its blocks again.
//!
//! What the tree is told goes in one queue with sweeps and their ends, and what a sweep writes is
//! read from the overlay until its end is told. So a block that hashes to the leaf that the tree
//! has when it hears of it is what the read is to see. One that does not may be damaged, or only
//! overlap a sweep: the tree looks again while no sweep is under way, which is the only time at
//! which a difference is damage. Either way the read is then made again, as if it came now: it
//! finds the block good, or in the overlay, or known to be damaged (`core/damage.rs`).
//!
//! Bounds: reads that wait are the front end's, and hold its slots; at most [`SAMPLES`] samples
//! are on their way.
//!
//! Not here: hashing, leaves, what is damage (`src/daemon/tree/reads.rs`).

use hn4::types::{BlockIndex, Lba};

use super::event::{Action, Actions, Failure, Now, Seg};
use super::mutants::{Mutant, planted};
use super::overlay::{Mask, mask, runs};
use super::tree::TreeWork;
use super::volume::Volume;
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// With [`VerifyReads::Sample`] one of so many reads of the backing is checked. A prime: a client
/// that reads the volume again and again, in any number of requests that is not a multiple of it,
/// has other places checked each time.
pub const SAMPLE_EVERY: u32 = 61;
/// Blocks of such a read that are checked, from its first one on: 256 KiB.
pub const SAMPLE_BLOCKS: u64 = 64;
/// Samples that the tree has not answered yet; beyond that none are drawn.
pub(super) const SAMPLES: u32 = 16;

/// Which reads of the backing are compared with the state tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum VerifyReads {
    /// None.
    #[default]
    Off,
    /// One in [`SAMPLE_EVERY`], after it was answered.
    Sample,
    /// All, before they are answered.
    All,
}

/// What the tree says of a read that waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Its blocks are what their leaves say, or the tree does not know them.
    Serve,
    /// They were not; by now it is known why.
    Again,
    /// They were not, and nobody can tell why.
    Refuse,
}

/// What else is to be done when a read has all that it takes from the backing.
#[derive(Debug)]
pub(super) enum Then {
    Sample(Sample),
    Check(Box<Check>),
}

/// Blocks to be read again by the tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    first: BlockIndex,
    count: u64,
}

impl Sample {
    pub(super) fn of(lba: Lba, sectors: u32) -> Self {
        let first = lba.block();
        let last = Lba(lba.0 + u64::from(sectors.saturating_sub(1))).block();
        let count = (last.0 - first.0 + 1).min(SAMPLE_BLOCKS);
        Self { first, count }
    }
}

/// What the overlay had of a block of which the rest comes from the backing.
#[derive(Debug)]
struct Kept {
    slot: SlotId,
    mask: Mask,
    bytes: Box<[u8; SLOT_BYTES]>,
}

/// A read that is answered only when its blocks were compared.
#[derive(Debug)]
pub(super) struct Check {
    request: (Lba, u32, Vec<SlotId>),
    /// The backing failed before, and then the tree found nothing damaged.
    pub(super) retried: bool,
    /// What comes from the backing, and where it lies.
    blocks: Vec<(BlockIndex, SlotId)>,
    kept: Vec<Kept>,
}

impl Check {
    #[inline(never)]
    pub(super) fn new(lba: Lba, sectors: u32, slots: &[SlotId]) -> Box<Self> {
        Box::new(Self {
            request: (lba, sectors, slots.to_vec()),
            retried: false,
            blocks: Vec::new(),
            kept: Vec::new(),
        })
    }

    /// Sectors of the block are missing: all of it is read, and what the overlay had of it, which
    /// lies in the slot already, is kept until it was compared. The sectors to be read.
    #[inline(never)]
    pub(super) fn take_whole(
        &mut self,
        (block, slot): (BlockIndex, SlotId),
        had: Mask,
        mem: &dyn SlotMemory,
    ) -> Mask {
        self.blocks.push((block, slot));
        if had != 0 {
            let mut bytes = Box::new([0; SLOT_BYTES]);
            bytes.copy_from_slice(mem.bytes(slot));
            self.kept.push(Kept {
                slot,
                mask: had,
                bytes,
            });
        }
        mask(0, SECTORS)
    }

    /// Hands the blocks to the tree; without contents, which no leaf fits, if the backing `failed`
    /// to give them.
    pub(super) fn hand_over(&self, index: u32, failed: bool, out: &mut Actions) {
        let first = out.segs.len();
        let read = if failed { &[][..] } else { &self.blocks };
        out.segs.extend(read.iter().map(|&(_, slot)| Seg {
            slot,
            offset: 0,
            bytes: WHOLE,
        }));
        out.push(Action::Tree(TreeWork::Check {
            read: Some(index),
            blocks: self.blocks.iter().map(|(block, _)| *block).collect(),
            segs: first..out.segs.len(),
        }));
    }

    /// The blocks are good: puts back what was newer.
    fn complete(&self, mem: &mut dyn SlotMemory) {
        for Kept { slot, mask, bytes } in &self.kept {
            for run in runs(*mask) {
                mem.bytes_mut(*slot)[run.clone()].copy_from_slice(&bytes[run]);
            }
        }
    }
}

/// Sectors and bytes of a block.
const SECTORS: u32 = 8;
const WHOLE: u16 = 4096;
const _: () = assert!(WHOLE as usize == SLOT_BYTES && SECTORS * 512 == WHOLE as u32);

/// Which reads are drawn.
#[derive(Debug, Default)]
pub(super) struct Samples {
    /// Reads of the backing since one was drawn.
    passed: u32,
    /// Samples that the tree has not answered.
    under_way: u32,
}

impl Samples {
    /// What is to be done with this read.
    pub(super) fn draw(&mut self, lba: Lba, sectors: u32) -> Option<Then> {
        self.passed += 1;
        if self.passed < SAMPLE_EVERY {
            return None;
        }
        self.passed = 0;
        Some(Then::Sample(Sample::of(lba, sectors)))
    }

    /// Has the tree read these blocks again, if there is room.
    pub(super) fn hand_over(&mut self, sample: Sample, out: &mut Actions) {
        if self.under_way == SAMPLES {
            return;
        }
        self.under_way += 1;
        let Sample { first, count } = sample;
        out.push(Action::Tree(TreeWork::Check {
            read: None,
            blocks: (first.0..first.0 + count).map(BlockIndex).collect(),
            segs: 0..0,
        }));
    }

    fn answered(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }
}

impl Volume {
    /// The tree has compared what it was handed: a sample, or the blocks of a read.
    #[inline(never)]
    pub(super) fn checked(
        &mut self,
        now: Now,
        (read, verdict): (Option<u32>, Verdict),
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        let Some(index) = read else {
            return self.reads.samples.answered();
        };
        let Some((id, is_read, check)) = self.reads.take_checked(index) else {
            return;
        };
        match verdict {
            Verdict::Again | Verdict::Refuse if planted(Mutant::ServeUnchecked) => {
                check.complete(mem);
                out.complete(id, Ok(()));
            }
            // It does not know them, and there is nothing to be served.
            Verdict::Serve if !is_read => out.complete(id, Err(Failure::Io)),
            Verdict::Serve => {
                check.complete(mem);
                out.complete(id, Ok(()));
            }
            Verdict::Again => {
                let (lba, sectors, slots) = check.request;
                // The tree could read all of it: it was repaired meanwhile, or the backing fails
                // now and then. That may go on, so it is tried once more and not for ever.
                let failed = !is_read && !self.is_damaged(lba, sectors);
                if failed && check.retried {
                    return out.complete(id, Err(Failure::Io));
                }
                self.read_what_is_good(now, id, (lba, sectors, &slots), mem, out);
                if failed {
                    self.reads.mark_retried(id);
                }
            }
            Verdict::Refuse => out.complete(id, Err(Failure::Io)),
        }
    }
}
