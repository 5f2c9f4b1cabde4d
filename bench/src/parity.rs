//! One job file on one raw file: fio, our ring, and the runtimes that are built in, in turns.
//!
//! Whether our figures are fio's figures is seen only side by side: the same job in many short
//! rounds, the order changing from round to round, and medians compared.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use crate::baseline::{Baseline, Runtime};
use crate::compare::{Sample, fio, middle};
use crate::drive;
use crate::job::JobFile;
use crate::report::align;
use crate::target::{Target, TargetSpec};

/// How far apart fio and our ring may be.
const TOLERANCE_PERCENT: f64 = 5.0;

/// What to run.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A job file as fio reads it, with one job that is one thread
    jobfile: PathBuf,
    /// The file or device; jobs that write overwrite it
    #[arg(long, value_name = "PATH")]
    file: PathBuf,
    /// Rounds; each runs everybody once
    #[arg(long, value_name = "N", default_value_t = 15,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

/// Who runs the job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Who {
    Fio,
    Ring,
    Other(Runtime),
}

impl Who {
    fn label(self) -> String {
        match self {
            Self::Fio => "fio io_uring".to_owned(),
            Self::Ring => "our ring".to_owned(),
            Self::Other(runtime) => runtime.to_string(),
        }
    }
}

/// Runs it and prints medians, ranges and a verdict.
///
/// # Errors
/// If the job cannot be run by fio or by our ring.
pub fn run(options: &Options) -> Result<()> {
    let name = options.jobfile.display();
    let text = std::fs::read_to_string(&options.jobfile);
    let text = text.with_context(|| format!("reading {name}"))?;
    let jobs = JobFile::parse(&text)
        .with_context(|| format!("{name}"))?
        .jobs;
    anyhow::ensure!(
        jobs.len() == 1 && jobs.iter().all(|job| job.numjobs == 1),
        "{name}: one job with numjobs=1 is compared"
    );
    let file = options.file.canonicalize();
    let file = file.with_context(|| format!("{}", options.file.display()))?;
    let scratch = tempfile::tempdir()?;
    let mut all = vec![Who::Fio, Who::Ring];
    let built_in = Runtime::ALL.into_iter().filter(|it| it.is_built_in());
    all.extend(built_in.map(Who::Other));
    let mut samples: Vec<(Who, Result<Sample>)> = Vec::new();
    for round in 0..options.rounds as usize {
        let mut turn = all.clone();
        let by = round % turn.len();
        turn.rotate_left(by);
        for who in turn {
            let target = match who {
                Who::Fio => {
                    samples.push((who, fio::measure(&text, &file, scratch.path())));
                    continue;
                }
                Who::Ring => TargetSpec::Raw(file.clone()),
                Who::Other(runtime) => TargetSpec::Baseline(Baseline {
                    runtime,
                    path: file.clone(),
                }),
            };
            let sample = Target::open(&target)
                .and_then(|target| drive::run(&jobs, &target, None))
                .and_then(|mut outcomes| {
                    let outcome = outcomes.pop().context("one job")?;
                    Sample::of(outcome.stats.first().context("one thread")?)
                });
            // One that failed is not asked again.
            if sample.is_err() {
                all.retain(|&other| other != who);
            }
            samples.push((who, sample));
        }
    }
    print!("{}", show(&samples, options.rounds));
    for (who, sample) in samples {
        if matches!(who, Who::Fio | Who::Ring) {
            sample.with_context(|| who.label())?;
        }
    }
    Ok(())
}

fn show(samples: &[(Who, Result<Sample>)], rounds: u32) -> String {
    let head = ["who", "IOPS", "least", "most", "cpu us/io", "p99 us"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut after = String::new();
    let mut medians = [None; 2];
    let others = Runtime::ALL.map(Who::Other);
    for who in [Who::Fio, Who::Ring].into_iter().chain(others) {
        let of = || samples.iter().filter(|(other, _)| *other == who);
        if let Some((_, Err(error))) = of().find(|(_, sample)| sample.is_err()) {
            after += &format!("{}: failed: {error:#}\n", who.label());
        }
        let good = || of().filter_map(|(_, sample)| sample.as_ref().ok());
        let Some(iops) = middle(good().map(|sample| sample.iops)) else {
            continue;
        };
        match who {
            Who::Fio => medians[0] = Some(iops.median),
            Who::Ring => medians[1] = Some(iops.median),
            Who::Other(_) => {}
        }
        let cpu = middle(good().filter_map(|sample| sample.client_us));
        let p99 = middle(good().map(|sample| sample.p99_us));
        let cell = |found: Option<crate::compare::Spread>, digits: usize| {
            found.map_or("-".to_owned(), |found| format!("{:.digits$}", found.median))
        };
        rows.push(vec![
            who.label(),
            format!("{:.0}", iops.median),
            format!("{:.0}", iops.least),
            format!("{:.0}", iops.most),
            cell(cpu, 2),
            cell(p99, 0),
        ]);
    }
    if let [Some(fio), Some(ring)] = medians {
        let off = (ring / fio - 1.0) * 100.0;
        let word = match off.abs() <= TOLERANCE_PERCENT {
            true => "agree",
            false => "DIFFER",
        };
        after += &format!(
            "fio and our ring {word}: {off:+.1} % in the medians of {rounds} rounds, \
             {TOLERANCE_PERCENT} % allowed\n"
        );
    }
    align(&rows) + &after
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(iops: f64) -> Sample {
        Sample {
            iops,
            bytes_per_second: iops * 4096.0,
            p99_us: 1.0,
            client_us: Some(2.0),
            server_us: None,
            drain: None,
        }
    }

    #[test]
    fn medians_are_compared_and_a_failure_is_told_with_its_errno() {
        let mut samples = Vec::new();
        for iops in [100.0, 102.0, 5.0] {
            samples.push((Who::Fio, Ok(sample(iops))));
            samples.push((Who::Ring, Ok(sample(iops * 1.04))));
        }
        let errno = std::io::Error::from_raw_os_error(95);
        let failure = anyhow::Error::from(errno).context("glommio: a read");
        samples.push((Who::Other(Runtime::Glommio), Err(failure)));
        let text = show(&samples, 3);
        assert!(text.contains("our ring agree: +4.0 %"), "{text}");
        assert!(text.contains("glommio: failed: glommio: a read:"), "{text}");
        assert!(text.contains("os error 95"), "{text}");
        samples.push((Who::Ring, Ok(sample(500.0))));
        samples.push((Who::Ring, Ok(sample(500.0))));
        assert!(show(&samples, 3).contains("DIFFER"));
    }
}
