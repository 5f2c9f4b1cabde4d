//! Planted bugs, for the simulator to find: a checker that finds none of them proves nothing.
//!
//! **Invariant:** without the feature `mutants`, which only daemons under test are built with,
//! every question here is the constant `false` and costs nothing.

/// A bug that can be switched on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Mutant {
    /// The backing is not flushed before the checkpoint is recorded.
    NoFlushBeforeCheckpoint = 1,
    /// A flush completes when its epoch is sealed.
    AckBeforeLog,
    /// Slots are freed when their sweep begins.
    FreeSlotsEarly,
    /// A lower term replaces a higher one.
    AcceptLowerTerm,
    /// A replica forgets the last block of an epoch.
    ApplyHalfAnEpoch,
    /// Recovery does not check payload.
    IgnorePayloadCrc,
    /// The last block of an epoch is missing from its frame.
    LoseLastRecord,
    /// Recovery forgets zeroed extents.
    ForgetTrimInRecovery,
    /// Epochs are written without a flush.
    NoLogFlush,
    /// An epoch counts as durable although the one before it is not.
    DurableOutOfOrder,
    /// Frames of a new session may reach the medium before the superblock that names it.
    FramesBeforeSession,
    /// The superblock is written without a flush.
    NoSuperblockFlush,
    /// Every superblock goes into the same slot.
    OneSuperblockSlot,
    /// Log space is reused before the superblock lets go of it.
    FreeLogEarly,
    /// A replica destages what is not anchored.
    DestageUnanchored,
    /// A primary announces what it sealed, before it is durable.
    AnchorBeforeDurable,
    /// A write onto a block zeroed in the same epoch keeps what was below the zeroes.
    ForgetZeroesUnderWrite,
    /// Blocks of sealed epochs are overwritten in place.
    OverwriteSealed,
    /// A copy that is not usable acknowledges.
    AckUnusableCopy,
    /// A full copy goes on wherever the primary begins.
    ResumeCopyAnywhere,
    /// A full copy counts as usable with its last piece.
    UsableTooEarly,
    /// A node writes in a term before the term is durable.
    WriteBeforeTerm,
    /// A flush does not count writes of the open epoch.
    FlushForgetsOpenEpoch,
    /// A sweep writes what is newer than its cut.
    SweepBeyondCut,
    /// A failed operation counts as done.
    IgnoreErrors,
    /// Heads of frames are never freed.
    LeakHeads,
    /// An acknowledgement of another history still counts.
    KeepProgress,
    /// A sweep forgets to write zeroes.
    SweepForgetsZeroes,
    /// A replica destages what is anchored but not proven.
    DestageUnproven,
    /// Log is reused before it is proven.
    ForgetUnproven,
    /// The shadow is switched in without having been flushed.
    ShadowNotFlushed,
    /// A shadow is switched in although what it replaces was not saved.
    SwitchForgetsFork,
    /// A peer is let go although the others do not have what it acknowledged.
    LetGoAtOnce,
    /// A peer that is about to be let go still acknowledges.
    LeavingCounts,
    /// What a peer acknowledged still counts when it is gone.
    PlaceKeepsProgress,
    /// Blocks are written in part although their physical sectors are larger.
    SweepUnmerged,
    /// Such blocks are written in place before the merge area is flushed.
    MergeNotFlushed,
    /// The merge area is written over before what it protects was flushed.
    MergeReusedEarly,
    /// Recovery does not look into the merge area.
    MergeNotRestored,
    /// A copy for which trees were compared begins where the backing is by then.
    CopyFromCheckpoint,
    /// The last part that differs is left out.
    SkipLastDifference,
    /// A full copy does not wait at a block that is known to be damaged.
    CopyDamaged,
    /// A block that is known to be damaged is read all the same.
    ServeDamaged,
    /// A read whose blocks were not what their leaves say is answered with them.
    ServeUnchecked,
    /// A full copy is flushed, and its progress recorded, while pieces are being written.
    CopyFlushesEarly,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Self; 45] = [
        Self::NoFlushBeforeCheckpoint,
        Self::AckBeforeLog,
        Self::FreeSlotsEarly,
        Self::AcceptLowerTerm,
        Self::ApplyHalfAnEpoch,
        Self::IgnorePayloadCrc,
        Self::LoseLastRecord,
        Self::ForgetTrimInRecovery,
        Self::NoLogFlush,
        Self::DurableOutOfOrder,
        Self::FramesBeforeSession,
        Self::NoSuperblockFlush,
        Self::OneSuperblockSlot,
        Self::FreeLogEarly,
        Self::DestageUnanchored,
        Self::AnchorBeforeDurable,
        Self::ForgetZeroesUnderWrite,
        Self::OverwriteSealed,
        Self::AckUnusableCopy,
        Self::ResumeCopyAnywhere,
        Self::UsableTooEarly,
        Self::WriteBeforeTerm,
        Self::FlushForgetsOpenEpoch,
        Self::SweepBeyondCut,
        Self::IgnoreErrors,
        Self::LeakHeads,
        Self::KeepProgress,
        Self::SweepForgetsZeroes,
        Self::DestageUnproven,
        Self::ForgetUnproven,
        Self::ShadowNotFlushed,
        Self::SwitchForgetsFork,
        Self::LetGoAtOnce,
        Self::LeavingCounts,
        Self::PlaceKeepsProgress,
        Self::SweepUnmerged,
        Self::MergeNotFlushed,
        Self::MergeReusedEarly,
        Self::MergeNotRestored,
        Self::CopyFromCheckpoint,
        Self::SkipLastDifference,
        Self::CopyDamaged,
        Self::ServeDamaged,
        Self::ServeUnchecked,
        Self::CopyFlushesEarly,
    ];
}

#[cfg(feature = "mutants")]
static SELECTED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// Switches one bug on, and all others off; for the whole process.
#[cfg(feature = "mutants")]
pub fn select(mutant: Option<Mutant>) {
    let number = mutant.map_or(0, |mutant| mutant as u32);
    SELECTED.store(number, std::sync::atomic::Ordering::Relaxed);
}

/// The bug of that name, spelled as above.
#[cfg(feature = "mutants")]
#[must_use]
pub fn named(name: &str) -> Option<Mutant> {
    Mutant::ALL
        .into_iter()
        .find(|mutant| format!("{mutant:?}") == name)
}

/// Whether a bug is switched on.
#[cfg(feature = "mutants")]
pub(super) fn planted(mutant: Mutant) -> bool {
    SELECTED.load(std::sync::atomic::Ordering::Relaxed) == mutant as u32
}

/// Whether a bug is switched on: never.
#[cfg(not(feature = "mutants"))]
pub(super) const fn planted(_: Mutant) -> bool {
    false
}
