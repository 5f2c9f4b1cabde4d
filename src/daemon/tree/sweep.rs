//! What a sweep is about to write becomes leaves, before it writes.

use std::collections::BTreeMap;
use std::ops::Range;

use hn4::types::{BLOCK_BYTES, Epoch};
use hn4_engine::core::event::TreeEvent;
use hn4_proof::blocks;
use hn4_proof::hash::Digest;
use hn4_proof::tree::keeper::Device;
use hn4_proof::tree::{DAMAGED, TreeError};

use super::{FromTree, Open, Worker};

/// Length of a part that is all of a block.
const WHOLE: u16 = 4096;

/// What a sweep will write, as far as it is known.
#[derive(Debug)]
pub(super) struct Gathering {
    pub(super) cut: Epoch,
    /// Blocks.
    pub(super) zeros: Vec<Range<u64>>,
    pub(super) leaves: BTreeMap<u64, Digest>,
}

impl Worker {
    pub(super) fn take_blocks(&mut self, parts: &[(u64, u16)], bytes: &[u8], last: bool) {
        let Some(mut gathering) = self.gathering.take() else {
            return;
        };
        let exact = self.at.is_some_and(|at| at.epoch >= self.settled);
        let mut bad = Vec::new();
        let done = match &mut self.tree {
            None => {
                // That all of it is written is known all the same.
                let whole = parts.iter().filter(|(_, length)| *length == WHOLE);
                let leaves = whole.map(|(offset, _)| (offset / BLOCK_BYTES, Digest::ZERO));
                gathering.leaves.extend(leaves);
                Ok(())
            }
            Some(tree) => {
                let checked = exact && tree.keeper.to_build().is_none();
                let known = self.record.as_ref();
                let taken = hash_parts(&mut gathering, tree, parts, bytes, |block, is_read| {
                    let was_bad = known.is_some_and(|known| known.bad.contains(&block));
                    let is_bad = checked || was_bad || !is_read;
                    bad.extend(Some(block).filter(|_| is_bad));
                    is_bad
                });
                taken.and_then(|()| match last {
                    false => Ok(()),
                    true => {
                        let Gathering { cut, zeros, leaves } = &gathering;
                        tree.keeper.begin_sweep(*cut, leaves, zeros)
                    }
                })
            }
        };
        self.damaged(bad.into_iter());
        match done {
            Err(error) => self.give_up(&error),
            Ok(()) if last => self.rewritten(&gathering),
            Ok(()) => {}
        }
        if last {
            self.sweeping = true;
            self.say(FromTree::Core(TreeEvent::Ready(gathering.cut)));
            self.begins_to_write(gathering);
        } else {
            self.gathering = Some(gathering);
            self.say(FromTree::Core(TreeEvent::Took));
        }
    }
}

/// Whether a block lies in one of `zeros`, which ascend.
pub(super) fn is_zeroed(zeros: &[Range<u64>], block: u64) -> bool {
    let after = zeros.partition_point(|range| range.start <= block);
    after > 0 && zeros[after - 1].end > block
}

/// Adds the leaves of the blocks to which `parts` belong: whole ones, and those of which only some
/// sectors are written over what is there. If that is not what the tree says, or cannot be read,
/// `is_damage` is asked whether it is damaged, and such a block stays so.
fn hash_parts(
    gathering: &mut Gathering,
    Open {
        keeper, backing, ..
    }: &mut Open,
    parts: &[(u64, u16)],
    bytes: &[u8],
    mut is_damage: impl FnMut(u64, bool) -> bool,
) -> Result<(), TreeError> {
    let mut lost = Vec::new();
    let mut whole: Vec<(u64, &blocks::Block)> = Vec::new();
    let mut partial: BTreeMap<u64, blocks::Block> = BTreeMap::new();
    let mut rest = bytes;
    for &(offset, length) in parts {
        let (part, later) = rest.split_at(usize::from(length).min(rest.len()));
        rest = later;
        let block = offset / BLOCK_BYTES;
        if let Ok(part) = part.try_into() {
            whole.push((block, part));
            continue;
        }
        let base = match partial.entry(block) {
            std::collections::btree_map::Entry::Occupied(base) => base.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                let mut base = [0; blocks::BLOCK];
                if !is_zeroed(&gathering.zeros, block) {
                    let is_read = backing.read(block * BLOCK_BYTES, &mut base).is_ok();
                    let known = keeper.leaves(block..block + 1)?;
                    let is_same = is_read && known.first() == Some(&blocks::leaf(&base));
                    if !is_same && is_damage(block, is_read) {
                        lost.push(block);
                    }
                }
                place.insert(base)
            }
        };
        let at = usize::try_from(offset % BLOCK_BYTES).unwrap_or(0);
        base[at..at + part.len()].copy_from_slice(part);
    }
    let mut numbers = whole.iter().map(|(block, _)| *block);
    blocks::leaves(whole.iter().map(|(_, bytes)| *bytes), |leaf| {
        gathering
            .leaves
            .extend(numbers.next().map(|block| (block, leaf)));
    });
    let partial = partial.iter();
    gathering
        .leaves
        .extend(partial.map(|(block, bytes)| (*block, blocks::leaf(bytes))));
    gathering
        .leaves
        .extend(lost.into_iter().map(|block| (block, DAMAGED)));
    Ok(())
}
