//! Side by side: the same load on our server and on every other one that is installed.
//!
//! All NBD servers get the same client, a file of the same size on the same file system, filled
//! with the same data. Rounds are interleaved: in each round every peer does every row once, the
//! order of the peers changes from round to round, and the medians are compared. A server runs
//! only while it is measured, so that none works in the background of another.

pub(crate) mod fio;
pub mod rows;
pub mod servers;
mod summary;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

use self::rows::{Peer, ROWS, Row, WRITE_DELAY_MS};
use self::servers::{Place, SIZES, Server, missing};
use self::summary::Table;
pub(crate) use self::summary::{Spread, spread as middle};
use crate::drain;
use crate::drive;
use crate::engine::EngineSpec;
use crate::files::{forget_cache, make_file};
use crate::job::{Job, JobFile};
use crate::nbd::{connect, fill};
use crate::replication;
use crate::slow::SlowFile;
use crate::stats::Stats;
use crate::target::{Target, TargetSpec};

/// No further round begins that would end after this, if the number of rounds was not asked for:
/// with what follows the rounds, a quick comparison takes less than two minutes, a whole one less
/// than ten.
const QUICK_LIMIT: Duration = Duration::from_secs(75);
const LIMIT: Duration = Duration::from_secs(400);

/// Seconds of the run through drain at the end.
const DRAIN_SECONDS: u32 = 15;

/// What to compare, and how long.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Short runs on small files: an impression in less than two minutes
    #[arg(long)]
    pub quick: bool,
    /// Rounds [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Only rows with this in their name, or "replication"; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub rows: Vec<String>,
    /// Folder on the disk to be measured [default: the current one]; all files are removed
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// The daemon to be measured, hn4ctl beside it [default: the ones beside this program]
    #[arg(long, value_name = "PATH")]
    pub daemon: Option<PathBuf>,
}

impl Options {
    fn chosen(&self) -> Vec<&'static Row> {
        let wanted = |row: &&Row| {
            let named = |text: &String| row.name.contains(text.as_str());
            self.rows.is_empty() || self.rows.iter().any(named)
        };
        ROWS.iter().filter(wanted).collect()
    }

    fn wants_replication(&self) -> bool {
        let named = |text: &String| "replication".contains(text.as_str());
        self.rows.is_empty() || self.rows.iter().any(named)
    }
}

/// What was measured of a peer in a row and a round.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Requests per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// 99th percentile of the latency of reads and writes, in microseconds.
    pub p99_us: f64,
    /// CPU time of the load for each request, in microseconds.
    pub client_us: Option<f64>,
    /// CPU time of the server for each request, in microseconds.
    pub server_us: Option<f64>,
    /// Of our server: how long it took after the run to write back what was in memory.
    pub drain: Option<Duration>,
}

impl Sample {
    pub(crate) fn of(stats: &Stats) -> Result<Self> {
        ensure!(stats.ios() > 0, "not one request was completed in the time");
        let mut latency = stats.read.latency.clone();
        latency.add(&stats.write.latency)?;
        Ok(Self {
            iops: stats.iops(),
            bytes_per_second: stats.bytes_per_second(),
            p99_us: latency.value_at_percentile(99.0) as f64 / 1e3,
            client_us: stats.client_us_per_io(),
            server_us: stats.server_us_per_io(),
            drain: stats.drain,
        })
    }
}

/// Runs the comparison and prints it.
///
/// # Errors
/// If a server that is there cannot be started, or fails a request.
pub fn run(options: &Options) -> Result<()> {
    let begun = Instant::now();
    let dir = options.dir.canonicalize();
    let dir = dir.with_context(|| format!("{}", options.dir.display()))?;
    let folder = tempfile::Builder::new()
        .prefix("hn4-bench-")
        .tempdir_in(dir)?;
    let sockets = tempfile::tempdir()?;
    let daemon = replication::daemon(options.daemon.as_deref())?;
    let [size_mib, overlay_mib, log_mib] = SIZES[usize::from(options.quick)];
    let place = Place {
        data: folder.path().to_owned(),
        sockets: sockets.path().to_owned(),
        size_mib,
        overlay_mib,
        log_mib,
        daemon,
    };
    let (runtime, ramp) = if options.quick {
        (700, 200)
    } else {
        (1500, 300)
    };
    let mut comparison = Comparison {
        table: Table::default(),
        rows: options.chosen(),
        runtime: Duration::from_millis(runtime),
        ramp: Duration::from_millis(ramp),
        place: &place,
        engine: None,
        slow_engine: None,
        slow_file: None,
    };
    let replicates = options.wants_replication();
    ensure!(
        replicates || !comparison.rows.is_empty(),
        "no row has such a name"
    );
    summary::print_machine(&place);
    comparison.prepare()?;
    let limit = match (options.rounds, options.quick) {
        (Some(_), _) => Duration::MAX,
        (None, true) => QUICK_LIMIT,
        (None, false) => LIMIT,
    };
    let done = comparison.rounds(options.rounds.unwrap_or(3), begun, limit)?;
    println!();
    print!("{}", comparison.table.show(&comparison.rows));
    println!(
        "{done} rounds of {runtime} ms in {:.0} s; load of the machine {} at the end\n",
        begun.elapsed().as_secs_f64(),
        summary::load()
    );
    if replicates {
        replicate(&place, options.quick).context("replication")?;
    }
    if options.quick || !options.rows.is_empty() {
        return Ok(());
    }
    println!("\n4k randwrite QD32, engine in process, second by second");
    drain::run(&drain::Options {
        seconds: DRAIN_SECONDS,
        size_mib: place.size_mib,
        overlay_mib: place.overlay_mib,
        dir: place.data.clone(),
    })
}

fn replicate(place: &Place, quick: bool) -> Result<()> {
    match missing(Peer::Ours, place) {
        Some(why) => {
            println!("replication: not measured: {why}");
            Ok(())
        }
        None => replication::measure(&place.data, &place.daemon, quick),
    }
}

struct Comparison<'a> {
    table: Table,
    rows: Vec<&'static Row>,
    runtime: Duration,
    ramp: Duration,
    place: &'a Place,
    /// The volume of the engine in process.
    engine: Option<Target>,
    /// The same on slow disks, and a slow disk.
    slow_engine: Option<Target>,
    slow_file: Option<SlowFile>,
}

impl Comparison<'_> {
    /// Makes a file for each peer, and finds out who is missing.
    fn prepare(&mut self) -> Result<()> {
        let place = self.place;
        for peer in [
            Peer::Ours,
            Peer::Qemu,
            Peer::NbdkitFile,
            Peer::NbdkitMemory,
            Peer::NbdServer,
            Peer::Engine,
            Peer::Ring,
            Peer::Fio,
            Peer::SlowEngine,
            Peer::SlowFio,
        ] {
            if !self.rows.iter().any(|row| row.peers.contains(&peer)) {
                continue;
            }
            if let Some(why) = missing(peer, place) {
                self.table.missing.push((peer, why));
                continue;
            }
            let file = place.file(peer);
            match peer {
                Peer::Ours => {
                    place.create_ours()?;
                    let server = Server::start(peer, place)?;
                    fill(&mut connect(&server.uri)?, place.size_mib << 20)?;
                    place.drain_ours()?;
                    server.stop()?;
                }
                Peer::Engine => self.engine = Some(engine(place, 0)?),
                Peer::SlowEngine => self.slow_engine = Some(engine(place, WRITE_DELAY_MS)?),
                Peer::SlowFio => {
                    let slow = SlowFile::in_memory(file, place.size_mib, WRITE_DELAY_MS)?;
                    self.slow_file = Some(slow);
                }
                _ if file.exists() => {}
                _ => make_file(&file, place.size_mib << 20)?,
            }
        }
        Ok(())
    }

    /// Gives how many were done.
    fn rounds(&mut self, rounds: u32, begun: Instant, limit: Duration) -> Result<u32> {
        if self.rows.is_empty() {
            return Ok(0);
        }
        let mut longest = Duration::ZERO;
        for round in 0..rounds {
            let start = Instant::now();
            if round > 0 && begun.elapsed() + longest > limit {
                println!("time is up: {round} of {rounds} rounds were done");
                return Ok(round);
            }
            self.round(round)?;
            longest = longest.max(start.elapsed());
        }
        Ok(rounds)
    }

    fn round(&mut self, round: u32) -> Result<()> {
        for row in self.rows.clone() {
            let mut peers = row.peers.to_vec();
            let turn = round as usize % peers.len();
            peers.rotate_left(turn);
            for peer in peers {
                if self.table.missing.iter().any(|(gone, _)| *gone == peer) {
                    continue;
                }
                let sample = self
                    .measure(row, peer, u64::from(round))
                    .with_context(|| format!("{}, {}", row.name, peer.label()))?;
                print!(".");
                // Only a sign of life.
                let _ = std::io::stdout().flush();
                self.table.add(row, peer, sample);
            }
        }
        Ok(())
    }

    fn measure(&self, row: &Row, peer: Peer, seed: u64) -> Result<Sample> {
        let text = row.job_file(peer, self.runtime, self.ramp, seed + 1);
        let file = self.place.file(peer);
        match peer {
            Peer::Fio | Peer::SlowFio => fio::measure(&text, &file, &self.place.data),
            Peer::Engine | Peer::SlowEngine => {
                let volume = match peer {
                    Peer::Engine => &self.engine,
                    _ => &self.slow_engine,
                };
                let target = volume.as_ref().context("the engine's volume")?;
                Sample::of(&drive_one(&text, target, None)?)
            }
            Peer::Ring => {
                let target = Target::open(&TargetSpec::Raw(file))?;
                Sample::of(&drive_one(&text, &target, None)?)
            }
            _ => {
                if peer != Peer::NbdkitMemory {
                    forget_cache(&file)?;
                }
                if peer == Peer::Ours {
                    self.place.configure_ours(row.prewritten_mib.is_some())?;
                }
                let mut server = Server::start(peer, self.place)?;
                let all = (peer == Peer::NbdkitMemory).then_some(self.place.size_mib);
                if let Some(mib) = row.prewritten_mib.or(all) {
                    fill(&mut connect(&server.uri)?, mib << 20)?;
                    if peer.serves_once() {
                        server.stop()?;
                        server = Server::start(peer, self.place)?;
                    }
                }
                let target = Target::Nbd(server.uri.clone());
                let stats = drive_one(&text, &target, Some(server.pid()))?;
                let mut sample = Sample::of(&stats)?;
                if peer == Peer::Ours {
                    sample.drain = Some(self.place.drain_ours()?);
                }
                server.stop()?;
                Ok(sample)
            }
        }
    }
}

fn engine(place: &Place, write_delay_ms: u64) -> Result<Target> {
    Target::open(&TargetSpec::Engine(EngineSpec {
        folder: place.data.clone(),
        size_mib: place.size_mib,
        overlay_mib: place.overlay_mib,
        log_mib: place.log_mib,
        write_delay_ms,
    }))
}

fn drive_one(text: &str, target: &Target, server: Option<u32>) -> Result<Stats> {
    let jobs: Vec<Job> = JobFile::parse(text)?.jobs;
    let mut outcomes = drive::run(&jobs, target, server)?;
    let outcome = outcomes.pop().context("one job")?;
    outcome.stats.into_iter().next().context("one thread")
}
