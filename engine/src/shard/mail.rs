//! Messages from one thread of a volume to another one: a bounded queue whose producer keeps what
//! does not fit.

use std::collections::VecDeque;

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
        while let Some(message) = self.backlog.pop_front() {
            if let Err(rtrb::PushError::Full(message)) = self.queue.push(message) {
                self.backlog.push_front(message);
                break;
            }
            self.wake = true;
        }
        if std::mem::take(&mut self.wake) {
            self.bell.0.wake();
        }
    }
}
