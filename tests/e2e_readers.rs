//! Clients of a replica: one epoch for as long as they hold it, a prefix of the history, never a
//! write, and nobody is held up by them.

mod common;

use common::{LIMIT, folder, oracle, running_pair, seed, times};
use hn4_engine::nbd::client::ClientError;
use hn4_engine::nbd::request::NbdErrno;
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, fetch, lock};
use hn4_replicad::quickstart::rig::{Plan, quiesce_and_compare};

fn plan() -> Plan {
    Plan {
        size_mib: 16,
        // What comes while somebody reads must fit.
        log_mib: 256,
        overlay_mib: 192,
        policy: "ack = \"durable\"\nack_peers = 1\ndestage_delay_ms = 20\n".to_owned(),
        ..Plan::default()
    }
}

fn is_read(report: &VolumeReport) -> bool {
    let mut findings = report.findings.iter();
    findings.any(|finding| finding.state == "being-read")
}

#[test]
fn readers_of_a_replica_see_one_epoch_and_it_is_a_prefix() {
    let seed = seed("readers");
    let (place, plan) = (folder(), plan());
    let bytes = plan.size_mib << 20;
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    let (mut moved, mut missing) = (0, 0);
    let mut last = Vec::new();
    for round in 0..times("HN4_READS", 20) {
        load.wait_for_progress(50 + random.below(300), LIMIT)
            .expect("it moves");
        let mut reader = beta.client().expect("a usable replica is served");
        let first = fetch(&mut reader, 0, bytes).expect("it reads");
        load.wait_for_progress(50 + random.below(100), LIMIT)
            .expect("readers hold up nobody");
        let mut other = beta.client().expect("a second reader");
        let second = fetch(&mut other, 0, bytes).expect("it reads");
        assert!(first == second, "round {round}: readers saw two epochs");
        let seen = lock(&oracle)
            .check_earlier(&first)
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
        missing += seen.missing;
        moved += u64::from(first != last);
        last = first;
    }
    assert!(moved > 1, "the replica never moved on between readers");
    load.stop().expect("every request was answered");
    beta.wait_for("be left alone", LIMIT, |report| !is_read(report))
        .expect("the readers are gone");
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    let image = fetch(&mut beta.client().expect("served"), 0, bytes).expect("it reads");
    assert_eq!(
        lock(&oracle).check(&image).expect("all is there").missing,
        0
    );
    println!("{moved} different epochs were read, {missing} writes were still to come");
}

#[test]
fn a_reader_of_a_replica_cannot_write() {
    let place = folder();
    let (_alpha, beta) = running_pair(place.path(), &plan());
    let mut reader = beta.client().expect("a usable replica is served");
    match reader.write(0, &[1; 4096], false) {
        Err(ClientError::Failed { errno, .. }) => assert_eq!(errno, NbdErrno::Perm as u32),
        other => panic!("a write to a replica: {other:?}"),
    }
    reader.read(0, 4096).expect("it still reads");
}

#[test]
fn a_reader_that_stays_is_cut_off_before_it_holds_up_the_primary() {
    let seed = seed("stays");
    let (place, plan) = (
        folder(),
        Plan {
            log_mib: 12,
            overlay_mib: 12,
            ..plan()
        },
    );
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut reader = beta.client().expect("a usable replica is served");
    reader.read(0, 4096).expect("it reads");
    assert!(is_read(&beta.report().expect("a report")));
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    beta.wait_for("cut its reader off", LIMIT, |report| !is_read(report))
        .expect("log and overlay get tight");
    load.wait_for_progress(500, LIMIT).expect("nobody waits");
    assert!(reader.read(0, 4096).is_err(), "the reader was cut off");
    load.stop().expect("every request was answered");
    // Perhaps it is still tight: then the next one waits.
    let mut next = beta.client().expect("let in");
    next.read(0, 4096).expect("it reads");
    drop(next);
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
}
