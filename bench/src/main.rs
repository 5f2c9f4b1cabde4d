//! `hn4-bench`: runs fio's job files, and compares servers side by side.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use hn4_bench::compare;
use hn4_bench::drain;
use hn4_bench::drive;
use hn4_bench::instructions;
use hn4_bench::job::JobFile;
use hn4_bench::lanes;
use hn4_bench::parity;
use hn4_bench::progress::Progress;
use hn4_bench::proofs;
use hn4_bench::replication;
use hn4_bench::report;
use hn4_bench::target::{Target, TargetSpec};

/// Measures block storage: files, devices and NBD servers, with fio's own job files.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a job file. Jobs that write overwrite the target.
    Run(RunArgs),
    /// Compare hn4-replicad with the other servers that are installed here.
    Compare(compare::Options),
    /// Run one job on one raw file in fio, in our ring and in other runtimes, in turns.
    Parity(parity::Options),
    /// Run volumes side by side in this process.
    Lanes(lanes::Options),
    /// Write at random until the overlay is full and beyond, and judge what clients notice.
    Drain(drain::Options),
    /// Start two daemons on loopback and measure what replication costs.
    Replication(replication::Options),
    /// Run a daemon with proofs and one without, in turns, and measure what proofs cost.
    Proofs(proofs::Options),
    /// Count the instructions of a request in the engine's core, with valgrind.
    Instructions(instructions::Options),
    /// The work that `instructions` counts.
    #[command(hide = true)]
    Work(instructions::WorkOptions),
}

#[derive(Args)]
struct RunArgs {
    /// A job file as fio reads it
    jobfile: PathBuf,
    /// raw:PATH for a file or device, nbd:URI for a server, engine:FOLDER for the engine in
    /// process, replicated:FOLDER for a volume in two daemons, tokio-uring:PATH or glommio:PATH for
    /// other runtimes
    #[arg(long, value_name = "TARGET")]
    target: TargetSpec,
    /// Also write the report as JSON in fio's layout
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also draw the report, as an HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Also write the histograms: a percentile table if the name ends in .hgrm, else an HDR
    /// interval log (.hlog)
    #[arg(long, value_name = "FILE")]
    hdr: Option<PathBuf>,
    /// Also measure the CPU time of this process, the server
    #[arg(long, value_name = "PID")]
    server_pid: Option<u32>,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(args) => run(&args),
        Command::Compare(options) => compare::run(&options),
        Command::Parity(options) => parity::run(&options),
        Command::Lanes(options) => lanes::run(&options),
        Command::Drain(options) => drain::run(&options),
        Command::Replication(options) => replication::run(&options),
        Command::Proofs(options) => proofs::run(&options),
        Command::Instructions(options) => instructions::run(&options),
        Command::Work(options) => instructions::work(options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hn4-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &RunArgs) -> Result<()> {
    let name = args.jobfile.display();
    let text = std::fs::read_to_string(&args.jobfile).with_context(|| format!("reading {name}"))?;
    let file = JobFile::parse(&text).with_context(|| format!("{name}"))?;
    for note in &file.notes {
        eprintln!("note: {name}: {note}");
    }
    let target = Target::open(&args.target)?;
    let progress = Progress::default();
    let outcomes = std::thread::scope(|scope| {
        scope.spawn(|| progress.show());
        let server = args.server_pid.or(target.server_pid());
        let outcomes = drive::run_watched(&file.jobs, &target, server, &progress);
        progress.end();
        outcomes
    })?;
    print!("{}", report::table(&outcomes));
    if let Some(path) = &args.json {
        let value = report::json(&outcomes, &args.target.to_string());
        let text = serde_json::to_string_pretty(&value)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.hdr {
        report::hdr::write(path, &outcomes)?;
    }
    if let Some(path) = &args.html {
        let text = report::picture::html(&outcomes, &args.target.to_string());
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
