//! A tree of what somebody brought, for a copy that was not filled yet.
//!
//! It is built and taken as any other one, and serves to be compared with the primary's before the
//! full copy. But it is of no state of the volume: its root says nothing to anybody, nothing in it
//! is repaired, and its files are not taken for those of the volume's tree, nor the other way
//! round, whatever a discard may have left behind.

use std::io;
use std::path::Path;

use hn4::types::VolumeId;
use hn4_engine::core::event::{Tip, TreeEvent};
use hn4_proof::hash::Digest;
use hn4_proof::tree::TreeError;
use hn4_proof::tree::keeper::Keeper;

use super::files::Files;
use super::{FromTree, Worker};

/// So many surveys fail before nobody waits for one any more.
const SURVEYS: u32 = 3;

/// Nothing stays of a tree that the node may have of the volume: what is surveyed next is another
/// backing.
///
/// # Errors
/// If a file cannot be removed.
pub(crate) fn forget_tree(state_dir: &Path, volume: VolumeId) -> io::Result<()> {
    if !Files::folder(state_dir, volume).try_exists()? {
        return Ok(());
    }
    let mut files = Files::open(state_dir, volume)?;
    Keeper::discard(&mut files).map_err(io::Error::other)?;
    files.forget_record()
}

impl Worker {
    pub(super) fn survey(&mut self, at: Tip, anew: bool) {
        (self.at, self.settled, self.surveys) = (Some(at), at.epoch, true);
        self.open(anew);
    }

    /// Whose tree it is, as its files have it.
    pub(super) fn tree_of(&self) -> VolumeId {
        let volume = self.setup.identity.volume;
        match self.surveys {
            true => VolumeId(volume.0.map(|byte| !byte)),
            false => volume,
        }
    }

    /// Tells the core whether a survey is complete.
    pub(super) fn tell_survey(&mut self) {
        if self.surveys {
            let complete = self.is_whole();
            if complete {
                self.failed_surveys = 0;
            }
            self.say(FromTree::Core(TreeEvent::Surveyed(complete)));
        }
    }

    /// The tree was given up. What it may have been too small for does not grow by waiting.
    pub(super) fn survey_failed(&mut self, error: &TreeError) {
        if !self.surveys {
            return;
        }
        self.failed_surveys = self.failed_surveys.saturating_add(1);
        let failed = self.failed_surveys;
        let (event, then) = match failed < SURVEYS {
            true => (TreeEvent::Surveyed(false), "another one begins"),
            false => (TreeEvent::NoSurvey, "all of the full copy is asked for"),
        };
        self.say(FromTree::Core(event));
        let notice = format!(
            "the survey of what was brought to the backing has failed, number {failed} in a row, \
             and {then}: {error}"
        );
        tracing::warn!(volume = %self.setup.name, "{notice}");
        self.state.notice = Some(notice);
    }

    /// The root of a state of the volume is for everybody.
    pub(super) fn say_root_of_volume(&self, at: Tip, root: Digest) {
        if !self.surveys {
            self.say(FromTree::Root { at, root });
        }
    }
}
