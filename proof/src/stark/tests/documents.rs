//! Documents: what they are bound to, and what not even the holder of the key can make of them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hn4::types::{LogOffset, NodeId, Term};

use super::*;
use crate::anchor::{Anchor, SignedAnchor};
use crate::envelope::{Envelope, SignatureText};
use crate::ledger::tests::{Ledger, key, public};
use crate::ledger::verify::Policy;
use crate::ledger::{Body, Record};
use crate::sign::Algorithm;

const NODE: NodeId = NodeId([2; 16]);
const TIME_MS: u64 = 1_700_000_000_000;

/// A ledger's anchors of one epoch each.
fn anchors(count: u64) -> Vec<SignedAnchor> {
    let mut ledger = Ledger::new();
    let mut anchor = |_| match Record::decode(&ledger.anchor(1)).unwrap().0.body {
        Body::Anchor(signed) => *signed,
        other => panic!("an anchor, not {other:?}"),
    };
    (0..count).map(&mut anchor).collect()
}

fn part(anchors: &[SignedAnchor], first: u64, last: u64) -> Result<Part, StarkError> {
    let mut collector = Collector::new(VOLUME, Epoch(first), Epoch(last));
    anchors.iter().try_for_each(|it| collector.push(it))?;
    collector.finish()
}

/// Epochs 11 to 266 of a ledger with 300.
fn document() -> &'static (Vec<SignedAnchor>, Envelope) {
    static DOCUMENT: OnceLock<(Vec<SignedAnchor>, Envelope)> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        let anchors = anchors(300);
        let part = part(&anchors, 11, 266).unwrap();
        let envelope = make(&part, (NODE, &[&key(1)]), TIME_MS).unwrap();
        (anchors, envelope)
    })
}

fn check(envelope: &Envelope) -> Result<Statement, StarkError> {
    let asked = (VOLUME, Epoch(11), Epoch(266));
    verify(envelope, asked, &[public(1)], &Policy::default())
}

fn parts(envelope: &Envelope) -> Parts {
    Parts::decode(&BASE64.decode(&envelope.proof.proof_bytes).unwrap()).unwrap()
}

/// The document with other contents, signed by the node all the same.
fn again(change: impl FnOnce(&mut Parts)) -> Envelope {
    let mut parts = parts(&document().1);
    change(&mut parts);
    let signature = key(1).sign(&parts.statement.hash()).unwrap();
    parts.envelope(&[signature])
}

#[test]
fn stark_a_document_holds_for_its_volume_range_and_key_only() {
    let (_, envelope) = document();
    let statement = check(envelope).unwrap();
    assert_eq!((statement.index, statement.count), (10, 256));
    let ask = |volume, first, last, seed| {
        let asked = (volume, Epoch(first), Epoch(last));
        verify(envelope, asked, &[public(seed)], &Policy::default())
    };
    assert!(matches!(
        ask(VolumeId([9; 16]), 11, 266, 1),
        Err(StarkError::OtherVolume { .. })
    ));
    for (first, last) in [(10, 266), (12, 266), (11, 265), (11, 267), (266, 11)] {
        let refused = ask(VOLUME, first, last, 1);
        assert!(
            matches!(refused, Err(StarkError::Range { .. })),
            "{first}-{last}"
        );
    }
    let refused = ask(VOLUME, 11, 266, 9);
    assert!(matches!(
        refused,
        Err(StarkError::Key {
            what: "statement",
            ..
        })
    ));
    let policy = Policy {
        every_batch: vec![Algorithm::MlDsa65],
        checkpoints: Vec::new(),
    };
    let asked = (VOLUME, Epoch(11), Epoch(266));
    let refused = verify(envelope, asked, &[public(1)], &policy);
    let source = KeyError::Missing(Algorithm::MlDsa65);
    let what = "statement";
    assert_eq!(refused, Err(StarkError::Key { what, source }));
    // Both forms of the document are the same.
    let json = Envelope::from_json(&envelope.to_json().unwrap());
    assert_eq!(json.as_ref(), Ok(envelope));
    let protobuf = Envelope::from_protobuf(&envelope.to_protobuf().unwrap());
    assert_eq!(protobuf.as_ref(), Ok(envelope));
}

#[test]
fn stark_every_field_of_a_document_is_bound() {
    type Spoil = fn(&mut Envelope);
    let spoil: [Spoil; 10] = [
        |bad| bad.schema.push('x'),
        |bad| bad.proof.kind = "merkle-batch".to_owned(),
        |bad| bad.subject.byte_length += 1,
        |bad| bad.subject.version = "11-267".to_owned(),
        |bad| bad.compression.ratio = 0.25,
        |bad| bad.integrity.root_hash = Link::start(VOLUME).to_string(),
        |bad| bad.integrity.chunk_hashes.swap(1, 2),
        |bad| bad.timestamp.push(' '),
        |bad| bad.signatures.clear(),
        |bad| bad.proof.proof_bytes.push('A'),
    ];
    for (at, spoil) in spoil.iter().enumerate() {
        let mut bad = document().1.clone();
        spoil(&mut bad);
        assert!(check(&bad).is_err(), "{at}");
    }
    let good = BASE64.decode(&document().1.proof.proof_bytes).unwrap();
    // Version, statement and anchors come first; of the argument some places.
    let before = good.len() - parts(&document().1).argument.len();
    for bit in (0..before * 8).chain(places(100, good.len() * 8)) {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let mut bad = document().1.clone();
        bad.proof.proof_bytes = BASE64.encode(bytes);
        assert!(check(&bad).is_err(), "bit {bit}");
    }
}

/// An anchor of the document changed, and signed again.
fn with_anchor(is_first: bool, change: fn(&mut Anchor)) -> Envelope {
    again(|parts| {
        let signed = match is_first {
            true => &mut parts.first,
            false => &mut parts.last,
        };
        change(&mut signed.anchor);
        signed.signatures = vec![key(1).sign(&signed.anchor.hash()).unwrap()];
        parts.statement.first = parts.first.anchor.hash();
        parts.statement.last = parts.last.anchor.hash();
    })
}

#[test]
fn stark_whoever_holds_the_key_cannot_state_what_the_anchors_contradict() {
    type Spoil = fn(&mut Statement);
    let statements: [(Spoil, &str); 9] = [
        (|it| it.count = 1, "number of batches"),
        (|it| it.count = BATCHES_MAX as u64 + 1, "number of batches"),
        (|it| it.count = u64::MAX, "number of batches"),
        (|it| it.first = Digest::ZERO, "first anchor"),
        (|it| it.last = it.first, "last anchor"),
        (|it| it.count = 257, "epochs between the anchors"),
        (|it| it.index = 11, "number of batches before the first"),
        (|it| it.index = 0, "anchor before the first"),
        (|it| it.raw_bytes = 1, "raw bytes"),
    ];
    for (spoil, part) in statements {
        let bad = again(|parts| spoil(&mut parts.statement));
        assert_eq!(check(&bad), Err(StarkError::Statement(part)));
    }
    let bad = again(|parts| parts.statement.packed_bytes = 1);
    assert_eq!(check(&bad), Err(StarkError::Statement("packed bytes")));
    type Change = fn(&mut Anchor);
    let changed: [(bool, Change, &str); 6] = [
        (
            true,
            |it| it.volume = VolumeId([9; 16]),
            "volume of an anchor",
        ),
        (
            true,
            |it| it.last = Epoch(266),
            "epochs between the anchors",
        ),
        (
            true,
            |it| it.end = LogOffset(1 << 40),
            "log between the anchors",
        ),
        (false, |it| it.step -= 1, "records between the anchors"),
        (
            true,
            |it| {
                it.term = Term {
                    counter: 2,
                    node: NODE,
                }
            },
            "terms",
        ),
        (
            true,
            |it| it.previous = Digest::ZERO,
            "anchor before the first",
        ),
    ];
    for (is_first, change, part) in changed {
        let bad = with_anchor(is_first, change);
        assert_eq!(check(&bad), Err(StarkError::Statement(part)));
    }
}

#[test]
fn stark_whoever_holds_the_key_cannot_state_what_is_not_proven() {
    let elsewhere = Link::start(VolumeId([9; 16]));
    let argument = Err(StarkError::Argument);
    // Other ends of the chain, fewer batches, another time: the argument is for one statement only.
    assert_eq!(
        check(&again(|parts| parts.statement.start = elsewhere)),
        argument
    );
    assert_eq!(
        check(&again(|parts| parts.statement.end = elsewhere)),
        argument
    );
    assert_eq!(check(&again(|parts| parts.statement.count = 255)), argument);
    assert_eq!(
        check(&again(|parts| parts.statement.time_ms += 1)),
        argument
    );
    // Another root at an end.
    let change: fn(&mut Anchor) = |it| it.proof_hash = Digest([5; 32]);
    assert_eq!(check(&with_anchor(true, change)), argument);
    assert_eq!(check(&with_anchor(false, change)), argument);
    // A ledger in which one batch is missing leads to another end.
    let (anchors, envelope) = document();
    let mut gap = anchors.clone();
    gap.remove(100);
    let gap = part(&gap, 11, 266).unwrap();
    let whole = parts(envelope).statement;
    assert_ne!(gap.end, whole.end);
    let claim = Statement {
        count: 255,
        ..whole
    }
    .claim(&gap.first.anchor, &gap.last.anchor);
    if !PROVER_CHECKS {
        let made = argument::prove(&claim, &gap.roots).unwrap();
        assert_eq!(argument::verify(&claim, &made), Err(StarkError::Argument));
    }
    // Signed by nobody again.
    let mut bad = envelope.clone();
    let other = key(2).sign(&whole.hash()).unwrap();
    bad.signatures = vec![SignatureText::from(&other)];
    assert!(matches!(check(&bad), Err(StarkError::Key { .. })));
}

#[test]
fn stark_the_beginning_of_a_ledger_and_neighbours_are_bound_exactly() {
    let anchors = anchors(3);
    let asked = (VOLUME, Epoch(1), Epoch(2));
    let two = part(&anchors, 1, 2).unwrap();
    let check = |part: &Part| {
        let envelope = make(part, (NODE, &[&key(1)]), TIME_MS)?;
        verify(&envelope, asked, &[public(1)], &Policy::default())
    };
    let statement = check(&two).unwrap();
    assert_eq!((statement.index, statement.count), (0, 2));
    assert_eq!(statement.start, Link::start(VOLUME));
    // A chain that begins elsewhere, though nothing comes before it.
    let mut elsewhere = two.clone();
    elsewhere.start = Link::start(VolumeId([9; 16]));
    let roots = elsewhere.roots.iter();
    elsewhere.end = roots.fold(elsewhere.start, |link, root| link.then(root));
    let part = "link before the first batch of the ledger";
    assert_eq!(check(&elsewhere), Err(StarkError::Statement(part)));
    // Two that are not neighbours, as a chain of two.
    let mut gap = two.clone();
    gap.last.anchor.previous = Digest([1; 32]);
    gap.last.signatures = vec![key(1).sign(&gap.last.anchor.hash()).unwrap()];
    let part = "anchor before the last";
    assert_eq!(check(&gap), Err(StarkError::Statement(part)));
}

#[test]
fn stark_a_range_that_the_ledger_does_not_hold_or_that_is_too_long_is_not_collected() {
    let (anchors, _) = document();
    let (first, last) = (Epoch(11), Epoch(301));
    let refused = part(anchors, 11, 301).err();
    assert_eq!(refused, Some(StarkError::NotAnchored { first, last }));
    assert_eq!(part(anchors, 11, 11).err(), Some(StarkError::Batches(1)));
    let mut collector = Collector::new(VOLUME, Epoch(11), Epoch(u64::MAX));
    let mut more = anchors.iter().chain(std::iter::repeat(&anchors[20]));
    let refused = more.find_map(|it| collector.push(it).err());
    assert_eq!(refused, Some(StarkError::Batches(BATCHES_MAX as u64 + 1)));
    // What comes after the range is left out.
    let part = part(anchors, 11, 20).unwrap();
    assert_eq!((part.index, part.roots.len()), (10, 10));
    let before = anchors[..10].iter();
    let link = before.fold(Link::start(VOLUME), |link, it| {
        link.then(&it.anchor.proof_hash)
    });
    assert_eq!(part.start, link);
}
