//! A replica's side: epochs that a primary sends, and the first full copy.
//!
//! Everything from a peer is a proposal (P6): a frame is taken into the log only if it is valid as a
//! whole and continues our chain at our offset in a term that we obey. It is destaged only when the
//! primary has said that it is anchored. An unanchored tail can be dropped again without touching
//! the backing.

use std::collections::VecDeque;

use hn4::log::{CopyState, FrameHead, Role};
use hn4::types::{BLOCK_BYTES, Epoch, LogOffset};

use super::event::{
    Action, Actions, Disk, Io, IoToken, PeerEvent, PeerId, PeerMessage, Progress, SeedOrigin,
    SeedPiece, Seg, Tip,
};
use super::journal::{Journal, Sealed};
use super::mutants::{Mutant, planted};
use super::seal::{bytes_to_slots, frame_changes};
use super::volume::{Volume, free_all};
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// What stands between this replica and catching up, for status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// The primary's log does not reach back to our tip: a new full copy is needed.
    NeedsCopy {
        /// The oldest epoch the primary can send.
        oldest: Epoch,
    },
    /// Our anchored history is not the primary's.
    Diverged {
        /// Where it differs at the latest.
        epoch: Epoch,
    },
    /// The primary sent something that does not continue our log.
    Rejected {
        /// Why.
        why: String,
    },
}

/// An operation of a full copy that is on its way. It may outlive the copy it belongs to: then
/// nothing else is written until it is done, since the device could reorder them.
#[derive(Debug)]
struct SeedIo {
    kind: SeedIoKind,
    /// It belongs to a copy that was given up.
    stale: bool,
}

#[derive(Debug)]
enum SeedIoKind {
    /// A piece: its end on the volume, its slots, what it cost of the credit.
    Write {
        end: u64,
        slots: Vec<SlotId>,
        cost: u64,
    },
    Flush,
}

#[derive(Debug, Default)]
struct Seed {
    pieces: VecDeque<SeedPiece>,
    /// Everything below was written.
    written: u64,
    /// Everything below was written and flushed, and the superblock is to say so.
    flushed: u64,
    /// Pieces from here on are expected.
    expected: u64,
    ended: Option<Epoch>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct ReplicaState {
    source: Option<PeerId>,
    pending: VecDeque<Vec<u8>>,
    /// The newest anchor heard of; may be ahead of our tip.
    hint: Option<Tip>,
    last_ack: Option<Progress>,
    truncate_to: Option<Tip>,
    rebase: Option<SeedOrigin>,
    seed: Option<Seed>,
    seed_io: Option<SeedIo>,
    /// What keeps us from catching up, if anything.
    pub obstacle: Option<Obstacle>,
}

impl ReplicaState {
    /// Nothing is on its way into the log by other means than writes that are counted there.
    pub(super) fn is_settled(&self) -> bool {
        self.pending.is_empty()
            && self.truncate_to.is_none()
            && self.rebase.is_none()
            && self.seed.is_none()
            && self.seed_io.is_none()
    }
}

impl ReplicaState {
    fn give_up_seed(&mut self) {
        self.seed = None;
        self.rebase = None;
        if let Some(io) = &mut self.seed_io {
            io.stale = true;
        }
    }
}

/// Why a frame was not taken.
enum Refused {
    NoRoom,
    Bad(String),
}

impl Volume {
    /// What keeps this replica from catching up.
    #[must_use]
    pub fn obstacle(&self) -> Option<&Obstacle> {
        self.replica.obstacle.as_ref()
    }

    pub(super) fn peer_event(&mut self, id: PeerId, event: PeerEvent, out: &mut Actions) {
        if self.failed.is_some() && !matches!(event, PeerEvent::Disconnected) {
            return;
        }
        match event {
            PeerEvent::Connected => {
                self.peer_connected(id, true);
                if self.role() == Role::Replica {
                    out.peer(id, PeerMessage::Credit(self.config.replica_window_bytes));
                }
            }
            PeerEvent::Disconnected => {
                self.peer_connected(id, false);
                if self.replica.source == Some(id) {
                    self.lose_source();
                }
            }
            PeerEvent::HigherTerm(term) => self.higher_term(term, out),
            // What is promoted is what was settled; the session is about to end.
            _ if self.role() == Role::Replica && self.transition.is_some() => {}
            event if self.role() == Role::Replica => self.replica_event(id, event, out),
            event => self.feed_event(id, event, out),
        }
    }

    fn lose_source(&mut self) {
        let replica = &mut self.replica;
        replica.source = None;
        replica.pending.clear();
        replica.last_ack = None;
        // What was written goes into the superblock with the next flush; the rest comes again.
        replica.give_up_seed();
    }

    fn replica_event(&mut self, id: PeerId, event: PeerEvent, out: &mut Actions) {
        match event {
            PeerEvent::Epoch(frame) => {
                self.replica.source = Some(id);
                let pending: u64 = self.replica.pending.iter().map(|f| f.len() as u64).sum();
                if pending > 2 * self.config.replica_window_bytes + hn4::log::frame::MAX_FRAME_BYTES
                {
                    return self.reject(id, "more frames than it was granted".to_owned(), out);
                }
                self.replica.pending.push_back(frame);
            }
            PeerEvent::Anchored(tip) => {
                // The first thing after a subscription: whoever has nothing to send still learns
                // how far we are.
                self.replica.source = Some(id);
                // The latest counts, not the highest: after a failover the new history may be
                // shorter than what the old primary announced.
                self.replica.hint = Some(tip);
            }
            PeerEvent::Truncate(tip) => {
                let known = self.journal.chain(tip.epoch) == Some(tip.chain);
                if known && tip.epoch >= self.anchored.epoch {
                    self.replica.pending.clear();
                    self.replica.truncate_to = Some(tip);
                } else {
                    self.replica.obstacle = Some(Obstacle::Diverged { epoch: tip.epoch });
                }
            }
            PeerEvent::Diverged(epoch) => {
                self.replica.obstacle = Some(Obstacle::Diverged { epoch });
            }
            PeerEvent::TooOld { oldest } => self.too_old(oldest, out),
            PeerEvent::SeedStart(origin) => self.seed_start(id, origin, out),
            PeerEvent::SeedPiece(piece) => self.seed_piece(id, piece, out),
            PeerEvent::SeedEnd { usable_after } => {
                let complete = self.config.identity.size_bytes;
                match &mut self.replica.seed {
                    Some(seed) if seed.expected == complete => seed.ended = Some(usable_after),
                    _ => self.reject(id, "the end of a copy that is not complete".to_owned(), out),
                }
            }
            _ => {}
        }
    }

    fn reject(&mut self, id: PeerId, why: String, out: &mut Actions) {
        self.replica.obstacle = Some(Obstacle::Rejected { why });
        self.replica.pending.clear();
        out.peer(id, PeerMessage::Close);
    }

    /// A copy that is not usable yet loses nothing by starting again; a usable one waits for the
    /// operator.
    fn too_old(&mut self, oldest: Epoch, out: &mut Actions) {
        if self.superblock.persisted().copy == CopyState::Usable {
            self.replica.obstacle = Some(Obstacle::NeedsCopy { oldest });
        } else {
            self.start_over(out);
        }
    }

    pub(super) fn replica_progress(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        if self.role() != Role::Replica || self.failed.is_some() {
            return;
        }
        self.truncate_progress(mem);
        self.rebase_progress(mem);
        self.append_pending(mem, out);
        self.advance_anchor();
        self.seed_progress_replica(mem, out);
        self.send_ack(out);
    }

    fn append_pending(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        // Frames of a new session of the log must not be on the medium before the superblock that
        // names the session: after a crash the old one would call what they replaced corrupt.
        let session_is_known = self.superblock.persisted().session == self.journal.session
            || planted(Mutant::FramesBeforeSession);
        if self.replica.truncate_to.is_some()
            || self.replica.rebase.is_some()
            // Epochs cannot be destaged before the last piece is written, and must not take the
            // slots that pieces need.
            || self.replica.seed.is_some()
            || !session_is_known
        {
            return;
        }
        let Some(source) = self.replica.source else {
            return;
        };
        while let Some(frame) = self.replica.pending.pop_front() {
            match self.append_frame(&frame, mem) {
                Ok(()) => {
                    out.peer(source, PeerMessage::Credit(frame.len() as u64));
                    if matches!(self.replica.obstacle, Some(Obstacle::Rejected { .. })) {
                        self.replica.obstacle = None;
                    }
                }
                Err(Refused::NoRoom) => {
                    self.replica.pending.push_front(frame);
                    return;
                }
                Err(Refused::Bad(why)) => return self.reject(source, why, out),
            }
        }
    }

    fn append_frame(&mut self, frame: &[u8], mem: &mut dyn SlotMemory) -> Result<(), Refused> {
        let bad = |why: String| Err(Refused::Bad(why));
        let head = match FrameHead::decode_frame(&self.config.identity, frame) {
            Ok(head) => head,
            Err(error) => return bad(error.to_string()),
        };
        let header = head.header;
        let tip = self.tip();
        if header.epoch <= tip.epoch {
            let same = self
                .journal
                .chain(header.epoch)
                .is_none_or(|chain| chain == head.chain);
            // Delivery is at least once; what we have already is not taken twice.
            return if same {
                Ok(())
            } else {
                bad(format!("epoch {} is a fork", header.epoch))
            };
        }
        if header.epoch != tip.epoch.next() {
            return bad(format!("epoch {} after {}", header.epoch, tip.epoch));
        }
        if header.previous != tip.chain {
            let (ours, theirs) = (tip.chain, header.previous);
            return bad(format!(
                "epoch {} continues {theirs}, our log ends in {ours}",
                header.epoch
            ));
        }
        if header.offset != self.journal.tail() {
            return bad(format!(
                "epoch {} does not start where our log ends",
                header.epoch
            ));
        }
        let term = self.superblock.persisted().term;
        if header.term.counter > term.counter {
            return bad(format!(
                "epoch {} is of term {}, we obey {term}",
                header.epoch, header.term
            ));
        }
        let slots = usize::try_from(header.frame_bytes / BLOCK_BYTES).unwrap_or(usize::MAX);
        if slots + self.config.reserve_slots / 2 > mem.capacity()
            || header.frame_bytes > self.journal.ring_bytes()
        {
            return bad(format!(
                "epoch {} is larger than our overlay or log",
                header.epoch
            ));
        }
        if mem.free_slots() < slots + self.config.reserve_slots / 2
            || self.journal.free_bytes() < header.frame_bytes
        {
            return Err(Refused::NoRoom);
        }
        self.take_frame(&head, frame, mem);
        Ok(())
    }

    fn take_frame(&mut self, head: &FrameHead, frame: &[u8], mem: &mut dyn SlotMemory) {
        let header = head.header;
        let split = usize::try_from(header.head_bytes).unwrap_or(usize::MAX);
        let (head_bytes, payload) = frame.split_at(split);
        let head_slots = bytes_to_slots(mem, head_bytes).expect("room was checked");
        let payload_slots = bytes_to_slots(mem, payload).expect("room was checked");
        let (mut blocks, zeros) = frame_changes(head, &payload_slots);
        if planted(Mutant::ApplyHalfAnEpoch) && blocks.len() > 1 {
            blocks.pop();
        }
        self.overlay.adopt(header.epoch, &blocks, &zeros);
        let chain = head.chain;
        self.journal.append(Sealed {
            header,
            chain,
            blocks,
            zeros,
            head: head_slots,
        });
        let anchored = header.durable_through;
        if anchored > self.anchored.epoch
            && let Some(chain) = self.journal.chain(anchored)
        {
            self.anchored = Tip {
                epoch: anchored,
                chain,
            };
        }
    }

    fn advance_anchor(&mut self) {
        if let Some(hint) = self.replica.hint
            && hint.epoch > self.anchored.epoch
            && self.journal.chain(hint.epoch) == Some(hint.chain)
        {
            self.anchored = hint;
        }
    }

    fn truncate_progress(&mut self, mem: &mut dyn SlotMemory) {
        let Some(to) = self.replica.truncate_to else {
            return;
        };
        if self.journal.is_writing() || self.superblock.is_busy() {
            return;
        }
        self.replica.truncate_to = None;
        let session = self.journal.session + 1;
        for sealed in self.journal.truncate(to, session) {
            free_all(mem, &sealed.head);
            for dirty in &sealed.blocks {
                self.overlay.truncate(mem, dirty.block, to.epoch);
            }
        }
        let rest = self.journal.sealed.iter();
        self.overlay
            .rebuild_zeros(rest.map(|s| (s.header.epoch, s.zeros.as_slice())));
        self.waiters.cut_back(to.epoch);
        // Frames of the dropped tail must prove nothing after a crash.
        self.superblock.dirty = true;
    }

    fn send_ack(&mut self, out: &mut Actions) {
        let Some(source) = self.replica.source else {
            return;
        };
        let progress = self.copy_status().progress;
        // A copy that is not usable is worth nothing to whoever counts copies; its progress may even
        // be of another history.
        let usable = self.superblock.persisted().copy == CopyState::Usable
            || planted(Mutant::AckUnusableCopy);
        if usable && self.replica.last_ack != Some(progress) {
            self.replica.last_ack = Some(progress);
            out.peer(source, PeerMessage::Ack(progress));
        }
    }

    fn seed_start(&mut self, id: PeerId, origin: SeedOrigin, out: &mut Actions) {
        let persisted = self.superblock.persisted();
        let resumed = match persisted.copy {
            CopyState::Usable => {
                return self.reject(id, "a full copy that we did not ask for".to_owned(), out);
            }
            CopyState::Fresh => false,
            CopyState::Seeding {
                cursor_bytes, from, ..
            } => from == origin.from.epoch && origin.cursor_bytes <= cursor_bytes,
        };
        self.replica.source = Some(id);
        self.replica.pending.clear();
        self.replica.give_up_seed();
        let at = origin.cursor_bytes;
        if at == 0 {
            self.replica.rebase = Some(origin);
        } else if resumed && self.tip() == origin.from || planted(Mutant::ResumeCopyAnywhere) {
            let seed = Seed {
                written: at,
                flushed: at,
                expected: at,
                ..Seed::default()
            };
            self.replica.seed = Some(seed);
        } else {
            // What we have is of another copy. It is not usable, so nothing is lost.
            self.start_over(out);
        }
    }

    fn start_over(&mut self, out: &mut Actions) {
        self.superblock.desired.copy = CopyState::Fresh;
        self.superblock.dirty = true;
        self.close_sessions(out);
    }

    /// The log starts anew at the place where the copy begins.
    fn rebase_progress(&mut self, mem: &mut dyn SlotMemory) {
        let Some(origin) = self.replica.rebase else {
            return;
        };
        if self.journal.is_writing() || self.superblock.is_busy() || self.sweep.is_some() {
            return;
        }
        // Whatever is left is of an earlier copy that was not completed.
        for sealed in std::mem::take(&mut self.journal.sealed) {
            free_all(mem, &sealed.head);
            for dirty in &sealed.blocks {
                self.overlay.truncate(mem, dirty.block, Epoch(0));
            }
        }
        self.overlay.rebuild_zeros(std::iter::empty());
        self.waiters.cut_back(origin.from.epoch);
        self.replica.rebase = None;
        let session = self.journal.session + 1;
        let base = (origin.from, origin.log_offset);
        self.journal = Journal::new(self.journal.ring_bytes(), session, base);
        self.anchored = origin.from;
        let next = &mut self.superblock.desired;
        next.checkpoint = origin.from.epoch;
        next.checkpoint_chain = origin.from.chain;
        next.checkpoint_offset = origin.log_offset;
        next.retained = origin.from.epoch;
        next.retained_chain = origin.from.chain;
        next.retained_offset = origin.log_offset;
        next.copy = CopyState::Seeding {
            cursor_bytes: 0,
            from: origin.from.epoch,
            until: None,
        };
        self.superblock.dirty = true;
        // Pieces that came meanwhile are waiting in it.
        self.replica.seed.get_or_insert_with(Seed::default);
    }

    fn seed_piece(&mut self, id: PeerId, piece: SeedPiece, out: &mut Actions) {
        let size = self.config.identity.size_bytes;
        let expected = match (&self.replica.seed, self.replica.rebase) {
            (Some(seed), _) => seed.expected,
            (None, Some(_)) => 0,
            (None, None) => u64::MAX,
        };
        let fits = piece.offset == expected
            && piece.bytes > 0
            && piece.bytes.is_multiple_of(BLOCK_BYTES)
            && piece
                .offset
                .checked_add(piece.bytes)
                .is_some_and(|end| end <= size)
            && piece
                .data
                .as_ref()
                .is_none_or(|data| data.len() as u64 == piece.bytes);
        if !fits {
            return self.reject(
                id,
                format!("a piece at byte {} out of order", piece.offset),
                out,
            );
        }
        // Pieces may come before the log was made to start anew; they wait.
        let seed = self.replica.seed.get_or_insert_with(Seed::default);
        seed.expected = piece.offset + piece.bytes;
        seed.pieces.push_back(piece);
    }

    fn seed_progress_replica(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        if self.replica.rebase.is_some()
            || self.superblock.persisted().session != self.journal.session
        {
            return;
        }
        let flush_bytes = self.config.seed_flush_bytes;
        let size = self.config.identity.size_bytes;
        let copy = self.superblock.desired.copy;
        let checkpoint = self.superblock.desired.checkpoint;
        let Some(seed) = &mut self.replica.seed else {
            return;
        };
        if self.replica.seed_io.is_some() {
            return;
        }
        let complete = seed.written == size && seed.ended.is_some();
        if complete && seed.flushed == size {
            if let (
                CopyState::Seeding {
                    from, until: None, ..
                },
                Some(until),
            ) = (copy, seed.ended)
            {
                let until = Some(until)
                    .filter(|&until| until > checkpoint && !planted(Mutant::UsableTooEarly));
                let going_on = CopyState::Seeding {
                    cursor_bytes: size,
                    from,
                    until,
                };
                self.superblock.desired.copy = if until.is_some() {
                    going_on
                } else {
                    CopyState::Usable
                };
                self.superblock.dirty = true;
            }
            self.replica.seed = None;
            return;
        }
        if complete || seed.written - seed.flushed >= flush_bytes {
            self.replica.seed_io = Some(SeedIo {
                kind: SeedIoKind::Flush,
                stale: false,
            });
            let io = Io::Fsync {
                disk: Disk::Backing,
            };
            return out.push(Action::Io {
                token: IoToken::SeedFsync,
                io,
            });
        }
        let Some(piece) = seed.pieces.pop_front() else {
            return;
        };
        let end = piece.offset + piece.bytes;
        let (io, slots, cost) = match &piece.data {
            None => {
                let io = Io::Zero {
                    offset: piece.offset,
                    bytes: piece.bytes,
                    trim: true,
                };
                (io, Vec::new(), 0)
            }
            Some(data) => {
                let Some(slots) = bytes_to_slots(mem, data) else {
                    return seed.pieces.push_front(piece);
                };
                let first = out.segs.len();
                let bytes = u16::try_from(SLOT_BYTES).expect("4096");
                out.segs.extend(slots.iter().map(|&slot| Seg {
                    slot,
                    offset: 0,
                    bytes,
                }));
                let segs = first..out.segs.len();
                let offset = piece.offset;
                let io = Io::Write {
                    disk: Disk::Backing,
                    offset,
                    segs,
                    then_fsync: false,
                };
                (io, slots, piece.bytes)
            }
        };
        let kind = SeedIoKind::Write { end, slots, cost };
        self.replica.seed_io = Some(SeedIo { kind, stale: false });
        out.push(Action::Io {
            token: IoToken::SeedWrite,
            io,
        });
    }

    pub(super) fn seed_io_done(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let io = self.replica.seed_io.take();
        let SeedIo { kind, stale } = io.expect("completions come from operations on their way");
        if let SeedIoKind::Write { slots, .. } = &kind {
            free_all(mem, slots);
        }
        let Some(seed) = self.replica.seed.as_mut().filter(|_| !stale) else {
            return;
        };
        match kind {
            SeedIoKind::Flush => {
                seed.flushed = seed.written;
                if let CopyState::Seeding { cursor_bytes, .. } = &mut self.superblock.desired.copy {
                    *cursor_bytes = seed.flushed;
                    self.superblock.dirty = true;
                }
            }
            SeedIoKind::Write { end, cost, .. } => {
                seed.written = end;
                if let Some(source) = self.replica.source.filter(|_| cost > 0) {
                    out.peer(source, PeerMessage::Credit(cost));
                }
            }
        }
    }

    pub(super) fn seed_persisted(&mut self, out: &mut Actions) {
        if let CopyState::Seeding { cursor_bytes, .. } = self.superblock.persisted().copy
            && let Some(source) = self.replica.source
            && self.replica.seed.is_some()
        {
            out.peer(source, PeerMessage::SeedAck(cursor_bytes));
        }
    }

    /// How far a full copy is that this node receives, in bytes of the volume.
    #[must_use]
    pub fn seeding_cursor(&self) -> Option<u64> {
        self.replica.seed.as_ref().map(|seed| seed.written)
    }

    /// Where the log would have to continue.
    #[must_use]
    pub fn log_tail(&self) -> LogOffset {
        self.journal.tail()
    }
}
