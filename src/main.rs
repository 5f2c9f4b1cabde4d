//! `hn4-replicad`: the daemon, and the quickstart that shows what it does.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hn4_replicad::config::{Config, DEFAULT_PATH};
use hn4_replicad::{daemon, quickstart};
use nix::sys::signal::Signal;
use tracing_subscriber::EnvFilter;

/// Replicates block volumes: a RAM overlay with strict flush, one delta log, copies that are
/// provably the same.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the volumes of a configuration until told to stop.
    Run {
        /// The configuration.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
        /// End at once when the process that started this one ends. For tests.
        #[arg(long, hide = true)]
        die_with_parent: bool,
    },
    /// Show on this machine, with two daemons on loopback, that nothing that was flushed is lost.
    Quickstart(quickstart::Options),
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("HN4_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let result = match Arguments::parse().command {
        Command::Run {
            config,
            die_with_parent,
        } => run(&config, die_with_parent),
        Command::Quickstart(options) => quickstart::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hn4-replicad: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: &Path, die_with_parent: bool) -> anyhow::Result<()> {
    if die_with_parent {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    }
    #[cfg(feature = "mutants")]
    plant_bug()?;
    daemon::run(&Config::load(config)?)
}

/// Switches on the bug that `HN4_PLANTED_BUG` names, for tests of the tests.
#[cfg(feature = "mutants")]
fn plant_bug() -> anyhow::Result<()> {
    use hn4_engine::core::mutants::{named, select};
    if let Ok(name) = std::env::var("HN4_PLANTED_BUG") {
        let bug = named(&name);
        anyhow::ensure!(bug.is_some(), "HN4_PLANTED_BUG: there is no bug {name}");
        tracing::error!(bug = %name, "this daemon loses data on purpose");
        select(bug);
    }
    Ok(())
}
