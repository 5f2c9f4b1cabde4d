//! A sweep waits for the state tree, and whatever else writes the backing waits until it is gone.
//!
//! The core alone, on a log in memory whose operations complete at once; the test is the tree.

use hn4::log::Role;
use hn4::types::{BlockIndex, Epoch, Incarnation, Lba, LogOffset, NodeId, Rank, Term};
use hn4_engine::arena::{SlotId, SlotMemory, VecArena};
use hn4_engine::core::event::{
    Contents, Control, Damaged, Disk, Io, IoToken, Now, PeerEvent, PeerId, PeerMessage, PeerState,
    Request, RequestId, SeedOrigin, SeedPiece, Time, Tip, TreeEvent, TreeWork,
};
use hn4_engine::core::recovery;
use hn4_engine::core::{AckMode, Action, Actions, Event, VerifyReads, Volume, VolumeConfig};

use crate::memory::{Memory, NODE, identity};

const RING_BYTES: usize = 8 << 20;
const SLOTS: u32 = 4096;

/// What the backing holds, everywhere.
pub(crate) const ON_BACKING: u8 = 0xBB;

/// A volume with a tree that answers only when it is told to.
pub(crate) struct Bench {
    pub(crate) volume: Volume,
    pub(crate) mem: VecArena,
    pub(crate) requests: u64,
    /// What the tree was told, and where the backing was written, in order.
    seen: Vec<Seen>,
    /// Requests that are complete, and whether they failed.
    pub(crate) done: Vec<(u64, bool)>,
    /// Byte offset and length of each read of the backing.
    pub(crate) read_from: Vec<(u64, u64)>,
    /// Where the last read goes.
    pub(crate) read_into: Vec<SlotId>,
    /// Reads of the backing fail.
    pub(crate) unreadable: bool,
    /// Writes and flushes of a full copy that are on their way, if they do not complete at once.
    pub(crate) held: Option<Vec<IoToken>>,
    /// Superblocks are held, too.
    pub(crate) slow_superblocks: bool,
    /// How often a session was to be closed.
    pub(crate) closed: usize,
    /// What was to be done for a full copy that is sent.
    pub(crate) copy: Vec<Action>,
    /// What else peers were told.
    pub(crate) said: Vec<PeerMessage>,
    time: Time,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Seen {
    Tree(TreeWork),
    /// Byte offset and length.
    Backing(u64, u64),
    Drained,
}

impl Bench {
    pub(crate) fn new(role: Role) -> Self {
        Self::with(role, VerifyReads::Off)
    }

    pub(crate) fn with(role: Role, verify_reads: VerifyReads) -> Self {
        Self::configured(role, |config| config.verify_reads = verify_reads)
    }

    pub(crate) fn configured(role: Role, change: impl Fn(&mut VolumeConfig)) -> Self {
        let log = Memory::new_log(identity(16 << 20), role, RING_BYTES);
        Self::opened(log, change)
    }

    /// A replica whose backing holds what somebody brought.
    pub(crate) fn brought() -> Self {
        let identity = identity(16 << 20);
        let log = Memory::new_copy(identity, Role::Replica, RING_BYTES, true);
        Self::opened(log, |_| {})
    }

    /// A volume of which this is the log.
    pub(crate) fn opened(mut log: Memory, change: impl Fn(&mut VolumeConfig)) -> Self {
        let identity = identity(16 << 20);
        let mut mem = VecArena::new(SLOTS);
        let opened = recovery::open(&mut log, &mut Memory::new(Vec::new()), &mut mem, |header| {
            let mut config = VolumeConfig {
                tree: true,
                peers: 1,
                ..VolumeConfig::new(identity, NODE, header.ring_bytes, SLOTS as usize)
            };
            change(&mut config);
            config
        });
        let mut bench = Self {
            volume: opened.expect("a volume").0,
            mem,
            requests: 0,
            seen: Vec::new(),
            done: Vec::new(),
            read_from: Vec::new(),
            read_into: Vec::new(),
            unreadable: false,
            held: None,
            slow_superblocks: false,
            closed: 0,
            copy: Vec::new(),
            said: Vec::new(),
            time: Time(0),
        };
        bench.step(Event::Timer);
        bench
    }

    pub(crate) fn step(&mut self, event: Event) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut actions = Actions::default();
            let now = Now {
                time: self.time,
                wall_ms: 0,
            };
            self.volume.step(now, event, &mut self.mem, &mut actions);
            for action in std::mem::take(&mut actions.list) {
                match action {
                    Action::Io { token, io } => {
                        self.note(token, &io, &actions);
                        let holds = match token {
                            IoToken::SeedWrite(_) | IoToken::SeedFsync | IoToken::Shadow => true,
                            IoToken::Superblock => self.slow_superblocks,
                            _ => false,
                        };
                        if holds && let Some(held) = &mut self.held {
                            held.push(token);
                            continue;
                        }
                        let fails = self.unreadable && matches!(token, IoToken::Read(_));
                        let result = if fails { Err(5) } else { Ok(()) };
                        events.push_back(Event::IoDone { token, result });
                    }
                    Action::Tree(work) => self.seen.push(Seen::Tree(work)),
                    Action::ControlDone { result, .. } => {
                        result.expect("drained");
                        self.seen.push(Seen::Drained);
                    }
                    Action::Peer {
                        message: PeerMessage::Close,
                        ..
                    } => self.closed += 1,
                    Action::Peer { message, .. } => self.said.push(message),
                    Action::SeedRead { .. } | Action::SeedSame { .. } => self.copy.push(action),
                    Action::Complete { id, result } => self.done.push((id.0, result.is_err())),
                    _ => {}
                }
            }
        }
    }

    fn note(&mut self, token: IoToken, io: &Io, actions: &Actions) {
        match io {
            Io::Write {
                disk: Disk::Backing,
                offset,
                segs,
                ..
            } => {
                let bytes = actions.segs[segs.clone()]
                    .iter()
                    .map(|seg| u64::from(seg.bytes));
                self.seen.push(Seen::Backing(*offset, bytes.sum()));
            }
            Io::Zero { offset, bytes, .. } => {
                assert!(matches!(token, IoToken::SweepZero | IoToken::SeedWrite(_)));
                self.seen.push(Seen::Backing(*offset, *bytes));
            }
            Io::Read {
                disk: Disk::Backing,
                offset,
                segs,
            } => {
                let mut bytes = 0;
                for seg in &actions.segs[segs.clone()] {
                    let from = usize::from(seg.offset);
                    let to = from + usize::from(seg.bytes);
                    self.mem.bytes_mut(seg.slot)[from..to].fill(ON_BACKING);
                    bytes += u64::from(seg.bytes);
                }
                self.read_from.push((*offset, bytes));
            }
            Io::Read { .. } | Io::Fsync { .. } | Io::Write { .. } => {}
        }
    }

    /// What was held is done.
    pub(crate) fn complete(&mut self, token: IoToken) {
        let held = self.held.as_mut().expect("operations are held");
        let at = held.iter().position(|of| *of == token);
        held.remove(at.expect("it is on its way"));
        let result = Ok(());
        self.step(Event::IoDone { token, result });
    }

    pub(crate) fn ask(&mut self, request: Request) {
        self.requests += 1;
        let id = RequestId(self.requests);
        self.step(Event::Request { id, request });
    }

    pub(crate) fn write(&mut self, lba: u64, sectors: u32) {
        let slots = vec![self.mem.alloc().expect("a slot")];
        self.ask(Request::Write {
            lba: Lba(lba),
            sectors,
            fua: false,
            slots,
        });
    }

    /// The number of the request.
    pub(crate) fn read(&mut self, lba: u64, sectors: u32) -> u64 {
        let blocks = (lba % 8 + u64::from(sectors)).div_ceil(8);
        let slots = (0..blocks).map(|_| self.mem.alloc().expect("a slot"));
        let slots: Vec<SlotId> = slots.collect();
        self.read_into.clone_from(&slots);
        self.ask(Request::Read {
            lba: Lba(lba),
            sectors,
            slots,
        });
        self.requests
    }

    pub(crate) fn damage(&mut self, block: u64, damaged: Option<Damaged>) {
        self.tree(TreeEvent::Damage(BlockIndex(block), damaged));
    }

    pub(crate) fn drain(&mut self) {
        let id = RequestId(u64::MAX);
        let control = Control::Drain;
        self.step(Event::Control { id, control });
    }

    pub(crate) fn tree(&mut self, event: TreeEvent) {
        self.step(Event::Tree(event));
    }

    pub(crate) fn take(&mut self) -> Vec<Seen> {
        std::mem::take(&mut self.seen)
    }

    /// Answers for all sweeps that have begun.
    fn let_sweep(&mut self) {
        let cut = |seen: &Seen| match seen {
            Seen::Tree(TreeWork::Begin { cut, .. }) => Some(*cut),
            _ => None,
        };
        while let Some(cut) = self.take().iter().find_map(cut) {
            self.tree(TreeEvent::Ready(cut));
        }
    }
}

#[test]
fn a_sweep_begins_when_the_tree_has_its_leaves_and_the_tree_hears_of_its_end() {
    let mut bench = Bench::new(Role::Primary);
    let started = bench.take();
    assert!(matches!(
        started[..],
        [Seen::Tree(TreeWork::Start { anew: false, .. })]
    ));
    bench.write(800, 8);
    bench.write(19, 2);
    bench.write(16, 1);
    bench.ask(Request::Zero {
        lba: Lba(4096),
        sectors: 1024,
        fua: false,
        trim: true,
        edges: Vec::new(),
    });
    bench.drain();
    let [
        Seen::Tree(TreeWork::Begin { cut, zeros }),
        Seen::Tree(blocks),
    ] = &bench.take()[..]
    else {
        panic!("the tree is told first, and nothing else is done");
    };
    let (cut, zeros) = (*cut, zeros.clone());
    assert_eq!(zeros, [(4096 * 512, 1024 * 512)]);
    let TreeWork::Blocks { offsets, last, .. } = blocks else {
        panic!("{blocks:?}");
    };
    assert_eq!(
        (&offsets[..], *last),
        (&[16 * 512, 19 * 512, 800 * 512][..], true)
    );
    // An answer about something else changes nothing.
    bench.tree(TreeEvent::Took);
    bench.tree(TreeEvent::Ready(Epoch(cut.0 + 1)));
    assert_eq!(bench.take(), []);
    bench.tree(TreeEvent::Ready(cut));
    let seen = bench.take();
    let [
        written @ ..,
        Seen::Tree(TreeWork::Done { at, marked: true }),
        Seen::Drained,
    ] = &seen[..]
    else {
        panic!("{seen:?}");
    };
    assert_eq!(at.epoch, cut);
    assert_eq!(written.len(), 4, "zeroes and three runs: {written:?}");
}

#[test]
fn a_large_sweep_is_handed_over_in_portions_and_no_block_is_torn_between_them() {
    let mut bench = Bench::new(Role::Primary);
    // The first epoch is marked, so a sweep ends there.
    bench.write(8000, 8);
    bench.drain();
    bench.tree(TreeEvent::Ready(Epoch(1)));
    assert!(bench.take().contains(&Seen::Drained));
    // Two parts of each block.
    for block in 0..300 {
        bench.write(block * 8, 1);
        bench.write(block * 8 + 4, 2);
    }
    bench.drain();
    let (mut parts, mut most, mut last_block) = (0, 0, None);
    let mut cut = Epoch(0);
    loop {
        let told = bench.take();
        assert!(!told.is_empty(), "it waits for an answer that was given");
        let mut answers = Vec::new();
        for seen in told {
            match seen {
                Seen::Tree(TreeWork::Begin { cut: to, .. }) => {
                    cut = to;
                    last_block = None;
                }
                Seen::Tree(TreeWork::Blocks { offsets, last, .. }) => {
                    assert_ne!(last_block, Some(offsets[0] / 4096), "torn between portions");
                    last_block = offsets.last().map(|offset| offset / 4096);
                    parts += offsets.len();
                    answers.push(match last {
                        true => TreeEvent::Ready(cut),
                        false => TreeEvent::Took,
                    });
                }
                Seen::Backing(..) => assert!(answers.is_empty(), "a sweep began too early"),
                Seen::Tree(_) => {}
                Seen::Drained => {
                    assert_eq!(parts, 600);
                    assert_eq!(most, 2, "portions on their way");
                    return;
                }
            }
        }
        most = most.max(answers.len());
        answers.into_iter().for_each(|answer| bench.tree(answer));
    }
}

/// A replica to which a full copy begins to be sent.
pub(crate) fn seeded() -> (Bench, impl Fn(&mut Bench, u64)) {
    let mut bench = Bench::new(Role::Replica);
    let piece = begin_copy(&mut bench);
    (bench, piece)
}

/// A full copy begins to be sent to this replica.
pub(crate) fn begin_copy(bench: &mut Bench) -> impl Fn(&mut Bench, u64) + use<> {
    let peer = PeerId(0);
    let from = Tip {
        epoch: Epoch(5),
        chain: hn4::types::ChainHash([3; 32]),
    };
    let term = Term {
        counter: 1,
        node: NodeId([2; 16]),
    };
    let origin = SeedOrigin {
        from,
        log_offset: LogOffset(0),
        cursor_bytes: 0,
    };
    let piece = move |bench: &mut Bench, offset: u64| {
        let event = PeerEvent::SeedPiece(SeedPiece {
            offset,
            bytes: 4096,
            contents: Contents::Data(vec![1; 4096]),
        });
        bench.step(Event::Peer { peer, event });
    };
    let state = PeerState {
        role: Role::Primary,
        term,
        incarnation: Incarnation(1),
        tip: from,
        tip_rank: Rank::default(),
        usable: true,
        resyncs: false,
        is_filled: false,
    };
    for event in [
        PeerEvent::Connected,
        PeerEvent::State(state),
        PeerEvent::SeedStart(origin),
    ] {
        bench.step(Event::Peer { peer, event });
    }
    piece
}

#[test]
fn what_still_comes_of_a_session_that_is_to_be_closed_is_not_looked_at() {
    let (mut bench, piece) = seeded();
    piece(&mut bench, 8192);
    assert_eq!(bench.closed, 1, "out of order");
    piece(&mut bench, 0);
    piece(&mut bench, 12288);
    bench.tree(TreeEvent::Discarded);
    assert_eq!(bench.closed, 1, "told once");
    let written = |seen: &Seen| matches!(seen, Seen::Backing(..));
    assert!(!bench.take().iter().any(written), "nothing is taken");
}

#[test]
fn a_full_copy_is_written_only_when_no_tree_is_left() {
    let (mut bench, piece) = seeded();
    piece(&mut bench, 0);
    assert_eq!(bench.take(), [Seen::Tree(TreeWork::Discard)]);
    bench.step(Event::Timer);
    assert_eq!(bench.take(), []);
    bench.tree(TreeEvent::Discarded);
    assert_eq!(bench.take(), [Seen::Backing(0, 4096)]);
}

#[test]
fn what_is_known_to_be_damaged_is_not_read_until_it_is_repaired_or_written_again() {
    let mut bench = Bench::new(Role::Primary);
    bench.damage(5, Some(Damaged::Sought));
    bench.done.clear();
    let beside = [bench.read(0, 40), bench.read(48, 8)];
    assert_eq!(bench.done, beside.map(|id| (id, false)), "others are read");
    bench.done.clear();
    let waits = [bench.read(32, 24), bench.read(47, 1)];
    assert_eq!(bench.done, [], "they wait for the repair");
    bench.damage(5, None);
    assert_eq!(bench.done, waits.map(|id| (id, false)));

    // There is no good copy: whoever waits hears of it, and whoever comes later.
    bench.damage(5, Some(Damaged::Sought));
    bench.done.clear();
    let waits = bench.read(40, 8);
    bench.damage(5, Some(Damaged::Lost));
    let late = bench.read(40, 8);
    assert_eq!(bench.done, [(waits, true), (late, true)]);

    // What has been written since is good, and nothing else of the block is.
    bench.write(42, 2);
    bench.done.clear();
    let (written, half) = (bench.read(42, 2), bench.read(42, 3));
    assert_eq!(bench.done, [(written, false), (half, true)]);
}

#[test]
fn a_flush_that_fails_behind_a_repair_fails_the_volume_closed_and_the_tree_is_told() {
    let mut bench = Bench::new(Role::Primary);
    bench.take();
    bench.tree(TreeEvent::FlushFailed(5));
    assert_eq!(bench.take(), [Seen::Tree(TreeWork::Halt)]);
    assert_eq!(bench.volume.failed().map(|failed| failed.errno), Some(5));
    bench.done.clear();
    bench.write(0, 8);
    assert_eq!(
        bench.done,
        [(bench.requests, true)],
        "nothing is written any more"
    );
}

#[test]
fn a_read_does_not_wait_for_a_repair_for_ever() {
    let mut bench = Bench::new(Role::Primary);
    bench.damage(5, Some(Damaged::Sought));
    bench.done.clear();
    let read = bench.read(40, 8);
    let deadline = bench.volume.next_deadline().expect("somebody waits");
    bench.step(Event::Timer);
    assert_eq!(bench.done, []);
    bench.time = deadline;
    bench.step(Event::Timer);
    assert_eq!(bench.done, [(read, true)]);
    assert_eq!(bench.volume.next_deadline(), None, "nobody waits any more");

    let read = bench.read(40, 8);
    bench.done.clear();
    bench.volume.stop();
    bench.step(Event::Timer);
    assert_eq!(bench.done, [(read, true)]);
}

/// A primary whose peer has asked for a full copy, while a block is damaged.
fn copying(damaged: u64) -> Bench {
    copying_from(Bench::new(Role::Primary), damaged)
}

fn copying_from(mut bench: Bench, damaged: u64) -> Bench {
    bench.damage(damaged, Some(Damaged::Lost));
    let peer = PeerId(0);
    let state = PeerState {
        role: Role::Replica,
        term: Term::default(),
        incarnation: Incarnation(0),
        tip: Tip::default(),
        tip_rank: Rank::default(),
        usable: false,
        resyncs: false,
        is_filled: false,
    };
    for event in [
        PeerEvent::Connected,
        PeerEvent::State(state),
        PeerEvent::Credit(1 << 30),
        PeerEvent::SeedRequest {
            cursor_bytes: 0,
            from: Tip::default(),
        },
    ] {
        bench.step(Event::Peer { peer, event });
    }
    bench
}

#[test]
fn a_full_copy_waits_at_a_damaged_block_until_it_is_good() {
    let mut bench = copying(3);
    assert_eq!(bench.copy, []);
    bench.damage(3, None);
    assert!(matches!(
        bench.copy[..],
        [Action::SeedRead { offset: 0, .. }]
    ));
}

/// The sweep that would make the block good may wait for the peer that waits for the copy.
#[test]
fn a_full_copy_goes_on_when_what_follows_it_writes_all_of_the_damaged_block() {
    let mut bench = copying(3);
    bench.write(24, 7);
    bench.ask(Request::Flush);
    assert_eq!(bench.copy, [], "one of its sectors is the backing's");
    bench.write(31, 1);
    assert_eq!(bench.copy, [], "the log does not have it yet");
    bench.ask(Request::Flush);
    assert!(matches!(
        bench.copy[..],
        [Action::SeedRead { offset: 0, .. }]
    ));
}

#[test]
fn a_full_copy_that_waits_at_a_damaged_block_does_not_fill_the_log() {
    let mut bench = copying(3);
    let blocks = RING_BYTES / 4096;
    for round in 0..2 * blocks as u64 / 64 {
        for block in 0..64 {
            bench.write((64 + 64 * (round % 16) + block) * 8, 8);
        }
        bench.drain();
        bench.let_sweep();
    }
    assert_eq!(bench.copy, []);
    let (used, ring) = bench.volume.log_usage();
    assert!(used < ring * 3 / 4, "{used} of {ring}");
}

/// What is written waits for a peer, which waits for the copy, which waits for the damaged block
/// to be written: so there must be room for that.
#[test]
fn a_full_copy_that_waits_at_a_damaged_block_leaves_room_for_who_would_write_it() {
    let needs_peer = |config: &mut VolumeConfig| {
        config.ack_mode = AckMode::Received;
        config.ack_peers = 1;
    };
    let mut bench = copying_from(Bench::configured(Role::Primary, needs_peer), 3);
    for written in 0..4 * SLOTS {
        if written % 64 == 0 || !bench.volume.has_room(&bench.mem, 1) {
            bench.ask(Request::Flush);
            bench.let_sweep();
        }
        assert!(bench.volume.has_room(&bench.mem, 1), "after {written}");
        bench.write(u64::from(64 + written % 2048) * 8, 8);
    }
    assert_eq!(bench.copy, []);
    bench.write(24, 8);
    bench.ask(Request::Flush);
    assert!(matches!(
        bench.copy[..],
        [Action::SeedRead { offset: 0, .. }]
    ));
}
