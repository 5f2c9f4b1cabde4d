//! What others may know about a volume: its state, and what it has room for.

use hn4::log::{CopyState, Ground, Role, Superblock};
use hn4::types::Epoch;

use super::config::VolumeConfig;
use super::election::Election;
use super::event::{CopyStatus, Failure, Lag, Progress, Time, Tip};
use super::failed::FailedClosed;
use super::mutants::{Mutant, planted};
use super::peers::Regroup;
use super::volume::Volume;
use crate::arena::SlotMemory;

/// How far a replica is behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReplicaLag {
    /// A primary sends it epochs, or a full copy.
    pub follows: bool,
    /// The newest epoch that its primary has told of as durable there, or the end of its own log.
    pub announced: Epoch,
    /// What of its log is not in its backing; `None` if its log does not tell.
    pub unapplied: Option<Lag>,
}

impl Volume {
    /// The last sealed epoch.
    #[must_use]
    pub fn tip(&self) -> Tip {
        self.journal.tip()
    }

    /// The number that the open epoch will have.
    #[must_use]
    pub fn open_epoch(&self) -> Epoch {
        self.journal.tip().epoch.next()
    }

    /// What the node does for the volume. A role is taken up when it is durable, and given up at
    /// once.
    #[must_use]
    pub fn role(&self) -> Role {
        let persisted = self.superblock.persisted().role;
        match self.superblock.desired.role {
            // It acts like one until it knows that it is still to be primary.
            Role::Primary if self.is_opening() => Role::Replica,
            Role::Primary if planted(Mutant::WriteBeforeTerm) => Role::Primary,
            Role::Fenced => Role::Fenced,
            // On the way down, or a promotion that was overtaken by a higher term.
            Role::Replica if persisted == Role::Primary => Role::Fenced,
            Role::Replica | Role::Primary => persisted,
        }
    }

    /// The role that peers are told: a primary that is opening claims to be primary already, so
    /// that its replicas need not connect again when it is.
    #[must_use]
    pub fn claimed_role(&self) -> Role {
        match self.role() {
            Role::Replica if self.is_opening() => Role::Primary,
            role => role,
        }
    }

    /// Why the volume fails closed, if it does.
    #[must_use]
    pub fn failed(&self) -> Option<&FailedClosed> {
        self.failed.as_ref()
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &VolumeConfig {
        &self.config
    }

    /// What sessions and status say about this copy.
    #[must_use]
    pub fn copy_status(&self) -> CopyStatus {
        let persisted = self.superblock.persisted();
        CopyStatus {
            role: self.claimed_role(),
            term: persisted.term,
            incarnation: persisted.incarnation,
            tip: self.tip(),
            tip_rank: self.journal.tip_rank(),
            anchored: self.anchored,
            progress: Progress {
                received: self.tip().epoch,
                durable: self.journal.durable(),
                proven: if self.config.prove {
                    self.prover.proven.epoch
                } else {
                    self.anchored.epoch
                },
                applied: if self.is_applying() {
                    Epoch(0)
                } else {
                    persisted.checkpoint
                },
            },
            copy: persisted.copy,
            seeded: persisted.ground != Ground::Nothing && !self.tree.has_no_survey(),
            surveys: self.surveys(),
        }
    }

    /// How far behind a copy is that has everything up to an epoch; `None` if the log does not
    /// reach back so far any more, and nobody can say.
    #[must_use]
    pub fn lag_of(&self, epoch: Epoch, wall_ms: u64) -> Option<Lag> {
        if epoch >= self.tip().epoch {
            return Some(Lag::default());
        }
        let next = self.journal.info(epoch.next())?;
        Some(Lag {
            bytes: self.journal.tail().0 - next.offset.0,
            ms: wall_ms.saturating_sub(next.sealed_ms),
        })
    }

    /// How far a replica is behind its primary, as far as it can know; `None` on a primary.
    #[must_use]
    pub fn replica_lag(&self, wall_ms: u64) -> Option<ReplicaLag> {
        if self.role() == Role::Primary || self.is_opening() {
            return None;
        }
        let tip = self.tip().epoch;
        Some(ReplicaLag {
            follows: self.replica.source.is_some(),
            announced: self.replica.hint.map_or(tip, |hint| hint.epoch.max(tip)),
            unapplied: self.lag_of(self.superblock.persisted().checkpoint, wall_ms),
        })
    }

    /// Bytes of the last full copy that were kept as they were, since comparing state trees had
    /// shown the primary's to be the same; since this node was started.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        self.replica.kept_bytes
    }

    /// The last superblock that is durable.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        self.superblock.persisted()
    }

    /// Whether clients may write here.
    pub fn accepts_writes(&self) -> Result<(), Failure> {
        if self.failed.is_some() {
            return Err(Failure::Io);
        }
        if self.stopping {
            return Err(Failure::ShuttingDown);
        }
        let settled = self.transition.is_none() || planted(Mutant::WriteBeforeTerm);
        let primary = self.role() == Role::Primary && settled;
        let usable = self.superblock.persisted().copy == CopyState::Usable;
        if primary && usable {
            Ok(())
        } else {
            Err(Failure::ReadOnly)
        }
    }

    /// Whether this is a primary that failed closed: what it has can still be read.
    #[must_use]
    pub fn only_reads_go_on(&self) -> bool {
        let usable = self.superblock.persisted().copy == CopyState::Usable;
        self.failed.is_some() && self.role() == Role::Primary && usable
    }

    /// Whether a write of so many blocks has room now. If not, the front end holds it back (P8) and
    /// asks again after the next step.
    #[must_use]
    pub fn admits(&self, mem: &dyn SlotMemory, blocks: usize) -> bool {
        if self.accepts_writes().is_err() {
            return true; // It will be refused at once, which is better than waiting.
        }
        self.has_room(mem, blocks) && self.admits_now(blocks)
    }

    /// Whether the open epoch takes a write of so many blocks, whose slots are filled already.
    #[must_use]
    pub fn admits_now(&self, blocks: usize) -> bool {
        self.accepts_writes().is_err()
            || (self.lag.admits(self.overlay.open_held(), blocks)
                && self.overlay.open_held() + blocks <= self.config.max_epoch_blocks
                && self.overlay.zero_extents() + 2 <= self.config.max_zero_extents)
    }

    /// When the next [`super::Event::Timer`] is needed, if at all: an idle volume needs none (P9).
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        if self.failed.is_some() {
            return None;
        }
        let may_seal = !self.seal_blocked && self.role() == Role::Primary;
        let seal = self.open_since.filter(|_| may_seal);
        let seal = seal.map(|since| since.plus_ms(self.config.log_age_ms));
        let destage = self.destage_deadline();
        let lag = self.lag.deadline;
        let waiting = self.waiters.oldest().filter(|_| self.may_degrade());
        let degrade = waiting.map(|since| since.plus_ms(self.config.peer_timeout_ms));
        let election = self.election.as_ref().and_then(Election::deadline);
        let regroup = self.regroup.as_ref().and_then(Regroup::deadline);
        let shadow = self.shadow_deadline();
        let repair = self.damage.deadline();
        let pins = self.pins_deadline();
        let demotion = self.transition_deadline();
        let all = [
            seal, destage, degrade, election, lag, regroup, shadow, repair, pins, demotion,
        ];
        all.into_iter().flatten().min()
    }

    /// From now on nothing new is accepted.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Whether all that was accepted is in the backing.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.overlay.open_is_empty()
            && self.journal.sealed.is_empty()
            && self.sweep.is_none()
            && !self.is_applying()
            && !self.superblock.is_busy()
    }

    /// Slots of the overlay in use.
    #[must_use]
    pub fn dirty_slots(&self) -> usize {
        self.overlay.held()
    }

    /// Log bytes in use and in all.
    #[must_use]
    pub fn log_usage(&self) -> (u64, u64) {
        let ring = self.journal.ring_bytes();
        (ring - self.journal.free_bytes(), ring)
    }
}
