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

#[test]
fn diff_shows_exactly_what_the_losing_side_of_a_split_wrote() {
    let place = folder();
    let (mut alpha, mut beta) = running_pair(place.path(), &plan());
    let mut client = alpha.client().expect("it serves");
    client.write(0, &[1; 65536], true).expect("written");
    let tip = alpha
        .report()
        .expect("a report")
        .state
        .expect("open")
        .tip_epoch;
    let has_it = |report: &hn4_replicad::control::api::VolumeReport| {
        report
            .state
            .as_ref()
            .is_some_and(|state| state.tip_epoch >= tip)
    };
    beta.wait_for("have it", LIMIT, has_it).expect("it follows");
    beta.kill().expect("killed");

    // Alpha goes on alone. Twice the same place, and once zeroes.
    client.write(4096, &[0xA1; 8192], true).expect("written");
    client.write(8192, &[0xA2; 4096], true).expect("written");
    client.write_zeroes(32768, 4096).expect("zeroed");
    client.write(1 << 20, &[0xA3; 1536], true).expect("written");
    client
        .write(2 << 20, &[0xCC; 4096], true)
        .expect("as the other side will");
    client.flush().expect("flushed");
    drop(client);
    alpha.kill().expect("killed");
    beta.start().expect("it runs");
    promote(&beta);
    let mut client = beta.client().expect("it serves");
    client.write(4096, &[0xB1; 4096], true).expect("written");
    client
        .write(2 << 20, &[0xCC; 4096], true)
        .expect("the same as the other side");
    client
        .write(3 << 20, &[0xB2; 4096], true)
        .expect("what only the winner has");
    client.flush().expect("flushed");
    drop(client);

    // The two logs, before they meet.
    beta.kill().expect("killed");
    let [log_a, log_b] = [&alpha, &beta].map(|node| node.log().display().to_string());
    let logs = diff(&alpha, &["--logs", &log_a, &log_b]);
    assert_eq!(logs["common_epoch"].as_u64(), Some(tip));
    let side = |lba, sectors, side: &str| (lba, sectors, side.to_owned());
    let expected = [
        side(8, 8, "both"),
        side(16, 8, "first"),
        side(64, 8, "first"),
        side(2048, 3, "first"),
        side(6144, 8, "second"),
    ];
    assert_eq!(ranges(&logs), expected, "{logs}");
    assert_eq!(logs["first_epochs"][0]["term"].as_u64(), Some(1));
    let last = logs["second_epochs"]
        .as_array()
        .and_then(|epochs| epochs.last());
    assert_eq!(last.and_then(|epoch| epoch["term"].as_u64()), Some(2));

    // They meet: what the loser alone has becomes a fork file.
    beta.start().expect("it runs");
    promote(&beta);
    alpha.start().expect("it comes back");
    let replica = |report: &hn4_replicad::control::api::VolumeReport| {
        let role = report.state.as_ref().map(|state| state.role.as_str());
        role == Some("replica") && is_usable(report)
    };
    alpha
        .wait_for("be a replica", LIMIT, replica)
        .expect("by itself");
    quiesce_and_compare(&mut beta, &mut alpha, LIMIT).expect("equal copies");
    let served = diff(&alpha, &[VOLUME]);
    let expected = [
        side(8, 8, "first"),
        side(16, 8, "first"),
        side(64, 8, "first"),
        side(2048, 3, "first"),
    ];
    assert_eq!(ranges(&served), expected, "{served}");
    assert_eq!(served["bytes"].as_u64(), Some(27 * 512));
    // The fork was saved from the last epoch on that alpha could not drop.
    assert!(
        served["common_epoch"]
            .as_u64()
            .is_some_and(|epoch| epoch <= tip)
    );
    let image = alpha.backing().display().to_string();
    assert_eq!(
        ranges(&diff(&alpha, &[VOLUME, "--image", &image])),
        expected
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_hn4ctl"));
    command
        .arg("--config")
        .arg(alpha.config())
        .args(["diff", VOLUME]);
    let text = common::succeed(&mut command);
    assert!(text.contains("13824 bytes in 4 ranges"), "{text}");
}
