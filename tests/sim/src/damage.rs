//! Damage of backings, what it excuses, and how it must end (P4).
//!
//! In runs with state trees blocks rot at rest, and writes of sweeps and of repairs are lost or go
//! astray. The world remembers what was damaged, so that it can tell a promise that was broken from
//! what no tree can know:
//!
//! - **Until it is found** damage is served, unless all reads are compared.
//! - **A medium is taken as it is** when a tree is built: also what a full copy brought from a
//!   primary that did not know of its damage, and what a comparison of trees left in place.
//! - **A torn sweep** leaves blocks that differ from their leaves, and until it was written again
//!   nobody can tell damage from that. A block that is written in part then is taken as it is.
//!
//! What was taken so is *taken for good*: its leaf is of what nobody wrote. Everything else must be
//! found, and repaired or written again, before a run ends.

use std::collections::BTreeMap;
use std::ops::Range;

use hn4::types::{BLOCK_BYTES, SECTORS_PER_BLOCK};
use hn4_engine::core::VerifyReads;
use hn4_engine::core::event::Disk;

use crate::clients::{Pending, Wish};
use crate::faults::Fault;
use crate::node::Node;
use crate::oracle::index;
use crate::world::{MS, Outcome, World, broken};

/// How often the operator looks for what only a client can repair.
const LOOK_MS: u64 = 500;

/// Since when, and until when, something was so of a block. Of the last time that it was.
#[derive(Debug, Default)]
pub(crate) struct Spells(BTreeMap<u64, Option<u64>>);

impl Spells {
    /// It is so from now on.
    pub(crate) fn begin(&mut self, block: u64) {
        self.0.insert(block, None);
    }

    /// It is so, or not any more.
    pub(crate) fn set(&mut self, block: u64, holds: bool, now: u64) {
        if holds {
            self.begin(block);
        } else if let Some(until @ None) = self.0.get_mut(&block) {
            *until = Some(now);
        }
    }

    /// It is so of no block any more.
    pub(crate) fn end_all(&mut self, now: u64) {
        let open = self.0.values_mut().filter(|until| until.is_none());
        open.for_each(|until| *until = Some(now));
    }

    /// Whether it is so.
    pub(crate) fn is(&self, block: u64) -> bool {
        matches!(self.0.get(&block), Some(None))
    }

    /// Whether it was so at some time since then.
    fn was(&self, block: u64, since: u64) -> bool {
        let until = self.0.get(&block);
        until.is_some_and(|until| until.is_none_or(|until| until >= since))
    }

    /// Of how many blocks it is so.
    fn count(&self) -> u64 {
        self.0.values().filter(|until| until.is_none()).count() as u64
    }
}

/// The blocks of a range of bytes.
pub(crate) fn blocks_in(bytes: &Range<usize>) -> Range<u64> {
    let (start, end) = (bytes.start as u64, bytes.end as u64);
    start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)
}

impl Node {
    /// Whether something damaged a block, here or where it was copied from.
    pub(crate) fn was_hurt(&self, block: u64) -> bool {
        self.hurt.is(block) || self.spread.contains(&block)
    }
}

impl World {
    /// A bit of a backing flips; where there are trees, in a block that has a leaf.
    pub(crate) fn rot_backing(&mut self, node: usize) {
        let bytes = self.plan.blocks * BLOCK_BYTES;
        let (offset, bit) = (self.rng.below(bytes), self.rng.below(8));
        let block = offset / BLOCK_BYTES;
        if self.plan.trees && self.nodes[node].tree.leaf(block).is_none() {
            return self.operator.not_yet();
        }
        if self.fault(Fault::RottenBacking, Some(node)) {
            let bit = u8::try_from(bit).unwrap_or(0);
            let node = &mut self.nodes[node];
            node.disk(Disk::Backing).rot(index(offset), bit);
            node.hurt.begin(block);
        }
    }

    /// Blocks that a read needs and that its core knows to be damaged.
    pub(crate) fn known_in(&self, node: usize, lba: u64, sectors: u64) -> Vec<u64> {
        let end = (lba + sectors).div_ceil(SECTORS_PER_BLOCK);
        let live = self.nodes[node].live.as_ref();
        let known = live.map(|live| live.tree.known.range(lba / SECTORS_PER_BLOCK..end));
        known.into_iter().flatten().copied().collect()
    }

    /// Whether a read was given what is wrong in a block, and nobody could have known.
    pub(crate) fn is_excused(&self, node: usize, block: u64, pending: &Pending) -> bool {
        let Some(live) = self.nodes[node].live.as_ref().filter(|_| self.plan.trees) else {
            return false;
        };
        let node = &self.nodes[node];
        let since = pending.at;
        let was_hurt = node.hurt.was(block, since) || node.spread.contains(&block);
        // It was known when the read came, and is.
        let is_known = pending.known.contains(&block) && live.tree.known.contains(&block);
        if !was_hurt || is_known {
            return false;
        }
        let is_taken = node.taken.was(block, since);
        match self.plan.verify_reads {
            VerifyReads::All => is_taken || live.tree.whole_since.is_none_or(|at| at > since),
            VerifyReads::Sample | VerifyReads::Off => true,
        }
    }

    /// P4: no part of a full copy is read where damage is known, unless all of the block comes once
    /// more behind the copy. What is not known spreads.
    pub(crate) fn check_copied(&self, node: usize, offset: u64, bytes: u64) -> Outcome {
        let Some(live) = &self.nodes[node].live else {
            return Ok(());
        };
        let blocks = offset / BLOCK_BYTES..(offset + bytes).div_ceil(BLOCK_BYTES);
        let mut known = live.tree.known.range(blocks);
        match known.find(|&&block| !self.is_written_again(node, block)) {
            Some(block) => broken(
                "P4",
                format!("node {node} copies block {block}, which it knows to be damaged"),
            ),
            None => Ok(()),
        }
    }

    /// Whether what is in a node's log, durable and not in its backing yet, writes all of a block.
    fn is_written_again(&self, node: usize, block: u64) -> bool {
        let changes = self.nodes[node].live.as_ref().and_then(|live| {
            let progress = live.volume.copy_status().progress;
            let from = self.oracle.ancestor(live.tip, progress.applied)?;
            let to = self.oracle.ancestor(live.tip, progress.durable)?;
            self.oracle.changes(from, to)
        });
        let changes = changes.unwrap_or_default();
        let mut sectors = block * SECTORS_PER_BLOCK..(block + 1) * SECTORS_PER_BLOCK;
        sectors.all(|sector| {
            changes
                .iter()
                .any(|change| change.sectors.contains(&sector))
        })
    }

    /// A part of a full copy was read: damage in it that nobody knows of goes along.
    pub(crate) fn damage_spreads(&mut self, node: usize, other: usize, offset: u64, bytes: u64) {
        for block in offset / BLOCK_BYTES..(offset + bytes).div_ceil(BLOCK_BYTES) {
            let source = &self.nodes[node];
            if source.was_hurt(block) || source.taken.is(block) {
                self.stats.damage.copied += 1;
                self.nodes[other].spread.insert(block);
            }
        }
    }

    /// Whether `hn4ctl promote` takes a copy without being told to accept a loss.
    pub(crate) fn is_without_damage(&self, node: usize) -> bool {
        !self.plan.trees || self.nodes[node].tree.bad.is_empty()
    }

    /// What no peer can repair a client writes again: the operator has it from elsewhere.
    pub(crate) fn write_what_is_hopeless(&mut self) {
        let due = self.operator.looked_at + LOOK_MS * MS <= self.now;
        let Some(primary) = self.primary().filter(|_| self.plan.trees && due) else {
            return;
        };
        self.operator.looked_at = self.now;
        let live = self.nodes[primary].live.as_ref();
        let Some(live) = live.filter(|live| live.volume.accepts_writes().is_ok()) else {
            return;
        };
        let checkpoint = live.volume.superblock().checkpoint;
        let members = (0..self.nodes.len()).filter(|&node| self.is_member(node));
        let mut blocks: Vec<u64> = members
            .flat_map(|node| self.hopeless_blocks(node))
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        // One that waits for peers may be in the backing, and be damaged again.
        let asked = |block: u64| {
            let mut pending = self.pending.values();
            pending.any(|pending| pending.is_to_write(block, checkpoint))
        };
        blocks.retain(|&block| !asked(block));
        for block in blocks {
            self.stats.damage.written_anew += 1;
            let wish = Wish::Write {
                lba: block * SECTORS_PER_BLOCK,
                sectors: SECTORS_PER_BLOCK,
                fua: true,
                tag: self.next_request + 10,
            };
            self.ask_node(None, primary, wish);
        }
    }

    /// All copies are drained: whether all of each was verified since, nothing is damaged, and all
    /// trees are the same. A replica whose root differs is made anew.
    pub(crate) fn trees_rest(&mut self) -> bool {
        if !self.plan.trees {
            return true;
        }
        let Some(primary) = self.primary() else {
            return false;
        };
        let members: Vec<usize> = (0..self.nodes.len())
            .filter(|&node| self.is_member(node))
            .collect();
        let Some(since) = self.operator.trees_since else {
            self.operator.trees_since = Some(self.now);
            for node in members {
                let now = self.now;
                if let Some(live) = &mut self.nodes[node].live {
                    (live.tree.verify, live.tree.verify_at) = (None, now);
                }
                self.tree_wakes(node, now);
            }
            return false;
        };
        let rests = |node: usize| {
            let live = self.nodes[node].live.as_ref();
            let tree = live.map(|live| &live.tree);
            tree.is_some_and(|tree| {
                let verified = tree.verified.is_some_and(|began| began >= since);
                verified && tree.is_quiet() && tree.is_idle()
            })
        };
        let is_bad = |node: usize| !self.nodes[node].tree.bad.is_empty();
        if members.iter().any(|&node| !rests(node) || is_bad(node)) {
            return false;
        }
        let ours = &self.nodes[primary].tree.leaves;
        let other = members
            .into_iter()
            .find(|&node| self.nodes[node].tree.leaves != *ours);
        if let Some(node) = other {
            self.stats.damage.roots_differed += 1;
            self.operator.trees_since = None;
            self.wipe(node);
            return false;
        }
        true
    }

    /// Whether a wrong block of a drained backing is one that nobody can know of.
    pub(crate) fn is_taken_for_good(&self, node: usize, block: u64) -> bool {
        self.plan.trees && self.nodes[node].taken.is(block) && self.nodes[node].was_hurt(block)
    }

    /// Counts what nobody can know of.
    pub(crate) fn count_taken(&mut self) {
        let taken = self.nodes.iter().map(|node| node.taken.count());
        self.stats.damage.taken += taken.sum::<u64>();
    }
}
