//! The UDP socket, its settings, and connections that come in.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Connection, Endpoint, EndpointConfig, IdleTimeout, Incoming,
    MtuDiscoveryConfig, ServerConfig, TokioRuntime, TransportConfig as QuicConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use rustls::pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::stream::{Both, NOT_SHARED, Preamble, join};
use crate::driver::registry::{Accepted, Registry};
use crate::driver::{LinkStatus, StartError, Timings, TransportKind, stopped};
use crate::tls::{Identity, KeyPin, Side, TlsError};
use crate::wire::Stream;

/// Name of this protocol in the TLS handshake.
pub(super) const ALPN: &[u8] = b"hn4-wormhole/1";
/// Handshakes at a time; more are refused at once.
const MAX_HANDSHAKES: usize = 64;
/// Streams a peer may have open at a time: two for each volume, and some that are ending.
const MAX_STREAMS: u32 = 4096;
/// Streams whose other half has not come, at most.
const MAX_HALF_OPEN: usize = 256;
/// Receive window of one stream: enough for 10 Gb/s over 40 ms.
const STREAM_WINDOW_BYTES: u32 = 48 << 20;
const SEND_WINDOW_BYTES: u64 = 128 << 20;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// Largest datagram that path discovery tries, for jumbo frames and loopback. Not the whole of a
/// jumbo frame, because the library hands the kernel batches of up to ten datagrams, and a batch
/// that exceeds one UDP packet is dropped without an error: the connection would stall at just the
/// speed that fills batches.
const LARGEST_DATAGRAM_BYTES: u16 = 6500;
const LARGEST_BATCH: usize = 10;
const LARGEST_UDP_PAYLOAD_BYTES: usize = 65_507;
const _: () = assert!(LARGEST_BATCH * LARGEST_DATAGRAM_BYTES as usize <= LARGEST_UDP_PAYLOAD_BYTES);

/// A connection was replaced by a newer one of the same peer.
const REPLACED: VarInt = VarInt::from_u32(3);
/// The peer may not connect.
const NOT_WELCOME: VarInt = VarInt::from_u32(4);
/// The node is shutting down.
const CLOSING: VarInt = VarInt::from_u32(0);

/// The node's QUIC endpoint, which both listens and dials.
pub(crate) struct Quic {
    pub(super) registry: Arc<Registry>,
    pub(super) endpoint: Endpoint,
    pub(super) config: Arc<QuicConfig>,
    accepting: AbortHandle,
}

impl Quic {
    pub(crate) fn start(registry: Arc<Registry>, listen: SocketAddr) -> Result<Self, StartError> {
        let tls = registry
            .identity
            .server_config(registry.pins.clone(), ALPN)?;
        let tls = QuicServerConfig::try_from(tls)
            .map_err(|error| TlsError::Unusable(error.to_string()))?;
        let config = Arc::new(quic_config(&registry.timings));
        let mut server = ServerConfig::with_crypto(Arc::new(tls));
        server.transport_config(config.clone()).migration(false);
        server.max_incoming(MAX_HANDSHAKES);
        let transport = TransportKind::Quic;
        let failed = |source| StartError::Listen {
            address: listen,
            transport,
            source,
        };
        let socket = bind(listen).map_err(failed)?;
        let endpoint_config = endpoint_config(&registry.identity);
        let runtime = Arc::new(TokioRuntime);
        let endpoint =
            Endpoint::new(endpoint_config, Some(server), socket, runtime).map_err(failed)?;
        let task = tokio::spawn(accept(registry.clone(), endpoint.clone()));
        Ok(Self {
            registry,
            endpoint,
            config,
            accepting: task.abort_handle(),
        })
    }

    pub(crate) fn local_address(&self) -> SocketAddr {
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        self.endpoint.local_addr().unwrap_or(unknown)
    }

    /// How to connect to the peer with this key.
    pub(super) fn client_config(&self, pin: KeyPin) -> Result<ClientConfig, TlsError> {
        let tls = self.registry.identity.client_config(pin, ALPN)?;
        let tls = QuicClientConfig::try_from(tls)
            .map_err(|error| TlsError::Unusable(error.to_string()))?;
        let mut client = ClientConfig::new(Arc::new(tls));
        client.transport_config(self.config.clone());
        Ok(client)
    }

    pub(crate) async fn close(&self) {
        self.accepting.abort();
        self.endpoint.close(CLOSING, b"closing");
        // Lets the close packets out; a peer that misses them notices by its own means.
        let _ = tokio::time::timeout(Duration::from_millis(300), self.endpoint.wait_idle()).await;
    }

    pub(crate) fn abort(&self) {
        self.accepting.abort();
        self.endpoint.close(CLOSING, b"closing");
    }
}

/// Windows for fast and long links: the library's defaults fit 100 Mb/s over 100 ms.
fn quic_config(timings: &Timings) -> QuicConfig {
    let mut config = QuicConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(LARGEST_DATAGRAM_BYTES);
    let idle = IdleTimeout::try_from(timings.idle_timeout).ok();
    config
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(discovery))
        .ack_frequency_config(Some(AckFrequencyConfig::default()))
        .max_idle_timeout(idle)
        .keep_alive_interval(Some(timings.idle_timeout / 3));
    config
}

/// The key of stateless resets comes from the node's own key: after a restart the node can tell
/// peers at once that their connections are gone, instead of letting them wait.
fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let secret = identity.derived_secret(b"hn4 quic stateless reset");
    let key = ResetKey(hmac::Key::new(hmac::HMAC_SHA256, &secret));
    let mut config = EndpointConfig::new(Arc::new(key));
    // Packets with connection ids that this endpoint does not recognise as its own are dropped
    // without a reset, so those must be recognised after a restart, too.
    let secret = identity.derived_secret(b"hn4 quic connection ids");
    let key = u64::from_le_bytes(std::array::from_fn(|index| secret[index]));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(key)));
    let largest = config
        .max_udp_payload_size(LARGEST_DATAGRAM_BYTES)
        .map(|_| ());
    largest.expect("the largest datagram is a legal one");
    config
}

struct ResetKey(hmac::Key);

impl quinn::crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(hmac::sign(&self.0, data).as_ref());
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), quinn::crypto::CryptoError> {
        hmac::verify(&self.0, data, signature).map_err(|_| quinn::crypto::CryptoError)
    }
}

fn bind(listen: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(listen)?;
    // The system may grant less; that costs speed on fast links, not correctness.
    let reference = socket2::SockRef::from(&socket);
    let receive = reference.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let send = reference.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    if let Err(error) = receive.and(send) {
        tracing::warn!(%error, "cannot enlarge the buffers of the UDP socket");
    }
    Ok(socket)
}

async fn accept(registry: Arc<Registry>, endpoint: Endpoint) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let newest = Arc::new(Mutex::new(HashMap::<String, Connection>::new()));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let (registry, newest) = (registry.clone(), newest.clone());
        tokio::spawn(async move {
            let remote = incoming.remote_address();
            let connected = handshake(&registry, incoming).await;
            drop(permit);
            match connected {
                Ok((connection, name, peer)) => {
                    let old = lock(&newest).insert(name.clone(), connection.clone());
                    if let Some(old) = old {
                        old.close(REPLACED, b"replaced by a newer connection");
                    }
                    serve(&registry, &connection, &name, peer).await;
                    let id = connection.stable_id();
                    let mut newest = lock(&newest);
                    if newest
                        .get(&name)
                        .is_some_and(|newest| newest.stable_id() == id)
                    {
                        newest.remove(&name);
                    }
                }
                Err(why) => tracing::warn!(%remote, %why, "refused a connection"),
            }
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets a connection in, if its key is that of a peer that may dial us.
async fn handshake(
    registry: &Registry,
    incoming: Incoming,
) -> Result<(Connection, String, Accepted), String> {
    let connecting = incoming.accept().map_err(|error| error.to_string())?;
    let connection = tokio::time::timeout(registry.timings.handshake_timeout, connecting)
        .await
        .map_err(|_| "the handshake took too long".to_owned())?
        .map_err(|error| error.to_string())?;
    let refuse = |why: &str| {
        connection.close(NOT_WELCOME, why.as_bytes());
        why.to_owned()
    };
    let pin = peer_pin(&connection).ok_or_else(|| refuse("no certificate"))?;
    let name = registry
        .pins
        .name_of(pin)
        .ok_or_else(|| refuse("the key is not pinned"))?;
    let peer = registry
        .accepted(&name, TransportKind::Quic)
        .map_err(refuse)?;
    Ok((connection, name, peer))
}

fn peer_pin(connection: &Connection) -> Option<KeyPin> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    KeyPin::of_certificate(chain.first()?).ok()
}

/// Takes the streams of an accepted connection until it ends.
async fn serve(registry: &Registry, connection: &Connection, name: &str, peer: Accepted) {
    let remote = connection.remote_address();
    tracing::info!(peer = name, %remote, "connected");
    peer.status.send_replace(LinkStatus::Connected { remote });
    let mut stop = peer.stop.clone();
    let mut preambles = tokio::task::JoinSet::new();
    let mut halves = HashMap::<(u64, hn4::types::VolumeId), (Stream, Both)>::new();
    let why = loop {
        tokio::select! {
            () = stopped(&mut stop) => {
                // Sessions say goodbye on their own; the connection closes with its last stream.
                return;
            }
            accepted = connection.accept_bi() => {
                let mut both = match accepted {
                    Ok(both) => both,
                    Err(error) => break error.to_string(),
                };
                let limit = registry.timings.handshake_timeout;
                preambles.spawn(async move {
                    let read = tokio::time::timeout(limit, Preamble::read(&mut both.1)).await;
                    (read.ok().flatten(), both)
                });
            }
            Some(read) = preambles.join_next(), if !preambles.is_empty() => {
                let Ok((Some(preamble), both)) = read else { continue };
                if !peer.links.contains_key(&preamble.volume) {
                    tracing::warn!(peer = name, volume = %preamble.volume, "volume is not shared");
                    refuse(both);
                    continue;
                }
                let key = (preamble.channel, preamble.volume);
                match halves.remove(&key) {
                    None if halves.len() >= MAX_HALF_OPEN => refuse(both),
                    None => { halves.insert(key, (preamble.stream, both)); }
                    Some((first, _)) if first == preamble.stream => refuse(both),
                    Some((_, other)) => deliver(connection, &peer, preamble, both, other).await,
                }
            }
        }
    };
    tracing::info!(peer = name, %remote, %why, "connection ended");
    let status = &peer.status;
    // A newer connection may have taken over already.
    status.send_if_modified(|status| status.lost(remote, why));
}

fn refuse((mut send, mut receive): Both) {
    // Fails only if the peer has closed the stream meanwhile.
    let _ = send.reset(NOT_SHARED);
    let _ = receive.stop(NOT_SHARED);
}

/// Both streams of a session are here: gives them to its task.
async fn deliver(
    connection: &Connection,
    peer: &Accepted,
    preamble: Preamble,
    this: Both,
    other: Both,
) {
    let (control, data) = if preamble.stream == Stream::Control {
        (this, other)
    } else {
        (other, this)
    };
    let Preamble {
        volume, channel, ..
    } = preamble;
    let Some(links) = peer.links.get(&volume) else {
        return;
    };
    match join(connection, Side::Acceptor, volume, channel, control, data) {
        Ok((link, _)) => {
            // Fails if the volume's task has ended; then there is nobody to talk to.
            let _ = links.send(link).await;
        }
        Err(why) => tracing::warn!(%volume, %why, "cannot join streams"),
    }
}
