//! Writing the log's superblock: one at a time, the two slots in turn.
//!
//! Whoever needs something persisted changes `desired` and marks it dirty; what is true is what
//! `persisted` says. A change that comes while a write is on its way goes into the next one.

use hn4::log::{LogIdentity, SUPERBLOCK_0, SUPERBLOCK_1, Superblock};

use super::event::{Action, Actions, Disk, Io, IoToken, Seg};
use super::mutants::{Mutant, planted};
use crate::arena::{SlotId, SlotMemory};

/// See the module.
#[derive(Debug)]
pub struct SuperblockWriter {
    identity: LogIdentity,
    persisted: Superblock,
    /// What the next write will say. Set `dirty` with it.
    pub desired: Superblock,
    /// `desired` says something that must be persisted.
    pub dirty: bool,
    in_flight: Option<Superblock>,
    next_slot: usize,
    buffer: SlotId,
}

impl SuperblockWriter {
    /// `newest_slot` holds `persisted` on the medium; `buffer` is taken for good.
    #[must_use]
    pub fn new(
        identity: LogIdentity,
        persisted: Superblock,
        newest_slot: usize,
        buffer: SlotId,
    ) -> Self {
        Self {
            identity,
            persisted,
            desired: persisted,
            dirty: false,
            in_flight: None,
            next_slot: 1 - newest_slot,
            buffer,
        }
    }

    /// What the medium says.
    #[must_use]
    pub fn persisted(&self) -> &Superblock {
        &self.persisted
    }

    /// What the medium may say after a power loss: what it says, and what is on its way to it.
    pub fn possible(&self) -> impl Iterator<Item = &Superblock> {
        std::iter::once(&self.persisted).chain(&self.in_flight)
    }

    /// Whether a write is on its way or waiting.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.dirty || self.in_flight.is_some()
    }

    /// Starts a write if one is needed and none is on its way.
    pub fn write(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        if !self.dirty || self.in_flight.is_some() {
            return;
        }
        self.desired.generation = self.persisted.generation + 1;
        self.desired
            .encode(&self.identity, mem.bytes_mut(self.buffer));
        self.in_flight = Some(self.desired);
        self.dirty = false;
        let first = out.segs.len();
        out.segs.push(Seg {
            slot: self.buffer,
            offset: 0,
            bytes: 4096,
        });
        let offset = [SUPERBLOCK_0, SUPERBLOCK_1][self.next_slot];
        let io = Io::Write {
            disk: Disk::Log,
            offset,
            segs: first..first + 1,
            then_fsync: !planted(Mutant::NoSuperblockFlush),
        };
        out.push(Action::Io {
            token: IoToken::Superblock,
            io,
        });
    }

    /// Takes the completion of the write.
    pub fn done(&mut self) {
        self.persisted = self.in_flight.take().expect("a superblock was on its way");
        if !planted(Mutant::OneSuperblockSlot) {
            self.next_slot = 1 - self.next_slot;
        }
    }
}
