//! Promises of the volume format, over volumes in memory.

mod common;
mod defects;
mod properties;
mod wormhole;
