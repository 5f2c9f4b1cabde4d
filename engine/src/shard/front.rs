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
//! were served there. What it has too many of goes back, more of it when no request is on its way,
//! and all when the last client has left.
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
use super::mail::{Mail, QUEUE, is_abandoned, may_be_held_back};
use super::pool::{Kept, Pool};
use super::processor::Processor;
use crate::arena::{Arena, Lent, SlotId, SlotMemory};
use crate::core::event::{Failure, Request};
use crate::nbd::export::ExportList;
use crate::nbd::reply::Extent;
use crate::ring::{Completion, Ring, RingConfig, RingError, Seg, Waker};

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
    /// Answered by [`ToFront::Slots`] when there is room for `least`, with up to `most` if there is
    /// more. A later question takes the place of one that waits.
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

/// What those are for.
fn use_of(request: &Request) -> Option<Use> {
    match request {
        Request::Read { .. } => Some(Use::Read),
        Request::Write { .. } | Request::Zero { .. } => Some(Use::Write),
        Request::Flush => None,
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
    kept: Kept,
    /// Requests that are on their way, with the pool that their slots came from.
    asked: Vec<Option<(Asked, Option<Use>)>>,
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
    pub(super) kept: Kept,
    pub(super) cpu: Option<Processor>,
}

impl Front {
    /// Opens its ring, on the calling thread.
    pub(super) fn open(setup: FrontSetup) -> Result<Self, RingError> {
        if let Some(cpu) = setup.cpu {
            cpu.enter();
        }
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
            kept: setup.kept,
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

    /// Serves until the other thread has nothing more to say. That one sees when this one ends.
    ///
    /// # Errors
    /// If the ring is of no more use.
    pub(super) fn run(&mut self) -> Result<(), RingError> {
        let mut completions = Vec::with_capacity(4096);
        while self.turn(usize::from(!self.clients.at_once), &mut completions)? {}
        Ok(())
    }

    /// One turn, which waits for so many completions. False: the other thread has ended.
    fn turn(&mut self, least: usize, completions: &mut Vec<Completion>) -> Result<bool, RingError> {
        self.desk.ring.wait(least, None, completions)?;
        for completion in completions.drain(..) {
            if self.clients.completed(completion, &mut self.desk) {
                self.desk.to_owner.push(ToOwner::Left);
            }
        }
        let is_last = is_abandoned(&self.inbox);
        let mut taken = 0;
        while let Ok(message) = self.inbox.pop() {
            self.take(message);
            taken += 1;
        }
        if may_be_held_back(&self.inbox, taken) {
            self.desk.to_owner.wake();
        }
        self.clients.begin_turn();
        self.clients.pump(&mut self.desk);
        self.clients.end_turn();
        if is_last {
            // What was answered at the end goes out.
            self.desk.ring.wait(0, None, completions)?;
            return Ok(false);
        }
        self.desk.balance(self.clients.len() == 0);
        self.desk.to_owner.flush();
        Ok(true)
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
                let (asked, used) = asked.expect("an answer is to a question");
                self.desk.free.push(id);
                if let Some(what) = used {
                    self.desk.pool(what).answered();
                }
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
        self.pool(what).granted(count);
    }

    /// Asks for slots where there are few, and gives back what is too much.
    ///
    /// **Invariant:** what is free in this thread's share of the arena is in one of the two pools.
    fn balance(&mut self, is_idle: bool) {
        debug_assert_eq!(
            self.writes.free() + self.reads.free(),
            self.ring.arena().free_slots(),
            "a free slot is in one of the pools"
        );
        for what in [Use::Write, Use::Read] {
            let kept = match what {
                _ if is_idle => 0,
                Use::Write => self.kept.writes,
                Use::Read => self.kept.reads,
            };
            let surplus = self.pool(what).take_surplus(kept);
            if surplus > 0 {
                let arena = self.ring.arena_mut();
                let slots = (0..surplus).filter_map(|_| arena.alloc()).collect();
                let lent = arena.lend(slots);
                self.to_owner.push(ToOwner::Return(lent));
            }
            if let Some((least, most)) = self.pool(what).question(kept) {
                self.to_owner.push(ToOwner::Want { what, least, most });
            }
        }
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
        let used = use_of(&request);
        if let Some(what) = used {
            self.pool(what).sent();
        }
        self.asked[id as usize] = Some((asked, used));
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
        self.reads.put(slots.len());
    }
}

#[cfg(test)]
mod tests;
