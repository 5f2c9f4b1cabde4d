//! What must hold at the end of a run, when every copy was drained.

use hn4::log::MERGE_BLOCKS;
use hn4::types::SECTORS_PER_BLOCK;
use hn4_engine::arena::SlotMemory;
use hn4_engine::core::event::Disk;

use crate::disk::SECTOR;
use crate::oracle::{describe, index, is};
use crate::world::{Outcome, World, broken};

impl World {
    pub(crate) fn final_checks(&mut self) -> Outcome {
        for node in &mut self.nodes {
            for disk in [Disk::Log, Disk::Backing] {
                let faults = node.disk(disk).faults;
                self.stats.torn += faults.torn;
                self.stats.lost_in_cache += faults.lost_in_cache;
                self.stats.neighbours += faults.neighbours;
            }
        }
        self.count_taken();
        if self.operator.lost {
            return Ok(());
        }
        for node in &self.nodes {
            if !self.is_member(node.index) {
                continue;
            }
            let Some(live) = &node.live else {
                return broken("P10", format!("node {} is dead at the end", node.index));
            };
            let Some(contents) = self.oracle.contents(live.tip) else {
                return broken("P2", format!("no history leads to {:?}", live.tip));
            };
            for (sector, &tag) in (0..self.plan.blocks * SECTORS_PER_BLOCK).zip(&contents) {
                let from = index(sector) * SECTOR;
                let bytes = &node.backing()[from..from + SECTOR];
                let block = sector / SECTORS_PER_BLOCK;
                if !is(tag, sector, bytes) && !self.is_taken_for_good(node.index, block) {
                    let found = describe(bytes);
                    return broken(
                        "P3",
                        format!(
                            "node {} drained: sector {sector} is {found}, not write {tag}",
                            node.index
                        ),
                    );
                }
            }
            self.stats.compared += contents.len() as u64;
            let (free, all) = (live.mem.free_slots(), live.mem.capacity());
            // One holds the superblock, some more the merge area and its head.
            let merges = usize::from(self.plan.large_sectors) * (MERGE_BLOCKS + 1);
            if free != all - 1 - merges || live.volume.dirty_slots() != 0 {
                return broken(
                    "P8",
                    format!("node {}: {free} of {all} slots are free", node.index),
                );
            }
        }
        Ok(())
    }
}
