//! Between the words of sessions and those of the core.
//!
//! Engine and transport do not know each other; this is where they meet. Nothing is decided here.

use bytes::Bytes;
use hn4::log::{CopyState, FORMAT_VERSION, LogIdentity, Role};
use hn4::types::NodeId;
use hn4_engine::core::event::{
    Contents, CopyStatus, FeedRefusal, PeerEvent, PeerMessage, PeerState, Progress, SeedOrigin,
    SeedPiece, Tip,
};
use hn4_transport::session as wire;
use hn4_transport::session::{Input, LocalState, Output};

/// What hello says about a copy.
pub(super) fn local_state(
    identity: &LogIdentity,
    node: NodeId,
    max_epoch_bytes: u64,
    proves: bool,
    status: &CopyStatus,
) -> LocalState {
    LocalState {
        node,
        volume: identity.volume,
        birth_nonce: identity.birth_nonce,
        size_bytes: identity.size_bytes,
        sector_bytes: identity.sector_bytes,
        format_version: FORMAT_VERSION,
        max_epoch_bytes,
        role: match status.role {
            Role::Primary => wire::Role::Primary,
            Role::Replica => wire::Role::Replica,
            Role::Fenced => wire::Role::Fenced,
        },
        term: status.term,
        incarnation: status.incarnation,
        tip: (status.tip.epoch, status.tip.chain),
        tip_rank: status.tip_rank,
        anchored: (status.anchored.epoch, status.anchored.chain),
        durable: status.progress.durable,
        applied: status.progress.applied,
        copy: match status.copy {
            CopyState::Fresh if status.surveys => wire::CopyState::Surveying,
            CopyState::Fresh => wire::CopyState::Fresh,
            CopyState::Seeding {
                cursor_bytes,
                until: None,
                ..
            } => wire::CopyState::Seeding { cursor_bytes },
            // All pieces are here: what is missing is epochs, and those are subscribed to.
            CopyState::Seeding { until: Some(_), .. }
            | CopyState::Usable
            | CopyState::Applying { .. } => wire::CopyState::Usable,
            CopyState::Shadowing {
                cursor_bytes,
                from,
                from_chain,
                ..
            } => wire::CopyState::Shadowing {
                cursor_bytes,
                from: (from, from_chain),
            },
        },
        proves,
        compares: false,
        repairs: false,
        resyncs: false,
    }
}

/// What a peer's session says about its copy.
fn peer_state(state: &LocalState) -> PeerState {
    PeerState {
        role: match state.role {
            wire::Role::Primary => Role::Primary,
            wire::Role::Replica => Role::Replica,
            wire::Role::Fenced => Role::Fenced,
        },
        term: state.term,
        incarnation: state.incarnation,
        tip: tip(state.tip),
        tip_rank: state.tip_rank,
        usable: state.copy == wire::CopyState::Usable,
        resyncs: state.resyncs,
        is_filled: matches!(state.copy, wire::CopyState::Seeding { .. }),
    }
}

fn tip((epoch, chain): wire::Tip) -> Tip {
    Tip { epoch, chain }
}

fn pair(tip: Tip) -> wire::Tip {
    (tip.epoch, tip.chain)
}

/// What a session says, for the core; `None` if it is not the core's business.
pub(super) fn event(output: Output) -> Option<PeerEvent> {
    Some(match output {
        Output::Subscribe { tip: at, anchored } => PeerEvent::Subscribe {
            tip: tip(at),
            anchored: tip(anchored),
        },
        Output::SeedRequest { cursor_bytes, from } => PeerEvent::SeedRequest {
            cursor_bytes,
            from: tip(from),
        },
        Output::FeedOpened { from } => PeerEvent::FeedOpened(from),
        Output::EpochReceived { frame, .. } => PeerEvent::Epoch(frame.into()),
        Output::Anchored { epoch, chain } => PeerEvent::Anchored(Tip { epoch, chain }),
        Output::PeerAck(ack) => PeerEvent::Ack(Progress {
            received: ack.received,
            durable: ack.durable,
            proven: ack.proven,
            applied: ack.applied,
        }),
        Output::PeerCredit { bytes } => PeerEvent::Credit(bytes),
        Output::Truncate { to } => PeerEvent::Truncate(tip(to)),
        Output::Diverged { epoch } => PeerEvent::Diverged(epoch),
        Output::TooOld { oldest } => PeerEvent::TooOld { oldest },
        Output::SeedStart {
            from,
            log_offset,
            cursor_bytes,
        } => PeerEvent::SeedStart(SeedOrigin {
            from: tip(from),
            log_offset,
            cursor_bytes,
        }),
        Output::SeedPiece(piece) => return piece_event(piece),
        Output::SeedEnd { usable_after } => PeerEvent::SeedEnd { usable_after },
        Output::HigherTerm { term } => PeerEvent::HigherTerm(term),
        Output::PeerState(state) => PeerEvent::State(peer_state(&state)),
        Output::SeedAck { .. }
        | Output::StepDown
        | Output::Alive
        | Output::Proof(_)
        | Output::Root(_)
        | Output::Tree(_)
        | Output::Refused { .. }
        | Output::Closed { .. } => return None,
    })
}

/// The checksum was made where the data was read; a piece that does not match it is turned into one
/// that the core refuses, which ends the session.
fn piece_event(piece: wire::SeedPiece) -> Option<PeerEvent> {
    let bytes = piece.volume_bytes();
    let offset = piece.offset_bytes;
    let contents = match piece.kind {
        wire::PieceKind::Zero { .. } => Contents::Zeroes,
        wire::PieceKind::Same { .. } => Contents::Same,
        wire::PieceKind::Data(data) if crc32c::crc32c(&data) == piece.checksum => {
            Contents::Data(data.into())
        }
        wire::PieceKind::Data(_) => {
            tracing::warn!(
                offset,
                "a piece of a full copy was damaged on its way; it is refused"
            );
            Contents::Data(Vec::new())
        }
    };
    Some(PeerEvent::SeedPiece(SeedPiece {
        offset,
        bytes,
        contents,
    }))
}

/// What the core says, for a session.
pub(super) fn input(message: PeerMessage) -> Input {
    match message {
        PeerMessage::FeedOpened(from) => Input::FeedOpened { from },
        PeerMessage::FeedRefused(refusal) => Input::FeedRefused(match refusal {
            FeedRefusal::Truncate(to) => wire::FeedRefusal::Truncate { to: pair(to) },
            FeedRefusal::Diverged(epoch) => wire::FeedRefusal::Diverged { epoch },
            FeedRefusal::TooOld { oldest } => wire::FeedRefusal::TooOld { oldest },
        }),
        PeerMessage::Anchored(Tip { epoch, chain }) => Input::Anchored { epoch, chain },
        PeerMessage::SeedStart(SeedOrigin {
            from,
            log_offset,
            cursor_bytes,
        }) => Input::SeedStart {
            from: pair(from),
            log_offset,
            cursor_bytes,
        },
        PeerMessage::SeedEnd { usable_after } => Input::SeedEnd { usable_after },
        PeerMessage::Ack(progress) => Input::Ack(wire::AckState {
            received: progress.received,
            durable: progress.durable,
            proven: progress.proven,
            applied: progress.applied,
        }),
        PeerMessage::Credit(bytes) => Input::Credit { bytes },
        PeerMessage::SeedAck(cursor_bytes) => Input::SeedAck { cursor_bytes },
        PeerMessage::Pull { tip, anchored } => Input::Subscribe {
            tip: pair(tip),
            anchored: pair(anchored),
        },
        PeerMessage::Close => Input::Close,
    }
}

/// A piece of the backing, for a session.
pub(super) fn piece_input(piece: SeedPiece) -> Input {
    let length = piece.bytes;
    let kind = match piece.contents {
        Contents::Zeroes => wire::PieceKind::Zero { length },
        Contents::Same => wire::PieceKind::Same { length },
        Contents::Data(data) => wire::PieceKind::Data(Bytes::from(data)),
    };
    let checksum = match &kind {
        wire::PieceKind::Data(data) => crc32c::crc32c(data),
        wire::PieceKind::Zero { .. } | wire::PieceKind::Same { .. } => 0,
    };
    Input::SeedPiece(wire::SeedPiece {
        offset_bytes: piece.offset,
        kind,
        checksum,
    })
}
