//! Cloning a volume's identity onto another device, and forking its history.
//!
//! The clone inherits UUID, generation, geometry and device type tag; its layout is the parent's,
//! not recomputed, so a RAM wormhole of a rotating disk computes the disk's addresses. A device
//! that cannot be isomorphic is refused with the field's name, before anything is written. The
//! clone's chronicle begins with a WORMHOLE entry that carries the parent's tip; the parent gets a
//! FORK entry that carries the clone's generation and the same fork id. A clone has no
//! data: replicate it.

use super::certificate::Certificate;
use super::{diverged_generation, require_strict_flush};
use crate::chronicle::append::{self, Fork, Request};
use crate::chronicle::{LinkKey, OpCode, verify};
use crate::device::{Device, ReadAt};
use crate::format::{self, Identity, Params};
use crate::plan::{Faults, Medium, Plan};
use crate::profile::Profile;
use crate::status::{Code, Conduct, Problem, Region};
use crate::superblock::{Superblock, intent};

/// Kind of a clone's first entry.
pub const KIND_GENESIS: u32 = 1;
/// Kind of the parent's entry.
pub const KIND_FORK: u32 = 2;

/// How a clone is to live.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// An overlay or replica of the parent: the same timeline, the same generation.
    SameTimeline,
    /// A fork that is written for itself: a timeline of its own, with generations that the parent
    /// will not reach.
    Diverge,
}

/// What to clone.
#[derive(Clone, Debug)]
pub struct CloneParams<'p> {
    /// The parent, opened at least for reading.
    pub parent: &'p Superblock,
    /// The parent's sector size in bytes.
    pub parent_sector_size: u32,
    /// The parent's newest chronicle entry, where it has one: sequence and BLAKE3 of its sector.
    pub parent_tip: Option<(u64, [u8; 32])>,
    /// Allow a device of another capacity: the clone becomes VIRTUAL with the parent's capacity.
    pub override_capacity: bool,
    /// Label; `None` keeps the parent's.
    pub label: Option<String>,
    /// Added to the root's permissions.
    pub root_perms_or: u32,
    /// How it is to live.
    pub purpose: Purpose,
    /// Drawn at random for this clone.
    pub fork_id: [u8; 16],
    /// Nanoseconds since 1970.
    pub now_ns: u64,
    /// Key of the chronicle's links.
    pub key: LinkKey,
}

/// The plans of a clone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cloned {
    /// The clone's superblock.
    pub superblock: Superblock,
    /// What to write on the clone's device.
    pub plan: Plan,
}

fn refuse<T>(field: &str, found: u64, expected: u64, advice: &'static str) -> Result<T, Problem> {
    let at = (Region::Device, 0);
    let found = format!("{field} {found}");
    Err(Problem::new(Code::Geometry, at, found, expected, advice))
}

fn check(device: &Device, params: &CloneParams<'_>) -> Result<u64, Problem> {
    require_strict_flush(device)?;
    if device.sector_size != params.parent_sector_size {
        let (found, expected) = (device.sector_size.into(), params.parent_sector_size.into());
        let advice = "addresses are in sectors: use a device with the parent's sector size";
        return refuse("sector size", found, expected, advice);
    }
    let block = u64::from(params.parent.block_size.get());
    if device.is_zns() && u64::from(device.zone_size) != block {
        let advice = "a zoned device has blocks of one zone: use one with the parent's block size";
        return refuse("zone size", device.zone_size.into(), block, advice);
    }
    let capacity = params.parent.total_capacity.get();
    if device.capacity != capacity && !params.override_capacity {
        let advice = "use a device of the parent's capacity, or override it (VIRTUAL)";
        return refuse("capacity", device.capacity, capacity, advice);
    }
    let minimum = params.parent.lba_flux_start.get() * u64::from(params.parent_sector_size);
    if device.capacity < minimum {
        let advice = "use a larger device: it must hold the parent's metadata";
        return refuse("capacity", device.capacity, minimum, advice);
    }
    Ok(if device.capacity == capacity {
        0
    } else {
        intent::VIRTUAL
    })
}

/// Plans a clone onto a device.
///
/// # Errors
/// [`Code::HwIo`] without strict flushes, [`Code::Geometry`] naming the field in which the device
/// cannot be isomorphic, and the errors of a format.
pub fn clone(
    source: &dyn ReadAt,
    device: Device,
    faults: &Faults,
    params: &CloneParams<'_>,
) -> Result<Cloned, Problem> {
    let virtual_bit = check(&device, params)?;
    let parent = params.parent;
    let format_params = Params {
        profile: parent.format_profile.get(),
        label: Some(params.label.clone().unwrap_or_else(|| parent.label())),
        identity: Identity::Specific {
            lo: parent.uuid_lo.get(),
            hi: parent.uuid_hi.get(),
        },
        mount_intent_flags: intent::WORMHOLE | intent::VIRTUAL,
        override_capacity_bytes: parent.total_capacity.get(),
        root_perms_or: params.root_perms_or,
        now_ns: params.now_ns,
        conduct: Conduct::Corrected,
    };
    let generation = match params.purpose {
        Purpose::SameTimeline => parent.copy_generation.get(),
        Purpose::Diverge => diverged_generation(parent.copy_generation.get(), &params.fork_id),
    };
    let adapt = |clone: &mut Superblock| {
        clone.copy_generation = generation.into();
        clone.device_type_tag = parent.device_type_tag;
        clone.hw_caps_flags = parent.hw_caps_flags;
        clone.mount_intent = (intent::WORMHOLE | virtual_bit).into();
    };
    // A profile like ARCHIVE forbids memory devices; the clone's addresses are the parent's anyway.
    let planned_for = as_parent_kind(device, parent);
    let mut medium = Medium::new(source, planned_for, faults);
    let mut superblock = format::run(&mut medium, &format_params, Some(&adapt), &mut Vec::new())?;
    let ours = Certificate::of(parent, params.parent_sector_size);
    ours.agree(&Certificate::of(&superblock, device.sector_size))?;
    if inside(&superblock, &device) {
        let request = genesis(parent, params);
        let conduct = Conduct::Corrected;
        append::append(
            &mut medium,
            &mut superblock,
            &request,
            false,
            conduct,
            &params.key,
        )?;
        mirror(&mut medium, &superblock)?;
    }
    Ok(Cloned {
        superblock: superblock.sealed(),
        plan: medium.into_plan(),
    })
}

/// Capabilities that only choose a profile's rules or the tag are taken from the parent.
fn as_parent_kind(mut device: Device, parent: &Superblock) -> Device {
    use crate::device::HwFlags;
    if parent.format_profile.get() == Profile::Archive.id() {
        device.hw_flags = HwFlags(device.hw_flags.0 & !HwFlags::NVM.0);
    }
    device
}

/// An overlay smaller than its parent has no chronicle of its own: it lies behind its end.
fn inside(superblock: &Superblock, device: &Device) -> bool {
    crate::layout::chronicle_end(superblock) <= device.capacity
}

/// Gives the mirrors the head that North has.
fn mirror(medium: &mut Medium<'_>, superblock: &Superblock) -> Result<(), Problem> {
    let problem = |code| {
        let advice = "check the device; clone again";
        Problem::new(
            code,
            (Region::Superblock, 0),
            "a failing write",
            "success",
            advice,
        )
    };
    for (cardinal, offset) in crate::mount::dirty::targets(medium, superblock) {
        let outside = offset >= medium.device.capacity;
        if cardinal != crate::superblock::copies::Cardinal::North && !outside {
            crate::mount::dirty::write_plain(medium, superblock, offset).map_err(problem)?;
        }
    }
    medium.flush().map_err(problem)
}

fn genesis(parent: &Superblock, params: &CloneParams<'_>) -> Request {
    let (sequence, tip) = params.parent_tip.unwrap_or_default();
    let fork = Fork {
        kind: KIND_GENESIS,
        peer_generation: parent.copy_generation.get(),
        peer_sequence: sequence,
        peer_tip: tip,
        fork_id: params.fork_id,
    };
    let context = (parent.journal_ptr.get(), parent.journal_start.get());
    let principal = parent.uuid_lo.get();
    let request = Request::new(
        OpCode::Wormhole,
        context.0,
        context.1,
        principal,
        params.now_ns,
    );
    Request {
        fork: Some(fork),
        ..request
    }
}

/// Plans the parent's FORK entry. `parent` must be mounted for writing.
///
/// # Errors
/// Those of an append.
pub fn record_in_parent(
    medium: &mut Medium<'_>,
    parent: &mut Superblock,
    clone: &Superblock,
    clone_tip: Option<(u64, [u8; 32])>,
    params: &CloneParams<'_>,
) -> Result<u64, Problem> {
    let (sequence, tip) = clone_tip.unwrap_or_default();
    let fork = Fork {
        kind: KIND_FORK,
        peer_generation: clone.copy_generation.get(),
        peer_sequence: sequence,
        peer_tip: tip,
        fork_id: params.fork_id,
    };
    let lbas = (clone.journal_ptr.get(), clone.journal_start.get());
    let principal = clone.uuid_lo.get();
    let request = Request::new(OpCode::Fork, lbas.0, lbas.1, principal, params.now_ns);
    let request = Request {
        fork: Some(fork),
        ..request
    };
    append::append(
        medium,
        parent,
        &request,
        false,
        Conduct::Corrected,
        &params.key,
    )
}

/// Sequence and BLAKE3 of a volume's newest chronicle entry.
#[must_use]
pub fn tip_of(medium: &Medium<'_>, superblock: &Superblock) -> Option<(u64, [u8; 32])> {
    let sector = verify::tip(medium, superblock)?;
    Some((sector.entry.sequence.get(), sector.digest()))
}

/// Checks that a clone's first entry and a parent's FORK entry belong together and that the parent
/// still has the entry the clone was made from.
///
/// # Errors
/// [`Code::AuditFailure`] naming what does not fit.
pub fn check_chain(
    parent: (&Medium<'_>, &Superblock),
    clone: (&Medium<'_>, &Superblock),
) -> Result<(), Problem> {
    let failure = |lba: u64, found: &str, expected: &str| {
        let advice = "the two histories do not belong together: do not merge them";
        let at = (Region::Chronicle, lba);
        Err(Problem::new(
            Code::AuditFailure,
            at,
            found,
            expected,
            advice,
        ))
    };
    let start = clone.1.journal_start.get();
    let entries = verify::list(clone.0, clone.1, u64::MAX);
    let Some(genesis) = entries.first().and_then(|sector| sector.link()) else {
        return failure(start, "no linked first entry", "a WORMHOLE genesis entry");
    };
    if genesis.kind.get() != KIND_GENESIS {
        return failure(start, "another first entry", "a WORMHOLE genesis entry");
    }
    let history = verify::list(parent.0, parent.1, u64::MAX);
    let forked = history.iter().filter_map(|sector| sector.link());
    let mut forked = forked.filter(|link| link.kind.get() == KIND_FORK);
    if !forked.any(|link| link.fork_id == genesis.fork_id) {
        let head = parent.1.journal_ptr.get();
        return failure(
            head,
            "no FORK entry with the clone's fork id",
            "one in the parent",
        );
    }
    let sequence = genesis.peer_sequence.get();
    let origin = history
        .iter()
        .find(|sector| sector.entry.sequence.get() == sequence);
    match origin {
        Some(sector) if sector.digest() != genesis.peer_tip => {
            let lba = sector.entry.self_lba.get();
            failure(
                lba,
                "another entry than the one the clone remembers",
                "the fork point",
            )
        }
        // A lap later the ring no longer holds the fork point; the FORK entry stands for it.
        _ => Ok(()),
    }
}
