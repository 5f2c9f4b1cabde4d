//! The configuration file: TOML, read into validated types.
//!
//! Everything that is wrong with a file is told at once, each with its line, the allowed values and
//! what to do. A key that is not known is refused with the nearest known name; every number has its
//! unit in its name. Relative paths are taken from the folder of the file.
//!
//! **Invariant:** a [`Config`] that exists is consistent in itself. Whether devices,
//! certificates and addresses exist is found out when they are used.
//!
//! Not here: the state directory ([`state`]), attach records ([`attach`]), defaults of the engine.

pub mod attach;
mod check;
pub mod edit;
pub mod identities;
pub mod keys;
mod parse;
mod read;
pub mod state;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use hn4_engine::core::{AckMode, LagPolicy, MAX_PEERS, OnDegraded, VerifyReads, VolumeConfig};
use hn4_engine::device::{DeviceKind, DeviceOptions};
use hn4_engine::shard::Listen;
use hn4_proof::ledger::verify::Policy;
use hn4_proof::sign::Algorithm;
use hn4_transport::driver::TransportKind;
use hn4_transport::session::PeerRoles;
use hn4_transport::tls::KeyPin;
use thiserror::Error;

pub use self::check::listen_text;

/// Where the daemon and `hn4ctl` look if nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/hn4/replicad.toml";

/// Largest configuration file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Volumes of a node.
pub const VOLUMES_MAX: usize = 64;
/// Peers of a volume.
pub const PEERS_MAX: usize = MAX_PEERS;
/// Sockets of a volume.
pub const LISTEN_MAX: usize = 8;

/// A whole, valid configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The file it was read from.
    pub path: PathBuf,
    /// `[node]`
    pub node: NodeSection,
    /// `[transport]`; there whenever a volume has peers.
    pub transport: Option<TransportSection>,
    /// `[[volume]]`, in the order of the file.
    pub volumes: Vec<VolumeSection>,
}

/// `[node]`: this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeSection {
    /// As in the node's certificate.
    pub name: String,
    /// Holds the node id and the attach records.
    pub state_dir: PathBuf,
    /// Where `hn4ctl` talks to the daemon.
    pub control_socket: PathBuf,
}

/// `[transport]`: how peers reach this node, and what it shows them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransportSection {
    /// QUIC listens on this UDP port, WebSocket on this TCP port.
    pub listen: SocketAddr,
    /// PEM: the node's certificate.
    pub certificate: PathBuf,
    /// PEM: the node's private key.
    pub key: PathBuf,
    /// PEM: the authority's certificate.
    pub ca: PathBuf,
}

/// When a write is acknowledged to the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WriteAck {
    /// When it is in the overlay; a flush makes it durable, as block devices do.
    #[default]
    Overlay,
    /// When it is durable in the log.
    Durable,
}

/// What a replica may write to its backing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Apply {
    /// What its primary has signed, and what was compared with that.
    #[default]
    Proven,
    /// What is durable on its primary.
    Durable,
}

/// What this node does with a signature that is not Ed25519.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Signing {
    /// It makes none. What others make is checked.
    #[default]
    Off,
    /// It makes them.
    Sign,
    /// It makes them, and takes nothing new from a primary without.
    Require,
}

/// `[[volume]]`: one volume on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeSection {
    /// Name of the export, and of the volume in `hn4ctl`.
    pub name: String,
    /// Device or file that holds the volume's blocks.
    pub backing: PathBuf,
    /// Device or file that holds the delta log.
    pub log: PathBuf,
    /// Memory for blocks that are not in the backing yet.
    pub overlay_mib: u64,
    /// Where clients connect.
    pub listen: Vec<Listen>,
    /// NBD without TLS may listen beyond loopback.
    pub insecure_tcp: bool,
    /// When a write is acknowledged.
    pub write_ack: WriteAck,
    /// What writes and flushes wait for on peers.
    pub ack: AckMode,
    /// On how many peers; counts only unless `ack` is async.
    pub ack_peers: usize,
    /// What happens with fewer.
    pub on_degraded: OnDegraded,
    /// How long peers may owe an acknowledgement.
    pub peer_timeout_ms: u64,
    /// After a restart, a primary with peers waits for their answers; it serves without them after
    /// this time. `None`: never.
    pub start_alone_after_s: Option<u64>,
    /// What only this node has is saved in a file of at most this size in the state directory
    /// before it is dropped.
    pub fork_space_mib: u64,
    /// The shadow file; by default one in the state directory.
    pub shadow: Option<PathBuf>,
    /// Most that it takes; 0: there is none.
    pub shadow_space_mib: u64,
    /// An open epoch is sealed at the latest after this time.
    pub log_age_ms: u64,
    /// Durable data rests this long in the overlay.
    pub destage_delay_ms: u64,
    /// Longest time a stop spends on writing the overlay back. 0: only the log is flushed.
    pub stop_drain_s: u64,
    /// Believe devices whose flush cannot be judged.
    pub assume_strict_flush: bool,
    /// Epochs are hashed, signed and kept in a ledger.
    pub proof: bool,
    /// ML-DSA-65 on every anchor and checkpoint.
    pub ml_dsa: Signing,
    /// SLH-DSA-SHA2-128f on checkpoints.
    pub slh_dsa: Signing,
    /// A batch of epochs is anchored this long after its first one at the latest.
    pub proof_batch_ms: u64,
    /// At most so often a primary signs a checkpoint.
    pub checkpoint_s: u64,
    /// A state tree is kept: a hash of every block, by which copies are compared and the medium is
    /// checked.
    pub tree: bool,
    /// MiB of the backing that are read in a second at most, to build or check the tree.
    pub scan_mib_per_s: u64,
    /// All of the backing is compared with the tree after so many hours; 0: only when asked.
    pub verify_interval_h: u64,
    /// Which reads of the backing are compared with the tree.
    pub verify_reads: VerifyReads,
    /// What a replica destages.
    pub apply: Apply,
    /// What the backing is; `None` means that it is detected.
    pub device_kind: Option<DeviceKind>,
    /// What the backing writes at once in bytes, if detection should not be believed.
    pub physical_sector: Option<u32>,
    /// Threads that serve the volume.
    pub threads: usize,
    /// Processor to stay on; further threads take those after it.
    pub cpu: Option<usize>,
    /// `[[volume.peer]]`, in the order of the file, which is the order of the engine's peer ids.
    pub peers: Vec<PeerSection>,
}

/// `[[volume.peer]]`: another node that holds the volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerSection {
    /// As in its certificate.
    pub name: String,
    /// `host:port`. Always there if this node is the one that dials.
    pub address: Option<String>,
    /// Pin of its key.
    pub key_pin: KeyPin,
    /// How to reach it.
    pub transport: TransportKind,
    /// What its key allows it to be for this volume.
    pub roles: PeerRoles,
    /// What goes to it is compressed, if it wants that too.
    pub scxq2: bool,
    /// How far it may be behind in this volume.
    pub lag: LagPolicy,
}

/// A peer of the node, with the volumes that are shared with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodePeer<'a> {
    /// Equal in all volumes, except that only some may name the address.
    pub peer: PeerSection,
    /// The volumes, each with the peer's place in [`VolumeSection::peers`].
    pub volumes: Vec<(&'a VolumeSection, usize)>,
}

/// Something that is wrong in a configuration file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Counted from 1.
    pub line: usize,
    /// Section and key, such as `volume "vol0", log_age_ms`.
    pub key: String,
    /// What is wrong and what to do.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}", self.line)?;
        if !self.key.is_empty() {
            write!(f, ", {}", self.key)?;
        }
        write!(f, ": {}", self.what)
    }
}

/// Why there is no configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file can be read and is not a usable configuration.
    #[error(
        "{}: the configuration cannot be used{}",
        path.display(),
        problems.iter().map(|problem| format!("\n  {problem}")).collect::<String>()
    )]
    Invalid {
        /// The file.
        path: PathBuf,
        /// All that is wrong, in the order of the file. Never empty.
        problems: Vec<Problem>,
    },
}

fn unreadable(path: &Path, source: std::io::Error) -> ConfigError {
    ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    }
}

/// Whether a file is there and small enough to be a configuration.
///
/// # Errors
/// [`ConfigError::Unreadable`] if not.
pub fn check_size(path: &Path) -> Result<(), ConfigError> {
    let metadata = std::fs::metadata(path).map_err(|source| unreadable(path, source))?;
    let bytes = metadata.len();
    if bytes > FILE_BYTES_MAX {
        let what = format!("it has {bytes} bytes, more than {FILE_BYTES_MAX}");
        return Err(unreadable(path, std::io::Error::other(what)));
    }
    Ok(())
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`] names everything that is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        check_size(path)?;
        let unreadable = |source| unreadable(path, source);
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let absolute = std::path::absolute(path).map_err(unreadable)?;
        Self::parse(&absolute, &text)
    }

    /// Checks a text as if it had been read from `path`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] names everything that is wrong.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        parse::parse(path, text).map_err(|problems| ConfigError::Invalid {
            path: path.to_owned(),
            problems,
        })
    }

    /// The volume of this name.
    #[must_use]
    pub fn volume(&self, name: &str) -> Option<&VolumeSection> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// The node's peers, each once, in the order in which they are first named.
    #[must_use]
    pub fn peers(&self) -> Vec<NodePeer<'_>> {
        let mut all: Vec<NodePeer<'_>> = Vec::new();
        for volume in &self.volumes {
            for (index, peer) in volume.peers.iter().enumerate() {
                match all.iter_mut().find(|known| known.peer.name == peer.name) {
                    Some(known) => {
                        known.volumes.push((volume, index));
                        if known.peer.address.is_none() {
                            known.peer.address.clone_from(&peer.address);
                        }
                    }
                    None => all.push(NodePeer {
                        peer: peer.clone(),
                        volumes: vec![(volume, index)],
                    }),
                }
            }
        }
        all
    }
}

impl VolumeSection {
    /// Memory for the overlay in bytes.
    #[must_use]
    pub fn overlay_bytes(&self) -> u64 {
        self.overlay_mib << 20
    }

    /// How to open the log.
    #[must_use]
    pub fn log_options(&self) -> DeviceOptions {
        DeviceOptions {
            assume_strict_flush: self.assume_strict_flush,
            ..DeviceOptions::default()
        }
    }

    /// How to open the backing.
    #[must_use]
    pub fn backing_options(&self) -> DeviceOptions {
        DeviceOptions {
            kind_override: self.device_kind,
            physical_override: self.physical_sector,
            ..self.log_options()
        }
    }

    /// Algorithms that it signs with beside Ed25519.
    #[must_use]
    pub fn algorithms(&self) -> Vec<Algorithm> {
        let all = [
            (self.ml_dsa, Algorithm::MlDsa65),
            (self.slh_dsa, Algorithm::SlhDsaSha2128f),
        ];
        let wanted = all.into_iter().filter(|(it, _)| *it != Signing::Off);
        wanted.map(|(_, algorithm)| algorithm).collect()
    }

    /// Signatures that it insists on beside Ed25519.
    #[must_use]
    pub fn required_signatures(&self) -> Policy {
        let required = |signing, algorithm| match signing {
            Signing::Require => vec![algorithm],
            Signing::Off | Signing::Sign => Vec::new(),
        };
        Policy {
            every_batch: required(self.ml_dsa, Algorithm::MlDsa65),
            checkpoints: required(self.slh_dsa, Algorithm::SlhDsaSha2128f),
        }
    }

    /// Longest time that a stop may spend on draining, in milliseconds.
    #[must_use]
    pub fn stop_drain_ms(&self) -> u64 {
        self.stop_drain_s * 1000
    }

    /// Puts the section's policies into the engine's configuration of the volume.
    pub fn apply(&self, config: &mut VolumeConfig) {
        config.log_age_ms = self.log_age_ms;
        config.destage_delay_ms = self.destage_delay_ms;
        config.write_ack_durable = self.write_ack == WriteAck::Durable;
        config.ack_mode = self.ack;
        config.ack_peers = self.required_peers();
        config.on_degraded = self.on_degraded;
        config.peer_timeout_ms = self.peer_timeout_ms;
        config.peers = self.peers.len();
        for (policy, peer) in config.lag.iter_mut().zip(&self.peers) {
            *policy = peer.lag;
        }
        config.open_answers = self.open_answers();
        config.start_alone_after_ms = self.start_alone_after_s.map(|seconds| seconds * 1000);
        config.shadow_space_bytes = self.shadow_space_mib << 20;
        config.prove = self.proof;
        config.tree = self.tree;
        config.verify_reads = self.verify_reads;
        config.apply_proven = self.proof && self.apply == Apply::Proven;
    }

    /// The shadow file, for messages.
    #[must_use]
    pub fn shadow_name(&self) -> String {
        match &self.shadow {
            Some(path) => path.display().to_string(),
            None => format!("{}.shadow in the state directory", self.name),
        }
    }

    /// Where the shadow file is, if there is to be one.
    #[must_use]
    pub fn shadow_path(&self, state_dir: &Path) -> Option<PathBuf> {
        let wanted = self.shadow_space_mib > 0 && !self.peers.is_empty();
        let usual = || state_dir.join(format!("{}.shadow", self.name));
        wanted.then(|| self.shadow.clone().unwrap_or_else(usual))
    }

    /// How many peers a restarted primary must hear before it serves. Where acknowledgements wait
    /// for peers: as many as surely include one that holds everything acknowledged. Else one, which
    /// would know of most promotions that happened meanwhile.
    #[must_use]
    pub fn open_answers(&self) -> usize {
        let copies = self.copies();
        match self.required_peers() {
            0 => copies.min(1),
            required => (copies + 1).saturating_sub(required).min(copies),
        }
    }

    /// Peers that may be replicas: who may acknowledge, and answer a primary that opens.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.peers.iter().filter(|peer| peer.roles.replica).count()
    }

    /// How many peers an acknowledgement needs; 0 if it needs none.
    #[must_use]
    pub fn required_peers(&self) -> usize {
        match self.ack {
            AckMode::Async => 0,
            AckMode::Received | AckMode::Durable => self.ack_peers,
        }
    }
}
