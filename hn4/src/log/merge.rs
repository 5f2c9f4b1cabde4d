//! The merge area: whole physical sectors, kept here while they are written in place.
//!
//! A disk whose physical sector is larger than its logical one reads, changes and writes a whole
//! physical sector when less is written. If the power fails in the middle of that, sectors that
//! nobody wrote may be damaged, and no log has them. So before a part of a block is written to the
//! backing, the whole block as it is to be is written here and flushed.
//!
//! The area lies before the ring, in space that every log has. It is local to each copy: it changes
//! neither frames nor chain. It holds one batch at a time; a batch is written over when what the
//! one before it protected has been flushed.
//!
//! ```text
//! 80 KiB     head              which blocks, and their checksums
//! 84 KiB     11 blocks         their contents
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{HN4_TEMPLATE, LogIdentity, RING_START};
use crate::types::{BLOCK_BYTES, BlockIndex, Epoch};

/// Where the head stands; the blocks follow it.
pub const MERGE_AREA: u64 = HN4_TEMPLATE + 16 * 1024;
/// Blocks of a batch, at most.
pub const MERGE_BLOCKS: usize = 11;

const _: () = {
    assert!(MERGE_AREA + (1 + MERGE_BLOCKS as u64) * BLOCK_BYTES == RING_START);
    // Aligned for large physical sectors too.
    assert!(MERGE_AREA.is_multiple_of(16 * 1024));
};

const MAGIC: [u8; 8] = *b"HN4MERGE";
const VERSION: u16 = 1;

/// Who writes the blocks in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MergeUse {
    /// A sweep to this epoch.
    Sweep(Epoch),
    /// The shadow is written over the backing.
    Shadow,
}

/// A block of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MergedBlock {
    /// Which block of the volume.
    pub block: BlockIndex,
    /// CRC-32C of its contents.
    pub crc32c: u32,
}

/// What a batch is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergeHead {
    /// The superblock names the same number as long as batches with it may count.
    pub era: u64,
    /// Who writes them in place.
    pub merge_use: MergeUse,
    /// Its blocks, in the order in which their contents follow.
    pub blocks: Vec<MergedBlock>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct WireBlock {
    block: U64,
    crc32c: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    version: U16,
    merge_use: u8,
    reserved: u8,
    count: U32,
    volume: [u8; 16],
    birth_nonce: [u8; 16],
    era: U64,
    cut: U64,
    blocks: [WireBlock; MERGE_BLOCKS],
    reserved_end: U32,
    crc32c: U32,
}

const WIRE_BYTES: usize = size_of::<Wire>();
const _: () = assert!(WIRE_BYTES <= 512, "a head must fit in one sector");

impl MergeHead {
    /// Writes the head into a block and clears the rest of it.
    ///
    /// # Panics
    /// If there are more than [`MERGE_BLOCKS`].
    pub fn encode(&self, identity: &LogIdentity, block: &mut [u8]) {
        let (merge_use, cut) = match self.merge_use {
            MergeUse::Sweep(cut) => (0, cut.0),
            MergeUse::Shadow => (1, 0),
        };
        let nothing = WireBlock {
            block: U64::ZERO,
            crc32c: U32::ZERO,
            reserved: U32::ZERO,
        };
        let mut blocks = [nothing; MERGE_BLOCKS];
        assert!(self.blocks.len() <= MERGE_BLOCKS, "a batch is bounded");
        for (wire, merged) in blocks.iter_mut().zip(&self.blocks) {
            wire.block = merged.block.0.into();
            wire.crc32c = merged.crc32c.into();
        }
        let count = u32::try_from(self.blocks.len()).expect("bounded above");
        let mut wire = Wire {
            magic: MAGIC,
            version: VERSION.into(),
            merge_use,
            reserved: 0,
            count: count.into(),
            volume: identity.volume.0,
            birth_nonce: identity.birth_nonce,
            era: self.era.into(),
            cut: cut.into(),
            blocks,
            reserved_end: U32::ZERO,
            crc32c: U32::ZERO,
        };
        wire.crc32c = crc32c::crc32c(&wire.as_bytes()[..WIRE_BYTES - 4]).into();
        block.fill(0);
        block[..WIRE_BYTES].copy_from_slice(wire.as_bytes());
    }

    /// Reads and checks a head. `None` if it is none of this volume: never written, or torn, when
    /// nothing that it was to protect has been written in place.
    #[must_use]
    pub fn decode(identity: &LogIdentity, block: &[u8]) -> Option<Self> {
        let (wire, _) = Wire::read_from_prefix(block).ok()?;
        let crc32c = crc32c::crc32c(&wire.as_bytes()[..WIRE_BYTES - 4]);
        let known = wire.magic == MAGIC
            && wire.version.get() == VERSION
            && wire.crc32c.get() == crc32c
            && wire.volume == identity.volume.0
            && wire.birth_nonce == identity.birth_nonce;
        let count = usize::try_from(wire.count.get()).ok()?;
        let wires = wire.blocks.get(..count).filter(|_| known)?;
        let end = identity.size_bytes / BLOCK_BYTES;
        let blocks = wires.iter().map(|wire| MergedBlock {
            block: BlockIndex(wire.block.get()),
            crc32c: wire.crc32c.get(),
        });
        let blocks: Vec<_> = blocks.collect();
        if blocks.iter().any(|merged| merged.block.0 >= end) {
            return None;
        }
        let merge_use = match wire.merge_use {
            0 => MergeUse::Sweep(Epoch(wire.cut.get())),
            1 => MergeUse::Shadow,
            _ => return None,
        };
        Some(Self {
            era: wire.era.get(),
            merge_use,
            blocks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::VolumeId;

    const IDENTITY: LogIdentity = LogIdentity {
        volume: VolumeId([1; 16]),
        birth_nonce: [2; 16],
        size_bytes: 1 << 20,
        sector_bytes: 512,
    };

    fn sample(blocks: u64) -> MergeHead {
        let blocks = (0..blocks).map(|block| MergedBlock {
            block: BlockIndex(20 * block),
            crc32c: 7,
        });
        MergeHead {
            era: 3,
            merge_use: MergeUse::Sweep(Epoch(12)),
            blocks: blocks.collect(),
        }
    }

    fn encoded(head: &MergeHead) -> [u8; 4096] {
        let mut block = [0xEE; 4096];
        head.encode(&IDENTITY, &mut block);
        block
    }

    #[test]
    fn a_head_round_trips_and_another_volume_does_not_take_it() {
        let shadow = MergeHead {
            merge_use: MergeUse::Shadow,
            ..sample(1)
        };
        for head in [sample(0), sample(11), shadow] {
            let block = encoded(&head);
            assert_eq!(MergeHead::decode(&IDENTITY, &block), Some(head));
            let other = LogIdentity {
                birth_nonce: [0; 16],
                ..IDENTITY
            };
            assert_eq!(MergeHead::decode(&other, &block), None);
            let smaller = LogIdentity {
                size_bytes: 4096,
                ..IDENTITY
            };
            let fits = MergeHead::decode(&smaller, &block).map(|head| head.blocks.len() < 2);
            assert!(fits.unwrap_or(true), "blocks lie within the volume");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_head_is_noticed() {
        let block = encoded(&sample(2));
        for bit in 0..WIRE_BYTES * 8 {
            let mut bad = block;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(MergeHead::decode(&IDENTITY, &bad), None, "bit {bit}");
        }
        assert_eq!(MergeHead::decode(&IDENTITY, &[0; 4096]), None);
        assert_eq!(MergeHead::decode(&IDENTITY, &[]), None);
    }
}
