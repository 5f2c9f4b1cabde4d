//! A shard: one thread, one ring, one volume, and the clients of that volume, or as many more
//! threads as the configuration says that have only clients (`front`).
//!
//! The thread sleeps in the kernel until an operation completes, a client sends something, the rest
//! of the daemon has a message, or the core's deadline passes. In one turn it takes all
//! completions, lets the core act on them, and hands everything that came of it to the kernel in
//! one call.
//!
//! **Architecture invariant:** only this thread touches the volume and its devices, and of its
//! memory each slot is in the hands of one thread at a time, but for views (`arena`), in which
//! nobody changes it.

mod client;
mod clients;
mod describe;
mod disks;
mod embedded;
mod engine;
mod fork;
mod front;
mod fronts;
mod host;
mod link;
mod listen;
mod mail;
mod medium;
mod open;
mod pool;
mod processor;
mod proving;
mod readahead;
mod readers;
mod refusal;
mod seeding;
mod shadow;
mod status;
mod tokens;
mod transfer;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hn4::log::LogHeader;
use hn4::types::BLOCK_BYTES;
use thiserror::Error;

pub use self::embedded::{Answer, Busy, Embedded};
pub use self::link::{FromShard, ProofFeed, ShardHandle, ToShard, TreeFeed};
pub use self::listen::Listen;
pub use self::medium::DeviceMedium;
pub use self::proving::ProofFrame;
pub use self::status::{PeerLags, PeerStatus, ShardStatus};

use self::client::Reader;
use self::clients::Clients;
use self::engine::{Asker, Engine};
use self::fronts::Fronts;
use self::link::ShardEnd;
use self::listen::{Listener, no_delay, open_listener};
use self::mail::may_be_held_back;
use self::open::{Facts, Opened, open_volume};
use self::processor::Processor;
use self::tokens::{ACCEPT, DISK, KIND};
use crate::arena::SlotMemory;
use crate::core::VolumeConfig;
use crate::core::event::Event;
use crate::core::recovery::RecoveryError;
use crate::device::{DeviceError, DeviceInfo, DeviceOptions, FlushTrust};
use crate::nbd::export::{Export, ExportList};
use crate::ring::{Completion, FileId, RingError, Waker};

/// Connections at the same time.
const CLIENTS: usize = 200;
/// Reads that are handed to the kernel together, of requests that come over sockets.
const READ_BATCH: u32 = 4;

/// Decides limits and policies from a log's header and the number of slots.
pub type Configure = Box<dyn FnOnce(&LogHeader, usize) -> VolumeConfig + Send>;

/// What a shard needs to start.
pub struct ShardSetup {
    /// Name of the export.
    pub name: String,
    /// The volume that the log must belong to, if it is known.
    pub expect: Option<hn4::types::VolumeId>,
    /// The log.
    pub log: PathBuf,
    /// The volume's device or file.
    pub backing: PathBuf,
    /// How to open the log.
    pub log_options: DeviceOptions,
    /// How to open the backing.
    pub backing_options: DeviceOptions,
    /// Memory for the overlay.
    pub overlay_bytes: u64,
    /// Where to save what only this node has before it is dropped; a path in a folder that exists.
    pub fork_folder: Option<PathBuf>,
    /// Bytes that one such file may have.
    pub fork_space_bytes: u64,
    /// The shadow file, made if it is not there; `None`: a usable copy that fell behind its
    /// primary's log waits for an operator.
    pub shadow: Option<PathBuf>,
    /// Decides limits and policies.
    pub configure: Configure,
    /// Sockets for clients.
    pub listen: Vec<Listen>,
    /// Threads that serve the volume: one has it, the others take its clients. At least one.
    pub threads: usize,
    /// The processor to stay on; further threads take those after it.
    pub cpu: Option<usize>,
}

/// Why a shard could not start.
#[derive(Debug, Error)]
pub enum ShardError {
    /// Log or backing.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The log.
    #[error("{log}: {source}")]
    Recovery {
        /// Its path.
        log: String,
        /// What is wrong.
        source: RecoveryError,
    },
    /// The ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The backing cannot be this volume.
    #[error("{backing}: {why}")]
    Backing {
        /// Its path.
        backing: String,
        /// Why not.
        why: String,
    },
    /// A socket.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Memory or threads.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's word.
        source: std::io::Error,
    },
}

struct Shard {
    engine: Engine,
    inbox: rtrb::Consumer<ToShard>,
    clients: Clients,
    fronts: Fronts,
    listeners: Vec<Listener>,
    exports: Arc<ExportList>,
    /// What clients of a replica see.
    read_only_exports: Arc<ExportList>,
    no_exports: Arc<ExportList>,
    facts: Facts,
    stop_by: Option<Instant>,
    flush_only: bool,
    /// Clients are let in.
    accepts: bool,
}

/// Starts a shard and waits until it serves. `wake` is called on the shard's thread whenever the
/// handle has something to receive.
///
/// # Errors
/// [`ShardError`] says why it does not run; nothing was changed unless recovery had succeeded.
pub fn spawn(
    setup: ShardSetup,
    wake: Arc<dyn Fn() + Send + Sync>,
) -> Result<ShardHandle, ShardError> {
    let (end, handle) = link::pair(wake);
    let (tell, told) = mpsc::channel();
    let name = format!("shard {}", setup.name);
    let thread = std::thread::Builder::new()
        .name(name.chars().take(15).collect())
        .spawn(move || {
            match Shard::open(setup, end) {
                Ok((mut shard, waker)) => {
                    if tell.send(Ok(waker)).is_ok() {
                        shard.run();
                    }
                }
                // Nobody listens only if the daemon is gone.
                Err(error) => drop(tell.send(Err(error))),
            }
        });
    let thread = thread.map_err(|source| ShardError::Os {
        what: "starting the shard's thread",
        source,
    })?;
    let waker: Waker = told.recv().map_err(|_| ShardError::Os {
        what: "opening the volume",
        source: std::io::Error::other("the shard's thread panicked"),
    })??;
    Ok(handle.attach(waker, thread))
}

impl Shard {
    fn open(setup: ShardSetup, end: ShardEnd) -> Result<(Self, Waker), ShardError> {
        let cpu = setup.cpu.map(Processor::new);
        if let Some(cpu) = cpu {
            cpu.enter();
        }
        let (name, listen) = (setup.name.clone(), setup.listen.clone());
        let fronts = setup.threads.saturating_sub(1);
        let Opened { mut engine, facts } = open_volume(setup, end.outbox, READ_BATCH)?;
        let read_only_exports = exports(&name, &facts, &engine.volume, true);
        let exports = exports(&name, &facts, &engine.volume, false);
        let mut listeners = Vec::new();
        for listen in &listen {
            listeners.push(open_listener(&mut engine.ring, listen)?);
        }
        let fronts = Fronts::start(&name, fronts, cpu.map(|cpu| cpu.plus(1)), &engine)?;
        let waker = engine.ring.waker();
        let shard = Self {
            engine,
            inbox: end.inbox,
            clients: Clients::default(),
            fronts,
            listeners,
            exports: Arc::new(exports),
            read_only_exports: Arc::new(read_only_exports),
            no_exports: Arc::new(ExportList::new(Vec::new()).expect("an empty list is valid")),
            facts,
            stop_by: None,
            flush_only: false,
            accepts: false,
        };
        Ok((shard, waker))
    }

    fn run(&mut self) {
        let mut completions = Vec::with_capacity(4096);
        let mut result = Ok(());
        // Says what was recovered and starts what is left to do.
        self.engine.tick();
        self.engine.step(Event::Timer);
        loop {
            self.let_in();
            self.engine.tell();
            if self.is_over() {
                break;
            }
            let timeout = self.timeout();
            let least = usize::from(!(self.clients.at_once || self.fronts.have_more()));
            if let Err(error) = self.engine.ring.wait(least, timeout, &mut completions) {
                result = Err(error.to_string());
                break;
            }
            self.engine.tick();
            for completion in completions.drain(..) {
                self.completed(completion);
            }
            let mut taken = 0;
            while let Ok(message) = self.inbox.pop() {
                self.message(message);
                taken += 1;
            }
            if may_be_held_back(&self.inbox, taken) {
                self.engine.outbox.wake();
            }
            if self.engine.until_deadline() == Some(Duration::ZERO) {
                self.engine.step(Event::Timer);
            }
            self.serve();
            if let Some(why) = self.fronts.ended() {
                result = Err(why);
                break;
            }
            self.engine.disks.retry(&mut self.engine.ring);
        }
        for listener in &self.listeners {
            if let Some(path) = &listener.socket {
                // A socket file that nobody listens on only misleads; the next start removes it
                // too.
                let _ = std::fs::remove_file(path);
            }
        }
        let clean = self.engine.volume.is_clean() && self.engine.volume.failed().is_none();
        self.engine
            .outbox
            .push(FromShard::Ended(result.map(|()| clean)));
        self.engine.tell();
    }

    /// Clients wait in the sockets' queues until it is known whether this node serves, and while
    /// the ring is full: a completion brings the next turn, and that comes here.
    fn let_in(&mut self) {
        self.accepts |= !self.engine.volume.is_opening();
        if !self.accepts || self.stop_by.is_some() {
            return;
        }
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            listener.accept(&mut self.engine.ring, index);
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let stop = self
            .stop_by
            .map(|by| by.saturating_duration_since(Instant::now()));
        [self.engine.until_deadline(), stop]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether a stop that was asked for is done, or out of time.
    fn is_over(&self) -> bool {
        let Some(by) = self.stop_by else { return false };
        let volume = &self.engine.volume;
        let log_done = volume.copy_status().progress.durable == volume.tip().epoch
            && volume.last_change() == volume.tip().epoch;
        let done = volume.failed().is_some()
            || volume.is_clean()
            || (volume.is_drained() && volume.last_change() == volume.tip().epoch)
            || (self.flush_only && log_done && !self.engine.disks.is_busy());
        done || Instant::now() >= by
    }

    fn message(&mut self, message: ToShard) {
        match message {
            ToShard::Peer {
                peer,
                session,
                event,
            } => {
                self.engine.peer_event(peer, session, event);
            }
            ToShard::Proof(event) => self.engine.step(Event::Proof(event)),
            ToShard::Tree(event) => self.engine.step(Event::Tree(event)),
            ToShard::Control { id, control } => self.engine.step(Event::Control { id, control }),
            ToShard::Status(id) => {
                let status = Box::new(self.status());
                self.engine.outbox.push(FromShard::Status { id, status });
            }
            ToShard::Stop { drain_ms } => {
                self.engine.volume.stop();
                self.flush_only = drain_ms == 0;
                let limit = if self.flush_only { 10_000 } else { drain_ms };
                self.stop_by = Some(Instant::now() + Duration::from_millis(limit));
                self.engine.step(Event::Timer);
            }
        }
    }

    fn completed(&mut self, completion: Completion) {
        let token = completion.token;
        let index = u32::try_from(token & 0xFFFF_FFFF).expect("masked to 32 bits");
        let kind = token & KIND;
        if kind == DISK {
            return self.engine.disk_done(completion);
        }
        if kind == ACCEPT {
            return self.accepted(index, completion);
        }
        self.clients.completed(completion, &mut self.engine);
    }

    fn accepted(&mut self, index: u32, completion: Completion) {
        if let Some(file) = completion.file {
            self.admit(file);
        }
        if !completion.more
            && let Some(listener) = self.listeners.get_mut(index as usize)
        {
            listener.is_accepting = false;
        }
    }

    fn admit(&mut self, file: FileId) {
        if self.clients.len() + self.fronts.clients() >= CLIENTS {
            // Nobody has spoken to it.
            drop(self.engine.ring.take_file(file));
            return;
        }
        no_delay(&self.engine.ring, file);
        let volume = &self.engine.volume;
        let reads_only = volume.may_be_pinned();
        let exports = if volume.accepts_writes().is_ok() {
            &self.exports
        } else if reads_only || volume.only_reads_go_on() {
            &self.read_only_exports
        } else {
            &self.no_exports
        };
        let is_primary = !reads_only && !Arc::ptr_eq(exports, &self.no_exports);
        if is_primary && !self.fronts.is_empty() {
            // What fails here has closed it.
            if let Ok(socket) = self.engine.ring.take_file(file) {
                self.fronts.serve(socket, exports);
            }
            return;
        }
        let (index, client) = self.clients.add(file, exports);
        if reads_only {
            client.reader = Reader::Waiting;
            let generation = client.generation;
            self.ask_to_pin(index, generation);
        }
    }

    /// Lets every client go on that may be able to, until nothing moves any more.
    fn serve(&mut self) {
        self.clients.begin_turn();
        self.fronts.take(&mut self.engine);
        loop {
            self.judge_readers();
            self.deliver();
            self.clients.pump(&mut self.engine);
            if self.engine.answers.is_empty() && self.engine.verdicts.is_empty() {
                break;
            }
        }
        self.clients.end_turn();
        self.fronts.settle(&mut self.engine);
    }

    fn deliver(&mut self) {
        while let Some((asker, result)) = self.engine.answers.pop_front() {
            match asker {
                Asker::Here(asked) => self.clients.answered(asked, result, &mut self.engine),
                Asker::There(relayed) => self.fronts.answered(relayed, result, &mut self.engine),
            }
        }
    }

    fn status(&self) -> ShardStatus {
        let volume = &self.engine.volume;
        let (log_used_bytes, log_bytes) = volume.log_usage();
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let wall_ms = u64::try_from(wall.as_millis()).unwrap_or(u64::MAX);
        let lag = |epoch| volume.lag_of(epoch, wall_ms);
        let peers = volume.peers().iter().map(|peer| PeerStatus {
            connected: peer.connected,
            live: peer.is_live(),
            seeding_bytes: peer.seeding(),
            kept_bytes: peer.kept_bytes(),
            sent: peer.sent,
            progress: peer.progress,
            lags: PeerLags {
                sent: lag(peer.sent),
                received: lag(peer.progress.received),
                durable: lag(peer.progress.durable),
                proven: lag(peer.progress.proven),
                applied: lag(peer.progress.applied),
            },
            lag_state: peer.lag_state(),
        });
        let assumed = |info: &DeviceInfo| matches!(info.flush, FlushTrust::Assumed(_));
        ShardStatus {
            identity: self.facts.identity,
            copy: volume.copy_status(),
            failed: volume.failed().cloned(),
            obstacle: volume.obstacle().cloned(),
            behind: volume.replica_lag(wall_ms),
            degraded: volume.is_degraded(),
            proof_lag_bytes: volume.proof_lag_bytes(),
            proof_throttles: volume.is_proof_lagging(),
            waits_for_peers: volume.waits_for_peers(),
            opened_alone: volume.opened_alone(),
            waiting: volume.waiting(),
            dirty_bytes: volume.dirty_slots() as u64 * BLOCK_BYTES,
            overlay_bytes: self.engine.ring.arena().capacity() as u64 * BLOCK_BYTES,
            log_used_bytes,
            log_bytes,
            clients: self.clients.len() + self.fronts.clients(),
            fork_file: self.engine.fork_file.clone(),
            no_shadow: self.facts.no_shadow.clone(),
            pinned_epoch: volume.pinned_epoch(),
            readers: volume.readers(),
            requests: self.engine.traffic.requests,
            written_bytes: self.engine.traffic.written_bytes,
            read_bytes: self.engine.traffic.read_bytes,
            seeding_bytes: volume.seeding_cursor(),
            kept_bytes: volume.kept_bytes(),
            peers: peers.collect(),
            recovery: self.facts.recovery,
            log_device: self.facts.log_device.to_string(),
            backing_device: self.facts.backing_device.to_string(),
            assumed_strict_flush: assumed(&self.facts.log_device)
                || assumed(&self.facts.backing_device),
        }
    }
}

fn exports(name: &str, facts: &Facts, volume: &crate::core::Volume, read_only: bool) -> ExportList {
    let mut export = Export::new(name, facts.identity.size_bytes);
    export.read_only = read_only;
    export.min_block_bytes = facts.identity.sector_bytes;
    export.rotational = facts.backing_device.medium == crate::device::DeviceKind::Hdd;
    // A write must fit in the open epoch with some company.
    let largest = volume.config().max_epoch_blocks as u64 / 2 * BLOCK_BYTES;
    let largest = u32::try_from(largest).unwrap_or(u32::MAX).max(4096);
    export.max_block_bytes = export.max_block_bytes.min(1 << largest.ilog2());
    let list = ExportList::new(vec![export]).and_then(|list| list.with_default(0));
    list.expect("names are checked by the configuration, sizes by the log's header")
}
