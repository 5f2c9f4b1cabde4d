//! A replica's side: taking the primary's ledger, record by record, as far as the own log agrees.

use std::collections::VecDeque;

use hn4::types::Epoch;

use super::message::Message;
use super::sign::places;
use super::{Out, PeerState, Prover, ProverError};
use crate::anchor::{Anchor, Disagreement, Phase};
use crate::batch::{BatchPolicy, Batcher};
use crate::hash::Digest;
use crate::ledger::file::LedgerMedium;
use crate::ledger::verify::{Policy, Verifier};
use crate::ledger::{Body, LedgerHeader, Record};
use crate::sign::keyring::KeyOffer;

/// The primary that feeds this replica, and what it sent that could not be taken yet.
#[derive(Debug, Default)]
pub(super) struct Follow {
    source: Option<(u8, PeerState)>,
    pending: VecDeque<(Record, Vec<u8>)>,
}

impl Follow {
    pub(super) fn is_source(&self, peer: u8) -> bool {
        self.source.is_some_and(|(source, _)| source == peer)
    }

    pub(super) fn has_source(&self) -> bool {
        self.source.is_some()
    }

    /// The source, if it talks about proofs.
    pub(super) fn proving_source(&self) -> Option<u8> {
        let (peer, _) = self.source.filter(|(_, state)| state.proves)?;
        Some(peer)
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
enum Verdict {
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
        self.set_gate(state.proves);
        if !state.proves {
            return Ok(());
        }
        self.offer_keys(peer)?;
        if self.placed {
            self.ask(true)?;
        }
        Ok(())
    }

    /// Offers the source what of the own keys is not in the ledger.
    pub(super) fn offer_keys(&mut self, peer: u8) -> Result<(), ProverError> {
        for key in self.keys.wanted() {
            let id = key.public().id();
            let known = self.tip.as_ref().is_some_and(|tip| tip.keyring().knows(id));
            if !known {
                let offer = KeyOffer::new(self.identity.volume, self.node, key)?;
                let offer = Message::Offer(offer).encode();
                self.out.push_back(Out::Send(peer, offer));
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
            self.follow.pending.clear();
        }
        self.ask(true)
    }

    /// Asks for what follows; `anew` if the source may have another ledger than we.
    fn ask(&mut self, anew: bool) -> Result<(), ProverError> {
        let Some((peer, _)) = self.follow.source.filter(|(_, state)| state.proves) else {
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
        self.out.push_back(Out::Send(peer, have.encode()));
        Ok(())
    }

    /// All that came is here, and perhaps more than the source has: asks for what it will have
    /// behind `first - 1`, where the two may part. Places are named sparsely, and it answered from
    /// behind the newest one that it knew.
    fn ask_behind(&mut self, first: u64) -> Result<(), ProverError> {
        let source = self.follow.proving_source();
        let header = self.ledger.header().map(LedgerHeader::hash);
        if let (Some(peer), Some(ledger)) = (source, header)
            && first < self.ledger.records()
            && self.follow.pending.is_empty()
            && let Some(index) = first.checked_sub(1)
            && let Some(hash) = self.ledger.hash_of(index)?
        {
            let places = vec![(index, hash)];
            let have = Message::Have { ledger, places };
            self.out.push_back(Out::Send(peer, have.encode()));
        }
        Ok(())
    }

    /// Records that the source sent.
    pub(super) fn records(
        &mut self,
        peer: u8,
        header: &LedgerHeader,
        first: u64,
        bytes: &[u8],
    ) -> Result<(), ProverError> {
        let Some((_, source)) = self.follow.source.filter(|(source, _)| *source == peer) else {
            return Ok(());
        };
        let mut rest = bytes;
        let mut records = VecDeque::new();
        while !rest.is_empty() {
            match Record::decode(rest) {
                Ok((record, length)) if record.index == first + records.len() as u64 => {
                    let (whole, later) = rest.split_at(length);
                    rest = later;
                    records.push_back((record, whole.to_vec()));
                }
                Ok(_) => {
                    self.suspect(peer, "ledger records out of order".to_owned());
                    return Ok(());
                }
                Err(error) => {
                    self.suspect(peer, format!("a ledger record: {error}"));
                    return Ok(());
                }
            }
        }
        // Two questions may have been asked, and both answered.
        let same = self
            .ledger
            .header()
            .is_some_and(|ours| ours.hash() == header.hash());
        let mut first = first;
        while same
            && let Some((record, _)) = records.front()
            && self.ledger.hash_of(record.index)? == Some(record.hash)
        {
            first += 1;
            records.pop_front();
        }
        if records.is_empty() && first <= self.ledger.records() {
            return if same { self.ask_behind(first) } else { Ok(()) };
        }
        let due = if same { self.ledger.records() } else { 0 };
        if first > due {
            // It answers what was asked before this ledger, or the one in its place, was set aside.
            // What was asked since will be answered, too.
            return Ok(());
        }
        if let Err(why) = self.make_way(
            header,
            (first, records.front().map(|(record, _)| record)),
            source,
        )? {
            self.suspect(peer, why);
            return Ok(());
        }
        self.follow.pending = records;
        self.take_pending()
    }

    /// Makes the own ledger such that records from `first` on can follow, if that is legal: a
    /// history is superseded by a higher term only.
    fn make_way(
        &mut self,
        header: &LedgerHeader,
        (first, beginning): (u64, Option<&Record>),
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
        if same && first < self.ledger.records() {
            if last.is_some() && source.term.counter <= term {
                let why = format!("it contradicts record {first} of the ledger in the same term");
                return Ok(Err(why));
            }
            let text = format!("the ledger from record {first} on is superseded, and set aside");
            self.out.push_back(Out::Notice(text));
            self.tip = self.ledger.cut(first)?;
            return Ok(Ok(()));
        }
        if let Some(at) = self.begins_with_retired(beginning) {
            let why = format!("its ledger begins with a key that was retired at step {at} of ours");
            return Ok(Err(why));
        }
        let newer = ours.is_none_or(|ours| header.created_ms > ours.created_ms);
        let supersedes = source.term.counter > term || (source.term.counter == term && newer);
        if same || !supersedes {
            return Ok(Err("a ledger that does not continue ours".to_owned()));
        }
        if ours.is_some() {
            let text = "the primary has begun a new ledger; the old one is set aside";
            self.out.push_back(Out::Notice(text.to_owned()));
        }
        self.tip = Some(self.ledger.renew(header)?);
        if let Some(peer) = self.follow.proving_source() {
            self.offer_keys(peer)?;
        }
        Ok(Ok(()))
    }

    /// Whoever begins a new ledger with a key whose right has ended may have stolen it.
    fn begins_with_retired(&self, beginning: Option<&Record>) -> Option<u64> {
        let Body::Key(change) = &beginning?.body else {
            return None;
        };
        let (_, public) = change.enroll.as_ref()?;
        let ours = self.tip.as_ref()?.keyring();
        ours.retired_at(public.id())
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
        let mut problem = None;
        while let Some((record, _)) = self.follow.pending.front() {
            let Some(tip) = self.tip.as_mut() else { break };
            let verdict = match &record.body {
                Body::Anchor(signed) => verdict(&self.hashed, self.floor.0, &signed.anchor),
                Body::Key(_) | Body::Note(_) | Body::Checkpoint(_) | Body::Inspection(_) => {
                    Verdict::Good
                }
            };
            match verdict {
                Verdict::Wait => break,
                Verdict::Bad(disagreement) => {
                    problem = Some(disagreement.to_string());
                    break;
                }
                Verdict::Good => {}
            }
            if let Some(missing) = lacks(record, &self.required, self.floor.0) {
                problem = Some(missing);
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
            Some(why) => self.suspect(peer, why),
            None if self.follow.pending.is_empty() => self.ask(false)?,
            None => self.hold(),
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
    /// are applied when they are durable, and compared with the anchor afterwards.
    ///
    /// What was not anchored before it waits, too: a ledger that was begun anew leaves it out, and
    /// the anchor that covers it may be far ahead.
    fn hold(&mut self) {
        let front = self.follow.pending.front();
        let oldest = self.hashed.front().map(|hashed| hashed.start);
        if let Some((
            Record {
                body: Body::Anchor(signed),
                ..
            },
            _,
        )) = front
            && let start = oldest.map_or(signed.anchor.start, |at| at.min(signed.anchor.start))
            && signed.anchor.end.0 - start.0 > self.hold_bytes
        {
            self.set_gate(false);
        }
    }
}

/// Which signature this node insists on, and a record that it would act on lacks. What was anchored
/// before its log began is bound by the anchors that follow.
fn lacks(record: &Record, required: &Policy, floor: Epoch) -> Option<String> {
    let (signatures, is_checkpoint) = match &record.body {
        Body::Anchor(signed) if signed.anchor.last > floor => {
            let phase = signed.anchor.phase;
            (&signed.signatures, phase == Phase::Checkpoint)
        }
        Body::Checkpoint(signed) if signed.checkpoint.epoch > floor => (&signed.signatures, true),
        _ => return None,
    };
    let required = required.required(is_checkpoint).into_iter();
    let has = |algorithm| signatures.iter().any(|it| it.algorithm() == algorithm);
    let missing = required.into_iter().find(|algorithm| !has(*algorithm))?;
    Some(format!(
        "record {} of the ledger has no {missing} signature, which this node requires",
        record.index
    ))
}

/// Compares an anchor with the roots of the own log.
fn verdict(hashed: &VecDeque<super::Hashed>, floor: Epoch, anchor: &Anchor) -> Verdict {
    let disagree = |part| {
        Verdict::Bad(Disagreement {
            step: anchor.step,
            part,
        })
    };
    if anchor.last <= floor {
        // Before this log began, or taken before under an anchor that was superseded.
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
