//! Dials a peer, one WebSocket for each volume, again and again.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;

use hn4::types::VolumeId;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::select;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite;
use tokio_tungstenite::tungstenite::http::StatusCode;

use super::listen::Wss;
use super::{ALPN, path, pump, web_socket_config};
use crate::driver::backoff::Backoff;
use crate::driver::link::{Link, SessionEnd};
use crate::driver::registry::{Dialer, Registry};
use crate::driver::{LinkStatus, stopped};
use crate::tls::{Side, session_keys};

impl Wss {
    /// The task that keeps the connections to a peer.
    pub(crate) fn dialer(&self, dialer: Dialer) -> impl Future<Output = ()> + Send + use<> {
        let client = self
            .registry
            .identity
            .client_config(dialer.peer.key_pin, ALPN);
        let registry = self.registry.clone();
        async move {
            match client {
                Ok(client) => dial_all(&registry, Arc::new(client), dialer).await,
                Err(error) => {
                    let why = error.to_string();
                    dialer.status.send_replace(LinkStatus::Failed { why });
                }
            }
        }
    }
}

/// What the connections of all volumes of a peer have in common.
struct Target {
    name: String,
    address: String,
    client: Arc<ClientConfig>,
    status: Arc<watch::Sender<LinkStatus>>,
    limit: std::time::Duration,
}

async fn dial_all(registry: &Registry, client: Arc<ClientConfig>, mut dialer: Dialer) {
    let target = Arc::new(Target {
        client,
        name: dialer.peer.name.clone(),
        address: dialer.address.clone(),
        status: dialer.status.clone(),
        limit: registry.timings.handshake_timeout,
    });
    let mut volumes = JoinSet::new();
    for (volume, links) in dialer.links.drain() {
        dialer.random = dialer.random.wrapping_add(1);
        let backoff = registry.backoff(dialer.random);
        volumes.spawn(dial_volume(target.clone(), volume, links, backoff));
    }
    // The volumes' tasks are dropped with the set; sessions say goodbye on their own.
    stopped(&mut dialer.stop).await;
}

async fn dial_volume(
    target: Arc<Target>,
    volume: VolumeId,
    links: mpsc::Sender<Link>,
    mut backoff: Backoff,
) {
    loop {
        let attempt = tokio::time::timeout(target.limit, connect(&target, volume)).await;
        let attempt = attempt.unwrap_or_else(|_| Err("no answer in time".to_owned()));
        let wait = match attempt {
            Ok((link, ended, remote)) => {
                target.status.send_replace(LinkStatus::Connected { remote });
                if links.send(link).await.is_err() {
                    return;
                }
                let Ok(end) = ended.await else { return };
                let why = "the session ended".to_owned();
                target
                    .status
                    .send_if_modified(|status| status.lost(remote, why));
                if end.was_refused {
                    backoff.longest_wait()
                } else {
                    if end.was_established {
                        backoff.reset();
                    }
                    backoff.next_wait()
                }
            }
            Err(why) => {
                let wait = backoff.next_wait();
                let (peer, address) = (&target.name, &target.address);
                tracing::warn!(peer, address, %volume, %why, ?wait, "not connected");
                target.status.send_replace(LinkStatus::Failed { why });
                wait
            }
        };
        select! {
            () = tokio::time::sleep(wait) => {}
            () = links.closed() => return,
        }
    }
}

async fn connect(
    target: &Target,
    volume: VolumeId,
) -> Result<(Link, oneshot::Receiver<SessionEnd>, SocketAddr), String> {
    let address = &target.address;
    let socket = TcpStream::connect(address)
        .await
        .map_err(|error| format!("cannot connect to {address}: {error}"))?;
    // Latency matters more than full packets; the pump writes in large pieces anyway.
    socket
        .set_nodelay(true)
        .map_err(|error| error.to_string())?;
    let remote = socket.peer_addr().map_err(|error| error.to_string())?;
    let name = ServerName::try_from(target.name.clone()).map_err(|error| error.to_string())?;
    let connector = TlsConnector::from(target.client.clone());
    let tls = connector
        .connect(name, socket)
        .await
        .map_err(|error| error.to_string())?;
    let connection = tls.get_ref().1;
    let keys = session_keys(Side::Dialer, volume, 0, |key, label, context| {
        connection
            .export_keying_material(key, label, Some(context))
            .map(|_| ())
    })
    .map_err(|error| error.to_string())?;
    let url = format!("wss://{}{}", target.name, path(volume));
    let config = Some(web_socket_config());
    match tokio_tungstenite::client_async_with_config(url, tls, config).await {
        Ok((socket, _)) => {
            let (link, ended) = pump::start(socket, keys);
            Ok((link, ended, remote))
        }
        Err(tungstenite::Error::Http(response)) if response.status() == StatusCode::NOT_FOUND => {
            let (link, ended) = pump::not_shared(keys);
            Ok((link, ended, remote))
        }
        Err(error) => Err(error.to_string()),
    }
}
