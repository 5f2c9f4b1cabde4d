//! Creating files for logs and backings, and asking what zeroing they can do.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};

use super::info::DeviceInfo;
use super::{DeviceError, believe, file_system};
use crate::device::host::Host;
use crate::ring::OwnedBuf;

/// Bytes written at once while a file is filled.
const FILL_BYTES: usize = 1 << 20;

/// Which ways of zeroing a range work without writing the zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ZeroSupport {
    /// The range gives its space back and reads as zeroes.
    pub punch_hole: bool,
    /// The range keeps its space and reads as zeroes.
    pub zero_range: bool,
}

/// Creates a file of `size` bytes, a positive multiple of 4096, really filled with zeroes, so that
/// no later write has to convert an extent. File and folder are durable on return. The name appears
/// only when all is done: a crash leaves at most `NAME.partial`, which the next call replaces.
///
/// # Errors
/// As for [`Device::open`](super::Device::open); an existing file is never touched.
pub fn create_preallocated(
    path: &Path,
    size: u64,
    assume_strict_flush: bool,
) -> Result<(), DeviceError> {
    if size == 0 || !size.is_multiple_of(4096) || i64::try_from(size).is_err() {
        return Err(DeviceError::BadSize {
            path: path.display().to_string(),
            bytes: size,
        });
    }
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    if path.symlink_metadata().is_ok() {
        let error = io::Error::from(io::ErrorKind::AlreadyExists);
        return Err(DeviceError::os(path, "creating")(error));
    }
    believe(&Host::real(), folder, assume_strict_flush)?;
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let made = fill(&partial, size).and_then(|()| {
        // Never over a file that appeared in the meantime.
        renameat2(
            AT_FDCWD,
            &partial,
            AT_FDCWD,
            path,
            RenameFlags::RENAME_NOREPLACE,
        )
        .map_err(|errno| DeviceError::os(path, "naming")(errno.into()))?;
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(DeviceError::os(folder, "making the folder durable"))
    });
    if made.is_err() {
        // Space is what was missing, most likely. If this fails, the next call cleans up.
        let _ = std::fs::remove_file(&partial);
    }
    made
}

fn fill(path: &Path, size: u64) -> Result<(), DeviceError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(DeviceError::os(
                path,
                "removing what an earlier attempt left",
            )(error));
        }
        _ => {}
    }
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => DeviceError::NoDirect {
                path: path.display().to_string(),
                file_system: file_system(path),
            },
            _ => DeviceError::os(path, "creating")(error),
        })?;
    let writing = || DeviceError::os(path, "filling with zeroes");
    let len = i64::try_from(size).map_err(|_| writing()(io::ErrorKind::FileTooLarge.into()))?;
    // One large extent rather than many small ones, and a full disk is known before an hour of
    // writing. Not every file system can; the writes below do not depend on it.
    match fallocate(file.as_fd(), FallocateFlags::empty(), 0, len) {
        Ok(()) | Err(Errno::EOPNOTSUPP) => {}
        Err(errno) => return Err(writing()(errno.into())),
    }
    let zeroes = OwnedBuf::zeroed(FILL_BYTES);
    let mut at = 0;
    while at < size {
        let piece = usize::try_from(size - at).map_or(FILL_BYTES, |left| left.min(FILL_BYTES));
        file.write_all_at(&zeroes.bytes()[..piece], at)
            .map_err(writing())?;
        at += piece as u64;
    }
    file.sync_all()
        .map_err(DeviceError::os(path, "making it durable"))
}

pub(super) fn zeroing(info: &DeviceInfo) -> Result<ZeroSupport, DeviceError> {
    if info.file_system.is_none() {
        // The kernel writes zeroes itself for ZERO_RANGE if the disk cannot, which is still one
        // request, but it refuses to punch.
        return Ok(ZeroSupport {
            punch_hole: info.write_zeroes,
            zero_range: info.write_zeroes,
        });
    }
    let folder = info.path.parent().unwrap_or(Path::new("/"));
    let trying = || DeviceError::os(folder, "trying what its file system can zero");
    let file = File::options()
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(folder)
        .map_err(trying())?;
    file.write_all_at(&[1; 8192], 0).map_err(trying())?;
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let works = |flag| match fallocate(file.as_fd(), keep | flag, 0, 4096) {
        Ok(()) => Ok(true),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
        Err(errno) => Err(trying()(errno.into())),
    };
    Ok(ZeroSupport {
        zero_range: works(FallocateFlags::FALLOC_FL_ZERO_RANGE)?,
        punch_hole: works(FallocateFlags::FALLOC_FL_PUNCH_HOLE)?,
    })
}
