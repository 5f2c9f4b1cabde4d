//! Frames: numbered, checked and authenticated pieces of a stream.
//!
//! ```text
//!  0  version     u8   1
//!  1  kind        u8   1 data, 2 control, 3 heartbeat, 4 error
//!  2  compression u8   0 none, 2 scxq2: what follows the head of a bulk message is a segment of
//!                      SCXQ2; only where it was negotiated (1 lz4: never)
//!  3  flags       u8   bit 0 ack_required, bit 1 data stream, others 0
//!  4  length      u32  bytes of payload
//!  8  sequence    u64  1, 2, 3 ... per stream and direction
//! 16  payload
//!     CRC-32      u32  (IEEE) over header and payload
//!     HMAC-SHA-256, 32 bytes, over header, payload and CRC
//! ```
//!
//! All little-endian. The HMAC key belongs to one session, one direction and one stream, and comes
//! from the TLS exporter, so a frame is bound to its channel: recorded elsewhere it is worthless.
//! The stream is named in the flags as well, so that a frame says by itself where it belongs.
//!
//! The sequence makes a lost, repeated or reordered frame visible. Any failed check ends the stream
//! for good: an opener that has returned an error returns it for ever after.

use bytes::{Buf, Bytes, BytesMut};
use ring::hmac;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes before the payload.
pub const HEADER_BYTES: usize = size_of::<Header>();
/// Bytes after the payload: CRC and HMAC.
pub const TRAILER_BYTES: usize = CRC_BYTES + HMAC_BYTES;

const CRC_BYTES: usize = 4;
const HMAC_BYTES: usize = 32;
const VERSION: u8 = 1;
const COMPRESSION_NONE: u8 = 0;
const COMPRESSION_SCXQ2: u8 = 2;
const FLAG_ACK_REQUIRED: u8 = 1;
const FLAG_DATA_STREAM: u8 = 2;

const _: () = assert!(HEADER_BYTES == 16);

/// The header as it lies on the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    version: u8,
    kind: u8,
    compression: u8,
    flags: u8,
    payload_bytes: U32,
    sequence: U64,
}

/// The two streams of a session. A full data stream never holds up the control stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stream {
    /// Hello, acks, anchors, credit, heartbeats, errors.
    Control,
    /// Epochs and pieces of full copies.
    Data,
}

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameKind {
    /// A bulk message, see [`data`](super::data).
    Data,
    /// A control message, see [`control`](super::control).
    Control,
    /// A heartbeat or the answer to one.
    Heartbeat,
    /// The last frame of a session: why it ends.
    Error,
}

impl FrameKind {
    fn to_wire(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::Control => 2,
            Self::Heartbeat => 3,
            Self::Error => 4,
        }
    }

    fn from_wire(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::Data),
            2 => Some(Self::Control),
            3 => Some(Self::Heartbeat),
            4 => Some(Self::Error),
            _ => None,
        }
    }
}

/// What is wrong with bytes that should be a frame or a message.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// The frame is of a version this code does not know.
    #[error("frame version {found}; this node speaks version {VERSION}")]
    Version {
        /// The version in the header.
        found: u8,
    },
    /// The kind is unknown, or not legal on this stream.
    #[error("frame kind {found} on the {stream:?} stream")]
    Kind {
        /// The kind in the header.
        found: u8,
        /// Where it came.
        stream: Stream,
    },
    /// The payload is compressed in a way that was not negotiated.
    #[error("frame compression {found}, which was not negotiated")]
    Compression {
        /// The code in the header.
        found: u8,
    },
    /// Reserved flags are set, or the frame belongs to the other stream.
    #[error("frame flags {found:#04x} on the {stream:?} stream")]
    Flags {
        /// The flags in the header.
        found: u8,
        /// Where it came.
        stream: Stream,
    },
    /// The announced payload is larger than this stream allows.
    #[error("frame payload of {found} bytes; the limit on this stream is {limit}")]
    TooLong {
        /// The length in the header.
        found: u64,
        /// The limit.
        limit: usize,
    },
    /// A frame was lost, repeated or reordered.
    #[error("frame sequence {found}, expected {expected}")]
    Sequence {
        /// The sequence in the header.
        found: u64,
        /// The one that should have come.
        expected: u64,
    },
    /// The CRC-32 does not match: the frame was damaged.
    #[error("frame {sequence} is damaged: its CRC-32 does not match")]
    Crc {
        /// Sequence in the header.
        sequence: u64,
    },
    /// The HMAC does not match: the frame was not made for this channel.
    #[error("frame {sequence} is not authentic: its HMAC does not match")]
    Hmac {
        /// Sequence in the header.
        sequence: u64,
    },
    /// The payload is not a message.
    #[error("malformed message: {0}")]
    Message(String),
}

/// Which stream the frame at the start of these bytes says it belongs to; none, if they are shorter
/// than a header. For transports that carry both streams in one; the opener checks it again.
#[must_use]
pub fn stream_of(frame: &[u8]) -> Option<Stream> {
    let (header, _) = Header::ref_from_prefix(frame).ok()?;
    let is_data = header.flags & FLAG_DATA_STREAM != 0;
    Some(if is_data {
        Stream::Data
    } else {
        Stream::Control
    })
}

/// Secrets of one stream of a session, 32 bytes for each direction.
#[derive(Clone)]
pub struct StreamKeys {
    /// Authenticates what we send.
    pub send: [u8; 32],
    /// Authenticates what we receive.
    pub receive: [u8; 32],
}

/// Secrets of one session.
#[derive(Clone)]
pub struct SessionKeys {
    /// Of the control stream.
    pub control: StreamKeys,
    /// Of the data stream.
    pub data: StreamKeys,
}

/// A frame ready to be sent: three slices that follow one another, so that bulk bytes are not
/// copied to stand between header and trailer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WireFrame {
    /// Frame header and message header.
    pub head: Bytes,
    /// Bulk bytes; may be empty.
    pub body: Bytes,
    /// CRC and HMAC.
    pub tail: Bytes,
}

impl WireFrame {
    /// Bytes on the wire.
    #[must_use]
    pub fn wire_bytes(&self) -> usize {
        self.head.len() + self.body.len() + self.tail.len()
    }

    /// The frame in one piece; copies.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        let mut whole = BytesMut::with_capacity(self.wire_bytes());
        whole.extend_from_slice(&self.head);
        whole.extend_from_slice(&self.body);
        whole.extend_from_slice(&self.tail);
        whole.freeze()
    }
}

/// Makes the frames of one stream in one direction.
pub struct FrameSealer {
    key: hmac::Key,
    stream: Stream,
    last_sequence: u64,
}

impl FrameSealer {
    /// Starts a stream; its first frame will have sequence 1.
    #[must_use]
    pub fn new(stream: Stream, key: &[u8; 32]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, key),
            stream,
            last_sequence: 0,
        }
    }

    /// Sequence of the frame that was made last, 0 before the first.
    #[must_use]
    pub fn last_sequence(&self) -> u64 {
        self.last_sequence
    }

    /// Makes the next frame, whose payload is `message` followed by `body`.
    ///
    /// # Panics
    ///
    /// If the payload is longer than [`MAX_FRAME_BYTES`](super::MAX_FRAME_BYTES): the session
    /// bounds what it sends.
    pub fn seal(
        &mut self,
        kind: FrameKind,
        ack_required: bool,
        message: &[u8],
        body: Bytes,
    ) -> WireFrame {
        self.seal_as(COMPRESSION_NONE, kind, ack_required, message, body)
    }

    /// Makes the next frame of a bulk message whose bytes were packed: `head` is that of the raw
    /// message, `segment` is what stands for its bytes.
    ///
    /// # Panics
    ///
    /// As [`seal`](Self::seal).
    pub fn seal_packed(&mut self, head: &[u8], segment: Bytes) -> WireFrame {
        self.seal_as(COMPRESSION_SCXQ2, FrameKind::Data, true, head, segment)
    }

    fn seal_as(
        &mut self,
        compression: u8,
        kind: FrameKind,
        ack_required: bool,
        message: &[u8],
        body: Bytes,
    ) -> WireFrame {
        let payload = message.len() + body.len();
        assert!(
            payload <= super::MAX_FRAME_BYTES,
            "the session bounds what it sends"
        );
        let payload_bytes = u32::try_from(payload).expect("16 MiB fit into 32 bits");
        self.last_sequence += 1;
        let stream_flag = if self.stream == Stream::Data {
            FLAG_DATA_STREAM
        } else {
            0
        };
        let ack_flag = if ack_required { FLAG_ACK_REQUIRED } else { 0 };
        let header = Header {
            version: VERSION,
            kind: kind.to_wire(),
            compression,
            flags: stream_flag | ack_flag,
            payload_bytes: payload_bytes.into(),
            sequence: self.last_sequence.into(),
        };
        let mut head = BytesMut::with_capacity(HEADER_BYTES + message.len());
        head.extend_from_slice(header.as_bytes());
        head.extend_from_slice(message);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&head);
        crc.update(&body);
        let crc = crc.finalize().to_le_bytes();
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&head);
        context.update(&body);
        context.update(&crc);
        let mut tail = BytesMut::with_capacity(TRAILER_BYTES);
        tail.extend_from_slice(&crc);
        tail.extend_from_slice(context.sign().as_ref());
        WireFrame {
            head: head.freeze(),
            body,
            tail: tail.freeze(),
        }
    }
}

/// A frame that has passed all checks of this layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenFrame {
    /// What it carries.
    pub kind: FrameKind,
    /// Whether the sender counts it until we acknowledge it.
    pub ack_required: bool,
    /// Its number.
    pub sequence: u64,
    /// The bytes of the message are a segment of SCXQ2.
    pub packed: bool,
    /// The message.
    pub payload: Bytes,
}

/// Takes the frames of one stream in one direction apart. Buffers at most one frame and what came
/// with it in one read.
pub struct FrameOpener {
    key: hmac::Key,
    stream: Stream,
    max_payload_bytes: usize,
    next_sequence: u64,
    buffer: BytesMut,
    takes_packed: bool,
    failed: Option<WireError>,
}

impl FrameOpener {
    /// Starts a stream whose frames carry at most `max_payload_bytes`.
    #[must_use]
    pub fn new(stream: Stream, key: &[u8; 32], max_payload_bytes: usize) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, key),
            stream,
            max_payload_bytes: max_payload_bytes.min(super::MAX_FRAME_BYTES),
            next_sequence: 1,
            buffer: BytesMut::new(),
            takes_packed: false,
            failed: None,
        }
    }

    /// From now on packed messages are taken: both sides have agreed on it.
    pub fn take_packed(&mut self) {
        self.takes_packed = true;
    }

    /// Takes bytes as they came. Call [`next_frame`](Self::next_frame) until it has no more before
    /// the next call, so that the buffer stays bounded.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next whole frame, if it has arrived.
    ///
    /// # Errors
    ///
    /// If the bytes are not the frame that should come next. The error is final.
    pub fn next_frame(&mut self) -> Result<Option<OpenFrame>, WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.open();
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.buffer = BytesMut::new();
        }
        result
    }

    /// The frame that has begun and is not whole: its sequence, and how many bytes of it are there.
    #[must_use]
    pub fn unfinished(&self) -> Option<(u64, usize)> {
        let bytes = self.buffer.len();
        (bytes > 0).then_some((self.next_sequence, bytes))
    }

    fn open(&mut self) -> Result<Option<OpenFrame>, WireError> {
        let Ok((header, _)) = Header::read_from_prefix(&self.buffer) else {
            return Ok(None);
        };
        let (kind, payload_bytes) = self.check_header(&header)?;
        let checked = HEADER_BYTES + payload_bytes + CRC_BYTES;
        let total = checked + HMAC_BYTES;
        if self.buffer.len() < total {
            return Ok(None);
        }
        let sequence = header.sequence.get();
        let mut frame = self.buffer.split_to(total).freeze();
        let (covered, tag) = frame.split_at(checked);
        let (summed, crc) = covered.split_at(HEADER_BYTES + payload_bytes);
        // The CRC first: it tells damage from forgery, which helps whoever reads the log.
        if crc32fast::hash(summed).to_le_bytes() != crc {
            return Err(WireError::Crc { sequence });
        }
        if hmac::verify(&self.key, covered, tag).is_err() {
            return Err(WireError::Hmac { sequence });
        }
        self.next_sequence += 1;
        frame.advance(HEADER_BYTES);
        frame.truncate(payload_bytes);
        let ack_required = header.flags & FLAG_ACK_REQUIRED != 0;
        Ok(Some(OpenFrame {
            kind,
            ack_required,
            sequence,
            packed: header.compression == COMPRESSION_SCXQ2,
            payload: frame,
        }))
    }

    /// Checks what can be checked before the payload is there, so that a bad length is found before
    /// anything is buffered for it.
    fn check_header(&self, header: &Header) -> Result<(FrameKind, usize), WireError> {
        if header.version != VERSION {
            return Err(WireError::Version {
                found: header.version,
            });
        }
        let kind = FrameKind::from_wire(header.kind)
            .filter(|&kind| (kind == FrameKind::Data) == (self.stream == Stream::Data))
            .ok_or(WireError::Kind {
                found: header.kind,
                stream: self.stream,
            })?;
        let may_be_packed = self.takes_packed && kind == FrameKind::Data;
        let is_known = match header.compression {
            COMPRESSION_NONE => true,
            COMPRESSION_SCXQ2 => may_be_packed,
            _ => false,
        };
        if !is_known {
            return Err(WireError::Compression {
                found: header.compression,
            });
        }
        let is_data_stream = header.flags & FLAG_DATA_STREAM != 0;
        let is_reserved = header.flags & !(FLAG_ACK_REQUIRED | FLAG_DATA_STREAM) != 0;
        if is_reserved || is_data_stream != (self.stream == Stream::Data) {
            return Err(WireError::Flags {
                found: header.flags,
                stream: self.stream,
            });
        }
        let limit = self.max_payload_bytes;
        let payload_bytes = usize::try_from(header.payload_bytes.get())
            .ok()
            .filter(|&bytes| bytes <= limit)
            .ok_or(WireError::TooLong {
                found: header.payload_bytes.get().into(),
                limit,
            })?;
        let sequence = header.sequence.get();
        if sequence != self.next_sequence {
            let expected = self.next_sequence;
            return Err(WireError::Sequence {
                found: sequence,
                expected,
            });
        }
        Ok((kind, payload_bytes))
    }
}

#[cfg(test)]
mod tests;
