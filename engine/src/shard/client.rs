//! One NBD client: the codec on one side, its thread's ring and the core on the other.
//!
//! Bytes of a client are received into the connection's buffer, many requests at a time. What is
//! left of a write's payload when the buffer is used up is received straight into the overlay slots
//! it will live in, with the buffer behind it for the requests that follow. Replies that are ready
//! in one turn of the shard go out in one send; data of reads is sent from the slots.
//!
//! Back-pressure (P8): a request for which there is no room stalls its connection, nothing else:
//! the client's bytes stay in its socket.

mod commands;

use std::collections::VecDeque;
use std::sync::Arc;

use super::host::Host;
use super::refusal::refusal_of;
use super::tokens::Tokens;
use super::transfer::{Packer, Reply, SEGMENTS, Write};
use crate::arena::SlotId;
use crate::core::event::Failure;
use crate::nbd::Limits;
use crate::nbd::connection::{Decoded, Decoder};
use crate::nbd::export::{ExportDirectory, ExportList};
use crate::nbd::handshake::{BASE_ALLOCATION_ID, Handshake, Status, greeting};
use crate::nbd::reply::{Extent, Replier};
use crate::nbd::request::{ByteRange, Command, Cookie, Refusal};
use crate::ring::{FileId, Memory, Op, OwnedBuf, Seg};

/// Received at once. Sixty-odd requests with 4 KiB of payload.
const RECEIVE_BYTES: usize = 256 * 1024;
/// Headers of replies in one send.
const SEND_BYTES: usize = 16 * 1024;
/// Requests of one connection in the core at the same time.
const REQUESTS: usize = 1024;
/// Requests of one connection that are taken in one turn. Their answers go out at its end, so that
/// the client works on them while the shard works on the next ones.
const BURST: usize = 8;
/// Payload that is left when the buffer is used up is copied through it, if it is shorter.
const DIRECT_BYTES: u32 = 8 * 1024;

/// What a request to the core was, to be answered.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) client: u32,
    pub(super) generation: u32,
    pub(super) cookie: Cookie,
    /// A read, and the slots it fills.
    pub(super) read: Option<(ByteRange, bool, Vec<SlotId>)>,
}

/// A client's question about a part of the volume.
#[derive(Clone, Copy, Debug)]
pub(super) struct StatusAsked {
    pub(super) client: u32,
    pub(super) generation: u32,
    pub(super) cookie: Cookie,
    pub(super) range: ByteRange,
    pub(super) req_one: bool,
}

enum Phase {
    Handshake(Box<Handshake<Arc<ExportList>>>, Arc<ExportList>),
    Transmission(Box<Transmission>),
}

struct Transmission {
    decoder: Decoder,
    replier: Replier,
    write: Option<Write>,
    stalled: Option<Command>,
}

/// Whether a client is one of a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reader {
    /// It is one of a primary.
    No,
    /// It is not greeted before the core has pinned an epoch for it.
    Waiting,
    /// It holds a pin, to be given back with this generation.
    Pinned(u64),
}

/// See the module.
pub(super) struct Client {
    pub(super) file: FileId,
    pub(super) generation: u32,
    pub(super) reader: Reader,
    phase: Phase,
    buf: Option<OwnedBuf>,
    start: usize,
    end: usize,
    /// Bytes of payload that the receive in flight may fill before the buffer.
    direct: u32,
    send_buf: Option<OwnedBuf>,
    sending: Vec<SlotId>,
    replies: VecDeque<Reply>,
    in_core: usize,
    /// Requests that may still be taken in this turn.
    burst: usize,
    /// Its place among those that wait for room, once it has one.
    pub(super) waits_since: Option<u64>,
    /// No more requests will be taken; close when everything is answered.
    finishing: bool,
    /// The connection is broken: close now.
    broken: bool,
    closing: bool,
}

/// What a client needs to go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pumped {
    /// A completion, or an answer of the core.
    Waits,
    /// Room in the ring: any completion.
    RingFull,
    /// The next turn: it has sent more than one turn takes.
    HasMore,
}

impl Client {
    pub(super) fn new(file: FileId, generation: u32, exports: Arc<ExportList>) -> Self {
        let handshake = Handshake::new(Arc::clone(&exports), Limits::default());
        Self {
            file,
            generation,
            reader: Reader::No,
            phase: Phase::Handshake(Box::new(handshake), exports),
            buf: Some(OwnedBuf::zeroed(RECEIVE_BYTES)),
            start: 0,
            end: 0,
            direct: 0,
            send_buf: Some(OwnedBuf::zeroed(SEND_BYTES)),
            sending: Vec::new(),
            replies: VecDeque::from([Reply::Bytes(greeting().to_vec())]),
            in_core: 0,
            burst: BURST,
            waits_since: None,
            finishing: false,
            broken: false,
            closing: false,
        }
    }

    /// What it reads is about to change: it is closed without another answer.
    pub(super) fn cut_off(&mut self) {
        self.broken = true;
    }

    /// Whether a request waits for room.
    pub(super) fn is_stalled(&self) -> bool {
        match &self.phase {
            Phase::Handshake(..) => false,
            Phase::Transmission(t) => {
                t.stalled.is_some() || t.write.as_ref().is_some_and(|write| write.arrived)
            }
        }
    }

    /// Takes a received buffer: so many bytes, or an end of the connection.
    pub(super) fn received(&mut self, buf: Option<OwnedBuf>, result: Result<u32, ()>) {
        self.buf = buf;
        let Ok(bytes @ 1..) = result else {
            self.broken = true;
            return;
        };
        let direct = bytes.min(self.direct);
        self.direct = 0;
        self.start = 0;
        self.end = (bytes - direct) as usize;
        if direct > 0
            && let Phase::Transmission(t) = &mut self.phase
        {
            match t.decoder.payload_received(direct) {
                Ok(true) => self.payload_complete(),
                Ok(false) => {}
                Err(_) => self.broken = true,
            }
        }
    }

    /// Takes the completion of a send.
    pub(super) fn sent(&mut self, buf: Option<OwnedBuf>, failed: bool, host: &mut impl Host) {
        self.send_buf = buf;
        host.free_slots(&self.sending);
        self.sending.clear();
        self.broken |= failed;
    }

    /// Takes the core's answer to a request.
    pub(super) fn answered(
        &mut self,
        asked: Asked,
        result: Result<(), Failure>,
        host: &mut impl Host,
    ) {
        self.in_core -= 1;
        let Phase::Transmission(t) = &mut self.phase else {
            return;
        };
        let Asked { cookie, read, .. } = asked;
        match (result, read) {
            (Ok(()), None) => self
                .replies
                .push_back(Reply::Header(t.replier.done(cookie))),
            (Ok(()), Some((range, df, slots))) => match t.replier.read(cookie, range, df).rest() {
                Some(header) => {
                    self.replies.push_back(Reply::Read {
                        header,
                        range,
                        slots,
                        sent: 0,
                    });
                }
                None => host.free_slots(&slots),
            },
            (Err(failure), read) => {
                if let Some((.., slots)) = read {
                    host.free_slots(&slots);
                }
                let refusal = refusal_of(failure);
                self.refuse(cookie, refusal);
            }
        }
    }

    /// Takes the answer to a question about a part of the volume.
    pub(super) fn described(&mut self, asked: StatusAsked, extents: Vec<Extent>) {
        self.in_core -= 1;
        let Phase::Transmission(t) = &self.phase else {
            return;
        };
        let mut out = Vec::new();
        let (cookie, id) = (asked.cookie, BASE_ALLOCATION_ID);
        t.replier
            .block_status(cookie, asked.range, asked.req_one, id, extents, &mut out);
        self.replies.push_back(Reply::Bytes(out));
    }

    fn refuse(&mut self, cookie: Cookie, refusal: Refusal) {
        if let Phase::Transmission(t) = &self.phase {
            let mut bytes = Vec::new();
            t.replier.error(cookie, refusal, &mut bytes);
            self.replies.push_back(Reply::Bytes(bytes));
        }
    }

    /// A new turn begins.
    pub(super) fn begin_turn(&mut self) {
        self.burst = BURST;
    }

    /// Does everything that can be done now: decode, send, receive, close.
    pub(super) fn pump(&mut self, index: u32, host: &mut impl Host, tokens: &Tokens) -> Pumped {
        if self.closing || self.reader == Reader::Waiting {
            return Pumped::Waits;
        }
        if !self.broken {
            self.work(index, host);
        }
        let quiet = self.in_core == 0 && self.replies.is_empty() && self.send_buf.is_some();
        if self.broken || (self.finishing && quiet) {
            let op = Op::Close { file: self.file };
            let (ring, _) = host.wire();
            let token = tokens.close(index, self.generation);
            self.closing = ring.submit(op, token).is_ok();
            return if self.closing {
                Pumped::Waits
            } else {
                Pumped::RingFull
            };
        }
        if !(self.send(index, host, tokens) && self.receive(index, host, tokens)) {
            return Pumped::RingFull;
        }
        let has_more = self.burst == 0 && self.start < self.end && self.may_take();
        if has_more {
            Pumped::HasMore
        } else {
            Pumped::Waits
        }
    }

    /// Whether another request could be taken.
    fn may_take(&self) -> bool {
        !self.finishing && !self.broken && !self.is_stalled() && self.in_core < REQUESTS
    }

    fn work(&mut self, index: u32, host: &mut impl Host) {
        if self.is_stalled() {
            self.retry_stalled(index, host);
            if !self.is_stalled() {
                // With its next request it waits behind the others.
                self.waits_since = None;
            }
        }
        let Some(buf) = self.buf.take() else { return };
        while self.start < self.end && self.burst > 0 && self.may_take() {
            let input = &buf.bytes()[self.start..self.end];
            match &mut self.phase {
                Phase::Handshake(..) => self.shake_hands(&buf),
                Phase::Transmission(t) => match t.decoder.decode(input) {
                    Ok(step) => {
                        let taken = &input[..step.consumed];
                        self.start += step.consumed;
                        self.decoded(index, step.decoded, taken, host);
                    }
                    Err(_) => self.broken = true,
                },
            }
        }
        self.buf = Some(buf);
    }

    fn shake_hands(&mut self, buf: &OwnedBuf) {
        let Phase::Handshake(handshake, exports) = &mut self.phase else {
            return;
        };
        let mut out = Vec::new();
        let progress = handshake.advance(&buf.bytes()[self.start..self.end], &mut out);
        if !out.is_empty() {
            self.replies.push_back(Reply::Bytes(out));
        }
        let Ok(progress) = progress else {
            self.finishing = true;
            return;
        };
        self.start += progress.consumed;
        match progress.status {
            Status::NeedMore | Status::SendReplies => {}
            Status::Close => self.finishing = true,
            Status::Transmission(session) => match exports.export(session.export) {
                None => self.broken = true,
                Some(export) => {
                    let limits = Limits::default();
                    let transmission = Transmission {
                        decoder: Decoder::new(export, &session, &limits),
                        replier: Replier::new(&session, &limits),
                        write: None,
                        stalled: None,
                    };
                    self.phase = Phase::Transmission(Box::new(transmission));
                }
            },
        }
    }

    fn decoded(&mut self, index: u32, decoded: Decoded, taken: &[u8], host: &mut impl Host) {
        match decoded {
            Decoded::NeedMore | Decoded::Skip { .. } => {}
            Decoded::Request(command) => self.command(index, command, host),
            Decoded::Refused { cookie, refusal } => self.refuse(cookie, refusal),
            Decoded::Disconnect => self.finishing = true,
            Decoded::Payload { at, last, .. } => {
                let Phase::Transmission(t) = &mut self.phase else {
                    return;
                };
                let Some(write) = &mut t.write else { return };
                write.copy_payload(at, taken, host.mem());
                if last {
                    write.arrived = true;
                    self.insert(index, host);
                }
            }
        }
    }

    fn payload_complete(&mut self) {
        if let Phase::Transmission(t) = &mut self.phase
            && let Some(write) = &mut t.write
        {
            write.arrived = true;
        }
    }

    fn receive(&mut self, index: u32, host: &mut impl Host, tokens: &Tokens) -> bool {
        if self.buf.is_none() || self.start < self.end || !self.may_take() {
            return true;
        }
        let Some(buf) = self.buf.take() else {
            return true;
        };
        let (ring, segs) = host.wire();
        segs.clear();
        self.direct = 0;
        let mut with_buffer = true;
        if let Phase::Transmission(t) = &self.phase
            && let Some(write) = &t.write
            && t.decoder.payload_left() >= DIRECT_BYTES
        {
            let left = t.decoder.payload_left();
            self.direct = write.push_rest(left, SEGMENTS - 1, segs);
            with_buffer = self.direct == left;
        }
        if with_buffer {
            let length = u32::try_from(buf.len()).expect("a small constant");
            segs.push(Seg::buf(0, length));
        }
        let memory = Memory::with_buf(segs, buf);
        let op = Op::Recv {
            file: self.file,
            memory,
        };
        match ring.submit(op, tokens.receive(index, self.generation)) {
            Ok(_) => true,
            Err(refused) => {
                self.direct = 0;
                if let Op::Recv { memory, .. } = refused.op {
                    self.buf = memory.buf;
                }
                (self.start, self.end) = (0, 0);
                false
            }
        }
    }

    fn send(&mut self, index: u32, host: &mut impl Host, tokens: &Tokens) -> bool {
        if self.replies.is_empty() {
            return true;
        }
        let (ring, segs) = host.wire();
        if ring.room() == 0 {
            return false;
        }
        let Some(mut buf) = self.send_buf.take() else {
            return true;
        };
        segs.clear();
        let mut packer = Packer {
            segs,
            used: 0,
            done: &mut self.sending,
        };
        while let Some(reply) = self.replies.front_mut() {
            if !packer.add(reply, buf.bytes_mut()) {
                break;
            }
            self.replies.pop_front();
        }
        let memory = Memory::with_buf(segs, buf);
        let op = Op::Send {
            file: self.file,
            memory,
        };
        // There is room: only a socket that is closed already can be refused.
        let token = tokens.send(index, self.generation);
        self.broken |= ring.submit(op, token).is_err();
        !self.broken
    }

    /// Gives back everything that the connection holds; nothing of it is in the kernel any more.
    pub(super) fn release(mut self, host: &mut impl Host) {
        if let Reader::Pinned(generation) = self.reader {
            host.unpin(generation);
        }
        let sending = std::mem::take(&mut self.sending);
        host.free_slots(&sending);
        for reply in self.replies.drain(..) {
            if let Reply::Read { slots, sent, .. } = reply {
                host.free_slots(&slots[sent..]);
            }
        }
        if let Phase::Transmission(t) = &mut self.phase
            && let Some(write) = t.write.take()
        {
            host.free_slots(&write.slots);
        }
    }
}

impl Asked {
    /// The client is gone: gives the slots back.
    pub(super) fn release(self, host: &mut impl Host) {
        if let Some((.., slots)) = self.read {
            host.free_slots(&slots);
        }
    }
}
