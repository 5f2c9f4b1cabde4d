//! Medians, ranges, ratios and verdicts.

use super::Sample;
use super::rows::{Figure, Peer, Row};
use super::servers::Place;
use crate::report::align;

/// A margin under which noise decides.
const NOISE: f64 = 0.25;

/// All samples, and who is missing.
#[derive(Default, Debug)]
pub(super) struct Table {
    samples: Vec<(&'static str, Peer, Sample)>,
    /// Peers that are not here, and why.
    pub(super) missing: Vec<(Peer, String)>,
}

/// The middle of some figures, and their ends.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Spread {
    pub(crate) least: f64,
    pub(crate) median: f64,
    pub(crate) most: f64,
}

/// Nothing without figures.
pub(crate) fn spread(values: impl Iterator<Item = f64>) -> Option<Spread> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (&least, &most) = (values.first()?, values.last()?);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get((values.len() - 1) / 2)?;
    Some(Spread {
        least,
        median: f64::midpoint(lower, upper),
        most,
    })
}

impl Table {
    pub(super) fn add(&mut self, row: &Row, peer: Peer, sample: Sample) {
        self.samples.push((row.name, peer, sample));
    }

    fn of(&self, row: &Row, peer: Peer) -> impl Iterator<Item = &Sample> {
        let found = self.samples.iter();
        found
            .filter(move |(name, who, _)| *name == row.name && *who == peer)
            .map(|(_, _, sample)| sample)
    }

    fn figure(&self, row: &Row, peer: Peer) -> Option<Spread> {
        spread(self.of(row, peer).map(|sample| match row.figure {
            Figure::Iops => sample.iops,
            Figure::Bandwidth => sample.bytes_per_second / 1_048_576.0,
        }))
    }

    fn median(&self, row: &Row, peer: Peer, what: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        spread(self.of(row, peer).filter_map(what)).map(|spread| spread.median)
    }

    /// The whole comparison.
    pub(super) fn show(&self, rows: &[&Row]) -> String {
        let mut text = String::new();
        for row in rows {
            text += &self.show_row(row);
            text.push('\n');
        }
        text
    }

    fn show_row(&self, row: &Row) -> String {
        let unit = match row.figure {
            Figure::Iops => "IOPS",
            Figure::Bandwidth => "MiB/s",
        };
        let ours = self.figure(row, row.ours);
        let mut cells = vec![
            [
                "  peer",
                unit,
                "least",
                "most",
                "ours/peer",
                "p99 us",
                "client us",
                "server us",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        let mut after = String::new();
        for &peer in row.peers {
            let Some(found) = self.figure(row, peer) else {
                let why = self.missing.iter().find(|(gone, _)| *gone == peer);
                let why = why.map_or("no round was done", |(_, why)| why);
                after += &format!("  {}: not measured: {why}\n", peer.label());
                continue;
            };
            let ratio = ours.map(|ours| ours.median / found.median);
            let cell = |value: Option<f64>, digits: usize| {
                value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
            };
            cells.push(vec![
                format!("  {}", peer.label()),
                format!("{:.0}", found.median),
                format!("{:.0}", found.least),
                format!("{:.0}", found.most),
                cell(ratio.filter(|_| peer != row.ours), 2),
                cell(self.median(row, peer, |sample| Some(sample.p99_us)), 0),
                cell(self.median(row, peer, |sample| sample.client_us), 1),
                cell(self.median(row, peer, |sample| sample.server_us), 1),
            ]);
        }
        let drain = self.median(row, row.ours, |sample| {
            sample.drain.map(|time| time.as_secs_f64())
        });
        if let Some(seconds) = drain.filter(|&seconds| seconds >= 0.05) {
            after += &format!("  ours wrote back for {seconds:.2} s more, after the run\n");
        }
        let verdict = self.verdict(row);
        format!("{}\n{}{after}  {verdict}\n", row.name, align(&cells))
    }

    fn verdict(&self, row: &Row) -> String {
        let goal = row.goal;
        let figures = self.figure(row, row.ours).zip(self.figure(row, goal.peer));
        let Some((ours, peer)) = figures else {
            return format!("verdict: none, for want of {}", goal.peer.label());
        };
        let mut parts = Vec::new();
        if let Some(wanted) = goal.ratio {
            let ratio = ours.median / peer.median;
            let word = if ratio >= wanted { "met" } else { "MISSED" };
            let near = (ratio / wanted - 1.0).abs() < NOISE;
            let noise = if near { ", within the noise" } else { "" };
            let label = goal.peer.label();
            parts.push(format!(
                "{word}: {ratio:.2} x {label}, asked {wanted}{noise}"
            ));
        }
        if let Some(wanted) = goal.server_us {
            let found = self.median(row, row.ours, |sample| sample.server_us);
            parts.push(match found {
                Some(us) if us <= wanted => format!("met: {us:.1} us CPU/IO, asked {wanted}"),
                Some(us) => format!("MISSED: {us:.1} us CPU/IO, asked {wanted}"),
                None => "CPU/IO was not measured".to_owned(),
            });
        }
        if parts.is_empty() {
            parts.push("none: DESIGN 10 asks nothing of this row".to_owned());
        }
        format!("verdict: {}", parts.join("; "))
    }
}

/// The load of the machine, as the kernel tells it.
pub(super) fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first: Vec<&str> = text.split_ascii_whitespace().take(3).collect();
    if first.is_empty() {
        return "unknown".to_owned();
    }
    first.join(" ")
}

/// Says on what machine this is.
pub(super) fn print_machine(place: &Place) {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!(
        "{cores} cores, Linux {}, load {} at the start; files of {} MiB in {}",
        kernel.trim(),
        load(),
        place.size_mib,
        place.data.display()
    );
    println!(
        "daemon {}; overlay {} MiB, log {} MiB",
        place.daemon.display(),
        place.overlay_mib,
        place.log_mib
    );
    if cfg!(debug_assertions) {
        println!("this is a debug build of hn4-bench: the client is slower than it should be");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::rows::ROWS;

    fn sample(iops: f64, server_us: f64) -> Sample {
        Sample {
            iops,
            bytes_per_second: iops * 4096.0,
            p99_us: 1.0,
            client_us: None,
            server_us: Some(server_us),
            drain: None,
        }
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let found = spread([4.0, 1.0, 3.0, 10.0].into_iter()).expect("figures");
        let expected = Spread {
            least: 1.0,
            median: 3.5,
            most: 10.0,
        };
        assert_eq!(found, expected);
        assert_eq!(spread(std::iter::empty()), None);
    }

    #[test]
    fn a_verdict_follows_the_medians_and_says_what_is_missing() {
        let row = &ROWS[0];
        let mut table = Table::default();
        table
            .missing
            .push((Peer::Qemu, "it is not installed".to_owned()));
        table.add(row, Peer::Ours, sample(300.0, 12.0));
        let text = table.show_row(row);
        assert!(text.contains("not measured: it is not installed"), "{text}");
        assert!(text.contains("verdict: none, for want of"), "{text}");

        let mut table = Table::default();
        for iops in [100.0, 10.0, 1000.0] {
            table.add(row, Peer::Ours, sample(iops * 3.0, 12.0));
            table.add(row, Peer::Qemu, sample(iops, 30.0));
        }
        let verdict = table.verdict(row);
        assert!(verdict.contains("met: 3.00 x"), "{verdict}");
        assert!(verdict.contains("MISSED: 12.0 us"), "{verdict}");
        table.add(row, Peer::Qemu, sample(1e9, 30.0));
        table.add(row, Peer::Qemu, sample(1e9, 30.0));
        assert!(table.verdict(row).contains("MISSED: 0.30 x"));
    }
}
