//! The transport's own sessions between nodes: frames on a wire that loses, doubles, reorders and
//! corrupts them.
//!
//! What the daemon does between shard and session is done by its own `translate`. A frame that was
//! tampered with must end the session and nothing else.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hn4_engine::core::event::{CopyStatus, PeerEvent};
use hn4_proof::scxq2::Shipment;
use hn4_proof::scxq2::train::Renewal;
use hn4_transport::session::{Config, Event, Input, LocalState, Output, Role, Session, capability};
use hn4_transport::wire::{SessionKeys, Stream, StreamKeys};

use crate::faults::Fault;
use crate::link::Lane;
use crate::node::{identity, node_id};
use crate::proofs::Job;
use crate::translate;
use crate::world::{MS, What, World};

/// Runs are short, so dictionaries are made and renewed early.
const DICTIONARIES: Renewal = Renewal {
    sample_messages: 8,
    every_messages: 100,
    worse_percent: 25,
    least_messages: 50,
};
/// One session in so many gets a dictionary.
const TRAINED_SESSIONS: u64 = 4;
/// What hello says of the largest epoch: more than any run has.
const MAX_EPOCH_BYTES: u64 = 64 << 20;

fn keys(first: bool, session: u64) -> SessionKeys {
    let key = |stream: u8, from_first: bool| {
        let mut key = [stream * 2 + u8::from(from_first); 32];
        key[..8].copy_from_slice(&session.to_le_bytes());
        key
    };
    SessionKeys {
        control: StreamKeys {
            send: key(0, first),
            receive: key(0, !first),
        },
        data: StreamKeys {
            send: key(1, first),
            receive: key(1, !first),
        },
    }
}

fn lane(stream: Stream) -> Lane {
    match stream {
        Stream::Control => Lane::Control,
        Stream::Data => Lane::Data,
    }
}

impl World {
    fn wire_now(&self) -> Duration {
        Duration::from_nanos(self.now)
    }

    /// What hello says of a node.
    pub(crate) fn local_state(&self, node: usize, status: &CopyStatus) -> LocalState {
        let identity = identity(&self.plan);
        let proves = self.plan.proves;
        LocalState {
            resyncs: self.plan.trees && status.may_keep(),
            ..translate::local_state(&identity, node_id(node), MAX_EPOCH_BYTES, proves, status)
        }
    }

    /// Both sides of a link say hello.
    pub(crate) fn open_wire(&mut self, link: usize, session: u64, states: [CopyStatus; 2]) {
        self.stats.real_sessions += 1;
        let now = self.wire_now();
        for (side, status) in states.iter().enumerate() {
            let node = self.links[link].nodes[side];
            let config = Config {
                chunk_bytes: 16 << 10,
                capabilities: capability::offered(self.plan.scxq2),
                dictionaries: DICTIONARIES,
                ..Config::default()
            };
            let mut wire = Session::new(config, self.local_state(node, status), now);
            let keys = keys(side == 0, session);
            wire.handle(now, Event::Connected { keys });
            self.links[link].sides[side].open_wire(session, wire);
        }
        for side in 0..2 {
            self.pump(link, side);
        }
    }

    /// The core, or what stands for its daemon, has something for a session.
    pub(crate) fn wire_input(&mut self, link: usize, side: usize, input: Input) {
        self.wire_event(link, side, Event::Daemon(input));
    }

    /// Something happened to a session.
    pub(crate) fn wire_event(&mut self, link: usize, side: usize, event: Event) {
        let now = self.wire_now();
        if let Some(wire) = &mut self.links[link].sides[side].wire {
            wire.handle(now, event);
            self.pump(link, side);
        }
    }

    /// Time has passed for a session.
    pub(crate) fn wire_timeout(&mut self, link: usize, session: u64, side: usize) {
        let now = self.wire_now();
        let end = &mut self.links[link].sides[side];
        if end.open == Some(session)
            && let Some(wire) = &mut end.wire
        {
            end.wake_at = None;
            wire.handle_timeout(now);
            self.pump(link, side);
        }
    }

    /// Carries out everything that a session wants.
    fn pump(&mut self, link: usize, side: usize) {
        while let Some(wire) = &mut self.links[link].sides[side].wire {
            if let Some(frame) = wire.poll_transmit(Stream::Control) {
                self.transmit(link, side, Stream::Control, frame.to_bytes());
            } else if let Some(output) = wire.poll_output() {
                self.session_said(link, side, output);
            } else if let Some(frame) = wire.poll_transmit(Stream::Data) {
                self.transmit(link, side, Stream::Data, frame.to_bytes());
            } else if let Some(samples) = wire.take_samples() {
                if !self.trains(link, side) {
                    continue;
                }
                // Few samples may be too alike to be trained from.
                let made = samples.train().and_then(|made| Shipment::new(made, None));
                if let Ok(shipment) = made
                    && let Some(wire) = &mut self.links[link].sides[side].wire
                {
                    self.stats.dictionaries += 1;
                    let event = Event::Dictionary(Arc::new(shipment));
                    wire.handle(Duration::from_nanos(self.now), event);
                }
            } else {
                break;
            }
        }
        let end = &mut self.links[link].sides[side];
        let Some(session) = end.open else {
            return;
        };
        let wake = end.wire.as_ref().and_then(Session::next_timeout);
        if let Some(wake) = wake {
            let at = u64::try_from(wake.as_nanos()).unwrap_or(u64::MAX);
            let at = at.max(self.now);
            if end.wake_at.is_none_or(|planned| planned > at) {
                end.wake_at = Some(at);
                self.plan_at(
                    at,
                    What::WireTimer {
                        link,
                        session,
                        side,
                    },
                );
            }
        }
    }

    /// Training costs as much as half of the rest of a run: some sessions never hear of a
    /// dictionary, as where samples are too alike.
    fn trains(&self, link: usize, side: usize) -> bool {
        let session = self.links[link].sides[side].open;
        session.is_some_and(|session| session.is_multiple_of(TRAINED_SESSIONS))
    }

    fn session_said(&mut self, link: usize, side: usize, output: Output) {
        let end = &mut self.links[link].sides[side];
        if let Output::PeerState(state) = &output
            && !std::mem::replace(&mut end.greeted, true)
        {
            end.primary_says_hello = state.role == Role::Primary;
            let term = state.term;
            self.prover_connected(link, side, term);
            self.post_peer(link, side, PeerEvent::Connected);
        }
        if matches!(output, Output::SeedStart { .. } | Output::FeedOpened { .. }) {
            self.prover_fed(link, side);
        }
        let event = match output {
            Output::Proof(bytes) => {
                return self.prover_hears(link, side, |peer| Job::Message(peer, bytes.into()));
            }
            Output::Closed { reason } => {
                let node = self.links[link].nodes[side];
                self.trace.note(self.now, Some(node), || {
                    format!("   session closed: {reason}")
                });
                return self.wire_closed(link, side);
            }
            output => match translate::event(output) {
                Some(event) => event,
                None => return,
            },
        };
        self.post_peer(link, side, event);
    }

    fn wire_closed(&mut self, link: usize, side: usize) {
        // Its last words are on their way before the connection goes.
        while let Some(wire) = &mut self.links[link].sides[side].wire
            && let Some(frame) = wire.poll_transmit(Stream::Control)
        {
            self.transmit(link, side, Stream::Control, frame.to_bytes());
        }
        let end = &mut self.links[link].sides[side];
        end.wire = None;
        let greeted = end.greeted;
        if let Some(session) = end.open {
            if greeted {
                self.post_peer(link, side, PeerEvent::Disconnected);
            }
            self.side_closed(link, session, side);
        }
    }

    /// A frame goes on its way, or what is made of it does.
    fn transmit(&mut self, link: usize, side: usize, stream: Stream, frame: Bytes) {
        let damaged = !self.quiet && self.rng.one_in(self.plan.frame_damage);
        if !damaged {
            return self.put_on_wire(link, side, stream, frame, false);
        }
        let fault = self.rng.pick(&[
            Fault::LostFrame,
            Fault::DoubledFrame,
            Fault::OvertakenFrame,
            Fault::CorruptFrame,
        ]);
        if !self.fault(fault, None) {
            return self.put_on_wire(link, side, stream, frame, false);
        }
        match fault {
            // A stream that lost something goes no further: the connection ends sooner or later.
            Fault::LostFrame => {
                if let Some(session) = self.links[link].sides[side].open {
                    let after = self.rng.below(2000 * MS);
                    self.plan_in(
                        after,
                        What::SessionEnds {
                            link,
                            session,
                            side,
                        },
                    );
                }
            }
            Fault::DoubledFrame => {
                self.put_on_wire(link, side, stream, frame.clone(), false);
                self.put_on_wire(link, side, stream, frame, false);
            }
            Fault::OvertakenFrame => self.put_on_wire(link, side, stream, frame, true),
            _ => {
                let mut bytes = frame.to_vec();
                let at = self.rng.index(bytes.len());
                let bit = self.rng.below(8);
                bytes[at] ^= 1 << bit;
                self.put_on_wire(link, side, stream, bytes.into(), false);
            }
        }
    }

    fn put_on_wire(
        &mut self,
        link: usize,
        side: usize,
        stream: Stream,
        bytes: Bytes,
        overtaken: bool,
    ) {
        let Some(session) = self.links[link].sides[side].open else {
            return;
        };
        let length = bytes.len() as u64;
        let at = self.arrival(link, side, lane(stream), length, overtaken);
        let side = 1 - side;
        self.plan_at(
            at,
            What::WireBytes {
                link,
                session,
                side,
                stream,
                bytes,
            },
        );
    }
}
