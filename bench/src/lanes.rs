//! Volumes side by side in this process: how the engine grows with the cores.
//!
//! A lane of the engine is a thread with its own ring, volume and memory, and shares nothing with
//! the others but the disk. What is measured therefore stays in memory: reads from the overlay,
//! and writes while it has room. Beyond the number of cores nothing can be gained; the table says
//! how many there are.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::drive;
use crate::engine::EngineSpec;
use crate::job::JobFile;
use crate::report::align;
use crate::stats::Stats;
use crate::target::{Target, TargetSpec};

/// Size of each volume; its overlay holds all of it.
const SIZE_MIB: u64 = 64;
/// Written before the reads begin: all of what they read.
const FILL: &str = "[fill]\nrw=write\nbs=64k\niodepth=8\nsize=24m\n";
/// Half of the overlay, then it ends.
const WRITE: &str = "[write]\nrw=randwrite\nbs=4k\niodepth=32\nnorandommap\nsize=24m\n";

/// What to measure.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// How many lanes, one run after the other
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16],
          value_parser = clap::value_parser!(u32).range(1..=256))]
    lanes: Vec<u32>,
    /// Rounds; each does every number of lanes once
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Milliseconds of reading in each run
    #[arg(long, value_name = "MS", default_value_t = 1000,
          value_parser = clap::value_parser!(u32).range(10..=600_000))]
    runtime_ms: u32,
    /// Folder for the files of the volumes, which are removed
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
}

/// What all lanes did together: requests a second, and CPU time for each.
#[derive(Clone, Copy, Debug)]
struct Run {
    iops: f64,
    cpu_us: f64,
}

/// Measures and prints.
///
/// # Errors
/// If a volume cannot be made, or fails.
pub fn run(options: &Options) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{cores} cores; lanes beyond that many take turns");
    let most = options.lanes.iter().copied().max().context("no lanes")?;
    let spec = EngineSpec {
        folder: options.dir.clone(),
        size_mib: SIZE_MIB,
        overlay_mib: SIZE_MIB,
        log_mib: 2 * SIZE_MIB,
        write_delay_ms: 0,
    };
    let targets: Result<Vec<Target>> = (0..most)
        .map(|_| Target::open(&TargetSpec::Engine(spec.clone())))
        .collect();
    let targets = targets?;
    let read = format!(
        "[read]\nrw=randread\nbs=4k\niodepth=32\nnorandommap\nsize=24m\ntime_based\n\
         runtime={}ms\n",
        options.runtime_ms
    );
    let kinds = [
        ("write, room", String::new(), WRITE.to_owned()),
        ("read, overlay", FILL.to_owned(), read),
    ];
    let mut found: Vec<(usize, u32, Run)> = Vec::new();
    for _ in 0..options.rounds {
        for &count in &options.lanes {
            for (kind, (_, before, job)) in kinds.iter().enumerate() {
                let lanes = targets
                    .get(..count as usize)
                    .context("a target for each lane")?;
                found.push((kind, count, side_by_side(lanes, before, job)?));
            }
        }
    }
    let head = ["work", "lanes", "IOPS", "of one lane", "cpu us/io"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (kind, (name, ..)) in kinds.iter().enumerate() {
        let mut one = None;
        for &count in &options.lanes {
            let of = || found.iter().filter(|it| it.0 == kind && it.1 == count);
            let iops = crate::compare::middle(of().map(|it| it.2.iops)).context("rounds")?;
            let cpu = crate::compare::middle(of().map(|it| it.2.cpu_us)).context("rounds")?;
            let one = *one.get_or_insert(iops.median / f64::from(count));
            rows.push(vec![
                (*name).to_owned(),
                count.to_string(),
                format!("{:.0}", iops.median),
                format!("{:.2}", iops.median / one),
                format!("{:.2}", cpu.median),
            ]);
        }
    }
    print!("{}", align(&rows));
    Ok(())
}

/// Lets every lane do the job at the same time, each after its own preparation.
fn side_by_side(lanes: &[Target], before: &str, job: &str) -> Result<Run> {
    let jobs = JobFile::parse(&format!("{before}{job}"))?.jobs;
    let ready = std::sync::Barrier::new(lanes.len());
    let results = std::thread::scope(|scope| {
        let start = |target| {
            let (jobs, ready) = (&jobs, &ready);
            scope.spawn(move || one_lane(target, jobs, ready))
        };
        let handles: Vec<_> = lanes.iter().map(start).collect();
        let join = |handle: std::thread::ScopedJoinHandle<'_, Result<Stats>>| {
            handle
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("a panic")))
        };
        handles
            .into_iter()
            .map(join)
            .collect::<Result<Vec<Stats>>>()
    })?;
    let ios: u64 = results.iter().map(Stats::ios).sum();
    ensure!(ios > 0, "nothing was measured");
    let cpu: f64 = results.iter().map(|it| it.client.total.as_secs_f64()).sum();
    Ok(Run {
        iops: results.iter().map(Stats::iops).sum(),
        cpu_us: cpu * 1e6 / ios as f64,
    })
}

fn one_lane(
    target: &Target,
    jobs: &[crate::job::Job],
    ready: &std::sync::Barrier,
) -> Result<Stats> {
    let longest = jobs
        .iter()
        .map(|job| job.block_bytes)
        .max()
        .context("a job")?;
    let mut widest = jobs.first().context("a job")?.clone();
    widest.block_bytes = longest;
    widest.depth = jobs.iter().map(|job| job.depth).max().context("a job")?;
    let lane = target.lane(&widest, 1);
    // Also without a lane, or the others would wait for ever.
    ready.wait();
    let mut lane = lane?;
    let mut last = None;
    for job in jobs {
        last = Some(drive::on_lane(lane.as_mut(), job)?);
    }
    lane.finish()?;
    last.context("a job")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_run_side_by_side_and_each_does_all_of_its_job() {
        let folder = crate::test_folder();
        let spec = EngineSpec {
            folder,
            size_mib: 8,
            overlay_mib: 8,
            log_mib: 16,
            write_delay_ms: 0,
        };
        let open = |_| Target::open(&TargetSpec::Engine(spec.clone())).expect("a volume");
        let targets: Vec<Target> = (0..2).map(open).collect();
        let job = "[w]\nrw=randwrite\nbs=4k\niodepth=8\nsize=1m\n";
        let run = side_by_side(&targets, "", job).expect("it runs");
        assert!(run.iops > 0.0 && run.cpu_us > 0.0, "{run:?}");
    }
}
