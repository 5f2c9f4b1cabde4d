//! Replies of the transmission phase. Headers come in fixed arrays or go to a vector that the
//! caller reuses; data is never touched, so that it can be sent from where it lies.
//!
//! Clients without structured replies get simple ones. With them, reads, block status and errors
//! are structured; a plain success stays a simple reply, which the protocol allows and which is the
//! shortest. Not here: the order of replies, and sending.

use std::ops::Deref;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::Limits;
use super::handshake::Session;
use super::proto::{
    ChunkHeader, DataChunk, ErrorChunk, ExtentDescriptor, HoleChunk, MAX_STRING_BYTES,
    REPLY_FLAG_DONE, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, SimpleReply, reply_type,
};
use super::request::{ByteRange, Cookie, Refusal};

const HEADER_BYTES: usize = 32;
/// The part of a data chunk's length that is not data.
const OFFSET_BYTES: u32 = 8;
const _: () = assert!(
    size_of::<SimpleReply>() <= HEADER_BYTES
        && size_of::<DataChunk>() <= HEADER_BYTES
        && size_of::<HoleChunk>() <= HEADER_BYTES
);

/// The header of a reply, ready to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeaderBytes {
    bytes: [u8; HEADER_BYTES],
    length: usize,
}

impl HeaderBytes {
    fn of(header: &(impl IntoBytes + Immutable)) -> Self {
        let source = header.as_bytes();
        let mut bytes = [0; HEADER_BYTES];
        bytes[..source.len()].copy_from_slice(source);
        Self {
            bytes,
            length: source.len(),
        }
    }
}

impl Deref for HeaderBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// A part of a volume that has one state in a metadata context.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Length in bytes.
    pub length: u64,
    /// [`state_flag`](super::proto::state_flag).
    pub flags: u32,
}

/// Encodes the replies of one session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Replier {
    structured: bool,
    max_extents: usize,
}

impl Replier {
    /// The encoder for a session.
    #[must_use]
    pub fn new(session: &Session, limits: &Limits) -> Self {
        Self {
            structured: session.structured_replies,
            max_extents: limits.max_extents.max(1),
        }
    }

    /// Success of a command that is neither a read nor a block status.
    #[must_use]
    pub fn done(&self, cookie: Cookie) -> HeaderBytes {
        HeaderBytes::of(&simple(cookie, 0))
    }

    /// Ends a structured reply whose last chunk was not known to be the last; `None` if the client
    /// has no structured replies. Not needed after [`ReadReply`], which marks its last chunk.
    #[must_use]
    pub fn end(&self, cookie: Cookie) -> Option<HeaderBytes> {
        let header = chunk(cookie, reply_type::NONE, REPLY_FLAG_DONE, 0);
        self.structured.then(|| HeaderBytes::of(&header))
    }

    /// The reply to a read. All data must be in memory before the first header is sent: an error
    /// that is found later can only be reported by closing the connection, or, if chunks of the
    /// read are still to come, by an error in their place.
    #[must_use]
    pub fn read(&self, cookie: Cookie, range: ByteRange, df: bool) -> ReadReply {
        ReadReply {
            cookie,
            next: range.offset,
            left: range.length,
            structured: self.structured,
            whole: df || !self.structured,
        }
    }

    /// An error, to any command. Ends the reply.
    pub fn error(&self, cookie: Cookie, refusal: Refusal, out: &mut Vec<u8>) {
        self.error_with_tail(cookie, refusal, reply_type::ERROR, &[], out);
    }

    /// An error at a byte offset on the export, which must lie in the range of the request. Ends
    /// the reply. Clients without structured replies do not learn the offset.
    pub fn error_at(&self, cookie: Cookie, refusal: Refusal, offset: u64, out: &mut Vec<u8>) {
        let tail = U64::new(offset);
        self.error_with_tail(
            cookie,
            refusal,
            reply_type::ERROR_OFFSET,
            tail.as_bytes(),
            out,
        );
    }

    fn error_with_tail(
        &self,
        cookie: Cookie,
        refusal: Refusal,
        kind: u16,
        tail: &[u8],
        out: &mut Vec<u8>,
    ) {
        if !self.structured {
            out.extend_from_slice(simple(cookie, refusal.errno.wire()).as_bytes());
            return;
        }
        let text = shorten(refusal.reason, MAX_STRING_BYTES);
        let fixed = size_of::<ErrorChunk>() - size_of::<ChunkHeader>();
        let length = small(fixed + text.len() + tail.len());
        let error = ErrorChunk {
            header: chunk(cookie, kind, REPLY_FLAG_DONE, length),
            error: U32::new(refusal.errno.wire()),
            message_bytes: U16::new(u16::try_from(text.len()).expect("shortened to 4096 bytes")),
        };
        out.extend_from_slice(error.as_bytes());
        out.extend_from_slice(text.as_bytes());
        out.extend_from_slice(tail);
    }

    /// The reply to a block status in one context. Extents are taken from the start of the range,
    /// equal neighbours are merged, and what lies past the range is cut off. Without extents the
    /// whole range gets status 0, which is always true. The reply may end before the range does;
    /// the client then asks on.
    pub fn block_status(
        &self,
        cookie: Cookie,
        range: ByteRange,
        req_one: bool,
        context_id: u32,
        extents: impl IntoIterator<Item = Extent>,
        out: &mut Vec<u8>,
    ) {
        let limit = if req_one { 1 } else { self.max_extents };
        let start = out.len();
        out.resize(start + size_of::<ChunkHeader>(), 0);
        out.extend_from_slice(U32::new(context_id).as_bytes());
        let mut left = range.length;
        let mut count = 0;
        // The extent that may still grow: length and flags.
        let mut open: Option<(u32, u32)> = None;
        for extent in extents {
            let length = u32::try_from(extent.length).unwrap_or(u32::MAX).min(left);
            if length == 0 {
                continue;
            }
            open = match open {
                Some((grown, flags)) if flags == extent.flags => Some((grown + length, flags)),
                Some(_) if count + 1 == limit => break,
                Some((grown, flags)) => {
                    descriptor(grown, flags, out);
                    count += 1;
                    Some((length, extent.flags))
                }
                None => Some((length, extent.flags)),
            };
            left -= length;
            if left == 0 {
                break;
            }
        }
        let (length, flags) = open.unwrap_or((range.length, 0));
        descriptor(length, flags, out);
        let payload = small(out.len() - start - size_of::<ChunkHeader>());
        let header = chunk(cookie, reply_type::BLOCK_STATUS, REPLY_FLAG_DONE, payload);
        out[start..start + size_of::<ChunkHeader>()].copy_from_slice(header.as_bytes());
    }
}

/// The reply to one read, chunk by chunk in the order of offsets. The last chunk, which is the one
/// that reaches the end of the range, ends the reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadReply {
    cookie: Cookie,
    next: u64,
    left: u32,
    structured: bool,
    /// The reply must be one piece: asked for with DF, or for lack of structured replies.
    whole: bool,
}

impl ReadReply {
    /// Bytes that the reply does not cover yet; 0 when it is complete.
    #[must_use]
    pub fn left(&self) -> u32 {
        self.left
    }

    /// Everything that is left, as data: `left()` bytes follow the header. `None` when complete.
    pub fn rest(&mut self) -> Option<HeaderBytes> {
        self.data(self.left)
    }

    /// The next `length` bytes as data that follows the header. `None` if the length is 0 or past
    /// the range, or if the client needs the reply in one piece and this is not all of it.
    pub fn data(&mut self, length: u32) -> Option<HeaderBytes> {
        // Only a length of almost 4 GiB, which no export offers, would not fit its chunk.
        let bytes = length.checked_add(OFFSET_BYTES)?;
        let (offset, flags) = self.take(length)?;
        if !self.structured {
            return Some(HeaderBytes::of(&simple(self.cookie, 0)));
        }
        let header = chunk(self.cookie, reply_type::OFFSET_DATA, flags, bytes);
        Some(HeaderBytes::of(&DataChunk {
            header,
            offset: U64::new(offset),
        }))
    }

    /// The next `length` bytes as zeroes that are not sent. `None` where [`ReadReply::data`] gives
    /// none, and for clients without structured replies: send data instead.
    pub fn hole(&mut self, length: u32) -> Option<HeaderBytes> {
        if !self.structured {
            return None;
        }
        let (offset, flags) = self.take(length)?;
        let bytes = small(size_of::<HoleChunk>() - size_of::<ChunkHeader>());
        let header = chunk(self.cookie, reply_type::OFFSET_HOLE, flags, bytes);
        let hole = HoleChunk {
            header,
            offset: U64::new(offset),
            hole_bytes: U32::new(length),
        };
        Some(HeaderBytes::of(&hole))
    }

    fn take(&mut self, length: u32) -> Option<(u64, u16)> {
        let fits = length > 0 && length <= self.left && (!self.whole || length == self.left);
        if !fits {
            return None;
        }
        let offset = self.next;
        self.next += u64::from(length);
        self.left -= length;
        Some((offset, if self.left == 0 { REPLY_FLAG_DONE } else { 0 }))
    }
}

fn simple(cookie: Cookie, error: u32) -> SimpleReply {
    SimpleReply {
        magic: U32::new(SIMPLE_REPLY_MAGIC),
        error: U32::new(error),
        cookie: U64::new(cookie.0),
    }
}

fn chunk(cookie: Cookie, kind: u16, flags: u16, length: u32) -> ChunkHeader {
    ChunkHeader {
        magic: U32::new(STRUCTURED_REPLY_MAGIC),
        flags: U16::new(flags),
        reply_type: U16::new(kind),
        cookie: U64::new(cookie.0),
        length: U32::new(length),
    }
}

fn descriptor(length: u32, flags: u32, out: &mut Vec<u8>) {
    let descriptor = ExtentDescriptor {
        length: U32::new(length),
        flags: U32::new(flags),
    };
    out.extend_from_slice(descriptor.as_bytes());
}

fn small(length: usize) -> u32 {
    u32::try_from(length).expect("headers, texts and extents are bounded far below 4 GiB")
}

/// The longest start of a text that fits and does not cut a character.
fn shorten(text: &str, max_bytes: usize) -> &str {
    let cut = (0..=max_bytes.min(text.len()))
        .rev()
        .find(|&at| text.is_char_boundary(at));
    &text[..cut.unwrap_or(0)]
}
