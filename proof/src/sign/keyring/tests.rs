//! Rights of keys: how they begin, end, and are needed.

use super::*;

const VOLUME: VolumeId = VolumeId([1; 16]);
const NODE: NodeId = NodeId([2; 16]);
const OTHER: NodeId = NodeId([3; 16]);

fn key(seed: u8) -> SecretKey {
    SecretKey::from_seed(Algorithm::Ed25519, &[seed; 32]).unwrap()
}

fn change(
    index: u64,
    retire: Option<&SecretKey>,
    enroll: Option<(NodeId, &SecretKey)>,
    by: &[&SecretKey],
) -> KeyChange {
    let mut change = KeyChange {
        retire: retire.map(|key| key.public().id()),
        enroll: enroll.map(|(node, key)| (node, key.public().clone())),
        signatures: Vec::new(),
    };
    change.sign((VOLUME, index, &Digest::ZERO), by).unwrap();
    change
}

fn at(index: u64) -> (VolumeId, u64, &'static Digest) {
    (VOLUME, index, &Digest::ZERO)
}

fn ring() -> Keyring {
    let mut ring = Keyring::new();
    ring.apply(&change(0, None, Some((NODE, &key(1))), &[&key(1)]), at(0))
        .unwrap();
    ring
}

#[test]
fn an_old_key_cannot_sign_new_history_and_never_returns() {
    let mut ring = ring();
    let digest = hash::ANCHOR.hash(&[b"x"]);
    let old = [key(1).sign(&digest).unwrap()];
    let new = [key(2).sign(&digest).unwrap()];
    assert_eq!(ring.verify(&digest, NODE, &old, &[]), Ok(()));
    let rotation = change(5, Some(&key(1)), Some((NODE, &key(2))), &[&key(1), &key(2)]);
    ring.apply(&rotation, at(5)).unwrap();
    let id = key(1).public().id();
    let retired = KeyError::Retired { key: id, at: 5 };
    assert_eq!(ring.verify(&digest, NODE, &old, &[]), Err(retired.clone()));
    assert_eq!(ring.verify(&digest, NODE, &new, &[]), Ok(()));
    let back = change(6, Some(&key(2)), Some((NODE, &key(1))), &[&key(2), &key(1)]);
    assert_eq!(
        ring.apply(&back, at(6)),
        Err(KeyError::Change("the key was enrolled before"))
    );
    let own = change(6, None, Some((NODE, &key(3))), &[&key(1), &key(3)]);
    assert_eq!(ring.apply(&own, at(6)), Err(retired));
}

#[test]
fn a_change_needs_authority_possession_and_its_own_place() {
    let mut ring = ring();
    let enroll = Some((OTHER, &key(2)));
    let (k1, k2, k3) = (key(1), key(2), key(3));
    let keys: [&[&SecretKey]; 5] = [&[], &[&k2], &[&k1], &[&k3, &k2], &[&k2, &k2]];
    for by in keys {
        assert!(
            ring.apply(&change(3, None, enroll, by), at(3)).is_err(),
            "{by:?}"
        );
    }
    let good = change(3, None, enroll, &[&k1, &k2]);
    assert!(ring.apply(&good, at(4)).is_err());
    assert!(
        ring.apply(&good, (VolumeId([9; 16]), 3, &Digest::ZERO))
            .is_err()
    );
    assert!(ring.apply(&good, (VOLUME, 3, &Digest([1; 32]))).is_err());
    assert_eq!(ring.apply(&good, at(3)), Ok(()));
    let digest = hash::ANCHOR.hash(&[b"x"]);
    let signature = [k2.sign(&digest).unwrap()];
    assert_eq!(ring.verify(&digest, OTHER, &signature, &[]), Ok(()));
    let id = k2.public().id();
    assert_eq!(
        ring.verify(&digest, NODE, &signature, &[]),
        Err(KeyError::OtherNode(id))
    );
}

#[test]
fn the_last_key_cannot_be_retired() {
    let mut ring = ring();
    let last = change(1, Some(&key(1)), None, &[&key(1)]);
    let error = KeyError::Change("no ed25519 key would be left");
    assert_eq!(ring.apply(&last, at(1)), Err(error));
    assert_eq!(ring.active().count(), 1);
}

#[test]
fn required_algorithms_are_required_and_doubles_are_refused() {
    let ring = ring();
    let digest = hash::ANCHOR.hash(&[b"x"]);
    let one = key(1).sign(&digest).unwrap();
    let missing = KeyError::Missing(Algorithm::MlDsa65);
    let required = [Algorithm::MlDsa65];
    assert_eq!(
        ring.verify(&digest, NODE, std::slice::from_ref(&one), &required),
        Err(missing)
    );
    assert_eq!(
        ring.verify(&digest, NODE, &[one.clone(), one], &[]),
        Err(KeyError::Order)
    );
    let none = KeyError::Missing(Algorithm::Ed25519);
    assert_eq!(ring.verify(&digest, NODE, &[], &[]), Err(none));
}

#[test]
fn a_flipped_bit_in_a_change_is_refused() {
    let good_change = change(5, Some(&key(1)), Some((NODE, &key(2))), &[&key(1), &key(2)]);
    let mut writer = Writer::new();
    good_change.encode(&mut writer);
    let good = writer.finish();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let mut reader = Reader::new("change", &bad);
        let Ok(change) = KeyChange::decode(&mut reader) else {
            continue;
        };
        let accepted = reader.finish().is_ok() && ring().apply(&change, at(5)).is_ok();
        assert!(!accepted, "bit {bit}");
    }
}

/// For a part of a ledger: keys that come with it, and keys that it enrols.
fn handed(seeds: &[u8]) -> Keyring {
    let keys: Vec<_> = seeds.iter().map(|&seed| key(seed)).collect();
    let keys: Vec<_> = keys.iter().map(|key| key.public().clone()).collect();
    Keyring::trusting(&keys)
}

#[test]
fn a_part_of_a_ledger_enrols_keys_that_were_handed_over_with_it() {
    let rotation = change(5, Some(&key(1)), Some((NODE, &key(2))), &[&key(1), &key(2)]);
    for seeds in [&[1][..], &[1, 2]] {
        let mut ring = handed(seeds);
        assert_eq!(ring.apply(&rotation, at(5)), Ok(()), "{seeds:?}");
        let id = key(2).public().id();
        assert!(ring.may_sign(id, NODE) && !ring.may_sign(id, OTHER));
        assert_eq!(ring.retired_at(key(1).public().id()), Some(5));
        let again = change(6, None, Some((OTHER, &key(2))), &[&key(2), &key(2)]);
        let before = KeyError::Change("the key was enrolled before");
        assert_eq!(ring.apply(&again, at(6)), Err(before.clone()));
        let back = change(6, None, Some((NODE, &key(1))), &[&key(2), &key(1)]);
        assert_eq!(ring.apply(&back, at(6)), Err(before));
    }
    // Who authorises it must be known, and still have the right.
    let unknown = Err(KeyError::Unknown(key(1).public().id()));
    assert_eq!(handed(&[2]).apply(&rotation, at(5)), unknown);
    assert!(handed(&[]).apply(&rotation, at(5)).is_err());
    let first = change(0, None, Some((NODE, &key(1))), &[&key(1)]);
    assert!(handed(&[]).apply(&first, at(0)).is_err());
}

#[test]
fn a_part_of_a_ledger_retires_keys_that_nobody_was_handed() {
    let rotation = change(
        5,
        Some(&key(3)),
        Some((OTHER, &key(4))),
        &[&key(1), &key(4)],
    );
    let mut ring = handed(&[1]);
    assert_eq!(ring.apply(&rotation, at(5)), Ok(()));
    assert!(ring.may_sign(key(4).public().id(), OTHER));
    assert!(!ring.knows(key(3).public().id()));
    let retired = change(6, Some(&key(1)), None, &[&key(1)]);
    assert_eq!(ring.apply(&retired, at(6)), Ok(()));
    let digest = hash::ANCHOR.hash(&[b"x"]);
    let old = [key(1).sign(&digest).unwrap()];
    assert!(ring.verify(&digest, NODE, &old, &[]).is_err());
}

#[cfg(feature = "ml-dsa")]
#[test]
fn a_handed_key_of_one_node_is_not_asked_of_another() {
    let pq = SecretKey::from_seed(Algorithm::MlDsa65, &[7; 32]).unwrap();
    let keys = [key(1).public().clone(), pq.public().clone()];
    let mut ring = Keyring::trusting(&keys);
    let rotation = change(5, None, Some((OTHER, &key(4))), &[&key(1), &key(4)]);
    assert_eq!(ring.apply(&rotation, at(5)), Ok(()));
}

#[cfg(feature = "ml-dsa")]
#[test]
fn a_node_with_a_post_quantum_key_changes_keys_only_with_it() {
    let mut ring = ring();
    let pq = SecretKey::from_seed(Algorithm::MlDsa65, &[7; 32]).unwrap();
    ring.apply(&change(1, None, Some((NODE, &pq)), &[&key(1), &pq]), at(1))
        .unwrap();
    let rotation = (Some(&key(1)), Some((NODE, &key(2))));
    let classic = change(2, rotation.0, rotation.1, &[&key(1), &key(2)]);
    let missing = KeyError::Missing(Algorithm::MlDsa65);
    assert_eq!(ring.apply(&classic, at(2)), Err(missing));
    let both = change(2, rotation.0, rotation.1, &[&key(1), &pq, &key(2)]);
    assert_eq!(ring.apply(&both, at(2)), Ok(()));
}
