//! `hn4ctl diff` after a real split: two nodes were primary, each with clients.

mod common;

use std::process::Command;

use common::{LIMIT, folder, is_usable, running_pair};
use hn4_replicad::control::Request;
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, quiesce_and_compare};
use serde_json::Value;

fn plan() -> Plan {
    Plan {
        size_mib: 16,
        log_mib: 32,
        overlay_mib: 16,
        // The losing side's writes stay in its log, where they can be told from the others'.
        policy: "ack = \"async\"\ndestage_delay_ms = 3600000\n".to_owned(),
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

fn diff(node: &Node, args: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hn4ctl"));
    command
        .arg("--config")
        .arg(node.config())
        .arg("diff")
        .args(args);
    let text = common::succeed(command.arg("--json"));
    serde_json::from_str(&text).expect("JSON")
}

/// Who changed which sectors: first LBA, count, side.
fn ranges(report: &Value) -> Vec<(u64, u64, String)> {
    let rows = report["ranges"].as_array().expect("ranges");
    let number = |row: &Value, key: &str| row[key].as_u64().expect("a number");
    let text = |row: &Value| row["changed_by"].as_str().expect("a text").to_owned();
    let tell = |row| (number(row, "lba"), number(row, "sectors"), text(row));
    rows.iter().map(tell).collect()
}

type Reports = hn4_replicad::control::api::VolumeReport;

fn row(lba: u64, sectors: u64, side: &str) -> (u64, u64, String) {
    (lba, sectors, side.to_owned())
}

/// Both nodes were primary and wrote; neither runs. Gives the last epoch that both have.
fn split([alpha, beta]: &mut [Node; 2]) -> u64 {
    let mut client = alpha.client().expect("it serves");
    client.write(0, &[1; 65536], true).expect("written");
    let tip = alpha
        .report()
        .expect("a report")
        .state
        .expect("open")
        .tip_epoch;
    let has_it = |report: &Reports| {
        let state = report.state.as_ref();
        state.is_some_and(|state| state.tip_epoch >= tip)
    };
    beta.wait_for("have it", LIMIT, has_it).expect("it follows");
    beta.kill().expect("killed");

    // Alpha goes on alone. Twice the same place, and once zeroes.
    client.write(4096, &[0xA1; 8192], true).expect("written");
    client.write(8192, &[0xA2; 4096], true).expect("written");
    client.write_zeroes(32768, 4096).expect("zeroed");
    client.write(1 << 20, &[0xA3; 1536], true).expect("written");
    let same = client.write(2 << 20, &[0xCC; 4096], true);
    same.expect("as the other side will");
    client.flush().expect("flushed");
    drop(client);
    alpha.kill().expect("killed");

    beta.start().expect("it runs");
    promote(beta);
    let mut client = beta.client().expect("it serves");
    client.write(4096, &[0xB1; 4096], true).expect("written");
    let same = client.write(2 << 20, &[0xCC; 4096], true);
    same.expect("as the other side did");
    client
        .write(3 << 20, &[0xB2; 4096], true)
        .expect("what only the winner has");
    client.flush().expect("flushed");
    drop(client);
    beta.kill().expect("killed");
    tip
}

/// They meet: the old primary follows, and what it alone has is in a fork file.
fn meet([alpha, beta]: &mut [Node; 2]) {
    beta.start().expect("it runs");
    promote(beta);
    alpha.start().expect("it comes back");
    let replica = |report: &Reports| {
        let role = report.state.as_ref().map(|state| state.role.as_str());
        role == Some("replica") && is_usable(report)
    };
    alpha
        .wait_for("be a replica", LIMIT, replica)
        .expect("by itself");
    quiesce_and_compare(beta, alpha, LIMIT).expect("equal copies");
}

#[test]
fn diff_shows_exactly_what_the_losing_side_of_a_split_wrote() {
    let place = folder();
    let (alpha, beta) = running_pair(place.path(), &plan());
    let mut nodes = [alpha, beta];
    let tip = split(&mut nodes);

    let [log_a, log_b] = nodes
        .each_ref()
        .map(|node| node.log().display().to_string());
    let logs = diff(&nodes[0], &["--logs", &log_a, &log_b]);
    assert_eq!(logs["common_epoch"].as_u64(), Some(tip));
    let both = row(8, 8, "both");
    let lost = [
        row(16, 8, "first"),
        row(64, 8, "first"),
        row(2048, 3, "first"),
    ];
    let expected = [&[both], lost.as_slice(), &[row(6144, 8, "second")]].concat();
    assert_eq!(ranges(&logs), expected, "{logs}");
    assert_eq!(logs["first_epochs"][0]["term"].as_u64(), Some(1));
    let epochs = logs["second_epochs"].as_array();
    let last = epochs.and_then(|epochs| epochs.last());
    assert_eq!(last.and_then(|epoch| epoch["term"].as_u64()), Some(2));

    meet(&mut nodes);
    let alpha = &nodes[0];
    let served = diff(alpha, &[VOLUME]);
    let expected = [&[row(8, 8, "first")], lost.as_slice()].concat();
    assert_eq!(ranges(&served), expected, "{served}");
    assert_eq!(served["bytes"].as_u64(), Some(27 * 512));
    // The fork was saved from the last epoch on that alpha could not drop.
    assert!(
        served["common_epoch"]
            .as_u64()
            .is_some_and(|epoch| epoch <= tip)
    );
    let image = alpha.backing().display().to_string();
    assert_eq!(ranges(&diff(alpha, &[VOLUME, "--image", &image])), expected);
    let mut command = Command::new(env!("CARGO_BIN_EXE_hn4ctl"));
    command
        .arg("--config")
        .arg(alpha.config())
        .args(["diff", VOLUME]);
    let text = common::succeed(&mut command);
    assert!(text.contains("13824 bytes in 4 ranges"), "{text}");
}
