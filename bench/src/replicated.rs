//! A volume with a replica as a target: two daemons on loopback, made for the run and removed at
//! the end. Requests go over the primary's NBD socket, as they do for everybody else.
//!
//! **Not here:** peers of the engine in this process: who talks to peers is the daemon, not the
//! engine.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use hn4_replicad::quickstart::rig::Plan;
use tempfile::TempDir;

use crate::engine::EngineSpec;
use crate::replication::{Pair, daemon};
use crate::target::NbdUri;

const ACKS: [&str; 3] = ["async", "received", "durable"];
const TRANSPORTS: [&str; 2] = ["quic", "wss"];

/// What `replicated:FOLDER?ack=..&transport=..&size_mib=..&overlay_mib=..&log_mib=..` names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicatedSpec {
    /// Folder and sizes; both copies have them.
    pub volume: EngineSpec,
    /// What a flush waits for: `async`, `received` or `durable`.
    pub ack: &'static str,
    /// `quic` or `wss`.
    pub transport: &'static str,
    /// The daemon; `None`: the one beside this program.
    pub daemon: Option<PathBuf>,
}

impl FromStr for ReplicatedSpec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (folder, options) = text.split_once('?').unwrap_or((text, ""));
        ensure!(!folder.is_empty(), "replicated: names no folder");
        let (mut ack, mut transport, mut daemon) = ("durable", "quic", None);
        let mut sizes = Vec::new();
        for option in options.split('&').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("ack", value)) => ack = one_of("ack", value, &ACKS)?,
                Some(("transport", value)) => transport = one_of("transport", value, &TRANSPORTS)?,
                Some(("daemon", value)) => daemon = Some(PathBuf::from(value)),
                _ => sizes.push(option),
            }
        }
        let volume = format!("{folder}?{}", sizes.join("&"));
        let volume: EngineSpec = volume.parse().context(
            "replicated: besides ack, transport and daemon it takes sizes as engine: does",
        )?;
        ensure!(
            volume.write_delay_ms == 0,
            "replicated: has no write_delay_ms"
        );
        Ok(Self {
            volume,
            ack,
            transport,
            daemon,
        })
    }
}

fn one_of(key: &str, value: &str, known: &[&'static str]) -> Result<&'static str> {
    match known.iter().find(|name| **name == value) {
        Some(name) => Ok(name),
        None => bail!("{key}={value:?} must be one of {}", known.join(", ")),
    }
}

impl fmt::Display for ReplicatedSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EngineSpec {
            folder,
            size_mib,
            overlay_mib,
            log_mib,
            write_delay_ms: _,
        } = &self.volume;
        write!(
            f,
            "replicated:{}?ack={}&transport={}&size_mib={size_mib}&overlay_mib={overlay_mib}\
             &log_mib={log_mib}",
            folder.display(),
            self.ack,
            self.transport
        )
    }
}

/// Two running daemons with a volume. Killed when it is dropped, and their files removed.
pub struct ReplicatedVolume {
    pair: Pair,
    /// Where the primary serves it.
    pub uri: NbdUri,
    _folder: TempDir,
}

impl fmt::Debug for ReplicatedVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReplicatedVolume({:?})", self.uri)
    }
}

impl ReplicatedVolume {
    /// Makes the volume, starts both daemons and waits until the replica follows.
    ///
    /// # Errors
    /// If there is no daemon or no room, or the daemons do not get there.
    pub fn create(spec: &ReplicatedSpec) -> Result<Self> {
        let daemon = daemon(spec.daemon.as_deref())?;
        let dir = spec.volume.folder.canonicalize();
        let dir = dir.with_context(|| format!("{}", spec.volume.folder.display()))?;
        let folder = tempfile::Builder::new()
            .prefix("hn4-bench-pair-")
            .tempdir_in(dir)?;
        let plan = Plan {
            size_mib: spec.volume.size_mib,
            log_mib: spec.volume.log_mib,
            overlay_mib: spec.volume.overlay_mib,
            transport: spec.transport,
            policy: format!("ack = \"{}\"\n", spec.ack),
            ..Plan::default()
        };
        let mut pair = Pair::make(folder.path(), &daemon, &plan)?;
        pair.start()?;
        Ok(Self {
            uri: pair.alpha.uri().parse()?,
            pair,
            _folder: folder,
        })
    }

    /// The primary's process, if it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.pair.alpha.pid()
    }

    /// Waits until the replica's log has everything, and tells how many epochs the volume has.
    ///
    /// # Errors
    /// If that does not happen in time.
    pub fn settle(&mut self) -> Result<u64> {
        self.pair.settle()?;
        let report = self.pair.beta.report()?;
        Ok(report.state.context("the replica is open")?.tip_epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_and_sizes_are_read_and_shown() {
        let text = "replicated:/mnt?ack=received&transport=wss&size_mib=64&overlay_mib=16\
                    &log_mib=128";
        let (_, rest) = text.split_once(':').expect("a kind");
        let spec: ReplicatedSpec = rest.parse().expect("a target");
        assert_eq!((spec.ack, spec.transport), ("received", "wss"));
        assert_eq!(spec.to_string(), text);
        let usual: ReplicatedSpec = "/mnt".parse().expect("a target");
        assert_eq!((usual.ack, usual.transport), ("durable", "quic"));
        for wrong in ["", "/mnt?ack=none", "/mnt?transport=tcp", "/mnt?peers=1"] {
            let error = wrong.parse::<ReplicatedSpec>().expect_err(wrong);
            assert!(format!("{error:#}").len() > 20, "{error:#}");
        }
    }
}
