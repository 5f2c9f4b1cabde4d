//! The node's peers: takes over what the configuration says of them, at the start and later.
//!
//! A change is first made by the volumes, which may refuse it, and then by the transport, which may
//! refuse it, too. A peer of which anything changed, be it only that another volume is shared with
//! it, is connected anew; clients do not notice.
//!
//! **Invariants:** [`Mesh::config`] is what the volumes have, and [`Mesh::connected`] what the
//! transport has and they hear of. A change that somebody refuses is taken back as a whole: who was
//! a peer is one again, and connected. Only a volume that does not take its former peers back keeps
//! the new ones; it is named, and the next reload changes it.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result, anyhow, bail};
use hn4::types::VolumeId;
use hn4_transport::driver::{PeerConfig, Transport};
use tokio::sync::{mpsc, oneshot};

use super::volume::Ask;
use crate::config::{Config, PeerSection, VolumeSection};

/// A wish to take over the peers of the configuration file.
#[derive(Debug)]
pub(super) struct Reload {
    /// Also if what was acknowledged will be on fewer copies until others have caught up.
    pub(super) accept_fewer_copies: bool,
    /// Gets what was done, in words. Who asked may be gone.
    pub(super) reply: Option<oneshot::Sender<Result<String>>>,
}

/// A volume that runs.
pub(super) struct Member {
    id: VolumeId,
    asks: mpsc::Sender<Ask>,
}

impl Member {
    pub(super) fn new(id: VolumeId, asks: &mpsc::Sender<Ask>) -> Self {
        let asks = asks.clone();
        Self { id, asks }
    }
}

/// See the module.
pub(super) struct Mesh {
    config: Config,
    members: HashMap<String, Member>,
    transport: Option<Transport>,
    connected: Vec<PeerConfig>,
    /// Names of peers that a volume let go of since they were connected: also if it has them again,
    /// it hears of them only over a new connection.
    let_go: HashSet<String>,
}

impl Mesh {
    /// Connects all peers of a configuration.
    ///
    /// # Errors
    /// If the transport refuses one.
    pub(super) async fn start(
        config: Config,
        members: HashMap<String, Member>,
        transport: Option<Transport>,
    ) -> Result<Self> {
        let mut mesh = Self {
            config,
            members,
            transport,
            connected: Vec::new(),
            let_go: HashSet::new(),
        };
        mesh.connect_all().await?;
        Ok(mesh)
    }

    /// Takes over changes until nobody can ask for any more; gives the transport back.
    pub(super) async fn run(mut self, mut wishes: mpsc::Receiver<Reload>) -> Option<Transport> {
        while let Some(wish) = wishes.recv().await {
            let result = self.reload(wish.accept_fewer_copies).await;
            match &result {
                Ok(done) => tracing::info!("{done}"),
                Err(error) => tracing::error!("{error:#}"),
            }
            if let Some(reply) = wish.reply {
                // Who asked may be gone.
                let _ = reply.send(result);
            }
        }
        self.transport
    }

    async fn reload(&mut self, accept_fewer_copies: bool) -> Result<String> {
        let file = Config::load(&self.config.path)?;
        let mut next = self.config.clone();
        let mut changed = Vec::new();
        for volume in &mut next.volumes {
            let Some(wanted) = file.volume(&volume.name) else {
                continue;
            };
            if volume.peers != wanted.peers {
                volume.peers.clone_from(&wanted.peers);
                changed.push(volume.name.clone());
            }
        }
        let rest = rest_of(&file, &next);
        if changed.is_empty() {
            return Ok(format!("no volume's peers have changed{rest}"));
        }
        if self.transport.is_none() {
            bail!(
                "the daemon was started without [transport]; restart it, so that it can have peers"
            );
        }
        let before = self.config.clone();
        let taken = self.take_over(&next, &changed, accept_fewer_copies).await;
        if let Err(error) = taken {
            return Err(self.take_back(&before, &changed, error).await);
        }
        Ok(format!(
            "the peers of {} were changed{rest}",
            changed.join(", ")
        ))
    }

    async fn take_over(&mut self, next: &Config, changed: &[String], accept: bool) -> Result<()> {
        for name in changed {
            let section = next.volume(name).context("a volume that was compared")?;
            self.change_volume(section, accept).await?;
        }
        self.connect_all().await
    }

    /// Makes everything as it was before. What cannot be is added to the error.
    async fn take_back(
        &mut self,
        before: &Config,
        changed: &[String],
        mut error: anyhow::Error,
    ) -> anyhow::Error {
        for section in changed.iter().filter_map(|name| before.volume(name)) {
            let name = &section.name;
            if self.config.volume(name) == Some(section) {
                continue;
            }
            // Whoever goes now came with this change, so hardly anything rests on that copy.
            if let Err(why) = self.change_volume(section, true).await {
                let root = why.root_cause();
                error = anyhow!(
                    "{error:#}; volume {name} has the new peers already and does not take the \
                     former ones back, repeat `hn4ctl reload`: {root}"
                );
            }
        }
        match self.connect_all().await {
            Ok(()) => error,
            Err(why) => anyhow!("{error:#}; not all peers are connected again: {why:#}"),
        }
    }

    async fn change_volume(&mut self, section: &VolumeSection, accept: bool) -> Result<()> {
        let name = &section.name;
        let member = self.members.get(name).context("a volume that runs")?;
        let (reply, answer) = oneshot::channel();
        let ask = Ask::Peers {
            section: Box::new(section.clone()),
            accept_fewer_copies: accept,
            reply,
        };
        let ended = || format!("volume {name} has ended");
        member.asks.send(ask).await.with_context(ended)?;
        let refused = answer
            .await
            .with_context(ended)?
            .map_err(anyhow::Error::msg);
        refused.with_context(|| format!("volume {name} keeps its peers"))?;
        let mut volumes = self.config.volumes.iter_mut();
        let volume = volumes.find(|volume| volume.name == *name);
        let volume = volume.context("a volume that runs")?;
        let same = |a: &PeerSection, b: &PeerSection| (&a.name, a.key_pin) == (&b.name, b.key_pin);
        let stays = |old: &&PeerSection| section.peers.iter().any(|new| same(old, new));
        let gone = volume.peers.iter().filter(|old| !stays(old));
        self.let_go.extend(gone.map(|peer| peer.name.clone()));
        volume.peers.clone_from(&section.peers);
        Ok(())
    }

    /// The peers of a configuration as the transport wants them.
    fn peers(&self, config: &Config) -> Vec<PeerConfig> {
        let shared = |section: &VolumeSection, index: usize| {
            let id = self.members.get(&section.name)?.id;
            Some((id, section.peers.get(index)?.roles))
        };
        let packed = |section: &VolumeSection, index: usize| {
            let packs = section.peers.get(index)?.scxq2;
            let member = self.members.get(&section.name)?;
            packs.then_some(member.id)
        };
        let peers = config.peers().into_iter().map(|node| PeerConfig {
            compressed: node
                .volumes
                .iter()
                .filter_map(|&(section, index)| packed(section, index))
                .collect(),
            volumes: node
                .volumes
                .iter()
                .filter_map(|&(section, index)| shared(section, index))
                .collect(),
            name: node.peer.name,
            address: node.peer.address,
            key_pin: node.peer.key_pin,
            transport: node.peer.transport,
        });
        peers.collect()
    }

    /// Lets the transport have the peers that the volumes have.
    ///
    /// # Errors
    /// The first refusal; all others are connected.
    async fn connect_all(&mut self) -> Result<()> {
        let wanted = self.peers(&self.config);
        let let_go = std::mem::take(&mut self.let_go);
        let transport = self.transport.as_ref();
        self.connected.retain(|peer| {
            let stays = wanted.contains(peer) && !let_go.contains(&peer.name);
            if !stays && let Some(transport) = transport {
                transport.remove_peer(&peer.name);
            }
            stays
        });
        let mut result = Ok(());
        for peer in wanted {
            if self.connected.contains(&peer) {
                continue;
            }
            match self.connect(peer.clone()).await {
                Ok(()) => self.connected.push(peer),
                Err(why) => result = result.and(Err(why)),
            }
        }
        result
    }

    async fn connect(&self, peer: PeerConfig) -> Result<()> {
        let transport = self.transport.as_ref();
        let transport = transport.context("a volume has peers, but there is no [transport]")?;
        for handle in transport.add_peer(peer)? {
            let member = self
                .members
                .values()
                .find(|member| member.id == handle.volume);
            let member = member.context("a volume that runs")?;
            let ask = Ask::Connect(Box::new(handle));
            // Fails if the volume has ended, which ends the daemon.
            let _ = member.asks.send(ask).await;
        }
        Ok(())
    }
}

/// What of the file is not taken over, in words.
fn rest_of(file: &Config, next: &Config) -> &'static str {
    if file == next {
        ""
    } else {
        "; other changes of the configuration take effect at the next start"
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hn4::log::{CopyState, LogIdentity, Role};
    use hn4::types::{Incarnation, NodeId, Rank, Term};
    use hn4_engine::core::event::{CopyStatus, Progress, Tip};
    use hn4_transport::driver::{Environment, Timings, TransportConfig};
    use hn4_transport::session;
    use hn4_transport::tls::Identity;
    use tokio::sync::watch;

    use super::*;
    use crate::cli::pki;
    use crate::daemon::translate;

    const NAMES: [&str; 2] = ["one", "two"];
    fn id(index: usize) -> VolumeId {
        VolumeId([u8::try_from(index).expect("few"); 16])
    }

    async fn transport(identity: Identity) -> Transport {
        let copy = CopyStatus {
            role: Role::Primary,
            term: Term::default(),
            incarnation: Incarnation::default(),
            tip: Tip::default(),
            tip_rank: Rank::default(),
            anchored: Tip::default(),
            progress: Progress::default(),
            copy: CopyState::Usable,
            seeded: false,
            surveys: false,
        };
        let state = |index: usize| {
            let identity = LogIdentity {
                volume: id(index),
                birth_nonce: [0; 16],
                size_bytes: 4096,
                sector_bytes: 512,
            };
            let state = translate::local_state(&identity, NodeId([9; 16]), 4096, false, &copy);
            (id(index), watch::Sender::new(state).subscribe())
        };
        let config = TransportConfig {
            listen: "127.0.0.1:0".parse().expect("an address"),
            node_name: "zeta".to_owned(),
            identity,
            session: session::Config::default(),
            timings: Timings::default(),
        };
        let states = (0..NAMES.len()).map(state).collect();
        let started = Transport::start(config, states, Environment::system(1)).await;
        started.expect("it listens")
    }

    /// The configuration of a node with two volumes, each of which has the peers that are named,
    /// with their pins.
    fn write(path: &Path, peers: [&[(&str, &str)]; 2]) {
        let mut text = "[node]\nname = \"zeta\"\n[transport]\nlisten = \"127.0.0.1:1\"\n\
                        certificate = \"zeta.pem\"\nkey = \"zeta.key\"\nca = \"ca.pem\"\n"
            .to_owned();
        for (name, peers) in NAMES.iter().zip(peers) {
            text += &format!(
                "[[volume]]\nname = \"{name}\"\nbacking = \"{name}.b\"\nlog = \"{name}.l\"\n"
            );
            for (name, pin) in peers {
                let pin = match pin.len() {
                    2 => format!("sha256:{}", pin.repeat(32)),
                    _ => (*pin).to_owned(),
                };
                text += &format!("[[volume.peer]]\nname = \"{name}\"\nkey_pin = \"{pin}\"\n");
            }
        }
        std::fs::write(path, text).expect("written");
    }

    /// What a volume's task is told, in words; it refuses a peer of the name `refused`.
    async fn answer(ask: Ask) -> String {
        match ask {
            Ask::Peers { section, reply, .. } => {
                let names: Vec<&str> = section.peers.iter().map(|it| it.name.as_str()).collect();
                let refused = names.contains(&"refused");
                let result = if refused {
                    Err("no".to_owned())
                } else {
                    Ok(())
                };
                reply.send(result).expect("the mesh waits");
                format!("peers {}", names.join(" "))
            }
            Ask::Connect(handle) => format!("connect {}", handle.peer),
            other => panic!("{other:?}"),
        }
    }

    struct Rig {
        folder: tempfile::TempDir,
        mesh: Mesh,
        said: mpsc::UnboundedReceiver<(&'static str, String)>,
        own_pin: String,
    }

    impl Rig {
        async fn new(peers: [&[(&str, &str)]; 2]) -> Self {
            let folder = tempfile::tempdir().expect("a directory");
            let path = folder.path().join("replicad.toml");
            pki::init(folder.path()).expect("an authority");
            let files = pki::issue(folder.path(), "zeta").expect("a certificate");
            write(&path, peers);
            let config = Config::load(&path).expect("good");
            let ca = folder.path().join("ca.pem");
            let identity = Identity::from_files(&files.certificate, &files.key, &ca);
            let transport = transport(identity.expect("good")).await;
            let (say, said) = mpsc::unbounded_channel();
            let mut members = HashMap::new();
            for (index, name) in NAMES.into_iter().enumerate() {
                let (asks, mut asked) = mpsc::channel(1);
                members.insert(name.to_owned(), Member::new(id(index), &asks));
                let say = say.clone();
                tokio::spawn(async move {
                    while let Some(ask) = asked.recv().await {
                        say.send((name, answer(ask).await)).expect("heard");
                    }
                });
            }
            let mesh = Mesh::start(config, members, Some(transport)).await;
            let mut rig = Self {
                folder,
                mesh: mesh.expect("connected"),
                said,
                own_pin: files.pin.to_string(),
            };
            rig.said().await;
            rig
        }

        /// What the volumes were told since the last time.
        async fn said(&mut self) -> Vec<(&'static str, String)> {
            // The mesh does not wait for a volume to hear of a connection.
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            let mut all = Vec::new();
            while let Ok(said) = self.said.try_recv() {
                all.push(said);
            }
            all
        }

        async fn reload(&mut self, peers: [&[(&str, &str)]; 2]) -> Result<String> {
            write(&self.folder.path().join("replicad.toml"), peers);
            self.mesh.reload(false).await
        }
    }

    const BETA: (&str, &str) = ("beta", "11");
    const GAMMA: (&str, &str) = ("gamma", "22");
    const REFUSED: (&str, &str) = ("refused", "33");

    /// What one volume was told.
    fn of<'a>(said: &'a [(&str, String)], volume: &str) -> Vec<&'a str> {
        let of = said.iter().filter(|(name, _)| *name == volume);
        of.map(|(_, what)| what.as_str()).collect()
    }

    async fn nothing_to_do(rig: &mut Rig, peers: [&[(&str, &str)]; 2]) {
        let done = rig.reload(peers).await.expect("done");
        assert!(done.contains("no volume's peers have changed"), "{done}");
    }

    #[tokio::test]
    async fn after_a_change_that_one_volume_refuses_everybody_is_connected_again() {
        let before: [&[_]; 2] = [&[BETA, GAMMA], &[BETA]];
        let mut rig = Rig::new(before).await;
        let refused = rig.reload([&[GAMMA], &[BETA, REFUSED]]).await;
        let why = format!("{:#}", refused.expect_err("refused"));
        assert_eq!(why, "volume two keeps its peers: no");
        let said = rig.said().await;
        // The first volume had let go of beta; its sessions with gamma went on.
        let one = ["peers gamma", "peers beta gamma", "connect beta"];
        assert_eq!(of(&said, "one"), one);
        assert_eq!(of(&said, "two"), ["peers beta refused", "connect beta"]);
        nothing_to_do(&mut rig, before).await;
    }

    #[tokio::test]
    async fn a_peer_that_the_transport_refuses_is_no_peer_of_any_volume() {
        let before: [&[_]; 2] = [&[BETA], &[BETA]];
        let mut rig = Rig::new(before).await;
        let own_pin = rig.own_pin.clone();
        let refused = rig.reload([&[("gamma", &own_pin)], &[BETA]]).await;
        let why = format!("{:#}", refused.expect_err("refused"));
        assert!(why.contains("is this node's own key"), "{why}");
        let said = rig.said().await;
        assert_eq!(
            of(&said, "one"),
            ["peers gamma", "peers beta", "connect beta"]
        );
        assert_eq!(of(&said, "two").last(), Some(&"connect beta"));
        nothing_to_do(&mut rig, before).await;
        let done = rig.reload([&[GAMMA], &[BETA]]).await;
        done.expect("the name and the place are free");
        assert_eq!(
            of(&rig.said().await, "one"),
            ["peers gamma", "connect gamma"]
        );
    }

    #[tokio::test]
    async fn a_volume_that_does_not_take_its_former_peers_back_is_named_and_connected() {
        let mut rig = Rig::new([&[REFUSED], &[]]).await;
        let refused = rig.reload([&[BETA], &[REFUSED]]).await;
        let why = format!("{:#}", refused.expect_err("refused"));
        assert!(why.starts_with("volume two keeps its peers"), "{why}");
        assert!(why.contains("volume one has the new peers"), "{why}");
        let one = ["peers beta", "peers refused", "connect beta"];
        assert_eq!(of(&rig.said().await, "one"), one);
        nothing_to_do(&mut rig, [&[BETA], &[]]).await;
    }
}
