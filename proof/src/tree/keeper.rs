//! The owner of a tree: it takes what sweeps write, keeps runs and manifest in step with the
//! backing, hashes a device that has no tree yet, and answers for the root.
//!
//! What it stands on is a [`TreeMedium`] for its own files and a [`Device`] to read the volume's
//! backing. Callers see to one rule, which makes everything else simple:
//!
//! **Invariant: the backing is read only while no sweep is under way.** Then a block that is read
//! is the block at the tree's checkpoint, and what differs from its leaf is damage, never a write
//! that is on its way. Whether a sweep that a crash has torn is still to be written again is known
//! to the caller (the log's superblock says how far a sweep may have begun), not here.
//!
//! A sweep waits for nothing but its own leaves. The nodes above them and the merging of runs are
//! left to [`Keeper::work`], which does a little at a time, between sweeps.
//!
//! Memory: the leaves of one sweep, those of one portion of the first build (640 KiB), the indexes
//! of the runs and the top nodes. Not here: threads, rates, files.

mod medium;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;

use hn4::types::{BLOCK_BYTES, Epoch, VolumeId};

pub use self::medium::{Device, TreeMedium};
pub use self::work::Worked;
use self::work::{Merging, Summing};
use super::manifest::{Manifest, Member, Recovery};
use super::merge::Merge;
use super::run::{Run, RunSummary, RunWriter};
use super::view::{Snapshot, Tops};
use super::{DAMAGED, Geometry, MIDDLE_LEVEL, TreeError, zero_node};
use crate::blocks;
use crate::hash::Digest;

/// Leaves of a portion of the first build: 64 MiB of the volume.
const PORTION_LEAVES: usize = 16 * 1024;
/// Blocks of a portion that are read, zeroes included: what comes again after a crash.
const PORTION_BLOCKS: u64 = 1 << 20;

/// How far a slice of work on the device has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slice {
    /// The block that comes next; the number of blocks when all is done.
    pub next_block: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
}

/// A block that is not what the tree says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadBlock {
    /// Which.
    pub block: u64,
    /// Its leaf in the tree.
    pub expected: Digest,
    /// Leaf of what the device gave; `None` if it could not be read.
    pub found: Option<Digest>,
}

/// What opening has found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Opened {
    /// The tree describes the backing.
    Whole,
    /// There was none: the device is to be hashed.
    New,
    /// The one that was there does not belong to the backing, for this reason: the device is to be
    /// hashed.
    Anew(String),
}

/// See the module.
#[derive(Debug)]
pub struct Keeper<M: TreeMedium> {
    medium: M,
    volume: VolumeId,
    geometry: Geometry,
    manifest: Manifest,
    /// Newest first, as in the manifest.
    leaves: Vec<Run<M::Run>>,
    middles: Vec<Run<M::Run>>,
    tops: Tops,
    /// The portion of the first build that is being gathered, the block after it, and how many
    /// blocks were read for it.
    portion: BTreeMap<u64, Digest>,
    portion_next: u64,
    portion_read: u64,
    summing: Option<Summing<M>>,
    merging: Option<Merging<M>>,
    /// A root that was wanted, and its checkpoint.
    rooted: Option<(Epoch, Digest)>,
    /// The tree at the last root, if it was to be kept.
    snapshot: Option<Snapshot<M::Run>>,
    /// There may be work.
    is_due: bool,
}

impl<M: TreeMedium> Keeper<M> {
    /// Opens the tree of a volume whose log has recorded `checkpoint`, or begins a new one that is
    /// to be hashed from the device.
    ///
    /// # Errors
    /// [`TreeError::Io`] if the medium fails.
    pub fn open(
        medium: M,
        (volume, geometry): (VolumeId, Geometry),
        checkpoint: Epoch,
    ) -> Result<(Self, Opened), TreeError> {
        let manifest = Manifest::new(volume, geometry, checkpoint, true);
        let mut keeper = Self {
            medium,
            volume,
            geometry,
            manifest,
            leaves: Vec::new(),
            middles: Vec::new(),
            tops: Tops::default(),
            portion: BTreeMap::new(),
            portion_next: 0,
            portion_read: 0,
            summing: None,
            merging: None,
            rooted: None,
            snapshot: None,
            is_due: true,
        };
        let found = match keeper.medium.manifest()? {
            None => Opened::New,
            Some(bytes) => match keeper.adopt(&bytes, checkpoint) {
                Ok(()) => Opened::Whole,
                Err(why) => Opened::Anew(why),
            },
        };
        if found == Opened::Whole {
            keeper.remove_orphans()?;
        } else {
            keeper.begin_anew(checkpoint)?;
        }
        Ok((keeper, found))
    }

    /// Takes what lies on the medium, if it fits the log.
    fn adopt(&mut self, bytes: &[u8], checkpoint: Epoch) -> Result<(), String> {
        let mut manifest = Manifest::decode(bytes).map_err(|error| error.to_string())?;
        if (manifest.volume(), manifest.geometry()) != (self.volume, self.geometry) {
            return Err("its files are of another volume".to_owned());
        }
        let recovery = manifest.recover(checkpoint);
        let recovery = recovery.map_err(|error| error.to_string())?;
        self.portion_next = manifest.first_build().map_or(0, |build| build.next_block);
        self.manifest = manifest;
        self.load().map_err(|error| error.to_string())?;
        if recovery != Recovery::Clean {
            // A pending run that was dropped must not come back with a later checkpoint.
            self.save().map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn load(&mut self) -> Result<(), TreeError> {
        self.open_runs()?;
        self.tops = Tops::load(self.geometry, &self.middles)?;
        Ok(())
    }

    /// Forgets everything; the device is to be hashed from its first block, as it is at
    /// `checkpoint`.
    ///
    /// # Errors
    /// [`TreeError::Io`].
    pub fn begin_anew(&mut self, checkpoint: Epoch) -> Result<(), TreeError> {
        (self.summing, self.merging, self.rooted) = (None, None, None);
        self.snapshot = None;
        self.leaves.clear();
        self.middles.clear();
        self.tops = Tops::default();
        self.portion.clear();
        (self.portion_next, self.portion_read) = (0, 0);
        self.manifest = Manifest::new(self.volume, self.geometry, checkpoint, true);
        self.save()?;
        self.remove_orphans()
    }

    /// Forgets everything and leaves nothing that a later opening could take for a tree: the
    /// backing is about to be written by other means than sweeps.
    ///
    /// # Errors
    /// [`TreeError::Io`].
    pub fn discard(medium: &mut M) -> Result<(), TreeError> {
        medium.replace_manifest(None)?;
        for id in medium.ids()? {
            medium.remove(id)?;
        }
        Ok(())
    }

    /// Gives the medium back.
    #[must_use]
    pub fn into_medium(self) -> M {
        self.medium
    }

    /// Checkpoint that the tree describes.
    #[must_use]
    pub fn checkpoint(&self) -> Epoch {
        self.manifest.checkpoint()
    }

    /// Size and shape.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The next block that the first build is to hash; `None` when it is done.
    #[must_use]
    pub fn to_build(&self) -> Option<u64> {
        self.manifest.first_build().map(|_| self.portion_next)
    }

    /// Whether a sweep was begun and has not ended.
    #[must_use]
    pub fn is_sweeping(&self) -> bool {
        self.manifest.is_sweeping()
    }

    /// Bytes of all runs, about.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.manifest.runs(0).map(|member| member.run.entries).sum()
    }

    /// Makes durable what the backing will be at `cut`: `leaves`, and zeroes in the other blocks
    /// of `zeros`, which ascend. When it returns the sweep may begin.
    ///
    /// Zeroes cost what the tree holds of the blocks in them, whatever their length.
    ///
    /// # Errors
    /// [`TreeError`] of a run or the medium, or if the step does not fit.
    pub fn begin_sweep(
        &mut self,
        cut: Epoch,
        leaves: &BTreeMap<u64, Digest>,
        zeros: &[Range<u64>],
    ) -> Result<(), TreeError> {
        let is_zeroed = |block: u64| {
            let after = zeros.partition_point(|range| range.start <= block);
            after > 0 && zeros[after - 1].end > block
        };
        // What the sweep writes was hashed too early, if it was hashed.
        self.portion
            .retain(|block, _| !leaves.contains_key(block) && !is_zeroed(*block));
        self.catch_up()?;
        let meta = self.manifest.sweep_meta(cut);
        let mut writer = RunWriter::new(meta, self.medium.create(meta.id)?);
        let mut written = leaves.iter().peekable();
        for range in zeros {
            let known = Merge::new(&self.leaves, range.start);
            for entry in known {
                let (block, node) = entry?;
                if block >= range.end {
                    break;
                }
                while let Some((at, leaf)) = written.next_if(|(at, _)| **at < block) {
                    writer.push(*at, leaf)?;
                }
                let is_written = written.peek().is_some_and(|(at, _)| **at == block);
                if !is_written && node != zero_node(0) {
                    writer.push(block, &zero_node(0))?;
                }
            }
        }
        for (at, leaf) in written {
            writer.push(*at, leaf)?;
        }
        let run = self.finish(writer)?;
        self.manifest.begin_sweep(run).map_err(step)?;
        self.save()
    }

    /// The log's superblock says `cut`. Nothing is written: were the node to stop here, opening
    /// would find the same.
    ///
    /// # Errors
    /// [`TreeError`] if no such sweep was begun, or its run cannot be read.
    pub fn finish_sweep(&mut self, cut: Epoch) -> Result<(), TreeError> {
        self.manifest.finish_sweep(cut).map_err(step)?;
        self.is_due = true;
        self.open_runs()
    }

    /// Leaves of the blocks of `range`, in order, zeroes included.
    ///
    /// # Errors
    /// [`TreeError`] of a run.
    pub fn leaves(&self, range: Range<u64>) -> Result<Vec<Digest>, TreeError> {
        let count = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(0);
        let mut leaves = vec![zero_node(0); count];
        for entry in Merge::new(&self.leaves, range.start) {
            let (block, leaf) = entry?;
            if block >= range.end {
                break;
            }
            leaves[usize::try_from(block - range.start).unwrap_or(0)] = leaf;
        }
        Ok(leaves)
    }

    /// Hashes up to `blocks` more blocks of the device for the first build. Holes cost nothing.
    /// Blocks in `bad` get the leaf [`DAMAGED`] whatever is there, and so do those that cannot be
    /// read; they are added to it.
    ///
    /// # Errors
    /// [`TreeError`].
    pub fn build_slice(
        &mut self,
        device: &mut impl Device,
        blocks: u64,
        bad: &mut BTreeSet<u64>,
    ) -> Result<Slice, TreeError> {
        let end = self.geometry.blocks();
        let data = device.next_data(self.portion_next * BLOCK_BYTES)? / BLOCK_BYTES;
        let from = data.clamp(self.portion_next, end);
        let mut count = blocks.min(end - from);
        if count > 0 {
            // A block is not read for less, whatever the device says.
            let hole = device.next_hole(from * BLOCK_BYTES)?.div_ceil(BLOCK_BYTES);
            count = count.min(hole.saturating_sub(from).max(1));
        }
        let known = bad.range(self.portion_next..from).copied();
        self.portion.extend(known.map(|block| (block, DAMAGED)));
        for (block, leaf) in (from..).zip(read_leaves(device, from, count)) {
            if leaf.is_none() {
                bad.insert(block);
            }
            let leaf = leaf.filter(|_| !bad.contains(&block)).unwrap_or(DAMAGED);
            if leaf != zero_node(0) {
                self.portion.insert(block, leaf);
            }
        }
        self.portion_next = from + count;
        self.portion_read += count;
        let far = self.portion_read >= PORTION_BLOCKS;
        if self.portion.len() >= PORTION_LEAVES || far || self.portion_next == end {
            self.finish_portion()?;
        }
        Ok(Slice {
            next_block: self.portion_next,
            read_bytes: count * BLOCK_BYTES,
        })
    }

    fn finish_portion(&mut self) -> Result<(), TreeError> {
        let Some(meta) = self.manifest.portion_meta() else {
            return Ok(());
        };
        let mut writer = RunWriter::new(meta, self.medium.create(meta.id)?);
        self.portion_read = 0;
        for (block, leaf) in std::mem::take(&mut self.portion) {
            writer.push(block, &leaf)?;
        }
        let run = self.finish(writer)?;
        let done = self.manifest.portion_done(run, self.portion_next);
        done.map_err(step)?;
        self.is_due = true;
        self.open_runs()?;
        self.save()
    }

    /// Reads up to `blocks` blocks from `from` on and compares them with the tree; what differs or
    /// cannot be read goes into `bad`. Only for a tree whose first build is done.
    ///
    /// # Errors
    /// [`TreeError`] of a run; an error of the device makes blocks bad.
    pub fn verify_slice(
        &self,
        device: &mut impl Device,
        (from, blocks): (u64, u64),
        bad: &mut Vec<BadBlock>,
    ) -> Result<Slice, TreeError> {
        let end = self.geometry.blocks();
        let data = device.next_data(from * BLOCK_BYTES)? / BLOCK_BYTES;
        let data = data.clamp(from, end);
        // In a hole there must be nothing but zeroes.
        for entry in Merge::new(&self.leaves, from) {
            let (block, expected) = entry?;
            if block >= data {
                break;
            }
            if expected != zero_node(0) {
                let found = Some(zero_node(0));
                bad.push(BadBlock {
                    block,
                    expected,
                    found,
                });
            }
        }
        let count = blocks.min(end - data);
        let expected = self.leaves(data..data + count)?;
        let found = read_leaves(device, data, count);
        for ((block, expected), found) in (data..).zip(expected).zip(found) {
            if found != Some(expected) {
                bad.push(BadBlock {
                    block,
                    expected,
                    found,
                });
            }
        }
        Ok(Slice {
            next_block: data + count,
            read_bytes: count * BLOCK_BYTES,
        })
    }

    fn finish(&mut self, writer: RunWriter<M::Sink>) -> Result<RunSummary, TreeError> {
        let (summary, sink) = writer.finish()?;
        self.medium.seal(sink)?;
        Ok(summary)
    }

    fn save(&mut self) -> Result<(), TreeError> {
        let bytes = self.manifest.encode();
        Ok(self.medium.replace_manifest(Some(&bytes))?)
    }

    fn remove_orphans(&mut self) -> Result<(), TreeError> {
        for id in self.medium.ids()? {
            if !self.manifest.names(id) {
                self.medium.remove(id)?;
            }
        }
        Ok(())
    }

    /// Opens what the manifest names and is not open yet.
    fn open_runs(&mut self) -> Result<(), TreeError> {
        for level in [0, MIDDLE_LEVEL] {
            let runs = match level {
                0 => &mut self.leaves,
                _ => &mut self.middles,
            };
            let mut open: BTreeMap<u64, Run<M::Run>> = runs
                .drain(..)
                .map(|run| (run.summary().meta.id, run))
                .collect();
            for Member { run, .. } in self.manifest.runs(level) {
                let id = run.meta.id;
                let opened = match open.remove(&id) {
                    Some(opened) => opened,
                    None => Run::open(self.medium.open(id)?)?,
                };
                if opened.summary() != run {
                    let what = "what the manifest names";
                    return Err(TreeError::Damaged { run: id, what });
                }
                runs.push(opened);
            }
        }
        Ok(())
    }
}

/// A step that does not fit the manifest is a fault of whoever drives it; the tree is made anew.
fn step(error: super::manifest::ManifestError) -> TreeError {
    TreeError::Io(io::Error::other(error))
}

fn read_blocks(device: &mut impl Device, from: u64, count: u64) -> Result<Vec<u8>, TreeError> {
    let length = usize::try_from(count * BLOCK_BYTES).map_err(|_| TreeError::Size(count))?;
    let mut bytes = vec![0; length];
    if count > 0 {
        device.read(from * BLOCK_BYTES, &mut bytes)?;
    }
    Ok(bytes)
}

/// Leaves of what the device gives, block by block where it does not give all at once.
fn read_leaves(device: &mut impl Device, from: u64, count: u64) -> Vec<Option<Digest>> {
    let mut leaves = Vec::new();
    if let Ok(bytes) = read_blocks(device, from, count) {
        blocks::leaves_of(&bytes, |leaf| leaves.push(Some(leaf)));
        return leaves;
    }
    for block in from..from + count {
        let bytes = read_blocks(device, block, 1).ok();
        leaves.push(bytes.map(|bytes| blocks::padded_leaf(&bytes)));
    }
    leaves
}

#[cfg(test)]
mod tests;
