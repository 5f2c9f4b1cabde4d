//! Whether what a primary sends may take the place of what the own ledger holds.
//!
//! A cut takes records back, and with them the end of a key's right. So a branch is looked at
//! before the ledger is touched: its beginning must fit where it would go, and be signed by keys
//! that the own ledger does not hold as retired. Else whoever stole an old key could have the
//! record taken back that ended its right.

use std::collections::VecDeque;

use super::{Out, PeerState, Prover, ProverError};
use crate::ledger::file::LedgerMedium;
use crate::ledger::verify::{Policy, Verifier};
use crate::ledger::{Body, LedgerHeader, Record};
use crate::sign::keyring::Keyring;
use crate::sign::{Algorithm, KeyId, PublicKey};

/// Keys whose right had ended before a cut took that back, and the records that had ended it.
pub(super) type Revived = Vec<(KeyId, u64)>;

impl<M: LedgerMedium> Prover<M> {
    /// Makes the own ledger such that records from `first` on can follow, if that is legal: a
    /// history is superseded by a higher term only, and by keys that still may sign.
    pub(super) fn make_way(
        &mut self,
        header: &LedgerHeader,
        (first, records): (u64, &VecDeque<(Record, Vec<u8>)>),
        source: PeerState,
    ) -> Result<Result<(), String>, ProverError> {
        if header.volume != self.identity.volume {
            return Ok(Err("a ledger of another volume".to_owned()));
        }
        let last = self.tip.as_ref().and_then(Verifier::last);
        let term = last.map_or(0, |last| last.term.counter);
        let ours = self.ledger.header().copied();
        let same = ours.is_some_and(|ours| ours.hash() == header.hash());
        if same && first == self.ledger.records() {
            return Ok(Ok(()));
        }
        if let Some(at) = self.begins_with_retired(records.front()) {
            let why = format!("its ledger begins with a key that was retired at step {at} of ours");
            return Ok(Err(why));
        }
        if same && first < self.ledger.records() {
            if last.is_some() && source.term.counter <= term {
                let why = format!("it contradicts record {first} of the ledger in the same term");
                return Ok(Err(why));
            }
            let revived = match self.judge_branch(first, records)? {
                Ok(revived) => revived,
                Err(why) => return Ok(Err(why)),
            };
            let text = format!("the ledger from record {first} on is superseded, and set aside");
            self.out.push_back(Out::Notice(text));
            self.tip = self.ledger.cut(first)?;
            self.insists.cut(first);
            self.follow.revived = revived;
        } else {
            // In one term there is one primary, and its present ledger is the one that it sends.
            // Its clock does not tell which is newer: it may have been set back.
            if same || source.term.counter < term {
                return Ok(Err("a ledger that does not continue ours".to_owned()));
            }
            let mut anew = Verifier::new(header, Policy::default());
            if let Some(Err(error)) = records.front().map(|(record, _)| anew.push(record)) {
                return Ok(Err(format!("a new ledger that breaks a rule: {error}")));
            }
            if ours.is_some() {
                let text = "the primary has begun a new ledger; the old one is set aside";
                self.out.push_back(Out::Notice(text.to_owned()));
            }
            self.tip = Some(self.ledger.renew(header)?);
            self.insists.renew();
        }
        // What had enrolled the own keys may be gone with what was set aside.
        self.offer_keys()?;
        Ok(Ok(()))
    }

    /// Whoever begins a new ledger with a key whose right has ended may have stolen it.
    fn begins_with_retired(&self, beginning: Option<&(Record, Vec<u8>)>) -> Option<u64> {
        let (record, _) = beginning.filter(|(record, _)| record.index == 0)?;
        let Body::Key(change) = &record.body else {
            return None;
        };
        let (_, public) = change.enroll.as_ref()?;
        let ours = self.tip.as_ref()?.keyring();
        ours.retired_at(public.id())
    }

    /// Looks at a branch that would take the place of the records from `first` on: up to its first
    /// record that somebody signed, for notes say nothing about who wrote them. Gives the keys that
    /// the cut would bring back; what else comes with the branch is not to be signed by them.
    fn judge_branch(
        &self,
        first: u64,
        records: &VecDeque<(Record, Vec<u8>)>,
    ) -> Result<Result<Revived, String>, ProverError> {
        let (Some(mut branch), Some(ours)) = (self.ledger.tip_at(first)?, &self.tip) else {
            return Ok(Ok(Revived::new()));
        };
        let ours = ours.keyring();
        let revived: Revived = ours.retired_from(first).collect();
        for (record, _) in records {
            if let Err(error) = branch.push(record) {
                let why = format!("what would supersede record {first} breaks a rule: {error}");
                return Ok(Err(why));
            }
            if matches!(record.body, Body::Note(_) | Body::Inspection(_)) {
                continue;
            }
            return Ok(match signed_by(record, &revived) {
                None => Ok(revived),
                Some(_) if replaces_all(record, ours, branch.keyring(), &revived) => {
                    Ok(Revived::new())
                }
                Some((key, at)) => Err(format!(
                    "record {} of its ledger is signed by key {key}, which was retired at step \
                     {at} of ours",
                    record.index
                )),
            });
        }
        Ok(Err(format!(
            "what would supersede record {first} is not signed"
        )))
    }
}

/// The first of these keys that signed a record.
pub(super) fn signed_by(record: &Record, keys: &[(KeyId, u64)]) -> Option<(KeyId, u64)> {
    let signers = record.body.signers();
    let mut keys = keys.iter().copied();
    keys.find(|(key, _)| signers.contains(key))
}

/// Whether a change of keys says what the own ledger says, too, at another place, and leaves no
/// Ed25519 key that was retired there: a node that never heard that its key was replaced begins
/// with that, signed by its old key, and nothing can be signed by the old key afterwards.
fn replaces_all(record: &Record, ours: &Keyring, branch: &Keyring, revived: &Revived) -> bool {
    let Body::Key(change) = &record.body else {
        return false;
    };
    let Some((node, public)) = &change.enroll else {
        return false;
    };
    let is_back = |public: &PublicKey| {
        let mut keys = revived.iter();
        public.algorithm() == Algorithm::Ed25519 && keys.any(|(key, _)| *key == public.id())
    };
    ours.active_of(*node).contains(&public) && !branch.active().any(|(public, _)| is_back(public))
}
