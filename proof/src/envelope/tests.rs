//! Good documents are accepted; each way to spoil one is refused at its own step.

use std::collections::BTreeMap;

use hn4::types::{BlockIndex, ChainHash, LaneId, Lba, LogOffset, NodeId};
use proptest::prelude::*;

use super::aggregate::{Aggregate, AggregateError, verify_compact, verify_range};
use super::block::{Base, BlockProof, Claim, ClaimError, EpochTable, RecordBase};
use super::*;
use crate::anchor::StateAt;
use crate::anchor::tests::{batch, step};
use crate::batch::{BatchPolicy, Batcher};
use crate::blocks;
use crate::fold::{InclusionProof, Kind};
use crate::leaf::{
    Coordinates, EpochBuilder, LeafKind, RecordLeaf, RecordProof, payload_hash, piece_of,
};
use crate::ledger::tests::{Ledger, VOLUME, key, public};
use crate::ledger::verify::LedgerError;
use crate::ledger::{Body, Record};
use crate::tree::path::BlockPath;
use crate::tree::view::Nodes;
use crate::tree::view::tests::Model;

const NODE: NodeId = NodeId([2; 16]);

fn signed(anchor: Anchor) -> SignedAnchor {
    let signatures = vec![key(1).sign(&anchor.hash()).unwrap()];
    SignedAnchor { anchor, signatures }
}

fn sample() -> SignedAnchor {
    let mut anchor = Anchor::new(&batch(3, 9), step(5));
    anchor.dictionary = Some([9; 32]);
    signed(anchor)
}

fn ring() -> Keyring {
    Keyring::trusting(&[public(1)])
}

fn check(text: &str) -> Result<Verified, EnvelopeError> {
    verify(text, &ring(), &Policy::default())
}

#[test]
fn an_envelope_holds_for_its_data_and_its_key_only() {
    let text = Envelope::new(&sample()).to_json().unwrap();
    let verified = check(&text).unwrap();
    assert_eq!(verified.check(&batch(3, 9)), Ok(()));
    assert!(matches!(
        verified.check(&batch(3, 8)),
        Err(EnvelopeError::Data(_))
    ));
    let other = Keyring::trusting(&[public(2)]);
    let refused = verify(&text, &other, &Policy::default());
    assert!(matches!(
        refused,
        Err(EnvelopeError::Signature(KeyError::Unknown(_)))
    ));
    // Others may write the same document with other white space.
    let pretty: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        check(&serde_json::to_string_pretty(&pretty).unwrap()),
        Ok(verified)
    );
}

#[test]
fn proof_corruption_a_flipped_bit_in_an_envelope_is_refused() {
    let good = Envelope::new(&sample()).to_json().unwrap().into_bytes();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let Ok(text) = String::from_utf8(bad) else {
            continue;
        };
        assert!(check(&text).is_err(), "bit {bit}: {text}");
    }
}

#[test]
fn each_step_fails_with_its_own_error() {
    let good = Envelope::new(&sample());
    type Spoil = fn(&mut Envelope);
    let fields: [(Spoil, &str); 5] = [
        (|bad| bad.subject.byte_length += 1, "subject"),
        (|bad| bad.compression.ratio = 0.25, "compression"),
        (|bad| bad.integrity.chunk_hashes.reverse(), "integrity"),
        (|bad| bad.timestamp.push(' '), "timestamp"),
        (|bad| bad.signatures[0].key_id.push('0'), "signatures"),
    ];
    for (spoil, field) in fields {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert_eq!(
            check(&bad.to_json().unwrap()),
            Err(EnvelopeError::Field(field))
        );
    }
    let mut bad = good.clone();
    bad.integrity.root_hash = blake3_text(&Digest::ZERO);
    assert_eq!(check(&bad.to_json().unwrap()), Err(EnvelopeError::Root));
    let mut bad = good.clone();
    bad.proof.kind = "zk-stark".to_owned();
    assert!(matches!(
        check(&bad.to_json().unwrap()),
        Err(EnvelopeError::Schema(_))
    ));
    let mut bad = good.clone();
    bad.signatures.clear();
    let missing = EnvelopeError::Signature(KeyError::Missing(Algorithm::Ed25519));
    assert_eq!(check(&bad.to_json().unwrap()), Err(missing));
    let long = " ".repeat(MAX_ENVELOPE_BYTES + 1);
    assert_eq!(check(&long), Err(EnvelopeError::TooLong(long.len())));
    assert!(matches!(check("{}"), Err(EnvelopeError::Json(_))));
}

/// Records of a ledger: key, anchors 1-2, 3-3, a rotation, 4-6, 7-7.
fn range() -> (Ledger, Vec<Vec<u8>>) {
    let mut ledger = Ledger::new();
    let records = vec![
        ledger.anchor(2),
        ledger.anchor(1),
        ledger.change(Some(1), Some(2), &[1, 2]).unwrap(),
        ledger.anchor(3),
        ledger.anchor(1),
    ];
    (ledger, records)
}

fn check_range(records: &[Vec<u8>], first: u64, last: u64) -> Result<(), AggregateError> {
    let text = Aggregate::with_records(records)?.to_json()?;
    let asked = (VOLUME, Epoch(first), Epoch(last));
    verify_range(&text, asked, &[public(1)], Policy::default()).map(|_| ())
}

#[test]
fn a_range_verifies_with_a_public_key_and_no_spoiled_one_does() {
    let (_, records) = range();
    assert!(check_range(&records, 1, 7).is_ok());
    assert!(check_range(&records, 3, 4).is_ok());
    // An epoch that is not covered.
    assert!(matches!(
        check_range(&records, 1, 8),
        Err(AggregateError::Range { .. })
    ));
    // A missing anchor, swapped anchors, a changed byte.
    let missing = [&records[..1], &records[2..]].concat();
    assert!(matches!(
        check_range(&missing, 1, 7),
        Err(AggregateError::Ledger(LedgerError::Index { .. }))
    ));
    let mut swapped = records.clone();
    swapped.swap(0, 1);
    assert!(matches!(
        check_range(&swapped, 1, 7),
        Err(AggregateError::Ledger(_))
    ));
    let mut changed = records.clone();
    changed[3][90] ^= 1;
    assert!(matches!(
        check_range(&changed, 1, 7),
        Err(AggregateError::Ledger(_))
    ));
    // Another key, another volume.
    let text = Aggregate::with_records(&records)
        .unwrap()
        .to_json()
        .unwrap();
    let verify = |volume, seed| {
        let asked = (volume, Epoch(1), Epoch(7));
        verify_range(&text, asked, &[public(seed)], Policy::default())
    };
    assert!(matches!(
        verify(VOLUME, 9),
        Err(AggregateError::Ledger(LedgerError::Key { .. }))
    ));
    let other = verify(VolumeId([0; 16]), 1);
    assert!(matches!(other, Err(AggregateError::OtherVolume { .. })));
    assert_eq!(verify(VOLUME, 1).unwrap().anchors.len(), 4);
}

#[test]
fn a_flipped_bit_in_a_range_is_refused() {
    let (_, records) = range();
    let text = Aggregate::with_records(&records[..2])
        .unwrap()
        .to_json()
        .unwrap();
    let asked = (VOLUME, Epoch(1), Epoch(3));
    let verify = |text: &str| verify_range(text, asked, &[public(1)], Policy::default());
    assert!(verify(&text).is_ok());
    for bit in 0..text.len() * 8 {
        let mut bad = text.clone().into_bytes();
        bad[bit / 8] ^= 1 << (bit % 8);
        let Ok(bad) = String::from_utf8(bad) else {
            continue;
        };
        assert!(verify(&bad).is_err(), "bit {bit}: {bad}");
    }
}

#[test]
fn documents_have_the_same_contents_in_protobuf() {
    let (_, records) = range();
    let aggregate = Aggregate::with_records(&records).unwrap();
    let bytes = aggregate.to_protobuf().unwrap();
    assert_eq!(Aggregate::from_protobuf(&bytes), Ok(aggregate));
    let Body::Anchor(signed) = Record::decode(&records[0]).unwrap().0.body else {
        panic!("an anchor begins the range");
    };
    let envelope = Envelope::new(&signed);
    let bytes = envelope.to_protobuf().unwrap();
    assert_eq!(Envelope::from_protobuf(&bytes).as_ref(), Ok(&envelope));
    let policy = Policy::default();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let Ok(bad) = Envelope::from_protobuf(&bad) else {
            continue;
        };
        let good = verify_envelope(bad.clone(), &ring(), &policy).is_ok();
        assert!(!good, "bit {bit}: {bad:?}");
    }
    // What is not known is refused, and so is what is cut off.
    let mut more = bytes.clone();
    more.extend([0x78, 1]);
    assert!(Envelope::from_protobuf(&more).is_err());
    assert!(Envelope::from_protobuf(&bytes[..bytes.len() - 1]).is_err());
}

proptest! {
    #[test]
    fn bytes_of_a_stranger_are_a_document_or_an_error(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        _ = Envelope::from_protobuf(&bytes);
        _ = Aggregate::from_protobuf(&bytes);
        _ = claim::BlockDocument::from_protobuf(&bytes);
    }
}

#[test]
fn one_signature_covers_many_proofs_and_each_is_provably_among_them() {
    let (_, records) = range();
    let anchors: Vec<SignedAnchor> = records
        .iter()
        .filter_map(|bytes| match Record::decode(bytes).unwrap().0.body {
            Body::Anchor(signed) => Some(*signed),
            _ => None,
        })
        .collect();
    let aggregate = Aggregate::compact(&anchors, &[&key(1)]).unwrap();
    let text = aggregate.to_json().unwrap();
    let verify = |text: &str| verify_compact(text, VOLUME, (&ring(), NODE), &Policy::default());
    let proven = verify(&text).unwrap();
    assert_eq!((proven.first, proven.last), (Epoch(1), Epoch(7)));
    let root = crate::fold::root(Kind::Aggregate, &proven.proof_hashes);
    let head = crate::fold::Head {
        kind: Kind::Aggregate,
        size: 4,
        root,
    };
    for (index, signed) in (0..).zip(&anchors) {
        let proof = aggregate.prove(index).unwrap();
        assert_eq!(proof.verify(&head, &signed.anchor.proof_hash), Ok(()));
    }
    for bit in 0..text.len() * 8 {
        let mut bad = text.clone().into_bytes();
        bad[bit / 8] ^= 1 << (bit % 8);
        let Ok(bad) = String::from_utf8(bad) else {
            continue;
        };
        assert!(verify(&bad).is_err(), "bit {bit}: {bad}");
    }
    assert!(matches!(
        Aggregate::with_records(&[]),
        Err(AggregateError::Empty)
    ));
}

/// A small history of a volume of 64 blocks, anchored in batches of three epochs.
struct History {
    epochs: Vec<(ChainHash, Vec<RecordLeaf>)>,
    payloads: BTreeMap<(u64, u64), Vec<Digest>>,
    anchors: Vec<Anchor>,
    batches: Vec<Batch>,
    state: Model,
    leaves: Vec<BTreeMap<u64, Digest>>,
}

impl History {
    /// `writes[e]` are the block ranges that epoch e + 1 writes; the state at epoch 3 is anchored.
    fn new(writes: &[Vec<(u64, u64)>]) -> Self {
        let policy = BatchPolicy {
            max_age: std::time::Duration::MAX,
            max_epochs: 3,
            max_bytes: u64::MAX,
        };
        let mut batcher = Batcher::new(VOLUME, policy, Epoch(1), LogOffset(0));
        let mut history = Self {
            epochs: Vec::new(),
            payloads: BTreeMap::new(),
            anchors: Vec::new(),
            batches: Vec::new(),
            state: Model::new(64 * 4096),
            leaves: vec![BTreeMap::new()],
        };
        for (number, ranges) in (1..).zip(writes) {
            let chain = ChainHash([u8::try_from(number).unwrap(); 32]);
            let mut leaves = history.leaves.last().unwrap().clone();
            let mut builder = EpochBuilder::new(Epoch(number), chain);
            let mut records = Vec::new();
            for &(first, count) in ranges {
                let content: Vec<u8> = (0..count)
                    .flat_map(|block| [u8::try_from(number * 8 + block).unwrap(); 4096])
                    .collect();
                let lba = Lba(first * 8);
                let at = Coordinates {
                    epoch: Epoch(number),
                    lane: LaneId(0),
                    kind: LeafKind::Data,
                    lba,
                    sectors: count * 8,
                };
                let record = RecordLeaf {
                    at,
                    payload: payload_hash(lba, &content),
                };
                let mut pieces = Vec::new();
                blocks::leaves_of(&content, |leaf| pieces.push(leaf));
                leaves.extend((first..).zip(pieces.iter().copied()));
                history.payloads.insert((number, first), pieces);
                builder.record(&record).unwrap();
                records.push(record);
            }
            history.epochs.push((chain, records));
            if number == 3 {
                history.state.sweep(&leaves);
            }
            history.leaves.push(leaves);
            let frame = (LogOffset((number - 1) * 4096), LogOffset(number * 4096));
            let closed = batcher.push(std::time::Duration::ZERO, &builder.finish(), frame);
            history.batches.extend(closed.unwrap());
        }
        history.batches.extend(batcher.close());
        for (batch, index) in history.batches.iter().zip(1..) {
            let mut step = step(index);
            if index == 2 {
                let root = history.state.view().root().unwrap();
                step.state = Some(StateAt {
                    epoch: Epoch(3),
                    root,
                });
            }
            history.anchors.push(Anchor::new(batch, step));
        }
        history
    }

    fn in_batch(&self, epoch: u64) -> InclusionProof {
        self.batches
            .iter()
            .find_map(|batch| batch.prove(Epoch(epoch)))
            .unwrap()
    }

    fn since(&self, base: u64, end: u64) -> Vec<EpochTable> {
        let table = |epoch: u64| {
            let (chain, records) = self.epochs[usize::try_from(epoch).unwrap() - 1].clone();
            EpochTable {
                chain,
                records,
                epoch_in_batch: self.in_batch(epoch),
            }
        };
        (base + 1..=end).map(table).collect()
    }

    fn by_record(&self, block: u64, written: u64, end: u64) -> Option<BlockProof> {
        let (chain, records) = &self.epochs[usize::try_from(written).unwrap() - 1];
        let lba = BlockIndex(block).lba();
        let index = records.iter().position(|record| record.at.covers(lba))?;
        let (_, piece) = piece_of(&records[index].at, lba)?;
        let pieces = &self.payloads[&(written, records[index].at.lba.0 / 8)];
        let base = Base::Record(Box::new(RecordBase {
            record: RecordProof::build(*chain, records, index)?,
            epoch_in_batch: self.in_batch(written),
            piece: InclusionProof::build(Kind::Pieces, pieces, piece),
        }));
        Some(BlockProof {
            base,
            since: self.since(written, end),
        })
    }

    fn by_state(&self, block: u64, end: u64) -> BlockProof {
        let path = BlockPath::build(&self.state.view(), BlockIndex(block)).unwrap();
        let base = Base::State {
            epoch: Epoch(3),
            path,
        };
        BlockProof {
            base,
            since: self.since(3, end),
        }
    }

    fn claim(&self, block: u64, epoch: u64) -> Claim {
        let leaves = &self.leaves[usize::try_from(epoch).unwrap()];
        let leaf = leaves
            .get(&block)
            .copied()
            .unwrap_or_else(blocks::zero_leaf);
        Claim {
            block: BlockIndex(block),
            epoch: Epoch(epoch),
            leaf,
        }
    }
}

impl History {
    fn proves(&self, proof: &BlockProof, claim: &Claim) -> bool {
        let states = states(&self.anchors);
        proof.verify(claim, &self.anchors, &states).is_ok()
    }
}

/// States that anchors carry.
fn states(anchors: &[Anchor]) -> Vec<StateAt> {
    anchors.iter().filter_map(|anchor| anchor.state).collect()
}

fn history() -> History {
    History::new(&[
        vec![(0, 4)],
        vec![(8, 1), (20, 2)],
        vec![(2, 1)],
        vec![(9, 3)],
        vec![(40, 2)],
        vec![(3, 1)],
        vec![(50, 1)],
    ])
}

#[test]
fn a_block_is_proven_by_its_record_and_by_the_state_tree() {
    let history = history();
    let verify = |proof: &BlockProof, claim: &Claim| {
        let read = BlockProof::decode(&proof.encode()).unwrap();
        assert_eq!(read, *proof);
        read.verify(claim, &history.anchors, &states(&history.anchors))
    };
    // Block 10 was written in epoch 4 as the second block of a record, and not touched until 7.
    let proof = history.by_record(10, 4, 7).unwrap();
    assert_eq!(verify(&proof, &history.claim(10, 7)), Ok(()));
    let mut wrong = history.claim(10, 7);
    wrong.leaf = blocks::zero_leaf();
    assert_eq!(verify(&proof, &wrong), Err(ClaimError::Base(Epoch(4))));
    let early = history.claim(10, 6);
    let end = ClaimError::End {
        end: Epoch(7),
        claimed: Epoch(6),
    };
    assert_eq!(verify(&proof, &early), Err(end));
    // Block 2 from the state at epoch 3; block 30 was never written.
    assert_eq!(
        verify(&history.by_state(2, 7), &history.claim(2, 7)),
        Ok(())
    );
    assert_eq!(
        verify(&history.by_state(30, 3), &history.claim(30, 3)),
        Ok(())
    );
    // Block 3 was written again in epoch 6, so its older content is not proven for 7.
    let stale = Claim {
        epoch: Epoch(7),
        ..history.claim(3, 5)
    };
    let touched = Err(ClaimError::Touched(Epoch(6)));
    assert_eq!(
        verify(&history.by_record(3, 1, 7).unwrap(), &stale),
        touched
    );
    assert_eq!(verify(&history.by_state(3, 7), &stale), touched);
    // A table that hides the write does not lead to the anchored root.
    let mut hidden = history.by_state(3, 7);
    hidden.since[2].records.clear();
    assert_eq!(verify(&hidden, &stale), Err(ClaimError::Epoch(Epoch(6))));
    // Without the anchors of the range nothing is proven.
    let claim = history.claim(10, 7);
    let unknown = proof.verify(
        &claim,
        &history.anchors[..1],
        &states(&history.anchors[..1]),
    );
    assert_eq!(unknown, Err(ClaimError::NotAnchored(Epoch(4))));
}

#[test]
fn a_flipped_bit_in_a_block_proof_is_refused() {
    let history = history();
    for proof in [history.by_record(10, 4, 6).unwrap(), history.by_state(2, 5)] {
        let (block, end) = if proof.since.len() == 2 && matches!(proof.base, Base::Record(_)) {
            (10, 6)
        } else {
            (2, 5)
        };
        let claim = history.claim(block, end);
        assert_eq!(
            proof.verify(&claim, &history.anchors, &states(&history.anchors)),
            Ok(())
        );
        let good = proof.encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let Ok(bad) = BlockProof::decode(&bad) else {
                continue;
            };
            assert!(
                bad.verify(&claim, &history.anchors, &states(&history.anchors))
                    .is_err(),
                "bit {bit}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn what_is_proven_is_what_the_block_was(
        writes in prop::collection::vec(
            prop::collection::btree_map(0_u64..8, 1_u64..4, 1..4), 4..9),
        block in 0_u64..32,
    ) {
        // Eight places that lie four blocks apart: records of an epoch are disjoint.
        let writes: Vec<Vec<(u64, u64)>> = writes
            .iter()
            .map(|epoch| epoch.iter().map(|(&place, &count)| (place * 4, count)).collect())
            .collect();
        let history = History::new(&writes);
        let last = writes.len() as u64;
        for written in 1..=last {
            let Some(proof) = history.by_record(block, written, last) else { continue };
            let claim = Claim { epoch: Epoch(last), ..history.claim(block, written) };
            let is_true = claim == history.claim(block, last);
            prop_assert_eq!(history.proves(&proof, &claim), is_true);
        }
        let claim = Claim { epoch: Epoch(last), ..history.claim(block, 3) };
        let is_true = claim == history.claim(block, last);
        let proven = history.proves(&history.by_state(block, last), &claim);
        prop_assert_eq!(proven, is_true);
    }

    #[test]
    fn garbage_never_panics_a_decoder(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        _ = BlockProof::decode(&bytes);
        _ = Record::decode(&bytes);
        _ = check(&String::from_utf8_lossy(&bytes));
    }
}
