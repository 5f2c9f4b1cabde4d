//! The peers of a volume: their connections, and changes of who they are.

use std::sync::Arc;

use hn4::types::Epoch;
use hn4_engine::core::PeerSet;
use hn4_engine::core::event::{Control, PeerEvent, PeerId, RequestId};
use hn4_engine::shard::{ShardStatus, ToShard};
use hn4_proof::scxq2::DictionaryId;
use hn4_transport::driver::{LinkStatus, PeerHandle};
use hn4_transport::session::{
    CompressionStatus, FromSession, Input, Output, Role, SessionId, ToSession,
};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Report, VolumeTask, tell};
use crate::config::VolumeSection;
use crate::daemon::proof::{ProofHandle, ToProver};
use crate::daemon::seats::Seats;
use crate::daemon::tree::compare;

/// Peers that stay have this long to get what was acknowledged, before one is removed.
const CHANGE_MS: u64 = 20_000;

/// What is needed to talk to one peer.
pub(super) struct Peer {
    pub(super) name: String,
    /// Bounded by the peer's credit, which bounds what the shard sends.
    pub(super) to: mpsc::UnboundedSender<ToSession>,
    /// Tells what comes from this connection from what came from earlier ones.
    pub(super) generation: u64,
    pub(super) session: Option<SessionId>,
    pub(super) role: Option<Role>,
    /// It takes roots.
    pub(super) compares: bool,
    /// Its tree answers.
    pub(super) repairs: bool,
    pub(super) roots: compare::Peer,
    /// The place of a difference that was told.
    pub(super) difference: Option<Epoch>,
    /// Who waits for a sign of life.
    pub(super) alive: Vec<oneshot::Sender<()>>,
    pub(super) link: watch::Receiver<LinkStatus>,
    pub(super) compression: watch::Receiver<CompressionStatus>,
    /// What is sent is packed with it, and the prover knows that.
    dictionary: Option<DictionaryId>,
    /// Why the last session was refused or ended.
    pub(super) last_words: String,
    /// Why the last session was refused, if it was.
    pub(super) refused: Option<String>,
}

/// What a session with the peer at a place says, and of which generation the connection is.
pub(super) type FromPeer = (usize, u64, FromSession);

/// Other peers, once the core agrees.
pub(super) struct Change {
    pub(super) id: RequestId,
    pub(super) section: VolumeSection,
    pub(super) seats: Seats,
    pub(super) reply: oneshot::Sender<Result<(), String>>,
}

impl Peer {
    /// Gives a peer's session a queue of its own, so that a slow one holds up nobody else.
    fn new(
        place: usize,
        generation: u64,
        handle: PeerHandle,
        merged: mpsc::Sender<FromPeer>,
    ) -> Self {
        let PeerHandle {
            peer: name,
            to: session,
            mut from,
            link,
            compression,
            ..
        } = handle;
        let (to, mut queue) = mpsc::unbounded_channel::<ToSession>();
        tokio::spawn(async move {
            while let Some(message) = queue.recv().await {
                if session.send(message).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            while let Some(message) = from.recv().await {
                if merged.send((place, generation, message)).await.is_err() {
                    return;
                }
            }
        });
        Self {
            name,
            to,
            generation,
            session: None,
            role: None,
            compares: false,
            repairs: false,
            roots: compare::Peer::default(),
            difference: None,
            alive: Vec::new(),
            link,
            compression,
            dictionary: None,
            last_words: String::new(),
            refused: None,
        }
    }

    /// Tells the prover when what is sent is packed with another dictionary than before.
    pub(super) fn tell_dictionary(&mut self, proof: &Option<ProofHandle>) {
        let dictionary = self.compression.borrow().dictionary;
        if dictionary != self.dictionary {
            self.dictionary = dictionary;
            let message = dictionary.map(ToProver::Dictionary);
            message.into_iter().for_each(|message| tell(proof, message));
        }
    }

    /// The next sign of life is also for this one. Whoever waits already goes on waiting: to be
    /// dropped would mean that the peer is silent.
    pub(super) fn await_life(&mut self, reply: oneshot::Sender<()>) {
        // Who has lost patience is not waiting any more.
        self.alive.retain(|waiting| !waiting.is_closed());
        self.alive.push(reply);
    }

    pub(super) fn gave_sign_of_life(&mut self) {
        for reply in self.alive.drain(..) {
            // Who asked may be gone.
            let _ = reply.send(());
        }
    }

    /// What the connection is doing; after a session that failed, why it did.
    pub(super) fn describe(&self) -> LinkStatus {
        match &*self.link.borrow() {
            LinkStatus::Connected { .. }
                if self.session.is_none() && !self.last_words.is_empty() =>
            {
                LinkStatus::Failed {
                    why: self.last_words.clone(),
                }
            }
            LinkStatus::Failed { why } => {
                let refused = self
                    .refused
                    .as_ref()
                    .map(|refusal| format!("{why}; the last session was refused: {refusal}"));
                let why = refused.unwrap_or_else(|| why.clone());
                LinkStatus::Failed { why }
            }
            link => link.clone(),
        }
    }
}

/// The core's name for a place.
pub(super) fn peer_id(place: usize) -> PeerId {
    PeerId(u8::try_from(place).expect("the configuration bounds peers"))
}

impl VolumeTask {
    /// Whether a session that opens is of a peer that calls itself by the node id of another one:
    /// then it is closed.
    pub(super) fn is_impostor(&mut self, index: usize, message: &FromSession) -> bool {
        let Output::PeerState(state) = &message.output else {
            return false;
        };
        let session = message.session;
        let peer = self.peers.get_mut(index).and_then(Option::as_mut);
        let Some(peer) = peer.filter(|peer| peer.session != Some(session)) else {
            return false;
        };
        let section = Arc::clone(&self.section.borrow());
        let is_peer = |name: &str| section.peers.iter().any(|peer| peer.name == name);
        let Err(why) = self.identities.claim(&peer.name, state.node, is_peer) else {
            return false;
        };
        tracing::error!(volume = %self.name, peer = %peer.name, "refused: {why}");
        (peer.last_words, peer.refused) = (why.clone(), Some(why));
        let id = PeerId(u8::try_from(index).unwrap_or(u8::MAX));
        self.tell_session(id, session.0, Input::Close);
        true
    }

    pub(super) fn report(&self, mut shard: ShardStatus) -> Report {
        let section = Arc::clone(&self.section.borrow());
        let places = section
            .peers
            .iter()
            .map(|peer| self.seats.place(&peer.name));
        let places: Vec<usize> = places.map(|place| place.unwrap_or(usize::MAX)).collect();
        let seen = |&place: &usize| shard.peers.get(place).cloned().unwrap_or_default();
        shard.peers = places.iter().map(seen).collect();
        let peer = |place: usize| self.peers.get(place).and_then(Option::as_ref);
        // A peer whose connection was never started counts as being connected to.
        let link = |&place: &usize| peer(place).map_or(LinkStatus::Connecting, Peer::describe);
        let compression = |&place: &usize| {
            peer(place).map_or_else(Default::default, |peer| *peer.compression.borrow())
        };
        Report {
            compression: places.iter().map(compression).collect(),
            compared: places
                .iter()
                .map(|&place| peer(place)?.roots.last)
                .collect(),
            links: places.iter().map(link).collect(),
            roles: places.iter().map(|&place| peer(place)?.role).collect(),
            proof: self.proof_report.clone(),
            tree: self.tree_state.clone(),
            section,
            shard,
        }
    }

    pub(super) fn change_peers(
        &mut self,
        id: RequestId,
        section: VolumeSection,
        accept_fewer_copies: bool,
        reply: oneshot::Sender<Result<(), String>>,
    ) {
        let (seats, places) = self.seats.plan(&section.peers);
        let set = PeerSet {
            places,
            open_answers: section.open_answers(),
            accept_fewer_copies,
            within_ms: CHANGE_MS,
        };
        // The mesh asks for one change after the other.
        self.change = Some(Change {
            id,
            section,
            seats,
            reply,
        });
        let control = Control::Peers(Box::new(set));
        self.shard.send(ToShard::Control { id, control });
    }

    /// The core has taken over the change, or refused it.
    pub(super) fn changed(&mut self, change: Change, result: Result<(), String>) {
        if result.is_ok() {
            for place in self.seats.left(&change.seats) {
                let gone = self.peers.get_mut(place).and_then(Option::take);
                if gone.is_some_and(|peer| peer.session.is_some()) {
                    tell(&self.proof, ToProver::Disconnected(peer_id(place).0));
                }
            }
            self.seats = change.seats;
            self.section.send_replace(Arc::new(change.section));
        }
        // Who asked may be gone.
        let _ = change.reply.send(result);
    }

    /// Talks to a peer over a new connection; what still comes over an old one is not heard.
    pub(super) fn connect(&mut self, handle: PeerHandle) {
        let Some(place) = self.seats.place(&handle.peer) else {
            return;
        };
        if self.peers.len() <= place {
            self.peers.resize_with(place + 1, || None);
        }
        self.generation += 1;
        let peer = Peer::new(place, self.generation, handle, self.merged.clone());
        let old = self.peers[place].replace(peer);
        if let Some(session) = old.and_then(|peer| peer.session) {
            let peer = peer_id(place);
            tell(&self.proof, ToProver::Disconnected(peer.0));
            self.shard.send(ToShard::Peer {
                peer,
                session: session.0,
                event: PeerEvent::Disconnected,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use hn4::types::VolumeId;

    use super::*;

    fn peer() -> Peer {
        let (to, _) = mpsc::channel(1);
        let (_, from) = mpsc::channel(1);
        let handle = PeerHandle {
            peer: "beta".to_owned(),
            volume: VolumeId([1; 16]),
            to,
            from,
            link: watch::Sender::new(LinkStatus::Connecting).subscribe(),
            compression: watch::Sender::new(CompressionStatus::default()).subscribe(),
        };
        let (merged, _) = mpsc::channel(1);
        Peer::new(0, 1, handle, merged)
    }

    #[tokio::test]
    async fn one_sign_of_life_answers_everybody_who_waits_for_it() {
        let mut peer = peer();
        let ask = |peer: &mut Peer| {
            let (reply, answer) = oneshot::channel();
            peer.await_life(reply);
            answer
        };
        let (first, gone, second) = (ask(&mut peer), ask(&mut peer), ask(&mut peer));
        drop(gone);
        let third = ask(&mut peer);
        assert_eq!(peer.alive.len(), 3, "who lost patience is forgotten");
        peer.gave_sign_of_life();
        for answer in [first, second, third] {
            assert_eq!(answer.await, Ok(()));
        }
        let later = ask(&mut peer);
        drop(peer);
        assert!(later.await.is_err(), "silence is not taken for life");
    }
}
