//! The client of this crate against the codec of this crate: with structured replies and without,
//! one request at a time and many, and against servers that break the protocol.

#[expect(
    dead_code,
    reason = "shared with the tests of foreign clients, which use more of it"
)]
mod nbd_server;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hn4_engine::nbd::client::{Address, Client, ClientError, ClientOptions, Submit};
use hn4_engine::nbd::export::Export;
use nbd_server::Server;

const SIZE: u64 = 4 << 20;

fn server() -> Server {
    let mut copy = Export::new("copy", SIZE);
    copy.read_only = true;
    Server::start(vec![Export::new("vol", SIZE), copy])
}

fn connect(server: &Server, export: &str, structured_replies: bool) -> Client {
    let options = ClientOptions {
        structured_replies,
        ..ClientOptions::default()
    };
    Client::connect(&Address::Unix(server.socket()), export, options).expect("connected")
}

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..bytes).map(|_| next()).collect()
}

#[test]
fn what_was_written_is_read_with_structured_replies_and_without() {
    for structured in [false, true] {
        let server = server();
        let mut client = connect(&server, "vol", structured);
        assert_eq!(client.info().size_bytes, SIZE);
        assert_eq!(client.info().structured_replies, structured);
        let data = pattern(7, 300 * 1024);
        client.write(4096, &data, true).expect("written");
        client.write(4096, &data[..512], false).expect("written");
        client.flush().expect("flushed");
        assert!(server.disk(0).flushes.load(Ordering::SeqCst) > 0);
        assert!(client.read(4096, 300 * 1024).expect("read") == data);
        client.write_zeroes(8192, 4096).expect("zeroed");
        client.trim(16384, 4096).expect("trimmed");
        assert_eq!(client.read(8192, 4096).expect("read"), vec![0; 4096]);
        assert!(client.read(12288, 4096).expect("read") == data[8192..12288]);
        client.disconnect().expect("gone");
        assert_eq!(server.stop(), Vec::<String>::new());
    }
}

#[test]
fn many_requests_in_flight_get_their_own_answers() {
    let server = server();
    let mut client = connect(&server, "vol", true);
    let mut expected = HashMap::new();
    for block in 0..256_u64 {
        let data = pattern(block + 1, 4096);
        let offset = block * 4096;
        client
            .submit(Submit::Write {
                offset,
                data: &data,
                fua: false,
            })
            .expect("queued");
        expected.insert(block, data);
    }
    while client.in_flight() > 0 {
        client
            .next_reply()
            .expect("an answer")
            .result
            .expect("no error");
    }
    let mut tickets = HashMap::new();
    for block in (0..256_u64).rev() {
        let request = Submit::Read {
            offset: block * 4096,
            length: 4096,
        };
        tickets.insert(client.submit(request).expect("queued"), block);
    }
    while client.in_flight() > 0 {
        let done = client.next_reply().expect("an answer");
        let block = tickets
            .remove(&done.ticket)
            .expect("a ticket that was given");
        assert!(
            done.result.expect("no error") == expected[&block],
            "block {block}"
        );
    }
    assert!(tickets.is_empty());
}

#[test]
fn a_refused_request_leaves_the_connection_usable() {
    for structured in [false, true] {
        let server = server();
        let mut client = connect(&server, "copy", structured);
        let error = client.write(0, &[1; 512], false).expect_err("read-only");
        assert_eq!(error.errno(), Some(1), "{error}");
        let error = client.read(SIZE, 512).expect_err("past the end");
        assert_eq!(error.errno(), Some(22), "{error}");
        assert_eq!(client.read(0, 512).expect("read"), vec![0; 512]);
    }
}

#[test]
fn an_unknown_export_is_refused_with_the_servers_words() {
    let server = server();
    let address = Address::Unix(server.socket());
    let result = Client::connect(&address, "nothing", ClientOptions::default());
    assert!(matches!(
        result,
        Err(ClientError::Refused { option: 7, .. })
    ));
}

/// A server that sends `first` and then listens without a word.
fn broken_server(first: Vec<u8>) -> (tempfile::TempDir, Address) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("broken.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.write_all(&first).expect("sent");
        let mut rest = Vec::new();
        // Ends when the client gives up.
        let _ = stream.read_to_end(&mut rest);
    });
    (directory, Address::Unix(path))
}

#[test]
fn a_server_that_says_nothing_is_given_up_in_time() {
    let (_directory, address) = broken_server(Vec::new());
    let timeout = Some(Duration::from_millis(50));
    let options = ClientOptions {
        timeout,
        ..ClientOptions::default()
    };
    let started = Instant::now();
    let result = Client::connect(&address, "", options);
    assert!(matches!(result, Err(ClientError::Timeout { .. })));
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_server_that_is_none_is_told_from_one() {
    for garbage in [b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), vec![0xFF; 64]] {
        let (_directory, address) = broken_server(garbage);
        let result = Client::connect(&address, "", ClientOptions::default());
        assert!(matches!(result, Err(ClientError::Protocol(_))));
    }
}
