//! What a full copy consists of.

use hn4::types::{LogOffset, ZERO_PIECE_COST_BYTES};

use super::event::Tip;

/// Where a full copy starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SeedOrigin {
    /// The epochs after this one are replayed over the copied bytes.
    pub from: Tip,
    /// Where the frame after it starts in the log.
    pub log_offset: LogOffset,
    /// Byte offset on the volume at which the pieces start.
    pub cursor_bytes: u64,
}

/// What became of a part of a full copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SeedSent {
    /// Its length on the volume.
    pub bytes: u64,
    /// Bytes that count against the peer's credit.
    pub cost: u64,
}

/// What a piece of a full copy says of its part of the volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Contents {
    /// These bytes.
    Data(Vec<u8>),
    /// Zeroes.
    Zeroes,
    /// What the backing of the copy that takes it holds: the state trees were compared.
    Same,
}

/// A piece of a full copy that arrived at a replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SeedPiece {
    /// Byte offset on the volume, a multiple of 4096.
    pub offset: u64,
    /// Bytes of the volume it describes, a multiple of 4096.
    pub bytes: u64,
    /// What is there.
    pub contents: Contents,
}

impl SeedPiece {
    /// What it counts against the credit of the copy that takes it.
    #[must_use]
    pub fn cost(&self) -> u64 {
        match &self.contents {
            Contents::Data(data) => data.len() as u64,
            Contents::Zeroes | Contents::Same => ZERO_PIECE_COST_BYTES,
        }
    }

    /// Its bytes, if it has any.
    #[must_use]
    pub fn data(&self) -> Option<&[u8]> {
        match &self.contents {
            Contents::Data(data) => Some(data),
            Contents::Zeroes | Contents::Same => None,
        }
    }
}
