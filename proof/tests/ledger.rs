//! A fixed ledger: its bytes, its hashes and its XML never change, and old bytes stay readable.
#![forbid(unsafe_code)]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hn4::types::{ChainHash, Epoch, LaneId, Lba, LogOffset, NodeId, Term, VolumeId};
use hn4_proof::anchor::{Anchor, Phase, SignedAnchor, StateAt, Step};
use hn4_proof::batch::{Batch, BatchPolicy, Batcher};
use hn4_proof::hash::Digest;
use hn4_proof::leaf::{Coordinates, EpochBuilder, EpochRoot, LeafKind, RecordLeaf, payload_hash};
use hn4_proof::ledger::scan::{Records, recover};
use hn4_proof::ledger::verify::{Policy, Verifier};
use hn4_proof::ledger::xml::Export;
use hn4_proof::ledger::{Body, Event, LedgerHeader, Note, Scope};
use hn4_proof::sign::keyring::KeyChange;
use hn4_proof::sign::{Algorithm, SecretKey};

const VOLUME: VolumeId = VolumeId(*b"golden volume id");
const NODE: NodeId = NodeId(*b"golden node id  ");

fn key(seed: u8) -> SecretKey {
    SecretKey::from_seed(Algorithm::Ed25519, &[seed; 32]).unwrap()
}

fn record(epoch: u64, lane: u16, kind: LeafKind, lba: u64, sectors: u64) -> RecordLeaf {
    let at = Coordinates {
        epoch: Epoch(epoch),
        lane: LaneId(lane),
        kind,
        lba: Lba(lba),
        sectors,
    };
    let content =
        |bytes: u64| -> Vec<u8> { (0..bytes).map(|at| (at % 255).to_le_bytes()[0]).collect() };
    let payload = match kind {
        LeafKind::Data => payload_hash(Lba(lba), &content(sectors * 512)),
        LeafKind::Zeroes | LeafKind::Trim => Digest::ZERO,
    };
    RecordLeaf { at, payload }
}

fn epoch(number: u64) -> EpochRoot {
    let mut builder = EpochBuilder::new(Epoch(number), ChainHash([number.to_le_bytes()[0]; 32]));
    for record in [
        record(number, 0, LeafKind::Data, 8 * number, 8),
        record(number, 0, LeafKind::Data, 1003, 37),
        record(number, 1, LeafKind::Trim, 1 << 20, 1 << 21),
        record(number, 2, LeafKind::Zeroes, 4096, 1),
    ] {
        builder.record(&record).unwrap();
    }
    builder.finish()
}

fn batches() -> Vec<Batch> {
    let policy = BatchPolicy {
        max_age: Duration::MAX,
        max_epochs: 2,
        max_bytes: u64::MAX,
    };
    let mut batcher = Batcher::new(VOLUME, policy, Epoch(1), LogOffset(8192));
    let frame = |number: u64| (LogOffset(number * 8192), LogOffset(number * 8192 + 8192));
    let push = |number| {
        batcher
            .push(Duration::ZERO, &epoch(number), frame(number))
            .unwrap()
    };
    (1..=4).filter_map(push).collect()
}

fn write() -> Vec<u8> {
    let header = LedgerHeader {
        scope: Scope::Shared,
        volume: VOLUME,
        created_ms: 1_700_000_000_000,
    };
    let mut tip = Verifier::new(&header, Policy::default());
    let mut bytes = header.encode();
    let mut push = |tip: &mut Verifier, body: &Body| {
        let record = tip.encode_next(1_700_000_000_000 + 1000 * tip.next_index(), body);
        tip.push_bytes(&record).unwrap();
        bytes.extend_from_slice(&record);
    };
    let change = |tip: &Verifier, retire: Option<u8>, enroll: u8, by: &[&SecretKey]| {
        let enroll = Some((NODE, key(enroll).public().clone()));
        let retire = retire.map(|seed| key(seed).public().id());
        let mut change = KeyChange {
            retire,
            enroll,
            signatures: Vec::new(),
        };
        change
            .sign((VOLUME, tip.next_index(), &tip.previous()), by)
            .unwrap();
        Body::Key(change)
    };
    let body = change(&tip, None, 1, &[&key(1)]);
    push(&mut tip, &body);
    for (batch, seed) in batches().iter().zip(1..) {
        let step = Step {
            term: Term {
                counter: 1,
                node: NODE,
            },
            phase: if seed == 1 {
                Phase::Commit
            } else {
                Phase::Checkpoint
            },
            step: tip.next_index(),
            ledger_previous: tip.previous(),
            previous: tip.last_anchor(),
            state: (seed == 2).then_some(StateAt {
                epoch: Epoch(2),
                root: Digest([5; 32]),
            }),
            dictionary: (seed == 2).then_some([9; 32]),
            bytes: (73_728, 40_000),
            time_ms: 1_700_000_000_500,
        };
        let anchor = Anchor::new(batch, step);
        let signatures = vec![key(seed).sign(&anchor.hash()).unwrap()];
        push(
            &mut tip,
            &Body::Anchor(Box::new(SignedAnchor { anchor, signatures })),
        );
        if seed == 1 {
            let body = change(&tip, Some(1), 2, &[&key(1), &key(2)]);
            push(&mut tip, &body);
        }
    }
    let note = Note {
        event: Event::DeepVerified,
        epoch: Epoch(4),
        lba: Lba(0),
        sectors: 0,
        digest: Digest([7; 32]),
        text: "b3sum".to_owned(),
    };
    push(&mut tip, &Body::Note(note));
    bytes
}

fn export(ledger: &Vec<u8>) -> String {
    let found = recover(ledger, (Scope::Shared, VOLUME), Policy::default(), None).unwrap();
    let mut export = Export::begin(VOLUME, found.tip.state(), Vec::new()).unwrap();
    let mut records = Records::new(ledger).unwrap();
    while let Some(record) = records.next_record().unwrap() {
        export.step(&record.unwrap()).unwrap();
    }
    String::from_utf8(export.finish().unwrap()).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    let line = |line: &[u8]| {
        line.iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    bytes
        .chunks(32)
        .map(line)
        .fold(String::new(), |text, line| text + &line + "\n")
}

fn check(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("HN4_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert!(golden == found, "{name} is not what it was:\n{found}");
}

#[test]
fn the_ledger_is_the_golden_one_bit_for_bit() {
    let bytes = write();
    check("ledger_v1.hex", &hex(&bytes));
    let found = recover(&bytes, (Scope::Shared, VOLUME), Policy::default(), None).unwrap();
    let hashes = format!(
        "payload hash {}\nrecord leaf {}\nepoch 1 {}\nproof hash {}\nlane 0 {}\n\
         ledger head {} {}\nkey id {}\n",
        record(1, 0, LeafKind::Data, 1003, 37).payload,
        record(1, 0, LeafKind::Data, 1003, 37).digest(),
        epoch(1).root,
        batches()[0].proof_hash,
        batches()[0].lanes[0].hash,
        found.tip.head().size,
        found.tip.head().root,
        key(1).public().id(),
    );
    check("hashes_v1.txt", &hashes);
}

#[test]
fn the_export_is_the_golden_one_and_obeys_the_schema() {
    let text = export(&write());
    check("idb_v1.xml", &text);
    if !common::has_tool("xmllint") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/idb.xsd");
    let is_valid = |text: &str| {
        let path = folder.path().join("IDB.xml");
        std::fs::write(&path, text).unwrap();
        let command = Command::new("xmllint")
            .arg("--noout")
            .arg("--schema")
            .args([&schema, &path])
            .output();
        command.unwrap().status.success()
    };
    assert!(is_valid(&text));
    // The schema is no rubber stamp.
    assert!(!is_valid(&text.replacen("<cause", "<effect", 1)));
    assert!(!is_valid(&text.replacen("blake3:", "sha256:", 1)));
    assert!(!is_valid(&text.replacen(
        "ref=\"anchor\"",
        "ref=\"nothing\"",
        1
    )));
    assert!(!is_valid(&text.replacen(
        "step id=\"1\"",
        "step id=\"0\"",
        1
    )));
    assert!(!is_valid(&text.replacen("x:scxq7:idb", "x:other", 1)));
}
