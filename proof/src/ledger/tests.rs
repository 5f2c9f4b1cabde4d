//! Ledgers in memory: good ones, torn ones, damaged ones and forged ones.

use hn4::types::{LogOffset, NodeId, Term};

use super::scan::{Records, ScanError, prove_consistency, prove_inclusion, recover};
use super::verify::{LedgerError, Policy, Verifier, grew};
use super::xml::Export;
use super::*;
use crate::anchor::tests::{batch, step};
use crate::anchor::{Anchor, Phase, StateAt, Step};
use crate::batch::Batch;
use crate::fold::Head;
use crate::sign::keyring::KeyError;
use crate::sign::{Algorithm, PublicKey, SecretKey};

pub(crate) const VOLUME: VolumeId = VolumeId([4; 16]);
const NODE: NodeId = NodeId([2; 16]);

pub(crate) fn key(seed: u8) -> SecretKey {
    SecretKey::from_seed(Algorithm::Ed25519, &[seed; 32]).unwrap()
}

pub(crate) fn public(seed: u8) -> PublicKey {
    key(seed).public().clone()
}

/// A ledger file that is being written.
#[derive(Clone)]
pub(crate) struct Ledger {
    pub(crate) bytes: Vec<u8>,
    pub(crate) tip: Verifier,
    next_epoch: u64,
    term: Term,
    signer: u8,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        let header = LedgerHeader {
            scope: Scope::Shared,
            volume: VOLUME,
            created_ms: 1,
        };
        let tip = Verifier::new(&header, Policy::default());
        let term = Term {
            counter: 1,
            node: NODE,
        };
        let mut ledger = Self {
            bytes: header.encode(),
            tip,
            next_epoch: 1,
            term,
            signer: 1,
        };
        ledger.change(None, Some(1), &[1]).unwrap();
        ledger
    }

    pub(crate) fn push(&mut self, body: &Body) -> Result<Vec<u8>, LedgerError> {
        let bytes = self
            .tip
            .encode_next(1_700_000_000_000 + self.tip.next_index(), body);
        self.tip.push_bytes(&bytes)?;
        self.bytes.extend_from_slice(&bytes);
        Ok(bytes)
    }

    pub(crate) fn change(
        &mut self,
        retire: Option<u8>,
        enroll: Option<u8>,
        by: &[u8],
    ) -> Result<Vec<u8>, LedgerError> {
        let mut change = KeyChange {
            retire: retire.map(|seed| public(seed).id()),
            enroll: enroll.map(|seed| (NODE, public(seed))),
            signatures: Vec::new(),
        };
        let keys: Vec<_> = by.iter().map(|&seed| key(seed)).collect();
        let keys: Vec<_> = keys.iter().collect();
        let place = (VOLUME, self.tip.next_index(), &self.tip.previous());
        change.sign(place, &keys).unwrap();
        if let Some(seed) = enroll {
            self.signer = seed;
        }
        self.push(&Body::Key(change))
    }

    pub(crate) fn next_anchor(&self, batch: &Batch) -> Anchor {
        let (next, last) = (self.tip.next_index(), self.tip.last_anchor());
        let ledger_previous = self.tip.previous();
        let step = Step {
            term: self.term,
            ledger_previous,
            previous: last,
            ..step(next)
        };
        Anchor::new(batch, step)
    }

    pub(crate) fn sign(&self, anchor: Anchor) -> Body {
        let signatures = vec![key(self.signer).sign(&anchor.hash()).unwrap()];
        Body::Anchor(Box::new(SignedAnchor { anchor, signatures }))
    }

    pub(crate) fn anchor(&mut self, epochs: u64) -> Vec<u8> {
        let anchor = self.next_anchor(&batch(self.next_epoch, self.next_epoch + epochs - 1));
        self.push_anchor(anchor).unwrap()
    }

    pub(crate) fn push_anchor(&mut self, anchor: Anchor) -> Result<Vec<u8>, LedgerError> {
        let next = anchor.last.0 + 1;
        let bytes = self.push(&self.sign(anchor))?;
        self.next_epoch = next;
        Ok(bytes)
    }

    /// Anchors and checkpoint state, a rotation and a note.
    pub(crate) fn sample() -> Self {
        let mut ledger = Self::new();
        ledger.anchor(3);
        let mut checkpoint = ledger.next_anchor(&batch(4, 6));
        checkpoint.phase = Phase::Checkpoint;
        checkpoint.state = Some(StateAt {
            epoch: Epoch(5),
            root: Digest([6; 32]),
        });
        ledger.push_anchor(checkpoint).unwrap();
        ledger.change(Some(1), Some(2), &[1, 2]).unwrap();
        ledger.push(&note()).unwrap();
        ledger.anchor(1);
        ledger
    }
}

fn note() -> Body {
    Body::Note(Note {
        event: Event::Repaired,
        epoch: Epoch(6),
        lba: Lba(128),
        sectors: 128,
        digest: Digest::ZERO,
        text: "deep verify; good copy from a peer".to_owned(),
    })
}

fn open(bytes: &[u8], known: Option<Head>) -> Result<scan::Recovered, ScanError> {
    recover(
        &bytes.to_vec(),
        (Scope::Shared, VOLUME),
        Policy::default(),
        known,
    )
}

#[test]
fn a_ledger_reads_back_to_the_same_tip() {
    let ledger = Ledger::sample();
    let found = open(&ledger.bytes, Some(ledger.tip.head())).unwrap();
    assert_eq!(found.torn, None);
    assert_eq!(found.end, ledger.bytes.len() as u64);
    assert_eq!(found.tip.head(), ledger.tip.head());
    assert_eq!(found.tip.previous(), ledger.tip.previous());
    assert_eq!(found.tip.anchored(), Some((Epoch(7), LogOffset(8 * 4096))));
    assert_eq!(
        found.tip.state(),
        Some(StateAt {
            epoch: Epoch(5),
            root: Digest([6; 32])
        })
    );
    assert_eq!(found.tip.finish(&[public(1)]).unwrap(), ledger.tip.head());
    assert_eq!(found.tip.finish(&[public(2)]).unwrap(), ledger.tip.head());
    assert!(matches!(
        found.tip.finish(&[public(3)]),
        Err(LedgerError::Untrusted { .. })
    ));
}

#[test]
fn a_flipped_bit_anywhere_in_a_ledger_is_found() {
    let ledger = Ledger::sample();
    let head = ledger.tip.head();
    for bit in 0..ledger.bytes.len() * 8 {
        let mut bad = ledger.bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(open(&bad, Some(head)).is_err(), "bit {bit}");
    }
}

#[test]
fn a_flipped_bit_in_a_record_is_refused() {
    let mut ledger = Ledger::new();
    let before = ledger.tip.clone();
    let good = ledger.anchor(2);
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(before.clone().push_bytes(&bad).is_err(), "bit {bit}");
    }
    assert!(before.clone().push_bytes(&good).is_ok());
}

#[test]
fn a_torn_append_is_cut_off_and_nothing_else_is() {
    let mut ledger = Ledger::sample();
    let (whole, head) = (ledger.bytes.len(), ledger.tip.head());
    ledger.anchor(1);
    for length in whole..ledger.bytes.len() {
        let mut torn = ledger.bytes[..length].to_vec();
        let found = open(&torn, Some(head)).unwrap();
        assert_eq!(found.end, whole as u64);
        assert_eq!(found.tip.head(), head);
        assert_eq!(
            found.torn.map(|tail| tail.bytes),
            (length > whole).then_some((length - whole) as u64)
        );
        // Some file systems lengthen a file before they fill it.
        torn.resize(ledger.bytes.len() + 100, 0);
        assert_eq!(open(&torn, Some(head)).unwrap().end, whole as u64);
        // Whoever knows of the last record does not take it for torn.
        let known = Some(ledger.tip.head());
        assert!(matches!(
            open(&torn, known),
            Err(ScanError::Lost { size: 6, known: 7 })
        ));
    }
}

#[test]
fn damage_before_the_end_is_no_torn_tail() {
    let ledger = Ledger::sample();
    let mut at = HEADER_BYTES;
    for index in 0..5 {
        let length = Record::length(&ledger.bytes[at..]).unwrap();
        // In the magic, the length, the body and the hash of every record but the last.
        for offset in [0, 5, RECORD_HEAD_BYTES + 3, length - 1] {
            let mut bad = ledger.bytes.clone();
            bad[at + offset] ^= 0x10;
            match open(&bad, None) {
                Err(ScanError::Damaged { index: found, .. }) => assert_eq!(found, index),
                other => panic!("record {index}, byte {offset}: {other:?}"),
            }
        }
        at += length;
    }
}

#[test]
fn an_anchor_that_does_not_continue_is_refused() {
    let mut ledger = Ledger::new();
    ledger.anchor(3);
    type Spoil = fn(&mut Anchor);
    let spoil: [(Spoil, &str); 8] = [
        (|anchor| anchor.volume = VolumeId([9; 16]), "volume"),
        (|anchor| anchor.step += 1, "idb"),
        (|anchor| anchor.ledger_previous = Digest::ZERO, "idb"),
        (|anchor| anchor.previous = Digest::ZERO, "idb"),
        (|anchor| anchor.first = Epoch(5), "scxq2"),
        (
            |anchor| anchor.start = LogOffset(anchor.start.0 + 512),
            "cm1",
        ),
        (|anchor| anchor.term.counter = 0, "term"),
        (|anchor| anchor.term.counter = 2, "phase"),
    ];
    for (spoil, expected) in spoil {
        let mut anchor = ledger.next_anchor(&batch(4, 5));
        spoil(&mut anchor);
        match ledger.clone().push_anchor(anchor) {
            Err(LedgerError::Anchor { part, index: 2, .. }) => assert_eq!(part, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let mut adopted = ledger.next_anchor(&batch(4, 5));
    (adopted.term.counter, adopted.phase) = (2, Phase::Adopt);
    ledger.push_anchor(adopted).unwrap();
}

#[test]
fn an_old_key_signs_nothing_after_its_rotation() {
    let mut ledger = Ledger::sample();
    ledger.signer = 1;
    let anchor = ledger.next_anchor(&batch(8, 8));
    match ledger.push_anchor(anchor) {
        Err(LedgerError::Key {
            source: KeyError::Retired { at: 3, .. },
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
    // A thief who goes back before the rotation makes a history that the new key never signed, and
    // that contradicts every head that was seen since.
    let mut stolen = Ledger::new();
    (0..6).for_each(|_| _ = stolen.anchor(1));
    assert!(matches!(
        stolen.tip.finish(&[public(2)]),
        Err(LedgerError::Untrusted { .. })
    ));
    let seen = Some(Ledger::sample().tip.head());
    assert!(matches!(
        open(&stolen.bytes, seen),
        Err(ScanError::Rule(LedgerError::Fork { size: 6 }))
    ));
}

#[test]
fn swapped_missing_and_doubled_records_are_refused() {
    let mut ledger = Ledger::new();
    let start = ledger.tip.clone();
    let (a, b) = (ledger.anchor(1), ledger.anchor(1));
    assert!(matches!(
        start.clone().push_bytes(&b),
        Err(LedgerError::Index { .. })
    ));
    let mut tip = start.clone();
    tip.push_bytes(&a).unwrap();
    assert!(matches!(
        tip.push_bytes(&a),
        Err(LedgerError::Index {
            expected: 2,
            found: 1
        })
    ));
    let mut other = Ledger::new();
    other.push(&note()).unwrap();
    assert!(matches!(
        other.tip.push_bytes(&b),
        Err(LedgerError::Previous(2))
    ));
}

#[test]
fn the_first_record_enrols_a_key_and_a_local_ledger_holds_notes_only() {
    let mut header = LedgerHeader {
        scope: Scope::Shared,
        volume: VOLUME,
        created_ms: 1,
    };
    let mut shared = Verifier::new(&header, Policy::default());
    let bytes = shared.encode_next(1, &note());
    assert!(matches!(
        shared.push_bytes(&bytes),
        Err(LedgerError::Scope(0))
    ));
    header.scope = Scope::Local;
    let mut local = Verifier::new(&header, Policy::default());
    let bytes = local.encode_next(1, &note());
    local.push_bytes(&bytes).unwrap();
    let anchor = Ledger::new().next_anchor(&batch(1, 1));
    let bytes = local.encode_next(1, &Ledger::new().sign(anchor));
    assert!(matches!(
        local.push_bytes(&bytes),
        Err(LedgerError::Scope(1))
    ));
    let foreign = recover(
        &header.encode(),
        (Scope::Shared, VOLUME),
        Policy::default(),
        None,
    );
    assert!(matches!(foreign, Err(ScanError::Foreign(Scope::Local, _))));
}

#[test]
fn a_file_proves_its_records_and_its_growth() {
    let mut ledger = Ledger::sample();
    let old = ledger.tip.head();
    (0..5).for_each(|_| _ = ledger.anchor(1));
    let new = ledger.tip.head();
    for index in 0..new.size {
        let proof = prove_inclusion(&ledger.bytes, index, new.size).unwrap();
        let mut records = Records::new(&ledger.bytes).unwrap();
        let record = (0..=index)
            .map(|_| records.next_record().unwrap().unwrap().unwrap())
            .last();
        assert_eq!(proof.verify(&new, &record.unwrap().hash), Ok(()));
    }
    let proof = prove_consistency(&ledger.bytes, old.size, new.size).unwrap();
    assert_eq!(grew(&old, &new, &proof), Ok(()));
    let forked = Head {
        root: Digest([1; 32]),
        ..old
    };
    assert!(grew(&forked, &new, &proof).is_err());
    assert!(prove_inclusion(&ledger.bytes, 0, new.size + 1).is_err());
    assert!(prove_inclusion(&ledger.bytes, 9, 5).is_err());
}

#[test]
fn required_algorithms_are_required_where_the_policy_says() {
    let ledger = Ledger::sample();
    let with = |every: &[Algorithm], checkpoints: &[Algorithm]| {
        let policy = Policy {
            every_batch: every.to_vec(),
            checkpoints: checkpoints.to_vec(),
        };
        recover(&ledger.bytes, (Scope::Shared, VOLUME), policy, None).map(|found| found.end)
    };
    let missing = |result, at| match result {
        Err(ScanError::Rule(LedgerError::Key {
            index,
            source: KeyError::Missing(_),
        })) => index == at,
        _ => false,
    };
    assert!(missing(with(&[Algorithm::MlDsa65], &[]), 1));
    assert!(missing(with(&[], &[Algorithm::SlhDsaSha2128f]), 2));
}

#[test]
fn the_same_ledger_exports_the_same_bytes() {
    let export = || {
        let ledger = Ledger::sample();
        let mut export = Export::begin(VOLUME, ledger.tip.state(), Vec::new()).unwrap();
        let mut records = Records::new(&ledger.bytes).unwrap();
        while let Some(record) = records.next_record().unwrap() {
            export.step(&record.unwrap()).unwrap();
        }
        String::from_utf8(export.finish().unwrap()).unwrap()
    };
    let text = export();
    assert_eq!(export(), text);
    assert_eq!(text.matches("<step ").count(), 6);
    assert!(text.contains(&format!("<state hash=\"blake3:{}\">", Digest([6; 32]))));
}
