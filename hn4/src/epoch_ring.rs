//! The epoch ring: one record per clean unmount, so that a superblock from another time is noticed.
//!
//! Slots are blocks; a record fills the first 128 bytes, the rest is zero. The reference leaves the
//! record's checksum 0 when it advances (defect 4), so every volume that it unmounts is read-only
//! afterwards; this crate writes it, and names the signature when it meets it.
//= HN4_SPEC 6

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::crc::crc32;
use crate::layout::EPOCH_RING_BYTES;
use crate::num::round_up;
use crate::profile::Profile;
use crate::status::{Code, Conduct, Problem, Region};
use crate::superblock::{GENERATION_LIMIT, Superblock, state};

/// Bytes of a record.
pub const RECORD_BYTES: u64 = 128;
/// Flags of the first record.
pub const FLAGS_GENESIS: u32 = 1;
/// Flags of every later record.
pub const FLAGS_ADVANCE: u32 = 0x40;

/// Identifiers this close to either end of the range are taken to have wrapped.
const WRAP_WINDOW: u64 = 10_000;
const MAX_FUTURE: u64 = 5000;
const MAX_PAST: u64 = 100;

/// A record, exactly as on disk.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct EpochRecord {
    /// Its number.
    pub epoch_id: U64,
    /// Nanoseconds since 1970; never compared.
    pub timestamp: U64,
    /// CRC-32 of the volume's generation.
    pub d0_root_checksum: U32,
    /// [`FLAGS_GENESIS`] or [`FLAGS_ADVANCE`].
    pub flags: U32,
    /// Zero.
    pub reserved: [u8; 100],
    /// CRC-32 of all bytes before it.
    pub epoch_crc: U32,
}

const _: () = {
    assert!(size_of::<EpochRecord>() == 128);
    assert!(offset_of!(EpochRecord, d0_root_checksum) == 16);
    assert!(offset_of!(EpochRecord, reserved) == 24);
    assert!(offset_of!(EpochRecord, epoch_crc) == 124);
};

impl EpochRecord {
    fn new(epoch_id: u64, timestamp: u64, d0_root_checksum: u32, flags: u32) -> Self {
        Self {
            epoch_id: epoch_id.into(),
            timestamp: timestamp.into(),
            d0_root_checksum: d0_root_checksum.into(),
            flags: flags.into(),
            reserved: [0; 100],
            epoch_crc: U32::ZERO,
        }
    }

    /// The record that format writes.
    #[must_use]
    pub fn genesis(now_ns: u64) -> Self {
        Self::new(1, now_ns, 0, FLAGS_GENESIS).sealed()
    }

    /// The checksum that the contents should have.
    #[must_use]
    pub fn computed_crc(&self) -> u32 {
        crc32(0, &self.as_bytes()[..offset_of!(Self, epoch_crc)])
    }

    /// Sets the checksum.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        self.epoch_crc = self.computed_crc().into();
        self
    }

    /// True when the checksum is right.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.epoch_crc.get() == self.computed_crc()
    }

    /// True when this is what the reference leaves at an unmount: all right but for a checksum of 0
    /// (defect 4).
    #[must_use]
    pub fn has_reference_signature(&self, superblock_epoch: u64) -> bool {
        self.epoch_crc.get() == 0 && self.epoch_id.get() == superblock_epoch && !self.is_sound()
    }
}

/// Blocks in the ring of a volume; 0 where its block size is 0.
#[must_use]
pub fn ring_blocks(superblock: &Superblock) -> u64 {
    if superblock.format_profile.get() == Profile::Pico.id() {
        return 2;
    }
    let block = u64::from(superblock.block_size.get());
    crate::num::div(round_up(EPOCH_RING_BYTES, block), block)
}

/// What an advance of the ring writes, and where the superblock points afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Advance {
    /// The new record.
    pub record: EpochRecord,
    /// Number of the new record.
    pub epoch_id: u64,
    /// Absolute block index of its slot.
    pub block: u64,
}

/// Computes the next record of the ring.
///
/// # Errors
/// [`Code::MediaToxic`] on a read-only or toxic volume, [`Code::Exists`] when the generation is
/// used up, [`Code::DataRot`] when the pointer lies before the ring.
pub fn advance(
    superblock: &Superblock,
    sector_size: u64,
    now_ns: u64,
    read_only: bool,
    conduct: Conduct,
) -> Result<Advance, Problem> {
    let at = (Region::EpochRing, superblock.lba_epoch_start.get());
    if read_only || superblock.has_state(state::TOXIC) {
        let found = "a read-only or toxic volume";
        let advice = "mount for writing on a sound medium";
        return Err(Problem::new(
            Code::MediaToxic,
            at,
            found,
            "a writable one",
            advice,
        ));
    }
    let generation = superblock.copy_generation.get();
    if generation > GENERATION_LIMIT {
        let advice = "the generation counter is used up; format a new volume and copy";
        let expected = format!("{GENERATION_LIMIT} at most");
        return Err(Problem::new(Code::Exists, at, generation, expected, advice));
    }
    let sectors_per_block = crate::num::div(u64::from(superblock.block_size.get()), sector_size);
    let start = crate::num::div(superblock.lba_epoch_start.get(), sectors_per_block);
    let length = ring_blocks(superblock).max(1);
    let pointer = superblock.epoch_ring_block_idx.get();
    let Some(relative) = pointer.checked_sub(start) else {
        let found = format!("pointer {pointer}");
        let advice = "restore the superblock from another copy";
        return Err(Problem::new(
            Code::DataRot,
            at,
            found,
            format!("{start} or more"),
            advice,
        ));
    };
    let relative = if relative >= length { 0 } else { relative };
    let epoch_id = superblock.current_epoch_id.get().wrapping_add(1);
    let checksum = crc32(0, &generation.to_le_bytes());
    let record = EpochRecord::new(epoch_id, now_ns, checksum, FLAGS_ADVANCE);
    let record = if conduct.corrects() {
        record.sealed()
    } else {
        record
    };
    Ok(Advance {
        record,
        epoch_id,
        block: start + (relative + 1) % length,
    })
}

/// What the epoch record says about the superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// They belong together.
    Current,
    /// The disk is ahead by a little: the superblock is old. Mount read-only, taint 10.
    Ahead(u64),
    /// The superblock is ahead by a little: a record was lost. Mount read-only.
    Behind(u64),
    /// Too far apart to belong together.
    Toxic {
        /// True when the disk is ahead.
        ahead: bool,
        /// How far.
        by: u64,
    },
}

/// Compares the number on disk with the superblock's.
#[must_use]
pub fn compare(disk: u64, superblock: u64) -> Verdict {
    let near_top = |id: u64| id > u64::MAX - WRAP_WINDOW;
    let near_zero = |id: u64| id < WRAP_WINDOW;
    let (ahead, by) = if disk >= superblock {
        let wrapped = near_top(disk) && near_zero(superblock);
        (
            !wrapped,
            if wrapped {
                superblock.wrapping_sub(disk)
            } else {
                disk - superblock
            },
        )
    } else {
        let wrapped = near_top(superblock) && near_zero(disk);
        (
            wrapped,
            if wrapped {
                disk.wrapping_sub(superblock)
            } else {
                superblock - disk
            },
        )
    };
    match (ahead, by) {
        (_, 0) => Verdict::Current,
        (true, 1..=MAX_FUTURE) => Verdict::Ahead(by),
        (false, 1..=MAX_PAST) => Verdict::Behind(by),
        _ => Verdict::Toxic { ahead, by },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_across_the_wrap() {
        assert_eq!(compare(5, 5), Verdict::Current);
        assert_eq!(
            compare(5006, 5),
            Verdict::Toxic {
                ahead: true,
                by: 5001
            }
        );
        assert_eq!(compare(0, u64::MAX), Verdict::Ahead(1));
        assert_eq!(compare(u64::MAX, 1), Verdict::Behind(2));
        assert_eq!(
            compare(1, 102),
            Verdict::Toxic {
                ahead: false,
                by: 101
            }
        );
    }

    #[test]
    fn an_unmount_by_the_reference_is_recognised_and_one_of_ours_is_sound() {
        let mut superblock = Superblock::zeroed();
        superblock.block_size = 4096.into();
        superblock.lba_epoch_start = 16.into();
        superblock.epoch_ring_block_idx = 2.into();
        superblock.current_epoch_id = 7.into();
        let by = |conduct| {
            advance(&superblock, 512, 1, false, conduct)
                .expect("a writable volume")
                .record
        };
        assert!(by(Conduct::Corrected).is_sound());
        assert!(by(Conduct::ReferenceCompatible).has_reference_signature(8));
        assert!(!by(Conduct::Corrected).has_reference_signature(8));
    }
}
