//! `hn4ctl volume` and `hn4ctl pki` as a user runs them: the real binary, real files.
//!
//! The folder is below the build's own, because `/tmp` may be in memory, which is refused.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use hn4_replicad::cli::token::IdentityToken;
use hn4_replicad::config::Config;
use hn4_replicad::config::attach::{self, AttachError, attach_records, check_before_open};
use hn4_replicad::config::state::NodeState;
use tempfile::TempDir;

/// A node's folder with a configuration of one volume.
struct Node {
    folder: TempDir,
}

impl Node {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let node = Self { folder };
        node.configure("vol0.log", "vol0.img");
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn configure(&self, log: &str, backing: &str) {
        // What the build's folder lies on is not what is tested here.
        let text = format!(
            "[node]\nname = \"alpha\"\nstate_dir = \"state\"\n[[volume]]\nname = \"vol0\"\n\
             backing = \"{backing}\"\nlog = \"{log}\"\noverlay_mib = 16\n\
             assume_strict_flush = true\n"
        );
        std::fs::write(self.path("node.toml"), text).expect("a configuration");
    }

    fn ctl(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hn4ctl"))
            .args(arguments)
            .arg("--config")
            .arg(self.path("node.toml"))
            .output()
            .expect("hn4ctl runs")
    }

    /// Runs a command that must work, and gives its standard output.
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs a command that must be refused, and gives its message.
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        let error = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        error
    }

    fn create(&self, more: &[&str]) -> IdentityToken {
        let arguments = [&["volume", "create", "vol0", "--log-mib", "8"], more].concat();
        let token = self.done(&arguments);
        token.parse().expect("the output is the token alone")
    }

    fn config(&self) -> Config {
        Config::load(&self.path("node.toml")).expect("a good configuration")
    }

    fn state(&self) -> NodeState {
        NodeState::open_or_create(&self.path("state")).expect("the state")
    }

    fn check(&self) -> Result<(), AttachError> {
        check_before_open(&self.state(), &self.config().volumes[0], Duration::ZERO).map(drop)
    }

    fn file_with_data(&self, name: &str, bytes: u64, at: u64) {
        let file = std::fs::File::create_new(self.path(name)).expect("a file");
        file.set_len(bytes).expect("its size");
        file.write_all_at(b"precious", at).expect("its data");
    }
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

fn bytes_of(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("a file")
}

#[test]
fn a_created_volume_is_a_blank_backing_with_a_log_that_inspect_shows() {
    let node = Node::new();
    let token = node.create(&["--size-mib", "4"]);
    assert_eq!(token.0.size_bytes, 4 << 20);
    let backing = bytes_of(&node.path("vol0.img"));
    assert_eq!(backing.len(), 4 << 20);
    assert!(backing.iter().all(|&byte| byte == 0));
    let log = std::fs::metadata(node.path("vol0.log")).expect("the log");
    assert_eq!(log.len(), 8 << 20);
    assert_eq!(log.permissions().mode() & 0o777, 0o600);
    let text = node.done(&["volume", "inspect", "vol0"]);
    has(
        &text,
        &[
            &token.to_string(),
            "role        primary",
            "copy        usable",
            "term        1@",
        ],
    );
    let id = token.0.volume.to_string();
    has(&node.done(&["volume", "list"]), &["vol0", &id, " no "]);
    node.check().expect("what was created may be opened");
}

#[test]
fn a_replica_takes_the_identity_of_the_first_copy() {
    let (first, second) = (Node::new(), Node::new());
    let token = first.create(&["--size-mib", "4", "--sector-bytes", "4096"]);
    let text = token.to_string();
    let again = second.create(&[
        "--replica",
        "--identity",
        &text,
        "--create-backing",
        "--sparse",
    ]);
    assert_eq!(again, token);
    let shown = second.done(&["volume", "inspect", "vol0"]);
    has(
        &shown,
        &[
            &text,
            "sectors     4096",
            "role        replica",
            "copy        fresh",
        ],
    );
    let nodes = [first.state().node_id, second.state().node_id];
    assert_ne!(nodes[0], nodes[1]);
}

#[test]
fn two_volumes_never_get_the_same_identity() {
    let (first, second) = (Node::new(), Node::new());
    let one = first.create(&["--size-mib", "4"]).0;
    let two = second.create(&["--size-mib", "4"]).0;
    assert_ne!(one.volume, two.volume);
    assert_ne!(one.birth_nonce, two.birth_nonce);
}

#[test]
fn adopt_keeps_every_byte_of_the_backing_and_create_refuses_data() {
    let node = Node::new();
    for at in [0, 4096 * 100, (4 << 20) - 8] {
        node.file_with_data("vol0.img", 4 << 20, at);
        let error = node.refused(&["volume", "create", "vol0", "--log-mib", "8"]);
        has(&error, &["holds data", "hn4ctl volume adopt"]);
        assert!(
            !node.path("vol0.log").exists(),
            "a refused creation leaves nothing"
        );
        std::fs::remove_file(node.path("vol0.img")).expect("removed");
    }
    node.file_with_data("vol0.img", 4 << 20, 4096);
    let before = bytes_of(&node.path("vol0.img"));
    let token = node.done(&["volume", "adopt", "vol0", "--log-mib", "8"]);
    assert_eq!(
        token
            .parse::<IdentityToken>()
            .expect("a token")
            .0
            .size_bytes,
        4 << 20
    );
    assert_eq!(bytes_of(&node.path("vol0.img")), before);
    has(
        &node.done(&["volume", "inspect", "vol0"]),
        &["primary", "usable"],
    );
}

#[test]
fn a_replica_does_not_replace_data_unless_it_is_told_to() {
    let (first, second) = (Node::new(), Node::new());
    let token = first.create(&["--size-mib", "4"]).to_string();
    second.file_with_data("vol0.img", 4 << 20, 0);
    let arguments = [
        "volume",
        "create",
        "vol0",
        "--log-mib",
        "8",
        "--replica",
        "--identity",
        &token,
    ];
    has(
        &second.refused(&arguments),
        &["holds data", "--overwrite-backing"],
    );
    second.create(&["--replica", "--identity", &token, "--overwrite-backing"]);
}

#[test]
fn a_backing_that_was_brought_is_kept_as_it_is_and_needs_a_tree() {
    let (first, second) = (Node::new(), Node::new());
    let token = first.create(&["--size-mib", "4"]).to_string();
    second.file_with_data("vol0.img", 4 << 20, 0);
    let before = bytes_of(&second.path("vol0.img"));
    let seeded = ["--replica", "--identity", &token, "--seeded"];
    let arguments = [&["volume", "create", "vol0", "--log-mib", "8"], &seeded[..]].concat();
    has(&second.refused(&arguments), &["tree = \"on\"", "vol0"]);
    assert!(!second.path("vol0.log").exists(), "nothing was made");
    let config = second.path("node.toml");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    std::fs::write(&config, format!("{text}tree = \"on\"\n")).expect("a configuration");
    second.create(&seeded);
    has(
        &second.done(&["volume", "inspect", "vol0"]),
        &["fresh: what was brought"],
    );
    assert_eq!(bytes_of(&second.path("vol0.img")), before);
    let makes = [&arguments[..], &["--create-backing"]].concat();
    assert_eq!(
        second.ctl(&makes).status.code(),
        Some(2),
        "it cannot be both"
    );
}

#[test]
fn a_backing_of_another_size_is_no_copy() {
    let (first, second) = (Node::new(), Node::new());
    let token = first.create(&["--size-mib", "4"]).to_string();
    second.file_with_data("vol0.img", 8 << 20, 0);
    let replica = ["--replica", "--identity", &token];
    let arguments = [
        &["volume", "create", "vol0", "--overwrite-backing"],
        &replica[..],
    ]
    .concat();
    has(
        &second.refused(&arguments),
        &["8388608", "4194304", "exactly"],
    );
    let sized = [
        &["volume", "create", "vol0", "--size-mib", "8"],
        &replica[..],
    ]
    .concat();
    has(&second.refused(&sized), &["--create-backing"]);
}

#[test]
fn nothing_is_created_over_what_is_there() {
    let node = Node::new();
    let missing = node.refused(&["volume", "create", "vol0"]);
    has(&missing, &["vol0.img", "is not there", "--size-mib"]);
    node.create(&["--size-mib", "4"]);
    let log = bytes_of(&node.path("vol0.log"));
    let again = node.refused(&["volume", "create", "vol0"]);
    has(&again, &["belongs to volume", "hn4ctl volume forget"]);
    let id = attach_records(&node.state()).expect("records")[0]
        .volume
        .to_string();
    has(&node.done(&["volume", "forget", &id]), &["is forgotten"]);
    let forgotten = node.refused(&["volume", "create", "vol0"]);
    has(&forgotten, &["is the log of volume", &id]);
    has(
        &node.refused(&["volume", "create", "vol0", "--size-mib", "4"]),
        &["is there already"],
    );
    has(
        &node.refused(&["volume", "create", "vol0", "--log-mib", "8"]),
        &["is there already"],
    );
    assert_eq!(
        bytes_of(&node.path("vol0.log")),
        log,
        "the log is what it was"
    );
}

#[test]
fn a_file_that_is_no_log_is_not_taken_for_a_blank_one() {
    let node = Node::new();
    node.file_with_data("vol0.log", 8 << 20, 0);
    let error = node.refused(&["volume", "create", "vol0", "--size-mib", "4"]);
    has(&error, &["vol0.log", "holds data", "wipe"]);
    assert!(
        !node.path("vol0.img").exists(),
        "the file that was made is removed again"
    );
    node.configure("small.log", "vol0.img");
    let file = std::fs::File::create_new(node.path("small.log")).expect("a file");
    file.set_len(1 << 20).expect("its size");
    let error = node.refused(&["volume", "create", "vol0", "--size-mib", "4"]);
    has(&error, &["small.log", "ring_bytes"]);
}

#[test]
fn a_log_is_opened_only_with_the_backing_that_it_belongs_to() {
    let node = Node::new();
    let token = node.create(&["--size-mib", "4"]);
    // Another place for the backing: refused until it is confirmed.
    std::fs::rename(node.path("vol0.img"), node.path("moved.img")).expect("moved");
    node.configure("vol0.log", "moved.img");
    let error = node.check().expect_err("refused").to_string();
    has(
        &error,
        &[
            "its backing was",
            "vol0.img",
            "moved.img",
            "hn4ctl volume reattach vol0",
        ],
    );
    has(
        &node.done(&["volume", "reattach", "vol0"]),
        &["was", "now", "moved.img"],
    );
    node.check().expect("confirmed");
    // The same place under another name is the same place.
    std::os::unix::fs::symlink(node.path("moved.img"), node.path("link.img")).expect("a link");
    node.configure("vol0.log", "link.img");
    node.check().expect("the same file");
    // A log of another volume.
    let other = Node::new();
    other.create(&["--size-mib", "4"]);
    std::fs::rename(other.path("vol0.log"), node.path("other.log")).expect("moved");
    node.configure("other.log", "moved.img");
    let error = node.check().expect_err("refused").to_string();
    let id = token.0.volume.to_string();
    has(
        &error,
        &["is of volume", &id, "written back", "hn4ctl volume forget"],
    );
}

#[test]
fn a_missing_log_is_told_with_what_it_may_have_held() {
    let node = Node::new();
    let token = node.create(&["--size-mib", "4"]);
    let section = node.config().volumes[0].clone();
    let opened = attach::begin(&node.state(), &section, Duration::ZERO).expect("opened");
    assert_eq!(opened, token.0);
    has(&node.done(&["volume", "list"]), &[" yes "]);
    std::fs::remove_file(node.path("vol0.log")).expect("removed");
    let error = node.check().expect_err("refused").to_string();
    has(
        &error,
        &[
            "may hold acknowledged writes",
            "vol0.log",
            "--replica",
            &token.0.volume.to_string(),
        ],
    );
    let error = node.refused(&["volume", "create", "vol0", "--log-mib", "8"]);
    has(
        &error,
        &["may hold acknowledged writes", "hn4ctl volume forget"],
    );
    assert!(!node.path("vol0.log").exists());
}

#[test]
fn a_lost_log_is_given_up_only_by_the_epoch_that_the_backing_held() {
    let node = Node::new();
    let token = node.create(&["--size-mib", "4"]);
    let section = node.config().volumes[0].clone();
    let adopt = ["volume", "adopt", "vol0", "--log-mib", "8", "--discard-log"];
    let opened = attach::begin(&node.state(), &section, Duration::ZERO).expect("opened");
    let error = node.refused(&[&adopt[..], &["0"]].concat());
    has(&error, &["is there and is usable"]);
    std::fs::remove_file(node.path("vol0.log")).expect("removed");
    let error = node.check().expect_err("refused").to_string();
    has(&error, &["hn4ctl volume adopt vol0 --discard-log 0"]);
    let error = node.refused(&[&adopt[..], &["7"]].concat());
    has(
        &error,
        &["--discard-log 7 does not fit", "to be named is 0"],
    );
    assert!(!node.path("vol0.log").exists(), "nothing was made");
    let new = node.done(&[&adopt[..], &["0"]].concat());
    assert!(
        !new.contains(&opened.volume.to_string()),
        "a volume of its own"
    );
    let list = node.done(&["volume", "list"]);
    assert!(!list.contains(&token.0.volume.to_string()), "{list}");
    node.check().expect("it opens");
}

#[test]
fn a_volume_that_was_closed_clean_is_remembered_as_such() {
    let node = Node::new();
    node.create(&["--size-mib", "4"]);
    let section = node.config().volumes[0].clone();
    let opened = attach::begin(&node.state(), &section, Duration::ZERO).expect("opened");
    attach::end(&node.state(), &section, &opened).expect("closed");
    has(&node.done(&["volume", "list"]), &[" no "]);
}

#[test]
fn a_log_that_is_damaged_or_in_use_is_told() {
    let node = Node::new();
    node.create(&["--size-mib", "4"]);
    let log = std::fs::File::options()
        .write(true)
        .open(node.path("vol0.log"))
        .expect("the log");
    log.lock().expect("locked, as a daemon does");
    let error = node.refused(&["volume", "inspect", "vol0"]);
    has(&error, &["is in use", "hn4ctl status"]);
    log.unlock().expect("unlocked");
    for copy in [0, 16 * 1024] {
        log.write_all_at(&[0xFF; 16], copy + 20).expect("damaged");
    }
    has(
        &node.refused(&["volume", "inspect", "vol0"]),
        &["damaged", "CRC-32C"],
    );
}

#[test]
fn unknown_volumes_and_daemons_that_are_not_there_are_told_with_their_exit_status() {
    let node = Node::new();
    let error = node.refused(&["volume", "create", "vol9"]);
    has(&error, &["no volume \"vol9\"", "it has: vol0"]);
    for command in [
        vec!["status"],
        vec!["flush", "vol0"],
        vec!["promote", "vol0", "--accept-loss"],
        vec!["wait", "vol0", "--applied", "3"],
    ] {
        let output = node.ctl(&command);
        assert_eq!(output.status.code(), Some(3), "{command:?}");
        let error = String::from_utf8(output.stderr).expect("text");
        has(
            &error,
            &["not running", "state/control.sock", "hn4-replicad run"],
        );
    }
    assert_eq!(node.ctl(&["wait", "vol0"]).status.code(), Some(2), "usage");
    assert_eq!(
        node.ctl(&["volume", "create", "vol0", "--replica"])
            .status
            .code(),
        Some(2)
    );
    std::fs::write(node.path("node.toml"), "[node]\nnam = \"x\"\n").expect("written");
    has(
        &node.refused(&["status"]),
        &["line 2", "did you mean \"name\"?"],
    );
}

#[test]
fn pki_makes_keys_that_are_private_pinned_and_never_replaced() {
    let node = Node::new();
    let folder = node.path("pki");
    let folder = folder.to_str().expect("text");
    node.done(&["pki", "init", "--dir", folder]);
    let text = node.done(&["pki", "issue", "alpha", "--dir", folder]);
    for key in ["ca.key", "alpha.key"] {
        let mode = std::fs::metadata(node.path("pki").join(key))
            .expect("a key")
            .permissions();
        assert_eq!(mode.mode() & 0o777, 0o600, "{key}");
    }
    let configuration = std::fs::read_to_string(node.path("node.toml")).expect("text");
    let transport = "[transport]\nlisten = \"127.0.0.1:7420\"\ncertificate = \"pki/alpha.pem\"\n\
                     key = \"pki/alpha.key\"\nca = \"pki/ca.pem\"\n";
    std::fs::write(
        node.path("node.toml"),
        format!("{transport}{configuration}"),
    )
    .expect("written");
    let pin = node.done(&["pki", "pin"]);
    assert!(pin.starts_with("sha256:"), "{pin}");
    has(&text, &[pin.trim()]);
    let key = bytes_of(&node.path("pki/alpha.key"));
    has(
        &node.refused(&["pki", "issue", "alpha", "--dir", folder]),
        &["is not replaced"],
    );
    has(
        &node.refused(&["pki", "init", "--dir", folder]),
        &["is not replaced"],
    );
    assert_eq!(bytes_of(&node.path("pki/alpha.key")), key);
    has(
        &node.refused(&["pki", "issue", "a_b", "--dir", folder]),
        &["cannot be a node name"],
    );
}
