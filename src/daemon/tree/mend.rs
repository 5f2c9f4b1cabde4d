//! What is done about damage: the deep verify looks for it, reads are kept from it, and good copies
//! are asked for and written.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hn4::types::{BLOCK_BYTES, BlockIndex, SECTORS_PER_BLOCK};
use hn4_engine::core::event::{Damaged, TreeEvent};
use hn4_proof::blocks;
use hn4_proof::tree::exchange::{self, TreeMessage};
use hn4_proof::tree::keeper::Device;
use hn4_proof::tree::{DAMAGED, TreeError};

use super::files::RepairError;
use super::sum::Summed;
use super::sweep::{Gathering, is_zeroed};
use super::verify::{self, Verify};
use super::{FromTree, Open, SLICE_BLOCKS, Worker};

impl Worker {
    /// When a deep verify is to begin.
    pub(super) fn verify_at(&self) -> Option<Instant> {
        let record = self.record.as_ref()?;
        if self.verify.is_some() || self.is_building() || self.surveys {
            return None;
        }
        let interval_ms = self.setup.verify_interval_h * 3_600_000;
        let due = record.due_in_ms(interval_ms);
        let by_itself = (interval_ms > 0).then_some(due);
        let ms = if self.asked { Some(0) } else { by_itself };
        ms.map(|ms| Instant::now() + Duration::from_millis(ms))
    }

    pub(super) fn verify_slice(&mut self) -> Result<u64, TreeError> {
        let (Some(tree), Some(mut verify)) = (&mut self.tree, self.verify.take()) else {
            return Ok(0);
        };
        let mut bad = Vec::new();
        let from = (verify.next, SLICE_BLOCKS);
        let mut device = Summed {
            device: &mut tree.backing,
            sum: &mut verify.sum,
        };
        let slice = tree.keeper.verify_slice(&mut device, from, &mut bad)?;
        verify.take(slice.next_block, &bad);
        let blocks = tree.keeper.geometry().blocks();
        self.damaged(bad.iter().map(|bad| bad.block));
        if slice.next_block < blocks {
            self.verify = Some(verify);
        } else {
            self.verified(verify);
        }
        self.untold = true;
        Ok(slice.read_bytes)
    }

    fn verified(&mut self, verify: Verify) {
        let Some(before) = self.record.take() else {
            return;
        };
        let first = verify.first;
        let (record, device) = verify.finish(&before, self.setup.identity.size_bytes);
        let bad = record.count();
        self.keep_inspection(first, &record, device);
        let b3sum = device.map(|sum| sum.to_string());
        tracing::info!(volume = %self.setup.name, bad, b3sum, "a deep verify has ended");
        // Of more blocks than are listed nobody knows which are good.
        let healed = before.bad.difference(&record.bad);
        let healed: Vec<u64> = match record.count() == record.bad.len() as u64 {
            true => healed.copied().collect(),
            false => Vec::new(),
        };
        healed.into_iter().for_each(|block| self.healed(block));
        record.bad.iter().for_each(|block| self.seek(*block));
        self.record = Some(record);
        self.keep_record();
    }

    /// These blocks of the backing are not what was written there.
    pub(super) fn damaged(&mut self, blocks: impl Iterator<Item = u64>) {
        let Some(record) = &mut self.record else {
            return;
        };
        let blocks: Vec<u64> = blocks.collect();
        if let Some(verify) = &mut self.verify {
            // It may have passed them, when they were still good.
            verify.found(&blocks);
        }
        let new = record.found(blocks.into_iter());
        if !new.is_empty() {
            let cause = match self.surveys {
                true => "cannot be read, and count as what differs from the primary",
                false => "are not what was written there",
            };
            let places = verify::ranges(&new.iter().copied().collect(), 16).join(", ");
            tracing::error!(
                volume = %self.setup.name, blocks = new.len(), %places,
                "DAMAGED: blocks of the backing {cause}"
            );
            self.keep_record();
        }
        // Of very many only the number is known, so that memory is bounded.
        let listed = |block: &u64| {
            self.record
                .as_ref()
                .is_some_and(|it| it.bad.contains(block))
        };
        let new: Vec<u64> = new.into_iter().filter(listed).collect();
        new.into_iter().for_each(|block| self.seek(block));
    }

    pub(super) fn keep_record(&mut self) {
        self.untold = true;
        let Some(record) = &self.record else { return };
        // The next of very many are to be listed, and repaired.
        self.asked |= record.is_only_counted() && self.verify.is_none();
        let unlisted = record.count() > record.bad.len() as u64;
        if std::mem::replace(&mut self.unlisted, unlisted) != unlisted {
            self.say(FromTree::Core(TreeEvent::Unlisted(unlisted)));
        }
        let bytes = record.encode();
        let kept = bytes.and_then(|bytes| self.files()?.keep_record(&bytes));
        if let Err(error) = kept {
            tracing::error!(volume = %self.setup.name, %error, "a verify cannot be recorded");
        }
    }

    /// What the sweep writes is good again.
    pub(super) fn rewritten(&mut self, gathering: &Gathering) {
        let is_written = |block: u64| {
            let whole = gathering.leaves.get(&block);
            whole.is_some_and(|leaf| *leaf != DAMAGED) || is_zeroed(&gathering.zeros, block)
        };
        if let Some(verify) = &mut self.verify {
            verify.rewritten(is_written);
        }
        let record = self.record.as_mut();
        let mut good = record.map_or_else(Vec::new, |record| record.rewritten(is_written));
        if !good.is_empty() {
            self.keep_record();
        }
        let unknown = self.damaged_before.iter().copied();
        good.extend(unknown.filter(|block| is_written(*block)));
        self.damaged_before.retain(|block| !is_written(*block));
        // Until the sweep is done, reads find these blocks in the overlay.
        good.into_iter().for_each(|block| self.healed(block));
    }

    /// A block is bad: a good copy is wanted, and reads of it wait.
    pub(super) fn seek(&mut self, block: u64) {
        // What was brought is good wherever it can be read; the rest comes with the copy.
        if !self.surveys && self.repairs.seek(block, Instant::now()) {
            self.say_damage(block, Some(Damaged::Sought));
        }
    }

    /// A block is good again.
    fn healed(&mut self, block: u64) {
        self.repairs.forget(block);
        self.say_damage(block, None);
    }

    /// Reads of what was sought for long enough, or of all, fail from now on.
    pub(super) fn lose(&mut self, at_once: bool) {
        for block in self.repairs.lost(Instant::now(), at_once) {
            self.say_damage(block, Some(Damaged::Lost));
        }
    }

    fn say_damage(&self, block: u64, damaged: Option<Damaged>) {
        let event = TreeEvent::Damage(BlockIndex(block), damaged);
        self.say(FromTree::Core(event));
    }

    /// Asks for good copies, and writes those that have come, when nothing else writes.
    pub(super) fn repair(&mut self, now: Instant) {
        self.lose(false);
        let blocks = self.repairs.due(now);
        let Some(Open { keeper, .. }) = &self.tree else {
            return;
        };
        if keeper.to_build().is_some() {
            // The leaf of a block that was not hashed yet is that of zeroes.
            return;
        }
        let leaf = |block: &u64| {
            let leaves = keeper.leaves(*block..block + 1).ok()?;
            Some((*block, *leaves.first().filter(|leaf| **leaf != DAMAGED)?))
        };
        let asked: Vec<_> = blocks.iter().filter_map(leaf).collect();
        if !asked.is_empty() {
            let message = TreeMessage::Ask(asked).encode();
            self.say(FromTree::Ask(message.into()));
        }
        let mut repaired = BTreeSet::new();
        while self.is_quiet()
            && let Some((block, contents)) = self.repairs.take_given()
        {
            if self.write_repair(block, &contents) {
                repaired.insert(block);
            }
        }
        if !repaired.is_empty() {
            self.keep_record();
            self.keep_repairs(&repaired);
        }
    }

    /// Whether the block is good now.
    fn write_repair(&mut self, block: u64, contents: &blocks::Block) -> bool {
        let Some(Open {
            keeper, backing, ..
        }) = &mut self.tree
        else {
            return false;
        };
        // A sweep may have ended since it came.
        let leaf = keeper.leaves(block..block + 1);
        if !leaf.is_ok_and(|leaf| leaf.first() == Some(&blocks::leaf(contents))) {
            return false;
        }
        let written = backing.repair(block, contents);
        let (volume, lba) = (&self.setup.name, block * SECTORS_PER_BLOCK);
        match written {
            Ok(()) => tracing::warn!(
                %volume, lba, "REPAIRED: a damaged block was written again from a peer's copy"
            ),
            Err(error) => {
                tracing::error!(%volume, lba, %error, "a block cannot be repaired");
                if let RepairError::Flush(error) = error {
                    // As after any failed flush: the volume fails closed, for good.
                    self.sweeping = true;
                    let errno = error.raw_os_error().unwrap_or(nix::libc::EIO);
                    self.say(FromTree::Core(TreeEvent::FlushFailed(errno)));
                }
                self.repairs.forget(block);
                self.say_damage(block, Some(Damaged::Lost));
                return false;
            }
        }
        if let Some(verify) = &mut self.verify {
            verify.rewritten(|at| at == block);
        }
        if let Some(record) = &mut self.record {
            record.rewritten(|at| at == block);
            record.repaired += 1;
        }
        self.healed(block);
        true
    }

    pub(super) fn peer_said(&mut self, index: usize, message: &[u8]) {
        let volume = &self.setup.name;
        match TreeMessage::decode(message) {
            Err(error) => tracing::warn!(%volume, %error, "a peer's tree said something wrong"),
            Ok(TreeMessage::Compare { id }) => self.asked_to_compare(index, id),
            Ok(TreeMessage::Root { id, standing }) => self.peer_stands(index, id, standing),
            Ok(TreeMessage::Nodes { id, request }) => self.asked_for_nodes(index, id, &request),
            Ok(TreeMessage::Given { id, reply }) => self.given_nodes(index, id, &reply),
            Ok(repair) => self.peer_repairs(index, repair),
        }
    }

    /// A peer asks for good copies of blocks, or gives some.
    fn peer_repairs(&mut self, index: usize, message: TreeMessage) {
        let Some(Open {
            keeper, backing, ..
        }) = &mut self.tree
        else {
            return;
        };
        let blocks = keeper.geometry().size_bytes() / BLOCK_BYTES;
        match message {
            TreeMessage::Ask(mut asked) => {
                asked.retain(|(block, _)| *block < blocks);
                let given = exchange::answer(&asked, |block| {
                    let mut contents = Box::new([0; blocks::BLOCK]);
                    backing.read(block * BLOCK_BYTES, &mut contents[..])?;
                    Ok(contents)
                });
                self.say(FromTree::Answer(index, given.encode().into()));
            }
            // As in `repair`.
            TreeMessage::Give(_) if keeper.to_build().is_some() => {}
            TreeMessage::Give(given) => {
                for (block, contents) in given {
                    let leaf = (block < blocks).then(|| keeper.leaves(block..block + 1));
                    let is_good = leaf.is_some_and(|leaf| {
                        leaf.is_ok_and(|leaf| leaf.first() == Some(&blocks::leaf(&contents)))
                    });
                    if is_good {
                        self.repairs.give(block, contents, Instant::now());
                    }
                }
            }
            TreeMessage::Compare { .. }
            | TreeMessage::Root { .. }
            | TreeMessage::Nodes { .. }
            | TreeMessage::Given { .. } => {}
        }
    }
}
