//! The prover of a volume in a thread of its own.
//!
//! It hashes, signs and writes the ledger while clients are served; what it gets and gives goes
//! through queues. If it cannot go on (a full state directory, a damaged log), it says so in the
//! status, waits, and begins anew from its ledger: the volume serves on until unproven log fills it
//! up.

pub mod local;
pub mod medium;
pub(super) mod rotation;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hn4::log::LogIdentity;
use hn4::types::{NodeId, Term};
use hn4_engine::core::MAX_PEERS;
use hn4_engine::core::event::{ProofEvent, Tip};
use hn4_engine::shard::{ProofFeed, ProofFrame};
use hn4_proof::batch::BatchPolicy;
use hn4_proof::hash::Digest;
use hn4_proof::ledger::file::{LedgerFile, LedgerMedium};
use hn4_proof::ledger::scan::ScanError;
use hn4_proof::ledger::verify::Policy;
use hn4_proof::prover::keys::NodeKeys;
use hn4_proof::prover::message::Message;
use hn4_proof::prover::{
    CREDIT_BYTES, Frame, Now, Out, PeerState, Prover, ProverError, ProverStatus, Setup,
};
use hn4_proof::scxq2::DictionaryId;
use tokio::sync::mpsc;

use self::medium::LedgerOnDisk;

/// Pause before a prover that failed begins anew.
const RETRY: Duration = Duration::from_secs(1);
/// How often at most the daemon is told what a prover that works looks like.
const TELL: Duration = Duration::from_millis(50);
/// Room for frames is given back in portions: a message for each would wake two threads for each.
const CREDIT_PORTION: u64 = CREDIT_BYTES / 8;

/// Messages of a peer that may wait: what they hold is at most 60 KiB each.
const FROM_A_PEER: usize = 64;

/// To the prover.
#[derive(Debug)]
pub(super) enum ToProver {
    /// The term in which this node is primary.
    Standing(Option<Term>),
    /// From the core.
    Feed(ProofFeed),
    /// A session with a peer is open.
    Connected(u8, PeerState),
    /// A peer's feed was opened to us.
    FedBy(u8),
    /// A session is gone.
    Disconnected(u8),
    /// A peer's prover says something.
    Message(u8, Bytes, Ticket),
    /// The node has other keys.
    Keys(Box<NodeKeys>),
    /// The root of the state tree at a place.
    State(Tip, Digest),
    /// What is sent is packed with another dictionary.
    Dictionary(DictionaryId),
}

/// A message of a peer that is not dealt with yet.
#[derive(Debug)]
pub(super) struct Ticket(Arc<AtomicUsize>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// From the prover.
#[derive(Debug)]
pub(super) enum FromProver {
    /// For the core.
    Core(ProofEvent),
    /// For a peer's prover, in this session only.
    Send {
        peer: u8,
        session: u64,
        bytes: Bytes,
    },
    /// What it looks like now.
    Report(ProverReport),
}

/// What is shown of a prover.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct ProverReport {
    /// Its own words.
    pub(crate) status: ProverStatus,
    /// Why it does not work at the moment.
    pub(crate) failed: Option<String>,
    /// The last thing that an operator should know.
    pub(crate) notice: Option<String>,
}

/// What a prover is started with.
pub(super) struct ProofSetup {
    pub(super) name: String,
    pub(super) state_dir: PathBuf,
    pub(super) identity: LogIdentity,
    pub(super) node: NodeId,
    pub(super) keys: NodeKeys,
    /// What it insists on in what primaries sign.
    pub(super) required: Policy,
    pub(super) batch_age: Duration,
    pub(super) checkpoint_age: Duration,
    pub(super) log_bytes: u64,
    pub(super) overlay_bytes: u64,
    pub(super) gate: bool,
}

/// The daemon's end of a prover. Dropping it ends the thread.
pub(super) struct ProofHandle {
    to: Sender<ToProver>,
    /// Messages of each peer that wait.
    waiting: [Arc<AtomicUsize>; MAX_PEERS],
    pub(super) from: mpsc::UnboundedReceiver<FromProver>,
}

impl ProofHandle {
    pub(super) fn send(&self, message: ToProver) {
        // Fails only if the thread has panicked, which the panic hook has printed.
        let _ = self.to.send(message);
    }

    /// Passes on what a peer's prover says. Whether there was room: an honest peer has a question,
    /// an answer and a few keys under way at most, and none of them may be left out.
    pub(super) fn send_from_peer(&self, peer: u8, message: Bytes) -> bool {
        let waiting = &self.waiting[usize::from(peer) % MAX_PEERS];
        let room = waiting.fetch_add(1, Ordering::Relaxed) < FROM_A_PEER;
        let ticket = Ticket(Arc::clone(waiting));
        if room {
            self.send(ToProver::Message(peer, message, ticket));
        }
        room
    }
}

/// Starts a prover.
///
/// # Errors
/// If the thread cannot be started.
pub(super) fn start(setup: ProofSetup) -> std::io::Result<ProofHandle> {
    let (to, inbox) = channel();
    let (outbox, from) = mpsc::unbounded_channel();
    let name = format!("proof {}", setup.name);
    let mut worker = Worker {
        setup,
        started: Instant::now(),
        standing: None,
        peers: BTreeMap::new(),
        fed_by: None,
        state: None,
        dictionary: None,
        questions: BTreeMap::new(),
        report: ProverReport::default(),
        unsaid: false,
        told: Duration::ZERO,
        owed_credit: 0,
        outbox,
    };
    std::thread::Builder::new()
        .name(name.chars().take(15).collect())
        .spawn(move || worker.run(&inbox))?;
    let waiting = std::array::from_fn(|_| Arc::default());
    Ok(ProofHandle { to, waiting, from })
}

struct Worker {
    setup: ProofSetup,
    started: Instant,
    standing: Option<Term>,
    peers: BTreeMap<u8, PeerState>,
    fed_by: Option<u8>,
    /// The newest state root.
    state: Option<(Tip, Digest)>,
    /// What is sent is packed with it.
    dictionary: Option<DictionaryId>,
    /// The last question of each peer: it asks once, and a prover that is opened anew must know.
    questions: BTreeMap<u8, Bytes>,
    report: ProverReport,
    /// There is a notice in it that the daemon was not told of.
    unsaid: bool,
    /// When the daemon was told of `report`.
    told: Duration,
    /// Room that the core has not been told of yet.
    owed_credit: u64,
    outbox: mpsc::UnboundedSender<FromProver>,
}

/// The daemon has let go of its end.
struct Over;

impl Worker {
    fn run(&mut self, inbox: &Receiver<ToProver>) {
        loop {
            let failed = match self.open() {
                Ok(mut prover) => match self.work(&mut prover, inbox) {
                    Ok(Over) => return,
                    Err(error) => error.to_string(),
                },
                Err(why) => why,
            };
            tracing::error!(volume = %self.setup.name, why = %failed, "proofs have stopped");
            self.report.failed = Some(failed);
            self.tell();
            let until = Instant::now() + RETRY;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                match inbox.recv_timeout(left) {
                    Ok(message) => self.remember(&message),
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    fn open(&mut self) -> Result<Prover<LedgerOnDisk>, String> {
        let setup = &self.setup;
        let volume = setup.identity.volume;
        let medium = LedgerOnDisk::open(&setup.state_dir, volume);
        let medium = medium.map_err(|error| format!("the ledger cannot be opened: {error}"))?;
        let (ledger, tip, torn) = match LedgerFile::open(medium, volume) {
            Ok(opened) => opened,
            // It may be there the next time.
            Err((_, ScanError::Io(error))) => return Err(format!("the ledger: {error}")),
            Err((mut medium, error)) => {
                let notice = format!("the ledger is set aside: {error}");
                tracing::error!(volume = %setup.name, "{notice}");
                self.report.notice = Some(notice);
                let aside = medium.set_aside(0);
                aside.map_err(|error| format!("the ledger cannot be set aside: {error}"))?;
                LedgerFile::open(medium, volume).map_err(|(_, error)| error.to_string())?
            }
        };
        if let Some(torn) = torn {
            let (bytes, offset) = (torn.bytes, torn.offset);
            tracing::warn!(volume = %setup.name, bytes, offset, "cut a torn append off the ledger");
        }
        let mut prover = Prover::new(
            Setup {
                identity: setup.identity,
                node: setup.node,
                keys: setup.keys.clone(),
                required: setup.required.clone(),
                checkpoint_age: setup.checkpoint_age,
                policy: BatchPolicy {
                    max_age: setup.batch_age,
                    ..BatchPolicy::for_log(setup.log_bytes)
                },
                gate: setup.gate,
                hold_bytes: setup.log_bytes.min(setup.overlay_bytes) / 4,
            },
            ledger,
            tip,
        );
        for (&peer, &state) in &self.peers {
            prover.connected(peer, state);
        }
        if let Some(dictionary) = self.dictionary {
            prover.set_dictionary(dictionary);
        }
        let again = prover.standing(self.now(), self.standing);
        let again = again.and_then(|()| self.fed_by.map_or(Ok(()), |peer| prover.fed_by(peer)));
        let mut questions = self.questions.iter();
        let again = again.and_then(|()| {
            questions.try_for_each(|(peer, asked)| prover.message(self.now(), *peer, asked))
        });
        again.map_err(|error| error.to_string())?;
        if self.report.failed.take().is_some() {
            self.tell();
        }
        Ok(prover)
    }

    fn now(&self) -> Now {
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Now {
            time: self.started.elapsed(),
            wall_ms: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX),
        }
    }

    fn work<M: LedgerMedium>(
        &mut self,
        prover: &mut Prover<M>,
        inbox: &Receiver<ToProver>,
    ) -> Result<Over, ProverError> {
        loop {
            self.carry_out(prover);
            let untold = self.unsaid || prover.status() != self.report.status;
            let untold = untold.then_some(self.told + TELL);
            let message = match [prover.deadline(), untold].into_iter().flatten().min() {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => {
                    let left = deadline.saturating_sub(self.started.elapsed());
                    inbox.recv_timeout(left)
                }
            };
            match message {
                Ok(message) => {
                    self.remember(&message);
                    self.take(prover, message)?;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(Over),
            }
            prover.tick(self.now())?;
        }
    }

    fn remember(&mut self, message: &ToProver) {
        match message {
            ToProver::Standing(term) => self.standing = *term,
            ToProver::Connected(peer, state) => _ = self.peers.insert(*peer, *state),
            ToProver::FedBy(peer) => self.fed_by = Some(*peer),
            ToProver::Disconnected(peer) => {
                self.peers.remove(peer);
                self.questions.remove(peer);
                self.fed_by = self.fed_by.filter(|source| source != peer);
            }
            ToProver::Keys(keys) => self.setup.keys = (**keys).clone(),
            ToProver::State(at, root) => self.state = Some((*at, *root)),
            ToProver::Dictionary(id) => self.dictionary = Some(*id),
            ToProver::Message(peer, bytes, _) => {
                if matches!(Message::decode(bytes), Ok(Message::Have { .. })) {
                    self.questions.insert(*peer, bytes.clone());
                }
            }
            ToProver::Feed(_) => {}
        }
    }

    fn take<M: LedgerMedium>(
        &mut self,
        prover: &mut Prover<M>,
        message: ToProver,
    ) -> Result<(), ProverError> {
        let now = self.now();
        match message {
            ToProver::Standing(term) => {
                prover.standing(now, term)?;
                self.say_state(prover);
                Ok(())
            }
            ToProver::State(..) => {
                self.say_state(prover);
                Ok(())
            }
            ToProver::Dictionary(id) => {
                prover.set_dictionary(id);
                Ok(())
            }
            ToProver::Keys(keys) => prover.set_keys(now, *keys),
            ToProver::Feed(ProofFeed::Frame { epoch, frame }) => match &frame {
                ProofFrame::Read(bytes) => prover.frame(now, epoch, Frame::Log(bytes)),
                ProofFrame::Copied(bytes) => prover.frame(now, epoch, Frame::Memory(bytes)),
                ProofFrame::InPlace { head, payload } => {
                    let blocks: Vec<_> = payload.blocks().collect();
                    prover.frame(now, epoch, Frame::InPlace(head, &blocks))
                }
            },
            ToProver::Feed(ProofFeed::Cut(Tip { epoch, chain })) => prover.cut(now, epoch, chain),
            ToProver::Feed(ProofFeed::Failed) => {
                let why = "the log could not be read back";
                Err(ProverError::Io(std::io::Error::other(why)))
            }
            ToProver::Connected(peer, state) => {
                prover.connected(peer, state);
                Ok(())
            }
            ToProver::FedBy(peer) => prover.fed_by(peer),
            ToProver::Disconnected(peer) => {
                prover.disconnected(peer);
                Ok(())
            }
            ToProver::Message(peer, bytes, ticket) => {
                let done = prover.message(now, peer, &bytes);
                drop(ticket);
                done
            }
        }
    }

    /// A primary vouches for the newest state root; it may have been known before it was primary.
    fn say_state<M: LedgerMedium>(&self, prover: &mut Prover<M>) {
        if let Some((at, root)) = self.state {
            prover.state(self.now(), (at.epoch, at.chain), root);
        }
    }

    fn carry_out<M: LedgerMedium>(&mut self, prover: &mut Prover<M>) {
        while let Some(out) = prover.poll() {
            let event = match out {
                Out::Start { after, credit } => {
                    self.owed_credit = 0;
                    let (epoch, chain) = after;
                    let after = Tip { epoch, chain };
                    ProofEvent::Start { after, credit }
                }
                Out::Credit(bytes) => {
                    self.owed_credit += bytes;
                    if self.owed_credit < CREDIT_PORTION {
                        continue;
                    }
                    ProofEvent::Credit(std::mem::take(&mut self.owed_credit))
                }
                Out::Proven(epoch, chain) => ProofEvent::Proven(Tip { epoch, chain }),
                Out::Gate(gate) => ProofEvent::Gate(gate),
                Out::Refused { why, of } => {
                    let of = of.map(|(epoch, chain)| Tip { epoch, chain });
                    ProofEvent::Refused { why, of }
                }
                Out::Send {
                    peer,
                    session,
                    bytes,
                } => {
                    let bytes = bytes.into();
                    let said = FromProver::Send {
                        peer,
                        session,
                        bytes,
                    };
                    let _ = self.outbox.send(said);
                    continue;
                }
                Out::Notice(notice) => {
                    tracing::warn!(volume = %self.setup.name, "{notice}");
                    self.report.notice = Some(notice);
                    self.unsaid = true;
                    continue;
                }
            };
            // Fails only when the daemon is on its way out.
            let _ = self.outbox.send(FromProver::Core(event));
        }
        let status = prover.status();
        let due = self.started.elapsed() >= self.told + TELL;
        if (self.unsaid || status != self.report.status) && due {
            self.report.status = status;
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.told = self.started.elapsed();
        self.unsaid = false;
        // As above.
        let _ = self.outbox.send(FromProver::Report(self.report.clone()));
    }
}
