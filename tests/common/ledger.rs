//! Ledgers and keys of nodes, for the tests of proofs.

use std::path::{Path, PathBuf};
use std::process::Command;

use hn4_proof::sign::Algorithm;
use hn4_replicad::config::keys;
use hn4_replicad::control::api::{ProofReport, VolumeReport};
use hn4_replicad::quickstart::rig::{Node, quiesce_and_compare};

use super::{LIMIT, text};

pub(crate) fn proof(report: &VolumeReport) -> Option<&ProofReport> {
    report.state.as_ref()?.proof.as_ref()
}

/// Whether everything up to the tip is anchored and applied.
pub(crate) fn is_settled(report: &VolumeReport) -> bool {
    let Some(state) = &report.state else {
        return false;
    };
    let tip = state.tip_epoch;
    let anchored = proof(report).and_then(|proof| proof.anchored_epoch);
    anchored == Some(tip) && state.proven_epoch == tip && state.applied_epoch == tip
}

pub(crate) fn settle(alpha: &mut Node, beta: &mut Node) -> String {
    let hash = quiesce_and_compare(alpha, beta, LIMIT).expect("equal copies");
    for node in [&mut *alpha, &mut *beta] {
        node.wait_for("have everything anchored and applied", LIMIT, is_settled)
            .expect("proven");
    }
    hash
}

/// Where a node keeps its state.
pub(crate) fn state_dir(node: &Node) -> PathBuf {
    node.folder().join("state")
}

/// The folder of the only ledger of a node.
pub(crate) fn ledger_folder(node: &Node) -> PathBuf {
    let state = state_dir(node).join("proof");
    let mut folders = std::fs::read_dir(&state).expect("a folder for ledgers");
    let folder = folders.next().expect("a volume").expect("an entry").path();
    assert!(folders.next().is_none(), "one volume");
    folder
}

pub(crate) fn ledger(node: &Node) -> Vec<u8> {
    std::fs::read(ledger_folder(node).join("ledger")).expect("a ledger")
}

pub(crate) fn set_aside(node: &Node) -> usize {
    let entries = std::fs::read_dir(ledger_folder(node)).expect("the folder");
    let is_aside = |path: &Path| {
        path.extension()
            .is_some_and(|ext| ext.to_string_lossy().starts_with("aside"))
    };
    entries
        .filter(|entry| is_aside(&entry.as_ref().expect("an entry").path()))
        .count()
}

pub(crate) fn ctl() -> Command {
    Command::new(env!("CARGO_BIN_EXE_hn4ctl"))
}

pub(crate) fn refused(command: &mut Command) -> String {
    let output = command.output().expect("hn4ctl runs");
    let text = text(&output);
    assert_eq!(output.status.code(), Some(1), "{command:?}: {text}");
    text
}

/// Public key file of a node.
pub(crate) fn public_key(node: &Node) -> PathBuf {
    keys::public_path(&state_dir(node), Algorithm::Ed25519)
}
