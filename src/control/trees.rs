//! What status says about the state tree, and what an operator should know of it.
//!
//! Pure. See `findings` for what a finding promises.

use super::api::{Finding, Health, PeerReport, TreeReport, VolumeReport};

/// Puts the tree's state into a volume's report, and what is to be said about it among the
/// findings.
pub fn add(report: &mut VolumeReport, tree: TreeReport) {
    find(report, findings(&tree));
    if let Some(state) = &mut report.state {
        state.tree = Some(tree);
    }
}

/// Puts peers whose copies differ among the findings.
pub fn add_differences(report: &mut VolumeReport) {
    let different = report.peers.iter().filter_map(difference);
    let different = different.collect();
    find(report, different);
}

fn find(report: &mut VolumeReport, new: Vec<Finding>) {
    report.findings.extend(new);
    report
        .findings
        .sort_by_key(|finding| std::cmp::Reverse(finding.health));
    let worst = report.findings.iter().map(|finding| finding.health).max();
    report.health = worst.unwrap_or(Health::Ok);
}

fn difference(peer: &PeerReport) -> Option<Finding> {
    let compared = peer.compared.as_ref().filter(|compared| !compared.equal)?;
    let (name, epoch) = (&peer.name, compared.epoch);
    let (ours, theirs) = (&compared.root, &compared.peer_root);
    Some(Finding {
        state: "copies-differ".to_owned(),
        health: Health::Failed,
        cause: format!(
            "DIFFERENT: this copy and that of {name} have other contents at the same epoch \
             {epoch}: the roots of their state trees are {ours} here and {theirs} there"
        ),
        next: "one of them is damaged: see the findings of both nodes, stop the one whose medium \
               is bad and give it a new copy; do not promote either before that"
            .to_owned(),
    })
}

fn findings(tree: &TreeReport) -> Vec<Finding> {
    let mut all = Vec::new();
    if let Some(why) = &tree.failed {
        all.push(Finding {
            state: "tree-failed".to_owned(),
            health: Health::Attention,
            cause: format!(
                "there is no state tree: {why}. It is built anew in a minute; clients are served \
                 and data is written back meanwhile, but damage of the medium is not detected"
            ),
            next: "see to the state directory (space, permissions) and to the backing".to_owned(),
        });
    }
    if tree.bad_blocks > 0 {
        all.push(Finding {
            state: "damaged".to_owned(),
            health: Health::Failed,
            cause: format!(
                "DAMAGED: {} blocks of 4 KiB of the backing are not what was written there: {}{}",
                tree.bad_blocks,
                tree.bad_lbas.join(", "),
                if tree.bad_lbas.len() < 64 {
                    ""
                } else {
                    ", ..."
                }
            ),
            next: "do not promote this copy; if a peer's copy is whole, replace this medium and \
                   let it be copied anew; a block that is written again as a whole is good, and \
                   `hn4ctl verify --deep` looks again"
                .to_owned(),
        });
    }
    if let Some(notice) = &tree.notice {
        all.push(Finding {
            state: "tree-notice".to_owned(),
            health: Health::Ok,
            cause: format!("since this node started: {notice}"),
            next:
                "nothing has to be done: it is hashed from the backing. If it comes again, see to \
                   the state directory (space, permissions)"
                    .to_owned(),
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_that_is_missing_is_told_and_a_healthy_one_is_not() {
        assert!(findings(&TreeReport::default()).is_empty());
        let failed = TreeReport {
            failed: Some("no space left".to_owned()),
            notice: Some("the state tree is built anew: torn".to_owned()),
            ..TreeReport::default()
        };
        let found = findings(&failed);
        assert_eq!(found[0].state, "tree-failed");
        assert_eq!(found[0].health, Health::Attention);
        assert!(found[0].cause.contains("no space left"));
        assert_eq!(found[1].health, Health::Ok);
    }
}
