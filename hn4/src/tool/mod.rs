//! `hn4ctl volume`: one function per subcommand, from bytes to text, JSON and plans.
//!
//! The binary opens files, prints [`Rendered`] and executes plans in order; everything else is
//! here, where it can be tested. No function does I/O beyond [`ReadAt`].

pub mod inspect;
pub mod json;

use std::fmt::Write;

use crate::anchor::{Anchor, Seed, class};
use crate::chronicle::{LinkKey, OpCode, Sector, verify};
use crate::device::{Device, ReadAt};
use crate::format::{self, Params};
use crate::num::{hex, low32, round_up};
use crate::plan::{Data, Faults, Medium, Plan};
use crate::status::{Code, Conduct, Problem, Region};
use crate::superblock::{SUPERBLOCK_BYTES, Superblock};
use crate::volume::Volume;
use crate::volume::which::Which;
use crate::wormhole::clone::{self, CloneParams, Purpose};
use json::Json;
use zerocopy::IntoBytes;

/// What a subcommand prints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rendered {
    /// For people.
    pub text: String,
    /// For programs.
    pub json: Json,
    /// False when the exit status should say that something is wrong.
    pub sound: bool,
}

impl Rendered {
    fn new(text: String, json: Json) -> Self {
        Self {
            text,
            json,
            sound: true,
        }
    }
}

const NO_FAULTS: &Faults = &Faults(Vec::new());

/// The sector size that a volume was formatted for: nowhere recorded, but the epoch ring's place
/// tells it. `None` without a readable North.
#[must_use]
pub fn probe_sector_size(source: &dyn ReadAt) -> Option<u32> {
    let mut bytes = [0; 8192];
    source.read_at(0, &mut bytes).ok()?;
    let superblock = Superblock::from_bytes(&bytes)?;
    let ring = round_up(SUPERBLOCK_BYTES, superblock.block_size.get().into());
    let sector = ring.checked_div(superblock.lba_epoch_start.get())?;
    let plausible = sector.is_power_of_two() && (512..=65536).contains(&sector);
    (plausible && superblock.check(sector, 0).is_ok()).then(|| low32(sector))
}

/// A problem as JSON.
#[must_use]
pub fn problem_json(problem: &Problem) -> Json {
    Json::Object(vec![
        ("code", problem.code.name().into()),
        ("region", problem.region.name().into()),
        ("lba", problem.lba.into()),
        ("found", problem.found.clone().into()),
        ("expected", problem.expected.clone().into()),
        ("advice", problem.advice.into()),
    ])
}

/// `format`: the plan, and what it makes.
///
/// # Errors
/// Why the device cannot be formatted; nothing is planned then.
pub fn format(
    source: &dyn ReadAt,
    device: Device,
    params: &Params,
) -> Result<(Plan, Rendered), Problem> {
    let formatted = format::format(source, device, NO_FAULTS, params);
    let superblock = formatted.verdict?;
    let text = format!(
        "formatted volume {}\n{}",
        hex(&superblock.uuid()),
        inspect::layout_text(&superblock, u64::from(device.sector_size)),
    );
    Ok((
        formatted.plan,
        Rendered::new(text, inspect::superblock_json(&superblock)),
    ))
}

/// Options of a clone.
#[derive(Clone, Debug)]
pub struct CloneOptions {
    /// Accept a device of another capacity (VIRTUAL).
    pub override_capacity: bool,
    /// Label; `None` keeps the parent's.
    pub label: Option<String>,
    /// How it is to live.
    pub purpose: Purpose,
    /// Record the fork in the parent too.
    pub record_in_parent: bool,
    /// Drawn at random.
    pub fork_id: [u8; 16],
    /// Nanoseconds since 1970.
    pub now_ns: u64,
    /// Key of the chronicle's links.
    pub key: LinkKey,
}

/// The plans of a clone: execute the clone's first, then the parent's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClonePlans {
    /// On the clone's device.
    pub clone: Plan,
    /// On the parent's device; empty when nothing is recorded there.
    pub parent: Plan,
    /// What to print.
    pub rendered: Rendered,
}

/// `clone`: plans for both sides.
///
/// # Errors
/// Why the parent cannot be read or the device cannot be isomorphic.
pub fn clone(
    (parent_source, parent_device): (&dyn ReadAt, Device),
    (target_source, target_device): (&dyn ReadAt, Device),
    options: &CloneOptions,
) -> Result<ClonePlans, Problem> {
    let parent = Volume::open(parent_source, parent_device, Conduct::Corrected)?;
    let mut superblock =
        crate::superblock::vote::vote(parent.medium(), Conduct::Corrected)?.superblock;
    let params = CloneParams {
        parent: &superblock.clone(),
        parent_sector_size: parent_device.sector_size,
        parent_tip: clone::tip_of(parent.medium(), &superblock),
        override_capacity: options.override_capacity,
        label: options.label.clone(),
        root_perms_or: 0,
        purpose: options.purpose,
        fork_id: options.fork_id,
        now_ns: options.now_ns,
        key: options.key,
    };
    let cloned = clone::clone(target_source, target_device, NO_FAULTS, &params)?;
    let mut medium = Medium::new(parent_source, parent_device, NO_FAULTS);
    if options.record_in_parent {
        let tip = clone_tip(&cloned.plan, &cloned.superblock, target_device);
        clone::record_in_parent(
            &mut medium,
            &mut superblock,
            &cloned.superblock,
            tip,
            &params,
        )?;
        write_mirrors(&mut medium, &superblock)?;
    }
    let text = format!(
        "clone of {} generation {} -> generation {}\n{}",
        hex(&superblock.uuid()),
        params.parent.copy_generation,
        cloned.superblock.copy_generation,
        inspect::layout_text(&cloned.superblock, u64::from(target_device.sector_size)),
    );
    let rendered = Rendered::new(text, inspect::superblock_json(&cloned.superblock));
    Ok(ClonePlans {
        clone: cloned.plan,
        parent: medium.into_plan(),
        rendered,
    })
}

/// The clone's first entry, out of its plan.
fn clone_tip(plan: &Plan, superblock: &Superblock, device: Device) -> Option<(u64, [u8; 32])> {
    let sector = u64::from(device.sector_size);
    let lba = superblock.journal_start.get();
    plan.steps.iter().rev().find_map(|step| match &step.op {
        crate::plan::Op::Write { offset, data } if *offset == lba * sector => {
            let mut bytes = vec![0; crate::num::index(sector)];
            data.copy_to(0, &mut bytes);
            Sector::parse(bytes, lba).map(|entry| (entry.entry.sequence.get(), entry.digest()))
        }
        _ => None,
    })
}

fn write_mirrors(medium: &mut Medium<'_>, superblock: &Superblock) -> Result<(), Problem> {
    let failed = |code| {
        let advice = "check the parent's device";
        Problem::new(
            code,
            (Region::Superblock, 0),
            "a failing write",
            "success",
            advice,
        )
    };
    let width = superblock.copy_bytes();
    let sealed = superblock.sealed();
    for (cardinal, offset) in crate::mount::dirty::targets(medium, superblock) {
        let inside = offset.saturating_add(width) <= medium.device.capacity;
        if cardinal != crate::superblock::copies::Cardinal::North && inside {
            medium
                .write(offset, Data::padded(sealed.as_bytes(), width))
                .map_err(failed)?;
        }
    }
    medium.flush().map_err(failed)
}

/// `verify`: all findings, by LBA.
///
/// # Errors
/// Why the volume cannot be opened at all.
pub fn verify(source: &dyn ReadAt, device: Device, key: &LinkKey) -> Result<Rendered, Problem> {
    let volume = Volume::open(source, device, Conduct::Corrected)?;
    let findings = volume.check(key);
    let mut text = String::new();
    for finding in &findings {
        let _ = writeln!(text, "{finding}");
    }
    let _ = writeln!(text, "{} findings", findings.len());
    let json = Json::Object(vec![
        ("volume", hex(&volume.superblock().uuid()).into()),
        (
            "findings",
            Json::List(findings.iter().map(problem_json).collect()),
        ),
    ]);
    Ok(Rendered {
        text,
        json,
        sound: findings.is_empty(),
    })
}

/// `ls`: the live files.
///
/// # Errors
/// Why the volume cannot be opened.
pub fn ls(source: &dyn ReadAt, device: Device) -> Result<Rendered, Problem> {
    let volume = Volume::open(source, device, Conduct::Corrected)?;
    let mut text = String::new();
    let mut files = Vec::new();
    for (slot, anchor) in volume.files() {
        let (seed, name, bytes) = (anchor.seed().to_string(), anchor.name(), anchor.mass.get());
        let kind = kind_of(&anchor);
        let _ = writeln!(text, "{seed}  {bytes:>14}  {kind:<7}  {name}");
        files.push(Json::Object(vec![
            ("seed", seed.into()),
            ("name", name.into()),
            ("bytes", bytes.into()),
            ("kind", kind.into()),
            ("slot", slot.into()),
            ("write_gen", anchor.write_gen.get().into()),
        ]));
    }
    Ok(Rendered::new(text, Json::List(files)))
}

fn kind_of(anchor: &Anchor) -> &'static str {
    if anchor.seed() == Seed::ROOT {
        "root"
    } else if anchor.has_class(class::NANO) {
        "nano"
    } else if anchor.has_class(class::HORIZON) {
        "horizon"
    } else {
        "file"
    }
}

/// `cat SEED`: hands the bytes of a file to `sink`.
///
/// # Errors
/// Why the volume or the file cannot be read; `sink` has received all bytes before the problem.
pub fn cat(
    source: &dyn ReadAt,
    device: Device,
    seed: Seed,
    sink: &mut dyn FnMut(&[u8]),
) -> Result<(), Problem> {
    let volume = Volume::open(source, device, Conduct::Corrected)?;
    let anchor = volume.find(seed)?;
    volume.read_file(&anchor, sink).map(|_| ())
}

/// Reads `SEED[:BLOCK]`.
///
/// # Errors
/// [`Code::InvalidArgument`] for anything else.
pub fn parse_seed_and_block(text: &str) -> Result<(Seed, u64), Problem> {
    let (seed, block) = text.split_once(':').unwrap_or((text, "0"));
    let wrong = || {
        let advice = "give the seed as hexadecimal, as ls prints it, and the block in decimal";
        let at = (Region::Device, 0);
        Problem::new(Code::InvalidArgument, at, text, "SEED[:BLOCK]", advice)
    };
    let seed = seed.parse().map_err(|_| wrong())?;
    let block = block.parse().map_err(|_| wrong())?;
    Ok((seed, block))
}

/// `where SEED[:BLOCK]`: the LBA of a block.
///
/// # Errors
/// Why the volume or the file cannot be read.
pub fn where_is(source: &dyn ReadAt, device: Device, place: &str) -> Result<Rendered, Problem> {
    let (seed, n) = parse_seed_and_block(place)?;
    let volume = Volume::open(source, device, Conduct::Corrected)?;
    let anchor = volume.find(seed)?;
    if anchor.has_class(class::NANO) {
        let lba = volume.nano_lba(&anchor)?;
        let json = Json::Object(vec![("seed", seed.to_string().into()), ("lba", lba.into())]);
        return Ok(Rendered::new(
            format!("{seed} is a nano object at LBA {lba}\n"),
            json,
        ));
    }
    let found = volume.locate(&anchor, n)?;
    let text = match &found {
        Some(place) => {
            let orbit = place
                .orbit
                .map_or("the horizon".to_owned(), |k| format!("orbit {k}"));
            format!(
                "{seed}:{n} is at LBA {} (block {}, {orbit})\n",
                place.lba, place.block
            )
        }
        None => format!("{seed}:{n} is a hole: no block is allocated for it\n"),
    };
    let json = Json::Object(vec![
        ("seed", seed.to_string().into()),
        ("n", n.into()),
        ("lba", found.map(|place| place.lba).into()),
        ("block", found.map(|place| place.block).into()),
        (
            "orbit",
            found.and_then(|place| place.orbit).map(u32::from).into(),
        ),
    ]);
    Ok(Rendered::new(text, json))
}

/// `which LBA`: what is at an LBA, counted in the device's sectors.
///
/// # Errors
/// Why the volume cannot be read.
pub fn which(source: &dyn ReadAt, device: Device, lba: u64) -> Result<Rendered, Problem> {
    let volume = Volume::open(source, device, Conduct::Corrected)?;
    let found = volume.which(lba);
    let mut fields = vec![
        ("lba", Json::from(lba)),
        ("region", volume.region_of(lba).name().into()),
    ];
    let what = match &found {
        Which::Block { seed, n, orbit } => {
            fields.push(("seed", seed.to_string().into()));
            fields.push(("n", (*n).into()));
            fields.push(("orbit", orbit.map(u32::from).into()));
            format!("block {n} of file {seed}")
        }
        Which::Anchor {
            slot,
            seed: Some(seed),
        } => {
            fields.push(("slot", (*slot).into()));
            fields.push(("seed", seed.to_string().into()));
            format!("the anchor of {seed} in slot {slot}")
        }
        Which::Anchor { slot, seed: None } => {
            fields.push(("slot", (*slot).into()));
            format!("slot {slot} of the cortex, empty")
        }
        Which::Nano { seed } => {
            fields.push(("seed", seed.to_string().into()));
            format!("the nano object {seed}")
        }
        Which::Copy(cardinal) => {
            fields.push(("copy", cardinal.name().into()));
            format!("the {} copy of the superblock", cardinal.name())
        }
        Which::Region { region, used } => {
            fields.push(("used", (*used).into()));
            format!("{region}, {}", if *used { "used" } else { "free" })
        }
    };
    Ok(Rendered::new(
        format!("LBA {lba}: {what}\n"),
        Json::Object(fields),
    ))
}

/// `chronicle [--verify]`: the entries, oldest first.
///
/// # Errors
/// Why the volume cannot be opened. A history that does not verify is in the answer.
pub fn chronicle(
    source: &dyn ReadAt,
    device: Device,
    verify_chain: bool,
    key: &LinkKey,
) -> Result<Rendered, Problem> {
    const MAX_LISTED: u64 = 4096;
    let volume = Volume::open(source, device, Conduct::Corrected)?;
    let entries = verify::list(volume.medium(), volume.superblock(), MAX_LISTED);
    let mut text = String::new();
    for sector in &entries {
        let _ = writeln!(text, "{}", entry_text(sector));
    }
    let mut fields = vec![(
        "entries",
        Json::List(entries.iter().map(entry_json).collect()),
    )];
    let mut sound = true;
    if verify_chain {
        let mut medium = Medium::beside(volume.medium());
        let mut superblock = *volume.superblock();
        match verify::verify(&mut medium, &mut superblock, Conduct::Corrected, key) {
            Ok(report) => {
                let end = if report.complete {
                    "to the first"
                } else {
                    "over a full lap"
                };
                let _ = writeln!(
                    text,
                    "verified {} entries {end}, {} with a BLAKE3 link",
                    report.checked, report.linked
                );
                fields.push(("verified", report.checked.into()));
                fields.push(("linked", report.linked.into()));
                fields.push(("complete", report.complete.into()));
            }
            Err(problem) => {
                sound = false;
                let _ = writeln!(text, "{problem}");
                fields.push(("problem", problem_json(&problem)));
            }
        }
    }
    Ok(Rendered {
        text,
        json: Json::Object(fields),
        sound,
    })
}

fn entry_text(sector: &Sector) -> String {
    let entry = &sector.entry;
    let link = match sector.link() {
        None => "no link".to_owned(),
        Some(link) => {
            let digest = hex(&link.digest[..4]);
            match link.kind.get() {
                clone::KIND_GENESIS => format!("link {digest}, genesis of {}", hex(&link.fork_id)),
                clone::KIND_FORK => format!("link {digest}, fork {}", hex(&link.fork_id)),
                _ => format!("link {digest}"),
            }
        }
    };
    format!(
        "{:>6}  LBA {}  {} ns  {:<8}  {} -> {}  {link}",
        entry.sequence.get(),
        entry.self_lba.get(),
        entry.timestamp.get(),
        OpCode::name_of(entry.op_code.get()),
        entry.old_lba.get(),
        entry.new_lba.get(),
    )
}

fn entry_json(sector: &Sector) -> Json {
    let entry = &sector.entry;
    let link = sector.link();
    Json::Object(vec![
        ("sequence", entry.sequence.get().into()),
        ("lba", entry.self_lba.get().into()),
        ("timestamp_ns", entry.timestamp.get().into()),
        ("op", OpCode::name_of(entry.op_code.get()).into()),
        ("old_lba", entry.old_lba.get().into()),
        ("new_lba", entry.new_lba.get().into()),
        ("principal", entry.principal_hash32.get().into()),
        ("link", link.map(|link| hex(&link.digest)).into()),
        ("kind", link.map(|link| link.kind.get()).into()),
        ("fork_id", link.map(|link| hex(&link.fork_id)).into()),
        (
            "peer_generation",
            link.map(|link| link.peer_generation.get()).into(),
        ),
    ])
}
