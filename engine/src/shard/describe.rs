//! What a part of a volume holds, in NBD's words: for clients that copy it, which need not read
//! what is zero.

use std::ops::Range;

use hn4::types::BLOCK_BYTES;

use super::engine::Engine;
use crate::core::Source;
use crate::device;
use crate::nbd::proto::state_flag;
use crate::nbd::reply::Extent;
use crate::nbd::request::ByteRange;

/// Extents in an answer, at most, each of which may cost two system calls.
const EXTENTS: usize = 256;

impl Engine {
    /// What a range holds, from its start on; the answer may end before the range does.
    pub(super) fn describe(&self, range: ByteRange) -> Vec<Extent> {
        let first = range.offset / BLOCK_BYTES;
        let end = range.end().div_ceil(BLOCK_BYTES);
        let mut extents = Vec::new();
        for (blocks, source) in self.volume.sources(first..end) {
            if extents.len() >= EXTENTS {
                break;
            }
            let length = (blocks.end - blocks.start) * BLOCK_BYTES;
            let flags = match source {
                Source::Backing => {
                    self.describe_backing(&blocks, &mut extents);
                    continue;
                }
                Source::Data => 0,
                Source::Zero { trim: true } => state_flag::HOLE | state_flag::ZERO,
                Source::Zero { trim: false } => state_flag::ZERO,
            };
            extents.push(Extent { length, flags });
        }
        if let Some(first) = extents.first_mut() {
            first.length -= range.offset % BLOCK_BYTES;
        }
        extents
    }

    fn describe_backing(&self, blocks: &Range<u64>, extents: &mut Vec<Extent>) {
        let (mut from, end) = (blocks.start * BLOCK_BYTES, blocks.end * BLOCK_BYTES);
        while from < end && extents.len() < EXTENTS {
            let (length, flags) = match self.disks.extent(from, end) {
                device::Extent::Data(bytes) => (bytes, 0),
                device::Extent::Hole(bytes) => (bytes, state_flag::HOLE | state_flag::ZERO),
            };
            extents.push(Extent { length, flags });
            from += length;
        }
    }
}
