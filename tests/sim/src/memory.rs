//! The engine's slots, with the rules of the real arena: what a device is using can be neither
//! changed nor freed. Fresh slots are filled with rubbish, so that nobody relies on zeroes.

use std::ops::Range;

use hn4_engine::arena::{SLOT_BYTES, SlotId, SlotMemory};

use crate::disk::SECTOR;
use crate::pages::Pages;

/// Bytes of rubbish at both ends of each sector of a fresh slot.
const RUBBISH: usize = 32;

#[derive(Clone, Copy, Default)]
struct Pins {
    /// Operations that read the slot: writes to a disk.
    reads: u32,
    /// Operations that fill the slot: reads from a disk.
    writes: u32,
}

/// See the module.
pub(crate) struct SimMemory {
    bytes: Pages,
    /// Stack of free slots; fresh memory hands out ascending ones.
    free: Vec<SlotId>,
    allocated: Vec<bool>,
    pins: Vec<Pins>,
    rubbish: u8,
}

impl SimMemory {
    /// So many slots.
    #[must_use]
    pub(crate) fn new(slots: u32) -> Self {
        Self {
            bytes: Pages::new(slots as usize * SLOT_BYTES),
            free: (0..slots).rev().map(SlotId).collect(),
            allocated: vec![false; slots as usize],
            pins: vec![Pins::default(); slots as usize],
            rubbish: 0xA5,
        }
    }

    /// A disk starts to use the slot; `fills` if it will write into it.
    pub(crate) fn pin(&mut self, slot: SlotId, fills: bool) {
        let _ = self.range(slot); // It must be allocated.
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
        let range = self.range(slot);
        self.bytes.change(range)
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

    fn range(&self, slot: SlotId) -> Range<usize> {
        assert!(self.allocated[slot.index()], "slot {} is free", slot.0);
        slot.index() * SLOT_BYTES..(slot.index() + 1) * SLOT_BYTES
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
        let slot = self.free.pop()?;
        self.allocated[slot.index()] = true;
        self.rubbish = self.rubbish.wrapping_add(1) | 1;
        // Some of each sector is enough: a sector that holds any of it is no client's.
        let (rubbish, range) = (self.rubbish, self.range(slot));
        for sector in self.bytes.change(range).chunks_exact_mut(SECTOR) {
            sector[..RUBBISH].fill(rubbish);
            sector[SECTOR - RUBBISH..].fill(rubbish);
        }
        Some(slot)
    }

    fn free(&mut self, slot: SlotId) {
        self.assert_idle(slot, "freed");
        let _ = self.range(slot); // It must be allocated.
        self.allocated[slot.index()] = false;
        self.free.push(slot);
    }

    fn bytes(&self, slot: SlotId) -> &[u8] {
        assert!(
            self.pins[slot.index()].writes == 0,
            "slot {} is looked at while a disk fills it",
            slot.0
        );
        &self.bytes.all()[self.range(slot)]
    }

    fn bytes_mut(&mut self, slot: SlotId) -> &mut [u8] {
        self.assert_idle(slot, "changed");
        let range = self.range(slot);
        self.bytes.change(range)
    }

    fn copy(&mut self, source: SlotId, range: Range<usize>, to: SlotId, offset: usize) {
        assert!(
            self.pins[source.index()].writes == 0,
            "slot {} is copied while a disk fills it",
            source.0
        );
        self.assert_idle(to, "changed");
        assert!(range.end <= SLOT_BYTES && offset + range.len() <= SLOT_BYTES);
        let (from, to) = (self.range(source).start, self.range(to).start);
        self.bytes
            .copy(from + range.start..from + range.end, to + offset);
    }

    fn free_slots(&self) -> usize {
        self.free.len()
    }

    fn capacity(&self) -> usize {
        self.allocated.len()
    }
}
