//! Kept seeds and a bounded number of fresh ones; the same seed is the same run in another process.

use std::ops::{ControlFlow, Range};
use std::process::Command;

use hn4_sim::{Corner, Options, run_many, run_seed};

/// Runs seeds, as many at a time as there are cores.
fn assert_all_hold(seeds: Range<u64>, options: &Options, what: &str) {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    run_many(seeds, jobs, options, |report| {
        if let Some(violation) = report.violation {
            panic!(
                "seed {} ({what}): {} is broken: {}",
                report.seed, violation.promise, violation.detail
            );
        }
        ControlFlow::Continue(())
    });
}

#[test]
fn seeds_that_found_a_bug_find_none_any_more() {
    let mut kept = 0;
    for line in include_str!("../seeds.txt").lines() {
        let Some((seed, mut what)) = line.split_once(' ').filter(|(seed, _)| *seed != "#") else {
            continue;
        };
        let seed = seed.parse().expect("a line is a seed and what it found");
        let mut options = Options::default();
        if let Some(rest) = what.strip_prefix("--trees ") {
            options.knobs.trees = Some(true);
            what = rest;
        }
        if let Some(rest) = what.strip_prefix("--lean ") {
            let (name, rest) = rest.split_once(' ').expect("a corner, and what");
            options.knobs.lean = Some(Corner::named(name).expect("a corner"));
            what = rest;
        }
        if let Some(rest) = what.strip_prefix("--nodes ") {
            let (nodes, rest) = rest.split_once(' ').expect("a number of nodes, and what");
            options.knobs.nodes = Some(nodes.parse().expect("a number of nodes"));
            what = rest;
        }
        assert_all_hold(seed..seed + 1, &options, what.trim());
        kept += 1;
    }
    assert!(kept > 20, "{kept} seeds are kept");
}

#[test]
fn fresh_seeds_break_no_promise() {
    assert_all_hold(1_000_000..1_000_060, &Options::default(), "fresh");
}

/// P11: also on several threads.
#[test]
fn the_same_seed_is_the_same_run_in_another_process() {
    let seeds = 1_000_000..1_000_004;
    let mut hashes = Vec::new();
    run_many(seeds.clone(), 2, &Options::default(), |report| {
        hashes.push(report.trace_hash);
        ControlFlow::Continue(())
    });
    assert_eq!(hashes.len(), 4, "every seed was run");
    for (seed, here) in seeds.zip(hashes) {
        let alone = run_seed(seed, &Options::default()).trace_hash;
        assert_eq!(here, alone, "seed {seed} on its own");
        let output = Command::new(env!("CARGO_BIN_EXE_hn4-sim"))
            .args(["--seed", &seed.to_string()])
            .output()
            .expect("the program of this crate runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let here = format!("{here:016x}");
        assert!(
            text.contains(&here),
            "seed {seed}: {here} here, elsewhere {text}"
        );
    }
}

/// The bugs that are planted have names of their own, and each has a seed that finds it.
#[test]
fn every_planted_bug_has_a_seed() {
    let kept: Vec<(&str, &str)> = include_str!("../mutants.txt")
        .lines()
        .filter_map(|line| line.split_once(' '))
        .collect();
    for mutant in hn4_engine::core::mutants::Mutant::ALL {
        let name = format!("{mutant:?}");
        let seeds: Vec<_> = kept.iter().filter(|(other, _)| *other == name).collect();
        assert_eq!(seeds.len(), 1, "{name} in mutants.txt");
        let seed = seeds[0]
            .1
            .trim_end_matches(" other-peers")
            .trim_end_matches(" trees");
        assert!(
            seed.parse::<u64>().is_ok_and(|seed| seed <= 2000),
            "{name} {seed}"
        );
    }
}
