//! The computation whose execution is proven, as polynomial constraints over its trace.
//!
//! A batch takes [`BATCH_ROWS`] rows. In each row stand the twelve elements of the hash's state and
//! four *words* that are about to be absorbed:
//!
//! ```text
//! row  0      12 0 0 0 | link  | words 0-3 of the root      state before the first permutation
//! rows 1-7    after each of its seven rounds
//! row  8      the same, words 4-7 of the root added to the first half of the rate
//! rows 9-15   after each of the seven rounds of the second permutation
//! row 16      12 0 0 0 | first half of the rate, which is the next link | words 0-3 ...
//! ```
//!
//! 12 is the number of hashed elements, with which Rescue-Prime starts its state. The trace goes on
//! behind the last batch, up to a power of two, with roots of zeroes: what is claimed of it ends
//! where the last batch does.
//!
//! What ties it to the claim are assertions on single cells: the start link, the end link, and all
//! words of the first and the last root.

use winterfell::crypto::hashers::Rp64_256;
use winterfell::math::fields::f64::BaseElement;
use winterfell::math::{FieldElement, ToElements};
use winterfell::{
    Air, AirContext, Assertion, EvaluationFrame, ProofOptions, TraceInfo, TraceTable,
    TransitionConstraintDegree,
};

use super::chain::{LINK_ELEMENTS, Link, WORDS, words};
use crate::hash::Digest;

const STATE: usize = Rp64_256::STATE_WIDTH;
const ROUNDS: usize = Rp64_256::NUM_ROUNDS;
/// Rows of one permutation: its input, and the state after each round.
const CYCLE: usize = ROUNDS + 1;
/// Rows of one batch.
const BATCH_ROWS: usize = 2 * CYCLE;
/// Where the rate begins. The link stands there, and the hash's output.
const RATE: usize = Rp64_256::RATE_RANGE.start;
/// Words of a root that are absorbed at a time.
const HALF: usize = WORDS / 2;
/// Where the first words of a root stand in a batch's first row.
const FIRST_WORDS: usize = RATE + LINK_ELEMENTS;
/// Columns of the trace.
pub(super) const WIDTH: usize = STATE + HALF;
/// Cells of the trace that the claim fixes: the first row's state, the second half of the first
/// root, both halves of the last root, the end link.
const ASSERTIONS: usize = STATE + HALF + WORDS + LINK_ELEMENTS;
/// The S-box is the seventh power.
const DEGREE: usize = 7;

// A digest is where a link stands, links and halves of a root fill the rate, and the constants
// below are for two permutations of one cycle each.
const _: () = assert!(Rp64_256::DIGEST_RANGE.start == RATE && FIRST_WORDS + HALF == STATE);
const _: () = assert!(Rp64_256::DIGEST_RANGE.end == FIRST_WORDS && CYCLE.is_power_of_two());

/// What is claimed; all of it goes into the challenges, so a proof is good for nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Claim {
    /// Number of batches.
    pub(super) count: u64,
    /// The link before the first root.
    pub(super) start: Link,
    /// The link after the last root.
    pub(super) end: Link,
    /// The first root.
    pub(super) first: Digest,
    /// The last root.
    pub(super) last: Digest,
    /// What the proof is to be bound to beside that.
    pub(super) context: Digest,
}

impl ToElements<BaseElement> for Claim {
    fn to_elements(&self) -> Vec<BaseElement> {
        let mut elements = vec![BaseElement::new(self.count)];
        elements.extend(self.start.0);
        elements.extend(self.end.0);
        for digest in [&self.first, &self.last, &self.context] {
            elements.extend(words(digest));
        }
        elements
    }
}

impl Claim {
    /// Rows of the trace.
    pub(super) fn rows(&self) -> usize {
        let batches = usize::try_from(self.count).unwrap_or(usize::MAX);
        batches.saturating_mul(BATCH_ROWS).next_power_of_two()
    }

    /// Shape of the trace.
    pub(super) fn trace_info(&self) -> TraceInfo {
        TraceInfo::new(WIDTH, self.rows())
    }
}

/// State before the first permutation of a batch.
fn absorbed(link: &Link, root: &[BaseElement; WORDS]) -> [BaseElement; STATE] {
    let mut state = [BaseElement::ZERO; STATE];
    state[0] = BaseElement::new((LINK_ELEMENTS + WORDS) as u64);
    state[RATE..FIRST_WORDS].copy_from_slice(&link.0);
    state[FIRST_WORDS..].copy_from_slice(&root[..HALF]);
    state
}

/// The trace of a claim's computation.
pub(super) fn trace(claim: &Claim, roots: &[Digest]) -> TraceTable<BaseElement> {
    let rows = claim.rows();
    let mut columns: Vec<_> = (0..WIDTH).map(|_| Vec::with_capacity(rows)).collect();
    let mut push = |state: &[BaseElement; STATE], added: &[BaseElement]| {
        let row = state.iter().chain(added);
        let cells = columns.iter_mut().zip(row);
        cells.for_each(|(column, cell)| column.push(*cell));
    };
    let permute = |state: &mut [BaseElement; STATE],
                   push: &mut dyn FnMut(&[BaseElement; STATE], &[BaseElement])| {
        for round in 0..ROUNDS {
            Rp64_256::apply_round(state, round);
            push(state, &[BaseElement::ZERO; HALF]);
        }
    };
    let mut link = claim.start;
    for batch in 0..rows / BATCH_ROWS {
        let root = words(roots.get(batch).unwrap_or(&Digest::ZERO));
        let mut state = absorbed(&link, &root);
        push(&state, &[BaseElement::ZERO; HALF]);
        permute(&mut state, &mut push);
        for (cell, word) in state[RATE..].iter_mut().zip(&root[HALF..]) {
            *cell += *word;
        }
        push(&state, &root[HALF..]);
        permute(&mut state, &mut push);
        link.0.copy_from_slice(&state[RATE..FIRST_WORDS]);
    }
    TraceTable::init(columns)
}

/// The constraints.
pub(super) struct ChainAir {
    context: AirContext<BaseElement>,
    claim: Claim,
}

/// A column that is one in the last row of every `period` rows, or in all but that.
fn last_of(period: usize, is_last: BaseElement) -> Vec<BaseElement> {
    let mut column = vec![BaseElement::ONE - is_last; period];
    column[period - 1] = is_last;
    column
}

fn power<E: FieldElement>(value: E) -> E {
    let square = value.square();
    square.square() * square * value
}

/// Product of one of the hash's matrices with a vector.
fn product<E: FieldElement<BaseField = BaseElement>>(
    matrix: &[[BaseElement; STATE]; STATE],
    vector: &[E; STATE],
) -> [E; STATE] {
    let row = |row: &[BaseElement; STATE]| {
        let terms = row.iter().zip(vector);
        terms.fold(E::ZERO, |sum, (factor, value)| {
            sum + value.mul_base(*factor)
        })
    };
    std::array::from_fn(|at| row(&matrix[at]))
}

/// How far two rows are from being the states before and after a round: both ways to its middle,
/// where the power and the root of the S-boxes meet.
fn round<E: FieldElement<BaseField = BaseElement>>(
    (before, after): (&[E], &[E]),
    (first, second): (&[E], &[E]),
) -> [E; STATE] {
    let powers = std::array::from_fn(|at| power(before[at]));
    let forwards = product(&Rp64_256::MDS, &powers);
    let without = std::array::from_fn(|at| after[at] - second[at]);
    let backwards = product(&Rp64_256::INV_MDS, &without);
    std::array::from_fn(|at| forwards[at] + first[at] - power(backwards[at]))
}

impl Air for ChainAir {
    type BaseField = BaseElement;
    type PublicInputs = Claim;

    fn new(trace_info: TraceInfo, claim: Claim, options: ProofOptions) -> Self {
        // One for each element of the state. In every row one of three things is to be done; the
        // column that says so adds to the degree.
        let degree = TransitionConstraintDegree::with_cycles(DEGREE, vec![CYCLE]);
        let context = AirContext::new(trace_info, vec![degree; STATE], ASSERTIONS, options);
        Self { context, claim }
    }

    fn context(&self) -> &AirContext<BaseElement> {
        &self.context
    }

    fn get_periodic_column_values(&self) -> Vec<Vec<BaseElement>> {
        let (is_round, is_last) = (
            last_of(CYCLE, BaseElement::ZERO),
            last_of(CYCLE, BaseElement::ONE),
        );
        let is_new = last_of(BATCH_ROWS, BaseElement::ONE);
        let mut columns = vec![is_round, is_last, is_new];
        for constants in [&Rp64_256::ARK1, &Rp64_256::ARK2] {
            for element in 0..STATE {
                let mut column: Vec<_> = constants.iter().map(|round| round[element]).collect();
                column.push(BaseElement::ZERO);
                columns.push(column);
            }
        }
        columns
    }

    fn evaluate_transition<E: FieldElement<BaseField = BaseElement>>(
        &self,
        frame: &EvaluationFrame<E>,
        periodic: &[E],
        result: &mut [E],
    ) {
        let (now, next) = (frame.current(), frame.next());
        let [is_round, is_last, is_new] = [periodic[0], periodic[1], periodic[2]];
        let constants = periodic[3..].split_at(STATE);
        let is_middle = is_last - is_new;
        let round = round((now, next), constants);
        let length = E::from(BaseElement::new((LINK_ELEMENTS + WORDS) as u64));
        for at in 0..STATE {
            // In the middle of a batch the second half of the root is added to what is there.
            let added = match at.checked_sub(RATE) {
                Some(word) if word < HALF => next[STATE + word],
                _ => E::ZERO,
            };
            let middle = next[at] - now[at] - added;
            // Between batches the state is new, but for the link. The words beside it are free.
            let new = match at {
                0 => next[at] - length,
                _ if at < RATE => next[at],
                _ if at < FIRST_WORDS => next[at] - now[at],
                _ => E::ZERO,
            };
            result[at] = is_round * round[at] + is_middle * middle + is_new * new;
        }
    }

    fn get_assertions(&self) -> Vec<Assertion<BaseElement>> {
        let claim = &self.claim;
        let (first, last) = (words(&claim.first), words(&claim.last));
        let count = usize::try_from(claim.count).unwrap_or(usize::MAX);
        let end = count.saturating_mul(BATCH_ROWS);
        let start = end.saturating_sub(BATCH_ROWS);
        let cells = |column: usize, row: usize, values: &[BaseElement]| {
            let cells = (column..).zip(values.to_vec());
            cells.map(move |(column, value)| Assertion::single(column, row, value))
        };
        let mut all = Vec::with_capacity(ASSERTIONS);
        all.extend(cells(0, 0, &absorbed(&claim.start, &first)));
        all.extend(cells(STATE, CYCLE, &first[HALF..]));
        all.extend(cells(FIRST_WORDS, start, &last[..HALF]));
        all.extend(cells(STATE, start + CYCLE, &last[HALF..]));
        all.extend(cells(RATE, end.saturating_sub(1), &claim.end.0));
        all
    }
}
