//! Order-sensitive Merkle folds.
//!
//! The shape is RFC 6962's: a fold of n > 1 values splits at the largest power of two below n, so
//! that a fold that only grows keeps its finished subtrees for ever. The values are digests that
//! were made under a context of their own; a node is the hash of its two children under the context
//! of the fold's [`Kind`]. So no value passes for a node, and no fold for another.
//!
//! A fold does not hash its own size. Whoever publishes a root publishes the size beside it, as
//! [`Head`] does, and every proof is checked against both.
//!
//! Memory is O(log n) for folding, for building a proof and for checking one.

use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, Context, Digest};

/// Longest possible path: a fold has at most 2^63 values.
pub const MAX_PATH: usize = 64;
/// Most values in a fold.
pub const MAX_VALUES: u64 = 1 << 63;

const VERSION: u8 = 1;

/// What is folded. Each kind has its own node context and its own number in encodings.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Kind {
    /// The 4 KiB pieces of one record's payload.
    Pieces = 1,
    /// The records of one lane of an epoch.
    Records = 2,
    /// The lanes of an epoch.
    Lanes = 3,
    /// The epochs of a batch.
    Epochs = 4,
    /// One lane through the epochs of a batch.
    BatchLane = 5,
    /// The records of a ledger.
    Ledger = 6,
    /// The proof hashes of an aggregate.
    Aggregate = 7,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Pieces,
        Self::Records,
        Self::Lanes,
        Self::Epochs,
        Self::BatchLane,
        Self::Ledger,
        Self::Aggregate,
    ];

    fn context(self) -> &'static Context {
        match self {
            Self::Pieces => &hash::FOLD_PIECES,
            Self::Records => &hash::FOLD_RECORDS,
            Self::Lanes => &hash::FOLD_LANES,
            Self::Epochs => &hash::FOLD_EPOCHS,
            Self::BatchLane => &hash::FOLD_BATCH_LANE,
            Self::Ledger => &hash::FOLD_LEDGER,
            Self::Aggregate => &hash::FOLD_AGGREGATE,
        }
    }

    fn node(self, left: &Digest, right: &Digest) -> Digest {
        self.context().hash(&[&left.0, &right.0])
    }

    /// Root of a fold of nothing: the node context over no bytes.
    #[must_use]
    pub fn empty(self) -> Digest {
        self.context().hash(&[])
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let code = reader.u8()?;
        let found = Self::ALL.into_iter().find(|kind| *kind as u8 == code);
        found.ok_or_else(|| reader.invalid("kind of fold"))
    }
}

/// A fold that is still growing.
#[derive(Clone, Debug)]
pub struct Folder {
    kind: Kind,
    count: u64,
    // Roots of the finished perfect subtrees, largest first: one for each set bit of `count`.
    peaks: Vec<Digest>,
}

impl Folder {
    /// An empty fold.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            count: 0,
            peaks: Vec::new(),
        }
    }

    /// Appends a value.
    pub fn push(&mut self, value: Digest) {
        let mut node = value;
        // Each trailing one bit of the count is a finished subtree of the size of `node`.
        for _ in 0..self.count.trailing_ones() {
            let left = self.peaks.pop().expect("a set bit of the count has a peak");
            node = self.kind.node(&left, &node);
        }
        self.peaks.push(node);
        self.count += 1;
    }

    /// Values so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Root over the values so far.
    #[must_use]
    pub fn root(&self) -> Digest {
        let mut peaks = self.peaks.iter().rev();
        let Some(&last) = peaks.next() else {
            return self.kind.empty();
        };
        peaks.fold(last, |right, left| self.kind.node(left, &right))
    }

    /// Size and root together.
    #[must_use]
    pub fn head(&self) -> Head {
        Head {
            kind: self.kind,
            size: self.count,
            root: self.root(),
        }
    }

    /// The finished subtrees, largest first; with [`Self::count`] they are the whole state.
    #[must_use]
    pub fn peaks(&self) -> &[Digest] {
        &self.peaks
    }
}

/// Root of a fold of `values`.
#[must_use]
pub fn root(kind: Kind, values: &[Digest]) -> Digest {
    let mut folder = Folder::new(kind);
    values.iter().for_each(|value| folder.push(*value));
    folder.root()
}

/// What a fold's publisher commits to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// What is folded.
    pub kind: Kind,
    /// Number of values.
    pub size: u64,
    /// Root over them.
    pub root: Digest,
}

/// Why a proof does not hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FoldError {
    /// The proof is for a fold of another kind or size.
    #[error("the proof is for a {found:?} fold of {found_size}, not a {kind:?} fold of {size}")]
    OtherHead {
        /// Kind of the trusted head.
        kind: Kind,
        /// Size of the trusted head.
        size: u64,
        /// Kind that the proof names.
        found: Kind,
        /// Size that the proof names.
        found_size: u64,
    },
    /// No value has this index, or the sizes are the wrong way round.
    #[error("{index} does not lie in a fold of {size}")]
    OutOfRange {
        /// Index, or size of the older head.
        index: u64,
        /// Size of the fold.
        size: u64,
    },
    /// The recomputed root is another one.
    #[error("the recomputed {kind:?} root {computed} is not the root {root}")]
    RootMismatch {
        /// What is folded.
        kind: Kind,
        /// Root that is trusted.
        root: Digest,
        /// Root that the proof leads to.
        computed: Digest,
    },
    /// The values that were fed to a builder were too few.
    #[error("{fed} of {size} values were given to the builder of a proof")]
    Incomplete {
        /// Values that were given.
        fed: u64,
        /// Values that were promised.
        size: u64,
    },
}

/// A subtree that a proof names, and on which side of the path it hangs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Sibling {
    start: u64,
    end: u64,
    is_left: bool,
}

/// Largest power of two below `size`, for `size` >= 2.
fn split(size: u64) -> u64 {
    1 << (63 - (size - 1).leading_zeros())
}

/// Siblings on the way from value `index` up to the root, lowest first.
fn inclusion_siblings(index: u64, size: u64) -> Vec<Sibling> {
    let (mut low, mut high) = (0, size);
    let mut siblings = Vec::new();
    while high - low > 1 {
        let middle = low + split(high - low);
        if index < middle {
            siblings.push(Sibling {
                start: middle,
                end: high,
                is_left: false,
            });
            high = middle;
        } else {
            siblings.push(Sibling {
                start: low,
                end: middle,
                is_left: true,
            });
            low = middle;
        }
    }
    siblings.reverse();
    siblings
}

/// Subtrees that connect a fold of `old` values with one of `new` >= `old` > 0, lowest first, and
/// the first subtree if it is not the whole older fold.
fn consistency_siblings(old: u64, new: u64) -> (Option<Sibling>, Vec<Sibling>) {
    let (mut low, mut high) = (0, new);
    let mut siblings = Vec::new();
    while high != old {
        let middle = low + split(high - low);
        if old <= middle {
            siblings.push(Sibling {
                start: middle,
                end: high,
                is_left: false,
            });
            high = middle;
        } else {
            siblings.push(Sibling {
                start: low,
                end: middle,
                is_left: true,
            });
            low = middle;
        }
    }
    siblings.reverse();
    let base = (low > 0).then_some(Sibling {
        start: low,
        end: high,
        is_left: true,
    });
    (base, siblings)
}

/// Proof that a value lies at an index of a fold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InclusionProof {
    kind: Kind,
    index: u64,
    size: u64,
    path: Vec<Digest>,
}

impl InclusionProof {
    /// Proof for `values[index]`; `None` if there is no such value.
    #[must_use]
    pub fn build(kind: Kind, values: &[Digest], index: u64) -> Option<Self> {
        let mut builder = ProofBuilder::inclusion(kind, index, values.len() as u64)?;
        values.iter().for_each(|value| builder.push(*value));
        builder.finish_inclusion().ok()
    }

    /// What is folded.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Number of values in the fold.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Position of the value.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The root that `value` leads to. The caller must compare it with a trusted one.
    #[must_use]
    pub fn computed_root(&self, value: &Digest) -> Digest {
        let siblings = inclusion_siblings(self.index, self.size);
        let steps = siblings.iter().zip(&self.path);
        steps.fold(*value, |node, (sibling, digest)| match sibling.is_left {
            true => self.kind.node(digest, &node),
            false => self.kind.node(&node, digest),
        })
    }

    /// Checks that `value` lies at this proof's index of the fold behind `head`.
    ///
    /// # Errors
    /// [`FoldError`] if it does not, or the proof is for another head.
    pub fn verify(&self, head: &Head, value: &Digest) -> Result<(), FoldError> {
        check_head(head, self.kind, self.size)?;
        let computed = self.computed_root(value);
        check_root(head.kind, head.root, computed)
    }

    /// Appends the encoding: version, kind, index, size, path.
    pub fn encode(&self, writer: &mut Writer) {
        writer
            .u8(VERSION)
            .u8(self.kind as u8)
            .u64(self.index)
            .u64(self.size);
        self.path
            .iter()
            .for_each(|digest| _ = writer.digest(digest));
    }

    /// Reads an encoding. The length of the path follows from index and size.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.version(VERSION)?;
        let (kind, index, size) = (Kind::decode(reader)?, reader.u64()?, reader.u64()?);
        if index >= size || size > MAX_VALUES {
            return Err(reader.invalid("index"));
        }
        let path = reader.digests(inclusion_siblings(index, size).len())?;
        Ok(Self {
            kind,
            index,
            size,
            path,
        })
    }
}

/// Proof that one fold is the beginning of another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConsistencyProof {
    kind: Kind,
    old_size: u64,
    new_size: u64,
    path: Vec<Digest>,
}

impl ConsistencyProof {
    /// Proof that `values[..old_size]` is where `values` began; `None` if it is longer.
    #[must_use]
    pub fn build(kind: Kind, values: &[Digest], old_size: u64) -> Option<Self> {
        let mut builder = ProofBuilder::consistency(kind, old_size, values.len() as u64)?;
        values.iter().for_each(|value| builder.push(*value));
        builder.finish_consistency().ok()
    }

    /// Checks that the fold behind `new` begins with the one behind `old`.
    ///
    /// # Errors
    /// [`FoldError`] if it does not, or the proof is for other heads.
    pub fn verify(&self, old: &Head, new: &Head) -> Result<(), FoldError> {
        check_head(old, self.kind, self.old_size)?;
        check_head(new, self.kind, self.new_size)?;
        if self.old_size == 0 {
            return check_root(self.kind, old.root, self.kind.empty());
        }
        let (base, siblings) = consistency_siblings(self.old_size, self.new_size);
        let mut path = self.path.iter();
        let start = match base {
            // The older fold is a subtree of the newer one: its root starts the path.
            None => old.root,
            Some(_) => *path
                .next()
                .expect("a decoded or built path has its full length"),
        };
        let (mut old_root, mut new_root) = (start, start);
        for (sibling, digest) in siblings.iter().zip(path) {
            if sibling.is_left {
                old_root = self.kind.node(digest, &old_root);
                new_root = self.kind.node(digest, &new_root);
            } else {
                new_root = self.kind.node(&new_root, digest);
            }
        }
        check_root(self.kind, old.root, old_root)?;
        check_root(self.kind, new.root, new_root)
    }

    /// Appends the encoding: version, kind, both sizes, path.
    pub fn encode(&self, writer: &mut Writer) {
        writer
            .u8(VERSION)
            .u8(self.kind as u8)
            .u64(self.old_size)
            .u64(self.new_size);
        self.path
            .iter()
            .for_each(|digest| _ = writer.digest(digest));
    }

    /// Reads an encoding. The length of the path follows from the sizes.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.version(VERSION)?;
        let (kind, old_size, new_size) = (Kind::decode(reader)?, reader.u64()?, reader.u64()?);
        if old_size > new_size || new_size > MAX_VALUES {
            return Err(reader.invalid("older size"));
        }
        let path = reader.digests(consistency_ranges(old_size, new_size).len())?;
        Ok(Self {
            kind,
            old_size,
            new_size,
            path,
        })
    }
}

fn consistency_ranges(old: u64, new: u64) -> Vec<Sibling> {
    if old == 0 {
        return Vec::new();
    }
    let (base, siblings) = consistency_siblings(old, new);
    base.into_iter().chain(siblings).collect()
}

fn check_head(head: &Head, found: Kind, found_size: u64) -> Result<(), FoldError> {
    let Head { kind, size, .. } = *head;
    if (kind, size) == (found, found_size) {
        Ok(())
    } else {
        Err(FoldError::OtherHead {
            kind,
            size,
            found,
            found_size,
        })
    }
}

fn check_root(kind: Kind, root: Digest, computed: Digest) -> Result<(), FoldError> {
    if root == computed {
        Ok(())
    } else {
        Err(FoldError::RootMismatch {
            kind,
            root,
            computed,
        })
    }
}

/// Builds a proof from values that stream by once, in order, holding O(log n) of them.
#[derive(Debug)]
pub struct ProofBuilder {
    kind: Kind,
    // Index of the value, or size of the older fold.
    first: u64,
    size: u64,
    fed: u64,
    // Disjoint ranges in the order of the proof, and their roots once they are known.
    ranges: Vec<(Sibling, Option<Digest>)>,
    current: Folder,
}

impl ProofBuilder {
    /// For an [`InclusionProof`]; `None` if `index` does not lie below `size`.
    #[must_use]
    pub fn inclusion(kind: Kind, index: u64, size: u64) -> Option<Self> {
        let is_inside = index < size && size <= MAX_VALUES;
        is_inside.then(|| Self::new(kind, index, size, inclusion_siblings(index, size)))
    }

    /// For a [`ConsistencyProof`]; `None` if `old_size` exceeds `size`.
    #[must_use]
    pub fn consistency(kind: Kind, old_size: u64, size: u64) -> Option<Self> {
        let is_inside = old_size <= size && size <= MAX_VALUES;
        is_inside.then(|| Self::new(kind, old_size, size, consistency_ranges(old_size, size)))
    }

    fn new(kind: Kind, first: u64, size: u64, ranges: Vec<Sibling>) -> Self {
        let ranges = ranges.into_iter().map(|range| (range, None)).collect();
        Self {
            kind,
            first,
            size,
            fed: 0,
            ranges,
            current: Folder::new(kind),
        }
    }

    /// The next value. Values past the promised size are ignored.
    pub fn push(&mut self, value: Digest) {
        let index = self.fed;
        self.fed += 1;
        let holds = |range: &Sibling| range.start <= index && index < range.end;
        let Some((range, root)) = self.ranges.iter_mut().find(|(range, _)| holds(range)) else {
            return;
        };
        if index == range.start {
            self.current = Folder::new(self.kind);
        }
        self.current.push(value);
        if index + 1 == range.end {
            *root = Some(self.current.root());
        }
    }

    fn path(self) -> Result<Vec<Digest>, FoldError> {
        let incomplete = FoldError::Incomplete {
            fed: self.fed,
            size: self.size,
        };
        if self.fed < self.size {
            return Err(incomplete);
        }
        self.ranges
            .into_iter()
            .map(|(_, root)| root.ok_or(incomplete))
            .collect()
    }

    /// The proof, after all values.
    ///
    /// # Errors
    /// [`FoldError::Incomplete`] if values are missing.
    pub fn finish_inclusion(self) -> Result<InclusionProof, FoldError> {
        let (kind, index, size) = (self.kind, self.first, self.size);
        Ok(InclusionProof {
            kind,
            index,
            size,
            path: self.path()?,
        })
    }

    /// The proof, after all values.
    ///
    /// # Errors
    /// [`FoldError::Incomplete`] if values are missing.
    pub fn finish_consistency(self) -> Result<ConsistencyProof, FoldError> {
        let (kind, old_size, new_size) = (self.kind, self.first, self.size);
        Ok(ConsistencyProof {
            kind,
            old_size,
            new_size,
            path: self.path()?,
        })
    }
}

#[cfg(test)]
mod tests;
