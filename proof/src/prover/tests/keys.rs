//! Keys that come and go, signatures that are insisted on, and checkpoints.

use super::*;
use crate::ledger::verify::LedgerError;
use crate::prover::message::Message;
use crate::sign::keyring::{KeyError, KeyOffer, MAX_NODE_KEYS};

/// Ledger of a prover, record by record.
pub(super) fn bodies(prover: &Prover<MemoryMedium>) -> Vec<Body> {
    let mut records = Records::new(prover.ledger().medium()).unwrap();
    let next = || {
        let record = records.next_record().unwrap()?;
        Some(record.unwrap().body)
    };
    std::iter::from_fn(next).collect()
}

fn anchor_all(pair: &mut Pair, log: &Log, at: u64) {
    log.feed(&mut pair.primary, at);
    log.feed(&mut pair.replica, at);
    pair.primary.tick(now(at + 60)).unwrap();
    pair.settle();
}

/// Old key and new: the one that is replaced is kept until the ledger holds the other.
pub(super) fn rotating(old: u8, new: u8) -> NodeKeys {
    NodeKeys::new(vec![key(new)], vec![key(old)]).unwrap()
}

#[test]
fn a_primary_s_rotation_is_in_the_ledger_and_the_replica_follows_across_it() {
    let mut pair = Pair::new();
    let mut log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    pair.primary.set_keys(now(100), rotating(1, 11)).unwrap();
    log.write(2);
    anchor_all(&mut pair, &log, 200);
    assert_eq!(pair.heard[1].proven, Epoch(2));
    let old = key(1).public().id();
    let ring = pair.replica.tip.as_ref().unwrap().keyring();
    assert!(ring.retired_at(old).is_some());
    let active = key(11).public().id();
    assert_eq!(pair.primary.status().active_keys, [active]);
    // The old key signs an anchor that would fit, and the rules refuse it.
    let tip = pair.replica.tip.clone().unwrap();
    let Some(Body::Anchor(last)) = bodies(&pair.primary).pop() else {
        panic!("an anchor ends the ledger");
    };
    let mut anchor = last.anchor.clone();
    (anchor.step, anchor.ledger_previous) = (tip.next_index(), tip.previous());
    (anchor.previous, anchor.first) = (tip.last_anchor(), anchor.last.next());
    anchor.last = anchor.first;
    (anchor.start, anchor.end) = (anchor.end, LogOffset(anchor.end.0 + 8192));
    for (signer, is_good) in [(key(11), true), (key(1), false)] {
        let signatures = vec![signer.sign(&anchor.hash()).unwrap()];
        let anchor = anchor.clone();
        let body = Body::Anchor(Box::new(crate::anchor::SignedAnchor { anchor, signatures }));
        let pushed = tip.clone().push_bytes(&tip.encode_next(0, &body));
        let retired = |error: &LedgerError| {
            let LedgerError::Key { source, .. } = error else {
                return false;
            };
            matches!(source, KeyError::Retired { key, .. } if *key == old)
        };
        assert_eq!(pushed.is_ok(), is_good, "{pushed:?}");
        assert!(pushed.err().is_none_or(|error| retired(&error)));
    }
}

#[test]
fn a_node_that_is_killed_while_its_key_is_replaced_goes_on_with_the_new_one() {
    let mut pair = Pair::new();
    let log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    let before = pair.primary.ledger().medium().clone();
    pair.primary.set_keys(now(100), rotating(1, 11)).unwrap();
    let after = pair.primary.ledger().medium().clone();
    let (epoch, chain) = log.tip();
    for medium in [before, after.clone()] {
        let mut again = open(1, medium);
        again.keys = rotating(1, 11);
        again.standing(now(200), Some(term(1, 1))).unwrap();
        again.cut(now(200), epoch, chain).unwrap();
        assert_eq!(again.active_keys(), [key(11).public().id()]);
        assert_eq!(again.ledger().records(), 4, "one change, once");
        assert!(again.ledger().medium().aside.is_empty());
    }
    // The old key alone opens nothing any more.
    let mut thief = open(1, after);
    thief.standing(now(200), Some(term(1, 1))).unwrap();
    let error = thief.cut(now(200), epoch, chain).unwrap_err();
    assert!(
        matches!(error, ProverError::Retired { at: 3, .. }),
        "{error}"
    );
    assert!(thief.ledger().medium().aside.is_empty());
}

#[test]
fn a_new_ledger_that_begins_with_a_retired_key_is_refused() {
    let mut pair = Pair::new();
    let log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    pair.primary.set_keys(now(100), rotating(1, 11)).unwrap();
    pair.settle();
    let before = pair.replica.ledger().medium().clone();
    pair.primary = open(1, MemoryMedium::default());
    let later = Now {
        wall_ms: now(0).wall_ms + 3_600_000,
        ..now(200)
    };
    pair.primary.standing(later, Some(term(1, 1))).unwrap();
    let begin = (Epoch(0), ChainHash::default());
    pair.primary.cut(later, begin.0, begin.1).unwrap();
    pair.connect(term(1, 1));
    pair.settle();
    let why = pair.heard[1].refused.as_deref().unwrap_or_default();
    assert!(why.contains("retired at step"), "{why}");
    assert_eq!(pair.replica.ledger().medium(), &before);
}

#[test]
fn a_replica_s_new_key_takes_the_place_of_its_old_one() {
    let mut pair = Pair::new();
    pair.settle();
    pair.replica.set_keys(now(0), rotating(2, 12)).unwrap();
    pair.settle();
    let [old, new] = [2, 12].map(|seed| key(seed).public().id());
    for prover in [&pair.primary, &pair.replica] {
        let ring = prover.tip.as_ref().unwrap().keyring();
        assert!(ring.retired_at(old).is_some());
        assert!(ring.may_sign(new, node(2)) && !ring.may_sign(new, node(1)));
    }
    assert_eq!(pair.replica.status().active_keys, [new]);
}

#[test]
fn a_node_that_changes_its_key_all_the_time_leaves_room_for_others() {
    let mut pair = Pair::new();
    pair.settle();
    for seed in 10..110 {
        let offer = KeyOffer::new(identity().volume, node(2), &key(seed)).unwrap();
        let message = Message::Offer(offer).encode();
        pair.primary.message(now(0), 0, &message).unwrap();
    }
    let ring = pair.primary.tip.as_ref().unwrap().keyring();
    assert_eq!(ring.count_of(node(2)), MAX_NODE_KEYS);
}

#[test]
fn a_state_is_vouched_for_though_nothing_is_written_any_more() {
    let mut pair = Pair::new();
    let log = log_of(&[1, 2]);
    anchor_all(&mut pair, &log, 0);
    let root = Digest([9; 32]);
    pair.primary.state(now(100), log.tip(), root);
    // A minute after the first epoch that nothing vouches for was anchored.
    let due = Duration::from_millis(60) + Duration::from_secs(60);
    assert_eq!(pair.primary.deadline(), Some(due));
    pair.primary.tick(now(1000)).unwrap();
    assert_eq!(pair.primary.status().state, None);
    pair.primary.tick(now(60_060)).unwrap();
    pair.settle();
    assert_eq!(pair.primary.deadline(), None, "nothing is new");
    let ledgers = [&pair.primary, &pair.replica].map(|node| node.ledger().medium().bytes.clone());
    assert_eq!(ledgers[0], ledgers[1]);
    assert_eq!(pair.replica.status().state, Some((Epoch(2), root)));
    assert!(matches!(
        bodies(&pair.replica).pop(),
        Some(Body::Checkpoint(_))
    ));
}

#[test]
fn an_anchor_takes_a_state_along_that_it_covers() {
    let mut pair = Pair::new();
    let mut log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    log.write(2);
    // The backing was swept up to an epoch that is not anchored yet.
    pair.primary.state(now(100), log.tip(), Digest([7; 32]));
    assert_eq!(pair.primary.deadline(), None);
    anchor_all(&mut pair, &log, 100);
    let state = (Epoch(2), Digest([7; 32]));
    assert_eq!(pair.replica.status().state, Some(state));
    assert_eq!(pair.primary.deadline(), None);
}

#[test]
fn a_part_of_a_ledger_verifies_across_rotations_of_both_nodes() {
    use crate::envelope::aggregate::Aggregate;
    let mut pair = Pair::new();
    pair.settle();
    let mut log = log_of(&[1]);
    anchor_all(&mut pair, &log, 0);
    pair.primary.set_keys(now(100), rotating(1, 11)).unwrap();
    pair.settle();
    pair.replica.set_keys(now(100), rotating(2, 12)).unwrap();
    pair.settle();
    log.write(2);
    anchor_all(&mut pair, &log, 200);
    let records: Vec<Vec<u8>> = (2..pair.primary.ledger().records())
        .map(|index| pair.primary.ledger().read(index, 1).unwrap())
        .collect();
    assert_eq!(records.len(), 4, "an anchor, two changes, an anchor");
    let part = Aggregate::with_records(&records).unwrap();
    let range = (identity().volume, Epoch(1), Epoch(2));
    let all = pair.primary.tip.as_ref().unwrap().keyring().all();
    let all: Vec<_> = all.cloned().collect();
    for seeds in [&[][..], &[1], &[1, 11], &[1, 12], &[11], &[2, 12]] {
        let keys: Vec<_> = seeds.iter().map(|&it| key(it).public().clone()).collect();
        let keys = if seeds.is_empty() { &all } else { &keys };
        let proven = part.verify(range, keys, Policy::default());
        let is_enough = seeds.is_empty() || seeds.contains(&1);
        assert_eq!(proven.is_ok(), is_enough, "{seeds:?}: {:?}", proven.err());
    }
}

/// The ledger of a primary that has no key for checkpoints, and vouches for a state.
fn vouched(pair: &mut Pair, log: &Log) {
    anchor_all(pair, log, 0);
    pair.primary.state(now(100), log.tip(), Digest([9; 32]));
}

fn lacks_slh_dsa(pair: &Pair) {
    let why = pair.heard[1].refused.as_deref().unwrap_or_default();
    assert!(why.contains("no slh-dsa"), "{why}");
    assert_eq!(pair.replica.status().state, None);
}

#[test]
fn a_checkpoint_without_the_required_signature_is_refused() {
    let mut pair = Pair::new();
    pair.replica.required.checkpoints = vec![Algorithm::SlhDsaSha2128f];
    vouched(&mut pair, &log_of(&[1, 2]));
    assert_eq!(
        pair.heard[1].proven,
        Epoch(2),
        "of batches it is not required"
    );
    pair.primary.tick(now(60_060)).unwrap();
    pair.settle();
    lacks_slh_dsa(&pair);
}

#[test]
fn a_checkpoint_of_what_was_anchored_before_a_restart_needs_its_signatures_too() {
    let mut pair = Pair::new();
    let log = log_of(&[1, 2]);
    vouched(&mut pair, &log);
    pair.replica = open(2, pair.replica.ledger().medium().clone());
    pair.replica.required.checkpoints = vec![Algorithm::SlhDsaSha2128f];
    let (epoch, chain) = log.tip();
    pair.replica.cut(now(200), epoch, chain).unwrap();
    pair.connect(term(1, 1));
    pair.settle();
    pair.primary.tick(now(60_060)).unwrap();
    pair.settle();
    lacks_slh_dsa(&pair);
}

#[test]
fn what_was_vouched_for_before_a_copy_began_needs_no_other_signature() {
    let mut pair = Pair::new();
    let mut log = log_of(&[1, 2]);
    vouched(&mut pair, &log);
    pair.primary.tick(now(60_060)).unwrap();
    pair.settle();
    pair.replica = open(3, MemoryMedium::default());
    pair.replica.required.checkpoints = vec![Algorithm::SlhDsaSha2128f];
    let (epoch, chain) = log.tip();
    pair.replica.cut(now(60_100), epoch, chain).unwrap();
    pair.connect(term(1, 1));
    log.write(3);
    anchor_all(&mut pair, &log, 60_200);
    assert_eq!(pair.heard[1].refused, None);
    assert_eq!(pair.heard[1].proven, Epoch(3));
}

#[cfg(feature = "ml-dsa")]
mod post_quantum {
    use super::*;

    fn keys(seed: u8, more: &[Algorithm]) -> NodeKeys {
        let bytes = |algorithm| match algorithm {
            Algorithm::SlhDsaSha2128f => 48,
            _ => 32,
        };
        let all = [Algorithm::Ed25519].iter().chain(more);
        let all = all.map(|&it| SecretKey::from_seed(it, &vec![seed; bytes(it)]).unwrap());
        NodeKeys::new(all.collect(), Vec::new()).unwrap()
    }

    #[test]
    fn a_replica_that_requires_ml_dsa_takes_no_anchor_without_it() {
        let mut pair = Pair::new();
        pair.replica.required.every_batch = vec![Algorithm::MlDsa65];
        let log = log_of(&[1]);
        log.feed(&mut pair.primary, 0);
        log.feed(&mut pair.replica, 0);
        pair.primary.tick(now(60)).unwrap();
        pair.settle();
        let why = pair.heard[1].refused.as_deref().unwrap_or_default();
        assert!(why.contains("no ml-dsa-65 signature"), "{why}");
        assert_eq!(pair.heard[1].proven, Epoch(0));
    }

    #[test]
    fn it_takes_anchors_with_both_and_the_ledger_then_demands_both() {
        let mut pair = Pair::new();
        pair.replica.required.every_batch = vec![Algorithm::MlDsa65];
        let both = keys(1, &[Algorithm::MlDsa65]);
        pair.primary.set_keys(now(0), both).unwrap();
        let mut log = log_of(&[1]);
        anchor_all(&mut pair, &log, 0);
        assert_eq!(pair.heard[1].proven, Epoch(1));
        // Without the second key the ledger cannot be continued, nor the key be taken out of it.
        let mut half = open(1, pair.primary.ledger().medium().clone());
        half.standing(now(100), Some(term(1, 1))).unwrap();
        let (epoch, chain) = log.tip();
        half.cut(now(100), epoch, chain).unwrap();
        assert_eq!(half.ledger().medium().aside.len(), 1, "a new ledger");
        // With it, it can be given up, and that is in the ledger.
        let fewer = NodeKeys::new(
            vec![key(1)],
            keys(1, &[Algorithm::MlDsa65]).wanted().to_vec(),
        );
        pair.replica.required = Policy::default();
        pair.primary.set_keys(now(100), fewer.unwrap()).unwrap();
        log.write(2);
        anchor_all(&mut pair, &log, 200);
        assert_eq!(pair.heard[1].proven, Epoch(2));
        assert_eq!(pair.primary.active_keys(), [key(1).public().id()]);
    }

    #[cfg(feature = "slh-dsa")]
    #[test]
    fn slow_signatures_stand_on_checkpoints_only() {
        let mut pair = Pair::new();
        pair.replica.required.checkpoints = vec![Algorithm::SlhDsaSha2128f];
        pair.primary.checkpoint_age = Duration::from_secs(1);
        let all = [Algorithm::MlDsa65, Algorithm::SlhDsaSha2128f];
        pair.primary.set_keys(now(0), keys(1, &all)).unwrap();
        let log = log_of(&[1]);
        anchor_all(&mut pair, &log, 0);
        pair.primary.tick(now(2000)).unwrap();
        pair.settle();
        let counts = bodies(&pair.replica)
            .into_iter()
            .filter_map(|body| match body {
                Body::Anchor(signed) => Some(('a', signed.signatures.len())),
                Body::Checkpoint(signed) => Some(('c', signed.signatures.len())),
                _ => None,
            });
        assert_eq!(counts.collect::<Vec<_>>(), [('a', 2), ('c', 3)]);
        assert_eq!(pair.primary.deadline(), None);
    }
}
