//! Reading the frames of a log when it is opened: see [`recovery`](super::recovery).

use hn4::log::frame::MAX_HEAD_BYTES;
use hn4::log::{
    CopyState, FrameError, FrameHead, FrameHeader, LogHeader, LogIdentity, RING_START, Stamp,
    Superblock,
};
use hn4::types::{BLOCK_BYTES, Epoch, LogOffset};
use zerocopy::IntoBytes;

use super::config::VolumeConfig;
use super::event::Tip;
use super::journal::{FrameInfo, Journal, Sealed};
use super::mutants::{Mutant, planted};
use super::overlay::Overlay;
use super::recovery::{AlignedBlock, Medium, RecoveryError, read_blocks};
use super::seal::{bytes_to_slots, frame_changes};
use crate::arena::SlotMemory;

/// How far behind an invalid frame later frames are looked for: four times the largest epoch that
/// [`VolumeConfig`] allows, so that the successor of a damaged frame is found.
const LOOK_AHEAD_BYTES: u64 = 64 << 20;
/// So much is read at once where what lies ahead is wanted anyway: one disk operation for many
/// small frames. As the log may be short, the first read is of a block, and each is twice as long.
const AHEAD_BLOCKS: usize = 256;
/// Payload of a frame that is not replayed is read past, rather than skipped, up to this size:
/// about what a solid-state disk delivers while it finds another place.
const READ_PAST_BYTES: u64 = 256 << 10;

/// Blocks of the ring that were read last.
#[derive(Default)]
struct Window {
    blocks: Vec<AlignedBlock>,
    /// Log offset of the first one.
    at: u64,
    /// How many there are.
    count: usize,
}

impl Window {
    /// Those from a log offset on, at most so many; empty if that offset was not read.
    fn find(&self, from: LogOffset, most: usize) -> &[AlignedBlock] {
        let skipped = from.0.checked_sub(self.at).map(|bytes| bytes / BLOCK_BYTES);
        let skipped = skipped.and_then(|blocks| usize::try_from(blocks).ok());
        let rest = skipped.and_then(|blocks| self.blocks[..self.count].get(blocks..));
        let rest = rest.unwrap_or_default();
        &rest[..most.min(rest.len())]
    }
}

pub(super) struct Scan<'a> {
    medium: &'a mut dyn Medium,
    window: Window,
    /// How much is to be read at once, at least.
    ahead: usize,
    mem: &'a mut dyn SlotMemory,
    identity: LogIdentity,
    superblock: Superblock,
    ring_bytes: u64,
    /// What comes after it is not taken.
    last: Option<Epoch>,
    pub(super) journal: Journal,
    pub(super) overlay: Overlay,
    pub(super) anchored: Tip,
    pub(super) replayed: u64,
    pub(super) replayed_bytes: u64,
}

impl<'a> Scan<'a> {
    fn new(
        medium: &'a mut dyn Medium,
        mem: &'a mut dyn SlotMemory,
        header: &LogHeader,
        superblock: &Superblock,
    ) -> Self {
        let base = Tip {
            epoch: superblock.retained,
            chain: superblock.retained_chain,
        };
        let base = (base, superblock.retained_offset, superblock.retained_rank);
        Self {
            overlay: Overlay::new(mem.capacity()),
            medium,
            window: Window::default(),
            ahead: 1,
            mem,
            identity: header.identity,
            superblock: *superblock,
            ring_bytes: header.ring_bytes,
            last: None,
            journal: Journal::new(header.ring_bytes, superblock.session, base),
            anchored: Tip {
                epoch: superblock.checkpoint,
                chain: superblock.checkpoint_chain,
            },
            replayed: 0,
            replayed_bytes: 0,
        }
    }

    /// The same before it took any frame, to end at this epoch.
    fn again(self, header: &LogHeader, last: Epoch) -> Self {
        let Self {
            medium,
            mem,
            journal,
            superblock,
            ..
        } = self;
        let slots = journal.sealed.iter().flat_map(|frame| &frame.blocks);
        slots.for_each(|dirty| mem.free(dirty.slot));
        Self {
            last: Some(last),
            ..Self::new(medium, mem, header, &superblock)
        }
    }

    /// Returns whether a torn frame was dropped at the end.
    fn run(&mut self) -> Result<bool, RecoveryError> {
        let mut buffer = Vec::new();
        loop {
            let used = self.journal.tail().0 - self.superblock.retained_offset.0;
            let is_last = self
                .last
                .is_some_and(|last| self.journal.tip().epoch >= last);
            if self.ring_bytes - used < BLOCK_BYTES || is_last {
                return Ok(is_last);
            }
            match self.frame(&mut buffer)? {
                Ok(()) => {}
                Err(error) => return self.end(error),
            }
        }
    }

    /// Takes the next frame; the inner error says why it is none.
    fn frame(&mut self, buffer: &mut Vec<u8>) -> Result<Result<(), FrameError>, RecoveryError> {
        let at = self.journal.tail();
        buffer.clear();
        self.read_ring(at, BLOCK_BYTES, buffer)?;
        let header = match FrameHeader::decode(&self.identity, buffer) {
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        let tip = self.journal.tip();
        if header.offset != at || header.epoch != tip.epoch.next() || header.previous != tip.chain {
            // A frame of an earlier lap, or of a tail that was replaced.
            return Ok(Err(FrameError::NoMagic));
        }
        let used = at.0 - self.superblock.retained_offset.0;
        if header.frame_bytes > self.ring_bytes - used {
            let value = header.frame_bytes;
            return Ok(Err(FrameError::Field {
                field: "frame_bytes",
                value,
            }));
        }
        let replay = header.epoch > self.superblock.checkpoint;
        if !replay && header.frame_bytes > READ_PAST_BYTES {
            self.ahead = 1;
        }
        let wanted = if replay {
            header.frame_bytes
        } else {
            header.head_bytes
        };
        let rest = LogOffset(at.0 + BLOCK_BYTES);
        self.read_ring(rest, wanted - BLOCK_BYTES, buffer)?;
        let decode = if replay && !planted(Mutant::IgnorePayloadCrc) {
            FrameHead::decode_frame
        } else {
            FrameHead::decode
        };
        let head = match decode(&self.identity, buffer) {
            Ok(head) => head,
            Err(error) => return Ok(Err(error)),
        };
        if replay {
            self.replay(&head, buffer)?;
        } else {
            self.journal.recovered(info(&head));
        }
        if let Some(chain) = self.journal.chain(head.header.durable_through)
            && head.header.durable_through > self.anchored.epoch
        {
            self.anchored = Tip {
                epoch: head.header.durable_through,
                chain,
            };
        }
        Ok(Ok(()))
    }

    fn replay(&mut self, head: &FrameHead, frame: &[u8]) -> Result<(), RecoveryError> {
        let header = head.header;
        self.replayed += 1;
        self.replayed_bytes += header.frame_bytes;
        let payload_at = usize::try_from(header.head_bytes).unwrap_or(usize::MAX);
        let payload = frame.get(payload_at..).unwrap_or_default();
        let needed = self.replayed_bytes * 2;
        let slots = bytes_to_slots(self.mem, payload);
        let slots = slots.ok_or(RecoveryError::OverlayTooSmall { needed })?;
        let (blocks, mut zeros) = frame_changes(head, &slots);
        if planted(Mutant::ForgetTrimInRecovery) {
            zeros.clear();
        }
        self.overlay.adopt(header.epoch, &blocks, &zeros);
        self.journal.recovered(info(head));
        let sealed = Sealed {
            header,
            chain: head.chain,
            blocks,
            zeros,
            head: Vec::new(),
        };
        self.journal.sealed.push_back(sealed);
        Ok(())
    }

    /// The frame after the tip is not valid: torn tail or corruption?
    fn end(&mut self, source: FrameError) -> Result<bool, RecoveryError> {
        let epoch = self.journal.tip().epoch.next();
        let offset = self.journal.tail();
        let durable = self.superblock.durable;
        let mut proof = None;
        if epoch <= durable {
            proof = Some(format!("the superblock (durable through epoch {durable})"));
        }
        let mut found_later = false;
        let used = offset.0 - self.superblock.retained_offset.0;
        let end = offset.0 + (self.ring_bytes - used).min(LOOK_AHEAD_BYTES);
        let mut at = offset.0;
        while at < end && proof.is_none() {
            let count = self.read_chunk(LogOffset(at), end - at)?.len();
            let blocks = self.window.find(LogOffset(at), count);
            for (index, block) in blocks.iter().enumerate() {
                let here = LogOffset(at + index as u64 * BLOCK_BYTES);
                let Ok(header) = FrameHeader::decode(&self.identity, &block.0) else {
                    continue;
                };
                if header.offset != here || header.epoch < epoch {
                    continue;
                }
                found_later = true;
                let stamp = Stamp::decode(&block.0);
                let stamp = stamp.filter(|stamp| stamp.session == self.superblock.session);
                if stamp.is_some_and(|stamp| stamp.durable_through >= epoch) {
                    proof = Some(format!("the frame of epoch {}", header.epoch));
                    break;
                }
            }
            at += count as u64 * BLOCK_BYTES;
        }
        match proof {
            Some(proof) => Err(RecoveryError::Corrupt {
                epoch,
                offset: offset.0,
                proof,
                source,
            }),
            None => Ok(found_later),
        }
    }

    fn read_ring(
        &mut self,
        from: LogOffset,
        bytes: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<(), RecoveryError> {
        debug_assert!(bytes <= MAX_HEAD_BYTES + hn4::log::MAX_EPOCH_BYTES);
        let mut at = from.0;
        let end = from.0 + bytes;
        while at < end {
            let bytes = self.read_chunk(LogOffset(at), end - at)?.as_bytes();
            buffer.extend_from_slice(bytes);
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// The next blocks: at least one, and as many as are wanted, as lie before the end of the ring,
    /// and as one read takes.
    fn read_chunk(
        &mut self,
        from: LogOffset,
        wanted_bytes: u64,
    ) -> Result<&[AlignedBlock], RecoveryError> {
        let in_ring = from.0 % self.ring_bytes;
        let blocks = |bytes: u64| usize::try_from(bytes / BLOCK_BYTES).unwrap_or(usize::MAX);
        let to_end = blocks(self.ring_bytes - in_ring);
        let wanted = blocks(wanted_bytes).min(to_end).clamp(1, AHEAD_BLOCKS);
        if self.window.find(from, wanted).is_empty() {
            let ahead = self.ahead.clamp(wanted, to_end.max(wanted));
            if self.window.blocks.len() < ahead {
                self.window.blocks = vec![AlignedBlock([0; 4096]); ahead];
            }
            self.window.count = 0;
            let place = RING_START + in_ring;
            let read = read_blocks(self.medium, place, &mut self.window.blocks[..ahead]);
            // What is not wanted yet may be unreadable.
            self.window.count = match read {
                Ok(()) => ahead,
                Err(error) if ahead == wanted => return Err(error),
                Err(_) => {
                    read_blocks(self.medium, place, &mut self.window.blocks[..wanted])?;
                    wanted
                }
            };
            self.window.at = from.0;
            self.ahead = (self.ahead * 2).min(AHEAD_BLOCKS);
        }
        Ok(self.window.find(from, wanted))
    }
}

/// Reads all frames that count. With whether a torn one was dropped at the end.
pub(super) fn scan<'a>(
    medium: &'a mut dyn Medium,
    mem: &'a mut dyn SlotMemory,
    config: &VolumeConfig,
    header: &LogHeader,
    superblock: &Superblock,
) -> Result<(Scan<'a>, bool), RecoveryError> {
    let mut scan = Scan::new(medium, mem, header, superblock);
    let is_complete = !matches!(
        superblock.copy,
        CopyState::Fresh | CopyState::Seeding { .. }
    );
    let run = scan.run();
    let fits = match &run {
        // As much as whoever takes frames from a peer leaves free.
        Ok(_) => scan.mem.free_slots() >= config.reserve_slots / 2,
        Err(error) => !matches!(error, RecoveryError::OverlayTooSmall { .. }),
    };
    if !is_complete && !fits {
        // It has promised nothing. What does not fit is what it had before the copy began, which is
        // of the same history and lies where it would come again. What the backing may hold a part
        // of is kept: it tells whether the copy can go on in another history.
        scan = scan.again(header, superblock.checkpoint.max(superblock.swept));
        let dropped = scan.run()?;
        return Ok((scan, dropped));
    }
    Ok((scan, run?))
}

fn info(head: &FrameHead) -> FrameInfo {
    let header = head.header;
    FrameInfo {
        epoch: header.epoch,
        chain: head.chain,
        offset: header.offset,
        bytes: header.frame_bytes,
        sealed_ms: header.sealed_ms,
        rank: header.rank(),
    }
}
