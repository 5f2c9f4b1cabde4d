//! The chronicle: HN4's audit log, one entry per device sector in a ring.
//!
//! The reference chains entries with CRC-32 only, takes a hole for the end of history and leaves
//! most of the newest sector uncovered (defect 13). This crate checks sequence numbers and slots
//! down to the first entry or a full lap, and puts a BLAKE3 link into bytes that the reference
//! leaves zero and never reads: volumes stay valid for it. A link covers everything before it, so
//! a forger has to rewrite every later entry, and cannot where a key is used or where the tip is
//! known elsewhere (a parent's fork entry, a certificate, a ledger).
//! Not here: when entries are written.
//= HN4_SPEC 5

pub mod append;
pub mod verify;

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::crc::crc32;
use crate::num::{div, index};
use crate::superblock::Superblock;
use crate::superblock::copies::{Cardinal, copy_bytes, position};

/// ASCII `CHRONICL`.
pub const ENTRY_MAGIC: u64 = 0x4C43_494E_4F52_4843;
/// The version that the reference writes and nobody checks.
pub const ENTRY_VERSION: u16 = 4;
/// Entered into the commit marker.
pub const MARKER_KEY: u64 = 0xCAFE_BABE_1234_5678;
/// Sectors smaller than this have no room for an entry.
pub const MIN_SECTOR: u64 = 72;
/// Sectors smaller than this have no room for a link.
pub const MIN_LINKED_SECTOR: u64 = 256;
/// ASCII `HN4LINK1`.
pub const LINK_MAGIC: u64 = 0x314B_4E49_4C34_4E48;

/// What an entry records.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OpCode {
    /// Unused by the reference.
    Init,
    /// Unused by the reference.
    Rollback,
    /// A clean unmount.
    Snapshot,
    /// The parity array's write intents in the reference; a clone's genesis here.
    Wormhole,
    /// A device added, a rename; the parent's side of a fork here.
    Fork,
}

impl OpCode {
    /// The number on disk.
    #[must_use]
    pub const fn id(self) -> u16 {
        self as u16
    }

    /// The name of a number on disk.
    #[must_use]
    pub fn name_of(id: u16) -> &'static str {
        ["INIT", "ROLLBACK", "SNAPSHOT", "WORMHOLE", "FORK"]
            .get(usize::from(id))
            .unwrap_or(&"unknown")
    }
}

/// The first 64 bytes of an entry, exactly as on disk. The last 8 bytes of the sector are the
/// commit marker.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Entry {
    /// [`ENTRY_MAGIC`].
    pub magic: U64,
    /// From 1, without holes.
    pub sequence: U64,
    /// Nanoseconds since 1970.
    pub timestamp: U64,
    /// Context of the operation.
    pub old_lba: U64,
    /// Context of the operation.
    pub new_lba: U64,
    /// The sector that the entry lies in.
    pub self_lba: U64,
    /// Low 32 bits of who did it.
    pub principal_hash32: U32,
    /// [`ENTRY_VERSION`].
    pub version: U16,
    /// See [`OpCode`].
    pub op_code: U16,
    /// CRC-32 of the whole sector before, 0 for the first entry.
    pub prev_sector_crc: U32,
    /// CRC-32 of the bytes before it.
    pub entry_header_crc: U32,
}

/// What this crate adds behind the entry, in bytes that the reference leaves zero.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Link {
    /// [`LINK_MAGIC`].
    pub magic: U64,
    /// BLAKE3 over the previous sector, this entry and the fields below.
    pub digest: [u8; 32],
    /// 0 none, 1 a clone's genesis, 2 a parent's fork.
    pub kind: U32,
    /// Zero.
    pub reserved: U32,
    /// Generation of the other side when the timelines parted.
    pub peer_generation: U64,
    /// Sequence of the other side's newest entry then; 0 for none.
    pub peer_sequence: U64,
    /// BLAKE3 of the other side's newest sector then; zero for none.
    pub peer_tip: [u8; 32],
    /// Drawn for this fork, the same on both sides.
    pub fork_id: [u8; 16],
}

const _: () = {
    assert!(size_of::<Entry>() == 64);
    assert!(offset_of!(Entry, self_lba) == 40);
    assert!(offset_of!(Entry, op_code) == 54);
    assert!(offset_of!(Entry, prev_sector_crc) == 56);
    assert!(offset_of!(Entry, entry_header_crc) == 60);
    assert!(size_of::<Link>() == 112);
    assert!(offset_of!(Link, digest) == 8);
    assert!(offset_of!(Link, kind) == 40);
    assert!(offset_of!(Link, peer_tip) == 64);
    // Entry, link and marker fit the smallest sector that gets a link.
    assert!(size_of::<Entry>() + size_of::<Link>() + 8 <= 256);
};

/// The key of a volume's links. Without one, links are tied to what is known of the tip elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LinkKey {
    /// No secret: anybody can extend, and check, the chain.
    #[default]
    Public,
    /// A secret: only its holders can.
    Secret([u8; 32]),
}

impl LinkKey {
    fn hasher(&self) -> blake3::Hasher {
        match self {
            Self::Public => blake3::Hasher::new_derive_key("hn4 chronicle link 1"),
            Self::Secret(key) => blake3::Hasher::new_keyed(key),
        }
    }
}

/// A sector that holds a valid entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sector {
    bytes: Vec<u8>,
    /// Its entry.
    pub entry: Entry,
}

impl Sector {
    /// Checks magic, place, header checksum and commit marker. `None` for anything else.
    #[must_use]
    pub fn parse(bytes: Vec<u8>, lba: u64) -> Option<Self> {
        let (entry, _) = Entry::read_from_prefix(&bytes).ok()?;
        let marker = u64::from_le_bytes(*bytes.last_chunk()?);
        let header_crc = entry.entry_header_crc.get();
        let valid = bytes.len() as u64 >= MIN_SECTOR
            && entry.magic.get() == ENTRY_MAGIC
            && entry.self_lba.get() == lba
            && header_crc == crc32(0, &bytes[..offset_of!(Entry, entry_header_crc)])
            && marker == u64::from(header_crc) ^ MARKER_KEY;
        valid.then_some(Self { bytes, entry })
    }

    /// CRC-32 of the whole sector, what the next entry links to.
    #[must_use]
    pub fn crc(&self) -> u32 {
        crc32(0, &self.bytes)
    }

    /// BLAKE3 of the whole sector: what others remember of a tip.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        *blake3::hash(&self.bytes).as_bytes()
    }

    /// The link, where the entry has one.
    #[must_use]
    pub fn link(&self) -> Option<Link> {
        let behind = self.bytes.get(size_of::<Entry>()..)?;
        let (link, _) = Link::read_from_prefix(behind).ok()?;
        (link.magic.get() == LINK_MAGIC).then_some(link)
    }

    /// True when the bytes between entry and marker are all zero, as the reference leaves them.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        let end = self.bytes.len().saturating_sub(8);
        let between = self.bytes.get(size_of::<Entry>()..end).unwrap_or_default();
        between.iter().all(|&byte| byte == 0)
    }

    /// The link's digest as it should be behind `previous`.
    #[must_use]
    pub fn expected_digest(&self, previous: Option<&Self>, key: &LinkKey) -> [u8; 32] {
        let mut blank = self.bytes.clone();
        let digest = size_of::<Entry>() + offset_of!(Link, digest);
        if let Some(bytes) = blank.get_mut(digest..digest + 32) {
            bytes.fill(0);
        }
        let mut hasher = key.hasher();
        hasher.update(previous.map_or(&[][..], |sector| &sector.bytes));
        hasher.update(&blank);
        *hasher.finalize().as_bytes()
    }

    /// Bytes of the sector.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Builds the sector of an entry. `link` is filled in where there is room for it.
#[must_use]
pub fn build_sector(
    mut entry: Entry,
    link: Option<(Link, &LinkKey)>,
    previous: Option<&Sector>,
    sector_bytes: u64,
) -> Vec<u8> {
    entry.entry_header_crc =
        crc32(0, &entry.as_bytes()[..offset_of!(Entry, entry_header_crc)]).into();
    let mut bytes = vec![0; index(sector_bytes)];
    let head = size_of::<Entry>();
    bytes[..head].copy_from_slice(entry.as_bytes());
    let marker = u64::from(entry.entry_header_crc.get()) ^ MARKER_KEY;
    let tail = bytes.len() - 8;
    bytes[tail..].copy_from_slice(&marker.to_le_bytes());
    if let Some((mut link, key)) = link.filter(|_| sector_bytes >= MIN_LINKED_SECTOR) {
        link.magic = LINK_MAGIC.into();
        link.digest = [0; 32];
        bytes[head..head + size_of::<Link>()].copy_from_slice(link.as_bytes());
        let sector = Sector { bytes, entry };
        let digest = sector.expected_digest(previous, key);
        bytes = sector.bytes;
        let at = head + offset_of!(Link, digest);
        bytes[at..at + 32].copy_from_slice(&digest);
    }
    bytes
}

/// The bounds that different parts of HN4 put on the ring, in sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// First sector.
    pub start: u64,
    /// End of the chronicle region: what this crate uses.
    pub end: u64,
    /// Where the reference's append wraps. Beyond [`Self::end`] on volumes whose capacity is no
    /// multiple of the block size: it reaches into South.
    pub reference_append_end: u64,
    /// Where the reference's mount wants the head below.
    pub mount_end: u64,
    /// Where the reference's verifier wraps.
    pub verify_end: u64,
}

impl Bounds {
    /// The bounds of a volume.
    #[must_use]
    pub fn of(superblock: &Superblock, sector: u64) -> Self {
        let capacity = superblock.total_capacity.get();
        let block = u64::from(superblock.block_size.get());
        let south = position(Cardinal::South, capacity, block).unwrap_or(capacity);
        Self {
            start: superblock.journal_start.get(),
            end: div(crate::layout::chronicle_end(superblock), sector),
            reference_append_end: div(capacity.saturating_sub(copy_bytes(block)), sector),
            mount_end: div(south, sector),
            verify_end: div(capacity, sector),
        }
    }

    /// True when both implementations wrap at the same sector.
    #[must_use]
    pub fn agree(&self) -> bool {
        self.end == self.reference_append_end
    }
}

/// The sector before `head` in a ring from `start` to `end`.
#[must_use]
pub fn predecessor(head: u64, start: u64, end: u64) -> u64 {
    if head == start {
        end.saturating_sub(1)
    } else {
        head.saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linked_sector_is_still_valid_for_the_reference() {
        let mut entry = <Entry as zerocopy::FromZeros>::new_zeroed();
        entry.magic = ENTRY_MAGIC.into();
        entry.sequence = 1.into();
        entry.self_lba = 77.into();
        let link = <Link as zerocopy::FromZeros>::new_zeroed();
        let bytes = build_sector(entry, Some((link, &LinkKey::Public)), None, 512);
        let sector = Sector::parse(bytes.clone(), 77).expect("valid");
        let link = sector.link().expect("linked");
        assert_eq!(link.digest, sector.expected_digest(None, &LinkKey::Public));
        assert_ne!(
            link.digest,
            sector.expected_digest(None, &LinkKey::Secret([1; 32]))
        );
        assert!(
            Sector::parse(bytes, 78).is_none(),
            "an entry is bound to its place"
        );
    }
}
