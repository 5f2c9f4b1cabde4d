//! Two daemons on loopback, and what is asked of them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hn4_replicad::control::api::{CopyReport, PeerProgress, VolumeReport};
use hn4_replicad::quickstart::rig::{Node, Plan, make_nodes};

use super::link::Link;
use crate::drive;
use crate::job::JobFile;
use crate::stats::Stats;
use crate::target::{Target, TargetSpec};

/// Longest wait for anything.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// A primary and its replica. The daemons are killed when it is dropped.
pub(crate) struct Pair {
    pub(crate) alpha: Node,
    pub(crate) beta: Node,
}

impl Pair {
    /// Makes the files of both in a folder of their own.
    ///
    /// # Errors
    /// If there is no room, or a flush on that file system is worth nothing.
    pub(crate) fn make(folder: &Path, daemon: &Path, plan: &Plan) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut nodes = make_nodes(folder, daemon, plan)?;
        let beta = nodes.pop().context("a second node")?;
        let alpha = nodes.pop().context("a first node")?;
        Ok(Self { alpha, beta })
    }

    /// Starts both and waits until the second one has a full copy and takes epochs as they come.
    ///
    /// # Errors
    /// If that does not happen in time; the error has the last words of a daemon that ended.
    pub(crate) fn start(&mut self) -> Result<()> {
        self.alpha.start()?;
        self.beta.start()?;
        self.beta.wait_for("have a full copy", LIMIT, is_usable)?;
        self.alpha.wait_for_peer(LIMIT)?;
        Ok(())
    }

    /// Waits until the replica's log has everything that is sealed.
    ///
    /// # Errors
    /// If that does not happen in time.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.alpha.flush()?;
        let settled = |report: &VolumeReport| lag(report).is_some_and(|lag| lag.bytes == 0);
        self.alpha.wait_for("have its peer level", LIMIT, settled)?;
        Ok(())
    }

    /// Runs a job on the primary, over its NBD socket. CPU time is that of its daemon.
    ///
    /// # Errors
    /// If the node fails a request.
    pub(super) fn job(&self, text: &str) -> Result<Stats> {
        let jobs = JobFile::parse(text)?.jobs;
        let target = Target::open(&TargetSpec::Nbd(self.alpha.uri().parse()?))?;
        let mut outcomes = drive::run(&jobs, &target, self.alpha.pid())?;
        let outcome = outcomes.pop().context("one job")?;
        let stats = outcome.stats.into_iter().next().context("one thread")?;
        ensure!(stats.ios() > 0, "not one request was completed in the time");
        Ok(stats)
    }
}

/// Whether a copy is complete.
pub(super) fn is_usable(report: &VolumeReport) -> bool {
    let state = report.state.as_ref();
    state.is_some_and(|state| state.copy == CopyReport::Usable)
}

/// How far the log of a replica is behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Lag {
    pub(super) bytes: u64,
    pub(super) ms: u64,
}

/// What a primary says of its only peer; nothing before it knows.
pub(super) fn lag(report: &VolumeReport) -> Option<Lag> {
    let peer = report.peers.first()?;
    let progress: &PeerProgress = peer.progress.as_ref()?;
    Some(Lag {
        bytes: progress.durable.lag_bytes?,
        ms: progress.durable.lag_ms?,
    })
}

/// When the first byte went over a line, from now on.
///
/// # Errors
/// If none does in time.
pub(super) fn first_byte(link: &Link) -> Result<Instant> {
    let (before, deadline) = (link.passed(), Instant::now() + LIMIT);
    while link.passed() == before {
        ensure!(Instant::now() < deadline, "the nodes do not connect");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Instant::now())
}
