//! Succinct proofs with real daemons: `hn4ctl proof export --stark`, and somebody elsewhere who has
//! nothing but a public key.

mod common;

use std::path::Path;
use std::process::Command;

use common::ledger::{ctl, public_key, refused, settle};
use common::{LIMIT, folder, oracle, running_pair, seed, succeed};
use hn4_replicad::quickstart::load::{Load, LoadPlan};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME};

fn export(node: &Node, range: [u64; 2], format: &str, out: &Path) -> Command {
    // `--out` names a new file.
    let _ = std::fs::remove_file(out);
    let mut command = ctl();
    command.args(["proof", "export", VOLUME, "--stark", "--format", format]);
    command.args(["--first", &range[0].to_string()]);
    command
        .args(["--last", &range[1].to_string(), "--out"])
        .arg(out);
    command.arg("--config").arg(node.config());
    command
}

fn verify(file: &Path, volume: &str, range: [u64; 2], key: &Path) -> Command {
    let mut command = ctl();
    command.args(["proof", "verify"]).arg(file);
    command.args(["--volume", volume]).arg("--key").arg(key);
    command.args(["--first", &range[0].to_string()]);
    command.args(["--last", &range[1].to_string()]);
    command
}

#[test]
fn a_succinct_proof_convinces_a_stranger_of_its_own_range_and_nothing_else() {
    let seed = seed("succinct proof");
    let (place, plan) = (folder(), Plan::default());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    load.wait_for_progress(2000, LIMIT).expect("it is served");
    load.stop().expect("no error");
    settle(&mut alpha, &mut beta);
    let state = alpha.report().expect("a report").state.expect("open");
    let (volume, range) = (&state.volume_id, [1, state.tip_epoch]);
    let file = place.path().join("proof");
    let (key, other) = (public_key(&alpha), public_key(&beta));
    for format in ["protobuf", "json"] {
        succeed(&mut export(&alpha, range, format, &file));
        let said = succeed(&mut verify(&file, volume, range, &key));
        assert!(said.contains("proves that it knows"), "{said}");
        assert!(said.contains("(after 0 batches)"), "{said}");
        refused(&mut verify(&file, volume, [1, range[1] + 1], &key));
        refused(&mut verify(&file, volume, range, &other));
        let stranger = "11111111-2222-4333-8444-555555555555";
        refused(&mut verify(&file, stranger, range, &key));
        let good = std::fs::read(&file).expect("the proof");
        for at in [good.len() / 3, good.len() / 2] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&file, &bad).expect("written");
            refused(&mut verify(&file, volume, range, &key));
        }
        std::fs::write(&file, &good[..good.len() / 2]).expect("written");
        refused(&mut verify(&file, volume, range, &key));
    }
    // What the ledger does not hold is not proven; a replica states it with its own key, which its
    // primary has enrolled.
    let why = refused(&mut export(&alpha, [1, range[1] + 1], "json", &file));
    assert!(why.contains("does not hold epochs"), "{why}");
    succeed(&mut export(&beta, range, "json", &file));
    refused(&mut verify(&file, volume, range, &other));
    succeed(verify(&file, volume, range, &key).arg("--key").arg(&other));
}
