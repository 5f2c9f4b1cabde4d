//! Opening what the log and the backing lie on: block devices, loop devices and regular files.
//!
//! Invariants:
//! - Before anything is written, a device that is known to forget what was flushed is refused with
//!   HN4's `HW_IO`, and one that cannot be judged needs `assume_strict_flush` (promise P1).
//! - A device has one user: it is locked while it is open, and stays locked as long as the ring
//!   holds its descriptor.
//! - All I/O is direct. A file system that cannot do that is refused.
//!
//! Not here: I/O (`ring`), what is written where, reading or writing through a mapping of
//! persistent memory (the kind is only reported).

mod create;
mod extents;
mod host;
mod info;
mod strict;

use std::fs::{File, Metadata, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hn4::status::Code;

pub use create::{ZeroSupport, create_preallocated};
pub(crate) use extents::KNOWN_FILE_SYSTEMS;
pub use extents::{Extent, Extents};
pub use info::{DeviceInfo, DeviceKind, FlushTrust};

use self::host::{DevNumber, DirectAlign, DirectSupport, Disk, Host, Mount, mount_of};
use self::info::{DiskFacts, disk_facts};
use self::strict::{Verdict, judge};

/// Alignment that suits every disk, for those that do not say.
const SAFE_ALIGN: u32 = 4096;

/// Pause between two attempts to lock a device.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// How to open a device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOptions {
    /// What the device is, if detection should not be believed.
    pub kind_override: Option<DeviceKind>,
    /// What the medium writes at once in bytes, if the kernel's word should not be believed.
    pub physical_override: Option<u32>,
    /// Accept a device whose flush cannot be judged. Never helps against a refusal.
    pub assume_strict_flush: bool,
    /// Open for reading, with a shared lock.
    pub read_only: bool,
    /// Bypass the page cache. Off only for tools that read images.
    pub direct: bool,
    /// How long to wait for another user to let go. The kernel closes the files of a killed
    /// process's ring a little after the process is gone; a restart should not fail on that.
    pub lock_patience: Duration,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            kind_override: None,
            physical_override: None,
            assume_strict_flush: false,
            read_only: false,
            direct: true,
            lock_patience: Duration::from_secs(2),
        }
    }
}

/// Why a device was not opened or created.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It is known to lose what was flushed.
    #[error(
        "{}: {path}: a flush would not be strict, because {what}: {advice}",
        hw_io()
    )]
    NotStrict {
        /// The device.
        path: String,
        /// The layer that forgets.
        what: String,
        /// What to do.
        advice: &'static str,
    },
    /// It cannot be judged.
    #[error(
        "{}: {path}: cannot tell whether a flush is strict on {what}: if you know that it is, set \
         assume_strict_flush = true",
        hw_io()
    )]
    CannotJudge {
        /// The device.
        path: String,
        /// The layer that is not known.
        what: String,
    },
    /// Somebody else has it.
    #[error("{path}: in use by another process: stop it, or choose another device")]
    InUse {
        /// The device.
        path: String,
    },
    /// Direct I/O is impossible.
    #[error("{path}: {file_system} cannot do direct I/O (O_DIRECT): use another file system")]
    NoDirect {
        /// The device.
        path: String,
        /// Where it is.
        file_system: String,
    },
    /// Neither a regular file nor a block device.
    #[error("{path}: neither a regular file nor a block device")]
    WrongType {
        /// The path.
        path: String,
    },
    /// Nothing can be stored there.
    #[error("{path}: is empty: create it with a size, or attach the loop or network device first")]
    Empty {
        /// The device.
        path: String,
    },
    /// A size that is not a positive multiple of 4096.
    #[error("{path}: a size of {bytes} bytes: it must be a positive multiple of 4096")]
    BadSize {
        /// The file to be created.
        path: String,
        /// The size.
        bytes: u64,
    },
    /// The operating system says no.
    #[error("{path}: {what}: {source}")]
    Os {
        /// The device.
        path: String,
        /// What was tried.
        what: &'static str,
        /// Its word.
        source: io::Error,
    },
}

/// HN4's name for the refusal of a device.
fn hw_io() -> String {
    let code = Code::HwIo;
    format!("{} (-{:#x})", code.name(), code.value().unsigned_abs())
}

impl DeviceError {
    /// HN4's code for the refusal, if it is one of HN4's.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::NotStrict { .. } | Self::CannotJudge { .. } => Some(Code::HwIo),
            _ => None,
        }
    }

    fn os(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::Os { path, what, source }
    }
}

/// A device that is open, locked and believed.
#[derive(Debug)]
pub struct Device {
    file: File,
    info: DeviceInfo,
}

impl Device {
    /// Opens and locks a device; see the module for what is checked. Writes nothing.
    ///
    /// # Errors
    /// [`DeviceError`] says what is wrong with which device, and what to do.
    pub fn open(path: &Path, options: DeviceOptions) -> Result<Self, DeviceError> {
        let host = Host::real();
        let path = path
            .canonicalize()
            .map_err(DeviceError::os(path, "looking it up"))?;
        let looked = path
            .metadata()
            .map_err(DeviceError::os(&path, "looking at it"))?;
        if !looked.file_type().is_block_device() && !looked.is_file() {
            return Err(DeviceError::WrongType {
                path: path.display().to_string(),
            });
        }
        let flush = believe(&host, &path, options.assume_strict_flush)?;
        let give_up = Instant::now() + options.lock_patience;
        let file = loop {
            match open_locked(&path, &looked, options) {
                Err(DeviceError::InUse { .. }) if Instant::now() < give_up => {
                    // Nothing announces that a lock of this kind becomes free.
                    std::thread::sleep(LOCK_RETRY);
                }
                result => break result?,
            }
        };
        let opened = file
            .metadata()
            .map_err(DeviceError::os(&path, "looking at it"))?;
        if (opened.dev(), opened.ino()) != (looked.dev(), looked.ino()) {
            let source = io::Error::other("another file took its place while it was opened");
            return Err(DeviceError::Os {
                path: path.display().to_string(),
                what: "opening",
                source,
            });
        }
        let info = gather(&host, path, &file, &opened, options, flush)?;
        if info.size_bytes == 0 {
            return Err(DeviceError::Empty {
                path: info.path.display().to_string(),
            });
        }
        Ok(Self { file, info })
    }

    /// The facts.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// A descriptor for [`Ring::add_file`](crate::ring::Ring::add_file). It shares the lock, which
    /// ends when the last descriptor is closed.
    ///
    /// # Errors
    /// When the process has too many open files.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// Which ways of zeroing a range work here without writing zeroes. Tried on a nameless file
    /// beside a regular file; read from sysfs for a disk. The device itself is not touched.
    ///
    /// # Errors
    /// When the nameless file cannot be written.
    pub fn zeroing(&self) -> Result<ZeroSupport, DeviceError> {
        create::zeroing(&self.info)
    }
}

/// Decides whether flushes on a path are to be believed.
fn believe(host: &Host, path: &Path, assume: bool) -> Result<FlushTrust, DeviceError> {
    let verdict = match judge(host, path) {
        Ok(verdict) => verdict,
        Err(error) => Verdict::Unknown(error.to_string()),
    };
    let path = path.display().to_string();
    match verdict {
        Verdict::Strict => Ok(FlushTrust::Recognised),
        Verdict::Unknown(what) if assume => Ok(FlushTrust::Assumed(what)),
        Verdict::Unknown(what) => Err(DeviceError::CannotJudge { path, what }),
        Verdict::Refused { what, advice } => Err(DeviceError::NotStrict { path, what, advice }),
    }
}

fn file_system(path: &Path) -> String {
    mount_of(path).map_or_else(
        |_| "its file system".to_owned(),
        |mount| format!("{} on {}", mount.fs, mount.point.display()),
    )
}

/// Opens for direct I/O and takes the lock.
fn open_locked(
    path: &Path,
    metadata: &Metadata,
    options: DeviceOptions,
) -> Result<File, DeviceError> {
    let mut flags = libc::O_CLOEXEC | libc::O_NOFOLLOW;
    if options.direct {
        flags |= libc::O_DIRECT;
    }
    if metadata.file_type().is_block_device() && !options.read_only {
        // For a block device this is a claim: mounts and mappers respect it.
        flags |= libc::O_EXCL;
    }
    let in_use = || DeviceError::InUse {
        path: path.display().to_string(),
    };
    let file = File::options()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => in_use(),
            Some(libc::EINVAL) if options.direct => DeviceError::NoDirect {
                path: path.display().to_string(),
                file_system: file_system(path),
            },
            _ => DeviceError::os(path, "opening")(error),
        })?;
    let locked = if options.read_only {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    match locked {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(in_use()),
        Err(TryLockError::Error(error)) => Err(DeviceError::os(path, "locking")(error)),
    }
}

/// The disk below a file or loop device, as far down as can be seen.
fn bottom(host: &Host, metadata: &Metadata, mount: Option<&Mount>, depth: u32) -> Option<Disk> {
    let number = match mount {
        None => DevNumber::of(metadata.rdev()),
        Some(Mount {
            device: DevNumber(0, _),
            source,
            ..
        }) => DevNumber::of(source.metadata().ok()?.rdev()),
        Some(mount) => mount.device,
    };
    let disk = host.disk(number)?;
    let below = disk.backing_file().filter(|_| depth < 8).and_then(|file| {
        let metadata = file.metadata().ok()?;
        let mount = if metadata.is_file() {
            Some(mount_of(&file).ok()?)
        } else {
            None
        };
        bottom(host, &metadata, mount.as_ref(), depth + 1)
    });
    below.or(Some(disk))
}

fn gather(
    host: &Host,
    path: PathBuf,
    file: &File,
    metadata: &Metadata,
    options: DeviceOptions,
    flush: FlushTrust,
) -> Result<DeviceInfo, DeviceError> {
    let is_block = metadata.file_type().is_block_device();
    let mount = if is_block { None } else { mount_of(&path).ok() };
    let size_bytes = if is_block {
        let mut end = file;
        end.seek(SeekFrom::End(0))
            .map_err(DeviceError::os(&path, "asking for its size"))?
    } else {
        metadata.len()
    };
    let bottom_facts =
        bottom(host, metadata, mount.as_ref(), 0).map(|disk| disk_facts(host, &disk));
    let own_disk = if is_block {
        host.disk(DevNumber::of(metadata.rdev()))
    } else {
        None
    };
    let own = own_disk.as_ref().map(|disk| disk_facts(host, disk));
    let medium = bottom_facts
        .as_ref()
        .map_or(DeviceKind::Unknown, |facts| facts.medium);
    let detected = match (&own_disk, is_block) {
        (_, false) => DeviceKind::File,
        (Some(disk), true) if disk.name.starts_with("loop") => DeviceKind::Loop,
        _ => medium,
    };
    // The queue of the device itself counts; a file has only the one below.
    let facts = own.or(bottom_facts);
    let fact = |get: fn(&DiskFacts) -> Option<u32>| facts.as_ref().and_then(get);
    let told = match host::direct_support(file.as_fd()) {
        DirectSupport::Aligned(align) => Some(align),
        DirectSupport::Untold => None,
        DirectSupport::Impossible if options.direct && !is_block => {
            return Err(DeviceError::NoDirect {
                file_system: file_system(&path),
                path: path.display().to_string(),
            });
        }
        DirectSupport::Impossible => None,
    };
    let align = told
        .or(facts.as_ref().and_then(|facts| facts.align))
        .unwrap_or(DirectAlign {
            memory: SAFE_ALIGN,
            offset: SAFE_ALIGN,
        });
    let logical_bytes = fact(|facts| facts.logical).unwrap_or(align.offset);
    Ok(DeviceInfo {
        path,
        kind: options.kind_override.unwrap_or(detected),
        kind_overridden: options.kind_override.is_some(),
        medium: options.kind_override.unwrap_or(medium),
        size_bytes,
        logical_bytes,
        physical_bytes: (options.physical_override)
            .or(fact(|facts| facts.physical))
            .unwrap_or(SAFE_ALIGN),
        memory_align: align.memory,
        offset_align: align.offset,
        write_cache: facts.as_ref().and_then(|facts| facts.write_cache),
        fua: facts.as_ref().and_then(|facts| facts.fua),
        dax: facts.as_ref().is_some_and(|facts| facts.dax),
        io_poll: facts.as_ref().is_some_and(|facts| facts.io_poll),
        // A file system may split what the disk would write whole.
        atomic_write_bytes: fact(|facts| facts.atomic_write).filter(|_| is_block),
        write_zeroes: facts.as_ref().is_some_and(|facts| facts.write_zeroes) && is_block,
        model: facts.and_then(|facts| facts.model),
        file_system: mount.map(|mount| mount.fs),
        read_only: options.read_only,
        flush,
    })
}
