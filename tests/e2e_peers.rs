//! The peers of a volume change while its daemons and clients run, and a key's pin says what its
//! node may be.

mod common;

use std::path::Path;
use std::process::Command;

use common::{LIMIT, folder, is_usable, oracle, program, running_pair, seed};
use hn4_replicad::cli::token::IdentityToken;
use hn4_replicad::config::edit;
use hn4_replicad::control::Request;
use hn4_replicad::control::api::{PeerReport, VolumeReport};
use hn4_replicad::quickstart::load::{Load, LoadPlan, check};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, make_nodes, quiesce_and_compare};

fn plan() -> Plan {
    Plan {
        size_mib: 16,
        log_mib: 32,
        overlay_mib: 16,
        ..Plan::default()
    }
}

/// Runs `hn4ctl` for a node; what it printed, and whether it did it.
fn hn4ctl(node: &Node, args: &[&str]) -> (String, bool) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hn4ctl"));
    let output = command
        .arg("--config")
        .arg(node.config())
        .args(args)
        .output();
    let output = output.expect("hn4ctl runs");
    (common::text(&output), output.status.success())
}

fn must(node: &Node, args: &[&str]) -> String {
    let (text, done) = hn4ctl(node, args);
    assert!(done, "{args:?}: {text}");
    text
}

fn configuration(node: &Node) -> String {
    std::fs::read_to_string(node.config()).expect("a configuration")
}

/// A line of the section that a node's configuration has for a peer.
fn line_of(node: &Node, peer: &str, key: &str) -> String {
    let text = configuration(node);
    let section = text
        .split("[[volume.peer]]")
        .find(|section| section.contains(&format!("name = \"{peer}\"\n")));
    let mut lines = section.expect("it has that peer").lines();
    let line = lines.find_map(|line| line.strip_prefix(&format!("{key} = ")));
    line.expect("a line").trim_matches('"').to_owned()
}

/// Takes a peer out of the configuration of a node whose daemon does not run.
fn forget_peer(node: &Node, peer: &str) {
    let text = edit::remove(&configuration(node), VOLUME, peer).expect("it has that peer");
    std::fs::write(node.config(), text).expect("written");
}

fn peer<'r>(report: &'r VolumeReport, name: &str) -> Option<&'r PeerReport> {
    report.peers.iter().find(|peer| peer.name == name)
}

fn is_live(report: &VolumeReport, name: &str) -> bool {
    peer(report, name).is_some_and(|peer| peer.live)
}

/// The node's copy is thrown away, and a new one is made that holds nothing.
fn make_anew(node: &Node, plan: &Plan, identity: &IdentityToken) {
    for file in ["log", "backing"] {
        std::fs::remove_file(node.folder().join(file)).expect("removed");
    }
    std::fs::remove_dir_all(node.folder().join("state")).expect("removed");
    node.create_volume(plan, Some(*identity))
        .expect("a new copy");
}

fn identity(node: &Node) -> IdentityToken {
    let state = node.report().expect("a report").state.expect("open");
    let (id, nonce) = (state.volume_id, state.birth_nonce);
    let token = format!(
        "hn4v1:{id}:{nonce}:{}:{}",
        state.size_bytes, state.sector_bytes
    );
    token.parse().expect("a token")
}

/// Alpha and beta share the volume and run; gamma is a copy that nobody knows yet.
fn two_of_three(place: &Path, plan: &Plan) -> [Node; 3] {
    let nodes = make_nodes(place, program(), plan).expect("three nodes");
    let mut nodes: [Node; 3] = nodes.try_into().expect("three");
    for node in &nodes[..2] {
        forget_peer(node, "gamma");
    }
    for node in &mut nodes {
        node.start().expect("it runs");
    }
    nodes[1]
        .wait_for("have a full copy", LIMIT, is_usable)
        .expect("beta is seeded");
    nodes
}

/// First where it makes a promotion ask for more, last on the primary.
fn add_gamma([alpha, beta, gamma]: &mut [Node; 3]) {
    let pin = must(gamma, &["pki", "pin"]).trim().to_owned();
    let text = configuration(gamma);
    let mut lines = text.lines();
    let address = lines.find_map(|line| line.strip_prefix("listen = \"127"));
    let address = format!("127{}", address.expect("its address").trim_matches('"'));
    let keys = ["--key-pin", pin.as_str(), "--address", address.as_str()];
    let args = [&["peer", "add", VOLUME, "gamma"], keys.as_slice()].concat();
    for node in [&*beta, &*alpha] {
        let done = must(node, &args);
        assert!(done.contains("gamma is a peer of vol0 now"), "{done}");
        let (again, done) = hn4ctl(node, &args);
        let refused = again.contains("has a peer named \"gamma\" already");
        assert!(!done && refused, "{again}");
    }
    let seeded = gamma.wait_for("have a full copy", LIMIT, is_usable);
    seeded.expect("gamma is seeded");
    let both = |report: &VolumeReport| is_live(report, "beta") && is_live(report, "gamma");
    alpha
        .wait_for("have both live", LIMIT, both)
        .expect("both follow");
}

/// First on the primary. What it acknowledged is on gamma, or this would not be done.
fn remove_beta([alpha, beta, gamma]: &mut [Node; 3], load: &Load) {
    must(alpha, &["peer", "remove", VOLUME, "beta"]);
    let report = alpha.report().expect("a report");
    let alone = peer(&report, "beta").is_none() && is_live(&report, "gamma");
    assert!(alone, "{report:?}");
    must(gamma, &["peer", "remove", VOLUME, "beta"]);
    let turned_away = |report: &VolumeReport| {
        let mut peers = report.peers.iter();
        peers.all(|peer| !peer.connected && peer.link.starts_with("failed"))
    };
    let before = beta.wait_for("be turned away", LIMIT, turned_away);
    load.wait_for_progress(300, LIMIT).expect("clients go on");
    let after = beta.report().expect("a report").state.expect("open");
    let before = before.expect("it gets nothing");
    assert_eq!(before.tip_epoch, after.tip_epoch, "nothing more comes");
    let waits_for = after.behind.and_then(|behind| behind.waits_for);
    assert_eq!(waits_for.as_deref(), Some("a primary: none sends anything"));
}

/// The only peer cannot go; the file stays as it is, with its comments.
fn keep_the_only_peer(alpha: &Node) {
    let text = format!("# Kept.\n{}", configuration(alpha));
    std::fs::write(alpha.config(), &text).expect("written");
    let (refused, done) = hn4ctl(alpha, &["peer", "remove", VOLUME, "gamma"]);
    let told = refused.contains("acknowledgements of 1 peer");
    assert!(!done && told, "{refused}");
    assert_eq!(configuration(alpha), text);
}

/// Beta begins anew, although gamma alone has what was acknowledged.
fn replace_gamma_by_beta([alpha, beta, _]: &mut [Node; 3], plan: &Plan, address: &str) {
    let identity = identity(alpha);
    beta.stop(LIMIT).expect("stopped");
    make_anew(beta, plan, &identity);
    beta.start().expect("it runs");
    let pin = must(beta, &["pki", "pin"]).trim().to_owned();
    let who = ["peer", "replace", VOLUME, "gamma", "--with", "beta"];
    let keys = [
        "--key-pin",
        &pin,
        "--address",
        address,
        "--accept-fewer-copies",
    ];
    must(alpha, &[who.as_slice(), &keys].concat());
    must(beta, &["peer", "remove", VOLUME, "gamma"]);
    assert!(configuration(alpha).starts_with("# Kept.\n"));
    let report = alpha.report().expect("a report");
    assert!(peer(&report, "gamma").is_none() && peer(&report, "beta").is_some());
    let seeded = beta.wait_for("have a full copy", LIMIT, is_usable);
    seeded.expect("beta is seeded anew");
}

#[test]
fn a_peer_is_added_another_removed_and_replaced_under_load_and_nothing_is_lost() {
    let seed = seed("peers");
    let plan = Plan { nodes: 3, ..plan() };
    let place = folder();
    let mut nodes = two_of_three(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let load = Load::start(&nodes[0], &oracle, LoadPlan::mixed(seed)).expect("started");
    let moves = || load.wait_for_progress(300, LIMIT).expect("clients go on");
    moves();
    let address = line_of(&nodes[2], "beta", "address");
    add_gamma(&mut nodes);
    moves();
    remove_beta(&mut nodes, &load);
    keep_the_only_peer(&nodes[0]);
    moves();
    replace_gamma_by_beta(&mut nodes, &plan, &address);
    moves();
    let [alpha, beta, _gamma] = &mut nodes;
    alpha.kill().expect("killed");
    load.was_cut()
        .expect("no request was refused in all of that");
    let promote = Request::Promote {
        volume: VOLUME.to_owned(),
        accept_loss: false,
    };
    beta.ask(&promote).expect("it knows of no other copy");
    let seen = check(beta, &oracle, 0).expect("nothing acknowledged is lost");
    assert_eq!(seen.missing_completed, 0, "seed {seed}");
}

#[test]
fn a_change_by_hand_is_taken_over_on_sighup_and_one_that_cannot_be_is_not() {
    let place = folder();
    let (mut alpha, mut beta) = running_pair(place.path(), &plan());
    // Another bound of its lag: the peer stays, and is not asked for anything.
    let text = configuration(&alpha);
    let bounded = format!("{text}max_lag_bytes = 1048576\n");
    std::fs::write(alpha.config(), &bounded).expect("written");
    let pid = i32::try_from(alpha.pid().expect("it runs")).expect("a pid");
    let signal = nix::sys::signal::Signal::SIGHUP;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("sent");
    let bound = |report: &VolumeReport| report.peers.iter().all(|peer| peer.lag_control.is_some());
    alpha
        .wait_for("have the bound", LIMIT, bound)
        .expect("taken over");
    assert!(must(&alpha, &["reload"]).contains("no volume's peers have changed"));
    // Something else: said, and left for the next start.
    std::fs::write(
        alpha.config(),
        bounded.replace("overlay_mib = 16", "overlay_mib = 32"),
    )
    .expect("written");
    assert!(must(&alpha, &["reload"]).contains("take effect at the next start"));
    // A text that is no configuration changes nothing.
    std::fs::write(alpha.config(), "nonsense").expect("written");
    let socket = alpha.control_socket();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hn4ctl"));
    let output = command.arg("--socket").arg(&socket).arg("reload").output();
    let said = common::text(&output.expect("hn4ctl runs"));
    assert!(said.contains("the configuration cannot be used"), "{said}");
    assert!(bound(&alpha.report().expect("a report")));
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
}

#[test]
fn a_peer_that_may_only_be_replica_cannot_take_the_volume_away() {
    let seed = seed("roles");
    let place = folder();
    let plan = Plan {
        policy: "ack = \"async\"\n".to_owned(),
        ..plan()
    };
    let (mut alpha, beta) = running_pair(place.path(), &plan);
    must(
        &alpha,
        &["peer", "replace", VOLUME, "beta", "--roles", "replica"],
    );
    alpha.wait_for_peer(LIMIT).expect("as a replica it follows");
    let oracle = oracle(seed, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    load.wait_for_progress(300, LIMIT).expect("it moves");
    let switchover = Request::Switchover {
        volume: VOLUME.to_owned(),
        timeout_ms: 1500,
    };
    let error = beta.ask(&switchover).expect_err("it may not ask for that");
    assert!(
        format!("{error:#}").contains("has not handed over"),
        "{error:#}"
    );
    let promote = Request::Promote {
        volume: VOLUME.to_owned(),
        accept_loss: true,
    };
    beta.ask(&promote).expect("for itself it may be anything");
    let refused = |report: &VolumeReport| {
        let beta = peer(report, "beta").expect("still configured");
        !beta.connected && beta.link.contains("may only be replica")
    };
    alpha
        .wait_for("refuse it", LIMIT, refused)
        .expect("and says why");
    load.wait_for_progress(300, LIMIT)
        .expect("clients notice nothing");
    load.stop().expect("nothing was refused");
    let state = alpha.report().expect("a report").state.expect("open");
    assert_eq!((state.role.as_str(), state.term), ("primary", 1));
    check(&alpha, &oracle, 0).expect("all is there");
}

#[test]
fn a_peer_that_may_only_be_primary_is_never_fed() {
    let place = folder();
    let plan = Plan {
        policy: "ack = \"async\"\n".to_owned(),
        ..plan()
    };
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    must(
        &alpha,
        &["peer", "replace", VOLUME, "beta", "--roles", "primary"],
    );
    let refused = |report: &VolumeReport| {
        let beta = peer(report, "beta").expect("still configured");
        !beta.connected && beta.link.contains("may only be primary")
    };
    alpha
        .wait_for("refuse it", LIMIT, refused)
        .expect("and says why");
    let state = beta.report().expect("a report").state.expect("open");
    alpha.flush().expect("flushed");
    let load = {
        let oracle = oracle(1, &plan);
        Load::start(&alpha, &oracle, LoadPlan::mixed(1)).expect("started")
    };
    load.wait_for_progress(300, LIMIT).expect("it moves");
    load.stop().expect("nothing was refused");
    let after = beta.report().expect("a report").state.expect("open");
    assert_eq!(state.tip_epoch, after.tip_epoch);
    must(
        &alpha,
        &[
            "peer",
            "replace",
            VOLUME,
            "beta",
            "--roles",
            "primary,replica",
        ],
    );
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("then it is");
}
