//! Destage as checkpoint, and the reuse of log space.
//!
//! **Invariant:** slots and log are freed by what the *persisted* superblock says, never by what is
//! merely planned.

use hn4::log::{CopyState, Role};
use hn4::types::{Epoch, LogOffset};

use super::event::{Action, Actions, Now, Time, Tip};
use super::mutants::{Mutant, planted};
use super::pace::Pace;
use super::sweep::{Sweep, SweepStep};
use super::volume::Volume;
use crate::arena::SlotMemory;

/// A sweep that nobody waits for uses this part of the depth.
const EASY: usize = 4;

impl Volume {
    /// The newest epoch that may go to the backing.
    fn destageable(&self) -> Epoch {
        let persisted = self.superblock.persisted();
        if persisted.session != self.journal.session {
            // The log was cut back or started anew, and the checkpoint may be of another history.
            return Epoch(0);
        }
        let copy = persisted.copy;
        if let CopyState::Seeding { until: None, .. } | CopyState::Fresh = copy {
            // Pieces of the full copy are still to come and would overwrite newer data.
            return Epoch(0);
        }
        if !matches!(copy, CopyState::Usable | CopyState::Seeding { .. })
            || self.superblock.desired.copy.is_shadowed()
        {
            // The backing is compared with a full copy, or is about to be, or is written over.
            return Epoch(0);
        }
        if planted(Mutant::DestageUnanchored) {
            return self.journal.durable();
        }
        if self.role() == Role::Fenced || self.has_own_tail() {
            // Perhaps nobody else has it: it stays in the log, where it can still be told apart.
            return Epoch(0);
        }
        let anchored = self.journal.durable().min(self.anchored.epoch);
        anchored.min(self.proof_gate()).min(self.secured())
    }

    /// Whether room is needed in log or overlay.
    pub(super) fn is_pressed(&self, mem: &dyn SlotMemory) -> bool {
        self.is_used(mem, 4)
    }

    /// Whether one of so many parts of log or overlay is in use, or another limit is near.
    fn is_used(&self, mem: &dyn SlotMemory, parts: u32) -> bool {
        let (used, ring) = self.log_usage();
        self.overlay.held() * parts as usize >= mem.capacity()
            || used * u64::from(parts) >= ring
            || mem.free_slots() < 2 * self.config.reserve_slots
            || self.overlay.zero_extents() * 2 >= self.config.max_zero_extents
    }

    /// Operations of a sweep that may be on their way at the same time. Where log and backing share
    /// a disk, a flush waits behind all of them: so while there is room, they are few.
    fn sweep_depth(&self, mem: &dyn SlotMemory) -> usize {
        let all = self.config.sweep_depth;
        let others = !self.pins.is_unused() || self.replica.wants_shadow || self.is_returning();
        if self.is_awaited() || others || self.is_used(mem, 2) {
            all
        } else {
            all.div_ceil(EASY)
        }
    }

    /// Whether somebody waits for the end of a sweep.
    fn is_awaited(&self) -> bool {
        let seeding = self.superblock.persisted().copy != CopyState::Usable;
        let wanted = self.stopping || !self.drains.is_empty() || self.is_stepping_down();
        seeding || wanted || self.awaits_sweep()
    }

    fn wants_sweep(&self, now: Now, mem: &dyn SlotMemory) -> bool {
        let rested = self
            .destage_deadline()
            .is_some_and(|deadline| now.time >= deadline);
        self.is_pressed(mem) || rested || self.is_awaited()
    }

    pub(super) fn destage_deadline(&self) -> Option<Time> {
        let persisted = self.superblock.persisted();
        // One that waits for the superblock starts when that is written.
        let waits = persisted.swept <= persisted.checkpoint && self.superblock.is_busy();
        let idle = self.sweep.is_none() && self.destageable() > persisted.checkpoint && !waits;
        let idle = idle && !self.is_pinned();
        let since = self.dirty_since.filter(|_| idle)?;
        Some(since.plus_ms(self.config.destage_delay_ms))
    }

    pub(super) fn checkpoint_progress(
        &mut self,
        now: Now,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        self.tree_progress(out);
        self.start_sweep(now, mem);
        let depth = self.sweep.is_some().then(|| self.sweep_depth(mem));
        let merge = (&mut self.merge, self.superblock.persisted().merge_era);
        if let (Some(sweep), Some(depth)) = (&mut self.sweep, depth)
            && self.tree.admits(sweep, out)
            && sweep.advance(merge, depth, mem, out) == SweepStep::WriteSuperblock
        {
            let cut = sweep.cut;
            let info = *self
                .journal
                .info(cut)
                .expect("a swept epoch is kept until it is recorded");
            let next = &mut self.superblock.desired;
            next.checkpoint = cut;
            next.checkpoint_chain = info.chain;
            next.checkpoint_offset = LogOffset(info.offset.0 + info.bytes);
            if let CopyState::Seeding {
                until: Some(until), ..
            } = next.copy
                && cut >= until
            {
                next.copy = CopyState::Usable;
            }
            self.superblock.dirty = true;
            self.announce_next_sweep(mem);
        }
        self.release_log();
        self.finish_drains(out);
    }

    /// A sweep writes only what the superblock already knows to be on its way. Otherwise the last
    /// frame could rot after a part of it had reached the backing, and recovery would take it for
    /// a torn tail and drop it; or a log that another history replaces would be cut back to before
    /// what the backing holds a part of.
    fn start_sweep(&mut self, now: Now, mem: &mut dyn SlotMemory) {
        let newest = self.destageable();
        let persisted = self.superblock.persisted();
        let (checkpoint, swept) = (persisted.checkpoint, persisted.swept);
        let wanted = newest > checkpoint && self.wants_sweep(now, mem);
        if self.sweep.is_some() || self.is_pinned() || !wanted {
            return;
        }
        let known = newest.min(swept);
        if known > checkpoint {
            self.sweep = Some(self.plan_sweep(known, mem));
            if planted(Mutant::FreeSlotsEarly) {
                self.release_swept(known, mem);
            }
        } else if !self.superblock.is_busy() {
            self.superblock.desired.swept = newest;
            self.superblock.dirty = true;
        }
    }

    /// Where writers wait for room, the superblock that ends a sweep says how far the next one may
    /// go, so that it need not wait for one of its own.
    fn announce_next_sweep(&mut self, mem: &dyn SlotMemory) {
        if self.is_pressed(mem) && !self.is_pinned() {
            let newest = self.destageable();
            let next = &mut self.superblock.desired;
            next.swept = next.swept.max(newest);
        }
    }

    /// Whether the next sweep begins when the superblock is written.
    pub(super) fn awaits_superblock_to_sweep(&self) -> bool {
        let checkpoint = self.superblock.persisted().checkpoint;
        self.superblock.is_busy() && !self.is_pinned() && self.destageable() > checkpoint
    }

    fn plan_sweep(&self, newest: Epoch, mem: &dyn SlotMemory) -> Sweep {
        let (mut blocks, mut marked) = (0, false);
        let epochs = self
            .journal
            .sealed
            .iter()
            .take_while(|sealed| sealed.header.epoch <= newest)
            .take_while(|sealed| {
                // All copies have a checkpoint at an epoch that is marked.
                let room = blocks < self.config.sweep_blocks && !marked;
                blocks += sealed.blocks.len();
                marked = sealed.header.checkpoint_mark;
                room
            });
        let how = (self.sweep_depth(mem), self.merge.is_some());
        let pace = |frees| Pace::new(frees, self.writable_slots(mem), self.tree.follows());
        Sweep::plan(&self.overlay, epochs, how, pace)
    }

    /// Lets the log go that nobody needs any more, when it is worth a superblock.
    fn release_log(&mut self) {
        let (used, ring) = self.log_usage();
        let pressed = used * 2 >= ring;
        let target = self.retain_target(pressed);
        let next = &mut self.superblock.desired;
        if target <= next.retained {
            return;
        }
        // The index reaches back to what the persisted superblock retains.
        if let Some(info) = self.journal.info(target) {
            next.retained = target;
            next.retained_chain = info.chain;
            next.retained_offset = LogOffset(info.offset.0 + info.bytes);
            next.retained_rank = info.rank;
            if planted(Mutant::FreeLogEarly) {
                let (epoch, chain) = (target, next.retained_chain);
                self.journal.forget(Tip { epoch, chain });
            }
            // Otherwise it goes along with the next checkpoint.
            self.superblock.dirty |= pressed;
        }
    }

    /// The epoch after which the log is kept. Peers that are not being sent anything (they are
    /// away, or we are a replica like them) lose their claim when the log gets tight; the others
    /// keep it, and writers are held back.
    fn retain_target(&self, pressed: bool) -> Epoch {
        let mut target = self.superblock.desired.checkpoint;
        if let Some(proven) = self.proof_hold()
            && !planted(Mutant::ForgetUnproven)
        {
            target = target.min(proven);
        }
        // A replica's log is pulled at most once, before anything is appended to it.
        let feeds = self.role() == Role::Primary;
        for peer in &self.peers {
            // A copy that damage holds up may never go on. It is begun anew if it does.
            let claims = !pressed || (feeds && peer.keeps_log() && !self.waits_at_damage(peer));
            if let Some(hold) = peer.hold().filter(|_| claims) {
                target = target.min(hold);
            }
        }
        target
    }

    pub(super) fn superblock_progress(&mut self, mem: &mut dyn SlotMemory, out: &mut Actions) {
        if self.superblock.dirty {
            let durable = self.journal.durable();
            let next = &mut self.superblock.desired;
            next.durable = durable.max(next.checkpoint);
            next.session = self.journal.session;
            self.superblock.write(mem, out);
        }
    }

    pub(super) fn superblock_done(
        &mut self,
        now: Now,
        mem: &mut dyn SlotMemory,
        out: &mut Actions,
    ) {
        self.superblock.done();
        let persisted = *self.superblock.persisted();
        if self
            .sweep
            .as_ref()
            .is_some_and(|sweep| sweep.cut <= persisted.checkpoint)
        {
            let marked = self.sweep.take().is_some_and(|sweep| sweep.marked);
            let at = Tip {
                epoch: persisted.checkpoint,
                chain: persisted.checkpoint_chain,
            };
            self.tree.recorded(at, marked, out);
            self.release_swept(persisted.checkpoint, mem);
            let rest = !self.journal.sealed.is_empty();
            self.dirty_since = rest.then_some(now.time);
        }
        self.journal.forget(Tip {
            epoch: persisted.retained,
            chain: persisted.retained_chain,
        });
        self.roles_persisted(out);
        self.seed_persisted(out);
        self.apply_persisted(out);
    }

    fn release_swept(&mut self, checkpoint: Epoch, mem: &mut dyn SlotMemory) {
        while let Some(sealed) = self.journal.sealed.front()
            && sealed.header.epoch <= checkpoint
        {
            for dirty in &sealed.blocks {
                self.overlay.release(mem, dirty.block, checkpoint);
            }
            self.journal.sealed.pop_front();
        }
        self.overlay.release_zeros(checkpoint);
    }

    /// Whether the backing holds everything that may go there now.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.sweep.is_none()
            && !self.is_applying()
            && self.journal.durable() == self.tip().epoch
            && self.destageable() <= self.superblock.persisted().checkpoint
            && !self.superblock.is_busy()
    }

    fn finish_drains(&mut self, out: &mut Actions) {
        if self.drains.is_empty() || self.sweep.is_some() || self.superblock.is_busy() {
            return;
        }
        let all = match self.role() {
            Role::Primary => self.overlay.open_is_empty() && self.is_drained(),
            // What is not anchored stays in the log.
            Role::Replica | Role::Fenced => self.is_drained(),
        };
        if all {
            for id in self.drains.drain(..) {
                out.push(Action::ControlDone { id, result: Ok(()) });
            }
        }
    }
}
