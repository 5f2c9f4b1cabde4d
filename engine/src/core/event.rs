//! What goes into the core and what comes out of it.
//!
//! The core is `step(now, event) -> actions`: it has no clock, no randomness, no threads, no
//! sockets and no files. Production, simulation and fuzzing run the same code; only what carries
//! out the actions differs.

use hn4::log::{CopyState, Role};
use hn4::types::{ChainHash, Epoch, Incarnation, Lba, LogOffset, Rank, Term};

pub use super::checks::Verdict;
pub use super::io::{Disk, Io, IoToken, Seg};
use super::peers::PeerSet;
pub use super::pieces::{Contents, SeedOrigin, SeedPiece, SeedSent};
pub use super::resync::Differences;
pub use super::tree::{Damaged, TreeEvent, TreeWork};
use crate::arena::SlotId;

/// A reading of a monotonic clock, in nanoseconds since an arbitrary start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Time(pub u64);

impl Time {
    /// This time plus so many milliseconds.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }
}

/// Both clocks at the moment of a step. The wall clock only ever labels epochs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Now {
    /// Monotonic.
    pub time: Time,
    /// Milliseconds since 1970.
    pub wall_ms: u64,
}

/// A name that the front end gave to a request; comes back with its completion.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// Index of a peer in the volume's configuration.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerId(pub u8);

/// What a client wants. The front end has checked ranges and alignment; slots hold one block of the
/// volume each, in order, every sector at its own place in its block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Fill the slots. They stay with the front end.
    Read {
        /// First sector.
        lba: Lba,
        /// Number of sectors.
        sectors: u32,
        /// One for each block touched.
        slots: Vec<SlotId>,
    },
    /// Take the slots' contents. The slots go to the core.
    Write {
        /// First sector.
        lba: Lba,
        /// Number of sectors.
        sectors: u32,
        /// Complete only when durable.
        fua: bool,
        /// One for each block touched.
        slots: Vec<SlotId>,
    },
    /// Make sectors read as zeroes. If the range does not start or end on a block border, `edges`
    /// holds a slot for each partly touched block (at most two), which goes to the core.
    Zero {
        /// First sector.
        lba: Lba,
        /// Number of sectors.
        sectors: u64,
        /// Complete only when durable.
        fua: bool,
        /// The space behind the sectors may be given back.
        trim: bool,
        /// Slots for the partly touched first and last block.
        edges: Vec<SlotId>,
    },
    /// Complete when every write that completed before is durable.
    Flush,
}

/// Why a request failed, as a client sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Failure {
    /// The volume has failed closed, or the medium did not deliver.
    Io,
    /// This node may not write.
    ReadOnly,
    /// The volume is being stopped.
    ShuttingDown,
}

/// Progress of a peer or of this copy: every epoch up to and including these.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// In memory.
    pub received: Epoch,
    /// Flushed into the log.
    pub durable: Epoch,
    /// Known to be anchored.
    pub proven: Epoch,
    /// Destaged to the backing.
    pub applied: Epoch,
}

/// What of the history is missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lag {
    /// Bytes of log.
    pub bytes: u64,
    /// Milliseconds since the oldest missing epoch was sealed.
    pub ms: u64,
}

/// A place in the history: an epoch and the hash of its frame header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tip {
    /// The epoch.
    pub epoch: Epoch,
    /// Hash of its frame header; all zero for epoch 0.
    pub chain: ChainHash,
}

/// Why a feed was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FeedRefusal {
    /// The peer's tail is not ours, but none of it was anchored: drop it back to here.
    Truncate(Tip),
    /// The peer's anchored history is not ours.
    Diverged(Epoch),
    /// Our log does not reach back that far.
    TooOld {
        /// The oldest epoch that can be sent.
        oldest: Epoch,
    },
}

/// What a peer says of its copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerState {
    /// What it does for the volume.
    pub role: Role,
    /// The highest term that it has persisted; it refuses lower ones for good.
    pub term: Term,
    /// The opening of the primary, if it is one.
    pub incarnation: Incarnation,
    /// End of its log.
    pub tip: Tip,
    /// Who sealed that.
    pub tip_rank: Rank,
    /// It holds an exact prefix of the history.
    pub usable: bool,
    /// It has a state tree that can be compared with ours, and takes [`Contents::Same`].
    pub resyncs: bool,
    /// It is being filled in place.
    pub is_filled: bool,
}

/// What a session with a peer tells the core. All of it is a proposal (P6).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PeerEvent {
    /// A session is open.
    Connected,
    /// How the peer's copy stands: follows [`Self::Connected`], and comes again when it changed by
    /// other means than our feed.
    State(PeerState),
    /// It is gone.
    Disconnected,
    /// Replica to primary: send the log from after `tip`.
    Subscribe {
        /// End of the peer's log.
        tip: Tip,
        /// The last epoch that the peer cannot drop.
        anchored: Tip,
    },
    /// Replica to primary: send a full copy from this byte on.
    SeedRequest {
        /// Bytes of the volume that are durable at the peer.
        cursor_bytes: u64,
        /// End of the peer's log, which is where the copy began if one was begun.
        from: Tip,
    },
    /// Replica to primary: so many more bytes may be sent.
    Credit(u64),
    /// Replica to primary: how far it is.
    Ack(Progress),
    /// Primary to replica: the log is sent from this epoch on, since what comes before it is the
    /// same in both logs.
    FeedOpened(Epoch),
    /// Primary to replica: a frame as it lies in the peer's log.
    Epoch(Vec<u8>),
    /// Primary to replica: all up to here is anchored.
    Anchored(Tip),
    /// Primary to replica: drop the log after this place.
    Truncate(Tip),
    /// Primary to replica: our anchored history is not the primary's.
    Diverged(Epoch),
    /// Primary to replica: its log does not reach back to our tip.
    TooOld {
        /// The oldest epoch it can send.
        oldest: Epoch,
    },
    /// Primary to replica: a full copy follows.
    SeedStart(SeedOrigin),
    /// Primary to replica: a part of it.
    SeedPiece(SeedPiece),
    /// Primary to replica: that was the last one.
    SeedEnd {
        /// The copy is exact once this epoch has been applied.
        usable_after: Epoch,
    },
    /// A higher term exists.
    HigherTerm(Term),
    /// Frames that [`Action::FeedRead`] asked for are on their way (or could not be read).
    FeedReadDone {
        /// Whether they were read.
        ok: bool,
    },
    /// The part of a full copy that [`Action::SeedRead`] asked for is so long: more bytes than it
    /// named if they are a hole, fewer if the data ends earlier. What follows may be asked for.
    SeedPart(u64),
    /// The oldest part that was asked for and not answered is on its way (`None`: it could not be
    /// read).
    SeedReadDone(Option<SeedSent>),
}

/// What the prover beside a volume tells the core.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProofEvent {
    /// It has read its ledger, which ends at this place, and takes so many bytes of the frames
    /// after it. Answered by [`Action::ProofCut`], which says where they really begin.
    Start {
        /// The end of the ledger.
        after: Tip,
        /// Bytes of frames that may be on their way to it.
        credit: u64,
    },
    /// So many more bytes.
    Credit(u64),
    /// Everything up to here is in the ledger of this node.
    Proven(Tip),
    /// Whether a replica waits for proofs before it destages.
    Gate(bool),
    /// Frames that [`Action::ProofRead`] asked for were handed over (or could not be read).
    ReadDone {
        /// Whether they were read.
        ok: bool,
    },
    /// What the source says is not believed.
    Refused {
        /// Why not.
        why: String,
        /// The end of the log of which something is not what the primary signed; `None`: nothing
        /// is known against the log.
        of: Option<Tip>,
    },
}

/// What the core tells a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PeerMessage {
    /// Answer to a subscription: epochs follow from here.
    FeedOpened(Epoch),
    /// Answer to a subscription.
    FeedRefused(FeedRefusal),
    /// All up to here is durable on this primary.
    Anchored(Tip),
    /// A full copy follows.
    SeedStart(SeedOrigin),
    /// No more pieces.
    SeedEnd {
        /// The copy is exact once this epoch has been applied.
        usable_after: Epoch,
    },
    /// How far this replica is.
    Ack(Progress),
    /// This replica has room for so many more bytes.
    Credit(u64),
    /// Pieces up to here are durable on this replica.
    SeedAck(u64),
    /// Send us your log from after `tip`, whatever our roles are.
    Pull {
        /// End of our log.
        tip: Tip,
        /// The last epoch that we cannot drop.
        anchored: Tip,
    },
    /// End the session; it starts anew with the present state.
    Close,
}

/// What an operator or the daemon asks for; answered by [`Action::ControlDone`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Control {
    /// Make everything durable (and acknowledged as the volume's policy asks).
    Flush,
    /// Destage everything that may be destaged.
    Drain,
    /// Become primary in this term, which must be higher than the present one. A primary that waits
    /// for peers before it opens stops waiting if no answer is needed.
    Promote {
        /// The new term.
        term: Term,
        /// How many copies must promise to obey the term, this one included, before the longest
        /// history among them is taken over. 0: what only others have may be lost.
        answers: usize,
        /// The promotion fails if it takes longer.
        within_ms: u64,
    },
    /// Become a replica (from primary or fenced).
    Demote,
    /// Have these peers from now on.
    Peers(Box<PeerSet>),
}

/// What must be done. Carried out in order after the step returns.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// A client's request is done. Slots of a read are full if it succeeded.
    Complete {
        /// The request.
        id: RequestId,
        /// Its outcome.
        result: Result<(), Failure>,
    },
    /// An operation on a disk.
    Io {
        /// Comes back with the completion.
        token: IoToken,
        /// The operation.
        io: Io,
    },
    /// Send a frame to a peer from memory: [`super::Volume::frame_bytes`] has it until the next
    /// step.
    Ship {
        /// To whom.
        peer: PeerId,
        /// Which epoch.
        epoch: Epoch,
    },
    /// Hand a frame to the prover: [`super::Volume::proof_slots`] has it until the next step.
    Prove {
        /// Which epoch.
        epoch: Epoch,
    },
    /// Read frames from the log and hand them to the prover, then tell [`ProofEvent::ReadDone`].
    ProofRead {
        /// Where the first frame starts in the log.
        offset: LogOffset,
        /// The frames: epoch and length in bytes, one after the other.
        frames: Vec<(Epoch, u64)>,
    },
    /// Tell the prover that the next frame it gets follows this place.
    ProofCut(Tip),
    /// Tell the state tree something.
    Tree(TreeWork),
    /// Read frames from the log and send them to a peer, then tell
    /// [`PeerEvent::FeedReadDone`].
    FeedRead {
        /// To whom.
        peer: PeerId,
        /// Where the first frame starts in the log.
        offset: LogOffset,
        /// The frames: epoch and length in bytes, one after the other.
        frames: Vec<(Epoch, u64)>,
    },
    /// Read a piece of the backing: tell [`PeerEvent::SeedPart`] at once. Send it to a peer behind
    /// all that was asked for before, then tell [`PeerEvent::SeedReadDone`]. A hole need not be
    /// read, and zeroes may be gathered into one piece that goes out before the next one that is
    /// not zero, or at the end of the volume.
    SeedRead {
        /// To whom.
        peer: PeerId,
        /// Byte offset on the backing.
        offset: u64,
        /// Bytes, at most.
        bytes: u64,
        /// Bytes that are wanted from there on: a longer hole is none of this copy's business.
        wanted: u64,
    },
    /// Send a piece that says [`Contents::Same`] to a peer behind all that was asked for before,
    /// then tell [`PeerEvent::SeedReadDone`].
    SeedSame {
        /// To whom.
        peer: PeerId,
        /// Byte offset on the volume.
        offset: u64,
        /// Bytes.
        bytes: u64,
    },
    /// Tell a peer something.
    Peer {
        /// Whom.
        peer: PeerId,
        /// What.
        message: PeerMessage,
    },
    /// Nothing that still comes from sessions with the peer at this place is to be told: it was
    /// removed, or another one is there now.
    PeerRetired {
        /// Which.
        peer: PeerId,
    },
    /// A control request is done.
    ControlDone {
        /// The request.
        id: RequestId,
        /// Its outcome; the text says why not.
        result: Result<(), String>,
    },
    /// Save what this copy alone may have in a file of its own and flush it, then tell
    /// [`Event::ForkSaved`].
    SaveFork(Fork),
    /// Nothing in the shadow is needed any more: its space may be given back.
    DropShadow,
    /// Answer to [`Event::Pin`].
    Pinned {
        /// The name of the question.
        id: RequestId,
        /// To be given back with [`Event::Unpin`]; `None`: this copy cannot be read.
        generation: Option<u64>,
    },
    /// All readers are cut off; they may pin a later epoch.
    PinsBroken,
    /// Role, term, tip, progress or copy state changed: sessions must be told.
    StateChanged,
}

/// What a copy alone may have: the end of its log, and of its backing what is to be replaced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fork {
    /// The epoch before the first frame; the backing is what it was there.
    pub after: Tip,
    /// The term in which this copy is to follow another history.
    pub term: Term,
    /// Where the first frame starts in the log.
    pub offset: LogOffset,
    /// Bytes of all frames.
    pub bytes: u64,
    /// What lies in the backing where the shadow, up to so many bytes, is to be written over it is
    /// saved too. `None`: the log is to be cut, and the backing stays as it is.
    pub shadow_bytes: Option<u64>,
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A client asks.
    Request {
        /// Its name.
        id: RequestId,
        /// What it wants.
        request: Request,
    },
    /// An operation on a disk is done.
    IoDone {
        /// Which.
        token: IoToken,
        /// The error number, if it failed.
        result: Result<(), i32>,
    },
    /// [`super::Volume::next_deadline`] has passed, or slots became free.
    Timer,
    /// A session has something.
    Peer {
        /// Which.
        peer: PeerId,
        /// What.
        event: PeerEvent,
    },
    /// The prover has something.
    Proof(ProofEvent),
    /// The state tree has something.
    Tree(TreeEvent),
    /// What [`Action::SaveFork`] asked for is done; the text says why not.
    ForkSaved(Result<(), String>),
    /// A reader of a replica wants to see one epoch; answered by [`Action::Pinned`].
    Pin {
        /// Name of the question.
        id: RequestId,
    },
    /// It is done.
    Unpin {
        /// As in [`Action::Pinned`].
        generation: u64,
    },
    /// The operator asks.
    Control {
        /// Name of the request.
        id: RequestId,
        /// What.
        control: Control,
    },
}

/// The outcome of a step. Reused from step to step, so that nothing is allocated.
#[derive(Debug, Default)]
pub struct Actions {
    /// In order.
    pub list: Vec<Action>,
    /// Buffers of the operations in `list`.
    pub segs: Vec<Seg>,
}

impl Actions {
    /// Forgets everything.
    #[inline]
    pub fn clear(&mut self) {
        self.list.clear();
        self.segs.clear();
    }

    pub(super) fn push(&mut self, action: Action) {
        self.list.push(action);
    }

    pub(super) fn complete(&mut self, id: RequestId, result: Result<(), Failure>) {
        self.push(Action::Complete { id, result });
    }

    pub(super) fn peer(&mut self, peer: PeerId, message: PeerMessage) {
        self.push(Action::Peer { peer, message });
    }
}

/// What a copy is at the moment; what a session's hello says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopyStatus {
    /// Role, persisted.
    pub role: Role,
    /// Term, persisted.
    pub term: Term,
    /// Incarnation of the primary that writes here, if it is us.
    pub incarnation: Incarnation,
    /// End of the log.
    pub tip: Tip,
    /// Who sealed it.
    pub tip_rank: Rank,
    /// Last epoch that this copy may not drop.
    pub anchored: Tip,
    /// How far log and backing are.
    pub progress: Progress,
    /// How complete the copy is, persisted.
    pub copy: CopyState,
    /// What lay on the backing before is expected to be the primary's, mostly, and to be compared.
    pub seeded: bool,
    /// No full copy is asked for yet: a state tree of what lies there is made first.
    pub surveys: bool,
}

impl CopyStatus {
    /// Whether a state tree beside the copy has something to tell before a full copy, and a part
    /// of that may be [`Contents::Same`].
    #[must_use]
    pub fn may_keep(&self) -> bool {
        match self.copy {
            CopyState::Fresh => self.seeded && !self.surveys,
            CopyState::Seeding { until: None, .. } => self.seeded,
            _ => true,
        }
    }
}
