//! The shadow: a file that takes what differs in a full copy of a usable replica, until it is
//! switched in and written over the backing (`core/shadow.rs`).
//!
//! It is made when the volume is opened, and grows as it is written. What it holds counts only as
//! far as the log's superblock says; when that says nothing, its space is given back.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use hn4::log::CopyState;

use crate::device::{Device, DeviceError, DeviceOptions};

/// A file without any entry: a device must not be empty.
const EMPTY_BYTES: u64 = 4096;

/// See the module.
pub(super) struct ShadowFile {
    pub(super) device: Device,
    file: File,
}

impl ShadowFile {
    /// Opens the file, and makes it if it is not there.
    ///
    /// # Errors
    /// If it cannot be made, or cannot keep what is flushed.
    pub(super) fn open(
        path: &Path,
        options: DeviceOptions,
        copy: &CopyState,
    ) -> Result<Self, DeviceError> {
        let os = |what| {
            move |source| DeviceError::Os {
                path: path.display().to_string(),
                what,
                source,
            }
        };
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(os("making the shadow file"))?;
        let length = made.metadata().map_err(os("looking at it"))?.len();
        if length < EMPTY_BYTES {
            made.set_len(EMPTY_BYTES).map_err(os("making it larger"))?;
            made.sync_all().map_err(os("flushing it"))?;
            let folder = path.parent().map(File::open).transpose();
            let folder = folder.map_err(os("opening its folder"))?;
            let synced = folder.map(|folder| folder.sync_all()).transpose();
            synced.map_err(os("flushing its folder"))?;
        }
        drop(made);
        let device = Device::open(path, options)?;
        let clone = device.descriptor().map_err(os("sharing its descriptor"))?;
        let file = File::from(clone);
        let shadow = Self { device, file };
        if !copy.is_shadowed() {
            shadow.clear().map_err(os("emptying it"))?;
        }
        Ok(shadow)
    }

    /// Gives its space back.
    pub(super) fn clear(&self) -> io::Result<()> {
        self.file.set_len(EMPTY_BYTES)
    }
}
