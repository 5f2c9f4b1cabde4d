//! Readers of a replica: while somebody reads it, its backing stays at one epoch.
//!
//! Between two sweeps the backing of a usable copy is an exact epoch. A reader pins it: no sweep
//! begins until the last reader is gone, and reads pass by the overlay. What arrives meanwhile
//! waits in log and overlay. When these get tight, or the node is to be more than a replica, or is
//! told to drain or to stop, the readers are cut off: nobody who only reads holds up the primary's
//! writers (P8).

use hn4::log::Role;
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

    /// Whether no sweep may begin.
    pub(super) fn is_pinned(&self) -> bool {
        self.pins.held > 0 || !self.pins.waiting.is_empty()
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
        if !self.is_pinned() {
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
        if self.sweep.is_none() {
            self.pins.held += self.pins.waiting.len();
            for id in self.pins.waiting.drain(..) {
                let generation = Some(self.pins.generation);
                out.push(Action::Pinned { id, generation });
            }
        }
    }
}
