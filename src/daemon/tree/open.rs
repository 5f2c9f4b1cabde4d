//! How a tree comes, and how it goes.

use std::time::Instant;

use hn4_engine::core::event::TreeEvent;
use hn4_proof::tree::keeper::{Keeper, Opened};
use hn4_proof::tree::{Geometry, TreeError};

use super::files::{Backing, Files};
use super::leaves::Leaves;
use super::verify::Record;
use super::{FromTree, Open, RETRY, TreeState, Worker};

impl Worker {
    pub(super) fn discard(&mut self) {
        (self.at, self.tree, self.retry) = (None, None, None);
        self.surveys = false;
        self.end_resyncs();
        self.no_longer_rooting();
        self.turn_away();
        (self.sweeping, self.gathering) = (false, None);
        let gone = self.files().map_err(TreeError::from).and_then(|mut files| {
            Keeper::discard(&mut files)?;
            // Nothing stays that was known to be damaged.
            Ok(files.forget_record()?)
        });
        if let Err(error) = gone {
            // A tree that is found later has another checkpoint than the log, and is not believed.
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

    pub(super) fn open(&mut self, anew: bool) {
        self.retry = None;
        match self.try_open(anew) {
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

    fn try_open(&mut self, anew: bool) -> Result<Opened, TreeError> {
        let Some(at) = self.at else {
            return Ok(Opened::New);
        };
        let identity = &self.setup.identity;
        let backing = Backing::open(&self.setup.backing, identity.size_bytes)?;
        let geometry = Geometry::new(identity.size_bytes)?;
        let mut files = self.files()?;
        if anew {
            Keeper::discard(&mut files)?;
        }
        let (keeper, found) = Keeper::open(files, (self.tree_of(), geometry), at.epoch)?;
        let known = self.files()?.record()?.filter(|_| !anew);
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
        if let Ok(mut files) = self.files() {
            // If that fails, too: see `discard`.
            let _ = Keeper::discard(&mut files);
        }
        self.tell_survey(false);
        self.retry = Some(Instant::now() + RETRY);
        self.state = TreeState {
            failed: Some(error.to_string()),
            notice: self.state.notice.take(),
            ..TreeState::default()
        };
        self.untold = true;
    }
}
