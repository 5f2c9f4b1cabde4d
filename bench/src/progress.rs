//! What a run is doing, while it runs: counters that all threads share, and a line on the terminal.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, PoisonError};
use std::time::{Duration, Instant};

use crate::target::Io;

/// Between two lines.
const INTERVAL: Duration = Duration::from_secs(1);

/// Counters of a run, from its very start.
#[derive(Debug, Default)]
pub struct Progress {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    bytes: AtomicU64,
    over: Mutex<bool>,
    ended: Condvar,
}

impl Progress {
    /// Counts an answer.
    pub fn count(&self, io: Io) {
        let counter = match io {
            Io::Read { .. } => &self.reads,
            Io::Write { .. } => &self.writes,
            Io::Flush { .. } => &self.flushes,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.bytes
            .fetch_add(u64::from(io.length()), Ordering::Relaxed);
    }

    /// Ends [`Self::show`].
    pub fn end(&self) {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.ended.notify_all();
    }

    fn counts(&self) -> [u64; 4] {
        [&self.reads, &self.writes, &self.flushes, &self.bytes]
            .map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Shows a line on standard error once a second, if that is a terminal, until the run ends.
    pub fn show(&self) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let start = Instant::now();
        let mut before = self.counts();
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let waited = self.ended.wait_timeout(over, INTERVAL);
            over = waited.unwrap_or_else(PoisonError::into_inner).0;
            if *over {
                // The line makes room for the table.
                eprint!("\r\x1b[K");
                return;
            }
            let now = self.counts();
            eprint!("\r\x1b[K{}", line(start.elapsed(), before, now));
            // Only a sign of life.
            let _ = std::io::stderr().flush();
            before = now;
        }
    }
}

fn line(elapsed: Duration, before: [u64; 4], now: [u64; 4]) -> String {
    let [reads, writes, flushes, bytes] =
        [0, 1, 2, 3].map(|at: usize| now[at].saturating_sub(before[at]));
    let mib = bytes as f64 / 1_048_576.0 / INTERVAL.as_secs_f64();
    format!(
        "{:4.0} s  {reads} reads/s, {writes} writes/s, {flushes} flushes/s, {mib:.1} MiB/s",
        elapsed.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_what_came_since_the_line_before() {
        let progress = Progress::default();
        let before = progress.counts();
        progress.count(Io::Read {
            offset: 0,
            length: 1 << 20,
        });
        progress.count(Io::Flush { data_only: true });
        let text = line(Duration::from_secs(3), before, progress.counts());
        assert_eq!(
            text,
            "   3 s  1 reads/s, 0 writes/s, 1 flushes/s, 1.0 MiB/s"
        );
    }
}
