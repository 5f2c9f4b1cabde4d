//! `hn4ctl`: control of a node, see `docs/OPERATIONS.md`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use hn4_replicad::cli::args::Cli;
use hn4_replicad::cli::run::run;

fn main() -> ExitCode {
    run(&Cli::parse())
}
