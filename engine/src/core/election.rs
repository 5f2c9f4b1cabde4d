//! Decisions that need the other copies: a promotion, and a primary's opening after a restart.
//!
//! Both take the same steps. A peer says by its state which term it obeys, and has that term on its
//! medium: from then on it refuses every lower one. Once enough peers obey ours, the copy whose log
//! has the highest rank, and among equal ranks the longest one, holds everything that was ever
//! acknowledged; if that is not us, we pull its tail first. Acknowledgements wait for k of n peers,
//! so that n - k + 1 of the n + 1 copies always include one that has it all. A copy that is known
//! to have more than we do is waited for in any case: the count holds only as long as every node
//! agrees on who the n are, which in the middle of a change of peers they may not.
//!
//! An opening primary takes only what continues its own log: in its own term nobody else can have
//! written, so a tail that does not continue it is one of its own that it has replaced since. But
//! a tail that the other one cannot send, since its log begins after ours or is damaged, is missing
//! here: the volume is not opened without it unless somebody says so.
//!
//! Not here: how many answers are needed (policy), and the change of role itself.

use hn4::log::Role;
use hn4::types::{Epoch, Rank, Term};

use super::event::{
    Action, Actions, Now, PeerEvent, PeerId, PeerMessage, PeerState, RequestId, Time, Tip,
};
use super::feed::{Peer, peer_id};
use super::replica::ReplicaState;
use super::volume::Volume;

/// The end of a log; the higher one has everything.
type Place = (Rank, Epoch);

#[derive(Clone, Copy, Debug)]
enum Purpose {
    /// The primary of the present term was restarted.
    Open,
    /// This node is to be primary in a new term.
    Promote { id: RequestId, term: Term },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Election {
    purpose: Purpose,
    /// Peers that must answer.
    needed: usize,
    /// Copies whose log ends in an earlier term do not count: where writes are acknowledged from
    /// memory, the primary of this term may have been the only one left that had them.
    least_term: u64,
    /// Somebody accepts that what others have is lost.
    waived: bool,
    /// Peers that had more than we do when they were last heard of, and have not promised yet.
    /// `None`: whoever asked accepts that it is lost.
    ahead: Option<Vec<(PeerId, Place)>>,
    /// It has waited long enough for those that do not answer.
    late: bool,
    within_ms: Option<u64>,
    until: Option<Time>,
    /// Whose tail is being pulled.
    source: Option<PeerId>,
    /// Their tail does not continue ours.
    unfit: Vec<PeerId>,
    /// They have more than we do, and their logs cannot give it.
    withheld: Vec<PeerId>,
}

/// How far the decision is, for status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Waiting {
    /// Peers that answered.
    pub answers: usize,
    /// Peers that must.
    pub needed: usize,
    /// This one has a tail that is missing here, and its log can no longer give it.
    pub withheld: Option<PeerId>,
}

impl Election {
    fn new(purpose: Purpose, needed: usize, within_ms: Option<u64>) -> Self {
        Self {
            purpose,
            needed,
            least_term: 0,
            waived: false,
            ahead: None,
            late: false,
            within_ms,
            until: None,
            source: None,
            unfit: Vec::new(),
            withheld: Vec::new(),
        }
    }

    /// A primary waits for its peers before it serves.
    pub(super) fn open(needed: usize, within_ms: Option<u64>) -> Self {
        Self::new(Purpose::Open, needed, within_ms)
    }

    /// A replica asks to be obeyed in a new term.
    pub(super) fn promote(
        id: RequestId,
        term: Term,
        (needed, least_term, accepts_loss): (usize, u64, bool),
        within_ms: u64,
    ) -> Self {
        Self {
            least_term,
            ahead: (!accepts_loss).then(Vec::new),
            ..Self::new(Purpose::Promote { id, term }, needed, Some(within_ms))
        }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.until
    }

    /// The request that waits for it.
    pub(super) fn request(&self) -> Option<RequestId> {
        match self.purpose {
            Purpose::Open => None,
            Purpose::Promote { id, .. } => Some(id),
        }
    }
}

fn place(state: &PeerState) -> Place {
    (state.tip_rank, state.tip.epoch)
}

impl Volume {
    /// Whether this node was primary when it stopped, and waits to hear that it still is.
    #[must_use]
    pub fn is_opening(&self) -> bool {
        self.election
            .as_ref()
            .is_some_and(|election| matches!(election.purpose, Purpose::Open))
    }

    /// Whether this primary serves since its restart without having heard of its peers, or without
    /// what one of them still held: a peer may have a tail that was lost here, or be promoted.
    #[must_use]
    pub fn opened_alone(&self) -> bool {
        self.opened_alone
    }

    /// What an opening or a promotion waits for, if one is under way.
    #[must_use]
    pub fn waits_for_peers(&self) -> Option<Waiting> {
        let election = self.election.as_ref()?;
        Some(Waiting {
            answers: self.answering().count(),
            needed: election.needed,
            withheld: election.withheld.first().copied(),
        })
    }

    fn election_term(&self, election: &Election) -> Term {
        match election.purpose {
            Purpose::Open => self.superblock.persisted().term,
            Purpose::Promote { term, .. } => term,
        }
    }

    /// Peers that obey the term of the election. A copy that is not usable never acknowledged
    /// anything, so for a promotion it is no answer; but neither can it have been promoted, which
    /// is what an opening asks.
    fn answering(&self) -> impl Iterator<Item = (PeerId, PeerState)> {
        let election = self.election.as_ref();
        let wanted = election.map(|election| {
            let term = self.election_term(election);
            (term, election.purpose, election.least_term)
        });
        self.peers
            .iter()
            .enumerate()
            .filter_map(move |(index, peer)| {
                let (term, purpose, least) = wanted?;
                let state = peer.state().filter(|state| state.term == term)?;
                let recent = state.tip_rank.term >= least;
                let counts = (state.usable && recent) || matches!(purpose, Purpose::Open);
                counts.then_some((peer_id(index), state))
            })
    }

    fn place(&self) -> Place {
        (self.journal.tip_rank(), self.tip().epoch)
    }

    /// Remembers which copies are known to have more than we do, until they have promised.
    fn look_ahead(&mut self) {
        let ours = self.place();
        let Some(election) = &mut self.election else {
            return;
        };
        let (Purpose::Promote { term, .. }, Some(ahead)) = (election.purpose, &mut election.ahead)
        else {
            return;
        };
        for (index, peer) in self.peers.iter().enumerate() {
            let id = peer_id(index);
            let Some(state) = peer.state().filter(|state| state.usable) else {
                continue;
            };
            ahead.retain(|(known, _)| *known != id);
            if state.term != term && place(&state) > ours {
                ahead.push((id, place(&state)));
            }
        }
        ahead.retain(|(_, place)| *place > ours);
    }

    /// The peer whose history goes beyond ours, if there is one.
    fn longer(&self, election: &Election) -> Option<PeerId> {
        let ours = self.place();
        let refused = |id: &PeerId| election.unfit.contains(id) || election.withheld.contains(id);
        let fit = |(id, state): &(PeerId, PeerState)| state.usable && !refused(id);
        let best = self.answering().filter(fit);
        let best = best.max_by_key(|(_, state)| place(state))?;
        (place(&best.1) > ours).then_some(best.0)
    }

    pub(super) fn election_progress(&mut self, now: Now, out: &mut Actions) {
        let Some(election) = &mut self.election else {
            return;
        };
        if let Some(ms) = election.within_ms.take() {
            election.until = Some(now.time.plus_ms(ms));
        }
        let late = election.until.is_some_and(|until| now.time >= until);
        if late && matches!(election.purpose, Purpose::Open) {
            election.late = true;
            election.until = None;
        }
        self.look_ahead();
        let Some(election) = &self.election else {
            return;
        };
        let obeyed = self.superblock.persisted().term == self.election_term(election);
        let none_ahead = election.ahead.as_ref().is_none_or(Vec::is_empty);
        let none_missing = none_ahead && election.withheld.is_empty();
        let enough = self.answering().count() >= election.needed && none_missing;
        let alone = election.waived || election.late;
        if obeyed && (enough || alone) {
            match self.longer(election) {
                Some(peer) if !election.waived => self.pull_from(peer, out),
                // If there is one, somebody accepts that what it holds is left behind.
                longer => self.elected(alone && (!enough || longer.is_some()), out),
            }
        }
        if late {
            self.not_elected(out);
        }
    }

    /// Our own answer is enough, whatever others have: nothing is cut back to make room for it.
    pub(super) fn open_alone(&mut self) {
        if let Some(election) = &mut self.election {
            election.waived = true;
            election.source = None;
            self.replica.truncate_to = None;
        }
    }

    fn pull_from(&mut self, peer: PeerId, out: &mut Actions) {
        let (tip, anchored) = (self.tip(), self.anchored);
        let busy = self.replica.truncate_to.is_some();
        if let Some(election) = &mut self.election
            && election.source != Some(peer)
            && !busy
        {
            election.source = Some(peer);
            self.replica.follow(peer);
            out.peer(peer, PeerMessage::Pull { tip, anchored });
        }
    }

    /// The tail was cut back, or the peer is gone: whoever is asked next is asked anew.
    pub(super) fn pull_again(&mut self) {
        if let Some(election) = &mut self.election {
            election.source = None;
        }
    }

    /// The peer says that its log does not continue ours, or does not reach back to it any more,
    /// or cannot be read. Returns whether that settles it.
    ///
    /// What a later opening sealed holds everything that was acknowledged, so we go back to where
    /// ours parts from it, if we can: ours may end in what an earlier opening left with another
    /// peer, and was pulled from there.
    pub(super) fn pull_refused(&mut self, peer: PeerId, refusal: &PeerEvent) -> bool {
        let opens = |election: &&Election| matches!(election.purpose, Purpose::Open);
        let Some(election) = self.election.as_ref().filter(opens) else {
            return false;
        };
        if election.source != Some(peer) {
            // Of a pull that was given up.
            return true;
        }
        let state = self.peers.get(usize::from(peer.0)).and_then(Peer::state);
        let later = state.is_some_and(|state| state.tip_rank > self.journal.tip_rank());
        let back = match *refusal {
            PeerEvent::Truncate(tip) => {
                let desired = &self.superblock.desired;
                let written = desired.checkpoint.max(desired.swept);
                later && tip.epoch >= written && self.may_cut_back(tip)
            }
            _ => false,
        };
        let withholds = later || matches!(refusal, PeerEvent::TooOld { .. });
        if let Some(election) = &mut self.election
            && !back
        {
            election.source = None;
            if withholds {
                election.withheld.push(peer);
            } else {
                election.unfit.push(peer);
            }
        }
        !back
    }

    /// Whether the log may be cut off after this place, as a peer asks.
    pub(super) fn may_cut_back(&self, to: Tip) -> bool {
        let known = self.journal.chain(to.epoch) == Some(to.chain);
        known && to.epoch >= self.anchored.epoch
    }

    /// Ours is the history.
    fn elected(&mut self, alone: bool, out: &mut Actions) {
        let settled = self.journal.durable() == self.tip().epoch
            && self.replica.is_settled()
            // A frame of a session that no superblock names would be taken for damage.
            && self.superblock.persisted().session == self.journal.session;
        let Some(election) = self.election.take_if(|_| settled) else {
            return;
        };
        match election.purpose {
            Purpose::Promote { id, term } => self.take_over(id, term),
            Purpose::Open => {
                self.anchored = self.tip();
                self.mark_term = true;
                self.opened_alone = alone;
                self.replica = ReplicaState::default();
                self.answer_waiting(out);
            }
        }
    }

    /// Time is up.
    fn not_elected(&mut self, out: &mut Actions) {
        let waiting = self.waits_for_peers();
        let Some(election) = &self.election else {
            return;
        };
        let (Purpose::Promote { id, term }, Some(waiting)) = (election.purpose, waiting) else {
            return;
        };
        let ahead = election.ahead.iter().flatten().next();
        let why = match election.source.or(ahead.map(|(id, _)| *id)) {
            Some(_) => "another copy has a longer history than this node, and did not send it in \
                        time"
                .to_owned(),
            None => format!(
                "{} of the {} other copies that are needed promised to obey term {term}; what \
                 only the others have would be lost",
                waiting.answers, waiting.needed
            ),
        };
        // An attempt that accepted a loss did not look at terms.
        let least = election.least_term;
        self.unled = (least > 0).then_some((term, least));
        self.election = None;
        let result = Err(why);
        out.push(Action::ControlDone { id, result });
    }

    /// Ends an election that something else has overtaken.
    pub(super) fn cancel_election(&mut self, why: &str, out: &mut Actions) {
        let request = self.election.take().and_then(|election| election.request());
        if let Some(id) = request {
            let result = Err(why.to_owned());
            out.push(Action::ControlDone { id, result });
        }
    }

    /// Whether a peer may read our log although we are not primary: it asks to be obeyed in the
    /// term that we have promised to obey.
    pub(super) fn may_pull(&self, peer: PeerId) -> bool {
        let term = self.superblock.persisted().term;
        let state = self
            .peers
            .get(usize::from(peer.0))
            .and_then(|peer| peer.state());
        matches!(self.role(), Role::Replica | Role::Fenced)
            && state.is_some_and(|state| state.term == term)
    }

    pub(super) fn peer_state(&mut self, id: PeerId, state: PeerState) {
        if let Some(election) = &mut self.election {
            // It may have become able to give what it has, or have lost it.
            election.withheld.retain(|peer| *peer != id);
        }
        if let Some(peer) = self.peers.get_mut(usize::from(id.0)) {
            peer.set_state(state);
        }
    }

    /// The rank of what the source of a full copy sends: it seals its term's first epoch before it
    /// sends anything.
    pub(super) fn rank_of_source(&self) -> Rank {
        let source = self.replica.source;
        let peer = source.and_then(|id| self.peers.get(usize::from(id.0)));
        let state = peer.and_then(|peer| peer.state());
        Rank {
            term: self.superblock.persisted().term.counter,
            incarnation: state.map(|state| state.incarnation).unwrap_or_default(),
        }
    }
}
