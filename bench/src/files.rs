//! Files to measure on: really written, with data that cannot be compressed.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;

use anyhow::{Context, Result};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::pattern::Random;

/// Makes a file, writes all of it, and makes that durable.
///
/// # Errors
/// If it exists, or there is no room.
pub fn make_file(path: &Path, bytes: u64) -> Result<()> {
    let mut file = File::create_new(path).with_context(|| format!("{}", path.display()))?;
    let mut data = vec![0; 1 << 20];
    let mut random = Random::new(bytes);
    for _ in 0..bytes >> 20 {
        random.fill(&mut data);
        file.write_all(&data)?;
    }
    file.sync_all()?;
    Ok(())
}

/// Size of a file or block device in bytes.
///
/// # Errors
/// If it cannot be told.
pub fn size_of(mut file: &File) -> Result<u64> {
    Ok(file.seek(SeekFrom::End(0))?)
}

/// Makes a file durable and has the kernel forget what it holds of it in memory.
///
/// # Errors
/// If it is not there.
pub fn forget_cache(path: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}
