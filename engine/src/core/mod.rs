//! The core of a volume: pure logic between a client's request and operations on two disks.
//!
//! ```text
//! request ─▶ overlay (open epoch) ─▶ seal ─▶ journal ─▶ sweep ─▶ superblock
//!                                      │         │
//!                                      └─ feed ──┘─▶ peers        replica ◀─ peers
//! ```
//!
//! **Architecture invariant:** nothing here knows a clock, a file, a socket or a thread. Memory is
//! a [`crate::arena::SlotMemory`]; what is to be done comes out as [`Action`]s.

pub mod config;
pub mod event;
pub mod extents;
pub mod overlay;
mod pace;
pub mod recovery;

mod apply;
mod checkpoint;
mod checks;
mod compare;
mod copying;
mod create;
mod damage;
mod election;
mod failed;
mod feed;
mod fork;
mod io;
mod journal;
mod lag;
mod merge;
pub mod mutants;
mod peers;
mod pieces;
mod pins;
mod prover;
mod reads;
mod replica;
mod resync;
mod roles;
mod scan;
mod seal;
mod seed;
mod shadow;
mod sources;
mod superblock;
mod sweep;
mod tree;
mod view;
mod volume;
mod waiters;

pub use checks::{SAMPLE_BLOCKS, SAMPLE_EVERY, VerifyReads};
pub use config::{AckMode, LagPolicy, MAX_PEERS, OnDegraded, VolumeConfig};
pub use election::Waiting;
pub use event::{Action, Actions, Event};
pub use failed::FailedClosed;
pub use feed::Peer;
pub use lag::{LagState, OnExceed};
pub use peers::{PeerSet, Place};
pub(crate) use prover::frame_in;
pub use replica::Obstacle;
pub use seal::Lanes;
pub use sources::Source;
pub use view::ReplicaLag;
pub use volume::Volume;
