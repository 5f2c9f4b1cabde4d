//! `volume create` and `volume adopt`: making the log that turns a device into a volume.
//!
//! Order: everything is checked before anything is written; then files are made, then the log is
//! written, its header last of all, then the attach record. A creation that was cut off leaves
//! blank files at most.
//!
//! **Invariant:** a backing is never written here. Its contents are the volume (create, adopt), or
//! are going to be replaced by the full copy that a primary sends (replica).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hn4::log::{LogIdentity, MAX_LANES, MIN_RING_BYTES, RING_START, Role};
use hn4::types::{BLOCK_BYTES, Epoch, VolumeId};
use hn4_engine::core::Lanes;
use hn4_engine::core::recovery::{self, AlignedBlock, Medium, NewLog, RecoveryError};
use hn4_engine::device::{Device, DeviceError, DeviceInfo, create_preallocated};
use hn4_engine::shard::DeviceMedium;
use thiserror::Error;

use super::token::IdentityToken;
use crate::config::VolumeSection;
use crate::config::attach::{
    AttachError, AttachRecord, attach_record_forget, attach_record_put, discard_log,
    refuse_attached,
};
use crate::config::state::{NodeState, StateError, random_bytes, random_uuid};
use crate::daemon::forget_tree;

/// Size of a new log file if nothing else is said.
pub const DEFAULT_LOG_MIB: u64 = 1024;
/// Smallest log: header and the smallest ring.
pub const LOG_MIB_MIN: u64 = (RING_START + MIN_RING_BYTES).div_ceil(1 << 20);
/// Largest log file that is made.
pub const LOG_MIB_MAX: u64 = 1 << 20;
/// Largest backing file that is made.
pub const SIZE_MIB_MAX: u64 = 1 << 24;

/// How much of a backing's start and end is looked at for data.
const LOOK_BYTES: u64 = 1 << 20;
/// Blocks in a row that belong to one lane: 1 MiB.
const STRIPE_BLOCKS: u32 = 256;

/// What the new log is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Purpose {
    /// A new volume on a blank backing.
    #[default]
    New,
    /// A new volume whose contents are what the backing holds.
    Adopt,
    /// A further copy of an existing volume. It gets everything from the primary.
    Replica {
        /// What the first copy's creation printed.
        identity: IdentityToken,
        /// The backing may hold data that the copy will replace.
        overwrite_backing: bool,
        /// The backing holds data that is expected to be the primary's, mostly; what differs will
        /// be replaced.
        seeded: bool,
    },
}

impl Purpose {
    /// Whether the backing holds what a copy may keep.
    fn is_seeded(&self) -> bool {
        matches!(self, Self::Replica { seeded: true, .. })
    }
}

/// How to create a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CreateOptions {
    /// See there.
    pub purpose: Purpose,
    /// Size of the log, if its file is to be made; [`DEFAULT_LOG_MIB`] by default.
    pub log_mib: Option<u64>,
    /// Lanes of the log, 1 to [`MAX_LANES`]; by default 1. Copies of a volume may differ in it.
    pub lanes: Option<u16>,
    /// Logical sector size; by default 512, or 4096 on a backing that has such sectors.
    pub sector_bytes: Option<u32>,
    /// Make the backing: a file of this size. For a replica it must be the volume's.
    pub size_mib: Option<u64>,
    /// Make the backing: a file of the volume's size. For a replica only.
    pub create_backing: bool,
    /// Make the backing as a sparse file instead of one filled with zeroes.
    pub sparse: bool,
    /// The backing has a log, which is lost; what it held after this epoch is given up.
    pub discard_log: Option<u64>,
}

/// Why a volume was not created.
#[derive(Debug, Error)]
pub enum CreateError {
    /// Log or backing cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// What the node remembers speaks against it.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The log.
    #[error("{log}: {source}")]
    Log {
        /// Its path.
        log: String,
        /// What is wrong.
        source: RecoveryError,
    },
    /// A file or device.
    #[error("{path}: {doing}: {source}")]
    Os {
        /// Which.
        path: String,
        /// What was tried.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
    /// The options do not fit.
    #[error("{0}")]
    Refused(String),
}

fn refused<T>(why: String) -> Result<T, CreateError> {
    Err(CreateError::Refused(why))
}

fn os(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> CreateError {
    let path = path.display().to_string();
    move |source| CreateError::Os {
        path,
        doing,
        source,
    }
}

/// Files that were made here and are removed again if the creation fails: nothing is in them.
#[derive(Default)]
struct Made(Vec<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            // The error that counts is the one that led here.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Creates a volume's log (and its files, as asked) and gives the token for further copies.
///
/// # Errors
/// [`CreateError`] says what is wrong and what to do. Files that were made are removed again.
pub fn create_volume(
    section: &VolumeSection,
    state: &NodeState,
    options: &CreateOptions,
) -> Result<IdentityToken, CreateError> {
    check_options(options)?;
    check_seeded(section, options)?;
    let discarded = match options.discard_log {
        Some(epoch) => Some(discard_log(state, section, Epoch(epoch))?),
        None => {
            refuse_attached(state, &section.backing)?;
            None
        }
    };
    let mut made = Made::default();
    make_backing(section, options, &mut made)?;
    let backing = Device::open(&section.backing, section.backing_options())?;
    let identity = identity(section, options, backing.info())?;
    check_contents(section, options, &backing)?;
    make_log(section, options, &mut made)?;
    let log = Device::open(&section.log, section.log_options())?;
    if log.info().path == backing.info().path {
        return refused(format!(
            "log and backing are the same device, {}; give the log one of its own",
            log.info().path.display()
        ));
    }
    let mut medium = DeviceMedium::new(&log).map_err(os(&section.log, "opening"))?;
    refuse_existing_log(section, &mut medium)?;
    let record = AttachRecord::new(section, &identity, false);
    let replica = matches!(options.purpose, Purpose::Replica { .. });
    let seeded = options.purpose.is_seeded();
    if seeded {
        settle_backing(section, state, &identity)?;
    }
    let since_1970 = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let new = NewLog {
        identity,
        node: state.node_id,
        lanes: Lanes {
            count: options.lanes.unwrap_or(1),
            stripe_blocks: STRIPE_BLOCKS,
        },
        role: if replica {
            Role::Replica
        } else {
            Role::Primary
        },
        seeded,
        created_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
    };
    recovery::create(&mut medium, &new).map_err(|source| log_error(section, source))?;
    // Written last, so that a creation that fails leaves no memory of a volume that is not there.
    attach_record_put(state, &record)?;
    made.0.clear();
    if let Some(old) = discarded {
        attach_record_forget(state, old.volume)?;
    }
    Ok(IdentityToken(identity))
}

/// A state tree is what a backing is compared by.
fn check_seeded(section: &VolumeSection, options: &CreateOptions) -> Result<(), CreateError> {
    let makes = options.create_backing || options.size_mib.is_some();
    match options.purpose.is_seeded() {
        true if !section.tree => refused(format!(
            "--seeded compares what the backing holds with the primary by state trees: set tree = \
             \"on\" in the section of {}, here and on the primary",
            section.name
        )),
        true if makes => refused(
            "a backing that is made now holds nothing: leave --seeded out, or the option that \
             makes the backing"
                .to_owned(),
        ),
        _ => Ok(()),
    }
}

/// What was brought is on the medium, and no tree is left of what the backing was before: a power
/// cut must not change what the tree says of it.
fn settle_backing(
    section: &VolumeSection,
    state: &NodeState,
    identity: &LogIdentity,
) -> Result<(), CreateError> {
    let backing = File::open(&section.backing).map_err(os(&section.backing, "opening"))?;
    let flushed = backing.sync_all();
    flushed.map_err(os(&section.backing, "flushing what was brought there"))?;
    let forgotten = forget_tree(state.directory(), identity.volume);
    forgotten.map_err(os(
        state.directory(),
        "removing the state tree of an earlier copy",
    ))
}

fn log_error(section: &VolumeSection, source: RecoveryError) -> CreateError {
    CreateError::Log {
        log: section.log.display().to_string(),
        source,
    }
}

fn check_options(options: &CreateOptions) -> Result<(), CreateError> {
    let range = |name, value: Option<u64>, low: u64, high: u64| match value {
        Some(value) if !(low..=high).contains(&value) => refused(format!(
            "{name}: {value} is not allowed; choose from {low} to {high} MiB"
        )),
        _ => Ok(()),
    };
    range("log size", options.log_mib, LOG_MIB_MIN, LOG_MIB_MAX)?;
    range("volume size", options.size_mib, 1, SIZE_MIB_MAX)?;
    if let Some(lanes) = options.lanes
        && !(1..=MAX_LANES).contains(&lanes)
    {
        return refused(format!(
            "{lanes} lanes are not possible; choose 1 to {MAX_LANES}"
        ));
    }
    if let Some(bytes) = options
        .sector_bytes
        .filter(|bytes| ![512, 4096].contains(bytes))
    {
        return refused(format!(
            "sectors of {bytes} bytes are not possible; choose 512 or 4096"
        ));
    }
    match options.purpose {
        Purpose::Adopt if options.size_mib.is_some() || options.create_backing => refused(
            "adopt takes a backing that exists; to make one, use `hn4ctl volume create`".to_owned(),
        ),
        Purpose::New if options.create_backing => refused(
            "a new volume has no size yet: make its backing file with --size-mib".to_owned(),
        ),
        Purpose::Replica { .. } if options.sector_bytes.is_some() => refused(
            "the sector size of a replica is in the identity token; leave --sector-bytes out"
                .to_owned(),
        ),
        _ => Ok(()),
    }
}

fn make_backing(
    section: &VolumeSection,
    options: &CreateOptions,
    made: &mut Made,
) -> Result<(), CreateError> {
    let path = &section.backing;
    let asked = options.size_mib.map(|mib| mib << 20);
    let wanted = match options.purpose {
        Purpose::Replica { identity, .. } => {
            let size = identity.0.size_bytes;
            if let Some(asked) = asked.filter(|&asked| asked != size) {
                return refused(format!(
                    "the volume has {size} bytes, --size-mib says {asked}; leave it out and use \
                     --create-backing"
                ));
            }
            (asked.is_some() || options.create_backing).then_some(size)
        }
        Purpose::New | Purpose::Adopt => asked,
    };
    let exists = path.symlink_metadata().is_ok();
    match wanted {
        None if !exists => refused(format!(
            "the backing {} is not there. If it is a device, check its name; to make a file of it, \
             use {}",
            path.display(),
            match options.purpose {
                Purpose::New => "--size-mib N",
                Purpose::Adopt => "`hn4ctl volume create` with --size-mib N",
                Purpose::Replica { .. } => "--create-backing",
            }
        )),
        None => Ok(()),
        Some(_) if exists => refused(format!(
            "the backing {} is there already, and no file is made in its place; leave the option \
             that makes one out, or choose another path",
            path.display()
        )),
        Some(bytes) => {
            if options.sparse {
                make_sparse(path, bytes)?;
            } else {
                create_preallocated(path, bytes, section.assume_strict_flush)?;
            }
            made.0.push(path.clone());
            Ok(())
        }
    }
}

fn make_sparse(path: &Path, bytes: u64) -> Result<(), CreateError> {
    let failed = |source| os(path, "creating")(source);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let folder = path
        .parent()
        .filter(|folder| *folder != Path::new(""))
        .unwrap_or(Path::new("."));
    let durable = file
        .set_len(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| File::open(folder)?.sync_all());
    durable.map_err(|source| {
        // The error that counts is the first one.
        let _ = std::fs::remove_file(path);
        failed(source)
    })
}

/// Decides or checks what the volume is, from the backing as it was found.
fn identity(
    section: &VolumeSection,
    options: &CreateOptions,
    backing: &DeviceInfo,
) -> Result<LogIdentity, CreateError> {
    let path = section.backing.display();
    let size_bytes = backing.size_bytes / BLOCK_BYTES * BLOCK_BYTES;
    if let Purpose::Replica { identity, .. } = options.purpose {
        let wanted = identity.0;
        if wanted.size_bytes != size_bytes {
            return refused(format!(
                "the backing {path} has {size_bytes} bytes, the volume {}; a copy needs a backing \
                 of exactly the volume's size",
                wanted.size_bytes
            ));
        }
        if backing.logical_bytes > wanted.sector_bytes {
            return refused(format!(
                "the backing {path} has sectors of {} bytes, the volume of {}; a copy needs a \
                 backing whose sectors are not larger",
                backing.logical_bytes, wanted.sector_bytes
            ));
        }
        return Ok(wanted);
    }
    if size_bytes == 0 {
        return refused(format!("the backing {path} is smaller than 4096 bytes"));
    }
    let needed = if backing.logical_bytes > 512 {
        4096
    } else {
        512
    };
    let sector_bytes = options.sector_bytes.unwrap_or(needed);
    if sector_bytes < needed {
        return refused(format!(
            "the backing {path} has sectors of {} bytes; a volume with sectors of {sector_bytes} \
             is not possible there, leave --sector-bytes out",
            backing.logical_bytes
        ));
    }
    Ok(LogIdentity {
        volume: VolumeId(random_uuid()?),
        birth_nonce: random_bytes()?,
        size_bytes,
        sector_bytes,
    })
}

/// Nothing is taken over, or given away to be overwritten, by accident.
fn check_contents(
    section: &VolumeSection,
    options: &CreateOptions,
    backing: &Device,
) -> Result<(), CreateError> {
    let advice = match options.purpose {
        Purpose::Adopt
        | Purpose::Replica {
            overwrite_backing: true,
            ..
        }
        | Purpose::Replica { seeded: true, .. } => return Ok(()),
        Purpose::New => {
            "to make a volume of what it holds, use `hn4ctl volume adopt`; to begin with a blank \
             one, wipe it yourself (`blkdiscard -z`, or a new file)"
        }
        Purpose::Replica { .. } => {
            "the full copy would replace it; if that is meant, say so with --overwrite-backing, or \
             with --seeded if it is a copy of the primary's that was brought here"
        }
    };
    let path = &section.backing;
    match first_data(backing).map_err(os(path, "looking for data on it"))? {
        None => Ok(()),
        Some(at) => refused(format!(
            "the backing {} holds data (near byte {at}): {advice}",
            path.display()
        )),
    }
}

/// Where the start or the end of a device holds anything but zeroes.
fn first_data(device: &Device) -> io::Result<Option<u64>> {
    let mut medium = DeviceMedium::new(device)?;
    let size = medium.size_bytes() / BLOCK_BYTES * BLOCK_BYTES;
    let end = size.saturating_sub(LOOK_BYTES).max(LOOK_BYTES.min(size));
    let mut blocks = vec![AlignedBlock([0; 4096]); 16];
    for (from, to) in [(0, LOOK_BYTES.min(size)), (end, size)] {
        let mut at = from;
        while at < to {
            let left = usize::try_from((to - at) / BLOCK_BYTES).unwrap_or(usize::MAX);
            let count = left.min(blocks.len());
            medium.read(at, &mut blocks[..count])?;
            if blocks[..count]
                .iter()
                .any(|block| block.0.iter().any(|&byte| byte != 0))
            {
                return Ok(Some(at));
            }
            at += count as u64 * BLOCK_BYTES;
        }
    }
    Ok(None)
}

fn make_log(
    section: &VolumeSection,
    options: &CreateOptions,
    made: &mut Made,
) -> Result<(), CreateError> {
    let path = &section.log;
    match path.metadata() {
        Ok(metadata) => {
            if options.log_mib.is_some() {
                let what = if metadata.file_type().is_block_device() {
                    "a device has its size; leave --log-mib out"
                } else {
                    "move it away, or leave --log-mib out to use it as it is"
                };
                return refused(format!(
                    "the log {} is there already: {what}",
                    path.display()
                ));
            }
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let bytes = options.log_mib.unwrap_or(DEFAULT_LOG_MIB) << 20;
            create_preallocated(path, bytes, section.assume_strict_flush)?;
            made.0.push(path.clone());
            Ok(())
        }
        Err(error) => Err(os(path, "looking at it")(error)),
    }
}

/// The log of another volume is no place for a new one, even if only its name is wrong here.
fn refuse_existing_log(
    section: &VolumeSection,
    medium: &mut DeviceMedium,
) -> Result<(), CreateError> {
    match recovery::inspect(medium) {
        Ok((header, superblock, _)) => refused(format!(
            "{} is the log of volume {}, which it holds up to epoch {} at least. To use that \
             volume, configure it with its backing; for a new log choose another path",
            section.log.display(),
            header.identity.volume,
            superblock.durable
        )),
        Err(RecoveryError::Header(_)) => Ok(()),
        Err(source) => Err(log_error(section, source)),
    }
}
