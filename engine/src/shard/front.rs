//! A thread that serves clients and has no volume: it asks the one that has.
//!
//! What a client costs is mostly its socket and the protocol, and both are done here: payload is
//! received into slots of the overlay, data is sent from them, and what goes between the threads is
//! the request, the names of its slots, and the answer. The core is one, so nothing that holds for
//! one thread ceases to hold: a flush covers what was answered on any connection before it.
//!
//! **Slots.** Both threads see the same memory (`arena::Lent`). A front keeps a few slots for
//! writes and for reads, so that a request need not wait for them, and asks for more when it has
//! few; the other side gives what the volume has room for, so writers are held back (P8) as if they
//! were served there. What it has too many of goes back, and all when the last client has left.
//!
//! **Bounds.** Requests that are on their way are bounded by the connections, as everywhere. What
//! does not fit into the queue waits here, and writers wait with it.
//!
//! Not here: who is served where, and what the owner of the volume does (`fronts`); readers of a
//! replica, whose pins are the owner's affair.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::client::{Asked, StatusAsked};
use super::clients::Clients;
use super::host::Host;
use super::mail::{Mail, QUEUE};
use super::open::pin_to;
use crate::arena::{Arena, Lent, SlotId, SlotMemory};
use crate::core::event::{Failure, Request};
use crate::nbd::export::ExportList;
use crate::nbd::reply::Extent;
use crate::ring::{Completion, Ring, RingConfig, RingError, Seg, Waker};

/// Most slots that a front keeps for writes, and for reads: 1 MiB each.
const KEPT: usize = 256;
/// And of the overlay at most this part each, all fronts together.
const KEPT_PART: usize = 32;

/// What the slots are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Use {
    Write,
    Read,
}

/// To the thread that has the volume.
#[derive(Debug)]
pub(super) enum ToOwner {
    /// Answered by [`ToFront::Answer`]. The request's slots are in `lent`.
    Request {
        id: u32,
        request: Request,
        lent: Lent,
    },
    /// Answered by [`ToFront::Slots`] when there is room for `least`, with `most` if there is for
    /// that. A later question takes the place of one that waits.
    Want {
        what: Use,
        least: usize,
        most: usize,
    },
    /// Answered by [`ToFront::Extents`].
    Extents(StatusAsked),
    /// Slots that are not needed.
    Return(Lent),
    /// A client has left.
    Left,
}

/// From the thread that has the volume.
#[derive(Debug)]
pub(super) enum ToFront {
    /// Serve this client.
    Client(OwnedFd, Arc<ExportList>),
    /// The slots of a read come back.
    Answer {
        id: u32,
        result: Result<(), Failure>,
        lent: Lent,
    },
    /// What a part of the volume holds.
    Extents(StatusAsked, Vec<Extent>),
    /// They are for this.
    Slots(Use, Lent),
    /// Whether the volume takes writes.
    Accepts(Result<(), Failure>),
}

/// A request of a front at the thread that has the volume.
#[derive(Debug)]
pub(super) struct Relayed {
    pub(super) front: usize,
    pub(super) id: u32,
    /// A read's.
    pub(super) slots: Vec<SlotId>,
    pub(super) read_bytes: u64,
}

/// The slots that a request names.
pub(super) fn slots_of(request: &mut Request) -> Option<&mut Vec<SlotId>> {
    match request {
        Request::Read { slots, .. } | Request::Write { slots, .. } => Some(slots),
        Request::Zero { edges, .. } => Some(edges),
        Request::Flush => None,
    }
}

/// Slots that are kept for one use.
#[derive(Default)]
struct Pool {
    free: usize,
    /// A client waits for so many.
    needed: usize,
    /// What was asked for and has not come: the least and the most.
    asked: Option<(usize, usize)>,
}

impl Pool {
    fn take(&mut self, count: usize, arena: &mut Arena) -> Option<Vec<SlotId>> {
        if self.free < count {
            self.needed = self.needed.max(count);
            return None;
        }
        self.free -= count;
        let slots = (0..count).map(|_| arena.alloc()).collect::<Option<_>>();
        Some(slots.expect("the pools are what is free"))
    }

    /// What to ask for now.
    fn question(&mut self, kept: usize) -> Option<(usize, usize)> {
        let needed = std::mem::take(&mut self.needed);
        if needed <= self.free && self.free * 2 >= kept {
            return None;
        }
        let least = needed.saturating_sub(self.free).max(1);
        let most = kept.saturating_sub(self.free).max(least);
        // One that asks for less is not to take the place of another one.
        if self.asked.is_some_and(|(asked, _)| asked >= least) {
            return None;
        }
        self.asked = Some((least, most));
        self.asked
    }
}

/// What clients of this thread need of it.
struct Desk {
    ring: Ring,
    segs: Vec<Seg>,
    to_owner: Mail<ToOwner>,
    accepts: Result<(), Failure>,
    writes: Pool,
    reads: Pool,
    /// Slots that each pool is to have.
    kept: usize,
    asked: Vec<Option<Asked>>,
    free: Vec<u32>,
}

/// See the module.
pub(super) struct Front {
    desk: Desk,
    inbox: rtrb::Consumer<ToFront>,
    clients: Clients,
}

/// The ends of the queues of a front, its memory, and where it runs.
pub(super) struct FrontSetup {
    pub(super) inbox: rtrb::Consumer<ToFront>,
    pub(super) queue: rtrb::Producer<ToOwner>,
    pub(super) waker: Waker,
    pub(super) arena: Arena,
    /// How many fronts there are.
    pub(super) fronts: usize,
    pub(super) cpu: Option<usize>,
}

impl Front {
    /// Opens its ring, on the calling thread.
    pub(super) fn open(setup: FrontSetup) -> Result<Self, RingError> {
        if let Some(cpu) = setup.cpu {
            pin_to(cpu);
        }
        let kept = KEPT.min(setup.arena.capacity() / KEPT_PART / setup.fronts.max(1));
        let config = RingConfig {
            operations: 1024,
            // Sockets do not use them.
            register_buffers: false,
            ..RingConfig::default()
        };
        let desk = Desk {
            ring: Ring::new(config, setup.arena)?,
            segs: Vec::with_capacity(1024),
            to_owner: Mail::new(setup.queue, setup.waker),
            accepts: Err(Failure::ReadOnly),
            writes: Pool::default(),
            reads: Pool::default(),
            kept,
            asked: Vec::new(),
            free: Vec::new(),
        };
        Ok(Self {
            desk,
            inbox: setup.inbox,
            clients: Clients::default(),
        })
    }

    pub(super) fn waker(&self) -> Waker {
        self.desk.ring.waker()
    }

    /// Serves until the other thread has nothing more to say.
    pub(super) fn run(&mut self) {
        let mut completions: Vec<Completion> = Vec::with_capacity(4096);
        loop {
            let least = usize::from(!self.clients.at_once);
            if self.desk.ring.wait(least, None, &mut completions).is_err() {
                return; // The other thread sees that this one has ended.
            }
            for completion in completions.drain(..) {
                if self.clients.completed(completion, &mut self.desk) {
                    self.desk.to_owner.push(ToOwner::Left);
                }
            }
            let was_full = self.inbox.slots() == QUEUE;
            while let Ok(message) = self.inbox.pop() {
                self.take(message);
            }
            if self.inbox.is_abandoned() {
                return;
            }
            if was_full {
                // It may hold messages back for lack of room.
                self.desk.to_owner.wake();
            }
            self.clients.begin_turn();
            self.clients.pump(&mut self.desk);
            self.clients.end_turn();
            self.desk.balance(self.clients.len() == 0);
            self.desk.to_owner.flush();
        }
    }

    fn take(&mut self, message: ToFront) {
        match message {
            ToFront::Client(socket, exports) => match self.desk.ring.add_file(socket) {
                Ok(file) => _ = self.clients.add(file, &exports),
                // Closed already, since it was not taken.
                Err(_) => self.desk.to_owner.push(ToOwner::Left),
            },
            ToFront::Answer { id, result, lent } => {
                self.desk.ring.arena_mut().borrow(lent);
                let asked = self.desk.asked.get_mut(id as usize).and_then(Option::take);
                let asked = asked.expect("an answer is to a question");
                self.desk.free.push(id);
                self.clients.answered(asked, result, &mut self.desk);
            }
            ToFront::Extents(asked, extents) => self.clients.described(asked, extents),
            ToFront::Slots(what, lent) => self.desk.took(what, lent),
            ToFront::Accepts(accepts) => self.desk.accepts = accepts,
        }
    }
}

impl Desk {
    fn pool(&mut self, what: Use) -> &mut Pool {
        match what {
            Use::Write => &mut self.writes,
            Use::Read => &mut self.reads,
        }
    }

    fn took(&mut self, what: Use, lent: Lent) {
        let count = lent.len();
        let arena = self.ring.arena_mut();
        for slot in arena.borrow(lent) {
            arena.free(slot);
        }
        let pool = self.pool(what);
        pool.asked = None;
        pool.free += count;
    }

    /// Asks for slots where there are few, and gives back what is too much.
    fn balance(&mut self, is_idle: bool) {
        let kept = if is_idle { 0 } else { self.kept };
        for what in [Use::Write, Use::Read] {
            let pool = self.pool(what);
            if !is_idle && let Some((least, most)) = pool.question(kept) {
                self.to_owner.push(ToOwner::Want { what, least, most });
            }
            let pool = self.pool(what);
            if pool.free <= 2 * kept {
                continue;
            }
            let surplus = pool.take_surplus(kept);
            let arena = self.ring.arena_mut();
            let slots = (0..surplus).filter_map(|_| arena.alloc()).collect();
            let lent = arena.lend(slots);
            self.to_owner.push(ToOwner::Return(lent));
        }
    }
}

impl Pool {
    fn take_surplus(&mut self, kept: usize) -> usize {
        let surplus = self.free - kept;
        self.free = kept;
        surplus
    }
}

impl Host for Desk {
    fn wire(&mut self) -> (&mut Ring, &mut Vec<Seg>) {
        (&mut self.ring, &mut self.segs)
    }

    fn accepts_writes(&self) -> Result<(), Failure> {
        self.accepts
    }

    fn admits_now(&self, _blocks: usize) -> bool {
        self.to_owner.waiting() < QUEUE
    }

    fn alloc_for_write(&mut self, count: usize) -> Option<Vec<SlotId>> {
        self.writes.take(count, self.ring.arena_mut())
    }

    fn alloc_for_read(&mut self, count: usize) -> Option<Vec<SlotId>> {
        self.reads.take(count, self.ring.arena_mut())
    }

    fn request(&mut self, asked: Asked, mut request: Request) {
        let id = self.free.pop().unwrap_or_else(|| {
            self.asked.push(None);
            u32::try_from(self.asked.len() - 1).expect("connections and their requests are bounded")
        });
        self.asked[id as usize] = Some(asked);
        let slots = slots_of(&mut request).map(std::mem::take);
        let lent = self.ring.arena_mut().lend(slots.unwrap_or_default());
        self.to_owner.push(ToOwner::Request { id, request, lent });
    }

    fn extents(&mut self, asked: StatusAsked) -> Option<Vec<Extent>> {
        self.to_owner.push(ToOwner::Extents(asked));
        None
    }

    fn unpin(&mut self, _generation: u64) {
        unreachable!("readers are served where the volume is");
    }

    /// Most are of reads; what is too much goes back.
    fn free_slots(&mut self, slots: &[SlotId]) {
        for &slot in slots {
            self.ring.arena_mut().free(slot);
        }
        self.reads.free += slots.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: usize = 64;

    #[test]
    fn a_pool_asks_once_and_again_only_for_more() {
        let mut arena = Arena::new(1).expect("a page can be mapped");
        let mut pool = Pool::default();
        assert_eq!(pool.question(KEPT), Some((1, KEPT)), "it is empty");
        assert_eq!(pool.question(KEPT), None, "asked already");
        assert_eq!(pool.take(100, &mut arena), None);
        assert_eq!(pool.question(KEPT), Some((100, 100)), "a client waits");
        assert_eq!(pool.take(30, &mut arena), None);
        assert_eq!(pool.question(KEPT), None, "what comes is enough for it");
        (pool.asked, pool.free) = (None, 100);
        assert_eq!(pool.question(KEPT), None, "plenty");
        pool.free = KEPT / 2 - 1;
        assert_eq!(pool.question(KEPT), Some((1, KEPT / 2 + 1)), "filled up");
    }

    #[test]
    fn what_is_kept_is_free_in_the_arena() {
        let mut owner = Arena::new(8).expect("eight pages can be mapped");
        let slots: Vec<_> = (0..8).filter_map(|_| owner.alloc()).collect();
        let mut arena = owner.share();
        for slot in arena.borrow(owner.lend(slots)) {
            arena.free(slot);
        }
        let mut pool = Pool {
            free: 8,
            ..Pool::default()
        };
        let taken = pool.take(3, &mut arena).map(|slots| slots.len());
        assert_eq!((taken, pool.free, arena.free_slots()), (Some(3), 5, 5));
        assert_eq!((pool.take_surplus(2), pool.free), (3, 2));
    }
}
