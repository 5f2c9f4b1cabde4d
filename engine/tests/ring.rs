//! The promises of the ring, on real files and sockets.

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

#[test]
fn scattered_slots_are_written_in_order_and_read_back() {
    for register_buffers in [true, false] {
        let directory = directory();
        let mut ring = ring(
            64,
            RingConfig {
                register_buffers,
                ..small()
            },
        );
        let file = direct_file(&directory, "data", 1 << 20);
        let id = ring
            .add_file(file.try_clone().expect("a copy").into())
            .expect("room");
        let taken = slots(&mut ring, 8);
        // Runs of one, two and three slots, and half slots at the ends.
        let order = [
            taken[7], taken[2], taken[3], taken[0], taken[4], taken[5], taken[6],
        ];
        let segs: Vec<_> = order.iter().map(|&slot| Seg::whole(slot)).collect();
        let write = Op::Write {
            file: id,
            offset: 4096,
            memory: Memory::slots(&segs),
            then_sync: true,
        };
        assert_eq!(one(&mut ring, write).result, Ok(7 * 4096));

        let back: Vec<_> = slots(&mut ring, 7);
        let segs: Vec<_> = back.iter().rev().map(|&slot| Seg::whole(slot)).collect();
        let read = Op::Read {
            file: id,
            offset: 4096,
            memory: Memory::slots(&segs),
        };
        assert_eq!(one(&mut ring, read).result, Ok(7 * 4096));
        let read: Vec<_> = back
            .iter()
            .rev()
            .map(|&slot| ring.arena().bytes(slot)[77])
            .collect();
        assert_eq!(read, [8, 3, 4, 1, 5, 6, 7]);

        let half = [Seg::slot(taken[1], 512, 1024)];
        let read = Op::Read {
            file: id,
            offset: 4096 * 2,
            memory: Memory::slots(&half),
        };
        assert_eq!(one(&mut ring, read).result, Ok(1024));
        let bytes = ring.arena().bytes(taken[1]);
        assert_eq!(
            (bytes[511], bytes[512], bytes[1535], bytes[1536]),
            (2, 3, 3, 2)
        );
    }
}

#[test]
fn a_read_past_the_end_of_the_file_is_an_error_and_not_a_short_success() {
    let directory = directory();
    let mut ring = ring(8, small());
    let file = direct_file(&directory, "data", 4096 + 700);
    let id = ring.add_file(file.into()).expect("room");
    let taken = slots(&mut ring, 2);
    for (offset, count) in [(0, 2), (4096, 1), (8192, 1)] {
        let segs: Vec<_> = taken[..count]
            .iter()
            .map(|&slot| Seg::whole(slot))
            .collect();
        let read = Op::Read {
            file: id,
            offset,
            memory: Memory::slots(&segs),
        };
        assert_eq!(
            one(&mut ring, read).result,
            Err(OpError::UnexpectedEof),
            "at {offset}"
        );
    }
}

#[test]
fn a_write_that_fails_is_never_reported_as_synced() {
    let directory = directory();
    let mut ring = ring(8, small());
    let path = directory.path().join("read-only");
    std::fs::write(&path, [0; 4096]).expect("room");
    let id = ring
        .add_file(File::open(&path).expect("the file").into())
        .expect("room");
    let taken = slots(&mut ring, 1);
    let segs = [Seg::whole(taken[0])];
    let write = Op::Write {
        file: id,
        offset: 0,
        memory: Memory::slots(&segs),
        then_sync: true,
    };
    assert_eq!(one(&mut ring, write).result, Err(OpError::Os(Errno::EBADF)));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn a_sync_that_fails_fails_the_write_before_it() {
    // A pipe takes bytes but cannot be made durable.
    let mut ring = ring(8, small());
    let (_reader, writer) = nix::unistd::pipe().expect("a pipe");
    let id = ring.add_file(writer).expect("room");
    let taken = slots(&mut ring, 1);
    let segs = [Seg::whole(taken[0])];
    let write = |then_sync| Op::Write {
        file: id,
        offset: 0,
        memory: Memory::slots(&segs),
        then_sync,
    };
    assert_eq!(one(&mut ring, write(false)).result, Ok(4096));
    assert_eq!(
        one(&mut ring, write(true)).result,
        Err(OpError::Os(Errno::EINVAL))
    );
    let sync = Op::Sync {
        file: id,
        data_only: true,
    };
    assert_eq!(one(&mut ring, sync).result, Err(OpError::Os(Errno::EINVAL)));
}

#[test]
fn a_short_write_is_continued_and_its_sync_comes_after_the_last_byte() {
    // RLIMIT_FSIZE would be the textbook way, but it is shared by all tests of the process; a full
    // pipe that is drained in small pieces makes every write short as well.
    let mut ring = ring(64, small());
    let (reader, writer) = nix::unistd::pipe().expect("a pipe");
    let id = ring.add_file(writer).expect("room");
    let taken = slots(&mut ring, 48);
    let segs: Vec<_> = taken.iter().map(|&slot| Seg::whole(slot)).collect();
    let drain = std::thread::spawn(move || {
        let mut reader = File::from(reader);
        let mut all = vec![0; 48 * 4096];
        reader.read_exact(&mut all).expect("all bytes");
        all
    });
    let write = Op::Write {
        file: id,
        offset: 0,
        memory: Memory::slots(&segs),
        then_sync: false,
    };
    assert_eq!(one(&mut ring, write).result, Ok(48 * 4096));
    let all = drain.join().expect("the reader");
    assert!(
        all.chunks(4096)
            .zip(1..)
            .all(|(chunk, fill)| chunk.iter().all(|&b| b == fill))
    );
}

#[test]
fn a_full_ring_gives_the_operation_and_its_buffer_back() {
    let mut ring = ring(
        8,
        RingConfig {
            operations: 2,
            ..small()
        },
    );
    let (id, mut peer) = sockets(&mut ring);
    for token in 0..2 {
        let memory = Memory::with_buf(const { &[Seg::buf(0, 64)] }, OwnedBuf::zeroed(64));
        ring.submit(Op::Recv { file: id, memory }, token)
            .expect("room");
    }
    let memory = Memory::with_buf(const { &[Seg::buf(0, 64)] }, OwnedBuf::zeroed(4242));
    let refused = ring
        .submit(Op::Recv { file: id, memory }, 3)
        .expect_err("a full ring");
    assert_eq!(refused.why, Refusal::Full);
    let Op::Recv { memory, .. } = refused.op else {
        panic!("another operation came back")
    };
    assert_eq!(memory.buf.map(|buf| buf.len()), Some(4242));
    peer.write_all(b"x").expect("a peer");
    assert_eq!(wait(&mut ring, 1)[0].result, Ok(1));
    assert_eq!(ring.room(), 1);
}

#[test]
fn wrong_segments_are_refused_before_anything_happens() {
    let mut ring = ring(8, small());
    let (id, _peer) = sockets(&mut ring);
    let mut why = |segs: &[Seg], buf| {
        let op = Op::Recv {
            file: id,
            memory: Memory { segs, buf },
        };
        ring.submit(op, 0).expect_err("refused").why
    };
    assert_eq!(why(&[], None), Refusal::BadSegments);
    assert_eq!(
        why(&[Seg::buf(0, 0)], Some(OwnedBuf::zeroed(1))),
        Refusal::BadSegments
    );
    assert_eq!(
        why(&[Seg::buf(0, 1); 65], Some(OwnedBuf::zeroed(1))),
        Refusal::BadSegments
    );
    assert_eq!(why(&[Seg::buf(0, 1)], None), Refusal::OutsideBuffer);
    assert_eq!(
        why(&[Seg::buf(1, 1)], Some(OwnedBuf::zeroed(1))),
        Refusal::OutsideBuffer
    );
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn a_slot_in_flight_cannot_be_changed_and_is_free_again_after_the_completion() {
    let mut ring = ring(8, small());
    let (id, mut peer) = sockets(&mut ring);
    let slot = slots(&mut ring, 1)[0];
    let segs = [Seg::whole(slot)];
    ring.submit(
        Op::Recv {
            file: id,
            memory: Memory::slots(&segs),
        },
        0,
    )
    .expect("room");
    let touch = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        ring.arena_mut().bytes_mut(slot).fill(0);
    }));
    assert!(touch.is_err());
    peer.write_all(b"hello").expect("a peer");
    assert_eq!(wait(&mut ring, 1)[0].result, Ok(5));
    assert_eq!(&ring.arena().bytes(slot)[..6], b"hello\x01");
    ring.arena_mut().free(slot);
}

#[test]
fn received_bytes_fill_slots_first_and_the_rest_lands_in_the_buffer() {
    let mut ring = ring(8, small());
    let (id, mut peer) = sockets(&mut ring);
    let taken = slots(&mut ring, 2);
    let sent: Vec<u8> = (0..10_000_u32)
        .map(|i| (i % 251).to_le_bytes()[0])
        .collect();
    peer.write_all(&sent).expect("a peer");
    let segs = [
        Seg::whole(taken[1]),
        Seg::whole(taken[0]),
        Seg::buf(100, 3900),
    ];
    let memory = Memory::with_buf(&segs, OwnedBuf::zeroed(4000));
    let completion = one(&mut ring, Op::Recv { file: id, memory });
    assert_eq!(completion.result, Ok(10_000));
    assert_eq!(ring.arena().bytes(taken[1]), &sent[..4096]);
    assert_eq!(ring.arena().bytes(taken[0]), &sent[4096..8192]);
    let buf = completion.buf.expect("the buffer comes back");
    assert_eq!(buf.bytes()[100..1908], sent[8192..]);
    drop(peer);
    let memory = Memory::with_buf(const { &[Seg::buf(0, 8)] }, buf);
    assert_eq!(one(&mut ring, Op::Recv { file: id, memory }).result, Ok(0));
}

#[test]
fn a_send_larger_than_the_socket_takes_is_completed_once_and_whole() {
    let mut ring = ring(64, small());
    let (id, mut peer) = sockets(&mut ring);
    let taken = slots(&mut ring, 60);
    let mut buf = OwnedBuf::zeroed(1 << 20);
    buf.bytes_mut().fill(99);
    let mut segs = vec![Seg::buf(0, 16)];
    segs.extend(taken.iter().map(|&slot| Seg::whole(slot)));
    segs.push(Seg::buf(16, (1 << 20) - 16));
    let total = (1 << 20) + 60 * SLOT_BYTES;
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; total];
        peer.read_exact(&mut all).expect("all bytes");
        all
    });
    let completion = one(
        &mut ring,
        Op::Send {
            file: id,
            memory: Memory::with_buf(&segs, buf),
        },
    );
    assert_eq!(completion.result.map(|sent| sent as usize), Ok(total));
    let all = reader.join().expect("the reader");
    assert!(all[..16].iter().all(|&byte| byte == 99));
    assert!(
        all[16..][..60 * 4096]
            .chunks(4096)
            .zip(1..)
            .all(|(c, fill)| c == [fill; 4096])
    );
    assert!(all[16 + 60 * 4096..].iter().all(|&byte| byte == 99));
}

#[test]
fn sending_to_a_closed_peer_is_an_error_and_no_signal() {
    let mut ring = ring(8, small());
    let (id, peer) = sockets(&mut ring);
    drop(peer);
    let memory = Memory::with_buf(const { &[Seg::buf(0, 8)] }, OwnedBuf::zeroed(8));
    let completion = one(&mut ring, Op::Send { file: id, memory });
    assert_eq!(completion.result, Err(OpError::Os(Errno::EPIPE)));
}

#[test]
fn accept_goes_on_until_cancelled_and_survives_a_full_table() {
    let directory = directory();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    listener
        .set_nonblocking(true)
        .expect("as systemd may hand it over");
    let mut ring = ring(
        8,
        RingConfig {
            files: 3,
            ..small()
        },
    );
    let id = ring.add_file(listener.into()).expect("room");
    let accept = ring.submit(Op::Accept { file: id }, 7).expect("room");
    let peers: Vec<_> = (0..3)
        .map(|_| UnixStream::connect(&path).expect("accepted"))
        .collect();
    let completions = wait(&mut ring, 3);
    assert!(
        completions
            .iter()
            .all(|completion| completion.token == 7 && completion.more)
    );
    assert!(completions[0].file.is_some() && completions[1].file.is_some());
    assert_eq!(completions[2].result, Err(OpError::Os(Errno::ENFILE)));
    let mut end = [0; 1];
    assert_eq!((&peers[2]).read(&mut end).expect("closed, not reset"), 0);

    // The first connection works, and closing it makes room for another.
    let file = completions[0].file.expect("a connection");
    let memory = Memory::with_buf(const { &[Seg::buf(0, 2)] }, OwnedBuf::zeroed(2));
    assert_eq!(one(&mut ring, Op::Send { file, memory }).result, Ok(2));
    assert_eq!(one(&mut ring, Op::Close { file }).result, Ok(0));
    let _peer = UnixStream::connect(&path).expect("accepted");
    assert!(wait(&mut ring, 1)[0].file.is_some_and(|new| new != file));

    assert!(ring.cancel(accept));
    let last = wait(&mut ring, 1).remove(0);
    assert_eq!((last.result, last.more), (Err(OpError::Cancelled), false));
    assert!(!ring.cancel(accept));
}

#[test]
fn closing_a_file_ends_its_operations_first_and_its_name_for_ever() {
    let mut ring = ring(8, small());
    let (id, mut peer) = sockets(&mut ring);
    for token in 1..=2 {
        let memory = Memory::with_buf(const { &[Seg::buf(0, 8)] }, OwnedBuf::zeroed(8));
        ring.submit(Op::Recv { file: id, memory }, token)
            .expect("room");
    }
    ring.submit(Op::Close { file: id }, 9).expect("room");
    let refused = ring
        .submit(
            Op::Sync {
                file: id,
                data_only: true,
            },
            3,
        )
        .expect_err("closing");
    assert_eq!(refused.why, Refusal::NoSuchFile);
    let completions = wait(&mut ring, 3);
    let results: Vec<_> = completions.iter().map(|c| (c.token, c.result)).collect();
    assert!(
        results[..2]
            .iter()
            .all(|(_, result)| *result == Err(OpError::Cancelled))
    );
    assert!(
        completions[..2]
            .iter()
            .all(|completion| completion.buf.is_some())
    );
    assert_eq!(results[2], (9, Ok(0)));
    assert_eq!(peer.read(&mut [0]).expect("closed"), 0);

    let (second, _peer) = sockets(&mut ring);
    assert_ne!(second, id);
    assert!(ring.fd(id).is_none() && ring.fd(second).is_some());
}

#[test]
fn timeouts_fire_and_can_be_cancelled() {
    let mut ring = ring(8, small());
    let start = Instant::now();
    let op = Op::Timeout {
        after: Duration::from_millis(20),
    };
    assert_eq!(one(&mut ring, op).result, Ok(0));
    assert!(start.elapsed() >= Duration::from_millis(20));
    let id = ring
        .submit(Op::Timeout { after: LIMIT * 10 }, 2)
        .expect("room");
    assert!(ring.cancel(id));
    assert_eq!(wait(&mut ring, 1)[0].result, Err(OpError::Cancelled));
}

#[test]
fn waiting_ends_at_its_own_timeout_and_zero_does_not_block() {
    let mut ring = ring(8, small());
    let mut out = Vec::new();
    let start = Instant::now();
    let waited = ring
        .wait(1, Some(Duration::from_millis(30)), &mut out)
        .expect("a working ring");
    assert_eq!((waited.completions, waited.woken), (0, false));
    assert!(start.elapsed() >= Duration::from_millis(30));
    ring.wait(0, None, &mut out).expect("a working ring");
    ring.wait(1, Some(Duration::ZERO), &mut out)
        .expect("a working ring");
}

#[test]
fn another_thread_wakes_a_sleeping_ring_every_time() {
    let mut ring = ring(8, small());
    let waker = ring.waker();
    let (ask, asked) = std::sync::mpsc::sync_channel::<()>(1);
    let thread = std::thread::spawn(move || {
        while asked.recv().is_ok() {
            waker.wake();
        }
    });
    let mut out = Vec::new();
    for round in 0..2000 {
        ask.send(()).expect("the thread");
        let waited = ring.wait(1, Some(LIMIT), &mut out).expect("a working ring");
        assert!(waited.woken, "round {round}");
    }
    drop(ask);
    thread.join().expect("the thread");
    let waited = ring
        .wait(1, Some(Duration::from_millis(5)), &mut out)
        .expect("a working ring");
    assert!(!waited.woken, "one wake-up is seen once");
}

#[test]
fn an_idle_ring_uses_no_cpu() {
    let mut ring = ring(8, small());
    let mut out = Vec::new();
    ring.wait(1, Some(Duration::from_millis(1)), &mut out)
        .expect("a working ring");
    let cpu = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID);
    let before = Duration::from(cpu().expect("a clock"));
    ring.wait(1, Some(Duration::from_millis(500)), &mut out)
        .expect("a working ring");
    let used = Duration::from(cpu().expect("a clock")).saturating_sub(before);
    assert!(
        used < Duration::from_millis(5),
        "{used:?} of CPU in 500 ms of idleness"
    );
}

#[test]
fn dropping_a_ring_with_operations_in_flight_ends_them_all() {
    let directory = directory();
    for round in 0..20 {
        let mut ring = ring(64, small());
        let file = direct_file(&directory, "data", 1 << 20);
        let disk = ring.add_file(file.into()).expect("room");
        let (socket, peer) = sockets(&mut ring);
        let taken = slots(&mut ring, 8);
        for (&slot, offset) in taken.iter().zip(0..) {
            let segs = [Seg::whole(slot)];
            let memory = Memory::slots(&segs);
            let op = Op::Write {
                file: disk,
                offset: offset * 4096,
                memory,
                then_sync: true,
            };
            ring.submit(op, offset).expect("room");
        }
        for token in 0..4 {
            let memory = Memory::with_buf(const { &[Seg::buf(0, 64)] }, OwnedBuf::zeroed(64));
            ring.submit(
                Op::Recv {
                    file: socket,
                    memory,
                },
                token,
            )
            .expect("room");
        }
        ring.submit(Op::Timeout { after: LIMIT * 10 }, 1)
            .expect("room");
        if round % 2 == 0 {
            ring.wait(0, None, &mut Vec::new()).expect("a working ring");
        }
        let start = Instant::now();
        drop(ring);
        assert!(
            start.elapsed() < LIMIT,
            "dropping took {:?}",
            start.elapsed()
        );
        let end = (&peer).read(&mut [0]).expect("the ring closed its sockets");
        assert_eq!(end, 0);
    }
}

#[test]
fn ranges_are_punched_and_zeroed() {
    let directory = directory();
    let mut ring = ring(8, small());
    let file = direct_file(&directory, "data", 0);
    let plain = File::options()
        .read(true)
        .write(true)
        .open(directory.path().join("data"));
    let plain = plain.expect("the file");
    plain.write_all_at(&[5; 16384], 0).expect("room");
    let id = ring.add_file(file.into()).expect("room");
    for (mode, offset) in [
        (FallocateMode::PunchHole, 4096),
        (FallocateMode::ZeroRange, 8192),
    ] {
        let op = Op::Fallocate {
            file: id,
            mode,
            offset,
            len: 4096,
        };
        assert_eq!(one(&mut ring, op).result, Ok(0), "{mode:?}");
    }
    let mut all = vec![1; 16384];
    plain.read_exact_at(&mut all, 0).expect("the file");
    let kept = |range: &[u8]| range.iter().all(|&byte| byte == 5);
    assert!(kept(&all[..4096]) && kept(&all[12288..]));
    assert!(all[4096..12288].iter().all(|&byte| byte == 0));
}

/// Writes every block of a file in a scrambled order at queue depth 32 and reads all back.
#[test]
fn random_4k_writes_at_depth_32_all_land_where_they_should() {
    const BLOCKS: u64 = 4096;
    let directory = directory();
    let mut ring = ring(
        32,
        RingConfig {
            operations: 32,
            ..small()
        },
    );
    let file = direct_file(&directory, "data", BLOCKS * 4096);
    let check = File::open(directory.path().join("data")).expect("the file");
    let id = ring.add_file(file.into()).expect("room");
    let mut idle = slots(&mut ring, 32);
    let mut out = Vec::with_capacity(32);
    let (mut next, mut done) = (0, 0);
    while done < BLOCKS {
        while next < BLOCKS && !idle.is_empty() {
            let slot = idle.pop().expect("not empty");
            // An odd factor permutes a power of two.
            let block = next * 2_654_435_761 % BLOCKS;
            ring.arena_mut().bytes_mut(slot)[..8].copy_from_slice(&block.to_le_bytes());
            let segs = [Seg::whole(slot)];
            let memory = Memory::slots(&segs);
            let op = Op::Write {
                file: id,
                offset: block * 4096,
                memory,
                then_sync: false,
            };
            ring.submit(op, u64::from(slot.0)).expect("room");
            next += 1;
        }
        ring.wait(1, Some(LIMIT), &mut out).expect("a working ring");
        for completion in out.drain(..) {
            assert_eq!(completion.result, Ok(4096));
            idle.push(SlotId(u32::try_from(completion.token).expect("a slot")));
            done += 1;
        }
    }
    let mut block = [0; 8];
    for index in 0..BLOCKS {
        check
            .read_exact_at(&mut block, index * 4096)
            .expect("the file");
        assert_eq!(u64::from_le_bytes(block), index);
    }
}

/// Run by [`a_memlock_limit_that_is_too_small_is_reported_and_survived`] in a process of its own.
#[test]
#[ignore = "needs a process with a small memlock limit and no CAP_IPC_LOCK"]
fn with_a_small_memlock_limit() {
    let directory = directory();
    let mut ring = ring(4096, small());
    let BufferMode::Refused { why } = &ring.facts().buffers else {
        panic!("16 MiB were registered: {}", ring.facts())
    };
    assert!(
        why.contains("16777216 bytes are needed and the memlock limit is 65536 bytes"),
        "{why}"
    );
    let file = direct_file(&directory, "data", 1 << 20);
    let id = ring.add_file(file.into()).expect("room");
    let taken = slots(&mut ring, 1);
    let segs = [Seg::whole(taken[0])];
    let write = Op::Write {
        file: id,
        offset: 0,
        memory: Memory::slots(&segs),
        then_sync: true,
    };
    assert_eq!(one(&mut ring, write).result, Ok(4096));
}

#[test]
fn a_memlock_limit_that_is_too_small_is_reported_and_survived() {
    let myself = std::env::current_exe().expect("a path");
    let output = std::process::Command::new("prlimit")
        .args([
            "--memlock=65536:65536",
            "setpriv",
            "--bounding-set=-ipc_lock",
        ])
        .args(["--inh-caps=-ipc_lock"])
        .arg(myself)
        .args(["--ignored", "--exact", "with_a_small_memlock_limit"])
        .output();
    let output = match output {
        Ok(output) if nix::unistd::geteuid().is_root() => output,
        _ => return skip("prlimit and setpriv as root"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{errors}"
    );
}

/// A skipped test says so; where tools are required it fails.
fn skip(needs: &str) {
    let required = std::env::var_os("HN4_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "this test needs {needs}");
    eprintln!("SKIPPED: this test needs {needs}");
}
