//! Walking over the cortex: all anchors, and the one of a seed.
//= HN4_SPEC 3.6, 8

use crate::anchor::{ANCHOR_BYTES, Anchor, Seed, probe_slots};
use crate::num::{index, round_down};
use crate::plan::Medium;
use crate::status::Region;
use crate::superblock::Superblock;

/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;

/// Byte range of the cortex.
#[must_use]
pub fn range(superblock: &Superblock, sector: u64) -> (u64, u64) {
    let start = superblock.lba_cortex_start.get().saturating_mul(sector);
    (
        start,
        superblock
            .lba_bitmap_start
            .get()
            .saturating_mul(sector)
            .max(start),
    )
}

/// Anchor slots in the cortex.
#[must_use]
pub fn slots(superblock: &Superblock, sector: u64) -> u64 {
    let (start, end) = range(superblock, sector);
    (end - start) / ANCHOR_BYTES
}

/// Calls `visit` with each slot that holds a sound anchor, until it returns false. Parts that
/// cannot be read are passed over.
pub fn scan(
    medium: &Medium<'_>,
    superblock: &Superblock,
    mut visit: impl FnMut(u64, &Anchor) -> bool,
) {
    let (start, end) = range(superblock, medium.device.sector());
    let end = end.min(medium.device.capacity);
    let mut buffer = vec![0; index(CHUNK)];
    let mut offset = start;
    while offset < end {
        let Some(next) = medium.next_data(offset) else {
            return;
        };
        offset = offset.max(start + round_down(next - start, CHUNK));
        if offset >= end {
            return;
        }
        let part = &mut buffer[..index(CHUNK.min(end - offset))];
        if medium.read(Region::Cortex, offset, part).is_ok() {
            for (bytes, place) in part.chunks_exact(index(ANCHOR_BYTES)).zip(0_u64..) {
                let Some(anchor) = Anchor::from_bytes(bytes) else {
                    continue;
                };
                let slot = (offset - start) / ANCHOR_BYTES + place;
                if !anchor.is_empty_slot() && anchor.is_sound() && !visit(slot, &anchor) {
                    return;
                }
            }
        }
        offset += CHUNK;
    }
}

/// The newest sound anchor of a seed and its slot, by probing from its home slot. The root is slot
/// 0.
#[must_use]
pub fn find(medium: &Medium<'_>, superblock: &Superblock, seed: Seed) -> Option<(u64, Anchor)> {
    let (start, _) = range(superblock, medium.device.sector());
    let read = |slot: u64| {
        let mut bytes = vec![0; index(ANCHOR_BYTES)];
        medium
            .read(Region::Cortex, start + slot * ANCHOR_BYTES, &mut bytes)
            .ok()?;
        Anchor::from_bytes(&bytes)
    };
    if seed == Seed::ROOT {
        return read(0).filter(Anchor::is_sound).map(|anchor| (0, anchor));
    }
    let mut best: Option<(u64, Anchor)> = None;
    for slot in probe_slots(seed, slots(superblock, medium.device.sector())) {
        let Some(anchor) = read(slot) else { continue };
        if anchor.is_empty_slot() {
            break;
        }
        let newer = best.is_none_or(|(_, known)| anchor.is_newer_than(&known));
        if anchor.seed() == seed && anchor.is_sound() && newer {
            best = Some((slot, anchor));
        }
    }
    best
}
