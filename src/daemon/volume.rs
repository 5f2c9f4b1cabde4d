//! One volume's task: carries messages between its shard, its sessions and the control socket.

mod peers;
mod roots;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use hn4::log::LogIdentity;
use hn4::types::{NodeId, Term};
use hn4_engine::core::event::{Control, CopyStatus, PeerEvent, PeerId, RequestId};
use hn4_engine::shard::{FromShard, ShardHandle, ShardStatus, ToShard, TreeFeed};
use hn4_proof::prover::PeerState;
use hn4_proof::prover::keys::NodeKeys;
use hn4_proof::sign::KeyId;
use hn4_transport::driver::{LinkStatus, PeerHandle};
use hn4_transport::session::{
    CompressionStatus, FromSession, Input, LocalState, Output, Role, SessionId, ToSession,
};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use self::peers::{Change, FromPeer, Peer};
use super::proof::{FromProver, ProofHandle, ProverReport, ToProver};
use super::seats::Seats;
use super::translate;
use super::tree::compare::{Compared, Roots};
use super::tree::{FromTree, ToTree, TreeHandle, TreeState};
use crate::config::VolumeSection;
use crate::config::identities::Identities;
use crate::control::api::{ProofReport, TreeReport};

/// Peers have this long to answer a promotion, and to send what this node lacks.
const PROMOTION_MS: u64 = 20_000;

/// A request to a volume's task.
#[derive(Debug)]
pub(super) enum Ask {
    /// What everything looks like.
    Status(oneshot::Sender<Report>),
    /// Something for the core.
    Control(Control, oneshot::Sender<Result<(), String>>),
    /// Become primary in the next term, if so many copies, this one included, agree.
    Promote {
        answers: usize,
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// The node has other keys.
    Keys(Box<NodeKeys>),
    /// Begin a deep verify.
    Verify(oneshot::Sender<Result<(), String>>),
    /// Ask this peer, which is primary, to hand over.
    StepDown { peer: String },
    /// Ask this peer for a sign of life. The reply is dropped if there is none.
    Ping {
        peer: String,
        reply: oneshot::Sender<()>,
    },
    /// Have the peers of this section from now on.
    Peers {
        section: Box<VolumeSection>,
        accept_fewer_copies: bool,
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Talk to a peer of the section over this.
    Connect(Box<PeerHandle>),
    /// Flush the log, drain for at most so many milliseconds, end.
    Stop { drain_ms: u64 },
}

/// The state of a volume with what only the daemon knows.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) section: Arc<VolumeSection>,
    /// Its peers, too, are in the order of the configuration.
    pub(super) shard: ShardStatus,
    /// What the connection to each peer is doing, in the order of the configuration.
    pub(super) links: Vec<LinkStatus>,
    /// What each peer does for the volume, while a session is open.
    pub(super) roles: Vec<Option<Role>>,
    /// What compression has done for each peer.
    pub(super) compression: Vec<CompressionStatus>,
    /// What the prover looks like, if there is one.
    pub(super) proof: Option<ProverReport>,
    /// What the state tree looks like, if there is one.
    pub(super) tree: Option<TreeState>,
    /// What comparing roots with each peer has shown last.
    pub(super) compared: Vec<Option<Compared>>,
}

impl Report {
    /// Name of the peer that is primary.
    pub(super) fn primary(&self) -> Option<String> {
        let mut peers = self.section.peers.iter().zip(&self.roles);
        let found = peers.find(|&(_, &role)| role == Some(Role::Primary));
        found.map(|(peer, _)| peer.name.clone())
    }

    /// What a peer does for the volume, while a session is open.
    pub(super) fn role_of(&self, name: &str) -> Option<Role> {
        let mut peers = self.section.peers.iter().zip(&self.roles);
        peers.find(|(peer, _)| peer.name == name)?.1.to_owned()
    }

    /// What is told about the state tree.
    pub(super) fn tree(&self) -> Option<TreeReport> {
        let policy = self.section.verify_reads;
        self.tree.as_ref().map(|tree| tree.report(policy))
    }

    /// What is told about proofs.
    pub(super) fn proof(&self) -> Option<ProofReport> {
        let ProverReport {
            status,
            failed,
            notice,
        } = self.proof.clone()?;
        Some(ProofReport {
            ledger_records: status.records,
            anchored_epoch: status.anchored.map(|epoch| epoch.0),
            lag_bytes: self.shard.proof_lag_bytes,
            waiting_epochs: status.waiting_epochs,
            throttles: self.shard.proof_throttles,
            key_id: status.key.map(|key| key.to_string()),
            active_key_ids: status.active_keys.iter().map(KeyId::to_string).collect(),
            state_epoch: status.state.map(|(epoch, _)| epoch.0),
            state_root: status.state.map(|(_, root)| root.to_string()),
            unproven_primary: status.unproven_primary,
            failed,
            notice,
        })
    }
}

/// How a volume was left.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) name: String,
    pub(super) identity: LogIdentity,
    /// The backing has everything that the log has.
    pub(super) clean: bool,
}

/// See the module.
pub(super) struct VolumeTask {
    name: String,
    shard: ShardHandle,
    wake: Arc<Notify>,
    identity: LogIdentity,
    node: NodeId,
    identities: Arc<Identities>,
    max_epoch_bytes: u64,
    state: watch::Sender<LocalState>,
    status: CopyStatus,
    section: watch::Sender<Arc<VolumeSection>>,
    seats: Seats,
    /// A change of peers that the core thinks about.
    change: Option<Change>,
    /// By their places in `seats`.
    peers: Vec<Option<Peer>>,
    generation: u64,
    merged: mpsc::Sender<FromPeer>,
    from_sessions: mpsc::Receiver<FromPeer>,
    asks: mpsc::Receiver<Ask>,
    next_id: u64,
    controls: HashMap<u64, oneshot::Sender<Result<(), String>>>,
    statuses: HashMap<u64, oneshot::Sender<Report>>,
    proof: Option<ProofHandle>,
    proof_report: Option<ProverReport>,
    tree: Option<TreeHandle>,
    tree_state: Option<TreeState>,
    roots: Roots,
}

/// A volume that is open, before its peers are known.
pub(super) struct OpenVolume {
    pub(super) name: String,
    pub(super) shard: ShardHandle,
    pub(super) wake: Arc<Notify>,
    pub(super) identity: LogIdentity,
    pub(super) node: NodeId,
    pub(super) identities: Arc<Identities>,
    pub(super) max_epoch_bytes: u64,
    pub(super) status: CopyStatus,
    pub(super) state: watch::Sender<LocalState>,
    pub(super) proof: Option<ProofHandle>,
    pub(super) tree: Option<TreeHandle>,
}

impl OpenVolume {
    /// Waits for the first word of the shard, which says what state the copy is in; and what came
    /// for the state tree before it.
    pub(super) async fn first_state(
        shard: &mut ShardHandle,
        wake: &Notify,
    ) -> Result<(CopyStatus, LogIdentity, Vec<TreeFeed>)> {
        shard.send(ToShard::Status(RequestId(0)));
        let mut early = Vec::new();
        loop {
            while let Some(message) = shard.receive() {
                match message {
                    FromShard::Status { status, .. } => {
                        return Ok((status.copy, status.identity, early));
                    }
                    FromShard::Tree(feed) => early.push(feed),
                    FromShard::Ended(result) => {
                        let _clean = result.map_err(anyhow::Error::msg)?;
                        anyhow::bail!("the shard ended before it served");
                    }
                    _ => {}
                }
            }
            wake.notified().await;
        }
    }
}

impl VolumeTask {
    /// A volume with the peers of its section, none of which is connected yet.
    pub(super) fn new(
        open: OpenVolume,
        section: &VolumeSection,
        asks: mpsc::Receiver<Ask>,
    ) -> Self {
        let (merged, from_sessions) = mpsc::channel(64);
        let OpenVolume {
            name,
            shard,
            wake,
            identity,
            node,
            identities,
            max_epoch_bytes,
            status,
            state,
            proof,
            tree,
        } = open;
        let task = Self {
            name,
            shard,
            wake,
            identity,
            node,
            identities,
            max_epoch_bytes,
            state,
            status,
            section: watch::Sender::new(Arc::new(section.clone())),
            seats: Seats::new(&section.peers),
            change: None,
            peers: Vec::new(),
            generation: 0,
            merged,
            from_sessions,
            asks,
            next_id: 1,
            controls: HashMap::new(),
            statuses: HashMap::new(),
            proof,
            proof_report: None,
            tree_state: tree.is_some().then(TreeState::default),
            tree,
            roots: Roots::default(),
        };
        task.tell_standing();
        task
    }

    /// Its section of the configuration; the peers in it may change.
    pub(super) fn section(&self) -> watch::Receiver<Arc<VolumeSection>> {
        self.section.subscribe()
    }

    /// Runs until the shard ends.
    ///
    /// # Errors
    /// If the shard could not go on.
    pub(super) async fn run(mut self) -> Result<Ended> {
        // A shard that panicked cannot say so; it is looked after now and then.
        let mut look = tokio::time::interval(Duration::from_secs(5));
        loop {
            while let Some(message) = self.shard.receive() {
                if let FromShard::Ended(result) = message {
                    self.shard.join();
                    return match result {
                        Ok(clean) => Ok(Ended {
                            name: self.name,
                            identity: self.identity,
                            clean,
                        }),
                        Err(why) => Err(anyhow::Error::msg(why).context(self.name)),
                    };
                }
                self.shard_said(message);
            }
            tokio::select! {
                () = self.wake.notified() => {}
                Some(said) = heard(&mut self.proof) => self.prover_said(said),
                Some(said) = heard_of(&mut self.tree) => self.tree_said(said),
                Some((peer, generation, message)) = self.from_sessions.recv() => {
                    let known = self.peers.get(peer).and_then(Option::as_ref);
                    if known.is_some_and(|peer| peer.generation == generation) {
                        self.session_said(peer, message);
                    }
                }
                Some(ask) = self.asks.recv() => self.ask(ask),
                _ = look.tick() => {
                    if self.shard.is_finished() {
                        anyhow::bail!("volume {}: its thread has died", self.name);
                    }
                }
            }
        }
    }

    fn shard_said(&mut self, message: FromShard) {
        match message {
            FromShard::Peer {
                peer,
                session,
                message,
            } => {
                self.tell_session(peer, session, translate::input(message));
            }
            FromShard::Frame {
                peer,
                session,
                epoch,
                bytes,
            } => {
                let frame = bytes.into();
                self.tell_session(peer, session, Input::SendEpoch { epoch, frame });
            }
            FromShard::Piece {
                peer,
                session,
                piece,
            } => {
                self.tell_session(peer, session, translate::piece_input(piece));
            }
            FromShard::ControlDone { id, result } => {
                if let Some(change) = self.change.take_if(|change| change.id == id) {
                    self.changed(change, result);
                } else if let Some(reply) = self.controls.remove(&id.0) {
                    // Who asked may be gone.
                    let _ = reply.send(result);
                } else if let Err(why) = result {
                    // A peer had asked for it.
                    tracing::warn!(volume = %self.name, why, "this node does not step down");
                }
            }
            FromShard::State(status) => {
                let before = std::mem::replace(&mut self.status, status);
                if (before.role, before.term) != (status.role, status.term) {
                    self.tell_standing();
                }
                let state = LocalState {
                    compares: self.tree.is_some(),
                    repairs: self.tree.is_some(),
                    resyncs: self.tree.is_some() && status.may_keep(),
                    ..translate::local_state(
                        &self.identity,
                        self.node,
                        self.max_epoch_bytes,
                        self.proof.is_some(),
                        &status,
                    )
                };
                self.state.send_replace(state);
            }
            FromShard::Status { id, status } => {
                if let Some(reply) = self.statuses.remove(&id.0) {
                    let _ = reply.send(self.report(*status));
                }
            }
            FromShard::Proof(feed) => self.tell_prover(ToProver::Feed(feed)),
            FromShard::Tree(feed) => {
                if let Some(tree) = &self.tree {
                    tree.send(ToTree::Feed(feed));
                }
            }
            FromShard::Ended(_) => {}
        }
    }

    fn tell_session(&self, peer: PeerId, session: u64, input: Input) {
        if let Some(Some(peer)) = self.peers.get(usize::from(peer.0)) {
            // Fails only when the driver is gone, which ends everything anyway.
            let _ = peer.to.send(ToSession {
                session: SessionId(session),
                input,
            });
        }
    }

    fn session_said(&mut self, index: usize, message: FromSession) {
        if self.is_impostor(index, &message) {
            return;
        }
        let Some(Some(peer)) = self.peers.get_mut(index) else {
            return;
        };
        let FromSession { session, output } = message;
        let id = PeerId(u8::try_from(index).expect("the configuration bounds peers"));
        peer.tell_dictionary(&self.proof);
        let event = match output {
            Output::PeerState(ref state) if peer.session != Some(session) => {
                peer.session = Some(session);
                peer.role = Some(state.role);
                peer.compares = state.compares;
                peer.repairs = state.repairs;
                peer.last_words.clear();
                peer.refused = None;
                let (volume, role, copy) = (&self.name, state.role, state.copy);
                tracing::info!(%volume, peer = %peer.name, ?role, ?copy, "connected");
                let known = PeerState {
                    node: state.node,
                    session: session.0,
                    term: state.term,
                    proves: state.proves,
                    max_epoch_bytes: state.max_epoch_bytes,
                };
                tell(&self.proof, ToProver::Connected(id.0, known));
                self.shard.send(ToShard::Peer {
                    peer: id,
                    session: session.0,
                    event: PeerEvent::Connected,
                });
                self.greet_with_root(index);
                match translate::event(output) {
                    Some(event) => event,
                    None => return,
                }
            }
            Output::StepDown => return self.step_down(index),
            Output::Alive => return peer.gave_sign_of_life(),
            Output::Closed { reason } => {
                peer.role = None;
                peer.alive.clear();
                if peer.session.take().is_some() {
                    tracing::info!(volume = %self.name, peer = %peer.name, %reason, "disconnected");
                }
                if peer.last_words.is_empty() {
                    peer.last_words = reason.to_string();
                }
                tell(&self.proof, ToProver::Disconnected(id.0));
                PeerEvent::Disconnected
            }
            Output::Root(root) => return self.peer_root(index, &root),
            Output::Tree(message) => return self.peer_tree(index, message),
            Output::Proof(message) => {
                let proof = self.proof.as_ref();
                if proof.is_some_and(|proof| !proof.send_from_peer(id.0, message)) {
                    peer.last_words = "it says more about proofs than can be dealt with".to_owned();
                    self.tell_peer(index, Input::Close);
                }
                return;
            }
            Output::Refused { reason } => {
                tracing::warn!(volume = %self.name, peer = %peer.name, %reason, "refused");
                peer.last_words = reason.to_string();
                peer.refused = Some(reason.to_string());
                return;
            }
            output => match self.seen(id, output) {
                Some(event) => event,
                None => return,
            },
        };
        self.shard.send(ToShard::Peer {
            peer: id,
            session: session.0,
            event,
        });
    }

    /// Says something to the peer's present session, if there is one.
    fn tell_peer(&self, index: usize, input: Input) {
        let peer = self.peers.get(index).and_then(Option::as_ref);
        if let Some(session) = peer.and_then(|peer| peer.session) {
            let peer = PeerId(u8::try_from(index).unwrap_or(u8::MAX));
            self.tell_session(peer, session.0, input);
        }
    }

    /// A peer that is to be primary asks this node, which is, to hand over in order.
    fn step_down(&mut self, index: usize) {
        let peer = self.peers.get(index).and_then(Option::as_ref);
        let peer = peer.map_or("?", |peer| peer.name.as_str());
        tracing::warn!(volume = %self.name, %peer, "asks to take over; this node steps down");
        self.next_id += 1;
        self.shard.send(ToShard::Control {
            id: RequestId(self.next_id),
            control: Control::Demote,
        });
    }

    /// What a session says, for the core; the prover follows the primary that feeds this copy.
    fn seen(&self, peer: PeerId, output: Output) -> Option<PeerEvent> {
        let feeds = matches!(output, Output::SeedStart { .. } | Output::FeedOpened { .. });
        let of = self.peers.get(usize::from(peer.0)).and_then(Option::as_ref);
        if feeds && of.is_some_and(|of| of.role == Some(Role::Primary)) {
            self.tell_prover(ToProver::FedBy(peer.0));
        }
        translate::event(output)
    }

    fn tell_prover(&self, message: ToProver) {
        tell(&self.proof, message);
    }

    fn tell_standing(&self) {
        let primary = self.status.role == hn4::log::Role::Primary;
        self.tell_prover(ToProver::Standing(primary.then_some(self.status.term)));
    }

    fn prover_said(&mut self, said: FromProver) {
        match said {
            FromProver::Core(event) => self.shard.send(ToShard::Proof(event)),
            FromProver::Send {
                peer,
                session,
                bytes,
            } => self.tell_session(PeerId(peer), session, Input::Proof(bytes)),
            FromProver::Report(report) => self.proof_report = Some(report),
        }
    }

    fn ask(&mut self, ask: Ask) {
        self.next_id += 1;
        let id = RequestId(self.next_id);
        match ask {
            Ask::Status(reply) => {
                self.statuses.insert(id.0, reply);
                self.shard.send(ToShard::Status(id));
            }
            Ask::Control(control, reply) => {
                self.controls.insert(id.0, reply);
                self.shard.send(ToShard::Control { id, control });
            }
            Ask::Promote { answers, reply } => {
                self.controls.insert(id.0, reply);
                let term = Term {
                    counter: self.status.term.counter + 1,
                    node: self.node,
                };
                self.shard.send(ToShard::Control {
                    id,
                    control: Control::Promote {
                        term,
                        answers,
                        within_ms: PROMOTION_MS,
                    },
                });
            }
            Ask::Keys(keys) => self.tell_prover(ToProver::Keys(keys)),
            Ask::Verify(reply) => {
                let begun = match &self.tree {
                    Some(tree) => {
                        tree.send(ToTree::Verify);
                        Ok(())
                    }
                    None => Err("it has no state tree (tree = \"off\")".to_owned()),
                };
                // Who asked may be gone.
                let _ = reply.send(begun);
            }
            Ask::StepDown { peer } => {
                if let Some(place) = self.seats.place(&peer) {
                    self.tell_peer(place, Input::StepDown);
                }
            }
            Ask::Ping { peer, reply } => {
                if let Some(place) = self.seats.place(&peer) {
                    if let Some(Some(peer)) = self.peers.get_mut(place) {
                        peer.await_life(reply);
                    }
                    self.tell_peer(place, Input::Ping);
                }
            }
            Ask::Peers {
                section,
                accept_fewer_copies,
                reply,
            } => self.change_peers(id, *section, accept_fewer_copies, reply),
            Ask::Connect(handle) => self.connect(*handle),
            Ask::Stop { drain_ms } => self.shard.send(ToShard::Stop { drain_ms }),
        }
    }
}

fn tell(prover: &Option<ProofHandle>, message: ToProver) {
    if let Some(prover) = prover {
        prover.send(message);
    }
}

/// What the tree says next; waits for ever if there is none.
async fn heard_of(tree: &mut Option<TreeHandle>) -> Option<FromTree> {
    match tree {
        Some(tree) => tree.from.recv().await,
        None => std::future::pending().await,
    }
}

/// What the prover says next; waits for ever if there is none.
async fn heard(prover: &mut Option<ProofHandle>) -> Option<FromProver> {
    match prover {
        Some(prover) => prover.from.recv().await,
        None => std::future::pending().await,
    }
}
