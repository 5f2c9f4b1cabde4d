//! What every copy must hold.
//!
//! The oracle keeps all epochs that any primary ever sealed, as a tree by chain hash: a copy whose
//! log ends in a hash must hold exactly what the epochs on the way to it wrote, sector by sector.
//! So prefix (P2), byte equality (P3) and survival (P1) are questions to one structure.
//!
//! A sector's contents are named by a tag; the bytes follow from tag and address, so that no data
//! has to be kept. Tag 0 is zeroes.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

use hn4::types::Epoch;
use hn4_engine::core::event::Tip;

use crate::disk::SECTOR;

/// Names the contents of a sector.
pub(crate) type Tag = u64;

/// A change that a client made.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    /// Sectors.
    pub(crate) sectors: Range<u64>,
    /// Their new contents.
    pub(crate) tag: Tag,
}

/// Where an epoch stands among those that were sealed.
type Index = usize;

#[derive(Debug)]
struct SealedEpoch {
    /// Its number and the hash that ends in it.
    tip: Tip,
    /// The one before it; the first of all is its own.
    parent: Index,
    /// Some primary had it on its medium.
    durable: bool,
    changes: Vec<Change>,
}

/// Chain hashes are random already.
#[derive(Clone, Copy, Debug, Default)]
struct FirstWord(u64);

impl Hasher for FirstWord {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(word) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*word);
        }
    }

    fn write_usize(&mut self, _: usize) {}
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Oracle {
    initial: Vec<Tag>,
    /// The beginning, and every epoch in the order in which they were sealed.
    epochs: Vec<SealedEpoch>,
    /// Where each is.
    places: HashMap<[u8; 32], Index, BuildHasherDefault<FirstWord>>,
    /// Who wrote in a term.
    writers: BTreeMap<u64, usize>,
    /// What no promotion that had enough answers may lose.
    pub(crate) promised: Tip,
    /// What peers hold at least in memory: gone when a peer crashes.
    pub(crate) received: Tip,
}

impl Oracle {
    /// A volume with these contents at epoch 0.
    #[must_use]
    pub(crate) fn new(initial: Vec<Tag>) -> Self {
        let mut oracle = Self {
            initial,
            epochs: Vec::new(),
            places: HashMap::default(),
            writers: BTreeMap::new(),
            promised: Tip::default(),
            received: Tip::default(),
        };
        oracle.add(Tip::default(), 0, Vec::new());
        oracle.epochs[0].durable = true;
        oracle
    }

    fn add(&mut self, tip: Tip, parent: Index, changes: Vec<Change>) {
        let epoch = SealedEpoch {
            tip,
            parent,
            durable: false,
            changes,
        };
        self.places.insert(tip.chain.0, self.epochs.len());
        self.epochs.push(epoch);
    }

    fn find(&self, tip: Tip) -> Option<Index> {
        let index = *self.places.get(&tip.chain.0)?;
        (self.epochs[index].tip == tip).then_some(index)
    }

    /// A primary sealed an epoch. Returns false if it does not follow one that was sealed, or was
    /// there before.
    #[must_use]
    pub(crate) fn sealed(&mut self, tip: Tip, parent: Tip, changes: Vec<Change>) -> bool {
        let follows = tip.epoch == parent.epoch.next() && !self.places.contains_key(&tip.chain.0);
        let parent = self.find(parent).filter(|_| follows);
        let Some(parent) = parent else {
            return false;
        };
        self.add(tip, parent, changes);
        true
    }

    /// A primary has this on its medium, and all before it.
    pub(crate) fn became_durable(&mut self, place: Tip) {
        let Some(mut index) = self.find(place) else {
            return;
        };
        while !self.epochs[index].durable {
            self.epochs[index].durable = true;
            index = self.epochs[index].parent;
        }
    }

    /// Whether a primary ever had this on its medium.
    #[must_use]
    pub(crate) fn was_durable(&self, place: Tip) -> bool {
        self.find(place)
            .is_some_and(|index| self.epochs[index].durable)
    }

    /// A node accepted a write in a term. Returns false if another node did so in the same term.
    pub(crate) fn wrote(&mut self, term: u64, node: usize) -> bool {
        *self.writers.entry(term).or_insert(node) == node
    }

    /// Whether any primary ever sealed this.
    #[must_use]
    pub(crate) fn knows(&self, tip: Tip) -> bool {
        self.find(tip).is_some()
    }

    /// The place at an epoch on the way to a tip.
    #[must_use]
    pub(crate) fn ancestor(&self, tip: Tip, at: Epoch) -> Option<Tip> {
        let mut here = &self.epochs[self.find(tip)?];
        while here.tip.epoch > at {
            here = &self.epochs[here.parent];
        }
        (here.tip.epoch == at).then_some(here.tip)
    }

    /// Whether the history that ends in `tip` holds `place`.
    #[must_use]
    pub(crate) fn holds(&self, tip: Tip, place: Tip) -> bool {
        tip == place || self.ancestor(tip, place.epoch) == Some(place)
    }

    /// The changes from one place (exclusive) to another (inclusive), if one leads to the other.
    #[must_use]
    pub(crate) fn changes(&self, from: Tip, to: Tip) -> Option<Vec<&Change>> {
        let mut path = Vec::new();
        let mut here = &self.epochs[self.find(to)?];
        while here.tip.epoch > from.epoch {
            path.push(&here.changes);
            here = &self.epochs[here.parent];
        }
        (here.tip == from).then(|| path.into_iter().rev().flatten().collect())
    }

    /// What a copy whose log ends here holds.
    #[must_use]
    pub(crate) fn contents(&self, tip: Tip) -> Option<Vec<Tag>> {
        let mut contents = self.initial.clone();
        for change in self.changes(Tip::default(), tip)? {
            apply(&mut contents, change);
        }
        Some(contents)
    }
}

/// Makes a change.
pub(crate) fn apply(contents: &mut [Tag], change: &Change) {
    contents[index(change.sectors.start)..index(change.sectors.end)].fill(change.tag);
}

/// A sector number as an index: simulated volumes are small.
#[must_use]
pub(crate) fn index(sector: u64) -> usize {
    usize::try_from(sector).expect("simulated volumes are small")
}

/// The words of a sector.
fn words(tag: Tag, sector: u64) -> impl Iterator<Item = u64> {
    let seed = tag.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ sector;
    (0..SECTOR as u64 / 8).map(move |index| match index {
        _ if tag == 0 => 0,
        0 => tag,
        1 => sector,
        index => seed.wrapping_add(index).rotate_left(17),
    })
}

/// The bytes of a sector.
pub(crate) fn fill(tag: Tag, sector: u64, bytes: &mut [u8]) {
    assert_eq!(bytes.len(), SECTOR);
    let (chunks, _) = bytes.as_chunks_mut::<8>();
    for (chunk, word) in chunks.iter_mut().zip(words(tag, sector)) {
        *chunk = word.to_le_bytes();
    }
}

/// Whether these are the bytes of a sector.
#[must_use]
pub(crate) fn is(tag: Tag, sector: u64, bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<8>();
    let words = words(tag, sector);
    let differs = |(chunk, word): (&[u8; 8], u64)| u64::from_le_bytes(*chunk) != word;
    bytes.len() == SECTOR && rest.is_empty() && !chunks.iter().zip(words).any(differs)
}

/// What a sector seems to hold, for messages.
#[must_use]
pub(crate) fn describe(bytes: &[u8]) -> String {
    if bytes.iter().all(|&byte| byte == 0) {
        return "zeroes".to_owned();
    }
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let (tag, sector) = (word(0), word(8));
    if is(tag, sector, bytes) {
        format!("write {tag} to sector {sector}")
    } else {
        format!("rubbish ({tag:#x} {sector:#x} ..)")
    }
}
