//! Reads of clients are compared with the tree (`verify_reads`).
//!
//! A block that hashes to its leaf is good. One that does not may be damaged, or may have been read
//! while a sweep wrote it, so it is read again here, as a deep verify does it: while no sweep is
//! under way. Only then is a difference damage; no alarm is false. Samples, which nobody waits for,
//! are looked at in this way at once.
//!
//! Bounds: what waits is bounded by whoever asks (`engine/src/core/checks.rs`).

use std::collections::VecDeque;

use hn4::types::{BLOCK_BYTES, BlockIndex};
use hn4_engine::core::event::{TreeEvent, Verdict};
use hn4_proof::blocks::{self, BLOCK};
use hn4_proof::hash::Digest;
use hn4_proof::tree::TreeError;
use hn4_proof::tree::keeper::{Device, Keeper};

use super::files::Files;
use super::leaves::Leaves;
use super::sweep::Gathering;
use super::{FromTree, Open, Worker};

/// Blocks that are read again before other messages are looked at.
const AT_ONCE: usize = 64;

/// What was compared since the daemon was started, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct ReadCounts {
    /// They were what their leaves say.
    pub(crate) checked: u64,
    /// They were to be compared, and there was no tree yet, or none any more.
    pub(crate) unchecked: u64,
    /// They differed when nothing else could have been the cause.
    pub(crate) bad: u64,
    /// They were looked at again, since block and leaf may have been of different states.
    pub(crate) repeated: u64,
}

/// Blocks that are to be looked at while no sweep is under way.
#[derive(Debug)]
struct Suspect {
    /// The read that waits.
    read: Option<u32>,
    blocks: Vec<u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Reads {
    pub(super) counts: ReadCounts,
    suspects: VecDeque<Suspect>,
    /// What the sweep that is under way writes.
    writing: Option<Gathering>,
}

/// The leaf of a block. Those that are remembered are kept up to date only where reads are checked
/// by policy.
fn leaf_of(
    keeper: &Keeper<Files>,
    leaves: &mut Leaves,
    remembers: bool,
    block: u64,
) -> Result<Option<Digest>, TreeError> {
    match remembers {
        true => leaves.get(block, |range| keeper.leaves(range)),
        false => Ok(keeper.leaves(block..block + 1)?.first().copied()),
    }
}

impl Reads {
    pub(super) fn has_suspects(&self) -> bool {
        !self.suspects.is_empty()
    }
}

impl Worker {
    /// Compares the blocks of a read that waits, or takes those of a sample.
    pub(super) fn check(&mut self, read: Option<u32>, blocks: &[BlockIndex], bytes: &[u8]) {
        self.untold = true;
        let blocks: Vec<u64> = blocks.iter().map(|block| block.0).collect();
        let count = blocks.len() as u64;
        let known = self.tree.is_some() && !self.is_building();
        // A survey is of no state that anybody could want to read.
        if !known || self.surveys {
            self.reads.counts.unchecked += count;
            return self.judge(read, Verdict::Serve);
        }
        if read.is_none() {
            return self.suspect(read, blocks);
        }
        match self.differing(&blocks, bytes) {
            Ok(differing) => {
                self.reads.counts.checked += count - differing.len() as u64;
                if differing.is_empty() {
                    return self.judge(read, Verdict::Serve);
                }
                self.reads.counts.repeated += differing.len() as u64;
                self.suspect(read, differing);
            }
            Err(error) => {
                self.give_up(&error);
                self.reads.counts.unchecked += count;
                self.judge(read, Verdict::Serve);
            }
        }
    }

    /// Which of these blocks are not what their leaves say.
    fn differing(&mut self, blocks: &[u64], bytes: &[u8]) -> Result<Vec<u64>, TreeError> {
        let remembers = self.setup.checks_reads;
        let Some(Open { keeper, leaves, .. }) = &mut self.tree else {
            return Ok(Vec::new());
        };
        let mut found = Vec::with_capacity(blocks.len());
        blocks::leaves_of(bytes, |leaf| found.push(leaf));
        let mut differing = Vec::new();
        for (index, &block) in blocks.iter().enumerate() {
            let leaf = leaf_of(keeper, leaves, remembers, block)?;
            if leaf.is_none() || leaf.as_ref() != found.get(index) {
                differing.push(block);
            }
        }
        Ok(differing)
    }

    fn suspect(&mut self, read: Option<u32>, blocks: Vec<u64>) {
        if self.halted {
            // A sweep that was begun never ends, so nobody will ever know.
            return self.judge(read, Verdict::Refuse);
        }
        self.reads.suspects.push_back(Suspect { read, blocks });
    }

    /// Looks at some of what waits, while no sweep is under way.
    pub(super) fn look_again(&mut self) {
        let mut looked = 0;
        while self.is_quiet()
            && looked < AT_ONCE
            && let Some(suspect) = self.reads.suspects.pop_front()
        {
            looked += suspect.blocks.len();
            match self.bad_among(&suspect.blocks) {
                Ok(bad) => self.found_bad(&suspect, &bad),
                Err(error) => {
                    // Whoever else waits is turned away with the tree.
                    self.reads.suspects.push_front(suspect);
                    self.give_up(&error);
                }
            }
        }
    }

    /// Which of these blocks the backing does not hold.
    fn bad_among(&mut self, blocks: &[u64]) -> Result<Vec<u64>, TreeError> {
        let remembers = self.setup.checks_reads;
        let Some(Open {
            keeper,
            backing,
            leaves,
        }) = &mut self.tree
        else {
            return Ok(Vec::new());
        };
        let mut bad = Vec::new();
        for &block in blocks {
            let mut contents = [0; BLOCK];
            let is_read = backing.read(block * BLOCK_BYTES, &mut contents).is_ok();
            let leaf = leaf_of(keeper, leaves, remembers, block)?;
            if !is_read || leaf != Some(blocks::leaf(&contents)) {
                bad.push(block);
            }
        }
        Ok(bad)
    }

    fn found_bad(&mut self, suspect: &Suspect, bad: &[u64]) {
        self.untold = true;
        self.reads.counts.bad += bad.len() as u64;
        if suspect.read.is_none() {
            let good = suspect.blocks.len() - bad.len();
            self.reads.counts.checked += good as u64;
        }
        self.damaged(bad.iter().copied());
        // Of very many bad blocks only the number is known, and reads of them are not kept away.
        let listed = |block: &u64| {
            let record = self.record.as_ref();
            record.is_some_and(|record| record.bad.contains(block))
        };
        let verdict = match bad.iter().all(listed) {
            true => Verdict::Again,
            false => Verdict::Refuse,
        };
        self.judge(suspect.read, verdict);
    }

    /// There is no tree any more, or the backing will not be quiet again: what waits has differed
    /// from its leaf, and is not served.
    pub(super) fn turn_away(&mut self) {
        self.reads.writing = None;
        for suspect in std::mem::take(&mut self.reads.suspects) {
            self.judge(suspect.read, Verdict::Refuse);
        }
    }

    fn judge(&self, read: Option<u32>, verdict: Verdict) {
        self.say(FromTree::Core(TreeEvent::Checked(read, verdict)));
    }

    /// A sweep begins to write.
    pub(super) fn begins_to_write(&mut self, gathering: Gathering) {
        self.reads.writing = self.setup.checks_reads.then_some(gathering);
    }

    /// The sweep has ended: what it wrote has other leaves.
    pub(super) fn has_written(&mut self) {
        let (Some(written), Some(tree)) = (self.reads.writing.take(), &mut self.tree) else {
            return;
        };
        let Gathering { leaves, zeros, .. } = &written;
        tree.leaves.forget(|group| {
            let next_zeros = zeros.partition_point(|range| range.end <= group.start);
            let next_zeros = zeros.get(next_zeros);
            let is_zeroed = next_zeros.is_some_and(|range| range.start < group.end);
            is_zeroed || leaves.range(group).next().is_some()
        });
    }
}
