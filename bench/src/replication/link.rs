//! A line between two nodes over which only so many bytes a second go, in each direction: a token
//! bucket. Who sends more finds the socket's buffers full and waits, as on a real line.
//!
//! **Not here:** loss, delay, and datagrams: the nodes talk WebSocket over it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hn4_replicad::quickstart::rig::Node;

/// How long a thread waits for bytes or for a connection before it looks whether it is to end.
const LOOK: Duration = Duration::from_millis(10);
/// What is taken from a socket at once.
const PIECE_BYTES: usize = 16 << 10;
/// So much of a pause may be made up for.
const BURST: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
struct Shared {
    /// Bytes a second; 0: no limit.
    rate: AtomicU64,
    passed: AtomicU64,
    stop: AtomicBool,
}

/// See the module. It ends when it is dropped.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// A line from a node to the only peer in its configuration, which is changed. The node must
    /// not run, and must be the one that dials.
    ///
    /// # Errors
    /// If the configuration has no peer, or there is no socket to be had.
    pub(super) fn from(node: &Node) -> Result<Self> {
        let config = node.config();
        let text = std::fs::read_to_string(&config)?;
        let parts = text
            .split_once("\naddress = \"")
            .and_then(|(before, rest)| {
                let (target, after) = rest.split_once('"')?;
                Some((before, target, after))
            });
        let (before, target, after) = parts.context("a peer with an address")?;
        let target: SocketAddr = target.parse().context("the peer's address")?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let text = format!("{before}\naddress = \"{address}\"{after}");
        std::fs::write(&config, text)?;
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = std::thread::spawn(move || serve(&own, &listener, target));
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Limits it, in bytes a second for each direction; 0: no limit.
    pub(super) fn limit(&self, bytes_per_second: u64) {
        self.shared.rate.store(bytes_per_second, Ordering::SeqCst);
    }

    /// Bytes that went through so far, in both directions.
    pub(super) fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::SeqCst)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Arc<Shared>, listener: &TcpListener, target: SocketAddr) {
    let mut threads = Vec::new();
    while !shared.stop.load(Ordering::SeqCst) {
        let Ok((client, _)) = listener.accept() else {
            // There is no accept with a time limit.
            std::thread::sleep(LOOK);
            continue;
        };
        // Whatever fails here is a connection that could not be made: the node dials again.
        if let Ok(ways) = connect(client, target) {
            for (from, to) in ways {
                let shared = Arc::clone(shared);
                threads.push(std::thread::spawn(move || carry(&shared, from, to)));
            }
        }
    }
    for thread in threads {
        // A panic there has been printed.
        let _ = thread.join();
    }
}

/// Both directions of a connection.
fn connect(client: TcpStream, target: SocketAddr) -> std::io::Result<[(TcpStream, TcpStream); 2]> {
    let server = TcpStream::connect(target)?;
    for socket in [&client, &server] {
        socket.set_nonblocking(false)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(LOOK))?;
    }
    let there = (client.try_clone()?, server.try_clone()?);
    Ok([there, (server, client)])
}

fn carry(shared: &Shared, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut free_at = Instant::now();
    while !shared.stop.load(Ordering::SeqCst) {
        let length = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                continue;
            }
            Err(_) => break,
        };
        shared.passed.fetch_add(length as u64, Ordering::SeqCst);
        let rate = shared.rate.load(Ordering::SeqCst);
        if let Some(nanos) = (length as u64 * 1_000_000_000).checked_div(rate) {
            let now = Instant::now();
            let from = now
                .checked_sub(BURST)
                .map_or(free_at, |least| free_at.max(least));
            free_at = from + Duration::from_nanos(nanos);
            // This is the line's time, not a wait for anything.
            std::thread::sleep(free_at.saturating_duration_since(now));
        }
        let piece = buffer.get(..length).unwrap_or_default();
        if to.write_all(piece).is_err() {
            break;
        }
    }
    // Both fail if the other direction did so first.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(folder: &std::path::Path, target: SocketAddr) -> Node {
        let node = Node::existing("alpha", folder, std::path::Path::new("/none"));
        let text = format!("[[volume.peer]]\nname = \"beta\"\naddress = \"{target}\"\n");
        std::fs::write(node.config(), text).expect("a configuration");
        node
    }

    #[test]
    fn bytes_pass_unchanged_and_no_faster_than_the_limit() {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let target = listener.local_addr().expect("an address");
        let node = node(folder.path(), target);
        let link = Link::from(&node).expect("a line");
        link.limit(1 << 20);
        let text = std::fs::read_to_string(node.config()).expect("a configuration");
        assert!(!text.contains(&target.to_string()), "{text}");
        let (_, rest) = text.split_once("address = \"").expect("an address");
        let (address, _) = rest.split_once('"').expect("a quoted address");
        let mut near = TcpStream::connect(address).expect("connected");
        let (mut far, _) = listener.accept().expect("a connection");
        let sent: Vec<u8> = (0..256 << 10).map(|at: u32| at.to_le_bytes()[1]).collect();
        let copy = sent.clone();
        let begun = Instant::now();
        let sender = std::thread::spawn(move || near.write_all(&copy));
        let mut came = vec![0; sent.len()];
        far.read_exact(&mut came).expect("everything comes");
        let took = begun.elapsed();
        sender.join().expect("no panic").expect("sent");
        assert!(came == sent, "bytes were changed");
        assert_eq!(link.passed(), sent.len() as u64);
        // A quarter of a second, less the burst.
        assert!(took >= Duration::from_millis(240), "{took:?}");
    }

    #[test]
    fn a_configuration_without_a_peer_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let node = Node::existing("alpha", folder.path(), std::path::Path::new("/none"));
        std::fs::write(node.config(), "[node]\nname = \"alpha\"\n").expect("written");
        assert!(Link::from(&node).is_err());
    }
}
