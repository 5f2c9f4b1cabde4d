//! Roots of this copy go to peers, and theirs are compared with ours.

use std::time::Instant;

use bytes::Bytes;
use hn4_engine::core::event::{Differences, Tip, TreeEvent};
use hn4_engine::shard::ToShard;
use hn4_proof::hash::Digest;
use hn4_transport::session::{Input, StateRoot};

use super::VolumeTask;
use crate::daemon::proof::ToProver;
use crate::daemon::tree::{FromTree, ToTree};

fn to_wire(at: Tip, root: Digest) -> Input {
    let at = (at.epoch, at.chain);
    Input::Root(StateRoot { at, root: root.0 })
}

impl VolumeTask {
    pub(super) fn tree_said(&mut self, said: FromTree) {
        match said {
            FromTree::Core(event) => self.shard.send(ToShard::Tree(event)),
            FromTree::Ask(message) => {
                let asked = (0..self.peers.len())
                    .filter(|index| self.tell_tree(*index, message.clone()))
                    .count();
                if asked == 0
                    && let Some(tree) = &self.tree
                {
                    tree.send(ToTree::NoPeer);
                }
            }
            FromTree::Answer(index, message) => _ = self.tell_tree(index, message),
            FromTree::Compared(index, id, found) => {
                self.tell_compared(index, found.as_ref());
                let event = TreeEvent::Compared { id, found };
                self.shard.send(ToShard::Tree(event));
            }
            FromTree::Report(state) => self.tree_state = Some(state),
            FromTree::Root { at, root } => {
                self.tell_prover(ToProver::State(at, root));
                let peers = self.peers.iter_mut().flatten().map(|peer| &mut peer.roots);
                self.roots.ours((at, root), peers, Instant::now());
                for index in 0..self.peers.len() {
                    self.send_root(index, (at, root));
                    self.tell_difference(index);
                }
            }
        }
    }

    fn tell_compared(&self, index: usize, found: Option<&Differences>) {
        let peer = self.peers.get(index).and_then(Option::as_ref);
        let peer = peer.map_or("?", |peer| peer.name.as_str());
        let (volume, size) = (&self.name, self.identity.size_bytes);
        let Some(Differences { at, ranges }) = found else {
            tracing::info!(
                %volume, %peer,
                "full copy: the state trees could not be compared, so everything is sent"
            );
            return;
        };
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        tracing::info!(
            %volume, %peer, epoch = %at.epoch, differ_bytes = bytes, kept_bytes = size - bytes,
            parts = ranges.len(),
            "resync by tree: only what differs is sent, the rest is kept there"
        );
    }

    /// Whether the peer is there and its tree takes it.
    fn tell_tree(&self, index: usize, message: Bytes) -> bool {
        let peer = self.peers.get(index).and_then(Option::as_ref);
        let takes = peer.is_some_and(|peer| peer.session.is_some() && peer.repairs);
        if takes {
            self.tell_peer(index, Input::Tree(message));
        }
        takes
    }

    pub(super) fn peer_tree(&self, index: usize, message: Bytes) {
        if let Some(tree) = &self.tree {
            tree.send_from_peer(index, message);
        }
    }

    fn send_root(&self, index: usize, (at, root): (Tip, Digest)) {
        let peer = self.peers.get(index).and_then(Option::as_ref);
        if peer.is_some_and(|peer| peer.compares) {
            self.tell_peer(index, to_wire(at, root));
        }
    }

    /// A session is open: the peer may be where this copy is.
    pub(super) fn greet_with_root(&self, index: usize) {
        if let Some(root) = self.roots.newest() {
            self.send_root(index, root);
        }
    }

    pub(super) fn peer_root(&mut self, index: usize, root: &StateRoot) {
        let Some(Some(peer)) = self.peers.get_mut(index) else {
            return;
        };
        let (epoch, chain) = root.at;
        let theirs = (Tip { epoch, chain }, Digest(root.root));
        self.roots.theirs(&mut peer.roots, theirs, Instant::now());
        self.tell_difference(index);
    }

    /// Once for each place.
    fn tell_difference(&mut self, index: usize) {
        let Some(Some(peer)) = self.peers.get_mut(index) else {
            return;
        };
        let differs = peer.roots.last.filter(|last| last.ours != last.theirs);
        let told = peer.difference;
        peer.difference = differs.map(|last| last.at.epoch);
        if let Some(last) = differs.filter(|_| peer.difference != told) {
            tracing::error!(
                volume = %self.name, peer = %peer.name, epoch = %last.at.epoch,
                ours = %last.ours, theirs = %last.theirs,
                "THE COPIES DIFFER: their state roots at this epoch are not equal"
            );
        }
    }
}
