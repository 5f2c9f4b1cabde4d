//! The wormhole, as the seed document promises it: a volume that shares another one's identity and
//! geometry on purpose, and a history that says so.
//!
//! - [`clone`] makes one: UUID, generation, geometry and device type tag are the parent's, so that
//!   both compute the same addresses whatever they lie on; both chronicles record the fork.
//! - [`registry`] refuses a second volume with a UUID unless it says WORMHOLE.
//! - [`certificate`] is what two sides must have equal, as one comparable value.
//! - [`overlay`] is the superblock that a delta log carries as a template.
//! - [`sibling`] makes a clone or fork a volume of its own.
//!
//! Strict flush is checked before anything else everywhere.
//= HN4_SPEC 4, 11, 12

pub mod certificate;
pub mod clone;
pub mod overlay;
pub mod registry;
pub mod sibling;

use crate::device::{Device, HwFlags};
use crate::status::{Code, Problem, Region};

/// Refuses devices whose flushes are not kept.
///
/// # Errors
/// [`Code::HwIo`], as the reference.
pub fn require_strict_flush(device: &Device) -> Result<(), Problem> {
    if device.hw_flags.has(HwFlags::STRICT_FLUSH) {
        return Ok(());
    }
    let advice = "use another device, or assert strict flushes if you know it keeps them";
    let found = "a device without STRICT_FLUSH";
    let expected = "a device whose flushes are kept, for a WORMHOLE volume";
    Err(Problem::new(
        Code::HwIo,
        (Region::Device, 0),
        found,
        expected,
        advice,
    ))
}

/// Adds a divergence to a generation: the timelines that part here never count the same numbers.
///
/// The reference lets both sides count 2, 3, 4, ... A fork instead jumps ahead by a stride drawn
/// from its id: at least 2^32, a multiple of 2^32, so that a side would have to be mounted two
/// thousand million times to meet the other. Generations stay below the limit where volumes lock.
#[must_use]
pub fn diverged_generation(generation: u64, fork_id: &[u8; 16]) -> u64 {
    const STRIDE_BITS: u32 = 32;
    const STRIDES: u64 = 1 << 16;
    let mut hasher = blake3::Hasher::new_derive_key("hn4 wormhole divergence 1");
    hasher.update(fork_id);
    let draw = hasher
        .finalize()
        .as_bytes()
        .first_chunk()
        .map_or(0, |b| u64::from_le_bytes(*b));
    let strides = 1 + draw % STRIDES;
    let jumped = generation.checked_add(strides << STRIDE_BITS);
    let limit = crate::superblock::GENERATION_LIMIT - (1 << STRIDE_BITS);
    jumped
        .filter(|&jumped| jumped < limit)
        .unwrap_or(generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_of_one_parent_never_count_the_same_generations() {
        let forks: Vec<u64> = (0..8_u8)
            .map(|id| diverged_generation(5, &[id; 16]))
            .collect();
        for (index, fork) in forks.iter().enumerate() {
            assert!(*fork >= 5 + (1 << 32), "far from the parent");
            assert!(
                forks[..index]
                    .iter()
                    .all(|other| other.abs_diff(*fork) >= 1 << 32)
            );
        }
    }
}
