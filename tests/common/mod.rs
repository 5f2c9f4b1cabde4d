//! What the end-to-end tests share: nodes in a folder on a real disk, copies of a node to look at,
//! and tools that may be missing.
#![expect(
    dead_code,
    reason = "each test program is compiled with its own copy of this and uses a part of it"
)]

pub(crate) mod disk;
pub(crate) mod ledger;
pub(crate) mod netns;
pub(crate) mod pair;
pub(crate) mod power;
pub(crate) mod trees;
pub(crate) mod volatile;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use hn4_replicad::control::Request;
use hn4_replicad::quickstart::load::{SharedOracle, check};
use hn4_replicad::quickstart::oracle::{Oracle, Seen};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, make_nodes};

/// Longest wait for anything.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// The daemon that is tested: the one that was built with the test, or what `HN4_PROGRAM` names.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        std::env::var_os("HN4_PROGRAM")
            .map_or_else(|| env!("CARGO_BIN_EXE_hn4-replicad").into(), PathBuf::from)
    })
}

/// A folder of a test. Kept if the test fails and `HN4_KEEP=1`.
pub(crate) struct Place(Option<tempfile::TempDir>);

impl Place {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.0.as_ref().expect("there until it is dropped").path()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let keep = std::env::var_os("HN4_KEEP").is_some_and(|value| value == "1");
        if let Some(folder) = self.0.take().filter(|_| keep && std::thread::panicking()) {
            eprintln!("kept: {}", folder.keep().display());
        }
    }
}

/// A folder beside the build's outputs: on a disk, which /tmp may not be.
pub(crate) fn folder() -> Place {
    Place(Some(
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder"),
    ))
}

/// Two nodes whose files exist.
pub(crate) fn pair(folder: &Path, plan: &Plan) -> (Node, Node) {
    let mut nodes = make_nodes(folder, program(), plan).expect("two nodes");
    let beta = nodes.pop().expect("the second node");
    (nodes.pop().expect("the first node"), beta)
}

/// Two nodes that run, the second one with a full copy.
pub(crate) fn running_pair(folder: &Path, plan: &Plan) -> (Node, Node) {
    let (mut alpha, mut beta) = pair(folder, plan);
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    beta.wait_for("have a full copy", LIMIT, is_usable)
        .expect("beta is seeded");
    (alpha, beta)
}

/// Whether a copy is complete.
pub(crate) fn is_usable(report: &hn4_replicad::control::api::VolumeReport) -> bool {
    use hn4_replicad::control::api::CopyReport;
    report
        .state
        .as_ref()
        .is_some_and(|state| state.copy == CopyReport::Usable)
}

/// One node without peers whose files exist.
pub(crate) fn single(folder: &Path, plan: Plan) -> Node {
    let plan = Plan {
        alone: true,
        policy: String::new(),
        ..plan
    };
    make_nodes(folder, program(), &plan)
        .expect("a node")
        .pop()
        .expect("one node")
}

/// An oracle for a whole volume.
pub(crate) fn oracle(seed: u64, plan: &Plan) -> SharedOracle {
    let sectors = usize::try_from(plan.size_mib << 11).expect("a small volume");
    Arc::new(Mutex::new(Oracle::new(seed, sectors)))
}

/// Seeds of a test's random choices: `HN4_SEED`, or one from the clock. Printed, so that a run can
/// be done again.
pub(crate) fn seed(test: &str) -> u64 {
    let given = std::env::var("HN4_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = given.unwrap_or_else(|| now.map_or(1, |now| u64::from(now.subsec_nanos())));
    println!("{test}: HN4_SEED={seed}");
    seed
}

/// How often to do something: a variable of the environment, or the given number.
pub(crate) fn times(variable: &str, usual: u64) -> u64 {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(usual)
}

/// Copies a node's log and backing as they lie on the disk, opens the copies without any peer, and
/// lets an oracle judge what a client would see. The node must not run.
pub(crate) fn look_at_copy(node: &Node, place: &Path, oracle: &Mutex<Oracle>) -> Seen {
    let folder = place.join("look");
    std::fs::create_dir_all(&folder).expect("a folder");
    let mut copy = Node::existing("look", &folder, program());
    copy_device(&node.log(), &copy.log());
    copy_device(&node.backing(), &copy.backing());
    std::fs::write(copy.config(), lonely("look")).expect("a configuration");
    copy.start().expect("the copy opens");
    let promote = Request::Promote {
        volume: VOLUME.to_owned(),
        accept_loss: true,
    };
    copy.ask(&promote).expect("the copy can be promoted");
    let seen = check(&copy, oracle, 0).expect("a copy holds a prefix with everything flushed");
    drop(copy);
    std::fs::remove_dir_all(&folder).expect("removed");
    seen
}

/// Copies a file or a block device into a file.
fn copy_device(from: &Path, to: &Path) {
    let mut source = std::fs::File::open(from).expect("a log or backing");
    let mut copy = std::fs::File::create(to).expect("a copy");
    std::io::copy(&mut source, &mut copy).expect("copied");
}

/// A configuration without peers.
pub(crate) fn lonely(name: &str) -> String {
    format!(
        "[node]\nname = \"{name}\"\nstate_dir = \"state\"\ncontrol_socket = \"ctl.sock\"\n\n\
         [[volume]]\nname = \"{VOLUME}\"\nbacking = \"backing\"\nlog = \"log\"\n\
         listen = [\"unix:nbd.sock\"]\noverlay_mib = 32\n"
    )
}

/// Starts a command, or says that its program is missing.
pub(crate) fn tool(name: &str) -> Option<Command> {
    let Some(program) = hn4_replicad::quickstart::image::find_program(name) else {
        missing(name);
        return None;
    };
    // A tool that hangs must not hang the test.
    let mut command = Command::new("timeout");
    command.arg("300").arg(program);
    Some(command)
}

/// Tells that something is missing; fails where everything must be there.
pub(crate) fn missing(what: &str) {
    let required = std::env::var_os("HN4_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "{what} is missing, and HN4_REQUIRE_TOOLS=1");
    eprintln!("SKIPPED: {what} is missing");
}

/// What a command printed.
pub(crate) fn text(output: &Output) -> String {
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    format!("{out}{err}")
}

/// Runs a command that must succeed, and gives what it printed.
pub(crate) fn succeed(command: &mut Command) -> String {
    let output = command
        .output()
        .expect("timeout(1) is part of every system");
    let text = text(&output);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}",
        output.status
    );
    text
}
