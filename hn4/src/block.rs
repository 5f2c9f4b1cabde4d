//! The header of a data block, and the checks of a reader.
//!
//! A block's payload is its size less 48 bytes; the data checksum covers the whole payload area,
//! zero padding included. Not here: which block to read.
//= HN4_SPEC 7

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::anchor::{Anchor, Seed, class};
use crate::crc::crc32;
use crate::num::{index, low32};
use crate::status::{Code, Conduct, Problem, Region};
use crate::tcc;

/// Bytes of a block header.
pub const HEADER_BYTES: u64 = 48;
/// Bytes `0KLB` on disk.
pub const BLOCK_MAGIC: u32 = 0x424C_4B30;
const ALGORITHM_NONE: u32 = 0;
const ALGORITHM_TCC: u32 = 3;
/// The fill of blocks that memory-backed hosts poison.
const POISON: u8 = 0xCC;

/// A header, exactly as on disk.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct BlockHeader {
    /// Low half of the file's seed.
    pub well_lo: U64,
    /// High half of the file's seed.
    pub well_hi: U64,
    /// Logical block number.
    pub seq_index: U64,
    /// The file's write generation when the block was written.
    pub generation: U64,
    /// [`BLOCK_MAGIC`].
    pub magic: U32,
    /// CRC-32 of the payload area.
    pub data_crc: U32,
    /// Algorithm in bits 0-3, stored bytes above.
    pub comp_meta: U32,
    /// CRC-32 of the bytes before it, with a register that starts at 0.
    pub header_crc: U32,
}

const _: () = {
    assert!(size_of::<BlockHeader>() == 48);
    assert!(offset_of!(BlockHeader, magic) == 32);
    assert!(offset_of!(BlockHeader, comp_meta) == 40);
    assert!(offset_of!(BlockHeader, header_crc) == 44);
};

impl BlockHeader {
    /// The header of a block of plain bytes.
    #[must_use]
    pub fn plain(seed: Seed, seq_index: u64, generation: u32, payload: &[u8], used: u32) -> Self {
        let mut header = Self {
            well_lo: seed.lo.into(),
            well_hi: seed.hi.into(),
            seq_index: seq_index.into(),
            generation: u64::from(generation).into(),
            magic: BLOCK_MAGIC.into(),
            data_crc: crc32(0, payload).into(),
            comp_meta: (used << 4 | ALGORITHM_NONE).into(),
            header_crc: U32::ZERO,
        };
        header.header_crc = header.computed_crc().into();
        header
    }

    /// Takes 48 bytes as they are; `None` when there are fewer.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Self::read_from_prefix(bytes).ok().map(|(header, _)| header)
    }

    /// The checksum that the header should have.
    #[must_use]
    pub fn computed_crc(&self) -> u32 {
        crc32(u32::MAX, &self.as_bytes()[..offset_of!(Self, header_crc)])
    }

    /// The file that the block says it belongs to.
    #[must_use]
    pub fn seed(&self) -> Seed {
        Seed {
            lo: self.well_lo.get(),
            hi: self.well_hi.get(),
        }
    }

    /// True when the block claims to be block `n` of `seed` and its header is sound.
    #[must_use]
    pub fn claims(&self, seed: Seed, n: u64) -> bool {
        self.magic.get() == BLOCK_MAGIC && self.seed() == seed && self.seq_index.get() == n
    }

    /// Bytes of the payload that are stored.
    #[must_use]
    pub fn stored_bytes(&self) -> u32 {
        self.comp_meta.get() >> 4
    }

    /// The compression algorithm.
    #[must_use]
    pub fn algorithm(&self) -> u32 {
        self.comp_meta.get() & 0xF
    }
}

fn problem(
    code: Code,
    lba: u64,
    found: impl std::fmt::Display,
    expected: impl std::fmt::Display,
) -> Problem {
    let advice = "read this block from another copy and write it back";
    Problem::new(code, (Region::Flux, lba), found, expected, advice)
}

/// Checks a header against the file it should belong to, in the order of the reference. With
/// [`Conduct::Corrected`] an older generation is accepted: the reference bumps the anchor's
/// generation with each block, so that of a file of several blocks only the last one written
/// carries it (defect 5).
///
/// # Errors
/// The reference's code.
pub fn check_header(
    block: &[u8],
    anchor: &Anchor,
    n: u64,
    lba: u64,
    conduct: Conduct,
) -> Result<BlockHeader, Problem> {
    let Some(header) = BlockHeader::from_bytes(block) else {
        return Err(problem(
            Code::Geometry,
            lba,
            format!("{} bytes", block.len()),
            "a block",
        ));
    };
    if header.magic.get() != BLOCK_MAGIC {
        if block.iter().take(64).all(|&byte| byte == POISON) {
            return Err(problem(Code::HwIo, lba, "poison (0xCC)", "a block header"));
        }
        let found = format!("magic {:#010x}", header.magic.get());
        return Err(problem(
            Code::PhantomBlock,
            lba,
            found,
            format!("{BLOCK_MAGIC:#010x}"),
        ));
    }
    if header.header_crc.get() != header.computed_crc() {
        let found = format!("header checksum {:#010x}", header.header_crc.get());
        let expected = format!("{:#010x}", header.computed_crc());
        return Err(problem(Code::HeaderRot, lba, found, expected));
    }
    if header.seed() != anchor.seed() {
        let found = format!("a block of {}", header.seed());
        return Err(problem(Code::IdMismatch, lba, found, anchor.seed()));
    }
    if header.seq_index.get() != n {
        let found = format!("block {} of the file", header.seq_index.get());
        return Err(problem(
            Code::PhantomBlock,
            lba,
            found,
            format!("block {n}"),
        ));
    }
    let (generation, newest) = (header.generation.get(), anchor.write_gen.get());
    let older =
        u32::try_from(generation).is_ok_and(|generation| newest.wrapping_sub(generation) < 1 << 31);
    let accepted = generation == u64::from(newest) || (conduct.corrects() && older);
    if !accepted {
        let expected = format!("generation {newest}");
        return Err(problem(Code::GenerationSkew, lba, generation, expected));
    }
    Ok(header)
}

/// Checks a whole block and returns its payload, decompressed and padded with zeroes to the size
/// of the payload area.
///
/// # Errors
/// The reference's code.
pub fn open(
    block: &[u8],
    anchor: &Anchor,
    n: u64,
    lba: u64,
    conduct: Conduct,
) -> Result<Vec<u8>, Problem> {
    let header = check_header(block, anchor, n, lba, conduct)?;
    let area = block.get(index(HEADER_BYTES)..).unwrap_or_default();
    let algorithm = header.algorithm();
    if algorithm != ALGORITHM_NONE && algorithm != ALGORITHM_TCC {
        let found = format!("algorithm {algorithm}");
        return Err(problem(
            Code::AlgorithmUnknown,
            lba,
            found,
            "0 (none) or 3 (TCC)",
        ));
    }
    if algorithm != ALGORITHM_NONE && anchor.has_class(class::ENCRYPTED) {
        let expected = "an encrypted file is never compressed";
        return Err(problem(Code::Tampered, lba, "a compressed block", expected));
    }
    let stored = header.stored_bytes();
    let Some(data) = area.get(..index(u64::from(stored))) else {
        let expected = format!("at most {}", area.len());
        return Err(problem(
            Code::HeaderRot,
            lba,
            format!("{stored} stored bytes"),
            expected,
        ));
    };
    let computed = crc32(0, area);
    if header.data_crc.get() != computed {
        let found = format!("data checksum {computed:#010x}");
        let expected = format!("{:#010x}", header.data_crc.get());
        return Err(problem(Code::PayloadRot, lba, found, expected));
    }
    if algorithm == ALGORITHM_NONE {
        // The stored size is only that of the last write: the area stays full.
        return Ok(area.to_vec());
    }
    let mut payload = tcc::decode(data, area.len())
        .map_err(|error| problem(Code::DecompressFail, lba, error, "a TCC stream"))?;
    payload.resize(area.len(), 0);
    Ok(payload)
}

/// Builds a whole block of `block_size` bytes from up to its payload's worth of plain bytes.
/// Returns `None` when the data does not fit.
#[must_use]
pub fn seal(seed: Seed, n: u64, generation: u32, data: &[u8], block_size: u32) -> Option<Vec<u8>> {
    let area = index(u64::from(block_size).checked_sub(HEADER_BYTES)?);
    if data.len() > area {
        return None;
    }
    let mut payload = data.to_vec();
    payload.resize(area, 0);
    let used = low32(data.len() as u64);
    let header = BlockHeader::plain(seed, n, generation, &payload, used);
    let mut block = header.as_bytes().to_vec();
    block.append(&mut payload);
    Some(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anchor(write_gen: u32) -> Anchor {
        let mut anchor = Anchor::zeroed();
        anchor.seed_lo = 7.into();
        anchor.write_gen = write_gen.into();
        anchor
    }

    #[test]
    fn a_sealed_block_opens_and_every_flipped_bit_is_noticed() {
        let block = seal(anchor(3).seed(), 5, 3, b"hello", 512).expect("fits");
        let payload = open(&block, &anchor(3), 5, 0, Conduct::Corrected).expect("sound");
        assert_eq!(&payload[..6], b"hello\0");
        for bit in 0..block.len() * 8 {
            let mut bad = block.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(
                open(&bad, &anchor(3), 5, 0, Conduct::Corrected).is_err(),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn defect_5_older_blocks_of_a_file_are_readable_unless_compatible() {
        let block = seal(anchor(0).seed(), 0, 1, b"first", 512).expect("fits");
        assert!(open(&block, &anchor(4), 0, 0, Conduct::Corrected).is_ok());
        let refused = open(&block, &anchor(4), 0, 0, Conduct::ReferenceCompatible);
        assert_eq!(refused.expect_err("skewed").code, Code::GenerationSkew);
        let newer = seal(anchor(0).seed(), 0, 5, b"first", 512).expect("fits");
        assert!(open(&newer, &anchor(4), 0, 0, Conduct::Corrected).is_err());
    }
}
