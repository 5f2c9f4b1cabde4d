//! What travels: frames, and the messages inside them.
//!
//! A *frame* is the unit that is numbered, checked and authenticated ([`frame`], WORMHOLE_SPEC 2).
//! Its payload is a control message in protobuf ([`control`]) or a bulk message with a fixed layout
//! ([`data`]), because bulk bytes shall be sliced, not copied. The frame is the same inside a QUIC
//! stream, where frames follow one another, and in WebSocket, where each is one binary message.
//!
//! Everything here takes bytes from a peer: nothing panics, and no length is believed before it was
//! compared with a bound.
//!
//! Not here: which message may come when (that is `session`), sockets, keys' origin (`tls`).

pub mod control;
pub mod data;
pub mod frame;

pub use frame::{
    FrameKind, FrameOpener, FrameSealer, HEADER_BYTES, OpenFrame, SessionKeys, Stream, StreamKeys,
    TRAILER_BYTES, WireError, WireFrame, stream_of,
};

/// The generated protobuf types.
#[expect(
    missing_docs,
    reason = "generated code; proto/control.proto describes the fields"
)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/hn4.wormhole.v1.rs"));
}

/// The largest payload a frame may ever have, whatever a configuration says.
pub const MAX_FRAME_BYTES: usize = 16 << 20;
