//! What the operator's world does to the nodes while the run is young.

use hn4::log::Role;
use hn4_engine::core::Event;
use hn4_engine::core::event::{Control, Disk};

use crate::faults::Fault;
use crate::link::Slow;
use crate::oracle::index;
use crate::plan::Disaster;
use crate::world::{MS, What, World};

impl World {
    /// Whether a fault happens now; it is counted, and a run can be repeated without it.
    pub(crate) fn fault(&mut self, fault: Fault, node: Option<usize>) -> bool {
        let happens = self.faults.happens(fault, self.now, node);
        if happens {
            self.trace
                .note(self.now, node, || format!("FAULT {fault:?}"));
        }
        happens
    }

    pub(crate) fn disaster(&mut self) {
        let alone = self.plan.nodes == 1;
        let fits = |disaster: Disaster| {
            let needs_peers = matches!(
                disaster,
                Disaster::Reset
                    | Disaster::Partition
                    | Disaster::OneWay
                    | Disaster::SlowLink
                    | Disaster::FailOver
                    | Disaster::Demote
                    | Disaster::Wipe
                    | Disaster::Isolate
                    | Disaster::CutOff
            );
            !(alone && needs_peers)
        };
        let weights = self.plan.disasters.iter();
        let weights: Vec<_> = weights.copied().filter(|&(kind, _)| fits(kind)).collect();
        let sum: u64 = weights.iter().map(|&(_, weight)| weight).sum();
        if sum == 0 {
            return;
        }
        let mut draw = self.rng.below(sum);
        for (disaster, weight) in weights {
            if draw < weight {
                return self.strike(disaster);
            }
            draw -= weight;
        }
    }

    fn strike(&mut self, disaster: Disaster) {
        let node = self.rng.index(self.nodes.len());
        match disaster {
            Disaster::Crash => {
                // What a primary loses makes the others cut back their logs.
                let primary = self.primary().filter(|_| self.rng.one_in(2));
                let steps = self.rng.log_between(1, 500) - 1;
                let node = if self.nodes[node].boot == 0 { 0 } else { node };
                self.doom(primary.unwrap_or(node), steps, Fault::Crash);
            }
            Disaster::Reset | Disaster::Partition | Disaster::OneWay | Disaster::SlowLink => {
                self.strike_link(disaster);
            }
            Disaster::FailOver => self.replace_primary(),
            Disaster::Isolate => self.isolate(),
            Disaster::CutOff => self.cut_off(),
            Disaster::Demote => {
                if let Some(primary) = self.primary()
                    && self.fault(Fault::Demote, Some(primary))
                {
                    self.control(primary, Control::Demote);
                }
            }
            Disaster::Drain => {
                let drains = self.rng.pick(&[true, false]);
                let control = if drains {
                    Control::Drain
                } else {
                    Control::Flush
                };
                if self.fault(Fault::Drain, Some(node)) {
                    self.control(node, control);
                }
            }
            Disaster::Wipe => {
                let live = self.nodes[node].live.as_ref();
                let replica = live.is_some_and(|live| live.volume.role() == Role::Replica);
                if replica && self.primary().is_some() && self.fault(Fault::Wipe, Some(node)) {
                    self.wipe(node);
                }
            }
            Disaster::ClockJump => {
                let skew = self.rng.below(self.plan.skew_ms.max(1));
                if self.fault(Fault::ClockJump, Some(node)) {
                    self.nodes[node].skew_ms = skew;
                }
            }
            Disaster::NoSpace => {
                let until = self.now + self.rng.below(1000 * MS);
                if self.fault(Fault::NoSpace, Some(node)) {
                    self.nodes[node].no_space_until = until;
                }
            }
            Disaster::Stop => self.stop(node),
            Disaster::Regroup => self.change_members(),
            Disaster::RottenLog => self.rot_log(node),
            Disaster::RottenBacking => self.rot_backing(node),
        }
    }

    /// The primary is replaced, and half of the times it is lost first.
    fn replace_primary(&mut self) {
        if self.candidates().is_empty() || self.operator.promotes() {
            self.operator.not_yet();
        } else if self.fault(Fault::FailOver, None) {
            if self.rng.one_in(2)
                && let Some(primary) = self.primary()
            {
                self.crash(primary);
            }
            self.start_fail_over();
        }
    }

    /// Nobody reaches a copy for a while, and an operator who does not know promotes it.
    fn isolate(&mut self) {
        let candidates = self.candidates();
        let until = self.now + self.rng.log_between(1, 3000) * MS;
        if candidates.is_empty() || self.primary().is_none() || self.operator.promotes() {
            return self.operator.not_yet();
        }
        let node = self.rng.pick(&candidates);
        if !self.fault(Fault::Isolate, Some(node)) {
            return;
        }
        self.cut_links(node, until);
        self.promote(Some(node));
    }

    /// The primary loses power, and nobody reaches it for a while.
    fn cut_off(&mut self) {
        let until = self.now + self.rng.log_between(1, 300) * MS;
        match self.primary() {
            None => self.operator.not_yet(),
            Some(primary) if self.fault(Fault::CutOff, Some(primary)) => {
                self.crash(primary);
                self.cut_links(primary, until);
            }
            Some(_) => {}
        }
    }

    /// Nobody reaches a node until then.
    fn cut_links(&mut self, node: usize, until: u64) {
        for link in 0..self.links.len() {
            let Some(side) = self.links[link].side_of(node) else {
                continue;
            };
            self.links[link].cut_until = until;
            if let Some(session) = self.links[link].sides[side].open {
                self.end_session(link, session, side);
            }
        }
    }

    /// Power is lost at a node within so many nanoseconds, once in so many times.
    pub(crate) fn power_may_fail(&mut self, node: usize, rate: u64, within: u64, fault: Fault) {
        let strikes = !self.quiet && self.rng.one_in(rate);
        if strikes && self.operator.may_strike(self.plan.most_faults) {
            let (after, boot) = (self.rng.below(within), self.nodes[node].boot);
            self.plan_in(after, What::PowerLoss { node, boot, fault });
        }
    }

    /// Power is lost.
    pub(crate) fn power_loss(&mut self, node: usize, boot: u64, fault: Fault) {
        let same_life = self.nodes[node].boot == boot && self.nodes[node].live.is_some();
        if same_life && !self.quiet && self.fault(fault, Some(node)) {
            self.crash(node);
        }
    }

    fn strike_link(&mut self, disaster: Disaster) {
        let link = self.rng.index(self.links.len());
        let side = self.rng.index(2);
        let until = self.now + self.rng.log_between(1, 3000) * MS;
        let session = self.links[link].sides[side].open;
        match disaster {
            Disaster::OneWay => {
                if self.fault(Fault::OneWay, None) {
                    // Some are longer than anybody waits.
                    let longer = if self.rng.one_in(3) { 10_000 * MS } else { 0 };
                    self.links[link].deaf_until[side] = until + longer;
                }
            }
            Disaster::SlowLink => {
                let bytes_per_ms = self.rng.pick(&[20, 200, 2000]);
                if self.fault(Fault::SlowLink, None) {
                    self.links[link].slow = Some(Slow {
                        until,
                        bytes_per_ms,
                    });
                }
            }
            Disaster::Partition => {
                if self.fault(Fault::Partition, None) {
                    self.links[link].cut_until = until;
                    if let Some(session) = session {
                        self.end_session(link, session, side);
                    }
                }
            }
            _ => {
                if let Some(session) = session
                    && self.fault(Fault::Reset, None)
                {
                    self.end_session(link, session, side);
                }
            }
        }
    }

    /// A bit of a log flips.
    pub(crate) fn rot_log(&mut self, node: usize) {
        let ring = hn4::log::RING_START;
        let offset = ring + self.rng.log_between(1, self.plan.ring_bytes) - 1;
        let bit = u8::try_from(self.rng.below(8)).unwrap_or(0);
        if !self.nodes[node].superblock_lost && self.fault(Fault::RottenLog, Some(node)) {
            self.nodes[node].disk(Disk::Log).rot(index(offset), bit);
            self.nodes[node].rotten = true;
        }
    }

    /// A node is stopped in good order, with limited patience.
    fn stop(&mut self, node: usize) {
        let patience = self.rng.below(3000 * MS);
        let running = self.nodes[node].live.is_some() && self.nodes[node].stop_by.is_none();
        if running && self.fault(Fault::Stop, Some(node)) {
            self.nodes[node].stop_by = Some(self.now + patience);
            if let Some(live) = &mut self.nodes[node].live {
                live.volume.stop();
            }
            self.post(node, Event::Timer);
        }
    }

    /// Ends the nodes that are being stopped and have nothing left to do.
    pub(crate) fn end_stopped(&mut self) {
        for node in 0..self.nodes.len() {
            let (Some(by), Some(live)) = (self.nodes[node].stop_by, &self.nodes[node].live) else {
                continue;
            };
            let clean = live.volume.is_clean() && live.volume.failed().is_none();
            if clean && self.nodes[node].in_flight() == 0 {
                // All that was accepted is in the backing. A copy that is not usable promises
                // nothing.
                let kept = Some(live.tip).filter(|_| live.usable);
                self.nodes[node].promise = kept.unwrap_or_default();
                self.nodes[node].stopped_clean = true;
                self.crash(node);
            } else if self.now >= by {
                self.crash(node);
            }
        }
    }
}
