//! A map from ranges of blocks to a value: the overlay's memory of TRIM and WRITE ZEROES.
//!
//! Costs are per extent, never per block: zeroing a terabyte is one entry.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges with a value each. Neighbours with equal values are joined.
#[derive(Clone, Debug, Default)]
pub struct ExtentMap<V> {
    /// Start of a range to its end and value.
    map: BTreeMap<u64, (u64, V)>,
}

impl<V: Copy + Eq> ExtentMap<V> {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self {
            map: BTreeMap::new(),
        }
    }

    /// Number of extents.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The value at a point.
    #[must_use]
    pub fn get(&self, point: u64) -> Option<V> {
        let (_, &(end, value)) = self.map.range(..=point).next_back()?;
        (point < end).then_some(value)
    }

    /// Takes a range out, whatever covers it.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        if let Some((&start, &(end, value))) = self.map.range(..range.start).next_back()
            && end > range.start
        {
            self.map.insert(start, (range.start, value));
            if end > range.end {
                self.map.insert(range.end, (end, value));
                return;
            }
        }
        while let Some((&start, &(end, value))) = self.map.range(range.clone()).next() {
            self.map.remove(&start);
            if end > range.end {
                self.map.insert(range.end, (end, value));
            }
        }
    }

    /// Sets a range to a value, replacing what was there.
    pub fn insert(&mut self, mut range: Range<u64>, value: V) {
        if range.is_empty() {
            return;
        }
        self.remove(range.clone());
        if let Some((&start, &(end, before))) = self.map.range(..range.start).next_back()
            && end == range.start
            && before == value
        {
            range.start = start;
        }
        if let Some(&(end, after)) = self.map.get(&range.end)
            && after == value
        {
            self.map.remove(&range.end);
            range.end = end;
        }
        self.map.insert(range.start, (range.end, value));
    }

    /// Keeps only the extents whose value the test accepts.
    pub fn retain(&mut self, mut keep: impl FnMut(V) -> bool) {
        self.map.retain(|_, &mut (_, value)| keep(value));
    }

    /// All extents in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (Range<u64>, V)> + '_ {
        self.map
            .iter()
            .map(|(&start, &(end, value))| (start..end, value))
    }

    /// The extents that touch a range, ascending, as far as they lie in it.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, V)> + '_ {
        let before = self.map.range(..range.start).next_back();
        let rest = self.map.range(range.clone());
        let all = before.into_iter().chain(rest);
        all.filter_map(move |(&start, &(end, value))| {
            let part = start.max(range.start)..end.min(range.end);
            (!part.is_empty()).then_some((part, value))
        })
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        self.map.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_an_array_and_stays_joined(
            ops in prop::collection::vec((0_u64..40, 0_u64..12, 0_u8..4), 0..60),
        ) {
            let mut map = ExtentMap::new();
            let mut model = [0_u8; 64];
            for (start, length, value) in ops {
                let range = start..start + length;
                for cell in range.clone() {
                    model[usize::try_from(cell).expect("small")] = value;
                }
                if value == 0 { map.remove(range) } else { map.insert(range, value) }
            }
            for (point, &value) in model.iter().enumerate() {
                let expected = (value != 0).then_some(value);
                prop_assert_eq!(map.get(point as u64), expected);
            }
            let extents: Vec<_> = map.iter().collect();
            let middle: Vec<_> = map.within(10..20).collect();
            let cut = extents.iter().map(|(part, value)| {
                (part.start.max(10)..part.end.min(20), *value)
            });
            let expected: Vec<_> = cut.filter(|(part, _)| !part.is_empty()).collect();
            prop_assert_eq!(middle, expected);
            for pair in extents.windows(2) {
                prop_assert!(pair[0].0.end <= pair[1].0.start);
            }
        }
    }
}
