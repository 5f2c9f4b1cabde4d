//! Where the contents of a volume come from, for clients that ask what they need not read.
//!
//! **Invariant:** what is said to be zero reads as zeroes until a client changes it. What the
//! overlay has none of lies on the backing, and nothing but a sweep of the overlay's contents, or a
//! repair to the same contents, writes there.

use std::ops::Range;

use super::checks::VerifyReads;
use super::extents::ExtentMap;
use super::volume::Volume;

/// Blocks that are looked at one by one for an answer, at most.
const LOOKS: u64 = 4096;

/// Where some blocks come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// They are what the backing holds there.
    Backing,
    /// They may be anything.
    Data,
    /// They are zero. `trim`: nobody wants space for them.
    Zero {
        /// See there.
        trim: bool,
    },
}

impl Volume {
    /// Where these blocks come from, in parts that follow one another from the first one on. They
    /// may end before the range does, and cover at least a block of it.
    #[must_use]
    pub fn sources(&self, mut blocks: Range<u64>) -> Vec<(Range<u64>, Source)> {
        let mut known: ExtentMap<Source> = ExtentMap::new();
        // Readers of a replica pass by the overlay.
        if self.pinned_epoch().is_none() {
            if self.overlay.held() as u64 > LOOKS {
                blocks.end = blocks.end.min(blocks.start + LOOKS);
            }
            for (part, zeroed) in self.overlay.zeros_in(blocks.clone()) {
                known.insert(part, Source::Zero { trim: zeroed.trim });
            }
            for block in self.overlay.versions_in(blocks.clone()) {
                known.insert(block..block + 1, Source::Data);
            }
        }
        for block in self.damage.within(blocks.clone()) {
            known.insert(block..block + 1, Source::Data);
        }
        // A block that has to be read and compared first is not what the file system says of it.
        let compared = self.config.verify_reads == VerifyReads::All || self.reads.all_are_checked;
        let below = if compared {
            Source::Data
        } else {
            Source::Backing
        };
        let mut parts = Vec::new();
        let mut next = blocks.start;
        for (part, source) in known.iter() {
            if part.start > next {
                parts.push((next..part.start, below));
            }
            next = part.end;
            parts.push((part, source));
        }
        if next < blocks.end {
            parts.push((next..blocks.end, below));
        }
        parts
    }
}
