//! Saving what only this node has in a file of its own, before it is dropped from the log.
//!
//! A fork file is the frames as they lie in the log, one after the other; each names its volume,
//! term, epoch and place (docs/LOG_FORMAT.md). It is whole or not there: written beside, flushed,
//! renamed. The shard waits for it: a node that returns serves nobody.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;

use hn4::log::RING_START;
use hn4::types::{Epoch, LogOffset};
use zerocopy::IntoBytes;

use super::medium::DeviceMedium;
use crate::core::recovery::{AlignedBlock, Medium};

/// Blocks read at a time.
const CHUNK_BLOCKS: usize = 256;

/// Where fork files go.
pub(super) struct ForkPlace {
    /// A folder; `None` if there is no place for them.
    pub(super) folder: Option<PathBuf>,
    /// Bytes that one may have.
    pub(super) space_bytes: u64,
    /// The volume.
    pub(super) name: String,
    pub(super) log: DeviceMedium,
    pub(super) ring_bytes: u64,
}

impl ForkPlace {
    /// Saves so many bytes of the log.
    ///
    /// # Errors
    /// The text says what is wrong, where, and what to do.
    pub(super) fn save(
        &mut self,
        after: Epoch,
        offset: LogOffset,
        bytes: u64,
    ) -> Result<PathBuf, String> {
        let Some(folder) = self.folder.clone() else {
            return Err("no folder for fork files is configured".to_owned());
        };
        if bytes > self.space_bytes {
            return Err(format!(
                "the tail has {bytes} bytes, more than the {} that fork_space_mib allows; raise it \
                 and restart hn4-replicad",
                self.space_bytes
            ));
        }
        let name = format!("{}-after-epoch-{after}-at-{}.fork", self.name, offset.0);
        let path = folder.join(&name);
        let saved = self.write(&folder.join(format!("{name}.part")), offset, bytes);
        let renamed = saved.and_then(|part| {
            std::fs::rename(&part, &path)?;
            File::open(&folder)?.sync_all()
        });
        match renamed {
            Ok(()) => Ok(path),
            Err(error) => Err(format!(
                "saving {bytes} bytes in {}: {error}; make room there, it is tried again",
                path.display()
            )),
        }
    }

    fn write(
        &mut self,
        part: &std::path::Path,
        from: LogOffset,
        bytes: u64,
    ) -> io::Result<PathBuf> {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).open(part)?;
        let mut blocks = vec![AlignedBlock([0; 4096]); CHUNK_BLOCKS];
        let (mut at, end) = (from.0, from.0 + bytes);
        while at < end {
            let in_ring = at % self.ring_bytes;
            let chunk = (end - at).min(self.ring_bytes - in_ring) / 4096;
            let count =
                usize::try_from(chunk).map_or(CHUNK_BLOCKS, |count| count.min(CHUNK_BLOCKS));
            let chunk = &mut blocks[..count];
            self.log.read(RING_START + in_ring, chunk)?;
            file.write_all(chunk.as_bytes())?;
            at += count as u64 * 4096;
        }
        file.sync_all()?;
        Ok(part.to_owned())
    }
}
