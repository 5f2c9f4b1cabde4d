//! What was found on the medium goes into the node's own ledger.

use hn4::log::LogIdentity;
use hn4::types::{BLOCK_BYTES, Epoch, Lba, SECTORS_PER_BLOCK};
use hn4_proof::inspection::{Inspection, Kind, MAX_PLACES, Place};

use super::Worker;
use super::verify::{Record, runs};

impl Worker {
    /// Records a deep verify that has ended, and began when the backing was at this epoch.
    pub(super) fn keep_inspection(&self, first: Epoch, record: &Record) {
        let setup = &self.setup;
        let LogIdentity {
            volume, size_bytes, ..
        } = setup.identity;
        let last = self.at.map_or(first, |at| at.epoch);
        let place = |(from, end): (u64, u64)| Place {
            lba: Lba(from * SECTORS_PER_BLOCK),
            sectors: (end - from) * SECTORS_PER_BLOCK,
        };
        let places = runs(&record.bad, MAX_PLACES).into_iter().map(place);
        let inspection = Inspection {
            volume,
            node: setup.node,
            kind: Kind::DeepVerify,
            first: first.min(last),
            last,
            began_ms: record.since_ms,
            ended_ms: record.finished_ms.unwrap_or(record.since_ms),
            blocks: size_bytes.div_ceil(BLOCK_BYTES),
            damaged: record.count(),
            repaired: 0,
            places: places.collect(),
            device: None,
        };
        if let Err(error) = setup.ledger.record(inspection) {
            tracing::error!(volume = %setup.name, "the verify is not recorded: {error}");
        }
    }
}
