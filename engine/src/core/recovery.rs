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

use hn4::log::frame::MAX_HEAD_BYTES;
use hn4::log::{
    FrameError, FrameHead, FrameHeader, HEADER_A, HEADER_B, HeaderError, LogHeader, LogIdentity,
    RING_START, Role, SUPERBLOCK_0, SUPERBLOCK_1, Stamp, Superblock, SuperblockError,
};
use hn4::types::{BLOCK_BYTES, Epoch, Incarnation, LogOffset, VolumeId};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::config::VolumeConfig;
pub use super::create::{NewLog, create};
use super::event::Tip;
use super::journal::{FrameInfo, Journal, Sealed};
use super::merge::{self, Merge};
use super::mutants::{Mutant, planted};
use super::overlay::Overlay;
use super::seal::{bytes_to_slots, frame_changes};
use super::superblock::SuperblockWriter;
use super::volume::Volume;
use crate::arena::SlotMemory;

/// How far behind an invalid frame later frames are looked for: four times the largest epoch that
/// [`VolumeConfig`] allows, so that the successor of a damaged frame is found.
const LOOK_AHEAD_BYTES: u64 = 64 << 20;
/// So much is read at once where what lies ahead is wanted anyway: one disk operation for many
/// small frames. As the log may be short, the first read is of a block, and each is twice as long.
const AHEAD_BLOCKS: usize = 256;
/// Payload of a frame that is not replayed is read past, rather than skipped, up to this size:
/// about what a solid-state disk delivers while it finds another place.
const READ_PAST_BYTES: u64 = 256 << 10;

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

fn read_blocks(
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
    let mut scan = Scan::new(medium, mem, &header, &superblock);
    let torn_tail = scan.run()?;
    let Scan {
        journal,
        overlay,
        anchored,
        replayed,
        replayed_bytes,
        ..
    } = scan;
    let tip = journal.tip();
    // What survived a crash of the process may still be in the device's cache only.
    flush(medium)?;
    let mut next = superblock;
    next.generation += 1;
    next.session += 1;
    next.durable = tip.epoch;
    if next.role == Role::Primary {
        next.incarnation = Incarnation(next.incarnation.0.saturating_add(1));
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
    let too_small = RecoveryError::OverlayTooSmall {
        needed: replayed_bytes * 2,
    };
    let mut buffers = || {
        let buffer = mem.alloc()?;
        let merge = match config.merge {
            true => Some(Merge::new(header.identity, mem)?),
            false => None,
        };
        Some((buffer, merge))
    };
    let (buffer, merge) = buffers().ok_or(too_small)?;
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

/// Blocks of the ring that were read last.
#[derive(Default)]
struct Window {
    blocks: Vec<AlignedBlock>,
    /// Log offset of the first one.
    at: u64,
    /// How many there are.
    count: usize,
}

impl Window {
    /// Those from a log offset on, at most so many; empty if that offset was not read.
    fn find(&self, from: LogOffset, most: usize) -> &[AlignedBlock] {
        let skipped = from.0.checked_sub(self.at).map(|bytes| bytes / BLOCK_BYTES);
        let skipped = skipped.and_then(|blocks| usize::try_from(blocks).ok());
        let rest = skipped.and_then(|blocks| self.blocks[..self.count].get(blocks..));
        let rest = rest.unwrap_or_default();
        &rest[..most.min(rest.len())]
    }
}

struct Scan<'a> {
    medium: &'a mut dyn Medium,
    window: Window,
    /// How much is to be read at once, at least.
    ahead: usize,
    mem: &'a mut dyn SlotMemory,
    identity: LogIdentity,
    superblock: Superblock,
    ring_bytes: u64,
    journal: Journal,
    overlay: Overlay,
    anchored: Tip,
    replayed: u64,
    replayed_bytes: u64,
}

impl<'a> Scan<'a> {
    fn new(
        medium: &'a mut dyn Medium,
        mem: &'a mut dyn SlotMemory,
        header: &LogHeader,
        superblock: &Superblock,
    ) -> Self {
        let base = Tip {
            epoch: superblock.retained,
            chain: superblock.retained_chain,
        };
        let base = (base, superblock.retained_offset, superblock.retained_rank);
        Self {
            overlay: Overlay::new(mem.capacity()),
            medium,
            window: Window::default(),
            ahead: 1,
            mem,
            identity: header.identity,
            superblock: *superblock,
            ring_bytes: header.ring_bytes,
            journal: Journal::new(header.ring_bytes, superblock.session, base),
            anchored: Tip {
                epoch: superblock.checkpoint,
                chain: superblock.checkpoint_chain,
            },
            replayed: 0,
            replayed_bytes: 0,
        }
    }

    /// Returns whether a torn frame was dropped at the end.
    fn run(&mut self) -> Result<bool, RecoveryError> {
        let mut buffer = Vec::new();
        loop {
            let used = self.journal.tail().0 - self.superblock.retained_offset.0;
            if self.ring_bytes - used < BLOCK_BYTES {
                return Ok(false);
            }
            match self.frame(&mut buffer)? {
                Ok(()) => {}
                Err(error) => return self.end(error),
            }
        }
    }

    /// Takes the next frame; the inner error says why it is none.
    fn frame(&mut self, buffer: &mut Vec<u8>) -> Result<Result<(), FrameError>, RecoveryError> {
        let at = self.journal.tail();
        buffer.clear();
        self.read_ring(at, BLOCK_BYTES, buffer)?;
        let header = match FrameHeader::decode(&self.identity, buffer) {
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        let tip = self.journal.tip();
        if header.offset != at || header.epoch != tip.epoch.next() || header.previous != tip.chain {
            // A frame of an earlier lap, or of a tail that was replaced.
            return Ok(Err(FrameError::NoMagic));
        }
        let used = at.0 - self.superblock.retained_offset.0;
        if header.frame_bytes > self.ring_bytes - used {
            let value = header.frame_bytes;
            return Ok(Err(FrameError::Field {
                field: "frame_bytes",
                value,
            }));
        }
        let replay = header.epoch > self.superblock.checkpoint;
        if !replay && header.frame_bytes > READ_PAST_BYTES {
            self.ahead = 1;
        }
        let wanted = if replay {
            header.frame_bytes
        } else {
            header.head_bytes
        };
        let rest = LogOffset(at.0 + BLOCK_BYTES);
        self.read_ring(rest, wanted - BLOCK_BYTES, buffer)?;
        let decode = if replay && !planted(Mutant::IgnorePayloadCrc) {
            FrameHead::decode_frame
        } else {
            FrameHead::decode
        };
        let head = match decode(&self.identity, buffer) {
            Ok(head) => head,
            Err(error) => return Ok(Err(error)),
        };
        if replay {
            self.replay(&head, buffer)?;
        } else {
            self.journal.recovered(info(&head));
        }
        if let Some(chain) = self.journal.chain(head.header.durable_through)
            && head.header.durable_through > self.anchored.epoch
        {
            self.anchored = Tip {
                epoch: head.header.durable_through,
                chain,
            };
        }
        Ok(Ok(()))
    }

    fn replay(&mut self, head: &FrameHead, frame: &[u8]) -> Result<(), RecoveryError> {
        let header = head.header;
        self.replayed += 1;
        self.replayed_bytes += header.frame_bytes;
        let payload_at = usize::try_from(header.head_bytes).unwrap_or(usize::MAX);
        let payload = frame.get(payload_at..).unwrap_or_default();
        let needed = self.replayed_bytes * 2;
        let slots = bytes_to_slots(self.mem, payload);
        let slots = slots.ok_or(RecoveryError::OverlayTooSmall { needed })?;
        let (blocks, mut zeros) = frame_changes(head, &slots);
        if planted(Mutant::ForgetTrimInRecovery) {
            zeros.clear();
        }
        self.overlay.adopt(header.epoch, &blocks, &zeros);
        self.journal.recovered(info(head));
        let sealed = Sealed {
            header,
            chain: head.chain,
            blocks,
            zeros,
            head: Vec::new(),
        };
        self.journal.sealed.push_back(sealed);
        Ok(())
    }

    /// The frame after the tip is not valid: torn tail or corruption?
    fn end(&mut self, source: FrameError) -> Result<bool, RecoveryError> {
        let epoch = self.journal.tip().epoch.next();
        let offset = self.journal.tail();
        let durable = self.superblock.durable;
        let mut proof = None;
        if epoch <= durable {
            proof = Some(format!("the superblock (durable through epoch {durable})"));
        }
        let mut found_later = false;
        let used = offset.0 - self.superblock.retained_offset.0;
        let end = offset.0 + (self.ring_bytes - used).min(LOOK_AHEAD_BYTES);
        let mut at = offset.0;
        while at < end && proof.is_none() {
            let count = self.read_chunk(LogOffset(at), end - at)?.len();
            let blocks = self.window.find(LogOffset(at), count);
            for (index, block) in blocks.iter().enumerate() {
                let here = LogOffset(at + index as u64 * BLOCK_BYTES);
                let Ok(header) = FrameHeader::decode(&self.identity, &block.0) else {
                    continue;
                };
                if header.offset != here || header.epoch < epoch {
                    continue;
                }
                found_later = true;
                let stamp = Stamp::decode(&block.0);
                let stamp = stamp.filter(|stamp| stamp.session == self.superblock.session);
                if stamp.is_some_and(|stamp| stamp.durable_through >= epoch) {
                    proof = Some(format!("the frame of epoch {}", header.epoch));
                    break;
                }
            }
            at += count as u64 * BLOCK_BYTES;
        }
        match proof {
            Some(proof) => Err(RecoveryError::Corrupt {
                epoch,
                offset: offset.0,
                proof,
                source,
            }),
            None => Ok(found_later),
        }
    }

    fn read_ring(
        &mut self,
        from: LogOffset,
        bytes: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<(), RecoveryError> {
        debug_assert!(bytes <= MAX_HEAD_BYTES + hn4::log::MAX_EPOCH_BYTES);
        let mut at = from.0;
        let end = from.0 + bytes;
        while at < end {
            let bytes = self.read_chunk(LogOffset(at), end - at)?.as_bytes();
            buffer.extend_from_slice(bytes);
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// The next blocks: at least one, and as many as are wanted, as lie before the end of the ring,
    /// and as one read takes.
    fn read_chunk(
        &mut self,
        from: LogOffset,
        wanted_bytes: u64,
    ) -> Result<&[AlignedBlock], RecoveryError> {
        let in_ring = from.0 % self.ring_bytes;
        let blocks = |bytes: u64| usize::try_from(bytes / BLOCK_BYTES).unwrap_or(usize::MAX);
        let to_end = blocks(self.ring_bytes - in_ring);
        let wanted = blocks(wanted_bytes).min(to_end).clamp(1, AHEAD_BLOCKS);
        if self.window.find(from, wanted).is_empty() {
            let ahead = self.ahead.clamp(wanted, to_end.max(wanted));
            if self.window.blocks.len() < ahead {
                self.window.blocks = vec![AlignedBlock([0; 4096]); ahead];
            }
            self.window.count = 0;
            let place = RING_START + in_ring;
            let read = read_blocks(self.medium, place, &mut self.window.blocks[..ahead]);
            // What is not wanted yet may be unreadable.
            self.window.count = match read {
                Ok(()) => ahead,
                Err(error) if ahead == wanted => return Err(error),
                Err(_) => {
                    read_blocks(self.medium, place, &mut self.window.blocks[..wanted])?;
                    wanted
                }
            };
            self.window.at = from.0;
            self.ahead = (self.ahead * 2).min(AHEAD_BLOCKS);
        }
        Ok(self.window.find(from, wanted))
    }
}

fn info(head: &FrameHead) -> FrameInfo {
    let header = head.header;
    FrameInfo {
        epoch: header.epoch,
        chain: head.chain,
        offset: header.offset,
        bytes: header.frame_bytes,
        sealed_ms: header.sealed_ms,
        rank: header.rank(),
    }
}
