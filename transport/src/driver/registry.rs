//! Which peers and volumes there are, and which tasks serve them.
//!
//! The only state that connections share. Locked for moments, never across an await.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hn4::types::VolumeId;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};

use super::backoff::{Backoff, SplitMix64};
use super::link::Link;
use super::session_task::SessionTask;
use super::shelf::Shelf;
use super::{
    Environment, HANDLE_QUEUE, LinkStatus, PeerConfig, PeerHandle, StartError, Timings,
    TransportConfig, TransportKind,
};
use crate::session::{CompressionStatus, Config, LocalState, capability};
use crate::tls::{Identity, PinnedKeys};

/// Where a connection delivers the links of one peer.
pub(crate) type LinkSenders = HashMap<VolumeId, mpsc::Sender<Link>>;

/// What a dialing task works with.
pub(crate) struct Dialer {
    pub(crate) peer: PeerConfig,
    pub(crate) address: String,
    pub(crate) links: LinkSenders,
    pub(crate) status: Arc<watch::Sender<LinkStatus>>,
    pub(crate) stop: watch::Receiver<bool>,
    pub(crate) backoff: Backoff,
    pub(crate) random: u64,
}

/// What an accepted connection works with.
pub(crate) struct Accepted {
    pub(crate) links: LinkSenders,
    pub(crate) status: Arc<watch::Sender<LinkStatus>>,
    pub(crate) stop: watch::Receiver<bool>,
}

struct Peer {
    config: PeerConfig,
    dialed: bool,
    links: LinkSenders,
    status: Arc<watch::Sender<LinkStatus>>,
    stop: watch::Sender<bool>,
    sessions: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    peers: HashMap<String, Peer>,
    volumes: HashMap<VolumeId, watch::Receiver<LocalState>>,
    shelves: HashMap<VolumeId, Shelf>,
    tasks: Vec<AbortHandle>,
    random: Option<SplitMix64>,
    /// How often a peer was added.
    additions: u64,
}

pub(crate) struct Registry {
    node_name: String,
    pub(crate) identity: Identity,
    pub(crate) pins: PinnedKeys,
    pub(crate) timings: Timings,
    session: Config,
    environment: Environment,
    state: Mutex<State>,
}

impl Registry {
    pub(crate) fn new(
        config: TransportConfig,
        volumes: HashMap<VolumeId, watch::Receiver<LocalState>>,
        environment: Environment,
    ) -> Self {
        let random = Some(SplitMix64(environment.seed));
        Self {
            node_name: config.node_name,
            identity: config.identity,
            pins: PinnedKeys::default(),
            timings: config.timings,
            session: config.session,
            environment,
            state: Mutex::new(State {
                volumes,
                random,
                ..State::default()
            }),
        }
    }

    pub(crate) fn node_name(&self) -> &str {
        &self.node_name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add_volume(&self, volume: VolumeId, states: watch::Receiver<LocalState>) {
        self.state().volumes.insert(volume, states);
    }

    /// Adds a peer and spawns its sessions' tasks. The second part is for the one who dials.
    pub(crate) fn add_peer(
        &self,
        config: PeerConfig,
        dial: bool,
    ) -> Result<(Vec<PeerHandle>, Option<Dialer>), StartError> {
        crate::pki::check_name(&config.name)?;
        let mut state = self.state();
        self.check_peer(&state, &config, dial)?;
        let first = if dial {
            LinkStatus::Connecting
        } else {
            LinkStatus::Listening
        };
        let status = Arc::new(watch::Sender::new(first));
        let stop = watch::Sender::new(false);
        let (mut links, mut handles, mut sessions) = (HashMap::new(), Vec::new(), Vec::new());
        state.additions += 1;
        // No session has the name of one of a peer that was removed.
        let last_id = state.additions << 32;
        for (volume, roles) in &config.volumes {
            let Some(states) = state.volumes.get(volume).cloned() else {
                continue;
            };
            let session = Config {
                peer_roles: *roles,
                capabilities: capability::offered(config.compressed.contains(volume)),
                ..self.session.clone()
            };
            let shelf = state.shelves.entry(*volume).or_default().clone();
            let named = (config.name.as_str(), *volume, last_id);
            let (links_in, handle, task) =
                self.session(named, session, states, shelf, &status, &stop);
            sessions.push(tokio::spawn(task.run()));
            links.insert(*volume, links_in);
            handles.push(handle);
        }
        self.pins.insert(config.key_pin, &config.name);
        let mut seed = || state.random.as_mut().map_or(0, SplitMix64::next);
        let (seed_a, seed_b) = (seed(), seed());
        let dialer = config
            .address
            .clone()
            .filter(|_| dial)
            .map(|address| Dialer {
                peer: config.clone(),
                address,
                links: links.clone(),
                status: status.clone(),
                stop: stop.subscribe(),
                backoff: self.backoff(seed_a),
                random: seed_b,
            });
        let name = config.name.clone();
        let peer = Peer {
            config,
            dialed: dial,
            links,
            status,
            stop,
            sessions,
        };
        state.peers.insert(name, peer);
        Ok((handles, dialer))
    }

    /// Makes the task of a volume and a peer, and what others hold of it.
    fn session(
        &self,
        (peer, volume, last_id): (&str, VolumeId, u64),
        config: Config,
        states: watch::Receiver<LocalState>,
        shelf: Shelf,
        status: &watch::Sender<LinkStatus>,
        stop: &watch::Sender<bool>,
    ) -> (mpsc::Sender<Link>, PeerHandle, SessionTask) {
        let (links_in, links) = mpsc::channel(1);
        let (to, to_end) = mpsc::channel(HANDLE_QUEUE);
        let (from_end, from) = mpsc::channel(HANDLE_QUEUE);
        let (compression, compression_end) = watch::channel(CompressionStatus::default());
        let task = SessionTask {
            config,
            clock: self.environment.clock.clone(),
            states,
            links,
            to: to_end,
            from: from_end,
            stop: stop.subscribe(),
            shelf,
            compression,
            last_id,
        };
        let link = status.subscribe();
        let handle = PeerHandle {
            peer: peer.to_owned(),
            volume,
            to,
            from,
            link,
            compression: compression_end,
        };
        (links_in, handle, task)
    }

    fn check_peer(&self, state: &State, config: &PeerConfig, dial: bool) -> Result<(), StartError> {
        let fail = |what: String| {
            Err(StartError::Peer {
                peer: config.name.clone(),
                what,
            })
        };
        if config.name == self.node_name {
            return fail(
                "this node itself has that name; peers need names of their own".to_owned(),
            );
        }
        if state.peers.contains_key(&config.name) {
            return fail("there is a peer of that name already; remove it first".to_owned());
        }
        if config.key_pin == self.identity.pin() {
            return fail("its key_pin is this node's own key".to_owned());
        }
        if let Some(other) = self.pins.name_of(config.key_pin) {
            return fail(format!("its key_pin belongs to peer \"{other}\" already"));
        }
        if dial && config.address.is_none() {
            let node = &self.node_name;
            return fail(format!(
                "\"{node}\" dials it, because its own name is smaller; give an address"
            ));
        }
        for (index, (volume, _)) in config.volumes.iter().enumerate() {
            if !state.volumes.contains_key(volume) {
                return fail(format!("volume {volume} is not known on this node"));
            }
            if config
                .volumes
                .iter()
                .take(index)
                .any(|(earlier, _)| earlier == volume)
            {
                return fail(format!("volume {volume} is listed twice"));
            }
        }
        Ok(())
    }

    pub(crate) fn backoff(&self, seed: u64) -> Backoff {
        Backoff::new(
            self.timings.first_backoff,
            self.timings.longest_backoff,
            seed,
        )
    }

    /// What a connection from this peer may use; the reason if it may not connect.
    pub(crate) fn accepted(
        &self,
        name: &str,
        transport: TransportKind,
    ) -> Result<Accepted, &'static str> {
        let state = self.state();
        let peer = state.peers.get(name).ok_or("the peer was removed")?;
        if peer.dialed {
            return Err("of two nodes, the one with the smaller name dials");
        }
        if peer.config.transport != transport {
            return Err("the peer is configured with another transport");
        }
        Ok(Accepted {
            links: peer.links.clone(),
            status: peer.status.clone(),
            stop: peer.stop.subscribe(),
        })
    }

    pub(crate) fn own_task(&self, task: AbortHandle) {
        let mut state = self.state();
        state.tasks.retain(|task| !task.is_finished());
        state.tasks.push(task);
    }

    pub(crate) fn remove_peer(&self, name: &str) -> bool {
        let Some(peer) = self.state().peers.remove(name) else {
            return false;
        };
        self.pins.remove(peer.config.key_pin);
        peer.stop.send_replace(true);
        true
    }

    /// Stops all sessions and waits for them, for no longer than `limit`.
    pub(crate) async fn stop_all(&self, limit: Duration) {
        let peers: Vec<_> = self.state().peers.drain().map(|(_, peer)| peer).collect();
        for peer in &peers {
            self.pins.remove(peer.config.key_pin);
            peer.stop.send_replace(true);
        }
        let all = async {
            for session in peers.into_iter().flat_map(|peer| peer.sessions) {
                // A task that panicked has stopped as well.
                let _ = session.await;
            }
        };
        if tokio::time::timeout(limit, all).await.is_err() {
            tracing::warn!("some sessions did not end in time");
        }
    }

    pub(crate) fn abort_all(&self) {
        let mut state = self.state();
        for task in state.tasks.drain(..) {
            task.abort();
        }
        for peer in state.peers.values() {
            for session in &peer.sessions {
                session.abort();
            }
        }
    }
}
