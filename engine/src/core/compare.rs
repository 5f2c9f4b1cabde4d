//! What goes into the shadow: the parts of pieces that differ from the backing, and epochs, as
//! entries one behind the other (see `shadow`).
//!
//! One operation is on its way at a time. If the attempt is given up meanwhile, its completion is
//! recognised as stale.

use std::ops::Range;

use hn4::log::frame::FrameParams;
use hn4::types::{BLOCK_BYTES, BlockIndex, Epoch, LogOffset};

use super::event::{Action, Actions, Disk, Io, IoToken, PeerMessage, Seg};
use super::mutants::{Mutant, planted};
use super::overlay::{DirtyBlock, FULL};
use super::seal::{Zeros, build_records, encode_to_slots};
use super::shadow::{Place, ShadowIo, ShadowIoKind, Step, shadowing};
use super::volume::{Volume, free_all};
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// Most blocks of payload in an entry. With its head it must be read into the slots that nothing
/// else may take.
const ENTRY_BLOCKS: usize = 64;
/// Blocks that are compared with zeroes in one go, where slots are plenty.
const ZERO_BLOCKS: usize = 256;
/// Zeroed extents in an entry.
const ENTRY_ZEROS: usize = 128;

impl Volume {
    fn entry_blocks(&self) -> usize {
        // Half of the reserve is for us; heads are taken from it too.
        (self.config.reserve_slots / 2)
            .saturating_sub(4)
            .clamp(1, ENTRY_BLOCKS)
    }

    /// Reads what the backing holds where the next part of the piece belongs.
    pub(super) fn compare(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let Some(shadow) = &self.replica.shadow else {
            return;
        };
        let Some(piece) = shadow.pieces.front() else {
            return;
        };
        let plenty = mem.free_slots() > 2 * self.config.reserve_slots + ZERO_BLOCKS;
        let most = match piece.data() {
            None if plenty => ZERO_BLOCKS,
            _ => self.entry_blocks(),
        };
        let left = (piece.bytes - shadow.piece_done) / BLOCK_BYTES;
        let count = usize::try_from(left).map_or(most, |left| left.min(most));
        if mem.free_slots() < count + 4 {
            return;
        }
        let slots: Option<Vec<SlotId>> = (0..count).map(|_| mem.alloc()).collect();
        let slots = slots.expect("room was checked");
        let offset = piece.offset + shadow.piece_done;
        let io = Io::Read {
            disk: Disk::Backing,
            offset,
            segs: whole(&slots, out),
        };
        self.start_shadow_io(ShadowIoKind::Compare { slots }, io, out);
    }

    fn start_shadow_io(&mut self, kind: ShadowIoKind, io: Io, out: &mut Actions) {
        self.replica.shadow_io = Some(ShadowIo { kind, stale: false });
        let token = IoToken::Shadow;
        out.push(Action::Io { token, io });
    }

    pub(super) fn flush_shadow(&mut self, out: &mut Actions) {
        let Some(shadow) = &self.replica.shadow else {
            return;
        };
        let at = shadow.done;
        if planted(Mutant::ShadowNotFlushed) {
            return self.shadow_flushed(at);
        }
        let io = Io::Fsync { disk: Disk::Shadow };
        self.start_shadow_io(ShadowIoKind::Flush { at }, io, out);
    }

    fn shadow_flushed(&mut self, at: Place) {
        let Some(shadow) = &mut self.replica.shadow else {
            return;
        };
        // Epochs come again in the next session: only pieces count for it.
        let counts = at.volume > shadow.flushed.volume;
        shadow.flushed = at;
        if counts {
            self.superblock.desired.copy = shadowing(at, shadow.origin.from);
            self.superblock.dirty = true;
        }
    }

    pub(super) fn shadow_io_done(
        &mut self,
        result: Result<(), i32>,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        let io = self.replica.shadow_io.take();
        let ShadowIo { kind, stale } = io.expect("completions come from operations on their way");
        if stale || self.replica.shadow.is_none() {
            if let ShadowIoKind::Compare { slots } | ShadowIoKind::Write { slots, .. } = kind {
                free_all(mem, &slots);
            }
            return;
        }
        match kind {
            // What cannot be read is to be replaced.
            ShadowIoKind::Compare { slots } => self.compared(slots, result.is_ok(), mem, out),
            ShadowIoKind::Write { slots, step } => {
                let bytes = slots.len() as u64 * BLOCK_BYTES;
                free_all(mem, &slots);
                match result {
                    Ok(()) => self.entry_written(bytes, step, out),
                    Err(errno) => self.shadow_failed(errno, out),
                }
            }
            ShadowIoKind::Flush { at } => match result {
                Ok(()) => self.shadow_flushed(at),
                Err(errno) => self.shadow_failed(errno, out),
            },
        }
    }

    fn shadow_failed(&mut self, errno: i32, out: &mut Actions) {
        let why = format!(
            "the shadow file, which takes what differs from the primary, cannot be written (error \
             {errno}); make room there"
        );
        self.pause_shadow(why, out);
    }

    /// Puts what differs into an entry. The slots hold what the backing has.
    fn compared(
        &mut self,
        slots: Vec<SlotId>,
        readable: bool,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        let shadow = self.replica.shadow.as_ref();
        let Some(shadow) = shadow.filter(|shadow| !shadow.pieces.is_empty()) else {
            return free_all(mem, &slots);
        };
        let piece = &shadow.pieces[0];
        let first = (piece.offset + shadow.piece_done) / BLOCK_BYTES;
        let bytes = slots.len() as u64 * BLOCK_BYTES;
        let start = usize::try_from(shadow.piece_done).unwrap_or(usize::MAX);
        let data = piece.data().and_then(|data| data.get(start..));
        let mut blocks = Vec::new();
        let mut zeros: Zeros = Vec::new();
        for (index, &slot) in slots.iter().enumerate() {
            let block = first + index as u64;
            let theirs =
                data.and_then(|data| data.get(index * SLOT_BYTES..(index + 1) * SLOT_BYTES));
            let ours = mem.bytes(slot);
            let equal = match theirs {
                Some(theirs) => ours == theirs,
                None => ours.iter().all(|&byte| byte == 0),
            };
            match theirs {
                _ if equal && readable => mem.free(slot),
                Some(theirs) => {
                    mem.bytes_mut(slot).copy_from_slice(theirs);
                    blocks.push(DirtyBlock {
                        block: BlockIndex(block),
                        slot,
                        mask: FULL,
                    });
                }
                None => {
                    mem.free(slot);
                    match zeros.last_mut() {
                        Some((range, _)) if range.end == block => range.end += 1,
                        _ => zeros.push((block..block + 1, true)),
                    }
                }
            }
        }
        if blocks.is_empty() && zeros.is_empty() {
            return self.entry_written(0, Step::Piece(bytes), out);
        }
        self.write_entry(blocks, &zeros, Step::Piece(bytes), mem, out);
    }

    /// Writes an entry at the end of the shadow. Takes the slots of the blocks.
    fn write_entry(
        &mut self,
        mut blocks: Vec<DirtyBlock>,
        zeros: &[(Range<u64>, bool)],
        step: Step,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        let Some(shadow) = &self.replica.shadow else {
            return;
        };
        let (lanes, records) = build_records(mem, self.config.lanes, &mut blocks, zeros);
        let persisted = self.superblock.persisted();
        let params = FrameParams {
            identity: &self.config.identity,
            epoch: shadow.origin.from.epoch.next(),
            offset: LogOffset(shadow.done.shadow),
            term: persisted.term,
            incarnation: persisted.incarnation,
            durable_through: Epoch(0),
            previous: shadow.origin.from.chain,
            sealed_ms: 0,
            checkpoint_mark: false,
            lanes: &lanes,
            records: &records,
            payload_bytes: blocks.len() as u64 * BLOCK_BYTES,
        };
        let mut scratch = Vec::new();
        let encoded = encode_to_slots(mem, &params, &mut scratch);
        let payload: Vec<SlotId> = blocks.iter().map(|dirty| dirty.slot).collect();
        let Some((header, _, mut slots)) = encoded else {
            // The next step compares again.
            return free_all(mem, &payload);
        };
        slots.extend(payload);
        let offset = shadow.done.shadow;
        if offset + header.frame_bytes > self.config.shadow_space_bytes {
            free_all(mem, &slots);
            return self.shadow_is_full(out);
        }
        let io = Io::Write {
            disk: Disk::Shadow,
            offset,
            segs: whole(&slots, out),
            then_fsync: false,
        };
        self.start_shadow_io(ShadowIoKind::Write { slots, step }, io, out);
    }

    fn shadow_is_full(&mut self, out: &mut Actions) {
        let Some(shadow) = &self.replica.shadow else {
            return;
        };
        let (done, size) = (shadow.done.volume, self.config.identity.size_bytes);
        let mib = |bytes: u128| bytes.div_ceil(1 << 20);
        let used = u128::from(self.config.shadow_space_bytes);
        let about = used * u128::from(size) / u128::from(done.max(1));
        let why = format!(
            "what differs from the primary has no room in the shadow file: its {} MiB \
             (shadow_space_mib) are full after {} of {} MiB of the volume, so about {} MiB will be \
             needed, and as much as the primary's log has in use",
            mib(used),
            mib(done.into()),
            mib(size.into()),
            mib(about),
        );
        self.pause_shadow(why, out);
    }

    fn entry_written(&mut self, bytes: u64, step: Step, out: &mut Actions) {
        let source = self.replica.source;
        let Some(shadow) = &mut self.replica.shadow else {
            return;
        };
        shadow.done.shadow += bytes;
        match step {
            Step::Piece(part) => {
                shadow.done.volume += part;
                shadow.piece_done += part;
                let whole = shadow
                    .pieces
                    .front()
                    .map(|piece| (piece.bytes, piece.cost()));
                if let Some((_, cost)) = whole.filter(|(bytes, _)| *bytes == shadow.piece_done) {
                    shadow.pieces.pop_front();
                    shadow.piece_done = 0;
                    shadow.queued_cost -= cost;
                    if let Some(source) = source.filter(|_| !shadow.detached) {
                        out.peer(source, PeerMessage::Credit(cost));
                    }
                }
            }
            Step::Epoch { blocks, zeros } => {
                let Some(work) = &mut shadow.epoch else {
                    return;
                };
                (work.next_block, work.next_zero) = (blocks, zeros);
            }
        }
    }

    /// Writes the next part of an epoch. Nothing of an epoch overlaps, so the order is free.
    pub(super) fn write_part(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        let most = self.entry_blocks();
        let Some(work) = self.replica.shadow.as_ref().and_then(|s| s.epoch.as_ref()) else {
            return;
        };
        let blocks = work.next_block..work.blocks.len().min(work.next_block + most);
        let zeros = work.next_zero..work.zeros.len().min(work.next_zero + ENTRY_ZEROS);
        if mem.free_slots() < blocks.len() + 4 {
            return;
        }
        let payload = usize::try_from(work.head.header.head_bytes).unwrap_or(usize::MAX);
        let mut dirty = Vec::with_capacity(blocks.len());
        for index in blocks.clone() {
            let (block, mask) = work.blocks[index];
            let at = payload + index * SLOT_BYTES;
            let slot = mem.alloc().expect("room was checked");
            mem.bytes_mut(slot)
                .copy_from_slice(&work.frame[at..at + SLOT_BYTES]);
            dirty.push(DirtyBlock { block, slot, mask });
        }
        let part = work.zeros[zeros.clone()].to_vec();
        let step = Step::Epoch {
            blocks: blocks.end,
            zeros: zeros.end,
        };
        self.write_entry(dirty, &part, step, mem, out);
    }
}

/// Segments for whole slots.
pub(super) fn whole(slots: &[SlotId], out: &mut Actions) -> Range<usize> {
    let first = out.segs.len();
    let bytes = u16::try_from(SLOT_BYTES).expect("4096");
    out.segs.extend(slots.iter().map(|&slot| Seg {
        slot,
        offset: 0,
        bytes,
    }));
    first..out.segs.len()
}
