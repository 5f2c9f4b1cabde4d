//! The overlay: the newest contents of every block that differs from the backing, in slots.
//!
//! A block has a chain of versions, newest first, at most one an epoch. A version of the open epoch
//! may be overwritten in place; a version of a sealed epoch is immutable until the epoch has been
//! destaged. Each version says by a mask which of its eight sectors it holds, so that a 512-byte
//! write never reads before it is acknowledged.
//!
//! Whole blocks that were zeroed or trimmed are extents beside the versions; what is newer by epoch
//! counts. Within one epoch a block is either in the extents or has a version, never both: a write
//! onto a block zeroed in the same epoch becomes a full version.
//!
//! Not here: when epochs close, the log, the devices.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

use hn4::types::{BlockIndex, Epoch, SECTORS_PER_BLOCK};

use super::extents::ExtentMap;
use super::mutants::{Mutant, planted};
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// Which sectors of a block; bit 0 is the first.
pub type Mask = u8;

/// All sectors of a block.
pub const FULL: Mask = 0xFF;

const SECTOR: usize = 512;
const _: () = assert!(SLOT_BYTES == SECTOR * 8 && SECTORS_PER_BLOCK == 8);

/// Sectors `[from, to)` of a block.
#[must_use]
pub fn mask(from: u32, to: u32) -> Mask {
    debug_assert!(from < to && to <= 8, "sector range {from}..{to}");
    (FULL << from) & (FULL >> (8 - to))
}

/// The runs of neighbouring sectors in a mask, as byte ranges of a slot.
pub fn runs(mask: Mask) -> impl Iterator<Item = Range<usize>> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let start = rest.trailing_zeros();
        let length = (rest >> start).trailing_ones();
        rest &= !self::mask(start, start + length);
        let (start, length) = (start as usize, length as usize);
        Some(start * SECTOR..(start + length) * SECTOR)
    })
}

/// How zeroed blocks are to be treated below.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Zeroed {
    /// The epoch that zeroed them.
    pub epoch: Epoch,
    /// Their space may be given back.
    pub trim: bool,
}

/// A block's contents in one epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyBlock {
    /// The block.
    pub block: BlockIndex,
    /// Where its contents are.
    pub slot: SlotId,
    /// Which sectors.
    pub mask: Mask,
}

/// Where some sectors of a block come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece {
    /// From a slot.
    Slot(SlotId, Mask),
    /// They are zero.
    Zero(Mask),
}

#[derive(Clone, Copy, Debug)]
struct Version {
    epoch: Epoch,
    mask: Mask,
    older: Option<SlotId>,
}

const NO_VERSION: Version = Version {
    epoch: Epoch(0),
    mask: 0,
    older: None,
};

/// Blocks are drawn by clients of one volume, who can only hurt themselves with collisions; a
/// multiplication spreads them well enough, and equal runs get equal tables (P11).
#[derive(Clone, Copy, Default, Debug)]
struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// The dirty part of a volume.
#[derive(Debug)]
pub struct Overlay {
    heads: HashMap<u64, SlotId, BuildHasherDefault<BlockHasher>>,
    /// By slot.
    versions: Box<[Version]>,
    /// Blocks that got a version in the open epoch. May name blocks that were zeroed later.
    open_blocks: Vec<u64>,
    /// Blocks zeroed in the open epoch; the value tells whether they are trimmed.
    open_zeros: ExtentMap<bool>,
    /// The newest zeroing of every block, all epochs.
    zeros: ExtentMap<Zeroed>,
    /// Versions held, which is slots in use.
    held: usize,
    open_held: usize,
}

impl Overlay {
    /// An empty overlay over an arena of so many slots.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self {
            heads: HashMap::with_capacity_and_hasher(slots, BuildHasherDefault::default()),
            versions: vec![NO_VERSION; slots].into_boxed_slice(),
            open_blocks: Vec::with_capacity(slots),
            open_zeros: ExtentMap::new(),
            zeros: ExtentMap::new(),
            held: 0,
            open_held: 0,
        }
    }

    /// Slots that hold dirty data.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Slots that hold data of the open epoch.
    #[must_use]
    pub fn open_held(&self) -> usize {
        self.open_held
    }

    /// Whether the open epoch has changed nothing.
    #[must_use]
    pub fn open_is_empty(&self) -> bool {
        self.open_held == 0 && self.open_zeros.is_empty()
    }

    /// Extents of zeroed blocks that are remembered.
    #[must_use]
    pub fn zero_extents(&self) -> usize {
        self.zeros.len().max(self.open_zeros.len())
    }

    /// Takes a slot with new contents of some sectors of a block into the open epoch.
    pub fn insert(
        &mut self,
        mem: &mut dyn SlotMemory,
        open: Epoch,
        block: BlockIndex,
        slot: SlotId,
        mask: Mask,
    ) {
        let mut mask = mask;
        let head = self.heads.get(&block.0).copied();
        let is_open = |old: &SlotId| {
            self.versions[old.index()].epoch == open || planted(Mutant::OverwriteSealed)
        };
        if let Some(old) = head.filter(is_open) {
            self.replace(mem, block, old, slot, mask);
            return;
        }
        for hole in runs(!mask) {
            mem.bytes_mut(slot)[hole].fill(0);
        }
        if self.open_zeros.get(block.0).is_some() {
            self.open_zeros.remove(block.0..block.0 + 1);
            if !planted(Mutant::ForgetZeroesUnderWrite) {
                mask = FULL;
            }
        }
        self.push(block, DirtyBlock { block, slot, mask }, open);
        self.open_blocks.push(block.0);
        self.open_held += 1;
    }

    fn push(&mut self, block: BlockIndex, dirty: DirtyBlock, epoch: Epoch) {
        let older = self.heads.insert(block.0, dirty.slot);
        self.versions[dirty.slot.index()] = Version {
            epoch,
            mask: dirty.mask,
            older,
        };
        self.held += 1;
    }

    fn replace(
        &mut self,
        mem: &mut dyn SlotMemory,
        block: BlockIndex,
        old: SlotId,
        new: SlotId,
        mask: Mask,
    ) {
        let before = self.versions[old.index()];
        if before.mask & !mask == 0 {
            for hole in runs(!mask) {
                mem.bytes_mut(new)[hole].fill(0);
            }
            self.versions[new.index()] = Version { mask, ..before };
            self.heads.insert(block.0, new);
            mem.free(old);
        } else {
            for run in runs(mask) {
                let start = run.start;
                mem.copy(new, run, old, start);
            }
            self.versions[old.index()].mask |= mask;
            mem.free(new);
        }
    }

    /// Zeroes whole blocks in the open epoch.
    pub fn zero(
        &mut self,
        mem: &mut dyn SlotMemory,
        open: Epoch,
        blocks: Range<BlockIndex>,
        trim: bool,
    ) {
        let range = blocks.start.0..blocks.end.0;
        if range.is_empty() {
            return;
        }
        let count = range.end - range.start;
        if count <= self.open_blocks.len() as u64 {
            for block in range.clone() {
                self.drop_open_version(mem, open, block);
            }
        } else {
            for index in 0..self.open_blocks.len() {
                let block = self.open_blocks[index];
                if range.contains(&block) {
                    self.drop_open_version(mem, open, block);
                }
            }
        }
        self.open_zeros.insert(range.clone(), trim);
        self.zeros.insert(range, Zeroed { epoch: open, trim });
    }

    fn drop_open_version(&mut self, mem: &mut dyn SlotMemory, open: Epoch, block: u64) {
        let Some(&head) = self.heads.get(&block) else {
            return;
        };
        let version = self.versions[head.index()];
        if version.epoch != open {
            return;
        }
        match version.older {
            Some(older) => self.heads.insert(block, older),
            None => self.heads.remove(&block),
        };
        mem.free(head);
        self.held -= 1;
        self.open_held -= 1;
    }

    /// Closes the open epoch: its blocks in ascending order, and the blocks it zeroed.
    pub fn seal(&mut self, open: Epoch) -> (Vec<DirtyBlock>, Vec<(Range<u64>, bool)>) {
        self.open_blocks.sort_unstable();
        self.open_blocks.dedup();
        let mut blocks = Vec::with_capacity(self.open_held);
        for &block in &self.open_blocks {
            // Blocks that were zeroed later in the epoch have no version of it any more.
            if let Some(&slot) = self.heads.get(&block)
                && self.versions[slot.index()].epoch == open
            {
                let mask = self.versions[slot.index()].mask;
                blocks.push(DirtyBlock {
                    block: BlockIndex(block),
                    slot,
                    mask,
                });
            }
        }
        assert_eq!(
            blocks.len(),
            self.open_held,
            "every open version is in the open list"
        );
        let zeros = self.open_zeros.iter().collect();
        self.open_blocks.clear();
        self.open_zeros.clear();
        self.open_held = 0;
        (blocks, zeros)
    }

    /// Forgets the open epoch. The map of newest zeroings is to be rebuilt by the caller.
    pub fn discard_open(&mut self, mem: &mut dyn SlotMemory, open: Epoch) {
        for block in std::mem::take(&mut self.open_blocks) {
            self.drop_open_version(mem, open, block);
        }
        self.open_zeros.clear();
    }

    /// Takes an epoch that was sealed elsewhere: by a primary, or before a restart. Must be newer
    /// than everything here.
    pub fn adopt(&mut self, epoch: Epoch, blocks: &[DirtyBlock], zeros: &[(Range<u64>, bool)]) {
        debug_assert!(
            self.open_is_empty(),
            "only a copy without an open epoch adopts one"
        );
        for dirty in blocks {
            self.push(dirty.block, *dirty, epoch);
        }
        for (range, trim) in zeros {
            self.zeros
                .insert(range.clone(), Zeroed { epoch, trim: *trim });
        }
    }

    /// Finds where the wanted sectors of a block come from and returns those that the overlay does
    /// not have, which are the backing's.
    pub fn resolve(&self, block: BlockIndex, wanted: Mask, mut piece: impl FnMut(Piece)) -> Mask {
        let zeroed = self.zeros.get(block.0).map(|zeroed| zeroed.epoch);
        self.walk(block, wanted, None, zeroed, &mut piece)
    }

    /// Like [`Self::resolve`] for the state at the cut. `zeroed` is the newest epoch up to the cut
    /// that zeroed the block; zeroed sectors are reported as the backing's, since a sweep zeroes
    /// extents before it writes blocks.
    pub fn resolve_at(
        &self,
        block: BlockIndex,
        cut: Epoch,
        zeroed: Option<Epoch>,
        mut slot: impl FnMut(SlotId, Mask),
    ) {
        self.walk(block, FULL, Some(cut), zeroed, &mut |piece| {
            if let Piece::Slot(id, mask) = piece {
                slot(id, mask);
            }
        });
    }

    /// Blocks of a range that have versions, in no order. Looks at each block of the range, or at
    /// each that it has, whichever are fewer.
    pub fn versions_in(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let has_few = (self.heads.len() as u64) < range.end - range.start;
        let own = self.heads.keys().take(if has_few { usize::MAX } else { 0 });
        let own = own.copied().filter({
            let range = range.clone();
            move |block| range.contains(block)
        });
        let asked = if has_few { 0..0 } else { range };
        let asked = asked.filter(|block| self.heads.contains_key(block));
        own.chain(asked)
    }

    /// Zeroed extents of a range, ascending. What has versions besides may be newer.
    pub fn zeros_in(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Zeroed)> + '_ {
        self.zeros.within(range)
    }

    /// Whether what it has up to the cut is all of a block.
    pub fn covers(&self, block: BlockIndex, cut: Epoch) -> bool {
        let zeroed = self.zeros.get(block.0).map(|zeroed| zeroed.epoch);
        let zeroed = zeroed.filter(|epoch| *epoch <= cut);
        self.walk(block, FULL, Some(cut), zeroed, &mut |_| {}) == 0
    }

    fn walk(
        &self,
        block: BlockIndex,
        wanted: Mask,
        cut: Option<Epoch>,
        zeroed: Option<Epoch>,
        piece: &mut dyn FnMut(Piece),
    ) -> Mask {
        let mut rest = wanted;
        let mut next = self.heads.get(&block.0).copied();
        while let Some(slot) = next.filter(|_| rest != 0) {
            let version = self.versions[slot.index()];
            next = version.older;
            if cut.is_some_and(|cut| version.epoch > cut) {
                continue;
            }
            if zeroed.is_some_and(|zeroed| zeroed > version.epoch) {
                break;
            }
            let hit = version.mask & rest;
            if hit != 0 {
                piece(Piece::Slot(slot, hit));
                rest &= !hit;
            }
        }
        if rest != 0 && zeroed.is_some() {
            piece(Piece::Zero(rest));
            return 0;
        }
        rest
    }

    /// Frees the versions of a block up to and including an epoch that has been destaged.
    pub fn release(&mut self, mem: &mut dyn SlotMemory, block: BlockIndex, destaged: Epoch) {
        let Some(&head) = self.heads.get(&block.0) else {
            return;
        };
        let mut newer = None;
        let mut next = Some(head);
        while let Some(slot) = next {
            let version = self.versions[slot.index()];
            next = version.older;
            if version.epoch <= destaged {
                self.versions[slot.index()] = NO_VERSION;
                mem.free(slot);
                self.held -= 1;
            } else {
                newer = Some(slot);
            }
        }
        // Chains are sorted by epoch: what was freed is the old end.
        match newer {
            Some(slot) => self.versions[slot.index()].older = None,
            None => {
                self.heads.remove(&block.0);
            }
        }
    }

    /// Forgets zeroed extents up to and including an epoch that has been destaged.
    pub fn release_zeros(&mut self, destaged: Epoch) {
        self.zeros.retain(|zeroed| zeroed.epoch > destaged);
    }

    /// Drops a block's versions of epochs after `last`; for a replica's unanchored tail.
    pub fn truncate(&mut self, mem: &mut dyn SlotMemory, block: BlockIndex, last: Epoch) {
        while let Some(&head) = self.heads.get(&block.0) {
            let version = self.versions[head.index()];
            if version.epoch <= last {
                return;
            }
            match version.older {
                Some(older) => self.heads.insert(block.0, older),
                None => self.heads.remove(&block.0),
            };
            self.versions[head.index()] = NO_VERSION;
            mem.free(head);
            self.held -= 1;
        }
    }

    /// Builds the map of newest zeroings anew, from the epochs that are left after a truncation.
    pub fn rebuild_zeros<'a>(
        &mut self,
        epochs: impl Iterator<Item = (Epoch, &'a [(Range<u64>, bool)])>,
    ) {
        self.zeros.clear();
        for (epoch, zeros) in epochs {
            for (range, trim) in zeros {
                self.zeros
                    .insert(range.clone(), Zeroed { epoch, trim: *trim });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::VecArena;

    const B: BlockIndex = BlockIndex(5);

    fn filled(mem: &mut VecArena, byte: u8) -> SlotId {
        let slot = mem.alloc().expect("room");
        mem.bytes_mut(slot).fill(byte);
        slot
    }

    /// What a reader would see of the block's sectors; `None` is the backing's.
    fn view(overlay: &Overlay, mem: &VecArena) -> [Option<u8>; 8] {
        let mut seen = [None; 8];
        overlay.resolve(B, FULL, |piece| {
            let (mask, byte) = match piece {
                Piece::Slot(slot, mask) => (mask, Some(slot)),
                Piece::Zero(mask) => (mask, None),
            };
            for (sector, cell) in seen.iter_mut().enumerate() {
                if mask >> sector & 1 == 1 {
                    *cell = Some(byte.map_or(0, |slot| mem.bytes(slot)[sector * 512]));
                }
            }
        });
        seen
    }

    #[test]
    fn masks_split_into_runs() {
        let found: Vec<_> = runs(0b1011_0001).collect();
        assert_eq!(found, vec![0..512, 4 * 512..6 * 512, 7 * 512..4096]);
        assert_eq!(mask(0, 8), FULL);
        assert_eq!(mask(2, 3), 0b100);
    }

    #[test]
    fn newest_sector_wins_across_epochs_and_a_sealed_slot_never_changes() {
        let mut mem = VecArena::new(8);
        let mut overlay = Overlay::new(8);
        let first = filled(&mut mem, 1);
        overlay.insert(&mut mem, Epoch(1), B, first, FULL);
        let (blocks, _) = overlay.seal(Epoch(1));
        assert_eq!(
            blocks,
            vec![DirtyBlock {
                block: B,
                slot: first,
                mask: FULL
            }]
        );
        let second = filled(&mut mem, 2);
        overlay.insert(&mut mem, Epoch(2), B, second, mask(3, 5));
        assert_eq!(
            view(&overlay, &mem).map(|byte| byte.unwrap_or(99)),
            [1, 1, 1, 2, 2, 1, 1, 1]
        );
        assert!(mem.bytes(first).iter().all(|&byte| byte == 1));
        overlay.release(&mut mem, B, Epoch(1));
        assert_eq!(
            view(&overlay, &mem)[0],
            None,
            "destaged sectors are the backing's"
        );
        assert_eq!(view(&overlay, &mem)[3], Some(2));
    }

    #[test]
    fn zeroing_hides_older_versions_and_a_later_write_shows_again() {
        let mut mem = VecArena::new(8);
        let mut overlay = Overlay::new(8);
        let first = filled(&mut mem, 1);
        overlay.insert(&mut mem, Epoch(1), B, first, FULL);
        overlay.seal(Epoch(1));
        overlay.zero(&mut mem, Epoch(2), BlockIndex(0)..BlockIndex(1 << 30), true);
        assert_eq!(view(&overlay, &mem), [Some(0); 8]);
        let third = filled(&mut mem, 3);
        overlay.insert(&mut mem, Epoch(2), B, third, mask(0, 1));
        let (blocks, zeros) = overlay.seal(Epoch(2));
        assert_eq!(
            blocks[0].mask, FULL,
            "a write onto a zeroed block of its epoch fills it"
        );
        assert_eq!(zeros, vec![(0..5, true), (6..1 << 30, true)]);
        assert_eq!(view(&overlay, &mem)[..2], [Some(3), Some(0)]);
    }

    #[test]
    fn a_block_zeroed_after_a_write_of_the_same_epoch_leaves_no_record_and_no_slot() {
        let mut mem = VecArena::new(4);
        let mut overlay = Overlay::new(4);
        let slot = filled(&mut mem, 1);
        overlay.insert(&mut mem, Epoch(1), B, slot, FULL);
        overlay.zero(&mut mem, Epoch(1), B..BlockIndex(6), false);
        assert_eq!(mem.free_slots(), 4);
        let (blocks, zeros) = overlay.seal(Epoch(1));
        assert!(blocks.is_empty());
        assert_eq!(zeros, vec![(5..6, false)]);
    }

    #[test]
    fn the_state_at_a_cut_ignores_newer_epochs() {
        let mut mem = VecArena::new(4);
        let mut overlay = Overlay::new(4);
        for epoch in 1..=3 {
            let slot = filled(&mut mem, u8::try_from(epoch).expect("small"));
            overlay.insert(&mut mem, Epoch(epoch), B, slot, FULL);
            overlay.seal(Epoch(epoch));
        }
        let mut seen = Vec::new();
        overlay.resolve_at(B, Epoch(2), None, |slot, _| seen.push(mem.bytes(slot)[0]));
        assert_eq!(seen, vec![2]);
        overlay.truncate(&mut mem, B, Epoch(1));
        assert_eq!(view(&overlay, &mem)[0], Some(1));
    }
}
