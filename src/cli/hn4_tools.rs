//! `hn4ctl volume` on HN4 volumes: opens devices, asks the `hn4` crate, prints, executes plans.
//!
//! Invariants:
//! - Every check is made before the first write: the device is locked, no volume of this node
//!   lives on it, it is blank unless the caller gives its data up, and the plan fits.
//! - What only looks opens the device for reading.
//!
//! Not here: anything that knows a byte of the format.

use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use hn4::chronicle::LinkKey;
use hn4::format::{Identity, Params};
use hn4::num::hex;
use hn4::status::{Conduct, Problem};
use hn4::superblock::Superblock;
use hn4::tool::{self, CloneOptions, Rendered};
use hn4::wormhole::clone::Purpose;

use super::args::Cli;
use super::hn4_args::{
    CatArgs, CloneArgs, FormatArgs, Hn4Command, InspectArgs, KeyArgs, LookArgs, MediumArgs,
    parse_hex,
};
use super::hn4_device::{Access, Target};
use super::run::{AnyError, DONE, NOT_OK, config_path};
use crate::config::Config;
use crate::config::attach::attach_records;
use crate::config::state::{NodeState, random_bytes};

pub(super) fn run(cli: &Cli, command: &Hn4Command) -> Result<u8, AnyError> {
    match command {
        Hn4Command::Format(args) => format(cli, args),
        Hn4Command::Clone(args) => clone(cli, args),
        Hn4Command::Verify(args) => {
            let key = link_key(&args.key)?;
            look(&args.look, |on| tool::verify(on, on.device, &key))
        }
        Hn4Command::Ls(args) => look(args, |on| tool::ls(on, on.device)),
        Hn4Command::Cat(args) => cat(args),
        Hn4Command::Where(args) => {
            look(&args.look, |on| tool::where_is(on, on.device, &args.place))
        }
        Hn4Command::Which(args) => look(&args.look, |on| tool::which(on, on.device, args.lba)),
        Hn4Command::Chronicle(args) => {
            let key = link_key(&args.key)?;
            look(&args.look, |on| {
                tool::chronicle(on, on.device, args.verify, &key)
            })
        }
    }
}

/// `inspect --device`: always an answer, also for a volume that does not mount.
pub(super) fn inspect(device: &Path, args: &InspectArgs) -> Result<u8, AnyError> {
    let target = Target::open(device, Access::Judge, args.medium)?.in_volume_sectors(args.medium);
    let now_ns = now_ns()?;
    print(
        &tool::inspect::inspect(&target, target.device, now_ns),
        args.json,
    )
}

fn open_to_read(path: &Path, medium: MediumArgs) -> Result<Target, AnyError> {
    Ok(Target::open(path, Access::Read, medium)?.in_volume_sectors(medium))
}

fn look(
    args: &LookArgs,
    ask: impl FnOnce(&Target) -> Result<Rendered, Problem>,
) -> Result<u8, AnyError> {
    let target = open_to_read(&args.device, args.medium)?;
    print(&ask(&target).map_err(on(&target))?, args.json)
}

/// A problem with the device that it was found on.
fn on(target: &Target) -> impl Fn(Problem) -> AnyError {
    let path = target.path().display().to_string();
    move |problem| format!("{path}: {problem}").into()
}

fn print(rendered: &Rendered, json: bool) -> Result<u8, AnyError> {
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", rendered.json)?;
    } else {
        write!(out, "{}", rendered.text)?;
    }
    out.flush()?;
    Ok(if rendered.sound { DONE } else { NOT_OK })
}

fn now_ns() -> Result<u64, AnyError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_err(|_| "the clock is before 1970: set it")?;
    Ok(u64::try_from(now.as_nanos())?)
}

fn link_key(args: &KeyArgs) -> Result<LinkKey, AnyError> {
    let Some(path) = &args.link_key else {
        return Ok(LinkKey::Public);
    };
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("reading the key {}: {error}", path.display()))?;
    let key = parse_hex(text.trim()).ok_or_else(|| {
        format!(
            "{} does not hold 64 hexadecimal digits and nothing else",
            path.display()
        )
    })?;
    Ok(LinkKey::Secret(key))
}

fn cat(args: &CatArgs) -> Result<u8, AnyError> {
    let target = open_to_read(&args.device, args.medium)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut written = Ok(());
    let read = tool::cat(&target, target.device, args.seed, &mut |bytes| {
        if written.is_ok() {
            written = out.write_all(bytes);
        }
    });
    written?;
    out.flush()?;
    read.map_err(on(&target))?;
    Ok(DONE)
}

/// A volume of this node would not learn that its backing or log was written to.
fn refuse_attached(cli: &Cli, path: &Path) -> Result<(), AnyError> {
    let config = config_path(cli);
    if cli.config.is_none() && !config.exists() {
        return Ok(());
    }
    let directory = Config::load(&config)?.node.state_dir;
    if !directory.exists() {
        return Ok(());
    }
    let place = path.canonicalize().ok();
    for record in attach_records(&NodeState::open_or_create(&directory)?)? {
        for (part, used) in [("backing", &record.backing), ("log", &record.log)] {
            if used.canonicalize().ok() == place {
                return Err(format!(
                    "{} is the {part} of volume {} ({}), which would not know of the change. Give \
                     the volume up first with `hn4ctl volume forget {}`, or write over NBD",
                    path.display(),
                    record.name,
                    record.volume,
                    record.volume
                )
                .into());
            }
        }
    }
    Ok(())
}

/// Data is replaced only when the caller says so.
fn refuse_data(target: &Target, overwrite: bool) -> Result<(), AnyError> {
    if overwrite {
        return Ok(());
    }
    let Some(at) = target.first_data()? else {
        return Ok(());
    };
    let mut north = [0; 8192];
    let volume = hn4::device::ReadAt::read_at(target, 0, &mut north)
        .ok()
        .and_then(|()| Superblock::from_bytes(&north))
        .filter(|_| tool::probe_sector_size(target).is_some())
        .map_or(String::new(), |found| {
            format!(
                ", the HN4 volume {} {:?}",
                hex(&found.uuid()),
                found.label()
            )
        });
    Err(format!(
        "{} holds data (near byte {at}){volume}, all of which would be lost; if that is meant, say \
         so with --overwrite",
        target.path().display()
    )
    .into())
}

fn format(cli: &Cli, args: &FormatArgs) -> Result<u8, AnyError> {
    let look = &args.look;
    refuse_attached(cli, &look.device)?;
    let target = Target::open(&look.device, Access::Write, look.medium)?.of_kind(args.device_type);
    refuse_data(&target, args.overwrite)?;
    let identity = match args.specific_uuid {
        Some(uuid) => Identity::Specific {
            lo: uuid.lo,
            hi: uuid.hi,
        },
        None => Identity::Fresh {
            r1: random_word()?,
            r2: random_word()?,
        },
    };
    let params = Params {
        profile: args.profile.id(),
        label: args.label.clone(),
        identity,
        mount_intent_flags: args
            .mount_intent
            .iter()
            .fold(0, |all, flag| all | flag.bit()),
        override_capacity_bytes: args.override_capacity_bytes,
        root_perms_or: args.root_perms_or,
        now_ns: now_ns()?,
        conduct: Conduct::Corrected,
    };
    let planned = tool::format(&target, target.device, &params);
    let (plan, rendered) = planned.map_err(on(&target))?;
    target.execute(&plan)?;
    print(&rendered, look.json)
}

fn random_word() -> Result<u64, AnyError> {
    let mut word = [0; 8];
    word.copy_from_slice(&random_bytes()?[..8]);
    Ok(u64::from_le_bytes(word))
}

fn clone(cli: &Cli, args: &CloneArgs) -> Result<u8, AnyError> {
    let look = &args.look;
    if look.device.canonicalize().ok() == args.to.canonicalize().ok() {
        return Err(
            "--device and --to are the same place: a clone needs a device of its own".into(),
        );
    }
    refuse_attached(cli, &args.to)?;
    let parent = if args.leave_parent {
        open_to_read(&look.device, look.medium)?
    } else {
        refuse_attached(cli, &look.device)
            .map_err(|error| format!("{error}; or leave the parent alone with --leave-parent"))?;
        Target::open(&look.device, Access::Write, look.medium)?.in_volume_sectors(look.medium)
    };
    let target = Target::open(&args.to, Access::Write, look.medium)?
        .in_sectors_of(parent.device.sector_size);
    refuse_data(&target, args.overwrite)?;
    let options = CloneOptions {
        override_capacity: args.override_capacity,
        label: args.label.clone(),
        purpose: if args.diverge {
            Purpose::Diverge
        } else {
            Purpose::SameTimeline
        },
        record_in_parent: !args.leave_parent,
        fork_id: random_bytes()?,
        now_ns: now_ns()?,
        key: link_key(&args.key)?,
    };
    let sides = ((&parent as _, parent.device), (&target as _, target.device));
    let planned = tool::clone(sides.0, sides.1, &options);
    let plans = planned.map_err(|problem| {
        let (from, to) = (look.device.display(), args.to.display());
        format!("cloning {from} to {to}: {problem}")
    })?;
    target.check(&plans.clone)?;
    parent.check(&plans.parent)?;
    target.execute(&plans.clone)?;
    if !plans.parent.is_empty() {
        parent.execute(&plans.parent)?;
    }
    eprintln!("the clone has no data yet: replicate the volume, or copy its blocks");
    print(&plans.rendered, look.json)
}
