//! The transmission phase as a client's bytes arrive: commands, and the payload of writes.
//!
//! Payload is never copied or kept here. After a write's header the caller holds the command and
//! can wait for slots as long as it must; nothing is lost, since nothing more is decoded until it
//! asks. Then the payload comes in either way, or in both, part by part:
//!
//! - from the receive buffer: [`Decoder::decode`] says how many of its bytes belong to the write;
//! - straight into slots: receive up to [`Decoder::payload_left`] bytes, then report them with
//!   [`Decoder::payload_received`].
//!
//! **Invariants.** A call with input takes at least one byte of it, or fails. No event waits inside
//! the decoder for a call without input. A [`Decoded::Refused`] write comes after its payload.
//! After an error or a disconnect nothing is decoded any more.

use super::export::Export;
use super::handshake::Session;
use super::proto::RequestHeader;
use super::request::{Command, Cookie, Operation, Refusal, Request, Rules, validate};
use super::{Limits, NbdError};

const HEADER_BYTES: usize = size_of::<RequestHeader>();

/// What stood at the start of the input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decoded {
    /// The start of a header, or nothing: the input is used up. Receive more.
    NeedMore,
    /// A valid request. After an [`Operation::Write`] its payload follows.
    Request(Command),
    /// A request to be answered with an error. The payload it may have had is gone.
    Refused {
        /// Goes into the reply.
        cookie: Cookie,
        /// The error to reply.
        refusal: Refusal,
    },
    /// All consumed bytes are payload of the write that was decoded last.
    Payload {
        /// The write's name.
        cookie: Cookie,
        /// Where in the write's range the bytes belong.
        at: u32,
        /// How many they are; equal to the step's `consumed`.
        length: u32,
        /// The write is complete.
        last: bool,
    },
    /// All consumed bytes belong to a write that will be refused; forget them.
    Skip {
        /// How many they are; equal to the step's `consumed`.
        length: u32,
    },
    /// The client is done: finish what is in flight, then close. Anything after it is ignored.
    Disconnect,
}

/// Result of [`Decoder::decode`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// Bytes of the input that were taken.
    pub consumed: usize,
    /// What they were.
    pub decoded: Decoded,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Header,
    Payload {
        cookie: Cookie,
        at: u32,
        left: u32,
    },
    Drain {
        cookie: Cookie,
        refusal: Refusal,
        left: u32,
    },
    Over,
}

/// The decoder of one connection's transmission phase.
#[derive(Debug)]
pub struct Decoder {
    rules: Rules,
    max_payload_bytes: u32,
    state: State,
    /// A header that the cuts of the stream have split.
    header: [u8; HEADER_BYTES],
    have: usize,
}

impl Decoder {
    /// A decoder for a session on its export.
    #[must_use]
    pub fn new(export: &Export, session: &Session, limits: &Limits) -> Self {
        let rules = Rules::new(export, session);
        Self {
            rules,
            max_payload_bytes: limits.max_drain_bytes.max(rules.max_block_bytes()),
            state: State::Header,
            header: [0; HEADER_BYTES],
            have: 0,
        }
    }

    /// Decodes the start of the input. Call again with what was not consumed until all is.
    ///
    /// # Errors
    /// [`NbdError::BadRequestMagic`] and [`NbdError::WriteTooLong`]: close the connection.
    pub fn decode(&mut self, input: &[u8]) -> Result<Step, NbdError> {
        if input.is_empty() && self.state != State::Over {
            return Ok(Step {
                consumed: 0,
                decoded: Decoded::NeedMore,
            });
        }
        match self.state {
            State::Header => self.header(input),
            State::Payload { cookie, at, left } => {
                let length = up_to(input, left);
                let last = self.payload_received(length)?;
                let decoded = Decoded::Payload {
                    cookie,
                    at,
                    length,
                    last,
                };
                Ok(Step {
                    consumed: length as usize,
                    decoded,
                })
            }
            State::Drain {
                cookie,
                refusal,
                left,
            } => {
                let length = up_to(input, left);
                let decoded = if length == left {
                    self.state = State::Header;
                    Decoded::Refused { cookie, refusal }
                } else {
                    self.state = State::Drain {
                        cookie,
                        refusal,
                        left: left - length,
                    };
                    Decoded::Skip { length }
                };
                Ok(Step {
                    consumed: length as usize,
                    decoded,
                })
            }
            State::Over => Ok(Step {
                consumed: input.len(),
                decoded: Decoded::Disconnect,
            }),
        }
    }

    /// Payload bytes that the write decoded last is still waiting for; 0 when there is none.
    #[must_use]
    pub fn payload_left(&self) -> u32 {
        match self.state {
            State::Payload { left, .. } => left,
            _ => 0,
        }
    }

    /// Payload bytes of a refused write that are still to be received and thrown away.
    #[must_use]
    pub fn drain_left(&self) -> u32 {
        match self.state {
            State::Drain { left, .. } => left,
            _ => 0,
        }
    }

    /// Counts payload that was received past this decoder, in the order of the stream: nothing of
    /// the stream before it may still lie undecoded in a buffer. True when the write is complete.
    ///
    /// # Errors
    /// [`NbdError::PayloadOverrun`] if the write does not wait for so much; the caller then has
    /// taken a later request for payload, and must close the connection.
    pub fn payload_received(&mut self, length: u32) -> Result<bool, NbdError> {
        let overrun = |left| NbdError::PayloadOverrun {
            reported: length,
            left,
        };
        let State::Payload { cookie, at, left } = self.state else {
            return Err(overrun(0));
        };
        let rest = left.checked_sub(length).ok_or_else(|| overrun(left))?;
        self.state = if rest == 0 {
            State::Header
        } else {
            State::Payload {
                cookie,
                at: at + length,
                left: rest,
            }
        };
        Ok(rest == 0)
    }

    /// Gives up the write decoded last, for a reason of the caller's: what is left of its payload
    /// will be skipped and [`Decoded::Refused`] will follow. False if no payload is outstanding;
    /// the caller then answers the write itself.
    #[must_use]
    pub fn refuse_payload(&mut self, refusal: Refusal) -> bool {
        let State::Payload { cookie, left, .. } = self.state else {
            return false;
        };
        self.state = State::Drain {
            cookie,
            refusal,
            left,
        };
        true
    }

    fn header(&mut self, input: &[u8]) -> Result<Step, NbdError> {
        let consumed = input.len().min(HEADER_BYTES - self.have);
        self.header[self.have..self.have + consumed].copy_from_slice(&input[..consumed]);
        self.have += consumed;
        if self.have < HEADER_BYTES {
            return Ok(Step {
                consumed,
                decoded: Decoded::NeedMore,
            });
        }
        self.have = 0;
        let length = up_to(&input[..consumed], u32::MAX);
        let decoded =
            Request::parse(&self.header).and_then(|request| self.request(&request, length));
        if decoded.is_err() {
            self.state = State::Over;
        }
        Ok(Step {
            consumed,
            decoded: decoded?,
        })
    }

    /// `consumed` bytes of the input were the end of this header.
    fn request(&mut self, request: &Request, consumed: u32) -> Result<Decoded, NbdError> {
        let (cookie, payload) = (request.cookie, request.payload_bytes());
        if payload > self.max_payload_bytes {
            let limit = self.max_payload_bytes;
            return Err(NbdError::WriteTooLong {
                length: payload,
                limit,
            });
        }
        Ok(match validate(request, &self.rules) {
            Ok(Command {
                operation: Operation::Disconnect,
                ..
            }) => {
                self.state = State::Over;
                Decoded::Disconnect
            }
            Ok(command) => {
                if payload > 0 {
                    self.state = State::Payload {
                        cookie,
                        at: 0,
                        left: payload,
                    };
                }
                Decoded::Request(command)
            }
            Err(refusal) if payload > 0 => {
                self.state = State::Drain {
                    cookie,
                    refusal,
                    left: payload,
                };
                Decoded::Skip { length: consumed }
            }
            Err(refusal) => Decoded::Refused { cookie, refusal },
        })
    }
}

/// The length of the input, but at most `limit`.
fn up_to(input: &[u8], limit: u32) -> u32 {
    u32::try_from(input.len()).map_or(limit, |length| length.min(limit))
}
