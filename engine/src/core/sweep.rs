//! A sweep: the writes that turn the backing from the state at one checkpoint into the state at the
//! next.
//!
//! The order is zeroed extents, then blocks by LBA in large writes, then a flush of the backing,
//! then the superblock that names the new checkpoint; only after that are slots and log freed. A
//! sweep that is torn at any point is redone from the log, which still holds every epoch of it.
//! What the log does not hold, and a torn write may damage nevertheless, is for `merge` to keep.
//!
//! **Invariant:** what a sweep writes is the newest contents at the cut, never anything newer.

use std::ops::Range;

use hn4::log::MergeUse;
use hn4::types::{BLOCK_BYTES, BlockIndex, Epoch};

use super::event::{Action, Actions, Disk, Io, IoToken, Seg};
use super::extents::ExtentMap;
use super::journal::Sealed;
use super::merge::{Merge, Placing};
use super::mutants::{Mutant, planted};
use super::overlay::{Overlay, Zeroed, runs};
use super::pace::{Pace, Stage};
use crate::arena::{SlotId, SlotMemory};

/// Longest zeroing in one request: devices take their time over very long ones.
const ZERO_BYTES: u64 = 1 << 30;
const NO_SEG: Seg = Seg {
    slot: SlotId(0),
    offset: 0,
    bytes: 0,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Zeros,
    Blocks,
    Flush,
    Superblock,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Sweep {
    /// The backing will be the state at this epoch.
    pub(super) cut: Epoch,
    /// The primary has marked that epoch.
    pub(super) marked: bool,
    pub(super) pace: Pace,
    phase: Phase,
    zeros: Vec<(u64, u64, bool)>,
    next: usize,
    pub(super) placing: Placing,
    in_flight: usize,
    depth: usize,
}

/// What a completion means to the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SweepStep {
    /// The sweep goes on.
    Busy,
    /// The backing is flushed: write the superblock.
    WriteSuperblock,
}

impl Sweep {
    /// Plans the sweep of these epochs, which are the ones after the checkpoint up to the cut.
    #[must_use]
    pub(super) fn plan<'a>(
        overlay: &Overlay,
        epochs: impl Iterator<Item = &'a Sealed>,
        (depth, merges): (usize, bool),
        pace: impl FnOnce(usize) -> Pace,
    ) -> Self {
        let (mut cut, mut marked) = (Epoch(0), false);
        let mut blocks: Vec<u64> = Vec::new();
        let mut zeros: ExtentMap<Zeroed> = ExtentMap::new();
        for sealed in epochs {
            cut = sealed.header.epoch;
            marked = sealed.header.checkpoint_mark;
            blocks.extend(sealed.blocks.iter().map(|dirty| dirty.block.0));
            for (range, trim) in &sealed.zeros {
                zeros.insert(
                    range.clone(),
                    Zeroed {
                        epoch: cut,
                        trim: *trim,
                    },
                );
            }
        }
        let pace = pace(blocks.len());
        blocks.sort_unstable();
        blocks.dedup();
        let mut placing = Placing::new(MergeUse::Sweep(cut), IoToken::SweepWrite, depth);
        placing.reserve(blocks.len());
        for block in blocks {
            let zeroed = zeros.get(block).map(|zeroed| zeroed.epoch);
            // What this sweep zeroes around a write comes from the log too.
            let merges = merges && zeroed.is_none();
            plan_block(
                overlay,
                BlockIndex(block),
                (cut, zeroed),
                merges,
                &mut placing,
            );
        }
        let zeros = zeros
            .iter()
            .flat_map(|(range, zeroed)| split_zeros(range, zeroed.trim));
        Self {
            cut,
            marked,
            pace,
            phase: Phase::Zeros,
            zeros: zeros.collect(),
            next: 0,
            placing,
            in_flight: 0,
            depth,
        }
    }

    /// Byte offset, length and whether it is a trim, of what is zeroed first.
    pub(super) fn zeros(&self) -> &[(u64, u64, bool)] {
        &self.zeros
    }

    /// Byte offset and contents of what is written, ascending.
    pub(super) fn parts(&self) -> &[(u64, Seg)] {
        self.placing.parts()
    }

    /// How far it is, if so many of its parts were handed to the tree; `None`: all of them.
    pub(super) fn stage(&self, handed: Option<usize>) -> Stage {
        let (written, parts) = self.placing.progress();
        match (handed, self.phase) {
            (Some(handed), _) => Stage::Hashing(handed, parts),
            (None, Phase::Zeros | Phase::Blocks) => Stage::Writing(written, parts),
            (None, Phase::Flush | Phase::Superblock) => Stage::Written,
        }
    }

    /// Starts as many operations as `depth` allows now, and moves on to the next phase when all are
    /// done.
    pub(super) fn advance(
        &mut self,
        (merge, era): (&mut Option<Merge>, Option<u64>),
        depth: usize,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) -> SweepStep {
        self.depth = depth;
        self.placing.depth = depth;
        loop {
            if self.phase == Phase::Zeros {
                self.issue_zeros(out);
            }
            if self.in_flight > 0 {
                return SweepStep::Busy;
            }
            match self.phase {
                Phase::Zeros => self.phase = Phase::Blocks,
                Phase::Blocks => {
                    if !self.placing.advance(merge, era, mem, out) {
                        return SweepStep::Busy;
                    }
                    self.phase = Phase::Flush;
                    if planted(Mutant::NoFlushBeforeCheckpoint) {
                        continue;
                    }
                    self.in_flight = 1;
                    let io = Io::Fsync {
                        disk: Disk::Backing,
                    };
                    out.push(Action::Io {
                        token: IoToken::SweepFsync,
                        io,
                    });
                    return SweepStep::Busy;
                }
                Phase::Flush => {
                    merge.iter_mut().for_each(Merge::flushed);
                    self.phase = Phase::Superblock;
                    return SweepStep::WriteSuperblock;
                }
                Phase::Superblock => return SweepStep::Busy,
            }
        }
    }

    /// Takes a completion; [`Self::advance`] is to follow.
    pub(super) fn io_done(&mut self) {
        if self.phase == Phase::Blocks {
            return self.placing.io_done();
        }
        assert!(
            self.in_flight > 0,
            "completions come from operations that are on their way"
        );
        self.in_flight -= 1;
    }

    fn issue_zeros(&mut self, out: &mut Actions) {
        while self.in_flight < self.depth && self.next < self.zeros.len() {
            if planted(Mutant::SweepForgetsZeroes) {
                self.next = self.zeros.len();
                break;
            }
            let (offset, bytes, trim) = self.zeros[self.next];
            self.next += 1;
            self.in_flight += 1;
            let io = Io::Zero {
                offset,
                bytes,
                trim,
            };
            out.push(Action::Io {
                token: IoToken::SweepZero,
                io,
            });
        }
    }
}

fn plan_block(
    overlay: &Overlay,
    block: BlockIndex,
    (cut, zeroed): (Epoch, Option<Epoch>),
    merges: bool,
    placing: &mut Placing,
) {
    let cut = if planted(Mutant::SweepBeyondCut) {
        Epoch(u64::MAX)
    } else {
        cut
    };
    // A block has at most eight runs of sectors.
    let mut parts = [(0, NO_SEG); 8];
    let mut count = 0;
    overlay.resolve_at(block, cut, zeroed, |slot, mask| {
        for run in runs(mask) {
            let offset = block.lba().byte_offset() + run.start as u64;
            let bytes = u16::try_from(run.len()).expect("a slot has 4096 bytes");
            let run_start = u16::try_from(run.start).expect("a slot has 4096 bytes");
            let seg = Seg {
                slot,
                offset: run_start,
                bytes,
            };
            parts[count] = (offset, seg);
            count += 1;
        }
    });
    placing.add(parts[..count].iter().copied(), merges);
}

pub(super) fn split_zeros(range: Range<u64>, trim: bool) -> impl Iterator<Item = (u64, u64, bool)> {
    let (start, end) = (range.start * BLOCK_BYTES, range.end * BLOCK_BYTES);
    (0..(end - start).div_ceil(ZERO_BYTES)).map(move |index| {
        let offset = start + index * ZERO_BYTES;
        (offset, ZERO_BYTES.min(end - offset), trim)
    })
}
