//! Slots that a front keeps for one use, and what it has to ask for.
//!
//! A pool counts: the slots themselves are those that are free in the front's share of the arena,
//! where those of its two pools are the same. Who asks, and whom, is in `front`.

use crate::arena::{Arena, SlotId, SlotMemory};

/// Most slots that a pool keeps: 1 MiB.
const KEPT: usize = 256;
/// Of the overlay the pools for writes of all fronts keep at most this part, and those for reads as
/// much. While there are requests on their way they may be twice as full, and more as long as a
/// client waits for a large one.
const KEPT_PART: usize = 32;
/// And of what writes may not take those for reads keep at most this part. Half of it is for reads:
/// where writers have used up all else, fronts without a request leave as much to the others.
const RESERVE_PART: usize = 4;

/// Slots that the pools of each front keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Kept {
    pub(super) writes: usize,
    pub(super) reads: usize,
}

impl Kept {
    /// For so many fronts of a volume that has so many slots, of which writes may not take some.
    pub(super) fn new(slots: usize, reserve: usize, fronts: usize) -> Self {
        let fronts = fronts.max(1);
        let writes = KEPT.min(slots / KEPT_PART / fronts);
        let reads = writes.min(reserve / RESERVE_PART / fronts);
        Self { writes, reads }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Pool {
    free: usize,
    /// Requests with slots of it that are on their way to the other thread and back.
    out: usize,
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

    /// A request with slots of it is on its way.
    pub(super) fn sent(&mut self) {
        self.out += 1;
    }

    /// It has been answered.
    pub(super) fn answered(&mut self) {
        let out = self.out.checked_sub(1);
        self.out = out.expect("a request is answered once");
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

    /// How many to give back; they are out of the pool. None while a client is short of them,
    /// unless nothing is on its way: two fronts of which each waits for what the other one has
    /// would wait for ever. To be called before the turn's [`Self::question`].
    pub(super) fn take_surplus(&mut self, kept: usize) -> usize {
        let is_short = self.largest > self.free;
        let limit = if self.out == 0 { kept } else { 2 * kept };
        if self.free <= limit || (is_short && self.out > 0) {
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
        pool.sent();
        assert_eq!(pool.take(4 * KEPT, &mut arena), None);
        assert_eq!(pool.take_surplus(KEPT), 0);
        assert_eq!(pool.question(KEPT), Some((KEPT, KEPT)));
        assert_eq!(pool.take_surplus(KEPT), 2 * KEPT, "it has left");
    }

    #[test]
    fn two_pools_that_have_half_of_what_each_needs_do_not_wait_for_each_other() {
        let mut arena = Arena::new(1).expect("a page can be mapped");
        let mut pool = pool(3 * KEPT);
        pool.sent();
        assert_eq!(pool.take(4 * KEPT, &mut arena), None);
        assert_eq!(pool.take_surplus(KEPT), 0, "something will come back");
        assert_eq!(pool.question(KEPT), Some((KEPT, KEPT)));
        pool.answered();
        assert_eq!(pool.take(4 * KEPT, &mut arena), None);
        assert_eq!(pool.take_surplus(KEPT), 2 * KEPT);
        assert_eq!(pool.question(KEPT), Some((3 * KEPT, 3 * KEPT)), "for more");
    }

    #[test]
    fn what_is_kept_without_requests_is_a_small_part_of_the_overlay() {
        let mut pool = pool(2 * KEPT);
        pool.sent();
        assert_eq!(pool.take_surplus(KEPT), 0, "they may be needed at once");
        pool.answered();
        assert_eq!((pool.take_surplus(KEPT), pool.free), (KEPT, KEPT));
        assert_eq!(pool.take_surplus(KEPT), 0);
        for (slots, reserve) in [(64, 8), (4096, 512), (1 << 16, 4096), (1 << 24, 4096)] {
            for fronts in 1..64 {
                let Kept { writes, reads } = Kept::new(slots, reserve, fronts);
                assert!(writes * fronts <= slots / 32 && writes <= 256);
                assert!(reads * fronts <= reserve / 4 && reads <= writes);
            }
        }
        let usual = Kept {
            writes: 256,
            reads: 256,
        };
        assert_eq!(Kept::new(1 << 16, 4096, 3), usual);
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
