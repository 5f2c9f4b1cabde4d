//! One conversation about one volume with one peer, without I/O.
pub mod api;

pub use api::*;

/// Limits and times of a session.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of volume data in one piece of a full copy, at most.
    pub max_piece_bytes: usize,
}
