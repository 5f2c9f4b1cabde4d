//! How fast a replica that was away gets what it missed.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::link::Link;
use super::pair::{LIMIT, Pair, lag};
use super::{MIB, Setup, verdict};
use crate::drive;
use crate::files::make_file;
use crate::job::JobFile;
use crate::target::{Target, TargetSpec};

/// Of the limited line, in bytes a second: less than any disk that this is of use on.
pub(super) const LINE_RATE: u64 = 32 * MIB;
/// What DESIGN 10 asks: of the slower one of line and disk.
const SHARE_LEAST: f64 = 0.8;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(2);

/// A catch-up.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Found {
    /// Log that the replica lacked.
    pub(super) bytes: u64,
    /// From its first progress to its last.
    pub(super) took: Duration,
}

impl Found {
    /// MiB a second.
    pub(super) fn rate(self) -> f64 {
        self.bytes as f64 / MIB as f64 / self.took.as_secs_f64().max(1e-9)
    }
}

/// Stops the replica, writes, starts it again, and waits until its log has everything.
///
/// # Errors
/// If a node fails, or the replica does not catch up in time.
pub(super) fn measure(pair: &mut Pair, mib: u64) -> Result<Found> {
    pair.settle()?;
    pair.beta.stop(LIMIT)?;
    pair.job(&format!(
        "[miss]\nrw=write\nbs=64k\niodepth=8\nsize={mib}m\n"
    ))?;
    pair.alpha.flush()?;
    let missed = pair.alpha.report().map(|report| lag(&report))?;
    let missed = missed.context("the primary does not know what its peer lacks")?;
    let most = mib * MIB;
    ensure!(
        missed.bytes >= most / 2,
        "it lacks {} bytes only",
        missed.bytes
    );
    pair.beta.start()?;
    let deadline = Instant::now() + LIMIT;
    // Where it was when it was first seen to move.
    let mut first: Option<(Instant, u64)> = None;
    loop {
        let now = Instant::now();
        if let Some(left) = lag(&pair.alpha.report()?) {
            if left.bytes < missed.bytes {
                first.get_or_insert((now, left.bytes));
            }
            if let Some((begun, bytes)) = first.filter(|_| left.bytes == 0) {
                let took = now.duration_since(begun);
                return Ok(Found { bytes, took });
            }
        }
        if now >= deadline {
            bail!("the replica did not catch up within {LIMIT:?}: {first:?}");
        }
        std::thread::sleep(LOOK);
    }
}

/// MiB a second that the disk takes of long sequential writes through our ring: what bounds a
/// catch-up if nothing else does.
///
/// # Errors
/// If the disk fails.
pub(super) fn disk_rate(setup: &Setup) -> Result<f64> {
    let file = setup.folder.join("disk");
    make_file(&file, 256 * MIB)?;
    let rate = sequential(&file);
    std::fs::remove_file(&file)?;
    rate
}

fn sequential(file: &Path) -> Result<f64> {
    let jobs = JobFile::parse("[disk]\nrw=write\nbs=1m\niodepth=8\n")?.jobs;
    let target = Target::open(&TargetSpec::Raw(file.to_owned()))?;
    let outcomes = drive::run(&jobs, &target, None)?;
    let stats = outcomes.first().and_then(|outcome| outcome.stats.first());
    Ok(stats.context("one thread")?.bytes_per_second() / MIB as f64)
}

/// Measures over the limited line and tells how it compares.
///
/// # Errors
/// As [`measure`].
pub(super) fn limited(pair: &mut Pair, link: &Link, mib: u64) -> Result<Found> {
    link.limit(LINE_RATE);
    let found = measure(pair, mib);
    link.limit(0);
    found
}

/// The judgement: `line` and `disk` are the rates that bound it, in MiB a second.
pub(super) fn judge(found: Found, line: Option<f64>, disk: f64) -> String {
    let bound = line.map_or(disk, |line| line.min(disk));
    let share = found.rate() / bound;
    let name = match line {
        Some(line) if line <= disk => "line",
        _ => "disk",
    };
    let text = format!("{share:.2} of the {name}'s {bound:.0} MiB/s, asked {SHARE_LEAST}");
    verdict(share >= SHARE_LEAST, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catch_up_is_judged_by_the_slower_one_of_line_and_disk() {
        let found = Found {
            bytes: 28 * MIB,
            took: Duration::from_secs(1),
        };
        let text = judge(found, Some(32.0), 500.0);
        assert!(text.contains("met: 0.88 of the line's 32 MiB/s"), "{text}");
        let text = judge(found, Some(320.0), 40.0);
        assert!(text.contains("MISSED: 0.70 of the disk's 40"), "{text}");
        let text = judge(found, None, 35.0);
        assert!(text.contains("met: 0.80 of the disk's 35"), "{text}");
    }
}
