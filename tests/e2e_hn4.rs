//! HN4 volumes that the reference wrote go through the daemon, and their files come out of the
//! replica's backing.

mod common;
mod golden;

use std::path::Path;
use std::process::{Command, Output};

use common::{LIMIT, is_usable, pair};
use golden::{Expected, Golden};
use hn4_replicad::config::Config;
use hn4_replicad::config::attach::attach_records;
use hn4_replicad::config::state::NodeState;
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, quiesce_and_compare};

/// Longest write that every server takes.
const PIECE_BYTES: usize = 1 << 20;

fn ctl(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hn4ctl"));
    command.args(arguments).output().expect("hn4ctl runs")
}

fn done(arguments: &[&str]) -> Vec<u8> {
    let output = ctl(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{arguments:?}: {}: {error}",
        output.status
    );
    output.stdout
}

fn path(of: &Path) -> &str {
    of.to_str().expect("text")
}

/// What `hn4ctl volume cat` gives is what the manifest says.
fn check_files(device: &Path, files: &[Expected]) {
    let listed = String::from_utf8(done(&["volume", "ls", "--device", path(device)]));
    let listed = listed.expect("text");
    for file in files {
        let line = listed.lines().find(|line| line.starts_with(&file.seed));
        let line = line.unwrap_or_else(|| panic!("{} is not in {listed}", file.name));
        assert!(line.ends_with(&file.name), "{line}");
        let bytes = done(&["volume", "cat", &file.seed, "--device", path(device)]);
        file.check(&bytes);
    }
}

/// Makes the nodes' volume anew: the primary adopts an image, the replica is a copy of that.
fn adopt(alpha: &Node, beta: &Node, plan: &Plan, image: &Path) {
    for node in [alpha, beta] {
        let config = Config::load(&node.config()).expect("a configuration");
        let state = NodeState::open_or_create(&config.node.state_dir).expect("a state");
        let id = attach_records(&state).expect("records")[0]
            .volume
            .to_string();
        done(&["volume", "forget", &id, "--config", path(&node.config())]);
        std::fs::remove_file(node.log()).expect("removed");
        std::fs::remove_file(node.backing()).expect("removed");
    }
    std::fs::rename(image, alpha.backing()).expect("the image is alpha's backing");
    let log = plan.log_mib.to_string();
    let (a, b) = (alpha.config(), beta.config());
    let token = done(&[
        "volume",
        "adopt",
        VOLUME,
        "--log-mib",
        &log,
        "--sector-bytes",
        "512",
        "--config",
        path(&a),
    ]);
    let token = String::from_utf8(token).expect("text");
    done(&[
        "volume",
        "create",
        VOLUME,
        "--replica",
        "--identity",
        token.trim(),
        "--create-backing",
        "--sparse",
        "--log-mib",
        &log,
        "--config",
        path(&b),
    ]);
}

/// Serves a volume of the reference whose extents are `adopted` before the first start; those that
/// are `written` come over NBD while the replica follows.
fn replicate(name: &str, adopted: fn(usize) -> bool, written: fn(usize) -> bool) {
    let Some(shared) = golden::folder() else {
        return;
    };
    let golden = Golden::load(&shared, name);
    let both = (0..golden.extents.len()).all(|index| adopted(index) || written(index));
    assert!(both, "every extent gets there in one way at least");
    let place = common::folder();
    let plan = Plan {
        size_mib: 4,
        log_mib: 48,
        overlay_mib: 16,
        ..Plan::default()
    };
    let (mut alpha, mut beta) = pair(place.path(), &plan);
    let image = place.path().join("image");
    golden.write(&image, adopted);
    adopt(&alpha, &beta, &plan, &image);

    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let seeded = beta
        .wait_for("have a full copy", LIMIT, is_usable)
        .expect("beta is seeded");
    let mut client = alpha.client().expect("a client");
    for (_, extent) in golden
        .extents
        .iter()
        .enumerate()
        .filter(|(index, _)| written(*index))
    {
        for (piece, bytes) in extent.bytes.chunks(PIECE_BYTES).enumerate() {
            let at = extent.offset + (piece * PIECE_BYTES) as u64;
            client.write(at, bytes, false).expect("written");
        }
    }
    client.flush().expect("durable on both");
    drop(client);
    let in_use = ctl(&["volume", "ls", "--device", path(&beta.backing())]);
    let words = String::from_utf8_lossy(&in_use.stderr).into_owned();
    assert_eq!(in_use.status.code(), Some(1), "{words}");
    assert!(
        words.contains("in use") && words.contains("Stop it first"),
        "{words}"
    );

    let hash = quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
    let live = beta
        .report()
        .expect("a report")
        .state
        .expect("open")
        .applied_epoch;
    assert!(
        live > seeded.tip_epoch,
        "the writes were replicated as epochs, not with the copy"
    );
    alpha.stop(LIMIT).expect("alpha ends");
    beta.stop(LIMIT).expect("beta ends");
    assert_eq!(beta.backing_hash().expect("a hash"), hash);

    let reference = place.path().join("reference");
    golden.write(&reference, |_| true);
    let same = std::fs::read(&reference).expect("an image")
        == std::fs::read(beta.backing()).expect("the backing");
    assert!(
        same,
        "the replica's backing is the reference's image, byte for byte"
    );
    let block = if name.contains("pico") { 512 } else { 4096 };
    check_files(&beta.backing(), &golden.files(block));
}

#[test]
fn an_adopted_volume_of_the_reference_is_read_from_the_replica_after_overwriting_it_with_itself() {
    replicate("data_generic_128m", |_| true, |_| true);
}

#[test]
fn a_volume_that_comes_half_with_the_full_copy_and_half_over_nbd_is_whole_on_the_replica() {
    replicate(
        "data_pico_4m",
        |index| index % 2 == 0,
        |index| index % 2 == 1,
    );
}

#[test]
fn cat_returns_what_the_reference_wrote_into_every_file() {
    let Some(shared) = golden::folder() else {
        return;
    };
    let place = common::folder();
    for (name, block) in [
        ("data_generic_128m", 4096),
        ("data_pico_4m", 512),
        ("data_hdd_1g", 4096),
    ] {
        let golden = Golden::load(&shared, name);
        let image = place.path().join(name);
        golden.write(&image, |_| true);
        let files = golden.files(block);
        assert!(!files.is_empty(), "{name}");
        check_files(&image, &files);
    }
}
