//! Several pieces of a full copy are read, sent and written at the same time; what counts is what
//! has no gap before it.

use hn4::log::{CopyState, Role, SUPERBLOCK_0, SUPERBLOCK_1, Superblock};
use hn4::types::{ChainHash, Epoch};
use hn4_engine::arena::SlotMemory as _;
use hn4_engine::core::event::{
    Contents, IoToken, PeerEvent, PeerMessage, SeedPiece, SeedSent, TreeEvent,
};
use hn4_engine::core::recovery::{self, AlignedBlock, Medium as _};
use hn4_engine::core::{Action, VolumeConfig};

use crate::memory::{Memory, identity};
use crate::resync::{asked_with, peer};
use crate::tree::{Bench, Seen, begin_copy};

const SIZE: u64 = 16 << 20;
const PIECE: u64 = 256 << 10;
const BLOCK: u64 = 4096;

/// Parts that a primary has asked for so far, each of which has begun.
fn begin_all(bench: &mut Bench) -> Vec<u64> {
    let mut offsets = Vec::new();
    while !bench.copy.is_empty() {
        match bench.copy.remove(0) {
            Action::SeedRead { offset, bytes, .. } => {
                offsets.push(offset);
                peer(bench, PeerEvent::SeedPart(bytes));
            }
            other => panic!("{other:?}"),
        }
    }
    offsets
}

fn sent(bench: &mut Bench, cost: u64) {
    let bytes = PIECE;
    let sent = Some(SeedSent { bytes, cost });
    peer(bench, PeerEvent::SeedReadDone(sent));
}

fn has_ended(bench: &Bench) -> bool {
    let ended = |message: &PeerMessage| matches!(message, PeerMessage::SeedEnd { .. });
    bench.said.iter().any(ended)
}

#[test]
fn parts_are_read_side_by_side_and_the_copy_ends_with_the_last() {
    let mut bench = asked_with(false, 1 << 30);
    let pieces = |range: std::ops::Range<u64>| range.map(|at| at * PIECE).collect::<Vec<_>>();
    assert_eq!(begin_all(&mut bench), pieces(0..8), "so many at a time");
    sent(&mut bench, PIECE);
    assert_eq!(begin_all(&mut bench), pieces(8..9));
    for at in 9..SIZE / PIECE {
        sent(&mut bench, PIECE);
        assert_eq!(begin_all(&mut bench), pieces(at..at + 1));
    }
    for _ in 0..7 {
        sent(&mut bench, PIECE);
        assert!(!has_ended(&bench), "parts are not on their way yet");
    }
    sent(&mut bench, PIECE);
    assert!(has_ended(&bench));
}

#[test]
fn the_next_part_is_asked_for_when_it_is_known_how_far_the_last_one_goes() {
    let mut bench = asked_with(false, 1 << 30);
    assert_eq!(bench.copy.len(), 1);
    peer(&mut bench, PeerEvent::SeedPart(5 * PIECE));
    let [_, Action::SeedRead { offset, .. }] = bench.copy[..] else {
        panic!("{:?}", bench.copy);
    };
    assert_eq!(offset, 5 * PIECE, "behind a hole");
    bench.copy.remove(0);
    assert_eq!(begin_all(&mut bench).len(), 7);
    // Nothing was asked for that this could be an answer to.
    peer(&mut bench, PeerEvent::SeedPart(PIECE));
    sent(&mut bench, PIECE);
    assert_eq!(begin_all(&mut bench), [12 * PIECE]);
}

#[test]
fn parts_that_are_under_way_use_up_credit_until_it_is_known_what_they_cost() {
    let mut bench = asked_with(false, 2 * PIECE + 1);
    assert_eq!(begin_all(&mut bench).len(), 3, "the last one overdraws it");
    // It was a hole.
    sent(&mut bench, 4096);
    assert_eq!(begin_all(&mut bench).len(), 0, "two of 256 KiB, and 4 KiB");
    sent(&mut bench, 4096);
    sent(&mut bench, PIECE);
    assert_eq!(begin_all(&mut bench).len(), 1);
    peer(&mut bench, PeerEvent::Credit(PIECE));
    assert_eq!(begin_all(&mut bench).len(), 1);
}

#[test]
fn a_part_that_cannot_be_read_ends_the_copy_and_later_ones_change_nothing() {
    let mut bench = asked_with(false, 1 << 30);
    assert_eq!(begin_all(&mut bench).len(), 8);
    peer(&mut bench, PeerEvent::SeedReadDone(None));
    assert_eq!(bench.closed, 1);
    sent(&mut bench, PIECE);
    assert_eq!(begin_all(&mut bench).len(), 0);
    assert!(!has_ended(&bench));
}

/// A replica that flushes after two blocks; its writes complete when they are told to.
fn copied() -> (Bench, impl Fn(&mut Bench, u64)) {
    let often = |config: &mut VolumeConfig| config.seed_flush_bytes = 2 * BLOCK;
    let mut bench = Bench::configured(Role::Replica, often);
    bench.held = Some(Vec::new());
    let piece = begin_copy(&mut bench);
    bench.tree(TreeEvent::Discarded);
    (bench, piece)
}

fn held(bench: &Bench) -> &[IoToken] {
    bench.held.as_deref().unwrap_or_default()
}

fn cursor(bench: &Bench) -> u64 {
    match bench.volume.superblock().copy {
        CopyState::Seeding { cursor_bytes, .. } => cursor_bytes,
        other => panic!("{other:?}"),
    }
}

const WRITES: [IoToken; 2] = [IoToken::SeedWrite(0), IoToken::SeedWrite(1)];

#[test]
fn pieces_are_written_side_by_side_and_progress_is_what_was_flushed_behind_all_of_them() {
    let (mut bench, piece) = copied();
    for block in 0..3 {
        piece(&mut bench, block * BLOCK);
    }
    assert_eq!(held(&bench), WRITES, "then a flush is due");
    bench.complete(WRITES[1]);
    assert_eq!(bench.volume.seeding_cursor(), Some(0), "there is a gap");
    assert_eq!(held(&bench), [WRITES[0]]);
    bench.complete(WRITES[0]);
    assert_eq!(bench.volume.seeding_cursor(), Some(2 * BLOCK));
    assert_eq!(held(&bench), [IoToken::SeedFsync]);
    assert_eq!(cursor(&bench), 0);
    bench.complete(IoToken::SeedFsync);
    assert_eq!(cursor(&bench), 2 * BLOCK);
    assert_eq!(held(&bench), [IoToken::SeedWrite(2)]);
    let credit = |message: &&PeerMessage| **message == PeerMessage::Credit(BLOCK);
    assert_eq!(bench.said.iter().filter(credit).count(), 2);
}

#[test]
fn another_copy_waits_for_the_writes_of_the_one_that_was_given_up() {
    let (mut bench, piece) = copied();
    piece(&mut bench, 0);
    piece(&mut bench, BLOCK);
    let before = bench.mem.free_slots();
    peer(&mut bench, PeerEvent::Disconnected);
    let piece = begin_copy(&mut bench);
    bench.take();
    piece(&mut bench, 0);
    assert_eq!(held(&bench), WRITES);
    bench.complete(WRITES[1]);
    assert_eq!(held(&bench), [WRITES[0]], "it may be written yet");
    assert_eq!(bench.take(), []);
    bench.complete(WRITES[0]);
    assert_eq!(held(&bench), [IoToken::SeedWrite(2)]);
    assert_eq!(bench.take(), [Seen::Backing(0, BLOCK)]);
    assert_eq!(bench.volume.seeding_cursor(), Some(0));
    assert_eq!(
        bench.mem.free_slots(),
        before + 1,
        "two came back, one is used"
    );
    bench.complete(IoToken::SeedWrite(2));
    assert_eq!(bench.volume.seeding_cursor(), Some(BLOCK));
}

#[test]
fn what_is_passed_over_does_not_count_before_what_is_written_in_front_of_it() {
    let mut bench = Bench::brought();
    bench.tree(TreeEvent::Surveyed(true));
    bench.held = Some(Vec::new());
    let piece = begin_copy(&mut bench);
    bench.tree(TreeEvent::Discarded);
    piece(&mut bench, 0);
    let same = SeedPiece {
        offset: BLOCK,
        bytes: BLOCK,
        contents: Contents::Same,
    };
    peer(&mut bench, PeerEvent::SeedPiece(same));
    piece(&mut bench, 2 * BLOCK);
    assert_eq!(held(&bench), [WRITES[0], IoToken::SeedWrite(2)]);
    assert_eq!(bench.volume.seeding_cursor(), Some(0));
    bench.complete(WRITES[0]);
    assert_eq!(bench.volume.seeding_cursor(), Some(2 * BLOCK));
    bench.complete(IoToken::SeedWrite(2));
    assert_eq!(bench.volume.seeding_cursor(), Some(3 * BLOCK));
}

/// A usable replica that takes a full copy into its shadow, and flushes that after each block.
fn shadowed() -> Bench {
    let identity = identity(SIZE);
    let mut log = Memory::new_log(identity, Role::Replica, 8 << 20);
    let (_, superblock, slot) = recovery::inspect(&mut log).expect("a log");
    let shadowing = Superblock {
        copy: CopyState::Shadowing {
            cursor_bytes: 0,
            shadow_bytes: 0,
            from: Epoch(0),
            from_chain: ChainHash([0; 32]),
        },
        generation: superblock.generation + 1,
        ..superblock
    };
    let mut block = AlignedBlock([0; 4096]);
    shadowing.encode(&identity, &mut block.0);
    let other = [SUPERBLOCK_0, SUPERBLOCK_1][1 - slot];
    log.write(other, &[block]).expect("written");
    Bench::opened(log, |config| {
        config.seed_flush_bytes = BLOCK;
        config.shadow_space_bytes = 1 << 20;
    })
}

#[test]
fn an_entry_of_the_shadow_is_not_written_over_while_a_superblock_that_counts_it_is_on_its_way() {
    let mut bench = shadowed();
    let piece = begin_copy(&mut bench);
    bench.held = Some(Vec::new());
    bench.slow_superblocks = true;
    piece(&mut bench, 0);
    // It is compared, written and flushed.
    for _ in 0..3 {
        assert_eq!(held(&bench), [IoToken::Shadow]);
        bench.complete(IoToken::Shadow);
    }
    assert_eq!(held(&bench), [IoToken::Superblock]);
    // The next session goes on from the last one that is durable.
    peer(&mut bench, PeerEvent::Disconnected);
    let piece = begin_copy(&mut bench);
    piece(&mut bench, 0);
    assert_eq!(held(&bench), [IoToken::Superblock]);
    bench.complete(IoToken::Superblock);
    assert_eq!(held(&bench), [IoToken::Superblock], "it is taken back");
    bench.complete(IoToken::Superblock);
    assert_eq!(held(&bench), [IoToken::Shadow]);
}
