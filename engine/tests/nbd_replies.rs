//! What the NBD codec promises on replies, against bytes written out from the NBD protocol
//! document.

use hn4_engine::nbd::Limits;
use hn4_engine::nbd::handshake::{MetaContexts, Session};
use hn4_engine::nbd::reply::{Extent, Replier};
use hn4_engine::nbd::request::{ByteRange, Cookie, NbdErrno, Refusal};

const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);

fn replier(structured: bool) -> Replier {
    let session = Session {
        export: 0,
        structured_replies: structured,
        meta_contexts: MetaContexts {
            base_allocation: structured,
        },
        no_zeroes: true,
    };
    Replier::new(
        &session,
        &Limits {
            max_extents: 3,
            ..Limits::default()
        },
    )
}

const COOKIE_BYTES: &[u8] = b"\x01\x02\x03\x04\x05\x06\x07\x08";

#[test]
fn success_is_a_simple_reply() {
    for structured in [false, true] {
        let expected = [b"\x67\x44\x66\x98\0\0\0\0", COOKIE_BYTES].concat();
        assert_eq!(replier(structured).done(COOKIE)[..], expected);
    }
    assert_eq!(replier(false).end(COOKIE), None);
    let expected = [b"\x66\x8e\x33\xef\0\x01\0\0", COOKIE_BYTES, b"\0\0\0\0"].concat();
    assert_eq!(replier(true).end(COOKIE).expect("structured")[..], expected);
}

#[test]
fn a_read_is_one_header_before_its_data() {
    let range = ByteRange {
        offset: 0x4000_0200,
        length: 1024,
    };
    let simple = replier(false)
        .read(COOKIE, range, false)
        .rest()
        .expect("not empty");
    assert_eq!(
        simple[..],
        [b"\x67\x44\x66\x98\0\0\0\0", COOKIE_BYTES].concat()
    );
    let mut reply = replier(true).read(COOKIE, range, false);
    let header = reply.rest().expect("not empty");
    let expected = [
        b"\x66\x8e\x33\xef\0\x01\0\x01",
        COOKIE_BYTES,
        b"\0\0\x04\x08\0\0\0\0\x40\0\x02\0",
    ]
    .concat();
    assert_eq!(header[..], expected);
    assert_eq!((reply.left(), reply.rest()), (0, None));
}

#[test]
fn a_read_in_chunks_ends_with_the_chunk_that_reaches_the_end() {
    let range = ByteRange {
        offset: 512,
        length: 2048,
    };
    let mut reply = replier(true).read(COOKIE, range, false);
    assert_eq!(reply.data(0), None);
    assert_eq!(reply.data(2049), None);
    let hole = reply.hole(1024).expect("fits");
    let expected = [
        b"\x66\x8e\x33\xef\0\0\0\x02",
        COOKIE_BYTES,
        b"\0\0\0\x0c\0\0\0\0\0\0\x02\0\0\0\x04\0",
    ]
    .concat();
    assert_eq!(hole[..], expected);
    let data = reply.data(1024).expect("fits");
    let expected = [
        b"\x66\x8e\x33\xef\0\x01\0\x01",
        COOKIE_BYTES,
        b"\0\0\x04\x08\0\0\0\0\0\0\x06\0",
    ]
    .concat();
    assert_eq!(data[..], expected);
    assert_eq!(reply.left(), 0);
}

#[test]
fn clients_that_need_one_piece_get_one_piece() {
    let range = ByteRange {
        offset: 0,
        length: 1024,
    };
    let mut whole = replier(true).read(COOKIE, range, true);
    assert_eq!((whole.data(512), whole.hole(512)), (None, None));
    assert!(
        whole.hole(1024).is_some(),
        "a hole is one piece when it is all there is"
    );
    assert!(replier(true).read(COOKIE, range, true).data(1024).is_some());
    let mut simple = replier(false).read(COOKIE, range, false);
    assert_eq!((simple.data(512), simple.hole(1024)), (None, None));
    assert!(simple.data(1024).is_some());
}

#[test]
fn errors_carry_a_message_where_the_client_can_take_it() {
    let refusal = Refusal::new(NbdErrno::NoSpace, "full");
    let mut out = vec![9];
    replier(false).error(COOKIE, refusal, &mut out);
    assert_eq!(
        out,
        [b"\x09\x67\x44\x66\x98\0\0\0\x1c", COOKIE_BYTES].concat()
    );
    out.clear();
    replier(false).error_at(COOKIE, refusal, 512, &mut out);
    assert_eq!(out, [b"\x67\x44\x66\x98\0\0\0\x1c", COOKIE_BYTES].concat());
    out.clear();
    replier(true).error(COOKIE, refusal, &mut out);
    let expected = [
        b"\x66\x8e\x33\xef\0\x01\x80\x01",
        COOKIE_BYTES,
        b"\0\0\0\x0a\0\0\0\x1c\0\x04full",
    ]
    .concat();
    assert_eq!(out, expected);
    out.clear();
    replier(true).error_at(COOKIE, refusal, 512, &mut out);
    let expected = [
        b"\x66\x8e\x33\xef\0\x01\x80\x02",
        COOKIE_BYTES,
        b"\0\0\0\x12\0\0\0\x1c\0\x04full\0\0\0\0\0\0\x02\0",
    ]
    .concat();
    assert_eq!(out, expected);
}

#[test]
fn errno_values_are_those_of_the_protocol() {
    use NbdErrno::{Invalid, Io, NoMem, NoSpace, NotSupported, Overflow, Perm, Shutdown};
    let all = [
        Perm,
        Io,
        NoMem,
        Invalid,
        NoSpace,
        Overflow,
        NotSupported,
        Shutdown,
    ];
    assert_eq!(all.map(NbdErrno::wire), [1, 5, 12, 22, 28, 75, 95, 108]);
}

#[test]
fn a_message_is_shortened_to_the_protocols_limit_without_cutting_a_character() {
    let long: &'static str = Box::leak("é".repeat(3000).into_boxed_str());
    let mut out = Vec::new();
    replier(true).error(COOKIE, Refusal::new(NbdErrno::Io, long), &mut out);
    assert_eq!(out.len(), 26 + 4096);
    assert!(std::str::from_utf8(&out[26..]).is_ok());
    let odd: &'static str = Box::leak(format!("x{}", "é".repeat(3000)).into_boxed_str());
    out.clear();
    replier(true).error(COOKIE, Refusal::new(NbdErrno::Io, odd), &mut out);
    assert_eq!(out.len(), 26 + 4095);
}

/// Encodes a block status and reads back its extents.
fn extents(range: ByteRange, req_one: bool, given: &[(u64, u32)]) -> Vec<(u32, u32)> {
    let mut out = vec![0xee; 3];
    let given = given
        .iter()
        .map(|&(length, flags)| Extent { length, flags });
    replier(true).block_status(COOKIE, range, req_one, 1, given, &mut out);
    let (header, payload) = out[3..].split_at(20);
    assert_eq!(
        &header[..16],
        [b"\x66\x8e\x33\xef\0\x01\0\x05", COOKIE_BYTES].concat()
    );
    let word = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |word: u32, byte| word << 8 | u32::from(*byte))
    };
    assert_eq!(word(&header[16..]) as usize, payload.len());
    assert_eq!(payload[..4], [0, 0, 0, 1]);
    payload[4..]
        .chunks(8)
        .map(|pair| (word(&pair[..4]), word(&pair[4..])))
        .collect()
}

#[test]
fn block_status_describes_the_range_from_its_start_and_no_more() {
    let range = ByteRange {
        offset: 4096,
        length: 10_240,
    };
    let answer = |given: &[(u64, u32)]| extents(range, false, given);
    assert_eq!(answer(&[(4096, 0), (6144, 3)]), [(4096, 0), (6144, 3)]);
    assert_eq!(
        answer(&[(4096, 0), (1 << 40, 3)]),
        [(4096, 0), (6144, 3)],
        "cut at the range"
    );
    assert_eq!(
        answer(&[(512, 3), (512, 3), (0, 9), (512, 0)]),
        [(1024, 3), (512, 0)],
        "merged"
    );
    assert_eq!(
        answer(&[(10_240, 0), (512, 3)]),
        [(10_240, 0)],
        "nothing past the range"
    );
    assert_eq!(answer(&[]), [(10_240, 0)], "status 0 is always true");
    let many = [(512, 0), (512, 3), (512, 0), (512, 0), (512, 3), (512, 0)];
    assert_eq!(
        answer(&many),
        [(512, 0), (512, 3), (1024, 0)],
        "at most three here"
    );
}

#[test]
fn block_status_with_req_one_is_one_extent_within_the_range() {
    let range = ByteRange {
        offset: 0,
        length: 4096,
    };
    assert_eq!(
        extents(range, true, &[(512, 3), (512, 3), (3072, 0)]),
        [(1024, 3)]
    );
    assert_eq!(extents(range, true, &[(u64::MAX, 3)]), [(4096, 3)]);
    assert_eq!(extents(range, true, &[]), [(4096, 0)]);
}
