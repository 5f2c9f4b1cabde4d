//! What replication costs: two real daemons on loopback, with real files on one disk.
//!
//! 1. `latency`: what each `ack` adds to a flush.
//! 2. `lag`: how far the replica is behind on a line that is nearly full, and on one that is.
//! 3. `catch_up`: how fast it gets what it missed.
//! 4. `copy`: what a first copy costs on the wire.
//! 5. `idle`: what both cost when there is nothing to do.
//!
//! **Invariant:** nothing leaves loopback, and no daemon outlives the measurement.
//!
//! **Not here:** nodes on different disks or machines. Primary and replica share disk and cores
//! here, so that a catch-up at the disk's speed is out of reach: what one reads, the other writes
//! twice.

mod catch_up;
mod copy;
mod idle;
mod lag;
mod latency;
mod link;
mod pair;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use hn4_replicad::quickstart::rig::Plan;

pub(crate) use self::pair::Pair;
use crate::report::align;

const MIB: u64 = 1 << 20;

/// What to measure, and how long.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Short runs: an impression in half a minute
    #[arg(long)]
    pub quick: bool,
    /// Folder on the disk to be measured; all files are removed
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// The daemon to be measured [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub daemon: Option<PathBuf>,
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
    measure(folder.path(), &daemon, options.quick)
}

/// The daemon that was named, or the one beside this program.
pub(crate) fn daemon(named: Option<&Path>) -> Result<PathBuf> {
    Ok(match named {
        Some(path) => path.canonicalize().context("--daemon")?,
        None => std::env::current_exe()?.with_file_name("hn4-replicad"),
    })
}

/// How and where to measure.
struct Setup {
    folder: PathBuf,
    daemon: PathBuf,
    quick: bool,
    rounds: u32,
}

impl Setup {
    /// The first one if it is to be quick.
    fn milliseconds(&self, quick: u64, else_ms: u64) -> u64 {
        if self.quick { quick } else { else_ms }
    }
}

/// Measures all rows in a folder and prints each when it is done.
///
/// # Errors
/// If a daemon fails.
pub(crate) fn measure(folder: &Path, daemon: &Path, quick: bool) -> Result<()> {
    let begun = Instant::now();
    let setup = Setup {
        folder: folder.canonicalize()?,
        daemon: daemon.to_owned(),
        quick,
        rounds: if quick { 1 } else { 3 },
    };
    let transports: &[&str] = if quick { &["quic"] } else { &["quic", "wss"] };
    for transport in transports {
        println!("{}", latency::measure(&setup, transport)?);
    }
    over_a_line(&setup).context("two nodes with a line between them")?;
    println!("{}", copy::on_slow_disks(&setup)?);
    directly(&setup).context("two nodes, connected directly")?;
    println!("replication took {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

fn plan(transport: &'static str, size_mib: u64) -> Plan {
    Plan {
        size_mib,
        log_mib: 4 * size_mib,
        overlay_mib: size_mib / 2,
        transport,
        policy: "ack = \"async\"\n".to_owned(),
        ..Plan::default()
    }
}

/// First copy, lag and catch-up over a line whose rate is known and whose bytes are counted.
fn over_a_line(setup: &Setup) -> Result<()> {
    let size_mib = setup.milliseconds(64, 256);
    let plan = plan("wss", size_mib);
    let (mut pair, link, data) = copy::half_full(setup, &plan)?;
    let ends = (&mut pair, &link, data);
    println!("{}", copy::measure(setup, ends, size_mib)?);
    pair.alpha.wait_for_peer(pair::LIMIT)?;
    println!("{}", lag::measure(setup, &mut pair, &link)?);
    let found = catch_up::limited(&mut pair, &link, size_mib / 2)?;
    println!("{}", caught_up(setup, "WebSocket, limited", found, true)?);
    Ok(())
}

/// Catch-up and idleness without anything between the nodes.
fn directly(setup: &Setup) -> Result<()> {
    let size_mib = setup.milliseconds(128, 512);
    let mut pair = Pair::make(
        &setup.folder.join("direct"),
        &setup.daemon,
        &plan("quic", size_mib),
    )?;
    pair.start()?;
    let found = catch_up::measure(&mut pair, size_mib / 2)?;
    println!("{}", caught_up(setup, "QUIC, no limit", found, false)?);
    println!("{}", idle::measure(setup, &mut pair)?);
    Ok(())
}

fn caught_up(setup: &Setup, how: &str, found: catch_up::Found, limited: bool) -> Result<Table> {
    let line = limited.then_some((catch_up::LINE_RATE / MIB) as f64);
    let disk = catch_up::disk_rate(setup)?;
    let mut table = Table::new(
        &format!("catch-up of a replica that was away, {how}"),
        &["  ", "log MiB", "s", "MiB/s", "line MiB/s", "disk MiB/s"],
    );
    table.row(vec![
        "  replica".to_owned(),
        (found.bytes / MIB).to_string(),
        format!("{:.2}", found.took.as_secs_f64()),
        format!("{:.0}", found.rate()),
        line.map_or("-".to_owned(), |line| format!("{line:.0}")),
        format!("{disk:.0}"),
    ]);
    table.say(&catch_up::judge(found, line, disk));
    Ok(table)
}

/// A row of the comparison with its figures and what is to be said of them.
struct Table {
    title: String,
    cells: Vec<Vec<String>>,
    words: Vec<String>,
}

impl Table {
    fn new(title: &str, head: &[&str]) -> Self {
        Self {
            title: title.to_owned(),
            cells: vec![head.iter().map(|&name| name.to_owned()).collect()],
            words: Vec::new(),
        }
    }

    fn row(&mut self, cells: Vec<String>) {
        self.cells.push(cells);
    }

    fn say(&mut self, words: &str) {
        self.words.push(words.to_owned());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}", self.title, align(&self.cells))?;
        for words in &self.words {
            writeln!(f, "  {words}")?;
        }
        Ok(())
    }
}

fn verdict(met: bool, text: &str) -> String {
    let word = if met { "met" } else { "MISSED" };
    format!("verdict: {word}: {text}")
}
