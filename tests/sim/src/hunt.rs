//! Looks for seeds that find the planted bugs, and replays those that are kept.

use std::ops::{ControlFlow, Range};
use std::process::ExitCode;

use hn4_sim::mutants::{Mutant, select};
use hn4_sim::{Options, Violation, run_many, run_seed};

use crate::Arguments;

/// A simulator that needs more than this to find a planted bug does not find it.
const MOST_SEEDS: u64 = 2000;

/// The first seed that finds a planted bug, and nothing without it.
fn hunt(
    mutant: Mutant,
    mut seeds: Range<u64>,
    jobs: usize,
    options: &Options,
) -> Option<(u64, Violation)> {
    while !seeds.is_empty() {
        let mut found = None;
        select(Some(mutant));
        run_many(seeds.clone(), jobs, options, |report| {
            let seed = report.seed;
            found = report.violation.map(|violation| (seed, violation));
            match found {
                Some(_) => ControlFlow::Break(()),
                None => ControlFlow::Continue(()),
            }
        });
        select(None);
        let (seed, violation) = found?;
        if run_seed(seed, options).violation.is_none() {
            return Some((seed, violation));
        }
        seeds.start = seed + 1;
    }
    None
}

/// Switches the wanted bug on for good.
pub(crate) fn plant(arguments: &Arguments) {
    let wanted = |mutant: &Mutant| arguments.mutant.as_ref() == Some(&format!("{mutant:?}"));
    select(Mutant::ALL.into_iter().find(wanted));
}

/// Shows for each planted bug the first seed that finds it.
pub(crate) fn search(arguments: &Arguments) -> ExitCode {
    let mut missed = 0;
    let wanted = |mutant: &Mutant| {
        let name = arguments.mutant.as_ref();
        name.is_none_or(|name| *name == format!("{mutant:?}"))
    };
    for mutant in Mutant::ALL.into_iter().filter(wanted) {
        let seeds = arguments.first..arguments.first + arguments.seeds;
        match hunt(mutant, seeds, arguments.jobs, &arguments.options) {
            Some((seed, violation)) => {
                let detail = violation.detail.lines().next().unwrap_or("");
                let detail: String = detail.chars().take(100).collect();
                println!("{mutant:?} {seed} {}: {detail}", violation.promise);
            }
            None => {
                missed += 1;
                println!("{mutant:?} NOT FOUND");
            }
        }
    }
    ExitCode::from(u8::from(missed > 0))
}

/// Runs for each planted bug the seed that is known to find it.
///
/// Whatever changes the course of runs can take the bug out of the way of its seed. That says
/// nothing against the simulator as long as another seed within its bound finds the bug, so one is
/// looked for, and named so that it can be kept.
pub(crate) fn replay(arguments: &Arguments) -> ExitCode {
    let mut missed = 0;
    for mutant in Mutant::ALL {
        let name = format!("{mutant:?}");
        let lines = include_str!("../mutants.txt").lines();
        let mut words = lines.filter_map(|line| line.split_once(' '));
        let kept = words.find(|(other, _)| *other == name);
        let (seed, with) = kept.map_or(("", ""), |(_, kept)| {
            kept.split_once(' ').unwrap_or((kept, ""))
        });
        let mut options = Options::default();
        options.knobs.other_peers = (with == "other-peers").then_some(true);
        options.knobs.trees = (with == "trees").then_some(true);
        let Some(seed) = seed.parse::<u64>().ok() else {
            missed += 1;
            println!("{name}: no seed is kept in mutants.txt");
            continue;
        };
        if let Some((_, violation)) = hunt(mutant, seed..seed + 1, 1, &options) {
            println!("{name}: found by seed {seed} ({})", violation.promise);
            continue;
        }
        match hunt(mutant, 1..MOST_SEEDS + 1, arguments.jobs, &options) {
            Some((other, violation)) => println!(
                "{name}: found by seed {other} ({}), no longer by {seed}: keep \"{name} {other}\" \
                 in mutants.txt",
                violation.promise
            ),
            None => {
                missed += 1;
                println!("{name}: NOT FOUND by seed {seed}, nor by 1 to {MOST_SEEDS}");
            }
        }
    }
    ExitCode::from(u8::from(missed > 0))
}
