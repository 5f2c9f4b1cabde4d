//! Runs: sorted, immutable files of (node index, hash).
//!
//! ```text
//! page 0 | page 1 | ... | index | trailer
//!
//! page     16 bytes checksum, then up to 102 entries of {index u64, hash 32}: 4096 bytes when
//! full.
//!          Every page but the last is full, so a page's place and length follow from its number.
//! index    first node index of each page, u64 each
//! trailer  fixed length, below; its digest covers the index too
//! ```
//!
//! A file is written front to back and is nothing before its trailer is there, so a torn one is
//! never taken for a whole one. A page's checksum covers the run's id and the page's number: a page
//! that was written to the wrong place is damaged, not believed. An entry whose hash is the zero
//! node of its level says "zero now": it hides older entries and is dropped by a merge that reaches
//! the oldest run.
//!
//! The reader keeps the index in memory, 8 bytes for 102 leaves: 21 MiB for a TiB without holes.

use std::io;
use std::sync::Arc;

use hn4::types::{Epoch, VolumeId};

use super::{Geometry, ReadAt, TreeError};
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, DIGEST_BYTES, Digest};

/// Entries in a full page.
pub const PAGE_ENTRIES: usize = 102;
const CHECKSUM: usize = 16;
const ENTRY: usize = 8 + DIGEST_BYTES;
/// Bytes in a full page.
pub const PAGE_BYTES: usize = CHECKSUM + PAGE_ENTRIES * ENTRY;
const _: () = assert!(PAGE_BYTES == 4096);

const MAGIC: &[u8; 8] = b"HN4TRUN1";
const VERSION: u8 = 1;
const TRAILER: usize = 8 + 1 + 1 + 6 + 8 + 16 + 8 + 8 + 8 + 8 + DIGEST_BYTES;

/// What a run holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunMeta {
    /// Id, unique within the volume's state directory; newer runs have larger ids.
    pub id: u64,
    /// Level of its nodes.
    pub level: u8,
    /// The volume.
    pub volume: VolumeId,
    /// Size and shape of the volume.
    pub geometry: Geometry,
    /// First checkpoint whose sweep is in it.
    pub first: Epoch,
    /// Last checkpoint whose sweep is in it.
    pub last: Epoch,
}

/// A finished run, as the manifest names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunSummary {
    /// What it holds.
    pub meta: RunMeta,
    /// Number of entries.
    pub entries: u64,
    /// Digest of index and trailer.
    pub digest: Digest,
}

fn page_checksum(id: u64, number: u64, entries: &[u8]) -> [u8; CHECKSUM] {
    let digest = hash::RUN_PAGE.hash(&[&id.to_le_bytes(), &number.to_le_bytes(), entries]);
    let mut checksum = [0; CHECKSUM];
    checksum.copy_from_slice(&digest.0[..CHECKSUM]);
    checksum
}

/// Writes a run front to back into an [`io::Write`].
#[derive(Debug)]
pub struct RunWriter<W> {
    meta: RunMeta,
    sink: W,
    page: Vec<u8>,
    index: Vec<u8>,
    last: Option<u64>,
    entries: u64,
}

impl<W: io::Write> RunWriter<W> {
    /// An empty run.
    pub fn new(meta: RunMeta, sink: W) -> Self {
        let page = Vec::with_capacity(PAGE_BYTES);
        Self {
            meta,
            sink,
            page,
            index: Vec::new(),
            last: None,
            entries: 0,
        }
    }

    /// What the run is to hold.
    #[must_use]
    pub fn meta(&self) -> &RunMeta {
        &self.meta
    }

    /// Appends an entry.
    ///
    /// # Errors
    /// [`TreeError::Order`] unless `index` exceeds the last one, [`TreeError::OutOfRange`] outside
    /// the tree, [`TreeError::Io`].
    pub fn push(&mut self, index: u64, node: &Digest) -> Result<(), TreeError> {
        self.meta.geometry.check(self.meta.level, index)?;
        if let Some(last) = self.last
            && index <= last
        {
            return Err(TreeError::Order { index, last });
        }
        if self.page.is_empty() {
            self.index.extend_from_slice(&index.to_le_bytes());
        }
        self.page.extend_from_slice(&index.to_le_bytes());
        self.page.extend_from_slice(&node.0);
        (self.last, self.entries) = (Some(index), self.entries + 1);
        if self.page.len() == PAGE_ENTRIES * ENTRY {
            self.flush_page()
        } else {
            Ok(())
        }
    }

    fn flush_page(&mut self) -> Result<(), TreeError> {
        let number = (self.index.len() / 8) as u64 - 1;
        self.sink
            .write_all(&page_checksum(self.meta.id, number, &self.page))?;
        self.sink.write_all(&self.page)?;
        self.page.clear();
        Ok(())
    }

    /// Writes index and trailer. The caller makes the file durable.
    ///
    /// # Errors
    /// [`TreeError::Io`].
    pub fn finish(mut self) -> Result<(RunSummary, W), TreeError> {
        if !self.page.is_empty() {
            self.flush_page()?;
        }
        let trailer = trailer_fields(&self.meta, self.entries);
        let digest = hash::RUN_META.hash(&[&trailer, &self.index]);
        self.sink.write_all(&self.index)?;
        self.sink.write_all(&trailer)?;
        self.sink.write_all(&digest.0)?;
        let summary = RunSummary {
            meta: self.meta,
            entries: self.entries,
            digest,
        };
        Ok((summary, self.sink))
    }
}

fn trailer_fields(meta: &RunMeta, entries: u64) -> Vec<u8> {
    let mut writer = Writer::new();
    writer
        .bytes(MAGIC)
        .u8(VERSION)
        .u8(meta.level)
        .bytes(&[0; 6])
        .u64(meta.id);
    writer.bytes(&meta.volume.0).u64(meta.geometry.size_bytes());
    writer.u64(meta.first.0).u64(meta.last.0).u64(entries);
    writer.finish()
}

fn decode_trailer(bytes: &[u8]) -> Result<(RunMeta, u64, Digest), DecodeError> {
    let mut reader = Reader::new("run trailer", bytes);
    if reader.array::<8>()? != *MAGIC {
        return Err(reader.invalid("magic"));
    }
    reader.version(VERSION)?;
    let level = reader.u8()?;
    if reader.array::<6>()? != [0; 6] {
        return Err(reader.invalid("reserved bytes"));
    }
    let (id, volume) = (reader.u64()?, VolumeId(reader.array()?));
    let geometry = Geometry::new(reader.u64()?).map_err(|_| reader.invalid("size"))?;
    let (first, last, entries) = (Epoch(reader.u64()?), Epoch(reader.u64()?), reader.u64()?);
    let digest = reader.digest()?;
    reader.finish()?;
    Ok((
        RunMeta {
            id,
            level,
            volume,
            geometry,
            first,
            last,
        },
        entries,
        digest,
    ))
}

/// An open run. A clone is another handle of the same file.
#[derive(Debug)]
pub struct Run<R>(Arc<Opened<R>>);

#[derive(Debug)]
struct Opened<R> {
    source: R,
    summary: RunSummary,
    index: Vec<u64>,
}

impl<R> Clone for Run<R> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<R: ReadAt> Run<R> {
    /// Reads trailer and index. Pages are checked when they are read.
    ///
    /// # Errors
    /// [`TreeError::Damaged`] if the file is torn or changed, [`TreeError::Io`].
    pub fn open(source: R) -> Result<Self, TreeError> {
        let damaged = |run, what| TreeError::Damaged { run, what };
        let length = source.len_bytes()?;
        let trailer_at = length
            .checked_sub(TRAILER as u64)
            .ok_or_else(|| damaged(0, "the trailer"))?;
        let mut trailer = [0; TRAILER];
        source.read_at(trailer_at, &mut trailer)?;
        let (meta, entries, digest) =
            decode_trailer(&trailer).map_err(|_| damaged(0, "the trailer"))?;
        let pages = entries.div_ceil(PAGE_ENTRIES as u64);
        let index_at = pages
            .checked_mul(CHECKSUM as u64)
            .and_then(|bytes| bytes.checked_add(entries.checked_mul(ENTRY as u64)?));
        let expected = index_at.and_then(|at| at.checked_add(pages.checked_mul(8)?));
        // The length of the file bounds what is allocated for the index.
        let (Some(index_at), true) = (index_at, expected == Some(trailer_at)) else {
            return Err(damaged(meta.id, "the length"));
        };
        let index_bytes = usize::try_from(pages * 8).map_err(|_| damaged(meta.id, "the length"))?;
        let mut index = vec![0; index_bytes];
        source.read_at(index_at, &mut index)?;
        if hash::RUN_META.hash(&[&trailer[..TRAILER - DIGEST_BYTES], &index]) != digest {
            return Err(damaged(meta.id, "the index or trailer"));
        }
        let index = index
            .as_chunks()
            .0
            .iter()
            .copied()
            .map(u64::from_le_bytes)
            .collect();
        let summary = RunSummary {
            meta,
            entries,
            digest,
        };
        Ok(Self(Arc::new(Opened {
            source,
            summary,
            index,
        })))
    }

    /// What the run holds.
    #[must_use]
    pub fn summary(&self) -> &RunSummary {
        &self.0.summary
    }

    /// Entries from node `index` on, ascending.
    #[must_use]
    pub fn iter_from(&self, index: u64) -> RunIter<'_, R> {
        RunIter {
            run: self,
            page: self.page_of(index),
            loaded: Vec::new(),
            at: 0,
            from: index,
        }
    }

    /// The first page that may hold node `index` or a later one.
    fn page_of(&self, index: u64) -> usize {
        // The page before the first one that begins behind `index` may hold it.
        let behind = self.0.index.partition_point(|&first| first <= index);
        behind.saturating_sub(1)
    }

    /// All entries, ascending.
    #[must_use]
    pub fn iter(&self) -> RunIter<'_, R> {
        self.iter_from(0)
    }

    fn load(&self, page: usize, entries: &mut Vec<(u64, Digest)>) -> Result<(), TreeError> {
        let RunSummary {
            meta,
            entries: total,
            ..
        } = self.0.summary;
        let damaged = || TreeError::Damaged {
            run: meta.id,
            what: "a page",
        };
        let before = page as u64 * PAGE_ENTRIES as u64;
        let count = usize::try_from((total - before).min(PAGE_ENTRIES as u64))
            .expect("a page has at most 102 entries");
        let mut buffer = [0; PAGE_BYTES];
        let bytes = &mut buffer[..CHECKSUM + count * ENTRY];
        self.0
            .source
            .read_at(page as u64 * PAGE_BYTES as u64, bytes)?;
        let (checksum, body) = bytes.split_at(CHECKSUM);
        if checksum != page_checksum(meta.id, page as u64, body) {
            return Err(damaged());
        }
        entries.clear();
        for entry in body.as_chunks::<ENTRY>().0 {
            let (index, node) = entry.split_first_chunk::<8>().ok_or_else(damaged)?;
            let index = u64::from_le_bytes(*index);
            let node = Digest(node.try_into().map_err(|_| damaged())?);
            if entries.last().is_some_and(|(last, _)| index <= *last) {
                return Err(damaged());
            }
            entries.push((index, node));
        }
        Ok(())
    }
}

/// Iterator over the entries of a run.
#[derive(Debug)]
pub struct RunIter<'a, R> {
    run: &'a Run<R>,
    page: usize,
    loaded: Vec<(u64, Digest)>,
    at: usize,
    from: u64,
}

impl<R: ReadAt> RunIter<'_, R> {
    /// Leaves out what comes before node `index`. Pages between are not read.
    pub fn seek(&mut self, index: u64) {
        self.from = self.from.max(index);
        if self.loaded.last().is_some_and(|(last, _)| *last >= index) {
            let rest = &self.loaded[self.at..];
            self.at += rest.partition_point(|(at, _)| *at < index);
            return;
        }
        self.loaded.clear();
        self.at = 0;
        self.page = self.page.max(self.run.page_of(index));
    }
}

impl<R: ReadAt> Iterator for RunIter<'_, R> {
    type Item = Result<(u64, Digest), TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            while let Some(&entry) = self.loaded.get(self.at) {
                self.at += 1;
                if entry.0 >= self.from {
                    return Some(Ok(entry));
                }
            }
            if self.page >= self.run.0.index.len() {
                return None;
            }
            if let Err(error) = self.run.load(self.page, &mut self.loaded) {
                self.page = self.run.0.index.len();
                self.loaded.clear();
                return Some(Err(error));
            }
            (self.page, self.at) = (self.page + 1, 0);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::blocks;

    pub(crate) fn leaf(number: u64) -> Digest {
        blocks::padded_leaf(&number.to_le_bytes())
    }

    pub(crate) fn meta(id: u64, level: u8) -> RunMeta {
        let geometry = Geometry::new(1 << 32).unwrap();
        let volume = VolumeId([3; 16]);
        RunMeta {
            id,
            level,
            volume,
            geometry,
            first: Epoch(id),
            last: Epoch(id),
        }
    }

    pub(crate) fn write(meta: RunMeta, entries: &[(u64, Digest)]) -> Vec<u8> {
        let mut writer = RunWriter::new(meta, Vec::new());
        entries
            .iter()
            .for_each(|(index, node)| writer.push(*index, node).unwrap());
        writer.finish().unwrap().1
    }

    fn read(bytes: Vec<u8>) -> Result<Vec<(u64, Digest)>, TreeError> {
        Run::open(bytes)?.iter().collect()
    }

    #[test]
    fn a_flipped_bit_anywhere_in_a_run_is_found() {
        let entries: Vec<_> = (0..250).map(|at| (at * 3, leaf(at))).collect();
        let good = write(meta(5, 0), &entries);
        assert_eq!(read(good.clone()).unwrap(), entries);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read(bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_torn_or_misplaced_run_is_found() {
        let entries: Vec<_> = (0..250).map(|at| (at, leaf(at))).collect();
        let good = write(meta(5, 0), &entries);
        for length in 0..good.len() {
            assert!(read(good[..length].to_vec()).is_err(), "{length} bytes");
        }
        let mut swapped = good.clone();
        swapped[..2 * PAGE_BYTES].rotate_left(PAGE_BYTES);
        assert!(read(swapped).is_err());
        let mut foreign = write(meta(6, 0), &entries);
        foreign[..PAGE_BYTES].copy_from_slice(&good[..PAGE_BYTES]);
        assert!(read(foreign).is_err());
    }

    #[test]
    fn entries_must_ascend_and_lie_in_the_tree() {
        let mut writer = RunWriter::new(meta(1, 8), Vec::new());
        writer.push(4, &leaf(1)).unwrap();
        assert!(matches!(
            writer.push(4, &leaf(1)),
            Err(TreeError::Order { .. })
        ));
        assert!(matches!(
            writer.push(1 << 12, &leaf(1)),
            Err(TreeError::OutOfRange { .. })
        ));
    }

    #[test]
    fn a_small_run_costs_little_more_than_its_leaves() {
        let entries: Vec<_> = (0..10).map(|at| (at * 1000, leaf(at))).collect();
        assert!(write(meta(1, 0), &entries).len() <= 10 * ENTRY + 150);
        assert_eq!(read(write(meta(1, 0), &[])).unwrap(), []);
    }

    proptest! {
        #[test]
        fn a_run_reads_back_from_anywhere(
            indexes in prop::collection::btree_set(0_u64..5000, 0..400), from in 0_u64..5100,
        ) {
            let entries: Vec<_> = indexes.iter().map(|&at| (at, leaf(at))).collect();
            let run = Run::open(write(meta(1, 0), &entries)).unwrap();
            let read: Vec<_> = run.iter_from(from).map(Result::unwrap).collect();
            let after = |from: u64| entries.iter().copied().filter(move |(at, _)| *at >= from);
            prop_assert_eq!(read, after(from).collect::<Vec<_>>());
            let (mut iter, mut seen) = (run.iter(), 0);
            for seek in [from / 3, from / 2, from] {
                iter.seek(seek);
                let next = iter.next().transpose().unwrap();
                prop_assert_eq!(next, after(seek.max(seen)).next());
                seen = next.map_or(u64::MAX, |(at, _)| at + 1);
            }
        }
    }
}
