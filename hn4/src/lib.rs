//! The HN4 on-disk format and the delta-log format. Sans-IO, no unsafe code.
#![forbid(unsafe_code)]

pub mod log;
pub mod types;
