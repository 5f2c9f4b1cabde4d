//! What waits to be sent on the data stream, and what may be sent of it.
//!
//! Two limits hold: the number of frames the peer has not acknowledged, and the credit in bytes
//! that the peer's daemon granted. A message may *start* while the balance is above zero and is
//! charged whole, so the balance is overdrawn by one message at most and a message larger than the
//! grant can not get stuck. A piece without data costs a nominal sum; what only opens or ends
//! something is free.

use std::collections::VecDeque;

use bytes::Bytes;
use hn4::types::{Epoch, ZERO_PIECE_COST_BYTES};

use super::compression::Compression;
use crate::wire::data::DataMessage;
use crate::wire::{FrameKind, FrameSealer, WireFrame};

/// The sending half of the data stream.
#[derive(Default)]
pub(super) struct DataLane {
    queue: VecDeque<Item>,
    queued_bytes: usize,
    granted_bytes: u64,
    charged_bytes: u64,
    acknowledged_sequence: u64,
}

enum Item {
    Whole(DataMessage),
    Epoch {
        epoch: Epoch,
        frame: Bytes,
        sent_bytes: usize,
    },
}

impl Item {
    /// What starting this item costs; nothing, if it has started.
    fn cost(&self) -> u64 {
        match self {
            Self::Epoch {
                frame,
                sent_bytes: 0,
                ..
            } => frame.len() as u64,
            Self::Whole(DataMessage::SeedData { bytes, .. }) => bytes.len() as u64,
            Self::Whole(DataMessage::SeedZero { .. } | DataMessage::SeedSame { .. }) => {
                ZERO_PIECE_COST_BYTES
            }
            Self::Epoch { .. } | Self::Whole(_) => 0,
        }
    }
}

impl DataLane {
    pub(super) fn queue(&mut self, message: DataMessage) {
        if let DataMessage::SeedData { bytes, .. } = &message {
            self.queued_bytes += bytes.len();
        }
        self.queue.push_back(Item::Whole(message));
    }

    pub(super) fn queue_epoch(&mut self, epoch: Epoch, frame: Bytes) {
        self.queued_bytes += frame.len();
        self.queue.push_back(Item::Epoch {
            epoch,
            frame,
            sent_bytes: 0,
        });
    }

    /// Bytes that wait.
    pub(super) fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Messages that wait.
    pub(super) fn queued_messages(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn grant(&mut self, bytes: u64) {
        self.granted_bytes = self.granted_bytes.saturating_add(bytes);
    }

    /// The peer has handled all frames up to this sequence.
    pub(super) fn acknowledged(&mut self, sequence: u64) {
        self.acknowledged_sequence = self.acknowledged_sequence.max(sequence);
    }

    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.queued_bytes = 0;
    }

    /// Whether [`transmit`](Self::transmit) would give a frame.
    pub(super) fn has_transmit(&self, last_sequence: u64, window: usize) -> bool {
        let in_flight = last_sequence.saturating_sub(self.acknowledged_sequence);
        let has_room = usize::try_from(in_flight).is_ok_and(|in_flight| in_flight < window);
        let affordable = |item: &Item| item.cost() == 0 || self.charged_bytes < self.granted_bytes;
        has_room && self.queue.front().is_some_and(affordable)
    }

    /// The next frame.
    pub(super) fn transmit(
        &mut self,
        sealer: &mut FrameSealer,
        window: usize,
        chunk_bytes: usize,
        compression: &mut Compression,
    ) -> Option<WireFrame> {
        if !self.has_transmit(sealer.last_sequence(), window) {
            return None;
        }
        let cost = self.queue.front().map_or(0, Item::cost);
        self.charged_bytes = self.charged_bytes.saturating_add(cost);
        let message = self.next_message(chunk_bytes)?;
        let (head, body) = message.encode();
        self.queued_bytes = self.queued_bytes.saturating_sub(body.len());
        Some(match compression.pack(&body) {
            Some(segment) => sealer.seal_packed(&head, segment),
            None => sealer.seal(FrameKind::Data, true, &head, body),
        })
    }

    fn next_message(&mut self, chunk_bytes: usize) -> Option<DataMessage> {
        if let Item::Epoch {
            epoch,
            frame,
            sent_bytes,
        } = self.queue.front_mut()?
        {
            let offset = *sent_bytes;
            let end = frame.len().min(offset.saturating_add(chunk_bytes));
            let message = DataMessage::EpochChunk {
                epoch: *epoch,
                offset: offset as u64,
                total: frame.len() as u64,
                bytes: frame.slice(offset..end),
            };
            *sent_bytes = end;
            if end == frame.len() {
                self.queue.pop_front();
            }
            return Some(message);
        }
        match self.queue.pop_front()? {
            Item::Whole(message) => Some(message),
            Item::Epoch { .. } => None,
        }
    }
}
