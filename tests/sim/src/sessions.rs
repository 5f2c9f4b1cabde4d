//! Sessions in the world: opening, what travels, ending. What a side knows and asks is in `link`.

use hn4_engine::core::event::PeerEvent;

use crate::link::{Lane, Message, peer_state};
use crate::proofs::Job;
use crate::world::{MS, What, World};

impl World {
    pub(crate) fn plan_connect(&mut self, link: usize) {
        if self.links[link].connecting {
            return;
        }
        self.links[link].connecting = true;
        let after = MS / 10 + self.rng.below(100 * MS);
        let at = (self.now + after).max(self.links[link].cut_until);
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
        let closed = self.links[link]
            .sides
            .iter()
            .all(|side| side.open.is_none());
        if !closed || self.links[link].cut_until > self.now {
            return self.plan_connect(link);
        }
        self.links[link].sessions += 1;
        let session = self.links[link].sessions;
        self.trace.note(self.now, None, || {
            format!("session {session} of {ends:?} opens")
        });
        for (side, ours, theirs) in [(0, a, b), (1, b, a)] {
            self.links[link].sides[side].open(session, ours, theirs);
            self.post_peer(link, side, PeerEvent::Connected);
            self.post_peer(link, side, PeerEvent::State(peer_state(&theirs)));
            self.prover_connected(link, side, theirs.term);
            if let Some(term) = self.links[link].sides[side].higher_term() {
                let event = PeerEvent::HigherTerm(term);
                self.post_peer(link, side, event);
            }
        }
        for side in 0..2 {
            self.ask(link, side);
        }
    }

    pub(crate) fn ask(&mut self, link: usize, side: usize) {
        if let Some(session) = self.links[link].sides[side].open
            && let Some(question) = self.links[link].sides[side].ask()
        {
            self.send(link, session, side, Lane::Control, Message::Event(question));
        }
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
        let after = self.net_time();
        let busy = &mut self.links[link].sides[1 - side].busy_until[lane as usize];
        let at = (self.now + after).max(*busy);
        *busy = at;
        let side = 1 - side;
        self.plan_at(
            at,
            What::Deliver {
                link,
                session,
                side,
                message,
            },
        );
    }

    pub(crate) fn deliver(&mut self, link: usize, session: u64, side: usize, message: Message) {
        if self.links[link].sides[side].open != Some(session) {
            return;
        }
        if self.links[link].cut_until > self.now {
            return self.end_session(link, session, side);
        }
        match message {
            Message::Event(event) => {
                if matches!(event, PeerEvent::SeedStart(_)) {
                    self.prover_fed(link, side);
                }
                self.post_peer(link, side, event);
            }
            Message::FeedOpened => self.prover_fed(link, side),
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
                    self.post_peer(link, side, PeerEvent::State(peer_state(&status)));
                    self.ask(link, side);
                } else {
                    self.end_session(link, session, side);
                }
            }
        }
    }

    /// The prover follows the primary that feeds the copy.
    fn prover_fed(&mut self, link: usize, side: usize) {
        if self.links[link].sides[side].is_fed_by_primary() {
            self.prover_hears(link, side, Job::FedBy);
        }
    }

    fn prover_hears(&mut self, link: usize, side: usize, job: impl FnOnce(u8) -> Job) {
        let (node, peer) = (self.links[link].nodes[side], self.peer_id(link, side));
        self.prove(node, job(peer.0));
    }

    /// A session ends at a side; the other notices a little later.
    pub(crate) fn end_session(&mut self, link: usize, session: u64, side: usize) {
        if self.links[link].sides[side].open != Some(session) {
            return;
        }
        self.links[link].sides[side].open = None;
        self.stats.disconnects += 1;
        self.prover_hears(link, side, Job::Disconnected);
        self.post_peer(link, side, PeerEvent::Disconnected);
        if self.links[link].sides[1 - side].open == Some(session) {
            let after = self.net_time() + if self.rng.one_in(3) { 20 * MS } else { 0 };
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
        self.plan_connect(link);
    }
}
