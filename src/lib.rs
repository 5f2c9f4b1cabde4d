//! The node: configuration, control, daemon and command line around engine and transport.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod divergence;
pub mod quickstart;
