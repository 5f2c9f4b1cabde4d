//! A primary that was replaced: until when what it has is its own.

use hn4::log::{Role, Superblock};
use hn4::types::{ChainHash, Epoch, Incarnation, LogOffset, NodeId, Rank, Term};
use hn4_engine::core::event::{Control, Fork, PeerEvent, PeerState, ProofEvent, SeedOrigin, Tip};
use hn4_engine::core::{AckMode, Action, Event, VolumeConfig};

use crate::peers::{Bench, WITHIN_MS};

/// The end of a log that others have.
const AHEAD: Tip = Tip {
    epoch: Epoch(30),
    chain: ChainHash([3; 32]),
};

fn term(counter: u64) -> Term {
    let node = u8::try_from(counter).expect("a small one");
    Term {
        counter,
        node: NodeId([node; 16]),
    }
}

/// A primary that has written something nobody else has, was replaced, and has come back.
fn replaced() -> Bench {
    let mut bench = Bench::open_with(Role::Primary, |config| VolumeConfig {
        ack_mode: AckMode::Durable,
        ack_peers: 1,
        peers: 2,
        shadow_space_bytes: 1 << 20,
        prove: true,
        ..config
    });
    bench.write_and_flush();
    bench.peer(0, PeerEvent::HigherTerm(term(8)));
    let demote = bench.control(Control::Demote);
    assert_eq!(bench.answer(demote), Some(&Ok(())));
    assert!(record(&bench).own_tail);
    assert!(bench.volume.tip().epoch > record(&bench).checkpoint);
    bench
}

fn record(bench: &Bench) -> Superblock {
    *bench.volume.superblock()
}

/// A peer connects and says that it has more than we have.
fn meets(bench: &mut Bench, place: u8, role: Role, of: Term) {
    bench.peer(place, PeerEvent::Connected);
    let state = PeerState {
        role,
        term: of,
        incarnation: Incarnation(1),
        tip: AHEAD,
        tip_rank: Rank {
            term: 8,
            incarnation: Incarnation(1),
        },
        usable: true,
        resyncs: false,
        is_filled: false,
    };
    bench.peer(place, PeerEvent::State(state));
}

/// Another primary, whose promotion accepted a loss, has nothing of ours: what is saved of it.
fn is_cut_back(bench: &mut Bench) -> Option<Fork> {
    bench.peer(1, PeerEvent::HigherTerm(term(10)));
    meets(bench, 1, Role::Primary, term(10));
    bench.said.clear();
    let anchored = bench.volume.copy_status().anchored;
    bench.peer(1, PeerEvent::Truncate(anchored));
    bench.said.iter().find_map(|action| match action {
        Action::SaveFork(fork) => Some(*fork),
        _ => None,
    })
}

/// The first primary's word on what it has came, and that ours is a part of it did not.
#[test]
fn an_own_tail_is_saved_until_it_is_anchored() {
    let mut bench = replaced();
    let tip = bench.volume.tip();
    meets(&mut bench, 0, Role::Primary, term(8));
    bench.peer(0, PeerEvent::Anchored(AHEAD));
    assert!(bench.volume.copy_status().anchored.epoch < tip.epoch);
    let fork = is_cut_back(&mut bench).expect("it is saved");
    assert!(fork.after.epoch < tip.epoch);
    assert_eq!(bench.volume.tip(), tip, "until it is, it stays");
}

#[test]
fn from_the_record_on_that_lets_an_own_tail_go_no_restart_finds_it_loose() {
    let mut bench = replaced();
    let tip = bench.volume.tip();
    meets(&mut bench, 0, Role::Primary, term(8));
    bench.peer(0, PeerEvent::Anchored(AHEAD));
    bench.under_way = Some(Vec::new());
    bench.peer(0, PeerEvent::FeedOpened(tip.epoch.next()));
    assert_eq!(bench.volume.copy_status().anchored, tip);
    assert!(record(&bench).own_tail, "it is being written");
    // Nothing else has been written since, a sweep neither.
    let done = bench.under_way.replace(Vec::new()).expect("held");
    assert_eq!(done.len(), 1);
    done.into_iter().for_each(|done| bench.step(done));
    let record = record(&bench);
    assert!(!record.own_tail && record.checkpoint < tip.epoch);
    assert_eq!(record.swept, tip.epoch, "recovery takes it for anchored");
}

/// A promotion pulls from a replica, which saves nothing itself; then it is overtaken.
#[test]
fn a_replica_that_has_more_does_not_confirm_an_own_tail() {
    let mut bench = replaced();
    let promote = bench.control(Control::Promote {
        term: term(9),
        answers: 2,
        within_ms: WITHIN_MS,
    });
    bench.peer(0, PeerEvent::Disconnected);
    meets(&mut bench, 0, Role::Replica, term(9));
    let anchored = bench.volume.copy_status().anchored;
    bench.peer(0, PeerEvent::FeedOpened(bench.volume.tip().epoch.next()));
    bench.peer(0, PeerEvent::Anchored(anchored));
    let fork = is_cut_back(&mut bench);
    assert!(bench.answer(promote).is_some_and(Result::is_err));
    assert!(fork.is_some(), "it is saved");
}

/// The prover begins, and finds that a peer has signed another history than ours.
fn is_refused(bench: &mut Bench) {
    let start = ProofEvent::Start {
        after: Tip::default(),
        credit: 1 << 20,
    };
    bench.step(Event::Proof(start));
    let refused = ProofEvent::Refused {
        why: "another history".to_owned(),
        of: Some(bench.volume.tip()),
    };
    bench.step(Event::Proof(refused));
}

#[test]
fn no_proof_cuts_off_an_own_tail() {
    let mut bench = replaced();
    let tip = bench.volume.tip();
    meets(&mut bench, 0, Role::Primary, term(8));
    bench.peer(0, PeerEvent::FeedOpened(tip.epoch.next()));
    is_refused(&mut bench);
    assert_eq!(bench.volume.tip(), tip);
}

/// A copy of another history is under way when this one is chosen.
#[test]
fn no_proof_of_a_superseded_primary_cuts_off_what_is_promoted() {
    let mut bench = replaced();
    let tip = bench.volume.tip();
    meets(&mut bench, 0, Role::Primary, term(8));
    bench.peer(0, PeerEvent::Diverged(Epoch(0)));
    let origin = SeedOrigin {
        from: AHEAD,
        log_offset: LogOffset(1 << 20),
        cursor_bytes: 0,
    };
    bench.peer(0, PeerEvent::SeedStart(origin));
    assert!(record(&bench).copy.is_shadowed());
    bench.control(Control::Promote {
        term: term(9),
        answers: 1,
        within_ms: WITHIN_MS,
    });
    assert_eq!(record(&bench).term, term(9));
    is_refused(&mut bench);
    assert_eq!(bench.volume.tip(), tip);
    assert_eq!(bench.volume.obstacle(), None, "what it signed is not ours");
}
