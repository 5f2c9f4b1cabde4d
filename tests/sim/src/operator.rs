//! The operator: brings disasters while the run is young, repairs as a person or an authority
//! would, and at the end brings everything to rest.
//!
//! Whichever copy is promoted asks the others itself. With answers from n - k + 1 copies nothing
//! that was acknowledged may be lost.

use hn4::log::Role;
use hn4::types::Term;
use hn4_engine::core::event::{Control, RequestId, Tip};
use hn4_engine::core::{Event, Obstacle};

use crate::faults::Fault;
use crate::world::{MS, Outcome, What, World, broken};

/// A change of primary that is on its way.
#[derive(Clone, Copy, Debug, Default)]
enum Failover {
    #[default]
    None,
    /// One was asked to become primary.
    Promote { node: usize, boot: u64, until: u64 },
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Operator {
    failover: Failover,
    /// The highest term that was ever handed out.
    top_term: u64,
    /// The term of the last primary that was seen.
    current_term: u64,
    /// The attempt in this term had enough answers.
    safe_term: u64,
    /// The highest term whose primary was promoted although something might be lost. A primary of
    /// an earlier term may go on beside it, with peers that have not heard of it yet; whoever
    /// accepted the loss accepted that this one's history leaves out what that one acknowledges.
    pub(crate) loss_term: u64,
    /// A node that is to crash after so many more steps.
    doomed: Option<(usize, u64, Fault)>,
    /// A restarted primary served without having heard of its peers.
    opened_alone: bool,
    /// When there was no primary first.
    headless_since: Option<u64>,
    /// The primary was demoted to hand over.
    hand_over: bool,
    disasters: u64,
    /// Promotions that were tried since there was a primary.
    attempts: u64,
    /// When the run became quiet.
    quiet_since: u64,
    /// Drains of the end that were not answered yet.
    draining: Vec<(usize, RequestId)>,
    /// When the operator looked last for what only a client can repair.
    pub(crate) looked_at: u64,
    /// Since when all copies are drained: from then on state trees are to verify all of them.
    pub(crate) trees_since: Option<u64>,
    /// Damage took the last copy.
    pub(crate) lost: bool,
    /// Both sides agree on everything.
    pub(crate) finished: bool,
}

/// The end must be reached within this time, once faults have stopped.
const QUIET_MS: u64 = 1_500_000;
/// Faults stop at the latest then.
const LOUD_MS: u64 = 60_000;

impl Operator {
    /// Counts one more disaster, if there may be one more.
    pub(crate) fn may_strike(&mut self, most: u64) -> bool {
        let may = self.disasters < most;
        self.disasters += u64::from(may);
        may
    }

    /// A disaster that could not happen yet is tried again later.
    pub(crate) fn not_yet(&mut self) {
        self.disasters = self.disasters.saturating_sub(1);
    }

    /// Whether a promotion is on its way.
    pub(crate) fn promotes(&self) -> bool {
        self.promoted().is_some()
    }

    /// Who was asked to become primary.
    pub(crate) fn promoted(&self) -> Option<usize> {
        match self.failover {
            Failover::None => None,
            Failover::Promote { node, .. } => Some(node),
        }
    }
}

impl World {
    pub(crate) fn is_over(&self) -> bool {
        self.operator.finished
    }

    /// Whether this step is a node's last.
    pub(crate) fn dies_now(&mut self, node: usize) -> bool {
        let Some((doomed, left, fault)) = &mut self.operator.doomed else {
            return false;
        };
        if *doomed != node || self.quiet {
            return false;
        }
        match left.checked_sub(1) {
            Some(fewer) => {
                *left = fewer;
                false
            }
            None => {
                let fault = *fault;
                self.operator.doomed = None;
                self.fault(fault, Some(node))
            }
        }
    }

    /// A node is to crash after so many more steps.
    pub(crate) fn doom(&mut self, node: usize, steps: u64, fault: Fault) {
        self.operator.doomed = Some((node, steps, fault));
    }

    /// Changes are where things go wrong: a node that just changed is likely to crash.
    pub(crate) fn doom_if_touchy(&mut self, node: usize) {
        if self.rng.one_in(self.plan.touchy) {
            self.doom_soon(node);
        }
    }

    /// A node crashes within the next few steps.
    pub(crate) fn doom_soon(&mut self, node: usize) {
        let may = self.operator.disasters < self.plan.most_faults
            && self.operator.doomed.is_none()
            && !self.quiet;
        if may {
            self.operator.disasters += 1;
            let steps = self.rng.log_between(1, 32) - 1;
            self.doom(node, steps, Fault::CrashAfterChange);
        }
    }

    pub(crate) fn operate(&mut self) -> Outcome {
        let tick = MS + self.rng.below(4 * MS);
        self.plan_in(tick, What::Operator);
        if !self.quiet {
            let done = self.next_request >= self.plan.requests || self.now > LOUD_MS * MS;
            if done {
                self.trace.note(self.now, None, || "QUIET".to_owned());
                self.quiet = true;
                self.operator.quiet_since = self.now;
            } else if self.operator.disasters < self.plan.most_faults
                && self.rng.below(self.plan.fault_ms * MS) < tick
            {
                self.operator.disasters += 1;
                self.disaster();
            }
        }
        self.end_stopped();
        self.maintain()?;
        self.maintain_members()?;
        self.fail_over()?;
        if self.quiet {
            if self.now > self.operator.quiet_since + QUIET_MS * MS {
                return broken("P10", self.describe());
            }
            self.write_what_is_hopeless();
            self.bring_to_rest()?;
        }
        Ok(())
    }

    pub(crate) fn control(&mut self, node: usize, control: Control) -> RequestId {
        self.next_request += 1;
        let id = RequestId(self.next_request);
        self.trace
            .note(self.now, Some(node), || format!("CONTROL {control:?}"));
        self.post(node, Event::Control { id, control });
        id
    }

    /// Nobody answers for a node that is down.
    pub(crate) fn forget_drains(&mut self, node: usize) {
        self.operator.draining.retain(|&(asked, _)| asked != node);
    }

    pub(crate) fn control_done(
        &mut self,
        node: usize,
        id: RequestId,
        result: &Result<(), String>,
    ) -> Outcome {
        if self.peers_changed(node, id, result)? {
            return Ok(());
        }
        let draining = &mut self.operator.draining;
        if let Some(index) = draining.iter().position(|&(_, drain)| drain == id) {
            draining.remove(index);
            if let Err(why) = result {
                return broken("P10", format!("node {node} does not drain: {why}"));
            }
        }
        let status = self.nodes[node]
            .live
            .as_ref()
            .map(|live| live.volume.copy_status());
        if status.is_some_and(|status| status.role == Role::Replica) {
            // Perhaps it was demoted: somebody is to take over.
            self.operator.hand_over |= self.primary().is_none();
        }
        if let Failover::Promote {
            node: candidate, ..
        } = self.operator.failover
            && candidate == node
        {
            self.operator.failover = Failover::None;
        }
        Ok(())
    }

    /// The living primary of the highest term.
    pub(crate) fn primary(&self) -> Option<usize> {
        let primaries = self.nodes.iter().filter_map(|node| {
            let volume = &node.live.as_ref()?.volume;
            if node.stop_by.is_some() {
                return None;
            }
            let term = volume.superblock().term.counter;
            (volume.role() == Role::Primary).then_some((term, node.index))
        });
        let primaries = primaries.filter(|&(term, _)| term >= self.operator.current_term);
        primaries.max().map(|(_, node)| node)
    }

    /// Somebody is seen to be primary.
    pub(crate) fn note_primary(&mut self, node: usize) -> Outcome {
        let Some(live) = &self.nodes[node].live else {
            return Ok(());
        };
        let term = live.volume.superblock().term.counter;
        if live.volume.role() != Role::Primary || term <= self.operator.current_term {
            return Ok(());
        }
        self.operator.current_term = term;
        self.operator.top_term = self.operator.top_term.max(term);
        if term == 1 {
            return Ok(());
        }
        self.stats.promotions += 1;
        if self.operator.safe_term != term {
            self.operator.loss_term = term;
        }
        let tip = live.tip;
        for (what, place) in [
            ("acknowledged", self.oracle.promised),
            ("received", self.oracle.received),
        ] {
            if !self.oracle.holds(tip, place) && self.operator.safe_term == term {
                return broken(
                    "P1",
                    format!(
                        "node {node} was promoted with {tip:?} without what was {what}: {place:?}"
                    ),
                );
            }
        }
        if !self.oracle.holds(tip, self.oracle.promised) {
            self.oracle.promised = Tip::default();
        }
        if !self.oracle.holds(tip, self.oracle.received) {
            self.oracle.received = Tip::default();
        }
        Ok(())
    }

    /// Repairs what only a person can.
    fn maintain(&mut self) -> Outcome {
        for node in 0..self.nodes.len() {
            let Some(live) = &self.nodes[node].live else {
                continue;
            };
            if live.volume.failed().is_some() {
                self.crash(node);
                continue;
            }
            let obstacle = live.volume.obstacle();
            if live.volume.role() == Role::Fenced && self.rng.one_in(20) {
                self.control(node, Control::Demote);
                self.work_inbox()?;
                continue;
            }
            let hopeless = matches!(
                obstacle,
                Some(Obstacle::Diverged { .. } | Obstacle::NeedsCopy { .. })
            );
            let better = self.primary().is_some_and(|primary| primary != node);
            if hopeless && better && (self.quiet || self.rng.one_in(20)) {
                self.wipe(node);
                self.work_inbox()?;
            }
        }
        Ok(())
    }

    /// A damaged log was refused, as it must be. With peers the copy is made anew; without, the run
    /// ends here, since nothing may be made up.
    pub(crate) fn refused(&mut self, node: usize) {
        self.stats.refused_logs += 1;
        let patience = self.quiet && self.now < self.operator.quiet_since + 60_000 * MS;
        if self.plan.nodes > 1 && self.primary().is_some() {
            self.wipe(node);
        } else if self.plan.nodes > 1 && (patience || !self.quiet) {
            let after = 100 * MS + self.rng.below(2000 * MS);
            self.plan_in(after, What::Restart { node });
        } else {
            self.operator.finished = true;
            self.operator.lost = true;
        }
    }

    /// Makes a copy anew.
    pub(crate) fn wipe(&mut self, node: usize) {
        self.trace.note(self.now, Some(node), || "WIPE".to_owned());
        self.forget_asked(node);
        self.nodes[node].crash(&self.plan, &mut self.rng);
        self.oracle.received = self.oracle.promised;
        self.drop_requests(node);
        self.node_left(node);
        self.nodes[node].promise = Tip::default();
        self.nodes[node].top_term = 0;
        let plan = self.plan.clone();
        let seeded = self.rng.one_in(plan.seeded);
        if seeded {
            self.bring_backing(node);
        }
        let created = self.nodes[node].create(&plan, Role::Replica, seeded);
        created.expect("an empty disk takes a new log");
        self.plan_in(MS, What::Restart { node });
    }

    /// The copies that can become primary.
    pub(crate) fn candidates(&self) -> Vec<usize> {
        let fit = self.nodes.iter().filter(|node| {
            let volume = node.live.as_ref().map(|live| &live.volume);
            let fit = volume.is_some_and(|volume| {
                let usable = volume.superblock().copy.is_usable();
                volume.role() == Role::Replica && !volume.is_opening() && usable
            });
            fit && (!self.plan.regroups || self.may_be_promoted(node.index))
        });
        fit.map(|node| node.index).collect()
    }

    /// Asks some copy to become primary. The others are asked by its core.
    pub(crate) fn start_fail_over(&mut self) {
        self.promote(None);
    }

    /// Asks a copy to become primary: this one, whatever may be lost, or any.
    pub(crate) fn promote(&mut self, chosen: Option<usize>) {
        if self.operator.promotes() {
            return;
        }
        let known = self.nodes.iter().filter_map(|node| node.live.as_ref());
        let known = known.map(|live| live.volume.superblock().term.counter);
        let counter = known.max().unwrap_or(0).max(self.operator.top_term) + 1;
        let mut fit = self.candidates();
        fit.retain(|&node| chosen.is_none_or(|chosen| chosen == node));
        if fit.iter().any(|&node| self.is_without_damage(node)) {
            fit.retain(|&node| self.is_without_damage(node));
        }
        if fit.is_empty() {
            return;
        }
        let node = fit[self.rng.index(fit.len())];
        self.operator.attempts += 1;
        // With loss only if a person accepts it.
        let stuck = self.quiet && self.operator.attempts > 20;
        let rate = if self.quiet {
            0
        } else {
            self.plan.accepts_loss
        };
        let accepts_loss = stuck || chosen.is_some() || self.rng.one_in(rate);
        if !accepts_loss && !self.is_without_damage(node) {
            return; // As hn4ctl does.
        }
        let peers = self.nodes[node].peer_count();
        let wanted = self.plan.promotion_answers(peers);
        let answers = if accepts_loss { 0 } else { wanted };
        self.operator.top_term = counter;
        let safe = answers >= wanted && !self.operator.opened_alone;
        self.operator.safe_term = if safe { counter } else { 0 };
        let within_ms = self.rng.log_between(50, 5000);
        let (boot, until) = (self.nodes[node].boot, self.now + 20_000 * MS);
        self.operator.failover = Failover::Promote { node, boot, until };
        let term = Term {
            counter,
            node: crate::node::node_id(node),
        };
        let control = Control::Promote {
            term,
            answers,
            within_ms,
        };
        self.control(node, control);
    }

    fn fail_over(&mut self) -> Outcome {
        if self.primary().is_some() {
            self.operator.headless_since = None;
            self.operator.hand_over = false;
            self.operator.attempts = 0;
        } else {
            let since = *self.operator.headless_since.get_or_insert(self.now);
            let patience = if self.operator.hand_over {
                0
            } else {
                8000 * MS
            };
            if self.plan.nodes > 1 && self.now >= since + patience {
                self.open_or_fail_over();
            }
        }
        if let Failover::Promote { node, boot, until } = self.operator.failover
            && (self.nodes[node].boot != boot || self.now > until)
        {
            self.operator.failover = Failover::None;
        }
        self.work_inbox()
    }

    /// A primary that waits for its peers may be told not to.
    fn open_or_fail_over(&mut self) {
        let opening = self.nodes.iter().find(|node| {
            let live = node.live.as_ref();
            live.is_some_and(|live| live.volume.is_opening())
        });
        match opening.map(|node| node.index) {
            Some(node) if self.rng.one_in(50) => {
                let control = Control::Promote {
                    term: Term::default(),
                    answers: 0,
                    within_ms: 0,
                };
                self.control(node, control);
            }
            _ => self.start_fail_over(),
        }
    }

    /// A step of a primary that waits for its peers is over: if it serves now, nothing that was
    /// acknowledged may be missing.
    pub(crate) fn note_opened(&mut self, node: usize) -> Outcome {
        let Some(live) = &self.nodes[node].live else {
            return Ok(());
        };
        // One that failed serves nothing, and starts again.
        let over = live.volume.is_opening() || live.volume.failed().is_some();
        if over || live.volume.role() != Role::Primary {
            return Ok(());
        }
        let (tip, alone) = (live.tip, live.volume.opened_alone());
        let newest = live.volume.superblock().term.counter >= self.operator.current_term;
        if newest && !alone && !self.oracle.holds(tip, self.oracle.received) {
            let missing = self.oracle.received;
            return broken(
                "P1",
                format!(
                    "primary {node} opened with {tip:?} without what was received: {missing:?}"
                ),
            );
        }
        if alone {
            // From now on two may be primary: no promotion is safe any more.
            self.operator.opened_alone = true;
            // It may make peers drop what they hold and it does not.
            self.oracle.received = self.oracle.promised;
        }
        Ok(())
    }

    /// The end of a run: all copies caught up, all drained, all proven.
    fn bring_to_rest(&mut self) -> Outcome {
        let Some(primary) = self.primary() else {
            return Ok(());
        };
        let Some(tip) = self.nodes[primary].live.as_ref().map(|live| live.tip) else {
            return Ok(());
        };
        let outside =
            |node: &crate::node::Node| !self.is_member(node.index) && !self.is_gone(node.index);
        if !self.is_settled() || self.nodes.iter().any(outside) {
            return Ok(());
        }
        let mut rested = self.pending.is_empty();
        let mut caught_up = rested;
        for node in self.nodes.iter().filter(|node| self.is_member(node.index)) {
            let Some(live) = &node.live else {
                return Ok(());
            };
            let status = live.volume.copy_status();
            caught_up &= live.open.is_empty() && live.usable && status.tip == tip;
            caught_up &= node.index == primary || status.role == Role::Replica;
            rested &= status.progress.applied == tip.epoch && live.volume.is_clean();
            rested &= node.in_flight() == 0 && live.volume.waiting() == 0;
            rested &= !live.volume.awaits_proof();
        }
        if !rested {
            self.operator.trees_since = None;
        }
        if caught_up && rested && self.operator.draining.is_empty() {
            self.operator.finished = self.trees_rest();
        } else if caught_up && self.operator.draining.is_empty() {
            let members = (0..self.nodes.len()).filter(|&node| self.is_member(node));
            for node in members.collect::<Vec<_>>() {
                let id = self.control(node, Control::Drain);
                self.operator.draining.push((node, id));
            }
        }
        self.work_inbox()
    }
}
