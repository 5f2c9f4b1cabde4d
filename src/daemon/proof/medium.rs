//! A ledger in a file of the state directory.
//!
//! ```text
//! <state_dir>/proof/<volume>/ledger            the shared ledger
//! <state_dir>/proof/<volume>/local             what this node found on its own medium
//! <state_dir>/proof/<volume>/ledger.aside-<n>  what was superseded, or could not be used
//! ```

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hn4::types::VolumeId;
use hn4_proof::ledger::file::LedgerMedium;
use hn4_proof::tree::ReadAt;

use super::local::local_path;

/// Bytes that are copied at once.
const CHUNK: usize = 1 << 20;

/// Where the ledger of a volume lies.
#[must_use]
pub fn ledger_path(state_dir: &Path, volume: VolumeId) -> PathBuf {
    state_dir.join(format!("proof/{volume}/ledger"))
}

/// See the module.
#[derive(Debug)]
pub struct LedgerOnDisk {
    path: PathBuf,
    file: File,
}

impl LedgerOnDisk {
    /// Opens the ledger of a volume to append to it; makes an empty file if there is none.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(state_dir: &Path, volume: VolumeId) -> io::Result<Self> {
        Self::open_at(ledger_path(state_dir, volume))
    }

    /// Opens the node's own ledger of a volume in the same way.
    ///
    /// # Errors
    /// What the system says.
    pub fn open_local(state_dir: &Path, volume: VolumeId) -> io::Result<Self> {
        Self::open_at(local_path(state_dir, volume))
    }

    fn open_at(path: PathBuf) -> io::Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)?;
        File::open(folder)?.sync_all()?;
        Ok(Self { path, file })
    }

    /// Opens the ledger of a volume only to read it.
    ///
    /// # Errors
    /// What the system says.
    pub fn look(path: &Path) -> io::Result<Self> {
        let path = path.to_owned();
        let file = File::open(&path)?;
        Ok(Self { path, file })
    }

    fn aside(&self) -> io::Result<(File, PathBuf)> {
        let mut number = 1;
        loop {
            let path = self.path.with_extension(format!("aside-{number}"));
            match OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
            {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                other => return other.map(|file| (file, path)),
            }
        }
    }
}

impl LedgerOnDisk {
    /// Copies what lies from an offset on.
    fn copy(&self, offset: u64, to: &File) -> io::Result<()> {
        let (mut from, end) = (offset, self.len_bytes()?);
        let mut buffer = vec![0; CHUNK];
        while from < end {
            let count = usize::try_from(end - from).unwrap_or(CHUNK).min(CHUNK);
            let part = &mut buffer[..count];
            self.file.read_exact_at(part, from)?;
            to.write_all_at(part, from - offset)?;
            from += count as u64;
        }
        Ok(())
    }
}

impl ReadAt for LedgerOnDisk {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

impl LedgerMedium for LedgerOnDisk {
    fn append(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        self.file.sync_data()
    }

    fn set_aside(&mut self, offset: u64) -> io::Result<()> {
        let (aside, path) = self.aside()?;
        let copied = self.copy(offset, &aside).and_then(|()| aside.sync_all());
        if let Err(error) = copied {
            // It is tried again and again: parts would fill what little room there is.
            let _ = std::fs::remove_file(path);
            return Err(error);
        }
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        File::open(folder)?.sync_all()?;
        self.cut(offset)
    }

    fn cut(&mut self, offset: u64) -> io::Result<()> {
        self.file.set_len(offset)?;
        self.file.sync_all()
    }
}
