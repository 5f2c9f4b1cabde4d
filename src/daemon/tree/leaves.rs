//! Leaves of blocks that are read, kept in memory.
//!
//! A leaf is found by looking into every run of the tree, a page of each; neighbours come with it.
//! So they are kept in groups, each in the one place that its number gives it: nothing is searched,
//! and a volume of up to 4 GiB has room for all. What a sweep has written is forgotten when the
//! tree takes the sweep over.
//!
//! Memory: 2 KiB for each 256 KiB of the volume of which a block was read, at most 32 MiB.

use std::ops::Range;

use hn4_proof::hash::Digest;
use hn4_proof::tree::TreeError;

/// Blocks of a group.
const GROUP: u64 = 64;
/// Groups that are kept.
const GROUPS: u64 = 1 << 14;

#[derive(Debug)]
struct Group {
    first: u64,
    leaves: Vec<Digest>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Leaves {
    /// Empty until the first block is asked for.
    places: Vec<Option<Group>>,
    /// Blocks of the volume.
    blocks: u64,
}

impl Leaves {
    /// For a volume of so many blocks.
    pub(super) fn new(blocks: u64) -> Self {
        let places = Vec::new();
        Self { places, blocks }
    }

    /// The leaf of a block; `look_up` gives those of neighbouring blocks from the tree.
    pub(super) fn get(
        &mut self,
        block: u64,
        look_up: impl FnOnce(Range<u64>) -> Result<Vec<Digest>, TreeError>,
    ) -> Result<Option<Digest>, TreeError> {
        if self.places.is_empty() {
            let places = self.blocks.div_ceil(GROUP).clamp(1, GROUPS);
            self.places.extend((0..places).map(|_| None));
        }
        let first = block / GROUP * GROUP;
        let place = usize::try_from(block / GROUP % self.places.len() as u64).unwrap_or(0);
        let place = &mut self.places[place];
        if place.as_ref().is_none_or(|group| group.first != first) {
            let end = (first + GROUP).min(self.blocks.max(first));
            let leaves = look_up(first..end)?;
            *place = Some(Group { first, leaves });
        }
        let group = place.as_ref();
        let at = usize::try_from(block - first).unwrap_or(usize::MAX);
        Ok(group.and_then(|group| group.leaves.get(at).copied()))
    }

    /// Forgets groups of which a block may have another leaf now.
    pub(super) fn forget(&mut self, is_touched: impl Fn(Range<u64>) -> bool) {
        for place in &mut self.places {
            place.take_if(|group| is_touched(group.first..group.first + GROUP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: u64) -> Digest {
        let mut digest = Digest::ZERO;
        digest.0[..8].copy_from_slice(&number.to_le_bytes());
        digest
    }

    #[test]
    fn neighbours_are_looked_up_once_until_one_of_them_was_written() {
        let mut leaves = Leaves::new(1000);
        let mut looked = Vec::new();
        let mut get = |leaves: &mut Leaves, block, version: u64| {
            let leaf = leaves.get(block, |range| {
                looked.push(range.clone());
                Ok(range.map(|block| digest(block + version)).collect())
            });
            leaf.expect("nothing fails").expect("in the volume")
        };
        assert_eq!(get(&mut leaves, 70, 0), digest(70));
        assert_eq!(get(&mut leaves, 64, 5000), digest(64), "as it was");
        assert_eq!(get(&mut leaves, 999, 0), digest(999));
        leaves.forget(|range| range.contains(&127));
        assert_eq!(get(&mut leaves, 70, 5000), digest(5070));
        assert_eq!(get(&mut leaves, 960, 5000), digest(960), "another group");
        assert_eq!(looked, [64..128, 960..1000, 64..128]);
    }

    #[test]
    fn groups_that_share_a_place_are_not_taken_for_each_other() {
        let mut leaves = Leaves::new(GROUP * GROUPS * 4);
        for block in [3, 3 + GROUP * GROUPS, 3, 3 + 2 * GROUP * GROUPS] {
            let leaf = leaves.get(block, |range| Ok(range.map(digest).collect()));
            assert_eq!(leaf.expect("nothing fails"), Some(digest(block)));
        }
    }
}
