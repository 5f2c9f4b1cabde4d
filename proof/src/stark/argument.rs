//! Making and checking the argument itself: a STARK that the chain of a claim exists.
//!
//! The parameters are fixed, and a verifier takes no others: a proof names its own, and whoever
//! forges one would name weak ones. They were chosen for [`SECURITY_BITS`] bits of *proven*
//! security in the longest proof that is allowed, by winterfell's own estimate; what is merely
//! conjectured does not count.

use std::panic::catch_unwind;

use winterfell::crypto::hashers::Blake3_256;
use winterfell::crypto::{DefaultRandomCoin, MerkleTree};
use winterfell::math::FieldElement;
use winterfell::math::fields::f64::BaseElement;
use winterfell::matrix::ColMatrix;
use winterfell::{
    AcceptableOptions, Air as _, AuxRandElements, BatchingMethod, CompositionPoly,
    CompositionPolyTrace, ConstraintCompositionCoefficients, DefaultConstraintCommitment,
    DefaultConstraintEvaluator, DefaultTraceLde, FieldExtension, PartitionOptions, Proof,
    ProofOptions, Prover, StarkDomain, TraceInfo, TracePolyTable, TraceTable,
};

use super::air::{ChainAir, Claim, trace};
use super::shape::Shape;
use super::{ARGUMENT_BYTES_MAX, SECURITY_BITS, StarkError};
use crate::hash::Digest;

/// The hash of the argument's own trees and challenges; its collisions cost 2^128.
type Hash = Blake3_256<BaseElement>;
type Coin = DefaultRandomCoin<Hash>;
type Tree = MerkleTree<Hash>;

/// Positions that are opened.
const QUERIES: usize = 44;
/// Points at which polynomials are committed to, for each of their coefficients.
const BLOWUP: usize = 16;
/// Leading zero bits of the work that a prover does before it learns the positions.
const GRINDING_BITS: u32 = 18;
/// How much smaller each layer of the low-degree test is than the one before it.
const FOLDING: usize = 8;
/// Highest degree of the polynomial that the test ends with.
const REMAINDER_DEGREE: usize = 127;

/// The only parameters that there are. Challenges come from the field's extension of degree three,
/// 192 bits.
pub(super) fn options() -> ProofOptions {
    ProofOptions::new(
        QUERIES,
        BLOWUP,
        GRINDING_BITS,
        FieldExtension::Cubic,
        FOLDING,
        REMAINDER_DEGREE,
        BatchingMethod::Linear,
        BatchingMethod::Linear,
    )
}

/// Bits of security of a proof that are proven, by the better of winterfell's two analyses.
pub(super) fn proven_bits(proof: &Proof) -> u32 {
    let security = proof.proven_security::<Hash>();
    security.ldr_bits().max(security.udr_bits())
}

struct ChainProver {
    options: ProofOptions,
    claim: Claim,
}

impl Prover for ChainProver {
    type BaseField = BaseElement;
    type Air = ChainAir;
    type Trace = TraceTable<BaseElement>;
    type HashFn = Hash;
    type VC = Tree;
    type RandomCoin = Coin;
    type TraceLde<E: FieldElement<BaseField = BaseElement>> = DefaultTraceLde<E, Hash, Tree>;
    type ConstraintCommitment<E: FieldElement<BaseField = BaseElement>> =
        DefaultConstraintCommitment<E, Hash, Tree>;
    type ConstraintEvaluator<'a, E: FieldElement<BaseField = BaseElement>> =
        DefaultConstraintEvaluator<'a, ChainAir, E>;

    fn get_pub_inputs(&self, _: &Self::Trace) -> Claim {
        self.claim
    }

    fn options(&self) -> &ProofOptions {
        &self.options
    }

    fn new_trace_lde<E: FieldElement<BaseField = BaseElement>>(
        &self,
        info: &TraceInfo,
        trace: &ColMatrix<BaseElement>,
        domain: &StarkDomain<BaseElement>,
        partitions: PartitionOptions,
    ) -> (Self::TraceLde<E>, TracePolyTable<E>) {
        DefaultTraceLde::new(info, trace, domain, partitions)
    }

    fn build_constraint_commitment<E: FieldElement<BaseField = BaseElement>>(
        &self,
        composition: CompositionPolyTrace<E>,
        columns: usize,
        domain: &StarkDomain<BaseElement>,
        partitions: PartitionOptions,
    ) -> (Self::ConstraintCommitment<E>, CompositionPoly<E>) {
        DefaultConstraintCommitment::new(composition, columns, domain, partitions)
    }

    fn new_evaluator<'a, E: FieldElement<BaseField = BaseElement>>(
        &self,
        air: &'a ChainAir,
        aux: Option<AuxRandElements<E>>,
        coefficients: ConstraintCompositionCoefficients<E>,
    ) -> Self::ConstraintEvaluator<'a, E> {
        DefaultConstraintEvaluator::new(air, aux, coefficients)
    }
}

/// Makes the argument for a claim, with parameters that are those of [`options`] but in tests.
pub(super) fn prove_with(
    claim: &Claim,
    roots: &[Digest],
    options: ProofOptions,
) -> Result<Proof, StarkError> {
    let prover = ChainProver {
        options,
        claim: *claim,
    };
    let made = prover.prove(trace(claim, roots));
    made.map_err(|error| StarkError::Prover(error.to_string()))
}

/// Makes the argument for a claim whose chain leads over `roots`. What it makes of a claim that
/// they do not bear out is refused by every verifier.
///
/// # Errors
/// [`StarkError::Prover`], [`StarkError::Security`] if it would not be as safe as is promised.
pub(super) fn prove(claim: &Claim, roots: &[Digest]) -> Result<Vec<u8>, StarkError> {
    let proof = prove_with(claim, roots, options())?;
    check_security(&proof)?;
    Ok(proof.to_bytes())
}

fn check_security(proof: &Proof) -> Result<(), StarkError> {
    match proven_bits(proof) {
        bits if bits >= SECURITY_BITS => Ok(()),
        bits => Err(StarkError::Security(bits)),
    }
}

/// Checks an argument: that it is one, made with our parameters, safe enough, and for this claim.
///
/// # Errors
/// [`StarkError`] naming the first thing wrong.
pub(super) fn verify(claim: &Claim, bytes: &[u8]) -> Result<(), StarkError> {
    if bytes.len() > ARGUMENT_BYTES_MAX {
        return Err(StarkError::TooLong(bytes.len()));
    }
    let air = ChainAir::new(claim.trace_info(), *claim, options());
    Shape::of(&air).check(bytes)?;
    // The library has assertions where it expects what an honest prover writes. The shape leaves
    // only a few within reach, and those end here.
    let verified = catch_unwind(|| {
        let proof = Proof::from_bytes(bytes).map_err(|_| StarkError::Argument)?;
        check_security(&proof)?;
        let ours = AcceptableOptions::OptionSet(vec![options()]);
        winterfell::verify::<ChainAir, Hash, Coin, Tree>(proof, *claim, &ours)
            .map_err(|_| StarkError::Argument)
    });
    verified.unwrap_or(Err(StarkError::Argument))
}
