//! The first full copy, at the replica: the backing is filled in place, piece by piece.
//!
//! The copy is not usable until the epochs that ran meanwhile have been replayed over it. Progress
//! is recorded after a flush, so a copy goes on where it was, whichever side was restarted. If the
//! session ends, what has arrived is still written and recorded. Several pieces are written at the
//! same time; a flush waits for all of them. If the copy is given up meanwhile, their completions
//! are recognised as stale.
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

/// What is on its way to the backing for a full copy. It may outlive the copy it belongs to: then
/// nothing else is written until it is done, since the device could reorder them.
#[derive(Debug, Default)]
pub(super) struct SeedIos {
    /// Pieces in the order of the volume, from the first on that is not written yet.
    pieces: VecDeque<Underway>,
    /// Number of the first of them.
    first: u64,
    flushing: bool,
    /// All of it belongs to a copy that was given up.
    stale: bool,
}

/// A piece that is being written, or was written before one that is ahead of it.
#[derive(Debug)]
struct Underway {
    /// Its end on the volume.
    end: u64,
    slots: Vec<SlotId>,
    /// What it cost of the credit.
    cost: u64,
    written: bool,
}

impl SeedIos {
    pub(super) fn is_idle(&self) -> bool {
        self.pieces.is_empty() && !self.flushing
    }

    /// The copy it belongs to is given up.
    pub(super) fn give_up(&mut self) {
        self.stale = !self.is_idle();
    }

    /// Adds a piece, and gives it a number.
    fn add(&mut self, piece: Underway) -> u64 {
        self.pieces.push_back(piece);
        self.first + self.pieces.len() as u64 - 1
    }

    /// A piece is written: takes what it held.
    fn written(&mut self, number: u64) -> (Vec<SlotId>, u64) {
        let at = number.checked_sub(self.first);
        let piece = at.and_then(|at| self.pieces.get_mut(usize::try_from(at).ok()?));
        let piece = piece.expect("completions come from operations on their way");
        piece.written = true;
        (std::mem::take(&mut piece.slots), piece.cost)
    }

    /// Lets go of the pieces before the first that is not written; gives the end of the last one.
    fn advance(&mut self) -> Option<u64> {
        let mut end = None;
        while let Some(piece) = self.pieces.front()
            && piece.written
        {
            end = Some(piece.end);
            self.first += 1;
            self.pieces.pop_front();
        }
        end
    }
}

#[derive(Debug, Default)]
pub(super) struct Seed {
    pub(super) pieces: VecDeque<SeedPiece>,
    /// Everything below was written.
    pub(super) written: u64,
    /// Everything below was written, or is being written.
    begun: u64,
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
                begun: at,
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

    /// Whether a piece may say that the backing has what belongs there.
    fn takes_same(&self) -> bool {
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
            && (piece.contents != Contents::Same || self.takes_same());
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
        if self.replica.seed.is_none() || self.replica.seed_ios.stale {
            return;
        }
        while self.begin_piece(mem, out) {}
        let Some(seed) = self.replica.seed.as_ref() else {
            return;
        };
        let ios = &self.replica.seed_ios;
        let waits = if planted(Mutant::CopyFlushesEarly) {
            ios.flushing
        } else {
            !ios.is_idle()
        };
        if waits {
            return;
        }
        let size = self.config.identity.size_bytes;
        let complete = seed.written == size && seed.ended.is_some();
        let unflushed = seed.written - seed.flushed;
        // Nothing more comes for now: what is here need not come again.
        let left = seed.detached && seed.pieces.is_empty() && unflushed > 0;
        if complete && seed.flushed == size {
            self.finish_seed();
        } else if complete || left || unflushed >= self.config.seed_flush_bytes {
            self.replica.seed_ios.flushing = true;
            let io = Io::Fsync {
                disk: Disk::Backing,
            };
            let token = IoToken::SeedFsync;
            out.push(Action::Io { token, io });
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

    /// Starts to write the next piece, or passes over it. Whether there was one, and room for it.
    fn begin_piece(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) -> bool {
        let ios = &mut self.replica.seed_ios;
        let Some(seed) = &mut self.replica.seed else {
            return false;
        };
        let is_due = seed.begun - seed.flushed >= self.config.seed_flush_bytes;
        let is_full = ios.pieces.len() >= self.config.seed_depth;
        if ios.flushing || is_due || is_full || seed.goes_back && self.superblock.is_busy() {
            return false;
        }
        let Some(piece) = seed.pieces.front() else {
            return false;
        };
        let (end, cost) = (piece.offset + piece.bytes, piece.cost());
        let mut underway = Underway {
            end,
            slots: Vec::new(),
            cost,
            written: false,
        };
        let io = match &piece.contents {
            // The backing has it already.
            Contents::Same => None,
            Contents::Zeroes => Some(Io::Zero {
                offset: piece.offset,
                bytes: piece.bytes,
                trim: true,
            }),
            Contents::Data(data) => {
                let Some(slots) = bytes_to_slots(mem, data) else {
                    return false;
                };
                let first = out.segs.len();
                let bytes = u16::try_from(SLOT_BYTES).expect("4096");
                out.segs.extend(slots.iter().map(|&slot| Seg {
                    slot,
                    offset: 0,
                    bytes,
                }));
                underway.slots = slots;
                Some(Io::Write {
                    disk: Disk::Backing,
                    offset: piece.offset,
                    segs: first..out.segs.len(),
                    then_fsync: false,
                })
            }
        };
        if io.is_none() {
            self.replica.kept_bytes += piece.bytes;
        }
        seed.pieces.pop_front();
        seed.goes_back = false;
        seed.queued_cost -= cost;
        seed.begun = end;
        let number = ios.add(underway);
        match io {
            Some(io) => {
                let token = IoToken::SeedWrite(number);
                out.push(Action::Io { token, io });
            }
            None => self.piece_written(number, mem, out),
        }
        true
    }

    /// A piece is in the backing.
    pub(super) fn piece_written(
        &mut self,
        number: u64,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        let ios = &mut self.replica.seed_ios;
        let (slots, cost) = ios.written(number);
        let end = ios.advance();
        let stale = ios.stale;
        ios.stale &= !ios.is_idle();
        free_all(mem, &slots);
        let Some(seed) = self.replica.seed.as_mut().filter(|_| !stale) else {
            return;
        };
        seed.written = end.unwrap_or(seed.written);
        if let Some(source) = self.replica.source.filter(|_| !seed.detached) {
            out.peer(source, PeerMessage::Credit(cost));
        }
    }

    /// What was written of a copy is durable.
    pub(super) fn pieces_flushed(&mut self) {
        let ios = &mut self.replica.seed_ios;
        ios.flushing = false;
        let stale = std::mem::take(&mut ios.stale);
        let Some(seed) = self.replica.seed.as_mut().filter(|_| !stale) else {
            return;
        };
        seed.flushed = seed.written;
        if let CopyState::Seeding { cursor_bytes, .. } = &mut self.superblock.desired.copy {
            *cursor_bytes = seed.flushed;
            self.superblock.dirty = true;
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
