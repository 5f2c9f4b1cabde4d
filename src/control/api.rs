//! What is said over the control socket. Stable: fields are added, never renamed or given another
//! meaning; readers ignore fields that they do not know.

use serde::{Deserialize, Serialize};

/// What a client asks for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// The state of the node and its volumes; answered by [`Response::Status`].
    Status,
    /// Make everything durable, and acknowledged as the volume's policy asks.
    Flush {
        /// Name of the volume.
        volume: String,
    },
    /// Write everything back to the backing.
    Drain {
        /// Name of the volume.
        volume: String,
    },
    /// Read every block of the backing and compare it with the state tree. Answered when it begins;
    /// the state says how far it is and what was found.
    Verify {
        /// Name of the volume.
        volume: String,
    },
    /// Become primary.
    Promote {
        /// Name of the volume.
        volume: String,
        /// Go on although epochs may be lost that another node acknowledged.
        #[serde(default)]
        accept_loss: bool,
    },
    /// Become a replica.
    Demote {
        /// Name of the volume.
        volume: String,
    },
    /// Become primary in place of the present one, which hands over in order.
    Switchover {
        /// Name of the volume.
        volume: String,
        /// Give up if the primary has not handed over after this time.
        timeout_ms: u64,
    },
    /// Take over the peers of the configuration file.
    Reload {
        /// Also if what was acknowledged will be on fewer copies than the policy asks for, until
        /// other peers have caught up.
        #[serde(default)]
        accept_fewer_copies: bool,
    },
    /// Replace keys that the node signs with. Answered when all ledgers hold the new ones, or after
    /// a while with what still waits.
    RotateKeys {
        /// Names of the algorithms; all that are in use if empty.
        #[serde(default)]
        algorithms: Vec<String>,
    },
    /// Wait until the backing holds an epoch.
    Wait {
        /// Name of the volume.
        volume: String,
        /// The epoch.
        applied: u64,
        /// Give up after this time.
        timeout_ms: u64,
    },
}

impl Request {
    /// The volume it is about, if it is about one.
    #[must_use]
    pub fn volume(&self) -> Option<&str> {
        match self {
            Self::Status | Self::Reload { .. } | Self::RotateKeys { .. } => None,
            Self::Flush { volume }
            | Self::Drain { volume }
            | Self::Verify { volume }
            | Self::Promote { volume, .. }
            | Self::Demote { volume }
            | Self::Switchover { volume, .. }
            | Self::Wait { volume, .. } => Some(volume),
        }
    }
}

/// What the daemon answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// It was done.
    Done {
        /// In words.
        message: String,
    },
    /// Answer to [`Request::Status`].
    Status(NodeStatus),
    /// It was not done.
    Error {
        /// What was not done.
        what: String,
        /// Why not.
        why: String,
        /// What can safely be done next.
        next: String,
    },
}

/// The node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub node: String,
    /// Its id, a UUID.
    pub node_id: String,
    /// Version of the daemon.
    pub version: String,
    /// Since the daemon started.
    pub uptime_ms: u64,
    /// Its volumes, in the order of the configuration.
    pub volumes: Vec<VolumeReport>,
}

impl NodeStatus {
    /// The worst of all volumes.
    #[must_use]
    pub fn health(&self) -> Health {
        self.volumes
            .iter()
            .map(|volume| volume.health)
            .max()
            .unwrap_or(Health::Ok)
    }
}

/// How much a state asks for attention. Ordered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Nothing to do.
    Ok,
    /// Works, but a promise is weaker than configured or will be.
    Attention,
    /// Clients are refused or wait, or this copy cannot be used.
    Failed,
}

/// A state that is not the ideal one, with its cause and the next safe command (P12).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// Stable name of the state, such as `failed-closed`.
    pub state: String,
    /// How much it asks for attention.
    pub health: Health,
    /// Why it is so.
    pub cause: String,
    /// What can safely be done.
    pub next: String,
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Its name.
    pub name: String,
    /// The worst of its findings.
    pub health: Health,
    /// Device or file of its blocks, as configured.
    pub backing: String,
    /// Device or file of its log, as configured.
    pub log: String,
    /// Its sockets, as configured.
    pub listen: Vec<String>,
    /// What acknowledgements mean, as configured.
    pub policy: Policy,
    /// Its state; missing if it is not open.
    pub state: Option<VolumeState>,
    /// Its peers, in the order of the configuration.
    pub peers: Vec<PeerReport>,
    /// Everything that is not as it should be, the worst first.
    pub findings: Vec<Finding>,
}

/// What acknowledgements mean.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Policy {
    /// `overlay` or `durable`.
    pub write_ack: String,
    /// `async`, `received` or `durable`.
    pub ack: String,
    /// Peers that must acknowledge; 0 with `async`.
    pub ack_peers: u64,
    /// `block` or `degrade`.
    pub on_degraded: String,
}

/// The state of an open volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeState {
    /// UUID that all copies share.
    pub volume_id: String,
    /// 32 hexadecimal digits, drawn when the volume was created.
    pub birth_nonce: String,
    /// Size of the volume.
    pub size_bytes: u64,
    /// Logical sector size.
    pub sector_bytes: u32,
    /// `primary`, `replica` or `fenced`.
    pub role: String,
    /// The counter of the term.
    pub term: u64,
    /// The node that was promoted in it, a UUID.
    pub term_node: String,
    /// Openings by a primary in this term.
    pub incarnation: u32,
    /// How complete the copy is.
    pub copy: CopyReport,
    /// The newest sealed epoch.
    pub tip_epoch: u64,
    /// Start of the hash of its frame header, hexadecimal. Equal on copies with an equal history.
    pub tip_chain: String,
    /// The newest epoch that is durable in the log.
    pub durable_epoch: u64,
    /// The newest epoch that is in this node's ledger; without proofs, the newest durable one on
    /// the primary.
    pub proven_epoch: u64,
    /// The epoch that the backing holds.
    pub applied_epoch: u64,
    /// How far this replica is behind; null on a primary.
    #[serde(default)]
    pub behind: Option<BehindReport>,
    /// The prover beside the volume; missing with `proof = "off"`.
    pub proof: Option<ProofReport>,
    /// The state tree beside the volume; missing with `tree = "off"`.
    #[serde(default)]
    pub tree: Option<TreeReport>,
    /// Requests that wait for the log or for peers.
    pub waiting_requests: u64,
    /// It goes on without peers that its policy asks for.
    pub degraded: bool,
    /// Overlay in use.
    pub dirty_bytes: u64,
    /// Overlay in all.
    pub overlay_bytes: u64,
    /// Log in use, with what is kept for peers.
    pub log_used_bytes: u64,
    /// Log in all.
    pub log_bytes: u64,
    /// Connections of clients.
    pub clients: u64,
    /// Requests of clients since the daemon started.
    pub requests: u64,
    /// Bytes that clients wrote since then.
    pub written_bytes: u64,
    /// Bytes that clients read since then.
    pub read_bytes: u64,
    /// What recovery found when the volume was opened.
    pub recovery: RecoveryFacts,
    /// What the log lies on, in words.
    pub log_device: String,
    /// What the volume lies on, in words.
    pub backing_device: String,
    /// A flush is believed only because the configuration says so.
    pub assumed_strict_flush: bool,
}

/// How far a replica is behind, as it sees it itself. What its primary sees is there, in the peer's
/// progress.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BehindReport {
    /// The newest epoch that it knows of.
    pub announced_epoch: u64,
    /// Epochs up to that one that have not arrived.
    pub missing_epochs: u64,
    /// Epochs up to that one that are not in the backing.
    pub unapplied_epochs: u64,
    /// Bytes of log of those that have arrived; null if the log does not tell.
    pub unapplied_bytes: Option<u64>,
    /// Milliseconds since the oldest of those was sealed; null like `unapplied_bytes`.
    pub unapplied_ms: Option<u64>,
    /// What it waits for, in words; null if it has everything.
    pub waits_for: Option<String>,
}

/// What runs beside a volume to prove it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ProofReport {
    /// Records of the ledger.
    pub ledger_records: u64,
    /// The last epoch in it.
    pub anchored_epoch: Option<u64>,
    /// Bytes of log that are not proven yet. 0 on a replica that does not wait for proofs.
    pub lag_bytes: u64,
    /// Epochs that are hashed and wait for their anchor.
    pub waiting_epochs: u64,
    /// Clients are held back until proofs have caught up.
    pub throttles: bool,
    /// Id of this node's key.
    pub key_id: Option<String>,
    /// Ids of this node's keys that may sign at the end of the ledger.
    #[serde(default)]
    pub active_key_ids: Vec<String>,
    /// The epoch of the newest state root in the ledger.
    #[serde(default)]
    pub state_epoch: Option<u64>,
    /// That root, 64 hexadecimal digits.
    #[serde(default)]
    pub state_root: Option<String>,
    /// The primary proves nothing, so that epochs are applied as soon as they are durable there.
    pub unproven_primary: bool,
    /// Why nothing is proven at the moment.
    pub failed: Option<String>,
    /// The last thing that was set aside or refused.
    pub notice: Option<String>,
}

/// The hashes of what the backing holds.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TreeReport {
    /// The epoch that the backing held when the tree was last brought up to it.
    pub epoch: Option<u64>,
    /// Root over all blocks at that epoch, 64 hexadecimal digits. Equal on copies with equal
    /// contents; `tests/state_root.py` computes it from the raw device. Null while the tree is
    /// being built.
    pub root: Option<String>,
    /// Bytes of the device that are hashed already; null when the tree is complete.
    pub built_bytes: Option<u64>,
    /// Entries for single blocks in its files.
    pub leaves: u64,
    /// Why there is none at the moment.
    pub failed: Option<String>,
    /// Why it was built anew.
    pub notice: Option<String>,
    /// Bytes of the device that the deep verify that is under way has read; null without one.
    #[serde(default)]
    pub verified_bytes: Option<u64>,
    /// When the last deep verify ended, in milliseconds since 1970; null before the first.
    #[serde(default)]
    pub verified_at_ms: Option<u64>,
    /// Blocks of 4 KiB that were damaged and have been written again from a peer's copy, ever.
    #[serde(default)]
    pub repaired_blocks: u64,
    /// Blocks of 4 KiB that are known not to be what was written there.
    #[serde(default)]
    pub bad_blocks: u64,
    /// Their places, at most 64 ranges of sectors, both ends inclusive, such as `LBA 8-15`.
    #[serde(default)]
    pub bad_lbas: Vec<String>,
    /// What came of comparing clients' reads with the tree; null with `verify_reads = "off"`.
    #[serde(default)]
    pub reads: Option<ReadsReport>,
}

/// Blocks of 4 KiB that clients' reads took from the backing, since the daemon was started.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ReadsReport {
    /// `sample` or `all`.
    pub policy: String,
    /// They were compared, and are what was written there.
    pub checked_blocks: u64,
    /// They were to be compared, and the tree did not know them: it was being built, or there was
    /// none.
    pub unchecked_blocks: u64,
    /// They were not what was written there.
    pub bad_blocks: u64,
    /// They were read again before they were judged, since a sweep may have been writing them.
    pub repeated_blocks: u64,
}

/// How complete a copy is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum CopyReport {
    /// It holds nothing of the volume yet.
    Fresh,
    /// A full copy is being filled in.
    Seeding {
        /// Bytes of the volume that have arrived, or were kept.
        received_bytes: u64,
        /// Bytes of those that were not sent, since the primary's state tree had told that they are
        /// the same as what was brought; since this node was started.
        #[serde(default)]
        kept_bytes: u64,
        /// Bytes of the volume that are durable here.
        durable_bytes: u64,
        /// The copy is exact when this epoch has been applied; unknown until all pieces were sent.
        usable_after_epoch: Option<u64>,
    },
    /// An exact prefix of the volume's history.
    Usable,
    /// The same, too old for the primary's log; a full copy is coming into the shadow.
    Shadowing {
        /// Bytes of the volume that were compared.
        compared_bytes: u64,
        /// Bytes of those that were not sent, since the primary's state tree had told that they are
        /// the same; since this node was started.
        #[serde(default)]
        kept_bytes: u64,
        /// Bytes of the volume that need not come again.
        durable_bytes: u64,
        /// Bytes of the shadow file that are durable.
        shadow_bytes: u64,
    },
    /// The full copy is complete, and its shadow is being written over the backing.
    Applying {
        /// Bytes of the shadow file.
        shadow_bytes: u64,
    },
}

/// What recovery found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RecoveryFacts {
    /// The backing held this epoch.
    pub checkpoint_epoch: u64,
    /// The log reached to this one.
    pub tip_epoch: u64,
    /// Epochs that were read back into the overlay.
    pub replayed_epochs: u64,
    /// Bytes of them.
    pub replayed_bytes: u64,
    /// An incomplete frame after the tip was dropped; it had never been acknowledged as durable.
    pub torn_tail: bool,
}

/// A peer of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerReport {
    /// Its name.
    pub name: String,
    /// Its address, if this node knows it.
    pub address: Option<String>,
    /// `quic` or `wss`.
    pub transport: String,
    /// What the connection is doing, in words.
    pub link: String,
    /// A session about this volume is open.
    pub connected: bool,
    /// Epochs are being sent to it.
    pub live: bool,
    /// A full copy is being sent: bytes of the volume that are done.
    pub seeding_bytes: Option<u64>,
    /// Bytes that the present full copy or the last one leaves out, since comparing the state trees
    /// has shown that the peer has them; missing if they were not compared.
    #[serde(default)]
    pub kept_bytes: Option<u64>,
    /// How far it is. Only a primary knows.
    pub progress: Option<PeerProgress>,
    /// How far it may be behind; missing without a bound.
    pub lag_control: Option<LagControl>,
    /// What SCXQ2 does for it; missing if it is off on either side, or before the first session.
    #[serde(default)]
    pub compression: Option<CompressionReport>,
    /// What comparing the two copies by their state roots has shown last; missing before there was
    /// an epoch of which both have said it since this node started.
    #[serde(default)]
    pub compared: Option<ComparedReport>,
}

/// Two copies at one epoch.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ComparedReport {
    /// Whether they have the same contents.
    pub equal: bool,
    /// The epoch.
    pub epoch: u64,
    /// Milliseconds since they were compared.
    pub age_ms: u64,
    /// Root of this copy.
    pub root: String,
    /// Root of the peer's.
    pub peer_root: String,
}

/// Compression between this node and a peer, in the present session or the last one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CompressionReport {
    /// Bytes of epochs and copies that were sent, before compression.
    pub sent_raw_bytes: u64,
    /// What of them went over the wire.
    pub sent_wire_bytes: u64,
    /// Bytes that came, after they were unpacked.
    pub received_raw_bytes: u64,
    /// What of them came over the wire.
    pub received_wire_bytes: u64,
    /// Raw by wire bytes, both directions, in hundredths; 100 before anything was sent.
    pub ratio_percent: u64,
    /// The dictionary that is packed with, `sha256:...`; missing before there is one.
    pub dictionary_id: Option<String>,
    /// The peer's newest dictionary.
    pub peer_dictionary_id: Option<String>,
}

impl CompressionReport {
    /// Bytes that did not have to travel.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        let raw = self.sent_raw_bytes + self.received_raw_bytes;
        raw.saturating_sub(self.sent_wire_bytes + self.received_wire_bytes)
    }
}

/// The bound of a peer's lag, as configured, and what comes of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LagControl {
    /// Bytes of log that it has not flushed.
    pub max_lag_bytes: Option<u64>,
    /// Age of the oldest epoch that it lacks.
    pub max_lag_seconds: Option<u64>,
    /// `throttle`, `spill` or `detach`.
    pub on_exceed: String,
    /// `within`, `throttling`, `spilling` or `detached`.
    pub state: String,
}

/// How far a peer is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerProgress {
    /// Handed to the session.
    pub sent: Stage,
    /// In the peer's memory.
    pub received: Stage,
    /// In the peer's log.
    pub durable: Stage,
    /// Known there to be anchored.
    pub proven: Stage,
    /// In the peer's backing.
    pub applied: Stage,
}

/// One stage on the way to a peer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stage {
    /// All epochs up to this one.
    pub epoch: u64,
    /// Epochs behind this node's tip.
    pub lag_epochs: u64,
    /// Bytes of log behind; null if the log does not reach back so far any more.
    pub lag_bytes: Option<u64>,
    /// Milliseconds since the oldest missing epoch was sealed; null like `lag_bytes`.
    pub lag_ms: Option<u64>,
}
