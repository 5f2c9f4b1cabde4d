//! The first full copy, at the replica: the backing is filled in place, piece by piece.
//!
//! The copy is not usable until the epochs that ran meanwhile have been replayed over it. Progress
//! is recorded after a flush, so a copy goes on where it was, whichever side was restarted. If the
//! session ends, what has arrived is still written and recorded. One operation is on its way at a
//! time; if the copy is given up meanwhile, its completion is recognised as stale.
//!
//! What is filled may hold data that somebody brought, most of it the primary's. Then the copy is
//! asked for when a state tree of it is complete (`tree`), and parts that are the same (`resync`)
//! are passed over.
//!
//! **Invariant:** pieces and epochs of one copy are of one primary in one term. When a higher term
//! is heard of the copy starts anew: the old primary's backing may have held epochs that the new
//! history lacks.

use std::collections::VecDeque;

use hn4::log::{CopyState, Ground};
use hn4::types::{BLOCK_BYTES, Epoch, LogOffset, Rank};

use super::event::{
    Action, Actions, Contents, Disk, Io, IoToken, PeerId, PeerMessage, SeedOrigin, SeedPiece, Seg,
    Tip,
};
use super::journal::Journal;
use super::mutants::{Mutant, planted};
use super::seal::bytes_to_slots;
use super::shadow::Shadow;
use super::volume::{Volume, free_all};
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// An operation of a full copy that is on its way. It may outlive the copy it belongs to: then
/// nothing else is written until it is done, since the device could reorder them.
#[derive(Debug)]
pub(super) struct SeedIo {
    pub(super) kind: SeedIoKind,
    /// It belongs to a copy that was given up.
    pub(super) stale: bool,
}

#[derive(Debug)]
pub(super) enum SeedIoKind {
    /// A piece: its end on the volume, its slots, what it cost of the credit.
    Write {
        end: u64,
        slots: Vec<SlotId>,
        cost: u64,
    },
    Flush,
}

#[derive(Debug, Default)]
pub(super) struct Seed {
    pub(super) pieces: VecDeque<SeedPiece>,
    /// Everything below was written.
    pub(super) written: u64,
    /// Everything below was written and flushed, and the superblock is to say so.
    pub(super) flushed: u64,
    /// Pieces from here on are expected.
    pub(super) expected: u64,
    pub(super) ended: Option<Epoch>,
    /// What the pieces that wait cost of the credit.
    queued_cost: u64,
    /// It goes on below what a superblock counts, or is about to: what is written there is not
    /// durable meanwhile, so that must be taken back first.
    goes_back: bool,
    /// The session that brought it has ended: nothing more comes, and nobody is granted anything
    /// for what is still written.
    pub(super) detached: bool,
}

impl Seed {
    fn push(&mut self, piece: SeedPiece) {
        self.expected = piece.offset + piece.bytes;
        self.queued_cost += piece.cost();
        self.pieces.push_back(piece);
    }

    /// Passes over what the backing has already.
    fn pass_same(&mut self) -> Passed {
        let mut passed = Passed::default();
        while let Some(piece) = self.pieces.front()
            && piece.contents == Contents::Same
        {
            self.written = piece.offset + piece.bytes;
            passed.bytes += piece.bytes;
            passed.cost += piece.cost();
            self.goes_back = false;
            self.pieces.pop_front();
        }
        self.queued_cost -= passed.cost;
        passed.grants = passed.cost > 0 && !self.detached;
        passed
    }
}

/// What was not written, since it is there.
#[derive(Default)]
struct Passed {
    bytes: u64,
    /// What that cost of the credit, and whether it is granted again.
    cost: u64,
    grants: bool,
}

impl Volume {
    pub(super) fn seed_start(&mut self, id: PeerId, origin: SeedOrigin, out: &mut Actions) {
        if let CopyState::Shadowing { .. } = self.superblock.desired.copy {
            return self.shadow_start(id, origin, out);
        }
        let persisted = self.superblock.persisted();
        let complete = matches!(
            self.superblock.desired.copy,
            CopyState::Usable
                | CopyState::Applying { .. }
                | CopyState::Seeding { until: Some(_), .. }
        );
        let given_up = self.superblock.desired.copy == CopyState::Fresh;
        let resumed = match persisted.copy {
            // Also one that was asked for before the last piece was known to be there: it would
            // wait for pieces that nobody sends, and epochs would wait for it.
            _ if complete => {
                return self.reject(id, "a full copy that we did not ask for".to_owned(), out);
            }
            // Its pieces would be written, and then nothing would say that it is complete.
            _ if given_up => false,
            CopyState::Seeding {
                cursor_bytes, from, ..
            } => from == origin.from.epoch && origin.cursor_bytes <= cursor_bytes,
            _ => false,
        };
        self.replica.follow(id);
        self.replica.joined = false;
        self.replica.pending.clear();
        self.replica.give_up_seed();
        let at = origin.cursor_bytes;
        if at == 0 {
            self.replica.kept_bytes = 0;
            self.replica.rebase = Some(origin);
        } else if resumed && self.tip() == origin.from || planted(Mutant::ResumeCopyAnywhere) {
            let seed = Seed {
                written: at,
                flushed: at,
                expected: at,
                goes_back: true,
                ..Seed::default()
            };
            if let CopyState::Seeding { cursor_bytes, .. } = &mut self.superblock.desired.copy
                && *cursor_bytes > at
            {
                *cursor_bytes = at;
                self.superblock.dirty = true;
            }
            self.replica.seed = Some(seed);
        } else {
            // What we have is of another copy. It is not usable, so nothing is lost.
            self.start_over(out);
        }
    }

    /// A higher term was adopted; see the module.
    pub(super) fn seed_in_new_term(&mut self, out: &mut Actions) {
        if let CopyState::Seeding { .. } = self.superblock.desired.copy {
            self.start_over(out);
        }
        self.give_up_shadow();
    }

    pub(super) fn start_over(&mut self, out: &mut Actions) {
        self.replica.give_up_seed();
        self.superblock.desired.copy = CopyState::Fresh;
        self.superblock.dirty = true;
        self.close_sessions(out);
    }

    /// The log starts anew at the place where the copy begins.
    pub(super) fn rebase_progress(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let Some(origin) = self.replica.rebase else {
            return;
        };
        if self.journal.is_writing() || self.superblock.is_busy() || self.sweep.is_some() {
            return;
        }
        if !self.tree_lets_go(out) {
            return;
        }
        self.replica.rebase = None;
        let copy = CopyState::Seeding {
            cursor_bytes: 0,
            from: origin.from.epoch,
            until: None,
        };
        let base = (origin.from, origin.log_offset, self.rank_of_source());
        // Whatever is left is of an earlier copy that was not completed.
        self.rebase_log(base, copy, mem, out);
        // Pieces that came meanwhile are waiting in it.
        self.replica.seed.get_or_insert_with(Seed::default);
    }

    /// The log is empty and goes on from this place, which counts as the checkpoint, with the copy
    /// in this state; in one superblock.
    pub(super) fn rebase_log(
        &mut self,
        base: (Tip, LogOffset, Rank),
        copy: CopyState,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        for sealed in std::mem::take(&mut self.journal.sealed) {
            free_all(mem, &sealed.head);
            for dirty in &sealed.blocks {
                self.overlay.truncate(mem, dirty.block, Epoch(0));
            }
        }
        self.overlay.rebuild_zeros(std::iter::empty());
        let (tip, offset, rank) = base;
        self.waiters.cut_back(tip.epoch);
        let session = self.journal.session + 1;
        self.journal = Journal::new(self.journal.ring_bytes(), session, base);
        self.anchored = tip;
        self.cut_prover(Tip::default(), mem, out);
        self.prover.proven = tip;
        self.restart_prover(tip, out);
        self.pins.replaced();
        let next = &mut self.superblock.desired;
        (next.checkpoint, next.swept) = (tip.epoch, tip.epoch);
        next.checkpoint_chain = tip.chain;
        next.checkpoint_offset = offset;
        next.retained = tip.epoch;
        next.retained_chain = tip.chain;
        next.retained_offset = offset;
        next.retained_rank = rank;
        next.own_tail = false;
        // What is in the merge area is of the log before.
        next.merge_era = next.merge_era.map(|_| session);
        next.copy = copy;
        if next.ground == Ground::Brought {
            next.ground = Ground::Mixed;
        }
        self.superblock.dirty = true;
    }

    /// Whether a full copy may leave parts of the backing as they are.
    fn may_keep(&self) -> bool {
        let has_ground = self.superblock.desired.ground != Ground::Nothing;
        self.replica.shadow.is_some() || (has_ground && self.config.tree)
    }

    pub(super) fn seed_piece(&mut self, id: PeerId, piece: SeedPiece, out: &mut Actions) {
        let size = self.config.identity.size_bytes;
        let expected = match (&self.replica.seed, self.replica.rebase) {
            _ if self.replica.shadow.is_some() => piece.offset, // It knows.
            (Some(seed), _) if !seed.detached => seed.expected,
            (None, Some(_)) => 0,
            (Some(_) | None, _) => u64::MAX,
        };
        let fits = piece.offset == expected
            && piece.bytes > 0
            && piece.bytes.is_multiple_of(BLOCK_BYTES)
            && piece
                .offset
                .checked_add(piece.bytes)
                .is_some_and(|end| end <= size)
            && piece
                .data()
                .is_none_or(|data| data.len() as u64 == piece.bytes)
            // What is filled in place has nothing to keep, unless somebody brought it.
            && (piece.contents != Contents::Same || self.may_keep());
        if !fits {
            return self.reject(
                id,
                format!("a piece at byte {} out of order", piece.offset),
                out,
            );
        }
        if self.replica.shadow.is_some() {
            return self.shadow_piece(id, piece, out);
        }
        // Pieces may come before the log was made to start anew; they wait.
        let seed = self.replica.seed.get_or_insert_with(Seed::default);
        if seed.queued_cost > 2 * self.config.replica_window_bytes {
            return self.reject(id, "more pieces than it was granted".to_owned(), out);
        }
        seed.push(piece);
    }

    pub(super) fn seed_progress_replica(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        if self.replica.rebase.is_some()
            || self.superblock.persisted().session != self.journal.session
        {
            return;
        }
        let size = self.config.identity.size_bytes;
        let Some(seed) = self.replica.seed.as_mut() else {
            return;
        };
        if self.replica.seed_io.is_some() || seed.goes_back && self.superblock.is_busy() {
            return;
        }
        let passed = seed.pass_same();
        self.replica.kept_bytes += passed.bytes;
        if let Some(source) = self.replica.source.filter(|_| passed.grants) {
            out.peer(source, PeerMessage::Credit(passed.cost));
        }
        let complete = seed.written == size && seed.ended.is_some();
        let unflushed = seed.written - seed.flushed;
        // Nothing more comes for now: what is here need not come again.
        let left = seed.detached && seed.pieces.is_empty() && unflushed > 0;
        if complete && seed.flushed == size {
            self.finish_seed();
        } else if complete || left || unflushed >= self.config.seed_flush_bytes {
            let kind = SeedIoKind::Flush;
            self.replica.seed_io = Some(SeedIo { kind, stale: false });
            let io = Io::Fsync {
                disk: Disk::Backing,
            };
            let token = IoToken::SeedFsync;
            out.push(Action::Io { token, io });
        } else {
            self.write_piece(mem, out);
        }
    }

    /// All pieces are on the medium: what is missing is the epochs up to the end of the copy.
    fn finish_seed(&mut self) {
        let checkpoint = self.superblock.desired.checkpoint;
        let ended = self.replica.seed.take().and_then(|seed| seed.ended);
        if let CopyState::Seeding {
            from, until: None, ..
        } = self.superblock.desired.copy
            && let Some(until) = ended
        {
            let usable = until <= checkpoint || planted(Mutant::UsableTooEarly);
            self.superblock.desired.copy = if usable {
                CopyState::Usable
            } else {
                CopyState::Seeding {
                    cursor_bytes: self.config.identity.size_bytes,
                    from,
                    until: Some(until),
                }
            };
            self.superblock.dirty = true;
        }
    }

    /// Starts to write the next piece, if there is one and room for it.
    fn write_piece(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let Some(seed) = &mut self.replica.seed else {
            return;
        };
        let Some(piece) = seed.pieces.pop_front() else {
            return;
        };
        seed.goes_back = false;
        let (end, cost) = (piece.offset + piece.bytes, piece.cost());
        let (io, slots) = match piece.data() {
            None => {
                let io = Io::Zero {
                    offset: piece.offset,
                    bytes: piece.bytes,
                    trim: true,
                };
                (io, Vec::new())
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
                let io = Io::Write {
                    disk: Disk::Backing,
                    offset: piece.offset,
                    segs: first..out.segs.len(),
                    then_fsync: false,
                };
                (io, slots)
            }
        };
        seed.queued_cost -= cost;
        let kind = SeedIoKind::Write { end, slots, cost };
        self.replica.seed_io = Some(SeedIo { kind, stale: false });
        let token = IoToken::SeedWrite;
        out.push(Action::Io { token, io });
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
                if let Some(source) = self.replica.source.filter(|_| !seed.detached) {
                    out.peer(source, PeerMessage::Credit(cost));
                }
            }
        }
    }

    pub(super) fn seed_persisted(&mut self, out: &mut Actions) {
        if let CopyState::Seeding { cursor_bytes, .. } | CopyState::Shadowing { cursor_bytes, .. } =
            self.superblock.persisted().copy
            && let Some(source) = self.replica.source
            && (self.replica.seed.is_some() || self.replica.shadow.is_some())
        {
            out.peer(source, PeerMessage::SeedAck(cursor_bytes));
        }
    }

    /// How far a full copy is that this node receives, in bytes of the volume.
    #[must_use]
    pub fn seeding_cursor(&self) -> Option<u64> {
        let seed = self.replica.seed.as_ref().map(|seed| seed.written);
        seed.or_else(|| self.replica.shadow.as_ref().map(Shadow::cursor))
    }
}
