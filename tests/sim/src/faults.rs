//! Every fault that is injected, by number, so that a failing run can be repeated without some.
//!
//! A fault is asked for where it would happen. It gets the next number, and happens unless the run
//! keeps only others. What is left out changes what comes after it; the run stays a function of
//! the seed and of the list that is kept.

use std::collections::BTreeSet;

/// Kinds of faults.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fault {
    /// A node loses power between two steps, or in the middle of carrying out a step's actions.
    Crash,
    /// The same, just after its role, its term or the kind of its copy changed, or while it writes
    /// a superblock.
    CrashAfterChange,
    /// The same, exactly while a superblock is on its way to the medium.
    CrashInSuperblock,
    /// The same, while a log goes on after it was cut back.
    CrashInTruncation,
    /// A recovery is cut off.
    CutRecovery,
    /// A read, write or flush fails.
    IoError,
    /// A write to the backing finds no space.
    NoSpace,
    /// A write to the log is reported done and never arrives.
    LostLogWrite,
    /// A write to the log arrives at another place.
    MisdirectedLogWrite,
    /// A bit of the log flips.
    RottenLog,
    /// A write to the backing is reported done and never arrives.
    LostBackingWrite,
    /// A write to the backing arrives at another place.
    MisdirectedBackingWrite,
    /// A bit of the backing flips.
    RottenBacking,
    /// A flush that does nothing is reported done.
    LyingFlush,
    /// A connection is reset.
    Reset,
    /// Nothing passes between two nodes for a while.
    Partition,
    /// Nothing passes in one direction for a while.
    OneWay,
    /// A link has little bandwidth for a while.
    SlowLink,
    /// Nobody reaches a copy for a while, which is promoted meanwhile.
    Isolate,
    /// The primary loses power, and nobody reaches it for a while.
    CutOff,
    /// A frame of a session is lost.
    LostFrame,
    /// A frame of a session arrives twice.
    DoubledFrame,
    /// A frame of a session is overtaken.
    OvertakenFrame,
    /// A byte of a frame is changed on its way.
    CorruptFrame,
    /// The wall clock of a node is set.
    ClockJump,
    /// The primary is replaced, dead or not.
    FailOver,
    /// The primary is told to step down.
    Demote,
    /// The tail of a former primary is not saved.
    UnsavedFork,
    /// A node is told to flush or to drain.
    Drain,
    /// A replica is made anew.
    Wipe,
    /// A node is stopped in good order.
    Stop,
    /// A node joins the volume.
    AddPeer,
    /// A replica leaves it.
    RemovePeer,
    /// A node joins in the place of one that leaves.
    ReplacePeer,
}

impl Fault {
    /// How many kinds there are.
    pub const KINDS: usize = Self::ReplacePeer as usize + 1;

    /// All of them.
    pub const ALL: [Self; Self::KINDS] = [
        Self::Crash,
        Self::CrashAfterChange,
        Self::CrashInSuperblock,
        Self::CrashInTruncation,
        Self::CutRecovery,
        Self::IoError,
        Self::NoSpace,
        Self::LostLogWrite,
        Self::MisdirectedLogWrite,
        Self::RottenLog,
        Self::LostBackingWrite,
        Self::MisdirectedBackingWrite,
        Self::RottenBacking,
        Self::LyingFlush,
        Self::Reset,
        Self::Partition,
        Self::OneWay,
        Self::SlowLink,
        Self::Isolate,
        Self::CutOff,
        Self::LostFrame,
        Self::DoubledFrame,
        Self::OvertakenFrame,
        Self::CorruptFrame,
        Self::ClockJump,
        Self::FailOver,
        Self::Demote,
        Self::UnsavedFork,
        Self::Drain,
        Self::Wipe,
        Self::Stop,
        Self::AddPeer,
        Self::RemovePeer,
        Self::ReplacePeer,
    ];
}

/// A fault that happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Happened {
    /// Its number in the run.
    pub number: u64,
    /// When, in microseconds of the run.
    pub at_us: u64,
    /// Its kind.
    pub fault: Fault,
    /// Where, if at a node; else between nodes.
    pub node: Option<usize>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Faults {
    asked: u64,
    keep: Option<BTreeSet<u64>>,
    /// What happened so far.
    pub(crate) happened: Vec<Happened>,
}

impl Faults {
    /// All faults, or only those with these numbers.
    #[must_use]
    pub(crate) fn new(keep: Option<&[u64]>) -> Self {
        Self {
            asked: 0,
            keep: keep.map(|numbers| numbers.iter().copied().collect()),
            happened: Vec::new(),
        }
    }

    /// Whether a fault happens.
    pub(crate) fn happens(&mut self, fault: Fault, now: u64, node: Option<usize>) -> bool {
        let number = self.asked;
        self.asked += 1;
        let kept = self.keep.as_ref().is_none_or(|keep| keep.contains(&number));
        if kept {
            self.happened.push(Happened {
                number,
                at_us: now / 1000,
                fault,
                node,
            });
        }
        kept
    }
}
