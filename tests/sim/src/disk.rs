//! A disk with a volatile cache.
//!
//! What was written is visible to reads at once, but survives a crash for certain only if a flush
//! that *began* after the write's completion has completed. At a crash every other write (also one
//! that never completed) has persisted wholly, not at all, or sector by sector at random, and on
//! some disks a sector may even be left half old and half new; writes to the same sector persist in
//! order. On some disks a physical sector is eight of these, and one that is being written when the
//! power fails may come out as rubbish, with all that is in it. Two writes to the same sector at
//! the same time have no order at all; a core that issues them is wrong, and the disk says so.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use hn4_engine::core::recovery::{AlignedBlock, Medium};

use crate::pages::Pages;
use crate::rng::Rng;

/// Sectors are what a device writes atomically.
pub(crate) const SECTOR: usize = 512;
/// Physical sectors of those disks that have larger ones.
const PHYSICAL: usize = 4096;
/// What is in a physical sector that was damaged.
const DAMAGED: u8 = 0xDB;

/// Buffers that are kept.
const SPARE: usize = 64;

/// A write that is not surely durable.
#[derive(Debug)]
struct Pending {
    id: u64,
    offset: usize,
    /// What it writes; once it is completed, what it replaced.
    data: Vec<u8>,
    /// Set when the write completes: its place in the order of completions.
    completed: Option<u64>,
}

impl Pending {
    fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.data.len()
    }
}

/// What a disk did in a run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DiskFaults {
    /// Writes that a crash tore.
    pub(crate) torn: u64,
    /// Writes that a crash lost.
    pub(crate) lost_in_cache: u64,
    /// Physical sectors that a crash damaged, of which only a part was being written.
    pub(crate) neighbours: u64,
}

/// How a disk behaves in a power loss.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tears {
    /// A sector may be left half old and half new.
    pub(crate) shears: bool,
    /// All of a physical sector may be damaged, also what was not being written.
    pub(crate) physical: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct SimDisk {
    /// What a read sees. What is durable is this without what `pending` did.
    seen: Pages,
    /// Completed ones in the order of completion, which is the order of persistence.
    pending: VecDeque<Pending>,
    /// Buffers to use again.
    spare: Vec<Vec<u8>>,
    completions: u64,
    /// Synchronous operations until the node dies in the middle of recovery.
    pub(crate) dies_after: Option<u64>,
    next_id: u64,
    /// What happened so far.
    pub(crate) faults: DiskFaults,
}

impl SimDisk {
    /// A disk full of zeroes.
    #[must_use]
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            seen: Pages::new(bytes),
            pending: VecDeque::new(),
            spare: Vec::new(),
            completions: 0,
            dies_after: None,
            next_id: 1 << 62,
            faults: DiskFaults::default(),
        }
    }

    /// Sets contents that are durable from the start.
    pub(crate) fn format(&mut self, bytes: &[u8]) {
        self.seen.change(0..bytes.len()).copy_from_slice(bytes);
    }

    /// What a read sees.
    #[must_use]
    pub(crate) fn contents(&self) -> &[u8] {
        self.seen.all()
    }

    /// Fills the buffer.
    pub(crate) fn read(&self, offset: usize, buffer: &mut [u8]) {
        self.seen.read(offset, buffer);
    }

    /// An empty buffer for a write of so many bytes.
    #[must_use]
    pub(crate) fn buffer(&mut self, length: usize) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.reserve_exact(length);
        buffer
    }

    fn recycle(&mut self, mut buffer: Vec<u8>) {
        if self.spare.len() < SPARE {
            buffer.clear();
            self.spare.push(buffer);
        }
    }

    /// A write is on its way.
    ///
    /// # Errors
    /// If another one to the same place is, too.
    pub(crate) fn start_write(
        &mut self,
        id: u64,
        offset: usize,
        data: Vec<u8>,
    ) -> Result<(), String> {
        assert!(offset.is_multiple_of(SECTOR) && data.len().is_multiple_of(SECTOR));
        let write = Pending {
            id,
            offset,
            data,
            completed: None,
        };
        if write.range().end > self.seen.len() {
            return Err(format!("a write to {:?} is beyond the end", write.range()));
        }
        let in_flight = self
            .pending
            .iter()
            .filter(|other| other.completed.is_none());
        for other in in_flight {
            let (a, b) = (write.range(), other.range());
            if a.start < b.end && b.start < a.end {
                return Err(format!("writes to {a:?} and {b:?} at the same time"));
            }
        }
        self.pending.push_back(write);
        Ok(())
    }

    fn take(&mut self, id: u64) -> Pending {
        let index = self.pending.iter().position(|write| write.id == id);
        let index = index.expect("it was started");
        self.pending.remove(index).expect("it was found there")
    }

    /// A write completed.
    pub(crate) fn finish_write(&mut self, id: u64) {
        let write = self.take(id);
        self.complete(write);
    }

    fn complete(&mut self, mut write: Pending) {
        self.completions += 1;
        write.completed = Some(self.completions);
        self.seen
            .change(write.range())
            .swap_with_slice(&mut write.data);
        self.pending.push_back(write);
    }

    /// A write failed: whatever part of it arrived may be there or not.
    pub(crate) fn fail_write(&mut self, id: u64, rng: &mut Rng) {
        if rng.one_in(2) {
            return self.finish_write(id);
        }
        let _ = self.lose_write(id);
    }

    /// Nothing of a write arrives: where it should have.
    pub(crate) fn lose_write(&mut self, id: u64) -> Range<usize> {
        let write = self.take(id);
        let range = write.range();
        self.recycle(write.data);
        range
    }

    /// A write arrives at another place, at least for as much of it as there is room: where it
    /// should have, and where it did.
    pub(crate) fn misdirect_write(&mut self, id: u64, rng: &mut Rng) -> [Range<usize>; 2] {
        let mut write = self.take(id);
        let meant = write.range();
        let places = (self.seen.len() - write.data.len()) / SECTOR;
        write.offset = rng.index(places + 1) * SECTOR;
        let in_flight = |other: &&Pending| {
            let (a, b) = (write.range(), other.range());
            other.completed.is_none() && a.start < b.end && b.start < a.end
        };
        if self.pending.iter().any(|other| in_flight(&other)) {
            self.recycle(write.data);
            return [meant.clone(), meant];
        }
        let found = write.range();
        self.complete(write);
        [meant, found]
    }

    /// A flush begins; the result names what it covers.
    #[must_use]
    pub(crate) fn start_flush(&self) -> u64 {
        self.completions
    }

    /// The flush is done: all that had completed when it began is durable.
    pub(crate) fn finish_flush(&mut self, covers: u64) {
        for _ in 0..self.pending.len() {
            let Some(write) = self.pending.pop_front() else {
                break;
            };
            if write.completed.is_some_and(|completed| completed <= covers) {
                self.recycle(write.data);
            } else {
                self.pending.push_back(write);
            }
        }
    }

    /// Power is lost.
    ///
    /// Also what was not being written may be damaged, see [`Tears`].
    pub(crate) fn crash(&mut self, tears: Tears, rng: &mut Rng) {
        let shears = tears.shears;
        let mut pending = std::mem::take(&mut self.pending);
        // Back to what is durable, the newest first; what each wrote is in its hands again.
        for write in pending.iter_mut().rev() {
            if write.completed.is_some() {
                self.seen
                    .change(write.range())
                    .swap_with_slice(&mut write.data);
            }
        }
        for write in pending {
            let fate = rng.below(4);
            for (index, sector) in write.data.chunks_exact(SECTOR).enumerate() {
                let persists = match fate {
                    0 => true,
                    1 => false,
                    2 => rng.one_in(2),
                    _ => rng.below(8) != 0,
                };
                let at = write.offset + index * SECTOR;
                if persists {
                    self.seen.change(at..at + SECTOR).copy_from_slice(sector);
                } else if shears && fate >= 2 && rng.one_in(2) {
                    let half = rng.index(SECTOR);
                    self.seen
                        .change(at..at + half)
                        .copy_from_slice(&sector[..half]);
                }
            }
            if tears.physical && fate >= 2 {
                self.damage(write.range(), rng);
            }
            self.faults.torn += u64::from(fate >= 2);
            self.faults.lost_in_cache += u64::from(fate == 1);
            self.recycle(write.data);
        }
        self.dies_after = None;
    }

    /// Some of the physical sectors at this place were being written.
    fn damage(&mut self, range: Range<usize>, rng: &mut Rng) {
        let first = range.start / PHYSICAL * PHYSICAL;
        for at in (first..range.end).step_by(PHYSICAL) {
            if rng.one_in(2) {
                let whole = range.start <= at && at + PHYSICAL <= range.end;
                self.faults.neighbours += u64::from(!whole);
                self.seen.change(at..at + PHYSICAL).fill(DAMAGED);
            }
        }
    }

    /// A bit flips on the medium.
    pub(crate) fn rot(&mut self, offset: usize, bit: u8) {
        self.seen.change(offset..offset + 1)[0] ^= 1 << bit;
    }

    fn alive(&mut self) -> io::Result<()> {
        if let Some(left) = &mut self.dies_after {
            *left = left
                .checked_sub(1)
                .ok_or_else(|| io::Error::other("the node died"))?;
        }
        Ok(())
    }
}

impl Medium for SimDisk {
    fn read(&mut self, offset: u64, blocks: &mut [AlignedBlock]) -> io::Result<()> {
        self.alive()?;
        let mut at = usize::try_from(offset).expect("disks are small");
        for block in blocks {
            Self::read(self, at, &mut block.0);
            at += block.0.len();
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, blocks: &[AlignedBlock]) -> io::Result<()> {
        let mut at = usize::try_from(offset).expect("disks are small");
        for block in blocks {
            self.next_id += 1;
            let id = self.next_id;
            let mut data = self.buffer(block.0.len());
            data.extend_from_slice(&block.0);
            let started = self.start_write(id, at, data);
            started.map_err(io::Error::other)?;
            self.alive()?;
            self.finish_write(id);
            at += block.0.len();
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.alive()?;
        let covers = self.start_flush();
        self.finish_flush(covers);
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        self.seen.len() as u64
    }
}
