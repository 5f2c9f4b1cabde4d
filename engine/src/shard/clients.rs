//! The clients of one thread, and who of them may be able to go on.

use std::sync::Arc;

use super::client::{Asked, Client, Pumped, StatusAsked};
use super::host::Host;
use super::tokens::{KIND, TOKENS};
use crate::core::event::Failure;
use crate::nbd::export::ExportList;
use crate::nbd::reply::Extent;
use crate::ring::{Completion, FileId};

/// See the module.
#[derive(Default)]
pub(super) struct Clients {
    list: Vec<Option<Client>>,
    generation: u32,
    /// Those that may be able to do something.
    ready: Vec<u32>,
    /// Scratch: who is next, those that wait for room in the order in which they began to.
    order: Vec<(u64, u32)>,
    /// Those that began to wait for room so far.
    waits: u64,
    /// Those for which there was no room in the ring, or that have more than a turn takes.
    later: Vec<u32>,
    /// One of them has requests left that it sent already: the next turn waits for nothing.
    pub(super) at_once: bool,
}

impl Clients {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.iter().count()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Client> {
        self.list.iter().flatten()
    }

    /// All with their places.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Client)> {
        let places = (0..).zip(&mut self.list);
        places.filter_map(|(index, client)| Some((index, client.as_mut()?)))
    }

    /// The client at a place, if it is the same one still.
    pub(super) fn get_mut(&mut self, index: u32, generation: u32) -> Option<&mut Client> {
        let client = self.list.get_mut(index as usize)?.as_mut()?;
        (client.generation == generation).then_some(client)
    }

    /// Takes a connection; its place and its client.
    pub(super) fn add(&mut self, file: FileId, exports: &Arc<ExportList>) -> (u32, &mut Client) {
        self.generation = self.generation.wrapping_add(1) & 0xFF_FFFF;
        let free = self.list.iter().position(Option::is_none);
        let at = free.unwrap_or_else(|| {
            self.list.push(None);
            self.list.len() - 1
        });
        let index = u32::try_from(at).expect("clients are bounded");
        self.ready.push(index);
        let client = Client::new(file, self.generation, Arc::clone(exports));
        (index, self.list[at].insert(client))
    }

    /// This client may be able to go on.
    pub(super) fn wake(&mut self, index: u32) {
        self.ready.push(index);
    }

    /// Takes the completion of a client's operation. True if the client is gone.
    pub(super) fn completed(&mut self, completion: Completion, host: &mut impl Host) -> bool {
        let index = u32::try_from(completion.token & 0xFFFF_FFFF).expect("masked to 32 bits");
        let kind = completion.token & KIND;
        self.ready.push(index);
        let Some(slot) = self.list.get_mut(index as usize) else {
            return false;
        };
        let Some(client) = slot else { return false };
        if kind == TOKENS.receive {
            client.received(completion.buf, completion.result.map_err(drop));
        } else if kind == TOKENS.send {
            client.sent(completion.buf, completion.result.is_err(), host);
        } else if let Some(client) = slot.take() {
            // Operations on a closed file complete before the close does.
            client.release(host);
            return true;
        }
        false
    }

    /// A new turn begins.
    pub(super) fn begin_turn(&mut self) {
        self.at_once = false;
        for client in self.list.iter_mut().flatten() {
            client.begin_turn();
        }
    }

    /// Takes the core's answer to one of them.
    pub(super) fn answered(
        &mut self,
        asked: Asked,
        result: Result<(), Failure>,
        host: &mut impl Host,
    ) {
        let index = asked.client;
        match self.get_mut(index, asked.generation) {
            Some(client) => {
                client.answered(asked, result, host);
                self.ready.push(index);
            }
            None => asked.release(host),
        }
    }

    /// Takes the answer to a question of one of them about a part of the volume.
    pub(super) fn described(&mut self, asked: StatusAsked, extents: Vec<Extent>) {
        if let Some(client) = self.get_mut(asked.client, asked.generation) {
            client.described(asked, extents);
            self.ready.push(asked.client);
        }
    }

    /// Lets every client go on that may be able to, each once. Those that wait for room go first,
    /// so that a large request is not for ever short of what small ones have just taken; of them
    /// whoever has waited longest, so that all have their turn where there is room for a few.
    pub(super) fn pump(&mut self, host: &mut impl Host) {
        const WAITS_NOT: u64 = u64::MAX;
        let mut order = std::mem::take(&mut self.order);
        for (index, client) in (0..).zip(&mut self.list) {
            let Some(client) = client else { continue };
            if client.is_stalled() {
                self.waits += u64::from(client.waits_since.is_none());
                let since = *client.waits_since.get_or_insert(self.waits);
                order.push((since, index));
            }
        }
        for index in self.ready.drain(..) {
            if let Some(Some(client)) = self.list.get(index as usize)
                && !client.is_stalled()
            {
                order.push((WAITS_NOT, index));
            }
        }
        order.sort_unstable();
        order.dedup();
        for (_, index) in order.drain(..) {
            let Some(Some(client)) = self.list.get_mut(index as usize) else {
                continue;
            };
            match client.pump(index, host, &TOKENS) {
                Pumped::Waits => {}
                // Its completions bring the next turn.
                Pumped::RingFull => self.later.push(index),
                Pumped::HasMore => {
                    self.later.push(index);
                    self.at_once = true;
                }
            }
        }
        self.order = order;
    }

    /// Nothing moves any more.
    pub(super) fn end_turn(&mut self) {
        self.ready.append(&mut self.later);
    }
}
