//! `verify_reads` with real daemons and clients (P4): bits of the raw backing are flipped while it
//! is in use. With `all` no client ever sees one, with `sample` they are found by reading, and a
//! volume under full load gives no false alarm.

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::trees::tree;
use common::{LIMIT, folder, oracle, running_pair, seed, single, succeed, tool};
use hn4_engine::nbd::client::Client;
use hn4_replicad::control::api::{ReadsReport, VolumeReport};
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check};
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce_and_compare};

const SIZE_MIB: u64 = 16;
const BLOCKS: u64 = SIZE_MIB << 8;
/// Places at which a bit is flipped.
const PLACES: usize = 200;

fn plan(verify_reads: &str) -> Plan {
    Plan {
        size_mib: SIZE_MIB,
        log_mib: 32,
        overlay_mib: 16,
        policy: format!("ack = \"async\"\ntree = \"on\"\nverify_reads = \"{verify_reads}\"\n"),
        ..Plan::default()
    }
}

/// A node without peers.
fn alone(folder: &Path, verify_reads: &str, more: &str) -> Node {
    let node = single(folder, plan(verify_reads));
    let lines = format!("[[volume]]\ntree = \"on\"\nverify_reads = \"{verify_reads}\"\n{more}");
    let text = std::fs::read_to_string(node.config()).expect("a configuration");
    std::fs::write(node.config(), text.replacen("[[volume]]\n", &lines, 1)).expect("edited");
    node
}

fn reads(report: &VolumeReport) -> ReadsReport {
    let reads = tree(report).and_then(|tree| tree.reads.clone());
    reads.expect("reads are compared")
}

fn is_built(report: &VolumeReport) -> bool {
    tree(report).is_some_and(|tree| tree.root.is_some() && tree.built_bytes.is_none())
}

/// What a block holds before anything is flipped.
fn contents(block: u64) -> Vec<u8> {
    let mut random = Random::new(block + 1);
    let words = (0..512).map(|_| random.draw().to_le_bytes());
    words.flatten().collect()
}

fn image() -> Vec<u8> {
    (0..BLOCKS).flat_map(contents).collect()
}

fn fill(client: &mut Client) {
    for (piece, bytes) in image().chunks(256 << 10).enumerate() {
        let at = piece as u64 * (256 << 10);
        client.write(at, bytes, false).expect("written");
    }
    client.flush().expect("flushed");
}

fn places(random: &mut Random) -> BTreeSet<u64> {
    let mut places = BTreeSet::new();
    while places.len() < PLACES {
        places.insert(random.below(BLOCKS));
    }
    places
}

/// Flips one bit in each of these blocks behind the daemon's back.
fn flip(path: &Path, blocks: &BTreeSet<u64>, random: &mut Random) {
    let file = File::options().read(true).write(true).open(path);
    let file = file.expect("a backing");
    for block in blocks {
        let (at, bit) = (block * 4096 + random.below(4096), random.below(8));
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ (1 << bit)], at)
            .expect("written");
    }
    file.sync_all().expect("flushed");
}

/// Reads all blocks, one by one; which of them failed. None is wrong.
fn read_all(client: &mut Client) -> BTreeSet<u64> {
    let mut failed = BTreeSet::new();
    for block in 0..BLOCKS {
        match client.read(block * 4096, 4096) {
            Ok(read) => assert!(read == contents(block), "block {block} is served damaged"),
            Err(error) => {
                assert!(error.to_string().contains("error 5 "), "{error}");
                failed.insert(block);
            }
        }
    }
    failed
}

/// Copies the export with a client that others wrote.
fn copied(node: &Node, place: &Path) -> Option<Vec<u8>> {
    let target = place.join("copied");
    succeed(tool("nbdcopy")?.arg(node.uri()).arg(&target));
    Some(std::fs::read(target).expect("the copy"))
}

#[test]
fn with_all_no_flipped_bit_is_ever_served_and_a_peer_repairs_it() {
    let mut random = Random::new(seed("verify all"));
    let place = folder();
    let (mut alpha, mut beta) = running_pair(place.path(), &plan("all"));
    fill(&mut alpha.client().expect("a client"));
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    alpha
        .wait_for("have a tree", LIMIT, is_built)
        .expect("built");
    beta.kill().expect("killed");

    // Nobody has a good copy.
    let flipped = places(&mut random);
    flip(&alpha.backing(), &flipped, &mut random);
    let mut client = alpha.client().expect("a client");
    // A part of a block is as bad as all of it.
    let first = flipped.first().expect("many") * 4096;
    client.read(first + 512, 512).expect_err("it is damaged");
    assert_eq!(read_all(&mut client), flipped);
    let told = alpha.wait_for("say so", LIMIT, |report| {
        let named = tree(report).is_some_and(|tree| tree.bad_blocks == PLACES as u64);
        named && reads(report).bad_blocks == PLACES as u64
    });
    told.expect("all are named and counted");

    // A peer has, and is asked for a few of them every five seconds.
    beta.start().expect("it recovers");
    let repaired = |times: u64| {
        move |report: &VolumeReport| {
            let all = times * PLACES as u64;
            tree(report).is_some_and(|tree| (tree.bad_blocks, tree.repaired_blocks) == (0, all))
        }
    };
    alpha
        .wait_for("be repaired", 3 * LIMIT, repaired(1))
        .expect("repaired");
    assert_eq!(read_all(&mut client), BTreeSet::new());

    // With a peer that is there nobody notices.
    flip(&alpha.backing(), &places(&mut random), &mut random);
    if let Some(copy) = copied(&alpha, place.path()) {
        assert!(copy == image(), "nbdcopy got something else");
    }
    assert_eq!(read_all(&mut client), BTreeSet::new());
    alpha
        .wait_for("be repaired", LIMIT, repaired(2))
        .expect("repaired");

    // The same for who reads the replica.
    flip(&beta.backing(), &places(&mut random), &mut random);
    let mut reader = beta.client().expect("it can be read");
    assert_eq!(read_all(&mut reader), BTreeSet::new());
    beta.wait_for("be repaired", LIMIT, repaired(1))
        .expect("repaired");
    drop(reader);
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
}

#[test]
fn with_sample_damage_is_found_by_reading_the_volume_a_few_times() {
    let mut random = Random::new(seed("verify sample"));
    let place = folder();
    let mut node = alone(place.path(), "sample", "");
    node.start().expect("it serves");
    let mut client = node.client().expect("a client");
    fill(&mut client);
    node.drain().expect("drained");
    node.wait_for("have a tree", LIMIT, is_built)
        .expect("built");
    let flipped = places(&mut random);
    flip(&node.backing(), &flipped, &mut random);
    for _ in 0..4 {
        for piece in 0..SIZE_MIB * 16 {
            // What was found already is refused.
            let _ = client.read(piece << 16, 64 << 10);
        }
    }
    node.wait_for("find some", LIMIT, |report| {
        let told = report.findings.iter().any(|it| it.state == "damaged");
        told && reads(report).bad_blocks > 0
    })
    .expect("found");
    let report = node.report().expect("a report");
    let (found, counts) = (tree(&report).expect("a tree").bad_blocks, reads(&report));
    assert_eq!(counts.policy, "sample");
    assert_eq!(found, counts.bad_blocks, "each once: {counts:?}");
    assert!(counts.checked_blocks > counts.bad_blocks, "{counts:?}");
}

#[test]
fn under_full_load_no_alarm_is_false() {
    let seed = seed("verify load");
    let place = folder();
    // Sweeps all the time.
    let mut node = alone(
        place.path(),
        "all",
        "destage_delay_ms = 0\nlog_age_ms = 10\n",
    );
    node.start().expect("it serves");
    let oracle = oracle(seed, &plan("all"));
    let load = Load::start(&node, &oracle, LoadPlan::mixed(seed)).expect("started");
    load.wait_for_progress(5000, LIMIT).expect("it is served");
    load.stop().expect("no error");
    check(&node, &oracle, 0).expect("it holds what was written");
    for block_sizes in ["4k-4k", "512-64k"] {
        let Some(mut fio) = tool("fio") else { break };
        succeed(
            fio.current_dir(place.path())
                .args([
                    "--name=mixed",
                    "--ioengine=nbd",
                    "--rw=randrw",
                    "--iodepth=32",
                ])
                .args(["--blockalign=512", "--norandommap", "--randrepeat=0"])
                .args(["--time_based", "--runtime=10", "--size=16m"])
                .arg(format!("--bsrange={block_sizes}"))
                .arg(format!("--uri={}", node.uri())),
        );
    }
    node.drain().expect("drained");
    let mut client = node.client().expect("a client");
    client.read(0, 1 << 20).expect("it is good");
    node.wait_for("have counted", LIMIT, |report| {
        reads(report).checked_blocks > 1000
    })
    .expect("counted");
    let report = node.report().expect("a report");
    let counts = reads(&report);
    println!("{counts:?}");
    assert_eq!(counts.bad_blocks, 0, "{counts:?}");
    assert_eq!(tree(&report).map(|tree| tree.bad_blocks), Some(0));
}

#[test]
fn what_the_tree_does_not_know_yet_is_served_unchecked_and_counted() {
    let place = folder();
    let mut node = alone(place.path(), "all", "scan_mib_per_s = 1\n");
    std::fs::write(node.backing(), image()).expect("a backing");
    node.start().expect("it serves");
    let mut client = node.client().expect("a client");
    let read = client.read(7 * 4096, 8192).expect("it is served");
    assert!(read == [contents(7), contents(8)].concat());
    node.wait_for("count them", LIMIT, |report| {
        let counts = reads(report);
        (counts.checked_blocks, counts.unchecked_blocks) == (0, 2)
    })
    .expect("counted");
}
