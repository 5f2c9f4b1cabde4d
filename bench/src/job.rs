//! Job files of fio: the subset that this program can carry out as fio would.
//!
//! **Invariant:** nothing is passed over in silence. A key that is not known, or known but not
//! carried out, is an error that names its line; a key that is accepted without effect leaves a
//! note. Sections named `global` hold defaults for the jobs after them.
//!
//! **Not here:** command-line options of fio, environment variables, `include`, and `stonewall`:
//! all jobs of a file run at once.

mod shape;
mod value;

use std::time::Duration;

use thiserror::Error;

pub use self::shape::{Distribution, Lengths, Portion, Zone};
use self::value::{bytes, duration, number, percentiles, switch};

/// fio's percentiles if a job names none, as it prints them.
pub const PERCENTILES: [f64; 17] = [
    1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95,
    99.99,
];
/// Deepest queue of one job.
pub const DEPTH_MAX: u32 = 1024;
/// Most threads of one job.
pub const NUMJOBS_MAX: u32 = 256;
/// Longest request in bytes.
pub const BLOCK_BYTES_MAX: u32 = 4 << 20;
/// Most memory for the buffers of one thread, in bytes.
const BUFFERS_BYTES_MAX: u64 = 1 << 30;
/// Requests are multiples of this, in bytes.
const BLOCK_BYTES_MIN: u32 = 512;

/// What is wrong with a job file.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum JobError {
    /// A key that nobody knows here.
    #[error("line {line}: {key:?} is not a key that hn4-bench knows; remove it, or use fio")]
    UnknownKey {
        /// From 1.
        line: usize,
        /// The key.
        key: String,
    },
    /// A key of fio that is not carried out.
    #[error("line {line}: {key:?} is not supported yet{why}")]
    NotSupported {
        /// From 1.
        line: usize,
        /// The key, with its value where that matters.
        key: String,
        /// More about it, or nothing.
        why: &'static str,
    },
    /// A value that cannot be read.
    #[error("line {line}: {key}={value:?} is wrong: it must be {must_be}")]
    BadValue {
        /// From 1.
        line: usize,
        /// The key.
        key: String,
        /// What was given.
        value: String,
        /// What would be right.
        must_be: &'static str,
    },
    /// Something that is neither a section nor a key.
    #[error("line {line}: a key stands before the first [section]")]
    OutsideSection {
        /// From 1.
        line: usize,
    },
    /// A section without its bracket, or without a name.
    #[error("line {line}: a section must be written as [name]")]
    BadSection {
        /// From 1.
        line: usize,
    },
    /// A job that contradicts itself.
    #[error("job [{job}] (line {line}): {what}")]
    Impossible {
        /// Name of the section.
        job: String,
        /// Where the section starts, from 1.
        line: usize,
        /// What does not fit.
        what: &'static str,
    },
    /// No job.
    #[error("the file has no job: it needs a [section] besides [global]")]
    Empty,
}

/// Which requests, in which order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Direction {
    /// Anywhere, instead of one after the other.
    pub random: bool,
    /// Reads take part.
    pub reads: bool,
    /// Writes take part.
    pub writes: bool,
}

/// How much of the target a job uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// So many bytes from its start.
    Bytes(u64),
    /// Such a part of it, 1 to 100.
    Percent(u8),
}

/// One job.
#[derive(Clone, PartialEq, Debug)]
pub struct Job {
    /// Name of its section.
    pub name: String,
    /// `rw`.
    pub direction: Direction,
    /// `bs` or `bssplit`: how long requests are.
    pub lengths: Lengths,
    /// The longest request in bytes.
    pub block_bytes: u32,
    /// `random_distribution`: where random requests go.
    pub distribution: Distribution,
    /// `rate_iops`: reads and writes per second of each thread; 0 is no limit.
    pub rate_iops: [u32; 2],
    /// `thinktime`: a pause after each `thinktime_blocks` requests, when they are answered.
    pub think: Duration,
    /// `thinktime_blocks`.
    pub think_blocks: u32,
    /// `verify`: what is written depends on its place only, and what is read is compared.
    pub verify: bool,
    /// `size`; all of the target if it is not given.
    pub size: Size,
    /// `iodepth`: requests in flight of each thread.
    pub depth: u32,
    /// `numjobs`: threads.
    pub numjobs: u32,
    /// `rwmixread`, in percent.
    pub read_percent: u8,
    /// `fsync` or `fdatasync`: a flush after so many writes; 0 for none.
    pub flush_every: u32,
    /// The flush may leave out what is not needed to read the data back.
    pub data_only: bool,
    /// `runtime`: not longer than this.
    pub runtime: Option<Duration>,
    /// `ramp_time`: nothing is counted before.
    pub ramp: Duration,
    /// `time_based`: start over until `runtime` has passed.
    pub time_based: bool,
    /// `randseed`.
    pub seed: u64,
    /// `group_reporting`: one report for all threads.
    pub group: bool,
    /// `percentile_list`, in percent, ascending.
    pub percentiles: Vec<f64>,
    /// The keys as they were given, for the report.
    pub options: Vec<(String, String)>,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            name: String::new(),
            direction: Direction {
                random: false,
                reads: true,
                writes: false,
            },
            lengths: Lengths::all(4096),
            block_bytes: 4096,
            distribution: Distribution::Even,
            rate_iops: [0; 2],
            think: Duration::ZERO,
            think_blocks: 1,
            verify: false,
            size: Size::Percent(100),
            depth: 1,
            numjobs: 1,
            read_percent: 50,
            flush_every: 0,
            data_only: false,
            runtime: None,
            ramp: Duration::ZERO,
            time_based: false,
            seed: 0x6A09_E667,
            group: false,
            percentiles: PERCENTILES.to_vec(),
            options: Vec::new(),
        }
    }
}

/// A job file.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct JobFile {
    /// In the order of the file.
    pub jobs: Vec<Job>,
    /// What the reader should know: keys without effect.
    pub notes: Vec<String>,
}

impl JobFile {
    /// Reads a job file.
    ///
    /// # Errors
    /// [`JobError`] names the line and what would be right.
    pub fn parse(text: &str) -> Result<Self, JobError> {
        let mut file = Self::default();
        let mut global = Job::default();
        let mut open: Option<(Job, usize)> = None;
        for (index, text) in text.lines().enumerate() {
            let line = index + 1;
            let text = text.trim();
            if text.is_empty() || text.starts_with([';', '#']) {
                continue;
            }
            if let Some(rest) = text.strip_prefix('[') {
                let name = rest.strip_suffix(']').map(str::trim);
                let name = name.filter(|name| !name.is_empty());
                let name = name.ok_or(JobError::BadSection { line })?;
                file.close(open.take(), &mut global)?;
                let mut job = global.clone();
                job.name = name.to_owned();
                open = Some((job, line));
                continue;
            }
            let (job, _) = open.as_mut().ok_or(JobError::OutsideSection { line })?;
            let (key, value) = match text.split_once('=') {
                Some((key, value)) => (key.trim(), Some(value.trim())),
                None => (text, None),
            };
            let entry = Entry { line, key, value };
            if let Some(note) = entry.apply(job)? {
                file.notes.push(format!("line {line}: {note}"));
            }
            let value = value.unwrap_or("1").to_owned();
            job.options.push((key.to_owned(), value));
        }
        file.close(open, &mut global)?;
        if file.jobs.is_empty() {
            return Err(JobError::Empty);
        }
        Ok(file)
    }

    fn close(&mut self, open: Option<(Job, usize)>, global: &mut Job) -> Result<(), JobError> {
        let Some((job, line)) = open else {
            return Ok(());
        };
        if job.name == "global" {
            *global = job;
            return Ok(());
        }
        job.check(line)?;
        self.jobs.push(job);
        Ok(())
    }
}

impl Job {
    fn set_lengths(&mut self, lengths: Lengths) {
        self.block_bytes = lengths.longest();
        self.lengths = lengths;
    }

    fn check(&self, line: usize) -> Result<(), JobError> {
        let buffers = u64::from(self.depth) * u64::from(self.block_bytes);
        let what = if self.time_based && self.runtime.is_none_or(|time| time.is_zero()) {
            "time_based needs a runtime"
        } else if buffers > BUFFERS_BYTES_MAX {
            "iodepth times bs is more than 1 GiB"
        } else if matches!(self.size, Size::Bytes(bytes) if bytes < u64::from(self.block_bytes)) {
            "size is less than bs"
        } else {
            return Ok(());
        };
        Err(JobError::Impossible {
            job: self.name.clone(),
            line,
            what,
        })
    }
}

/// A line with a key.
#[derive(Clone, Copy)]
struct Entry<'a> {
    line: usize,
    key: &'a str,
    value: Option<&'a str>,
}

impl Entry<'_> {
    fn bad(&self, must_be: &'static str) -> JobError {
        JobError::BadValue {
            line: self.line,
            key: self.key.to_owned(),
            value: self.value.unwrap_or_default().to_owned(),
            must_be,
        }
    }

    fn get<T>(
        &self,
        read: impl FnOnce(&str) -> Option<T>,
        must_be: &'static str,
    ) -> Result<T, JobError> {
        self.value.and_then(read).ok_or_else(|| self.bad(must_be))
    }

    fn switch(&self) -> Result<bool, JobError> {
        match self.value {
            None => Ok(true),
            Some(text) => switch(text).ok_or_else(|| self.bad("0 or 1")),
        }
    }

    fn not_supported(&self, why: &'static str) -> JobError {
        let value = self.value.map(|value| format!("={value}"));
        JobError::NotSupported {
            line: self.line,
            key: format!("{}{}", self.key, value.unwrap_or_default()),
            why,
        }
    }

    /// Takes the key over into the job; gives a note if it has no effect.
    fn apply(&self, job: &mut Job) -> Result<Option<&'static str>, JobError> {
        match self.key {
            "rw" | "readwrite" => job.direction = self.direction()?,
            "bs" | "blocksize" => job.set_lengths(self.get(shape::lengths, shape::LENGTHS)?),
            "bssplit" => job.set_lengths(self.get(shape::split, shape::SPLIT)?),
            "random_distribution" => job.distribution = self.distribution()?,
            "rate_iops" => job.rate_iops = self.get(shape::rates, "1 or 2 numbers, as 1000,500")?,
            "thinktime" => job.think = self.get(shape::think, shape::THINK)?,
            "thinktime_blocks" => {
                job.think_blocks = self.get(|text| number(text, 1, u32::MAX), "a number")?;
            }
            "verify" => {
                job.verify = self.verify()?;
                return Ok(Some(
                    "all data is compared, whatever the checksum is called",
                ));
            }
            "size" => job.size = self.size()?,
            "iodepth" => {
                job.depth = self.get(|text| number(text, 1, DEPTH_MAX), "1 to 1024")?;
            }
            "numjobs" => {
                job.numjobs = self.get(|text| number(text, 1, NUMJOBS_MAX), "1 to 256")?;
            }
            "rwmixread" => job.read_percent = self.get(|text| number(text, 0, 100), "0 to 100")?,
            "fsync" | "fdatasync" => {
                job.flush_every = self.get(|text| number(text, 0, u32::MAX), "a number")?;
                job.data_only = self.key == "fdatasync";
            }
            "runtime" => job.runtime = Some(self.get(duration, value::DURATION)?),
            "ramp_time" => job.ramp = self.get(duration, value::DURATION)?,
            "time_based" => job.time_based = self.switch()?,
            "randseed" => job.seed = self.get(|text| number(text, 0, u64::MAX), "a number")?,
            "group_reporting" => job.group = self.switch()?,
            "percentile_list" => {
                job.percentiles = self.get(percentiles, "1 to 20 numbers, as 50:99:99.9")?;
            }
            "direct" if self.switch()? => {}
            "direct" => return Err(self.not_supported(": a raw target always bypasses the cache")),
            "norandommap" if self.switch()? => {}
            "norandommap" => return Ok(Some("blocks are drawn with repetition all the same")),
            "ioengine" => return Ok(Some("ioengine is ignored: the target decides")),
            "filename" => return Ok(Some("filename is ignored: --target decides")),
            "stonewall" | "offset" | "rate" => return Err(self.not_supported("")),
            key => {
                return Err(JobError::UnknownKey {
                    line: self.line,
                    key: key.to_owned(),
                });
            }
        }
        Ok(None)
    }

    fn direction(&self) -> Result<Direction, JobError> {
        let read = |text: &str| {
            let (random, reads, writes) = match text {
                "read" => (false, true, false),
                "write" => (false, false, true),
                "rw" | "readwrite" => (false, true, true),
                "randread" => (true, true, false),
                "randwrite" => (true, false, true),
                "randrw" => (true, true, true),
                _ => return None,
            };
            Some(Direction {
                random,
                reads,
                writes,
            })
        };
        self.get(
            read,
            "read, write, randread, randwrite, rw, readwrite or randrw",
        )
    }

    fn distribution(&self) -> Result<Distribution, JobError> {
        let name = self.value.unwrap_or_default();
        if name.starts_with("pareto") || name.starts_with("normal") || name.starts_with("zoned_abs")
        {
            return Err(self.not_supported(": random, zipf and zoned are"));
        }
        self.get(shape::distribution, shape::DISTRIBUTION)
    }

    fn verify(&self) -> Result<bool, JobError> {
        let read = |text: &str| match text {
            "0" => Some(false),
            text => shape::CHECKSUMS.contains(&text).then_some(true),
        };
        self.get(read, "0 or one of fio's checksums")
    }

    fn size(&self) -> Result<Size, JobError> {
        let read = |text: &str| match text.strip_suffix('%') {
            Some(part) => number(part, 1, 100).map(Size::Percent),
            None => bytes(text).filter(|&size| size > 0).map(Size::Bytes),
        };
        self.get(
            read,
            "a size in bytes, with k, m, g or t, or a part as in 50%",
        )
    }
}

#[cfg(test)]
mod tests;
