//! Nodes for tests: a transport with real sockets, and daemons so small that they fit in a test.
//! The log of a daemon is a list of byte strings; a frame's chain hash is a running digest.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use hn4::types::{ChainHash, Epoch, Incarnation, NodeId, Term, VolumeId};
use hn4_transport::driver::{
    Environment, PeerConfig, PeerHandle, Timings, Transport, TransportConfig, TransportKind,
};
use hn4_transport::pki::{self, Issued};
use hn4_transport::session::{
    AckState, Config, CopyState, FromSession, Input, LocalState, Output, PeerRoles, Role,
    SessionId, ToSession,
};
use hn4_transport::tls::Identity;
use tokio::sync::watch;

/// No event of a test may take longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) const VOLUME: VolumeId = VolumeId([0xAA; 16]);

/// An authority and a key for each of some nodes.
pub(crate) struct Cluster {
    authority: Issued,
    nodes: HashMap<String, Issued>,
}

impl Cluster {
    pub(crate) fn new(names: &[&str]) -> Self {
        let authority = pki::init_authority().expect("an authority");
        let issue = |name: &&str| {
            let issued = pki::issue_node(&authority.key_pem, name).expect("a node");
            ((*name).to_owned(), issued)
        };
        let nodes = names.iter().map(issue).collect();
        Self { authority, nodes }
    }

    pub(crate) fn node(&self, name: &str) -> &Issued {
        &self.nodes[name]
    }

    pub(crate) fn identity(&self, name: &str) -> Identity {
        let node = self.node(name);
        Identity::from_pem(
            node.certificate_pem.as_bytes(),
            node.key_pem.as_bytes(),
            self.authority.certificate_pem.as_bytes(),
        )
        .expect("an identity")
    }

    /// Another key in the name of a node, signed by the same authority.
    pub(crate) fn again(&self, name: &str) -> Identity {
        let other = pki::issue_node(&self.authority.key_pem, name).expect("a node");
        Identity::from_pem(
            other.certificate_pem.as_bytes(),
            other.key_pem.as_bytes(),
            self.authority.certificate_pem.as_bytes(),
        )
        .expect("an identity")
    }

    pub(crate) fn peer(&self, name: &str, address: SocketAddr, kind: TransportKind) -> PeerConfig {
        PeerConfig {
            name: name.to_owned(),
            address: Some(address.to_string()),
            key_pin: self.node(name).pin,
            volumes: vec![(VOLUME, PeerRoles::default())],
            compressed: vec![VOLUME],
            transport: kind,
        }
    }
}

pub(crate) fn config(name: &str, identity: Identity, listen: SocketAddr) -> TransportConfig {
    TransportConfig {
        listen,
        node_name: name.to_owned(),
        identity,
        session: Config {
            heartbeat_interval: Duration::from_millis(200),
            heartbeat_timeout: Duration::from_millis(1500),
            ..Config::default()
        },
        timings: Timings {
            first_backoff: Duration::from_millis(10),
            longest_backoff: Duration::from_millis(100),
            idle_timeout: Duration::from_secs(3),
            ..Timings::default()
        },
    }
}

pub(crate) fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

pub(crate) fn state(node: u8, role: Role) -> LocalState {
    LocalState {
        node: NodeId([node; 16]),
        volume: VOLUME,
        birth_nonce: [0xBB; 16],
        size_bytes: 64 << 20,
        sector_bytes: 512,
        format_version: 1,
        max_epoch_bytes: 4 << 20,
        role,
        term: Term {
            counter: 1,
            node: NodeId([1; 16]),
        },
        incarnation: Incarnation(1),
        tip: (Epoch(0), ChainHash::default()),
        tip_rank: hn4::types::Rank::default(),
        anchored: (Epoch(0), ChainHash::default()),
        durable: Epoch(0),
        applied: Epoch(0),
        copy: CopyState::Usable,
        proves: true,
        compares: false,
        repairs: false,
        resyncs: false,
    }
}

/// A node: its transport, and what it says about its one volume.
pub(crate) struct Node {
    pub(crate) transport: Transport,
    pub(crate) state: watch::Sender<LocalState>,
}

impl Node {
    pub(crate) async fn start(config: TransportConfig, state: LocalState) -> Self {
        let (sender, receiver) = watch::channel(state);
        let volumes = HashMap::from([(VOLUME, receiver)]);
        let transport = Transport::start(config, volumes, Environment::system(7))
            .await
            .expect("a transport");
        Self {
            transport,
            state: sender,
        }
    }

    /// Adds a peer with the one volume; gives the handle for it.
    pub(crate) fn add_peer(&self, peer: PeerConfig) -> PeerHandle {
        self.transport.add_peer(peer).expect("a new peer").remove(0)
    }
}

pub(crate) async fn next(handle: &mut PeerHandle) -> FromSession {
    tokio::time::timeout(LIMIT, handle.from.recv())
        .await
        .expect("an output in time")
        .expect("a running transport")
}

/// Nodes alpha, which dials and is the primary, and beta, the replica.
pub(crate) struct Pair {
    pub(crate) cluster: Cluster,
    pub(crate) alpha: Node,
    pub(crate) beta: Node,
    pub(crate) to_beta: PeerHandle,
    pub(crate) to_alpha: PeerHandle,
    pub(crate) server: Server,
}

impl Pair {
    /// Both, joined directly.
    pub(crate) async fn start(kind: TransportKind) -> Self {
        Self::start_with(kind, |_| {}, |address| address).await
    }

    /// Both; the replica's state may be changed, and alpha may reach beta by another address.
    pub(crate) async fn start_with(
        kind: TransportKind,
        change: impl FnOnce(&mut LocalState),
        reach: impl FnOnce(SocketAddr) -> SocketAddr,
    ) -> Self {
        let cluster = Cluster::new(&["alpha", "beta"]);
        let mut replica = state(2, Role::Replica);
        change(&mut replica);
        let node = |name| config(name, cluster.identity(name), any_port());
        let alpha = Node::start(node("alpha"), state(1, Role::Primary)).await;
        let beta = Node::start(node("beta"), replica).await;
        let address = alpha.transport.local_address();
        let to_alpha = beta.add_peer(cluster.peer("alpha", address, kind));
        let address = reach(beta.transport.local_address());
        let to_beta = alpha.add_peer(cluster.peer("beta", address, kind));
        Self {
            cluster,
            alpha,
            beta,
            to_beta,
            to_alpha,
            server: Server::default(),
        }
    }

    /// Moves epochs up to `last` over; gives the number of sessions it took.
    pub(crate) async fn replicate(&mut self, last: u64) -> u64 {
        let serve = self.server.serve(&mut self.to_beta, last);
        let take = take_log(&mut self.to_alpha, &self.beta.state, last);
        // The replica goes on taking, so that its last acknowledgements get through.
        tokio::select! {
            sessions = serve => sessions,
            () = async { take.await; std::future::pending().await } => 0,
        }
    }
}

/// Takes outputs until one is what `pick` looks for.
pub(crate) async fn wait_for<T>(
    handle: &mut PeerHandle,
    mut pick: impl FnMut(&Output) -> Option<T>,
) -> (SessionId, T) {
    loop {
        let FromSession { session, output } = next(handle).await;
        if let Some(found) = pick(&output) {
            return (session, found);
        }
    }
}

pub(crate) async fn send(handle: &PeerHandle, session: SessionId, input: Input) {
    handle
        .to
        .send(ToSession { session, input })
        .await
        .expect("a running transport");
}

/// The frame of an epoch, always the same for the same number.
pub(crate) fn frame(epoch: u64) -> Bytes {
    let length = 1 + (epoch * 7919 % 9000) + if epoch.is_multiple_of(50) { 700_000 } else { 0 };
    (0..length)
        .map(|index| (index ^ epoch).to_le_bytes()[0])
        .collect::<Vec<_>>()
        .into()
}

/// The daemon of a primary whose log holds all epochs there are.
#[derive(Default)]
pub(crate) struct Server {
    session: SessionId,
    next_epoch: Option<u64>,
    credit: i64,
}

impl Server {
    /// Serves whoever subscribes, until a replica has acknowledged epoch `last` as durable. Gives
    /// the number of sessions that were opened meanwhile.
    pub(crate) async fn serve(&mut self, handle: &mut PeerHandle, last: u64) -> u64 {
        let mut sessions = 0;
        loop {
            self.send(handle, last);
            let FromSession { session, output } = next(handle).await;
            if session != self.session {
                *self = Self {
                    session,
                    ..Self::default()
                };
            }
            match output {
                Output::PeerState(_) => sessions += 1,
                Output::Subscribe { tip, .. } => {
                    let from = tip.0.next();
                    send(handle, session, Input::FeedOpened { from }).await;
                    self.next_epoch = Some(from.0);
                }
                Output::PeerCredit { bytes } => {
                    self.credit += i64::try_from(bytes).expect("small");
                }
                Output::PeerAck(ack) if ack.durable.0 == last => return sessions,
                _ => {}
            }
        }
    }

    /// Sends what there is credit for. If the queue is full, the next output, an ack at the latest,
    /// is the occasion to go on.
    fn send(&mut self, handle: &PeerHandle, last: u64) {
        while let Some(epoch) = self
            .next_epoch
            .filter(|&epoch| self.credit > 0 && epoch <= last)
        {
            let frame = frame(epoch);
            let length = i64::try_from(frame.len()).expect("small");
            let input = Input::SendEpoch {
                epoch: Epoch(epoch),
                frame,
            };
            if handle
                .to
                .try_send(ToSession {
                    session: self.session,
                    input,
                })
                .is_err()
            {
                return;
            }
            self.credit -= length;
            self.next_epoch = Some(epoch + 1);
        }
    }
}

/// A replica that takes epochs up to `last`, checks each, and keeps its state true.
pub(crate) async fn take_log(
    handle: &mut PeerHandle,
    state: &watch::Sender<LocalState>,
    last: u64,
) {
    const GRANT: u64 = 4 << 20;
    while state.borrow().tip.0.0 < last {
        let FromSession { session, output } = next(handle).await;
        match output {
            Output::PeerState(_) => send(handle, session, Input::Credit { bytes: GRANT }).await,
            Output::EpochReceived {
                epoch,
                frame: received,
            } => {
                let tip = state.borrow().tip.0;
                assert_eq!(epoch, tip.next(), "an epoch was lost or came twice");
                assert_eq!(received, frame(epoch.0), "epoch {epoch} was changed");
                state.send_modify(|state| {
                    (state.tip.0, state.durable) = (epoch, epoch);
                });
                let bytes = received.len() as u64;
                send(handle, session, Input::Credit { bytes }).await;
                let ack = AckState {
                    received: epoch,
                    durable: epoch,
                    ..AckState::default()
                };
                send(handle, session, Input::Ack(ack)).await;
            }
            _ => {}
        }
    }
}
