//! What happened in a run, in numbers.

use std::fmt;

use crate::faults::Fault;

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Events of the queue.
    pub events: u64,
    /// Requests that completed.
    pub requests: u64,
    /// Epochs that were sealed.
    pub epochs: u64,
    /// Sessions that ended.
    pub disconnects: u64,
    /// Sessions that were the transport's own.
    pub real_sessions: u64,
    /// Dictionaries that such a session was given.
    pub dictionaries: u64,
    /// Nodes that were promoted.
    pub promotions: u64,
    /// Shadows that were switched in.
    pub shadows: u64,
    /// State trees of two nodes that were compared.
    pub comparisons: u64,
    /// Bytes of full copies that were left out for that.
    pub kept_bytes: u64,
    /// Copies that became usable.
    pub usable: u64,
    /// Tails that were dropped.
    pub truncations: u64,
    /// Tails of former primaries that were to be saved.
    pub forks: u64,
    /// Recoveries that refused a damaged log.
    pub refused_logs: u64,
    /// Writes that a crash tore.
    pub torn: u64,
    /// Writes that a crash lost.
    pub lost_in_cache: u64,
    /// Physical sectors that a crash damaged, of which only a part was being written.
    pub neighbours: u64,
    /// Blocks that recovery wrote back whole.
    pub restored: u64,
    /// Disk operations that took very long.
    pub spikes: u64,
    /// Sectors that were compared.
    pub compared: u64,
    /// Anchors that were appended to a ledger, or taken from a primary.
    pub proven: u64,
    /// Proofs that did not match.
    pub refused_proofs: u64,
    /// Ledgers, or parts of them, that were set aside.
    pub ledgers_aside: u64,
    /// Changes of peers that were made everywhere.
    pub regrouped: u64,
    /// Changes of peers that a node refused.
    pub regroups_refused: u64,
    /// Injected faults by kind.
    pub faults: Counts,
}

/// How often each kind of fault happened.
#[derive(Clone, Copy, Debug)]
pub struct Counts([u64; Fault::KINDS]);

impl Default for Counts {
    fn default() -> Self {
        Self([0; Fault::KINDS])
    }
}

impl Counts {
    /// It happened once more.
    pub(crate) fn count(&mut self, fault: Fault) {
        self.0[fault as usize] += 1;
    }
}

impl Stats {
    /// Sums up.
    pub fn add(&mut self, other: &Self) {
        let Self {
            events,
            requests,
            epochs,
            disconnects,
            real_sessions,
            dictionaries,
            promotions,
            shadows,
            comparisons,
            kept_bytes,
            usable,
            truncations,
            forks,
            refused_logs,
            torn,
            lost_in_cache,
            neighbours,
            restored,
            spikes,
            compared,
            proven,
            refused_proofs,
            ledgers_aside,
            regrouped,
            regroups_refused,
            faults,
        } = other;
        self.events += events;
        self.requests += requests;
        self.epochs += epochs;
        self.disconnects += disconnects;
        self.real_sessions += real_sessions;
        self.dictionaries += dictionaries;
        self.promotions += promotions;
        self.shadows += shadows;
        self.comparisons += comparisons;
        self.kept_bytes += kept_bytes;
        self.usable += usable;
        self.truncations += truncations;
        self.forks += forks;
        self.refused_logs += refused_logs;
        self.torn += torn;
        self.lost_in_cache += lost_in_cache;
        self.neighbours += neighbours;
        self.restored += restored;
        self.spikes += spikes;
        self.compared += compared;
        self.proven += proven;
        self.refused_proofs += refused_proofs;
        self.ledgers_aside += ledgers_aside;
        self.regrouped += regrouped;
        self.regroups_refused += regroups_refused;
        for (sum, count) in self.faults.0.iter_mut().zip(faults.0) {
            *sum += count;
        }
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = [
            ("events", self.events),
            ("requests completed", self.requests),
            ("epochs sealed", self.epochs),
            ("sectors compared", self.compared),
            ("sessions ended", self.disconnects),
            ("real sessions opened", self.real_sessions),
            ("dictionaries trained", self.dictionaries),
            ("promotions", self.promotions),
            ("changes of peers made", self.regrouped),
            ("changes of peers refused by a node", self.regroups_refused),
            ("copies became usable", self.usable),
            ("shadows were switched in", self.shadows),
            ("state trees compared", self.comparisons),
            ("bytes left out of full copies", self.kept_bytes),
            ("tails dropped", self.truncations),
            ("tails to be saved", self.forks),
            ("damaged logs refused", self.refused_logs),
            ("proofs appended or taken", self.proven),
            ("proofs refused", self.refused_proofs),
            ("ledgers set aside", self.ledgers_aside),
            ("writes torn by a crash", self.torn),
            ("writes lost by a crash", self.lost_in_cache),
            (
                "physical sectors damaged that were written in part",
                self.neighbours,
            ),
            ("blocks written back whole", self.restored),
            ("slow disk operations", self.spikes),
        ];
        for (what, count) in lines {
            writeln!(f, "{count:>12}  {what}")?;
        }
        writeln!(f, "injected faults:")?;
        for fault in Fault::ALL {
            writeln!(f, "{:>12}  {fault:?}", self.faults.0[fault as usize])?;
        }
        Ok(())
    }
}
