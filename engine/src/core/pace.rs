//! How fast writers may take the room that is left, so that there is no cliff.
//!
//! Slots come back when a sweep is done, all at once. Writers who may take them at once do so, and
//! then wait for as long as the whole next sweep takes. So where the overlay is tight, a sweep lets
//! writers have room in the measure in which it writes back: what they wait for is a few writes to
//! the backing, always. Nothing here looks at a clock.
//!
//! **Invariant:** room is held back only while a sweep is under way or about to begin, since its
//! end is an event that lets the room go.

use super::volume::Volume;
use crate::arena::SlotMemory;

/// The overlay is tight when less than this part of what writers may have is free.
const TIGHT: usize = 4;
/// Of what a sweep gives back, this part is let go while the state tree takes its leaves.
const FIRST_PART: usize = 8;
/// And this part when all is written: for the time that the flush and the superblock take.
const LAST_PART: usize = 16;

/// What a sweep found when it was planned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pace {
    /// Slots that writers could have taken, as far as that was tight.
    room: usize,
    /// Slots that are free again when it is done.
    frees: usize,
    /// What of that is let go before it writes.
    first: usize,
}

/// How far a sweep is: so many of its parts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    Hashing(usize, usize),
    Writing(usize, usize),
    Written,
}

/// Slots that writers may have: free ones, and all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Writable {
    free: usize,
    all: usize,
}

impl Writable {
    fn is_tight(self) -> bool {
        self.free <= self.all / TIGHT
    }
}

impl Pace {
    /// For a sweep that gives so many slots back. `hashed`: it waits for a tree first.
    pub(super) fn new(frees: usize, slots: Writable, hashed: bool) -> Self {
        Self {
            room: slots.free.min(slots.all / TIGHT),
            frees,
            first: if hashed { frees / FIRST_PART } else { 0 },
        }
    }

    /// What writers must leave now. They may take what the sweep will give back, and no more.
    fn held_back(self, stage: Stage) -> usize {
        let share = |of: usize, (done, parts): (usize, usize)| of * done / parts.max(1);
        let given = match stage {
            Stage::Hashing(done, parts) => share(self.first, (done, parts)),
            Stage::Writing(done, parts) => {
                let then = self.frees - self.first - self.frees / LAST_PART;
                self.first + share(then, (done, parts))
            }
            Stage::Written => self.frees,
        };
        self.room.saturating_sub(given)
    }
}

impl Volume {
    /// Whether slots for a write of so many blocks may be taken now.
    #[must_use]
    pub fn has_room(&self, mem: &dyn SlotMemory, blocks: usize) -> bool {
        if self.is_proof_lagging() || mem.free_slots() < blocks + self.config.reserve_slots {
            return false;
        }
        let slots = self.writable_slots(mem);
        // A large request may take more than is let go yet; then the next one waits for longer.
        blocks == 0 || !slots.is_tight() || slots.free > self.held_back()
    }

    pub(super) fn writable_slots(&self, mem: &dyn SlotMemory) -> Writable {
        let left = |slots: usize| slots.saturating_sub(self.config.reserve_slots);
        Writable {
            free: left(mem.free_slots()),
            all: left(mem.capacity()),
        }
    }

    fn held_back(&self) -> usize {
        match &self.sweep {
            Some(sweep) => sweep.pace.held_back(sweep.stage(self.tree.handed())),
            None if self.awaits_superblock_to_sweep() => usize::MAX,
            None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: usize = 6400;

    fn pace(frees: usize, free: usize, hashed: bool) -> Pace {
        Pace::new(frees, Writable { free, all: ALL }, hashed)
    }

    #[test]
    fn room_is_let_go_as_the_sweep_writes() {
        let plenty = pace(1600, 5000, false);
        assert_eq!(plenty.room, 1600, "a quarter, although more is free");
        let held = [0, 500, 1000].map(|done| plenty.held_back(Stage::Writing(done, 1000)));
        assert_eq!(held, [1600, 850, 100]);
        assert_eq!(plenty.held_back(Stage::Written), 0);
        // It gives back more than what is left: no more than that is held.
        let full = pace(1600, 400, false);
        let held = [0, 100, 500].map(|done| full.held_back(Stage::Writing(done, 1000)));
        assert_eq!(held, [400, 250, 0]);
        // It gives back little: the rest stays for later.
        assert_eq!(pace(32, 400, false).held_back(Stage::Written), 368);
    }

    #[test]
    fn a_part_is_let_go_while_a_tree_takes_its_leaves() {
        let hashed = pace(1600, 1600, true);
        let held = [0, 500, 1000].map(|done| hashed.held_back(Stage::Hashing(done, 1000)));
        assert_eq!(held, [1600, 1500, 1400]);
        let held = [0, 500, 1000].map(|done| hashed.held_back(Stage::Writing(done, 1000)));
        assert_eq!(held, [1400, 750, 100]);
        assert_eq!(hashed.held_back(Stage::Written), 0);
    }
}
