//! Sockets, refusals, closing and the end of a ring.

use super::*;

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
fn a_file_can_be_taken_out_of_a_full_ring_and_belongs_to_the_caller_then() {
    let config = RingConfig {
        operations: 1,
        ..small()
    };
    let mut ring = ring(8, config);
    let (busy, mut waker) = sockets(&mut ring);
    let (id, mut peer) = sockets(&mut ring);
    let memory = Memory::with_buf(const { &[Seg::buf(0, 8)] }, OwnedBuf::zeroed(8));
    ring.submit(Op::Recv { file: busy, memory }, 1)
        .expect("room");
    // A full ring cannot close it.
    let refused = ring.submit(Op::Close { file: id }, 2).expect_err("full");
    assert_eq!(refused.why, Refusal::Full);
    let errno = |result: std::io::Result<OwnedFd>| result.map_err(|error| error.raw_os_error());
    let in_flight = errno(ring.take_file(busy)).expect_err("an operation needs it");
    assert_eq!(in_flight, Some(libc::EBUSY));

    let mut taken = UnixStream::from(ring.take_file(id).expect("idle"));
    let gone = errno(ring.take_file(id)).expect_err("it is not there any more");
    assert_eq!(gone, Some(libc::EBADF));
    assert!(ring.fd(id).is_none());
    taken.write_all(b"x").expect("it is open");
    peer.read_exact(&mut [0]).expect("it is open");
    drop(taken);
    assert_eq!(peer.read(&mut [0]).expect("closed"), 0);

    waker.write_all(b"x").expect("a peer");
    assert_eq!(wait(&mut ring, 1)[0].result, Ok(1));
    ring.take_file(busy).expect("idle now");
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
