//! `hn4-bench`: load from fio's own job files against a raw file or an NBD server, and a fair
//! comparison of this project with other servers on the same machine.
//!
//! 1. [`job`] reads job files, [`pattern`] turns a job into requests.
//! 2. [`target`] carries requests out: [`raw`] through the engine's ring, [`nbd`] over a socket,
//!    [`engine`] in a volume of its own in this process.
//! 3. [`drive`] keeps a job's queue full and measures, [`stats`] keeps what was measured.
//! 4. [`report`] shows it: a table, and JSON in fio's layout.
//! 5. [`compare`] starts the servers, lets the same load run against each, and judges.
//! 6. [`instructions`] counts what a request costs in the engine's core.
//!
//! **Architecture invariant:** every NBD server is measured by the same client, so that what the
//! client costs is the same in each figure.
//!
//! **Not here:** replication, pictures, live progress, and other runtimes.
#![forbid(unsafe_code)]

pub mod compare;
pub mod contents;
pub mod cpu;
pub mod drive;
pub mod engine;
pub mod files;
pub mod instructions;
pub mod job;
pub mod nbd;
pub mod pattern;
pub mod progress;
pub mod raw;
pub mod report;
pub mod stats;
pub mod stream;
pub mod target;
