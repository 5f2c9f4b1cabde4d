//! Real daemons over a hostile line, with QUIC and with WebSocket: bits flip, reads come twice or
//! in another order, nothing comes, everything is cut. Nothing that was acknowledged is lost, the
//! copies end equal, and status says what is wrong. Who may not join gets nothing.

mod common;
#[path = "common/wire.rs"]
mod wire;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{LIMIT, folder, is_usable, look_at_copy, oracle, pair, seed, times};
use hn4_replicad::control::api::{CopyReport, VolumeReport};
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check};
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce_and_compare};
use hn4_transport::pki::{self, write_certificate, write_secret};
use wire::{Line, Wire};

/// A connection is missed after about this long.
const PATIENCE: Duration = Duration::from_secs(40);

fn plan(transport: &'static str) -> Plan {
    Plan {
        size_mib: 32,
        overlay_mib: 16,
        transport,
        ..Plan::default()
    }
}

fn names(report: &VolumeReport, state: &str) -> bool {
    report.findings.iter().any(|finding| {
        finding.state == state && !finding.cause.is_empty() && !finding.next.is_empty()
    })
}

/// Waits until something is so, on the line or anywhere else that tells nobody.
fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Writers go on while the line is disturbed in every way, and nothing is lost.
fn survives(transport: &'static str) {
    let place = folder();
    let plan = plan(transport);
    let (mut alpha, mut beta) = pair(place.path(), &plan);
    let wire = Wire::from(&alpha, transport);
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    beta.wait_for("have a full copy", LIMIT, is_usable)
        .expect("beta is seeded");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let seed = seed("e2e_wire");
    let mut random = Random::new(seed);
    let oracle = oracle(seed, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("clients");
    for round in 0..times("HN4_WIRE_ROUNDS", 2) {
        let every = 1 + random.below(40);
        for line in [
            Line::Flipping(every),
            Line::Doubling(every),
            Line::Swapping(every),
        ] {
            let before = wire.disturbed();
            wire.set(line);
            wait("reads disturbed", || wire.disturbed() >= before + 8);
            wire.set(Line::Open);
            alpha.wait_for_peer(PATIENCE).expect("beta follows again");
            load.wait_for_progress(200, LIMIT).expect("writers go on");
        }
        for line in [Line::Stalled, Line::Cut] {
            wire.set(line);
            alpha
                .wait_for("miss its peer", PATIENCE, |report| {
                    names(report, "peer-not-connected") && names(report, "waiting-for-peers")
                })
                .expect("status says what is wrong");
            wire.set(Line::Open);
            alpha.wait_for_peer(PATIENCE).expect("beta follows again");
            load.wait_for_progress(200, LIMIT).expect("writers go on");
        }
        println!("{transport}, round {round}: one of {every} reads disturbed");
    }
    load.stop().expect("no request failed");
    check(&alpha, &oracle, 0).expect("nothing is lost");
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    beta.stop(LIMIT).expect("beta stops");
    look_at_copy(&beta, place.path(), &oracle);
}

#[test]
fn quic_over_a_hostile_line_loses_nothing() {
    survives("quic");
}

#[test]
fn websocket_over_a_hostile_line_loses_nothing() {
    survives("wss");
}

/// An authority whose key the test keeps.
struct Authority {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let made = pki::init_authority().expect("an authority");
        Self {
            certificate: made.certificate_pem,
            key: made.key_pem,
        }
    }

    /// Gives a node a certificate and a key; returns the key's pin.
    fn equip(&self, node: &Node) -> String {
        let issued = pki::issue_node(&self.key, &node.name).expect("a certificate");
        for name in ["ca.pem", "node.pem", "node.key"] {
            std::fs::remove_file(node.folder.join(name)).expect("there was one");
        }
        let place = |name: &str| node.folder.join(name);
        write_certificate(&place("ca.pem"), &self.certificate).expect("written");
        write_certificate(&place("node.pem"), &issued.certificate_pem).expect("written");
        write_secret(&place("node.key"), &issued.key_pem).expect("written");
        issued.pin.to_string()
    }
}

/// Makes a node expect this key of its only peer.
fn pin(node: &Node, pin: &str) {
    let text = std::fs::read_to_string(node.config()).expect("a configuration");
    let (before, rest) = text.split_once("key_pin = \"").expect("a pin");
    let (_, after) = rest.split_once('"').expect("a quoted pin");
    let text = format!("{before}key_pin = \"{pin}\"{after}");
    std::fs::write(node.config(), text).expect("a configuration");
}

/// Both daemons run, refuse each other for a reason that status tells, and beta gets nothing.
fn refused(alpha: &mut Node, beta: &mut Node, reason: &[&str]) {
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    let tells = |report: &VolumeReport| {
        names(report, "peer-not-connected")
            && report.findings.iter().any(|finding| {
                let cause = finding.cause.to_lowercase();
                reason.iter().any(|word| cause.contains(word))
            })
    };
    let told = alpha.wait_for("say why", PATIENCE, tells);
    told.expect("status says why the peer is refused");
    for finding in alpha.report().expect("a report").findings {
        println!("{}: {}", finding.state, finding.cause);
    }
    let report = beta.report().expect("beta answers");
    let copy = report.state.map(|state| state.copy);
    assert_eq!(copy, Some(CopyReport::Fresh), "beta got something");
    assert!(report.peers.iter().all(|peer| !peer.connected));
    alpha.stop(LIMIT).expect("alpha stops");
    beta.stop(LIMIT).expect("beta stops");
}

/// Both run with what they need, and beta is filled.
fn accepted(alpha: &mut Node, beta: &mut Node) {
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    beta.wait_for("have a full copy", LIMIT, is_usable)
        .expect("beta is seeded");
    quiesce_and_compare(alpha, beta, LIMIT).expect("equal copies");
}

fn strangers_get_nothing(transport: &'static str) {
    let place = folder();
    let policy = String::new();
    let plan = Plan {
        policy,
        ..plan(transport)
    };
    let (mut alpha, mut beta) = pair(place.path(), &plan);
    let authority = Authority::new();
    let (alpha_pin, beta_pin) = (authority.equip(&alpha), authority.equip(&beta));
    pin(&alpha, &beta_pin);
    pin(&beta, &alpha_pin);

    println!("{transport}: a certificate of another authority");
    keep_keys(&beta, place.path());
    Authority::new().equip(&beta);
    refused(&mut alpha, &mut beta, &["certificate", "unknown", "issuer"]);

    println!("{transport}: a certificate of the same authority, a key that is not pinned");
    authority.equip(&beta);
    refused(&mut alpha, &mut beta, &["pin", "key"]);

    restore_keys(&beta, place.path());
    accepted(&mut alpha, &mut beta);
}

fn keep_keys(node: &Node, place: &Path) {
    for name in ["ca.pem", "node.pem", "node.key"] {
        std::fs::copy(node.folder.join(name), place.join(name)).expect("kept");
    }
}

fn restore_keys(node: &Node, place: &Path) {
    for name in ["ca.pem", "node.pem", "node.key"] {
        std::fs::copy(place.join(name), node.folder.join(name)).expect("restored");
    }
}

#[test]
fn a_peer_without_the_right_key_gets_nothing_over_quic() {
    strangers_get_nothing("quic");
}

#[test]
fn a_peer_without_the_right_key_gets_nothing_over_websocket() {
    strangers_get_nothing("wss");
}

#[test]
fn a_peer_with_another_volume_is_refused_and_status_says_so() {
    for transport in ["quic", "wss"] {
        let place = folder();
        let plan = Plan {
            policy: String::new(),
            ..plan(transport)
        };
        let (mut alpha, mut beta) = pair(place.path(), &plan);
        let aside = place.path().join("aside");
        std::fs::create_dir(&aside).expect("a folder");
        for name in ["log", "backing", "state"] {
            std::fs::rename(beta.folder.join(name), aside.join(name)).expect("set aside");
        }
        beta.create_volume(&plan, None).expect("another volume");
        alpha.start().expect("alpha serves");
        beta.start().expect("beta runs");
        alpha
            .wait_for("say why", PATIENCE, |report| {
                names(report, "peer-not-connected")
                    && report.findings.iter().any(|finding| {
                        finding.cause.contains("volume") && !finding.cause.contains("connecting")
                    })
            })
            .expect("status says that the volumes differ");
        for finding in alpha.report().expect("a report").findings {
            println!("{transport}: {}: {}", finding.state, finding.cause);
        }
        assert!(alpha.report().is_ok_and(|report| {
            let peers = &report.peers;
            peers
                .iter()
                .all(|peer| !peer.live && peer.seeding_bytes.is_none())
        }));
        alpha.stop(LIMIT).expect("alpha stops");
        beta.stop(LIMIT).expect("beta stops");
        for name in ["log", "backing", "state"] {
            let own = beta.folder.join(name);
            if name == "state" {
                std::fs::remove_dir_all(&own).expect("removed");
            } else {
                std::fs::remove_file(&own).expect("removed");
            }
            std::fs::rename(aside.join(name), &own).expect("put back");
        }
        accepted(&mut alpha, &mut beta);
    }
}
