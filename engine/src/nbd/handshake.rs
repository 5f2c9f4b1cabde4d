//! Option haggling: from the greeting to a [`Session`].
//!
//! Fixed newstyle. The handshake takes all input it is given, whatever its cuts, and keeps at most
//! one option's data ([`Limits::max_option_bytes`]), growing with what has arrived rather than with
//! what was announced. Input stays with the caller only behind a reply that should be sent first
//! ([`Status::SendReplies`]) and behind the start of the transmission phase.
//!
//! Not here: TLS. `NBD_OPT_STARTTLS` answers `NBD_REP_ERR_UNSUP`; its place is
//! `Handshake::start_tls`, which will acknowledge, forget what was negotiated, and hand the
//! connection to the TLS layer through a [`Status`] of its own.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::export::ExportDirectory;
use super::options::{ContextQuery, InfoRequest, Malformed, OptionReplies, text};
use super::proto::{
    BASE_ALLOCATION, EXPORT_NAME_PADDING, ExportNameReply, Greeting, INIT_MAGIC, OPTION_MAGIC,
    OptionHeader, client_flag, handshake_flag, option, option_reply,
};
use super::{Limits, NbdError};

/// Identifier of the context `base:allocation` in block status replies.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// The metadata contexts a client may query with `NBD_CMD_BLOCK_STATUS`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MetaContexts {
    /// `base:allocation`, under [`BASE_ALLOCATION_ID`].
    pub base_allocation: bool,
}

impl MetaContexts {
    /// No context was selected, and block status must be refused.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// What was agreed on when the transmission phase begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Session {
    /// Index of the export in the directory of the handshake.
    pub export: usize,
    /// Reads must be answered with structured replies.
    pub structured_replies: bool,
    /// Contexts for block status.
    pub meta_contexts: MetaContexts,
    /// The client declined the padding after `NBD_OPT_EXPORT_NAME`.
    pub no_zeroes: bool,
}

/// Where the handshake stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// All input was taken; come back with more.
    NeedMore,
    /// An option was answered: send the replies, then come back with the input that is left. A
    /// client that does not read its replies thus cannot make them pile up.
    SendReplies,
    /// Send the replies, then decode what is left of the input as requests.
    Transmission(Session),
    /// The client ended the session. Send the replies, then close.
    Close,
}

/// Result of [`Handshake::advance`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Bytes of the input that were taken.
    pub consumed: usize,
    /// Where the handshake stands.
    pub status: Status,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    ClientFlags,
    OptionHeader,
    OptionData { option: u32, length: usize },
    SkipData { option: u32, left: usize },
    Over,
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct Handshake<D> {
    exports: D,
    limits: Limits,
    state: State,
    /// Bytes of the field that is being received.
    pending: Vec<u8>,
    options: u32,
    fixed_newstyle: bool,
    no_zeroes: bool,
    structured_replies: bool,
    /// The last successful `NBD_OPT_SET_META_CONTEXT`: export index and contexts.
    selected: Option<(usize, MetaContexts)>,
}

impl<D: ExportDirectory> Handshake<D> {
    /// Begins the handshake of a new connection. Send [`greeting`] first.
    pub fn new(exports: D, limits: Limits) -> Self {
        Self {
            exports,
            limits,
            state: State::ClientFlags,
            pending: Vec::new(),
            options: 0,
            fixed_newstyle: false,
            no_zeroes: false,
            structured_replies: false,
            selected: None,
        }
    }

    /// Takes bytes from the client and appends replies to `out`. Takes at least one byte of an
    /// input that is not empty, unless it returns an error, and answers at most one option.
    ///
    /// # Errors
    /// Any [`NbdError`] of the handshake: send `out`, then close the connection.
    pub fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, NbdError> {
        let mut rest = input;
        let status = loop {
            match self.step(&mut rest, out) {
                Ok(None) => {}
                Ok(Some(status)) => break status,
                Err(error) => {
                    self.state = State::Over;
                    self.pending = Vec::new();
                    return Err(error);
                }
            }
        };
        if matches!(status, Status::Transmission(_) | Status::Close) {
            self.state = State::Over;
            self.pending = Vec::new();
        }
        Ok(Progress {
            consumed: input.len() - rest.len(),
            status,
        })
    }

    /// One field of the stream. `None` means that there may be more in `rest`.
    fn step(&mut self, rest: &mut &[u8], out: &mut Vec<u8>) -> Result<Option<Status>, NbdError> {
        match self.state {
            State::ClientFlags => {
                let Some(()) = self.gather(rest, size_of::<U32>()) else {
                    return Ok(Some(Status::NeedMore));
                };
                self.client_flags()?;
                Ok(None)
            }
            State::OptionHeader => {
                let Some(()) = self.gather(rest, size_of::<OptionHeader>()) else {
                    return Ok(Some(Status::NeedMore));
                };
                self.option_header()?;
                Ok(None)
            }
            State::OptionData { option, length } => {
                let Some(()) = self.gather(rest, length) else {
                    return Ok(Some(Status::NeedMore));
                };
                let data = std::mem::take(&mut self.pending);
                self.state = State::OptionHeader;
                self.option(option, &data, out).map(Some)
            }
            State::SkipData { option, left } => {
                let (_, tail) = rest.split_at(left.min(rest.len()));
                let left = left - (rest.len() - tail.len());
                *rest = tail;
                if left > 0 {
                    self.state = State::SkipData { option, left };
                    return Ok(Some(Status::NeedMore));
                }
                self.state = State::OptionHeader;
                if option == option::SET_META_CONTEXT {
                    self.selected = None;
                }
                let why = "option data is longer than this server accepts";
                OptionReplies { option, out }.error(option_reply::ERR_TOO_BIG, why);
                Ok(Some(Status::SendReplies))
            }
            State::Over => Err(NbdError::HandshakeOver),
        }
    }

    /// Moves input to `pending` until that holds `length` bytes.
    fn gather(&mut self, rest: &mut &[u8], length: usize) -> Option<()> {
        let missing = length.saturating_sub(self.pending.len());
        let (head, tail) = rest.split_at(missing.min(rest.len()));
        self.pending.extend_from_slice(head);
        *rest = tail;
        (self.pending.len() >= length).then_some(())
    }

    fn client_flags(&mut self) -> Result<(), NbdError> {
        let flags = U32::read_from_bytes(&self.pending).expect("gathered").get();
        self.pending.clear();
        if flags & !client_flag::KNOWN != 0 {
            return Err(NbdError::UnknownClientFlags { flags });
        }
        self.fixed_newstyle = flags & client_flag::FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & client_flag::NO_ZEROES != 0;
        self.state = State::OptionHeader;
        Ok(())
    }

    fn option_header(&mut self) -> Result<(), NbdError> {
        let header = OptionHeader::read_from_bytes(&self.pending).expect("gathered");
        self.pending.clear();
        let (option, length) = (header.option.get(), header.length.get());
        if header.magic.get() != OPTION_MAGIC {
            return Err(NbdError::BadOptionMagic {
                found: header.magic.get(),
            });
        }
        if !self.fixed_newstyle && option != option::EXPORT_NAME {
            return Err(NbdError::NotFixedNewstyle { option });
        }
        self.options += 1;
        if self.options > self.limits.max_options {
            return Err(NbdError::TooManyOptions {
                limit: self.limits.max_options,
            });
        }
        let limit = self
            .limits
            .max_option_skip_bytes
            .max(self.limits.max_option_bytes);
        // EXPORT_NAME has no error reply, so that skipping its data would be of no use.
        let skips = option != option::EXPORT_NAME;
        self.state = if length <= self.limits.max_option_bytes {
            State::OptionData {
                option,
                length: length as usize,
            }
        } else if skips && length <= limit {
            State::SkipData {
                option,
                left: length as usize,
            }
        } else {
            return Err(NbdError::OptionTooLong {
                option,
                length,
                limit,
            });
        };
        Ok(())
    }

    fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Status, NbdError> {
        let mut replies = OptionReplies { option, out };
        let answered = match option {
            option::EXPORT_NAME => return self.export_name(data, out),
            option::ABORT => {
                replies.ack();
                return Ok(Status::Close);
            }
            option::LIST => self.list(data, &mut replies),
            option::STARTTLS => Self::start_tls(data, &mut replies),
            option::INFO | option::GO => {
                InfoRequest::parse(data).map(|request| self.info(option, request, &mut replies))
            }
            option::STRUCTURED_REPLY => self.structured_reply(data, &mut replies),
            option::LIST_META_CONTEXT => self.list_meta_context(data, &mut replies),
            option::SET_META_CONTEXT => self.set_meta_context(data, &mut replies),
            _ => {
                replies.error(
                    option_reply::ERR_UNSUP,
                    "this server does not know the option",
                );
                Ok(Status::SendReplies)
            }
        };
        Ok(answered.unwrap_or_else(|why| {
            replies.error(option_reply::ERR_INVALID, why);
            Status::SendReplies
        }))
    }

    fn export_name(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<Status, NbdError> {
        let index = text(data).ok().and_then(|name| self.exports.find(name));
        let Some((index, export)) =
            index.and_then(|index| Some((index, self.exports.export(index)?)))
        else {
            let name = String::from_utf8_lossy(data).chars().take(64).collect();
            return Err(NbdError::UnknownExport { name });
        };
        let reply = ExportNameReply {
            size: U64::new(export.size_bytes),
            flags: U16::new(export.transmission_flags(self.structured_replies)),
        };
        out.extend_from_slice(reply.as_bytes());
        if !self.no_zeroes {
            out.resize(out.len() + EXPORT_NAME_PADDING, 0);
        }
        Ok(Status::Transmission(self.session(index)))
    }

    fn list(&self, data: &[u8], replies: &mut OptionReplies<'_>) -> Result<Status, Malformed> {
        without_data(data)?;
        for export in (0..super::export::MAX_EXPORTS).map_while(|index| self.exports.export(index))
        {
            replies.server(export);
        }
        replies.ack();
        Ok(Status::SendReplies)
    }

    fn start_tls(data: &[u8], replies: &mut OptionReplies<'_>) -> Result<Status, Malformed> {
        without_data(data)?;
        replies.error(option_reply::ERR_UNSUP, "this server has no TLS");
        Ok(Status::SendReplies)
    }

    fn info(
        &self,
        option: u32,
        request: InfoRequest<'_>,
        replies: &mut OptionReplies<'_>,
    ) -> Status {
        let index = self.exports.find(request.name);
        let Some((index, export)) =
            index.and_then(|index| Some((index, self.exports.export(index)?)))
        else {
            replies.error(option_reply::ERR_UNKNOWN, "there is no such export");
            return Status::SendReplies;
        };
        replies.describe(
            export,
            export.transmission_flags(self.structured_replies),
            request,
        );
        replies.ack();
        if option == option::GO {
            Status::Transmission(self.session(index))
        } else {
            Status::SendReplies
        }
    }

    fn structured_reply(
        &mut self,
        data: &[u8],
        replies: &mut OptionReplies<'_>,
    ) -> Result<Status, Malformed> {
        without_data(data)?;
        self.structured_replies = true;
        replies.ack();
        Ok(Status::SendReplies)
    }

    fn list_meta_context(
        &self,
        data: &[u8],
        replies: &mut OptionReplies<'_>,
    ) -> Result<Status, Malformed> {
        let query = self.context_query(data)?;
        if self.exports.find(query.name).is_none() {
            replies.error(option_reply::ERR_UNKNOWN, "there is no such export");
            return Ok(Status::SendReplies);
        }
        if query.empty || query.names_base || query.names_allocation {
            // The identifier is reserved in a list.
            replies.meta_context(0, BASE_ALLOCATION);
        }
        replies.ack();
        Ok(Status::SendReplies)
    }

    fn set_meta_context(
        &mut self,
        data: &[u8],
        replies: &mut OptionReplies<'_>,
    ) -> Result<Status, Malformed> {
        // Even a query that fails replaces the selection before it.
        self.selected = None;
        let query = self.context_query(data)?;
        let Some(index) = self.exports.find(query.name) else {
            replies.error(option_reply::ERR_UNKNOWN, "there is no such export");
            return Ok(Status::SendReplies);
        };
        if query.names_allocation {
            self.selected = Some((
                index,
                MetaContexts {
                    base_allocation: true,
                },
            ));
            replies.meta_context(BASE_ALLOCATION_ID, BASE_ALLOCATION);
        }
        replies.ack();
        Ok(Status::SendReplies)
    }

    fn context_query<'a>(&self, data: &'a [u8]) -> Result<ContextQuery<'a>, Malformed> {
        if !self.structured_replies {
            return Err("metadata contexts need structured replies; negotiate those first");
        }
        ContextQuery::parse(data)
    }

    /// Contexts count only for the export they were selected on.
    fn session(&self, export: usize) -> Session {
        let meta_contexts = match self.selected {
            Some((index, contexts)) if index == export => contexts,
            _ => MetaContexts::default(),
        };
        Session {
            export,
            structured_replies: self.structured_replies,
            meta_contexts,
            no_zeroes: self.no_zeroes,
        }
    }
}

fn without_data(data: &[u8]) -> Result<(), Malformed> {
    if data.is_empty() {
        Ok(())
    } else {
        Err("the option has no data")
    }
}

/// The first bytes on a new connection, from the server.
#[must_use]
pub fn greeting() -> [u8; size_of::<Greeting>()] {
    let greeting = Greeting {
        magic: U64::new(INIT_MAGIC),
        option_magic: U64::new(OPTION_MAGIC),
        flags: U16::new(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES),
    };
    zerocopy::transmute!(greeting)
}
