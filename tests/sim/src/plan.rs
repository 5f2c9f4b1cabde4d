//! What a seed decides about a run before it starts: sizes, policies, and which disasters are
//! likely (swarm testing: most runs have only some kinds, so that each kind is also seen alone).
//!
//! Some runs lean towards a corner that chance alone seldom reaches (`lean`).

use hn4::log::MIN_RING_BYTES;
use hn4::types::BLOCK_BYTES;
use hn4_engine::core::{AckMode, LagPolicy, OnDegraded, OnExceed, VerifyReads};

use crate::lean::Corner;
use crate::rng::Rng;

/// What is not left to the seed.
#[derive(Clone, Debug, Default)]
pub struct Knobs {
    /// Writes to the backing are lost or go astray, and bits of it rot.
    pub backing_damage: bool,
    /// Flushes of the log that do nothing.
    pub lying_flush: bool,
    /// Number of nodes, 1 to [`MOST_NODES`].
    pub nodes: Option<usize>,
    /// Number of requests.
    pub requests: Option<u64>,
    /// Whether the transport's sessions run between the nodes.
    pub real_sessions: Option<bool>,
    /// Whether peers are added and removed.
    pub other_peers: Option<bool>,
    /// Whether state trees are kept.
    pub trees: Option<bool>,
    /// The corner that every run leans to.
    pub lean: Option<Corner>,
}

/// Most nodes of a run.
pub const MOST_NODES: usize = 5;

/// Kinds of disasters that the operator draws from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Disaster {
    Crash,
    Reset,
    Partition,
    OneWay,
    SlowLink,
    FailOver,
    Demote,
    Drain,
    Wipe,
    Isolate,
    CutOff,
    ClockJump,
    NoSpace,
    Stop,
    RottenLog,
    RottenBacking,
    Regroup,
}

/// See the module. Rates are "once in so many", zero is never.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Nodes, 1 to [`MOST_NODES`].
    pub(crate) nodes: usize,
    /// So many of them belong to the volume at the start.
    pub(crate) members: usize,
    /// Peers are added and removed.
    pub(crate) regroups: bool,
    /// Removals for which the operator accepts that something is on fewer copies.
    pub(crate) accepts_fewer_copies: u64,
    /// Blocks of the volume.
    pub(crate) blocks: u64,
    /// Slots of each node's memory.
    pub(crate) slots: u32,
    /// Bytes of each node's ring.
    pub(crate) ring_bytes: u64,
    /// Lanes of the volume.
    pub(crate) lanes: u16,
    /// Blocks of a stripe.
    pub(crate) stripe_blocks: u32,
    /// See [`hn4_engine::core::VolumeConfig`], as all up to `seed_flush_bytes`.
    pub(crate) max_epoch_blocks: usize,
    /// Zeroed extents.
    pub(crate) max_zero_extents: usize,
    /// Age of an epoch.
    pub(crate) log_age_ms: u64,
    /// Rest before destaging.
    pub(crate) destage_delay_ms: u64,
    /// Blocks of a sweep.
    pub(crate) sweep_blocks: usize,
    /// Operations of a sweep, or of a full copy, at the same time.
    pub(crate) sweep_depth: usize,
    /// Writes complete when durable.
    pub(crate) write_ack_durable: bool,
    /// What peers must have.
    pub(crate) ack_mode: AckMode,
    /// On how many.
    pub(crate) ack_peers: usize,
    /// If there are fewer.
    pub(crate) on_degraded: OnDegraded,
    /// A restarted primary opens without its peers after this time.
    pub(crate) start_alone_after_ms: Option<u64>,
    /// Credit of a replica.
    pub(crate) window_bytes: u64,
    /// Piece of a full copy.
    pub(crate) seed_piece_bytes: u64,
    /// Flush of a full copy.
    pub(crate) seed_flush_bytes: u64,
    /// Room for what differs in a full copy of a usable replica.
    pub(crate) shadow_bytes: u64,
    /// Clients at work at the same time.
    pub(crate) clients: usize,
    /// Requests in all.
    pub(crate) requests: u64,
    /// Longest write in sectors.
    pub(crate) max_sectors: u64,
    /// Clients prefer so many blocks at the start of the volume.
    pub(crate) hot_blocks: u64,
    /// Weights of write, zero or trim, read, flush.
    pub(crate) weights: [u64; 4],
    /// Writes are FUA.
    pub(crate) fua: u64,
    /// Longest pause of a client in microseconds.
    pub(crate) think_us: u64,
    /// A disk's usual time for an operation in microseconds.
    pub(crate) disk_us: u64,
    /// How many times slower each node's log and backing are.
    pub(crate) disk_factors: [[u64; 2]; MOST_NODES],
    /// A crash may also leave a sector half old and half new.
    pub(crate) shears: bool,
    /// Physical sectors of eight sectors, all of which a crash may damage.
    pub(crate) large_sectors: bool,
    /// Crashes just after a role, a term or the state of a copy changed.
    pub(crate) touchy: u64,
    /// Crashes soon after a superblock began to be written.
    pub(crate) superblock_touchy: u64,
    /// Crashes exactly while a superblock is being written.
    pub(crate) superblock_crash: u64,
    /// Crashes while the log goes on after it was cut back.
    pub(crate) truncation_crash: u64,
    /// Promotions for which the operator accepts that something is lost.
    pub(crate) accepts_loss: u64,
    /// Operations that take very long.
    pub(crate) disk_spike: u64,
    /// Usual time of a message in microseconds.
    pub(crate) net_us: u64,
    /// The transport's sessions run between the nodes.
    pub(crate) real_sessions: bool,
    /// They compress.
    pub(crate) scxq2: bool,
    /// Frames of sessions that are damaged on their way.
    pub(crate) frame_damage: u64,
    /// Milliseconds between disasters on average.
    pub(crate) fault_ms: u64,
    /// Disasters in all.
    pub(crate) most_faults: u64,
    /// Disasters and their weights.
    pub(crate) disasters: Vec<(Disaster, u64)>,
    /// Longest downtime in milliseconds.
    pub(crate) down_ms: u64,
    /// Reads, writes and flushes that fail.
    pub(crate) disk_error: u64,
    /// Crashes after which a bit of the log has rotted.
    pub(crate) rot: u64,
    /// Writes to the log that are lost or go astray.
    pub(crate) log_damage: u64,
    /// The same for the backing.
    pub(crate) backing_damage: u64,
    /// Flushes of the log that do nothing.
    pub(crate) lying_flush: u64,
    /// Recoveries that are cut off in the middle.
    pub(crate) dies_in_recovery: u64,
    /// How far wall clocks are apart in milliseconds.
    pub(crate) skew_ms: u64,
    /// How far peers may be behind.
    pub(crate) lag: LagPolicy,
    /// Provers run.
    pub(crate) proves: bool,
    /// Longest time that a prover takes for anything, in microseconds.
    pub(crate) proof_us: u64,
    /// Age at which a batch of proofs is closed, in milliseconds.
    pub(crate) proof_age_ms: u64,
    /// State trees are kept.
    pub(crate) trees: bool,
    /// New copies whose backing holds something like the primary's.
    pub(crate) seeded: u64,
    /// A primary marks an epoch so often, in milliseconds.
    pub(crate) mark_ms: u64,
    /// Which reads are compared with the state tree.
    pub(crate) verify_reads: VerifyReads,
    /// Time between two deep verifies, in milliseconds.
    pub(crate) verify_ms: u64,
}

fn sometimes(rng: &mut Rng, weight: u64) -> u64 {
    if rng.one_in(2) { weight } else { 0 }
}

fn disasters(rng: &mut Rng) -> Vec<(Disaster, u64)> {
    let all = [
        (Disaster::Crash, 6),
        (Disaster::Reset, 6),
        (Disaster::Partition, 2),
        (Disaster::OneWay, 2),
        (Disaster::SlowLink, 1),
        (Disaster::FailOver, 2),
        (Disaster::Demote, 1),
        (Disaster::Drain, 1),
        (Disaster::Wipe, 1),
        (Disaster::Isolate, 1),
        (Disaster::CutOff, 1),
        (Disaster::ClockJump, 1),
        (Disaster::NoSpace, 1),
        (Disaster::Stop, 1),
    ];
    all.map(|(disaster, weight)| (disaster, sometimes(rng, weight)))
        .to_vec()
}

impl Plan {
    /// How many copies must answer, the candidate with so many peers included, before nothing that
    /// was acknowledged can be missed.
    #[must_use]
    pub(crate) fn promotion_answers(&self, peers: usize) -> usize {
        match self.ack_mode {
            AckMode::Async => peers + 1,
            AckMode::Received | AckMode::Durable => peers + 1 - self.ack_peers,
        }
    }

    /// How many of so many peers a restarted primary must hear.
    #[must_use]
    pub(crate) fn open_answers(&self, peers: usize) -> usize {
        match self.ack_mode {
            AckMode::Async => 1.min(peers),
            AckMode::Received | AckMode::Durable => (peers + 1 - self.ack_peers).min(peers),
        }
    }

    /// The plan of a seed.
    #[must_use]
    pub(crate) fn draw(rng: &mut Rng, knobs: &Knobs) -> Self {
        let mut plan = Self::draw_sizes(rng, knobs);
        plan.draw_world(rng);
        plan.lean(rng, knobs);
        if knobs.backing_damage {
            plan.backing_damage = rng.pick(&[0, 50, 500]);
            plan.disasters.push((Disaster::RottenBacking, 4));
        }
        if knobs.lying_flush {
            plan.lying_flush = rng.pick(&[2, 10]);
        }
        plan.hot_blocks = plan.hot_blocks.min(plan.blocks);
        plan.shadow_bytes = 4 * plan.ring_bytes + 4 * plan.blocks * BLOCK_BYTES;
        plan.members = plan.nodes;
        if let Some(requests) = knobs.requests {
            plan.requests = requests;
        }
        if let Some(real) = knobs.real_sessions {
            plan.real_sessions = real;
        }
        plan
    }

    fn draw_sizes(rng: &mut Rng, knobs: &Knobs) -> Self {
        let nodes = rng.pick(&[1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 5]);
        let nodes = knobs.nodes.unwrap_or(nodes).clamp(1, MOST_NODES);
        let slots = rng.pick(&[128_u32, 192, 256, 512, 1024]);
        let blocks = rng.log_between(16, 400);
        let peers = nodes - 1;
        Self {
            nodes,
            members: nodes,
            regroups: false,
            accepts_fewer_copies: 0,
            blocks,
            slots,
            ring_bytes: MIN_RING_BYTES + rng.pick(&[0, 0, 1, 7, 200]) * BLOCK_BYTES,
            lanes: rng.pick(&[1, 1, 2, 3]),
            stripe_blocks: rng.pick(&[1, 4, 16]),
            max_epoch_blocks: rng.index(slots as usize / 8) + 8,
            max_zero_extents: rng.pick(&[4, 16, 64]),
            log_age_ms: rng.log_between(1, 100),
            destage_delay_ms: rng.log_between(1, 1000),
            sweep_blocks: rng.pick(&[1, 16, 64, 1024]),
            sweep_depth: rng.pick(&[1, 4, 16]),
            write_ack_durable: rng.one_in(6),
            ack_mode: rng.pick(&[AckMode::Async, AckMode::Received, AckMode::Durable]),
            ack_peers: if peers == 0 { 0 } else { 1 + rng.index(peers) },
            on_degraded: rng.pick(&[OnDegraded::Block, OnDegraded::Degrade]),
            start_alone_after_ms: rng.pick(&[None, None, Some(100), Some(5000)]),
            window_bytes: rng.pick(&[64 << 10, 256 << 10, 1 << 20]),
            seed_piece_bytes: rng.pick(&[4, 16, 64]) * BLOCK_BYTES,
            seed_flush_bytes: rng.pick(&[1, 32, 128]) * BLOCK_BYTES,
            shadow_bytes: 4 * MIN_RING_BYTES + 4 * blocks * BLOCK_BYTES,
            clients: rng.index(8) + 1,
            requests: rng.log_between(100, 3000),
            max_sectors: rng.pick(&[8, 16, 64, 128]),
            hot_blocks: rng.pick(&[2, 8, blocks]).min(blocks),
            weights: [
                rng.between(1, 10),
                sometimes(rng, 3),
                sometimes(rng, 4),
                sometimes(rng, 4),
            ],
            fua: rng.pick(&[0, 3, 20]),
            think_us: rng.pick(&[0, 100, 1000, 20_000]),
            disk_us: rng.log_between(10, 2000),
            disk_factors: [[1; 2]; MOST_NODES],
            shears: false,
            large_sectors: false,
            touchy: 0,
            superblock_touchy: 0,
            superblock_crash: 0,
            truncation_crash: 0,
            accepts_loss: 0,
            disk_spike: 0,
            net_us: rng.log_between(10, 5000),
            real_sessions: false,
            scxq2: false,
            frame_damage: 0,
            fault_ms: 0,
            most_faults: 0,
            disasters: Vec::new(),
            down_ms: 0,
            disk_error: 0,
            rot: 0,
            log_damage: 0,
            backing_damage: 0,
            lying_flush: 0,
            dies_in_recovery: 0,
            skew_ms: 0,
            lag: LagPolicy::default(),
            proves: false,
            proof_us: 0,
            proof_age_ms: 0,
            trees: false,
            seeded: 0,
            mark_ms: 5000,
            verify_reads: VerifyReads::Off,
            verify_ms: 0,
        }
    }

    /// Everything that goes wrong.
    fn draw_world(&mut self, rng: &mut Rng) {
        for factors in &mut self.disk_factors {
            let node = rng.pick(&[1, 1, 1, 4, 20]);
            *factors = [(); 2].map(|()| node * rng.pick(&[1, 1, 1, 5]));
        }
        self.shears = rng.one_in(3);
        self.touchy = rng.pick(&[0, 0, 2, 8]);
        self.superblock_touchy = rng.pick(&[0, 0, 0, 10]);
        self.superblock_crash = rng.pick(&[0, 0, 0, 30]);
        self.truncation_crash = rng.pick(&[0, 2]);
        self.accepts_loss = rng.pick(&[2, 6, 6, 30]);
        self.disk_spike = rng.pick(&[0, 50, 500]);
        self.real_sessions = self.nodes > 1 && rng.one_in(4);
        self.frame_damage = rng.pick(&[0, 30, 300]);
        self.fault_ms = rng.log_between(5, 500);
        self.most_faults = rng.log_between(1, 40);
        self.disasters = disasters(rng);
        self.down_ms = rng.log_between(1, 5000);
        self.disk_error = rng.pick(&[0, 0, 0, 2000]);
        self.rot = rng.pick(&[0, 0, 0, 0, 0, 2]);
        self.dies_in_recovery = rng.pick(&[0, 0, 3]);
        self.skew_ms = rng.pick(&[0, 1000, 100_000_000]);
        if rng.one_in(12) {
            self.log_damage = rng.pick(&[30, 300]);
            self.disasters.push((Disaster::RottenLog, 3));
        }
        self.lag = LagPolicy {
            max_bytes: rng.pick(&[None, None, Some(32 << 10), Some(256 << 10)]),
            max_ms: rng.pick(&[None, None, Some(100)]),
            on_exceed: rng.pick(&[OnExceed::Throttle, OnExceed::Spill, OnExceed::Detach]),
        };
        self.proves = rng.one_in(2);
        self.proof_us = rng.log_between(1, 20_000);
        self.proof_age_ms = rng.pick(&[50, 200, 500, 2000]);
    }
}
