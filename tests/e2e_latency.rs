//! What `ack = "durable"` adds to a flush, on logs whose every write takes a fixed time: at most a
//! round trip and one flush of the peer.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::disk::{can_lose_power, wait};
use common::{LIMIT, folder, is_usable, pair};
use hn4_engine::nbd::client::{Client, Submit};
use hn4_replicad::quickstart::rig::{NODES, Node, Plan};

const DELAY_MS: u64 = 5;
const TIMES: usize = 200;

/// A log in memory behind a fixed delay of every write, as a file.
struct SlowLog {
    fuse: Child,
    mount: std::path::PathBuf,
}

impl SlowLog {
    fn new(mount: std::path::PathBuf, mib: u64) -> Self {
        std::fs::write(&mount, "").expect("a place to mount on");
        let fuse = Command::new("nbdfuse")
            .arg(&mount)
            .args(["--command", "nbdkit", "-s", "--exit-with-parent"])
            .args(["--filter=delay", "memory", &format!("{mib}M")])
            .arg(format!("wdelay={DELAY_MS}ms"))
            .stdin(Stdio::null())
            .spawn()
            .expect("nbdfuse");
        wait("the mount", || {
            std::fs::metadata(&mount).is_ok_and(|file| file.len() == mib << 20)
        });
        Self { fuse, mount }
    }
}

impl Drop for SlowLog {
    fn drop(&mut self) {
        // Each may have ended already.
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(&self.mount)
            .status();
        let _ = self.fuse.kill();
        let _ = self.fuse.wait();
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Time of a write of 4 KiB with FUA, one at a time.
fn flush_time(client: &mut Client) -> Duration {
    let data = [7; 4096];
    let mut times = Vec::new();
    for index in 0..TIMES as u64 {
        let offset = index % 64 * 4096;
        let started = Instant::now();
        client
            .submit(Submit::Write {
                offset,
                data: &data,
                fua: true,
            })
            .expect("a write");
        client.next_reply().expect("a reply").result.expect("done");
        times.push(started.elapsed());
    }
    median(times)
}

/// Time of a byte there and back over loopback.
fn round_trip() -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listener.local_addr().expect("an address");
    let echo = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a connection");
        socket.set_nodelay(true).expect("a setting");
        let mut byte = [0];
        while socket.read_exact(&mut byte).is_ok() {
            socket.write_all(&byte).expect("sent");
        }
    });
    let mut socket = TcpStream::connect(address).expect("connected");
    socket.set_nodelay(true).expect("a setting");
    let mut times = Vec::new();
    for _ in 0..TIMES {
        let started = Instant::now();
        socket.write_all(&[1]).expect("sent");
        socket.read_exact(&mut [0]).expect("answered");
        times.push(started.elapsed());
    }
    drop(socket);
    echo.join().expect("the echo ends well");
    median(times)
}

fn set_ack(node: &Node, from: &str, to: &str) {
    let text = std::fs::read_to_string(node.config()).expect("a configuration");
    assert!(text.contains(from), "{text}");
    std::fs::write(node.config(), text.replace(from, to)).expect("written");
}

fn measure(place: &Path, transport: &'static str) {
    let plan = Plan {
        size_mib: 16,
        log_mib: 48,
        sector_bytes: 4096,
        transport,
        existing: true,
        policy: "assume_strict_flush = true\nack = \"async\"\n".to_owned(),
        ..Plan::default()
    };
    let logs = NODES.map(|name| {
        let folder = place.join(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        let backing = std::fs::File::create(folder.join("backing"));
        backing
            .and_then(|file| file.set_len(plan.size_mib << 20))
            .expect("a backing");
        SlowLog::new(folder.join("log"), plan.log_mib)
    });
    let (mut alpha, mut beta) = pair(place, &plan);
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    beta.wait_for("have a full copy", LIMIT, is_usable)
        .expect("beta is seeded");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let local = flush_time(&mut alpha.client().expect("a client"));
    alpha.stop(LIMIT).expect("alpha stops");
    set_ack(&alpha, "ack = \"async\"", "ack = \"durable\"");
    alpha.start().expect("alpha serves");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    let durable = flush_time(&mut alpha.client().expect("a client"));
    let round_trip = round_trip();
    // The peer's log is like ours.
    let most = (local * 2 + round_trip).mul_f64(1.1);
    println!(
        "{transport}: each write of a log takes {DELAY_MS} ms. Median of {TIMES} writes of 4 KiB \
         with FUA, one at a time: local {local:.2?}, durable on one peer {durable:.2?}; round trip \
         of TCP on loopback {round_trip:.2?}; allowed {most:.2?}"
    );
    assert!(durable <= most, "{durable:?} of {most:?}");
    drop((alpha, beta, logs));
}

#[test]
fn a_durable_flush_costs_at_most_a_round_trip_and_one_flush_of_the_peer_more() {
    if !can_lose_power(&["nbdkit", "nbdfuse"]) {
        return;
    }
    for transport in ["quic", "wss"] {
        measure(folder().path(), transport);
    }
}
