//! Frames survive the way to the medium and back, and nothing that is not one passes for one.

use proptest::prelude::*;

use super::*;
use crate::log::RecordKind;
use crate::types::{LaneId, Lba, VolumeId};

fn identity() -> LogIdentity {
    LogIdentity {
        volume: VolumeId([1; 16]),
        birth_nonce: [2; 16],
        size_bytes: 1 << 30,
        sector_bytes: 512,
    }
}

fn frame() -> Vec<u8> {
    let payload: Vec<u8> = (0..8192_u32).map(|i| (i % 251).to_le_bytes()[0]).collect();
    let records = [
        Record {
            lba: Lba(3),
            sectors: 13,
            kind: RecordKind::Data,
            payload_sector: 3,
            crc32c: crc32c::crc32c(&payload[3 * 512..16 * 512]),
        },
        Record {
            lba: Lba(800),
            sectors: 1 << 20,
            kind: RecordKind::Trim,
            payload_sector: 0,
            crc32c: 0,
        },
    ];
    let mut out = Vec::new();
    encode_head(
        &FrameParams {
            identity: &identity(),
            epoch: Epoch(9),
            offset: LogOffset(4096 * 5),
            term: Term {
                counter: 3,
                node: NodeId([4; 16]),
            },
            incarnation: Incarnation(2),
            durable_through: Epoch(7),
            previous: ChainHash([8; 32]),
            sealed_ms: 1234,
            checkpoint_mark: true,
            lanes: &[LaneEntry {
                lane: LaneId(0),
                records: 2,
            }],
            records: &records,
            payload_bytes: 8192,
        },
        &mut out,
    );
    out.extend_from_slice(&payload);
    out
}

#[test]
fn frame_round_trips() {
    let bytes = frame();
    let head = FrameHead::decode_frame(&identity(), &bytes).expect("a frame we wrote");
    assert_eq!(head.header.epoch, Epoch(9));
    assert_eq!(head.header.end(), LogOffset(4096 * 5 + 4096 + 8192));
    assert!(head.header.checkpoint_mark);
    assert_eq!(head.records.len(), 2);
    assert_eq!(
        head.payload_range(&head.records[0]),
        4096 + 3 * 512..4096 + 16 * 512
    );
}

#[test]
fn every_flipped_bit_outside_padding_and_stamp_is_found() {
    let good = frame();
    let table_end = TABLE_OFFSET + record::table_bytes(1, 2);
    let covered = |byte: usize| {
        byte < HEADER_BYTES
            || (TABLE_OFFSET..table_end).contains(&byte)
            || (4096 + 3 * 512..4096 + 16 * 512).contains(&byte)
    };
    for byte in (0..good.len()).filter(|&byte| covered(byte)) {
        let mut bad = good.clone();
        bad[byte] ^= 1 << (byte % 8);
        assert!(
            FrameHead::decode_frame(&identity(), &bad).is_err(),
            "byte {byte} unnoticed"
        );
    }
}

#[test]
fn a_stamp_is_bound_to_its_header_and_does_not_change_the_chain() {
    let mut bytes = frame();
    let chain = chain_hash(&bytes);
    assert_eq!(Stamp::decode(&bytes), None);
    let stamp = Stamp {
        session: 5,
        durable_through: Epoch(8),
    };
    stamp.encode(&mut bytes);
    assert_eq!(Stamp::decode(&bytes), Some(stamp));
    assert_eq!(chain_hash(&bytes), chain);
    bytes[50] ^= 1;
    assert_eq!(
        Stamp::decode(&bytes),
        None,
        "the stamp of another header counts for nothing"
    );
}

#[test]
fn a_frame_that_is_cut_off_is_refused_at_every_block() {
    let bytes = frame();
    for end in (0..bytes.len()).step_by(4096) {
        assert!(FrameHead::decode_frame(&identity(), &bytes[..end]).is_err());
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_after_a_valid_magic_never_panic(
        tail in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(tail);
        prop_assert!(FrameHead::decode_frame(&identity(), &bytes).is_err());
    }

    #[test]
    fn a_header_with_any_fields_and_a_valid_checksum_never_panics(
        fields in prop::collection::vec(any::<u8>(), HEADER_BYTES - 12), small in any::<bool>(),
    ) {
        let mut bytes = frame();
        bytes[8..HEADER_BYTES - 4].copy_from_slice(&fields);
        bytes[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(&identity().volume.0);
        bytes[32..48].copy_from_slice(&identity().birth_nonce);
        if small {
            bytes[10..12].fill(0);
            bytes[176..188].copy_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0]);
        }
        let crc = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
        bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        let _ = FrameHead::decode_frame(&identity(), &bytes);
    }
}
