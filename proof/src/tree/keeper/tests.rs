//! A keeper over files and a device in memory, with crashes at every step of a sweep.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::view::tests::from_leaves;
use super::*;

const VOLUME: VolumeId = VolumeId([1; 16]);
const BLOCKS: u64 = 700;

/// Files in memory; what was not sealed or replaced is gone after a crash.
#[derive(Clone, Debug, Default)]
struct Files {
    manifest: Option<Vec<u8>>,
    runs: BTreeMap<u64, Vec<u8>>,
    written: u64,
}

#[derive(Debug)]
struct Sink(u64, Vec<u8>);

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TreeMedium for Files {
    type Run = Vec<u8>;
    type Sink = Sink;

    fn manifest(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.manifest.clone())
    }

    fn replace_manifest(&mut self, bytes: Option<&[u8]>) -> io::Result<()> {
        self.manifest = bytes.map(<[u8]>::to_vec);
        self.written += bytes.map_or(0, |bytes| bytes.len() as u64);
        Ok(())
    }

    fn create(&mut self, id: u64) -> io::Result<Sink> {
        Ok(Sink(id, Vec::new()))
    }

    fn seal(&mut self, sink: Sink) -> io::Result<()> {
        self.written += sink.1.len() as u64;
        self.runs.insert(sink.0, sink.1);
        Ok(())
    }

    fn open(&self, id: u64) -> io::Result<Vec<u8>> {
        let run = self.runs.get(&id).cloned();
        run.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn remove(&mut self, id: u64) -> io::Result<()> {
        let removed = self.runs.remove(&id);
        removed
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn ids(&self) -> io::Result<Vec<u64>> {
        Ok(self.runs.keys().copied().collect())
    }
}

/// A device that is its blocks; those that are not there are holes.
#[derive(Clone, Debug, Default)]
struct Blocks(BTreeMap<u64, u8>);

fn block(value: u8) -> [u8; 4096] {
    let mut block = [0; 4096];
    block[17] = value;
    block
}

impl Device for Blocks {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        for (at, to) in (offset / 4096..).zip(buffer.chunks_mut(4096)) {
            to.copy_from_slice(&block(self.0.get(&at).copied().unwrap_or(0)));
        }
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> io::Result<u64> {
        let next = self.0.range(offset / 4096..).next();
        Ok(next.map_or(BLOCKS, |(at, _)| *at) * 4096)
    }

    fn next_hole(&mut self, offset: u64) -> io::Result<u64> {
        let hole = (offset / 4096..).find(|at| !self.0.contains_key(at));
        Ok(hole.unwrap_or(BLOCKS) * 4096)
    }
}

impl Blocks {
    fn root(&self) -> Digest {
        let leaves = self
            .0
            .iter()
            .map(|(at, value)| (*at, blocks::leaf(&block(*value))));
        let leaves = leaves.filter(|(_, leaf)| *leaf != zero_node(0)).collect();
        from_leaves(geometry(), &leaves)
    }
}

fn geometry() -> Geometry {
    Geometry::new(BLOCKS * 4096).unwrap()
}

fn open(files: Files, checkpoint: Epoch) -> (Keeper<Files>, Opened) {
    Keeper::open(files, (VOLUME, geometry()), checkpoint).unwrap()
}

fn build(keeper: &mut Keeper<Files>, device: &mut Blocks) {
    while keeper.to_build().is_some() {
        keeper
            .build_slice(device, 100, &mut BTreeSet::new())
            .unwrap();
    }
}

/// What a sweep does.
#[derive(Clone, Debug)]
struct Change {
    writes: BTreeMap<u64, u8>,
    zeros: Range<u64>,
}

impl Change {
    fn begin(&self, keeper: &mut Keeper<Files>, cut: Epoch) {
        let leaf = |value: u8| blocks::leaf(&block(value));
        let leaves = self.writes.iter().map(|(at, value)| (*at, leaf(*value)));
        let zeros = Some(self.zeros.clone()).filter(|range| !range.is_empty());
        keeper
            .begin_sweep(cut, &leaves.collect(), zeros.as_slice())
            .unwrap();
    }

    /// Writes so many of the blocks.
    fn write(&self, device: &mut Blocks, count: usize) {
        device.0.retain(|at, _| !self.zeros.contains(at));
        let some = self.writes.iter().take(count);
        device.0.extend(some.map(|(at, value)| (*at, *value)));
    }
}

fn change() -> impl Strategy<Value = Change> {
    let writes = prop::collection::btree_map(0..BLOCKS, 0_u8..4, 0..40);
    let zeros = (0..BLOCKS, 0..BLOCKS / 3).prop_map(|(at, count)| at..BLOCKS.min(at + count));
    (writes, zeros).prop_map(|(writes, zeros)| Change { writes, zeros })
}

fn damage(keeper: &Keeper<Files>, device: &mut Blocks) -> Vec<u64> {
    let (mut at, mut bad) = (0, Vec::new());
    while at < BLOCKS {
        let slice = keeper.verify_slice(device, (at, 64), &mut bad).unwrap();
        assert!(slice.next_block > at);
        at = slice.next_block;
    }
    bad.iter().map(|bad| bad.block).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn through_sweeps_crashes_and_a_first_build_the_root_is_that_of_the_device(
        old in prop::collection::btree_map(0..BLOCKS, 0_u8..4, 0..200),
        steps in prop::collection::vec((change(), 0_u8..6, 0_usize..40), 1..40),
    ) {
        let mut device = Blocks(old);
        let (mut keeper, found) = open(Files::default(), Epoch(3));
        prop_assert_eq!(found, Opened::New);
        let mut recorded = Epoch(3);
        let mut wanted = None;
        for (change, what, partly) in steps {
            if keeper.to_build().is_some() {
                keeper.build_slice(&mut device, 60, &mut BTreeSet::new()).unwrap();
            }
            let cut = Epoch(recorded.0 + 2);
            change.begin(&mut keeper, cut);
            match what {
                // The node dies in the sweep: the log has it all and sweeps it again.
                0 => {
                    change.write(&mut device, partly);
                    let (again, found) = open(keeper.into_medium(), recorded);
                    prop_assert_eq!(found, Opened::Whole);
                    keeper = again;
                    change.begin(&mut keeper, cut);
                    change.write(&mut device, usize::MAX);
                    keeper.finish_sweep(cut).unwrap();
                }
                // It dies when the superblock says that the sweep has ended.
                1 => {
                    change.write(&mut device, usize::MAX);
                    let (again, found) = open(keeper.into_medium(), cut);
                    prop_assert_eq!(found, Opened::Whole);
                    keeper = again;
                }
                _ => {
                    change.write(&mut device, usize::MAX);
                    keeper.finish_sweep(cut).unwrap();
                }
            }
            recorded = cut;
            prop_assert_eq!(keeper.checkpoint(), cut);
            // A root that was wanted some sweeps ago is that of then.
            for _ in 0..partly % 4 {
                if let Worked::Root(at, root) = keeper.work(300).unwrap() {
                    prop_assert_eq!(wanted.take(), Some((at, root)));
                }
            }
            if what > 3 && keeper.want_root().unwrap() {
                wanted = Some((cut, device.root()));
            }
            if what < 3 && let Some(root) = keeper.settle().unwrap() {
                prop_assert_eq!(root, device.root());
                prop_assert_eq!(damage(&keeper, &mut device), Vec::<u64>::new());
            }
        }
        build(&mut keeper, &mut device);
        prop_assert_eq!(keeper.settle().unwrap(), Some(device.root()));
        // Nothing is left behind: every file that is there is a part of the tree.
        let (mut keeper, found) = open(keeper.into_medium(), recorded);
        prop_assert_eq!(found, Opened::Whole);
        prop_assert_eq!(keeper.settle().unwrap(), Some(device.root()));
        prop_assert_eq!(damage(&keeper, &mut device), Vec::<u64>::new());
    }
}

#[test]
fn damage_is_named_wherever_it_is() {
    let mut device = Blocks(
        (0..BLOCKS)
            .filter(|at| at % 3 > 0)
            .map(|at| (at, 2))
            .collect(),
    );
    let (mut keeper, _) = open(Files::default(), Epoch(0));
    build(&mut keeper, &mut device);
    assert!(damage(&keeper, &mut device).is_empty());
    let bad: Vec<u64> = vec![0, 1, 3, 299, 500, BLOCKS - 1];
    for at in &bad {
        // Changed, written where a hole was, or lost.
        match at % 2 {
            0 => _ = device.0.insert(*at, 9),
            _ if device.0.contains_key(at) => _ = device.0.remove(at),
            _ => _ = device.0.insert(*at, 1),
        }
    }
    assert_eq!(damage(&keeper, &mut device), bad);
}

#[test]
fn a_tree_of_another_checkpoint_is_built_anew() {
    let mut device = Blocks((0..50).map(|at| (at, 2)).collect());
    let (mut keeper, _) = open(Files::default(), Epoch(7));
    build(&mut keeper, &mut device);
    for checkpoint in [6, 8] {
        let files = keeper.medium.clone();
        let (anew, found) = open(files, Epoch(checkpoint));
        assert!(matches!(found, Opened::Anew(_)), "{found:?}");
        assert_eq!(anew.to_build(), Some(0));
        assert!(anew.medium.runs.is_empty(), "its files are gone");
    }
    let mut files = keeper.into_medium();
    Keeper::discard(&mut files).unwrap();
    assert_eq!(open(files, Epoch(7)).1, Opened::New);
}

#[test]
fn a_damaged_or_missing_run_makes_the_tree_anew() {
    let mut device = Blocks((0..300).map(|at| (at, 2)).collect());
    let (mut keeper, _) = open(Files::default(), Epoch(7));
    build(&mut keeper, &mut device);
    let files = keeper.into_medium();
    let first = *files.runs.keys().next().unwrap();
    let mut torn = files.clone();
    torn.runs.get_mut(&first).unwrap().pop();
    let mut lost = files.clone();
    lost.runs.remove(&first);
    for files in [torn, lost] {
        let (mut keeper, found) = open(files, Epoch(7));
        assert!(matches!(found, Opened::Anew(_)), "{found:?}");
        build(&mut keeper, &mut device);
        assert_eq!(keeper.settle().unwrap(), Some(device.root()));
    }
}

/// A device of which some blocks cannot be read.
struct Worn<'a>(&'a mut Blocks, Vec<u64>);

impl Device for Worn<'_> {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let blocks = offset / 4096..(offset + buffer.len() as u64).div_ceil(4096);
        match self.1.iter().any(|block| blocks.contains(block)) {
            true => Err(io::Error::other("unreadable")),
            false => self.0.read(offset, buffer),
        }
    }

    fn next_data(&mut self, offset: u64) -> io::Result<u64> {
        self.0.next_data(offset)
    }

    fn next_hole(&mut self, offset: u64) -> io::Result<u64> {
        self.0.next_hole(offset)
    }
}

#[test]
fn a_first_build_goes_on_over_what_cannot_be_read_or_is_known_to_be_damaged() {
    let mut device = Blocks((0..BLOCKS).map(|block| (block, 1)).collect());
    let (mut keeper, _) = open(Files::default(), Epoch(3));
    let mut bad = BTreeSet::from([17]);
    let mut worn = Worn(&mut device, vec![5, 300]);
    while keeper.to_build().is_some() {
        keeper.build_slice(&mut worn, 64, &mut bad).unwrap();
    }
    assert_eq!(bad, BTreeSet::from([5, 17, 300]));
    let leaves = keeper.leaves(0..BLOCKS).unwrap();
    let damaged = (0..).zip(&leaves).filter(|(_, leaf)| **leaf == DAMAGED);
    assert!(damaged.map(|(block, _)| block).eq(bad.iter().copied()));
    // A verify that can read them does not take them for good.
    let mut found = Vec::new();
    let all = (0, BLOCKS);
    keeper.verify_slice(&mut device, all, &mut found).unwrap();
    assert!(found.iter().map(|it| it.block).eq(bad));
}

/// A TiB of holes with some blocks of data.
struct Sparse(BTreeSet<u64>);

const TIB_BLOCKS: u64 = 1 << 28;

impl Device for Sparse {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        for (at, to) in (offset / 4096..).zip(buffer.chunks_mut(4096)) {
            to.copy_from_slice(&block(u8::from(self.0.contains(&at))));
        }
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> io::Result<u64> {
        let next = self.0.range(offset / 4096..).next();
        Ok(next.copied().unwrap_or(TIB_BLOCKS) * 4096)
    }

    fn next_hole(&mut self, offset: u64) -> io::Result<u64> {
        let hole = (offset / 4096..).find(|at| !self.0.contains(at));
        Ok(hole.unwrap_or(TIB_BLOCKS) * 4096)
    }
}

/// Reading costs time at the rate that is allowed, and each portion some flushes.
#[test]
fn a_first_build_reads_no_holes_and_does_not_stop_in_them() {
    let blocks: BTreeSet<u64> = (0..1000)
        .map(|at| at * (TIB_BLOCKS / 1000) + at % 7)
        .collect();
    let mut device = Sparse(blocks.clone());
    let geometry = Geometry::new(TIB_BLOCKS * 4096).unwrap();
    let (mut keeper, _) = Keeper::open(Files::default(), (VOLUME, geometry), Epoch(3)).unwrap();
    let mut read = 0;
    while keeper.to_build().is_some() {
        let slice = keeper.build_slice(&mut device, 256, &mut BTreeSet::new());
        read += slice.unwrap().read_bytes;
    }
    assert_eq!(read, 1000 * 4096);
    assert_eq!(keeper.manifest.runs(0).count(), 1, "portions");
    let leaf = blocks::leaf(&block(1));
    let leaves = blocks.into_iter().map(|at| (at, leaf)).collect();
    assert_eq!(
        keeper.settle().unwrap(),
        Some(from_leaves(geometry, &leaves))
    );
}
