//! The log's superblock: where recovery begins, and what this node has promised.
//!
//! Two slots are written alternately, each after everything it speaks of is durable. All fields lie
//! in the first 512 bytes of a slot, so that even a device that tears writes at sector grain leaves
//! either the old or the new contents, and the checksum tells if it did not. Losing the newer slot
//! is harmless: the older one names an older checkpoint, whose log is kept until the *next*
//! superblock is durable.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{FORMAT_VERSION, LogIdentity};
use crate::types::{ChainHash, Epoch, Incarnation, LogOffset, NodeId, Rank, Term, VolumeId};

const MAGIC: [u8; 8] = *b"HN4DLTSB";

/// Version of a superblock that names a merge area: a program that does not know the area must not
/// open the log, since the backing may need what is in it.
const VERSION_WITH_MERGES: u16 = 2;

fn version_of(merge_era: Option<u64>) -> u16 {
    merge_era.map_or(FORMAT_VERSION, |_| VERSION_WITH_MERGES)
}

/// What this node does for the volume. Kept here, because a restart must not change it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Accepts client writes and appends to the log.
    Primary,
    /// Appends what a primary sends.
    Replica,
    /// Was primary and has seen a higher term: accepts nothing until it is made a replica.
    Fenced,
}

/// How complete this copy is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyState {
    /// Never seeded: the backing holds nothing of this volume yet.
    Fresh,
    /// A full copy is being filled in place, up to this byte offset; not usable.
    Seeding {
        /// Everything below this offset is durable on the backing.
        cursor_bytes: u64,
        /// The epochs after this one must be replayed over the copied bytes.
        from: Epoch,
        /// The copy is an exact state of the volume once this epoch has been applied. `None` until
        /// the source has sent its last piece.
        until: Option<Epoch>,
    },
    /// Backing plus log is an exact prefix of the volume's history.
    Usable,
    /// The same, but the source's log does not reach back to it: a full copy is being taken into
    /// the shadow file, which counts for nothing yet.
    Shadowing {
        /// Everything below this offset was compared, and where it differs it is in the shadow.
        cursor_bytes: u64,
        /// Bytes of the shadow file that are durable.
        shadow_bytes: u64,
        /// The epochs after this one must be replayed over the copied bytes.
        from: Epoch,
        /// Hash of that epoch's frame header.
        from_chain: ChainHash,
    },
    /// The shadow was switched in: the state at the checkpoint is the backing with the shadow
    /// written over it, which is under way. Nothing else may be written to the backing.
    Applying {
        /// Bytes of the shadow file that count.
        shadow_bytes: u64,
        /// The copy that the shadow is of began at this epoch.
        from: Epoch,
        /// Hash of that epoch's frame header.
        from_chain: ChainHash,
    },
}

/// What lies on the backing of a copy that was not filled yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ground {
    /// Nothing that matters.
    Nothing,
    /// Data that somebody brought, most of which is expected to be the primary's.
    Brought,
    /// The same, and pieces of a full copy may have been written over it.
    Mixed,
}

impl CopyState {
    /// Whether there is a shadow that counts, or may count some day.
    #[must_use]
    pub fn is_shadowed(&self) -> bool {
        matches!(self, Self::Shadowing { .. } | Self::Applying { .. })
    }

    /// Whether backing plus log, without anything else, is an exact prefix of the history.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Usable | Self::Shadowing { .. })
    }
}

/// Contents of a superblock slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Raised by one with each write; the slot with the higher valid generation counts.
    pub generation: u64,
    /// The backing is exactly the state at this epoch.
    pub checkpoint: Epoch,
    /// Where the frame after the checkpoint starts.
    pub checkpoint_offset: LogOffset,
    /// Hash of the checkpoint epoch's frame header.
    pub checkpoint_chain: ChainHash,
    /// Oldest epoch whose frame is still kept for peers is the one after this.
    pub retained: Epoch,
    /// Where that oldest kept frame starts.
    pub retained_offset: LogOffset,
    /// Hash of the frame header of `retained`.
    pub retained_chain: ChainHash,
    /// Who sealed `retained`; copies without any frame are compared by it.
    pub retained_rank: Rank,
    /// Epochs up to this one were durable in this log when the superblock was written. Recovery
    /// that ends before it has found corruption, not a torn tail.
    pub durable: Epoch,
    /// A sweep up to this epoch may have begun: the backing may hold a part of what lies between
    /// the checkpoint and it, which can therefore not be dropped any more.
    pub swept: Epoch,
    /// Raised with each opening and each truncation of the log; frames stamped with an earlier
    /// session prove nothing about what was durable.
    pub session: u64,
    /// The highest term this node has seen and promised to obey.
    pub term: Term,
    /// Openings by a primary in this term.
    pub incarnation: Incarnation,
    /// The node this copy belongs to.
    pub node: NodeId,
    /// What the node does for the volume.
    pub role: Role,
    /// The node was primary, and epochs after the checkpoint may be known to nobody else: they are
    /// saved before they are dropped, and not destaged.
    pub own_tail: bool,
    /// How complete the copy is.
    pub copy: CopyState,
    /// What a copy that is filled in place may keep.
    pub ground: Ground,
    /// Batches in the merge area that name this number may be needed. `None`: nobody uses the
    /// area.
    pub merge_era: Option<u64>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    version: U16,
    role: u8,
    copy: u8,
    incarnation: U32,
    volume: [u8; 16],
    birth_nonce: [u8; 16],
    generation: U64,
    checkpoint: U64,
    checkpoint_offset: U64,
    checkpoint_chain: [u8; 32],
    retained: U64,
    retained_offset: U64,
    retained_chain: [u8; 32],
    durable: U64,
    session: U64,
    term_counter: U64,
    term_node: [u8; 16],
    node: [u8; 16],
    seed_cursor: U64,
    seed_from: U64,
    /// Epoch plus one; zero means that it is not known yet.
    seed_until: U64,
    retained_term: U64,
    retained_incarnation: U32,
    own_tail: u8,
    ground: u8,
    reserved: [u8; 2],
    shadow_bytes: U64,
    seed_from_chain: [u8; 32],
    swept: U64,
    /// Zero: none.
    merge_era: U64,
    reserved_end: [u8; 204],
    crc32c: U32,
}

const WIRE_BYTES: usize = size_of::<Wire>();
const _: () = assert!(WIRE_BYTES == 512, "a superblock must fit in one sector");

const COPY_FRESH: u8 = 0;
const COPY_SEEDING: u8 = 1;
const COPY_USABLE: u8 = 2;
const COPY_SHADOWING: u8 = 3;
const COPY_APPLYING: u8 = 4;

/// Why a slot holds no usable superblock.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum SuperblockError {
    /// The magic is missing: never written.
    #[error("no superblock in this slot")]
    Empty,
    /// The checksum does not match: torn or rotten.
    #[error("superblock is damaged: CRC-32C is {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// Stored value.
        found: u32,
        /// Computed value.
        expected: u32,
    },
    /// Another format version.
    #[error(
        "superblock version {0} is not supported (this program reads {FORMAT_VERSION} and \
         {VERSION_WITH_MERGES})"
    )]
    Version(u16),
    /// It belongs to another volume than the header.
    #[error("superblock is of volume {found}, the log header says {expected}")]
    Foreign {
        /// Volume in the superblock.
        found: VolumeId,
        /// Volume in the header.
        expected: VolumeId,
    },
    /// A field has an impossible value.
    #[error("superblock field `{field}` has the impossible value {value}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

impl Superblock {
    /// Writes the superblock into a block of at least 512 bytes and clears the rest of it.
    pub fn encode(&self, identity: &LogIdentity, block: &mut [u8]) {
        let copy = WireCopy::of(&self.copy);
        let mut wire = Wire {
            magic: MAGIC,
            version: version_of(self.merge_era).into(),
            role: match self.role {
                Role::Primary => 0,
                Role::Replica => 1,
                Role::Fenced => 2,
            },
            copy: copy.kind,
            incarnation: self.incarnation.0.into(),
            volume: identity.volume.0,
            birth_nonce: identity.birth_nonce,
            generation: self.generation.into(),
            checkpoint: self.checkpoint.0.into(),
            checkpoint_offset: self.checkpoint_offset.0.into(),
            checkpoint_chain: self.checkpoint_chain.0,
            retained: self.retained.0.into(),
            retained_offset: self.retained_offset.0.into(),
            retained_chain: self.retained_chain.0,
            durable: self.durable.0.into(),
            session: self.session.into(),
            term_counter: self.term.counter.into(),
            term_node: self.term.node.0,
            node: self.node.0,
            seed_cursor: copy.cursor.into(),
            seed_from: copy.from.0.into(),
            seed_until: copy.until.into(),
            retained_term: self.retained_rank.term.into(),
            retained_incarnation: self.retained_rank.incarnation.0.into(),
            own_tail: self.own_tail.into(),
            ground: match self.ground {
                Ground::Nothing => 0,
                Ground::Brought => 1,
                Ground::Mixed => 2,
            },
            reserved: [0; 2],
            shadow_bytes: copy.shadow.into(),
            seed_from_chain: copy.from_chain.0,
            swept: self.swept.0.into(),
            merge_era: self.merge_era.unwrap_or(0).into(),
            reserved_end: [0; 204],
            crc32c: U32::ZERO,
        };
        wire.crc32c = crc32c::crc32c(&wire.as_bytes()[..WIRE_BYTES - 4]).into();
        block.fill(0);
        block[..WIRE_BYTES].copy_from_slice(wire.as_bytes());
    }

    /// Reads and checks a slot.
    ///
    /// # Errors
    /// [`SuperblockError`] says why the slot cannot be used.
    pub fn decode(identity: &LogIdentity, block: &[u8]) -> Result<Self, SuperblockError> {
        let (wire, _) = Wire::read_from_prefix(block).map_err(|_| SuperblockError::Empty)?;
        if wire.magic != MAGIC {
            return Err(SuperblockError::Empty);
        }
        let expected = crc32c::crc32c(&wire.as_bytes()[..WIRE_BYTES - 4]);
        if wire.crc32c.get() != expected {
            return Err(SuperblockError::Checksum {
                found: wire.crc32c.get(),
                expected,
            });
        }
        if ![FORMAT_VERSION, VERSION_WITH_MERGES].contains(&wire.version.get()) {
            return Err(SuperblockError::Version(wire.version.get()));
        }
        if wire.volume != identity.volume.0 || wire.birth_nonce != identity.birth_nonce {
            return Err(SuperblockError::Foreign {
                found: VolumeId(wire.volume),
                expected: identity.volume,
            });
        }
        let superblock = Self {
            generation: wire.generation.get(),
            checkpoint: Epoch(wire.checkpoint.get()),
            checkpoint_offset: LogOffset(wire.checkpoint_offset.get()),
            checkpoint_chain: ChainHash(wire.checkpoint_chain),
            retained: Epoch(wire.retained.get()),
            retained_offset: LogOffset(wire.retained_offset.get()),
            retained_chain: ChainHash(wire.retained_chain),
            retained_rank: Rank {
                term: wire.retained_term.get(),
                incarnation: Incarnation(wire.retained_incarnation.get()),
            },
            durable: Epoch(wire.durable.get()),
            swept: Epoch(wire.swept.get()),
            session: wire.session.get(),
            term: Term {
                counter: wire.term_counter.get(),
                node: NodeId(wire.term_node),
            },
            incarnation: Incarnation(wire.incarnation.get()),
            node: NodeId(wire.node),
            role: match wire.role {
                0 => Role::Primary,
                1 => Role::Replica,
                2 => Role::Fenced,
                other => return impossible("role", other.into()),
            },
            own_tail: match wire.own_tail {
                0 => false,
                1 => true,
                other => return impossible("own_tail", other.into()),
            },
            copy: decode_copy(&wire)?,
            ground: match wire.ground {
                0 => Ground::Nothing,
                1 => Ground::Brought,
                2 => Ground::Mixed,
                other => return impossible("ground", other.into()),
            },
            merge_era: Some(wire.merge_era.get()).filter(|&era| era != 0),
        };
        if wire.version.get() != version_of(superblock.merge_era) {
            return impossible("merge_era", wire.merge_era.get());
        }
        superblock.check(identity)?;
        Ok(superblock)
    }

    fn check(&self, identity: &LogIdentity) -> Result<(), SuperblockError> {
        if self.retained > self.checkpoint {
            return impossible("retained", self.retained.0);
        }
        if self.retained_offset > self.checkpoint_offset {
            return impossible("retained_offset", self.retained_offset.0);
        }
        if self.durable < self.checkpoint {
            return impossible("durable", self.durable.0);
        }
        if self.swept > self.durable {
            return impossible("swept", self.swept.0);
        }
        if let CopyState::Seeding { cursor_bytes, .. } | CopyState::Shadowing { cursor_bytes, .. } =
            self.copy
            && cursor_bytes > identity.size_bytes
        {
            return impossible("seed_cursor", cursor_bytes);
        }
        Ok(())
    }

    /// The newer of two slots, if at least one is valid, with the index of its slot.
    ///
    /// # Errors
    /// The error of the first slot, if neither can be used.
    pub fn newest(
        identity: &LogIdentity,
        slots: [&[u8]; 2],
    ) -> Result<(Self, usize), SuperblockError> {
        let [first, second] = slots.map(|slot| Self::decode(identity, slot));
        match (first, second) {
            (Ok(a), Ok(b)) if b.generation > a.generation => Ok((b, 1)),
            (Ok(a), _) => Ok((a, 0)),
            (Err(_), Ok(b)) => Ok((b, 1)),
            (Err(error), Err(_)) => Err(error),
        }
    }
}

/// How a copy state lies in the superblock; what does not belong to its kind is zero.
#[derive(Default)]
struct WireCopy {
    kind: u8,
    cursor: u64,
    from: Epoch,
    until: u64,
    shadow: u64,
    from_chain: ChainHash,
}

impl WireCopy {
    fn of(copy: &CopyState) -> Self {
        match *copy {
            CopyState::Fresh => Self::default(),
            CopyState::Seeding {
                cursor_bytes,
                from,
                until,
            } => Self {
                kind: COPY_SEEDING,
                cursor: cursor_bytes,
                from,
                until: until.map_or(0, |until| until.0 + 1),
                ..Self::default()
            },
            CopyState::Usable => Self {
                kind: COPY_USABLE,
                ..Self::default()
            },
            CopyState::Shadowing {
                cursor_bytes,
                shadow_bytes,
                from,
                from_chain,
            } => Self {
                kind: COPY_SHADOWING,
                cursor: cursor_bytes,
                shadow: shadow_bytes,
                from,
                from_chain,
                ..Self::default()
            },
            CopyState::Applying {
                shadow_bytes,
                from,
                from_chain,
            } => Self {
                kind: COPY_APPLYING,
                shadow: shadow_bytes,
                from,
                from_chain,
                ..Self::default()
            },
        }
    }
}

fn decode_copy(wire: &Wire) -> Result<CopyState, SuperblockError> {
    let cursor_bytes = wire.seed_cursor.get();
    let shadow_bytes = wire.shadow_bytes.get();
    let from = Epoch(wire.seed_from.get());
    let from_chain = ChainHash(wire.seed_from_chain);
    if !shadow_bytes.is_multiple_of(crate::types::BLOCK_BYTES) {
        return impossible("shadow_bytes", shadow_bytes);
    }
    Ok(match wire.copy {
        COPY_FRESH => CopyState::Fresh,
        COPY_SEEDING => CopyState::Seeding {
            cursor_bytes,
            from,
            until: wire.seed_until.get().checked_sub(1).map(Epoch),
        },
        COPY_USABLE => CopyState::Usable,
        COPY_SHADOWING => CopyState::Shadowing {
            cursor_bytes,
            shadow_bytes,
            from,
            from_chain,
        },
        COPY_APPLYING => CopyState::Applying {
            shadow_bytes,
            from,
            from_chain,
        },
        other => return impossible("copy", other.into()),
    })
}

fn impossible<T>(field: &'static str, value: u64) -> Result<T, SuperblockError> {
    Err(SuperblockError::Field { field, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> LogIdentity {
        LogIdentity {
            volume: VolumeId([1; 16]),
            birth_nonce: [2; 16],
            size_bytes: 1 << 20,
            sector_bytes: 512,
        }
    }

    fn sample(generation: u64) -> Superblock {
        Superblock {
            generation,
            checkpoint: Epoch(10),
            checkpoint_offset: LogOffset(40960),
            checkpoint_chain: ChainHash([3; 32]),
            retained: Epoch(5),
            retained_offset: LogOffset(4096),
            retained_chain: ChainHash([4; 32]),
            retained_rank: Rank {
                term: 2,
                incarnation: Incarnation(1),
            },
            durable: Epoch(12),
            swept: Epoch(11),
            session: 3,
            term: Term {
                counter: 2,
                node: NodeId([5; 16]),
            },
            incarnation: Incarnation(1),
            node: NodeId([6; 16]),
            role: Role::Replica,
            own_tail: true,
            copy: CopyState::Seeding {
                cursor_bytes: 65536,
                from: Epoch(4),
                until: Some(Epoch(0)),
            },
            ground: Ground::Brought,
            merge_era: None,
        }
    }

    fn encoded(superblock: &Superblock) -> [u8; 4096] {
        let mut block = [0xEE; 4096];
        superblock.encode(&identity(), &mut block);
        block
    }

    #[test]
    fn superblock_round_trips_in_every_copy_state() {
        let (shadow_bytes, from, from_chain) = (8192, Epoch(7), ChainHash([9; 32]));
        let shadowing = CopyState::Shadowing {
            cursor_bytes: 4096,
            shadow_bytes,
            from,
            from_chain,
        };
        let applying = CopyState::Applying {
            shadow_bytes,
            from,
            from_chain,
        };
        let (fresh, usable, seeding) = (CopyState::Fresh, CopyState::Usable, sample(1).copy);
        for copy in [fresh, usable, seeding, shadowing, applying] {
            for ground in [Ground::Nothing, Ground::Brought, Ground::Mixed] {
                let superblock = Superblock {
                    copy,
                    ground,
                    ..sample(1)
                };
                let block = encoded(&superblock);
                assert_eq!(Superblock::decode(&identity(), &block), Ok(superblock));
            }
        }
    }

    #[test]
    fn a_superblock_that_names_a_merge_area_has_a_version_that_older_programs_refuse() {
        let merges = Superblock {
            merge_era: Some(3),
            ..sample(1)
        };
        let block = encoded(&merges);
        assert_eq!(block[8..10], [2, 0]);
        assert_eq!(Superblock::decode(&identity(), &block), Ok(merges));
        assert_eq!(encoded(&sample(1))[8..10], [1, 0]);
    }

    #[test]
    fn every_flipped_bit_of_a_superblock_is_refused() {
        let block = encoded(&sample(1));
        for bit in 0..WIRE_BYTES * 8 {
            let mut bad = block;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(
                Superblock::decode(&identity(), &bad).is_err(),
                "bit {bit} went unnoticed"
            );
        }
    }

    #[test]
    fn a_torn_newer_slot_leaves_the_older_one_in_force() {
        let older = encoded(&sample(1));
        let mut newer = encoded(&sample(2));
        assert_eq!(
            Superblock::newest(&identity(), [&older, &newer]),
            Ok((sample(2), 1))
        );
        newer[100] ^= 1;
        assert_eq!(
            Superblock::newest(&identity(), [&older, &newer]),
            Ok((sample(1), 0))
        );
        assert!(Superblock::newest(&identity(), [&newer, &newer]).is_err());
    }

    #[test]
    fn a_superblock_of_another_volume_is_refused() {
        let other = LogIdentity {
            birth_nonce: [0; 16],
            ..identity()
        };
        let block = encoded(&sample(1));
        assert!(matches!(
            Superblock::decode(&other, &block),
            Err(SuperblockError::Foreign { .. })
        ));
    }
}
