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
use super::shown::Run;
use super::sign::{answer, places};
use super::{Now, Out, PeerState, Prover, ProverError};
use crate::anchor::{Anchor, Phase, SignedAnchor};
use crate::hash::Digest;
use crate::ledger::file::LedgerMedium;
use crate::ledger::verify::Verifier;
use crate::ledger::{Body, LedgerHeader, Record};
use crate::sign::keyring::KeyOffer;

/// So long nothing is signed when the end of the ledger was cut off.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// Offers of keys that wait for that.
const MAX_OFFERS: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Recall {
    /// Bytes that were cut off the ledger and have not come back.
    missing: u64,
    /// Nothing is signed before.
    until: Option<Duration>,
    /// What a replica has, bound by the present keys, and the own log does not reach to yet.
    pending: Run,
    /// Who has that.
    peer: Option<u8>,
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

    /// The node signs with other keys now: these bind nothing that was given back before.
    pub(super) fn change_keys(&mut self) {
        self.pending.clear();
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

    /// A replica has named this record: asks it in turn, if the own ledger does not reach there.
    pub(super) fn ask_back(&mut self, peer: u8, newest: Option<u64>) -> Result<(), ProverError> {
        let is_longer = newest >= Some(self.ledger.records());
        // Of what it is showing it is asked what follows.
        let is_showing = self.waiting.theirs(peer).is_some_and(|it| it.is_showing());
        if is_longer && !is_showing {
            let places = places(self, true)?;
            self.ask_peer(peer, places)?;
        }
        Ok(())
    }

    /// Asks all that have named a record which the own ledger does not reach to.
    pub(super) fn ask_all_back(&mut self) -> Result<(), ProverError> {
        let mut newest = self.waiting.all_newest().into_iter();
        newest.try_for_each(|(peer, newest)| self.ask_back(peer, newest))
    }

    /// Asks a replica for what follows these places of the own ledger.
    pub(super) fn ask_peer(
        &mut self,
        peer: u8,
        places: Vec<(u64, Digest)>,
    ) -> Result<(), ProverError> {
        let state = self.waiting.state(peer).filter(|state| state.proves);
        let header = self.ledger.header().map(LedgerHeader::hash);
        if let (Some(state), Some(ledger)) = (state, header)
            && let Some(theirs) = self.waiting.theirs(peer)
        {
            theirs.ask();
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

    /// Records that follow the own ledger, bound by the present keys: they come back as far as the
    /// own log agrees. They do not displace others that reach further.
    pub(super) fn given_back(
        &mut self,
        now: Now,
        peer: u8,
        records: Run,
    ) -> Result<(), ProverError> {
        if records.len() > self.recall.pending.len() {
            self.recall.pending = records;
            self.recall.peer = Some(peer);
        }
        self.take_back(now)
    }

    /// Takes back what was lost, as far as the own log agrees.
    pub(super) fn take_back(&mut self, now: Now) -> Result<(), ProverError> {
        let mut taken = Vec::new();
        while let (Some((record, _)), Some(tip)) = (self.recall.pending.front(), self.tip.as_mut())
        {
            let why = match &record.body {
                Body::Anchor(signed) => match verdict(&self.hashed, self.floor, &signed.anchor) {
                    Verdict::Good => tip.push(record).err().map(|error| error.to_string()),
                    // The log is still being read.
                    Verdict::Wait => break,
                    Verdict::Bad(why) => Some(why.to_string()),
                },
                _ => tip.push(record).err().map(|error| error.to_string()),
            };
            if let Some(why) = why {
                let text = format!("what a peer holds behind the ledger is left: {why}");
                self.out.push_back(Out::Notice(text));
                self.recall.pending.clear();
                break;
            }
            taken.extend(self.recall.pending.pop_front());
        }
        if !self.recall.pending.is_empty() {
            let until = now.time.saturating_add(PATIENCE);
            self.recall.until.get_or_insert(until);
            self.batcher = None;
        }
        self.taken_back(now, taken)
    }

    fn taken_back(&mut self, now: Now, taken: Vec<(Record, Vec<u8>)>) -> Result<(), ProverError> {
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
        if let Some(peer) = self.recall.peer.filter(|_| self.recall.pending.is_empty()) {
            // It may have more.
            let places = places(self, true)?;
            self.ask_peer(peer, places)?;
        }
        let misses = self.recall.missing > 0 || !self.recall.pending.is_empty();
        if self.recall.waits() && misses {
            return Ok(());
        }
        self.stop_waiting(now)
    }

    /// A replica holds another record of this place, and this node signed that, too: it has signed
    /// twice, and a ledger that all can follow begins.
    pub(super) fn signed_twice(
        &mut self,
        now: Now,
        peer: u8,
        index: u64,
    ) -> Result<(), ProverError> {
        let Some(term) = self.primary else {
            return Ok(());
        };
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
