//! Any node of the tree, from its runs.
//!
//! Nodes are kept at three levels: leaves, middle nodes (1 MiB) and top nodes (256 MiB). A node of
//! any other level is built from the nearest kept level below it, so that no answer reads more than
//! 256 entries of a level for each node that it returns, and a root reads no file at all.
//!
//! Middle nodes follow the leaves: after a sweep [`refresh_middles`] computes those above the
//! blocks that it touched, and [`Tops::refresh`] the top nodes above them.

use std::collections::BTreeMap;

use super::build::SubtreeBuilder;
use super::merge::Merge;
use super::run::Run;
use super::{Geometry, MIDDLE_LEVEL, ReadAt, TOP_LEVEL, TreeError, zero_node};
use crate::blocks;
use crate::hash::{DIGEST_BYTES, Digest};

/// Anything that knows the nodes of a tree.
pub trait Nodes {
    /// Size and shape.
    fn geometry(&self) -> Geometry;

    /// The `2^down` nodes that lie `down` levels below node `index` of `level`, left to right;
    /// `down` is at most `level` and at most 8.
    ///
    /// # Errors
    /// [`TreeError`] outside the tree, or from the runs.
    fn below(&self, level: u8, index: u64, down: u8) -> Result<Vec<Digest>, TreeError>;

    /// One node.
    ///
    /// # Errors
    /// [`TreeError`] outside the tree, or from the runs.
    fn node(&self, level: u8, index: u64) -> Result<Digest, TreeError> {
        let mut nodes = self.below(level, index, 0)?;
        nodes.pop().ok_or(TreeError::OutOfRange {
            level,
            index,
            height: self.geometry().height(),
        })
    }

    /// The root over everything.
    ///
    /// # Errors
    /// [`TreeError`] from the runs.
    fn root(&self) -> Result<Digest, TreeError> {
        let geometry = self.geometry();
        Ok(geometry.root(&self.node(geometry.height(), 0)?))
    }
}

/// Builds `2^down` neighbouring nodes from ascending entries of `base_level`.
fn build_below(
    geometry: Geometry,
    (level, index, down): (u8, u64, u8),
    base_level: u8,
    entries: impl Iterator<Item = Result<(u64, Digest), TreeError>>,
) -> Result<Vec<Digest>, TreeError> {
    let child_level = level - down;
    let span = u32::from(child_level - base_level);
    let first = index << down;
    let mut entries = entries.peekable();
    (first..first + (1 << down))
        .map(|child| {
            let mut builder = SubtreeBuilder::new(geometry, (child_level, child), base_level)?;
            let is_inside = |entry: &Result<(u64, Digest), TreeError>| match entry {
                Ok((at, _)) => *at >> span == child,
                Err(_) => true,
            };
            while let Some(entry) = entries.next_if(is_inside) {
                let (at, node) = entry?;
                builder.push(at, node)?;
            }
            Ok(builder.finish())
        })
        .collect()
}

/// The nodes of [`TOP_LEVEL`], in memory; those not listed are zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tops(BTreeMap<u64, Digest>);

impl Tops {
    /// Reads all middle nodes, newest run first: 32 bytes for each MiB that is not zero.
    ///
    /// # Errors
    /// [`TreeError`] from the runs.
    pub fn load<R: ReadAt>(geometry: Geometry, middles: &[Run<R>]) -> Result<Self, TreeError> {
        let mut tops = Self::default();
        if geometry.height() < TOP_LEVEL {
            return Ok(tops);
        }
        let mut open: Option<(u64, SubtreeBuilder)> = None;
        for entry in Merge::new(middles, 0) {
            let (at, node) = entry?;
            let index = at >> (TOP_LEVEL - MIDDLE_LEVEL);
            if let Some((last, builder)) = open.take_if(|(last, _)| *last != index) {
                tops.set(last, builder.finish());
            }
            if open.is_none() {
                let builder = SubtreeBuilder::new(geometry, (TOP_LEVEL, index), MIDDLE_LEVEL)?;
                open = Some((index, builder));
            }
            if let Some((_, builder)) = &mut open {
                builder.push(at, node)?;
            }
        }
        if let Some((last, builder)) = open {
            tops.set(last, builder.finish());
        }
        Ok(tops)
    }

    fn set(&mut self, index: u64, node: Digest) {
        if node == zero_node(TOP_LEVEL) {
            self.0.remove(&index);
        } else {
            self.0.insert(index, node);
        }
    }

    /// Computes the top nodes above `touched` middle nodes anew, from `middles`, newest run first.
    ///
    /// # Errors
    /// [`TreeError`] from the runs.
    pub fn refresh<R: ReadAt>(
        &mut self,
        geometry: Geometry,
        middles: &[Run<R>],
        touched: impl Iterator<Item = u64>,
    ) -> Result<(), TreeError> {
        if geometry.height() < TOP_LEVEL {
            return Ok(());
        }
        let down = TOP_LEVEL - MIDDLE_LEVEL;
        let mut last = None;
        for index in touched.map(|middle| middle >> down) {
            if last.replace(index) != Some(index) {
                let entries = Merge::new(middles, index << down);
                let node = build_below(geometry, (TOP_LEVEL, index, 0), MIDDLE_LEVEL, entries)?;
                node.into_iter().for_each(|node| self.set(index, node));
            }
        }
        Ok(())
    }
}

/// Leaves below a middle node.
const BELOW_MIDDLE: usize = 1 << MIDDLE_LEVEL;
/// From so many leaves on that are not zero, hashing them all side by side costs less than leaving
/// out what is zero.
const DENSE: usize = 24;

/// Computes middle nodes above the leaves of the runs `new`, from `leaves`, newest run first, and
/// hands each to `emit`, ascending: those from number `from` on, until they have cost about
/// `budget` leaves. Where the next slice begins; `None` at the end.
///
/// # Errors
/// [`TreeError`] from the runs or from `emit`.
pub fn refresh_middles<R: ReadAt>(
    geometry: Geometry,
    (leaves, new): (&[Run<R>], &[Run<R>]),
    (from, mut budget): (u64, usize),
    mut emit: impl FnMut(u64, Digest) -> Result<(), TreeError>,
) -> Result<Option<u64>, TreeError> {
    if geometry.height() < MIDDLE_LEVEL {
        return Ok(None);
    }
    let mut touched = Merge::new(new, from << MIDDLE_LEVEL);
    let mut known = Merge::new(leaves, from << MIDDLE_LEVEL);
    while let Some((leaf, _)) = touched.next().transpose()? {
        let index = leaf >> MIDDLE_LEVEL;
        let (first, end) = (index << MIDDLE_LEVEL, (index + 1) << MIDDLE_LEVEL);
        if budget == 0 {
            return Ok(Some(index));
        }
        budget = budget.saturating_sub(BELOW_MIDDLE);
        known.seek(first);
        let mut below = [zero_node(0).0; BELOW_MIDDLE];
        let mut count = 0;
        while let Some((at, node)) = known.next_before(end).transpose()? {
            below[usize::try_from(at - first).unwrap_or(0)] = node.0;
            count += 1;
        }
        emit(index, middle_over(geometry, index, (&mut below, count))?)?;
        touched.seek(end);
    }
    Ok(None)
}

/// The middle node over `below`, of which `count` are perhaps not zero.
fn middle_over(
    geometry: Geometry,
    index: u64,
    (below, count): (&mut [[u8; DIGEST_BYTES]; BELOW_MIDDLE], usize),
) -> Result<Digest, TreeError> {
    if count >= DENSE {
        let mut rest = BELOW_MIDDLE;
        while rest > 1 {
            rest = blocks::state_parents(&mut below[..rest]);
        }
        return Ok(Digest(below[0]));
    }
    let mut builder = SubtreeBuilder::new(geometry, (MIDDLE_LEVEL, index), 0)?;
    for (at, node) in (index << MIDDLE_LEVEL..).zip(below) {
        if *node != zero_node(0).0 {
            builder.push(at, Digest(*node))?;
        }
    }
    Ok(builder.finish())
}

/// A tree as it was at one checkpoint, whatever sweeps and merges come after: runs never change,
/// and are there for as long as somebody holds them.
#[derive(Debug)]
pub struct Snapshot<R> {
    pub(super) geometry: Geometry,
    pub(super) leaves: Vec<Run<R>>,
    pub(super) middles: Vec<Run<R>>,
    pub(super) tops: Tops,
}

impl<R: ReadAt> Snapshot<R> {
    /// All its nodes.
    #[must_use]
    pub fn view(&self) -> View<'_, R> {
        View {
            geometry: self.geometry,
            leaves: &self.leaves,
            middles: &self.middles,
            tops: &self.tops,
        }
    }
}

/// A tree in its runs.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, R> {
    /// Size and shape.
    pub geometry: Geometry,
    /// Runs of leaves, newest first.
    pub leaves: &'a [Run<R>],
    /// Runs of middle nodes, newest first, as new as the leaves.
    pub middles: &'a [Run<R>],
    /// Top nodes, as new as the leaves.
    pub tops: &'a Tops,
}

impl<R: ReadAt> Nodes for View<'_, R> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn below(&self, level: u8, index: u64, down: u8) -> Result<Vec<Digest>, TreeError> {
        self.geometry.check(level, index)?;
        if down > level || down > 8 {
            return Err(TreeError::OutOfRange {
                level: down,
                index,
                height: level,
            });
        }
        let at = (level, index, down);
        let first = |base_level: u8| index << (level - base_level);
        match level - down {
            TOP_LEVEL.. => {
                let kept = self.tops.0.range(first(TOP_LEVEL)..);
                let entries = kept.map(|(&index, &node)| Ok((index, node)));
                build_below(self.geometry, at, TOP_LEVEL, entries)
            }
            MIDDLE_LEVEL.. => {
                let entries = Merge::new(self.middles, first(MIDDLE_LEVEL));
                build_below(self.geometry, at, MIDDLE_LEVEL, entries)
            }
            _ => build_below(self.geometry, at, 0, Merge::new(self.leaves, first(0))),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use hn4::types::{Epoch, VolumeId};
    use proptest::prelude::*;

    use super::super::run::{RunMeta, RunWriter, tests::leaf};
    use super::*;

    /// A tree that sweeps are applied to one after the other, as a daemon does it.
    pub(crate) struct Model {
        pub(crate) geometry: Geometry,
        pub(crate) leaves: Vec<Run<Vec<u8>>>,
        pub(crate) middles: Vec<Run<Vec<u8>>>,
        pub(crate) tops: Tops,
        next: u64,
    }

    impl Model {
        pub(crate) fn new(size_bytes: u64) -> Self {
            let geometry = Geometry::new(size_bytes).unwrap();
            let tops = Tops::default();
            Self {
                geometry,
                leaves: Vec::new(),
                middles: Vec::new(),
                tops,
                next: 1,
            }
        }

        fn writer(&mut self, level: u8) -> RunWriter<Vec<u8>> {
            let (volume, geometry, epoch) = (VolumeId([1; 16]), self.geometry, Epoch(self.next));
            self.next += 1;
            let id = self.next;
            let meta = RunMeta {
                id,
                level,
                volume,
                geometry,
                first: epoch,
                last: epoch,
            };
            RunWriter::new(meta, Vec::new())
        }

        pub(crate) fn sweep(&mut self, blocks: &BTreeMap<u64, Digest>) {
            let mut writer = self.writer(0);
            blocks
                .iter()
                .for_each(|(at, leaf)| writer.push(*at, leaf).unwrap());
            self.leaves
                .insert(0, Run::open(writer.finish().unwrap().1).unwrap());
            let mut writer = self.writer(MIDDLE_LEVEL);
            let emit = |index, node| writer.push(index, &node);
            let runs = (&self.leaves[..], &self.leaves[..1]);
            let next = refresh_middles(self.geometry, runs, (0, usize::MAX), emit).unwrap();
            assert_eq!(next, None);
            self.middles
                .insert(0, Run::open(writer.finish().unwrap().1).unwrap());
            let touched = blocks.keys().map(|leaf| leaf >> MIDDLE_LEVEL);
            self.tops
                .refresh(self.geometry, &self.middles, touched)
                .unwrap();
        }

        pub(crate) fn view(&self) -> View<'_, Vec<u8>> {
            let Self {
                geometry,
                leaves,
                middles,
                tops,
                ..
            } = self;
            View {
                geometry: *geometry,
                leaves,
                middles,
                tops,
            }
        }
    }

    pub(crate) fn from_leaves(geometry: Geometry, leaves: &BTreeMap<u64, Digest>) -> Digest {
        let mut builder = SubtreeBuilder::whole(geometry).unwrap();
        leaves
            .iter()
            .for_each(|(at, leaf)| builder.push(*at, *leaf).unwrap());
        geometry.root(&builder.finish())
    }

    #[test]
    fn the_root_of_an_empty_tebibyte_needs_no_run() {
        let model = Model::new(1 << 40);
        assert_eq!(model.view().root().unwrap(), model.geometry.zero_root());
    }

    #[test]
    fn nodes_outside_the_tree_are_refused() {
        let model = Model::new(5 << 20);
        assert!(model.view().node(20, 0).is_err());
        assert!(model.view().node(0, 1 << 11).is_err());
        assert!(model.view().below(3, 0, 4).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn after_any_sweeps_every_node_is_what_the_leaves_say(
            // Up to 2 GiB, so that all three kept levels are in play, and never a power of two.
            sectors in 1_u64..(4 << 20),
            sweeps in prop::collection::vec(
                prop::collection::btree_map(any::<u64>(), 0_u64..5, 1..60), 1..5),
            probe in any::<u64>(),
        ) {
            let mut model = Model::new(sectors * 512);
            let blocks = model.geometry.blocks();
            let mut state = BTreeMap::new();
            for sweep in &sweeps {
                let sweep: BTreeMap<u64, Digest> = sweep
                    .iter()
                    .map(|(at, &n)| (at % blocks, if n == 0 { zero_node(0) } else { leaf(n) }))
                    .collect();
                model.sweep(&sweep);
                state.extend(sweep);
                let expected = from_leaves(model.geometry, &state);
                prop_assert_eq!(model.view().root().unwrap(), expected);
            }
            let loaded = Tops::load(model.geometry, &model.middles).unwrap();
            prop_assert_eq!(&loaded, &model.tops);
            for level in 1..=model.geometry.height() {
                let index = (probe % blocks) >> level;
                let node = model.view().node(level, index).unwrap();
                let mut below = model.view().below(level, index, level.min(4)).unwrap();
                for child_level in level - level.min(4)..level {
                    let pair = |p: &[Digest]| super::super::parent(child_level, &p[0], &p[1]);
                    below = below.chunks(2).map(pair).collect();
                }
                prop_assert_eq!(below, vec![node], "level {}", level);
            }
        }
    }
}
