//! How long to wait before the next attempt. Pure: randomness comes in as a seed.

use std::time::Duration;

/// Exponential backoff with jitter: each wait is drawn from the upper half of a span that doubles,
/// so that peers that lost each other at once do not come back at once.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    span: Duration,
    random: SplitMix64,
}

impl Backoff {
    /// Spans from `first` to `longest`.
    #[must_use]
    pub fn new(first: Duration, longest: Duration, seed: u64) -> Self {
        Self {
            first,
            longest,
            span: first,
            random: SplitMix64(seed),
        }
    }

    /// The next wait.
    pub fn next_wait(&mut self) -> Duration {
        let wait = self.jittered(self.span);
        self.span = self.span.saturating_mul(2).min(self.longest);
        wait
    }

    /// A wait of the longest span, for what will hardly change by itself.
    pub fn longest_wait(&mut self) -> Duration {
        self.span = self.longest;
        self.jittered(self.span)
    }

    /// The last attempt went well.
    pub fn reset(&mut self) {
        self.span = self.first;
    }

    fn jittered(&mut self, span: Duration) -> Duration {
        let half = span / 2;
        let nanos = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX);
        half + Duration::from_nanos(self.random.next() % nanos.saturating_add(1).max(1))
    }
}

/// A small generator of random numbers, fit for jitter and for nothing that must be secret.
#[derive(Clone, Debug)]
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_again_after_success() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut backoff = Backoff::new(first, longest, 7);
        for span in [100, 200, 400, 800, 1000, 1000].map(Duration::from_millis) {
            let wait = backoff.next_wait();
            assert!(wait >= span / 2 && wait <= span, "{wait:?} of {span:?}");
        }
        backoff.reset();
        assert!(backoff.next_wait() <= first);
        assert!(backoff.longest_wait() >= longest / 2);
    }

    #[test]
    fn equal_seeds_wait_equally_and_others_do_not() {
        let waits = |seed| {
            let mut backoff =
                Backoff::new(Duration::from_millis(100), Duration::from_secs(10), seed);
            (0..8).map(|_| backoff.next_wait()).collect::<Vec<_>>()
        };
        assert_eq!(waits(1), waits(1));
        assert_ne!(waits(1), waits(2));
    }
}
