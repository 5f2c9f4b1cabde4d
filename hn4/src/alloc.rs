//! Choosing the place of a block: the first orbit whose block is free, and claiming it.
//!
//! Claim and write are one step: the reference claims (N = 0, k = 0) when a file is made and then
//! finds its own claim in the way of the first write (defect 7). Reserved blocks are collisions
//! (defect 1).
//= HN4_SPEC 3.3

use crate::address::Path;
use crate::anchor::Anchor;
use crate::bitmap::Bitmap;
use crate::num::low32;
use crate::reserve::{Reserved, is_reserved};

/// Hints count 16 clusters of 16 blocks.
const HINTED_BLOCKS: u64 = 256;

/// Claims a block for logical block `n`: marks it in the bitmap and returns its orbit and index.
/// `None` when no orbit up to `limit` is free.
pub fn claim(
    path: &Path,
    n: u64,
    limit: u8,
    bitmap: &mut Bitmap,
    reserved: &[Reserved],
) -> Option<(u8, u64)> {
    let free = (0..=limit)
        .map(|k| (k, path.block(n, k)))
        .find(|&(_, block)| {
            path.space().contains(block) && !bitmap.is_used(block) && !is_reserved(reserved, block)
        });
    if let Some((_, block)) = free {
        bitmap.set(block, true);
    }
    free
}

/// Records the orbit of block `n` in an anchor's hints, where they can say it: for the first 256
/// blocks and orbits up to 3. Blocks of one cluster share a hint (defect 6); readers search.
pub fn record_orbit(anchor: &mut Anchor, n: u64, k: u8) {
    if n >= HINTED_BLOCKS || k > 3 {
        return;
    }
    let shift = 2 * low32(n >> 4);
    let hints = anchor.orbit_hints.get() & !(3 << shift);
    anchor.orbit_hints = (hints | u32::from(k) << shift).into();
}
