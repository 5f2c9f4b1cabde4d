//! The HN4 on-disk format and the delta-log format. Sans-IO, no unsafe code.
#![forbid(unsafe_code)]

pub mod address;
pub mod alloc;
pub mod anchor;
pub mod bitmap;
pub mod block;
pub mod chronicle;
pub mod cortex;
pub mod crc;
pub mod device;
pub mod epoch_ring;
pub mod format;
pub mod layout;
pub mod log;
pub mod mount;
pub mod nano;
pub mod num;
pub mod plan;
pub mod profile;
pub mod qmask;
pub mod reserve;
pub mod status;
pub mod superblock;
pub mod tcc;
pub mod tool;
pub mod types;
pub mod unmount;
pub mod volume;
pub mod wormhole;
