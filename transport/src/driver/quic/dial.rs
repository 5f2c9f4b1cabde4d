//! Dials a peer, again and again, and opens the streams of each volume on the connection.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;

use hn4::types::VolumeId;
use quinn::{ClientConfig, Connection, Endpoint, VarInt};
use tokio::select;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::endpoint::Quic;
use super::stream::open;
use crate::driver::backoff::Backoff;
use crate::driver::link::Link;
use crate::driver::registry::{Dialer, Registry};
use crate::driver::{LinkStatus, stopped};

/// A session found the peer silent.
const SILENT: VarInt = VarInt::from_u32(5);

impl Quic {
    /// The task that keeps a connection to a peer.
    pub(crate) fn dialer(&self, dialer: Dialer) -> impl Future<Output = ()> + Send + use<> {
        let client = self.client_config(dialer.peer.key_pin);
        let (registry, endpoint) = (self.registry.clone(), self.endpoint.clone());
        async move {
            match client {
                Ok(client) => dial(registry, endpoint, client, dialer).await,
                Err(error) => {
                    let why = error.to_string();
                    dialer.status.send_replace(LinkStatus::Failed { why });
                }
            }
        }
    }
}

async fn dial(
    registry: Arc<Registry>,
    endpoint: Endpoint,
    client: ClientConfig,
    mut dialer: Dialer,
) {
    let name = dialer.peer.name.clone();
    let mut stop = dialer.stop.clone();
    loop {
        let attempt = connect(&registry, &endpoint, &client, &dialer);
        let connected = select! {
            connected = attempt => connected,
            () = stopped(&mut stop) => return,
        };
        let why = match connected {
            Ok(connection) => {
                let remote = connection.remote_address();
                tracing::info!(peer = name, %remote, "connected");
                dialer.status.send_replace(LinkStatus::Connected { remote });
                let (why, went_well) = keep(&registry, &connection, &mut dialer).await;
                if went_well {
                    dialer.backoff.reset();
                }
                why
            }
            Err(why) => why,
        };
        if *stop.borrow() {
            return;
        }
        let wait = dialer.backoff.next_wait();
        tracing::warn!(peer = name, address = dialer.address, %why, ?wait, "not connected");
        dialer.status.send_replace(LinkStatus::Failed { why });
        select! {
            () = tokio::time::sleep(wait) => {}
            () = stopped(&mut stop) => return,
        }
    }
}

async fn connect(
    registry: &Registry,
    endpoint: &Endpoint,
    client: &ClientConfig,
    dialer: &Dialer,
) -> Result<Connection, String> {
    let limit = registry.timings.handshake_timeout;
    let attempt = async {
        let local = endpoint.local_addr().map_err(|error| error.to_string())?;
        let remote = resolve(&dialer.address, local).await?;
        endpoint
            .connect_with(client.clone(), remote, &dialer.peer.name)
            .map_err(|error| error.to_string())?
            .await
            .map_err(|error| error.to_string())
    };
    tokio::time::timeout(limit, attempt)
        .await
        .unwrap_or_else(|_| Err("no answer to the handshake in time".to_owned()))
}

/// The first address of a name that the local socket can reach.
async fn resolve(address: &str, local: SocketAddr) -> Result<SocketAddr, String> {
    let mut all = tokio::net::lookup_host(address)
        .await
        .map_err(|error| format!("cannot resolve \"{address}\": {error}"))?;
    all.find(|remote| remote.is_ipv4() == local.is_ipv4())
        .ok_or_else(|| format!("\"{address}\" has no address that {local} can reach"))
}

/// Runs the sessions of all volumes on a connection until it ends. Tells why it ended, and whether
/// any session came about.
async fn keep(registry: &Registry, connection: &Connection, dialer: &mut Dialer) -> (String, bool) {
    let mut volumes = JoinSet::new();
    for (volume, links) in &dialer.links {
        dialer.random = dialer.random.wrapping_add(1);
        let backoff = registry.backoff(dialer.random);
        volumes.spawn(keep_volume(
            connection.clone(),
            *volume,
            links.clone(),
            backoff,
        ));
    }
    let mut stop = dialer.stop.clone();
    let mut went_well = false;
    loop {
        select! {
            error = connection.closed() => {
                // Their last sessions' tasks end by themselves, now that the connection is gone.
                while let Some(ended) = volumes.join_next().await {
                    went_well |= ended.unwrap_or(false);
                }
                return (error.to_string(), went_well);
            }
            () = stopped(&mut stop) => {
                return ("stopped".to_owned(), went_well);
            }
            Some(ended) = volumes.join_next(), if !volumes.is_empty() => {
                went_well |= ended.unwrap_or(false);
            }
        }
    }
}

/// Opens session after session for one volume. True if any came about.
async fn keep_volume(
    connection: Connection,
    volume: VolumeId,
    links: mpsc::Sender<Link>,
    mut backoff: Backoff,
) -> bool {
    let mut went_well = false;
    while connection.close_reason().is_none() {
        let Ok((link, ended)) = open(&connection, volume).await else {
            break;
        };
        if links.send(link).await.is_err() {
            break;
        }
        let Ok(end) = ended.await else { break };
        went_well |= end.was_established;
        if end.was_silent {
            connection.close(SILENT, b"no sign of life");
            break;
        }
        let wait = if end.was_refused {
            backoff.longest_wait()
        } else {
            if end.was_established {
                backoff.reset();
            }
            backoff.next_wait()
        };
        select! {
            () = tokio::time::sleep(wait) => {}
            _ = connection.closed() => {}
        }
    }
    went_well
}
