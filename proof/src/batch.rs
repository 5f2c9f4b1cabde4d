//! Epoch roots to batch roots, and when a batch closes.
//!
//! A batch is a run of consecutive epochs of one volume whose frames follow each other in the delta
//! log without gap or overlap. Its root, the *proof hash* of the anchor, folds the epoch roots in
//! order; its lane hashes fold each lane's leaves through the same epochs. Nobody waits for a
//! batch: it closes by age, by number of epochs, by bytes, and at the latest at an eighth of the
//! smallest log of the pair, so that an anchor is always under way long before the log is full.
//!
//! Invariant: a [`Batcher`] gives every epoch that it accepted to exactly one batch, in order.
//!
//! Not here: hashing records ([`crate::leaf`]), what an anchor adds ([`crate::anchor`]).

use std::collections::BTreeMap;
use std::time::Duration;

use hn4::types::{ChainHash, Epoch, LaneId, LogOffset, VolumeId};

use crate::fold::{Folder, InclusionProof, Kind};
use crate::hash::{self, Digest};
use crate::leaf::EpochRoot;

/// Most epochs in a batch, whatever the policy says.
pub const MAX_EPOCHS: usize = 65_536;
/// Most lanes of a volume.
pub const MAX_LANES: usize = 4096;

/// A lane's leaves through the epochs of a batch, folded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneHash {
    /// The lane.
    pub lane: LaneId,
    /// Fold of its leaves, one for each epoch in which it has records.
    pub hash: Digest,
}

/// A closed batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Batch {
    /// The volume.
    pub volume: VolumeId,
    /// First epoch.
    pub first: Epoch,
    /// Last epoch.
    pub last: Epoch,
    /// Hash of the last epoch's frame header.
    pub chain: ChainHash,
    /// Offset of the first frame in the delta log.
    pub start: LogOffset,
    /// Offset after the last frame.
    pub end: LogOffset,
    /// The batch root.
    pub proof_hash: Digest,
    /// Hashes of the lanes that have records, in ascending order.
    pub lanes: Vec<LaneHash>,
    /// The epoch roots, from which inclusion proofs are made.
    pub roots: Vec<Digest>,
}

/// The hash that makes a batch root of its parts.
#[must_use]
pub fn batch_digest(volume: VolumeId, first: Epoch, last: Epoch, fold: &Digest) -> Digest {
    hash::BATCH.hash(&[
        &volume.0,
        &first.0.to_le_bytes(),
        &last.0.to_le_bytes(),
        &fold.0,
    ])
}

impl Batch {
    /// Proof that an epoch is part of this batch.
    #[must_use]
    pub fn prove(&self, epoch: Epoch) -> Option<InclusionProof> {
        let index = epoch.0.checked_sub(self.first.0)?;
        InclusionProof::build(Kind::Epochs, &self.roots, index)
    }
}

/// Checks that `root` is the root of `epoch` in the batch `first..=last` with `proof_hash`.
#[must_use]
pub fn holds_epoch(
    (volume, first, last): (VolumeId, Epoch, Epoch),
    proof_hash: &Digest,
    (epoch, root): (Epoch, &Digest),
    proof: &InclusionProof,
) -> bool {
    let size = last
        .0
        .checked_sub(first.0)
        .and_then(|span| span.checked_add(1));
    proof.kind() == Kind::Epochs
        && Some(proof.size()) == size
        && Some(proof.index()) == epoch.0.checked_sub(first.0)
        && batch_digest(volume, first, last, &proof.computed_root(root)) == *proof_hash
}

/// When a batch closes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchPolicy {
    /// At this age of its first epoch.
    pub max_age: Duration,
    /// At this many epochs.
    pub max_epochs: usize,
    /// At this many bytes of log.
    pub max_bytes: u64,
}

impl BatchPolicy {
    /// The default policy for a volume whose smallest log, here or at a peer, has `log_bytes`.
    #[must_use]
    pub fn for_log(log_bytes: u64) -> Self {
        let max_bytes = (log_bytes / 8).clamp(1, 256 << 20);
        Self {
            max_age: Duration::from_millis(50),
            max_epochs: 4096,
            max_bytes,
        }
    }
}

/// An epoch does not continue the batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BatchError {
    /// The epoch is not the next one.
    #[error("epoch {found} was given to the batch, epoch {expected} is next; rescan the log")]
    EpochGap {
        /// The next epoch.
        expected: Epoch,
        /// The epoch that came.
        found: Epoch,
    },
    /// The frame does not begin where the last one ended, or is empty.
    #[error(
        "the frame at log bytes {start}..{end} does not continue at {expected}; rescan the log"
    )]
    OffsetGap {
        /// End of the frame before.
        expected: u64,
        /// Start of the frame.
        start: u64,
        /// End of the frame.
        end: u64,
    },
}

/// Collects epoch roots and closes batches.
#[derive(Debug)]
pub struct Batcher {
    volume: VolumeId,
    policy: BatchPolicy,
    next: Epoch,
    start: LogOffset,
    end: LogOffset,
    chain: ChainHash,
    opened: Option<Duration>,
    fold: Folder,
    lanes: BTreeMap<LaneId, Folder>,
    roots: Vec<Digest>,
}

impl Batcher {
    /// Starts at epoch `next`, whose frame lies at `offset`.
    #[must_use]
    pub fn new(volume: VolumeId, policy: BatchPolicy, next: Epoch, offset: LogOffset) -> Self {
        Self {
            volume,
            policy,
            next,
            start: offset,
            end: offset,
            chain: ChainHash::default(),
            opened: None,
            fold: Folder::new(Kind::Epochs),
            lanes: BTreeMap::new(),
            roots: Vec::new(),
        }
    }

    /// Adds the next epoch, whose frame is `start..end` of the log; `now` counts from any fixed
    /// moment. Returns a batch if the epoch closes it.
    ///
    /// # Errors
    /// [`BatchError`] if the epoch is not the next one; nothing is added then.
    pub fn push(
        &mut self,
        now: Duration,
        epoch: &EpochRoot,
        (start, end): (LogOffset, LogOffset),
    ) -> Result<Option<Batch>, BatchError> {
        let (expected, found) = (self.next, epoch.epoch);
        if expected != found {
            return Err(BatchError::EpochGap { expected, found });
        }
        if start != self.end || end <= start {
            let (expected, start, end) = (self.end.0, start.0, end.0);
            return Err(BatchError::OffsetGap {
                expected,
                start,
                end,
            });
        }
        for lane in &epoch.lanes {
            let fold = self.lanes.entry(lane.lane);
            fold.or_insert_with(|| Folder::new(Kind::BatchLane))
                .push(lane.digest(found));
        }
        self.fold.push(epoch.root);
        self.roots.push(epoch.root);
        (self.next, self.end, self.chain) = (found.next(), end, epoch.chain);
        self.opened.get_or_insert(now);
        Ok(self.poll(now))
    }

    /// When [`Self::poll`] has something to do; `None` while no batch is open.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.opened
            .map(|opened| opened.saturating_add(self.policy.max_age))
    }

    /// Closes the batch if it is due.
    pub fn poll(&mut self, now: Duration) -> Option<Batch> {
        let is_due = self.deadline().is_some_and(|deadline| now >= deadline)
            || self.roots.len() >= self.policy.max_epochs.clamp(1, MAX_EPOCHS)
            || self.end.0 - self.start.0 >= self.policy.max_bytes;
        if is_due { self.close() } else { None }
    }

    /// Closes the batch now, as a drain or a switchover wants; `None` if it is empty.
    pub fn close(&mut self) -> Option<Batch> {
        let span = (self.roots.len() as u64).checked_sub(1)?;
        let last = Epoch(self.next.0 - 1);
        let first = Epoch(last.0 - span);
        let fold = std::mem::replace(&mut self.fold, Folder::new(Kind::Epochs));
        let lanes = std::mem::take(&mut self.lanes);
        self.opened = None;
        Some(Batch {
            volume: self.volume,
            first,
            last,
            chain: self.chain,
            start: std::mem::replace(&mut self.start, self.end),
            end: self.end,
            proof_hash: batch_digest(self.volume, first, last, &fold.root()),
            lanes: lanes
                .iter()
                .map(|(&lane, fold)| LaneHash {
                    lane,
                    hash: fold.root(),
                })
                .collect(),
            roots: std::mem::take(&mut self.roots),
        })
    }
}

/// How far the proofs lag behind the log, and what follows from it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ProofLag {
    /// Under half of the log is unanchored.
    Normal,
    /// Over half: hashing takes priority over other background work.
    Hurry,
    /// Over three quarters: clients are throttled, with the reason `proof lag`.
    Throttle,
}

impl ProofLag {
    /// Judges `unanchored_bytes` of a log of `log_bytes`.
    #[must_use]
    pub fn of(unanchored_bytes: u64, log_bytes: u64) -> Self {
        let (part, whole) = (u128::from(unanchored_bytes) * 4, u128::from(log_bytes));
        if part > whole * 3 {
            Self::Throttle
        } else if part > whole * 2 {
            Self::Hurry
        } else {
            Self::Normal
        }
    }
}

#[cfg(test)]
mod tests {
    use hn4::types::Lba;

    use super::*;
    use crate::leaf::{Coordinates, EpochBuilder, LeafKind, RecordLeaf, payload_hash};

    const VOLUME: VolumeId = VolumeId([7; 16]);

    fn epoch(number: u64, lanes: &[u16]) -> EpochRoot {
        let mut builder =
            EpochBuilder::new(Epoch(number), ChainHash([number.to_le_bytes()[0]; 32]));
        for &lane in lanes {
            let at = Coordinates {
                epoch: Epoch(number),
                lane: LaneId(lane),
                kind: LeafKind::Data,
                lba: Lba(8),
                sectors: 8,
            };
            let payload = payload_hash(Lba(8), &[1; 4096]);
            builder.record(&RecordLeaf { at, payload }).unwrap();
        }
        builder.finish()
    }

    fn frame(number: u64) -> (LogOffset, LogOffset) {
        (LogOffset(number * 100), LogOffset(number * 100 + 100))
    }

    fn batcher(policy: BatchPolicy) -> Batcher {
        Batcher::new(VOLUME, policy, Epoch(1), LogOffset(100))
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    const OPEN: BatchPolicy = BatchPolicy {
        max_age: Duration::MAX,
        max_epochs: usize::MAX,
        max_bytes: u64::MAX,
    };

    #[test]
    fn a_batch_closes_by_age_count_and_bytes_whichever_comes_first() {
        let mut by_age = batcher(BatchPolicy {
            max_age: ms(50),
            ..OPEN
        });
        assert_eq!(by_age.deadline(), None);
        assert_eq!(by_age.push(ms(10), &epoch(1, &[0]), frame(1)), Ok(None));
        assert_eq!(by_age.push(ms(40), &epoch(2, &[0]), frame(2)), Ok(None));
        assert_eq!(by_age.deadline(), Some(ms(60)));
        assert_eq!(by_age.poll(ms(59)), None);
        let batch = by_age.poll(ms(60)).unwrap();
        assert_eq!((batch.first, batch.last), (Epoch(1), Epoch(2)));
        assert_eq!((batch.start, batch.end), (LogOffset(100), LogOffset(300)));
        assert_eq!(by_age.poll(ms(1000)), None);

        let mut by_count = batcher(BatchPolicy {
            max_epochs: 2,
            ..OPEN
        });
        assert_eq!(by_count.push(ms(0), &epoch(1, &[0]), frame(1)), Ok(None));
        assert!(
            by_count
                .push(ms(0), &epoch(2, &[0]), frame(2))
                .unwrap()
                .is_some()
        );

        let mut by_bytes = batcher(BatchPolicy {
            max_bytes: 200,
            ..OPEN
        });
        assert_eq!(by_bytes.push(ms(0), &epoch(1, &[0]), frame(1)), Ok(None));
        assert!(
            by_bytes
                .push(ms(0), &epoch(2, &[0]), frame(2))
                .unwrap()
                .is_some()
        );
        assert_eq!(BatchPolicy::for_log(8 << 20).max_bytes, 1 << 20);
    }

    #[test]
    fn batches_follow_each_other_without_gap_or_overlap() {
        let mut batcher = batcher(BatchPolicy {
            max_epochs: 3,
            ..OPEN
        });
        let mut batches = Vec::new();
        for number in 1..=9 {
            batches.extend(
                batcher
                    .push(ms(0), &epoch(number, &[0, 3]), frame(number))
                    .unwrap(),
            );
        }
        assert_eq!(batches.len(), 3);
        for pair in batches.windows(2) {
            assert_eq!(pair[0].end, pair[1].start);
            assert_eq!(pair[0].last.next(), pair[1].first);
        }
        assert_eq!(
            batches[0]
                .lanes
                .iter()
                .map(|lane| lane.lane.0)
                .collect::<Vec<_>>(),
            [0, 3]
        );
        assert_eq!(batches[2].chain, ChainHash([9; 32]));
    }

    #[test]
    fn an_epoch_that_does_not_continue_is_refused_and_changes_nothing() {
        let mut batcher = batcher(OPEN);
        let error = BatchError::EpochGap {
            expected: Epoch(1),
            found: Epoch(2),
        };
        assert_eq!(batcher.push(ms(0), &epoch(2, &[0]), frame(1)), Err(error));
        let error = BatchError::OffsetGap {
            expected: 100,
            start: 200,
            end: 300,
        };
        assert_eq!(batcher.push(ms(0), &epoch(1, &[0]), frame(2)), Err(error));
        assert_eq!(batcher.close(), None);
        assert_eq!(batcher.push(ms(0), &epoch(1, &[0]), frame(1)), Ok(None));
    }

    #[test]
    fn an_epoch_is_provably_in_its_batch_and_nowhere_else() {
        let mut batcher = batcher(OPEN);
        let epochs: Vec<_> = (1..=5).map(|number| epoch(number, &[0])).collect();
        for (epoch, number) in epochs.iter().zip(1..) {
            assert_eq!(batcher.push(ms(0), epoch, frame(number)), Ok(None));
        }
        let batch = batcher.close().unwrap();
        let span = (VOLUME, batch.first, batch.last);
        for root in &epochs {
            let proof = batch.prove(root.epoch).unwrap();
            let holds = |span, epoch: Epoch, root: &Digest| {
                holds_epoch(span, &batch.proof_hash, (epoch, root), &proof)
            };
            assert!(holds(span, root.epoch, &root.root));
            assert!(!holds(span, root.epoch.next(), &root.root));
            assert!(!holds(span, root.epoch, &Digest::ZERO));
            assert!(!holds(
                (VolumeId([8; 16]), span.1, span.2),
                root.epoch,
                &root.root
            ));
            assert!(!holds(
                (VOLUME, Epoch(2), Epoch(6)),
                root.epoch.next(),
                &root.root
            ));
        }
        assert!(batch.prove(Epoch(0)).is_none() && batch.prove(Epoch(6)).is_none());
    }

    #[test]
    fn clients_are_throttled_only_over_three_quarters() {
        assert_eq!(ProofLag::of(50, 100), ProofLag::Normal);
        assert_eq!(ProofLag::of(75, 100), ProofLag::Hurry);
        assert_eq!(ProofLag::of(76, 100), ProofLag::Throttle);
        assert_eq!(ProofLag::of(u64::MAX, u64::MAX), ProofLag::Throttle);
    }
}
