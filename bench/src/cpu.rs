//! CPU time: of the calling thread, and of another process.

use std::time::Duration;

use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::{SysconfVar, sysconf};

/// CPU time that was used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cpu {
    /// In the program.
    pub user: Duration,
    /// In the kernel on its behalf.
    pub system: Duration,
}

impl Cpu {
    /// Both.
    #[must_use]
    pub fn total(self) -> Duration {
        self.user + self.system
    }

    /// What was used since an earlier look.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            user: self.user.saturating_sub(earlier.user),
            system: self.system.saturating_sub(earlier.system),
        }
    }

    /// The sum of two.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            user: self.user + other.user,
            system: self.system + other.system,
        }
    }

    /// Of the calling thread. Workers that the kernel starts for a ring are not in it.
    #[must_use]
    pub fn of_this_thread() -> Self {
        getrusage(UsageWho::RUSAGE_THREAD).map_or_else(|_| Self::default(), |usage| of(&usage))
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

fn of(usage: &Usage) -> Cpu {
    let micros = |count: i64| Duration::from_micros(u64::try_from(count).unwrap_or_default());
    Cpu {
        user: micros(usage.user_time().num_microseconds()),
        system: micros(usage.system_time().num_microseconds()),
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
    Some(Cpu { user, system })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_a_process_are_found_behind_a_hostile_name() {
        let text = "7 (a) (b 1 2 ) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 9 9 20 0 1 0 5";
        let cpu = parse_stat(text, 100).expect("times");
        assert_eq!(cpu.user, Duration::from_millis(2500));
        assert_eq!(cpu.system, Duration::from_millis(500));
        assert_eq!(parse_stat("7 (a) S 1", 100), None);
        assert_eq!(parse_stat("", 100), None);
    }

    #[test]
    fn work_of_this_thread_is_seen() {
        let before = Cpu::of_this_thread();
        let mut value = 1_u64;
        while Cpu::of_this_thread().since(before).total() < Duration::from_millis(5) {
            value = std::hint::black_box(value.wrapping_mul(3));
        }
        assert!(Cpu::of_process(std::process::id()).is_some());
        assert_eq!(Cpu::of_process(u32::MAX), None);
    }
}
