//! Whether a replica applies what is not proven: only if nobody can be waited for, and then it says
//! so.

use super::*;
use crate::anchor::SignedAnchor;
use crate::ledger::Record as LedgerRecord;
use crate::prover::message::Message;

fn proves_nothing() -> PeerState {
    PeerState {
        node: node(1),
        session: 1,
        term: term(1, 1),
        proves: false,
        max_epoch_bytes: 1 << 20,
    }
}

/// What a primary has anchored, signed by somebody else.
fn forged(primary: &Prover<MemoryMedium>, by: &SecretKey) -> Vec<u8> {
    let index = primary.ledger().records() - 1;
    let bytes = primary.ledger().read(index, 1).unwrap();
    let (record, _) = LedgerRecord::decode(&bytes).unwrap();
    let Body::Anchor(signed) = &record.body else {
        panic!("an anchor ends the ledger");
    };
    let anchor = signed.anchor.clone();
    let signatures = vec![by.sign(&anchor.hash()).unwrap()];
    let body = Body::Anchor(Box::new(SignedAnchor { anchor, signatures }));
    let records = Message::Records {
        header: *primary.ledger().header().unwrap(),
        first: index,
        bytes: LedgerRecord::encode(index, record.time_ms, &record.previous, &body),
    };
    records.encode()
}

#[test]
fn an_anchor_that_nobody_signed_opens_no_gate() {
    for seed in [1, 9] {
        let mut pair = Pair::new();
        pair.replica.hold_bytes = 8192;
        pair.settle();
        let log = log_of(&[1, 2, 3]);
        log.feed(&mut pair.primary, 0);
        pair.primary.tick(now(60)).unwrap();
        let _ = drain(&mut pair.primary, &mut pair.heard[0]);
        let message = forged(&pair.primary, &key(seed));
        pair.replica.message(now(60), 0, &message).unwrap();
        let _ = drain(&mut pair.replica, &mut pair.heard[1]);
        let is_real = seed == 1;
        assert_eq!(pair.heard[1].gate, Some(!is_real), "key {seed}");
        assert_eq!(pair.heard[1].refused.is_none(), is_real);
    }
}

/// A node cuts its log back to what is proven when what follows is not what was signed.
#[test]
fn only_what_the_primary_signed_speaks_against_a_log() {
    for seed in [1, 9] {
        let mut pair = Pair::new();
        pair.settle();
        log_of(&[1]).feed(&mut pair.primary, 0);
        log_of(&[9]).feed(&mut pair.replica, 0);
        pair.primary.tick(now(60)).unwrap();
        let _ = drain(&mut pair.primary, &mut pair.heard[0]);
        let message = forged(&pair.primary, &key(seed));
        pair.replica.message(now(60), 0, &message).unwrap();
        let _ = drain(&mut pair.replica, &mut pair.heard[1]);
        assert!(pair.heard[1].refused.is_some(), "key {seed}");
        assert_eq!(pair.heard[1].contradicted, seed == 1, "key {seed}");
    }
}

#[test]
fn who_insists_on_signatures_waits_for_a_primary_that_proves() {
    let mut replica = open(2, MemoryMedium::default());
    replica.required.every_batch = vec![Algorithm::MlDsa65];
    replica.cut(now(0), Epoch(0), ChainHash::default()).unwrap();
    replica.connected(0, proves_nothing());
    replica.fed_by(0).unwrap();
    let out: Vec<Out> = std::iter::from_fn(|| replica.poll()).collect();
    assert!(!out.contains(&Out::Gate(false)), "{out:?}");
    let tells = |out: &Out| matches!(out, Out::Notice(text) if text.contains("ml-dsa-65"));
    assert!(out.iter().any(tells), "{out:?}");
    assert!(!replica.status().unproven_primary);
}

#[test]
fn a_prover_that_is_opened_anew_says_where_the_gate_is() {
    let mut replica = open(2, MemoryMedium::default());
    let mut heard = Heard::default();
    drain(&mut replica, &mut heard);
    assert_eq!(
        heard.gate,
        Some(true),
        "the one before it may have opened it"
    );
    replica.cut(now(0), Epoch(0), ChainHash::default()).unwrap();
    replica.connected(0, proves_nothing());
    replica.fed_by(0).unwrap();
    drain(&mut replica, &mut heard);
    assert_eq!(heard.gate, Some(false));
}
