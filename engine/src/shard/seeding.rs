//! Reading pieces of the backing for a full copy, and leaving out what need not travel.
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

/// Zeroes that were found for a peer and not sent yet.
#[derive(Clone, Copy, Debug)]
struct Run {
    session: u64,
    offset: u64,
    bytes: u64,
}

/// What is under way for full copies.
#[derive(Debug, Default)]
pub(super) struct Seeding {
    /// For each peer.
    runs: Vec<Option<Run>>,
    /// What needed no read, since it is a hole or the same; told to the core after its step.
    answers: VecDeque<(PeerId, SeedSent)>,
}

impl Engine {
    /// Carries out [`crate::core::Action::SeedRead`].
    pub(super) fn seed_read(&mut self, peer: PeerId, offset: u64, (bytes, wanted): (u64, u64)) {
        let size = self.config().identity.size_bytes;
        match self.disks.extent(offset, size) {
            Extent::Hole(hole) => {
                let bytes = hole.min(ZERO_RUN_MAX).min(wanted);
                let cost = self.gather(peer, offset, bytes);
                self.seeding
                    .answers
                    .push_back((peer, SeedSent { bytes, cost }));
            }
            Extent::Data(data) => {
                let session = self.session(peer);
                let bytes = bytes.min(data);
                self.disks
                    .read_piece(&mut self.ring, (peer, session), offset, bytes);
            }
        }
    }

    /// Carries out [`crate::core::Action::SeedSame`].
    pub(super) fn seed_same(&mut self, peer: PeerId, offset: u64, bytes: u64) {
        let zeroes = self.send_zeroes(peer);
        let cost = zeroes + self.send_piece(peer, offset, bytes, Contents::Same);
        let sent = SeedSent { bytes, cost };
        self.seeding.answers.push_back((peer, sent));
    }

    /// The next answer that did not need the disk.
    pub(super) fn next_unread(&mut self) -> Option<Event> {
        let (peer, sent) = self.seeding.answers.pop_front()?;
        let event = PeerEvent::SeedReadDone(Some(sent));
        Some(Event::Peer { peer, event })
    }

    /// A piece was read, or could not be.
    pub(super) fn ship_piece(&mut self, peer: PeerId, offset: u64, data: Option<OwnedBuf>) {
        let sent = data.map(|data| {
            let mut cost = 0;
            for (at, run, zero) in runs(data.bytes()) {
                let offset = offset + at as u64;
                cost += if zero {
                    self.gather(peer, offset, run.len() as u64)
                } else {
                    let zeroes = self.send_zeroes(peer);
                    let contents = Contents::Data(run.to_vec());
                    zeroes + self.send_piece(peer, offset, run.len() as u64, contents)
                };
            }
            let bytes = data.len() as u64;
            SeedSent { bytes, cost }
        });
        let event = PeerEvent::SeedReadDone(sent);
        self.step(Event::Peer { peer, event });
    }

    /// Adds zeroes to what is to be sent. Gives the cost of what was sent.
    fn gather(&mut self, peer: PeerId, offset: u64, bytes: u64) -> u64 {
        let index = usize::from(peer.0);
        if self.seeding.runs.len() <= index {
            self.seeding.runs.resize(index + 1, None);
        }
        let session = self.session(peer);
        let mut cost = 0;
        let grown = self.seeding.runs[index].and_then(|run| {
            let continues = run.session == session && run.offset + run.bytes == offset;
            let bytes = run.bytes + bytes;
            (continues && bytes <= ZERO_RUN_MAX).then_some(Run { bytes, ..run })
        });
        let run = match grown {
            Some(run) => run,
            None => {
                cost += self.send_zeroes(peer);
                Run {
                    session,
                    offset,
                    bytes,
                }
            }
        };
        self.seeding.runs[index] = Some(run);
        if run.offset + run.bytes == self.config().identity.size_bytes {
            cost += self.send_zeroes(peer);
        }
        cost
    }

    /// Sends the zeroes that were gathered. Those of an earlier session are forgotten.
    fn send_zeroes(&mut self, peer: PeerId) -> u64 {
        let run = self.seeding.runs.get_mut(usize::from(peer.0));
        match run.and_then(Option::take) {
            Some(run) if run.session == self.session(peer) => {
                self.send_piece(peer, run.offset, run.bytes, Contents::Zeroes)
            }
            _ => 0,
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
