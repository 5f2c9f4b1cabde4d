//! The engine's slots, with the rules of the real arena: what a device is using can be neither
//! changed nor freed. Fresh slots are filled with rubbish, so that nobody relies on zeroes.

use std::ops::Range;

use hn4_engine::arena::{SlotId, SlotMemory, VecArena};

#[derive(Clone, Copy, Default)]
struct Pins {
    /// Operations that read the slot: writes to a disk.
    reads: u32,
    /// Operations that fill the slot: reads from a disk.
    writes: u32,
}

/// See the module.
pub(crate) struct SimMemory {
    arena: VecArena,
    pins: Vec<Pins>,
    rubbish: u8,
}

impl SimMemory {
    /// So many slots.
    #[must_use]
    pub(crate) fn new(slots: u32) -> Self {
        Self {
            arena: VecArena::new(slots),
            pins: vec![Pins::default(); slots as usize],
            rubbish: 0xA5,
        }
    }

    /// A disk starts to use the slot; `fills` if it will write into it.
    pub(crate) fn pin(&mut self, slot: SlotId, fills: bool) {
        let _ = self.arena.bytes(slot); // It must be allocated.
        let pins = &mut self.pins[slot.index()];
        *(if fills {
            &mut pins.writes
        } else {
            &mut pins.reads
        }) += 1;
    }

    /// A disk writes into the slot, which is pinned for it.
    pub(crate) fn fill(&mut self, slot: SlotId) -> &mut [u8] {
        assert!(
            self.pins[slot.index()].writes > 0,
            "disks fill what is pinned"
        );
        self.arena.bytes_mut(slot)
    }

    /// A disk is done with the slot.
    pub(crate) fn unpin(&mut self, slot: SlotId, fills: bool) {
        let pins = &mut self.pins[slot.index()];
        *(if fills {
            &mut pins.writes
        } else {
            &mut pins.reads
        }) -= 1;
    }

    fn assert_idle(&self, slot: SlotId, what: &str) {
        let pins = self.pins[slot.index()];
        assert!(
            pins.reads == 0 && pins.writes == 0,
            "slot {} is {what} while a disk uses it",
            slot.0
        );
    }
}

impl SlotMemory for SimMemory {
    fn alloc(&mut self) -> Option<SlotId> {
        let slot = self.arena.alloc()?;
        self.rubbish = self.rubbish.wrapping_add(1) | 1;
        self.arena.bytes_mut(slot).fill(self.rubbish);
        Some(slot)
    }

    fn free(&mut self, slot: SlotId) {
        self.assert_idle(slot, "freed");
        self.arena.free(slot);
    }

    fn bytes(&self, slot: SlotId) -> &[u8] {
        assert!(
            self.pins[slot.index()].writes == 0,
            "slot {} is looked at while a disk fills it",
            slot.0
        );
        self.arena.bytes(slot)
    }

    fn bytes_mut(&mut self, slot: SlotId) -> &mut [u8] {
        self.assert_idle(slot, "changed");
        self.arena.bytes_mut(slot)
    }

    fn copy(&mut self, source: SlotId, range: Range<usize>, to: SlotId, offset: usize) {
        assert!(
            self.pins[source.index()].writes == 0,
            "slot {} is copied while a disk fills it",
            source.0
        );
        self.assert_idle(to, "changed");
        self.arena.copy(source, range, to, offset);
    }

    fn free_slots(&self) -> usize {
        self.arena.free_slots()
    }

    fn capacity(&self) -> usize {
        self.arena.capacity()
    }
}
