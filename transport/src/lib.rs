//! Wormholes: how copies of a volume talk to each other.
//!
//! From the inside out:
//!
//! - [`wire`]: frames and messages, as bytes;
//! - [`session`]: one conversation about one volume with one peer, without I/O;
//! - [`tls`] and [`pki`]: who the peer is, and how a node gets its certificate;
//! - [`driver`]: the sockets, QUIC and WebSocket, and tasks that connect sessions with them.
//!
//! **Architecture Invariant:** nothing here has authority. A peer's bytes become proposals for the
//! daemon; this crate knows neither the log's format nor the engine, and changes nothing on disk
//! (except certificate files, on request).
#![forbid(unsafe_code)]

pub mod driver;
pub mod pki;
pub mod session;
pub mod tls;
pub mod wire;
