//! The superblock: 8 KiB that say what a volume is, kept in up to four copies.
//!
//! The struct below *is* the disk format: every field is little-endian, nothing is padded, and the
//! offsets are proven when the crate is compiled. Bytes 280 to 8187 are carried unchanged.
//! Not here: where the copies lie ([`copies`]), which copy wins ([`vote`]).
//= HN4_SPEC 1

pub mod copies;
pub mod vote;

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::crc::{crc32, crc32_of_broken_host};
use crate::num::round_up;
use crate::status::{Code, Problem, Region};

/// Bytes in a superblock, whatever the block size is.
pub const SUPERBLOCK_BYTES: u64 = 8192;
/// First eight bytes of a superblock.
pub const MAGIC: u64 = 0x4859_4452_415F_4E34;
/// Closes the fixed part.
pub const MAGIC_TAIL: u64 = 0xEFBE_ADDE;
/// The version that the reference writes and nobody checks.
pub const VERSION: u32 = 0x0006_0006;
/// The endian mark that the reference writes and nobody checks.
pub const ENDIAN_TAG: u32 = 0x1122_3344;
/// Four of these at the start of a copy ask for the volume to be wiped.
pub const WIPE_WORD: u32 = 0xDEAD_BEEF;
/// Generations from here on are refused: the counter is about to wrap.
pub const GENERATION_LIMIT: u64 = u64::MAX - 16;
/// The largest block size that can be mounted.
pub const MAX_BLOCK_SIZE: u32 = 64 << 20;

/// Bits of `state_flags`.
pub mod state {
    /// Unmounted in order.
    pub const CLEAN: u32 = 1;
    /// Mounted for writing.
    pub const DIRTY: u32 = 1 << 1;
    /// Something impossible was seen.
    pub const PANIC: u32 = 1 << 2;
    /// Works, with something missing.
    pub const DEGRADED: u32 = 1 << 3;
    /// Not to be mounted.
    pub const LOCKED: u32 = 1 << 4;
    /// The medium is not to be trusted.
    pub const TOXIC: u32 = 1 << 5;
    /// An unmount was under way.
    pub const UNMOUNTING: u32 = 1 << 6;
    /// The metadata regions were zeroed by format. Required.
    pub const METADATA_ZEROED: u32 = 1 << 13;
    /// An older layout.
    pub const NEEDS_UPGRADE: u32 = 1 << 14;
    /// To be wiped.
    pub const PENDING_WIPE: u32 = 1 << 15;
}

/// Bits of `mount_intent` and of mount flags.
pub mod intent {
    /// The volume shares its identity on purpose.
    pub const WORMHOLE: u64 = 1;
    /// Mount read-only. Honoured as a mount parameter only.
    pub const READ_ONLY: u64 = 1 << 1;
    /// The capacity is not the device's.
    pub const VIRTUAL: u64 = 1 << 2;
}

/// Bit 63 of `dirty_bits`: the volume has been tainted, for ever.
pub const TAINT_BIT: u64 = 1 << 63;

/// A superblock, exactly as on disk.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Superblock {
    /// [`MAGIC`].
    pub magic: U64,
    /// [`VERSION`].
    pub version: U32,
    /// Bytes in a block.
    pub block_size: U32,
    /// Low half of the volume UUID.
    pub uuid_lo: U64,
    /// High half of the volume UUID.
    pub uuid_hi: U64,
    /// First sector of the epoch ring.
    pub lba_epoch_start: U64,
    /// Bytes.
    pub total_capacity: U64,
    /// First sector of the cortex (D0).
    pub lba_cortex_start: U64,
    /// First sector of the bitmap.
    pub lba_bitmap_start: U64,
    /// First sector of the flux region (D1).
    pub lba_flux_start: U64,
    /// First sector of the horizon (D1.5).
    pub lba_horizon_start: U64,
    /// First sector of the stream region, equal to the horizon's.
    pub lba_stream_start: U64,
    /// First sector of the quality mask.
    pub lba_qmask_start: U64,
    /// Number of the newest epoch record.
    pub current_epoch_id: U64,
    /// Where it is: an absolute *block* index.
    pub epoch_ring_block_idx: U64,
    /// Counts the states of the volume.
    pub copy_generation: U64,
    /// Unused.
    pub sentinel_cursor: U64,
    /// Always 0 on disk; an input of the trajectory function all the same.
    pub hw_caps_flags: U64,
    /// See [`state`].
    pub state_flags: U32,
    /// Holds `root_perms_or`, and in bit 0 whether South exists after an unmount.
    pub compat_flags: U64,
    /// Any bit refuses the mount.
    pub incompat_flags: U64,
    /// Any bit makes the mount read-only.
    pub ro_compat_flags: U64,
    /// See [`intent`].
    pub mount_intent: U64,
    /// See [`TAINT_BIT`].
    pub dirty_bits: U64,
    /// Nanoseconds since 1970.
    pub last_mount_time: U64,
    /// Sector where the next chronicle entry goes.
    pub journal_ptr: U64,
    /// First sector of the chronicle.
    pub journal_start: U64,
    /// [`ENDIAN_TAG`].
    pub endian_tag: U32,
    /// UTF-8, ended by a zero.
    pub volume_label: [u8; 32],
    /// See [`crate::profile::Profile`].
    pub format_profile: U32,
    /// See [`crate::profile::DeviceType`].
    pub device_type_tag: U32,
    /// Nanoseconds since 1970 when the volume was formatted.
    pub generation_ts: U64,
    /// [`MAGIC_TAIL`].
    pub magic_tail: U64,
    /// Unused.
    pub boot_map_ptr: U64,
    /// Sequence of the newest chronicle entry.
    pub last_journal_seq: U64,
    /// Zero; carried unchanged.
    pub padding: [u8; 7908],
    /// CRC-32 of all bytes before it.
    pub sb_crc: U32,
}

const _: () = {
    assert!(size_of::<Superblock>() == 8192);
    assert!(offset_of!(Superblock, block_size) == 12);
    assert!(offset_of!(Superblock, uuid_lo) == 16);
    assert!(offset_of!(Superblock, lba_epoch_start) == 32);
    assert!(offset_of!(Superblock, total_capacity) == 40);
    assert!(offset_of!(Superblock, lba_cortex_start) == 48);
    assert!(offset_of!(Superblock, lba_flux_start) == 64);
    assert!(offset_of!(Superblock, lba_qmask_start) == 88);
    assert!(offset_of!(Superblock, epoch_ring_block_idx) == 104);
    assert!(offset_of!(Superblock, copy_generation) == 112);
    assert!(offset_of!(Superblock, hw_caps_flags) == 128);
    assert!(offset_of!(Superblock, state_flags) == 136);
    assert!(offset_of!(Superblock, compat_flags) == 140);
    assert!(offset_of!(Superblock, mount_intent) == 164);
    assert!(offset_of!(Superblock, dirty_bits) == 172);
    assert!(offset_of!(Superblock, journal_ptr) == 188);
    assert!(offset_of!(Superblock, endian_tag) == 204);
    assert!(offset_of!(Superblock, volume_label) == 208);
    assert!(offset_of!(Superblock, format_profile) == 240);
    assert!(offset_of!(Superblock, generation_ts) == 248);
    assert!(offset_of!(Superblock, magic_tail) == 256);
    assert!(offset_of!(Superblock, last_journal_seq) == 272);
    assert!(offset_of!(Superblock, padding) == 280);
    assert!(offset_of!(Superblock, sb_crc) == 8188);
};

const CRC_COVERED: usize = offset_of!(Superblock, sb_crc);

impl Superblock {
    /// A superblock of zeroes.
    #[must_use]
    pub fn zeroed() -> Self {
        <Self as zerocopy::FromZeros>::new_zeroed()
    }

    /// Takes the first 8 KiB of `bytes` as they are; `None` when there are fewer.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::read_from_prefix(bytes)
            .ok()
            .map(|(superblock, _)| superblock)
    }

    /// The checksum that the contents should have.
    #[must_use]
    pub fn computed_crc(&self) -> u32 {
        crc32(0, &self.as_bytes()[..CRC_COVERED])
    }

    /// Sets the checksum.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        self.sb_crc = self.computed_crc().into();
        self
    }

    /// Bytes that one copy occupies: 8 KiB rounded up to blocks.
    #[must_use]
    pub fn copy_bytes(&self) -> u64 {
        round_up(SUPERBLOCK_BYTES, u64::from(self.block_size.get()))
    }

    /// The UUID as 16 bytes, in the order of the disk.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(self.uuid_lo.as_bytes());
        uuid[8..].copy_from_slice(self.uuid_hi.as_bytes());
        uuid
    }

    /// True when the volume shares its identity on purpose.
    #[must_use]
    pub fn is_wormhole(&self) -> bool {
        self.mount_intent.get() & intent::WORMHOLE != 0
    }

    /// True when the capacity is not the device's.
    #[must_use]
    pub fn is_virtual(&self) -> bool {
        self.mount_intent.get() & intent::VIRTUAL != 0
    }

    /// True when all of `bits` are set in the state.
    #[must_use]
    pub fn has_state(&self, bits: u32) -> bool {
        self.state_flags.get() & bits == bits
    }

    /// Sets and clears bits of the state.
    pub fn change_state(&mut self, set: u32, clear: u32) {
        self.state_flags = ((self.state_flags.get() | set) & !clear).into();
    }

    /// The label up to its first zero, with replacement characters where it is not UTF-8.
    #[must_use]
    pub fn label(&self) -> String {
        let end = self
            .volume_label
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(32);
        String::from_utf8_lossy(&self.volume_label[..end]).into_owned()
    }

    fn check_crc(&self, at: (Region, u64)) -> Result<(), Problem> {
        let (stored, computed) = (self.sb_crc.get(), self.computed_crc());
        if stored == computed {
            return Ok(());
        }
        let (found, advice) = if stored == crc32_of_broken_host(0, CRC_COVERED) {
            let found = format!("the constant {stored:#010x} of a broken host as checksum");
            (
                found,
                "a host without CRC tables wrote this; rewrite it with a sound host",
            )
        } else {
            let advice = "heal this copy from another one, by a mount that may write";
            (format!("checksum {stored:#010x}"), advice)
        };
        let expected = format!("{computed:#010x}");
        Err(Problem::new(
            Code::BadSuperblock,
            at,
            found,
            expected,
            advice,
        ))
    }

    /// Checks one copy in the order of the reference.
    ///
    /// # Errors
    /// [`Code::WipePending`], [`Code::BadSuperblock`] or [`Code::AlignmentFail`].
    pub fn check(&self, sector_size: u64, lba: u64) -> Result<(), Problem> {
        let at = (Region::Superblock, lba);
        let bytes = self.as_bytes();
        if bytes[..16]
            .chunks_exact(4)
            .all(|word| word == WIPE_WORD.to_le_bytes())
        {
            let advice = "the volume was marked for wiping; format it, or restore another copy";
            return Err(Problem::new(
                Code::WipePending,
                at,
                "four wipe words",
                "a magic",
                advice,
            ));
        }
        let bad = |found: String, expected: String| {
            let advice = "heal this copy from another one, by a mount that may write";
            Err(Problem::new(
                Code::BadSuperblock,
                at,
                found,
                expected,
                advice,
            ))
        };
        if self.magic.get() != MAGIC {
            return bad(
                format!("magic {:#018x}", self.magic.get()),
                format!("{MAGIC:#018x}"),
            );
        }
        if self.magic_tail.get() != MAGIC_TAIL {
            let found = format!("tail magic {:#x}", self.magic_tail.get());
            return bad(found, format!("{MAGIC_TAIL:#x}"));
        }
        if self.uuid_lo.get() == 0 && self.uuid_hi.get() == 0 {
            return bad("an all-zero UUID".to_owned(), "a UUID".to_owned());
        }
        self.check_crc(at)?;
        let block_size = self.block_size.get();
        if u64::from(block_size)
            .checked_rem(sector_size)
            .is_none_or(|rest| rest != 0)
        {
            let found = format!("blocks of {block_size} bytes");
            let expected = format!("a multiple of the sector size {sector_size}");
            let advice = "attach the volume to a device with the sector size of its format";
            return Err(Problem::new(
                Code::AlignmentFail,
                at,
                found,
                expected,
                advice,
            ));
        }
        Ok(())
    }
}

impl std::fmt::Debug for Superblock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Superblock")
            .field("uuid", &crate::num::hex(&self.uuid()))
            .field("block_size", &self.block_size.get())
            .field("total_capacity", &self.total_capacity.get())
            .field("copy_generation", &self.copy_generation.get())
            .field(
                "state_flags",
                &format_args!("{:#x}", self.state_flags.get()),
            )
            .field(
                "mount_intent",
                &format_args!("{:#x}", self.mount_intent.get()),
            )
            .field("journal_ptr", &self.journal_ptr.get())
            .field("last_journal_seq", &self.last_journal_seq.get())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> Superblock {
        let mut superblock = Superblock::zeroed();
        superblock.magic = MAGIC.into();
        superblock.magic_tail = MAGIC_TAIL.into();
        superblock.uuid_lo = 1.into();
        superblock.block_size = 4096.into();
        superblock.sealed()
    }

    #[test]
    fn the_first_bytes_on_disk_spell_the_magic() {
        assert_eq!(&valid().as_bytes()[..8], b"4N_ARDYH");
        assert_eq!(
            &valid().as_bytes()[256..264],
            &[0xDE, 0xAD, 0xBE, 0xEF, 0, 0, 0, 0]
        );
    }

    #[test]
    fn any_flipped_bit_is_refused() {
        let good = valid();
        assert_eq!(good.check(512, 0), Ok(()));
        for bit in [0, 100, 2080, 4000, 65503, 65535] {
            let mut bytes = good.as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let bad = Superblock::from_bytes(&bytes).expect("8 KiB");
            assert!(bad.check(512, 0).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_checksum_of_a_host_without_tables_is_named() {
        let mut bad = valid();
        bad.sb_crc = u32::MAX.into();
        let problem = bad.check(512, 0).expect_err("wrong checksum");
        assert!(problem.advice.contains("CRC tables"), "{problem}");
    }
}
