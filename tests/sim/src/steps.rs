//! A step of a core and what is seen of it; crashes, and what must be there after a start.

use hn4::log::{CopyState, Role};
use hn4_engine::arena::SlotMemory;
use hn4_engine::core::Event;
use hn4_engine::core::event::{CopyStatus, Disk, Tip};
use hn4_engine::core::recovery::RecoveryReport;

use crate::faults::Fault;
use crate::oracle::Change;
use crate::proofs::Beside;
use crate::world::{MS, Outcome, What, World, broken};

impl World {
    /// Takes a step of a node's core and carries out what it says.
    pub(crate) fn step(&mut self, node: usize, event: Event) -> Outcome {
        self.trace.mix(&[self.now, node as u64]);
        self.trace
            .note(self.now, Some(node), || format!("{event:?}"));
        match &event {
            Event::Request { id, .. } => self.note_request(node, *id)?,
            Event::Control { id, .. } => self.note_asked(node, *id),
            Event::Tree(event) => self.note_tree_event(node, event),
            _ => {}
        }
        let now = self.clocks(node);
        let is_timer = event == Event::Timer;
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let role = live.volume.role();
        let opening = live.volume.is_opening();
        let mut actions = std::mem::take(&mut self.actions);
        actions.clear();
        live.volume.step(now, event, &mut live.mem, &mut actions);
        if is_timer && live.volume.next_deadline().is_some_and(|at| at <= now.time) {
            let detail = format!("node {node} would spin on its timer. {}", self.describe());
            return broken("P9", detail);
        }
        self.observe(node, role)?;
        if opening {
            self.note_opened(node)?;
        }
        let dies = self.dies_now(node);
        let keeps = if dies {
            self.rng.index(actions.list.len() + 1)
        } else {
            actions.list.len()
        };
        for action in &actions.list[..keeps] {
            self.trace
                .note(self.now, Some(node), || format!("   {action:?}"));
            self.carry_out(node, action, &actions)?;
        }
        if dies {
            self.crash(node);
            return Ok(());
        }
        self.actions = actions;
        self.set_timer(node);
        self.admit(node);
        Ok(())
    }

    fn set_timer(&mut self, node: usize) {
        let start = self.nodes[node].clock_start;
        let Some(live) = &mut self.nodes[node].live else {
            return;
        };
        let Some(deadline) = live.volume.next_deadline() else {
            live.timer_at = None;
            return;
        };
        let at = deadline.0.saturating_sub(start).max(self.now);
        if live
            .timer_at
            .is_none_or(|planned| planned > at || planned < self.now)
        {
            live.timer_at = Some(at);
            let boot = self.nodes[node].boot;
            self.plan_at(at, What::Timer { node, boot });
        }
    }

    /// Compares what a step did with what is legal.
    fn observe(&mut self, node: usize, role: Role) -> Outcome {
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let status = live.volume.copy_status();
        let (before, tip) = (live.tip, status.tip);
        live.tip = tip;
        let rank_before = std::mem::replace(&mut live.tip_rank, status.tip_rank);
        let was_usable = live.usable;
        // What a fenced primary shows of its open epoch is of no consequence: it will be dropped.
        live.usable = status.copy.is_usable() && status.role != Role::Fenced;
        let usable = live.usable;
        if status.role != Role::Primary {
            live.open.clear();
        } else if role != Role::Primary {
            live.completed = hn4::types::Epoch(0); // Its clients are new.
        }
        if was_usable && !usable {
            self.forget_reads(node);
        }
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        if tip != before {
            let began = live.volume.role() == Role::Primary && status.tip_rank != rank_before;
            if role == Role::Primary || began {
                let changes = std::mem::take(&mut live.open);
                // An epoch without changes marks the beginning of a term.
                let marks = status.tip_rank != rank_before;
                if tip.epoch != before.epoch.next() || (changes.is_empty() && !marks) {
                    return broken(
                        "P2",
                        format!("primary {node} went from {before:?} to {tip:?}"),
                    );
                }
                if !self.oracle.sealed(tip, before, changes) {
                    let detail = format!("primary {node} sealed {tip:?} over {before:?}");
                    return broken("P6", detail);
                }
                self.stats.epochs += 1;
            } else {
                self.follow(node, before, tip)?;
            }
        }
        if usable && !was_usable {
            self.stats.usable += 1;
            self.refresh_view(node)?;
            self.verify(node);
        }
        if let Some(live) = &mut self.nodes[node].live {
            live.anchored = status.anchored;
        }
        if !self.oracle.holds(tip, status.anchored) {
            let detail = format!(
                "node {node}: {:?} is not on the way to {tip:?}",
                status.anchored
            );
            return broken("P6", detail);
        }
        self.observe_progress(node, &status)?;
        let answers = status.copy.is_usable() && status.role != Role::Fenced;
        self.observe_proofs(node, role, answers)?;
        self.note_primary(node)?;
        self.check_bounds(node)
    }

    /// How far a copy says that it is must be possible.
    fn observe_progress(&mut self, node: usize, status: &CopyStatus) -> Outcome {
        let (tip, progress) = (status.tip, status.progress);
        let usable = status.copy.is_usable() && status.role != Role::Fenced;
        // Its log is exact also while a shadow is being written over the backing.
        let applying = matches!(status.copy, CopyState::Applying { .. });
        if usable || applying {
            self.note_durable(node, tip, progress.durable);
        }
        // Also a fenced one answers for what it has on its own medium.
        if status.role != Role::Replica
            && let Some(durable) = self.oracle.ancestor(tip, progress.durable)
        {
            self.oracle.became_durable(durable);
        } else if !self.oracle.was_durable(status.anchored) {
            let detail = format!("node {node}: {:?} was durable nowhere", status.anchored);
            return broken("P2", detail);
        }
        let ordered = progress.applied <= progress.durable && progress.durable <= progress.received;
        let term = status.term.counter;
        // A superblock that was lost takes its term with it.
        let lost = self.nodes[node].rotten;
        let top_term = &mut self.nodes[node].top_term;
        if term < *top_term && !lost {
            let detail = format!("node {node} went from term {top_term} to {term}");
            return broken("terms", detail);
        }
        *top_term = term;
        if usable && !ordered {
            return broken("P2", format!("node {node}: {progress:?} is out of order"));
        }
        Ok(())
    }

    /// What is on a node's medium, and what was before its log was cut back.
    fn note_durable(&mut self, node: usize, tip: Tip, durable: hn4::types::Epoch) {
        let Some(place) = self.oracle.ancestor(tip, durable) else {
            return;
        };
        let known = &mut self.nodes[node].durable;
        match known.last_mut() {
            Some(last) if *last == place => {}
            Some(last) if last.epoch <= place.epoch && self.oracle.holds(place, *last) => {
                *last = place;
            }
            _ => {
                self.trace
                    .note(self.now, Some(node), || format!("   now durable {place:?}"));
                known.push(place);
            }
        }
    }

    fn check_bounds(&self, node: usize) -> Outcome {
        let Some(live) = &self.nodes[node].live else {
            return Ok(());
        };
        let (used, ring) = live.volume.log_usage();
        if used > ring || live.volume.dirty_slots() > live.mem.capacity() {
            return broken(
                "P8",
                format!("node {node}: {used} of {ring} bytes of log in use"),
            );
        }
        Ok(())
    }

    /// The log of a copy went from one place to another.
    fn follow(&mut self, node: usize, before: Tip, tip: Tip) -> Outcome {
        if !self.oracle.knows(tip) {
            return broken(
                "P6",
                format!("node {node} took {tip:?}, which nobody sealed"),
            );
        }
        let changes = self.oracle.changes(before, tip);
        if let Some(changes) = changes {
            let changes: Vec<Change> = changes.into_iter().cloned().collect();
            for change in &changes {
                self.change_view(node, change);
            }
            return Ok(());
        }
        self.stats.truncations += 1;
        self.doom_if_touchy(node);
        let within = 3 * self.disk_time(node, Disk::Log);
        let rate = self.plan.truncation_crash;
        self.power_may_fail(node, rate, within, Fault::CrashInTruncation);
        let live = self.nodes[node].live.as_mut();
        // Unless a file has it.
        let kept = live.and_then(|live| {
            let saved = std::mem::take(&mut live.saved);
            (live.usable && !saved).then_some(live.anchored)
        });
        if let Some(kept) = kept
            && !self.oracle.holds(tip, kept)
        {
            return broken("P7", format!("node {node} dropped {kept:?} for {tip:?}"));
        }
        if !self.oracle.holds(tip, self.nodes[node].promise) {
            let promise = self.nodes[node].promise;
            return broken("P1", format!("node {node} dropped {promise:?} for {tip:?}"));
        }
        self.refresh_view(node)
    }

    /// What the copy holds, from scratch.
    pub(crate) fn refresh_view(&mut self, node: usize) -> Outcome {
        self.forget_reads(node);
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let Some(contents) = self.oracle.contents(live.tip) else {
            return broken(
                "P2",
                format!("node {node}: no history leads to {:?}", live.tip),
            );
        };
        live.view = contents;
        Ok(())
    }

    /// Power is lost at a node.
    pub(crate) fn crash(&mut self, node: usize) {
        self.trace.note(self.now, Some(node), || "CRASH".to_owned());
        self.forget_asked(node);
        let live = self.nodes[node].live.as_ref();
        if live.is_some_and(|live| live.volume.role() != Role::Primary) {
            // What peers held in memory is gone.
            self.oracle.received = self.oracle.promised;
        }
        self.nodes[node].crash(&self.plan, &mut self.rng);
        self.forget_drains(node);
        if !self.quiet && self.rng.one_in(self.plan.rot) && !self.plan.large_sectors {
            self.rot_log(node);
        }
        self.drop_requests(node);
        self.node_left(node);
        let after = MS / 10 + self.rng.below(self.plan.down_ms * MS);
        self.plan_in(after, What::Restart { node });
    }

    /// A node starts: recovery, and what must have survived.
    pub(crate) fn start_node(&mut self, node: usize) -> Outcome {
        let dies = !self.quiet && self.rng.one_in(self.plan.dies_in_recovery);
        let dies = dies && self.fault(Fault::CutRecovery, Some(node));
        let operations = self.rng.below(12);
        self.nodes[node].clock_start = self.rng.below(1 << 50);
        let clean = std::mem::take(&mut self.nodes[node].stopped_clean);
        let log = self.nodes[node].disk(Disk::Log);
        log.dies_after = dies.then_some(operations);
        let backing = self.nodes[node].disk(Disk::Backing);
        backing.dies_after = dies.then_some(operations);
        let plan = self.plan.clone();
        let opened = self.nodes[node].open(&plan, self.zero);
        for disk in [Disk::Log, Disk::Backing] {
            self.nodes[node].disk(disk).dies_after = None;
        }
        let report = match opened {
            Ok(report) => report,
            Err(_) if dies => {
                self.nodes[node].crash(&self.plan, &mut self.rng);
                self.plan_in(MS, What::Restart { node });
                return Ok(());
            }
            Err(_) if self.nodes[node].rotten => {
                self.refused(node);
                return Ok(());
            }
            Err(error) => return broken("P1", format!("node {node} does not open: {error}")),
        };
        self.trace
            .note(self.now, Some(node), || format!("OPEN {report:?}"));
        self.stats.restored += report.restored_blocks;
        self.check_opened(node, clean, &report)?;
        if self.plan.proves {
            self.start_prover(node)?;
        }
        self.post(node, Event::Timer);
        for link in 0..self.links.len() {
            if self.links[link].side_of(node).is_some() {
                self.plan_connect(link);
            }
        }
        Ok(())
    }

    /// What a node has after its recovery must be what it promised to keep.
    fn check_opened(&mut self, node: usize, clean: bool, report: &RecoveryReport) -> Outcome {
        // Of a tail that was cut off frames may be left, which count again.
        let stopped_at = self.nodes[node].promise.epoch;
        if clean && report.checkpoint < stopped_at && !self.nodes[node].rotten {
            let detail = format!("node {node} was stopped clean at {stopped_at}: {report:?}");
            return broken("P1", detail);
        }
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let status = live.volume.copy_status();
        live.usable = status.copy.is_usable() && status.role != Role::Fenced;
        live.anchored = status.anchored;
        let (tip, usable) = (status.tip, live.usable);
        let opening = live.volume.is_opening();
        if !self.oracle.knows(tip) {
            return broken(
                "P2",
                format!("node {node} opened at {tip:?}, which nobody sealed"),
            );
        }
        if self.nodes[node].rotten {
            self.oracle.received = self.oracle.promised;
        }
        if self.nodes[node].rotten && !self.oracle.holds(tip, self.nodes[node].promise) {
            // The last frame, of which nothing proves that it was durable, may be taken for torn.
            self.nodes[node].promise = Tip::default();
            self.oracle.promised = Tip::default();
            self.oracle.received = Tip::default();
        }
        let promise = self.nodes[node].promise;
        if !self.oracle.holds(tip, promise) {
            let detail = format!("node {node} promised {promise:?} and opened at {tip:?}");
            return broken("P1", detail);
        }
        if status.role == Role::Primary && !opening {
            // It may make peers drop what they hold and it does not.
            self.oracle.received = self.oracle.promised;
        }
        if usable {
            self.refresh_view(node)?;
            self.verify(node);
        }
        Ok(())
    }

    /// The prover of a node starts on what its last life left.
    fn start_prover(&mut self, node: usize) -> Outcome {
        let medium = std::mem::take(&mut self.nodes[node].ledger);
        match Beside::open(&self.plan, node, medium) {
            Err(error) => return broken("P10", error),
            Ok(beside) => {
                if let Some(live) = &mut self.nodes[node].live {
                    live.beside = Some(beside);
                }
            }
        }
        // It says that it has begun.
        self.prover_standing(node);
        let boot = self.nodes[node].boot;
        self.plan_in(0, What::Prover { node, boot });
        Ok(())
    }
}
