//! Shows what was measured: a table for people, and JSON in fio's layout for fio's tools.
//!
//! The layout is that of `fio --output-format=json+`: `jobs[].read.iops`, `bw_bytes`,
//! `clat_ns.percentile`, `clat_ns.bins` and so on. What fio has no name for stands below `hn4`.
//!
//! **Not here:** submission latency (`slat_ns`): the targets do not tell when the kernel took a
//! request, so that completion latency runs from submission on.

pub mod hdr;
pub mod picture;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use crate::drive::Outcome;
use crate::job::Job;
use crate::stats::{Side, Stats, per_second};

/// The report of a run in fio's layout. `target` is what was measured.
#[must_use]
pub fn json(outcomes: &[Outcome], target: &str) -> Value {
    let mut jobs = Vec::new();
    for (group, outcome) in outcomes.iter().enumerate() {
        for stats in &outcome.stats {
            jobs.push(job(outcome, stats, group));
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or(Duration::ZERO);
    json!({
        "fio version": concat!("hn4-bench-", env!("CARGO_PKG_VERSION")),
        "timestamp": now.as_secs(),
        "timestamp_ms": millis(now),
        "global options": {},
        "jobs": jobs,
        "hn4": { "target": target },
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn job(outcome: &Outcome, stats: &Stats, group: usize) -> Value {
    let options: Map<String, Value> = outcome
        .job
        .options
        .iter()
        .map(|(key, value)| (key.clone(), Value::from(value.clone())))
        .collect();
    let seconds = stats.elapsed.as_secs_f64();
    let percent = |used: Duration| match seconds > 0.0 {
        true => used.as_secs_f64() / seconds * 100.0,
        false => 0.0,
    };
    let list = &outcome.job.percentiles;
    json!({
        "jobname": outcome.job.name,
        "groupid": group,
        "error": 0,
        "elapsed": stats.elapsed.as_secs(),
        "job options": options,
        "read": side(&stats.read, stats.elapsed, list),
        "write": side(&stats.write, stats.elapsed, list),
        // fio's tools expect it of every job.
        "trim": nothing(),
        "sync": {
            "total_ios": stats.sync.count(),
            "lat_ns": latency(&stats.sync.latency, list),
        },
        "job_runtime": millis(stats.elapsed),
        "usr_cpu": percent(stats.client.user()),
        "sys_cpu": percent(stats.client.system),
        "hn4": {
            "iops_per_second": stats.per_second().collect::<Vec<_>>(),
            "latency_ns_per_second": seconds_of(stats),
            "verified_bytes": stats.verified_bytes,
            "client_cpu_us_per_io": stats.client_us_per_io(),
            "server_cpu_us_per_io": stats.server_us_per_io(),
        },
    })
}

/// The latency of each second, where a stall or a drain shows that the whole run hides.
fn seconds_of(stats: &Stats) -> Vec<Value> {
    let seconds = stats.seconds.iter();
    seconds
        .map(|second| {
            let at = |percentile| second.value_at_percentile(percentile);
            json!({ "p50": at(50.0), "p99": at(99.0), "p99.9": at(99.9), "max": second.max() })
        })
        .collect()
}

fn side(side: &Side, elapsed: Duration, percentiles: &[f64]) -> Value {
    let bytes_per_second = per_second(side.bytes, elapsed);
    let lat = latency(&side.latency, percentiles);
    json!({
        "io_bytes": side.bytes,
        "io_kbytes": side.bytes / 1024,
        "bw_bytes": bytes_per_second.round(),
        "bw": (bytes_per_second / 1024.0).round(),
        "iops": per_second(side.count(), elapsed),
        "runtime": if side.count() > 0 { millis(elapsed) } else { 0 },
        "total_ios": side.count(),
        "clat_ns": lat,
        "lat_ns": lat,
    })
}

/// Requests of a kind that no job has.
fn nothing() -> Value {
    json!({
        "io_bytes": 0,
        "io_kbytes": 0,
        "bw_bytes": 0,
        "bw": 0,
        "iops": 0.0,
        "runtime": 0,
        "total_ios": 0,
        "clat_ns": no_latency(),
        "lat_ns": no_latency(),
    })
}

fn no_latency() -> Value {
    json!({ "min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0 })
}

fn latency(histogram: &Histogram<u64>, percentiles: &[f64]) -> Value {
    if histogram.is_empty() {
        return no_latency();
    }
    let list: Map<String, Value> = percentiles
        .iter()
        .map(|&at| (format!("{at:.6}"), histogram.value_at_percentile(at).into()))
        .collect();
    json!({
        "min": histogram.min(),
        "max": histogram.max(),
        "mean": histogram.mean(),
        "stddev": histogram.stdev(),
        "N": histogram.len(),
        "percentile": list,
        "bins": bins(histogram),
    })
}

/// How many requests took so many nanoseconds, as near as the histogram tells them apart.
fn bins(histogram: &Histogram<u64>) -> Map<String, Value> {
    let recorded = histogram.iter_recorded();
    recorded
        .map(|bin| {
            let nanos = bin.value_iterated_to().to_string();
            (nanos, bin.count_at_value().into())
        })
        .collect()
}

/// The table of a run.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> String {
    let mut rows = vec![
        [
            "job",
            "kind",
            "IOPS",
            "MiB/s",
            "p50 us",
            "p99 us",
            "p99.9 us",
            "max us",
            "cpu us/io",
            "server us/io",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for outcome in outcomes {
        for stats in &outcome.stats {
            rows_of(&outcome.job, stats, &mut rows);
        }
    }
    align(&rows)
}

fn rows_of(job: &Job, stats: &Stats, rows: &mut Vec<Vec<String>>) {
    for (kind, side) in [
        ("read", &stats.read),
        ("write", &stats.write),
        ("flush", &stats.sync),
    ] {
        if side.count() == 0 {
            continue;
        }
        let micros = |nanos: u64| format!("{:.1}", nanos as f64 / 1e3);
        let at = |percentile| micros(side.latency.value_at_percentile(percentile));
        let cpu = |value: Option<f64>| value.map_or("-".to_owned(), |us| format!("{us:.2}"));
        rows.push(vec![
            job.name.clone(),
            kind.to_owned(),
            format!("{:.0}", per_second(side.count(), stats.elapsed)),
            format!("{:.1}", per_second(side.bytes, stats.elapsed) / 1_048_576.0),
            at(50.0),
            at(99.0),
            at(99.9),
            micros(side.latency.max()),
            cpu(stats.client_us_per_io()),
            cpu(stats.server_us_per_io()),
        ]);
    }
}

/// Columns under one another, the first two to the left.
#[must_use]
pub fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            line += &match column {
                0 | 1 => format!("{cell:<width$}  "),
                _ => format!("{cell:>width$}  "),
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobFile;

    fn outcome() -> Outcome {
        let text = "[a]\nrw=randrw\npercentile_list=50:99.9\n";
        let job = JobFile::parse(text).expect("a job").jobs.remove(0);
        let mut stats = Stats::new().expect("stats");
        for micros in 1..=1000 {
            stats.read.record(Duration::from_micros(micros), 4096);
        }
        stats.write.record(Duration::from_micros(7), 4096);
        stats.elapsed = Duration::from_secs(2);
        stats.client.total = Duration::from_secs(1);
        Outcome {
            job,
            stats: vec![stats],
        }
    }

    #[test]
    fn the_report_has_what_fio_tools_read_where_they_look_for_it() {
        let text = json(&[outcome()], "raw:x").to_string();
        let report: Value = serde_json::from_str(&text).expect("it is JSON");
        let job = &report["jobs"][0];
        assert_eq!(job["jobname"], "a");
        assert_eq!(job["error"], 0);
        assert_eq!(job["job options"]["rw"], "randrw");
        assert_eq!(job["read"]["iops"], 500.0);
        assert_eq!(job["read"]["total_ios"], 1000);
        assert_eq!(job["read"]["io_bytes"], 4_096_000);
        assert_eq!(job["read"]["bw_bytes"].as_f64(), Some(2_048_000.0));
        assert_eq!(job["read"]["runtime"], 2000);
        assert_eq!(job["write"]["total_ios"], 1);
        assert_eq!(job["usr_cpu"], 50.0);
        let percentiles = job["read"]["clat_ns"]["percentile"].as_object();
        let percentiles = percentiles.expect("percentiles");
        assert_eq!(percentiles.len(), 2);
        let p50 = percentiles["50.000000"].as_f64().expect("a number");
        assert!((p50 / 500_000.0 - 1.0).abs() < 0.002, "{p50}");
        assert!(percentiles.contains_key("99.900000"));
        let bins = job["read"]["clat_ns"]["bins"].as_object().expect("bins");
        let counts: u64 = bins.values().filter_map(Value::as_u64).sum();
        assert_eq!(counts, 1000);
        assert!(bins.keys().all(|nanos| nanos.parse::<u64>().is_ok()));
        assert!(job["trim"]["clat_ns"]["bins"].is_null());
        assert_eq!(job["sync"]["total_ios"], 0);
    }

    #[test]
    fn the_table_shows_each_kind_that_took_place_and_no_other() {
        let text = table(&[outcome()]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(
            lines[1].contains("read") && lines[1].contains(" 500 "),
            "{text}"
        );
        assert!(lines[2].contains("write"), "{text}");
    }
}
