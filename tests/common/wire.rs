//! A line between two nodes that a test can make slow, disturb, and cut: UDP for QUIC, TCP for
//! WebSocket. The first node dials it instead of the second one.
//!
//! A limited rate is a token bucket: who sends more finds the sockets' buffers full, where TCP
//! waits and UDP loses datagrams, as on a real link.
#![expect(
    dead_code,
    reason = "each test program is compiled with its own copy of this and uses a part of it"
)]

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hn4_replicad::quickstart::rig::Node;

/// How long a thread waits for bytes before it looks at the line's state.
const LOOK: Duration = Duration::from_millis(20);

/// What the line does with what comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Line {
    /// Lets it through.
    Open,
    /// Flips a bit in one read of so many.
    Flipping(u64),
    /// Sends one read of so many twice.
    Doubling(u64),
    /// Holds one read of so many back until after the next one.
    Swapping(u64),
    /// Lets nothing through, and does not say so.
    Stalled,
    /// Ends every connection and lets no new one through.
    Cut,
}

struct Shared {
    line: Mutex<Line>,
    changed: Condvar,
    /// Bytes a second in each direction; 0: no limit.
    rate: AtomicU64,
    reads: AtomicU64,
    disturbed: AtomicU64,
    /// Bytes that went to the target, and that came from it.
    passed: [AtomicU64; 2],
    stop: AtomicBool,
}

/// See the module.
pub(crate) struct Wire {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

/// One direction of the line.
struct Way {
    shared: Arc<Shared>,
    direction: usize,
    free_at: Instant,
    held: Option<Vec<u8>>,
}

impl Wire {
    /// A line from a node to the peer in its configuration, which is changed. The node must not
    /// run, and must be the one that dials.
    pub(crate) fn from(node: &Node, transport: &str) -> Self {
        let config = node.config();
        let text = std::fs::read_to_string(&config).expect("a configuration");
        let (before, rest) = text.split_once("\naddress = \"").expect("a peer's address");
        let (target, after) = rest.split_once('"').expect("a quoted address");
        let wire = Self::to(target.parse().expect("an address"), transport);
        let text = format!("{before}\naddress = \"{}\"{after}", wire.address);
        std::fs::write(&config, text).expect("a configuration");
        wire
    }

    fn to(target: SocketAddr, transport: &str) -> Self {
        let shared = Arc::new(Shared {
            line: Mutex::new(Line::Open),
            changed: Condvar::new(),
            rate: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            disturbed: AtomicU64::new(0),
            passed: [AtomicU64::new(0), AtomicU64::new(0)],
            stop: AtomicBool::new(false),
        });
        let any = (Ipv4Addr::LOCALHOST, 0);
        let own = Arc::clone(&shared);
        let (address, thread) = if transport == "quic" {
            let socket = UdpSocket::bind(any).expect("a socket");
            let address = socket.local_addr().expect("an address");
            let thread = std::thread::spawn(move || udp(&own, &Arc::new(socket), target));
            (address, thread)
        } else {
            let listener = TcpListener::bind(any).expect("a listener");
            let address = listener.local_addr().expect("an address");
            listener.set_nonblocking(true).expect("a setting");
            let thread = std::thread::spawn(move || tcp(&own, &listener, target));
            (address, thread)
        };
        Self {
            shared,
            address,
            thread: Some(thread),
        }
    }

    /// Changes what the line does.
    pub(crate) fn set(&self, line: Line) {
        *self.shared.line.lock().expect("no thread panics") = line;
        self.shared.changed.notify_all();
    }

    /// Limits the line, in bytes a second for each direction; 0: no limit.
    pub(crate) fn limit(&self, bytes_per_second: u64) {
        self.shared.rate.store(bytes_per_second, Ordering::SeqCst);
    }

    /// Bytes that went through so far, in both directions.
    pub(crate) fn passed(&self) -> u64 {
        let passed = &self.shared.passed;
        passed.iter().map(|way| way.load(Ordering::SeqCst)).sum()
    }

    /// Reads that were disturbed.
    pub(crate) fn disturbed(&self) -> u64 {
        self.shared.disturbed.load(Ordering::SeqCst)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.set(Line::Cut);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn line(&self) -> Line {
        *self.line.lock().expect("no thread panics")
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Waits while the line is stalled.
    fn wait(&self) {
        let line = self.line.lock().expect("no thread panics");
        let stalled = |line: &mut Line| *line == Line::Stalled && !self.stopped();
        let waited = self.changed.wait_timeout_while(line, LOOK, stalled);
        drop(waited.expect("no thread panics"));
    }
}

impl Way {
    fn new(shared: &Arc<Shared>, direction: usize) -> Self {
        Self {
            shared: Arc::clone(shared),
            direction,
            free_at: Instant::now(),
            held: None,
        }
    }

    /// What is to be sent for a read, in order.
    fn disturb(&mut self, mut bytes: Vec<u8>) -> Vec<Vec<u8>> {
        let read = self.shared.reads.fetch_add(1, Ordering::SeqCst) + 1;
        let chosen = |every: u64| read.is_multiple_of(every);
        let mut all = Vec::new();
        match self.shared.line() {
            Line::Flipping(every) if chosen(every) => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x10;
                all.push(bytes);
            }
            Line::Doubling(every) if chosen(every) => all = vec![bytes.clone(), bytes],
            Line::Swapping(every) if chosen(every) && self.held.is_none() => {
                self.held = Some(bytes);
            }
            _ => {
                all.push(bytes);
                all.extend(self.held.take());
                self.pace(&all);
                return all;
            }
        }
        self.shared.disturbed.fetch_add(1, Ordering::SeqCst);
        all.extend(self.held.take().filter(|_| !all.is_empty()));
        self.pace(&all);
        all
    }

    fn pace(&mut self, all: &[Vec<u8>]) {
        let bytes: u64 = all.iter().map(|bytes| bytes.len() as u64).sum();
        self.shared.passed[self.direction].fetch_add(bytes, Ordering::SeqCst);
        let rate = self.shared.rate.load(Ordering::SeqCst);
        if let Some(nanos) = (bytes * 1_000_000_000).checked_div(rate) {
            let now = Instant::now();
            // A pause may be made up for, up to a few milliseconds.
            let from = self.free_at.max(now - Duration::from_millis(5));
            self.free_at = from + Duration::from_nanos(nanos);
            // This is the link's time, not a wait for anything.
            std::thread::sleep(self.free_at.saturating_duration_since(now));
        }
    }
}

fn is_timeout(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn udp(shared: &Arc<Shared>, front: &Arc<UdpSocket>, target: SocketAddr) {
    let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut threads = Vec::new();
    let mut way = Way::new(shared, 0);
    let mut buffer = vec![0; 65536];
    front.set_read_timeout(Some(LOOK)).expect("a setting");
    while !shared.stopped() {
        let Ok((length, client)) = front.recv_from(&mut buffer) else {
            continue;
        };
        if matches!(shared.line(), Line::Stalled | Line::Cut) {
            continue;
        }
        let back = backs.entry(client).or_insert_with(|| {
            let back = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
            back.connect(target).expect("an address");
            back.set_read_timeout(Some(LOOK)).expect("a setting");
            let back = Arc::new(back);
            let (own, front) = (Arc::clone(&back), Arc::clone(front));
            let way = Way::new(shared, 1);
            threads.push(std::thread::spawn(move || {
                udp_back(way, &own, &front, client)
            }));
            back
        });
        for bytes in way.disturb(buffer[..length].to_vec()) {
            // Whatever goes wrong here is one more lost datagram.
            let _ = back.send(&bytes);
        }
    }
    for thread in threads {
        // A panic there has been printed.
        let _ = thread.join();
    }
}

fn udp_back(mut way: Way, back: &UdpSocket, front: &UdpSocket, client: SocketAddr) {
    let mut buffer = vec![0; 65536];
    while !way.shared.stopped() {
        let Ok(length) = back.recv(&mut buffer) else {
            continue;
        };
        if matches!(way.shared.line(), Line::Stalled | Line::Cut) {
            continue;
        }
        for bytes in way.disturb(buffer[..length].to_vec()) {
            // As above.
            let _ = front.send_to(&bytes, client);
        }
    }
}

fn tcp(shared: &Arc<Shared>, listener: &TcpListener, target: SocketAddr) {
    let mut threads = Vec::new();
    while !shared.stopped() {
        let Ok((client, _)) = listener.accept() else {
            // There is no accept with a time limit.
            std::thread::sleep(LOOK);
            continue;
        };
        if shared.line() == Line::Cut {
            continue;
        }
        let Ok(server) = TcpStream::connect(target) else {
            continue;
        };
        for socket in [&client, &server] {
            socket.set_nonblocking(false).expect("a setting");
            socket.set_nodelay(true).expect("a setting");
            socket.set_read_timeout(Some(LOOK)).expect("a setting");
        }
        let (client_too, server_too) = (clone(&client), clone(&server));
        let (there, back) = (Way::new(shared, 0), Way::new(shared, 1));
        threads.push(std::thread::spawn(move || tcp_way(there, client, server)));
        threads.push(std::thread::spawn(move || {
            tcp_way(back, server_too, client_too);
        }));
    }
    for thread in threads {
        // A panic there has been printed.
        let _ = thread.join();
    }
}

fn clone(socket: &TcpStream) -> TcpStream {
    socket.try_clone().expect("another descriptor")
}

fn tcp_way(mut way: Way, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 16384];
    loop {
        way.shared.wait();
        if way.shared.line() == Line::Cut || way.shared.stopped() {
            break;
        }
        if way.shared.line() == Line::Stalled {
            continue;
        }
        let length = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if is_timeout(error.kind()) => continue,
            Err(_) => break,
        };
        let all = way.disturb(buffer[..length].to_vec());
        if all.iter().any(|bytes| to.write_all(bytes).is_err()) {
            break;
        }
    }
    // Fails if the other side did so first.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
