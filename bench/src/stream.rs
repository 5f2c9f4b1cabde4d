//! One clone of a job: which request it would like to begin next, and from when on it may.
//!
//! **Invariants.** A request that may not begin yet is kept, not drawn anew: the pace changes when
//! requests come, never which. A rate is kept over time: what was late is caught up with, up to a
//! second of it.

use std::time::{Duration, Instant};

use crate::job::Job;
use crate::pattern::Pattern;
use crate::target::Io;

/// A rate that could not be kept for longer than this is not caught up with.
const CATCH_UP: Duration = Duration::from_secs(1);

/// What a clone of a job would like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// Begin this with that tag.
    Begin(Io, u32),
    /// Nothing before that time.
    NotBefore(Instant),
    /// Nothing before one of its requests is answered, or nothing any more.
    Nothing,
}

/// One clone of a job.
#[derive(Debug)]
pub struct Stream {
    pattern: Pattern,
    free: Vec<u32>,
    depth: usize,
    /// What a job that is not time-based has still to do.
    left_bytes: Option<u64>,
    /// Drawn, and not begun.
    held: Option<Io>,
    /// Time between two reads, and between two writes; nothing without a limit.
    interval: [Option<Duration>; 2],
    /// When the next read and the next write are due.
    due: [Instant; 2],
    think: Duration,
    think_blocks: u32,
    since_thought: u32,
    thinks_until: Option<Instant>,
}

impl Stream {
    /// The clone of a job with that number; its tags are `first_tag` and those after it.
    #[must_use]
    pub fn new(job: &Job, region: u64, number: u32, first_tag: u32, now: Instant) -> Self {
        let interval = |rate: u32| (rate > 0).then(|| Duration::from_secs(1) / rate);
        Self {
            pattern: Pattern::new(job, region, number),
            free: (first_tag..first_tag + job.depth).rev().collect(),
            depth: job.depth as usize,
            left_bytes: (!job.time_based).then_some(region),
            held: None,
            interval: job.rate_iops.map(interval),
            due: [now; 2],
            think: job.think,
            think_blocks: job.think_blocks,
            since_thought: 0,
            thinks_until: None,
        }
    }

    /// What it would like now. A request that it gives counts as begun.
    pub fn wish(&mut self, now: Instant) -> Wish {
        if self.left_bytes == Some(0) {
            return Wish::Nothing;
        }
        if let Some(until) = self.thinks_until {
            if now < until {
                return Wish::NotBefore(until);
            }
            self.thinks_until = None;
        }
        if !self.think.is_zero() && self.since_thought >= self.think_blocks {
            if self.free.len() < self.depth {
                return Wish::Nothing;
            }
            self.since_thought = 0;
            self.thinks_until = Some(now + self.think);
            return Wish::NotBefore(now + self.think);
        }
        let Some(&tag) = self.free.last() else {
            return Wish::Nothing;
        };
        let io = match self.held.take() {
            Some(io) => io,
            None => self.pattern.draw(),
        };
        if let Some(due) = self.due(io, now) {
            self.held = Some(io);
            return Wish::NotBefore(due);
        }
        self.free.pop();
        if !matches!(io, Io::Flush { .. }) {
            self.since_thought = self.since_thought.saturating_add(1);
            if let Some(left) = self.left_bytes.as_mut() {
                *left = left.saturating_sub(u64::from(io.length()));
            }
        }
        Wish::Begin(io, tag)
    }

    /// When the rate allows a request, if not now. If now, the next one's turn is noted.
    fn due(&mut self, io: Io, now: Instant) -> Option<Instant> {
        let side = match io {
            Io::Read { .. } => 0,
            Io::Write { .. } => 1,
            Io::Flush { .. } => return None,
        };
        let interval = self.interval[side]?;
        if now < self.due[side] {
            return Some(self.due[side]);
        }
        let oldest = now.checked_sub(CATCH_UP).unwrap_or(now);
        self.due[side] = (self.due[side] + interval).max(oldest);
        None
    }

    /// One of its requests was answered.
    pub fn ended(&mut self, tag: u32) {
        self.free.push(tag);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobFile;

    fn stream(text: &str, start: Instant) -> Stream {
        let file = JobFile::parse(&format!("[a]\n{text}")).expect("a job");
        Stream::new(&file.jobs[0], 1 << 20, 0, 0, start)
    }

    /// How many requests begin and end at once in so many milliseconds, one look a millisecond.
    fn begun(stream: &mut Stream, start: Instant, ms: u64) -> u64 {
        let mut count = 0;
        for at in 0..ms {
            let now = start + Duration::from_millis(at);
            while let Wish::Begin(_, tag) = stream.wish(now) {
                stream.ended(tag);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn a_rate_is_kept_and_a_short_delay_is_caught_up_with() {
        let start = Instant::now();
        let mut limited = stream("rw=randread\nrate_iops=100\ntime_based\nruntime=9\n", start);
        assert_eq!(begun(&mut limited, start, 500), 50);
        // Nothing was asked for half a second.
        let later = start + Duration::from_secs(1);
        assert_eq!(begun(&mut limited, later, 10), 51);
        let much_later = start + Duration::from_secs(60);
        assert!(begun(&mut limited, much_later, 1) <= 102);
    }

    #[test]
    fn a_job_thinks_when_its_requests_are_answered() {
        let start = Instant::now();
        let text = "rw=read\niodepth=4\nthinktime=10ms\nthinktime_blocks=2\n";
        let mut thinking = stream(text, start);
        let Wish::Begin(_, first) = thinking.wish(start) else {
            panic!("it may begin");
        };
        let Wish::Begin(_, second) = thinking.wish(start) else {
            panic!("two before it thinks");
        };
        assert_eq!(thinking.wish(start), Wish::Nothing);
        thinking.ended(first);
        assert_eq!(thinking.wish(start), Wish::Nothing);
        thinking.ended(second);
        let until = start + Duration::from_millis(10);
        assert_eq!(thinking.wish(start), Wish::NotBefore(until));
        assert!(matches!(thinking.wish(until), Wish::Begin(..)));
    }
}
