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
    /// nbd-server: through the page cache.
    NbdServer,
    /// The engine in process: overlay, log and destage, without sockets.
    Engine,
    /// The ring of the engine on a raw file, in process.
    Ring,
    /// fio with io_uring on a raw file.
    Fio,
    /// The engine in process on disks whose writes take [`WRITE_DELAY_MS`] longer.
    SlowEngine,
    /// fio with io_uring on such a disk.
    SlowFio,
}

/// How much longer each write of a slow disk takes.
pub const WRITE_DELAY_MS: u64 = 2;

impl Peer {
    /// How the table calls it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Ours => "hn4-replicad",
            Self::Qemu => "qemu-storage-daemon",
            Self::NbdkitFile => "nbdkit file (page cache)",
            Self::NbdkitMemory => "nbdkit memory",
            Self::NbdServer => "nbd-server (page cache)",
            Self::Engine => "our engine in process",
            Self::Ring => "our ring, raw file",
            Self::Fio => "fio io_uring, raw file",
            Self::SlowEngine => "our engine in process, slow disks",
            Self::SlowFio => "fio io_uring, raw, slow disk",
        }
    }

    /// It ends with its first connection: nbd-server does, unless it leaves whoever started it, and
    /// then it can be neither watched nor stopped with certainty.
    #[must_use]
    pub fn serves_once(self) -> bool {
        self == Self::NbdServer
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
    /// Lines of the job of the engine in process, where they must differ.
    pub engine_job: Option<&'static str>,
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

const SERVERS: &[Peer] = &[
    Peer::Ours,
    Peer::Qemu,
    Peer::NbdkitFile,
    Peer::NbdkitMemory,
    Peer::NbdServer,
];
const RAW: &[Peer] = &[Peer::Engine, Peer::Ring, Peer::Fio];
const SLOW: &[Peer] = &[Peer::SlowEngine, Peer::SlowFio];

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
        engine_job: None,
        ours: Peer::Ours,
        peers: SERVERS,
        figure,
        goal,
        prewritten_mib: None,
    }
}

const fn engine(name: &'static str, job: &'static str, ratio: Option<f64>) -> Row {
    Row {
        name,
        job,
        engine_job: None,
        ours: Peer::Engine,
        peers: RAW,
        figure: Figure::Iops,
        goal: goal(Peer::Fio, ratio, None),
        prewritten_mib: None,
    }
}

const WRITE_FSYNC: &str = "rw=randwrite\nbs=4k\niodepth=1\nfsync=1\ntime_based\n";
const WRITE_FSYNC_32: &str =
    "rw=randwrite\nbs=4k\niodepth=1\nfsync=1\nnumjobs=32\ngroup_reporting\ntime_based\n";

/// The same engine on slow disks, against fio on one: what the order of the steps costs, in which
/// the noise of a fast disk is nothing.
const fn on_slow_disks(name: &'static str, row: Row) -> Row {
    Row {
        name,
        ours: Peer::SlowEngine,
        peers: SLOW,
        goal: goal(Peer::SlowFio, row.goal.ratio, None),
        ..row
    }
}

const ONE_FLUSHES: Row = engine(
    "4k write+fsync QD1, engine in process",
    WRITE_FSYNC,
    Some(1.0),
);
const MANY_FLUSH: Row = Row {
    engine_job: Some(WRITE_FSYNC_32),
    ..engine(
        "4k write+fsync, engine in process with 32 jobs, raw file with one",
        WRITE_FSYNC,
        Some(8.0),
    )
};

/// All rows. A raw file has neither overlay nor log: it is the engine without both. Nothing is
/// asked of a write with flush over NBD, nor of the engine through drain against a raw file, which
/// writes each block once where the engine writes it twice.
pub const ROWS: &[Row] = &[
    nbd(
        "4k randwrite QD32, NBD",
        "rw=randwrite\nbs=4k\niodepth=32\ntime_based\n",
        Figure::Iops,
        goal(Peer::Qemu, Some(2.0), Some(10.0)),
    ),
    nbd(
        "4k randread QD32 cold, NBD",
        "rw=randread\nbs=4k\niodepth=32\ntime_based\n",
        Figure::Iops,
        goal(Peer::Qemu, Some(1.5), None),
    ),
    Row {
        // Less than a quarter of the overlay: from there on it is written back in any case.
        prewritten_mib: Some(32),
        ..nbd(
            "4k randread QD32 from the overlay, NBD",
            "rw=randread\nbs=4k\niodepth=32\nsize=32m\ntime_based\n",
            Figure::Iops,
            goal(Peer::NbdkitMemory, Some(1.0), None),
        )
    },
    nbd(
        "4k write+flush QD1, NBD",
        "rw=randwrite\nbs=4k\niodepth=1\nfdatasync=1\ntime_based\n",
        Figure::Iops,
        goal(Peer::Qemu, None, None),
    ),
    nbd(
        "1M write QD8, NBD",
        "rw=write\nbs=1m\niodepth=8\ntime_based\n",
        Figure::Bandwidth,
        goal(Peer::Qemu, Some(1.5), None),
    ),
    engine(
        "4k randread QD32, engine in process",
        "rw=randread\nbs=4k\niodepth=32\ntime_based\n",
        Some(0.97),
    ),
    Row {
        // It ends when half of the overlay is used at most.
        engine_job: Some("rw=randwrite\nbs=4k\niodepth=32\nsize=25%\n"),
        ..engine(
            "4k randwrite QD32, engine in process, while the overlay has room",
            "rw=randwrite\nbs=4k\niodepth=32\ntime_based\n",
            Some(5.0),
        )
    },
    engine(
        "4k randwrite QD32, engine in process, through drain",
        "rw=randwrite\nbs=4k\niodepth=32\ntime_based\n",
        None,
    ),
    ONE_FLUSHES,
    MANY_FLUSH,
    on_slow_disks(
        "4k write+fsync QD1, disks with 2 ms more for each write",
        ONE_FLUSHES,
    ),
    on_slow_disks(
        "4k write+fsync, 32 jobs against one, disks with 2 ms more for each write",
        MANY_FLUSH,
    ),
];

impl Row {
    /// The job file of a round, for this program and for fio alike. A job that is not time-based
    /// is measured from its first request on.
    #[must_use]
    pub fn job_file(&self, peer: Peer, runtime: Duration, ramp: Duration, seed: u64) -> String {
        let is_engine = matches!(peer, Peer::Engine | Peer::SlowEngine);
        let job = self.engine_job.filter(|_| is_engine);
        let job = job.unwrap_or(self.job);
        let mut text = format!("[row]\n{job}direct=1\nnorandommap\nrandseed={seed}\n");
        if job.contains("time_based") {
            let (runtime, ramp) = (runtime.as_millis(), ramp.as_millis());
            // Writing to a string does not fail.
            let _ = write!(text, "runtime={runtime}ms\nramp_time={ramp}ms\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::servers::SIZES;
    use crate::job::{JobFile, Size};

    #[test]
    fn every_row_is_a_job_and_is_judged_by_somebody_who_is_measured() {
        for row in ROWS {
            for &peer in row.peers {
                let (runtime, ramp) = (Duration::from_secs(1), Duration::from_millis(5));
                let text = row.job_file(peer, runtime, ramp, 1);
                let file = JobFile::parse(&text).expect(row.name);
                assert_eq!(file.jobs.len(), 1, "{}", row.name);
            }
            assert!(row.peers.contains(&row.ours), "{}", row.name);
            assert!(row.peers.contains(&row.goal.peer), "{}", row.name);
            assert_ne!(row.ours, row.goal.peer, "{}", row.name);
        }
    }

    #[test]
    fn an_overlay_that_is_to_have_room_has_it_to_the_end() {
        let row = ROWS.iter().find(|row| row.name.contains("has room"));
        let job = row.and_then(|row| row.engine_job).expect("its own job");
        let file = JobFile::parse(&format!("[row]\n{job}")).expect("a job");
        assert!(!file.jobs[0].time_based);
        let Size::Percent(percent) = file.jobs[0].size else {
            panic!("a part of the volume");
        };
        for [size, overlay, _] in SIZES {
            assert!(size * u64::from(percent) / 100 <= overlay / 2);
        }
    }
}
