//! Changes of role: promotion, demotion, and giving way to a higher term.
//!
//! **Invariant:** a node writes in a term only after the term is durable in its superblock, and
//! stops the moment it hears of a higher one.

use hn4::log::Role;
use hn4::types::{Epoch, Incarnation, Term};

use super::config::AckMode;
use super::election::Election;
use super::event::{Action, Actions, Failure, Now, RequestId, Time};
use super::feed::Peer;
use super::fork::Return;
use super::mutants::{Mutant, planted};
use super::volume::Volume;

/// So long a demotion waits for peers to acknowledge what was written before it.
const STEP_DOWN_PATIENCE_MS: u64 = 30_000;

/// A change of role on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transition {
    /// The request that is answered at the end.
    pub id: RequestId,
    /// The role to reach.
    to: Role,
    /// The term it is taken in.
    term: Term,
    /// It is given up then, if peers still owe acknowledgements.
    until: Option<Time>,
    /// The superblock was asked to say so.
    written: bool,
}

impl Volume {
    pub(super) fn promote(
        &mut self,
        id: RequestId,
        term: Term,
        (answers, within_ms): (usize, u64),
        out: &mut Actions,
    ) {
        let accepts_loss = answers == 0;
        // Writes are acknowledged from memory, which is lost with its node: a copy that has not
        // heard the primary of the term that it obeys cannot answer for what only that one had.
        let careful = self.config.ack_mode != AckMode::Async && !accepts_loss;
        let obeyed = self.last_led_term();
        let least_term = if careful { obeyed } else { 0 };
        let counts = self.journal.tip_rank().term >= least_term;
        let others = answers.saturating_sub(usize::from(counts));
        if self.is_opening() && accepts_loss {
            self.open_alone();
            return out.push(Action::ControlDone { id, result: Ok(()) });
        }
        match self.promotion_refused(term, others) {
            Some(why) => out.push(Action::ControlDone {
                id,
                result: Err(why),
            }),
            None => {
                let needed = (others, least_term, accepts_loss);
                self.election = Some(Election::promote(id, term, needed, within_ms));
                // What is promoted is what it has, not what it was being sent.
                self.give_up_shadow();
                self.superblock.desired.term = term;
                self.superblock.dirty = true;
            }
        }
    }

    /// The newest term that we obey and that may have had a primary: in a term of our own that we
    /// asked for in vain there was none.
    fn last_led_term(&self) -> u64 {
        let obeyed = self.superblock.persisted().term;
        match self.unled {
            Some((term, before)) if term == obeyed => before,
            _ => obeyed.counter,
        }
    }

    fn promotion_refused(&self, term: Term, others: usize) -> Option<String> {
        let persisted = self.superblock.persisted();
        let usable = |peer: &&Peer| peer.state().is_some_and(|state| state.usable);
        let present = self.peers.iter().filter(usable).count();
        if self.transition.is_some() {
            Some("another change of role is under way; try again".to_owned())
        } else if self.is_opening() {
            let why = "this node is primary and waits for its peers after a restart";
            Some(format!("{why}; --accept-loss opens it without them"))
        } else if self.election.is_some() {
            Some("another promotion is under way; try again".to_owned())
        } else if persisted.role == Role::Primary {
            Some("this node is primary already".to_owned())
        } else if persisted.role == Role::Fenced {
            Some(format!(
                "this node was primary and is fenced by term {}; its history may have been left \
                 behind. Make it a replica first",
                persisted.term
            ))
        } else if self.is_applying() {
            let why = "a full copy is being written over the backing, which takes a moment";
            Some(format!("{why}; try again"))
        } else if !persisted.copy.is_usable() {
            Some(format!(
                "this copy is not usable ({:?}): a full copy has not been completed. Let it \
                 finish, or promote another node",
                persisted.copy
            ))
        } else if term.counter <= self.superblock.desired.term.counter {
            // A promise that is being written counts: it cannot be taken back.
            Some(format!(
                "term {term} is not higher than the present term {}",
                self.superblock.desired.term
            ))
        } else if present < others {
            Some(format!(
                "{others} of the other copies must promise to obey the new primary, and only \
                 {present} can be reached; what only the others have would be lost"
            ))
        } else {
            None
        }
    }

    /// Enough copies obey the term, and nobody has more than this node.
    pub(super) fn take_over(&mut self, id: RequestId, term: Term) {
        self.transition = Some(Transition {
            id,
            to: Role::Primary,
            term,
            until: None,
            written: false,
        });
    }

    pub(super) fn demote(&mut self, now: Time, id: RequestId, out: &mut Actions) {
        // What is asked for counts: the medium may still call it primary while it is fenced.
        let role = match self.superblock.desired.role {
            Role::Fenced => Role::Fenced,
            _ => self.superblock.persisted().role,
        };
        // A promotion that a higher term has overtaken: the medium calls it primary for a moment
        // longer. A demotion would end after it has begun to follow, and miss what comes till then.
        let desired = self.superblock.desired.role;
        let overtaken = role == Role::Primary && desired == Role::Replica;
        let refusal = match role {
            _ if self.transition.is_some() || self.is_returning() || overtaken => {
                "another change of role is under way; try again"
            }
            Role::Replica => "this node is a replica already",
            Role::Fenced => {
                self.returning = Return::Wanted(Some(id));
                return;
            }
            Role::Primary => {
                self.cancel_election("overtaken by a demotion", out);
                let term = self.superblock.persisted().term;
                self.transition = Some(Transition {
                    id,
                    to: Role::Replica,
                    term,
                    until: Some(now.plus_ms(STEP_DOWN_PATIENCE_MS)),
                    written: false,
                });
                return;
            }
        };
        out.push(Action::ControlDone {
            id,
            result: Err(refusal.to_owned()),
        });
    }

    /// Whether a demotion is on its way, which begins with destaging everything.
    pub(super) fn is_stepping_down(&self) -> bool {
        self.transition
            .is_some_and(|transition| transition.to == Role::Replica)
    }

    /// When a demotion is given up, if somebody still waits.
    pub(super) fn transition_deadline(&self) -> Option<Time> {
        let transition = self.transition.filter(|transition| !transition.written)?;
        transition.until.filter(|_| !self.waiters.is_empty())
    }

    /// A demotion cannot go on without peers that are not there, and meanwhile nobody can write.
    fn give_up_stepping_down(&mut self, now: Time, out: &mut Actions) {
        let late = self.transition_deadline().is_some_and(|until| now >= until);
        if let Some(transition) = self.transition.take_if(|_| late) {
            let why = format!(
                "what was written before is not on enough peers after {} s; this node is primary \
                 as before",
                STEP_DOWN_PATIENCE_MS / 1000
            );
            out.push(Action::ControlDone {
                id: transition.id,
                result: Err(why),
            });
        }
    }

    /// Writes the new role once everything that must be durable before it is.
    ///
    /// A primary that steps down has destaged everything first: then the checkpoint itself says
    /// that none of it may ever be dropped, also after a restart.
    pub(super) fn transition_progress(&mut self, now: Now, out: &mut Actions) {
        self.give_up_stepping_down(now.time, out);
        let persisted = self.superblock.persisted();
        let settled = self.journal.durable() == self.tip().epoch
            && self.overlay.open_is_empty()
            && self.waiters.is_empty()
            && self.replica.is_settled()
            && persisted.session == self.journal.session
            && (!self.is_stepping_down() || persisted.checkpoint == self.tip().epoch);
        let Some(transition) = self.transition.as_mut().filter(|t| !t.written && settled) else {
            return;
        };
        transition.written = true;
        let next = &mut self.superblock.desired;
        next.role = transition.to;
        if transition.to == Role::Primary {
            next.term = transition.term;
            next.incarnation = Incarnation(1);
        }
        // Whoever is promoted next may lack what this one had alone.
        next.own_tail = transition.to == Role::Replica;
        self.superblock.dirty = true;
        // Sessions speak for a role; they start again with the new one.
        self.close_sessions(out);
    }

    pub(super) fn roles_persisted(&mut self, out: &mut Actions) {
        self.return_persisted(out);
        let persisted = *self.superblock.persisted();
        let Some(transition) = self.transition else {
            return;
        };
        if !transition.written || persisted.role != transition.to {
            return;
        }
        self.transition = None;
        (self.degraded, self.rejoins) = (false, None);
        if persisted.role == Role::Primary {
            // The whole tail is adopted: it is the history of the new term.
            self.anchored = self.tip();
            self.mark_term = true;
            self.forget_progress();
            (self.discarded, self.superseded, self.wrote) = (false, false, Epoch(0));
        }
        out.push(Action::ControlDone {
            id: transition.id,
            result: Ok(()),
        });
    }

    /// Someone was promoted in a higher term.
    pub(super) fn higher_term(&mut self, term: Term, out: &mut Actions) {
        let lower = term.counter <= self.superblock.desired.term.counter;
        if lower && !planted(Mutant::AcceptLowerTerm) {
            return;
        }
        self.superblock.desired.term = term;
        self.superblock.dirty = true;
        self.seed_in_new_term(out);
        self.cancel_election(&format!("overtaken by term {term}"), out);
        let persisted = self.superblock.persisted().role;
        let own_tail = self.superblock.persisted().own_tail;
        let next = &mut self.superblock.desired;
        match (persisted, next.role) {
            // It steps down already; nothing is left to be accepted.
            (_, Role::Replica | Role::Fenced) => {}
            // Promoted in a term that is not the highest any more: it never was primary.
            (Role::Replica | Role::Fenced, Role::Primary) => {
                next.role = Role::Replica;
                // And what it had of its own before is still nobody else's.
                next.own_tail |= own_tail;
            }
            (Role::Primary, Role::Primary) => {
                next.role = Role::Fenced;
                self.waiters.fail_all(|id, control| {
                    if control {
                        let result = Err(format!("fenced by term {term}"));
                        out.push(Action::ControlDone { id, result });
                    } else {
                        out.complete(id, Err(Failure::Io));
                    }
                });
            }
        }
        // A promotion must have the highest term; a demotion is overtaken by being fenced, unless
        // its outcome is on the medium or on the way there.
        if let Some(transition) = self.transition
            && (transition.to == Role::Primary || !transition.written)
        {
            self.transition = None;
            let result = Err(format!("overtaken by term {term}"));
            let id = transition.id;
            out.push(Action::ControlDone { id, result });
        }
    }
}
