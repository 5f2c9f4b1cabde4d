//! Which slots are free, and whose they are.

use super::SlotId;

/// Which slots are free. Always checks, in release builds too: one bit a slot is cheap, a slot with
/// two owners is not.
pub(super) struct FreeList {
    /// Stack of free slots. A list that starts with all of them never grows; that of a share grows
    /// as slots are lent to it, to `capacity` at most.
    pub(super) free: Vec<SlotId>,
    /// Bit set: allocated.
    allocated: Box<[u64]>,
    pub(super) capacity: u32,
}

impl FreeList {
    pub(super) fn new(capacity: u32) -> Self {
        let mut list = Self::of_others(capacity);
        // Lowest on top: a fresh arena hands out ascending slots, which merge into long runs.
        list.free = (0..capacity).rev().map(SlotId).collect();
        list
    }

    /// All slots are somebody else's.
    pub(super) fn of_others(capacity: u32) -> Self {
        let words = (capacity as usize).div_ceil(64);
        Self {
            free: Vec::new(),
            allocated: vec![0; words].into_boxed_slice(),
            capacity,
        }
    }

    #[inline]
    #[track_caller]
    pub(super) fn mark(&mut self, slot: SlotId) {
        assert!(
            !self.is_allocated(slot),
            "slot {} of {} is allocated already",
            slot.0,
            self.capacity
        );
        self.allocated[slot.index() / 64] |= 1 << (slot.index() % 64);
    }

    #[inline]
    pub(super) fn clear(&mut self, slot: SlotId) {
        self.allocated[slot.index() / 64] &= !(1 << (slot.index() % 64));
    }

    #[inline]
    pub(super) fn is_allocated(&self, slot: SlotId) -> bool {
        slot.0 < self.capacity && self.allocated[slot.index() / 64] >> (slot.index() % 64) & 1 == 1
    }

    #[inline]
    #[track_caller]
    pub(super) fn assert_allocated(&self, slot: SlotId) {
        assert!(
            self.is_allocated(slot),
            "slot {} of {} is not allocated",
            slot.0,
            self.capacity
        );
    }

    #[inline]
    pub(super) fn alloc(&mut self) -> Option<SlotId> {
        let slot = self.free.pop()?;
        self.mark(slot);
        Some(slot)
    }

    #[inline]
    #[track_caller]
    pub(super) fn assert_freeable(&self, slot: SlotId) {
        assert!(
            self.is_allocated(slot),
            "slot {} of {} freed twice or never allocated",
            slot.0,
            self.capacity
        );
    }

    #[inline]
    #[track_caller]
    pub(super) fn free(&mut self, slot: SlotId) {
        self.assert_freeable(slot);
        self.clear(slot);
        self.free.push(slot);
    }
}
