//! New copies on backings that somebody brought, and the trees that are made of them.
//!
//! What is brought is the backing of some node as it is at the moment, also that of a primary in
//! the middle of a sweep, or what the node has had itself; and in a few blocks it is something
//! else.
//!
//! Checked at each comparison: the leaves are those of what lies there.

use hn4::types::BLOCK_BYTES;
use hn4_engine::core::event::{Disk, Tip, TreeEvent};

use crate::damage::blocks_in;
use crate::oracle::index;
use crate::trees::Files;
use crate::world::{MS, Outcome, World, broken};

/// Most runs of blocks that are something else.
const CHANGES: u64 = 6;

impl World {
    /// The node, which is down and about to be made anew, gets a backing.
    pub(crate) fn bring_backing(&mut self, node: usize) {
        let now = self.now;
        self.stats.brought += 1;
        let source = self.rng.index(self.nodes.len());
        let mut bytes = self.nodes[source].backing().to_vec();
        let (size, mut changed) = (bytes.len(), Vec::new());
        for _ in 0..self.rng.below(CHANGES) {
            let from = self.rng.index(size / 512) * 512;
            let to = (from + 512 * (1 + self.rng.index(64))).min(size);
            bytes[from..to].fill(self.rng.pick(&[0, 0x55]));
            changed.push(from..to);
        }
        // Damage that nobody knows of is brought, too.
        let blocks = 0..self.plan.blocks;
        let there = &self.nodes[source];
        let hurt = blocks.filter(|&block| there.was_hurt(block) || there.taken.is(block));
        let hurt: Vec<u64> = hurt.collect();
        let node = &mut self.nodes[node];
        node.spread.extend(hurt);
        // What is not the volume's is not damage of it, as in a backing that holds rubbish.
        for block in changed.iter().flat_map(blocks_in) {
            node.hurt.set(block, false, now);
        }
        node.disk(Disk::Backing).format(&bytes);
        node.tree = Files::default();
        node.taken.end_all(now);
    }

    /// Opens or begins a tree of what was brought.
    pub(crate) fn survey(&mut self, node: usize, at: Tip, anew: bool) -> Outcome {
        let (now, build_at) = (self.now, self.now + self.rng.below(200 * MS));
        let blocks = index(self.plan.blocks);
        let files = &self.nodes[node].tree;
        // As the real one: the number of the epoch is all that is compared.
        let known = files
            .at
            .filter(|known| known.epoch == at.epoch && files.are_of_survey);
        match known.filter(|_| !anew) {
            Some(known) if known != at => {
                let detail = format!("node {node} took a survey of {known:?} for one of {at:?}");
                return broken("P4", detail);
            }
            Some(_) => {}
            None => {
                self.remove_files(node);
                let files = &mut self.nodes[node].tree;
                files.leaves = vec![None; blocks];
                (files.at, files.are_of_survey) = (Some(at), true);
            }
        }
        let whole = self.nodes[node].tree.is_whole();
        if let Some(live) = &mut self.nodes[node].live {
            let tree = &mut live.tree;
            (tree.at, tree.settled, tree.surveys) = (Some(at), at.epoch, true);
            (tree.build_at, tree.verify) = (build_at, None);
            tree.whole_since = whole.then_some(now);
        }
        if whole {
            self.tree_answers(node, TreeEvent::Surveyed(true));
        }
        Ok(())
    }

    /// Whether a survey says what lies there.
    pub(crate) fn check_survey(&self, node: usize) -> Outcome {
        let files = &self.nodes[node].tree;
        if !files.are_of_survey {
            return Ok(());
        }
        for block in 0..self.plan.blocks {
            let found = hn4_proof::blocks::leaf(&self.backing_block(node, block));
            if files.leaf(block) != Some(found) && !self.nodes[node].was_hurt(block) {
                let at = block * BLOCK_BYTES;
                let detail = format!("node {node}: its survey is not of what lies at byte {at}");
                return broken("P2", detail);
            }
        }
        Ok(())
    }
}
