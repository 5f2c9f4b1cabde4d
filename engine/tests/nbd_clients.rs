//! The NBD codec serves real clients: libnbd (nbdinfo, nbdcopy, fio) and QEMU, and one that knows
//! nothing newer than the protocol's oldest living form.
//!
//! A client that is not installed is skipped with a line that says so; with `HN4_REQUIRE_TOOLS=1`
//! it fails the test instead.

mod nbd_server;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::sync::atomic::Ordering;

use hn4_engine::nbd::export::Export;
use nbd_server::Server;

const MIB: usize = 1 << 20;
const SIZE: usize = 32 * MIB;

/// Starts a command, or says that its program is missing.
fn client(program: &str) -> Option<Command> {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()));
    if !found {
        missing(program);
        return None;
    }
    // A client that hangs must not hang the test.
    let mut command = Command::new("timeout");
    command.args(["120", program]);
    Some(command)
}

fn missing(program: &str) {
    let required = std::env::var_os("HN4_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(
        !required,
        "{program} is not installed, and HN4_REQUIRE_TOOLS=1"
    );
    eprintln!("SKIPPED: {program} is not installed");
}

fn run(command: &mut Command) -> Output {
    command
        .output()
        .expect("timeout(1) is part of every system")
}

fn text(output: &Output) -> String {
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    format!("{out}{err}")
}

/// Runs a client that must succeed, and gives what it printed.
fn succeed(command: &mut Command) -> String {
    let output = run(command);
    assert!(
        output.status.success(),
        "{command:?}: {:?}\n{}",
        output.status,
        text(&output)
    );
    text(&output)
}

fn volume() -> Export {
    let mut export = Export::new("vol", SIZE as u64);
    export.description = "test volume".into();
    export
}

fn read_only() -> Export {
    let mut export = Export::new("copy", 1 << 20);
    export.read_only = true;
    export.rotational = true;
    export.min_block_bytes = 4096;
    export
}

/// Random bytes with zero parts of many sizes.
fn sparse_image() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut image = Vec::with_capacity(SIZE);
    while image.len() < SIZE {
        let sectors = 1 + next() % 400;
        let zero = next() % 2 == 0;
        for _ in 0..sectors * 64 {
            image.extend((if zero { 0 } else { next() }).to_le_bytes());
        }
    }
    image.truncate(SIZE);
    image
}

fn assert_no_breach(server: Server) {
    assert_eq!(server.stop(), Vec::<String>::new());
}

#[test]
fn nbdinfo_sees_what_the_exports_offer() {
    let Some(mut nbdinfo) = client("nbdinfo") else {
        return;
    };
    let server = Server::start(vec![volume(), read_only()]);
    let json = succeed(nbdinfo.arg("--json").arg(server.uri("vol")));
    for part in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-name\": \"vol\"",
        "\"description\": \"test volume\"",
        "\"export-size\": 33554432",
        "\"base:allocation\"",
        "\"is_rotational\": false",
        "\"is_read_only\": false",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
    ] {
        assert!(json.contains(part), "{part} is missing from {json}");
    }
    let mut nbdinfo = client("nbdinfo").expect("was there");
    let list = succeed(nbdinfo.args(["--list", "--json"]).arg(server.uri("")));
    for part in [
        "\"vol\"",
        "\"copy\"",
        "\"is_rotational\": true",
        "\"block_size_minimum\": 4096",
    ] {
        assert!(list.contains(part), "{part} is missing from {list}");
    }
    assert_no_breach(server);
}

#[test]
fn nbdinfo_maps_holes_and_data() {
    let Some(mut nbdinfo) = client("nbdinfo") else {
        return;
    };
    let server = Server::start(vec![volume()]);
    server.disk(0).bytes.lock().expect("lock")[MIB..MIB + 4096].fill(1);
    let map = succeed(nbdinfo.arg("--map").arg(server.uri("vol")));
    let lines: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0], ["0", "1048576", "3", "hole,zero"], "{map}");
    assert_eq!(lines[1], ["1048576", "4096", "0", "data"], "{map}");
    assert_eq!(lines[2], ["1052672", "32501760", "3", "hole,zero"], "{map}");
    assert_no_breach(server);
}

#[test]
fn nbdcopy_moves_an_image_both_ways_over_four_connections() {
    if client("nbdcopy").is_none() {
        return;
    }
    let nbdcopy = || client("nbdcopy").expect("was there");
    let server = Server::start(vec![volume()]);
    let image = sparse_image();
    let (source, back) = (
        server.directory().join("source"),
        server.directory().join("back"),
    );
    std::fs::write(&source, &image).expect("write image");
    let parallel = ["--connections=4", "--requests=32"];
    succeed(
        nbdcopy()
            .args(parallel)
            .arg("--flush")
            .arg(&source)
            .arg(server.uri("vol")),
    );
    assert!(
        *server.disk(0).bytes.lock().expect("lock") == image,
        "the volume differs"
    );
    assert!(server.disk(0).flushes.load(Ordering::SeqCst) > 0);
    succeed(nbdcopy().args(parallel).arg(server.uri("vol")).arg(&back));
    assert!(
        std::fs::read(&back).expect("read copy") == image,
        "the copy differs"
    );
    assert!(server.disk(0).status_queries.load(Ordering::SeqCst) > 0);
    // An empty image over a full volume: zeroes must arrive as zeroes.
    std::fs::File::create(&source)
        .and_then(|file| file.set_len(SIZE as u64))
        .expect("empty");
    succeed(nbdcopy().args(parallel).arg(&source).arg(server.uri("vol")));
    assert!(
        server
            .disk(0)
            .bytes
            .lock()
            .expect("lock")
            .iter()
            .all(|byte| *byte == 0)
    );
    assert!(server.disk(0).zeroed_bytes.load(Ordering::SeqCst) > 0);
    assert_no_breach(server);
}

#[test]
fn qemu_img_converts_and_compares() {
    if client("qemu-img").is_none() {
        return;
    }
    let qemu_img = || client("qemu-img").expect("was there");
    let server = Server::start(vec![volume()]);
    let image = sparse_image();
    let (source, back) = (
        server.directory().join("source"),
        server.directory().join("back"),
    );
    std::fs::write(&source, &image).expect("write image");
    let raw = ["-f", "raw", "-O", "raw"];
    succeed(
        qemu_img()
            .args(["convert", "-n"])
            .args(raw)
            .arg(&source)
            .arg(server.uri("vol")),
    );
    assert!(
        *server.disk(0).bytes.lock().expect("lock") == image,
        "the volume differs"
    );
    let same = |image: &std::path::Path| {
        let compare = ["compare", "-f", "raw", "-F", "raw"];
        run(qemu_img().args(compare).arg(image).arg(server.uri("vol")))
            .status
            .success()
    };
    assert!(same(&source));
    succeed(
        qemu_img()
            .arg("convert")
            .args(raw)
            .arg(server.uri("vol"))
            .arg(&back),
    );
    assert!(
        std::fs::read(&back).expect("read copy") == image,
        "the copy differs"
    );
    server.disk(0).bytes.lock().expect("lock")[SIZE - 1] ^= 1;
    assert!(
        !same(&source),
        "compare sees a difference, so that its success means something"
    );
    assert_no_breach(server);
}

#[test]
fn qemu_io_reads_back_its_patterns_in_requests_of_512_bytes() {
    let Some(mut qemu_io) = client("qemu-io") else {
        return;
    };
    let server = Server::start(vec![volume()]);
    qemu_io.args(["-f", "raw", "-t", "writeback", "-d", "unmap"]);
    for command in [
        "write -P 0x11 512 512",
        "write -P 0x22 1024 512",
        "write -f -P 0x33 4608 7168",
        "read -P 0x11 512 512",
        "read -P 0x22 1024 512",
        "read -P 0x33 4608 7168",
        "read -P 0 1536 3072",
        "aio_write -P 0x44 1M 64k",
        "aio_write -P 0x55 2M 512",
        "aio_write -P 0x66 3M 1M",
        "aio_flush",
        "read -P 0x44 1M 64k",
        "read -P 0x55 2M 512",
        "read -P 0x66 3M 1M",
        "write -z 1M 32k",
        "write -z -u 3M 512k",
        "discard 2M 512",
        "read -P 0 1M 32k",
        "read -P 0x44 1081344 32k",
        "read -P 0 3M 512k",
        "flush",
    ] {
        qemu_io.args(["-c", command]);
    }
    let printed = succeed(qemu_io.arg(server.uri("vol")));
    assert!(
        !printed.contains("failed") && !printed.contains("rror"),
        "{printed}"
    );
    let disk = server.disk(0);
    assert!(disk.flushes.load(Ordering::SeqCst) > 0);
    assert!(disk.zeroed_bytes.load(Ordering::SeqCst) >= 544 * 1024);
    assert_eq!(disk.trimmed_bytes.load(Ordering::SeqCst), 512);
    assert_eq!(disk.bytes.lock().expect("lock")[511..513], [0, 0x11]);
    assert_no_breach(server);
}

#[test]
fn fio_verifies_what_it_wrote_at_depth() {
    let Some(mut probe) = client("fio") else {
        return;
    };
    if !run(probe.arg("--enghelp=nbd")).status.success() {
        return missing("fio with its nbd engine");
    }
    let server = Server::start(vec![volume()]);
    for (name, load) in [
        ("blocks", &["--rw=randwrite", "--bs=4k", "--fsync=64"][..]),
        (
            "sectors",
            &["--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=0"],
        ),
        ("mixed", &["--rw=randrw", "--bs=512", "--size=2M"]),
    ] {
        let mut fio = client("fio").expect("was there");
        // It leaves its verify state where it runs.
        fio.current_dir(server.directory());
        fio.arg(format!("--name={name}"))
            .args(["--ioengine=nbd", "--iodepth=32", "--size=16M"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"])
            .args(load);
        let printed = succeed(fio.arg(format!("--uri={}", server.uri("vol"))));
        assert!(printed.contains("err= 0"), "{printed}");
    }
    assert!(server.disk(0).flushes.load(Ordering::SeqCst) > 0);
    assert_no_breach(server);
}

#[test]
fn a_read_only_export_is_read_and_not_written() {
    let server = Server::start(vec![read_only()]);
    server.disk(0).bytes.lock().expect("lock").fill(0x5a);
    if let Some(mut qemu_io) = client("qemu-io") {
        let read = ["-r", "-f", "raw", "-c", "read -P 0x5a 0 1M"];
        let printed = succeed(qemu_io.args(read).arg(server.uri("copy")));
        assert!(!printed.contains("failed"), "{printed}");
        let mut qemu_io = client("qemu-io").expect("was there");
        let write = ["-f", "raw", "-c", "write 0 4096"];
        assert!(
            !run(qemu_io.args(write).arg(server.uri("copy")))
                .status
                .success()
        );
    }
    if let Some(mut nbdcopy) = client("nbdcopy") {
        let source = server.directory().join("source");
        std::fs::write(&source, vec![1; MIB]).expect("write image");
        assert!(
            !run(nbdcopy.arg(&source).arg(server.uri("copy")))
                .status
                .success()
        );
    }
    assert!(
        server
            .disk(0)
            .bytes
            .lock()
            .expect("lock")
            .iter()
            .all(|byte| *byte == 0x5a)
    );
    assert_no_breach(server);
}

/// A request as the oldest clients send it.
fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    use zerocopy::big_endian::{U16, U32, U64};
    let fields = [
        &[0x25, 0x60, 0x95, 0x13, 0, 0][..],
        &U16::new(command).to_bytes(),
        &U64::new(cookie).to_bytes(),
        &U64::new(offset).to_bytes(),
        &U32::new(length).to_bytes(),
    ];
    fields.concat()
}

fn simple_reply(stream: &mut UnixStream) -> (u32, u64) {
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).expect("a reply");
    assert_eq!(reply[..4], [0x67, 0x44, 0x66, 0x98]);
    let word = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |word: u64, byte| word << 8 | u64::from(*byte))
    };
    (
        u32::try_from(word(&reply[4..8])).expect("four bytes"),
        word(&reply[8..]),
    )
}

#[test]
fn a_client_without_options_pipelines_and_gets_simple_replies() {
    let server = Server::start(vec![volume()]);
    let mut stream = UnixStream::connect(server.socket()).expect("connect");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("greeting");
    stream
        .write_all(b"\0\0\0\0IHAVEOPT\0\0\0\x01\0\0\0\x03vol")
        .expect("choose");
    let mut chosen = [0; 134];
    stream
        .read_exact(&mut chosen)
        .expect("size, flags and padding");
    assert_eq!(chosen[..8], [0, 0, 0, 0, 2, 0, 0, 0]);

    let past_end = SIZE as u64;
    let pipeline = [
        request(1, 1, 512, 1024),
        vec![0xab; 1024],
        // A refused write, whose payload must not be taken for requests.
        request(1, 2, past_end, 100_000),
        request(0, 77, 0, 512)
            .into_iter()
            .cycle()
            .take(100_000)
            .collect(),
        request(3, 3, 0, 0),
        request(0, 4, 0, 2048),
        request(0, 5, 1, 512),
        request(2, 6, 0, 0),
    ];
    stream.write_all(&pipeline.concat()).expect("send");
    assert_eq!(simple_reply(&mut stream), (0, 1));
    assert_eq!(simple_reply(&mut stream), (28, 2));
    assert_eq!(simple_reply(&mut stream), (0, 3));
    assert_eq!(simple_reply(&mut stream), (0, 4));
    let mut data = vec![0; 2048];
    stream.read_exact(&mut data).expect("data");
    assert_eq!(
        data,
        [vec![0; 512], vec![0xab; 1024], vec![0; 512]].concat()
    );
    assert_eq!(simple_reply(&mut stream), (22, 5));
    assert_eq!(
        stream.read(&mut data).expect("end"),
        0,
        "a disconnect has no reply"
    );
    assert_eq!(server.disk(0).refusals.load(Ordering::SeqCst), 2);
    assert_no_breach(server);
}

#[test]
fn garbage_on_the_socket_ends_only_its_own_connection() {
    let server = Server::start(vec![volume()]);
    let mut stream = UnixStream::connect(server.socket()).expect("connect");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("greeting");
    // The server may close before all of it is sent.
    drop(stream.write_all(b"GET /index.html HTTP/1.1\r\n\r\n"));
    let mut rest = Vec::new();
    drop(stream.read_to_end(&mut rest));
    assert!(rest.is_empty(), "no answer to garbage");
    if let Some(mut nbdinfo) = client("nbdinfo") {
        assert_eq!(
            succeed(nbdinfo.arg("--size").arg(server.uri("vol"))).trim(),
            "33554432"
        );
    }
    let breaches = server.stop();
    assert_eq!(breaches.len(), 1, "{breaches:?}");
    assert!(breaches[0].contains("handshake flags"), "{breaches:?}");
}
