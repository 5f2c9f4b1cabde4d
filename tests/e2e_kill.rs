//! P1, P2 and P3 with real daemons that are lost at random moments under load, TRIMs in it.
//!
//! SIGKILL leaves the page cache and the disks' caches alive, so on disks with a volatile cache
//! half of the losses are power cuts ([`common::pair`]).

mod common;

use std::time::{Duration, Instant};

use common::pair::{Medium, Pair};
use common::{LIMIT, folder, look_at_copy, oracle, running_pair, seed, times};
use hn4_replicad::control::Request;
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, quiesce_and_compare};

fn plan() -> Plan {
    Plan {
        size_mib: 24,
        log_mib: 32,
        overlay_mib: 16,
        ..Plan::default()
    }
}

/// A load that the medium can take.
fn load_plan(seed: u64, medium: Medium) -> LoadPlan {
    let mut plan = LoadPlan::mixed(seed);
    if medium == Medium::Volatile {
        // FUSE takes direct transfers of whole pages only.
        plan.align = 8;
    }
    plan
}

/// Lets a load run for a random while.
fn let_run(load: &Load, random: &mut Random, nodes: [&Node; 2]) {
    // Long enough for a machine that does ten other things.
    if let Err(error) = load.wait_for_progress(200 + random.below(3000), 5 * LIMIT) {
        panic!(
            "{error:#}\n{:#?}\n{:#?}",
            nodes[0].report(),
            nodes[1].report()
        );
    }
}

#[test]
fn a_primary_lost_at_any_moment_loses_no_flushed_write_and_stays_a_prefix() {
    primary_losses(times("HN4_KILLS", 20), Medium::Volatile);
}

#[test]
fn a_primary_killed_on_files_loses_no_flushed_write_and_stays_a_prefix() {
    primary_losses(times("HN4_KILLS", 10), Medium::Files);
}

#[test]
fn a_primary_killed_on_loop_devices_loses_no_flushed_write_and_stays_a_prefix() {
    primary_losses(times("HN4_KILLS", 10), Medium::Loops);
}

#[test]
#[ignore = "the long run: 200 losses take many minutes"]
fn a_primary_lost_200_times_loses_no_flushed_write() {
    primary_losses(200, Medium::Volatile);
}

/// A volume that three threads serve, with four lanes.
fn threaded() -> Plan {
    let mut plan = Plan { lanes: 4, ..plan() };
    plan.policy.push_str("threads = 3\n");
    plan
}

#[test]
fn with_four_lanes_and_three_threads_a_lost_primary_loses_no_flushed_write() {
    losses_of_a_primary(&threaded(), times("HN4_KILLS", 10), Medium::Volatile);
}

#[test]
fn with_four_lanes_and_three_threads_copies_on_loop_devices_are_equal() {
    losses_of_a_primary(&threaded(), times("HN4_KILLS", 4), Medium::Loops);
}

fn primary_losses(losses: u64, medium: Medium) {
    losses_of_a_primary(&plan(), losses, medium);
}

fn losses_of_a_primary(plan: &Plan, losses: u64, medium: Medium) {
    let seed = seed("primary");
    let Some(mut pair) = Pair::start(plan, medium) else {
        return;
    };
    let oracle = oracle(seed, plan);
    let mut random = Random::new(seed);
    let mut slowest = Duration::ZERO;
    for loss in 0..losses {
        let load_plan = load_plan(seed + loss, medium);
        let load = Load::start(&pair.alpha, &oracle, load_plan).expect("started");
        let_run(&load, &mut random, [&pair.alpha, &pair.beta]);
        pair.lose_alpha(&mut random);
        load.was_cut().expect("no request was refused");
        let started = Instant::now();
        pair.alpha
            .start()
            .unwrap_or_else(|error| panic!("seed {seed}, loss {loss}: {error:#}"));
        pair.alpha
            .client()
            .expect("it serves")
            .read(0, 4096)
            .expect("it reads");
        slowest = slowest.max(started.elapsed());
        let seen = check(&pair.alpha, &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, loss {loss}: {error:#}"));
        // Two nodes had every answered write; one of them has been lost, and it asks the other.
        assert_eq!(
            seen.missing_completed, 0,
            "seed {seed}, loss {loss}: answered writes are gone"
        );
        lock(&oracle).settle(&seen);
    }
    let hash = quiesce_and_compare(&mut pair.alpha, &mut pair.beta, LIMIT).expect("equal copies");
    check(&pair.alpha, &oracle, 0).expect("and they hold what was written");
    let (counts, cuts) = (lock(&oracle).counts(), pair.cuts);
    println!("{medium:?}: {losses} losses of the primary, {cuts} of them power cuts: {counts:?}");
    println!("0 lost, slowest recovery {slowest:?}; both backings: {hash}");
    // On an idle machine it is less than a second; this one may be anything but idle.
    assert!(
        slowest < Duration::from_secs(30),
        "recovery took {slowest:?}"
    );
}

#[test]
fn a_replica_lost_at_any_moment_has_every_flushed_write_and_is_a_prefix() {
    replica_losses(times("HN4_KILLS", 20), Medium::Volatile);
}

#[test]
fn a_replica_killed_on_files_has_every_flushed_write_and_is_a_prefix() {
    replica_losses(times("HN4_KILLS", 5), Medium::Files);
}

#[test]
fn a_replica_killed_on_loop_devices_has_every_flushed_write_and_is_a_prefix() {
    replica_losses(times("HN4_KILLS", 10), Medium::Loops);
}

#[test]
#[ignore = "the long run: 200 losses take many minutes"]
fn a_replica_lost_200_times_has_every_flushed_write() {
    replica_losses(200, Medium::Volatile);
}

fn replica_losses(losses: u64, medium: Medium) {
    let seed = seed("replica");
    // The end of a process is noticed at once over WebSocket, and after 8 s over QUIC.
    let transport = match medium {
        Medium::Files => "quic",
        Medium::Loops | Medium::Volatile => "wss",
    };
    let plan = Plan {
        transport,
        ..plan()
    };
    let Some(mut pair) = Pair::start(&plan, medium) else {
        return;
    };
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    let (mut slowest, mut missing) = (Duration::ZERO, 0);
    let load = Load::start(&pair.alpha, &oracle, load_plan(seed, medium)).expect("started");
    for loss in 0..losses {
        let_run(&load, &mut random, [&pair.alpha, &pair.beta]);
        pair.lose_beta(&mut random);
        // Once the primary knows, no answer is on its way any more that the oracle could miss.
        pair.alpha
            .wait_for("notice", LIMIT, |report| {
                report.peers.iter().all(|peer| !peer.connected)
            })
            .expect("it notices");
        missing += look_at_copy(&pair.beta, pair.place.path(), &oracle).missing;
        let started = Instant::now();
        pair.beta
            .start()
            .unwrap_or_else(|error| panic!("seed {seed}, loss {loss}: {error:#}"));
        pair.alpha.wait_for_peer(LIMIT).expect("it follows again");
        slowest = slowest.max(started.elapsed());
    }
    let_run(&load, &mut random, [&pair.alpha, &pair.beta]);
    load.stop().expect("every request was answered");
    let hash = quiesce_and_compare(&mut pair.alpha, &mut pair.beta, LIMIT).expect("equal copies");
    let seen = check(&pair.alpha, &oracle, 0).expect("they hold what was written");
    assert_eq!(seen.missing, 0, "the primary never stopped");
    let (counts, cuts) = (lock(&oracle).counts(), pair.cuts);
    println!("{medium:?}: {losses} losses of the replica, {cuts} of them power cuts: {counts:?}");
    println!("0 lost, slowest return {slowest:?}; both backings: {hash}");
    println!("{missing} unflushed writes were not there yet");
}

#[test]
fn a_promoted_replica_has_every_answered_write() {
    let seed = seed("failover");
    for round in 0..times("HN4_FAILOVERS", 4) {
        let (place, plan) = (folder(), plan());
        let (mut alpha, beta) = running_pair(place.path(), &plan);
        let oracle = oracle(seed, &plan);
        let mut random = Random::new(seed + round);
        let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed + round)).expect("started");
        let_run(&load, &mut random, [&alpha, &beta]);
        alpha.kill().expect("killed");
        load.was_cut().expect("no request was refused");
        let started = Instant::now();
        let promote = Request::Promote {
            volume: VOLUME.to_owned(),
            accept_loss: false,
        };
        beta.ask(&promote)
            .expect("nothing acknowledged can be missing, so it is promoted");
        let state = beta.report().expect("a report").state.expect("open");
        assert_eq!(state.role, "primary");
        let seen = check(&beta, &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error:#}"));
        assert_eq!(seen.missing_completed, 0, "seed {seed}, round {round}");
        println!(
            "promoted and checked in {:?}, {} not there",
            started.elapsed(),
            seen.missing
        );
    }
}

#[test]
fn with_ack_async_a_killed_primary_keeps_what_was_flushed_on_it() {
    let seed = seed("async");
    let policy = "ack = \"async\"\n".to_owned();
    let (place, plan) = (
        folder(),
        Plan {
            policy,
            transport: "wss",
            // What the replica lacks must not fall out of the log.
            log_mib: 160,
            ..plan()
        },
    );
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    for kill in 0..5 {
        let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed + kill)).expect("started");
        let_run(&load, &mut random, [&alpha, &beta]);
        alpha.kill().expect("killed");
        load.was_cut().expect("no request was refused");
        alpha.start().expect("it recovers");
        let seen = check(&alpha, &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, kill {kill}: {error:#}"));
        lock(&oracle).settle(&seen);
        alpha
            .wait_for_peer(LIMIT)
            .expect("the replica follows again");
    }
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies, over WebSocket too");
}

#[test]
fn a_stop_in_order_leaves_everything_in_the_backing() {
    let seed = seed("stop");
    let (place, plan) = (folder(), plan());
    let mut alpha = common::single(place.path(), plan.clone());
    alpha.start().expect("it serves");
    let oracle = oracle(seed, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    load.wait_for_progress(3000, LIMIT).expect("it moves");
    load.stop().expect("answered");
    alpha.stop(LIMIT).expect("it ends in order");
    let image = std::fs::read(alpha.backing()).expect("the backing");
    let seen = lock(&oracle)
        .check(&image)
        .expect("the backing alone is the volume");
    assert_eq!(seen.missing, 0);
    let state = alpha.start().expect("it opens again");
    assert_eq!(
        state.recovery.replayed_epochs, 0,
        "there was nothing to recover"
    );
}
