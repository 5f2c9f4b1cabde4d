//! What a client's requests ask of the core, and what they need before: slots, and room in the
//! open epoch.

use hn4::types::BLOCK_BYTES;

use super::{Asked, Client, Phase, StatusAsked};
use crate::arena::SlotId;
use crate::core::event::Request;
use crate::nbd::request::{ByteRange, Command, Cookie, Operation};
use crate::shard::host::Host;
use crate::shard::refusal::{changes, refusal_of};
use crate::shard::transfer::{Reply, Write, blocks_of, sectors_of};

impl Client {
    /// Tries again what waited for room.
    pub(super) fn retry_stalled(&mut self, index: u32, host: &mut impl Host) {
        let Phase::Transmission(t) = &mut self.phase else {
            return;
        };
        if t.write.as_ref().is_some_and(|write| write.arrived) {
            return self.insert(index, host);
        }
        if let Some(command) = t.stalled.take() {
            self.command(index, command, host);
        }
    }

    /// Does what a request asks for, or lets it wait for room.
    pub(super) fn command(&mut self, index: u32, command: Command, host: &mut impl Host) {
        let Phase::Transmission(t) = &mut self.phase else {
            return;
        };
        let cookie = command.cookie;
        if let Err(failure) = host.accepts_writes()
            && changes(command.operation)
        {
            // The payload, if there is any, is drained first: clients do not listen before.
            if !t.decoder.refuse_payload(refusal_of(failure)) {
                self.refuse(cookie, refusal_of(failure));
            }
            return;
        }
        match command.operation {
            Operation::Read { range, df } => {
                let Some(slots) = host.alloc_for_read(blocks_of(range)) else {
                    t.stalled = Some(command);
                    return;
                };
                let (lba, sectors) = sectors_of(range);
                let request = Request::Read {
                    lba,
                    sectors,
                    slots: slots.clone(),
                };
                self.ask(index, cookie, Some((range, df, slots)), request, host);
            }
            Operation::Write { range, fua } => match host.alloc_for_write(blocks_of(range)) {
                None => t.stalled = Some(command),
                Some(slots) => {
                    t.write = Some(Write {
                        cookie,
                        range,
                        fua,
                        slots,
                        arrived: false,
                    });
                }
            },
            Operation::Flush => self.ask(index, cookie, None, Request::Flush, host),
            Operation::Trim { range, fua } => self.zero(index, command, range, fua, true, host),
            Operation::WriteZeroes {
                range,
                fua,
                no_hole,
                ..
            } => {
                self.zero(index, command, range, fua, !no_hole, host);
            }
            Operation::BlockStatus { range, req_one } => {
                let asked = StatusAsked {
                    client: index,
                    generation: self.generation,
                    cookie,
                    range,
                    req_one,
                };
                self.in_core += 1;
                // It may cost hundreds of system calls.
                self.burst = self.burst.saturating_sub(1);
                if let Some(extents) = host.extents(asked) {
                    self.described(asked, extents);
                }
            }
            Operation::Cache { .. } => {
                self.replies
                    .push_back(Reply::Header(t.replier.done(cookie)));
            }
            Operation::Disconnect => self.finishing = true,
        }
    }

    fn zero(
        &mut self,
        index: u32,
        command: Command,
        range: ByteRange,
        fua: bool,
        trim: bool,
        host: &mut impl Host,
    ) {
        let first_edge = !range.offset.is_multiple_of(BLOCK_BYTES);
        let last_edge = !range.end().is_multiple_of(BLOCK_BYTES);
        let within = range.offset / BLOCK_BYTES == range.end() / BLOCK_BYTES;
        let edges = usize::from(first_edge || within) + usize::from(last_edge && !within);
        let slots = if host.admits_now(edges) {
            host.alloc_for_write(edges)
        } else {
            None
        };
        let Some(edges) = slots else {
            if let Phase::Transmission(t) = &mut self.phase {
                t.stalled = Some(command);
            }
            return;
        };
        let (lba, sectors) = sectors_of(range);
        let request = Request::Zero {
            lba,
            sectors: sectors.into(),
            fua,
            trim,
            edges,
        };
        self.ask(index, command.cookie, None, request, host);
    }

    /// Hands a write whose payload is complete to the core, if the open epoch takes it.
    pub(super) fn insert(&mut self, index: u32, host: &mut impl Host) {
        let Phase::Transmission(t) = &mut self.phase else {
            return;
        };
        let Some(write) = t.write.take() else { return };
        if !host.admits_now(write.slots.len()) {
            t.write = Some(write);
            return;
        }
        let (lba, sectors) = sectors_of(write.range);
        let request = Request::Write {
            lba,
            sectors,
            fua: write.fua,
            slots: write.slots,
        };
        self.ask(index, write.cookie, None, request, host);
    }

    fn ask(
        &mut self,
        index: u32,
        cookie: Cookie,
        read: Option<(ByteRange, bool, Vec<SlotId>)>,
        request: Request,
        host: &mut impl Host,
    ) {
        self.in_core += 1;
        self.burst = self.burst.saturating_sub(1);
        let asked = Asked {
            client: index,
            generation: self.generation,
            cookie,
            read,
        };
        host.request(asked, request);
    }
}
