//! The log's header: whose log this is. Written once when the log is created and never again, so
//! that nothing a client writes, and no crash, can change what the log belongs to.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{FORMAT_VERSION, MAX_LANES, MIN_RING_BYTES};
use crate::types::{BLOCK_BYTES, VolumeId};

const MAGIC: [u8; 8] = *b"HN4DLTLG";

/// What makes two copies the same volume. Compared when a log is attached and in a session's hello.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogIdentity {
    /// UUID that all copies share.
    pub volume: VolumeId,
    /// Drawn when the volume was created. Two volumes that were given the same UUID by mistake
    /// still differ in this.
    pub birth_nonce: [u8; 16],
    /// Size of the volume in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Logical sector size that clients see: 512 or 4096.
    pub sector_bytes: u32,
}

/// Contents of the log's header block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogHeader {
    /// The volume.
    pub identity: LogIdentity,
    /// Bytes in the ring of frames, a multiple of 4096.
    pub ring_bytes: u64,
    /// Number of lanes, 1 to [`MAX_LANES`].
    pub lanes: u16,
    /// Blocks in a row that belong to one lane before the next lane's turn.
    pub stripe_blocks: u32,
    /// When the log was created, milliseconds since 1970.
    pub created_ms: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    version: U16,
    lanes: U16,
    sector_bytes: U32,
    volume: [u8; 16],
    birth_nonce: [u8; 16],
    size_bytes: U64,
    ring_bytes: U64,
    created_ms: U64,
    stripe_blocks: U32,
    crc32c: U32,
}

const WIRE_BYTES: usize = size_of::<Wire>();
const _: () = assert!(WIRE_BYTES == 80);

/// Why a block is not the header of a log that we can use.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum HeaderError {
    /// The magic is missing.
    #[error("no delta log here (magic not found); create one with `hn4ctl volume create`")]
    NotALog,
    /// The checksum does not match.
    #[error("log header is damaged: CRC-32C is {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// Stored value.
        found: u32,
        /// Computed value.
        expected: u32,
    },
    /// Another format version.
    #[error("log format version {found} is not supported (this program reads {FORMAT_VERSION})")]
    Version {
        /// Version on the medium.
        found: u16,
    },
    /// A field has a value that no version of this program writes.
    #[error("log header field `{field}` has the impossible value {value}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

impl LogHeader {
    /// Writes the header into a block of at least 4096 bytes and clears the rest of it.
    pub fn encode(&self, block: &mut [u8]) {
        let mut wire = Wire {
            magic: MAGIC,
            version: FORMAT_VERSION.into(),
            lanes: self.lanes.into(),
            sector_bytes: self.identity.sector_bytes.into(),
            volume: self.identity.volume.0,
            birth_nonce: self.identity.birth_nonce,
            size_bytes: self.identity.size_bytes.into(),
            ring_bytes: self.ring_bytes.into(),
            created_ms: self.created_ms.into(),
            stripe_blocks: self.stripe_blocks.into(),
            crc32c: U32::ZERO,
        };
        wire.crc32c = crc32c::crc32c(&wire.as_bytes()[..WIRE_BYTES - 4]).into();
        block.fill(0);
        block[..WIRE_BYTES].copy_from_slice(wire.as_bytes());
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// [`HeaderError`] says what is wrong with the block.
    pub fn decode(block: &[u8]) -> Result<Self, HeaderError> {
        let (wire, _) = Wire::read_from_prefix(block).map_err(|_| HeaderError::NotALog)?;
        if wire.magic != MAGIC {
            return Err(HeaderError::NotALog);
        }
        let expected = crc32c::crc32c(&wire.as_bytes()[..WIRE_BYTES - 4]);
        if wire.crc32c.get() != expected {
            return Err(HeaderError::Checksum {
                found: wire.crc32c.get(),
                expected,
            });
        }
        if wire.version.get() != FORMAT_VERSION {
            return Err(HeaderError::Version {
                found: wire.version.get(),
            });
        }
        let header = Self {
            identity: LogIdentity {
                volume: VolumeId(wire.volume),
                birth_nonce: wire.birth_nonce,
                size_bytes: wire.size_bytes.get(),
                sector_bytes: wire.sector_bytes.get(),
            },
            ring_bytes: wire.ring_bytes.get(),
            lanes: wire.lanes.get(),
            stripe_blocks: wire.stripe_blocks.get(),
            created_ms: wire.created_ms.get(),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), HeaderError> {
        let field = |field, value| Err(HeaderError::Field { field, value });
        let identity = &self.identity;
        if !matches!(identity.sector_bytes, 512 | 4096) {
            return field("sector_bytes", u64::from(identity.sector_bytes));
        }
        if identity.size_bytes == 0 || !identity.size_bytes.is_multiple_of(BLOCK_BYTES) {
            return field("size_bytes", identity.size_bytes);
        }
        if self.ring_bytes < MIN_RING_BYTES || !self.ring_bytes.is_multiple_of(BLOCK_BYTES) {
            return field("ring_bytes", self.ring_bytes);
        }
        if self.lanes == 0 || self.lanes > MAX_LANES {
            return field("lanes", u64::from(self.lanes));
        }
        if self.stripe_blocks == 0 {
            return field("stripe_blocks", 0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> LogHeader {
        LogHeader {
            identity: LogIdentity {
                volume: VolumeId([7; 16]),
                birth_nonce: [9; 16],
                size_bytes: 1 << 30,
                sector_bytes: 512,
            },
            ring_bytes: 64 << 20,
            lanes: 1,
            stripe_blocks: 256,
            created_ms: 1_700_000_000_000,
        }
    }

    #[test]
    fn header_round_trips() {
        let mut block = [0xAA; 4096];
        sample().encode(&mut block);
        assert_eq!(LogHeader::decode(&block), Ok(sample()));
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_refused() {
        let mut block = [0; 4096];
        sample().encode(&mut block);
        for bit in 0..WIRE_BYTES * 8 {
            let mut bad = block;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(LogHeader::decode(&bad).is_err(), "bit {bit} went unnoticed");
        }
    }

    #[test]
    fn impossible_geometry_is_refused_by_field() {
        for (field, change) in [
            (
                "size_bytes",
                (|h| h.identity.size_bytes = 4097) as fn(&mut LogHeader),
            ),
            ("sector_bytes", |h| h.identity.sector_bytes = 520),
            ("ring_bytes", |h| h.ring_bytes = 4096),
            ("lanes", |h| h.lanes = 0),
            ("stripe_blocks", |h| h.stripe_blocks = 0),
        ] {
            let mut header = sample();
            change(&mut header);
            let mut block = [0; 4096];
            header.encode(&mut block);
            match LogHeader::decode(&block) {
                Err(HeaderError::Field { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
