//! Slots in plain memory, for simulation and tests.

use std::ops::Range;

use super::list::FreeList;
use super::{SLOT_BYTES, SlotId, SlotMemory};

/// Slots in plain memory, with the same checks: for the simulator and for tests.
pub struct VecArena {
    memory: Vec<u8>,
    list: FreeList,
}

impl VecArena {
    /// `slots` slots of zeroes.
    #[must_use]
    pub fn new(slots: u32) -> Self {
        Self {
            memory: vec![0; slots as usize * SLOT_BYTES],
            list: FreeList::new(slots),
        }
    }
}

impl SlotMemory for VecArena {
    fn alloc(&mut self) -> Option<SlotId> {
        self.list.alloc()
    }

    fn free(&mut self, slot: SlotId) {
        self.list.free(slot);
    }

    fn bytes(&self, slot: SlotId) -> &[u8] {
        self.list.assert_allocated(slot);
        &self.memory[slot.index() * SLOT_BYTES..][..SLOT_BYTES]
    }

    fn bytes_mut(&mut self, slot: SlotId) -> &mut [u8] {
        self.list.assert_allocated(slot);
        &mut self.memory[slot.index() * SLOT_BYTES..][..SLOT_BYTES]
    }

    fn copy(
        &mut self,
        source: SlotId,
        source_range: Range<usize>,
        destination: SlotId,
        destination_offset: usize,
    ) {
        self.list.assert_allocated(source);
        self.list.assert_allocated(destination);
        let len = source_range.len();
        assert!(
            source_range.end <= SLOT_BYTES,
            "source range leaves slot {}",
            source.0
        );
        assert!(
            destination_offset <= SLOT_BYTES && len <= SLOT_BYTES - destination_offset,
            "bytes {destination_offset}+{len} leave slot {}",
            destination.0
        );
        let start = source.index() * SLOT_BYTES + source_range.start;
        let to = destination.index() * SLOT_BYTES + destination_offset;
        self.memory.copy_within(start..start + len, to);
    }

    fn free_slots(&self) -> usize {
        self.list.free.len()
    }

    fn capacity(&self) -> usize {
        self.list.capacity as usize
    }
}
