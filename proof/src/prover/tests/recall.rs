//! A primary whose ledger has lost its end, of which replicas heard.

use super::keys::{bodies, rotating};
use super::*;
use crate::checkpoint::{Checkpoint, SignedCheckpoint};
use crate::prover::message::Message;
use crate::prover::recall::PATIENCE;
use crate::sign::keyring::KeyOffer;

pub(super) const PATIENCE_MS: u64 = PATIENCE.as_secs() * 1000;

/// Node 1 has signed keys, anchors and a change of keys, and node 2 has all of it.
fn rotated() -> (Pair, Log) {
    let mut pair = Pair::new();
    let mut log = Log::default();
    for round in 0..3 {
        log.write(u8::try_from(round).unwrap());
        both(&mut pair, &log, round * 100);
    }
    pair.primary.set_keys(now(350), rotating(1, 11)).unwrap();
    pair.settle();
    assert_eq!(pair.replica.ledger().records(), 6);
    (pair, log)
}

/// Behind that, an anchor and a checkpoint.
pub(super) fn signed() -> (Pair, Log) {
    let (mut pair, mut log) = rotated();
    log.write(9);
    both(&mut pair, &log, 400);
    let root = Digest([7; 32]);
    pair.primary.state(now(500), log.tip(), root);
    pair.primary.tick(now(120_000)).unwrap();
    pair.settle();
    assert_eq!(pair.replica.ledger().records(), 8);
    (pair, log)
}

pub(super) fn both(pair: &mut Pair, log: &Log, at: u64) {
    log.feed(&mut pair.primary, at);
    log.feed(&mut pair.replica, at);
    pair.primary.tick(now(at + 60)).unwrap();
    pair.settle();
}

/// The last records of a ledger are not there any more; the last one left a trace, if it rots.
pub(super) fn without(prover: &Prover<MemoryMedium>, lost: u64, rots: bool) -> MemoryMedium {
    let mut medium = prover.ledger().medium().clone();
    let kept = prover.ledger().records() - lost;
    let tail = prover.ledger().read(kept, usize::MAX).unwrap();
    let at = medium.bytes.len() - tail.len();
    if rots {
        let mut from = at;
        for index in kept..prover.ledger().records() {
            let length = prover.ledger().read(index, 1).unwrap().len();
            medium.bytes[from + length / 2] ^= 1;
            from += length;
        }
    } else {
        medium.bytes.truncate(at);
    }
    medium.aside.clear();
    medium
}

/// Node 1 with a ledger that may have lost its end.
pub(super) fn node_1<M: LedgerMedium + std::fmt::Debug>(medium: M) -> Prover<M> {
    let (ledger, tip, _) = LedgerFile::open(medium, identity().volume).unwrap();
    let setup = Setup {
        identity: identity(),
        node: node(1),
        keys: rotating(1, 11),
        required: Policy::default(),
        checkpoint_age: Duration::from_secs(60),
        policy: BatchPolicy::for_log(64 << 20),
        gate: true,
        hold_bytes: GATE,
    };
    Prover::new(setup, ledger, tip)
}

/// It is primary, and its log begins where its ledger ends.
pub(super) fn begin<M: LedgerMedium>(primary: &mut Prover<M>, by: Term, at: u64) {
    primary.standing(now(at), Some(by)).unwrap();
    let last = primary.tip.as_ref().and_then(Verifier::last);
    let (epoch, chain) = last.map_or((Epoch(0), ChainHash::default()), |last| {
        (last.last, last.chain)
    });
    primary.cut(now(at), epoch, chain).unwrap();
}

/// Node 1 comes back with a ledger, in the same term, and its log from where that ends.
pub(super) fn reopen(pair: &mut Pair, medium: MemoryMedium, log: &Log, at: u64) {
    pair.primary = node_1(medium);
    begin(&mut pair.primary, term(1, 1), at);
    log.feed(&mut pair.primary, at);
    pair.primary.tick(now(at + 60)).unwrap();
    pair.replica.disconnected(0);
}

pub(super) fn equal(pair: &Pair) -> bool {
    let [one, two] = [&pair.primary, &pair.replica].map(|node| &node.ledger().medium().bytes);
    one == two
}

pub(super) fn aside(pair: &Pair) -> [usize; 2] {
    [&pair.primary, &pair.replica].map(|node| node.ledger().medium().aside.len())
}

#[test]
fn what_rotted_at_the_end_comes_back_from_a_replica_before_anything_is_signed() {
    for lost in 1..=7 {
        let (mut pair, mut log) = signed();
        let before = pair.replica.ledger().medium().clone();
        log.write(4);
        let medium = without(&pair.primary, lost, true);
        reopen(&mut pair, medium, &log, 200_000);
        assert_eq!(
            pair.primary.ledger().records(),
            8 - lost,
            "nothing is signed"
        );
        log.feed(&mut pair.replica, 200_000);
        pair.connect(term(1, 1));
        pair.settle();
        assert_eq!(pair.replica.ledger().medium(), &before, "{lost} are lost");
        assert!(equal(&pair), "{lost} are lost");
        pair.primary.tick(now(200_200)).unwrap();
        pair.settle();
        assert_eq!(pair.heard[1].refused, None);
        assert_eq!(
            (pair.heard[0].proven, pair.heard[1].proven),
            (Epoch(5), Epoch(5))
        );
        assert!(equal(&pair) && aside(&pair) == [0, 0]);
    }
}

#[test]
fn what_was_signed_anew_gives_way_to_a_new_ledger_and_nobody_has_to_write() {
    for (lost, rots) in (1..=7).flat_map(|lost| [(lost, false), (lost, true)]) {
        let (mut pair, log) = signed();
        let medium = without(&pair.primary, lost, rots);
        reopen(&mut pair, medium, &log, 200_000);
        // Nobody answers in time.
        pair.primary.tick(now(200_000 + PATIENCE_MS)).unwrap();
        pair.primary.tick(now(200_100 + PATIENCE_MS)).unwrap();
        let _ = drain(&mut pair.primary, &mut pair.heard[0]);
        pair.connect(term(1, 1));
        pair.settle();
        pair.primary.tick(now(210_000)).unwrap();
        pair.settle();
        assert_eq!(pair.heard[1].refused, None, "{lost} {rots}");
        assert!(equal(&pair), "{lost} {rots}");
        let anchored = pair.replica.anchored();
        assert_eq!(anchored, Some(log.tip().0), "{lost} {rots}");
        let asides = aside(&pair);
        assert!(
            asides == [0, 0] || asides == [1, 1],
            "{lost} {rots} {asides:?}"
        );
    }
}

#[test]
fn of_several_replicas_each_follows_whatever_it_had_heard() {
    let (mut pair, mut log) = signed();
    let behind = open(2, without(&pair.replica, 2, false));
    let ahead = std::mem::replace(&mut pair.replica, behind);
    let medium = without(&pair.primary, 2, true);
    reopen(&mut pair, medium, &log, 200_000);
    let (epoch, chain, _) = log.frames[2];
    pair.replica.cut(now(200_000), epoch, chain).unwrap();
    log.feed(&mut pair.replica, 200_000);
    pair.connect(term(1, 1));
    pair.settle();
    pair.primary.tick(now(200_000 + PATIENCE_MS)).unwrap();
    pair.primary.tick(now(200_100 + PATIENCE_MS)).unwrap();
    pair.settle();
    assert!(equal(&pair) && aside(&pair) == [0, 0]);
    assert_eq!(pair.replica.anchored(), Some(log.tip().0));
    let other = std::mem::replace(&mut pair.replica, ahead);
    log.write(5);
    for replica in [None, Some(other)] {
        pair.replica = replica.unwrap_or(pair.replica);
        pair.replica.disconnected(0);
        pair.connect(term(1, 1));
        pair.settle();
        both(&mut pair, &log, 300_000);
        assert_eq!(pair.heard[1].refused, None);
        assert!(equal(&pair) && aside(&pair) == [1, 1]);
        assert_eq!(pair.replica.anchored(), Some(log.tip().0));
    }
}

#[test]
fn a_primary_that_does_not_yield_is_refused_and_what_it_signed_first_stays() {
    let (mut pair, log) = signed();
    let before = pair.replica.ledger().medium().clone();
    let medium = without(&pair.primary, 2, false);
    reopen(&mut pair, medium, &log, 200_000);
    let header = *pair.primary.ledger().header().unwrap();
    let again = Message::Records {
        header,
        first: 6,
        bytes: pair.primary.ledger().read(6, usize::MAX).unwrap(),
    };
    pair.connect(term(1, 1));
    let _ = drain(&mut pair.replica, &mut pair.heard[1]);
    for refused in [false, true] {
        pair.replica.message(now(0), 0, &again.encode()).unwrap();
        let said = drain(&mut pair.replica, &mut pair.heard[1]);
        assert_eq!(said.is_empty(), refused);
        assert_eq!(pair.heard[1].refused.is_some(), refused);
    }
    let why = pair.heard[1].refused.as_deref().unwrap_or_default();
    assert!(why.contains("same term"), "{why}");
    assert_eq!(pair.replica.ledger().medium(), &before);
}

#[test]
fn what_was_signed_before_the_present_term_comes_back_with_what_binds_it() {
    for in_time in [true, false] {
        let (mut pair, mut log) = signed();
        pair.primary
            .standing(now(150_000), Some(term(5, 1)))
            .unwrap();
        pair.replica.disconnected(0);
        pair.connect(term(5, 1));
        log.write(4);
        both(&mut pair, &log, 150_100);
        assert_eq!(pair.replica.ledger().records(), 9);
        let medium = without(&pair.primary, 7, in_time);
        reopen(&mut pair, medium, &Log::default(), 200_000);
        pair.primary
            .standing(now(200_100), Some(term(5, 1)))
            .unwrap();
        log.feed(&mut pair.primary, 200_100);
        pair.primary.tick(now(200_200)).unwrap();
        pair.connect(term(5, 1));
        pair.settle();
        pair.primary.tick(now(210_000)).unwrap();
        pair.settle();
        assert_eq!(pair.heard[1].refused, None);
        assert_eq!(pair.replica.anchored(), Some(log.tip().0));
        let kept = usize::from(!in_time);
        assert!(equal(&pair) && aside(&pair) == [kept, kept]);
    }
}

/// What node 1 would have signed behind `at` records with these keys, in this term.
fn forged(pair: &Pair, log: &Log, (at, keys): (u64, NodeKeys), by: Term) -> Message {
    let lost = pair.replica.ledger().records() - at;
    let mut forger = open(1, without(&pair.replica, lost, false));
    forger.keys = keys;
    let last = forger.tip.as_ref().and_then(Verifier::last).unwrap();
    forger.standing(now(300_000), Some(by)).unwrap();
    forger.cut(now(300_000), last.last, last.chain).unwrap();
    log.feed(&mut forger, 300_000);
    forger.tick(now(300_060)).unwrap();
    Message::Records {
        header: *forger.ledger().header().unwrap(),
        first: at,
        bytes: forger.ledger().read(at, usize::MAX).unwrap(),
    }
}

/// The primary has heard what the replica asks, and has asked in turn.
pub(super) fn asked(pair: &mut Pair) {
    for message in drain(&mut pair.replica, &mut pair.heard[1]) {
        pair.primary.message(now(200_050), 0, &message).unwrap();
    }
    let questions = drain(&mut pair.primary, &mut pair.heard[0]);
    let is_question = |bytes: &Vec<u8>| matches!(Message::decode(bytes), Ok(Message::Have { .. }));
    assert!(questions.iter().any(is_question));
}

#[test]
fn a_replica_gives_back_only_what_was_signed_here_in_this_term() {
    for (by, kept) in [(term(2, 1), 7), (term(1, 1), 8)] {
        let (mut pair, mut log) = signed();
        log.write(4);
        let message = forged(&pair, &log, (7, rotating(1, 11)), by);
        let lost = without(&pair.primary, 1, true);
        reopen(&mut pair, lost, &log, 200_000);
        pair.connect(term(1, 1));
        asked(&mut pair);
        let records = message.encode();
        pair.primary.message(now(200_100), 0, &records).unwrap();
        assert_eq!(pair.primary.ledger().records(), kept, "{by:?}");
    }
}

#[test]
fn whoever_stole_a_key_that_is_not_wanted_any_more_gives_nothing_back() {
    let (mut pair, mut log) = signed();
    log.write(4);
    let message = forged(&pair, &log, (5, key(1).into()), term(1, 1));
    // The record that retires the key is lost, and the thief puts others in its place.
    let lost = without(&pair.primary, 3, true);
    reopen(&mut pair, lost, &log, 200_000);
    pair.connect(term(1, 1));
    asked(&mut pair);
    let records = message.encode();
    pair.primary.message(now(200_100), 0, &records).unwrap();
    assert_eq!(pair.primary.ledger().records(), 5);
    pair.replica.disconnected(0);
    pair.connect(term(1, 1));
    pair.settle();
    assert!(equal(&pair), "an honest replica has the true ones");
    // Nor, where that record is, does it put anything in its place.
    pair.primary.message(now(200_100), 0, &records).unwrap();
    let tip = pair.primary.tip.as_ref().unwrap();
    assert_eq!(pair.primary.active_keys(), [key(11).public().id()]);
    assert!(!tip.keyring().may_sign(key(1).public().id(), node(1)));
}

/// What a thief of node 1's old key can put in the place of its records from the fifth on: a false
/// record, and the true change of keys at a place where it never was. The new key signs its offer
/// alone, which anybody can copy.
fn stolen(pair: &Pair, make: impl Fn(&Verifier) -> Body) -> Message {
    let forger = open(1, without(&pair.replica, 3, false));
    let header = *forger.ledger().header().unwrap();
    let mut tip = forger.tip.unwrap();
    let mut bytes = tip.encode_next(0, &make(&tip));
    tip.push_bytes(&bytes).unwrap();
    let Some(Body::Key(change)) = bodies(&pair.replica).into_iter().nth(5) else {
        panic!("a change of keys");
    };
    let (node, public) = change.enroll.clone().unwrap();
    let signature = change.signatures.last().unwrap().clone();
    let offer = KeyOffer {
        node,
        public,
        signature,
    };
    let place = (identity().volume, tip.next_index(), &tip.previous());
    let change = offer.accept(place, change.retire, &[&key(1)]).unwrap();
    let change = tip.encode_next(0, &Body::Key(change));
    tip.push_bytes(&change).unwrap();
    bytes.extend(change);
    Message::Records {
        header,
        first: 5,
        bytes,
    }
}

/// A thief enrols a key of its own.
fn enrolled(tip: &Verifier) -> Body {
    let place = (identity().volume, tip.next_index(), &tip.previous());
    let offer = KeyOffer::new(identity().volume, node(1), &key(66)).unwrap();
    Body::Key(offer.accept(place, None, &[&key(1)]).unwrap())
}

/// A thief vouches for what the volume never was.
fn vouched(tip: &Verifier) -> Body {
    let last = tip.last().unwrap();
    let checkpoint = Checkpoint {
        volume: identity().volume,
        term: last.term,
        step: tip.next_index(),
        ledger_previous: tip.previous(),
        epoch: last.last,
        chain: last.chain,
        root: Some(Digest([66; 32])),
        time_ms: 0,
    };
    let signatures = vec![key(1).sign(&checkpoint.hash()).unwrap()];
    let signed = SignedCheckpoint {
        checkpoint,
        signatures,
    };
    Body::Checkpoint(Box::new(signed))
}

#[test]
fn a_stolen_key_and_a_copy_of_what_retired_it_give_nothing_back() {
    for make in [enrolled, vouched] {
        let (mut pair, log) = signed();
        let message = stolen(&pair, make);
        let lost = without(&pair.primary, 3, true);
        reopen(&mut pair, lost, &log, 200_000);
        pair.connect(term(1, 1));
        asked(&mut pair);
        let records = message.encode();
        pair.primary.message(now(200_100), 0, &records).unwrap();
        assert_eq!(pair.primary.ledger().records(), 5);
        // It asks the honest one again.
        pair.replica.disconnected(0);
        pair.connect(term(1, 1));
        pair.settle();
        assert!(equal(&pair) && aside(&pair) == [0, 0]);
    }
}

#[test]
fn a_change_of_keys_that_nothing_binds_does_not_come_back_and_a_new_ledger_begins() {
    let (mut pair, log) = rotated();
    let lost = without(&pair.primary, 1, true);
    reopen(&mut pair, lost, &log, 200_000);
    pair.connect(term(1, 1));
    pair.settle();
    assert_eq!(pair.primary.ledger().records(), 5);
    pair.primary.tick(now(200_000 + PATIENCE_MS)).unwrap();
    pair.settle();
    assert_eq!(pair.heard[1].refused, None);
    assert!(equal(&pair) && aside(&pair) == [1, 1]);
    assert_eq!(pair.replica.anchored(), Some(log.tip().0));
    assert_eq!(pair.primary.active_keys(), [key(11).public().id()]);
}

#[test]
fn a_key_that_is_offered_meanwhile_is_enrolled_when_the_ledger_is_whole() {
    let (mut pair, log) = signed();
    let medium = without(&pair.primary, 1, true);
    reopen(&mut pair, medium, &log, 200_000);
    pair.replica
        .set_keys(now(200_000), rotating(2, 12))
        .unwrap();
    pair.connect(term(1, 1));
    pair.settle();
    let new = key(12).public().id();
    assert!(
        pair.primary
            .tip
            .as_ref()
            .unwrap()
            .keyring()
            .may_sign(new, node(2))
    );
    assert!(equal(&pair) && aside(&pair) == [0, 0]);
}

/// A copy of it was to be made anew, so it had followed the ledger of another history.
#[test]
fn a_ledger_that_does_not_lead_up_to_the_log_is_set_aside_before_anybody_is_answered() {
    let (mut pair, _) = signed();
    let log = log_of(&[10, 11, 12, 13, 14, 15]);
    let medium = without(&pair.primary, 1, true);
    pair.primary = node_1(medium);
    pair.primary
        .standing(now(200_000), Some(term(2, 1)))
        .unwrap();
    let (epoch, chain, _) = &log.frames[4];
    pair.primary.cut(now(200_000), *epoch, *chain).unwrap();
    log.feed(&mut pair.primary, 200_000);
    pair.replica = open(2, MemoryMedium::default());
    let begin = (Epoch(0), ChainHash::default());
    pair.replica.cut(now(200_000), begin.0, begin.1).unwrap();
    log.feed(&mut pair.replica, 200_000);
    pair.connect(term(2, 1));
    pair.settle();
    assert_eq!(pair.heard[1].refused, None);
    assert_eq!(pair.replica.ledger().records(), 0, "nothing was sent");
    pair.primary.tick(now(200_000 + PATIENCE_MS)).unwrap();
    pair.settle();
    assert!(equal(&pair) && pair.replica.ledger().records() > 0);
    pair.primary.tick(now(200_100 + PATIENCE_MS)).unwrap();
    pair.settle();
    assert_eq!(pair.heard[1].refused, None);
    assert_eq!(pair.replica.anchored(), Some(log.tip().0));
}
