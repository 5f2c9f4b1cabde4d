//! Who is a peer of whom: the nodes' configurations, and the operator who changes them while the
//! volume runs.
//!
//! A change is a set of members that is wanted. The operator brings it to one node after the other,
//! in the order that OPERATIONS.md asks for, and tries again what a node refuses or forgets when it
//! crashes. Whatever happens meanwhile, this must stay true, or n - k + 1 answers do not tell
//! enough:
//!
//! **Invariant:** every member knows each peer on which a node that may be primary counts. So a
//! member hears of a new peer before a primary does, forgets one that leaves after every primary
//! has, and is promoted only if all the others know its own peers, and if it knows everybody whom a
//! primary may have counted on and has not let go.
//!
//! Places are dealt out as the daemon's `seats` do it: whoever stays keeps its place.

use hn4::log::Role;
use hn4::types::Epoch;
use hn4_engine::core::event::{Control, PeerId, RequestId, Tip};
use hn4_engine::core::{AckMode, LagPolicy, MAX_PEERS, PeerSet, Place};

use crate::faults::Fault;
use crate::node::Node;
use crate::world::{Outcome, Violation, World, broken};

/// A node was asked to take over other peers.
#[derive(Clone, Debug)]
struct Asked {
    node: usize,
    id: RequestId,
    members: Vec<usize>,
    seats: Vec<Option<usize>>,
    /// Loss is accepted.
    accepts: bool,
}

/// Who belongs to the volume.
#[derive(Debug, Default)]
pub(crate) struct Membership {
    /// Who is wanted.
    wanted: Vec<usize>,
    /// Who was, before the change that is under way.
    before: Vec<usize>,
    asked: Option<Asked>,
    /// A primary has seen to it that nothing is lost by letting go who leaves.
    agreed: bool,
    /// Nodes that are switched off for good.
    gone: Vec<usize>,
}

/// How a node was seen when it took note of a change that it was asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Leaving {
    /// Who leaves it.
    pub(crate) nodes: Vec<usize>,
    /// What those that stay must have.
    upto: Tip,
}

/// Peers of a node at the start: everybody else, in order.
#[must_use]
pub(crate) fn others(members: &[usize], node: usize) -> Vec<usize> {
    let mut others = members.to_vec();
    others.retain(|&other| other != node);
    others
}

/// Where everybody is to sit, and what that means for each place.
fn plan(
    seats: &[Option<usize>],
    members: &[usize],
    lag: LagPolicy,
) -> (Vec<Option<usize>>, [Place; MAX_PEERS]) {
    let mut places = [Place::Empty; MAX_PEERS];
    let mut next = vec![None; MAX_PEERS];
    for (index, seat) in seats.iter().enumerate() {
        if seat.is_some_and(|peer| members.contains(&peer)) {
            (places[index], next[index]) = (Place::Kept(lag), *seat);
        }
    }
    for &peer in members {
        if !next.contains(&Some(peer))
            && let Some(index) = next.iter().position(Option::is_none)
        {
            (places[index], next[index]) = (Place::New(lag), Some(peer));
        }
    }
    (next, places)
}

impl Node {
    /// Who its daemon talks to, or would if it ran.
    fn peers(&self) -> Vec<usize> {
        match &self.live {
            Some(_) => self.seats.iter().copied().flatten().collect(),
            None => self.members.clone(),
        }
    }

    fn knows(&self, peer: usize) -> bool {
        match &self.live {
            Some(_) => self.seats.contains(&Some(peer)),
            None => self.members.contains(&peer),
        }
    }

    /// How many peers it has.
    pub(crate) fn peer_count(&self) -> usize {
        match &self.live {
            Some(_) => self.seats.iter().flatten().count(),
            None => self.members.len(),
        }
    }

    /// Whether its acknowledgements count at this node.
    pub(crate) fn counts(&self, peer: usize) -> bool {
        self.knows(peer) && !self.leaving.nodes.contains(&peer)
    }

    /// Whether it surely takes no writes.
    fn is_replica(&self) -> bool {
        self.live.as_ref().is_some_and(|live| {
            let follows = matches!(live.volume.role(), Role::Replica | Role::Fenced);
            follows && live.volume.claimed_role() != Role::Primary
        })
    }
}

impl World {
    /// Everybody who is there at the start.
    pub(crate) fn found(&mut self) {
        let members: Vec<usize> = (0..self.plan.members).collect();
        for &node in &members {
            self.nodes[node].members = others(&members, node);
        }
        self.membership.before.clone_from(&members);
        self.membership.wanted = members;
    }

    pub(crate) fn is_member(&self, node: usize) -> bool {
        self.membership.wanted.contains(&node)
    }

    /// Whether a node never runs again.
    pub(crate) fn is_gone(&self, node: usize) -> bool {
        self.membership.gone.contains(&node)
    }

    /// Whether both ends of a link have each other in their configurations.
    pub(crate) fn are_peers(&self, link: usize) -> bool {
        let [a, b] = self.links[link].nodes;
        self.nodes[a].knows(b) && self.nodes[b].knows(a)
    }

    /// Members, and those that are about to be no more.
    fn involved(&self) -> Vec<usize> {
        let Membership { wanted, before, .. } = &self.membership;
        let mut all = wanted.clone();
        all.extend(before.iter().filter(|node| !wanted.contains(node)));
        all
    }

    /// Whether a node may count acknowledgements, now or when it is back.
    fn may_lead(&self, node: usize) -> bool {
        !self.nodes[node].is_replica() || self.operator.promoted() == Some(node)
    }

    /// Whether a promotion of a node keeps the invariant.
    pub(crate) fn may_be_promoted(&self, node: usize) -> bool {
        let knows = |at: usize, peer: usize| at == peer || self.nodes[at].knows(peer);
        let peers = self.nodes[node].peers();
        let known = |&other: &usize| peers.iter().all(|&peer| knows(other, peer));
        let mut leaders = self.involved();
        leaders.retain(|&other| other != node && self.may_lead(other));
        let counted = |&leader: &usize| {
            let peers = self.nodes[leader].peers();
            peers.iter().all(|&peer| knows(node, peer))
        };
        // A primary that has stepped down counted on those that were to leave.
        let Membership { before, agreed, .. } = &self.membership;
        self.is_member(node)
            && (*agreed || before.iter().all(|&peer| knows(node, peer)))
            && others(&self.membership.wanted, node).iter().all(known)
            && leaders.iter().all(counted)
    }

    /// The operator wants other members, if nothing speaks against it.
    pub(crate) fn change_members(&mut self) {
        let Some(primary) = self.primary().filter(|_| self.is_settled()) else {
            return self.operator.not_yet();
        };
        let wanted = self.membership.wanted.clone();
        let outside = |node: &usize| !wanted.contains(node) && !self.is_gone(*node);
        let outside: Vec<usize> = (0..self.nodes.len()).filter(outside).collect();
        let free = |node: &usize| *node != primary && self.operator.promoted() != Some(*node);
        let follows = |node: &usize| {
            let standing = self.nodes[*node].standing;
            standing.is_some_and(|(role, ..)| role == Role::Replica)
        };
        let leave = wanted.iter().copied();
        let leave: Vec<usize> = leave.filter(|node| free(node) && follows(node)).collect();
        let least = match self.plan.ack_mode {
            AckMode::Async => 1,
            AckMode::Received | AckMode::Durable => 1 + self.plan.ack_peers,
        };
        let (join, goes) = (self.rng.one_in(2), self.rng.one_in(2));
        let comes = Some(&outside).filter(|nodes| !nodes.is_empty());
        let leaves = Some(&leave).filter(|nodes| !nodes.is_empty());
        let (comes, leaves) = match (comes, leaves) {
            (Some(comes), Some(leaves)) if goes => (Some(comes), Some(leaves)),
            (Some(comes), _) if join || wanted.len() <= least => (Some(comes), None),
            (_, Some(leaves)) if wanted.len() > least => (None, Some(leaves)),
            _ => return self.operator.not_yet(),
        };
        let comes = comes.map(|nodes| self.rng.pick(nodes));
        let leaves = leaves.map(|nodes| self.rng.pick(nodes));
        let fault = match (comes, leaves) {
            (Some(_), Some(_)) => Fault::ReplacePeer,
            (Some(_), None) => Fault::AddPeer,
            _ => Fault::RemovePeer,
        };
        if self.fault(fault, comes.or(leaves)) {
            self.want(comes, leaves);
        }
    }

    /// No change of members is under way.
    pub(crate) fn is_settled(&self) -> bool {
        self.membership.before == self.membership.wanted
    }

    fn want(&mut self, comes: Option<usize>, leaves: Option<usize>) {
        self.membership.before.clone_from(&self.membership.wanted);
        self.membership.agreed = false;
        self.membership.wanted.extend(comes);
        self.membership.wanted.retain(|&node| Some(node) != leaves);
        self.trace.note(self.now, None, || {
            format!("WANTED {comes:?} for {leaves:?}")
        });
        let Some(node) = comes else {
            return;
        };
        // It may come back with what it had, if that is a replica's.
        let anew = !self.nodes[node].is_replica() || self.rng.one_in(2);
        if anew {
            let mut known = self.involved();
            known.retain(|&other| other != node);
            self.wipe(node);
            self.nodes[node].members = known;
        }
    }

    /// The operator goes on with what is wanted.
    pub(crate) fn maintain_members(&mut self) -> Outcome {
        if !self.plan.regroups {
            return Ok(());
        }
        if self.quiet && self.is_settled() {
            self.settle_outsiders();
        }
        let wait = !self.quiet && !self.rng.one_in(4);
        if self.is_settled() || self.membership.asked.is_some() || wait {
            return Ok(());
        }
        let members = self.membership.wanted.clone();
        let mut order = members.clone();
        // Whoever may lead is last.
        order.sort_by_key(|&node| self.may_lead(node));
        for node in order {
            let next = self.next_peers(node);
            if self.nodes[node]
                .peers()
                .iter()
                .all(|peer| next.contains(peer))
                && next.iter().all(|&peer| self.nodes[node].knows(peer))
            {
                continue;
            }
            if self.nodes[node].live.is_none() {
                // Nobody checks anything then, so nobody is removed.
                if next.iter().all(|&peer| self.nodes[node].knows(peer)) {
                    continue;
                }
                self.nodes[node].members = next;
                return Ok(());
            }
            self.ask_for_peers(node, next);
            return self.work_inbox();
        }
        let done = members.iter().all(|&node| {
            let wanted = others(&members, node);
            let peers = self.nodes[node].peers();
            peers.len() == wanted.len() && wanted.iter().all(|peer| peers.contains(peer))
        });
        if done {
            self.membership.before = members;
            self.stats.regrouped += 1;
        }
        Ok(())
    }

    /// The peers that a node may be given now.
    fn next_peers(&self, node: usize) -> Vec<usize> {
        let wanted = others(&self.membership.wanted, node);
        let now = self.nodes[node].peers();
        if self.may_lead(node) {
            let all_know = wanted.iter().all(|&other| {
                let rest = others(&self.membership.wanted, other);
                rest.iter().all(|&peer| self.nodes[other].knows(peer))
            });
            let removes = self.nodes[node].live.is_some();
            return match (all_know, removes) {
                (false, _) => now,
                (true, true) => wanted,
                (true, false) => {
                    let fresh = wanted.into_iter().filter(|peer| !now.contains(peer));
                    now.iter().copied().chain(fresh).collect()
                }
            };
        }
        let mut next = now;
        if !self.membership.agreed && self.primary().is_none() {
            // Whoever is promoted next may still count on those that were to leave.
            let before = &self.membership.before;
            let missing = before
                .iter()
                .filter(|peer| **peer != node && !next.contains(peer));
            let missing: Vec<usize> = missing.copied().collect();
            next.extend(missing);
        }
        let fresh = wanted.iter().filter(|peer| !next.contains(peer));
        let fresh: Vec<usize> = fresh.copied().collect();
        next.extend(fresh);
        let agreed = self.membership.agreed || self.others_have_all();
        let counted = |peer: usize| {
            let mut all = self.involved().into_iter();
            all.any(|other| {
                other != node
                    && other != peer
                    && self.may_lead(other)
                    && self.nodes[other].knows(peer)
            })
        };
        next.retain(|&peer| wanted.contains(&peer) || !agreed || counted(peer));
        next
    }

    /// What the status of a primary shows when enough of its peers have everything.
    fn others_have_all(&self) -> bool {
        let Some(primary) = self.primary() else {
            return false;
        };
        let Some(tip) = self.nodes[primary].live.as_ref().map(|live| live.tip) else {
            return false;
        };
        self.holders(primary, tip) >= self.plan.ack_peers || self.plan.ack_mode == AckMode::Async
    }

    /// How many of the peers on which a node counts had this on their medium.
    pub(crate) fn holders(&self, node: usize, place: Tip) -> usize {
        let counts = |other: &&Node| self.nodes[node].counts(other.index);
        let holds = |other: &&Node| {
            let mut durable = other.durable.iter();
            durable.any(|&tip| self.oracle.holds(tip, place))
        };
        self.nodes.iter().filter(counts).filter(holds).count()
    }

    fn ask_for_peers(&mut self, node: usize, members: Vec<usize>) {
        let (seats, places) = plan(&self.nodes[node].seats, &members, self.plan.lag);
        let removes = self.nodes[node]
            .peers()
            .iter()
            .any(|peer| !members.contains(peer));
        let stay = self.nodes[node]
            .peers()
            .into_iter()
            .filter(|peer| members.contains(peer));
        // Nobody who stays could ever have everything.
        let must_accept = removes && stay.count() < self.plan.ack_peers;
        let accepts = removes && !self.quiet && self.rng.one_in(self.plan.accepts_fewer_copies);
        let accepts = accepts || must_accept;
        let within_ms = self.rng.log_between(20, 20_000);
        let set = PeerSet {
            places,
            open_answers: self.plan.open_answers(members.len()),
            accept_fewer_copies: accepts,
            within_ms,
        };
        let id = self.control(node, Control::Peers(Box::new(set)));
        self.membership.asked = Some(Asked {
            node,
            id,
            members,
            seats,
            accepts,
        });
    }

    /// A core is about to hear what it was asked for: from now on those that leave count no longer.
    pub(crate) fn note_asked(&mut self, node: usize, id: RequestId) {
        let Some(asked) = self
            .membership
            .asked
            .as_ref()
            .filter(|asked| asked.id == id)
        else {
            return;
        };
        let Some(live) = &self.nodes[node].live else {
            return;
        };
        let leads = live.volume.role() == Role::Primary;
        let mut nodes = self.nodes[node].peers();
        nodes.retain(|peer| leads && !asked.members.contains(peer));
        let upto = live.tip;
        self.nodes[node].leaving = Leaving { nodes, upto };
    }

    /// A core answered what it was asked for. Returns whether this was such an answer.
    pub(crate) fn peers_changed(
        &mut self,
        node: usize,
        id: RequestId,
        result: &Result<(), String>,
    ) -> Result<bool, Violation> {
        let Some(asked) = self.membership.asked.take_if(|asked| asked.id == id) else {
            return Ok(false);
        };
        let leaving = self.nodes[node].leaving.clone();
        if result.is_ok() {
            self.check_left(node, &leaving, asked.accepts)?;
            self.membership.agreed |= !leaving.nodes.is_empty();
            self.end_sessions(node, &asked.seats);
            self.nodes[node].members = asked.members;
            self.nodes[node].seats = asked.seats;
            self.connect_peers(node);
        } else {
            self.stats.regroups_refused += 1;
        }
        self.nodes[node].leaving = Leaving::default();
        Ok(true)
    }

    /// P1 when somebody is let go: what was acknowledged with its help is on enough of the others.
    fn check_left(&mut self, node: usize, leaving: &Leaving, accepts: bool) -> Outcome {
        let waits = self.plan.ack_mode != AckMode::Async;
        if leaving.nodes.is_empty() || !waits || leaving.upto.epoch == Epoch(0) {
            return Ok(());
        }
        let (holders, wanted) = (self.holders(node, leaving.upto), self.plan.ack_peers);
        if holders >= wanted {
            return Ok(());
        }
        if accepts {
            self.oracle.promised = Tip::default();
            self.oracle.received = Tip::default();
            return Ok(());
        }
        broken(
            "P1",
            format!(
                "node {node} let {:?} go although {:?} is on {holders} of {wanted} peers that stay",
                leaving.nodes, leaving.upto
            ),
        )
    }

    /// A node talks to everybody whom it knows and who knows it.
    fn connect_peers(&mut self, node: usize) {
        for link in 0..self.links.len() {
            if self.links[link].side_of(node).is_some() && self.are_peers(link) {
                self.plan_connect(link);
            }
        }
    }

    /// Whoever has lost its place is not talked to any more.
    fn end_sessions(&mut self, node: usize, seats: &[Option<usize>]) {
        for link in 0..self.links.len() {
            let Some(side) = self.links[link].side_of(node) else {
                continue;
            };
            let other = self.links[link].nodes[1 - side];
            if let Some(session) = self.links[link].sides[side].open
                && !seats.contains(&Some(other))
            {
                self.end_session(link, session, side);
            }
        }
    }

    /// A node lost power before it answered. Its configuration may say already what it was asked
    /// for: then it counts at the next start, and nobody checks whether anything is lost by it.
    pub(crate) fn forget_asked(&mut self, node: usize) {
        let leads = self.may_lead(node);
        self.nodes[node].leaving = Leaving::default();
        let Some(asked) = self.membership.asked.take_if(|asked| asked.node == node) else {
            return;
        };
        if self.rng.one_in(2) {
            return;
        }
        let removes = self.nodes[node]
            .members
            .iter()
            .any(|peer| !asked.members.contains(peer));
        self.nodes[node].members = asked.members;
        if removes && leads {
            // What only memory holds may be missed now, and nobody was asked whether it may.
            self.oracle.received = self.oracle.promised;
        }
    }

    /// At the end whoever is outside comes back, or is switched off.
    fn settle_outsiders(&mut self) {
        let outside = |node: &usize| !self.is_member(*node) && !self.is_gone(*node);
        let outside: Vec<usize> = (0..self.nodes.len()).filter(outside).collect();
        for node in outside {
            if self.primary().is_none() {
                return;
            }
            if self.rng.one_in(2) {
                return self.want(Some(node), None);
            }
            self.membership.gone.push(node);
            if self.nodes[node].live.is_some() {
                self.crash(node);
            }
        }
    }

    /// The link between two nodes, and the side of the first; none if nobody is at that place.
    pub(crate) fn link_of(&self, node: usize, peer: PeerId) -> Option<(usize, usize)> {
        let other = self.nodes[node].seats.get(usize::from(peer.0)).copied()??;
        let between = |link: &crate::link::Link| {
            link.side_of(node).is_some() && link.side_of(other).is_some()
        };
        let link = self.links.iter().position(between)?;
        Some((link, usize::from(self.links[link].nodes[1] == node)))
    }

    /// What a node calls the other side of a link; none if that one is no peer of it.
    pub(crate) fn peer_id(&self, link: usize, side: usize) -> Option<PeerId> {
        let [own, other] = [side, 1 - side].map(|side| self.links[link].nodes[side]);
        let place = self.nodes[own]
            .seats
            .iter()
            .position(|&seat| seat == Some(other))?;
        Some(PeerId(u8::try_from(place).expect("few nodes")))
    }
}
