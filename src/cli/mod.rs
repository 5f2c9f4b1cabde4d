//! What `hn4ctl` does, as library functions, so that the quickstart can do the same in process.

pub mod args;
mod claims;
pub mod diff;
pub mod hn4_args;
pub mod hn4_device;
mod hn4_tools;
pub mod peer_args;
mod peer_commands;
pub mod pki;
pub mod proof_commands;
pub mod run;
mod shade;
pub mod show;
pub mod token;
pub mod volume;
mod volume_commands;
