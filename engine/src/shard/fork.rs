//! Saving what only this node has in a file of its own, before it is dropped.
//!
//! A fork file is the frames as they lie in the log, one after the other; each names its volume,
//! term, epoch and place. Where a full copy is to be written over the backing, frames with what
//! lies there now come first (docs/LOG_FORMAT.md). The file is whole or not there: written beside,
//! flushed, renamed. The shard waits for it: a node that returns serves nobody.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use hn4::log::frame::{FrameParams, encode_head};
use hn4::log::{FrameHead, FrameHeader, LaneEntry, LogIdentity, RING_START, Record, RecordKind};
use hn4::types::{
    BLOCK_BYTES, BlockIndex, Epoch, Incarnation, LaneId, LogOffset, SECTORS_PER_BLOCK,
};
use zerocopy::IntoBytes;

use super::medium::DeviceMedium;
use crate::core::event::Fork;
use crate::core::recovery::{AlignedBlock, Medium};
use crate::device::{Extent, Extents};

/// Blocks read at a time.
const CHUNK_BLOCKS: usize = 256;
/// Blocks whose contents go into one frame.
const FRAME_BLOCKS: usize = 64;
const ZEROES: AlignedBlock = AlignedBlock([0; 4096]);

/// Where fork files go, and what they are made from.
pub(super) struct ForkPlace {
    /// A folder; `None` if there is no place for them.
    pub(super) folder: Option<PathBuf>,
    /// Bytes that one may have.
    pub(super) space_bytes: u64,
    /// The volume.
    pub(super) name: String,
    pub(super) identity: LogIdentity,
    pub(super) log: DeviceMedium,
    pub(super) ring_bytes: u64,
    pub(super) backing: DeviceMedium,
    pub(super) holes: Extents,
    pub(super) shadow: Option<DeviceMedium>,
}

impl ForkPlace {
    /// Saves what a copy alone may have.
    ///
    /// # Errors
    /// The text says what is wrong, where, and what to do.
    pub(super) fn save(&mut self, fork: &Fork) -> Result<PathBuf, String> {
        let Some(folder) = self.folder.clone() else {
            return Err("no folder for fork files is configured".to_owned());
        };
        let (after, offset) = (fork.after.epoch, fork.offset.0);
        // Another history may part at the same place: its file is not to be replaced (P7).
        let (volume, term) = (&self.name, fork.term.counter);
        let name = format!("{volume}-after-epoch-{after}-at-{offset}-in-term-{term}.fork");
        let path = folder.join(&name);
        let part = folder.join(format!("{name}.part"));
        let saved = self.write(&part, fork).and_then(|()| {
            std::fs::rename(&part, &path)?;
            File::open(&folder)?.sync_all()
        });
        saved.map_err(|error| {
            // What is left of it is of no use, and takes the room that the next attempt needs.
            let _ = std::fs::remove_file(&part);
            match error.kind() {
                io::ErrorKind::QuotaExceeded => format!(
                    "what this copy alone may have is more than the {} bytes that fork_space_mib \
                     allows for {}; raise it and restart hn4-replicad",
                    self.space_bytes,
                    path.display()
                ),
                _ => format!(
                    "saving {}: {error}; make room there, it is tried again",
                    path.display()
                ),
            }
        })?;
        Ok(path)
    }

    fn write(&mut self, part: &Path, fork: &Fork) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).open(part)?;
        let mut out = Output {
            file,
            written: 0,
            most: self.space_bytes,
        };
        out.room_for(fork.bytes)?;
        if let Some(bytes) = fork.shadow_bytes {
            self.save_replaced(fork, bytes, &mut out)?;
        }
        self.save_frames(fork.offset, fork.bytes, &mut out)?;
        out.file.sync_all()
    }

    /// Copies so many bytes of the log.
    fn save_frames(&mut self, from: LogOffset, bytes: u64, out: &mut Output) -> io::Result<()> {
        let mut blocks = vec![ZEROES; CHUNK_BLOCKS];
        let (mut at, end) = (from.0, from.0 + bytes);
        while at < end {
            let in_ring = at % self.ring_bytes;
            let chunk = (end - at).min(self.ring_bytes - in_ring) / BLOCK_BYTES;
            let count = blocks_in(chunk).min(CHUNK_BLOCKS);
            let chunk = &mut blocks[..count];
            self.log.read(RING_START + in_ring, chunk)?;
            out.put(chunk.as_bytes())?;
            at += count as u64 * BLOCK_BYTES;
        }
        Ok(())
    }

    /// Saves what lies in the backing where the shadow is to be written over it.
    fn save_replaced(&mut self, fork: &Fork, end: u64, out: &mut Output) -> io::Result<()> {
        let mut replaced = Replaced {
            fork,
            identity: self.identity,
            seen: HashSet::new(),
            blocks: Vec::new(),
        };
        let mut at = 0;
        while at < end {
            let head = self.entry(at)?;
            at += head.header.frame_bytes;
            for record in &head.records {
                let blocks = record.lba.block().0..record.end().0.div_ceil(SECTORS_PER_BLOCK);
                let data = record.kind == RecordKind::Data;
                self.save_blocks(blocks, data, &mut replaced, out)?;
            }
        }
        replaced.put(out)
    }

    /// Checks the entry of the shadow at this place.
    fn entry(&mut self, at: u64) -> io::Result<FrameHead> {
        let shadow = self.shadow.as_mut();
        let shadow = shadow.ok_or_else(|| io::Error::other("there is no shadow file"))?;
        let damaged = |error| {
            let text = format!("the entry at byte {at} of the shadow file: {error}");
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let mut first = [ZEROES];
        shadow.read(at, &mut first)?;
        let header = FrameHeader::decode(&self.identity, &first[0].0).map_err(damaged)?;
        let mut frame = vec![ZEROES; blocks_in(header.frame_bytes / BLOCK_BYTES)];
        shadow.read(at, &mut frame)?;
        FrameHead::decode_frame(&self.identity, frame.as_bytes()).map_err(damaged)
    }

    /// Saves these blocks. If they are to become zeroes, those that are already are left out.
    fn save_blocks(
        &mut self,
        blocks: Range<u64>,
        data: bool,
        replaced: &mut Replaced<'_>,
        out: &mut Output,
    ) -> io::Result<()> {
        let mut buffer = vec![ZEROES; CHUNK_BLOCKS];
        let (mut at, end) = (blocks.start * BLOCK_BYTES, blocks.end * BLOCK_BYTES);
        while at < end {
            let length = match self.holes.at(at, end) {
                Extent::Hole(bytes) if !data => {
                    at += bytes;
                    continue;
                }
                Extent::Hole(_) => end - at,
                Extent::Data(bytes) => bytes,
            };
            let count = blocks_in(length / BLOCK_BYTES).min(CHUNK_BLOCKS);
            let chunk = &mut buffer[..count];
            self.backing.read(at, chunk)?;
            for (index, block) in (at / BLOCK_BYTES..).zip(chunk.iter()) {
                if data || block.0 != ZEROES.0 {
                    replaced.add(index, block, out)?;
                }
            }
            at += count as u64 * BLOCK_BYTES;
        }
        Ok(())
    }
}

fn blocks_in(blocks: u64) -> usize {
    usize::try_from(blocks).unwrap_or(usize::MAX)
}

/// The file, and how large it may become.
struct Output {
    file: File,
    written: u64,
    most: u64,
}

impl Output {
    /// Whether so many bytes more may be written.
    fn room_for(&self, bytes: u64) -> io::Result<()> {
        if self.most - self.written < bytes {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.room_for(bytes.len() as u64)?;
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// Blocks of the backing on their way into frames of a fork file.
struct Replaced<'a> {
    fork: &'a Fork,
    identity: LogIdentity,
    /// Several entries of a shadow may name a block.
    seen: HashSet<u64>,
    blocks: Vec<(u64, AlignedBlock)>,
}

impl Replaced<'_> {
    fn add(&mut self, index: u64, block: &AlignedBlock, out: &mut Output) -> io::Result<()> {
        if !self.seen.insert(index) {
            return Ok(());
        }
        self.blocks.push((index, *block));
        if self.blocks.len() == FRAME_BLOCKS {
            self.put(out)?;
        }
        Ok(())
    }

    /// Writes what has gathered as one frame.
    fn put(&mut self, out: &mut Output) -> io::Result<()> {
        if self.blocks.is_empty() {
            return Ok(());
        }
        self.blocks.sort_unstable_by_key(|(index, _)| *index);
        let (mut records, mut payload) = (Vec::new(), Vec::new());
        for (index, block) in self.blocks.drain(..) {
            let sectors = u32::try_from(SECTORS_PER_BLOCK).expect("eight");
            let zero = block.0 == ZEROES.0;
            let blocks_before = u32::try_from(payload.len() / block.0.len()).expect("few");
            records.push(Record {
                lba: BlockIndex(index).lba(),
                sectors,
                kind: if zero {
                    RecordKind::Zeroes
                } else {
                    RecordKind::Data
                },
                payload_sector: if zero { 0 } else { blocks_before * sectors },
                crc32c: if zero { 0 } else { crc32c::crc32c(&block.0) },
            });
            if !zero {
                payload.extend_from_slice(&block.0);
            }
        }
        let count = u32::try_from(records.len()).expect("few");
        let lanes = [LaneEntry {
            lane: LaneId(0),
            records: count,
        }];
        let mut frame = Vec::new();
        encode_head(
            &FrameParams {
                identity: &self.identity,
                epoch: self.fork.after.epoch.next(),
                offset: LogOffset(out.written),
                term: self.fork.term,
                // No primary seals an epoch before its first opening.
                incarnation: Incarnation(0),
                durable_through: Epoch(0),
                previous: self.fork.after.chain,
                sealed_ms: 0,
                checkpoint_mark: false,
                lanes: &lanes,
                records: &records,
                payload_bytes: payload.len() as u64,
            },
            &mut frame,
        );
        out.put(&frame)?;
        out.put(&payload)
    }
}
