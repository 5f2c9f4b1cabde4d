//! One node: its disks, and while it is alive its memory, its volume and what is on its way.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Instant;

use hn4::log::{CopyState, LogIdentity, Role};
use hn4::types::{Epoch, NodeId, Rank, Term};
use hn4_engine::arena::{SLOT_BYTES, SlotMemory};
use hn4_engine::core::event::{Disk, Io, IoToken, RequestId, Seg, Tip};
use hn4_engine::core::recovery::{self, NewLog, RecoveryError};
use hn4_engine::core::{Lanes, MAX_PEERS, Volume, VolumeConfig};
use hn4_proof::ledger::file::MemoryMedium;

use crate::damage::{Spells, blocks_in};
use crate::disk::{SimDisk, Tears};
use crate::memory::SimMemory;
use crate::oracle::{Change, Tag};
use crate::peers::Leaving;
use crate::plan::Plan;
use crate::proofs::Beside;
use crate::rng::Rng;
use crate::trees::{Files, Tree};

/// What an operation that is on its way does when its time has come.
#[derive(Debug)]
enum Stage {
    Read { offset: usize, segs: Vec<Seg> },
    Write { then_fsync: bool, segs: Vec<Seg> },
    Flush { covers: u64 },
}

#[derive(Debug)]
struct Flight {
    token: IoToken,
    disk: Disk,
    stage: Stage,
}

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
}

/// What becomes of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    /// What it should.
    Done,
    /// It fails with this error.
    Fails(i32),
    /// It is said to be done, and was not.
    Lost,
    /// A write arrives elsewhere.
    Astray,
}

/// What may become of a write that is not done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Damages {
    /// An error, at most.
    No,
    /// It may be lost.
    Lost,
    /// It may be lost, or arrive elsewhere.
    Any,
}

/// What came of an operation.
#[derive(Debug)]
pub(crate) enum Landed {
    /// It goes on with a flush.
    Again,
    /// It is done.
    Done(IoToken, Result<(), i32>),
}

/// The part of a node that a crash takes.
pub(crate) struct Live {
    /// The real thing.
    pub(crate) volume: Volume,
    /// Its memory.
    pub(crate) mem: SimMemory,
    flights: BTreeMap<u64, Flight>,
    next_io: u64,
    /// Changes of the open epoch.
    pub(crate) open: Vec<Change>,
    /// End of the log after the last step.
    pub(crate) tip: Tip,
    /// Who sealed it.
    pub(crate) tip_rank: Rank,
    /// What it could not drop after the last step.
    pub(crate) anchored: Tip,
    /// What reads must see; only while the copy is usable.
    pub(crate) view: Vec<Tag>,
    /// The copy was usable after the last step.
    pub(crate) usable: bool,
    /// What it has is saved in a file, and may be replaced.
    pub(crate) saved: bool,
    /// The newest epoch that holds a completed write.
    pub(crate) completed: Epoch,
    /// Requests that have to wait for room.
    pub(crate) held: VecDeque<RequestId>,
    /// When the next timer fires.
    pub(crate) timer_at: Option<u64>,
    /// What was in the backing after the last step.
    pub(crate) applied: Epoch,
    /// What its log had let go of after the last step.
    pub(crate) retained: Epoch,
    /// The prover, if one runs.
    pub(crate) beside: Option<Beside>,
    /// The state tree, where there are any.
    pub(crate) tree: Tree,
}

/// See the module.
pub(crate) struct Node {
    /// Position among the nodes.
    pub(crate) index: usize,
    log: SimDisk,
    backing: SimDisk,
    shadow: SimDisk,
    /// Counts starts, so that what was meant for an earlier life is recognised.
    pub(crate) boot: u64,
    /// Alive.
    pub(crate) live: Option<Live>,
    /// What must be found after a crash.
    pub(crate) promise: Tip,
    /// What was last seen of it: role, term, kind of copy.
    pub(crate) standing: Option<(Role, Term, std::mem::Discriminant<CopyState>)>,
    /// Its log was damaged since it was last made.
    pub(crate) rotten: bool,
    /// The last superblock that was written did not arrive.
    pub(crate) superblock_lost: bool,
    /// What is left of the ledger while the node is dead.
    pub(crate) ledger: MemoryMedium,
    /// The highest term that it had on its medium.
    pub(crate) top_term: u64,
    /// Everything it ever had on its medium, by the ends of its log: the last, and the ones before
    /// its log was cut back.
    pub(crate) durable: Vec<Tip>,
    /// Writes to the backing fail until then.
    pub(crate) no_space_until: u64,
    /// It is being stopped, and killed at this time.
    pub(crate) stop_by: Option<u64>,
    /// It had everything in its backing when it was stopped.
    pub(crate) stopped_clean: bool,
    /// Its wall clock, in milliseconds after the true one.
    pub(crate) skew_ms: u64,
    /// What its monotonic clock showed when the run began, in nanoseconds.
    pub(crate) clock_start: u64,
    /// Its peers, as its configuration names them.
    pub(crate) members: Vec<usize>,
    /// Which peer is at which place of its core's list, while it is alive.
    pub(crate) seats: Vec<Option<usize>>,
    /// Who is about to lose its place.
    pub(crate) leaving: Leaving,
    /// What its state tree has on its medium.
    pub(crate) tree: Files,
    /// Blocks of the backing that something damaged.
    pub(crate) hurt: Spells,
    /// Blocks that were copied from where something had damaged them.
    pub(crate) spread: BTreeSet<u64>,
    /// Blocks whose leaves are of what nobody wrote.
    pub(crate) taken: Spells,
    /// Repairs that were written, for the names of these writes.
    repairs: u64,
}

/// The volume of every run.
#[must_use]
pub(crate) fn identity(plan: &Plan) -> LogIdentity {
    LogIdentity {
        volume: hn4::types::VolumeId([7; 16]),
        birth_nonce: [9; 16],
        size_bytes: plan.blocks * hn4::types::BLOCK_BYTES,
        sector_bytes: 512,
    }
}

fn small(bytes: u64) -> usize {
    usize::try_from(bytes).expect("simulated disks are small")
}

/// Name of a node.
#[must_use]
pub(crate) fn node_id(index: usize) -> NodeId {
    NodeId([u8::try_from(index).expect("few nodes") + 1; 16])
}

impl Node {
    /// A node with empty disks; the backing holds whatever `backing` says.
    #[must_use]
    pub(crate) fn new(index: usize, plan: &Plan, backing: &[u8]) -> Self {
        let log_bytes = hn4::log::RING_START + plan.ring_bytes;
        let mut disk = SimDisk::new(backing.len());
        disk.format(backing);
        Self {
            index,
            log: SimDisk::new(small(log_bytes)),
            backing: disk,
            shadow: SimDisk::new(small(plan.shadow_bytes)),
            boot: 0,
            live: None,
            promise: Tip::default(),
            standing: None,
            rotten: false,
            superblock_lost: false,
            ledger: MemoryMedium::default(),
            top_term: 0,
            durable: Vec::new(),
            no_space_until: 0,
            stop_by: None,
            stopped_clean: false,
            skew_ms: 0,
            clock_start: 0,
            members: Vec::new(),
            seats: Vec::new(),
            leaving: Leaving::default(),
            tree: Files::default(),
            hurt: Spells::default(),
            spread: BTreeSet::new(),
            taken: Spells::default(),
            repairs: 0,
        }
    }

    /// One of the disks.
    pub(crate) fn disk(&mut self, disk: Disk) -> &mut SimDisk {
        match disk {
            Disk::Log => &mut self.log,
            Disk::Backing => &mut self.backing,
            Disk::Shadow => &mut self.shadow,
        }
    }

    /// Nothing in the shadow is needed any more: what is left there is of no use to anybody.
    pub(crate) fn drop_shadow(&mut self) {
        let bytes = self.shadow.contents().len();
        self.shadow = SimDisk::new(bytes);
    }

    /// What the backing holds.
    #[must_use]
    pub(crate) fn backing(&self) -> &[u8] {
        self.backing.contents()
    }

    /// Writes a new log, as an operator does.
    ///
    /// # Errors
    /// If the engine refuses.
    pub(crate) fn create(
        &mut self,
        plan: &Plan,
        role: Role,
        seeded: bool,
    ) -> Result<(), RecoveryError> {
        let log_bytes = hn4::log::RING_START + plan.ring_bytes;
        self.log = SimDisk::new(small(log_bytes));
        self.rotten = false;
        self.superblock_lost = false;
        self.stopped_clean = false;
        let new = NewLog {
            identity: identity(plan),
            node: node_id(self.index),
            lanes: Lanes {
                count: plan.lanes,
                stripe_blocks: plan.stripe_blocks,
            },
            role,
            seeded,
            created_ms: 0,
        };
        recovery::create(&mut self.log, &new).map(|_| ())
    }

    /// Starts the node: recovery.
    ///
    /// # Errors
    /// What recovery says.
    pub(crate) fn open(
        &mut self,
        plan: &Plan,
        zero: Instant,
    ) -> Result<recovery::RecoveryReport, RecoveryError> {
        self.boot += 1;
        let mut mem = SimMemory::new(plan.slots);
        let (index, peers) = (self.index, self.members.len());
        self.seats = self.members.iter().copied().map(Some).collect();
        let (log, backing) = (&mut self.log, &mut self.backing);
        let opened = recovery::open(log, backing, &mut mem, |header| {
            config(plan, index, peers, header.ring_bytes)
        });
        let (volume, report) = opened?;
        let tip = volume.tip();
        let tip_rank = volume.copy_status().tip_rank;
        self.live = Some(Live {
            volume,
            mem,
            flights: BTreeMap::new(),
            next_io: 0,
            open: Vec::new(),
            tip,
            tip_rank,
            anchored: Tip::default(),
            view: Vec::new(),
            usable: false,
            saved: false,
            completed: Epoch(0),
            held: VecDeque::new(),
            timer_at: None,
            applied: Epoch(u64::MAX),
            retained: Epoch(u64::MAX),
            beside: None,
            tree: Tree::new(zero),
        });
        Ok(report)
    }

    /// Power is lost.
    pub(crate) fn crash(&mut self, plan: &Plan, rng: &mut Rng) {
        if let Some(beside) = self.live.take().and_then(|live| live.beside) {
            self.ledger = beside.crash(rng);
        }
        self.stop_by = None;
        let tears = Tears {
            shears: plan.shears,
            // A merge area that is damaged besides is one fault too many.
            physical: plan.large_sectors && !self.rotten,
        };
        for disk in [&mut self.log, &mut self.backing, &mut self.shadow] {
            disk.crash(tears, rng);
        }
    }

    /// Starts an operation; the result names it.
    ///
    /// # Errors
    /// If it conflicts with one that is on its way.
    pub(crate) fn start_io(
        &mut self,
        token: IoToken,
        io: &Io,
        segs: &[Seg],
    ) -> Result<(u64, Disk), String> {
        let Some(live) = &mut self.live else {
            return Err("a dead node does nothing".to_owned());
        };
        live.next_io += 1;
        let id = live.next_io;
        let (log, backing, shadow) = (&mut self.log, &mut self.backing, &mut self.shadow);
        let (disk, stage) = match io {
            Io::Read {
                disk,
                offset,
                segs: range,
            } => {
                let segs = segs[range.clone()].to_vec();
                segs.iter().for_each(|seg| live.mem.pin(seg.slot, true));
                let offset = small(*offset);
                (*disk, Stage::Read { offset, segs })
            }
            Io::Write {
                disk,
                offset,
                segs: range,
                then_fsync,
            } => {
                let segs = segs[range.clone()].to_vec();
                let target = match disk {
                    Disk::Log => log,
                    Disk::Backing => backing,
                    Disk::Shadow => shadow,
                };
                let length = segs.iter().map(|seg| usize::from(seg.bytes)).sum();
                let mut data = target.buffer(length);
                for seg in &segs {
                    let bytes = usize::from(seg.offset)..usize::from(seg.offset + seg.bytes);
                    assert!(bytes.end <= SLOT_BYTES && !bytes.is_empty());
                    data.extend_from_slice(&live.mem.bytes(seg.slot)[bytes]);
                    live.mem.pin(seg.slot, false);
                }
                target
                    .start_write(id, small(*offset), data)
                    .map_err(|why| format!("{disk:?}, {token:?}: {why}"))?;
                let then_fsync = *then_fsync;
                (*disk, Stage::Write { then_fsync, segs })
            }
            Io::Fsync { disk } => {
                let target = match disk {
                    Disk::Log => log,
                    Disk::Backing => backing,
                    Disk::Shadow => shadow,
                };
                let covers = target.start_flush();
                (*disk, Stage::Flush { covers })
            }
            Io::Zero { offset, bytes, .. } => {
                let zeroes = vec![0; small(*bytes)];
                backing
                    .start_write(id, small(*offset), zeroes)
                    .map_err(|why| format!("Backing, {token:?}: {why}"))?;
                let stage = Stage::Write {
                    then_fsync: false,
                    segs: Vec::new(),
                };
                (Disk::Backing, stage)
            }
        };
        live.flights.insert(id, Flight { token, disk, stage });
        Ok((id, disk))
    }

    /// What an operation that is on its way does.
    #[must_use]
    pub(crate) fn flight(&self, id: u64) -> Option<(Disk, Kind)> {
        let flight = self.live.as_ref()?.flights.get(&id)?;
        let kind = match flight.stage {
            Stage::Read { .. } => Kind::Read,
            Stage::Write { .. } => Kind::Write,
            Stage::Flush { .. } => Kind::Flush,
        };
        Some((flight.disk, kind))
    }

    /// An operation's time has come.
    pub(crate) fn land(&mut self, id: u64, fate: Fate, rng: &mut Rng) -> Option<Landed> {
        let live = self.live.as_mut()?;
        let mut flight = live.flights.remove(&id)?;
        let disk = match flight.disk {
            Disk::Log => &mut self.log,
            Disk::Backing => &mut self.backing,
            Disk::Shadow => &mut self.shadow,
        };
        let result = match fate {
            Fate::Fails(errno) => Err(errno),
            Fate::Done | Fate::Lost | Fate::Astray => Ok(()),
        };
        match &flight.stage {
            Stage::Read { offset, segs } => {
                let mut at = *offset;
                for seg in segs {
                    let bytes = usize::from(seg.offset)..usize::from(seg.offset + seg.bytes);
                    let target = &mut live.mem.fill(seg.slot)[bytes];
                    at += target.len();
                    disk.read(at - target.len(), target);
                    live.mem.unpin(seg.slot, true);
                }
            }
            Stage::Write { then_fsync, segs } => {
                segs.iter().for_each(|seg| live.mem.unpin(seg.slot, false));
                let hurt = land_write(disk, id, fate, rng);
                if flight.disk == Disk::Backing {
                    hurt.for_each(|block| self.hurt.begin(block));
                }
                if *then_fsync && result.is_ok() {
                    let covers = disk.start_flush();
                    flight.stage = Stage::Flush { covers };
                    live.flights.insert(id, flight);
                    return Some(Landed::Again);
                }
            }
            Stage::Flush { covers } => {
                if fate == Fate::Done {
                    disk.finish_flush(*covers);
                }
            }
        }
        Some(Landed::Done(flight.token, result))
    }

    /// A name for the write of a repair.
    pub(crate) fn next_repair(&mut self) -> u64 {
        self.repairs += 1;
        (1 << 61) + self.repairs
    }

    /// The time of a repair's write has come.
    pub(crate) fn land_repair(&mut self, id: u64, fate: Fate, rng: &mut Rng) {
        let hurt = land_write(&mut self.backing, id, fate, rng);
        hurt.for_each(|block| self.hurt.begin(block));
    }

    /// Whether a write of this operation belongs to a sweep that the state tree knows.
    #[must_use]
    pub(crate) fn is_watched_write(&self, id: u64) -> bool {
        let flight = self.live.as_ref().and_then(|live| {
            let watched = live.tree.sweeping && live.tree.whole_since.is_some();
            live.flights.get(&id).filter(|_| watched)
        });
        let of_sweep = |token| matches!(token, IoToken::SweepWrite | IoToken::SweepZero);
        flight.is_some_and(|flight| of_sweep(flight.token))
    }

    /// Whether an operation writes the superblock at the moment.
    pub(crate) fn writes_superblock(&self, id: u64) -> bool {
        let flight = self.live.as_ref().and_then(|live| live.flights.get(&id));
        flight.is_some_and(|flight| {
            flight.token == IoToken::Superblock && matches!(flight.stage, Stage::Write { .. })
        })
    }

    /// Operations that are under way.
    #[must_use]
    pub(crate) fn in_flight(&self) -> usize {
        self.live.as_ref().map_or(0, |live| live.flights.len())
    }
}

/// A write's time has come; the blocks that are damaged by what becomes of it.
fn land_write(
    disk: &mut SimDisk,
    id: u64,
    fate: Fate,
    rng: &mut Rng,
) -> impl Iterator<Item = u64> + use<> {
    let hurt: Vec<Range<usize>> = match fate {
        Fate::Fails(_) => {
            disk.fail_write(id, rng);
            Vec::new()
        }
        Fate::Done => {
            disk.finish_write(id);
            Vec::new()
        }
        Fate::Lost => vec![disk.lose_write(id)],
        Fate::Astray => disk.misdirect_write(id, rng).into(),
    };
    hurt.into_iter().flat_map(|bytes| blocks_in(&bytes))
}

fn config(plan: &Plan, index: usize, peers: usize, ring_bytes: u64) -> VolumeConfig {
    let slots = plan.slots as usize;
    let mut config = VolumeConfig::new(identity(plan), node_id(index), ring_bytes, slots);
    config.lanes = Lanes {
        count: plan.lanes,
        stripe_blocks: plan.stripe_blocks,
    };
    config.max_epoch_blocks = plan.max_epoch_blocks.max(blocks_of_a_request(plan) + 2);
    config.max_zero_extents = plan.max_zero_extents;
    config.log_age_ms = plan.log_age_ms;
    config.destage_delay_ms = plan.destage_delay_ms;
    config.sweep_blocks = plan.sweep_blocks;
    config.sweep_depth = plan.sweep_depth;
    config.merge = plan.large_sectors;
    config.write_ack_durable = plan.write_ack_durable;
    config.ack_mode = plan.ack_mode;
    config.ack_peers = plan.ack_peers;
    config.on_degraded = plan.on_degraded;
    config.peers = peers;
    config.open_answers = plan.open_answers(peers);
    config.start_alone_after_ms = plan.start_alone_after_ms;
    config.lag = [plan.lag; MAX_PEERS];
    config.replica_window_bytes = plan.window_bytes;
    config.seed_piece_bytes = plan.seed_piece_bytes;
    config.seed_flush_bytes = plan.seed_flush_bytes;
    config.seed_depth = plan.sweep_depth;
    config.shadow_space_bytes = plan.shadow_bytes;
    config.prove = plan.proves;
    config.apply_proven = plan.proves;
    config.tree = plan.trees;
    config.verify_reads = plan.verify_reads;
    config.mark_ms = plan.mark_ms;
    config
}

fn blocks_of_a_request(plan: &Plan) -> usize {
    small(plan.max_sectors / 8 + 2)
}
