//! Real daemons as child processes: up to three nodes on loopback with everything they need in one
//! directory. The quickstart and the end-to-end tests stand on it.
//!
//! **Invariant:** a daemon does not outlive its `Daemon`, nor the thread that started it.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hn4_engine::nbd::client::{Address, Client, ClientOptions};
use hn4_transport::pki;
use hn4_transport::tls::KeyPin;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cli::token::IdentityToken;
use crate::cli::volume::{CreateOptions, Purpose, create_volume};
use crate::config::Config;
use crate::config::state::NodeState;
use crate::control::Request;
use crate::control::api::{NodeStatus, Response, VolumeReport, VolumeState};
use crate::control::client::ControlClient;

/// Between two looks at something that is waited for.
const LOOK: Duration = Duration::from_millis(5);
/// A daemon that does not serve by then never will.
pub const START_LIMIT: Duration = Duration::from_secs(30);

/// Names of the nodes. Of two the earlier one dials.
pub const NODES: [&str; 3] = ["alpha", "beta", "gamma"];

/// What nodes are made with.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Size of the volume.
    pub size_mib: u64,
    /// Size of each log.
    pub log_mib: u64,
    /// Overlay of each node.
    pub overlay_mib: u64,
    /// 512 or 4096.
    pub sector_bytes: u32,
    /// Lanes of each log.
    pub lanes: u16,
    /// Further lines of the volume's section: acknowledgements, ages, delays.
    pub policy: String,
    /// `quic` or `wss`.
    pub transport: &'static str,
    /// No second node.
    pub alone: bool,
    /// How many nodes there are if it is not alone, 2 or 3.
    pub nodes: usize,
    /// Logs and backings are there already, below the nodes' folders.
    pub existing: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            size_mib: 64,
            log_mib: 48,
            overlay_mib: 32,
            sector_bytes: 512,
            lanes: 1,
            policy: "ack = \"durable\"\nack_peers = 1\n".to_owned(),
            transport: "quic",
            alone: false,
            nodes: 2,
            existing: false,
        }
    }
}

/// The name of the only volume.
pub const VOLUME: &str = "vol0";

/// A node: its files, and its daemon if it runs.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// The folder that holds all of it.
    pub folder: PathBuf,
    program: PathBuf,
    variables: Vec<(String, String)>,
    nbd: Address,
    daemon: Option<Daemon>,
}

/// A running daemon. Killed when dropped.
#[derive(Debug)]
struct Daemon {
    child: Child,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes the files of one to three nodes below a folder: certificates, configurations, volumes.
///
/// # Errors
/// If something cannot be made, most likely because the file system cannot do direct writes or a
/// flush on it is worth nothing.
pub fn make_nodes(folder: &Path, program: &Path, plan: &Plan) -> Result<Vec<Node>> {
    let count = if plan.alone { 1 } else { plan.nodes };
    let names = NODES
        .get(..count)
        .context("there are names for three nodes")?;
    let authority = pki::init_authority()?;
    let mut pins = Vec::new();
    let mut ports = Vec::new();
    for name in names {
        let place = folder.join(name);
        std::fs::create_dir_all(&place).with_context(|| format!("making {}", place.display()))?;
        let issued = pki::issue_node(&authority.key_pem, name)?;
        pki::write_certificate(&place.join("ca.pem"), &authority.certificate_pem)?;
        pki::write_certificate(&place.join("node.pem"), &issued.certificate_pem)?;
        pki::write_secret(&place.join("node.key"), &issued.key_pem)?;
        pins.push(issued.pin);
        ports.push(free_port()?);
    }
    let mut nodes = Vec::new();
    let mut identity = None;
    for (index, name) in names.iter().enumerate() {
        let node = Node::existing(name, &folder.join(name), program);
        let text = configuration(plan, index, &pins, &ports);
        std::fs::write(node.config(), text).context("writing a configuration")?;
        identity = Some(node.create_volume(plan, identity)?);
        nodes.push(node);
    }
    Ok(nodes)
}

fn configuration(plan: &Plan, index: usize, pins: &[KeyPin], ports: &[u16]) -> String {
    let mut text = format!(
        "[node]\nname = \"{}\"\nstate_dir = \"state\"\ncontrol_socket = \"ctl.sock\"\n\n\
         [transport]\nlisten = \"127.0.0.1:{}\"\ncertificate = \"node.pem\"\nkey = \"node.key\"\n\
         ca = \"ca.pem\"\n\n\
         [[volume]]\nname = \"{VOLUME}\"\nbacking = \"backing\"\nlog = \"log\"\n\
         listen = [\"unix:nbd.sock\"]\noverlay_mib = {}\n{}",
        NODES[index], ports[index], plan.overlay_mib, plan.policy
    );
    for (peer, pin) in pins.iter().enumerate().filter(|(peer, _)| *peer != index) {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "\n[[volume.peer]]\nname = \"{}\"\naddress = \"127.0.0.1:{}\"\nkey_pin = \"{pin}\"\n\
             transport = \"{}\"\n",
            NODES[peer], ports[peer], plan.transport
        );
    }
    text
}

/// A port that is free for TCP and UDP in this moment.
fn free_port() -> Result<u16> {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 10_000;
    let end = first_outgoing_port().max(FIRST + 1000);
    // Several processes look at the same time.
    let start = std::process::id().wrapping_mul(64);
    for _ in FIRST..end {
        let taken = TAKEN.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + start.wrapping_add(taken) % (end - FIRST);
        let address = (Ipv4Addr::LOCALHOST, u16::try_from(port)?);
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return Ok(address.1);
        }
    }
    bail!("no port on loopback below {end} is free for both TCP and UDP")
}

/// Below it the kernel gives no port to a connection by itself: while a node does not run, nobody
/// takes its port by chance.
fn first_outgoing_port() -> u32 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let first = range
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok());
    first.unwrap_or(32_768)
}

impl Node {
    /// A node whose files exist.
    #[must_use]
    pub fn existing(name: &str, folder: &Path, program: &Path) -> Self {
        Self {
            name: name.to_owned(),
            folder: folder.to_owned(),
            program: program.to_owned(),
            variables: Vec::new(),
            nbd: Address::Unix(folder.join("nbd.sock")),
            daemon: None,
        }
    }

    /// A variable of the environment for every daemon that is started from now on.
    pub fn set_variable(&mut self, name: &str, value: &str) {
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// Clients connect to this address instead of the socket in its folder.
    pub fn set_nbd_address(&mut self, address: Address) {
        self.nbd = address;
    }

    /// What holds all of it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.folder.join("config.toml")
    }

    /// Its backing file.
    #[must_use]
    pub fn backing(&self) -> PathBuf {
        self.folder.join("backing")
    }

    /// Its log file.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// What its daemon has written about itself.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.folder.join("daemon.log")
    }

    /// Its control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.folder.join("ctl.sock")
    }

    /// Its NBD socket.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.folder.join("nbd.sock")
    }

    /// The NBD URI of its volume.
    #[must_use]
    pub fn uri(&self) -> String {
        format!(
            "nbd+unix:///{VOLUME}?socket={}",
            self.nbd_socket().display()
        )
    }

    /// Creates the volume: a new one, or a further copy.
    ///
    /// # Errors
    /// As [`create_volume`].
    pub fn create_volume(
        &self,
        plan: &Plan,
        copy_of: Option<IdentityToken>,
    ) -> Result<IdentityToken> {
        let config = Config::load(&self.config())?;
        let state = NodeState::open_or_create(&config.node.state_dir)?;
        let section = config
            .volume(VOLUME)
            .context("the configuration has no volume")?;
        let purpose = match copy_of {
            None => Purpose::New,
            Some(identity) => Purpose::Replica {
                identity,
                overwrite_backing: false,
                seeded: false,
            },
        };
        let new = copy_of.is_none();
        let options = CreateOptions {
            purpose,
            log_mib: (!plan.existing).then_some(plan.log_mib),
            lanes: Some(plan.lanes),
            sector_bytes: new.then_some(plan.sector_bytes),
            size_mib: (new && !plan.existing).then_some(plan.size_mib),
            create_backing: !new && !plan.existing,
            sparse: true,
            discard_log: None,
        };
        Ok(create_volume(section, &state, &options)?)
    }

    /// Creates a new volume on a log and a backing that exist.
    ///
    /// # Errors
    /// As [`create_volume`].
    pub fn create_on_existing(&self) -> Result<IdentityToken> {
        let config = Config::load(&self.config())?;
        let state = NodeState::open_or_create(&config.node.state_dir)?;
        let section = config
            .volume(VOLUME)
            .context("the configuration has no volume")?;
        Ok(create_volume(section, &state, &CreateOptions::default())?)
    }

    /// Starts the daemon; does not wait until it serves.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn spawn(&mut self) -> Result<()> {
        ensure!(self.daemon.is_none(), "{} runs already", self.name);
        let journal = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.journal())?;
        let child = Command::new(&self.program)
            .args(["run", "--die-with-parent", "--config"])
            .arg(self.config())
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(journal)
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        self.daemon = Some(Daemon { child });
        Ok(())
    }

    /// Starts the daemon and waits until its volume is open.
    ///
    /// # Errors
    /// If it ends instead; the error has its last words.
    pub fn start(&mut self) -> Result<VolumeState> {
        self.spawn()?;
        self.wait_for("open its volume", START_LIMIT, |_| true)
    }

    /// Whether its daemon was started and not stopped.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.daemon.is_some()
    }

    /// SIGKILL, and the end of the process.
    ///
    /// # Errors
    /// If it was not running, or had ended by itself.
    pub fn kill(&mut self) -> Result<()> {
        self.kill_while(|| {})
    }

    /// SIGKILL, then something that lets the process end, such as taking away disks that hang, and
    /// the end of the process.
    ///
    /// # Errors
    /// If it was not running, or had ended by itself.
    pub fn kill_while(&mut self, meanwhile: impl FnOnce()) -> Result<()> {
        let mut daemon = self.daemon.take().context("it does not run")?;
        let early = daemon.child.try_wait()?;
        daemon.child.kill()?;
        meanwhile();
        let status = daemon.child.wait()?;
        ensure!(
            early.is_none() && status.signal() == Some(Signal::SIGKILL as i32),
            "{} had ended by itself, {status}: {}",
            self.name,
            self.last_words()
        );
        Ok(())
    }

    /// SIGTERM, and the end of the process, in order.
    ///
    /// # Errors
    /// If it does not end well or not in time.
    pub fn stop(&mut self, limit: Duration) -> Result<()> {
        let status = self.stop_with(Signal::SIGTERM, limit)?;
        ensure!(
            status.success(),
            "{}: {status}: {}",
            self.name,
            self.last_words()
        );
        Ok(())
    }

    fn stop_with(&mut self, signal: Signal, limit: Duration) -> Result<ExitStatus> {
        let mut daemon = self.daemon.take().context("it does not run")?;
        let pid = i32::try_from(daemon.child.id()).context("a process id")?;
        kill(Pid::from_raw(pid), signal)?;
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = daemon.child.try_wait()? {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "{} does not stop: {}",
                self.name,
                self.last_words()
            );
            std::thread::sleep(LOOK);
        }
    }

    /// The process id of its daemon.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(|daemon| daemon.child.id())
    }

    /// The end of what the daemon wrote.
    #[must_use]
    pub fn last_words(&self) -> String {
        let text = std::fs::read_to_string(self.journal()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(8).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Asks the daemon for something.
    ///
    /// # Errors
    /// If it cannot be reached, or refuses.
    pub fn ask(&self, request: &Request) -> Result<Response> {
        let response = ControlClient::connect(&self.control_socket())?.request(request)?;
        match response {
            Response::Error { what, why, next } => bail!("{}: {what}: {why} ({next})", self.name),
            response => Ok(response),
        }
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// If it cannot be reached.
    pub fn status(&self) -> Result<NodeStatus> {
        Ok(ControlClient::connect(&self.control_socket())?.status()?)
    }

    /// What it says of the volume.
    ///
    /// # Errors
    /// If it cannot be reached.
    pub fn report(&self) -> Result<VolumeReport> {
        let mut status = self.status()?;
        ensure!(
            status.volumes.len() == 1,
            "{} volumes",
            status.volumes.len()
        );
        Ok(status.volumes.remove(0))
    }

    /// Waits until its volume is as wanted.
    ///
    /// # Errors
    /// If that does not happen within the limit, or the daemon ends.
    pub fn wait_for(
        &mut self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&VolumeReport) -> bool,
    ) -> Result<VolumeState> {
        let deadline = Instant::now() + limit;
        loop {
            let report = self.report();
            if let Ok(report) = &report
                && let Some(state) = &report.state
                && wanted(report)
            {
                return Ok(state.clone());
            }
            if let Some(daemon) = &mut self.daemon
                && let Some(status) = daemon.child.try_wait()?
            {
                self.daemon = None;
                bail!(
                    "{} ended ({status}) before it could {what}: {}",
                    self.name,
                    self.last_words()
                );
            }
            if Instant::now() >= deadline {
                bail!(
                    "{} did not {what} within {limit:?}; it says {report:?}; it wrote {}",
                    self.name,
                    self.last_words()
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until a peer takes epochs as they come.
    ///
    /// # Errors
    /// As [`Self::wait_for`].
    pub fn wait_for_peer(&mut self, limit: Duration) -> Result<VolumeState> {
        self.wait_for("have its peer live", limit, |report| {
            report.peers.iter().any(|peer| peer.live)
        })
    }

    /// Makes everything durable here and, as the policy asks, on peers.
    ///
    /// # Errors
    /// If the daemon refuses.
    pub fn flush(&self) -> Result<()> {
        self.ask(&Request::Flush {
            volume: VOLUME.to_owned(),
        })
        .map(drop)
    }

    /// Writes everything back.
    ///
    /// # Errors
    /// If the daemon refuses.
    pub fn drain(&self) -> Result<()> {
        self.ask(&Request::Drain {
            volume: VOLUME.to_owned(),
        })
        .map(drop)
    }

    /// Connects to the volume as a client.
    ///
    /// # Errors
    /// If the node does not serve it.
    pub fn client(&self) -> Result<Client> {
        let options = ClientOptions {
            timeout: Some(Duration::from_secs(120)),
            ..ClientOptions::default()
        };
        Ok(Client::connect(&self.nbd, VOLUME, options)?)
    }

    /// BLAKE3 over the backing, as `b3sum` prints it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn backing_hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update_reader(File::open(self.backing())?)
            .context("reading a backing")?;
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// Brings both copies to the same epoch with everything written back, and compares the backings.
/// Gives their common hash.
///
/// # Errors
/// If they do not get there, or differ.
pub fn quiesce_and_compare(
    primary: &mut Node,
    replica: &mut Node,
    limit: Duration,
) -> Result<String> {
    quiesce(primary, replica, limit)?;
    let (one, two) = (primary.backing_hash()?, replica.backing_hash()?);
    ensure!(one == two, "backings differ after quiesce: {one} and {two}");
    Ok(one)
}

/// Brings both copies to the same epoch with everything written back.
///
/// # Errors
/// If they do not get there, or their histories differ.
pub fn quiesce(primary: &mut Node, replica: &mut Node, limit: Duration) -> Result<()> {
    primary.wait_for_peer(limit)?;
    primary.flush()?;
    primary.drain()?;
    let tip = primary.wait_for("be drained", limit, |report| {
        report
            .state
            .as_ref()
            .is_some_and(|state| state.applied_epoch == state.tip_epoch)
    })?;
    replica.wait_for("have everything", limit, |report| {
        report
            .state
            .as_ref()
            .is_some_and(|state| state.tip_epoch == tip.tip_epoch)
    })?;
    let applied = drained(replica, tip.tip_epoch, limit)?;
    ensure!(
        applied.tip_chain == tip.tip_chain,
        "histories differ at epoch {}: {} and {}",
        tip.tip_epoch,
        tip.tip_chain,
        applied.tip_chain
    );
    Ok(())
}

/// Drains a replica to this epoch. What the primary has not confirmed yet stays in the log, and a
/// drain does not wait for it: it is asked for again.
fn drained(replica: &mut Node, epoch: u64, limit: Duration) -> Result<VolumeState> {
    let deadline = Instant::now() + limit;
    let is_there = |report: &VolumeReport| {
        let state = report.state.as_ref();
        state.is_some_and(|state| state.applied_epoch == epoch)
    };
    loop {
        replica.drain()?;
        let patience = Duration::from_secs(1).min(limit);
        match replica.wait_for("be drained", patience, is_there) {
            Err(_) if Instant::now() < deadline => {}
            outcome => return outcome,
        }
    }
}
