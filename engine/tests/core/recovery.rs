//! How a log is read when it is opened: far ahead, though what lies ahead may be unreadable.

use hn4::log::RING_START;
use hn4_engine::core::event::Request;
use hn4_engine::core::recovery::RecoveryError;

use crate::memory::{Memory, small};
use crate::merge::{Bench, open};

/// Head and payload of an epoch with one block.
const FRAME_BYTES: usize = 8192;
const EPOCHS: usize = 200;

/// A log that holds so many epochs which are not in the backing, and that backing.
fn logged() -> (Memory, Memory) {
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
