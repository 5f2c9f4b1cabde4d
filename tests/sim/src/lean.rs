//! Corners that chance alone seldom reaches: two thirds of the runs lean towards one of them.

use hn4::log::MIN_RING_BYTES;
use hn4::types::BLOCK_BYTES;
use hn4_engine::core::{AckMode, LagPolicy, OnDegraded, VerifyReads};

use crate::plan::{Disaster, Knobs, MOST_NODES, Plan};
use crate::rng::Rng;

/// A corner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Corner {
    /// Histories that part.
    Forks,
    /// A log that is full most of the time.
    FullLog,
    /// Full copies that are cut off.
    FullCopies,
    /// Nodes that are primary again and again without a restart.
    HandOvers,
    /// Superblocks that power fails in.
    TornSuperblocks,
    /// Replicas that are ahead of a primary which opens alone.
    LostTails,
    /// Replicas that catch up through a shadow.
    Shadows,
    /// Primaries that open again and again, and hear of their replicas one by one. No seed leans to
    /// it by itself.
    Openings,
}

impl Corner {
    /// All of them, by the names that the command line has for them.
    pub const NAMED: [(&str, Self); 8] = [
        ("forks", Self::Forks),
        ("full-log", Self::FullLog),
        ("full-copies", Self::FullCopies),
        ("hand-overs", Self::HandOvers),
        ("torn-superblocks", Self::TornSuperblocks),
        ("lost-tails", Self::LostTails),
        ("shadows", Self::Shadows),
        ("openings", Self::Openings),
    ];

    /// The one of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let found = Self::NAMED.iter().find(|(of, _)| *of == name);
        found.map(|(_, corner)| *corner)
    }
}

impl Plan {
    /// Lets a run lean towards a corner, or not.
    pub(crate) fn lean(&mut self, rng: &mut Rng, knobs: &Knobs) {
        let drawn = match rng.below(16) {
            0 | 1 => Some(Corner::Forks),
            2 | 3 => Some(Corner::FullLog),
            4 | 5 => Some(Corner::FullCopies),
            6 => Some(Corner::HandOvers),
            7 => Some(Corner::TornSuperblocks),
            8 => Some(Corner::LostTails),
            9 | 10 => Some(Corner::Shadows),
            _ => None,
        };
        match knobs.lean.or(drawn) {
            Some(Corner::Forks) => self.lean_to_forks(rng),
            Some(Corner::FullLog) => self.lean_to_a_full_log(rng),
            Some(Corner::FullCopies) => self.lean_to_full_copies(rng),
            Some(Corner::HandOvers) => self.lean_to_hand_overs(rng, knobs),
            Some(Corner::TornSuperblocks) => self.lean_to_torn_superblocks(rng),
            Some(Corner::LostTails) => self.lean_to_lost_tails(rng, knobs),
            Some(Corner::Shadows) => self.lean_to_shadows(rng),
            Some(Corner::Openings) => self.lean_to_openings(rng, knobs),
            None => {}
        }
    }

    /// Primaries change often, and what they wrote last is often lost.
    fn lean_to_forks(&mut self, rng: &mut Rng) {
        if self.nodes == 1 {
            return;
        }
        self.touchy = rng.pick(&[1, 2, 3]);
        self.superblock_touchy = rng.pick(&[0, 2, 10]);
        self.truncation_crash = rng.pick(&[0, 1]);
        self.net_us = rng.log_between(10, 300);
        self.disk_us = rng.log_between(500, 3000);
        self.down_ms = rng.log_between(1, 300);
        self.fault_ms = rng.log_between(5, 100);
        self.most_faults = rng.between(20, 60);
        self.requests = self.requests.max(500);
        self.disasters = vec![
            (Disaster::Crash, rng.below(3)),
            (Disaster::Reset, rng.below(2)),
            (Disaster::FailOver, 6),
            (Disaster::Demote, rng.below(4)),
        ];
    }

    /// The log is the bottleneck: it is full most of the time, and wraps.
    fn lean_to_a_full_log(&mut self, rng: &mut Rng) {
        self.slots = 2048;
        // Sweeps have far to go.
        self.blocks = rng.between(500, 1500);
        self.superblock_touchy = rng.pick(&[0, 2, 4]);
        self.superblock_crash = rng.pick(&[0, 2, 4]);
        self.max_epoch_blocks = 8 + rng.index(57);
        self.max_sectors = 8;
        self.fua = 1;
        self.weights = [8, 0, 0, 1];
        self.clients = rng.pick(&[4, 8, 16]);
        self.requests = rng.between(1500, 3000);
        self.think_us = 0;
        self.destage_delay_ms = 1000;
        self.sweep_blocks = 1024;
        self.sweep_depth = 1;
        self.hot_blocks = self.blocks;
        for factors in &mut self.disk_factors {
            *factors = [1, rng.pick(&[5, 20, 50])];
        }
        self.fault_ms = rng.log_between(20, 200);
        self.most_faults = 40;
        self.down_ms = 5;
        self.disasters = vec![(Disaster::Crash, 1), (Disaster::Reset, rng.below(2))];
    }

    /// Full copies that are cut off, resumed and begun again.
    fn lean_to_full_copies(&mut self, rng: &mut Rng) {
        if self.nodes == 1 {
            return;
        }
        self.blocks = rng.between(200, 400);
        self.seed_piece_bytes = rng.pick(&[1, 4]) * BLOCK_BYTES;
        self.seed_flush_bytes = rng.pick(&[1, 4, 8]) * BLOCK_BYTES;
        self.window_bytes = 64 << 10;
        self.net_us = rng.log_between(10, 1000);
        self.disk_us = rng.log_between(100, 2000);
        self.sweep_blocks = rng.pick(&[16, 64]);
        self.destage_delay_ms = rng.log_between(1, 30);
        self.down_ms = rng.log_between(1, 60);
        self.fault_ms = rng.log_between(5, 40);
        self.most_faults = rng.between(20, 60);
        self.disasters = vec![
            (Disaster::Crash, 3),
            (Disaster::Reset, 5),
            (Disaster::Wipe, 2),
            (Disaster::FailOver, rng.below(2)),
        ];
    }

    /// Nodes that live long and are primary again and again, in histories that leave out what was
    /// acknowledged before: an operator promotes copies that nobody can reach, and accepts the
    /// loss. What a node remembers of another term is wrong then.
    fn lean_to_hand_overs(&mut self, rng: &mut Rng, knobs: &Knobs) {
        if knobs.nodes.is_none() {
            self.nodes = rng.pick(&[3, 3, 3, 4, 5]);
        }
        if self.nodes == 1 {
            return;
        }
        self.ack_mode = rng.pick(&[AckMode::Durable, AckMode::Durable, AckMode::Received]);
        self.ack_peers = 1 + rng.index(self.nodes - 1).min(1);
        self.write_ack_durable = false;
        // What a node has written back it cannot leave behind.
        self.destage_delay_ms = 5000;
        self.slots = 2048;
        self.max_sectors = 8;
        self.max_epoch_blocks = 8 + rng.index(57);
        self.touchy = 0;
        self.superblock_touchy = 0;
        self.superblock_crash = rng.pick(&[0, 0, 30]);
        self.accepts_loss = rng.pick(&[1, 2, 4]);
        self.net_us = rng.log_between(100, 5000);
        self.disk_us = rng.log_between(10, 500);
        self.think_us = rng.pick(&[0, 100]);
        self.fault_ms = rng.log_between(20, 100);
        self.most_faults = rng.between(20, 60);
        self.requests = self.requests.max(1500);
        self.fua = rng.pick(&[1, 3]);
        self.disasters = vec![
            (Disaster::Isolate, 6),
            (Disaster::Partition, rng.below(3)),
            (Disaster::Reset, rng.below(3)),
            (Disaster::Demote, rng.below(2)),
        ];
    }

    /// Power is lost while a superblock is being written, on disks that leave a sector half old and
    /// half new, when the superblock before it said something new: a term, a copy, a cut log.
    fn lean_to_torn_superblocks(&mut self, rng: &mut Rng) {
        self.shears = true;
        self.superblock_crash = rng.pick(&[2, 5, 15]);
        self.touchy = 0;
        self.superblock_touchy = 0;
        self.dies_in_recovery = 0;
        self.destage_delay_ms = rng.log_between(1, 20);
        self.down_ms = rng.log_between(1, 100);
        self.fault_ms = rng.log_between(10, 100);
        self.most_faults = rng.between(20, 60);
        self.accepts_loss = rng.pick(&[1, 2]);
        self.disasters = vec![
            (Disaster::FailOver, 4),
            (Disaster::Isolate, rng.below(4)),
            (Disaster::Demote, rng.below(3)),
            (Disaster::Wipe, rng.below(2)),
            (Disaster::Drain, 1),
        ];
    }

    /// Replicas whose log is ahead of the primary's, which is lost and opens alone: they cut their
    /// logs back and go on, and lose power in the middle of that.
    fn lean_to_lost_tails(&mut self, rng: &mut Rng, knobs: &Knobs) {
        if knobs.nodes.is_none() {
            self.nodes = rng.pick(&[2, 2, 3]);
        }
        if self.nodes == 1 {
            return;
        }
        self.ack_mode = AckMode::Async;
        self.ack_peers = 1;
        self.write_ack_durable = false;
        self.start_alone_after_ms = Some(rng.log_between(1, 50));
        self.touchy = 0;
        self.superblock_touchy = 0;
        self.superblock_crash = 0;
        self.truncation_crash = 1;
        self.dies_in_recovery = 0;
        self.net_us = rng.log_between(10, 200);
        self.disk_us = rng.log_between(500, 3000);
        self.disk_factors = [[1, 1]; MOST_NODES];
        self.disk_factors[0][0] = rng.pick(&[20, 50]);
        self.log_age_ms = rng.log_between(1, 5);
        self.think_us = rng.pick(&[0, 100]);
        self.fua = 0;
        self.weights = [8, 1, 1, 0];
        self.requests = self.requests.max(1500);
        self.down_ms = rng.log_between(1, 20);
        self.fault_ms = rng.log_between(20, 300);
        self.most_faults = rng.between(20, 60);
        self.disasters = vec![(Disaster::CutOff, 4), (Disaster::Reset, rng.below(2))];
    }

    /// Primaries that are lost and open again and again, alone or with what those have who come
    /// first: one by one, with what different openings before have left them, and sometimes
    /// somebody else is promoted meanwhile.
    fn lean_to_openings(&mut self, rng: &mut Rng, knobs: &Knobs) {
        if knobs.nodes.is_none() {
            self.nodes = rng.pick(&[2, 3, 3, 3, 4, 5]);
        }
        if self.nodes == 1 {
            return;
        }
        self.ack_peers = 1 + rng.index(self.nodes - 1);
        self.start_alone_after_ms = rng.pick(&[None, Some(1), Some(10), Some(50)]);
        self.accepts_loss = rng.pick(&[1, 2, 6]);
        self.touchy = rng.pick(&[0, 0, 2]);
        self.superblock_touchy = rng.pick(&[0, 0, 2, 10]);
        self.superblock_crash = rng.pick(&[0, 0, 2, 15]);
        self.truncation_crash = rng.pick(&[0, 1, 2]);
        self.dies_in_recovery = rng.pick(&[0, 0, 3]);
        self.net_us = rng.log_between(10, 2000);
        self.disk_us = rng.log_between(100, 3000);
        self.disk_factors[0][0] = rng.pick(&[1, 20, 50]);
        self.log_age_ms = rng.log_between(1, 5);
        self.destage_delay_ms = rng.log_between(1, 100);
        self.think_us = rng.pick(&[0, 100]);
        self.requests = self.requests.max(1000);
        self.down_ms = rng.log_between(1, 50);
        self.fault_ms = rng.log_between(5, 200);
        self.most_faults = rng.between(20, 60);
        self.disasters = vec![
            (Disaster::CutOff, 4),
            (Disaster::Crash, rng.below(3)),
            (Disaster::Reset, rng.below(4)),
            (Disaster::Partition, rng.below(3)),
            (Disaster::Isolate, rng.below(2)),
            (Disaster::FailOver, rng.below(3)),
            (Disaster::Demote, rng.below(2)),
        ];
    }

    /// Replicas are away until the log has wrapped, and are disturbed while they catch up.
    fn lean_to_shadows(&mut self, rng: &mut Rng) {
        if self.nodes == 1 {
            return;
        }
        self.blocks = rng.between(100, 400);
        self.hot_blocks = self.blocks;
        self.ring_bytes = MIN_RING_BYTES;
        self.on_degraded = OnDegraded::Degrade;
        self.ack_mode = rng.pick(&[AckMode::Async, AckMode::Async, AckMode::Durable]);
        self.ack_peers = 1;
        self.max_sectors = 128;
        self.weights = [10, rng.below(2), 1, 1];
        self.clients = 4 + rng.index(5);
        self.requests = rng.between(1500, 3000);
        self.think_us = rng.pick(&[1000, 5000]);
        self.seed_piece_bytes = rng.pick(&[4, 16]) * BLOCK_BYTES;
        self.seed_flush_bytes = rng.pick(&[4, 16, 64]) * BLOCK_BYTES;
        self.net_us = rng.log_between(10, 500);
        self.disk_us = rng.log_between(10, 300);
        self.lag = LagPolicy::default();
        self.touchy = rng.pick(&[0, 2, 8]);
        self.superblock_touchy = rng.pick(&[0, 5, 20]);
        self.down_ms = rng.log_between(50, 600);
        self.fault_ms = rng.log_between(10, 100);
        self.most_faults = rng.between(10, 40);
        self.disasters = vec![
            (Disaster::Crash, 4),
            (Disaster::Partition, 4),
            (Disaster::Reset, 3),
            (Disaster::NoSpace, rng.below(2)),
            (Disaster::FailOver, rng.below(2)),
        ];
    }

    /// State trees are kept, and mostly replicas are away until the log has wrapped, while most
    /// writes go to a small part of the volume: what is elsewhere need not be copied.
    pub(crate) fn lean_to_trees(&mut self, rng: &mut Rng, knobs: &Knobs) {
        self.trees = true;
        self.mark_ms = rng.log_between(5, 2000);
        if rng.one_in(4) {
            return;
        }
        if knobs.nodes.is_none() && self.nodes == 1 {
            self.nodes = rng.pick(&[2, 3]);
            self.members = self.nodes;
        }
        self.lean_to_shadows(rng);
        self.blocks = rng.between(200, 400);
        self.shadow_bytes = 4 * self.ring_bytes + 4 * self.blocks * BLOCK_BYTES;
        self.hot_blocks = rng.pick(&[8, 32, 64]);
        self.max_sectors = rng.pick(&[16, 64]);
        self.destage_delay_ms = rng.log_between(1, 50);
        self.requests = rng.between(2000, 4000);
    }

    /// Copies are begun anew on backings that hold something like the primary's, and are disturbed
    /// meanwhile.
    pub(crate) fn lean_to_trucks(&mut self, rng: &mut Rng) {
        if self.nodes == 1 {
            return;
        }
        self.seeded = rng.pick(&[1, 1, 2]);
        self.seed_piece_bytes = rng.pick(&[1, 4, 16]) * BLOCK_BYTES;
        self.seed_flush_bytes = rng.pick(&[1, 4, 16]) * BLOCK_BYTES;
        self.most_faults = self.most_faults.max(20);
        let others: u64 = self.disasters.iter().map(|&(_, weight)| weight).sum();
        let share = |rng: &mut Rng| (others / rng.between(1, 6)).max(1);
        self.disasters.push((Disaster::Wipe, share(rng)));
        self.disasters.push((Disaster::FailOver, share(rng) / 2));
        self.disasters.push((Disaster::Reset, share(rng) / 2));
    }

    /// What becomes of backings where state trees are kept: in two of three of these runs blocks
    /// rot, or writes of sweeps and repairs are lost or go astray.
    pub(crate) fn draw_damage(&mut self, rng: &mut Rng) {
        self.verify_reads = rng.pick(&[
            VerifyReads::All,
            VerifyReads::All,
            VerifyReads::Sample,
            VerifyReads::Off,
        ]);
        self.verify_ms = rng.log_between(200, 30_000);
        let (rots, strays) = rng.pick(&[(0, 0), (4, 0), (0, 30), (4, 300), (12, 30), (0, 0)]);
        if rots == 0 && strays == 0 {
            return;
        }
        self.backing_damage = strays;
        let others: u64 = self.disasters.iter().map(|&(_, weight)| weight).sum();
        let weight = (others * rots / 8).max(rots.min(1));
        self.disasters.push((Disaster::RottenBacking, weight));
        self.most_faults = self.most_faults.max(20);
        self.fault_ms = self.fault_ms.min(100);
        // So that damage is read, not only found.
        self.weights[2] += rng.pick(&[0, 3, 8]);
        self.hot_blocks = rng.pick(&[self.hot_blocks, self.blocks]);
    }

    /// Peers are added, removed and replaced while everything else goes on.
    pub(crate) fn lean_to_other_peers(&mut self, rng: &mut Rng, knobs: &Knobs) {
        if knobs.nodes.is_none() {
            self.nodes = rng.pick(&[2, 3, 3, 3, 4, 4, 5]);
        }
        if self.nodes == 1 {
            return;
        }
        self.regroups = true;
        self.members = 1 + rng.index(self.nodes);
        self.ack_mode = rng.pick(&[
            AckMode::Durable,
            AckMode::Durable,
            AckMode::Durable,
            AckMode::Received,
            AckMode::Async,
        ]);
        if self.ack_mode != AckMode::Async {
            self.members = self.members.max(2);
            self.ack_peers = rng.pick(&[1, 1, self.members - 1]);
        }
        self.accepts_fewer_copies = rng.pick(&[0, 0, 4]);
        self.fua = rng.pick(&[self.fua, 3]);
        self.requests = self.requests.max(600);
        self.fault_ms = self.fault_ms.min(100);
        self.most_faults = self.most_faults.max(15);
        let others: u64 = self.disasters.iter().map(|&(_, weight)| weight).sum();
        let weight = rng.pick(&[1, others / 2, others]).max(1);
        self.disasters.push((Disaster::Regroup, weight));
    }
}
