//! Readers of a replica: while somebody reads it, its backing stays at one epoch.
//!
//! Between two sweeps the backing of a usable copy is an exact epoch. A reader pins it: no sweep
//! begins until the last reader is gone, and reads pass by the overlay. What arrives meanwhile
//! waits in log and overlay. After a crash in a sweep the backing is a mix until that sweep was
//! done again: who asks before that waits, and hurries it. When log or overlay get tight, or the
//! node is to be more than a replica, or is told to drain or to stop, the readers are cut off:
//! nobody who only reads holds up the primary's writers (P8).

use hn4::log::{Role, Superblock};
use hn4::types::Epoch;

use super::event::{Action, Actions, RequestId};
use super::volume::Volume;
use crate::arena::SlotMemory;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Pins {
    /// A sweep was under way when they asked.
    waiting: Vec<RequestId>,
    held: usize,
    /// Raised when readers are cut off; what they give back later counts no more.
    generation: u64,
    /// A sweep was cut off before this start; the epoch that makes it good.
    torn: Option<Epoch>,
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
    fn is_torn(&self) -> bool {
        let checkpoint = self.superblock.persisted().checkpoint;
        self.pins.torn.is_some_and(|epoch| checkpoint < epoch)
    }

    /// Whether no sweep may begin.
    pub(super) fn is_pinned(&self) -> bool {
        self.pins.held > 0 || (!self.pins.waiting.is_empty() && !self.is_torn())
    }

    /// Whether readers wait for a sweep to begin.
    pub(super) fn awaits_sweep(&self) -> bool {
        !self.pins.waiting.is_empty() && self.is_torn()
    }

    pub(super) fn pin(&mut self, id: RequestId, out: &mut Actions) {
        if self.may_be_pinned() {
            self.pins.waiting.push(id);
        } else {
            let generation = None;
            out.push(Action::Pinned { id, generation });
        }
    }

    pub(super) fn unpin(&mut self, generation: u64) {
        if generation == self.pins.generation {
            self.pins.held = self.pins.held.saturating_sub(1);
        }
    }

    fn is_tight(&self, mem: &dyn SlotMemory) -> bool {
        let (used, ring) = self.log_usage();
        used / 3 >= ring / 4
            || self.overlay.held() / 3 >= mem.capacity() / 4
            || mem.free_slots() < 2 * self.config.reserve_slots
            || self.overlay.zero_extents() * 2 >= self.config.max_zero_extents
    }

    pub(super) fn pins_progress(&mut self, mem: &dyn SlotMemory, out: &mut Actions) {
        if self.pins.held == 0 && self.pins.waiting.is_empty() {
            return;
        }
        if !self.may_be_pinned() || self.is_tight(mem) {
            self.pins.held = 0;
            self.pins.generation += 1;
            for id in self.pins.waiting.drain(..) {
                let generation = None;
                out.push(Action::Pinned { id, generation });
            }
            return out.push(Action::PinsBroken);
        }
        if self.sweep.is_none() && !self.is_torn() {
            self.pins.held += self.pins.waiting.len();
            for id in self.pins.waiting.drain(..) {
                let generation = Some(self.pins.generation);
                out.push(Action::Pinned { id, generation });
            }
        }
    }
}
