//! Re-projection: finding blocks of files whose bitmap bits were lost in a crash.
//!
//! The work is bounded by the size of the volume, whatever the anchors claim.

use crate::address::{Geometry, Path, Space};
use crate::anchor::{Anchor, class};
use crate::bitmap::Bitmap;
use crate::block::{BlockHeader, HEADER_BYTES};
use crate::cortex;
use crate::crc::crc32;
use crate::num::{index, low32};
use crate::plan::Medium;
use crate::status::Region;
use crate::superblock::Superblock;

/// Orbits that are looked at: the reference leaves out k = 12 (defect 6).
const ORBITS: u8 = 12;

/// Sets the bits of blocks that belong to live files; returns how many were missing.
pub(super) fn reproject(medium: &Medium<'_>, superblock: &Superblock, bitmap: &mut Bitmap) -> u64 {
    let geometry = Geometry::of(superblock, low32(medium.device.sector()));
    let payload = u64::from(superblock.block_size.get()).saturating_sub(HEADER_BYTES);
    let mut budget = geometry.blocks();
    let mut found = 0;
    cortex::scan(medium, superblock, |_, anchor| {
        let skipped = class::HORIZON | class::NANO;
        if !anchor.is_live() || anchor.mass.get() == 0 || anchor.data_class.get() & skipped != 0 {
            return true;
        }
        let Some(space) = Space::new(&geometry, anchor.fractal_scale.get()) else {
            return true;
        };
        let path = Path::new(space, anchor.gravity_center.get(), anchor.v());
        for n in 0..anchor.logical_blocks(payload).min(budget) {
            found += u64::from(settle(medium, superblock, bitmap, anchor, &path, n));
        }
        budget = budget.saturating_sub(anchor.logical_blocks(payload));
        budget > 0
    });
    found
}

/// Looks for block `n` of a file; true when it was there and its bit was not.
fn settle(
    medium: &Medium<'_>,
    superblock: &Superblock,
    bitmap: &mut Bitmap,
    anchor: &Anchor,
    path: &Path,
    n: u64,
) -> bool {
    let block_size = u64::from(superblock.block_size.get());
    for k in 0..ORBITS {
        let block = path.block(n, k);
        if !path.space().contains(block) {
            continue;
        }
        let used = bitmap.is_used(block);
        if used && k == 0 {
            return false;
        }
        let mut head = vec![0; index(HEADER_BYTES)];
        let offset = block * block_size;
        if medium.read(Region::Flux, offset, &mut head).is_err() {
            continue;
        }
        let Some(header) = BlockHeader::from_bytes(&head) else {
            continue;
        };
        if !header.claims(anchor.seed(), n) {
            continue;
        }
        if used {
            return false;
        }
        let current = header.generation.get() == u64::from(anchor.write_gen.get());
        if current && payload_is_sound(medium, offset, block_size, &header) {
            bitmap.set(block, true);
            return true;
        }
    }
    false
}

fn payload_is_sound(
    medium: &Medium<'_>,
    offset: u64,
    block_size: u64,
    header: &BlockHeader,
) -> bool {
    let mut payload = vec![0; index(block_size.saturating_sub(HEADER_BYTES))];
    medium
        .read(Region::Flux, offset + HEADER_BYTES, &mut payload)
        .is_ok()
        && crc32(0, &payload) == header.data_crc.get()
}
