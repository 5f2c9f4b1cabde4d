//! The state tree: a Merkle tree over what the volume *is*, beside the folds over what happened to
//! it.
//!
//! Leaves are 4 KiB blocks, position-free, so that every subtree of zeroes of one height has the
//! same hash. The tree is perfect: it has 2^height leaves, and those past the end of the volume are
//! zero blocks, as are the bytes past the end of a last, partial block. The root hashes the size in
//! bytes together with the top node, so volumes of different sizes never share a root.
//!
//! | file | what it is for |
//! |---|---|
//! | `mod.rs` | geometry, zero constants, access to bytes |
//! | [`build`] | nodes from leaves that stream by in ascending order |
//! | [`run`] | a sorted, immutable file of (node index, hash) |
//! | [`merge`] | several runs as one, the newest winning |
//! | [`manifest`] | which runs are the tree; sweeps, merges, recovery |
//! | [`keeper`] | owns all of this: sweeps, the first build, the root, verifying a device |
//! | [`view`] | any node of the tree, from the runs |
//! | [`path`] | proof that one block has one content |
//! | [`compare`] | which 64 KiB groups of two trees differ |
//! | [`exchange`] | asking a peer for the contents that a leaf stands for |
//!
//! **Invariant: a run is durable before the sweep whose blocks it names touches the backing**, so
//! that tree and backing can be reconciled after a crash whatever came last.

use std::io;
use std::sync::OnceLock;

use hn4::types::{BLOCK_BYTES, SECTOR_BYTES};

use crate::blocks::zero_leaf;
use crate::hash::{self, Digest};

pub mod build;
pub mod compare;
pub mod exchange;
pub mod keeper;
pub mod manifest;
pub mod merge;
pub mod path;
pub mod run;
pub mod view;

/// Level of the unit in which differing volumes are repaired: 16 blocks, 64 KiB.
pub const GROUP_LEVEL: u8 = 4;
/// Level of the nodes that are kept beside the leaves: 256 blocks, 1 MiB.
pub const MIDDLE_LEVEL: u8 = 8;
/// Level of the nodes that are kept in memory: 65,536 blocks, 256 MiB; 128 KiB of memory per TiB.
pub const TOP_LEVEL: u8 = 16;
/// Height of the largest tree: 2^63 bytes.
pub const MAX_HEIGHT: u8 = 51;
/// Largest volume, in bytes.
pub const MAX_SIZE_BYTES: u64 = 1 << 63;

/// Random access to the bytes of a file, without saying how it is done.
pub trait ReadAt {
    /// Length in bytes.
    ///
    /// # Errors
    /// What the medium says.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// What the medium says; reading past the end is an error.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl ReadAt for Vec<u8> {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..));
        let bytes = rest.and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Why the tree cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The size is not one that a volume can have.
    #[error("{0} bytes: a volume has at least one sector, whole sectors, and at most 2^63 bytes")]
    Size(u64),
    /// A node lies outside the tree.
    #[error("node {index} of level {level} lies outside a tree of height {height}")]
    OutOfRange {
        /// Level, 0 being the leaves.
        level: u8,
        /// Index within the level.
        index: u64,
        /// Height of the tree.
        height: u8,
    },
    /// Nodes did not come in ascending order.
    #[error("node {index} came after node {last}; they must ascend")]
    Order {
        /// The node that came.
        index: u64,
        /// The one before it.
        last: u64,
    },
    /// A run file is damaged. The blocks that it covers must be hashed again from the backing.
    #[error("run {run}: {what} is damaged; hash its blocks again with `hn4ctl verify --deep`")]
    Damaged {
        /// Id of the run, 0 if it could not be read.
        run: u64,
        /// The part that is damaged.
        what: &'static str,
    },
    /// The medium failed.
    #[error("cannot read or write a run of the state tree: {0}")]
    Io(#[from] io::Error),
}

/// Size and shape of a tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    size_bytes: u64,
}

impl Geometry {
    /// For a volume of `size_bytes`, a multiple of 512 up to 2^63.
    ///
    /// # Errors
    /// [`TreeError::Size`] for any other.
    pub fn new(size_bytes: u64) -> Result<Self, TreeError> {
        if size_bytes == 0
            || !size_bytes.is_multiple_of(SECTOR_BYTES)
            || size_bytes > MAX_SIZE_BYTES
        {
            return Err(TreeError::Size(size_bytes));
        }
        Ok(Self { size_bytes })
    }

    /// Size of the volume in bytes.
    #[must_use]
    pub fn size_bytes(self) -> u64 {
        self.size_bytes
    }

    /// Blocks, the last of which may be partial.
    #[must_use]
    pub fn blocks(self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES)
    }

    /// Least h with 2^h >= blocks.
    #[must_use]
    pub fn height(self) -> u8 {
        // The logarithm of at most 2^51 fits in a byte.
        u8::try_from(self.blocks().next_power_of_two().trailing_zeros()).unwrap_or(MAX_HEIGHT)
    }

    /// Nodes of `level` that cover some part of the volume; those behind them are zero.
    #[must_use]
    pub fn nodes(self, level: u8) -> u64 {
        self.blocks()
            .div_ceil(1_u64.checked_shl(u32::from(level)).unwrap_or(u64::MAX))
    }

    /// The root over the top node.
    #[must_use]
    pub fn root(self, top: &Digest) -> Digest {
        hash::STATE_ROOT.hash(&[&self.size_bytes.to_le_bytes(), &top.0])
    }

    /// Root of a volume that holds nothing but zeroes. Costs one hash, whatever the size.
    #[must_use]
    pub fn zero_root(self) -> Digest {
        self.root(&zero_node(self.height()))
    }

    pub(crate) fn check(self, level: u8, index: u64) -> Result<(), TreeError> {
        let height = self.height();
        if level <= height && index >> (height - level) == 0 {
            Ok(())
        } else {
            Err(TreeError::OutOfRange {
                level,
                index,
                height,
            })
        }
    }
}

/// Leaf of a block of which nobody knows any more what it is to be: it could not be read, or was
/// damaged and then only some of its sectors were written. No block has it.
pub const DAMAGED: Digest = Digest([0xFF; 32]);

/// Hash of a subtree of zeroes that is `level` high, at most [`MAX_HEIGHT`].
#[must_use]
pub fn zero_node(level: u8) -> Digest {
    static ZERO: OnceLock<[Digest; MAX_HEIGHT as usize + 1]> = OnceLock::new();
    let table = ZERO.get_or_init(|| {
        let mut node = zero_leaf();
        std::array::from_fn(|_| {
            let here = node;
            node = hash::STATE_NODE.hash(&[&here.0, &here.0]);
            here
        })
    });
    table[usize::from(level.min(MAX_HEIGHT))]
}

/// The node over two nodes of `level`.
#[must_use]
pub fn parent(level: u8, left: &Digest, right: &Digest) -> Digest {
    if left == right && *left == zero_node(level) {
        return zero_node(level.saturating_add(1));
    }
    hash::STATE_NODE.hash(&[&left.0, &right.0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_rounds_up_and_refuses_what_is_no_volume() {
        let shape = |size| {
            Geometry::new(size)
                .map(|shape| (shape.blocks(), shape.height()))
                .ok()
        };
        assert_eq!(shape(512), Some((1, 0)));
        assert_eq!(shape(4096), Some((1, 0)));
        assert_eq!(shape(4608), Some((2, 1)));
        assert_eq!(shape(5 * 4096), Some((5, 3)));
        assert_eq!(shape(1 << 40), Some((1 << 28, 28)));
        assert_eq!(shape(1 << 63), Some((1 << 51, 51)));
        assert_eq!(shape(0), None);
        assert_eq!(shape(100), None);
        assert_eq!(shape((1 << 63) + 512), None);
    }

    #[test]
    fn a_node_of_zeroes_is_the_constant_and_sizes_have_different_roots() {
        let by_hand = hash::STATE_NODE.hash(&[&zero_node(3).0, &zero_node(3).0]);
        assert_eq!(zero_node(4), by_hand);
        assert_eq!(parent(3, &zero_node(3), &zero_node(3)), by_hand);
        let root = |size| Geometry::new(size).unwrap().zero_root();
        // Both have three blocks and a height of two: only the size tells them apart.
        assert_ne!(root(3 * 4096), root(3 * 4096 - 512));
    }
}
