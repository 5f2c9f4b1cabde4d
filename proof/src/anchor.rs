//! What one batch commits to: `scxq7.anchor.v1`. //= WORMHOLE_SPEC 5
//!
//! An anchor has three parts, and all three must speak of the same step or nothing commits:
//!
//! - `scxq2`: the batch root, the lanes' hashes, the dictionary that the segments were packed with;
//! - `idb`: its place in the ledger, the record and the anchor before it, the state root when
//!   known;
//! - `cm1`: the bytes of the delta log that it covers, contiguous from anchor to anchor.
//!
//! Its hash binds every field, and signatures sign that hash. Not here: signatures and which key
//! may make them ([`crate::sign`]), the order of anchors ([`crate::ledger`]).

use std::collections::BTreeMap;

use hn4::types::{ChainHash, Epoch, LaneId, LogOffset, NodeId, Term, VolumeId};
use serde::{Deserialize, Serialize};

use crate::batch::{Batch, LaneHash, MAX_LANES};
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, Digest};
use crate::sign::Signature;

/// Name of the document form.
pub const SCHEMA: &str = "scxq7.anchor.v1";
const VERSION: u8 = 1;

/// What kind of step the anchor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Phase {
    /// A batch like any other.
    Commit = 1,
    /// The last epoch is a marked checkpoint.
    Checkpoint = 2,
    /// A new primary adopts the durable tail of the one before it under its own term.
    Adopt = 3,
}

impl Phase {
    const ALL: [Self; 3] = [Self::Commit, Self::Checkpoint, Self::Adopt];
}

/// Root of the state tree at an epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StateAt {
    /// The checkpoint.
    pub epoch: Epoch,
    /// The root there.
    pub root: Digest,
}

/// An anchor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Anchor {
    /// The volume.
    pub volume: VolumeId,
    /// Term under which it is made; its node signs.
    pub term: Term,
    /// What kind of step it is.
    pub phase: Phase,
    /// Index of its record in the ledger.
    pub step: u64,
    /// Hash of the ledger's record before it.
    pub ledger_previous: Digest,
    /// Hash of the anchor before it; [`Digest::ZERO`] for the first.
    pub previous: Digest,
    /// First epoch of the batch.
    pub first: Epoch,
    /// Last epoch of the batch.
    pub last: Epoch,
    /// Hash of the last epoch's frame header.
    pub chain: ChainHash,
    /// Start of the covered bytes of the log.
    pub start: LogOffset,
    /// End of the covered bytes of the log.
    pub end: LogOffset,
    /// The batch root.
    pub proof_hash: Digest,
    /// The newest state root that is known and was not anchored before.
    pub state: Option<StateAt>,
    /// SHA-256 of the dictionary, if segments were packed with one.
    pub dictionary: Option<[u8; 32]>,
    /// Payload bytes of the batch.
    pub raw_bytes: u64,
    /// The same as they were packed.
    pub packed_bytes: u64,
    /// When it was made, in milliseconds since 1970. Informative, but bound like everything else.
    pub time_ms: u64,
    /// Hashes of the lanes that have records, in ascending order.
    pub lanes: Vec<LaneHash>,
}

/// The parts of an anchor that its batch does not determine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// Term under which it is made.
    pub term: Term,
    /// What kind of step it is.
    pub phase: Phase,
    /// Index that its record will have in the ledger.
    pub step: u64,
    /// Hash of the ledger's last record.
    pub ledger_previous: Digest,
    /// Hash of the last anchor.
    pub previous: Digest,
    /// A state root to anchor.
    pub state: Option<StateAt>,
    /// Dictionary in use.
    pub dictionary: Option<[u8; 32]>,
    /// Payload bytes of the batch, raw and packed.
    pub bytes: (u64, u64),
    /// Milliseconds since 1970.
    pub time_ms: u64,
}

/// An anchor and a batch that was computed from the log here do not speak of the same step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the anchor of step {step} and the log disagree about the {part}: refuse it, suspect the peer"
)]
pub struct Disagreement {
    /// The anchor's step.
    pub step: u64,
    /// The first part in which they differ.
    pub part: &'static str,
}

impl Anchor {
    /// Anchors a batch.
    #[must_use]
    pub fn new(batch: &Batch, step: Step) -> Self {
        Self {
            volume: batch.volume,
            term: step.term,
            phase: step.phase,
            step: step.step,
            ledger_previous: step.ledger_previous,
            previous: step.previous,
            first: batch.first,
            last: batch.last,
            chain: batch.chain,
            start: batch.start,
            end: batch.end,
            proof_hash: batch.proof_hash,
            state: step.state,
            dictionary: step.dictionary,
            raw_bytes: step.bytes.0,
            packed_bytes: step.bytes.1,
            time_ms: step.time_ms,
            lanes: batch.lanes.clone(),
        }
    }

    /// The hash that signatures sign and the next anchor names.
    #[must_use]
    pub fn hash(&self) -> Digest {
        hash::ANCHOR.hash(&[&self.encoded()])
    }

    /// Compares with a batch that was computed from the received log.
    ///
    /// # Errors
    /// [`Disagreement`] naming the first part that differs.
    pub fn agrees_with(&self, batch: &Batch) -> Result<(), Disagreement> {
        let parts = [
            (self.volume == batch.volume, "volume"),
            (
                (self.first, self.last) == (batch.first, batch.last),
                "epochs",
            ),
            (
                (self.start, self.end) == (batch.start, batch.end),
                "log offsets",
            ),
            (self.chain == batch.chain, "chain of frame headers"),
            (self.lanes == batch.lanes, "lane hashes"),
            (self.proof_hash == batch.proof_hash, "batch root"),
        ];
        match parts.iter().find(|(is_same, _)| !is_same) {
            Some((_, part)) => Err(Disagreement {
                step: self.step,
                part,
            }),
            None => Ok(()),
        }
    }

    /// The encoding, as a buffer.
    #[must_use]
    pub fn encoded(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        self.encode(&mut writer);
        writer.finish()
    }

    /// Appends the encoding. `docs/PROOF_FORMAT.md` lists it field by field.
    pub fn encode(&self, writer: &mut Writer) {
        writer
            .u8(VERSION)
            .u8(self.phase as u8)
            .bytes(&self.volume.0);
        writer.u64(self.term.counter).bytes(&self.term.node.0);
        writer
            .u64(self.step)
            .digest(&self.ledger_previous)
            .digest(&self.previous);
        writer
            .u64(self.first.0)
            .u64(self.last.0)
            .bytes(&self.chain.0);
        writer
            .u64(self.start.0)
            .u64(self.end.0)
            .digest(&self.proof_hash);
        match self.state {
            Some(state) => writer.u8(1).u64(state.epoch.0).digest(&state.root),
            None => writer.u8(0),
        };
        match self.dictionary {
            Some(dictionary) => writer.u8(1).bytes(&dictionary),
            None => writer.u8(0),
        };
        writer
            .u64(self.raw_bytes)
            .u64(self.packed_bytes)
            .u64(self.time_ms);
        writer.count(self.lanes.len());
        self.lanes
            .iter()
            .for_each(|lane| _ = writer.u16(lane.lane.0).digest(&lane.hash));
    }

    /// Reads an encoding, and checks that epochs and offsets run forward and lanes ascend.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.version(VERSION)?;
        let phase = reader.u8()?;
        let phase = Phase::ALL.into_iter().find(|known| *known as u8 == phase);
        let phase = phase.ok_or_else(|| reader.invalid("phase"))?;
        let volume = VolumeId(reader.array()?);
        let term = Term {
            counter: reader.u64()?,
            node: NodeId(reader.array()?),
        };
        let step = reader.u64()?;
        let (ledger_previous, previous) = (reader.digest()?, reader.digest()?);
        let (first, last) = (Epoch(reader.u64()?), Epoch(reader.u64()?));
        let chain = ChainHash(reader.array()?);
        let (start, end) = (LogOffset(reader.u64()?), LogOffset(reader.u64()?));
        let proof_hash = reader.digest()?;
        let state = match reader.u8()? {
            0 => None,
            1 => Some(StateAt {
                epoch: Epoch(reader.u64()?),
                root: reader.digest()?,
            }),
            _ => return Err(reader.invalid("state flag")),
        };
        let dictionary = match reader.u8()? {
            0 => None,
            1 => Some(reader.array()?),
            _ => return Err(reader.invalid("dictionary flag")),
        };
        let (raw_bytes, packed_bytes, time_ms) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let count = reader.count(MAX_LANES, "number of lanes")?;
        let lane = |reader: &mut Reader<'_>| {
            Ok(LaneHash {
                lane: LaneId(reader.u16()?),
                hash: reader.digest()?,
            })
        };
        let lanes: Vec<LaneHash> = (0..count).map(|_| lane(reader)).collect::<Result<_, _>>()?;
        let anchor = Self {
            volume,
            term,
            phase,
            step,
            ledger_previous,
            previous,
            first,
            last,
            chain,
            start,
            end,
            proof_hash,
            state,
            dictionary,
            raw_bytes,
            packed_bytes,
            time_ms,
            lanes,
        };
        match anchor.malformed() {
            Some(field) => Err(reader.invalid(field)),
            None => Ok(anchor),
        }
    }

    fn malformed(&self) -> Option<&'static str> {
        let checks = [
            (
                self.first <= self.last && self.last.0 < u64::MAX,
                "epoch range",
            ),
            (self.start < self.end, "log offsets"),
            (
                self.lanes.is_sorted_by(|a, b| a.lane < b.lane),
                "order of lanes",
            ),
            (self.lanes.len() <= MAX_LANES, "number of lanes"),
            (
                self.state.is_none_or(|state| state.epoch <= self.last),
                "state epoch",
            ),
        ];
        checks
            .into_iter()
            .find(|(is_good, _)| !is_good)
            .map(|(_, field)| field)
    }
}

/// An anchor with its signatures: the body of a ledger record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SignedAnchor {
    /// The anchor.
    pub anchor: Anchor,
    /// One for each algorithm, in the order of the algorithms.
    pub signatures: Vec<Signature>,
}

impl SignedAnchor {
    /// Appends the encoding: the anchor, then the signatures.
    pub fn encode(&self, writer: &mut Writer) {
        self.anchor.encode(writer);
        Signature::encode_all(&self.signatures, writer);
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let anchor = Anchor::decode(reader)?;
        let signatures = Signature::decode_all(reader, Signature::MAX)?;
        Ok(Self { anchor, signatures })
    }
}

/// `blake3:<hex>`, as documents write a digest.
#[must_use]
pub fn blake3_text(digest: &Digest) -> String {
    format!("blake3:{digest}")
}

/// `sha256:<hex>`, as documents write a dictionary id.
#[must_use]
pub fn sha256_text(id: &[u8; 32]) -> String {
    format!("sha256:{}", Digest(*id))
}

/// The JSON form of an anchor, `scxq7.anchor.v1`. It is a projection: the encoding is what is
/// signed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnchorDocument {
    /// [`SCHEMA`].
    pub schema: String,
    /// What was done.
    pub scxq2: Scxq2Part,
    /// Where it stands in the ledger.
    pub idb: IdbPart,
    /// Where it stands in the log.
    pub cm1: Cm1Part,
}

/// The `scxq2` part.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scxq2Part {
    /// The batch root.
    pub proof_hash: String,
    /// The dictionary, or null.
    pub dictionary_id: Option<String>,
    /// `L<lane>` to hash.
    pub lane_hashes: BTreeMap<String, String>,
}

/// The `idb` part.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdbPart {
    /// The state root, or null while it is not known.
    pub state_hash: Option<String>,
    /// Index in the ledger.
    pub step_id: u64,
}

/// The `cm1` part.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cm1Part {
    /// What kind of step it is.
    pub phase: Phase,
    /// Covered bytes of the log.
    pub offsets: Offsets,
}

/// A range of bytes of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offsets {
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
}

impl From<&Anchor> for AnchorDocument {
    fn from(anchor: &Anchor) -> Self {
        let lane = |lane: &LaneHash| (format!("L{}", lane.lane.0), blake3_text(&lane.hash));
        Self {
            schema: SCHEMA.to_owned(),
            scxq2: Scxq2Part {
                proof_hash: blake3_text(&anchor.proof_hash),
                dictionary_id: anchor.dictionary.as_ref().map(sha256_text),
                lane_hashes: anchor.lanes.iter().map(lane).collect(),
            },
            idb: IdbPart {
                state_hash: anchor.state.map(|state| blake3_text(&state.root)),
                step_id: anchor.step,
            },
            cm1: Cm1Part {
                phase: anchor.phase,
                offsets: Offsets {
                    start: anchor.start.0,
                    end: anchor.end.0,
                },
            },
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::batch::batch_digest;
    use crate::fold::{self, Kind};

    pub(crate) fn batch(first: u64, last: u64) -> Batch {
        let volume = VolumeId([4; 16]);
        let root = |epoch: u64| hash::EPOCH.hash(&[&epoch.to_le_bytes()]);
        let roots: Vec<Digest> = (first..=last).map(root).collect();
        let (first, last) = (Epoch(first), Epoch(last));
        let fold = fold::root(Kind::Epochs, &roots);
        Batch {
            volume,
            first,
            last,
            chain: ChainHash([last.0.to_le_bytes()[0]; 32]),
            start: LogOffset(first.0 * 4096),
            end: LogOffset((last.0 + 1) * 4096),
            proof_hash: batch_digest(volume, first, last, &fold),
            lanes: vec![
                LaneHash {
                    lane: LaneId(0),
                    hash: Digest([1; 32]),
                },
                LaneHash {
                    lane: LaneId(3),
                    hash: Digest([2; 32]),
                },
            ],
            roots,
        }
    }

    pub(crate) fn step(step: u64) -> Step {
        Step {
            term: Term {
                counter: 1,
                node: NodeId([2; 16]),
            },
            phase: Phase::Commit,
            step,
            ledger_previous: Digest([3; 32]),
            previous: Digest::ZERO,
            state: None,
            dictionary: None,
            bytes: (8192, 4096),
            time_ms: 1_700_000_000_000,
        }
    }

    fn full() -> Anchor {
        let state = StateAt {
            epoch: Epoch(7),
            root: Digest([8; 32]),
        };
        let step = Step {
            state: Some(state),
            dictionary: Some([9; 32]),
            ..step(5)
        };
        Anchor::new(&batch(3, 9), step)
    }

    #[test]
    fn a_flipped_bit_in_an_anchor_changes_its_hash_or_is_refused() {
        for anchor in [full(), Anchor::new(&batch(3, 9), step(5))] {
            let good = anchor.encoded();
            let mut reader = Reader::new("anchor", &good);
            assert_eq!(Anchor::decode(&mut reader).unwrap(), anchor);
            assert_eq!(reader.finish(), Ok(()));
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                let mut reader = Reader::new("anchor", &bad);
                let Ok(other) = Anchor::decode(&mut reader) else {
                    continue;
                };
                assert!(
                    reader.finish().is_err() || other.hash() != anchor.hash(),
                    "bit {bit}"
                );
            }
        }
    }

    #[test]
    fn an_anchor_that_runs_backwards_is_no_anchor() {
        let spoil: [fn(&mut Anchor); 5] = [
            |anchor| anchor.last = Epoch(2),
            |anchor| anchor.end = anchor.start,
            |anchor| anchor.lanes.reverse(),
            |anchor| anchor.lanes[1].lane = LaneId(0),
            |anchor| {
                anchor.state = Some(StateAt {
                    epoch: Epoch(10),
                    root: Digest::ZERO,
                })
            },
        ];
        for spoil in spoil {
            let mut anchor = full();
            spoil(&mut anchor);
            assert!(Anchor::decode(&mut Reader::new("anchor", &anchor.encoded())).is_err());
        }
    }

    #[test]
    fn an_anchor_agrees_with_its_batch_and_with_no_other() {
        let anchor = full();
        assert_eq!(anchor.agrees_with(&batch(3, 9)), Ok(()));
        type Spoil = fn(&mut Batch);
        let spoil: [(Spoil, &str); 6] = [
            (|batch| batch.volume = VolumeId([0; 16]), "volume"),
            (|batch| batch.last = Epoch(10), "epochs"),
            (|batch| batch.start = LogOffset(0), "log offsets"),
            (
                |batch| batch.chain = ChainHash::default(),
                "chain of frame headers",
            ),
            (|batch| batch.lanes.truncate(1), "lane hashes"),
            (|batch| batch.proof_hash = Digest::ZERO, "batch root"),
        ];
        for (spoil, part) in spoil {
            let mut batch = batch(3, 9);
            spoil(&mut batch);
            assert_eq!(
                anchor.agrees_with(&batch),
                Err(Disagreement { step: 5, part })
            );
        }
    }

    #[test]
    fn the_document_has_the_reference_s_field_names() {
        let text = serde_json::to_string(&AnchorDocument::from(&full())).unwrap();
        let proof = full().proof_hash;
        let expected = format!(
            "{{\"schema\":\"scxq7.anchor.v1\",\"scxq2\":{{\"proof_hash\":\"blake3:{proof}\",\
             \"dictionary_id\":\"sha256:{}\",\"lane_hashes\":{{\"L0\":\"blake3:{}\",\
             \"L3\":\"blake3:{}\"}}}},\"idb\":{{\"state_hash\":\"blake3:{}\",\"step_id\":5}},\
             \"cm1\":{{\"phase\":\"commit\",\"offsets\":{{\"start\":12288,\"end\":40960}}}}}}",
            "09".repeat(32),
            "01".repeat(32),
            "02".repeat(32),
            "08".repeat(32),
        );
        assert_eq!(text, expected);
    }
}
