//! A primary's side of its peers: what each has, and what it is to be sent.
//!
//! A feed sends sealed epochs in order: from memory while the head of the frame is there, else from
//! the log. Before them it may send a full copy (`copying`).
//!
//! All limits are the peer's credit; what it has not granted is not sent.

use hn4::log::{FrameHead, Role};
use hn4::types::Epoch;

use super::copying::Copying;
use super::event::{
    Action, Actions, Differences, FeedRefusal, PeerEvent, PeerId, PeerMessage, PeerState, Progress,
    Tip,
};
use super::lag::{LagState, PeerLag};
use super::mutants::{Mutant, planted};
use super::volume::Volume;

/// Frames are read from the log in runs of at most so many bytes.
const FEED_READ_BYTES: u64 = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Feed {
    #[default]
    None,
    /// A full copy is to be sent when the state trees were compared: that question has this name.
    Comparing { asked: Option<u64> },
    /// A full copy is being sent.
    Seeding(Copying),
    /// Epochs from `next` on are to be sent.
    Live { next: Epoch, reading: bool },
}

/// See the module.
#[derive(Debug, Default)]
pub struct Peer {
    /// A session is open.
    pub connected: bool,
    /// What the peer says it has; durable outlives the session.
    pub progress: Progress,
    /// All epochs up to this one were handed to the session.
    pub sent: Epoch,
    pub(super) feed: Feed,
    pub(super) credit: i64,
    /// The peer needs the log after this epoch.
    hold: Option<Epoch>,
    /// How its copy stands, while a session is open.
    state: Option<PeerState>,
    /// What it asked while this node did not know yet whether it is still primary.
    waiting: Option<PeerEvent>,
    pub(super) lag: PeerLag,
    /// The first frame of the last run that could not be read from the log.
    failed_read: Option<Epoch>,
    /// The first frame of the run that is being read.
    reading_from: Epoch,
    /// Nobody is at this place.
    pub(super) absent: bool,
    /// It is about to be removed, and counts no longer.
    pub(super) leaving: bool,
    /// The session was told to end; what it brings of logs and copies is not looked at any more.
    pub(super) closing: bool,
    /// What a copy from that place has to send, if trees were compared for it; outlives the
    /// session.
    pub(super) resync: Option<Differences>,
    /// Bytes that the last copy has left out.
    pub(super) kept_bytes: Option<u64>,
}

impl Peer {
    /// A place without a peer.
    pub(super) fn nobody() -> Self {
        Self {
            absent: true,
            ..Self::default()
        }
    }

    pub(super) fn hold(&self) -> Option<Epoch> {
        self.hold
    }

    pub(super) fn state(&self) -> Option<PeerState> {
        self.state
    }

    pub(super) fn set_state(&mut self, state: PeerState) {
        self.state = Some(state);
    }

    /// Until the peer says more, it may need all that is kept.
    pub(super) fn set_hold(&mut self, hold: Epoch) {
        self.hold = Some(hold);
    }

    /// Whether a full copy is being sent, and how far it is.
    #[must_use]
    pub fn seeding(&self) -> Option<u64> {
        match self.feed {
            Feed::Seeding(copying) => Some(copying.cursor),
            Feed::Comparing { .. } => Some(0),
            Feed::None | Feed::Live { .. } => None,
        }
    }

    /// What the last full copy has left out, since comparing state trees had shown that the peer
    /// has it; `None` if nothing was compared for it.
    #[must_use]
    pub fn kept_bytes(&self) -> Option<u64> {
        self.kept_bytes
    }

    /// Whether log is kept for it also when space is short: it takes what we send, epochs or a full
    /// copy, and lag control has not let it go.
    pub(super) fn keeps_log(&self) -> bool {
        match self.feed {
            Feed::None => false,
            Feed::Comparing { .. } | Feed::Seeding(_) => self.counts(),
            // What is being read must not be written over.
            Feed::Live { reading, .. } => reading || self.counts(),
        }
    }

    /// Where a full copy began, and the place from which it is to be read next.
    pub(super) fn waits_to_read(&self) -> Option<(Epoch, u64)> {
        match self.feed {
            Feed::Seeding(copying) if copying.is_quiet() => Some((copying.from, copying.cursor)),
            _ => None,
        }
    }

    /// Whether its acknowledgements count.
    pub(super) fn counts(&self) -> bool {
        let leaving = self.leaving && !planted(Mutant::LeavingCounts);
        self.lag.state != LagState::Detached && !leaving
    }

    /// How lag control sees it.
    #[must_use]
    pub fn lag_state(&self) -> LagState {
        self.lag.state
    }

    /// Whether epochs are being sent.
    #[must_use]
    pub fn is_live(&self) -> bool {
        matches!(self.feed, Feed::Live { .. })
    }

    pub(super) fn spend(&mut self, bytes: u64) {
        self.credit = self
            .credit
            .saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}

impl Volume {
    /// State of the peers, in the order of the configuration.
    #[must_use]
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// What peers acknowledged to an earlier primary says nothing about the history of this one.
    pub(super) fn forget_progress(&mut self) {
        let tip = self.tip().epoch;
        for peer in &mut self.peers {
            if !planted(Mutant::KeepProgress) {
                peer.progress = Progress::default();
            }
            peer.lag = PeerLag::at(tip);
            peer.failed_read = None;
            peer.resync = None;
        }
        self.unreadable = Epoch(0);
    }

    pub(super) fn close_sessions(&mut self, out: &mut Actions) {
        for index in 0..self.peers.len() {
            if self.peers[index].connected {
                self.close_session(peer_id(index), out);
            }
        }
    }

    /// Ends the session of a peer. It goes on sending until it hears of that.
    pub(super) fn close_session(&mut self, id: PeerId, out: &mut Actions) {
        if let Some(peer) = self.peers.get_mut(usize::from(id.0)) {
            peer.closing = true;
        }
        out.peer(id, PeerMessage::Close);
    }

    pub(super) fn feed_event(&mut self, id: PeerId, event: PeerEvent, out: &mut Actions) {
        let opening = self.is_opening();
        let Some(peer) = self.peers.get_mut(usize::from(id.0)) else {
            return;
        };
        match event {
            PeerEvent::Subscribe { .. } | PeerEvent::SeedRequest { .. } if opening => {
                peer.waiting = Some(event);
            }
            PeerEvent::Credit(bytes) => {
                let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
                peer.credit = peer.credit.saturating_add(bytes);
            }
            PeerEvent::Ack(progress) => self.acknowledged(id, progress),
            PeerEvent::Subscribe { tip, anchored } => self.subscribe(id, tip, anchored, out),
            PeerEvent::SeedRequest { cursor_bytes, from } => {
                self.seed_request(id, cursor_bytes, from, out);
            }
            PeerEvent::FeedReadDone { ok } => {
                if let Feed::Live { reading, .. } = &mut peer.feed {
                    *reading = false;
                }
                if !ok {
                    self.feed_read_failed(id, out);
                }
            }
            PeerEvent::SeedPart(bytes) => self.part_begun(id, bytes),
            PeerEvent::SeedReadDone(sent) => self.part_sent(id, sent, out),
            _ => {}
        }
    }

    /// A frame of the log cannot be read, or is damaged. The peer asks again from there. If that
    /// fails too, the log counts as beginning after that frame: whoever needs it is told, instead
    /// of asking for ever.
    fn feed_read_failed(&mut self, id: PeerId, out: &mut Actions) {
        let peer = &mut self.peers[usize::from(id.0)];
        peer.feed = Feed::None;
        if peer.failed_read == Some(peer.reading_from) {
            self.unreadable = self.unreadable.max(peer.reading_from);
        }
        peer.failed_read = Some(peer.reading_from);
        out.peer(id, PeerMessage::Close);
    }

    /// The epoch after which the log can be sent.
    pub(super) fn feed_floor(&self) -> Epoch {
        // A superblock that lets go of more log may be on its way.
        self.superblock.desired.retained.max(self.unreadable)
    }

    /// How many frames, from the first on, are as they were written: what is read from the log for
    /// a peer is checked before it is sent.
    #[must_use]
    pub fn intact_frames(&self, frames: &[(Epoch, u64)], bytes: &[u8]) -> usize {
        let mut rest = bytes;
        let intact = frames.iter().take_while(|(epoch, length)| {
            let length = usize::try_from(*length).unwrap_or(usize::MAX);
            let Some((frame, others)) = rest.split_at_checked(length) else {
                return false;
            };
            rest = others;
            let head = FrameHead::decode_frame(&self.config.identity, frame);
            // Where a write was lost, a whole frame of another history may lie.
            head.is_ok_and(|head| self.journal.chain(*epoch) == Some(head.chain))
        });
        intact.count()
    }

    pub(super) fn peer_connected(&mut self, id: PeerId, connected: bool) {
        let Some(peer) = self.peers.get_mut(usize::from(id.0)) else {
            return;
        };
        peer.connected = connected;
        peer.closing = false;
        peer.state = None;
        peer.waiting = None;
        peer.feed = Feed::None;
        peer.credit = 0;
        peer.progress.received = peer.progress.durable;
    }

    /// A peer cannot have more than there is; whoever says so is not believed (P6).
    fn acknowledged(&mut self, id: PeerId, progress: Progress) {
        let tip = self.tip().epoch;
        let peer = &mut self.peers[usize::from(id.0)];
        let Feed::Live { next, .. } = peer.feed else {
            return;
        };
        let sent = Epoch(next.0.saturating_sub(1)).min(tip);
        if progress.received > sent || progress.durable > progress.received {
            return;
        }
        peer.progress = progress;
        // Only a copy that is complete acknowledges.
        peer.resync = None;
        peer.hold = Some(progress.durable.min(sent));
        peer.lag.has = progress.durable.max(peer.lag.has).min(sent);
    }

    fn subscribe(&mut self, id: PeerId, tip: Tip, anchored: Tip, out: &mut Actions) {
        if self.role() != Role::Primary && !self.may_pull(id) {
            return;
        }
        let floor = self.feed_floor();
        let too_old = FeedRefusal::TooOld {
            oldest: floor.next(),
        };
        let refusal = match self.journal.chain(tip.epoch) {
            _ if tip.epoch < floor => Some(too_old),
            Some(chain) if chain == tip.chain => None,
            _ => Some(match self.journal.chain(anchored.epoch) {
                Some(chain) if chain == anchored.chain => FeedRefusal::Truncate(anchored),
                None if anchored.epoch < floor => too_old,
                _ => FeedRefusal::Diverged(anchored.epoch),
            }),
        };
        if let Some(refusal) = refusal {
            // Whatever it acknowledged, it holds another history now.
            if !planted(Mutant::KeepProgress) {
                self.peers[usize::from(id.0)].progress = Progress::default();
            }
            return out.peer(id, PeerMessage::FeedRefused(refusal));
        }
        let next = tip.epoch.next();
        let peer = &mut self.peers[usize::from(id.0)];
        peer.feed = Feed::Live {
            next,
            reading: false,
        };
        peer.sent = tip.epoch;
        peer.hold = Some(tip.epoch);
        peer.lag.has = tip.epoch;
        // What it flushed it will say; what it flushed in an earlier life may be gone.
        if !planted(Mutant::KeepProgress) {
            peer.progress = Progress {
                received: tip.epoch,
                ..Progress::default()
            };
        }
        out.peer(id, PeerMessage::FeedOpened(next));
        out.peer(id, PeerMessage::Anchored(self.anchored));
    }

    /// An epoch was just sealed: whoever is up to date gets it from memory.
    pub(super) fn ship_sealed(&mut self, epoch: Epoch, out: &mut Actions) {
        let Some(bytes) = self
            .journal
            .sealed(epoch)
            .map(|sealed| sealed.header.frame_bytes)
        else {
            return;
        };
        for (index, peer) in self.peers.iter_mut().enumerate() {
            if peer.feed
                == (Feed::Live {
                    next: epoch,
                    reading: false,
                })
                && peer.credit > 0
            {
                peer.feed = Feed::Live {
                    next: epoch.next(),
                    reading: false,
                };
                peer.sent = epoch;
                peer.spend(bytes);
                out.push(Action::Ship {
                    peer: peer_id(index),
                    epoch,
                });
            }
        }
    }

    /// What was asked while this node was opening.
    pub(super) fn answer_waiting(&mut self, out: &mut Actions) {
        for index in 0..self.peers.len() {
            if let Some(event) = self.peers[index].waiting.take() {
                self.feed_event(peer_id(index), event, out);
            }
        }
    }

    pub(super) fn feed_progress(&mut self, out: &mut Actions) {
        for index in 0..self.peers.len() {
            let peer = &self.peers[index];
            if !peer.connected || peer.credit <= 0 {
                continue;
            }
            match peer.feed {
                Feed::Seeding(copying) => self.copy_progress(index, copying, out),
                Feed::Live {
                    next,
                    reading: false,
                } if next <= self.tip().epoch => {
                    self.send_epochs(index, next, out);
                }
                Feed::Comparing { asked: None } => self.ask_to_compare(index, out),
                Feed::None | Feed::Comparing { .. } | Feed::Live { .. } => {}
            }
        }
    }

    pub(super) fn send_epochs(&mut self, index: usize, next: Epoch, out: &mut Actions) {
        let id = peer_id(index);
        let mut next = next;
        while self.peers[index].credit > 0
            && let Some(sealed) = self.journal.sealed(next)
            && !sealed.head.is_empty()
        {
            let bytes = sealed.header.frame_bytes;
            out.push(Action::Ship {
                peer: id,
                epoch: next,
            });
            self.peers[index].spend(bytes);
            self.peers[index].sent = next;
            next = next.next();
        }
        self.peers[index].feed = Feed::Live {
            next,
            reading: false,
        };
        if next > self.journal.durable() || self.peers[index].credit <= 0 {
            return;
        }
        let run = self.journal.run(next, FEED_READ_BYTES);
        let peer = &mut self.peers[index];
        let Some((offset, frames)) = run else {
            // The log no longer has it: the peer must ask again, and will be told.
            peer.feed = Feed::None;
            return out.peer(id, PeerMessage::Close);
        };
        peer.reading_from = next;
        peer.spend(frames.iter().map(|(_, bytes)| bytes).sum());
        let last = frames.last().map_or(next, |(epoch, _)| *epoch);
        let next = last.next();
        peer.sent = last;
        peer.feed = Feed::Live {
            next,
            reading: true,
        };
        out.push(Action::FeedRead {
            peer: id,
            offset,
            frames,
        });
    }

    pub(super) fn announce_anchored(&self, out: &mut Actions) {
        for (index, peer) in self.peers.iter().enumerate() {
            if peer.connected && peer.is_live() {
                out.peer(peer_id(index), PeerMessage::Anchored(self.anchored));
            }
        }
    }

    /// The bytes of a frame that [`Action::Ship`] named, without stamp, as peers get it.
    #[must_use]
    pub fn frame_bytes(&self, epoch: Epoch, mem: &dyn crate::arena::SlotMemory) -> Option<Vec<u8>> {
        let sealed = self
            .journal
            .sealed(epoch)
            .filter(|sealed| !sealed.head.is_empty())?;
        let mut bytes = Vec::with_capacity(usize::try_from(sealed.header.frame_bytes).ok()?);
        let payload = sealed.blocks.iter().map(|dirty| dirty.slot);
        for slot in sealed.head.iter().copied().chain(payload) {
            bytes.extend_from_slice(mem.bytes(slot));
        }
        hn4::log::Stamp::clear(&mut bytes);
        Some(bytes)
    }
}

pub(super) fn peer_id(index: usize) -> PeerId {
    PeerId(u8::try_from(index).expect("volumes have few peers"))
}
