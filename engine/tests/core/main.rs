//! The core alone, step by step, on devices in memory.

mod checks;
mod copying;
mod drain;
mod elections;
mod forks;
mod memory;
mod merge;
mod peers;
mod proofs;
mod recovery;
mod resync;
mod seeded;
mod tree;
