//! The network: when messages arrive, and when sessions begin and end.

use hn4_engine::core::event::PeerEvent;
use hn4_transport::session::Event;

use crate::link::{Lane, Message, peer_state};
use crate::proofs::Job;
use crate::world::{MS, What, World};

/// A side that hears nothing for so long ends the session.
const SILENCE_MS: u64 = 7000;

impl World {
    pub(crate) fn net_time(&mut self) -> u64 {
        let usual = self.plan.net_us * 1000;
        usual / 2 + self.rng.below(usual * 2)
    }

    pub(crate) fn post_peer(&mut self, link: usize, side: usize, event: PeerEvent) {
        let node = self.links[link].nodes[side];
        if let Some(peer) = self.peer_id(link, side) {
            self.post(node, hn4_engine::core::Event::Peer { peer, event });
        }
    }

    pub(crate) fn plan_connect(&mut self, link: usize) {
        if self.links[link].connecting {
            return;
        }
        self.links[link].connecting = true;
        let after = MS / 10 + self.rng.below(100 * MS);
        let at = (self.now + after).max(self.links[link].cut_until());
        self.plan_at(at, What::Connect { link });
    }

    pub(crate) fn connect(&mut self, link: usize) {
        self.links[link].connecting = false;
        let ends = self.links[link].nodes;
        let states = ends.map(|node| {
            let live = self.nodes[node].live.as_ref();
            live.map(|live| live.volume.copy_status())
        });
        let [Some(a), Some(b)] = states else {
            return; // Whoever starts connects again.
        };
        if !self.are_peers(link) {
            return; // One of them is turned away.
        }
        let closed = self.links[link]
            .sides
            .iter()
            .all(|side| side.open.is_none());
        if !closed || self.links[link].cut_until() > self.now {
            return self.plan_connect(link);
        }
        self.links[link].sessions += 1;
        let session = self.links[link].sessions;
        self.trace.note(self.now, None, || {
            format!("session {session} of {ends:?} opens")
        });
        if self.plan.real_sessions {
            return self.open_wire(link, session, [a, b]);
        }
        for (side, ours, theirs) in [(0, a, b), (1, b, a)] {
            self.links[link].sides[side].open(session, ours, theirs);
            self.post_peer(link, side, PeerEvent::Connected);
            self.post_peer(
                link,
                side,
                PeerEvent::State(peer_state(&theirs, self.plan.trees)),
            );
            self.prover_connected(link, side, theirs.term);
        }
        for side in 0..2 {
            self.ask(link, side);
            if let Some(term) = self.links[link].sides[side].higher_term() {
                // By the time it arrives the node may have heard of a higher one.
                let event = Message::Event(PeerEvent::HigherTerm(term));
                self.send(link, session, 1 - side, Lane::Control, event);
            }
        }
    }

    pub(crate) fn ask(&mut self, link: usize, side: usize) {
        if let Some(session) = self.links[link].sides[side].open
            && let Some(question) = self.links[link].sides[side].ask()
        {
            self.send(link, session, side, Lane::Control, Message::Event(question));
        }
    }

    /// When what is sent now arrives. A lane keeps its order, except for what is overtaken.
    pub(crate) fn arrival(
        &mut self,
        link: usize,
        side: usize,
        lane: Lane,
        bytes: u64,
        overtaken: bool,
    ) -> u64 {
        let after = self.net_time();
        let link = &mut self.links[link];
        let rate = link.slow.filter(|slow| slow.until > self.now);
        let transfer = rate.map_or(0, |slow| bytes * MS / slow.bytes_per_ms);
        let busy = &mut link.sides[1 - side].busy_until[lane as usize];
        // What cannot pass is sent again until it can.
        let start = self.now.max(link.deaf_until[1 - side]);
        let at = (start + after).max(*busy) + transfer;
        if overtaken {
            return at + 2 * after;
        }
        *busy = at;
        at
    }

    /// Sends from a side of a link to the other.
    pub(crate) fn send(
        &mut self,
        link: usize,
        session: u64,
        side: usize,
        lane: Lane,
        message: Message,
    ) {
        if self.links[link].sides[side].open != Some(session) {
            return;
        }
        let at = self.arrival(link, side, lane, message.bytes(), false);
        let side = 1 - side;
        if at > self.now + SILENCE_MS * MS {
            let after = SILENCE_MS * MS;
            return self.plan_in(
                after,
                What::SessionEnds {
                    link,
                    session,
                    side,
                },
            );
        }
        self.plan_at(
            at,
            What::Deliver {
                link,
                session,
                side,
                message: Box::new(message),
            },
        );
    }

    /// Whether something that was sent in a session still finds it.
    pub(crate) fn reaches(&mut self, link: usize, session: u64, side: usize) -> bool {
        if self.links[link].sides[side].open != Some(session) {
            return false;
        }
        if self.links[link].cut_until > self.now {
            self.end_session(link, session, side);
            return false;
        }
        true
    }

    pub(crate) fn deliver(&mut self, link: usize, session: u64, side: usize, message: Message) {
        if !self.reaches(link, session, side) {
            return;
        }
        match message {
            Message::Event(event) => {
                if matches!(event, PeerEvent::SeedStart(_) | PeerEvent::FeedOpened(_)) {
                    self.prover_fed(link, side);
                }
                self.post_peer(link, side, event);
            }
            Message::Proof(bytes) => {
                self.prover_hears(link, side, |peer| Job::Message(peer, bytes));
            }
            Message::Refused(refusal) => {
                let event = self.links[link].sides[side].refused(refusal);
                self.post_peer(link, side, event);
                self.ask(link, side);
            }
            Message::State(status) => {
                if self.links[link].sides[side].peer_changed(status) {
                    self.post_peer(
                        link,
                        side,
                        PeerEvent::State(peer_state(&status, self.plan.trees)),
                    );
                    self.ask(link, side);
                } else {
                    self.end_session(link, session, side);
                }
            }
        }
    }

    /// The prover follows the primary that feeds the copy.
    pub(crate) fn prover_fed(&mut self, link: usize, side: usize) {
        if self.links[link].sides[side].is_fed_by_primary() {
            self.prover_hears(link, side, Job::FedBy);
        }
    }

    /// Something of a session is for the prover.
    pub(crate) fn prover_hears(&mut self, link: usize, side: usize, job: impl FnOnce(u8) -> Job) {
        let node = self.links[link].nodes[side];
        if let Some(peer) = self.peer_id(link, side) {
            self.prove(node, job(peer.0));
        }
    }

    /// A session ends at a side; the other notices a little later.
    pub(crate) fn end_session(&mut self, link: usize, session: u64, side: usize) {
        if self.links[link].sides[side].open != Some(session) {
            return;
        }
        if self.links[link].sides[side].wire.is_some() {
            let why = "the connection was reset".to_owned();
            return self.wire_event(link, side, Event::Disconnected { why });
        }
        self.post_peer(link, side, PeerEvent::Disconnected);
        self.side_closed(link, session, side);
    }

    /// A side has no session any more.
    pub(crate) fn side_closed(&mut self, link: usize, session: u64, side: usize) {
        self.links[link].sides[side].close();
        self.stats.disconnects += 1;
        self.prover_hears(link, side, Job::Disconnected);
        if self.links[link].sides[1 - side].open == Some(session) {
            let after = self.net_time() + if self.rng.one_in(3) { 20 * MS } else { 0 };
            let busy = self.links[link].sides[1 - side].busy_until[Lane::Control as usize];
            let at = (self.now + after).max(busy + 1);
            let side = 1 - side;
            self.plan_at(
                at,
                What::SessionEnds {
                    link,
                    session,
                    side,
                },
            );
        }
        self.plan_connect(link);
    }

    /// The sessions of a node end.
    pub(crate) fn node_left(&mut self, node: usize) {
        for link in 0..self.links.len() {
            let Some(side) = self.links[link].side_of(node) else {
                continue;
            };
            if let Some(session) = self.links[link].sides[side].open {
                self.links[link].sides[side].close();
                let after = self.rng.below(50 * MS);
                let side = 1 - side;
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
    }
}
