//! The NBD server protocol, from the NBD protocol document, without any input or output.
//!
//! The shard loop owns sockets, buffers and overlay slots; this module owns the meaning of bytes:
//!
//! 1. [`handshake::Handshake`] turns a client's option haggling into a [`handshake::Session`].
//! 2. [`connection::Decoder`] cuts the transmission phase into commands and payload, without
//!    copying payload, and checks each command with [`request::validate`].
//! 3. [`reply::Replier`] encodes the answers.
//!
//! **Invariants.** Bytes from a client never cause a panic, an unbounded allocation or a loop that
//! makes no progress: every call that is given input consumes some of it or ends the connection.
//! Every length a client names is checked against [`Limits`] or against the export before anything
//! is done with it. A refused write is answered after its payload has passed, never before: clients
//! exist (libnbd) that give up when a reply overtakes the request it belongs to.
//!
//! **Not here:** sockets, timeouts, TLS (the place for it is marked in [`handshake`]), the number
//! of requests in flight, and what a command does to the volume.
#![forbid(unsafe_code)]

pub mod client;
pub mod connection;
mod error;
pub mod export;
pub mod handshake;
mod options;
pub mod proto;
pub mod reply;
pub mod request;

pub use error::NbdError;

/// What a client may ask of the codec before it is refused or its connection is closed. All sizes
/// are in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Longest option data that is read into memory. Longer data is skipped and answered with
    /// `NBD_REP_ERR_TOO_BIG`.
    pub max_option_bytes: u32,
    /// Longest option data that is skipped; beyond it the connection is closed.
    pub max_option_skip_bytes: u32,
    /// Options a client may send before the connection is closed.
    pub max_options: u32,
    /// Longest payload of a refused write that is received and thrown away; a write that names
    /// more closes the connection. The protocol document asks for at least 32 MiB.
    pub max_drain_bytes: u32,
    /// Most extents in one answer to `NBD_CMD_BLOCK_STATUS`; the client asks on from where the
    /// answer ended.
    pub max_extents: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_option_bytes: 32 * 1024,
            max_option_skip_bytes: 1024 * 1024,
            max_options: 256,
            max_drain_bytes: 64 * 1024 * 1024,
            max_extents: 1024,
        }
    }
}
