//! A device before its shard runs: recovery and creation read and write it synchronously.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::IntoBytes;

use crate::core::recovery::{AlignedBlock, Medium};
use crate::device::Device;

/// A device before the shard runs, read and written synchronously.
#[derive(Debug)]
pub struct DeviceMedium {
    pub(super) file: File,
    pub(super) size_bytes: u64,
}

impl DeviceMedium {
    /// Shares the device's descriptor and lock.
    ///
    /// # Errors
    /// When the process has too many open files.
    pub fn new(device: &Device) -> io::Result<Self> {
        let file = File::from(device.descriptor()?);
        Ok(Self {
            file,
            size_bytes: device.info().size_bytes,
        })
    }
}

impl Medium for DeviceMedium {
    fn read(&mut self, offset: u64, blocks: &mut [AlignedBlock]) -> io::Result<()> {
        self.file.read_exact_at(blocks.as_mut_bytes(), offset)
    }

    fn write(&mut self, offset: u64, blocks: &[AlignedBlock]) -> io::Result<()> {
        self.file.write_all_at(blocks.as_bytes(), offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}
