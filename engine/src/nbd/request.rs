//! Requests: the 28-byte header, and whether an export can do what it asks.
//!
//! **Invariant:** a [`Command`] that came out of [`validate`] lies inside its export, is aligned to
//! its sectors, is not empty, writes only where writing is allowed, and uses only what was offered
//! and negotiated. Not here: payload (see [`connection`](super::connection)).

use zerocopy::FromBytes;

use super::NbdError;
use super::export::Export;
use super::handshake::Session;
use super::proto::{
    REQUEST_MAGIC, RequestHeader, command, command_flag, transmission_flag as offer,
};

/// Errors that a reply can carry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum NbdErrno {
    /// A write to a read-only export.
    Perm = 1,
    /// The device failed.
    Io = 5,
    /// Out of memory; better not used.
    NoMem = 12,
    /// The request makes no sense.
    Invalid = 22,
    /// No space, also past the end of the export.
    NoSpace = 28,
    /// A read with `NBD_CMD_FLAG_DF` is too long.
    Overflow = 75,
    /// A fast zero would not be fast.
    NotSupported = 95,
    /// The server is being stopped.
    Shutdown = 108,
}

impl NbdErrno {
    /// The number on the wire.
    #[must_use]
    pub const fn wire(self) -> u32 {
        self as u32
    }
}

/// A request that is answered with an error, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// What the reply says.
    pub errno: NbdErrno,
    /// Text for people; sent to clients with structured replies. At most 4096 bytes.
    pub reason: &'static str,
}

impl Refusal {
    /// A refusal.
    #[must_use]
    pub const fn new(errno: NbdErrno, reason: &'static str) -> Self {
        Self { errno, reason }
    }
}

/// A client's name for a request. Opaque: nothing here compares cookies or depends on a client not
/// using one twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Cookie(pub u64);

/// A request header whose magic was right, and nothing else checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// [`command_flag`].
    pub flags: u16,
    /// [`command`].
    pub command: u16,
    /// The client's name for the request.
    pub cookie: Cookie,
    /// First byte on the export.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
}

impl Request {
    /// Reads a header.
    ///
    /// # Errors
    /// [`NbdError::BadRequestMagic`]: the stream is out of step and must be closed.
    pub fn parse(bytes: &[u8; size_of::<RequestHeader>()]) -> Result<Self, NbdError> {
        let header = RequestHeader::read_from_bytes(bytes).expect("the lengths are equal");
        if header.magic.get() != REQUEST_MAGIC {
            return Err(NbdError::BadRequestMagic {
                found: header.magic.get(),
            });
        }
        Ok(Self {
            flags: header.flags.get(),
            command: header.command.get(),
            cookie: Cookie(header.cookie.get()),
            offset: header.offset.get(),
            length: header.length.get(),
        })
    }

    /// Bytes that follow the header on the wire, whether the request is valid or not.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        if self.command == command::WRITE {
            self.length
        } else {
            0
        }
    }
}

/// A range of bytes on an export.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
}

impl ByteRange {
    /// The first byte after the range. Cannot overflow for a range inside an export.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset + u64::from(self.length)
    }
}

/// What a valid request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Read a range.
    Read {
        /// Where.
        range: ByteRange,
        /// Answer with at most one content chunk.
        df: bool,
    },
    /// Write a range with the payload that follows.
    Write {
        /// Where.
        range: ByteRange,
        /// Answer only when durable.
        fua: bool,
    },
    /// Make every write that was completed, on any connection, durable.
    Flush,
    /// The data of a range is no longer needed.
    Trim {
        /// Where.
        range: ByteRange,
        /// Answer only when durable.
        fua: bool,
    },
    /// Make a range read as zeroes. May be longer than the longest write.
    WriteZeroes {
        /// Where.
        range: ByteRange,
        /// Answer only when durable.
        fua: bool,
        /// Keep the range allocated.
        no_hole: bool,
        /// Fail with [`NbdErrno::NotSupported`] rather than be as slow as a write.
        fast: bool,
    },
    /// Which parts of a range are allocated or zero.
    BlockStatus {
        /// Where.
        range: ByteRange,
        /// Answer with one extent.
        req_one: bool,
    },
    /// A range will be read soon.
    Cache {
        /// Where.
        range: ByteRange,
    },
    /// Finish what is in flight and close; has no reply.
    Disconnect,
}

/// A valid request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Command {
    /// Goes into the reply.
    pub cookie: Cookie,
    /// What to do.
    pub operation: Operation,
}

/// What requests of one session are measured against: the export and what was negotiated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    size_bytes: u64,
    min_block_bytes: u32,
    max_block_bytes: u32,
    offered: u16,
    block_status: bool,
}

impl Rules {
    /// The rules of a session on its export.
    #[must_use]
    pub fn new(export: &Export, session: &Session) -> Self {
        Self {
            size_bytes: export.size_bytes,
            min_block_bytes: export.min_block_bytes,
            max_block_bytes: export.max_block_bytes,
            offered: export.transmission_flags(session.structured_replies),
            block_status: session.structured_replies && !session.meta_contexts.is_empty(),
        }
    }

    /// Longest read or write, in bytes.
    #[must_use]
    pub fn max_block_bytes(&self) -> u32 {
        self.max_block_bytes
    }

    fn offers(&self, flag: u16) -> bool {
        self.offered & flag != 0
    }

    /// Flags that a command may carry. FUA is legal on every command, since clients are known to
    /// send it where it means nothing.
    fn allowed_flags(&self, command: u16) -> u16 {
        let when = |condition, flag| if condition { flag } else { 0 };
        let of_command = match command {
            command::READ => when(self.offers(offer::SEND_DF), command_flag::DF),
            command::WRITE_ZEROES => {
                command_flag::NO_HOLE
                    | when(self.offers(offer::SEND_FAST_ZERO), command_flag::FAST_ZERO)
            }
            command::BLOCK_STATUS => command_flag::REQ_ONE,
            _ => 0,
        };
        of_command | when(self.offers(offer::SEND_FUA), command_flag::FUA)
    }

    fn writable(&self) -> Result<(), Refusal> {
        if self.offers(offer::READ_ONLY) {
            return Err(Refusal::new(NbdErrno::Perm, "the export is read-only"));
        }
        Ok(())
    }

    fn offered(&self, flag: u16) -> Result<(), Refusal> {
        if !self.offers(flag) {
            return Err(invalid("the export does not offer this command"));
        }
        Ok(())
    }

    /// The range of a request, if it lies in the export. `past_end` is the error of one that does
    /// not: the protocol has one for commands that write and another for those that do not.
    fn range(&self, request: &Request, past_end: NbdErrno) -> Result<ByteRange, Refusal> {
        let range = ByteRange {
            offset: request.offset,
            length: request.length,
        };
        if range.length == 0 {
            return Err(invalid("the length is zero"));
        }
        let end = range.offset.checked_add(u64::from(range.length));
        if end.is_none_or(|end| end > self.size_bytes) {
            return Err(Refusal::new(
                past_end,
                "the request reaches past the end of the export",
            ));
        }
        let block = self.min_block_bytes;
        if !range.offset.is_multiple_of(u64::from(block)) || !range.length.is_multiple_of(block) {
            return Err(invalid(
                "offset and length must be multiples of the minimum block size",
            ));
        }
        Ok(range)
    }

    fn at_most_max(&self, range: ByteRange) -> Result<ByteRange, Refusal> {
        if range.length > self.max_block_bytes {
            return Err(invalid("the length is beyond the maximum block size"));
        }
        Ok(range)
    }
}

const fn invalid(reason: &'static str) -> Refusal {
    Refusal::new(NbdErrno::Invalid, reason)
}

/// Decides whether a request can be carried out.
///
/// TRIM, WRITE ZEROES and BLOCK STATUS move no data and are accepted at any length.
///
/// # Errors
/// A [`Refusal`] with the error that the protocol document prescribes.
pub fn validate(request: &Request, rules: &Rules) -> Result<Command, Refusal> {
    let flag = |flag| request.flags & flag != 0;
    // A disconnect has no reply that could carry an error.
    if request.command != command::DISC
        && request.flags & !rules.allowed_flags(request.command) != 0
    {
        return Err(invalid(
            "the command has a flag that is unknown or was not offered",
        ));
    }
    let fua = flag(command_flag::FUA);
    let operation = match request.command {
        command::READ => {
            let range = rules.at_most_max(rules.range(request, NbdErrno::Invalid)?)?;
            Operation::Read {
                range,
                df: flag(command_flag::DF),
            }
        }
        command::WRITE => {
            rules.writable()?;
            let range = rules.at_most_max(rules.range(request, NbdErrno::NoSpace)?)?;
            Operation::Write { range, fua }
        }
        command::DISC => Operation::Disconnect,
        command::FLUSH => {
            rules.offered(offer::SEND_FLUSH)?;
            if request.offset != 0 || request.length != 0 {
                return Err(invalid("offset and length of a flush must be zero"));
            }
            Operation::Flush
        }
        command::TRIM => {
            rules.writable()?;
            rules.offered(offer::SEND_TRIM)?;
            Operation::Trim {
                range: rules.range(request, NbdErrno::Invalid)?,
                fua,
            }
        }
        command::WRITE_ZEROES => {
            rules.writable()?;
            rules.offered(offer::SEND_WRITE_ZEROES)?;
            Operation::WriteZeroes {
                range: rules.range(request, NbdErrno::NoSpace)?,
                fua,
                no_hole: flag(command_flag::NO_HOLE),
                fast: flag(command_flag::FAST_ZERO),
            }
        }
        command::BLOCK_STATUS => {
            if !rules.block_status {
                return Err(invalid(
                    "no metadata context was negotiated for this export",
                ));
            }
            let range = rules.range(request, NbdErrno::Invalid)?;
            Operation::BlockStatus {
                range,
                req_one: flag(command_flag::REQ_ONE),
            }
        }
        command::CACHE => {
            rules.offered(offer::SEND_CACHE)?;
            let range = rules.at_most_max(rules.range(request, NbdErrno::Invalid)?)?;
            Operation::Cache { range }
        }
        _ => return Err(invalid("the command is unknown")),
    };
    Ok(Command {
        cookie: request.cookie,
        operation,
    })
}
