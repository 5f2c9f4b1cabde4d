//! Which copy of the superblock is the volume.
//!
//! The reference takes the first valid copy that it meets as the identity of the volume, so a
//! foreign North beats three mirrors that agree (defect 12), and looks for mirrors where the
//! *device's* capacity puts them, which for a volume of another size is somewhere in its data
//! (defect 3). The corrected vote lets the most frequent UUID win, and also looks where the
//! superblock's own capacity puts the copies.
//= HN4_SPEC 9, Vote

use zerocopy::IntoBytes;

use super::copies::{self, Cardinal, position};
use super::{SUPERBLOCK_BYTES, Superblock, state};
use crate::num::round_up;
use crate::plan::{Data, Medium};
use crate::status::{Code, Conduct, Defect, Problem, Region};

const MAX_TIME_DIFFERENCE_NS: u64 = 60_000_000_000;
const HEAL_TIME_DIFFERENCE_NS: u64 = 600_000_000_000;
const PROBED_BLOCK_SIZES: [u64; 3] = [4096, 16384, 65536];

/// A copy that was looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Copy {
    /// Which of the four.
    pub cardinal: Cardinal,
    /// Byte offset.
    pub offset: u64,
    /// The superblock, or why it is none.
    pub content: Result<Box<Superblock>, Problem>,
}

/// The outcome of a vote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Winner {
    /// The copy that speaks for the volume.
    pub superblock: Superblock,
    /// All copies that were looked at.
    pub copies: Vec<Copy>,
    /// Defects of the reference that would have changed the outcome.
    pub corrections: Vec<Defect>,
}

/// Reads and checks the copy at a byte offset.
///
/// # Errors
/// Why the copy is none.
pub fn read_copy(medium: &Medium<'_>, offset: u64) -> Result<Superblock, Problem> {
    let sector = medium.device.sector();
    let lba = offset / sector;
    let bytes = medium.read_vec(
        Region::Superblock,
        offset,
        round_up(SUPERBLOCK_BYTES, sector),
    )?;
    let superblock = Superblock::from_bytes(&bytes).ok_or_else(|| {
        let advice = "check the device";
        let found = format!("{} bytes", bytes.len());
        Problem::new(
            Code::HwIo,
            (Region::Superblock, lba),
            found,
            "8192 bytes",
            advice,
        )
    })?;
    superblock.check(sector, lba).map(|()| superblock)
}

fn candidate_block_sizes(sector: u64, north: Option<&Superblock>) -> Vec<u64> {
    let mut sizes = Vec::new();
    let from_north = north.map(|superblock| u64::from(superblock.block_size.get()));
    let mut last = None;
    for size in [sector]
        .into_iter()
        .chain(PROBED_BLOCK_SIZES)
        .chain(from_north)
    {
        let repeated = last.replace(size) == Some(size);
        if size >= sector && size % sector == 0 && !repeated {
            sizes.push(size);
        }
    }
    sizes
}

/// Puts two copies of one volume into order. `Ok(true)` when `other` speaks for the volume.
fn beats(best: &Superblock, other: &Superblock, lba: u64) -> Result<bool, Problem> {
    let at = (Region::Superblock, lba);
    let advice = "two timelines look alike: keep one of them and wipe or re-identify the other";
    let tampered = |found: String, expected: String| {
        Err(Problem::new(Code::Tampered, at, found, expected, advice))
    };
    let (generation, known) = (other.copy_generation.get(), best.copy_generation.get());
    let difference = generation.wrapping_sub(known);
    let newer = difference != 0 && difference < 1 << 63;
    if other.uuid() != best.uuid() {
        if difference == 0 {
            let found = format!("UUID {}", crate::num::hex(&other.uuid()));
            return tampered(found, crate::num::hex(&best.uuid()));
        }
        return Ok(false);
    }
    if difference == 0 && other.block_size != best.block_size {
        let found = format!("blocks of {} bytes", other.block_size.get());
        return tampered(found, format!("{}", best.block_size.get()));
    }
    if difference != 0 {
        return Ok(newer);
    }
    let (time, best_time) = (other.last_mount_time.get(), best.last_mount_time.get());
    if time.abs_diff(best_time) > MAX_TIME_DIFFERENCE_NS {
        let found = format!("generation {generation} mounted at {time} ns");
        return tampered(found, format!("{best_time} ns, at most 60 s apart"));
    }
    if time != best_time {
        return Ok(time > best_time);
    }
    Ok(best.has_state(state::CLEAN) && !other.has_state(state::CLEAN))
}

/// Every copy that can be found, North first, each position once for each block size probed.
fn collect(medium: &Medium<'_>, north: Option<&Superblock>, conduct: Conduct) -> Vec<Copy> {
    let device = medium.device;
    let mut found: Vec<Copy> = Vec::new();
    let look = |cardinal, offset: Option<u64>, block_size: u64, found: &mut Vec<Copy>| {
        let Some(offset) = offset else { return };
        // Several block sizes may share an offset: the copy votes when its own one does.
        let known = found
            .iter()
            .position(|copy| copy.offset == offset && copy.cardinal == cardinal);
        if known.is_some_and(|index| found[index].content.is_ok()) {
            return;
        }
        let mut content = read_copy(medium, offset).map(Box::new);
        if let Ok(superblock) = &content
            && u64::from(superblock.block_size.get()) != block_size
        {
            let advice = "the copy belongs to a volume with other blocks; it does not vote";
            let what = format!("blocks of {} bytes", superblock.block_size.get());
            let at = (Region::Superblock, offset / device.sector());
            content = Err(Problem::new(
                Code::BadSuperblock,
                at,
                what,
                block_size,
                advice,
            ));
        }
        match known {
            Some(_) if content.is_err() => return,
            Some(index) => drop(found.remove(index)),
            None => {}
        }
        found.push(Copy {
            cardinal,
            offset,
            content,
        });
    };
    for block_size in candidate_block_sizes(device.sector(), north) {
        for cardinal in Cardinal::ALL {
            if device.is_zns() && cardinal != Cardinal::North {
                continue;
            }
            let offset = position(cardinal, device.capacity, block_size);
            look(cardinal, offset, block_size, &mut found);
            if let Some(capacity) = own_capacity(north, block_size).filter(|_| conduct.corrects()) {
                look(
                    cardinal,
                    position(cardinal, capacity, block_size),
                    block_size,
                    &mut found,
                );
            }
        }
    }
    found
}

/// The capacity that a virtual volume's own superblock names.
fn own_capacity(north: Option<&Superblock>, block_size: u64) -> Option<u64> {
    let north = north?;
    let same = u64::from(north.block_size.get()) == block_size;
    (same && north.is_virtual()).then(|| north.total_capacity.get())
}

/// The UUID that most copies carry, and whether it is the only one.
fn majority(copies: &[Copy]) -> Option<([u8; 16], bool)> {
    let uuids: Vec<[u8; 16]> = copies
        .iter()
        .filter_map(|copy| Some(copy.content.as_ref().ok()?.uuid()))
        .collect();
    let votes = |uuid: &[u8; 16]| uuids.iter().filter(|other| *other == uuid).count();
    let best = uuids.iter().map(votes).max()?;
    let mut winners: Vec<_> = uuids.iter().filter(|uuid| votes(uuid) == best).collect();
    winners.dedup();
    let unanimous = best == uuids.len();
    (winners.iter().all(|uuid| *uuid == winners[0])).then(|| (*winners[0], unanimous))
}

/// Lets the copies on a device vote.
///
/// # Errors
/// [`Code::WipePending`], [`Code::BadSuperblock`] when no copy is valid, [`Code::Tampered`] when
/// two copies cannot both be true.
pub fn vote(medium: &Medium<'_>, conduct: Conduct) -> Result<Winner, Problem> {
    let first = read_copy(medium, 0);
    if let Err(problem) = &first
        && problem.code == Code::WipePending
    {
        return Err(problem.clone());
    }
    let north = first.as_ref().ok();
    let copies = collect(medium, north, conduct);
    let mut corrections = Vec::new();
    let mut best = north.copied();
    let mut elected = None;
    if conduct.corrects()
        && let Some((uuid, false)) = majority(&copies)
    {
        elected = Some(uuid);
        let first = copies.iter().find_map(|copy| copy.content.as_deref().ok());
        if best
            .as_ref()
            .or(first)
            .is_some_and(|first| first.uuid() != uuid)
        {
            best = None;
            corrections.push(Defect(12));
        }
    }
    let mut outvoted = Vec::new();
    for copy in &copies {
        let Ok(superblock) = &copy.content else {
            continue;
        };
        if elected.is_some_and(|uuid| superblock.uuid() != uuid) {
            outvoted.push((&**superblock, copy.offset));
            continue;
        }
        match &best {
            None => best = Some(**superblock),
            Some(known) => {
                if beats(known, superblock, copy.offset / medium.device.sector())? {
                    best = Some(**superblock);
                }
            }
        }
    }
    check_outvoted(medium, best.as_ref(), &outvoted)?;
    let Some(mut superblock) = best else {
        let problem = first.err().filter(|problem| problem.code != Code::HwIo);
        let found = problem.map_or_else(|| "no readable copy".to_owned(), |p| p.found);
        let advice = "restore a superblock from another copy of the volume, or format";
        let at = (Region::Superblock, 0);
        return Err(Problem::new(
            Code::BadSuperblock,
            at,
            found,
            "one valid copy",
            advice,
        ));
    };
    if conduct.corrects() {
        take_newest_sequence(&mut superblock, &copies, &mut corrections);
    }
    Ok(Winner {
        superblock,
        copies,
        corrections,
    })
}

/// An outvoted copy does not speak, but one of the same generation is still a reason to stop.
fn check_outvoted(
    medium: &Medium<'_>,
    best: Option<&Superblock>,
    outvoted: &[(&Superblock, u64)],
) -> Result<(), Problem> {
    let Some(best) = best else { return Ok(()) };
    for (superblock, offset) in outvoted {
        beats(best, superblock, offset / medium.device.sector())?;
    }
    Ok(())
}

/// Mirrors keep an old chronicle head, and so may the winner: the highest sequence that any copy of
/// the same generation knows is the one that must exist (defect 13).
fn take_newest_sequence(best: &mut Superblock, copies: &[Copy], corrections: &mut Vec<Defect>) {
    for copy in copies {
        let Ok(other) = &copy.content else { continue };
        let same = other.uuid() == best.uuid() && other.copy_generation == best.copy_generation;
        if same && other.last_journal_seq.get() > best.last_journal_seq.get() {
            best.last_journal_seq = other.last_journal_seq;
            best.journal_ptr = other.journal_ptr;
            corrections.push(Defect(13));
        }
    }
}

/// Plans the rewriting of bad or old copies. Returns whether all of it is expected to work.
///
/// The reference heals where the device's capacity puts the copies; the corrected form where the
/// superblock's does, since the other places hold data.
pub fn heal(medium: &mut Medium<'_>, best: &Superblock, conduct: Conduct) -> bool {
    let device = medium.device;
    let block = u64::from(best.block_size.get());
    if block == 0 {
        // The reference divides by zero here.
        return false;
    }
    let capacity = if conduct.corrects() {
        best.total_capacity.get()
    } else {
        device.capacity
    };
    let mut sound = true;
    let fitting: Vec<_> =
        copies::fitting(capacity, block, device.is_zns(), device.capacity).collect();
    for (_, offset) in fitting {
        let keep = read_copy(medium, offset).is_ok_and(|copy| {
            let apart = copy
                .last_mount_time
                .get()
                .abs_diff(best.last_mount_time.get());
            copy.copy_generation == best.copy_generation && apart <= HEAL_TIME_DIFFERENCE_NS
        });
        if keep {
            continue;
        }
        let data = Data::padded(best.as_bytes(), copies::copy_bytes(block));
        let written = medium.write(offset, data).and_then(|()| medium.flush());
        sound &= written.is_ok() && read_copy(medium, offset).is_ok();
    }
    sound
}
