//! Everything that can be given wrong is refused, with words that help, before anything is changed.

mod common;

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::disk::Loop;
use common::{LIMIT, folder, lonely, oracle, pair, program, running_pair, single, succeed, tool};
use hn4_replicad::config::Config;
use hn4_replicad::control::Request;
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME, make_nodes};

fn alone() -> Plan {
    Plan {
        alone: true,
        policy: String::new(),
        ..plan()
    }
}

fn plan() -> Plan {
    Plan {
        size_mib: 16,
        log_mib: 24,
        overlay_mib: 8,
        ..Plan::default()
    }
}

/// Starts a daemon that must refuse, and gives its words.
fn refused(node: &mut Node) -> String {
    let error = node.start().expect_err("it must not open");
    format!("{error:#}")
}

fn assert_says(words: &str, parts: &[&str]) {
    for part in parts {
        assert!(words.contains(part), "\"{part}\" is missing from: {words}");
    }
}

fn edit(node: &Node, from: &str, to: &str) {
    let text = std::fs::read_to_string(node.config()).expect("a configuration");
    assert!(text.contains(from), "{from} is in {text}");
    std::fs::write(node.config(), text.replacen(from, to, 1)).expect("edited");
}

/// Writes something that is in the log only.
fn write_and_kill(node: &mut Node) {
    node.start().expect("it serves");
    node.client()
        .expect("a client")
        .write(4096, &[7; 4096], true)
        .expect("written");
    node.kill().expect("killed");
}

#[test]
fn a_log_of_another_volume_is_refused_and_nothing_is_changed() {
    let place = folder();
    let mut one = single(&place.path().join("one"), plan());
    let mut two = single(&place.path().join("two"), plan());
    write_and_kill(&mut one);
    write_and_kill(&mut two);
    let before = std::fs::read(one.backing()).expect("a backing");
    let other = two.log().display().to_string();
    edit(&one, "log = \"log\"", &format!("log = \"{other}\""));
    let words = refused(&mut one);
    assert_says(
        &words,
        &[
            "is of volume",
            "but its backing is known",
            "Set log to the right path",
        ],
    );
    assert!(
        std::fs::read(one.backing()).expect("a backing") == before,
        "it was written to"
    );
    edit(&one, &format!("log = \"{other}\""), "log = \"log\"");
    one.start().expect("with its own log it opens");
    let mut client = one.client().expect("a client");
    assert_eq!(client.read(4096, 4096).expect("read"), vec![7; 4096]);
}

#[test]
fn a_missing_log_with_undestaged_epochs_is_named() {
    let place = folder();
    let mut node = single(place.path(), plan());
    write_and_kill(&mut node);
    let away = place.path().join("log-elsewhere");
    std::fs::rename(node.log(), &away).expect("moved");
    let words = refused(&mut node);
    assert_says(&words, &["no usable log", "may hold acknowledged writes"]);
    std::fs::rename(&away, node.log()).expect("moved back");
    node.start().expect("it opens");
    let mut client = node.client().expect("a client");
    assert_eq!(client.read(4096, 4096).expect("read"), vec![7; 4096]);
}

#[test]
fn a_backing_of_another_size_is_refused() {
    let place = folder();
    let mut node = single(place.path(), plan());
    write_and_kill(&mut node);
    let size = std::fs::metadata(node.backing()).expect("a backing").len();
    let file = std::fs::File::options()
        .write(true)
        .open(node.backing())
        .expect("opened");
    file.set_len(size - 4096).expect("cut");
    let words = refused(&mut node);
    assert_says(&words, &["bytes", "a log belongs to one backing only"]);
    file.set_len(size).expect("grown again");
    node.start().expect("with the right size it opens");
}

#[test]
fn two_daemons_on_one_volume_are_one_too_many() {
    let place = folder();
    let mut node = single(place.path(), plan());
    node.start().expect("it serves");
    let folder = place.path().join("second");
    std::fs::create_dir(&folder).expect("a folder");
    let mut second = Node::existing("second", &folder, program());
    let text = lonely("second")
        .replace("\"backing\"", &format!("\"{}\"", node.backing().display()))
        .replace("\"log\"", &format!("\"{}\"", node.log().display()));
    std::fs::write(second.config(), text).expect("a configuration");
    let words = refused(&mut second);
    assert_says(&words, &["another process"]);
    node.client()
        .expect("the first one goes on")
        .write(0, &[1; 512], true)
        .expect("written");
    let mut same = Node::existing("same", &node.folder, program());
    same.spawn().expect("started");
    let error = same
        .wait_for("end", LIMIT, |_| false)
        .expect_err("it must end");
    assert_says(&format!("{error:#}"), &["ended"]);
    node.client()
        .expect("the first one goes on")
        .read(0, 512)
        .expect("read");
}

#[test]
fn a_wrong_configuration_is_explained_line_by_line() {
    let place = folder();
    let mut node = single(place.path(), plan());
    edit(&node, "overlay_mib", "overlay_mb");
    let words = refused(&mut node);
    assert_says(&words, &["overlay_mb", "overlay_mib", "line"]);
    std::fs::write(node.config(), "[node\n").expect("written");
    assert_says(&refused(&mut node), &["this is not TOML"]);
    std::fs::remove_file(node.config()).expect("removed");
    assert_says(&refused(&mut node), &["cannot read the configuration"]);
}

#[test]
fn a_state_directory_that_cannot_be_written_is_refused() {
    let place = folder();
    let mut node = single(place.path(), plan());
    let state = node.folder.join("state");
    std::fs::remove_dir_all(&state).expect("removed");
    std::fs::write(&state, "not a directory").expect("a file in its place");
    assert_says(&refused(&mut node), &["state"]);
}

/// Bytes that no protocol allows, and some that nearly fit.
fn garbage(random: &mut Random) -> Vec<u8> {
    let length = usize::try_from(1 + random.below(4000)).expect("small");
    let mut bytes: Vec<u8> = (0..length)
        .map(|_| random.draw().to_le_bytes()[0])
        .collect();
    if random.one_in(2) {
        // A client's flags, then an option with a wild length.
        let mut start = vec![0, 0, 0, 3];
        start.extend_from_slice(b"IHAVEOPT");
        start.append(&mut bytes);
        bytes = start;
    }
    bytes
}

#[test]
fn garbage_on_the_nbd_port_harms_only_who_sends_it() {
    let place = folder();
    let mut node = single(place.path(), plan());
    node.start().expect("it serves");
    let mut client = node.client().expect("a client");
    let mut random = Random::new(common::seed("garbage"));
    for _ in 0..200 {
        let mut stream = UnixStream::connect(node.nbd_socket()).expect("connected");
        stream
            .set_read_timeout(Some(Duration::from_millis(20)))
            .expect("set");
        // The daemon may close in the middle of it.
        let _ = stream.write_all(&garbage(&mut random));
        let mut answer = [0; 256];
        let _ = stream.read(&mut answer);
    }
    client
        .write(0, &[5; 512], true)
        .expect("a good client goes on");
    assert_eq!(client.read(0, 512).expect("read"), vec![5; 512]);
    let report = node.wait_for("let go of the bad ones", LIMIT, |report| {
        report
            .state
            .as_ref()
            .is_some_and(|state| state.clients == 1)
    });
    report.expect("no connection is left over");
}

#[test]
fn garbage_on_the_peer_port_does_not_disturb_the_peer() {
    let place = folder();
    let plan = plan();
    let (mut alpha, mut beta) = running_pair(place.path(), &plan);
    let config = Config::load(&beta.config()).expect("a configuration");
    let address = config.transport.expect("it has a transport").listen;
    let mut random = Random::new(common::seed("peer garbage"));
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    for _ in 0..200 {
        let mut bytes = garbage(&mut random);
        bytes.truncate(1400);
        socket.send_to(&bytes, address).expect("sent");
        if let Ok(mut stream) = TcpStream::connect(address) {
            // It may be closed in the middle of it.
            let _ = stream.write_all(&bytes);
        }
    }
    let oracle = oracle(3, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(3)).expect("started");
    load.wait_for_progress(500, LIMIT)
        .expect("both acknowledge");
    load.stop().expect("answered");
    alpha.wait_for_peer(LIMIT).expect("the peer is there");
    beta.wait_for("still run", LIMIT, common::is_usable)
        .expect("it runs");
}

#[test]
fn a_fresh_replica_is_neither_served_nor_promoted() {
    let place = folder();
    let (_alpha, mut beta) = pair(place.path(), &plan());
    beta.start().expect("it runs");
    assert!(
        beta.client().is_err(),
        "a copy that holds nothing must not be served"
    );
    for accept_loss in [false, true] {
        let promote = Request::Promote {
            volume: VOLUME.to_owned(),
            accept_loss,
        };
        let error = beta.ask(&promote).expect_err("refused");
        assert_says(&format!("{error:#}"), &["not usable"]);
    }
    let state = beta.report().expect("a report").state.expect("open");
    assert_eq!(state.role, "replica");
}

#[test]
fn an_old_primary_is_fenced_when_it_comes_back() {
    let place = folder();
    let plan = plan();
    let (mut alpha, beta) = running_pair(place.path(), &plan);
    let oracle = oracle(5, &plan);
    let load = Load::start(&alpha, &oracle, LoadPlan::mixed(5)).expect("started");
    load.wait_for_progress(1000, LIMIT).expect("it moves");
    alpha.kill().expect("killed");
    load.was_cut().expect("not refused");
    let promote = Request::Promote {
        volume: VOLUME.to_owned(),
        accept_loss: false,
    };
    beta.ask(&promote).expect("promoted");
    let seen = check(&beta, &oracle, 0).expect("nothing is lost");
    lock(&oracle).settle(&seen);
    alpha.spawn().expect("the old primary comes back");
    let state = alpha.wait_for("learn that its time is over", LIMIT, |report| {
        report
            .state
            .as_ref()
            .is_some_and(|state| state.role != "primary")
    });
    let state = state.expect("it is not primary any more");
    assert!(state.term >= 1, "{state:?}");
    let write = alpha
        .client()
        .map(|mut client| client.write(0, &[9; 512], true));
    assert!(
        !matches!(write, Ok(Ok(()))),
        "a fenced node must not take writes"
    );
    check(&beta, &oracle, 0).expect("the new primary is as it was");
}

#[test]
fn a_node_with_another_key_is_not_let_in() {
    let place = folder();
    let (mut alpha, mut beta) = pair(&place.path().join("one"), &plan());
    let (_gamma, stranger) = pair(&place.path().join("two"), &plan());
    for file in ["node.pem", "node.key", "ca.pem"] {
        std::fs::copy(stranger.folder.join(file), beta.folder.join(file)).expect("copied");
    }
    alpha.start().expect("it runs");
    beta.start().expect("it runs");
    let state = alpha.wait_for("say why it has no peer", LIMIT, |report| {
        report
            .findings
            .iter()
            .any(|finding| finding.state == "peer-not-connected")
            && report.peers.iter().all(|peer| !peer.connected)
            && report.peers.iter().any(|peer| peer.link.contains("failed"))
    });
    state.expect("the stranger is named");
}

#[test]
fn files_in_memory_are_refused_before_anything_is_written() {
    let memory = Path::new("/dev/shm");
    if !memory.is_dir() {
        return common::missing("/dev/shm");
    }
    let place = tempfile::tempdir_in(memory).expect("a folder in memory");
    let error = make_nodes(place.path(), program(), &alone()).expect_err("tmpfs keeps no promise");
    assert_says(&format!("{error:#}"), &["memory"]);
    let leftover = std::fs::metadata(place.path().join("alpha/log"));
    assert!(leftover.is_err(), "a log was made");
}

/// A small file system on a loop device over a file; taken down when dropped.
struct SmallDisk {
    mount: std::path::PathBuf,
    _device: Loop,
}

impl SmallDisk {
    /// `None`, said aloud, where that is not possible.
    fn new(place: &Path, mib: u64, options: &str) -> Option<Self> {
        let file = place.join("small.img");
        std::fs::File::create(&file)
            .and_then(|file| file.set_len(mib << 20))
            .expect("a file");
        succeed(tool("mke2fs")?.args(["-q", "-t", "ext4"]).arg(&file));
        let device = Loop::over(&file, &[])?;
        let mount = place.join("small");
        std::fs::create_dir_all(&mount).expect("a folder");
        let mut command = Command::new("mount");
        command.args(["-t", "ext4", "-o", options]);
        succeed(command.arg(&device.device).arg(&mount));
        Some(Self {
            mount,
            _device: device,
        })
    }

    /// Leaves no room for one more block.
    fn fill_up(&self) {
        let mut file = std::fs::File::create(self.mount.join("ballast")).expect("a file");
        let mut piece = vec![1; 1 << 16];
        while !piece.is_empty() {
            if file.write_all(&piece).is_err() {
                piece.truncate(piece.len() / 2);
            }
        }
        // Writes are delayed; the disk is full when they have arrived.
        let _ = file.sync_all();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The loop device goes with its last user.
        let _ = Command::new("umount").arg("-l").arg(&self.mount).output();
    }
}

#[test]
fn a_log_that_does_not_fit_on_its_disk_is_refused_and_leaves_nothing() {
    let place = folder();
    let Some(disk) = SmallDisk::new(place.path(), 16, "rw") else {
        return;
    };
    let error = make_nodes(&disk.mount, program(), &alone()).expect_err("24 MiB do not fit in 16");
    assert_says(&format!("{error:#}"), &["log", "No space left"]);
    for name in ["alpha/log", "alpha/backing"] {
        assert!(
            std::fs::metadata(disk.mount.join(name)).is_err(),
            "{name} was left"
        );
    }
}

#[test]
fn a_full_disk_under_a_sparse_backing_fails_closed_and_loses_nothing() {
    let place = folder();
    let Some(disk) = SmallDisk::new(place.path(), 40, "rw") else {
        return;
    };
    let mut node = single(place.path(), plan());
    let backing = disk.mount.join("backing");
    std::fs::copy(node.backing(), &backing).expect("copied");
    let size = std::fs::metadata(node.backing()).expect("a backing").len();
    std::fs::File::create(&backing)
        .and_then(|file| file.set_len(size))
        .expect("a sparse file");
    std::fs::remove_file(node.backing()).expect("removed");
    std::os::unix::fs::symlink(&backing, node.backing()).expect("a link");
    node.start().expect("it serves");
    disk.fill_up();
    let mut client = node.client().expect("a client");
    client
        .write(8192, &[9; 4096], true)
        .expect("the log has room");
    assert!(
        node.drain().is_err(),
        "there is no room for it in the backing"
    );
    let state = node.report().expect("a report");
    assert!(
        state
            .findings
            .iter()
            .any(|finding| finding.state == "failed-closed"),
        "{state:?}"
    );
    let refused = client.write(0, &[1; 512], false);
    assert!(refused.is_err(), "P5: no more writes");
    assert_eq!(client.read(8192, 4096).expect("reads go on"), vec![9; 4096]);
    node.kill().expect("killed");
    std::fs::remove_file(disk.mount.join("ballast")).expect("room is made");
    node.start().expect("it opens again");
    let mut client = node.client().expect("a client");
    assert_eq!(client.read(8192, 4096).expect("read"), vec![9; 4096]);
    node.drain().expect("now there is room");
}

#[test]
fn a_full_disk_under_the_state_directory_is_named_and_costs_nothing() {
    let place = folder();
    let Some(disk) = SmallDisk::new(place.path(), 4, "rw") else {
        return;
    };
    let mut node = single(place.path(), plan());
    let state = disk.mount.join("state");
    succeed(
        Command::new("cp")
            .arg("-a")
            .arg(node.folder.join("state"))
            .arg(&state),
    );
    std::fs::remove_dir_all(node.folder.join("state")).expect("removed");
    std::os::unix::fs::symlink(&state, node.folder.join("state")).expect("a link");
    write_and_kill(&mut node);
    disk.fill_up();
    // Whether it opens depends on whether it has to write there; either is said and right.
    if let Err(error) = node.start() {
        assert_says(&format!("{error:#}"), &["state", "No space left"]);
        std::fs::remove_file(disk.mount.join("ballast")).expect("room is made");
        node.start().expect("it opens");
    }
    let mut client = node.client().expect("a client");
    assert_eq!(client.read(4096, 4096).expect("read"), vec![7; 4096]);
}

#[test]
fn a_file_system_without_direct_writes_is_refused() {
    let place = folder();
    // With all data in its journal ext4 goes through the page cache whatever it is asked.
    let Some(disk) = SmallDisk::new(place.path(), 64, "data=journal") else {
        return;
    };
    let error = make_nodes(&disk.mount, program(), &alone()).expect_err("it cannot do O_DIRECT");
    assert_says(&format!("{error:#}"), &["O_DIRECT", "ext4"]);
}

#[test]
fn a_backing_with_larger_sectors_cannot_become_a_copy() {
    let place = folder();
    let file = place.path().join("large.img");
    std::fs::File::create(&file)
        .and_then(|file| file.set_len(16 << 20))
        .expect("a file");
    let Some(device) = Loop::over(&file, &["--sector-size=4096"]) else {
        return;
    };
    let node = Node::existing("beta", place.path(), program());
    std::fs::write(node.config(), lonely("beta")).expect("a configuration");
    std::os::unix::fs::symlink(&device.device, node.backing()).expect("a link");
    let volume = "0b5e1a00-0000-4000-8000-000000000001";
    let token = format!("hn4v1:{volume}:{}:{}:512", "5a".repeat(16), 16 << 20);
    let existing = Plan {
        existing: true,
        ..plan()
    };
    let token = token.parse().expect("a token");
    let error = node
        .create_volume(&existing, Some(token))
        .expect_err("sectors of 4096 for a volume of 512");
    assert_says(
        &format!("{error:#}"),
        &["sectors of 4096 bytes", "the volume of 512"],
    );
}
