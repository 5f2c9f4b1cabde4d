//! Runs seeds: `hn4-sim --seeds N [--seed S] [--trace]`.

#[cfg(feature = "mutants")]
mod hunt;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Instant;

use hn4_sim::{Corner, Happened, Options, Report, Stats, run_many, shrink};

const USAGE: &str = "Usage: hn4-sim [--seeds N] [--seed FIRST] [--jobs N] [--trace] [--keep-going]
  [--nodes N] [--requests N] [--real-sessions] [--modelled-sessions] [--other-peers]
  [--same-peers] [--trees] [--lean CORNER] [--backing-damage] [--lying-flush]
  [--mutants [--mutant NAME] | --kept-mutants]";

/// Events in words that are shown of each node when a seed fails.
const LAST_EVENTS: usize = 12;
/// Failing seeds that are named for each kind of failure.
const NAMED: usize = 64;

#[derive(Default)]
struct Arguments {
    seeds: u64,
    first: u64,
    /// Threads.
    jobs: usize,
    keep_going: bool,
    mutants: bool,
    kept_mutants: bool,
    /// Only this planted bug.
    mutant: Option<String>,
    options: Options,
}

fn arguments() -> Result<Arguments, String> {
    let mut given = Arguments {
        seeds: 1000,
        first: 1,
        jobs: 1,
        ..Arguments::default()
    };
    let (mut one, mut many) = (false, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--mutant" {
            given.mutants = true;
            given.mutant = arguments.next();
            continue;
        }
        if argument == "--lean" {
            let name = arguments.next().unwrap_or_default();
            given.options.knobs.lean = Some(corner(&name)?);
            continue;
        }
        let mut number = || {
            let text = arguments
                .next()
                .ok_or(format!("{argument} needs a number"))?;
            text.parse::<u64>()
                .map_err(|error| format!("{argument} {text}: {error}"))
        };
        let knobs = &mut given.options.knobs;
        match argument.as_str() {
            "--seeds" => (given.seeds, many) = (number()?, true),
            "--seed" => (given.first, one) = (number()?, true),
            "--jobs" => given.jobs = usize::try_from(number()?).unwrap_or(1),
            "--nodes" => knobs.nodes = usize::try_from(number()?).ok(),
            "--requests" => knobs.requests = Some(number()?),
            "--real-sessions" => knobs.real_sessions = Some(true),
            "--modelled-sessions" => knobs.real_sessions = Some(false),
            "--other-peers" => knobs.other_peers = Some(true),
            "--same-peers" => knobs.other_peers = Some(false),
            "--trees" => knobs.trees = Some(true),
            "--backing-damage" => knobs.backing_damage = true,
            "--lying-flush" => knobs.lying_flush = true,
            "--trace" => given.options.words = true,
            "--keep-going" => given.keep_going = true,
            "--mutants" => given.mutants = true,
            "--kept-mutants" => given.kept_mutants = true,
            _ => return Err(format!("{argument}? {USAGE}")),
        }
    }
    if one && !many {
        given.seeds = 1;
    }
    Ok(given)
}

fn corner(name: &str) -> Result<Corner, String> {
    Corner::named(name).ok_or_else(|| {
        let known = Corner::NAMED.map(|(name, _)| name).join(", ");
        format!("--lean {name:?} must be one of {known}")
    })
}

fn show_fault(happened: &Happened) {
    let Happened {
        number,
        at_us,
        fault,
        node,
    } = happened;
    let node = node.map_or_else(|| "network".to_owned(), |node| format!("node {node}"));
    println!("  #{number:<4} {at_us:>10} us  {node}: {fault:?}");
}

/// Prints what is needed to understand a failing seed.
fn explain(seed: u64, arguments: &Arguments) {
    println!("looking for the shortest list of faults that still fails ..");
    let Some(shrunk) = shrink(seed, &arguments.options) else {
        println!("it does not fail when it is run again: the run is no function of its seed (P11)");
        return;
    };
    let Report {
        violation,
        faults,
        words,
        ..
    } = &shrunk.report;
    let (before, runs) = (shrunk.before, shrunk.runs);
    println!(
        "{} of {before} faults are needed (found in {runs} runs):",
        faults.len()
    );
    faults.iter().for_each(show_fault);
    if let Some(violation) = violation {
        println!(
            "with these, {} is broken: {}",
            violation.promise, violation.detail
        );
    }
    for node in 0..hn4_sim::MOST_NODES {
        let name = format!(" node {node} ");
        let own: Vec<&String> = words.iter().filter(|line| line.contains(&name)).collect();
        if !own.is_empty() {
            println!("last events of node {node} (microseconds, event, actions):");
        }
        let skip = own.len().saturating_sub(LAST_EVENTS);
        own.iter().skip(skip).for_each(|line| println!("{line}"));
    }
}

/// A violation without its numbers, to count those that are alike.
fn alike(promise: &str, detail: &str) -> String {
    let digits = |c: char| if c.is_ascii_digit() { '#' } else { c };
    let line = detail.lines().next().unwrap_or("");
    let short: String = line.chars().map(digits).collect();
    let short = short.replace("##", "#").replace("##", "#");
    let short: String = short.chars().take(90).collect();
    format!("{promise} {short}")
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    if arguments.seeds > 1 || arguments.kept_mutants {
        std::panic::set_hook(Box::new(|_| {}));
    }
    if arguments.mutants || arguments.kept_mutants {
        return planted(&arguments);
    }
    campaign(&arguments)
}

#[cfg(feature = "mutants")]
fn planted(arguments: &Arguments) -> ExitCode {
    if arguments.mutant.is_some() && arguments.keep_going {
        // How many seeds find it.
        hunt::plant(arguments);
        campaign(arguments)
    } else if arguments.mutants {
        hunt::search(arguments)
    } else {
        hunt::replay(arguments)
    }
}

#[cfg(not(feature = "mutants"))]
fn planted(_: &Arguments) -> ExitCode {
    eprintln!("this program was built without planted bugs: build with --features mutants");
    ExitCode::from(2)
}

/// Runs seeds, and says what happened in all of them.
fn campaign(arguments: &Arguments) -> ExitCode {
    let started = Instant::now();
    let mut total = Stats::default();
    let mut failed: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut fatal = None;
    let seeds = arguments.first..arguments.first + arguments.seeds;
    run_many(seeds, arguments.jobs, &arguments.options, |report| {
        let seed = report.seed;
        total.add(&report.stats);
        if arguments.seeds == 1 {
            report.words.iter().for_each(|words| println!("{words}"));
            println!("seed {seed}: trace {:016x}", report.trace_hash);
        }
        if let Some(violation) = report.violation {
            let detail = &violation.detail;
            if !arguments.keep_going {
                println!("seed {seed}: {} is broken: {detail}", violation.promise);
                fatal = Some(seed);
                return ControlFlow::Break(());
            }
            let kind = failed.entry(alike(violation.promise, detail));
            kind.or_default().push(seed);
        }
        let done = seed - arguments.first + 1;
        if done.is_multiple_of(10_000) {
            println!("{done} seeds, {:.0} s", started.elapsed().as_secs_f64());
        }
        ControlFlow::Continue(())
    });
    if let Some(seed) = fatal {
        explain(seed, arguments);
        return ExitCode::FAILURE;
    }
    for (what, seeds) in &failed {
        let named = &seeds[..seeds.len().min(NAMED)];
        println!("{:>6} x, seeds {named:?}: {what}", seeds.len());
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{} seeds in {seconds:.1} s", arguments.seeds);
    print!("{total}");
    if failed.is_empty() {
        println!("no promise was broken");
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
