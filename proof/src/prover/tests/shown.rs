//! What a replica shows a primary whose ledger has lost its end: more than one message of it, while
//! the log is still being read, and what nobody asked for.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use super::keys::rotating;
use super::recall::{
    PATIENCE_MS, aside, asked, begin, both, equal, node_1, reopen, signed, without,
};
use super::*;
use crate::anchor::{Anchor, SignedAnchor};
use crate::ledger::{Event, Note};
use crate::prover::keys::NodeKeys;
use crate::prover::message::{Message, RECORD_BYTES};
use crate::prover::shown::MAX_BYTES;
use crate::tree::ReadAt;

/// A medium that counts what is read of it.
#[derive(Debug)]
struct Counting {
    inner: MemoryMedium,
    read: Rc<Cell<u64>>,
}

impl ReadAt for Counting {
    fn len_bytes(&self) -> io::Result<u64> {
        self.inner.len_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read.set(self.read.get() + buffer.len() as u64);
        self.inner.read_at(offset, buffer)
    }
}

impl LedgerMedium for Counting {
    fn append(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.inner.append(offset, bytes)
    }

    fn set_aside(&mut self, offset: u64) -> io::Result<()> {
        self.inner.set_aside(offset)
    }

    fn cut(&mut self, offset: u64) -> io::Result<()> {
        self.inner.cut(offset)
    }
}

fn state(session: u64) -> PeerState {
    PeerState {
        node: node(2),
        session,
        term: term(1, 1),
        proves: true,
        max_epoch_bytes: 1 << 20,
    }
}

/// So many anchors of one epoch each, of which both nodes know.
fn anchors(pair: &mut Pair, log: &mut Log, count: u64, at: u64) {
    for round in 0..count {
        log.write(u8::try_from(round % 251).unwrap());
        both(pair, log, at + round * 100);
    }
}

fn note(text: &str) -> Body {
    Body::Note(Note {
        event: Event::Damaged,
        epoch: Epoch(1),
        lba: Lba(0),
        sectors: 0,
        digest: Digest::ZERO,
        text: text.to_owned(),
    })
}

/// A record that nobody signed, behind so many of a ledger.
fn unsigned(prover: &Prover<MemoryMedium>, at: u64) -> Message {
    let tip = prover.ledger().tip_at(at).unwrap().unwrap();
    Message::Records {
        header: *prover.ledger().header().unwrap(),
        first: at,
        bytes: tip.encode_next(0, &note("not so")),
    }
}

/// An anchor of node 1, put behind so many records: its signature is good, and says another place.
fn copied(prover: &Prover<MemoryMedium>, at: u64) -> Message {
    anchored(prover, at, |signed, _| signed)
}

/// What a thief of node 1's key signs behind so many records, and no ledger can hold.
fn nonsense(prover: &Prover<MemoryMedium>, at: u64) -> Message {
    anchored(prover, at, |signed, before| {
        let anchor = Anchor {
            step: at,
            ledger_previous: before,
            ..signed.anchor
        };
        let signatures = vec![key(1).sign(&anchor.hash()).unwrap()];
        SignedAnchor { anchor, signatures }
    })
}

/// What is made of an anchor, behind which a record would go.
fn anchored(
    prover: &Prover<MemoryMedium>,
    at: u64,
    make: impl Fn(SignedAnchor, Digest) -> SignedAnchor,
) -> Message {
    let tip = prover.ledger().tip_at(at).unwrap().unwrap();
    let bytes = prover.ledger().read(at - 1, 1).unwrap();
    let Body::Anchor(last) = crate::ledger::Record::decode(&bytes).unwrap().0.body else {
        panic!("an anchor");
    };
    let body = Body::Anchor(Box::new(make(*last, tip.previous())));
    Message::Records {
        header: *prover.ledger().header().unwrap(),
        first: at,
        bytes: tip.encode_next(0, &body),
    }
}

#[test]
fn whoever_sends_what_nobody_asked_for_has_the_ledger_verified_once_at_most() {
    let mut pair = Pair::new();
    let mut log = Log::default();
    anchors(&mut pair, &mut log, 200, 0);
    let read = Rc::default();
    let inner = pair.primary.ledger().medium().clone();
    let length = inner.bytes.len() as u64;
    let mut primary = node_1(Counting {
        inner,
        read: Rc::clone(&read),
    });
    begin(&mut primary, term(1, 1), 50_000);
    primary.connected(0, state(1));
    let before = primary.ledger().medium().inner.clone();
    let newest = pair.primary.ledger().records();
    let messages = [
        (unsigned(&pair.primary, newest - 1), [0, 0]),
        (unsigned(&pair.primary, newest / 2), [0, 0]),
        (copied(&pair.primary, newest - 1), [0, 0]),
        (nonsense(&pair.primary, newest - 1), [1, 0]),
        (nonsense(&pair.primary, newest - 2), [0, 0]),
    ];
    for (message, times) in messages {
        for times in times {
            read.set(0);
            primary.message(now(50_100), 0, &message.encode()).unwrap();
            let is_whole = read.get() > length / 2;
            assert_eq!(is_whole, times == 1, "{} of {length}", read.get());
            assert!(primary.ledger().medium().inner == before);
        }
    }
}

#[test]
fn nothing_is_taken_back_from_a_peer_that_was_not_asked() {
    let (mut pair, log) = signed();
    let message = Message::Records {
        header: *pair.replica.ledger().header().unwrap(),
        first: 7,
        bytes: pair.replica.ledger().read(7, usize::MAX).unwrap(),
    };
    let medium = without(&pair.primary, 1, true);
    reopen(&mut pair, medium, &log, 200_000);
    pair.primary.connected(0, state(1));
    let records = message.encode();
    pair.primary.message(now(200_100), 0, &records).unwrap();
    assert_eq!(pair.primary.ledger().records(), 7);
    pair.connect(term(1, 1));
    asked(&mut pair);
    pair.primary.message(now(200_100), 0, &records).unwrap();
    assert_eq!(pair.primary.ledger().records(), 8);
}

fn swapped(pair: Pair, by: Term) -> Pair {
    let mut pair = Pair {
        primary: pair.replica,
        replica: pair.primary,
        heard: Default::default(),
    };
    pair.replica.standing(now(90_000), None).unwrap();
    pair.primary.standing(now(90_000), Some(by)).unwrap();
    pair.connect(by);
    pair.settle();
    pair
}

/// Both nodes hold a long ledger, signed by node 1 while it changed its key, or by node 2, and one
/// anchor of node 1 in the fifth term. Node 1 comes back without all of that.
fn long(by_other: bool, rots: bool) -> (Pair, Log) {
    let mut pair = Pair::new();
    let mut log = Log::default();
    anchors(&mut pair, &mut log, 3, 0);
    let begins = pair.replica.ledger().records();
    if by_other {
        pair = swapped(pair, term(2, 2));
        anchors(&mut pair, &mut log, 250, 3000);
        pair = swapped(pair, term(5, 1));
    } else {
        anchors(&mut pair, &mut log, 10, 1000);
        let keys = rotating(1, 11);
        pair.primary.set_keys(now(2500), keys).unwrap();
        anchors(&mut pair, &mut log, 240, 3000);
        let term = term(5, 1);
        pair.primary.standing(now(90_000), Some(term)).unwrap();
        pair.replica.disconnected(0);
        pair.connect(term);
    }
    log.write(1);
    both(&mut pair, &log, 90_100);
    assert!(equal(&pair) && aside(&pair) == [0, 0]);
    let tail = pair.replica.ledger().read(begins, usize::MAX).unwrap();
    assert!(tail.len() > 2 * RECORD_BYTES, "{}", tail.len());
    let lost = pair.replica.ledger().records() - begins;
    pair.primary = node_1(without(&pair.primary, lost, rots));
    if by_other {
        pair.primary.keys = key(1).into();
    }
    begin(&mut pair.primary, term(5, 1), 200_000);
    log.feed(&mut pair.primary, 200_000);
    pair.primary.tick(now(200_100)).unwrap();
    let _ = drain(&mut pair.primary, &mut pair.heard[0]);
    pair.replica.disconnected(0);
    (pair, log)
}

#[test]
fn what_binds_a_long_end_of_another_term_is_waited_for() {
    for by_other in [false, true] {
        let (mut pair, _) = long(by_other, true);
        let before = pair.replica.ledger().medium().clone();
        pair.connect(term(5, 1));
        pair.settle();
        assert!(pair.primary.ledger().medium().bytes == before.bytes);
        assert!(equal(&pair) && aside(&pair) == [0, 0]);
    }
}

#[test]
fn a_long_end_of_another_term_that_was_signed_anew_gives_way_to_a_new_ledger() {
    for by_other in [false, true] {
        let (mut pair, mut log) = long(by_other, false);
        pair.connect(term(5, 1));
        pair.settle();
        assert_eq!(pair.heard[1].refused, None);
        assert!(equal(&pair) && aside(&pair) == [1, 1]);
        log.write(2);
        both(&mut pair, &log, 300_000);
        assert_eq!(pair.replica.anchored(), Some(log.tip().0));
    }
}

#[test]
fn of_what_nothing_binds_no_more_is_kept_and_asked_for_than_the_limit() {
    let (mut pair, log) = signed();
    let medium = without(&pair.primary, 1, false);
    reopen(&mut pair, medium, &log, 200_000);
    let mut tip = pair.primary.tip.clone().unwrap();
    pair.primary.connected(1, state(2));
    let ledger = pair.primary.ledger().header().unwrap().hash();
    let places = vec![(u64::MAX, Digest::ZERO)];
    let have = Message::Have { ledger, places };
    pair.primary
        .message(now(200_100), 1, &have.encode())
        .unwrap();
    let mut sent = 0;
    for _ in 0..2 * MAX_BYTES / RECORD_BYTES {
        let out: Vec<Out> = std::iter::from_fn(|| pair.primary.poll()).collect();
        let is_question = |bytes: &[u8]| matches!(Message::decode(bytes), Ok(Message::Have { .. }));
        let asks = |out: &Out| match out {
            Out::Send { peer: 1, bytes, .. } => is_question(bytes),
            _ => false,
        };
        if !out.iter().any(asks) {
            break;
        }
        let first = tip.next_index();
        let mut bytes = Vec::new();
        while bytes.len() < RECORD_BYTES - 1024 {
            let record = tip.encode_next(0, &note(&"no".repeat(100)));
            tip.push_bytes(&record).unwrap();
            bytes.extend(record);
        }
        sent += bytes.len();
        let header = *pair.primary.ledger().header().unwrap();
        let records = Message::Records {
            header,
            first,
            bytes,
        };
        pair.primary
            .message(now(200_100), 1, &records.encode())
            .unwrap();
    }
    assert!(
        sent > MAX_BYTES && sent < MAX_BYTES + RECORD_BYTES,
        "{sent}"
    );
    assert_eq!(pair.primary.ledger().records(), 7);
}

#[test]
fn more_than_a_message_comes_back_while_the_log_is_still_being_read() {
    let (mut pair, mut log) = signed();
    anchors(&mut pair, &mut log, 250, 150_000);
    let before = pair.replica.ledger().medium().clone();
    let medium = without(&pair.primary, 250, true);
    reopen(&mut pair, medium, &Log::default(), 200_000);
    pair.connect(term(1, 1));
    pair.settle();
    assert_eq!(pair.primary.ledger().records(), 8, "the log is not there");
    log.feed(&mut pair.primary, 200_100);
    pair.settle();
    assert!(pair.primary.ledger().medium().bytes == before.bytes);
    assert!(equal(&pair) && aside(&pair) == [0, 0]);
}

#[test]
fn what_waits_for_the_log_is_not_displaced_by_what_nothing_binds() {
    let (mut pair, log) = signed();
    let message = unsigned(&pair.replica, 6);
    let medium = without(&pair.primary, 2, true);
    reopen(&mut pair, medium, &Log::default(), 200_000);
    pair.connect(term(1, 1));
    pair.settle();
    pair.primary.connected(1, state(2));
    let ledger = pair.primary.ledger().header().unwrap().hash();
    let places = vec![(9, Digest::ZERO)];
    let have = Message::Have { ledger, places };
    pair.primary
        .message(now(200_100), 1, &have.encode())
        .unwrap();
    let records = message.encode();
    pair.primary.message(now(200_100), 1, &records).unwrap();
    log.feed(&mut pair.primary, 200_200);
    pair.settle();
    assert!(equal(&pair) && aside(&pair) == [0, 0]);
}

#[test]
fn what_keys_bind_that_are_replaced_meanwhile_is_not_taken_back() {
    let (mut pair, log) = signed();
    let medium = without(&pair.primary, 2, true);
    reopen(&mut pair, medium, &Log::default(), 200_000);
    pair.connect(term(1, 1));
    pair.settle();
    let newer = NodeKeys::new(vec![key(21)], vec![key(1), key(11)]).unwrap();
    pair.primary.set_keys(now(200_100), newer).unwrap();
    log.feed(&mut pair.primary, 200_200);
    assert_eq!(pair.primary.ledger().records(), 6);
    pair.primary.tick(now(200_200 + PATIENCE_MS)).unwrap();
    pair.primary.tick(now(200_300 + PATIENCE_MS)).unwrap();
    pair.settle();
    assert!(equal(&pair) && aside(&pair) == [1, 1]);
    assert_eq!(pair.replica.anchored(), Some(log.tip().0));
}

#[test]
fn an_answer_that_comes_before_the_log_is_placed_is_asked_for_again() {
    for rots in [true, false] {
        let (mut pair, log) = signed();
        pair.primary = node_1(without(&pair.primary, 2, rots));
        pair.primary
            .standing(now(200_000), Some(term(1, 1)))
            .unwrap();
        pair.replica.disconnected(0);
        pair.connect(term(1, 1));
        pair.settle();
        assert_eq!(pair.primary.ledger().records(), 6);
        begin(&mut pair.primary, term(1, 1), 200_100);
        pair.settle();
        log.feed(&mut pair.primary, 200_100);
        pair.settle();
        assert_eq!(pair.primary.ledger().records(), 8, "{rots}");
        assert!(equal(&pair) && aside(&pair) == [0, 0]);
    }
}
