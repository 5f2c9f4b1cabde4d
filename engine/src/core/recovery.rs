//! Inspecting and opening a log.
//!
//! Opening scans the ring forward from the oldest kept frame, refills the overlay with every epoch
//! after the checkpoint, and stops at the first frame that is not valid. What lies there is a torn
//! tail, unless something proves that the frame had been durable: then it is corruption, and the
//! volume does not open (P4). Proofs are the superblock's `durable`, and the local stamp of any
//! later valid frame that was written in the same session of this log.
//!
//! **Invariant:** before a volume is used, everything it was recovered from is durable, and the
//! superblock says so under a new session; so a later recovery never finds less.

use std::io;

use hn4::log::{
    FrameError, HEADER_A, HEADER_B, HeaderError, LogHeader, RING_START, Role, SUPERBLOCK_0,
    SUPERBLOCK_1, Superblock, SuperblockError,
};
use hn4::types::{BLOCK_BYTES, Epoch, Incarnation, VolumeId};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::config::VolumeConfig;
pub use super::create::{NewLog, create};
use super::event::Tip;
use super::journal::Journal;
use super::merge::{self, Merge};
use super::scan::{Scan, scan};
use super::superblock::SuperblockWriter;
use super::volume::Volume;
use crate::arena::SlotMemory;

/// A block of memory that devices opened with O_DIRECT accept.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct AlignedBlock(pub [u8; 4096]);

/// A device, read and written synchronously while nothing else uses it.
pub trait Medium {
    /// Fills the blocks from a byte offset, which is a multiple of 4096.
    ///
    /// # Errors
    /// Whatever the device says.
    fn read(&mut self, offset: u64, blocks: &mut [AlignedBlock]) -> io::Result<()>;
    /// Writes the blocks.
    ///
    /// # Errors
    /// Whatever the device says.
    fn write(&mut self, offset: u64, blocks: &[AlignedBlock]) -> io::Result<()>;
    /// Makes all writes durable.
    ///
    /// # Errors
    /// Whatever the device says.
    fn flush(&mut self) -> io::Result<()>;
    /// Size in bytes.
    fn size_bytes(&self) -> u64;
}

/// Why a log could not be created or opened.
#[derive(Debug, Error)]
pub enum RecoveryError {
    /// The device did not deliver.
    #[error("{doing} the log at byte {offset}: {source}")]
    Io {
        /// Reading, writing or flushing.
        doing: &'static str,
        /// Where.
        offset: u64,
        /// The device's error.
        source: io::Error,
    },
    /// The backing did not take what the merge area holds of it.
    #[error(
        "the last run was cut off while it wrote parts of blocks, and writing them back whole at \
         byte {offset} of the backing failed: {source}"
    )]
    Backing {
        /// Where.
        offset: u64,
        /// The device's error.
        source: io::Error,
    },
    /// Neither copy of the header can be used.
    #[error("{0}")]
    Header(HeaderError),
    /// Neither superblock can be used.
    #[error("no usable superblock: {0}. The log is damaged; re-create this copy from a peer")]
    Superblock(SuperblockError),
    /// The log is of another volume than asked for.
    #[error(
        "this log belongs to volume {found} of {found_bytes} bytes, not to {expected} of \
         {expected_bytes} bytes; a log can never be attached to another backing"
    )]
    OtherVolume {
        /// Volume in the log.
        found: VolumeId,
        /// Its size.
        found_bytes: u64,
        /// Volume asked for.
        expected: VolumeId,
        /// Its size.
        expected_bytes: u64,
    },
    /// The device is smaller than the header says.
    #[error("the log device has {found} bytes but its header speaks of {expected}")]
    TooSmall {
        /// Size of the device.
        found: u64,
        /// Size needed.
        expected: u64,
    },
    /// Something is there already.
    #[error("refused: {0}. To use the device anyway, wipe its first 128 KiB yourself")]
    InUse(String),
    /// A frame that was durable is damaged.
    #[error(
        "epoch {epoch} at log offset {offset} is damaged although {proof} proves that it was \
         durable: {source}. Nothing was changed. Fetch this copy from a peer"
    )]
    Corrupt {
        /// The damaged epoch.
        epoch: Epoch,
        /// Where its frame should be.
        offset: u64,
        /// What proves it.
        proof: String,
        /// What is wrong with the frame.
        source: FrameError,
    },
    /// The overlay was made smaller than what is to be recovered.
    #[error(
        "the overlay has no room for what is in the log and not yet in the backing; start with a \
         larger overlay ({needed} bytes or more), let it drain, then make it smaller"
    )]
    OverlayTooSmall {
        /// Bytes needed.
        needed: u64,
    },
}

/// What recovery found, for status and logs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecoveryReport {
    /// The backing is the state at this epoch.
    pub checkpoint: Epoch,
    /// The log reaches to this one.
    pub tip: Epoch,
    /// Epochs that were read back into the overlay.
    pub replayed: u64,
    /// Bytes of those frames.
    pub replayed_bytes: u64,
    /// A frame after the tip was incomplete and was dropped: it had not been acknowledged as
    /// durable.
    pub torn_tail: bool,
    /// Blocks that were being written in part, and were written back whole.
    pub restored_blocks: u64,
}

pub(super) fn read_blocks(
    medium: &mut dyn Medium,
    offset: u64,
    blocks: &mut [AlignedBlock],
) -> Result<(), RecoveryError> {
    let result = medium.read(offset, blocks);
    result.map_err(|source| RecoveryError::Io {
        doing: "reading",
        offset,
        source,
    })
}

pub(super) fn write_blocks(
    medium: &mut dyn Medium,
    offset: u64,
    blocks: &[AlignedBlock],
) -> Result<(), RecoveryError> {
    let result = medium.write(offset, blocks);
    result.map_err(|source| RecoveryError::Io {
        doing: "writing",
        offset,
        source,
    })
}

pub(super) fn flush(medium: &mut dyn Medium) -> Result<(), RecoveryError> {
    let result = medium.flush();
    result.map_err(|source| RecoveryError::Io {
        doing: "flushing",
        offset: 0,
        source,
    })
}

pub(super) fn block_at(
    medium: &mut dyn Medium,
    offset: u64,
) -> Result<AlignedBlock, RecoveryError> {
    let mut block = [AlignedBlock([0; 4096])];
    read_blocks(medium, offset, &mut block)?;
    Ok(block[0])
}

/// Reads header and superblock without changing anything. The index is the slot that the superblock
/// was found in.
///
/// # Errors
/// If there is no log, or it is damaged.
pub fn inspect(medium: &mut dyn Medium) -> Result<(LogHeader, Superblock, usize), RecoveryError> {
    let first = block_at(medium, HEADER_A)?;
    let header = match LogHeader::decode(&first.0) {
        Ok(header) => header,
        Err(error) => {
            let second = block_at(medium, HEADER_B)?;
            LogHeader::decode(&second.0).map_err(|_| RecoveryError::Header(error))?
        }
    };
    let needed = RING_START + header.ring_bytes;
    if medium.size_bytes() < needed {
        return Err(RecoveryError::TooSmall {
            found: medium.size_bytes(),
            expected: needed,
        });
    }
    let slots = [
        block_at(medium, SUPERBLOCK_0)?,
        block_at(medium, SUPERBLOCK_1)?,
    ];
    let newest = Superblock::newest(&header.identity, [&slots[0].0, &slots[1].0]);
    let (superblock, slot) = newest.map_err(RecoveryError::Superblock)?;
    Ok((header, superblock, slot))
}

/// Opens a log and brings the volume back to where it was.
///
/// `backing` is written only where the last run was cut off while it wrote parts of blocks.
/// `configure` gets the header and decides limits and policies.
///
/// # Errors
/// If the log is damaged in a way that could hide lost data, or the device fails.
pub fn open(
    medium: &mut dyn Medium,
    backing: &mut dyn Medium,
    mem: &mut dyn SlotMemory,
    configure: impl FnOnce(&LogHeader) -> VolumeConfig,
) -> Result<(Volume, RecoveryReport), RecoveryError> {
    let (header, superblock, slot) = inspect(medium)?;
    let config = configure(&header);
    let restored_blocks = merge::restore(medium, backing, &header.identity, &superblock)?;
    // Before frames are read: they may take all that is left.
    let mut buffers = || {
        let buffer = mem.alloc()?;
        let merge = match config.merge {
            true => Some(Merge::new(header.identity, mem)?),
            false => None,
        };
        Some((buffer, merge))
    };
    let (buffer, merge) = buffers().ok_or(RecoveryError::OverlayTooSmall {
        needed: 2 * config.reserve_slots as u64 * BLOCK_BYTES,
    })?;
    let (scanned, torn_tail) = scan(medium, mem, &config, &header, &superblock)?;
    let Scan {
        journal,
        overlay,
        anchored,
        replayed,
        replayed_bytes,
        ..
    } = scanned;
    let tip = journal.tip();
    // What survived a crash of the process may still be in the device's cache only.
    flush(medium)?;
    let mut next = superblock;
    next.generation += 1;
    next.session += 1;
    next.durable = tip.epoch;
    if next.role == Role::Primary {
        // Where the newest superblock was lost, frames may be of a later start than what is left.
        let last = journal.tip_rank();
        let used = match last.term == next.term.counter {
            true => last.incarnation.max(next.incarnation),
            false => next.incarnation,
        };
        next.incarnation = Incarnation(used.0.saturating_add(1));
    }
    if config.merge && superblock.merge_era.is_none() {
        merge::clear(medium)?;
        flush(medium)?;
    }
    next.merge_era = config.merge.then_some(next.session);
    let mut block = AlignedBlock([0; 4096]);
    next.encode(&header.identity, &mut block.0);
    write_blocks(medium, [SUPERBLOCK_0, SUPERBLOCK_1][1 - slot], &[block])?;
    flush(medium)?;
    let writer = SuperblockWriter::new(header.identity, next, 1 - slot, buffer);
    // A primary, also one that was fenced, may have acknowledged all of it. What a sweep may have
    // begun to write cannot be dropped, whoever knows of it.
    let swept = swept_tip(&next, &journal);
    let anchored = match next.role {
        Role::Primary | Role::Fenced => tip,
        Role::Replica if next.own_tail || swept.epoch > anchored.epoch => swept,
        Role::Replica => anchored,
    };
    let mut journal = journal;
    journal.session = next.session;
    let checkpoint = next.checkpoint;
    let mut volume = Volume::new(config, journal, overlay, writer, anchored);
    volume.merge = merge;
    let report = RecoveryReport {
        checkpoint,
        tip: tip.epoch,
        replayed,
        replayed_bytes,
        torn_tail,
        restored_blocks,
    };
    Ok((volume, report))
}

/// The end of what the backing may hold a part of.
pub(super) fn swept_tip(superblock: &Superblock, journal: &Journal) -> Tip {
    let chain = journal.chain(superblock.swept);
    let begun = chain.filter(|_| superblock.swept > superblock.checkpoint);
    Tip {
        epoch: begun.map_or(superblock.checkpoint, |_| superblock.swept),
        chain: begun.unwrap_or(superblock.checkpoint_chain),
    }
}
