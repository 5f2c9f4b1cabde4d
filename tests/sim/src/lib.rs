//! Thousands of disasters a minute: several nodes that run the real core of the engine, over disks,
//! a network, a clock and an operator that all come from one seed.
//!
//! **Architecture invariant:** what is simulated is the world, never the core. The core's own
//! `step` and recovery run here as they run in the daemon; in some seeds the transport's own
//! session and the daemon's own translation run between them.
//!
//! | module | what |
//! |---|---|
//! | `plan`, `lean` | what a seed decides beforehand |
//! | `world` | time, the queue |
//! | `steps` | a step of a core, and what is seen of it |
//! | `actions` | carrying out what a core says |
//! | `node`, `disk`, `memory`, `pages` | what a node consists of |
//! | `net`, `link`, `wire` | sessions: what they do to messages; modelled; real |
//! | `clients` | requests, and what each answer promises |
//! | `operator`, `disasters`, `faults` | disasters and repairs |
//! | `trees`, `gather`, `mend`, `meetings` | state trees: the daemon's tree thread |
//! | `damage` | damage of backings, and what it excuses |
//! | `peers` | who is a peer of whom, and changes of that |
//! | `oracle`, `checkers` | what is legal |
//! | `shrink` | the shortest list of faults that still fails |
//! | `campaign` | many seeds on several threads |
#![forbid(unsafe_code)]

mod actions;
mod campaign;
mod checkers;
mod clients;
mod damage;
mod disasters;
mod disk;
mod faults;
mod gather;
mod lean;
mod link;
mod meetings;
mod memory;
mod mend;
mod net;
mod node;
mod operator;
mod oracle;
mod pages;
mod peers;
mod plan;
mod proofs;
#[path = "../../../src/daemon/tree/repair.rs"]
mod repair;
mod rng;
mod shrink;
mod stats;
mod steps;
mod trace;
#[path = "../../../src/daemon/translate.rs"]
mod translate;
mod trees;
mod trucks;
mod wire;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

#[cfg(feature = "mutants")]
pub use hn4_engine::core::mutants;

pub use campaign::run_many;
pub use faults::{Fault, Happened};
pub use lean::Corner;
pub use plan::{Knobs, MOST_NODES};
pub use shrink::{Shrunk, shrink};
pub use stats::Stats;
pub use world::Violation;
use world::World;

/// How a seed is to be run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Keep the last events in words.
    pub words: bool,
    /// Only the faults with these numbers happen.
    pub keep: Option<Vec<u64>>,
    /// What is not left to the seed.
    pub knobs: Knobs,
}

/// How a seed ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The promise that was broken, if one was.
    pub violation: Option<Violation>,
    /// What happened.
    pub stats: Stats,
    /// The faults that happened, in order.
    pub faults: Vec<Happened>,
    /// Hash of everything that happened.
    pub trace_hash: u64,
    /// The last events in words, if they were wanted.
    pub words: Vec<String>,
}

/// Runs a seed to its end.
#[must_use]
pub fn run_seed(seed: u64, options: &Options) -> Report {
    let mut world = World::new(seed, options);
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
    let mut stats = world.stats;
    for happened in &world.faults.happened {
        stats.faults.count(happened.fault);
    }
    Report {
        seed,
        violation,
        stats,
        trace_hash: world.trace.hash(),
        words: world.trace.words().map(str::to_owned).collect(),
        faults: std::mem::take(&mut world.faults.happened),
    }
}
