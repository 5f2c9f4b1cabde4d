//! The state trees of the nodes, modelled: a tree knows what the volume is at its checkpoint, for
//! the oracle knows that, and answers its core after a while.
//!
//! When a primary's core asks for a comparison with a peer, the primary's tree is taken first and
//! the peer's later, with sweeps in between, and the answer comes later still, or says that nothing
//! is known.

use hn4::types::{BLOCK_BYTES, Epoch, SECTORS_PER_BLOCK};
use hn4_engine::core::Event;
use hn4_engine::core::event::{Differences, Disk, PeerId, Tip, TreeEvent, TreeWork};

use crate::oracle::index;
use crate::world::{MS, What, World};

/// Blocks that are compared as one.
const GROUP_BLOCKS: u64 = 16;

/// A node's tree while the node is alive.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tree {
    /// The checkpoint that it describes; none while there is no tree.
    at: Option<Tip>,
    /// A sweep that a crash has torn may have begun to write epochs up to this one.
    settled: Epoch,
    /// The end of a sweep that may be writing.
    cut: Option<Epoch>,
}

impl Tree {
    /// Whether the backing is what the tree says.
    fn is_exact(&self) -> bool {
        self.cut.is_none() && self.at.is_some_and(|at| at.epoch >= self.settled)
    }
}

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

impl World {
    /// Carries out what a core says to its tree.
    pub(crate) fn carry_out_tree(&mut self, node: usize, work: &TreeWork) {
        let Some(live) = &mut self.nodes[node].live else {
            return;
        };
        match *work {
            TreeWork::Start { at, settled, .. } => {
                let at = Some(at);
                live.tree = Tree {
                    at,
                    settled,
                    cut: None,
                };
            }
            TreeWork::Begin { cut, .. } => live.tree.cut = Some(cut),
            TreeWork::Blocks { last, .. } => {
                let answer = match live.tree.cut.filter(|_| last) {
                    Some(cut) => TreeEvent::Ready(cut),
                    None => TreeEvent::Took,
                };
                self.tree_answers(node, answer);
            }
            TreeWork::Done { at, marked } => {
                (live.tree.at, live.tree.cut) = (Some(at), None);
                if marked {
                    self.tree_answers(node, TreeEvent::Rooted);
                }
            }
            TreeWork::Discard => {
                live.tree = Tree::default();
                self.tree_answers(node, TreeEvent::Discarded);
            }
            TreeWork::Compare { peer, id } => self.trees_are_to_meet(node, peer, id),
            // No read is compared here.
            TreeWork::Check { .. } | TreeWork::Halt => {}
        }
    }

    fn tree_answers(&mut self, node: usize, event: TreeEvent) {
        let boot = self.nodes[node].boot;
        let after = self.disk_time(node, Disk::Log);
        self.plan_in(after, What::Tree { node, boot, event });
    }

    fn trees_are_to_meet(&mut self, node: usize, peer: PeerId, id: u64) {
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
        match live.tree.at.filter(|_| !self.rng.one_in(8)) {
            Some(at) => {
                let after = 2 * self.net_time() + self.rng.below(50 * MS);
                self.plan_in(after, What::TreesMeet(meeting, at));
            }
            None => self.tree_answers(node, TreeEvent::Compared { id, found: None }),
        }
    }

    /// The peer's tree is compared with what was taken.
    pub(crate) fn trees_meet(&mut self, meeting: Meeting, at: Tip) {
        let Meeting {
            node,
            boot,
            link,
            session,
            side,
            id,
        } = meeting;
        if self.nodes[node].live.is_none() || self.nodes[node].boot != boot {
            return;
        }
        let other = self.links[link].nodes[1 - side];
        let reached = self.links[link].sides[1 - side].open == Some(session);
        let theirs = self.nodes[other].live.as_ref().map(|live| live.tree);
        let theirs = theirs.filter(|tree| reached && tree.is_exact());
        let found = theirs.and_then(|tree| {
            let ranges = self.differences(at, tree.at?)?;
            Some(Differences { at, ranges })
        });
        self.stats.comparisons += u64::from(found.is_some());
        let after = self.net_time();
        let event = TreeEvent::Compared { id, found };
        self.plan_in(after, What::Tree { node, boot, event });
    }

    /// Byte ranges of the groups that differ between two places of the history.
    fn differences(&self, ours: Tip, theirs: Tip) -> Option<Vec<std::ops::Range<u64>>> {
        let ours = self.oracle.contents(ours)?;
        let theirs = self.oracle.contents(theirs)?;
        let sectors = index(GROUP_BLOCKS * SECTORS_PER_BLOCK);
        let size = self.plan.blocks * BLOCK_BYTES;
        let groups = ours.chunks(sectors).zip(theirs.chunks(sectors));
        let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
        for (group, _) in (0_u64..).zip(groups).filter(|(_, (a, b))| a != b) {
            let start = group * GROUP_BLOCKS * BLOCK_BYTES;
            let end = (start + GROUP_BLOCKS * BLOCK_BYTES).min(size);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        Some(ranges)
    }

    /// A tree has something for its core.
    pub(crate) fn tree_says(&mut self, node: usize, boot: u64, event: TreeEvent) {
        if self.nodes[node].boot == boot {
            self.post(node, Event::Tree(event));
        }
    }
}
