//! One volume on one node: the owner of all its state.
//!
//! [`Volume::step`] takes an event and says what to do. After every event the volume looks at all
//! its parts in a fixed order (seal, log, acknowledgements, peers, destage, superblock) and starts
//! what has become possible; so there is no hidden order of events that matters, and nothing gets
//! stuck because the event that would have started it came too early.
//!
//! **Invariants**, checked in every build:
//! - epochs in the journal are gapless; frames are contiguous in log offsets;
//! - a slot of a sealed epoch is never changed, and freed only after a superblock that names a
//!   later checkpoint is durable;
//! - log space is reused only after a superblock that no longer needs it is durable;
//! - checkpoint <= anchored <= tip, checkpoint <= durable <= tip;
//! - after a failed write or flush of log or backing nothing is written any more (P5).
//!
//! Not here: who the clients and peers are, and how bytes move.

use std::collections::VecDeque;

use hn4::log::Role;
use hn4::types::{BLOCK_BYTES, BlockIndex, Epoch, Lba, SECTORS_PER_BLOCK, Term};

use super::checks::VerifyReads;
use super::config::{LagPolicy, VolumeConfig};
use super::damage::Damage;
use super::election::Election;
use super::event::{
    Action, Actions, Control, CopyStatus, Event, Failure, IoToken, Now, Request, RequestId, Time,
    Tip,
};
use super::failed::FailedClosed;
use super::feed::Peer;
use super::fork::Return;
use super::journal::{Journal, Sealed};
use super::lag::{LagRoom, PeerLag};
use super::merge::Merge;
use super::mutants::{Mutant, planted};
use super::overlay::{Overlay, mask};
use super::peers::Regroup;
use super::pins::Pins;
use super::prover::Prover;
use super::reads::Reads;
use super::replica::ReplicaState;
use super::roles::Transition;
use super::seal::{build_records, encode_to_slots};
use super::superblock::SuperblockWriter;
use super::sweep::Sweep;
use super::tree::Tree;
use super::waiters::Waiters;
use crate::arena::{SlotId, SlotMemory};

/// See the module.
#[derive(Debug)]
pub struct Volume {
    pub(super) config: VolumeConfig,
    pub(super) overlay: Overlay,
    pub(super) journal: Journal,
    pub(super) superblock: SuperblockWriter,
    pub(super) sweep: Option<Sweep>,
    /// Where the backing's sectors ask for it.
    pub(super) merge: Option<Merge>,
    pub(super) tree: Tree,
    pub(super) waiters: Waiters,
    pub(super) reads: Reads,
    pub(super) peers: Vec<Peer>,
    /// A frame of the log up to which nothing can be sent to peers, since it is damaged.
    pub(super) unreadable: Epoch,
    pub(super) replica: ReplicaState,
    pub(super) prover: Prover,
    pub(super) failed: Option<FailedClosed>,
    pub(super) stopping: bool,
    pub(super) damage: Damage,
    /// When the open epoch got its first record.
    pub(super) open_since: Option<Time>,
    /// The open epoch is to be sealed, but log or slots are short: whatever frees them is an event,
    /// so that no timer is needed.
    pub(super) seal_blocked: bool,
    /// Writes that had completed were dropped, or a primary said that its history lacks them.
    pub(super) discarded: bool,
    /// The newest epoch that took a client's write since this node was started or promoted.
    pub(super) wrote: Epoch,
    /// It was primary until a higher term came: also what it has destaged may be left behind.
    pub(super) superseded: bool,
    /// When the oldest durable epoch that is not destaged yet was sealed.
    pub(super) dirty_since: Option<Time>,
    /// Epochs up to this one are durable on the primary: on a primary, here.
    pub(super) anchored: Tip,
    pub(super) drains: VecDeque<RequestId>,
    pub(super) transition: Option<Transition>,
    pub(super) election: Option<Election>,
    /// A term that this node asked for in vain, and the newest one before it that may have had a
    /// primary.
    pub(super) unled: Option<(Term, u64)>,
    pub(super) regroup: Option<Regroup>,
    /// An empty epoch is to be sealed, so that the end of the log shows whose it is.
    pub(super) mark_term: bool,
    pub(super) opened_alone: bool,
    pub(super) pins: Pins,
    pub(super) returning: Return,
    /// Some peer has a bound for its lag.
    pub(super) bounds_lag: bool,
    pub(super) degraded: bool,
    /// It ended when everything up to here was durable; enough peers are to have that yet.
    pub(super) rejoins: Option<Epoch>,
    pub(super) lag: LagRoom,
    /// How often state trees were to be compared.
    pub(super) compares: u64,
    scratch: Vec<u8>,
    last_status: Option<CopyStatus>,
}

impl Volume {
    /// A volume as recovery found it. `slots` is the size of the arena.
    #[must_use]
    pub fn new(
        config: VolumeConfig,
        journal: Journal,
        overlay: Overlay,
        superblock: SuperblockWriter,
        anchored: Tip,
    ) -> Self {
        let checks_nothing = config.verify_reads == VerifyReads::Off;
        assert!(config.tree || checks_nothing, "reads would wait for a tree");
        // Until the prover has read its ledger, it may need everything that is kept.
        let proven = journal.base;
        let mut volume = Self {
            overlay,
            journal,
            sweep: None,
            merge: None,
            tree: Tree::default(),
            waiters: Waiters::default(),
            reads: Reads::default(),
            peers: (0..config.peers).map(|_| Peer::default()).collect(),
            unreadable: Epoch(0),
            replica: ReplicaState::default(),
            prover: Prover::new(config.apply_proven, proven),
            failed: None,
            stopping: false,
            damage: Damage::default(),
            open_since: None,
            seal_blocked: false,
            discarded: false,
            wrote: Epoch(0),
            superseded: false,
            dirty_since: None,
            anchored,
            drains: VecDeque::new(),
            transition: None,
            election: None,
            unled: None,
            regroup: None,
            mark_term: false,
            opened_alone: false,
            pins: Pins::opened(superblock.persisted()),
            returning: Return::No,
            bounds_lag: config.lag.iter().any(LagPolicy::is_bounded),
            degraded: false,
            rejoins: None,
            lag: LagRoom::default(),
            compares: 0,
            scratch: Vec::new(),
            last_status: None,
            superblock,
            config,
        };
        if !volume.journal.sealed.is_empty() {
            volume.dirty_since = Some(Time(0));
        }
        volume.begin_opening();
        // Until a peer says what it has, it may need everything that is kept.
        let retained = volume.superblock.persisted().retained;
        let tip = volume.tip().epoch;
        for peer in &mut volume.peers {
            peer.set_hold(retained);
            peer.lag = PeerLag::at(tip);
        }
        volume
    }

    /// A primary that was restarted may have been replaced, or have lost a tail that its peers
    /// hold.
    fn begin_opening(&mut self) {
        let config = &self.config;
        let needed = config.open_answers.min(config.peers);
        let was_primary = self.superblock.persisted().role == Role::Primary;
        // A volume that was never written to has nothing to miss.
        if was_primary && self.tip().epoch > Epoch(0) {
            if needed > 0 {
                self.election = Some(Election::open(needed, config.start_alone_after_ms));
            } else {
                self.mark_term = config.peers > 0;
            }
        }
    }

    /// Takes an event. Actions are to be carried out in order before the next step.
    pub fn step(&mut self, now: Now, event: Event, mem: &mut dyn SlotMemory, out: &mut Actions) {
        self.free_handed_heads(mem);
        match event {
            Event::Request { id, request } => self.request(now, id, request, mem, out),
            Event::IoDone { token, result } => self.io_done(now, token, result, mem, out),
            Event::Timer => {}
            Event::ForkSaved(result) => self.fork_saved(result, out),
            Event::Pin { id } => self.pin(now, id),
            Event::Unpin { generation } => self.unpin(generation),
            Event::Peer { peer, event } => self.peer_event(peer, event, out),
            Event::Proof(event) => self.proof_event(event, out),
            Event::Tree(event) => self.tree_event(now, event, mem, out),
            Event::Control { id, control } => self.control(now, id, control, out),
        }
        self.progress(now, mem, out);
        if cfg!(debug_assertions) {
            self.check();
        }
    }

    /// Starts everything that is possible now.
    fn progress(&mut self, now: Now, mem: &mut dyn SlotMemory, out: &mut Actions) {
        self.replica_progress(now, mem, out);
        self.election_progress(now, out);
        self.return_progress(mem, out);
        self.transition_progress(now, out);
        if !self.pins.is_unused() {
            self.pins_progress(now, mem, out);
        }
        if !self.damage.is_unused() {
            self.damage_progress(now, mem, out);
        }
        self.apply_progress(mem, out);
        if self.failed.is_none() {
            self.try_seal(now, mem, out);
            self.journal.submit(mem, out);
        }
        self.regroup_progress(now, out);
        if self.bounds_lag {
            self.lag_progress(now);
        }
        self.note_sweep_that_waits(now, mem);
        self.wake_waiters(now, out);
        self.feed_progress(out);
        if !self.prover.is_unused() {
            self.prover_progress(mem, out);
        }
        if self.failed.is_none() {
            self.checkpoint_progress(now, mem, out);
            self.superblock_progress(mem, out);
        }
        let status = self.copy_status();
        if self.last_status != Some(status) {
            self.last_status = Some(status);
            out.push(Action::StateChanged);
        }
    }

    fn check(&self) {
        assert!(self.journal.tail().0 - self.journal.base_offset.0 <= self.journal.ring_bytes());
        let copy = self.superblock.persisted().copy;
        let rebased = self.superblock.desired.copy != copy && copy.is_shadowed();
        if !(copy.is_usable() || self.is_applying()) || rebased {
            return; // A full copy starts at another place of the history.
        }
        let checkpoint = self.superblock.persisted().checkpoint;
        assert!(checkpoint <= self.journal.durable() && self.journal.durable() <= self.tip().epoch);
        assert!(checkpoint <= self.anchored.epoch && self.anchored.epoch <= self.tip().epoch);
        assert_eq!(
            self.journal.base_offset,
            self.superblock.persisted().retained_offset
        );
        let first = self
            .journal
            .sealed
            .front()
            .map(|sealed| sealed.header.epoch);
        assert!(first.is_none_or(|first| first == checkpoint.next()));
    }

    fn request(
        &mut self,
        now: Now,
        id: RequestId,
        request: Request,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        match request {
            Request::Read {
                lba,
                sectors,
                slots,
            } => self.read_what_is_good(now, id, (lba, sectors, &slots), mem, out),
            Request::Write {
                lba,
                sectors,
                fua,
                slots,
            } => {
                if let Err(failure) = self.accepts_writes() {
                    free_all(mem, &slots);
                    return out.complete(id, Err(failure));
                }
                self.insert(lba, u64::from(sectors), &slots, mem);
                self.written(now, id, fua, out);
            }
            Request::Zero {
                lba,
                sectors,
                fua,
                trim,
                edges,
            } => {
                if let Err(failure) = self.accepts_writes() {
                    free_all(mem, &edges);
                    return out.complete(id, Err(failure));
                }
                self.zero(lba, sectors, trim, &edges, mem);
                self.written(now, id, fua, out);
            }
            Request::Flush => self.flush(now, id, out),
        }
    }

    fn flush(&mut self, now: Now, id: RequestId, out: &mut Actions) {
        match (self.accepts_writes(), self.role()) {
            (Err(failure @ (Failure::Io | Failure::ShuttingDown)), _) => {
                out.complete(id, Err(failure));
            }
            // Also while it is being demoted: what it accepted before counts.
            (_, Role::Primary) => {
                let epoch = self.last_change();
                self.waiters.flush(now.time, epoch, id);
            }
            // Nothing is written here; but a client may still be connected who wrote before.
            (_, Role::Replica | Role::Fenced) => {
                let open = !self.overlay.open_is_empty();
                // Perhaps the new primary lacks it.
                let fenced = self.role() == Role::Fenced;
                // A demoted node was not superseded, but somebody may have been promoted since.
                let followed = self.superblock.desired.term.counter;
                let overtaken = followed > self.journal.tip_rank().term;
                let newer = self.superseded || overtaken || self.wrote > self.anchored.epoch;
                let own = self.has_own_tail() && self.wrote > Epoch(0) && newer;
                let lost = self.discarded || open || fenced || own;
                let result = if lost { Err(Failure::Io) } else { Ok(()) };
                out.complete(id, result);
            }
        }
    }

    /// The epoch that holds the last change that was accepted.
    #[must_use]
    pub fn last_change(&self) -> Epoch {
        if self.overlay.open_is_empty() || planted(Mutant::FlushForgetsOpenEpoch) {
            self.tip().epoch
        } else {
            self.open_epoch()
        }
    }

    fn insert(&mut self, lba: Lba, sectors: u64, slots: &[SlotId], mem: &mut dyn SlotMemory) {
        let open = self.open_epoch();
        let mut at = lba.0;
        let end = lba.0 + sectors;
        for &slot in slots {
            let block = Lba(at).block();
            let from = Lba(at).sector_in_block();
            let to = (end - block.lba().0).min(SECTORS_PER_BLOCK);
            let to = u32::try_from(to).expect("at most eight");
            self.overlay.insert(mem, open, block, slot, mask(from, to));
            at = block.lba().0 + SECTORS_PER_BLOCK;
        }
        assert!(at >= end, "the front end brings a slot for each block");
    }

    fn zero(
        &mut self,
        lba: Lba,
        sectors: u64,
        trim: bool,
        edges: &[SlotId],
        mem: &mut dyn SlotMemory,
    ) {
        let open = self.open_epoch();
        let end = lba.0 + sectors;
        let first_whole = lba.0.div_ceil(SECTORS_PER_BLOCK);
        let end_whole = end / SECTORS_PER_BLOCK;
        for &slot in edges {
            mem.bytes_mut(slot).fill(0);
        }
        if first_whole > end_whole {
            // Within one block.
            return self.insert(lba, sectors, edges, mem);
        }
        let mut edges = edges.iter().copied();
        if !lba.0.is_multiple_of(SECTORS_PER_BLOCK)
            && let Some(slot) = edges.next()
        {
            let sectors = first_whole * SECTORS_PER_BLOCK - lba.0;
            self.insert(lba, sectors, &[slot], mem);
        }
        if !end.is_multiple_of(SECTORS_PER_BLOCK)
            && let Some(slot) = edges.next()
        {
            let start = Lba(end_whole * SECTORS_PER_BLOCK);
            self.insert(start, end - start.0, &[slot], mem);
        }
        self.overlay.zero(
            mem,
            open,
            BlockIndex(first_whole)..BlockIndex(end_whole),
            trim,
        );
    }

    fn written(&mut self, now: Now, id: RequestId, fua: bool, out: &mut Actions) {
        self.open_since.get_or_insert(now.time);
        let epoch = self.open_epoch();
        self.wrote = epoch;
        if fua {
            self.waiters.flush(now.time, epoch, id);
        } else if self.writes_wait() {
            self.waiters.write(now.time, epoch, id);
        } else {
            out.complete(id, Ok(()));
        }
    }

    /// Closes the open epoch if someone waits for it and the log is free (group commit), or by size
    /// or age. If log or slots are short it stays open, and writers are held back.
    fn try_seal(&mut self, now: Now, mem: &mut dyn SlotMemory, out: &mut Actions) {
        self.seal_blocked = false;
        let nothing = self.overlay.open_is_empty() && !self.mark_term;
        if nothing || self.role() != Role::Primary {
            return;
        }
        let aged = self
            .open_since
            .is_some_and(|since| now.time >= since.plus_ms(self.config.log_age_ms));
        let wanted = self
            .waiters
            .last_epoch()
            .is_some_and(|epoch| epoch >= self.open_epoch());
        let full = self.overlay.open_held() * 2 >= self.config.max_epoch_blocks
            || self.overlay.zero_extents() * 2 >= self.config.max_zero_extents;
        // Slots of an open epoch cannot be destaged. But an epoch for each write would cost twice
        // the log: what comes while the log is written goes into one.
        let pressed = mem.free_slots() < 2 * self.config.reserve_slots;
        let group = (wanted || pressed) && !self.journal.is_writing();
        let lagging = self.lag.closes(self.overlay.open_held()) && !self.journal.is_writing();
        let asked = self.mark_term || self.seal_now();
        if !(full || aged || group || lagging || asked) {
            return;
        }
        self.seal(now, mem, out);
    }

    /// Whether there is no point in letting the open epoch grow.
    fn seal_now(&self) -> bool {
        !self.drains.is_empty() || self.stopping || self.transition.is_some()
    }

    /// Drops the open epoch: nobody was promised any of it.
    pub(super) fn discard_open(&mut self, mem: &mut dyn SlotMemory) {
        self.discarded |= !self.overlay.open_is_empty();
        self.overlay
            .discard_open(mem, self.journal.tip().epoch.next());
        let rest = self.journal.sealed.iter();
        self.overlay
            .rebuild_zeros(rest.map(|s| (s.header.epoch, s.zeros.as_slice())));
        self.open_since = None;
    }

    fn seal(&mut self, now: Now, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let worst = super::seal::max_records(self.overlay.open_held(), self.overlay.zero_extents());
        let worst = u32::try_from(worst).unwrap_or(u32::MAX);
        let head = hn4::log::frame::head_bytes(usize::from(self.config.lanes.count), worst);
        let payload_bytes = self.overlay.open_held() as u64 * BLOCK_BYTES;
        if self.journal.free_bytes() < head + payload_bytes
            || (mem.free_slots() as u64) < head / BLOCK_BYTES
        {
            self.seal_blocked = true;
            return;
        }
        let epoch = self.open_epoch();
        let (mut blocks, zeros) = self.overlay.seal(epoch);
        if planted(Mutant::LoseLastRecord) && blocks.len() > 1 {
            blocks.pop();
        }
        let payload_bytes = blocks.len() as u64 * BLOCK_BYTES;
        let (lanes, records) = build_records(mem, self.config.lanes, &mut blocks, &zeros);
        let persisted = self.superblock.persisted();
        let params = hn4::log::frame::FrameParams {
            identity: &self.config.identity,
            epoch,
            offset: self.journal.tail(),
            term: persisted.term,
            incarnation: persisted.incarnation,
            durable_through: self.journal.durable(),
            previous: self.tip().chain,
            sealed_ms: now.wall_ms,
            checkpoint_mark: self.config.tree && self.tree.marks(now.time, self.config.mark_ms),
            lanes: &lanes,
            records: &records,
            payload_bytes,
        };
        let encoded = encode_to_slots(mem, &params, &mut self.scratch);
        let (header, chain, head) = encoded.expect("room was checked above");
        self.journal.append(Sealed {
            header,
            chain,
            blocks,
            zeros,
            head,
        });
        self.open_since = None;
        self.mark_term = false;
        if planted(Mutant::AnchorBeforeDurable) {
            self.anchored = self.tip();
            self.announce_anchored(out);
        }
        self.ship_sealed(epoch, out);
    }

    fn io_done(
        &mut self,
        now: Now,
        token: IoToken,
        result: Result<(), i32>,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        if let IoToken::Read(op) = token {
            return self.read_done(op, result, out);
        }
        if token == IoToken::Shadow {
            return self.shadow_io_done(result, mem, out);
        }
        if let IoToken::MergeRead(index) = token {
            return self.merge_read_done(index, result.is_ok());
        }
        if let Err(errno) = result
            && !planted(Mutant::IgnoreErrors)
        {
            return self.fail(token, errno, out);
        }
        if self.failed.is_some() {
            return; // P5: nothing follows from what still succeeds.
        }
        match token {
            IoToken::LogWrite(batch) | IoToken::LogFsync(batch) => {
                let before = self.journal.durable();
                let flushed = matches!(token, IoToken::LogFsync(_));
                if self.journal.io_done(batch, flushed, out) {
                    self.keep_for_prover(before);
                    if !planted(Mutant::LeakHeads) {
                        self.journal.free_heads(mem, before);
                    }
                    self.became_durable(now, out);
                }
            }
            IoToken::Superblock => self.superblock_done(now, mem, out),
            IoToken::SweepZero | IoToken::SweepWrite | IoToken::SweepFsync => {
                if let Some(sweep) = &mut self.sweep {
                    sweep.io_done();
                }
            }
            IoToken::MergeWrite | IoToken::MergeFsync => self.merge_io_done(),
            IoToken::SeedWrite(number) => self.piece_written(number, mem, out),
            IoToken::SeedFsync => self.pieces_flushed(),
            IoToken::Apply => self.apply_io_done(),
            IoToken::Shadow | IoToken::Read(_) | IoToken::MergeRead(_) => {}
        }
    }

    fn became_durable(&mut self, now: Now, out: &mut Actions) {
        self.dirty_since.get_or_insert(now.time);
        if self.role() == Role::Primary {
            let durable = self.journal.durable();
            // The chain of a kept epoch is known; durable ones after the checkpoint are all kept.
            if let Some(chain) = self.journal.chain(durable) {
                self.anchored = Tip {
                    epoch: durable,
                    chain,
                };
                self.announce_anchored(out);
            }
        }
    }

    fn control(&mut self, now: Now, id: RequestId, control: Control, out: &mut Actions) {
        if let Some(failed) = &self.failed {
            let FailedClosed { disk, doing, errno } = failed;
            let why = format!("the volume failed closed: {disk:?} error {errno} while {doing}");
            return out.push(Action::ControlDone {
                id,
                result: Err(why),
            });
        }
        match control {
            Control::Flush if self.role() == Role::Fenced => {
                let why = "this node was superseded; what it did not write yet, it never will";
                let result = Err(why.to_owned());
                out.push(Action::ControlDone { id, result });
            }
            Control::Flush => {
                let epoch = self.last_change();
                self.waiters.control(now.time, epoch, id);
            }
            Control::Drain => self.drains.push_back(id),
            Control::Promote {
                term,
                answers,
                within_ms,
            } => self.promote(id, term, (answers, within_ms), out),
            Control::Demote => self.demote(now.time, id, out),
            Control::Peers(set) => self.change_peers(id, set, out),
        }
    }
}

/// Gives slots back that the core does not keep.
pub(super) fn free_all(mem: &mut dyn SlotMemory, slots: &[SlotId]) {
    for &slot in slots {
        mem.free(slot);
    }
}
