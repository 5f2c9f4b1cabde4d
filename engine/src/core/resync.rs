//! Comparing state trees before a full copy, at the primary: what both sides have is not sent.
//!
//! The primary asks, since it sends: its tree is taken as it is at a checkpoint C, and compared
//! with that of the replica. The copy then begins at C. The replica's backing does not change from
//! the moment that it asks for the copy: until that is switched in or given up, if it goes into the
//! shadow (`shadow`); or, if it fills what somebody brought (`seed`), until pieces are written in
//! place, which are pieces of what differs. The tree is gone by then (`tree`), so no later
//! comparison can take it for what lies there.
//!
//! **Why the copy is exact.** Where the trees agree, the replica's backing holds the primary's
//! state at C, whatever history it comes from: contents are compared, not epochs. Elsewhere a piece
//! holds the primary's backing as it is when it is read, which is C with some of the epochs after
//! it. And every change after C is in the epochs after C, all of which are replayed over pieces and
//! kept parts alike. So C must be where the compared tree was taken, and not where the backing is
//! by the time the copy begins; and the log after C is held from before the tree is taken.
//!
//! If the log does not reach back to C after all, or anything else goes wrong, everything is sent.
//!
//! Not here: trees, hashes, messages, limits in time (the daemon's tree thread).

use std::ops::Range;

use hn4::log::Role;
use hn4::types::Epoch;

use super::event::{Action, Actions, PeerId, Progress, Tip, TreeWork};
use super::feed::{Feed, Peer, peer_id};
use super::mutants::{Mutant, planted};
use super::volume::Volume;

/// What comparing with a peer's tree has shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Differences {
    /// The checkpoint at which our tree was taken.
    pub at: Tip,
    /// Everything outside of these byte ranges is the same in our state there and in the peer's
    /// backing. They ascend, do not touch, and begin and end at blocks or the end of the volume.
    pub ranges: Vec<Range<u64>>,
}

impl Differences {
    /// Whether the volume is the same on both sides from this byte on, and how far that goes.
    fn part(&self, from: u64, size: u64) -> (bool, u64) {
        let next = self.ranges.partition_point(|range| range.end <= from);
        let skips = planted(Mutant::SkipLastDifference) && next + 1 == self.ranges.len();
        match self.ranges.get(next).filter(|_| !skips) {
            Some(range) if range.start <= from => (false, range.end.min(size) - from),
            Some(range) => (true, range.start - from),
            None => (true, size - from),
        }
    }

    /// Bytes of a volume of this size that are the same.
    fn same_bytes(&self, size: u64) -> u64 {
        let differ = self.ranges.iter().map(|range| range.end - range.start);
        size.saturating_sub(differ.sum())
    }
}

impl Peer {
    /// Whether the peer has what comes next of a copy, and how long that part is.
    pub(super) fn part_of_copy(&self, cursor: u64, size: u64) -> (bool, u64) {
        match &self.resync {
            Some(differences) => differences.part(cursor, size),
            None => (false, size - cursor),
        }
    }
}

impl Volume {
    /// Whether both sides have a tree, and the peer has something to keep.
    pub(super) fn may_compare(&self, id: PeerId) -> bool {
        let peer = self.peers.get(usize::from(id.0));
        let state = peer.and_then(Peer::state);
        self.tree.follows() && state.is_some_and(|state| state.resyncs)
    }

    /// The log is held from here on.
    pub(super) fn begin_to_compare(&mut self, id: PeerId) {
        let from = self.superblock.desired.checkpoint;
        let peer = &mut self.peers[usize::from(id.0)];
        peer.set_hold(from);
        peer.progress = Progress::default();
        peer.lag.has = from;
        peer.kept_bytes = None;
        peer.feed = Feed::Comparing { asked: None };
    }

    /// A superblock that was on its way may let go of the log up to the checkpoint that it records:
    /// the tree is asked when it has that one.
    pub(super) fn ask_to_compare(&mut self, index: usize, out: &mut Actions) {
        let peer = &mut self.peers[index];
        let reached = self.superblock.persisted().checkpoint;
        if peer.hold().is_some_and(|hold| reached < hold) {
            return;
        }
        self.compares += 1;
        let id = self.compares;
        peer.feed = Feed::Comparing { asked: Some(id) };
        let peer = peer_id(index);
        out.push(Action::Tree(TreeWork::Compare { peer, id }));
    }

    /// The trees were compared, or could not be.
    pub(super) fn compared_with_peer(
        &mut self,
        asked: u64,
        found: Option<Differences>,
        out: &mut Actions,
    ) {
        let waits = Feed::Comparing { asked: Some(asked) };
        let Some(index) = self.peers.iter().position(|peer| peer.feed == waits) else {
            return; // Its session has ended.
        };
        let id = peer_id(index);
        self.peers[index].feed = Feed::None;
        if self.role() != Role::Primary {
            return;
        }
        let checkpoint = self.superblock.desired.checkpoint;
        let found = found.filter(|found| {
            let kept = self.feed_floor()..=checkpoint;
            kept.contains(&found.at.epoch)
                && self.journal.chain(found.at.epoch) == Some(found.at.chain)
        });
        let Some(found) = found else {
            return self.copy_everything(id, out);
        };
        let from: Epoch = match planted(Mutant::CopyFromCheckpoint) {
            true => checkpoint,
            false => found.at.epoch,
        };
        let peer = &mut self.peers[index];
        peer.kept_bytes = Some(found.same_bytes(self.config.identity.size_bytes));
        peer.resync = Some(found);
        self.begin_copy(id, 0, from, out);
    }
}
