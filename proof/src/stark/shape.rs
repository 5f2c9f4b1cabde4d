//! The exact layout that an argument must have, checked byte for byte before winterfell reads it.
//!
//! Winterfell's own reading trusts lengths and depths that a stranger may have chosen: it asserts
//! what it should refuse, and computes powers of two that may overflow. Here every length, count
//! and depth is compared with what the claim and the parameters make it, so what is read
//! afterwards is bounded by them and by the length of the input. The contents are not looked at.

use winterfell::math::FieldElement;
use winterfell::math::fields::CubeExtension;
use winterfell::math::fields::f64::BaseElement;
use winterfell::{Air, FieldExtension, ProofOptions};

use super::StarkError;
use super::air::{ChainAir, WIDTH};
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::DIGEST_BYTES;

/// Bytes of an element of the field.
const ELEMENT: usize = BaseElement::ELEMENT_BYTES;
/// Bytes of an element of the extension that challenges and what follows from them are in.
const EXTENDED: usize = CubeExtension::<BaseElement>::ELEMENT_BYTES;

/// What lengths there must be.
#[derive(Debug)]
pub(super) struct Shape {
    /// The header: trace, field, parameters, number of constraints.
    pub(super) header: Vec<u8>,
    queries: usize,
    /// Number of points that are committed to.
    domain: usize,
    /// Columns of the constraint polynomial.
    columns: usize,
    folding: usize,
    pub(super) layers: usize,
    /// Bytes of the polynomial that the low-degree test ends with.
    remainder: usize,
}

fn byte(value: usize) -> u8 {
    // All that a header holds fits; what did not would make a header that no proof has.
    u8::try_from(value).unwrap_or(u8::MAX)
}

/// The header as winterfell writes it.
fn header(air: &ChainAir, options: &ProofOptions) -> Vec<u8> {
    let mut writer = Writer::new();
    let rows = air.trace_length().trailing_zeros();
    // Columns, none of a second segment and no challenges for it, rows, no bytes of a user's.
    writer
        .bytes(&[byte(WIDTH), 0, 0, rows.to_le_bytes()[0]])
        .u16(0);
    let modulus = <BaseElement as winterfell::math::StarkField>::get_modulus_le_bytes();
    writer.u8(byte(modulus.len())).bytes(&modulus);
    let fri = options.to_fri_options();
    writer.bytes(&[
        byte(options.num_queries()),
        byte(options.blowup_factor()),
        options.grinding_factor().to_le_bytes()[0],
        options.field_extension() as u8,
        byte(fri.folding_factor()),
        byte(fri.remainder_max_degree()),
        options.constraint_batching_method() as u8,
        options.deep_poly_batching_method() as u8,
        // One partition of the rows, hashed as a whole.
        1,
        1,
    ]);
    let constraints = air.context().num_assertions() + air.context().num_transition_constraints();
    // A number below 128, in winterfell's variable length.
    writer.u8(byte(constraints << 1 | 1));
    writer.finish()
}

impl Shape {
    /// For a claim.
    pub(super) fn of(air: &ChainAir) -> Self {
        let options = air.options();
        let fri = options.to_fri_options();
        let domain = air.lde_domain_size();
        let layers = fri.num_fri_layers(domain);
        let last = (0..layers).fold(air.trace_length(), |degree, _| {
            degree / fri.folding_factor()
        });
        Self {
            header: header(air, options),
            queries: options.num_queries(),
            domain,
            columns: air.context().num_constraint_composition_columns(),
            folding: fri.folding_factor(),
            layers,
            remainder: last * EXTENDED,
        }
    }

    /// Checks that the bytes are laid out so.
    ///
    /// # Errors
    /// [`StarkError::Parameters`] if the header is another, [`StarkError::Decode`] naming the part
    /// that is not as it must be.
    pub(super) fn check(&self, bytes: &[u8]) -> Result<(), StarkError> {
        let mut reader = Reader::new("argument", bytes);
        if reader.take(self.header.len())? != self.header {
            return Err(StarkError::Parameters);
        }
        self.body(reader)?;
        Ok(())
    }

    fn body(&self, mut reader: Reader<'_>) -> Result<(), DecodeError> {
        let reader = &mut reader;
        // Positions are drawn at random, and may coincide.
        let opened = usize::from(reader.u8()?);
        if opened == 0 || opened > self.queries {
            return Err(reader.invalid("number of positions"));
        }
        // Trace, constraints, each layer, the polynomial at the end.
        exact_u16(reader, (self.layers + 3) * DIGEST_BYTES, "commitments")?;
        for row in [WIDTH * ELEMENT, self.columns * EXTENDED] {
            let values = vint(reader)?;
            if values != opened * row {
                return Err(reader.invalid("length of the opened rows"));
            }
            reader.take(values)?;
            let paths = vint(reader)?;
            openings(reader.take(paths)?, self.domain, opened)?;
        }
        for columns in [WIDTH, self.columns] {
            let row = exact_u16(reader, 1 + 2 * columns * EXTENDED, "evaluations")?;
            if row.first() != Some(&2) {
                return Err(reader.invalid("number of evaluated rows"));
            }
        }
        self.layers(reader, opened)?;
        exact_u16(reader, self.remainder, "last polynomial")?;
        if reader.u8()? != 0 {
            return Err(reader.invalid("number of partitions"));
        }
        // The work done before the positions were known.
        reader.u64()?;
        reader.clone().finish()
    }

    fn layers(&self, reader: &mut Reader<'_>, opened: usize) -> Result<(), DecodeError> {
        if usize::from(reader.u8()?) != self.layers {
            return Err(reader.invalid("number of layers"));
        }
        let mut domain = self.domain;
        let row = self.folding * EXTENDED;
        for _ in 0..self.layers {
            domain /= self.folding;
            let values = reader.count(opened * row, "length of a layer's rows")?;
            if values == 0 || !values.is_multiple_of(row) {
                return Err(reader.invalid("length of a layer's rows"));
            }
            reader.take(values)?;
            let most = reader.remaining();
            let paths = reader.count(most, "length of a layer's paths")?;
            openings(reader.take(paths)?, domain, opened)?;
        }
        Ok(())
    }
}

/// A block of bytes that is preceded by its length, which can only be one.
fn exact_u16<'a>(
    reader: &mut Reader<'a>,
    length: usize,
    field: &'static str,
) -> Result<&'a [u8], DecodeError> {
    if usize::from(reader.u16()?) != length {
        return Err(reader.invalid(field));
    }
    reader.take(length)
}

/// A number of winterfell's variable length: the position of the lowest set bit of the first byte
/// says how many bytes it has. None here needs more than four.
fn vint(reader: &mut Reader<'_>) -> Result<usize, DecodeError> {
    let first = reader.u8()?;
    let more = first.trailing_zeros();
    if more > 3 {
        return Err(reader.invalid("a length"));
    }
    let mut number = u32::from(first);
    for at in 1..=more {
        number |= u32::from(reader.u8()?) << (8 * at);
    }
    let value = number >> (more + 1);
    // One number, one form: a shorter one would not have held it.
    if more > 0 && value >> (7 * more) == 0 {
        return Err(reader.invalid("a length"));
    }
    usize::try_from(value).map_err(|_| reader.invalid("a length"))
}

/// Paths through a tree: its depth, and for each of the opened pairs of leaves the nodes beside its
/// way.
fn openings(bytes: &[u8], leaves: usize, opened: usize) -> Result<(), DecodeError> {
    let mut reader = Reader::new("paths of the argument", bytes);
    let depth = leaves.trailing_zeros();
    if u32::from(reader.u8()?) != depth {
        return Err(reader.invalid("depth"));
    }
    let paths = vint(&mut reader)?;
    if paths == 0 || paths > opened {
        return Err(reader.invalid("number of paths"));
    }
    for _ in 0..paths {
        let nodes = vint(&mut reader)?;
        if nodes > usize::from(byte(depth as usize)) {
            return Err(reader.invalid("length of a path"));
        }
        reader.take(nodes * DIGEST_BYTES)?;
    }
    reader.finish()
}

// The extension that the sizes above are for is the one that the parameters name.
const _: () = assert!(FieldExtension::Cubic as usize * ELEMENT == EXTENDED);
