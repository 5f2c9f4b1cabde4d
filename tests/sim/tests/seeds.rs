//! Kept seeds and a bounded number of fresh ones; the same seed is the same run in another process.

use std::process::Command;

use hn4_sim::{Options, run_seed};

fn assert_holds(seed: u64, what: &str) {
    let report = run_seed(seed, &Options::default());
    if let Some(violation) = report.violation {
        panic!(
            "seed {seed} ({what}): {} is broken: {}",
            violation.promise, violation.detail
        );
    }
}

#[test]
fn seeds_that_found_a_bug_find_none_any_more() {
    for line in include_str!("../seeds.txt").lines() {
        let Some((seed, what)) = line.split_once(' ').filter(|(seed, _)| *seed != "#") else {
            continue;
        };
        let seed = seed.parse().expect("a line is a seed and what it found");
        assert_holds(seed, what.trim());
    }
}

#[test]
fn fresh_seeds_break_no_promise() {
    for seed in 1_000_000..1_000_060 {
        assert_holds(seed, "fresh");
    }
}

/// P11.
#[test]
fn the_same_seed_is_the_same_run_in_another_process() {
    for seed in [3, 5542, 1_000_003] {
        let hash = format!("{:016x}", run_seed(seed, &Options::default()).trace_hash);
        let output = Command::new(env!("CARGO_BIN_EXE_hn4-sim"))
            .args(["--seed", &seed.to_string()])
            .output()
            .expect("the program of this crate runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.contains(&hash),
            "seed {seed}: {hash} here, elsewhere {text}"
        );
    }
}
