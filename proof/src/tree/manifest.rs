//! Which runs are the tree: one small record that its owner replaces atomically.
//!
//! A sweep to checkpoint C goes like this, and each step is durable before the next:
//!
//! 1. The run of the leaves as they will be at C is written: they are known from the payload.
//! 2. The manifest names it as *pending*.
//! 3. The backing is swept and flushed; the log's superblock records C.
//! 4. The manifest takes the run in, and the log may be freed.
//!
//! After a crash the superblock decides. If it says C, the pending run is taken in; else the
//! backing is between two checkpoints, the log sweeps it again, and the pending run is dropped for
//! the one that the new sweep writes. Blocks that a run names are swept again in either case, so
//! the leaves that are left always describe a backing that the log has finished.
//!
//! Runs are kept newest first and merged eight at a time, so that a leaf is written about once for
//! each factor of eight between a sweep and the whole.

use hn4::types::{Epoch, VolumeId};

use super::run::{RunMeta, RunSummary};
use super::{Geometry, MIDDLE_LEVEL};
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, DIGEST_BYTES, Digest};

/// Runs that are merged at once.
pub const FANOUT: usize = 8;
/// Most runs in a manifest.
pub const MAX_RUNS: usize = 4096;

const MAGIC: &[u8; 8] = b"HN4TMAN1";
const VERSION: u8 = 1;
const MAX_TIER: u8 = 15;

/// A run of the tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    /// The run.
    pub run: RunSummary,
    /// How often its entries have been merged.
    pub tier: u8,
    /// Whether the middle nodes above its leaves are in a run of middle nodes.
    pub is_summarised: bool,
}

/// The first hashing of a device that had content before it had a tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FirstBuild {
    /// First block that is not hashed yet.
    pub next_block: u64,
    /// Checkpoint at which the portion that is being hashed was begun.
    pub portion_from: Epoch,
}

/// Runs to merge into one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergePlan {
    /// What the merged run holds.
    pub meta: RunMeta,
    /// Ids of the runs to merge, newest first.
    pub inputs: Vec<u64>,
    /// Nothing lies below: zero nodes are dropped.
    pub is_oldest: bool,
    tier: u8,
}

/// What recovery did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recovery {
    /// No sweep was under way.
    Clean,
    /// The sweep had finished: its run belongs to the tree.
    Adopted(RunSummary),
    /// The sweep had not finished: the log redoes it, and this run's file can be deleted.
    Dropped(RunSummary),
}

/// A step that the manifest does not allow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ManifestError {
    /// Bytes that are no manifest.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The checksum does not match.
    #[error("the state tree's manifest is damaged; hash the device again")]
    Checksum,
    /// A run of another volume, size or level.
    #[error("run {0} does not belong to this tree")]
    Foreign(u64),
    /// A sweep begins while another is pending, or ends without having begun.
    #[error("a sweep to epoch {0} does not fit the tree, which is at epoch {1}")]
    Sweep(Epoch, Epoch),
    /// The tree is ahead of the log's superblock.
    #[error(
        "the tree is at epoch {tree}, the log's checkpoint at {log}: not the same volume's files"
    )]
    Ahead {
        /// Checkpoint of the tree.
        tree: Epoch,
        /// Checkpoint of the log.
        log: Epoch,
    },
    /// Too many runs: merging does not keep up.
    #[error("the state tree has {MAX_RUNS} runs; wait for merges")]
    Full,
}

/// The runs of a tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    volume: VolumeId,
    geometry: Geometry,
    checkpoint: Epoch,
    next_id: u64,
    pending: Option<RunSummary>,
    build: Option<FirstBuild>,
    // Newest first within each level: by last epoch, then by id.
    members: Vec<Member>,
}

impl Manifest {
    /// A tree of zeroes at `checkpoint`. With `has_content` the device is to be hashed first.
    #[must_use]
    pub fn new(volume: VolumeId, geometry: Geometry, checkpoint: Epoch, has_content: bool) -> Self {
        let build = has_content.then_some(FirstBuild {
            next_block: 0,
            portion_from: checkpoint,
        });
        Self {
            volume,
            geometry,
            checkpoint,
            next_id: 1,
            pending: None,
            build,
            members: Vec::new(),
        }
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Size and shape of the volume.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether a sweep was begun and has not ended.
    #[must_use]
    pub fn is_sweeping(&self) -> bool {
        self.pending.is_some()
    }

    /// Whether a run of this id is a part of the tree, or pending.
    #[must_use]
    pub fn names(&self, id: u64) -> bool {
        let members = self.members.iter().map(|member| &member.run);
        members.chain(&self.pending).any(|run| run.meta.id == id)
    }

    /// Checkpoint that the tree describes.
    #[must_use]
    pub fn checkpoint(&self) -> Epoch {
        self.checkpoint
    }

    /// Progress of the first build; `None` when it is done. Until then the tree has no root.
    #[must_use]
    pub fn first_build(&self) -> Option<FirstBuild> {
        self.build
    }

    /// Runs of `level`, newest first.
    pub fn runs(&self, level: u8) -> impl Iterator<Item = &Member> {
        self.members
            .iter()
            .filter(move |member| member.run.meta.level == level)
    }

    /// Runs of leaves above which middle nodes are still to be computed.
    pub fn unsummarised(&self) -> impl Iterator<Item = &Member> {
        self.runs(0).filter(|member| !member.is_summarised)
    }

    /// Meta of a run to be written for the sweep to `cut`.
    pub fn sweep_meta(&mut self, cut: Epoch) -> RunMeta {
        self.meta(0, (cut, cut))
    }

    fn meta(&mut self, level: u8, (first, last): (Epoch, Epoch)) -> RunMeta {
        let id = self.next_id;
        self.next_id += 1;
        RunMeta {
            id,
            level,
            volume: self.volume,
            geometry: self.geometry,
            first,
            last,
        }
    }

    fn check(&self, run: &RunSummary, level: u8) -> Result<(), ManifestError> {
        let RunMeta {
            id,
            level: found,
            volume,
            geometry,
            ..
        } = run.meta;
        let is_ours = (found, volume, geometry) == (level, self.volume, self.geometry);
        if !is_ours || id >= self.next_id {
            return Err(ManifestError::Foreign(id));
        }
        if self.members.len() >= MAX_RUNS {
            Err(ManifestError::Full)
        } else {
            Ok(())
        }
    }

    fn insert(&mut self, member: Member) {
        let key = |member: &Member| {
            let meta = member.run.meta;
            (
                meta.level,
                std::cmp::Reverse((meta.last, meta.first, meta.id)),
            )
        };
        let at = self
            .members
            .partition_point(|other| key(other) < key(&member));
        self.members.insert(at, member);
    }

    fn insert_leaves(&mut self, run: RunSummary) {
        // A tree lower than the middle level has no middle nodes to compute.
        let is_summarised = self.geometry.height() < MIDDLE_LEVEL;
        self.insert(Member {
            run,
            tier: 0,
            is_summarised,
        });
    }

    /// Step 2: names the durable run of the sweep that is about to start.
    ///
    /// # Errors
    /// [`ManifestError`] if it is not ours, or a sweep is under way.
    pub fn begin_sweep(&mut self, run: RunSummary) -> Result<(), ManifestError> {
        self.check(&run, 0)?;
        let cut = run.meta.last;
        if self.pending.is_some() || cut <= self.checkpoint {
            return Err(ManifestError::Sweep(cut, self.checkpoint));
        }
        self.pending = Some(run);
        Ok(())
    }

    /// Step 4: the superblock says `cut`.
    ///
    /// # Errors
    /// [`ManifestError::Sweep`] if that sweep was not begun.
    pub fn finish_sweep(&mut self, cut: Epoch) -> Result<(), ManifestError> {
        match self.pending {
            Some(run) if run.meta.last == cut => {
                self.insert_leaves(run);
                (self.pending, self.checkpoint) = (None, cut);
                Ok(())
            }
            _ => Err(ManifestError::Sweep(cut, self.checkpoint)),
        }
    }

    /// After a crash: the log's superblock says `recorded`.
    ///
    /// # Errors
    /// [`ManifestError::Ahead`] if the tree is newer than that.
    pub fn recover(&mut self, recorded: Epoch) -> Result<Recovery, ManifestError> {
        let (tree, log) = (self.checkpoint, recorded);
        if tree > log {
            return Err(ManifestError::Ahead { tree, log });
        }
        match self.pending {
            None if tree == log => Ok(Recovery::Clean),
            None => Err(ManifestError::Sweep(log, tree)),
            Some(run) if run.meta.last == log => {
                self.finish_sweep(log)?;
                Ok(Recovery::Adopted(run))
            }
            Some(run) if tree == log => {
                self.pending = None;
                Ok(Recovery::Dropped(run))
            }
            Some(run) => Err(ManifestError::Sweep(log, run.meta.last)),
        }
    }

    /// Meta of a run for the next portion of the first build. Sweeps that finish while the portion
    /// is hashed win over it, so it may be read from the backing without holding anything up.
    pub fn portion_meta(&mut self) -> Option<RunMeta> {
        let from = self.checkpoint;
        self.build.as_mut()?.portion_from = from;
        Some(self.meta(0, (from, from)))
    }

    /// Takes in a durable portion that reaches up to `next_block`.
    ///
    /// # Errors
    /// [`ManifestError`] if it is not ours or no portion was begun.
    pub fn portion_done(&mut self, run: RunSummary, next_block: u64) -> Result<(), ManifestError> {
        self.check(&run, 0)?;
        let blocks = self.geometry.blocks();
        match &mut self.build {
            Some(build) if build.portion_from == run.meta.last => build.next_block = next_block,
            _ => return Err(ManifestError::Sweep(run.meta.last, self.checkpoint)),
        }
        if next_block >= blocks {
            self.build = None;
        }
        self.insert_leaves(run);
        Ok(())
    }

    /// Meta of a run of middle nodes for everything that is not summarised yet.
    pub fn middle_meta(&mut self) -> RunMeta {
        // Middle nodes are computed from all leaves, so of two runs the one written later wins.
        self.meta(MIDDLE_LEVEL, (self.checkpoint, self.checkpoint))
    }

    /// Takes in a durable run of middle nodes, and marks `summarised` runs of leaves.
    ///
    /// # Errors
    /// [`ManifestError`] if it is not ours.
    pub fn middles_done(
        &mut self,
        run: RunSummary,
        summarised: &[u64],
    ) -> Result<(), ManifestError> {
        self.check(&run, MIDDLE_LEVEL)?;
        for member in &mut self.members {
            member.is_summarised |= summarised.contains(&member.run.meta.id);
        }
        self.insert(Member {
            run,
            tier: 0,
            is_summarised: true,
        });
        Ok(())
    }

    /// The next merge that is due.
    #[must_use]
    pub fn plan_merge(&mut self) -> Option<MergePlan> {
        for level in [0, MIDDLE_LEVEL] {
            let runs: Vec<Member> = self.runs(level).copied().collect();
            let Some(at) = runs
                .windows(FANOUT)
                .position(|window| self.is_mergeable(window))
            else {
                continue;
            };
            let window = &runs[at..at + FANOUT];
            let last = window.iter().map(|member| member.run.meta.last).max()?;
            let first = window.iter().map(|member| member.run.meta.first).min()?;
            let inputs = window.iter().map(|member| member.run.meta.id).collect();
            let tier = window[0].tier.saturating_add(1).min(MAX_TIER);
            let is_oldest = at + FANOUT == runs.len() && self.build.is_none();
            let meta = self.meta(level, (first, last));
            return Some(MergePlan {
                meta,
                inputs,
                is_oldest,
                tier,
            });
        }
        None
    }

    fn is_mergeable(&self, window: &[Member]) -> bool {
        let is_even = window
            .iter()
            .all(|member| member.tier == window[0].tier && member.is_summarised);
        // A portion that is still being hashed must find its place between older and newer runs.
        is_even
            && self.build.is_none_or(|build| {
                let is_newer = |member: &Member| member.run.meta.first > build.portion_from;
                window.iter().all(is_newer) || !window.iter().any(is_newer)
            })
    }

    /// Replaces the runs of `plan` by the durable run that they were merged into.
    ///
    /// # Errors
    /// [`ManifestError::Foreign`] if the plan is not of this manifest, or was carried out already.
    pub fn merge_done(&mut self, plan: &MergePlan, run: RunSummary) -> Result<(), ManifestError> {
        let is_input = |member: &Member| plan.inputs.contains(&member.run.meta.id);
        let found = self
            .members
            .iter()
            .filter(|member| is_input(member))
            .count();
        if run.meta != plan.meta || found != plan.inputs.len() {
            return Err(ManifestError::Foreign(run.meta.id));
        }
        let at = self.members.iter().position(is_input).unwrap_or(0);
        self.members.retain(|member| !is_input(member));
        self.members.insert(
            at,
            Member {
                run,
                tier: plan.tier,
                is_summarised: true,
            },
        );
        Ok(())
    }

    /// The encoding, with a checksum at its end.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer
            .bytes(MAGIC)
            .u8(VERSION)
            .bytes(&self.volume.0)
            .u64(self.geometry.size_bytes());
        writer.u64(self.checkpoint.0).u64(self.next_id);
        let build = self.build.unwrap_or(FirstBuild {
            next_block: 0,
            portion_from: Epoch(0),
        });
        writer
            .u8(u8::from(self.build.is_some()))
            .u64(build.next_block)
            .u64(build.portion_from.0);
        writer
            .count(self.members.len())
            .u8(u8::from(self.pending.is_some()));
        for member in &self.members {
            encode_run(&mut writer, &member.run);
            writer.u8(member.tier).u8(u8::from(member.is_summarised));
        }
        self.pending
            .iter()
            .for_each(|run| encode_run(&mut writer, run));
        let digest = hash::MANIFEST.hash(&[writer.as_slice()]);
        writer.digest(&digest);
        writer.finish()
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`ManifestError::Checksum`] if it was changed, [`ManifestError::Decode`] if it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let body = bytes
            .len()
            .checked_sub(DIGEST_BYTES)
            .ok_or(ManifestError::Checksum)?;
        let (body, digest) = bytes.split_at(body);
        if hash::MANIFEST.hash(&[body]).0 != digest {
            return Err(ManifestError::Checksum);
        }
        let mut reader = Reader::new("tree manifest", body);
        if reader.array::<8>()? != *MAGIC {
            return Err(reader.invalid("magic").into());
        }
        reader.version(VERSION)?;
        let volume = VolumeId(reader.array()?);
        let geometry = Geometry::new(reader.u64()?).map_err(|_| reader.invalid("size"))?;
        let (checkpoint, next_id) = (Epoch(reader.u64()?), reader.u64()?);
        let is_building = flag(&mut reader)?;
        let build = FirstBuild {
            next_block: reader.u64()?,
            portion_from: Epoch(reader.u64()?),
        };
        let count = reader.count(MAX_RUNS, "number of runs")?;
        let has_pending = flag(&mut reader)?;
        let members = (0..count)
            .map(|_| {
                let run = decode_run(&mut reader, volume, geometry)?;
                Ok(Member {
                    run,
                    tier: reader.u8()?,
                    is_summarised: flag(&mut reader)?,
                })
            })
            .collect::<Result<_, DecodeError>>()?;
        let pending = match has_pending {
            true => Some(decode_run(&mut reader, volume, geometry)?),
            false => None,
        };
        reader.finish()?;
        let build = is_building.then_some(build);
        Ok(Self {
            volume,
            geometry,
            checkpoint,
            next_id,
            pending,
            build,
            members,
        })
    }
}

fn flag(reader: &mut Reader<'_>) -> Result<bool, DecodeError> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(reader.invalid("flag")),
    }
}

fn encode_run(writer: &mut Writer, run: &RunSummary) {
    let RunMeta {
        id,
        level,
        first,
        last,
        ..
    } = run.meta;
    writer
        .u64(id)
        .u8(level)
        .u64(first.0)
        .u64(last.0)
        .u64(run.entries)
        .digest(&run.digest);
}

fn decode_run(
    reader: &mut Reader<'_>,
    volume: VolumeId,
    geometry: Geometry,
) -> Result<RunSummary, DecodeError> {
    let (id, level) = (reader.u64()?, reader.u8()?);
    let (first, last) = (Epoch(reader.u64()?), Epoch(reader.u64()?));
    let (entries, digest): (u64, Digest) = (reader.u64()?, reader.digest()?);
    let meta = RunMeta {
        id,
        level,
        volume,
        geometry,
        first,
        last,
    };
    Ok(RunSummary {
        meta,
        entries,
        digest,
    })
}

#[cfg(test)]
mod tests;
