//! A flush that fails is never taken for one that succeeded, and never tried again (P5): the volume
//! fails closed, says why, and goes on reading; after a power cut and a start it has what was
//! flushed.
//!
//! The disk does what Linux does: what it could not write is dropped, reads still see it, and the
//! next flush says that all is well.

mod common;

use common::pair::{Medium, Pair};
use common::{LIMIT, seed};
use hn4_engine::nbd::client::Client;
use hn4_replicad::control::Request;
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Plan, VOLUME, quiesce_and_compare};

const BLOCK: u64 = 4096;

fn start() -> Option<Pair> {
    let plan = Plan {
        size_mib: 4,
        log_mib: 16,
        overlay_mib: 8,
        policy: "ack = \"async\"\n".to_owned(),
        ..Plan::default()
    };
    Pair::start(&plan, Medium::Volatile)
}

fn write(client: &mut Client, block: u64, byte: u8) -> Result<(), String> {
    let bytes = [byte; 4096];
    let written = client.write(block * BLOCK, &bytes, false);
    written.map_err(|error| error.to_string())
}

fn read(client: &mut Client, block: u64) -> u8 {
    let read = client.read(block * BLOCK, 4096).expect("reads go on");
    assert!(read.iter().all(|byte| *byte == read[0]));
    read[0]
}

/// Whether the status names the device, what failed, and what to do.
fn says_why(report: &VolumeReport, why: &str) -> bool {
    let mut findings = report.findings.iter();
    findings.any(|finding| {
        let named = finding.state == "failed-closed" && finding.cause.contains(why);
        named && finding.cause.contains("os error 5") && !finding.next.is_empty()
    })
}

/// Nothing is written any more, reads go on, and it is told.
fn is_closed(pair: &mut Pair, client: &mut Client, why: &str) {
    let told = |report: &VolumeReport| says_why(report, why);
    if let Err(error) = pair.alpha.wait_for("say why", LIMIT, told) {
        panic!("{error:#}\n{:#?}", pair.alpha.report());
    }
    let refused = write(client, 9, 9).expect_err("it would never be durable");
    assert!(refused.contains("error 5 "), "{refused}");
    let flush = client.flush().expect_err("nor may this one say so");
    assert!(flush.to_string().contains("error 5 "), "{flush}");
    let mut another = pair.alpha.client().expect("a client that comes now");
    for (block, byte) in [(1, 1), (2, 2)] {
        assert_eq!(read(client, block), byte);
        assert_eq!(read(&mut another, block), byte);
    }
    write(&mut another, 9, 9).expect_err("its export is read-only");
    let flush = Request::Flush {
        volume: VOLUME.to_owned(),
    };
    pair.alpha.ask(&flush).expect_err("it failed closed");
}

/// After a power cut everything that was flushed is there, and it goes on as if nothing had been.
fn comes_back(pair: &mut Pair, random: &mut Random) {
    pair.cut_alpha(random);
    pair.alpha.start().expect("it recovers");
    let mut client = pair.alpha.client().expect("a client");
    assert_eq!(read(&mut client, 1), 1, "it was flushed");
    write(&mut client, 3, 3).expect("served");
    client.flush().expect("and durable");
    pair.alpha.wait_for_peer(LIMIT).expect("beta follows");
    quiesce_and_compare(&mut pair.alpha, &mut pair.beta, LIMIT).expect("equal copies");
    assert_eq!(read(&mut client, 3), 3);
}

#[test]
fn a_log_whose_flush_fails_closes_the_volume_and_what_was_flushed_stays() {
    let mut random = Random::new(seed("fail closed"));
    let Some(mut pair) = start() else { return };
    let mut client = pair.alpha.client().expect("a client");
    write(&mut client, 1, 1).expect("written");
    client.flush().expect("durable");
    pair.log(0).fail_a_flush();
    write(&mut client, 2, 2).expect("only in memory");
    let flush = client.flush().expect_err("it is not durable");
    assert!(flush.to_string().contains("error 5 "), "{flush}");
    assert_eq!(
        pair.log(0).failing_flushes(),
        0,
        "the next one would say yes"
    );
    is_closed(&mut pair, &mut client, "writing an epoch failed on the log");
    comes_back(&mut pair, &mut random);
}

#[test]
fn a_backing_whose_flush_fails_closes_the_volume_and_nothing_is_lost() {
    let mut random = Random::new(seed("fail closed"));
    let Some(mut pair) = start() else { return };
    let mut client = pair.alpha.client().expect("a client");
    for block in [1, 2] {
        write(&mut client, block, u8::try_from(block).expect("small")).expect("written");
    }
    client.flush().expect("durable in the log");
    pair.backing(0).fail_a_flush();
    pair.alpha.drain().expect_err("it cannot be written back");
    assert_eq!(
        pair.backing(0).failing_flushes(),
        0,
        "the next one would say yes"
    );
    is_closed(&mut pair, &mut client, "failed on the backing");
    comes_back(&mut pair, &mut random);
    let mut client = pair.alpha.client().expect("a client");
    assert_eq!(read(&mut client, 2), 2, "the log had it");
}
