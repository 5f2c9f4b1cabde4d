//! A replica's side: epochs that a primary sends, and the first full copy.
//!
//! Everything from a peer is a proposal (P6): a frame is taken into the log only if it is valid as
//! a whole and continues our chain at our offset in a term that we obey. It is destaged only when
//! the primary has said that it is anchored. An unanchored tail can be dropped again without
//! touching the backing.

use std::collections::VecDeque;

use hn4::log::{CopyState, FrameHead, Role};
use hn4::types::{BLOCK_BYTES, Epoch, LogOffset};

use super::apply::Apply;
use super::event::{
    Actions, Now, PeerEvent, PeerId, PeerMessage, PeerState, Progress, SeedOrigin, Tip,
};
use super::journal::Sealed;
use super::mutants::{Mutant, planted};
use super::seal::{bytes_to_slots, frame_changes};
use super::seed::{Seed, SeedIos};
use super::shadow::{Pause, Shadow, ShadowIo};
use super::volume::{Volume, free_all};
use crate::arena::SlotMemory;

/// What stands between this replica and catching up, for status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// The primary's log does not reach back to our tip: a new full copy is needed.
    NeedsCopy {
        /// The oldest epoch the primary can send.
        oldest: Epoch,
    },
    /// What only this copy has cannot be saved, so it is kept and nothing is done.
    NeedsSpace {
        /// Why not.
        why: String,
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

/// See the module.
#[derive(Debug, Default)]
pub(super) struct ReplicaState {
    pub(super) source: Option<PeerId>,
    pub(super) pending: VecDeque<Vec<u8>>,
    /// The newest anchor heard of; may be ahead of our tip.
    pub(super) hint: Option<Tip>,
    /// The hint is of the session with the source.
    pub(super) hinted: bool,
    /// The source has said in this session that our log is the beginning of its own.
    pub(super) joined: bool,
    pub(super) last_ack: Option<Progress>,
    pub(super) truncate_to: Option<Tip>,
    /// The log is to be cut back to here once the rest is saved.
    pub(super) fork: Option<(PeerId, Tip)>,
    pub(super) rebase: Option<SeedOrigin>,
    pub(super) seed: Option<Seed>,
    pub(super) seed_ios: SeedIos,
    /// A copy into the shadow is to begin.
    pub(super) wants_shadow: bool,
    /// The primary's log does not reach back to what is being written over the backing.
    pub(super) behind: Option<Epoch>,
    pub(super) shadow: Option<Shadow>,
    pub(super) shadow_io: Option<ShadowIo>,
    pub(super) pause: Pause,
    /// Bytes that the last copy into the shadow has kept, without being sent anything of them.
    pub(super) kept_bytes: u64,
    /// The shadow is being written over the backing.
    pub(super) apply: Option<Apply>,
    /// What keeps us from catching up, if anything.
    pub obstacle: Option<Obstacle>,
}

impl ReplicaState {
    /// Nothing is on its way into the log by other means than writes that are counted there.
    pub(super) fn is_settled(&self) -> bool {
        self.pending.is_empty()
            && self.truncate_to.is_none()
            && self.fork.is_none()
            && self.rebase.is_none()
            && self.seed.is_none()
            && self.seed_ios.is_idle()
            && self.shadow.is_none()
            && self.shadow_io.is_none()
            && self.apply.is_none()
    }
}

impl ReplicaState {
    /// This peer sends us its log or a copy. What another one has said of its log says nothing of
    /// this one's.
    pub(super) fn follow(&mut self, source: PeerId) {
        if self.source.replace(source) != Some(source) {
            (self.hinted, self.joined) = (false, false);
        }
    }

    pub(super) fn give_up_seed(&mut self) {
        self.seed = None;
        self.rebase = None;
        self.seed_ios.give_up();
        self.shadow = None;
        if let Some(io) = &mut self.shadow_io {
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
        let known = self.peers.get(usize::from(id.0));
        if known.is_none_or(|peer| peer.absent) {
            return;
        }
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
            PeerEvent::State(state) => {
                self.peer_state(id, state);
                self.check_end_of_copy(state, out);
            }
            PeerEvent::Disconnected => self.peer_gone(id),
            PeerEvent::HigherTerm(term) => self.higher_term(term, out),
            // What is promoted is what was settled; the session is about to end.
            _ if self.role() == Role::Replica && self.transition.is_some() => {}
            // What others may ask of a replica too.
            PeerEvent::Subscribe { .. }
            | PeerEvent::Credit(_)
            | PeerEvent::Ack(_)
            | PeerEvent::SeedRequest { .. }
            | PeerEvent::FeedReadDone { .. } => self.feed_event(id, event, out),
            event if self.role() == Role::Replica => self.replica_event(id, event, out),
            event => self.feed_event(id, event, out),
        }
    }

    pub(super) fn peer_gone(&mut self, id: PeerId) {
        self.peer_connected(id, false);
        if self.replica.source == Some(id) {
            self.lose_source();
            self.pull_again();
        }
    }

    fn lose_source(&mut self) {
        let replica = &mut self.replica;
        replica.source = None;
        (replica.hinted, replica.joined) = (false, false);
        replica.pending.clear();
        replica.last_ack = None;
        match &mut replica.seed {
            Some(seed) if replica.rebase.is_none() => seed.detached = true,
            Some(_) => replica.give_up_seed(),
            None if replica.rebase.is_some() => replica.give_up_seed(),
            None => {}
        }
        if let Some(shadow) = &mut replica.shadow {
            shadow.detached = true;
        }
    }

    /// A higher term than the peer's is on its way to the medium: nothing that the peer still sends
    /// is of the history that we are about to follow. A copy that began now would count as one of
    /// the new term.
    pub(super) fn is_superseded(&self, id: PeerId) -> bool {
        let state = self
            .peers
            .get(usize::from(id.0))
            .and_then(|peer| peer.state());
        let ours = self.superblock.desired.term.counter;
        state.is_some_and(|state| state.term.counter < ours)
    }

    fn replica_event(&mut self, id: PeerId, event: PeerEvent, out: &mut Actions) {
        let peer = self.peers.get(usize::from(id.0));
        if peer.is_some_and(|peer| peer.closing) {
            return;
        }
        if self.is_superseded(id) {
            return self.close_session(id, out);
        }
        match event {
            PeerEvent::FeedOpened(from) => {
                self.replica.follow(id);
                self.replica.joined = from == self.tip().epoch.next();
                if self.replica.joined {
                    // What an earlier session said does not hold for this one.
                    self.replica.obstacle = None;
                    self.replica.wants_shadow = false;
                }
            }
            PeerEvent::Epoch(frame) => {
                self.replica.follow(id);
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
                self.replica.follow(id);
                self.replica.hinted = true;
                // The latest counts, not the highest: after a failover the new history may be
                // shorter than what the old primary announced.
                self.replica.hint = Some(tip);
            }
            PeerEvent::Truncate(_) | PeerEvent::Diverged(_) | PeerEvent::TooOld { .. }
                if self.pull_refused(id, &event) => {}
            PeerEvent::Truncate(tip) => {
                if self.may_cut_back(tip) {
                    self.replica.pending.clear();
                    if self.has_own_tail() {
                        self.save_fork(id, tip, out);
                    } else {
                        self.replica.truncate_to = Some(tip);
                    }
                } else {
                    self.diverged(tip.epoch);
                }
            }
            PeerEvent::Diverged(epoch) => self.diverged(epoch),
            PeerEvent::TooOld { oldest } => self.too_old(oldest, out),
            PeerEvent::SeedStart(origin) => self.seed_start(id, origin, out),
            PeerEvent::SeedPiece(piece) => self.seed_piece(id, piece, out),
            PeerEvent::SeedEnd { usable_after } => {
                if self.shadow_ended(usable_after) {
                    return;
                }
                let complete = self.config.identity.size_bytes;
                match &mut self.replica.seed {
                    Some(seed) if seed.expected == complete && !seed.detached => {
                        seed.ended = Some(usable_after);
                        self.replica.joined = true;
                    }
                    _ => self.reject(id, "the end of a copy that is not complete".to_owned(), out),
                }
            }
            _ => {}
        }
    }

    pub(super) fn reject(&mut self, id: PeerId, why: String, out: &mut Actions) {
        self.replica.obstacle = Some(Obstacle::Rejected { why });
        self.replica.pending.clear();
        self.close_session(id, out);
    }

    /// Our anchored history is not the primary's. A primary that was replaced saves its own and
    /// takes the other one; of other copies someone has to say which history counts.
    fn diverged(&mut self, epoch: Epoch) {
        // Who wrote here while this node was primary must not be told that it is safe, also if
        // another primary had it and was left behind since.
        self.discarded |= self.wrote > Epoch(0);
        let usable = self.superblock.persisted().copy == CopyState::Usable;
        if usable && self.has_own_tail() && self.config.shadow_space_bytes > 0 {
            self.wants_shadow(epoch);
        } else {
            self.replica.obstacle = Some(Obstacle::Diverged { epoch });
        }
    }

    /// A copy waits for an epoch that its primary does not have any more: damage took the end of
    /// that one's log. Perhaps nobody ever writes it again, so the copy begins anew; it is not
    /// usable, and nothing is lost.
    fn check_end_of_copy(&mut self, state: PeerState, out: &mut Actions) {
        let CopyState::Seeding {
            until: Some(until), ..
        } = self.superblock.desired.copy
        else {
            return;
        };
        let leads = state.role == Role::Primary && state.term == self.superblock.persisted().term;
        if self.role() == Role::Replica && leads && state.tip.epoch < until {
            self.start_over(out);
        }
    }

    /// A copy that is not usable yet loses nothing by starting again; a usable one keeps what it
    /// has until the new copy is complete.
    fn too_old(&mut self, oldest: Epoch, out: &mut Actions) {
        match self.superblock.persisted().copy {
            CopyState::Usable => self.wants_shadow(oldest),
            CopyState::Fresh | CopyState::Seeding { .. } => self.start_over(out),
            // It asks for pieces by itself.
            CopyState::Shadowing { .. } => {}
            CopyState::Applying { .. } => self.replica.behind = Some(oldest),
        }
    }

    pub(super) fn replica_progress(
        &mut self,
        now: Now,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        if self.role() != Role::Replica || self.failed.is_some() {
            return;
        }
        self.truncate_progress(mem, out);
        self.rebase_progress(mem, out);
        self.append_pending(mem, out);
        self.advance_anchor();
        self.own_tail_progress();
        self.seed_progress_replica(mem, out);
        self.shadow_progress(now, mem, out);
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
            || self.replica.shadow.is_some()
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
        let tip = self.tip();
        let Some(hint) = self.replica.hint else {
            return;
        };
        if hint.epoch <= self.anchored.epoch {
            return;
        }
        if self.journal.chain(hint.epoch) == Some(hint.chain) {
            self.anchored = hint;
        } else if hint.epoch > tip.epoch && self.is_part_of_source() {
            // Without this a replica that is far behind and has little room would wait for a place
            // that it cannot reach before it has destaged what it has.
            self.anchored = tip;
        }
    }

    /// The source is the primary of the term that we obey.
    pub(super) fn source_leads(&self) -> bool {
        let source = self.replica.source;
        let peer = source.and_then(|id| self.peers.get(usize::from(id.0)));
        let state = peer.and_then(|peer| peer.state());
        state.is_some_and(|state| {
            state.role == Role::Primary && state.term == self.superblock.persisted().term
        })
    }

    /// Our log is the beginning of that of the primary which sends it, whose last word on what is
    /// anchored is of this session. A primary's log only grows.
    fn is_part_of_source(&self) -> bool {
        let replica = &self.replica;
        let kept = matches!(
            self.superblock.desired.copy,
            CopyState::Usable | CopyState::Seeding { until: Some(_), .. }
        );
        let changes = replica.truncate_to.is_some()
            || replica.fork.is_some()
            || replica.rebase.is_some()
            || replica.seed.is_some()
            || replica.shadow.is_some();
        replica.joined && replica.hinted && self.source_leads() && kept && !changes
    }

    fn truncate_progress(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let Some(to) = self.replica.truncate_to else {
            return;
        };
        if self.journal.is_writing() || self.superblock.is_busy() {
            return;
        }
        self.replica.truncate_to = None;
        self.replica.joined = false;
        self.pull_again();
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
        // Who wrote here while this node was primary must not be told that it is safe.
        self.discarded |= self.wrote > to.epoch;
        self.cut_prover(to, mem, out);
        // Frames of the dropped tail must prove nothing after a crash.
        self.superblock.dirty = true;
    }

    fn send_ack(&mut self, out: &mut Actions) {
        let Some(source) = self.replica.source else {
            return;
        };
        let progress = self.copy_status().progress;
        // A copy that is not usable is worth nothing to whoever counts copies; its progress may
        // even be of another history.
        let copy = self.superblock.persisted().copy;
        let exact = matches!(copy, CopyState::Usable | CopyState::Applying { .. });
        let settled = self.superblock.persisted().session == self.journal.session;
        // Nor is what it has of its own, when it is promoted while it is being sent a copy.
        let follows = settled && self.replica.joined;
        let usable = (exact && follows) || planted(Mutant::AckUnusableCopy);
        if usable && self.replica.last_ack != Some(progress) {
            self.replica.last_ack = Some(progress);
            out.peer(source, PeerMessage::Ack(progress));
        }
    }

    /// Where the log would have to continue.
    #[must_use]
    pub fn log_tail(&self) -> LogOffset {
        self.journal.tail()
    }
}
