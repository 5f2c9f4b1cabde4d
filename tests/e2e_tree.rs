//! The state tree with real daemons (P3, P4): its root is that of the raw backing on every copy,
//! whatever was killed meanwhile, and a device that has none gets one while it is in use.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::trees::{deep_verify, has_root, tree};
use common::{LIMIT, folder, oracle, running_pair, seed, single, succeed, times};
use hn4_proof::blocks;
use hn4_proof::tree::Geometry;
use hn4_proof::tree::build::SubtreeBuilder;
use hn4_replicad::control::Request;
use hn4_replicad::control::api::VolumeReport;
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, quiesce_and_compare};

fn plan() -> Plan {
    Plan {
        size_mib: 4,
        log_mib: 16,
        overlay_mib: 8,
        policy: format!("{}tree = \"on\"\n", Plan::default().policy),
        ..Plan::default()
    }
}

/// The root that a node shows when nothing moves any more.
fn shown_root(node: &mut Node) -> String {
    let waited = node.wait_for("have a root", LIMIT, has_root);
    if let Err(error) = waited {
        panic!("{error:#}\n{:#?}", node.report());
    }
    let report = node.report().expect("a report");
    let tree = tree(&report).expect("a tree");
    assert_eq!((&tree.failed, &tree.notice), (&None, &None));
    tree.root.clone().expect("a root")
}

/// The root of a file by definition: all its leaves, one after the other.
fn root_of(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.expect("a backing");
    let geometry = Geometry::new(bytes.len() as u64).expect("a size");
    let mut builder = SubtreeBuilder::whole(geometry).expect("a tree");
    let mut at = 0;
    blocks::leaves_of(&bytes, |leaf| {
        builder.push(at, leaf).expect("in order");
        at += 1;
    });
    geometry.root(&builder.finish()).to_string()
}

/// The root of a file by the second implementation, which shares no code with this one.
fn root_by_script(path: &Path) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/state_root.py");
    let said = succeed(Command::new("python3").arg(script).arg(path));
    said.trim().to_owned()
}

fn equal_roots(alpha: &mut Node, beta: &mut Node) {
    quiesce_and_compare(alpha, beta, LIMIT).expect("equal copies");
    let root = shown_root(alpha);
    assert_eq!(root, root_of(&alpha.backing()), "alpha's backing");
    assert_eq!(root, root_by_script(&beta.backing()), "the script's root");
    assert_eq!(root, shown_root(beta), "both nodes show one root");
    for node in [alpha, beta] {
        node.wait_for("call the copies equal", LIMIT, are_equal)
            .expect("compared");
    }
}

/// Whether the peer has the same root at what the backing holds.
fn are_equal(report: &VolumeReport) -> bool {
    let applied = report.state.as_ref().map(|state| state.applied_epoch);
    let compared = report.peers.first().and_then(|peer| peer.compared.as_ref());
    compared.is_some_and(|compared| compared.equal && Some(compared.epoch) == applied)
}

/// A load of all sizes that dies with one of the nodes.
fn lose_one(alpha: &mut Node, beta: &mut Node, random: &mut Random, oracle: &Shared) {
    let load = Load::start(alpha, oracle, LoadPlan::mixed(random.draw())).expect("started");
    let least = 200 + random.below(1500);
    load.wait_for_progress(least, LIMIT).expect("it is served");
    if random.one_in(2) {
        alpha.kill().expect("killed");
        load.was_cut().expect("no request was refused");
        alpha.start().expect("it recovers");
        let seen = check(alpha, oracle, 0).expect("a prefix");
        lock(oracle).settle(&seen);
    } else {
        beta.kill().expect("killed");
        beta.start().expect("it recovers");
        load.stop().expect("no error");
    }
    alpha.wait_for_peer(LIMIT).expect("beta follows");
}

type Shared = hn4_replicad::quickstart::load::SharedOracle;

fn roots_through_kills(kills: u64, compare_every: u64) {
    let seed = seed("roots");
    // No power of two.
    let plan = Plan {
        size_mib: 5,
        ..plan()
    };
    let place = folder();
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    for kill in 1..=kills {
        lose_one(&mut alpha, &mut beta, &mut random, &oracle);
        if kill % compare_every == 0 {
            equal_roots(&mut alpha, &mut beta);
        }
    }
    equal_roots(&mut alpha, &mut beta);
    check(&alpha, &oracle, 0).expect("and they hold what was written");
}

#[test]
fn after_any_kill_the_root_is_that_of_the_backing_on_both_nodes() {
    roots_through_kills(times("HN4_KILLS", 6), 2);
}

#[test]
#[ignore = "the long run: 200 losses take many minutes"]
fn after_200_kills_the_root_is_that_of_the_backing_on_both_nodes() {
    roots_through_kills(200, 10);
}

/// Blocks that are all different, some of them zeroes.
fn fill(path: &Path, bytes: u64) {
    let file = File::options().write(true).open(path).expect("a backing");
    for block in (0..bytes / 4096).filter(|block| block % 16 != 3) {
        let mut contents = [0xA5_u8; 4096];
        contents[..8].copy_from_slice(&block.to_le_bytes());
        file.write_all_at(&contents, block * 4096).expect("written");
    }
    file.sync_all().expect("flushed");
}

/// A node without peers that keeps a tree.
fn alone(folder: &Path, plan: Plan) -> Node {
    let node = single(folder, plan);
    let text = std::fs::read_to_string(node.config()).expect("a configuration");
    let on = text.replacen("[[volume]]\n", "[[volume]]\ntree = \"on\"\n", 1);
    std::fs::write(node.config(), on).expect("edited");
    node
}

fn built(report: &VolumeReport) -> u64 {
    let done = report.state.as_ref().map_or(0, |state| state.size_bytes);
    tree(report).map_or(0, |tree| match (&tree.root, tree.built_bytes) {
        (Some(_), _) => done,
        (None, built) => built.unwrap_or(0),
    })
}

#[test]
fn a_device_that_has_none_gets_a_tree_while_it_is_in_use_and_a_kill_loses_little_of_it() {
    let seed = seed("first build");
    let place = folder();
    let plan = Plan {
        size_mib: 160,
        ..plan()
    };
    let mut node = alone(place.path(), plan);
    fill(&node.backing(), 160 << 20);
    let text = std::fs::read_to_string(node.config()).expect("a configuration");
    let slow = text.replacen("[[volume]]\n", "[[volume]]\nscan_mib_per_s = 40\n", 1);
    std::fs::write(node.config(), slow).expect("edited");
    let began = Instant::now();
    node.start().expect("it serves");
    // What is written meanwhile wins over what was hashed before.
    let client = node.client().expect("a client");
    let mut random = Random::new(seed);
    let mut write_some = move |mut client: hn4_engine::nbd::client::Client| {
        for _ in 0..50 {
            let at = random.below(160 << 11) * 512;
            let sectors = (1 + random.below(16)).min((160 << 11) - at / 512);
            let bytes = vec![7; usize::try_from(sectors * 512).expect("small")];
            client.write(at, &bytes, false).expect("written");
        }
        client.flush().expect("flushed");
    };
    write_some(client);
    node.wait_for("have hashed some", LIMIT, |report| built(report) > 80 << 20)
        .expect("it builds");
    node.kill().expect("killed");
    node.start().expect("it recovers");
    let first = node.wait_for("go on", LIMIT, |report| built(report) > 0);
    first.expect("it goes on");
    let resumed = built(&node.report().expect("a report"));
    assert!(resumed >= 60 << 20, "it went on at byte {resumed}");
    write_some(node.client().expect("a client"));
    node.wait_for("be built", LIMIT, |report| built(report) == 160 << 20)
        .expect("it builds");
    // 40 MiB in a second, and a quarter of a second that may be made up for.
    let least = Duration::from_millis(2500);
    assert!(began.elapsed() > least, "built in {:?}", began.elapsed());
    node.drain().expect("drained");
    assert_eq!(shown_root(&mut node), root_of(&node.backing()));
}

#[test]
fn a_tree_that_cannot_be_kept_holds_nobody_up_and_is_told() {
    let place = folder();
    let mut node = alone(place.path(), plan());
    // A file where its folder is to be.
    let state = node.folder().join("state");
    std::fs::create_dir_all(&state).expect("a state directory");
    let mut file = File::create(state.join("tree")).expect("a file");
    file.write_all(b"in the way").expect("written");
    node.start().expect("it serves");
    let mut client = node.client().expect("a client");
    client.write(0, &[1; 4096], false).expect("written");
    client.flush().expect("flushed");
    node.drain().expect("and written back");
    node.wait_for("say so", LIMIT, |report| {
        let findings = &mut report.findings.iter();
        findings.any(|finding| finding.state == "tree-failed")
    })
    .expect("it is told");
}

/// Changes one bit of a block behind the daemon's back.
fn flip(path: &Path, block: u64) {
    let file = File::options().read(true).write(true).open(path);
    let file = file.expect("a backing");
    let mut byte = [0];
    let at = block * 4096 + 17;
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 4], at).expect("written");
    file.sync_all().expect("flushed");
}

#[test]
fn a_deep_verify_names_what_was_changed_and_nothing_else_also_under_load() {
    let seed = seed("verify");
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let oracle = oracle(seed, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(seed)).expect("started");
    load.wait_for_progress(500, LIMIT).expect("it is served");
    for _ in 0..3 {
        assert_eq!(deep_verify(&mut alpha).bad_blocks, 0, "no false alarm");
        assert_eq!(deep_verify(&mut beta).bad_blocks, 0, "no false alarm");
    }
    load.stop().expect("no error");
    equal_roots(&mut alpha, &mut beta);
    // Nobody is there from whom it could be repaired.
    alpha.kill().expect("killed");
    for block in [3, 4, 700] {
        flip(&beta.backing(), block);
    }
    let found = deep_verify(&mut beta);
    assert_eq!(found.bad_blocks, 3);
    assert_eq!(found.bad_lbas, ["LBA 24-39", "LBA 5600-5607"]);
    let is_told = |report: &VolumeReport| {
        let mut findings = report.findings.iter();
        findings.any(|found| found.state == "damaged" && found.cause.contains("LBA 24-39"))
    };
    beta.wait_for("say so", LIMIT, is_told).expect("it is told");
    let (volume, accept_loss) = (VOLUME.to_owned(), false);
    let refused = beta.ask(&Request::Promote {
        volume,
        accept_loss,
    });
    let refused = refused.expect_err("it is damaged").to_string();
    assert!(refused.contains("DAMAGED"), "{refused}");
    // It is remembered, and repaired when a good copy is there.
    beta.kill().expect("killed");
    beta.start().expect("it recovers");
    beta.wait_for("say so again", LIMIT, is_told)
        .expect("it is told");
    alpha.start().expect("it recovers");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    beta.wait_for("be repaired", LIMIT, |report| {
        tree(report).is_some_and(|tree| (tree.bad_blocks, tree.repaired_blocks) == (0, 3))
    })
    .expect("repaired");
    equal_roots(&mut alpha, &mut beta);
    assert_eq!(deep_verify(&mut beta).bad_blocks, 0);
}

fn is_whole(report: &VolumeReport) -> bool {
    tree(report).is_some_and(|tree| tree.bad_blocks == 0 && tree.root.is_some())
}

#[test]
fn a_part_of_a_damaged_block_that_is_written_does_not_make_it_good() {
    let (place, plan) = (folder(), plan());
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let mut client = alpha.client().expect("a client");
    client
        .write(700 * 4096, &[8; 8192], false)
        .expect("written");
    client.flush().expect("flushed");
    equal_roots(&mut alpha, &mut beta);
    // Only the sweep that reads the block to merge it can find this.
    flip(&beta.backing(), 700);
    client
        .write(700 * 4096 + 1024, &[9; 512], false)
        .expect("written");
    client.flush().expect("flushed");
    alpha.drain().expect("drained");
    beta.wait_for("find the damage", LIMIT, |report| {
        tree(report).is_some_and(|tree| tree.bad_lbas == ["LBA 5600-5607"])
    })
    .expect("found");
    assert_eq!(deep_verify(&mut beta).bad_lbas, ["LBA 5600-5607"]);
    let refused = beta.ask(&Request::Switchover {
        volume: VOLUME.to_owned(),
        timeout_ms: 1000,
    });
    let refused = refused.expect_err("it is damaged").to_string();
    assert!(refused.contains("DAMAGED"), "{refused}");
    alpha
        .wait_for("see that the copies differ", LIMIT, |report| {
            let mut findings = report.findings.iter();
            findings.any(|found| found.state == "copies-differ")
        })
        .expect("told");
    client
        .write(700 * 4096, &[7; 4096], false)
        .expect("written");
    client.flush().expect("flushed");
    alpha.drain().expect("drained");
    beta.wait_for("be whole", LIMIT, is_whole)
        .expect("good again");
    equal_roots(&mut alpha, &mut beta);
}

/// A tree that is lost takes its leaves along, and what is hashed then is the damage.
#[test]
fn damage_that_is_known_outlives_the_tree() {
    let place = folder();
    let plan = Plan {
        policy: "ack = \"async\"\ntree = \"on\"\nscan_mib_per_s = 1\n".to_owned(),
        ..plan()
    };
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let mut client = alpha.client().expect("a client");
    client.write(0, &[5; 8192], false).expect("written");
    client
        .write(1000 * 4096, &[6; 4096], false)
        .expect("written");
    client.flush().expect("flushed");
    equal_roots(&mut alpha, &mut beta);
    beta.kill().expect("killed");
    flip(&alpha.backing(), 1000);
    assert_eq!(deep_verify(&mut alpha).bad_lbas, ["LBA 8000-8007"]);

    alpha.kill().expect("killed");
    let trees = alpha.folder().join("state/tree");
    let mut removed = 0;
    for volume in std::fs::read_dir(trees).expect("a folder") {
        let manifest = volume.expect("an entry").path().join("manifest");
        removed += usize::from(std::fs::remove_file(manifest).is_ok());
    }
    assert_eq!(removed, 1);
    // A block that was not hashed yet looks like a hole, and here is one in its place.
    let holed = File::options().write(true).open(beta.backing());
    let holed = holed.and_then(|file| file.write_all_at(&[0; 4096], 1000 * 4096));
    holed.expect("written");
    beta.start().expect("it recovers");
    alpha.start().expect("it recovers");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let read = |node: &Node, block: u64| {
        let mut reader = node.client().expect("a client");
        reader.read(block * 4096, 4096)
    };
    let is_built = |report: &VolumeReport| built(report) == 4 << 20;
    while !is_built(&alpha.report().expect("a report")) {
        let refused = read(&alpha, 1000).expect_err("it is damaged").to_string();
        assert!(refused.contains("error 5 "), "{refused}");
    }
    assert_eq!(read(&alpha, 0).expect("a good one"), [5; 4096]);
    let found = deep_verify(&mut alpha);
    assert_eq!((found.bad_blocks, found.repaired_blocks), (1, 0));
    // Also where the new tree was read back from its files.
    alpha.kill().expect("killed");
    alpha.start().expect("it recovers");
    assert_eq!(deep_verify(&mut alpha).bad_lbas, ["LBA 8000-8007"]);
    read(&alpha, 1000).expect_err("it is damaged");
    let mut client = alpha.client().expect("a client");
    client
        .write(1000 * 4096, &[7; 4096], true)
        .expect("written");
    alpha
        .wait_for("be whole", LIMIT, is_whole)
        .expect("it is good again");
    assert_eq!(read(&alpha, 1000).expect("good"), [7; 4096]);
}

#[test]
fn a_damaged_block_is_never_read_and_a_peer_repairs_it() {
    let place = folder();
    // Writers are served while the peer is away.
    let plan = Plan {
        policy: "ack = \"async\"\ntree = \"on\"\n".to_owned(),
        ..plan()
    };
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let mut client = alpha.client().expect("a client");
    let contents: Vec<u8> = (0..64 << 10)
        .map(|at: u32| at.to_le_bytes()[1] ^ 0x5A)
        .collect();
    client.write(0, &contents, false).expect("written");
    client.flush().expect("flushed");
    equal_roots(&mut alpha, &mut beta);
    beta.kill().expect("killed");
    flip(&alpha.backing(), 3);
    flip(&alpha.backing(), 9);
    assert_eq!(deep_verify(&mut alpha).bad_blocks, 2);
    let mut reader = alpha.client().expect("a client");
    let mut read = |at: usize| {
        let read = reader.read(at as u64, 4096);
        read.map(|read| read == contents[at..at + 4096])
    };
    for at in [3, 9] {
        let refused = read(at * 4096).expect_err("it is damaged").to_string();
        assert!(refused.contains("error 5 "), "{refused}");
    }
    assert!(read(4 * 4096).expect("others are read"));
    // What is written again is good at once, and in the backing.
    let mut client = alpha.client().expect("a client");
    client
        .write(9 * 4096, &contents[9 * 4096..10 * 4096], false)
        .expect("written");
    assert!(read(9 * 4096).expect("from the overlay"));
    beta.start().expect("it recovers");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    alpha
        .wait_for("be whole", LIMIT, is_whole)
        .expect("repaired");
    assert!(read(3 * 4096).expect("from the backing"));
    equal_roots(&mut alpha, &mut beta);
    let report = alpha.report().expect("a report");
    assert_eq!(tree(&report).map(|tree| tree.repaired_blocks), Some(1));
}

/// Of so many only the first are listed; none is served, and all are repaired in the end.
#[test]
fn more_damaged_blocks_than_are_listed_are_not_served_either_and_repaired() {
    const DAMAGED: u64 = 5000;
    let place = folder();
    let plan = Plan {
        size_mib: 24,
        log_mib: 64,
        overlay_mib: 32,
        policy: "ack = \"async\"\ntree = \"on\"\nscan_mib_per_s = 200\n".to_owned(),
        ..plan()
    };
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let contents = |block: u64| vec![block.to_le_bytes()[0] | 1; 4096];
    let mut client = alpha.client().expect("a client");
    for block in 0..24 << 8 {
        client
            .write(block * 4096, &contents(block), false)
            .expect("written");
    }
    client.flush().expect("flushed");
    equal_roots(&mut alpha, &mut beta);
    beta.kill().expect("killed");
    let file = File::options().write(true).open(alpha.backing());
    let file = file.expect("a backing");
    for block in 0..DAMAGED {
        file.write_all_at(&[0], block * 4096 + 99).expect("written");
    }
    file.sync_all().expect("flushed");
    assert_eq!(deep_verify(&mut alpha).bad_blocks, DAMAGED);
    for block in [1, DAMAGED - 1] {
        let refused = client.read(block * 4096, 4096).expect_err("it is damaged");
        assert!(refused.to_string().contains("error 5 "), "{refused}");
    }
    let good = client.read(DAMAGED * 4096, 4096).expect("a good one");
    assert_eq!(good, contents(DAMAGED));
    beta.start().expect("it recovers");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    alpha
        .wait_for("be whole", 2 * LIMIT, is_whole)
        .expect("all are repaired");
    assert_eq!(
        tree(&alpha.report().expect("a report")).map(|tree| tree.repaired_blocks),
        Some(DAMAGED)
    );
    for block in (0..24 << 8).step_by(7) {
        let read = client.read(block * 4096, 4096).expect("good again");
        assert_eq!(read, contents(block), "block {block}");
    }
}
