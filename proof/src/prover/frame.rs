//! A frame as the prover sees it: its root, and the leaves of its records.

use hn4::log::{FrameError, FrameHead, LogIdentity, Record, RecordKind};
use hn4::types::{LaneId, LogOffset};

use crate::hash::Digest;
use crate::leaf::{Coordinates, EpochBuilder, EpochRoot, LeafKind, RecordLeaf, payload_hashes};

/// Of a frame's payloads in memory every so many-th one is compared with its checksum.
const MEMORY_SAMPLE: usize = 16;

/// Where a frame was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// In memory, where its checksums were computed or compared when it came. Were they compared
    /// again, that would take a third of what proving takes; a sample shows whether frames are
    /// handed over as they were sealed.
    Memory,
    /// On the medium, where anything can have happened to it.
    Log,
}

/// An epoch that is hashed and not yet anchored.
#[derive(Clone, Debug)]
pub(super) struct Hashed {
    pub(super) root: EpochRoot,
    pub(super) start: LogOffset,
    pub(super) end: LogOffset,
    pub(super) payload_bytes: u64,
}

pub(super) fn hash_frame(
    identity: &LogIdentity,
    (origin, bytes): (Origin, &[u8]),
) -> Result<Hashed, FrameError> {
    let (head, leaves) = frame_leaves(identity, (origin, bytes))?;
    let mut builder = EpochBuilder::new(head.header.epoch, head.chain);
    for leaf in &leaves {
        builder.record(leaf).expect("all records are of one epoch");
    }
    Ok(Hashed {
        root: builder.finish(),
        start: head.header.offset,
        end: head.header.end(),
        payload_bytes: head.header.payload_bytes(),
    })
}

/// A frame's head, and the leaves of its records in the order of its table.
///
/// # Errors
/// [`FrameError`] if anything in the frame is damaged.
pub fn frame_leaves(
    identity: &LogIdentity,
    (origin, bytes): (Origin, &[u8]),
) -> Result<(FrameHead, Vec<RecordLeaf>), FrameError> {
    let every = match origin {
        Origin::Memory => MEMORY_SAMPLE,
        Origin::Log => 1,
    };
    let head = FrameHead::decode_frame_sampling(identity, bytes, every)?;
    let epoch = head.header.epoch;
    let data = head.records.iter();
    let data = data.filter(|record| record.kind == RecordKind::Data);
    let payloads: Vec<_> = data
        .map(|record| {
            let payload = bytes.get(head.payload_range(record)).unwrap_or_default();
            (record.lba, payload)
        })
        .collect();
    let mut payloads = payload_hashes(&payloads).into_iter();
    let mut lanes = head.lanes.iter().flat_map(|entry| {
        std::iter::repeat_n(entry.lane, usize::try_from(entry.records).unwrap_or(0))
    });
    let mut leaf = |record: &Record| {
        let (kind, payload) = match record.kind {
            RecordKind::Data => (LeafKind::Data, payloads.next()),
            RecordKind::Zeroes => (LeafKind::Zeroes, None),
            RecordKind::Trim => (LeafKind::Trim, None),
        };
        let at = Coordinates {
            epoch,
            lane: lanes.next().unwrap_or(LaneId(0)),
            kind,
            lba: record.lba,
            sectors: u64::from(record.sectors),
        };
        let payload = payload.unwrap_or(Digest::ZERO);
        RecordLeaf { at, payload }
    };
    let leaves = head.records.iter().map(&mut leaf).collect();
    Ok((head, leaves))
}
