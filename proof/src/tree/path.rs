//! Proof that a block of a volume has one content: the siblings from its leaf up to the root.

use hn4::types::BlockIndex;

use super::view::Nodes;
use super::{Geometry, TreeError, parent};
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::Digest;

const VERSION: u8 = 1;

/// The way from one leaf to the root.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockPath {
    geometry: Geometry,
    block: BlockIndex,
    siblings: Vec<Digest>,
}

impl BlockPath {
    /// The path of `block` in `tree`.
    ///
    /// # Errors
    /// [`TreeError`] if the block lies outside the volume, or from the tree.
    pub fn build(tree: &impl Nodes, block: BlockIndex) -> Result<Self, TreeError> {
        let geometry = tree.geometry();
        let height = geometry.height();
        if block.0 >= geometry.blocks() {
            return Err(TreeError::OutOfRange {
                level: 0,
                index: block.0,
                height,
            });
        }
        let sibling = |level: u8| tree.node(level, (block.0 >> level) ^ 1);
        let siblings = (0..height).map(sibling).collect::<Result<_, _>>()?;
        Ok(Self {
            geometry,
            block,
            siblings,
        })
    }

    /// The block.
    #[must_use]
    pub fn block(&self) -> BlockIndex {
        self.block
    }

    /// Size and shape of the volume.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The root that `leaf` leads to; the caller compares it with one that it trusts.
    #[must_use]
    pub fn computed_root(&self, leaf: &Digest) -> Digest {
        let steps = (0_u8..).zip(&self.siblings);
        let top = steps.fold(*leaf, |node, (level, sibling)| {
            match (self.block.0 >> level) & 1 {
                0 => parent(level, &node, sibling),
                _ => parent(level, sibling, &node),
            }
        });
        self.geometry.root(&top)
    }

    /// Appends the encoding: version, size in bytes, block, siblings from the leaf up.
    pub fn encode(&self, writer: &mut Writer) {
        writer
            .u8(VERSION)
            .u64(self.geometry.size_bytes())
            .u64(self.block.0);
        self.siblings
            .iter()
            .for_each(|sibling| _ = writer.digest(sibling));
    }

    /// Reads an encoding. The number of siblings follows from the size.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.version(VERSION)?;
        let geometry = Geometry::new(reader.u64()?).map_err(|_| reader.invalid("size"))?;
        let block = BlockIndex(reader.u64()?);
        if block.0 >= geometry.blocks() {
            return Err(reader.invalid("block"));
        }
        let siblings = reader.digests(usize::from(geometry.height()))?;
        Ok(Self {
            geometry,
            block,
            siblings,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::run::tests::leaf;
    use super::super::view::tests::Model;
    use super::super::zero_node;
    use super::*;

    #[test]
    fn every_block_has_a_path_and_a_flipped_bit_is_refused() {
        for size in [512, 4096, 5 * 4096, 300 * 4096 - 512, 70_000 * 4096] {
            let mut model = Model::new(size);
            let blocks = model.geometry.blocks();
            let state: BTreeMap<u64, Digest> = [0, blocks / 2, blocks - 1]
                .into_iter()
                .map(|at| (at, leaf(at + 1)))
                .collect();
            model.sweep(&state);
            let root = model.view().root().unwrap();
            for at in [0, 1, blocks / 2, blocks - 1]
                .into_iter()
                .filter(|at| *at < blocks)
            {
                let leaf = state.get(&at).copied().unwrap_or_else(|| zero_node(0));
                let path = BlockPath::build(&model.view(), BlockIndex(at)).unwrap();
                assert_eq!(
                    path.computed_root(&leaf),
                    root,
                    "block {at} of {size} bytes"
                );
                assert_ne!(path.computed_root(&Digest::ZERO), root);
                let mut writer = Writer::new();
                path.encode(&mut writer);
                let good = writer.finish();
                for bit in 0..good.len() * 8 {
                    let mut bad = good.clone();
                    bad[bit / 8] ^= 1 << (bit % 8);
                    let mut reader = Reader::new("path", &bad);
                    let Ok(path) = BlockPath::decode(&mut reader) else {
                        continue;
                    };
                    let accepted = reader.finish().is_ok() && path.computed_root(&leaf) == root;
                    // Neighbouring equal blocks have paths that differ only in their index.
                    assert!(!accepted || path.block().0 != at, "bit {bit}, {size} bytes");
                }
            }
            assert!(BlockPath::build(&model.view(), BlockIndex(blocks)).is_err());
        }
    }
}
