//! Packing, dictionaries and their renewal, and what damaged segments do.

use proptest::prelude::*;

use super::train::{Renewal, Trainer};
use super::*;

/// A page as databases have them: a header, and rows from a stock that all pages share.
fn page(number: u64) -> Vec<u8> {
    let mut page = format!("PAGE {number:08} format=7 next={:08};", number + 1).into_bytes();
    let mut row = number;
    while page.len() < 4096 {
        row = row.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let customer = crate::hash::PIECE.hash(&[&(row >> 33).rem_euclid(300).to_le_bytes()]);
        page.extend_from_slice(format!("customer={customer};balance={};", row >> 50).as_bytes());
    }
    page.truncate(4096);
    page
}

fn dictionary() -> Dictionary {
    let mut trainer = Trainer::new(Renewal::default());
    let mut samples = None;
    for number in 0..u64::from(Renewal::default().sample_messages) {
        assert!(samples.is_none(), "before message {number}");
        let message = [page(3 * number), page(3 * number + 1)].concat();
        samples = trainer.see(&message, &Meter::default());
    }
    samples.unwrap().train().unwrap()
}

fn unpacker(dictionary: &Dictionary) -> Unpacker {
    let mut unpacker = Unpacker::new().unwrap();
    unpacker.learn(dictionary.clone()).unwrap();
    unpacker
}

#[test]
fn a_dictionary_of_the_first_hundred_messages_makes_pages_smaller() {
    let dictionary = dictionary();
    let mut plain = Packer::new(3, true).unwrap();
    let mut with = Packer::new(3, true).unwrap();
    with.set_dictionary(&dictionary).unwrap();
    let mut unpacker = unpacker(&dictionary);
    for number in 10_000..10_050 {
        let raw = page(number);
        let segment = with.pack(&raw).unwrap();
        assert_eq!(unpacker.unpack(&segment, 4096).unwrap(), raw);
        let segment = plain.pack(&raw).unwrap();
        assert_eq!(unpacker.unpack(&segment, 4096).unwrap(), raw);
    }
    let (plain, with) = (plain.meter(), with.meter());
    assert!(
        with.packed_bytes * 10 < plain.packed_bytes * 8,
        "{with:?} against {plain:?}"
    );
}

#[test]
fn short_and_stubborn_segments_and_switched_off_ones_are_sent_as_they_are() {
    let noise: Vec<u8> = (0..64_u64)
        .flat_map(|at| crate::hash::PIECE.hash(&[&at.to_le_bytes()]).0)
        .chain([0; 48])
        .collect();
    let stored = |packer: &mut Packer, raw: &[u8]| packer.pack(raw).unwrap()[1] == STORED;
    let mut on = Packer::new(3, true).unwrap();
    assert!(stored(&mut on, &[0; LEAST_BYTES - 1]));
    assert!(!stored(&mut on, &[0; LEAST_BYTES]));
    assert!(stored(&mut on, &noise));
    let mut off = Packer::new(3, false).unwrap();
    assert!(stored(&mut off, &page(1)));
    let segment = off.pack(&page(1)).unwrap();
    assert_eq!(
        Unpacker::new().unwrap().unpack(&segment, 4096).unwrap(),
        page(1)
    );
}

#[test]
fn a_volume_that_does_not_compress_is_tried_less_and_recovers() {
    let noise: Vec<u8> = (0..128_u64)
        .flat_map(|at| crate::hash::PIECE.hash(&[&at.to_le_bytes()]).0)
        .collect();
    let mut packer = Packer::new(3, true).unwrap();
    (0..200).for_each(|_| _ = packer.pack(&noise).unwrap());
    assert!(packer.meter().tries < 40, "{:?}", packer.meter());
    (0..2000).for_each(|at| _ = packer.pack(&page(at)).unwrap());
    assert_ne!(packer.pack(&page(9)).unwrap()[1], STORED);
}

#[test]
fn an_unknown_dictionary_is_named_and_old_ones_are_forgotten() {
    let dictionary = dictionary();
    let mut packer = Packer::new(3, true).unwrap();
    packer.set_dictionary(&dictionary).unwrap();
    let segment = packer.pack(&page(5)).unwrap();
    let unknown = |result| match result {
        Err(Scxq2Error::UnknownDictionary(id)) => id == dictionary.id(),
        _ => false,
    };
    assert!(unknown(Unpacker::new().unwrap().unpack(&segment, 4096)));
    let mut unpacker = unpacker(&dictionary);
    assert!(unpacker.unpack(&segment, 4096).is_ok());
    for number in 0..4 {
        unpacker
            .learn(Dictionary::new(page(number)).unwrap())
            .unwrap();
    }
    assert_eq!(unpacker.known.len(), MAX_DICTIONARIES);
    assert!(unknown(unpacker.unpack(&segment, 4096)));
}

#[test]
fn a_renewed_dictionary_travels_as_a_delta() {
    let old = dictionary();
    let mut bytes = old.bytes().to_vec();
    let end = bytes.len();
    bytes[end - 2000..].copy_from_slice(&page(77)[..2000]);
    let new = Dictionary::new(bytes).unwrap();
    let (delta, alone) = (new.delta(Some(&old)).unwrap(), new.delta(None).unwrap());
    assert!(
        delta.len() * 4 < alone.len(),
        "{} against {}",
        delta.len(),
        alone.len()
    );
    let find = |id| (id == old.id()).then_some(&old);
    assert_eq!(Dictionary::from_delta(&delta, find).unwrap(), new);
    assert_eq!(Dictionary::from_delta(&alone, |_| None).unwrap(), new);
    let missing = Dictionary::from_delta(&delta, |_| None);
    assert!(matches!(missing, Err(Scxq2Error::UnknownDictionary(id)) if id == old.id()));
    for bit in (0..delta.len() * 8).step_by(3) {
        let mut bad = delta.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        // Some bits of a compressed stream mean nothing; what comes out is the named one or
        // nothing.
        if let Ok(dictionary) = Dictionary::from_delta(&bad, find) {
            assert_eq!(dictionary, new, "bit {bit}");
        }
    }
}

#[test]
fn a_dictionary_is_renewed_on_schedule_and_when_it_got_worse() {
    let renewal = Renewal {
        sample_messages: 100,
        every_messages: 5000,
        worse_percent: 25,
        least_messages: 500,
    };
    let mut trainer = Trainer::new(renewal);
    let good = Meter {
        recent: 300,
        tries: 9,
        ..Meter::default()
    };
    let worse = Meter {
        recent: 400,
        tries: 9,
        ..Meter::default()
    };
    let mut until_next =
        |meter: &Meter| (1..10_000).find(|number| trainer.see(&page(*number), meter).is_some());
    assert_eq!(until_next(&good), Some(100));
    assert_eq!(until_next(&good), Some(5099));
    // The better ratio is remembered from the messages in between.
    assert_eq!(until_next(&good), Some(5099));
    let mut trainer = Trainer::new(renewal);
    (0..100).for_each(|number| _ = trainer.see(&page(number), &good));
    (0..450).for_each(|number| assert!(trainer.see(&page(number), &good).is_none()));
    let renewed = (1..10_000).find(|number| trainer.see(&page(*number), &worse).is_some());
    assert_eq!(renewed, Some(50 + 99));
}

#[test]
fn a_segment_that_announces_too_much_is_refused_before_it_is_unpacked() {
    let mut packer = Packer::new(3, true).unwrap();
    let bomb = packer.pack(&vec![0; 1 << 20]).unwrap();
    assert!(bomb.len() < 1000);
    let mut unpacker = Unpacker::new().unwrap();
    let refused = unpacker.unpack(&bomb, 4096);
    assert!(matches!(
        refused,
        Err(Scxq2Error::TooLong {
            raw: 0x10_0000,
            most: 4096
        })
    ));
    let mut liar = bomb.clone();
    liar[4..8].copy_from_slice(&4096_u32.to_le_bytes());
    assert!(matches!(
        unpacker.unpack(&liar, 4096),
        Err(Scxq2Error::Corrupt)
    ));
    assert!(packer.pack(&vec![0; MAX_RAW_BYTES + 1]).is_err());
}

proptest! {
    #[test]
    fn whatever_is_packed_unpacks_and_garbage_never_panics(
        raw in prop::collection::vec(0_u8..4, 0..9000),
        garbage in prop::collection::vec(any::<u8>(), 0..200),
        flip in any::<prop::sample::Index>(),
    ) {
        let mut packer = Packer::new(1, true).unwrap();
        let mut unpacker = Unpacker::new().unwrap();
        let segment = packer.pack(&raw).unwrap();
        prop_assert_eq!(unpacker.unpack(&segment, raw.len()).unwrap(), raw);
        let mut bad = segment.clone();
        let bit = flip.index(bad.len() * 8);
        bad[bit / 8] ^= 1 << (bit % 8);
        if let Ok(other) = unpacker.unpack(&bad, MAX_RAW_BYTES) {
            prop_assert!(other.len() <= MAX_RAW_BYTES);
        }
        _ = unpacker.unpack(&garbage, 4096);
        _ = Dictionary::from_delta(&garbage, |_| None);
    }
}
