//! A primary's side: batches, anchors, keys, and serving what replicas ask for.

use std::collections::BTreeMap;
use std::time::Duration;

use hn4::types::{ChainHash, Epoch};

use super::message::{Message, RECORD_BYTES};
use super::shown::Theirs;
use super::{Now, Out, PeerState, Prover, ProverError};
use crate::anchor::{Anchor, Phase, SignedAnchor, StateAt, Step};
use crate::batch::{Batch, Batcher};
use crate::checkpoint::{Checkpoint, SignedCheckpoint};
use crate::hash::Digest;
use crate::ledger::file::{LedgerFile, LedgerMedium};
use crate::ledger::scan::ScanError;
use crate::ledger::verify::Verifier;
use crate::ledger::{Body, LedgerHeader, Scope};
use crate::sign::PublicKey;
use crate::sign::keyring::{KeyOffer, MAX_NODE_KEYS};

#[derive(Debug)]
struct Peer {
    state: PeerState,
    /// What it asked for last, if that was not answered: its ledger, and places in it.
    question: Option<(Digest, Vec<(u64, Digest)>)>,
    theirs: Theirs,
}

/// Peers and their open questions.
#[derive(Debug, Default)]
pub(super) struct Waiting(BTreeMap<u8, Peer>);

impl Waiting {
    pub(super) fn connected(&mut self, peer: u8, state: PeerState) {
        let (question, theirs) = (None, Theirs::default());
        let known = Peer {
            state,
            question,
            theirs,
        };
        self.0.insert(peer, known);
    }

    pub(super) fn disconnected(&mut self, peer: u8) {
        self.0.remove(&peer);
    }

    pub(super) fn state(&self, peer: u8) -> Option<PeerState> {
        self.0.get(&peer).map(|peer| peer.state)
    }

    pub(super) fn ask(&mut self, peer: u8, ledger: Digest, places: Vec<(u64, Digest)>) {
        if let Some(peer) = self.0.get_mut(&peer) {
            peer.question = Some((ledger, places));
        }
    }

    /// What is known of a peer's copy of the ledger.
    pub(super) fn theirs(&mut self, peer: u8) -> Option<&mut Theirs> {
        self.0.get_mut(&peer).map(|peer| &mut peer.theirs)
    }

    pub(super) fn all_theirs(&mut self) -> impl Iterator<Item = &mut Theirs> {
        self.0.values_mut().map(|peer| &mut peer.theirs)
    }

    /// The newest record that each has named.
    pub(super) fn all_newest(&self) -> Vec<(u8, Option<u64>)> {
        let peers = self.0.iter();
        peers
            .map(|(peer, it)| (*peer, it.theirs.newest()))
            .collect()
    }
}

/// What a primary has to say at its next checkpoint.
#[derive(Debug, Default)]
pub(super) struct Vouching {
    /// The newest state that is known and not in the ledger.
    state: Option<(StateAt, ChainHash)>,
    /// Epochs were anchored after the last checkpoint.
    is_due: bool,
    /// Nothing is due before.
    since: Duration,
}

impl Vouching {
    /// The state that an anchor of epochs up to this one can take along.
    fn unsaid(&self, last: Epoch) -> Option<StateAt> {
        let (state, _) = self.state?;
        (state.epoch <= last).then_some(state)
    }

    pub(super) fn anchored(&mut self, now: Duration, says_state: bool) {
        if says_state {
            self.state = None;
        }
        if !self.is_due {
            self.since = self.since.max(now);
        }
        self.is_due = true;
    }
}

impl<M: LedgerMedium> Prover<M> {
    /// The state tree has this root at an epoch of this node's history.
    pub fn state(&mut self, now: Now, (epoch, chain): (Epoch, ChainHash), root: Digest) {
        let known = self.tip.as_ref().and_then(Verifier::state);
        if self.primary.is_none() || known.is_some_and(|known| known.epoch >= epoch) {
            return;
        }
        if self.vouching.state.is_none() && !self.vouching.is_due {
            self.vouching.since = self.vouching.since.max(now.time);
        }
        self.vouching.state = Some((StateAt { epoch, root }, chain));
    }

    /// When a checkpoint is due: if there is a state to be told, or a signature for checkpoints
    /// that newer epochs lack.
    pub(super) fn checkpoint_due(&self) -> Option<Duration> {
        let (last, _) = self.anchored_place()?;
        let state = self.vouching.unsaid(last).is_some();
        let signature = self.vouching.is_due && self.keys.signs_checkpoints();
        let signs = self.primary.is_some() && !self.recall.waits();
        let is_due = signs && (state || signature);
        is_due.then(|| self.vouching.since.saturating_add(self.checkpoint_age))
    }

    /// The last anchored epoch, if it is of the present term.
    fn anchored_place(&self) -> Option<(Epoch, ChainHash)> {
        let last = self.tip.as_ref()?.last()?;
        (Some(last.term) == self.primary).then_some((last.last, last.chain))
    }

    pub(super) fn checkpoint(&mut self, now: Now) -> Result<(), ProverError> {
        let Some((last, chain)) = self.anchored_place() else {
            return Ok(());
        };
        let state = self.vouching.unsaid(last);
        let (epoch, chain) = match (state, self.vouching.state) {
            (Some(state), Some((_, chain))) => (state.epoch, chain),
            _ => (last, chain),
        };
        let (Some(term), Some(tip)) = (self.primary, self.tip.as_mut()) else {
            return Ok(());
        };
        let checkpoint = Checkpoint {
            volume: self.identity.volume,
            term,
            step: tip.next_index(),
            ledger_previous: tip.previous(),
            epoch,
            chain,
            root: state.map(|state| state.root),
            time_ms: now.wall_ms,
        };
        let signatures = self.keys.sign(&checkpoint.hash(), true)?;
        let body = Body::Checkpoint(Box::new(SignedCheckpoint {
            checkpoint,
            signatures,
        }));
        let bytes = tip.encode_next(now.wall_ms, &body);
        tip.push_bytes(&bytes)?;
        self.ledger.append(&[bytes])?;
        let state = self.vouching.state.filter(|_| state.is_none());
        self.vouching = Vouching {
            state,
            is_due: false,
            since: now.time,
        };
        self.serve_all()
    }

    /// Makes ready to sign what follows the ledger: with the ledger that is there, if it leads up
    /// to the log and holds this node's key, else with a new one.
    pub(super) fn begin_signing(&mut self, now: Now) -> Result<(), ProverError> {
        if !self.placed {
            return Ok(());
        }
        if let Some((key, at)) = self.retired_key() {
            return Err(ProverError::Retired { key, at });
        }
        self.batcher = None;
        if self.tip.is_some() {
            let waits = self.recall.begin(now.time);
            // An answer that came before the log was placed was not looked at.
            self.ask_all_back()?;
            if waits {
                return Ok(());
            }
        }
        let usable = self.tip.as_ref().map(|tip| {
            let key = self.keys.authority(tip.keyring(), self.node).is_some();
            (key, self.leads_up())
        });
        match usable {
            Some((true, true)) => {}
            None => self.renew(now, None)?,
            Some((_, false)) => {
                let why = "the ledger ends at another place than where the log begins";
                self.renew(now, Some(why))?;
            }
            Some((false, _)) => {
                self.renew(now, Some("the ledger does not hold this node's key"))?;
            }
        }
        self.settle_keys(now)?;
        if let Some(last) = self.anchored() {
            self.release_anchored(last);
        }
        self.batcher = None;
        for hashed in std::mem::take(&mut self.hashed) {
            self.hashed.push_back(hashed);
            self.batch_last(now)?;
        }
        // What was asked before has an answer only now.
        self.serve_all()
    }

    /// Whether the own ledger leads up to the log. A copy that was to take over another history may
    /// have followed the ledger of that, and kept its own log.
    fn leads_up(&self) -> bool {
        let last = self.tip.as_ref().and_then(Verifier::last);
        last.is_none_or(|last| self.continues(last.last, last.chain))
    }

    /// Whether the log goes on where a ledger ends.
    fn continues(&self, last: Epoch, chain: ChainHash) -> bool {
        if last == self.floor.0 {
            return chain == self.floor.1;
        }
        let mut hashed = self.hashed.iter().map(|hashed| &hashed.root);
        hashed.any(|root| root.epoch == last && root.chain == chain)
    }

    /// Begins a new ledger with this node's key.
    pub(super) fn renew(&mut self, now: Now, why: Option<&str>) -> Result<(), ProverError> {
        if let Some(why) = why {
            let text = format!("a new ledger begins, the old one is set aside: {why}");
            self.out.push_back(Out::Notice(text));
        }
        // The header is the ledger's name: a clock that was set back must not give the old one.
        let old = self.ledger.header().map(|header| header.created_ms);
        let is_used = old == Some(now.wall_ms);
        let header = LedgerHeader {
            scope: Scope::Shared,
            volume: self.identity.volume,
            created_ms: now.wall_ms.saturating_add(u64::from(is_used)),
        };
        let mut tip = self.ledger.renew(&header)?;
        self.waiting.all_theirs().for_each(Theirs::forget_ledger);
        let offer = KeyOffer::new(self.identity.volume, self.node, self.keys.main())?;
        let place = (self.identity.volume, 0, &tip.previous());
        let body = Body::Key(offer.accept(place, None, &[])?);
        let bytes = tip.encode_next(now.wall_ms, &body);
        tip.push_bytes(&bytes)?;
        self.ledger.append(&[bytes])?;
        self.tip = Some(tip);
        Ok(())
    }

    /// Takes the newest hashed epoch into the batch.
    pub(super) fn batch_last(&mut self, now: Now) -> Result<(), ProverError> {
        let (Some(hashed), true) = (self.hashed.back(), self.tip.is_some()) else {
            return Ok(());
        };
        if self.recall.waits() {
            return self.take_back(now);
        }
        let (next, start, end) = (hashed.root.epoch, hashed.start, hashed.end);
        let (volume, policy) = (self.identity.volume, self.policy);
        let batcher = self.batcher.get_or_insert_with(|| {
            // The epochs before it are anchored, or were before this log began.
            Batcher::new(volume, policy, next, start)
        });
        let closed = batcher.push(now.time, &hashed.root, (start, end));
        let closed = closed.map_err(|_| ProverError::Order {
            expected: self.floor.0.next(),
            found: next,
        })?;
        closed.map_or(Ok(()), |batch| self.anchor(now, &batch))
    }

    /// Anchors a batch of the oldest epochs that are hashed, and lets go of their roots.
    pub(super) fn anchor(&mut self, now: Now, batch: &Batch) -> Result<(), ProverError> {
        let (Some(term), Some(tip)) = (self.primary, self.tip.as_mut()) else {
            return Ok(());
        };
        let payloads = self.hashed.iter().take(batch.roots.len());
        let raw_bytes = payloads.map(|hashed| hashed.payload_bytes).sum();
        let last = tip.last();
        let adopts = last.is_some_and(|last| term.counter > last.term.counter);
        let step = Step {
            term,
            phase: if adopts { Phase::Adopt } else { Phase::Commit },
            step: tip.next_index(),
            ledger_previous: tip.previous(),
            previous: tip.last_anchor(),
            state: self.vouching.unsaid(batch.last),
            dictionary: self.dictionary.map(|id| id.0),
            bytes: (raw_bytes, raw_bytes),
            time_ms: now.wall_ms,
        };
        let anchor = Anchor::new(batch, step);
        let signatures = self.keys.sign(&anchor.hash(), false)?;
        let says_state = anchor.state.is_some();
        let body = Body::Anchor(Box::new(SignedAnchor { anchor, signatures }));
        let bytes = tip.encode_next(now.wall_ms, &body);
        tip.push_bytes(&bytes)?;
        self.ledger.append(&[bytes])?;
        self.vouching.anchored(now.time, says_state);
        self.release_anchored(batch.last);
        self.out.push_back(Out::Proven(batch.last, batch.chain));
        self.serve_all()
    }

    pub(super) fn enrol(&mut self, now: Now, peer: u8, offer: KeyOffer) -> Result<(), ProverError> {
        let Some(state) = self.waiting.state(peer) else {
            return Ok(());
        };
        if self.recall.waits() {
            self.recall.keep(peer, offer);
            return Ok(());
        }
        let volume = self.identity.volume;
        let Some(tip) = self.tip.as_mut() else {
            return Ok(());
        };
        if tip.keyring().knows(offer.public.id()) {
            return Ok(());
        }
        let digest = KeyOffer::digest(volume, offer.node, &offer.public);
        let own = offer.node == state.node;
        let wrong = if !own || offer.public.verify(&digest, &offer.signature).is_err() {
            Some("it is not its own")
        } else if tip.keyring().count_of(offer.node) >= MAX_NODE_KEYS {
            Some("the node has had its most keys; give it another identity")
        } else {
            None
        };
        if let Some(why) = wrong {
            let text = format!("peer {peer} offered a key that is not enrolled: {why}");
            self.out.push_back(Out::Notice(text));
            return Ok(());
        }
        let Some(by) = self.keys.authority(tip.keyring(), self.node) else {
            return Ok(());
        };
        // A node has one key of each algorithm: its new one ends the right of the old one.
        let mut old = tip.keyring().active_of(offer.node).into_iter();
        let old = old.find(|public| public.algorithm() == offer.public.algorithm());
        let retire = old.map(PublicKey::id);
        let place = (volume, tip.next_index(), &tip.previous());
        let body = Body::Key(offer.accept(place, retire, &by)?);
        let bytes = tip.encode_next(now.wall_ms, &body);
        if let Err(error) = tip.push_bytes(&bytes) {
            // What a peer asks for does not end the proofs.
            let text = format!("the key of peer {peer} cannot be enrolled: {error}");
            self.out.push_back(Out::Notice(text));
            return Ok(());
        }
        self.ledger.append(&[bytes])?;
        self.serve_all()
    }

    pub(super) fn serve_all(&mut self) -> Result<(), ProverError> {
        let peers: Vec<u8> = self.waiting.0.keys().copied().collect();
        peers.into_iter().try_for_each(|peer| self.serve(peer))
    }

    /// Answers a peer's question, if there is anything to say.
    pub(super) fn serve(&mut self, peer: u8) -> Result<(), ProverError> {
        if !self.leads_up() {
            // Its anchors may speak against the log. Unless its end comes back, it is set aside.
            return Ok(());
        }
        let Some(asker) = self.waiting.0.get_mut(&peer) else {
            return Ok(());
        };
        if asker.theirs.is_showing() {
            // What it holds will say whether this ledger goes on.
            return Ok(());
        }
        let Some((theirs, places)) = &asker.question else {
            return Ok(());
        };
        let Some(records) = answer(&self.ledger, theirs, places)? else {
            return Ok(());
        };
        asker.question = None;
        let session = asker.state.session;
        self.send((peer, session), records.encode());
        Ok(())
    }
}

/// What a ledger holds behind the newest of these places of another that it has, too.
pub(super) fn answer<M: LedgerMedium>(
    ledger: &LedgerFile<M>,
    theirs: &Digest,
    places: &[(u64, Digest)],
) -> Result<Option<Message>, ScanError> {
    let Some(header) = ledger.header() else {
        return Ok(None);
    };
    let mut first = 0;
    if *theirs == header.hash() {
        for (index, hash) in places {
            if ledger.hash_of(*index)? == Some(*hash) {
                first = index + 1;
                break;
            }
        }
    }
    if first >= ledger.records() {
        return Ok(None);
    }
    Ok(Some(Message::Records {
        header: *header,
        first,
        bytes: ledger.read(first, RECORD_BYTES)?,
    }))
}

/// Places of a ledger by which another finds where the two part: the newest few, then ever sparser.
/// The newest alone, if not `all` are asked for.
pub(super) fn places<M: LedgerMedium>(
    prover: &Prover<M>,
    all: bool,
) -> Result<Vec<(u64, Digest)>, ProverError> {
    let tip = prover.tip.as_ref();
    let newest = tip.and_then(|tip| Some((tip.next_index().checked_sub(1)?, tip.previous())));
    let mut places = Vec::from_iter(newest);
    let Some((mut index, _)) = newest.filter(|_| all) else {
        return Ok(places);
    };
    let mut step = 1;
    while index > 0 && places.len() < super::message::MAX_PLACES {
        index = index.saturating_sub(step);
        if let Some(hash) = prover.ledger.hash_of(index)? {
            places.push((index, hash));
        }
        if places.len() >= 8 {
            step *= 2;
        }
    }
    Ok(places)
}
