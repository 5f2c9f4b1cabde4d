//! QUIC: one connection for each pair of nodes, two streams for each volume.
//!
//! The dialer opens the streams of a volume. Each starts with a preamble that says what it is:
//!
//! ```text
//!  0  magic    8 bytes  "HN4WORM1"
//!  8  volume   16 bytes
//! 24  kind     u8       0 control, 1 data
//! 25  zero     7 bytes
//! 32  channel  u64      QUIC id of the control stream, tells sessions on one connection apart
//! ```
//!
//! A volume that is not shared with the peer is answered with a reset, code `NOT_SHARED`, which
//! does not tell whether the volume exists.

mod dial;
mod endpoint;
mod stream;

pub(super) use endpoint::Quic;
