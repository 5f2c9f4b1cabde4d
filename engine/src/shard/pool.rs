//! Slots that a front keeps for one use, and what it has to ask for.
//!
//! A pool counts: the slots themselves are those that are free in the front's share of the arena,
//! where those of its two pools are the same. Who asks, and whom, is in `front`.

use crate::arena::{Arena, SlotId, SlotMemory};

/// See the module.
#[derive(Default)]
pub(super) struct Pool {
    free: usize,
    /// Of the requests for which there were too few in this turn, what the largest needs.
    largest: usize,
    /// And what all of them need.
    sum: usize,
    /// What was asked for and has not come: the least, and what all needed then.
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

    /// Slots for a request of this turn, each of which asks once.
    pub(super) fn take(&mut self, count: usize, arena: &mut Arena) -> Option<Vec<SlotId>> {
        if self.free < count {
            self.largest = self.largest.max(count);
            self.sum += count;
            return None;
        }
        self.free -= count;
        let slots = (0..count).map(|_| arena.alloc()).collect::<Option<_>>();
        Some(slots.expect("the pools are what is free"))
    }

    /// What to ask for at the end of a turn: the least, with which one client can go on whichever
    /// it is, and the most, with which all can.
    pub(super) fn question(&mut self, kept: usize) -> Option<(usize, usize)> {
        let largest = std::mem::take(&mut self.largest);
        let sum = std::mem::take(&mut self.sum);
        if largest <= self.free && self.free * 2 >= kept {
            return None;
        }
        let least = largest.saturating_sub(self.free).max(1);
        let most = kept.max(sum).saturating_sub(self.free).max(least);
        // One that asks for no more is not to take the place of another one.
        let covers = |(asked, all)| asked >= least && all >= sum;
        if self.asked.is_some_and(covers) {
            return None;
        }
        self.asked = Some((least, sum));
        Some((least, most))
    }

    /// How many to give back, none while a client is short of them; they are out of the pool. To
    /// be called before the turn's [`Self::question`].
    pub(super) fn take_surplus(&mut self, kept: usize) -> usize {
        if self.free <= 2 * kept || self.largest > self.free {
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
        assert_eq!(pool.take(100, &mut arena), None);
        assert_eq!(pool.take(30, &mut arena), None);
        assert_eq!(pool.question(KEPT), Some((100, 130)), "for both");
        assert_eq!(pool.take(100, &mut arena), None);
        assert_eq!(pool.question(KEPT), None, "one of them has left");
        pool.granted(100);
        assert_eq!(pool.question(KEPT), None, "plenty");
        pool.free = KEPT / 2 - 1;
        assert_eq!(pool.question(KEPT), Some((1, KEPT / 2 + 1)), "filled up");
    }

    #[test]
    fn nothing_goes_back_while_a_client_is_short_of_it() {
        let mut arena = Arena::new(1).expect("a page can be mapped");
        let mut pool = pool(3 * KEPT);
        assert_eq!(pool.take(4 * KEPT, &mut arena), None);
        assert_eq!(pool.take_surplus(KEPT), 0);
        assert_eq!(pool.question(KEPT), Some((KEPT, KEPT)));
        assert_eq!(pool.take_surplus(KEPT), 2 * KEPT, "it has left");
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
