//! Whatever a client sends, the NBD codec does not panic, makes progress, and keeps what it holds
//! and writes within its limits.

use hn4_engine::nbd::Limits;
use hn4_engine::nbd::connection::{Decoded, Decoder};
use hn4_engine::nbd::export::{Export, ExportList};
use hn4_engine::nbd::handshake::{Handshake, MetaContexts, Session, Status};
use hn4_engine::nbd::request::{ByteRange, Command, Operation};
use proptest::collection::vec;
use proptest::prelude::*;

const LIMITS: Limits = Limits {
    max_option_bytes: 256,
    max_option_skip_bytes: 1024,
    max_options: 20,
    max_drain_bytes: 8192,
    max_extents: 16,
};
const SIZE: u64 = 1 << 20;

fn export() -> Export {
    let mut export = Export::new("vol", SIZE);
    export.max_block_bytes = 8192;
    export
}

fn session() -> Session {
    Session {
        export: 0,
        structured_replies: true,
        meta_contexts: MetaContexts {
            base_allocation: true,
        },
        no_zeroes: true,
    }
}

fn be32(value: u32) -> [u8; 4] {
    zerocopy::big_endian::U32::new(value).to_bytes()
}

/// Options whose parts are plausible on their own, so that deep paths are reached.
fn option() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        vec(any::<u8>(), 0..40),
        Just(b"\0\0\0\x03vol".to_vec()),
        Just(b"\0\0\0\x0fbase:allocation".to_vec()),
        (0_u32..4).prop_map(|count| be32(count).to_vec()),
        Just(b"\0\x01\0\x03".to_vec()),
    ];
    let data = vec(piece, 0..5).prop_map(|pieces| pieces.concat());
    let false_length = prop_oneof![
        9 => Just(None),
        1 => any::<u32>().prop_map(Some),
        1 => (0..2000_u32).prop_map(Some),
    ];
    (0_u32..13, data, false_length).prop_map(|(number, data, length)| {
        let length = length.unwrap_or(u32::try_from(data.len()).expect("small"));
        [b"IHAVEOPT", &be32(number)[..], &be32(length), &data].concat()
    })
}

fn handshake_stream() -> impl Strategy<Value = Vec<u8>> {
    let plausible = (0_u8..5, vec(option(), 0..30))
        .prop_map(|(flags, options)| [vec![0, 0, 0, flags], options.concat()].concat());
    prop_oneof![1 => vec(any::<u8>(), 0..300), 4 => plausible]
}

/// A request header, mostly with the right magic and in or near the export.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let magic = prop_oneof![19 => Just([0x25, 0x60, 0x95, 0x13]), 1 => any::<[u8; 4]>()];
    let flags = prop_oneof![
        3 => Just([0, 0]),
        2 => (0..32_u8).prop_map(|flags| [0, flags]),
        1 => any::<[u8; 2]>(),
    ];
    let sectors = prop_oneof![9 => 0..2060_u64, 1 => any::<u64>()];
    let length = prop_oneof![
        7 => (0..20_u32).prop_map(|sectors| sectors * 512),
        1 => 0..9000_u32,
        1 => any::<u32>(),
    ];
    (
        magic,
        flags,
        0..9_u8,
        any::<u64>(),
        sectors,
        length,
        vec(any::<u8>(), 0..600),
    )
        .prop_map(
            |(magic, flags, command, cookie, sectors, length, payload)| {
                let offset = zerocopy::big_endian::U64::new(sectors.wrapping_mul(512));
                let cookie = zerocopy::big_endian::U64::new(cookie);
                let payload = if command == 1 {
                    payload
                        .iter()
                        .copied()
                        .cycle()
                        .take(length.min(9000) as usize)
                        .collect()
                } else {
                    Vec::new()
                };
                let (offset, cookie) = (offset.to_bytes(), cookie.to_bytes());
                let head = [
                    &magic[..],
                    &flags,
                    &[0, command],
                    &cookie,
                    &offset,
                    &be32(length),
                ];
                [head.concat(), payload].concat()
            },
        )
}

fn request_stream() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        1 => vec(any::<u8>(), 0..400),
        6 => vec(request(), 0..12).prop_map(|requests| requests.concat()),
    ]
}

/// Every event of a stream, cut into pieces; payload bytes are replaced by their total.
fn events(stream: &[u8], piece: usize) -> (Vec<Decoded>, u64, bool) {
    let mut decoder = Decoder::new(&export(), &session(), &LIMITS);
    let (mut events, mut payload) = (Vec::new(), 0);
    for chunk in stream.chunks(piece) {
        let mut at = 0;
        while at < chunk.len() {
            let Ok(step) = decoder.decode(&chunk[at..]) else {
                return (events, payload, false);
            };
            assert!(step.consumed > 0, "no progress at {at}");
            assert!(
                step.consumed <= chunk.len() - at,
                "took more than was there"
            );
            match step.decoded {
                Decoded::Payload { length, .. } => {
                    assert_eq!(length as usize, step.consumed);
                    payload += u64::from(length);
                }
                Decoded::Skip { length } => assert_eq!(length as usize, step.consumed),
                Decoded::NeedMore => assert_eq!(step.consumed, chunk.len() - at),
                Decoded::Disconnect => return (events, payload, true),
                event => events.push(event),
            }
            at += step.consumed;
            assert!(decoder.payload_left() <= export().max_block_bytes);
            assert!(decoder.drain_left() <= LIMITS.max_drain_bytes);
        }
        let empty = decoder.decode(&[]).expect("nothing is never wrong");
        assert_eq!(
            (empty.consumed, empty.decoded),
            (0, Decoded::NeedMore),
            "an event was held"
        );
    }
    (events, payload, true)
}

fn range_of(command: &Command) -> Option<ByteRange> {
    match command.operation {
        Operation::Read { range, .. }
        | Operation::Write { range, .. }
        | Operation::Trim { range, .. }
        | Operation::WriteZeroes { range, .. }
        | Operation::BlockStatus { range, .. }
        | Operation::Cache { range } => Some(range),
        Operation::Flush | Operation::Disconnect => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(2000)
    })]

    #[test]
    fn a_handshake_survives_anything(stream in handshake_stream(), piece in 1_usize..400) {
        let exports = ExportList::new(vec![export()]).expect("valid");
        let mut handshake = Handshake::new(&exports, LIMITS);
        let mut options = 0;
        'stream: for chunk in stream.chunks(piece) {
            let mut at = 0;
            while at < chunk.len() {
                let mut out = Vec::new();
                let Ok(progress) = handshake.advance(&chunk[at..], &mut out) else {
                    break 'stream;
                };
                prop_assert!(progress.consumed > 0, "no progress");
                prop_assert!(out.len() < 600, "one option wrote {} bytes", out.len());
                at += progress.consumed;
                match progress.status {
                    Status::NeedMore => prop_assert_eq!(at, chunk.len()),
                    Status::SendReplies => options += 1,
                    Status::Transmission(session) => {
                        prop_assert_eq!(session.export, 0);
                        break 'stream;
                    }
                    Status::Close => break 'stream,
                }
            }
        }
        prop_assert!(options <= LIMITS.max_options);
    }

    #[test]
    fn a_decoder_survives_anything_and_lets_only_sound_commands_through(
        stream in request_stream(),
        piece in 1_usize..1000,
    ) {
        let (events, ..) = events(&stream, piece);
        for event in events {
            let Decoded::Request(command) = event else { continue };
            if let Some(range) = range_of(&command) {
                prop_assert!(range.length > 0);
                prop_assert!(range.end() <= SIZE);
                prop_assert!(range.offset % 512 == 0 && range.length % 512 == 0);
            }
        }
    }

    #[test]
    fn the_cuts_of_the_stream_do_not_change_what_is_decoded(
        stream in request_stream(),
        piece in 1_usize..1000,
    ) {
        prop_assert_eq!(events(&stream, piece), events(&stream, stream.len().max(1)));
    }
}
