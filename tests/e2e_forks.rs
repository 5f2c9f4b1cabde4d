//! Copies that may have what nobody else has, and that the primary's log cannot bring back: what
//! they have is saved in a fork file, a full copy replaces it, and they follow again by themselves.

mod common;

use std::process::Command;

use common::{LIMIT, folder, is_usable, running_pair};
use hn4_replicad::control::Request;
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, quiesce_and_compare};
use serde_json::Value;

const BLOCK: usize = 4096;

fn plan() -> Plan {
    Plan {
        size_mib: 64,
        log_mib: 16,
        overlay_mib: 16,
        policy: "ack = \"async\"\n".to_owned(),
        ..Plan::default()
    }
}

fn promote(node: &Node) {
    let request = Request::Promote {
        volume: VOLUME.to_owned(),
        accept_loss: true,
    };
    node.ask(&request).expect("loss is accepted");
}

/// Writes whole blocks, each of this byte, at these places.
fn write(node: &Node, byte: u8, blocks: impl Iterator<Item = u64>) {
    let mut client = node.client().expect("it serves");
    for block in blocks {
        let at = block * BLOCK as u64;
        client.write(at, &[byte; BLOCK], false).expect("written");
    }
    client.flush().expect("flushed");
}

/// More than a log holds, beyond the blocks that the tests look at.
fn fill_the_log(node: &Node) {
    for round in 0..3 {
        write(node, 0x50 + round, 4096..4096 + 2048);
    }
    destage(node);
}

/// All that was written is in the backing.
fn destage(node: &Node) {
    let volume = VOLUME.to_owned();
    node.ask(&Request::Drain { volume }).expect("drained");
}

fn follows(node: &mut Node) {
    let follows = |report: &VolumeReport| {
        let role = report.state.as_ref().map(|state| state.role.as_str());
        role == Some("replica") && is_usable(report)
    };
    node.wait_for("follow again", LIMIT, follows)
        .expect("by itself");
}

/// What `hn4ctl diff` says of the only fork of a node, against the volume as it is now: first
/// block, number of blocks.
fn lost(node: &Node) -> (Value, Vec<(u64, u64)>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hn4ctl"));
    command
        .arg("--config")
        .arg(node.config())
        .args(["diff", VOLUME, "--json"]);
    let report: Value = serde_json::from_str(&common::succeed(&mut command)).expect("JSON");
    let rows = report["ranges"].as_array().expect("ranges").clone();
    let number = |row: &Value, key: &str| row[key].as_u64().expect("a number") / 8;
    let tell = |row: &Value| (number(row, "lba"), number(row, "sectors"));
    (report, rows.iter().map(tell).collect())
}

/// A pair of which beta missed what alpha wrote last.
fn parted(folder: &std::path::Path, alone: impl FnOnce(&Node)) -> [Node; 2] {
    let (mut alpha, mut beta) = running_pair(folder, &plan());
    write(&alpha, 1, 0..16);
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    beta.kill().expect("killed");
    alone(&alpha);
    alpha.kill().expect("killed");
    beta.start().expect("it runs");
    promote(&beta);
    [alpha, beta]
}

#[test]
fn a_returning_primary_that_had_destaged_its_own_saves_that_and_follows_by_itself() {
    let place = folder();
    let [mut alpha, mut beta] = parted(place.path(), |alpha| {
        write(alpha, 0xA5, 2..5);
        destage(alpha);
        write(alpha, 0xA6, 8..9);
    });
    write(&beta, 0xB5, 32..33);
    alpha.start().expect("it comes back");
    follows(&mut alpha);
    quiesce_and_compare(&mut beta, &mut alpha, LIMIT).expect("equal copies");
    let (report, lost) = lost(&alpha);
    // The last one is what only beta has: alpha had nothing there.
    assert_eq!(lost, [(2, 3), (8, 1), (32, 1)], "{report}");
    assert!(
        report["backing_bytes"].as_u64() >= Some(4 * 4096),
        "{report}"
    );
    assert!(report["backing_epoch"].is_u64(), "{report}");
}

#[test]
fn a_returning_primary_to_whom_the_log_does_not_reach_back_saves_its_own_and_follows() {
    let place = folder();
    let [mut alpha, mut beta] = parted(place.path(), |alpha| write(alpha, 0xA5, 2..5));
    fill_the_log(&beta);
    alpha.start().expect("it comes back");
    follows(&mut alpha);
    quiesce_and_compare(&mut beta, &mut alpha, LIMIT).expect("equal copies");
    let (report, lost) = lost(&alpha);
    assert_eq!(lost, [(2, 3), (4096, 2048)], "{report}");
}

#[test]
fn a_replica_that_missed_the_log_and_a_promotion_follows_by_itself() {
    let place = folder();
    let (mut alpha, mut beta) = running_pair(place.path(), &plan());
    write(&alpha, 1, 0..16);
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    beta.kill().expect("killed");
    let volume = VOLUME.to_owned();
    alpha.ask(&Request::Demote { volume }).expect("demoted");
    promote(&alpha);
    fill_the_log(&alpha);
    beta.start().expect("it comes back");
    follows(&mut beta);
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    let (report, lost) = lost(&beta);
    assert_eq!(lost, [(4096, 2048)], "{report}");
}

#[test]
fn without_room_for_a_fork_nothing_is_dropped_and_it_is_said_what_to_do() {
    let place = folder();
    let policy = format!("{}fork_space_mib = 0\n", plan().policy);
    let (mut alpha, mut beta) = running_pair(place.path(), &Plan { policy, ..plan() });
    write(&alpha, 1, 0..16);
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    beta.kill().expect("killed");
    write(&alpha, 0xA5, 2..5);
    destage(&alpha);
    alpha.kill().expect("killed");
    beta.start().expect("it runs");
    promote(&beta);
    let before = std::fs::read(alpha.backing()).expect("a backing");
    alpha.start().expect("it comes back");
    let says_so = |report: &VolumeReport| {
        let mut findings = report.findings.iter();
        findings.any(|found| found.state == "needs-space" && found.cause.contains("fork_space_mib"))
    };
    alpha
        .wait_for("say what it needs", LIMIT, says_so)
        .expect("said");
    alpha.kill().expect("killed");
    let after = std::fs::read(alpha.backing()).expect("a backing");
    assert!(before == after, "its backing was touched");
}
