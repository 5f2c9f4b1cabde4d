//! P9 and P8 with real daemons: idle ones use no CPU, busy ones no more memory than was configured.

mod common;

use std::collections::HashMap;
use std::ffi::OsString;
use std::time::{Duration, Instant};

use common::{LIMIT, folder, oracle, running_pair, seed, times};
use hn4_replicad::quickstart::load::{Load, LoadPlan};
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce_and_compare};

/// CPU time that each thread of a daemon has used.
fn cpu_times(node: &Node) -> HashMap<OsString, Duration> {
    let pid = node.pid().expect("it runs");
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let of_task = |task: std::fs::DirEntry| {
        // Time on a CPU, time waiting for one, slices; in ns. A thread may end in this moment.
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        let nanoseconds = text.split(' ').next()?.parse().ok()?;
        Some((task.file_name(), Duration::from_nanos(nanoseconds)))
    };
    tasks.filter_map(|task| of_task(task.ok()?)).collect()
}

/// CPU time that the threads which are there now have used since then.
fn used_since(node: &Node, before: &HashMap<OsString, Duration>) -> Duration {
    let of_thread = |(thread, now): (OsString, Duration)| {
        now.saturating_sub(before.get(&thread).copied().unwrap_or_default())
    };
    cpu_times(node).into_iter().map(of_thread).sum()
}

/// Memory of a daemon that is not a mapped file: what it allocated.
fn memory_mib(node: &Node) -> u64 {
    let pid = node.pid().expect("it runs");
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let kib = |line: &str| -> Option<u64> {
        let (name, value) = line.split_once(':')?;
        let counts = ["RssAnon", "RssShmem"].contains(&name);
        value
            .trim()
            .split(' ')
            .next()
            .filter(|_| counts)?
            .parse()
            .ok()
    };
    text.lines().filter_map(kib).sum::<u64>() >> 10
}

#[test]
fn two_idle_nodes_use_less_than_a_thousandth_of_a_core_each() {
    let (place, plan) = (folder(), Plan::default());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(1, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(1)).expect("started");
    load.wait_for_progress(500, LIMIT).expect("it moves");
    load.stop().expect("answered");
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    // A client that says nothing is part of being idle.
    let _client = alpha.client().expect("a client");
    // What the load left to be done behind it, as proofs, is not: the test beside this one takes
    // both processors, so it may come late.
    std::thread::sleep(Duration::from_secs(5));
    let seconds = times("HN4_IDLE_S", 20);
    let (started, before) = (Instant::now(), [&alpha, &beta].map(cpu_times));
    std::thread::sleep(Duration::from_secs(seconds));
    let time = started.elapsed().as_secs_f64();
    for (node, before) in [&alpha, &beta].into_iter().zip(&before) {
        let used = used_since(node, before).as_secs_f64();
        let share = used / time * 100.0;
        println!(
            "{}: {:.1} ms in {time:.0} s, {share:.4} %",
            node.name,
            used * 1e3
        );
        assert!(share < 0.1, "{} used {share:.3} % of a core", node.name);
    }
}

/// Frames on their way to or from a peer: at most a window of 32 MiB, which may lie in the core, in
/// the session and in the connection below it.
const PEER_MIB: u64 = 96;

#[test]
fn memory_stays_within_overlay_and_peers_and_a_tenth() {
    let seed = seed("memory");
    let place = folder();
    let plan = Plan {
        size_mib: 256,
        log_mib: 192,
        overlay_mib: 128,
        ..Plan::default()
    };
    let (alpha, beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut load_plan = LoadPlan::mixed(seed);
    (
        load_plan.connections,
        load_plan.depth,
        load_plan.sectors_max,
    ) = (8, 32, 1024);
    let load = Load::start(&alpha, &oracle, load_plan).expect("started");
    let mut most = [0, 0];
    for _ in 0..10 {
        load.wait_for_progress(400, LIMIT).expect("it moves");
        for (most, node) in most.iter_mut().zip([&alpha, &beta]) {
            *most = memory_mib(node).max(*most);
        }
    }
    load.stop().expect("answered");
    let budget = plan.overlay_mib + PEER_MIB;
    println!(
        "alpha {} MiB, beta {} MiB of {budget} MiB",
        most[0], most[1]
    );
    for (most, node) in most.iter().zip([&alpha, &beta]) {
        let written = node.report().expect("a report").state.expect("open");
        assert!(
            *most * 10 <= budget * 11,
            "{} uses {most} MiB of {budget} MiB: {written:?}",
            node.name,
        );
    }
}
