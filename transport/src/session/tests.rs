//! Two sessions wired together, without sockets: orders, losses and lies.

mod packed;
mod random;
mod roles;
mod unfinished;

use std::collections::VecDeque;
use std::time::Duration;

use super::*;
use crate::wire::{FrameKind, FrameSealer, SessionKeys, Stream, StreamKeys};
use bytes::Bytes;
use hn4::types::{ChainHash, Epoch, NodeId, Term};

const STREAMS: [Stream; 2] = [Stream::Control, Stream::Data];

fn keys(is_first: bool) -> SessionKeys {
    let key = |stream: u8, from_first: bool| [stream * 2 + u8::from(from_first); 32];
    SessionKeys {
        control: StreamKeys {
            send: key(0, is_first),
            receive: key(0, !is_first),
        },
        data: StreamKeys {
            send: key(1, is_first),
            receive: key(1, !is_first),
        },
    }
}

/// A session and what has come out of it.
struct End {
    session: Session,
    outputs: Vec<Output>,
    /// Frames on the way to the other end, per stream.
    wire: [VecDeque<Bytes>; 2],
}

impl End {
    fn new(config: &Config, state: LocalState, is_first: bool) -> Self {
        let mut session = Session::new(config.clone(), state, Duration::ZERO);
        session.handle(
            Duration::ZERO,
            Event::Connected {
                keys: keys(is_first),
            },
        );
        Self {
            session,
            outputs: Vec::new(),
            wire: Default::default(),
        }
    }

    fn input(&mut self, input: Input) {
        self.session.handle(Duration::ZERO, Event::Daemon(input));
    }

    fn collect(&mut self, takes_outputs: bool) {
        for (stream, wire) in STREAMS.into_iter().zip(&mut self.wire) {
            while let Some(frame) = self.session.poll_transmit(stream) {
                wire.push_back(frame.to_bytes());
            }
        }
        while takes_outputs && let Some(output) = self.session.poll_output() {
            self.outputs.push(output);
        }
    }

    fn closed(&self) -> Option<&CloseReason> {
        match self.outputs.last() {
            Some(Output::Closed { reason }) => Some(reason),
            _ => None,
        }
    }

    fn has(&self, wanted: &Output) -> bool {
        self.outputs.contains(wanted)
    }
}

/// Two ends and the line between them.
struct Line {
    ends: [End; 2],
}

impl Line {
    fn new(first: LocalState, second: LocalState) -> Self {
        Self::with(&Config::default(), first, second)
    }

    fn with(config: &Config, first: LocalState, second: LocalState) -> Self {
        Self {
            ends: [
                End::new(config, first, true),
                End::new(config, second, false),
            ],
        }
    }

    /// Delivers one frame of the end `from` on a stream; false if there was none.
    fn deliver(&mut self, now: Duration, from: usize, stream: Stream) -> bool {
        let [first, second] = &mut self.ends;
        let (from, to) = if from == 0 {
            (first, second)
        } else {
            (second, first)
        };
        from.collect(true);
        if stream == Stream::Data && !to.session.accepts_data() {
            return false;
        }
        let Some(bytes) = from.wire[usize::from(stream == Stream::Data)].pop_front() else {
            return false;
        };
        to.session.handle(now, Event::Received { stream, bytes });
        to.collect(true);
        true
    }

    /// Delivers everything.
    fn settle(&mut self) {
        let ways = [
            (0, Stream::Control),
            (1, Stream::Control),
            (0, Stream::Data),
            (1, Stream::Data),
        ];
        while ways
            .iter()
            .any(|&(from, stream)| self.deliver(Duration::ZERO, from, stream))
        {}
    }
}

fn primary() -> LocalState {
    LocalState {
        role: Role::Primary,
        tip: (Epoch(100), ChainHash([1; 32])),
        ..testing::state(1)
    }
}

fn replica() -> LocalState {
    testing::state(2)
}

fn frame(epoch: u64) -> Bytes {
    let length = usize::try_from(epoch * 5_003 % 700_000).unwrap_or(0) + 1;
    Bytes::from(vec![epoch.to_le_bytes()[0]; length])
}

#[test]
fn hello_is_followed_by_a_subscription_from_the_replica_s_tip() {
    let mut line = Line::new(primary(), replica());
    line.settle();
    let [first, second] = &line.ends;
    let wanted = Output::Subscribe {
        tip: replica().tip,
        anchored: replica().anchored,
    };
    assert_eq!(first.outputs, [Output::PeerState(replica()), wanted]);
    assert_eq!(second.outputs, [Output::PeerState(primary())]);
}

#[test]
fn no_epoch_travels_before_credit_and_control_passes_all_the_same() {
    let mut line = Line::new(primary(), replica());
    line.settle();
    line.ends[0].input(Input::FeedOpened { from: Epoch(1) });
    line.ends[0].input(Input::SendEpoch {
        epoch: Epoch(1),
        frame: frame(1),
    });
    let (epoch, chain) = (Epoch(1), ChainHash([9; 32]));
    line.ends[0].input(Input::Anchored { epoch, chain });
    line.settle();
    let arrived = Output::EpochReceived {
        epoch: Epoch(1),
        frame: frame(1),
    };
    assert!(!line.ends[1].has(&arrived));
    assert!(line.ends[1].has(&Output::Anchored { epoch, chain }));
    line.ends[1].input(Input::Credit { bytes: 1 });
    line.settle();
    assert!(line.ends[0].has(&Output::PeerCredit { bytes: 1 }));
    assert!(
        line.ends[1].has(&arrived),
        "one message may overdraw the credit"
    );
    line.ends[0].input(Input::SendEpoch {
        epoch: Epoch(2),
        frame: frame(2),
    });
    line.settle();
    assert!(!line.ends[1].has(&Output::EpochReceived {
        epoch: Epoch(2),
        frame: frame(2)
    }));
}

#[test]
fn states_that_were_not_sent_yet_are_merged_and_credit_is_summed() {
    let mut line = Line::new(primary(), replica());
    for epoch in 1..=1000 {
        let epoch = Epoch(epoch);
        line.ends[1].input(Input::Ack(AckState {
            received: epoch,
            ..AckState::default()
        }));
        line.ends[1].input(Input::Credit { bytes: 10 });
    }
    line.settle();
    let ack = AckState {
        received: Epoch(1000),
        ..AckState::default()
    };
    assert!(line.ends[0].has(&Output::PeerAck(ack)));
    assert!(line.ends[0].has(&Output::PeerCredit { bytes: 10_000 }));
    assert_eq!(
        line.ends[0].outputs.len(),
        4,
        "hello, subscription, credit, ack"
    );
}

#[test]
fn at_most_the_window_is_unacknowledged_while_the_daemon_takes_nothing() {
    let config = Config::default();
    let mut line = Line::with(&config, primary(), replica());
    line.settle();
    line.ends[1].input(Input::Credit { bytes: 1 << 40 });
    line.settle();
    line.ends[0].input(Input::FeedOpened { from: Epoch(1) });
    for epoch in 1..=3000 {
        let input = Input::SendEpoch {
            epoch: Epoch(epoch),
            frame: Bytes::from_static(b"x"),
        };
        line.ends[0].input(input);
    }
    // Frames are written, but the other end's daemon takes nothing.
    line.ends[0].collect(true);
    assert_eq!(line.ends[0].wire[1].len(), config.data_window);
    let mut read = 0;
    while line.ends[1].session.accepts_data() {
        let bytes = line.ends[0].wire[1]
            .pop_front()
            .expect("the window is larger");
        let event = Event::Received {
            stream: Stream::Data,
            bytes,
        };
        line.ends[1].session.handle(Duration::ZERO, event);
        read += 1;
    }
    assert!(read < 100, "reading pauses while the daemon takes nothing");
    line.ends[0].collect(true);
    line.settle();
    let arrived = |output: &&Output| matches!(output, Output::EpochReceived { .. });
    assert_eq!(line.ends[1].outputs.iter().filter(arrived).count(), 3000);
}

#[test]
fn a_refused_feed_is_asked_for_again_after_the_log_was_cut() {
    let mut line = Line::new(primary(), replica());
    line.settle();
    let to = (Epoch(0), ChainHash([3; 32]));
    line.ends[0].input(Input::FeedRefused(FeedRefusal::Truncate { to }));
    line.settle();
    assert!(line.ends[1].has(&Output::Truncate { to }));
    let cut = LocalState {
        tip: to,
        ..replica()
    };
    line.ends[1].input(Input::LocalState(cut.clone()));
    line.settle();
    let again = Output::Subscribe {
        tip: to,
        anchored: cut.anchored,
    };
    assert_eq!(line.ends[0].outputs.last(), Some(&again));
}

#[test]
fn a_replica_adopts_a_higher_term_within_the_session_and_then_subscribes() {
    let term = Term {
        counter: 5,
        node: NodeId([1; 16]),
    };
    let leader = LocalState { term, ..primary() };
    let mut line = Line::new(leader.clone(), replica());
    line.settle();
    assert!(line.ends[1].has(&Output::HigherTerm { term }));
    let subscription = |output: &Output| matches!(output, Output::Subscribe { .. });
    assert!(
        !line.ends[0].outputs.iter().any(subscription),
        "not in an older term"
    );
    line.ends[1].input(Input::LocalState(LocalState { term, ..replica() }));
    line.settle();
    assert!(line.ends[0].outputs.iter().any(subscription));
    assert!(!line.ends[1].session.is_closed());
}

#[test]
fn a_primary_in_an_older_term_is_told() {
    let term = Term {
        counter: 9,
        node: NodeId([2; 16]),
    };
    let mut line = Line::new(primary(), LocalState { term, ..replica() });
    line.settle();
    assert!(line.ends[0].has(&Output::HigherTerm { term }));
}

#[test]
fn two_primaries_of_one_term_refuse_each_other() {
    let term = Term {
        counter: 1,
        node: NodeId([2; 16]),
    };
    let other = LocalState {
        term,
        role: Role::Primary,
        ..replica()
    };
    let mut line = Line::new(primary(), other);
    line.settle();
    for end in &line.ends {
        let fork = |output: &Output| match output {
            Output::Refused { reason } => reason.field == Field::Fork,
            _ => false,
        };
        assert!(end.outputs.iter().any(fork));
        assert_eq!(end.closed(), Some(&CloseReason::Refused));
    }
}

#[test]
fn a_silent_peer_is_given_up_in_time_and_a_talking_one_never() {
    let mut line = Line::new(primary(), replica());
    line.settle();
    let mut now = Duration::ZERO;
    for _ in 0..50 {
        let [first, second] = &mut line.ends;
        now = first
            .session
            .next_timeout()
            .min(second.session.next_timeout())
            .expect("open");
        first.session.handle_timeout(now);
        second.session.handle_timeout(now);
        while line.deliver(now, 0, Stream::Control) || line.deliver(now, 1, Stream::Control) {}
    }
    assert!(line.ends.iter().all(|end| end.session.is_established()));
    assert!(line.ends[0].session.round_trip().is_some());
    let silent_since = now;
    while let Some(at) = line.ends[0].session.next_timeout() {
        now = at;
        line.ends[0].session.handle_timeout(now);
    }
    line.ends[0].collect(true);
    assert_eq!(line.ends[0].closed(), Some(&CloseReason::HeartbeatTimeout));
    let config = Config::default();
    assert!(now - silent_since <= config.heartbeat_interval + config.heartbeat_timeout);
}

#[test]
fn who_never_says_hello_is_given_up() {
    let mut end = End::new(&Config::default(), primary(), true);
    let at = end.session.next_timeout().expect("a limit for hello");
    end.session.handle_timeout(at);
    end.collect(true);
    assert_eq!(end.closed(), Some(&CloseReason::HelloTimeout));
}

/// An established replica, and the sealers of a peer that may lie.
fn liar() -> (End, FrameSealer, FrameSealer) {
    let mut line = Line::new(primary(), replica());
    line.settle();
    line.ends[1].input(Input::Credit { bytes: 1 << 20 });
    let [_, end] = line.ends;
    let peer_keys = keys(true);
    let mut control = FrameSealer::new(Stream::Control, &peer_keys.control.send);
    // The hello was the peer's only control frame.
    control.seal(FrameKind::Control, false, b"", Bytes::new());
    (
        end,
        control,
        FrameSealer::new(Stream::Data, &peer_keys.data.send),
    )
}

#[test]
fn each_lie_ends_the_session_and_nothing_of_it_is_used() {
    use crate::wire::data::DataMessage;
    let chunk = |epoch, offset, total, length: usize| DataMessage::EpochChunk {
        epoch: Epoch(epoch),
        offset,
        total,
        bytes: vec![0; length].into(),
    };
    let feed = DataMessage::FeedBegin { from: Epoch(5) };
    let seed = DataMessage::SeedStart {
        from: primary().tip,
        log_offset: hn4::types::LogOffset(0),
        cursor_bytes: 0,
    };
    let lies: [(&str, Vec<DataMessage>); 8] = [
        ("epoch before a feed", vec![chunk(5, 0, 1, 1)]),
        (
            "epoch that does not follow",
            vec![feed.clone(), chunk(6, 0, 1, 1)],
        ),
        ("chunk in the middle", vec![feed.clone(), chunk(5, 1, 9, 1)]),
        (
            "chunk with a gap",
            vec![feed.clone(), chunk(5, 0, 9, 1), chunk(5, 2, 9, 1)],
        ),
        (
            "epoch that is too long",
            vec![feed.clone(), chunk(5, 0, 1 << 40, 1)],
        ),
        (
            "epoch that is not sent to its end",
            vec![feed.clone(), chunk(5, 0, 9, 1), feed],
        ),
        ("copy that was not asked for", vec![seed]),
        (
            "end of no copy",
            vec![DataMessage::SeedEnd {
                usable_after: Epoch(1),
            }],
        ),
    ];
    for (lie, messages) in lies {
        let (mut end, _, mut data) = liar();
        let before = end.outputs.len();
        for message in messages {
            let (head, body) = message.encode();
            let bytes = data.seal(FrameKind::Data, true, &head, body).to_bytes();
            end.session.handle(
                Duration::ZERO,
                Event::Received {
                    stream: Stream::Data,
                    bytes,
                },
            );
        }
        end.collect(true);
        assert!(
            matches!(end.closed(), Some(CloseReason::Protocol(_))),
            "{lie}"
        );
        let used =
            |output: &Output| matches!(output, Output::EpochReceived { .. } | Output::SeedPiece(_));
        assert!(!end.outputs[before..].iter().any(used), "{lie}");
    }
}

#[test]
fn who_sends_more_than_credit_is_thrown_out() {
    use crate::wire::data::DataMessage;
    let (mut end, _, mut data) = liar();
    let mut messages = vec![DataMessage::FeedBegin { from: Epoch(1) }];
    for epoch in 1..=10 {
        let bytes = vec![0; 200 << 10].into();
        let epoch = Epoch(epoch);
        messages.push(DataMessage::EpochChunk {
            epoch,
            offset: 0,
            total: 200 << 10,
            bytes,
        });
    }
    for message in messages {
        let (head, body) = message.encode();
        let bytes = data.seal(FrameKind::Data, true, &head, body).to_bytes();
        end.session.handle(
            Duration::ZERO,
            Event::Received {
                stream: Stream::Data,
                bytes,
            },
        );
    }
    end.collect(true);
    let Some(CloseReason::Protocol(what)) = end.closed() else {
        panic!("not thrown out")
    };
    assert!(what.contains("without credit"), "{what}");
    let arrived = |output: &&Output| matches!(output, Output::EpochReceived { .. });
    assert_eq!(
        end.outputs.iter().filter(arrived).count(),
        6,
        "1 MiB, and one overdrawn"
    );
}

#[test]
fn a_daemon_that_sends_out_of_order_is_told_and_the_peer_sees_nothing() {
    let mut line = Line::new(primary(), replica());
    line.settle();
    line.ends[1].input(Input::Credit { bytes: 1 << 20 });
    line.settle();
    line.ends[0].input(Input::FeedOpened { from: Epoch(1) });
    line.ends[0].input(Input::SendEpoch {
        epoch: Epoch(3),
        frame: frame(3),
    });
    line.settle();
    assert!(matches!(
        line.ends[0].closed(),
        Some(CloseReason::Misuse(_))
    ));
    let arrived = |output: &Output| matches!(output, Output::EpochReceived { .. });
    assert!(!line.ends[1].outputs.iter().any(arrived));
}

#[test]
fn what_has_changed_since_our_hello_is_said_before_anything_is_asked_for() {
    let surveying = LocalState {
        copy: CopyState::Surveying,
        resyncs: false,
        ..replica()
    };
    let surveyed = LocalState {
        copy: CopyState::Fresh,
        resyncs: true,
        ..replica()
    };
    let mut line = Line::new(primary(), surveying.clone());
    line.ends[1].collect(true);
    line.ends[1].input(Input::LocalState(surveyed.clone()));
    line.settle();
    let (cursor_bytes, from) = (0, replica().tip);
    // For the peer, a copy that is surveyed is one that holds nothing yet.
    let in_hello = LocalState {
        copy: CopyState::Fresh,
        ..surveying
    };
    let heard = [
        Output::PeerState(in_hello),
        Output::PeerState(surveyed),
        Output::SeedRequest { cursor_bytes, from },
    ];
    assert_eq!(line.ends[0].outputs, heard);
}

#[test]
fn a_state_that_says_what_our_hello_said_is_not_said_again() {
    let mut line = Line::new(primary(), replica());
    line.ends[1].collect(true);
    let ahead = LocalState {
        tip: (Epoch(3), ChainHash([3; 32])),
        ..replica()
    };
    line.ends[1].input(Input::LocalState(ahead));
    line.settle();
    let states = |output: &&Output| matches!(output, Output::PeerState(_));
    assert_eq!(line.ends[0].outputs.iter().filter(states).count(), 1);
}
