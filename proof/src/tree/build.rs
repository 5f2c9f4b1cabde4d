//! A node of the tree from the nodes under it, which come in ascending order and need not all come.
//!
//! What is left out is zero, and a gap costs O(height) whatever its length. Memory is O(height).

use super::{Geometry, TreeError, parent, zero_node};
use crate::hash::Digest;

/// Builds the node at one place from nodes of a lower level.
#[derive(Debug, Clone)]
pub struct SubtreeBuilder {
    base_level: u8,
    top_level: u8,
    // Indexes of `base_level`: the first of the subtree, the next one to come, and the end.
    first: u64,
    next: u64,
    end: u64,
    // Finished nodes, left to right, of falling levels.
    peaks: Vec<(u8, Digest)>,
}

impl SubtreeBuilder {
    /// For node `index` of `top_level`, from nodes of `base_level`.
    ///
    /// # Errors
    /// [`TreeError::OutOfRange`] if there is no such node.
    pub fn new(
        geometry: Geometry,
        (top_level, index): (u8, u64),
        base_level: u8,
    ) -> Result<Self, TreeError> {
        geometry.check(top_level, index)?;
        if base_level > top_level {
            let height = geometry.height();
            return Err(TreeError::OutOfRange {
                level: base_level,
                index,
                height,
            });
        }
        let span = u32::from(top_level - base_level);
        let (first, end) = (index << span, (index + 1) << span);
        Ok(Self {
            base_level,
            top_level,
            first,
            next: first,
            end,
            peaks: Vec::new(),
        })
    }

    /// For the top node of a whole volume, from its leaves.
    ///
    /// # Errors
    /// None for a valid geometry.
    pub fn whole(geometry: Geometry) -> Result<Self, TreeError> {
        Self::new(geometry, (geometry.height(), 0), 0)
    }

    /// The first index that [`Self::push`] takes next.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes the node `index` of the base level; what lies between it and the last one is zero.
    ///
    /// # Errors
    /// [`TreeError::Order`] if it lies before the last one, or outside the subtree.
    pub fn push(&mut self, index: u64, node: Digest) -> Result<(), TreeError> {
        if index < self.next || index >= self.end {
            return Err(TreeError::Order {
                index,
                last: self.next,
            });
        }
        self.fill(index);
        self.append(0, node);
        Ok(())
    }

    fn fill(&mut self, until: u64) {
        while self.next < until {
            // The largest zero subtree that is aligned here and does not reach past `until`.
            let aligned = (self.next - self.first).trailing_zeros();
            let fits = (until - self.next).ilog2();
            // Both are below 64.
            let above = u8::try_from(aligned.min(fits)).unwrap_or(0);
            self.append(above, zero_node(self.base_level + above));
        }
    }

    fn append(&mut self, above: u8, node: Digest) {
        self.next += 1 << above;
        let (mut level, mut node) = (self.base_level + above, node);
        while let Some(&(peak_level, left)) = self.peaks.last()
            && peak_level == level
        {
            self.peaks.pop();
            node = parent(level, &left, &node);
            level += 1;
        }
        self.peaks.push((level, node));
    }

    /// The node. What was not pushed is zero.
    #[must_use]
    pub fn finish(mut self) -> Digest {
        self.fill(self.end);
        let (level, node) = self.peaks.pop().expect("a filled subtree has one peak");
        debug_assert!(level == self.top_level && self.peaks.is_empty());
        node
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::blocks;

    fn leaf(number: u64) -> Digest {
        blocks::padded_leaf(&number.to_le_bytes())
    }

    fn by_definition(leaves: &BTreeMap<u64, Digest>, level: u8, index: u64) -> Digest {
        match level {
            0 => leaves.get(&index).copied().unwrap_or_else(|| zero_node(0)),
            _ => {
                let left = by_definition(leaves, level - 1, 2 * index);
                let right = by_definition(leaves, level - 1, 2 * index + 1);
                parent(level - 1, &left, &right)
            }
        }
    }

    #[test]
    fn a_tebibyte_of_holes_costs_a_few_hashes() {
        let geometry = Geometry::new(1 << 40).unwrap();
        let mut builder = SubtreeBuilder::whole(geometry).unwrap();
        assert_eq!(
            geometry.root(&builder.clone().finish()),
            geometry.zero_root()
        );
        builder.push((1 << 28) - 1, leaf(1)).unwrap();
        assert!(builder.peaks.len() <= 28);
        assert_ne!(geometry.root(&builder.finish()), geometry.zero_root());
    }

    #[test]
    fn leaves_out_of_order_or_out_of_range_are_refused() {
        let geometry = Geometry::new(5 * 4096).unwrap();
        let mut builder = SubtreeBuilder::whole(geometry).unwrap();
        builder.push(3, leaf(1)).unwrap();
        assert!(matches!(
            builder.push(3, leaf(1)),
            Err(TreeError::Order { .. })
        ));
        assert!(matches!(
            builder.push(8, leaf(1)),
            Err(TreeError::Order { .. })
        ));
        assert!(SubtreeBuilder::new(geometry, (1, 4), 0).is_err());
        assert!(SubtreeBuilder::new(geometry, (4, 0), 0).is_err());
        assert!(SubtreeBuilder::new(geometry, (1, 0), 2).is_err());
    }

    proptest! {
        #[test]
        fn the_streamed_node_is_the_defined_node(
            leaves in prop::collection::btree_map(0_u64..100, any::<u64>(), 0..40),
            level in 0_u8..8,
        ) {
            let leaves: BTreeMap<_, _> = leaves.iter().map(|(&at, &n)| (at, leaf(n))).collect();
            let geometry = Geometry::new(100 * 4096).unwrap();
            for index in 0..1_u64 << (7 - level) {
                let mut builder = SubtreeBuilder::new(geometry, (level, index), 0).unwrap();
                for (&at, &leaf) in leaves.range(index << level..(index + 1) << level) {
                    builder.push(at, leaf).unwrap();
                }
                prop_assert_eq!(builder.finish(), by_definition(&leaves, level, index));
            }
        }
    }
}
