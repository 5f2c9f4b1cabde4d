//! What a seed decides about a run before it starts: sizes, policies, and which disasters are
//! likely (swarm testing: most runs have only some kinds, so that each kind is also seen alone).

use hn4::log::MIN_RING_BYTES;
use hn4::types::BLOCK_BYTES;
use hn4_engine::core::{AckMode, LagPolicy, OnDegraded, OnExceed};

use crate::rng::Rng;

/// See the module. Rates are "once in so many", zero is never.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Nodes, 1 to 3.
    pub(crate) nodes: usize,
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
    /// Operations of a sweep.
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
    /// How many times slower each node's disks are.
    pub(crate) disk_factors: [u64; 3],
    /// A crash may also leave a sector half old and half new.
    pub(crate) shears: bool,
    /// Crashes just after a role, a term or the state of a copy changed.
    pub(crate) touchy: u64,
    /// Operations that take very long.
    pub(crate) disk_spike: u64,
    /// Usual time of a message in microseconds.
    pub(crate) net_us: u64,
    /// Milliseconds between disasters on average.
    pub(crate) fault_ms: u64,
    /// Disasters in all.
    pub(crate) most_faults: u64,
    /// Weights of crash, cut link, partition, failover, switchover, drain, wipe of a replica.
    pub(crate) faults: [u64; 7],
    /// Longest downtime in milliseconds.
    pub(crate) down_ms: u64,
    /// Writes and flushes that fail.
    pub(crate) disk_error: u64,
    /// Crashes after which a bit of the log has rotted.
    pub(crate) rot: u64,
    /// Recoveries that are cut off in the middle.
    pub(crate) dies_in_recovery: u64,
    /// How far peers may be behind.
    pub(crate) lag: LagPolicy,
    /// Provers run.
    pub(crate) proves: bool,
    /// Longest time that a prover takes for anything, in microseconds.
    pub(crate) proof_us: u64,
}

impl Plan {
    /// How many copies must answer, the candidate included, before nothing that was acknowledged
    /// can be missed.
    #[must_use]
    pub(crate) fn promotion_answers(&self) -> usize {
        match self.ack_mode {
            AckMode::Async => self.nodes,
            AckMode::Received | AckMode::Durable => self.nodes - self.ack_peers,
        }
    }

    /// How many peers a restarted primary must hear.
    #[must_use]
    pub(crate) fn open_answers(&self) -> usize {
        match self.ack_mode {
            AckMode::Async => 1.min(self.nodes - 1),
            AckMode::Received | AckMode::Durable => {
                (self.nodes - self.ack_peers).min(self.nodes - 1)
            }
        }
    }

    /// The plan of a seed.
    #[must_use]
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let nodes = rng.pick(&[1, 1, 2, 2, 2, 3, 3]);
        let slots = rng.pick(&[128_u32, 192, 256, 512, 1024]);
        let ring_bytes = MIN_RING_BYTES + rng.pick(&[0, 0, 1, 7, 200]) * BLOCK_BYTES;
        let blocks = rng.log_between(16, 400);
        let peers = nodes - 1;
        let ack_mode = rng.pick(&[AckMode::Async, AckMode::Received, AckMode::Durable]);
        let sometimes = |rng: &mut Rng, weight: u64| if rng.one_in(2) { weight } else { 0 };
        Self {
            nodes,
            blocks,
            slots,
            ring_bytes,
            lanes: rng.pick(&[1, 1, 2, 3]),
            stripe_blocks: rng.pick(&[1, 4, 16]),
            max_epoch_blocks: rng.index(slots as usize / 8) + 8,
            max_zero_extents: rng.pick(&[4, 16, 64]),
            log_age_ms: rng.log_between(1, 100),
            destage_delay_ms: rng.log_between(1, 1000),
            sweep_blocks: rng.pick(&[1, 16, 64, 1024]),
            sweep_depth: rng.pick(&[1, 4, 16]),
            write_ack_durable: rng.one_in(6),
            ack_mode,
            ack_peers: if peers == 0 { 0 } else { 1 + rng.index(peers) },
            on_degraded: rng.pick(&[OnDegraded::Block, OnDegraded::Degrade]),
            start_alone_after_ms: rng.pick(&[None, None, Some(100), Some(5000)]),
            window_bytes: rng.pick(&[64 << 10, 256 << 10, 1 << 20]),
            seed_piece_bytes: rng.pick(&[4, 16, 64]) * BLOCK_BYTES,
            seed_flush_bytes: rng.pick(&[1, 32, 128]) * BLOCK_BYTES,
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
            disk_factors: [0; 3].map(|_: u64| rng.pick(&[1, 1, 1, 4, 20])),
            shears: rng.one_in(3),
            touchy: rng.pick(&[0, 0, 2, 8]),
            disk_spike: rng.pick(&[0, 50, 500]),
            net_us: rng.log_between(10, 5000),
            fault_ms: rng.log_between(5, 500),
            most_faults: rng.log_between(1, 40),
            faults: [
                sometimes(rng, 6),
                sometimes(rng, 6),
                sometimes(rng, 2),
                sometimes(rng, 2),
                sometimes(rng, 1),
                sometimes(rng, 1),
                sometimes(rng, 1),
            ],
            down_ms: rng.log_between(1, 5000),
            disk_error: rng.pick(&[0, 0, 0, 2000]),
            rot: rng.pick(&[0, 0, 0, 0, 0, 2]),
            dies_in_recovery: rng.pick(&[0, 0, 3]),
            lag: LagPolicy {
                max_bytes: rng.pick(&[None, None, Some(32 << 10), Some(256 << 10)]),
                max_ms: rng.pick(&[None, None, Some(100)]),
                on_exceed: rng.pick(&[OnExceed::Throttle, OnExceed::Spill, OnExceed::Detach]),
            },
            proves: !rng.one_in(4),
            proof_us: rng.log_between(1, 20_000),
        }
    }
}
