//! Proofs with real daemons: what is written is signed, replicas apply only what is signed, and
//! whoever waits for an anchor gets one, whatever died meanwhile (P6, P10).

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use common::ledger::{
    ctl, ledger, ledger_folder, proof, public_key, refused, set_aside, settle, state_dir,
};
use common::{LIMIT, folder, oracle, pair, running_pair, seed, succeed, times, tool};
use hn4_proof::anchor::Anchor;
use hn4_proof::envelope::aggregate::Aggregate;
use hn4_proof::hash::Digest;
use hn4_proof::ledger::{Body, HEADER_BYTES, Record};
use hn4_proof::sign::{Algorithm, SecretKey};
use hn4_replicad::config::keys;
use hn4_replicad::control::Request;
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, quiesce_and_compare};

fn plan() -> Plan {
    Plan {
        size_mib: 24,
        log_mib: 32,
        overlay_mib: 16,
        ..Plan::default()
    }
}

fn write_some(node: &Node, oracle: &hn4_replicad::quickstart::load::SharedOracle, seed: u64) {
    let load = Load::start(node, oracle, LoadPlan::mixed(seed)).expect("started");
    load.wait_for_progress(2000, LIMIT).expect("it is served");
    load.stop().expect("no error");
}

#[test]
fn what_is_written_is_signed_compared_and_only_then_applied() {
    let seed = seed("proof");
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    write_some(&alpha, &oracle, seed);
    settle(&mut alpha, &mut beta);
    assert_eq!(ledger(&alpha), ledger(&beta), "one ledger, byte for byte");
    let report = beta.report().expect("a report");
    let proof = proof(&report).expect("a prover");
    assert!(proof.ledger_records > 2, "{proof:?}");
    assert_eq!((proof.failed.clone(), proof.notice.clone()), (None, None));
    // Both keep on where they were.
    for node in [&mut beta, &mut alpha] {
        node.stop(LIMIT).expect("stopped");
        node.start().expect("started");
    }
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let before = ledger(&alpha);
    write_some(&alpha, &oracle, seed + 1);
    settle(&mut alpha, &mut beta);
    assert!(
        ledger(&alpha).starts_with(&before),
        "a ledger is only ever continued"
    );
    assert_eq!(ledger(&alpha), ledger(&beta));
    assert_eq!((set_aside(&alpha), set_aside(&beta)), (0, 0));
}

#[test]
fn a_batch_is_signed_after_the_time_that_is_configured() {
    let place = folder();
    let mut plan = plan();
    plan.policy.push_str("proof_batch_ms = 2000\n");
    let (mut alpha, beta) = running_pair(place.path(), &plan);
    let mut client = alpha.client().expect("it serves");
    let epochs = |node: &Node| {
        let state = node.report().expect("a report").state.expect("open");
        (state.durable_epoch, state.proven_epoch, state.applied_epoch)
    };
    client.write(0, &[7; 4096], true).expect("durable");
    let first = Instant::now();
    let (durable, ..) = epochs(&alpha);
    // In small steps, so that a sweep would be seen that did not wait.
    while first.elapsed() < Duration::from_millis(1000) {
        client.write(8192, &[7; 4096], true).expect("durable");
        let (_, proven, applied) = epochs(&beta);
        let late = first.elapsed() >= Duration::from_millis(1900);
        assert!(
            late || (proven < durable && applied < durable),
            "signed early"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    alpha
        .wait_for("sign the batch", LIMIT, |report| {
            let state = report.state.as_ref();
            state.is_some_and(|state| state.proven_epoch == state.durable_epoch)
        })
        .expect("it is signed");
    assert!(first.elapsed() >= Duration::from_millis(1900));
    let records = proof(&alpha.report().expect("a report")).map(|proof| proof.ledger_records);
    assert!(records.is_some_and(|records| records < 8), "{records:?}");
}

#[test]
fn whoever_waits_for_an_anchor_gets_it_after_any_kill() {
    let seed = seed("proof kills");
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    for kill in 0..times("HN4_KILLS", 10) {
        let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed + kill)).expect("started");
        load.wait_for_progress(random.below(1500), LIMIT)
            .expect("served");
        if random.one_in(2) {
            alpha.kill().expect("killed");
            load.was_cut().expect("no request was refused");
            alpha.start().expect("it recovers");
            let seen = check(&alpha, &oracle, 0).expect("a prefix");
            lock(&oracle).settle(&seen);
        } else {
            beta.kill().expect("killed");
            beta.start().expect("it recovers");
            load.stop().expect("no error");
        }
        alpha.wait_for_peer(LIMIT).expect("beta follows");
    }
    settle(&mut alpha, &mut beta);
    assert_eq!(ledger(&alpha), ledger(&beta));
    assert_eq!((set_aside(&alpha), set_aside(&beta)), (0, 0));
}

#[test]
fn a_promoted_replica_signs_the_tail_under_its_own_term() {
    let seed = seed("proof failover");
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    load.wait_for_progress(1000, LIMIT).expect("served");
    alpha.kill().expect("killed");
    load.was_cut().expect("no request was refused");
    let promote = Request::Promote {
        volume: VOLUME.to_owned(),
        accept_loss: true,
    };
    beta.ask(&promote).expect("promoted");
    let seen = check(&beta, &oracle, 0).expect("a prefix");
    lock(&oracle).settle(&seen);
    beta.wait_for("sign what it adopted", LIMIT, |report| {
        let tip = report.state.as_ref().map(|state| state.tip_epoch);
        proof(report).and_then(|proof| proof.anchored_epoch) == tip
    })
    .expect("the tail is signed");
    let records = beta.report().expect("a report");
    assert_eq!(proof(&records).and_then(|proof| proof.notice.clone()), None);
}

#[test]
fn a_damaged_ledger_is_named_set_aside_and_made_good() {
    let seed = seed("proof damage");
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    write_some(&alpha, &oracle, seed);
    settle(&mut alpha, &mut beta);
    beta.stop(LIMIT).expect("stopped");
    let path = ledger_folder(&beta).join("ledger");
    let mut bytes = ledger(&beta);
    bytes[100] ^= 4;
    std::fs::write(&path, bytes).expect("damaged");
    beta.start().expect("the volume opens all the same");
    beta.wait_for("name the damage", LIMIT, |report| {
        let notice = proof(report).and_then(|proof| proof.notice.as_deref());
        notice.is_some_and(|notice| notice.contains("record 0"))
    })
    .expect("named");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    write_some(&alpha, &oracle, seed + 1);
    settle(&mut alpha, &mut beta);
    assert_eq!(ledger(&alpha), ledger(&beta), "fetched from the primary");
    assert_eq!(set_aside(&beta), 1, "nothing is destroyed");
}

/// The last records of a ledger's file, as lengths, the newest first.
fn lengths(bytes: &[u8]) -> Vec<usize> {
    let (mut at, mut lengths) = (HEADER_BYTES, Vec::new());
    while let Ok((_, length)) = Record::decode(&bytes[at..]) {
        lengths.push(length);
        at += length;
    }
    assert_eq!(at, bytes.len(), "a whole ledger");
    lengths.reverse();
    lengths
}

/// A primary's ledger loses its last records while it is down: they rot, or were never written.
/// Nobody else knows: it comes back in the same term, and replicas hold what it had signed.
fn loses_its_last_records(lost: usize, rot: bool, kill: bool) {
    let seed = seed("proof rot of a tail");
    // Nothing is written back, so that the log still has all that the lost records were about.
    let (place, plan) = (folder(), resting(""));
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    for part in 0..4 {
        let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed + part)).expect("started");
        load.wait_for_progress(30, LIMIT).expect("it is served");
        load.stop().expect("no error");
        // Each part has a batch of its own.
        std::thread::sleep(Duration::from_millis(120));
    }
    let is_proven = |report: &VolumeReport| {
        let state = report.state.as_ref();
        state.is_some_and(|state| state.tip_epoch > 0 && state.proven_epoch == state.tip_epoch)
    };
    for node in [&mut alpha, &mut beta] {
        node.wait_for("have it proven", LIMIT, is_proven)
            .expect("proven");
    }
    if kill {
        alpha.kill().expect("killed");
    } else {
        alpha.stop(LIMIT).expect("stopped");
    }
    let before = ledger(&alpha);
    assert_eq!(before, ledger(&beta));
    let bytes: usize = lengths(&before).iter().take(lost).sum();
    let mut after = before.clone();
    let at = after.len() - bytes;
    if rot {
        let mut from = at;
        for length in lengths(&before).iter().take(lost).rev() {
            after[from + length / 2] ^= 4;
            from += length;
        }
    } else {
        after.truncate(at);
    }
    std::fs::write(ledger_folder(&alpha).join("ledger"), after).expect("damaged");
    alpha.start().expect("it serves");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    if kill {
        let seen = check(&alpha, &oracle, 0).expect("a prefix");
        lock(&oracle).settle(&seen);
    }
    write_some(&alpha, &oracle, seed + 9);
    settle(&mut alpha, &mut beta);
    assert_eq!(ledger(&alpha), ledger(&beta), "one ledger again");
    for node in [&alpha, &beta] {
        let file = ledger_folder(node).join("ledger");
        let mut command = ctl();
        command.args(["ledger", "verify", "--file"]).arg(&file);
        succeed(command.arg("--key").arg(public_key(&alpha)));
    }
    // What rotted left a trace: it is waited for, and comes back. Of what was never written nothing
    // is known: it comes back if beta is there in time; else a new ledger begins, and the old are
    // kept.
    let is_back = ledger(&alpha).starts_with(&before);
    assert!(is_back || !rot, "{lost} lost, kill {kill}");
    let kept = usize::from(!is_back);
    assert_eq!((set_aside(&alpha), set_aside(&beta)), (kept, kept));
    eprintln!("{lost} lost, rot {rot}, kill {kill}: back {is_back}");
}

#[test]
fn the_last_record_of_a_primarys_ledger_rots() {
    loses_its_last_records(1, true, false);
}

#[test]
fn the_last_records_of_a_primarys_ledger_rot() {
    loses_its_last_records(3, true, true);
}

#[test]
fn the_last_records_of_a_primarys_ledger_were_never_written() {
    loses_its_last_records(2, false, true);
}

#[test]
fn a_replica_of_a_primary_without_proofs_applies_and_says_so() {
    let seed = seed("proof off");
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = pair(place.path(), &plan);
    let config = std::fs::read_to_string(alpha.config()).expect("a configuration");
    let without = config.replacen("[[volume]]\n", "[[volume]]\nproof = \"off\"\n", 1);
    assert_ne!(config, without);
    std::fs::write(alpha.config(), without).expect("written");
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let oracle = oracle(seed, &plan);
    write_some(&alpha, &oracle, seed);
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    let report = beta.report().expect("a report");
    let states: Vec<&str> = report.findings.iter().map(|f| f.state.as_str()).collect();
    assert!(states.contains(&"unproven-primary"), "{states:?}");
    // With proofs again, they begin where the log is.
    alpha.stop(Duration::from_secs(30)).expect("stopped");
    std::fs::write(alpha.config(), config).expect("written");
    alpha.start().expect("alpha serves");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    write_some(&alpha, &oracle, seed + 1);
    settle(&mut alpha, &mut beta);
    assert_eq!(ledger(&alpha), ledger(&beta));
}

fn verify(file: &Path, volume: &str, range: [u64; 2], key: &Path) -> Command {
    let mut command = ctl();
    command.args(["proof", "verify"]).arg(file);
    command.args(["--volume", volume]).arg("--key").arg(key);
    command.args([
        "--first",
        &range[0].to_string(),
        "--last",
        &range[1].to_string(),
    ]);
    command
}

/// Records that are swapped, missing, renamed or changed in one byte are refused.
fn refuses_tampering(file: &Path, volume: &str, range: [u64; 2], key: &Path) {
    let spoiled = file.with_extension("spoiled");
    let good = std::fs::read_to_string(file).expect("the proof");
    let document: serde_json::Value = serde_json::from_str(&good).expect("JSON");
    let records = document["records"].as_array().expect("records");
    assert!(records.len() > 2, "there is something to swap");
    let mut changed = document.clone();
    changed["records"]
        .as_array_mut()
        .expect("records")
        .swap(0, 1);
    let mut missing = document.clone();
    missing["records"]
        .as_array_mut()
        .expect("records")
        .remove(1);
    let mut renamed = document.clone();
    renamed["timestamp"] = "2020-01-01T00:00:00Z".into();
    let mut byte = document.clone();
    let record = document["records"][1].as_str().expect("base64");
    let (before, after) = record.split_at(record.len() / 2);
    let other = if after.starts_with('A') { 'B' } else { 'A' };
    byte["records"][1] = format!("{before}{other}{}", &after[1..]).into();
    for bad in [changed, missing, renamed, byte] {
        std::fs::write(&spoiled, bad.to_string()).expect("written");
        refused(&mut verify(&spoiled, volume, range, key));
    }
}

/// The XML export follows its schema.
fn exports_valid_xml(copy: &Path, folder: &Path) {
    let xml = folder.join("IDB.xml");
    let mut export = ctl();
    export
        .args(["ledger", "export", "--idb-xml", "--file"])
        .arg(copy);
    succeed(export.arg("--out").arg(&xml));
    if let Some(mut lint) = tool("xmllint") {
        let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("proof/schema/idb.xsd");
        succeed(lint.args(["--noout", "--schema"]).arg(schema).arg(&xml));
    }
}

#[test]
fn a_stranger_with_only_a_public_key_accepts_what_is_good_and_nothing_else() {
    let seed = seed("proof export");
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    write_some(&alpha, &oracle, seed);
    settle(&mut alpha, &mut beta);
    let state = alpha.report().expect("a report").state.expect("open");
    let range = [1, state.tip_epoch];
    let elsewhere = place.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).expect("a folder");
    let (key, other) = (public_key(&alpha), public_key(&beta));
    let copy = elsewhere.join("ledger");
    std::fs::copy(ledger_folder(&beta).join("ledger"), &copy).expect("copied");

    let check = |key: &Path, file: &Path| {
        let mut command = ctl();
        command.args(["ledger", "verify", "--file"]).arg(file);
        command.arg("--key").arg(key);
        command
    };
    let said = succeed(&mut check(&key, &copy));
    assert!(
        said.contains(&format!("anchored through epoch {}", range[1])),
        "{said}"
    );
    let why = refused(&mut check(&other, &copy));
    assert!(why.contains("no trusted key"), "{why}");
    let mut damaged = ledger(&beta);
    damaged[300] ^= 1;
    let spoiled = elsewhere.join("spoiled");
    std::fs::write(&spoiled, damaged).expect("written");
    refused(&mut check(&key, &spoiled));

    let file = elsewhere.join("proof.json");
    let mut export = ctl();
    export.args(["proof", "export", VOLUME, "--first", "1"]);
    export
        .args(["--last", &range[1].to_string(), "--out"])
        .arg(&file);
    succeed(export.arg("--config").arg(alpha.config()));
    let volume = &state.volume_id;
    succeed(&mut verify(&file, volume, range, &key));
    refused(&mut verify(&file, volume, range, &other));
    refused(&mut verify(&file, volume, [1, range[1] + 1], &key));
    let stranger = "11111111-2222-4333-8444-555555555555";
    refused(&mut verify(&file, stranger, range, &key));
    refuses_tampering(&file, volume, range, &key);
    refuses_what_does_not_fit(&file, volume, range, &alpha);
    exports_valid_xml(&copy, &elsewhere);
    let shown = succeed(ctl().args(["keys", "show", "--config"]).arg(alpha.config()));
    assert!(shown.contains("public key  ed25519:"), "{shown}");
}

type Change = fn(&mut Anchor);

/// A record of a document with its anchor changed, at a place, and signed by whoever holds the key.
fn signed_again(record: &str, key: &SecretKey, at: (u64, Digest), change: Change) -> Vec<u8> {
    let bytes = BASE64.decode(record).expect("base64");
    let Body::Anchor(mut signed) = Record::decode(&bytes).expect("a record").0.body else {
        panic!("an anchor");
    };
    change(&mut signed.anchor);
    (signed.anchor.step, signed.anchor.ledger_previous) = at;
    signed.signatures = vec![key.sign(&signed.anchor.hash()).expect("signed")];
    Record::encode(at.0, 0, &at.1, &Body::Anchor(signed))
}

/// What even the holder of the key cannot make of a range: an anchor of another volume among its
/// records, or epochs that are not there.
fn refuses_what_does_not_fit(file: &Path, volume: &str, range: [u64; 2], node: &Node) {
    let key = keys::node_key(&state_dir(node), Algorithm::Ed25519);
    let key = key.expect("readable").expect("a key");
    let text = std::fs::read_to_string(file).expect("the proof");
    let document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let records = document["records"].as_array().expect("records");
    let records: Vec<&str> = records.iter().filter_map(|it| it.as_str()).collect();
    let (last, before) = records.split_last().expect("records");
    let bytes = BASE64.decode(last).expect("base64");
    let record = Record::decode(&bytes).expect("a record").0;
    let cases: [(Change, &str); 3] = [
        (|_| {}, ""),
        (|anchor| anchor.volume.0[0] ^= 1, "is about volume"),
        (
            |anchor| {
                anchor.first = anchor.first.next();
                anchor.last = anchor.last.max(anchor.first);
            },
            "leaves a gap between epochs",
        ),
    ];
    for (change, why) in cases {
        let bytes = before.iter().map(|it| BASE64.decode(it));
        let mut bytes: Vec<Vec<u8>> = bytes.collect::<Result<_, _>>().expect("base64");
        let place = (record.index, record.previous);
        bytes.push(signed_again(last, &key, place, change));
        let changed = Aggregate::with_records(&bytes).expect("records");
        let spoiled = file.with_extension("spoiled");
        std::fs::write(&spoiled, changed.to_json().expect("JSON")).expect("written");
        let mut check = verify(&spoiled, volume, range, &public_key(node));
        if why.is_empty() {
            succeed(&mut check);
        } else {
            let said = refused(&mut check);
            assert!(said.contains(why), "{said}");
        }
    }
}

fn export_block(node: &Node, lba: u64, epoch: u64, file: &Path, format: &str) -> Command {
    // `--out` names a new file.
    let _ = std::fs::remove_file(file);
    let mut command = ctl();
    command.args(["proof", "export", VOLUME, "--format", format]);
    command.args(["--lba", &lba.to_string(), "--epoch", &epoch.to_string()]);
    command.arg("--out").arg(file);
    command.arg("--config").arg(node.config());
    command
}

fn verify_block(file: &Path, volume: &str, at: (u64, u64), data: &Path, key: &Path) -> Command {
    let mut command = ctl();
    command.args(["proof", "verify"]).arg(file);
    command.args(["--volume", volume]).arg("--key").arg(key);
    command.args(["--lba", &at.0.to_string(), "--epoch", &at.1.to_string()]);
    command.arg("--data").arg(data);
    command
}

/// A proof of a block that was changed anywhere is none.
fn refuses_changed_bytes(file: &Path, volume: &str, at: (u64, u64), data: &Path, key: &Path) {
    let good = std::fs::read(file).expect("a proof");
    let spoiled = file.with_extension("spoiled");
    for place in (0..16).map(|part| part * (good.len() - 2) / 16) {
        let mut bad = good.clone();
        bad[place] ^= 1;
        std::fs::write(&spoiled, bad).expect("written");
        refused(&mut verify_block(&spoiled, volume, at, data, key));
    }
}

/// A volume of which nothing is written back before it is asked for.
fn resting(more: &str) -> Plan {
    let policy = plan().policy;
    let lines = policy.lines().filter(|it| !it.contains("destage_delay"));
    let lines: String = lines.map(|line| format!("{line}\n")).collect();
    let more = format!("{more}destage_delay_ms = 60000\n");
    Plan {
        policy: format!("{lines}{more}"),
        ..plan()
    }
}

fn content(folder: &Path, byte: u8) -> PathBuf {
    let path = folder.join(format!("content-{byte}"));
    std::fs::write(&path, [byte; 4096]).expect("written");
    path
}

fn tip(node: &Node) -> (u64, String) {
    let state = node.report().expect("a report").state.expect("open");
    (state.tip_epoch, state.volume_id)
}

#[test]
fn what_a_block_was_is_proven_from_the_log_and_from_the_tree() {
    let place = folder();
    let (mut alpha, beta) =
        running_pair(place.path(), &resting("tree = \"on\"\ncheckpoint_s = 1\n"));
    let mut client = alpha.client().expect("a client");
    let mut write = |block: u64, byte: u8| {
        let written = client.write(block * 4096, &[byte; 4096], false);
        written.and_then(|()| client.flush()).expect("written");
        tip(&alpha)
    };
    let (first, volume) = write(3, 7);
    let (second, _) = write(9, 8);
    let [zero, one, seven, eight] = [0, 1, 7, 8].map(|byte| content(place.path(), byte));
    let (key, other) = (public_key(&alpha), public_key(&beta));
    let file = place.path().join("block");
    // In the log: a record wrote it, and no later epoch touched it.
    for (epoch, format) in [(first, "json"), (second, "json"), (second, "protobuf")] {
        succeed(&mut export_block(&alpha, 24, epoch, &file, format));
        let check = |at, data: &Path, key: &Path| verify_block(&file, &volume, at, data, key);
        succeed(&mut check((24, epoch), &seven, &key));
        refused(&mut check((24, epoch), &eight, &key));
        refused(&mut check((24, epoch), &seven, &other));
        refused(&mut check((72, epoch), &seven, &key));
        refused(&mut check((24, epoch + 1), &seven, &key));
    }
    let stranger = "11111111-2222-4333-8444-555555555555";
    let at = (24, second);
    refused(&mut verify_block(&file, stranger, at, &seven, &key));
    refuses_changed_bytes(&file, &volume, at, &seven, &key);

    // In the backing: the state tree at a root that the ledger vouches for.
    alpha.drain().expect("drained");
    let vouched = |report: &VolumeReport| {
        let state = report.state.as_ref();
        let at = state.map(|state| state.applied_epoch);
        state.is_some_and(|state| state.applied_epoch == state.tip_epoch)
            && proof(report).and_then(|proof| proof.state_epoch) == at
    };
    alpha
        .wait_for("have the state in the ledger", LIMIT, vouched)
        .expect("vouched for");
    let (tip, _) = tip(&alpha);
    for (lba, data) in [(24, &seven), (72, &eight), (800, &zero)] {
        succeed(&mut export_block(&alpha, lba, tip, &file, "json"));
        succeed(&mut verify_block(&file, &volume, (lba, tip), data, &key));
        refused(&mut verify_block(&file, &volume, (lba, tip), &one, &key));
    }
    refuses_changed_bytes(&file, &volume, (800, tip), &zero, &key);
}
