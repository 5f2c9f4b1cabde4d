//! Frames that are whole, cut, damaged and forged.

use proptest::prelude::*;

use super::*;

const KEY: [u8; 32] = [7; 32];

fn sealed(count: usize) -> Vec<u8> {
    let mut sealer = FrameSealer::new(Stream::Data, &KEY);
    let mut wire = Vec::new();
    for index in 0..count {
        let body = Bytes::from(vec![u8::try_from(index).unwrap_or(0); 100 * index]);
        wire.extend_from_slice(&sealer.seal(FrameKind::Data, true, b"head", body).to_bytes());
    }
    wire
}

fn opener() -> FrameOpener {
    FrameOpener::new(Stream::Data, &KEY, 1 << 16)
}

proptest! {
    #[test]
    fn frames_survive_any_split_of_the_stream(
        cuts in prop::collection::vec(1_usize..400, 1..40),
    ) {
        let wire = sealed(8);
        let mut opener = opener();
        let (mut rest, mut frames) = (wire.as_slice(), Vec::new());
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let size = rest.len().min(*cuts.next().unwrap_or(&1));
            let (piece, after) = rest.split_at(size);
            rest = after;
            opener.push(piece);
            while let Some(frame) = opener.next_frame()? {
                frames.push(frame);
            }
        }
        prop_assert_eq!(frames.len(), 8);
        for (index, frame) in frames.iter().enumerate() {
            prop_assert_eq!(frame.sequence, index as u64 + 1);
            prop_assert_eq!(frame.payload.len(), 4 + 100 * index);
        }
    }

    #[test]
    fn no_flipped_bit_passes(position in 0_usize..2400, bit in 0_u8..8) {
        let mut wire = sealed(6);
        let position = position % wire.len();
        wire[position] ^= 1 << bit;
        let mut opener = opener();
        opener.push(&wire);
        let mut passed = 0_u64;
        let stopped = loop {
            match opener.next_frame() {
                Ok(Some(frame)) => { passed += 1; prop_assert_eq!(frame.sequence, passed); }
                // A longer announced length waits for bytes that never come.
                Ok(None) => break passed < 6,
                Err(_) => break opener.next_frame().is_err(),
            }
        };
        prop_assert!(stopped);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut opener = opener();
        opener.push(&bytes);
        while let Ok(Some(_)) = opener.next_frame() {}
    }
}

#[test]
fn a_frame_of_another_channel_is_refused() {
    let mut other = FrameSealer::new(Stream::Data, &[8; 32]);
    let mut receiver = opener();
    receiver.push(
        &other
            .seal(FrameKind::Data, false, b"x", Bytes::new())
            .to_bytes(),
    );
    assert_eq!(receiver.next_frame(), Err(WireError::Hmac { sequence: 1 }));
}

#[test]
fn a_repeated_or_skipped_frame_is_refused() {
    let mut sealer = FrameSealer::new(Stream::Data, &KEY);
    let first = sealer
        .seal(FrameKind::Data, false, b"1", Bytes::new())
        .to_bytes();
    let second = sealer
        .seal(FrameKind::Data, false, b"2", Bytes::new())
        .to_bytes();
    let mut receiver = opener();
    receiver.push(&first);
    assert!(matches!(receiver.next_frame(), Ok(Some(_))));
    receiver.push(&first);
    assert_eq!(
        receiver.next_frame(),
        Err(WireError::Sequence {
            found: 1,
            expected: 2
        })
    );
    let mut receiver = opener();
    receiver.push(&second);
    assert_eq!(
        receiver.next_frame(),
        Err(WireError::Sequence {
            found: 2,
            expected: 1
        })
    );
}

#[test]
fn a_length_over_the_limit_is_refused_before_its_bytes_arrive() {
    let mut sealer = FrameSealer::new(Stream::Data, &KEY);
    let frame = sealer.seal(
        FrameKind::Data,
        false,
        &vec![0; (1 << 16) + 1],
        Bytes::new(),
    );
    let mut receiver = opener();
    receiver.push(&frame.head[..HEADER_BYTES]);
    let expected = WireError::TooLong {
        found: (1 << 16) + 1,
        limit: 1 << 16,
    };
    assert_eq!(receiver.next_frame(), Err(expected));
}

#[test]
fn a_frame_on_the_wrong_stream_is_refused() {
    let mut sealer = FrameSealer::new(Stream::Control, &KEY);
    let frame = sealer
        .seal(FrameKind::Control, false, b"x", Bytes::new())
        .to_bytes();
    let mut receiver = opener();
    receiver.push(&frame);
    let expected = WireError::Kind {
        found: 2,
        stream: Stream::Data,
    };
    assert_eq!(receiver.next_frame(), Err(expected));
}
