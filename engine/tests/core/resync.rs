//! Before a full copy the state trees are compared, if there are two, and only what differs is
//! sent.

use hn4::log::Role;
use hn4::types::{ChainHash, Epoch, Incarnation, Rank, Term};
use hn4_engine::core::event::{
    Contents, Differences, Event, PeerEvent, PeerId, PeerMessage, PeerState, SeedPiece, SeedSent,
    Tip, TreeEvent, TreeWork,
};
use hn4_engine::core::{Action, LagState};

use crate::tree::{Bench, Seen, seeded};

const PEER: PeerId = PeerId(0);
const GROUP: u64 = 64 << 10;
const SIZE: u64 = 16 << 20;

fn state(resyncs: bool) -> PeerState {
    PeerState {
        role: Role::Replica,
        term: Term::default(),
        incarnation: Incarnation(0),
        tip: Tip::default(),
        tip_rank: Rank::default(),
        usable: true,
        resyncs,
        is_filled: false,
    }
}

/// A primary whose backing is at epoch 1, and a peer that asks for a copy.
fn asked(resyncs: bool) -> Bench {
    asked_with(resyncs, 1 << 30)
}

/// As [`asked`]; the peer has granted so many bytes.
pub(crate) fn asked_with(resyncs: bool, credit: u64) -> Bench {
    let mut bench = Bench::new(Role::Primary);
    bench.write(0, 8);
    bench.drain();
    bench.tree(TreeEvent::Ready(Epoch(1)));
    bench.take();
    let state = state(resyncs);
    let (cursor_bytes, from) = (0, Tip::default());
    for event in [
        PeerEvent::Connected,
        PeerEvent::State(state),
        PeerEvent::Credit(credit),
        PeerEvent::SeedRequest { cursor_bytes, from },
    ] {
        peer(&mut bench, event);
    }
    bench
}

pub(crate) fn peer(bench: &mut Bench, event: PeerEvent) {
    bench.step(Event::Peer { peer: PEER, event });
}

/// The name of the question that the tree was asked.
fn question(bench: &mut Bench) -> u64 {
    match bench.take()[..] {
        [Seen::Tree(TreeWork::Compare { peer: PEER, id })] => id,
        ref other => panic!("{other:?}"),
    }
}

fn compared(bench: &mut Bench, id: u64, at: Tip, ranges: Vec<std::ops::Range<u64>>) {
    let found = Some(Differences { at, ranges });
    bench.tree(TreeEvent::Compared { id, found });
}

/// What is done next for the copy; answers as if it was sent.
fn next_part(bench: &mut Bench) -> Option<(bool, u64, u64)> {
    if bench.copy.is_empty() {
        return None;
    }
    let part = match bench.copy.remove(0) {
        Action::SeedSame { offset, bytes, .. } => (true, offset, bytes),
        Action::SeedRead { offset, bytes, .. } => (false, offset, bytes),
        other => panic!("{other:?}"),
    };
    let (bytes, cost) = (part.2, 4096);
    if !part.0 {
        peer(bench, PeerEvent::SeedPart(bytes));
    }
    peer(
        bench,
        PeerEvent::SeedReadDone(Some(SeedSent { bytes, cost })),
    );
    Some(part)
}

fn begun(bench: &mut Bench) -> Option<Epoch> {
    let start = bench.said.iter().find_map(|message| match message {
        PeerMessage::SeedStart(origin) => Some(origin.from.epoch),
        _ => None,
    });
    bench.said.clear();
    start
}

#[test]
fn a_copy_begins_where_the_tree_was_taken_and_leaves_out_what_is_the_same() {
    let mut bench = asked(true);
    let at = bench.volume.tip();
    let id = question(&mut bench);
    assert_eq!(begun(&mut bench), None, "first the trees are compared");
    assert_eq!(bench.volume.peers()[0].lag_state(), LagState::Within);
    // The backing goes on meanwhile.
    bench.write(800, 8);
    bench.drain();
    bench.tree(TreeEvent::Ready(Epoch(2)));
    assert_eq!(bench.volume.superblock().checkpoint, Epoch(2));
    compared(
        &mut bench,
        id,
        at,
        vec![GROUP..2 * GROUP, 5 * GROUP..7 * GROUP],
    );
    assert_eq!(
        begun(&mut bench),
        Some(Epoch(1)),
        "not where the backing is by now"
    );
    assert_eq!(bench.volume.peers()[0].kept_bytes(), Some(SIZE - 3 * GROUP));
    let parts: Vec<_> = std::iter::from_fn(|| next_part(&mut bench)).collect();
    let expected = [
        (true, 0, GROUP),
        (false, GROUP, GROUP),
        (true, 2 * GROUP, 3 * GROUP),
        (false, 5 * GROUP, 2 * GROUP),
        (true, 7 * GROUP, SIZE - 7 * GROUP),
    ];
    assert_eq!(parts, expected);
    let ended = |message: &PeerMessage| matches!(message, PeerMessage::SeedEnd { .. });
    assert!(bench.said.iter().any(ended));
}

#[test]
fn a_copy_that_was_cut_off_goes_on_with_what_is_known_to_differ() {
    let mut bench = asked(true);
    let from = bench.volume.tip();
    let id = question(&mut bench);
    let ranges = vec![GROUP..2 * GROUP, 4 * GROUP..5 * GROUP];
    compared(&mut bench, id, from, ranges);
    assert_eq!(next_part(&mut bench), Some((true, 0, GROUP)));
    let state = bench.volume.peers()[0].seeding();
    assert_eq!(state, Some(GROUP));
    bench.copy.clear();
    again(&mut bench, from, true);
    let parts: Vec<_> = std::iter::from_fn(|| next_part(&mut bench)).collect();
    let rest = [
        (false, GROUP, GROUP),
        (true, 2 * GROUP, 2 * GROUP),
        (false, 4 * GROUP, GROUP),
        (true, 5 * GROUP, SIZE - 5 * GROUP),
    ];
    assert_eq!(parts, rest);
    // A copy from elsewhere has nothing to do with it.
    bench.take();
    again(&mut bench, Tip::default(), true);
    assert_eq!(next_part(&mut bench), None);
    question(&mut bench);
}

/// The peer asks in a new session for what is behind the first group.
fn again(bench: &mut Bench, from: Tip, resyncs: bool) {
    let cursor_bytes = GROUP;
    for event in [
        PeerEvent::Disconnected,
        PeerEvent::Connected,
        PeerEvent::State(state(resyncs)),
        PeerEvent::Credit(1 << 30),
        PeerEvent::SeedRequest { cursor_bytes, from },
    ] {
        peer(bench, event);
    }
}

/// Its operator may have switched the tree off meanwhile.
#[test]
fn a_peer_that_has_no_tree_any_more_gets_everything_from_where_it_is() {
    let mut bench = asked(true);
    let from = bench.volume.tip();
    let id = question(&mut bench);
    let ranges = vec![4 * GROUP..5 * GROUP, 6 * GROUP..7 * GROUP];
    compared(&mut bench, id, from, ranges);
    assert_eq!(next_part(&mut bench), Some((true, 0, 4 * GROUP)));
    bench.copy.clear();
    again(&mut bench, from, false);
    let parts: Vec<_> = std::iter::from_fn(|| next_part(&mut bench)).collect();
    assert!(parts.iter().all(|(is_same, ..)| !is_same), "{parts:?}");
    assert_eq!(parts.first().map(|(_, offset, _)| *offset), Some(GROUP));
    let sent: u64 = parts.iter().map(|(.., bytes)| bytes).sum();
    assert_eq!(sent, SIZE - GROUP);
}

#[test]
fn a_copy_that_is_filled_in_place_goes_on_where_it_began_and_a_fresh_one_is_compared_again() {
    for (is_filled, same_place) in [(true, true), (true, false), (false, true)] {
        let mut bench = asked(true);
        let at = bench.volume.tip();
        let id = question(&mut bench);
        compared(
            &mut bench,
            id,
            at,
            vec![GROUP..2 * GROUP, 3 * GROUP..4 * GROUP],
        );
        assert_eq!(begun(&mut bench), Some(Epoch(1)));
        bench.copy.clear();
        let state = PeerState {
            usable: false,
            is_filled,
            ..state(true)
        };
        let (cursor_bytes, from) = (0, if same_place { at } else { Tip::default() });
        for event in [
            PeerEvent::Disconnected,
            PeerEvent::Connected,
            PeerEvent::State(state),
            PeerEvent::Credit(1 << 30),
            PeerEvent::SeedRequest { cursor_bytes, from },
        ] {
            peer(&mut bench, event);
        }
        if is_filled && same_place {
            assert_eq!(bench.take(), []);
            assert_eq!(begun(&mut bench), Some(Epoch(1)));
            assert_eq!(next_part(&mut bench), Some((true, 0, GROUP)));
        } else {
            question(&mut bench);
            assert_eq!(begun(&mut bench), None);
        }
    }
}

#[test]
fn without_a_comparison_everything_is_sent() {
    let elsewhere = Tip {
        epoch: Epoch(1),
        chain: ChainHash([9; 32]),
    };
    let unknown = Differences {
        at: elsewhere,
        ranges: Vec::new(),
    };
    for found in [None, Some(unknown)] {
        let mut bench = asked(true);
        let id = question(&mut bench);
        // An answer to something else changes nothing.
        bench.tree(TreeEvent::Compared {
            id: id + 1,
            found: None,
        });
        assert_eq!(begun(&mut bench), None);
        bench.tree(TreeEvent::Compared { id, found });
        assert_eq!(begun(&mut bench), Some(Epoch(1)));
        assert!(next_part(&mut bench).is_some_and(|(is_same, ..)| !is_same));
        assert_eq!(bench.volume.peers()[0].kept_bytes(), None);
    }
    // Nor is a peer asked that does not know how.
    let mut bench = asked(false);
    assert_eq!(bench.take(), []);
    assert_eq!(begun(&mut bench), Some(Epoch(1)));
}

#[test]
fn an_answer_that_comes_after_the_session_has_ended_begins_nothing() {
    let mut bench = asked(true);
    let at = bench.volume.tip();
    let id = question(&mut bench);
    peer(&mut bench, PeerEvent::Disconnected);
    compared(&mut bench, id, at, Vec::new());
    assert_eq!(begun(&mut bench), None);
}

#[test]
fn a_copy_that_is_filled_in_place_has_nothing_to_keep() {
    let (mut bench, _) = seeded();
    let contents = Contents::Same;
    peer(
        &mut bench,
        PeerEvent::SeedPiece(SeedPiece {
            offset: 0,
            bytes: 4096,
            contents,
        }),
    );
    assert_eq!(bench.closed, 1, "it is refused");
}
