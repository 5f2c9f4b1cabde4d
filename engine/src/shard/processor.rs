//! The processor that a thread is to stay on.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// One processor, and what there is in its place if it is not there, or not allowed. That only
/// costs speed, as long as threads do not all end up on one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Processor {
    number: usize,
    /// Those that the daemon was started on.
    otherwise: Option<CpuSet>,
}

impl Processor {
    /// To be called before the calling thread stays on one: threads inherit that.
    pub(super) fn new(number: usize) -> Self {
        Self {
            number,
            otherwise: sched_getaffinity(Pid::from_raw(0)).ok(),
        }
    }

    /// So many processors further.
    pub(super) fn plus(self, count: usize) -> Self {
        Self {
            number: self.number + count,
            ..self
        }
    }

    /// The calling thread stays here from now on.
    pub(super) fn enter(&self) {
        let mut set = CpuSet::new();
        let here = Pid::from_raw(0);
        let entered = set.set(self.number);
        let entered = entered.and_then(|()| sched_setaffinity(here, &set));
        if entered.is_err()
            && let Some(otherwise) = self.otherwise
        {
            let _ = sched_setaffinity(here, &otherwise);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> CpuSet {
        sched_getaffinity(Pid::from_raw(0)).expect("the kernel tells")
    }

    #[test]
    fn a_thread_whose_processor_is_not_there_does_not_stay_where_its_parent_is() {
        let thread = std::thread::spawn(|| {
            let before = allowed();
            let is_set = |number: &usize| before.is_set(*number).unwrap_or(false);
            let first = (0..CpuSet::count()).find(is_set).expect("one at least");
            let processor = Processor::new(first);
            processor.enter();
            let mut one = CpuSet::new();
            one.set(first).expect("it is one");
            assert_eq!(allowed(), one);
            // What the kernel has not, and what it cannot even be asked for.
            for number in [CpuSet::count() - 1, CpuSet::count()] {
                processor.enter();
                processor.plus(number - first).enter();
                assert_eq!(allowed(), before);
            }
        });
        thread.join().expect("no panic");
    }
}
