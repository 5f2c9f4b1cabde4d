//! SCXQ2 between real daemons, over QUIC and over WebSocket: what compresses costs less on the
//! wire, a first copy as well as what is written later, and `off` on either side means off.

mod common;
#[path = "common/wire.rs"]
mod wire;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::ledger::ledger;
use common::{LIMIT, folder, is_usable, pair, times};
use hn4_proof::ledger::Body;
use hn4_proof::ledger::file::MemoryMedium;
use hn4_proof::ledger::scan::Records;
use hn4_proof::scxq2::DictionaryId;
use hn4_replicad::control::api::CompressionReport;
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce_and_compare};
use wire::Wire;

const MIB: u64 = 1 << 20;
/// Bytes of data that lie on the volume before its first copy is made.
const COPIED: u64 = 4 * MIB;

/// A block as databases have them: rows from a stock that all blocks share, and numbers.
fn block(number: u64) -> Vec<u8> {
    let mut random = Random::new(number);
    let mut text = format!("PAGE {number:08}\n");
    while text.len() < 4096 {
        let (row, town, balance) = (random.draw(), random.below(60), random.below(1 << 30));
        text += &format!("{row:x};customer of town number {town};balance={balance}\n");
    }
    text.truncate(4096);
    text.into_bytes()
}

fn fill(backing: &Path, bytes: u64) {
    let file = File::options().write(true).open(backing);
    let file = file.expect("a backing");
    for number in 0..bytes / 4096 {
        file.write_all_at(&block(number), number * 4096)
            .expect("written");
    }
    file.sync_all().expect("flushed");
}

/// Sets the switch of the only peer of a node that does not run.
fn switch(node: &Node, scxq2: &str) {
    let text = std::fs::read_to_string(node.config()).expect("a configuration");
    std::fs::write(node.config(), format!("{text}scxq2 = \"{scxq2}\"\n")).expect("written");
}

/// What one run cost.
struct Cost {
    copy: u64,
    writes: u64,
    reports: [Option<CompressionReport>; 2],
}

fn compression(node: &Node) -> Option<CompressionReport> {
    let mut report = node.report().expect("a report");
    report.peers.remove(0).compression
}

/// The dictionary that the last anchor in a node's ledger names.
fn last_anchor(node: &Node) -> Option<String> {
    let medium = MemoryMedium {
        bytes: ledger(node),
        aside: Vec::new(),
    };
    let mut records = Records::new(&medium).expect("a ledger");
    let mut dictionary = None;
    // It ends where the daemon is appending.
    while let Some(Ok(record)) = records.next_record().expect("bytes in memory") {
        if let Body::Anchor(signed) = record.body {
            dictionary = signed.anchor.dictionary;
        }
    }
    dictionary.map(|id| DictionaryId(id).to_string())
}

/// A first copy, then writes that are flushed one by one. Gives the bytes on the wire, both ways.
fn replicate(transport: &'static str, switches: [&str; 2]) -> Cost {
    let place = folder();
    let plan = Plan {
        size_mib: 16,
        transport,
        ..Plan::default()
    };
    let (mut alpha, mut beta) = pair(place.path(), &plan);
    fill(&alpha.backing(), COPIED);
    for (node, scxq2) in [&alpha, &beta].into_iter().zip(switches) {
        switch(node, scxq2);
    }
    let wire = Wire::from(&alpha, transport);
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    beta.wait_for("have a full copy", LIMIT, is_usable)
        .expect("beta is seeded");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let copy = wire.passed();
    let mut client = alpha.client().expect("a client");
    for number in 0..200 {
        let at = 8 * MIB + number * 4096 * 3;
        let data = [block(number + 7777), block(number + 8888)].concat();
        client.write(at, &data, false).expect("written");
        client.flush().expect("durable on both");
    }
    let writes = wire.passed() - copy;
    if switches == ["on", "on"] {
        // It is trained beside everything else, and goes along with what is written next.
        let started = Instant::now();
        while compression(&alpha).is_none_or(|report| report.dictionary_id.is_none()) {
            assert!(started.elapsed() < LIMIT, "no dictionary");
            client.write(0, &block(1), false).expect("written");
            client.flush().expect("durable on both");
        }
    }
    let reports = [&alpha, &beta].map(compression);
    let dictionary = reports[0].as_ref().and_then(|it| it.dictionary_id.clone());
    if let Some(dictionary) = &dictionary {
        // Batches that are signed from now on name it.
        let started = Instant::now();
        while last_anchor(&alpha).as_ref() != Some(dictionary) {
            assert!(started.elapsed() < LIMIT, "no anchor names {dictionary}");
            client.write(0, &block(2), false).expect("written");
            client.flush().expect("durable on both");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    println!("{transport} {switches:?}: copy {copy} bytes, writes {writes} bytes");
    Cost {
        copy,
        writes,
        reports,
    }
}

fn saves(transport: &'static str) {
    let on = replicate(transport, ["on", "on"]);
    let [sender, receiver] = on.reports.map(|report| report.expect("agreed on"));
    println!("{sender:?}");
    assert!(sender.saved_bytes() > COPIED / 3, "{sender:?}");
    assert!(sender.ratio_percent > 150, "{sender:?}");
    assert!(sender.dictionary_id.is_some(), "of the first 100 messages");
    assert_eq!(sender.dictionary_id, receiver.peer_dictionary_id);
    assert_eq!(receiver.received_raw_bytes, sender.sent_raw_bytes);
    for switches in [["on", "off"], ["off", "on"]] {
        let off = replicate(transport, switches);
        assert_eq!(off.reports, [None, None], "{switches:?}");
        assert!(
            on.copy * 3 < off.copy * 2,
            "{} against {}",
            on.copy,
            off.copy
        );
        let (packed, raw) = (on.writes, off.writes);
        assert!(packed * 3 < raw * 2, "{packed} against {raw}");
    }
}

#[test]
fn over_quic_data_that_compresses_costs_less_and_off_is_off() {
    saves("quic");
}

#[test]
fn over_websocket_data_that_compresses_costs_less_and_off_is_off() {
    saves("wss");
}

/// Processor time of a process so far.
fn cpu(node: &Node) -> Duration {
    let id = node.pid().expect("it runs");
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).expect("a process");
    let (_, rest) = stat.rsplit_once(')').expect("a name");
    let mut ticks = rest.split_whitespace().skip(11).take(2);
    let mut next = || ticks.next().and_then(|text| text.parse::<u64>().ok());
    let sum = next().expect("user time") + next().expect("system time");
    Duration::from_millis(sum * 10)
}

/// What a first copy costs in time, in processor time of both daemons and on the wire, on against
/// off, taken in turns. `HN4_IMAGE` is the data, or there is text; `HN4_MIB_S` limits the line.
#[test]
#[ignore = "a measurement: minutes, run with --release on a quiet machine"]
fn what_compression_costs_a_catch_up() {
    let image = std::env::var("HN4_IMAGE").ok();
    let size_mib = times("HN4_SIZE_MIB", 256);
    let rate = times("HN4_MIB_S", 0) << 20;
    for round in 0..times("HN4_ROUNDS", 3) {
        for transport in ["quic", "wss"] {
            for scxq2 in ["off", "on"] {
                let place = folder();
                let plan = Plan {
                    size_mib,
                    transport,
                    policy: String::new(),
                    ..Plan::default()
                };
                let (mut alpha, mut beta) = pair(place.path(), &plan);
                match &image {
                    Some(image) => {
                        let mut from = File::open(image).expect("an image");
                        let backing = File::options().write(true).open(alpha.backing());
                        let mut to = backing.expect("a backing");
                        std::io::copy(&mut from, &mut to).expect("copied");
                        to.sync_all().expect("flushed");
                    }
                    None => fill(&alpha.backing(), size_mib << 20),
                }
                [&alpha, &beta].iter().for_each(|node| switch(node, scxq2));
                let wire = (rate > 0).then(|| Wire::from(&alpha, transport));
                wire.iter().for_each(|wire| wire.limit(rate));
                alpha.start().expect("alpha serves");
                let started = Instant::now();
                beta.start().expect("beta runs");
                beta.wait_for("have a full copy", LIMIT * 10, is_usable)
                    .expect("beta is seeded");
                let took = started.elapsed();
                println!(
                    "round {round} {transport} scxq2 {scxq2}: {:.2} s, {:.0} MiB/s, {} MiB saved, \
                     processor time alpha {:.2} s, beta {:.2} s",
                    took.as_secs_f64(),
                    size_mib as f64 / took.as_secs_f64(),
                    compression(&alpha).map_or(0, |report| report.saved_bytes() / MIB),
                    cpu(&alpha).as_secs_f64(),
                    cpu(&beta).as_secs_f64(),
                );
            }
        }
    }
}
