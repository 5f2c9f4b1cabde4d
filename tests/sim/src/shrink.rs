//! From a failing seed to the shortest list of faults with which it still fails.
//!
//! Delta debugging: ever smaller parts of the list are left out, as long as the same promise stays
//! broken. The result is a list of which no single fault can be left out, if the budget of runs
//! sufficed.

use crate::faults::Happened;
use crate::{Options, Report, run_seed};

/// Runs that a search may take.
const BUDGET: usize = 400;

/// What is left of a failing run.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// The run with the shortest list, in words.
    pub report: Report,
    /// Faults of the whole run.
    pub before: usize,
    /// Runs that it took.
    pub runs: usize,
}

fn numbers(report: &Report) -> Vec<u64> {
    let number = |happened: &Happened| happened.number;
    report.faults.iter().map(number).collect()
}

/// Shortens the list of faults of a run that broke a promise. `None` if it does not break any.
#[must_use]
pub fn shrink(seed: u64, options: &Options) -> Option<Shrunk> {
    let whole = run_seed(seed, options);
    let promise = whole.violation.as_ref()?.promise;
    let mut runs = 1;
    let mut fails = |keep: &[u64]| {
        runs += 1;
        let report = run_seed(
            seed,
            &Options {
                keep: Some(keep.to_vec()),
                words: false,
                ..options.clone()
            },
        );
        let same = report
            .violation
            .as_ref()
            .is_some_and(|violation| violation.promise == promise);
        // What was kept and was not reached does no harm and tells nothing.
        same.then(|| numbers(&report))
    };
    let before = whole.faults.len();
    let mut kept = numbers(&whole);
    let mut parts = 1;
    let mut left = BUDGET;
    while !kept.is_empty() && left > 0 {
        let size = kept.len().div_ceil(parts);
        let without = (0..kept.len()).step_by(size).find_map(|from| {
            left = left.checked_sub(1)?;
            let mut rest = kept.clone();
            rest.drain(from..(from + size).min(kept.len()));
            fails(&rest)
        });
        match without {
            Some(rest) => {
                kept = rest;
                parts = parts.saturating_sub(1).max(1);
            }
            None if size == 1 => break,
            None => parts = (parts * 2).min(kept.len()),
        }
    }
    let report = run_seed(
        seed,
        &Options {
            keep: Some(kept),
            words: true,
            ..options.clone()
        },
    );
    Some(Shrunk {
        report,
        before,
        runs,
    })
}
