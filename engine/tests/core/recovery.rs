//! How a log is read when it is opened: far ahead, though what lies ahead may be unreadable.

use hn4::log::{CopyState, RING_START, Role, SUPERBLOCK_0, SUPERBLOCK_1};
use hn4::types::{Epoch, Incarnation, LogOffset};
use hn4_engine::arena::SlotMemory;
use hn4_engine::core::event::{Request, Tip};
use hn4_engine::core::recovery::{self, RecoveryError};

use crate::memory::{Memory, small};
use crate::merge::{Bench, become_replica, open, open_with, record};

/// Head and payload of an epoch with one block.
const FRAME_BYTES: usize = 8192;
pub(crate) const EPOCHS: usize = 200;

/// A log that holds so many epochs which are not in the backing, and that backing.
pub(crate) fn logged() -> (Memory, Memory) {
    let mut bench = Bench::new();
    for round in 0..EPOCHS {
        let block = u64::try_from(round).expect("a block");
        bench.write(block * 8, 8, u8::try_from(round).expect("a byte"));
        bench.ask(Request::Flush);
    }
    assert_eq!(bench.did, [], "nothing went to the backing");
    (bench.log, bench.backing)
}

/// The end of the first so many frames.
fn end_of(frames: usize) -> usize {
    small(RING_START) + frames * FRAME_BYTES
}

#[test]
fn many_small_frames_are_read_with_few_operations() {
    let (mut log, mut backing) = logged();
    log.reads = 0;
    let (_, _, report) = open(&mut log, &mut backing, true).expect("a volume");
    assert_eq!(report.replayed, EPOCHS as u64);
    assert_eq!(report.replayed_bytes, (EPOCHS * FRAME_BYTES) as u64);
    assert!(!report.torn_tail);
    assert!(log.reads < 30, "{} reads", log.reads);
}

#[test]
fn only_the_frame_that_cannot_be_read_is_named() {
    let (mut log, mut backing) = logged();
    let bad = end_of(100) + 4096;
    log.unreadable = bad..bad + 512;
    let Err(RecoveryError::Io { offset, .. }) = open(&mut log, &mut backing, true) else {
        panic!("a durable frame cannot be read");
    };
    assert_eq!(small(offset), bad);
}

/// A copy begins anew at an old epoch, and what the log held before is behind that place.
#[test]
fn a_copy_that_is_not_complete_drops_what_it_has_no_room_for_and_any_other_one_is_refused() {
    let few = u32::try_from(EPOCHS / 2).expect("few");
    let (log, backing) = logged();
    let began_anew = CopyState::Seeding {
        cursor_bytes: 0,
        from: Epoch(0),
        until: None,
    };
    for copy in [CopyState::Fresh, began_anew] {
        let (mut log, mut backing) = (log.clone(), backing.clone());
        become_replica(&mut log, copy);
        let opened = open_with(&mut log, &mut backing, true, few);
        let (volume, mem, report) = opened.expect("it is copied anyhow");
        assert_eq!((report.replayed, report.torn_tail), (0, true));
        assert_eq!(volume.tip(), Tip::default());
        assert!(mem.free_slots() > EPOCHS / 4, "nothing is held");
        // Where there is room it is kept.
        become_replica(&mut log, copy);
        let (_, _, report) = open(&mut log, &mut backing, true).expect("a volume");
        assert_eq!((report.replayed, report.torn_tail), (EPOCHS as u64, false));
    }
    let (mut log, mut backing) = (log, backing);
    become_replica(&mut log, CopyState::Usable);
    let refused = open_with(&mut log, &mut backing, true, few).map(drop);
    assert!(matches!(
        refused,
        Err(RecoveryError::OverlayTooSmall { .. })
    ));
}

/// What the volume itself needs, and what a copy needs to go on, counts as well.
#[test]
fn a_copy_that_is_not_complete_opens_whatever_room_its_frames_leave() {
    let (log, backing) = logged();
    let (mut kept, mut dropped) = (0, 0);
    for slots in EPOCHS..EPOCHS + 64 {
        let (mut log, mut backing) = (log.clone(), backing.clone());
        become_replica(&mut log, CopyState::Fresh);
        let count = u32::try_from(slots).expect("few");
        let opened = open_with(&mut log, &mut backing, true, count);
        let (volume, mem, report) = opened.unwrap_or_else(|error| panic!("{slots}: {error}"));
        assert!(mem.free_slots() >= slots / 16, "{slots} slots");
        match report.replayed {
            0 => dropped += 1,
            _ => kept += 1,
        }
        assert_eq!(volume.tip().epoch, Epoch(report.replayed), "{slots} slots");
    }
    assert!(kept > 0 && dropped > 0, "{kept} and {dropped}");
}

/// Otherwise nobody could tell whether the copy can go on in another history, and the superblock
/// would say what cannot be.
#[test]
fn what_a_copy_had_begun_to_write_back_is_kept_when_the_rest_is_dropped() {
    let (mut log, mut backing) = logged();
    let ends_after = |epochs: usize| {
        let mut log = log.clone();
        log.bytes[end_of(epochs)..].fill(0);
        let opened = open(&mut log, &mut backing.clone(), true);
        opened.expect("a volume").0.tip()
    };
    let (checkpoint, swept) = (ends_after(50), ends_after(80));
    record(&mut log, |superblock| {
        superblock.role = Role::Replica;
        superblock.copy = CopyState::Seeding {
            cursor_bytes: 0,
            from: Epoch(0),
            until: Some(Epoch(EPOCHS as u64)),
        };
        superblock.checkpoint = checkpoint.epoch;
        superblock.checkpoint_chain = checkpoint.chain;
        superblock.checkpoint_offset = LogOffset((end_of(50) - end_of(0)) as u64);
        (superblock.swept, superblock.durable) = (swept.epoch, swept.epoch);
    });
    let before = recovery::inspect(&mut log).expect("a log").1;
    let opened = open_with(&mut log, &mut backing, true, 100);
    let (volume, _, report) = opened.expect("it is copied anyhow");
    assert_eq!((report.replayed, report.torn_tail), (30, true));
    assert_eq!(volume.tip(), swept);
    assert_eq!(volume.copy_status().anchored, swept);
    let after = recovery::inspect(&mut log).expect("a log").1;
    assert_eq!(
        after.generation,
        before.generation + 1,
        "the newest one is valid"
    );
    let said = (after.checkpoint, after.swept, after.durable);
    assert_eq!(said, (checkpoint.epoch, swept.epoch, swept.epoch));
}

/// Two histories of one incarnation could not be told apart by whoever has to choose one.
#[test]
fn a_primary_whose_newest_superblock_was_lost_does_not_take_an_incarnation_twice() {
    let (mut log, mut backing) = logged();
    let newest = |log: &mut Memory| {
        let (_, superblock, slot) = recovery::inspect(log).expect("a log");
        (superblock.incarnation, slot)
    };
    let (used, slot) = newest(&mut log);
    let at = small([SUPERBLOCK_0, SUPERBLOCK_1][slot]);
    log.bytes[at..at + 4096].fill(0);
    assert!(newest(&mut log).0 < used, "an older one is left");
    let (volume, _, report) = open(&mut log, &mut backing, true).expect("a volume");
    assert_eq!(report.replayed, EPOCHS as u64);
    assert_eq!(volume.copy_status().tip_rank.incarnation, used);
    assert_eq!(newest(&mut log).0, Incarnation(used.0 + 1));
}
