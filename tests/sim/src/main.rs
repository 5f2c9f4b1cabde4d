//! Runs seeds: `hn4-sim --seeds N [--seed S] [--trace]`.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use hn4_sim::{Stats, run_seed};

struct Options {
    seeds: u64,
    first: u64,
    trace: bool,
    keep_going: bool,
    mutants: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        seeds: 1000,
        first: 1,
        trace: false,
        keep_going: false,
        mutants: false,
    };
    let mut one = false;
    let mut many = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || {
            let text = arguments
                .next()
                .ok_or(format!("{argument} needs a number"))?;
            text.parse::<u64>()
                .map_err(|error| format!("{argument} {text}: {error}"))
        };
        match argument.as_str() {
            "--seeds" => (options.seeds, many) = (number()?, true),
            "--seed" => (options.first, one) = (number()?, true),
            "--trace" => options.trace = true,
            "--keep-going" => options.keep_going = true,
            "--mutants" => options.mutants = true,
            _ => {
                return Err(format!(
                    "{argument}? Usage: hn4-sim [--seeds N] [--seed S] [--trace] [--keep-going]"
                ));
            }
        }
    }
    if one && !many {
        options.seeds = 1;
    }
    Ok(options)
}

/// Shows for each planted bug the first seed that finds it.
#[cfg(feature = "mutants")]
fn mutants(options: &Options) -> ExitCode {
    use hn4_sim::mutants::{Mutant, select};
    let mut missed = 0;
    for mutant in Mutant::ALL {
        select(Some(mutant));
        let mut seeds = options.first..options.first + options.seeds;
        let found = seeds.find_map(|seed| Some((seed, run_seed(seed, false).violation?)));
        select(None);
        match found {
            Some((seed, violation)) => {
                let needed = seed - options.first + 1;
                let detail = violation.detail.lines().next().unwrap_or("").to_owned();
                let detail: String = detail.chars().take(100).collect();
                let promise = violation.promise;
                println!("| {mutant:?} | {needed} | {seed} | {promise} | {detail} |");
            }
            None => {
                missed += 1;
                println!("| {mutant:?} | NOT FOUND | | | |");
            }
        }
    }
    if missed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(not(feature = "mutants"))]
fn mutants(_: &Options) -> ExitCode {
    eprintln!("this program was built without planted bugs: build with --features mutants");
    ExitCode::from(2)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    if options.seeds > 1 {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let started = Instant::now();
    if options.mutants {
        return mutants(&options);
    }
    let mut total = Stats::default();
    let mut failed: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for seed in options.first..options.first + options.seeds {
        let report = run_seed(seed, options.trace);
        total.add(&report.stats);
        if options.seeds == 1 {
            report.words.iter().for_each(|words| println!("{words}"));
            println!(
                "seed {seed}: trace {:016x}, {:?}",
                report.trace_hash, report.stats
            );
        }
        let Some(violation) = report.violation else {
            continue;
        };
        let detail = &violation.detail;
        if !options.keep_going {
            println!("seed {seed}: {} is broken: {detail}", violation.promise);
            return ExitCode::FAILURE;
        }
        let digits = |c: char| if c.is_ascii_digit() { '#' } else { c };
        let short: String = detail
            .lines()
            .next()
            .unwrap_or("")
            .chars()
            .map(digits)
            .collect();
        let short: String = short
            .replace("##", "#")
            .replace("##", "#")
            .chars()
            .take(90)
            .collect();
        let entry = failed
            .entry(format!("{} {short}", violation.promise))
            .or_insert((seed, 0));
        entry.1 += 1;
    }
    for (what, (seed, times)) in &failed {
        println!("{times:>6} x, first seed {seed}: {what}");
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{} seeds in {seconds:.1} s: {total:?}", options.seeds);
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
