//! A daemon's disk in memory: sweeps, merges, crashes and the first build, against plain maps.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::merge::merge_slice;
use super::super::run::{Run, RunWriter, tests::leaf};
use super::super::view::{Nodes, Tops, View, refresh_middles, tests::from_leaves};
use super::*;

const VOLUME: VolumeId = VolumeId([1; 16]);

/// Manifest and run files, and how many bytes were written to them.
struct Disk {
    manifest: Manifest,
    files: BTreeMap<u64, Vec<u8>>,
    tops: Tops,
    written: u64,
}

impl Disk {
    fn new(blocks: u64, has_content: bool) -> Self {
        let geometry = Geometry::new(blocks * 4096).unwrap();
        let manifest = Manifest::new(VOLUME, geometry, Epoch(0), has_content);
        Self {
            manifest,
            files: BTreeMap::new(),
            tops: Tops::default(),
            written: 0,
        }
    }

    fn write(&mut self, meta: RunMeta, entries: &BTreeMap<u64, Digest>) -> RunSummary {
        let mut writer = RunWriter::new(meta, Vec::new());
        entries
            .iter()
            .for_each(|(at, node)| writer.push(*at, node).unwrap());
        self.store(writer)
    }

    fn store(&mut self, writer: RunWriter<Vec<u8>>) -> RunSummary {
        let (summary, bytes) = writer.finish().unwrap();
        self.written += bytes.len() as u64;
        self.files.insert(summary.meta.id, bytes);
        summary
    }

    fn save(&mut self) {
        let bytes = self.manifest.encode();
        assert_eq!(Manifest::decode(&bytes).unwrap(), self.manifest);
        self.written += bytes.len() as u64;
    }

    fn open(&self, level: u8) -> Vec<Run<Vec<u8>>> {
        let ids = self.manifest.runs(level).map(|member| member.run.meta.id);
        ids.map(|id| Run::open(self.files[&id].clone()).unwrap())
            .collect()
    }

    fn summarise(&mut self) {
        let leaves = self.open(0);
        let ids: Vec<u64> = self
            .manifest
            .unsummarised()
            .map(|member| member.run.meta.id)
            .collect();
        if ids.is_empty() {
            return;
        }
        let new = leaves.iter();
        let new = new.filter(|run| ids.contains(&run.summary().meta.id));
        let new: Vec<_> = new.cloned().collect();
        let geometry = self.manifest.geometry;
        let mut writer = RunWriter::new(self.manifest.middle_meta(), Vec::new());
        let mut touched = Vec::new();
        let mut next = Some(0);
        while let Some(from) = next {
            let emit = |index, node: Digest| {
                touched.push(index);
                writer.push(index, &node)
            };
            next = refresh_middles(geometry, (&leaves, &new), (from, 5000), emit).unwrap();
        }
        let run = self.store(writer);
        self.manifest.middles_done(run, &ids).unwrap();
        let middles = self.open(MIDDLE_LEVEL);
        let touched = touched.into_iter();
        self.tops.refresh(geometry, &middles, touched).unwrap();
    }

    fn merge_all(&mut self) {
        while let Some(plan) = self.manifest.plan_merge() {
            let input = |id: &u64| Run::open(self.files[id].clone()).unwrap();
            let inputs: Vec<_> = plan.inputs.iter().map(input).collect();
            let mut writer = RunWriter::new(plan.meta, Vec::new());
            let all = (0, usize::MAX);
            let next = merge_slice(&inputs, all, plan.is_oldest, &mut writer).unwrap();
            assert_eq!(next, None);
            let run = self.store(writer);
            self.manifest.merge_done(&plan, run).unwrap();
            plan.inputs.iter().for_each(|id| _ = self.files.remove(id));
            self.save();
        }
    }

    fn sweep(&mut self, cut: u64, entries: &BTreeMap<u64, Digest>) {
        let meta = self.manifest.sweep_meta(Epoch(cut));
        let run = self.write(meta, entries);
        self.manifest.begin_sweep(run).unwrap();
        self.save();
        self.manifest.finish_sweep(Epoch(cut)).unwrap();
        self.save();
        self.summarise();
    }

    fn root(&self) -> Digest {
        let (leaves, middles) = (self.open(0), self.open(MIDDLE_LEVEL));
        let geometry = self.manifest.geometry;
        View {
            geometry,
            leaves: &leaves,
            middles: &middles,
            tops: &self.tops,
        }
        .root()
        .unwrap()
    }
}

fn random_blocks(seed: &mut u64, blocks: u64, count: usize) -> BTreeMap<u64, Digest> {
    let mut next = || {
        *seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        *seed >> 20
    };
    (0..count)
        .map(|_| (next() % blocks, leaf(next())))
        .collect()
}

#[test]
fn under_random_writes_the_tree_adds_at_most_a_tenth_to_the_sweep() {
    // Wide, sparse, and small: in the last, sweeps of 64 blocks are close to the fixed costs.
    for (blocks, per_sweep, sweeps) in [
        (1_u64 << 20, 1000, 80),
        (1 << 28, 500, 80),
        (65_536, 64, 150),
    ] {
        let mut disk = Disk::new(blocks, false);
        let (mut seed, mut swept) = (blocks, 0_u64);
        for cut in 1..=sweeps {
            let entries = random_blocks(&mut seed, blocks, per_sweep);
            swept += entries.len() as u64 * 4096;
            disk.sweep(cut, &entries);
            disk.merge_all();
        }
        let percent = disk.written as f64 * 100.0 / swept as f64;
        println!("{blocks} blocks, {per_sweep} a sweep, {sweeps} sweeps: {percent:.1} % extra");
        assert!(percent <= 10.0, "{percent:.1} % for {blocks} blocks");
        assert!(
            disk.manifest.members.len() < 60,
            "{} runs",
            disk.manifest.members.len()
        );
    }
}

#[test]
fn a_crash_at_any_step_of_a_sweep_leaves_tree_and_backing_reconciled() {
    let first = random_blocks(&mut 1, 1000, 50);
    let second = random_blocks(&mut 2, 1000, 50);
    let mut both = first.clone();
    both.extend(second.clone());
    for has_finished in [false, true] {
        let mut disk = Disk::new(1000, false);
        disk.sweep(5, &first);
        let meta = disk.manifest.sweep_meta(Epoch(9));
        let run = disk.write(meta, &second);
        disk.manifest.begin_sweep(run).unwrap();
        // The crash comes here; the superblock says whether the sweep had finished.
        let mut manifest = Manifest::decode(&disk.manifest.encode()).unwrap();
        let recorded = Epoch(if has_finished { 9 } else { 5 });
        let expected = if has_finished {
            Recovery::Adopted(run)
        } else {
            Recovery::Dropped(run)
        };
        assert_eq!(manifest.recover(recorded), Ok(expected));
        disk.manifest = manifest;
        disk.summarise();
        let state = if has_finished { &both } else { &first };
        assert_eq!(disk.root(), from_leaves(disk.manifest.geometry, state));
        // The log goes on from there and the tree with it.
        disk.sweep(12, &second);
        assert_eq!(disk.root(), from_leaves(disk.manifest.geometry, &both));
        assert_eq!(disk.manifest.recover(Epoch(12)), Ok(Recovery::Clean));
    }
}

#[test]
fn a_tree_without_middle_nodes_is_merged_too() {
    let mut disk = Disk::new(100, false);
    let mut state = BTreeMap::new();
    for cut in 1..=70 {
        let entries = random_blocks(&mut (cut * 31), 100, 5);
        disk.sweep(cut, &entries);
        state.extend(entries);
        disk.merge_all();
    }
    assert_eq!(disk.root(), from_leaves(disk.manifest.geometry, &state));
    assert!(
        disk.manifest.members.len() < 20,
        "{} runs",
        disk.manifest.members.len()
    );
}

#[test]
fn a_tree_that_does_not_fit_the_log_is_refused() {
    let mut disk = Disk::new(1000, false);
    disk.sweep(5, &random_blocks(&mut 1, 1000, 5));
    let ahead = ManifestError::Ahead {
        tree: Epoch(5),
        log: Epoch(4),
    };
    assert_eq!(disk.manifest.recover(Epoch(4)), Err(ahead));
    assert!(disk.manifest.recover(Epoch(6)).is_err());
    assert!(disk.manifest.finish_sweep(Epoch(6)).is_err());
    let mut foreign = disk.manifest.runs(0).next().unwrap().run;
    foreign.meta.volume = VolumeId([9; 16]);
    assert_eq!(
        disk.manifest.begin_sweep(foreign),
        Err(ManifestError::Foreign(foreign.meta.id))
    );
}

#[test]
fn a_first_build_resumes_and_sweeps_during_it_win() {
    let blocks = 1000_u64;
    let old: BTreeMap<u64, Digest> = (0..blocks).map(|at| (at, leaf(at))).collect();
    let mut disk = Disk::new(blocks, true);
    let mut state = old.clone();
    for (portion, cut) in (0..blocks).step_by(250).zip(1..) {
        let meta = disk.manifest.portion_meta().unwrap();
        // A sweep finishes while the portion is being read; the portion still saw the old blocks.
        let seen = state
            .range(portion..portion + 250)
            .map(|(at, leaf)| (*at, *leaf))
            .collect();
        let swept = random_blocks(&mut (cut * 77), blocks, 40);
        disk.sweep(cut, &swept);
        state.extend(swept);
        let run = disk.write(meta, &seen);
        disk.manifest.portion_done(run, portion + 250).unwrap();
        disk.manifest = Manifest::decode(&disk.manifest.encode()).unwrap();
        let next = disk.manifest.first_build().map(|build| build.next_block);
        assert_eq!(next, (portion + 250 < blocks).then_some(portion + 250));
        disk.summarise();
        disk.merge_all();
    }
    assert_eq!(disk.root(), from_leaves(disk.manifest.geometry, &state));
    assert!(disk.manifest.portion_meta().is_none());
}

#[test]
fn a_flipped_bit_in_a_manifest_is_refused() {
    let mut disk = Disk::new(1000, true);
    disk.sweep(5, &random_blocks(&mut 1, 1000, 5));
    let good = disk.manifest.encode();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(
            Manifest::decode(&bad),
            Err(ManifestError::Checksum),
            "bit {bit}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn merges_never_change_the_root(seed in any::<u64>(), sweeps in 1_u64..70) {
        let (mut seed, blocks) = (seed, 70_000);
        let mut disk = Disk::new(blocks, false);
        let mut state = BTreeMap::new();
        for cut in 1..=sweeps {
            let mut entries = random_blocks(&mut seed, blocks, 20);
            for (at, leaf) in state.iter().take(3) {
                let _: &Digest = leaf;
                entries.insert(*at, super::super::zero_node(0));
            }
            disk.sweep(cut, &entries);
            state.extend(entries);
            state.retain(|_, leaf| *leaf != super::super::zero_node(0));
            disk.merge_all();
        }
        prop_assert_eq!(disk.root(), from_leaves(disk.manifest.geometry, &state));
        let middles = disk.open(MIDDLE_LEVEL);
        prop_assert_eq!(&Tops::load(disk.manifest.geometry, &middles).unwrap(), &disk.tops);
    }
}
