//! What succinct proofs of so many batches take on this machine: `stark_speed 256 1000 4096`.
#![forbid(unsafe_code)]

use std::time::Instant;

use hn4::types::{ChainHash, Epoch, LogOffset, NodeId, Term, VolumeId};
use hn4_proof::anchor::{Anchor, Phase, SignedAnchor};
use hn4_proof::hash::Digest;
use hn4_proof::ledger::verify::Policy;
use hn4_proof::sign::{Algorithm, SecretKey};
use hn4_proof::stark::{Link, Part, make, verify};

const VOLUME: VolumeId = VolumeId([1; 16]);
const NODE: NodeId = NodeId([2; 16]);

fn root(number: u64) -> Digest {
    Digest(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

/// The anchor of one epoch, in a ledger that begins with one key.
fn anchor(number: u64, key: &SecretKey) -> SignedAnchor {
    let anchor = Anchor {
        volume: VOLUME,
        term: Term {
            counter: 1,
            node: NODE,
        },
        phase: Phase::Commit,
        step: number,
        ledger_previous: Digest::ZERO,
        previous: match number {
            1 => Digest::ZERO,
            _ => root(0),
        },
        first: Epoch(number),
        last: Epoch(number),
        chain: ChainHash([0; 32]),
        start: LogOffset(number * 4096),
        end: LogOffset((number + 1) * 4096),
        proof_hash: root(number),
        state: None,
        dictionary: None,
        raw_bytes: 4096,
        packed_bytes: 4096,
        time_ms: 0,
        lanes: Vec::new(),
    };
    let signature = key.sign(&anchor.hash()).expect("signed");
    SignedAnchor {
        anchor,
        signatures: vec![signature],
    }
}

/// Most memory that the process has had, in MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or_default() / 1024
}

fn main() {
    let key = SecretKey::from_seed(Algorithm::Ed25519, &[1; 32]).expect("a key");
    println!("batches  roots KiB  document KiB  made s  checked ms  peak MiB");
    for count in std::env::args().skip(1) {
        let count: u64 = count.parse().expect("a number of batches");
        let roots: Vec<Digest> = (1..=count).map(root).collect();
        let start = Link::start(VOLUME);
        let part = Part {
            index: 0,
            start,
            end: roots.iter().fold(start, |link, root| link.then(root)),
            roots,
            first: anchor(1, &key),
            last: anchor(count, &key),
            raw_bytes: count * 4096,
            packed_bytes: count * 4096,
        };
        let begun = Instant::now();
        let document = make(&part, (NODE, &[&key]), 0).expect("made");
        let made = begun.elapsed();
        let begun = Instant::now();
        let asked = (VOLUME, Epoch(1), Epoch(count));
        let trusted = [key.public().clone()];
        verify(&document, asked, &trusted, &Policy::default()).expect("good");
        println!(
            "{count:7}  {:9}  {:12}  {:6.2}  {:10.1}  {:8}",
            count * 32 / 1024,
            document.to_json().expect("a document").len() / 1024,
            made.as_secs_f64(),
            begun.elapsed().as_secs_f64() * 1000.0,
            peak_mib()
        );
    }
}
