//! Leaf hashes of 4 KiB blocks, many at a time.
//!
//! A block's leaf is `derive_key("state leaf", block)`: position-free, so that equal blocks have
//! equal leaves wherever they lie. A single block is only four BLAKE3 chunks, too few to fill a
//! wide vector unit; [`leaves`] therefore hashes the same chunk of up to sixteen blocks side by
//! side. It computes exactly what [`leaf`] does, several times faster where the processor has wide
//! vectors.
//!
//! The vector kernels are BLAKE3's own. They are reached through a module that the crate hides from
//! its documentation, so a test holds both ways against each other.

use std::sync::OnceLock;

use blake3::platform::Platform;
use blake3::{CHUNK_LEN, IncrementCounter};
use hn4::types::BLOCK_BYTES;

use crate::hash::{DIGEST_BYTES, Digest, STATE_LEAF, STATE_NODE};

/// Bytes in a block, as an array length.
pub const BLOCK: usize = 4096;
const _: () = assert!(BLOCK as u64 == BLOCK_BYTES);
const CHUNKS: usize = BLOCK / CHUNK_LEN;
const _: () = assert!(CHUNKS == 4);

/// Blocks that are hashed side by side: the widest vector unit that BLAKE3 knows.
const WIDTH: usize = 16;

// Flags of the BLAKE3 compression function, section 2.2 of its paper.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const DERIVE_KEY_MATERIAL: u8 = 1 << 6;

/// A whole block.
pub type Block = [u8; BLOCK];

/// Leaf of a block of zeroes.
#[must_use]
pub fn zero_leaf() -> Digest {
    static ZERO: OnceLock<Digest> = OnceLock::new();
    *ZERO.get_or_init(|| leaf(&[0; BLOCK]))
}

/// Leaf of one block.
#[must_use]
pub fn leaf(block: &Block) -> Digest {
    STATE_LEAF.hash(&[block])
}

/// Leaf of a block's first bytes, the rest being zeroes: the last block of a volume whose size is
/// no multiple of 4096. Bytes past a block are ignored.
#[must_use]
pub fn padded_leaf(bytes: &[u8]) -> Digest {
    let mut block = [0; BLOCK];
    block
        .iter_mut()
        .zip(bytes)
        .for_each(|(to, from)| *to = *from);
    leaf(&block)
}

/// Leaves of `blocks`, in order, handed to `emit` one by one.
pub fn leaves<'a>(blocks: impl IntoIterator<Item = &'a Block>, mut emit: impl FnMut(Digest)) {
    let mut blocks = blocks.into_iter().peekable();
    while blocks.peek().is_some() {
        let mut group: [&Block; WIDTH] = [&[0; BLOCK]; WIDTH];
        let mut filled = 0;
        for (slot, block) in group.iter_mut().zip(blocks.by_ref().take(WIDTH)) {
            *slot = block;
            filled += 1;
        }
        if filled < 4 {
            group[..filled].iter().for_each(|block| emit(leaf(block)));
        } else {
            leaves_wide(&group[..filled], &mut emit);
        }
    }
}

/// Leaves of all whole blocks in `bytes`; what follows the last whole block is ignored.
pub fn leaves_of(bytes: &[u8], emit: impl FnMut(Digest)) {
    leaves(bytes.as_chunks::<BLOCK>().0, emit);
}

fn leaves_wide(blocks: &[&Block], emit: &mut impl FnMut(Digest)) {
    let platform = Platform::detect();
    let key = blake3::platform::words_from_le_bytes_32(STATE_LEAF.key());
    // Chunk values, block by block; then the two inner parents; then the root.
    let mut values = [[[0_u8; DIGEST_BYTES]; CHUNKS]; WIDTH];
    let mut column = [0_u8; WIDTH * DIGEST_BYTES];
    for chunk in 0..CHUNKS {
        let mut inputs: [&[u8; CHUNK_LEN]; WIDTH] = [&[0; CHUNK_LEN]; WIDTH];
        for (input, block) in inputs.iter_mut().zip(blocks) {
            *input = &block.as_chunks().0[chunk];
        }
        platform.hash_many(
            &inputs[..blocks.len()],
            &key,
            chunk as u64,
            IncrementCounter::No,
            DERIVE_KEY_MATERIAL,
            CHUNK_START,
            CHUNK_END,
            &mut column,
        );
        for (value, digest) in values.iter_mut().zip(column.as_chunks().0) {
            value[chunk] = *digest;
        }
    }
    let inner = DERIVE_KEY_MATERIAL | PARENT;
    let (mut lower, mut upper) = ([0; 2 * WIDTH * DIGEST_BYTES], [0; WIDTH * DIGEST_BYTES]);
    let pairs = values.as_flattened().as_flattened().as_chunks::<64>().0;
    parents(
        platform,
        &key,
        &pairs[..2 * blocks.len()],
        inner,
        &mut lower,
    );
    let pairs = lower.as_chunks::<64>().0;
    parents(
        platform,
        &key,
        &pairs[..blocks.len()],
        inner | ROOT,
        &mut upper,
    );
    upper.as_chunks().0[..blocks.len()]
        .iter()
        .for_each(|digest| emit(Digest(*digest)));
}

/// Nodes of the state tree over all pairs of `nodes`, many at a time, into the front of `nodes`;
/// half as many as there were. The same as [`crate::tree::parent`], which knows zeroes by their
/// level, since a zero node is the hash of the two below it.
pub(crate) fn state_parents(nodes: &mut [[u8; DIGEST_BYTES]]) -> usize {
    let platform = Platform::detect();
    let key = blake3::platform::words_from_le_bytes_32(STATE_NODE.key());
    let count = nodes.len() / 2;
    let mut parents = [0; WIDTH * DIGEST_BYTES];
    for first in (0..count).step_by(WIDTH) {
        let some = WIDTH.min(count - first);
        let mut inputs: [&[u8; 2 * DIGEST_BYTES]; WIDTH] = [&[0; 2 * DIGEST_BYTES]; WIDTH];
        let pairs = nodes[2 * first..].as_flattened().as_chunks().0;
        inputs[..some]
            .iter_mut()
            .zip(pairs)
            .for_each(|(input, pair)| *input = pair);
        // A pair is one block of one chunk, and that chunk is all.
        platform.hash_many(
            &inputs[..some],
            &key,
            0,
            IncrementCounter::No,
            DERIVE_KEY_MATERIAL,
            CHUNK_START,
            CHUNK_END | ROOT,
            &mut parents,
        );
        nodes[first..first + some].copy_from_slice(&parents.as_chunks().0[..some]);
    }
    count
}

/// Hashes up to 32 pairs of chaining values under `flags`.
fn parents(platform: Platform, key: &[u32; 8], pairs: &[[u8; 64]], flags: u8, out: &mut [u8]) {
    let mut inputs: [&[u8; 64]; 2 * WIDTH] = [&[0; 64]; 2 * WIDTH];
    inputs
        .iter_mut()
        .zip(pairs)
        .for_each(|(input, pair)| *input = pair);
    let inputs = &inputs[..pairs.len()];
    platform.hash_many(inputs, key, 0, IncrementCounter::No, flags, 0, 0, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_leaves_at_once_are_the_leaves_one_by_one() {
        for count in [0, 1, 3, 4, 5, 15, 16, 17, 40] {
            let bytes: Vec<u8> = (0..count * BLOCK)
                .map(|at| (at * 31 / 7 % 251).to_le_bytes()[0])
                .collect();
            let mut many = Vec::new();
            leaves_of(&bytes, |leaf| many.push(leaf));
            let single: Vec<_> = bytes.as_chunks().0.iter().map(leaf).collect();
            assert_eq!(many, single, "{count} blocks");
        }
    }

    #[test]
    fn a_leaf_is_blake3_derive_key_of_the_block_wherever_it_lies() {
        let block = [7; BLOCK];
        assert_eq!(
            leaf(&block),
            Digest(blake3::derive_key(STATE_LEAF.text(), &block))
        );
        assert_eq!(padded_leaf(&[]), zero_leaf());
        assert_eq!(padded_leaf(&block), leaf(&block));
    }
}
