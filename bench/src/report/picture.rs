//! A picture of a run: one HTML file with SVG in it, without scripts or anything from elsewhere.
//!
//! Three charts: latency by percentile, requests per second over time, and the percentiles of each
//! second over time, where the drain of an overlay shows.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

use crate::drive::Outcome;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 200.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 45.0;
/// Told apart by people who do not see all colours, too.
const COLOURS: [&str; 6] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000",
];
/// Percentiles on the axis of the first chart.
const PERCENTILES: [f64; 7] = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999];

/// A line of a chart.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// A chart whose vertical axis may be logarithmic.
struct Chart {
    title: &'static str,
    x_label: &'static str,
    y_label: &'static str,
    x_ticks: Vec<(f64, String)>,
    logarithmic: bool,
    series: Vec<Series>,
}

/// The picture as HTML.
#[must_use]
pub fn html(outcomes: &[Outcome], target: &str) -> String {
    let mut text = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>hn4-bench</title>\
         <style>body{{font:14px sans-serif;margin:2em}}svg text{{font:12px sans-serif}}</style>\
         </head><body>\n<h1>hn4-bench</h1>\n<p>{}</p>\n",
        escaped(target)
    );
    for chart in charts(outcomes) {
        text += &chart.svg();
    }
    text += "</body></html>\n";
    text
}

fn charts(outcomes: &[Outcome]) -> [Chart; 3] {
    let mut latency = Vec::new();
    let mut rate = Vec::new();
    let mut over_time = Vec::new();
    for outcome in outcomes {
        for (thread, stats) in outcome.stats.iter().enumerate() {
            let name = match outcome.stats.len() {
                1 => outcome.job.name.clone(),
                _ => format!("{} {thread}", outcome.job.name),
            };
            let sides = [
                ("reads", &stats.read),
                ("writes", &stats.write),
                ("flushes", &stats.sync),
            ];
            for (kind, side) in sides.iter().filter(|(_, side)| side.count() > 0) {
                latency.push(Series {
                    name: format!("{name} {kind}"),
                    points: curve(&side.latency),
                });
            }
            let seconds = || stats.seconds.iter().enumerate();
            rate.push(Series {
                name: name.clone(),
                points: seconds()
                    .map(|(at, second)| (at as f64, second.len() as f64))
                    .collect(),
            });
            for percentile in [50.0, 99.0, 99.9] {
                let micros =
                    |second: &Histogram<u64>| second.value_at_percentile(percentile) as f64 / 1e3;
                over_time.push(Series {
                    name: format!("{name} p{percentile}"),
                    points: seconds()
                        .filter(|(_, second)| !second.is_empty())
                        .map(|(at, second)| (at as f64, micros(second)))
                        .collect(),
                });
            }
        }
    }
    let time_ticks = ticks_of_time(&rate);
    [
        Chart {
            title: "Latency by percentile",
            x_label: "percentile",
            y_label: "microseconds",
            x_ticks: PERCENTILES
                .iter()
                .map(|&at| (rarity(at), format!("{at}")))
                .collect(),
            logarithmic: true,
            series: latency,
        },
        Chart {
            title: "Reads and writes per second",
            x_label: "second",
            y_label: "per second",
            x_ticks: time_ticks.clone(),
            logarithmic: false,
            series: rate,
        },
        Chart {
            title: "Latency of each second",
            x_label: "second",
            y_label: "microseconds",
            x_ticks: time_ticks,
            logarithmic: true,
            series: over_time,
        },
    ]
}

/// Where a percentile is on the axis: each nine takes as much room.
fn rarity(percentile: f64) -> f64 {
    -(1.0 - percentile / 100.0).max(1e-6).log10()
}

fn curve(histogram: &Histogram<u64>) -> Vec<(f64, f64)> {
    (0..=200)
        .map(|step| {
            let rarity = f64::from(step) / 40.0;
            let percentile = 100.0 * (1.0 - 10.0_f64.powf(-rarity));
            let micros = histogram.value_at_percentile(percentile) as f64 / 1e3;
            (rarity, micros)
        })
        .collect()
}

fn ticks_of_time(series: &[Series]) -> Vec<(f64, String)> {
    let longest = series.iter().map(|one| one.points.len()).max().unwrap_or(0);
    let step = (longest / 10).max(1);
    (0..longest)
        .step_by(step)
        .map(|at| (at as f64, at.to_string()))
        .collect()
}

impl Chart {
    fn svg(&self) -> String {
        let values = || self.series.iter().flat_map(|one| one.points.iter());
        let most = values().map(|point| point.1).fold(1.0, f64::max);
        let least = values().map(|point| point.1).fold(most, f64::min);
        let right = self.x_ticks.iter().map(|tick| tick.0);
        let right = values().map(|point| point.0).chain(right);
        let right = right.fold(1.0, f64::max);
        let (bottom, top) = if self.logarithmic {
            (least.max(0.1).log10().floor(), most.log10().ceil())
        } else {
            (0.0, most * 1.05)
        };
        let x = |at: f64| LEFT + at / right * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| {
            let value = match self.logarithmic {
                true => value.max(0.1).log10(),
                false => value,
            };
            HEIGHT - BOTTOM - (value - bottom) / (top - bottom).max(1e-9) * (HEIGHT - TOP - BOTTOM)
        };
        let mut text = format!(
            "<h2>{}</h2>\n<svg width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">\n",
            self.title
        );
        let (floor, end) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        // Writing to a string does not fail.
        for value in self.y_ticks(bottom, top) {
            let at = y(value);
            let _ = writeln!(
                text,
                "<line x1=\"{LEFT}\" x2=\"{end}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
                LEFT - 6.0,
                at + 4.0
            );
        }
        for (value, label) in &self.x_ticks {
            let _ = writeln!(
                text,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                x(*value),
                floor + 16.0
            );
        }
        let _ = writeln!(
            text,
            "<text x=\"{LEFT}\" y=\"18\">{}</text>\
             <text x=\"{end}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            self.y_label,
            HEIGHT - 8.0,
            self.x_label
        );
        for (index, series) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let points = series.points.iter();
            let points: Vec<String> = points
                .map(|&(at, value)| format!("{:.1},{:.1}", x(at), y(value)))
                .collect();
            let _ = writeln!(
                text,
                "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
                points.join(" "),
                end + 10.0,
                TOP + 14.0 * (index as f64 + 1.0),
                escaped(&series.name)
            );
        }
        text += "</svg>\n";
        text
    }

    fn y_ticks(&self, bottom: f64, top: f64) -> Vec<f64> {
        if !self.logarithmic {
            let step = 10.0_f64.powf((top / 2.0).max(1e-9).log10().floor());
            let step = if top / step > 10.0 { 2.0 * step } else { step };
            return (0..=20)
                .map(|at| f64::from(at) * step)
                .filter(|&value| value <= top)
                .collect();
        }
        (-1..=9)
            .filter(|&power| f64::from(power) >= bottom && f64::from(power) <= top)
            .map(|power| 10.0_f64.powi(power))
            .collect()
    }
}

/// Names come from job files.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::job::JobFile;
    use crate::stats::Stats;

    #[test]
    fn a_picture_shows_every_side_and_every_second_and_no_markup_of_a_job() {
        let job = JobFile::parse("[a<b]\nrw=randrw\n").expect("a job");
        let mut stats = Stats::new().expect("stats");
        for second in 0..5 {
            for micros in 1..100 {
                let latency = Duration::from_micros(micros);
                stats.read.record(latency, 4096);
                stats.tick(Duration::from_secs(second), latency);
            }
        }
        stats.write.record(Duration::from_micros(9), 4096);
        let outcomes = [Outcome {
            job: job.jobs[0].clone(),
            stats: vec![stats],
        }];
        let text = html(&outcomes, "raw:x");
        assert_eq!(text.matches("<svg").count(), 3);
        // Reads and writes, the rate, and three percentiles.
        assert_eq!(text.matches("<polyline").count(), 2 + 1 + 3);
        assert!(
            text.contains("a&lt;b reads") && !text.contains("a<b"),
            "{text}"
        );
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        let rates: Vec<_> = charts(&outcomes)[1].series[0].points.clone();
        assert_eq!(rates.len(), 5);
        assert!((rates[4].1 - 99.0).abs() < 1e-9);
    }
}
