//! A replica's side: taking the primary's ledger, record by record, as far as the own log agrees.

use std::collections::VecDeque;

use hn4::types::{ChainHash, Epoch};

use super::branch::{Revived, signed_by};
use super::message::Message;
use super::sign::places;
use super::{Out, PeerState, Prover, ProverError};
use crate::anchor::{Anchor, Disagreement, Phase};
use crate::batch::{BatchPolicy, Batcher};
use crate::hash::Digest;
use crate::ledger::file::LedgerMedium;
use crate::ledger::verify::{Policy, Verifier};
use crate::ledger::{Body, LedgerHeader, Record};
use crate::sign::KeyId;
use crate::sign::keyring::KeyOffer;

/// The primary that feeds this replica, and what it sent that could not be taken yet.
#[derive(Debug, Default)]
pub(super) struct Follow {
    source: Option<(u8, PeerState)>,
    pending: VecDeque<(Record, Vec<u8>)>,
    /// Keys that a cut brought back: what this source sends is not to be signed by them.
    pub(super) revived: Revived,
    /// This source was shown that it had signed another record of a place in its term.
    pub(super) objected: bool,
}

impl Follow {
    pub(super) fn is_source(&self, peer: u8) -> bool {
        self.source.is_some_and(|(source, _)| source == peer)
    }

    pub(super) fn has_source(&self) -> bool {
        self.source.is_some()
    }

    /// The source, if it talks about proofs, and the session with it.
    pub(super) fn proving_source(&self) -> Option<(u8, u64)> {
        let (peer, state) = self.source.filter(|(_, state)| state.proves)?;
        Some((peer, state.session))
    }

    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    pub(super) fn disconnected(&mut self, peer: u8) {
        if self.is_source(peer) {
            self.forget();
        }
    }
}

/// What the own log says to an anchor.
pub(super) enum Verdict {
    /// It does not reach so far yet.
    Wait,
    Good,
    Bad(Disagreement),
}

impl<M: LedgerMedium> Prover<M> {
    /// A peer has opened its feed to us: it is the primary that we follow.
    ///
    /// # Errors
    /// [`ProverError`].
    pub fn fed_by(&mut self, peer: u8) -> Result<(), ProverError> {
        let state = self.waiting.state(peer);
        let Some(state) = state.filter(|_| self.primary.is_none()) else {
            return Ok(());
        };
        self.follow.forget();
        self.follow.source = Some((peer, state));
        let insists = self.required.required(true).into_iter().next();
        self.set_gate(state.proves || insists.is_some());
        if !state.proves {
            if let Some(algorithm) = insists.filter(|_| self.gated) {
                let text = format!(
                    "peer {peer} proves nothing, and this node requires {algorithm} signatures: \
                     it applies nothing until its primary proves"
                );
                self.out.push_back(Out::Notice(text));
            }
            return Ok(());
        }
        self.offer_keys()?;
        if self.placed {
            self.ask(true)?;
        }
        Ok(())
    }

    /// Offers the source what of the own keys is not in the ledger.
    pub(super) fn offer_keys(&mut self) -> Result<(), ProverError> {
        let Some(source) = self.follow.proving_source() else {
            return Ok(());
        };
        for key in self.keys.wanted() {
            let id = key.public().id();
            let known = self.tip.as_ref().is_some_and(|tip| tip.keyring().knows(id));
            if !known {
                let offer = KeyOffer::new(self.identity.volume, self.node, key)?;
                let (peer, session) = source;
                self.out.push_back(Out::Send {
                    peer,
                    session,
                    bytes: Message::Offer(offer).encode(),
                });
            }
        }
        Ok(())
    }

    fn set_gate(&mut self, gate: bool) {
        if self.gated && self.gate_open == gate {
            self.gate_open = !gate;
            self.out.push_back(Out::Gate(gate));
        }
    }

    /// A ledger that proves more than the log holds, or other things, is of another life of this
    /// copy: it is set aside, and fetched anew.
    pub(super) fn check_reach(&mut self) -> Result<(), ProverError> {
        let last = self.tip.as_ref().and_then(Verifier::last);
        let (floor, chain) = self.floor;
        let foreign = last.is_some_and(|last| {
            last.last > floor && self.hashed_tip().0 < last.last
                || last.last == floor && last.chain != chain
        });
        if foreign {
            let why = "the log does not reach to where its ledger ends; the ledger is set aside";
            self.out.push_back(Out::Notice(why.to_owned()));
            self.tip = self.ledger.cut(0)?;
            self.insists.renew();
            self.follow.pending.clear();
            self.offer_keys()?;
        }
        self.ask(true)
    }

    /// Asks for what follows; `anew` if the source may have another ledger than we.
    pub(super) fn ask(&mut self, anew: bool) -> Result<(), ProverError> {
        let Some(source) = self.follow.proving_source() else {
            return Ok(());
        };
        if !self.follow.pending.is_empty() && !anew {
            return Ok(());
        }
        self.follow.pending.clear();
        let places = places(self, anew)?;
        let ledger = self
            .ledger
            .header()
            .map_or(Digest::ZERO, LedgerHeader::hash);
        let have = Message::Have { ledger, places };
        self.send(source, have.encode());
        Ok(())
    }

    /// All that came is here, and perhaps more than the source has: asks for what it will have
    /// behind `first - 1`, where the two may part. Places are named sparsely, and it answered from
    /// behind the newest one that it knew.
    fn ask_behind(&mut self, first: u64) -> Result<(), ProverError> {
        let source = self.follow.proving_source();
        let header = self.ledger.header().map(LedgerHeader::hash);
        if let (Some(source), Some(ledger)) = (source, header)
            && first < self.ledger.records()
            && self.follow.pending.is_empty()
            && let Some(index) = first.checked_sub(1)
            && let Some(hash) = self.ledger.hash_of(index)?
        {
            let places = vec![(index, hash)];
            let have = Message::Have { ledger, places };
            self.send(source, have.encode());
        }
        Ok(())
    }

    /// Records that the source sent.
    pub(super) fn records(
        &mut self,
        peer: u8,
        header: &LedgerHeader,
        first: u64,
        records: VecDeque<(Record, Vec<u8>)>,
    ) -> Result<(), ProverError> {
        let Some((_, source)) = self.follow.source.filter(|(source, _)| *source == peer) else {
            return Ok(());
        };
        let is_answer = !records.is_empty();
        // Two questions may have been asked, and both answered.
        let same = self.is_ours(&header.hash());
        let (first, records) = match same {
            true => self.unknown(first, records)?,
            false => (first, records),
        };
        if records.is_empty() && first <= self.ledger.records() {
            return match same {
                // It was asked twice, and forgot the later question when it answered the earlier.
                true if first == self.ledger.records() && is_answer => self.ask(false),
                true => self.ask_behind(first),
                false => Ok(()),
            };
        }
        let due = if same { self.ledger.records() } else { 0 };
        if first > due {
            // It answers what was asked before this ledger, or the one in its place, was set aside.
            // What was asked since will be answered, too.
            return Ok(());
        }
        if same && first < self.ledger.records() && self.object(source, first)? {
            return Ok(());
        }
        if let Err(why) = self.make_way(header, (first, &records), source)? {
            self.suspect(peer, why);
            return Ok(());
        }
        self.follow.pending = records;
        self.take_pending()
    }

    /// Takes what the own log agrees with, in one append; asks for more when all is taken.
    pub(super) fn take_pending(&mut self) -> Result<(), ProverError> {
        let Some((peer, _)) = self.follow.source else {
            return Ok(());
        };
        if self.follow.pending.is_empty() {
            return Ok(());
        }
        let mut taken = Vec::new();
        let (mut problem, mut contradicted) = (None, false);
        while let Some((record, _)) = self.follow.pending.front() {
            let Some(tip) = self.tip.as_mut() else { break };
            let verdict = match &record.body {
                Body::Anchor(signed) => verdict(&self.hashed, self.floor, &signed.anchor),
                Body::Key(_) | Body::Note(_) | Body::Checkpoint(_) | Body::Inspection(_) => {
                    Verdict::Good
                }
            };
            match verdict {
                Verdict::Wait => break,
                Verdict::Bad(disagreement) => {
                    problem = Some(disagreement.to_string());
                    // What is not signed as it should be says nothing about the log.
                    contradicted = tip.clone().push(record).is_ok();
                    break;
                }
                Verdict::Good => {}
            }
            if let Some(missing) = lacks(record, &self.required, self.insists) {
                problem = Some(missing);
                break;
            }
            if let Some(signer) = signed_by(record, &self.follow.revived) {
                problem = Some(revived(record, signer));
                break;
            }
            if let Err(error) = tip.push(record) {
                problem = Some(error.to_string());
                break;
            }
            taken.extend(self.follow.pending.pop_front());
        }
        self.taken(taken)?;
        match problem {
            Some(why) => {
                let of = contradicted.then(|| self.hashed_tip());
                self.refuse(peer, why, of);
            }
            None if self.follow.pending.is_empty() => self.ask(false)?,
            None => {
                if let Some(why) = self.hold() {
                    self.suspect(peer, why);
                }
            }
        }
        Ok(())
    }

    fn taken(&mut self, taken: Vec<(Record, Vec<u8>)>) -> Result<(), ProverError> {
        let (records, bytes): (Vec<Record>, Vec<Vec<u8>>) = taken.into_iter().unzip();
        if bytes.is_empty() {
            return Ok(());
        }
        self.ledger.append(&bytes)?;
        let anchor = |record: &Record| match &record.body {
            Body::Anchor(signed) => Some((signed.anchor.last, signed.anchor.chain)),
            _ => None,
        };
        if let Some((last, chain)) = records.iter().rev().find_map(anchor) {
            self.release_anchored(last);
            self.out.push_back(Out::Proven(last, chain));
            self.set_gate(true);
        }
        Ok(())
    }

    /// A batch of which this node cannot hold all epochs unapplied would wait for ever: its epochs
    /// are applied when they are durable, and compared with the anchor afterwards. Only an anchor
    /// that its primary signed, and that fits where it goes, is worth that; what is wrong with
    /// another is returned.
    ///
    /// What was not anchored before it waits, too: a ledger that was begun anew leaves it out, and
    /// the anchor that covers it may be far ahead.
    fn hold(&mut self) -> Option<String> {
        let (record, _) = self.follow.pending.front()?;
        let Body::Anchor(signed) = &record.body else {
            return None;
        };
        let anchor = &signed.anchor;
        let oldest = self.hashed.front().map(|hashed| hashed.start);
        let start = oldest.map_or(anchor.start, |at| at.min(anchor.start));
        let is_open = !self.gated || self.gate_open;
        if is_open || anchor.end.0.saturating_sub(start.0) <= self.hold_bytes {
            return None;
        }
        let lacks = lacks(record, &self.required, self.insists);
        let signer = signed_by(record, &self.follow.revived);
        if let Some(why) = lacks.or_else(|| Some(revived(record, signer?))) {
            return Some(why);
        }
        if let Err(error) = self.tip.clone()?.push(record) {
            return Some(error.to_string());
        }
        self.set_gate(false);
        None
    }
}

/// Of which records a replica demands the signatures that it requires: of all that it has not seen
/// yet, except what was anchored before its log began. That may be older than the requirement, and
/// is bound by the anchors that follow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Insists {
    /// The log begins after this epoch. It does not move when epochs are anchored.
    after: Epoch,
    /// The ledger led up to there, so that every record from here on is news.
    from: u64,
}

impl Insists {
    /// The log begins, or was cut off, at a place, up to which a ledger of so many records leads if
    /// it is given.
    pub(super) fn at(after: Epoch, records: Option<u64>) -> Self {
        let from = records.unwrap_or(u64::MAX);
        Self { after, from }
    }

    /// The ledger was cut to so many records.
    pub(super) fn cut(&mut self, records: u64) {
        if self.from != u64::MAX {
            self.from = self.from.min(records);
        }
    }

    /// The whole ledger comes anew.
    pub(super) fn renew(&mut self) {
        self.from = u64::MAX;
    }

    fn on(self, index: u64, epoch: Epoch) -> bool {
        epoch > self.after || index >= self.from
    }
}

/// Which signature this node insists on, and a record that it would act on lacks.
fn lacks(record: &Record, required: &Policy, insists: Insists) -> Option<String> {
    let (signatures, epoch, is_checkpoint) = match &record.body {
        Body::Anchor(signed) => {
            let anchor = &signed.anchor;
            let is_checkpoint = anchor.phase == Phase::Checkpoint;
            (&signed.signatures, anchor.last, is_checkpoint)
        }
        Body::Checkpoint(signed) => (&signed.signatures, signed.checkpoint.epoch, true),
        _ => return None,
    };
    if !insists.on(record.index, epoch) {
        return None;
    }
    let required = required.required(is_checkpoint).into_iter();
    let has = |algorithm| signatures.iter().any(|it| it.algorithm() == algorithm);
    let missing = required.into_iter().find(|algorithm| !has(*algorithm))?;
    Some(format!(
        "record {} of the ledger has no {missing} signature, which this node requires",
        record.index
    ))
}

fn revived(record: &Record, (key, at): (KeyId, u64)) -> String {
    let index = record.index;
    format!(
        "record {index} of its ledger is signed by key {key}, which was retired at step {at} of \
         what that ledger superseded"
    )
}

/// Compares an anchor with the roots of the own log.
pub(super) fn verdict(
    hashed: &VecDeque<super::frame::Hashed>,
    (floor, chain): (Epoch, ChainHash),
    anchor: &Anchor,
) -> Verdict {
    let disagree = |part| {
        Verdict::Bad(Disagreement {
            step: anchor.step,
            part,
        })
    };
    if anchor.last == floor && chain != ChainHash::default() && anchor.chain != chain {
        // Without a hash this is epoch 0, or a frame that was damaged.
        return disagree("chain of frame headers");
    }
    if anchor.last <= floor {
        // Before this log began: taken on its signature. So is what was compared before, under an
        // anchor that was superseded, and ends elsewhere now: its roots are gone. To have the core
        // send those frames once more would take back what it was told is proven, which it may be
        // writing back at this moment.
        return Verdict::Good;
    }
    let Some(last) = hashed
        .iter()
        .find(|hashed| hashed.root.epoch == anchor.last)
    else {
        return Verdict::Wait;
    };
    if last.root.chain != anchor.chain {
        return disagree("chain of frame headers");
    }
    if anchor.first <= floor {
        // The batch began before this log: the chain of headers is all that can be compared.
        return Verdict::Good;
    }
    // What comes before the first anchor of a ledger is not in it.
    let before = hashed
        .iter()
        .take_while(|hashed| hashed.root.epoch < anchor.first);
    let inside = hashed.range(before.count()..);
    let Some(first) = inside.clone().next() else {
        return Verdict::Wait;
    };
    let open = BatchPolicy {
        max_age: std::time::Duration::MAX,
        max_epochs: usize::MAX,
        max_bytes: u64::MAX,
    };
    let mut batcher = Batcher::new(anchor.volume, open, first.root.epoch, first.start);
    let inside = inside.take_while(|hashed| hashed.root.epoch <= anchor.last);
    for hashed in inside {
        let span = (hashed.start, hashed.end);
        let now = std::time::Duration::ZERO;
        if batcher.push(now, &hashed.root, span).is_err() {
            return disagree("log offsets");
        }
    }
    match batcher.close().map(|batch| anchor.agrees_with(&batch)) {
        Some(Ok(())) => Verdict::Good,
        Some(Err(disagreement)) => Verdict::Bad(disagreement),
        None => Verdict::Wait,
    }
}
