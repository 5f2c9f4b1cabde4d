//! Reads are compared with leaves, deep verifies look for damage, and good copies are asked for and
//! written, as in `src/daemon/tree/reads.rs`, `verify.rs` and `mend.rs`.
//!
//! Checked at each block that is said to be damaged: it is not what the oracle says of it, and
//! something did damage it.

use std::collections::{BTreeMap, BTreeSet};

use hn4::log::CopyState;
use hn4::types::{BLOCK_BYTES, BlockIndex};
use hn4_engine::core::event::{Damaged, Disk, TreeEvent, Verdict};
use hn4_proof::blocks::{self, Block};
use hn4_proof::tree::DAMAGED;
use hn4_proof::tree::exchange::{self, TreeMessage};

use crate::node::{Damages, Fate, Kind, Node};
use crate::oracle::index;
use crate::stats::Found;
use crate::trees::{SLICE_BLOCKS, ToTree};
use crate::world::{MS, Outcome, What, World, broken};

/// Blocks that are looked at again in a turn.
const AT_ONCE: usize = 64;

/// Blocks that are to be looked at while no sweep is under way.
#[derive(Debug)]
pub(crate) struct Suspect {
    /// The read that waits.
    read: Option<u32>,
    blocks: Vec<u64>,
}

/// A deep verify that is under way.
#[derive(Debug)]
pub(crate) struct Verify {
    began: u64,
    next: u64,
    bad: BTreeSet<u64>,
}

/// A repair on its way to the backing.
#[derive(Debug)]
pub(crate) struct Writing {
    block: u64,
    contents: Box<Block>,
    /// Name of the write on the disk.
    id: u64,
    /// It was written, and such a flush is under way.
    flush: Option<u64>,
}

impl World {
    /// Compares the blocks of a read that waits, or takes those of a sample.
    pub(crate) fn check_blocks(
        &mut self,
        node: usize,
        read: Option<u32>,
        numbers: &[u64],
        bytes: &[u8],
    ) {
        let Some(live) = &self.nodes[node].live else {
            return;
        };
        let (whole, halted) = (live.tree.whole_since.is_some(), live.tree.halted);
        let known = whole && !live.tree.surveys;
        if !known {
            self.stats.damage.unchecked += numbers.len() as u64;
            return self.judge(node, read, Verdict::Serve);
        }
        let mut differing = numbers.to_vec();
        if read.is_some() {
            let mut found = Vec::new();
            blocks::leaves_of(bytes, |leaf| found.push(leaf));
            let files = &self.nodes[node].tree;
            let mut found = found.into_iter();
            differing.retain(|&block| {
                let found = found.next();
                found.is_none() || files.leaf(block) != found
            });
            self.stats.damage.checked += (numbers.len() - differing.len()) as u64;
            if differing.is_empty() {
                return self.judge(node, read, Verdict::Serve);
            }
        }
        if halted {
            return self.judge(node, read, Verdict::Refuse);
        }
        if let Some(live) = &mut self.nodes[node].live {
            let blocks = differing;
            live.tree.suspects.push_back(Suspect { read, blocks });
        }
    }

    fn judge(&mut self, node: usize, read: Option<u32>, verdict: Verdict) {
        self.tree_answers(node, TreeEvent::Checked(read, verdict));
    }

    /// Looks at some of what waits, while no sweep is under way.
    pub(crate) fn look_again(&mut self, node: usize) -> Outcome {
        let mut looked = 0;
        while looked < AT_ONCE
            && let Some(live) = &mut self.nodes[node].live
            && live.tree.is_quiet()
            && let Some(suspect) = live.tree.suspects.pop_front()
        {
            looked += suspect.blocks.len();
            let bad = suspect.blocks.iter().copied();
            let bad: Vec<u64> = bad.filter(|&block| self.differs(node, block)).collect();
            let found = match suspect.read {
                Some(_) => Found::Read,
                None => Found::Sample,
            };
            self.damaged(node, &bad, found)?;
            self.judge(node, suspect.read, Verdict::Again);
        }
        Ok(())
    }

    /// Whether the backing does not hold what the leaf says.
    fn differs(&self, node: usize, block: u64) -> bool {
        let found = blocks::leaf(&self.backing_block(node, block));
        self.nodes[node].tree.leaf(block) != Some(found)
    }

    /// There is no tree any more, or the backing will not be quiet again.
    pub(crate) fn turn_away(&mut self, node: usize) {
        let live = self.nodes[node].live.as_mut();
        let suspects = live.map(|live| std::mem::take(&mut live.tree.suspects));
        for suspect in suspects.into_iter().flatten() {
            self.judge(node, suspect.read, Verdict::Refuse);
        }
    }

    /// These blocks are not what was written there.
    pub(crate) fn damaged(&mut self, node: usize, bad: &[u64], found: Found) -> Outcome {
        for &block in bad {
            if let Some(live) = &mut self.nodes[node].live
                && let Some(verify) = &mut live.tree.verify
            {
                verify.bad.insert(block);
            }
            if self.nodes[node].tree.bad.insert(block) {
                self.alarm_is_right(node, block)?;
                self.stats.damage.found.count(found);
                self.trace.note(self.now, Some(node), || {
                    format!("   DAMAGED block {block}, found by {found:?}")
                });
                self.seek(node, block);
            }
        }
        Ok(())
    }

    /// P4: no alarm is false.
    fn alarm_is_right(&self, node: usize, block: u64) -> Outcome {
        let at = &self.nodes[node];
        if at.tree.leaf(block) == Some(DAMAGED) || at.taken.is(block) {
            return Ok(());
        }
        if self.holds_truth(node, block, &self.backing_block(node, block)[..]) {
            return broken("P4", format!("node {node}: block {block} is no damage"));
        }
        if !at.was_hurt(block) {
            let detail = format!("node {node}: block {block} differs, and nothing damaged it");
            return broken("P3", detail);
        }
        Ok(())
    }

    /// A good copy is wanted, and reads of the block wait.
    pub(crate) fn seek(&mut self, node: usize, block: u64) {
        let now = self.instant();
        let live = self.nodes[node].live.as_mut();
        if live.is_some_and(|live| live.tree.repairs.seek(block, now)) {
            self.say_damage(node, block, Some(Damaged::Sought));
        }
    }

    fn say_damage(&mut self, node: usize, block: u64, damaged: Option<Damaged>) {
        self.tree_answers(node, TreeEvent::Damage(BlockIndex(block), damaged));
    }

    /// A block was written, or is about to be. Whether it was bad.
    pub(crate) fn is_good(&mut self, node: usize, block: u64) -> bool {
        if let Some(live) = &mut self.nodes[node].live
            && let Some(verify) = &mut live.tree.verify
        {
            verify.bad.remove(&block);
        }
        let was_bad = self.nodes[node].tree.bad.remove(&block);
        if was_bad {
            self.healed(node, block);
        }
        was_bad
    }

    fn healed(&mut self, node: usize, block: u64) {
        if let Some(live) = &mut self.nodes[node].live {
            live.tree.repairs.forget(block);
        }
        self.say_damage(node, block, None);
    }

    /// Reads of what was sought for long enough, or of all, fail from now on.
    pub(crate) fn lose(&mut self, node: usize, at_once: bool) {
        let now = self.instant();
        let live = self.nodes[node].live.as_mut();
        let lost = live.map(|live| live.tree.repairs.lost(now, at_once));
        for block in lost.into_iter().flatten() {
            self.stats.damage.lost += 1;
            self.say_damage(node, block, Some(Damaged::Lost));
        }
    }

    /// When the next deep verify begins.
    pub(crate) fn next_verify(&mut self) -> u64 {
        let interval = self.plan.verify_ms * MS;
        self.now + interval / 2 + self.rng.below(interval.max(1))
    }

    /// A deep verify begins or goes on, while no sweep is under way.
    pub(crate) fn verify_slice(&mut self, node: usize) -> Outcome {
        let (now, again) = (self.now, self.rng.below(5 * MS));
        let blocks = self.plan.blocks;
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let tree = &mut live.tree;
        let due = tree.verify_at <= now && !tree.surveys;
        if tree.whole_since.is_none() || !tree.is_quiet() || !due {
            return Ok(());
        }
        let began = Verify {
            began: now,
            next: 0,
            bad: BTreeSet::new(),
        };
        let verify = tree.verify.get_or_insert(began);
        let slice = verify.next..(verify.next + SLICE_BLOCKS as u64).min(blocks);
        (verify.next, tree.verify_at) = (slice.end, now + again + 1);
        let is_over = slice.end == blocks;
        let bad: Vec<u64> = slice.filter(|&block| self.differs(node, block)).collect();
        self.damaged(node, &bad, Found::Verify)?;
        if is_over {
            self.verified(node)?;
        }
        Ok(())
    }

    /// A deep verify has ended: what it found is what is bad.
    fn verified(&mut self, node: usize) -> Outcome {
        let next = self.next_verify();
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        live.tree.verify_at = next;
        let Some(verify) = live.tree.verify.take() else {
            return Ok(());
        };
        live.tree.verified = Some(verify.began);
        self.stats.damage.verifies += 1;
        let before = std::mem::replace(&mut self.nodes[node].tree.bad, verify.bad.clone());
        for &block in before.difference(&verify.bad) {
            self.healed(node, block);
        }
        verify.bad.iter().for_each(|&block| self.seek(node, block));
        Ok(())
    }

    /// Asks for good copies, and writes one that has come, when nothing else writes.
    pub(crate) fn repair(&mut self, node: usize) -> Outcome {
        self.lose(node, false);
        let now = self.instant();
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let due = live.tree.repairs.due(now);
        if live.tree.at.is_none() {
            return Ok(());
        }
        let leaf = |block: &u64| {
            let leaf = self.nodes[node].tree.leaf(*block)?;
            (leaf != DAMAGED).then_some((*block, leaf))
        };
        let asked: Vec<_> = due.iter().filter_map(leaf).collect();
        if !asked.is_empty() {
            self.ask_trees(node, &asked);
        }
        while let Some(live) = &mut self.nodes[node].live
            && live.tree.is_quiet()
            && live.tree.writing.is_none()
            && let Some((block, contents)) = live.tree.repairs.take_given()
        {
            self.write_repair(node, block, contents)?;
        }
        Ok(())
    }

    /// Asks the trees of all connected peers.
    fn ask_trees(&mut self, node: usize, asked: &[(u64, hn4_proof::hash::Digest)]) {
        let mut reached = false;
        for link in 0..self.links.len() {
            let side = self.links[link].side_of(node);
            if let Some(side) = side
                && self.links[link].sides[side].open.is_some()
            {
                reached = true;
                self.tree_sends(link, side, TreeMessage::Ask(asked.to_vec()));
            }
        }
        if !reached {
            self.tell_tree(node, ToTree::NoPeer);
        }
    }

    /// To the tree at the other end of a link.
    fn tree_sends(&mut self, link: usize, side: usize, message: TreeMessage) {
        if let Some(session) = self.links[link].sides[side].open {
            let after = self.net_time();
            let side = 1 - side;
            self.plan_in(
                after,
                What::TreeHears {
                    link,
                    session,
                    side,
                    message,
                },
            );
        }
    }

    /// A message of a peer's tree arrives.
    pub(crate) fn tree_hears(
        &mut self,
        link: usize,
        session: u64,
        side: usize,
        message: TreeMessage,
    ) {
        let end = &self.links[link];
        if end.sides[side].open == Some(session) && end.deaf_until[side] <= self.now {
            let node = end.nodes[side];
            self.tell_tree(node, ToTree::Peer(link, message));
        }
    }

    /// A peer asks for good copies of blocks, or gives some.
    pub(crate) fn peers_tree_said(&mut self, node: usize, link: usize, message: TreeMessage) {
        let is_open = |live: &crate::node::Live| live.tree.at.is_some();
        let (now, Some(side)) = (self.instant(), self.links[link].side_of(node)) else {
            return;
        };
        if !self.nodes[node].live.as_ref().is_some_and(is_open) {
            return;
        }
        match message {
            TreeMessage::Ask(asked) => {
                let given = exchange::answer(&asked, |block| Ok(self.backing_block(node, block)));
                self.tree_sends(link, side, given);
            }
            TreeMessage::Give(given) => {
                for (block, contents) in given {
                    let is_good =
                        self.nodes[node].tree.leaf(block) == Some(blocks::leaf(&contents));
                    if is_good && let Some(live) = &mut self.nodes[node].live {
                        live.tree.repairs.give(block, contents, now);
                    }
                }
            }
            _ => {}
        }
    }

    /// Writes a block where nothing else writes at the moment.
    fn write_repair(&mut self, node: usize, block: u64, contents: Box<Block>) -> Outcome {
        // A sweep may have ended since it came.
        if self.nodes[node].tree.leaf(block) != Some(blocks::leaf(&contents)) {
            return Ok(());
        }
        let after = self.disk_time(node, Disk::Backing);
        let id = self.nodes[node].next_repair();
        let disk = self.nodes[node].disk(Disk::Backing);
        let started = disk.start_write(id, index(block * BLOCK_BYTES), contents.to_vec());
        if let Err(why) = started {
            return broken("P2", format!("node {node}: a repair: {why}"));
        }
        let boot = self.nodes[node].boot;
        if let Some(live) = &mut self.nodes[node].live {
            live.tree.writing = Some(Writing {
                block,
                contents,
                id,
                flush: None,
            });
        }
        self.plan_in(after, What::TreeWrote { node, boot });
        Ok(())
    }

    /// A repair was written, or flushed.
    pub(crate) fn tree_wrote(&mut self, node: usize, boot: u64) {
        let same_life = self.nodes[node].boot == boot;
        let live = self.nodes[node].live.as_mut().filter(|_| same_life);
        let Some(mut writing) = live.and_then(|live| live.tree.writing.take()) else {
            return;
        };
        let Some(covers) = writing.flush else {
            let fate = self.fate(node, Disk::Backing, Kind::Write, Damages::Any);
            let failed = matches!(fate, Fate::Fails(_));
            self.nodes[node].land_repair(writing.id, fate, &mut self.rng);
            if failed {
                return self.not_repaired(node, writing.block);
            }
            let after = self.disk_time(node, Disk::Backing);
            writing.flush = Some(self.nodes[node].disk(Disk::Backing).start_flush());
            if let Some(live) = &mut self.nodes[node].live {
                live.tree.writing = Some(writing);
            }
            return self.plan_in(after, What::TreeWrote { node, boot });
        };
        if let Fate::Fails(errno) = self.fate(node, Disk::Backing, Kind::Flush, Damages::Any) {
            if let Some(live) = &mut self.nodes[node].live {
                live.tree.sweeping = true;
            }
            self.tree_answers(node, TreeEvent::FlushFailed(errno));
            return self.not_repaired(node, writing.block);
        }
        self.nodes[node].disk(Disk::Backing).finish_flush(covers);
        if self.backing_block(node, writing.block) != writing.contents {
            return self.not_repaired(node, writing.block);
        }
        self.stats.damage.repaired += 1;
        self.trace.note(self.now, Some(node), || {
            format!("   REPAIRED block {}", writing.block)
        });
        let now = self.now;
        // What was taken for good may have come back from a copy that has it, too.
        let wrong = !self.holds_truth(node, writing.block, &writing.contents[..]);
        let hurt = wrong && self.nodes[node].taken.is(writing.block);
        self.nodes[node].hurt.set(writing.block, hurt, now);
        self.is_good(node, writing.block);
        self.plan_turn(node);
    }

    /// The medium did not take or keep a repair.
    fn not_repaired(&mut self, node: usize, block: u64) {
        if let Some(live) = &mut self.nodes[node].live {
            live.tree.repairs.forget(block);
        }
        self.say_damage(node, block, Some(Damaged::Lost));
        self.plan_turn(node);
    }

    /// Blocks of a node for which no good copy is to be had, and since when it knows that: only
    /// writing them again helps.
    pub(crate) fn hopeless_blocks(&self, node: usize) -> Vec<u64> {
        let files = &self.nodes[node].tree;
        let mut copies: BTreeMap<u64, bool> = BTreeMap::new();
        for &block in &files.bad {
            // A copy that is not complete has no tree, and answers nobody.
            let answers = |other: &Node| {
                let live = other.live.as_ref();
                live.is_none_or(|live| live.volume.copy_status().copy == CopyState::Usable)
            };
            let others = self.nodes.iter().filter(|other| {
                let member = other.index != node && self.is_member(other.index);
                member && other.tree.at.is_some() && answers(other)
            });
            let leaf = files.leaf(block);
            let mut others = others.map(|other| self.backing_block(other.index, block));
            let known = leaf != Some(DAMAGED);
            let copy = known && others.any(|copy| Some(blocks::leaf(&copy)) == leaf);
            copies.insert(block, copy);
        }
        let hopeless = copies.into_iter().filter(|(_, copy)| !copy);
        hopeless.map(|(block, _)| block).collect()
    }
}
