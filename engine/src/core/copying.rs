//! A full copy for a peer, at the primary: the backing is sent piece by piece.
//!
//! The pieces need not be of one epoch: every sector that changed after the copy began is in an
//! epoch after `from`, and those are replayed over the pieces. Where state trees were compared
//! first (`resync`), what is the same on both sides is left out.
//!
//! Several parts are read at the same time, so that a disk that takes long for each does not bound
//! the copy; they are sent in order. How far a part goes is known when it was begun: a hole is
//! passed over as a whole.
//!
//! **Invariant:** parts that are under way cost no more than the peer's credit, but for the last
//! one.

use hn4::log::Role;
use hn4::types::{BLOCK_BYTES, Epoch};

use super::event::{Action, Actions, PeerId, PeerMessage, Progress, SeedOrigin, SeedSent, Tip};
use super::feed::{Feed, peer_id};
use super::mutants::{Mutant, planted};
use super::volume::Volume;

/// A full copy that is being sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Copying {
    /// Where in the history it began.
    pub(super) from: Epoch,
    /// Everything before was asked for.
    pub(super) cursor: u64,
    /// A part was asked for and is not known to have begun.
    asking: bool,
    /// Parts that have begun and are not on their way to the peer yet.
    parts: usize,
    /// What they may cost of its credit.
    reserved: u64,
}

impl Copying {
    fn new(from: Epoch, cursor: u64) -> Self {
        Self {
            from,
            cursor,
            asking: false,
            parts: 0,
            reserved: 0,
        }
    }

    /// Nothing is under way.
    pub(super) fn is_quiet(&self) -> bool {
        !self.asking && self.parts == 0
    }

    fn begun(&mut self, bytes: u64, most: u64) {
        self.cursor = self.cursor.saturating_add(bytes);
        self.parts += 1;
        self.reserved += bytes.min(most);
    }

    /// Whether there was one.
    fn ended(&mut self, bytes: u64, most: u64) -> bool {
        let had = self.parts > 0;
        self.parts = self.parts.saturating_sub(1);
        self.reserved = self.reserved.saturating_sub(bytes.min(most));
        had
    }
}

impl Volume {
    /// A copy that was begun goes on, also if this node has been restarted since: if the place
    /// where it began is in our history and in our backing, the log still reaches back to it, and
    /// (which the replica sees to) it was begun in this term. Another primary's backing may hold
    /// what our history lacks. Where nothing of it is durable yet, there is nothing to go on with
    /// but what is known to differ.
    fn resumes(&self, cursor_bytes: u64, from: Tip, is_known: bool) -> bool {
        let size = self.config.identity.size_bytes;
        let begun = u64::from(!is_known);
        (begun..=size).contains(&cursor_bytes)
            && cursor_bytes.is_multiple_of(BLOCK_BYTES)
            && (planted(Mutant::ResumeCopyAnywhere)
                || ((self.feed_floor()..=self.superblock.desired.checkpoint).contains(&from.epoch)
                    && self.journal.chain(from.epoch) == Some(from.chain)))
    }

    pub(super) fn seed_request(
        &mut self,
        id: PeerId,
        cursor_bytes: u64,
        asked: Tip,
        out: &mut Actions,
    ) {
        if self.role() != Role::Primary {
            return;
        }
        let peer = &mut self.peers[usize::from(id.0)];
        // It may have lost its tree since.
        let takes_same = peer.state().is_some_and(|state| state.resyncs);
        let known = peer.resync.take();
        let known = known.filter(|known| known.at == asked && takes_same);
        // A copy that is filled in place cannot be compared again once it was begun.
        let is_filled = peer.state().is_some_and(|state| state.is_filled);
        if self.resumes(cursor_bytes, asked, is_filled && known.is_some()) {
            self.peers[usize::from(id.0)].resync = known;
            self.begin_copy(id, cursor_bytes, asked.epoch, out);
        } else if self.may_compare(id) {
            self.begin_to_compare(id);
        } else {
            self.copy_everything(id, out);
        }
    }

    /// A copy from here on, of which nothing is left out.
    pub(super) fn copy_everything(&mut self, id: PeerId, out: &mut Actions) {
        let peer = &mut self.peers[usize::from(id.0)];
        (peer.resync, peer.kept_bytes) = (None, None);
        // Flushed, even if the superblock that says so is still on its way.
        self.begin_copy(id, 0, self.superblock.desired.checkpoint, out);
    }

    /// A copy that begins at this place of the history, with the byte at `cursor`.
    pub(super) fn begin_copy(&mut self, id: PeerId, cursor: u64, from: Epoch, out: &mut Actions) {
        if from < self.feed_floor() {
            // The epochs after it cannot be sent; they will be in the backing before long.
            return out.peer(id, PeerMessage::Close);
        }
        let Some(chain) = self.journal.chain(from) else {
            return;
        };
        let log_offset = self.journal.info(from.next()).map(|info| info.offset);
        let log_offset = log_offset.unwrap_or(self.journal.tail());
        let peer = &mut self.peers[usize::from(id.0)];
        peer.set_hold(from);
        peer.progress = Progress::default();
        peer.lag.has = from;
        peer.feed = Feed::Seeding(Copying::new(from, cursor));
        let from = Tip { epoch: from, chain };
        let origin = SeedOrigin {
            from,
            log_offset,
            cursor_bytes: cursor,
        };
        out.peer(id, PeerMessage::SeedStart(origin));
    }

    fn copying_to(&mut self, id: PeerId) -> Option<&mut Copying> {
        match &mut self.peers[usize::from(id.0)].feed {
            Feed::Seeding(copying) => Some(copying),
            Feed::None | Feed::Comparing { .. } | Feed::Live { .. } => None,
        }
    }

    /// The part that was asked for is so long.
    pub(super) fn part_begun(&mut self, id: PeerId, bytes: u64) {
        let most = self.config.seed_piece_bytes;
        if let Some(copying) = self.copying_to(id)
            && copying.asking
        {
            copying.asking = false;
            copying.begun(bytes, most);
        }
    }

    /// The oldest part is on its way, or could not be read.
    pub(super) fn part_sent(&mut self, id: PeerId, sent: Option<SeedSent>, out: &mut Actions) {
        let most = self.config.seed_piece_bytes;
        let Some(copying) = self.copying_to(id) else {
            return;
        };
        match sent {
            Some(SeedSent { bytes, cost }) => {
                if copying.ended(bytes, most) {
                    self.peers[usize::from(id.0)].spend(cost);
                }
            }
            None => {
                self.peers[usize::from(id.0)].feed = Feed::None;
                out.peer(id, PeerMessage::Close);
            }
        }
    }

    /// Asks for the next part, if there is one and room for it, or ends the copy.
    pub(super) fn copy_progress(&mut self, index: usize, copying: Copying, out: &mut Actions) {
        let size = self.config.identity.size_bytes;
        let Copying { from, cursor, .. } = copying;
        if cursor >= size {
            if copying.is_quiet() {
                self.end_copy(index, from, out);
            }
            return;
        }
        let reserved = i64::try_from(copying.reserved).unwrap_or(i64::MAX);
        let has_room =
            copying.parts < self.config.seed_depth && self.peers[index].credit > reserved;
        if copying.asking || !has_room {
            return;
        }
        let (is_same, wanted) = self.peers[index].part_of_copy(cursor, size);
        let most = self.config.seed_piece_bytes;
        let bytes = most.min(wanted);
        if !is_same && self.holds_up_copy(from, cursor, bytes) {
            return;
        }
        let (peer, offset) = (peer_id(index), cursor);
        let mut next = copying;
        if is_same {
            next.begun(wanted, most);
            out.push(Action::SeedSame {
                peer,
                offset,
                bytes: wanted,
            });
        } else {
            next.asking = true;
            out.push(Action::SeedRead {
                peer,
                offset,
                bytes,
                wanted,
            });
        }
        self.peers[index].feed = Feed::Seeding(next);
    }

    /// All pieces are on their way: the epochs since the copy began follow.
    fn end_copy(&mut self, index: usize, from: Epoch, out: &mut Actions) {
        let id = peer_id(index);
        let (tip, durable) = (self.tip().epoch, self.journal.durable());
        // Whatever the pieces hold of sweeps that ran meanwhile, also before a restart, is durable
        // here. The end of the log may be lost yet, and the copy would wait for it for ever.
        let usable_after = durable;
        let peer = &mut self.peers[index];
        peer.sent = from;
        peer.lag.has = from;
        peer.feed = Feed::Live {
            next: from.next(),
            reading: false,
        };
        out.peer(id, PeerMessage::SeedEnd { usable_after });
        out.peer(id, PeerMessage::Anchored(self.anchored));
        if from < tip {
            self.send_epochs(index, from.next(), out);
        }
    }
}
