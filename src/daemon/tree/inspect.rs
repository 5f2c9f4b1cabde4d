//! What was found on the medium goes into the node's own ledger.

use std::collections::BTreeSet;

use hn4::types::{BLOCK_BYTES, Epoch, Lba, SECTORS_PER_BLOCK};
use hn4_proof::hash::Digest;
use hn4_proof::inspection::{Inspection, Kind, MAX_PLACES, Place};

use super::Worker;
use super::verify::{Record, runs, wall_ms};

impl Worker {
    /// Records a deep verify that has ended, and began when the backing was at this epoch.
    pub(super) fn keep_inspection(&self, first: Epoch, record: &Record, device: Option<Digest>) {
        self.keep(Inspection {
            first,
            began_ms: record.since_ms,
            ended_ms: record.finished_ms.unwrap_or(record.since_ms),
            blocks: self.setup.identity.size_bytes.div_ceil(BLOCK_BYTES),
            damaged: record.count(),
            device,
            ..self.inspection(Kind::DeepVerify, &record.bad)
        });
    }

    /// Records that blocks were repaired.
    pub(super) fn keep_repairs(&self, repaired: &BTreeSet<u64>) {
        let blocks = repaired.len() as u64;
        self.keep(Inspection {
            blocks,
            damaged: blocks,
            repaired: blocks,
            ..self.inspection(Kind::Repair, repaired)
        });
    }

    fn inspection(&self, kind: Kind, blocks: &BTreeSet<u64>) -> Inspection {
        let place = |(from, end): (u64, u64)| Place {
            lba: Lba(from * SECTORS_PER_BLOCK),
            sectors: (end - from) * SECTORS_PER_BLOCK,
        };
        let at = self.at.map_or(Epoch(0), |at| at.epoch);
        let now_ms = wall_ms();
        Inspection {
            volume: self.setup.identity.volume,
            node: self.setup.node,
            kind,
            first: at,
            last: at,
            began_ms: now_ms,
            ended_ms: now_ms,
            blocks: 0,
            damaged: 0,
            repaired: 0,
            places: runs(blocks, MAX_PLACES).into_iter().map(place).collect(),
            device: None,
        }
    }

    fn keep(&self, inspection: Inspection) {
        let first = inspection.first.min(inspection.last);
        let inspection = Inspection {
            first,
            ..inspection
        };
        if let Err(error) = self.setup.ledger.record(inspection) {
            tracing::error!(volume = %self.setup.name, "this is not in the ledger: {error}");
        }
    }
}
