//! A usable replica that was away until the primary's log had wrapped catches up by itself: a full
//! copy comes into a shadow beside it, while it stays a readable prefix of the history.

mod common;

use std::time::{Duration, Instant};

use common::{LIMIT, folder, is_usable, oracle, running_pair, seed, times};
use hn4_replicad::control::api::{CopyReport, VolumeReport, VolumeState};
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, SharedOracle, fetch, lock};
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce_and_compare};

const MIB: u64 = 1 << 20;
const PAUSE: Duration = Duration::from_millis(5);

/// A log that wraps within a second.
fn plan(policy: &str) -> Plan {
    Plan {
        size_mib: 24,
        log_mib: 6,
        overlay_mib: 16,
        policy: format!("ack = \"async\"\ndestage_delay_ms = 20\n{policy}"),
        ..Plan::default()
    }
}

fn copy_of(node: &Node) -> Option<CopyReport> {
    let report = node.report().ok()?;
    report.state.map(|state| state.copy)
}

/// Reads the whole of a replica through one connection, if it lets anybody in and is not cut off
/// meanwhile, and judges it. Returns whether it was read.
fn is_read_as_a_prefix(node: &Node, oracle: &SharedOracle, bytes: u64) -> bool {
    let Ok(mut reader) = node.client() else {
        return false;
    };
    let Ok(image) = fetch(&mut reader, 0, bytes) else {
        return false;
    };
    lock(oracle)
        .check_earlier(&image)
        .unwrap_or_else(|error| panic!("a reader of the replica saw what never was: {error}"));
    true
}

/// Waits until so much was written that the log has wrapped.
fn wrap_log(alpha: &Node, plan: &Plan) {
    let written = || {
        let state = alpha.report().ok().and_then(|report| report.state);
        state.map_or(0, |state| state.written_bytes)
    };
    let (goal, by) = (written() + 2 * plan.log_mib * MIB, Instant::now() + LIMIT);
    while written() < goal {
        assert!(Instant::now() < by, "the load writes too little");
        std::thread::sleep(PAUSE);
    }
}

#[derive(Default)]
struct Seen {
    shadows: u64,
    reads: u64,
    reads_while_shadowing: u64,
    kills: u64,
}

/// One round: the replica is away, by the log path or beyond it, comes back, is read, and may be
/// killed while it catches up.
fn round(
    nodes: (&mut Node, &mut Node),
    (plan, oracle): (&Plan, &SharedOracle),
    random: &mut Random,
    seen: &mut Seen,
) {
    let (alpha, beta) = nodes;
    beta.kill().expect("killed");
    if random.one_in(4) {
        std::thread::sleep(PAUSE);
    } else {
        wrap_log(alpha, plan);
    }
    beta.start().expect("started again");
    let mut kills = random.below(3);
    let mut shadowed = false;
    let by = Instant::now() + LIMIT;
    loop {
        assert!(
            Instant::now() < by,
            "the replica does not catch up: {}",
            beta.last_words()
        );
        let copy = copy_of(beta);
        let shadowing = matches!(copy, Some(CopyReport::Shadowing { .. }));
        let applying = matches!(copy, Some(CopyReport::Applying { .. }));
        shadowed |= shadowing || applying;
        if (shadowing || applying) && kills > 0 && random.one_in(4) {
            kills -= 1;
            seen.kills += 1;
            beta.kill().expect("killed");
            beta.start().expect("started again");
        } else if random.one_in(2) && is_read_as_a_prefix(beta, oracle, plan.size_mib * MIB) {
            seen.reads += 1;
            seen.reads_while_shadowing += u64::from(shadowing);
        }
        let live = |report: &VolumeReport| report.peers.iter().any(|peer| peer.live);
        if copy == Some(CopyReport::Usable) && alpha.report().is_ok_and(|report| live(&report)) {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    seen.shadows += u64::from(shadowed);
}

fn catches_up(rounds: u64, least_shadows: u64) {
    let seed = seed("e2e_shadow");
    let (place, plan) = (folder(), plan(""));
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    let mut seen = Seen::default();
    for _ in 0..rounds {
        let nodes = (&mut alpha, &mut beta);
        round(nodes, (&plan, &oracle), &mut random, &mut seen);
    }
    load.stop().expect("every request was answered");
    beta.wait_for("be usable", LIMIT, is_usable).expect("it is");
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    println!(
        "{rounds} rounds: {} copies through the shadow, {} kills meanwhile, {} whole reads of the \
         replica, {} of them while a shadow was filled",
        seen.shadows, seen.kills, seen.reads, seen.reads_while_shadowing
    );
    assert!(
        seen.shadows >= least_shadows && seen.reads > 0,
        "the shadow was not needed often enough to prove anything"
    );
}

#[test]
fn a_replica_that_fell_behind_the_log_catches_up_and_is_a_prefix_all_the_time() {
    catches_up(times("HN4_SHADOWS", 4), 1);
}

#[test]
#[ignore = "100 rounds; minutes"]
fn a_replica_falls_behind_the_log_a_hundred_times() {
    catches_up(times("HN4_SHADOWS", 100), 50);
}

#[test]
fn a_shadow_that_is_too_small_leaves_the_copy_as_it_was_and_says_how_much_it_needs() {
    let seed = seed("e2e_shadow");
    let (place, plan) = (folder(), plan("shadow_space_mib = 1\n"));
    let (alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    beta.kill().expect("killed");
    wrap_log(&alpha, &plan);
    beta.start().expect("started again");
    // The medium says a moment later that the attempt was given up.
    let needs_space = |report: &VolumeReport| {
        let mut findings = report.findings.iter();
        let says_so =
            findings.any(|found| found.state == "needs-space" && found.cause.contains("MiB"));
        let usable = |state: &VolumeState| state.copy == CopyReport::Usable;
        says_so && report.state.as_ref().is_some_and(usable)
    };
    beta.wait_for("say that it needs space", LIMIT, needs_space)
        .expect("it says so");
    assert!(
        is_read_as_a_prefix(&beta, &oracle, plan.size_mib * MIB),
        "it can still be read"
    );
    load.stop().expect("every request was answered");
}
