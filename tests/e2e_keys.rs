//! Keys with real daemons: post-quantum signatures that are made, checked and insisted on, keys
//! that are replaced under load and kills, and a stolen old key that signs nothing (P6).

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::ledger::{
    ctl, ledger, ledger_folder, proof, public_key, refused, set_aside, settle, state_dir,
};
use common::{LIMIT, folder, oracle, running_pair, seed, succeed, times, tool};
use hn4::types::LogOffset;
use hn4_proof::anchor::SignedAnchor;
use hn4_proof::ledger::scan::Records;
use hn4_proof::ledger::verify::{Policy, Verifier};
use hn4_proof::ledger::{Body, Record};
use hn4_proof::sign::{Algorithm, SecretKey};
use hn4_replicad::config::keys;
use hn4_replicad::control::Request;
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::daemon::proof::medium::LedgerOnDisk;
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, SharedOracle, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME};

const STOP: Duration = Duration::from_secs(30);

fn plan(keys: &str) -> Plan {
    Plan {
        size_mib: 16,
        log_mib: 32,
        overlay_mib: 16,
        policy: format!("{}{keys}", Plan::default().policy),
        ..Plan::default()
    }
}

fn write_some(node: &Node, oracle: &SharedOracle, seed: u64) {
    let load = Load::start(node, oracle, LoadPlan::mixed(seed)).expect("started");
    load.wait_for_progress(1000, LIMIT).expect("it is served");
    load.stop().expect("no error");
}

/// Whether the state at the tip is vouched for.
fn is_vouched(report: &VolumeReport) -> bool {
    let tip = report.state.as_ref().map(|state| state.tip_epoch);
    tip.is_some() && proof(report).and_then(|proof| proof.state_epoch) == tip
}

fn verify_ledger(file: &Path, keys: &[PathBuf]) -> Command {
    let mut command = ctl();
    command.args(["ledger", "verify", "--file"]).arg(file);
    for key in keys {
        command.arg("--key").arg(key);
    }
    command
}

fn change(node: &mut Node, from: &str, to: &str) {
    let text = std::fs::read_to_string(node.config()).expect("a configuration");
    let changed = text.replace(from, to);
    assert_ne!(changed, text);
    node.stop(STOP).expect("stopped");
    std::fs::write(node.config(), changed).expect("written");
    node.start().expect("started");
}

#[test]
fn post_quantum_signatures_are_made_checked_and_insisted_on() {
    let seed = seed("post-quantum");
    let lines = "tree = \"on\"\nml_dsa = \"require\"\nslh_dsa = \"require\"\ncheckpoint_s = 1\n";
    let (place, plan) = (folder(), plan(lines));
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    write_some(&alpha, &oracle, seed);
    settle(&mut alpha, &mut beta);
    for node in [&mut alpha, &mut beta] {
        node.wait_for("have the state in the ledger", LIMIT, is_vouched)
            .expect("vouched for");
    }
    assert_eq!(ledger(&alpha), ledger(&beta));
    for algorithm in Algorithm::ALL {
        let secret = keys::secret_path(&state_dir(&alpha), algorithm);
        let mode = std::fs::metadata(secret)
            .expect("a key")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    // A stranger with one public key checks that one; what he insists on must be there, too.
    let copy = place.path().join("ledger");
    std::fs::copy(ledger_folder(&beta).join("ledger"), &copy).expect("copied");
    let both = ["--require", "ml-dsa-65", "--require", "slh-dsa-sha2-128f"];
    let mut check = verify_ledger(&copy, &[public_key(&alpha)]);
    let said = succeed(check.args(both));
    assert!(said.contains("checkpoint at epoch"), "{said}");
    valid_xml(&copy, &place.path().join("IDB.xml"));

    // Without its second key the primary signs what nobody here takes.
    change(&mut alpha, "ml_dsa = \"require\"", "ml_dsa = \"off\"");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let before = proof(&beta.report().expect("a report")).and_then(|proof| proof.anchored_epoch);
    let mut client = alpha.client().expect("a client");
    client.write(0, &[7; 4096], false).expect("written");
    client.flush().expect("flushed");
    beta.wait_for("refuse the anchor", LIMIT, |report| {
        let notice = proof(report).and_then(|proof| proof.notice.as_deref());
        notice.is_some_and(|why| why.contains("no ml-dsa-65 signature"))
    })
    .expect("refused");
    let report = beta.report().expect("a report");
    assert_eq!(
        proof(&report).and_then(|proof| proof.anchored_epoch),
        before
    );
    let state = report.state.expect("open");
    assert!(
        Some(state.applied_epoch) <= before,
        "nothing unproven is applied"
    );
    std::fs::copy(ledger_folder(&alpha).join("ledger"), &copy).expect("copied");
    succeed(&mut verify_ledger(&copy, &[public_key(&alpha)]));
    let mut check = verify_ledger(&copy, &[public_key(&alpha)]);
    let why = refused(check.args(&both[..2]));
    assert!(why.contains("ml-dsa-65 signature is required"), "{why}");
    // The replica's owner may take it all the same.
    change(&mut beta, "ml_dsa = \"require\"", "ml_dsa = \"sign\"");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    settle(&mut alpha, &mut beta);
}

fn valid_xml(ledger: &Path, xml: &Path) {
    let mut export = ctl();
    export
        .args(["ledger", "export", "--idb-xml", "--file"])
        .arg(ledger);
    succeed(export.arg("--out").arg(xml));
    let mut again = ctl();
    again
        .args(["ledger", "export", "--idb-xml", "--file"])
        .arg(ledger);
    let text = std::fs::read_to_string(xml).expect("XML");
    assert_eq!(
        succeed(&mut again),
        text,
        "the same ledger gives the same bytes"
    );
    if let Some(mut lint) = tool("xmllint") {
        let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("proof/schema/idb.xsd");
        succeed(lint.args(["--noout", "--schema"]).arg(schema).arg(xml));
    }
}

fn rotate(node: &Node) -> Command {
    let mut command = ctl();
    command
        .args(["keys", "rotate", "--config"])
        .arg(node.config());
    command
}

fn main_key(node: &Node) -> SecretKey {
    let key = keys::node_key(&state_dir(node), Algorithm::Ed25519);
    key.expect("readable").expect("a key")
}

fn is_rotated(node: &Node) -> bool {
    keys::rotating(&state_dir(node))
        .expect("readable")
        .is_empty()
}

#[test]
fn keys_are_replaced_under_load_and_kills_and_the_old_one_signs_nothing_more() {
    let seed = seed("rotation");
    let (place, plan) = (folder(), plan("ml_dsa = \"sign\"\n"));
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    let (old, first) = (main_key(&alpha), place.path().join("first.pub"));
    std::fs::copy(public_key(&alpha), &first).expect("copied");
    write_some(&alpha, &oracle, seed);
    for round in 0..times("HN4_KILLS", 4) {
        let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed + round)).expect("started");
        load.wait_for_progress(200, LIMIT).expect("served");
        let before = main_key(&alpha).public().id();
        let mut asked = rotate(&alpha).spawn().expect("hn4ctl runs");
        if round % 2 == 0 {
            assert!(asked.wait().expect("it ends").success(), "replaced");
            succeed(&mut rotate(&beta));
            load.wait_for_progress(200, LIMIT).expect("served");
            load.stop().expect("no error");
        } else {
            std::thread::sleep(Duration::from_millis(random.below(60)));
            alpha.kill().expect("killed");
            load.was_cut().expect("no request was refused");
            let _ = asked.wait().expect("it ends");
            let begun = !is_rotated(&alpha);
            alpha.start().expect("it recovers");
            let seen = check(&alpha, &oracle, 0).expect("a prefix");
            lock(&oracle).settle(&seen);
            alpha
                .wait_for("end what was begun", LIMIT, |_| {
                    let done = main_key_of(&place, "alpha") != Some(before);
                    !begun || done
                })
                .expect("replaced");
        }
        alpha.wait_for_peer(LIMIT).expect("beta follows");
    }
    settle(&mut alpha, &mut beta);
    assert!(is_rotated(&alpha) && is_rotated(&beta));
    assert_ne!(main_key(&alpha).public(), old.public());
    assert_eq!(ledger(&alpha), ledger(&beta));
    assert_eq!((set_aside(&alpha), set_aside(&beta)), (0, 0));
    let shown = succeed(ctl().args(["keys", "show", "--config"]).arg(alpha.config()));
    let retired = format!("retired     {}", old.public().id());
    assert!(shown.contains(&retired), "{shown}");

    // From the first key to the present one: whoever has either accepts the ledger.
    let path = ledger_folder(&beta).join("ledger");
    succeed(&mut verify_ledger(&path, &[first]));
    succeed(&mut verify_ledger(&path, &[public_key(&alpha)]));
    let forged = place.path().join("forged");
    std::fs::write(&forged, forge(&path, &old)).expect("written");
    let why = refused(&mut verify_ledger(&forged, &[public_key(&alpha)]));
    assert!(why.contains("was retired at step"), "{why}");

    // A thief runs the node with its first key.
    alpha.stop(STOP).expect("stopped");
    let secret = keys::secret_path(&state_dir(&alpha), Algorithm::Ed25519);
    std::fs::write(&secret, format!("{}\n", old.to_text())).expect("stolen");
    alpha.start().expect("it serves");
    alpha
        .wait_for("refuse to sign", LIMIT, |report| {
            let failed = proof(report).and_then(|proof| proof.failed.as_deref());
            failed.is_some_and(|why| why.contains("retired at step"))
        })
        .expect("refused");
    assert_eq!(ledger(&alpha), ledger(&beta), "nothing was signed");
    // Its owner draws a new one, and the volume has a new ledger.
    let volume = VOLUME.to_owned();
    alpha
        .ask(&Request::Flush { volume })
        .expect("it serves all the same");
    succeed(&mut rotate(&alpha));
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    write_some(&alpha, &oracle, seed + 100);
    settle(&mut alpha, &mut beta);
}

fn main_key_of(place: &common::Place, name: &str) -> Option<hn4_proof::sign::KeyId> {
    let state = place.path().join(name).join("state");
    let key = keys::node_key(&state, Algorithm::Ed25519).ok()??;
    Some(key.public().id())
}

/// A ledger with one more anchor, that would fit but for its signature.
fn forge(path: &Path, key: &SecretKey) -> Vec<u8> {
    let medium = LedgerOnDisk::look(path).expect("a ledger");
    let mut records = Records::new(&medium).expect("a header");
    let mut tip = Verifier::new(records.header(), Policy::default());
    let mut newest = None;
    while let Some(Ok(record)) = records.next_record().expect("read") {
        tip.push(&record).expect("a good record");
        if let Record {
            body: Body::Anchor(signed),
            ..
        } = record
        {
            newest = Some(signed.anchor);
        }
    }
    let mut anchor = newest.expect("an anchor");
    (anchor.step, anchor.ledger_previous) = (tip.next_index(), tip.previous());
    (anchor.previous, anchor.first) = (tip.last_anchor(), anchor.last.next());
    anchor.last = anchor.first;
    (anchor.start, anchor.end) = (anchor.end, LogOffset(anchor.end.0 + 8192));
    anchor.state = None;
    let signatures = vec![key.sign(&anchor.hash()).expect("signed")];
    let body = Body::Anchor(Box::new(SignedAnchor { anchor, signatures }));
    let mut bytes = std::fs::read(path).expect("a ledger");
    bytes.extend(tip.encode_next(0, &body));
    bytes
}

#[test]
fn a_deep_verify_is_in_the_node_s_own_ledger_and_its_export() {
    let (place, plan) = (folder(), plan("tree = \"on\"\n"));
    let (mut alpha, _beta) = running_pair(place.path(), &plan);
    let mut client = alpha.client().expect("a client");
    client.write(0, &[3; 8192], false).expect("written");
    client.flush().expect("flushed");
    alpha.drain().expect("drained");
    let volume = VOLUME.to_owned();
    alpha.ask(&Request::Verify { volume }).expect("asked");
    alpha
        .wait_for("have verified", LIMIT, |report| {
            let tree = report.state.as_ref().and_then(|state| state.tree.as_ref());
            tree.is_some_and(|tree| tree.verified_at_ms.is_some())
        })
        .expect("verified");
    let mut check = ctl();
    check.args(["ledger", "verify", VOLUME, "--local", "--config"]);
    let said = succeed(check.arg(alpha.config()));
    assert!(
        said.contains("4096 blocks, 0 damaged, 0 repaired"),
        "{said}"
    );
    // As `b3sum` of the backing says, which has holes.
    let backing = std::fs::read(alpha.backing()).expect("a backing");
    let b3sum = blake3::hash(&backing).to_hex();
    let told = format!("b3sum of the device: {b3sum}");
    assert!(said.contains(&told), "{said}");
    let path = ledger_folder(&alpha).join("local");
    let xml = place.path().join("local.xml");
    valid_xml(&path, &xml);
    let text = std::fs::read_to_string(xml).expect("XML");
    assert!(
        text.contains("4096 blocks of 4 KiB looked at, 0 damaged"),
        "{text}"
    );
    // One byte of what was found is another.
    let mut bytes = std::fs::read(&path).expect("a ledger");
    bytes[200] ^= 1;
    let spoiled = place.path().join("spoiled");
    std::fs::write(&spoiled, bytes).expect("written");
    refused(&mut verify_ledger(&spoiled, &[public_key(&alpha)]));
}
