//! A replica that was away until the primary's log had wrapped, and both have state trees: what is
//! equal is neither sent nor read, and the copies are equal afterwards.

mod common;
#[path = "common/wire.rs"]
mod wire;

use common::trees::has_root;
use common::{LIMIT, folder, is_usable, pair, seed};
use hn4_engine::nbd::client::Client;
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce_and_compare};
use wire::{Line, Wire};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const GROUP: u64 = 64 << 10;
const DIFFERENCES: u64 = 200;

fn plan(transport: &'static str) -> Plan {
    Plan {
        size_mib: 1024,
        log_mib: 6,
        overlay_mib: 16,
        transport,
        policy: "ack = \"async\"\ndestage_delay_ms = 20\ntree = \"on\"\n".to_owned(),
        ..Plan::default()
    }
}

fn written(client: &mut Client, at: u64, length: u64, filler: u8) {
    let bytes = vec![filler; usize::try_from(length).expect("a short write")];
    client.write(at, &bytes, false).expect("written");
}

/// Writes one group again and again until the log has wrapped, and at last as it was.
fn wrap_log(alpha: &Node, plan: &Plan, group: u64) {
    let mut client = alpha.client().expect("a client");
    let times = 2 * plan.log_mib * MIB / GROUP;
    for filler in (0..times).rev() {
        let filler = u8::try_from(filler % 250).expect("small");
        written(&mut client, group * GROUP, GROUP, filler);
        client.flush().expect("flushed");
    }
}

fn kept_bytes(alpha: &Node) -> Option<u64> {
    alpha.report().expect("a report").peers[0].kept_bytes
}

/// Both trees are there, and nothing moves.
fn settle(alpha: &mut Node, beta: &mut Node) {
    quiesce_and_compare(alpha, beta, LIMIT).expect("equal copies");
    for node in [alpha, beta] {
        node.wait_for("have a root", LIMIT, has_root)
            .expect("a tree");
    }
}

/// Lets beta come back, and gives the bytes on the wire until it has caught up.
fn come_back(alpha: &mut Node, beta: &mut Node, wire: &Wire) -> u64 {
    let before = wire.passed();
    wire.set(Line::Open);
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    beta.wait_for("be usable", LIMIT, is_usable)
        .expect("it has caught up");
    wire.passed() - before
}

fn only_differences_travel(transport: &'static str) {
    let mut random = Random::new(seed("e2e_resync"));
    let (place, plan) = (folder(), plan(transport));
    let (mut alpha, mut beta) = pair(place.path(), &plan);
    let wire = Wire::from(&alpha, plan.transport);
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let (size, blocks) = (plan.size_mib * MIB, plan.size_mib * MIB / BLOCK);
    let mut client = alpha.client().expect("a client");
    for _ in 0..3 * DIFFERENCES {
        let at = random.below(blocks) * BLOCK;
        written(&mut client, at, BLOCK, 1);
    }
    wrap_log(&alpha, &plan, 0);
    settle(&mut alpha, &mut beta);

    wire.set(Line::Cut);
    for _ in 0..DIFFERENCES {
        let at = random.below(blocks) * BLOCK;
        written(&mut client, at, BLOCK, 2);
    }
    wrap_log(&alpha, &plan, 0);
    alpha.drain().expect("drained");
    let passed = come_back(&mut alpha, &mut beta, &wire);
    let kept = kept_bytes(&alpha).expect("the trees were compared");
    println!("{transport}: {DIFFERENCES} differences: {passed} bytes on the wire, {kept} kept");
    assert!(kept >= size - DIFFERENCES * GROUP, "{kept} bytes were kept");
    let most = DIFFERENCES * GROUP / 100 * 105;
    assert!(passed <= most, "{passed} bytes on the wire");
    let said = std::fs::read_to_string(alpha.journal()).expect("a journal");
    assert!(said.contains("resync by tree"), "{said}");
    settle(&mut alpha, &mut beta);

    wire.set(Line::Cut);
    wrap_log(&alpha, &plan, 0);
    alpha.drain().expect("drained");
    let passed = come_back(&mut alpha, &mut beta, &wire);
    println!("{transport}: equal copies: {passed} bytes on the wire");
    assert_eq!(kept_bytes(&alpha), Some(size));
    assert!(passed <= MIB, "{passed} bytes on the wire");
    settle(&mut alpha, &mut beta);
}

#[test]
fn only_what_differs_travels_over_quic() {
    only_differences_travel("quic");
}

#[test]
fn only_what_differs_travels_over_websocket() {
    only_differences_travel("wss");
}
