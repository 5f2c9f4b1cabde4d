//! The inverse of an address: which file and block, or which region, is at an LBA.

use super::Volume;
use crate::address::{MAX_ORBIT, Path, Space};
use crate::anchor::{ANCHOR_BYTES, Anchor, Seed, class};
use crate::num::{div, index};
use crate::status::Region;
use crate::superblock::copies::{self, Cardinal};

/// What is at an LBA.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Which {
    /// A block of a file, with a header that says so.
    Block {
        /// The file.
        seed: Seed,
        /// Logical block.
        n: u64,
        /// Its orbit; `None` in the horizon.
        orbit: Option<u8>,
    },
    /// A slot of the cortex.
    Anchor {
        /// Slot number.
        slot: u64,
        /// The file whose anchor it holds, if it does.
        seed: Option<Seed>,
    },
    /// A nano object.
    Nano {
        /// The file.
        seed: Seed,
    },
    /// A superblock copy.
    Copy(Cardinal),
    /// Metadata, or a block that no live file has.
    Region {
        /// The region.
        region: Region,
        /// True when the bitmap says that the block is used.
        used: bool,
    },
}

impl Volume<'_> {
    /// The region that an LBA lies in.
    #[must_use]
    pub fn region_of(&self, lba: u64) -> Region {
        let superblock = self.superblock();
        let sector = self.medium().device.sector();
        let end = div(crate::layout::chronicle_end(superblock), sector);
        let starts = [
            (end, Region::Tail),
            (superblock.journal_start.get(), Region::Chronicle),
            (superblock.lba_horizon_start.get(), Region::Horizon),
            (superblock.lba_flux_start.get(), Region::Flux),
            (superblock.lba_qmask_start.get(), Region::Qmask),
            (superblock.lba_bitmap_start.get(), Region::Bitmap),
            (superblock.lba_cortex_start.get(), Region::Cortex),
            (superblock.lba_epoch_start.get(), Region::EpochRing),
        ];
        starts
            .into_iter()
            .find(|&(start, _)| lba >= start)
            .map_or(Region::Superblock, |(_, r)| r)
    }

    /// The superblock copy that covers an LBA.
    #[must_use]
    pub fn copy_at(&self, lba: u64) -> Option<Cardinal> {
        let superblock = self.superblock();
        let device = self.medium().device;
        let block = u64::from(superblock.block_size.get());
        let offset = lba.saturating_mul(device.sector());
        let width = copies::copy_bytes(block);
        let capacity = superblock.total_capacity.get();
        copies::fitting(capacity, block, device.is_zns(), u64::MAX)
            .find(|&(_, start)| (start..start.saturating_add(width)).contains(&offset))
            .map(|(cardinal, _)| cardinal)
    }

    /// What is at an LBA.
    #[must_use]
    pub fn which(&self, lba: u64) -> Which {
        if let Some(cardinal) = self.copy_at(lba) {
            return Which::Copy(cardinal);
        }
        let region = self.region_of(lba);
        let block = lba / self.geometry().sectors_per_block();
        let used = self.bitmap().is_some_and(|bitmap| bitmap.is_used(block));
        match region {
            Region::Cortex => self.in_cortex(lba),
            Region::Flux | Region::Horizon => {
                self.owner(block).unwrap_or(Which::Region { region, used })
            }
            _ => Which::Region { region, used },
        }
    }

    /// The live file whose block this is, by its header and by the address that leads here.
    fn owner(&self, block: u64) -> Option<Which> {
        let place = self.place(block, None);
        let header = self.header(&place)?;
        let anchor = self.find(header.seed()).ok()?;
        let n = header.seq_index.get();
        let there = self.locate(&anchor, n).ok()??;
        if there.block == block && n < anchor.logical_blocks(self.payload_bytes()) {
            return Some(Which::Block {
                seed: anchor.seed(),
                n,
                orbit: there.orbit,
            });
        }
        None
    }

    /// All (block, orbit) pairs of a file that an address could put at `block`, whatever its header
    /// says: the pure inverse.
    #[must_use]
    pub fn preimages(&self, anchor: &Anchor, block: u64) -> Vec<(u64, u8)> {
        let Some(space) = Space::new(self.geometry(), anchor.fractal_scale.get()) else {
            return Vec::new();
        };
        let path = Path::new(space, anchor.gravity_center.get(), anchor.v());
        let limit = anchor.logical_blocks(self.payload_bytes());
        (0..=MAX_ORBIT)
            .flat_map(|k| {
                path.inverse(block, k, limit)
                    .into_iter()
                    .map(move |n| (n, k))
            })
            .collect()
    }

    fn in_cortex(&self, lba: u64) -> Which {
        let sector = self.medium().device.sector();
        let start = self.superblock().lba_cortex_start.get();
        let first = (lba - start).saturating_mul(sector) / ANCHOR_BYTES;
        let nano = self
            .files()
            .into_iter()
            .map(|(_, anchor)| anchor)
            .find(|anchor| {
                anchor.has_class(class::NANO) && self.nano_lba(anchor).is_ok_and(|at| at == lba)
            });
        if let Some(anchor) = nano {
            return Which::Nano {
                seed: anchor.seed(),
            };
        }
        let offset = lba.saturating_mul(sector);
        let bytes = self
            .medium()
            .read_vec(Region::Cortex, offset, sector)
            .unwrap_or_default();
        let mut slots = bytes.chunks_exact(index(ANCHOR_BYTES)).zip(first..);
        let found = slots.find_map(|(bytes, slot)| {
            let anchor = Anchor::from_bytes(bytes)?;
            (anchor.is_sound() && !anchor.is_empty_slot()).then(|| (slot, anchor.seed()))
        });
        match found {
            Some((slot, seed)) => Which::Anchor {
                slot,
                seed: Some(seed),
            },
            None => Which::Anchor {
                slot: first,
                seed: None,
            },
        }
    }
}
