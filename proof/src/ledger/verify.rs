//! The rules that make records a ledger.
//!
//! A [`Verifier`] takes one record after the other and holds what the next one must fit: O(1)
//! memory but for the keys, of which there are at most 1024. It is also the tip that a node appends
//! to, so that a record is never written that another node would refuse.
//!
//! The rules, for a shared ledger:
//!
//! 1. Indexes count up, and each record names the hash of the one before it.
//! 2. Record 0 enrols the first key; key changes obey [`crate::sign::keyring`].
//! 3. An anchor is of this volume; its step is its index; it names the hash of the record and of
//!    the
//!    anchor before it; its epochs and log offsets continue that anchor's without gap or overlap.
//! 4. Its term is not lower than the last one's. The first anchor of a higher term says `adopt`,
//!    and
//!    within a term the node stays the same.
//! 5. It is signed by active keys of its term's node, with all algorithms that the policy requires,
//!    and with all for batches of which the node has active keys.
//! 6. A checkpoint is of this volume and place, of the term of the anchor before it, of an epoch
//!    that is anchored, and not older than the last state; it is signed as an anchor is, and with
//!    the node's algorithms for checkpoints.
//!
//! A local ledger has notes and inspections only. Those are signed by the node, and are checked if
//! the verifier was handed its keys.

use hn4::types::{ChainHash, Epoch, LogOffset, NodeId, Term, VolumeId};

use super::{Body, LedgerHeader, Record, RecordError, Scope};
use crate::anchor::{Anchor, Phase, SignedAnchor, StateAt};
use crate::checkpoint::{Checkpoint, SignedCheckpoint};
use crate::fold::{ConsistencyProof, FoldError, Folder, Head, Kind};
use crate::hash::Digest;
use crate::inspection::SignedInspection;
use crate::sign::keyring::{KeyError, Keyring};
use crate::sign::{Algorithm, KeyId, PublicKey, Signature};

/// Signatures that a verifier insists on, beside Ed25519.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    /// On every anchor.
    pub every_batch: Vec<Algorithm>,
    /// On checkpoints, too.
    pub checkpoints: Vec<Algorithm>,
}

impl Policy {
    /// What an anchor or a checkpoint must carry beside Ed25519.
    #[must_use]
    pub fn required(&self, is_checkpoint: bool) -> Vec<Algorithm> {
        let extra = self.checkpoints.iter().filter(|_| is_checkpoint);
        self.every_batch.iter().chain(extra).copied().collect()
    }
}

/// Why a record does not belong into the ledger.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The bytes are no record.
    #[error("record {index}: {source}")]
    Record {
        /// The index that was expected.
        index: u64,
        /// What is wrong.
        source: RecordError,
    },
    /// A record is missing, doubled or out of order.
    #[error("record {found} where record {expected} must follow")]
    Index {
        /// The index that was expected.
        expected: u64,
        /// The one that came.
        found: u64,
    },
    /// The record continues another history.
    #[error("record {0} names another record before it: a fork, or swapped records")]
    Previous(u64),
    /// The record is of a kind that this ledger does not hold.
    #[error("record {0} does not belong into a ledger of this scope")]
    Scope(u64),
    /// An anchor does not fit.
    #[error("the anchor in record {index} does not continue the ledger: {part} {problem}")]
    Anchor {
        /// Its record.
        index: u64,
        /// The part that does not fit.
        part: &'static str,
        /// In which way.
        problem: &'static str,
    },
    /// A checkpoint does not fit.
    #[error("the checkpoint in record {index} does not fit the ledger: its {part} is another")]
    Checkpoint {
        /// Its record.
        index: u64,
        /// The part that does not fit.
        part: &'static str,
    },
    /// A key or signature is wrong.
    #[error("record {index}: {source}")]
    Key {
        /// The record.
        index: u64,
        /// What is wrong.
        source: KeyError,
    },
    /// The ledger does not lead to a key that is trusted.
    #[error("no trusted key signed this ledger; it begins with key {first:?}")]
    Untrusted {
        /// The key that record 0 enrols.
        first: Option<KeyId>,
    },
    /// The ledger does not contain the history that was seen before.
    #[error("the ledger contradicts its head of {size} records that was trusted before: a fork")]
    Fork {
        /// Size of the trusted head.
        size: u64,
    },
}

/// What the next anchor must continue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LastAnchor {
    /// Hash of the anchor.
    pub hash: Digest,
    /// Its last epoch.
    pub last: Epoch,
    /// Hash of that epoch's frame header.
    pub chain: ChainHash,
    /// End of that epoch's frame in the log.
    pub end: LogOffset,
    /// The term it was made in.
    pub term: Term,
}

/// Verifies a ledger record by record.
#[derive(Clone, Debug)]
pub struct Verifier {
    volume: VolumeId,
    scope: Scope,
    policy: Policy,
    next_index: u64,
    previous: Digest,
    keyring: Keyring,
    first_key: Option<KeyId>,
    last_signers: Vec<KeyId>,
    anchor: Option<LastAnchor>,
    is_segment: bool,
    state: Option<StateAt>,
    vouched: Option<Epoch>,
    fold: Folder,
    pinned: Option<Head>,
}

impl Verifier {
    /// For a ledger from its first record on.
    #[must_use]
    pub fn new(header: &LedgerHeader, policy: Policy) -> Self {
        Self {
            volume: header.volume,
            scope: header.scope,
            policy,
            next_index: 0,
            previous: header.hash(),
            keyring: Keyring::new(),
            first_key: None,
            last_signers: Vec::new(),
            anchor: None,
            is_segment: false,
            state: None,
            vouched: None,
            fold: Folder::new(Kind::Ledger),
            pinned: None,
        }
    }

    /// For a part of a shared ledger that begins with `first`, where `trusted` keys may sign.
    #[must_use]
    pub fn segment(
        volume: VolumeId,
        first: &Record,
        trusted: &[PublicKey],
        policy: Policy,
    ) -> Self {
        let header = LedgerHeader {
            scope: Scope::Shared,
            volume,
            created_ms: 0,
        };
        Self {
            next_index: first.index,
            previous: first.previous,
            keyring: Keyring::trusting(trusted),
            is_segment: true,
            ..Self::new(&header, policy)
        }
    }

    /// Checks the signatures of a local ledger, which must be by these keys.
    #[must_use]
    pub fn trusting(mut self, keys: &[PublicKey]) -> Self {
        self.keyring = Keyring::trusting(keys);
        self
    }

    /// Insists that the first `head.size` records are those that were seen before.
    #[must_use]
    pub fn pinned_to(mut self, head: Head) -> Self {
        self.pinned = Some(head);
        self
    }

    /// Index of the next record.
    #[must_use]
    pub fn next_index(&self) -> u64 {
        self.next_index
    }

    /// Hash of the last record, or of the header.
    #[must_use]
    pub fn previous(&self) -> Digest {
        self.previous
    }

    /// Hash of the last anchor; [`Digest::ZERO`] before the first.
    #[must_use]
    pub fn last_anchor(&self) -> Digest {
        self.anchor.map_or(Digest::ZERO, |anchor| anchor.hash)
    }

    /// The last anchored epoch and the end of its frame in the log.
    #[must_use]
    pub fn anchored(&self) -> Option<(Epoch, LogOffset)> {
        self.anchor.map(|anchor| (anchor.last, anchor.end))
    }

    /// The last anchor, as far as the next one must continue it.
    #[must_use]
    pub fn last(&self) -> Option<LastAnchor> {
        self.anchor
    }

    /// The newest anchored state root.
    #[must_use]
    pub fn state(&self) -> Option<StateAt> {
        self.state
    }

    /// The epoch of the last checkpoint.
    #[must_use]
    pub fn vouched(&self) -> Option<Epoch> {
        self.vouched
    }

    /// The keys as they are now.
    #[must_use]
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// Size and root over the hashes of all records so far.
    #[must_use]
    pub fn head(&self) -> Head {
        self.fold.head()
    }

    /// Encodes the record that would follow. [`Self::push`] it before it is written.
    #[must_use]
    pub fn encode_next(&self, time_ms: u64, body: &Body) -> Vec<u8> {
        Record::encode(self.next_index, time_ms, &self.previous, body)
    }

    /// Decodes and takes one record, which must be all of `bytes`.
    ///
    /// # Errors
    /// [`LedgerError`]; the verifier is unchanged then.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> Result<Record, LedgerError> {
        let index = self.next_index;
        let wrong = |source| LedgerError::Record { index, source };
        let (record, length) = Record::decode(bytes).map_err(wrong)?;
        if length != bytes.len() {
            return Err(wrong(RecordError::Head));
        }
        self.push(&record)?;
        Ok(record)
    }

    /// Takes the next record.
    ///
    /// # Errors
    /// [`LedgerError`]; the verifier is unchanged then, except after [`LedgerError::Fork`], after
    /// which it is of no use.
    pub fn push(&mut self, record: &Record) -> Result<(), LedgerError> {
        let (expected, found) = (self.next_index, record.index);
        if expected != found {
            return Err(LedgerError::Index { expected, found });
        }
        if record.previous != self.previous {
            return Err(LedgerError::Previous(found));
        }
        let is_shared = self.scope == Scope::Shared;
        let is_first = found == 0 && !self.is_segment;
        match &record.body {
            Body::Key(change) if is_shared => {
                let at = (self.volume, found, &self.previous);
                let applied = self.keyring.apply(change, at);
                applied.map_err(|source| LedgerError::Key {
                    index: found,
                    source,
                })?;
                if let (true, Some((_, public))) = (is_first, &change.enroll) {
                    self.first_key = Some(public.id());
                }
            }
            Body::Anchor(signed) if is_shared && !is_first => self.push_anchor(found, signed)?,
            Body::Note(_) if !(is_shared && is_first) => {}
            Body::Checkpoint(signed) if is_shared && !is_first => {
                self.push_checkpoint(found, signed)?;
            }
            Body::Inspection(signed) if !is_shared => self.check_inspection(found, signed)?,
            _ => return Err(LedgerError::Scope(found)),
        }
        self.fold.push(record.hash);
        (self.next_index, self.previous) = (found + 1, record.hash);
        match self.pinned {
            Some(head) if head.size == self.fold.count() && head != self.fold.head() => {
                Err(LedgerError::Fork { size: head.size })
            }
            _ => Ok(()),
        }
    }

    fn push_anchor(&mut self, index: u64, signed: &SignedAnchor) -> Result<(), LedgerError> {
        let anchor = &signed.anchor;
        self.check_place(index, anchor)?;
        let is_checkpoint = anchor.phase == Phase::Checkpoint;
        let by = (anchor.term.node, is_checkpoint);
        self.check_signatures(index, &anchor.hash(), by, &signed.signatures)?;
        self.state = anchor.state.or(self.state);
        self.anchor = Some(LastAnchor {
            hash: anchor.hash(),
            last: anchor.last,
            chain: anchor.chain,
            end: anchor.end,
            term: anchor.term,
        });
        Ok(())
    }

    fn check_signatures(
        &mut self,
        index: u64,
        digest: &Digest,
        (node, is_checkpoint): (NodeId, bool),
        signatures: &[Signature],
    ) -> Result<(), LedgerError> {
        let mut required = self.policy.required(is_checkpoint);
        required.extend(self.keyring.owed(node, is_checkpoint));
        let verified = self.keyring.verify(digest, node, signatures, &required);
        verified.map_err(|source| LedgerError::Key { index, source })?;
        self.last_signers = signatures.iter().map(Signature::key).collect();
        Ok(())
    }

    fn push_checkpoint(
        &mut self,
        index: u64,
        signed: &SignedCheckpoint,
    ) -> Result<(), LedgerError> {
        let checkpoint = &signed.checkpoint;
        if let Some(part) = self.misplaced(index, checkpoint) {
            return Err(LedgerError::Checkpoint { index, part });
        }
        let by = (checkpoint.term.node, true);
        self.check_signatures(index, &checkpoint.hash(), by, &signed.signatures)?;
        let epoch = checkpoint.epoch;
        let state = checkpoint.root.map(|root| StateAt { epoch, root });
        self.state = state.or(self.state);
        self.vouched = Some(epoch);
        Ok(())
    }

    /// The first part of a checkpoint that does not fit here.
    fn misplaced(&self, index: u64, checkpoint: &Checkpoint) -> Option<&'static str> {
        let Some(anchor) = self.anchor else {
            return Some("epoch");
        };
        let epoch = checkpoint.epoch;
        let newest = self.state.map_or(Epoch(0), |state| state.epoch);
        let checks = [
            (checkpoint.volume == self.volume, "volume"),
            (checkpoint.step == index, "step"),
            (
                checkpoint.ledger_previous == self.previous,
                "record before it",
            ),
            (checkpoint.term == anchor.term, "term"),
            (newest <= epoch && epoch <= anchor.last, "epoch"),
            (
                epoch < anchor.last || checkpoint.chain == anchor.chain,
                "chain of frame headers",
            ),
        ];
        let wrong = checks.into_iter().find(|(is_good, _)| !is_good);
        wrong.map(|(_, part)| part)
    }

    fn check_inspection(&self, index: u64, signed: &SignedInspection) -> Result<(), LedgerError> {
        let inspection = &signed.inspection;
        if inspection.volume != self.volume {
            return Err(LedgerError::Scope(index));
        }
        if self.keyring.is_empty() {
            return Ok(());
        }
        let digest = inspection.digest(index, &self.previous);
        let required = self.policy.required(true);
        let (node, signatures) = (inspection.node, signed.signatures.as_slice());
        let verified = self.keyring.verify(&digest, node, signatures, &required);
        verified.map_err(|source| LedgerError::Key { index, source })
    }

    fn check_place(&self, index: u64, anchor: &Anchor) -> Result<(), LedgerError> {
        let wrong = |part, problem| {
            Err(LedgerError::Anchor {
                index,
                part,
                problem,
            })
        };
        if anchor.volume != self.volume {
            return wrong("volume", "is another one");
        }
        if anchor.step != index {
            return wrong("idb", "names another step");
        }
        if anchor.ledger_previous != self.previous {
            return wrong("idb", "names another record before it");
        }
        let Some(before) = self.anchor else {
            // A part of a ledger may begin anywhere; a whole one begins with nothing before it.
            return match self.is_segment || anchor.previous == Digest::ZERO {
                true => Ok(()),
                false => wrong("idb", "names an anchor before the first"),
            };
        };
        if anchor.previous != before.hash {
            return wrong("idb", "names another anchor before it");
        }
        if anchor.first != before.last.next() {
            return wrong("scxq2", "leaves a gap between epochs, or overlaps");
        }
        if anchor.start != before.end {
            return wrong("cm1", "leaves a gap between log offsets, or overlaps");
        }
        let (term, last) = (anchor.term, before.term);
        if term.counter < last.counter {
            return wrong("term", "is lower than the one before");
        }
        if term.counter == last.counter && term.node != last.node {
            return wrong("term", "has two nodes");
        }
        if term.counter > last.counter && anchor.phase != Phase::Adopt {
            return wrong("phase", "of a new term's first anchor must be adopt");
        }
        Ok(())
    }

    /// Ends the verification of a whole shared ledger: it is good if `trusted` holds the key that
    /// record 0 enrols, or a key that signed the last anchor, which binds everything before it.
    ///
    /// # Errors
    /// [`LedgerError::Untrusted`], or [`LedgerError::Fork`] if a pinned head was not reached.
    pub fn finish(&self, trusted: &[PublicKey]) -> Result<Head, LedgerError> {
        if let Some(head) = self.pinned
            && self.fold.count() < head.size
        {
            return Err(LedgerError::Fork { size: head.size });
        }
        let is_trusted = |key: &KeyId| trusted.iter().any(|public| public.id() == *key);
        let mut leads = self.first_key.iter().chain(&self.last_signers);
        if leads.any(is_trusted) {
            Ok(self.fold.head())
        } else {
            Err(LedgerError::Untrusted {
                first: self.first_key,
            })
        }
    }
}

/// Checks that a ledger's head grew out of an older one, as nodes do that watch each other's
/// ledgers.
///
/// # Errors
/// [`FoldError`] if it did not: a fork, of which both histories are to be kept.
pub fn grew(old: &Head, new: &Head, proof: &ConsistencyProof) -> Result<(), FoldError> {
    proof.verify(old, new)
}
