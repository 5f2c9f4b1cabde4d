//! Resync by tree on volumes of 1 TiB, which are sparse files: what it costs on the wire and in
//! time when a replica comes back after the primary's log has wrapped, and when the line is cut
//! again and again meanwhile.

mod common;
#[path = "common/sparse.rs"]
mod sparse;
#[path = "common/wire.rs"]
mod wire;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use common::trees::{has_root, tree};
use common::{LIMIT, folder, is_usable, pair, seed};
use hn4_engine::nbd::client::Client;
use hn4_replicad::control::api::CopyReport;
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce};
use wire::{Line, Wire};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 1 << 40;
const BLOCK: u64 = 4096;
const GROUP: u64 = 64 << 10;
const DIFFERENCES: u64 = 1000;
const CUTS: u64 = 20;
/// What is asked of two copies that are equal.
const EQUAL_BYTES: u64 = MIB;
const TALK: Duration = Duration::from_secs(1);
/// What is asked of copies that differ.
const DIFFER_BYTES: u64 = DIFFERENCES * GROUP / 100 * 105;

fn plan(transport: &'static str) -> Plan {
    Plan {
        size_mib: SIZE / MIB,
        log_mib: 6,
        overlay_mib: 16,
        transport,
        policy: "ack = \"async\"\ndestage_delay_ms = 20\ntree = \"on\"\nscan_mib_per_s = 1024\n"
            .to_owned(),
        ..Plan::default()
    }
}

fn shown_root(node: &mut Node) -> String {
    node.wait_for("have a root", LIMIT, has_root)
        .expect("a tree");
    let report = node.report().expect("a report");
    let root = tree(&report).and_then(|tree| tree.root.clone());
    root.expect("a root")
}

/// Bytes that cannot be packed, and no two alike.
fn noise(random: &mut Random, length: u64) -> Vec<u8> {
    let words = (0..length / 8).flat_map(|_| random.draw().to_le_bytes());
    words.collect()
}

/// Writes without waiting for anything but the answer.
fn write(client: &mut Client, at: u64, bytes: &[u8]) {
    client.write(at, bytes, false).expect("written");
}

/// Numbers of groups all over the volume, the first one left out.
fn scattered(random: &mut Random, count: u64) -> Vec<u64> {
    let mut chosen = BTreeSet::new();
    while (chosen.len() as u64) < count {
        chosen.insert(1 + random.below(SIZE / GROUP - 1));
    }
    chosen.into_iter().collect()
}

/// What a return has cost.
struct Cost {
    wire_bytes: u64,
    /// From the line's repair until the copy was usable and followed.
    took: Duration,
    /// Of that, comparing trees.
    talk: Duration,
}

/// Two nodes with trees and a line between them.
struct Large {
    alpha: Node,
    beta: Node,
    wire: Wire,
    client: Client,
    plan: Plan,
    random: Random,
    /// Groups that hold data.
    groups: Vec<u64>,
    _place: common::Place,
}

impl Large {
    /// Both hold the same: 64 KiB in each of the groups.
    fn start(transport: &'static str) -> Self {
        let mut random = Random::new(seed("e2e_resync_large"));
        let (place, plan) = (folder(), plan(transport));
        let (mut alpha, mut beta) = pair(place.path(), &plan);
        let wire = Wire::from(&alpha, plan.transport);
        alpha.start().expect("alpha serves");
        beta.start().expect("beta runs");
        alpha.wait_for_peer(LIMIT).expect("beta follows");
        let mut client = alpha.client().expect("a client");
        let groups = scattered(&mut random, DIFFERENCES);
        for group in &groups {
            let bytes = noise(&mut random, GROUP);
            write(&mut client, group * GROUP, &bytes);
        }
        let mut large = Self {
            alpha,
            beta,
            wire,
            client,
            plan,
            random,
            groups,
            _place: place,
        };
        large.wrap_log();
        large.settle();
        large
    }

    /// Writes the first group again and again until the log has wrapped, and at last as it was.
    fn wrap_log(&mut self) {
        for filler in (0..2 * self.plan.log_mib * MIB / GROUP).rev() {
            let filler = u8::try_from(filler % 250).expect("small");
            write(&mut self.client, 0, &[filler; 64 << 10]);
            self.client.flush().expect("flushed");
        }
    }

    /// Changes 4 KiB somewhere in each of the groups.
    fn differ(&mut self) {
        for group in &self.groups {
            let at = group * GROUP + self.random.below(GROUP / BLOCK) * BLOCK;
            write(&mut self.client, at, &noise(&mut self.random, BLOCK));
        }
    }

    /// Both copies are equal, byte by byte, and both trees say so.
    fn settle(&mut self) {
        quiesce(&mut self.alpha, &mut self.beta, LIMIT).expect("one history");
        let data = sparse::assert_equal(&self.alpha.backing(), &self.beta.backing());
        assert!(data >= DIFFERENCES * GROUP, "{data} bytes of data");
        let root = shown_root(&mut self.alpha);
        assert_eq!(root, shown_root(&mut self.beta), "roots");
    }

    /// Cuts the line; both sides notice.
    fn cut(&mut self) {
        self.wire.set(Line::Cut);
        for node in [&mut self.alpha, &mut self.beta] {
            node.wait_for("miss its peer", LIMIT, |report| {
                report.peers.iter().all(|peer| !peer.connected)
            })
            .expect("cut off");
        }
    }

    /// The replica misses something that the log does not hold any more.
    fn miss(&mut self, what: impl FnOnce(&mut Self)) {
        self.cut();
        what(self);
        self.wrap_log();
        self.alpha.drain().expect("drained");
        self.alpha
            .wait_for("have all of it in the backing", LIMIT, |report| {
                let state = report.state.as_ref();
                state.is_some_and(|state| state.applied_epoch == state.tip_epoch)
            })
            .expect("drained");
    }

    /// The replica comes back; `meanwhile` runs until it has what it missed.
    fn come_back(&mut self, meanwhile: impl FnOnce(&mut Self)) -> Cost {
        let (before, said, began) = (self.wire.passed(), self.talks().len(), Instant::now());
        self.wire.set(Line::Open);
        meanwhile(self);
        self.alpha.wait_for_peer(LIMIT).expect("beta follows");
        let tip = self.alpha.report().expect("a report").state;
        let tip = tip.expect("an open volume").tip_epoch;
        self.beta
            .wait_for("have what it missed", LIMIT, |report| {
                let state = report.state.as_ref();
                is_usable(report) && state.is_some_and(|state| state.tip_epoch == tip)
            })
            .expect("it has caught up");
        let (took, wire_bytes) = (began.elapsed(), self.wire.passed() - before);
        let talks = self.talks();
        let talk = talks[said..].iter().sum();
        assert!(talks.len() > said, "the trees were compared");
        Cost {
            wire_bytes,
            took,
            talk,
        }
    }

    /// How long each comparison of the trees took, as the primary's journal has it.
    fn talks(&self) -> Vec<Duration> {
        let journal = std::fs::read_to_string(self.alpha.journal()).expect("a journal");
        let lines = journal.lines().map(plain);
        let compared = lines.filter(|line| line.contains("the state trees were compared"));
        let took = compared.map(|line| {
            let (_, after) = line.split_once("took_ms=").expect("how long");
            let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
            Duration::from_millis(digits.parse().expect("a number"))
        });
        took.collect()
    }

    fn kept_bytes(&self) -> Option<u64> {
        self.alpha.report().expect("a report").peers[0].kept_bytes
    }

    /// So much of the volume is through, if a copy is coming.
    fn compared_bytes(&self) -> u64 {
        let state = self.beta.report().ok().and_then(|report| report.state);
        match state.map(|state| state.copy) {
            Some(CopyReport::Shadowing { compared_bytes, .. }) => compared_bytes,
            _ => 0,
        }
    }
}

/// A line of a journal without colours.
fn plain(line: &str) -> String {
    let mut parts = line.split('\u{1b}');
    let first = parts.next().unwrap_or_default().to_owned();
    let rest = parts.map(|part| part.split_once('m').map_or("", |(_, text)| text));
    rest.fold(first, |all, part| all + part)
}

fn what_a_return_costs(transport: &'static str) -> (Large, Cost) {
    let mut large = Large::start(transport);
    large.miss(|_| {});
    let equal = large.come_back(|_| {});
    println!(
        "{transport}: equal volumes of 1 TiB: {} bytes on the wire, trees compared in {:?}, \
         caught up in {:?}",
        equal.wire_bytes, equal.talk, equal.took
    );
    assert_eq!(large.kept_bytes(), Some(SIZE));
    assert!(equal.wire_bytes < EQUAL_BYTES, "{} bytes", equal.wire_bytes);
    assert!(equal.talk < TALK, "{:?}", equal.talk);
    large.settle();

    large.miss(Large::differ);
    let differ = large.come_back(|_| {});
    println!(
        "{transport}: {DIFFERENCES} differences: {} bytes on the wire, trees compared in {:?}, \
         caught up in {:?}",
        differ.wire_bytes, differ.talk, differ.took
    );
    assert_eq!(large.kept_bytes(), Some(SIZE - DIFFERENCES * GROUP));
    assert!(
        differ.wire_bytes < DIFFER_BYTES,
        "{} bytes",
        differ.wire_bytes
    );
    large.settle();
    (large, differ)
}

fn cuts_cost_little(transport: &'static str, rate: u64) {
    let (mut large, uncut) = what_a_return_costs(transport);
    large.miss(Large::differ);
    large.wire.limit(rate);
    let mut cut_at = Vec::new();
    let cost = large.come_back(|large| {
        let (began, step) = (large.wire.passed(), uncut.wire_bytes / (CUTS + 2));
        for cut in 1..=CUTS {
            let deadline = Instant::now() + LIMIT;
            while large.wire.passed() < began + cut * step {
                assert!(Instant::now() < deadline, "cut {cut}: nothing comes");
                std::thread::sleep(Duration::from_millis(1));
            }
            cut_at.push(large.compared_bytes() >> 30);
            large.cut();
            large.wire.set(Line::Open);
        }
    });
    println!(
        "{transport}: the same with {CUTS} cuts at {cut_at:?} GiB: {} bytes on the wire, {:?}",
        cost.wire_bytes, cost.took
    );
    assert!(
        cost.wire_bytes <= uncut.wire_bytes / 10 * 11,
        "{} bytes, uncut {}",
        cost.wire_bytes,
        uncut.wire_bytes
    );
    assert_eq!(large.kept_bytes(), Some(SIZE - DIFFERENCES * GROUP));
    large.settle();
}

#[test]
fn equal_volumes_of_a_tib_cost_little_and_differences_what_they_are_also_through_20_cuts() {
    cuts_cost_little("wss", 24 * MIB);
}

#[test]
#[ignore = "each of 20 cuts is noticed after 8 s"]
fn the_same_over_quic() {
    cuts_cost_little("quic", 24 * MIB);
}
