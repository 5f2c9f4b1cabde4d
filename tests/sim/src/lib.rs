//! Thousands of disasters a minute: several nodes that run the real core of the engine, over disks,
//! a network, a clock and an operator that all come from one seed.
//!
//! **Architecture invariant:** what is simulated is the world, never the core. The core's own
//! `step` and recovery run here as they run in the daemon.
//!
//! | module | what |
//! |---|---|
//! | `plan` | what a seed decides beforehand |
//! | `world` | time, the queue, sessions |
//! | `steps` | a step of a core, and carrying out its actions |
//! | `node`, `disk`, `memory` | what a node consists of |
//! | `link` | what a session decides by itself |
//! | `clients` | requests, and what each answer promises |
//! | `operator` | disasters and repairs |
//! | `oracle`, `checkers` | what is legal |
#![forbid(unsafe_code)]

mod checkers;
mod clients;
mod disk;
mod link;
mod memory;
mod node;
mod operator;
mod oracle;
mod plan;
mod proofs;
mod rng;
mod sessions;
mod steps;
mod trace;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

#[cfg(feature = "mutants")]
pub use hn4_engine::core::mutants;
use world::World;
pub use world::{Stats, Violation};

/// How a seed ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The promise that was broken, if one was.
    pub violation: Option<Violation>,
    /// What happened.
    pub stats: Stats,
    /// Hash of everything that happened.
    pub trace_hash: u64,
    /// The last events in words, if they were wanted.
    pub words: Vec<String>,
}

/// Runs a seed to its end.
#[must_use]
pub fn run_seed(seed: u64, words: bool) -> Report {
    let mut world = World::new(seed, words);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    let violation = match outcome {
        Ok(result) => result.err(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            Some(Violation {
                promise: "panic",
                detail: text.unwrap_or_default(),
            })
        }
    };
    Report {
        seed,
        violation,
        stats: world.stats,
        trace_hash: world.trace.hash(),
        words: world.trace.words().map(str::to_owned).collect(),
    }
}
