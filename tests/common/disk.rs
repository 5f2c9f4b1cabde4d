//! Disks for tests that lose power: a file that nbdfuse mounts, which a daemon opens with O_DIRECT
//! like any other, and behind it something that forgets what was not flushed. And loop devices.
//!
//! Behind the file is either nbdkit with its cache filter in writeback mode, which loses everything
//! that was not flushed, or a [`VolatileDisk`], which loses a random part of it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hn4_replicad::quickstart::image::find_program;
use hn4_replicad::quickstart::load::Random;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::volatile::VolatileDisk;
use super::{LIMIT, missing};

/// What forgets.
enum Behind {
    /// Everything that was not flushed is lost.
    Nbdkit {
        file: PathBuf,
        cache: &'static str,
        process: Option<Child>,
    },
    /// A random part of it is lost.
    Volatile(VolatileDisk),
}

/// A disk that can lose its power.
pub(crate) struct Disk {
    mount: PathBuf,
    socket: PathBuf,
    behind: Behind,
    fuse: Option<Child>,
}

impl Disk {
    /// A disk that loses a random part of what was not flushed.
    pub(crate) fn volatile(folder: &Path, name: &str, bytes: u64) -> Self {
        Self::new(folder, name, Behind::Volatile(VolatileDisk::new(bytes)))
    }

    /// The same, with physical sectors of 4096 bytes that are damaged as a whole.
    pub(crate) fn with_large_sectors(folder: &Path, name: &str, bytes: u64) -> Self {
        let disk = VolatileDisk::with_large_sectors(bytes);
        Self::new(folder, name, Behind::Volatile(disk))
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.mount
    }

    /// A disk that loses all that was not flushed.
    pub(crate) fn nbdkit(folder: &Path, name: &str, bytes: u64) -> Self {
        let file = folder.join(format!("{name}.disk"));
        std::fs::File::create(&file)
            .and_then(|file| file.set_len(bytes))
            .expect("a disk's file");
        let behind = Behind::Nbdkit {
            file,
            cache: "writeback",
            process: None,
        };
        Self::new(folder, name, behind)
    }

    fn new(folder: &Path, name: &str, behind: Behind) -> Self {
        let mount = folder.join(name);
        std::fs::write(&mount, "").expect("a place to mount on");
        let mut disk = Self {
            mount,
            socket: folder.join(format!("{name}.sock")),
            behind,
            fuse: None,
        };
        disk.power_on();
        disk
    }

    /// From the next start on, nbdkit ignores flushes: a disk that lies.
    pub(crate) fn lie(&mut self) {
        if let Behind::Nbdkit { cache, .. } = &mut self.behind {
            *cache = "unsafe";
        }
    }

    /// Makes the file appear.
    pub(crate) fn power_on(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        match &mut self.behind {
            Behind::Nbdkit {
                file,
                cache,
                process,
            } => {
                let child = Command::new(find_program("nbdkit").expect("looked for before"))
                    .args(["--foreground", "--exit-with-parent", "--unix"])
                    .arg(&self.socket)
                    .args(["--filter=cache", "file"])
                    .arg(&*file)
                    .arg(format!("cache={cache}"))
                    .stdin(Stdio::null())
                    .spawn();
                *process = Some(child.expect("nbdkit"));
            }
            Behind::Volatile(disk) => disk.power_on(&self.socket),
        }
        wait("a disk to listen", || self.socket.exists());
        let fuse = Command::new(find_program("nbdfuse").expect("looked for before"))
            .arg(&self.mount)
            .arg("--unix")
            .arg(&self.socket)
            .stdin(Stdio::null())
            .spawn();
        self.fuse = Some(fuse.expect("nbdfuse"));
        wait("the mount", || is_mounted(&self.mount));
    }

    /// What forgets a random part, and has faults where a test wants them.
    pub(crate) fn behind(&self) -> &VolatileDisk {
        match &self.behind {
            Behind::Volatile(disk) => disk,
            Behind::Nbdkit { .. } => panic!("nbdkit's disks have no such faults"),
        }
    }

    /// The moment of the cut: from now on the disk answers nothing.
    pub(crate) fn freeze(&self) {
        match &self.behind {
            Behind::Nbdkit { process, .. } => {
                let process = process.as_ref().expect("it is on");
                let id = i32::try_from(process.id()).expect("a process id");
                kill(Pid::from_raw(id), Signal::SIGSTOP).expect("stopped");
            }
            Behind::Volatile(disk) => disk.freeze(),
        }
    }

    /// Forgets, and takes the file away.
    pub(crate) fn power_off(&mut self, random: &mut Random) {
        // It is frozen, or nobody uses it: nothing passes nbdfuse in its last moment.
        self.freeze();
        end(&mut self.fuse);
        unmount(&self.mount);
        match &mut self.behind {
            // With it goes what it has in memory.
            Behind::Nbdkit { process, .. } => end(process),
            Behind::Volatile(disk) => disk.power_off(random),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Behind::Nbdkit { process, .. } = &mut self.behind {
            end(process);
        }
        end(&mut self.fuse);
        if is_mounted(&self.mount) {
            unmount(&self.mount);
        }
    }
}

fn end(process: &mut Option<Child>) {
    if let Some(mut process) = process.take() {
        // It may be gone already.
        let _ = process.kill();
        let _ = process.wait();
    }
}

fn unmount(mount: &Path) {
    let status = Command::new("umount")
        .arg("--lazy")
        .arg(mount)
        .status()
        .expect("umount");
    assert!(status.success(), "{} cannot be unmounted", mount.display());
}

fn is_mounted(mount: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mounts").expect("the mount table");
    let mount = mount.display().to_string();
    table
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(&mount))
}

/// Waits for something that announces itself in no other way.
pub(crate) fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether disks that lose power can be made here.
pub(crate) fn can_lose_power(programs: &[&str]) -> bool {
    for name in programs {
        if find_program(name).is_none() {
            missing(name);
            return false;
        }
    }
    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    if device.is_err() || !nix::unistd::Uid::effective().is_root() {
        // Not every machine of a build farm allows it, whatever is installed.
        eprintln!("SKIPPED: /dev/fuse cannot be used, or this is not root");
        return false;
    }
    true
}

/// Whether a loop device can be made here.
pub(crate) fn can_make_loops() -> bool {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(1 << 20).expect("a size");
    Loop::over(file.path(), &[]).is_some()
}

/// A loop device over a file, gone when dropped.
pub(crate) struct Loop {
    /// `/dev/loopN`.
    pub(crate) device: PathBuf,
}

impl Loop {
    /// A loop device with direct I/O; `None`, said aloud, where this machine has none to give.
    pub(crate) fn over(file: &Path, options: &[&str]) -> Option<Self> {
        if !nix::unistd::Uid::effective().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("SKIPPED: loop devices cannot be used, or this is not root");
            return None;
        }
        let output = Command::new(find_program("losetup").expect("part of every system"))
            .args(["--find", "--show", "--direct-io=on"])
            .args(options)
            .arg(file)
            .output()
            .expect("losetup");
        let said = super::text(&output);
        if !output.status.success() {
            eprintln!("SKIPPED: no loop device: {said}");
            return None;
        }
        Some(Self {
            device: PathBuf::from(said.trim()),
        })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // It stays if someone has it open, and goes when they let go.
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.device)
            .status();
    }
}
