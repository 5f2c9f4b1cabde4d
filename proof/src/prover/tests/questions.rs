//! Questions that a replica asks more often than they are answered.

use super::*;

#[test]
fn an_answer_that_comes_twice_changes_nothing() {
    let mut pair = Pair::new();
    let log = log_of(&[1]);
    log.feed(&mut pair.replica, 0);
    log.feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    pair.settle();
    let message = message::Message::Records {
        header: *pair.primary.ledger().header().unwrap(),
        first: 0,
        bytes: pair.primary.ledger().read(0, 1 << 20).unwrap(),
    };
    let before = pair.replica.ledger().medium().clone();
    pair.replica.message(now(0), 0, &message.encode()).unwrap();
    pair.settle();
    assert_eq!(pair.replica.ledger().medium(), &before);
    assert_eq!(pair.heard[1].refused, None);
}

#[test]
fn a_late_question_does_not_take_the_place_of_the_one_that_waits() {
    let mut pair = Pair::new();
    let mut log = log_of(&[1]);
    log.feed(&mut pair.replica, 0);
    log.feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    pair.settle();
    assert_eq!(pair.heard[1].proven, Epoch(1));
    // It asked this before it got what followed; the answer holds what it has by now.
    let ledger = pair.primary.ledger().header().unwrap().hash();
    let first = pair.primary.ledger().hash_of(0).unwrap().unwrap();
    let late = message::Message::Have {
        ledger,
        places: vec![(0, first)],
    };
    pair.primary.message(now(60), 0, &late.encode()).unwrap();
    pair.settle();
    log.write(2);
    log.feed(&mut pair.replica, 70);
    log.feed(&mut pair.primary, 70);
    pair.primary.tick(now(130)).unwrap();
    pair.settle();
    assert_eq!(
        pair.heard[1].proven,
        Epoch(2),
        "it hears of the next anchor"
    );
}

#[test]
fn what_is_sent_names_the_session_in_which_it_was_asked_for() {
    let mut pair = Pair::new();
    let log = log_of(&[1]);
    log.feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    pair.settle();
    for session in [7, 8] {
        let state = PeerState {
            node: node(2),
            session,
            term: term(1, 1),
            proves: true,
            max_epoch_bytes: 1 << 20,
        };
        pair.primary.connected(0, state);
        assert_eq!(pair.primary.poll(), None, "nothing was asked in it");
        let have = message::Message::Have {
            ledger: Digest::ZERO,
            places: Vec::new(),
        };
        pair.primary.message(now(60), 0, &have.encode()).unwrap();
        let out = pair.primary.poll();
        let named = matches!(out, Some(Out::Send { session: of, .. }) if of == session);
        assert!(named, "{out:?} is for session {session}");
    }
}
