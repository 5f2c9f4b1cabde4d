//! Why a connection had to be closed. Errors that a client is told about in a reply, and that the
//! connection survives, are [`NbdErrno`](crate::nbd::request::NbdErrno) and option replies instead.

use thiserror::Error;

/// A breach of the NBD protocol after which the connection cannot go on. The caller logs it once,
/// sends what the codec has written so far, and closes.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum NbdError {
    /// The client set handshake flags that the server did not offer.
    #[error(
        "NBD client sent unknown handshake flags {flags:#x}; it is not an NBD client, or newer \
         than this server"
    )]
    UnknownClientFlags {
        /// The flags as sent.
        flags: u32,
    },
    /// The eight bytes that begin every option are wrong.
    #[error(
        "NBD option begins with {found:#018x} instead of IHAVEOPT; the peer does not speak NBD"
    )]
    BadOptionMagic {
        /// What stood there.
        found: u64,
    },
    /// Option data that is longer than the server is willing to skip.
    #[error("NBD option {option} names {length} bytes of data; at most {limit} are accepted")]
    OptionTooLong {
        /// Number of the option.
        option: u32,
        /// Length that the client named, in bytes.
        length: u32,
        /// [`Limits::max_option_skip_bytes`](crate::nbd::Limits::max_option_skip_bytes).
        limit: u32,
    },
    /// The client haggles without end.
    #[error("NBD client sent more than {limit} options without starting; closing its connection")]
    TooManyOptions {
        /// [`Limits::max_options`](crate::nbd::Limits::max_options).
        limit: u32,
    },
    /// `NBD_OPT_EXPORT_NAME` for an export that is not served. The option has no error reply.
    #[error(
        "NBD client asked for export {name:?} with NBD_OPT_EXPORT_NAME; there is no such export"
    )]
    UnknownExport {
        /// The name as far as it is text, shortened.
        name: String,
    },
    /// A client that did not accept fixed newstyle used more than `NBD_OPT_EXPORT_NAME`.
    #[error("NBD client sent option {option} without accepting fixed newstyle negotiation")]
    NotFixedNewstyle {
        /// Number of the option.
        option: u32,
    },
    /// The four bytes that begin every request are wrong.
    #[error(
        "NBD request begins with {found:#010x} instead of the request magic; the stream is \
         out of step"
    )]
    BadRequestMagic {
        /// What stood there.
        found: u32,
    },
    /// A write whose payload is longer than the server is willing to receive.
    #[error("NBD write names a payload of {length} bytes; at most {limit} are received")]
    WriteTooLong {
        /// Length that the client named, in bytes.
        length: u32,
        /// Longest payload that is received, in bytes.
        limit: u32,
    },
    /// The caller went on with a handshake that had ended.
    #[error("NBD handshake is over; create a new one for each connection")]
    HandshakeOver,
    /// The caller reported more payload than the pending write has left.
    #[error(
        "{reported} bytes of NBD write payload were reported where {left} were left to receive"
    )]
    PayloadOverrun {
        /// Bytes that the caller reported.
        reported: u32,
        /// Bytes that were still expected.
        left: u32,
    },
}
