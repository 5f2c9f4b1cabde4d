//! In which sectors two histories of a volume differ.
//!
//! A side is a run of frames: a fork file, or what a log keeps. Its frames are laid over each
//! other, so that for every sector the newest change counts. That is compared with the volume as it
//! is, or with the other side from the last epoch that both have.
//!
//! Read only. Everything that is read is checked as recovery checks it: a frame that is damaged is
//! named and nothing is guessed.

use std::collections::BTreeMap;
use std::io;

use hn4::log::{FrameError, FrameHead, FrameHeader, LogIdentity, RecordKind};
use hn4::types::{BLOCK_BYTES, ChainHash, Epoch, Incarnation, SECTOR_BYTES};
use thiserror::Error;

/// Bytes that are compared at a time.
const CHUNK_BYTES: u64 = 1 << 20;

/// Bytes of frames, or of a volume.
pub trait Source {
    /// So many bytes from there. Both are multiples of 512; of 4096 for frames.
    ///
    /// # Errors
    /// Whatever the device says.
    fn read(&mut self, at: u64, bytes: u64) -> io::Result<Vec<u8>>;
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum DivergenceError {
    /// It cannot be read.
    #[error("reading {bytes} bytes at byte {at}: {source}")]
    Read {
        /// Where.
        at: u64,
        /// How many.
        bytes: u64,
        /// Why not.
        source: io::Error,
    },
    /// It is damaged, or of another volume.
    #[error("the frame at byte {at} cannot be used: {source}")]
    Frame {
        /// Where it starts.
        at: u64,
        /// What is wrong.
        source: FrameError,
    },
    /// The frames are not a run of one history.
    #[error("epoch {found} does not continue epoch {before}")]
    Broken {
        /// The epoch.
        found: Epoch,
        /// The one before it.
        before: Epoch,
    },
    /// The logs do not reach back to an epoch that both have.
    #[error(
        "the histories parted before what the logs keep: one begins after epoch {0}, the other \
         after epoch {1}"
    )]
    NoCommonEpoch(Epoch, Epoch),
}

/// A frame and where it lies in its source.
#[derive(Clone, Debug)]
pub struct Found {
    /// Header and records, checked.
    pub head: FrameHead,
    /// Where it starts.
    pub at: u64,
}

impl Found {
    /// Whether it holds what lay in a backing before a full copy was written over it, and not an
    /// epoch: no primary seals one before its first opening.
    #[must_use]
    pub fn is_of_backing(&self) -> bool {
        self.head.header.incarnation == Incarnation(0)
    }

    /// Whether the frame after it in a fork file is what lay in the backing too, or the first epoch
    /// after that.
    fn lies_under(&self, next: &FrameHeader) -> bool {
        let ours = &self.head.header;
        self.is_of_backing() && (ours.epoch, ours.previous) == (next.epoch, next.previous)
    }
}

/// Where frames are looked for.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// The first one starts here.
    pub from: u64,
    /// None starts here or later.
    pub end: u64,
    /// It continues this epoch, if that is known.
    pub after: Option<(Epoch, ChainHash)>,
    /// Epochs up to this one must be there. What follows them may be no frame, as at the end of a
    /// log.
    pub sure_through: Epoch,
}

/// Reads a run of frames.
///
/// # Errors
/// [`DivergenceError`] names the frame.
pub fn read_run(
    source: &mut dyn Source,
    identity: &LogIdentity,
    run: Run,
) -> Result<Vec<Found>, DivergenceError> {
    let mut found: Vec<Found> = Vec::new();
    let (mut at, mut after) = (run.from, run.after);
    while at < run.end {
        let may_end = after.is_some_and(|(epoch, _)| epoch >= run.sure_through);
        let header = read(source, at, BLOCK_BYTES)?;
        let header = match FrameHeader::decode(identity, &header) {
            // A frame of an earlier lap, or of a tail that was replaced, is no frame here.
            Ok(header) if !may_end || continues(&header, at, after) => header,
            Ok(_) => break,
            Err(_) if may_end => break,
            Err(source) => return Err(DivergenceError::Frame { at, source }),
        };
        if let Some((before, chain)) = after
            && (header.epoch != before.next() || header.previous != chain)
            && !found.last().is_some_and(|last| last.lies_under(&header))
        {
            let found = header.epoch;
            return Err(DivergenceError::Broken { found, before });
        }
        let frame = read(source, at, header.frame_bytes.min(run.end - at))?;
        let head = match FrameHead::decode_frame(identity, &frame) {
            Ok(head) => head,
            Err(_) if may_end => break,
            Err(source) => return Err(DivergenceError::Frame { at, source }),
        };
        after = Some((header.epoch, head.chain));
        found.push(Found { head, at });
        at += header.frame_bytes;
    }
    Ok(found)
}

fn continues(header: &FrameHeader, at: u64, after: Option<(Epoch, ChainHash)>) -> bool {
    let next =
        after.is_none_or(|(epoch, chain)| header.epoch == epoch.next() && header.previous == chain);
    next && header.offset.0 == at
}

fn read(source: &mut dyn Source, at: u64, bytes: u64) -> Result<Vec<u8>, DivergenceError> {
    let found = source.read(at, bytes);
    found.map_err(|source| DivergenceError::Read { at, bytes, source })
}

/// The last epoch that both runs have, and how many frames of each belong to it or come before.
///
/// # Errors
/// [`DivergenceError::NoCommonEpoch`].
pub fn common(
    (base_a, a): ((Epoch, ChainHash), &[Found]),
    (base_b, b): ((Epoch, ChainHash), &[Found]),
) -> Result<(Epoch, [usize; 2]), DivergenceError> {
    let places = |base: (Epoch, ChainHash), frames: &[Found]| {
        let all = frames
            .iter()
            .map(|found| (found.head.header.epoch, found.head.chain));
        std::iter::once(base).chain(all).collect::<Vec<_>>()
    };
    let (places_a, places_b) = (places(base_a, a), places(base_b, b));
    let known: BTreeMap<Epoch, (usize, ChainHash)> = places_b
        .iter()
        .enumerate()
        .map(|(index, &(epoch, chain))| (epoch, (index, chain)))
        .collect();
    for (index, (epoch, chain)) in places_a.iter().enumerate().rev() {
        if let Some((other, theirs)) = known.get(epoch)
            && theirs == chain
        {
            return Ok((*epoch, [index, *other]));
        }
    }
    Err(DivergenceError::NoCommonEpoch(base_a.0, base_b.0))
}

/// The newest change of some sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    /// The sector after the last one.
    end: u64,
    epoch: Epoch,
    /// Where the contents are in the source; `None`: zeroes.
    at: Option<u64>,
}

/// The newest change of every sector that a run of frames changes.
#[derive(Clone, Debug, Default)]
pub struct Changes(BTreeMap<u64, Piece>);

impl Changes {
    /// Lays frames over each other, in order.
    #[must_use]
    pub fn of(frames: &[Found]) -> Self {
        let mut changes = Self::default();
        for found in frames {
            for record in &found.head.records {
                let at = (record.kind == RecordKind::Data)
                    .then(|| found.at + found.head.payload_range(record).start as u64);
                let epoch = match found.head.header.epoch {
                    epoch if found.is_of_backing() => Epoch(epoch.0.saturating_sub(1)),
                    epoch => epoch,
                };
                let end = record.end().0;
                changes.lay(record.lba.0, Piece { end, epoch, at });
            }
        }
        changes
    }

    fn lay(&mut self, start: u64, piece: Piece) {
        self.cut(start);
        self.cut(piece.end);
        let covered: Vec<u64> = self.0.range(start..piece.end).map(|(&at, _)| at).collect();
        for at in covered {
            self.0.remove(&at);
        }
        self.0.insert(start, piece);
    }

    /// Makes a piece begin at a sector if one goes over it.
    fn cut(&mut self, sector: u64) {
        let Some((&start, &piece)) = self.0.range(..sector).next_back() else {
            return;
        };
        if piece.end > sector {
            let skipped = (sector - start) * SECTOR_BYTES;
            let rest = Piece {
                at: piece.at.map(|at| at + skipped),
                ..piece
            };
            self.0.insert(
                start,
                Piece {
                    end: sector,
                    ..piece
                },
            );
            self.0.insert(sector, rest);
        }
    }

    /// Sectors that are changed.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.0.iter().map(|(start, piece)| piece.end - start).sum()
    }

    fn contents(
        source: &mut dyn Source,
        piece: &Piece,
        skipped: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, DivergenceError> {
        match piece.at {
            None => Ok(vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)]),
            Some(at) => read(source, at + skipped, bytes),
        }
    }
}

/// Whose change it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The first one's (the fork's) alone.
    First,
    /// The second one's alone.
    Second,
    /// Both changed it, to something else.
    Both,
}

/// Neighbouring sectors that differ in the same way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// The first sector.
    pub lba: u64,
    /// How many.
    pub sectors: u64,
    /// Who changed them.
    pub side: Side,
    /// In which epoch the first side did.
    pub first: Option<Epoch>,
    /// In which epoch the second side did.
    pub second: Option<Epoch>,
}

#[derive(Default)]
struct Ranges(Vec<Range>);

impl Ranges {
    fn push(&mut self, range: Range) {
        if let Some(last) = self.0.last_mut()
            && last.lba + last.sectors == range.lba
            && (last.side, last.first, last.second) == (range.side, range.first, range.second)
        {
            last.sectors += range.sectors;
        } else {
            self.0.push(range);
        }
    }

    /// The sectors in which two contents differ.
    fn compare(&mut self, at: Range, ours: &[u8], theirs: &[u8]) {
        let sector = usize::try_from(SECTOR_BYTES).unwrap_or(512);
        let pairs = ours.chunks(sector).zip(theirs.chunks(sector));
        for (index, _) in (0..)
            .zip(pairs)
            .filter(|(_, (ours, theirs))| ours != theirs)
        {
            let lba = at.lba + index;
            self.push(Range {
                lba,
                sectors: 1,
                ..at
            });
        }
    }
}

/// Where the volume as it is does not hold what the first side changed.
///
/// # Errors
/// If either cannot be read.
pub fn against_volume(
    changes: &Changes,
    source: &mut dyn Source,
    volume: &mut dyn Source,
) -> Result<Vec<Range>, DivergenceError> {
    let mut ranges = Ranges::default();
    for (&start, piece) in &changes.0 {
        let mut lba = start;
        while lba < piece.end {
            let sectors = (piece.end - lba).min(CHUNK_BYTES / SECTOR_BYTES);
            let bytes = sectors * SECTOR_BYTES;
            let ours = Changes::contents(source, piece, (lba - start) * SECTOR_BYTES, bytes)?;
            let theirs = read(volume, lba * SECTOR_BYTES, bytes)?;
            let range = Range {
                lba,
                sectors,
                side: Side::First,
                first: Some(piece.epoch),
                second: None,
            };
            ranges.compare(range, &ours, &theirs);
            lba += sectors;
        }
    }
    Ok(ranges.0)
}

/// What two sides changed since they parted, except where both hold the same.
///
/// # Errors
/// If either cannot be read.
pub fn between(
    (first, first_source): (&Changes, &mut dyn Source),
    (second, second_source): (&Changes, &mut dyn Source),
) -> Result<Vec<Range>, DivergenceError> {
    let (mut first, mut second) = (first.clone(), second.clone());
    // Now no piece of one begins or ends within one of the other.
    let borders = |changes: &Changes| -> Vec<u64> {
        let both = changes
            .0
            .iter()
            .flat_map(|(&start, piece)| [start, piece.end]);
        both.collect()
    };
    let (of_first, of_second) = (borders(&first), borders(&second));
    of_second.into_iter().for_each(|border| first.cut(border));
    of_first.into_iter().for_each(|border| second.cut(border));
    let mut starts: Vec<u64> = first.0.keys().chain(second.0.keys()).copied().collect();
    starts.sort_unstable();
    starts.dedup();
    let mut ranges = Ranges::default();
    for start in starts {
        let (ours, theirs) = (first.0.get(&start), second.0.get(&start));
        let side = match (ours, theirs) {
            (Some(_), None) => Side::First,
            (None, Some(_)) => Side::Second,
            _ => Side::Both,
        };
        let end = ours.or(theirs).map_or(start, |piece| piece.end);
        let range = Range {
            lba: start,
            sectors: end - start,
            side,
            first: ours.map(|piece| piece.epoch),
            second: theirs.map(|piece| piece.epoch),
        };
        let (Some(ours), Some(theirs)) = (ours, theirs) else {
            ranges.push(range);
            continue;
        };
        let mut lba = start;
        // Zeroes on both sides are equal, however many.
        while lba < end && (ours.at.is_some() || theirs.at.is_some()) {
            let sectors = (end - lba).min(CHUNK_BYTES / SECTOR_BYTES);
            let (skipped, bytes) = ((lba - start) * SECTOR_BYTES, sectors * SECTOR_BYTES);
            let one = Changes::contents(first_source, ours, skipped, bytes)?;
            let two = Changes::contents(second_source, theirs, skipped, bytes)?;
            ranges.compare(
                Range {
                    lba,
                    sectors,
                    ..range
                },
                &one,
                &two,
            );
            lba += sectors;
        }
    }
    Ok(ranges.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes(Vec<u8>);

    impl Source for Bytes {
        fn read(&mut self, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
            let range =
                usize::try_from(at).expect("small")..usize::try_from(at + bytes).expect("small");
            Ok(self.0[range].to_vec())
        }
    }

    fn piece(end: u64, epoch: u64, at: Option<u64>) -> Piece {
        let epoch = Epoch(epoch);
        Piece { end, epoch, at }
    }

    fn range(lba: u64, sectors: u64, side: Side, epochs: [u64; 2]) -> Range {
        let epoch = |epoch: u64| (epoch > 0).then_some(Epoch(epoch));
        Range {
            lba,
            sectors,
            side,
            first: epoch(epochs[0]),
            second: epoch(epochs[1]),
        }
    }

    #[test]
    fn the_newest_change_of_a_sector_counts_and_the_rest_of_older_ones_stays() {
        let mut changes = Changes::default();
        changes.lay(10, piece(20, 1, Some(4096)));
        changes.lay(14, piece(16, 2, None));
        changes.lay(18, piece(22, 3, Some(0)));
        let pieces: Vec<(u64, Piece)> = changes.0.iter().map(|(&at, &piece)| (at, piece)).collect();
        let expected = [
            (10, piece(14, 1, Some(4096))),
            (14, piece(16, 2, None)),
            (16, piece(18, 1, Some(4096 + 6 * 512))),
            (18, piece(22, 3, Some(0))),
        ];
        assert_eq!(pieces, expected);
        assert_eq!(changes.sectors(), 12);
    }

    #[test]
    fn sectors_that_hold_the_same_do_not_differ() {
        let mut changes = Changes::default();
        changes.lay(1, piece(4, 5, Some(0)));
        changes.lay(6, piece(8, 6, None));
        let mut source = Bytes([1_u8, 2, 3].iter().flat_map(|&byte| [byte; 512]).collect());
        let mut volume = Bytes(vec![0; 16 * 512]);
        volume.0[2 * 512..3 * 512].fill(2);
        volume.0[7 * 512] = 1;
        let found = against_volume(&changes, &mut source, &mut volume).expect("read");
        let expected = [
            range(1, 1, Side::First, [5, 0]),
            range(3, 1, Side::First, [5, 0]),
            range(7, 1, Side::First, [6, 0]),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn two_sides_are_compared_where_both_changed_and_told_where_one_did() {
        let (mut first, mut second) = (Changes::default(), Changes::default());
        first.lay(0, piece(8, 4, Some(0)));
        second.lay(4, piece(12, 5, Some(0)));
        let mut one = Bytes(vec![7; 8 * 512]);
        let mut two = Bytes(vec![7; 8 * 512]);
        two.0[512] = 8;
        let found = between((&first, &mut one), (&second, &mut two)).expect("read");
        let expected = [
            range(0, 4, Side::First, [4, 0]),
            range(5, 1, Side::Both, [4, 5]),
            range(8, 4, Side::Second, [0, 5]),
        ];
        assert_eq!(found, expected);
    }
}
