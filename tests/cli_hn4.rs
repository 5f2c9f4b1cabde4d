//! `hn4ctl volume` on HN4 volumes in image files: from an empty file to a clone, and what is
//! refused, with which words.

mod golden;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use golden::Golden;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A folder for images, beside the build's outputs: on a disk, which /tmp may not be.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn blank(&self, name: &str, bytes: u64) -> File {
        let file = File::create_new(self.path(name)).expect("a file");
        file.set_len(bytes).expect("its size");
        file
    }

    /// Runs `hn4ctl volume` in the folder, so that paths in it are just names.
    fn ctl(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hn4ctl"))
            .arg("volume")
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .expect("hn4ctl runs")
    }

    fn ends(&self, status: i32, arguments: &[&str]) -> (String, String) {
        let output = self.ctl(arguments);
        let error = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {error}");
        (String::from_utf8(output.stdout).expect("text"), error)
    }

    fn done(&self, arguments: &[&str]) -> String {
        self.ends(0, arguments).0
    }

    fn refused(&self, arguments: &[&str]) -> String {
        self.ends(1, arguments).1
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("a file")
    }

    /// Formats a volume that others may be wormholes of.
    fn format(&self, name: &str) -> String {
        self.blank(name, 128 * MIB);
        self.done(&[
            "format",
            "--device",
            name,
            "--label",
            "first",
            "--assume-strict-flush",
        ])
    }
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

fn json(text: &str) -> serde_json::Value {
    assert_eq!(text.lines().count(), 1, "one line: {text}");
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn a_formatted_image_is_inspected_listed_and_verified_without_a_finding() {
    let place = Place::new();
    has(&place.format("a"), &["formatted volume", "layout: |N"]);
    let text = place.done(&["inspect", "--device", "a", "--assume-strict-flush"]);
    has(
        &text,
        &[
            "\"first\"",
            "GENERIC",
            "layout: |",
            "chronicle",
            "verdict: mounts for writing",
        ],
    );
    let found = json(&place.done(&["inspect", "--device", "a", "--json"]));
    assert_eq!(found["superblock"]["label"], "first");
    assert_eq!(found["writable"], true);
    assert_eq!(found["copies"].as_array().map(Vec::is_empty), Some(false));
    has(&place.done(&["ls", "--device", "a"]), &["root", "ROOT"]);
    assert_eq!(place.done(&["verify", "--device", "a"]), "0 findings\n");
    let verified = json(&place.done(&["verify", "--device", "a", "--json"]));
    assert_eq!(verified["findings"].as_array().map(Vec::len), Some(0));
    assert_eq!(
        place.done(&["which", "0", "--device", "a"]),
        "LBA 0: the north copy of the superblock\n"
    );
}

#[test]
fn looking_changes_no_byte() {
    let place = Place::new();
    place.format("a");
    let before = place.bytes("a");
    for look in [
        &["inspect"][..],
        &["ls"],
        &["verify"],
        &["which", "8192"],
        &["chronicle", "--verify"],
    ] {
        place.done(&[look, &["--device", "a"]].concat());
    }
    assert!(place.bytes("a") == before);
}

#[test]
fn a_clone_has_the_parents_identity_and_both_chronicles_tell_of_the_fork() {
    let place = Place::new();
    place.format("a");
    place.blank("b", 128 * MIB);
    let clone = [
        "clone",
        "--device",
        "a",
        "--to",
        "b",
        "--assume-strict-flush",
    ];
    place.done(&[&clone[..], &["--diverge"]].concat());
    let inspect = |name| {
        json(&place.done(&[
            "inspect",
            "--device",
            name,
            "--json",
            "--assume-strict-flush",
        ]))
    };
    let (a, b) = (inspect("a"), inspect("b"));
    for same in [
        "uuid",
        "label",
        "block_size",
        "total_capacity",
        "device_type",
    ] {
        assert_eq!(a["superblock"][same], b["superblock"][same], "{same}");
    }
    assert_ne!(a["superblock"]["generation"], b["superblock"]["generation"]);
    assert_eq!(b["superblock"]["mount_intent"], 1, "WORMHOLE");
    let chronicle =
        |name| json(&place.done(&["chronicle", "--verify", "--device", name, "--json"]));
    let (a, b) = (chronicle("a"), chronicle("b"));
    assert_eq!(
        (&a["entries"][0]["op"], &b["entries"][0]["op"]),
        (&"FORK".into(), &"WORMHOLE".into())
    );
    assert_eq!(a["entries"][0]["fork_id"], b["entries"][0]["fork_id"]);
    for name in ["a", "b"] {
        assert_eq!(place.done(&["verify", "--device", name]), "0 findings\n");
    }
    // The entry of the fork is forged: the chain says so.
    let lba = b["entries"][0]["lba"].as_u64().expect("a number");
    let file = File::options()
        .write(true)
        .open(place.path("b"))
        .expect("the clone");
    file.write_all_at(&[0xFF; 8], lba * 512 + 112)
        .expect("forged");
    let (out, _) = place.ends(4, &["chronicle", "--verify", "--device", "b"]);
    has(
        &out,
        &["chronicle", &format!("LBA {lba}"), "found", "expected"],
    );
}

#[test]
fn a_clone_that_leaves_its_parent_alone_changes_no_byte_of_it() {
    let place = Place::new();
    place.format("a");
    place.blank("b", 128 * MIB);
    let before = place.bytes("a");
    let clone = [
        "clone",
        "--device",
        "a",
        "--to",
        "b",
        "--leave-parent",
        "--assume-strict-flush",
    ];
    place.done(&clone);
    assert!(place.bytes("a") == before);
}

#[test]
fn a_device_that_holds_data_is_replaced_only_when_told_so() {
    let place = Place::new();
    place.format("a");
    let before = place.bytes("a");
    let error = place.refused(&["format", "--device", "a"]);
    has(
        &error,
        &["a holds data", "HN4 volume", "\"first\"", "--overwrite"],
    );
    place
        .blank("c", 128 * MIB)
        .write_all_at(&[1], 70 * MIB + 77)
        .expect("data in the middle");
    let middle = format!("near byte {}", 70 * MIB + 77);
    for refused in [
        &["format", "--device", "c"][..],
        &["clone", "--device", "a", "--to", "c"],
    ] {
        has(
            &place.refused(refused),
            &["c holds data", &middle, "--overwrite"],
        );
    }
    assert!(
        place.bytes("a") == before,
        "a refused clone leaves its parent alone"
    );
    place.done(&[
        "format",
        "--device",
        "a",
        "--label",
        "second",
        "--overwrite",
    ]);
    has(&place.done(&["inspect", "--device", "a"]), &["\"second\""]);
}

#[test]
fn a_device_in_use_is_neither_read_nor_written() {
    let place = Place::new();
    place.format("a");
    let file = File::open(place.path("a")).expect("the image");
    file.lock().expect("locked, as a daemon does");
    let before = place.bytes("a");
    for command in [
        &["format", "--overwrite"][..],
        &["ls"],
        &["inspect"],
        &["verify"],
    ] {
        let error = place.refused(&[command, &["--device", "a"]].concat());
        has(&error, &["a: in use", "hn4-replicad", "Stop it first"]);
    }
    assert!(place.bytes("a") == before);
}

#[test]
fn refusals_name_region_lba_found_expected_and_what_to_do() {
    let place = Place::new();
    place.format("a");
    place.blank("small", 64 * MIB);
    let error = place.refused(&["format", "--device", "small"]);
    has(
        &error,
        &[
            "GEOMETRY in device at LBA 0: found 67108864",
            "expected",
            "choose another profile",
        ],
    );
    let error = place.refused(&[
        "clone",
        "--device",
        "a",
        "--to",
        "small",
        "--assume-strict-flush",
    ]);
    has(
        &error,
        &[
            "found capacity 67108864, expected 134217728",
            "override it (VIRTUAL)",
        ],
    );
    assert!(
        place.bytes("small").iter().all(|&byte| byte == 0),
        "nothing was written"
    );
    let error = place.refused(&["cat", "12", "--device", "a"]);
    has(
        &error,
        &[
            "NOT_FOUND in cortex at LBA 2064",
            "expected 00000000000000000000000000000012",
        ],
    );
    let error = place.refused(&["where", "12:x", "--device", "a"]);
    has(
        &error,
        &["found 12:x, expected SEED[:BLOCK]", "as ls prints it"],
    );
    place.blank("blank", 128 * MIB);
    let error = place.refused(&["ls", "--device", "blank"]);
    has(
        &error,
        &["blank: ", " in superblock at LBA ", "found ", "expected "],
    );
    has(&place.refused(&["ls", "--device", "absent"]), &["absent"]);
    has(
        &place.refused(&["clone", "--device", "a", "--to", "a"]),
        &["the same place"],
    );
}

#[test]
fn options_that_mean_nothing_are_wrong_usage() {
    let place = Place::new();
    for wrong in [
        &["inspect"][..],
        &["inspect", "vol0", "--json"],
        &["inspect", "vol0", "--device", "a"],
        &["ls"],
        &["ls", "--device", "a", "--sector-bytes", "1000"],
        &["format", "--device", "a", "--profile", "huge"],
        &["format", "--device", "a", "--specific-uuid", "12"],
        &["cat", "seed", "--device", "a"],
    ] {
        place.ends(2, wrong);
    }
}

#[test]
fn the_backing_of_a_volume_is_not_formatted() {
    let place = Place::new();
    let text = "[node]\nname = \"alpha\"\nstate_dir = \"state\"\n[[volume]]\nname = \"vol0\"\n\
                backing = \"vol0.img\"\nlog = \"vol0.log\"\nassume_strict_flush = true\n";
    std::fs::write(place.path("node.toml"), text).expect("a configuration");
    let config = ["--config", "node.toml"];
    let create = [
        "create",
        "vol0",
        "--size-mib",
        "128",
        "--sparse",
        "--log-mib",
        "8",
    ];
    place.done(&[&create[..], &config].concat());
    let error = place.refused(&[&["format", "--device", "vol0.img"], &config[..]].concat());
    has(
        &error,
        &["is the backing of volume vol0", "hn4ctl volume forget"],
    );
}

#[test]
fn findings_of_a_volume_of_the_reference_are_told_by_lba_with_their_own_status() {
    let Some(shared) = golden::folder() else {
        return;
    };
    let place = Place::new();
    let golden = Golden::load(&shared, "data_generic_128m");
    golden.write(&place.path("a"), |_| true);
    let (out, _) = place.ends(4, &["verify", "--device", "a"]);
    has(
        &out,
        &[
            "BITMAP_CORRUPT in chronicle at LBA 241648",
            "defect 1",
            "5 findings",
        ],
    );
    // A flipped bit in a file's block is found, and named where it is read.
    let seed = "20010000000000001001";
    let found = json(&place.done(&["where", seed, "--device", "a", "--json"]));
    let lba = found["lba"].as_u64().expect("a number");
    let which = place.done(&["which", &lba.to_string(), "--device", "a"]);
    has(&which, &["block 0 of file", seed]);
    let file = File::options()
        .write(true)
        .open(place.path("a"))
        .expect("the image");
    file.write_all_at(&[0xFF], lba * 512 + 100)
        .expect("flipped");
    let at = format!("in flux at LBA {lba}: found ");
    has(
        &place.refused(&["cat", seed, "--device", "a"]),
        &[&at, "expected "],
    );
    has(
        &place.ends(4, &["verify", "--device", "a"]).0,
        &[&at, "6 findings"],
    );
}
