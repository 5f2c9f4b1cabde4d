//! The deep verify: every block of the backing is read again and compared with its leaf.
//!
//! What was found is kept in a file beside the tree, so that a restart forgets neither when the
//! medium was checked last nor which blocks are bad. A block stays bad until a later verify finds
//! it good, or a sweep has written all of it.

use std::collections::BTreeSet;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use hn4::types::Epoch;
use hn4_proof::hash::Digest;
use hn4_proof::tree::keeper::BadBlock;
use serde::{Deserialize, Serialize};

use super::sum::Sum;

/// Bad blocks whose places are remembered; of more only the number is told.
const PLACES: usize = 4096;
const FORMAT: u32 = 1;

/// What is known of the medium.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    format: u32,
    /// Milliseconds since 1970 when this was begun: nothing was checked before that.
    pub(super) since_ms: u64,
    /// When the last verify ended.
    pub(crate) finished_ms: Option<u64>,
    /// Blocks that it has found bad, beyond those that are listed.
    more: u64,
    /// Blocks of 4 KiB.
    pub(crate) bad: BTreeSet<u64>,
    /// Blocks that were repaired from a peer, ever.
    #[serde(default)]
    pub(crate) repaired: u64,
}

/// Milliseconds since 1970.
pub(super) fn wall_ms() -> u64 {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH);
    wall.map_or(0, |wall| {
        u64::try_from(wall.as_millis()).unwrap_or(u64::MAX)
    })
}

impl Record {
    pub(super) fn new() -> Self {
        Self {
            format: FORMAT,
            since_ms: wall_ms(),
            finished_ms: None,
            more: 0,
            bad: BTreeSet::new(),
            repaired: 0,
        }
    }

    pub(super) fn encode(&self) -> io::Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(io::Error::other)
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let record: Self = serde_json::from_slice(bytes).ok()?;
        (record.format == FORMAT && record.bad.len() <= PLACES).then_some(record)
    }

    /// How many blocks are bad.
    pub(crate) fn count(&self) -> u64 {
        self.bad.len() as u64 + self.more
    }

    /// Some blocks are bad, and where they are is not known any more: all that were listed are
    /// good.
    pub(super) fn is_only_counted(&self) -> bool {
        self.more > 0 && self.bad.is_empty()
    }

    fn add(&mut self, block: u64) -> bool {
        if self.bad.len() < PLACES {
            return self.bad.insert(block);
        }
        let new = !self.bad.contains(&block);
        self.more += u64::from(new);
        new
    }

    /// These blocks are bad. Which of them are new.
    pub(super) fn found(&mut self, blocks: impl Iterator<Item = u64>) -> Vec<u64> {
        blocks.filter(|block| self.add(*block)).collect()
    }

    /// All of these blocks was written. Which of them were bad.
    pub(super) fn rewritten(&mut self, is_written: impl Fn(u64) -> bool) -> Vec<u64> {
        let good = self.bad.iter().copied().filter(|block| is_written(*block));
        let good: Vec<u64> = good.collect();
        self.bad.retain(|block| good.binary_search(block).is_err());
        good
    }

    /// Milliseconds from now until the next verify is due.
    pub(super) fn due_in_ms(&self, interval_ms: u64) -> u64 {
        let last = self.finished_ms.unwrap_or(self.since_ms);
        last.saturating_add(interval_ms).saturating_sub(wall_ms())
    }
}

/// A verify that is under way.
#[derive(Debug)]
pub(super) struct Verify {
    /// The block that is read next.
    pub(super) next: u64,
    /// The backing was at this epoch when it began.
    pub(super) first: Epoch,
    record: Record,
    /// Gone when something was written meanwhile.
    pub(super) sum: Option<Sum>,
}

impl Verify {
    pub(super) fn new(first: Epoch) -> Self {
        Self {
            next: 0,
            first,
            record: Record::new(),
            sum: Some(Sum::default()),
        }
    }

    /// Takes what was found up to a block.
    pub(super) fn take(&mut self, next: u64, bad: &[BadBlock]) {
        self.next = next;
        let _ = self.record.found(bad.iter().map(|bad| bad.block));
    }

    /// Adds damage that was found elsewhere meanwhile.
    pub(super) fn found(&mut self, blocks: &[u64]) {
        let _ = self.record.found(blocks.iter().copied());
    }

    /// As [`Record::rewritten`].
    pub(super) fn rewritten(&mut self, is_written: impl Fn(u64) -> bool) {
        self.sum = None;
        let _ = self.record.rewritten(is_written);
    }

    /// All blocks of a device of so many bytes were read; `before` is what was known until now.
    /// With the device's `b3sum`.
    pub(super) fn finish(self, before: &Record, size_bytes: u64) -> (Record, Option<Digest>) {
        let record = Record {
            finished_ms: Some(wall_ms()),
            repaired: before.repaired,
            ..self.record
        };
        (record, self.sum.map(|sum| sum.finish(size_bytes)))
    }
}

/// Ranges of sectors, for people: `LBA 8-23`.
pub(crate) fn ranges(blocks: &BTreeSet<u64>, most: usize) -> Vec<String> {
    let text = |(from, end): &(u64, u64)| format!("LBA {}-{}", from * 8, end * 8 - 1);
    runs(blocks, most).iter().map(text).collect()
}

/// Runs of neighbouring blocks.
pub(super) fn runs(blocks: &BTreeSet<u64>, most: usize) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for &block in blocks {
        let full = all.len() == most;
        match all.last_mut() {
            Some((_, end)) if *end == block => *end += 1,
            _ if full => break,
            _ => all.push((block, block + 1)),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_blocks_are_one_range_of_sectors() {
        let blocks = BTreeSet::from([0, 1, 2, 7, 9]);
        assert_eq!(ranges(&blocks, 8), ["LBA 0-23", "LBA 56-63", "LBA 72-79"]);
        assert_eq!(ranges(&blocks, 1), ["LBA 0-23"]);
    }

    #[test]
    fn a_record_survives_a_restart_and_nothing_else_is_taken_for_one() {
        let mut record = Record::new();
        assert_eq!(record.found([3, 4, 3].into_iter()), [3, 4]);
        let bytes = record.encode().expect("encoded");
        assert_eq!(Record::decode(&bytes), Some(record.clone()));
        assert_eq!(Record::decode(&bytes[1..]), None);
        assert_eq!(Record::decode(b"{}"), None);
        assert_eq!(record.rewritten(|block| block == 3), [3]);
        assert!(record.rewritten(|block| block == 3).is_empty());
        assert_eq!((record.count(), record.bad.first()), (1, Some(&4)));
    }

    #[test]
    fn of_very_many_bad_blocks_the_number_is_told() {
        let mut record = Record::new();
        let _ = record.found(0..10_000);
        assert_eq!((record.bad.len(), record.count()), (PLACES, 10_000));
        assert!(!record.is_only_counted());
        let _ = record.rewritten(|_| true);
        assert_eq!(record.count(), 10_000 - PLACES as u64);
        assert!(record.is_only_counted());
    }

    #[test]
    fn a_medium_that_was_never_checked_is_due_after_one_interval() {
        let mut record = Record::new();
        let due = record.due_in_ms(3_600_000);
        assert!((3_590_000..=3_600_000).contains(&due), "{due}");
        record.finished_ms = Some(5);
        assert_eq!(record.due_in_ms(3_600_000), 0);
    }
}
