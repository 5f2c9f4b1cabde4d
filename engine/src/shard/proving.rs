//! Frames for the prover, whose payload stays where it is while it is hashed.
//!
//! Hashing takes another thread. What it looks at is neither copied nor changed: the arena lets it
//! have a view of the slots, and has those that the core frees meanwhile back when it is done.

use crate::arena::{Arena, SlotId, SlotMemory, View};
use crate::core::frame_in;

/// Shorter payloads are copied: that costs less than giving slots back.
const VIEW_LEAST_SLOTS: usize = 16;
/// The prover has at most this part of the slots: writers must not wait for one that is slow.
const VIEW_PART: usize = 16;

/// A frame for the prover.
#[derive(Debug)]
pub enum ProofFrame {
    /// Read back from the log.
    Read(Vec<u8>),
    /// Copied in memory.
    Copied(Vec<u8>),
    /// A copy of its head, and the payload where it lies.
    InPlace {
        /// All blocks of the head, without stamp.
        head: Vec<u8>,
        /// The payload, a block each.
        payload: View,
    },
}

impl ProofFrame {
    /// The durable frame in these slots.
    pub(super) fn new(head: &[SlotId], payload: Vec<SlotId>, arena: &mut Arena) -> Self {
        let most = arena.capacity() / VIEW_PART;
        if payload.len() < VIEW_LEAST_SLOTS || arena.viewed() + payload.len() > most {
            return Self::Copied(frame_in(head, &payload, arena));
        }
        let head = frame_in(head, &[], arena);
        let payload = arena.view(payload);
        Self::InPlace { head, payload }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::SLOT_BYTES;

    const SLOTS: u32 = 1024;
    const MOST: usize = SLOTS as usize / VIEW_PART;

    /// The slots of a frame whose blocks are numbered, the head first.
    fn frame(blocks: usize, arena: &mut Arena) -> (SlotId, Vec<SlotId>) {
        let mut slot = |number: usize| {
            let slot = arena.alloc().expect("free");
            arena.bytes_mut(slot).fill(number.to_le_bytes()[0]);
            slot
        };
        (slot(0), (1..=blocks).map(&mut slot).collect())
    }

    fn blocks(frame: &ProofFrame) -> Vec<[u8; SLOT_BYTES]> {
        let copied = |bytes: &[u8]| bytes.as_chunks().0.to_vec();
        match frame {
            ProofFrame::Read(bytes) | ProofFrame::Copied(bytes) => copied(bytes),
            ProofFrame::InPlace { head, payload } => {
                let mut all = copied(head);
                all.extend(payload.blocks());
                all
            }
        }
    }

    #[test]
    fn short_frames_are_copied_and_long_ones_stay_where_they_are() {
        let mut arena = Arena::new(SLOTS).expect("memory");
        for (length, in_place) in [(1, false), (15, false), (16, true), (MOST, true)] {
            let (head, payload) = frame(length, &mut arena);
            let frame = ProofFrame::new(&[head], payload, &mut arena);
            assert_eq!(matches!(frame, ProofFrame::InPlace { .. }), in_place);
            let found = blocks(&frame);
            assert_eq!(found.len(), length + 1);
            for (number, block) in found.iter().enumerate() {
                assert_eq!(block[SLOT_BYTES - 1], number.to_le_bytes()[0]);
            }
            drop(frame);
            arena.take_back();
        }
    }

    #[test]
    fn a_slow_prover_has_a_part_of_the_memory_and_gets_copies_then() {
        let mut arena = Arena::new(SLOTS).expect("memory");
        let mut held = Vec::new();
        for _ in 0..8 {
            let (head, payload) = frame(20, &mut arena);
            let frame = ProofFrame::new(&[head], payload.clone(), &mut arena);
            held.push(frame);
            // The core is done with it.
            payload.iter().for_each(|&slot| arena.free(slot));
            arena.free(head);
        }
        let in_place = |frame: &ProofFrame| matches!(frame, ProofFrame::InPlace { .. });
        assert_eq!(held.iter().filter(|frame| in_place(frame)).count(), 3);
        assert_eq!(arena.free_slots(), arena.capacity() - 60);
        assert!(arena.viewed() <= MOST);
        held.clear();
        assert!(arena.take_back());
        assert_eq!(arena.free_slots(), arena.capacity());
    }
}
