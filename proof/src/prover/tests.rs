//! A primary and a replica in memory: what each sends goes to the other, and the rows of the table
//! of failures that are this crate's to keep.

use hn4::log::frame::{FrameParams, encode_head};
use hn4::log::{LaneEntry, Record, RecordKind};
use hn4::types::{Incarnation, LaneId, Lba, LogOffset, VolumeId};

use super::*;
use crate::anchor::Phase;
use crate::ledger::file::MemoryMedium;
use crate::ledger::scan::Records;
use crate::ledger::{Body, HEADER_BYTES};
use crate::sign::{Algorithm, SecretKey};

mod branch;
mod gate;
mod keys;

const GATE: u64 = 8 << 20;

mod questions;
mod recall;
mod shown;

fn identity() -> LogIdentity {
    LogIdentity {
        volume: VolumeId([4; 16]),
        birth_nonce: [5; 16],
        size_bytes: 1 << 20,
        sector_bytes: 512,
    }
}

fn node(index: u8) -> NodeId {
    NodeId([index; 16])
}

fn term(counter: u64, index: u8) -> Term {
    let node = node(index);
    Term { counter, node }
}

fn now(ms: u64) -> Now {
    Now {
        time: Duration::from_millis(ms),
        wall_ms: 1_700_000_000_000 + ms,
    }
}

fn key(seed: u8) -> SecretKey {
    SecretKey::from_seed(Algorithm::Ed25519, &[seed; 32]).unwrap()
}

fn open(index: u8, medium: MemoryMedium) -> Prover<MemoryMedium> {
    let opened = LedgerFile::open(medium, identity().volume);
    let (ledger, tip, torn) = opened.expect("a good ledger");
    assert_eq!(torn, None);
    let setup = Setup {
        identity: identity(),
        node: node(index),
        keys: key(index).into(),
        required: Policy::default(),
        checkpoint_age: Duration::from_secs(60),
        policy: BatchPolicy::for_log(64 << 20),
        gate: true,
        hold_bytes: GATE,
    };
    Prover::new(setup, ledger, tip)
}

/// A log: frames of one block each.
#[derive(Clone, Default)]
struct Log {
    frames: Vec<(Epoch, ChainHash, Vec<u8>)>,
}

impl Log {
    fn tip(&self) -> (Epoch, ChainHash) {
        let last = self.frames.last();
        last.map_or((Epoch(0), ChainHash::default()), |(epoch, chain, _)| {
            (*epoch, *chain)
        })
    }

    fn write(&mut self, byte: u8) {
        let payload = [byte; 4096];
        let record = Record {
            lba: Lba(8),
            sectors: 8,
            kind: RecordKind::Data,
            payload_sector: 0,
            crc32c: crc32c::crc32c(&payload),
        };
        let (epoch, previous) = self.tip();
        let params = FrameParams {
            identity: &identity(),
            epoch: epoch.next(),
            offset: LogOffset(epoch.0 * 8192),
            term: term(1, 1),
            incarnation: Incarnation(1),
            durable_through: epoch,
            previous,
            sealed_ms: 0,
            checkpoint_mark: false,
            lanes: &[LaneEntry {
                lane: LaneId(0),
                records: 1,
            }],
            records: &[record],
            payload_bytes: 4096,
        };
        let mut bytes = Vec::new();
        let (_, chain) = encode_head(&params, &mut bytes);
        bytes.extend_from_slice(&payload);
        self.frames.push((epoch.next(), chain, bytes));
    }

    fn feed(&self, prover: &mut Prover<MemoryMedium>, at: u64) {
        let next = prover.hashed_tip().0.next();
        for (epoch, _, bytes) in self.frames.iter().filter(|(epoch, ..)| *epoch >= next) {
            let frame = Frame::Memory(bytes);
            prover.frame(now(at), *epoch, frame).expect("a good frame");
        }
    }
}

/// What came out of a prover, but for messages.
#[derive(Default, Debug)]
struct Heard {
    proven: Epoch,
    gate: Option<bool>,
    refused: Option<String>,
    /// What was refused speaks against the log.
    contradicted: bool,
}

fn drain(prover: &mut Prover<MemoryMedium>, heard: &mut Heard) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some(out) = prover.poll() {
        match out {
            Out::Send { peer: 0, bytes, .. } => messages.push(bytes),
            Out::Proven(epoch, _) => heard.proven = epoch,
            Out::Gate(gate) => heard.gate = Some(gate),
            Out::Refused { why, of } => {
                heard.refused = Some(why);
                heard.contradicted |= of.is_some();
            }
            _ => {}
        }
    }
    messages
}

/// Two nodes; each is peer 0 of the other.
struct Pair {
    primary: Prover<MemoryMedium>,
    replica: Prover<MemoryMedium>,
    heard: [Heard; 2],
}

impl Pair {
    fn new() -> Self {
        let mut pair = Self {
            primary: open(1, MemoryMedium::default()),
            replica: open(2, MemoryMedium::default()),
            heard: Default::default(),
        };
        let begin = (Epoch(0), ChainHash::default());
        pair.primary.standing(now(0), Some(term(1, 1))).unwrap();
        pair.primary.cut(now(0), begin.0, begin.1).unwrap();
        pair.replica.cut(now(0), begin.0, begin.1).unwrap();
        pair.connect(term(1, 1));
        pair
    }

    fn connect(&mut self, term: Term) {
        let state = |node| PeerState {
            node,
            session: 1,
            term,
            proves: true,
            max_epoch_bytes: 1 << 20,
        };
        self.primary.connected(0, state(self.replica.node));
        self.replica.connected(0, state(self.primary.node));
        self.replica.fed_by(0).unwrap();
    }

    /// Carries messages until nothing moves.
    fn settle(&mut self) {
        loop {
            let to_replica = drain(&mut self.primary, &mut self.heard[0]);
            let to_primary = drain(&mut self.replica, &mut self.heard[1]);
            if to_replica.is_empty() && to_primary.is_empty() {
                return;
            }
            for message in to_replica {
                self.replica.message(now(0), 0, &message).unwrap();
            }
            for message in to_primary {
                self.primary.message(now(0), 0, &message).unwrap();
            }
        }
    }
}

fn log_of(bytes: &[u8]) -> Log {
    let mut log = Log::default();
    bytes.iter().for_each(|&byte| log.write(byte));
    log
}

#[test]
fn an_epoch_is_proven_at_the_replica_only_after_its_anchor_is_in_both_ledgers() {
    let mut pair = Pair::new();
    let log = log_of(&[1, 2, 3]);
    log.feed(&mut pair.replica, 0);
    pair.settle();
    assert_eq!(
        pair.heard[1].proven,
        Epoch(0),
        "no proof: durable, not applied"
    );
    log.feed(&mut pair.primary, 0);
    pair.settle();
    assert_eq!(pair.heard[0].proven, Epoch(0), "the batch is open");
    assert_eq!(pair.primary.deadline(), Some(Duration::from_millis(50)));
    pair.primary.tick(now(50)).unwrap();
    pair.settle();
    assert_eq!(
        (pair.heard[0].proven, pair.heard[1].proven),
        (Epoch(3), Epoch(3))
    );
    let ledgers = [&pair.primary, &pair.replica].map(|node| node.ledger().medium().clone());
    assert_eq!(ledgers[0], ledgers[1], "byte for byte");
    let mut records = Records::new(&ledgers[0]).unwrap();
    let mut kinds = Vec::new();
    while let Some(Ok(record)) = records.next_record().unwrap() {
        kinds.push(match record.body {
            Body::Key(_) => 'k',
            Body::Anchor(_) => 'a',
            Body::Note(_) => 'n',
            Body::Checkpoint(_) => 'c',
            Body::Inspection(_) => 'i',
        });
    }
    assert_eq!(kinds, ['k', 'k', 'a'], "both nodes' keys, then the anchor");
}

#[test]
fn an_anchor_that_comes_before_its_epochs_waits_for_them() {
    let mut pair = Pair::new();
    let log = log_of(&[1, 2]);
    log.feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    pair.settle();
    assert_eq!(pair.heard[1].proven, Epoch(0));
    log.feed(&mut pair.replica, 0);
    pair.settle();
    assert_eq!(pair.heard[1].proven, Epoch(2));
}

#[test]
fn a_proof_that_fails_commits_nothing_and_the_peer_is_suspect() {
    let mut pair = Pair::new();
    log_of(&[1, 2]).feed(&mut pair.primary, 0);
    // Another payload with another checksum: the headers differ, too.
    log_of(&[1, 9]).feed(&mut pair.replica, 0);
    pair.primary.tick(now(60)).unwrap();
    let before = pair.replica.ledger().records();
    pair.settle();
    let why = pair.heard[1].refused.as_deref().unwrap_or_default();
    assert!(why.contains("chain of frame headers"), "{why}");
    assert!(pair.heard[1].contradicted);
    assert_eq!(pair.heard[1].proven, Epoch(0));
    assert!(pair.replica.ledger().records() <= before + 2, "keys only");
    assert!(!pair.replica.follow.has_source());
}

#[test]
fn a_flipped_bit_in_a_message_of_records_is_never_taken() {
    let mut pair = Pair::new();
    let log = log_of(&[1]);
    log.feed(&mut pair.replica, 0);
    log.feed(&mut pair.primary, 0);
    pair.settle();
    pair.primary.tick(now(60)).unwrap();
    let messages = drain(&mut pair.primary, &mut pair.heard[0]);
    let good = messages.first().expect("the anchor was asked for").clone();
    let records = pair.replica.ledger().records();
    for bit in (0..good.len() * 8).step_by(7) {
        let mut replica = open(2, pair.replica.ledger().medium().clone());
        replica.cut(now(0), Epoch(0), ChainHash::default()).unwrap();
        log.feed(&mut replica, 0);
        let state = pair.replica.waiting.state(0).unwrap();
        replica.connected(0, state);
        replica.fed_by(0).unwrap();
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        replica.message(now(0), 0, &bad).unwrap();
        assert_eq!(replica.ledger().records(), records, "bit {bit}");
    }
    pair.replica.message(now(0), 0, &good).unwrap();
    pair.settle();
    assert_eq!(pair.heard[1].proven, Epoch(1));
}

#[test]
fn a_restart_of_either_side_goes_on_with_its_ledger() {
    let mut pair = Pair::new();
    let mut log = log_of(&[1, 2]);
    log.feed(&mut pair.primary, 0);
    log.feed(&mut pair.replica, 0);
    pair.primary.tick(now(60)).unwrap();
    pair.settle();
    log.write(3);
    let (epoch, chain) = (Epoch(2), log.frames[1].1);
    pair.primary = open(1, pair.primary.ledger().medium().clone());
    pair.replica = open(2, pair.replica.ledger().medium().clone());
    let start = Out::Start {
        after: (epoch, chain),
        credit: CREDIT_BYTES,
    };
    assert_eq!(pair.primary.poll(), Some(start));
    pair.primary.standing(now(0), Some(term(1, 1))).unwrap();
    pair.primary.cut(now(0), epoch, chain).unwrap();
    pair.replica.cut(now(0), epoch, chain).unwrap();
    pair.connect(term(1, 1));
    log.feed(&mut pair.primary, 100);
    log.feed(&mut pair.replica, 100);
    pair.primary.tick(now(160)).unwrap();
    pair.settle();
    assert_eq!(pair.heard[1].proven, Epoch(3));
    assert!(pair.primary.ledger().medium().aside.is_empty());
}

#[test]
fn a_promoted_replica_adopts_the_tail_and_the_old_primary_follows() {
    let mut pair = Pair::new();
    let mut log = log_of(&[1, 2]);
    log.feed(&mut pair.primary, 0);
    log.feed(&mut pair.replica, 0);
    pair.primary.tick(now(60)).unwrap();
    pair.settle();
    // The old primary anchors once more, and nobody hears of it.
    log.write(3);
    log.feed(&mut pair.primary, 100);
    log.feed(&mut pair.replica, 100);
    pair.primary.disconnected(0);
    pair.replica.disconnected(0);
    pair.primary.tick(now(160)).unwrap();
    let _ = drain(&mut pair.primary, &mut pair.heard[0]);
    let mut pair = Pair {
        primary: pair.replica,
        replica: pair.primary,
        heard: Default::default(),
    };
    pair.replica.standing(now(200), None).unwrap();
    pair.primary.standing(now(200), Some(term(2, 2))).unwrap();
    pair.primary.tick(now(260)).unwrap();
    pair.connect(term(2, 2));
    pair.settle();
    assert_eq!(pair.heard[0].proven, Epoch(3));
    let ledgers = [&pair.primary, &pair.replica].map(|node| node.ledger().medium().bytes.clone());
    assert_eq!(ledgers[0], ledgers[1]);
    assert_eq!(
        pair.replica.ledger().medium().aside.len(),
        1,
        "kept, not destroyed"
    );
    let medium = pair.primary.ledger().medium().clone();
    let mut records = Records::new(&medium).unwrap();
    let mut phases = Vec::new();
    while let Some(Ok(record)) = records.next_record().unwrap() {
        if let Body::Anchor(signed) = record.body {
            phases.push((signed.anchor.phase, signed.anchor.term.counter));
        }
    }
    assert_eq!(phases, [(Phase::Commit, 1), (Phase::Adopt, 2)]);
}

#[test]
fn a_ledger_that_is_much_longer_gives_way_when_the_new_primary_signs_something() {
    for more in 1..24 {
        let mut pair = Pair::new();
        let mut log = log_of(&[1, 2]);
        log.feed(&mut pair.primary, 0);
        log.feed(&mut pair.replica, 0);
        pair.primary.tick(now(60)).unwrap();
        pair.settle();
        pair.primary.disconnected(0);
        pair.replica.disconnected(0);
        for round in 1..=more {
            log.write(3);
            log.feed(&mut pair.primary, round * 100);
            pair.primary.tick(now(round * 100 + 60)).unwrap();
        }
        let _ = drain(&mut pair.primary, &mut pair.heard[0]);
        log.feed(&mut pair.replica, 5000);
        let mut pair = Pair {
            primary: pair.replica,
            replica: pair.primary,
            heard: Default::default(),
        };
        pair.replica.standing(now(5000), None).unwrap();
        pair.primary.standing(now(5000), Some(term(2, 2))).unwrap();
        // They talk before there is anything to be said.
        pair.connect(term(2, 2));
        pair.settle();
        pair.primary.tick(now(5060)).unwrap();
        pair.settle();
        assert_eq!(pair.heard[0].proven, log.tip().0);
        let ledgers =
            [&pair.primary, &pair.replica].map(|node| node.ledger().medium().bytes.clone());
        assert_eq!(ledgers[0], ledgers[1], "{more} anchors more");
    }
}

#[test]
fn a_replica_of_a_primary_that_proves_nothing_does_not_wait() {
    let mut replica = open(2, MemoryMedium::default());
    replica.cut(now(0), Epoch(0), ChainHash::default()).unwrap();
    let state = PeerState {
        node: node(1),
        session: 1,
        term: term(1, 1),
        proves: false,
        max_epoch_bytes: 1 << 20,
    };
    replica.connected(0, state);
    replica.fed_by(0).unwrap();
    let mut heard = Heard::default();
    assert!(drain(&mut replica, &mut heard).is_empty());
    assert_eq!(heard.gate, Some(false));
    assert!(replica.status().unproven_primary);
}

#[test]
fn a_copy_that_begins_inside_a_batch_takes_the_chain_and_then_the_roots() {
    let mut pair = Pair::new();
    let log = log_of(&[1, 2, 3, 4]);
    log.feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    pair.replica.cut(now(0), Epoch(2), log.frames[1].1).unwrap();
    log.feed(&mut pair.replica, 0);
    pair.settle();
    assert_eq!(pair.heard[1].proven, Epoch(4));
}

#[test]
fn a_primary_that_begins_to_prove_late_is_followed() {
    let mut pair = Pair::new();
    let log = log_of(&[1, 2, 3]);
    log.feed(&mut pair.replica, 0);
    pair.primary = open(1, MemoryMedium::default());
    pair.primary.standing(now(0), Some(term(1, 1))).unwrap();
    pair.primary.cut(now(0), Epoch(2), log.frames[1].1).unwrap();
    pair.connect(term(1, 1));
    log.feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    pair.settle();
    assert_eq!(pair.heard[1].refused, None);
    assert_eq!(pair.heard[1].proven, Epoch(3));
}

#[test]
fn a_ledger_that_proves_more_than_the_log_holds_is_set_aside() {
    let mut pair = Pair::new();
    let log = log_of(&[1, 2]);
    log.feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    let medium = pair.primary.ledger().medium().clone();
    for primary in [Some(term(1, 1)), None] {
        let mut again = open(1, medium.clone());
        again.standing(now(100), primary).unwrap();
        again.cut(now(100), Epoch(0), ChainHash::default()).unwrap();
        assert_eq!(again.ledger().medium().aside.len(), 1);
        assert!(again.anchored().is_none());
        let notices = std::iter::from_fn(|| again.poll());
        let is_notice = |out: &Out| matches!(out, Out::Notice(_));
        assert_eq!(notices.filter(is_notice).count(), 1);
    }
}

#[test]
fn a_torn_append_is_cut_off_and_damage_is_not() {
    let mut pair = Pair::new();
    log_of(&[1]).feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    let whole = pair.primary.ledger().medium().clone();
    let mut torn = whole.clone();
    torn.bytes.truncate(whole.bytes.len() - 5);
    let (ledger, tip, tail) = LedgerFile::open(torn, identity().volume).unwrap();
    assert!(tail.is_some() && tip.unwrap().last().is_none());
    assert_eq!(ledger.records(), 1);
    let mut damaged = whole.clone();
    damaged.bytes[HEADER_BYTES + 30] ^= 1;
    let (medium, error) = LedgerFile::open(damaged.clone(), identity().volume).unwrap_err();
    assert!(
        matches!(error, ScanError::Damaged { index: 0, .. }),
        "{error}"
    );
    assert_eq!(medium, damaged);
}

#[test]
fn a_batch_that_a_replica_cannot_hold_does_not_stop_it() {
    let mut pair = Pair::new();
    pair.replica.hold_bytes = 8192;
    let log = log_of(&[1, 2, 3]);
    log.feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    pair.settle();
    assert_eq!(pair.heard[1].gate, Some(false));
    log.feed(&mut pair.replica, 0);
    pair.settle();
    assert_eq!(
        (pair.heard[1].proven, pair.heard[1].gate),
        (Epoch(3), Some(true))
    );
}

#[test]
fn epochs_that_a_ledger_begun_anew_leaves_out_count_to_what_a_replica_must_hold() {
    let mut pair = Pair::new();
    pair.replica.hold_bytes = 20_000;
    let log = log_of(&[1, 2, 3, 4]);
    // The ledger begins after epoch 3: its only anchor is of epoch 4, of 8 KiB.
    let (_, chain, _) = log.frames[2];
    pair.primary.cut(now(0), Epoch(3), chain).unwrap();
    log.feed(&mut pair.primary, 0);
    pair.primary.tick(now(60)).unwrap();
    let early = Log {
        frames: log.frames[..2].to_vec(),
    };
    early.feed(&mut pair.replica, 0);
    pair.settle();
    assert_eq!(pair.heard[1].gate, Some(false));
    log.feed(&mut pair.replica, 0);
    pair.settle();
    assert_eq!(
        (pair.heard[1].proven, pair.heard[1].gate),
        (Epoch(4), Some(true))
    );
}

#[test]
fn a_whole_frame_of_another_epoch_counts_as_damage() {
    let mut pair = Pair::new();
    let log = log_of(&[1, 2, 3]);
    let (_, _, first) = &log.frames[0];
    let mut feed = |epoch, bytes: &[u8]| {
        let done = pair.primary.frame(now(0), Epoch(epoch), Frame::Log(bytes));
        done.expect("damage is no failure");
    };
    feed(1, first);
    // The write of epoch 2 was lost: an older frame is still there.
    feed(2, first);
    let (_, chain, third) = &log.frames[2];
    feed(3, third);
    let noticed = |out: &Out| matches!(out, Out::Notice(text) if text.contains("epoch 2"));
    let out: Vec<Out> = std::iter::from_fn(|| pair.primary.poll()).collect();
    assert!(out.iter().any(noticed), "{out:?}");
    assert_eq!(pair.primary.hashed_tip(), (Epoch(3), *chain));
}

#[test]
fn a_frame_that_changed_in_memory_is_no_damage_of_the_log() {
    let log = log_of(&[1, 2]);
    let mut pair = Pair::new();
    let (epoch, _, bytes) = &log.frames[0];
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    let refused = pair.primary.frame(now(0), *epoch, Frame::Memory(&changed));
    assert!(matches!(
        refused,
        Err(ProverError::Memory {
            epoch: Epoch(1),
            ..
        })
    ));
    // The log is good, and what comes from there is anchored by the next prover.
    let mut pair = Pair::new();
    for (epoch, _, bytes) in &log.frames {
        let read = pair.primary.frame(now(0), *epoch, Frame::Log(bytes));
        read.expect("a good frame");
    }
    assert_eq!(pair.primary.hashed_tip(), log.tip());
}
