//! Writing blocks in place, on disks that may damage what lies beside a write.
//!
//! A disk whose physical sector is larger than its logical one merges a smaller write with what it
//! holds. If the power fails meanwhile, sectors beside it that nobody wrote may be damaged, and the
//! log does not have them. So blocks of which only a part is to be written are merged here first:
//! read, completed, and written whole into the merge area of this copy's log, which is flushed;
//! only then they are written in place, whole. The area takes a few blocks at a time; before a
//! batch replaces the one before it, the backing is flushed. Recovery writes a batch that may be
//! needed over the backing before anything else is done with it.
//!
//! The area is local. A replica must not append to its log, which is its primary's byte for byte;
//! a log that is full has no room; and a peer's disk may have other sectors. None of that matters
//! to it. Whoever writes whole blocks, or blocks that the same sweep zeroes first, never comes
//! here.
//!
//! **Invariants:**
//! - a block that is written in part is in the area, durably, from before its write until the flush
//!   behind that write, unless it cannot be read: then no sector beside it can be lost any more;
//! - a batch counts only while what it belongs to is under way: the era in the superblock, and the
//!   checkpoint or the kind of copy, say so.

use hn4::log::{
    CopyState, LogIdentity, MERGE_AREA, MERGE_BLOCKS, MergeHead, MergeUse, MergedBlock, Superblock,
};
use hn4::types::{BLOCK_BYTES, BlockIndex};

use super::event::{Action, Actions, Disk, Io, IoToken, Seg};
use super::journal::WRITE_SLOTS;
use super::mutants::{Mutant, planted};
use super::recovery::{AlignedBlock, Medium, RecoveryError};
use super::volume::Volume;
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// A block that could not be read so often is written without being merged.
const READS: u8 = 3;
const WHOLE: u16 = 4096;
const _: () = assert!(WHOLE as usize == SLOT_BYTES && BLOCK_BYTES == WHOLE as u64);

/// The memory of the merge area; taken for good.
#[derive(Debug)]
pub(super) struct Merge {
    identity: LogIdentity,
    head: SlotId,
    images: [SlotId; MERGE_BLOCKS],
    /// What the batch in the area protects may not be on the medium yet.
    unflushed: bool,
}

impl Merge {
    /// Takes its slots, if there are enough.
    pub(super) fn new(identity: LogIdentity, mem: &mut dyn SlotMemory) -> Option<Self> {
        let head = mem.alloc()?;
        let mut images = [head; MERGE_BLOCKS];
        for image in &mut images {
            *image = mem.alloc()?;
        }
        Some(Self {
            identity,
            head,
            images,
            unflushed: false,
        })
    }

    /// The backing was flushed, and nothing was written to it since that flush began.
    pub(super) fn flushed(&mut self) {
        self.unflushed = false;
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// The next batch is to be chosen.
    Choose,
    /// The backing is being flushed, so that the area may be written over.
    Flush,
    Read,
    /// The area is being written.
    Save,
    Place,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Image {
    /// So many reads have failed.
    Wanted(u8),
    Reading(u8),
    There,
    Unreadable,
}

/// Parts of blocks on their way to the backing.
#[derive(Debug)]
pub(super) struct Placing {
    merge_use: MergeUse,
    /// Of the writes in place.
    token: IoToken,
    pub(super) depth: usize,
    /// Byte offset on the backing and where the contents are.
    parts: Vec<(u64, Seg)>,
    /// Where in `parts` the blocks begin that must be merged.
    partial: Vec<usize>,
    /// The part that is written next, and the first one that is not of this batch.
    next: usize,
    until: usize,
    /// The first of `partial` that is not written yet, and of this batch the first and the one
    /// after the last.
    next_partial: usize,
    batch: std::ops::Range<usize>,
    images: [Image; MERGE_BLOCKS],
    stage: Stage,
    in_flight: usize,
}

impl Placing {
    /// Nothing yet.
    #[must_use]
    pub(super) fn new(merge_use: MergeUse, token: IoToken, depth: usize) -> Self {
        Self {
            merge_use,
            token,
            depth,
            parts: Vec::new(),
            partial: Vec::new(),
            next: 0,
            until: 0,
            next_partial: 0,
            batch: 0..0,
            images: [Image::Wanted(0); MERGE_BLOCKS],
            stage: Stage::Choose,
            in_flight: 0,
        }
    }

    /// Room for the parts of so many whole blocks.
    pub(super) fn reserve(&mut self, blocks: usize) {
        self.parts.reserve(blocks);
    }

    /// Adds what is to be written of one block, ascending. `merges`: if it is not all of it, what
    /// lies beside it must not be lost.
    pub(super) fn add(&mut self, parts: impl Iterator<Item = (u64, Seg)>, merges: bool) {
        let start = self.parts.len();
        self.parts.extend(parts);
        self.parts[start..].sort_unstable_by_key(|&(offset, _)| offset);
        if merges && !planted(Mutant::SweepUnmerged) {
            let bytes = |&(_, seg): &(u64, Seg)| seg.bytes;
            let bytes: u16 = self.parts[start..].iter().map(bytes).sum();
            if bytes != 0 && bytes != WHOLE {
                self.partial.push(start);
            }
        }
    }

    /// Byte offset and contents of what is written; parts of a block stand together.
    pub(super) fn parts(&self) -> &[(u64, Seg)] {
        &self.parts
    }

    /// How many of its parts were handed to the device, of how many.
    pub(super) fn progress(&self) -> (usize, usize) {
        (self.next, self.parts.len())
    }

    /// Takes a completion; [`Self::advance`] is to follow.
    pub(super) fn io_done(&mut self) {
        assert!(
            self.in_flight > 0,
            "completions come from operations that are on their way"
        );
        self.in_flight -= 1;
    }

    fn read_done(&mut self, index: u8, ok: bool) {
        self.io_done();
        let image = &mut self.images[usize::from(index)];
        *image = match *image {
            _ if ok => Image::There,
            Image::Reading(failed) if failed + 1 < READS => Image::Wanted(failed + 1),
            _ => Image::Unreadable,
        };
    }

    /// Starts as many operations as the depth allows. Whether all is written, though not flushed.
    pub(super) fn advance(
        &mut self,
        merge: &mut Option<Merge>,
        era: Option<u64>,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) -> bool {
        loop {
            match (self.stage, merge.as_ref()) {
                (Stage::Read, Some(merge)) => self.issue_reads(merge, out),
                (Stage::Place, _) => self.issue_writes(merge.as_ref(), out),
                _ => {}
            }
            if self.in_flight > 0 {
                return false;
            }
            self.stage = match (self.stage, merge.as_mut()) {
                (Stage::Done, _) => return true,
                (Stage::Choose, Some(merge)) => {
                    self.choose();
                    match () {
                        () if self.next == self.parts.len() => Stage::Done,
                        () if self.batch.is_empty() => Stage::Place,
                        () if merge.unflushed && !planted(Mutant::MergeReusedEarly) => {
                            self.flush(out);
                            Stage::Flush
                        }
                        () => Stage::Read,
                    }
                }
                (Stage::Choose, None) => {
                    // Nobody asked for anything to be merged.
                    self.until = self.parts.len();
                    Stage::Place
                }
                (Stage::Flush, merge) => {
                    merge.into_iter().for_each(Merge::flushed);
                    Stage::Read
                }
                (Stage::Read, Some(merge)) => {
                    self.save(merge, era, mem, out);
                    Stage::Save
                }
                (Stage::Save | Stage::Read, _) => Stage::Place,
                (Stage::Place, _) if self.next == self.parts.len() => Stage::Done,
                (Stage::Place, _) => Stage::Choose,
            };
        }
    }

    /// The next batch: all parts up to the first one of a block for which there is no room in the
    /// area.
    fn choose(&mut self) {
        let start = self.next_partial;
        let end = self.partial.len().min(start + MERGE_BLOCKS);
        self.batch = start..end;
        self.until = self.partial.get(end).map_or(self.parts.len(), |&at| at);
        self.images = [Image::Wanted(0); MERGE_BLOCKS];
    }

    fn flush(&mut self, out: &mut Actions) {
        self.in_flight += 1;
        let io = Io::Fsync {
            disk: Disk::Backing,
        };
        let token = IoToken::MergeFsync;
        out.push(Action::Io { token, io });
    }

    fn block(&self, partial: usize) -> BlockIndex {
        let (offset, _) = self.parts[self.partial[partial]];
        BlockIndex(offset / BLOCK_BYTES)
    }

    /// The parts of the block that begins here.
    fn parts_of(&self, start: usize) -> &[(u64, Seg)] {
        let block = |&(offset, _): &(u64, Seg)| offset / BLOCK_BYTES;
        let first = block(&self.parts[start]);
        let rest = &self.parts[start..];
        let count = rest.iter().take_while(|part| block(part) == first).count();
        &rest[..count]
    }

    fn issue_reads(&mut self, merge: &Merge, out: &mut Actions) {
        for index in 0..self.batch.len() {
            if self.in_flight >= self.depth {
                return;
            }
            let Image::Wanted(failed) = self.images[index] else {
                continue;
            };
            self.images[index] = Image::Reading(failed);
            self.in_flight += 1;
            let first = out.segs.len();
            out.segs.push(whole(merge.images[index]));
            let io = Io::Read {
                disk: Disk::Backing,
                offset: self.block(self.batch.start + index).lba().byte_offset(),
                segs: first..first + 1,
            };
            let token = IoToken::MergeRead(u8::try_from(index).expect("a batch is small"));
            out.push(Action::Io { token, io });
        }
    }

    /// Completes the blocks of the batch and writes them into the area.
    fn save(
        &mut self,
        merge: &mut Merge,
        era: Option<u64>,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        let mut blocks = Vec::with_capacity(self.batch.len());
        let first = out.segs.len();
        out.segs.push(whole(merge.head));
        for (index, partial) in self.batch.clone().enumerate() {
            if self.images[index] != Image::There {
                continue;
            }
            let image = merge.images[index];
            for &(_, seg) in self.parts_of(self.partial[partial]) {
                let from = usize::from(seg.offset);
                let range = from..from + usize::from(seg.bytes);
                mem.copy(seg.slot, range, image, from);
            }
            out.segs.push(whole(image));
            blocks.push(MergedBlock {
                block: self.block(partial),
                crc32c: crc32c::crc32c(mem.bytes(image)),
            });
        }
        if blocks.is_empty() {
            return;
        }
        let head = MergeHead {
            era: era.expect("an area that is used has an era"),
            merge_use: self.merge_use,
            blocks,
        };
        head.encode(&merge.identity, mem.bytes_mut(merge.head));
        merge.unflushed = true;
        self.in_flight += 1;
        let io = Io::Write {
            disk: Disk::Log,
            offset: MERGE_AREA,
            segs: first..out.segs.len(),
            then_fsync: !planted(Mutant::MergeNotFlushed),
        };
        let token = IoToken::MergeWrite;
        out.push(Action::Io { token, io });
    }

    fn issue_writes(&mut self, merge: Option<&Merge>, out: &mut Actions) {
        while self.in_flight < self.depth && self.next < self.until {
            let (offset, first_seg) = (self.piece(merge).0, out.segs.len());
            let mut end = offset;
            while self.next < self.until && out.segs.len() - first_seg < WRITE_SLOTS {
                let (at, seg, parts) = self.piece(merge);
                if at != end {
                    break;
                }
                out.segs.push(seg);
                end += u64::from(seg.bytes);
                self.next_partial += usize::from(self.is_partial());
                self.next += parts;
            }
            self.in_flight += 1;
            let io = Io::Write {
                disk: Disk::Backing,
                offset,
                segs: first_seg..out.segs.len(),
                then_fsync: false,
            };
            let token = self.token;
            out.push(Action::Io { token, io });
        }
    }

    /// Whether the next part is the first one of a block that must be merged.
    fn is_partial(&self) -> bool {
        self.partial.get(self.next_partial) == Some(&self.next)
    }

    /// What is written next: byte offset, contents, and how many parts that is.
    fn piece(&self, merge: Option<&Merge>) -> (u64, Seg, usize) {
        if self.is_partial()
            && let Some(merge) = merge
        {
            let index = self.next_partial - self.batch.start;
            if self.images[index] == Image::There {
                let offset = self.block(self.next_partial).lba().byte_offset();
                let parts = self.parts_of(self.next).len();
                return (offset, whole(merge.images[index]), parts);
            }
        }
        let (offset, seg) = self.parts[self.next];
        (offset, seg, 1)
    }
}

fn whole(slot: SlotId) -> Seg {
    Seg {
        slot,
        offset: 0,
        bytes: WHOLE,
    }
}

impl Volume {
    /// Whoever writes the backing now: a sweep or the shadow, never both.
    fn placing(&mut self) -> Option<&mut Placing> {
        let apply = self.replica.apply.as_mut();
        let apply = apply.and_then(|apply| apply.placing.as_mut());
        self.sweep
            .as_mut()
            .map(|sweep| &mut sweep.placing)
            .or(apply)
    }

    pub(super) fn merge_read_done(&mut self, index: u8, ok: bool) {
        if let Some(placing) = self.placing() {
            placing.read_done(index, ok);
        }
    }

    pub(super) fn merge_io_done(&mut self) {
        if let Some(placing) = self.placing() {
            placing.io_done();
        }
    }
}

/// Writes the batch in the merge area over the backing, if it may be needed. Returns how many
/// blocks that was.
pub(super) fn restore(
    log: &mut dyn Medium,
    backing: &mut dyn Medium,
    identity: &LogIdentity,
    superblock: &Superblock,
) -> Result<u64, RecoveryError> {
    let Some(era) = superblock.merge_era else {
        return Ok(0);
    };
    let mut area = [AlignedBlock([0; SLOT_BYTES]); 1 + MERGE_BLOCKS];
    let result = log.read(MERGE_AREA, &mut area);
    result.map_err(|source| RecoveryError::Io {
        doing: "reading",
        offset: MERGE_AREA,
        source,
    })?;
    let [head, images @ ..] = &area;
    let applying = matches!(superblock.copy, CopyState::Applying { .. });
    let is_needed = |head: &MergeHead| {
        let under_way = match head.merge_use {
            MergeUse::Sweep(cut) => !applying && cut > superblock.checkpoint,
            MergeUse::Shadow => applying,
        };
        under_way && head.era == era && !planted(Mutant::MergeNotRestored)
    };
    let head = MergeHead::decode(identity, &head.0).filter(is_needed);
    let blocks = head.map(|head| head.blocks).unwrap_or_default();
    let intact =
        |(merged, image): (&MergedBlock, &AlignedBlock)| crc32c::crc32c(&image.0) == merged.crc32c;
    if blocks.is_empty() || !blocks.iter().zip(images).all(intact) {
        // The batch before it was flushed in place, and this one had not been begun to be.
        return Ok(0);
    }
    for (merged, image) in blocks.iter().zip(images) {
        let offset = merged.block.lba().byte_offset();
        let written = backing.write(offset, std::slice::from_ref(image));
        written.map_err(|source| RecoveryError::Backing { offset, source })?;
    }
    let flushed = backing.flush();
    flushed.map_err(|source| RecoveryError::Backing { offset: 0, source })?;
    Ok(blocks.len() as u64)
}

/// Makes the area hold nothing that counts.
pub(super) fn clear(log: &mut dyn Medium) -> Result<(), RecoveryError> {
    let written = log.write(MERGE_AREA, &[AlignedBlock([0; SLOT_BYTES])]);
    written.map_err(|source| RecoveryError::Io {
        doing: "writing",
        offset: MERGE_AREA,
        source,
    })
}
