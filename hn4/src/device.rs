//! What a device is, as far as HN4 asks: sizes, abilities, and a way to read its bytes.
//!
//! Not here: I/O. [`ReadAt`] is implemented by whoever owns the file or device; everything that
//! writes comes out of this crate as a [`crate::plan::Plan`].
//= HN4_SPEC 10

use std::io;

/// Bits of a device's capability word.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct HwFlags(pub u64);

impl HwFlags {
    /// Zoned namespace: written in zones that are reset as a whole.
    pub const ZNS: Self = Self(1);
    /// Rotational medium.
    pub const ROTATIONAL: Self = Self(1 << 2);
    /// Byte-addressable memory.
    pub const NVM: Self = Self(1 << 14);
    /// A flush means that everything before it is on stable storage.
    pub const STRICT_FLUSH: Self = Self(1 << 62);
    /// The device is a file.
    pub const FILE_BACKED: Self = Self(1 << 63);

    /// True when all bits of `other` are set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets of bits.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A device's sizes and abilities.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Device {
    /// Bytes.
    pub capacity: u64,
    /// Logical sector, bytes.
    pub sector_size: u32,
    /// Zone, bytes; 0 where there are no zones.
    pub zone_size: u32,
    /// Capabilities.
    pub hw_flags: HwFlags,
    /// Degrees Celsius; a hot device is refused.
    pub temperature_celsius: i32,
}

impl Device {
    /// A plain device of `capacity` bytes that keeps its flushes.
    #[must_use]
    pub fn plain(capacity: u64, sector_size: u32) -> Self {
        Self {
            capacity,
            sector_size,
            zone_size: 0,
            hw_flags: HwFlags::STRICT_FLUSH,
            temperature_celsius: 40,
        }
    }

    /// Sector size in bytes; the reference counts 0 as 512 wherever it divides by it.
    #[must_use]
    pub fn sector(&self) -> u64 {
        if self.sector_size == 0 {
            512
        } else {
            u64::from(self.sector_size)
        }
    }

    /// True for zoned devices.
    #[must_use]
    pub fn is_zns(&self) -> bool {
        self.hw_flags.has(HwFlags::ZNS)
    }
}

/// Random access to bytes. Reads behind the end are errors, never short.
pub trait ReadAt {
    /// Fills `buffer` from byte `offset`.
    ///
    /// # Errors
    /// When the device reports one, or the range is not all inside it.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// The first byte at or behind `offset` that may be other than zero, where the source knows
    /// (a sparse file); `None` when nothing but zeroes follows. Sources that do not know return
    /// `Some(offset)`.
    fn next_data(&self, offset: u64) -> Option<u64> {
        Some(offset)
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = crate::num::index(offset);
        let source = start
            .checked_add(buffer.len())
            .and_then(|end| self.get(start..end))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(source);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.as_slice().read_at(offset, buffer)
    }
}
