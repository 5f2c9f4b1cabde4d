//! What a shard and the rest of the daemon say to each other, and the two queues between them.
//!
//! The queues are bounded and lock-free, one producer and one consumer each. What does not fit
//! waits at its producer; nothing is dropped. What can pile up is bounded by the peers' credit and
//! by the number of control requests.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

use hn4::types::{BlockIndex, Epoch};

use super::mail::{hand_over, may_be_held_back};
use super::proving::ProofFrame;
use super::status::ShardStatus;
use crate::core::event::{
    Control, CopyStatus, PeerEvent, PeerId, PeerMessage, ProofEvent, RequestId, SeedPiece, Time,
    Tip, TreeEvent, TreeWork,
};
use crate::ring::Waker;

/// Messages in each queue.
const QUEUE: usize = 1024;
/// What nobody waits for is told after so many milliseconds at the latest.
const QUIET_MS: u64 = 10;

/// To the shard.
#[derive(Debug)]
pub enum ToShard {
    /// A session has something.
    Peer {
        /// With whom.
        peer: PeerId,
        /// The daemon's name for the session. Whatever comes back for it carries the same name.
        session: u64,
        /// What.
        event: PeerEvent,
    },
    /// An operator asks; answered by [`FromShard::ControlDone`].
    Control {
        /// Name of the request.
        id: RequestId,
        /// What.
        control: Control,
    },
    /// The prover has something.
    Proof(ProofEvent),
    /// The state tree has something.
    Tree(TreeEvent),
    /// Answered by [`FromShard::Status`].
    Status(RequestId),
    /// Accept nothing new, flush the log, drain for at most so many milliseconds, and end.
    Stop {
        /// 0: flush the log and end; recovery replays the rest.
        drain_ms: u64,
    },
}

/// From the shard.
#[derive(Debug)]
pub enum FromShard {
    /// For a session.
    Peer {
        /// With whom.
        peer: PeerId,
        /// As in [`ToShard::Peer`].
        session: u64,
        /// What.
        message: PeerMessage,
    },
    /// An epoch for a session, as it lies in the log.
    Frame {
        /// With whom.
        peer: PeerId,
        /// As in [`ToShard::Peer`].
        session: u64,
        /// Its number.
        epoch: Epoch,
        /// The frame, without stamp.
        bytes: Vec<u8>,
    },
    /// A piece of a full copy for a session.
    Piece {
        /// With whom.
        peer: PeerId,
        /// As in [`ToShard::Peer`].
        session: u64,
        /// The piece.
        piece: SeedPiece,
    },
    /// For the prover.
    Proof(ProofFeed),
    /// For the state tree.
    Tree(TreeFeed),
    /// A control request is done.
    ControlDone {
        /// Which.
        id: RequestId,
        /// Its outcome.
        result: Result<(), String>,
    },
    /// The copy's state has changed.
    State(CopyStatus),
    /// Answer to [`ToShard::Status`].
    Status {
        /// Which.
        id: RequestId,
        /// The state of everything.
        status: Box<ShardStatus>,
    },
    /// The shard has ended, because it was asked to or because it could not go on. True if the
    /// backing has everything that the log has.
    Ended(Result<bool, String>),
}

/// What a shard hands to the prover. It is bounded by the room that the prover grants.
#[derive(Debug)]
pub enum ProofFeed {
    /// A durable frame; frames come in order.
    Frame {
        /// Its number.
        epoch: Epoch,
        /// The frame, without stamp.
        frame: ProofFrame,
    },
    /// The next frame follows this place, whatever came before.
    Cut(Tip),
    /// The log could not be read: nothing more comes until the prover starts anew.
    Failed,
}

/// What a shard hands to the state tree; bounded by its answers, and by the clients' requests.
#[derive(Debug)]
pub enum TreeFeed {
    /// What the core says, if it is not a part of a sweep.
    Work(TreeWork),
    /// A part of what a sweep writes: see [`TreeWork::Blocks`].
    Blocks {
        /// Byte offset on the volume and length of each part.
        parts: Vec<(u64, u16)>,
        /// Their contents, one after the other.
        bytes: Vec<u8>,
        /// There is no more.
        last: bool,
    },
    /// Blocks that a read got: see [`TreeWork::Check`].
    Check {
        /// The read that waits.
        read: Option<u32>,
        /// Which.
        blocks: Vec<BlockIndex>,
        /// Their contents, one after the other, if a read waits and the backing gave them.
        bytes: Vec<u8>,
    },
}

/// A bounded queue whose producer keeps what does not fit.
///
/// Waking the consumer costs more than most of what there is to say to it. What nobody waits for is
/// pushed *quietly*: it goes along with the next message that somebody does wait for, or alone
/// after [`QUIET_MS`].
pub(super) struct Outbox {
    queue: rtrb::Producer<FromShard>,
    backlog: VecDeque<FromShard>,
    wake: Arc<dyn Fn() + Send + Sync>,
    /// The consumer is to be woken.
    urgent: bool,
    /// Since when there is something that it has not been woken for.
    quiet_since: Option<Time>,
}

impl Outbox {
    pub(super) fn push(&mut self, message: FromShard) {
        self.backlog.push_back(message);
        self.urgent = true;
    }

    pub(super) fn push_quietly(&mut self, message: FromShard, now: Time) {
        self.backlog.push_back(message);
        self.quiet_since.get_or_insert(now);
    }

    /// The consumer may hold messages for the shard back: it is woken although there is nothing to
    /// say to it.
    pub(super) fn wake(&mut self) {
        self.urgent = true;
    }

    /// When [`Self::flush`] is to be called, if nothing calls it before.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.quiet_since.map(|since| since.plus_ms(QUIET_MS))
    }

    /// Hands over what fits and wakes the consumer if it is time to.
    pub(super) fn flush(&mut self, now: Time) {
        let was_full = self.queue.is_full();
        hand_over(&mut self.queue, &mut self.backlog);
        let due = self.deadline().is_some_and(|deadline| deadline <= now);
        let full = was_full || !self.backlog.is_empty();
        if self.urgent || due || full {
            self.urgent = false;
            self.quiet_since = None;
            (self.wake)();
        }
    }
}

/// The shard's end.
pub(super) struct ShardEnd {
    pub(super) inbox: rtrb::Consumer<ToShard>,
    pub(super) outbox: Outbox,
}

/// The daemon's end of a shard.
pub struct ShardHandle {
    queue: rtrb::Producer<ToShard>,
    backlog: VecDeque<ToShard>,
    from: rtrb::Consumer<FromShard>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

pub(super) struct HandleEnd {
    queue: rtrb::Producer<ToShard>,
    from: rtrb::Consumer<FromShard>,
}

/// Makes the queues. `wake` is called on the shard's thread when there is something to receive.
pub(super) fn pair(wake: Arc<dyn Fn() + Send + Sync>) -> (ShardEnd, HandleEnd) {
    let (to, inbox) = rtrb::RingBuffer::new(QUEUE);
    let (queue, from) = rtrb::RingBuffer::new(QUEUE);
    let outbox = Outbox {
        queue,
        backlog: VecDeque::new(),
        wake,
        urgent: false,
        quiet_since: None,
    };
    (ShardEnd { inbox, outbox }, HandleEnd { queue: to, from })
}

impl HandleEnd {
    /// Forgets what was said: there is no daemon behind this shard.
    pub(super) fn discard(&mut self) {
        while self.from.pop().is_ok() {}
    }

    pub(super) fn attach(self, waker: Waker, thread: JoinHandle<()>) -> ShardHandle {
        ShardHandle {
            queue: self.queue,
            backlog: VecDeque::new(),
            from: self.from,
            waker,
            thread: Some(thread),
        }
    }
}

impl ShardHandle {
    /// Sends a message; what does not fit now goes with a later call of this or [`Self::receive`],
    /// and the shard wakes the caller for that.
    pub fn send(&mut self, message: ToShard) {
        self.backlog.push_back(message);
        self.flush();
    }

    fn flush(&mut self) {
        if hand_over(&mut self.queue, &mut self.backlog) {
            self.waker.wake();
        }
    }

    /// The next message, if there is one.
    pub fn receive(&mut self) -> Option<FromShard> {
        if !self.backlog.is_empty() {
            self.flush();
        }
        let message = self.from.pop().ok()?;
        if may_be_held_back(&self.from, 1) {
            self.waker.wake();
        }
        Some(message)
    }

    /// Waits for the thread to end; it must have been told to stop.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic of the shard has been printed by the panic hook already.
            let _ = thread.join();
        }
    }

    /// Whether the thread has ended, and all it said was received: if it did not say that it ended,
    /// it panicked.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished) && self.from.is_empty()
    }
}
