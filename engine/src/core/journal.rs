//! The writing end of the delta log: sealed epochs on their way to the medium, and where each frame
//! that is still kept lies.
//!
//! Frames that are ready together are written as one run and made durable by one flush: that is the
//! group commit. A batch that is a single write is linked to its flush; a larger one is written in
//! parallel parts, and flushed when all are done. Epochs become durable in order, whatever order
//! the device finishes in.
//!
//! Not here: when an epoch is sealed, and when its space may be reused.

use std::collections::VecDeque;
use std::ops::Range;

use hn4::log::{FrameHeader, RING_START, Stamp};
use hn4::types::{ChainHash, Epoch, LogOffset, Rank};

use super::event::{Action, Actions, Disk, Io, IoToken, Seg, Tip};
use super::mutants::{Mutant, planted};
use super::overlay::DirtyBlock;
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// Slots in one write: 1 MiB, far below the kernel's limit of 1024 segments.
pub(super) const WRITE_SLOTS: usize = 256;
/// A batch stops growing here, so that a flush never waits behind an unbounded write.
const BATCH_SLOTS: u64 = 4096;
/// Batches on their way at the same time.
const BATCHES: usize = 2;
const SLOT: u64 = SLOT_BYTES as u64;

/// An epoch that is closed and not yet destaged.
#[derive(Debug)]
pub struct Sealed {
    /// Its frame's header.
    pub header: FrameHeader,
    /// Its place in the chain.
    pub chain: ChainHash,
    /// Blocks it changes, in the order of the frame's payload.
    pub blocks: Vec<DirtyBlock>,
    /// Blocks it zeroes.
    pub zeros: Vec<(Range<u64>, bool)>,
    /// The frame's head, one block a slot. Freed once it is durable.
    pub head: Vec<SlotId>,
}

/// Where a frame that is still kept lies.
#[derive(Clone, Copy, Debug)]
pub struct FrameInfo {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its place in the chain.
    pub chain: ChainHash,
    /// Where it starts.
    pub offset: LogOffset,
    /// Its length.
    pub bytes: u64,
    /// When it was sealed, milliseconds since 1970 on the primary's clock.
    pub sealed_ms: u64,
    /// Who sealed it.
    pub rank: Rank,
}

#[derive(Debug)]
struct Batch {
    id: u64,
    last: Epoch,
    writes_left: usize,
    /// The flush is a request of its own, to be sent after the writes.
    flush_after: bool,
    done: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Journal {
    ring_bytes: u64,
    /// Written into each frame's stamp here.
    pub session: u64,
    /// Epochs after the checkpoint, oldest first.
    pub sealed: VecDeque<Sealed>,
    /// Frames that are kept, oldest first, without a gap up to the tip.
    pub index: VecDeque<FrameInfo>,
    /// The epoch before the first one in `index`, which is where the log begins.
    pub base: Tip,
    /// Where the first kept frame starts.
    pub base_offset: LogOffset,
    /// Who sealed `base`.
    base_rank: Rank,
    tip: Tip,
    tail: LogOffset,
    submitted: Epoch,
    durable: Epoch,
    batches: VecDeque<Batch>,
    next_batch: u64,
}

impl Journal {
    /// A log whose last epoch is `tip`, durable, and whose next frame starts at `tail`.
    #[must_use]
    pub fn new(ring_bytes: u64, session: u64, base: (Tip, LogOffset, Rank)) -> Self {
        let (base, base_offset, base_rank) = base;
        Self {
            ring_bytes,
            session,
            sealed: VecDeque::new(),
            index: VecDeque::new(),
            base,
            base_offset,
            base_rank,
            tip: base,
            tail: base_offset,
            submitted: base.epoch,
            durable: base.epoch,
            batches: VecDeque::new(),
            next_batch: 0,
        }
    }

    /// The last epoch of the log.
    #[must_use]
    pub fn tip(&self) -> Tip {
        self.tip
    }

    /// Who sealed the last epoch.
    #[must_use]
    pub fn tip_rank(&self) -> Rank {
        self.index.back().map_or(self.base_rank, |info| info.rank)
    }

    /// Where the next frame will start.
    #[must_use]
    pub fn tail(&self) -> LogOffset {
        self.tail
    }

    /// All epochs up to this one are durable.
    #[must_use]
    pub fn durable(&self) -> Epoch {
        self.durable
    }

    /// Size of the ring.
    #[must_use]
    pub fn ring_bytes(&self) -> u64 {
        self.ring_bytes
    }

    /// Bytes that can be appended without touching a frame that is kept.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.ring_bytes - (self.tail.0 - self.base_offset.0)
    }

    /// Whether a write of frames is on its way.
    #[must_use]
    pub fn is_writing(&self) -> bool {
        !self.batches.is_empty()
    }

    /// Adds a frame that recovery found on the medium.
    pub fn recovered(&mut self, info: FrameInfo) {
        self.extend(info);
        self.submitted = info.epoch;
        self.durable = info.epoch;
    }

    fn extend(&mut self, info: FrameInfo) {
        assert_eq!(
            info.epoch,
            self.tip.epoch.next(),
            "epochs form a total order"
        );
        assert_eq!(info.offset, self.tail, "frames are contiguous");
        self.tip = Tip {
            epoch: info.epoch,
            chain: info.chain,
        };
        self.tail = LogOffset(info.offset.0 + info.bytes);
        self.index.push_back(info);
    }

    /// Appends an epoch; it is written by the next [`Self::submit`].
    pub fn append(&mut self, sealed: Sealed) {
        self.extend(FrameInfo {
            epoch: sealed.header.epoch,
            chain: sealed.chain,
            offset: sealed.header.offset,
            bytes: sealed.header.frame_bytes,
            sealed_ms: sealed.header.sealed_ms,
            rank: sealed.header.rank(),
        });
        self.sealed.push_back(sealed);
    }

    /// The sealed epoch, if it is not destaged yet.
    #[must_use]
    pub fn sealed(&self, epoch: Epoch) -> Option<&Sealed> {
        let first = self.sealed.front()?.header.epoch;
        let index = usize::try_from(epoch.0.checked_sub(first.0)?).ok()?;
        self.sealed.get(index)
    }

    /// As [`Self::sealed`], to change it.
    pub fn sealed_mut(&mut self, epoch: Epoch) -> Option<&mut Sealed> {
        let first = self.sealed.front()?.header.epoch;
        let index = usize::try_from(epoch.0.checked_sub(first.0)?).ok()?;
        self.sealed.get_mut(index)
    }

    /// Where the durable frames from `next` on lie, up to about so many bytes of them but at least
    /// one.
    #[must_use]
    pub fn run(&self, next: Epoch, most_bytes: u64) -> Option<(LogOffset, Vec<(Epoch, u64)>)> {
        let (mut frames, mut bytes) = (Vec::new(), 0);
        let mut epoch = next;
        while epoch <= self.durable
            && let Some(info) = self.info(epoch)
            && (frames.is_empty() || bytes + info.bytes <= most_bytes)
        {
            frames.push((epoch, info.bytes));
            bytes += info.bytes;
            epoch = epoch.next();
        }
        let offset = self.info(next).filter(|_| !frames.is_empty())?.offset;
        Some((offset, frames))
    }

    /// The frame of an epoch, if it is kept.
    #[must_use]
    pub fn info(&self, epoch: Epoch) -> Option<&FrameInfo> {
        let index = usize::try_from(epoch.0.checked_sub(self.base.epoch.0 + 1)?).ok()?;
        self.index.get(index)
    }

    /// The last epoch that was sealed before this term, as far as the log is kept.
    pub fn before_term(&self, counter: u64) -> Epoch {
        let older = self.index.partition_point(|info| info.rank.term < counter);
        Epoch(self.base.epoch.0 + older as u64)
    }

    /// The chain hash of an epoch, if the log still knows it.
    #[must_use]
    pub fn chain(&self, epoch: Epoch) -> Option<ChainHash> {
        if epoch == self.base.epoch {
            return Some(self.base.chain);
        }
        self.info(epoch).map(|info| info.chain)
    }

    /// Starts writing what is waiting, as far as batches are free.
    pub fn submit(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        while self.submitted < self.tip.epoch && self.batches.len() < BATCHES {
            let start = usize::try_from(
                self.submitted.0 + 1 - self.sealed.front().map_or(0, |first| first.header.epoch.0),
            )
            .expect("what is not submitted is in memory");
            let offset = self.sealed[start].header.offset;
            let first_seg = out.segs.len();
            let mut slots = 0;
            let mut last = self.submitted;
            for sealed in self.sealed.iter().skip(start) {
                let frame_slots = sealed.header.frame_bytes / SLOT;
                if slots > 0 && slots + frame_slots > BATCH_SLOTS {
                    break;
                }
                let stamp = Stamp {
                    session: self.session,
                    durable_through: self.durable,
                };
                stamp.encode(mem.bytes_mut(sealed.head[0]));
                let payload = sealed.blocks.iter().map(|dirty| dirty.slot);
                for slot in sealed.head.iter().copied().chain(payload) {
                    out.segs.push(Seg {
                        slot,
                        offset: 0,
                        bytes: 4096,
                    });
                }
                slots += frame_slots;
                last = sealed.header.epoch;
            }
            assert_eq!(
                (out.segs.len() - first_seg) as u64,
                slots,
                "a frame is its slots"
            );
            self.submitted = last;
            let segs = first_seg..out.segs.len();
            self.submit_batch(offset, last, segs, out);
        }
    }

    fn submit_batch(
        &mut self,
        offset: LogOffset,
        last: Epoch,
        segs: Range<usize>,
        out: &mut Actions,
    ) {
        let id = self.next_batch;
        self.next_batch += 1;
        let mut parts: Vec<(u64, Range<usize>)> = Vec::new();
        let mut logical = offset.0;
        let mut next = segs.start;
        while next < segs.end {
            let in_ring = logical % self.ring_bytes;
            let to_end = usize::try_from((self.ring_bytes - in_ring) / SLOT).unwrap_or(usize::MAX);
            let count = (segs.end - next).min(to_end).min(WRITE_SLOTS);
            parts.push((RING_START + in_ring, next..next + count));
            next += count;
            logical += count as u64 * SLOT;
        }
        let flushes = !planted(Mutant::NoLogFlush);
        let single = parts.len() == 1;
        let writes_left = parts.len();
        for (offset, segs) in parts {
            let io = Io::Write {
                disk: Disk::Log,
                offset,
                segs,
                then_fsync: single && flushes,
            };
            out.push(Action::Io {
                token: IoToken::LogWrite(id),
                io,
            });
        }
        let flush_after = !single;
        self.batches.push_back(Batch {
            id,
            last,
            writes_left,
            flush_after,
            done: false,
        });
    }

    /// Takes the completion of a write or flush. Returns true if more epochs are durable now; the
    /// heads of their frames are to be freed.
    pub fn io_done(&mut self, id: u64, flushed: bool, out: &mut Actions) -> bool {
        let batch = self.batches.iter_mut().find(|batch| batch.id == id);
        let batch = batch.expect("completions name batches that are on their way");
        if flushed {
            batch.done = true;
        } else {
            batch.writes_left -= 1;
            if batch.writes_left > 0 {
                return false;
            }
            if batch.flush_after {
                let io = Io::Fsync { disk: Disk::Log };
                out.push(Action::Io {
                    token: IoToken::LogFsync(id),
                    io,
                });
                return false;
            }
            batch.done = true;
        }
        let before = self.durable;
        if planted(Mutant::DurableOutOfOrder) {
            let done = self.batches.iter().filter(|batch| batch.done);
            self.durable = done.map(|batch| batch.last).max().unwrap_or(before);
        }
        while self.batches.front().is_some_and(|batch| batch.done) {
            self.durable = self
                .batches
                .pop_front()
                .map_or(self.durable, |batch| batch.last.max(self.durable));
        }
        self.durable > before
    }

    /// Frees the heads of frames that became durable after `before`.
    pub fn free_heads(&mut self, mem: &mut dyn SlotMemory, before: Epoch) {
        let Some(first) = self.sealed.front().map(|sealed| sealed.header.epoch.0) else {
            return;
        };
        // Epochs are gapless. There may be thousands that are not destaged yet, and this is done
        // for every flush: none but the ones in question are looked at.
        let place = |epoch: Epoch| {
            let place = usize::try_from((epoch.0 + 1).saturating_sub(first));
            place.map_or(self.sealed.len(), |place| place.min(self.sealed.len()))
        };
        let range = place(before)..place(self.durable).max(place(before));
        for sealed in self.sealed.range_mut(range) {
            for slot in sealed.head.drain(..) {
                mem.free(slot);
            }
        }
    }

    /// Forgets frames up to and including `retained`, whose space may be reused now.
    pub fn forget(&mut self, retained: Tip) {
        while self
            .index
            .front()
            .is_some_and(|info| info.epoch <= retained.epoch)
        {
            if let Some(info) = self.index.pop_front() {
                self.base = Tip {
                    epoch: info.epoch,
                    chain: info.chain,
                };
                self.base_offset = LogOffset(info.offset.0 + info.bytes);
                self.base_rank = info.rank;
            }
        }
    }

    /// Drops all epochs after `last` and returns them. Nothing may be on its way to the medium.
    pub fn truncate(&mut self, last: Tip, session: u64) -> Vec<Sealed> {
        assert!(
            self.batches.is_empty(),
            "a truncation waits for writes that are on their way"
        );
        while self
            .index
            .back()
            .is_some_and(|info| info.epoch > last.epoch)
        {
            self.index.pop_back();
        }
        let keep = self
            .sealed
            .iter()
            .take_while(|sealed| sealed.header.epoch <= last.epoch)
            .count();
        let dropped = self.sealed.drain(keep..).collect();
        self.tip = last;
        self.tail = self.index.back().map_or(self.base_offset, |info| {
            LogOffset(info.offset.0 + info.bytes)
        });
        self.submitted = self.submitted.min(last.epoch);
        self.durable = self.durable.min(last.epoch);
        self.session = session;
        dropped
    }
}
