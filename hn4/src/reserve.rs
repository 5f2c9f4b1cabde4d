//! What must never hold data although it lies in the address window: superblock copies, chronicle
//! and horizon (defect 1).
//!
//! The reference lets the trajectory land there and overwrites the data at the next heal or
//! unmount. We mark these blocks used in the bitmap (which the reference respects) and treat them
//! as collisions.

use std::ops::Range;

use crate::bitmap::Bitmap;
use crate::num::{div, round_up};
use crate::status::Region;
use crate::superblock::Superblock;
use crate::superblock::copies::{self, Cardinal};

/// A reserved range of blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reserved {
    /// What lies there.
    pub region: Region,
    /// Block indices.
    pub blocks: Range<u64>,
}

/// Everything in a volume that files must not be placed on, metadata in front of the flux region
/// included. The horizon is reserved too: only the overflow path may use it.
#[must_use]
pub fn reserved(superblock: &Superblock, sector: u64, zoned: bool) -> Vec<Reserved> {
    let block = u64::from(superblock.block_size.get());
    let capacity = superblock.total_capacity.get();
    let spb = div(block, sector).max(1);
    let blocks = div(capacity, block);
    let mut all = vec![Reserved {
        region: Region::Superblock,
        blocks: 0..superblock.lba_flux_start.get() / spb,
    }];
    for (cardinal, offset) in copies::formatted(capacity, block, zoned, u64::MAX) {
        if cardinal != Cardinal::North {
            let first = div(offset, block);
            let end = first.saturating_add(div(copies::copy_bytes(block), block));
            all.push(Reserved {
                region: Region::Superblock,
                blocks: first..end,
            });
        }
    }
    let chronicle = superblock.journal_start.get() / spb;
    let horizon = superblock.lba_horizon_start.get() / spb;
    if horizon < chronicle {
        all.push(Reserved {
            region: Region::Horizon,
            blocks: horizon..chronicle,
        });
    }
    // From the chronicle to the end nothing is left for data: the tail holds South.
    let end = div(round_up(capacity, block), block).max(blocks);
    all.push(Reserved {
        region: Region::Chronicle,
        blocks: chronicle..end,
    });
    all
}

/// True when a block is reserved.
#[must_use]
pub fn is_reserved(reserved: &[Reserved], block: u64) -> bool {
    reserved.iter().any(|range| range.blocks.contains(&block))
}

/// Marks the reserved blocks of the address window in a bitmap. The metadata in front of the flux
/// region is left as the reference leaves it: no address leads there.
pub fn mark(bitmap: &mut Bitmap, reserved: &[Reserved]) {
    for range in reserved.iter().skip(1) {
        bitmap.set_range(range.blocks.start, range.blocks.end);
    }
}
