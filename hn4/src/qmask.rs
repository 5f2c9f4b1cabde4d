//! The quality mask: two bits for each block that say how far its medium is trusted.
//!
//! It describes the local medium and is therefore never replicated.
//= HN4_SPEC 7

use crate::num::index;

/// The byte that format fills the mask with: four silver blocks.
pub const SILVER_FILL: u8 = 0xAA;

/// How far a block is trusted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Quality {
    /// Not to be used.
    Toxic,
    /// Not for pinned data or metadata.
    Bronze,
    /// The default.
    Silver,
    /// The best.
    Gold,
}

impl Quality {
    /// The quality that two bits mean.
    #[must_use]
    pub fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::Toxic,
            1 => Self::Bronze,
            2 => Self::Silver,
            _ => Self::Gold,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Toxic => "toxic",
            Self::Bronze => "bronze",
            Self::Silver => "silver",
            Self::Gold => "gold",
        }
    }
}

/// Bytes of whole words on disk for `blocks` blocks.
#[must_use]
pub fn disk_bytes(blocks: u64) -> u64 {
    blocks.saturating_mul(2).div_ceil(64) * 8
}

/// The quality of a block in a mask; blocks that it does not cover are toxic.
#[must_use]
pub fn quality(mask: &[u8], block: u64) -> Quality {
    let byte = mask.get(index(block / 4)).copied().unwrap_or(0);
    Quality::from_bits(byte >> (2 * (block % 4)))
}

/// Sets the quality of a block; blocks that the mask does not cover are ignored.
pub fn set_quality(mask: &mut [u8], block: u64, quality: Quality) {
    let shift = 2 * (block % 4);
    if let Some(byte) = mask.get_mut(index(block / 4)) {
        *byte = (*byte & !(3 << shift)) | ((quality as u8) << shift);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_fill_is_silver_and_changes_touch_one_block() {
        let mut mask = vec![SILVER_FILL; 8];
        set_quality(&mut mask, 5, Quality::Toxic);
        set_quality(&mut mask, 6, Quality::Gold);
        let expected = |block| match block {
            5 => Quality::Toxic,
            6 => Quality::Gold,
            _ => Quality::Silver,
        };
        assert!((0..32).all(|block| quality(&mask, block) == expected(block)));
        assert_eq!(quality(&mask, 32), Quality::Toxic);
    }
}
