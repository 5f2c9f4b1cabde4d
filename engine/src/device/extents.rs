//! Where a file holds data and where it has holes, so that a full copy need not read what was
//! never written.
//!
//! Only a hint: what is written meanwhile may be missed, which the epochs of the log bring later.
//! Block devices cannot tell; a file system is asked only if it is known to tell the truth.

use std::fs::File;
use std::io;

use hn4::types::BLOCK_BYTES;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::Device;

/// File systems whose holes surely read as zeroes.
pub(crate) const KNOWN_FILE_SYSTEMS: [&str; 4] = ["ext4", "xfs", "btrfs", "f2fs"];

/// What lies at a place of a device. Positive multiples of 4096 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extent {
    /// So many bytes that may hold anything.
    Data(u64),
    /// So many bytes that read as zeroes.
    Hole(u64),
}

/// Asks about holes. Shares the device's lock, like its descriptor.
#[derive(Debug)]
pub struct Extents(Option<File>);

impl Device {
    /// For asking where this device has holes.
    ///
    /// # Errors
    /// When the process has too many open files.
    pub fn extents(&self) -> io::Result<Extents> {
        let tells = self.info.file_system.as_deref();
        let tells = tells.is_some_and(|fs| KNOWN_FILE_SYSTEMS.contains(&fs));
        let file = tells.then(|| self.file.try_clone()).transpose()?;
        Ok(Extents(file))
    }
}

impl Extents {
    /// What lies from `offset` on, up to `end` at most. Both are multiples of 4096, and `offset` is
    /// the smaller one. Everything counts as data where nothing is known.
    #[must_use]
    pub fn at(&self, offset: u64, end: u64) -> Extent {
        let everything = end - offset;
        let Some(file) = &self.0 else {
            return Extent::Data(everything);
        };
        let seek = |from: u64, whence| {
            let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
            let found = lseek(file, from, whence)?;
            Ok(u64::try_from(found).unwrap_or(0).min(end))
        };
        let data = match seek(offset, Whence::SeekData) {
            Ok(data) => data / BLOCK_BYTES * BLOCK_BYTES,
            // No data up to the end of the file.
            Err(Errno::ENXIO) => end,
            Err(_) => return Extent::Data(everything),
        };
        if data > offset {
            return Extent::Hole(data - offset);
        }
        match seek(offset, Whence::SeekHole) {
            Ok(hole) if hole > offset => {
                let bytes = (hole - offset).next_multiple_of(BLOCK_BYTES);
                Extent::Data(bytes.min(everything))
            }
            _ => Extent::Data(everything),
        }
    }
}
