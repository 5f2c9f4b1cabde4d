//! Histograms for the tools of HdrHistogram: an interval log, or a percentile table.
//!
//! A file that ends in `.hgrm` gets the table of each kind of request over the whole run, with
//! times in microseconds, as HdrHistogram's plotter reads it. Every other file gets an interval
//! log: one histogram of reads and writes for each second of each job, then one of each kind for
//! the whole run, in nanoseconds, tagged with their names; its maxima are in milliseconds, as
//! usual.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use crate::drive::Outcome;
use crate::stats::Stats;

/// Steps of a percentile table for each halving of what is left.
const TICKS: u32 = 5;

/// Writes the file; its name says which form.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, outcomes: &[Outcome]) -> Result<()> {
    let name = || format!("writing {}", path.display());
    let mut file = BufWriter::new(File::create(path).with_context(name)?);
    if path.extension().is_some_and(|end| end == "hgrm") {
        for (title, histogram) in whole_runs(outcomes) {
            file.write_all(table(&title, histogram).as_bytes())?;
        }
    } else {
        let begun = SystemTime::now() - longest(outcomes);
        log(&mut file, outcomes, begun)?;
    }
    file.flush().with_context(name)
}

fn longest(outcomes: &[Outcome]) -> Duration {
    let all = outcomes.iter().flat_map(|outcome| &outcome.stats);
    all.map(|stats| stats.elapsed).max().unwrap_or_default()
}

fn sides(stats: &Stats) -> impl Iterator<Item = (&'static str, &Histogram<u64>)> {
    let all = [
        ("read", &stats.read),
        ("write", &stats.write),
        ("flush", &stats.sync),
    ];
    let used = all.into_iter().filter(|(_, side)| side.count() > 0);
    used.map(|(kind, side)| (kind, &side.latency))
}

/// The name of each thread of each job.
fn threads(outcomes: &[Outcome]) -> impl Iterator<Item = (String, &Stats)> {
    outcomes.iter().flat_map(|outcome| {
        let several = outcome.stats.len() > 1;
        outcome
            .stats
            .iter()
            .enumerate()
            .map(move |(thread, stats)| {
                let name = &outcome.job.name;
                let name = match several {
                    true => format!("{name}.{thread}"),
                    false => name.clone(),
                };
                // The log's fields end at these.
                (name.replace([',', ' ', '\n', '\r'], "_"), stats)
            })
    })
}

fn whole_runs(outcomes: &[Outcome]) -> impl Iterator<Item = (String, &Histogram<u64>)> {
    threads(outcomes).flat_map(|(name, stats)| {
        sides(stats).map(move |(kind, histogram)| (format!("{name}.{kind}"), histogram))
    })
}

fn log(file: &mut impl std::io::Write, outcomes: &[Outcome], begun: SystemTime) -> Result<()> {
    let failed = |error| anyhow!("an interval log: {error:?}");
    let mut serializer = V2DeflateSerializer::new();
    let mut builder = IntervalLogWriterBuilder::new();
    builder
        .add_comment("hn4-bench: latencies in nanoseconds")
        .with_start_time(begun)
        .with_base_time(begun)
        .with_max_value_divisor(1e6);
    let mut writer = builder.begin_log_with(file, &mut serializer)?;
    let second = Duration::from_secs(1);
    for (name, stats) in threads(outcomes) {
        let tag = Tag::new(&name).context("a name without separators")?;
        for (at, histogram) in (0_u32..).zip(&stats.seconds) {
            let written = writer.write_histogram(histogram, second * at, second, Some(tag));
            written.map_err(failed)?;
        }
        for (kind, histogram) in sides(stats) {
            let name = format!("{name}.{kind}");
            let tag = Tag::new(&name);
            let written = writer.write_histogram(histogram, Duration::ZERO, stats.elapsed, tag);
            written.map_err(failed)?;
        }
    }
    Ok(())
}

/// The form that `HistogramLogProcessor` and the plotter use.
fn table(title: &str, histogram: &Histogram<u64>) -> String {
    let mut text = format!(
        "#[{title}, microseconds]\n{:>12} {:>14} {:>10} {:>14}\n\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    );
    let mut count = 0;
    for step in histogram.iter_quantiles(TICKS) {
        count += step.count_since_last_iteration();
        let quantile = step.quantile_iterated_to();
        let micros = step.value_iterated_to() as f64 / 1e3;
        // Writing to a string does not fail.
        let _ = match quantile < 1.0 {
            true => writeln!(
                text,
                "{micros:12.3} {quantile:2.12} {count:10} {:14.2}",
                1.0 / (1.0 - quantile)
            ),
            false => writeln!(text, "{micros:12.3} {quantile:2.12} {count:10}"),
        };
    }
    let _ = writeln!(
        text,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n\
         #[Max     = {:12.3}, Total count    = {:12}]\n\
         #[Buckets = {:12}, SubBuckets     = {:12}]",
        histogram.mean() / 1e3,
        histogram.stdev() / 1e3,
        histogram.max() as f64 / 1e3,
        histogram.len(),
        histogram.buckets(),
        1_u64 << (histogram.sigfig() * 4 - 1).min(20),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use crate::job::JobFile;

    fn outcome() -> Outcome {
        let job = JobFile::parse("[a b]\nrw=write\n").expect("a job");
        let mut stats = Stats::new().expect("stats");
        for micros in 1..=2000 {
            let latency = Duration::from_micros(micros);
            stats.write.record(latency, 4096);
            stats.tick(Duration::from_millis(micros), latency);
        }
        stats.elapsed = Duration::from_secs(2);
        Outcome {
            job: job.jobs[0].clone(),
            stats: vec![stats],
        }
    }

    #[test]
    fn the_interval_log_is_read_back_as_it_was_measured() {
        let mut bytes = Vec::new();
        log(&mut bytes, &[outcome()], SystemTime::UNIX_EPOCH).expect("a log");
        let mut found = Vec::new();
        for entry in IntervalLogIterator::new(&bytes) {
            if let Ok(LogEntry::Interval(interval)) = entry {
                use base64::Engine as _;
                let engine = base64::engine::general_purpose::STANDARD;
                let raw = engine.decode(interval.encoded_histogram()).expect("base64");
                let histogram: Histogram<u64> = Deserializer::new()
                    .deserialize(&mut raw.as_slice())
                    .expect("a histogram");
                let tag = interval.tag().expect("a tag").as_str().to_owned();
                found.push((tag, interval.start_timestamp().as_secs(), histogram.len()));
            }
        }
        let expected = [
            ("a_b".to_owned(), 0, 999),
            ("a_b".to_owned(), 1, 1000),
            ("a_b".to_owned(), 2, 1),
            ("a_b.write".to_owned(), 0, 2000),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn the_percentile_table_ends_with_the_longest_and_counts_all() {
        let outcome = outcome();
        let text = table("a", &outcome.stats[0].write.latency);
        let rows: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with(' ') && line.contains("0."))
            .collect();
        assert!(rows.len() > 20, "{text}");
        let last = text
            .lines()
            .rfind(|line| line.starts_with(' '))
            .expect("a row");
        let fields: Vec<&str> = last.split_whitespace().collect();
        assert_eq!(fields[1..], ["1.000000000000", "2000"], "{text}");
        let most: f64 = fields[0].parse().expect("a number");
        assert!((most / 2000.0 - 1.0).abs() < 0.002, "{most}");
    }
}
