//! Carries out a command line of `hn4ctl`.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use hn4_transport::tls::Identity;

use super::args::{Cli, Command, PkiCommand, StatusArgs};
use super::{diff, peer_commands, pki, proof_commands, show, volume_commands};
use crate::config::{Config, DEFAULT_PATH};
use crate::control::api::{Health, NodeStatus};
use crate::control::{ClientError, ControlClient, Request, Response};

/// Carried out, as asked.
pub(super) const DONE: u8 = 0;
/// Refused or failed.
pub(super) const FAILED: u8 = 1;
/// The daemon is not there.
const NO_DAEMON: u8 = 3;
/// A check found something.
pub(super) const NOT_OK: u8 = 4;

/// An error as it is shown.
pub(super) type AnyError = Box<dyn std::error::Error>;

/// Carries out the command. Results go to standard output, errors to standard error.
#[must_use]
pub fn run(cli: &Cli) -> ExitCode {
    let code = match &cli.command {
        Command::Volume(command) => volume_commands::run(cli, command),
        Command::Pki(command) => run_pki(cli, command),
        Command::Keys(command) => proof_commands::run_keys(cli, command),
        Command::Ledger(command) => proof_commands::run_ledger(cli, command),
        Command::Proof(command) => proof_commands::run_proof(cli, command),
        Command::Status(args) => status(cli, *args),
        Command::Flush(arg) => ask(
            cli,
            &Request::Flush {
                volume: arg.volume.clone(),
            },
        ),
        Command::Drain(arg) => ask(
            cli,
            &Request::Drain {
                volume: arg.volume.clone(),
            },
        ),
        Command::Verify(args) => ask(
            cli,
            &Request::Verify {
                volume: args.volume.clone(),
            },
        ),
        Command::Promote(args) => ask(
            cli,
            &Request::Promote {
                volume: args.volume.clone(),
                accept_loss: args.accept_loss,
            },
        ),
        Command::Switchover(args) => ask(
            cli,
            &Request::Switchover {
                volume: args.volume.clone(),
                timeout_ms: args.timeout_s * 1000,
            },
        ),
        Command::Demote(arg) => ask(
            cli,
            &Request::Demote {
                volume: arg.volume.clone(),
            },
        ),
        Command::Peer(command) => peer_commands::run(cli, command),
        Command::Diff(args) => diff::run(cli, args),
        Command::Reload(args) => ask(
            cli,
            &Request::Reload {
                accept_fewer_copies: args.accept_fewer_copies,
            },
        ),
        Command::Wait(args) => ask(
            cli,
            &Request::Wait {
                volume: args.volume.clone(),
                applied: args.applied,
                timeout_ms: args.timeout_s * 1000,
            },
        ),
    };
    let code = code.unwrap_or_else(|error| {
        let closed = error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
        if closed {
            // Whoever read the output has seen enough.
            return DONE;
        }
        eprintln!("hn4ctl: {error}");
        match error.downcast_ref::<ClientError>() {
            Some(_) => NO_DAEMON,
            None => FAILED,
        }
    });
    ExitCode::from(code)
}

pub(super) fn config_path(cli: &Cli) -> PathBuf {
    cli.config
        .clone()
        .unwrap_or_else(|| PathBuf::from(DEFAULT_PATH))
}

pub(super) fn load(cli: &Cli) -> Result<Config, AnyError> {
    if cli.socket.is_some() {
        return Err("this command reads the configuration: use --config, not --socket".into());
    }
    Ok(Config::load(&config_path(cli))?)
}

pub(super) fn connect(cli: &Cli) -> Result<ControlClient, AnyError> {
    let path = match &cli.socket {
        Some(path) => path.clone(),
        None => load(cli)?.node.control_socket,
    };
    Ok(ControlClient::connect(&path)?)
}

pub(super) fn ask(cli: &Cli, request: &Request) -> Result<u8, AnyError> {
    match connect(cli)?.request(request)? {
        Response::Done { message } => {
            writeln!(io::stdout(), "{message}")?;
            Ok(DONE)
        }
        Response::Error { what, why, next } => {
            eprintln!("hn4ctl: {what}: {why}\nnext: {next}");
            Ok(FAILED)
        }
        Response::Status(_) => Err("the daemon answered something else".into()),
    }
}

fn status(cli: &Cli, args: StatusArgs) -> Result<u8, AnyError> {
    let mut client = connect(cli)?;
    loop {
        let status = client.status()?;
        print(&status, args)?;
        if !args.watch {
            let not_ok = args.check && status.health() != Health::Ok;
            return Ok(if not_ok { NOT_OK } else { DONE });
        }
        std::thread::sleep(Duration::from_secs(args.interval_s));
    }
}

fn print(status: &NodeStatus, args: StatusArgs) -> Result<(), AnyError> {
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(status)?)?;
        return Ok(out.flush()?);
    }
    if args.watch && out.is_terminal() {
        // Home, and clear what is below: without the flicker of an empty screen.
        write!(out, "\x1b[H\x1b[J")?;
    }
    write!(out, "{}", show::node(status))?;
    if args.watch && !out.is_terminal() {
        writeln!(out)?;
    }
    Ok(out.flush()?)
}

fn run_pki(cli: &Cli, command: &PkiCommand) -> Result<u8, AnyError> {
    let mut out = io::stdout().lock();
    match command {
        PkiCommand::Init { dir } => {
            let (certificate, key) = pki::init(dir)?;
            writeln!(
                out,
                "authority's certificate  {}  (every node needs it: transport.ca)\n\
                 authority's key          {}  (keep it off the nodes)",
                certificate.display(),
                key.display()
            )?;
        }
        PkiCommand::Issue { name, dir } => {
            let files = pki::issue(dir, name)?;
            writeln!(
                out,
                "certificate  {}  (node {name}: transport.certificate)\n\
                 key          {}  (node {name}: transport.key; secret)\n\
                 key pin      {}  (peers of {name}: key_pin)",
                files.certificate.display(),
                files.key.display(),
                files.pin
            )?;
        }
        PkiCommand::Pin => {
            let config = load(cli)?;
            let transport = config
                .transport
                .ok_or("the configuration has no [transport]")?;
            let identity =
                Identity::from_files(&transport.certificate, &transport.key, &transport.ca)?;
            writeln!(out, "{}", identity.pin())?;
        }
    }
    Ok(DONE)
}
