//! Sessions between nodes, as the daemon's bridge and the transport make them.
//!
//! Two lanes each way, as in the transport: *data* (frames, pieces) and *control* (acks, anchors,
//! credit), each in order, control may overtake data. A session ends at each side at its own
//! moment; what is on its way is lost then. A replica asks by itself whenever the states of both
//! sides call for it.
//!
//! Not here: time and the queue, which are the world's.

use hn4::log::{CopyState, Role};
use hn4::types::Term;
use hn4_engine::core::event::{CopyStatus, FeedRefusal, PeerEvent, PeerState, Tip};
use hn4_transport::session::Session;

/// Lanes of a direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lane {
    /// Acks, anchors, credit, questions.
    Control,
    /// Frames and pieces.
    Data,
}

/// What travels.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    /// How the sender stands.
    State(CopyStatus),
    /// For the other core.
    Event(PeerEvent),
    /// A subscription was refused.
    Refused(FeedRefusal),
    /// For the other prover.
    Proof(Vec<u8>),
}

/// What a core is told of a peer's copy.
#[must_use]
pub(crate) fn peer_state(status: &CopyStatus, resyncs: bool) -> PeerState {
    let filled = matches!(
        status.copy,
        CopyState::Seeding { until: Some(_), .. } | CopyState::Applying { .. }
    );
    PeerState {
        role: status.role,
        term: status.term,
        incarnation: status.incarnation,
        tip: status.tip,
        tip_rank: status.tip_rank,
        usable: filled || status.copy.is_usable(),
        resyncs: resyncs && status.may_keep(),
        is_filled: matches!(status.copy, CopyState::Seeding { until: None, .. }),
    }
}

impl Message {
    /// About how many bytes it has on the wire.
    #[must_use]
    pub(crate) fn bytes(&self) -> u64 {
        let body = match self {
            Self::Event(PeerEvent::Epoch(frame)) => frame.len(),
            Self::Event(PeerEvent::SeedPiece(piece)) => piece.data().map_or(0, <[u8]>::len),
            Self::Proof(bytes) => bytes.len(),
            Self::Event(_) | Self::State(_) | Self::Refused(_) => 0,
        };
        body as u64 + 100
    }
}

/// What was asked in this session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Asked {
    #[default]
    Nothing,
    Feed,
    Seed,
    TruncateFirst(Tip),
    Never,
}

/// One side of a link.
#[derive(Default)]
pub(crate) struct Side {
    /// The session that is open here.
    pub(crate) open: Option<u64>,
    /// The transport's session, where it is not modelled.
    pub(crate) wire: Option<Session>,
    /// The peer has said hello.
    pub(crate) greeted: bool,
    /// When the transport's session is to be woken.
    pub(crate) wake_at: Option<u64>,
    /// The peer's hello in a session of the transport said that it is primary.
    pub(crate) primary_says_hello: bool,
    asked: Asked,
    ours: Option<CopyStatus>,
    theirs: Option<CopyStatus>,
    /// When the last part of a full copy that was asked for here is on its way.
    pub(crate) copied_until: u64,
    /// When the last message of a lane arrives here.
    pub(crate) busy_until: [u64; 2],
}

/// What a change of our state calls for.
#[derive(Debug)]
pub(crate) enum News {
    /// Nothing.
    None,
    /// Tell the peer.
    Tell,
    /// The session speaks for a role and a term that are no more.
    Close,
}

impl Side {
    /// A session opens.
    pub(crate) fn open(&mut self, session: u64, ours: CopyStatus, theirs: CopyStatus) {
        *self = Self {
            open: Some(session),
            asked: Asked::Nothing,
            ours: Some(ours),
            theirs: Some(theirs),
            ..Self::default()
        };
    }

    /// A session of the transport opens.
    pub(crate) fn open_wire(&mut self, session: u64, wire: Session) {
        *self = Self {
            open: Some(session),
            wire: Some(wire),
            ..Self::default()
        };
    }

    /// The session is over.
    pub(crate) fn close(&mut self) {
        self.open = None;
        self.wire = None;
    }

    /// The term of the peer, if it is higher than ours.
    #[must_use]
    pub(crate) fn higher_term(&self) -> Option<Term> {
        let (ours, theirs) = (self.ours?.term, self.theirs?.term);
        (theirs.counter > ours.counter).then_some(theirs)
    }

    /// Whether the peer is primary.
    #[must_use]
    pub(crate) fn is_fed_by_primary(&self) -> bool {
        let modelled = self
            .theirs
            .is_some_and(|theirs| theirs.role == Role::Primary);
        modelled || self.primary_says_hello
    }

    /// Our state changed.
    pub(crate) fn local_changed(&mut self, new: CopyStatus) -> News {
        let (Some(old), Some(theirs)) = (self.ours, self.theirs) else {
            return News::None;
        };
        self.ours = Some(new);
        let adopts = new.role == Role::Replica && new.term == theirs.term;
        if new.role != old.role || (new.term != old.term && !adopts) {
            return News::Close;
        }
        let is_news = new.term != old.term
            || new.incarnation != old.incarnation
            || new.tip.epoch < old.tip.epoch
            || new.may_keep() != old.may_keep()
            || std::mem::discriminant(&new.copy) != std::mem::discriminant(&old.copy);
        if is_news { News::Tell } else { News::None }
    }

    /// The peer's state changed. Returns false if the session must end.
    pub(crate) fn peer_changed(&mut self, new: CopyStatus) -> bool {
        let (Some(ours), Some(old)) = (self.ours, self.theirs) else {
            return false;
        };
        self.theirs = Some(new);
        let adopts = new.role == Role::Replica && new.term == ours.term;
        new.role == old.role && (new.term == old.term || adopts)
    }

    /// A subscription was refused.
    pub(crate) fn refused(&mut self, refusal: FeedRefusal) -> PeerEvent {
        let before = self.asked;
        let event = match refusal {
            FeedRefusal::Truncate(tip) => {
                self.asked = Asked::TruncateFirst(tip);
                PeerEvent::Truncate(tip)
            }
            FeedRefusal::Diverged(epoch) => {
                self.asked = Asked::Never;
                PeerEvent::Diverged(epoch)
            }
            FeedRefusal::TooOld { oldest } => {
                self.asked = Asked::Never;
                PeerEvent::TooOld { oldest }
            }
        };
        if before == Asked::Seed {
            // As in the transport: a copy is not asked for twice.
            self.asked = before;
        }
        event
    }

    /// What to ask the peer now.
    pub(crate) fn ask(&mut self) -> Option<PeerEvent> {
        let (ours, theirs) = (self.ours?, self.theirs?);
        let is_pair =
            ours.role == Role::Replica && theirs.role == Role::Primary && ours.term == theirs.term;
        if !is_pair {
            return None;
        }
        let feed = PeerEvent::Subscribe {
            tip: ours.tip,
            anchored: ours.anchored,
        };
        let seed = |cursor_bytes| PeerEvent::SeedRequest {
            cursor_bytes,
            from: match ours.copy {
                CopyState::Shadowing {
                    from: epoch,
                    from_chain: chain,
                    ..
                } => Tip { epoch, chain },
                _ => ours.tip,
            },
        };
        let (asked, question) = match (ours.copy, self.asked) {
            (CopyState::Fresh | CopyState::Seeding { until: None, .. }, Asked::Seed)
            | (CopyState::Shadowing { .. }, Asked::Seed) => {
                return None;
            }
            (CopyState::Fresh, _) if ours.surveys => return None,
            (CopyState::Fresh, _) => (Asked::Seed, seed(0)),
            (
                CopyState::Seeding {
                    cursor_bytes,
                    until: None,
                    ..
                }
                | CopyState::Shadowing { cursor_bytes, .. },
                _,
            ) => (Asked::Seed, seed(cursor_bytes)),
            (_, Asked::Nothing) => (Asked::Feed, feed),
            (_, Asked::TruncateFirst(to)) if ours.tip.epoch <= to.epoch => (Asked::Feed, feed),
            _ => return None,
        };
        self.asked = asked;
        Some(question)
    }
}

/// A link with little bandwidth.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slow {
    /// For how long.
    pub(crate) until: u64,
    /// How little.
    pub(crate) bytes_per_ms: u64,
}

/// A pair of nodes.
pub(crate) struct Link {
    /// The nodes.
    pub(crate) nodes: [usize; 2],
    /// How each sees the session.
    pub(crate) sides: [Side; 2],
    /// Sessions so far.
    pub(crate) sessions: u64,
    /// Nothing gets through until then.
    pub(crate) cut_until: u64,
    /// Nothing reaches a side until then.
    pub(crate) deaf_until: [u64; 2],
    /// There is little bandwidth.
    pub(crate) slow: Option<Slow>,
    /// An attempt to connect is planned.
    pub(crate) connecting: bool,
}

impl Link {
    /// A pair of nodes without a session.
    #[must_use]
    pub(crate) fn new(nodes: [usize; 2]) -> Self {
        Self {
            nodes,
            sides: [Side::default(), Side::default()],
            sessions: 0,
            cut_until: 0,
            deaf_until: [0; 2],
            slow: None,
            connecting: false,
        }
    }

    /// No session can begin before this.
    #[must_use]
    pub(crate) fn cut_until(&self) -> u64 {
        let deaf = self.deaf_until[0].max(self.deaf_until[1]);
        self.cut_until.max(deaf)
    }

    /// Which side a node is.
    #[must_use]
    pub(crate) fn side_of(&self, node: usize) -> Option<usize> {
        self.nodes.iter().position(|&other| other == node)
    }
}
