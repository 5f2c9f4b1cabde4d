//! Messages from one thread of a volume to another one: a bounded queue whose producer keeps what
//! does not fit.
//!
//! **Invariant:** what is held back is not forgotten. A producer that meets a full queue sleeps,
//! and whoever takes messages out wakes it ([`may_be_held_back`]). The consumer judges that after
//! it has taken them: judged before, a queue that fills up meanwhile would go unnoticed. Each side
//! puts a fence between what it does to the queue and its look at what the other one does, so at
//! least one of them sees the other.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use crate::ring::Waker;

/// Messages in a queue.
pub(super) const QUEUE: usize = 1024;

/// The producer's end. When it is dropped, the other side is woken and sees that it is abandoned.
pub(super) struct Mail<M> {
    queue: rtrb::Producer<M>,
    backlog: VecDeque<M>,
    wake: bool,
    /// The last field: it is dropped when the queue is.
    bell: Bell,
}

/// Wakes the other thread, also when this end is gone, for whatever reason.
struct Bell(Waker);

impl Drop for Bell {
    fn drop(&mut self) {
        self.0.wake();
    }
}

impl<M> Mail<M> {
    /// To the thread that this waker wakes.
    pub(super) fn new(queue: rtrb::Producer<M>, waker: Waker) -> Self {
        Self {
            queue,
            backlog: VecDeque::new(),
            wake: false,
            bell: Bell(waker),
        }
    }

    /// Goes with the next [`Self::flush`] for which there is room.
    pub(super) fn push(&mut self, message: M) {
        self.backlog.push_back(message);
    }

    /// Messages for which there was no room, and new ones.
    pub(super) fn waiting(&self) -> usize {
        self.backlog.len()
    }

    /// The other side is to look at its own queue.
    pub(super) fn wake(&mut self) {
        self.wake = true;
    }

    /// Hands over what fits.
    pub(super) fn flush(&mut self) {
        self.wake |= hand_over(&mut self.queue, &mut self.backlog);
        if std::mem::take(&mut self.wake) {
            self.bell.0.wake();
        }
    }
}

/// Hands over what fits. True if anything did.
pub(super) fn hand_over<M>(queue: &mut rtrb::Producer<M>, backlog: &mut VecDeque<M>) -> bool {
    let before = backlog.len();
    while let Some(message) = backlog.pop_front() {
        let pushed = queue.push(message).or_else(|full| {
            let rtrb::PushError::Full(message) = full;
            // See the module: a consumer that did not see all of it has made room.
            fence(Ordering::SeqCst);
            queue.push(message)
        });
        if let Err(rtrb::PushError::Full(message)) = pushed {
            backlog.push_front(message);
            break;
        }
    }
    backlog.len() < before
}

/// Whether the producer may have met a full queue, out of which so many messages were just taken:
/// then it is to be woken.
pub(super) fn may_be_held_back<M>(queue: &rtrb::Consumer<M>, taken: usize) -> bool {
    fence(Ordering::SeqCst);
    taken + queue.slots() >= queue.buffer().capacity()
}

/// Whether the producer is gone. What it sent before that can be taken then, and nothing comes
/// after it.
pub(super) fn is_abandoned<M>(queue: &rtrb::Consumer<M>) -> bool {
    let is_abandoned = queue.is_abandoned();
    fence(Ordering::Acquire);
    is_abandoned
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::arena::Arena;
    use crate::ring::{Ring, RingConfig};

    /// Far longer than a wake-up takes.
    const LIMIT: Duration = Duration::from_secs(20);

    fn sleeper() -> Ring {
        let config = RingConfig {
            operations: 1,
            ..RingConfig::default()
        };
        Ring::new(config, Arena::new(1).expect("a page")).expect("a ring")
    }

    #[test]
    fn a_queue_that_fills_up_while_it_is_emptied_was_full() {
        let (queue, mut from) = rtrb::RingBuffer::new(4);
        let mut mail = Mail::new(queue, sleeper().waker());
        (0..3).for_each(|number| mail.push(number));
        mail.flush();
        assert_eq!(from.pop(), Ok(0));
        assert!(!may_be_held_back(&from, 1), "there was room all the time");
        (3..6).for_each(|number| mail.push(number));
        mail.flush();
        assert_eq!(mail.waiting(), 1);
        // Whether all of it is taken in one turn or not.
        assert_eq!(from.pop(), Ok(1));
        assert!(may_be_held_back(&from, 1));
        (2..5).for_each(|number| assert_eq!(from.pop(), Ok(number)));
        assert!(may_be_held_back(&from, 4));
        mail.flush();
        assert_eq!((from.pop(), mail.waiting()), (Ok(5), 0));
        assert!(!may_be_held_back(&from, 1));
    }

    #[test]
    fn what_is_held_back_goes_on_without_another_message() {
        let (queue, mut from) = rtrb::RingBuffer::new(4);
        let mut ring = sleeper();
        let producer = ring.waker();
        let (tell, told) = std::sync::mpsc::channel();
        let consumer = std::thread::spawn(move || {
            let mut ring = sleeper();
            tell.send(ring.waker()).expect("the test listens");
            let mut expected = 0;
            while !(from.is_abandoned() && from.is_empty()) {
                ring.wait(1, None, &mut Vec::new()).expect("a ring");
                let mut taken = 0;
                while let Ok(number) = from.pop() {
                    assert_eq!(number, expected);
                    (expected, taken) = (expected + 1, taken + 1);
                    std::thread::yield_now();
                }
                if may_be_held_back(&from, taken) {
                    producer.wake();
                }
            }
            expected
        });
        let mut mail = Mail::new(queue, told.recv().expect("it runs"));
        let mut sent = 0_u32;
        for round in 0..20_000 {
            for _ in 0..round % 11 {
                mail.push(sent);
                mail.flush();
                sent += 1;
            }
            while mail.waiting() > 0 {
                let waited = ring.wait(1, Some(LIMIT), &mut Vec::new());
                let woken = waited.expect("a ring").woken;
                assert!(woken, "{sent} sent, and nobody looks");
                mail.flush();
            }
        }
        drop(mail);
        assert_eq!(consumer.join().expect("no panic"), sent);
    }
}
