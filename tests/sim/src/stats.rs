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
    /// Copies that began on a backing which somebody brought.
    pub brought: u64,
    /// Bytes of full copies that were left out for that.
    pub kept_bytes: u64,
    /// What was found and done about damaged backings.
    pub damage: DamageStats,
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

/// What was found and done about damaged backings, where there are state trees.
#[derive(Clone, Copy, Debug, Default)]
pub struct DamageStats {
    /// Blocks that were compared with their leaves for a read.
    pub checked: u64,
    /// Blocks that were to be, while there was no tree.
    pub unchecked: u64,
    /// Deep verifies that have ended.
    pub verifies: u64,
    /// Damaged blocks, by what found them.
    pub found: Counted,
    /// Blocks that were repaired from a peer.
    pub repaired: u64,
    /// Damaged blocks that a sweep wrote again.
    pub overwritten: u64,
    /// Times that no good copy was found for a block soon enough.
    pub lost: u64,
    /// Blocks that a client wrote again since nothing else helped.
    pub written_anew: u64,
    /// Damaged blocks that a full copy took along, unknown.
    pub copied: u64,
    /// Blocks whose leaves were of what nobody wrote, when a run ended.
    pub taken: u64,
    /// Reads that were given damage of which nobody could know.
    pub served: u64,
    /// Replicas that were made anew since their roots differed.
    pub roots_differed: u64,
}

impl DamageStats {
    fn add(&mut self, other: &Self) {
        let Self {
            checked,
            unchecked,
            verifies,
            found,
            repaired,
            overwritten,
            lost,
            written_anew,
            copied,
            taken,
            served,
            roots_differed,
        } = other;
        self.checked += checked;
        self.unchecked += unchecked;
        self.verifies += verifies;
        self.repaired += repaired;
        self.overwritten += overwritten;
        self.lost += lost;
        self.written_anew += written_anew;
        self.copied += copied;
        self.taken += taken;
        self.served += served;
        self.roots_differed += roots_differed;
        for (sum, count) in self.found.0.iter_mut().zip(found.0) {
            *sum += count;
        }
    }

    fn lines(&self) -> [(&'static str, u64); 15] {
        [
            ("blocks compared for reads", self.checked),
            ("blocks not compared, without a tree", self.unchecked),
            ("deep verifies", self.verifies),
            ("damaged blocks found by reads", self.found.of(Found::Read)),
            (
                "damaged blocks found by samples",
                self.found.of(Found::Sample),
            ),
            (
                "damaged blocks found by sweeps",
                self.found.of(Found::Sweep),
            ),
            (
                "damaged blocks found by verifies",
                self.found.of(Found::Verify),
            ),
            ("blocks repaired from a peer", self.repaired),
            ("damaged blocks overwritten", self.overwritten),
            ("searches for a good copy that took too long", self.lost),
            ("blocks that only a client could repair", self.written_anew),
            ("damaged blocks copied unknown", self.copied),
            ("damaged blocks taken for good at the end", self.taken),
            ("reads given damage nobody knew of", self.served),
            ("replicas made anew for their roots", self.roots_differed),
        ]
    }
}

/// What finds damage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Found {
    /// A read that waited.
    Read,
    /// A read that was looked at after it was answered.
    Sample,
    /// A sweep that wrote a block in part.
    Sweep,
    /// A deep verify.
    Verify,
}

/// How often each of them did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted([u64; 4]);

impl Counted {
    /// It found one more.
    pub(crate) fn count(&mut self, found: Found) {
        self.0[found as usize] += 1;
    }

    fn of(&self, found: Found) -> u64 {
        self.0[found as usize]
    }
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
            brought,
            kept_bytes,
            damage,
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
        self.brought += brought;
        self.kept_bytes += kept_bytes;
        self.damage.add(damage);
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
            ("backings brought", self.brought),
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
        for (what, count) in lines.into_iter().chain(self.damage.lines()) {
            writeln!(f, "{count:>12}  {what}")?;
        }
        writeln!(f, "injected faults:")?;
        for fault in Fault::ALL {
            writeln!(f, "{:>12}  {fault:?}", self.faults.0[fault as usize])?;
        }
        Ok(())
    }
}
