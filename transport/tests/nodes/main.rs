//! Real nodes in one process, over real sockets on loopback.

mod common;
mod exchange;
