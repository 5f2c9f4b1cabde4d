//! What status says about proofs: the state of the prover, and what an operator should know of it.
//!
//! Pure. See `findings` for what a finding promises.

use super::api::{Finding, Health, ProofReport, VolumeReport};

/// Puts the prover's state into a volume's report, and what is to be said about it among the
/// findings.
pub fn add(report: &mut VolumeReport, proof: ProofReport) {
    report.findings.extend(findings(&report.name, &proof));
    report
        .findings
        .sort_by_key(|finding| std::cmp::Reverse(finding.health));
    let worst = report.findings.iter().map(|finding| finding.health).max();
    report.health = worst.unwrap_or(Health::Ok);
    if let Some(state) = &mut report.state {
        state.proof = Some(proof);
    }
}

fn finding(state: &str, health: Health, cause: String, next: &str) -> Finding {
    Finding {
        state: state.to_owned(),
        health,
        cause,
        next: next.to_owned(),
    }
}

fn findings(volume: &str, proof: &ProofReport) -> Vec<Finding> {
    let mut all = Vec::new();
    if let Some(why) = &proof.failed {
        let cause = format!(
            "nothing is proven: {why}. It is tried again every second; clients are served until \
             unproven log takes three quarters of the log"
        );
        let next = "see to the state directory (space, permissions) and to the log device";
        all.push(finding("proof-failed", Health::Attention, cause, next));
    }
    if proof.throttles {
        let bytes = proof.lag_bytes;
        let cause =
            format!("proof lag: {bytes} bytes of log are not proven; clients are held back");
        let next = "nothing if it passes; else free the processor, or make the log larger";
        all.push(finding("proof-lag", Health::Attention, cause, next));
    }
    if proof.unproven_primary {
        let cause = "the primary offers no proofs, so epochs are applied as soon as they are \
                     durable there"
            .to_owned();
        let next = "upgrade the primary, or remove proof = \"off\" from its configuration";
        all.push(finding("unproven-primary", Health::Attention, cause, next));
    }
    if let Some(notice) = &proof.notice {
        let cause = format!("since this node started: {notice}");
        let next = format!(
            "nothing has to be done; what was set aside lies beside the ledger of {volume} in the \
             state directory, and `hn4ctl ledger verify` reads it"
        );
        all.push(finding("ledger-notice", Health::Ok, cause, &next));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_trouble_of_a_prover_has_a_finding_and_a_healthy_one_has_none() {
        let healthy = ProofReport::default();
        assert!(findings("v", &healthy).is_empty());
        let cases = [
            (
                "proof-failed",
                ProofReport {
                    failed: Some("no space".to_owned()),
                    ..ProofReport::default()
                },
            ),
            (
                "proof-lag",
                ProofReport {
                    throttles: true,
                    ..ProofReport::default()
                },
            ),
            (
                "unproven-primary",
                ProofReport {
                    unproven_primary: true,
                    ..ProofReport::default()
                },
            ),
            (
                "ledger-notice",
                ProofReport {
                    notice: Some("set aside".to_owned()),
                    ..ProofReport::default()
                },
            ),
        ];
        for (state, proof) in cases {
            let all = findings("v", &proof);
            assert_eq!(all.len(), 1, "{state}");
            assert_eq!(all[0].state, state);
        }
    }
}
