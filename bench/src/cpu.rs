//! CPU time: of the calling thread, and of another process.

use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};

/// CPU time that was used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cpu {
    /// In the program, and in the kernel on its behalf.
    pub total: Duration,
    /// The part in the kernel. Some kernels know it only in ticks of their clock: over less than a
    /// few ticks it is a guess, between nothing and all.
    pub system: Duration,
}

impl Cpu {
    /// The part in the program.
    #[must_use]
    pub fn user(self) -> Duration {
        self.total.saturating_sub(self.system)
    }

    /// What was used since an earlier look.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        let total = self.total.saturating_sub(earlier.total);
        let system = self.system.saturating_sub(earlier.system);
        Self {
            total,
            system: system.min(total),
        }
    }

    /// The sum of two.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            total: self.total + other.total,
            system: self.system + other.system,
        }
    }

    /// Of the calling thread, with the resolution of the scheduler. Workers that the kernel starts
    /// for a ring are not in it.
    #[must_use]
    pub fn of_this_thread() -> Self {
        let usage = getrusage(UsageWho::RUSAGE_THREAD).ok();
        let micros = |time: TimeVal| {
            Duration::from_micros(u64::try_from(time.num_microseconds()).unwrap_or_default())
        };
        let user = usage.map_or(Duration::ZERO, |usage| micros(usage.user_time()));
        let system = usage.map_or(Duration::ZERO, |usage| micros(usage.system_time()));
        // The two of getrusage count in ticks on some machines, this clock never does.
        let clock = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
        let total = clock.map_or(user + system, Duration::from);
        Self { total, system }
    }

    /// Of all threads of a process, with the resolution of the kernel's clock tick. `None` if it
    /// is gone.
    #[must_use]
    pub fn of_process(pid: u32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let ticks = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok()?;
        parse_stat(&text, ticks)
    }
}

/// Fields 14 and 15. The name in field 2 may hold anything, also spaces and brackets.
fn parse_stat(text: &str, ticks_per_second: u64) -> Option<Cpu> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut next = || {
        let ticks: u64 = fields.next()?.parse().ok()?;
        let micros = ticks
            .checked_mul(1_000_000)?
            .checked_div(ticks_per_second)?;
        Some(Duration::from_micros(micros))
    };
    let (user, system) = (next()?, next()?);
    Some(Cpu {
        total: user + system,
        system,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_times_of_a_process_are_found_behind_a_hostile_name() {
        let text = "7 (a) (b 1 2 ) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 9 9 20 0 1 0 5";
        let cpu = parse_stat(text, 100).expect("times");
        assert_eq!(cpu.user(), Duration::from_millis(2500));
        assert_eq!(cpu.system, Duration::from_millis(500));
        assert_eq!(parse_stat("7 (a) S 1", 100), None);
        assert_eq!(parse_stat("", 100), None);
    }

    #[test]
    fn work_of_this_thread_is_seen_even_if_it_is_shorter_than_a_tick() {
        let begun = Instant::now();
        let before = Cpu::of_this_thread();
        let mut value = 1_u64;
        while begun.elapsed() < Duration::from_micros(200) {
            value = std::hint::black_box(value.wrapping_mul(3));
        }
        let used = Cpu::of_this_thread().since(before);
        assert!(used.total > Duration::ZERO, "{used:?}");
        assert!(used.total <= begun.elapsed(), "{used:?}");
        assert!(used.user() + used.system == used.total, "{used:?}");
        assert!(Cpu::of_process(std::process::id()).is_some());
        assert_eq!(Cpu::of_process(u32::MAX), None);
    }

    #[test]
    fn a_tick_that_is_longer_than_the_time_it_falls_into_is_cut() {
        let at = |total, system| Cpu {
            total: Duration::from_micros(total),
            system: Duration::from_micros(system),
        };
        let used = at(5300, 10_000).since(at(5000, 0));
        assert_eq!(used, at(300, 300));
        assert_eq!(used.user(), Duration::ZERO);
        assert_eq!(at(5300, 10_000).since(at(5000, 10_000)), at(300, 0));
    }
}
