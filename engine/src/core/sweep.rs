//! A sweep: the writes that turn the backing from the state at one checkpoint into the state at the
//! next.
//!
//! The order is zeroed extents, then blocks by LBA in large writes, then a flush of the backing,
//! then the superblock that names the new checkpoint; only after that are slots and log freed. A
//! sweep that is torn at any point is redone from the log, which still holds every epoch of it.
//!
//! **Invariant:** what a sweep writes is the newest contents at the cut, never anything newer.

use std::ops::Range;

use hn4::types::{BLOCK_BYTES, BlockIndex, Epoch};

use super::event::{Action, Actions, Disk, Io, IoToken, Seg};
use super::extents::ExtentMap;
use super::journal::{Sealed, WRITE_SLOTS};
use super::mutants::{Mutant, planted};
use super::overlay::{Overlay, Zeroed, runs};

/// Longest zeroing in one request: devices take their time over very long ones.
const ZERO_BYTES: u64 = 1 << 30;

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
    phase: Phase,
    zeros: Vec<(u64, u64, bool)>,
    /// Byte offset on the backing and where its contents are, in ascending order.
    parts: Vec<(u64, Seg)>,
    next: usize,
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
        depth: usize,
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
        blocks.sort_unstable();
        blocks.dedup();
        let mut parts = Vec::with_capacity(blocks.len());
        for block in blocks {
            plan_block(overlay, BlockIndex(block), cut, &zeros, &mut parts);
        }
        let zeros = zeros
            .iter()
            .flat_map(|(range, zeroed)| split_zeros(range, zeroed.trim));
        Self {
            cut,
            marked,
            phase: Phase::Zeros,
            zeros: zeros.collect(),
            parts,
            next: 0,
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
        &self.parts
    }

    /// Starts as many operations as the depth allows, and moves on to the next phase when all are
    /// done.
    pub(super) fn advance(&mut self, out: &mut Actions) -> SweepStep {
        loop {
            match self.phase {
                Phase::Zeros => self.issue_zeros(out),
                Phase::Blocks => self.issue_blocks(out),
                Phase::Flush | Phase::Superblock => {}
            }
            if self.in_flight > 0 {
                return SweepStep::Busy;
            }
            match self.phase {
                Phase::Zeros => (self.phase, self.next) = (Phase::Blocks, 0),
                Phase::Blocks => {
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
                    self.phase = Phase::Superblock;
                    return SweepStep::WriteSuperblock;
                }
                Phase::Superblock => return SweepStep::Busy,
            }
        }
    }

    /// Takes a completion; [`Self::advance`] is to follow.
    pub(super) fn io_done(&mut self) {
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

    fn issue_blocks(&mut self, out: &mut Actions) {
        while self.in_flight < self.depth && self.next < self.parts.len() {
            let (offset, _) = self.parts[self.next];
            let first_seg = out.segs.len();
            let mut end = offset;
            while let Some(&(at, seg)) = self.parts.get(self.next)
                && at == end
                && out.segs.len() - first_seg < WRITE_SLOTS
            {
                out.segs.push(seg);
                end += u64::from(seg.bytes);
                self.next += 1;
            }
            self.in_flight += 1;
            let segs = first_seg..out.segs.len();
            let io = Io::Write {
                disk: Disk::Backing,
                offset,
                segs,
                then_fsync: false,
            };
            out.push(Action::Io {
                token: IoToken::SweepWrite,
                io,
            });
        }
    }
}

fn plan_block(
    overlay: &Overlay,
    block: BlockIndex,
    cut: Epoch,
    zeros: &ExtentMap<Zeroed>,
    parts: &mut Vec<(u64, Seg)>,
) {
    let zeroed = zeros.get(block.0).map(|zeroed| zeroed.epoch);
    let start = parts.len();
    let cut = if planted(Mutant::SweepBeyondCut) {
        Epoch(u64::MAX)
    } else {
        cut
    };
    overlay.resolve_at(block, cut, zeroed, |slot, mask| {
        for run in runs(mask) {
            let offset = block.lba().byte_offset() + run.start as u64;
            let bytes = u16::try_from(run.len()).expect("a slot has 4096 bytes");
            let run_start = u16::try_from(run.start).expect("a slot has 4096 bytes");
            parts.push((
                offset,
                Seg {
                    slot,
                    offset: run_start,
                    bytes,
                },
            ));
        }
    });
    parts[start..].sort_unstable_by_key(|&(offset, _)| offset);
}

pub(super) fn split_zeros(range: Range<u64>, trim: bool) -> impl Iterator<Item = (u64, u64, bool)> {
    let (start, end) = (range.start * BLOCK_BYTES, range.end * BLOCK_BYTES);
    (0..(end - start).div_ceil(ZERO_BYTES)).map(move |index| {
        let offset = start + index * ZERO_BYTES;
        (offset, ZERO_BYTES.min(end - offset), trim)
    })
}
