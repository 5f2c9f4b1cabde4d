//! What proofs cost: one daemon with proofs and one without, in turns on one disk.
//!
//! 1. Writes and flushes of 4 KiB, one at a time, on logs behind a fixed delay: there the margin of
//!    a few percent can be judged, which noise hides on a real disk. Needs nbdkit and nbdfuse.
//! 2. Throughput of 4 KiB random writes, 32 at a time, on the disk itself: with an overlay that
//!    takes them all, and with one that is full, so that writers wait for the backing.
//! 3. Hashing of blocks against `b3sum --num-threads 1` on the same file. Both map it.
//!
//! Run it on a quiet machine: the prover works in the background, so whatever else uses the
//! processors is in the figures.

use std::fs::File;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use hn4_proof::blocks;
use hn4_replicad::quickstart::rig::{NODES, Node, Plan, make_nodes};

use crate::compare::middle;
use crate::drive;
use crate::files::make_file;
use crate::job::JobFile;
use crate::mapped::Mapped;
use crate::replication::daemon;
use crate::report::align;
use crate::slow::{SlowFile, is_there, missing_tool};
use crate::stats::Stats;
use crate::target::{Target, TargetSpec};

/// What a write and flush may take with proofs, of what they take without.
const LATENCY_MOST: f64 = 1.03;
/// What is to be left of the throughput.
const THROUGHPUT_LEAST: f64 = 0.9;
/// What is to be reached of `b3sum`.
const HASH_LEAST: f64 = 0.8;
const LIMIT: Duration = Duration::from_secs(60);
/// MiB of the volume under random writes.
const SIZE_MIB: u64 = 256;
/// MiB of the overlay in front of it.
const OVERLAYS: [(&str, u64); 2] = [
    ("the overlay has room", 4 * SIZE_MIB),
    ("the overlay is full", SIZE_MIB),
];

/// What to measure, and how long.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Short runs: an impression in half a minute
    #[arg(long)]
    pub quick: bool,
    /// Rounds, each with and without proofs [default: 5, with --quick 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Milliseconds that each write of a delayed log takes
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub delay_ms: u64,
    /// Folder on the disk to be measured; all files are removed
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// The daemon to be measured [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub daemon: Option<PathBuf>,
}

impl Options {
    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 5 })
    }

    fn runtime_ms(&self) -> u64 {
        if self.quick { 1000 } else { 5000 }
    }
}

/// Measures and prints.
///
/// # Errors
/// If the daemon is not there, or fails.
pub fn run(options: &Options) -> Result<()> {
    let daemon = daemon(options.daemon.as_deref())?;
    ensure!(
        daemon.is_file(),
        "{}: not there; build it (cargo build --release -p hn4-replicad), or name one with \
         --daemon",
        daemon.display()
    );
    let folder = tempfile::Builder::new()
        .prefix("hn4-bench-")
        .tempdir_in(&options.dir)
        .with_context(|| format!("{}", options.dir.display()))?;
    let folder = folder.path().canonicalize()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "proofs on against off, {cores} cores, {} rounds",
        options.rounds()
    );
    match missing_tool() {
        None => println!("{}", delayed(&folder.join("delayed"), &daemon, options)?),
        Some(tool) => println!("4 KiB write + flush on a delayed log: skipped, no {tool} here"),
    }
    for (overlay, overlay_mib) in OVERLAYS {
        let folder = folder.join(overlay_mib.to_string());
        let table = throughput(&folder, &daemon, options, overlay_mib)?;
        println!("4 KiB random write, QD32, over NBD, {overlay}\n{table}");
    }
    println!("{}", hashing(&folder, options)?);
    Ok(())
}

/// A node by itself, with proofs or without.
fn node(folder: &Path, daemon: &Path, plan: &Plan, proof: bool) -> Result<Node> {
    let mut nodes = make_nodes(folder, daemon, plan)?;
    let node = nodes.pop().context("a node")?;
    let text = std::fs::read_to_string(node.config())?;
    let switch = if proof { "on" } else { "off" };
    let line = format!("[[volume]]\nproof = \"{switch}\"\n");
    std::fs::write(node.config(), text.replacen("[[volume]]\n", &line, 1))?;
    Ok(node)
}

fn job(node: &mut Node, text: &str) -> Result<Stats> {
    node.start()?;
    let jobs = JobFile::parse(text)?.jobs;
    let target = Target::open(&TargetSpec::Nbd(node.uri().parse()?))?;
    let mut outcomes = drive::run(&jobs, &target, node.pid())?;
    drop(target);
    node.stop(LIMIT)?;
    let outcome = outcomes.pop().context("one job")?;
    let stats = outcome.stats.into_iter().next().context("one thread")?;
    ensure!(stats.ios() > 0, "not one request was completed in the time");
    Ok(stats)
}

/// Both nodes in turns; which is first changes from round to round.
fn in_turns(nodes: &mut [Node; 2], rounds: u32, text: &str) -> Result<[Vec<Stats>; 2]> {
    let mut found = [Vec::new(), Vec::new()];
    for round in 0..rounds as usize {
        for turn in 0..2 {
            let which = (round + turn) % 2;
            found[which].push(job(&mut nodes[which], text)?);
        }
    }
    Ok(found)
}

fn median(stats: &[Stats], of: impl Fn(&Stats) -> f64) -> f64 {
    middle(stats.iter().map(of)).map_or(0.0, |spread| spread.median)
}

fn verdict(met: bool, text: &str) -> String {
    let word = if met { "met" } else { "MISSED" };
    format!("verdict: {word}: {text}\n")
}

fn delayed(folder: &Path, daemon: &Path, options: &Options) -> Result<String> {
    let plan = Plan {
        size_mib: 64,
        log_mib: 128,
        sector_bytes: 4096,
        existing: true,
        alone: true,
        policy: "assume_strict_flush = true\n".to_owned(),
        ..Plan::default()
    };
    let mut logs = Vec::new();
    let mut make = |proof: bool| -> Result<Node> {
        let place = folder.join(if proof { "on" } else { "off" });
        let files = place.join(NODES[0]);
        std::fs::create_dir_all(&files)?;
        let backing = File::create(files.join("backing"))?;
        backing.set_len(plan.size_mib << 20)?;
        let log = SlowFile::in_memory(files.join("log"), plan.log_mib, options.delay_ms)?;
        logs.push(log);
        node(&place, daemon, &plan, proof)
    };
    let mut nodes = [make(true)?, make(false)?];
    let text = format!(
        "[flush]\nrw=randwrite\nbs=4k\niodepth=1\nfdatasync=1\nnorandommap\ntime_based\n\
         runtime={}ms\nramp_time=200ms\n",
        options.runtime_ms()
    );
    let found = in_turns(&mut nodes, options.rounds(), &text)?;
    let us = |nanos: u64| nanos as f64 / 1e3;
    let both = |stats: &Stats| {
        us(stats.write.latency.value_at_percentile(50.0))
            + us(stats.sync.latency.value_at_percentile(50.0))
    };
    let p99 = |stats: &Stats| us(stats.sync.latency.value_at_percentile(99.0));
    let row = |label: &str, stats: &[Stats]| {
        let cell = |value: f64| format!("{value:.0}");
        vec![
            label.to_owned(),
            cell(median(stats, both)),
            cell(median(stats, p99)),
        ]
    };
    let head = ["proofs", "write + flush, us", "flush p99, us"].map(str::to_owned);
    let table = align(&[head.to_vec(), row("on", &found[0]), row("off", &found[1])]);
    let ratio = median(&found[0], both) / median(&found[1], both);
    let delay = options.delay_ms;
    let text = format!("{ratio:.3} of the time without, at most {LATENCY_MOST}");
    Ok(format!(
        "4 KiB write + flush, QD1, each write of the log takes {delay} ms\n{table}{}",
        verdict(ratio <= LATENCY_MOST, &text)
    ))
}

fn throughput(folder: &Path, daemon: &Path, options: &Options, overlay_mib: u64) -> Result<String> {
    let plan = Plan {
        size_mib: SIZE_MIB,
        log_mib: 1024,
        overlay_mib,
        alone: true,
        policy: String::new(),
        ..Plan::default()
    };
    let mut nodes = [
        node(&folder.join("on"), daemon, &plan, true)?,
        node(&folder.join("off"), daemon, &plan, false)?,
    ];
    let text = format!(
        "[write]\nrw=randwrite\nbs=4k\niodepth=32\nnorandommap\ntime_based\nruntime={}ms\n\
         ramp_time=200ms\n",
        options.runtime_ms()
    );
    let found = in_turns(&mut nodes, options.rounds(), &text)?;
    let row = |label: &str, stats: &[Stats]| {
        let cpu = |stats: &Stats| stats.server_us_per_io().unwrap_or(0.0);
        vec![
            label.to_owned(),
            format!("{:.0}", median(stats, Stats::iops)),
            format!("{:.1}", median(stats, cpu)),
        ]
    };
    let head = ["proofs", "IOPS", "daemon's CPU us/IO"].map(str::to_owned);
    let table = align(&[head.to_vec(), row("on", &found[0]), row("off", &found[1])]);
    let ratio = median(&found[0], Stats::iops) / median(&found[1], Stats::iops);
    let text = format!("{ratio:.3} of the throughput without, at least {THROUGHPUT_LEAST}");
    Ok(format!(
        "{table}{}",
        verdict(ratio >= THROUGHPUT_LEAST, &text)
    ))
}

/// Leaves of all blocks of a file in one thread, against `b3sum` in one.
fn hashing(folder: &Path, options: &Options) -> Result<String> {
    if !is_there("b3sum") {
        return Ok("hashing: skipped, no b3sum here\n".to_owned());
    }
    let bytes: u64 = if options.quick { 256 << 20 } else { 1 << 30 };
    let path = folder.join("data");
    make_file(&path, bytes)?;
    // The same pages of the cache for both, which are there once they have been read.
    std::io::copy(&mut File::open(&path)?, &mut std::io::sink())?;
    let rate = |took: Duration| bytes as f64 / f64::from(1 << 20) / took.as_secs_f64();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds() {
        let begun = Instant::now();
        blocks::leaves_of(&Mapped::new(&path)?, |leaf| _ = black_box(leaf));
        ours.push(rate(begun.elapsed()));
        let begun = Instant::now();
        let mut b3sum = Command::new("b3sum");
        let b3sum = b3sum.args(["--num-threads", "1"]).arg(&path);
        let status = b3sum.stdout(Stdio::null()).status()?;
        ensure!(status.success(), "b3sum failed: {status}");
        theirs.push(rate(begun.elapsed()));
    }
    let median = |rates: &[f64]| middle(rates.iter().copied()).map_or(0.0, |it| it.median);
    let (ours, theirs) = (median(&ours), median(&theirs));
    let text = format!(
        "{:.3} of b3sum's speed, at least {HASH_LEAST}",
        ours / theirs
    );
    Ok(format!(
        "leaves of 4 KiB blocks, one thread: {ours:.0} MiB/s; b3sum --num-threads 1: {theirs:.0} \
         MiB/s\n{}",
        verdict(ours / theirs >= HASH_LEAST, &text)
    ))
}
