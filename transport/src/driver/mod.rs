//! The driver: sockets, connections and tasks around sessions.
//!
//! For each volume that is shared with a peer there is one [`PeerHandle`], which the daemon talks
//! to, and one task, which runs session after session over the links that connections give it. All
//! volumes shared with a peer use one QUIC connection (or one WebSocket each); one of them failing
//! does not disturb the others.
//!
//! Of two nodes, the one with the smaller name dials; the other accepts. Both know that from the
//! names, so there is never a second connection to choose from. Reconnecting is exponential with
//! jitter, from an injected seed.
//!
//! Everything runs on the tokio runtime it was started on; a `current_thread` one is meant.

mod backoff;
mod link;
mod quic;
mod registry;
mod session_task;
mod shelf;
mod wss;

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hn4::types::VolumeId;
use tokio::sync::{mpsc, watch};

pub use self::backoff::Backoff;
use self::registry::Registry;
use crate::pki::PkiError;
use crate::session::{CompressionStatus, Config, FromSession, LocalState, PeerRoles, ToSession};
use crate::tls::{Identity, KeyPin, TlsError};

/// Messages between the daemon and a session's task, each way.
const HANDLE_QUEUE: usize = 64;

/// Time since any fixed start.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// What the driver takes from outside instead of asking the system: time and randomness.
#[derive(Clone)]
pub struct Environment {
    /// Time since any fixed start.
    pub clock: Clock,
    /// Seed of all jitter.
    pub seed: u64,
}

impl Environment {
    /// The system's monotonic clock, and a seed that the caller took from the system.
    #[must_use]
    pub fn system(seed: u64) -> Self {
        Self {
            clock: session_task::system_clock(),
            seed,
        }
    }
}

/// How to reach a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TransportKind {
    /// QUIC over UDP.
    #[default]
    Quic,
    /// WebSocket over TLS over TCP.
    Wss,
}

impl fmt::Display for TransportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quic => "quic",
            Self::Wss => "wss",
        })
    }
}

/// A node to share volumes with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerConfig {
    /// Its name, as in its certificate.
    pub name: String,
    /// Where it listens, `host:port`. Needed only if this node dials, see [`dials`].
    pub address: Option<String>,
    /// Pin of its key.
    pub key_pin: KeyPin,
    /// The volumes that are shared with it, each with what it may be for it; it gets no other.
    pub volumes: Vec<(VolumeId, PeerRoles)>,
    /// Those of the volumes whose data is compressed with SCXQ2, if the peer wants it too.
    pub compressed: Vec<VolumeId>,
    /// How to reach it; both sides must say the same.
    pub transport: TransportKind,
}

/// Times of connections.
#[derive(Clone, Debug)]
pub struct Timings {
    /// For a handshake, from the first packet to the last.
    pub handshake_timeout: Duration,
    /// A connection without any packet for this long is given up.
    pub idle_timeout: Duration,
    /// The first wait before connecting again.
    pub first_backoff: Duration,
    /// The longest wait before connecting again.
    pub longest_backoff: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(8),
            first_backoff: Duration::from_millis(100),
            longest_backoff: Duration::from_secs(10),
        }
    }
}

/// What a node's transport needs to know.
#[derive(Debug)]
pub struct TransportConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// This node's name, as in its certificate.
    pub node_name: String,
    /// This node's certificate and key, and the authority it believes.
    pub identity: Identity,
    /// Limits and times of sessions.
    pub session: Config,
    /// Times of connections.
    pub timings: Timings,
}

/// Why the transport did not start, or a peer was not added.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address can not be listened on.
    #[error("cannot listen on {address} ({transport}): {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// For which transport.
        transport: TransportKind,
        /// Why not.
        source: std::io::Error,
    },
    /// Certificate or key are unusable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A name is unfit.
    #[error(transparent)]
    Name(#[from] PkiError),
    /// The configuration contradicts itself.
    #[error("peer \"{peer}\": {what}")]
    Peer {
        /// Which peer.
        peer: String,
        /// What is wrong, and what to do.
        what: String,
    },
}

/// What the connection to a peer is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkStatus {
    /// Waiting for the peer to dial.
    Listening,
    /// Dialing, or about to.
    Connecting,
    /// Connected.
    Connected {
        /// The peer's address.
        remote: SocketAddr,
    },
    /// Not connected; will be tried again.
    Failed {
        /// Why, in words.
        why: String,
    },
}

impl LinkStatus {
    /// Notes that the connection to `remote` is gone, unless a newer one has taken over already.
    fn lost(&mut self, remote: SocketAddr, why: String) -> bool {
        let is_current = *self == Self::Connected { remote };
        if is_current {
            *self = Self::Failed { why };
        }
        is_current
    }
}

/// The daemon's end of everything about one volume and one peer.
#[derive(Debug)]
pub struct PeerHandle {
    /// Name of the peer.
    pub peer: String,
    /// The volume.
    pub volume: VolumeId,
    /// To the session that runs now. What names another session is dropped.
    pub to: mpsc::Sender<ToSession>,
    /// From the session that runs now. To be read always, without waiting for anything else.
    pub from: mpsc::Receiver<FromSession>,
    /// What the connection below is doing.
    pub link: watch::Receiver<LinkStatus>,
    /// What compression has done in the session that runs now, or ran last.
    pub compression: watch::Receiver<CompressionStatus>,
}

/// Whether the node of this name dials the other one: the smaller name does.
#[must_use]
pub fn dials(node: &str, peer: &str) -> bool {
    node < peer
}

/// Waits until a peer's tasks are told to stop.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // The other end being gone means the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// A running transport. Dropping it ends everything at once; [`shutdown`](Self::shutdown) says
/// goodbye first.
pub struct Transport {
    registry: Arc<Registry>,
    quic: quic::Quic,
    wss: wss::Wss,
}

impl Transport {
    /// Starts to listen. `volumes` tells, for each volume, what to say about it in hello; the
    /// daemon keeps it up to date. Must be called on a tokio runtime.
    ///
    /// # Errors
    ///
    /// If the address is taken, or certificate and key are unusable.
    pub async fn start(
        config: TransportConfig,
        volumes: HashMap<VolumeId, watch::Receiver<LocalState>>,
        environment: Environment,
    ) -> Result<Self, StartError> {
        crate::pki::check_name(&config.node_name)?;
        let listen = config.listen;
        let registry = Arc::new(Registry::new(config, volumes, environment));
        let (quic, wss) = listen_on_both(&registry, listen).await?;
        Ok(Self {
            registry,
            quic,
            wss,
        })
    }

    /// Where this node listens; tells the port if the configured one was 0.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.quic.local_address()
    }

    /// Makes a volume known that peers may be configured to share.
    pub fn add_volume(&self, volume: VolumeId, states: watch::Receiver<LocalState>) {
        self.registry.add_volume(volume, states);
    }

    /// Adds a peer: gives a handle for each volume shared with it.
    ///
    /// # Errors
    ///
    /// If a peer of that name or key exists, a volume is unknown, or it is to be dialed and has no
    /// address.
    pub fn add_peer(&self, peer: PeerConfig) -> Result<Vec<PeerHandle>, StartError> {
        let dial = dials(self.registry.node_name(), &peer.name);
        let (handles, dialer) = self.registry.add_peer(peer, dial)?;
        if let Some(dialer) = dialer {
            let task = match dialer.peer.transport {
                TransportKind::Quic => tokio::spawn(self.quic.dialer(dialer)),
                TransportKind::Wss => tokio::spawn(self.wss.dialer(dialer)),
            };
            self.registry.own_task(task.abort_handle());
        }
        Ok(handles)
    }

    /// Ends all sessions with a peer and lets its key in no longer. False if there is none.
    pub fn remove_peer(&self, name: &str) -> bool {
        self.registry.remove_peer(name)
    }

    /// Says goodbye to all peers, for at most a second, and ends everything.
    pub async fn shutdown(self) {
        self.registry.stop_all(Duration::from_secs(1)).await;
        self.wss.close();
        self.quic.close().await;
    }
}

/// QUIC and WebSocket listen on the same port, of UDP and of TCP. If any port will do, one is
/// looked for that is free in both.
async fn listen_on_both(
    registry: &Arc<Registry>,
    listen: SocketAddr,
) -> Result<(quic::Quic, wss::Wss), StartError> {
    let mut attempts = if listen.port() == 0 { 8 } else { 1 };
    loop {
        attempts -= 1;
        let quic = quic::Quic::start(registry.clone(), listen)?;
        let port = quic.local_address().port();
        match wss::Wss::start(registry.clone(), SocketAddr::new(listen.ip(), port)).await {
            Ok(wss) => return Ok((quic, wss)),
            Err(_) if attempts > 0 => quic.abort(),
            Err(error) => return Err(error),
        }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.registry.abort_all();
        self.wss.close();
        self.quic.abort();
    }
}
