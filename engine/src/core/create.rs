//! Creating a log.
//!
//! **Invariant:** a creation that was cut off leaves no log behind: the headers come last.

use hn4::log::{
    CopyState, Ground, HEADER_A, HEADER_B, LogHeader, LogIdentity, RING_START, Role, SUPERBLOCK_0,
    SUPERBLOCK_1, Superblock,
};
use hn4::types::{BLOCK_BYTES, ChainHash, Epoch, Incarnation, LogOffset, NodeId, Rank, Term};

use super::merge;
use super::recovery::{AlignedBlock, Medium, RecoveryError, block_at, flush, write_blocks};
use super::seal::Lanes;

/// What a new log is for.
#[derive(Clone, Copy, Debug)]
pub struct NewLog {
    /// The volume.
    pub identity: LogIdentity,
    /// The node it is on.
    pub node: NodeId,
    /// How blocks are dealt out.
    pub lanes: Lanes,
    /// Primary (the backing's contents are the volume) or replica (they are nothing yet).
    pub role: Role,
    /// The backing of a replica holds data that is expected to be the primary's, mostly.
    pub seeded: bool,
    /// Milliseconds since 1970.
    pub created_ms: u64,
}

/// Writes header and superblock of a new log. The ring must be allocated already.
///
/// # Errors
/// If there is anything at the start of the device, or it is too small, or it fails.
pub fn create(medium: &mut dyn Medium, new: &NewLog) -> Result<LogHeader, RecoveryError> {
    for offset in [HEADER_A, HEADER_B, SUPERBLOCK_0, SUPERBLOCK_1] {
        let block = block_at(medium, offset)?;
        if let Ok(header) = LogHeader::decode(&block.0) {
            let volume = header.identity.volume;
            return Err(RecoveryError::InUse(format!(
                "this is the log of volume {volume}"
            )));
        }
        if block.0.iter().any(|&byte| byte != 0) {
            let why = format!("the device holds data at byte {offset}");
            return Err(RecoveryError::InUse(why));
        }
    }
    let ring_bytes = medium.size_bytes().saturating_sub(RING_START) / BLOCK_BYTES * BLOCK_BYTES;
    let header = LogHeader {
        identity: new.identity,
        ring_bytes,
        lanes: new.lanes.count,
        stripe_blocks: new.lanes.stripe_blocks,
        created_ms: new.created_ms,
    };
    let mut block = AlignedBlock([0; 4096]);
    header.encode(&mut block.0);
    LogHeader::decode(&block.0).map_err(RecoveryError::Header)?;
    let primary = new.role == Role::Primary;
    let superblock = Superblock {
        generation: 1,
        checkpoint: Epoch(0),
        checkpoint_offset: LogOffset(0),
        checkpoint_chain: ChainHash::default(),
        retained: Epoch(0),
        retained_offset: LogOffset(0),
        retained_chain: ChainHash::default(),
        retained_rank: Rank::default(),
        durable: Epoch(0),
        swept: Epoch(0),
        session: 1,
        term: if primary {
            Term {
                counter: 1,
                node: new.node,
            }
        } else {
            Term::default()
        },
        incarnation: Incarnation(0),
        node: new.node,
        role: new.role,
        own_tail: false,
        copy: if primary {
            CopyState::Usable
        } else {
            CopyState::Fresh
        },
        ground: if new.seeded && !primary {
            Ground::Brought
        } else {
            Ground::Nothing
        },
        merge_era: None,
    };
    let mut superblock_block = AlignedBlock([0; 4096]);
    superblock.encode(&new.identity, &mut superblock_block.0);
    merge::clear(medium)?;
    write_blocks(medium, SUPERBLOCK_0, &[superblock_block])?;
    flush(medium)?;
    // The headers come last: a creation that was cut off leaves no log behind.
    write_blocks(medium, HEADER_B, &[block])?;
    write_blocks(medium, HEADER_A, &[block])?;
    flush(medium)?;
    Ok(header)
}
