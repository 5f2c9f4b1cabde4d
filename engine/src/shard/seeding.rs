//! Reading pieces of the backing for a full copy, and leaving out what need not travel.
//!
//! Several pieces are read at the same time, and sent in order.
//!
//! Holes are not read. What was read is cut where longer runs of zeroes begin and end. Zeroes are
//! gathered until something else or the end of the volume follows, and sent as one piece, so that
//! neither a large hole nor a device full of zeroes costs more than a few messages.

use std::collections::VecDeque;

use super::engine::Engine;
use super::link::FromShard;
use crate::core::event::{Contents, Event, PeerEvent, PeerId, SeedPiece, SeedSent};
use crate::device::Extent;
use crate::ring::OwnedBuf;

/// Zeroes shorter than this are sent as data: a piece costs a message here and a write there.
const ZERO_UNIT: usize = 16 << 10;
/// A run of zeroes ends here, so that the other side's progress is recorded now and then.
const ZERO_RUN_MAX: u64 = 1 << 30;

/// A part of a full copy that is not on its way yet.
#[derive(Debug)]
enum Part {
    /// It is being read, from here on.
    Reading { offset: u64 },
    /// It was read, unless that failed.
    Read { offset: u64, data: Option<OwnedBuf> },
    /// Nothing is there.
    Hole { offset: u64, bytes: u64 },
    /// The peer has it.
    Same { offset: u64, bytes: u64 },
}

/// Zeroes that were found and not sent yet.
#[derive(Clone, Copy, Debug)]
struct Run {
    offset: u64,
    bytes: u64,
}

/// A copy for a peer.
#[derive(Debug, Default)]
struct Outgoing {
    session: u64,
    /// In the order of the volume.
    parts: VecDeque<Part>,
    run: Option<Run>,
}

/// What is under way for full copies.
#[derive(Debug, Default)]
pub(super) struct Seeding {
    /// For each peer.
    copies: Vec<Outgoing>,
    /// Told to the core after its step.
    answers: VecDeque<(PeerId, PeerEvent)>,
}

impl Seeding {
    /// What an earlier session left is forgotten.
    fn copy(&mut self, peer: PeerId, session: u64) -> &mut Outgoing {
        let index = usize::from(peer.0);
        if self.copies.len() <= index {
            self.copies.resize_with(index + 1, Outgoing::default);
        }
        let copy = &mut self.copies[index];
        if copy.session != session {
            *copy = Outgoing {
                session,
                ..Outgoing::default()
            };
        }
        copy
    }

    fn answer(&mut self, peer: PeerId, event: PeerEvent) {
        self.answers.push_back((peer, event));
    }
}

impl Engine {
    fn copy_to(&mut self, peer: PeerId) -> &mut Outgoing {
        let session = self.session(peer);
        self.seeding.copy(peer, session)
    }

    /// Carries out [`crate::core::Action::SeedRead`].
    pub(super) fn seed_read(&mut self, peer: PeerId, offset: u64, (bytes, wanted): (u64, u64)) {
        let size = self.config().identity.size_bytes;
        let (part, bytes) = match self.disks.extent(offset, size) {
            Extent::Hole(hole) => {
                let bytes = hole.min(ZERO_RUN_MAX).min(wanted);
                (Part::Hole { offset, bytes }, bytes)
            }
            Extent::Data(data) => {
                let session = self.session(peer);
                let bytes = bytes.min(data);
                self.disks
                    .read_piece(&mut self.ring, (peer, session), offset, bytes);
                (Part::Reading { offset }, bytes)
            }
        };
        self.copy_to(peer).parts.push_back(part);
        self.seeding.answer(peer, PeerEvent::SeedPart(bytes));
        self.ship_parts(peer);
    }

    /// Carries out [`crate::core::Action::SeedSame`].
    pub(super) fn seed_same(&mut self, peer: PeerId, offset: u64, bytes: u64) {
        let part = Part::Same { offset, bytes };
        self.copy_to(peer).parts.push_back(part);
        self.ship_parts(peer);
    }

    /// Tells the core what became of its questions about full copies.
    pub(super) fn answer_copies(&mut self) {
        // Bounded by the peers' credit: what is sent for a hole is charged too.
        while let Some((peer, event)) = self.seeding.answers.pop_front() {
            self.step_once(Event::Peer { peer, event });
        }
    }

    /// A piece was read, or could not be.
    pub(super) fn piece_read(&mut self, peer: PeerId, offset: u64, data: Option<OwnedBuf>) {
        let parts = &mut self.copy_to(peer).parts;
        let reads =
            |part: &&mut Part| matches!(part, Part::Reading { offset: at } if *at == offset);
        if let Some(part) = parts.iter_mut().find(reads) {
            *part = Part::Read { offset, data };
        }
        self.ship_parts(peer);
        self.answer_copies();
    }

    /// Sends what is ready, in order.
    fn ship_parts(&mut self, peer: PeerId) {
        loop {
            let parts = &mut self.copy_to(peer).parts;
            if let None | Some(Part::Reading { .. }) = parts.front() {
                return;
            }
            let part = parts.pop_front();
            let sent = part.and_then(|part| self.ship(peer, part));
            if sent.is_none() {
                // The copy ends here; what follows would leave a gap.
                self.copy_to(peer).parts.clear();
            }
            self.seeding.answer(peer, PeerEvent::SeedReadDone(sent));
        }
    }

    fn ship(&mut self, peer: PeerId, part: Part) -> Option<SeedSent> {
        let (bytes, cost) = match part {
            Part::Reading { .. } | Part::Read { data: None, .. } => return None,
            Part::Hole { offset, bytes } => (bytes, self.gather(peer, offset, bytes)),
            Part::Same { offset, bytes } => {
                let zeroes = self.send_zeroes(peer);
                let same = self.send_piece(peer, offset, bytes, Contents::Same);
                (bytes, zeroes + same)
            }
            Part::Read {
                offset,
                data: Some(data),
            } => (
                data.len() as u64,
                self.ship_data(peer, offset, data.bytes()),
            ),
        };
        Some(SeedSent { bytes, cost })
    }

    /// Sends what was read, but for zeroes at its end. Gives the cost.
    fn ship_data(&mut self, peer: PeerId, offset: u64, data: &[u8]) -> u64 {
        let mut cost = 0;
        for (at, run, zero) in runs(data) {
            let offset = offset + at as u64;
            cost += if zero {
                self.gather(peer, offset, run.len() as u64)
            } else {
                let zeroes = self.send_zeroes(peer);
                let contents = Contents::Data(run.to_vec());
                zeroes + self.send_piece(peer, offset, run.len() as u64, contents)
            };
        }
        cost
    }

    /// Adds zeroes to what is to be sent. Gives the cost of what was sent.
    fn gather(&mut self, peer: PeerId, offset: u64, bytes: u64) -> u64 {
        let mut cost = 0;
        let grown = self.copy_to(peer).run.and_then(|run| {
            let continues = run.offset + run.bytes == offset;
            let bytes = run.bytes + bytes;
            (continues && bytes <= ZERO_RUN_MAX).then_some(Run { bytes, ..run })
        });
        let run = match grown {
            Some(run) => run,
            None => {
                cost += self.send_zeroes(peer);
                Run { offset, bytes }
            }
        };
        self.copy_to(peer).run = Some(run);
        if run.offset + run.bytes == self.config().identity.size_bytes {
            cost += self.send_zeroes(peer);
        }
        cost
    }

    /// Sends the zeroes that were gathered.
    fn send_zeroes(&mut self, peer: PeerId) -> u64 {
        match self.copy_to(peer).run.take() {
            Some(run) => self.send_piece(peer, run.offset, run.bytes, Contents::Zeroes),
            None => 0,
        }
    }

    fn send_piece(&mut self, peer: PeerId, offset: u64, bytes: u64, contents: Contents) -> u64 {
        let piece = SeedPiece {
            offset,
            bytes,
            contents,
        };
        let cost = piece.cost();
        self.outbox.push(FromShard::Piece {
            peer,
            session: self.session(peer),
            piece,
        });
        cost
    }
}

/// Cuts a piece into runs of zeroes and of data: offset, bytes, and whether they are zeroes.
fn runs(bytes: &[u8]) -> Vec<(usize, &[u8], bool)> {
    let mut all: Vec<(usize, &[u8], bool)> = Vec::new();
    for (index, unit) in bytes.chunks(ZERO_UNIT).enumerate() {
        let at = index * ZERO_UNIT;
        let zero = is_zero(unit);
        match all.last_mut() {
            Some((start, run, same)) if *same == zero => *run = &bytes[*start..at + unit.len()],
            _ => all.push((at, unit, zero)),
        }
    }
    all
}

/// Without a branch for each byte.
fn is_zero(bytes: &[u8]) -> bool {
    let or = |chunk: &[u8]| chunk.iter().fold(0, |all, byte| all | byte);
    bytes.chunks(256).all(|chunk| or(chunk) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_cut_where_zeroes_begin_and_end_and_nothing_is_left_out() {
        let mut bytes = vec![0; 5 * ZERO_UNIT + 4096];
        bytes[ZERO_UNIT + 1] = 1;
        bytes[2 * ZERO_UNIT] = 1;
        bytes[5 * ZERO_UNIT + 4095] = 1;
        let cut = runs(&bytes);
        let shape = cut.iter().map(|(at, run, zero)| (*at, run.len(), *zero));
        let shape: Vec<_> = shape.collect();
        let unit = ZERO_UNIT;
        assert_eq!(
            shape,
            [
                (0, unit, true),
                (unit, 2 * unit, false),
                (3 * unit, 2 * unit, true),
                (5 * unit, 4096, false),
            ]
        );
        assert_eq!(runs(&bytes[..unit]), [(0, &bytes[..unit], true)]);
        assert_eq!(runs(&[]), []);
    }
}
