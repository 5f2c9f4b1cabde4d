//! Three nodes in network namespaces: every line and every pair of lines is cut, one way too, under
//! load; the primary is isolated and replaced; the primary changes ten times in order.
//!
//! An oracle knows what was acknowledged. A watcher asks all nodes all the time: in one term only
//! one of them may be primary.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::netns::{Net, Way};
use common::{LIMIT, Place, folder, is_usable, oracle, seed};
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::control::{ControlClient, Request};
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, SharedOracle, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, quiesce_and_compare};

/// Which node claimed to be primary in a term.
type Writers = BTreeMap<u64, String>;

/// Asks all nodes all the time who is primary.
struct Watcher {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Writers, u64)>,
}

impl Watcher {
    fn start(nodes: &[Node]) -> Self {
        let sockets: Vec<(String, PathBuf)> = nodes
            .iter()
            .map(|node| (node.name.clone(), node.control_socket()))
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut writers, mut answers) = (Writers::new(), 0);
            while !until.load(Ordering::Relaxed) {
                for (name, socket) in &sockets {
                    answers += u64::from(look(name, socket, &mut writers));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            (writers, answers)
        });
        Self { stop, thread }
    }

    /// Ends; fails if two nodes were primary in one term.
    fn finish(self) -> Writers {
        self.stop.store(true, Ordering::Relaxed);
        let (writers, answers) = self.thread.join().expect("one writer in a term");
        assert!(answers > 20, "only {answers} answers of nodes were seen");
        writers
    }
}

fn look(name: &str, socket: &std::path::Path, writers: &mut Writers) -> bool {
    // A node that is killed or just starting does not answer.
    let status = ControlClient::connect(socket).and_then(|mut client| client.status());
    let Ok(status) = status else {
        return false;
    };
    for state in status.volumes.into_iter().filter_map(|volume| volume.state) {
        if state.role == "primary" {
            let known = writers.entry(state.term).or_insert_with(|| name.to_owned());
            assert_eq!(known, name, "both are primary in term {}", state.term);
        }
    }
    true
}

/// Three running nodes, and what is to be found on them.
struct World {
    seed: u64,
    k: usize,
    nodes: Vec<Node>,
    primary: usize,
    oracle: SharedOracle,
    random: Random,
    loads: u64,
    net: Net,
    _place: Place,
}

impl World {
    fn start(k: usize, log_mib: u64) -> Option<Self> {
        let net = Net::new()?;
        let seed = seed(&format!("partition, k = {k}"));
        let plan = Plan {
            size_mib: 16,
            log_mib,
            overlay_mib: 16,
            nodes: 3,
            policy: format!("ack = \"durable\"\nack_peers = {k}\n"),
            ..Plan::default()
        };
        let place = folder();
        let mut nodes = net.nodes(place.path(), &plan);
        for node in &mut nodes {
            node.start().expect("it runs");
        }
        let mut world = Self {
            seed,
            k,
            nodes,
            primary: 0,
            oracle: oracle(seed, &plan),
            random: Random::new(seed),
            loads: 0,
            net,
            _place: place,
        };
        world.settle();
        Some(world)
    }

    /// Everybody follows the primary.
    fn settle(&mut self) {
        let primary = self.primary;
        for (_, node) in self
            .nodes
            .iter_mut()
            .enumerate()
            .filter(|(at, _)| *at != primary)
        {
            node.wait_for("have a copy", LIMIT, is_usable)
                .expect("it is seeded");
        }
        let live = |report: &VolumeReport| report.peers.iter().all(|peer| peer.live);
        self.nodes[primary]
            .wait_for("have both live", LIMIT, live)
            .expect("they follow");
    }

    fn load(&mut self) -> Load {
        self.loads += 1;
        // Little enough that the log reaches back to where a peer was cut off.
        let plan = LoadPlan {
            connections: 1,
            depth: 4,
            relay: 2,
            sectors_max: 16,
            ..LoadPlan::mixed(self.seed + self.loads)
        };
        let load = Load::start(&self.nodes[self.primary], &self.oracle, plan);
        let load = load.expect("the primary serves");
        load.wait_for_progress(100, LIMIT).expect("it moves");
        load
    }

    /// What was acknowledged is on the present primary.
    fn judge(&self, when: &str) {
        let (seed, k) = (self.seed, self.k);
        let seen = check(&self.nodes[self.primary], &self.oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, k = {k}, {when}: {error:#}"));
        assert_eq!(seen.missing_completed, 0, "seed {seed}, k = {k}, {when}");
        lock(&self.oracle).settle(&seen);
    }

    /// Cuts these ways for so long, while clients write. They may have to wait, and go on after.
    fn cut_under_load(&mut self, load: &Load, ways: &[Way], long: Duration) {
        ways.iter().for_each(|&way| self.net.cut(way));
        let (until, primary) = (Instant::now() + long, self.primary);
        // Nothing to wait for: the cut is to last.
        std::thread::sleep(long);
        assert!(Instant::now() >= until);
        ways.iter().for_each(|&way| self.net.heal(way));
        // The next cut finds everybody there, so that no peer is away for longer than one.
        self.settle();
        load.wait_for_progress(50, LIMIT)
            .unwrap_or_else(|error| panic!("primary {primary}, cut {ways:?}: {error:#}"));
    }

    fn someone_else(&mut self) -> usize {
        (self.primary + 1 + usize::from(self.random.one_in(2))) % 3
    }

    /// The copy with the longest log of those that are left. Where both acknowledge, one answer is
    /// enough for a promotion, and a copy that had more than the promoted one would keep it.
    fn newest_but(&self, primary: usize) -> usize {
        let tip = |node: &Node| {
            let state = node.report().expect("a report").state;
            state.expect("open").tip_epoch
        };
        let others = (0..3).filter(|&other| other != primary);
        let newest = others.max_by_key(|&other| tip(&self.nodes[other]));
        newest.expect("two others")
    }

    /// The primary is cut off, another one takes over, and the old one finds back.
    fn replace_isolated(&mut self) {
        let load = self.load();
        let old = self.primary;
        let ways = around(old, Direction::Both);
        ways.iter().for_each(|&way| self.net.cut(way));
        let new = self.newest_but(old);
        let promote = Request::Promote {
            volume: VOLUME.to_owned(),
            accept_loss: false,
        };
        // Until it has noticed that the primary gives no sign of life.
        let deadline = Instant::now() + LIMIT;
        while let Err(error) = self.nodes[new].ask(&promote) {
            assert!(Instant::now() < deadline, "{error:#}");
        }
        self.primary = new;
        self.judge("a promotion past an isolated primary");
        ways.iter().for_each(|&way| self.net.heal(way));
        load.was_fenced().expect("it accepts nothing any more");
        self.settle();
        self.judge("its return");
    }

    fn switch_over(&mut self) {
        let load = self.load();
        let new = self.someone_else();
        let switchover = Request::Switchover {
            volume: VOLUME.to_owned(),
            timeout_ms: 60_000,
        };
        let done = self.nodes[new].ask(&switchover);
        done.unwrap_or_else(|error| panic!("seed {}, to {new}: {error:#}", self.seed));
        load.was_handed_over().expect("only refused, never failed");
        self.primary = new;
        self.judge("a switchover");
        self.settle();
    }

    /// All three copies are equal, byte for byte.
    fn compare(&mut self) {
        self.settle();
        self.nodes.swap(0, self.primary);
        let [primary, others @ ..] = self.nodes.as_mut_slice() else {
            panic!("three nodes");
        };
        for other in others {
            quiesce_and_compare(primary, other, LIMIT).expect("equal copies");
        }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Both,
    In,
    Out,
}

/// All ways to and from a node: two of the three lines.
fn around(node: usize, direction: Direction) -> Vec<Way> {
    let others = (0..3).filter(|&other| other != node);
    let ways = others.flat_map(|other| match direction {
        Direction::Both => vec![(node, other), (other, node)],
        Direction::In => vec![(other, node)],
        Direction::Out => vec![(node, other)],
    });
    ways.collect()
}

/// Every line and every two lines, both ways and one way.
fn all_cuts() -> Vec<Vec<Way>> {
    let mut cuts = Vec::new();
    for (one, two) in [(0, 1), (0, 2), (1, 2)] {
        cuts.extend([
            vec![(one, two), (two, one)],
            vec![(one, two)],
            vec![(two, one)],
        ]);
    }
    for node in 0..3 {
        let ways = [Direction::Both, Direction::In, Direction::Out];
        cuts.extend(ways.map(|direction| around(node, direction)));
    }
    cuts
}

/// Each cut for so long, then so many changes of both kinds; prints what was done.
fn run(k: usize, (cut, log_mib): (Duration, u64), isolations: usize, switchovers: usize) {
    let Some(mut world) = World::start(k, log_mib) else {
        return;
    };
    let started = Instant::now();
    let watcher = Watcher::start(&world.nodes);
    let cuts = all_cuts();
    let load = world.load();
    for ways in &cuts {
        world.cut_under_load(&load, ways, cut);
    }
    load.stop()
        .expect("no connection broke and nothing was refused");
    world.judge("all cuts");
    world.settle();
    for _ in 0..isolations {
        world.replace_isolated();
    }
    for _ in 0..switchovers {
        world.switch_over();
    }
    world.compare();
    let writers = watcher.finish();
    let counts = lock(&world.oracle).counts();
    assert_eq!(writers.len(), 1 + isolations + switchovers, "{writers:?}");
    println!(
        "k = {k}: {} cuts of {cut:?}, {isolations} isolated primaries replaced, {switchovers} \
         switchovers in {:?}; {counts:?}; primary in each term: {writers:?}",
        cuts.len(),
        started.elapsed()
    );
}

/// The two runs take turns: half of the machine is too little for six daemons under load.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn every_cut_of_three_nodes_loses_nothing_with_one_acknowledging() {
    let _turn = TURN.lock();
    run(1, (Duration::from_millis(400), 48), 1, 2);
}

#[test]
fn every_cut_of_three_nodes_loses_nothing_with_both_acknowledging() {
    let _turn = TURN.lock();
    run(2, (Duration::from_millis(400), 48), 1, 2);
}

#[test]
#[ignore = "about ten minutes: cuts longer than every timeout, and ten switchovers; see TESTING.md"]
fn long_cuts_of_three_nodes_lose_nothing() {
    let _turn = TURN.lock();
    for k in [1, 2] {
        run(k, (Duration::from_secs(9), 384), 3, 10);
    }
}
