//! Changing a volume's peers while it runs.
//!
//! A peer is named by its place in a list, and keeps it for as long as it is a peer: the others do
//! not move when one goes, and its place is free for the next.
//!
//! **Invariant:** nothing that was acknowledged may come to rest on fewer copies than the policy
//! asks for because somebody was removed. From the moment the change is asked for, the peers that
//! leave count no longer, so whoever waits goes on waiting for the others; and the change is made
//! only when `ack_peers` of those that stay hold everything that was sealed by then. The operator
//! can waive that for peers that are lost; what was acknowledged must then at least be durable
//! here. A later promotion needs n - k + 1 copies of the *new* list, which include one that has
//! it all only because of this.
//!
//! Not here: who the peers are, and their sessions.

use hn4::log::Role;
use hn4::types::Epoch;

use super::config::{AckMode, LagPolicy, MAX_PEERS};
use super::event::{Action, Actions, Now, PeerId, PeerMessage, RequestId, Time};
use super::feed::{Peer, peer_id};
use super::lag::{LagRoom, LagState, PeerLag};
use super::mutants::{Mutant, planted};
use super::replica::Obstacle;
use super::volume::Volume;

/// What becomes of a place in the list of peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Place {
    /// Nobody is there.
    #[default]
    Empty,
    /// The peer that is there stays.
    Kept(LagPolicy),
    /// Somebody of whom nothing is known yet, also where another one was before.
    New(LagPolicy),
}

/// The peers of a volume from now on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerSet {
    /// Who is where.
    pub places: [Place; MAX_PEERS],
    /// As [`VolumeConfig::open_answers`](super::VolumeConfig::open_answers), for later.
    pub open_answers: usize,
    /// Go on although what was acknowledged will be on fewer copies than the policy asks for, until
    /// the peers that stay or come have it.
    pub accept_fewer_copies: bool,
    /// Give up if those that stay do not have everything after this time.
    pub within_ms: u64,
}

impl PeerSet {
    /// How many peers there will be.
    #[must_use]
    pub fn count(&self) -> usize {
        let taken = |place: &&Place| !matches!(place, Place::Empty);
        self.places.iter().filter(taken).count()
    }
}

/// A change that waits until nothing is lost by it.
#[derive(Debug)]
pub(super) struct Regroup {
    id: RequestId,
    set: Box<PeerSet>,
    /// Everything up to here must be held by those that stay.
    upto: Epoch,
    /// This node is primary, and counted on somebody who leaves.
    leads: bool,
    until: Option<Time>,
}

impl Regroup {
    pub(super) fn deadline(&self) -> Option<Time> {
        self.until
    }
}

impl Volume {
    pub(super) fn change_peers(&mut self, id: RequestId, set: Box<PeerSet>, out: &mut Actions) {
        if let Some(why) = self.change_refused(&set) {
            let result = Err(why);
            return out.push(Action::ControlDone { id, result });
        }
        for (peer, place) in self.peers.iter_mut().zip(&set.places) {
            peer.leaving = !peer.absent && !matches!(place, Place::Kept(_));
        }
        self.regroup = Some(Regroup {
            id,
            set,
            upto: self.tip().epoch,
            leads: self.role() == Role::Primary && self.peers.iter().any(|peer| peer.leaving),
            until: None,
        });
    }

    fn change_refused(&self, set: &PeerSet) -> Option<String> {
        let kept = |index: usize| self.peers.get(index).is_some_and(|peer| !peer.absent);
        let mut places = set.places.iter().enumerate();
        let (wanted, left) = (self.config.ack_peers, set.count());
        if self.regroup.is_some() {
            Some("another change of peers is under way; try again".to_owned())
        } else if self.election.is_some() || self.transition.is_some() {
            Some("a change of role or an opening is under way; try again after it".to_owned())
        } else if self.config.ack_mode != AckMode::Async && left < wanted {
            Some(format!(
                "acknowledgements need {wanted} peers and {left} would be left; add another one \
                 first, or replace it"
            ))
        } else if places.any(|(index, place)| matches!(place, Place::Kept(_)) && !kept(index)) {
            Some("a place without a peer cannot keep one".to_owned())
        } else {
            None
        }
    }

    pub(super) fn regroup_progress(&mut self, now: Now, out: &mut Actions) {
        let Some(regroup) = &mut self.regroup else {
            return;
        };
        let within_ms = regroup.set.within_ms;
        let until = *regroup.until.get_or_insert(now.time.plus_ms(within_ms));
        let (upto, accepts) = (regroup.upto, regroup.set.accept_fewer_copies);
        let leads = regroup.leads;
        let held = self.journal.durable() >= upto && (accepts || self.others_hold(upto));
        if !leads || held {
            return self.regroup(out);
        }
        if self.role() != Role::Primary {
            // Nobody says any more what the others have.
            let why = "this node is not primary any more; begin with the node that is";
            return self.give_up_regroup(why, out);
        }
        if now.time >= until {
            let why = format!(
                "not enough of the peers that stay have everything up to epoch {upto}, so that \
                 what was acknowledged would be on fewer copies than ack_peers = {} asks for",
                self.config.ack_peers
            );
            self.give_up_regroup(&why, out);
        }
    }

    /// Whether enough of the peers that count have everything up to an epoch.
    fn others_hold(&self, upto: Epoch) -> bool {
        if self.config.ack_mode == AckMode::Async || planted(Mutant::LetGoAtOnce) {
            return true;
        }
        let holds = |peer: &&Peer| peer.counts() && peer.progress.durable >= upto;
        self.peers.iter().filter(holds).count() >= self.config.ack_peers
    }

    pub(super) fn give_up_regroup(&mut self, why: &str, out: &mut Actions) {
        let Some(regroup) = self.regroup.take() else {
            return;
        };
        for peer in &mut self.peers {
            peer.leaving = false;
        }
        let (id, result) = (regroup.id, Err(why.to_owned()));
        out.push(Action::ControlDone { id, result });
    }

    fn regroup(&mut self, out: &mut Actions) {
        let Some(Regroup { id, set, .. }) = self.regroup.take() else {
            return;
        };
        for (index, place) in set.places.iter().enumerate() {
            let lag = match *place {
                Place::Kept(lag) => lag,
                Place::Empty => {
                    self.retire(index, out);
                    LagPolicy::default()
                }
                Place::New(lag) => {
                    self.retire(index, out);
                    self.welcome(index);
                    lag
                }
            };
            self.config.lag[index] = lag;
            if let (false, Some(peer)) = (lag.is_bounded(), self.peers.get_mut(index)) {
                // Nobody looks at it any more, and it counts again.
                peer.lag.state = LagState::Within;
            }
        }
        self.bounds_lag = self.config.lag.iter().any(LagPolicy::is_bounded);
        self.lag = LagRoom::default();
        self.config.peers = set.count();
        self.config.open_answers = set.open_answers;
        out.push(Action::ControlDone { id, result: Ok(()) });
    }

    /// Whatever is known of a peer is forgotten, with its claim on the log.
    fn retire(&mut self, index: usize, out: &mut Actions) {
        if self.peers.get(index).is_none_or(|peer| peer.absent) {
            return;
        }
        let peer: PeerId = peer_id(index);
        if self.peers[index].connected {
            out.peer(peer, PeerMessage::Close);
            self.peer_gone(peer);
        }
        // What kept this copy from following may have been that peer's word. If it was another's,
        // that one says it again in its next session.
        let obstacle = &mut self.replica.obstacle;
        if !matches!(obstacle, None | Some(Obstacle::NeedsSpace { .. })) {
            *obstacle = None;
            self.close_sessions(out);
        }
        let progress = self.peers[index].progress;
        self.peers[index] = Peer::nobody();
        if planted(Mutant::PlaceKeepsProgress) {
            self.peers[index].progress = progress;
        }
        out.push(Action::PeerRetired { peer });
    }

    fn welcome(&mut self, index: usize) {
        if self.peers.len() <= index {
            self.peers.resize_with(index + 1, Peer::nobody);
        }
        let mut peer = Peer::default();
        // Until it says what it has, it may need everything that is kept.
        peer.set_hold(self.superblock.desired.retained);
        peer.lag = PeerLag::at(self.tip().epoch);
        self.peers[index] = peer;
    }
}
