//! The record of a run: a hash of everything that happened (P11), and on demand the last events in
//! words.

use std::collections::VecDeque;

/// Events that are kept in words.
const KEPT: usize = 1_000_000;

/// See the module.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: u64,
    words: Option<VecDeque<String>>,
}

impl Trace {
    /// An empty record; `words` decides whether events are also kept in words.
    #[must_use]
    pub(crate) fn new(words: bool) -> Self {
        Self {
            hash: 0xCBF2_9CE4_8422_2325,
            words: words.then(VecDeque::new),
        }
    }

    /// Adds numbers to the hash.
    pub(crate) fn mix(&mut self, numbers: &[u64]) {
        for &number in numbers {
            self.hash = (self.hash ^ number).wrapping_mul(0x0000_0100_0000_01B3);
            self.hash ^= self.hash >> 29;
        }
    }

    /// Adds an event in words, if they are wanted.
    pub(crate) fn note(&mut self, now: u64, node: Option<usize>, text: impl FnOnce() -> String) {
        if let Some(words) = &mut self.words {
            if words.len() == KEPT {
                words.pop_front();
            }
            let node = node.map_or(String::new(), |node| format!(" node {node}"));
            let mut text = text();
            if text.len() > 400 {
                let end = (380..400)
                    .find(|&at| text.is_char_boundary(at))
                    .unwrap_or(0);
                text.truncate(end);
                text.push_str(" ..");
            }
            words.push_back(format!("{:>12}{node} {text}", now / 1000));
        }
    }

    /// The hash so far.
    #[must_use]
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    /// The last events.
    pub(crate) fn words(&self) -> impl Iterator<Item = &str> {
        self.words.iter().flatten().map(String::as_str)
    }
}
