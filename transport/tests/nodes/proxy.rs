//! A line between two nodes that a test can disturb: for UDP and for TCP.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hn4_transport::driver::TransportKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;

/// What the line does with bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Line {
    /// Lets them through.
    Open,
    /// Flips a bit in one read of every so many.
    Flipping(u64),
    /// Lets nothing through, and does not say so.
    Stalled,
    /// Ends every connection and accepts no new one.
    Cut,
}

/// See the [module](self). Ends with the runtime of the test.
#[derive(Clone)]
pub(crate) struct Proxy {
    pub(crate) line: watch::Sender<Line>,
    flipped: Arc<AtomicU64>,
    reads: Arc<AtomicU64>,
}

impl Proxy {
    /// Listens on a port of its own, and passes to `target` what comes there.
    pub(crate) fn start(kind: TransportKind, target: SocketAddr) -> (Self, SocketAddr) {
        let line = watch::Sender::new(Line::Open);
        let proxy = Self {
            line,
            flipped: Arc::default(),
            reads: Arc::default(),
        };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let address = match kind {
            TransportKind::Quic => {
                let socket = std::net::UdpSocket::bind(any).expect("a socket");
                socket.set_nonblocking(true).expect("a setting");
                let socket = Arc::new(UdpSocket::from_std(socket).expect("a socket"));
                let address = socket.local_addr().expect("an address");
                tokio::spawn(proxy.clone().udp(socket, target));
                address
            }
            TransportKind::Wss => {
                let listener = std::net::TcpListener::bind(any).expect("a listener");
                listener.set_nonblocking(true).expect("a setting");
                let listener = TcpListener::from_std(listener).expect("a listener");
                let address = listener.local_addr().expect("an address");
                tokio::spawn(proxy.clone().tcp(listener, target));
                address
            }
        };
        (proxy, address)
    }

    pub(crate) fn set(&self, line: Line) {
        self.line.send_replace(line);
    }

    /// Reads in which a bit was flipped.
    pub(crate) fn flipped(&self) -> u64 {
        self.flipped.load(Ordering::Relaxed)
    }

    fn disturb(&self, bytes: &mut [u8]) {
        let read = self.reads.fetch_add(1, Ordering::Relaxed) + 1;
        let Line::Flipping(every) = *self.line.borrow() else {
            return;
        };
        if read.is_multiple_of(every) {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            self.flipped.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn udp(self, front: Arc<UdpSocket>, target: SocketAddr) {
        let mut backs = HashMap::<SocketAddr, Arc<UdpSocket>>::new();
        let mut buffer = vec![0; 65536];
        loop {
            let Ok((length, from)) = front.recv_from(&mut buffer).await else {
                return;
            };
            if matches!(*self.line.borrow(), Line::Stalled | Line::Cut) {
                continue;
            }
            let back = match backs.entry(from) {
                Entry::Occupied(back) => back.into_mut(),
                Entry::Vacant(place) => {
                    let back = UdpSocket::bind(("127.0.0.1", 0)).await.expect("a socket");
                    back.connect(target).await.expect("an address");
                    let back = Arc::new(back);
                    tokio::spawn(self.clone().udp_back(back.clone(), front.clone(), from));
                    place.insert(back)
                }
            };
            self.disturb(&mut buffer[..length]);
            // Whatever goes wrong here is one more lost datagram.
            let _ = back.send(&buffer[..length]).await;
        }
    }

    async fn udp_back(self, back: Arc<UdpSocket>, front: Arc<UdpSocket>, client: SocketAddr) {
        let mut buffer = vec![0; 65536];
        loop {
            let Ok(length) = back.recv(&mut buffer).await else {
                continue;
            };
            if matches!(*self.line.borrow(), Line::Stalled | Line::Cut) {
                continue;
            }
            self.disturb(&mut buffer[..length]);
            let _ = front.send_to(&buffer[..length], client).await;
        }
    }

    async fn tcp(self, listener: TcpListener, target: SocketAddr) {
        loop {
            let Ok((client, _)) = listener.accept().await else {
                return;
            };
            if *self.line.borrow() == Line::Cut {
                continue;
            }
            let Ok(server) = TcpStream::connect(target).await else {
                continue;
            };
            let (client_in, client_out) = client.into_split();
            let (server_in, server_out) = server.into_split();
            tokio::spawn(self.clone().tcp_way(client_in, server_out));
            tokio::spawn(self.clone().tcp_way(server_in, client_out));
        }
    }

    async fn tcp_way(
        self,
        mut from: tokio::net::tcp::OwnedReadHalf,
        mut to: tokio::net::tcp::OwnedWriteHalf,
    ) {
        let mut line = self.line.subscribe();
        let mut buffer = vec![0; 65536];
        loop {
            let passes = |line: &Line| *line != Line::Stalled;
            if line
                .wait_for(passes)
                .await
                .is_ok_and(|line| *line == Line::Cut)
            {
                return;
            }
            tokio::select! {
                _ = line.changed() => {}
                read = from.read(&mut buffer) => {
                    let Ok(length @ 1..) = read else { return };
                    self.disturb(&mut buffer[..length]);
                    if to.write_all(&buffer[..length]).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}
