//! Wormholes: how copies of a volume talk to each other.
#![forbid(unsafe_code)]

pub mod session;
pub mod wire;
