//! What a sweep is about to write becomes leaves before it writes, as in
//! `src/daemon/tree/sweep.rs`.
//!
//! Checked: each leaf is of what the oracle says of the block at the end of the sweep, unless all
//! that nobody could know is excused: the first leaves of a medium that was damaged before, and
//! blocks written in part before a sweep that a crash has torn was written again.

use std::collections::BTreeMap;
use std::ops::Range;

use hn4::types::{BLOCK_BYTES, Epoch};
use hn4_engine::core::event::{Tip, TreeEvent};
use hn4_proof::blocks::{self, BLOCK, Block};
use hn4_proof::hash::Digest;
use hn4_proof::tree::DAMAGED;

use crate::oracle::{Tag, index};
use crate::stats::Found;
use crate::trees::{Swept, holds};
use crate::world::{Outcome, World, broken};

/// What a sweep will write, as far as it is known.
#[derive(Debug)]
pub(crate) struct Gathering {
    at: Tip,
    /// Blocks.
    zeros: Vec<Range<u64>>,
    /// Leaves, and whether they are of contents that nobody wrote.
    leaves: BTreeMap<u64, (Digest, bool)>,
    /// What the volume will be.
    truth: Vec<Tag>,
}

/// What is known of a block that is written in part.
struct Base {
    contents: Box<Block>,
    is_lost: bool,
}

impl World {
    /// A sweep is planned.
    pub(crate) fn begin_to_gather(
        &mut self,
        node: usize,
        cut: Epoch,
        zeros: &[(u64, u64)],
    ) -> Outcome {
        let live = self.nodes[node].live.as_ref();
        let at = live.and_then(|live| self.oracle.ancestor(live.tip, cut));
        let found = at.and_then(|at| Some((at, self.truth_at(node, at)?)));
        let Some((at, truth)) = found else {
            return broken(
                "P2",
                format!("node {node} sweeps to {cut}, where it was never"),
            );
        };
        let block = |bytes: u64| bytes / BLOCK_BYTES;
        let zeros = zeros.iter();
        let zeros = zeros.map(|&(at, bytes)| block(at)..block(at + bytes));
        let gathering = Gathering {
            at,
            zeros: zeros.collect(),
            leaves: BTreeMap::new(),
            truth,
        };
        if let Some(live) = &mut self.nodes[node].live {
            live.tree.gathering = Some(gathering);
        }
        Ok(())
    }

    /// A portion of a sweep has come.
    pub(crate) fn take_blocks(
        &mut self,
        node: usize,
        parts: &[(u64, u16)],
        bytes: &[u8],
        last: bool,
    ) -> Outcome {
        let live = self.nodes[node].live.as_mut();
        let Some(mut gathering) = live.and_then(|live| live.tree.gathering.take()) else {
            return Ok(());
        };
        let mut partial: BTreeMap<u64, Base> = BTreeMap::new();
        let mut rest = bytes;
        for &(offset, length) in parts {
            let (part, later) = rest.split_at(usize::from(length));
            rest = later;
            let block = offset / BLOCK_BYTES;
            if let Ok(contents) = <&Block>::try_from(part) {
                self.gather(node, &mut gathering, block, contents)?;
                continue;
            }
            let base = match partial.remove(&block) {
                Some(base) => base,
                None => self.base(node, &gathering, block),
            };
            let base = partial.entry(block).or_insert(base);
            let at = index(offset % BLOCK_BYTES);
            base.contents[at..at + part.len()].copy_from_slice(part);
        }
        let mut bad = Vec::new();
        for (block, base) in partial {
            if base.is_lost {
                bad.push(block);
                gathering.leaves.insert(block, (DAMAGED, false));
            } else {
                self.gather(node, &mut gathering, block, &base.contents)?;
            }
        }
        self.damaged(node, &bad, Found::Sweep)?;
        if last {
            return self.sweep_is_known(node, gathering);
        }
        if let Some(live) = &mut self.nodes[node].live {
            live.tree.gathering = Some(gathering);
        }
        self.tree_answers(node, TreeEvent::Took);
        Ok(())
    }

    /// What a block holds of which only some sectors are written.
    fn base(&self, node: usize, gathering: &Gathering, block: u64) -> Base {
        if gathering.zeros.iter().any(|range| range.contains(&block)) {
            let (contents, is_lost) = (Box::new([0; BLOCK]), false);
            return Base { contents, is_lost };
        }
        let contents = self.backing_block(node, block);
        let files = &self.nodes[node].tree;
        let is_same = files.leaf(block) == Some(blocks::leaf(&contents));
        let checked = self.is_watched(node);
        let is_lost = !is_same && (checked || files.bad.contains(&block));
        Base { contents, is_lost }
    }

    /// Whether each block that differs from its leaf would be damage.
    fn is_watched(&self, node: usize) -> bool {
        let live = self.nodes[node].live.as_ref();
        live.is_some_and(|live| live.tree.is_exact() && live.tree.whole_since.is_some())
    }

    /// Takes all that a block will be.
    fn gather(
        &self,
        node: usize,
        gathering: &mut Gathering,
        block: u64,
        contents: &Block,
    ) -> Outcome {
        let wrong = !holds(&gathering.truth, block, contents);
        if wrong && self.is_watched(node) && !self.nodes[node].taken.is(block) {
            return broken(
                "P4",
                format!("node {node}: the leaf of block {block} is of what nobody wrote"),
            );
        }
        let leaf = blocks::leaf(contents);
        gathering.leaves.insert(block, (leaf, wrong));
        Ok(())
    }

    /// All that the sweep writes is known: its leaves are on the medium from now on.
    fn sweep_is_known(&mut self, node: usize, gathering: Gathering) -> Outcome {
        let Gathering {
            at,
            zeros,
            mut leaves,
            truth,
        } = gathering;
        for block in zeros.into_iter().flatten() {
            if leaves.contains_key(&block) {
                continue;
            }
            if !holds(&truth, block, &[0; BLOCK]) {
                let detail = format!("node {node}: a sweep zeroes block {block}, as nobody did");
                return broken("P4", detail);
            }
            leaves.insert(block, (blocks::zero_leaf(), false));
        }
        let good = leaves.iter().filter(|(_, (leaf, _))| *leaf != DAMAGED);
        let good: Vec<u64> = good.map(|(block, _)| *block).collect();
        self.nodes[node].tree.sweep = Some(Swept { at, leaves });
        for block in good {
            if self.is_good(node, block) {
                self.stats.damage.overwritten += 1;
            }
        }
        if let Some(live) = &mut self.nodes[node].live {
            live.tree.sweeping = true;
            live.tree.next_truth = Some(truth);
        }
        self.tree_answers(node, TreeEvent::Ready(at.epoch));
        Ok(())
    }

    /// The superblock says that the sweep is done.
    pub(crate) fn sweep_is_done(&mut self, node: usize, at: Tip, marked: bool) -> Outcome {
        let (now, Some(swept)) = (self.now, self.nodes[node].tree.sweep.take()) else {
            return broken(
                "P4",
                format!("node {node}: an unknown sweep to {at:?} is done"),
            );
        };
        if swept.at != at {
            let detail = format!("node {node}: a sweep to {:?} is done at {at:?}", swept.at);
            return broken("P4", detail);
        }
        let written: Vec<u64> = swept.leaves.keys().copied().collect();
        self.take_leaves(node, swept);
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let tree = &mut live.tree;
        (tree.at, tree.sweeping) = (Some(at), tree.halted);
        tree.truth = tree.next_truth.take().unwrap_or_default();
        let exact = tree.is_exact();
        let built = tree.whole_since.is_none() && self.nodes[node].tree.is_whole();
        if built && let Some(live) = &mut self.nodes[node].live {
            live.tree.whole_since = Some(now);
        }
        for block in written {
            let good = self.holds_truth(node, block, &self.backing_block(node, block)[..]);
            if good {
                self.nodes[node].hurt.set(block, false, now);
            } else if exact && !self.nodes[node].was_hurt(block) {
                let detail = format!("node {node}: block {block} is wrong after a sweep to {at:?}");
                return broken("P3", detail);
            }
        }
        if marked {
            self.tree_answers(node, TreeEvent::Rooted);
        }
        Ok(())
    }

    /// A sweep's leaves are the tree's.
    pub(crate) fn take_leaves(&mut self, node: usize, swept: Swept) {
        let now = self.now;
        let node = &mut self.nodes[node];
        node.tree.at = Some(swept.at);
        for (block, (leaf, wrong)) in swept.leaves {
            if let Some(place) = node.tree.leaves.get_mut(index(block)) {
                *place = Some(leaf);
                node.taken.set(block, wrong, now);
            }
        }
    }
}
