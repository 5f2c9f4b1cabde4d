//! The engine: everything between a client's request and the medium.
//!
//! **Architecture invariant:** unsafe code stands only in `arena`, `ring` and the kernel-interface
//! files of `device`; each of those modules says so at its top. Everything else is checked Rust.
//!
//! **Architecture invariant:** there is no async runtime here. A shard is one thread around one
//! ring.
#![deny(unsafe_code)]

pub mod arena;
pub mod core;
pub mod device;
pub mod nbd;
pub mod ring;
pub mod shard;
