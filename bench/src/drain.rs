//! Random writes for longer than the overlay has room: what clients notice when it is full.
//!
//! The engine in process takes 4 KiB writes at depth 32 as fast as it can. At first the overlay
//! has room and the log is the limit; then each write waits until destaging has freed a slot. Two
//! things are asked: the 99.9th percentile afterwards is at most 5 times what it was before, and
//! no second is slower than the backing by itself, which is the same load on a raw file, measured
//! before and after.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use hdrhistogram::Histogram;

use crate::compare::middle;
use crate::drive;
use crate::engine::EngineSpec;
use crate::files::make_file;
use crate::job::JobFile;
use crate::report::align;
use crate::stats::{Stats, per_second};
use crate::target::{Target, TargetSpec};

/// How much longer the slowest writes in a thousand may take when the overlay is full.
const TAIL_MOST: f64 = 5.0;
/// Looks at the raw file, before and again after.
const RAW_RUNS: usize = 2;

/// What to measure.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Seconds of writing
    #[arg(long, value_name = "S", default_value_t = 15,
          value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub seconds: u32,
    /// Size of the volume
    #[arg(long, value_name = "MIB", default_value_t = 1024,
          value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    pub size_mib: u64,
    /// Memory of the overlay
    #[arg(long, value_name = "MIB", default_value_t = 512,
          value_parser = clap::value_parser!(u64).range(8..=1 << 20))]
    pub overlay_mib: u64,
    /// Folder on the disk to be measured; all files are removed
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
}

/// Measures and prints.
///
/// # Errors
/// If files cannot be made, or a request fails.
pub fn run(options: &Options) -> Result<()> {
    let folder = tempfile::Builder::new()
        .prefix("hn4-bench-drain-")
        .tempdir_in(&options.dir)?;
    let raw = folder.path().join("raw");
    make_file(&raw, options.size_mib << 20)?;
    let engine = Target::open(&TargetSpec::Engine(EngineSpec {
        folder: folder.path().to_owned(),
        size_mib: options.size_mib,
        overlay_mib: options.overlay_mib,
        log_mib: 4 * options.overlay_mib,
        write_delay_ms: 0,
    }))?;
    let mut backing = raw_rates(&raw)?;
    let stats = random_writes(&engine, options.seconds * 1000)?;
    backing.extend(raw_rates(&raw)?);
    let backing = middle(backing.into_iter()).context("the raw file was measured")?;
    print!("{}", show(&stats, backing.median));
    Ok(())
}

fn raw_rates(file: &Path) -> Result<Vec<f64>> {
    let target = Target::open(&TargetSpec::Raw(file.to_owned()))?;
    let run = |_| random_writes(&target, 1500).map(|stats| stats.iops());
    (0..RAW_RUNS).map(run).collect()
}

fn random_writes(target: &Target, ms: u32) -> Result<Stats> {
    let text = format!(
        "[drain]\nrw=randwrite\nbs=4k\niodepth=32\nnorandommap\ntime_based\nruntime={ms}ms\n"
    );
    let jobs = JobFile::parse(&text)?.jobs;
    let mut outcomes = drive::run(&jobs, target, None)?;
    let outcome = outcomes.pop().context("one job")?;
    outcome.stats.into_iter().next().context("one thread")
}

/// The seconds, and what is to be said of them.
fn show(stats: &Stats, backing: f64) -> String {
    let micros = |histogram: &Histogram<u64>, at| histogram.value_at_percentile(at) as f64 / 1e3;
    let head = [
        "second", "state", "IOPS", "p50 us", "p99 us", "p99.9 us", "max us",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let full = stats.room.full;
    let whole = usize::try_from(stats.elapsed.as_secs()).unwrap_or(usize::MAX);
    let mut slowest: Option<u64> = None;
    for (at, second) in stats.seconds.iter().take(whole).enumerate() {
        let start = Duration::from_secs(at as u64);
        let state = match full {
            Some(full) if full <= start => "full",
            Some(full) if full < start + Duration::from_secs(1) => "fills up",
            _ => "room",
        };
        if state == "full" {
            slowest = Some(slowest.map_or(second.len(), |least| least.min(second.len())));
        }
        rows.push(vec![
            at.to_string(),
            state.to_owned(),
            second.len().to_string(),
            format!("{:.0}", micros(second, 50.0)),
            format!("{:.0}", micros(second, 99.0)),
            format!("{:.0}", micros(second, 99.9)),
            format!("{:.0}", second.max() as f64 / 1e3),
        ]);
    }
    let mut text = align(&rows);
    let (Some(full), Some(slowest)) = (full, slowest) else {
        text +=
            "the overlay never was full: nothing to judge; more --seconds, less --overlay-mib\n";
        return text;
    };
    let (before, after) = (
        micros(&stats.room.before, 99.9),
        micros(&stats.room.after, 99.9),
    );
    let word = |met: bool| if met { "met" } else { "MISSED" };
    let rate = per_second(stats.room.after.len(), stats.elapsed.saturating_sub(full));
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "full after {:.2} s; then {rate:.0} a second; the backing by itself {backing:.0}\n\
         p99.9 {}: {before:.0} us before, {after:.0} us after, {:.1} x, allowed {TAIL_MOST}\n\
         rate {}: the slowest second had {slowest}, {:.2} x of the backing by itself, asked 1",
        full.as_secs_f64(),
        word(after <= before * TAIL_MOST),
        after / before,
        word(slowest as f64 >= backing),
        slowest as f64 / backing,
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_tail_and_a_slow_second_after_the_overlay_is_full_are_told() {
        let mut stats = Stats::new().expect("stats");
        let full = Duration::from_millis(1500);
        let mut at = Duration::ZERO;
        while at < Duration::from_secs(4) {
            let slow = at >= full;
            let latency = Duration::from_micros(if slow { 1000 } else { 100 });
            stats.write.record(latency, 4096);
            stats.tick(at, latency);
            stats.room.record(at, latency, Some(full));
            at += latency;
        }
        stats.elapsed = Duration::from_secs(4);
        let text = show(&stats, 900.0);
        assert!(
            text.contains("p99.9 MISSED: 100 us before, 1000 us after, 10.0 x"),
            "{text}"
        );
        assert!(
            text.contains("rate met: the slowest second had 1000, 1.11 x"),
            "{text}"
        );
        assert!(show(&stats, 1100.0).contains("rate MISSED"), "{text}");
        let rows: Vec<&str> = text.lines().collect();
        assert!(
            rows[1].contains("room") && rows[2].contains("fills up"),
            "{text}"
        );
        assert!(
            rows[3].contains("full") && rows[4].contains("full"),
            "{text}"
        );
        stats.room.full = None;
        assert!(show(&stats, 900.0).contains("nothing to judge"));
    }

    #[test]
    fn an_overlay_that_is_too_small_fills_up_and_is_told() {
        let dir = crate::test_folder();
        let engine = Target::open(&TargetSpec::Engine(EngineSpec {
            folder: dir,
            size_mib: 32,
            overlay_mib: 8,
            log_mib: 32,
            write_delay_ms: 0,
        }))
        .expect("a volume");
        let stats = random_writes(&engine, 600).expect("it runs");
        assert!(stats.room.full.is_some());
        let sum = stats.room.before.len() + stats.room.after.len();
        assert_eq!(sum, stats.write.count());
    }
}
