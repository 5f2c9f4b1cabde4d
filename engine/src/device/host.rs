//! What the host says about devices and mounts: sysfs, `/proc/self/mountinfo`, `statx`.
//!
//! Everything read here is text that the kernel wrote, but nothing relies on its being complete: a
//! value that is missing is `None`, never a default that looks like a fact.
#![expect(
    unsafe_code,
    reason = "statx has no safe wrapper that knows direct I/O alignment"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Number of a block device: major, minor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct DevNumber(pub(super) u64, pub(super) u64);

impl DevNumber {
    pub(super) fn of(raw: u64) -> Self {
        Self(u64::from(libc::major(raw)), u64::from(libc::minor(raw)))
    }
}

/// A line of mountinfo, as far as it matters here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mount {
    pub(super) device: DevNumber,
    pub(super) point: PathBuf,
    pub(super) fs: String,
    pub(super) source: PathBuf,
    /// Options of the mount and of the file system.
    pub(super) options: Vec<String>,
}

/// Where to look. Tests look elsewhere.
pub(super) struct Host {
    sys: PathBuf,
}

impl Host {
    pub(super) fn real() -> Self {
        Self {
            sys: PathBuf::from("/sys"),
        }
    }

    #[cfg(test)]
    pub(super) fn at(sys: &Path) -> Self {
        Self {
            sys: sys.to_owned(),
        }
    }

    /// The whole disk behind a block device or partition.
    pub(super) fn disk(&self, number: DevNumber) -> Option<Disk> {
        let link = self
            .sys
            .join(format!("dev/block/{}:{}", number.0, number.1));
        let path = link.canonicalize().ok()?;
        let whole = if path.join("partition").exists() {
            path.parent()?.to_owned()
        } else {
            path
        };
        let name = whole.file_name()?.to_str()?.to_owned();
        Some(Disk { path: whole, name })
    }
}

/// A whole disk in sysfs.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    path: PathBuf,
    pub(super) name: String,
}

impl Disk {
    /// A value below the disk's folder, without the newline.
    pub(super) fn value(&self, name: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.path.join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.value(name)?.parse().ok()
    }

    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        self.number(name).map(|number| number != 0)
    }

    /// The devices that a device-mapper, RAID or similar device is built on.
    pub(super) fn slaves(&self) -> Vec<DevNumber> {
        let Ok(entries) = std::fs::read_dir(self.path.join("slaves")) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| std::fs::read_to_string(entry.path().join("dev")).ok())
            .filter_map(|text| parse_number(text.trim()))
            .collect()
    }

    /// The file behind a loop device.
    pub(super) fn backing_file(&self) -> Option<PathBuf> {
        self.value("loop/backing_file").map(PathBuf::from)
    }
}

fn parse_number(text: &str) -> Option<DevNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DevNumber(major.parse().ok()?, minor.parse().ok()?))
}

/// Undoes the octal escapes of mountinfo (`\040` is a space).
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(&byte) = bytes.get(at) {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|_| byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        at += if octal.is_some() { 4 } else { 1 };
        out.push(octal.unwrap_or(byte));
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Finds a mount by its id.
pub(super) fn find_mount(mountinfo: &str, id: u64) -> Option<Mount> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<_> = left.split(' ').collect();
        let right: Vec<_> = right.split(' ').collect();
        let (&[own_id, _, device, _, point, options, ..], &[fs, source, ..]) =
            (left.as_slice(), right.as_slice())
        else {
            return None;
        };
        if own_id.parse() != Ok(id) {
            return None;
        }
        let all = options
            .split(',')
            .chain(right.get(2).copied().unwrap_or("").split(','));
        Some(Mount {
            device: parse_number(device)?,
            point: unescape(point),
            fs: fs.to_owned(),
            source: unescape(source),
            options: all.map(str::to_owned).collect(),
        })
    })
}

/// The mount a path lies on. Asks the kernel by descriptor, so that neither bind mounts nor mounts
/// over mounts confuse it.
pub(super) fn mount_of(path: &Path) -> io::Result<Mount> {
    let handle = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)?;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", handle.as_raw_fd()))?;
    let id = info
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))
        .and_then(|id| id.trim().parse().ok());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    id.and_then(|id| find_mount(&mounts, id)).ok_or_else(|| {
        io::Error::other("its mount is not visible in /proc/self/mountinfo of this namespace")
    })
}

/// Alignment for direct I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct DirectAlign {
    /// Of addresses in memory, in bytes.
    pub(super) memory: u32,
    /// Of offsets and lengths, in bytes.
    pub(super) offset: u32,
}

/// What the kernel says about direct I/O on an open file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum DirectSupport {
    /// It does not say: a kernel before 6.1, or a file system that does not tell.
    Untold,
    /// It would go through the page cache, although `O_DIRECT` was accepted: ext4 with all data in
    /// its journal does so.
    Impossible,
    /// It is possible.
    Aligned(DirectAlign),
}

/// Asks the kernel.
pub(super) fn direct_support(file: BorrowedFd<'_>) -> DirectSupport {
    // SAFETY: plain C data, for which all zeroes is a value.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the path is an empty C string, and the answer is a statx
    // structure that outlives the call.
    let failed = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut answer,
        )
    };
    if failed != 0 || answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        return DirectSupport::Untold;
    }
    let align = DirectAlign {
        memory: answer.stx_dio_mem_align,
        offset: answer.stx_dio_offset_align,
    };
    if align.memory > 0 && align.offset > 0 {
        DirectSupport::Aligned(align)
    } else {
        DirectSupport::Impossible
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_id_with_their_escapes_and_both_kinds_of_options() {
        let text = "22 27 0:21 / /proc rw,relatime - proc proc rw\n\
            31 22 8:17 /a /mnt/my\\040disk rw,noatime shared:1 - ext4 /dev/sdb1 rw,nobarrier\n";
        let mount = find_mount(text, 31).expect("line two");
        assert_eq!(mount.device, DevNumber(8, 17));
        assert_eq!(mount.point, Path::new("/mnt/my disk"));
        assert_eq!(
            (mount.fs.as_str(), mount.source.as_path()),
            ("ext4", Path::new("/dev/sdb1"))
        );
        assert_eq!(mount.options, ["rw", "noatime", "rw", "nobarrier"]);
        assert_eq!(find_mount(text, 1), None);
        assert_eq!(find_mount("garbage\n31 - x\n31 1 2 3 - ", 31), None);
    }

    #[test]
    fn this_machine_knows_where_its_own_files_are() {
        let mount = mount_of(Path::new("/proc/self/status")).expect("procfs");
        assert_eq!(mount.fs, "proc");
    }
}
