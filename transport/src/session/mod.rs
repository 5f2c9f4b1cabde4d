//! One conversation about one volume with one peer, without I/O.
//!
//! [`Session`] takes events and the time, and gives out frames to transmit and outputs for the
//! daemon. The same code runs over QUIC, over WebSocket and in the simulator.
//!
//! Invariants:
//! - Nothing a peer sends panics, or makes the session hold more than its [`Config`] and the credit
//!   that the daemon granted allow.
//! - No frame of the peer is used before hello was compared, nor after the session was closed.
//! - The control stream never waits for the data stream.
//! - A message that was compressed is unpacked to no more than it may have raw, and only where both
//!   sides have agreed on it. Credit and queues count raw bytes.
//!
//! Not here: what an epoch contains, whether it fits the chain, whether an ack completes a write
//! (the daemon); connections, reconnecting and backoff, training of dictionaries (the driver).

pub mod api;
mod asking;
pub mod capability;
mod compression;
mod control_lane;
mod core;
mod data_lane;
pub mod hello;
mod inbound;
mod receive;
pub mod roles;
mod unfinished;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use api::*;
use capability::CapabilityList;
pub use compression::{CompressionStatus, Traffic};
use hn4_proof::scxq2::train::Renewal;

pub use self::core::{Event, Session};
pub use self::roles::PeerRoles;

/// Limits and times of a session. Both sides may have different ones, except for the sizes, which
/// must not be smaller at the receiver than at the sender.
#[derive(Clone, Debug)]
pub struct Config {
    /// Lowest and highest protocol version spoken.
    pub protocol: (u32, u32),
    /// What is offered to the peer.
    pub capabilities: Vec<CapabilityList>,
    /// When dictionaries of SCXQ2 are made and renewed, if the peer takes them.
    pub dictionaries: Renewal,
    /// Epoch frames are cut into chunks of this many bytes, so that other volumes' data and, on
    /// WebSocket, control can come in between.
    pub chunk_bytes: usize,
    /// Bytes of volume data in one piece of a full copy, at most.
    pub max_piece_bytes: usize,
    /// How much longer than `max_epoch_bytes` an epoch's frame may be: header, record table,
    /// padding.
    pub epoch_overhead_bytes: u64,
    /// Unacknowledged frames on the data stream, at most. WORMHOLE_SPEC 2 says 1024.
    pub data_window: usize,
    /// Unacknowledged frames on the control stream, at most.
    pub control_window: usize,
    /// Bytes of frames and pieces that wait to be sent, before the session takes no more input.
    pub queue_bytes: usize,
    /// Time for the peer to say hello.
    pub hello_timeout: Duration,
    /// A heartbeat is sent when nothing was heard for this long.
    pub heartbeat_interval: Duration,
    /// Time for a sign of life after a heartbeat was sent.
    pub heartbeat_timeout: Duration,
    /// A frame that has begun ends within this time, or at least 16 KiB of it come; else it counts
    /// as damaged.
    pub frame_timeout: Duration,
    /// What the peer may be for the volume.
    pub peer_roles: PeerRoles,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            protocol: (1, 1),
            capabilities: capability::offered(false),
            dictionaries: Renewal::default(),
            chunk_bytes: 256 << 10,
            max_piece_bytes: 1 << 20,
            epoch_overhead_bytes: 16 << 20,
            data_window: 1024,
            control_window: 256,
            queue_bytes: 64 << 20,
            hello_timeout: Duration::from_secs(5),
            heartbeat_interval: Duration::from_secs(2),
            heartbeat_timeout: Duration::from_secs(5),
            frame_timeout: Duration::from_secs(10),
            peer_roles: PeerRoles::default(),
        }
    }
}
