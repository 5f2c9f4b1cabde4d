//! The allocation bitmap and its PICO variant.
//!
//! On disk the bitmap is plain little-endian words; the reference's RAM copy carries an ECC byte
//! per word ("armour"). PICO volumes use the armoured 16-byte words in place and so need twice the
//! space that format reserves: the upper half of such a volume has no bits.
//! Not here: which bits should be set ([`crate::reserve`]).
//= HN4_SPEC 7

use crate::num::{index, low8};

/// Bytes of a PICO bitmap word on disk.
pub const ARMOURED_WORD_BYTES: u64 = 16;

const PARITY_MASKS: [u64; 6] = [
    0x5555_5555_5555_5555,
    0x3333_3333_3333_3333,
    0x0F0F_0F0F_0F0F_0F0F,
    0x00FF_00FF_00FF_00FF,
    0x0000_FFFF_0000_FFFF,
    0x0000_0000_FFFF_FFFF,
];

/// The ECC byte of a word.
#[must_use]
pub fn ecc(data: u64) -> u8 {
    let parity = |value: u64| u64::from(value.count_ones() & 1);
    let low = PARITY_MASKS
        .iter()
        .enumerate()
        .fold(0_u64, |bits, (bit, mask)| {
            bits | (parity(data & mask) << bit)
        });
    let all = parity(data) ^ parity(low);
    // Check bit 6 is bit 63 of the data itself; the lowest bit closes the parity.
    low8(((low | (data >> 63 << 6)) << 1) | all)
}

/// One armoured word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArmouredWord {
    /// 64 allocation bits.
    pub data: u64,
    /// Its ECC byte.
    pub ecc: u8,
}

impl ArmouredWord {
    /// Armours a word.
    #[must_use]
    pub fn new(data: u64) -> Self {
        Self {
            data,
            ecc: ecc(data),
        }
    }

    /// Reads a word; `None` when `bytes` is shorter than 16.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let data = u64::from_le_bytes(*bytes.first_chunk()?);
        Some(Self {
            data,
            ecc: *bytes.get(8)?,
        })
        .filter(|_| bytes.len() >= 16)
    }

    /// The 16 bytes on disk. The bytes behind the ECC are a version and padding, all zero.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.data.to_le_bytes());
        bytes[8] = self.ecc;
        bytes
    }

    /// True when the armour holds.
    #[must_use]
    pub fn is_sound(self) -> bool {
        self.ecc == ecc(self.data)
    }

    /// The word with at most one flipped data bit put right; `None` when that does not explain it.
    #[must_use]
    pub fn corrected(self) -> Option<Self> {
        if self.is_sound() {
            return Some(self);
        }
        let mut candidates = (0..64)
            .map(|bit| self.data ^ (1 << bit))
            .filter(|&data| ecc(data) == self.ecc);
        let only = candidates.next()?;
        candidates.next().is_none().then(|| Self::new(only))
    }
}

/// An allocation bitmap in memory: bit i is block i, 1 means used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bitmap {
    words: Vec<u64>,
    blocks: u64,
}

impl Bitmap {
    /// An empty bitmap for `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self {
            words: vec![0; index(blocks.div_ceil(64))],
            blocks,
        }
    }

    /// Bytes of whole words on disk for `blocks` blocks.
    #[must_use]
    pub fn disk_bytes(blocks: u64) -> u64 {
        blocks.div_ceil(64) * 8
    }

    /// Reads the plain form. Missing bytes count as free blocks.
    #[must_use]
    pub fn from_bytes(bytes: &[u8], blocks: u64) -> Self {
        let mut bitmap = Self::new(blocks);
        for (word, chunk) in bitmap.words.iter_mut().zip(bytes.chunks(8)) {
            let mut padded = [0; 8];
            padded[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_le_bytes(padded);
        }
        bitmap
    }

    /// Reads the PICO form, correcting single flipped bits. Words that are not there or cannot be
    /// corrected count as used: never allocate what cannot be judged.
    #[must_use]
    pub fn from_armoured(bytes: &[u8], blocks: u64) -> Self {
        let mut bitmap = Self::new(blocks);
        let mut chunks = bytes.chunks_exact(16);
        for word in &mut bitmap.words {
            let stored = chunks.next().and_then(ArmouredWord::from_bytes);
            *word = stored
                .and_then(ArmouredWord::corrected)
                .map_or(u64::MAX, |good| good.data);
        }
        bitmap
    }

    /// The plain form.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    /// Blocks that the bitmap covers.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// True when a block is used. Blocks outside the volume are.
    #[must_use]
    pub fn is_used(&self, block: u64) -> bool {
        block >= self.blocks
            || self
                .words
                .get(index(block / 64))
                .is_none_or(|word| word >> (block % 64) & 1 == 1)
    }

    /// Marks a block; blocks outside the volume are ignored.
    pub fn set(&mut self, block: u64, used: bool) {
        if block >= self.blocks {
            return;
        }
        if let Some(word) = self.words.get_mut(index(block / 64)) {
            let bit = 1_u64 << (block % 64);
            if used { *word |= bit } else { *word &= !bit }
        }
    }

    /// Marks all blocks of a range.
    pub fn set_range(&mut self, first: u64, end: u64) {
        let end = end.min(self.blocks);
        let mut block = first;
        while block < end {
            if block.is_multiple_of(64) && end - block >= 64 {
                if let Some(word) = self.words.get_mut(index(block / 64)) {
                    *word = u64::MAX;
                }
                block += 64;
            } else {
                self.set(block, true);
                block += 1;
            }
        }
    }

    /// Blocks in use, counted: the reference starts from 0 at each mount (defect 8).
    #[must_use]
    pub fn used_blocks(&self) -> u64 {
        let spare = (self.words.len() as u64 * 64).saturating_sub(self.blocks);
        let last = self.words.last().map_or(0, |&word| {
            if spare == 0 {
                0
            } else {
                u64::from((word >> (64 - spare)).count_ones())
            }
        });
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum::<u64>()
            - last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_flipped_bit_is_corrected_where_the_ecc_tells_it_apart() {
        let good = ArmouredWord::new(0x1234_5678_9ABC_DEF0);
        let mut corrected = 0;
        for bit in 0..64 {
            let bad = ArmouredWord {
                data: good.data ^ (1 << bit),
                ecc: good.ecc,
            };
            assert!(!bad.is_sound(), "bit {bit} goes unnoticed");
            if bad.corrected() == Some(good) {
                corrected += 1;
            }
        }
        assert!(corrected > 0);
    }

    #[test]
    fn used_blocks_are_counted_inside_the_volume_only() {
        let mut bitmap = Bitmap::from_bytes(&[0xFF; 16], 70);
        assert_eq!(bitmap.used_blocks(), 70);
        bitmap.set(69, false);
        assert_eq!(bitmap.used_blocks(), 69);
        assert!(bitmap.is_used(70));
        let mut range = Bitmap::new(300);
        range.set_range(60, 200);
        assert_eq!(range.used_blocks(), 140);
        assert!(
            !range.is_used(59) && range.is_used(60) && range.is_used(199) && !range.is_used(200)
        );
    }

    #[test]
    fn unknown_words_of_a_pico_bitmap_count_as_used() {
        let bitmap = Bitmap::from_armoured(&ArmouredWord::new(0b10).to_bytes(), 128);
        assert!(bitmap.is_used(1) && !bitmap.is_used(0) && bitmap.is_used(64));
    }
}
