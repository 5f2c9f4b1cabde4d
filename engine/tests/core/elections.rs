//! Promotions: who promises, who is waited for, and what does not happen meanwhile.

use hn4::log::Role;
use hn4::types::{ChainHash, Epoch, Incarnation, NodeId, Rank, Term};
use hn4_engine::core::event::{
    Control, PeerEvent, PeerMessage, PeerState, ProofEvent, Request, RequestId, Tip,
};
use hn4_engine::core::{AckMode, Action, Event, VolumeConfig};

use crate::peers::{Bench, KEPT, WITHIN_MS};
use crate::recovery::{EPOCHS, logged};

#[test]
fn peers_do_not_change_in_the_middle_of_an_election() {
    let mut bench = Bench::new(AckMode::Async, 0, 2);
    let demote = bench.control(Control::Demote);
    assert_eq!(bench.answer(demote), Some(&Ok(())));
    bench.follow(0);
    let promote = bench.control(Control::Promote {
        term: Term {
            counter: 2,
            node: NodeId([1; 16]),
        },
        answers: 2,
        within_ms: WITHIN_MS,
    });
    assert_eq!(bench.answer(promote), None);
    let change = bench.change(&[KEPT], false);
    let refused = bench.answer(change).cloned().expect("an answer");
    assert!(refused.is_err_and(|why| why.contains("change of role")));
}

/// Writes are refused from the demotion on, and its end is up to peers that may never come.
#[test]
fn a_demotion_that_waits_for_peers_is_given_up_and_the_primary_goes_on() {
    let mut bench = Bench::new(AckMode::Durable, 1, 1);
    bench.write_and_flush();
    let demote = bench.control(Control::Demote);
    bench.pass(29_000);
    assert_eq!(bench.answer(demote), None);
    assert!(bench.volume.accepts_writes().is_err());
    let deadline = bench.volume.next_deadline();
    assert!(deadline.is_some(), "the shard comes back by itself");
    bench.pass(1_001);
    let refused = bench.answer(demote).cloned().expect("an answer");
    assert!(refused.is_err_and(|why| why.contains("not on enough peers")));
    assert_eq!(bench.volume.accepts_writes(), Ok(()));
    // When the peer is back the next one succeeds.
    bench.follow(0);
    bench.acknowledge(0);
    let demote = bench.control(Control::Demote);
    assert_eq!(bench.answer(demote), Some(&Ok(())));
}

/// A client that wrote while this node was primary is still connected, and flushes.
#[test]
fn a_flush_after_a_node_was_superseded_fails_also_if_all_was_destaged_and_after_a_demotion_not() {
    for superseded in [true, false] {
        let mut bench = Bench::new(AckMode::Durable, 1, 1);
        bench.follow(0);
        let flush = bench.write_and_flush();
        bench.acknowledge(0);
        assert_eq!(bench.answer(flush), Some(&Ok(())));
        bench.pass(10);
        let status = bench.volume.copy_status();
        assert_eq!(
            status.progress.applied, status.tip.epoch,
            "it is in the backing"
        );
        if superseded {
            let term = Term {
                counter: 9,
                node: NodeId([2; 16]),
            };
            bench.peer(0, PeerEvent::HigherTerm(term));
        }
        let demote = bench.control(Control::Demote);
        assert_eq!(bench.answer(demote), Some(&Ok(())));
        assert_eq!(bench.volume.role(), Role::Replica);
        let id = RequestId(1000);
        let request = Request::Flush;
        bench.step(Event::Request { id, request });
        let failed = bench.answer(id).expect("an answer").is_err();
        assert_eq!(failed, superseded);
    }
}

/// Whether a client that is still connected is told that its flush is done.
fn flush_succeeds(bench: &mut Bench, id: u64) -> bool {
    let id = RequestId(id);
    let request = Request::Flush;
    bench.step(Event::Request { id, request });
    bench.answer(id).expect("an answer").is_ok()
}

/// What it wrote is safe, and it is a replica now.
fn demoted() -> Bench {
    let mut bench = Bench::new(AckMode::Durable, 1, 1);
    bench.follow(0);
    let flush = bench.write_and_flush();
    bench.acknowledge(0);
    assert_eq!(bench.answer(flush), Some(&Ok(())));
    let demote = bench.control(Control::Demote);
    assert_eq!(bench.answer(demote), Some(&Ok(())));
    assert!(flush_succeeds(&mut bench, 1000));
    bench
}

/// Nobody has said yet that the primary of the higher term has what this node wrote.
#[test]
fn a_flush_after_a_demotion_fails_when_somebody_else_has_been_promoted() {
    let mut bench = demoted();
    let term = Term {
        counter: 9,
        node: NodeId([2; 16]),
    };
    bench.peer(0, PeerEvent::HigherTerm(term));
    assert!(!flush_succeeds(&mut bench, 1001));
}

/// A primary has said that its history is another one, whatever its term is.
#[test]
fn a_flush_after_a_demotion_fails_when_the_histories_have_parted() {
    let mut bench = demoted();
    bench.peer(0, PeerEvent::Disconnected);
    bench.peer(0, PeerEvent::Connected);
    bench.peer(0, PeerEvent::Diverged(Epoch(3)));
    assert!(!flush_succeeds(&mut bench, 1001));
}

#[test]
fn a_promise_that_is_being_written_is_not_taken_back_by_a_promotion() {
    let mut bench = Bench::open(Role::Replica, (AckMode::Durable, 1), 2);
    let term = |counter, node| Term {
        counter,
        node: NodeId([node; 16]),
    };
    bench.under_way = Some(Vec::new());
    bench.peer(0, PeerEvent::HigherTerm(term(5, 9)));
    let promote = Control::Promote {
        term: term(5, 1),
        answers: 0,
        within_ms: 1000,
    };
    let promote = bench.control(promote);
    let refused = bench.answer(promote).cloned();
    assert!(matches!(refused, Some(Err(_))), "{refused:?}");
    for done in bench.under_way.take().expect("held") {
        bench.step(done);
    }
    assert_eq!(bench.volume.copy_status().term, term(5, 9));
}

#[test]
fn nobody_is_promoted_past_a_copy_that_was_seen_to_have_more() {
    let mut bench = demoted();
    bench.peer(0, PeerEvent::Disconnected);
    let term = |counter, node| Term {
        counter,
        node: NodeId([node; 16]),
    };
    let promote = |bench: &mut Bench, counter| {
        let control = Control::Promote {
            term: term(counter, 1),
            answers: 1,
            within_ms: WITHIN_MS,
        };
        bench.control(control)
    };
    let more = |obeyed| PeerState {
        role: Role::Replica,
        term: obeyed,
        incarnation: Incarnation(0),
        tip: Tip {
            epoch: Epoch(30),
            chain: ChainHash([3; 32]),
        },
        tip_rank: Rank {
            term: 2,
            incarnation: Incarnation(1),
        },
        usable: true,
        resyncs: false,
        is_filled: false,
    };
    bench.under_way = Some(Vec::new());
    let refused = promote(&mut bench, 3);
    bench.peer(0, PeerEvent::Connected);
    bench.peer(0, PeerEvent::State(more(term(2, 4))));
    for done in bench.under_way.take().expect("held") {
        bench.step(done);
    }
    // Its session ends with the new term, and it does not come back.
    bench.peer(0, PeerEvent::Disconnected);
    assert_eq!(bench.answer(refused), None);
    bench.pass(WITHIN_MS + 1);
    let why = bench.answer(refused).cloned().expect("an answer");
    assert!(why.is_err_and(|why| why.contains("longer history")));
    // It promises: what it has is asked for.
    bench.peer(0, PeerEvent::Connected);
    bench.peer(0, PeerEvent::State(more(term(3, 1))));
    let pulls = promote(&mut bench, 4);
    bench.peer(0, PeerEvent::Disconnected);
    bench.peer(0, PeerEvent::Connected);
    bench.peer(0, PeerEvent::State(more(term(4, 1))));
    assert_eq!(bench.answer(pulls), None);
    let pulled = |action: &Action| {
        let Action::Peer { message, .. } = action else {
            return false;
        };
        matches!(message, PeerMessage::Pull { .. })
    };
    assert!(bench.said.iter().any(pulled), "{:?}", bench.said);
}

/// A primary that opens: it has pulled an epoch from its first peer, which is on its way to the
/// log. With where its own log ended.
fn pulling(peers: usize, open_answers: usize) -> (Bench, Tip) {
    let (mut log, _) = logged();
    let config = |peers: usize, open_answers: usize| {
        move |config| VolumeConfig {
            peers,
            open_answers,
            prove: true,
            destage_delay_ms: 3_600_000,
            ..config
        }
    };
    let mut earlier = Bench::on(&mut log.clone(), config(1, 0));
    let end = earlier.volume.tip();
    earlier.under_way = Some(Vec::new());
    earlier.pass(0);
    let tip = earlier.volume.tip();
    assert_eq!(tip.epoch, end.epoch.next(), "it marks its opening");
    let frame = earlier.volume.frame_bytes(tip.epoch, &earlier.mem);
    let mut bench = Bench::on(&mut log, config(peers, open_answers));
    assert!(bench.volume.is_opening());
    bench.step(Event::Proof(ProofEvent::Start {
        after: end,
        credit: 1 << 20,
    }));
    bench.under_way = Some(Vec::new());
    connect(&mut bench, 0, (tip, 2));
    bench.peer(0, PeerEvent::FeedOpened(tip.epoch));
    bench.peer(0, PeerEvent::Epoch(frame.expect("it is in memory")));
    assert_eq!(bench.volume.tip(), tip);
    (bench, end)
}

/// A replica whose log ends there, as a primary of that incarnation left it.
fn connect(bench: &mut Bench, peer: u8, (tip, incarnation): (Tip, u32)) {
    let term = bench.volume.copy_status().term;
    bench.peer(peer, PeerEvent::Connected);
    let state = PeerState {
        role: Role::Replica,
        term,
        incarnation: Incarnation(0),
        tip,
        tip_rank: Rank {
            term: term.counter,
            incarnation: Incarnation(incarnation),
        },
        usable: true,
        resyncs: false,
        is_filled: false,
    };
    bench.peer(peer, PeerEvent::State(state));
}

/// Another peer, of a later opening, says that what was pulled is not how the history went on.
fn cutting_back() -> Bench {
    let (mut bench, end) = pulling(3, 1);
    let tip = bench.volume.tip();
    let later = Tip {
        epoch: tip.epoch.next(),
        chain: ChainHash([9; 32]),
    };
    connect(&mut bench, 1, (later, 3));
    bench.peer(1, PeerEvent::Truncate(end));
    connect(&mut bench, 2, (end, 1));
    assert_eq!(bench.volume.tip(), tip, "it is still being written");
    bench
}

fn finish_one(bench: &mut Bench) {
    let under_way = bench.under_way.as_mut().expect("operations take a while");
    let done = under_way.remove(0);
    bench.step(done);
}

/// After a crash a frame of the new session would be taken for damage of what it has replaced.
#[test]
fn an_opening_primary_seals_nothing_before_it_is_recorded_that_its_log_was_cut_back() {
    let mut bench = cutting_back();
    bench.peer(0, PeerEvent::Disconnected);
    bench.peer(1, PeerEvent::Disconnected);
    finish_one(&mut bench);
    assert_eq!(bench.volume.tip().epoch, Epoch(EPOCHS as u64));
    assert!(bench.volume.is_opening());
    finish_one(&mut bench);
    assert!(!bench.volume.is_opening());
    assert_eq!(bench.volume.tip().epoch, Epoch(EPOCHS as u64 + 1));
}

fn accept_loss(bench: &mut Bench) {
    let open = bench.control(Control::Promote {
        term: Term::default(),
        answers: 0,
        within_ms: 0,
    });
    assert_eq!(bench.answer(open), Some(&Ok(())));
}

/// Somebody accepts that what others have is lost, not what this node has.
#[test]
fn an_opening_that_is_to_go_on_alone_cuts_nothing_back() {
    // The cut was asked for before, also by a peer that is gone, or comes too late.
    for order in ["before", "gone", "after"] {
        let mut bench = match order {
            "after" => pulling(2, 2).0,
            _ => cutting_back(),
        };
        let pulled = bench.volume.tip();
        if order == "gone" {
            bench.peer(1, PeerEvent::Disconnected);
        }
        accept_loss(&mut bench);
        if order == "after" {
            let (_, end) = pulling(2, 2);
            bench.peer(0, PeerEvent::Truncate(end));
        }
        finish_one(&mut bench);
        assert!(!bench.volume.is_opening(), "{order}");
        let knows = order == "gone";
        assert_eq!(bench.volume.opened_alone(), !knows, "{order}");
        assert_eq!(bench.volume.tip().epoch, pulled.epoch.next(), "{order}");
        assert_eq!(bench.volume.copy_status().anchored, pulled, "{order}");
    }
}

/// What was pulled may give way to what a peer has that was not heard of yet.
#[test]
fn an_opening_primary_has_nothing_signed_that_it_has_pulled_until_it_is_chosen() {
    let (mut bench, end) = pulling(2, 2);
    let pulled = bench.volume.tip();
    finish_one(&mut bench);
    assert!(bench.volume.is_opening());
    let is_proving =
        |action: &Action| matches!(action, Action::Prove { .. } | Action::ProofRead { .. });
    assert!(!bench.said.iter().any(is_proving), "{:?}", bench.said);
    assert_eq!(bench.volume.copy_status().anchored, end);
    connect(&mut bench, 1, (end, 1));
    assert!(!bench.volume.is_opening());
    let proves =
        |action: &Action| matches!(action, Action::Prove { epoch } if *epoch == pulled.epoch);
    assert!(bench.said.iter().any(proves), "{:?}", bench.said);
}
