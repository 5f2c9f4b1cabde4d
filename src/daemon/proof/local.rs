//! The node's own ledger of a volume: what it found when it looked at its medium.
//!
//! It is opened for each record: there are few, and whoever has one does not hold a file open for
//! the next.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hn4_proof::inspection::Inspection;
use hn4_proof::ledger::file::LedgerMedium;
use hn4_proof::ledger::scan::{ScanError, recover};
use hn4_proof::ledger::verify::{LedgerError, Policy, Verifier};
use hn4_proof::ledger::{Body, LedgerHeader, Scope};
use hn4_proof::sign::{Algorithm, SignError};
use hn4_proof::tree::ReadAt;
use thiserror::Error;

use super::medium::LedgerOnDisk;
use crate::config::keys;
use crate::config::state::StateError;

/// Why something is not in the local ledger.
#[derive(Debug, Error)]
pub(in crate::daemon) enum LocalError {
    /// The file.
    #[error("the local ledger cannot be written: {0}")]
    Io(#[from] io::Error),
    /// What lies there cannot be read.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The node's keys.
    #[error(transparent)]
    Keys(#[from] StateError),
    /// A key refuses.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The record breaks a rule.
    #[error(transparent)]
    Rule(#[from] LedgerError),
}

/// Whose local ledgers they are.
#[derive(Clone, Debug)]
pub(in crate::daemon) struct LocalLedger {
    /// Where they lie.
    pub(in crate::daemon) state_dir: PathBuf,
    /// What the node signs with for this volume, beside Ed25519.
    pub(in crate::daemon) algorithms: Vec<Algorithm>,
}

impl LocalLedger {
    /// Signs what an inspection found and appends it. A ledger that is damaged is set aside first.
    ///
    /// # Errors
    /// [`LocalError`]; nothing was appended.
    pub(in crate::daemon) fn record(&self, inspection: Inspection) -> Result<(), LocalError> {
        let keys = keys::node_keys(&self.state_dir, &self.algorithms)?;
        let volume = inspection.volume;
        let mut medium = LedgerOnDisk::open_local(&self.state_dir, volume)?;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH);
        let now_ms = wall.map_or(0, |wall| u64::try_from(wall.as_millis()).unwrap_or(0));
        let header = LedgerHeader {
            scope: Scope::Local,
            volume,
            created_ms: now_ms,
        };
        let (mut tip, end) = self.open(&mut medium, &header)?;
        let place = (tip.next_index(), &tip.previous());
        let signers: Vec<_> = keys.wanted().iter().collect();
        let signed = inspection.sign(place, &signers)?;
        let bytes = tip.encode_next(now_ms, &Body::Inspection(Box::new(signed)));
        tip.push_bytes(&bytes)?;
        Ok(medium.append(end, &bytes)?)
    }

    fn open(
        &self,
        medium: &mut LedgerOnDisk,
        header: &LedgerHeader,
    ) -> Result<(Verifier, u64), LocalError> {
        if medium.len_bytes()? > 0 {
            let scope = (Scope::Local, header.volume);
            match recover(&*medium, scope, Policy::default(), None) {
                Ok(found) => {
                    if let Some(torn) = found.torn {
                        medium.cut(torn.offset)?;
                    }
                    return Ok((found.tip, found.end));
                }
                Err(ScanError::Io(error)) => return Err(error.into()),
                Err(error) => {
                    tracing::error!(volume = %header.volume, "local ledger set aside: {error}");
                    medium.set_aside(0)?;
                }
            }
        }
        let bytes = header.encode();
        medium.append(0, &bytes)?;
        Ok((Verifier::new(header, Policy::default()), bytes.len() as u64))
    }
}

/// Where the local ledger of a volume lies.
#[must_use]
pub fn local_path(state_dir: &Path, volume: hn4::types::VolumeId) -> PathBuf {
    state_dir.join(format!("proof/{volume}/local"))
}

#[cfg(test)]
mod tests {
    use hn4::types::{Epoch, Lba, NodeId, VolumeId};
    use hn4_proof::inspection::{Kind, Place};
    use hn4_proof::ledger::scan::Records;

    use super::*;

    const VOLUME: VolumeId = VolumeId([3; 16]);

    fn inspection(damaged: u64) -> Inspection {
        let place = |block: u64| Place {
            lba: Lba(block * 16),
            sectors: 8,
        };
        Inspection {
            volume: VOLUME,
            node: NodeId([4; 16]),
            kind: Kind::DeepVerify,
            first: Epoch(1),
            last: Epoch(2),
            began_ms: 1,
            ended_ms: 2,
            blocks: 100,
            damaged,
            repaired: 0,
            places: (0..damaged).map(place).collect(),
            device: None,
        }
    }

    fn found(state_dir: &Path) -> Vec<u64> {
        let medium = LedgerOnDisk::look(&local_path(state_dir, VOLUME)).expect("a ledger");
        let mut records = Records::new(&medium).expect("a header");
        let mut found = Vec::new();
        while let Some(Ok(record)) = records.next_record().expect("read") {
            if let Body::Inspection(signed) = record.body {
                found.push(signed.inspection.damaged);
            }
        }
        found
    }

    #[test]
    fn what_was_found_is_appended_signed_and_nothing_of_it_can_be_changed() {
        let root = tempfile::tempdir().expect("a directory");
        let ledger = LocalLedger {
            state_dir: root.path().to_owned(),
            algorithms: vec![Algorithm::MlDsa65],
        };
        for damaged in [0, 3, 1] {
            ledger.record(inspection(damaged)).expect("recorded");
        }
        assert_eq!(found(root.path()), [0, 3, 1]);
        let path = local_path(root.path(), VOLUME);
        let medium = LedgerOnDisk::look(&path).expect("a ledger");
        let keys = keys::node_keys(root.path(), &ledger.algorithms).expect("keys");
        let both: Vec<_> = keys
            .wanted()
            .iter()
            .map(|key| key.public().clone())
            .collect();
        let mut records = Records::new(&medium).expect("a header");
        let header = *records.header();
        let policy = Policy {
            every_batch: vec![Algorithm::MlDsa65],
            ..Policy::default()
        };
        let mut verifier = Verifier::new(&header, policy).trusting(&both);
        while let Some(Ok(record)) = records.next_record().expect("read") {
            verifier.push(&record).expect("signed by both keys");
        }
        // A torn append is cut off, and damage is set aside.
        let mut bytes = std::fs::read(&path).expect("read");
        bytes.truncate(bytes.len() - 3);
        std::fs::write(&path, &bytes).expect("torn");
        ledger.record(inspection(7)).expect("recorded");
        assert_eq!(found(root.path()), [0, 3, 7]);
        let mut bytes = std::fs::read(&path).expect("read");
        bytes[150] ^= 1;
        std::fs::write(&path, &bytes).expect("damaged");
        ledger.record(inspection(8)).expect("recorded");
        assert_eq!(found(root.path()), [8]);
        assert!(path.with_extension("aside-1").exists());
    }
}
