//! What waits to be sent on the control stream.
//!
//! Acks, anchors and credit are states: each has one slot, and a newer value replaces an older one
//! that was not sent yet. Only what must not be lost or merged has a queue, and that is bounded. So
//! the lane needs constant room, however slow the line is.
//!
//! Frames that the peer's daemon must take are counted in a window; heartbeats, frame acks and
//! errors are not, so that a full window never looks like a dead peer.

use std::collections::VecDeque;

use bytes::Bytes;

use super::api::{AckState, LocalState, StateRoot, Tip};
use crate::wire::control::{ControlMessage, ErrorMessage, Heartbeat};
use crate::wire::{FrameKind, FrameSealer, WireFrame};

/// Messages that wait in the queue, at most.
const MAX_QUEUED: usize = 64;

/// The sending half of the control stream.
#[derive(Default)]
pub(super) struct ControlLane {
    hello: Option<ControlMessage>,
    ping: Option<u64>,
    pong: Option<u64>,
    frame_ack: Option<(u64, u64)>,
    error: Option<ErrorMessage>,
    state: Option<Box<LocalState>>,
    queue: VecDeque<ControlMessage>,
    credit_bytes: u64,
    anchored: Option<Tip>,
    ack: Option<AckState>,
    seed_ack_bytes: Option<u64>,
    root: Option<StateRoot>,
    /// Sequences of the counted frames that the peer has not acknowledged.
    unacknowledged: VecDeque<u64>,
}

impl ControlLane {
    pub(super) fn hello(&mut self, hello: ControlMessage) {
        self.hello = Some(hello);
    }

    pub(super) fn ping(&mut self, id: u64) {
        self.ping = Some(id);
    }

    pub(super) fn pong(&mut self, id: u64) {
        self.pong = Some(id);
    }

    pub(super) fn frame_ack(&mut self, control_sequence: u64, data_sequence: u64) {
        self.frame_ack = Some((control_sequence, data_sequence));
    }

    pub(super) fn state(&mut self, state: LocalState) {
        self.state = Some(Box::new(state));
    }

    pub(super) fn credit(&mut self, bytes: u64) {
        self.credit_bytes = self.credit_bytes.saturating_add(bytes);
    }

    pub(super) fn anchored(&mut self, tip: Tip) {
        self.anchored = Some(tip);
    }

    pub(super) fn ack(&mut self, ack: AckState) {
        self.ack = Some(ack);
    }

    pub(super) fn seed_ack(&mut self, cursor_bytes: u64) {
        self.seed_ack_bytes = Some(cursor_bytes);
    }

    pub(super) fn root(&mut self, root: StateRoot) {
        self.root = Some(root);
    }

    /// Queues a message that may not be merged; gives it back if the queue is full.
    pub(super) fn queue(&mut self, message: ControlMessage) -> Result<(), ControlMessage> {
        if self.queue.len() >= MAX_QUEUED {
            return Err(message);
        }
        self.queue.push_back(message);
        Ok(())
    }

    /// Drops everything that waits; the error, if any, is the last frame of the session.
    pub(super) fn finish(&mut self, error: Option<ErrorMessage>) {
        *self = Self {
            error,
            ..Self::default()
        };
    }

    /// The peer has handled all frames up to this sequence.
    pub(super) fn acknowledged(&mut self, sequence: u64) {
        while self
            .unacknowledged
            .front()
            .is_some_and(|&first| first <= sequence)
        {
            self.unacknowledged.pop_front();
        }
    }

    /// Whether [`transmit`](Self::transmit) would give a frame.
    pub(super) fn has_transmit(&self, established: bool, window: usize) -> bool {
        let uncounted = self.error.is_some()
            || self.hello.is_some()
            || self.ping.is_some()
            || self.pong.is_some()
            || self.frame_ack.is_some();
        let counted = self.state.is_some()
            || !self.queue.is_empty()
            || self.credit_bytes > 0
            || self.anchored.is_some()
            || self.ack.is_some()
            || self.seed_ack_bytes.is_some()
            || self.root.is_some();
        uncounted || (counted && established && self.unacknowledged.len() < window)
    }

    /// The next frame, most urgent first.
    pub(super) fn transmit(
        &mut self,
        sealer: &mut FrameSealer,
        established: bool,
        window: usize,
    ) -> Option<WireFrame> {
        let mut seal =
            |kind, message: Vec<u8>| Some(sealer.seal(kind, false, &message, Bytes::new()));
        if let Some(error) = self.error.take() {
            return seal(FrameKind::Error, error.encode());
        }
        if let Some(hello) = self.hello.take() {
            return seal(FrameKind::Control, hello.encode());
        }
        if let Some(id) = self.pong.take() {
            return seal(
                FrameKind::Heartbeat,
                Heartbeat { id, answer: true }.encode(),
            );
        }
        if let Some(id) = self.ping.take() {
            return seal(
                FrameKind::Heartbeat,
                Heartbeat { id, answer: false }.encode(),
            );
        }
        if let Some((control_sequence, data_sequence)) = self.frame_ack.take() {
            let message = ControlMessage::FrameAck {
                control_sequence,
                data_sequence,
            };
            return seal(FrameKind::Control, message.encode());
        }
        if !established || self.unacknowledged.len() >= window {
            return None;
        }
        let message = self.next_counted()?;
        let frame = sealer.seal(FrameKind::Control, true, &message.encode(), Bytes::new());
        self.unacknowledged.push_back(sealer.last_sequence());
        Some(frame)
    }

    /// The state goes first, because a subscription may depend on it; credit goes before acks,
    /// because the other side waits for it.
    fn next_counted(&mut self) -> Option<ControlMessage> {
        if let Some(state) = self.state.take() {
            return Some(ControlMessage::State(state));
        }
        if let Some(message) = self.queue.pop_front() {
            return Some(message);
        }
        if self.credit_bytes > 0 {
            let bytes = std::mem::take(&mut self.credit_bytes);
            return Some(ControlMessage::Credit { bytes });
        }
        if let Some(ack) = self.ack.take() {
            return Some(ControlMessage::Ack(ack));
        }
        if let Some(tip) = self.anchored.take() {
            return Some(ControlMessage::Anchored(tip));
        }
        if let Some(cursor_bytes) = self.seed_ack_bytes.take() {
            return Some(ControlMessage::SeedAck { cursor_bytes });
        }
        self.root.take().map(ControlMessage::Root)
    }
}
