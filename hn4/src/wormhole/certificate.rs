//! The isomorphism certificate: what two sides must have equal so that equal anchors mean equal
//! addresses.
//!
//! It has a byte form (for hellos and hashes) and names the first field that differs. Generation,
//! times, intent, label and journal are not part of it: they belong to an instance.
//= HN4_SPEC 12

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::status::{Code, Problem, Region};
use crate::superblock::Superblock;

/// The certificate, exactly as it travels. All integers little-endian.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct Certificate {
    /// The volume UUID in the order of the disk: nano and signet addresses depend on it.
    pub uuid: [u8; 16],
    /// Bytes.
    pub total_capacity: U64,
    /// Sectors.
    pub lba_flux_start: U64,
    /// Capability bits of the superblock, 0 on every formatted volume.
    pub hw_caps_flags: U64,
    /// Sectors; nano addresses depend on it.
    pub lba_cortex_start: U64,
    /// Sectors; ends the cortex.
    pub lba_bitmap_start: U64,
    /// Bytes in a logical sector. No superblock records it.
    pub sector_size: U32,
    /// Bytes in a block.
    pub block_size: U32,
    /// Profile number.
    pub format_profile: U32,
    /// Device type tag.
    pub device_type_tag: U32,
}

/// Bytes of a certificate.
pub const CERTIFICATE_BYTES: usize = 72;

const _: () = assert!(size_of::<Certificate>() == CERTIFICATE_BYTES);

impl Certificate {
    /// The certificate of a volume on a device with this sector size.
    #[must_use]
    pub fn of(superblock: &Superblock, sector_size: u32) -> Self {
        Self {
            uuid: superblock.uuid(),
            total_capacity: superblock.total_capacity,
            lba_flux_start: superblock.lba_flux_start,
            hw_caps_flags: superblock.hw_caps_flags,
            lba_cortex_start: superblock.lba_cortex_start,
            lba_bitmap_start: superblock.lba_bitmap_start,
            sector_size: sector_size.into(),
            block_size: superblock.block_size,
            format_profile: superblock.format_profile,
            device_type_tag: superblock.device_type_tag,
        }
    }

    /// A hash of the certificate, domain separated.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("hn4 isomorphism certificate 1");
        hasher.update(self.as_bytes());
        *hasher.finalize().as_bytes()
    }

    /// Compares with another side's.
    ///
    /// # Errors
    /// Names the first field that differs, with both values.
    pub fn agree(&self, other: &Self) -> Result<(), Problem> {
        let hex = |uuid: &[u8; 16]| crate::num::hex(uuid);
        let both = |a: u64, b: u64| (a.to_string(), b.to_string());
        let fields = [
            ("volume UUID", (hex(&self.uuid), hex(&other.uuid))),
            (
                "sector size",
                both(
                    self.sector_size.get().into(),
                    other.sector_size.get().into(),
                ),
            ),
            (
                "block size",
                both(self.block_size.get().into(), other.block_size.get().into()),
            ),
            (
                "capacity",
                both(self.total_capacity.get(), other.total_capacity.get()),
            ),
            (
                "flux start",
                both(self.lba_flux_start.get(), other.lba_flux_start.get()),
            ),
            (
                "cortex start",
                both(self.lba_cortex_start.get(), other.lba_cortex_start.get()),
            ),
            (
                "bitmap start",
                both(self.lba_bitmap_start.get(), other.lba_bitmap_start.get()),
            ),
            (
                "profile",
                both(
                    self.format_profile.get().into(),
                    other.format_profile.get().into(),
                ),
            ),
            (
                "device type tag",
                both(
                    self.device_type_tag.get().into(),
                    other.device_type_tag.get().into(),
                ),
            ),
            (
                "capability bits",
                both(self.hw_caps_flags.get(), other.hw_caps_flags.get()),
            ),
        ];
        for (name, (ours, theirs)) in fields {
            if ours != theirs {
                let advice = "the two sides compute different addresses: make the clone again \
                              from this parent, on a device with the same sector size";
                let at = (Region::Superblock, 0);
                let found = format!("{name} {theirs}");
                return Err(Problem::new(Code::Geometry, at, found, ours, advice));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_fields_do_not_matter_and_address_fields_do() {
        let mut superblock = Superblock::zeroed();
        superblock.block_size = 4096.into();
        let certificate = Certificate::of(&superblock, 512);
        superblock.copy_generation = 9.into();
        superblock.mount_intent = 5.into();
        assert_eq!(Certificate::of(&superblock, 512), certificate);
        assert_eq!(
            Certificate::of(&superblock, 512).digest(),
            certificate.digest()
        );
        let problem = certificate
            .agree(&Certificate::of(&superblock, 4096))
            .expect_err("sectors");
        assert!(problem.found.contains("sector size 4096"), "{problem}");
        superblock.device_type_tag = 1.into();
        let problem = certificate
            .agree(&Certificate::of(&superblock, 512))
            .expect_err("tag");
        assert!(problem.found.contains("device type tag"), "{problem}");
    }
}
