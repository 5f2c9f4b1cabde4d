//! Folds against a definition written the obvious, recursive way.

use proptest::prelude::*;

use super::*;

fn values(count: u64) -> Vec<Digest> {
    (0..count)
        .map(|index| hash::PIECE.hash(&[&index.to_le_bytes()]))
        .collect()
}

fn by_definition(kind: Kind, values: &[Digest]) -> Digest {
    match values {
        [] => kind.empty(),
        [one] => *one,
        more => {
            let mut middle = 1;
            while middle * 2 < more.len() {
                middle *= 2;
            }
            let (left, right) = more.split_at(middle);
            kind.node(&by_definition(kind, left), &by_definition(kind, right))
        }
    }
}

fn head(kind: Kind, values: &[Digest]) -> Head {
    Head {
        kind,
        size: values.len() as u64,
        root: root(kind, values),
    }
}

#[test]
fn the_streamed_root_is_the_defined_root() {
    for count in 0..130 {
        let values = values(count);
        assert_eq!(
            root(Kind::Epochs, &values),
            by_definition(Kind::Epochs, &values),
            "{count}"
        );
    }
}

#[test]
fn every_value_of_every_small_fold_has_a_proof_of_log_n_steps() {
    for count in 1..70 {
        let values = values(count);
        let head = head(Kind::Records, &values);
        for (index, value) in values.iter().enumerate() {
            let proof = InclusionProof::build(Kind::Records, &values, index as u64).unwrap();
            assert_eq!(proof.verify(&head, value), Ok(()), "{index} of {count}");
            assert!(proof.path.len() <= (64 - (count - 1).leading_zeros()) as usize);
        }
        assert!(InclusionProof::build(Kind::Records, &values, count).is_none());
    }
}

#[test]
fn every_prefix_of_every_small_fold_is_provably_its_beginning() {
    for count in 0..48 {
        let values = values(count);
        let new = head(Kind::Ledger, &values);
        for old_size in 0..=count {
            let old = head(Kind::Ledger, &values[..usize::try_from(old_size).unwrap()]);
            let proof = ConsistencyProof::build(Kind::Ledger, &values, old_size).unwrap();
            assert_eq!(proof.verify(&old, &new), Ok(()), "{old_size} of {count}");
            if old_size > 0 {
                let forged = Head {
                    root: Kind::Ledger.empty(),
                    ..old
                };
                assert!(
                    proof.verify(&forged, &new).is_err(),
                    "{old_size} of {count}"
                );
            }
        }
    }
}

#[test]
fn order_kind_and_size_change_the_root() {
    let values = values(3);
    let swapped = [values[1], values[0], values[2]];
    assert_ne!(root(Kind::Epochs, &values), root(Kind::Epochs, &swapped));
    assert_ne!(root(Kind::Epochs, &values), root(Kind::Lanes, &values));
    assert_ne!(
        root(Kind::Epochs, &values),
        root(Kind::Epochs, &values[..2])
    );
    assert_ne!(Kind::Epochs.empty(), Kind::Lanes.empty());
}

#[test]
fn a_proof_for_the_largest_fold_decodes_and_a_larger_one_does_not() {
    let encode = |index: u64, size: u64, path: usize| {
        let mut writer = Writer::new();
        writer
            .u8(VERSION)
            .u8(Kind::Ledger as u8)
            .u64(index)
            .u64(size);
        (0..path).for_each(|_| _ = writer.digest(&Digest::ZERO));
        writer.finish()
    };
    let decode = |bytes: &[u8]| InclusionProof::decode(&mut Reader::new("proof", bytes));
    assert!(decode(&encode(MAX_VALUES - 1, MAX_VALUES, 63)).is_ok());
    assert!(decode(&encode(0, MAX_VALUES + 1, 64)).is_err());
    assert!(decode(&encode(5, 5, 3)).is_err());
    assert!(ConsistencyProof::decode(&mut Reader::new("proof", &encode(u64::MAX, 3, 9))).is_err());
}

#[test]
fn a_builder_that_saw_too_few_values_gives_no_proof() {
    let mut builder = ProofBuilder::inclusion(Kind::Ledger, 0, 2).unwrap();
    builder.push(Digest::ZERO);
    assert_eq!(
        builder.finish_inclusion(),
        Err(FoldError::Incomplete { fed: 1, size: 2 })
    );
}

proptest! {
    #[test]
    fn a_flipped_bit_in_an_inclusion_proof_is_refused(count in 1_u64..40, pick in any::<u64>()) {
        let values = values(count);
        let index = pick % count;
        let value = &values[usize::try_from(index).unwrap()];
        let head = head(Kind::Records, &values);
        let mut writer = Writer::new();
        InclusionProof::build(Kind::Records, &values, index).unwrap().encode(&mut writer);
        let good = writer.finish();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut reader = Reader::new("proof", &bad);
            let Ok(proof) = InclusionProof::decode(&mut reader) else { continue };
            // Another index may have a path of the same length: the caller knows which it asked
            // for.
            let accepted = reader.finish().is_ok() && proof.index() == index
                && proof.verify(&head, value).is_ok();
            prop_assert!(!accepted, "bit {bit} of {}", good.len() * 8);
        }
    }

    #[test]
    fn a_flipped_bit_in_a_consistency_proof_is_refused(count in 2_u64..40, pick in any::<u64>()) {
        let values = values(count);
        let old_size = 1 + pick % (count - 1);
        let old = head(Kind::Ledger, &values[..usize::try_from(old_size).unwrap()]);
        let new = head(Kind::Ledger, &values);
        let mut writer = Writer::new();
        ConsistencyProof::build(Kind::Ledger, &values, old_size).unwrap().encode(&mut writer);
        let good = writer.finish();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut reader = Reader::new("proof", &bad);
            let Ok(proof) = ConsistencyProof::decode(&mut reader) else { continue };
            let accepted = reader.finish().is_ok() && proof.verify(&old, &new).is_ok();
            prop_assert!(!accepted, "bit {bit} of {}", good.len() * 8);
        }
    }
}
