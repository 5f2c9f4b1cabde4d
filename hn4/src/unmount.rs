//! Unmounting: maps, epoch record, chronicle entry, superblocks - in this order, so that a crash at
//! any point leaves a volume that is dirty, never one that is clean and wrong.
//= HN4_SPEC 9, Unmount

use zerocopy::IntoBytes;

use crate::chronicle::LinkKey;
use crate::chronicle::OpCode;
use crate::chronicle::append::{self, Request};
use crate::epoch_ring;
use crate::mount::{Mounted, dirty};
use crate::plan::{Data, Medium};
use crate::profile::Profile;
use crate::status::{Code, Conduct, Problem, Region};
use crate::superblock::copies::Cardinal;
use crate::superblock::{GENERATION_LIMIT, SUPERBLOCK_BYTES, Superblock, TAINT_BIT, state};

fn failed(code: Code, region: Region, lba: u64) -> Problem {
    let advice = "the volume stays dirty; mount it again when the device is sound";
    Problem::new(code, (region, lba), "a failing write", "success", advice)
}

/// Plans the unmount of a volume and updates its superblock. A read-only volume writes nothing.
///
/// # Errors
/// The reference's code; what was planned until then stays in the medium.
pub fn unmount(
    medium: &mut Medium<'_>,
    volume: &mut Mounted,
    now_ns: u64,
    conduct: Conduct,
    key: &LinkKey,
) -> Result<(), Problem> {
    if volume.is_read_only() {
        return Ok(());
    }
    medium
        .flush()
        .map_err(|code| failed(code, Region::Device, 0))?;
    write_maps(medium, volume)?;
    let advanced = advance_epoch(medium, &mut volume.superblock, now_ns, conduct);
    if let Err(problem) = advanced {
        volume
            .superblock
            .change_state(state::DIRTY | state::DEGRADED, state::CLEAN);
        broadcast(medium, &volume.superblock, true);
        return Err(problem);
    }
    let (before, after) = advanced.unwrap_or_default();
    let epoch = volume.superblock.current_epoch_id.get();
    let snapshot = Request::new(OpCode::Snapshot, before, after, epoch, now_ns);
    // A chronicle that cannot be written does not keep the volume from being unmounted; PANIC is
    // set, and so it does not become clean.
    let _ = append::append(
        medium,
        &mut volume.superblock,
        &snapshot,
        false,
        conduct,
        key,
    );
    close(medium, &mut volume.superblock, volume.taint, now_ns)
}

fn write_maps(medium: &mut Medium<'_>, volume: &Mounted) -> Result<(), Problem> {
    if volume.superblock.format_profile.get() == Profile::Pico.id() {
        return Ok(());
    }
    let bitmap = volume.bitmap.as_ref().map(|bitmap| bitmap.to_bytes());
    let maps = [
        (
            Region::Bitmap,
            volume.superblock.lba_bitmap_start.get(),
            bitmap,
        ),
        (
            Region::Qmask,
            volume.superblock.lba_qmask_start.get(),
            volume.qmask.clone(),
        ),
    ];
    for (region, lba, bytes) in maps {
        let Some(bytes) = bytes else { continue };
        let offset = lba.saturating_mul(medium.device.sector());
        let written = medium.write(offset, Data::padded(&bytes, 0));
        written
            .and_then(|()| medium.flush())
            .map_err(|code| failed(code, region, lba))?;
    }
    Ok(())
}

/// Writes the next epoch record; returns the ring's block index before and after.
fn advance_epoch(
    medium: &mut Medium<'_>,
    superblock: &mut Superblock,
    now_ns: u64,
    conduct: Conduct,
) -> Result<(u64, u64), Problem> {
    let sector = medium.device.sector();
    let advance = epoch_ring::advance(superblock, sector, now_ns, false, conduct)?;
    let block = u64::from(superblock.block_size.get());
    let offset = advance.block.saturating_mul(block);
    let written = medium.write(offset, Data::padded(advance.record.as_bytes(), block));
    let lba = offset / sector;
    written
        .and_then(|()| medium.flush())
        .map_err(|code| failed(code, Region::EpochRing, lba))?;
    let before = superblock.epoch_ring_block_idx.get();
    superblock.current_epoch_id = advance.epoch_id.into();
    superblock.epoch_ring_block_idx = advance.block.into();
    Ok((before, advance.block))
}

/// Writes all copies; returns those that took it.
fn broadcast(medium: &mut Medium<'_>, superblock: &Superblock, south: bool) -> Vec<Cardinal> {
    let sealed = superblock.sealed();
    let mut written = Vec::new();
    for (cardinal, offset) in dirty::targets(medium, superblock) {
        if cardinal == Cardinal::South && !south {
            continue;
        }
        if dirty::reset_zone(medium, offset).is_ok()
            && medium
                .write(offset, Data::padded(sealed.as_bytes(), SUPERBLOCK_BYTES))
                .is_ok()
        {
            written.push(cardinal);
        }
    }
    let _ = medium.flush();
    written
}

fn close(
    medium: &mut Medium<'_>,
    superblock: &mut Superblock,
    taint: u32,
    now_ns: u64,
) -> Result<(), Problem> {
    superblock.last_mount_time = now_ns.into();
    count_generation(superblock);
    if taint > 0 {
        superblock.dirty_bits = (superblock.dirty_bits.get() | TAINT_BIT).into();
    }
    let bad = state::TOXIC | state::PANIC | state::DEGRADED;
    if superblock.state_flags.get() & bad == 0 {
        superblock.change_state(state::CLEAN, state::DIRTY);
    }
    let places = dirty::targets(medium, superblock);
    let has_south = places
        .iter()
        .any(|&(cardinal, _)| cardinal == Cardinal::South);
    set_south_flag(superblock, has_south);
    let mut written = broadcast(medium, superblock, true);
    if has_south && !written.contains(&Cardinal::South) {
        set_south_flag(superblock, false);
        count_generation(superblock);
        written = broadcast(medium, superblock, false);
    }
    let north = written.contains(&Cardinal::North);
    let mirrors = written
        .iter()
        .filter(|&&cardinal| cardinal != Cardinal::North)
        .count();
    if dirty::quorum(medium.device.is_zns(), north, mirrors) {
        return Ok(());
    }
    let advice = "the volume may come back dirty; check the device";
    let found = format!("{} superblock copies written", written.len());
    let at = (Region::Superblock, 0);
    Err(Problem::new(
        Code::HwIo,
        at,
        found,
        "North and a mirror, or three mirrors",
        advice,
    ))
}

fn set_south_flag(superblock: &mut Superblock, there: bool) {
    superblock.compat_flags = (superblock.compat_flags.get() & !1 | u64::from(there)).into();
}

fn count_generation(superblock: &mut Superblock) {
    let generation = superblock.copy_generation.get();
    if generation >= GENERATION_LIMIT {
        superblock.change_state(state::LOCKED, 0);
    } else {
        superblock.copy_generation = (generation + 1).into();
    }
}
