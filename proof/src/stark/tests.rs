//! Succinct proofs: good ones are taken, and nothing else is, not even from whoever holds the key.

use std::sync::OnceLock;
use std::time::Instant;

use proptest::prelude::*;
use winterfell::crypto::ElementHasher;
use winterfell::crypto::hashers::Rp64_256;
use winterfell::math::StarkField;
use winterfell::math::fields::f64::BaseElement;
use winterfell::{Air, BatchingMethod, FieldExtension, Proof, ProofOptions, Trace};

use super::air::{ChainAir, Claim, trace};
use super::argument::{self, options, prove_with, proven_bits};
use super::chain::words;
use super::document::Parts;
use super::shape::Shape;
use super::*;
use crate::codec::{Reader, Writer};
use crate::hash::Digest;
use crate::ledger::tests::VOLUME;

mod documents;

/// In debug builds the prover itself ends if its trace does not bear out the claim, so what a
/// verifier makes of such a proof is tested in release builds, as CI does.
const PROVER_CHECKS: bool = cfg!(debug_assertions);

fn root(number: u64) -> Digest {
    crate::hash::BATCH.hash(&[&number.to_le_bytes()])
}

fn roots(count: u64) -> Vec<Digest> {
    (0..count).map(root).collect()
}

fn claim(roots: &[Digest]) -> Claim {
    let start = Link::start(VOLUME);
    Claim {
        count: roots.len() as u64,
        start,
        end: roots.iter().fold(start, |link, root| link.then(root)),
        first: roots[0],
        last: roots[roots.len() - 1],
        context: Digest([7; 32]),
    }
}

/// An argument that costs a test once.
fn small() -> &'static (Claim, Vec<Digest>, Vec<u8>) {
    static SMALL: OnceLock<(Claim, Vec<Digest>, Vec<u8>)> = OnceLock::new();
    SMALL.get_or_init(|| {
        let roots = roots(256);
        let claim = claim(&roots);
        let argument = argument::prove(&claim, &roots).unwrap();
        (claim, roots, argument)
    })
}

#[test]
fn stark_links_are_rescue_prime_hashes_and_never_change() {
    let start = Link::start(VOLUME);
    let digest = crate::hash::CHAIN_START.hash(&[&VOLUME.0]);
    let hashed = Rp64_256::hash_elements(&words(&digest));
    assert_eq!(hashed.as_elements(), start.0);
    let elements = [&start.0[..], &words(&root(1))].concat();
    let hashed = Rp64_256::hash_elements(&elements);
    assert_eq!(hashed.as_elements(), start.then(&root(1)).0);
    assert_eq!(start.to_string(), START);
    assert_eq!(start.then(&root(1)).to_string(), THEN);
    let two = [1, 0, 0, 0, 255, 255, 255, 255];
    let mut digest = [0; 32];
    digest[24..].copy_from_slice(&two);
    let last = words(&Digest(digest)).map(|word| word.as_int());
    assert_eq!(last, [0, 0, 0, 0, 0, 0, 1, 0xFFFF_FFFF]);
}

const START: &str = "rp64-256:384746b69d24d1e778a5436f00e19723d05239ac06a08231a050918bbe5df905";
const THEN: &str = "rp64-256:7dc94dda8d0ec04cdfd145c8184ae8eb375554e66646ac256497a1c1fdd94768";

#[test]
fn stark_a_link_has_one_encoding() {
    let mut writer = Writer::new();
    let link = Link::start(VOLUME);
    link.encode(&mut writer);
    let good = writer.finish();
    assert_eq!(Link::decode(&mut Reader::new("link", &good)), Ok(link));
    let mut bad = good;
    // The same element, as a number that is not below p.
    bad[..8].copy_from_slice(&BaseElement::MODULUS.to_le_bytes());
    assert!(Link::decode(&mut Reader::new("link", &bad)).is_err());
}

#[test]
fn stark_the_trace_ends_with_the_link_of_the_chain() {
    let roots = roots(5);
    let claim = claim(&roots);
    let trace = trace(&claim, &roots);
    assert_eq!(trace.length(), 128);
    let link = |row| [4, 5, 6, 7].map(|column| trace.get(column, row));
    assert_eq!(link(0), claim.start.0);
    assert_eq!(link(16), claim.start.then(&roots[0]).0);
    assert_eq!(link(5 * 16 - 1), claim.end.0);
}

#[test]
fn stark_chains_of_256_and_1000_batches_are_proven_with_96_proven_bits() {
    let (few, _, argument) = small();
    let many = roots(1000);
    let claim = claim(&many);
    for (claim, argument) in [
        (*few, argument),
        (claim, &argument::prove(&claim, &many).unwrap()),
    ] {
        let begun = Instant::now();
        assert_eq!(argument::verify(&claim, argument), Ok(()));
        let proof = Proof::from_bytes(argument).unwrap();
        let bits = proven_bits(&proof);
        assert!(bits >= SECURITY_BITS && bits >= 96, "{bits}");
        println!(
            "{} batches: {} bytes, {bits} bits, checked in {:?}",
            claim.count,
            argument.len(),
            begun.elapsed()
        );
    }
}

#[test]
fn stark_a_chain_of_any_length_is_proven() {
    // One for each length of the trace, from 32 rows to 4096.
    for count in [2, 3, 5, 9, 17, 33, 65, 129] {
        let roots = roots(count);
        let claim = claim(&roots);
        let argument = argument::prove(&claim, &roots).unwrap();
        assert_eq!(argument::verify(&claim, &argument), Ok(()), "{count}");
    }
}

/// Bits of a proof with the header of this length and the body of another: what it would be worth.
fn bits_of(count: usize) -> u32 {
    let (small, _, argument) = small();
    let header = |count: u64| {
        let claim = Claim { count, ..*small };
        Shape::of(&ChainAir::new(claim.trace_info(), claim, options())).header
    };
    let header_of = header(count as u64);
    let spliced = [&header_of, &argument[header_of.len()..]].concat();
    proven_bits(&Proof::from_bytes(&spliced).unwrap())
}

#[test]
fn stark_the_longest_proof_has_96_proven_bits_too() {
    for count in [BATCHES_MIN, 256, BATCHES_MAX] {
        let bits = bits_of(count);
        println!("{count} batches: {bits} bits");
        assert!(bits >= SECURITY_BITS, "{count}: {bits}");
    }
    assert!(
        bits_of(BATCHES_MAX) <= bits_of(256),
        "it depends on the length"
    );
}

#[test]
fn stark_an_argument_is_good_for_its_own_claim_only() {
    let (good, _, argument) = small();
    let other = root(1 << 40);
    type Spoil = fn(&mut Claim, Digest);
    let spoil: [Spoil; 7] = [
        |claim, _| claim.start = Link::start(VolumeId([0; 16])),
        |claim, other| claim.end = claim.end.then(&other),
        |claim, other| claim.first = other,
        |claim, other| claim.last = other,
        |claim, _| std::mem::swap(&mut claim.first, &mut claim.last),
        |claim, _| claim.count -= 1,
        |claim, other| claim.context = other,
    ];
    for (at, spoil) in spoil.iter().enumerate() {
        let mut claim = *good;
        spoil(&mut claim, other);
        let refused = argument::verify(&claim, argument);
        assert_eq!(refused, Err(StarkError::Argument), "{at}");
    }
    // A length that needs another trace is told from the header.
    let longer = Claim {
        count: 257,
        ..*good
    };
    assert_eq!(
        argument::verify(&longer, argument),
        Err(StarkError::Parameters)
    );
}

#[test]
fn stark_other_roots_do_not_prove_the_chain() {
    let (claim, good, _) = small();
    let mut changed = good.clone();
    changed[100].0[31] ^= 1;
    let mut swapped = good.clone();
    swapped.swap(100, 101);
    let mut missing = good.clone();
    missing.remove(100);
    let mut more = good.clone();
    more.insert(100, root(5));
    for (what, roots) in [
        ("changed", changed),
        ("swapped", swapped),
        ("missing", missing),
        ("more", more),
    ] {
        if PROVER_CHECKS {
            continue;
        }
        let argument = argument::prove(claim, &roots).unwrap();
        let refused = argument::verify(claim, &argument);
        assert_eq!(refused, Err(StarkError::Argument), "{what}");
    }
}

fn weaker() -> Vec<ProofOptions> {
    let of = |queries, blowup, grinding, extension| {
        let linear = BatchingMethod::Linear;
        ProofOptions::new(queries, blowup, grinding, extension, 8, 127, linear, linear)
    };
    vec![
        of(1, 16, 0, FieldExtension::Cubic),
        of(43, 16, 18, FieldExtension::Cubic),
        of(44, 8, 18, FieldExtension::Cubic),
        of(44, 16, 17, FieldExtension::Cubic),
        of(44, 16, 18, FieldExtension::Quadratic),
        of(44, 16, 18, FieldExtension::None),
    ]
}

#[test]
fn stark_a_proof_with_other_parameters_is_refused_however_good() {
    let (claim, roots, argument) = small();
    for weak in weaker() {
        let proof = prove_with(claim, roots, weak.clone()).unwrap();
        let refused = argument::verify(claim, &proof.to_bytes());
        assert_eq!(refused, Err(StarkError::Parameters), "{weak:?}");
    }
    // Whatever the header says, it is not ours.
    let air = ChainAir::new(claim.trace_info(), *claim, options());
    for bit in 0..Shape::of(&air).header.len() * 8 {
        let mut bad = argument.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(
            argument::verify(claim, &bad),
            Err(StarkError::Parameters),
            "bit {bit}"
        );
    }
}

/// Places that differ from run to run of the suite only if somebody changes the seed.
fn places(count: usize, below: usize) -> impl Iterator<Item = usize> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    (0..count).map(move |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(state >> 20).unwrap() % below
    })
}

#[test]
fn stark_a_flipped_bit_in_an_argument_is_refused() {
    let (claim, _, good) = small();
    // Anywhere, and in the first kilobyte, where most lengths and counts are.
    let anywhere = places(100, good.len() * 8).chain(places(300, 8192));
    for bit in anywhere {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(argument::verify(claim, &bad).is_err(), "bit {bit}");
    }
}

#[test]
fn stark_a_cut_or_longer_argument_is_refused() {
    let (claim, _, good) = small();
    for length in places(300, good.len()).chain([0, 1, good.len() - 1]) {
        assert!(
            argument::verify(claim, &good[..length]).is_err(),
            "{length}"
        );
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(matches!(
        argument::verify(claim, &longer),
        Err(StarkError::Decode(_))
    ));
    longer.resize(ARGUMENT_BYTES_MAX + 1, 0);
    assert_eq!(
        argument::verify(claim, &longer),
        Err(StarkError::TooLong(ARGUMENT_BYTES_MAX + 1))
    );
}

#[test]
fn stark_a_false_depth_is_refused_before_it_is_computed_with() {
    let (claim, _, good) = small();
    let air = ChainAir::new(claim.trace_info(), *claim, options());
    let shape = Shape::of(&air);
    // The first paths follow the header, the number of positions, the commitments and the rows.
    let opened = usize::from(good[shape.header.len()]);
    let rows = shape.header.len() + 1 + 2 + (shape.layers + 3) * 32;
    let values = opened * 16 * 8;
    let prefix = |value: usize| if value < 1 << 14 { 2 } else { 3 };
    let paths = rows + prefix(values) + values;
    let depth = (paths + 1..paths + 5).find(|at| good[*at] == 16).unwrap();
    for wrong in [0, 15, 17, 64 + 16, 255] {
        let mut bad = good.clone();
        bad[depth] = wrong;
        let refused = argument::verify(claim, &bad);
        let what = "paths of the argument";
        let field = "depth";
        let expected = DecodeError::Invalid { what, field };
        assert_eq!(refused, Err(StarkError::Decode(expected)), "{wrong}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn stark_bytes_of_a_stranger_never_panic(
        at in any::<prop::sample::Index>(),
        bytes in proptest::collection::vec(any::<u8>(), 1..64),
        whole in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        let (claim, _, good) = small();
        let mut bad = good.clone();
        let at = at.index(bad.len());
        let end = bad.len().min(at + bytes.len());
        bad.splice(at..end, bytes);
        prop_assert!(bad == *good || argument::verify(claim, &bad).is_err());
        prop_assert!(argument::verify(claim, &whole).is_err());
        prop_assert!(Parts::decode(&whole).is_err());
    }
}
