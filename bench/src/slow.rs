//! Files whose reads or writes take a fixed time more: where noise would hide a margin of a few
//! percent, and for disks that are far away.
//!
//! Needs nbdkit and nbdfuse. Requests are delayed each for itself, so many at a time take no longer
//! than one.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Longest wait for a mount.
const LIMIT: Duration = Duration::from_secs(60);

/// Whether a program is installed.
pub(crate) fn is_there(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
}

/// A program that is needed and not installed.
pub(crate) fn missing_tool() -> Option<&'static str> {
    ["nbdkit", "nbdfuse"]
        .into_iter()
        .find(|tool| !is_there(tool))
}

/// See the module. It is gone when it is dropped.
#[derive(Debug)]
pub(crate) struct SlowFile {
    fuse: Child,
    mount: PathBuf,
}

impl SlowFile {
    /// Memory whose writes take so much longer.
    ///
    /// # Errors
    /// If it is not there in time.
    pub(crate) fn in_memory(mount: PathBuf, mib: u64, write_delay_ms: u64) -> Result<Self> {
        let [size, delay] = [format!("{mib}M"), format!("wdelay={write_delay_ms}ms")];
        Self::new(mount, mib << 20, &["memory", &size, &delay])
    }

    /// Mounts what an nbdkit plugin with these arguments serves, so many bytes, over a file at this
    /// place.
    ///
    /// # Errors
    /// If it is not there in time.
    pub(crate) fn new(mount: PathBuf, bytes: u64, plugin: &[&str]) -> Result<Self> {
        std::fs::write(&mount, "")?;
        let fuse = Command::new("nbdfuse")
            .arg(&mount)
            .args(["--command", "nbdkit", "-s", "--exit-with-parent"])
            .arg("--filter=delay")
            .args(plugin)
            .stdin(Stdio::null())
            .spawn()
            .context("nbdfuse")?;
        let file = Self { fuse, mount };
        let deadline = Instant::now() + LIMIT;
        let is_mounted = || std::fs::metadata(&file.mount).is_ok_and(|it| it.len() == bytes);
        while !is_mounted() {
            ensure!(Instant::now() < deadline, "nbdfuse does not mount");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(file)
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        // Each may have ended already.
        let umount = ["--lazy".as_ref(), self.mount.as_os_str()];
        let _ = Command::new("umount").args(umount).status();
        let _ = self.fuse.kill();
        let _ = self.fuse.wait();
    }
}
