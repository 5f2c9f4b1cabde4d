//! Requests that wait until an epoch is safe enough.
//!
//! A write may wait until its epoch was received by peers, a flush until it is durable here and by
//! policy on peers. Epochs only grow, so both are queues.

use std::collections::VecDeque;

use hn4::log::Role;
use hn4::types::Epoch;

use super::config::{AckMode, OnDegraded};
use super::event::{Action, Actions, Now, RequestId, Time};
use super::mutants::{Mutant, planted};
use super::volume::Volume;
use crate::arena::SlotMemory;

#[derive(Clone, Copy, Debug)]
struct Wait {
    epoch: Epoch,
    id: RequestId,
    since: Time,
    control: bool,
}

/// See the module. Bounded by the front end, which bounds its requests.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    writes: VecDeque<Wait>,
    flushes: VecDeque<Wait>,
    /// Since when a sweep does that is to make room.
    sweep: Option<Time>,
}

impl Waiters {
    pub(super) fn write(&mut self, since: Time, epoch: Epoch, id: RequestId) {
        self.writes.push_back(Wait {
            epoch,
            id,
            since,
            control: false,
        });
    }

    pub(super) fn flush(&mut self, since: Time, epoch: Epoch, id: RequestId) {
        self.flushes.push_back(Wait {
            epoch,
            id,
            since,
            control: false,
        });
    }

    pub(super) fn control(&mut self, since: Time, epoch: Epoch, id: RequestId) {
        self.flushes.push_back(Wait {
            epoch,
            id,
            since,
            control: true,
        });
    }

    /// The newest epoch that someone waits for.
    pub(super) fn last_epoch(&self) -> Option<Epoch> {
        let last = |queue: &VecDeque<Wait>| queue.back().map(|wait| wait.epoch);
        last(&self.writes).max(last(&self.flushes))
    }

    /// Since when the one who has waited longest does.
    pub(super) fn oldest(&self) -> Option<Time> {
        let first = |queue: &VecDeque<Wait>| queue.front().map(|wait| wait.since);
        [first(&self.writes), first(&self.flushes), self.sweep]
            .into_iter()
            .flatten()
            .min()
    }

    /// How many wait.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.writes.len() + self.flushes.len()
    }

    /// The log was cut back: what is not there any more needs no waiting for. Only the operator
    /// waits on a replica.
    pub(super) fn cut_back(&mut self, last: Epoch) {
        for wait in self.writes.iter_mut().chain(&mut self.flushes) {
            wait.epoch = wait.epoch.min(last);
        }
    }

    /// Whether no request waits.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Everyone who waits is told to give up.
    pub(super) fn fail_all(&mut self, mut fail: impl FnMut(RequestId, bool)) {
        for wait in self.writes.drain(..).chain(self.flushes.drain(..)) {
            fail(wait.id, wait.control);
        }
    }
}

impl Volume {
    /// Whether a plain write must wait for its epoch.
    pub(super) fn writes_wait(&self) -> bool {
        self.config.write_ack_durable || (self.peers_count() && !self.degraded)
    }

    fn peers_count(&self) -> bool {
        self.config.ack_mode != AckMode::Async && self.config.ack_peers > 0
    }

    /// The newest epoch that enough peers have received, and have durably.
    pub(super) fn peers_have(&self) -> (Epoch, Epoch) {
        let everything = Epoch(u64::MAX);
        // A replica answers for itself only.
        if !self.peers_count() || self.degraded || self.role() != Role::Primary {
            return (everything, everything);
        }
        // What a peer holds only in memory counts while it is there; what it flushed, always.
        let received = self
            .peers
            .iter()
            .map(|peer| match (peer.counts(), peer.connected) {
                (false, _) => Epoch(0),
                (true, true) => peer.progress.received,
                (true, false) => peer.progress.durable,
            });
        let counting = self.peers.iter().filter(|peer| peer.counts());
        let durable = counting.map(|peer| peer.progress.durable);
        let k = self.config.ack_peers;
        let received = kth_newest(received, k);
        match self.config.ack_mode {
            AckMode::Durable => (received, kth_newest(durable, k)),
            AckMode::Received | AckMode::Async => (received, received),
        }
    }

    /// Where room is short, writers wait for a sweep and are not among those who wait for peers; so
    /// a sweep that waits for peers is.
    pub(super) fn note_sweep_that_waits(&mut self, now: Now, mem: &dyn SlotMemory) {
        let waits =
            self.may_degrade() && self.accepts_writes().is_ok() && self.is_pressed(mem) && {
                let checkpoint = self.superblock.persisted().checkpoint;
                self.journal.durable() > checkpoint && self.secured() <= checkpoint
            };
        let since = self.waiters.sweep.filter(|_| waits);
        self.waiters.sweep = since.or(waits.then_some(now.time));
    }

    pub(super) fn wake_waiters(&mut self, now: Now, out: &mut Actions) {
        let nobody = self.waiters.is_empty() && self.waiters.sweep.is_none();
        if nobody && !self.is_degraded() {
            return;
        }
        self.update_degraded(now);
        let (received, peers_durable) = self.peers_have();
        let mut durable = self.journal.durable();
        if planted(Mutant::AckBeforeLog) {
            durable = self.tip().epoch;
        }
        let write_ready = if self.config.write_ack_durable {
            received.min(durable)
        } else {
            received
        };
        let flush_ready = peers_durable.min(durable);
        let ready = [
            (&mut self.waiters.writes, write_ready),
            (&mut self.waiters.flushes, flush_ready),
        ];
        for (queue, ready) in ready {
            while let Some(wait) = queue.front().filter(|wait| wait.epoch <= ready).copied() {
                queue.pop_front();
                if wait.control {
                    out.push(Action::ControlDone {
                        id: wait.id,
                        result: Ok(()),
                    });
                } else {
                    out.complete(wait.id, Ok(()));
                }
            }
        }
    }

    /// Whether waiting for peers may end with going on without them.
    pub(super) fn may_degrade(&self) -> bool {
        self.config.on_degraded == OnDegraded::Degrade
            && self.peers_count()
            && !self.degraded
            && !self.peers_keep_up()
    }

    fn update_degraded(&mut self, now: Now) {
        let durable = self.journal.durable();
        if self.degraded && self.peers_are_near(now) {
            // Whoever asks from now on waits for them again. Were it to end only when they have all
            // that is here, it would not end while clients flush faster than peers can.
            self.degraded = false;
            self.rejoins = Some(durable);
        }
        if self.rejoins.is_some_and(|mark| self.peers_reach(mark)) {
            self.rejoins = None;
        }
        if self.may_degrade() {
            let timeout = self.config.peer_timeout_ms;
            let overdue = self
                .waiters
                .oldest()
                .is_some_and(|since| now.time >= since.plus_ms(timeout));
            self.degraded = overdue;
            self.rejoins = self.rejoins.filter(|_| !overdue);
        }
    }

    /// Enough peers are there and lack nothing that is older than half the time for which clients
    /// would wait for them.
    fn peers_are_near(&self, now: Now) -> bool {
        let most_ms = self.config.peer_timeout_ms / 2;
        let is_near = |peer: &&super::feed::Peer| {
            let is_there = peer.counts() && peer.connected;
            is_there && self.lag_ms(peer.progress.durable, now.wall_ms) <= most_ms
        };
        self.peers.iter().filter(is_near).count() >= self.config.ack_peers
    }

    /// Enough peers have all that is durable here: if somebody waits, it is for our own log.
    fn peers_keep_up(&self) -> bool {
        self.peers_reach(self.journal.durable())
    }

    /// Enough peers are there and have everything up to an epoch.
    fn peers_reach(&self, epoch: Epoch) -> bool {
        let reaches = |peer: &&super::feed::Peer| {
            peer.counts() && peer.connected && peer.progress.durable >= epoch
        };
        self.peers.iter().filter(reaches).count() >= self.config.ack_peers
    }

    /// Whether something that was acknowledged may be here only: the volume goes on without the
    /// peers that its policy asks for, or did, and they have not caught up yet.
    #[must_use]
    pub fn is_degraded(&self) -> bool {
        self.degraded || self.rejoins.is_some()
    }

    /// Requests that wait for an epoch to be safe.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiters.len()
    }
}

/// The newest epoch that at least `k` of these are at or beyond.
fn kth_newest(epochs: impl Iterator<Item = Epoch> + Clone, k: usize) -> Epoch {
    let enough = |epoch: &Epoch| epochs.clone().filter(|other| other >= epoch).count() >= k;
    epochs.clone().filter(enough).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kth_newest_is_what_k_have() {
        let epochs = [3, 9, 3, 7].map(Epoch);
        let kth = |k| kth_newest(epochs.iter().copied(), k).0;
        assert_eq!([1, 2, 3, 4, 5].map(kth), [9, 7, 3, 3, 0]);
    }
}
