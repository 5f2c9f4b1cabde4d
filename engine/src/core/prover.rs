//! What the core has to do with proofs: it hands durable frames to a prover, keeps log that is not
//! proven yet, and lets a replica destage only what is.
//!
//! The prover is one more reader of the log. It hashes, signs and keeps the ledger elsewhere, off
//! the path of writes and flushes; what it says here is one place in the history: everything up to
//! it is in this node's ledger. A frame is handed over from memory at the moment it becomes
//! durable if the prover has granted room for it, and read back from the log otherwise.
//!
//! **Invariant:** proven <= durable. A prover that stops, stops nothing but the reuse of log, and
//! at last the clients (P8).
//!
//! Not here: leaves, batches, anchors, signatures (`hn4_proof`); who sends anchors to whom.

use std::collections::VecDeque;

use hn4::log::{CopyState, FrameHead, Role};
use hn4::types::Epoch;

use super::event::{Action, Actions, ProofEvent, Tip};
use super::mutants::{Mutant, planted};
use super::volume::{Volume, free_all};
use crate::arena::{SLOT_BYTES, SlotId, SlotMemory};

/// Frames are read from the log in runs of at most so many bytes.
const READ_BYTES: u64 = 1 << 20;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Prover {
    /// It has started, and takes frames.
    on: bool,
    /// The next epoch that it is to get.
    next: Epoch,
    credit: i64,
    reading: bool,
    /// The frames being read belong to a history that was cut meanwhile.
    stale_read: bool,
    /// Everything up to here is in the ledger of this node, or was before this log began.
    pub(super) proven: Tip,
    /// A replica destages only what is proven.
    pub(super) gate: bool,
    /// Heads of durable frames that can still be handed over from memory, oldest first.
    heads: VecDeque<(Epoch, Vec<SlotId>)>,
    /// So many of them were handed over in the last step.
    handed: usize,
    /// It refused a log that a shadow is about to replace, and follows nobody any more.
    pub(super) parted: bool,
}

impl Prover {
    pub(super) fn new(gate: bool, proven: Tip) -> Self {
        Self {
            gate,
            proven,
            ..Self::default()
        }
    }

    /// It does not work and holds nothing: the case for which every step asks.
    #[inline]
    pub(super) fn is_unused(&self) -> bool {
        !self.on && self.heads.is_empty()
    }

    fn spend(&mut self, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.credit = self.credit.saturating_sub(bytes);
    }
}

/// What lies in the slots of a frame's head, without stamp, and of its payload.
pub(crate) fn frame_in(head: &[SlotId], payload: &[SlotId], mem: &dyn SlotMemory) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((head.len() + payload.len()) * SLOT_BYTES);
    for &slot in head.iter().chain(payload) {
        bytes.extend_from_slice(mem.bytes(slot));
    }
    hn4::log::Stamp::clear(&mut bytes);
    bytes
}

impl Volume {
    /// All epochs up to this one are in this node's ledger.
    #[must_use]
    pub fn proven(&self) -> Tip {
        self.prover.proven
    }

    /// The epoch after which the log is kept for the prover.
    pub(super) fn proof_hold(&self) -> Option<Epoch> {
        // A node that steps down keeps it, too: it may be primary again.
        let holds = self.role() != Role::Replica || self.prover.gate;
        (self.config.prove && holds).then_some(self.prover.proven.epoch)
    }

    /// The newest epoch that the proofs let a replica destage.
    pub(super) fn proof_gate(&self) -> Epoch {
        let gated = self.config.prove && self.prover.gate && self.role() == Role::Replica;
        if gated && !planted(Mutant::DestageUnproven) {
            self.prover.proven.epoch
        } else {
            Epoch(u64::MAX)
        }
    }

    /// Whether the prover works, and has not put all that is durable into the ledger yet.
    #[must_use]
    pub fn awaits_proof(&self) -> bool {
        self.prover.on && self.prover.proven.epoch < self.journal.durable()
    }

    /// Bytes of log that are not proven yet; 0 where nothing is to be proven.
    #[must_use]
    pub fn proof_lag_bytes(&self) -> u64 {
        let next = self.proof_hold().map(Epoch::next);
        let info = next.and_then(|next| self.journal.info(next));
        info.map_or(0, |info| self.journal.tail().0 - info.offset.0)
    }

    /// Whether so much log is unproven that clients are held back.
    #[must_use]
    pub fn is_proof_lagging(&self) -> bool {
        self.config.prove
            && self.role() == Role::Primary
            && self.proof_lag_bytes() / 3 > self.journal.ring_bytes() / 4
    }

    pub(super) fn proof_event(&mut self, event: ProofEvent, out: &mut Actions) {
        if !self.config.prove {
            return;
        }
        match event {
            ProofEvent::Start { after, credit } => {
                self.prover.on = true;
                self.prover.credit = i64::try_from(credit).unwrap_or(i64::MAX);
                self.prover.stale_read = self.prover.reading;
                // The log may have been cut while no prover was at work, and have grown again.
                let known = self.journal.chain(after.epoch) == Some(after.chain);
                self.prover.proven = if known { after } else { self.journal.base };
                self.prover.next = self.prover.proven.epoch.next();
                out.push(Action::ProofCut(self.prover.proven));
            }
            ProofEvent::Credit(bytes) => {
                let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
                self.prover.credit = self.prover.credit.saturating_add(bytes);
            }
            ProofEvent::Proven(tip) => self.became_proven(tip),
            ProofEvent::Gate(gate) => self.prover.gate = gate,
            ProofEvent::ReadDone { ok } => {
                self.prover.reading = false;
                // It is not read again and again: the prover is told that nothing more comes.
                self.prover.on &= ok || self.prover.stale_read;
                self.prover.stale_read = false;
            }
            ProofEvent::Refused { why, of } => self.proof_refused(why, of, out),
        }
    }

    fn became_proven(&mut self, tip: Tip) {
        let known = self.journal.chain(tip.epoch) == Some(tip.chain);
        let news = tip.epoch > self.prover.proven.epoch && tip.epoch <= self.journal.durable();
        if !(known && news) {
            return;
        }
        self.prover.proven = tip;
        let foreign = self.role() == Role::Replica && !self.has_own_tail();
        if foreign && tip.epoch > self.anchored.epoch {
            // Whoever signed it had it, and that was not this node before it was replaced.
            self.anchored = tip;
        }
    }

    /// What came from the primary is not what the primary signed: it is dropped back to what is
    /// proven, and fetched again. What this node has of its own did not come from there.
    fn proof_refused(&mut self, why: String, of: Option<Tip>, out: &mut Actions) {
        if self.role() != Role::Replica || self.transition.is_some() {
            return;
        }
        let proven = self.prover.proven;
        let Some(source) = self.replica.source else {
            return;
        };
        if let (Some(_), _) | (_, CopyState::Shadowing { .. }) =
            (&self.replica.shadow, self.superblock.desired.copy)
        {
            // Were the session ended, the copy that heals it would never come to its end.
            self.prover.parted = true;
            return;
        }
        if self.is_superseded(source) {
            // Its history may not be the one that counts: a promotion keeps what is here.
            return self.close_session(source, out);
        }
        // A slow prover may speak of a log that was cut back, or replaced by a shadow, since.
        let current = of.is_some_and(|of| self.journal.chain(of.epoch) == Some(of.chain));
        // Without the gate it may be in the backing already.
        let desired = &self.superblock.desired;
        if current
            && !self.has_own_tail()
            && proven.epoch >= desired.checkpoint.max(desired.swept)
            && self.journal.chain(proven.epoch) == Some(proven.chain)
            && self.replica.is_settled()
        {
            self.anchored = proven;
            self.replica.hint = None;
            self.replica.truncate_to = Some(proven);
        }
        self.reject(source, why, out);
    }

    /// Keeps the heads of frames that became durable after `before`, as far as there is room, to
    /// hand them over from memory.
    pub(super) fn keep_for_prover(&mut self, before: Epoch) {
        if !self.prover.on {
            return;
        }
        let room = self.config.reserve_slots / 4;
        let mut kept: usize = self.prover.heads.iter().map(|(_, head)| head.len()).sum();
        let mut epoch = before.next().max(self.prover.next);
        while epoch <= self.journal.durable()
            && let Some(sealed) = self.journal.sealed_mut(epoch)
            && kept + sealed.head.len() <= room
            && !sealed.head.is_empty()
        {
            kept += sealed.head.len();
            let head = std::mem::take(&mut sealed.head);
            self.prover.heads.push_back((epoch, head));
            epoch = epoch.next();
        }
    }

    /// Where the frame lies that [`Action::Prove`] named, until the next step: slots of its head,
    /// and of its payload. `None` if it was cut off in the same step.
    #[must_use]
    pub fn proof_slots(&self, epoch: Epoch) -> Option<(&[SlotId], Vec<SlotId>)> {
        let (_, head) = self.prover.heads.iter().find(|(of, _)| *of == epoch)?;
        let sealed = self.journal.sealed(epoch)?;
        let payload = sealed.blocks.iter().map(|dirty| dirty.slot).collect();
        Some((head, payload))
    }

    /// A copy of the frame that [`Action::Prove`] named, without stamp; see [`Self::proof_slots`].
    #[must_use]
    pub fn proof_frame(&self, epoch: Epoch, mem: &dyn SlotMemory) -> Option<Vec<u8>> {
        let (head, payload) = self.proof_slots(epoch)?;
        Some(frame_in(head, &payload, mem))
    }

    pub(super) fn free_handed_heads(&mut self, mem: &mut dyn SlotMemory) {
        let handed = std::mem::take(&mut self.prover.handed);
        for (_, head) in self.prover.heads.drain(..handed) {
            free_all(mem, &head);
        }
    }

    /// The log was cut back to a place: what follows is another history.
    pub(super) fn cut_prover(&mut self, to: Tip, mem: &mut dyn SlotMemory, out: &mut Actions) {
        while self
            .prover
            .heads
            .back()
            .is_some_and(|(of, _)| *of > to.epoch)
        {
            let last = self.prover.heads.pop_back();
            last.iter().for_each(|(_, head)| free_all(mem, head));
        }
        if self.prover.proven.epoch > to.epoch {
            self.prover.proven = to;
        }
        if self.prover.next > to.epoch.next() {
            self.restart_prover(to, out);
        }
    }

    /// The next frame that the prover gets follows this place.
    pub(super) fn restart_prover(&mut self, at: Tip, out: &mut Actions) {
        let prover = &mut self.prover;
        if prover.proven.epoch < self.journal.base.epoch {
            prover.proven = self.journal.base;
        }
        prover.next = at.epoch.next();
        prover.stale_read = prover.reading;
        if prover.on {
            out.push(Action::ProofCut(at));
        }
    }

    /// Whether frames that were read belong to the history as it is now.
    #[must_use]
    pub fn wants_proof_read(&self) -> bool {
        !self.prover.stale_read
    }

    /// Looks at what was read from the log for the prover. Where a write was lost, a whole frame of
    /// another history may lie: its header is struck out, so that it counts as the damage that it
    /// is.
    pub fn strike_out_foreign(&self, epoch: Epoch, frame: &mut [u8]) {
        let head = FrameHead::decode(&self.config.identity, frame);
        let known = self.journal.chain(epoch);
        let foreign = head.is_ok_and(|head| known.is_some_and(|known| head.chain != known));
        if foreign {
            frame[..SLOT_BYTES].fill(0);
        }
    }

    /// What may be signed. What a primary that opens pulls from a peer may still give way to what
    /// another one has.
    fn provable(&self) -> Epoch {
        let durable = self.journal.durable();
        match self.is_opening() {
            true => durable.min(self.anchored.epoch),
            false => durable,
        }
    }

    /// Hands over what can be handed over: from memory, and what could not be kept there from the
    /// log.
    pub(super) fn prover_progress(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        if !self.prover.on {
            // It takes nothing any more.
            let kept = self.prover.heads.drain(self.prover.handed..);
            kept.for_each(|(_, head)| free_all(mem, &head));
        }
        let provable = self.provable();
        if !self.prover.on || self.prover.reading || self.prover.next > provable {
            return;
        }
        if self.prover.next <= self.journal.base.epoch {
            // It was not kept for the prover: no gate asked for it.
            self.restart_prover(self.journal.base, out);
        }
        while self.prover.credit > 0
            && self.prover.next <= provable
            && let Some((epoch, _)) = self.prover.heads.get(self.prover.handed)
            && *epoch <= self.prover.next
        {
            let epoch = *epoch;
            let bytes = self.journal.sealed(epoch).map(|s| s.header.frame_bytes);
            let Some(bytes) = bytes.filter(|_| epoch == self.prover.next) else {
                // Destaged meanwhile, or read back already.
                let gone = self.prover.heads.remove(self.prover.handed);
                gone.iter().for_each(|(_, head)| free_all(mem, head));
                continue;
            };
            self.prover.spend(bytes);
            self.prover.handed += 1;
            self.prover.next = epoch.next();
            out.push(Action::Prove { epoch });
        }
        let kept = self.prover.heads.get(self.prover.handed);
        let end = kept.map_or(provable, |(epoch, _)| Epoch(epoch.0.saturating_sub(1)));
        let end = end.min(provable);
        if self.prover.credit > 0 && self.prover.next <= end {
            self.read_for_prover(end, out);
        }
    }

    fn read_for_prover(&mut self, end: Epoch, out: &mut Actions) {
        let Some((offset, mut frames)) = self.journal.run(self.prover.next, READ_BYTES) else {
            return;
        };
        frames.retain(|(epoch, _)| *epoch <= end);
        self.prover
            .spend(frames.iter().map(|(_, bytes)| bytes).sum());
        self.prover.next = frames.last().map_or(end, |(epoch, _)| *epoch).next();
        self.prover.reading = true;
        out.push(Action::ProofRead { offset, frames });
    }
}
