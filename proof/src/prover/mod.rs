//! What runs beside a volume: anchoring on a primary, following on a replica.
//!
//! A [`Prover`] gets the durable frames of its node's log in order and hashes them to epoch roots.
//! On a primary it closes batches, signs anchors, appends them to the ledger, and only then gives
//! them to replicas. On a replica it takes the primary's ledger, compares every anchor with the
//! roots of its own log, appends it to its own ledger, and only then calls its epochs proven; the
//! core destages no others.
//!
//! It is sans-IO but for the ledger, whose medium is an argument: the daemon runs it in a thread of
//! its own, the simulator on simulated disks. Nothing waits for it but the reuse of log.
//!
//! Invariants:
//! - An anchor is durable in the ledger before anybody hears of it.
//! - An anchor is taken from a peer only if signatures, place, log offsets, chain and batch root
//!   agree with what lies in this node's log (P6). What its log does not reach back to is taken on
//!   the signature, and on the frame chain where a batch lies on both sides of the log's beginning.
//! - A ledger is only ever continued, or set aside whole or from a record on; never changed.
//! - Whoever waits for an anchor gets it: a replica asks in every session that feeds it (P10).

mod branch;
mod follow;
mod frame;
pub mod keys;
pub mod message;
mod recall;
mod shown;
mod sign;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use hn4::log::{FrameError, FrameHead, LogIdentity};
use hn4::types::{ChainHash, Epoch, NodeId, Term};

use crate::batch::{BatchPolicy, Batcher};
use crate::hash::Digest;
use crate::ledger::file::{LedgerFile, LedgerMedium};
use crate::ledger::scan::ScanError;
use crate::ledger::verify::{LedgerError, Policy, Verifier};
use crate::scxq2::DictionaryId;
use crate::sign::{KeyId, SignError};
use follow::{Follow, Insists};
pub use frame::{Frame, frame_leaves};
use frame::{Hashed, hash_frame};
use keys::NodeKeys;
use recall::Recall;
use shown::Theirs;
use sign::{Vouching, Waiting};

/// Bytes of frames that may be on their way to a prover.
pub const CREDIT_BYTES: u64 = 32 << 20;

/// Most epochs whose roots are kept for an anchor to come; a log of 1 GiB holds no more.
const MAX_HASHED: usize = 1 << 17;

/// Both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Since any fixed moment.
    pub time: Duration,
    /// Milliseconds since 1970.
    pub wall_ms: u64,
}

/// Who a prover is, and its limits.
#[derive(Debug)]
pub struct Setup {
    /// The volume.
    pub identity: LogIdentity,
    /// This node.
    pub node: NodeId,
    /// Its keys.
    pub keys: NodeKeys,
    /// What it insists on in anchors and checkpoints of others, beside Ed25519.
    pub required: Policy,
    /// A primary signs a checkpoint at most so often, if there is anything new to be said.
    pub checkpoint_age: Duration,
    /// When a batch closes.
    pub policy: BatchPolicy,
    /// A replica destages only what is proven, if its primary proves.
    pub gate: bool,
    /// Log and overlay here surely hold so many bytes of unproven epochs.
    pub hold_bytes: u64,
}

/// What a prover knows of a node that it talks to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerState {
    /// Who it is.
    pub node: NodeId,
    /// Name of the session with it, handed back with what is for it.
    pub session: u64,
    /// The term that it said hello with.
    pub term: Term,
    /// It can talk about proofs.
    pub proves: bool,
    /// The largest epoch that it takes: its batches must be about as small.
    pub max_epoch_bytes: u64,
}

/// What is to be done, in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Out {
    /// Ask the core for frames after this place, with so much room.
    Start {
        /// The last epoch in the ledger, and the chain hash there: by the number alone an epoch of
        /// another history would be taken for it.
        after: (Epoch, ChainHash),
        /// Bytes.
        credit: u64,
    },
    /// Tell the core of more room.
    Credit(u64),
    /// Tell the core that everything up to here is in the ledger.
    Proven(Epoch, ChainHash),
    /// Tell the core whether to wait for proofs.
    Gate(bool),
    /// Tell the core that what its source says is not believed.
    Refused {
        /// Why not.
        why: String,
        /// The log is not what the primary signed. This is its end as far as it is known here: by
        /// now the core may have another one.
        of: Option<(Epoch, ChainHash)>,
    },
    /// Send a message to a peer, if this session with it still is the open one: in another one
    /// it would be taken for an answer to what was asked there.
    Send {
        /// The peer.
        peer: u8,
        /// As in [`PeerState::session`].
        session: u64,
        /// The message.
        bytes: Vec<u8>,
    },
    /// Tell the operator.
    Notice(String),
}

/// Why a prover cannot go on; it must be opened anew.
#[derive(Debug, thiserror::Error)]
pub enum ProverError {
    /// The ledger's medium.
    #[error("the ledger cannot be written: {0}")]
    Io(#[from] std::io::Error),
    /// The ledger.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// What this node itself wrote breaks a rule.
    #[error("this node's own record is refused: {0}")]
    Own(#[from] LedgerError),
    /// The key.
    #[error("cannot sign: {0}")]
    Sign(#[from] SignError),
    /// The key's right has ended, so it may have been stolen.
    #[error(
        "this node's key {key} was retired at step {at} of the ledger and signs nothing more; \
         remove its file, and a new one is drawn at the next start"
    )]
    Retired {
        /// The key.
        key: KeyId,
        /// The record that retired it.
        at: u64,
    },
    /// A frame that is not as it was sealed, in memory.
    #[error("epoch {epoch} has changed in memory, and is read back from the log: {source}")]
    Memory {
        /// The frame.
        epoch: Epoch,
        /// What is wrong with it.
        source: FrameError,
    },
    /// Frames out of order.
    #[error("epoch {found} came where {expected} was due")]
    Order {
        /// The next one.
        expected: Epoch,
        /// What came.
        found: Epoch,
    },
}

/// What a prover looks like from outside.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProverStatus {
    /// The last epoch in the ledger.
    pub anchored: Option<Epoch>,
    /// Records of the ledger.
    pub records: u64,
    /// Epochs that are hashed and not anchored.
    pub waiting_epochs: u64,
    /// The key of this node.
    pub key: Option<KeyId>,
    /// Keys of this node that may sign at the end of the ledger.
    pub active_keys: Vec<KeyId>,
    /// The newest state root that is in the ledger, and its epoch.
    pub state: Option<(Epoch, Digest)>,
    /// A replica does not wait for proofs, since its primary offers none.
    pub unproven_primary: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Prover<M> {
    identity: LogIdentity,
    node: NodeId,
    keys: NodeKeys,
    required: Policy,
    checkpoint_age: Duration,
    policy: BatchPolicy,
    gated: bool,
    hold_bytes: u64,
    ledger: LedgerFile<M>,
    /// The tip of the ledger, once there is one.
    tip: Option<Verifier>,
    /// The term, while this node is primary.
    primary: Option<Term>,
    /// The log is known from here on; its roots are in `hashed`, without a gap.
    floor: (Epoch, ChainHash),
    /// Of which records the required signatures are demanded.
    insists: Insists,
    /// Whether `floor` is what the core said, not a guess.
    placed: bool,
    hashed: VecDeque<Hashed>,
    batcher: Option<Batcher>,
    /// This node became primary while the prover ran, or in a term that its ledger does not know.
    waiting: Waiting,
    vouching: Vouching,
    /// What segments are packed with, as far as is known here.
    dictionary: Option<DictionaryId>,
    recall: Recall,
    follow: Follow,
    gate_open: bool,
    out: VecDeque<Out>,
}

impl<M: LedgerMedium> Prover<M> {
    /// A prover with the ledger that [`LedgerFile::open`] found.
    #[must_use]
    pub fn new(setup: Setup, ledger: LedgerFile<M>, tip: Option<Verifier>) -> Self {
        let last = tip.as_ref().and_then(Verifier::last);
        let after = last.map_or((Epoch(0), ChainHash::default()), |last| {
            (last.last, last.chain)
        });
        let credit = CREDIT_BYTES;
        let recall = Recall::of(ledger.torn_bytes());
        Self {
            identity: setup.identity,
            node: setup.node,
            keys: setup.keys,
            required: setup.required,
            checkpoint_age: setup.checkpoint_age,
            policy: setup.policy,
            gated: setup.gate,
            hold_bytes: setup.hold_bytes,
            ledger,
            tip,
            primary: None,
            floor: (after.0, ChainHash::default()),
            insists: Insists::at(after.0, None),
            placed: false,
            hashed: VecDeque::new(),
            batcher: None,
            waiting: Waiting::default(),
            vouching: Vouching::default(),
            dictionary: None,
            recall,
            follow: Follow::default(),
            gate_open: !setup.gate,
            // The prover before this one may have opened the core's gate.
            out: VecDeque::from([Out::Start { after, credit }, Out::Gate(setup.gate)]),
        }
    }

    /// The next thing to be done.
    pub fn poll(&mut self) -> Option<Out> {
        self.out.pop_front()
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> &LedgerFile<M> {
        &self.ledger
    }

    /// What it looks like from outside.
    #[must_use]
    pub fn status(&self) -> ProverStatus {
        ProverStatus {
            anchored: self.anchored(),
            records: self.ledger.records(),
            waiting_epochs: self.hashed.len() as u64,
            key: Some(self.keys.main().public().id()),
            active_keys: self.active_keys(),
            state: self
                .tip
                .as_ref()
                .and_then(Verifier::state)
                .map(|state| (state.epoch, state.root)),
            unproven_primary: self.gated && self.gate_open && self.follow.has_source(),
        }
    }

    fn anchored(&self) -> Option<Epoch> {
        let (epoch, _) = self.tip.as_ref().and_then(Verifier::anchored)?;
        Some(epoch)
    }

    /// The last epoch that was hashed, or where the log begins.
    fn hashed_tip(&self) -> (Epoch, ChainHash) {
        let last = self.hashed.back();
        last.map_or(self.floor, |last| (last.root.epoch, last.root.chain))
    }

    /// What this node does for the volume: the term in which it is primary.
    ///
    /// # Errors
    /// [`ProverError`]: nothing more may be done with this prover.
    pub fn standing(&mut self, now: Now, primary: Option<Term>) -> Result<(), ProverError> {
        if self.primary == primary {
            return Ok(());
        }
        self.primary = primary;
        self.batcher = None;
        self.vouching = Vouching::default();
        self.waiting.all_theirs().for_each(Theirs::forget_term);
        if primary.is_some() {
            self.follow = Follow::default();
            return self.begin_signing(now);
        }
        self.recall = Recall::default();
        Ok(())
    }

    /// The core's word on where the next frame begins.
    ///
    /// # Errors
    /// [`ProverError`].
    pub fn cut(&mut self, now: Now, epoch: Epoch, chain: ChainHash) -> Result<(), ProverError> {
        while self
            .hashed
            .back()
            .is_some_and(|last| last.root.epoch > epoch)
        {
            self.hashed.pop_back();
        }
        if self.hashed_tip() != (epoch, chain) || !self.placed {
            self.hashed.clear();
            self.floor = (epoch, chain);
            let last = self.tip.as_ref().and_then(Verifier::last);
            let leads_up = last.is_some_and(|last| (last.last, last.chain) == self.floor);
            self.insists = Insists::at(epoch, leads_up.then_some(self.ledger.records()));
        }
        self.placed = true;
        self.batcher = None;
        if self.primary.is_some() {
            return self.begin_signing(now);
        }
        self.check_reach()
    }

    /// A durable frame, in order.
    ///
    /// # Errors
    /// [`ProverError`].
    pub fn frame(&mut self, now: Now, epoch: Epoch, frame: Frame<'_>) -> Result<(), ProverError> {
        if !self.placed {
            // Of the prover before this one.
            return Ok(());
        }
        let expected = self.hashed_tip().0.next();
        if epoch != expected {
            let found = epoch;
            return Err(ProverError::Order { expected, found });
        }
        self.out.push_back(Out::Credit(frame.len()));
        let hashed = match hash_frame(&self.identity, frame).and_then(|hashed| {
            // What a lost write left there is whole, and another frame.
            let found = hashed.root.epoch;
            (found == epoch).then_some(hashed).ok_or(FrameError::Field {
                field: "epoch",
                value: found.0,
            })
        }) {
            Ok(hashed) => hashed,
            // The log may be good: begun anew, this prover gets the frame from there.
            Err(source) if frame.is_in_memory() => {
                return Err(ProverError::Memory { epoch, source });
            }
            Err(source) => return self.damaged(now, epoch, frame, source),
        };
        self.hashed.push_back(hashed);
        if self.hashed.len() > MAX_HASHED {
            // No anchor comes for them, and no gate waits for one.
            let oldest = self.hashed.pop_front();
            let oldest = oldest.map(|oldest| (oldest.root.epoch, oldest.root.chain));
            self.floor = oldest.unwrap_or(self.floor);
        }
        if self.primary.is_some() {
            self.batch_last(now)
        } else {
            self.take_pending()
        }
    }

    /// A frame that was damaged where it lies cannot be proven any more; what follows can,
    /// in a new ledger, or on the word of the primary.
    fn damaged(
        &mut self,
        now: Now,
        epoch: Epoch,
        frame: Frame<'_>,
        source: FrameError,
    ) -> Result<(), ProverError> {
        // Without the header its hash is not known, and nothing here needs it: a ledger that ends
        // at this epoch cannot be continued.
        let head = FrameHead::decode(&self.identity, frame.head()).ok();
        let head = head.filter(|head| head.header.epoch == epoch);
        let chain = head.map_or(ChainHash::default(), |head| head.chain);
        let text = format!("epoch {epoch} is damaged in the log and cannot be proven: {source}");
        self.out.push_back(Out::Notice(text));
        self.hashed.clear();
        self.batcher = None;
        self.floor = (epoch, chain);
        match self.primary {
            Some(_) => self.begin_signing(now),
            None => self.take_pending(),
        }
    }

    /// When [`Self::tick`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let batch = self.batcher.as_ref().and_then(Batcher::deadline);
        let due = [batch, self.checkpoint_due(), self.recall.deadline()];
        due.into_iter().flatten().min()
    }

    /// Closes a batch that is due.
    ///
    /// # Errors
    /// [`ProverError`].
    pub fn tick(&mut self, now: Now) -> Result<(), ProverError> {
        if self.recall.deadline().is_some_and(|due| due <= now.time) {
            self.stop_waiting(now)?;
        }
        let batch = self.batcher.as_mut().and_then(|b| b.poll(now.time));
        batch.map_or(Ok(()), |batch| self.anchor(now, &batch))?;
        match self.checkpoint_due() {
            Some(due) if due <= now.time => self.checkpoint(now),
            _ => Ok(()),
        }
    }

    /// Segments are packed with this dictionary from now on; anchors name it.
    pub fn set_dictionary(&mut self, dictionary: DictionaryId) {
        self.dictionary = Some(dictionary);
    }

    /// A session with a peer is open.
    pub fn connected(&mut self, peer: u8, state: PeerState) {
        self.waiting.connected(peer, state);
        if state.proves {
            let most = state.max_epoch_bytes.max(1);
            self.policy.max_bytes = self.policy.max_bytes.min(most);
        }
    }

    /// It is gone.
    pub fn disconnected(&mut self, peer: u8) {
        self.waiting.disconnected(peer);
        self.follow.disconnected(peer);
    }

    /// A peer's prover has sent something.
    ///
    /// # Errors
    /// [`ProverError`]; what is wrong with the message is told to the core instead.
    pub fn message(&mut self, now: Now, peer: u8, bytes: &[u8]) -> Result<(), ProverError> {
        use message::Message;
        match Message::decode(bytes) {
            Ok(Message::Have { ledger, places }) if self.primary.is_some() => {
                let known = if self.is_ours(&ledger) {
                    places.as_slice()
                } else {
                    &[]
                };
                let newest = known.first().map(|(index, _)| *index);
                if let Some(theirs) = self.waiting.theirs(peer) {
                    theirs.names(known);
                }
                self.waiting.ask(peer, ledger, places);
                self.ask_back(peer, newest)?;
                self.serve(peer)
            }
            Ok(Message::Have { ledger, places }) => self.show(peer, &ledger, &places),
            Ok(Message::Offer(offer)) if self.primary.is_some() => self.enrol(now, peer, offer),
            Ok(Message::Records {
                header,
                first,
                bytes,
            }) => match message::run(first, &bytes) {
                Ok(records) if self.primary.is_some() => {
                    self.recalled(now, peer, &header, (first, records))
                }
                Ok(records) => self.records(peer, &header, first, records),
                Err(why) => {
                    self.suspect(peer, why);
                    Ok(())
                }
            },
            // Of a role that has ended meanwhile.
            Ok(_) => Ok(()),
            Err(error) => {
                self.suspect(peer, error.to_string());
                Ok(())
            }
        }
    }

    /// To a peer, in a session with it.
    fn send(&mut self, (peer, session): (u8, u64), bytes: Vec<u8>) {
        self.out.push_back(Out::Send {
            peer,
            session,
            bytes,
        });
    }

    /// A peer whose word is not believed: the core ends its session if it feeds us.
    fn suspect(&mut self, peer: u8, why: String) {
        self.refuse(peer, why, None);
    }

    fn refuse(&mut self, peer: u8, why: String, of: Option<(Epoch, ChainHash)>) {
        self.out
            .push_back(Out::Notice(format!("peer {peer}: {why}")));
        if self.follow.is_source(peer) {
            self.follow.forget();
            self.out.push_back(Out::Refused { why, of });
        }
    }

    fn release_anchored(&mut self, through: Epoch) {
        while let Some(first) = self.hashed.front()
            && first.root.epoch <= through
        {
            self.floor = (first.root.epoch, first.root.chain);
            self.hashed.pop_front();
        }
    }
}
