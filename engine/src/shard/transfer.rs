//! What moves between a connection and the overlay: payload on its way in, replies on their way
//! out.

use hn4::types::{BLOCK_BYTES, Lba, SECTOR_BYTES};

use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};
use crate::nbd::reply::HeaderBytes;
use crate::nbd::request::{ByteRange, Cookie};
use crate::ring::{Seg, SegSource};

/// Segments in one transfer; the ring is made for a few more.
pub(super) const SEGMENTS: usize = 256;

/// A write whose payload is arriving, or has arrived and waits for room in the open epoch.
pub(super) struct Write {
    pub(super) cookie: Cookie,
    pub(super) range: ByteRange,
    pub(super) fua: bool,
    pub(super) slots: Vec<SlotId>,
    pub(super) arrived: bool,
}

/// An answer to a client that waits to be sent.
pub(super) enum Reply {
    Bytes(Vec<u8>),
    Header(HeaderBytes),
    Read {
        header: HeaderBytes,
        range: ByteRange,
        slots: Vec<SlotId>,
        sent: usize,
    },
}

impl Write {
    fn first_offset(&self) -> usize {
        usize::try_from(self.range.offset % BLOCK_BYTES).expect("less than 4096")
    }

    /// Copies payload that came through the buffer to its slots.
    pub(super) fn copy_payload(&self, at: u32, mut bytes: &[u8], mem: &mut dyn SlotMemory) {
        let mut position = self.first_offset() + at as usize;
        while !bytes.is_empty() {
            let offset = position % SLOT_BYTES;
            let count = bytes.len().min(SLOT_BYTES - offset);
            let (now, later) = bytes.split_at(count);
            let slot = self.slots[position / SLOT_BYTES];
            mem.bytes_mut(slot)[offset..offset + count].copy_from_slice(now);
            position += count;
            bytes = later;
        }
    }

    /// Appends segments for the last `left` bytes of payload, at most so many, and returns how many
    /// bytes they take.
    pub(super) fn push_rest(&self, left: u32, segments: usize, segs: &mut Vec<Seg>) -> u32 {
        let mut position = self.first_offset() + (self.range.length - left) as usize;
        let end = self.first_offset() + self.range.length as usize;
        let mut taken = 0;
        while position < end && segs.len() < segments {
            let offset = position % SLOT_BYTES;
            let count = (end - position).min(SLOT_BYTES - offset);
            let length = u32::try_from(count).expect("at most 4096");
            let offset = u32::try_from(offset).expect("less than 4096");
            segs.push(Seg::slot(self.slots[position / SLOT_BYTES], offset, length));
            position += count;
            taken += length;
        }
        taken
    }
}

/// Packs replies into one send.
pub(super) struct Packer<'a> {
    pub(super) segs: &'a mut Vec<Seg>,
    pub(super) used: usize,
    pub(super) done: &'a mut Vec<SlotId>,
}

impl Packer<'_> {
    /// Adds a reply, or as much of a long read as fits. True if it is complete.
    pub(super) fn add(&mut self, reply: &mut Reply, buf: &mut [u8]) -> bool {
        match reply {
            Reply::Bytes(bytes) => {
                if self.segs.len() >= SEGMENTS {
                    return false;
                }
                let count = bytes.len().min(buf.len() - self.used);
                let taken: Vec<u8> = bytes.drain(..count).collect();
                self.add_bytes(&taken, buf) && bytes.is_empty()
            }
            Reply::Header(header) => self.add_bytes(header, buf),
            Reply::Read {
                header,
                range,
                slots,
                sent,
            } => {
                if *sent == 0 && (self.segs.len() + 2 > SEGMENTS || !self.add_bytes(header, buf)) {
                    return false;
                }
                let first = usize::try_from(range.offset % BLOCK_BYTES).expect("less than 4096");
                let end = first + range.length as usize;
                while *sent < slots.len() && self.segs.len() < SEGMENTS {
                    let slot = slots[*sent];
                    let from = if *sent == 0 { first } else { 0 };
                    let to = (end - *sent * SLOT_BYTES).min(SLOT_BYTES);
                    let length = u32::try_from(to - from).expect("at most 4096");
                    let from = u32::try_from(from).expect("less than 4096");
                    self.segs.push(Seg::slot(slot, from, length));
                    self.done.push(slot);
                    *sent += 1;
                }
                *sent == slots.len()
            }
        }
    }

    fn add_bytes(&mut self, bytes: &[u8], buf: &mut [u8]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        if self.used + bytes.len() > buf.len() || self.segs.len() >= SEGMENTS {
            return false;
        }
        buf[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        let offset = u32::try_from(self.used).expect("a small buffer");
        let length = u32::try_from(bytes.len()).expect("a small buffer");
        match self.segs.last_mut() {
            Some(Seg {
                source: SegSource::Buf,
                offset: at,
                len,
            }) if *at + *len == offset => {
                *len += length;
            }
            _ => self.segs.push(Seg::buf(offset, length)),
        }
        self.used += bytes.len();
        true
    }
}

/// Blocks that a range touches.
pub(super) fn blocks_of(range: ByteRange) -> usize {
    let first = range.offset / BLOCK_BYTES;
    let end = range.end().div_ceil(BLOCK_BYTES);
    usize::try_from(end - first).expect("requests are bounded")
}

/// A range in the core's units.
pub(super) fn sectors_of(range: ByteRange) -> (Lba, u32) {
    let sectors = u64::from(range.length) / SECTOR_BYTES;
    (
        Lba(range.offset / SECTOR_BYTES),
        u32::try_from(sectors).expect("a length is 32 bits"),
    )
}
