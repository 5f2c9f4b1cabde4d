//! The dirty mark: every superblock copy says that the volume is in use, or none does.

use super::{Mount, Reason};
use crate::plan::{Data, Medium, Op};
use crate::status::Code;
use crate::superblock::copies::{self, Cardinal, position};
use crate::superblock::{Superblock, TAINT_BIT, state};
use zerocopy::IntoBytes;

/// Resets the zone of a copy, on zoned devices.
pub(crate) fn reset_zone(medium: &mut Medium<'_>, offset: u64) -> Result<(), Code> {
    if medium.device.is_zns() {
        medium.push(Op::ZoneReset { offset, length: 0 })?;
        medium.flush()?;
    }
    Ok(())
}

/// Writes one copy, padded to whole blocks.
pub(crate) fn write_plain(
    medium: &mut Medium<'_>,
    superblock: &Superblock,
    offset: u64,
) -> Result<(), Code> {
    let width = copies::copy_bytes(u64::from(superblock.block_size.get()));
    medium.write(offset, Data::padded(superblock.sealed().as_bytes(), width))
}

fn write_copy(medium: &mut Medium<'_>, superblock: &Superblock, offset: u64) -> Result<(), Code> {
    reset_zone(medium, offset)?;
    write_plain(medium, superblock, offset)
}

/// The copies that the dirty mark and the unmount write: from the superblock's own capacity.
pub(crate) fn targets(medium: &Medium<'_>, superblock: &Superblock) -> Vec<(Cardinal, u64)> {
    let capacity = superblock.total_capacity.get();
    let block = u64::from(superblock.block_size.get());
    Cardinal::ALL
        .into_iter()
        .filter(|&cardinal| cardinal == Cardinal::North || !medium.device.is_zns())
        .filter_map(|cardinal| Some((cardinal, position(cardinal, capacity, block)?)))
        .collect()
}

/// True when enough copies were written to survive the loss of one.
pub(crate) fn quorum(zoned: bool, north: bool, mirrors: usize) -> bool {
    (north && (zoned || mirrors >= 1)) || mirrors >= 3
}

impl Mount<'_, '_> {
    /// Step 16.
    pub(super) fn mark_dirty(&mut self) {
        let before = self.superblock;
        let clean = before.has_state(state::CLEAN);
        if clean {
            let next = before.copy_generation.get().wrapping_add(1);
            self.superblock.copy_generation = next.into();
        }
        self.superblock.change_state(state::DIRTY, state::CLEAN);
        self.superblock.last_mount_time = self.request.now_ns.into();
        if self.taint > 0 {
            let bits = self.superblock.dirty_bits.get() | TAINT_BIT;
            self.superblock.dirty_bits = bits.into();
        }
        let marked = self.write_all();
        let zoned = self.medium.device.is_zns();
        let north = marked.contains(&Cardinal::North);
        let mirrors = marked
            .iter()
            .filter(|&&cardinal| cardinal != Cardinal::North)
            .count();
        if quorum(zoned, north, mirrors) {
            if clean {
                self.taint /= 4;
            }
            return;
        }
        self.superblock = before;
        self.roll_back(north);
        self.reasons.push(Reason::DirtyQuorum {
            marked: marked.len(),
        });
    }

    fn write_all(&mut self) -> Vec<Cardinal> {
        let superblock = self.superblock;
        targets(self.medium, &superblock)
            .into_iter()
            .filter(|&(_, offset)| {
                let written = write_copy(self.medium, &superblock, offset);
                written.and_then(|()| self.medium.flush()).is_ok()
            })
            .map(|(cardinal, _)| cardinal)
            .collect()
    }

    /// Puts the old superblock back. The reference does so without a look at errors: what cannot be
    /// written now was not written before either.
    fn roll_back(&mut self, north: bool) {
        let superblock = self.superblock;
        for (cardinal, offset) in targets(self.medium, &superblock) {
            let is_north = cardinal == Cardinal::North;
            if is_north && !north {
                continue;
            }
            let _ = write_copy(self.medium, &superblock, offset);
            if !is_north {
                let _ = self.medium.flush();
            }
        }
    }
}
