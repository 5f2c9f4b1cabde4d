//! A replica that is "seeded by truck": its backing was copied from the primary's by other means,
//! and some of it is wrong or has changed since. Only what differs is sent, and the copies are
//! equal afterwards, also if the replica is killed while it looks at what it has, and while it is
//! being filled.

mod common;
#[path = "common/wire.rs"]
mod wire;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use common::trees::{has_root, tree};
use common::{LIMIT, folder, is_usable, pair, seed, succeed};
use hn4_engine::nbd::client::Client;
use hn4_replicad::control::api::{CopyReport, VolumeReport};
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, quiesce_and_compare};
use wire::{Line, Wire};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const GROUP: u64 = 64 << 10;
/// What the load writes to again and again.
const HOT: u64 = MIB;

fn plan(transport: &'static str, scan_mib: u64) -> Plan {
    Plan {
        size_mib: 256,
        log_mib: 32,
        overlay_mib: 16,
        transport,
        policy: format!(
            "ack = \"async\"\nstart_alone_after_s = 0\ndestage_delay_ms = 20\ntree = \"on\"\n\
             scan_mib_per_s = {scan_mib}\n"
        ),
        ..Plan::default()
    }
}

/// Bytes that cannot be packed, and no two alike.
fn noise(random: &mut Random, length: u64) -> Vec<u8> {
    let words = (0..length / 8).flat_map(|_| random.draw().to_le_bytes());
    words.collect()
}

fn ctl(node: &Node, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hn4ctl"));
    succeed(command.args(arguments).arg("--config").arg(node.config()))
}

/// Somebody writes all the time, to a part of the volume.
struct Writer {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    fn start(alpha: &Node, mut random: Random) -> Self {
        let mut client = alpha.client().expect("a client");
        let (stop, writes) = (Arc::default(), Arc::default());
        let (end, count) = (
            Arc::<AtomicBool>::clone(&stop),
            Arc::<AtomicU64>::clone(&writes),
        );
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::SeqCst) {
                let at = random.below(HOT / BLOCK) * BLOCK;
                let bytes = noise(&mut random, BLOCK);
                client.write(at, &bytes, false).expect("written");
                client.flush().expect("flushed");
                count.fetch_add(1, Ordering::SeqCst);
                // A load, not a wait for anything.
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
        Self {
            stop,
            writes,
            thread: Some(thread),
        }
    }

    /// How much of log it has written.
    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().expect("it runs");
        thread.join().expect("all was written");
        // A block, the head of its epoch, what frames and anchors add.
        self.writes.load(Ordering::SeqCst) * (2 * BLOCK + 2048)
    }
}

/// A primary with data, and the backing of a replica that was copied from it and is not right.
struct Truck {
    alpha: Node,
    beta: Node,
    wire: Wire,
    random: Random,
    /// Groups that differ.
    differing: BTreeSet<u64>,
    /// What a copy is made with.
    token: String,
    /// Bytes of data.
    data: u64,
    plan: Plan,
    _place: common::Place,
}

impl Truck {
    /// `data_mib` of data behind the hot part, `flips` blocks of the copy that are wrong, and
    /// `changes` that are written at the primary later.
    fn load(plan: Plan, data_mib: u64, (flips, changes): (u64, u64)) -> Self {
        let mut random = Random::new(seed("e2e_seeded"));
        let place = folder();
        let (mut alpha, beta) = pair(place.path(), &plan);
        let wire = Wire::from(&alpha, plan.transport);
        wire.set(Line::Cut);
        // Beta is made anew, from what comes by truck.
        std::fs::remove_file(beta.log()).expect("a log");
        std::fs::remove_dir_all(beta.folder().join("state")).expect("a state directory");
        alpha.start().expect("alpha serves");
        let mut client = alpha.client().expect("a client");
        for at in (HOT..HOT + data_mib * MIB).step_by(1 << 20) {
            write(&mut client, at, &noise(&mut random, MIB));
        }
        client.flush().expect("flushed");
        drop(client);
        alpha.stop(LIMIT).expect("everything is in the backing");
        let token = ctl(&alpha, &["volume", "inspect", VOLUME]);
        let token = token.split_whitespace().nth(1).expect("a token").to_owned();
        std::fs::copy(alpha.backing(), beta.backing()).expect("copied");
        let mut differing = BTreeSet::new();
        let brought = OpenOptions::new()
            .read(true)
            .write(true)
            .open(beta.backing());
        let brought = brought.expect("a backing");
        for _ in 0..flips {
            let at = HOT + random.below(data_mib * MIB / BLOCK) * BLOCK;
            flip(&brought, at);
            differing.insert(at / GROUP);
        }
        drop(brought);
        alpha.start().expect("alpha serves");
        let mut client = alpha.client().expect("a client");
        for _ in 0..changes {
            let at = HOT + random.below(plan.size_mib * MIB / BLOCK - HOT / BLOCK) * BLOCK;
            write(&mut client, at, &noise(&mut random, BLOCK));
            differing.insert(at / GROUP);
        }
        client.flush().expect("flushed");
        Self {
            alpha,
            beta,
            wire,
            random,
            differing,
            token,
            data: data_mib * MIB,
            plan,
            _place: place,
        }
    }

    fn create_beta(&self, how: &str) {
        let arguments = [
            "volume",
            "create",
            VOLUME,
            "--replica",
            "--identity",
            &self.token,
            "--log-mib",
            &self.plan.log_mib.to_string(),
            how,
        ];
        ctl(&self.beta, &arguments);
    }

    /// Until beta is complete; gives the bytes on the wire.
    fn fill(&mut self) -> u64 {
        let before = self.wire.passed();
        self.beta.start().expect("beta runs");
        self.wire.set(Line::Open);
        self.complete();
        self.wire.passed() - before
    }

    fn complete(&mut self) {
        self.alpha.wait_for_peer(LIMIT).expect("beta follows");
        let beta = &mut self.beta;
        beta.wait_for("be usable", LIMIT, is_usable)
            .expect("it has caught up");
    }

    fn kept_bytes(&self) -> Option<u64> {
        self.alpha.report().expect("a report").peers[0].kept_bytes
    }

    /// Both hold the same, byte by byte, and both trees say so.
    fn settle(&mut self) {
        let sum = quiesce_and_compare(&mut self.alpha, &mut self.beta, LIMIT);
        println!("b3sum of both: {}", sum.expect("equal copies"));
        let mut roots = BTreeSet::new();
        for node in [&mut self.alpha, &mut self.beta] {
            node.wait_for("have a root", LIMIT, has_root)
                .expect("a tree");
            let report = node.report().expect("a report");
            let shown = tree(&report).expect("a tree");
            assert_eq!(shown.bad_blocks, 0);
            roots.extend(shown.root.clone());
        }
        assert_eq!(roots.len(), 1, "{roots:?}");
    }

    /// The least that is kept, and the most that differs and is sent, if the load was at work.
    fn bounds(&self) -> (u64, u64) {
        let differ = self.differing.len() as u64 * GROUP + HOT;
        (self.plan.size_mib * MIB - differ, differ)
    }
}

fn write(client: &mut Client, at: u64, bytes: &[u8]) {
    client.write(at, bytes, false).expect("written");
}

fn flip(file: &File, at: u64) {
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, at).expect("read");
    block[usize::try_from(at / BLOCK % BLOCK).expect("small")] ^= 0x10;
    file.write_all_at(&block, at).expect("written");
}

fn built_bytes(report: &VolumeReport) -> u64 {
    let built = tree(report).and_then(|tree| tree.built_bytes);
    built.unwrap_or(0)
}

fn received_bytes(report: &VolumeReport) -> u64 {
    match report.state.as_ref().map(|state| &state.copy) {
        Some(CopyReport::Seeding { received_bytes, .. }) => *received_bytes,
        _ => 0,
    }
}

fn only_differences_travel(transport: &'static str) {
    let mut truck = Truck::load(plan(transport, 1024), 96, (40, 60));
    truck.create_beta("--seeded");
    let writer = Writer::start(&truck.alpha, Random::new(truck.random.draw()));
    let passed = truck.fill();
    let log_bytes = writer.stop();
    let kept = truck.kept_bytes().expect("the trees were compared");
    let (least, differ) = truck.bounds();
    println!(
        "{transport}: {} of {} MiB of data brought, {} groups differ: {passed} bytes on the wire, \
         of which at most {log_bytes} are of the load; {kept} of {} bytes kept",
        truck.data / MIB,
        truck.plan.size_mib,
        truck.differing.len(),
        truck.plan.size_mib * MIB,
    );
    assert!(kept >= least, "{kept} bytes were kept, expected {least}");
    let most = differ / 100 * 105 + log_bytes + MIB / 2;
    assert!(
        passed <= most,
        "{passed} bytes on the wire, expected {most}"
    );
    let said = std::fs::read_to_string(truck.alpha.journal()).expect("a journal");
    assert!(said.contains("resync by tree"), "{said}");
    truck.settle();
}

#[test]
fn only_what_differs_travels_over_quic() {
    only_differences_travel("quic");
}

#[test]
fn only_what_differs_travels_over_websocket() {
    only_differences_travel("wss");
}

#[test]
fn of_a_copy_that_is_not_called_seeded_everything_travels() {
    let mut truck = Truck::load(plan("quic", 1024), 32, (5, 5));
    truck.create_beta("--overwrite-backing");
    let passed = truck.fill();
    println!(
        "not seeded: {passed} bytes on the wire, {} of data",
        truck.data
    );
    assert!(passed >= truck.data, "{passed} bytes on the wire");
    assert_eq!(truck.kept_bytes(), None);
    truck.settle();
}

#[test]
fn a_replica_that_is_killed_while_it_builds_and_while_it_is_filled_keeps_what_it_has() {
    let mut truck = Truck::load(plan("wss", 32), 128, (300, 300));
    truck.create_beta("--seeded");
    let writer = Writer::start(&truck.alpha, Random::new(truck.random.draw()));
    let before = truck.wire.passed();
    truck.beta.start().expect("beta runs");
    truck.wire.set(Line::Open);
    // What is hashed is recorded every 64 MiB.
    let beyond = 80 * MIB;
    let is_beyond = |report: &VolumeReport| built_bytes(report) >= beyond;
    truck
        .beta
        .wait_for("hash", LIMIT, is_beyond)
        .expect("built");
    let report = truck.beta.report().expect("a report");
    let said = report
        .findings
        .iter()
        .find(|found| found.state == "surveying");
    assert!(said.is_some(), "{:?}", report.findings);
    let report = truck.alpha.report().expect("a report");
    assert_eq!(report.peers[0].seeding_bytes, None, "nothing was asked for");
    truck.beta.kill().expect("killed");
    truck.wire.limit(8 * MIB);
    truck.beta.start().expect("beta runs");
    let mut first = None;
    let goes_on = |report: &VolumeReport| {
        first = first.or(Some(built_bytes(report)).filter(|&built| built > 0));
        received_bytes(report) >= 32 * MIB
    };
    truck
        .beta
        .wait_for("be filled", LIMIT, goes_on)
        .expect("filled");
    let first = first.expect("a tree that is being built");
    assert!(first >= 64 * MIB, "built again from {first}");
    truck.beta.kill().expect("killed");
    truck.beta.start().expect("beta runs");
    truck.complete();
    let (passed, log_bytes) = (truck.wire.passed() - before, writer.stop());
    let kept = truck.kept_bytes().expect("the trees were compared");
    let (least, differ) = truck.bounds();
    println!(
        "killed twice: {} groups differ: {passed} bytes on the wire, of which at most {log_bytes} \
         are of the load; {kept} bytes kept",
        truck.differing.len()
    );
    assert!(kept >= least, "{kept} bytes were kept, expected {least}");
    // What was on its way when it was killed comes again.
    let most = differ / 100 * 105 + log_bytes + 8 * MIB;
    assert!(
        passed <= most,
        "{passed} bytes on the wire, expected {most}"
    );
    truck.settle();
}
