//! A small NBD client: blocking, with as many requests in flight as the caller likes.
//!
//! For tests, the quickstart and measurements, which need to know exactly when a request was sent
//! and when it was answered, on which connection, and what was on its way when the server died.
//!
//! One [`Client`] is one connection. [`Client::submit`] queues a request, [`Client::next_reply`]
//! sends what is queued and waits for any answer; [`Client::read`], [`Client::write`] and the like
//! do both for one request and must not be mixed with requests in flight.
//!
//! **Invariants.** Bytes from a server never cause a panic or an unbounded allocation. After an
//! error of the connection nothing more is known about the requests in flight: the server may or
//! may not have carried them out.
//!
//! **Not here:** TLS, metadata contexts, reconnecting. A server that stops reading while it waits
//! for its answers to be read can be deadlocked by submitting without end; the one of this crate
//! takes at least 1024 requests.

mod wire;

use std::collections::HashMap;
use std::io::{self, BufReader, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use self::wire::{Stream, receive, send, send_two};
use super::proto::{
    ChunkHeader, REPLY_FLAG_DONE, REQUEST_MAGIC, RequestHeader, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, SimpleReply, command, command_flag, reply_type,
};

/// Longest error chunk that is read into memory.
const ERROR_CHUNK_BYTES_MAX: u32 = 64 * 1024;
/// Requests are collected up to this size before they are sent.
const SEND_BYTES: usize = 128 * 1024;
const RECEIVE_BYTES: usize = 256 * 1024;
/// Longest read, in bytes.
const READ_BYTES_MAX: u32 = 64 << 20;

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

/// How to connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClientOptions {
    /// Longest wait for the server to send or to take anything; `None` waits for ever.
    pub timeout: Option<Duration>,
    /// Ask for structured replies. A server that has none is used without.
    pub structured_replies: bool,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            timeout: Some(Duration::from_secs(30)),
            structured_replies: true,
        }
    }
}

/// What the server said of the export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size_bytes: u64,
    /// [`transmission_flag`](super::proto::transmission_flag).
    pub flags: u16,
    /// Alignment of requests.
    pub min_block_bytes: u32,
    /// Longest read or write.
    pub max_block_bytes: u32,
    /// Structured replies are in use.
    pub structured_replies: bool,
}

/// What went wrong.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The connection.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
    /// The server did not answer in time.
    #[error("{doing}: no answer within the time limit")]
    Timeout {
        /// What was tried.
        doing: &'static str,
    },
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    /// The server refused an option.
    #[error("the server refused option {option}: error {code:#x} {text:?}")]
    Refused {
        /// The option.
        option: u32,
        /// Its answer.
        code: u32,
        /// Text for people.
        text: String,
    },
    /// A request failed.
    #[error("command {command} at {offset}, {length} bytes: error {errno} {text:?}")]
    Failed {
        /// [`command`].
        command: u16,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// The error of the protocol.
        errno: u32,
        /// Text for people, with structured replies.
        text: String,
    },
}

impl ClientError {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Timeout { doing },
            _ => Self::Io { doing, source },
        }
    }

    /// The error that the server answered a request with, if it is that.
    #[must_use]
    pub fn errno(&self) -> Option<u32> {
        match self {
            Self::Failed { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Submit<'a> {
    /// Read so many bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Write the data.
    Write {
        /// First byte.
        offset: u64,
        /// What is written.
        data: &'a [u8],
        /// Answer only when durable.
        fua: bool,
    },
    /// Make everything that was answered before durable.
    Flush,
    /// The range is no longer needed.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Answer only when durable.
        fua: bool,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Answer only when durable.
        fua: bool,
        /// Keep it allocated.
        no_hole: bool,
    },
    /// The range will be read soon.
    Cache {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
}

/// An answer.
#[derive(Debug)]
pub struct Done {
    /// What [`Client::submit`] gave for the request.
    pub ticket: u64,
    /// The data of a read, empty for other requests; or the server's error.
    pub result: Result<Vec<u8>, ClientError>,
}

/// A request whose answer has not arrived.
struct Pending {
    command: u16,
    offset: u64,
    length: u32,
    /// What has arrived of a read, and how many bytes of it.
    data: Vec<u8>,
    filled: usize,
    error: Option<(u32, String)>,
}

/// One connection to a server, in the transmission phase.
pub struct Client {
    stream: BufReader<Stream>,
    out: Vec<u8>,
    pending: HashMap<u64, Pending>,
    next_ticket: u64,
    info: ExportInfo,
}

impl Client {
    /// Connects and chooses an export.
    ///
    /// # Errors
    /// [`ClientError`]; among others [`ClientError::Refused`] if there is no such export.
    pub fn connect(
        address: &Address,
        export: &str,
        options: ClientOptions,
    ) -> Result<Self, ClientError> {
        let stream =
            Stream::connect(address, options.timeout).map_err(ClientError::io("connecting"))?;
        let mut stream = BufReader::with_capacity(RECEIVE_BYTES, stream);
        wire::greet(&mut stream)?;
        let structured_replies = options.structured_replies && wire::ask_structured(&mut stream)?;
        let info = wire::go(&mut stream, export, structured_replies)?;
        let pending = HashMap::new();
        Ok(Self {
            stream,
            out: Vec::new(),
            pending,
            next_ticket: 1,
            info,
        })
    }

    /// What the server said of the export.
    #[must_use]
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Requests whose answers have not been taken.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Whether more of the server's answers have arrived already, at least in part: taking the next
    /// one then waits for no other request.
    #[must_use]
    pub fn has_arrived(&self) -> bool {
        !self.stream.buffer().is_empty()
    }

    /// Queues a request and gives its ticket. It is sent at the latest by [`Client::next_reply`] or
    /// [`Client::push`].
    ///
    /// # Errors
    /// If the connection breaks, or the request is longer than the protocol allows.
    pub fn submit(&mut self, request: Submit<'_>) -> Result<u64, ClientError> {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let (command, flags, offset, length, payload) = encode(request)?;
        let header = RequestHeader {
            magic: U32::new(REQUEST_MAGIC),
            flags: U16::new(flags),
            command: U16::new(command),
            cookie: U64::new(ticket),
            offset: U64::new(offset),
            length: U32::new(length),
        };
        let data = match command {
            command::READ => vec![0; length as usize],
            _ => Vec::new(),
        };
        let pending = Pending {
            command,
            offset,
            length,
            data,
            filled: 0,
            error: None,
        };
        self.pending.insert(ticket, pending);
        self.out.extend_from_slice(header.as_bytes());
        if self.out.len() + payload.len() <= SEND_BYTES {
            self.out.extend_from_slice(payload);
        } else {
            send_two(self.stream.get_mut(), &self.out, payload)?;
            self.out.clear();
        }
        Ok(ticket)
    }

    /// Sends what is queued.
    ///
    /// # Errors
    /// If the connection breaks.
    pub fn push(&mut self) -> Result<(), ClientError> {
        send(&mut self.stream, &self.out)?;
        self.out.clear();
        Ok(())
    }

    /// Sends what is queued and waits for the next answer, to whatever request it is.
    ///
    /// # Errors
    /// If the connection breaks or the server does; the server's error for one request is in
    /// [`Done`].
    pub fn next_reply(&mut self) -> Result<Done, ClientError> {
        if !self.out.is_empty() {
            self.push()?;
        }
        if self.pending.is_empty() {
            return Err(ClientError::Protocol("no request is in flight"));
        }
        loop {
            let magic: U32 = receive(&mut self.stream, "waiting for an answer")?;
            let ended = match magic.get() {
                SIMPLE_REPLY_MAGIC => Some(self.simple_reply()?),
                STRUCTURED_REPLY_MAGIC => self.chunk()?,
                _ => return Err(ClientError::Protocol("an answer has a wrong magic number")),
            };
            if let Some(ticket) = ended {
                return self.finish(ticket);
            }
        }
    }

    fn simple_reply(&mut self) -> Result<u64, ClientError> {
        const REST: usize = size_of::<SimpleReply>() - size_of::<U32>();
        let rest: [u8; REST] = receive(&mut self.stream, "reading an answer")?;
        let (error, cookie) = rest.split_at(4);
        let error = U32::read_from_bytes(error).expect("four bytes").get();
        let ticket = U64::read_from_bytes(cookie).expect("eight bytes").get();
        let pending = known(&mut self.pending, ticket)?;
        if error != 0 {
            pending.error = Some((error, String::new()));
        } else if pending.command == command::READ {
            if self.info.structured_replies {
                return Err(ClientError::Protocol(
                    "a read was answered without structure",
                ));
            }
            let reading = ClientError::io("reading data");
            self.stream.read_exact(&mut pending.data).map_err(reading)?;
            pending.filled = pending.data.len();
        }
        Ok(ticket)
    }

    /// Takes a chunk; gives the ticket if it was the last one.
    fn chunk(&mut self) -> Result<Option<u64>, ClientError> {
        const REST: usize = size_of::<ChunkHeader>() - size_of::<U32>();
        let rest: [u8; REST] = receive(&mut self.stream, "reading an answer")?;
        let flags = U16::read_from_bytes(&rest[0..2]).expect("two bytes").get();
        let kind = U16::read_from_bytes(&rest[2..4]).expect("two bytes").get();
        let ticket = U64::read_from_bytes(&rest[4..12])
            .expect("eight bytes")
            .get();
        let length = U32::read_from_bytes(&rest[12..16])
            .expect("four bytes")
            .get();
        let pending = known(&mut self.pending, ticket)?;
        match kind {
            reply_type::NONE if length == 0 => {}
            reply_type::OFFSET_DATA if length > 8 => {
                let offset: U64 = receive(&mut self.stream, "reading a chunk")?;
                let piece = piece_of(pending, offset.get(), u64::from(length) - 8)?;
                self.stream
                    .read_exact(piece)
                    .map_err(ClientError::io("reading data"))?;
            }
            reply_type::OFFSET_HOLE if length == 12 => {
                let offset: U64 = receive(&mut self.stream, "reading a chunk")?;
                let hole: U32 = receive(&mut self.stream, "reading a chunk")?;
                piece_of(pending, offset.get(), hole.get().into())?.fill(0);
            }
            kind if kind & (1 << 15) != 0 && (6..=ERROR_CHUNK_BYTES_MAX).contains(&length) => {
                let mut bytes = vec![0; length as usize];
                self.stream
                    .read_exact(&mut bytes)
                    .map_err(ClientError::io("reading an error"))?;
                let errno = U32::read_from_bytes(&bytes[..4]).expect("four bytes").get();
                let text_bytes = U16::read_from_bytes(&bytes[4..6]).expect("two bytes").get();
                let text = bytes[6..]
                    .get(..usize::from(text_bytes))
                    .unwrap_or_default();
                pending.error = Some((errno, String::from_utf8_lossy(text).into_owned()));
            }
            _ => return Err(ClientError::Protocol("a chunk has a wrong type or length")),
        }
        Ok((flags & REPLY_FLAG_DONE != 0).then_some(ticket))
    }

    fn finish(&mut self, ticket: u64) -> Result<Done, ClientError> {
        let Some(pending) = self.pending.remove(&ticket) else {
            return Err(ClientError::Protocol("a request was answered twice"));
        };
        let Pending {
            command,
            offset,
            length,
            data,
            filled,
            error,
        } = pending;
        let result = match error {
            Some((errno, text)) => Err(ClientError::Failed {
                command,
                offset,
                length,
                errno,
                text,
            }),
            None if filled < data.len() => {
                return Err(ClientError::Protocol("a read was answered in part"));
            }
            None => Ok(data),
        };
        Ok(Done { ticket, result })
    }

    fn one(&mut self, request: Submit<'_>) -> Result<Vec<u8>, ClientError> {
        let ticket = self.submit(request)?;
        loop {
            let done = self.next_reply()?;
            if done.ticket == ticket {
                return done.result;
            }
        }
    }

    /// Reads.
    ///
    /// # Errors
    /// [`ClientError::Failed`] if the server refuses, another error if the connection breaks.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, ClientError> {
        self.one(Submit::Read { offset, length })
    }

    /// Writes; with `fua` it is durable on return.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), ClientError> {
        self.one(Submit::Write { offset, data, fua }).map(drop)
    }

    /// Makes every write that was completed on any connection durable.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.one(Submit::Flush).map(drop)
    }

    /// Gives a range up.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn trim(&mut self, offset: u64, length: u32) -> Result<(), ClientError> {
        self.one(Submit::Trim {
            offset,
            length,
            fua: false,
        })
        .map(drop)
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn write_zeroes(&mut self, offset: u64, length: u32) -> Result<(), ClientError> {
        self.one(Submit::WriteZeroes {
            offset,
            length,
            fua: false,
            no_hole: false,
        })
        .map(drop)
    }

    /// Tells the server that this is the end. Dropping a client does without.
    ///
    /// # Errors
    /// If the connection is broken already.
    pub fn disconnect(mut self) -> Result<(), ClientError> {
        let header = RequestHeader {
            magic: U32::new(REQUEST_MAGIC),
            flags: U16::new(0),
            command: U16::new(command::DISC),
            cookie: U64::new(0),
            offset: U64::new(0),
            length: U32::new(0),
        };
        self.out.extend_from_slice(header.as_bytes());
        self.push()
    }
}

type Encoded<'a> = (u16, u16, u64, u32, &'a [u8]);

fn encode(request: Submit<'_>) -> Result<Encoded<'_>, ClientError> {
    let fua_flag = |fua| if fua { command_flag::FUA } else { 0 };
    Ok(match request {
        Submit::Read { offset, length } if length <= READ_BYTES_MAX => {
            (command::READ, 0, offset, length, &[])
        }
        Submit::Read { .. } => return Err(ClientError::Protocol("a read is too long")),
        Submit::Write { offset, data, fua } => {
            let length = u32::try_from(data.len())
                .map_err(|_| ClientError::Protocol("a write is too long"))?;
            (command::WRITE, fua_flag(fua), offset, length, data)
        }
        Submit::Flush => (command::FLUSH, 0, 0, 0, &[]),
        Submit::Trim {
            offset,
            length,
            fua,
        } => (command::TRIM, fua_flag(fua), offset, length, &[]),
        Submit::WriteZeroes {
            offset,
            length,
            fua,
            no_hole,
        } => {
            let no_hole = if no_hole { command_flag::NO_HOLE } else { 0 };
            (
                command::WRITE_ZEROES,
                fua_flag(fua) | no_hole,
                offset,
                length,
                &[],
            )
        }
        Submit::Cache { offset, length } => (command::CACHE, 0, offset, length, &[]),
    })
}

fn known(pending: &mut HashMap<u64, Pending>, ticket: u64) -> Result<&mut Pending, ClientError> {
    pending
        .get_mut(&ticket)
        .ok_or(ClientError::Protocol("it answers what was not asked"))
}

/// The part of a read's data that a chunk fills.
fn piece_of(pending: &mut Pending, offset: u64, length: u64) -> Result<&mut [u8], ClientError> {
    let outside = ClientError::Protocol("a chunk lies outside of what was asked for");
    let start = offset
        .checked_sub(pending.offset)
        .and_then(|at| usize::try_from(at).ok());
    let length = usize::try_from(length).ok();
    let range = start.zip(length).and_then(|(start, length)| {
        let end = start.checked_add(length)?;
        pending.filled += length;
        Some(start..end)
    });
    range
        .and_then(|range| pending.data.get_mut(range))
        .ok_or(outside)
}
