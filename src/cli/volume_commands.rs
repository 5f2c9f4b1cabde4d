//! The commands below `hn4ctl volume`.

use std::io::{self, Write};
use std::time::Duration;

use hn4::log::{CopyState, Ground, Superblock};
use hn4_engine::device::{Device, DeviceError, DeviceOptions};

use super::args::{Cli, CreateArgs, ForgetArgs, VolumeCommand};
use super::hn4_args::MediumArgs;
use super::hn4_tools;
use super::run::{AnyError, DONE, load};
use super::show;
use super::token::IdentityToken;
use super::volume::{CreateOptions, Purpose, create_volume};
use crate::config::attach::{
    AttachError, AttachRecord, attach_record_forget, attach_record_put, attach_records, inspect_log,
};
use crate::config::state::NodeState;
use crate::config::{Config, VolumeSection};
use crate::control::report::role_text;

pub(super) fn run(cli: &Cli, command: &VolumeCommand) -> Result<u8, AnyError> {
    match command {
        VolumeCommand::Create(args) => create(&load(cli)?, &args.volume, &create_options(args)),
        VolumeCommand::Adopt(args) => {
            let options = CreateOptions {
                purpose: Purpose::Adopt,
                log_mib: args.log.log_mib,
                lanes: args.log.lanes,
                sector_bytes: args.log.sector_bytes,
                discard_log: args.discard_log,
                ..CreateOptions::default()
            };
            create(&load(cli)?, &args.volume, &options)
        }
        VolumeCommand::List => list(&load(cli)?),
        VolumeCommand::Inspect(args) => match (&args.device, &args.volume) {
            (Some(device), _) => hn4_tools::inspect(device, args),
            (None, _) if args.medium != MediumArgs::default() => {
                Err("sectors, zones and flushes can be told of a --device only".into())
            }
            (None, name) => inspect(section(&load(cli)?, name.as_deref().unwrap_or_default())?),
        },
        VolumeCommand::Reattach(arg) => {
            let config = load(cli)?;
            reattach(&config, section(&config, &arg.volume)?)
        }
        VolumeCommand::Forget(args) => forget(&load(cli)?, args),
        VolumeCommand::Hn4(command) => hn4_tools::run(cli, command),
    }
}

fn forget(config: &Config, args: &ForgetArgs) -> Result<u8, AnyError> {
    let record = attach_record_forget(&state(config)?, args.id)?;
    writeln!(
        io::stdout(),
        "volume {} is forgotten; its log {} and backing {} are as they were",
        record.volume,
        record.log.display(),
        record.backing.display()
    )?;
    Ok(DONE)
}

fn create_options(args: &CreateArgs) -> CreateOptions {
    let purpose = match args.identity {
        Some(identity) => Purpose::Replica {
            identity,
            overwrite_backing: args.overwrite_backing,
            seeded: args.seeded,
        },
        None => Purpose::New,
    };
    CreateOptions {
        purpose,
        log_mib: args.log.log_mib,
        lanes: args.log.lanes,
        sector_bytes: args.log.sector_bytes,
        size_mib: args.size_mib,
        create_backing: args.create_backing,
        sparse: args.sparse,
        discard_log: None,
    }
}

fn state(config: &Config) -> Result<NodeState, AnyError> {
    Ok(NodeState::open_or_create(&config.node.state_dir)?)
}

fn section<'c>(config: &'c Config, name: &str) -> Result<&'c VolumeSection, AnyError> {
    config.volume(name).ok_or_else(|| {
        let names: Vec<&str> = config.volumes.iter().map(|v| v.name.as_str()).collect();
        format!(
            "{} has no volume {name:?}; it has: {}. Add a [[volume]] section first",
            config.path.display(),
            names.join(", ")
        )
        .into()
    })
}

fn create(config: &Config, name: &str, options: &CreateOptions) -> Result<u8, AnyError> {
    let section = section(config, name)?;
    let token = create_volume(section, &state(config)?, options)?;
    let mut out = io::stdout().lock();
    // The token stands alone in its line, for scripts.
    writeln!(out, "{token}")?;
    let hint = match options.purpose {
        Purpose::Replica { seeded: true, .. } => {
            "replica created; let nothing else write to its backing from now on. Start \
             hn4-replicad: it reads what is there, and the primary sends what differs"
                .to_owned()
        }
        Purpose::Replica { .. } => {
            "replica created; start hn4-replicad, the primary fills it".to_owned()
        }
        Purpose::New | Purpose::Adopt => format!(
            "volume {name} created; start hn4-replicad. For a copy on another node, there: hn4ctl \
             volume create {name} --replica --identity TOKEN, with the line above"
        ),
    };
    eprintln!("{hint}");
    Ok(DONE)
}

fn list(config: &Config) -> Result<u8, AnyError> {
    let records = attach_records(&state(config)?)?;
    write!(io::stdout(), "{}", show::volume_list(config, &records))?;
    Ok(DONE)
}

/// Looks at a log that the daemon has not open; waits for nobody.
fn options(section: &VolumeSection) -> DeviceOptions {
    DeviceOptions {
        lock_patience: Duration::ZERO,
        ..section.log_options()
    }
}

fn explain(error: AttachError, section: &VolumeSection) -> AnyError {
    match error {
        AttachError::Device(DeviceError::InUse { path }) => format!(
            "{path} is in use, by hn4-replicad most likely. Its state is in `hn4ctl status`; to \
             look at volume {} without the daemon, stop it first",
            section.name
        )
        .into(),
        error => error.into(),
    }
}

fn inspect(section: &VolumeSection) -> Result<u8, AnyError> {
    let found = inspect_log(section, options(section));
    let (header, superblock) = found.map_err(|error| explain(error, section))?;
    let identity = &header.identity;
    let mut out = io::stdout().lock();
    writeln!(out, "identity    {}", IdentityToken(*identity))?;
    writeln!(out, "volume id   {}", identity.volume)?;
    writeln!(out, "size        {} bytes", identity.size_bytes)?;
    writeln!(out, "sectors     {} bytes", identity.sector_bytes)?;
    writeln!(out, "log ring    {} bytes", header.ring_bytes)?;
    writeln!(out, "created     {} ms since 1970", header.created_ms)?;
    print_superblock(&mut out, &superblock)?;
    Ok(DONE)
}

fn print_superblock(out: &mut impl Write, superblock: &Superblock) -> io::Result<()> {
    let copy = match superblock.copy {
        CopyState::Fresh if superblock.ground != Ground::Nothing => {
            "fresh: what was brought to the backing is to be compared with the primary".to_owned()
        }
        CopyState::Fresh => "fresh: holds nothing of the volume yet".to_owned(),
        CopyState::Seeding {
            cursor_bytes,
            until: None,
            ..
        } => format!("seeding: {cursor_bytes} bytes are here, not usable"),
        CopyState::Seeding {
            until: Some(until), ..
        } => format!("seeding: all bytes are here, usable when epoch {until} is applied"),
        CopyState::Usable => "usable".to_owned(),
        CopyState::Shadowing { cursor_bytes, .. } => format!(
            "usable, but behind the primary's log: a new copy is coming into the shadow, \
             {cursor_bytes} bytes are here"
        ),
        CopyState::Applying { shadow_bytes, .. } => {
            format!("a new copy is being written over the backing: {shadow_bytes} bytes of shadow")
        }
    };
    writeln!(out, "role        {}", role_text(superblock.role))?;
    writeln!(out, "copy        {copy}")?;
    writeln!(out, "term        {}", superblock.term)?;
    writeln!(out, "incarnation {}", superblock.incarnation.0)?;
    writeln!(out, "node        {}", superblock.node)?;
    writeln!(out, "applied     epoch {}", superblock.checkpoint)?;
    writeln!(out, "durable     epoch {} at least", superblock.durable)?;
    writeln!(out, "kept        epochs after {}", superblock.retained)
}

/// Records that log and backing are the right ones where they are now.
fn reattach(config: &Config, section: &VolumeSection) -> Result<u8, AnyError> {
    let state = state(config)?;
    let found = inspect_log(section, options(section));
    let (header, _) = found.map_err(|error| explain(error, section))?;
    let identity = header.identity;
    let backing = Device::open(
        &section.backing,
        DeviceOptions {
            read_only: true,
            lock_patience: Duration::ZERO,
            ..section.backing_options()
        },
    )?;
    let size_bytes = backing.info().size_bytes / 4096 * 4096;
    if size_bytes != identity.size_bytes {
        return Err(format!(
            "{} has {size_bytes} bytes, the volume {}: this is not its backing",
            section.backing.display(),
            identity.size_bytes
        )
        .into());
    }
    let records = attach_records(&state)?;
    let old = records
        .iter()
        .find(|record| record.volume == identity.volume);
    let undestaged = old.is_none_or(|record| record.undestaged);
    attach_record_put(&state, &AttachRecord::new(section, &identity, undestaged))?;
    let mut out = io::stdout().lock();
    if let Some(old) = old {
        writeln!(
            out,
            "was  log {}, backing {}",
            old.log.display(),
            old.backing.display()
        )?;
    }
    writeln!(
        out,
        "now  log {}, backing {}",
        section.log.display(),
        section.backing.display()
    )?;
    Ok(DONE)
}
