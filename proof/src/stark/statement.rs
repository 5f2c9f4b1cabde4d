//! What the node says about a part of the chain, and signs.
//!
//! The anchors do not hold the links, so somebody has to say where the chain stands at the two
//! ends; that is the node, with the keys that it signs anchors with.

use hn4::types::{NodeId, VolumeId};

use super::air::Claim;
use super::chain::{Link, Part};
use super::{BATCHES_MAX, BATCHES_MIN};
use crate::anchor::Anchor;
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, Digest};

const VERSION: u8 = 1;

/// The statement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Statement {
    /// The volume.
    pub volume: VolumeId,
    /// Who says so.
    pub node: NodeId,
    /// Hash of the anchor of the first batch.
    pub first: Digest,
    /// Hash of the anchor of the last batch.
    pub last: Digest,
    /// Number of batches of the ledger before the first one.
    pub index: u64,
    /// Number of batches.
    pub count: u64,
    /// The link before the first root.
    pub start: Link,
    /// The link after the last root.
    pub end: Link,
    /// Payload bytes of the batches, raw.
    pub raw_bytes: u64,
    /// The same as they were packed.
    pub packed_bytes: u64,
    /// When it was made, in milliseconds since 1970.
    pub time_ms: u64,
}

impl Statement {
    /// About a part of the chain.
    #[must_use]
    pub fn new(part: &Part, node: NodeId, time_ms: u64) -> Self {
        Self {
            volume: part.first.anchor.volume,
            node,
            first: part.first.anchor.hash(),
            last: part.last.anchor.hash(),
            index: part.index,
            count: part.roots.len() as u64,
            start: part.start,
            end: part.end,
            raw_bytes: part.raw_bytes,
            packed_bytes: part.packed_bytes,
            time_ms,
        }
    }

    /// What the signatures sign.
    #[must_use]
    pub fn hash(&self) -> Digest {
        let mut writer = Writer::new();
        self.encode(&mut writer);
        hash::CHAIN_STATEMENT.hash(&[writer.as_slice()])
    }

    pub(super) fn encode(&self, writer: &mut Writer) {
        writer.u8(VERSION).bytes(&self.volume.0).bytes(&self.node.0);
        writer.digest(&self.first).digest(&self.last);
        writer.u64(self.index).u64(self.count);
        self.start.encode(writer);
        self.end.encode(writer);
        writer
            .u64(self.raw_bytes)
            .u64(self.packed_bytes)
            .u64(self.time_ms);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.version(VERSION)?;
        Ok(Self {
            volume: VolumeId(reader.array()?),
            node: NodeId(reader.array()?),
            first: reader.digest()?,
            last: reader.digest()?,
            index: reader.u64()?,
            count: reader.u64()?,
            start: Link::decode(reader)?,
            end: Link::decode(reader)?,
            raw_bytes: reader.u64()?,
            packed_bytes: reader.u64()?,
            time_ms: reader.u64()?,
        })
    }

    /// What is left to be proven of it, between these anchors. The proof holds for this statement
    /// only: its hash is part of the claim.
    pub(super) fn claim(&self, first: &Anchor, last: &Anchor) -> Claim {
        Claim {
            count: self.count,
            start: self.start,
            end: self.end,
            first: first.proof_hash,
            last: last.proof_hash,
            context: self.hash(),
        }
    }

    /// The first thing in it that contradicts the anchors, or in which they contradict each other.
    ///
    /// Batches are contiguous: each has an epoch, bytes of the log and a record of the ledger at
    /// least, so that the anchors bound how many there can be between them.
    pub(super) fn misfit(&self, first: &Anchor, last: &Anchor) -> Option<&'static str> {
        let counts = BATCHES_MIN as u64..=BATCHES_MAX as u64;
        if !counts.contains(&self.count) {
            return Some("number of batches");
        }
        let between = self.count - 2;
        // Nothing lies between neighbours, and there is room for what lies between others.
        let has_room = |from: Option<u64>| match (between, from) {
            (0, Some(room)) => room == 0,
            (_, room) => room.is_some_and(|room| room >= between),
        };
        let (epochs, log) = (
            last.first.0.checked_sub(first.last.next().0),
            last.start.0.checked_sub(first.end.0),
        );
        let records = last.step.checked_sub(first.step);
        let begins = self.index == 0;
        let bytes = |of: fn(&Anchor) -> u64| of(first).saturating_add(of(last));
        let checks = [
            (
                [first.volume, last.volume] == [self.volume; 2],
                "volume of an anchor",
            ),
            (self.first == first.hash(), "first anchor"),
            (self.last == last.hash(), "last anchor"),
            (has_room(epochs), "epochs between the anchors"),
            (has_room(log), "log between the anchors"),
            (
                records.is_some_and(|records| records > between),
                "records between the anchors",
            ),
            (
                between > 0 || last.previous == self.first,
                "anchor before the last",
            ),
            (last.term.counter >= first.term.counter, "terms"),
            (
                self.index < first.step,
                "number of batches before the first",
            ),
            (
                begins == (first.previous == Digest::ZERO),
                "anchor before the first",
            ),
            (
                !begins || self.start == Link::start(self.volume),
                "link before the first batch of the ledger",
            ),
            (self.raw_bytes >= bytes(|it| it.raw_bytes), "raw bytes"),
            (
                self.packed_bytes >= bytes(|it| it.packed_bytes),
                "packed bytes",
            ),
        ];
        let wrong = checks.into_iter().find(|(is_good, _)| !is_good);
        wrong.map(|(_, part)| part)
    }
}
