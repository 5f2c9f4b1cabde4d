//! Appending one entry: the sector, a flush, then the North superblock with the new head.
//!
//! Invariant: an entry is durable before a superblock that counts it.
//= HN4_SPEC 5

use zerocopy::IntoBytes;

use super::{
    Bounds, ENTRY_MAGIC, ENTRY_VERSION, Entry, Link, LinkKey, MIN_SECTOR, OpCode, Sector,
    build_sector, predecessor,
};
use crate::num::low32;
use crate::plan::{Data, Medium, Op};
use crate::status::{Code, Conduct, Problem, Region};
use crate::superblock::{Superblock, state};

/// What to record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// The operation, as its number on disk.
    pub op_code: u16,
    /// Context of the operation.
    pub old_lba: u64,
    /// Context of the operation.
    pub new_lba: u64,
    /// Who does it.
    pub principal: u64,
    /// Nanoseconds since 1970.
    pub now_ns: u64,
    /// The other side, where the entry records a fork.
    pub fork: Option<Fork>,
}

impl Request {
    /// A request without a fork.
    #[must_use]
    pub fn new(op: OpCode, old_lba: u64, new_lba: u64, principal: u64, now_ns: u64) -> Self {
        Self {
            op_code: op.id(),
            old_lba,
            new_lba,
            principal,
            now_ns,
            fork: None,
        }
    }
}

/// What an entry remembers of the other timeline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fork {
    /// 1 a clone's genesis, 2 a parent's fork.
    pub kind: u32,
    /// The other side's generation when the timelines parted.
    pub peer_generation: u64,
    /// Sequence of the other side's newest entry then.
    pub peer_sequence: u64,
    /// BLAKE3 of the other side's newest sector then.
    pub peer_tip: [u8; 32],
    /// Drawn for this fork.
    pub fork_id: [u8; 16],
}

fn link_of(fork: Option<&Fork>) -> Link {
    let mut link = <Link as zerocopy::FromZeros>::new_zeroed();
    if let Some(fork) = fork {
        link.kind = fork.kind.into();
        link.peer_generation = fork.peer_generation.into();
        link.peer_sequence = fork.peer_sequence.into();
        link.peer_tip = fork.peer_tip;
        link.fork_id = fork.fork_id;
    }
    link
}

/// Writes the North superblock alone, then flushes.
///
/// # Errors
/// The device's code.
pub fn write_north(medium: &mut Medium<'_>, superblock: &Superblock) -> Result<(), Code> {
    if medium.device.is_zns() {
        medium.push(Op::ZoneReset {
            offset: 0,
            length: 0,
        })?;
        medium.flush()?;
    }
    let sealed = superblock.sealed();
    medium.write(0, Data::padded(sealed.as_bytes(), 0))?;
    medium.flush()
}

/// The entry that a new one would follow.
struct Predecessor {
    sector: Option<Sector>,
    sequence: u64,
}

fn find_predecessor(
    medium: &Medium<'_>,
    superblock: &mut Superblock,
    head: u64,
    bounds: &Bounds,
    end: u64,
) -> Result<Predecessor, Problem> {
    let size = medium.device.sector();
    let at = predecessor(head, bounds.start, end);
    let bytes = medium.read_vec(Region::Chronicle, at.saturating_mul(size), size)?;
    let mut refuse = |code, set, found: &str, expected: &str, advice| {
        superblock.change_state(set, 0);
        Err(Problem::new(
            code,
            (Region::Chronicle, at),
            found,
            expected,
            advice,
        ))
    };
    let Some(sector) = Sector::parse(bytes, at) else {
        if head == bounds.start {
            return Ok(Predecessor {
                sector: None,
                sequence: 0,
            });
        }
        let advice = "run chronicle --verify; restore the log from another copy";
        return refuse(
            Code::Tampered,
            state::PANIC,
            "no valid entry",
            "the newest entry",
            advice,
        );
    };
    match sector.entry.sequence.get() {
        u64::MAX => {
            let advice = "the sequence is used up; format a new volume and copy";
            refuse(
                Code::Geometry,
                state::LOCKED,
                "sequence 2^64-1",
                "a smaller one",
                advice,
            )
        }
        0 => {
            let advice = "run chronicle --verify; restore the log from another copy";
            refuse(
                Code::DataRot,
                state::PANIC,
                "sequence 0",
                "1 or more",
                advice,
            )
        }
        sequence => Ok(Predecessor {
            sector: Some(sector),
            sequence,
        }),
    }
}

/// The first half of an append: checks, the entry's sector and a flush. Moves the head in
/// `superblock`, which nothing on disk counts yet: the caller writes the superblock.
///
/// # Errors
/// The reference's codes; PANIC or LOCKED are set in the superblock where the reference does.
pub fn append_entry(
    medium: &mut Medium<'_>,
    superblock: &mut Superblock,
    request: &Request,
    conduct: Conduct,
    key: &LinkKey,
) -> Result<u64, Problem> {
    let size = medium.device.sector();
    let head = superblock.journal_ptr.get();
    let here = (Region::Chronicle, head);
    if size < MIN_SECTOR {
        let found = format!("{size}-byte sectors");
        let expected = format!("{MIN_SECTOR} or more");
        let advice = "HN4 needs larger sectors";
        return Err(Problem::new(Code::Geometry, here, found, expected, advice));
    }
    let bounds = Bounds::of(superblock, size);
    let end = if conduct.corrects() {
        bounds.end
    } else {
        bounds.reference_append_end
    };
    if !(bounds.start..end).contains(&head) {
        superblock.change_state(state::PANIC, 0);
        let expected = format!("a head from {} to {end}", bounds.start);
        let advice = "heal the superblock from another copy";
        return Err(Problem::new(
            Code::BadSuperblock,
            here,
            head,
            expected,
            advice,
        ));
    }
    let previous = find_predecessor(medium, superblock, head, &bounds, end)?;
    let sequence = previous.sequence + 1;
    let entry = Entry {
        magic: ENTRY_MAGIC.into(),
        sequence: sequence.into(),
        timestamp: request.now_ns.into(),
        old_lba: request.old_lba.into(),
        new_lba: request.new_lba.into(),
        self_lba: head.into(),
        principal_hash32: low32(request.principal).into(),
        version: ENTRY_VERSION.into(),
        op_code: request.op_code.into(),
        prev_sector_crc: previous.sector.as_ref().map_or(0, Sector::crc).into(),
        entry_header_crc: 0.into(),
    };
    let link = conduct
        .corrects()
        .then(|| (link_of(request.fork.as_ref()), key));
    let bytes = build_sector(entry, link, previous.sector.as_ref(), size);
    let written = medium.write(head * size, Data::padded(&bytes, size));
    written
        .and_then(|()| medium.flush())
        .map_err(|code| failed(superblock, here, code, "the entry"))?;
    let next = if head + 1 >= end {
        bounds.start
    } else {
        head + 1
    };
    superblock.journal_ptr = next.into();
    superblock.last_journal_seq = sequence.into();
    Ok(sequence)
}

fn failed(superblock: &mut Superblock, at: (Region, u64), code: Code, what: &str) -> Problem {
    superblock.change_state(state::PANIC, 0);
    let advice = "the volume is read-only from here; check the device";
    Problem::new(
        code,
        at,
        format!("a failing write of {what}"),
        "success",
        advice,
    )
}

/// Plans one append and moves the head in `superblock`. With [`Conduct::Corrected`] the entry
/// carries a BLAKE3 link and the ring ends where the chronicle region does.
///
/// # Errors
/// The reference's codes; PANIC or LOCKED are set in the superblock where the reference does.
pub fn append(
    medium: &mut Medium<'_>,
    superblock: &mut Superblock,
    request: &Request,
    read_only: bool,
    conduct: Conduct,
    key: &LinkKey,
) -> Result<u64, Problem> {
    let here = (Region::Chronicle, superblock.journal_ptr.get());
    if read_only {
        let expected = "a writable volume";
        let advice = "mount for writing";
        return Err(Problem::new(
            Code::AccessDenied,
            here,
            "read-only",
            expected,
            advice,
        ));
    }
    let sequence = append_entry(medium, superblock, request, conduct, key)?;
    write_north(medium, superblock).map_err(|code| failed(superblock, here, code, "North"))?;
    Ok(sequence)
}
