//! What a peer gets that is more than its pin allows: nothing.

use super::*;
use crate::session::roles::PeerRoles;
use crate::wire::control::ControlMessage;

fn allowing(primary: bool, replica: bool) -> Config {
    Config {
        peer_roles: PeerRoles { primary, replica },
        ..Config::default()
    }
}

/// We are the first end and allow the other only so much; it allows everything.
fn line(config: &Config, ours: LocalState, theirs: LocalState) -> Line {
    Line {
        ends: [
            End::new(config, ours, true),
            End::new(&Config::default(), theirs, false),
        ],
    }
}

fn term(counter: u64, node: u8) -> Term {
    Term {
        counter,
        node: NodeId([node; 16]),
    }
}

fn is_refused_for_its_role(output: &Output) -> bool {
    matches!(output, Output::Refused { reason } if reason.field == Field::Roles)
}

/// Both ends know why, and nothing of the hello has come through.
fn assert_refused(line: &mut Line) {
    line.settle();
    for end in &line.ends {
        assert!(
            end.outputs.iter().any(is_refused_for_its_role),
            "{:?}",
            end.outputs
        );
        assert_eq!(end.closed(), Some(&CloseReason::Refused));
    }
    let ours = &line.ends[0].outputs;
    assert_eq!(ours.len(), 2, "only that, and the end: {ours:?}");
}

#[test]
fn a_replica_that_calls_itself_primary_is_refused_and_its_term_is_not_heard() {
    for ours in [primary(), testing::state(1)] {
        let theirs = LocalState {
            role: Role::Primary,
            term: term(7, 2),
            ..replica()
        };
        assert_refused(&mut line(&allowing(false, true), ours, theirs));
    }
}

#[test]
fn a_replica_that_brings_a_higher_term_is_refused_whosever_it_is() {
    for holder in [2, 3] {
        let theirs = LocalState {
            term: term(7, holder),
            ..replica()
        };
        assert_refused(&mut line(&allowing(false, true), primary(), theirs));
    }
}

#[test]
fn a_replica_that_speaks_of_a_term_or_wants_to_take_over_in_a_session_ends_it() {
    let lies = [
        ControlMessage::TermNotice(term(9, 2)),
        ControlMessage::StepDown,
        ControlMessage::Anchored((Epoch(101), ChainHash([3; 32]))),
    ];
    for lie in lies {
        let mut line = line(&allowing(false, true), primary(), replica());
        line.settle();
        let before = line.ends[0].outputs.clone();
        line.ends[1].session.ask_peer(lie);
        line.settle();
        let after = &line.ends[0].outputs[before.len()..];
        assert!(
            matches!(
                after,
                [Output::Closed {
                    reason: CloseReason::Protocol(_)
                }]
            ),
            "{after:?}"
        );
    }
}

#[test]
fn an_allowed_replica_follows_and_a_peer_that_may_only_be_primary_is_not_fed() {
    let mut line_a = line(&allowing(false, true), primary(), replica());
    line_a.settle();
    let subscribes = |output: &Output| matches!(output, Output::Subscribe { .. });
    assert!(line_a.ends[0].outputs.iter().any(subscribes));
    assert_refused(&mut line(&allowing(true, false), primary(), replica()));
    // A returning primary hears of our term before it is refused as what it then is.
    let theirs = LocalState {
        role: Role::Primary,
        ..replica()
    };
    let ours = LocalState {
        term: term(5, 1),
        ..primary()
    };
    let mut line_b = line(&allowing(true, false), ours, theirs);
    line_b.settle();
    let term = term(5, 1);
    assert!(line_b.ends[1].has(&Output::HigherTerm { term }));
}
