//! What a keeper does between sweeps, a little at a time: the nodes above new leaves, and merges.
//!
//! Both read only runs, which never change, so sweeps may come and go meanwhile. A root is that of
//! the checkpoint at which it was wanted, however many sweeps have ended since.

use hn4::types::Epoch;

use super::{Keeper, TreeMedium, step};
use crate::hash::Digest;
use crate::tree::manifest::{FANOUT, MergePlan};
use crate::tree::merge::merge_slice;
use crate::tree::run::{Run, RunWriter};
use crate::tree::view::{Nodes, Snapshot, View, refresh_middles};
use crate::tree::{MIDDLE_LEVEL, TreeError};

/// Runs of new leaves above which middle nodes are computed though nobody wants a root: only then
/// can they be merged.
const NEW_RUNS: usize = 2 * FANOUT;
/// From so many runs on a sweep waits for merges: each costs memory, and time in every look-up.
const MOST_RUNS: usize = 256;
/// Entries that are merged at once when a sweep waits.
const AT_ONCE: usize = 1 << 16;

/// What a piece of work has led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Worked {
    /// There was nothing to do.
    Nothing,
    /// There may be more to do.
    Some,
    /// The root that was wanted, and the checkpoint at which it was.
    Root(Epoch, Digest),
}

/// Middle nodes above new leaves are being computed.
#[derive(Debug)]
pub(super) struct Summing<M: TreeMedium> {
    /// Somebody wants the root.
    is_wanted: bool,
    /// Somebody wants the whole tree, too.
    is_kept: bool,
    checkpoint: Epoch,
    /// All runs of leaves at that checkpoint, newest first, and those that are new.
    leaves: Vec<Run<M::Run>>,
    new: Vec<Run<M::Run>>,
    /// None if nothing is new.
    writer: Option<RunWriter<M::Sink>>,
    touched: Vec<u64>,
    /// The middle node that comes next.
    next: u64,
}

/// Runs are being merged.
#[derive(Debug)]
pub(super) struct Merging<M: TreeMedium> {
    plan: MergePlan,
    inputs: Vec<Run<M::Run>>,
    writer: RunWriter<M::Sink>,
    /// The node that comes next.
    next: u64,
}

impl<M: TreeMedium> Keeper<M> {
    /// Asks for the root at the checkpoint as it is now; [`Self::work`] answers. Whether it will:
    /// not while nodes of an earlier checkpoint are being computed, nor during the first build.
    ///
    /// # Errors
    /// [`TreeError`] of the medium.
    pub fn want_root(&mut self) -> Result<bool, TreeError> {
        let is_free = !self.is_summing() && self.rooted.is_none();
        let begins = is_free && self.manifest.first_build().is_none();
        if begins {
            self.begin_sum(true)?;
        }
        Ok(begins)
    }

    /// As [`Self::want_root`]; with the root there is also [`Self::take_snapshot`].
    ///
    /// # Errors
    /// [`TreeError`] of the medium.
    pub fn want_snapshot(&mut self) -> Result<bool, TreeError> {
        let begins = self.want_root()?;
        if let Some(summing) = &mut self.summing {
            summing.is_kept |= begins;
        }
        Ok(begins)
    }

    /// The tree at the root that [`Self::work`] has just given, if it was to be kept.
    pub fn take_snapshot(&mut self) -> Option<Snapshot<M::Run>> {
        self.snapshot.take()
    }

    /// Whether nodes are being computed, for a root or for merges.
    #[must_use]
    pub fn is_summing(&self) -> bool {
        self.summing.is_some()
    }

    /// Whether [`Self::work`] may find something to do.
    #[must_use]
    pub fn has_work(&self) -> bool {
        let is_begun = self.is_summing() || self.merging.is_some();
        self.is_due || is_begun || self.rooted.is_some()
    }

    /// Does a piece of work that reads about `entries` entries of runs.
    ///
    /// # Errors
    /// [`TreeError`] of a run or the medium.
    pub fn work(&mut self, entries: usize) -> Result<Worked, TreeError> {
        match self.rooted.take() {
            Some((checkpoint, root)) => Ok(Worked::Root(checkpoint, root)),
            None => self.go_on(entries),
        }
    }

    fn go_on(&mut self, entries: usize) -> Result<Worked, TreeError> {
        if self.summing.is_none() && self.manifest.unsummarised().count() >= NEW_RUNS {
            self.begin_sum(false)?;
        }
        if self.summing.is_some() {
            return self.sum(entries);
        }
        if self.merging.is_none()
            && let Some(plan) = self.manifest.plan_merge()
        {
            self.begin_merge(plan)?;
        }
        self.is_due = false;
        self.merge(entries)
    }

    /// Brings all nodes up to the leaves and gives the root; `None` during the first build. For
    /// tools, which may take as long as that takes.
    ///
    /// # Errors
    /// [`TreeError`] of a run or the medium.
    pub fn settle(&mut self) -> Result<Option<Digest>, TreeError> {
        if self.manifest.first_build().is_some() {
            return Ok(None);
        }
        loop {
            let begun = self.want_root()?;
            while let worked @ (Worked::Some | Worked::Root(..)) = self.work(usize::MAX)? {
                if let Worked::Root(_, root) = worked
                    && begun
                {
                    return Ok(Some(root));
                }
            }
        }
    }

    /// All nodes, as new as the last [`Self::settle`].
    #[must_use]
    pub fn view(&self) -> View<'_, M::Run> {
        View {
            geometry: self.geometry,
            leaves: &self.leaves,
            middles: &self.middles,
            tops: &self.tops,
        }
    }

    /// Before a sweep: sees to it that the number of runs is bounded.
    pub(super) fn catch_up(&mut self) -> Result<(), TreeError> {
        while self.leaves.len() + self.middles.len() >= MOST_RUNS {
            match self.go_on(AT_ONCE)? {
                Worked::Nothing => break,
                Worked::Some => {}
                Worked::Root(checkpoint, root) => self.rooted = Some((checkpoint, root)),
            }
        }
        Ok(())
    }

    fn begin_sum(&mut self, is_wanted: bool) -> Result<(), TreeError> {
        let new = self.manifest.unsummarised();
        let new: Vec<u64> = new.map(|member| member.run.meta.id).collect();
        let checkpoint = self.manifest.checkpoint();
        let runs = self.leaves.iter();
        let runs = runs.filter(|run| new.contains(&run.summary().meta.id));
        let writer = match new.is_empty() {
            true => None,
            false => {
                let meta = self.manifest.middle_meta();
                Some(RunWriter::new(meta, self.medium.create(meta.id)?))
            }
        };
        self.summing = Some(Summing {
            is_wanted,
            is_kept: false,
            checkpoint,
            leaves: self.leaves.clone(),
            new: runs.cloned().collect(),
            writer,
            touched: Vec::new(),
            next: 0,
        });
        Ok(())
    }

    fn sum(&mut self, entries: usize) -> Result<Worked, TreeError> {
        let Some(summing) = &mut self.summing else {
            return Ok(Worked::Nothing);
        };
        let Some(writer) = &mut summing.writer else {
            return self.end_sum();
        };
        let touched = &mut summing.touched;
        let runs = (&summing.leaves[..], &summing.new[..]);
        let from = (summing.next, entries);
        let next = refresh_middles(self.geometry, runs, from, |index, node| {
            touched.push(index);
            writer.push(index, &node)
        })?;
        match next {
            Some(next) => {
                summing.next = next;
                Ok(Worked::Some)
            }
            None => self.end_sum(),
        }
    }

    /// The new run is named with the next manifest; until then opening would compute it again.
    fn end_sum(&mut self) -> Result<Worked, TreeError> {
        let Some(summing) = self.summing.take() else {
            return Ok(Worked::Nothing);
        };
        if let Some(writer) = summing.writer {
            let run = self.finish(writer)?;
            let new = summing.new.iter().map(|run| run.summary().meta.id);
            let new: Vec<u64> = new.collect();
            self.manifest.middles_done(run, &new).map_err(step)?;
            self.open_runs()?;
            let touched = summing.touched.into_iter();
            self.tops.refresh(self.geometry, &self.middles, touched)?;
        }
        self.is_due = true;
        if !summing.is_wanted || self.manifest.first_build().is_some() {
            return Ok(Worked::Some);
        }
        let tree = Snapshot {
            geometry: self.geometry,
            leaves: summing.leaves,
            middles: self.middles.clone(),
            tops: self.tops.clone(),
        };
        let root = tree.view().root()?;
        self.snapshot = Some(tree).filter(|_| summing.is_kept);
        Ok(Worked::Root(summing.checkpoint, root))
    }

    fn begin_merge(&mut self, plan: MergePlan) -> Result<(), TreeError> {
        let runs = match plan.meta.level {
            MIDDLE_LEVEL => &self.middles,
            _ => &self.leaves,
        };
        let inputs = runs.iter();
        let inputs = inputs.filter(|run| plan.inputs.contains(&run.summary().meta.id));
        let inputs = inputs.cloned().collect();
        let writer = RunWriter::new(plan.meta, self.medium.create(plan.meta.id)?);
        self.merging = Some(Merging {
            plan,
            inputs,
            writer,
            next: 0,
        });
        Ok(())
    }

    fn merge(&mut self, entries: usize) -> Result<Worked, TreeError> {
        let Some(mut merging) = self.merging.take() else {
            return Ok(Worked::Nothing);
        };
        let (from, is_oldest) = ((merging.next, entries), merging.plan.is_oldest);
        let next = merge_slice(&merging.inputs, from, is_oldest, &mut merging.writer)?;
        if let Some(next) = next {
            self.merging = Some(Merging { next, ..merging });
            return Ok(Worked::Some);
        }
        let run = self.finish(merging.writer)?;
        let plan = merging.plan;
        self.manifest.merge_done(&plan, run).map_err(step)?;
        self.open_runs()?;
        self.save()?;
        let mut inputs = plan.inputs.into_iter();
        inputs.try_for_each(|id| self.medium.remove(id))?;
        self.is_due = true;
        Ok(Worked::Some)
    }
}
