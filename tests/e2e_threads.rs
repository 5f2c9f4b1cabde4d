//! A volume that several threads serve: its clients are dealt out, and nothing else is different.
//!
//! What crashes do to such a volume is in `e2e_kill`, what switchovers do in `e2e_failover`.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{LIMIT, folder, program, seed, succeed, tool};
use hn4_replicad::quickstart::image::find_program;
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Node, Plan, make_nodes};

const THREADS: u64 = 3;

/// A node without peers whose volume several threads serve.
fn serving(folder: &Path) -> Node {
    let plan = Plan {
        size_mib: 48,
        log_mib: 32,
        overlay_mib: 16,
        policy: format!("threads = {THREADS}\n"),
        alone: true,
        ..Plan::default()
    };
    let nodes = make_nodes(folder, program(), &plan).expect("a node");
    let mut node = nodes.into_iter().next().expect("one node");
    node.start().expect("it serves");
    node
}

/// Ticks of the processor that each of the threads for clients has used.
fn ticks(node: &Node) -> Vec<(String, u64)> {
    let tasks = format!("/proc/{}/task", node.pid().expect("it runs"));
    let mut found = Vec::new();
    for task in std::fs::read_dir(tasks).expect("threads").flatten() {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let Some((start, rest)) = stat.rsplit_once(')') else {
            continue;
        };
        let name = start.split_once('(').map_or("", |(_, name)| name);
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |index: usize| fields[index].parse::<u64>().expect("a number");
        if name.starts_with("front ") {
            // From the state on: eleven fields, then user and system time.
            found.push((name.to_owned(), number(11) + number(12)));
        }
    }
    found.sort();
    found
}

fn clients(node: &Node) -> u64 {
    let report = node.report().expect("a report");
    report.state.expect("open").clients
}

fn wait_for_clients(node: &Node, count: u64) {
    let by = Instant::now() + LIMIT;
    while clients(node) != count {
        assert!(
            Instant::now() < by,
            "{} clients, not {count}",
            clients(node)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn clients_are_dealt_out_and_see_each_others_writes() {
    let place = folder();
    let mut node = serving(place.path());
    let mut connections: Vec<_> = (0..6).map(|_| node.client().expect("served")).collect();
    wait_for_clients(&node, 6);
    let by = Instant::now() + LIMIT;
    let mut round = 0_u64;
    // Each writes, the next one reads that at once: they are on different threads.
    loop {
        let writer = usize::try_from(round % 6).expect("small");
        let data = vec![round.to_le_bytes()[0]; 70_000 / 512 * 512];
        let offset = round * 12_288 % (40 << 20);
        connections[writer]
            .write(offset, &data, false)
            .expect("written");
        let next = &mut connections[(writer + 1) % 6];
        let length = u32::try_from(data.len()).expect("small");
        assert!(
            next.read(offset, length).expect("read") == data,
            "round {round}"
        );
        round += 1;
        let used = ticks(&node);
        assert_eq!(used.len() as u64, THREADS - 1, "{used:?}");
        if round > 500 && used.iter().all(|(_, ticks)| *ticks > 2) {
            break;
        }
        assert!(Instant::now() < by, "a thread has nothing to do: {used:?}");
    }
    connections[0].flush().expect("flushed");
    connections.truncate(2);
    wait_for_clients(&node, 2);
    node.stop(LIMIT).expect("it stops in order");
}

/// A fio that writes and reads.
fn fio(mut fio: Command, node: &Node, arguments: &[&str]) -> Command {
    fio.args(["--name=load", "--thread", "--ioengine=nbd", "--rw=randrw"])
        .args(arguments)
        .arg(format!("--uri={}", node.uri()))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    fio
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn clients_that_die_with_much_on_its_way_take_no_memory_along() {
    let Some(mut help) = tool("fio") else { return };
    if !succeed(help.arg("--enghelp")).contains("nbd") {
        return common::missing("fio's nbd engine");
    }
    // Not below the program that limits its time: that is what would be killed.
    let program = find_program("fio").expect("it was there");
    let place = folder();
    let node = serving(place.path());
    let many = ["--bs=1m", "--iodepth=16", "--size=40m", "--numjobs=3"];
    let endless = ["--time_based", "--runtime=600"];
    let mut random = Random::new(seed("threads"));
    // Were only a tenth of what is on its way lost each time, the overlay would be used up.
    for _ in 0..20 {
        let arguments = [&many[..], &endless[..]].concat();
        let before = node.report().expect("a report").state.expect("open");
        let mut command = fio(Command::new(&program), &node, &arguments);
        let child = Killed(command.spawn().expect("fio starts"));
        let by = Instant::now() + LIMIT;
        loop {
            let state = node.report().expect("a report").state.expect("open");
            if state.written_bytes > before.written_bytes + (16 << 20) {
                break;
            }
            assert!(
                Instant::now() < by,
                "nothing is written any more: {state:#?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(random.below(50)));
        drop(child);
    }
    wait_for_clients(&node, 0);
    // What is left serves as before.
    let verify = ["--bsrange=512-1m", "--blockalign=512", "--bs_unaligned=0"];
    let verify = [
        &verify[..],
        &["--iodepth=16", "--size=40m", "--verify=crc32c"],
    ]
    .concat();
    let verify = [&verify[..], &["--verify_fatal=1", "--verify_state_save=0"]].concat();
    let mut command = fio(tool("fio").expect("it was there"), &node, &verify);
    assert!(command.status().expect("fio runs").success(), "{verify:?}");
}
