//! The node's peers: takes over what the configuration says of them, at the start and later.
//!
//! A change is first made by the volumes, which may refuse it, and then by the transport. A peer of
//! which anything changed, be it only that another volume is shared with it, is connected anew;
//! clients do not notice.
//!
//! **Invariant:** [`Mesh::config`] is what runs: a change that a volume refuses leaves all of it as
//! it was.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use hn4::types::VolumeId;
use hn4_transport::driver::{PeerConfig, Transport};
use tokio::sync::{mpsc, oneshot};

use super::volume::Ask;
use crate::config::{Config, VolumeSection};

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
        let mesh = Self {
            config,
            members,
            transport,
        };
        for peer in mesh.peers(&mesh.config) {
            mesh.connect(peer).await?;
        }
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
        self.change_volumes(&next, &changed, accept_fewer_copies)
            .await?;
        let (old, new) = (self.peers(&self.config), self.peers(&next));
        self.config = next;
        for peer in old.iter().filter(|peer| !new.contains(peer)) {
            if let Some(transport) = &self.transport {
                transport.remove_peer(&peer.name);
            }
        }
        for peer in new.into_iter().filter(|peer| !old.contains(peer)) {
            self.connect(peer).await?;
        }
        Ok(format!(
            "the peers of {} were changed{rest}",
            changed.join(", ")
        ))
    }

    /// Every volume takes its new peers, or all keep the old ones.
    async fn change_volumes(&self, next: &Config, changed: &[String], accept: bool) -> Result<()> {
        for (done, name) in changed.iter().enumerate() {
            let section = next.volume(name).context("a volume that was compared")?;
            let Err(error) = self.change_volume(section, accept).await else {
                continue;
            };
            for name in &changed[..done] {
                if let Some(before) = self.config.volume(name) {
                    self.change_volume(before, true).await?;
                }
            }
            return Err(error);
        }
        Ok(())
    }

    async fn change_volume(&self, section: &VolumeSection, accept: bool) -> Result<()> {
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
        refused.with_context(|| format!("volume {name} keeps its peers"))
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
