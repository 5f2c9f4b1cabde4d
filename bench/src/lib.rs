//! `hn4-bench`: load from fio's own job files against a raw file or an NBD server, and a fair
//! comparison of this project with other servers on the same machine.
//!
//! 1. [`job`] reads job files, [`pattern`] turns a job into requests.
//! 2. [`target`] carries requests out: [`raw`] through the engine's ring, [`nbd`] over a socket,
//!    [`engine`] in a volume of its own in this process, [`replicated`] in two daemons.
//! 3. [`drive`] keeps a job's queue full and measures, [`stats`] keeps what was measured.
//! 4. [`report`] shows it: a table, and JSON in fio's layout.
//! 5. [`compare`] starts the servers, lets the same load run against each, and judges.
//! 6. [`instructions`] counts what a request costs in the engine's core.
//! 7. [`baseline`] has other runtimes for io_uring, behind features; [`parity`] lets them, fio and
//!    the ring run one job in turns.
//! 8. [`lanes`] runs volumes side by side in this process, [`drain`] goes on beyond the room of an
//!    overlay.
//! 9. [`replication`] starts two daemons and measures what acknowledgements, lag, catch-up and a
//!    first copy cost; [`proofs`] what proofs cost.
//!
//! **Architecture invariant:** every NBD server is measured by the same client, so that what the
//! client costs is the same in each figure.
//!
// Only `mapped` may.
#![deny(unsafe_code)]

pub mod baseline;
pub mod compare;
pub mod contents;
pub mod cpu;
pub mod drain;
pub mod drive;
pub mod engine;
pub mod files;
pub mod instructions;
pub mod job;
pub mod lanes;
mod mapped;
pub mod nbd;
pub mod parity;
pub mod pattern;
pub mod progress;
pub mod proofs;
pub mod raw;
pub mod replicated;
pub mod replication;
pub mod report;
mod slow;
pub mod stats;
pub mod stream;
pub mod target;

/// Where tests may have their files: on a disk, wherever the build's folder is.
#[cfg(test)]
fn test_folder() -> std::path::PathBuf {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}
