//! Waking a ring that sleeps in the kernel, from any thread.
//!
//! The ring keeps a read of an eventfd in flight. A producer first publishes its message in a queue
//! and then calls [`Waker::wake`]; the consumer leaves [`Ring::wait`](super::Ring::wait) with
//! `woken` set and drains its queues. A wake-up that meets a running shard costs one atomic
//! operation and no system call, so a busy pair of shards never pays for the eventfd.
//!
//! **Invariant:** a message that was published before `wake` is never slept through. The state is
//! set to notified before the producer looks whether anyone sleeps, and to sleeping before the
//! consumer blocks; both by atomic exchange, so one of the two sees the other.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

const RUNNING: u8 = 0;
const SLEEPING: u8 = 1;
const NOTIFIED: u8 = 2;

struct Shared {
    event: EventFd,
    state: AtomicU8,
}

/// Wakes one ring. Cheap to clone, usable from any thread, harmless after the ring is gone.
#[derive(Clone)]
pub struct Waker {
    shared: Arc<Shared>,
}

impl Waker {
    /// Makes the ring's current or next [`Ring::wait`](super::Ring::wait) return with `woken` set.
    /// Calls that come before it returned are folded into one.
    pub fn wake(&self) {
        if self.shared.state.swap(NOTIFIED, Ordering::AcqRel) == SLEEPING {
            // Fails only if the counter were at its maximum, and then the ring is being woken.
            let _ = self.shared.event.write(1);
        }
    }
}

/// The ring's side of its wakers.
pub(super) struct Sleeper {
    shared: Arc<Shared>,
}

impl Sleeper {
    pub(super) fn new() -> nix::Result<Self> {
        // Blocking on purpose: io_uring answers EAGAIN at once for a descriptor that is not.
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
        Ok(Self {
            shared: Arc::new(Shared {
                event,
                state: AtomicU8::new(RUNNING),
            }),
        })
    }

    pub(super) fn waker(&self) -> Waker {
        Waker {
            shared: Arc::clone(&self.shared),
        }
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        let fd: BorrowedFd<'_> = self.shared.event.as_fd();
        fd.as_raw_fd()
    }

    /// Announces that the ring is about to block. False: somebody called `wake`, do not block.
    pub(super) fn fall_asleep(&self) -> bool {
        self.shared
            .state
            .compare_exchange(RUNNING, SLEEPING, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Back to running. True: somebody called `wake` since the last call.
    pub(super) fn wake_up(&self) -> bool {
        // A plain look first: the exchange is needed only if there is something to take.
        self.shared.state.load(Ordering::Acquire) != RUNNING
            && self.shared.state.swap(RUNNING, Ordering::AcqRel) == NOTIFIED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_before_sleep_keeps_the_ring_awake() {
        let sleeper = Sleeper::new().expect("an eventfd can be made");
        let waker = sleeper.waker();
        assert!(!sleeper.wake_up());
        waker.wake();
        waker.wake();
        assert!(!sleeper.fall_asleep());
        assert!(sleeper.wake_up());
        assert!(!sleeper.wake_up());
        assert!(sleeper.fall_asleep());
    }
}
