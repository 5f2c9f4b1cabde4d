//! What a client needs of the thread that serves it: a ring, memory, and somebody to ask.
//!
//! A client lives on the thread that has the volume (`engine`), or on one of those that only serve
//! clients and ask that one (`front`).

use super::client::{Asked, StatusAsked};
use crate::arena::{Arena, SlotId, SlotMemory};
use crate::core::event::{Failure, Request};
use crate::nbd::reply::Extent;
use crate::ring::{Ring, Seg};

/// See the module.
pub(super) trait Host {
    /// The ring, and scratch for the segments of a transfer.
    fn wire(&mut self) -> (&mut Ring, &mut Vec<Seg>);

    /// Whether writes are taken. What passes here may be refused by the core all the same.
    fn accepts_writes(&self) -> Result<(), Failure>;

    /// Whether a write of so many blocks, whose slots are filled, may be handed over now.
    fn admits_now(&self, blocks: usize) -> bool;

    /// Slots for a write, if there is room for it. If not, the client asks again after an event.
    fn alloc_for_write(&mut self, count: usize) -> Option<Vec<SlotId>>;

    /// Slots for a read, as above.
    fn alloc_for_read(&mut self, count: usize) -> Option<Vec<SlotId>>;

    /// Asks the core on behalf of a client.
    fn request(&mut self, asked: Asked, request: Request);

    /// What a part of the volume holds; `None`: that is told later.
    fn extents(&mut self, asked: StatusAsked) -> Option<Vec<Extent>>;

    /// Gives a replica's client's pin back.
    fn unpin(&mut self, generation: u64);

    /// The slots.
    fn mem(&mut self) -> &mut Arena {
        self.wire().0.arena_mut()
    }

    /// Gives slots back.
    fn free_slots(&mut self, slots: &[SlotId]) {
        for &slot in slots {
            self.mem().free(slot);
        }
    }
}
