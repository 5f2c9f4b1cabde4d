//! Control messages: typed, and between them and the wire the protobuf of `proto/control.proto`.
//!
//! Decoding turns every field into its type or refuses the message: a missing part, a hash of the
//! wrong length, an unknown enum value. Texts and lists from a peer are cut to a bound, since they
//! end up in logs and status.

use bytes::Bytes;
use hn4::types::{ChainHash, Epoch, Incarnation, NodeId, Rank, Term, VolumeId};
use prost::Message;

use super::{WireError, proto};
use crate::session::api::{
    AckState, CopyState, FeedRefusal, Field, FoundBy, LocalState, Refusal, Role, StateRoot, Tip,
};
use crate::session::capability::CapabilityList;

/// The largest payload of a frame on the control stream.
pub const MAX_CONTROL_BYTES: usize = 64 << 10;
/// The longest text that is taken from a peer, in bytes.
const MAX_TEXT_BYTES: usize = 512;
const MAX_CAPABILITY_LISTS: usize = 16;
const MAX_CAPABILITY_VALUES: usize = 64;

/// The first message of either side.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Lowest and highest protocol version the sender speaks.
    pub protocol: (u32, u32),
    /// What the sender can do.
    pub capabilities: Vec<CapabilityList>,
    /// What the sender's copy is.
    pub state: LocalState,
}

/// A message on the control stream, apart from heartbeats and errors.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(
    missing_docs,
    reason = "each is described where the session's API uses its content"
)]
pub enum ControlMessage {
    Hello(Box<Hello>),
    Subscribe {
        tip: Tip,
        anchored: Tip,
    },
    SeedRequest {
        cursor_bytes: u64,
        from: Tip,
    },
    FeedRefused(FeedRefusal),
    Anchored(Tip),
    Ack(AckState),
    Credit {
        bytes: u64,
    },
    SeedAck {
        cursor_bytes: u64,
    },
    TermNotice(Term),
    FrameAck {
        control_sequence: u64,
        data_sequence: u64,
    },
    State(Box<LocalState>),
    StepDown,
    Proof(Bytes),
    Root(StateRoot),
    Tree(Bytes),
}

impl ControlMessage {
    /// Whether the receiver hands it to its daemon, so that it counts in the control window.
    #[must_use]
    pub fn needs_ack(&self) -> bool {
        !matches!(self, Self::Hello(_) | Self::FrameAck { .. })
    }

    /// The payload of a control frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        use proto::control::Body;
        let body = match self {
            Self::Hello(hello) => Body::Hello(proto::Hello {
                protocol_min: hello.protocol.0,
                protocol_max: hello.protocol.1,
                capabilities: hello.capabilities.iter().map(list_to_wire).collect(),
                state: Some(state_to_wire(&hello.state)),
            }),
            Self::Subscribe { tip, anchored } => Body::Subscribe(proto::Subscribe {
                tip: Some(tip_to_wire(*tip)),
                anchored: Some(tip_to_wire(*anchored)),
            }),
            Self::SeedRequest { cursor_bytes, from } => Body::SeedRequest(proto::SeedRequest {
                cursor_bytes: *cursor_bytes,
                from: Some(tip_to_wire(*from)),
            }),
            Self::FeedRefused(refusal) => Body::FeedRefused(refusal_to_wire(*refusal)),
            Self::Anchored(tip) => Body::Anchored(tip_to_wire(*tip)),
            Self::Ack(ack) => Body::Ack(proto::Ack {
                received: ack.received.0,
                durable: ack.durable.0,
                proven: ack.proven.0,
                applied: ack.applied.0,
            }),
            Self::Credit { bytes } => Body::Credit(proto::Credit { bytes: *bytes }),
            Self::SeedAck { cursor_bytes } => Body::SeedAck(proto::SeedAck {
                cursor_bytes: *cursor_bytes,
            }),
            Self::TermNotice(term) => Body::TermNotice(proto::TermNotice {
                term: Some(term_to_wire(*term)),
            }),
            Self::FrameAck {
                control_sequence,
                data_sequence,
            } => Body::FrameAck(proto::FrameAck {
                control_sequence: *control_sequence,
                data_sequence: *data_sequence,
            }),
            Self::State(state) => Body::State(state_to_wire(state)),
            Self::StepDown => Body::StepDown(proto::StepDown {}),
            Self::Proof(message) => Body::Proof(message.to_vec()),
            Self::Root(StateRoot { at, root }) => Body::Root(proto::Root {
                at: Some(tip_to_wire(*at)),
                root: root.to_vec(),
            }),
            Self::Tree(message) => Body::Tree(message.to_vec()),
        };
        proto::Control { body: Some(body) }.encode_to_vec()
    }

    /// Reads the payload of a control frame.
    ///
    /// # Errors
    ///
    /// If it is not a message of this protocol version with all its parts.
    pub fn decode(payload: Bytes) -> Result<Self, WireError> {
        use proto::control::Body;
        let control = proto::Control::decode(payload)
            .map_err(|error| WireError::Message(format!("control: {error}")))?;
        Ok(
            match control
                .body
                .ok_or_else(|| malformed("control message of an unknown kind"))?
            {
                Body::Hello(hello) => Self::Hello(Box::new(hello_from_wire(hello)?)),
                Body::Subscribe(subscribe) => Self::Subscribe {
                    tip: tip_from_wire(subscribe.tip)?,
                    anchored: tip_from_wire(subscribe.anchored)?,
                },
                Body::SeedRequest(request) => Self::SeedRequest {
                    cursor_bytes: request.cursor_bytes,
                    from: tip_from_wire(request.from)?,
                },
                Body::FeedRefused(refused) => Self::FeedRefused(refusal_from_wire(refused)?),
                Body::Anchored(tip) => Self::Anchored(tip_from_wire(Some(tip))?),
                Body::Ack(ack) => Self::Ack(AckState {
                    received: Epoch(ack.received),
                    durable: Epoch(ack.durable),
                    proven: Epoch(ack.proven),
                    applied: Epoch(ack.applied),
                }),
                Body::Credit(credit) => Self::Credit {
                    bytes: credit.bytes,
                },
                Body::SeedAck(ack) => Self::SeedAck {
                    cursor_bytes: ack.cursor_bytes,
                },
                Body::TermNotice(notice) => Self::TermNotice(term_from_wire(notice.term)?),
                Body::FrameAck(ack) => Self::FrameAck {
                    control_sequence: ack.control_sequence,
                    data_sequence: ack.data_sequence,
                },
                Body::State(state) => Self::State(Box::new(state_from_wire(state)?)),
                Body::StepDown(proto::StepDown {}) => Self::StepDown,
                Body::Proof(message) => Self::Proof(message.into()),
                Body::Root(root) => Self::Root(StateRoot {
                    at: tip_from_wire(root.at)?,
                    root: root
                        .root
                        .try_into()
                        .map_err(|_| malformed("a state root is not 32 bytes"))?,
                }),
                Body::Tree(message) => Self::Tree(message.into()),
            },
        )
    }
}

/// A heartbeat, or the answer to one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heartbeat {
    /// Chosen by the asker, repeated in the answer.
    pub id: u64,
    /// Whether this is the answer.
    pub answer: bool,
}

impl Heartbeat {
    /// The payload of a heartbeat frame.
    #[must_use]
    pub fn encode(self) -> Vec<u8> {
        proto::Heartbeat {
            id: self.id,
            answer: self.answer,
        }
        .encode_to_vec()
    }

    /// Reads the payload of a heartbeat frame.
    ///
    /// # Errors
    ///
    /// If it is not a heartbeat.
    pub fn decode(payload: Bytes) -> Result<Self, WireError> {
        proto::Heartbeat::decode(payload)
            .map(|heartbeat| Self {
                id: heartbeat.id,
                answer: heartbeat.answer,
            })
            .map_err(|error| WireError::Message(format!("heartbeat: {error}")))
    }
}

/// Why the sender ends the session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ErrorMessage {
    /// The receiver broke the protocol.
    Protocol(String),
    /// Something both must agree on differs.
    Refused(Refusal),
    /// The receiver did not answer a heartbeat.
    Heartbeat,
    /// The sender's role or term changed.
    RoleChanged,
    /// The sender closes; nothing is wrong.
    Closing,
}

impl ErrorMessage {
    /// The payload of an error frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut error = proto::Error::default();
        match self {
            Self::Protocol(text) => {
                error.set_code(proto::ErrorCode::ErrorProtocol);
                error.text = bounded(text);
            }
            Self::Refused(refusal) => {
                error.set_code(proto::ErrorCode::ErrorRefused);
                error.set_refused_field(field_to_wire(refusal.field));
                error.text = bounded(&refusal.to_string());
                error.ours = bounded(&refusal.ours);
                error.theirs = bounded(&refusal.theirs);
            }
            Self::Heartbeat => error.set_code(proto::ErrorCode::ErrorHeartbeat),
            Self::RoleChanged => error.set_code(proto::ErrorCode::ErrorRoleChanged),
            Self::Closing => error.set_code(proto::ErrorCode::ErrorClosing),
        }
        error.encode_to_vec()
    }

    /// Reads the payload of an error frame. In a refusal, "ours" becomes the receiver's value.
    ///
    /// # Errors
    ///
    /// If it is not an error message of a known kind.
    pub fn decode(payload: Bytes) -> Result<Self, WireError> {
        let error = proto::Error::decode(payload)
            .map_err(|error| WireError::Message(format!("error: {error}")))?;
        Ok(match error.code() {
            proto::ErrorCode::ErrorUnspecified => {
                return Err(malformed("error message without a code"));
            }
            proto::ErrorCode::ErrorProtocol => Self::Protocol(bounded(&error.text)),
            proto::ErrorCode::ErrorRefused => Self::Refused(Refusal {
                found_by: FoundBy::Peer,
                field: field_from_wire(error.refused_field())?,
                ours: bounded(&error.theirs),
                theirs: bounded(&error.ours),
            }),
            proto::ErrorCode::ErrorHeartbeat => Self::Heartbeat,
            proto::ErrorCode::ErrorRoleChanged => Self::RoleChanged,
            proto::ErrorCode::ErrorClosing => Self::Closing,
        })
    }
}

fn malformed(what: &str) -> WireError {
    WireError::Message(what.to_owned())
}

/// Cuts a text to what may be kept of it, at a character border.
fn bounded(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

fn tip_to_wire(tip: Tip) -> proto::Tip {
    proto::Tip {
        epoch: tip.0.0,
        chain: tip.1.0.to_vec(),
    }
}

fn tip_from_wire(tip: Option<proto::Tip>) -> Result<Tip, WireError> {
    let tip = tip.ok_or_else(|| malformed("a tip is missing"))?;
    let chain = tip
        .chain
        .try_into()
        .map_err(|_| malformed("a chain hash is not 32 bytes"))?;
    Ok((Epoch(tip.epoch), ChainHash(chain)))
}

fn term_to_wire(term: Term) -> proto::Term {
    proto::Term {
        counter: term.counter,
        node: term.node.0.to_vec(),
    }
}

fn term_from_wire(term: Option<proto::Term>) -> Result<Term, WireError> {
    let term = term.ok_or_else(|| malformed("a term is missing"))?;
    Ok(Term {
        counter: term.counter,
        node: NodeId(sixteen(term.node)?),
    })
}

fn sixteen(bytes: Vec<u8>) -> Result<[u8; 16], WireError> {
    bytes
        .try_into()
        .map_err(|_| malformed("an identity is not 16 bytes"))
}

fn list_to_wire(list: &CapabilityList) -> proto::CapabilityList {
    proto::CapabilityList {
        name: list.name.clone(),
        needed: list.needed,
        values: list.values.clone(),
    }
}

fn hello_from_wire(hello: proto::Hello) -> Result<Hello, WireError> {
    let too_many = hello.capabilities.len() > MAX_CAPABILITY_LISTS
        || hello
            .capabilities
            .iter()
            .any(|list| list.values.len() > MAX_CAPABILITY_VALUES);
    if too_many {
        return Err(malformed("hello lists too many capabilities"));
    }
    let lists = hello.capabilities.iter().map(|list| CapabilityList {
        name: bounded(&list.name),
        needed: list.needed,
        values: list.values.iter().map(|value| bounded(value)).collect(),
    });
    Ok(Hello {
        protocol: (hello.protocol_min, hello.protocol_max),
        capabilities: lists.collect(),
        state: state_from_wire(
            hello
                .state
                .ok_or_else(|| malformed("hello without a state"))?,
        )?,
    })
}

fn state_to_wire(state: &LocalState) -> proto::State {
    let (copy, seed_cursor_bytes) = match state.copy {
        CopyState::Fresh | CopyState::Surveying => (proto::Copy::Fresh, 0),
        CopyState::Seeding { cursor_bytes } => (proto::Copy::Seeding, cursor_bytes),
        CopyState::Usable | CopyState::Shadowing { .. } => (proto::Copy::Usable, 0),
    };
    let role = match state.role {
        Role::Primary => proto::Role::Primary,
        Role::Replica => proto::Role::Replica,
        Role::Fenced => proto::Role::Fenced,
    };
    proto::State {
        node: state.node.0.to_vec(),
        volume: state.volume.0.to_vec(),
        birth_nonce: state.birth_nonce.to_vec(),
        size_bytes: state.size_bytes,
        sector_bytes: state.sector_bytes,
        format_version: state.format_version.into(),
        max_epoch_bytes: state.max_epoch_bytes,
        role: role.into(),
        term: Some(term_to_wire(state.term)),
        incarnation: state.incarnation.0,
        tip: Some(tip_to_wire(state.tip)),
        anchored: Some(tip_to_wire(state.anchored)),
        durable: state.durable.0,
        applied: state.applied.0,
        copy: copy.into(),
        seed_cursor_bytes,
        tip_term: state.tip_rank.term,
        tip_incarnation: state.tip_rank.incarnation.0,
        proves: state.proves,
        compares: state.compares,
        repairs: state.repairs,
        resyncs: state.resyncs,
    }
}

fn state_from_wire(state: proto::State) -> Result<LocalState, WireError> {
    let role = match state.role() {
        proto::Role::Unspecified => return Err(malformed("a state without a role")),
        proto::Role::Primary => Role::Primary,
        proto::Role::Replica => Role::Replica,
        proto::Role::Fenced => Role::Fenced,
    };
    let copy = match state.copy() {
        proto::Copy::Unspecified => return Err(malformed("a state without a copy state")),
        proto::Copy::Fresh => CopyState::Fresh,
        proto::Copy::Seeding => CopyState::Seeding {
            cursor_bytes: state.seed_cursor_bytes,
        },
        proto::Copy::Usable => CopyState::Usable,
    };
    Ok(LocalState {
        role,
        copy,
        node: NodeId(sixteen(state.node)?),
        volume: VolumeId(sixteen(state.volume)?),
        birth_nonce: sixteen(state.birth_nonce)?,
        size_bytes: state.size_bytes,
        sector_bytes: state.sector_bytes,
        format_version: u16::try_from(state.format_version)
            .map_err(|_| malformed("a format version exceeds 16 bits"))?,
        max_epoch_bytes: state.max_epoch_bytes,
        term: term_from_wire(state.term)?,
        incarnation: Incarnation(state.incarnation),
        tip: tip_from_wire(state.tip)?,
        tip_rank: Rank {
            term: state.tip_term,
            incarnation: Incarnation(state.tip_incarnation),
        },
        anchored: tip_from_wire(state.anchored)?,
        durable: Epoch(state.durable),
        applied: Epoch(state.applied),
        proves: state.proves,
        compares: state.compares,
        repairs: state.repairs,
        resyncs: state.resyncs,
    })
}

fn refusal_to_wire(refusal: FeedRefusal) -> proto::FeedRefused {
    use proto::feed_refused::{Diverged, Reason, TooOld};
    let reason = match refusal {
        FeedRefusal::Truncate { to } => Reason::Truncate(tip_to_wire(to)),
        FeedRefusal::Diverged { epoch } => Reason::Diverged(Diverged { epoch: epoch.0 }),
        FeedRefusal::TooOld { oldest } => Reason::TooOld(TooOld { oldest: oldest.0 }),
    };
    proto::FeedRefused {
        reason: Some(reason),
    }
}

fn refusal_from_wire(refused: proto::FeedRefused) -> Result<FeedRefusal, WireError> {
    use proto::feed_refused::Reason;
    Ok(
        match refused
            .reason
            .ok_or_else(|| malformed("a feed refused without a reason"))?
        {
            Reason::Truncate(to) => FeedRefusal::Truncate {
                to: tip_from_wire(Some(to))?,
            },
            Reason::Diverged(diverged) => FeedRefusal::Diverged {
                epoch: Epoch(diverged.epoch),
            },
            Reason::TooOld(too_old) => FeedRefusal::TooOld {
                oldest: Epoch(too_old.oldest),
            },
        },
    )
}

fn field_to_wire(field: Field) -> proto::RefusedField {
    match field {
        Field::Protocol => proto::RefusedField::FieldProtocol,
        Field::Capabilities => proto::RefusedField::FieldCapabilities,
        Field::VolumeId => proto::RefusedField::FieldVolumeId,
        Field::BirthNonce => proto::RefusedField::FieldBirthNonce,
        Field::SizeBytes => proto::RefusedField::FieldSizeBytes,
        Field::SectorBytes => proto::RefusedField::FieldSectorBytes,
        Field::FormatVersion => proto::RefusedField::FieldFormatVersion,
        Field::Node => proto::RefusedField::FieldNode,
        Field::Fork => proto::RefusedField::FieldFork,
        Field::NotShared => proto::RefusedField::FieldNotShared,
        Field::Roles => proto::RefusedField::FieldRoles,
    }
}

fn field_from_wire(field: proto::RefusedField) -> Result<Field, WireError> {
    Ok(match field {
        proto::RefusedField::FieldUnspecified => {
            return Err(malformed("a refusal that names no field"));
        }
        proto::RefusedField::FieldProtocol => Field::Protocol,
        proto::RefusedField::FieldCapabilities => Field::Capabilities,
        proto::RefusedField::FieldVolumeId => Field::VolumeId,
        proto::RefusedField::FieldBirthNonce => Field::BirthNonce,
        proto::RefusedField::FieldSizeBytes => Field::SizeBytes,
        proto::RefusedField::FieldSectorBytes => Field::SectorBytes,
        proto::RefusedField::FieldFormatVersion => Field::FormatVersion,
        proto::RefusedField::FieldNode => Field::Node,
        proto::RefusedField::FieldFork => Field::Fork,
        proto::RefusedField::FieldNotShared => Field::NotShared,
        proto::RefusedField::FieldRoles => Field::Roles,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> ControlMessage {
        ControlMessage::Root(StateRoot {
            at: (Epoch(300), ChainHash([7; 32])),
            root: [9; 32],
        })
    }

    /// The bytes of [`root`], by hand from `proto/control.proto`.
    fn root_bytes(root_length: u8) -> Vec<u8> {
        let mut bytes = vec![0x7A, 41 + root_length, 0x0A, 37, 0x08, 0xAC, 0x02, 0x12, 32];
        bytes.extend([7; 32]);
        bytes.extend([0x12, root_length]);
        bytes.extend(std::iter::repeat_n(9, root_length.into()));
        bytes
    }

    #[test]
    fn a_state_root_has_these_bytes() {
        assert_eq!(root().encode(), root_bytes(32));
        let read = ControlMessage::decode(root_bytes(32).into());
        assert_eq!(read.ok(), Some(root()));
    }

    #[test]
    fn a_state_root_that_is_none_is_refused() {
        for length in [0, 31, 33] {
            assert!(ControlMessage::decode(root_bytes(length).into()).is_err());
        }
        // Without a place.
        let mut lost = vec![0x7A, 34, 0x12, 32];
        lost.extend([9; 32]);
        assert!(ControlMessage::decode(lost.into()).is_err());
        let whole = root_bytes(32);
        for end in 1..whole.len() {
            assert!(ControlMessage::decode(whole[..end].to_vec().into()).is_err());
        }
    }

    #[test]
    fn a_peer_that_does_not_say_that_it_compares_does_not() {
        let state = crate::session::testing::state(1);
        let silent = proto::State {
            compares: false,
            ..state_to_wire(&state)
        };
        // A field of the value zero is not on the wire at all.
        let read = state_from_wire(silent).expect("a state");
        assert!(state.compares && !read.compares);
    }
}
