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
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        seeds: 1000,
        first: 1,
        trace: false,
        keep_going: false,
    };
    let mut one = false;
    let mut many = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || {
            let text = arguments.next().ok_or(format!("{argument} needs a number"))?;
            text.parse::<u64>().map_err(|error| format!("{argument} {text}: {error}"))
        };
        match argument.as_str() {
            "--seeds" => (options.seeds, many) = (number()?, true),
            "--seed" => (options.first, one) = (number()?, true),
            "--trace" => options.trace = true,
            "--keep-going" => options.keep_going = true,
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
    let mut total = Stats::default();
    let mut failed: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for seed in options.first..options.first + options.seeds {
        let report = run_seed(seed, options.trace);
        total.add(&report.stats);
        if options.seeds == 1 {
            report.words.iter().for_each(|words| println!("{words}"));
            println!("seed {seed}: trace {:016x}, {:?}", report.trace_hash, report.stats);
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
        let short: String = detail.lines().next().unwrap_or("").chars().map(digits).collect();
        let short: String = short.replace("##", "#").replace("##", "#").chars().take(90).collect();
        let entry = failed.entry(format!("{} {short}", violation.promise)).or_insert((seed, 0));
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
