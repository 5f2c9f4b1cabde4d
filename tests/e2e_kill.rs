//! P1, P2 and P3 with real daemons that are killed at random moments under load.
//!
//! SIGKILL leaves the page cache alive; `e2e_power` cuts the power of the disk instead.

mod common;

use std::time::{Duration, Instant};

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

/// Lets a load run for a random while.
fn let_run(load: &Load, random: &mut Random, nodes: [&Node; 2]) {
    if let Err(error) = load.wait_for_progress(200 + random.below(3000), LIMIT) {
        panic!(
            "{error:#}\n{:#?}\n{:#?}",
            nodes[0].report(),
            nodes[1].report()
        );
    }
}

#[test]
fn a_primary_killed_at_any_moment_loses_no_flushed_write_and_stays_a_prefix() {
    primary_kills(times("HN4_KILLS", 20));
}

#[test]
#[ignore = "the long run: 200 kills take many minutes"]
fn a_primary_killed_200_times_loses_no_flushed_write() {
    primary_kills(200);
}

fn primary_kills(kills: u64) {
    let seed = seed("primary");
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    let mut slowest = Duration::ZERO;
    for kill in 0..kills {
        let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed + kill)).expect("started");
        let_run(&load, &mut random, [&alpha, &beta]);
        alpha.kill().expect("killed");
        load.was_cut().expect("no request was refused");
        let started = Instant::now();
        alpha.start().expect("it recovers");
        alpha
            .client()
            .expect("it serves")
            .read(0, 512)
            .expect("it reads");
        slowest = slowest.max(started.elapsed());
        let seen = check(&alpha, &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, kill {kill}: {error:#}"));
        // Two nodes had every answered write; one of them has been killed.
        assert_eq!(
            seen.missing_completed, 0,
            "seed {seed}, kill {kill}: answered writes are gone"
        );
        lock(&oracle).settle(&seen);
    }
    let hash = quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    check(&alpha, &oracle, 0).expect("and they hold what was written");
    let counts = lock(&oracle).counts();
    println!("{kills} kills of the primary: {counts:?}, 0 lost, slowest recovery {slowest:?}");
    println!("both backings: {hash}");
    assert!(
        slowest < Duration::from_secs(5),
        "recovery took {slowest:?}"
    );
}

#[test]
fn a_replica_killed_at_any_moment_has_every_flushed_write_and_is_a_prefix() {
    replica_kills(times("HN4_KILLS", 20));
}

#[test]
#[ignore = "the long run: 200 kills take many minutes"]
fn a_replica_killed_200_times_has_every_flushed_write() {
    replica_kills(200);
}

fn replica_kills(kills: u64) {
    let seed = seed("replica");
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    let (mut slowest, mut missing) = (Duration::ZERO, 0);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    for kill in 0..kills {
        let_run(&load, &mut random, [&alpha, &beta]);
        beta.kill().expect("killed");
        // Once the primary knows, no answer is on its way any more that the oracle could miss.
        alpha
            .wait_for("notice", LIMIT, |report| {
                report.peers.iter().all(|peer| !peer.connected)
            })
            .expect("it notices");
        missing += look_at_copy(&beta, place.path(), &oracle).missing;
        let started = Instant::now();
        beta.start()
            .unwrap_or_else(|error| panic!("seed {seed}, kill {kill}: {error:#}"));
        alpha.wait_for_peer(LIMIT).expect("it follows again");
        slowest = slowest.max(started.elapsed());
    }
    let_run(&load, &mut random, [&alpha, &beta]);
    load.stop().expect("every request was answered");
    let hash = quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    let seen = check(&alpha, &oracle, 0).expect("they hold what was written");
    assert_eq!(seen.missing, 0, "the primary never stopped");
    let counts = lock(&oracle).counts();
    println!("{kills} kills of the replica: {counts:?}, 0 lost, slowest return {slowest:?}");
    println!("{missing} unflushed writes were not there yet; both backings: {hash}");
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
