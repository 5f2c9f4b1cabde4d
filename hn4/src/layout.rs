//! Where the regions of a volume lie: the pure computation from profile and device to sectors.
//!
//! Order on disk: North, epoch ring, cortex, bitmap, qmask, gap, flux ... horizon, chronicle,
//! South. All bytes here; the superblock stores sectors. Not here: writing any of it.
//= HN4_SPEC 2

use crate::device::{Device, HwFlags};
use crate::num::{low32, round_down, round_up};
use crate::profile::{DeviceType, Profile};
use crate::status::{Code, Problem, Region};
use crate::superblock::{Superblock, intent};

const MIB: u64 = 1 << 20;

/// Bytes of an epoch ring, before rounding to blocks.
pub const EPOCH_RING_BYTES: u64 = MIB;

/// Byte offsets of all regions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Layout {
    /// The profile it was computed for.
    pub profile: Profile,
    /// Bytes in a block.
    pub block_size: u64,
    /// Bytes in a sector.
    pub sector_size: u64,
    /// Capacity of the volume.
    pub capacity: u64,
    /// Epoch ring.
    pub epoch: u64,
    /// Cortex.
    pub cortex: u64,
    /// Bitmap.
    pub bitmap: u64,
    /// Quality mask.
    pub qmask: u64,
    /// Flux region.
    pub flux: u64,
    /// Horizon.
    pub horizon: u64,
    /// Chronicle.
    pub chronicle: u64,
    /// First byte behind the chronicle.
    pub chronicle_end: u64,
    /// The tag that enters the addresses.
    pub device_type: DeviceType,
}

impl Layout {
    /// Byte offset to sector.
    #[must_use]
    pub fn lba(&self, offset: u64) -> u64 {
        offset / self.sector_size
    }
}

fn refuse<T>(
    code: Code,
    found: String,
    expected: String,
    advice: &'static str,
) -> Result<T, Problem> {
    Err(Problem::new(
        code,
        (Region::Device, 0),
        found,
        expected,
        advice,
    ))
}

/// The capacity a volume gets: the override where VIRTUAL asks for one, else the device's.
fn capacity_of(device: &Device, mount_intent: u64, override_bytes: u64) -> Result<u64, Problem> {
    let zone = u64::from(device.zone_size);
    if mount_intent & intent::VIRTUAL != 0 && override_bytes > 0 {
        if device.is_zns()
            && override_bytes
                .checked_rem(zone)
                .is_some_and(|rest| rest != 0)
        {
            let found = format!("an override of {override_bytes} bytes");
            let advice = "give an override capacity of whole zones";
            return refuse(
                Code::AlignmentFail,
                found,
                format!("a multiple of {zone}"),
                advice,
            );
        }
        return Ok(override_bytes);
    }
    Ok(if device.is_zns() {
        round_down(device.capacity, zone)
    } else {
        device.capacity
    })
}

fn check_profile(profile: Profile, device: &Device, capacity: u64) -> Result<(), Problem> {
    const GIB: u64 = 1 << 30;
    let mismatch = |found: String, expected: &str| {
        let advice = "choose another profile for this device";
        refuse(
            Code::ProfileMismatch,
            found,
            format!("{expected} for {}", profile.name()),
            advice,
        )
    };
    if profile == Profile::Pico {
        if capacity > 2 * GIB {
            return mismatch(format!("{capacity} bytes"), "at most 2 GiB");
        }
        if device.sector_size > 512 {
            return mismatch(
                format!("sectors of {} bytes", device.sector_size),
                "512 at most",
            );
        }
        if device.is_zns() {
            return mismatch("a zoned device".to_owned(), "a device without zones");
        }
    }
    if profile == Profile::Archive {
        if device.hw_flags.has(HwFlags::NVM) {
            return mismatch("a memory device".to_owned(), "a block device");
        }
        if capacity < 10 * GIB {
            return mismatch(format!("{capacity} bytes"), "at least 10 GiB");
        }
    }
    let spec = profile.spec();
    if capacity < spec.min_capacity || capacity > spec.max_capacity {
        let expected = format!("{} to {} bytes", spec.min_capacity, spec.max_capacity);
        let advice = "choose another profile or a device of another size";
        return refuse(
            Code::Geometry,
            format!("{capacity} bytes"),
            expected,
            advice,
        );
    }
    Ok(())
}

fn block_size_of(profile: Profile, device: &Device) -> Result<u64, Problem> {
    let sector = u64::from(device.sector_size);
    let mut block = profile.spec().block_size;
    if device.is_zns() {
        block = u64::from(device.zone_size);
        if block == 0 {
            let found = "a zone size of 0".to_owned();
            let advice = "ask the device again for its zones";
            return refuse(Code::Geometry, found, "a zone size".to_owned(), advice);
        }
    }
    let block = block.max(sector);
    // Rounding by bit masks (defect 14) is wrong for other blocks; nobody has a use for them.
    let divides = block.checked_rem(sector).is_some_and(|rest| rest == 0);
    if !divides || !block.is_power_of_two() {
        let found = format!("sectors of {sector} bytes");
        let expected = format!("a divisor of a block size that is a power of two, not {block}");
        let advice = "HN4 needs sectors that divide its blocks";
        return refuse(Code::AlignmentFail, found, expected, advice);
    }
    Ok(block)
}

/// `percent` of `whole`, rounded as the reference does so that it cannot overflow.
fn percent_of(whole: u64, percent: u64, overflow_above: u64) -> u64 {
    if whole > overflow_above {
        (whole / 100).wrapping_mul(percent)
    } else {
        whole.wrapping_mul(percent) / 100
    }
}

fn cortex_bytes(profile: Profile, capacity: u64, block: u64) -> u64 {
    let share = if profile == Profile::Pico && capacity < 100 * MIB {
        capacity / 100
    } else {
        percent_of(capacity, 2, i64::MAX.unsigned_abs())
    };
    round_up(share.max(65536), block)
}

struct Horizon {
    start: u64,
    fell_back: bool,
}

/// The horizon ends at the chronicle; where it would start before the flux region, it starts a
/// little behind that instead.
fn horizon_start(flux: u64, chronicle: u64, bytes: u64, fallback: u64) -> Horizon {
    match chronicle.checked_sub(bytes).filter(|&start| start > flux) {
        Some(start) => Horizon {
            start,
            fell_back: false,
        },
        None => Horizon {
            start: flux.wrapping_add(fallback),
            fell_back: true,
        },
    }
}

/// The flux region starts behind the quality mask, at the profile's alignment.
fn flux_start(profile: Profile, qmask: u64, blocks: u64, block: u64) -> u64 {
    let qmask_end = qmask.wrapping_add(round_up(blocks.div_ceil(4), block));
    let alignment = round_up(profile.spec().alignment.max(block), block);
    round_up(qmask_end, alignment)
}

/// Computes the layout of a new volume.
///
/// # Errors
/// The reference's code for a device or capacity that the profile cannot have.
pub fn compute(
    profile: Profile,
    device: &Device,
    mount_intent: u64,
    override_bytes: u64,
) -> Result<Layout, Problem> {
    let capacity = capacity_of(device, mount_intent, override_bytes)?;
    check_profile(profile, device, capacity)?;
    let block = block_size_of(profile, device)?;
    let blocks = capacity / block;
    let pico = profile == Profile::Pico;

    let epoch = round_up(8192, block);
    let ring = if pico { 2 * block } else { EPOCH_RING_BYTES };
    let cortex = epoch.wrapping_add(round_up(ring, block));
    let bitmap = cortex.wrapping_add(cortex_bytes(profile, capacity, block));
    let qmask = bitmap.wrapping_add(round_up(blocks.div_ceil(8), block));
    let flux = flux_start(profile, qmask, blocks, block);

    let chronicle_bytes = round_up(if pico { 64 << 10 } else { 10 * MIB }, block);
    let no_space = |what: &str| {
        let advice = "use a larger device or a profile with smaller blocks";
        let (found, expected) = (format!("{capacity} bytes"), format!("room for the {what}"));
        refuse(Code::NoSpace, found, expected, advice)
    };
    if capacity < flux.wrapping_add(chronicle_bytes).wrapping_add(32768) {
        return no_space("metadata");
    }
    let chronicle_end = round_down(capacity.saturating_sub(block.max(8192)), block);
    let Some(chronicle) = chronicle_end.checked_sub(chronicle_bytes) else {
        let found = format!("{chronicle_end} bytes before South");
        let advice = "use a larger device";
        let expected = format!("{chronicle_bytes} or more");
        return refuse(Code::Geometry, found, expected, advice);
    };
    if chronicle < flux {
        return no_space("chronicle behind the flux start");
    }
    // The reference multiplies in 32 bits.
    let four_blocks = u64::from(low32(block.wrapping_mul(4)));
    if flux.wrapping_add(four_blocks) > chronicle {
        return no_space("four flux blocks");
    }
    let percent = if profile == Profile::Archive { 2 } else { 10 };
    let share = percent_of(capacity, percent, u64::MAX / percent);
    let horizon_bytes = round_up(share, block).max(block.wrapping_mul(4));
    let horizon = horizon_start(
        flux,
        chronicle,
        horizon_bytes,
        if pico { block } else { block << 10 },
    );
    if horizon.fell_back && horizon.start.wrapping_add(four_blocks) > chronicle {
        return no_space("horizon");
    }
    Ok(Layout {
        profile,
        block_size: block,
        sector_size: u64::from(device.sector_size),
        capacity,
        epoch,
        cortex,
        bitmap,
        qmask,
        flux,
        horizon: horizon.start,
        chronicle,
        chronicle_end,
        device_type: DeviceType::of(profile, device),
    })
}

/// First byte behind the chronicle of an existing volume.
#[must_use]
pub fn chronicle_end(superblock: &Superblock) -> u64 {
    let block = u64::from(superblock.block_size.get());
    round_down(
        superblock
            .total_capacity
            .get()
            .saturating_sub(block.max(8192)),
        block,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_lie_in_order_and_inside_the_volume_for_every_profile() {
        for profile in Profile::ALL {
            let capacity = profile.spec().min_capacity.max(4 * MIB);
            let layout = compute(profile, &Device::plain(capacity, 512), 0, 0)
                .expect("the smallest capacity of a profile has a layout");
            let order = [
                layout.epoch,
                layout.cortex,
                layout.bitmap,
                layout.qmask,
                layout.flux,
                layout.horizon,
                layout.chronicle,
                layout.chronicle_end,
                capacity,
            ];
            assert!(order.is_sorted_by(|a, b| a < b), "{profile:?}: {order:?}");
            assert!(
                order[..7]
                    .iter()
                    .all(|start| start % layout.block_size == 0)
            );
        }
    }
}
