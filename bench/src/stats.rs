//! What a run has measured.

use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;

use crate::cpu::Cpu;

/// Longest latency that is told apart, in nanoseconds: longer ones count as this.
const LATENCY_NS_MAX: u64 = 120_000_000_000;
/// Longest run whose seconds are kept apart.
const SECONDS_MAX: usize = 24 * 3600;

/// Significant digits of the histogram of one second: each is kept, so they are small.
const SECOND_DIGITS: u8 = 2;

/// Requests of one kind.
#[derive(Clone, Debug)]
pub struct Side {
    /// Latency in nanoseconds, from submission to completion.
    pub latency: Histogram<u64>,
    /// Bytes moved.
    pub bytes: u64,
}

impl Side {
    fn new() -> Result<Self> {
        Ok(Self {
            latency: Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)?,
            bytes: 0,
        })
    }

    /// Requests.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.latency.len()
    }

    /// Adds a request.
    pub fn record(&mut self, latency: Duration, bytes: u32) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(LATENCY_NS_MAX);
        self.latency.saturating_record(nanos);
        self.bytes += u64::from(bytes);
    }
}

/// Reads and writes before and after the target had no room for the first time.
#[derive(Clone, Debug)]
pub struct Room {
    /// Latency in nanoseconds of those that were answered while it had room.
    pub before: Histogram<u64>,
    /// The same of those after.
    pub after: Histogram<u64>,
    /// When it had none, from the end of the ramp on.
    pub full: Option<Duration>,
}

impl Room {
    fn new() -> Result<Self> {
        Ok(Self {
            before: Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)?,
            after: Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)?,
            full: None,
        })
    }

    /// Takes a read or write that was answered at that time after the ramp.
    pub fn record(&mut self, at: Duration, latency: Duration, full: Option<Duration>) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(LATENCY_NS_MAX);
        self.full = full;
        match full {
            Some(full) if at >= full => self.after.saturating_record(nanos),
            _ => self.before.saturating_record(nanos),
        }
    }
}

/// What one thread has measured, or several together.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Reads.
    pub read: Side,
    /// Writes, without the flushes.
    pub write: Side,
    /// Flushes.
    pub sync: Side,
    /// Latency in nanoseconds of the reads and writes of each second, from the end of the ramp.
    pub seconds: Vec<Histogram<u64>>,
    /// The same before and after the target had no room.
    pub room: Room,
    /// From the end of the ramp to the end of the run; the longest one of several.
    pub elapsed: Duration,
    /// Of the threads that made the load.
    pub client: Cpu,
    /// Of the server, if it was watched.
    pub server: Option<Cpu>,
    /// How long the target then wrote back what was still in memory.
    pub drain: Option<Duration>,
    /// With `verify`: what was read back and found to be right.
    pub verified_bytes: u64,
}

impl Stats {
    /// Nothing measured.
    ///
    /// # Errors
    /// Never in practice: the bounds of the histograms are constants.
    pub fn new() -> Result<Self> {
        Ok(Self {
            read: Side::new()?,
            write: Side::new()?,
            sync: Side::new()?,
            seconds: Vec::new(),
            room: Room::new()?,
            elapsed: Duration::ZERO,
            client: Cpu::default(),
            server: None,
            drain: None,
            verified_bytes: 0,
        })
    }

    /// Reads and writes.
    #[must_use]
    pub fn ios(&self) -> u64 {
        self.read.count() + self.write.count()
    }

    /// Reads and writes per second.
    #[must_use]
    pub fn iops(&self) -> f64 {
        per_second(self.ios(), self.elapsed)
    }

    /// Bytes read and written per second.
    #[must_use]
    pub fn bytes_per_second(&self) -> f64 {
        per_second(self.read.bytes + self.write.bytes, self.elapsed)
    }

    /// CPU time of the load for each read or write, in microseconds.
    #[must_use]
    pub fn client_us_per_io(&self) -> Option<f64> {
        self.us_per_io(Some(self.client))
    }

    /// CPU time of the server for each read or write, in microseconds.
    #[must_use]
    pub fn server_us_per_io(&self) -> Option<f64> {
        self.us_per_io(self.server)
    }

    fn us_per_io(&self, cpu: Option<Cpu>) -> Option<f64> {
        let ios = self.ios();
        let micros = cpu?.total.as_secs_f64() * 1e6;
        (ios > 0).then(|| micros / ios as f64)
    }

    /// Takes a read or write into its second.
    pub fn tick(&mut self, since_ramp: Duration, latency: Duration) {
        let second = usize::try_from(since_ramp.as_secs()).unwrap_or(SECONDS_MAX);
        if second >= SECONDS_MAX || self.grow(second + 1).is_none() {
            return;
        }
        if let Some(histogram) = self.seconds.get_mut(second) {
            let nanos = u64::try_from(latency.as_nanos()).unwrap_or(LATENCY_NS_MAX);
            histogram.saturating_record(nanos);
        }
    }

    /// Makes room for so many seconds; nothing in the case that [`Self::new`] speaks of.
    fn grow(&mut self, seconds: usize) -> Option<()> {
        while self.seconds.len() < seconds {
            let empty = Histogram::new_with_bounds(1, LATENCY_NS_MAX, SECOND_DIGITS).ok()?;
            self.seconds.push(empty);
        }
        Some(())
    }

    /// Reads and writes in each second.
    pub fn per_second(&self) -> impl Iterator<Item = u64> {
        self.seconds.iter().map(Histogram::len)
    }

    /// Adds what another thread of the same run has measured.
    ///
    /// # Errors
    /// Never in practice: all histograms have the same bounds.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        for (mine, theirs) in [
            (&mut self.read, &other.read),
            (&mut self.write, &other.write),
            (&mut self.sync, &other.sync),
        ] {
            mine.latency.add(&theirs.latency)?;
            mine.bytes += theirs.bytes;
        }
        if self.grow(other.seconds.len()).is_some() {
            for (mine, theirs) in self.seconds.iter_mut().zip(&other.seconds) {
                mine.add(theirs)?;
            }
        }
        self.room.before.add(&other.room.before)?;
        self.room.after.add(&other.room.after)?;
        self.room.full = self.room.full.or(other.room.full);
        self.verified_bytes += other.verified_bytes;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.client = self.client.plus(other.client);
        self.server = self.server.or(other.server);
        self.drain = self.drain.max(other.drain);
        Ok(())
    }
}

/// A rate; 0 if no time has passed.
#[must_use]
pub fn per_second(count: u64, elapsed: Duration) -> f64 {
    let seconds = elapsed.as_secs_f64();
    if seconds > 0.0 {
        count as f64 / seconds
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_threads_measured_adds_up() {
        let mut one = Stats::new().expect("stats");
        one.read.record(Duration::from_micros(10), 4096);
        one.tick(Duration::from_millis(2500), Duration::from_micros(10));
        one.elapsed = Duration::from_secs(3);
        let mut two = Stats::new().expect("stats");
        two.write.record(Duration::from_micros(20), 4096);
        two.sync.record(Duration::from_secs(1 << 40), 0);
        two.tick(Duration::from_millis(10), Duration::from_micros(20));
        two.elapsed = Duration::from_secs(1);
        one.add(&two).expect("same bounds");
        assert_eq!((one.ios(), one.sync.count()), (2, 1));
        assert_eq!(one.per_second().collect::<Vec<_>>(), [1, 0, 1]);
        assert_eq!(one.elapsed, Duration::from_secs(3));
        assert!((one.iops() - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!(one.server_us_per_io(), None);
    }
}
