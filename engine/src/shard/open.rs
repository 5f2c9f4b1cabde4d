//! From paths to an engine that runs: opening and judging the two devices, recovery, the ring.
//!
//! Not here: who the clients are. A shard listens on sockets, [`super::Embedded`] is called.

use std::path::Path;

use hn4::log::{CopyState, LogHeader, LogIdentity};
use hn4::types::BLOCK_BYTES;

use super::disks::Disks;
use super::engine::Engine;
use super::fork::ForkPlace;
use super::link::Outbox;
use super::readahead::ReadAhead;
use super::shadow::ShadowFile;
use super::tokens::DISK;
use super::{DeviceMedium, ShardError, ShardSetup};
use crate::arena::{Arena, SlotMemory};
use crate::core::recovery::{self, RecoveryError, RecoveryReport};
use crate::device::{Device, DeviceInfo};
use crate::ring::{Ring, RingConfig};

/// What is found while a shard opens and told in its status.
pub(super) struct Facts {
    pub(super) identity: LogIdentity,
    pub(super) recovery: RecoveryReport,
    pub(super) log_device: DeviceInfo,
    pub(super) backing_device: DeviceInfo,
    /// Why there is no shadow file, if there is to be one.
    pub(super) no_shadow: Option<String>,
}

/// A volume that is ready to take requests.
pub(super) struct Opened {
    pub(super) engine: Engine,
    pub(super) facts: Facts,
}

/// Opens the devices, recovers the volume and makes its ring, on the calling thread.
///
/// Reads of the backing go to the kernel when there are `read_batch` of them, or at the end of a
/// turn.
pub(super) fn open_volume(
    setup: ShardSetup,
    outbox: Outbox,
    read_batch: u32,
) -> Result<Opened, ShardError> {
    let os = |what| move |source| ShardError::Os { what, source };
    let log = Device::open(&setup.log, setup.log_options)?;
    let backing = Device::open(&setup.backing, setup.backing_options)?;
    let medium = DeviceMedium::new(&log).map_err(os("opening the log"))?;
    let mut medium = ReadAhead::new(medium);
    let recovery = |source| ShardError::Recovery {
        log: setup.log.display().to_string(),
        source,
    };
    let (header, superblock, _) = recovery::inspect(&mut medium).map_err(recovery)?;
    check_backing(&header, setup.expect, &setup.log, &backing)?;
    let slots = u32::try_from(setup.overlay_bytes / BLOCK_BYTES).unwrap_or(u32::MAX);
    let mut arena = Arena::new_populating(slots).map_err(os("allocating the overlay"))?;
    let capacity = arena.capacity();
    let (shadow, no_shadow) = open_shadow(&setup, &superblock.copy)?;
    let has_shadow = shadow.is_some();
    let configure = setup.configure;
    let mut under = DeviceMedium::new(&backing).map_err(os("opening the backing"))?;
    let merge = tears_neighbours(&header.identity, backing.info());
    let (volume, report) = recovery::open(&mut medium, &mut under, &mut arena, |header| {
        let mut config = configure(header, capacity);
        config.merge = merge;
        config.shadow_space_bytes *= u64::from(has_shadow);
        config
    })
    .map_err(recovery)?;
    let config = RingConfig {
        operations: 2048,
        segments: 272,
        // A turn hands over all it has at its end; this is for the long ones.
        submit_batch: 16,
        // Reads go earlier: the device idles while the shard prepares more of them.
        read_batch,
        ..RingConfig::default()
    };
    let mut ring = Ring::new(config, arena)?;
    let shadow_device = shadow.as_ref().map(|shadow| &shadow.device);
    let devices = (&log, &backing, shadow_device);
    let disks = Disks::new(&mut ring, devices, header.ring_bytes, DISK)?;
    let facts = Facts {
        identity: header.identity,
        recovery: report,
        log_device: log.info().clone(),
        backing_device: backing.info().clone(),
        no_shadow,
    };
    let fork_place = ForkPlace {
        folder: setup.fork_folder,
        space_bytes: setup.fork_space_bytes,
        name: setup.name,
        identity: header.identity,
        log: medium.into_inner(),
        ring_bytes: header.ring_bytes,
        backing: under,
        holes: backing.extents().map_err(os("opening the backing"))?,
        shadow: shadow_device
            .map(DeviceMedium::new)
            .transpose()
            .map_err(os("opening the shadow file"))?,
    };
    let engine = Engine::new(ring, volume, disks, (fork_place, shadow), outbox);
    Ok(Opened { engine, facts })
}

/// Without a shadow file a volume runs, unless what it holds already counts.
fn open_shadow(
    setup: &ShardSetup,
    copy: &CopyState,
) -> Result<(Option<ShadowFile>, Option<String>), ShardError> {
    let Some(path) = &setup.shadow else {
        return Ok((None, None));
    };
    match ShadowFile::open(path, setup.backing_options, copy) {
        Ok(shadow) => Ok((Some(shadow), None)),
        Err(error) if matches!(copy, CopyState::Applying { .. }) => Err(error.into()),
        Err(error) => Ok((None, Some(error.to_string()))),
    }
}

/// Whether a write of some sectors of a block may damage others, if it is cut off. What a disk
/// writes at once is at least a sector; for larger units than a block it is its own affair.
fn tears_neighbours(identity: &LogIdentity, backing: &DeviceInfo) -> bool {
    let whole = u64::from(identity.sector_bytes) >= BLOCK_BYTES;
    !whole && backing.physical_bytes > identity.sector_bytes
}

fn check_backing(
    header: &LogHeader,
    expect: Option<hn4::types::VolumeId>,
    log: &Path,
    backing: &Device,
) -> Result<(), ShardError> {
    let identity = &header.identity;
    let info = backing.info();
    if let Some(expected) = expect
        && expected != identity.volume
    {
        let source = RecoveryError::OtherVolume {
            found: identity.volume,
            found_bytes: identity.size_bytes,
            expected,
            expected_bytes: info.size_bytes,
        };
        return Err(ShardError::Recovery {
            log: log.display().to_string(),
            source,
        });
    }
    let why = if info.size_bytes / BLOCK_BYTES * BLOCK_BYTES != identity.size_bytes {
        format!(
            "it has {} bytes, but its log is of volume {} with {} bytes; a log belongs to one \
             backing only",
            info.size_bytes, identity.volume, identity.size_bytes
        )
    } else if info.logical_bytes > identity.sector_bytes {
        format!(
            "its sectors have {} bytes, the volume's {}: create the volume with sector_bytes = {}",
            info.logical_bytes, identity.sector_bytes, info.logical_bytes
        )
    } else {
        return Ok(());
    };
    Err(ShardError::Backing {
        backing: info.path.display().to_string(),
        why,
    })
}
