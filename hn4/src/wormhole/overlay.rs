//! The superblock template that the delta log of an HN4 volume carries.
//!
//! It has the volume's UUID and geometry, the intent WORMHOLE|VIRTUAL and the capacity as override.
//! It is *not* the identity of the log (that is the log's own), its generation is informative, and
//! it must not stand where HN4 looks for superblocks: [`is_superblock_position`] tells.

use super::certificate::Certificate;
use crate::num::round_up;
use crate::status::Problem;
use crate::superblock::copies::{self, Cardinal};
use crate::superblock::{SUPERBLOCK_BYTES, Superblock, intent, state};

/// Bytes of a template.
pub const TEMPLATE_BYTES: u64 = SUPERBLOCK_BYTES;

/// Block sizes whose superblock positions tools probe.
const PROBED_BLOCK_SIZES: [u64; 8] = [512, 1024, 2048, 4096, 8192, 16384, 65536, 64 << 20];

/// The template for a volume: clean, never mounted, with an empty journal.
#[must_use]
pub fn template(volume: &Superblock) -> Superblock {
    let mut template = *volume;
    template.mount_intent = (intent::WORMHOLE | intent::VIRTUAL).into();
    template.state_flags = (state::CLEAN | state::METADATA_ZEROED).into();
    template.dirty_bits = 0.into();
    template.journal_ptr = volume.journal_start;
    template.last_journal_seq = 0.into();
    template.sealed()
}

/// Reads a template back and checks that it is one of this volume.
///
/// # Errors
/// What is wrong with it, or the field in which it differs from the volume.
pub fn check(bytes: &[u8], volume: &Superblock, sector_size: u32) -> Result<Superblock, Problem> {
    let template = Superblock::from_bytes(bytes).unwrap_or_else(Superblock::zeroed);
    template.check(u64::from(sector_size.max(1)), 0)?;
    let ours = Certificate::of(volume, sector_size);
    ours.agree(&Certificate::of(&template, sector_size))?;
    Ok(template)
}

/// True when any byte of a template at `offset` on a log of `log_bytes` lies where HN4 would look
/// for a superblock of any block size.
#[must_use]
pub fn is_superblock_position(offset: u64, log_bytes: u64) -> bool {
    let end = offset.saturating_add(TEMPLATE_BYTES);
    PROBED_BLOCK_SIZES.iter().any(|&size| {
        Cardinal::ALL.iter().any(|&cardinal| {
            let Some(start) = copies::position(cardinal, log_bytes, size) else {
                return false;
            };
            start < end
                && offset < start.saturating_add(round_up(SUPERBLOCK_BYTES, size.min(65536)))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::superblock::{MAGIC, MAGIC_TAIL};

    #[test]
    fn a_template_is_a_valid_superblock_of_the_same_addresses() {
        let mut volume = Superblock::zeroed();
        volume.magic = MAGIC.into();
        volume.magic_tail = MAGIC_TAIL.into();
        volume.uuid_hi = 4.into();
        volume.block_size = 4096.into();
        let template = template(&volume);
        assert!(template.is_wormhole() && template.is_virtual());
        let bytes = zerocopy::IntoBytes::as_bytes(&template);
        assert_eq!(check(bytes, &volume, 512), Ok(template));
        volume.uuid_hi = 5.into();
        assert!(check(bytes, &volume, 512).is_err());
    }

    #[test]
    fn positions_of_superblocks_are_recognised() {
        let size = 1 << 30;
        assert!(is_superblock_position(0, size));
        assert!(is_superblock_position(4096, size), "overlaps North");
        assert!(is_superblock_position(size - 8192, size), "South");
        assert!(!is_superblock_position(1 << 20, size));
    }
}
