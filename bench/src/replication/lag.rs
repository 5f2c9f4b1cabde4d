//! How far a replica is behind while the primary's clients write half, nine tenths and eleven
//! tenths of what the line between them carries.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::link::Link;
use super::pair::{Lag, Pair, lag};
use super::{MIB, Setup, Table};
use crate::compare::middle;

/// Of the line, in bytes a second.
pub(super) const LINE_RATE: u64 = 16 * MIB;
/// Of one write.
const WRITE_BYTES: u64 = 16 << 10;
/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(50);

/// What was seen at one moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Duration,
    lag: Lag,
}

/// A load and what was seen of it.
#[derive(Clone, Debug)]
struct Run {
    percent: u64,
    /// Bytes a second that clients wrote.
    written: f64,
    /// Bytes a second that went over the line.
    passed: f64,
    looks: Vec<Look>,
}

/// Measures on a pair with this line between its nodes.
///
/// # Errors
/// If a node fails.
pub(super) fn measure(setup: &Setup, pair: &mut Pair, link: &Link) -> Result<Table> {
    let mut runs = Vec::new();
    for percent in [50, 90, 110] {
        link.limit(LINE_RATE);
        let run = one(setup, pair, link, percent);
        link.limit(0);
        runs.push(run.with_context(|| format!("{percent} % of the line"))?);
        pair.settle()?;
    }
    Ok(show(&runs))
}

fn one(setup: &Setup, pair: &Pair, link: &Link, percent: u64) -> Result<Run> {
    let job = format!(
        "[lag]\nrw=randwrite\nbs={WRITE_BYTES}\niodepth=8\nnorandommap\nrate_iops={}\n\
         time_based\nruntime={}ms\n",
        LINE_RATE * percent / 100 / WRITE_BYTES,
        setup.milliseconds(2000, 6000)
    );
    let over = AtomicBool::new(false);
    let before = link.passed();
    let begun = Instant::now();
    let (stats, looks) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(pair, &over, begun));
        let stats = pair.job(&job);
        over.store(true, Ordering::SeqCst);
        let looks = watcher.join().map_err(|_| anyhow!("a panic"));
        (stats, looks)
    });
    let passed = (link.passed() - before) as f64 / begun.elapsed().as_secs_f64();
    Ok(Run {
        percent,
        written: stats?.bytes_per_second(),
        passed,
        looks: looks??,
    })
}

/// Looks until told that it is over.
fn watch(pair: &Pair, over: &AtomicBool, begun: Instant) -> Result<Vec<Look>> {
    let mut looks = Vec::new();
    while !over.load(Ordering::SeqCst) {
        let report = pair.alpha.report()?;
        if let Some(lag) = lag(&report) {
            let at = begun.elapsed();
            looks.push(Look { at, lag });
        }
        // A sampling interval, not a wait.
        std::thread::sleep(INTERVAL);
    }
    Ok(looks)
}

/// Bytes a second by which the lag grew, by a straight line through the looks.
fn growth(looks: &[Look]) -> Option<f64> {
    let count = looks.len() as f64;
    let mean = |of: fn(&Look) -> f64| looks.iter().map(of).sum::<f64>() / count;
    let time = |look: &Look| look.at.as_secs_f64();
    let bytes = |look: &Look| look.lag.bytes as f64;
    let (mean_time, mean_bytes) = (mean(time), mean(bytes));
    let pairs = looks
        .iter()
        .map(|it| (time(it) - mean_time, bytes(it) - mean_bytes));
    let sums = pairs.fold((0.0, 0.0), |(xy, xx), (x, y)| (xy + x * y, xx + x * x));
    (sums.1 > 0.0).then(|| sums.0 / sums.1)
}

fn show(runs: &[Run]) -> Table {
    let mib = MIB as f64;
    let mut table = Table::new(
        &format!(
            "16k writes against a line of {} MiB/s (WebSocket)",
            LINE_RATE / MIB
        ),
        &[
            "  load",
            "written MiB/s",
            "on the line MiB/s",
            "lag p50 ms",
            "most ms",
            "most MiB",
            "grows MiB/s",
        ],
    );
    for run in runs {
        // The beginning is not like the rest.
        let from = run.looks.len() / 4;
        let looks = run.looks.get(from..).unwrap_or_default();
        let most = |of: fn(&Look) -> u64| looks.iter().map(of).max().unwrap_or(0);
        let p50 = middle(looks.iter().map(|look| look.lag.ms as f64));
        table.row(vec![
            format!("  {} %", run.percent),
            format!("{:.1}", run.written / mib),
            format!("{:.1}", run.passed / mib),
            p50.map_or("-".to_owned(), |spread| format!("{:.0}", spread.median)),
            most(|look| look.lag.ms).to_string(),
            format!("{:.1}", most(|look| look.lag.bytes) as f64 / mib),
            growth(looks).map_or("-".to_owned(), |bytes| format!("{:.2}", bytes / mib)),
        ]);
    }
    table.say("verdict: none: DESIGN 10 asks nothing of this row");
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lag_that_grows_is_told_by_its_slope_and_a_steady_one_has_none() {
        let looks = |slope: u64| -> Vec<Look> {
            let at = |step: u64| Look {
                at: Duration::from_millis(100 * step),
                lag: Lag {
                    bytes: MIB + slope * step,
                    ms: 7,
                },
            };
            (0..40).map(at).collect()
        };
        let run = |percent, slope| Run {
            percent,
            written: MIB as f64,
            passed: MIB as f64,
            looks: looks(slope),
        };
        let grows = growth(&looks(MIB / 10)).expect("a slope");
        assert!((grows / MIB as f64 - 1.0).abs() < 0.01, "{grows}");
        let text = show(&[run(50, 0), run(110, MIB / 5)]).to_string();
        let line = |start: &str| {
            let found = text.lines().find(|line| line.trim().starts_with(start));
            found.unwrap_or_default().to_owned()
        };
        assert!(line("50 %").ends_with("0.00"), "{text}");
        assert!(line("110 %").ends_with("2.00"), "{text}");
        assert_eq!(growth(&[]), None);
    }
}
