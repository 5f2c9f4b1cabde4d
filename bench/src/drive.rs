//! Keeps the queue of each thread full, and measures.
//!
//! **Invariants.** Latency runs from the moment a request is handed to the target until its
//! completion is seen. Nothing is counted during the ramp, nor after the end of the run, when the
//! queue runs empty. A request that fails ends the run: what is reported was measured without
//! errors.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::cpu::Cpu;
use crate::job::{Job, Size};
use crate::progress::Progress;
use crate::stats::Stats;
use crate::stream::{Stream, Wish};
use crate::target::{Io, Lane, Target};

/// A job and what was measured of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The job.
    pub job: Job,
    /// One for each thread, or one for all with `group_reporting`.
    pub stats: Vec<Stats>,
}

/// How much of a target a job uses, in bytes.
///
/// # Errors
/// If the target is too small for it.
pub fn region_bytes(job: &Job, target_bytes: u64) -> Result<u64> {
    let wanted = match job.size {
        Size::Bytes(bytes) => bytes,
        Size::Percent(part) => u64::try_from(u128::from(target_bytes) * u128::from(part) / 100)?,
    };
    let (block, align) = (job.block_bytes, u64::from(job.lengths.shortest()));
    ensure!(
        wanted.min(target_bytes) >= u64::from(block),
        "job [{}]: {target_bytes} bytes of target are less than one block",
        job.name
    );
    ensure!(
        !matches!(job.size, Size::Bytes(bytes) if bytes > target_bytes),
        "job [{}]: size={wanted} is more than the {target_bytes} bytes of the target",
        job.name
    );
    Ok(wanted.min(target_bytes) / align * align)
}

/// Runs all jobs at once, as fio does, each with its threads.
///
/// # Errors
/// If a target cannot be opened, or any request fails.
pub fn run(jobs: &[Job], target: &Target, server: Option<u32>) -> Result<Vec<Outcome>> {
    run_watched(jobs, target, server, &Progress::default())
}

/// As [`run`], with counters that others can look at meanwhile.
///
/// # Errors
/// As [`run`].
pub fn run_watched(
    jobs: &[Job],
    target: &Target,
    server: Option<u32>,
    progress: &Progress,
) -> Result<Vec<Outcome>> {
    let all: Vec<Share<'_>> = jobs.iter().flat_map(|job| shares(job, target)).collect();
    let start = Barrier::new(all.len());
    let mut results = Vec::new();
    std::thread::scope(|scope| {
        let mut handles = Vec::new();
        for (number, share) in all.iter().enumerate() {
            // One thread watches the server for all.
            let watch = Watch {
                server: server.filter(|_| number == 0),
                progress,
            };
            let start = &start;
            // Profilers tell threads apart by name.
            let thread = std::thread::Builder::new().name(format!("load {number}"));
            let handle = thread.spawn_scoped(scope, move || {
                let lane = target.lane(share.job, share.streams);
                // Also without a lane, or the others would wait for ever.
                start.wait();
                let mut lane = lane?;
                let mut stats = drive(lane.as_mut(), share, watch)?;
                stats.drain = lane.finish()?;
                Ok(stats)
            });
            handles.push(handle.expect("a thread can be started"));
        }
        for handle in handles {
            results.push(handle.join().unwrap_or_else(|_| Err(anyhow!("a panic"))));
        }
    });
    let mut results = results.into_iter();
    let mut outcomes = Vec::new();
    for job in jobs {
        let mut stats = Vec::new();
        for _ in shares(job, target) {
            let one = results.next().context("a result of each thread")?;
            stats.push(one.with_context(|| format!("job [{}]", job.name))?);
        }
        if job.group {
            let mut all = Stats::new()?;
            for one in &stats {
                all.add(one)?;
            }
            stats = vec![all];
        }
        let job = job.clone();
        outcomes.push(Outcome { job, stats });
    }
    Ok(outcomes)
}

/// What one thread does of a job.
struct Share<'a> {
    job: &'a Job,
    /// The first of the job's clones that it is, and how many.
    first: u32,
    streams: u32,
}

/// The threads of a job: one for each clone, or one for all where the target lives in one thread.
fn shares<'a>(job: &'a Job, target: &Target) -> Vec<Share<'a>> {
    let streams = match target {
        Target::Engine(_) => job.numjobs,
        Target::Raw(_) | Target::Nbd(_) | Target::Replicated(_) | Target::Baseline(_) => 1,
    };
    let first = (0..job.numjobs).step_by(streams.max(1) as usize);
    first
        .map(|first| Share {
            job,
            first,
            streams,
        })
        .collect()
}

/// Runs a job of one clone on a lane that the caller has opened, and may go on to use.
///
/// # Errors
/// If a request fails.
pub fn on_lane(lane: &mut dyn Lane, job: &Job) -> Result<Stats> {
    let share = Share {
        job,
        first: 0,
        streams: 1,
    };
    let progress = Progress::default();
    let watch = Watch {
        server: None,
        progress: &progress,
    };
    drive(lane, &share, watch)
}

/// Runs one thread of a job.
fn drive(lane: &mut dyn Lane, share: &Share<'_>, watch: Watch<'_>) -> Result<Stats> {
    let job = share.job;
    let region = region_bytes(job, lane.size_bytes())?;
    let start = Instant::now();
    let mut streams: Vec<Stream> = (0..share.streams)
        .map(|number| Stream::new(job, region, share.first + number, number * job.depth, start))
        .collect();
    let tags = job.depth * share.streams;
    let mut driver = Driver {
        job,
        stats: Stats::new()?,
        submitted: vec![None; tags as usize],
        start,
        ramp_over: None,
        last: Duration::ZERO,
        watch,
    };
    let mut written = Written::new(job, region);
    let mut in_flight = 0;
    let mut done = Vec::with_capacity(tags as usize);
    driver.look(start);
    loop {
        let mut wake: Option<Instant> = None;
        for stream in &mut streams {
            while driver.is_running() {
                let now = Instant::now();
                match stream.wish(now) {
                    Wish::Begin(io, tag) => {
                        driver.begin(tag, io, now);
                        written.note(io);
                        lane.submit(io, tag)?;
                        in_flight += 1;
                    }
                    Wish::NotBefore(at) => {
                        wake = Some(wake.map_or(at, |wake| wake.min(at)));
                        break;
                    }
                    Wish::Nothing => break,
                }
            }
        }
        if in_flight > 0 {
            lane.wait(&mut done)?;
        } else if let Some(at) = wake {
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
        } else {
            break;
        }
        let now = Instant::now();
        driver.look(now);
        in_flight -= done.len();
        let full = lane.full_since();
        for tag in done.drain(..) {
            driver.end(tag, now, full)?;
            let stream = streams.get_mut((tag / job.depth) as usize);
            stream.context("a tag of a stream")?.ended(tag);
        }
    }
    let mut stats = driver.finish()?;
    stats.verified_bytes = written.read_back(lane, job)?;
    Ok(stats)
}

/// What a job with `verify` has written, to be read back at its end.
struct Written {
    align: u64,
    blocks: Vec<bool>,
}

impl Written {
    fn new(job: &Job, region: u64) -> Self {
        let align = u64::from(job.lengths.shortest());
        let count = if job.verify {
            region.div_ceil(align)
        } else {
            0
        };
        Self {
            align,
            blocks: vec![false; usize::try_from(count).unwrap_or(0)],
        }
    }

    fn note(&mut self, io: Io) {
        if let Io::Write { offset, length } = io
            && !self.blocks.is_empty()
        {
            let end = (offset + u64::from(length)).div_ceil(self.align);
            for block in offset / self.align..end {
                let place = usize::try_from(block).ok();
                if let Some(place) = place.and_then(|at| self.blocks.get_mut(at)) {
                    *place = true;
                }
            }
        }
    }

    /// Reads all of it, one request after the other; the lane compares. Gives the bytes.
    fn read_back(&self, lane: &mut dyn Lane, job: &Job) -> Result<u64> {
        let most = usize::try_from(u64::from(job.block_bytes) / self.align)?;
        let mut done = Vec::new();
        let (mut at, mut bytes) = (0, 0);
        while let Some(rest) = self.blocks.get(at..).filter(|rest| !rest.is_empty()) {
            let run = rest.iter().take(most).take_while(|&&written| written);
            let count = run.count();
            if count > 0 {
                let length = u32::try_from(count as u64 * self.align)?;
                let offset = at as u64 * self.align;
                lane.submit(Io::Read { offset, length }, 0)?;
                while done.is_empty() {
                    lane.wait(&mut done)?;
                }
                done.clear();
                bytes += u64::from(length);
            }
            at += count.max(1);
        }
        Ok(bytes)
    }
}

/// Who is watched, and who watches.
#[derive(Clone, Copy)]
struct Watch<'a> {
    server: Option<u32>,
    progress: &'a Progress,
}

/// State of one thread.
struct Driver<'a> {
    job: &'a Job,
    stats: Stats,
    /// What each tag is busy with, and since when.
    submitted: Vec<Option<(Io, Instant)>>,
    start: Instant,
    /// When the ramp ended, and what had been used until then.
    ramp_over: Option<(Instant, Cpu, Option<Cpu>)>,
    /// The last completion that was counted, from the end of the ramp.
    last: Duration,
    watch: Watch<'a>,
}

impl Driver<'_> {
    /// Ends the ramp, and the run, when their time has come.
    fn look(&mut self, now: Instant) {
        if self.ramp_over.is_none() && now.duration_since(self.start) >= self.job.ramp {
            let server = self.watch.server.and_then(Cpu::of_process);
            self.ramp_over = Some((now, Cpu::of_this_thread(), server));
        }
        if let Some((since, client, server)) = self.ramp_over
            && self.stats.elapsed.is_zero()
            && self.runtime_is_over(now)
        {
            self.close(now.duration_since(since), client, server);
        }
    }

    fn runtime_is_over(&self, now: Instant) -> bool {
        let (Some(runtime), Some((since, ..))) = (self.job.runtime, self.ramp_over) else {
            return false;
        };
        !runtime.is_zero() && now.duration_since(since) >= runtime
    }

    fn close(&mut self, elapsed: Duration, client: Cpu, server: Option<Cpu>) {
        self.stats.elapsed = elapsed.max(Duration::from_nanos(1));
        self.stats.client = Cpu::of_this_thread().since(client);
        let now = self.watch.server.and_then(Cpu::of_process);
        self.stats.server = now.zip(server).map(|(now, then)| now.since(then));
    }

    fn is_running(&self) -> bool {
        self.stats.elapsed.is_zero()
    }

    fn begin(&mut self, tag: u32, io: Io, now: Instant) {
        if let Some(entry) = self.submitted.get_mut(tag as usize) {
            *entry = Some((io, now));
        }
    }

    fn end(&mut self, tag: u32, now: Instant, full: Option<Instant>) -> Result<()> {
        let entry = self
            .submitted
            .get_mut(tag as usize)
            .and_then(Option::take)
            .context("a completion of no request")?;
        self.watch.progress.count(entry.0);
        let Some((since, ..)) = self.ramp_over else {
            return Ok(());
        };
        if !self.stats.elapsed.is_zero() {
            return Ok(());
        }
        let (io, begun) = entry;
        let latency = now.duration_since(begun);
        self.last = now.duration_since(since);
        match io {
            Io::Read { length, .. } => self.stats.read.record(latency, length),
            Io::Write { length, .. } => self.stats.write.record(latency, length),
            Io::Flush { .. } => self.stats.sync.record(latency, 0),
        }
        if !matches!(io, Io::Flush { .. }) {
            self.stats.tick(self.last, latency);
            let full = full.map(|full| full.saturating_duration_since(since));
            self.stats.room.record(self.last, latency, full);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Stats> {
        let (_, client, server) = self.ramp_over.with_context(|| {
            let ramp = self.job.ramp;
            format!("all was done before the ramp_time of {ramp:?} was over: nothing is measured")
        })?;
        if self.stats.elapsed.is_zero() {
            self.close(self.last, client, server);
        }
        Ok(self.stats)
    }
}
