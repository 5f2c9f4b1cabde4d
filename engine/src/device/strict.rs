//! Whether a flush on a device is worth anything.
//!
//! Promise P1 stands on what lies below: a flush must reach a medium that survives a loss of power.
//! Before anything is written, this module walks down from the path - file system, partition,
//! mapper, loop - and refuses what is known to forget. What it cannot judge needs the operator's
//! word (`assume_strict_flush`), which every status then shows. A refusal cannot be overridden.
//!
//! Not here: what a disk does inside. A drive that lies about its cache is believed.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::host::{DevNumber, Host, Mount, mount_of};

/// Layers below a path. More than this is a loop of loops.
const DEPTH_MAX: u32 = 8;

/// File systems whose fsync is known to flush the device below.
const FAITHFUL: [&str; 7] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs"];

/// File systems that live in memory.
const VOLATILE: [&str; 4] = ["tmpfs", "ramfs", "devtmpfs", "hugetlbfs"];

/// Disks by the start of their kernel name: the kernel passes flushes on, or knows that there is no
/// volatile cache.
const DISKS: [&str; 9] = [
    "nvme", "sd", "vd", "xvd", "hd", "mmcblk", "pmem", "dasd", "ndblk",
];

/// Disks that are none, and where they keep their blocks.
const FORGETFUL: [(&str, &str); 3] = [
    ("zram", "compressed memory"),
    ("ram", "memory"),
    ("nullb", "nothing at all"),
];

/// Whether a kernel name belongs to a driver: `sd` has `sda` and `sdb1`, `nvme` has `nvme0n1`.
fn is_of(name: &str, driver: &str) -> bool {
    let lettered = matches!(driver, "sd" | "vd" | "xvd" | "hd" | "dasd");
    name.strip_prefix(driver)
        .and_then(|rest| rest.chars().next())
        .is_some_and(|first| {
            if lettered {
                first.is_ascii_lowercase()
            } else {
                first.is_ascii_digit()
            }
        })
}

/// The judgement.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Verdict {
    /// Every layer passes flushes on.
    Strict,
    /// A layer that cannot be judged from here.
    Unknown(String),
    /// A layer that is known to lose what was flushed.
    Refused { what: String, advice: &'static str },
}

const MOVE: &str = "put it on a disk or on a file system that is on a disk";
const REMOUNT: &str = "mount the file system with write barriers";

/// Judges a block device or regular file.
pub(super) fn judge(host: &Host, path: &Path) -> std::io::Result<Verdict> {
    judge_path(host, path, 0)
}

fn judge_path(host: &Host, path: &Path, depth: u32) -> std::io::Result<Verdict> {
    let metadata = path.metadata()?;
    if metadata.file_type().is_block_device() {
        return Ok(judge_disk(host, DevNumber::of(metadata.rdev()), depth));
    }
    Ok(judge_mount(host, &mount_of(path)?, depth))
}

/// Judges a file system and what it is on.
pub(super) fn judge_mount(host: &Host, mount: &Mount, depth: u32) -> Verdict {
    let place = format!("{} on {}", mount.fs, mount.point.display());
    if VOLATILE.contains(&mount.fs.as_str()) {
        return Verdict::Refused {
            what: format!("{place} lives in memory"),
            advice: MOVE,
        };
    }
    let lax = mount.options.iter().find(|option| {
        let value = option.strip_prefix("fsync_mode=").unwrap_or(option);
        matches!(
            value,
            "nobarrier" | "barrier=0" | "barrier=none" | "volatile"
        )
    });
    if let Some(option) = lax {
        return Verdict::Refused {
            what: format!("{place} is mounted {option}"),
            advice: REMOUNT,
        };
    }
    if !FAITHFUL.contains(&mount.fs.as_str()) {
        return Verdict::Unknown(place);
    }
    // Some file systems have a number of their own; the source names the device then.
    let number = match mount.device {
        DevNumber(0, _) => mount
            .source
            .metadata()
            .ok()
            .map(|source| DevNumber::of(source.rdev())),
        number => Some(number),
    };
    match number {
        Some(number) => judge_disk(host, number, depth + 1),
        None => Verdict::Unknown(format!("the device below {place}")),
    }
}

fn judge_disk(host: &Host, number: DevNumber, depth: u32) -> Verdict {
    if depth > DEPTH_MAX {
        return Verdict::Unknown(format!("a stack of more than {DEPTH_MAX} devices"));
    }
    let Some(disk) = host.disk(number) else {
        return Verdict::Unknown(format!(
            "device {}:{}, unknown to sysfs",
            number.0, number.1
        ));
    };
    let name = disk.name.as_str();
    if let Some((_, what)) = FORGETFUL.iter().find(|(prefix, _)| is_of(name, prefix)) {
        return Verdict::Refused {
            what: format!("{name} is backed by {what}"),
            advice: MOVE,
        };
    }
    if name.starts_with("loop") {
        return judge_loop(host, &disk, depth);
    }
    let below = disk.slaves();
    if !below.is_empty() {
        // As weak as the weakest part.
        return below
            .into_iter()
            .map(|part| judge_disk(host, part, depth + 1))
            .max()
            .unwrap_or(Verdict::Strict);
    }
    if DISKS.iter().any(|prefix| is_of(name, prefix)) {
        return Verdict::Strict;
    }
    Verdict::Unknown(format!("block device {name}"))
}

fn judge_loop(host: &Host, disk: &super::host::Disk, depth: u32) -> Verdict {
    let name = &disk.name;
    let Some(file) = disk.backing_file() else {
        return Verdict::Unknown(format!("{name}, which has no backing file"));
    };
    match judge_path(host, &file, depth + 1) {
        Ok(Verdict::Strict) => Verdict::Strict,
        Ok(Verdict::Unknown(what)) => {
            Verdict::Unknown(format!("{name} over {}: {what}", file.display()))
        }
        Ok(Verdict::Refused { what, advice }) => Verdict::Refused {
            what: format!("{name} over {}: {what}", file.display()),
            advice,
        },
        Err(error) => Verdict::Unknown(format!("{name} over {}: {error}", file.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A sysfs with the given disks, each with a number `8:n`.
    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new(disks: &[(&str, &str)]) -> Self {
            let fake = Self(tempfile::tempdir().expect("a directory"));
            for &(number, name) in disks {
                let folder = fake.0.path().join("devices").join(name);
                std::fs::create_dir_all(folder.join("slaves")).expect("a directory");
                std::fs::write(folder.join("dev"), format!("{number}\n")).expect("a file");
                let links = fake.0.path().join("dev/block");
                std::fs::create_dir_all(&links).expect("a directory");
                symlink(&folder, links.join(number)).expect("a link");
            }
            fake
        }

        fn file(&self, path: &str, text: &str) {
            let path = self.0.path().join("devices").join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            std::fs::write(path, text).expect("a file");
        }

        fn slave(&self, above: &str, below: &str) {
            let devices = self.0.path().join("devices");
            let link = devices.join(above).join("slaves").join(below);
            symlink(devices.join(below), link).expect("a link");
        }

        fn judge(&self, minor: u64) -> Verdict {
            judge_disk(&Host::at(self.0.path()), DevNumber(8, minor), 0)
        }
    }

    fn mount(fs: &str, options: &str) -> Mount {
        Mount {
            device: DevNumber(8, 1),
            point: "/data".into(),
            fs: fs.to_owned(),
            source: "/dev/sda".into(),
            options: options.split(',').map(str::to_owned).collect(),
        }
    }

    #[test]
    fn disks_pass_memory_is_refused_and_strangers_are_unknown() {
        let fake = Fake::new(&[
            ("8:1", "sda"),
            ("8:2", "nvme0n1"),
            ("8:3", "zram0"),
            ("8:4", "ram15"),
            ("8:5", "nullb0"),
            ("8:6", "nbd3"),
            ("8:7", "sda/sda1"),
        ]);
        fake.file("sda/sda1/partition", "1\n");
        for minor in [1, 2, 7] {
            assert_eq!(fake.judge(minor), Verdict::Strict, "{minor}");
        }
        for minor in [3, 4, 5] {
            assert!(
                matches!(fake.judge(minor), Verdict::Refused { .. }),
                "{minor}"
            );
        }
        for minor in [6, 99] {
            assert!(matches!(fake.judge(minor), Verdict::Unknown(_)), "{minor}");
        }
    }

    #[test]
    fn a_stack_is_as_strict_as_its_weakest_part() {
        let fake = Fake::new(&[
            ("8:1", "sda"),
            ("8:2", "dm-0"),
            ("8:3", "md0"),
            ("8:4", "zram1"),
            ("8:5", "dm-1"),
            ("8:6", "dm-2"),
        ]);
        fake.slave("dm-0", "sda");
        fake.slave("md0", "dm-0");
        fake.slave("md0", "zram1");
        fake.slave("dm-2", "dm-2");
        assert_eq!(fake.judge(2), Verdict::Strict);
        assert!(matches!(fake.judge(3), Verdict::Refused { .. }));
        assert!(
            matches!(fake.judge(5), Verdict::Unknown(_)),
            "no parts to judge"
        );
        assert!(matches!(fake.judge(6), Verdict::Unknown(_)), "a loop ends");
    }

    #[test]
    fn file_systems_without_barriers_or_without_a_disk_are_refused() {
        let fake = Fake::new(&[("8:1", "sda")]);
        let judge = |fs, options| judge_mount(&Host::at(fake.0.path()), &mount(fs, options), 0);
        assert_eq!(judge("ext4", "rw,relatime,data=writeback"), Verdict::Strict);
        for (fs, options) in [
            ("ext4", "rw,nobarrier"),
            ("ext3", "rw,barrier=0"),
            ("f2fs", "rw,fsync_mode=nobarrier"),
            ("tmpfs", "rw"),
            ("ramfs", "rw"),
        ] {
            assert!(
                matches!(judge(fs, options), Verdict::Refused { .. }),
                "{fs} {options}"
            );
        }
        for fs in ["nfs4", "overlay", "fuseblk", "zfs"] {
            assert!(matches!(judge(fs, "rw"), Verdict::Unknown(_)), "{fs}");
        }
    }
}
