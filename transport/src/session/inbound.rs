//! Takes the peer's data stream in: puts epochs together, checks order, bounds and credit.
//!
//! Invariant: what is held here is at most one epoch, and no more than the daemon granted credit
//! for (overdrawn by one message).

use bytes::{Bytes, BytesMut};
use hn4::types::{Epoch, ZERO_PIECE_COST_BYTES};

use super::api::{Output, PieceKind, SeedPiece};
use crate::wire::data::DataMessage;

/// What the receiver holds every message against.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// Length of an epoch's frame, at most.
    pub(super) max_frame_bytes: u64,
    /// Length of a piece with data, at most.
    pub(super) max_piece_bytes: usize,
    /// Size of the volume.
    pub(super) volume_bytes: u64,
}

/// The receiving half of the data stream.
#[derive(Default)]
pub(super) struct Inbound {
    granted_bytes: u64,
    charged_bytes: u64,
    may_feed: bool,
    may_seed: bool,
    feed: Feed,
    seeding: bool,
    partial: Option<Partial>,
}

/// Where the stream of epochs is.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Feed {
    #[default]
    Closed,
    /// The next epoch sets the start.
    Anywhere,
    /// Exactly this epoch comes next.
    At(Epoch),
}

struct Partial {
    epoch: Epoch,
    total: u64,
    bytes: BytesMut,
}

impl Inbound {
    /// The local daemon has room for so many more bytes.
    pub(super) fn grant(&mut self, bytes: u64) {
        self.granted_bytes = self.granted_bytes.saturating_add(bytes);
    }

    /// We have asked for a feed.
    pub(super) fn expect_feed(&mut self) {
        self.may_feed = true;
    }

    /// We have asked for a full copy.
    pub(super) fn expect_seed(&mut self) {
        self.may_seed = true;
    }

    /// Whether we asked the peer for its log.
    pub(super) fn may_feed(&self) -> bool {
        self.may_feed
    }

    /// Takes a message; gives what the daemon gets of it, if anything.
    ///
    /// # Errors
    ///
    /// Which rule the peer broke.
    pub(super) fn take(
        &mut self,
        message: DataMessage,
        bounds: Bounds,
    ) -> Result<Option<Output>, String> {
        let continues = matches!(message, DataMessage::EpochChunk { offset, .. } if offset > 0);
        if self.partial.is_some() && !continues {
            return Err("an epoch was not sent to its end".to_owned());
        }
        match message {
            DataMessage::EpochChunk {
                epoch,
                offset,
                total,
                bytes,
            } => self.take_chunk(epoch, offset, total, bytes, bounds),
            DataMessage::FeedBegin { from } => {
                if !self.may_feed {
                    return Err("a feed that was not asked for".to_owned());
                }
                self.feed = Feed::At(from);
                Ok(Some(Output::FeedOpened { from }))
            }
            seed => self.take_seed(seed, bounds),
        }
    }

    fn take_seed(
        &mut self,
        message: DataMessage,
        bounds: Bounds,
    ) -> Result<Option<Output>, String> {
        match message {
            DataMessage::SeedStart {
                from,
                log_offset,
                cursor_bytes,
            } => {
                if !self.may_seed {
                    return Err("a full copy that was not asked for".to_owned());
                }
                if cursor_bytes > bounds.volume_bytes {
                    return Err(format!(
                        "a full copy from byte {cursor_bytes}, past the end"
                    ));
                }
                (self.seeding, self.feed) = (true, Feed::Anywhere);
                Ok(Some(Output::SeedStart {
                    from,
                    log_offset,
                    cursor_bytes,
                }))
            }
            DataMessage::SeedData {
                offset_bytes,
                checksum,
                bytes,
            } => {
                if bytes.len() > bounds.max_piece_bytes {
                    return Err(format!("a piece of {} bytes", bytes.len()));
                }
                self.charge(bytes.len() as u64)?;
                let kind = PieceKind::Data(bytes);
                self.take_piece(
                    SeedPiece {
                        offset_bytes,
                        kind,
                        checksum,
                    },
                    bounds,
                )
            }
            DataMessage::SeedZero {
                offset_bytes,
                length,
            } => self.take_empty(offset_bytes, PieceKind::Zero { length }, bounds),
            DataMessage::SeedSame {
                offset_bytes,
                length,
            } => self.take_empty(offset_bytes, PieceKind::Same { length }, bounds),
            DataMessage::SeedEnd { usable_after } => {
                if !std::mem::take(&mut self.seeding) {
                    return Err("the end of a full copy that had not begun".to_owned());
                }
                Ok(Some(Output::SeedEnd { usable_after }))
            }
            // Handled elsewhere.
            DataMessage::EpochChunk { .. }
            | DataMessage::FeedBegin { .. }
            | DataMessage::Dictionary { .. } => Ok(None),
        }
    }

    /// Takes a piece without data.
    fn take_empty(
        &mut self,
        offset_bytes: u64,
        kind: PieceKind,
        bounds: Bounds,
    ) -> Result<Option<Output>, String> {
        self.charge(ZERO_PIECE_COST_BYTES)?;
        let piece = SeedPiece {
            offset_bytes,
            kind,
            checksum: 0,
        };
        self.take_piece(piece, bounds)
    }

    fn take_chunk(
        &mut self,
        epoch: Epoch,
        offset: u64,
        total: u64,
        bytes: Bytes,
        bounds: Bounds,
    ) -> Result<Option<Output>, String> {
        if let Some(partial) = &mut self.partial {
            let fits = partial.epoch == epoch
                && partial.total == total
                && partial.bytes.len() as u64 == offset;
            if !fits {
                return Err(format!(
                    "a chunk of epoch {epoch} at {offset} does not continue"
                ));
            }
            partial.bytes.extend_from_slice(&bytes);
            if (partial.bytes.len() as u64) < total {
                return Ok(None);
            }
            let frame = self.partial.take().map(|partial| partial.bytes.freeze());
            return Ok(frame.map(|frame| Output::EpochReceived { epoch, frame }));
        }
        self.begin_epoch(epoch, offset, total, bounds)?;
        if bytes.len() as u64 == total {
            return Ok(Some(Output::EpochReceived {
                epoch,
                frame: bytes,
            }));
        }
        // `total` was compared with its bound, so the room for it may be taken at once.
        let capacity = usize::try_from(total).map_err(|_| "an epoch too large for this node")?;
        let mut whole = BytesMut::with_capacity(capacity);
        whole.extend_from_slice(&bytes);
        self.partial = Some(Partial {
            epoch,
            total,
            bytes: whole,
        });
        Ok(None)
    }

    fn begin_epoch(
        &mut self,
        epoch: Epoch,
        offset: u64,
        total: u64,
        bounds: Bounds,
    ) -> Result<(), String> {
        if offset != 0 {
            return Err(format!("epoch {epoch} does not begin with its first chunk"));
        }
        if total > bounds.max_frame_bytes {
            let limit = bounds.max_frame_bytes;
            return Err(format!(
                "epoch {epoch} has {total} bytes, agreed were {limit} at most"
            ));
        }
        match self.feed {
            Feed::Closed => return Err(format!("epoch {epoch} without a feed")),
            Feed::At(next) if next != epoch => {
                return Err(format!("epoch {epoch} where epoch {next} should come"));
            }
            Feed::At(_) | Feed::Anywhere => {}
        }
        let next = epoch
            .0
            .checked_add(1)
            .ok_or("the last epoch number there is")?;
        self.feed = Feed::At(Epoch(next));
        self.charge(total)
    }

    fn take_piece(&self, piece: SeedPiece, bounds: Bounds) -> Result<Option<Output>, String> {
        if !self.seeding {
            return Err("a piece of a full copy that had not begun".to_owned());
        }
        let length = piece.volume_bytes();
        let end = piece.offset_bytes.checked_add(length);
        if length == 0 || end.is_none_or(|end| end > bounds.volume_bytes) {
            let offset = piece.offset_bytes;
            return Err(format!(
                "a piece of {length} bytes at {offset}, outside the volume"
            ));
        }
        Ok(Some(Output::SeedPiece(piece)))
    }

    fn charge(&mut self, bytes: u64) -> Result<(), String> {
        if self.charged_bytes >= self.granted_bytes {
            return Err(format!("{bytes} bytes without credit"));
        }
        self.charged_bytes = self.charged_bytes.saturating_add(bytes);
        Ok(())
    }
}
