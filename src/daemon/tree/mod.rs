//! The state tree of a volume in a thread of its own.
//!
//! It hashes what each sweep is about to write, makes the leaves durable, and only then lets the
//! sweep begin. In between it computes roots and merges its files, a little at a time, and hashes a
//! device that has no tree yet, at a bounded rate.
//!
//! **Invariant: the volume never waits for a tree that cannot work.** If its files cannot be
//! written or are damaged, it is given up, sweeps go on without it, and it is built anew later. A
//! full copy waits for the survey of what was brought, but not when a few in a row have failed.
//!
//! The backing is read here only while no sweep is under way; see [`hn4_proof::tree::keeper`].

pub(super) mod compare;
mod files;
mod inspect;
mod leaves;
mod mend;
mod open;
mod reads;
mod repair;
mod report;
mod resync;
mod sum;
pub(super) mod survey;
mod sweep;
#[cfg(test)]
mod tests;
pub(super) mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hn4::log::LogIdentity;
use hn4::types::{BLOCK_BYTES, Epoch, NodeId};
use hn4_engine::core::event::{Differences, Tip, TreeEvent, TreeWork};
use hn4_engine::shard::TreeFeed;
use hn4_proof::hash::Digest;
use hn4_proof::tree::TreeError;
use hn4_proof::tree::keeper::{Keeper, Worked};
use tokio::sync::mpsc;

use self::files::{Backing, Files};
use self::leaves::Leaves;
use self::open::Stale;
use self::reads::{ReadCounts, Reads};
use self::repair::Repairs;
use self::resync::Resyncs;
use self::sweep::Gathering;
use self::verify::{Record, Verify};
use super::proof::local::LocalLedger;

/// Pause before a tree that was given up is built anew.
const RETRY: Duration = Duration::from_secs(60);
/// How often at most the daemon is told of progress.
const TELL: Duration = Duration::from_millis(200);
/// Blocks that are read from the backing at once: a sweep may have to wait for that.
const SLICE_BLOCKS: u64 = 256;
/// Entries of the tree's files that are read at once, when nothing else is to be done.
const WORK: usize = 1 << 14;
/// After such work there is a pause of so many times its length.
const REST: u32 = 2;
/// Messages of peers that may wait: what they hold is at most 60 KiB each.
const FROM_PEERS: usize = 32;
/// What may be read faster than the rate after a time in which there was no occasion.
const BURST: Duration = Duration::from_millis(250);

/// To the tree.
#[derive(Debug)]
pub(super) enum ToTree {
    /// From the core.
    Feed(TreeFeed),
    /// Begin a deep verify, if none is under way.
    Verify,
    /// From the tree of the peer at this place.
    Peer(usize, Bytes),
    /// There is no peer that could have been asked.
    NoPeer,
}

/// From the tree.
#[derive(Debug)]
pub(super) enum FromTree {
    /// For the core.
    Core(TreeEvent),
    /// The root at a checkpoint.
    Root { at: Tip, root: Digest },
    /// For the trees of all peers.
    Ask(Bytes),
    /// For the tree of the peer at this place.
    Answer(usize, Bytes),
    /// For the core: what differs from the peer at this place, if that is known; and the name of
    /// its question.
    Compared(usize, u64, Option<Differences>),
    /// What it looks like now.
    Report(TreeState),
}

/// What is shown of a tree.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct TreeState {
    /// The last root, and the checkpoint at which it was; `None` while the tree is being built.
    pub(crate) root: Option<(Epoch, Digest)>,
    /// Bytes of the device that the first build has done.
    pub(crate) built_bytes: Option<u64>,
    /// Leaves in its files.
    pub(crate) leaves: u64,
    /// Why there is none at the moment.
    pub(crate) failed: Option<String>,
    /// Why it was built anew.
    pub(crate) notice: Option<String>,
    /// Bytes of the device that a deep verify has done.
    pub(crate) verified_bytes: Option<u64>,
    /// What is known of the medium.
    pub(crate) record: Option<Record>,
    /// What came of comparing reads.
    pub(crate) reads: ReadCounts,
}

/// What a tree is started with.
pub(super) struct TreeSetup {
    pub(super) name: String,
    pub(super) state_dir: PathBuf,
    pub(super) backing: PathBuf,
    pub(super) identity: LogIdentity,
    pub(super) node: NodeId,
    /// Where results of a deep verify go.
    pub(super) ledger: LocalLedger,
    /// Bytes of the backing that are read in a second, at most.
    pub(super) rate: u64,
    /// Hours between two deep verifies; 0: only when asked.
    pub(super) verify_interval_h: u64,
    /// Reads are compared, all or some.
    pub(super) checks_reads: bool,
}

/// The daemon's end of a tree. Dropping it ends the thread.
pub(super) struct TreeHandle {
    to: Sender<ToTree>,
    /// Messages of peers that wait.
    from_peers: Arc<AtomicUsize>,
    pub(super) from: mpsc::UnboundedReceiver<FromTree>,
}

impl TreeHandle {
    pub(super) fn send(&self, message: ToTree) {
        // Fails only if the thread has panicked, which the panic hook has printed.
        let _ = self.to.send(message);
    }

    /// Passes on what a peer's tree says. What comes faster than it is dealt with is dropped:
    /// honest peers ask again.
    pub(super) fn send_from_peer(&self, index: usize, message: Bytes) {
        let waiting = self.from_peers.fetch_add(1, Ordering::Relaxed);
        if waiting < FROM_PEERS {
            self.send(ToTree::Peer(index, message));
        } else {
            self.from_peers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Starts a tree.
///
/// # Errors
/// If the thread cannot be started.
pub(super) fn start(setup: TreeSetup) -> std::io::Result<TreeHandle> {
    let (to, inbox) = channel();
    let (outbox, from) = mpsc::unbounded_channel();
    let from_peers = Arc::new(AtomicUsize::new(0));
    let name = format!("tree {}", setup.name);
    let mut worker = Worker::new(setup, Arc::clone(&from_peers), outbox);
    std::thread::Builder::new()
        .name(name.chars().take(15).collect())
        .spawn(move || worker.run(&inbox))?;
    Ok(TreeHandle {
        to,
        from_peers,
        from,
    })
}

/// A tree that works.
struct Open {
    keeper: Keeper<Files>,
    backing: Backing,
    leaves: Leaves,
}

struct Worker {
    setup: TreeSetup,
    tree: Option<Open>,
    /// The last checkpoint of which is known that the backing is it, unless a sweep is under way;
    /// `None` if there is to be no tree.
    at: Option<Tip>,
    /// See [`TreeWork::Start`].
    settled: Epoch,
    /// See [`TreeWork::Survey`].
    surveys: bool,
    /// So many have failed in a row.
    failed_surveys: u32,
    gathering: Option<Gathering>,
    /// A sweep may be writing.
    sweeping: bool,
    retry: Option<Instant>,
    stale: Stale,
    /// The checkpoint whose root is being computed, and whether the core waits for it.
    rooting: Option<(Tip, bool)>,
    /// There is no root of the last checkpoint.
    unrooted: bool,
    /// When the last sweep ended.
    moved: Instant,
    /// A deep verify is to begin.
    asked: bool,
    verify: Option<Verify>,
    /// What is known of the medium; there while there is a tree.
    record: Option<Record>,
    /// More is damaged than the record lists.
    unlisted: bool,
    /// Blocks that were bad when a tree was given up: those stay so in the one that is built anew.
    damaged_before: BTreeSet<u64>,
    repairs: Repairs,
    reads: Reads,
    /// The volume has failed closed.
    halted: bool,
    resyncs: Resyncs,
    next_slice: Instant,
    next_work: Instant,
    told: Instant,
    state: TreeState,
    untold: bool,
    from_peers: Arc<AtomicUsize>,
    outbox: mpsc::UnboundedSender<FromTree>,
}

impl Worker {
    fn new(
        setup: TreeSetup,
        from_peers: Arc<AtomicUsize>,
        outbox: mpsc::UnboundedSender<FromTree>,
    ) -> Self {
        let now = Instant::now();
        Self {
            setup,
            tree: None,
            at: None,
            settled: Epoch(0),
            surveys: false,
            failed_surveys: 0,
            gathering: None,
            sweeping: false,
            retry: None,
            stale: Stale::Nothing,
            rooting: None,
            unrooted: false,
            moved: now,
            asked: false,
            verify: None,
            record: None,
            unlisted: false,
            damaged_before: BTreeSet::new(),
            repairs: Repairs::new(now),
            reads: Reads::default(),
            halted: false,
            resyncs: Resyncs::new(),
            next_slice: now,
            next_work: now,
            told: now,
            state: TreeState::default(),
            untold: false,
            from_peers,
            outbox,
        }
    }

    fn run(&mut self, inbox: &Receiver<ToTree>) {
        loop {
            self.work_on();
            self.tell();
            let message = match self.deadline() {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match message {
                Ok(ToTree::Feed(feed)) => self.take(feed),
                // One that is under way is as good.
                Ok(ToTree::Verify) => self.asked = self.verify.is_none(),
                Ok(ToTree::Peer(index, message)) => {
                    self.from_peers.fetch_sub(1, Ordering::Relaxed);
                    self.peer_said(index, &message);
                }
                Ok(ToTree::NoPeer) => self.lose(true),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Whether the backing is the state at the checkpoint, and stays so while this thread reads.
    fn is_quiet(&self) -> bool {
        let settled = self.at.is_some_and(|at| at.epoch >= self.settled);
        settled && !self.sweeping && self.gathering.is_none()
    }

    fn is_building(&self) -> bool {
        let building = self.tree.as_ref().and_then(|tree| tree.keeper.to_build());
        building.is_some()
    }

    fn wants_slice(&self) -> bool {
        (self.is_building() || self.verify.is_some()) && self.is_quiet()
    }

    /// Whether the tree has something to do in its files.
    fn has_work(&self) -> bool {
        let tree = self.tree.as_ref();
        tree.is_some_and(|tree| tree.keeper.has_work())
    }

    /// When a root is to be computed although no epoch was marked: nothing has come for a while,
    /// and peers will come to this place, too.
    fn root_at(&self) -> Option<Instant> {
        let keeper = &self.tree.as_ref()?.keeper;
        let is_free = !keeper.is_summing() && keeper.to_build().is_none();
        let is_due = self.unrooted && self.rooting.is_none() && self.is_quiet();
        (is_free && is_due).then_some(self.moved + TELL)
    }

    fn deadline(&self) -> Option<Instant> {
        let slice = self.wants_slice().then_some(self.next_slice);
        let work = self.has_work().then_some(self.next_work);
        let retry = self.retry.filter(|_| self.is_quiet());
        let tell = self.untold.then_some(self.told + TELL);
        let repair = self.repairs.deadline();
        let suspects = self.reads.has_suspects() && self.is_quiet();
        let suspects = suspects.then(Instant::now);
        [
            slice,
            work,
            retry,
            tell,
            self.root_at(),
            self.verify_at(),
            repair,
            suspects,
            self.resyncs.deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// What is due and does not come from outside.
    fn work_on(&mut self) {
        let now = Instant::now();
        if self.retry.is_some_and(|at| at <= now) && self.is_quiet() {
            self.open(false);
        }
        if self.verify_at().is_some_and(|at| at <= Instant::now()) {
            self.asked = false;
            let first = self.at.map_or(Epoch(0), |at| at.epoch);
            self.verify = Some(Verify::new(first));
            tracing::info!(volume = %self.setup.name, "a deep verify begins");
        }
        if self.root_at().is_some_and(|at| at <= now) {
            self.want_root(false);
        }
        self.look_again();
        self.repair(now);
        self.resync(now);
        if self.has_work() && self.next_work <= now {
            self.work();
            self.next_work = Instant::now() + now.elapsed() * REST;
        }
        if self.wants_slice() && self.next_slice <= now {
            let earliest = now.checked_sub(BURST).unwrap_or(now);
            let from = self.next_slice.max(earliest);
            let slice = match self.is_building() {
                true => self.build_slice(),
                false => self.verify_slice(),
            };
            match slice {
                Ok(bytes) => {
                    // Holes that are hashed take time, too, though nothing is read.
                    let rest = Instant::now() + now.elapsed();
                    self.next_slice = rest.max(from + self.cost(bytes));
                }
                Err(error) => self.give_up(&error),
            }
        }
    }

    /// How long it takes to read so many bytes at the rate that is allowed.
    fn cost(&self, bytes: u64) -> Duration {
        Duration::from_micros(bytes.saturating_mul(1_000_000) / self.setup.rate.max(1))
    }

    fn build_slice(&mut self) -> Result<u64, TreeError> {
        let Some(Open {
            keeper, backing, ..
        }) = &mut self.tree
        else {
            return Ok(0);
        };
        let mut bad = self.damaged_before.clone();
        let slice = keeper.build_slice(backing, SLICE_BLOCKS, &mut bad)?;
        let built = keeper.to_build().is_none();
        bad.retain(|block| !self.damaged_before.contains(block));
        self.damaged(bad.into_iter());
        self.refresh();
        if built {
            tracing::info!(volume = %self.setup.name, "the state tree is built");
        }
        Ok(slice.read_bytes)
    }

    fn take(&mut self, feed: TreeFeed) {
        match feed {
            TreeFeed::Work(TreeWork::Start { at, settled, anew }) => {
                (self.at, self.settled, self.surveys) = (Some(at), settled, false);
                self.open(anew);
            }
            TreeFeed::Work(TreeWork::Survey { at, anew }) => self.survey(at, anew),
            TreeFeed::Work(TreeWork::Begin { cut, zeros }) => {
                let block = |bytes: u64| bytes / BLOCK_BYTES;
                let zeros = zeros
                    .iter()
                    .map(|&(at, bytes)| block(at)..block(at + bytes));
                self.gathering = Some(Gathering {
                    cut,
                    zeros: zeros.collect(),
                    leaves: BTreeMap::new(),
                });
            }
            TreeFeed::Blocks { parts, bytes, last } => self.take_blocks(&parts, &bytes, last),
            TreeFeed::Work(TreeWork::Done { at, marked }) => self.finish(at, marked),
            TreeFeed::Work(TreeWork::Discard) => self.discard(),
            TreeFeed::Check {
                read,
                blocks,
                bytes,
            } => self.check(read, &blocks, &bytes),
            TreeFeed::Work(TreeWork::Compare { peer, id }) => self.compare_with(peer, id),
            // What a sweep has begun does not end, and the backing is left alone.
            TreeFeed::Work(TreeWork::Halt) => {
                (self.sweeping, self.halted) = (true, true);
                self.turn_away();
            }
            TreeFeed::Work(TreeWork::Blocks { .. } | TreeWork::Check { .. }) => {}
        }
    }

    fn finish(&mut self, at: Tip, marked: bool) {
        (self.at, self.sweeping) = (Some(at), false);
        (self.unrooted, self.moved) = (true, Instant::now());
        self.has_written();
        let done = match &mut self.tree {
            Some(tree) => tree.keeper.finish_sweep(at.epoch),
            None => Ok(()),
        };
        match done {
            Ok(()) => self.refresh(),
            Err(error) => self.give_up(&error),
        }
        if marked {
            self.want_root(true);
        }
    }

    /// Begins to compute the root at the checkpoint, unless another one is still being computed.
    fn want_root(&mut self, marked: bool) {
        let exact = self.at.filter(|at| at.epoch >= self.settled);
        let begun = match (&mut self.tree, exact) {
            (Some(tree), Some(_)) if self.resyncs.wants_tree() => tree.keeper.want_snapshot(),
            (Some(tree), Some(_)) => tree.keeper.want_root(),
            _ => Ok(false),
        };
        match begun {
            Ok(true) => self.rooting = exact.map(|at| (at, marked)),
            Ok(false) if marked => self.say(FromTree::Core(TreeEvent::Rooted)),
            Ok(false) => {}
            Err(error) => {
                if marked {
                    self.say(FromTree::Core(TreeEvent::Rooted));
                }
                self.give_up(&error);
            }
        }
        self.unrooted &= self.rooting.is_none_or(|(at, _)| Some(at) != self.at);
    }

    fn work(&mut self) {
        let Some(tree) = &mut self.tree else { return };
        match tree.keeper.work(WORK) {
            Ok(Worked::Nothing | Worked::Some) => {}
            Ok(Worked::Root(epoch, root)) => {
                self.state.root = (!self.surveys).then_some((epoch, root));
                self.untold = true;
                let taken = tree.keeper.take_snapshot();
                if let Some((at, _)) = self.rooting.filter(|(at, _)| at.epoch == epoch) {
                    self.say_root_of_volume(at, root);
                    if let Some(tree) = taken {
                        self.take_tree(at, root, &Arc::new(tree));
                    }
                }
                self.no_longer_rooting();
            }
            Err(error) => self.give_up(&error),
        }
    }

    fn no_longer_rooting(&mut self) {
        if let Some((_, true)) = self.rooting.take() {
            self.say(FromTree::Core(TreeEvent::Rooted));
        }
    }

    fn refresh(&mut self) {
        if let Some(Open { keeper, .. }) = &self.tree {
            self.state.leaves = keeper.entries();
            self.state.built_bytes = keeper.to_build().map(|block| block * BLOCK_BYTES);
            self.untold = true;
        }
        self.tell_survey();
    }

    fn tell(&mut self) {
        if self.untold && self.told.elapsed() >= TELL {
            (self.told, self.untold) = (Instant::now(), false);
            self.state.record = self.record.clone();
            self.state.reads = self.reads.counts;
            let verify = self.verify.as_ref();
            self.state.verified_bytes = verify.map(|verify| verify.next * BLOCK_BYTES);
            self.say(FromTree::Report(self.state.clone()));
        }
    }

    fn say(&self, word: FromTree) {
        // Fails only when the daemon is on its way out.
        let _ = self.outbox.send(word);
    }
}
