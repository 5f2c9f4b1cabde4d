//! A backing that answers writes of sweeps as if all were well, and loses them or writes them
//! somewhere else: the block that is missing what was written and the one that was hit are both
//! found, by a deep verify or by reading, and repaired from the other copy. So are blocks that the
//! disk cannot read any more.

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use common::pair::{Medium, Pair};
use common::trees::{deep_verify, has_root, tree};
use common::volatile::Fault;
use common::{LIMIT, seed};
use hn4_engine::nbd::client::Client;
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce, quiesce_and_compare};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 1024;
/// Writes of each kind that go wrong.
const FAULTS: usize = 20;

fn plan() -> Plan {
    Plan {
        size_mib: (BLOCKS * BLOCK) >> 20,
        log_mib: 24,
        overlay_mib: 8,
        policy: "ack = \"async\"\ntree = \"on\"\nverify_reads = \"all\"\n".to_owned(),
        ..Plan::default()
    }
}

fn write_noise(client: &mut Client, block: u64, random: &mut Random) {
    let words = (0..BLOCK / 8).flat_map(|_| random.draw().to_le_bytes());
    let bytes: Vec<u8> = words.collect();
    client.write(block * BLOCK, &bytes, false).expect("written");
}

/// Blocks that are no two alike, in no order.
fn shuffled(random: &mut Random) -> Vec<u64> {
    let mut blocks: Vec<u64> = (0..BLOCKS).collect();
    for at in (1..blocks.len()).rev() {
        let other = random.below(at as u64 + 1);
        blocks.swap(at, usize::try_from(other).expect("small"));
    }
    blocks
}

/// Lets sweeps of a node (0: the primary, 1: the replica) lose writes and misdirect writes. Gives
/// the blocks that then hold something else than they should.
fn write_badly(pair: &mut Pair, node: usize, random: &mut Random) -> BTreeSet<u64> {
    let blocks = shuffled(random);
    let (lost, rest) = blocks.split_at(FAULTS);
    let (missing, rest) = rest.split_at(FAULTS);
    let victims = &rest[..FAULTS];
    for block in lost {
        pair.backing(node).inject(block * BLOCK, Fault::Lost);
    }
    for (block, victim) in missing.iter().zip(victims) {
        let fault = Fault::Misdirected(victim * BLOCK);
        pair.backing(node).inject(block * BLOCK, fault);
    }
    let mut client = pair.alpha.client().expect("a client");
    for block in lost.iter().chain(missing) {
        write_noise(&mut client, *block, random);
    }
    drop(client);
    quiesce(&mut pair.alpha, &mut pair.beta, LIMIT).expect("nobody has noticed");
    assert_eq!(pair.backing(node).waiting_faults(), 0, "all have happened");
    blocks.into_iter().take(3 * FAULTS).collect()
}

/// Reads every block; which ones are refused.
fn refused(node: &Node) -> BTreeSet<u64> {
    let mut client = node.client().expect("a client");
    let mut is_refused = |block: &u64| client.read(block * BLOCK, 4096).is_err();
    (0..BLOCKS).filter(|block| is_refused(block)).collect()
}

fn bad(report: &VolumeReport) -> usize {
    let bad = tree(report).map_or(0, |tree| tree.bad_blocks);
    usize::try_from(bad).expect("few")
}

#[test]
fn lost_and_misdirected_writes_are_found_with_what_they_hit_and_repaired() {
    let mut random = Random::new(seed("misdirected"));
    let Some(mut pair) = Pair::start(&plan(), Medium::Volatile) else {
        return;
    };
    let mut client = pair.alpha.client().expect("a client");
    for block in 0..BLOCKS {
        write_noise(&mut client, block, &mut random);
    }
    drop(client);
    quiesce_and_compare(&mut pair.alpha, &mut pair.beta, LIMIT).expect("equal copies");
    for node in [&mut pair.alpha, &mut pair.beta] {
        node.wait_for("have a root", LIMIT, has_root)
            .expect("a tree");
    }
    let is_repaired = |report: &VolumeReport| {
        let repaired = tree(report).map_or(0, |tree| tree.repaired_blocks);
        bad(report) == 0 && repaired == 3 * FAULTS as u64
    };

    // The replica's, by a deep verify.
    let hit = write_badly(&mut pair, 1, &mut random);
    pair.alpha.kill().expect("killed");
    deep_verify(&mut pair.beta);
    let report = pair.beta.report().expect("a report");
    assert_eq!(bad(&report), hit.len(), "{:?}", tree(&report));
    assert_eq!(refused(&pair.beta), hit, "and they are these");
    pair.alpha.start().expect("it recovers");
    pair.beta
        .wait_for("be repaired", 3 * LIMIT, is_repaired)
        .expect("repaired");
    quiesce_and_compare(&mut pair.alpha, &mut pair.beta, LIMIT).expect("equal copies");

    // The primary's, by reading.
    let hit = write_badly(&mut pair, 0, &mut random);
    pair.beta.kill().expect("killed");
    assert_eq!(refused(&pair.alpha), hit, "none is served");
    pair.alpha
        .wait_for("name them", LIMIT, |report| bad(report) == hit.len())
        .expect("named");
    pair.beta.start().expect("it recovers");
    pair.alpha
        .wait_for("be repaired", 3 * LIMIT, is_repaired)
        .expect("repaired");
    quiesce_and_compare(&mut pair.alpha, &mut pair.beta, LIMIT).expect("equal copies");
}

/// A pair of which every block was written, and the contents.
fn filled(plan: &Plan, random: &mut Random) -> Option<(Pair, Vec<Vec<u8>>)> {
    let mut pair = Pair::start(plan, Medium::Volatile)?;
    let mut client = pair.alpha.client().expect("a client");
    for block in 0..BLOCKS {
        write_noise(&mut client, block, random);
    }
    quiesce_and_compare(&mut pair.alpha, &mut pair.beta, LIMIT).expect("equal copies");
    for node in [&mut pair.alpha, &mut pair.beta] {
        node.wait_for("have a root", LIMIT, has_root)
            .expect("a tree");
    }
    let mut read = |block| client.read(block * BLOCK, 4096).expect("good");
    let contents = (0..BLOCKS).map(&mut read).collect();
    Some((pair, contents))
}

fn is_repaired(report: &VolumeReport, blocks: usize) -> bool {
    let repaired = tree(report).map_or(0, |tree| tree.repaired_blocks);
    bad(report) == 0 && repaired == blocks as u64
}

#[test]
fn blocks_that_cannot_be_read_any_more_are_repaired_from_the_other_copy() {
    let mut random = Random::new(seed("unreadable"));
    let Some((mut pair, contents)) = filled(&plan(), &mut random) else {
        return;
    };
    let mut client = pair.alpha.client().expect("a client");
    let blocks = &shuffled(&mut random)[..FAULTS];

    // Who reads one gets what was written there, a little later.
    for block in blocks {
        pair.backing(0).make_unreadable(block * BLOCK);
    }
    for block in blocks {
        let read = client.read(block * BLOCK, 4096).expect("repaired first");
        assert_eq!(read, contents[usize::try_from(*block).expect("small")]);
    }
    pair.alpha
        .wait_for("be repaired", LIMIT, |report| is_repaired(report, FAULTS))
        .expect("repaired");
    for (block, contents) in (0..BLOCKS).zip(&contents) {
        let read = client.read(block * BLOCK, 4096).expect("good again");
        assert_eq!(&read, contents, "block {block}");
    }

    // And the replica's, which nobody reads, by a deep verify.
    for block in blocks {
        pair.backing(1).make_unreadable(block * BLOCK);
    }
    deep_verify(&mut pair.beta);
    pair.beta
        .wait_for("be repaired", LIMIT, |report| is_repaired(report, FAULTS))
        .expect("repaired");
    quiesce_and_compare(&mut pair.alpha, &mut pair.beta, LIMIT).expect("equal copies");
}

/// Without the policy whoever reads such a block gets an error, and soon afterwards the block.
#[test]
fn blocks_that_cannot_be_read_are_repaired_although_no_read_is_checked() {
    let mut random = Random::new(seed("unreadable, unchecked"));
    let plan = Plan {
        policy: "ack = \"async\"\ntree = \"on\"\n".to_owned(),
        ..plan()
    };
    let Some((mut pair, _)) = filled(&plan, &mut random) else {
        return;
    };
    let mut client = pair.alpha.client().expect("a client");
    let blocks = shuffled(&mut random);
    let (blocks, _) = blocks.split_at(FAULTS);
    for round in 1..=2 {
        for block in blocks {
            pair.backing(0).make_unreadable(block * BLOCK);
        }
        for block in blocks {
            let started = Instant::now();
            // With its neighbour, which is good.
            while client.read(block / 2 * 2 * BLOCK, 8192).is_err() {
                assert!(started.elapsed() < LIMIT, "block {block} is not repaired");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        pair.alpha
            .wait_for("be repaired", LIMIT, |report| {
                is_repaired(report, round * FAULTS)
            })
            .expect("repaired, and no other was taken for damaged");
        // What was looked up then is no longer so.
        for block in 0..BLOCKS {
            write_noise(&mut client, block, &mut random);
        }
        quiesce_and_compare(&mut pair.alpha, &mut pair.beta, LIMIT).expect("equal copies");
    }
}
