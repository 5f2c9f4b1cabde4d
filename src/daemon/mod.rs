//! The daemon: opens the volumes of a configuration, connects them with their peers, answers the
//! control socket, and stops in order.
//!
//! Each volume has a shard, which is a thread with a ring and knows nothing of this, and a task
//! here that carries messages. Everything here runs on one tokio thread; no client data passes
//! through it except what goes to or comes from peers.

mod mesh;
pub mod proof;
mod requests;
mod seats;
mod translate;
mod tree;
mod volume;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hn4::log::LogIdentity;
use hn4::types::VolumeId;
use hn4_engine::core::{VerifyReads, VolumeConfig};
use hn4_engine::device::DeviceOptions;
use hn4_engine::shard::{self, ShardSetup, TreeFeed};
use hn4_transport::driver::{Environment, Timings, Transport, TransportConfig};
use hn4_transport::session::{self, LocalState};
use hn4_transport::tls::Identity;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use self::mesh::{Member, Mesh, Reload};
use self::proof::local::LocalLedger;
use self::proof::{ProofHandle, ProofSetup};
use self::requests::Node;
pub(crate) use self::tree::survey::forget_tree;
use self::tree::{ToTree, TreeHandle, TreeSetup};
use self::volume::{Ask, Ended, OpenVolume, VolumeTask};
use crate::config::attach;
use crate::config::identities::Identities;
use crate::config::keys;
use crate::config::state::{NodeState, random_bytes};
use crate::config::{Apply, Config, TransportSection, VolumeSection};
use crate::control::server::ControlServer;

/// How long a start waits for the devices of a killed predecessor.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// Requests of the control socket on their way.
const REQUESTS: usize = 64;

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// If it cannot start, or a volume could not go on; the error says what to do.
pub fn run(config: &Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: &Config) -> Result<()> {
    let started = Instant::now();
    let state = NodeState::open_or_create(&config.node.state_dir)?;
    // Taken first: another daemon with this configuration has it.
    let control = ControlServer::bind(&config.node.control_socket)?;
    let mut open = Vec::new();
    let mut states = HashMap::new();
    let identities = Arc::new(Identities::open(state.directory())?);
    for section in &config.volumes {
        let (volume, receiver) = open_volume(section, &state, &identities).await?;
        states.insert(volume.identity.volume, receiver);
        open.push(volume);
    }
    let transport = match &config.transport {
        Some(section) => Some(start_transport(config, section, states).await?),
        None => None,
    };
    let (reloads, wishes) = mpsc::channel(REQUESTS);
    let mut tasks = JoinSet::new();
    let mut node = Node::new(config, state.node_id, started, reloads.clone());
    let mut members = HashMap::new();
    for (section, volume) in config.volumes.iter().zip(open) {
        let (asks, queue) = mpsc::channel(REQUESTS);
        let member = Member::new(volume.identity.volume, &asks);
        members.insert(section.name.clone(), member);
        let task = VolumeTask::new(volume, section, queue);
        node.add(task.section(), asks);
        tasks.spawn(task.run());
    }
    node.resume_rotation();
    let mesh = Mesh::start(config.clone(), members, transport).await?;
    let mesh = tokio::spawn(mesh.run(wishes));
    let (requests, mut queue) = mpsc::channel(REQUESTS);
    let mut server = tokio::spawn(control.serve(requests));
    let mut signals = Signals::new()?;
    notify_ready();
    let result = loop {
        tokio::select! {
            Some((request, reply)) = queue.recv() => node.answer(request, reply),
            Some(ended) = tasks.join_next() => {
                break ended.context("a task panicked")?.map(drop);
            }
            ended = &mut server => {
                break ended.context("the control socket panicked");
            }
            told = signals.next() => match told {
                Told::Reload => {
                    let reload = Reload { accept_fewer_copies: false, reply: None };
                    // If so many wait already, one of them will see the present file.
                    let _ = reloads.try_send(reload);
                }
                Told::End => break Ok(()),
            },
        }
    };
    let stop = async {
        stop_volumes(config, &state, &node, &mut tasks).await;
        // Nobody can ask for other peers any more, so the mesh ends.
        drop((node, reloads));
        if let Ok(Some(transport)) = mesh.await {
            transport.shutdown().await;
        }
    };
    tokio::select! {
        () = stop => {}
        // A second signal: recovery covers what is left.
        () = signals.end() => tracing::warn!("stopped at once by a second signal"),
    }
    server.abort();
    // The socket's file would only mislead; whoever starts next removes it too.
    let _ = std::fs::remove_file(&config.node.control_socket);
    result
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    Reload,
    End,
}

/// What the system may tell the daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::End,
            _ = self.interrupt.recv() => Told::End,
            _ = self.hangup.recv() => Told::Reload,
        }
    }

    /// Waits for one that asks it to end.
    async fn end(&mut self) {
        while self.next().await != Told::End {}
    }
}

async fn stop_volumes(
    config: &Config,
    state: &NodeState,
    node: &Node,
    tasks: &mut JoinSet<Result<Ended>>,
) {
    tracing::info!("stopping: the log is flushed, the overlay written back");
    for (section, asks) in config.volumes.iter().zip(node.asks()) {
        let drain_ms = section.stop_drain_ms();
        // Fails if the volume has ended already.
        let _ = asks.send(Ask::Stop { drain_ms }).await;
    }
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(Ok(ended)) => {
                let section = config.volume(&ended.name).filter(|_| ended.clean);
                let noted = section.map(|section| attach::end(state, section, &ended.identity));
                if let Some(Err(error)) = noted {
                    tracing::error!("{error:#}");
                }
            }
            Ok(Err(error)) => tracing::error!("{error:#}"),
            Err(error) => tracing::error!("a task panicked: {error}"),
        }
    }
}

/// Another daemon may be on its way out.
fn patient(options: DeviceOptions) -> DeviceOptions {
    DeviceOptions {
        lock_patience: LOCK_PATIENCE,
        ..options
    }
}

async fn open_volume(
    section: &VolumeSection,
    state: &NodeState,
    identities: &Arc<Identities>,
) -> Result<(OpenVolume, watch::Receiver<LocalState>)> {
    let node = state.node_id;
    // Before anything is written: is this the log that belongs to this backing?
    let identity = attach::begin(state, section, LOCK_PATIENCE)
        .with_context(|| format!("volume {}", section.name))?;
    let policies = section.clone();
    let wake = Arc::new(Notify::new());
    let bell = Arc::clone(&wake);
    let (tell, told) = std::sync::mpsc::channel();
    let setup = ShardSetup {
        name: section.name.clone(),
        expect: Some(identity.volume),
        log: section.log.clone(),
        backing: section.backing.clone(),
        log_options: patient(section.log_options()),
        backing_options: patient(section.backing_options()),
        overlay_bytes: section.overlay_bytes(),
        fork_folder: Some(state.directory().to_owned()),
        fork_space_bytes: section.fork_space_mib << 20,
        shadow: section.shadow_path(state.directory()),
        configure: Box::new(move |header, slots| {
            let mut config = VolumeConfig::new(header.identity, node, header.ring_bytes, slots);
            config.lanes.count = header.lanes;
            config.lanes.stripe_blocks = header.stripe_blocks;
            policies.apply(&mut config);
            // The receiver waits below.
            let _ = tell.send((config, header.ring_bytes));
            config
        }),
        listen: section.listen.clone(),
        threads: section.threads,
        cpu: section.cpu,
    };
    let mut shard = shard::spawn(setup, Arc::new(move || bell.notify_one()))
        .with_context(|| format!("volume {}", section.name))?;
    let (config, log_bytes) = told
        .recv()
        .context("the shard opened without its configuration")?;
    let (status, identity, early) = OpenVolume::first_state(&mut shard, &wake).await?;
    let max_epoch_bytes = config.max_epoch_blocks as u64 * hn4::types::BLOCK_BYTES;
    let proof = section
        .proof
        .then(|| start_prover(section, state, log_bytes, &identity));
    let proof = proof.transpose()?;
    let proves = proof.is_some();
    let tree = section
        .tree
        .then(|| start_tree(section, state, &identity, early));
    let tree = tree.transpose()?;
    let local = LocalState {
        compares: tree.is_some(),
        repairs: tree.is_some(),
        resyncs: tree.is_some() && status.may_keep(),
        ..translate::local_state(&identity, node, max_epoch_bytes, proves, &status)
    };
    let (sender, receiver) = watch::channel(local);
    tracing::info!(
        volume = %section.name, id = %identity.volume, role = ?status.role,
        term = %status.term, tip = %status.tip.epoch, "open"
    );
    let volume = OpenVolume {
        name: section.name.clone(),
        shard,
        wake,
        identity,
        node,
        identities: Arc::clone(identities),
        max_epoch_bytes,
        status,
        state: sender,
        proof,
        tree,
    };
    Ok((volume, receiver))
}

/// `early` is what the shard has said to it already.
fn start_tree(
    section: &VolumeSection,
    state: &NodeState,
    identity: &LogIdentity,
    early: Vec<TreeFeed>,
) -> Result<TreeHandle> {
    let setup = TreeSetup {
        name: section.name.clone(),
        state_dir: state.directory().to_owned(),
        backing: section.backing.clone(),
        identity: *identity,
        node: state.node_id,
        ledger: LocalLedger {
            state_dir: state.directory().to_owned(),
            algorithms: section.algorithms(),
        },
        rate: section.scan_mib_per_s << 20,
        verify_interval_h: section.verify_interval_h,
        checks_reads: section.verify_reads != VerifyReads::Off,
    };
    let name = &section.name;
    let tree = tree::start(setup);
    let tree = tree.with_context(|| format!("volume {name}: the state tree's thread"))?;
    let early = early.into_iter().map(ToTree::Feed);
    early.for_each(|message| tree.send(message));
    Ok(tree)
}

fn start_prover(
    section: &VolumeSection,
    state: &NodeState,
    log_bytes: u64,
    identity: &LogIdentity,
) -> Result<ProofHandle> {
    let setup = ProofSetup {
        name: section.name.clone(),
        state_dir: state.directory().to_owned(),
        identity: *identity,
        node: state.node_id,
        keys: keys::node_keys(state.directory(), &section.algorithms())?,
        required: section.required_signatures(),
        batch_age: Duration::from_millis(section.proof_batch_ms),
        checkpoint_age: Duration::from_secs(section.checkpoint_s),
        log_bytes,
        overlay_bytes: section.overlay_bytes(),
        gate: section.apply == Apply::Proven,
    };
    let name = &section.name;
    proof::start(setup).with_context(|| format!("volume {name}: the prover's thread"))
}

async fn start_transport(
    config: &Config,
    section: &TransportSection,
    states: HashMap<VolumeId, watch::Receiver<LocalState>>,
) -> Result<Transport> {
    let identity = Identity::from_files(&section.certificate, &section.key, &section.ca)?;
    tracing::info!(listen = %section.listen, pin = %identity.pin(), "transport");
    let transport = TransportConfig {
        listen: section.listen,
        node_name: config.node.name.clone(),
        identity,
        session: session::Config::default(),
        timings: Timings::default(),
    };
    let seed = random_bytes()?;
    let seed = u64::from_le_bytes(std::array::from_fn(|index| seed[index]));
    Ok(Transport::start(transport, states, Environment::system(seed)).await?)
}

/// Tells systemd that clients can be served.
fn notify_ready() {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
}
