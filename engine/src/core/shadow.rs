//! A full copy for a replica that is usable, but behind the primary's log.
//!
//! Until the copy is complete the replica keeps what it has: backing and log stay as they are, can
//! be read, and can be promoted. Each piece is compared with what the backing holds there, unless
//! it says that comparing state trees has shown it to be the same (`resync`). What differs goes
//! into the *shadow*, a file beside the log; then so do the epochs that ran meanwhile, up to one at
//! which the copy is exact and which the primary has said to be durable. When all of that is
//! flushed, one superblock switches: the state at that epoch is the backing with the shadow written
//! over it, and the log begins anew there. `apply` then writes it over.
//!
//! An entry of the shadow is a frame as in the log, so that every byte of it is checked when it is
//! read; what ties it to its copy is where it lies, and the place where the copy began as the hash
//! before it (docs/LOG_FORMAT.md).
//!
//! **Invariants:**
//! - before the switch nothing depends on the shadow, so that an error there costs the attempt and
//!   nothing else;
//! - no sweep begins while pieces are compared with the backing;
//! - entries are written after the superblock that counts none, or only earlier ones, is durable.

use std::collections::VecDeque;

use hn4::log::{CopyState, FrameHead, Role};
use hn4::types::{BlockIndex, Epoch, LogOffset, Rank};

use super::event::{Actions, Contents, Now, PeerId, PeerMessage, SeedOrigin, SeedPiece, Time, Tip};
use super::fork::Saved;
use super::overlay::Mask;
use super::replica::Obstacle;
use super::seal::{Zeros, frame_blocks};
use super::volume::Volume;
use crate::arena::{SlotId, SlotMemory};

/// After an attempt that failed the next one waits this long, then twice as long, and so on.
const FIRST_PAUSE_MS: u64 = 10_000;
const LONGEST_PAUSE_MS: u64 = 3_600_000;

/// An operation for the shadow that is on its way.
#[derive(Debug)]
pub(super) struct ShadowIo {
    pub(super) kind: ShadowIoKind,
    /// It belongs to an attempt that was given up.
    pub(super) stale: bool,
}

#[derive(Debug)]
pub(super) enum ShadowIoKind {
    /// So many blocks of the backing are read, to be compared with the piece.
    Compare { slots: Vec<SlotId> },
    /// An entry is written.
    Write { slots: Vec<SlotId>, step: Step },
    /// The shadow is flushed up to here.
    Flush { at: Place },
}

/// What is done when an entry is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// So many bytes of the piece.
    Piece(u64),
    /// Blocks and zeroes of the epoch up to these.
    Epoch { blocks: usize, zeros: usize },
}

/// How far an attempt is: bytes of the volume, and of the shadow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Place {
    pub(super) volume: u64,
    pub(super) shadow: u64,
}

/// An epoch on its way into the shadow, in several entries if need be.
#[derive(Debug)]
pub(super) struct EpochWork {
    pub(super) frame: Vec<u8>,
    pub(super) head: FrameHead,
    pub(super) blocks: Vec<(BlockIndex, Mask)>,
    pub(super) zeros: Zeros,
    pub(super) next_block: usize,
    pub(super) next_zero: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Shadow {
    pub(super) origin: SeedOrigin,
    pub(super) pieces: VecDeque<SeedPiece>,
    /// What the pieces that wait cost of the credit.
    pub(super) queued_cost: u64,
    /// So much of the first piece is done.
    pub(super) piece_done: u64,
    /// Pieces from here on are expected.
    pub(super) expected: u64,
    pub(super) done: Place,
    pub(super) flushed: Place,
    pub(super) ended: Option<Epoch>,
    pub(super) epoch: Option<EpochWork>,
    /// The last epoch that was taken, where the next one starts in the log, and who sealed it.
    pub(super) taken: Tip,
    pub(super) offset: LogOffset,
    pub(super) rank: Option<Rank>,
    /// The opening of the primary that sends it.
    pub(super) opening: Rank,
    /// The copy is complete when this place is reached.
    pub(super) until: Option<Tip>,
    /// The session that brought it has ended.
    pub(super) detached: bool,
    /// What it replaces.
    pub(super) saved: Saved,
}

impl Shadow {
    fn new(origin: SeedOrigin, at: Place) -> Self {
        Self {
            origin,
            pieces: VecDeque::new(),
            queued_cost: 0,
            piece_done: 0,
            expected: at.volume,
            done: at,
            flushed: at,
            ended: None,
            epoch: None,
            taken: origin.from,
            offset: origin.log_offset,
            rank: None,
            opening: Rank::default(),
            until: None,
            detached: false,
            saved: Saved::No,
        }
    }

    fn push(&mut self, piece: SeedPiece) {
        self.expected = piece.offset + piece.bytes;
        self.queued_cost += piece.cost();
        self.pieces.push_back(piece);
    }

    /// Bytes of the volume that were compared.
    pub(super) fn cursor(&self) -> u64 {
        self.done.volume
    }

    /// All pieces are in it, and flushed.
    fn has_pieces(&self, size: u64) -> bool {
        self.flushed.volume == size && self.ended.is_some()
    }
}

/// Attempts that failed for want of space, or by an error.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pause {
    /// How long the last one was.
    ms: u64,
    /// It began with the next step.
    asked: bool,
    pub(super) until: Option<Time>,
}

impl Volume {
    /// The primary's log does not reach back to this copy, which is usable.
    pub(super) fn wants_shadow(&mut self, oldest: Epoch) {
        // A second refusal, while the superblock says that a copy begins, would be remembered: when
        // that one was complete another would begin, which nobody asks the primary for.
        let begins = self.superblock.desired.copy != CopyState::Usable;
        if begins || self.replica.pause.asked || self.replica.pause.until.is_some() {
            return;
        }
        if self.config.shadow_space_bytes > 0 {
            self.replica.wants_shadow = true;
        } else {
            self.replica.obstacle = Some(Obstacle::NeedsCopy { oldest });
        }
    }

    /// Begins an attempt when nothing is on its way to the backing.
    fn begin_shadow(&mut self) {
        let busy = self.sweep.is_some() || self.transition.is_some() || self.election.is_some();
        let usable = self.superblock.desired.copy == CopyState::Usable
            && self.superblock.persisted().copy == CopyState::Usable;
        if self.replica.wants_shadow && usable && !busy && self.replica.is_settled() {
            self.replica.wants_shadow = false;
            self.replica.obstacle = None;
            self.superblock.desired.copy = shadowing(Place::default(), Tip::default());
            self.superblock.dirty = true;
        }
    }

    /// The copy goes back to what it is without the shadow, which is always possible before the
    /// switch.
    pub(super) fn give_up_shadow(&mut self) {
        self.replica.wants_shadow = false;
        if let CopyState::Shadowing { .. } = self.superblock.desired.copy {
            self.replica.give_up_seed();
            self.superblock.desired.copy = CopyState::Usable;
            self.superblock.dirty = true;
        }
    }

    /// Gives up for now, and says why. The session ends, since the peer would go on sending.
    pub(super) fn pause_shadow(&mut self, why: String, out: &mut Actions) {
        self.give_up_shadow();
        self.replica.pending.clear();
        self.replica.obstacle = Some(Obstacle::NeedsSpace { why });
        self.replica.pause.asked = true;
        if let Some(source) = self.replica.source {
            self.close_session(source, out);
        }
    }

    fn pause_progress(&mut self, now: Now, out: &mut Actions) {
        let pause = &mut self.replica.pause;
        if std::mem::take(&mut pause.asked) {
            pause.ms = (pause.ms * 2).clamp(FIRST_PAUSE_MS, LONGEST_PAUSE_MS);
            pause.until = Some(now.time.plus_ms(pause.ms));
        } else if pause.until.is_some_and(|until| now.time >= until) {
            pause.until = None;
            // With the next session it is asked for again.
            self.close_sessions(out);
        }
    }

    /// A copy into the shadow follows.
    pub(super) fn shadow_start(&mut self, id: PeerId, origin: SeedOrigin, out: &mut Actions) {
        let persisted = self.superblock.persisted().copy;
        self.replica.follow(id);
        self.replica.joined = false;
        self.replica.pending.clear();
        self.replica.give_up_seed();
        let at = match persisted {
            _ if origin.cursor_bytes == 0 => Place::default(),
            CopyState::Shadowing {
                cursor_bytes,
                shadow_bytes,
                from,
                from_chain,
            } if (cursor_bytes, from, from_chain)
                == (origin.cursor_bytes, origin.from.epoch, origin.from.chain) =>
            {
                Place {
                    volume: cursor_bytes,
                    shadow: shadow_bytes,
                }
            }
            _ => return self.reject(id, "a copy from where ours is not".to_owned(), out),
        };
        let mut shadow = Shadow::new(origin, at);
        // Its session may have ended when it is switched in.
        shadow.opening = self.rank_of_source();
        shadow.rank = Some(shadow.opening);
        if at == Place::default() {
            self.replica.kept_bytes = 0;
        }
        self.replica.shadow = Some(shadow);
        self.replica.obstacle = None;
        self.superblock.desired.copy = shadowing(at, origin.from);
        self.superblock.dirty = true;
    }

    pub(super) fn shadow_piece(&mut self, id: PeerId, piece: SeedPiece, out: &mut Actions) {
        let most = 2 * self.config.replica_window_bytes;
        let shadow = self
            .replica
            .shadow
            .as_mut()
            .filter(|shadow| !shadow.detached);
        let why = match shadow {
            Some(shadow) if shadow.queued_cost > most => {
                "more pieces than it was granted".to_owned()
            }
            Some(shadow) if piece.offset == shadow.expected => return shadow.push(piece),
            _ => format!("a piece at byte {} out of order", piece.offset),
        };
        self.reject(id, why, out);
    }

    /// No more pieces come. Returns whether that is so.
    pub(super) fn shadow_ended(&mut self, usable_after: Epoch) -> bool {
        let size = self.config.identity.size_bytes;
        let shadow = self.replica.shadow.as_mut();
        let shadow = shadow.filter(|shadow| shadow.expected == size && !shadow.detached);
        shadow.is_some_and(|shadow| {
            shadow.ended = Some(usable_after);
            true
        })
    }

    pub(super) fn shadow_progress(
        &mut self,
        now: Now,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        self.pause_progress(now, out);
        self.begin_shadow();
        if self.replica.shadow_io.is_some() || !self.shadow_may_be_written() {
            return;
        }
        self.keep_same(out);
        let Some(shadow) = self.replica.shadow.as_ref() else {
            return;
        };
        let size = self.config.identity.size_bytes;
        let unflushed = shadow.done.volume - shadow.flushed.volume;
        let idle = shadow.pieces.is_empty() && (shadow.detached || shadow.done.volume == size);
        if unflushed >= self.config.seed_flush_bytes || (idle && unflushed > 0) {
            self.flush_shadow(out);
        } else if !shadow.pieces.is_empty() {
            self.compare(mem, out);
        } else if shadow.has_pieces(size) {
            self.shadow_epochs(mem, out);
        }
    }

    /// Passes over what the backing has already.
    fn keep_same(&mut self, out: &mut Actions) {
        let Some(shadow) = &mut self.replica.shadow else {
            return;
        };
        while let Some(piece) = shadow.pieces.front()
            && piece.contents == Contents::Same
        {
            let cost = piece.cost();
            shadow.queued_cost -= cost;
            shadow.done.volume += piece.bytes;
            self.replica.kept_bytes += piece.bytes;
            shadow.pieces.pop_front();
            if let Some(source) = self.replica.source.filter(|_| !shadow.detached) {
                out.peer(source, PeerMessage::Credit(cost));
            }
        }
    }

    /// The superblock counts no entry that would be written over, also when the one that is on its
    /// way arrives: after a new session that may be further than where the copy goes on.
    fn shadow_may_be_written(&self) -> bool {
        let Some(shadow) = &self.replica.shadow else {
            return false;
        };
        let (origin, flushed) = (shadow.origin.from, shadow.flushed);
        self.superblock.possible().all(|says| {
            let CopyState::Shadowing {
                cursor_bytes,
                shadow_bytes,
                from,
                from_chain,
            } = says.copy
            else {
                return false;
            };
            (from, from_chain) == (origin.epoch, origin.chain)
                && cursor_bytes <= flushed.volume
                && shadow_bytes <= flushed.shadow
        })
    }

    /// All pieces are here: takes epochs until the copy is exact at one that the primary has said
    /// to be durable, then switches.
    fn shadow_epochs(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        loop {
            let shadow = self.replica.shadow.as_mut();
            if let Some(work) = shadow.and_then(|shadow| shadow.epoch.as_ref()) {
                if work.next_block < work.blocks.len() || work.next_zero < work.zeros.len() {
                    return self.write_part(mem, out);
                }
                self.epoch_taken(out);
            }
            match self.shadow_target() {
                Target::Reached if self.shadow_is_flushed() => return self.switch(mem, out),
                Target::Reached => return self.flush_shadow(out),
                Target::Unknown => return,
                Target::Ahead if self.next_epoch(out) => {}
                Target::Ahead => return,
            }
        }
    }

    /// All of an epoch is in the shadow.
    fn epoch_taken(&mut self, out: &mut Actions) {
        let Some(shadow) = &mut self.replica.shadow else {
            return;
        };
        let Some(work) = shadow.epoch.take() else {
            return;
        };
        let header = work.head.header;
        shadow.taken = Tip {
            epoch: header.epoch,
            chain: work.head.chain,
        };
        shadow.offset = header.end();
        shadow.rank = Some(header.rank());
        if let Some(source) = self.replica.source {
            out.peer(source, PeerMessage::Credit(work.frame.len() as u64));
        }
    }

    fn shadow_is_flushed(&self) -> bool {
        let shadow = self.replica.shadow.as_ref();
        shadow.is_some_and(|shadow| shadow.done == shadow.flushed)
    }

    /// Where the copy will be exact, and anchored.
    fn shadow_target(&mut self) -> Target {
        // What an earlier session announced may be another history's, and further than this one's.
        let hint = self.replica.hint.filter(|_| self.replica.hinted);
        let Some(shadow) = &mut self.replica.shadow else {
            return Target::Unknown;
        };
        let Some(exact) = shadow.ended else {
            return Target::Unknown;
        };
        if shadow.taken.epoch < exact {
            return Target::Ahead;
        }
        if shadow.taken == shadow.origin.from {
            // It was in the primary's backing.
            return Target::Reached;
        }
        // The first that is heard of counts: a primary that goes on writing would be followed for
        // ever.
        if shadow.until.is_none() {
            shadow.until = hint.filter(|hint| hint.epoch >= shadow.taken.epoch);
        }
        match shadow.until {
            Some(until) if until.epoch > shadow.taken.epoch => Target::Ahead,
            Some(until) if until == shadow.taken => Target::Reached,
            Some(_) => {
                // Of an earlier session, whose history was another.
                self.replica.hint = None;
                shadow.until = None;
                Target::Unknown
            }
            None => Target::Unknown,
        }
    }

    /// Checks the next frame as the log does. Returns whether there is one to be written.
    fn next_epoch(&mut self, out: &mut Actions) -> bool {
        let term = self.superblock.persisted().term;
        let (Some(source), Some(shadow)) = (self.replica.source, &mut self.replica.shadow) else {
            return false;
        };
        let why = loop {
            let Some(frame) = self.replica.pending.pop_front() else {
                return false;
            };
            let head = match FrameHead::decode_frame(&self.config.identity, &frame) {
                Ok(head) => head,
                Err(error) => break error.to_string(),
            };
            let header = head.header;
            if header.epoch <= shadow.taken.epoch {
                continue; // Delivery is at least once.
            }
            let continues = header.epoch == shadow.taken.epoch.next()
                && header.previous == shadow.taken.chain
                && header.offset == shadow.offset
                && header.term.counter <= term.counter;
            if !continues {
                break format!("epoch {} does not continue the copy", header.epoch);
            }
            let (blocks, zeros) = frame_blocks(&head);
            shadow.epoch = Some(EpochWork {
                frame,
                head,
                blocks,
                zeros,
                next_block: 0,
                next_zero: 0,
            });
            return true;
        };
        self.reject(source, why, out);
        false
    }

    /// The one record: from now on the state is what backing and shadow make together, and the log
    /// goes on from there.
    fn switch(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        if self.journal.is_writing() || self.superblock.is_busy() || self.sweep.is_some() {
            return;
        }
        if !self.fork_is_safe(out) {
            return;
        }
        let rank = self.rank_of_source();
        let Some(shadow) = self.replica.shadow.take() else {
            return;
        };
        // Who wrote here while this node was primary must not be told that it is safe.
        self.discarded |= self.has_own_tail() && self.wrote > Epoch(0);
        let base = (shadow.taken, shadow.offset, shadow.rank.unwrap_or(rank));
        let copy = CopyState::Applying {
            shadow_bytes: shadow.done.shadow,
            from: shadow.origin.from.epoch,
            from_chain: shadow.origin.from.chain,
        };
        self.replica.pause = Pause::default();
        self.rebase_log(base, copy, mem, out);
        // What the source sends continues what is switched in.
        self.replica.joined = !shadow.detached;
        if std::mem::take(&mut self.prover.parted) {
            // With the next session it follows the primary again.
            self.close_sessions(out);
        }
    }

    /// How long this copy waits until it tries to take another one.
    pub(super) fn shadow_deadline(&self) -> Option<Time> {
        let waits = self.role() == Role::Replica;
        self.replica.pause.until.filter(|_| waits)
    }
}

/// See [`Volume::shadow_target`].
enum Target {
    /// More epochs are needed.
    Ahead,
    /// The primary has not said yet that it is durable.
    Unknown,
    Reached,
}

pub(super) fn shadowing(at: Place, from: Tip) -> CopyState {
    CopyState::Shadowing {
        cursor_bytes: at.volume,
        shadow_bytes: at.shadow,
        from: from.epoch,
        from_chain: from.chain,
    }
}
