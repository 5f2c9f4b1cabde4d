//! `hn4ctl` against a control socket: the real binary, the real server, and in place of the daemon
//! answers that are known.

use std::path::PathBuf;
use std::process::{Command, Output};

use hn4_replicad::control::api::{
    Finding, Health, NodeStatus, Policy, Request, Response, VolumeReport,
};
use hn4_replicad::control::server::{Asked, ControlServer};
use tokio::sync::{mpsc, oneshot};

/// A daemon that answers in a thread of its own until it is dropped.
struct Daemon {
    folder: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Daemon {
    fn start(answer: impl Fn(Request) -> Response + Send + 'static) -> Self {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("control.sock");
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                let (requests, mut queue) = mpsc::channel::<Asked>(8);
                let server = ControlServer::bind(&path).expect("bound");
                let server = tokio::spawn(server.serve(requests));
                ready.send(()).expect("the test waits");
                let answering = async {
                    while let Some((request, reply)) = queue.recv().await {
                        // Who asked may be gone.
                        let _ = reply.send(answer(request));
                    }
                };
                tokio::select! {
                    () = answering => {}
                    _ = stopped => {}
                }
                server.abort();
            });
        });
        is_ready.recv().expect("the server is bound");
        Self {
            folder,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    fn ctl(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_hn4ctl"))
            .args(arguments)
            .arg("--socket")
            .arg(self.socket())
            .output()
            .expect("hn4ctl runs")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended already.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking());
        }
    }
}

fn node(findings: Vec<Finding>) -> NodeStatus {
    let health = findings.iter().map(|finding| finding.health).max();
    NodeStatus {
        node: "alpha".to_owned(),
        node_id: "id".to_owned(),
        version: "0.1.0".to_owned(),
        uptime_ms: 1500,
        volumes: vec![VolumeReport {
            name: "vol0".to_owned(),
            health: health.unwrap_or(Health::Ok),
            backing: "/dev/one".to_owned(),
            log: "/dev/two".to_owned(),
            listen: Vec::new(),
            policy: Policy {
                write_ack: "overlay".to_owned(),
                ack: "async".to_owned(),
                ack_peers: 0,
                on_degraded: "block".to_owned(),
            },
            state: None,
            peers: Vec::new(),
            findings,
        }],
    }
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("text")
}

#[test]
fn every_command_asks_for_what_it_says_and_prints_the_answer() {
    let daemon = Daemon::start(|request| Response::Done {
        message: format!("{request:?}"),
    });
    for (arguments, asked) in [
        (&["flush", "v"][..], "Flush { volume: \"v\" }"),
        (&["drain", "v"], "Drain { volume: \"v\" }"),
        (
            &["promote", "v"],
            "Promote { volume: \"v\", accept_loss: false }",
        ),
        (
            &["promote", "v", "--accept-loss"],
            "Promote { volume: \"v\", accept_loss: true }",
        ),
        (&["demote", "v"], "Demote { volume: \"v\" }"),
        (
            &["wait", "v", "--applied", "7", "--timeout-s", "2"],
            "Wait { volume: \"v\", applied: 7, timeout_ms: 2000 }",
        ),
    ] {
        let output = daemon.ctl(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert_eq!(text(output.stdout).trim(), asked);
    }
}

#[test]
fn a_refusal_is_shown_with_its_reason_and_what_to_do_and_exits_with_1() {
    let daemon = Daemon::start(|_| Response::Error {
        what: "promote vol0".to_owned(),
        why: "it is primary already".to_owned(),
        next: "nothing".to_owned(),
    });
    let output = daemon.ctl(&["promote", "vol0"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        text(output.stderr),
        "hn4ctl: promote vol0: it is primary already\nnext: nothing\n"
    );
    assert_eq!(text(output.stdout), "");
}

#[test]
fn status_is_for_people_or_tools_and_check_tells_by_its_exit_status() {
    let finding = Finding {
        state: "degraded".to_owned(),
        health: Health::Attention,
        cause: "a peer is away".to_owned(),
        next: "bring it back".to_owned(),
    };
    let findings = vec![finding];
    let expected = node(findings.clone());
    let daemon = Daemon::start(move |_| Response::Status(node(findings.clone())));
    let output = daemon.ctl(&["status"]);
    assert_eq!(output.status.code(), Some(0));
    let shown = text(output.stdout);
    assert!(shown.contains("ATTENTION degraded: a peer is away\n    next: bring it back\n"));
    let output = daemon.ctl(&["status", "--json"]);
    let parsed: NodeStatus = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(parsed, expected);
    assert_eq!(daemon.ctl(&["status", "--check"]).status.code(), Some(4));
    let ideal = Daemon::start(|_| Response::Status(node(Vec::new())));
    assert_eq!(ideal.ctl(&["status", "--check"]).status.code(), Some(0));
}

#[test]
fn a_watch_ends_quietly_when_nobody_reads_it_any_more() {
    let daemon = Daemon::start(|_| Response::Status(node(Vec::new())));
    let output = Command::new("sh")
        .arg("-c")
        .arg("{ \"$1\" status --watch --json --socket \"$2\"; echo $? >&2; } | head -n 1")
        .arg("sh")
        .arg(env!("CARGO_BIN_EXE_hn4ctl"))
        .arg(daemon.socket())
        .output()
        .expect("a shell runs");
    assert_eq!(text(output.stdout).lines().count(), 1);
    assert_eq!(text(output.stderr).trim(), "0");
}

#[test]
fn a_daemon_that_ends_while_it_is_asked_exits_with_3() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("control.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("bound");
    let daemon = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut byte = [0];
        // The request has arrived; the connection ends without an answer.
        std::io::Read::read_exact(&mut stream, &mut byte).expect("a request");
    });
    let output = Command::new(env!("CARGO_BIN_EXE_hn4ctl"))
        .args(["drain", "vol0", "--socket"])
        .arg(&path)
        .output()
        .expect("hn4ctl runs");
    daemon.join().expect("no panic");
    assert_eq!(output.status.code(), Some(3));
    let shown = text(output.stderr);
    assert!(shown.contains("is not known"), "{shown}");
}
