//! The engine in this process as a target: overlay, log and destage on real files, no sockets.
//!
//! A volume is made for the run in a folder of its own, which is removed at the end. All clones of
//! a job (`numjobs`) are clients of the one volume, as they would be of one server: their flushes
//! share the log. Its thread is the load and the engine at once, so that the CPU time that is
//! reported holds both.
//!
//! **Not here:** peers.

use std::collections::VecDeque;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hn4::log::{LogIdentity, Role};
use hn4::types::{NodeId, VolumeId};
use hn4_engine::core::recovery::{self, NewLog};
use hn4_engine::core::{Lanes, VolumeConfig};
use hn4_engine::device::{Device, DeviceOptions, create_preallocated};
use hn4_engine::shard::{DeviceMedium, Embedded, ShardSetup};
use tempfile::TempDir;

use crate::contents::Contents;
use crate::files::make_file;
use crate::job::Job;
use crate::slow::SlowFile;
use crate::target::{Io, Lane};

/// A request that takes longer than this has hung.
const PATIENCE: Duration = Duration::from_secs(60);
/// Files of the volume in its folder.
const LOG: &str = "log";
const BACKING: &str = "backing";
/// The node that the volume is on; nobody else is there to tell it from.
const NODE: NodeId = NodeId(*b"hn4-bench node 1");

/// What `engine:FOLDER?size_mib=..&overlay_mib=..&log_mib=..&write_delay_ms=..` names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EngineSpec {
    /// Where the volume's files are made.
    pub folder: PathBuf,
    /// Size of the volume.
    pub size_mib: u64,
    /// Memory of the overlay.
    pub overlay_mib: u64,
    /// Size of the log.
    pub log_mib: u64,
    /// How much longer each write of log and backing takes, which are in memory then; 0: they are
    /// files in the folder.
    pub write_delay_ms: u64,
}

impl FromStr for EngineSpec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (folder, options) = text.split_once('?').unwrap_or((text, ""));
        ensure!(!folder.is_empty(), "engine: names no folder");
        let mut spec = Self {
            folder: PathBuf::from(folder),
            size_mib: 1024,
            overlay_mib: 512,
            log_mib: 2048,
            write_delay_ms: 0,
        };
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            let place = match key {
                "size_mib" => &mut spec.size_mib,
                "overlay_mib" => &mut spec.overlay_mib,
                "log_mib" => &mut spec.log_mib,
                "write_delay_ms" => &mut spec.write_delay_ms,
                _ => bail!(
                    "engine: knows size_mib, overlay_mib, log_mib and write_delay_ms, not {key:?}"
                ),
            };
            *place = value
                .parse()
                .ok()
                .filter(|value| (1..=1 << 20).contains(value))
                .with_context(|| format!("{key}={value:?} must be 1 to 1048576"))?;
        }
        Ok(spec)
    }
}

impl fmt::Display for EngineSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "engine:{}?size_mib={}&overlay_mib={}&log_mib={}",
            self.folder.display(),
            self.size_mib,
            self.overlay_mib,
            self.log_mib
        )?;
        match self.write_delay_ms {
            0 => Ok(()),
            delay => write!(f, "&write_delay_ms={delay}"),
        }
    }
}

/// The files of a volume that was made for a run.
#[derive(Debug)]
pub struct EngineVolume {
    /// Log and backing, if their writes take longer: unmounted before the folder is removed.
    _slow: Vec<SlowFile>,
    folder: TempDir,
    overlay_bytes: u64,
    options: DeviceOptions,
}

impl EngineVolume {
    /// Makes the files and fills them.
    ///
    /// # Errors
    /// If there is no room, or the file system cannot keep the promise of a flush.
    pub fn create(spec: &EngineSpec) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("hn4-bench-engine-")
            .tempdir_in(&spec.folder)
            .with_context(|| format!("{}", spec.folder.display()))?;
        let [log, backing] = [LOG, BACKING].map(|name| folder.path().join(name));
        let mut slow = Vec::new();
        if spec.write_delay_ms == 0 {
            make_file(&backing, spec.size_mib << 20)?;
            create_preallocated(&log, spec.log_mib << 20, false)?;
        } else {
            for (file, mib) in [(backing, spec.size_mib), (log, spec.log_mib)] {
                slow.push(SlowFile::in_memory(file, mib, spec.write_delay_ms)?);
            }
        }
        let volume = Self {
            _slow: slow,
            folder,
            overlay_bytes: spec.overlay_mib << 20,
            options: DeviceOptions {
                // Memory that is made to be slow loses nothing as long as it is there.
                assume_strict_flush: spec.write_delay_ms > 0,
                ..DeviceOptions::default()
            },
        };
        let log = Device::open(&volume.log(), volume.options)?;
        let backing = Device::open(&volume.backing(), volume.options)?;
        let new = NewLog {
            identity: LogIdentity {
                volume: VolumeId(*b"hn4-bench volume"),
                birth_nonce: [1; 16],
                size_bytes: spec.size_mib << 20,
                sector_bytes: backing.info().logical_bytes,
            },
            node: NODE,
            lanes: Lanes {
                count: 1,
                stripe_blocks: 256,
            },
            role: Role::Primary,
            seeded: false,
            created_ms: 0,
        };
        recovery::create(&mut DeviceMedium::new(&log)?, &new)?;
        Ok(volume)
    }

    fn backing(&self) -> PathBuf {
        self.folder.path().join(BACKING)
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join(LOG)
    }

    /// Where the volume's files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Opens the volume on the calling thread.
    ///
    /// # Errors
    /// If another thread has it open, or the kernel refuses.
    pub fn open(&self) -> Result<Embedded> {
        let setup = ShardSetup {
            fork_folder: None,
            shadow: None,
            fork_space_bytes: 0,
            name: "bench".to_owned(),
            expect: None,
            log: self.log(),
            backing: self.backing(),
            log_options: self.options,
            backing_options: self.options,
            overlay_bytes: self.overlay_bytes,
            configure: Box::new(|header, slots| {
                VolumeConfig::new(header.identity, NODE, header.ring_bytes, slots)
            }),
            listen: Vec::new(),
            threads: 1,
            cpu: None,
        };
        Ok(Embedded::open(setup)?)
    }
}

/// The volume, driven by the calling thread.
pub struct EngineLane {
    volume: Embedded,
    contents: Contents,
    /// Where the read of each tag is from.
    offsets: Vec<u64>,
    /// Requests for which there was no room yet.
    held_back: VecDeque<(Io, u32)>,
    /// When the first one was.
    full_since: Option<Instant>,
}

impl EngineLane {
    /// Opens the volume.
    ///
    /// # Errors
    /// As [`EngineVolume::open`].
    pub fn open(volume: &EngineVolume, job: &Job, streams: u32) -> Result<Self> {
        let capacity = usize::try_from(u64::from(job.depth) * u64::from(streams))?;
        Ok(Self {
            volume: volume.open()?,
            contents: Contents::new(job),
            offsets: vec![0; capacity],
            held_back: VecDeque::with_capacity(capacity),
            full_since: None,
        })
    }

    /// False if there is no room now.
    fn start(&mut self, io: Io, tag: u32) -> bool {
        match io {
            Io::Read { offset, length } => {
                if let Some(place) = self.offsets.get_mut(tag as usize) {
                    *place = offset;
                }
                self.volume.read(offset, length, tag).is_ok()
            }
            Io::Write { offset, length } => {
                let data = self.contents.of_write(offset, length, tag);
                self.volume.write(offset, data, false, tag).is_ok()
            }
            Io::Flush { .. } => {
                self.volume.flush(tag);
                true
            }
        }
    }

    fn start_held_back(&mut self) {
        while let Some((io, tag)) = self.held_back.pop_front() {
            if !self.start(io, tag) {
                self.held_back.push_front((io, tag));
                return;
            }
        }
    }
}

impl Lane for EngineLane {
    fn size_bytes(&self) -> u64 {
        self.volume.size_bytes()
    }

    fn submit(&mut self, io: Io, tag: u32) -> Result<()> {
        if !self.held_back.is_empty() || !self.start(io, tag) {
            self.full_since.get_or_insert_with(Instant::now);
            self.held_back.push_back((io, tag));
        }
        Ok(())
    }

    fn wait(&mut self, done: &mut Vec<u32>) -> Result<()> {
        let mut failed = None;
        let mut differs = Ok(());
        let begun = Instant::now();
        loop {
            let mut answered = 0;
            self.volume.wait(PATIENCE, |answer| {
                answered += 1;
                done.push(answer.tag);
                if let Err(failure) = answer.result {
                    failed.get_or_insert(failure);
                }
                if self.contents.verifies() && differs.is_ok() {
                    let offset = self.offsets.get(answer.tag as usize).copied();
                    differs = self.contents.check(offset.unwrap_or(0), answer.data());
                }
            })?;
            differs?;
            differs = Ok(());
            if let Some(failure) = failed {
                return Err(anyhow!("the engine failed a request: {failure:?}"));
            }
            self.start_held_back();
            if answered > 0 {
                return Ok(());
            }
            ensure!(
                begun.elapsed() < PATIENCE,
                "no request was completed within {PATIENCE:?}"
            );
        }
    }

    fn full_since(&self) -> Option<Instant> {
        self.full_since
    }

    fn finish(&mut self) -> Result<Option<Duration>> {
        let begun = Instant::now();
        let clean = self.volume.drain(PATIENCE)?;
        ensure!(clean, "the volume was not written back within {PATIENCE:?}");
        Ok(Some(begun.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drive;
    use crate::job::JobFile;
    use crate::target::{Target, TargetSpec};

    #[test]
    fn more_than_the_overlay_holds_is_written_and_read_back_in_process() {
        let spec = EngineSpec {
            folder: crate::test_folder(),
            size_mib: 64,
            overlay_mib: 8,
            log_mib: 32,
            write_delay_ms: 0,
        };
        std::fs::create_dir_all(&spec.folder).expect("a folder");
        let target = Target::open(&TargetSpec::Engine(spec)).expect("a volume");
        let run = |text: &str| {
            let jobs = JobFile::parse(text).expect("a job").jobs;
            let mut outcomes = drive::run(&jobs, &target, None).expect("no error");
            outcomes.remove(0).stats.remove(0)
        };
        let written = run("[a]\nrw=write\nbs=64k\niodepth=8\n");
        assert_eq!(written.write.bytes, 64 << 20);
        let group =
            run("[a]\nrw=randwrite\nbs=4k\nsize=64k\nnumjobs=8\nfsync=1\ngroup_reporting\n");
        assert_eq!(group.write.count(), 8 * 16);
        assert_eq!(group.sync.count(), 8 * 15);
        let read = run("[a]\nrw=read\nbs=64k\niodepth=8\n");
        assert_eq!(read.read.count(), 1024);
    }
}
