//! A primary's side: batches, anchors, keys, and serving what replicas ask for.

use std::collections::BTreeMap;

use hn4::types::Epoch;

use super::message::{Message, RECORD_BYTES};
use super::{Now, Out, PeerState, Prover, ProverError};
use crate::anchor::{Anchor, Phase, SignedAnchor, Step};
use crate::batch::{Batch, Batcher};
use crate::hash::Digest;
use crate::ledger::file::LedgerMedium;
use crate::ledger::{Body, LedgerHeader, Scope};
use crate::sign::keyring::KeyOffer;

#[derive(Debug)]
struct Peer {
    state: PeerState,
    /// What it asked for last, if that was not answered: its ledger, and places in it.
    question: Option<(Digest, Vec<(u64, Digest)>)>,
}

/// Peers and their open questions.
#[derive(Debug, Default)]
pub(super) struct Waiting(BTreeMap<u8, Peer>);

impl Waiting {
    pub(super) fn connected(&mut self, peer: u8, state: PeerState) {
        let question = None;
        self.0.insert(peer, Peer { state, question });
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
}

impl<M: LedgerMedium> Prover<M> {
    /// Makes ready to sign what follows the ledger: with the ledger that is there, if it leads up
    /// to the log and holds this node's key, else with a new one.
    pub(super) fn begin_signing(&mut self, now: Now) -> Result<(), ProverError> {
        if !self.placed {
            return Ok(());
        }
        let id = self.key.public().id();
        let usable = self.tip.as_ref().map(|tip| {
            let key = tip.keyring().may_sign(id, self.node);
            let place = tip
                .last()
                .is_none_or(|last| self.continues(last.last, last.chain));
            (key, place)
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
        if let Some(last) = self.anchored() {
            self.release_anchored(last);
        }
        self.batcher = None;
        for hashed in std::mem::take(&mut self.hashed) {
            self.hashed.push_back(hashed);
            self.batch_last(now)?;
        }
        Ok(())
    }

    /// Whether the log goes on where a ledger ends.
    fn continues(&self, last: Epoch, chain: hn4::types::ChainHash) -> bool {
        if last == self.floor.0 {
            return chain == self.floor.1;
        }
        let mut hashed = self.hashed.iter().map(|hashed| &hashed.root);
        hashed.any(|root| root.epoch == last && root.chain == chain)
    }

    /// Begins a new ledger with this node's key.
    fn renew(&mut self, now: Now, why: Option<&str>) -> Result<(), ProverError> {
        if let Some(why) = why {
            let text = format!("a new ledger begins, the old one is set aside: {why}");
            self.out.push_back(Out::Notice(text));
        }
        let header = LedgerHeader {
            scope: Scope::Shared,
            volume: self.identity.volume,
            created_ms: now.wall_ms,
        };
        let mut tip = self.ledger.renew(&header)?;
        let offer = KeyOffer::new(self.identity.volume, self.node, &self.key)?;
        let place = (self.identity.volume, 0, &tip.previous());
        let body = Body::Key(offer.accept(place, &[])?);
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
            state: None,
            dictionary: None,
            bytes: (raw_bytes, raw_bytes),
            time_ms: now.wall_ms,
        };
        let anchor = Anchor::new(batch, step);
        let signatures = vec![self.key.sign(&anchor.hash())?];
        let body = Body::Anchor(Box::new(SignedAnchor { anchor, signatures }));
        let bytes = tip.encode_next(now.wall_ms, &body);
        tip.push_bytes(&bytes)?;
        self.ledger.append(&[bytes])?;
        self.release_anchored(batch.last);
        self.out.push_back(Out::Proven(batch.last, batch.chain));
        self.serve_all()
    }

    pub(super) fn enrol(&mut self, now: Now, peer: u8, offer: KeyOffer) -> Result<(), ProverError> {
        let Some(state) = self.waiting.state(peer) else {
            return Ok(());
        };
        let volume = self.identity.volume;
        let digest = KeyOffer::digest(volume, offer.node, &offer.public);
        let own = offer.node == state.node;
        if !own || offer.public.verify(&digest, &offer.signature).is_err() {
            let text = format!("peer {peer} offered a key that is not its own; it is not enrolled");
            self.out.push_back(Out::Notice(text));
            return Ok(());
        }
        let Some(tip) = self.tip.as_mut() else {
            return Ok(());
        };
        if tip.keyring().knows(offer.public.id()) {
            return Ok(());
        }
        let place = (volume, tip.next_index(), &tip.previous());
        let body = Body::Key(offer.accept(place, &[&self.key])?);
        let bytes = tip.encode_next(now.wall_ms, &body);
        tip.push_bytes(&bytes)?;
        self.ledger.append(&[bytes])?;
        self.serve_all()
    }

    fn serve_all(&mut self) -> Result<(), ProverError> {
        let peers: Vec<u8> = self.waiting.0.keys().copied().collect();
        peers.into_iter().try_for_each(|peer| self.serve(peer))
    }

    /// Answers a peer's question, if there is anything to say.
    pub(super) fn serve(&mut self, peer: u8) -> Result<(), ProverError> {
        let Some(asker) = self.waiting.0.get_mut(&peer) else {
            return Ok(());
        };
        let (Some((theirs, places)), Some(header)) = (&asker.question, self.ledger.header()) else {
            return Ok(());
        };
        let mut first = 0;
        if *theirs == header.hash() {
            for (index, hash) in places {
                if self.ledger.hash_of(*index)? == Some(*hash) {
                    first = index + 1;
                    break;
                }
            }
        }
        if first >= self.ledger.records() {
            return Ok(());
        }
        let records = Message::Records {
            header: *header,
            first,
            bytes: self.ledger.read(first, RECORD_BYTES)?,
        };
        asker.question = None;
        self.out.push_back(Out::Send(peer, records.encode()));
        Ok(())
    }
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
