//! The state tree of a volume in a thread of its own.
//!
//! It hashes what each sweep is about to write, makes the leaves durable, and only then lets the
//! sweep begin. In between it hashes a device that has no tree yet, at a bounded rate.
//!
//! **Invariant: the volume never waits for a tree that cannot work.** If its files cannot be
//! written or are damaged, it is given up, sweeps go on without it, and it is built anew later.
//!
//! The backing is read here only while no sweep is under way; see [`hn4_proof::tree::keeper`].

pub(super) mod compare;
mod files;
mod inspect;
pub(super) mod verify;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use hn4::log::LogIdentity;
use hn4::types::{BLOCK_BYTES, Epoch, NodeId};
use hn4_engine::core::event::{Tip, TreeEvent, TreeWork};
use hn4_engine::shard::TreeFeed;
use hn4_proof::blocks;
use hn4_proof::hash::Digest;
use hn4_proof::tree::keeper::{Device, Keeper, Opened};
use hn4_proof::tree::{Geometry, TreeError};
use tokio::sync::mpsc;

use self::files::{Backing, Files};
use self::verify::{Record, Verify};
use super::proof::local::LocalLedger;

/// Pause before a tree that was given up is built anew.
const RETRY: Duration = Duration::from_secs(60);
/// How often at most the daemon is told of progress.
const TELL: Duration = Duration::from_millis(200);
/// Leaf of a block of which nobody knows any more what it is to be: it was damaged, and then only
/// some of its sectors were written. No block has it.
const DAMAGED: Digest = Digest([0xFF; 32]);
/// Blocks that are read from the backing at once: a sweep may have to wait for that.
const SLICE_BLOCKS: u64 = 256;
/// What may be read faster than the rate after a time in which there was no occasion.
const BURST: Duration = Duration::from_millis(250);

/// To the tree.
#[derive(Debug)]
pub(super) enum ToTree {
    /// From the core.
    Feed(TreeFeed),
    /// Begin a deep verify, if none is under way.
    Verify,
}

/// From the tree.
#[derive(Debug)]
pub(super) enum FromTree {
    /// For the core.
    Core(TreeEvent),
    /// The root at a checkpoint.
    Root {
        at: Tip,
        root: Digest,
        /// Peers may have it, too.
        share: bool,
    },
    /// What it looks like now.
    Report(TreeState),
}

/// What is shown of a tree.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct TreeState {
    /// The checkpoint that it describes.
    pub(crate) checkpoint: Option<Epoch>,
    /// The root there; `None` while it is being built.
    pub(crate) root: Option<Digest>,
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
}

/// The daemon's end of a tree. Dropping it ends the thread.
pub(super) struct TreeHandle {
    to: Sender<ToTree>,
    pub(super) from: mpsc::UnboundedReceiver<FromTree>,
}

impl TreeHandle {
    pub(super) fn send(&self, message: ToTree) {
        // Fails only if the thread has panicked, which the panic hook has printed.
        let _ = self.to.send(message);
    }
}

/// Starts a tree.
///
/// # Errors
/// If the thread cannot be started.
pub(super) fn start(setup: TreeSetup) -> std::io::Result<TreeHandle> {
    let (to, inbox) = channel();
    let (outbox, from) = mpsc::unbounded_channel();
    let name = format!("tree {}", setup.name);
    let now = Instant::now();
    let mut worker = Worker {
        setup,
        tree: None,
        at: None,
        settled: Epoch(0),
        gathering: None,
        sweeping: false,
        retry: None,
        unshared: None,
        asked: false,
        verify: None,
        record: None,
        next_slice: now,
        told: now,
        state: TreeState::default(),
        untold: false,
        outbox,
    };
    std::thread::Builder::new()
        .name(name.chars().take(15).collect())
        .spawn(move || worker.run(&inbox))?;
    Ok(TreeHandle { to, from })
}

/// A tree that works.
struct Open {
    keeper: Keeper<Files>,
    backing: Backing,
}

/// What a sweep will write, as far as it is known.
struct Gathering {
    cut: Epoch,
    /// Blocks.
    zeros: Vec<Range<u64>>,
    leaves: BTreeMap<u64, Digest>,
}

struct Worker {
    setup: TreeSetup,
    tree: Option<Open>,
    /// The last checkpoint of which is known that the backing is it, unless a sweep is under way;
    /// `None` if there is to be no tree.
    at: Option<Tip>,
    /// See [`TreeWork::Start`].
    settled: Epoch,
    gathering: Option<Gathering>,
    /// A sweep may be writing.
    sweeping: bool,
    retry: Option<Instant>,
    /// A root that peers have not been told.
    unshared: Option<(Tip, Digest)>,
    /// A deep verify is to begin.
    asked: bool,
    verify: Option<Verify>,
    /// What is known of the medium; there while there is a tree.
    record: Option<Record>,
    next_slice: Instant,
    told: Instant,
    state: TreeState,
    untold: bool,
    outbox: mpsc::UnboundedSender<FromTree>,
}

impl Worker {
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
                Ok(ToTree::Verify) => self.asked = true,
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

    /// When a deep verify is to begin.
    fn verify_at(&self) -> Option<Instant> {
        let record = self.record.as_ref()?;
        if self.verify.is_some() || self.is_building() {
            return None;
        }
        let interval_ms = self.setup.verify_interval_h * 3_600_000;
        let due = record.due_in_ms(interval_ms);
        let by_itself = (interval_ms > 0).then_some(due);
        let ms = if self.asked { Some(0) } else { by_itself };
        ms.map(|ms| Instant::now() + Duration::from_millis(ms))
    }

    fn deadline(&self) -> Option<Instant> {
        let slice = self.wants_slice().then_some(self.next_slice);
        let retry = self.retry.filter(|_| self.is_quiet());
        let tell = self.untold.then_some(self.told + TELL);
        [slice, retry, tell, self.verify_at()]
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
        if self.wants_slice() && self.next_slice <= now {
            let earliest = now.checked_sub(BURST).unwrap_or(now);
            let from = self.next_slice.max(earliest);
            let slice = match self.is_building() {
                true => self.build_slice(),
                false => self.verify_slice(),
            };
            match slice {
                Ok(bytes) => self.next_slice = from + self.cost(bytes),
                Err(error) => self.give_up(&error),
            }
        }
    }

    /// How long it takes to read so many bytes at the rate that is allowed.
    fn cost(&self, bytes: u64) -> Duration {
        Duration::from_micros(bytes.saturating_mul(1_000_000) / self.setup.rate.max(1))
    }

    fn build_slice(&mut self) -> Result<u64, TreeError> {
        let Some(Open { keeper, backing }) = &mut self.tree else {
            return Ok(0);
        };
        let slice = keeper.build_slice(backing, SLICE_BLOCKS)?;
        let built = keeper.to_build().is_none();
        self.refresh()?;
        if built {
            tracing::info!(volume = %self.setup.name, "the state tree is built");
            self.announce();
        }
        Ok(slice.read_bytes)
    }

    fn verify_slice(&mut self) -> Result<u64, TreeError> {
        let (Some(tree), Some(mut verify)) = (&mut self.tree, self.verify.take()) else {
            return Ok(0);
        };
        let mut bad = Vec::new();
        let from = (verify.next, SLICE_BLOCKS);
        let slice = tree
            .keeper
            .verify_slice(&mut tree.backing, from, &mut bad)?;
        verify.take(slice.next_block, &bad);
        let blocks = tree.keeper.geometry().blocks();
        self.damaged(bad.iter().map(|bad| bad.block));
        if slice.next_block < blocks {
            self.verify = Some(verify);
        } else {
            let first = verify.first;
            let record = verify.finish();
            let bad = record.count();
            self.keep_inspection(first, &record);
            tracing::info!(volume = %self.setup.name, bad, "a deep verify has ended");
            self.record = Some(record);
            self.keep_record();
        }
        self.untold = true;
        Ok(slice.read_bytes)
    }

    /// These blocks of the backing are not what was written there.
    fn damaged(&mut self, blocks: impl Iterator<Item = u64>) {
        let new = match &mut self.record {
            Some(record) => record.found(blocks),
            None => return,
        };
        if !new.is_empty() {
            let places = verify::ranges(&new.iter().copied().collect(), 16).join(", ");
            tracing::error!(
                volume = %self.setup.name, blocks = new.len(), %places,
                "DAMAGED: blocks of the backing are not what was written there"
            );
            self.keep_record();
        }
    }

    fn keep_record(&mut self) {
        self.untold = true;
        let Some(record) = &self.record else { return };
        let bytes = record.encode();
        let kept = bytes.and_then(|bytes| self.files()?.keep_record(&bytes));
        if let Err(error) = kept {
            tracing::error!(volume = %self.setup.name, %error, "a verify cannot be recorded");
        }
    }

    /// What the sweep writes is good again.
    fn rewritten(&mut self, gathering: &Gathering) {
        let is_written = |block: u64| {
            let whole = gathering.leaves.get(&block);
            whole.is_some_and(|leaf| *leaf != DAMAGED)
                || gathering.zeros.iter().any(|range| range.contains(&block))
        };
        if let Some(verify) = &mut self.verify {
            verify.rewritten(is_written);
        }
        let healed = self.record.as_mut();
        if healed.is_some_and(|record| record.rewritten(is_written)) {
            self.keep_record();
        }
    }

    fn take(&mut self, feed: TreeFeed) {
        match feed {
            TreeFeed::Work(TreeWork::Start { at, settled, anew }) => {
                (self.at, self.settled) = (Some(at), settled);
                self.open(anew);
            }
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
            TreeFeed::Work(TreeWork::Blocks { .. }) => {}
        }
    }

    fn take_blocks(&mut self, parts: &[(u64, u16)], bytes: &[u8], last: bool) {
        let Some(mut gathering) = self.gathering.take() else {
            return;
        };
        let exact = self.at.is_some_and(|at| at.epoch >= self.settled);
        let mut bad = Vec::new();
        let done = match &mut self.tree {
            None => Ok(()),
            Some(tree) => {
                let checked = exact && tree.keeper.to_build().is_none();
                let taken = hash_parts(&mut gathering, tree, parts, bytes, |block| {
                    bad.extend(Some(block).filter(|_| checked));
                    checked
                });
                taken.and_then(|()| match last {
                    false => Ok(()),
                    true => {
                        let Gathering { cut, zeros, leaves } = &gathering;
                        tree.keeper.begin_sweep(*cut, leaves, zeros)
                    }
                })
            }
        };
        self.damaged(bad.into_iter());
        match done {
            Err(error) => self.give_up(&error),
            Ok(()) if last => self.rewritten(&gathering),
            Ok(()) => {}
        }
        if last {
            self.sweeping = true;
            self.say(FromTree::Core(TreeEvent::Ready(gathering.cut)));
        } else {
            self.gathering = Some(gathering);
            self.say(FromTree::Core(TreeEvent::Took));
        }
    }

    fn finish(&mut self, at: Tip, marked: bool) {
        (self.at, self.sweeping) = (Some(at), false);
        let Some(Open { keeper, .. }) = &mut self.tree else {
            return;
        };
        let done = keeper.finish_sweep(at.epoch).and_then(|()| keeper.tidy());
        if let Err(error) = done.and_then(|()| self.refresh()) {
            return self.give_up(&error);
        }
        if let Some(root) = self.state.root {
            self.unshared = Some((at, root)).filter(|_| !marked);
            self.say(FromTree::Root {
                at,
                root,
                share: marked,
            });
        }
    }

    /// The root of a tree that was opened or built.
    fn announce(&mut self) {
        if let (Some(at), Some(root)) = (self.at, self.state.root) {
            self.unshared = None;
            let share = true;
            self.say(FromTree::Root { at, root, share });
        }
    }

    /// Nothing has come for a while: peers will come to this place, too.
    fn share(&mut self) {
        let unshared = self.unshared.take().filter(|_| self.is_quiet());
        if let Some((at, root)) = unshared {
            let share = true;
            self.say(FromTree::Root { at, root, share });
        }
    }

    fn discard(&mut self) {
        (self.at, self.tree, self.retry) = (None, None, None);
        (self.sweeping, self.gathering) = (false, None);
        let gone = self.files().map_err(TreeError::from);
        if let Err(error) = gone.and_then(|mut files| Keeper::discard(&mut files)) {
            // A tree that is found later has another checkpoint than the log, and is not believed.
            tracing::error!(volume = %self.setup.name, %error, "the state tree cannot be removed");
        }
        self.state = TreeState::default();
        (self.verify, self.record) = (None, None);
        self.untold = true;
        self.say(FromTree::Core(TreeEvent::Discarded));
    }

    fn files(&self) -> std::io::Result<Files> {
        Files::open(&self.setup.state_dir, self.setup.identity.volume)
    }

    fn open(&mut self, anew: bool) {
        self.retry = None;
        match self.try_open(anew) {
            Ok(found) => {
                self.state.failed = None;
                if let Opened::Anew(why) = found {
                    let notice = format!("the state tree is built anew: {why}");
                    tracing::warn!(volume = %self.setup.name, "{notice}");
                    self.state.notice = Some(notice);
                }
                match self.refresh() {
                    Err(error) => self.give_up(&error),
                    Ok(()) => self.announce(),
                }
            }
            Err(error) => self.give_up(&error),
        }
    }

    fn try_open(&mut self, anew: bool) -> Result<Opened, TreeError> {
        let Some(at) = self.at else {
            return Ok(Opened::New);
        };
        let identity = &self.setup.identity;
        let backing = Backing::open(&self.setup.backing, identity.size_bytes)?;
        let geometry = Geometry::new(identity.size_bytes)?;
        let mut files = self.files()?;
        if anew {
            Keeper::discard(&mut files)?;
        }
        let (keeper, found) = Keeper::open(files, (identity.volume, geometry), at.epoch)?;
        // Of a tree that is built anew, what was found before is not known to be so.
        let record = match found {
            Opened::Whole => self.files()?.record()?.and_then(|it| Record::decode(&it)),
            Opened::New | Opened::Anew(_) => None,
        };
        self.verify = None;
        self.record = Some(record.unwrap_or_else(Record::new));
        self.keep_record();
        self.tree = Some(Open { keeper, backing });
        Ok(found)
    }

    /// Goes on without a tree, for a while.
    fn give_up(&mut self, error: &TreeError) {
        tracing::error!(volume = %self.setup.name, %error, "the state tree is given up");
        self.tree = None;
        (self.verify, self.record) = (None, None);
        if let Ok(mut files) = self.files() {
            // If that fails, too: see `discard`.
            let _ = Keeper::discard(&mut files);
        }
        self.retry = Some(Instant::now() + RETRY);
        self.state = TreeState {
            failed: Some(error.to_string()),
            notice: self.state.notice.take(),
            ..TreeState::default()
        };
        self.untold = true;
    }

    fn refresh(&mut self) -> Result<(), TreeError> {
        let Some(Open { keeper, .. }) = &mut self.tree else {
            return Ok(());
        };
        let exact = self.at.is_some_and(|at| at.epoch >= self.settled);
        self.state.root = keeper.root()?.filter(|_| exact);
        self.state.checkpoint = Some(keeper.checkpoint());
        self.state.leaves = keeper.entries();
        self.state.built_bytes = keeper.to_build().map(|block| block * BLOCK_BYTES);
        self.untold = true;
        Ok(())
    }

    fn tell(&mut self) {
        if self.untold && self.told.elapsed() >= TELL {
            (self.told, self.untold) = (Instant::now(), false);
            self.share();
            self.state.record = self.record.clone();
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

/// Adds the leaves of the blocks to which `parts` belong: whole ones, and those of which only some
/// sectors are written over what is there. If that is not what the tree says, `is_damage` is asked
/// whether it is damaged, and such a block stays so.
fn hash_parts(
    gathering: &mut Gathering,
    Open { keeper, backing }: &mut Open,
    parts: &[(u64, u16)],
    bytes: &[u8],
    mut is_damage: impl FnMut(u64) -> bool,
) -> Result<(), TreeError> {
    let mut lost = Vec::new();
    let mut whole: Vec<(u64, &blocks::Block)> = Vec::new();
    let mut partial: BTreeMap<u64, blocks::Block> = BTreeMap::new();
    let mut rest = bytes;
    for &(offset, length) in parts {
        let (part, later) = rest.split_at(usize::from(length).min(rest.len()));
        rest = later;
        let block = offset / BLOCK_BYTES;
        if let Ok(part) = part.try_into() {
            whole.push((block, part));
            continue;
        }
        let base = match partial.entry(block) {
            std::collections::btree_map::Entry::Occupied(base) => base.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                let mut base = [0; blocks::BLOCK];
                if !gathering.zeros.iter().any(|range| range.contains(&block)) {
                    backing.read(block * BLOCK_BYTES, &mut base)?;
                    let known = keeper.leaves(block..block + 1)?;
                    if known.first() != Some(&blocks::leaf(&base)) && is_damage(block) {
                        lost.push(block);
                    }
                }
                place.insert(base)
            }
        };
        let at = usize::try_from(offset % BLOCK_BYTES).unwrap_or(0);
        base[at..at + part.len()].copy_from_slice(part);
    }
    let mut numbers = whole.iter().map(|(block, _)| *block);
    blocks::leaves(whole.iter().map(|(_, bytes)| *bytes), |leaf| {
        gathering
            .leaves
            .extend(numbers.next().map(|block| (block, leaf)));
    });
    let partial = partial.iter();
    gathering
        .leaves
        .extend(partial.map(|(block, bytes)| (*block, blocks::leaf(bytes))));
    gathering
        .leaves
        .extend(lost.into_iter().map(|block| (block, DAMAGED)));
    Ok(())
}
