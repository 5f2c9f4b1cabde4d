//! What a record's coordinates, payload and place in its epoch do to the roots above it.

use proptest::prelude::*;

use super::*;

pub(crate) fn record(epoch: u64, lane: u16, lba: u64, payload: &[u8]) -> RecordLeaf {
    let sectors = payload.len() as u64 / SECTOR_BYTES;
    let at = Coordinates {
        epoch: Epoch(epoch),
        lane: LaneId(lane),
        kind: LeafKind::Data,
        lba: Lba(lba),
        sectors,
    };
    RecordLeaf {
        at,
        payload: payload_hash(Lba(lba), payload),
    }
}

fn epoch_of(records: &[RecordLeaf]) -> EpochRoot {
    let mut builder = EpochBuilder::new(records[0].at.epoch, ChainHash([9; 32]));
    records
        .iter()
        .for_each(|record| builder.record(record).unwrap());
    builder.finish()
}

#[test]
fn a_whole_block_in_a_payload_has_the_leaf_of_the_state_tree() {
    let payload: Vec<u8> = (0..2 * 512 + 3 * 4096 + 512)
        .map(|at| u8::try_from(at % 249).unwrap())
        .collect();
    let hash = payload_hash(Lba(6), &payload);
    let mut fold = PayloadFold::new();
    fold.push_part(&payload[..1024]);
    for block in payload[1024..1024 + 3 * 4096].as_chunks().0 {
        fold.push_block(blocks::leaf(block));
    }
    fold.push_part(&payload[1024 + 3 * 4096..]);
    assert_eq!(hash, fold.finish());
    let at = record(1, 0, 6, &payload).at;
    assert_eq!(piece_of(&at, Lba(8)), Some((5, 1)));
    assert_eq!(piece_of(&at, Lba(24)), Some((5, 3)));
    assert_eq!(piece_of(&at, Lba(0)), None);
    assert_eq!(piece_of(&at, Lba(32)), None);
}

proptest! {
    #[test]
    fn many_payloads_at_once_have_the_hashes_they_have_one_by_one(
        shapes in prop::collection::vec((0_u64..40, 1_usize..80), 0..40),
    ) {
        let bytes: Vec<u8> = (0..80 * 512_u32).map(|at| (at % 241).to_le_bytes()[0]).collect();
        let payloads: Vec<(Lba, &[u8])> = shapes
            .iter()
            .map(|&(lba, sectors)| (Lba(lba), &bytes[..sectors * 512]))
            .collect();
        let single = payloads.iter().map(|(lba, payload)| payload_hash(*lba, payload));
        let (mut pieces, mut counts) = (Vec::new(), Vec::new());
        for &(lba, mut rest) in &payloads {
            let before = pieces.len();
            let mut room = BLOCK - usize::try_from(lba.0 % 8).unwrap() * 512;
            while !rest.is_empty() {
                let (piece, later) = rest.split_at(room.min(rest.len()));
                pieces.push(piece);
                (rest, room) = (later, BLOCK);
            }
            counts.push(pieces.len() - before);
        }
        prop_assert_eq!(payload_hashes(&pieces, &counts), single.collect::<Vec<_>>());
    }
}

#[test]
fn a_payload_at_another_offset_within_its_block_has_another_hash() {
    let payload = [5; 4096];
    assert_ne!(
        payload_hash(Lba(0), &payload),
        payload_hash(Lba(1), &payload)
    );
    assert_eq!(
        payload_hash(Lba(0), &payload),
        payload_hash(Lba(8), &payload)
    );
}

#[test]
fn every_coordinate_changes_the_leaf() {
    let good = record(3, 1, 8, &[1; 4096]);
    let mut others = vec![good; 6];
    others[0].at.epoch = Epoch(4);
    others[1].at.lane = LaneId(2);
    others[2].at.kind = LeafKind::Trim;
    others[3].at.lba = Lba(16);
    others[4].at.sectors = 7;
    others[5].payload = Digest::ZERO;
    others
        .iter()
        .for_each(|other| assert_ne!(other.digest(), good.digest(), "{other:?}"));
}

#[test]
fn lanes_may_be_collected_in_any_order_but_records_within_a_lane_may_not() {
    let (a, b, c) = (
        record(1, 0, 0, &[1; 512]),
        record(1, 0, 9, &[2; 512]),
        record(1, 5, 64, &[3; 512]),
    );
    let root = epoch_of(&[a, b, c]).root;
    assert_eq!(epoch_of(&[c, a, b]).root, root);
    assert_ne!(epoch_of(&[b, a, c]).root, root);
    let mut builder = EpochBuilder::new(Epoch(2), ChainHash::default());
    let error = LeafError::OtherEpoch {
        epoch: Epoch(2),
        found: Epoch(1),
    };
    assert_eq!(builder.record(&a), Err(error));
}

proptest! {
    #[test]
    fn every_record_is_provably_in_its_epoch_and_a_flipped_bit_is_refused(
        lanes in prop::collection::vec(0_u16..4, 1..20),
        pick in any::<prop::sample::Index>(),
    ) {
        let records: Vec<_> = (0_u64..).zip(&lanes)
            .map(|(at, &lane)| record(7, lane, at * 8, &at.to_le_bytes().repeat(64)))
            .collect();
        let epoch = epoch_of(&records);
        let index = pick.index(records.len());
        let proof = RecordProof::build(epoch.chain, &records, index).unwrap();
        prop_assert_eq!(proof.computed_root(), epoch.root);
        let mut writer = Writer::new();
        proof.encode(&mut writer);
        let good = writer.finish();
        prop_assert_eq!(&RecordProof::decode(&mut Reader::new("proof", &good)).unwrap(), &proof);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut reader = Reader::new("proof", &bad);
            let Ok(proof) = RecordProof::decode(&mut reader) else { continue };
            let accepted = reader.finish().is_ok() && proof.computed_root() == epoch.root;
            prop_assert!(!accepted, "bit {bit} of {}", good.len() * 8);
        }
    }
}
