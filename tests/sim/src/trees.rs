//! The state trees of the nodes: the daemon's tree thread, with leaves in memory.
//!
//! What a core says to its tree waits in one queue and is taken in turns, a little later; what the
//! tree says comes later still, in its order. A tree hashes what a sweep is about to write, and has
//! these leaves on its medium before the sweep begins; it is opened again after a crash, built anew
//! where there is none, and left alone while a sweep is under way, as the real one.
//!
//! | module | what |
//! |---|---|
//! | `trees` | the queue, opening, building, discarding |
//! | `gather` | sweeps become leaves |
//! | `mend` | reads are compared, deep verifies, repairs |
//! | `trucks` | trees of what somebody brought |
//! | `meetings` | two trees are compared before a full copy |
//!
//! The list of blocks for which copies are sought is the daemon's own
//! (`src/daemon/tree/repair.rs`). Not here: the files of a tree, its nodes above leaves, and how it
//! is given up.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use hn4::types::{BlockIndex, Epoch};
use hn4_engine::arena::SlotMemory;
use hn4_engine::core::event::{Disk, Tip, TreeEvent, TreeWork};
use hn4_engine::core::{Actions, Event};
use hn4_proof::blocks::{BLOCK, Block};
use hn4_proof::hash::Digest;
use hn4_proof::tree::exchange::TreeMessage;

use crate::gather::Gathering;
use crate::mend::{Suspect, Verify, Writing};
use crate::oracle::{Tag, apply, index, is};
use crate::repair::Repairs;
use crate::world::{MS, Outcome, What, World, broken};

/// Blocks that are hashed or verified in a turn.
pub(crate) const SLICE_BLOCKS: usize = 64;
/// Messages that are taken in a turn, at most.
const MESSAGES: u64 = 3;

/// What a tree has on its medium. A crash leaves it there.
#[derive(Debug, Default)]
pub(crate) struct Files {
    /// The place of which the leaves are; none: there are no files.
    pub(crate) at: Option<Tip>,
    /// Leaves by block; none: not hashed yet.
    pub(crate) leaves: Vec<Option<Digest>>,
    /// The end of a sweep that may have begun, and the leaves of what it writes.
    pub(crate) sweep: Option<Swept>,
    /// Blocks that were found to be damaged, and are not known to be good again.
    pub(crate) bad: BTreeSet<u64>,
    /// They are of what somebody brought.
    pub(crate) are_of_survey: bool,
}

/// What a sweep changes.
#[derive(Debug)]
pub(crate) struct Swept {
    pub(crate) at: Tip,
    /// The new leaves, and whether they are of contents that nobody wrote.
    pub(crate) leaves: BTreeMap<u64, (Digest, bool)>,
}

impl Files {
    /// Whether all blocks have leaves.
    pub(crate) fn is_whole(&self) -> bool {
        self.at.is_some() && self.leaves.iter().all(Option::is_some)
    }

    /// The leaf of a block, if it has one.
    pub(crate) fn leaf(&self, block: u64) -> Option<Digest> {
        self.leaves.get(index(block)).copied().flatten()
    }
}

/// A message to a tree.
#[derive(Debug)]
pub(crate) enum ToTree {
    /// From the core.
    Work(TreeWork),
    /// Parts of a sweep: their places and lengths, and their contents.
    Blocks {
        parts: Vec<(u64, u16)>,
        bytes: Vec<u8>,
        last: bool,
    },
    /// Blocks to be compared, with what was read of each.
    Check {
        read: Option<u32>,
        blocks: Vec<u64>,
        bytes: Vec<u8>,
    },
    /// From the tree of the peer on this link.
    Peer(usize, TreeMessage),
    /// There was no peer that could have been asked.
    NoPeer,
}

/// A node's tree while the node is alive.
#[derive(Debug)]
pub(crate) struct Tree {
    /// The checkpoint that it describes; none while there is no tree.
    pub(crate) at: Option<Tip>,
    /// A sweep that a crash has torn may have begun to write epochs up to this one.
    pub(crate) settled: Epoch,
    /// It is one of what somebody brought, and of no state of the volume.
    pub(crate) surveys: bool,
    /// What the volume is at `at`, as the oracle knows it.
    pub(crate) truth: Vec<Tag>,
    /// A sweep of which not all is known yet.
    pub(crate) gathering: Option<Gathering>,
    /// What the volume will be when the sweep that may be writing has ended.
    pub(crate) next_truth: Option<Vec<Tag>>,
    /// A sweep may be writing.
    pub(crate) sweeping: bool,
    /// The volume has failed closed.
    pub(crate) halted: bool,
    /// Since when all blocks have leaves.
    pub(crate) whole_since: Option<u64>,
    pub(crate) suspects: VecDeque<Suspect>,
    pub(crate) verify: Option<Verify>,
    /// When the next deep verify begins.
    pub(crate) verify_at: u64,
    /// When the last one that has ended began.
    pub(crate) verified: Option<u64>,
    pub(crate) repairs: Repairs,
    /// A repair that is on its way to the backing: the thread does nothing else meanwhile.
    pub(crate) writing: Option<Writing>,
    /// When the first build goes on.
    pub(crate) build_at: u64,
    queue: VecDeque<ToTree>,
    turn_at: Option<u64>,
    /// When the last word arrives at the core.
    says_at: u64,
    /// What the core was told, and has heard, to be damaged.
    pub(crate) known: BTreeSet<u64>,
}

impl Tree {
    pub(crate) fn new(zero: Instant) -> Self {
        Self {
            at: None,
            settled: Epoch(0),
            surveys: false,
            truth: Vec::new(),
            gathering: None,
            next_truth: None,
            sweeping: false,
            halted: false,
            whole_since: None,
            suspects: VecDeque::new(),
            verify: None,
            verify_at: 0,
            verified: None,
            repairs: Repairs::new(zero),
            writing: None,
            build_at: 0,
            queue: VecDeque::new(),
            turn_at: None,
            says_at: 0,
            known: BTreeSet::new(),
        }
    }

    /// Whether the backing is the state at the checkpoint, apart from a sweep that may be writing.
    pub(crate) fn is_exact(&self) -> bool {
        self.at.is_some_and(|at| at.epoch >= self.settled)
    }

    /// Whether the backing is the state at the checkpoint, and stays so for this turn.
    pub(crate) fn is_quiet(&self) -> bool {
        self.is_exact() && !self.sweeping && self.gathering.is_none()
    }

    /// Whether it has nothing left to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.writing.is_none() && self.suspects.is_empty()
    }
}

/// Whether a block holds these tags.
pub(crate) fn holds(truth: &[Tag], block: u64, bytes: &[u8]) -> bool {
    let first = block * 8;
    let tags = &truth[index(first)..index(first + 8)];
    let mut sectors = (first..).zip(tags).zip(bytes.chunks_exact(512));
    sectors.all(|((sector, &tag), bytes)| is(tag, sector, bytes))
}

impl World {
    /// The time of this world as the daemon's code sees it.
    pub(crate) fn instant(&self) -> Instant {
        self.zero + Duration::from_nanos(self.now)
    }

    /// Tells the tree what a core says to it.
    pub(crate) fn carry_out_tree(&mut self, node: usize, work: &TreeWork, actions: &Actions) {
        if let TreeWork::Compare { peer, id } = *work {
            return self.trees_are_to_meet(node, peer, id);
        }
        let Some(live) = &self.nodes[node].live else {
            return;
        };
        let contents = |segs: &std::ops::Range<usize>| {
            let mut bytes = Vec::new();
            for seg in &actions.segs[segs.clone()] {
                let from = usize::from(seg.offset);
                let part = from..from + usize::from(seg.bytes);
                bytes.extend_from_slice(&live.mem.bytes(seg.slot)[part]);
            }
            bytes
        };
        let message = match work {
            TreeWork::Blocks {
                offsets,
                segs,
                last,
            } => {
                let lengths = actions.segs[segs.clone()].iter().map(|seg| seg.bytes);
                ToTree::Blocks {
                    parts: offsets.iter().copied().zip(lengths).collect(),
                    bytes: contents(segs),
                    last: *last,
                }
            }
            TreeWork::Check { read, blocks, segs } => ToTree::Check {
                read: *read,
                blocks: blocks.iter().map(|block| block.0).collect(),
                bytes: contents(segs),
            },
            work => ToTree::Work(work.clone()),
        };
        self.tell_tree(node, message);
    }

    /// Puts a message behind those that wait.
    pub(crate) fn tell_tree(&mut self, node: usize, message: ToTree) {
        if let Some(live) = &mut self.nodes[node].live {
            live.tree.queue.push_back(message);
            self.tree_soon(node);
        }
    }

    /// The tree has a turn soon; sometimes it is late.
    fn tree_soon(&mut self, node: usize) {
        let usual = self.plan.disk_us * 100 + 1;
        let longest = if self.rng.one_in(16) { 40 } else { 1 } * usual;
        let after = self.rng.below(longest);
        self.tree_wakes(node, self.now + after);
    }

    /// The tree has a turn at this time at the latest.
    pub(crate) fn tree_wakes(&mut self, node: usize, at: u64) {
        let boot = self.nodes[node].boot;
        let Some(live) = &mut self.nodes[node].live else {
            return;
        };
        let at = at.max(self.now);
        if live.tree.turn_at.is_none_or(|planned| planned > at) {
            live.tree.turn_at = Some(at);
            self.plan_at(at, What::TreeTurn { node, boot });
        }
    }

    /// Tells the core, behind what it was told before.
    pub(crate) fn tree_answers(&mut self, node: usize, event: TreeEvent) {
        let boot = self.nodes[node].boot;
        let at = self.now + self.disk_time(node, Disk::Log);
        if let Some(live) = &mut self.nodes[node].live {
            let at = at.max(live.tree.says_at);
            live.tree.says_at = at;
            self.plan_at(at, What::Tree { node, boot, event });
        }
    }

    /// A tree has something for its core.
    pub(crate) fn tree_says(&mut self, node: usize, boot: u64, event: TreeEvent) {
        if self.nodes[node].boot == boot {
            self.post(node, Event::Tree(event));
        }
    }

    /// The tree takes some messages, and does some of what is due.
    pub(crate) fn tree_turn(&mut self, node: usize, boot: u64) -> Outcome {
        let now = self.now;
        let same_life = self.nodes[node].boot == boot;
        let Some(live) = self.nodes[node].live.as_mut().filter(|_| same_life) else {
            return Ok(());
        };
        if live.tree.turn_at != Some(now) {
            return Ok(());
        }
        live.tree.turn_at = None;
        if live.tree.writing.is_some() {
            return Ok(());
        }
        let count = self.rng.between(1, MESSAGES);
        for _ in 0..count {
            let live = self.nodes[node].live.as_mut();
            let Some(message) = live.and_then(|live| live.tree.queue.pop_front()) else {
                break;
            };
            self.tree_takes(node, message)?;
        }
        self.look_again(node)?;
        self.build_slice(node)?;
        self.verify_slice(node)?;
        self.repair(node)?;
        self.plan_turn(node);
        Ok(())
    }

    /// When the tree has something to do next.
    pub(crate) fn plan_turn(&mut self, node: usize) {
        let zero = self.zero;
        let Some(live) = &self.nodes[node].live else {
            return;
        };
        let tree = &live.tree;
        if !tree.queue.is_empty() || (tree.is_quiet() && !tree.suspects.is_empty()) {
            return self.tree_soon(node);
        }
        let whole = tree.whole_since.is_some();
        let build = (tree.is_quiet() && !whole).then_some(tree.build_at);
        let verify = (whole && !tree.surveys && (tree.is_quiet() || tree.verify.is_none()))
            .then_some(tree.verify_at)
            .filter(|&at| at > self.now || tree.is_quiet());
        let due = tree.repairs.deadline();
        let due = due.map(|at| {
            let after = at.saturating_duration_since(zero).as_nanos();
            u64::try_from(after).unwrap_or(u64::MAX)
        });
        if let Some(at) = [build, verify, due].into_iter().flatten().min() {
            self.tree_wakes(node, at.max(self.now + 1));
        }
    }

    fn tree_takes(&mut self, node: usize, message: ToTree) -> Outcome {
        match message {
            ToTree::Blocks { parts, bytes, last } => self.take_blocks(node, &parts, &bytes, last),
            ToTree::Check {
                read,
                blocks,
                bytes,
            } => {
                self.check_blocks(node, read, &blocks, &bytes);
                Ok(())
            }
            ToTree::Peer(link, message) => {
                self.peers_tree_said(node, link, message);
                Ok(())
            }
            ToTree::NoPeer => {
                self.lose(node, true);
                Ok(())
            }
            ToTree::Work(TreeWork::Start { at, settled, anew }) => {
                self.open_tree(node, at, settled, anew)
            }
            ToTree::Work(TreeWork::Survey { at, anew }) => self.survey(node, at, anew),
            ToTree::Work(TreeWork::Begin { cut, zeros }) => self.begin_to_gather(node, cut, &zeros),
            ToTree::Work(TreeWork::Done { at, marked }) => self.sweep_is_done(node, at, marked),
            ToTree::Work(TreeWork::Discard) => {
                self.discard_tree(node);
                Ok(())
            }
            ToTree::Work(TreeWork::Halt) => {
                if let Some(live) = &mut self.nodes[node].live {
                    (live.tree.sweeping, live.tree.halted) = (true, true);
                }
                self.turn_away(node);
                Ok(())
            }
            ToTree::Work(
                TreeWork::Compare { .. } | TreeWork::Blocks { .. } | TreeWork::Check { .. },
            ) => Ok(()),
        }
    }

    /// Opens what there is on the medium, if it is of this checkpoint.
    fn open_tree(&mut self, node: usize, at: Tip, settled: Epoch, anew: bool) -> Outcome {
        let Some(truth) = self.oracle.contents(at) else {
            return broken("P2", format!("node {node}: no history leads to {at:?}"));
        };
        let blocks = index(self.plan.blocks);
        let (now, build_at) = (self.now, self.now + self.rng.below(200 * MS));
        let verify_at = self.next_verify();
        if anew || self.nodes[node].tree.are_of_survey {
            self.remove_files(node);
        }
        let swept = self.nodes[node].tree.sweep.take();
        if let Some(swept) = swept.filter(|swept| swept.at.epoch == at.epoch) {
            self.take_leaves(node, swept);
        }
        let superblock_lost = self.nodes[node].superblock_lost;
        let files = &mut self.nodes[node].tree;
        // A superblock was lost, and with it how far the sweeps went on: that of a later
        // checkpoint, or the one before a sweep.
        let is_later = files.at.is_some_and(|known| known.epoch > at.epoch);
        let is_set_back = is_later || superblock_lost;
        // As the real one: the number of the epoch is all that is compared.
        match files.at.filter(|known| known.epoch == at.epoch) {
            Some(known) if known != at => {
                return broken(
                    "P4",
                    format!("node {node} took a tree of {known:?} for one of {at:?}"),
                );
            }
            Some(_) => {}
            None => {
                self.remove_files(node);
                let files = &mut self.nodes[node].tree;
                files.leaves = vec![None; blocks];
                files.at = Some(at);
            }
        }
        let whole = self.nodes[node].tree.is_whole();
        if let Some(live) = &mut self.nodes[node].live {
            let last = if is_set_back { live.tip.epoch } else { settled };
            let tree = &mut live.tree;
            (tree.at, tree.settled, tree.truth) = (Some(at), settled.max(last), truth);
            tree.surveys = false;
            (tree.build_at, tree.verify_at, tree.verify) = (build_at, verify_at, None);
            tree.whole_since = whole.then_some(now);
        }
        let bad: Vec<u64> = self.nodes[node].tree.bad.iter().copied().collect();
        bad.into_iter().for_each(|block| self.seek(node, block));
        Ok(())
    }

    /// Nothing is left of the files.
    pub(crate) fn remove_files(&mut self, node: usize) {
        let now = self.now;
        let node = &mut self.nodes[node];
        node.tree = Files::default();
        node.taken.end_all(now);
    }

    fn discard_tree(&mut self, node: usize) {
        self.turn_away(node);
        self.remove_files(node);
        if let Some(live) = &mut self.nodes[node].live {
            let tree = &mut live.tree;
            (tree.at, tree.gathering, tree.next_truth) = (None, None, None);
            (tree.sweeping, tree.whole_since, tree.verify) = (false, None, None);
            tree.surveys = false;
            let _ = tree.repairs.forget_all();
        }
        self.tree_answers(node, TreeEvent::Discarded);
    }

    /// Hashes some of a backing that has no leaves yet, while nothing writes to it.
    fn build_slice(&mut self, node: usize) -> Outcome {
        let (now, again) = (self.now, self.rng.below(20 * MS));
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let tree = &mut live.tree;
        if tree.whole_since.is_some() || !tree.is_quiet() || tree.build_at > now {
            return Ok(());
        }
        tree.build_at = now + again + 1;
        let surveys = tree.surveys;
        let leaves = self.nodes[node].tree.leaves.iter().enumerate();
        let open = leaves.filter(|(_, leaf)| leaf.is_none());
        let open: Vec<u64> = open.map(|(block, _)| block as u64).collect();
        for &block in open.iter().take(SLICE_BLOCKS) {
            let contents = self.backing_block(node, block);
            let wrong = !surveys && !self.holds_truth(node, block, &contents[..]);
            let was_hurt = self.nodes[node].was_hurt(block);
            if wrong && !was_hurt {
                let detail = format!("node {node}: block {block} is wrong when a tree is built");
                return broken("P3", detail);
            }
            let node = &mut self.nodes[node];
            node.tree.leaves[index(block)] = Some(hn4_proof::blocks::leaf(&contents));
            // The medium is taken as it is.
            node.taken.set(block, wrong, now);
        }
        if open.len() <= SLICE_BLOCKS {
            if let Some(live) = &mut self.nodes[node].live {
                live.tree.whole_since = Some(now);
            }
            if surveys {
                self.tree_answers(node, TreeEvent::Surveyed(true));
            }
        }
        Ok(())
    }

    /// What the backing holds of a block.
    pub(crate) fn backing_block(&self, node: usize, block: u64) -> Box<Block> {
        let mut contents = Box::new([0; BLOCK]);
        let from = index(block) * BLOCK;
        contents.copy_from_slice(&self.nodes[node].backing()[from..from + BLOCK]);
        contents
    }

    /// Whether these are the contents of a block at the tree's checkpoint.
    pub(crate) fn holds_truth(&self, node: usize, block: u64, contents: &[u8]) -> bool {
        let live = self.nodes[node].live.as_ref();
        live.is_some_and(|live| holds(&live.tree.truth, block, contents))
    }

    /// What the volume is after these epochs, from what it was before.
    pub(crate) fn truth_at(&self, node: usize, at: Tip) -> Option<Vec<Tag>> {
        let tree = &self.nodes[node].live.as_ref()?.tree;
        let mut truth = tree.truth.clone();
        for change in self.oracle.changes(tree.at?, at)? {
            apply(&mut truth, change);
        }
        Some(truth)
    }

    /// Just before a core hears of its tree.
    pub(crate) fn note_tree_event(&mut self, node: usize, event: &TreeEvent) {
        let Some(live) = &mut self.nodes[node].live else {
            return;
        };
        let known = &mut live.tree.known;
        match *event {
            TreeEvent::Damage(BlockIndex(block), Some(_)) => _ = known.insert(block),
            TreeEvent::Damage(BlockIndex(block), None) => _ = known.remove(&block),
            TreeEvent::Discarded => known.clear(),
            _ => {}
        }
    }
}
