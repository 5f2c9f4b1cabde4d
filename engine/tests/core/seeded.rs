//! A new copy whose backing holds what somebody brought: it is surveyed first, and a full copy
//! keeps what is the same.

use hn4::log::{CopyState, Ground, Role, SUPERBLOCK_0, SUPERBLOCK_1, Superblock};
use hn4::types::{Epoch, NodeId, Term};
use hn4_engine::core::Event;
use hn4_engine::core::event::{
    Contents, PeerEvent, PeerId, PeerMessage, SeedPiece, TreeEvent, TreeWork,
};
use hn4_engine::core::recovery::{self, AlignedBlock, Medium};

use crate::memory::{Memory, identity};
use crate::tree::{Bench, Seen, begin_copy};

const PEER: PeerId = PeerId(0);
const SIZE: u64 = 16 << 20;

fn same(bench: &mut Bench, offset: u64, bytes: u64) {
    let contents = Contents::Same;
    let event = PeerEvent::SeedPiece(SeedPiece {
        offset,
        bytes,
        contents,
    });
    bench.step(Event::Peer { peer: PEER, event });
}

/// Whether a survey was begun, and whether whatever there is of one is no good.
fn survey(bench: &mut Bench) -> Option<bool> {
    match bench.take()[..] {
        [] => None,
        [Seen::Tree(TreeWork::Survey { anew, .. })] => Some(anew),
        ref other => panic!("{other:?}"),
    }
}

fn higher_term(bench: &mut Bench) {
    let term = Term {
        counter: 2,
        node: NodeId([2; 16]),
    };
    let event = PeerEvent::HigherTerm(term);
    bench.step(Event::Peer { peer: PEER, event });
}

/// Surveyed, and a copy has begun.
fn begun() -> (Bench, impl Fn(&mut Bench, u64)) {
    let mut bench = Bench::brought();
    bench.tree(TreeEvent::Surveyed(true));
    bench.take();
    let piece = begin_copy(&mut bench);
    assert_eq!(bench.take(), [Seen::Tree(TreeWork::Discard)]);
    assert!(bench.volume.copy_status().may_keep(), "it was asked for");
    bench.tree(TreeEvent::Discarded);
    (bench, piece)
}

#[test]
fn a_copy_is_asked_for_when_what_was_brought_is_surveyed() {
    let mut bench = Bench::brought();
    assert_eq!(survey(&mut bench), Some(false));
    let stands = |bench: &Bench| {
        let status = bench.volume.copy_status();
        assert_eq!((status.copy, status.seeded), (CopyState::Fresh, true));
        assert_eq!(status.may_keep(), !status.surveys);
        status.surveys
    };
    assert!(stands(&bench));
    bench.tree(TreeEvent::Surveyed(true));
    assert!(!stands(&bench));
    // The tree was given up, and is built anew.
    bench.tree(TreeEvent::Surveyed(false));
    assert!(stands(&bench));
    bench.tree(TreeEvent::Surveyed(true));
    assert!(!stands(&bench));
    assert_eq!(survey(&mut bench), None, "it is asked for once");
}

#[test]
fn nobody_looks_at_what_nobody_brought() {
    let mut bench = Bench::new(Role::Replica);
    assert_eq!(survey(&mut bench), None);
    let status = bench.volume.copy_status();
    assert!(!status.surveys && !status.may_keep());
}

#[test]
fn what_is_the_same_is_passed_over_and_counted_when_no_tree_is_left() {
    let mut bench = Bench::brought();
    bench.tree(TreeEvent::Surveyed(true));
    bench.take();
    let piece = begin_copy(&mut bench);
    same(&mut bench, 0, SIZE / 2);
    piece(&mut bench, SIZE / 2);
    assert_eq!(bench.take(), [Seen::Tree(TreeWork::Discard)]);
    bench.tree(TreeEvent::Discarded);
    assert_eq!(bench.take(), [Seen::Backing(SIZE / 2, 4096)]);
    let credit = |said: &PeerMessage| matches!(said, PeerMessage::Credit(_));
    assert!(bench.said.iter().filter(|said| credit(said)).count() >= 2);
    same(&mut bench, SIZE / 2 + 4096, SIZE / 2 - 4096);
    assert_eq!(bench.take(), []);
    assert_eq!(bench.volume.seeding_cursor(), Some(SIZE));
    assert_eq!(bench.volume.kept_bytes(), SIZE - 4096);
    assert_eq!(bench.volume.superblock().ground, Ground::Mixed);
    let event = PeerEvent::SeedEnd {
        usable_after: Epoch(5),
    };
    bench.step(Event::Peer { peer: PEER, event });
    assert_eq!(bench.volume.superblock().copy, CopyState::Usable);
    let [Seen::Tree(TreeWork::Start { anew: true, .. })] = bench.take()[..] else {
        panic!("its own tree is built");
    };
}

#[test]
fn what_was_passed_over_need_not_come_again() {
    let (mut bench, piece) = begun();
    same(&mut bench, 0, SIZE / 2);
    piece(&mut bench, SIZE / 2);
    let event = PeerEvent::Disconnected;
    bench.step(Event::Peer { peer: PEER, event });
    let CopyState::Seeding { cursor_bytes, .. } = bench.volume.superblock().copy else {
        panic!("{:?}", bench.volume.superblock());
    };
    assert_eq!(cursor_bytes, SIZE / 2 + 4096);
    assert!(bench.volume.copy_status().may_keep());
}

#[test]
fn a_copy_that_begins_anew_is_surveyed_anew() {
    let (mut bench, piece) = begun();
    same(&mut bench, 0, 4096);
    piece(&mut bench, 4096);
    bench.take();
    higher_term(&mut bench);
    assert_eq!(bench.volume.superblock().copy, CopyState::Fresh);
    assert_eq!(survey(&mut bench), Some(true), "pieces were written there");
    assert!(bench.volume.copy_status().surveys);
    bench.tree(TreeEvent::Surveyed(true));
    assert!(!bench.volume.copy_status().surveys);
}

#[test]
fn a_tree_is_believed_after_a_restart_only_if_no_piece_was_written_since() {
    for (ground, expected) in [(Ground::Brought, false), (Ground::Mixed, true)] {
        let mut log = Memory::new_copy(identity(SIZE), Role::Replica, 8 << 20, true);
        let (_, superblock, slot) = recovery::inspect(&mut log).expect("a log");
        let mut block = AlignedBlock([0; 4096]);
        let next = Superblock {
            ground,
            generation: superblock.generation + 1,
            ..superblock
        };
        next.encode(&identity(SIZE), &mut block.0);
        let other = [SUPERBLOCK_0, SUPERBLOCK_1][1 - slot];
        log.write(other, &[block]).expect("written");
        let mut bench = Bench::opened(log, |_| {});
        assert_eq!(survey(&mut bench), Some(expected), "{ground:?}");
    }
}

#[test]
fn what_cannot_be_surveyed_is_not_waited_for_and_everything_is_asked_for() {
    let mut bench = Bench::brought();
    bench.take();
    bench.tree(TreeEvent::Surveyed(false));
    assert!(bench.volume.copy_status().surveys, "it is tried again");
    bench.tree(TreeEvent::NoSurvey);
    let status = bench.volume.copy_status();
    assert_eq!(status.copy, CopyState::Fresh);
    assert!(!status.surveys && !status.may_keep());
    // The next one begins, and is not complete.
    bench.tree(TreeEvent::Surveyed(false));
    assert!(!bench.volume.copy_status().surveys);
    let piece = begin_copy(&mut bench);
    assert_eq!(bench.take(), [Seen::Tree(TreeWork::Discard)]);
    bench.tree(TreeEvent::Discarded);
    piece(&mut bench, 0);
    assert_eq!(bench.take(), [Seen::Backing(0, 4096)]);
}

#[test]
fn a_survey_that_is_complete_after_all_is_compared() {
    let mut bench = Bench::brought();
    bench.tree(TreeEvent::NoSurvey);
    bench.tree(TreeEvent::Surveyed(true));
    let status = bench.volume.copy_status();
    assert!(!status.surveys && status.may_keep());
    bench.tree(TreeEvent::Surveyed(false));
    assert!(bench.volume.copy_status().surveys);
}

#[test]
fn without_a_tree_everything_is_asked_for_at_once() {
    let log = Memory::new_copy(identity(SIZE), Role::Replica, 8 << 20, true);
    let mut bench = Bench::opened(log, |config| config.tree = false);
    let status = bench.volume.copy_status();
    assert!(status.seeded && !status.surveys);
    let _ = begin_copy(&mut bench);
    same(&mut bench, 0, 4096);
    assert_eq!(bench.closed, 1, "nothing is known to be the same");
}
