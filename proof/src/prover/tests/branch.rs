//! What may take the place of records that a replica holds: a branch that keys sign whose right has
//! not ended.

use super::keys::{bodies, rotating};
use super::*;
use crate::ledger::{Event, Note, Record as LedgerRecord};
use crate::prover::message::Message;

fn ledger_cut(prover: &Prover<MemoryMedium>, records: u64) -> MemoryMedium {
    let medium = prover.ledger().medium().clone();
    let mut ledger = LedgerFile::open(medium, identity().volume).unwrap().0;
    ledger.cut(records).unwrap();
    let mut medium = ledger.medium().clone();
    medium.aside.clear();
    medium
}

fn anchor_all(pair: &mut Pair, log: &Log, at: u64) {
    log.feed(&mut pair.primary, at);
    log.feed(&mut pair.replica, at);
    pair.primary.tick(now(at + 60)).unwrap();
    pair.settle();
}

/// Node 1 has changed its key after epoch 1, and the replica knows.
fn rotated() -> (Pair, Log) {
    let mut pair = Pair::new();
    let mut log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    pair.primary.set_keys(now(100), rotating(1, 11)).unwrap();
    log.write(2);
    anchor_all(&mut pair, &log, 200);
    assert_eq!(pair.heard[1].proven, Epoch(2));
    assert!(matches!(bodies(&pair.replica)[3], Body::Key(_)));
    (pair, log)
}

/// Somebody who has node 1's old key, and the ledger as far as that key was good.
fn thief(pair: &mut Pair, log: &Log, counter: u64) {
    pair.primary = open(1, ledger_cut(&pair.primary, 3));
    pair.primary
        .standing(now(300), Some(term(counter, 1)))
        .unwrap();
    let (epoch, chain, _) = log.frames[0];
    pair.primary.cut(now(300), epoch, chain).unwrap();
    log.feed(&mut pair.primary, 300);
    pair.primary.tick(now(400)).unwrap();
    assert_eq!(pair.primary.anchored(), Some(log.tip().0));
    let _ = drain(&mut pair.primary, &mut pair.heard[0]);
}

/// The old primary comes back and follows the one that was promoted.
fn fail_over(mut pair: Pair, at: u64) -> Pair {
    let _ = drain(&mut pair.primary, &mut pair.heard[0]);
    for prover in [&mut pair.primary, &mut pair.replica] {
        prover.disconnected(0);
    }
    let mut pair = Pair {
        primary: pair.replica,
        replica: pair.primary,
        heard: Default::default(),
    };
    pair.replica.standing(now(at), None).unwrap();
    pair.primary.standing(now(at), Some(term(2, 2))).unwrap();
    pair.primary.tick(now(at + 60)).unwrap();
    pair
}

/// The primary anchors and changes keys by itself, unheard.
fn part(pair: &mut Pair) {
    for prover in [&mut pair.primary, &mut pair.replica] {
        prover.disconnected(0);
    }
}

#[test]
fn a_retired_key_cannot_supersede_the_record_that_retired_it() {
    let (mut pair, log) = rotated();
    let before = pair.replica.ledger().medium().clone();
    thief(&mut pair, &log, 2);
    pair.connect(term(2, 1));
    pair.settle();
    let why = pair.heard[1].refused.as_deref().unwrap_or_default();
    let key = key(1).public().id();
    assert!(why.contains("record 3"), "{why}");
    assert!(why.contains(&format!("key {key}")), "{why}");
    assert_eq!(pair.replica.ledger().medium(), &before);
}

#[test]
fn what_is_not_signed_supersedes_nothing() {
    let (mut pair, _) = rotated();
    let before = pair.replica.ledger().medium().clone();
    pair.connect(term(2, 1));
    let _ = drain(&mut pair.replica, &mut pair.heard[1]);
    let note = Body::Note(Note {
        event: Event::Promoted,
        epoch: Epoch(1),
        lba: Lba(0),
        sectors: 0,
        digest: Digest::ZERO,
        text: String::new(),
    });
    let previous = pair.replica.ledger().hash_of(2).unwrap().unwrap();
    let records = Message::Records {
        header: *pair.replica.ledger().header().unwrap(),
        first: 3,
        bytes: LedgerRecord::encode(3, 0, &previous, &note),
    };
    pair.replica.message(now(0), 0, &records.encode()).unwrap();
    let _ = drain(&mut pair.replica, &mut pair.heard[1]);
    let why = pair.heard[1].refused.as_deref().unwrap_or_default();
    assert!(why.contains("not signed"), "{why}");
    assert_eq!(pair.replica.ledger().medium(), &before);
}

#[test]
fn a_new_ledger_is_looked_at_before_the_old_one_is_set_aside() {
    let mut pair = Pair::new();
    anchor_all(&mut pair, &log_of(&[1]), 0);
    let before = pair.replica.ledger().medium().clone();
    pair.connect(term(2, 1));
    let _ = drain(&mut pair.replica, &mut pair.heard[1]);
    let mut header = *pair.replica.ledger().header().unwrap();
    header.created_ms += 1;
    // Its first record names another header.
    let records = Message::Records {
        header,
        first: 0,
        bytes: pair.primary.ledger().read(0, 1).unwrap(),
    };
    pair.replica.message(now(0), 0, &records.encode()).unwrap();
    let _ = drain(&mut pair.replica, &mut pair.heard[1]);
    assert!(pair.heard[1].refused.is_some());
    assert_eq!(pair.replica.ledger().medium(), &before);
}

#[test]
fn a_ledger_begun_anew_in_the_same_term_is_taken_whatever_the_clock_says() {
    let mut pair = Pair::new();
    let mut log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    let (epoch, chain) = (Epoch(1), log.frames[0].1);
    pair.primary = open(1, MemoryMedium::default());
    let earlier = Now {
        wall_ms: now(0).wall_ms - 86_400_000,
        ..now(200)
    };
    pair.primary.standing(earlier, Some(term(1, 1))).unwrap();
    pair.primary.cut(earlier, epoch, chain).unwrap();
    pair.connect(term(1, 1));
    log.write(2);
    anchor_all(&mut pair, &log, 200);
    assert_eq!(pair.heard[1].refused, None);
    assert_eq!(pair.heard[1].proven, Epoch(2));
    assert_eq!(pair.replica.ledger().medium().aside.len(), 1);
}

#[test]
fn an_unheard_rotation_gives_way_and_the_new_key_is_enrolled_again() {
    let mut pair = Pair::new();
    let log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    part(&mut pair);
    pair.primary.set_keys(now(100), rotating(1, 11)).unwrap();
    let mut pair = fail_over(pair, 200);
    let mut log = log;
    log.write(2);
    log.feed(&mut pair.primary, 300);
    log.feed(&mut pair.replica, 300);
    pair.primary.tick(now(400)).unwrap();
    pair.connect(term(2, 2));
    pair.settle();
    assert_eq!(pair.heard[1].refused, None);
    assert_eq!(pair.heard[1].proven, Epoch(2));
    assert_eq!(pair.replica.ledger().medium().aside.len(), 1);
    let [old, new] = [1, 11].map(|seed| key(seed).public().id());
    for prover in [&pair.primary, &pair.replica] {
        let ring = prover.tip.as_ref().unwrap().keyring();
        assert!(ring.may_sign(new, node(1)), "node {:?}", prover.node);
        assert!(ring.retired_at(old).is_some());
    }
    // A failback goes on with the ledger.
    let (mut back, aside) = (pair.replica, pair.primary.ledger().records());
    back.standing(now(500), Some(term(3, 1))).unwrap();
    assert_eq!(back.ledger().medium().aside.len(), 1);
    assert!(back.ledger().records() >= aside);
}

#[test]
fn a_key_that_a_branch_brings_back_signs_nothing_of_what_came_with_it() {
    let mut pair = Pair::new();
    let mut log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    part(&mut pair);
    pair.primary.set_keys(now(100), rotating(1, 11)).unwrap();
    log.write(2);
    log.feed(&mut pair.replica, 150);
    let mut pair = fail_over(pair, 200);
    // Node 1's old key continues what node 2 has signed, and both arrive together.
    let promoted = pair.primary.ledger().medium().clone();
    let at = pair.primary.ledger().records();
    pair.primary = open(1, promoted);
    pair.primary.standing(now(300), Some(term(3, 1))).unwrap();
    let (epoch, chain) = log.tip();
    pair.primary.cut(now(300), epoch, chain).unwrap();
    log.write(3);
    log.feed(&mut pair.primary, 300);
    log.feed(&mut pair.replica, 300);
    pair.primary.tick(now(400)).unwrap();
    assert_eq!(pair.primary.ledger().records(), at + 1);
    pair.connect(term(3, 1));
    pair.settle();
    let why = pair.heard[1].refused.as_deref().unwrap_or_default();
    assert!(why.contains(&format!("record {at}")), "{why}");
    assert_eq!(pair.heard[1].proven, Epoch(2), "node 2 signed that");
}

#[test]
fn a_replica_s_new_key_that_it_never_heard_of_is_enrolled_by_its_old_one() {
    let mut pair = Pair::new();
    let log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    pair.replica.set_keys(now(100), rotating(2, 12)).unwrap();
    for offer in drain(&mut pair.replica, &mut pair.heard[1]) {
        pair.primary.message(now(100), 0, &offer).unwrap();
    }
    let ring = pair.primary.tip.as_ref().unwrap().keyring();
    assert!(ring.retired_at(key(2).public().id()).is_some());
    // The answer is lost with the primary.
    let mut pair = fail_over(pair, 200);
    pair.connect(term(2, 2));
    pair.settle();
    assert_eq!(pair.heard[1].refused, None);
    let ledgers = [&pair.primary, &pair.replica].map(|node| node.ledger().medium().bytes.clone());
    assert_eq!(ledgers[0], ledgers[1]);
    assert_eq!(pair.primary.active_keys(), [key(12).public().id()]);
}

#[test]
fn an_anchor_of_what_was_anchored_before_names_the_same_last_epoch() {
    for byte in [2, 9] {
        let mut pair = Pair::new();
        let log = log_of(&[1, 2]);
        pair.settle();
        part(&mut pair);
        log.feed(&mut pair.primary, 0);
        pair.primary.tick(now(60)).unwrap();
        assert_eq!(pair.primary.anchored(), Some(Epoch(2)));
        // Node 2 signs another epoch 2, or the same.
        log_of(&[1, byte]).feed(&mut pair.replica, 0);
        let mut pair = fail_over(pair, 200);
        pair.connect(term(2, 2));
        pair.settle();
        let why = pair.heard[1].refused.as_deref();
        assert_eq!(why.is_none(), byte == 2, "{why:?}");
        assert!(why.is_none_or(|why| why.contains("chain of frame headers")));
    }
}
