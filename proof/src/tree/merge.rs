//! Several runs as one: for each node the entry of the newest run that has one.

use std::io;

use super::run::{Run, RunIter, RunWriter};
use super::{ReadAt, TreeError, zero_node};
use crate::hash::Digest;

/// A run, and the entry of it that comes next.
type Input<'a, R> = (RunIter<'a, R>, Option<(u64, Digest)>);

/// Iterator over the merged entries of runs, ascending.
#[derive(Debug)]
pub struct Merge<'a, R> {
    // Newest first, each with the entry that comes next.
    inputs: Vec<Input<'a, R>>,
    failed: Option<TreeError>,
}

impl<'a, R: ReadAt> Merge<'a, R> {
    /// Merges `runs`, newest first, from node `from` on.
    #[must_use]
    pub fn new(runs: impl IntoIterator<Item = &'a Run<R>>, from: u64) -> Self
    where
        R: 'a,
    {
        let inputs = runs
            .into_iter()
            .map(|run| (run.iter_from(from), None))
            .collect();
        let mut merge = Self {
            inputs,
            failed: None,
        };
        (0..merge.inputs.len()).for_each(|input| merge.advance(input));
        merge
    }

    fn advance(&mut self, input: usize) {
        let (iterator, head) = &mut self.inputs[input];
        match iterator.next().transpose() {
            Ok(entry) => *head = entry,
            Err(error) => {
                *head = None;
                self.failed = Some(error);
            }
        }
    }
}

impl<R: ReadAt> Iterator for Merge<'_, R> {
    type Item = Result<(u64, Digest), TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.failed.take() {
            self.inputs.clear();
            return Some(Err(error));
        }
        let heads = self.inputs.iter().filter_map(|(_, head)| *head);
        let index = heads.map(|(index, _)| index).min()?;
        let mut newest = None;
        for input in 0..self.inputs.len() {
            if let Some((at, node)) = self.inputs[input].1
                && at == index
            {
                newest.get_or_insert(node);
                self.advance(input);
            }
        }
        newest.map(|node| Ok((index, node)))
    }
}

/// Writes the merge of `runs`, newest first, into `writer`. With `is_oldest` nothing lies below
/// them, and zero nodes are left out.
///
/// # Errors
/// [`TreeError`] of a run, or of the writer.
pub fn merge<'a, R: ReadAt + 'a, W: io::Write>(
    runs: impl IntoIterator<Item = &'a Run<R>>,
    is_oldest: bool,
    level: u8,
    writer: &mut RunWriter<W>,
) -> Result<(), TreeError> {
    for entry in Merge::new(runs, 0) {
        let (index, node) = entry?;
        if !(is_oldest && node == zero_node(level)) {
            writer.push(index, &node)?;
        }
    }
    Ok(())
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
            from in 0_u64..300,
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
            prop_assert_eq!(merged, range);

            let mut writer = RunWriter::new(meta(9, 0), Vec::new());
            merge(&opened, true, 0, &mut writer).unwrap();
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
