//! `hn4ctl peer`: changes the configuration file and lets the daemon take it over.
//!
//! The file is the only truth. It is replaced as a whole, with a text that has been checked; if the
//! daemon refuses the change, the text from before is put back, unless somebody else has changed
//! the file meanwhile: nobody's edit is lost.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use super::args::Cli;
use super::peer_args::{PeerCommand, PeerKeys, ReloadArgs};
use super::run::{AnyError, DONE, FAILED, config_path, connect};
use crate::config::edit::{self, PeerEdit};
use crate::config::{Config, check_size};
use crate::control::{Request, Response};

pub(super) fn run(cli: &Cli, command: &PeerCommand) -> Result<u8, AnyError> {
    if cli.socket.is_some() {
        return Err("this command changes the configuration: use --config, not --socket".into());
    }
    // The file itself, not a link to it.
    let named = config_path(cli);
    let path = named
        .canonicalize()
        .map_err(|error| format!("{}: {error}", named.display()))?;
    check_size(&path)?;
    let before = std::fs::read_to_string(&path)?;
    let (edited, reload, done) = match command {
        PeerCommand::Add(args) => {
            let peer = with_name(&args.keys, Some(args.name.clone()));
            let text = edit::add(&before, &args.volume, &peer);
            let done = format!("{} is a peer of {} now", args.name, args.volume);
            (text, ReloadArgs::default(), done)
        }
        PeerCommand::Remove(args) => {
            let text = edit::remove(&before, &args.volume, &args.name);
            let done = format!("{} is no peer of {} any more", args.name, args.volume);
            (text, args.reload, done)
        }
        PeerCommand::Replace(args) => {
            let peer = with_name(&args.keys, args.with.clone());
            let text = edit::replace(&before, &args.volume, &args.name, &peer);
            let new = args.with.as_ref().unwrap_or(&args.name);
            let done = format!(
                "{new} is in the place of peer {} of {}",
                args.name, args.volume
            );
            (text, args.reload, done)
        }
    };
    let after = edited.map_err(|error| format!("{}: {error}", path.display()))?;
    Config::parse(&path, &after)?;
    if after == before {
        return Err("that is what the configuration says already; nothing was changed".into());
    }
    replace(&path, &after)?;
    take_over(cli, reload, &path, (&before, &after), &done)
}

fn take_over(
    cli: &Cli,
    reload: ReloadArgs,
    path: &Path,
    (before, after): (&str, &str),
    done: &str,
) -> Result<u8, AnyError> {
    let mut client = match connect(cli) {
        Ok(client) => client,
        Err(error) => {
            let path = path.display();
            eprintln!("hn4ctl: {path} is changed; it counts when the daemon starts");
            return Err(error);
        }
    };
    let request = Request::Reload {
        accept_fewer_copies: reload.accept_fewer_copies,
    };
    let refused = match client.request(&request)? {
        Response::Done { message } => {
            writeln!(io::stdout(), "{done}: {message}")?;
            return Ok(DONE);
        }
        Response::Error { what, why, next } => format!("{what}: {why}\nnext: {next}"),
        Response::Status(_) => "the daemon answered something else".to_owned(),
    };
    let shown = path.display();
    let file = if put_back(path, (before, after))? {
        format!("{shown} is as it was")
    } else {
        format!(
            "{shown} was changed by somebody else meanwhile and is left alone, so this change is \
             still in it: take it out, or it counts with the next reload or start"
        )
    };
    eprintln!("hn4ctl: {refused}\n{file}");
    Ok(FAILED)
}

/// Puts the text from before back if the file still holds the one that was written after it; says
/// whether it did.
fn put_back(path: &Path, (before, after): (&str, &str)) -> Result<bool, AnyError> {
    let shown = |error: io::Error| format!("reading {}: {error}", path.display());
    // As bytes: somebody else's text need not be UTF-8.
    if std::fs::read(path).map_err(shown)? != after.as_bytes() {
        return Ok(false);
    }
    replace(path, before)?;
    Ok(true)
}

fn with_name(keys: &PeerKeys, name: Option<String>) -> PeerEdit {
    PeerEdit {
        name,
        key_pin: keys.key_pin.clone(),
        address: keys.address.clone(),
        transport: keys.transport.clone(),
        roles: keys.roles.clone(),
        max_lag_bytes: keys.max_lag_bytes,
        max_lag_seconds: keys.max_lag_seconds,
        on_exceed: keys.on_exceed.clone(),
    }
}

/// Replaces a file as a whole: whoever reads it, also after a crash, sees the old text or the new.
fn replace(path: &Path, text: &str) -> Result<(), AnyError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = folder.join(name);
    let shown = |error: io::Error| format!("writing {}: {error}", new.display());
    let old = std::fs::metadata(path)?;
    let mut options = File::options();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .map_err(shown)?;
    file.write_all(text.as_bytes()).map_err(shown)?;
    let mode = old.permissions().mode() & 0o7777;
    file.set_permissions(PermissionsExt::from_mode(mode))
        .map_err(shown)?;
    // Only root may give a file away; whoever may not owns it already.
    let _ = chown(&new, Some(old.uid()), Some(old.gid()));
    file.sync_all().map_err(shown)?;
    std::fs::rename(&new, path).map_err(shown)?;
    File::open(folder)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_change_is_put_back_and_an_edit_made_meanwhile_is_kept() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("replicad.toml");
        let texts = ("# before\n", "# after\n");
        std::fs::write(&path, texts.0).expect("written");
        replace(&path, texts.1).expect("changed");
        assert!(put_back(&path, texts).expect("readable"));
        assert_eq!(std::fs::read(&path).expect("there"), texts.0.as_bytes());
        replace(&path, texts.1).expect("changed");
        let edited = b"# after, and \xFF\n";
        std::fs::write(&path, edited).expect("edited by somebody else");
        assert!(!put_back(&path, texts).expect("readable"));
        assert_eq!(std::fs::read(&path).expect("there"), edited);
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 1);
    }
}
