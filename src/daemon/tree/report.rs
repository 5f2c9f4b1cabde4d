//! What is told about a tree.

use hn4_engine::core::VerifyReads;

use super::verify::{Record, ranges};
use super::{ReadCounts, TreeState};
use crate::control::api::{ReadsReport, TreeReport};

/// Ranges of bad blocks that are told.
const RANGES: usize = 64;

impl TreeState {
    /// For status; `policy` is that of the volume.
    pub(crate) fn report(&self, policy: VerifyReads) -> TreeReport {
        let record = self.record.as_ref();
        TreeReport {
            epoch: self.root.map(|(epoch, _)| epoch.0),
            root: self.root.map(|(_, root)| root.to_string()),
            built_bytes: self.built_bytes,
            leaves: self.leaves,
            failed: self.failed.clone(),
            notice: self.notice.clone(),
            verified_bytes: self.verified_bytes,
            verified_at_ms: record.and_then(|record| record.finished_ms),
            repaired_blocks: record.map_or(0, |record| record.repaired),
            bad_blocks: record.map_or(0, Record::count),
            bad_lbas: record.map_or_else(Vec::new, |record| ranges(&record.bad, RANGES)),
            reads: (policy != VerifyReads::Off).then(|| reads(policy, self.reads)),
        }
    }
}

fn reads(policy: VerifyReads, counts: ReadCounts) -> ReadsReport {
    let policy = match policy {
        VerifyReads::Off => "off",
        VerifyReads::Sample => "sample",
        VerifyReads::All => "all",
    };
    ReadsReport {
        policy: policy.to_owned(),
        checked_blocks: counts.checked,
        unchecked_blocks: counts.unchecked,
        bad_blocks: counts.bad,
        repeated_blocks: counts.repeated,
    }
}
