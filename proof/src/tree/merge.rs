//! Several runs as one: for each node the entry of the newest run that has one.

use std::io;

use super::run::{Run, RunIter, RunWriter};
use super::{ReadAt, TreeError, zero_node};
use crate::hash::Digest;

/// Iterator over the merged entries of runs, ascending.
#[derive(Debug)]
pub struct Merge<'a, R> {
    // Newest first. `heads` and `nodes` are the entries that come next.
    inputs: Vec<RunIter<'a, R>>,
    heads: Vec<u64>,
    nodes: Vec<Digest>,
    failed: Option<TreeError>,
}

/// Head of an input that has ended; no tree has such a node.
const ENDED: u64 = u64::MAX;

impl<'a, R: ReadAt> Merge<'a, R> {
    /// Merges `runs`, newest first, from node `from` on.
    #[must_use]
    pub fn new(runs: impl IntoIterator<Item = &'a Run<R>>, from: u64) -> Self
    where
        R: 'a,
    {
        let inputs: Vec<_> = runs.into_iter().map(|run| run.iter_from(from)).collect();
        let count = inputs.len();
        let mut merge = Self {
            inputs,
            heads: vec![ENDED; count],
            nodes: vec![Digest::ZERO; count],
            failed: None,
        };
        (0..count).for_each(|input| merge.advance(input));
        merge
    }

    fn advance(&mut self, input: usize) {
        self.heads[input] = ENDED;
        match self.inputs[input].next() {
            Some(Ok((index, node))) => {
                (self.heads[input], self.nodes[input]) = (index, node);
            }
            Some(Err(error)) => self.failed = Some(error),
            None => {}
        }
    }

    /// Leaves out what comes before node `index`.
    pub fn seek(&mut self, index: u64) {
        for input in 0..self.inputs.len() {
            if self.heads[input] < index {
                self.inputs[input].seek(index);
                self.advance(input);
            }
        }
    }

    /// The next entry, if it lies before node `end`.
    pub fn next_before(&mut self, end: u64) -> Option<<Self as Iterator>::Item> {
        let is_there = self.failed.is_some() || self.heads.iter().any(|head| *head < end);
        if is_there { self.next() } else { None }
    }
}

impl<R: ReadAt> Iterator for Merge<'_, R> {
    type Item = Result<(u64, Digest), TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.failed.take() {
            self.heads.fill(ENDED);
            return Some(Err(error));
        }
        let index = self.heads.iter().copied().min()?;
        if index == ENDED {
            return None;
        }
        let mut newest = None;
        for input in 0..self.inputs.len() {
            if self.heads[input] == index {
                newest.get_or_insert(self.nodes[input]);
                self.advance(input);
            }
        }
        newest.map(|node| Ok((index, node)))
    }
}

/// Writes up to `limit` entries of the merge of `runs`, newest first, into `writer`, from node
/// `from` on. With `is_oldest` nothing lies below them, and zero nodes are left out. Where the next
/// slice begins; `None` at the end.
///
/// # Errors
/// [`TreeError`] of a run, or of the writer.
pub fn merge_slice<'a, R: ReadAt + 'a, W: io::Write>(
    runs: impl IntoIterator<Item = &'a Run<R>>,
    (from, limit): (u64, usize),
    is_oldest: bool,
    writer: &mut RunWriter<W>,
) -> Result<Option<u64>, TreeError> {
    let mut merged = Merge::new(runs, from);
    let mut next = from;
    for entry in merged.by_ref().take(limit) {
        let (index, node) = entry?;
        if !(is_oldest && node == zero_node(writer.meta().level)) {
            writer.push(index, &node)?;
        }
        next = index + 1;
    }
    let is_done = merged.next().transpose()?.is_none();
    Ok(Some(next).filter(|_| !is_done))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::run::tests::{leaf, meta, write};
    use super::*;

    proptest! {
        #[test]
        fn the_newest_entry_wins_and_zeroes_vanish_only_at_the_bottom(
            runs in prop::collection::vec(
                prop::collection::btree_map(0_u64..300, 0_u64..4, 0..120), 1..6),
            from in 0_u64..300, limit in 1_usize..50,
        ) {
            let node = |number: u64| if number == 0 { zero_node(0) } else { leaf(number) };
            let mut expected = BTreeMap::new();
            let mut opened = Vec::new();
            for (run, id) in runs.iter().zip(1..) {
                let entries: Vec<_> = run.iter().map(|(&at, &n)| (at, node(n))).collect();
                expected.extend(entries.iter().copied());
                opened.insert(0, Run::open(write(meta(id, 0), &entries)).unwrap());
            }
            let merged: Vec<_> = Merge::new(&opened, from).map(Result::unwrap).collect();
            let range: Vec<_> = expected.range(from..).map(|(&at, &node)| (at, node)).collect();
            prop_assert_eq!(&merged, &range);

            let mut skipping = Merge::new(&opened, 0);
            let third = skipping.next_before(from / 3);
            prop_assert_eq!(
                third.transpose().unwrap().map(|(at, _)| at),
                expected.range(..from / 3).next().map(|(&at, _)| at)
            );
            skipping.seek(from);
            let rest: Vec<_> = skipping.map(Result::unwrap).collect();
            prop_assert_eq!(&rest, &range);

            let mut writer = RunWriter::new(meta(9, 0), Vec::new());
            let mut next = Some(0);
            while let Some(from) = next {
                next = merge_slice(&opened, (from, limit), true, &mut writer).unwrap();
            }
            let bottom = Run::open(writer.finish().unwrap().1).unwrap();
            let bottom: Vec<_> = bottom.iter().map(Result::unwrap).collect();
            expected.retain(|_, node| *node != zero_node(0));
            prop_assert_eq!(bottom, expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_damaged_page_stops_the_merge() {
        let entries: Vec<_> = (0..300).map(|at| (at, leaf(at))).collect();
        let mut bad = write(meta(1, 0), &entries);
        bad[5000] ^= 1;
        let runs = [
            Run::open(bad).unwrap(),
            Run::open(write(meta(2, 0), &entries)).unwrap(),
        ];
        let results: Vec<_> = Merge::new(&runs, 0).collect();
        assert!(matches!(
            results.last(),
            Some(Err(TreeError::Damaged { run: 1, .. }))
        ));
        assert!(results.len() <= 103);
    }
}
