//! Which key may sign at which step of the ledger.
//!
//! Keys come and go by records of the ledger, and a key's right ends with the record that retires
//! it: whoever holds an old key can sign nothing that comes after. A key that was retired never
//! returns.
//!
//! The first record enrols the first key, signed by itself. Every later change is authorised by one
//! node, with one active key for *each* algorithm that this node has active keys of (so that
//! breaking Ed25519 alone does not change the keys of a node that also has a post-quantum key), and
//! a key that is enrolled signs its own offer, which proves that its owner has it. The offer names
//! no place in the ledger, so that its owner need not be asked again when the ledger has grown.

use std::collections::BTreeMap;

use hn4::types::{NodeId, VolumeId};

use super::{Algorithm, KeyId, PublicKey, SecretKey, SignError, Signature};
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, Digest};

/// Most keys that a ledger ever enrols.
pub const MAX_KEYS: usize = 1024;
/// Most keys that a ledger enrols by offers of one node, so that none uses up the room of others.
pub const MAX_NODE_KEYS: usize = 32;
const MAX_SIGNATURES: usize = 2 * Signature::MAX;
const VERSION: u8 = 1;

/// What a change of keys does: at least one of the two.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyChange {
    /// A key whose right ends.
    pub retire: Option<KeyId>,
    /// A key that may sign from the next record on, and whose node it is.
    pub enroll: Option<(NodeId, PublicKey)>,
    /// By the authorising node, and by the new key.
    pub signatures: Vec<Signature>,
}

/// A key that its owner wants enrolled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyOffer {
    /// Whose key it is.
    pub node: NodeId,
    /// The key.
    pub public: PublicKey,
    /// By the key itself, over [`KeyOffer::digest`].
    pub signature: Signature,
}

impl KeyOffer {
    /// What the key signs: volume, node, key.
    #[must_use]
    pub fn digest(volume: VolumeId, node: NodeId, public: &PublicKey) -> Digest {
        let mut writer = Writer::new();
        public.encode(&mut writer);
        hash::KEY_OFFER.hash(&[&volume.0, &node.0, writer.as_slice()])
    }

    /// Offers `key` of `node` to the ledger of `volume`.
    ///
    /// # Errors
    /// [`SignError`] of the key.
    pub fn new(volume: VolumeId, node: NodeId, key: &SecretKey) -> Result<Self, SignError> {
        let public = key.public().clone();
        let signature = key.sign(&Self::digest(volume, node, &public))?;
        Ok(Self {
            node,
            public,
            signature,
        })
    }

    /// The change that enrols the key at a place of the ledger and ends the right of another, if
    /// there is one; authorised by `keys`, none for the first record.
    ///
    /// # Errors
    /// [`SignError`] of a key.
    pub fn accept(
        self,
        (volume, index, previous): (VolumeId, u64, &Digest),
        retire: Option<KeyId>,
        keys: &[&SecretKey],
    ) -> Result<KeyChange, SignError> {
        let mut change = KeyChange {
            retire,
            enroll: Some((self.node, self.public)),
            signatures: Vec::new(),
        };
        let digest = change.digest(volume, index, previous);
        let signed = keys.iter().map(|key| key.sign(&digest));
        change.signatures = signed.collect::<Result<_, _>>()?;
        change.signatures.push(self.signature);
        Ok(change)
    }

    /// Appends the encoding: node, key, signature.
    pub fn encode(&self, writer: &mut Writer) {
        self.public.encode(writer.bytes(&self.node.0));
        Signature::encode_all(std::slice::from_ref(&self.signature), writer);
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let node = NodeId(reader.array()?);
        let public = PublicKey::decode(reader)?;
        let mut signatures = Signature::decode_all(reader, 1)?;
        let signature = signatures
            .pop()
            .ok_or_else(|| reader.invalid("signature"))?;
        Ok(Self {
            node,
            public,
            signature,
        })
    }
}

/// Why a key may not do what it did.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyError {
    /// A signature does not match, or cannot be checked here.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The key was never enrolled.
    #[error("key {0} is not enrolled in this ledger")]
    Unknown(KeyId),
    /// The key's right has ended.
    #[error("key {key} was retired at step {at}; it cannot sign later history")]
    Retired {
        /// The key.
        key: KeyId,
        /// The record that retired it.
        at: u64,
    },
    /// The key belongs to another node than the one that the term names.
    #[error("key {0} belongs to another node than the one whose term this is")]
    OtherNode(KeyId),
    /// A signature that is needed is missing.
    #[error("an {0} signature is required and missing")]
    Missing(Algorithm),
    /// Two signatures of one algorithm, or not in the order of the algorithms.
    #[error("the signatures are not one for each algorithm, in order")]
    Order,
    /// A change that changes nothing, enrols a key again or retires the last one.
    #[error("the change of keys is not allowed: {0}")]
    Change(&'static str),
}

impl KeyChange {
    /// What the signatures sign: the change, at one place of one ledger.
    #[must_use]
    pub fn digest(&self, volume: VolumeId, index: u64, previous: &Digest) -> Digest {
        let mut writer = Writer::new();
        self.encode_change(&mut writer);
        let parts: [&[u8]; 4] = [
            &volume.0,
            &index.to_le_bytes(),
            &previous.0,
            writer.as_slice(),
        ];
        hash::KEY_CHANGE.hash(&parts)
    }

    /// Signs the change with `keys`: the authorising node's, then the new one, which signs its
    /// offer.
    ///
    /// # Errors
    /// [`SignError`] of a key.
    pub fn sign(
        &mut self,
        (volume, index, previous): (VolumeId, u64, &Digest),
        keys: &[&SecretKey],
    ) -> Result<(), SignError> {
        let digest = self.digest(volume, index, previous);
        let offered = self.enroll.as_ref().zip(keys.split_last());
        let by = offered.map_or(keys, |(_, (_, by))| by);
        let signed = by.iter().map(|key| key.sign(&digest));
        self.signatures = signed.collect::<Result<_, _>>()?;
        if let Some(((node, public), (new, _))) = offered {
            let offer = KeyOffer::digest(volume, *node, public);
            self.signatures.push(new.sign(&offer)?);
        }
        Ok(())
    }

    /// Who authorises the change. The new key's own signature proves that its owner has it, and
    /// gives it no right.
    #[must_use]
    pub fn authority(&self) -> &[Signature] {
        match (&self.enroll, self.signatures.split_last()) {
            (Some(_), Some((_, authority))) => authority,
            _ => &self.signatures,
        }
    }

    fn encode_change(&self, writer: &mut Writer) {
        writer.u8(VERSION);
        writer.u8(u8::from(self.retire.is_some()) | u8::from(self.enroll.is_some()) << 1);
        self.retire.iter().for_each(|key| _ = writer.digest(&key.0));
        if let Some((node, public)) = &self.enroll {
            public.encode(writer.bytes(&node.0));
        }
    }

    /// Appends the encoding: version, flags, retired id, node and new key, signatures.
    pub fn encode(&self, writer: &mut Writer) {
        self.encode_change(writer);
        Signature::encode_all(&self.signatures, writer);
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.version(VERSION)?;
        let flags = reader.u8()?;
        if !(1..=3).contains(&flags) {
            return Err(reader.invalid("flags"));
        }
        let retire = if flags & 1 == 1 {
            Some(KeyId(reader.digest()?))
        } else {
            None
        };
        let enroll = match flags & 2 {
            2 => Some((NodeId(reader.array()?), PublicKey::decode(reader)?)),
            _ => None,
        };
        let signatures = Signature::decode_all(reader, MAX_SIGNATURES)?;
        Ok(Self {
            retire,
            enroll,
            signatures,
        })
    }
}

#[derive(Clone, Debug)]
struct Entry {
    public: PublicKey,
    // None for a key that a verifier was handed without the record that enrolled it.
    node: Option<NodeId>,
    retired: Option<u64>,
}

/// The keys at one step of a ledger.
#[derive(Clone, Debug, Default)]
pub struct Keyring {
    keys: BTreeMap<KeyId, Entry>,
    // The keys were handed over, not read from the ledger's beginning.
    handed: bool,
}

impl Keyring {
    /// Nobody may sign yet: the start of a ledger.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// `keys` may sign: for a part of a ledger that does not begin at its first record.
    #[must_use]
    pub fn trusting(keys: &[PublicKey]) -> Self {
        let entry = |key: &PublicKey| Entry {
            public: key.clone(),
            node: None,
            retired: None,
        };
        Self {
            keys: keys.iter().map(|key| (key.id(), entry(key))).collect(),
            handed: true,
        }
    }

    /// Whether a key was ever enrolled.
    #[must_use]
    pub fn knows(&self, key: KeyId) -> bool {
        self.keys.contains_key(&key)
    }

    /// Whether a key may sign for a node.
    #[must_use]
    pub fn may_sign(&self, key: KeyId, node: NodeId) -> bool {
        let entry = self.entry(key);
        entry.is_ok_and(|entry| entry.node.is_none_or(|owner| owner == node))
    }

    /// A key, if it is or was this node's.
    #[must_use]
    pub fn key_of(&self, node: NodeId, key: KeyId) -> Option<&PublicKey> {
        let entry = self.keys.get(&key)?;
        (entry.node == Some(node)).then_some(&entry.public)
    }

    /// The record that retired a key.
    #[must_use]
    pub fn retired_at(&self, key: KeyId) -> Option<u64> {
        self.keys.get(&key)?.retired
    }

    /// Keys that were retired by this record or a later one, and by which.
    pub fn retired_from(&self, index: u64) -> impl Iterator<Item = (KeyId, u64)> {
        let keys = self.keys.iter();
        let retired = keys.filter_map(|(id, entry)| Some((*id, entry.retired?)));
        retired.filter(move |(_, at)| *at >= index)
    }

    /// Active keys of a node, by algorithm.
    #[must_use]
    pub fn active_of(&self, node: NodeId) -> Vec<&PublicKey> {
        let own = self.active().filter(|(_, owner)| *owner == Some(node));
        let mut keys: Vec<_> = own.map(|(public, _)| public).collect();
        keys.sort_by_key(|public| public.algorithm);
        keys
    }

    /// How many keys of a node were ever enrolled.
    #[must_use]
    pub fn count_of(&self, node: NodeId) -> usize {
        let is_its = |entry: &&Entry| entry.node == Some(node);
        self.keys.values().filter(is_its).count()
    }

    /// What a node owes beside Ed25519, because it has such keys: whoever has one of its keys alone
    /// cannot leave the others out.
    #[must_use]
    pub fn owed(&self, node: NodeId, is_checkpoint: bool) -> Vec<Algorithm> {
        let keys = self.active_of(node).into_iter();
        let mut owed: Vec<_> = keys
            .map(PublicKey::algorithm)
            .filter(|algorithm| is_checkpoint || !algorithm.is_for_checkpoints())
            .collect();
        owed.dedup();
        owed
    }

    /// Whether the ring has no keys.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// All keys that were ever enrolled.
    pub fn all(&self) -> impl Iterator<Item = &PublicKey> {
        self.keys.values().map(|entry| &entry.public)
    }

    /// Keys whose right has not ended.
    pub fn active(&self) -> impl Iterator<Item = (&PublicKey, Option<NodeId>)> {
        let active = self.keys.values().filter(|entry| entry.retired.is_none());
        active.map(|entry| (&entry.public, entry.node))
    }

    fn entry(&self, key: KeyId) -> Result<&Entry, KeyError> {
        let entry = self.keys.get(&key).ok_or(KeyError::Unknown(key))?;
        match entry.retired {
            Some(at) => Err(KeyError::Retired { key, at }),
            None => Ok(entry),
        }
    }

    /// The key of a signature; `None` if a verifier who was handed some keys need not check it:
    /// what must be there is asked for elsewhere.
    fn needed(&self, signature: &Signature) -> Result<Option<&Entry>, KeyError> {
        match self.entry(signature.key) {
            Err(KeyError::Unknown(_))
                if self.handed && signature.algorithm != Algorithm::Ed25519 =>
            {
                Ok(None)
            }
            entry => entry.map(Some),
        }
    }

    /// Checks the signatures over an anchor of `node`: one for each algorithm, in order, all good,
    /// all by active keys of that node, and among them Ed25519 and what else is `required`.
    ///
    /// # Errors
    /// [`KeyError`] naming the first thing wrong.
    pub fn verify(
        &self,
        digest: &Digest,
        node: NodeId,
        signatures: &[Signature],
        required: &[Algorithm],
    ) -> Result<(), KeyError> {
        if !signatures.is_sorted_by(|a, b| a.algorithm < b.algorithm) {
            return Err(KeyError::Order);
        }
        for signature in signatures {
            let Some(entry) = self.needed(signature)? else {
                continue;
            };
            if entry.node.is_some_and(|owner| owner != node) {
                return Err(KeyError::OtherNode(signature.key));
            }
            entry.public.verify(digest, signature)?;
        }
        for algorithm in [Algorithm::Ed25519].iter().chain(required) {
            let is_it = |signature: &&Signature| signature.algorithm == *algorithm;
            let found = signatures.iter().find(is_it);
            let found = found.ok_or(KeyError::Missing(*algorithm))?;
            self.entry(found.key)?;
        }
        Ok(())
    }

    /// Applies the change in record `index`, which follows `previous`.
    ///
    /// A verifier of a part of a ledger was handed keys that the part may enrol, and need not know
    /// those that it retires: enrolling tells whose key it is, and what is not known signs nothing.
    ///
    /// # Errors
    /// [`KeyError`]; the ring is unchanged then.
    pub fn apply(
        &mut self,
        change: &KeyChange,
        (volume, index, previous): (VolumeId, u64, &Digest),
    ) -> Result<(), KeyError> {
        if let Some((node, public)) = &change.enroll {
            let possession = change.signatures.last().ok_or(KeyError::Order)?;
            public.verify(&KeyOffer::digest(volume, *node, public), possession)?;
            self.check_new(public.id())?;
        }
        if self.is_empty() && !self.handed {
            Self::check_first(change)?;
        } else {
            let digest = change.digest(volume, index, previous);
            self.check_authority(&digest, change.authority())?;
        }
        if let Some(key) = change.retire {
            self.check_retired(key, change)?;
            if let Some(entry) = self.keys.get_mut(&key) {
                entry.retired = Some(index);
            }
        }
        if let Some((node, public)) = &change.enroll {
            let entry = Entry {
                public: public.clone(),
                node: Some(*node),
                retired: None,
            };
            self.keys.insert(public.id(), entry);
        }
        Ok(())
    }

    fn check_new(&self, key: KeyId) -> Result<(), KeyError> {
        match self.keys.get(&key) {
            Some(entry) if self.handed && entry.node.is_none() && entry.retired.is_none() => Ok(()),
            Some(_) => Err(KeyError::Change("the key was enrolled before")),
            None if self.keys.len() >= MAX_KEYS => {
                Err(KeyError::Change("the ledger has enrolled its most keys"))
            }
            None => Ok(()),
        }
    }

    fn check_retired(&self, key: KeyId, change: &KeyChange) -> Result<(), KeyError> {
        if self.handed {
            // It may be unknown, and others that stay may be, too.
            return match self.entry(key) {
                Err(KeyError::Unknown(_)) => Ok(()),
                entry => entry.map(drop),
            };
        }
        self.entry(key)?;
        let is_classic = |public: &PublicKey| public.algorithm == Algorithm::Ed25519;
        let mut others = self.active().filter(|(public, _)| public.id() != key);
        let comes = change.enroll.as_ref();
        if others.any(|(public, _)| is_classic(public))
            || comes.is_some_and(|(_, public)| is_classic(public))
        {
            Ok(())
        } else {
            Err(KeyError::Change("no ed25519 key would be left"))
        }
    }

    fn check_first(change: &KeyChange) -> Result<(), KeyError> {
        let is_ed25519 = |(_, public): &(NodeId, PublicKey)| public.algorithm == Algorithm::Ed25519;
        if change.retire.is_some() || !change.authority().is_empty() {
            return Err(KeyError::Change("the first record only enrols a key"));
        }
        if !change.enroll.as_ref().is_some_and(is_ed25519) {
            return Err(KeyError::Change("the first key must be an ed25519 key"));
        }
        Ok(())
    }

    fn check_authority(&self, digest: &Digest, signatures: &[Signature]) -> Result<(), KeyError> {
        let first = signatures
            .first()
            .ok_or(KeyError::Missing(Algorithm::Ed25519))?;
        let node = self.entry(first.key)?.node;
        for signature in signatures {
            let Some(entry) = self.needed(signature)? else {
                continue;
            };
            let others = entry.node.zip(node).is_some_and(|(a, b)| a != b);
            if others || (!self.handed && entry.node != node) {
                return Err(KeyError::OtherNode(signature.key));
            }
            entry.public.verify(digest, signature)?;
        }
        if !signatures.is_sorted_by(|a, b| a.algorithm < b.algorithm) {
            return Err(KeyError::Order);
        }
        // Of a handed key whose owner is not known nothing can be asked.
        let active = self.active();
        let own = active.filter(|(_, owner)| owner.is_some() && *owner == node);
        for (public, _) in own {
            if !signatures
                .iter()
                .any(|signature| signature.algorithm == public.algorithm)
            {
                return Err(KeyError::Missing(public.algorithm));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
