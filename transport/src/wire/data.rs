//! Bulk messages: epochs in chunks, and the pieces of full copies.
//!
//! A header of 32 bytes, little-endian, and raw bytes after it:
//!
//! ```text
//!  0  kind      u8
//!  1  reserved  7 bytes, 0
//!  8  a         u64
//! 16  b         u64
//! 24  c         u64
//! ```
//!
//! | kind | message | a | b | c | bytes |
//! |---|---|---|---|---|---|
//! | 1 | epoch chunk | epoch | offset in the frame | length of the frame | the chunk |
//! | 2 | feed begin | first epoch | 0 | 0 | - |
//! | 3 | seed start | checkpoint epoch | cursor, bytes | log offset | its chain hash |
//! | 4 | seed data | offset, bytes | length | CRC-32C | the data |
//! | 5 | seed zero | offset, bytes | length | 0 | - |
//! | 6 | seed end | usable after epoch | 0 | 0 | - |
//! | 7 | dictionary | 0 | 0 | 0 | a dictionary delta of SCXQ2 |
//! | 8 | seed same | offset, bytes | length | 0 | - |
//!
//! In a packed frame the header is that of the raw message, and a segment of SCXQ2 stands for the
//! raw bytes.

use bytes::{Buf, Bytes};
use hn4::types::{ChainHash, Epoch, LogOffset};
use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;

/// Bytes of a bulk message before its raw bytes.
pub const DATA_HEADER_BYTES: usize = size_of::<Header>();

const _: () = assert!(DATA_HEADER_BYTES == 32);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    kind: u8,
    reserved: [u8; 7],
    a: U64,
    b: U64,
    c: U64,
}

/// A bulk message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DataMessage {
    /// Part of an epoch's frame.
    EpochChunk {
        /// Which epoch.
        epoch: Epoch,
        /// Where in the frame the chunk lies, in bytes.
        offset: u64,
        /// Length of the whole frame in bytes.
        total: u64,
        /// The chunk; not empty.
        bytes: Bytes,
    },
    /// Epochs follow, starting with this one.
    FeedBegin {
        /// The first.
        from: Epoch,
    },
    /// Pieces of a full copy follow.
    SeedStart {
        /// The checkpoint the copy begins with: its epoch and chain hash.
        from: (Epoch, ChainHash),
        /// Where the frame after it starts in the log.
        log_offset: LogOffset,
        /// Where in the volume the pieces start, in bytes.
        cursor_bytes: u64,
    },
    /// A piece with data.
    SeedData {
        /// Where on the volume, in bytes.
        offset_bytes: u64,
        /// CRC-32C of the data.
        checksum: u32,
        /// The data; not empty.
        bytes: Bytes,
    },
    /// A range of zeroes.
    SeedZero {
        /// Where on the volume, in bytes.
        offset_bytes: u64,
        /// How long, in bytes.
        length: u64,
    },
    /// A range that the receiver's copy holds already.
    SeedSame {
        /// Where on the volume, in bytes.
        offset_bytes: u64,
        /// How long, in bytes.
        length: u64,
    },
    /// The full copy is complete.
    SeedEnd {
        /// Usable once this epoch has been applied.
        usable_after: Epoch,
    },
    /// A dictionary that packed messages after this one may need; only where that was negotiated.
    Dictionary {
        /// A dictionary delta of SCXQ2; not empty.
        bytes: Bytes,
    },
}

impl DataMessage {
    /// The header of the message, and the raw bytes that follow it.
    #[must_use]
    pub fn encode(self) -> ([u8; DATA_HEADER_BYTES], Bytes) {
        let (kind, a, b, c, bytes) = match self {
            Self::EpochChunk {
                epoch,
                offset,
                total,
                bytes,
            } => (1, epoch.0, offset, total, bytes),
            Self::FeedBegin { from } => (2, from.0, 0, 0, Bytes::new()),
            Self::SeedStart {
                from: (epoch, chain),
                log_offset,
                cursor_bytes,
            } => (
                3,
                epoch.0,
                cursor_bytes,
                log_offset.0,
                Bytes::copy_from_slice(&chain.0),
            ),
            Self::SeedData {
                offset_bytes,
                checksum,
                bytes,
            } => (
                4,
                offset_bytes,
                bytes.len() as u64,
                u64::from(checksum),
                bytes,
            ),
            Self::SeedZero {
                offset_bytes,
                length,
            } => (5, offset_bytes, length, 0, Bytes::new()),
            Self::SeedEnd { usable_after } => (6, usable_after.0, 0, 0, Bytes::new()),
            Self::Dictionary { bytes } => (7, 0, 0, 0, bytes),
            Self::SeedSame {
                offset_bytes,
                length,
            } => (8, offset_bytes, length, 0, Bytes::new()),
        };
        let header = Header {
            kind,
            reserved: [0; 7],
            a: a.into(),
            b: b.into(),
            c: c.into(),
        };
        let mut encoded = [0; DATA_HEADER_BYTES];
        encoded.copy_from_slice(header.as_bytes());
        (encoded, bytes)
    }

    /// Reads a message; its raw bytes are a slice of `payload`.
    ///
    /// # Errors
    ///
    /// If the payload is not exactly one message whose numbers agree with its bytes.
    pub fn decode(mut payload: Bytes) -> Result<Self, WireError> {
        let (header, _) = Header::read_from_prefix(&payload)
            .map_err(|_| malformed("a bulk message is shorter than its header"))?;
        payload.advance(DATA_HEADER_BYTES);
        Self::of(&header, payload)
    }

    /// Reads a message whose bytes were packed. `unpack` gives the raw bytes of the segment.
    ///
    /// # Errors
    ///
    /// As [`decode`](Self::decode), and what `unpack` says.
    pub fn decode_packed(
        mut payload: Bytes,
        unpack: impl FnOnce(Bytes) -> Result<Bytes, WireError>,
    ) -> Result<Self, WireError> {
        let (header, _) = Header::read_from_prefix(&payload)
            .map_err(|_| malformed("a bulk message is shorter than its header"))?;
        // Only what is cut into chunks or pieces is packed.
        if !matches!(header.kind, 1 | 4) {
            return Err(malformed("a bulk message of a kind that is never packed"));
        }
        payload.advance(DATA_HEADER_BYTES);
        Self::of(&header, unpack(payload)?)
    }

    fn of(header: &Header, payload: Bytes) -> Result<Self, WireError> {
        let (a, b, c) = (header.a.get(), header.b.get(), header.c.get());
        if header.reserved != [0; 7] {
            return Err(malformed("reserved bytes of a bulk message are not zero"));
        }
        let length = payload.len() as u64;
        if !matches!(header.kind, 1 | 3 | 4 | 7) && length != 0 {
            return Err(malformed("bytes follow a bulk message that has none"));
        }
        if matches!(header.kind, 1 | 3 | 4 | 7) && length == 0 {
            return Err(malformed("a bulk message has no bytes"));
        }
        match header.kind {
            1 => {
                if b.checked_add(length).is_none_or(|end| end > c) {
                    return Err(malformed("a chunk lies outside its epoch frame"));
                }
                Ok(Self::EpochChunk {
                    epoch: Epoch(a),
                    offset: b,
                    total: c,
                    bytes: payload,
                })
            }
            2 => Ok(Self::FeedBegin { from: Epoch(a) }),
            3 => {
                let chain = payload.as_ref().try_into();
                let chain = chain.map_err(|_| malformed("a chain hash has 32 bytes"))?;
                Ok(Self::SeedStart {
                    from: (Epoch(a), ChainHash(chain)),
                    log_offset: LogOffset(c),
                    cursor_bytes: b,
                })
            }
            4 => {
                let checksum =
                    u32::try_from(c).map_err(|_| malformed("a checksum exceeds 32 bits"))?;
                if b != length {
                    return Err(malformed("a piece has another length than it says"));
                }
                Ok(Self::SeedData {
                    offset_bytes: a,
                    checksum,
                    bytes: payload,
                })
            }
            5 => Ok(Self::SeedZero {
                offset_bytes: a,
                length: b,
            }),
            6 => Ok(Self::SeedEnd {
                usable_after: Epoch(a),
            }),
            7 if (a, b, c) == (0, 0, 0) => Ok(Self::Dictionary { bytes: payload }),
            8 if c == 0 => Ok(Self::SeedSame {
                offset_bytes: a,
                length: b,
            }),
            kind => Err(WireError::Message(format!(
                "unknown bulk message kind {kind}"
            ))),
        }
    }
}

fn malformed(what: &str) -> WireError {
    WireError::Message(what.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn joined(message: DataMessage) -> Bytes {
        let (head, body) = message.encode();
        [head.as_slice(), &body].concat().into()
    }

    #[test]
    fn every_bulk_message_reads_back_as_it_was_written() {
        let bytes = Bytes::from_static(b"data");
        let messages = [
            DataMessage::EpochChunk {
                epoch: Epoch(3),
                offset: 8,
                total: 12,
                bytes: bytes.clone(),
            },
            DataMessage::FeedBegin { from: Epoch(9) },
            DataMessage::SeedStart {
                from: (Epoch(1), ChainHash([7; 32])),
                log_offset: LogOffset(8192),
                cursor_bytes: 65536,
            },
            DataMessage::SeedData {
                offset_bytes: 4096,
                checksum: u32::MAX,
                bytes: bytes.clone(),
            },
            DataMessage::Dictionary { bytes },
            DataMessage::SeedZero {
                offset_bytes: 0,
                length: 1 << 40,
            },
            DataMessage::SeedSame {
                offset_bytes: 65536,
                length: 1 << 40,
            },
            DataMessage::SeedEnd {
                usable_after: Epoch(77),
            },
        ];
        for message in messages {
            assert_eq!(DataMessage::decode(joined(message.clone())), Ok(message));
        }
    }

    #[test]
    fn a_chunk_outside_its_frame_is_refused() {
        let bytes = Bytes::from_static(b"data");
        for (offset, total) in [(9, 12), (u64::MAX, 12), (0, 3)] {
            let chunk = DataMessage::EpochChunk {
                epoch: Epoch(1),
                offset,
                total,
                bytes: bytes.clone(),
            };
            assert!(
                DataMessage::decode(joined(chunk)).is_err(),
                "{offset} {total}"
            );
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(message) = DataMessage::decode(bytes.clone().into()) {
                prop_assert_eq!(joined(message), Bytes::from(bytes));
            }
        }
    }
}
