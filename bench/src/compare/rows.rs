//! What is compared: the rows, and what DESIGN 10 asks of each.

use std::fmt::Write as _;
use std::time::Duration;

/// Who is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Peer {
    /// hn4-replicad.
    Ours,
    /// qemu-storage-daemon with O_DIRECT and io_uring.
    Qemu,
    /// nbdkit's file plugin: through the page cache.
    NbdkitFile,
    /// nbdkit's memory plugin: no disk at all.
    NbdkitMemory,
    /// The ring of the engine on a raw file, in process.
    Ring,
    /// fio with io_uring on a raw file.
    Fio,
}

impl Peer {
    /// How the table calls it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Ours => "hn4-replicad",
            Self::Qemu => "qemu-storage-daemon",
            Self::NbdkitFile => "nbdkit file (page cache)",
            Self::NbdkitMemory => "nbdkit memory",
            Self::Ring => "our ring",
            Self::Fio => "fio io_uring",
        }
    }
}

/// What a figure is judged by.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Figure {
    /// Requests per second.
    Iops,
    /// Bytes per second.
    Bandwidth,
}

/// What DESIGN 10 asks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Goal {
    /// Against whom.
    pub peer: Peer,
    /// Least ratio of the medians; `None` if nothing is asked.
    pub ratio: Option<f64>,
    /// Most CPU time of our server for each request, in microseconds.
    pub server_us: Option<f64>,
}

/// One row.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// Lines of its job.
    pub job: &'static str,
    /// Whose figure is judged.
    pub ours: Peer,
    /// All who are measured, ours among them.
    pub peers: &'static [Peer],
    /// By what.
    pub figure: Figure,
    /// The judgement.
    pub goal: Goal,
    /// Only the first MiB of the target are used, written just before.
    pub prewritten_mib: Option<u64>,
}

const SERVERS: &[Peer] = &[Peer::Ours, Peer::Qemu, Peer::NbdkitFile, Peer::NbdkitMemory];
const RAW: &[Peer] = &[Peer::Ring, Peer::Fio];

const fn goal(peer: Peer, ratio: Option<f64>, server_us: Option<f64>) -> Goal {
    Goal {
        peer,
        ratio,
        server_us,
    }
}

const fn nbd(name: &'static str, job: &'static str, figure: Figure, goal: Goal) -> Row {
    Row {
        name,
        job,
        ours: Peer::Ours,
        peers: SERVERS,
        figure,
        goal,
        prewritten_mib: None,
    }
}

const fn raw(name: &'static str, job: &'static str, ratio: Option<f64>) -> Row {
    Row {
        name,
        job,
        ours: Peer::Ring,
        peers: RAW,
        figure: Figure::Iops,
        goal: goal(Peer::Fio, ratio, None),
        prewritten_mib: None,
    }
}

/// All rows. The targets of the raw rows are those of the engine in process where the ring alone
/// can be held to them; DESIGN 10 asks nothing of a write with flush over NBD.
pub const ROWS: &[Row] = &[
    nbd(
        "4k randwrite QD32, NBD",
        "rw=randwrite\nbs=4k\niodepth=32\n",
        Figure::Iops,
        goal(Peer::Qemu, Some(2.0), Some(10.0)),
    ),
    nbd(
        "4k randread QD32 cold, NBD",
        "rw=randread\nbs=4k\niodepth=32\n",
        Figure::Iops,
        goal(Peer::Qemu, Some(1.5), None),
    ),
    Row {
        prewritten_mib: Some(64),
        ..nbd(
            "4k randread QD32 from the overlay, NBD",
            "rw=randread\nbs=4k\niodepth=32\nsize=64m\n",
            Figure::Iops,
            goal(Peer::NbdkitMemory, Some(1.0), None),
        )
    },
    nbd(
        "4k write+flush QD1, NBD",
        "rw=randwrite\nbs=4k\niodepth=1\nfdatasync=1\n",
        Figure::Iops,
        goal(Peer::Qemu, None, None),
    ),
    nbd(
        "1M write QD8, NBD",
        "rw=write\nbs=1m\niodepth=8\n",
        Figure::Bandwidth,
        goal(Peer::Qemu, Some(1.5), None),
    ),
    raw(
        "4k randread QD32, raw file",
        "rw=randread\nbs=4k\niodepth=32\n",
        Some(0.97),
    ),
    raw(
        "4k randwrite QD32, raw file",
        "rw=randwrite\nbs=4k\niodepth=32\n",
        None,
    ),
    raw(
        "4k write+fdatasync QD1, raw file",
        "rw=randwrite\nbs=4k\niodepth=1\nfdatasync=1\n",
        None,
    ),
];

impl Row {
    /// The job file of a round, for this program and for fio alike.
    #[must_use]
    pub fn job_file(&self, runtime: Duration, ramp: Duration, seed: u64) -> String {
        let mut text = format!("[row]\n{}", self.job);
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "direct=1\nnorandommap\ntime_based\nruntime={}ms\nramp_time={}ms\nrandseed={seed}\n",
            runtime.as_millis(),
            ramp.as_millis(),
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobFile;

    #[test]
    fn every_row_is_a_job_and_is_judged_by_somebody_who_is_measured() {
        for row in ROWS {
            let text = row.job_file(Duration::from_secs(1), Duration::from_millis(5), 1);
            let file = JobFile::parse(&text).expect(row.name);
            assert_eq!(file.jobs.len(), 1, "{}", row.name);
            assert!(row.peers.contains(&row.ours), "{}", row.name);
            assert!(row.peers.contains(&row.goal.peer), "{}", row.name);
            assert_ne!(row.ours, row.goal.peer, "{}", row.name);
        }
    }
}
