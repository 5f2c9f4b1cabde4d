//! What a replica holds of its primary's ledger behind what both have in common.
//!
//! It comes in messages, and the record that binds a run may be in a later message than those it
//! binds. So a run that nothing binds yet is kept, up to [`MAX_BYTES`], and the replica is asked
//! for what follows, as far as it has said that it holds more. Its own question waits until then:
//! the answer would contradict what it holds, and it objects to that once in a session.
//!
//! Anybody can send records that nobody asked for, so little is done before they say something:
//! they must follow the own ledger, and one of them must be signed by this node, at its place.
//! Only then, and once for a peer in a session, is the own ledger verified up to there.

use std::collections::VecDeque;

use super::{Now, Prover, ProverError};
use crate::hash::Digest;
use crate::ledger::file::LedgerMedium;
use crate::ledger::verify::Verifier;
use crate::ledger::{Body, LedgerHeader, Record};
use crate::sign::{KeyId, PublicKey};

/// Most bytes that are kept of a peer while nothing binds them.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// Records that follow each other, each with its bytes.
pub(super) type Run = VecDeque<(Record, Vec<u8>)>;

/// Whose signatures bind the records before them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Bound {
    /// Of the keys that this node signs with now.
    PresentKeys,
    /// Of any key that was this node's at that place.
    AnyOwnKey,
}

/// What a primary knows of a peer's copy of its ledger, in one session.
#[derive(Debug, Default)]
pub(super) struct Theirs {
    /// The newest record that it has named.
    newest: Option<u64>,
    /// It was asked what follows the own ledger.
    is_asked: bool,
    /// The own ledger was verified for what it holds, or it held too much that nothing binds.
    is_judged: bool,
    /// What it has shown, and nothing binds yet.
    shown: Option<Shown>,
}

impl Theirs {
    /// It names places of the own ledger, newest first, or none if it has another one. A place
    /// alone need not be its newest: it asks so for what follows there, too.
    pub(super) fn names(&mut self, places: &[(u64, Digest)]) {
        let newest = places.first().map(|(index, _)| *index);
        self.newest = match places.len() {
            1 => self.newest.max(newest),
            _ => newest,
        };
        let newest = self.newest;
        // It does not hold any more what it had shown, or nothing behind that.
        self.shown.take_if(|shown| newest < Some(shown.end()));
    }

    /// The newest record that it has named.
    pub(super) fn newest(&self) -> Option<u64> {
        self.newest
    }

    /// More is to come of what it has shown.
    pub(super) fn is_showing(&self) -> bool {
        self.shown.is_some()
    }

    pub(super) fn ask(&mut self) {
        self.is_asked = true;
    }

    /// The own ledger is another one.
    pub(super) fn forget_ledger(&mut self) {
        (self.newest, self.shown) = (None, None);
    }

    /// The term is another one.
    pub(super) fn forget_term(&mut self) {
        (self.is_judged, self.shown) = (false, None);
    }
}

/// A run that a peer has shown; it is never empty.
#[derive(Debug)]
pub(super) struct Shown {
    records: Run,
    bytes: usize,
    /// The ledger with as many of them as are verified.
    tip: Option<Verifier>,
    /// Those among them that this node signed in its present term.
    own: Vec<u64>,
}

impl Shown {
    /// A run that follows a record with this hash.
    fn new(before: Digest, records: Run) -> Option<Self> {
        let fits = !records.is_empty() && follows(before, &records);
        fits.then(|| Self {
            bytes: records.iter().map(|(_, bytes)| bytes.len()).sum(),
            records,
            tip: None,
            own: Vec::new(),
        })
    }

    /// Index of the record that would follow.
    fn end(&self) -> u64 {
        let last = self.records.back();
        last.map_or(0, |(record, _)| record.index + 1)
    }

    fn hash_of(&self, index: u64) -> Option<Digest> {
        let (first, _) = self.records.front()?;
        let at = usize::try_from(index.checked_sub(first.index)?).ok()?;
        self.records.get(at).map(|(record, _)| record.hash)
    }

    /// Whether a record is in it, or would follow.
    fn meets(&self, record: &Record) -> bool {
        let before = record.index.checked_sub(1);
        let before = before.and_then(|before| self.hash_of(before));
        before == Some(record.previous) || self.hash_of(record.index) == Some(record.hash)
    }

    /// Takes what follows among these: whether there was anything.
    fn extend(&mut self, mut records: Run) -> bool {
        while let Some((record, _)) = records.front()
            && self.hash_of(record.index) == Some(record.hash)
        {
            records.pop_front();
        }
        let (Some((next, _)), Some((last, _))) = (records.front(), self.records.back()) else {
            return false;
        };
        let fits = next.index == last.index + 1 && follows(last.hash, &records);
        if fits {
            self.bytes += records.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
            self.records.append(&mut records);
        }
        fits
    }
}

/// Whether each of these names the one before it, and the first this.
fn follows(mut before: Digest, records: &Run) -> bool {
    let mut records = records.iter();
    records.all(|(record, _)| std::mem::replace(&mut before, record.hash) == record.previous)
}

impl<M: LedgerMedium> Prover<M> {
    /// Records that a replica holds behind what it has in common with the own ledger.
    pub(super) fn recalled(
        &mut self,
        now: Now,
        peer: u8,
        header: &LedgerHeader,
        (first, records): (u64, Run),
    ) -> Result<(), ProverError> {
        let theirs = self.waiting.theirs(peer);
        let is_asked = theirs.is_some_and(|theirs| theirs.is_asked);
        if !self.is_ours(&header.hash()) || !self.placed {
            return Ok(());
        }
        let (first, records) = self.unknown(first, records)?;
        if first >= self.ledger.records() && !is_asked {
            return Ok(());
        }
        match self.joined(peer, records)? {
            Some((shown, is_more)) => self.weigh(now, peer, shown, is_more),
            None => Ok(()),
        }
    }

    /// These records with what the peer has shown before, and whether they add to that.
    fn joined(&mut self, peer: u8, records: Run) -> Result<Option<(Shown, bool)>, ProverError> {
        let Some(theirs) = self.waiting.theirs(peer) else {
            return Ok(None);
        };
        let first = records.front().map(|(record, _)| record);
        if let Some(mut shown) = theirs.shown.take()
            && first.is_none_or(|first| shown.meets(first))
        {
            let is_more = shown.extend(records);
            return Ok(Some((shown, is_more)));
        }
        let Some(first) = first.filter(|_| !theirs.is_judged) else {
            return Ok(None);
        };
        let before = match first.index.checked_sub(1) {
            Some(before) => self.ledger.hash_of(before)?,
            None => self.ledger.header().map(LedgerHeader::hash),
        };
        let shown = before.and_then(|before| Shown::new(before, records));
        Ok(shown.map(|shown| (shown, true)))
    }

    /// Decides about what a peer has shown, or keeps it until more has come.
    fn weigh(
        &mut self,
        now: Now,
        peer: u8,
        mut shown: Shown,
        is_more: bool,
    ) -> Result<(), ProverError> {
        // Another peer may have given some of it back meanwhile.
        let first = shown.records.front().map_or(0, |(record, _)| record.index);
        let (first, records) = self.unknown(first, shown.records)?;
        shown.records = records;
        let Some((last, _)) = shown.records.back() else {
            return self.serve(peer);
        };
        let place = (last.index, last.hash);
        let is_twice = first < self.ledger.records();
        let fits = self.verify_shown(peer, &mut shown, is_twice.then_some(first))?;
        if is_twice && self.bound(&shown, Bound::AnyOwnKey).is_some() {
            return self.signed_twice(now, peer, first);
        }
        if let Some(last) = self.bound(&shown, Bound::PresentKeys).filter(|_| !is_twice) {
            shown.records.retain(|(record, _)| record.index <= last);
            return self.given_back(now, peer, shown.records);
        }
        let is_small = shown.bytes <= MAX_BYTES;
        let Some(theirs) = self.waiting.theirs(peer) else {
            return Ok(());
        };
        theirs.is_judged |= !is_small;
        if !fits || !is_small || theirs.newest < Some(shown.end()) {
            return self.serve(peer);
        }
        theirs.shown = Some(shown);
        if is_more {
            self.ask_peer(peer, vec![place])?;
        }
        Ok(())
    }

    /// Verifies what is new of it, behind the own tip, or else behind what the own ledger holds
    /// before this place, if it is worth that. Whether all fits as far as it was looked at; what
    /// does not is left out.
    fn verify_shown(
        &mut self,
        peer: u8,
        shown: &mut Shown,
        instead_of: Option<u64>,
    ) -> Result<bool, ProverError> {
        shown.tip = match (shown.tip.take(), instead_of) {
            (None, None) => self.tip.clone(),
            (None, Some(first)) => match self.claims(&shown.records) {
                Some(true) => {
                    let theirs = self.waiting.theirs(peer);
                    theirs
                        .into_iter()
                        .for_each(|theirs| theirs.is_judged = true);
                    self.ledger.tip_at(first)?
                }
                claimed => return Ok(claimed.is_none()),
            },
            (tip, _) => tip,
        };
        let Some(tip) = shown.tip.as_mut() else {
            return Ok(false);
        };
        for (record, _) in &shown.records {
            if record.index < tip.next_index() {
                continue;
            }
            let is_own = self.is_own(tip, record);
            if tip.push(record).is_err() {
                break;
            }
            shown.own.extend(is_own.then_some(record.index));
        }
        let (all, end) = (shown.records.len(), tip.next_index());
        shown.records.retain(|(record, _)| record.index < end);
        Ok(shown.records.len() == all)
    }

    /// Whether a record, which would follow `tip`, is signed by keys of this node, and in its
    /// present term. In which term a change of keys was made, the ledger before it says.
    fn is_own(&self, tip: &Verifier, record: &Record) -> bool {
        let term = match &record.body {
            Body::Anchor(signed) => Some(signed.anchor.term),
            Body::Checkpoint(signed) => Some(signed.checkpoint.term),
            Body::Key(_) => tip.last().map(|last| last.term),
            Body::Note(_) | Body::Inspection(_) => None,
        };
        let ours: Vec<KeyId> = tip
            .keyring()
            .active_of(self.node)
            .into_iter()
            .map(PublicKey::id)
            .collect();
        let signers = record.body.signers();
        let is_signed = !signers.is_empty() && signers.iter().all(|key| ours.contains(key));
        is_signed && term.is_some() && term == self.primary
    }

    /// The last of these records that binds those before it. A change that enrols a key is not
    /// bound by that key: it signs its offer, which names no place.
    fn bound(&self, shown: &Shown, by: Bound) -> Option<u64> {
        let is_wanted = |key: &KeyId| {
            let mut wanted = self.keys.wanted().iter();
            wanted.any(|it| it.public().id() == *key)
        };
        let binds = |record: &&Record| {
            shown.own.binary_search(&record.index).is_ok()
                && (by == Bound::AnyOwnKey || record.body.signers().iter().all(is_wanted))
        };
        let mut records = shown.records.iter().rev().map(|(record, _)| record);
        records.find(binds).map(|record| record.index)
    }

    /// Whether this node has signed one of these records at its place, in its present term as far
    /// as it can be told; `None` if none says so. Signatures alone can be copied from elsewhere.
    fn claims(&self, records: &Run) -> Option<bool> {
        let mut records = records.iter();
        records.find_map(|(record, _)| {
            let place = (record.index, record.previous);
            let (digest, says, signatures) = match &record.body {
                Body::Anchor(signed) if Some(signed.anchor.term) == self.primary => {
                    let it = &signed.anchor;
                    let says = (it.step, it.ledger_previous);
                    (it.hash(), says, signed.signatures.as_slice())
                }
                Body::Checkpoint(signed) if Some(signed.checkpoint.term) == self.primary => {
                    let it = &signed.checkpoint;
                    let says = (it.step, it.ledger_previous);
                    (it.hash(), says, signed.signatures.as_slice())
                }
                Body::Key(change) => {
                    let digest = change.digest(self.identity.volume, place.0, &place.1);
                    (digest, place, change.authority())
                }
                _ => return None,
            };
            let own = |key| self.own_key(key, record.index);
            let mut signatures = signatures.iter();
            let (signature, public) = signatures.find_map(|it| Some((it, own(it.key())?)))?;
            Some(says == place && public.verify(&digest, signature).is_ok())
        })
    }

    /// A key of this node that could sign at a place, as far as the own ledger or the node knows.
    fn own_key(&self, key: KeyId, at: u64) -> Option<&PublicKey> {
        let ring = self.tip.as_ref()?.keyring();
        if ring.retired_at(key).is_some_and(|retired| retired < at) {
            return None;
        }
        ring.key_of(self.node, key)
            .or_else(|| self.keys.public(key))
    }
}
