//! The promises of the ring, on real files and sockets.

mod files;
mod sockets;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use hn4_engine::arena::{Arena, SLOT_BYTES, SlotId, SlotMemory};
use hn4_engine::ring::{
    BufferMode, Completion, FallocateMode, FileId, Memory, Op, OpError, OwnedBuf, Refusal, Ring,
    RingConfig, Seg,
};
use nix::errno::Errno;

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(20);

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory below the target")
}

fn ring(slots: u32, config: RingConfig) -> Ring {
    Ring::new(config, Arena::new(slots).expect("memory")).expect("a ring")
}

fn small() -> RingConfig {
    RingConfig {
        operations: 16,
        segments: 64,
        files: 8,
        ..RingConfig::default()
    }
}

fn direct_file(directory: &tempfile::TempDir, name: &str, bytes: u64) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(directory.path().join(name))
        .expect("a file system with O_DIRECT");
    file.set_len(bytes).expect("room");
    file
}

fn wait(ring: &mut Ring, count: usize) -> Vec<Completion> {
    let (mut out, end) = (Vec::new(), Instant::now() + LIMIT);
    while out.len() < count {
        assert!(
            Instant::now() < end,
            "{} of {count} completions within {LIMIT:?}",
            out.len()
        );
        ring.wait(1, Some(Duration::from_secs(1)), &mut out)
            .expect("a working ring");
    }
    assert_eq!(out.len(), count);
    out
}

fn one(ring: &mut Ring, op: Op<'_>) -> Completion {
    ring.submit(op, 1).expect("taken");
    wait(ring, 1).pop().expect("one completion")
}

fn slots(ring: &mut Ring, count: u8) -> Vec<SlotId> {
    let mut taken = Vec::new();
    for fill in 0..count {
        let slot = ring.arena_mut().alloc().expect("a free slot");
        ring.arena_mut().bytes_mut(slot).fill(fill + 1);
        taken.push(slot);
    }
    taken
}

fn sockets(ring: &mut Ring) -> (FileId, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    (ring.add_file(OwnedFd::from(ours)).expect("room"), theirs)
}

/// A skipped test says so; where tools are required it fails.
fn skip(needs: &str) {
    let required = std::env::var_os("HN4_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "this test needs {needs}");
    eprintln!("SKIPPED: this test needs {needs}");
}
