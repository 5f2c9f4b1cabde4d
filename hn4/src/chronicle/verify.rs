//! Verifying the chronicle, as the reference does and as its seed promises.
//!
//! Both heal "phantom heads": entries that were written when the superblock that counts them was
//! not. The corrected verifier also wants sequence numbers without holes, each entry in the slot of
//! its number, and BLAKE3 links where entries carry them.
//= HN4_SPEC 5

use super::append::write_north;
use super::{Bounds, LinkKey, Sector, predecessor};
use crate::num::round_down;
use crate::plan::Medium;
use crate::status::{Code, Conduct, Problem, Region};
use crate::superblock::{Superblock, state};

/// Entries that one verification walks over at most.
pub const MAX_STEPS: u64 = 65536;

/// What a verification found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Phantom heads that were taken in; each rewrote North.
    pub healed_entries: u32,
    /// Entries that were checked, the newest one first.
    pub checked: u64,
    /// Entries among them that carry a BLAKE3 link.
    pub linked: u64,
    /// True when the walk reached the first entry.
    pub complete: bool,
}

struct Walk<'m, 's> {
    medium: &'m Medium<'s>,
    start: u64,
    end: u64,
}

impl Walk<'_, '_> {
    fn sector(&self, lba: u64) -> Option<Sector> {
        let size = self.medium.device.sector();
        let bytes = self
            .medium
            .read_vec(Region::Chronicle, lba.checked_mul(size)?, size)
            .ok()?;
        Sector::parse(bytes, lba)
    }

    fn before(&self, lba: u64) -> u64 {
        predecessor(lba, self.start, self.end)
    }

    fn after(&self, lba: u64) -> u64 {
        if lba + 1 >= self.end {
            self.start
        } else {
            lba + 1
        }
    }
}

fn tampered(
    superblock: &mut Superblock,
    lba: u64,
    found: impl std::fmt::Display,
    expected: impl std::fmt::Display,
) -> Problem {
    superblock.change_state(state::PANIC, 0);
    let advice = "history was changed: compare with another copy before trusting this one";
    Problem::new(
        Code::Tampered,
        (Region::Chronicle, lba),
        found,
        expected,
        advice,
    )
}

/// Verifies the chronicle, healing the head in `superblock` and in the plan.
///
/// # Errors
/// [`Code::BadSuperblock`] for a head outside the ring, [`Code::Tampered`] with PANIC set for a
/// history that was changed.
pub fn verify(
    medium: &mut Medium<'_>,
    superblock: &mut Superblock,
    conduct: Conduct,
    key: &LinkKey,
) -> Result<Report, Problem> {
    let bounds = Bounds::of(superblock, medium.device.sector());
    let end = if conduct.corrects() {
        bounds.end
    } else {
        bounds.verify_end
    };
    let head = superblock.journal_ptr.get();
    if !(bounds.start..end).contains(&head) {
        let expected = format!("a head from {} to {end}", bounds.start);
        let advice = "heal the superblock from another copy";
        let at = (Region::Chronicle, head);
        return Err(Problem::new(
            Code::BadSuperblock,
            at,
            head,
            expected,
            advice,
        ));
    }
    let healed_entries = heal(medium, superblock, &bounds, end, conduct)?;
    let walk = Walk {
        medium,
        start: bounds.start,
        end,
    };
    let mut report = if conduct.corrects() {
        let wrap = if bounds.agree() {
            end
        } else {
            bounds.reference_append_end.max(end)
        };
        check_all(&Walk { end: wrap, ..walk }, superblock, &bounds, key)?
    } else {
        check_as_reference(&walk, superblock)?
    };
    report.healed_entries = healed_entries;
    Ok(report)
}

/// Takes in entries that follow the head.
fn heal(
    medium: &mut Medium<'_>,
    superblock: &mut Superblock,
    bounds: &Bounds,
    end: u64,
    conduct: Conduct,
) -> Result<u32, Problem> {
    let mut healed = 0;
    for _ in 0..end - bounds.start {
        let head = superblock.journal_ptr.get();
        let walk = Walk {
            medium,
            start: bounds.start,
            end,
        };
        let Some(next) = walk.sector(head) else { break };
        let sequence = next.entry.sequence.get();
        let follows = match walk.sector(walk.before(head)) {
            Some(before) => {
                sequence == before.entry.sequence.get().wrapping_add(1)
                    && next.entry.prev_sector_crc.get() == before.crc()
            }
            // The very first entry, whose superblock was lost: the reference calls the log empty.
            None => {
                conduct.corrects()
                    && head == bounds.start
                    && superblock.last_journal_seq.get() == 0
                    && sequence == 1
                    && next.entry.prev_sector_crc.get() == 0
            }
        };
        if !follows {
            break;
        }
        superblock.journal_ptr = walk.after(head).into();
        superblock.last_journal_seq = sequence.into();
        write_north(medium, superblock).map_err(|code| {
            superblock.change_state(state::PANIC, 0);
            let advice = "check the device";
            let found = "a failing write of the healed head";
            Problem::new(code, (Region::Superblock, 0), found, "success", advice)
        })?;
        healed += 1;
    }
    Ok(healed)
}

fn check_as_reference(walk: &Walk<'_, '_>, superblock: &mut Superblock) -> Result<Report, Problem> {
    let head = superblock.journal_ptr.get();
    let mut at = walk.before(head);
    let Some(mut entry) = walk.sector(at) else {
        if head == walk.start {
            return Ok(Report::default());
        }
        return Err(tampered(
            superblock,
            at,
            "no valid entry",
            "the newest entry",
        ));
    };
    let (known, newest) = (
        superblock.last_journal_seq.get(),
        entry.entry.sequence.get(),
    );
    if known > 0 && newest < known {
        let found = format!("newest sequence {newest}");
        return Err(tampered(
            superblock,
            at,
            found,
            format!("{known}, as the superblock says"),
        ));
    }
    let mut report = Report {
        checked: 1,
        ..Report::default()
    };
    for _ in 0..(walk.end - walk.start).min(MAX_STEPS) {
        if entry.entry.sequence.get() == 1 {
            report.complete = true;
            break;
        }
        at = walk.before(at);
        let Some(before) = walk.sector(at) else { break };
        check_crc_link(superblock, &entry, &before, at)?;
        entry = before;
        report.checked += 1;
    }
    Ok(report)
}

fn check_crc_link(
    superblock: &mut Superblock,
    entry: &Sector,
    before: &Sector,
    at: u64,
) -> Result<(), Problem> {
    let (linked, computed) = (entry.entry.prev_sector_crc.get(), before.crc());
    if linked == computed {
        return Ok(());
    }
    let found = format!("a sector with checksum {computed:#010x}");
    Err(tampered(
        superblock,
        at,
        found,
        format!("{linked:#010x}, as the next entry says"),
    ))
}

/// The newest entry: the one before the head, or none in an empty log.
fn newest(
    walk: &Walk<'_, '_>,
    superblock: &mut Superblock,
    bounds: &Bounds,
) -> Result<Option<(u64, Sector)>, Problem> {
    let head = superblock.journal_ptr.get();
    let mut candidates = vec![walk.before(head)];
    if head == walk.start && !bounds.agree() {
        candidates.push(bounds.end.saturating_sub(1));
    }
    for at in &candidates {
        if let Some(sector) = walk.sector(*at) {
            return Ok(Some((*at, sector)));
        }
    }
    let known = superblock.last_journal_seq.get();
    let leftover = walk.sector(walk.start).is_some();
    if head != walk.start || known > 0 || leftover {
        let at = candidates.first().copied().unwrap_or(head);
        let found = "no valid entry before the head";
        return Err(tampered(
            superblock,
            at,
            found,
            format!("entry {}", known.max(1)),
        ));
    }
    Ok(None)
}

/// Walks from the newest entry to the first, or over a full lap.
fn check_all(
    walk: &Walk<'_, '_>,
    superblock: &mut Superblock,
    bounds: &Bounds,
    key: &LinkKey,
) -> Result<Report, Problem> {
    let mut report = Report::default();
    let Some((mut at, mut entry)) = newest(walk, superblock, bounds)? else {
        report.complete = true;
        return Ok(report);
    };
    let known = superblock.last_journal_seq.get();
    let tip = entry.entry.sequence.get();
    if tip < known {
        let found = format!("newest sequence {tip}");
        return Err(tampered(
            superblock,
            at,
            found,
            format!("{known}, as the superblocks say"),
        ));
    }
    superblock.last_journal_seq = tip.into();
    let lap = bounds.end - bounds.start;
    loop {
        let sequence = entry.entry.sequence.get();
        let slot = at - bounds.start;
        if bounds.agree()
            && sequence
                .checked_sub(1)
                .is_none_or(|index| index % lap != slot)
        {
            let found = format!("entry {sequence} in slot {slot}");
            return Err(tampered(
                superblock,
                at,
                found,
                "each entry in the slot of its number",
            ));
        }
        report.checked += 1;
        report.linked += u64::from(entry.link().is_some());
        if sequence == 1 {
            check_digest(superblock, &entry, None, at, key)?;
            report.complete = true;
            return Ok(report);
        }
        if report.checked >= lap {
            // The entry before was overwritten by the newest one: nothing left to compare with.
            return Ok(report);
        }
        let (before_at, before) = step_back(walk, superblock, bounds, at, sequence)?;
        check_crc_link(superblock, &entry, &before, before_at)?;
        check_digest(superblock, &entry, Some(&before), at, key)?;
        (at, entry) = (before_at, before);
    }
}

/// The entry before `at`, which must be the one numbered one less than `sequence`.
fn step_back(
    walk: &Walk<'_, '_>,
    superblock: &mut Superblock,
    bounds: &Bounds,
    at: u64,
    sequence: u64,
) -> Result<(u64, Sector), Problem> {
    let mut before_at = walk.before(at);
    let mut before = walk.sector(before_at);
    if before.is_none() && at == bounds.start && !bounds.agree() {
        before_at = bounds.end.saturating_sub(1);
        before = walk.sector(before_at);
    }
    let expected = format!("entry {}", sequence.wrapping_sub(1));
    let Some(before) = before else {
        return Err(tampered(superblock, before_at, "no valid entry", expected));
    };
    if before.entry.sequence.get() != sequence.wrapping_sub(1) {
        let found = format!("entry {}", before.entry.sequence.get());
        return Err(tampered(superblock, before_at, found, expected));
    }
    Ok((before_at, before))
}

fn check_digest(
    superblock: &mut Superblock,
    entry: &Sector,
    before: Option<&Sector>,
    at: u64,
    key: &LinkKey,
) -> Result<(), Problem> {
    let Some(link) = entry.link() else {
        if entry.is_plain() {
            return Ok(());
        }
        let found = "bytes behind the entry that are no link";
        return Err(tampered(superblock, at, found, "zeroes or a BLAKE3 link"));
    };
    let expected = entry.expected_digest(before, key);
    if link.digest == expected {
        return Ok(());
    }
    let found = format!("BLAKE3 link {}", crate::num::hex(&link.digest[..8]));
    Err(tampered(
        superblock,
        at,
        found,
        crate::num::hex(&expected[..8]),
    ))
}

/// Reads the entries of a chronicle, oldest first, at most `limit` of the newest ones. Does not
/// verify: what cannot be read ends the list.
#[must_use]
pub fn list(medium: &Medium<'_>, superblock: &Superblock, limit: u64) -> Vec<Sector> {
    let bounds = Bounds::of(superblock, medium.device.sector());
    let end = bounds.end.max(bounds.reference_append_end);
    let walk = Walk {
        medium,
        start: bounds.start,
        end,
    };
    let mut entries = Vec::new();
    let lap = end.saturating_sub(bounds.start).min(limit).min(MAX_STEPS);
    let head = superblock.journal_ptr.get();
    if !(bounds.start..=end).contains(&head) {
        return entries;
    }
    let mut at = walk.before(head);
    for _ in 0..lap {
        let Some(sector) = walk.sector(at) else { break };
        let first = sector.entry.sequence.get() == 1;
        entries.push(sector);
        if first {
            break;
        }
        at = walk.before(at);
    }
    entries.reverse();
    entries
}

/// The newest entry, unverified.
#[must_use]
pub fn tip(medium: &Medium<'_>, superblock: &Superblock) -> Option<Sector> {
    list(medium, superblock, 1).pop()
}

/// True when a byte offset lies in the chronicle.
#[must_use]
pub fn contains(superblock: &Superblock, sector: u64, offset: u64) -> bool {
    let bounds = Bounds::of(superblock, sector);
    (bounds.start..bounds.end).contains(&crate::num::div(round_down(offset, sector), sector))
}
