//! Zeroed memory for disks and arenas, used again from run to run: a run touches little of what it
//! might, and only what was touched is zeroed anew.
//!
//! **Invariant:** fresh memory is zero, whatever an earlier run did with it (P11).

use std::cell::RefCell;
use std::ops::Range;

const PAGE: usize = 4096;
/// Buffers that are kept.
const KEPT: usize = 32;

thread_local! {
    static POOL: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Pages {
    bytes: Vec<u8>,
    touched: Vec<bool>,
}

impl Pages {
    /// So many zeroes.
    #[must_use]
    pub(crate) fn new(length: usize) -> Self {
        let mut bytes = POOL.with_borrow_mut(Vec::pop).unwrap_or_default();
        bytes.resize(length, 0);
        Self {
            touched: vec![false; length.div_ceil(PAGE)],
            bytes,
        }
    }

    /// All of it.
    #[must_use]
    pub(crate) fn all(&self) -> &[u8] {
        &self.bytes
    }

    /// A part, to change.
    pub(crate) fn change(&mut self, range: Range<usize>) -> &mut [u8] {
        self.touched[range.start / PAGE..range.end.div_ceil(PAGE)].fill(true);
        &mut self.bytes[range]
    }

    /// Copies a part to another place.
    pub(crate) fn copy(&mut self, source: Range<usize>, to: usize) {
        let end = to + source.len();
        self.touched[to / PAGE..end.div_ceil(PAGE)].fill(true);
        self.bytes.copy_within(source, to);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        for (page, touched) in self.bytes.chunks_mut(PAGE).zip(&self.touched) {
            if *touched {
                page.fill(0);
            }
        }
        let bytes = std::mem::take(&mut self.bytes);
        POOL.with_borrow_mut(|pool| {
            if pool.len() < KEPT {
                pool.push(bytes);
            }
        });
    }
}
