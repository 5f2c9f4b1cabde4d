//! Which peer of a volume is at which place of the core's list.
//!
//! At the start that is the order of the configuration. Later, whoever stays keeps its place; who
//! comes gets the first one that is free. Pure.

use hn4_engine::core::{MAX_PEERS, Place};
use hn4_transport::tls::KeyPin;

use crate::config::PeerSection;

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Seats(Vec<Option<(String, KeyPin)>>);

impl Seats {
    /// Everybody in the order of the configuration.
    pub(super) fn new(peers: &[PeerSection]) -> Self {
        Self(peers.iter().map(|peer| Some(key(peer))).collect())
    }

    /// Where the peer of this name is.
    pub(super) fn place(&self, name: &str) -> Option<usize> {
        let named =
            |seat: &Option<(String, KeyPin)>| seat.as_ref().is_some_and(|(known, _)| known == name);
        self.0.iter().position(named)
    }

    /// Where everybody is to be, and what that means for each place. Another key is another peer,
    /// of whose copy nothing is known.
    pub(super) fn plan(&self, peers: &[PeerSection]) -> (Self, [Place; MAX_PEERS]) {
        let mut places = [Place::Empty; MAX_PEERS];
        let mut seats: Vec<Option<(String, KeyPin)>> = vec![None; MAX_PEERS];
        let mut new = Vec::new();
        for peer in peers {
            let same = self.0.iter().position(|seat| *seat == Some(key(peer)));
            match same {
                Some(index) => {
                    places[index] = Place::Kept(peer.lag);
                    seats[index] = Some(key(peer));
                }
                None => new.push(peer),
            }
        }
        for peer in new {
            // The configuration bounds peers.
            let Some(index) = seats.iter().position(Option::is_none) else {
                break;
            };
            places[index] = Place::New(peer.lag);
            seats[index] = Some(key(peer));
        }
        while seats.last().is_some_and(Option::is_none) {
            seats.pop();
        }
        (Self(seats), places)
    }

    /// The places whose peer is gone, or is another one, in the next seating.
    pub(super) fn left(&self, next: &Self) -> Vec<usize> {
        let stays = |index: usize| self.0.get(index) == next.0.get(index);
        let taken = |index: &usize| self.0[*index].is_some() && !stays(*index);
        (0..self.0.len()).filter(taken).collect()
    }
}

fn key(peer: &PeerSection) -> (String, KeyPin) {
    (peer.name.clone(), peer.key_pin)
}

#[cfg(test)]
mod tests {
    use hn4_engine::core::LagPolicy;
    use hn4_transport::driver::TransportKind;
    use hn4_transport::session::PeerRoles;

    use super::*;

    fn peer(name: &str, pin: u8) -> PeerSection {
        PeerSection {
            name: name.to_owned(),
            address: None,
            key_pin: KeyPin([pin; 32]),
            transport: TransportKind::Quic,
            roles: PeerRoles::default(),
            scxq2: false,
            lag: LagPolicy::default(),
        }
    }

    #[test]
    fn whoever_stays_keeps_its_place_and_who_comes_gets_the_first_free_one() {
        let seats = Seats::new(&[peer("a", 1), peer("b", 2), peer("c", 3)]);
        let (next, places) = seats.plan(&[peer("d", 4), peer("c", 3), peer("a", 1), peer("e", 5)]);
        let (kept, new) = (
            Place::Kept(LagPolicy::default()),
            Place::New(LagPolicy::default()),
        );
        assert_eq!(places[..5], [kept, new, kept, new, Place::Empty]);
        assert_eq!(
            ["a", "d", "c", "e"].map(|name| next.place(name)),
            [0, 1, 2, 3].map(Some)
        );
        assert_eq!((next.place("b"), seats.left(&next)), (None, vec![1]));
        let (fewer, places) = next.plan(&[peer("c", 3)]);
        assert_eq!(
            places[..4],
            [Place::Empty, Place::Empty, kept, Place::Empty]
        );
        assert_eq!(
            (fewer.place("c"), next.left(&fewer)),
            (Some(2), vec![0, 1, 3])
        );
    }

    #[test]
    fn another_key_is_another_peer() {
        let seats = Seats::new(&[peer("a", 1)]);
        let (next, places) = seats.plan(&[peer("a", 9)]);
        assert_eq!(places[0], Place::New(LagPolicy::default()));
        assert_eq!((next.place("a"), seats.left(&next)), (Some(0), vec![0]));
        let mut moved = peer("a", 1);
        moved.address = Some("elsewhere:1".to_owned());
        let (next, places) = seats.plan(&[moved]);
        assert_eq!(places[0], Place::Kept(LagPolicy::default()));
        assert!(seats.left(&next).is_empty());
    }
}
