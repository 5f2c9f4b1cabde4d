//! The facts about a device, for decisions above and for status output.

use std::fmt;
use std::path::PathBuf;

use super::host::{DirectAlign, Disk, Host};

/// What a device is, which decides depth and order of writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceKind {
    /// NVMe: deep queues.
    Nvme,
    /// Flash behind another interface: deep queues.
    Ssd,
    /// A rotating disk: one sorted sweep.
    Hdd,
    /// Persistent memory that can be mapped.
    Pmem,
    /// A loop device.
    Loop,
    /// A regular file.
    File,
    /// A disk that does not say. Virtual disks claim to rotate, which proves nothing.
    Unknown,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nvme => "nvme",
            Self::Ssd => "ssd",
            Self::Hdd => "hdd",
            Self::Pmem => "pmem",
            Self::Loop => "loop",
            Self::File => "file",
            Self::Unknown => "unknown",
        })
    }
}

/// Why a flush on the device is believed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FlushTrust {
    /// Every layer was recognised.
    Recognised,
    /// The operator's word, about the layer named here.
    Assumed(String),
}

/// All that is known about an open device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The path with all links resolved.
    pub path: PathBuf,
    /// What it is, or what the configuration says it is.
    pub kind: DeviceKind,
    /// The kind comes from the configuration.
    pub kind_overridden: bool,
    /// The disk at the bottom, through files and loops: which order of writes suits it.
    pub medium: DeviceKind,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Smallest write in bytes.
    pub logical_bytes: u32,
    /// What the medium writes at once, in bytes; a torn write may damage this much.
    pub physical_bytes: u32,
    /// Alignment of memory for direct I/O in bytes.
    pub memory_align: u32,
    /// Alignment of offsets and lengths for direct I/O in bytes.
    pub offset_align: u32,
    /// The disk has a volatile cache, which flushes empty.
    pub write_cache: Option<bool>,
    /// The disk can write one request through its cache.
    pub fua: Option<bool>,
    /// Persistent memory can be mapped.
    pub dax: bool,
    /// The queue can be polled for completions.
    pub io_poll: bool,
    /// Largest write that is never torn, in bytes.
    pub atomic_write_bytes: Option<u32>,
    /// Ranges are zeroed by the disk without writing them.
    pub write_zeroes: bool,
    /// The disk's name for itself.
    pub model: Option<String>,
    /// The file system a file is on.
    pub file_system: Option<String>,
    /// Opened for reading only.
    pub read_only: bool,
    /// Why a flush is believed.
    pub flush: FlushTrust,
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = if self.kind_overridden {
            " (configured)"
        } else {
            ""
        };
        write!(
            f,
            "{}: {}{source}, {} bytes",
            self.path.display(),
            self.kind,
            self.size_bytes
        )?;
        if let Some(fs) = &self.file_system {
            write!(f, ", on {fs}")?;
        }
        if self.medium != self.kind {
            write!(f, ", medium {}", self.medium)?;
        }
        if let Some(model) = &self.model {
            write!(f, " {model}")?;
        }
        write!(
            f,
            ", sectors {}/{}",
            self.logical_bytes, self.physical_bytes
        )?;
        let said = |value| match value {
            Some(true) => "yes",
            Some(false) => "no",
            None => "?",
        };
        write!(
            f,
            ", write cache {}, FUA {}",
            said(self.write_cache),
            said(self.fua)
        )?;
        if self.read_only {
            f.write_str(", read-only")?;
        }
        match &self.flush {
            FlushTrust::Recognised => f.write_str(", strict flush"),
            FlushTrust::Assumed(what) => {
                write!(
                    f,
                    ", STRICT FLUSH ONLY ASSUMED (assume_strict_flush) for {what}"
                )
            }
        }
    }
}

/// What sysfs says about the disk at the bottom.
#[derive(Clone, Debug)]
pub(super) struct DiskFacts {
    pub(super) medium: DeviceKind,
    pub(super) logical: Option<u32>,
    pub(super) physical: Option<u32>,
    pub(super) align: Option<DirectAlign>,
    pub(super) write_cache: Option<bool>,
    pub(super) fua: Option<bool>,
    pub(super) dax: bool,
    pub(super) io_poll: bool,
    pub(super) atomic_write: Option<u32>,
    pub(super) write_zeroes: bool,
    pub(super) model: Option<String>,
}

pub(super) fn disk_facts(host: &Host, disk: &Disk) -> DiskFacts {
    let small = |name: &str| {
        disk.number(name)
            .and_then(|value| u32::try_from(value).ok())
    };
    let logical = small("queue/logical_block_size");
    let mask = small("queue/dma_alignment");
    let cache = disk.value("queue/write_cache");
    DiskFacts {
        medium: medium(host, disk, 0),
        logical,
        physical: small("queue/physical_block_size"),
        align: logical
            .zip(mask.and_then(|mask| mask.checked_add(1)))
            .map(|(logical, memory)| DirectAlign {
                memory,
                offset: logical,
            }),
        write_cache: cache.map(|text| text == "write back"),
        fua: disk.flag("queue/fua"),
        dax: disk.flag("queue/dax") == Some(true),
        io_poll: disk.flag("queue/io_poll") == Some(true),
        atomic_write: small("queue/atomic_write_unit_max_bytes").filter(|&bytes| bytes > 0),
        write_zeroes: disk
            .number("queue/write_zeroes_max_bytes")
            .is_some_and(|bytes| bytes > 0),
        model: disk.value("device/model"),
    }
}

/// Layers below a disk that are looked through.
const DEPTH_MAX: u32 = 8;

fn medium(host: &Host, disk: &Disk, depth: u32) -> DeviceKind {
    let name = disk.name.as_str();
    if name.starts_with("nvme") {
        return DeviceKind::Nvme;
    }
    if name.starts_with("pmem") || disk.flag("queue/dax") == Some(true) {
        return DeviceKind::Pmem;
    }
    if depth < DEPTH_MAX {
        let mut below = disk
            .slaves()
            .into_iter()
            .filter_map(|number| host.disk(number));
        if let Some(first) = below.next() {
            let kind = medium(host, &first, depth + 1);
            let same = below.all(|other| medium(host, &other, depth + 1) == kind);
            return if same { kind } else { DeviceKind::Unknown };
        }
    }
    let vendor = disk.value("device/vendor").unwrap_or_default();
    let virtual_disk = ["vd", "xvd"].iter().any(|prefix| name.starts_with(prefix))
        || ["QEMU", "VMware", "Msft", "VBOX"]
            .iter()
            .any(|start| vendor.starts_with(start));
    match disk.flag("queue/rotational") {
        Some(false) => DeviceKind::Ssd,
        Some(true) if !virtual_disk => DeviceKind::Hdd,
        _ => DeviceKind::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::DevNumber;
    use std::path::Path;

    fn kind(name: &str, files: &[(&str, &str)]) -> DeviceKind {
        let root = tempfile::tempdir().expect("a directory");
        let folder = root.path().join("devices").join(name);
        for (file, text) in files {
            let path = folder.join(file);
            std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).expect("a directory");
            std::fs::write(path, text).expect("a file");
        }
        std::fs::create_dir_all(root.path().join("dev/block")).expect("a directory");
        let link = root.path().join("dev/block/8:1");
        std::os::unix::fs::symlink(&folder, link).expect("a link");
        let host = Host::at(root.path());
        let disk = host.disk(DevNumber(8, 1)).expect("the disk");
        disk_facts(&host, &disk).medium
    }

    #[test]
    fn only_a_real_disk_is_believed_when_it_says_that_it_rotates() {
        let rotates = ("queue/rotational", "1\n");
        let still = ("queue/rotational", "0\n");
        assert_eq!(
            kind("sda", &[rotates, ("device/vendor", "ATA     \n")]),
            DeviceKind::Hdd
        );
        assert_eq!(kind("sda", &[still]), DeviceKind::Ssd);
        assert_eq!(kind("vda", &[rotates]), DeviceKind::Unknown);
        assert_eq!(kind("vda", &[still]), DeviceKind::Ssd);
        assert_eq!(
            kind("sdb", &[rotates, ("device/vendor", "QEMU\n")]),
            DeviceKind::Unknown
        );
        assert_eq!(kind("nvme0n1", &[still]), DeviceKind::Nvme);
        assert_eq!(kind("pmem0", &[still]), DeviceKind::Pmem);
        assert_eq!(kind("sdc", &[("queue/other", "")]), DeviceKind::Unknown);
    }
}
