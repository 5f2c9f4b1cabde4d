//! The threads that serve clients beside this one, as the thread that has the volume sees them.
//!
//! Clients of a primary are dealt out to them, the next one to where there are fewest. What they
//! ask is handed to the core in turns; a write for which the open epoch has no room waits, with
//! those behind it that need room too. Everything else passes by.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use hn4::types::SECTOR_BYTES;

use super::ShardError;
use super::engine::{Asker, Engine};
use super::front::{Front, FrontSetup, Relayed, ToFront, ToOwner, Use, slots_of};
use super::host::Host;
use super::mail::{Mail, QUEUE, may_be_held_back};
use super::pool::Kept;
use super::processor::Processor;
use crate::arena::{Lent, SlotId, SlotMemory};
use crate::core::event::{Failure, Request};
use crate::nbd::export::ExportList;
use crate::ring::{RingError, Waker};

/// Messages of one that are taken in a turn. Their answers go out at its end, so that it works on
/// them while the next ones are worked on here.
const TAKEN: usize = 64;
/// A question about what a part of the volume holds counts as so many: it may cost hundreds of
/// system calls.
const EXTENTS_COUNT: usize = 8;
/// Slots of a grant that are judged at once, beyond the least.
const PART: usize = 64;

/// One of them.
struct Handle {
    mail: Mail<ToFront>,
    from: rtrb::Consumer<ToOwner>,
    /// Changes that wait for room in the open epoch.
    stalled: VecDeque<(Relayed, Request)>,
    /// Slots for writes and for reads that it waits for: the least and the most.
    wants: [Option<(usize, usize)>; 2],
    clients: usize,
    /// What it was told last.
    accepts: Option<Result<(), Failure>>,
    /// It is there until it has been joined.
    thread: Option<JoinHandle<Result<(), RingError>>>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Fronts {
    list: Vec<Handle>,
    /// Which one is first in this turn.
    first: usize,
}

impl Fronts {
    /// Starts so many. `cpu`: the first of the processors that they are to stay on.
    pub(super) fn start(
        name: &str,
        count: usize,
        cpu: Option<Processor>,
        engine: &Engine,
    ) -> Result<Self, ShardError> {
        let mut fronts = Self::default();
        let slots = engine.ring.arena().capacity();
        let kept = Kept::new(slots, engine.config().reserve_slots, count);
        for index in 0..count {
            let cpu = cpu.map(|cpu| cpu.plus(index));
            let name = format!("front {}/{name}", index + 1);
            fronts.list.push(Handle::start(&name, (kept, cpu), engine)?);
        }
        Ok(fronts)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Clients that they serve.
    pub(super) fn clients(&self) -> usize {
        self.list.iter().map(|front| front.clients).sum()
    }

    /// Why one has ended, if one has: a failure of its ring, or a panic.
    pub(super) fn ended(&mut self) -> Option<String> {
        let mut ended = self
            .list
            .iter_mut()
            .filter(|front| front.from.is_abandoned());
        let thread = ended.find_map(|front| front.thread.take())?;
        let name = thread.thread().name().unwrap_or_default().to_owned();
        let why = match thread.join() {
            Ok(Ok(())) => "it was told to".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it panicked".to_owned(),
        };
        Some(format!(
            "thread {name}, which serves clients, has ended: {why}"
        ))
    }

    /// Gives a client to one of them.
    pub(super) fn serve(&mut self, socket: OwnedFd, exports: &Arc<ExportList>) {
        let fewest = self.list.iter_mut().min_by_key(|front| front.clients);
        let front = fewest.expect("there is one");
        front.clients += 1;
        front
            .mail
            .push(ToFront::Client(socket, Arc::clone(exports)));
    }

    /// Whether one has sent more than a turn takes.
    pub(super) fn have_more(&self) -> bool {
        self.list.iter().any(|front| !front.from.is_empty())
    }

    /// Hands what they ask to the core, once a turn: they may never pause.
    pub(super) fn take(&mut self, engine: &mut Engine) {
        let count = self.list.len();
        for step in 0..count {
            let index = (self.first + step) % count;
            self.list[index].take(index, engine);
        }
        self.first = (self.first + 1) % count.max(1);
    }

    /// The core has answered.
    pub(super) fn answered(
        &mut self,
        relayed: Relayed,
        result: Result<(), Failure>,
        engine: &mut Engine,
    ) {
        let Relayed { id, slots, .. } = relayed;
        let lent = engine.mem().lend(slots);
        self.list[relayed.front]
            .mail
            .push(ToFront::Answer { id, result, lent });
    }

    /// At the end of a turn: gives them what there is room for, and tells them what is new.
    pub(super) fn settle(&mut self, engine: &mut Engine) {
        let accepts = engine.accepts_writes();
        let count = self.list.len();
        for step in 0..count {
            let front = &mut self.list[(self.first + step) % count];
            if front.accepts != Some(accepts) {
                front.accepts = Some(accepts);
                front.mail.push(ToFront::Accepts(accepts));
            }
            front.grant(engine);
            front.mail.flush();
        }
    }
}

impl Drop for Fronts {
    fn drop(&mut self) {
        let end = |front: Handle| front.thread;
        let threads: Vec<_> = self.list.drain(..).filter_map(end).collect();
        for thread in threads {
            // A panic has been printed by the panic hook already, and nobody waits for an answer.
            let _ = thread.join();
        }
    }
}

impl Handle {
    fn start(
        name: &str,
        (kept, cpu): (Kept, Option<Processor>),
        engine: &Engine,
    ) -> Result<Self, ShardError> {
        let (queue, inbox) = rtrb::RingBuffer::new(QUEUE);
        let (to_owner, from) = rtrb::RingBuffer::new(QUEUE);
        let setup = FrontSetup {
            inbox,
            queue: to_owner,
            waker: engine.ring.waker(),
            arena: engine.ring.arena().share(),
            kept,
            cpu,
        };
        let (tell, told) = mpsc::channel::<Result<Waker, RingError>>();
        let serve = move || match Front::open(setup) {
            Ok(mut front) if tell.send(Ok(front.waker())).is_ok() => front.run(),
            // Nobody listens: the volume's thread is gone.
            Ok(_) => Ok(()),
            Err(error) => {
                let _ = tell.send(Err(error));
                Ok(())
            }
        };
        let builder = std::thread::Builder::new().name(name.chars().take(15).collect());
        let os = |source| ShardError::Os {
            what: "starting a thread for clients",
            source,
        };
        let thread = builder.spawn(serve).map_err(os)?;
        let panicked = |_| os(std::io::Error::other("it panicked"));
        let waker = told.recv().map_err(panicked)??;
        Ok(Self {
            mail: Mail::new(queue, waker),
            from,
            stalled: VecDeque::new(),
            wants: [None; 2],
            clients: 0,
            accepts: None,
            thread: Some(thread),
        })
    }

    fn take(&mut self, index: usize, engine: &mut Engine) {
        self.retry(engine);
        let (mut taken, mut left) = (0, TAKEN);
        while let Some(message) = next(&mut self.from, &mut left) {
            taken += 1;
            match message {
                ToOwner::Request { id, request, lent } => {
                    self.request((index, id), request, lent, engine);
                }
                ToOwner::Want { what, least, most } => {
                    self.wants[what as usize] = Some((least, most));
                }
                ToOwner::Extents(asked) => {
                    let extents = engine.extents(asked).unwrap_or_default();
                    self.mail.push(ToFront::Extents(asked, extents));
                }
                ToOwner::Return(lent) => {
                    let slots = engine.mem().borrow(lent);
                    engine.free_slots(&slots);
                }
                ToOwner::Left => self.clients = self.clients.saturating_sub(1),
            }
        }
        if may_be_held_back(&self.from, taken) {
            self.mail.wake();
        }
    }

    fn request(
        &mut self,
        (front, id): (usize, u32),
        mut request: Request,
        lent: Lent,
        engine: &mut Engine,
    ) {
        let lent = engine.mem().borrow(lent);
        let (mut slots, mut read_bytes) = (Vec::new(), 0);
        if let Request::Read { sectors, .. } = request {
            slots.clone_from(&lent);
            read_bytes = u64::from(sectors) * SECTOR_BYTES;
        }
        if let Some(place) = slots_of(&mut request) {
            *place = lent;
        }
        let relayed = Relayed {
            front,
            id,
            slots,
            read_bytes,
        };
        let has_room = self.stalled.is_empty() && takes_now(&request, engine);
        if has_room || !changes(&request) {
            engine.ask(Asker::There(relayed), request);
        } else {
            self.stalled.push_back((relayed, request));
        }
    }

    fn retry(&mut self, engine: &mut Engine) {
        while let Some((relayed, request)) = self.stalled.pop_front() {
            if !takes_now(&request, engine) {
                return self.stalled.push_front((relayed, request));
            }
            engine.ask(Asker::There(relayed), request);
        }
    }

    fn grant(&mut self, engine: &mut Engine) {
        for what in [Use::Write, Use::Read] {
            let Some((least, most)) = self.wants[what as usize] else {
                continue;
            };
            let slots = given(least, most, |count| match what {
                Use::Write => engine.alloc_for_write(count),
                Use::Read => engine.alloc_for_read(count),
            });
            if let Some(slots) = slots {
                self.wants[what as usize] = None;
                let lent = engine.mem().lend(slots);
                self.mail.push(ToFront::Slots(what, lent));
            }
        }
    }
}

/// The next message of a turn in which so many may still be taken.
fn next(from: &mut rtrb::Consumer<ToOwner>, left: &mut usize) -> Option<ToOwner> {
    if *left == 0 {
        return None;
    }
    let message = from.pop().ok()?;
    let counts = match message {
        ToOwner::Extents(_) => EXTENTS_COUNT,
        _ => 1,
    };
    *left = left.saturating_sub(counts);
    Some(message)
}

/// At least so many slots, or none, and more as long as there is room, each part of which is judged
/// like a request of its own: writers are not let go all at once because one thread asks for all.
fn given(
    least: usize,
    most: usize,
    mut alloc: impl FnMut(usize) -> Option<Vec<SlotId>>,
) -> Option<Vec<SlotId>> {
    let mut slots = alloc(least)?;
    while slots.len() < most
        && let Some(more) = alloc(PART.min(most - slots.len()))
    {
        slots.extend(more);
    }
    Some(slots)
}

fn changes(request: &Request) -> bool {
    matches!(request, Request::Write { .. } | Request::Zero { .. })
}

/// Whether the open epoch has room for a change, or it will be refused at once.
fn takes_now(request: &Request, engine: &Engine) -> bool {
    if engine.accepts_writes().is_err() {
        return true;
    }
    match request {
        Request::Write { slots, .. } => engine.admits_now(slots.len()),
        Request::Zero { edges, .. } => {
            engine.admits_now(edges.len()) && engine.volume.has_room(engine.ring.arena(), 0)
        }
        Request::Read { .. } | Request::Flush => true,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::arena::Arena;
    use crate::nbd::request::{ByteRange, Cookie};
    use crate::ring::{Ring, RingConfig};
    use crate::shard::client::StatusAsked;

    /// What is given of so many, and in which parts.
    fn grant(least: usize, most: usize, mut room: usize) -> (Option<usize>, Vec<usize>) {
        let mut parts = Vec::new();
        let slots = given(least, most, |count| {
            room = room.checked_sub(count)?;
            parts.push(count);
            Some(vec![SlotId(0); count])
        });
        (slots.map(|slots| slots.len()), parts)
    }

    /// One thread that does nothing but this.
    fn one(name: &str, end: fn() -> Result<(), RingError>) -> Fronts {
        let (queue, _inbox) = rtrb::RingBuffer::new(QUEUE);
        let (to_owner, from) = rtrb::RingBuffer::new(QUEUE);
        let config = RingConfig {
            operations: 1,
            ..RingConfig::default()
        };
        let ring = Ring::new(config, Arena::new(1).expect("a page")).expect("a ring");
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(move || {
            let _dropped_last: rtrb::Producer<ToOwner> = to_owner;
            end()
        });
        let handle = Handle {
            mail: Mail::new(queue, ring.waker()),
            from,
            stalled: VecDeque::new(),
            wants: [None; 2],
            clients: 0,
            accepts: None,
            thread: Some(thread.expect("a thread")),
        };
        Fronts {
            list: vec![handle],
            first: 0,
        }
    }

    fn why_ended(mut fronts: Fronts) -> String {
        let by = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(why) = fronts.ended() {
                return why;
            }
            assert!(Instant::now() < by, "it runs still");
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_cause_of_a_threads_end_is_told() {
        let failed = one("front 1/disk", || {
            Err(RingError::Os {
                what: "waiting",
                source: std::io::Error::from_raw_os_error(libc::ENOMEM),
            })
        });
        let why = why_ended(failed);
        assert!(why.starts_with("thread front 1/disk, "), "{why}");
        assert!(why.contains("waiting") && why.contains("memory"), "{why}");
        let why = why_ended(one("front 2/disk", || panic!("as planned")));
        assert!(why.ends_with("has ended: it panicked"), "{why}");
    }

    /// Messages that are taken in a turn of so many.
    fn taken(messages: impl Iterator<Item = ToOwner>) -> usize {
        let (mut queue, mut from) = rtrb::RingBuffer::new(QUEUE);
        messages.for_each(|message| queue.push(message).expect("room"));
        let mut left = TAKEN;
        std::iter::from_fn(|| next(&mut from, &mut left)).count()
    }

    #[test]
    fn a_turn_takes_fewer_questions_about_what_a_volume_holds() {
        let left = |_| ToOwner::Left;
        let asks = |_| {
            ToOwner::Extents(StatusAsked {
                client: 0,
                generation: 0,
                cookie: Cookie(0),
                range: ByteRange {
                    offset: 0,
                    length: 4096,
                },
                req_one: false,
            })
        };
        assert_eq!(taken((0..100).map(left)), TAKEN);
        assert_eq!(taken((0..100).map(asks)), TAKEN / EXTENTS_COUNT);
        let mixed = (0..60).map(left).chain((0..40).map(asks));
        assert_eq!(taken(mixed), 61, "one that does not fit is taken last");
    }

    #[test]
    fn a_grant_is_the_least_and_then_whatever_there_is_room_for() {
        assert_eq!(grant(100, 512, 99), (None, vec![]));
        assert_eq!(grant(100, 512, 100), (Some(100), vec![100]));
        assert_eq!(grant(100, 512, 250), (Some(228), vec![100, 64, 64]));
        assert_eq!(grant(100, 200, 9999), (Some(200), vec![100, 64, 36]));
        assert_eq!(grant(1, 1, 9999), (Some(1), vec![1]));
    }
}
