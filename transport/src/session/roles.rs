//! What the pin of a peer's key allows the peer to be.
//!
//! Pure. Checked when the peer says hello and whenever its state changes, so that a peer that may
//! only be a replica can neither be primary for us nor make us give way to a term, be it its own or
//! one that it claims to have heard of; and a peer that may only be primary is never fed.

use super::api::{Field, FoundBy, LocalState, Refusal, Role};

/// What a peer may be for a volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PeerRoles {
    /// It may be primary: its terms and its history are followed.
    pub primary: bool,
    /// It may be a replica: it is fed, and counts as a copy.
    pub replica: bool,
}

impl Default for PeerRoles {
    fn default() -> Self {
        Self {
            primary: true,
            replica: true,
        }
    }
}

impl PeerRoles {
    fn names(self) -> &'static str {
        match (self.primary, self.replica) {
            (true, true) => "a peer that may be primary and replica",
            (true, false) => "a peer that may only be primary",
            (false, true) => "a peer that may only be replica",
            (false, false) => "a peer that may be nothing",
        }
    }
}

/// Whether the peer is what its pin allows.
///
/// # Errors
///
/// What it is instead.
pub fn compare_roles(
    allowed: PeerRoles,
    ours: &LocalState,
    theirs: &LocalState,
) -> Result<(), Refusal> {
    let what = if theirs.role == Role::Primary && !allowed.primary {
        "a primary".to_owned()
    } else if theirs.term.counter > ours.term.counter && !allowed.primary {
        format!("one that brings the higher term {}", theirs.term)
    } else if ours.role == Role::Primary && theirs.role != Role::Primary && !allowed.replica {
        "a replica".to_owned()
    } else {
        return Ok(());
    };
    Err(Refusal {
        found_by: FoundBy::Us,
        field: Field::Roles,
        ours: allowed.names().to_owned(),
        theirs: what,
    })
}

#[cfg(test)]
mod tests {
    use hn4::types::{NodeId, Term};

    use super::*;
    use crate::session::testing::state;

    const REPLICA_ONLY: PeerRoles = PeerRoles {
        primary: false,
        replica: true,
    };
    const PRIMARY_ONLY: PeerRoles = PeerRoles {
        primary: true,
        replica: false,
    };

    fn with(role: Role, term: u64) -> LocalState {
        LocalState {
            role,
            term: Term {
                counter: term,
                node: NodeId([3; 16]),
            },
            ..state(2)
        }
    }

    #[test]
    fn a_peer_that_may_only_be_replica_is_neither_primary_nor_brings_a_term() {
        for ours in [Role::Primary, Role::Replica, Role::Fenced] {
            let ours = with(ours, 5);
            let judge = |role, term| compare_roles(REPLICA_ONLY, &ours, &with(role, term)).is_ok();
            assert!(judge(Role::Replica, 5) && judge(Role::Replica, 4) && judge(Role::Fenced, 4));
            assert!(!judge(Role::Primary, 5) && !judge(Role::Primary, 4));
            assert!(!judge(Role::Replica, 6) && !judge(Role::Fenced, 6));
        }
    }

    #[test]
    fn a_peer_that_may_only_be_primary_is_not_fed_and_may_be_followed() {
        let judge = |ours, theirs, term| {
            compare_roles(PRIMARY_ONLY, &with(ours, 5), &with(theirs, term)).is_ok()
        };
        assert!(!judge(Role::Primary, Role::Replica, 5) && !judge(Role::Primary, Role::Fenced, 4));
        assert!(judge(Role::Primary, Role::Primary, 6) && judge(Role::Replica, Role::Primary, 6));
        assert!(judge(Role::Replica, Role::Replica, 6));
    }

    #[test]
    fn without_a_restriction_everything_is_allowed() {
        for ours in [Role::Primary, Role::Replica, Role::Fenced] {
            for theirs in [Role::Primary, Role::Replica, Role::Fenced] {
                let judged = compare_roles(PeerRoles::default(), &with(ours, 5), &with(theirs, 6));
                assert_eq!(judged, Ok(()));
            }
        }
    }
}
