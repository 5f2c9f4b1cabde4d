//! What load is put on: a raw file or device, or an NBD server.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hn4_engine::device::Device;
use hn4_engine::nbd::client::Address;

use crate::baseline::Baseline;
use crate::engine::{EngineLane, EngineSpec, EngineVolume};
use crate::job::Job;
use crate::nbd::NbdLane;
use crate::raw::{RawLane, open_raw};
use crate::replicated::{ReplicatedSpec, ReplicatedVolume};

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// Read a block.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Write a block.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Make durable what was answered before.
    Flush {
        /// Leave out what is not needed to read it back.
        data_only: bool,
    },
}

impl Io {
    /// Bytes that it moves.
    #[must_use]
    pub fn length(self) -> u32 {
        match self {
            Self::Read { length, .. } | Self::Write { length, .. } => length,
            Self::Flush { .. } => 0,
        }
    }
}

/// One thread's way to the target.
pub trait Lane {
    /// Size of the target in bytes.
    fn size_bytes(&self) -> u64;

    /// Queues a request under a tag that is not in use, below the depth of the job.
    ///
    /// # Errors
    /// If the target is of no more use.
    fn submit(&mut self, io: Io, tag: u32) -> Result<()>;

    /// Sends what is queued, waits for at least one answer and appends the tags of those that came.
    ///
    /// # Errors
    /// If the target is of no more use, or refused a request: a run with errors measures nothing.
    fn wait(&mut self, done: &mut Vec<u32>) -> Result<()>;

    /// When the target first had no room for a request, if that has happened.
    fn full_since(&self) -> Option<Instant> {
        None
    }

    /// The end, after the last answer. A target that keeps writes in memory writes them back and
    /// tells how long that took.
    ///
    /// # Errors
    /// If it cannot.
    fn finish(&mut self) -> Result<Option<Duration>> {
        Ok(None)
    }
}

/// An NBD export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: Address,
    /// Name of the export.
    pub export: String,
}

impl FromStr for NbdUri {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(rest) = text.strip_prefix("nbd+unix:///") {
            let (export, socket) = rest
                .split_once("?socket=")
                .context("a URI of a unix socket is nbd+unix:///EXPORT?socket=PATH")?;
            return Ok(Self {
                address: Address::Unix(PathBuf::from(socket)),
                export: export.to_owned(),
            });
        }
        let rest = text
            .strip_prefix("nbd://")
            .context("an NBD URI starts with nbd+unix:/// or nbd://")?;
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let address: Option<SocketAddr> = if host.contains(':') {
            host.to_socket_addrs()
        } else {
            (host, 10809).to_socket_addrs()
        }
        .with_context(|| format!("looking up {host}"))?
        .next();
        Ok(Self {
            address: Address::Tcp(address.with_context(|| format!("{host} has no address"))?),
            export: export.to_owned(),
        })
    }
}

/// What `--target` names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetSpec {
    /// A file or block device, through the engine's ring with O_DIRECT.
    Raw(PathBuf),
    /// An NBD server.
    Nbd(NbdUri),
    /// A new volume in the engine, in this process, without sockets.
    Engine(EngineSpec),
    /// A new volume with a replica, in two daemons.
    Replicated(ReplicatedSpec),
    /// A file or device, by way of another runtime.
    Baseline(Baseline),
}

impl FromStr for TargetSpec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("raw:") {
            return Ok(Self::Raw(PathBuf::from(path)));
        }
        if let Some(uri) = text.strip_prefix("nbd:") {
            // Both `nbd:nbd://host/` and plain `nbd://host/` are understood.
            let uri = if uri.starts_with("//") { text } else { uri };
            return uri.parse().map(Self::Nbd);
        }
        if text.starts_with("nbd+unix:") {
            return text.parse().map(Self::Nbd);
        }
        if let Some(text) = text.strip_prefix("engine:") {
            return text.parse().map(Self::Engine);
        }
        if let Some(text) = text.strip_prefix("replicated:") {
            return text.parse().map(Self::Replicated);
        }
        if let Some(baseline) = Baseline::parse(text) {
            return Ok(Self::Baseline(baseline));
        }
        bail!(
            "a target is raw:PATH, nbd:URI, engine:FOLDER, replicated:FOLDER, tokio-uring:PATH or \
             glommio:PATH, not {text:?}"
        )
    }
}

impl fmt::Display for TargetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw(path) => write!(f, "raw:{}", path.display()),
            Self::Nbd(uri) => write!(f, "nbd:{:?} export {:?}", uri.address, uri.export),
            Self::Engine(spec) => write!(f, "{spec}"),
            Self::Replicated(spec) => write!(f, "{spec}"),
            Self::Baseline(it) => write!(f, "{}:{}", it.runtime, it.path.display()),
        }
    }
}

/// A target that is open for all threads of a run.
#[derive(Clone, Debug)]
pub enum Target {
    /// A file or device, locked once for all threads.
    Raw(Arc<Device>),
    /// A server; each thread has a connection.
    Nbd(NbdUri),
    /// A volume for this run, opened by the one thread that drives it.
    Engine(Arc<EngineVolume>),
    /// A volume for this run in two daemons; each thread has a connection to the primary.
    Replicated(Arc<ReplicatedVolume>),
    /// A file or device; each thread has a runtime of its own.
    Baseline(Baseline),
}

impl Target {
    /// Opens it.
    ///
    /// # Errors
    /// If it is not there, in use, or cannot do direct I/O.
    pub fn open(spec: &TargetSpec) -> Result<Self> {
        Ok(match spec {
            TargetSpec::Raw(path) => Self::Raw(Arc::new(open_raw(path)?)),
            TargetSpec::Nbd(uri) => Self::Nbd(uri.clone()),
            TargetSpec::Engine(spec) => Self::Engine(Arc::new(EngineVolume::create(spec)?)),
            TargetSpec::Replicated(spec) => {
                Self::Replicated(Arc::new(ReplicatedVolume::create(spec)?))
            }
            TargetSpec::Baseline(baseline) => Self::Baseline(baseline.clone()),
        })
    }

    /// A way to it for the calling thread, with buffers for so many clones of the job.
    ///
    /// # Errors
    /// If memory, the kernel or the server refuses.
    pub fn lane(&self, job: &Job, streams: u32) -> Result<Box<dyn Lane>> {
        Ok(match self {
            Self::Raw(device) => Box::new(RawLane::new(device, job)?),
            Self::Nbd(uri) => Box::new(NbdLane::connect(uri, job)?),
            Self::Engine(volume) => Box::new(EngineLane::open(volume, job, streams)?),
            Self::Replicated(volume) => Box::new(NbdLane::connect(&volume.uri, job)?),
            Self::Baseline(baseline) => baseline.lane(job)?,
        })
    }

    /// The process whose CPU time is that of the target, if it has one of its own that is known.
    #[must_use]
    pub fn server_pid(&self) -> Option<u32> {
        match self {
            Self::Replicated(volume) => volume.pid(),
            Self::Raw(_) | Self::Nbd(_) | Self::Engine(_) | Self::Baseline(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_people_write_them() {
        let unix = NbdUri {
            address: Address::Unix(PathBuf::from("/run/a.sock")),
            export: "vol".to_owned(),
        };
        let parse = |text: &str| text.parse::<TargetSpec>();
        for text in [
            "nbd:nbd+unix:///vol?socket=/run/a.sock",
            "nbd+unix:///vol?socket=/run/a.sock",
        ] {
            assert_eq!(parse(text).expect(text), TargetSpec::Nbd(unix.clone()));
        }
        let tcp = NbdUri {
            address: Address::Tcp("127.0.0.1:10809".parse().expect("an address")),
            export: "x".to_owned(),
        };
        for text in ["nbd://127.0.0.1/x", "nbd:nbd://127.0.0.1:10809/x"] {
            assert_eq!(parse(text).expect(text), TargetSpec::Nbd(tcp.clone()));
        }
        let raw = TargetSpec::Raw(PathBuf::from("/dev/sdz"));
        assert_eq!(parse("raw:/dev/sdz").expect("raw"), raw);
        let Ok(TargetSpec::Engine(spec)) = parse("engine:/mnt?size_mib=64&overlay_mib=16") else {
            panic!("an engine target");
        };
        assert_eq!((spec.size_mib, spec.overlay_mib), (64, 16));
        assert_eq!(spec.folder, PathBuf::from("/mnt"));
        assert_eq!(spec.write_delay_ms, 0);
        let slow = "engine:/mnt?size_mib=64&overlay_mib=16&log_mib=64&write_delay_ms=2";
        assert_eq!(parse(slow).expect("slow disks").to_string(), slow);
        let wrong = [
            "engine:",
            "engine:/mnt?size=3",
            "engine:/mnt?size_mib=0",
            "replicated:/mnt?write_delay_ms=2",
        ];
        for text in ["/dev/sdz", "nbd+unix:///vol", "nbd:foo", ""]
            .iter()
            .chain(&wrong)
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
