//! One bit is flipped anywhere, again and again, and something names it each time: in the log, in a
//! ledger, in the files of a state tree, in a backing, on the line between two nodes. What has a
//! good copy somewhere is repaired, and the daemons go on.

mod common;
#[path = "common/wire.rs"]
mod wire;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::ledger::{ctl, ledger_folder, public_key, state_dir};
use common::trees::{deep_verify, has_root, tree};
use common::{LIMIT, folder, pair, running_pair, seed, single, text};
use hn4::log::frame::HEADER_BYTES;
use hn4::log::{FrameHeader, LogHeader, RING_START};
use hn4_replicad::control::Request;
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, quiesce_and_compare};
use wire::{Line, Wire};

const BLOCK: usize = 4096;
/// Blocks that are written.
const BLOCKS: u64 = 1024;

/// What found a flip, and how often.
type Found = BTreeMap<&'static str, u64>;

fn plan() -> Plan {
    Plan {
        size_mib: 8,
        log_mib: 16,
        overlay_mib: 16,
        policy: "ack = \"async\"\ntree = \"on\"\nverify_reads = \"all\"\n".to_owned(),
        ..Plan::default()
    }
}

fn noise(random: &mut Random) -> Vec<u8> {
    let words = (0..BLOCK / 8).flat_map(|_| random.draw().to_le_bytes());
    words.collect()
}

fn small(number: u64) -> usize {
    usize::try_from(number).expect("small")
}

/// Flips one bit of a byte of a file.
fn flip(path: &Path, at: u64, bit: u64) {
    let file = File::options().read(true).write(true).open(path);
    let file = file.expect("a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ (1 << bit)], at)
        .expect("written");
    file.sync_all().expect("flushed");
}

/// Heads and payloads of the frames that lie in a log and of which a later one proves that they
/// were durable: byte ranges of the file.
fn frames(log: &Path) -> Vec<(u64, u64, u64)> {
    let bytes = std::fs::read(log).expect("a log");
    let identity = LogHeader::decode(&bytes[..BLOCK]).expect("a log").identity;
    let mut found = Vec::new();
    for at in (RING_START..bytes.len() as u64).step_by(BLOCK) {
        let block = &bytes[small(at)..small(at) + BLOCK];
        if let Ok(header) = FrameHeader::decode(&identity, block)
            && header.frame_bytes > header.head_bytes
        {
            found.push((at, at + header.head_bytes, at + header.frame_bytes));
        }
    }
    // Nothing follows the last ones that could prove anything.
    found.truncate(found.len() - 4);
    found
}

/// The log of a node that was killed: it must refuse to open it and name the frame, and open it
/// again when the bit is as it was.
fn in_the_log(random: &mut Random, flips: u64, found: &mut Found) {
    let place = folder();
    let mut node = single(place.path(), plan());
    let text = std::fs::read_to_string(node.config()).expect("a configuration");
    let slow = "[[volume]]\ndestage_delay_ms = 3600000\n";
    let text = text.replacen("[[volume]]\n", slow, 1);
    std::fs::write(node.config(), text).expect("edited");
    node.start().expect("it serves");
    let mut client = node.client().expect("a client");
    let mut image = Vec::new();
    for block in 0..64_u64 {
        let bytes = noise(random);
        client
            .write(block * BLOCK as u64, &bytes, false)
            .expect("written");
        client.flush().expect("flushed");
        image.extend(bytes);
    }
    drop(client);
    node.kill().expect("killed");
    let frames = frames(&node.log());
    assert!(frames.len() >= 50, "{} frames", frames.len());
    for flip_number in 0..flips {
        let (start, payload, end) = frames[small(random.below(frames.len() as u64))];
        let (at, names): (u64, &[&str]) = match flip_number % 2 {
            0 => (
                start + random.below(HEADER_BYTES as u64),
                &["no frame header here", "frame header is damaged"],
            ),
            _ => (payload + random.below(end - payload), &["payload of epoch"]),
        };
        let bit = random.below(8);
        flip(&node.log(), at, bit);
        let refused = node.start().expect_err("it must not open");
        let words = format!("{refused:#}");
        assert!(words.contains("is damaged although"), "{at}: {words}");
        let named = names.iter().any(|name| words.contains(name));
        assert!(named, "byte {at}, frame at {start}: {words}");
        let what = ["frame: header", "frame: payload"][small(flip_number % 2)];
        *found.entry(what).or_default() += 1;
        flip(&node.log(), at, bit);
    }
    node.start().expect("it opens again");
    let mut client = node.client().expect("a client");
    let read = client
        .read(0, u32::try_from(image.len()).expect("small"))
        .expect("read");
    assert!(read == image, "something was changed");
}

/// Two nodes with a tree, and what both hold.
fn filled(place: &Path, random: &mut Random) -> (Node, Node, Vec<u8>) {
    let (mut alpha, mut beta) = running_pair(place, &plan());
    let mut client = alpha.client().expect("a client");
    let mut image = Vec::new();
    for block in 0..BLOCKS {
        let bytes = noise(random);
        client
            .write(block * BLOCK as u64, &bytes, false)
            .expect("written");
        image.extend(bytes);
    }
    drop(client);
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    for node in [&mut alpha, &mut beta] {
        node.wait_for("have a root", LIMIT, has_root)
            .expect("a tree");
    }
    (alpha, beta, image)
}

/// Blocks all over the data, no two alike.
fn chosen(random: &mut Random, count: u64) -> Vec<u64> {
    let mut blocks: Vec<u64> = (0..BLOCKS).collect();
    for at in 0..small(count) {
        let other = at as u64 + random.below(BLOCKS - at as u64);
        blocks.swap(at, small(other));
    }
    blocks.truncate(small(count));
    blocks
}

fn flip_blocks(path: &Path, blocks: &[u64], random: &mut Random) {
    for block in blocks {
        let at = block * BLOCK as u64 + random.below(BLOCK as u64);
        flip(path, at, random.below(8));
    }
}

fn bad(node: &Node) -> u64 {
    let report = node.report().expect("a report");
    tree(&report).map_or(0, |tree| tree.bad_blocks)
}

/// The replica's backing while its primary is away: a deep verify finds every one, a promotion is
/// refused, and the primary repairs all when it is back. Then the primary's, found by reading.
fn in_the_backings(random: &mut Random, flips: u64, found: &mut Found) {
    let place = folder();
    let (mut alpha, mut beta, image) = filled(place.path(), random);
    alpha.kill().expect("killed");
    let flipped = chosen(random, flips);
    flip_blocks(&beta.backing(), &flipped, random);
    deep_verify(&mut beta);
    assert_eq!(bad(&beta), flips, "by the deep verify");
    *found.entry("deep verify").or_default() += flips;
    let refused = beta.ask(&Request::Promote {
        volume: VOLUME.to_owned(),
        accept_loss: false,
    });
    let refused = refused.expect_err("it is damaged").to_string();
    assert!(refused.contains("DAMAGED"), "{refused}");
    alpha.start().expect("it recovers");
    let is_repaired = |report: &VolumeReport| {
        tree(report).is_some_and(|tree| tree.bad_blocks == 0 && tree.repaired_blocks == flips)
    };
    beta.wait_for("be repaired", 5 * LIMIT, is_repaired)
        .expect("repaired");
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");

    beta.kill().expect("killed");
    let mut flipped = chosen(random, flips);
    flip_blocks(&alpha.backing(), &flipped, random);
    let mut client = alpha.client().expect("a client");
    let mut refused = Vec::new();
    for block in 0..BLOCKS {
        let at = small(block) * BLOCK;
        match client.read(at as u64, 4096) {
            Ok(read) => assert!(read == image[at..at + BLOCK], "block {block} is served"),
            Err(_) => refused.push(block),
        }
    }
    flipped.sort_unstable();
    assert_eq!(refused, flipped, "by reading");
    *found.entry("read").or_default() += flips;
    beta.start().expect("it recovers");
    alpha
        .wait_for("be repaired", 5 * LIMIT, is_repaired)
        .expect("repaired");
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    in_the_ledger((&beta, &alpha), random, flips, found);
    drop(alpha);
    in_the_tree(&mut beta, random, flips / 2, found);
}

/// A replica's ledger, checked as a stranger would who has the primary's public key.
fn in_the_ledger(
    (node, signer): (&Node, &Node),
    random: &mut Random,
    flips: u64,
    found: &mut Found,
) {
    let good = std::fs::read(ledger_folder(node).join("ledger")).expect("a ledger");
    let copy = node.folder().join("copy-of-ledger");
    let verify = |bytes: &[u8]| {
        std::fs::write(&copy, bytes).expect("a copy");
        let mut command = ctl();
        command.args(["ledger", "verify", "--file"]).arg(&copy);
        command.arg("--key").arg(public_key(signer));
        let output = command.output().expect("hn4ctl runs");
        (output.status.code(), text(&output))
    };
    let (code, said) = verify(&good);
    assert_eq!(code, Some(0), "{said}");
    for number in 0..flips {
        let mut flipped = good.clone();
        let end = good.len() as u64;
        let at = match number {
            0 => end - 1,
            _ => random.below(end),
        };
        flipped[small(at)] ^= 1 << random.below(8);
        let (code, said) = verify(&flipped);
        // At the end it may be what a crash left: the rest is good, and that is told.
        let named = code == Some(1) || said.contains("are no record");
        assert!(named, "byte {at} of {}: {said}", good.len());
        *found.entry("proof: ledger").or_default() += 1;
    }
}

/// The files of a tree, which are there again for the next flip.
fn tree_files(node: &Node) -> Vec<(PathBuf, Vec<u8>)> {
    let folders = std::fs::read_dir(state_dir(node).join("tree")).expect("trees");
    let folder = folders.last().expect("one").expect("an entry").path();
    let entries = std::fs::read_dir(folder).expect("its files");
    let files = entries.map(|entry| entry.expect("an entry").path());
    // What the last deep verify found is no part of the tree.
    let files = files.filter(|path| !path.ends_with("verified"));
    files
        .map(|path| (path.clone(), std::fs::read(path).expect("a file")))
        .collect()
}

fn in_the_tree(node: &mut Node, random: &mut Random, flips: u64, found: &mut Found) {
    node.drain().expect("drained");
    node.wait_for("have a root", LIMIT, has_root)
        .expect("a tree");
    node.kill().expect("killed");
    let good = tree_files(node);
    let bytes: u64 = good.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    for _ in 0..flips {
        let mut at = random.below(bytes);
        let file = good.iter().find(|(_, bytes)| {
            let is_here = at < bytes.len() as u64;
            at -= if is_here { 0 } else { bytes.len() as u64 };
            is_here
        });
        let (path, _) = file.expect("within all of them");
        flip(path, at, random.below(8));
        node.start().expect("the volume opens all the same");
        let volume = VOLUME.to_owned();
        // Refused if the tree is being built anew already.
        let _ = node.ask(&Request::Verify { volume });
        let named = |report: &VolumeReport| {
            tree(report).is_some_and(|tree| tree.failed.is_some() || tree.notice.is_some())
        };
        if let Err(error) = node.wait_for("name the damage", LIMIT, named) {
            panic!("byte {at} of {}: {error:#}", path.display());
        }
        *found.entry("roots: tree file").or_default() += 1;
        node.kill().expect("killed");
        let folder = path.parent().expect("its folder");
        std::fs::remove_dir_all(folder).expect("removed");
        std::fs::create_dir(folder).expect("made");
        for (path, bytes) in &good {
            std::fs::write(path, bytes).expect("restored");
        }
    }
    node.start().expect("it opens");
    node.wait_for("have a root", LIMIT, has_root)
        .expect("the tree as it was");
    let report = node.report().expect("a report");
    assert_eq!(tree(&report).and_then(|tree| tree.notice.clone()), None);
}

/// The line: the connection ends at a flipped bit, another one takes its place, and nothing is
/// applied that was not sent.
fn on_the_line(random: &mut Random, flips: u64, found: &mut Found) {
    let place = folder();
    let plan = Plan {
        transport: "wss",
        ..plan()
    };
    let (mut alpha, mut beta) = pair(place.path(), &plan);
    let wire = Wire::from(&alpha, plan.transport);
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let mut client = alpha.client().expect("a client");
    let said = |node: &Node| std::fs::read_to_string(node.journal()).expect("a journal");
    for _ in 0..flips {
        let before = [&alpha, &beta].map(|node| said(node).len());
        wire.set(Line::Flipping(1));
        let at = random.below(BLOCKS) * BLOCK as u64;
        client.write(at, &noise(random), false).expect("written");
        client.flush().expect("it does not wait for the peer");
        for node in [&mut alpha, &mut beta] {
            node.wait_for("lose its peer", LIMIT, |report| !report.peers[0].connected)
                .expect("noticed");
        }
        wire.set(Line::Open);
        let words = [&alpha, &beta].map(said);
        let words = [0, 1].map(|node| &words[node][before[node]..]);
        let named = words.iter().any(|words| words.contains("cannot decrypt"));
        assert!(named, "{words:?}");
        *found.entry("line").or_default() += 1;
        alpha.wait_for_peer(LIMIT).expect("beta follows");
    }
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
}

fn every_flip_is_found(flips: u64) {
    let mut random = Random::new(seed("flips"));
    let mut found = Found::new();
    let part = flips / 5;
    in_the_log(&mut random, part, &mut found);
    in_the_backings(&mut random, part, &mut found);
    on_the_line(&mut random, part / 2, &mut found);
    println!("{flips} flips: {found:?}");
    assert_eq!(found.values().sum::<u64>(), flips);
}

#[test]
fn whatever_bit_is_flipped_something_names_it() {
    every_flip_is_found(50);
}

#[test]
#[ignore = "the long run: 1,000 flips take some minutes"]
fn whatever_bit_of_1000_is_flipped_something_names_it() {
    every_flip_is_found(1000);
}
