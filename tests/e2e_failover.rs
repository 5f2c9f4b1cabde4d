//! Changes of primary with real daemons: planned ones under load, promotions after a SIGKILL with
//! three nodes, and a primary that comes back. An oracle knows what must be there.

mod common;

use std::time::{Duration, Instant};

use common::{LIMIT, folder, is_usable, oracle, program, running_pair, seed, times};
use hn4_replicad::control::Request;
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, make_nodes, quiesce_and_compare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn plan() -> Plan {
    Plan {
        size_mib: 16,
        log_mib: 32,
        overlay_mib: 16,
        ..Plan::default()
    }
}

fn promote(accept_loss: bool) -> Request {
    Request::Promote {
        volume: VOLUME.to_owned(),
        accept_loss,
    }
}

fn role(report: &VolumeReport) -> &str {
    report
        .state
        .as_ref()
        .map_or("", |state| state.role.as_str())
}

/// Three nodes that run, the others with full copies of the first one's volume.
fn running_three(folder: &std::path::Path, plan: &Plan) -> Vec<Node> {
    let mut nodes = make_nodes(folder, program(), plan).expect("three nodes");
    for node in &mut nodes {
        node.start().expect("it runs");
    }
    for node in &mut nodes[1..] {
        node.wait_for("have a full copy", LIMIT, is_usable)
            .expect("it is seeded");
    }
    let follow = |report: &VolumeReport| report.peers.iter().all(|peer| peer.live);
    nodes[0]
        .wait_for("have both peers live", LIMIT, follow)
        .expect("they follow");
    nodes
}

#[test]
fn ten_switchovers_under_load_lose_nothing_and_fork_nothing() {
    switched_over(&plan(), 10);
}

#[test]
fn switchovers_of_a_volume_that_three_threads_serve_lose_nothing() {
    let mut plan = plan();
    plan.policy.push_str("threads = 3\n");
    switched_over(&plan, 4);
}

fn switched_over(plan: &Plan, times: usize) {
    let (seed, place) = (seed("switchover"), folder());
    let (alpha, beta) = running_pair(place.path(), plan);
    let mut nodes = [alpha, beta];
    let oracle = oracle(seed, plan);
    let mut random = Random::new(seed);
    let switchover = Request::Switchover {
        volume: VOLUME.to_owned(),
        timeout_ms: 60_000,
    };
    let mut slowest = Duration::ZERO;
    for round in 0..times {
        let (old, new) = (round % 2, (round + 1) % 2);
        let load_plan = LoadPlan::mixed(seed + round as u64);
        let load = Load::start(&nodes[old], &oracle, load_plan).expect("started");
        load.wait_for_progress(200 + random.below(1000), LIMIT)
            .expect("it moves");
        let started = Instant::now();
        nodes[new]
            .ask(&switchover)
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error:#}"));
        slowest = slowest.max(started.elapsed());
        load.was_handed_over().expect("only refused, never failed");
        let seen = check(&nodes[new], &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error:#}"));
        assert_eq!(seen.missing_completed, 0, "seed {seed}, round {round}");
        lock(&oracle).settle(&seen);
        assert_eq!(role(&nodes[old].report().expect("a report")), "replica");
        nodes[new].wait_for_peer(LIMIT).expect("the other follows");
    }
    let term = |node: &Node| node.report().expect("a report").state.expect("open").term;
    let terms = times as u64 + 1;
    assert_eq!(term(&nodes[0]), terms, "each change raised the term by one");
    let [alpha, beta] = &mut nodes;
    let hash = quiesce_and_compare(alpha, beta, LIMIT).expect("equal copies");
    println!("{times} switchovers, the slowest in {slowest:?}; both backings: {hash}");
}

/// A plan in which a write or flush waits for one peer in this way.
fn acknowledged(ack: &str) -> Plan {
    Plan {
        policy: format!("ack = \"{ack}\"\nack_peers = 1\n"),
        ..plan()
    }
}

#[test]
fn with_one_of_two_peers_acknowledging_either_may_be_promoted_and_has_everything() {
    either_may_be_promoted("durable", times("HN4_FAILOVERS", 3));
}

#[test]
fn with_one_of_two_peers_receiving_either_may_be_promoted_and_has_every_write() {
    either_may_be_promoted("received", times("HN4_FAILOVERS", 2));
}

fn either_may_be_promoted(ack: &str, rounds: u64) {
    let seed = seed(&format!("three, {ack}"));
    for round in 0..rounds {
        let plan = Plan {
            nodes: 3,
            ..acknowledged(ack)
        };
        let place = folder();
        let mut nodes = running_three(place.path(), &plan);
        let oracle = oracle(seed + round, &plan);
        let mut random = Random::new(seed + round);
        let load = Load::start(&nodes[0], &oracle, LoadPlan::mixed(seed + round)).expect("started");
        load.wait_for_progress(200 + random.below(1000), LIMIT)
            .expect("it moves");
        nodes[0].kill().expect("killed");
        load.was_cut().expect("no request was refused");
        let chosen = 1 + usize::from(random.one_in(2));
        nodes[chosen]
            .ask(&promote(false))
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error:#}"));
        let seen = check(&nodes[chosen], &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error:#}"));
        assert_eq!(seen.missing_completed, 0, "seed {seed}, round {round}");
        println!(
            "{ack}, round {round}: {} unanswered writes missing",
            seen.missing
        );
    }
}

#[test]
fn one_copy_of_two_is_not_promoted_without_the_other_unless_loss_is_accepted() {
    let place = folder();
    let mut nodes = running_three(place.path(), &Plan { nodes: 3, ..plan() });
    nodes[0].kill().expect("killed");
    nodes[2].kill().expect("killed");
    let gone = |report: &VolumeReport| report.peers.iter().all(|peer| !peer.connected);
    nodes[1]
        .wait_for("notice", LIMIT, gone)
        .expect("it notices");
    let error = nodes[1].ask(&promote(false)).expect_err("refused");
    assert!(
        format!("{error:#}").contains("only 0 can be reached"),
        "{error:#}"
    );
    assert_eq!(role(&nodes[1].report().expect("a report")), "replica");
    nodes[1].ask(&promote(true)).expect("loss is accepted");
    assert_eq!(role(&nodes[1].report().expect("a report")), "primary");
}

#[test]
fn a_promotion_that_found_too_few_in_time_can_be_tried_again_without_loss() {
    let place = folder();
    let plan = Plan {
        nodes: 3,
        ..acknowledged("received")
    };
    let mut nodes = running_three(place.path(), &plan);
    let mut client = nodes[0].client().expect("it serves");
    client.write(0, &[7; 4096], true).expect("flushed");
    drop(client);
    // The other one still counts as there when it is asked, but does not answer.
    let gamma = pid(&nodes[2]);
    nodes[0].kill().expect("killed");
    kill(gamma, Signal::SIGSTOP).expect("stopped");
    let refused = nodes[1].ask(&promote(false)).expect_err("it has no answer");
    println!("{refused:#}");
    kill(gamma, Signal::SIGCONT).expect("it goes on");
    let deadline = Instant::now() + LIMIT;
    while let Err(error) = nodes[1].ask(&promote(false)) {
        assert!(Instant::now() < deadline, "{error:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut client = nodes[1].client().expect("it serves");
    assert_eq!(client.read(0, 4096).expect("it reads"), [7; 4096]);
}

fn pid(node: &Node) -> Pid {
    let pid = node.pid().expect("it runs");
    Pid::from_raw(i32::try_from(pid).expect("a process"))
}

#[test]
fn a_restarted_primary_takes_back_what_only_its_peer_had_received() {
    let seed = seed("received");
    let policy = "ack = \"received\"\nack_peers = 1\n".to_owned();
    let (place, plan) = (folder(), Plan { policy, ..plan() });
    let (mut alpha, beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    for round in 0..times("HN4_FAILOVERS", 5) {
        let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed + round)).expect("started");
        load.wait_for_progress(200 + random.below(1000), LIMIT)
            .expect("it moves");
        alpha.kill().expect("killed");
        load.was_cut().expect("no request was refused");
        alpha.start().expect("it opens");
        let seen = check(&alpha, &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error:#}"));
        assert_eq!(seen.missing_completed, 0, "seed {seed}, round {round}");
        lock(&oracle).settle(&seen);
        alpha.wait_for_peer(LIMIT).expect("beta follows");
    }
    drop(beta);
}

#[test]
fn a_restarted_primary_without_its_peers_serves_only_when_told_to() {
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let mut client = alpha.client().expect("it serves");
    client.write(0, &[7; 4096], true).expect("written");
    drop(client);
    alpha.kill().expect("killed");
    beta.kill().expect("killed");
    alpha.start().expect("it runs");
    let report = alpha.report().expect("a report");
    let opening = |report: &VolumeReport| {
        let mut findings = report.findings.iter();
        findings.any(|finding| finding.state == "opening")
    };
    assert!(opening(&report), "{report:?}");
    alpha.ask(&promote(true)).expect("it is told to");
    let read = alpha
        .client()
        .expect("it serves")
        .read(0, 4096)
        .expect("it reads");
    assert_eq!(read, [7; 4096]);
    let report = alpha.report().expect("a report");
    let alone = |state: &str| state == "opened-alone";
    assert!(report.findings.iter().any(|found| alone(&found.state)));
}

/// What a snapshot or a backup of a whole machine does: log and backing are what they were.
#[test]
fn a_primary_whose_disks_were_set_back_does_not_serve_without_what_its_peer_holds() {
    let policy = "ack = \"durable\"\nack_peers = 1\n".to_owned();
    let (place, plan) = (folder(), Plan { policy, ..plan() });
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let write = |node: &Node, block: u64, value: u8| {
        let mut client = node.client().expect("it serves");
        let written = client.write(block * 4096, &[value; 4096], true);
        written.expect("written and flushed");
    };
    write(&alpha, 0, 1);
    alpha.stop(LIMIT).expect("stopped");
    let disks = [alpha.log(), alpha.backing()];
    let saved = ["log", "backing"].map(|name| place.path().join(name));
    for (disk, saved) in disks.iter().zip(&saved) {
        std::fs::copy(disk, saved).expect("saved");
    }
    alpha.start().expect("it opens");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    // Beta's log does not reach back to there any more.
    let mut client = alpha.client().expect("it serves");
    for round in 0..3 * plan.log_mib / plan.size_mib {
        for mib in 1..plan.size_mib {
            let value = u8::try_from(round + 2).expect("a few rounds");
            let written = client.write(mib << 20, &vec![value; 1 << 20], true);
            written.expect("written and flushed");
        }
    }
    drop(client);
    write(&alpha, 0, 9);
    alpha.kill().expect("killed");
    for (disk, saved) in disks.iter().zip(&saved) {
        std::fs::copy(saved, disk).expect("set back");
    }
    alpha.start().expect("it runs");
    let withheld = |report: &VolumeReport| {
        let mut opening = report
            .findings
            .iter()
            .filter(|found| found.state == "opening");
        opening.any(|found| {
            found
                .cause
                .contains("beta holds epochs that are missing here")
        })
    };
    let told = alpha.wait_for("say what is missing", LIMIT, withheld);
    told.expect("it does not open");
    let volume = VOLUME.to_owned();
    alpha
        .ask(&Request::Demote { volume })
        .expect("it steps down");
    beta.ask(&promote(false)).expect("it has everything");
    let read = beta.client().expect("it serves").read(0, 4096);
    assert_eq!(read.expect("it reads"), [9; 4096]);
    beta.wait_for_peer(LIMIT).expect("alpha follows");
    quiesce_and_compare(&mut beta, &mut alpha, LIMIT).expect("equal copies");
}

/// Fork files of a node.
fn forks(node: &Node) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(node.folder.join("state")).expect("a state directory");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let is_fork = |path: &std::path::PathBuf| path.extension().is_some_and(|end| end == "fork");
    paths.filter(is_fork).collect()
}

#[test]
fn a_returning_primary_saves_what_it_alone_has_and_follows_by_itself() {
    let place = folder();
    let policy = "ack = \"async\"\ndestage_delay_ms = 3600000\n".to_owned();
    let (mut alpha, mut beta) = running_pair(place.path(), &Plan { policy, ..plan() });
    let mut client = alpha.client().expect("it serves");
    client.write(0, &[1; 4096], true).expect("written");
    let tip = alpha.report().expect("a report").state.expect("open");
    beta.wait_for("have it", LIMIT, |report| {
        let state = report.state.as_ref();
        state.is_some_and(|state| state.tip_epoch >= tip.tip_epoch)
    })
    .expect("it follows");
    beta.kill().expect("killed");
    client
        .write(4096, &[0xA5; 4096], true)
        .expect("flushed on alpha only");
    drop(client);
    alpha.kill().expect("killed");
    beta.start().expect("it runs");
    beta.ask(&promote(true)).expect("loss is accepted");
    let mut client = beta.client().expect("it serves");
    client.write(8192, &[3; 4096], true).expect("written");
    alpha.start().expect("it comes back");
    alpha
        .wait_for("be a replica again", LIMIT, |report| {
            role(report) == "replica" && is_usable(report)
        })
        .expect("by itself");
    let hash = quiesce_and_compare(&mut beta, &mut alpha, LIMIT).expect("equal copies");
    let files = forks(&alpha);
    assert_eq!(files.len(), 1, "{files:?}");
    let saved = std::fs::read(&files[0]).expect("a fork file");
    let lost = saved.windows(4096).any(|bytes| bytes == [0xA5; 4096]);
    assert!(lost, "the write that only alpha had is in {files:?}");
    let read = client.read(4096, 4096).expect("it reads");
    assert_eq!(read, [0; 4096], "the new history does not have it");
    println!("equal again: {hash}");
}

#[test]
fn a_primary_that_was_replaced_under_load_follows_again_by_itself() {
    replaced_again_and_again(times("HN4_RETURNS", 4));
}

#[test]
fn what_the_only_peer_has_received_survives_its_primary() {
    the_other_copy_has_everything("received", times("HN4_FAILOVERS", 2));
}

#[test]
fn what_the_only_peer_has_flushed_survives_its_primary() {
    the_other_copy_has_everything("durable", times("HN4_FAILOVERS", 1));
}

/// The primary of two nodes is killed under load and the other copy promoted. Every write that was
/// answered is there.
fn the_other_copy_has_everything(ack: &str, rounds: u64) {
    let seed = seed(&format!("two, {ack}"));
    let (plan, mut slowest) = (acknowledged(ack), Duration::ZERO);
    for round in 0..rounds {
        let place = folder();
        let (mut alpha, beta) = running_pair(place.path(), &plan);
        let oracle = oracle(seed + round, &plan);
        let progress = 200 + Random::new(seed + round).below(1000);
        let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed + round)).expect("on");
        load.wait_for_progress(progress, LIMIT).expect("it moves");
        alpha.kill().expect("killed");
        load.was_cut().expect("no request was refused");
        let started = Instant::now();
        beta.ask(&promote(false)).expect("promoted");
        slowest = slowest.max(started.elapsed());
        let seen = check(&beta, &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error:#}"));
        assert_eq!(seen.missing_completed, 0, "seed {seed}, round {round}");
    }
    println!("{ack}: {rounds} failovers, the slowest promotion in {slowest:?}");
}

/// The primary is killed under load and the other copy promoted, in turns.
fn replaced_again_and_again(rounds: u64) {
    let seed = seed("returns");
    let (place, plan) = (folder(), plan());
    let (alpha, beta) = running_pair(place.path(), &plan);
    let mut nodes = [alpha, beta];
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    for round in 0..rounds {
        let (old, new) = if round % 2 == 0 { (0, 1) } else { (1, 0) };
        let load = Load::start(&nodes[old], &oracle, LoadPlan::mixed(seed + round)).expect("on");
        load.wait_for_progress(200 + random.below(1000), LIMIT)
            .expect("it moves");
        nodes[old].kill().expect("killed");
        load.was_cut().expect("no request was refused");
        nodes[new].ask(&promote(false)).expect("promoted");
        let seen = check(&nodes[new], &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error:#}"));
        assert_eq!(seen.missing_completed, 0, "seed {seed}, round {round}");
        lock(&oracle).settle(&seen);
        nodes[old].start().expect("it comes back");
        nodes[new]
            .wait_for_peer(LIMIT)
            .unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error:#}"));
    }
    let [alpha, beta] = &mut nodes;
    quiesce_and_compare(alpha, beta, LIMIT).expect("equal copies");
    check(alpha, &oracle, 0).expect("nothing is lost");
}
