//! The TCP listener, and connections that come in.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::StatusCode;

use super::{ALPN, pump, volume_of, web_socket_config};
use crate::driver::registry::{Accepted, Registry};
use crate::driver::{LinkStatus, StartError, TransportKind, stopped};
use crate::tls::{KeyPin, Side, session_keys};

/// Handshakes at a time; more wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 64;

/// The node's WebSocket listener.
pub(crate) struct Wss {
    pub(super) registry: Arc<Registry>,
    accepting: AbortHandle,
}

impl Wss {
    pub(crate) async fn start(
        registry: Arc<Registry>,
        listen: SocketAddr,
    ) -> Result<Self, StartError> {
        let tls = registry
            .identity
            .server_config(registry.pins.clone(), ALPN)?;
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let transport = TransportKind::Wss;
        let listener = TcpListener::bind(listen)
            .await
            .map_err(|source| StartError::Listen {
                address: listen,
                transport,
                source,
            })?;
        let task = tokio::spawn(accept(registry.clone(), listener, acceptor));
        Ok(Self {
            registry,
            accepting: task.abort_handle(),
        })
    }

    pub(crate) fn close(&self) {
        self.accepting.abort();
    }
}

async fn accept(registry: Arc<Registry>, listener: TcpListener, acceptor: TlsAcceptor) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Ok(permit) = handshakes.clone().acquire_owned().await {
        let (socket, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, usually: some must be closed first.
                tracing::warn!(%error, "cannot accept a TCP connection");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (registry, acceptor) = (registry.clone(), acceptor.clone());
        tokio::spawn(async move {
            let limit = registry.timings.handshake_timeout;
            let served = serve(&registry, &acceptor, socket, remote);
            let why = match tokio::time::timeout(limit, served).await {
                Ok(Ok(())) => return,
                Ok(Err(why)) => why,
                Err(_) => "the handshake took too long".to_owned(),
            };
            drop(permit);
            tracing::warn!(%remote, %why, "refused a connection");
        });
    }
}

/// Lets a connection in, if its key is that of a peer that may dial us, and gives its link to the
/// task of the volume it asks for.
async fn serve(
    registry: &Registry,
    acceptor: &TlsAcceptor,
    socket: TcpStream,
    remote: SocketAddr,
) -> Result<(), String> {
    // Latency matters more than full packets; the pump writes in large pieces anyway.
    socket
        .set_nodelay(true)
        .map_err(|error| error.to_string())?;
    let tls = acceptor
        .accept(socket)
        .await
        .map_err(|error| error.to_string())?;
    let connection = tls.get_ref().1;
    let pin = connection
        .peer_certificates()
        .and_then(peer_pin)
        .ok_or("no certificate")?;
    let name = registry.pins.name_of(pin).ok_or("the key is not pinned")?;
    let peer = registry.accepted(&name, TransportKind::Wss)?;
    // The keys are needed before the stream is handed over, the volume is known only after.
    let mut volume = None;
    let exporter_keys = |volume| {
        session_keys(Side::Acceptor, volume, 0, |key, label, context| {
            connection
                .export_keying_material(key, label, Some(context))
                .map(|_| ())
        })
    };
    let keys: Result<Vec<_>, _> = peer
        .links
        .keys()
        .map(|&volume| exporter_keys(volume).map(|keys| (volume, keys)))
        .collect();
    let keys = keys.map_err(|error| error.to_string())?;
    #[expect(
        clippy::result_large_err,
        reason = "the library says what the callback returns"
    )]
    let check = |request: &Request, response: Response| {
        volume = volume_of(request.uri().path()).filter(|id| peer.links.contains_key(id));
        if volume.is_some() {
            Ok(response)
        } else {
            Err(not_found())
        }
    };
    let config = Some(web_socket_config());
    let upgraded = tokio_tungstenite::accept_hdr_async_with_config(tls, check, config).await;
    let socket = upgraded.map_err(|error| format!("peer {name}: {error}"))?;
    let found = volume.and_then(|volume| keys.into_iter().find(|(id, _)| *id == volume));
    let (volume, keys) = found.ok_or("a volume that is not shared")?;
    tracing::info!(peer = name, %volume, %remote, "connected");
    peer.status.send_replace(LinkStatus::Connected { remote });
    let (link, ended) = pump::start(socket, keys);
    let Some(links) = peer.links.get(&volume) else {
        return Ok(());
    };
    links
        .send(link)
        .await
        .map_err(|_| "the volume's task has ended")?;
    tokio::spawn(watch_end(peer, remote, ended));
    Ok(())
}

async fn watch_end(
    peer: Accepted,
    remote: SocketAddr,
    ended: tokio::sync::oneshot::Receiver<crate::driver::link::SessionEnd>,
) {
    let mut stop = peer.stop.clone();
    tokio::select! {
        _ = ended => {}
        () = stopped(&mut stop) => {}
    }
    let why = "the session ended; the peer will dial again".to_owned();
    peer.status
        .send_if_modified(|status| status.lost(remote, why));
}

fn peer_pin(chain: &[CertificateDer<'_>]) -> Option<KeyPin> {
    KeyPin::of_certificate(chain.first()?).ok()
}

fn not_found() -> ErrorResponse {
    let mut response = ErrorResponse::new(None);
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}
