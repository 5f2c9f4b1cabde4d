//! Zeroed memory for disks and arenas, used again from run to run: a run touches little of what it
//! might, and only what was touched is zeroed anew.
//!
//! **Invariant:** fresh memory is zero, whatever an earlier run did with it (P11).

use std::cell::RefCell;
use std::ops::Range;

const PAGE: usize = 4096;
/// Buffers that are kept.
const KEPT: usize = 48;

thread_local! {
    /// Buffers of zeroes.
    static POOL: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Pages {
    /// It may be longer than what was asked for.
    bytes: Vec<u8>,
    touched: Vec<bool>,
    length: usize,
}

/// The smallest buffer of the pool that is large enough.
fn pooled(length: usize) -> Option<Vec<u8>> {
    POOL.with_borrow_mut(|pool| {
        let fits = pool.iter().enumerate();
        let fits = fits.filter(|(_, bytes)| bytes.len() >= length);
        let (index, _) = fits.min_by_key(|(_, bytes)| bytes.len())?;
        Some(pool.swap_remove(index))
    })
}

impl Pages {
    /// So many zeroes.
    #[must_use]
    pub(crate) fn new(length: usize) -> Self {
        // What a new buffer has too much is never touched, and costs nothing.
        let bytes = pooled(length).unwrap_or_else(|| vec![0; length.next_power_of_two()]);
        Self {
            touched: vec![false; length.div_ceil(PAGE)],
            bytes,
            length,
        }
    }

    /// How many bytes there are.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// All of it.
    #[must_use]
    pub(crate) fn all(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Copies out what begins at an offset. What was never touched is not even looked at.
    pub(crate) fn read(&self, offset: usize, buffer: &mut [u8]) {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let length = (PAGE - at % PAGE).min(rest.len());
            let (part, later) = rest.split_at_mut(length);
            if self.touched[at / PAGE] {
                part.copy_from_slice(&self.bytes[at..at + length]);
            } else {
                part.fill(0);
            }
            (at, rest) = (at + length, later);
        }
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
