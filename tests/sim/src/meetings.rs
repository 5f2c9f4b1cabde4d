//! Two trees are compared before a full copy, as in `src/daemon/tree/resync.rs`.
//!
//! When a primary's core asks for a comparison with a peer, the primary's tree is taken first and
//! the peer's later, with sweeps in between, and the answer comes later still, or says that nothing
//! is known. What the peer knows to be damaged differs, whatever its leaves say.

use hn4::types::BLOCK_BYTES;
use hn4_engine::core::event::{Differences, PeerId, Tip, TreeEvent};
use hn4_proof::hash::Digest;

use crate::oracle::index;
use crate::trees::Files;
use crate::world::{MS, Outcome, What, World};

/// Blocks that are compared as one.
const GROUP_BLOCKS: u64 = 16;

/// Two trees are to be compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meeting {
    node: usize,
    boot: u64,
    link: usize,
    session: u64,
    side: usize,
    /// The core's name for it.
    id: u64,
}

/// A primary's tree as it was at a checkpoint.
#[derive(Debug)]
pub(crate) struct Taken {
    at: Tip,
    leaves: Vec<Option<Digest>>,
}

impl World {
    pub(crate) fn trees_are_to_meet(&mut self, node: usize, peer: PeerId, id: u64) {
        let found = self.link_of(node, peer);
        let open = found.and_then(|(link, side)| {
            let session = self.links[link].sides[side].open?;
            let boot = self.nodes[node].boot;
            Some(Meeting {
                node,
                boot,
                link,
                session,
                side,
                id,
            })
        });
        match open {
            // What is still being computed comes before.
            Some(meeting) => {
                let after = self.rng.below(20 * MS);
                self.plan_in(after, What::TreeTaken(meeting));
            }
            None => self.tree_answers(node, TreeEvent::Compared { id, found: None }),
        }
    }

    /// The primary's tree is taken.
    pub(crate) fn tree_taken(&mut self, meeting: Meeting) {
        let Meeting { node, boot, id, .. } = meeting;
        let live = self.nodes[node].live.as_ref();
        let Some(live) = live.filter(|_| self.nodes[node].boot == boot) else {
            return;
        };
        let fit = live.tree.is_exact() && live.tree.whole_since.is_some();
        let files = &self.nodes[node].tree;
        match files.at.filter(|_| fit && !self.rng.one_in(8)) {
            Some(at) => {
                let leaves = files.leaves.clone();
                let after = 2 * self.net_time() + self.rng.below(50 * MS);
                self.plan_in(
                    after,
                    What::TreesMeet(meeting, Box::new(Taken { at, leaves })),
                );
            }
            None => self.tree_answers(node, TreeEvent::Compared { id, found: None }),
        }
    }

    /// The peer's tree is compared with what was taken.
    pub(crate) fn trees_meet(&mut self, meeting: Meeting, taken: &Taken) -> Outcome {
        let Meeting {
            node,
            boot,
            link,
            session,
            side,
            id,
        } = meeting;
        if self.nodes[node].live.is_none() || self.nodes[node].boot != boot {
            return Ok(());
        }
        let other = self.links[link].nodes[1 - side];
        let reached = self.links[link].sides[1 - side].open == Some(session);
        let live = self.nodes[other].live.as_ref();
        let stands = live
            .is_some_and(|live| reached && live.tree.is_quiet() && live.tree.whole_since.is_some());
        if stands {
            self.check_survey(other)?;
        }
        let found = stands.then(|| Differences {
            at: taken.at,
            ranges: differences(&taken.leaves, &self.nodes[other].tree, self.plan.blocks),
        });
        self.stats.comparisons += u64::from(found.is_some());
        let after = self.net_time();
        let event = TreeEvent::Compared { id, found };
        self.plan_in(after, What::Tree { node, boot, event });
        Ok(())
    }
}

/// Byte ranges of the groups that differ.
fn differences(ours: &[Option<Digest>], theirs: &Files, blocks: u64) -> Vec<std::ops::Range<u64>> {
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    for first in (0..blocks).step_by(index(GROUP_BLOCKS)) {
        let end = (first + GROUP_BLOCKS).min(blocks);
        let group = index(first)..index(end);
        let damaged = theirs.bad.range(first..end).next().is_some();
        if ours[group.clone()] == theirs.leaves[group] && !damaged {
            continue;
        }
        let (start, end) = (first * BLOCK_BYTES, end * BLOCK_BYTES);
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}
