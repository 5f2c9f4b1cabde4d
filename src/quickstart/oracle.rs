//! Knows what clients were promised, and judges what a volume holds by it. Pure.
//!
//! Every write gets a number, which fills its sectors, and two marks on one logical clock: when it
//! was issued and when it completed. Whatever the number of connections and of requests in flight,
//! that suffices to check, for any image of the volume:
//!
//! - **P1**: a write that had completed before a flush was issued that completed is there;
//! - **P2**: there is no pair of writes of which the later one is there and the earlier one is not,
//!   "later" meaning that it was issued after the other one had completed;
//! - a write that reaches over several sectors is there as a whole or not at all.
//!
//! **Invariant:** the clock is read for an issue before the request can reach the server, and for a
//! completion after its answer has arrived. So what counts as earlier here really was earlier.
//!
//! Zeroed sectors do not say which write zeroed them. Where several may have, the one that
//! complains least is assumed.

use std::collections::HashSet;
use std::fmt;

use thiserror::Error;

/// Bytes of a sector, the unit in which the oracle thinks.
pub const SECTOR_BYTES: u64 = 512;

const NEVER: u64 = u64::MAX;
/// The write that made everything zero before the first one.
const BIRTH: WriteId = WriteId(0);

/// Number of a write, from 1, in the order of issue.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WriteId(u64);

impl fmt::Display for WriteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "write {}", self.0)
    }
}

/// A flush that was issued.
#[derive(Clone, Copy, Debug)]
pub struct FlushIssued(u64);

#[derive(Clone, Copy, Debug)]
struct Write {
    issued: u64,
    completed: u64,
    first: u64,
    sectors: u64,
    zeroes: bool,
    /// It completed with FUA.
    durable: bool,
}

/// What an oracle has seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Writes that were issued.
    pub issued: u64,
    /// Writes that completed.
    pub completed: u64,
    /// Of those, writes that a flush made durable.
    pub flushed: u64,
    /// Flushes that completed.
    pub flushes: u64,
    /// Bytes of writes that completed.
    pub completed_bytes: u64,
}

/// A promise that was broken.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Violation {
    /// P1.
    #[error(
        "lost: sector {sector} holds {found}, but {expected} had been flushed ({lost} sectors lost)"
    )]
    LostFlush {
        /// The first sector.
        sector: u64,
        /// What it holds.
        found: String,
        /// What it should hold at least.
        expected: String,
        /// How many sectors.
        lost: u64,
    },
    /// P2.
    #[error(
        "no prefix: {seen} is there (sector {seen_at}), {missing} is not (sector {missing_at}), \
         which had completed before the other one was issued"
    )]
    NotAPrefix {
        /// A write that is there.
        seen: String,
        /// One of its sectors.
        seen_at: u64,
        /// A write that is not.
        missing: String,
        /// One of its sectors.
        missing_at: u64,
    },
    /// A write is there in part.
    #[error("torn: {write} is at sector {here}, but sector {missing_at} holds {older}")]
    Torn {
        /// The write.
        write: String,
        /// What is where it should be.
        older: String,
        /// Where it is.
        here: u64,
        /// Where it is not.
        missing_at: u64,
    },
    /// A sector holds what was never written there.
    #[error("corrupt: sector {sector} holds {found}")]
    Foreign {
        /// The sector.
        sector: u64,
        /// What it holds.
        found: String,
    },
}

/// What a look at an image found, when nothing was wrong.
#[derive(Clone, Debug)]
pub struct Seen {
    /// For each sector, which of its versions may be the present one, as places in its history.
    present: Vec<(u32, u32)>,
    /// Writes that had been issued and are not there; none of them had been flushed.
    pub missing: u64,
    /// Of those, writes that had completed.
    pub missing_completed: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Oracle {
    seed: u64,
    clock: u64,
    writes: Vec<Write>,
    /// For each sector, the writes to it, in order. They never overlapped in time.
    history: Vec<Vec<WriteId>>,
    busy: Vec<bool>,
    /// All that completed before this moment survives.
    flushed: u64,
    flushes: u64,
}

impl Oracle {
    /// An oracle of so many sectors that hold zeroes.
    #[must_use]
    pub fn new(seed: u64, sectors: usize) -> Self {
        let birth = Write {
            issued: 0,
            completed: 0,
            first: 0,
            sectors: sectors as u64,
            zeroes: true,
            durable: true,
        };
        Self {
            seed,
            clock: 1,
            writes: vec![birth],
            history: vec![vec![BIRTH]; sectors],
            busy: vec![false; sectors],
            flushed: 1,
            flushes: 0,
        }
    }

    /// Sectors that it watches.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.history.len() as u64
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn write_of(&self, id: WriteId) -> &Write {
        &self.writes[index(id.0)]
    }

    /// Issues a write to sectors of which none is being written; `None` if one is.
    pub fn issue(&mut self, first: u64, sectors: u64, zeroes: bool) -> Option<WriteId> {
        let range = index(first)..index(first + sectors);
        let busy = self.busy.get_mut(range.clone())?;
        if busy.iter().any(|&busy| busy) {
            return None;
        }
        busy.fill(true);
        let id = WriteId(self.writes.len() as u64);
        let issued = self.tick();
        let write = Write {
            issued,
            completed: NEVER,
            first,
            sectors,
            zeroes,
            durable: false,
        };
        self.writes.push(write);
        self.history[range]
            .iter_mut()
            .for_each(|versions| versions.push(id));
        Some(id)
    }

    /// What a write writes.
    #[must_use]
    pub fn payload(&self, id: WriteId) -> Vec<u8> {
        let write = self.write_of(id);
        let mut bytes = Vec::with_capacity(index(write.sectors * SECTOR_BYTES));
        for sector in write.first..write.first + write.sectors {
            let stamp = self.stamp(id, sector);
            for _ in 0..SECTOR_BYTES / 16 {
                bytes.extend_from_slice(&stamp);
            }
        }
        bytes
    }

    fn stamp(&self, id: WriteId, sector: u64) -> [u8; 16] {
        let mut stamp = [0; 16];
        stamp[..8].copy_from_slice(&id.0.to_le_bytes());
        stamp[8..].copy_from_slice(&(sector ^ self.seed).to_le_bytes());
        stamp
    }

    /// A write was answered.
    pub fn complete(&mut self, id: WriteId, fua: bool) {
        let now = self.tick();
        let write = &mut self.writes[index(id.0)];
        write.completed = now;
        write.durable = fua;
        let range = index(write.first)..index(write.first + write.sectors);
        self.busy[range].fill(false);
    }

    /// A flush, or a write with FUA, is about to be sent.
    pub fn issue_flush(&mut self) -> FlushIssued {
        FlushIssued(self.tick())
    }

    /// A flush was answered.
    pub fn complete_flush(&mut self, flush: FlushIssued) {
        self.flushed = self.flushed.max(flush.0);
        self.flushes += 1;
    }

    /// Numbers for people.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts {
            flushes: self.flushes,
            ..Counts::default()
        };
        for write in self.writes.iter().skip(1) {
            counts.issued += 1;
            if write.completed != NEVER {
                counts.completed += 1;
                counts.completed_bytes += write.sectors * SECTOR_BYTES;
                counts.flushed += u64::from(self.must_survive(write));
            }
        }
        counts
    }

    fn must_survive(&self, write: &Write) -> bool {
        write.durable || write.completed < self.flushed
    }

    fn name(&self, id: WriteId) -> String {
        let write = self.write_of(id);
        let done = match write.completed {
            NEVER => "never completed".to_owned(),
            at => format!("completed at {at}"),
        };
        let kind = if write.zeroes { "zeroes" } else { "data" };
        let (first, end) = (write.first, write.first + write.sectors);
        format!(
            "{id} ({kind}, sectors {first}..{end}, issued at {}, {done})",
            write.issued
        )
    }

    /// What a sector holds.
    fn read_stamp(&self, sector: u64, bytes: &[u8]) -> Result<Option<WriteId>, Violation> {
        let foreign = |found| Violation::Foreign { sector, found };
        let (stamp, rest) = bytes.split_at(16);
        if rest.chunks(16).any(|chunk| chunk != stamp) {
            return Err(foreign("parts of different writes".to_owned()));
        }
        if stamp.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let id: [u8; 8] = std::array::from_fn(|at| stamp[at]);
        let id = WriteId(u64::from_le_bytes(id));
        if stamp == self.stamp(id, sector) {
            return Ok(Some(id));
        }
        Err(foreign(format!("what belongs elsewhere: {stamp:02x?}")))
    }

    /// Checks a whole image of the sectors.
    ///
    /// # Errors
    /// The first promise that is broken.
    pub fn check(&self, image: &[u8]) -> Result<Seen, Violation> {
        self.judge(image, true)
    }

    /// Checks an image of an earlier moment: what was flushed since may be missing, but it must be
    /// a prefix of the history all the same.
    ///
    /// # Errors
    /// The first promise that is broken.
    pub fn check_earlier(&self, image: &[u8]) -> Result<Seen, Violation> {
        self.judge(image, false)
    }

    fn judge(&self, image: &[u8], is_newest: bool) -> Result<Seen, Violation> {
        assert_eq!(
            image.len() as u64,
            self.sectors() * SECTOR_BYTES,
            "an image of all sectors"
        );
        let mut present = Vec::with_capacity(self.history.len());
        let mut lost: Option<(u64, String, String)> = None;
        let mut lost_sectors = 0;
        for (sector, bytes) in (0..).zip(image.chunks(index(SECTOR_BYTES))) {
            let stamp = self.read_stamp(sector, bytes)?;
            let versions = &self.history[index(sector)];
            let least = versions
                .iter()
                .rposition(|&id| is_newest && self.must_survive(self.write_of(id)));
            let least = least.unwrap_or(0);
            let fits = |id: &WriteId| match stamp {
                Some(stamp) => *id == stamp,
                None => self.write_of(*id).zeroes,
            };
            let Some(last) = versions.iter().rposition(fits) else {
                let found = stamp.map_or_else(|| "zeroes".to_owned(), |id| format!("dropped {id}"));
                return Err(Violation::Foreign { sector, found });
            };
            if last < least {
                lost_sectors += 1;
                if lost.is_none() {
                    lost = Some((
                        sector,
                        self.name(versions[last]),
                        self.name(versions[least]),
                    ));
                }
                present.push((0, 0));
                continue;
            }
            let first = least + versions[least..].iter().position(fits).unwrap_or_default();
            present.push((small(first), small(last)));
        }
        if let Some((sector, found, expected)) = lost {
            return Err(Violation::LostFlush {
                sector,
                found,
                expected,
                lost: lost_sectors,
            });
        }
        self.check_order(&present)?;
        self.check_whole(&present)?;
        Ok(self.summary(present))
    }

    /// No write is there that was issued after one had completed that is not.
    fn check_order(&self, present: &[(u32, u32)]) -> Result<(), Violation> {
        let mut newest: Option<(u64, WriteId, u64)> = None;
        let mut gap: Option<(u64, WriteId, u64)> = None;
        for (sector, &(first, last)) in (0..).zip(present) {
            let versions = &self.history[index(sector)];
            let seen = versions[first as usize];
            let issued = self.write_of(seen).issued;
            if newest.is_none_or(|(other, ..)| issued > other) {
                newest = Some((issued, seen, sector));
            }
            if let Some(&missing) = versions.get(last as usize + 1) {
                let completed = self.write_of(missing).completed;
                if gap.is_none_or(|(other, ..)| completed < other) {
                    gap = Some((completed, missing, sector));
                }
            }
        }
        match (newest, gap) {
            (Some((issued, seen, seen_at)), Some((completed, missing, missing_at)))
                if completed < issued =>
            {
                let (seen, missing) = (self.name(seen), self.name(missing));
                Err(Violation::NotAPrefix {
                    seen,
                    seen_at,
                    missing,
                    missing_at,
                })
            }
            _ => Ok(()),
        }
    }

    /// A write that is at one of its sectors is, or was, at all of them.
    fn check_whole(&self, present: &[(u32, u32)]) -> Result<(), Violation> {
        for (sector, &(first, last)) in (0..).zip(present) {
            let id = self.history[index(sector)][first as usize];
            if first != last || id == BIRTH {
                continue; // Zeroes may be of several writes.
            }
            let write = self.write_of(id);
            for other in write.first..write.first + write.sectors {
                let newest = present[index(other)].1 as usize;
                if self.history[index(other)][newest] < id {
                    let write = self.name(id);
                    let older = self.name(self.history[index(other)][newest]);
                    return Err(Violation::Torn {
                        write,
                        older,
                        here: sector,
                        missing_at: other,
                    });
                }
            }
        }
        Ok(())
    }

    fn summary(&self, present: Vec<(u32, u32)>) -> Seen {
        let mut missing: Vec<WriteId> = Vec::new();
        for (versions, &(_, last)) in self.history.iter().zip(&present) {
            missing.extend_from_slice(&versions[last as usize + 1..]);
        }
        missing.sort_unstable();
        missing.dedup();
        let completed = missing
            .iter()
            .filter(|&&id| self.write_of(id).completed != NEVER);
        Seen {
            missing_completed: completed.count() as u64,
            missing: missing.len() as u64,
            present,
        }
    }

    /// The server was killed and what was seen is what its clients go on with: what is not there
    /// will never be, and what never completed but is there has completed now.
    pub fn settle(&mut self, seen: &Seen) {
        let now = self.tick();
        let dropped = self.dropped(seen);
        for versions in &mut self.history {
            versions.retain(|id| !dropped.contains(id));
            for &id in versions.iter() {
                let write = &mut self.writes[index(id.0)];
                write.completed = write.completed.min(now);
            }
        }
        self.busy.fill(false);
        self.forget();
    }

    /// Writes that are nowhere. A zeroing that is missing at one sector did not zero the others
    /// either; what they hold is older then, and what lies between is missing too.
    fn dropped(&self, seen: &Seen) -> HashSet<WriteId> {
        let mut dropped: HashSet<WriteId> = HashSet::new();
        loop {
            let before = dropped.len();
            for (versions, &(first, last)) in self.history.iter().zip(&seen.present) {
                let (first, last) = (first as usize, last as usize);
                let fits = |id: &WriteId| self.write_of(*id).zeroes && !dropped.contains(id);
                let last = match versions[first..=last].iter().rposition(fits) {
                    Some(offset) if first < last => first + offset,
                    _ => last,
                };
                dropped.extend(&versions[last + 1..]);
            }
            if dropped.len() == before {
                return dropped;
            }
        }
    }

    /// Forgets versions that must have been replaced.
    fn forget(&mut self) {
        for at in 0..self.history.len() {
            let versions = &self.history[at];
            let least = versions
                .iter()
                .rposition(|&id| self.must_survive(self.write_of(id)));
            if let Some(least @ 1..) = least {
                self.history[at].drain(..least);
            }
        }
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("this is a 64-bit program")
}

fn small(value: usize) -> u32 {
    u32::try_from(value).expect("a sector is not written four billion times")
}

#[cfg(test)]
mod tests;
