//! A primary that was replaced while it was away, and comes back.
//!
//! Its log may end in epochs that the new history lacks. They are its own, nobody else has them,
//! and none is in its backing as long as acknowledgements wait for peers, since it destages only
//! what enough peers have made durable. So it becomes a replica by itself, its tail counts as not
//! anchored, and when the new primary says where the histories part, the tail is saved in a file
//! before it is cut off (P7).
//!
//! If it had destaged part of it, or the new primary's log does not reach back to where they part,
//! a full copy goes into the shadow (`shadow`). Before that is switched in, the file takes the tail
//! and what the backing holds where the copy differs. So does a replica's that has missed both the
//! log and a promotion, or a restart of the primary: what it has may have been left behind too. A
//! replica that was never primary and whose anchored history is another stays diverged and nothing
//! is touched: someone has to say which one counts.

use hn4::log::Role;
use hn4::types::Epoch;

use super::config::AckMode;
use super::event::{Action, Actions, Fork, PeerId, PeerMessage, RequestId, Tip};
use super::mutants::{Mutant, planted};
use super::recovery::swept_tip;
use super::replica::Obstacle;
use super::shadow::Shadow;
use super::volume::Volume;
use crate::arena::SlotMemory;

/// Whether what the switch of a shadow would replace is in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Saved {
    #[default]
    No,
    /// The answer is on its way.
    Asked,
    Yes,
}

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
        // A copy that waits at a damaged block ends only when a writer writes that, and writers may
        // have to wait for room: then the peers would wait for a sweep, and the sweep for them.
        if self.copy_waits_at_damage() {
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
            // Of what was destaged, too, nobody has said yet that it is part of the new history.
            next.own_tail = true;
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
        self.superseded = true;
        self.anchored = swept_tip(self.superblock.persisted(), &self.journal);
        if let Some(id) = id {
            out.push(Action::ControlDone { id, result: Ok(()) });
        }
    }

    /// The primary's history ends here for us: what we have beyond is saved first.
    pub(super) fn save_fork(&mut self, peer: PeerId, to: Tip, out: &mut Actions) {
        if self.journal.info(to.epoch.next()).is_none() {
            self.replica.truncate_to = Some(to);
            return;
        }
        self.replica.fork = Some((peer, to));
        out.push(Action::SaveFork(self.fork_after(to, None)));
    }

    /// The log after this epoch, and what so much of the shadow replaces.
    fn fork_after(&self, after: Tip, shadow_bytes: Option<u64>) -> Fork {
        let tail = self.journal.tail();
        let first = self.journal.info(after.epoch.next());
        let offset = first.map_or(tail, |info| info.offset);
        Fork {
            after,
            term: self.superblock.persisted().term,
            offset,
            bytes: tail.0 - offset.0,
            shadow_bytes,
        }
    }

    /// Whether this copy may have what the primary's history lacks. What a primary has sealed since
    /// it opened is part of its history; of what was sealed before that nobody can tell any more,
    /// not even in one term: it may have opened without the end of its log.
    fn may_be_a_fork(&self, shadow: &Shadow) -> bool {
        let rank = self.journal.tip_rank();
        // Or since another opening of which the copy holds a later epoch.
        let leads_up = shadow.rank == Some(rank) && shadow.taken.epoch >= self.tip().epoch;
        let contained = rank == shadow.opening || leads_up;
        self.has_own_tail() || !contained
    }

    /// Whether the shadow may be switched in. If this copy may have what nobody else has, that is
    /// saved first.
    pub(super) fn fork_is_safe(&mut self, out: &mut Actions) -> bool {
        let Some(shadow) = &self.replica.shadow else {
            return false;
        };
        let may_be_a_fork = self.may_be_a_fork(shadow) && !planted(Mutant::SwitchForgetsFork);
        let Some(shadow) = &mut self.replica.shadow else {
            return false;
        };
        if may_be_a_fork && shadow.saved == Saved::No {
            shadow.saved = Saved::Asked;
            let shadow_bytes = Some(shadow.done.shadow);
            let persisted = self.superblock.persisted();
            let base = Tip {
                epoch: persisted.checkpoint,
                chain: persisted.checkpoint_chain,
            };
            out.push(Action::SaveFork(self.fork_after(base, shadow_bytes)));
            return false;
        }
        !may_be_a_fork || shadow.saved == Saved::Yes
    }

    pub(super) fn fork_saved(&mut self, result: Result<(), String>, out: &mut Actions) {
        if let Some((peer, to)) = self.replica.fork.take() {
            match result {
                Ok(()) => self.replica.truncate_to = Some(to),
                Err(why) => {
                    self.replica.obstacle = Some(Obstacle::NeedsSpace { why });
                    // The next session tries again.
                    out.peer(peer, PeerMessage::Close);
                }
            }
        } else if let Some(shadow) = &mut self.replica.shadow
            && shadow.saved == Saved::Asked
        {
            match result {
                Ok(()) => shadow.saved = Saved::Yes,
                Err(why) => self.pause_shadow(why, out),
            }
        }
    }

    /// Lets go of the own tail when the primary of a higher term has confirmed it.
    ///
    /// An own tail is saved before it is cut off, and what is anchored is not cut off at all. So
    /// the one protection ends only when the other has begun: when all is anchored here that is
    /// not of the term which we follow, and in which we never wrote. That the primary says how far
    /// it is, is not enough. That may come before its word that our log is a part of its own, and
    /// in between another primary, whose promotion accepted a loss: that one would have the tail
    /// cut off as if it were any replica's.
    ///
    /// Nor is a replica's word enough, from which a promotion pulls: it saves nothing itself.
    pub(super) fn own_tail_progress(&mut self) {
        if !self.has_own_tail() || !self.superblock.desired.own_tail {
            return;
        }
        // A full copy is on its way because it was not confirmed.
        let copies = self.superblock.desired.copy.is_shadowed() || self.replica.wants_shadow;
        let cuts = self.replica.fork.is_some() || self.replica.truncate_to.is_some();
        let followed = self.superblock.persisted().term.counter;
        let next = self.journal.info(self.anchored.epoch.next());
        let anchored = next.is_none_or(|info| info.rank.term == followed);
        // What was written back counts as anchored after a restart, whoever wrote it: so the source
        // must have said that our log is a part of its own.
        let joined = self.replica.joined;
        let confirmed = joined && self.replica.hinted && self.source_leads() && anchored;
        if !confirmed || copies || cuts {
            return;
        }
        if matches!(self.replica.obstacle, Some(Obstacle::NeedsSpace { .. })) {
            self.replica.obstacle = None;
        }
        let kept = self.anchored.epoch.min(self.journal.durable());
        // What is of the term that is followed goes by its anchors and proofs.
        let kept = kept.min(self.journal.before_term(followed));
        let next = &mut self.superblock.desired;
        next.own_tail = false;
        // From this record on the tail may be destaged. A restart forgets what was anchored, but
        // not this: it finds no tail that is neither its own any more nor anchored yet.
        next.swept = next.swept.max(kept);
        self.superblock.dirty = true;
    }
}
