//! Readers of a replica: while somebody reads it, its backing stays at one epoch.
//!
//! Between two sweeps the backing of a usable copy is an exact epoch. A reader pins it: no sweep
//! begins until the last reader is gone, and reads pass by the overlay. What arrives meanwhile
//! waits in log and overlay. After a crash in a sweep the backing is a mix until that sweep was
//! done again: who asks before that waits, and hurries it. When log or overlay get tight, or the
//! node is to be more than a replica, or is told to drain or to stop, the readers are cut off:
//! nobody who only reads holds up the primary's writers (P8). Who asks while they are tight waits
//! a while for sweeps to make room.

use hn4::log::{Role, Superblock};
use hn4::types::Epoch;

use super::event::{Action, Actions, Now, RequestId, Time};
use super::volume::Volume;
use crate::arena::SlotMemory;

/// Who asks and cannot be let in waits so long for it.
const PATIENCE_MS: u64 = 10_000;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Pins {
    /// Who could not be let in yet, and since when.
    waiting: Vec<(RequestId, Time)>,
    held: usize,
    /// Raised when readers are cut off; what they give back later counts no more.
    generation: u64,
    /// A sweep was cut off before this start; the epoch that makes it good.
    torn: Option<Epoch>,
    /// Sweeps are to make room before anybody is let in.
    crowded: bool,
}

impl Pins {
    /// For a volume that is opened with this superblock.
    pub(super) fn opened(superblock: &Superblock) -> Self {
        let is_torn = superblock.swept > superblock.checkpoint;
        Self {
            torn: is_torn.then_some(superblock.swept),
            ..Self::default()
        }
    }

    /// Nobody reads, or wants to: the case for which every step asks.
    #[inline]
    pub(super) fn is_unused(&self) -> bool {
        self.held == 0 && self.waiting.is_empty()
    }

    /// Another copy takes the place of what the backing holds.
    pub(super) fn replaced(&mut self) {
        self.torn = None;
    }
}

impl Volume {
    /// Whether this copy can be read as it stands: a replica that is usable and is to stay one.
    #[must_use]
    pub fn may_be_pinned(&self) -> bool {
        let persisted = self.superblock.persisted();
        self.failed.is_none()
            && !self.stopping
            && self.drains.is_empty()
            && self.transition.is_none()
            && self.election.is_none()
            && self.role() == Role::Replica
            && persisted.copy.is_usable()
            && persisted.session == self.journal.session
    }

    /// The epoch that readers see, if there are any.
    #[must_use]
    pub fn pinned_epoch(&self) -> Option<Epoch> {
        let checkpoint = self.superblock.persisted().checkpoint;
        (self.pins.held > 0).then_some(checkpoint)
    }

    /// How many readers there are.
    #[must_use]
    pub fn readers(&self) -> usize {
        self.pins.held
    }

    /// Whether the backing may hold a part of a sweep that a crash has cut off. While a node runs
    /// `swept` is ahead of the sweeps, so it tells that only at the start.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        let checkpoint = self.superblock.persisted().checkpoint;
        self.pins.torn.is_some_and(|epoch| checkpoint < epoch)
    }

    /// Whether no sweep may begin.
    pub(super) fn is_pinned(&self) -> bool {
        self.pins.held > 0 || (!self.pins.waiting.is_empty() && !self.awaits_sweep())
    }

    /// Whether readers wait for a sweep to begin.
    pub(super) fn awaits_sweep(&self) -> bool {
        !self.pins.waiting.is_empty() && (self.pins.crowded || self.is_torn())
    }

    /// When the next of those that wait is to be turned away.
    pub(super) fn pins_deadline(&self) -> Option<Time> {
        let oldest = self.pins.waiting.first();
        oldest.map(|(_, asked)| asked.plus_ms(PATIENCE_MS))
    }

    pub(super) fn pin(&mut self, now: Now, id: RequestId) {
        self.pins.crowded &= !self.pins.is_unused();
        self.pins.waiting.push((id, now.time));
    }

    pub(super) fn unpin(&mut self, generation: u64) {
        if generation == self.pins.generation {
            self.pins.held = self.pins.held.saturating_sub(1);
        }
    }

    /// Whether log or overlay are full to so many quarters.
    fn is_full(&self, quarters: u64, mem: &dyn SlotMemory) -> bool {
        let (used, ring) = self.log_usage();
        let (held, slots) = (self.overlay.held() as u64, mem.capacity() as u64);
        used / quarters >= ring / 4
            || held / quarters >= slots / 4
            || mem.free_slots() < 2 * self.config.reserve_slots
            || self.overlay.zero_extents() * 2 >= self.config.max_zero_extents
    }

    /// Cuts readers off, and lets those in that wait.
    pub(super) fn pins_progress(&mut self, now: Now, mem: &dyn SlotMemory, out: &mut Actions) {
        let may = self.may_be_pinned();
        let tight = self.is_full(3, mem);
        let crowded = tight || (self.pins.crowded && self.is_full(2, mem));
        self.pins.crowded = crowded;
        if self.pins.held > 0 && (tight || !may) {
            self.pins.held = 0;
            self.pins.generation += 1;
            out.push(Action::PinsBroken);
        }
        let free = may && !tight && self.sweep.is_none() && !self.is_torn();
        let Pins {
            waiting,
            held,
            generation,
            ..
        } = &mut self.pins;
        waiting.retain(|&(id, asked)| {
            let late = now.time >= asked.plus_ms(PATIENCE_MS);
            let enters = free && (late || !crowded);
            *held += usize::from(enters);
            let answered = enters || late || !may;
            if answered {
                let generation = enters.then_some(*generation);
                out.push(Action::Pinned { id, generation });
            }
            !answered
        });
    }
}
