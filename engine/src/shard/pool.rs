//! Slots that a front keeps for one use, and what it has to ask for.
//!
//! A pool counts: the slots themselves are those that are free in the front's share of the arena,
//! where those of its two pools are the same. Who asks, and whom, is in `front`.

use crate::arena::{Arena, SlotId, SlotMemory};

/// See the module.
#[derive(Default)]
pub(super) struct Pool {
    free: usize,
    /// A client waits for so many.
    needed: usize,
    /// What was asked for and has not come: the least and the most.
    asked: Option<(usize, usize)>,
}

impl Pool {
    pub(super) fn free(&self) -> usize {
        self.free
    }

    /// Slots that were freed in the arena.
    pub(super) fn put(&mut self, count: usize) {
        self.free += count;
    }

    /// The same, and they are the answer to a question.
    pub(super) fn granted(&mut self, count: usize) {
        self.asked = None;
        self.put(count);
    }

    pub(super) fn take(&mut self, count: usize, arena: &mut Arena) -> Option<Vec<SlotId>> {
        if self.free < count {
            self.needed = self.needed.max(count);
            return None;
        }
        self.free -= count;
        let slots = (0..count).map(|_| arena.alloc()).collect::<Option<_>>();
        Some(slots.expect("the pools are what is free"))
    }

    /// What to ask for now.
    pub(super) fn question(&mut self, kept: usize) -> Option<(usize, usize)> {
        let needed = std::mem::take(&mut self.needed);
        if needed <= self.free && self.free * 2 >= kept {
            return None;
        }
        let least = needed.saturating_sub(self.free).max(1);
        let most = kept.saturating_sub(self.free).max(least);
        // One that asks for less is not to take the place of another one.
        if self.asked.is_some_and(|(asked, _)| asked >= least) {
            return None;
        }
        self.asked = Some((least, most));
        self.asked
    }

    /// How many to give back; they are out of the pool.
    pub(super) fn take_surplus(&mut self, kept: usize) -> usize {
        if self.free <= 2 * kept {
            return 0;
        }
        let surplus = self.free - kept;
        self.free = kept;
        surplus
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: usize = 64;

    fn pool(free: usize) -> Pool {
        Pool {
            free,
            ..Pool::default()
        }
    }

    #[test]
    fn a_pool_asks_once_and_again_only_for_more() {
        let mut arena = Arena::new(1).expect("a page can be mapped");
        let mut pool = pool(0);
        assert_eq!(pool.question(KEPT), Some((1, KEPT)), "it is empty");
        assert_eq!(pool.question(KEPT), None, "asked already");
        assert_eq!(pool.take(100, &mut arena), None);
        assert_eq!(pool.question(KEPT), Some((100, 100)), "a client waits");
        assert_eq!(pool.take(30, &mut arena), None);
        assert_eq!(pool.question(KEPT), None, "what comes is enough for it");
        pool.granted(100);
        assert_eq!(pool.question(KEPT), None, "plenty");
        pool.free = KEPT / 2 - 1;
        assert_eq!(pool.question(KEPT), Some((1, KEPT / 2 + 1)), "filled up");
    }

    #[test]
    fn what_is_kept_is_free_in_the_arena() {
        let mut owner = Arena::new(8).expect("eight pages can be mapped");
        let slots: Vec<_> = (0..8).filter_map(|_| owner.alloc()).collect();
        let mut arena = owner.share();
        for slot in arena.borrow(owner.lend(slots)) {
            arena.free(slot);
        }
        let mut pool = pool(8);
        let taken = pool.take(3, &mut arena).map(|slots| slots.len());
        assert_eq!((taken, pool.free, arena.free_slots()), (Some(3), 5, 5));
        assert_eq!((pool.take_surplus(2), pool.free), (3, 2));
    }
}
