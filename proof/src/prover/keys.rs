//! The keys of a node, and how a ledger comes to hold them.
//!
//! A node has one key of each algorithm that it signs with. While one is replaced there are two:
//! the new one signs as soon as the ledger holds it, and the old one only authorises that change.
//! A node that is killed in between finds both, and the ledger says how far it had come.

use hn4::types::NodeId;

use super::{Now, Prover, ProverError};
use crate::hash::Digest;
use crate::ledger::Body;
use crate::ledger::file::LedgerMedium;
use crate::sign::keyring::{KeyChange, Keyring};
use crate::sign::{Algorithm, KeyId, PublicKey, SecretKey, SignError, Signature};

/// See the module.
#[derive(Clone, Debug)]
pub struct NodeKeys {
    /// By algorithm; the first is Ed25519.
    wanted: Vec<SecretKey>,
    older: Vec<SecretKey>,
}

impl NodeKeys {
    /// The keys that a node signs with, one of each algorithm, and others of its keys that a ledger
    /// may still hold. `None` if Ed25519 is not among the wanted, or an algorithm is there twice.
    #[must_use]
    pub fn new(mut wanted: Vec<SecretKey>, older: Vec<SecretKey>) -> Option<Self> {
        let algorithm = |key: &SecretKey| key.public().algorithm();
        wanted.sort_by_key(algorithm);
        let first = wanted.first().map(algorithm);
        let apart = wanted.is_sorted_by(|a, b| algorithm(a) < algorithm(b));
        (first == Some(Algorithm::Ed25519) && apart).then_some(Self { wanted, older })
    }

    /// The Ed25519 key.
    #[must_use]
    pub fn main(&self) -> &SecretKey {
        &self.wanted[0]
    }

    /// What the node signs with.
    #[must_use]
    pub fn wanted(&self) -> &[SecretKey] {
        &self.wanted
    }

    /// Whether there is a key for checkpoints only.
    #[must_use]
    pub fn signs_checkpoints(&self) -> bool {
        let mut all = self.wanted.iter();
        all.any(|key| key.public().algorithm().is_for_checkpoints())
    }

    fn find(&self, id: KeyId) -> Option<&SecretKey> {
        let mut all = self.wanted.iter().chain(&self.older);
        all.find(|key| key.public().id() == id)
    }

    /// One of these keys.
    pub(super) fn public(&self, id: KeyId) -> Option<&PublicKey> {
        self.find(id).map(SecretKey::public)
    }

    /// One key for each algorithm of which the ledger holds keys of this node; `None` if one is not
    /// at hand, or there is no Ed25519 key.
    #[must_use]
    pub fn authority(&self, ring: &Keyring, node: NodeId) -> Option<Vec<&SecretKey>> {
        let active = ring.active_of(node);
        let first = active.first().map(|public| public.algorithm());
        if first != Some(Algorithm::Ed25519) {
            return None;
        }
        let mut keys: Vec<&SecretKey> = Vec::new();
        for algorithm in Algorithm::ALL {
            let mut of = active.iter().filter(|it| it.algorithm() == algorithm);
            if of.clone().next().is_some() {
                keys.push(of.find_map(|public| self.find(public.id()))?);
            }
        }
        Some(keys)
    }

    /// Signs with all keys, or with all but those for checkpoints.
    ///
    /// # Errors
    /// [`SignError`] of a key.
    pub fn sign(&self, digest: &Digest, is_checkpoint: bool) -> Result<Vec<Signature>, SignError> {
        let signs =
            |key: &&SecretKey| is_checkpoint || !key.public().algorithm().is_for_checkpoints();
        let keys = self.wanted.iter().filter(signs);
        keys.map(|key| key.sign(digest)).collect()
    }

    /// What the ledger lacks of these keys: the key that is to go, and the one that is to come.
    fn next_change(
        &self,
        ring: &Keyring,
        node: NodeId,
    ) -> Option<(Option<KeyId>, Option<&SecretKey>)> {
        let active = ring.active_of(node);
        for key in &self.wanted {
            let public = key.public();
            if active.contains(&public) {
                continue;
            }
            let mut old = active.iter();
            let old = old.find(|old| old.algorithm() == public.algorithm());
            return Some((old.map(|old| old.id()), Some(key)));
        }
        let mut active = active.into_iter();
        let unwanted = active.find(|public| !self.wants(public))?;
        Some((Some(unwanted.id()), None))
    }

    fn wants(&self, public: &PublicKey) -> bool {
        self.wanted.iter().any(|key| key.public() == public)
    }
}

impl From<SecretKey> for NodeKeys {
    /// A node with an Ed25519 key alone.
    ///
    /// # Panics
    /// If the key is of another algorithm.
    fn from(key: SecretKey) -> Self {
        Self::new(vec![key], Vec::new()).expect("an Ed25519 key")
    }
}

impl<M: LedgerMedium> Prover<M> {
    /// The node has other keys now. A primary brings them into the ledger at once, a replica when
    /// its primary takes them.
    ///
    /// # Errors
    /// [`ProverError`].
    pub fn set_keys(&mut self, now: Now, keys: NodeKeys) -> Result<(), ProverError> {
        let ids = |keys: &NodeKeys| -> Vec<KeyId> {
            let wanted = keys.wanted().iter();
            wanted.map(|key| key.public().id()).collect()
        };
        if ids(&keys) != ids(&self.keys) {
            self.recall.change_keys();
        }
        self.keys = keys;
        if self.primary.is_none() {
            return self.offer_keys();
        }
        if let Some((key, at)) = self.retired_key() {
            return Err(ProverError::Retired { key, at });
        }
        if self.placed && !self.recall.waits() {
            self.settle_keys(now)?;
        }
        Ok(())
    }

    /// Keys of this node that may sign at the end of the ledger.
    pub(super) fn active_keys(&self) -> Vec<KeyId> {
        let tip = self.tip.iter();
        let keys = tip.flat_map(|tip| tip.keyring().active_of(self.node));
        keys.map(PublicKey::id).collect()
    }

    /// A wanted key whose right has ended: it does not come back.
    pub(super) fn retired_key(&self) -> Option<(KeyId, u64)> {
        let ring = self.tip.as_ref()?.keyring();
        let ids = self.keys.wanted.iter().map(|key| key.public().id());
        let mut retired = ids.filter_map(|id| Some((id, ring.retired_at(id)?)));
        retired.next()
    }

    /// Brings the ledger to hold the wanted keys of this node and no others.
    pub(super) fn settle_keys(&mut self, now: Now) -> Result<(), ProverError> {
        let volume = self.identity.volume;
        while let Some(tip) = self.tip.as_mut()
            && let Some((retire, new)) = self.keys.next_change(tip.keyring(), self.node)
            && let Some(mut by) = self.keys.authority(tip.keyring(), self.node)
        {
            by.extend(new);
            let mut change = KeyChange {
                retire,
                enroll: new.map(|key| (self.node, key.public().clone())),
                signatures: Vec::new(),
            };
            change.sign((volume, tip.next_index(), &tip.previous()), &by)?;
            let bytes = tip.encode_next(now.wall_ms, &Body::Key(change));
            tip.push_bytes(&bytes)?;
            self.ledger.append(&[bytes])?;
        }
        self.serve_all()
    }
}
