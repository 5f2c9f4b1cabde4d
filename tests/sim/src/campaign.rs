//! Many seeds, on several threads. Each run is a function of its seed alone; the reports come in
//! the order of the seeds, so that what is printed does not depend on the threads either.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use crate::{Options, Report, run_seed};

/// Reports that may wait for that of an earlier seed, for each thread.
const AHEAD: usize = 4;

/// Runs seeds on `jobs` threads and gives each report, in order, to `take`, until it breaks off.
pub fn run_many(
    seeds: Range<u64>,
    jobs: usize,
    options: &Options,
    mut take: impl FnMut(Report) -> ControlFlow<()>,
) {
    if jobs <= 1 {
        let _ = seeds.map(|seed| run_seed(seed, options)).try_for_each(take);
        return;
    }
    let (next, over) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    thread::scope(|scope| {
        let (sender, reports) = mpsc::sync_channel(jobs * AHEAD);
        for _ in 0..jobs {
            let (sender, next, over, end) = (sender.clone(), &next, &over, seeds.end);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || sender.send(run_seed(seed, options)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let (mut early, mut due) = (BTreeMap::new(), seeds.start);
        for report in reports {
            early.insert(report.seed, report);
            while let Some(report) = early.remove(&due) {
                due += 1;
                if take(report).is_break() {
                    // Threads that wait to send find that nobody listens.
                    over.store(true, Ordering::Relaxed);
                    return;
                }
            }
        }
    });
}
