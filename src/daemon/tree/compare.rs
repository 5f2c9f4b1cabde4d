//! Are the copies equal? Roots of this copy and of its peers at the same epoch.
//!
//! Both sides cut their sweeps at the epochs that the primary has marked, and both say their root
//! there; also where nothing more comes. A root counts only against one at the same epoch of the
//! same history, so a copy that is behind is never taken for one that differs.
//!
//! Pure: time is an argument. What a peer says changes nothing but what is shown (P6).

use std::collections::VecDeque;
use std::time::Instant;

use hn4_engine::core::event::Tip;
use hn4_proof::hash::Digest;

/// Roots of this copy that are remembered, for peers that are behind.
const OURS: usize = 256;
/// Roots of a peer that are remembered until this copy gets there.
const THEIRS: usize = 16;

/// A root at a place of the history.
pub(crate) type Rooted = (Tip, Digest);

/// What comparing with a peer has shown last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Compared {
    /// Where.
    pub(crate) at: Tip,
    /// When.
    pub(crate) when: Instant,
    /// Our root.
    pub(crate) ours: Digest,
    /// The peer's.
    pub(crate) theirs: Digest,
}

/// The roots of one peer.
#[derive(Clone, Default, Debug)]
pub(crate) struct Peer {
    waiting: VecDeque<Rooted>,
    pub(crate) last: Option<Compared>,
}

impl Peer {
    fn judge(&mut self, at: Tip, (ours, theirs): (Digest, Digest), when: Instant) {
        if self.last.is_none_or(|last| last.at.epoch <= at.epoch) {
            self.last = Some(Compared {
                at,
                when,
                ours,
                theirs,
            });
        }
    }
}

/// The roots of this copy.
#[derive(Clone, Default, Debug)]
pub(crate) struct Roots(VecDeque<Rooted>);

impl Roots {
    /// The newest one.
    pub(crate) fn newest(&self) -> Option<Rooted> {
        self.0.back().copied()
    }

    /// This copy has this root. Compares it with what the peers have said.
    pub(crate) fn ours<'a>(
        &mut self,
        (at, root): Rooted,
        peers: impl Iterator<Item = &'a mut Peer>,
        now: Instant,
    ) {
        // A tree that was built anew may say another root for the same place.
        self.0.retain(|(place, _)| place.epoch < at.epoch);
        self.0.push_back((at, root));
        while self.0.len() > OURS {
            self.0.pop_front();
        }
        for peer in peers {
            let found = peer.waiting.iter().find(|(place, _)| *place == at);
            if let Some(&(_, theirs)) = found {
                peer.judge(at, (root, theirs), now);
            }
            peer.waiting.retain(|(place, _)| place.epoch > at.epoch);
        }
    }

    /// A peer has said its root.
    pub(crate) fn theirs(&self, peer: &mut Peer, (at, root): Rooted, now: Instant) {
        if let Some(&(_, ours)) = self.0.iter().find(|(place, _)| *place == at) {
            return peer.judge(at, (ours, root), now);
        }
        let newest = self.newest().map(|(place, _)| place.epoch);
        if newest.is_none_or(|newest| newest < at.epoch) {
            peer.waiting.push_back((at, root));
            if peer.waiting.len() > THEIRS {
                peer.waiting.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use hn4::types::{ChainHash, Epoch};

    use super::*;

    fn at(epoch: u64, history: u8) -> Tip {
        Tip {
            epoch: Epoch(epoch),
            chain: ChainHash([history; 32]),
        }
    }

    fn root(number: u8) -> Digest {
        Digest([number; 32])
    }

    fn verdict(peer: &Peer) -> Option<(u64, bool)> {
        let last = peer.last.as_ref()?;
        Some((last.at.epoch.0, last.ours == last.theirs))
    }

    #[test]
    fn roots_meet_whoever_is_first() {
        let now = Instant::now();
        let (mut roots, mut peer) = (Roots::default(), Peer::default());
        roots.ours((at(5, 1), root(1)), [&mut peer].into_iter(), now);
        assert_eq!(verdict(&peer), None);
        roots.theirs(&mut peer, (at(5, 1), root(1)), now);
        assert_eq!(verdict(&peer), Some((5, true)));
        // The peer is ahead.
        roots.theirs(&mut peer, (at(9, 1), root(2)), now);
        assert_eq!(verdict(&peer), Some((5, true)));
        roots.ours((at(7, 1), root(7)), [&mut peer].into_iter(), now);
        roots.ours((at(9, 1), root(3)), [&mut peer].into_iter(), now);
        assert_eq!(verdict(&peer), Some((9, false)));
        // What is said late of an earlier place does not hide it.
        roots.theirs(&mut peer, (at(7, 1), root(7)), now);
        assert_eq!(verdict(&peer), Some((9, false)));
    }

    #[test]
    fn other_places_and_other_histories_say_nothing() {
        let now = Instant::now();
        let (mut roots, mut peer) = (Roots::default(), Peer::default());
        roots.ours((at(5, 1), root(1)), [&mut peer].into_iter(), now);
        roots.theirs(&mut peer, (at(5, 2), root(9)), now);
        roots.theirs(&mut peer, (at(4, 1), root(9)), now);
        roots.theirs(&mut peer, (at(6, 2), root(9)), now);
        roots.ours((at(6, 1), root(1)), [&mut peer].into_iter(), now);
        assert_eq!(verdict(&peer), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let now = Instant::now();
        let (mut roots, mut peer) = (Roots::default(), Peer::default());
        for epoch in 0..1000 {
            roots.ours((at(epoch, 1), root(1)), [&mut peer].into_iter(), now);
            roots.theirs(&mut peer, (at(epoch + 5000, 1), root(1)), now);
        }
        assert_eq!((roots.0.len(), peer.waiting.len()), (OURS, THEIRS));
    }
}
