//! What a shard tells about itself.

use hn4::log::LogIdentity;
use hn4::types::Epoch;

use crate::core::event::{CopyStatus, Lag, Progress};
use crate::core::recovery::RecoveryReport;
use crate::core::{FailedClosed, LagState, Obstacle, ReplicaLag, Waiting};

/// How a peer is doing, seen from here.
#[derive(Clone, Debug, Default)]
pub struct PeerStatus {
    /// A session is open.
    pub connected: bool,
    /// Epochs are being sent.
    pub live: bool,
    /// A full copy is being sent: bytes of the volume that are done.
    pub seeding_bytes: Option<u64>,
    /// Bytes that the last full copy left out, if state trees were compared for it.
    pub kept_bytes: Option<u64>,
    /// All epochs up to this one were handed to the session.
    pub sent: Epoch,
    /// What the peer says it has.
    pub progress: Progress,
    /// How far behind it is.
    pub lags: PeerLags,
    /// How lag control sees it.
    pub lag_state: LagState,
}

/// How far a peer is behind at each stage; `None` where the log does not reach back so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PeerLags {
    /// Handed to the session.
    pub sent: Option<Lag>,
    /// In the peer's memory.
    pub received: Option<Lag>,
    /// In the peer's log.
    pub durable: Option<Lag>,
    /// Known there to be proven.
    pub proven: Option<Lag>,
    /// In the peer's backing.
    pub applied: Option<Lag>,
}

/// The state of a volume and its shard at one moment.
#[derive(Clone, Debug)]
pub struct ShardStatus {
    /// The volume.
    pub identity: LogIdentity,
    /// Role, term, progress.
    pub copy: CopyStatus,
    /// Why it fails closed, if it does.
    pub failed: Option<FailedClosed>,
    /// What keeps this replica from catching up.
    pub obstacle: Option<Obstacle>,
    /// How far it is behind, if it is not primary.
    pub behind: Option<ReplicaLag>,
    /// It goes on without peers that its policy asks for.
    pub degraded: bool,
    /// Bytes of log that are not in the ledger yet; 0 where nothing is proven.
    pub proof_lag_bytes: u64,
    /// Clients are held back until proofs have caught up.
    pub proof_throttles: bool,
    /// An opening after a restart, or a promotion, waits for answers of other copies.
    pub waits_for_peers: Option<Waiting>,
    /// The primary serves since its restart without having heard of its peers.
    pub opened_alone: bool,
    /// Requests that wait for log or peers.
    pub waiting: usize,
    /// Bytes of the overlay in use.
    pub dirty_bytes: u64,
    /// Bytes of the overlay.
    pub overlay_bytes: u64,
    /// Bytes of log in use.
    pub log_used_bytes: u64,
    /// Bytes of log.
    pub log_bytes: u64,
    /// Connections of clients.
    pub clients: usize,
    /// Why there is no shadow file, although one is configured.
    pub no_shadow: Option<String>,
    /// The file in which a tail that only this node had was saved since its start.
    pub fork_file: Option<std::path::PathBuf>,
    /// The epoch that readers of this replica hold its backing at.
    pub pinned_epoch: Option<Epoch>,
    /// Connections that read this replica.
    pub readers: usize,
    /// Requests that were answered since the start, and how many bytes they moved.
    pub requests: u64,
    /// Bytes written by clients.
    pub written_bytes: u64,
    /// Bytes read by clients.
    pub read_bytes: u64,
    /// Bytes received of a full copy, while one is being taken in.
    pub seeding_bytes: Option<u64>,
    /// Bytes of the last copy into the shadow that were kept without being sent.
    pub kept_bytes: u64,
    /// Peers, in the order of the configuration.
    pub peers: Vec<PeerStatus>,
    /// What recovery found at the start.
    pub recovery: RecoveryReport,
    /// What the log lies on.
    pub log_device: String,
    /// What the volume lies on.
    pub backing_device: String,
    /// A flush of one of them is believed only because the configuration says so.
    pub assumed_strict_flush: bool,
}
