//! Blocks of the backing that are known not to be what was written there (P4).
//!
//! The state tree finds them. A read that needs one is never answered with what lies there: while
//! a good copy is being looked for it waits, and if there is none it fails. What the overlay holds
//! is good, so writers heal a block by writing it.
//!
//! Not here: finding damage and repairing it (`hn4_proof::tree`, `src/daemon/tree`).

use std::collections::BTreeMap;
use std::ops::Range;

use hn4::types::{BLOCK_BYTES, BlockIndex, Epoch, Lba, SECTORS_PER_BLOCK};

use super::event::{Actions, Failure, Now, RequestId, Time, TreeEvent};
use super::feed::Peer;
use super::mutants::{Mutant, planted};
use super::overlay::mask;
use super::volume::Volume;
use crate::arena::{SlotId, SlotMemory};

/// How long a read waits for a repair, at most; whoever repairs is expected to say sooner.
const PATIENCE_MS: u64 = 10_000;

/// What is done about a damaged block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damaged {
    /// A good copy is being looked for.
    Sought,
    /// There was none.
    Lost,
}

#[derive(Debug)]
struct Waiting {
    since: Time,
    id: RequestId,
    lba: Lba,
    sectors: u32,
    slots: Vec<SlotId>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Damage {
    blocks: BTreeMap<BlockIndex, Damaged>,
    waiting: Vec<Waiting>,
    /// Something has changed for those who wait.
    changed: bool,
}

impl Damage {
    pub(super) fn event(&mut self, event: &TreeEvent) {
        self.changed = true;
        match *event {
            TreeEvent::Damage(block, Some(damaged)) => _ = self.blocks.insert(block, damaged),
            TreeEvent::Damage(block, None) => _ = self.blocks.remove(&block),
            // All of the backing is replaced.
            TreeEvent::Discarded => self.blocks.clear(),
            TreeEvent::Took
            | TreeEvent::Ready(_)
            | TreeEvent::Rooted
            | TreeEvent::Surveyed(_)
            | TreeEvent::NoSurvey
            | TreeEvent::Unlisted(_)
            | TreeEvent::Checked(..)
            | TreeEvent::Compared { .. }
            | TreeEvent::FlushFailed(_) => {}
        }
    }

    /// No read waits for a repair: the case for which every step asks.
    #[inline]
    pub(super) fn is_unused(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Known ones of a range.
    pub(super) fn within(&self, blocks: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let known = self
            .blocks
            .range(BlockIndex(blocks.start)..BlockIndex(blocks.end));
        known.map(|(block, _)| block.0)
    }

    /// When the first read that waits has waited long enough.
    pub(super) fn deadline(&self) -> Option<Time> {
        let first = self.waiting.first()?;
        Some(first.since.plus_ms(PATIENCE_MS))
    }
}

impl Volume {
    /// The worst that is known of what a read needs from the backing.
    fn damage_in(&self, lba: Lba, sectors: u32) -> Option<Damaged> {
        let end = lba.0 + u64::from(sectors);
        let last = Lba(end.saturating_sub(1)).block();
        let known = self.damage.blocks.range(lba.block()..=last);
        let needed = known.filter(|(block, _)| {
            let first = block.lba().0;
            let from = lba.0.saturating_sub(first);
            let to = (end - first).min(SECTORS_PER_BLOCK);
            let bits = |sector: u64| u32::try_from(sector).expect("at most eight");
            let wanted = mask(bits(from), bits(to));
            // Readers of a replica pass by the overlay.
            let pinned = self.pinned_epoch().is_some();
            pinned || self.overlay.resolve(**block, wanted, |_| {}) != 0
        });
        needed
            .map(|(_, damaged)| *damaged)
            .max_by_key(|damaged| *damaged == Damaged::Lost)
    }

    /// Whether something that a read needs from the backing is known to be damaged.
    pub(super) fn is_damaged(&self, lba: Lba, sectors: u32) -> bool {
        self.damage_in(lba, sectors).is_some()
    }

    /// Whether a full copy that began at an epoch has to wait at this part of the backing, since
    /// something in it is damaged: it would be taken for good there, and might replace the only
    /// good copy.
    ///
    /// A block of which the log has all is no obstacle: the epochs that follow the copy write it
    /// before the copy counts, since they are durable here already. And it must be none: the sweep
    /// that writes it may wait for the very peer that waits for the copy.
    pub(super) fn holds_up_copy(&self, from: Epoch, offset: u64, bytes: u64) -> bool {
        let block = |offset: u64| BlockIndex(offset / BLOCK_BYTES);
        let end = block((offset + bytes).next_multiple_of(BLOCK_BYTES));
        let mut known = self.damage.blocks.range(block(offset)..end);
        let follows = from <= self.superblock.persisted().checkpoint;
        let durable = self.journal.durable();
        known.any(|(block, _)| !(follows && self.overlay.covers(*block, durable)))
            && !planted(Mutant::CopyDamaged)
    }

    /// Whether a full copy to this peer waits at a damaged block.
    pub(super) fn waits_at_damage(&self, peer: &Peer) -> bool {
        if self.damage.blocks.is_empty() {
            return false;
        }
        let Some((from, cursor)) = peer.waits_to_read() else {
            return false;
        };
        let size = self.config.identity.size_bytes;
        let (is_same, wanted) = peer.part_of_copy(cursor, size);
        let bytes = self.config.seed_piece_bytes.min(wanted);
        !is_same && self.holds_up_copy(from, cursor, bytes)
    }

    /// Whether any copy does.
    pub(super) fn copy_waits_at_damage(&self) -> bool {
        self.peers.iter().any(|peer| self.waits_at_damage(peer))
    }

    /// Reads, unless something that is needed is damaged: then the read waits or fails. Every read
    /// comes here, so it is not to cost a call.
    #[inline(always)]
    pub(super) fn read_what_is_good(
        &mut self,
        now: Now,
        id: RequestId,
        (lba, sectors, slots): (Lba, u32, &[SlotId]),
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        if self.damage.blocks.is_empty() || planted(Mutant::ServeDamaged) {
            return self.read(id, lba, sectors, slots, mem, out);
        }
        match self.damage_in(lba, sectors) {
            None => self.read(id, lba, sectors, slots, mem, out),
            Some(Damaged::Lost) => out.complete(id, Err(Failure::Io)),
            Some(Damaged::Sought) => self.damage.waiting.push(Waiting {
                since: now.time,
                id,
                lba,
                sectors,
                slots: slots.to_vec(),
            }),
        }
    }

    /// Goes on with the reads that have waited for long enough, or for what has happened.
    pub(super) fn damage_progress(
        &mut self,
        now: Now,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        let is_over = self.failed.is_some() || self.stopping;
        let is_late = self.damage.deadline().is_some_and(|at| at <= now.time);
        if !(std::mem::take(&mut self.damage.changed) || is_over || is_late) {
            return;
        }
        for waiting in std::mem::take(&mut self.damage.waiting) {
            let Waiting {
                since,
                id,
                lba,
                sectors,
                ..
            } = waiting;
            let damaged = self.damage_in(lba, sectors);
            let late = is_over || since.plus_ms(PATIENCE_MS) <= now.time;
            match damaged {
                None => self.read(id, lba, sectors, &waiting.slots, mem, out),
                Some(Damaged::Sought) if !late => self.damage.waiting.push(waiting),
                Some(_) => out.complete(id, Err(Failure::Io)),
            }
        }
    }
}
