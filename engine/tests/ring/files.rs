//! Files, time, waking.

use super::*;

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
        .args(["--ignored", "--exact", "files::with_a_small_memlock_limit"])
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
