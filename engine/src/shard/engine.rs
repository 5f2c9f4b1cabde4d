//! The core with everything it acts upon: ring, disks, and the queue to the rest of the daemon.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hn4::types::SECTOR_BYTES;

use super::client::{Asked, StatusAsked};
use super::disks::{Disks, Done, FeedRead, Reader};
use super::fork::ForkPlace;
use super::front::Relayed;
use super::host::Host;
use super::link::{FromShard, Outbox, ProofFeed, TreeFeed};
use super::proving::ProofFrame;
use super::readers::Verdicts;
use super::seeding::Seeding;
use super::shadow::ShadowFile;
use crate::arena::{SlotId, SlotMemory};
use crate::core::event::{
    Action, Actions, CopyStatus, Event, Failure, Now, PeerEvent, PeerId, ProofEvent, Request,
    RequestId, Seg as CoreSeg, Time, TreeWork,
};
use crate::core::{Volume, VolumeConfig};
use crate::nbd::reply::Extent;
use crate::ring::{Completion, Ring, Seg};

/// Progress that no peer waits for is told to the rest of the daemon after so many milliseconds.
const TELL_MS: u64 = 50;

/// Counters that status shows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Traffic {
    pub(super) requests: u64,
    pub(super) written_bytes: u64,
    pub(super) read_bytes: u64,
}

/// Who is to be answered.
#[derive(Debug)]
pub(super) enum Asker {
    /// A client of this thread, or the caller of an engine that is embedded.
    Here(Asked),
    /// A client of another thread.
    There(Relayed),
}

impl Asker {
    /// What it reads.
    #[inline]
    fn read_bytes(&self) -> u64 {
        match self {
            Self::Here(asked) => asked.read.as_ref().map_or(0, |read| read.0.length.into()),
            Self::There(relayed) => relayed.read_bytes,
        }
    }
}

/// See the module.
pub(super) struct Engine {
    pub(super) ring: Ring,
    pub(super) volume: Volume,
    pub(super) disks: Disks,
    pub(super) outbox: Outbox,
    pub(super) traffic: Traffic,
    /// Scratch for transfers of clients.
    pub(super) segs: Vec<Seg>,
    actions: Actions,
    asked: Vec<Option<Asker>>,
    free: Vec<u32>,
    /// Answers to clients that the last steps brought.
    pub(super) answers: VecDeque<(Asker, Result<(), Failure>)>,
    /// What they said about readers.
    pub(super) verdicts: Verdicts,
    fork_place: ForkPlace,
    shadow: Option<ShadowFile>,
    /// What came of saving a fork; the core is told with the next step.
    saved_fork: Option<Result<PathBuf, String>>,
    /// The last fork file.
    pub(super) fork_file: Option<PathBuf>,
    /// The session that each peer's messages are for.
    sessions: Vec<u64>,
    pub(super) seeding: Seeding,
    started: Instant,
    /// Both clocks as they were read last; see [`Self::tick`].
    now: Now,
    /// Since when the rest of the daemon has not been told of a change.
    untold_since: Option<Time>,
    /// What it was told last.
    told: Option<CopyStatus>,
}

impl Engine {
    pub(super) fn new(
        ring: Ring,
        volume: Volume,
        disks: Disks,
        (fork_place, shadow): (ForkPlace, Option<ShadowFile>),
        outbox: Outbox,
    ) -> Self {
        let mut ring = ring;
        let waker = ring.waker();
        let notify = Box::new(move || waker.wake());
        ring.arena_mut().notify_returns(notify);
        Self {
            ring,
            volume,
            disks,
            outbox,
            traffic: Traffic::default(),
            segs: Vec::with_capacity(1024),
            actions: Actions::default(),
            asked: Vec::new(),
            free: Vec::new(),
            answers: VecDeque::new(),
            verdicts: Verdicts::default(),
            fork_place,
            shadow,
            saved_fork: None,
            fork_file: None,
            sessions: Vec::new(),
            seeding: Seeding::default(),
            started: Instant::now(),
            now: Now::default(),
            untold_since: None,
            told: None,
        }
    }

    /// Begins a turn: reads the clocks, since what happens in one turn happens at one time, and
    /// takes back what the prover has looked at.
    pub(super) fn tick(&mut self) {
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.now = Now {
            time: self.time(),
            wall_ms: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX),
        };
        if self.ring.arena_mut().take_back() {
            // Somebody may wait for room.
            self.step(Event::Timer);
        }
    }

    /// Says what there is to say to the rest of the daemon.
    pub(super) fn tell(&mut self) {
        self.tell_state();
        self.outbox.flush(self.now.time);
    }

    pub(super) fn config(&self) -> &VolumeConfig {
        self.volume.config()
    }

    fn time(&self) -> Time {
        let nanos = self.started.elapsed().as_nanos();
        Time(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// How long until the core wants to be called.
    pub(super) fn until_deadline(&self) -> Option<Duration> {
        let untold = self.untold_since.map(|since| since.plus_ms(TELL_MS));
        let deadline = [self.volume.next_deadline(), untold, self.outbox.deadline()];
        let deadline = deadline.into_iter().flatten().min()?;
        Some(Duration::from_nanos(
            deadline.0.saturating_sub(self.time().0),
        ))
    }

    /// Tells the rest of the daemon about the copy's state: at once if sessions depend on it, else
    /// progress alone waits a little, so that not every flush wakes another thread.
    fn tell_state(&mut self) {
        let Some(since) = self.untold_since else {
            return;
        };
        let state = self.volume.copy_status();
        let only_progress = self.told.is_some_and(|told| {
            let CopyStatus {
                tip,
                anchored,
                progress,
                ..
            } = state;
            let moved = CopyStatus {
                tip,
                anchored,
                progress,
                ..told
            };
            moved == state
        });
        let may_wait = only_progress && self.config().peers == 0;
        if may_wait && self.now.time < since.plus_ms(TELL_MS) {
            return;
        }
        self.untold_since = None;
        self.told = Some(state);
        self.outbox.push(FromShard::State(state));
    }

    fn alloc(&mut self, count: usize) -> Option<Vec<SlotId>> {
        if self.ring.arena().free_slots() < count {
            return None;
        }
        (0..count).map(|_| self.ring.arena_mut().alloc()).collect()
    }

    /// Asks the core.
    #[inline]
    pub(super) fn ask(&mut self, asker: Asker, request: Request) {
        self.traffic.requests += 1;
        if let Request::Write { sectors, .. } = request {
            self.traffic.written_bytes += u64::from(sectors) * SECTOR_BYTES;
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.asked.push(None);
            u32::try_from(self.asked.len() - 1).expect("connections and their requests are bounded")
        });
        self.asked[index as usize] = Some(asker);
        self.step(Event::Request {
            id: RequestId(index.into()),
            request,
        });
    }

    /// Lets the core take an event and carries out what it says.
    pub(super) fn step(&mut self, event: Event) {
        self.step_once(event);
        if let Some(saved) = self.saved_fork.take() {
            let result = saved.map(|path| self.fork_file = Some(path));
            self.step_once(Event::ForkSaved(result));
        }
        self.answer_copies();
    }

    pub(super) fn step_once(&mut self, event: Event) {
        self.actions.clear();
        self.volume
            .step(self.now, event, self.ring.arena_mut(), &mut self.actions);
        let mut list = std::mem::take(&mut self.actions.list);
        for action in list.drain(..) {
            self.act(action);
        }
        self.actions.list = list;
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Complete { id, result } => self.complete(id, result),
            Action::Io { token, io } => {
                self.disks
                    .submit(&mut self.ring, token, &io, &self.actions.segs);
            }
            Action::Ship { peer, epoch } => {
                let bytes = self.volume.frame_bytes(epoch, self.ring.arena());
                let bytes = bytes.expect("the core ships what it has in memory");
                self.outbox.push(FromShard::Frame {
                    peer,
                    session: self.session(peer),
                    epoch,
                    bytes,
                });
            }
            Action::FeedRead {
                peer,
                offset,
                frames,
            } => {
                let reader = Reader::Peer(peer, self.session(peer));
                self.disks
                    .read_frames(&mut self.ring, reader, offset.0, frames);
            }
            Action::Prove { epoch } => {
                // Nothing, if it was cut off in the same step: the prover hears of that, too.
                if let Some((head, payload)) = self.volume.proof_slots(epoch) {
                    let frame = ProofFrame::new(head, payload, self.ring.arena_mut());
                    let feed = FromShard::Proof(ProofFeed::Frame { epoch, frame });
                    self.outbox.push_quietly(feed, self.now.time);
                }
            }
            Action::ProofRead { offset, frames } => {
                self.disks
                    .read_frames(&mut self.ring, Reader::Prover, offset.0, frames);
            }
            Action::ProofCut(tip) => {
                self.outbox.push(FromShard::Proof(ProofFeed::Cut(tip)));
            }
            Action::Tree(work) => self.feed_tree(work),
            Action::SeedRead {
                peer,
                offset,
                bytes,
                wanted,
            } => self.seed_read(peer, offset, (bytes, wanted)),
            Action::SeedSame {
                peer,
                offset,
                bytes,
            } => self.seed_same(peer, offset, bytes),
            Action::Peer { peer, message } => {
                self.outbox.push(FromShard::Peer {
                    peer,
                    session: self.session(peer),
                    message,
                });
            }
            Action::PeerRetired { peer } => self.forget_session(peer),
            Action::ControlDone { id, result } => {
                self.outbox.push(FromShard::ControlDone { id, result });
            }
            Action::SaveFork(fork) => self.saved_fork = Some(self.fork_place.save(&fork)),
            Action::DropShadow => {
                // If that fails the space is given back at the next start.
                let _ = self.shadow.as_ref().map(ShadowFile::clear);
            }
            Action::Pinned { id, generation } => self.verdicts.pinned.push((id, generation)),
            Action::PinsBroken => self.verdicts.broken = true,
            Action::StateChanged => {
                self.untold_since.get_or_insert(self.now.time);
            }
        }
    }

    fn feed_tree(&mut self, work: TreeWork) {
        let feed = match work {
            TreeWork::Blocks {
                offsets,
                segs,
                last,
            } => {
                let segs = &self.actions.segs[segs];
                let bytes = self.gather_bytes(segs);
                let lengths = segs.iter().map(|seg| seg.bytes);
                let parts = offsets.into_iter().zip(lengths).collect();
                TreeFeed::Blocks { parts, bytes, last }
            }
            TreeWork::Check { read, blocks, segs } => TreeFeed::Check {
                read,
                blocks,
                bytes: self.gather_bytes(&self.actions.segs[segs]),
            },
            work => TreeFeed::Work(work),
        };
        self.outbox.push(FromShard::Tree(feed));
    }

    fn gather_bytes(&self, segs: &[CoreSeg]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(segs.len() * 4096);
        for seg in segs {
            let from = usize::from(seg.offset);
            let to = from + usize::from(seg.bytes);
            bytes.extend_from_slice(&self.ring.arena().bytes(seg.slot)[from..to]);
        }
        bytes
    }

    fn complete(&mut self, id: RequestId, result: Result<(), Failure>) {
        let index = u32::try_from(id.0).expect("an index that was given out here");
        if let Some(asker) = self.asked[index as usize].take() {
            self.free.push(index);
            if result.is_ok() {
                self.traffic.read_bytes += asker.read_bytes();
            }
            self.answers.push_back((asker, result));
        }
    }

    fn forget_session(&mut self, peer: PeerId) {
        if let Some(session) = self.sessions.get_mut(usize::from(peer.0)) {
            // No session has that name.
            *session = 0;
        }
    }

    /// Lets the core take what a session has. Messages of a session that was replaced are dropped.
    pub(super) fn peer_event(&mut self, peer: PeerId, session: u64, event: PeerEvent) {
        let index = usize::from(peer.0);
        if self.sessions.len() <= index {
            self.sessions.resize(index + 1, 0);
        }
        if event == PeerEvent::Connected {
            self.sessions[index] = session;
        }
        if self.sessions[index] == session {
            self.step(Event::Peer { peer, event });
        }
    }

    pub(super) fn session(&self, peer: PeerId) -> u64 {
        self.sessions
            .get(usize::from(peer.0))
            .copied()
            .unwrap_or_default()
    }

    /// Takes a completion of an operation on a disk.
    pub(super) fn disk_done(&mut self, completion: Completion) {
        match self.disks.done(&mut self.ring, completion) {
            Done::Busy => {}
            Done::Core(token, result) => self.step(Event::IoDone { token, result }),
            Done::Feed(feed, ok) => self.frames_read(&feed, ok),
            Done::Piece {
                peer,
                session,
                offset,
                data,
            } => {
                if self.session(peer) == session {
                    self.piece_read(peer, offset, data);
                }
            }
        }
    }

    fn frames_read(&mut self, feed: &FeedRead, ok: bool) {
        match feed.reader {
            Reader::Peer(peer, session) if self.session(peer) != session => {}
            Reader::Peer(peer, _) => {
                // Nothing damaged is sent: it would be refused there, for ever.
                let intact = if ok {
                    self.volume.intact_frames(&feed.frames, &feed.bytes)
                } else {
                    0
                };
                self.ship_frames(feed, intact);
                let ok = intact == feed.frames.len();
                let event = PeerEvent::FeedReadDone { ok };
                self.step(Event::Peer { peer, event });
            }
            Reader::Prover => {
                if ok && self.volume.wants_proof_read() {
                    self.ship_frames(feed, feed.frames.len());
                } else if !ok {
                    self.outbox.push(FromShard::Proof(ProofFeed::Failed));
                }
                self.step(Event::Proof(ProofEvent::ReadDone { ok }));
            }
        }
    }

    fn ship_frames(&mut self, feed: &FeedRead, count: usize) {
        let mut rest = feed.bytes.as_slice();
        for &(epoch, length) in feed.frames.iter().take(count) {
            let length = usize::try_from(length)
                .unwrap_or(usize::MAX)
                .min(rest.len());
            let (frame, later) = rest.split_at(length);
            rest = later;
            let mut bytes = frame.to_vec();
            if bytes.len() >= 4096 {
                hn4::log::Stamp::clear(&mut bytes);
            }
            self.outbox.push(match feed.reader {
                Reader::Peer(peer, session) => FromShard::Frame {
                    peer,
                    session,
                    epoch,
                    bytes,
                },
                Reader::Prover => {
                    self.volume.strike_out_foreign(epoch, &mut bytes);
                    FromShard::Proof(ProofFeed::Frame {
                        epoch,
                        frame: ProofFrame::Read(bytes),
                    })
                }
            });
        }
    }
}

/// Clients of the thread that has the volume.
impl Host for Engine {
    fn wire(&mut self) -> (&mut Ring, &mut Vec<Seg>) {
        (&mut self.ring, &mut self.segs)
    }

    fn accepts_writes(&self) -> Result<(), Failure> {
        self.volume.accepts_writes()
    }

    fn admits_now(&self, blocks: usize) -> bool {
        self.volume.admits_now(blocks)
    }

    fn alloc_for_write(&mut self, count: usize) -> Option<Vec<SlotId>> {
        if !self.volume.has_room(self.ring.arena(), count) {
            return None;
        }
        self.alloc(count)
    }

    /// Reads may use half of what writes may not take; the rest is for the log.
    fn alloc_for_read(&mut self, count: usize) -> Option<Vec<SlotId>> {
        let reserve = self.config().reserve_slots / 2;
        if self.ring.arena().free_slots() < count + reserve {
            return None;
        }
        self.alloc(count)
    }

    #[inline]
    fn request(&mut self, asked: Asked, request: Request) {
        self.ask(Asker::Here(asked), request);
    }

    fn extents(&mut self, asked: StatusAsked) -> Option<Vec<Extent>> {
        Some(self.describe(asked.range))
    }

    fn unpin(&mut self, generation: u64) {
        self.step(Event::Unpin { generation });
    }
}
