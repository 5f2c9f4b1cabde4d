//! Frames that do not come to their end.

use super::*;
use crate::wire::data::DataMessage;

/// A chunk of an epoch of so many bytes, as the frame that brings it.
fn chunk(data: &mut FrameSealer, length: usize) -> Bytes {
    let chunk = DataMessage::EpochChunk {
        epoch: Epoch(5),
        offset: 0,
        total: length as u64,
        bytes: vec![7; length].into(),
    };
    let (head, body) = chunk.encode();
    data.seal(FrameKind::Data, true, &head, body).to_bytes()
}

fn feed(data: &mut FrameSealer) -> Bytes {
    let (head, body) = DataMessage::FeedBegin { from: Epoch(5) }.encode();
    data.seal(FrameKind::Data, true, &head, body).to_bytes()
}

fn receive(end: &mut End, now: Duration, bytes: Bytes) {
    let stream = Stream::Data;
    end.session.handle(now, Event::Received { stream, bytes });
}

/// Time passes while the peer answers every heartbeat; ends when the session does, or at `until`.
fn pass(end: &mut End, control: &mut FrameSealer, until: Duration) -> Duration {
    let mut now = Duration::ZERO;
    let mut id = 0;
    while let Some(at) = end.session.next_timeout().filter(|at| *at < until) {
        now = at;
        end.session.handle_timeout(now);
        end.collect(true);
        id += 1;
        let beat = crate::wire::control::Heartbeat { id, answer: false };
        let frame = control.seal(FrameKind::Heartbeat, false, &beat.encode(), Bytes::new());
        let bytes = frame.to_bytes();
        let stream = Stream::Control;
        let later = now + Duration::from_millis(1);
        end.session.handle(later, Event::Received { stream, bytes });
    }
    now
}

#[test]
fn a_frame_with_a_damaged_length_ends_the_session_although_the_peer_is_alive() {
    let limit = Config::default().frame_timeout;
    let (mut end, mut control, mut data) = liar();
    receive(&mut end, Duration::ZERO, feed(&mut data));
    let mut bytes = chunk(&mut data, 4096).to_vec();
    bytes[5] ^= 0x40; // 16 KiB more than there are.
    receive(&mut end, Duration::ZERO, bytes.into());
    let ended = pass(&mut end, &mut control, 10 * limit);
    end.collect(true);
    let Some(CloseReason::Protocol(why)) = end.closed() else {
        panic!("{:?}", end.closed());
    };
    assert!(why.contains("frame 2 on the Data stream"), "{why}");
    assert!(ended <= limit, "{ended:?}");
}

#[test]
fn a_frame_that_comes_slowly_is_waited_for() {
    let limit = Config::default().frame_timeout;
    let (mut end, mut control, mut data) = liar();
    receive(&mut end, Duration::ZERO, feed(&mut data));
    let bytes = chunk(&mut data, 200 << 10);
    let mut now = Duration::ZERO;
    for part in bytes.chunks(20 << 10) {
        receive(&mut end, now, Bytes::copy_from_slice(part));
        now += limit.mul_f64(0.9);
        pass(&mut end, &mut control, now);
    }
    end.collect(true);
    assert!(end.session.is_established());
    let arrived = |output: &Output| matches!(output, Output::EpochReceived { .. });
    assert!(end.outputs.iter().any(arrived));
}

#[test]
fn nobody_is_blamed_for_a_daemon_that_takes_nothing() {
    let limit = Config::default().frame_timeout;
    let (mut end, mut control, mut data) = liar();
    receive(&mut end, Duration::ZERO, feed(&mut data));
    end.collect(true);
    let mut epoch = 5;
    while end.session.accepts_data() {
        let message = DataMessage::EpochChunk {
            epoch: Epoch(epoch),
            offset: 0,
            total: 1,
            bytes: Bytes::from_static(b"x"),
        };
        let (head, body) = message.encode();
        let frame = data.seal(FrameKind::Data, true, &head, body).to_bytes();
        receive(&mut end, Duration::ZERO, frame);
        epoch += 1;
    }
    let message = DataMessage::EpochChunk {
        epoch: Epoch(epoch),
        offset: 0,
        total: 9,
        bytes: Bytes::from_static(b"123456789"),
    };
    let (head, body) = message.encode();
    let frame = data.seal(FrameKind::Data, true, &head, body).to_bytes();
    receive(&mut end, Duration::ZERO, frame.slice(..30));
    // Reading pauses here, for long; then the daemon takes what is there.
    for tick in 1..40 {
        let now = limit * tick / 4;
        end.session.handle_timeout(now);
        let beat = crate::wire::control::Heartbeat {
            id: u64::from(tick),
            answer: false,
        };
        let frame = control.seal(FrameKind::Heartbeat, false, &beat.encode(), Bytes::new());
        let (stream, bytes) = (Stream::Control, frame.to_bytes());
        end.session.handle(now, Event::Received { stream, bytes });
    }
    end.collect(true);
    assert!(end.session.is_established());
    end.session.handle_timeout(limit.mul_f64(10.6));
    assert!(
        end.session.is_established(),
        "what it waits for may be on its way"
    );
    receive(&mut end, limit.mul_f64(10.7), frame.slice(30..));
    end.collect(true);
    let last = |output: &Output| match output {
        Output::EpochReceived { epoch: found, .. } => *found == Epoch(epoch),
        _ => false,
    };
    assert!(end.outputs.iter().any(last));
}
