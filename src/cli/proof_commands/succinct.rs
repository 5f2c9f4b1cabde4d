//! `proof export --stark`, and the verification of what that makes.
//!
//! Proving is done here and not by the daemon: it needs nothing but the ledger's file and the
//! node's keys, a person asks for it, and a process of its own at the lowest priority takes no
//! memory of the daemon's and hardly any of its time, and may be ended at any moment.

use hn4::types::{Epoch, VolumeId};
use hn4_proof::envelope::{Envelope, ZK_STARK};
use hn4_proof::ledger::verify::Policy;
use hn4_proof::sign::PublicKey;

use super::{AnyError, Cli, LedgerArg, json};

/// The document, if it is of this kind.
pub(super) fn read(bytes: &[u8]) -> Option<Envelope> {
    let read = match json(bytes) {
        Some(text) => Envelope::from_json(text),
        None => Envelope::from_protobuf(bytes),
    };
    read.ok().filter(|document| document.proof.kind == ZK_STARK)
}

#[cfg(not(feature = "stark"))]
const NOT_BUILT: &str = "this build has no succinct proofs; build hn4ctl with `--features stark`";

#[cfg(not(feature = "stark"))]
pub(super) fn prove(_: &Cli, _: &LedgerArg, _: (Epoch, Epoch)) -> Result<Envelope, AnyError> {
    Err(NOT_BUILT.into())
}

#[cfg(not(feature = "stark"))]
pub(super) fn verify(
    _: &Envelope,
    _: (VolumeId, Epoch, Epoch),
    _: (Vec<PublicKey>, Policy),
) -> Result<u8, AnyError> {
    Err(NOT_BUILT.into())
}

#[cfg(feature = "stark")]
pub(super) use with::{prove, verify};

#[cfg(feature = "stark")]
mod with {
    use std::io::{self, Write};
    use std::time::{SystemTime, UNIX_EPOCH};

    use hn4_proof::ledger::Body;
    use hn4_proof::ledger::scan::Records;
    use hn4_proof::ledger::verify::Verifier;
    use hn4_proof::sign::{Algorithm, SecretKey};
    use hn4_proof::stark::{self, Collector};

    use super::super::super::run::{DONE, load};
    use super::super::{open, path_of, recovered};
    use super::{AnyError, Cli, Envelope, Epoch, LedgerArg, Policy, PublicKey, VolumeId};
    use crate::config::keys;
    use crate::config::state::NodeState;

    /// Lowest priority of a thread that still gets time.
    const NICE: i32 = 19;

    /// Makes the proof, with the keys of this node.
    pub(in super::super) fn prove(
        cli: &Cli,
        ledger: &LedgerArg,
        (first, last): (Epoch, Epoch),
    ) -> Result<Envelope, AnyError> {
        let (medium, header) = open(&path_of(cli, ledger)?)?;
        let tip = recovered(&medium, &header, Policy::default())?.tip;
        let mut collector = Collector::new(header.volume, first, last);
        let mut records = Records::new(&medium)?;
        for _ in 0..tip.next_index() {
            // An append that is on its way counts as not there yet.
            let Some(Ok(record)) = records.next_record()? else {
                break;
            };
            if let Body::Anchor(signed) = &record.body {
                collector.push(signed)?;
            }
        }
        let part = collector.finish()?;
        let state_dir = load(cli)?.node.state_dir;
        let node = NodeState::open_or_create(&state_dir)?.node_id;
        let signers = signers(&state_dir, node, &tip)?;
        let signers: Vec<&SecretKey> = signers.iter().collect();
        // From here on it takes seconds of a core.
        rustix::process::nice(NICE)?;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let time_ms = u64::try_from(wall.as_millis())?;
        Ok(stark::make(&part, (node, &signers), time_ms)?)
    }

    /// The keys of this node that the ledger knows as its own.
    fn signers(
        state_dir: &std::path::Path,
        node: hn4::types::NodeId,
        tip: &Verifier,
    ) -> Result<Vec<SecretKey>, AnyError> {
        let mut signers = Vec::new();
        for algorithm in Algorithm::ALL {
            let key = keys::node_key(state_dir, algorithm)?;
            let enrolled = |key: &SecretKey| tip.keyring().may_sign(key.public().id(), node);
            signers.extend(key.filter(enrolled));
        }
        match signers.first() {
            Some(key) if key.public().algorithm() == Algorithm::Ed25519 => Ok(signers),
            _ => {
                Err("this node's key is not in the ledger, so it can state nothing about it".into())
            }
        }
    }

    /// Checks such a proof.
    pub(in super::super) fn verify(
        document: &Envelope,
        wanted: (VolumeId, Epoch, Epoch),
        (trusted, policy): (Vec<PublicKey>, Policy),
    ) -> Result<u8, AnyError> {
        let statement = stark::verify(document, wanted, &trusted, &policy)?;
        let (volume, first, last) = wanted;
        let (index, count) = (statement.index, statement.count);
        writeln!(
            io::stdout(),
            "epochs {first} to {last} of volume {volume}: node {} states, signed by a trusted key, \
             that the chain of batch roots leads\nfrom  {}  (after {index} batches)\nto    {}  \
             (after {})\nand proves that it knows {count} batch roots of which that is true; first \
             and last are those of anchors that trusted keys signed",
            statement.node,
            statement.start,
            statement.end,
            index.saturating_add(count),
        )?;
        Ok(DONE)
    }
}
