//! State trees, as a node shows them.

use hn4_replicad::control::Request;
use hn4_replicad::control::api::{TreeReport, VolumeReport};
use hn4_replicad::quickstart::rig::{Node, VOLUME};

use super::LIMIT;

/// What a node says of its tree.
pub(crate) fn tree(report: &VolumeReport) -> Option<&TreeReport> {
    report.state.as_ref()?.tree.as_ref()
}

/// Whether the tree has a root at what the backing holds.
pub(crate) fn has_root(report: &VolumeReport) -> bool {
    let applied = report.state.as_ref().map(|state| state.applied_epoch);
    let of = tree(report).filter(|tree| tree.root.is_some());
    of.is_some_and(|tree| tree.epoch == applied)
}

/// Has a node read its whole backing, and tells what it says when it has.
pub(crate) fn deep_verify(node: &mut Node) -> TreeReport {
    let last = |report: &VolumeReport| tree(report).and_then(|tree| tree.verified_at_ms);
    let before = last(&node.report().expect("a report"));
    let volume = VOLUME.to_owned();
    node.ask(&Request::Verify { volume }).expect("asked");
    node.wait_for("have verified", LIMIT, |report| {
        last(report).is_some_and(|at| Some(at) != before)
    })
    .expect("verified");
    let report = node.report().expect("a report");
    tree(&report).cloned().expect("a tree")
}
