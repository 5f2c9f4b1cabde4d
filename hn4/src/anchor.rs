//! Anchors: the 128-byte records of the cortex, one for each file, and the slots they live in.
//!
//! Not here: the blocks of a file ([`crate::address`], [`crate::block`]) and nano payloads
//! ([`crate::nano`]), which share the cortex.
//= HN4_SPEC 8

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::crc::crc32;
use crate::num::{low32, mix};

/// Bytes of an anchor and of its slot.
pub const ANCHOR_BYTES: u64 = 128;
/// Slots that a search looks at before it gives up.
pub const MAX_PROBES: u64 = 1024;
/// Permissions of a root anchor: READ, WRITE, EXEC, IMMUTABLE, SOVEREIGN.
pub const ROOT_PERMISSIONS: u32 = 0x37;
/// Data class of a root anchor: STATIC and VALID.
pub const ROOT_CLASS: u64 = class::STATIC | class::VALID;

/// Bits of `data_class`.
pub mod class {
    /// Does not change.
    pub const STATIC: u64 = 1 << 4;
    /// The anchor is in use.
    pub const VALID: u64 = 1 << 8;
    /// The file was deleted.
    pub const TOMBSTONE: u64 = 1 << 9;
    /// Pinned to good blocks.
    pub const PINNED: u64 = 1 << 12;
    /// G is a block index in the horizon.
    pub const HORIZON: u64 = 1 << 17;
    /// Blocks may be compressed.
    pub const COMPRESSED: u64 = 1 << 19;
    /// Blocks are encrypted.
    pub const ENCRYPTED: u64 = 1 << 20;
    /// The payload is a nano sector in the cortex.
    pub const NANO: u64 = 1 << 22;
    /// The name continues in an extension block.
    pub const EXTENDED: u64 = 1 << 23;
}

/// Bits of `permissions`.
pub mod permission {
    /// May be read.
    pub const READ: u32 = 1;
    /// May be written.
    pub const WRITE: u32 = 1 << 1;
    /// May never change.
    pub const IMMUTABLE: u32 = 1 << 4;
    /// Belongs to the volume's owner, who may read it always.
    pub const SOVEREIGN: u32 = 1 << 5;
}

/// The 128-bit name of a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Seed {
    /// Low half, first on disk.
    pub lo: u64,
    /// High half.
    pub hi: u64,
}

impl Seed {
    /// The seed of the root anchor.
    pub const ROOT: Self = Self {
        lo: u64::MAX,
        hi: u64::MAX,
    };

    /// The hash that both the anchor's slot and nano sectors start from.
    #[must_use]
    pub fn folded(self) -> u64 {
        self.lo ^ self.hi
    }
}

impl std::fmt::Display for Seed {
    /// 32 hexadecimal digits, the high half first, as a number is written.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}{:016x}", self.hi, self.lo)
    }
}

impl std::str::FromStr for Seed {
    type Err = std::num::ParseIntError;

    /// Hexadecimal, with or without `0x`; shorter texts are small numbers.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.trim_start_matches("0x");
        let value = u128::from_str_radix(digits, 16)?;
        let lo = u64::try_from(value & u128::from(u64::MAX)).unwrap_or(0);
        Ok(Self {
            lo,
            hi: u64::try_from(value >> 64).unwrap_or(0),
        })
    }
}

/// An anchor, exactly as on disk.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Anchor {
    /// Low half of the seed.
    pub seed_lo: U64,
    /// High half of the seed.
    pub seed_hi: U64,
    /// Low half of the public id.
    pub public_lo: U64,
    /// High half of the public id.
    pub public_hi: U64,
    /// G: where the trajectory starts.
    pub gravity_center: U64,
    /// Bytes of the file.
    pub mass: U64,
    /// See [`class`].
    pub data_class: U64,
    /// Bloom filter over the path's tokens.
    pub tag_filter: U64,
    /// V: 48 bits.
    pub orbit_vector: [u8; 6],
    /// M: log2 of the stride.
    pub fractal_scale: U16,
    /// See [`permission`].
    pub permissions: U32,
    /// Owner.
    pub sovereign_id: U32,
    /// Nanoseconds since 1970.
    pub mod_clock: U64,
    /// Counts the writes.
    pub write_gen: U32,
    /// Seconds since 1970.
    pub create_clock: U32,
    /// CRC-32 of the anchor with this field zero.
    pub checksum: U32,
    /// Two bits for each 16 blocks: the orbit.
    pub orbit_hints: U32,
    /// Name, or extension LBA and name.
    pub inline_name: [u8; 24],
}

const _: () = {
    assert!(size_of::<Anchor>() == 128);
    assert!(offset_of!(Anchor, gravity_center) == 32);
    assert!(offset_of!(Anchor, data_class) == 48);
    assert!(offset_of!(Anchor, orbit_vector) == 64);
    assert!(offset_of!(Anchor, fractal_scale) == 70);
    assert!(offset_of!(Anchor, permissions) == 72);
    assert!(offset_of!(Anchor, mod_clock) == 80);
    assert!(offset_of!(Anchor, write_gen) == 88);
    assert!(offset_of!(Anchor, checksum) == 96);
    assert!(offset_of!(Anchor, inline_name) == 104);
};

impl Anchor {
    /// Takes 128 bytes as they are; `None` when there are fewer.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::read_from_prefix(bytes).ok().map(|(anchor, _)| anchor)
    }

    /// An anchor of zeroes: an empty slot.
    #[must_use]
    pub fn zeroed() -> Self {
        <Self as zerocopy::FromZeros>::new_zeroed()
    }

    /// The anchor of the root, as format writes it.
    #[must_use]
    pub fn root(permissions: u32, now_ns: u64) -> Self {
        let mut root = Self::zeroed();
        for field in [
            &mut root.seed_lo,
            &mut root.seed_hi,
            &mut root.public_lo,
            &mut root.public_hi,
        ] {
            *field = u64::MAX.into();
        }
        root.data_class = ROOT_CLASS.into();
        root.orbit_vector[0] = 1;
        root.permissions = permissions.into();
        root.mod_clock = now_ns.into();
        root.create_clock = low32(now_ns / 1_000_000_000).into();
        root.inline_name[..4].copy_from_slice(b"ROOT");
        root.sealed()
    }

    /// The checksum that the contents should have.
    #[must_use]
    pub fn computed_checksum(&self) -> u32 {
        let mut blank = *self;
        blank.checksum = U32::ZERO;
        crc32(0, blank.as_bytes())
    }

    /// Sets the checksum.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        self.checksum = self.computed_checksum().into();
        self
    }

    /// True when the checksum is right.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.checksum.get() == self.computed_checksum()
    }

    /// True for a slot that holds nothing.
    #[must_use]
    pub fn is_empty_slot(&self) -> bool {
        self.seed_lo.get() == 0 && self.seed_hi.get() == 0 && self.data_class.get() == 0
    }

    /// True when all bits are set in the data class.
    #[must_use]
    pub fn has_class(&self, bits: u64) -> bool {
        self.data_class.get() & bits == bits
    }

    /// True for a file that exists.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.has_class(class::VALID) && !self.has_class(class::TOMBSTONE)
    }

    /// The seed.
    #[must_use]
    pub fn seed(&self) -> Seed {
        Seed {
            lo: self.seed_lo.get(),
            hi: self.seed_hi.get(),
        }
    }

    /// V as a number.
    #[must_use]
    pub fn v(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes[..6].copy_from_slice(&self.orbit_vector);
        u64::from_le_bytes(bytes)
    }

    /// Sets V to the low 48 bits.
    pub fn set_v(&mut self, v: u64) {
        self.orbit_vector.copy_from_slice(&v.to_le_bytes()[..6]);
    }

    /// Logical blocks that the file's mass needs, for blocks with this payload.
    #[must_use]
    pub fn logical_blocks(&self, payload_bytes: u64) -> u64 {
        if payload_bytes == 0 {
            0
        } else {
            self.mass.get().div_ceil(payload_bytes)
        }
    }

    /// The part of the name that the anchor itself holds.
    #[must_use]
    pub fn name(&self) -> String {
        let stored = if self.has_class(class::EXTENDED) {
            &self.inline_name[8..]
        } else {
            &self.inline_name
        };
        let end = stored
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(stored.len());
        String::from_utf8_lossy(&stored[..end]).into_owned()
    }

    /// Sector of the extension block, where there is one.
    #[must_use]
    pub fn extension_lba(&self) -> Option<u64> {
        let lba = u64::from_le_bytes(*self.inline_name.first_chunk()?);
        self.has_class(class::EXTENDED).then_some(lba)
    }

    /// True when this anchor is newer than another of the same seed, counted serially.
    #[must_use]
    pub fn is_newer_than(&self, other: &Self) -> bool {
        let ahead = self.write_gen.get().wrapping_sub(other.write_gen.get());
        ahead != 0 && ahead < 1 << 31
    }
}

/// The slot where the search for a seed starts; `None` in a cortex without slots.
#[must_use]
pub fn home_slot(seed: Seed, slots: u64) -> Option<u64> {
    mix(seed.folded()).checked_rem(slots)
}

/// The slots that a search for a seed looks at, in order.
pub fn probe_slots(seed: Seed, slots: u64) -> impl Iterator<Item = u64> {
    let home = home_slot(seed, slots).unwrap_or(0);
    (0..slots.min(MAX_PROBES)).map(move |step| (home + step) % slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_anchor_is_sound_and_says_so() {
        let root = Anchor::root(ROOT_PERMISSIONS, 1_700_000_000_000_000_000);
        assert!(root.is_sound() && root.is_live());
        assert_eq!(
            (root.name().as_str(), root.seed(), root.v()),
            ("ROOT", Seed::ROOT, 1)
        );
        let mut broken = root;
        broken.mass = 1.into();
        assert!(!broken.is_sound());
    }

    #[test]
    fn generations_are_compared_serially() {
        let with = |write_gen: u32| Anchor {
            write_gen: write_gen.into(),
            ..Anchor::zeroed()
        };
        assert!(with(1).is_newer_than(&with(0)));
        assert!(with(0).is_newer_than(&with(u32::MAX)));
        assert!(!with(5).is_newer_than(&with(5)));
    }

    #[test]
    fn seeds_are_read_back_from_their_text() {
        let seed = Seed {
            lo: 0x1000,
            hi: 0x2000,
        };
        assert_eq!(seed.to_string().parse(), Ok(seed));
        assert_eq!("0x1000".parse(), Ok(Seed { lo: 0x1000, hi: 0 }));
        assert!("xyz".parse::<Seed>().is_err());
    }

    #[test]
    fn probing_wraps_and_stays_inside() {
        let slots: Vec<_> = probe_slots(Seed { lo: 5, hi: 9 }, 16).collect();
        assert_eq!(slots.len(), 16);
        assert!(slots.iter().all(|&slot| slot < 16));
        assert_eq!(probe_slots(Seed::default(), 0).count(), 0);
    }
}
