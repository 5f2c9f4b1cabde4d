//! The control socket: how `hn4ctl` talks to the daemon.
//!
//! JSON, one request or response a line, over a unix socket that only its owner can use. A client
//! sends a request and reads one response, as often as it likes.

pub mod api;
pub mod client;
mod copies;
pub mod findings;
pub mod proofs;
pub mod report;
pub mod server;
pub mod trees;

pub use api::{Request, Response};
pub use client::{ClientError, ControlClient};
pub use report::report;

/// Longest request in bytes, with its line end.
pub const REQUEST_BYTES_MAX: u64 = 64 * 1024;
/// Longest response in bytes, with its line end.
pub const RESPONSE_BYTES_MAX: u64 = 16 << 20;
