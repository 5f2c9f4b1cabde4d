//! Compression within a session: agreed on by both or not at all, and what lies in packed frames
//! do.

use std::sync::Arc;

use hn4_proof::scxq2::{Dictionary, Packer, Shipment};
use proptest::prelude::*;

use super::*;
use crate::wire::data::DataMessage;

fn config(scxq2: bool) -> Config {
    Config {
        capabilities: capability::offered(scxq2),
        dictionaries: Renewal {
            sample_messages: 20,
            every_messages: 60,
            ..Renewal::default()
        },
        ..Config::default()
    }
}

fn line(first: bool, second: bool) -> Line {
    let mut line = Line {
        ends: [
            End::new(&config(first), primary(), true),
            End::new(&config(second), replica(), false),
        ],
    };
    line.settle();
    line.ends[1].input(Input::Credit { bytes: 1 << 30 });
    line.settle();
    line.ends[0].input(Input::FeedOpened { from: Epoch(1) });
    line
}

/// An epoch of two blocks of text that much of is said in every other epoch.
fn text(epoch: u64) -> Bytes {
    let mut text = String::new();
    let mut number = epoch;
    while text.len() < 8192 {
        number = number
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let (row, town) = (number >> 40, (number >> 33) % 50);
        text += &format!("row={row};balance={};town=Town number {town};", row / 3);
    }
    text.into()
}

/// Sends epochs, and trains whenever a dictionary is due.
fn feed(line: &mut Line, epochs: std::ops::RangeInclusive<u64>) -> usize {
    let (mut trained, mut newest) = (0, None::<Arc<Shipment>>);
    for epoch in epochs {
        let frame = text(epoch);
        let epoch = Epoch(epoch);
        line.ends[0].input(Input::SendEpoch {
            epoch,
            frame: frame.clone(),
        });
        line.settle();
        assert!(line.ends[1].has(&Output::EpochReceived { epoch, frame }));
        if let Some(samples) = line.ends[0].session.take_samples() {
            let before = newest.as_ref().map(|newest| newest.dictionary());
            let dictionary = samples.train().expect("a dictionary");
            let shipment = Arc::new(Shipment::new(dictionary, before).expect("encoded"));
            newest = Some(Arc::clone(&shipment));
            let event = Event::Dictionary(shipment);
            line.ends[0].session.handle(Duration::ZERO, event);
            trained += 1;
        }
    }
    trained
}

#[test]
fn both_sides_agree_and_the_wire_carries_less() {
    let mut line = line(true, true);
    assert_eq!(feed(&mut line, 1..=100), 2, "one, and one that renews it");
    let [sender, receiver] = &line.ends;
    let (sent, received) = (sender.session.compression(), receiver.session.compression());
    assert!(sent.agreed && received.agreed);
    assert_eq!(sent.sent, received.received);
    assert!(sent.dictionary.is_some());
    assert_eq!(sent.dictionary, received.peer_dictionary);
    assert!(sent.sent.raw_bytes >= 100 * 8192);
    assert!(sent.sent.wire_bytes * 3 < sent.sent.raw_bytes, "{sent:?}");
}

#[test]
fn off_on_either_side_sends_everything_as_it_is() {
    for (first, second) in [(true, false), (false, true), (false, false)] {
        let mut line = line(first, second);
        assert_eq!(feed(&mut line, 1..=40), 0, "nothing is sampled");
        for end in &line.ends {
            let status = end.session.compression();
            assert!(!status.agreed && status.dictionary.is_none());
            assert_eq!(status.sent.raw_bytes, status.sent.wire_bytes);
            assert_eq!(status.received.raw_bytes, status.received.wire_bytes);
        }
    }
}

/// An established replica that takes packed messages, or not, and the sealer of a peer that may
/// lie. Epoch 1 is expected next.
fn victim(takes_packed: bool) -> (End, FrameSealer) {
    let mut line = line(true, takes_packed);
    line.settle();
    let mut sealer = FrameSealer::new(Stream::Data, &keys(true).data.send);
    // The peer's only frame so far opened the feed.
    sealer.seal(FrameKind::Data, true, b"", Bytes::new());
    let [_, end] = line.ends;
    (end, sealer)
}

fn head(raw_bytes: usize) -> [u8; 32] {
    let message = DataMessage::EpochChunk {
        epoch: Epoch(1),
        offset: 0,
        total: raw_bytes as u64,
        bytes: Bytes::new(),
    };
    message.encode().0
}

fn deliver(end: &mut End, frame: &crate::wire::WireFrame) -> Option<String> {
    let before = end.outputs.len();
    let (stream, bytes) = (Stream::Data, frame.to_bytes());
    end.session
        .handle(Duration::ZERO, Event::Received { stream, bytes });
    end.collect(true);
    let epoch = |output: &Output| matches!(output, Output::EpochReceived { .. });
    match end.closed() {
        Some(CloseReason::Protocol(why)) => {
            assert!(!end.outputs[before..].iter().any(epoch), "used: {why}");
            Some(why.clone())
        }
        _ => None,
    }
}

fn pack(raw: &[u8]) -> Vec<u8> {
    let mut packer = Packer::new(3, true).expect("a packer");
    packer.pack_if_smaller(raw).expect("it shrinks")
}

#[test]
fn a_bomb_is_refused_by_what_it_announces_and_by_what_comes_out() {
    let length = config(true).max_piece_bytes + 1;
    let (mut end, mut sealer) = victim(true);
    let bomb = pack(&vec![0; length]);
    assert!(bomb.len() < 1000);
    let why = deliver(&mut end, &sealer.seal_packed(&head(length), bomb.into()));
    assert!(why.is_some_and(|why| why.contains("are allowed")));
    // One that announces little and holds much.
    let (mut end, mut sealer) = victim(true);
    let mut liar = pack(&vec![0; 1 << 20]);
    liar[4..8].copy_from_slice(&4096_u32.to_le_bytes());
    let why = deliver(&mut end, &sealer.seal_packed(&head(4096), liar.into()));
    assert!(why.is_some_and(|why| why.contains("damaged")));
    // One whose message is longer than its epoch.
    let (mut end, mut sealer) = victim(true);
    let long = pack(&vec![0; 1 << 20]);
    let why = deliver(&mut end, &sealer.seal_packed(&head(4096), long.into()));
    assert!(why.is_some_and(|why| why.contains("outside its epoch frame")));
}

#[test]
fn a_dictionary_that_was_never_sent_is_named() {
    let dictionary = Dictionary::new(text(7).to_vec()).expect("short");
    let mut packer = Packer::new(3, true).expect("a packer");
    packer.set_dictionary(&dictionary).expect("usable");
    let segment = packer.pack_if_smaller(&text(1)).expect("it shrinks");
    let (mut end, mut sealer) = victim(true);
    let frame = sealer.seal_packed(&head(text(1).len()), segment.into());
    let why = deliver(&mut end, &frame).expect("refused");
    assert!(why.contains(&dictionary.id().to_string()), "{why}");
    // A delta against a dictionary that was never sent; and one that leads to another dictionary.
    let other = Dictionary::new(text(8).to_vec()).expect("short");
    let mut wrong = dictionary.delta(None).expect("encoded");
    wrong[2] ^= 1;
    for bytes in [dictionary.delta(Some(&other)).expect("encoded"), wrong] {
        let (mut end, mut sealer) = victim(true);
        let (head, body) = DataMessage::Dictionary {
            bytes: bytes.into(),
        }
        .encode();
        let frame = sealer.seal(FrameKind::Data, true, &head, body);
        let why = deliver(&mut end, &frame).expect("refused");
        assert!(why.contains("dictionary"), "{why}");
    }
}

#[test]
fn what_was_not_agreed_on_ends_the_session() {
    let (mut end, mut sealer) = victim(false);
    let segment = pack(&text(1));
    let frame = sealer.seal_packed(&head(text(1).len()), segment.into());
    let why = deliver(&mut end, &frame).expect("refused");
    assert!(why.contains("not negotiated"), "{why}");
    let (mut end, mut sealer) = victim(false);
    let bytes = Dictionary::new(text(7).to_vec()).and_then(|dictionary| dictionary.delta(None));
    let bytes = bytes.expect("encoded").into();
    let (head, body) = DataMessage::Dictionary { bytes }.encode();
    let why = deliver(&mut end, &sealer.seal(FrameKind::Data, true, &head, body));
    assert!(why.is_some_and(|why| why.contains("not agreed")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A peer whose packed bytes are damaged before they are sealed: refused here, or other bytes
    /// of the announced length come out, which the checks of the raw frame find.
    #[test]
    fn flipped_bits_in_a_segment_never_change_its_length(
        flips in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
    ) {
        let raw = text(1);
        let mut segment = pack(&raw);
        let bits = segment.len() * 8;
        for flip in flips {
            let bit = flip.index(bits);
            segment[bit / 8] ^= 1 << (bit % 8);
        }
        let (mut end, mut sealer) = victim(true);
        let frame = sealer.seal_packed(&head(raw.len()), segment.into());
        if deliver(&mut end, &frame).is_none() {
            for output in &end.outputs {
                if let Output::EpochReceived { frame, .. } = output {
                    prop_assert_eq!(frame.len(), raw.len());
                }
            }
            prop_assert!(!end.session.is_closed());
        }
    }

    /// Whatever stands in a packed frame, nothing panics and nothing longer than allowed is made.
    #[test]
    fn arbitrary_packed_frames_never_panic(
        kind in 0_u8..9,
        form in 0_u8..4,
        length in 0_u32..3_000_000,
        garbage in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let (mut end, mut sealer) = victim(true);
        let mut head = head(usize::try_from(length).unwrap_or(0));
        head[0] = kind;
        let mut segment = vec![1, form, 0, 0];
        segment.extend_from_slice(&length.to_le_bytes());
        segment.extend_from_slice(&garbage);
        deliver(&mut end, &sealer.seal_packed(&head, segment.into()));
        let most = config(true).max_piece_bytes;
        for output in &end.outputs {
            if let Output::EpochReceived { frame, .. } = output {
                prop_assert!(frame.len() <= most);
            }
        }
    }
}
