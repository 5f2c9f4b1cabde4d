//! When a replica asks its primary for what.
//!
//! A small state machine of its own, because it decides without the daemon: the daemon only keeps
//! the local state true. What has been asked is asked again only after it was answered with no.

use super::api::{CopyState, FeedRefusal, LocalState, Role, Tip};

/// What was asked of the peer in this session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Asked {
    /// Nothing yet.
    #[default]
    Nothing,
    /// The log, from after this tip.
    Feed(Tip),
    /// A full copy; the log follows by itself.
    Seed,
    /// The log, refused until our own was cut: it must end no later than `to`, and elsewhere than
    /// where it ended when it was refused, so that a peer that asks for nothing to be cut is not
    /// asked again and again.
    TruncateFirst {
        /// The last epoch both sides have.
        to: Tip,
        /// With which tip we asked, if we did.
        refused: Option<Tip>,
    },
    /// The log, refused for good; only a full copy can help, or an operator.
    RefusedForGood,
}

/// What to ask now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ask {
    /// Subscribe with the local tip.
    Feed,
    /// Request a full copy from this cursor on.
    Seed {
        /// Bytes from the start of the volume.
        cursor_bytes: u64,
    },
}

impl Asked {
    /// What the state of both sides calls for now; the answer counts as asked.
    pub(super) fn next(&mut self, ours: &LocalState, theirs: &LocalState) -> Option<Ask> {
        let is_pair =
            ours.role == Role::Replica && theirs.role == Role::Primary && ours.term == theirs.term;
        if !is_pair {
            return None;
        }
        let ask = match (ours.copy, *self) {
            (CopyState::Fresh | CopyState::Seeding { .. }, Self::Seed)
            | (CopyState::Shadowing { .. }, Self::Seed) => None,
            (CopyState::Surveying, _) => None,
            (CopyState::Fresh, _) => Some(Ask::Seed { cursor_bytes: 0 }),
            (
                CopyState::Seeding { cursor_bytes } | CopyState::Shadowing { cursor_bytes, .. },
                _,
            ) => Some(Ask::Seed { cursor_bytes }),
            (CopyState::Usable, Self::Nothing) => Some(Ask::Feed),
            (CopyState::Usable, Self::TruncateFirst { to, refused })
                if ours.tip.0 <= to.0 && refused != Some(ours.tip) =>
            {
                Some(Ask::Feed)
            }
            (CopyState::Usable, _) => None,
        };
        match ask {
            Some(Ask::Feed) => *self = Self::Feed(ours.tip),
            Some(Ask::Seed { .. }) => *self = Self::Seed,
            None => {}
        }
        ask
    }

    /// The peer refused a feed.
    pub(super) fn refused(&mut self, refusal: FeedRefusal) {
        let refused = match self {
            Self::Feed(tip) => Some(*tip),
            // A copy was asked for since. It must not be asked for again: it would begin anew, and
            // nobody would grant what the pieces on their way have cost.
            Self::Seed => return,
            _ => None,
        };
        *self = match refusal {
            FeedRefusal::Truncate { to } => Self::TruncateFirst { to, refused },
            FeedRefusal::Diverged { .. } | FeedRefusal::TooOld { .. } => Self::RefusedForGood,
        };
    }
}

#[cfg(test)]
mod tests {
    use hn4::types::{ChainHash, Epoch};

    use super::*;
    use crate::session::testing;

    fn pair() -> (LocalState, LocalState) {
        let mut primary = testing::state(1);
        primary.role = Role::Primary;
        (testing::state(2), primary)
    }

    #[test]
    fn a_late_no_to_a_feed_does_not_ask_for_a_copy_twice() {
        let (mut ours, theirs) = pair();
        let mut asked = Asked::default();
        assert_eq!(asked.next(&ours, &theirs), Some(Ask::Feed));
        ours.copy = CopyState::Shadowing {
            cursor_bytes: 0,
            from: ours.tip,
        };
        let seed = Some(Ask::Seed { cursor_bytes: 0 });
        assert_eq!(asked.next(&ours, &theirs), seed);
        asked.refused(FeedRefusal::TooOld { oldest: Epoch(100) });
        assert_eq!(asked.next(&ours, &theirs), None);
    }

    #[test]
    fn a_replica_asks_once_and_again_only_after_it_has_truncated() {
        let (mut ours, theirs) = pair();
        ours.tip = (Epoch(9), ChainHash::default());
        let mut asked = Asked::default();
        assert_eq!(asked.next(&ours, &theirs), Some(Ask::Feed));
        assert_eq!(asked.next(&ours, &theirs), None);
        asked.refused(FeedRefusal::Truncate {
            to: (Epoch(7), ChainHash::default()),
        });
        assert_eq!(asked.next(&ours, &theirs), None);
        ours.tip.0 = Epoch(7);
        assert_eq!(asked.next(&ours, &theirs), Some(Ask::Feed));
        asked.refused(FeedRefusal::Truncate { to: ours.tip });
        assert_eq!(asked.next(&ours, &theirs), None, "there is nothing to cut");
        asked.refused(FeedRefusal::TooOld { oldest: Epoch(100) });
        assert_eq!(asked.next(&ours, &theirs), None);
        ours.copy = CopyState::Seeding { cursor_bytes: 0 };
        assert_eq!(
            asked.next(&ours, &theirs),
            Some(Ask::Seed { cursor_bytes: 0 })
        );
        ours.copy = CopyState::Usable;
        assert_eq!(
            asked.next(&ours, &theirs),
            None,
            "the log follows the copy by itself"
        );
    }

    #[test]
    fn a_copy_is_asked_for_when_what_was_brought_is_known() {
        let (mut ours, theirs) = pair();
        ours.copy = CopyState::Surveying;
        let mut asked = Asked::default();
        assert_eq!(asked.next(&ours, &theirs), None);
        ours.copy = CopyState::Fresh;
        let seed = Some(Ask::Seed { cursor_bytes: 0 });
        assert_eq!(asked.next(&ours, &theirs), seed);
        assert_eq!(asked.next(&ours, &theirs), None);
    }

    #[test]
    fn nobody_asks_across_terms_or_without_a_primary() {
        let (ours, mut theirs) = pair();
        theirs.term.counter += 1;
        assert_eq!(Asked::default().next(&ours, &theirs), None);
        let (ours, mut theirs) = pair();
        theirs.role = Role::Replica;
        assert_eq!(Asked::default().next(&ours, &theirs), None);
        let (mut ours, theirs) = pair();
        ours.role = Role::Fenced;
        assert_eq!(Asked::default().next(&ours, &theirs), None);
    }
}
