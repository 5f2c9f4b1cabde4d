//! Numbers and fixed layouts of the NBD wire format. Everything on the wire is big endian and
//! packed; the structs here are the bytes, so that encoding is a copy and parsing is a cast.
//!
//! Source: the NBD protocol document (`doc/proto.md` of the NBD project). Names follow it. Nothing
//! here decides anything.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes from the server: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes from the server, and start of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of every request in the transmission phase.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest string in the protocol, in bytes.
pub const MAX_STRING_BYTES: usize = 4096;
/// Zero bytes that end the answer to `NBD_OPT_EXPORT_NAME` unless both sides agreed to drop them.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Handshake flags of the server.
pub mod handshake_flag {
    /// The server speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The server can leave out the padding after `NBD_OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Handshake flags of the client.
pub mod client_flag {
    /// The client speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u32 = 1 << 0;
    /// The client wants no padding after `NBD_OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u32 = 1 << 1;
    /// All flags that this server understands.
    pub const KNOWN: u32 = FIXED_NEWSTYLE | NO_ZEROES;
}

/// Transmission flags: what an export offers.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes fail.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `NBD_CMD_FLUSH` is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `NBD_CMD_FLAG_FUA` is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The medium rotates.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// `NBD_CMD_TRIM` is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `NBD_CMD_WRITE_ZEROES` is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `NBD_CMD_FLAG_DF` is understood. Only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers the writes completed on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `NBD_CMD_CACHE` is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `NBD_CMD_FLAG_FAST_ZERO` is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Option numbers.
pub mod option {
    /// Choose an export and start; has no error reply.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Change to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use 32-byte requests with 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub mod option_reply {
    /// Done, without error.
    pub const ACK: u32 = 1;
    /// Name and description of an export.
    pub const SERVER: u32 = 2;
    /// A piece of information on an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Option unknown to this server.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// Option forbidden by policy.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// Option malformed, or sent at the wrong time.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// Server is being stopped.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// Option, or the reply to it, is too long.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Types of information on an export.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// The export's canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Block size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Command numbers.
pub mod command {
    /// Read data.
    pub const READ: u16 = 0;
    /// Write data; the only request with a payload.
    pub const WRITE: u16 = 1;
    /// Disconnect; has no reply.
    pub const DISC: u16 = 2;
    /// Make completed writes durable.
    pub const FLUSH: u16 = 3;
    /// Data is no longer needed.
    pub const TRIM: u16 = 4;
    /// Data will be read soon.
    pub const CACHE: u16 = 5;
    /// Write zeroes without sending them.
    pub const WRITE_ZEROES: u16 = 6;
    /// Query the metadata contexts.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
pub mod command_flag {
    /// Reply only when the written data is durable.
    pub const FUA: u16 = 1 << 0;
    /// Zeroed range must stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// At most one content chunk in the reply.
    pub const DF: u16 = 1 << 2;
    /// At most one extent in the reply.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than zero at the speed of a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// The only flag of a structured reply chunk: no more chunks follow for this request.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;

/// Types of structured reply chunks.
pub mod reply_type {
    /// Nothing; ends a reply.
    pub const NONE: u16 = 0;
    /// Data at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// Name of the one metadata context that the protocol document defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Flags of an extent in the context `base:allocation`.
pub mod state_flag {
    /// Not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, {
        $($(#[$field_doc:meta])* $field:ident: $kind:ty,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)* }
        const _: () = assert!(size_of::<$name>() == $bytes && align_of::<$name>() == 1);
    };
}

wire!(
    /// What the server says first.
    Greeting, 18, {
        /// [`INIT_MAGIC`].
        magic: U64,
        /// [`OPTION_MAGIC`].
        option_magic: U64,
        /// [`handshake_flag`].
        flags: U16,
    }
);
wire!(
    /// Start of an option; `length` bytes of data follow.
    OptionHeader, 16, {
        /// [`OPTION_MAGIC`].
        magic: U64,
        /// [`option`].
        option: U32,
        /// Bytes of data that follow.
        length: U32,
    }
);
wire!(
    /// Start of a reply to an option; `length` bytes of data follow.
    OptionReplyHeader, 20, {
        /// [`OPTION_REPLY_MAGIC`].
        magic: U64,
        /// The option that is answered.
        option: U32,
        /// [`option_reply`].
        reply_type: U32,
        /// Bytes of data that follow.
        length: U32,
    }
);
wire!(
    /// Answer to `NBD_OPT_EXPORT_NAME`, without its padding.
    ExportNameReply, 10, {
        /// Size of the export, in bytes.
        size: U64,
        /// [`transmission_flag`].
        flags: U16,
    }
);
wire!(
    /// `NBD_INFO_EXPORT`.
    InfoExport, 12, {
        /// [`info::EXPORT`].
        info_type: U16,
        /// Size of the export, in bytes.
        size: U64,
        /// [`transmission_flag`].
        flags: U16,
    }
);
wire!(
    /// `NBD_INFO_BLOCK_SIZE`; all in bytes.
    InfoBlockSize, 14, {
        /// [`info::BLOCK_SIZE`].
        info_type: U16,
        /// Alignment of every request.
        minimum: U32,
        /// Alignment of efficient requests.
        preferred: U32,
        /// Longest read or write.
        maximum: U32,
    }
);
wire!(
    /// Start of a request.
    RequestHeader, 28, {
        /// [`REQUEST_MAGIC`].
        magic: U32,
        /// [`command_flag`].
        flags: U16,
        /// [`command`].
        command: U16,
        /// Chosen by the client, opaque to the server.
        cookie: U64,
        /// First byte on the export.
        offset: U64,
        /// Bytes; also those of the payload that follows a write.
        length: U32,
    }
);
wire!(
    /// A reply without structure; the data of a read follows.
    SimpleReply, 16, {
        /// [`SIMPLE_REPLY_MAGIC`].
        magic: U32,
        /// 0 or an error.
        error: U32,
        /// The request's cookie.
        cookie: U64,
    }
);
wire!(
    /// Start of a chunk of a structured reply.
    ChunkHeader, 20, {
        /// [`STRUCTURED_REPLY_MAGIC`].
        magic: U32,
        /// 0 or [`REPLY_FLAG_DONE`].
        flags: U16,
        /// [`reply_type`].
        reply_type: U16,
        /// The request's cookie.
        cookie: U64,
        /// Bytes that follow.
        length: U32,
    }
);
wire!(
    /// A chunk of data up to where the data begins.
    DataChunk, 28, {
        /// Start of the chunk; its length counts `offset` and the data.
        header: ChunkHeader,
        /// First byte on the export.
        offset: U64,
    }
);
wire!(
    /// A chunk that stands for zeroes.
    HoleChunk, 32, {
        /// Start of the chunk.
        header: ChunkHeader,
        /// First byte on the export.
        offset: U64,
        /// Bytes that read as zero; not 0.
        hole_bytes: U32,
    }
);
wire!(
    /// An error chunk up to where its message begins.
    ErrorChunk, 26, {
        /// Start of the chunk.
        header: ChunkHeader,
        /// The error; not 0.
        error: U32,
        /// Bytes of text that follow.
        message_bytes: U16,
    }
);
wire!(
    /// One extent in an answer to `NBD_CMD_BLOCK_STATUS`.
    ExtentDescriptor, 8, {
        /// Bytes; not 0.
        length: U32,
        /// [`state_flag`] in the context `base:allocation`.
        flags: U32,
    }
);
