//! What the daemon and a session say to each other.
//!
//! One session is one conversation about one volume with one peer. The daemon tells it what is true
//! here ([`LocalState`]) and what to send ([`Input`]); the session tells what the peer is and sent
//! ([`Output`]). Everything in an `Output` that came from the peer is a *proposal* (promise P6): it
//! has passed identity, framing and bounds here, and nothing more. Chain, term and proof of what a
//! frame contains are for the daemon to check.
//!
//! # Order of things
//!
//! 1. Both sides exchange hello. The first output of a good session is [`Output::PeerState`].
//! 2. The side that is a replica asks: [`Output::Subscribe`] or [`Output::SeedRequest`] appears at
//!    the primary's daemon. The session sends these by itself, whenever the local state says so.
//! 3. The primary's daemon answers with [`Input::FeedOpened`], [`Input::FeedRefused`] or
//!    [`Input::SeedStart`], and then sends epochs and pieces while it has credit.
//! 4. The replica's daemon grants credit ([`Input::Credit`]) as it takes frames in, from the start
//!    of the session: no frame travels before the first grant.
//!
//! Feed, seed and epoch messages keep their order among themselves. Control (acks, anchors, credit)
//! keeps its own order, and *may overtake* them: an [`Output::Anchored`] may name an epoch whose
//! frame has not arrived yet. Acks, anchors and credit are states, not events: when the line is
//! slow, a newer one replaces an older one that was not sent yet (credit is summed up).
//!
//! After [`Output::Closed`] nothing more comes from that session, and nothing sent to it has any
//! effect. A daemon that reconnects gets a new session with a new [`SessionId`].

use std::fmt;

use bytes::Bytes;
use hn4::types::{ChainHash, Epoch, Incarnation, LogOffset, NodeId, Rank, Term, VolumeId};

/// Identifies one session of a peer handle. Inputs that name an ended session are dropped, so that
/// nothing meant for an old conversation leaks into the next one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SessionId(pub u64);

/// What a node does with a volume at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// Appends to the log from its own clients.
    Primary,
    /// Appends to the log what a primary sends.
    Replica,
    /// Has given up or lost the right to append, and has not joined anybody yet. A fenced node
    /// says hello but never subscribes by itself.
    Fenced,
}

/// How complete the local copy of the volume is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CopyState {
    /// Nothing of the volume has arrived here yet; its birth nonce is not known.
    Fresh,
    /// The same, but what somebody brought is looked at first, so nothing is asked for yet. A peer
    /// is told that it is fresh.
    Surveying,
    /// A first full copy is under way.
    Seeding {
        /// Bytes of the volume, from its start, that are durable here: where to go on.
        cursor_bytes: u64,
    },
    /// The copy is an exact epoch state.
    Usable,
    /// The same, but too old for the peer's log: it asks for a full copy, which it keeps apart
    /// until that is complete. A peer is told that it is usable.
    Shadowing {
        /// As with `Seeding`.
        cursor_bytes: u64,
        /// Where the copy began.
        from: Tip,
    },
}

/// A place in a volume's history: an epoch and the chain hash of its frame.
pub type Tip = (Epoch, ChainHash);

/// What a node says about its copy of a volume. Sent whole in hello.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LocalState {
    /// Who is speaking.
    pub node: NodeId,
    /// The volume both sides must agree on.
    pub volume: VolumeId,
    /// Drawn when the volume was created; must be equal unless one of the copies is `Fresh`.
    pub birth_nonce: [u8; 16],
    /// Size of the volume in bytes; must be equal.
    pub size_bytes: u64,
    /// Logical sector size in bytes, 512 or 4096; must be equal.
    pub sector_bytes: u32,
    /// Version of the delta-log format; must be equal.
    pub format_version: u16,
    /// The largest epoch this node can take, in bytes. The smaller one of both sides holds.
    pub max_epoch_bytes: u64,
    /// What this node does with the volume.
    pub role: Role,
    /// The highest term this node has persisted.
    pub term: Term,
    /// How often a primary has opened the volume in that term.
    pub incarnation: Incarnation,
    /// End of the log: last epoch with its chain hash.
    pub tip: Tip,
    /// Which opening of a primary sealed the tip.
    pub tip_rank: Rank,
    /// The last epoch that is known to be anchored.
    pub anchored: Tip,
    /// Every epoch up to this one is durable here.
    pub durable: Epoch,
    /// Every epoch up to this one is in the backing.
    pub applied: Epoch,
    /// How complete the copy is.
    pub copy: CopyState,
    /// A prover runs beside the copy, so that [`Input::Proof`] may be sent to it.
    pub proves: bool,
    /// A state tree is kept beside the copy, so that [`Input::Root`] may be sent to it.
    pub compares: bool,
    /// The state tree asks and answers, so that [`Input::Tree`] may be sent to it.
    pub repairs: bool,
    /// The state tree can be compared with another one, node by node, and
    /// [`PieceKind::Same`] may be sent. It may change while a session is open.
    pub resyncs: bool,
}

/// The root of a copy's state tree where its backing is at one place of the history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StateRoot {
    /// Epoch and chain hash.
    pub at: Tip,
    /// The root.
    pub root: [u8; 32],
}

/// Why a primary does not open the feed that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FeedRefusal {
    /// The asker's tail is not part of this history, but nothing of it was anchored: drop what
    /// lies after `to` and subscribe again. The session subscribes by itself as soon as the local
    /// state shows a tip no later than `to`.
    Truncate {
        /// The last epoch both sides have.
        to: Tip,
    },
    /// The asker's *anchored* history differs from this one: a fork. Nothing is done about it
    /// without an operator.
    Diverged {
        /// The epoch at which the chain hashes differ.
        epoch: Epoch,
    },
    /// The log does not reach back that far; the asker needs a copy.
    TooOld {
        /// The oldest epoch this log can still send.
        oldest: Epoch,
    },
}

/// Progress of a replica, always cumulative: "every epoch up to and including this one".
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AckState {
    /// In memory at the replica, checked, and next in its log.
    pub received: Epoch,
    /// Flushed into the replica's log.
    pub durable: Epoch,
    /// Known to be anchored at the replica.
    pub proven: Epoch,
    /// Destaged into the replica's backing.
    pub applied: Epoch,
}

/// What a piece of a full copy holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PieceKind {
    /// Bytes of the volume, at most [`Config::max_piece_bytes`](super::Config::max_piece_bytes).
    Data(Bytes),
    /// A range that reads as zeroes; travels without payload, of any length within the volume.
    Zero {
        /// Bytes in the range.
        length: u64,
    },
    /// A range that the receiver's copy holds already, as comparing state trees has shown; of any
    /// length within the volume. Only to a peer whose state says that it resyncs.
    Same {
        /// Bytes in the range.
        length: u64,
    },
}

/// A part of a full copy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SeedPiece {
    /// Byte offset on the volume.
    pub offset_bytes: u64,
    /// What lies there.
    pub kind: PieceKind,
    /// CRC-32C of the data, 0 without any. Made at the source, checked by the sink's daemon: it
    /// covers the way from disk to disk, where the frame's own checks cover only the wire.
    pub checksum: u32,
}

impl SeedPiece {
    /// Bytes of the volume that the piece describes.
    #[must_use]
    pub fn volume_bytes(&self) -> u64 {
        match &self.kind {
            PieceKind::Data(bytes) => bytes.len() as u64,
            PieceKind::Zero { length } | PieceKind::Same { length } => *length,
        }
    }
}

/// From the daemon to a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// The local state has changed. A change of role or of term ends the session with
    /// [`CloseReason::RoleChanged`], with one exception: a replica may adopt the term of this peer.
    /// (The driver sends this from its watch channel; the daemon does not need to.)
    LocalState(LocalState),
    /// Answer to [`Output::Subscribe`]: the feed is open.
    FeedOpened {
        /// The first epoch that will be sent.
        from: Epoch,
    },
    /// Answer to [`Output::Subscribe`]: no.
    FeedRefused(FeedRefusal),
    /// The next epoch of the feed. Within a feed epochs must come without a gap; the first one
    /// after `FeedOpened` or `SeedStart` sets the start.
    SendEpoch {
        /// Its number.
        epoch: Epoch,
        /// The frame as it lies in the log.
        frame: Bytes,
    },
    /// Everything up to this epoch is anchored.
    Anchored {
        /// The epoch.
        epoch: Epoch,
        /// Chain hash of its frame.
        chain: ChainHash,
    },
    /// Answer to [`Output::SeedRequest`]: a full copy follows.
    SeedStart {
        /// The checkpoint the copy begins with: the sender keeps its log from here, and sends the
        /// epochs after it between or after the pieces.
        from: Tip,
        /// Where the frame after it starts in the log.
        log_offset: LogOffset,
        /// Where in the volume the pieces start; may be earlier than what was asked for.
        cursor_bytes: u64,
    },
    /// The next piece of the copy.
    SeedPiece(SeedPiece),
    /// All pieces were sent.
    SeedEnd {
        /// The copy is an exact state, hence usable, once this epoch has been applied to it.
        usable_after: Epoch,
    },
    /// Replica to primary: how far we are.
    Ack(AckState),
    /// Replica to primary: room for so many more bytes of frames and pieces.
    Credit {
        /// Added to what was granted before.
        bytes: u64,
    },
    /// Replica to primary: pieces up to this cursor are durable.
    SeedAck {
        /// Bytes from the start of the volume.
        cursor_bytes: u64,
    },
    /// Ask this peer for its log, whatever the roles say: how a node pulls a tail before it is
    /// promoted. The peer's daemon sees [`Output::Subscribe`].
    Subscribe {
        /// Our tip.
        tip: Tip,
        /// Our last anchored epoch.
        anchored: Tip,
    },
    /// Ask the peer for a sign of life at once; [`Output::Alive`] is the answer.
    Ping,
    /// Ask this peer, which is primary, to hand over in order and become a replica.
    StepDown,
    /// From our prover to the peer's, if the peer's state says that it has one. At most 60 KiB, and
    /// few at a time: they are queued.
    Proof(Bytes),
    /// Our root, if the peer's state says that it compares. One that was not sent yet is replaced.
    Root(StateRoot),
    /// From our state tree to the peer's, if the peer's state says that it repairs. At most 60 KiB,
    /// and few at a time: they are queued.
    Tree(Bytes),
    /// End the session. The driver makes a new one after its backoff.
    Close,
}

/// From a session to the daemon.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// The peer has said hello (again, when its copy or tip changed by other means than our feed).
    PeerState(LocalState),
    /// The peer wants our log from after `tip`.
    Subscribe {
        /// The peer's tip.
        tip: Tip,
        /// The peer's last anchored epoch: it can not go back behind this by itself.
        anchored: Tip,
    },
    /// The peer wants a full copy, from this cursor on.
    SeedRequest {
        /// Bytes from the start of the volume that the peer has already.
        cursor_bytes: u64,
        /// End of the peer's log, which is where the copy began if one was begun.
        from: Tip,
    },
    /// The peer has opened the feed.
    FeedOpened {
        /// The first epoch that will come.
        from: Epoch,
    },
    /// An epoch has arrived whole.
    EpochReceived {
        /// Its number, as the sender says.
        epoch: Epoch,
        /// The frame as it lies in the sender's log. Unchecked.
        frame: Bytes,
    },
    /// The peer says that everything up to this epoch is anchored. May come before the epoch.
    Anchored {
        /// The epoch.
        epoch: Epoch,
        /// Chain hash of its frame.
        chain: ChainHash,
    },
    /// The peer's progress.
    PeerAck(AckState),
    /// The peer can take so many more bytes of frames and pieces. A message may start while the sum
    /// of grants minus the bytes sent is above zero, so it is overdrawn by one message at most.
    PeerCredit {
        /// Added to what was granted before.
        bytes: u64,
    },
    /// The peer refused the feed: drop the log after `to`.
    Truncate {
        /// The last epoch both sides have.
        to: Tip,
    },
    /// The peer refused the feed: our anchored history is a fork of its own.
    Diverged {
        /// The epoch at which the chain hashes differ.
        epoch: Epoch,
    },
    /// The peer refused the feed: its log does not reach back that far.
    TooOld {
        /// The oldest epoch the peer can send.
        oldest: Epoch,
    },
    /// A full copy follows.
    SeedStart {
        /// The checkpoint the copy begins with: its epoch and chain hash.
        from: Tip,
        /// Where the frame after it starts in the log.
        log_offset: LogOffset,
        /// Where in the volume the pieces start.
        cursor_bytes: u64,
    },
    /// A part of the full copy. Lies within the volume; its checksum is unchecked.
    SeedPiece(SeedPiece),
    /// All pieces have arrived.
    SeedEnd {
        /// The copy is usable once this epoch has been applied to it.
        usable_after: Epoch,
    },
    /// Pieces up to this cursor are durable at the peer.
    SeedAck {
        /// Bytes from the start of the volume.
        cursor_bytes: u64,
    },
    /// The peer knows a higher term than we do. A replica adopts it (persist, then update the local
    /// state) and the session goes on; a primary must stop writing.
    HigherTerm {
        /// The higher term.
        term: Term,
    },
    /// Answer to [`Input::Ping`].
    Alive,
    /// The peer asks us to hand over in order: to write everything back and become a replica.
    StepDown,
    /// From the peer's prover to ours. Unchecked.
    Proof(Bytes),
    /// The peer's root. Unchecked.
    Root(StateRoot),
    /// From the peer's state tree to ours. Unchecked.
    Tree(Bytes),
    /// The session can not be: something that both must agree on differs. Followed by `Closed`.
    Refused {
        /// What differs.
        reason: Refusal,
    },
    /// The last output of a session.
    Closed {
        /// Why it ended.
        reason: CloseReason,
    },
}

/// Who found the reason to refuse.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FoundBy {
    /// This node.
    Us,
    /// The peer, which told us.
    Peer,
}

/// What two nodes must agree on and do not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Field {
    /// Range of protocol versions: no version in common.
    Protocol,
    /// A list of needed capabilities: nothing in common.
    Capabilities,
    /// [`LocalState::volume`].
    VolumeId,
    /// [`LocalState::birth_nonce`].
    BirthNonce,
    /// [`LocalState::size_bytes`].
    SizeBytes,
    /// [`LocalState::sector_bytes`].
    SectorBytes,
    /// [`LocalState::format_version`].
    FormatVersion,
    /// Both sides claim the same node identity: a cloned state directory, or a loop to ourselves.
    Node,
    /// Two nodes were promoted in the same term: two histories exist.
    Fork,
    /// The configuration of one side does not share this volume with the other.
    NotShared,
    /// The configuration of one side does not allow the other to be what it is.
    Roles,
}

/// What the daemon puts into a peer handle: an input for one session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ToSession {
    /// The session that is meant; the input is dropped if it has ended.
    pub session: SessionId,
    /// The input.
    pub input: Input,
}

/// What the daemon takes out of a peer handle: an output of one session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FromSession {
    /// The session that speaks. A new one starts after `Closed` of the one before.
    pub session: SessionId,
    /// The output.
    pub output: Output,
}

/// Why a session was refused: what differs, and what either side has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// Who found it.
    pub found_by: FoundBy,
    /// What differs.
    pub field: Field,
    /// Our value, as text.
    pub ours: String,
    /// The peer's value, as text.
    pub theirs: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = match self.found_by {
            FoundBy::Us => "refused the peer",
            FoundBy::Peer => "the peer refused us",
        };
        write!(
            f,
            "{by}: {} differs: ours is {}, theirs is {}",
            self.field, self.ours, self.theirs
        )
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Protocol => "protocol version range",
            Self::Capabilities => "set of needed capabilities",
            Self::VolumeId => "volume id",
            Self::BirthNonce => "birth nonce",
            Self::SizeBytes => "volume size in bytes",
            Self::SectorBytes => "sector size in bytes",
            Self::FormatVersion => "log format version",
            Self::Node => "node identity (it must differ; is a state directory a copy of another?)",
            Self::Fork => "term holder (two primaries in one term, a fork)",
            Self::NotShared => "configured list of shared volumes",
            Self::Roles => "role (the key's pin has `roles`)",
        })
    }
}

/// Why a session ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CloseReason {
    /// The connection went away: cut, reset, or the peer's process ended.
    Disconnected(String),
    /// The peer did not answer a heartbeat in time.
    HeartbeatTimeout,
    /// Hello did not complete in time.
    HelloTimeout,
    /// Our role or term changed; the next session says hello with the new one.
    RoleChanged,
    /// Something both must agree on differs; see the `Refused` output before this one.
    Refused,
    /// The peer sent what it may not send. Nothing of it was used.
    Protocol(String),
    /// The peer ended the session with this error.
    PeerError(String),
    /// The local daemon asked for something that can not be sent.
    Misuse(String),
    /// The daemon or the driver closed the session.
    Local,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected(why) => write!(f, "connection lost: {why}"),
            Self::HeartbeatTimeout => f.write_str("the peer did not answer a heartbeat in time"),
            Self::HelloTimeout => f.write_str("the peer did not say hello in time"),
            Self::RoleChanged => f.write_str("our role or term changed"),
            Self::Refused => f.write_str("refused"),
            Self::Protocol(what) => write!(f, "the peer broke the protocol: {what}"),
            Self::PeerError(what) => write!(f, "the peer closed the session: {what}"),
            Self::Misuse(what) => write!(f, "a local request could not be sent: {what}"),
            Self::Local => f.write_str("closed here"),
        }
    }
}
