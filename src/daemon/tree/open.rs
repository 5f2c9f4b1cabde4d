//! How a tree comes, and how it goes.
//!
//! **Invariant: what was to be removed is not believed before it was removed**, however often that
//! fails, and whatever the backing looks like meanwhile. That holds as long as the process lives.
//! A later one is told by the superblock: whether a full copy has written to a backing since it was
//! surveyed, and by the number of its checkpoint, which is compared with that of the tree.

use std::time::Instant;

use hn4_engine::core::event::TreeEvent;
use hn4_proof::tree::keeper::{Keeper, Opened};
use hn4_proof::tree::{Geometry, TreeError};

use super::files::{Backing, Files};
use super::leaves::Leaves;
use super::verify::Record;
use super::{FromTree, Open, RETRY, TreeState, Worker};

/// What there is of files that are to be removed before a tree is opened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Stale {
    Nothing,
    /// Those of the tree; what is known of the medium stays so.
    Tree,
    /// They are of another state of the backing, and so is what is known of the medium.
    All,
}

impl Worker {
    pub(super) fn discard(&mut self) {
        (self.at, self.tree, self.retry) = (None, None, None);
        self.surveys = false;
        self.end_resyncs();
        self.no_longer_rooting();
        self.turn_away();
        (self.sweeping, self.gathering) = (false, None);
        self.stale = Stale::All;
        if let Err(error) = self.remove_stale() {
            // The volume does not wait for that: see the module.
            tracing::error!(volume = %self.setup.name, %error, "the state tree cannot be removed");
        }
        self.state = TreeState::default();
        self.repairs.forget_all();
        self.damaged_before.clear();
        (self.verify, self.record, self.unlisted) = (None, None, false);
        self.untold = true;
        self.say(FromTree::Core(TreeEvent::Discarded));
    }

    pub(super) fn files(&self) -> std::io::Result<Files> {
        Files::open(&self.setup.state_dir, self.setup.identity.volume)
    }

    /// Removes what is stale. It stays so if that fails.
    fn remove_stale(&mut self) -> Result<(), TreeError> {
        if self.stale == Stale::Nothing {
            return Ok(());
        }
        let mut files = self.files()?;
        Keeper::discard(&mut files)?;
        if self.stale == Stale::All {
            files.forget_record()?;
        }
        self.stale = Stale::Nothing;
        Ok(())
    }

    /// Opens the tree, or begins one. With `anew` whatever there is of one is of another state.
    pub(super) fn open(&mut self, anew: bool) {
        self.retry = None;
        if anew {
            self.stale = Stale::All;
        }
        match self.try_open() {
            Ok(found) => {
                self.state.failed = None;
                if let Opened::Anew(why) = found {
                    let notice = format!("the state tree is built anew: {why}");
                    tracing::warn!(volume = %self.setup.name, "{notice}");
                    self.state.notice = Some(notice);
                }
                (self.unrooted, self.moved) = (true, Instant::now());
                self.refresh();
            }
            Err(error) => self.give_up(&error),
        }
    }

    fn try_open(&mut self) -> Result<Opened, TreeError> {
        let Some(at) = self.at else {
            return Ok(Opened::New);
        };
        let identity = &self.setup.identity;
        let backing = Backing::open(&self.setup.backing, identity.size_bytes)?;
        let geometry = Geometry::new(identity.size_bytes)?;
        self.remove_stale()?;
        let (keeper, found) = Keeper::open(self.files()?, (self.tree_of(), geometry), at.epoch)?;
        let known = self.files()?.record()?;
        let record = known.and_then(|bytes| Record::decode(&bytes));
        self.verify = None;
        let mut record = record.unwrap_or_else(Record::new);
        if keeper.to_build().is_some() {
            // What lies there now will be hashed, and must not become good by that.
            self.damaged_before.extend(&record.bad);
        }
        let _ = record.found(self.damaged_before.iter().copied());
        record.bad.iter().for_each(|block| self.seek(*block));
        self.record = Some(record);
        self.keep_record();
        self.tree = Some(Open {
            leaves: Leaves::new(keeper.geometry().blocks()),
            keeper,
            backing,
        });
        Ok(found)
    }

    /// Goes on without a tree, for a while.
    pub(super) fn give_up(&mut self, error: &TreeError) {
        tracing::error!(volume = %self.setup.name, %error, "the state tree is given up");
        self.tree = None;
        self.end_resyncs();
        self.no_longer_rooting();
        self.turn_away();
        // Nothing can tell good copies of these blocks any more.
        self.lose(true);
        self.damaged_before.extend(self.repairs.forget_all());
        (self.verify, self.record) = (None, None);
        self.stale = self.stale.max(Stale::Tree);
        if let Err(error) = self.remove_stale() {
            let volume = &self.setup.name;
            tracing::warn!(%volume, %error, "the files of the state tree cannot be removed");
        }
        self.survey_failed(error);
        self.retry = Some(Instant::now() + RETRY);
        self.state = TreeState {
            failed: Some(error.to_string()),
            notice: self.state.notice.take(),
            ..TreeState::default()
        };
        self.untold = true;
    }
}
