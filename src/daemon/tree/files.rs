//! Where a volume's state tree lies, and how its backing is read.
//!
//! ```text
//! <state_dir>/tree/<volume>/manifest       which runs are the tree
//! <state_dir>/tree/<volume>/manifest.new   the next one, until it is whole
//! <state_dir>/tree/<volume>/verified       what the last deep verify found, JSON
//! <state_dir>/tree/<volume>/run-<id>       see docs/PROOF_FORMAT.md, section 3
//! ```

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hn4::types::{BLOCK_BYTES, VolumeId};
use hn4_proof::blocks::{BLOCK, Block};
use hn4_proof::tree::ReadAt;
use hn4_proof::tree::keeper::{Device, TreeMedium};
use nix::errno::Errno;
use nix::libc;
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use nix::unistd::{Whence, lseek};
use thiserror::Error;

/// Alignment of memory for direct I/O that suits every device.
const ALIGN: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(super) struct Files {
    folder: PathBuf,
}

/// A run that is open.
#[derive(Debug)]
pub(super) struct RunFile(File);

/// Bytes of a run after which they are flushed, so that no flush takes long.
const FLUSH_EVERY: usize = 4 << 20;

/// A run that is being written.
#[derive(Debug)]
pub(super) struct Sink {
    file: File,
    unflushed: usize,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.unflushed += written;
        if self.unflushed >= FLUSH_EVERY {
            self.file.sync_data()?;
            self.unflushed = 0;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadAt for RunFile {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}

impl Files {
    /// Where a volume's tree lies.
    pub(super) fn folder(state_dir: &Path, volume: VolumeId) -> PathBuf {
        state_dir.join(format!("tree/{volume}"))
    }

    /// The folder of a volume's tree; it is made if it is not there.
    pub(super) fn open(state_dir: &Path, volume: VolumeId) -> io::Result<Self> {
        let folder = Self::folder(state_dir, volume);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        for parent in folder.ancestors().skip(1).take(2) {
            File::open(parent)?.sync_all()?;
        }
        Ok(Self { folder })
    }

    fn run(&self, id: u64) -> PathBuf {
        self.folder.join(format!("run-{id}"))
    }

    /// What is known of the medium.
    pub(super) fn record(&self) -> io::Result<Option<Vec<u8>>> {
        read(&self.folder.join("verified"))
    }

    /// Replaces what is known of the medium.
    pub(super) fn keep_record(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.replace("verified", bytes)
    }

    /// Nothing is known of the medium any more.
    pub(super) fn forget_record(&mut self) -> io::Result<()> {
        match std::fs::remove_file(self.folder.join("verified")) {
            Ok(()) => self.sync(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let new = self.folder.join(format!("{name}.new"));
        let mut file = create(&new)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        std::fs::rename(new, self.folder.join(name))?;
        self.sync()
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.folder)?.sync_all()
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl TreeMedium for Files {
    type Run = RunFile;
    type Sink = BufWriter<Sink>;

    fn manifest(&self) -> io::Result<Option<Vec<u8>>> {
        read(&self.folder.join("manifest"))
    }

    fn replace_manifest(&mut self, bytes: Option<&[u8]>) -> io::Result<()> {
        let path = self.folder.join("manifest");
        let Some(bytes) = bytes else {
            return match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => self.sync(),
            };
        };
        self.replace("manifest", bytes)
    }

    fn create(&mut self, id: u64) -> io::Result<BufWriter<Sink>> {
        let file = create(&self.run(id))?;
        let unflushed = 0;
        let sink = Sink { file, unflushed };
        Ok(BufWriter::with_capacity(1 << 17, sink))
    }

    fn seal(&mut self, sink: BufWriter<Sink>) -> io::Result<()> {
        sink.into_inner()?.file.sync_data()
    }

    fn open(&self, id: u64) -> io::Result<RunFile> {
        Ok(RunFile(File::open(self.run(id))?))
    }

    fn remove(&mut self, id: u64) -> io::Result<()> {
        std::fs::remove_file(self.run(id))
    }

    fn ids(&self) -> io::Result<Vec<u64>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|name| name.strip_prefix("run-"));
            ids.extend(id.and_then(|id| id.parse::<u64>().ok()));
        }
        Ok(ids)
    }
}

/// The backing of a volume, read past the page cache, without a lock: the shard has that.
#[derive(Debug)]
pub(super) struct Backing {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    tells_holes: bool,
    scratch: Vec<u8>,
}

impl Backing {
    /// Opens a device or file of which `size_bytes` are the volume.
    pub(super) fn open(path: &Path, size_bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(path)?;
        // Block devices have no holes, and other file systems may not tell the truth about theirs.
        let known = [
            EXT4_SUPER_MAGIC,
            XFS_SUPER_MAGIC,
            BTRFS_SUPER_MAGIC,
            F2FS_SUPER_MAGIC,
        ];
        let tells_holes =
            file.metadata()?.is_file() && known.contains(&fstatfs(&file)?.filesystem_type());
        Ok(Self {
            path: path.to_owned(),
            file,
            size_bytes,
            tells_holes,
            scratch: Vec::new(),
        })
    }
}

/// Why a block was not repaired.
#[derive(Debug, Error)]
pub(super) enum RepairError {
    /// The medium does not take or keep it. Nothing else is lost.
    #[error(transparent)]
    Block(#[from] io::Error),
    /// Whatever was written to the medium before may be lost.
    #[error("the backing cannot be flushed: {0}")]
    Flush(#[source] io::Error),
}

impl Backing {
    /// The next place of a kind in a file that tells of its holes; `None` behind its end.
    fn seek(&self, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
        let from = i64::try_from(offset).map_err(io::Error::other)?;
        match lseek(&self.file, from, whence) {
            Ok(found) => Ok(Some(u64::try_from(found).map_err(io::Error::other)?)),
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes a block where nothing else writes at the moment, flushes it, and reads it again.
    pub(super) fn repair(&mut self, block: u64, contents: &Block) -> Result<(), RepairError> {
        let offset = block * BLOCK_BYTES;
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(&self.path)?;
        self.scratch.resize(contents.len() + ALIGN, 0);
        let start = self.scratch.as_ptr().align_offset(ALIGN);
        let aligned = &mut self.scratch[start..start + contents.len()];
        aligned.copy_from_slice(contents);
        file.write_all_at(aligned, offset)?;
        file.sync_data().map_err(RepairError::Flush)?;
        let mut again = [0; BLOCK];
        self.read(offset, &mut again)?;
        match again == *contents {
            true => Ok(()),
            false => Err(io::Error::other("it reads back as something else").into()),
        }
    }
}

impl Device for Backing {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.scratch.resize(buffer.len() + ALIGN, 0);
        let start = self.scratch.as_ptr().align_offset(ALIGN);
        let aligned = &mut self.scratch[start..start + buffer.len()];
        self.file.read_exact_at(aligned, offset)?;
        buffer.copy_from_slice(aligned);
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> io::Result<u64> {
        if !self.tells_holes {
            return Ok(offset);
        }
        let found = self.seek(offset, Whence::SeekData)?.unwrap_or(u64::MAX);
        Ok(match found < self.size_bytes {
            true => found / BLOCK_BYTES * BLOCK_BYTES,
            false => self.size_bytes,
        })
    }

    fn next_hole(&mut self, offset: u64) -> io::Result<u64> {
        if !self.tells_holes {
            return Ok(u64::MAX);
        }
        let found = self.seek(offset, Whence::SeekHole)?.unwrap_or(u64::MAX);
        Ok(found.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(found))
    }
}
