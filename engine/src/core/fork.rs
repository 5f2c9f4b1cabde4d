//! A primary that was replaced while it was away, and comes back.
//!
//! Its log may end in epochs that the new history lacks. They are its own, nobody else has them,
//! and none is in its backing as long as acknowledgements wait for peers, since it destages only
//! what enough peers have made durable. So it becomes a replica by itself, its tail counts as not
//! anchored, and when the new primary says where the histories part, the tail is saved in a file
//! before it is cut off (P7). If it had destaged part of it, it stays diverged and nothing is
//! touched.

use hn4::log::Role;
use hn4::types::Epoch;

use super::config::AckMode;
use super::event::{Action, Actions, PeerId, PeerMessage, RequestId, Tip};
use super::recovery::swept_tip;
use super::replica::Obstacle;
use super::volume::Volume;
use crate::arena::SlotMemory;

/// The way of a fenced node back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Return {
    /// It is not on it.
    #[default]
    No,
    /// It waits until nothing is on its way to its disks; then it is a replica.
    Wanted(Option<RequestId>),
    /// Its superblock is to say so.
    Written(Option<RequestId>),
}

impl Volume {
    /// The newest epoch that may go to a primary's backing: what is on enough peers will be part of
    /// every later history.
    pub(super) fn secured(&self) -> Epoch {
        let alone = self.config.ack_mode == AckMode::Async || self.is_stepping_down();
        if self.role() != Role::Primary || alone {
            return Epoch(u64::MAX);
        }
        // What the log cannot give any more reaches peers only by a copy of the backing.
        self.peers_have().1.max(self.unreadable)
    }

    /// Somebody waits for the return of this fenced node, or it is about to be written.
    pub(super) fn is_returning(&self) -> bool {
        !matches!(self.returning, Return::No | Return::Wanted(None))
    }

    /// The end of the log is this node's own from when it was primary.
    pub(super) fn has_own_tail(&self) -> bool {
        self.superblock.persisted().own_tail
    }

    /// A fenced node becomes a replica when there is a primary that it can follow, or when it is
    /// told to.
    pub(super) fn return_progress(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        if self.role() != Role::Fenced || self.failed.is_some() || self.transition.is_some() {
            return;
        }
        let term = self.superblock.persisted().term;
        let leads = |peer: &super::feed::Peer| {
            let state = peer.state();
            state.is_some_and(|state| state.role == Role::Primary && state.term == term)
        };
        if self.returning == Return::No && self.peers.iter().any(leads) {
            self.returning = Return::Wanted(None);
        }
        let Return::Wanted(id) = self.returning else {
            return;
        };
        self.discard_open(mem);
        let settled = self.journal.durable() == self.tip().epoch
            && self.waiters.is_empty()
            && self.sweep.is_none()
            && !self.superblock.is_busy();
        if settled {
            self.returning = Return::Written(id);
            let next = &mut self.superblock.desired;
            next.role = Role::Replica;
            next.own_tail = next.checkpoint < self.journal.tip().epoch;
            self.superblock.dirty = true;
            self.close_sessions(out);
        }
    }

    pub(super) fn return_persisted(&mut self, out: &mut Actions) {
        let Return::Written(id) = self.returning else {
            return;
        };
        if self.superblock.persisted().role != Role::Replica {
            return;
        }
        self.returning = Return::No;
        self.anchored = swept_tip(self.superblock.persisted(), &self.journal);
        if let Some(id) = id {
            out.push(Action::ControlDone { id, result: Ok(()) });
        }
    }

    /// The primary's history ends here for us: what we have beyond is saved first.
    pub(super) fn save_fork(&mut self, peer: PeerId, to: Tip, out: &mut Actions) {
        let Some(first) = self.journal.info(to.epoch.next()) else {
            self.replica.truncate_to = Some(to);
            return;
        };
        self.replica.fork = Some((peer, to));
        out.push(Action::SaveFork {
            after: to.epoch,
            offset: first.offset,
            bytes: self.journal.tail().0 - first.offset.0,
        });
    }

    pub(super) fn fork_saved(&mut self, result: Result<(), String>, out: &mut Actions) {
        let Some((peer, to)) = self.replica.fork.take() else {
            return;
        };
        match result {
            Ok(()) => self.replica.truncate_to = Some(to),
            Err(why) => {
                self.replica.obstacle = Some(Obstacle::NeedsSpace { why });
                // The next session tries again.
                out.peer(peer, PeerMessage::Close);
            }
        }
    }

    /// A primary of a higher term has confirmed the end of our log.
    pub(super) fn tail_confirmed(&mut self) {
        if self.has_own_tail() && self.replica.fork.is_none() && self.replica.truncate_to.is_none()
        {
            self.superblock.desired.own_tail = false;
            if matches!(self.replica.obstacle, Some(Obstacle::NeedsSpace { .. })) {
                self.replica.obstacle = None;
            }
            self.superblock.dirty = true;
        }
    }
}
