//! A volume's peers change while it runs: who waits, who counts, and who keeps the log.
//!
//! The core alone, on a log in memory whose operations complete at once.

use hn4::log::{CopyState, Role};
use hn4::types::{ChainHash, Epoch, Incarnation, Lba, NodeId, Rank, Term};
use hn4_engine::arena::{SlotMemory, VecArena};
use hn4_engine::core::event::{
    Control, Disk, Io, Now, PeerEvent, PeerId, PeerMessage, PeerState, Progress, ProofEvent,
    Request, RequestId, Time, Tip,
};
use hn4_engine::core::recovery;
use hn4_engine::core::{
    AckMode, Action, Actions, Event, LagPolicy, LagState, MAX_PEERS, OnDegraded, OnExceed, PeerSet,
    Place, Volume, VolumeConfig,
};

use crate::memory::{Memory, NODE, identity};

const RING_BYTES: usize = 4 << 20;
const SLOTS: u32 = 1024;
pub(crate) const WITHIN_MS: u64 = 5000;

/// A node with so many peers, none of them connected.
pub(crate) struct Bench {
    pub(crate) volume: Volume,
    pub(crate) mem: VecArena,
    now_ms: u64,
    next_id: u64,
    /// Requests and controls that were answered.
    pub(crate) done: Vec<(RequestId, Result<(), String>)>,
    /// Everything else that was to be done, except operations on disks.
    pub(crate) said: Vec<Action>,
    /// Operations on disks that are to be under way for a while; by default each is done at once.
    pub(crate) under_way: Option<Vec<Event>>,
}

impl Bench {
    /// A primary.
    pub(crate) fn new(ack_mode: AckMode, ack_peers: usize, peers: usize) -> Self {
        Self::open(Role::Primary, (ack_mode, ack_peers), peers)
    }

    pub(crate) fn open(role: Role, (ack_mode, ack_peers): (AckMode, usize), peers: usize) -> Self {
        Self::open_with(role, |config| VolumeConfig {
            ack_mode,
            ack_peers,
            peers,
            ..config
        })
    }

    /// A primary with one peer that must have flushed what is acknowledged, if it is there.
    fn degrading() -> Self {
        Self::open_with(Role::Primary, |config| VolumeConfig {
            ack_mode: AckMode::Durable,
            ack_peers: 1,
            peers: 1,
            on_degraded: OnDegraded::Degrade,
            ..config
        })
    }

    pub(crate) fn open_with(
        role: Role,
        configure: impl FnOnce(VolumeConfig) -> VolumeConfig,
    ) -> Self {
        let mut log = Memory::new_log(identity(1 << 20), role, RING_BYTES);
        Self::on(&mut log, configure)
    }

    /// Opens a log, to which nothing is written afterwards.
    pub(crate) fn on(
        log: &mut Memory,
        configure: impl FnOnce(VolumeConfig) -> VolumeConfig,
    ) -> Self {
        let mut mem = VecArena::new(SLOTS);
        let opened = recovery::open(log, &mut Memory::new(Vec::new()), &mut mem, |header| {
            let (identity, ring_bytes) = (header.identity, header.ring_bytes);
            configure(VolumeConfig {
                destage_delay_ms: 0,
                ..VolumeConfig::new(identity, NODE, ring_bytes, SLOTS as usize)
            })
        });
        Self {
            volume: opened.expect("a volume").0,
            mem,
            now_ms: 0,
            next_id: 0,
            done: Vec::new(),
            said: Vec::new(),
            under_way: None,
        }
    }

    pub(crate) fn step(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let mut actions = Actions::default();
            let now = Now {
                time: Time(self.now_ms * 1_000_000),
                wall_ms: self.now_ms,
            };
            self.volume.step(now, event, &mut self.mem, &mut actions);
            for action in actions.list {
                match action {
                    Action::Io { token, io } => {
                        if let Io::Read { disk, .. } = &io {
                            assert_eq!(*disk, Disk::Log, "nobody reads the volume here");
                        }
                        let result = Ok(());
                        let done = Event::IoDone { token, result };
                        match &mut self.under_way {
                            Some(under_way) => under_way.push(done),
                            None => events.insert(0, done),
                        }
                    }
                    Action::Complete { id, result } => {
                        let result = result.map_err(|failure| format!("{failure:?}"));
                        self.done.push((id, result));
                    }
                    Action::ControlDone { id, result } => self.done.push((id, result)),
                    other => self.said.push(other),
                }
            }
        }
    }

    pub(crate) fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.step(Event::Timer);
    }

    fn id(&mut self) -> RequestId {
        self.next_id += 1;
        RequestId(self.next_id)
    }

    /// Writes a block; the write's name.
    fn write(&mut self) -> RequestId {
        let slot = self.mem.alloc().expect("a slot");
        let request = Request::Write {
            lba: Lba(0),
            sectors: 8,
            fua: false,
            slots: vec![slot],
        };
        let id = self.id();
        self.step(Event::Request { id, request });
        id
    }

    /// Writes a block and flushes; the flush's name.
    pub(crate) fn write_and_flush(&mut self) -> RequestId {
        self.write();
        let (id, request) = (self.id(), Request::Flush);
        self.step(Event::Request { id, request });
        id
    }

    pub(crate) fn control(&mut self, control: Control) -> RequestId {
        let id = self.id();
        self.step(Event::Control { id, control });
        id
    }

    pub(crate) fn change(&mut self, places: &[Place], accept_fewer_copies: bool) -> RequestId {
        let mut set = PeerSet {
            places: [Place::Empty; MAX_PEERS],
            open_answers: 1,
            accept_fewer_copies,
            within_ms: WITHIN_MS,
        };
        set.places[..places.len()].copy_from_slice(places);
        self.control(Control::Peers(Box::new(set)))
    }

    pub(crate) fn answer(&self, id: RequestId) -> Option<&Result<(), String>> {
        let found = self.done.iter().find(|(done, _)| *done == id);
        found.map(|(_, result)| result)
    }

    /// Whether a peer's session was told to end.
    fn was_closed(&self, place: u8) -> bool {
        let (peer, message) = (PeerId(place), PeerMessage::Close);
        self.said.contains(&Action::Peer { peer, message })
    }

    pub(crate) fn peer(&mut self, place: u8, event: PeerEvent) {
        self.step(Event::Peer {
            peer: PeerId(place),
            event,
        });
    }

    /// A copy that has everything connects and follows.
    pub(crate) fn follow(&mut self, place: u8) {
        let status = self.volume.copy_status();
        self.peer(place, PeerEvent::Connected);
        let state = PeerState {
            role: Role::Replica,
            term: status.term,
            incarnation: Incarnation(0),
            tip: status.tip,
            tip_rank: Rank::default(),
            usable: true,
            resyncs: false,
            is_filled: false,
        };
        self.peer(place, PeerEvent::State(state));
        self.peer(place, PeerEvent::Credit(1 << 30));
        let subscribe = PeerEvent::Subscribe {
            tip: status.tip,
            anchored: Tip::default(),
        };
        self.peer(place, subscribe);
    }

    /// The peer says that it has flushed everything there is.
    pub(crate) fn acknowledge(&mut self, place: u8) {
        self.acknowledge_to(place, self.volume.tip().epoch);
    }

    fn acknowledge_to(&mut self, place: u8, epoch: Epoch) {
        self.progress(place, epoch, epoch);
    }

    fn progress(&mut self, place: u8, received: Epoch, durable: Epoch) {
        let progress = Progress {
            received,
            durable,
            proven: Epoch(0),
            applied: Epoch(0),
        };
        self.peer(place, PeerEvent::Ack(progress));
    }
}

pub(crate) const KEPT: Place = Place::Kept(LagPolicy {
    max_bytes: None,
    max_ms: None,
    on_exceed: OnExceed::Throttle,
});
const NEW: Place = Place::New(LagPolicy {
    max_bytes: None,
    max_ms: None,
    on_exceed: OnExceed::Throttle,
});

#[test]
fn who_waits_for_a_peer_that_is_removed_goes_on_waiting_for_another_one() {
    let mut bench = Bench::new(AckMode::Durable, 1, 2);
    bench.follow(0);
    bench.follow(1);
    let flush = bench.write_and_flush();
    let change = bench.change(&[Place::Empty, KEPT], false);
    assert_eq!((bench.answer(flush), bench.answer(change)), (None, None));
    // Its acknowledgement comes too late to count.
    bench.acknowledge(0);
    assert_eq!((bench.answer(flush), bench.answer(change)), (None, None));
    bench.acknowledge(1);
    assert_eq!(bench.answer(flush), Some(&Ok(())));
    assert_eq!(bench.answer(change), Some(&Ok(())));
    assert!(!bench.volume.peers()[0].connected);
    assert!(bench.was_closed(0), "its session ends");
}

#[test]
fn what_was_acknowledged_stays_on_as_many_peers_or_the_change_is_refused() {
    let mut bench = Bench::new(AckMode::Durable, 1, 2);
    bench.follow(0);
    bench.follow(1);
    let flush = bench.write_and_flush();
    bench.acknowledge(0);
    assert_eq!(bench.answer(flush), Some(&Ok(())));
    // Only the peer that leaves has it.
    let change = bench.change(&[Place::Empty, KEPT], false);
    bench.pass(WITHIN_MS - 1);
    assert_eq!(bench.answer(change), None);
    bench.pass(2);
    let refused = bench.answer(change).cloned().expect("an answer");
    let why = refused.expect_err("only the peer that leaves has it");
    assert!(why.contains("ack_peers = 1"), "{why}");
    // Then it counts again.
    let flush = bench.write_and_flush();
    bench.acknowledge(0);
    assert_eq!(bench.answer(flush), Some(&Ok(())));
    let change = bench.change(&[Place::Empty, KEPT], true);
    assert_eq!(bench.answer(change), Some(&Ok(())), "waived");
    // Whoever comes after waits for the one that stays.
    let flush = bench.write_and_flush();
    assert_eq!(bench.answer(flush), None);
    bench.acknowledge(1);
    assert_eq!(bench.answer(flush), Some(&Ok(())));
}

#[test]
fn the_only_peer_cannot_be_removed_but_it_can_be_replaced_by_one_that_knows_nothing() {
    let mut bench = Bench::new(AckMode::Durable, 1, 1);
    bench.follow(0);
    let waiting = bench.write_and_flush();
    let change = bench.change(&[Place::Empty], true);
    let refused = bench.answer(change).cloned().expect("an answer");
    assert!(refused.is_err_and(|why| why.contains("need 1 peers and 0 would be left")));
    let change = bench.change(&[NEW], true);
    assert_eq!(bench.answer(change), Some(&Ok(())));
    // Nothing the old one said, or still says, counts for the new one.
    bench.acknowledge(0);
    assert_eq!(bench.answer(waiting), None);
    assert_eq!(bench.volume.peers()[0].progress, Progress::default());
    bench.follow(0);
    bench.acknowledge(0);
    assert_eq!(bench.answer(waiting), Some(&Ok(())));
}

#[test]
fn a_place_that_became_free_is_given_to_the_next_and_the_others_stay_where_they_are() {
    let mut bench = Bench::new(AckMode::Async, 0, 3);
    for place in 0..3 {
        bench.follow(place);
    }
    let change = bench.change(&[KEPT, Place::Empty, KEPT], false);
    assert_eq!(bench.answer(change), Some(&Ok(())));
    let live = |bench: &Bench| -> Vec<bool> {
        bench
            .volume
            .peers()
            .iter()
            .map(|peer| peer.is_live())
            .collect()
    };
    assert_eq!(live(&bench), [true, false, true]);
    // Nobody is there: nothing is answered, and nothing is sent.
    bench.said.clear();
    bench.follow(1);
    let heard = bench.said.iter().any(|action| {
        matches!(
            action,
            Action::Peer {
                peer: PeerId(1),
                ..
            } | Action::Ship {
                peer: PeerId(1),
                ..
            }
        )
    });
    assert!(!heard, "{:?}", bench.said);
    let change = bench.change(&[KEPT, NEW, KEPT, NEW], false);
    assert_eq!(bench.answer(change), Some(&Ok(())));
    assert_eq!(live(&bench), [true, false, true, false]);
    bench.follow(3);
    assert_eq!(live(&bench), [true, false, true, true]);
    let change = bench.change(&[KEPT, KEPT, KEPT, KEPT, KEPT], false);
    assert!(
        bench.answer(change).is_some_and(Result::is_err),
        "nobody is at 4"
    );
}

#[test]
fn the_claim_of_a_removed_peer_on_the_log_goes_with_it() {
    let mut bench = Bench::new(AckMode::Async, 0, 2);
    bench.follow(1);
    let round = |bench: &mut Bench| {
        let flush = bench.write_and_flush();
        bench.acknowledge(1);
        assert_eq!(bench.answer(flush), Some(&Ok(())));
        let drain = bench.control(Control::Drain);
        assert_eq!(bench.answer(drain), Some(&Ok(())));
    };
    for _ in 0..4 {
        round(&mut bench);
    }
    assert_eq!(bench.volume.superblock().copy, CopyState::Usable);
    assert_eq!(
        bench.volume.superblock().retained,
        Epoch(0),
        "peer 0 is away"
    );
    let change = bench.change(&[Place::Empty, KEPT], false);
    assert_eq!(bench.answer(change), Some(&Ok(())));
    for _ in 0..2 {
        round(&mut bench);
    }
    assert!(bench.volume.superblock().retained >= Epoch(4));
}

#[test]
fn a_node_that_is_primary_no_more_lets_nobody_go() {
    let demoted = |bench: &mut Bench| {
        let demote = bench.control(Control::Demote);
        assert_eq!(bench.answer(demote), Some(&Ok(())));
    };
    let fenced = |bench: &mut Bench| {
        let term = Term {
            counter: 9,
            node: NodeId([2; 16]),
        };
        bench.peer(1, PeerEvent::HigherTerm(term));
    };
    let ways: [&dyn Fn(&mut Bench); 2] = [&demoted, &fenced];
    for way in ways {
        let mut bench = Bench::new(AckMode::Durable, 1, 2);
        bench.follow(0);
        bench.follow(1);
        let flush = bench.write_and_flush();
        bench.acknowledge(0);
        assert_eq!(bench.answer(flush), Some(&Ok(())));
        // Only the peer that leaves has it.
        let change = bench.change(&[Place::Empty, KEPT], false);
        assert_eq!(bench.answer(change), None);
        way(&mut bench);
        let refused = bench.answer(change).cloned().expect("an answer");
        assert!(refused.is_err_and(|why| why.contains("not primary any more")));
    }
}

#[test]
fn what_keeps_a_copy_from_following_is_said_again_when_another_peer_is_removed() {
    let mut bench = Bench::open(Role::Replica, (AckMode::Async, 0), 2);
    bench.peer(0, PeerEvent::Connected);
    bench.peer(1, PeerEvent::Connected);
    bench.peer(0, PeerEvent::Diverged(Epoch(3)));
    assert!(bench.volume.obstacle().is_some());
    let change = bench.change(&[KEPT, Place::Empty], false);
    assert_eq!(bench.answer(change), Some(&Ok(())));
    assert!(bench.volume.obstacle().is_some() || bench.was_closed(0));
}

#[test]
fn writers_that_a_peer_holds_back_go_on_at_once_when_it_is_removed() {
    let mut bench = Bench::new(AckMode::Async, 0, 2);
    let bounded = |places: [Place; 2]| {
        places.map(|place| match place {
            Place::Kept(lag) => Place::Kept(LagPolicy {
                max_bytes: Some(1 << 16),
                ..lag
            }),
            place => place,
        })
    };
    let change = bench.change(&bounded([KEPT, KEPT]), false);
    assert_eq!(bench.answer(change), Some(&Ok(())));
    bench.follow(1);
    let write = |bench: &mut Bench| {
        bench.write_and_flush();
        bench.acknowledge(1);
    };
    (0..20).for_each(|_| write(&mut bench));
    assert!(!bench.volume.admits_now(1), "the other one is far behind");
    let change = bench.change(&bounded([Place::Empty, KEPT]), false);
    assert_eq!(bench.answer(change), Some(&Ok(())));
    assert!(bench.volume.admits_now(1));
}

#[test]
fn a_peer_that_was_detached_counts_again_when_its_bound_is_taken_away() {
    let mut bench = Bench::new(AckMode::Durable, 1, 1);
    let detach = Place::Kept(LagPolicy {
        max_bytes: Some(1 << 16),
        max_ms: None,
        on_exceed: OnExceed::Detach,
    });
    let change = bench.change(&[detach], true);
    assert_eq!(bench.answer(change), Some(&Ok(())));
    bench.follow(0);
    (0..20).for_each(|_| _ = bench.write_and_flush());
    let state = |bench: &Bench| bench.volume.peers()[0].lag_state();
    assert_eq!(state(&bench), LagState::Detached);
    let change = bench.change(&[KEPT], true);
    assert_eq!(bench.answer(change), Some(&Ok(())));
    assert_eq!(state(&bench), LagState::Within);
    bench.follow(0);
    let flush = bench.write_and_flush();
    bench.acknowledge(0);
    assert_eq!(bench.answer(flush), Some(&Ok(())));
}

#[test]
fn what_kept_a_copy_from_following_is_over_when_a_primary_goes_on_with_its_log() {
    let mut bench = Bench::open(Role::Replica, (AckMode::Async, 0), 2);
    bench.peer(0, PeerEvent::Connected);
    bench.peer(0, PeerEvent::Diverged(Epoch(3)));
    assert!(bench.volume.obstacle().is_some());
    bench.peer(1, PeerEvent::Connected);
    bench.peer(1, PeerEvent::FeedOpened(Epoch(7)));
    assert!(bench.volume.obstacle().is_some(), "not behind what is here");
    bench.peer(1, PeerEvent::FeedOpened(Epoch(1)));
    assert_eq!(bench.volume.obstacle(), None);
}

#[test]
fn a_volume_that_went_on_without_peers_waits_for_them_again_although_its_clients_never_pause() {
    let mut bench = Bench::degrading();
    bench.follow(0);
    let flush = bench.write_and_flush();
    bench.pass(60_000);
    assert_eq!(bench.answer(flush), Some(&Ok(())));
    assert!(bench.volume.is_degraded());
    // It is there again, and never has all that is here.
    for round in 0..5 {
        let behind = bench.volume.tip().epoch;
        let flush = bench.write_and_flush();
        assert_eq!(
            bench.answer(flush).is_some(),
            round == 0,
            "waited for again"
        );
        bench.acknowledge_to(0, behind);
        bench.pass(10);
        assert_eq!(bench.volume.is_degraded(), round == 0);
    }
}

#[test]
fn room_that_a_peer_holds_up_is_made_without_it() {
    let mut bench = Bench::degrading();
    bench.follow(0);
    // The peer takes everything and has nothing durable: nobody asks for that, so nobody waits.
    for _ in 0..400 {
        let write = bench.write();
        bench.pass(1);
        bench.progress(0, bench.volume.tip().epoch, Epoch(0));
        assert_eq!(bench.answer(write), Some(&Ok(())));
    }
    let applied = |bench: &Bench| bench.volume.copy_status().progress.applied;
    assert_eq!((applied(&bench), bench.volume.waiting()), (Epoch(0), 0));
    let timer = bench.volume.next_deadline().expect("it goes on by itself");
    assert!(timer <= Time(60_000 * 1_000_000));
    bench.pass(60_000);
    assert!(bench.volume.is_degraded() && applied(&bench) > Epoch(0));
}

#[test]
fn what_was_acknowledged_without_peers_is_told_until_they_have_it() {
    let mut bench = Bench::degrading();
    bench.follow(0);
    bench.write_and_flush();
    bench.pass(60_000);
    // A minute old: the peer is far behind, and nobody waits for it.
    let flush = bench.write_and_flush();
    assert!(bench.answer(flush).is_some() && bench.volume.is_degraded());
    bench.acknowledge_to(0, Epoch(1));
    let flush = bench.write_and_flush();
    assert!(bench.answer(flush).is_none(), "near");
    assert!(
        bench.volume.is_degraded(),
        "but what was acknowledged is not there yet"
    );
    bench.acknowledge(0);
    assert!(bench.answer(flush).is_some() && !bench.volume.is_degraded());
}

#[test]
fn a_prover_that_comes_back_to_another_history_begins_with_the_log() {
    let mut bench = Bench::open_with(Role::Primary, |config| VolumeConfig {
        prove: true,
        ..config
    });
    bench.write_and_flush();
    bench.write_and_flush();
    let here = bench.volume.tip();
    let elsewhere = Tip {
        chain: ChainHash([9; 32]),
        ..here
    };
    for (after, begins) in [(elsewhere, Tip::default()), (here, here)] {
        let start = ProofEvent::Start {
            after,
            credit: 1 << 20,
        };
        bench.step(Event::Proof(start));
        assert!(bench.said.contains(&Action::ProofCut(begins)));
        assert_eq!(bench.volume.proven(), begins);
    }
}
