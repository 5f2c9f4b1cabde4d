//! A volume in the calling thread: the same engine as a shard's, called instead of listening.
//!
//! For programs that bring their requests themselves, and for measuring what the engine costs
//! without sockets. The caller is the client: it copies payload in, is answered in
//! [`Embedded::wait`], and looks at the data of a read there, before its slots are used again.
//!
//! **Invariants.** A request is taken whole or refused with [`Busy`], and then nothing has
//! happened (P8). An answer to a plain write or read promises no more than NBD does; only a flush
//! makes durable. Dropping an [`Embedded`] is a crash: what was not flushed may be lost.
//!
//! Not here: peers, control requests, promotion.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hn4::types::BLOCK_BYTES;

use super::client::Asked;
use super::engine::{Asker, Engine};
use super::host::Host;
use super::link::{self, HandleEnd};
use super::open::{Opened, open_volume};
use super::transfer::{Write, blocks_of, sectors_of};
use super::{ShardError, ShardSetup};
use crate::arena::{Arena, SLOT_BYTES, SlotId, SlotMemory};
use crate::core::event::{Event, Failure, Request};
use crate::nbd::request::{ByteRange, Cookie};
use crate::ring::{Completion, RingError};

/// Back-pressure: overlay or open epoch have no room now. Call [`Embedded::wait`], then try again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Busy;

/// What came of a request.
pub struct Answer<'a> {
    /// The caller's name for the request.
    pub tag: u32,
    /// Whether it was done.
    pub result: Result<(), Failure>,
    read: Option<(ByteRange, &'a [SlotId])>,
    arena: &'a Arena,
}

impl Answer<'_> {
    /// The data of a read, in order, in pieces of at most 4096 bytes; nothing for other requests.
    pub fn data(&self) -> impl Iterator<Item = &[u8]> {
        let (range, slots) = self.read.unwrap_or((
            ByteRange {
                offset: 0,
                length: 0,
            },
            &[],
        ));
        let first = usize::try_from(range.offset % BLOCK_BYTES).expect("less than 4096");
        let end = first + range.length as usize;
        slots.iter().enumerate().map(move |(index, &slot)| {
            let from = if index == 0 { first } else { 0 };
            let to = (end - index * SLOT_BYTES).min(SLOT_BYTES);
            &self.arena.bytes(slot)[from..to]
        })
    }
}

/// Callers ask again for each answer by itself, so a read that waits for others leaves the device
/// with one less. Sockets bring several requests at once, and there a system call for each costs
/// more than that.
const READ_BATCH: u32 = 1;

/// See the module.
pub struct Embedded {
    engine: Engine,
    /// What the engine says to the rest of a daemon; nobody listens here.
    unheard: HandleEnd,
    completions: Vec<Completion>,
    size_bytes: u64,
    in_flight: usize,
}

impl Embedded {
    /// Opens a volume on the calling thread, where it stays. Sockets of the setup are not opened.
    ///
    /// # Errors
    /// [`ShardError`] says why it cannot be opened.
    pub fn open(setup: ShardSetup) -> Result<Self, ShardError> {
        let (end, unheard) = link::pair(Arc::new(|| {}));
        let Opened { mut engine, facts } = open_volume(setup, end.outbox, READ_BATCH)?;
        engine.tick();
        engine.step(Event::Timer);
        Ok(Self {
            engine,
            unheard,
            completions: Vec::with_capacity(4096),
            size_bytes: facts.identity.size_bytes,
            in_flight: 0,
        })
    }

    /// Size of the volume.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of the overlay that hold what is not in the backing yet.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.engine.volume.dirty_slots() as u64 * BLOCK_BYTES
    }

    /// Requests that were taken and not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes a write. Offset and length are multiples of 512 within the volume; the length is not
    /// zero and fits in an epoch with some company.
    ///
    /// # Errors
    /// [`Busy`] if there is no room now.
    ///
    /// # Panics
    /// If the range is not such a one: that is the caller's to check.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool, tag: u32) -> Result<(), Busy> {
        let length = u32::try_from(data.len()).expect("the length of a request is 32 bits");
        let range = self.checked(offset, length);
        let blocks = blocks_of(range);
        if !self.engine.volume.admits_now(blocks) {
            return Err(Busy);
        }
        let slots = self.engine.alloc_for_write(blocks).ok_or(Busy)?;
        let write = Write {
            cookie: Cookie(0),
            range,
            fua,
            slots,
            arrived: true,
        };
        write.copy_payload(0, data, self.engine.mem());
        let (lba, sectors) = sectors_of(range);
        let request = Request::Write {
            lba,
            sectors,
            fua,
            slots: write.slots,
        };
        self.ask(tag, None, request);
        Ok(())
    }

    /// Takes a read. The range is as for [`Self::write`].
    ///
    /// # Errors
    /// [`Busy`] if there is no room now.
    ///
    /// # Panics
    /// As [`Self::write`].
    pub fn read(&mut self, offset: u64, length: u32, tag: u32) -> Result<(), Busy> {
        let range = self.checked(offset, length);
        let slots = self.engine.alloc_for_read(blocks_of(range)).ok_or(Busy)?;
        let (lba, sectors) = sectors_of(range);
        let request = Request::Read {
            lba,
            sectors,
            slots: slots.clone(),
        };
        self.ask(tag, Some((range, false, slots)), request);
        Ok(())
    }

    /// Takes a flush: every write that was answered before is durable when it is answered.
    pub fn flush(&mut self, tag: u32) {
        self.ask(tag, None, Request::Flush);
    }

    fn checked(&self, offset: u64, length: u32) -> ByteRange {
        let end = offset.checked_add(u64::from(length));
        assert!(
            length > 0
                && end.is_some_and(|end| end <= self.size_bytes)
                && offset.is_multiple_of(512)
                && length.is_multiple_of(512),
            "{length} bytes at {offset} are no sectors of a volume of {} bytes",
            self.size_bytes
        );
        ByteRange { offset, length }
    }

    fn ask(&mut self, tag: u32, read: Option<(ByteRange, bool, Vec<SlotId>)>, request: Request) {
        self.in_flight += 1;
        let asked = Asked {
            client: tag,
            generation: 0,
            cookie: Cookie(0),
            read,
        };
        self.engine.request(asked, request);
    }

    /// Lets the engine work and hands over the answers that are there. Waits for at least one if
    /// requests are in flight, else for anything that frees room, in both cases not longer than
    /// `patience`.
    ///
    /// # Errors
    /// If the ring is of no more use.
    pub fn wait(
        &mut self,
        patience: Duration,
        mut answered: impl FnMut(Answer<'_>),
    ) -> Result<(), RingError> {
        let ready = !self.engine.answers.is_empty();
        let deadline = self.engine.until_deadline();
        let timeout = deadline.map_or(patience, |deadline| deadline.min(patience));
        let least = usize::from(!ready);
        self.engine
            .ring
            .wait(least, Some(timeout), &mut self.completions)?;
        self.engine.tick();
        for completion in self.completions.drain(..) {
            self.engine.disk_done(completion);
        }
        if self.engine.until_deadline() == Some(Duration::ZERO) {
            self.engine.step(Event::Timer);
        }
        self.engine.disks.retry(&mut self.engine.ring);
        self.engine.tell();
        self.unheard.discard();
        while let Some((asker, result)) = self.engine.answers.pop_front() {
            let Asker::Here(asked) = asker else {
                unreachable!("there are no other threads");
            };
            self.in_flight -= 1;
            let read = asked.read.as_ref();
            answered(Answer {
                tag: asked.client,
                result,
                read: read.map(|(range, _, slots)| (*range, slots.as_slice())),
                arena: self.engine.ring.arena(),
            });
            asked.release(&mut self.engine);
        }
        Ok(())
    }

    /// Stops taking writes and writes everything back. False if the volume has failed closed, or
    /// `patience` is over before that is done.
    ///
    /// # Errors
    /// If the ring is of no more use.
    pub fn drain(&mut self, patience: Duration) -> Result<bool, RingError> {
        let by = Instant::now() + patience;
        self.engine.volume.stop();
        self.engine.tick();
        self.engine.step(Event::Timer);
        while !self.engine.volume.is_clean() {
            let left = by.saturating_duration_since(Instant::now());
            if self.engine.volume.failed().is_some() || left.is_zero() {
                return Ok(false);
            }
            self.wait(left, |_| {})?;
        }
        Ok(true)
    }
}
