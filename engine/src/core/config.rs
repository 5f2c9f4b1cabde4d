//! Limits and policies of one volume. Everything that bounds memory, log, queues or time stands
//! here.

use hn4::log::{LogIdentity, MAX_EPOCH_BYTES};
use hn4::types::{BLOCK_BYTES, NodeId};

use super::checks::VerifyReads;
use super::lag::OnExceed;
use super::seal::Lanes;

/// Peers of a volume, at most.
pub const MAX_PEERS: usize = 16;

/// What a write or a flush waits for on peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AckMode {
    /// Nothing.
    #[default]
    Async,
    /// Peers have it in memory.
    Received,
    /// A write: peers have it in memory. A flush: peers have flushed it.
    Durable,
}

/// What happens when fewer peers answer than [`VolumeConfig::ack_peers`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnDegraded {
    /// Writes and flushes wait until enough peers are back.
    #[default]
    Block,
    /// After [`VolumeConfig::peer_timeout_ms`] go on without them, and say so.
    Degrade,
}

/// How far a peer may be behind, and what happens then. Without bounds there is no lag control.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LagPolicy {
    /// Bytes of log that the peer has not flushed.
    pub max_bytes: Option<u64>,
    /// Age of the oldest epoch that the peer lacks, in milliseconds.
    pub max_ms: Option<u64>,
    /// What happens.
    pub on_exceed: OnExceed,
}

impl LagPolicy {
    /// Whether there is any bound.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        self.max_bytes.is_some() || self.max_ms.is_some()
    }
}

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeConfig {
    /// The volume.
    pub identity: LogIdentity,
    /// This node.
    pub node: NodeId,
    /// How blocks are dealt out.
    pub lanes: Lanes,
    /// Most blocks of payload in an epoch.
    pub max_epoch_blocks: usize,
    /// Most zeroed extents in an epoch, and in the overlay.
    pub max_zero_extents: usize,
    /// An open epoch is sealed at the latest after this time.
    pub log_age_ms: u64,
    /// Durable data rests this long in the overlay, hoping to be overwritten, unless room is
    /// needed.
    pub destage_delay_ms: u64,
    /// A sweep takes epochs until it has so many blocks. Nothing else is done while a sweep is
    /// planned, or while its blocks are let go, so more of them lengthen the slowest requests.
    pub sweep_blocks: usize,
    /// The backing's physical sectors are larger than the volume's: a block of which only a part
    /// is written is merged first, since a write that is cut off may damage the rest of it.
    pub merge: bool,
    /// Operations of a sweep on their way at the same time; a quarter of them while neither log nor
    /// overlay is half full and nobody waits for its end.
    pub sweep_depth: usize,
    /// Slots that writes may not take: for reads, heads of frames and the superblock.
    pub reserve_slots: usize,
    /// Complete a write only when it is durable in the log.
    pub write_ack_durable: bool,
    /// What writes and flushes wait for on peers.
    pub ack_mode: AckMode,
    /// On how many peers.
    pub ack_peers: usize,
    /// If there are fewer.
    pub on_degraded: OnDegraded,
    /// How long to wait for peers that owe an acknowledgement.
    pub peer_timeout_ms: u64,
    /// Number of configured peers.
    pub peers: usize,
    /// How far each of them may be behind.
    pub lag: [LagPolicy; MAX_PEERS],
    /// A prover runs beside the volume: durable frames are handed to it, and log is kept until it
    /// is proven.
    pub prove: bool,
    /// A replica destages only what is proven, until the prover says that its primary proves
    /// nothing.
    pub apply_proven: bool,
    /// A state tree follows the sweeps: each waits until its leaves are durable there.
    pub tree: bool,
    /// With a tree: which reads of the backing are compared with it.
    pub verify_reads: VerifyReads,
    /// With a tree: a primary marks an epoch after so many milliseconds. All copies cut a sweep
    /// there, so that their roots can be compared.
    pub mark_ms: u64,
    /// How many of them a primary must hear after a restart before it serves; 0: none.
    pub open_answers: usize,
    /// It opens without them after this time; `None`: never.
    pub start_alone_after_ms: Option<u64>,
    /// Bytes of frames and pieces that a primary may have on the way to us.
    pub replica_window_bytes: u64,
    /// Bytes of one piece of a full copy.
    pub seed_piece_bytes: u64,
    /// Pieces of a full copy that are read, or written, at the same time.
    pub seed_depth: usize,
    /// A replica flushes and records its progress in a full copy after so many bytes, which is
    /// also what comes again after a crash.
    pub seed_flush_bytes: u64,
    /// Most bytes of the shadow, which takes what differs in a full copy of a usable replica; 0:
    /// there is none, and such a replica waits for an operator.
    pub shadow_space_bytes: u64,
}

impl VolumeConfig {
    /// Sensible limits for a volume with a ring of so many bytes and an arena of so many slots.
    #[must_use]
    pub fn new(identity: LogIdentity, node: NodeId, ring_bytes: u64, slots: usize) -> Self {
        let ring_blocks = usize::try_from(ring_bytes / BLOCK_BYTES).unwrap_or(usize::MAX);
        let most = usize::try_from(MAX_EPOCH_BYTES / BLOCK_BYTES).unwrap_or(usize::MAX);
        let max_epoch_blocks = (ring_blocks / 8).min(slots / 8).min(most).clamp(16, 4096);
        // The head of the largest epoch, twice, and some room for reads.
        let reserve_slots = (slots / 8).clamp(8, 4096);
        let head_records = reserve_slots / 2 * 4096 / 24;
        let max_zero_extents = head_records.saturating_sub(4 * max_epoch_blocks + 64);
        Self {
            identity,
            node,
            lanes: Lanes {
                count: 1,
                stripe_blocks: 256,
            },
            max_epoch_blocks,
            max_zero_extents: max_zero_extents.clamp(16, 4096),
            log_age_ms: 100,
            destage_delay_ms: 1000,
            sweep_blocks: (slots / 4).clamp(16, 8 * 1024),
            merge: false,
            sweep_depth: 32,
            reserve_slots,
            write_ack_durable: false,
            ack_mode: AckMode::Async,
            ack_peers: 0,
            on_degraded: OnDegraded::Block,
            peer_timeout_ms: 3000,
            peers: 0,
            lag: [LagPolicy::default(); MAX_PEERS],
            prove: false,
            apply_proven: false,
            tree: false,
            verify_reads: VerifyReads::Off,
            mark_ms: 5000,
            open_answers: 0,
            start_alone_after_ms: None,
            replica_window_bytes: (slots as u64 * BLOCK_BYTES / 4).clamp(1 << 20, 32 << 20),
            seed_piece_bytes: 256 * 1024,
            seed_depth: 8,
            seed_flush_bytes: (identity.size_bytes / 512).clamp(1 << 20, 64 << 20),
            shadow_space_bytes: 0,
        }
    }
}
