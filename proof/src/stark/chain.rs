//! The chain of batch roots in a form that a proof can follow cheaply.
//!
//! ```text
//! link 0     = Rp64_256(words of H("chain start", volume))
//! link i + 1 = Rp64_256(link i | words of batch root i)
//! ```
//!
//! `Rp64_256` is Rescue-Prime over the field of `p = 2^64 - 2^32 + 1`, four elements of output. A
//! digest of 32 bytes becomes eight elements, its little-endian words of 32 bits: two digests never
//! have the same words, for every word is less than p.

use std::fmt;

use hn4::types::{Epoch, VolumeId};
use winterfell::crypto::ElementHasher;
use winterfell::crypto::hashers::Rp64_256;
use winterfell::math::StarkField;
use winterfell::math::fields::f64::BaseElement;

use super::{BATCHES_MAX, BATCHES_MIN, StarkError};
use crate::anchor::SignedAnchor;
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, DIGEST_BYTES, Digest};

/// Elements in a link.
pub(super) const LINK_ELEMENTS: usize = 4;
/// Elements that stand for a digest.
pub(super) const WORDS: usize = DIGEST_BYTES / 4;

/// The words of a digest.
pub(super) fn words(digest: &Digest) -> [BaseElement; WORDS] {
    let mut words = [BaseElement::new(0); WORDS];
    for (word, bytes) in words.iter_mut().zip(digest.0.as_chunks().0) {
        *word = BaseElement::from(u32::from_le_bytes(*bytes));
    }
    words
}

/// A value of the chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link(pub(super) [BaseElement; LINK_ELEMENTS]);

impl fmt::Display for Link {
    /// `rp64-256:<hex>` of the encoding.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rp64-256:{}", Digest(self.bytes()))
    }
}

impl Link {
    fn hash(elements: &[BaseElement]) -> Self {
        let digest = Rp64_256::hash_elements(elements);
        let mut link = [BaseElement::new(0); LINK_ELEMENTS];
        link.copy_from_slice(digest.as_elements());
        Self(link)
    }

    /// The one that comes before the first batch of a volume's ledger.
    #[must_use]
    pub fn start(volume: VolumeId) -> Self {
        Self::hash(&words(&hash::CHAIN_START.hash(&[&volume.0])))
    }

    /// The next one.
    #[must_use]
    pub fn then(&self, root: &Digest) -> Self {
        let mut elements = [BaseElement::new(0); LINK_ELEMENTS + WORDS];
        elements[..LINK_ELEMENTS].copy_from_slice(&self.0);
        elements[LINK_ELEMENTS..].copy_from_slice(&words(root));
        Self::hash(&elements)
    }

    fn bytes(&self) -> [u8; DIGEST_BYTES] {
        let mut bytes = [0; DIGEST_BYTES];
        for (bytes, element) in bytes.chunks_exact_mut(8).zip(self.0) {
            bytes.copy_from_slice(&element.as_int().to_le_bytes());
        }
        bytes
    }

    /// Appends the encoding: the elements, as numbers below p.
    pub(super) fn encode(&self, writer: &mut Writer) {
        writer.bytes(&self.bytes());
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one: an element has one encoding only.
    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut link = [BaseElement::new(0); LINK_ELEMENTS];
        for element in &mut link {
            let number = reader.u64()?;
            if number >= BaseElement::MODULUS {
                return Err(reader.invalid("link"));
            }
            *element = BaseElement::new(number);
        }
        Ok(Self(link))
    }
}

/// A part of a volume's chain, with what it leads over.
#[derive(Clone, Debug)]
pub struct Part {
    /// Number of batches of the ledger before it.
    pub index: u64,
    /// The link before the first root.
    pub start: Link,
    /// The link after the last root.
    pub end: Link,
    /// The roots.
    pub roots: Vec<Digest>,
    /// The anchor of the first root.
    pub first: SignedAnchor,
    /// The anchor of the last root.
    pub last: SignedAnchor,
    /// Payload bytes of the batches, raw.
    pub raw_bytes: u64,
    /// The same as they were packed.
    pub packed_bytes: u64,
}

/// Follows the chain through a ledger, and keeps the part that covers a range of epochs.
#[derive(Clone, Debug)]
pub struct Collector {
    wanted: (Epoch, Epoch),
    index: u64,
    link: Link,
    part: Option<Part>,
}

impl Collector {
    /// For the anchors of a volume's ledger, from its first one on.
    #[must_use]
    pub fn new(volume: VolumeId, first: Epoch, last: Epoch) -> Self {
        Self {
            wanted: (first, last),
            index: 0,
            link: Link::start(volume),
            part: None,
        }
    }

    fn is_done(&self) -> bool {
        let end = self.part.as_ref().map(|part| part.last.anchor.last);
        end.is_some_and(|end| end >= self.wanted.1)
    }

    /// Takes the next anchor; what comes after the range is left out.
    ///
    /// # Errors
    /// [`StarkError::Batches`] if the range has more batches than one proof may have.
    pub fn push(&mut self, signed: &SignedAnchor) -> Result<(), StarkError> {
        if self.is_done() {
            return Ok(());
        }
        let anchor = &signed.anchor;
        let link = self.link.then(&anchor.proof_hash);
        let covers = (anchor.first..=anchor.last).contains(&self.wanted.0);
        match &mut self.part {
            Some(part) => {
                part.roots.push(anchor.proof_hash);
                part.end = link;
                part.last = signed.clone();
                part.raw_bytes = part.raw_bytes.saturating_add(anchor.raw_bytes);
                part.packed_bytes = part.packed_bytes.saturating_add(anchor.packed_bytes);
                let count = part.roots.len();
                if count > BATCHES_MAX {
                    return Err(StarkError::Batches(count as u64));
                }
            }
            None if covers => {
                self.part = Some(Part {
                    index: self.index,
                    start: self.link,
                    end: link,
                    roots: vec![anchor.proof_hash],
                    first: signed.clone(),
                    last: signed.clone(),
                    raw_bytes: anchor.raw_bytes,
                    packed_bytes: anchor.packed_bytes,
                });
            }
            None => {}
        }
        (self.index, self.link) = (self.index + 1, link);
        Ok(())
    }

    /// The part, when all anchors are in.
    ///
    /// # Errors
    /// [`StarkError::NotAnchored`] if the anchors do not cover the range, [`StarkError::Batches`]
    /// if it has too few batches for a proof to be worth anything.
    pub fn finish(self) -> Result<Part, StarkError> {
        let (first, last) = self.wanted;
        if !self.is_done() {
            return Err(StarkError::NotAnchored { first, last });
        }
        let part = self.part.ok_or(StarkError::NotAnchored { first, last })?;
        match part.roots.len() {
            count if count < BATCHES_MIN => Err(StarkError::Batches(count as u64)),
            _ => Ok(part),
        }
    }
}
