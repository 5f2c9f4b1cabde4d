//! A primary that has lost the end of its ledger, and does not know it.
//!
//! A record that rots at the end of a file looks like a torn append, and one that a disk never
//! wrote leaves no trace. Such a record may have been heard of: then replicas hold it, and to sign
//! its epochs anew would make two histories of one term, of which nobody takes the second.
//!
//! - What follows the own ledger at a replica, and this node signed in this term, is taken back if
//!   the own log agrees, as if it had never been lost. After a torn tail nothing is signed for
//!   [`PATIENCE`], so that a replica can tell.
//! - If it was signed anew already, the replica that holds what was signed first objects instead of
//!   giving way. That it was signed twice is then beyond doubt, and this node begins a new ledger:
//!   both histories are kept, wherever they were. The new one says again what the last anchor said,
//!   so that nobody has to wait for the next write.
//!
//! Only what this node's own keys signed in its present term counts for either. What is taken back
//! must be bound by the keys that it signs with now. That it was signed twice may be shown with a
//! key that was retired since: a replica may have been away for long, and whoever stole such a key
//! and is a replica gains a new ledger of the true node by that, and nothing else.

use std::collections::VecDeque;
use std::time::Duration;

use hn4::types::Term;

use super::follow::{Verdict, verdict};
use super::message::{Message, RECORD_BYTES};
use super::sign::{answer, places};
use super::{Now, Out, PeerState, Prover, ProverError};
use crate::anchor::{Anchor, Phase, SignedAnchor};
use crate::hash::Digest;
use crate::ledger::file::LedgerMedium;
use crate::ledger::verify::Verifier;
use crate::ledger::{Body, LedgerHeader, Record};
use crate::sign::KeyId;
use crate::sign::keyring::KeyOffer;

/// So long nothing is signed when the end of the ledger was cut off.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// Offers of keys that wait for that.
const MAX_OFFERS: usize = 64;

/// Records that follow each other, each with its bytes.
type Run = VecDeque<(Record, Vec<u8>)>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Recall {
    /// Bytes that were cut off the ledger and have not come back.
    missing: u64,
    /// Nothing is signed before.
    until: Option<Duration>,
    /// What a replica has sent and the own log does not reach to yet.
    pending: Run,
    /// What came meanwhile.
    offers: VecDeque<(u8, KeyOffer)>,
}

impl Recall {
    pub(super) fn of(missing: u64) -> Self {
        Self {
            missing,
            ..Self::default()
        }
    }

    /// Nothing is to be signed yet.
    pub(super) fn waits(&self) -> bool {
        self.until.is_some()
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        self.until
    }

    /// This node would sign now: whether it is to wait.
    pub(super) fn begin(&mut self, now: Duration) -> bool {
        if self.missing > 0 {
            self.until.get_or_insert(now.saturating_add(PATIENCE));
        }
        self.waits()
    }

    /// Keeps an offer for later.
    pub(super) fn keep(&mut self, peer: u8, offer: KeyOffer) {
        if self.offers.len() < MAX_OFFERS {
            self.offers.push_back((peer, offer));
        }
    }
}

impl<M: LedgerMedium> Prover<M> {
    /// Signs again, whatever is still missing.
    pub(super) fn stop_waiting(&mut self, now: Now) -> Result<(), ProverError> {
        let offers = std::mem::take(&mut self.recall).offers;
        self.begin_signing(now)?;
        let mut offers = offers.into_iter();
        offers.try_for_each(|(peer, offer)| self.enrol(now, peer, offer))
    }

    /// A replica asked from a place that the own ledger does not reach: asks it in turn.
    pub(super) fn ask_back(&mut self, peer: u8, newest: Option<u64>) -> Result<(), ProverError> {
        let Some(state) = self.waiting.state(peer).filter(|state| state.proves) else {
            return Ok(());
        };
        let header = self.ledger.header().map(LedgerHeader::hash);
        let is_longer = newest.is_some_and(|newest| newest >= self.ledger.records());
        if let Some(ledger) = header.filter(|_| is_longer) {
            let places = places(self, true)?;
            let have = Message::Have { ledger, places };
            self.send((peer, state.session), have.encode());
        }
        Ok(())
    }

    /// Whether a ledger with this header is the own one.
    pub(super) fn is_ours(&self, header: &Digest) -> bool {
        let ours = self.ledger.header().map(LedgerHeader::hash);
        ours == Some(*header)
    }

    /// Leaves out what the own ledger holds, too.
    pub(super) fn unknown(
        &self,
        mut first: u64,
        mut records: Run,
    ) -> Result<(u64, Run), ProverError> {
        while let Some((record, _)) = records.front()
            && self.ledger.hash_of(record.index)? == Some(record.hash)
        {
            first += 1;
            records.pop_front();
        }
        Ok((first, records))
    }

    /// A replica shows its primary what it holds.
    pub(super) fn show(
        &mut self,
        peer: u8,
        theirs: &Digest,
        places: &[(u64, Digest)],
    ) -> Result<(), ProverError> {
        let source = self.follow.proving_source();
        let Some(source) = source.filter(|(source, _)| *source == peer) else {
            return Ok(());
        };
        if let Some(records) = answer(&self.ledger, theirs, places)? {
            self.send(source, records.encode());
        }
        Ok(())
    }

    /// A primary names another record of a place than it has signed in the same term: it is shown
    /// what this ledger holds there, and asked once more. Whether it is to be answered: the second
    /// time in a session it is not.
    pub(super) fn object(&mut self, source: PeerState, first: u64) -> Result<bool, ProverError> {
        let last = self.tip.as_ref().and_then(Verifier::last);
        let in_term = last.is_some_and(|last| last.term.counter == source.term.counter);
        let (Some(to), Some(header)) = (self.follow.proving_source(), self.ledger.header()) else {
            return Ok(false);
        };
        if !in_term || std::mem::replace(&mut self.follow.objected, true) {
            return Ok(false);
        }
        let records = Message::Records {
            header: *header,
            first,
            bytes: self.ledger.read(first, RECORD_BYTES)?,
        };
        let text = format!(
            "the primary has signed record {first} of the ledger twice in one term; it is shown \
             what it had signed first"
        );
        self.out.push_back(Out::Notice(text));
        self.send(to, records.encode());
        self.ask(true)?;
        Ok(true)
    }

    /// Records that a replica holds behind what it has in common with the own ledger.
    pub(super) fn recalled(
        &mut self,
        now: Now,
        peer: u8,
        header: &LedgerHeader,
        (first, records): (u64, Run),
    ) -> Result<(), ProverError> {
        if !self.is_ours(&header.hash()) || !self.placed {
            return Ok(());
        }
        let (first, records) = self.unknown(first, records)?;
        let Some((record, _)) = records.front() else {
            return Ok(());
        };
        if first < self.ledger.records() {
            return self.signed_twice(now, peer, record.index, &records);
        }
        self.recall.pending = records;
        self.take_back(now, Some(peer))
    }

    /// How many of these records, which would follow `tip`, are bound by a signature that this node
    /// made in its present term; whoever signed those before it. In which term a change of keys was
    /// made, the ledger before it says. Keys that it does not sign with any more count only if
    /// `any_key`: what is taken back must be bound by its present ones. A change that enrols one of
    /// these does not bind by that: the new key signs its offer, which names no place.
    fn own_run(&self, tip: &Verifier, records: &Run, any_key: bool) -> usize {
        let wanted = self.keys.wanted();
        let is_wanted = |key: KeyId| wanted.iter().any(|it| it.public().id() == key);
        let mut next = tip.clone();
        let mut own = 0;
        for (at, (record, _)) in records.iter().enumerate() {
            let term = match &record.body {
                Body::Anchor(signed) => Some(signed.anchor.term),
                Body::Checkpoint(signed) => Some(signed.checkpoint.term),
                Body::Key(_) => next.last().map(|last| last.term),
                Body::Note(_) | Body::Inspection(_) => None,
            };
            let signers = record.body.signers();
            let ours = next.keyring().active_of(self.node);
            let is_own = |key: &KeyId| ours.iter().any(|public| public.id() == *key);
            let is_signed = !signers.is_empty() && signers.iter().all(is_own);
            let is_bound = any_key || signers.iter().all(|key| is_wanted(*key));
            if next.push(record).is_err() {
                break;
            }
            if is_signed && is_bound && term.is_some() && term == self.primary {
                own = at + 1;
            }
        }
        own
    }

    /// Takes back what was lost, as far as the own log agrees.
    pub(super) fn take_back(&mut self, now: Now, peer: Option<u8>) -> Result<(), ProverError> {
        let mut pending = std::mem::take(&mut self.recall.pending);
        let Some(mut tip) = self.tip.clone() else {
            return Ok(());
        };
        pending.truncate(self.own_run(&tip, &pending, false));
        let mut taken = Vec::new();
        while let Some((record, _)) = pending.front() {
            let verdict = match &record.body {
                Body::Anchor(signed) => verdict(&self.hashed, self.floor, &signed.anchor),
                _ => Verdict::Good,
            };
            match verdict {
                Verdict::Good => tip.push(record)?,
                Verdict::Wait => break,
                Verdict::Bad(why) => {
                    let text = format!("what a peer holds behind the ledger is left: {why}");
                    self.out.push_back(Out::Notice(text));
                    pending.clear();
                    break;
                }
            }
            taken.extend(pending.pop_front());
        }
        self.tip = Some(tip);
        if !pending.is_empty() {
            // The log is still being read.
            let until = now.time.saturating_add(PATIENCE);
            self.recall.until.get_or_insert(until);
            self.batcher = None;
        }
        self.recall.pending = pending;
        self.taken_back(now, peer, taken)
    }

    fn taken_back(
        &mut self,
        now: Now,
        peer: Option<u8>,
        taken: Vec<(Record, Vec<u8>)>,
    ) -> Result<(), ProverError> {
        let (records, bytes): (Vec<Record>, Vec<Vec<u8>>) = taken.into_iter().unzip();
        if records.is_empty() {
            return Ok(());
        }
        self.ledger.append(&bytes)?;
        let count = records.len();
        let text = format!(
            "the ledger had lost {count} records that this node signed; a peer had them, and they \
             are back"
        );
        self.out.push_back(Out::Notice(text));
        for record in &records {
            if let Body::Anchor(signed) = &record.body {
                let anchor = &signed.anchor;
                self.vouching.anchored(now.time, anchor.state.is_some());
                self.release_anchored(anchor.last);
                self.out.push_back(Out::Proven(anchor.last, anchor.chain));
            }
        }
        let bytes: usize = bytes.iter().map(Vec::len).sum();
        self.recall.missing = self.recall.missing.saturating_sub(bytes as u64);
        if let Some(peer) = peer {
            // It may have more.
            self.ask_back(peer, Some(u64::MAX))?;
        }
        let misses = self.recall.missing > 0 || !self.recall.pending.is_empty();
        if self.recall.waits() && misses {
            return Ok(());
        }
        self.stop_waiting(now)
    }

    /// A replica holds another record of this place. If this node signed that, too, it has signed
    /// twice, and a ledger that all can follow begins.
    fn signed_twice(
        &mut self,
        now: Now,
        peer: u8,
        index: u64,
        records: &Run,
    ) -> Result<(), ProverError> {
        let (Some(term), Some(before)) = (self.primary, self.ledger.tip_at(index)?) else {
            return Ok(());
        };
        if self.own_run(&before, records, true) == 0 {
            return Ok(());
        }
        let last = self.newest_anchor()?;
        let why = format!(
            "peer {peer} holds another record {index}, which this node had signed in this term, \
             and lost"
        );
        self.renew(now, Some(&why))?;
        self.settle_keys(now)?;
        if let Some(last) = last {
            self.say_again(now, term, last)?;
        }
        self.stop_waiting(now)?;
        self.serve_all()
    }

    fn newest_anchor(&self) -> Result<Option<Anchor>, ProverError> {
        for index in (0..self.ledger.records()).rev() {
            let bytes = self.ledger.read(index, 1)?;
            if let Ok((record, _)) = Record::decode(&bytes)
                && let Body::Anchor(signed) = record.body
            {
                return Ok(Some(signed.anchor));
            }
        }
        Ok(None)
    }

    /// An anchor of the ledger before this one, as the first of this one.
    fn say_again(&mut self, now: Now, term: Term, last: Anchor) -> Result<(), ProverError> {
        let Some(tip) = self.tip.as_mut() else {
            return Ok(());
        };
        let anchor = Anchor {
            term,
            phase: Phase::Commit,
            step: tip.next_index(),
            ledger_previous: tip.previous(),
            previous: tip.last_anchor(),
            time_ms: now.wall_ms,
            ..last
        };
        let signatures = self.keys.sign(&anchor.hash(), false)?;
        let says_state = anchor.state.is_some();
        let body = Body::Anchor(Box::new(SignedAnchor { anchor, signatures }));
        let bytes = tip.encode_next(now.wall_ms, &body);
        tip.push_bytes(&bytes)?;
        self.ledger.append(&[bytes])?;
        self.vouching.anchored(now.time, says_state);
        Ok(())
    }
}
