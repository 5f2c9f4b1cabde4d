//! What the NBD codec promises on requests: which are understood, which are refused and how, and
//! how payload is told apart from them. Against bytes written out from the NBD protocol document.

use hn4_engine::nbd::connection::{Decoded, Decoder, Step};
use hn4_engine::nbd::export::{Export, Features};
use hn4_engine::nbd::handshake::{MetaContexts, Session};
use hn4_engine::nbd::request::{
    ByteRange, Command, Cookie, NbdErrno, Operation, Refusal, Request, Rules, validate,
};
use hn4_engine::nbd::{Limits, NbdError};

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;

const MIB: u32 = 1 << 20;
const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);

fn session(structured_replies: bool) -> Session {
    Session {
        export: 0,
        structured_replies,
        meta_contexts: MetaContexts {
            base_allocation: structured_replies,
        },
        no_zeroes: true,
    }
}

fn export() -> Export {
    let mut export = Export::new("vol", 1 << 30);
    export.max_block_bytes = MIB;
    export
}

fn request(command: u16, flags: u16, offset: u64, length: u32) -> Request {
    Request {
        flags,
        command,
        cookie: COOKIE,
        offset,
        length,
    }
}

fn header(request: &Request) -> Vec<u8> {
    use zerocopy::big_endian::{U16, U32, U64};
    [
        &[0x25, 0x60, 0x95, 0x13][..],
        &U16::new(request.flags).to_bytes(),
        &U16::new(request.command).to_bytes(),
        &U64::new(request.cookie.0).to_bytes(),
        &U64::new(request.offset).to_bytes(),
        &U32::new(request.length).to_bytes(),
    ]
    .concat()
}

fn operation(export: &Export, request: Request) -> Operation {
    let command = validate(&request, &Rules::new(export, &session(true))).expect("valid");
    assert_eq!(command.cookie, request.cookie);
    command.operation
}

fn errno(export: &Export, request: Request) -> NbdErrno {
    validate(&request, &Rules::new(export, &session(true)))
        .expect_err("must be refused")
        .errno
}

#[test]
fn a_request_header_is_read_as_the_protocol_lays_it_out() {
    let bytes = *b"\x25\x60\x95\x13\x00\x01\x00\x06\x01\x02\x03\x04\x05\x06\x07\x08\
        \x00\x00\x00\x00\x40\x00\x10\x00\x00\x01\x02\x00";
    let expected = request(WRITE_ZEROES, FUA, 0x4000_1000, 0x1_0200);
    assert_eq!(Request::parse(&bytes), Ok(expected));
    let mut wrong = bytes;
    wrong[0] = 0x12;
    assert_eq!(
        Request::parse(&wrong),
        Err(NbdError::BadRequestMagic { found: 0x1260_9513 })
    );
}

#[test]
fn every_command_is_understood_with_its_flags() {
    let export = export();
    let range = ByteRange {
        offset: 512,
        length: 1024,
    };
    let at = |command, flags| operation(&export, request(command, flags, 512, 1024));
    assert_eq!(at(READ, 0), Operation::Read { range, df: false });
    assert_eq!(at(READ, DF | FUA), Operation::Read { range, df: true });
    assert_eq!(at(WRITE, 0), Operation::Write { range, fua: false });
    assert_eq!(at(WRITE, FUA), Operation::Write { range, fua: true });
    assert_eq!(at(TRIM, FUA), Operation::Trim { range, fua: true });
    assert_eq!(at(CACHE, 0), Operation::Cache { range });
    assert_eq!(
        at(BLOCK_STATUS, 0),
        Operation::BlockStatus {
            range,
            req_one: false
        }
    );
    assert_eq!(
        at(BLOCK_STATUS, REQ_ONE),
        Operation::BlockStatus {
            range,
            req_one: true
        }
    );
    for (flags, fua, no_hole, fast) in [
        (0, false, false, false),
        (FUA, true, false, false),
        (NO_HOLE, false, true, false),
        (FUA | NO_HOLE | FAST_ZERO, true, true, true),
    ] {
        let expected = Operation::WriteZeroes {
            range,
            fua,
            no_hole,
            fast,
        };
        assert_eq!(at(WRITE_ZEROES, flags), expected);
    }
    assert_eq!(
        operation(&export, request(FLUSH, 0, 0, 0)),
        Operation::Flush
    );
    assert_eq!(
        operation(&export, request(FLUSH, FUA, 0, 0)),
        Operation::Flush
    );
    assert_eq!(
        operation(&export, request(DISC, 0xffff, 7, 7)),
        Operation::Disconnect
    );
}

#[test]
fn unknown_commands_and_flags_that_do_not_belong_are_invalid() {
    let export = export();
    let misused = [
        (READ, NO_HOLE),
        (READ, REQ_ONE),
        (READ, 1 << 5),
        (WRITE, DF),
        (WRITE, NO_HOLE),
        (TRIM, FAST_ZERO),
        (CACHE, REQ_ONE),
        (WRITE_ZEROES, DF),
        (WRITE_ZEROES, 1 << 15),
        (BLOCK_STATUS, DF),
        (8, 0),
        (0xffff, 0),
    ];
    for (command, flags) in misused {
        let refused = errno(&export, request(command, flags, 0, 512));
        assert_eq!(
            refused,
            NbdErrno::Invalid,
            "command {command} flags {flags:#x}"
        );
    }
    assert_eq!(
        errno(&export, request(FLUSH, NO_HOLE, 0, 0)),
        NbdErrno::Invalid
    );
    assert_eq!(errno(&export, request(FLUSH, 0, 512, 0)), NbdErrno::Invalid);
    assert_eq!(errno(&export, request(FLUSH, 0, 0, 512)), NbdErrno::Invalid);
}

#[test]
fn what_was_not_offered_is_invalid() {
    let mut export = export();
    export.features = Features::NONE;
    for command in [TRIM, CACHE, WRITE_ZEROES] {
        assert_eq!(
            errno(&export, request(command, 0, 0, 512)),
            NbdErrno::Invalid
        );
    }
    assert_eq!(errno(&export, request(FLUSH, 0, 0, 0)), NbdErrno::Invalid);
    assert_eq!(
        errno(&export, request(WRITE, FUA, 0, 512)),
        NbdErrno::Invalid
    );
    assert_eq!(errno(&export, request(READ, DF, 0, 512)), NbdErrno::Invalid);
    export.features.write_zeroes = true;
    assert_eq!(
        errno(&export, request(WRITE_ZEROES, FAST_ZERO, 0, 512)),
        NbdErrno::Invalid
    );

    let plain = Rules::new(&self::export(), &session(false));
    for (command, flags) in [(READ, DF), (BLOCK_STATUS, 0)] {
        let refused = validate(&request(command, flags, 0, 512), &plain);
        assert_eq!(
            refused.expect_err("needs structured replies").errno,
            NbdErrno::Invalid
        );
    }
    let no_context = Session {
        meta_contexts: MetaContexts::default(),
        ..session(true)
    };
    let rules = Rules::new(&self::export(), &no_context);
    let refused = validate(&request(BLOCK_STATUS, 0, 0, 512), &rules);
    assert_eq!(refused.expect_err("no context").errno, NbdErrno::Invalid);
}

#[test]
fn a_read_only_export_refuses_every_write_with_eperm_and_still_flushes() {
    let mut export = export();
    export.read_only = true;
    for command in [WRITE, TRIM, WRITE_ZEROES] {
        assert_eq!(errno(&export, request(command, 0, 0, 512)), NbdErrno::Perm);
        assert_eq!(
            errno(&export, request(command, FUA, u64::MAX, 1)),
            NbdErrno::Perm
        );
    }
    assert_eq!(
        operation(&export, request(FLUSH, 0, 0, 0)),
        Operation::Flush
    );
    operation(&export, request(READ, 0, 0, 512));
}

#[test]
fn past_the_end_is_enospc_for_writes_and_einval_for_the_rest() {
    let export = export();
    let size = export.size_bytes;
    let beyond = [
        (size, 512),
        (size - 512, 1024),
        (u64::MAX - 511, 512),
        (u64::MAX, u32::MAX),
        (1 << 63, 512),
    ];
    for (offset, length) in beyond {
        for (command, expected) in [
            (READ, NbdErrno::Invalid),
            (WRITE, NbdErrno::NoSpace),
            (TRIM, NbdErrno::Invalid),
            (CACHE, NbdErrno::Invalid),
            (WRITE_ZEROES, NbdErrno::NoSpace),
            (BLOCK_STATUS, NbdErrno::Invalid),
        ] {
            let refused = errno(&export, request(command, 0, offset, length));
            assert_eq!(refused, expected, "command {command} at {offset}");
        }
    }
    for command in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        operation(&export, request(command, 0, size - 512, 512));
    }
}

#[test]
fn requests_are_aligned_to_the_sector_and_not_empty() {
    let mut export = export();
    for command in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        for (offset, length) in [(1, 512), (0, 511), (256, 256), (0, 0)] {
            let refused = errno(&export, request(command, 0, offset, length));
            assert_eq!(refused, NbdErrno::Invalid, "command {command}");
        }
    }
    export.min_block_bytes = 4096;
    assert_eq!(
        errno(&export, request(WRITE, 0, 512, 4096)),
        NbdErrno::Invalid
    );
    operation(&export, request(WRITE, 0, 4096, 8192));
}

#[test]
fn only_commands_that_move_data_have_a_longest_length() {
    let export = export();
    for command in [READ, WRITE, CACHE] {
        operation(&export, request(command, 0, 0, MIB));
        assert_eq!(
            errno(&export, request(command, 0, 0, MIB + 512)),
            NbdErrno::Invalid
        );
    }
    for command in [TRIM, WRITE_ZEROES, BLOCK_STATUS] {
        operation(&export, request(command, 0, 0, 1 << 30));
    }
}

fn decoder() -> Decoder {
    let limits = Limits {
        max_drain_bytes: 2 * MIB,
        ..Limits::default()
    };
    Decoder::new(&export(), &session(true), &limits)
}

fn step(decoder: &mut Decoder, input: &[u8]) -> Step {
    decoder.decode(input).expect("no breach")
}

#[test]
fn pipelined_requests_come_out_one_by_one() {
    let mut decoder = decoder();
    let input = [
        header(&request(READ, 0, 0, 512)),
        header(&request(99, 0, 0, 512)),
        header(&request(FLUSH, 0, 0, 0)),
        header(&request(DISC, 0, 0, 0)),
        vec![1, 2, 3],
    ]
    .concat();
    let read = Operation::Read {
        range: ByteRange {
            offset: 0,
            length: 512,
        },
        df: false,
    };
    let first = step(&mut decoder, &input);
    let expected = Decoded::Request(Command {
        cookie: COOKIE,
        operation: read,
    });
    assert_eq!((first.consumed, first.decoded), (28, expected));
    let second = step(&mut decoder, &input[28..]);
    assert!(matches!(
        second.decoded,
        Decoded::Refused { cookie: COOKIE, .. }
    ));
    let third = step(&mut decoder, &input[56..]);
    let expected = Decoded::Request(Command {
        cookie: COOKIE,
        operation: Operation::Flush,
    });
    assert_eq!(third.decoded, expected);
    assert_eq!(
        step(&mut decoder, &input[84..]),
        Step {
            consumed: 28,
            decoded: Decoded::Disconnect
        }
    );
    assert_eq!(
        step(&mut decoder, &input[112..]),
        Step {
            consumed: 3,
            decoded: Decoded::Disconnect
        }
    );
}

#[test]
fn a_write_waits_for_the_caller_and_takes_its_payload_from_both_ways() {
    let mut decoder = decoder();
    let range = ByteRange {
        offset: 4096,
        length: 1024,
    };
    let input = [header(&request(WRITE, FUA, 4096, 1024)), vec![7; 100]].concat();
    let first = step(&mut decoder, &input);
    let operation = Operation::Write { range, fua: true };
    assert_eq!(
        first.decoded,
        Decoded::Request(Command {
            cookie: COOKIE,
            operation
        })
    );
    assert_eq!(
        first.consumed, 28,
        "payload stays until the caller has room for it"
    );
    assert_eq!(decoder.payload_left(), 1024);

    let piece = Decoded::Payload {
        cookie: COOKIE,
        at: 0,
        length: 100,
        last: false,
    };
    assert_eq!(
        step(&mut decoder, &input[28..]),
        Step {
            consumed: 100,
            decoded: piece
        }
    );
    assert_eq!(decoder.payload_received(800), Ok(false));
    assert_eq!(
        decoder.payload_received(125),
        Err(NbdError::PayloadOverrun {
            reported: 125,
            left: 124
        })
    );
    let next = [vec![8; 124], header(&request(FLUSH, 0, 0, 0))].concat();
    let piece = Decoded::Payload {
        cookie: COOKIE,
        at: 900,
        length: 124,
        last: true,
    };
    assert_eq!(
        step(&mut decoder, &next),
        Step {
            consumed: 124,
            decoded: piece
        }
    );
    assert_eq!(decoder.payload_left(), 0);
    assert!(matches!(
        step(&mut decoder, &next[124..]).decoded,
        Decoded::Request(_)
    ));
    assert_eq!(
        decoder.payload_received(1),
        Err(NbdError::PayloadOverrun {
            reported: 1,
            left: 0
        })
    );
}

#[test]
fn payload_that_never_saw_the_buffer_completes_a_write() {
    let mut decoder = decoder();
    step(&mut decoder, &header(&request(WRITE, 0, 0, 512)));
    assert_eq!(decoder.payload_received(511), Ok(false));
    assert_eq!(decoder.payload_received(1), Ok(true));
    assert!(!decoder.refuse_payload(Refusal::new(NbdErrno::Io, "late")));
    let flush = step(&mut decoder, &header(&request(FLUSH, 0, 0, 0)));
    assert!(matches!(flush.decoded, Decoded::Request(_)));
}

#[test]
fn a_refused_write_is_reported_after_its_payload() {
    let mut decoder = decoder();
    let size = export().size_bytes;
    let input = [
        header(&request(WRITE, 0, size, 512)),
        vec![0x25; 512],
        header(&request(FLUSH, 0, 0, 0)),
    ]
    .concat();
    let first = step(&mut decoder, &input[..100]);
    assert_eq!(
        first,
        Step {
            consumed: 28,
            decoded: Decoded::Skip { length: 28 }
        }
    );
    let second = step(&mut decoder, &input[28..100]);
    assert_eq!(
        second,
        Step {
            consumed: 72,
            decoded: Decoded::Skip { length: 72 }
        }
    );
    assert_eq!((decoder.payload_left(), decoder.drain_left()), (0, 440));
    let third = step(&mut decoder, &input[100..]);
    assert_eq!(third.consumed, 440);
    let Decoded::Refused { cookie, refusal } = third.decoded else {
        panic!("not refused: {third:?}");
    };
    assert_eq!((cookie, refusal.errno), (COOKIE, NbdErrno::NoSpace));
    assert!(matches!(
        step(&mut decoder, &input[540..]).decoded,
        Decoded::Request(_)
    ));
}

#[test]
fn the_caller_can_give_up_a_write_in_mid_payload() {
    let mut decoder = decoder();
    let failed = Refusal::new(NbdErrno::Io, "the volume has failed");
    step(&mut decoder, &header(&request(WRITE, 0, 0, 1024)));
    step(&mut decoder, &[1; 24]);
    assert!(decoder.refuse_payload(failed));
    assert_eq!(decoder.drain_left(), 1000);
    let end = Decoded::Refused {
        cookie: COOKIE,
        refusal: failed,
    };
    assert_eq!(
        step(&mut decoder, &[1; 1000]),
        Step {
            consumed: 1000,
            decoded: end
        }
    );
}

#[test]
fn a_payload_beyond_the_limit_closes_the_connection() {
    let mut decoder = decoder();
    step(&mut decoder, &header(&request(WRITE, 0, 0, 2 * MIB)));
    assert_eq!(
        decoder.drain_left(),
        2 * MIB,
        "up to the limit it is drained"
    );
    let mut decoder = self::decoder();
    let breach = decoder.decode(&header(&request(WRITE, 0, 0, 2 * MIB + 1)));
    assert_eq!(
        breach,
        Err(NbdError::WriteTooLong {
            length: 2 * MIB + 1,
            limit: 2 * MIB
        })
    );
    let after = decoder
        .decode(&header(&request(READ, 0, 0, 512)))
        .expect("ignored");
    assert_eq!(
        after.decoded,
        Decoded::Disconnect,
        "nothing is decoded after a breach"
    );
}

#[test]
fn a_stream_out_of_step_closes_the_connection() {
    let mut decoder = decoder();
    assert_eq!(
        decoder.decode(&[0x41; 28]),
        Err(NbdError::BadRequestMagic { found: 0x4141_4141 })
    );
}

#[test]
fn the_same_cookie_twice_is_the_clients_affair() {
    let mut decoder = decoder();
    for _ in 0..2 {
        let read = step(&mut decoder, &header(&request(READ, 0, 0, 512)));
        assert!(matches!(
            read.decoded,
            Decoded::Request(Command { cookie: COOKIE, .. })
        ));
    }
}
