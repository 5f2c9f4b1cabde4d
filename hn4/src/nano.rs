//! Nano objects: payloads of up to 472 bytes that live in one sector of the cortex.
//!
//! The slot depends on the low half of the volume UUID: one of the two places in HN4 where the
//! identity enters an address.
//= HN4_SPEC 3.6, 7

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::anchor::Seed;
use crate::crc::crc32;
use crate::num::{index, low32, mix};
use crate::status::{Code, Problem, Region};

/// Bytes `ONAN` on disk.
pub const NANO_MAGIC: u32 = 0x4E41_4E4F;
/// The largest payload, bytes.
pub const MAX_PAYLOAD: u32 = 472;
/// Slots that an object may take: k = 0 to 7.
pub const ORBITS: u64 = 8;
const MIN_SECTORS: u64 = 8;

/// The head of a nano sector, exactly as on disk.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct NanoHeader {
    /// [`NANO_MAGIC`].
    pub magic: U32,
    /// Low half of the owner's seed.
    pub owner_lo: U64,
    /// High half of the owner's seed.
    pub owner_hi: U64,
    /// Payload bytes.
    pub length: U32,
    /// See [`payload_crc`].
    pub crc: U32,
    /// Zero.
    pub zero: U32,
    /// Enters the checksum.
    pub sequence: U64,
}

const _: () = {
    assert!(size_of::<NanoHeader>() == 40);
    assert!(offset_of!(NanoHeader, owner_lo) == 4);
    assert!(offset_of!(NanoHeader, length) == 20);
    assert!(offset_of!(NanoHeader, sequence) == 32);
};

/// The checksum of a nano payload, seeded with owner, sequence and volume.
#[must_use]
pub fn payload_crc(uuid_lo: u64, owner: Seed, sequence: u64, payload: &[u8]) -> u32 {
    let seed = owner.folded() ^ sequence ^ uuid_lo;
    crc32(low32(seed ^ (seed >> 32)), payload)
}

/// The sector of slot `k` of an object, for a cortex between two sectors.
///
/// # Errors
/// [`Code::Geometry`] when the cortex ends before it starts, [`Code::NoSpace`] when it is smaller
/// than eight sectors.
pub fn sector(
    uuid_lo: u64,
    owner: Seed,
    k: u64,
    cortex_start: u64,
    cortex_end: u64,
) -> Result<u64, Problem> {
    let at = (Region::Cortex, cortex_start);
    let advice = "restore the superblock from another copy";
    let Some(sectors) = cortex_end
        .checked_sub(cortex_start)
        .filter(|&sectors| sectors > 0)
    else {
        let expected = format!("an end behind {cortex_start}");
        return Err(Problem::new(
            Code::Geometry,
            at,
            cortex_end,
            expected,
            advice,
        ));
    };
    if sectors < MIN_SECTORS {
        let expected = format!("{MIN_SECTORS} or more");
        return Err(Problem::new(
            Code::NoSpace,
            at,
            format!("{sectors} sectors"),
            expected,
            advice,
        ));
    }
    let hash = mix(owner.folded() ^ uuid_lo);
    let slot = if sectors.is_power_of_two() {
        hash.wrapping_add(k.wrapping_mul(k.wrapping_add(1)) / 2) & (sectors - 1)
    } else {
        hash.wrapping_add(k) % sectors
    };
    Ok(cortex_start + slot)
}

/// Checks a nano sector and returns its payload.
///
/// # Errors
/// [`Code::PhantomBlock`], [`Code::IdMismatch`], [`Code::HeaderRot`] or [`Code::PayloadRot`].
pub fn open(bytes: &[u8], uuid_lo: u64, owner: Seed, lba: u64) -> Result<Vec<u8>, Problem> {
    let advice = "read this sector from another copy and write it back";
    let wrong = |code, found: String, expected: String| {
        Err(Problem::new(
            code,
            (Region::Cortex, lba),
            found,
            expected,
            advice,
        ))
    };
    let Ok((header, rest)) = NanoHeader::read_from_prefix(bytes) else {
        return wrong(
            Code::Geometry,
            format!("{} bytes", bytes.len()),
            "a sector".to_owned(),
        );
    };
    if header.magic.get() != NANO_MAGIC {
        let found = format!("magic {:#010x}", header.magic.get());
        return wrong(Code::PhantomBlock, found, format!("{NANO_MAGIC:#010x}"));
    }
    let claimed = Seed {
        lo: header.owner_lo.get(),
        hi: header.owner_hi.get(),
    };
    if claimed != owner {
        return wrong(
            Code::IdMismatch,
            format!("owner {claimed}"),
            owner.to_string(),
        );
    }
    let length = header.length.get();
    let payload = rest
        .get(..index(u64::from(length)))
        .filter(|_| length <= MAX_PAYLOAD);
    let Some(payload) = payload else {
        return wrong(
            Code::HeaderRot,
            format!("length {length}"),
            format!("up to {MAX_PAYLOAD}"),
        );
    };
    let computed = payload_crc(uuid_lo, owner, header.sequence.get(), payload);
    if header.crc.get() != computed {
        let found = format!("checksum {computed:#010x}");
        return wrong(
            Code::PayloadRot,
            found,
            format!("{:#010x}", header.crc.get()),
        );
    }
    Ok(payload.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_stay_in_the_cortex_for_both_kinds_of_sizes() {
        for (start, end) in [(100, 100 + 64), (100, 100 + 65)] {
            for k in 0..ORBITS {
                let at = sector(3, Seed { lo: 9, hi: 4 }, k, start, end).expect("large enough");
                assert!((start..end).contains(&at));
            }
        }
        let code = |end| {
            sector(1, Seed::default(), 0, 100, end)
                .expect_err("too small")
                .code
        };
        assert_eq!((code(100), code(107)), (Code::Geometry, Code::NoSpace));
    }

    #[test]
    fn a_payload_of_another_volume_is_refused() {
        let owner = Seed { lo: 1, hi: 2 };
        let header = NanoHeader {
            magic: NANO_MAGIC.into(),
            owner_lo: 1.into(),
            owner_hi: 2.into(),
            length: 3.into(),
            crc: payload_crc(77, owner, 1, b"abc").into(),
            zero: U32::ZERO,
            sequence: 1.into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(b"abc");
        assert_eq!(open(&bytes, 77, owner, 0).as_deref(), Ok(&b"abc"[..]));
        assert_eq!(
            open(&bytes, 78, owner, 0).expect_err("other volume").code,
            Code::PayloadRot
        );
    }
}
