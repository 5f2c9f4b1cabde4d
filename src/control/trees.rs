//! What status says about the state tree, and what an operator should know of it.
//!
//! Pure. See `findings` for what a finding promises.

use super::api::{Finding, Health, TreeReport, VolumeReport};

/// Puts the tree's state into a volume's report, and what is to be said about it among the
/// findings.
pub fn add(report: &mut VolumeReport, tree: TreeReport) {
    report.findings.extend(findings(&tree));
    report
        .findings
        .sort_by_key(|finding| std::cmp::Reverse(finding.health));
    let worst = report.findings.iter().map(|finding| finding.health).max();
    report.health = worst.unwrap_or(Health::Ok);
    if let Some(state) = &mut report.state {
        state.tree = Some(tree);
    }
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
    if let Some(notice) = &tree.notice {
        all.push(Finding {
            state: "tree-notice".to_owned(),
            health: Health::Ok,
            cause: format!("since this node started: {notice}"),
            next: "nothing has to be done: it is hashed from the backing".to_owned(),
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
