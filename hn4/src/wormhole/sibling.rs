//! Making a copy of a volume a volume of its own: the regions of HN4_SPEC 12, rewritten in place.
//!
//! A raw copy has its source's superblocks: mounting both would let two timelines look alike, and a
//! copy of a mounted source is dirty with old maps. The plan writes, in this order: the reset
//! quality mask (it describes the medium), an epoch record of its own, the chronicle (kept and
//! extended by a fork entry, or cleared where its tip does not verify), then the superblocks,
//! mirrors first and North last, so that a crash leaves the source's North, never a half-new
//! volume.
//! Cortex, bitmap, flux and horizon stay as they were copied.

use zerocopy::IntoBytes;

use super::clone::{KIND_GENESIS, tip_of};
use super::{diverged_generation, require_strict_flush};
use crate::chronicle::append::{self, Fork, Request};
use crate::chronicle::{Bounds, LinkKey, OpCode, verify};
use crate::epoch_ring::{self, EpochRecord};
use crate::mount::dirty;
use crate::num::round_up;
use crate::plan::{Data, Medium, Op};
use crate::qmask::SILVER_FILL;
use crate::status::{Code, Conduct, Problem, Region};
use crate::superblock::copies::Cardinal;
use crate::superblock::{Superblock, intent, state};

/// Who the copy becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Becomes {
    /// A wormhole sibling: the same UUID, a timeline of its own.
    Sibling,
    /// Another volume: a new UUID. Nano objects depend on the UUID and do not survive this.
    Stranger {
        /// Low half of the new UUID.
        lo: u64,
        /// High half of the new UUID.
        hi: u64,
    },
}

/// How to rewrite a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rewrite {
    /// Who it becomes.
    pub becomes: Becomes,
    /// Drawn at random for this fork.
    pub fork_id: [u8; 16],
    /// Nanoseconds since 1970.
    pub now_ns: u64,
    /// Key of the chronicle's links.
    pub key: LinkKey,
}

fn failed(region: Region) -> impl Fn(Code) -> Problem {
    move |code| {
        let advice = "the copy is unfinished; copy again";
        Problem::new(code, (region, 0), "a failing write", "success", advice)
    }
}

/// Plans the rewriting of a raw copy and returns its new superblock. `copied` is the superblock as
/// it was copied (the winner of a vote on the copy).
///
/// # Errors
/// [`Code::HwIo`] for a sibling on a device without strict flushes; the device's codes.
pub fn rewrite(
    medium: &mut Medium<'_>,
    copied: &Superblock,
    request: &Rewrite,
) -> Result<Superblock, Problem> {
    if request.becomes == Becomes::Sibling {
        require_strict_flush(&medium.device)?;
    }
    let source_tip = tip_of(medium, copied);
    let mut superblock = *copied;
    identify(&mut superblock, request);
    reset_qmask(medium, &superblock)?;
    write_epoch(medium, &mut superblock, request.now_ns)?;
    continue_chronicle(medium, &mut superblock, copied, source_tip, request)?;
    let superblock = superblock.sealed();
    let mut places = dirty::targets(medium, &superblock);
    places.sort_by_key(|&(cardinal, _)| cardinal == Cardinal::North);
    for (cardinal, offset) in places {
        if cardinal == Cardinal::North {
            medium.flush().map_err(failed(Region::Superblock))?;
            dirty::reset_zone(medium, offset).map_err(failed(Region::Superblock))?;
        }
        if offset < medium.device.capacity {
            let written = dirty::write_plain(medium, &superblock, offset);
            written.map_err(failed(Region::Superblock))?;
        }
    }
    medium.flush().map_err(failed(Region::Superblock))?;
    Ok(superblock)
}

fn identify(superblock: &mut Superblock, request: &Rewrite) {
    let generation = superblock.copy_generation.get();
    superblock.copy_generation = diverged_generation(generation, &request.fork_id).into();
    superblock.last_mount_time = request.now_ns.into();
    // What was true of the source's last mount is not of this copy; a dirty copy stays dirty, so
    // that its maps are checked by the next mount.
    superblock.change_state(0, state::UNMOUNTING | state::LOCKED | state::PANIC);
    let mut flags = superblock.mount_intent.get() & intent::VIRTUAL;
    match request.becomes {
        Becomes::Sibling => flags |= intent::WORMHOLE,
        Becomes::Stranger { lo, hi } => {
            superblock.uuid_lo = lo.into();
            superblock.uuid_hi = hi.into();
        }
    }
    superblock.mount_intent = flags.into();
    // The device type tag is part of the addresses of all data that was copied: it stays, even on
    // a medium of another kind.
}

fn reset_qmask(medium: &mut Medium<'_>, superblock: &Superblock) -> Result<(), Problem> {
    let sector = medium.device.sector();
    let start = superblock.lba_qmask_start.get().saturating_mul(sector);
    let end = superblock.lba_flux_start.get().saturating_mul(sector);
    let length = end.saturating_sub(start);
    if length == 0 {
        return Ok(());
    }
    let data = Data::filled(SILVER_FILL, length);
    medium
        .push(Op::Write {
            offset: start,
            data,
        })
        .map_err(failed(Region::Qmask))
}

/// The next slot of the ring gets a record that agrees with the new generation.
fn write_epoch(
    medium: &mut Medium<'_>,
    superblock: &mut Superblock,
    now_ns: u64,
) -> Result<(), Problem> {
    let sector = medium.device.sector();
    let advance = epoch_ring::advance(superblock, sector, now_ns, false, Conduct::Corrected)?;
    let block = u64::from(superblock.block_size.get());
    let record: &EpochRecord = &advance.record;
    let offset = advance.block.saturating_mul(block);
    let written = medium.write(offset, Data::padded(record.as_bytes(), block));
    written
        .and_then(|()| medium.flush())
        .map_err(failed(Region::EpochRing))?;
    superblock.current_epoch_id = advance.epoch_id.into();
    superblock.epoch_ring_block_idx = advance.block.into();
    Ok(())
}

fn continue_chronicle(
    medium: &mut Medium<'_>,
    superblock: &mut Superblock,
    copied: &Superblock,
    source_tip: Option<(u64, [u8; 32])>,
    request: &Rewrite,
) -> Result<(), Problem> {
    let bounds = Bounds::of(superblock, medium.device.sector());
    let sector = medium.device.sector();
    if bounds.end.saturating_mul(sector) > medium.device.capacity || bounds.start >= bounds.end {
        return Ok(());
    }
    let mut trial = *superblock;
    let mut beside = Medium::beside(medium);
    let sound = verify::verify(&mut beside, &mut trial, Conduct::Corrected, &request.key).is_ok();
    if sound {
        superblock.journal_ptr = trial.journal_ptr;
        superblock.last_journal_seq = trial.last_journal_seq;
    } else {
        // A history that cannot be trusted is not continued. The source still has its own.
        let length = round_up((bounds.end - bounds.start) * sector, sector);
        let data = Data::filled(0, length);
        let written = medium.push(Op::Write {
            offset: bounds.start * sector,
            data,
        });
        written.map_err(failed(Region::Chronicle))?;
        superblock.journal_ptr = bounds.start.into();
        superblock.last_journal_seq = 0.into();
    }
    let (sequence, tip) = source_tip.unwrap_or_default();
    let fork = Fork {
        kind: KIND_GENESIS,
        peer_generation: copied.copy_generation.get(),
        peer_sequence: sequence,
        peer_tip: tip,
        fork_id: request.fork_id,
    };
    let principal = copied.uuid_lo.get();
    let context = (copied.journal_ptr.get(), copied.journal_start.get());
    let entry = Request::new(
        OpCode::Fork,
        context.0,
        context.1,
        principal,
        request.now_ns,
    );
    let entry = Request {
        fork: Some(fork),
        ..entry
    };
    append::append_entry(medium, superblock, &entry, Conduct::Corrected, &request.key).map(|_| ())
}
