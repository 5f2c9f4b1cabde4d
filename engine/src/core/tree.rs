//! What the core has to do with the state tree: a sweep begins when the tree has its leaves.
//!
//! The tree lives elsewhere, off the path of clients. Before a sweep touches the backing, its
//! contents are handed over in portions, and the sweep waits until they are in the tree's files.
//! When the superblock names the new checkpoint, the tree takes it over. Whatever else writes the
//! backing - a full copy, a shadow that is switched in - does so only when the tree was discarded;
//! afterwards it is built anew.
//!
//! What somebody brought for a copy that was not filled yet is *surveyed*: the tree that is made of
//! it serves to compare it with the primary's, and is discarded as any other one before the first
//! piece is written. Nothing else writes such a backing. The copy is asked for when the survey is
//! complete; if it fails again and again, everything is asked for as if nothing had been brought.
//!
//! **Invariant:** every write to the backing is either in a tree that is durable, or there is no
//! tree.
//!
//! Not here: hashing, files (`hn4_proof::tree`); who tells whom about roots.

use std::ops::Range;

use hn4::log::{CopyState, Ground};
use hn4::types::{BLOCK_BYTES, BlockIndex, Epoch};

use super::checks::Verdict;
pub use super::damage::Damaged;
use super::event::{Action, Actions, Differences, IoToken, Now, PeerId, Time, Tip};
use super::sweep::Sweep;
use super::volume::Volume;
use crate::arena::SlotMemory;

/// Parts of a sweep that are handed over at once: 1 MiB if they are whole blocks.
const PORTION_PARTS: usize = 256;
/// Portions on their way, so that one is copied while another one is hashed.
const PORTIONS: usize = 2;

/// What the core tells the tree. In this order: a start, then sweeps, then perhaps a discard and
/// a new start. A sweep is a begin, its blocks, and, when it is recorded, a done. Checks come in
/// between.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TreeWork {
    /// The backing is an exact state: open the tree, or build one.
    Start {
        /// The checkpoint.
        at: Tip,
        /// A sweep that a crash has torn may have begun to write epochs up to this one. Until the
        /// checkpoint is there, blocks may differ from what they are to be.
        settled: Epoch,
        /// Whatever there is of a tree is of another state.
        anew: bool,
    },
    /// The backing holds something of no known state, which nothing writes until a discard: make a
    /// tree of it. Answered by [`TreeEvent::Surveyed`].
    Survey {
        /// The name of that state. Nobody else has it.
        at: Tip,
        /// As with a start.
        anew: bool,
    },
    /// A sweep is planned.
    Begin {
        /// The epoch that it leads to.
        cut: Epoch,
        /// Byte offset and length of what it zeroes before it writes, ascending.
        zeros: Vec<(u64, u64)>,
    },
    /// A part of what it writes, ascending; answered by [`TreeEvent::Took`], and the last one by
    /// [`TreeEvent::Ready`] when the tree is durable. Parts of one block come together.
    Blocks {
        /// Byte offset on the volume of each part.
        offsets: Vec<u64>,
        /// Their contents, a range of [`Actions::segs`].
        segs: Range<usize>,
        /// There is no more.
        last: bool,
    },
    /// The superblock says that the sweep is done.
    Done {
        /// The new checkpoint.
        at: Tip,
        /// The primary has marked it: all copies have this checkpoint. Answered by
        /// [`TreeEvent::Rooted`], soon or much later.
        marked: bool,
    },
    /// Compare blocks of the backing with their leaves; answered by [`TreeEvent::Checked`].
    Check {
        /// The read that waits for the answer; `None`: nobody does.
        read: Option<u32>,
        /// Which, ascending.
        blocks: Vec<BlockIndex>,
        /// What the read got, each of them whole, a range of [`Actions::segs`]; nothing if the
        /// backing failed, or if nobody waits. Then they are to be read again.
        segs: Range<usize>,
    },
    /// Leave nothing of the tree; answered by [`TreeEvent::Discarded`].
    Discard,
    /// Compare with the tree of this peer, whose backing does not change meanwhile. Answered by
    /// [`TreeEvent::Compared`]; a later question about the same peer takes the place of this one.
    Compare {
        /// Whom with.
        peer: PeerId,
        /// Name of the question.
        id: u64,
    },
    /// The volume has failed closed: nothing may be written to the backing any more (P5).
    Halt,
}

/// What the tree tells the core.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TreeEvent {
    /// A portion of a sweep was taken.
    Took,
    /// The sweep to this epoch may begin.
    Ready(Epoch),
    /// The root at a marked checkpoint is there, or there will be none.
    Rooted,
    /// There is no tree.
    Discarded,
    /// The survey is complete, or has to begin again.
    Surveyed(bool),
    /// Surveys have failed, and nobody is to wait for one. Another one may be complete later.
    NoSurvey,
    /// A block of the backing is damaged, or (`None`) good again.
    Damage(BlockIndex, Option<Damaged>),
    /// There are so many damaged blocks that most are only counted: whether every read is to be
    /// compared, since any may need one.
    Unlisted(bool),
    /// Blocks were compared: those of this read, or those of a sample.
    Checked(Option<u32>, Verdict),
    /// A flush of the backing failed, behind a repair: whatever was written there may be lost.
    FlushFailed(i32),
    /// Answer to [`TreeWork::Compare`].
    Compared {
        /// The name of the question.
        id: u64,
        /// `None`: the trees could not be compared.
        found: Option<Differences>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Standing {
    /// There may be files of one.
    #[default]
    Unknown,
    /// It follows the sweeps.
    On,
    /// One is being made of what was brought.
    Surveying,
    /// That one is complete.
    Surveyed,
    /// It failed, several times. The tree tries again, and nobody waits for it.
    Unsurveyed,
    /// It was told to leave nothing.
    Discarding,
    /// There is none.
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Hand {
    #[default]
    Idle,
    /// Parts from `next` on are to be handed over; so many portions are on their way.
    Over {
        next: usize,
        portions: usize,
    },
    /// All parts are, and an answer is to come.
    Waiting,
    Ready,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Tree {
    standing: Standing,
    hand: Hand,
    /// When an epoch was marked last.
    marked_at: Option<Time>,
    /// The root at a marked checkpoint is being computed.
    rooting: bool,
}

impl Tree {
    /// Hands over what there is room for. Whether the sweep may go on.
    pub(super) fn admits(&mut self, sweep: &Sweep, out: &mut Actions) -> bool {
        if self.hand == Hand::Idle {
            if !self.follows() {
                return true;
            }
            self.hand = Hand::Over {
                next: 0,
                portions: 0,
            };
            let zeros = sweep.zeros().iter().map(|&(at, bytes, _)| (at, bytes));
            out.push(Action::Tree(TreeWork::Begin {
                cut: sweep.cut,
                zeros: zeros.collect(),
            }));
        }
        while let Hand::Over { next, portions } = self.hand
            && portions < PORTIONS
        {
            self.hand_over(sweep, (next, portions), out);
        }
        self.hand == Hand::Ready
    }

    /// Whether it follows the sweeps, which wait for their leaves.
    pub(super) fn follows(&self) -> bool {
        self.standing == Standing::On
    }

    /// Whether what was brought is not going to be compared with anything.
    pub(super) fn has_no_survey(&self) -> bool {
        self.standing == Standing::Unsurveyed
    }

    /// How many parts of the sweep under way were handed over; `None`: all, or there is no tree.
    pub(super) fn handed(&self) -> Option<usize> {
        match self.hand {
            Hand::Over { next, .. } => Some(next),
            Hand::Idle if self.follows() => Some(0),
            Hand::Idle | Hand::Waiting | Hand::Ready => None,
        }
    }

    fn hand_over(&mut self, sweep: &Sweep, (next, portions): (usize, usize), out: &mut Actions) {
        let parts = &sweep.parts()[next..];
        let block = |index: usize| parts.get(index).map(|(offset, _)| offset / BLOCK_BYTES);
        let mut count = parts.len().min(PORTION_PARTS);
        while count > 0 && count < parts.len() && block(count) == block(count - 1) {
            count += 1;
        }
        let first = out.segs.len();
        out.segs.extend(parts[..count].iter().map(|&(_, seg)| seg));
        let last = count == parts.len();
        out.push(Action::Tree(TreeWork::Blocks {
            offsets: parts[..count].iter().map(|&(offset, _)| offset).collect(),
            segs: first..out.segs.len(),
            last,
        }));
        self.hand = if last {
            Hand::Waiting
        } else {
            Hand::Over {
                next: next + count,
                portions: portions + 1,
            }
        };
    }

    fn event(&mut self, event: &TreeEvent, cut: Option<Epoch>) {
        match *event {
            TreeEvent::Took => {
                if let Hand::Over { portions, .. } = &mut self.hand {
                    *portions = portions.saturating_sub(1);
                }
            }
            TreeEvent::Ready(of) if self.hand == Hand::Waiting && cut == Some(of) => {
                self.hand = Hand::Ready;
            }
            TreeEvent::Discarded if self.standing == Standing::Discarding => {
                self.standing = Standing::Gone;
            }
            TreeEvent::Rooted => self.rooting = false,
            TreeEvent::Surveyed(complete) => match self.standing {
                Standing::Surveying | Standing::Unsurveyed if complete => {
                    self.standing = Standing::Surveyed;
                }
                Standing::Surveyed if !complete => self.standing = Standing::Surveying,
                _ => {}
            },
            TreeEvent::NoSurvey => {
                if let Standing::Surveying | Standing::Surveyed = self.standing {
                    self.standing = Standing::Unsurveyed;
                }
            }
            // Of a sweep or a tree that is no more.
            TreeEvent::Ready(_)
            | TreeEvent::Discarded
            | TreeEvent::Damage(..)
            | TreeEvent::Unlisted(_)
            | TreeEvent::Checked(..)
            | TreeEvent::Compared { .. }
            | TreeEvent::FlushFailed(_) => {}
        }
    }

    /// The sweep was recorded.
    pub(super) fn recorded(&mut self, at: Tip, marked: bool, out: &mut Actions) {
        if std::mem::take(&mut self.hand) == Hand::Ready {
            self.rooting |= marked;
            out.push(Action::Tree(TreeWork::Done { at, marked }));
        }
    }

    /// Whether the epoch that is sealed now is to be marked: not more often than this copy can
    /// compute roots.
    pub(super) fn marks(&mut self, now: Time, every_ms: u64) -> bool {
        let due = self.marked_at.is_none_or(|at| now >= at.plus_ms(every_ms)) && !self.rooting;
        if due {
            self.marked_at = Some(now);
        }
        due
    }
}

impl Volume {
    #[inline(never)]
    pub(super) fn tree_event(
        &mut self,
        now: Now,
        event: TreeEvent,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        match event {
            TreeEvent::FlushFailed(errno) => return self.fail(IoToken::SweepFsync, errno, out),
            TreeEvent::Checked(read, verdict) => {
                return self.checked(now, (read, verdict), mem, out);
            }
            TreeEvent::Unlisted(unlisted) => self.reads.all_are_checked = unlisted,
            TreeEvent::Discarded => self.reads.all_are_checked = false,
            _ => {}
        }
        self.damage.event(&event);
        let cut = self.sweep.as_ref().map(|sweep| sweep.cut);
        self.tree.event(&event, cut);
        if let TreeEvent::Compared { id, found } = event {
            self.compared_with_peer(id, found, out);
        }
    }

    /// Starts the tree when the backing is an exact state that only sweeps change.
    pub(super) fn tree_progress(&mut self, out: &mut Actions) {
        if !self.config.tree {
            return;
        }
        if self.has_ground() {
            return self.survey(out);
        }
        let persisted = self.superblock.persisted();
        let exact = persisted.copy == CopyState::Usable
            && self.superblock.desired.copy == CopyState::Usable;
        let quiet = self.sweep.is_none() && self.replica.rebase.is_none();
        if !(exact && quiet) {
            return;
        }
        let anew = match self.tree.standing {
            Standing::Unknown => false,
            Standing::Gone => true,
            Standing::On
            | Standing::Surveying
            | Standing::Surveyed
            | Standing::Unsurveyed
            | Standing::Discarding => return,
        };
        self.tree.standing = Standing::On;
        let at = Tip {
            epoch: persisted.checkpoint,
            chain: persisted.checkpoint_chain,
        };
        out.push(Action::Tree(TreeWork::Start {
            at,
            settled: persisted.swept,
            anew,
        }));
    }

    /// Whether a copy that was not filled yet, or is to be filled anew, may keep what lies there.
    fn has_ground(&self) -> bool {
        let persisted = self.superblock.persisted();
        self.config.tree
            && persisted.ground != Ground::Nothing
            && persisted.copy == CopyState::Fresh
    }

    /// Whether no full copy is asked for until what lies there is surveyed.
    pub(super) fn surveys(&self) -> bool {
        let begun =
            self.replica.rebase.is_some() || self.superblock.desired.copy != CopyState::Fresh;
        let stands = matches!(
            self.tree.standing,
            Standing::Surveyed | Standing::Unsurveyed
        );
        self.has_ground() && !begun && !stands
    }

    /// Starts the survey when nothing is on its way to the backing any more.
    fn survey(&mut self, out: &mut Actions) {
        let persisted = self.superblock.persisted();
        let quiet = self.superblock.desired.copy == CopyState::Fresh
            && self.sweep.is_none()
            && self.replica.rebase.is_none()
            && self.replica.seed_ios.is_idle();
        let anew = match self.tree.standing {
            _ if !quiet => return,
            // What an earlier life has surveyed still lies there if no piece was written since.
            Standing::Unknown => persisted.ground != Ground::Brought,
            Standing::Gone => true,
            Standing::On
            | Standing::Surveying
            | Standing::Surveyed
            | Standing::Unsurveyed
            | Standing::Discarding => return,
        };
        self.tree.standing = Standing::Surveying;
        let at = Tip {
            epoch: persisted.checkpoint,
            chain: persisted.checkpoint_chain,
        };
        out.push(Action::Tree(TreeWork::Survey { at, anew }));
    }

    /// The backing is to be written by other means than a sweep. Whether the tree is gone.
    pub(super) fn tree_lets_go(&mut self, out: &mut Actions) -> bool {
        if !self.config.tree {
            return true;
        }
        match self.tree.standing {
            Standing::Gone => return true,
            Standing::Discarding => {}
            Standing::Unknown
            | Standing::On
            | Standing::Surveying
            | Standing::Surveyed
            | Standing::Unsurveyed => {
                self.tree.standing = Standing::Discarding;
                out.push(Action::Tree(TreeWork::Discard));
            }
        }
        false
    }
}
