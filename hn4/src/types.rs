//! Names and numbers that every layer shares: where data lies, which epoch it belongs to, who
//! wrote it.
//!
//! All addresses on a volume are counted in 512-byte sectors, whatever the logical sector size of
//! the device is: the same unit as Linux's `sector_t`. A volume with 4096-byte sectors simply never
//! sees an address that is not a multiple of eight. Nothing here does I/O.

use std::fmt;
use std::str::FromStr;

/// Bytes in the unit of [`Lba`].
pub const SECTOR_BYTES: u64 = 512;
/// Bytes in a block, the unit of the overlay, of the log's payload and of the state tree.
pub const BLOCK_BYTES: u64 = 4096;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = BLOCK_BYTES / SECTOR_BYTES;

/// What a piece of zeroes of a full copy counts against the credit of who takes it, in bytes. It
/// travels without payload; were it free, a sender could fill the other side's memory with them.
/// Sender, session and receiver must agree on it.
pub const ZERO_PIECE_COST_BYTES: u64 = 4096;

/// A sector address on the volume, in units of 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Lba(pub u64);

impl Lba {
    /// Byte offset on the volume, and by promise P3 on every copy of it.
    #[must_use]
    pub fn byte_offset(self) -> u64 {
        self.0 * SECTOR_BYTES
    }

    /// The block this sector lies in.
    #[must_use]
    pub fn block(self) -> BlockIndex {
        BlockIndex(self.0 / SECTORS_PER_BLOCK)
    }

    /// Position of this sector within its block, 0 to 7.
    #[must_use]
    pub fn sector_in_block(self) -> u32 {
        // A remainder of a division by eight always fits.
        (self.0 % SECTORS_PER_BLOCK) as u32
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LBA {}", self.0)
    }
}

/// A 4 KiB block of the volume, counted from its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct BlockIndex(pub u64);

impl BlockIndex {
    /// First sector of the block.
    #[must_use]
    pub fn lba(self) -> Lba {
        Lba(self.0 * SECTORS_PER_BLOCK)
    }
}

/// Number of an epoch: a consistent cut through the history of one volume. Epoch 0 is the state of
/// the backing when its log was created; the first epoch that holds records is 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A part of a volume's address space that one shard owns.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LaneId(pub u16);

/// Logical byte offset in a delta log. It only grows; the place on the medium is the offset modulo
/// the size of the ring, so equal offsets name equal bytes on every copy, whatever size its ring
/// has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LogOffset(pub u64);

/// Counts the times a primary has opened its volume within one term.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Incarnation(pub u32);

/// A hash of a frame header; each frame names the hash of the frame before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ChainHash(pub [u8; 32]);

impl fmt::Debug for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChainHash({self})")
    }
}

impl fmt::Display for ChainHash {
    /// The first eight bytes: enough for a person to compare two of them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0[..8])
    }
}

/// Who is allowed to append: a counter that only promotions raise, and the node that holds it.
/// Ordered by counter; two nodes with the same counter are told apart, never merged.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Term {
    /// Raised by one with each promotion. 0 means that nobody was ever primary.
    pub counter: u64,
    /// The node that was promoted.
    pub node: NodeId,
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.counter, self.node)
    }
}

/// Which opening of a primary sealed an epoch. Of two copies the one whose last epoch has the
/// higher rank holds the later history, whatever their lengths; between equal ranks the longer one
/// does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Rank {
    /// Counter of the primary's term.
    pub term: u64,
    /// The opening within the term.
    pub incarnation: Incarnation,
}

/// Identity of a volume: the UUID that all its copies share.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VolumeId(pub [u8; 16]);

/// Identity of a node, drawn once when its state directory is created.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NodeId(pub [u8; 16]);

/// What was wrong with the text of a UUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadUuid;

impl fmt::Display for BadUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a UUID: expected 32 hexadecimal digits, with or without dashes")
    }
}

impl std::error::Error for BadUuid {}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn write_uuid(f: &mut fmt::Formatter<'_>, id: &[u8; 16]) -> fmt::Result {
    for (index, part) in [&id[..4], &id[4..6], &id[6..8], &id[8..10], &id[10..]]
        .iter()
        .enumerate()
    {
        if index > 0 {
            f.write_str("-")?;
        }
        write_hex(f, part)?;
    }
    Ok(())
}

fn parse_uuid(text: &str) -> Result<[u8; 16], BadUuid> {
    let mut id = [0_u8; 16];
    let mut digits = 0;
    for character in text.chars().filter(|&character| character != '-') {
        let value = character
            .to_digit(16)
            .and_then(|value| u8::try_from(value).ok())
            .ok_or(BadUuid)?;
        let byte = id.get_mut(digits / 2).ok_or(BadUuid)?;
        *byte = (*byte << 4) | value;
        digits += 1;
    }
    if digits == 32 { Ok(id) } else { Err(BadUuid) }
}

macro_rules! uuid_text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_uuid(f, &self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
        impl FromStr for $name {
            type Err = BadUuid;
            fn from_str(text: &str) -> Result<Self, BadUuid> {
                parse_uuid(text).map(Self)
            }
        }
    };
}

uuid_text!(VolumeId);
uuid_text!(NodeId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_text_round_trips_and_refuses_wrong_lengths() {
        let id = VolumeId(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("12".parse::<VolumeId>(), Err(BadUuid));
        assert_eq!(format!("{id}0").parse::<VolumeId>(), Err(BadUuid));
        assert_eq!("g".repeat(32).parse::<VolumeId>(), Err(BadUuid));
    }

    #[test]
    fn lba_names_the_same_byte_as_its_block() {
        let lba = Lba(8 * 7 + 3);
        assert_eq!(lba.block(), BlockIndex(7));
        assert_eq!(lba.sector_in_block(), 3);
        assert_eq!(lba.block().lba().byte_offset(), 7 * BLOCK_BYTES);
    }
}
