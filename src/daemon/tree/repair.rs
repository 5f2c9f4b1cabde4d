//! Damaged blocks for which a good copy is being looked for.
//!
//! Pure: time is an argument. Peers are asked again and again, first often, then seldom; what they
//! give is good if it hashes to the leaf, so nothing else is asked about it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hn4_proof::blocks::Block;
use hn4_proof::tree::exchange::MAX_BLOCKS;

/// Time between two questions, while reads wait for the answer.
const OFTEN: Duration = Duration::from_millis(200);
/// The same when none waits any more.
const SELDOM: Duration = Duration::from_secs(5);
/// So long reads of a damaged block wait for a good copy of it.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Sought {
    since: Instant,
    /// Reads are told that there is no good copy.
    is_lost: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Repairs {
    sought: BTreeMap<u64, Sought>,
    /// Good contents that wait until the backing is quiet.
    given: BTreeMap<u64, Box<Block>>,
    next: Instant,
    /// The block behind the last one that was asked for.
    cursor: u64,
}

impl Repairs {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            sought: BTreeMap::new(),
            given: BTreeMap::new(),
            next: now,
            cursor: 0,
        }
    }

    /// A good copy of this block is wanted. Whether that is new.
    pub(super) fn seek(&mut self, block: u64, now: Instant) -> bool {
        let is_new = !self.sought.contains_key(&block);
        if is_new {
            let (since, is_lost) = (now, false);
            self.sought.insert(block, Sought { since, is_lost });
            self.next = now;
        }
        is_new
    }

    /// The block is good, or nobody cares any more.
    pub(super) fn forget(&mut self, block: u64) {
        self.sought.remove(&block);
        self.given.remove(&block);
    }

    /// All that was sought. Nothing is any more.
    pub(super) fn forget_all(&mut self) -> Vec<u64> {
        self.given.clear();
        std::mem::take(&mut self.sought).into_keys().collect()
    }

    /// Takes contents that were checked. Whether they are wanted. Somebody answers, so those that
    /// were not asked for yet in this turn are asked for at once.
    pub(super) fn give(&mut self, block: u64, contents: Box<Block>, now: Instant) -> bool {
        let is_wanted = self.sought.contains_key(&block);
        if is_wanted {
            self.given.insert(block, contents);
            if self.cursor > 0 {
                self.next = self.next.min(now);
            }
        }
        is_wanted
    }

    /// Contents that are to be written now.
    pub(super) fn take_given(&mut self) -> Option<(u64, Box<Block>)> {
        self.given.pop_first()
    }

    /// When [`Self::due`] is to be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let is_open = self
            .sought
            .keys()
            .any(|block| !self.given.contains_key(block));
        is_open.then_some(self.next)
    }

    /// Blocks to ask for now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<u64> {
        if self.deadline().is_none_or(|at| at > now) {
            return Vec::new();
        }
        let is_open = |block: &u64| !self.given.contains_key(block);
        let later = self.sought.range(self.cursor..).map(|(block, _)| *block);
        let blocks: Vec<u64> = later.filter(is_open).take(MAX_BLOCKS).collect();
        self.cursor = match blocks.last() {
            Some(last) if blocks.len() == MAX_BLOCKS => last + 1,
            _ => 0,
        };
        let waited_for = self.sought.values().any(|sought| !sought.is_lost);
        self.next = now + if waited_for { OFTEN } else { SELDOM };
        blocks
    }

    /// Blocks that were sought for long enough, or, with `at_once`, all: reads of them fail from
    /// now on. Each is named once.
    pub(super) fn lost(&mut self, now: Instant, at_once: bool) -> Vec<u64> {
        let is_late = |sought: &Sought| at_once || now >= sought.since + PATIENCE;
        let open = self.sought.iter_mut().filter(|(_, sought)| !sought.is_lost);
        let late = open.filter(|(_, sought)| is_late(sought));
        late.map(|(block, sought)| {
            sought.is_lost = true;
            *block
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_asked_for_in_turn_first_often_and_then_seldom() {
        let start = Instant::now();
        let mut repairs = Repairs::new(start);
        assert!((0..30).all(|block| repairs.seek(block, start)));
        assert!(!repairs.seek(3, start));
        let mut now = start;
        let mut asked = Vec::new();
        for _ in 0..3 {
            asked.extend(repairs.due(now));
            assert!(repairs.due(now).is_empty());
            now += OFTEN;
        }
        assert_eq!(asked, (0..30).collect::<Vec<_>>());
        assert!(repairs.lost(start + OFTEN, false).is_empty());
        assert_eq!(repairs.lost(start + PATIENCE, false).len(), 30);
        assert!(repairs.lost(start + PATIENCE, true).is_empty(), "told once");
        assert_eq!(repairs.due(now).len(), MAX_BLOCKS);
        assert_eq!(repairs.deadline(), Some(now + SELDOM));
    }

    #[test]
    fn what_was_given_is_not_asked_for_again() {
        let now = Instant::now();
        let mut repairs = Repairs::new(now);
        repairs.seek(7, now);
        assert!(!repairs.give(8, Box::new([0; 4096]), now));
        assert!(repairs.give(7, Box::new([7; 4096]), now));
        assert_eq!(repairs.deadline(), None);
        assert_eq!(repairs.take_given().map(|(block, _)| block), Some(7));
        // It could not be written.
        assert_eq!(repairs.due(now), [7]);
        repairs.forget(7);
        assert_eq!(repairs.deadline(), None);
    }
    #[test]
    fn whoever_answers_is_asked_for_the_rest_at_once_and_only_once_in_a_turn() {
        let now = Instant::now();
        let mut repairs = Repairs::new(now);
        let count = 2 * MAX_BLOCKS as u64 + 1;
        (0..count).for_each(|block| _ = repairs.seek(block, now));
        let mut asked = Vec::new();
        loop {
            let blocks = repairs.due(now);
            let Some(&first) = blocks.first() else { break };
            assert!(repairs.give(first, Box::new([0; 4096]), now));
            asked.extend(blocks);
        }
        assert_eq!(asked, (0..count).collect::<Vec<_>>());
        assert_eq!(repairs.deadline(), Some(now + OFTEN));
    }
}
