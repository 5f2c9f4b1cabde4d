//! Clients of a replica: each pins the epoch that the backing is at before it is greeted, and is
//! cut off when the core breaks the pins.

use std::sync::Arc;

use super::Shard;
use super::client::{Client, Reader};
use crate::core::Event;
use crate::core::event::RequestId;

/// What the core said about readers in the last steps.
#[derive(Debug, Default)]
pub(super) struct Verdicts {
    /// Questions that were answered.
    pub(super) pinned: Vec<(RequestId, Option<u64>)>,
    /// All are cut off.
    pub(super) broken: bool,
}

impl Verdicts {
    pub(super) fn is_empty(&self) -> bool {
        self.pinned.is_empty() && !self.broken
    }
}

impl Shard {
    /// Asks the core whether a client may read. Until it answers the client is not greeted.
    pub(super) fn ask_to_pin(&mut self, index: u32, generation: u32) {
        let id = RequestId((u64::from(generation) << 32) | u64::from(index));
        self.engine.step(Event::Pin { id });
    }

    /// Greets readers, turns them away, or cuts them off, as the core has said.
    pub(super) fn judge_readers(&mut self) {
        if std::mem::take(&mut self.engine.verdicts.broken) {
            let mut cut = Vec::new();
            for (index, client) in self.clients.iter_mut() {
                if matches!(client.reader, Reader::Pinned(_)) {
                    client.cut_off();
                    cut.push(index);
                }
            }
            cut.into_iter().for_each(|index| self.clients.wake(index));
        }
        for (id, pin) in std::mem::take(&mut self.engine.verdicts.pinned) {
            let index = u32::try_from(id.0 & 0xFFFF_FFFF).expect("masked to 32 bits");
            let generation = u32::try_from(id.0 >> 32).expect("shifted by 32 bits");
            match (self.clients.get_mut(index, generation), pin) {
                (Some(client), Some(generation)) => client.reader = Reader::Pinned(generation),
                (Some(client), None) => {
                    let exports = Arc::clone(&self.no_exports);
                    *client = Client::new(client.file, client.generation, exports);
                }
                (None, Some(generation)) => self.engine.step(Event::Unpin { generation }),
                (None, None) => {}
            }
            self.clients.wake(index);
        }
    }
}
