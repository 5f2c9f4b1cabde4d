//! Comparing this tree with a peer's before a full copy is sent.
//!
//! A primary takes its tree as it is at a checkpoint, asks the copy that wants to be filled for its
//! root, and then for the nodes below until it knows which groups differ. The copy answers from its
//! tree, which it takes in the same way, or that of a survey; its backing does not change while it
//! waits for a copy.
//! Whatever goes wrong, the answer to the core is that nothing is known, and everything is sent.
//!
//! A primary's side is bounded by the number of its peers, and in time. So is the other side.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hn4_engine::core::event::{Differences, PeerId, Tip};
use hn4_proof::hash::Digest;
use hn4_proof::tree::GROUP_LEVEL;
use hn4_proof::tree::compare::{self, Compare, CompareError, Differing, NodeReply, NodeRequest};
use hn4_proof::tree::exchange::{MAX_DAMAGED, Standing, TreeMessage};
use hn4_proof::tree::view::Snapshot;

use super::files::RunFile;
use super::verify::wall_ms;
use super::{FromTree, Worker};

/// A comparison takes no longer; meanwhile the log is kept.
const LIMIT: Duration = Duration::from_secs(300);
/// Time for the next answer of the peer.
const STALL: Duration = Duration::from_secs(10);
/// A tree that is asked nothing is no longer kept for the peer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Comparisons at a time: each holds files that merges would have removed.
const AT_ONCE: usize = 4;

type Tree = Arc<Snapshot<RunFile>>;

/// The core wants to know what differs from a peer.
struct Asking {
    /// The core's name for the question.
    name: u64,
    /// The name of the comparison between the trees.
    id: u64,
    /// Our tree is to be of this checkpoint, or a later one.
    least: Tip,
    tree: Option<(Tip, Digest, Tree)>,
    /// There from the peer's first answer on.
    compare: Option<Compare>,
    differing: Differing,
    began: Instant,
    until: Instant,
    /// When the peer has said something that helps, or was asked.
    heard: Instant,
}

/// A peer wants to know what differs from us.
struct Serving {
    id: u64,
    tree: Option<Tree>,
    until: Instant,
}

/// See the module. Peers are named by their places.
pub(super) struct Resyncs {
    asking: BTreeMap<usize, Asking>,
    serving: BTreeMap<usize, Serving>,
    /// Makes the ids of this process others than those of an earlier one.
    base: u64,
}

impl Resyncs {
    pub(super) fn new() -> Self {
        Self {
            asking: BTreeMap::new(),
            serving: BTreeMap::new(),
            base: wall_ms() << 20,
        }
    }

    /// Whether somebody waits until our tree is taken.
    pub(super) fn wants_tree(&self) -> bool {
        let asking = self.asking.values().any(|asking| asking.tree.is_none());
        asking || self.serving.values().any(|serving| serving.tree.is_none())
    }

    /// When [`Worker::resync`] is to be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let asking = self.asking.values().map(Asking::deadline);
        let serving = self.serving.values().map(|serving| serving.until);
        asking.chain(serving).min()
    }
}

impl Asking {
    fn deadline(&self) -> Instant {
        match self.tree {
            Some(_) => self.until.min(self.heard + STALL),
            None => self.until,
        }
    }
}

impl Worker {
    /// The core asks what differs from a peer.
    pub(super) fn compare_with(&mut self, peer: PeerId, name: u64) {
        let (index, now) = (usize::from(peer.0), Instant::now());
        self.resyncs.asking.remove(&index);
        let least = self.at.filter(|_| self.is_whole());
        let Some(least) = least.filter(|_| self.resyncs.asking.len() < AT_ONCE) else {
            return self.say(FromTree::Compared(index, name, None));
        };
        let asking = Asking {
            name,
            id: self.resyncs.base.wrapping_add(name),
            least,
            tree: None,
            compare: None,
            differing: Differing::default(),
            began: now,
            until: now + LIMIT,
            heard: now,
        };
        self.resyncs.asking.insert(index, asking);
    }

    /// Whether there is a tree that describes all of the volume at a checkpoint.
    pub(super) fn is_whole(&self) -> bool {
        self.tree.is_some() && !self.is_building()
    }

    /// What is due.
    pub(super) fn resync(&mut self, now: Instant) {
        let late =
            |(index, asking): (&usize, &Asking)| (asking.deadline() <= now).then_some(*index);
        let late: Vec<usize> = self.resyncs.asking.iter().filter_map(late).collect();
        for index in late {
            tracing::warn!(volume = %self.setup.name, "comparing trees with a peer takes too long");
            self.compared(index, false);
        }
        self.resyncs
            .serving
            .retain(|_, serving| serving.until > now);
        let keeper = self.tree.as_ref().map(|tree| &tree.keeper);
        let is_free = keeper.is_some_and(|keeper| !keeper.is_summing());
        if self.resyncs.wants_tree() && is_free && self.rooting.is_none() {
            self.want_root(false);
        }
    }

    /// There is no tree any more.
    pub(super) fn end_resyncs(&mut self) {
        let asking: Vec<usize> = self.resyncs.asking.keys().copied().collect();
        asking
            .into_iter()
            .for_each(|index| self.compared(index, false));
        let serving = std::mem::take(&mut self.resyncs.serving);
        for (index, serving) in serving {
            self.say_root(index, serving.id, None);
        }
    }

    /// Our tree at a checkpoint was taken.
    pub(super) fn take_tree(&mut self, at: Tip, root: Digest, tree: &Tree) {
        let now = Instant::now();
        let mut questions = Vec::new();
        for (index, asking) in &mut self.resyncs.asking {
            if asking.tree.is_none() && at.epoch >= asking.least.epoch {
                asking.tree = Some((at, root, Arc::clone(tree)));
                asking.heard = now;
                questions.push((*index, TreeMessage::Compare { id: asking.id }));
            }
        }
        for (index, question) in questions {
            self.say(FromTree::Answer(index, question.encode().into()));
        }
        // The backing must be what the tree says for as long as it is compared.
        let stands = self.is_quiet() && self.at == Some(at);
        let damaged = self.record.as_ref().filter(|record| {
            let listed = record.bad.len() as u64;
            stands && record.count() == listed && record.bad.len() <= MAX_DAMAGED
        });
        let standing = damaged.map(|record| Standing {
            root,
            damaged: record.bad.iter().copied().collect(),
        });
        let waiting = self.resyncs.serving.iter();
        let waiting = waiting.filter(|(_, serving)| serving.tree.is_none());
        let waiting: Vec<usize> = waiting.map(|(index, _)| *index).collect();
        for index in waiting {
            let Some(mut serving) = self.resyncs.serving.remove(&index) else {
                continue;
            };
            self.say_root(index, serving.id, standing.clone());
            if standing.is_some() {
                (serving.tree, serving.until) = (Some(Arc::clone(tree)), now + PATIENCE);
                self.resyncs.serving.insert(index, serving);
            }
        }
    }

    fn say_root(&self, index: usize, id: u64, standing: Option<Standing>) {
        let message = TreeMessage::Root { id, standing };
        self.say(FromTree::Answer(index, message.encode().into()));
    }

    /// A peer wants to compare our tree with its own.
    pub(super) fn asked_to_compare(&mut self, index: usize, id: u64) {
        self.resyncs.serving.remove(&index);
        if !self.is_whole() || !self.is_quiet() || self.resyncs.serving.len() >= AT_ONCE {
            return self.say_root(index, id, None);
        }
        let (tree, until) = (None, Instant::now() + PATIENCE);
        let serving = Serving { id, tree, until };
        self.resyncs.serving.insert(index, serving);
    }

    /// A peer wants nodes of our tree.
    pub(super) fn asked_for_nodes(&mut self, index: usize, id: u64, request: &NodeRequest) {
        let serving = self.resyncs.serving.get_mut(&index);
        let serving = serving.filter(|serving| serving.id == id);
        let reply = serving.and_then(|serving| {
            serving.until = Instant::now() + PATIENCE;
            let tree = serving.tree.as_ref()?;
            compare::answer(&tree.view(), request).ok()
        });
        match reply {
            Some(reply) => {
                let message = TreeMessage::Given { id, reply };
                self.say(FromTree::Answer(index, message.encode().into()));
            }
            None => self.say_root(index, id, None),
        }
    }

    /// A peer says how it stands.
    pub(super) fn peer_stands(&mut self, index: usize, id: u64, standing: Option<Standing>) {
        let asking = self.resyncs.asking.get_mut(&index);
        let Some(asking) = asking.filter(|asking| asking.id == id) else {
            return;
        };
        let (Some((_, ours, tree)), Some(Standing { root, damaged })) = (&asking.tree, standing)
        else {
            return self.compared(index, false);
        };
        if asking.compare.is_some() {
            return;
        }
        let groups = damaged.iter().map(|block| block >> GROUP_LEVEL);
        groups.for_each(|group| asking.differing.add(group));
        asking.compare = Some(Compare::new(tree.view().geometry, *ours, root));
        self.go_on_comparing(index);
    }

    /// A peer has given nodes of its tree.
    pub(super) fn given_nodes(&mut self, index: usize, id: u64, reply: &NodeReply) {
        let asking = self.resyncs.asking.get_mut(&index);
        let Some(asking) = asking.filter(|asking| asking.id == id) else {
            return;
        };
        let (Some((_, _, tree)), Some(compare)) = (&asking.tree, &mut asking.compare) else {
            return;
        };
        match compare.on_reply(reply, &tree.view()) {
            Ok(()) => {
                let groups = compare.take_groups();
                groups
                    .iter()
                    .for_each(|group| asking.differing.add(group.index));
                self.go_on_comparing(index);
            }
            Err(CompareError::Unasked(_)) => {}
            Err(error) => {
                tracing::warn!(volume = %self.setup.name, %error, "trees cannot be compared");
                self.compared(index, false);
            }
        }
    }

    fn go_on_comparing(&mut self, index: usize) {
        let Some(asking) = self.resyncs.asking.get_mut(&index) else {
            return;
        };
        let Some(compare) = &mut asking.compare else {
            return;
        };
        let id = asking.id;
        asking.heard = Instant::now();
        let requests: Vec<_> = std::iter::from_fn(|| compare.poll_request()).collect();
        let is_done = compare.is_done();
        for request in requests {
            let message = TreeMessage::Nodes { id, request };
            self.say(FromTree::Answer(index, message.encode().into()));
        }
        if is_done {
            self.compared(index, true);
        }
    }

    /// Tells the core what differs, or that nobody knows.
    fn compared(&mut self, index: usize, is_known: bool) {
        let Some(asking) = self.resyncs.asking.remove(&index) else {
            return;
        };
        let Asking {
            name,
            tree,
            differing,
            began,
            ..
        } = asking;
        if is_known {
            let took_ms = began.elapsed().as_millis();
            tracing::info!(volume = %self.setup.name, %took_ms, "the state trees were compared");
        }
        let size = self.setup.identity.size_bytes;
        let found = tree.filter(|_| is_known).map(|(at, ..)| Differences {
            at,
            ranges: differing.ranges(size),
        });
        self.say(FromTree::Compared(index, name, found));
    }
}
