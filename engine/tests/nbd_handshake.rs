//! What the NBD handshake promises, option by option, against bytes written out from the NBD
//! protocol document.

use hn4_engine::nbd::export::{Export, ExportList, Features};
use hn4_engine::nbd::handshake::{Handshake, MetaContexts, Session, Status, greeting};
use hn4_engine::nbd::{Limits, NbdError};

const EXPORT_NAME: u8 = 1;
const ABORT: u8 = 2;
const LIST: u8 = 3;
const STARTTLS: u8 = 5;
const INFO: u8 = 6;
const GO: u8 = 7;
const STRUCTURED_REPLY: u8 = 8;
const LIST_META_CONTEXT: u8 = 9;
const SET_META_CONTEXT: u8 = 10;

const ACK: u32 = 1;
const SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const META_CONTEXT: u32 = 4;
const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_UNKNOWN: u32 = 0x8000_0006;
const ERR_TOO_BIG: u32 = 0x8000_0009;

fn exports() -> ExportList {
    let mut vol = Export::new("vol", 0x10_0000);
    vol.description = "a disk".into();
    let mut plain = Export::new("plain", 4096);
    plain.features = Features::NONE;
    plain.read_only = true;
    plain.min_block_bytes = 4096;
    ExportList::new(vec![vol, plain]).expect("valid exports")
}

/// A handshake whose client flags were received.
fn begun(limits: Limits) -> Handshake<ExportList> {
    let mut handshake = Handshake::new(exports(), limits);
    let mut out = Vec::new();
    let progress = handshake
        .advance(&[0, 0, 0, 3], &mut out)
        .expect("valid flags");
    assert_eq!((progress.consumed, progress.status), (4, Status::NeedMore));
    assert!(out.is_empty());
    handshake
}

fn be16(value: u16) -> [u8; 2] {
    zerocopy::big_endian::U16::new(value).to_bytes()
}

fn be32(value: usize) -> [u8; 4] {
    zerocopy::big_endian::U32::new(value.try_into().expect("small")).to_bytes()
}

fn option(number: u8, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &[0, 0, 0, number][..], &be32(data.len()), data].concat()
}

fn info_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = [
        &be32(name.len())[..],
        name.as_bytes(),
        &be16(infos.len().try_into().expect("few")),
    ]
    .concat();
    infos.iter().for_each(|info| data.extend(be16(*info)));
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = [&be32(name.len())[..], name.as_bytes(), &be32(queries.len())].concat();
    for query in queries {
        data.extend(be32(query.len()));
        data.extend(query.as_bytes());
    }
    data
}

/// Sends one option and cuts the replies apart: type and data of each.
fn ask(
    handshake: &mut Handshake<ExportList>,
    number: u8,
    data: &[u8],
) -> (Status, Vec<(u32, Vec<u8>)>) {
    let message = option(number, data);
    let mut out = Vec::new();
    let progress = handshake.advance(&message, &mut out).expect("no breach");
    assert_eq!(progress.consumed, message.len());
    (progress.status, replies(number, &out))
}

fn replies(number: u8, mut out: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let word = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |word: u32, byte| word << 8 | u32::from(*byte))
    };
    let mut replies = Vec::new();
    while !out.is_empty() {
        assert_eq!(&out[..8], [0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9]);
        assert_eq!(&out[8..12], [0, 0, 0, number]);
        let length = word(&out[16..20]) as usize;
        replies.push((word(&out[12..16]), out[20..20 + length].to_vec()));
        out = &out[20 + length..];
    }
    replies
}

fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<u32> {
    replies.iter().map(|(kind, _)| *kind).collect()
}

#[test]
fn greeting_offers_fixed_newstyle_without_padding() {
    assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn unknown_client_flags_close_the_connection() {
    let mut handshake = Handshake::new(exports(), Limits::default());
    let breach = handshake.advance(&[0, 0, 0, 7], &mut Vec::new());
    assert_eq!(breach, Err(NbdError::UnknownClientFlags { flags: 7 }));
    assert_eq!(
        handshake.advance(&[0], &mut Vec::new()),
        Err(NbdError::HandshakeOver)
    );
}

#[test]
fn old_newstyle_clients_get_export_name_with_its_padding_and_nothing_else() {
    let mut handshake = Handshake::new(exports(), Limits::default());
    let mut out = Vec::new();
    let input = [&[0, 0, 0, 0][..], &option(EXPORT_NAME, b"vol"), b"rest"].concat();
    let progress = handshake.advance(&input, &mut out).expect("valid");
    assert_eq!(
        progress.consumed,
        input.len() - 4,
        "requests stay with the caller"
    );
    assert_eq!(out.len(), 8 + 2 + 124);
    // Everything but DF, which needs structured replies.
    assert_eq!(out[..10], [0, 0, 0, 0, 0, 0x10, 0, 0, 0x0d, 0x6d]);
    assert!(out[10..].iter().all(|byte| *byte == 0));
    let session = Session {
        export: 0,
        structured_replies: false,
        meta_contexts: MetaContexts::default(),
        no_zeroes: false,
    };
    assert_eq!(progress.status, Status::Transmission(session));

    let mut handshake = Handshake::new(exports(), Limits::default());
    let input = [&[0, 0, 0, 0][..], &option(LIST, &[])].concat();
    let breach = handshake.advance(&input, &mut Vec::new());
    assert_eq!(breach, Err(NbdError::NotFixedNewstyle { option: 3 }));
}

#[test]
fn export_name_leaves_out_the_padding_when_agreed() {
    let mut out = Vec::new();
    let progress = begun(Limits::default())
        .advance(&option(EXPORT_NAME, b"plain"), &mut out)
        .expect("known export");
    assert_eq!(out, [0, 0, 0, 0, 0, 0, 0x10, 0, 0, 3]);
    assert!(matches!(
        progress.status,
        Status::Transmission(Session { export: 1, .. })
    ));
}

#[test]
fn export_name_of_an_unknown_export_closes_the_connection() {
    for name in [&b"other"[..], b"", b"\xff\xfe", b"vol\0"] {
        let mut out = Vec::new();
        let breach = begun(Limits::default()).advance(&option(EXPORT_NAME, name), &mut out);
        assert!(
            matches!(breach, Err(NbdError::UnknownExport { .. })),
            "{breach:?}"
        );
        assert!(out.is_empty());
    }
}

#[test]
fn go_describes_the_export_and_starts() {
    let mut handshake = begun(Limits::default());
    ask(&mut handshake, STRUCTURED_REPLY, &[]);
    let (status, replies) = ask(&mut handshake, GO, &info_data("vol", &[3]));
    let expected = [
        // Size and flags.
        (REP_INFO, vec![0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0x0d, 0xed]),
        // 512, 4096, 32 MiB.
        (REP_INFO, vec![0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]),
        (ACK, vec![]),
    ];
    assert_eq!(replies, expected);
    let session = Session {
        export: 0,
        structured_replies: true,
        meta_contexts: MetaContexts::default(),
        no_zeroes: true,
    };
    assert_eq!(status, Status::Transmission(session));
    assert_eq!(
        handshake.advance(b"x", &mut Vec::new()),
        Err(NbdError::HandshakeOver)
    );
}

#[test]
fn info_gives_texts_to_those_who_ask_and_does_not_start() {
    let mut handshake = begun(Limits::default());
    let (status, replies) = ask(&mut handshake, INFO, &info_data("vol", &[1, 2, 77]));
    assert_eq!(status, Status::SendReplies);
    assert_eq!(
        kinds(&replies),
        [REP_INFO, REP_INFO, REP_INFO, REP_INFO, ACK]
    );
    assert_eq!(replies[2].1, b"\x00\x01vol");
    assert_eq!(replies[3].1, b"\x00\x02a disk");
    // No description is better than an empty one.
    let (_, replies) = ask(&mut handshake, INFO, &info_data("plain", &[2]));
    assert_eq!(kinds(&replies), [REP_INFO, REP_INFO, ACK]);
    assert_eq!(replies[1].1[2..6], [0, 0, 0x10, 0]);
}

#[test]
fn unknown_exports_are_refused_and_haggling_goes_on() {
    let mut handshake = begun(Limits::default());
    for number in [INFO, GO] {
        let (status, replies) = ask(&mut handshake, number, &info_data("nope", &[]));
        assert_eq!(
            (status, kinds(&replies)),
            (Status::SendReplies, vec![ERR_UNKNOWN])
        );
    }
    let (_, replies) = ask(&mut handshake, GO, &info_data("vol", &[]));
    assert_eq!(kinds(&replies).last(), Some(&ACK));
}

#[test]
fn malformed_data_is_invalid_for_every_option_that_has_a_form() {
    let long = "x".repeat(4097);
    let cases: Vec<(u8, Vec<u8>)> = vec![
        (LIST, vec![0]),
        (STARTTLS, vec![0]),
        (STRUCTURED_REPLY, vec![0]),
        (GO, vec![]),
        (GO, vec![0, 0, 0]),
        (GO, vec![0xff, 0xff, 0xff, 0xff]),
        (GO, vec![0, 0, 0, 3, b'v', b'o', b'l']),
        (GO, vec![0, 0, 0, 3, b'v', b'o', b'l', 0, 1]),
        (GO, [info_data("vol", &[3]), vec![0]].concat()),
        (GO, vec![0, 0, 0, 1, 0xff, 0, 0]),
        (INFO, info_data("v\0l", &[])),
        (INFO, info_data(&long, &[])),
        (SET_META_CONTEXT, vec![]),
        (SET_META_CONTEXT, vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
        (
            SET_META_CONTEXT,
            [meta_data("vol", &["base:allocation"]), vec![9]].concat(),
        ),
        (SET_META_CONTEXT, meta_data("vol", &["no namespace"])),
        (SET_META_CONTEXT, meta_data("vol", &[&long])),
        (LIST_META_CONTEXT, vec![0, 0, 0, 9]),
    ];
    let mut handshake = begun(Limits::default());
    for (number, data) in cases {
        ask(&mut handshake, STRUCTURED_REPLY, &[]);
        let (status, replies) = ask(&mut handshake, number, &data);
        assert_eq!(
            kinds(&replies),
            [ERR_INVALID],
            "option {number} with {data:?}"
        );
        assert_eq!(status, Status::SendReplies);
        assert!(!replies[0].1.is_empty(), "an error says why");
    }
}

#[test]
fn list_names_every_export() {
    let (status, replies) = ask(&mut begun(Limits::default()), LIST, &[]);
    assert_eq!(status, Status::SendReplies);
    let expected = [
        (SERVER, b"\x00\x00\x00\x03vola disk".to_vec()),
        (SERVER, b"\x00\x00\x00\x05plain".to_vec()),
        (ACK, vec![]),
    ];
    assert_eq!(replies, expected);
}

#[test]
fn abort_is_acknowledged_and_ends_the_session_whatever_its_data() {
    for data in [&b""[..], b"bye"] {
        let mut handshake = begun(Limits::default());
        let (status, replies) = ask(&mut handshake, ABORT, data);
        assert_eq!((status, kinds(&replies)), (Status::Close, vec![ACK]));
        assert_eq!(
            handshake.advance(b"x", &mut Vec::new()),
            Err(NbdError::HandshakeOver)
        );
    }
}

#[test]
fn options_this_server_lacks_are_skipped_with_their_data() {
    let mut handshake = begun(Limits::default());
    // PEEK_EXPORT, STARTTLS, EXTENDED_HEADERS, and one from the future.
    for (number, data) in [
        (4, &[1, 2, 3][..]),
        (STARTTLS, &[]),
        (11, &[]),
        (200, &[7; 5000]),
    ] {
        let (status, replies) = ask(&mut handshake, number, data);
        assert_eq!(
            (status, kinds(&replies)),
            (Status::SendReplies, vec![ERR_UNSUP])
        );
    }
    let (_, replies) = ask(&mut handshake, LIST, &[]);
    assert_eq!(kinds(&replies).last(), Some(&ACK));
}

#[test]
fn metadata_contexts_need_structured_replies() {
    let mut handshake = begun(Limits::default());
    for number in [LIST_META_CONTEXT, SET_META_CONTEXT] {
        let (_, replies) = ask(
            &mut handshake,
            number,
            &meta_data("vol", &["base:allocation"]),
        );
        assert_eq!(kinds(&replies), [ERR_INVALID]);
    }
}

#[test]
fn contexts_are_listed_for_no_query_the_namespace_or_the_name() {
    let mut handshake = begun(Limits::default());
    ask(&mut handshake, STRUCTURED_REPLY, &[]);
    for queries in [
        &[][..],
        &["base:"],
        &["base:allocation"],
        &["x-y:z", "base:"],
    ] {
        let (_, replies) = ask(
            &mut handshake,
            LIST_META_CONTEXT,
            &meta_data("vol", queries),
        );
        let expected = [
            (META_CONTEXT, b"\0\0\0\0base:allocation".to_vec()),
            (ACK, vec![]),
        ];
        assert_eq!(replies, expected, "{queries:?}");
    }
    for queries in [&["qemu:"][..], &["base:other"]] {
        let (_, replies) = ask(
            &mut handshake,
            LIST_META_CONTEXT,
            &meta_data("vol", queries),
        );
        assert_eq!(kinds(&replies), [ACK], "{queries:?}");
    }
    let (_, replies) = ask(&mut handshake, LIST_META_CONTEXT, &meta_data("nope", &[]));
    assert_eq!(kinds(&replies), [ERR_UNKNOWN]);
}

/// Selects contexts, starts on an export, and tells whether block status would be allowed.
fn selected(steps: &[(&str, &[&str])], start: &str) -> bool {
    let mut handshake = begun(Limits::default());
    ask(&mut handshake, STRUCTURED_REPLY, &[]);
    for (name, queries) in steps {
        ask(&mut handshake, SET_META_CONTEXT, &meta_data(name, queries));
    }
    match ask(&mut handshake, GO, &info_data(start, &[])).0 {
        Status::Transmission(session) => session.meta_contexts.base_allocation,
        other => panic!("did not start: {other:?}"),
    }
}

#[test]
fn a_selected_context_holds_for_its_export_until_the_next_selection() {
    let allocation = &["base:allocation", "base:allocation"][..];
    assert!(selected(&[("vol", allocation)], "vol"));
    assert!(selected(
        &[("vol", &["qemu:dirty-bitmap:x", "base:allocation"])],
        "vol"
    ));
    assert!(!selected(&[("vol", allocation)], "plain"), "another export");
    assert!(
        !selected(&[("vol", allocation), ("vol", &[])], "vol"),
        "replaced by nothing"
    );
    assert!(
        !selected(&[("vol", allocation), ("nope", allocation)], "vol"),
        "replaced by a failure"
    );
    assert!(
        !selected(&[("vol", allocation), ("vol", &["bad"])], "vol"),
        "replaced by an error"
    );
    assert!(
        !selected(&[("vol", &["base:"])], "vol"),
        "a wildcard selects nothing"
    );
    assert!(!selected(&[], "vol"));
}

#[test]
fn a_selection_reports_one_context_once() {
    let mut handshake = begun(Limits::default());
    ask(&mut handshake, STRUCTURED_REPLY, &[]);
    let data = meta_data("vol", &["base:allocation", "base:allocation"]);
    let (_, replies) = ask(&mut handshake, SET_META_CONTEXT, &data);
    let expected = [
        (META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec()),
        (ACK, vec![]),
    ];
    assert_eq!(replies, expected);
}

#[test]
fn long_options_are_skipped_longer_ones_close_the_connection() {
    let limits = Limits {
        max_option_bytes: 100,
        max_option_skip_bytes: 200,
        ..Limits::default()
    };
    let mut handshake = begun(limits);
    for (number, length) in [(GO, 101), (SET_META_CONTEXT, 200), (99, 200)] {
        let (status, replies) = ask(&mut handshake, number, &vec![0; length]);
        assert_eq!(
            (status, kinds(&replies)),
            (Status::SendReplies, vec![ERR_TOO_BIG])
        );
    }
    let too_long = NbdError::OptionTooLong {
        option: 7,
        length: 201,
        limit: 200,
    };
    // The header alone decides.
    let header = &option(GO, &[0; 201])[..16];
    assert_eq!(handshake.advance(header, &mut Vec::new()), Err(too_long));
    let too_long = NbdError::OptionTooLong {
        option: 1,
        length: 101,
        limit: 200,
    };
    let header = &option(EXPORT_NAME, &[0; 101])[..16];
    assert_eq!(
        begun(limits).advance(header, &mut Vec::new()),
        Err(too_long)
    );
}

#[test]
fn endless_haggling_closes_the_connection() {
    let mut handshake = begun(Limits {
        max_options: 3,
        ..Limits::default()
    });
    for _ in 0..3 {
        ask(&mut handshake, LIST, &[]);
    }
    let breach = handshake.advance(&option(LIST, &[]), &mut Vec::new());
    assert_eq!(breach, Err(NbdError::TooManyOptions { limit: 3 }));
}

#[test]
fn wrong_magic_closes_the_connection() {
    let breach = begun(Limits::default()).advance(b"GET / HTTP/1.1\r\n", &mut Vec::new());
    assert_eq!(
        breach,
        Err(NbdError::BadOptionMagic {
            found: 0x4745_5420_2f20_4854
        })
    );
}

#[test]
fn pipelined_options_are_answered_one_per_call() {
    let mut handshake = begun(Limits::default());
    let input = [option(LIST, &[]), option(LIST, &[])].concat();
    let mut out = Vec::new();
    let progress = handshake.advance(&input, &mut out).expect("valid");
    assert_eq!(
        (progress.consumed, progress.status),
        (16, Status::SendReplies)
    );
}

#[test]
fn the_cuts_of_the_stream_do_not_matter() {
    let input = [
        vec![0, 0, 0, 3],
        option(STRUCTURED_REPLY, &[]),
        option(77, &[1; 40]),
        option(SET_META_CONTEXT, &meta_data("vol", &["base:allocation"])),
        option(GO, &info_data("vol", &[1, 2, 3])),
    ]
    .concat();
    let outcome = |piece: usize| {
        let mut handshake = Handshake::new(exports(), Limits::default());
        let mut out = Vec::new();
        let mut last = None;
        for chunk in input.chunks(piece) {
            let mut at = 0;
            while at < chunk.len() {
                let progress = handshake.advance(&chunk[at..], &mut out).expect("valid");
                at += progress.consumed;
                last = Some(progress.status);
            }
        }
        (out, last)
    };
    let whole = outcome(input.len());
    assert!(matches!(whole.1, Some(Status::Transmission(_))));
    (1..20).for_each(|piece| assert_eq!(outcome(piece), whole, "in pieces of {piece}"));
}
