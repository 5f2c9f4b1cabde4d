//! Which node each peer has been: `<state_dir>/peers.json`.
//!
//! A peer's key is pinned to its name, but its node id is its own word. Terms, promises and keys
//! of the ledger go by node ids, so a peer may not take another one's: the first that came with an
//! id keeps it for as long as both are peers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use hn4::types::NodeId;
use serde::{Deserialize, Serialize};

use super::state::{self, STATE_FORMAT, StateError};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    /// Node ids by the names of peers.
    nodes: BTreeMap<String, String>,
}

/// See the module.
#[derive(Debug)]
pub struct Identities {
    path: PathBuf,
    known: Mutex<BTreeMap<String, NodeId>>,
}

impl Identities {
    /// Reads what is known.
    ///
    /// # Errors
    /// If the file cannot be read or understood.
    pub fn open(state_dir: &Path) -> Result<Self, StateError> {
        let path = state_dir.join("peers.json");
        let known = match state::read(&path)? {
            None => BTreeMap::new(),
            Some(text) => parse(&text).map_err(|why| StateError::Unreadable {
                path: path.clone(),
                why,
            })?,
        };
        Ok(Self {
            path,
            known: Mutex::new(known),
        })
    }

    /// Whether a peer may be this node. `is_peer` tells whether a name is one of a peer now.
    ///
    /// # Errors
    /// Why not, for people.
    pub fn claim(
        &self,
        name: &str,
        node: NodeId,
        is_peer: impl Fn(&str) -> bool,
    ) -> Result<(), String> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut others = known.iter().filter(|(other, _)| other.as_str() != name);
        let holder = others.find(|(other, id)| **id == node && is_peer(other));
        if let Some((other, _)) = holder {
            return Err(format!(
                "it says that it is node {node}, but that is peer {other}. If the node has got \
                 another name, remove {other} from the peers first"
            ));
        }
        if known.get(name) == Some(&node) {
            return Ok(());
        }
        let mut next = known.clone();
        next.insert(name.to_owned(), node);
        let nodes = next
            .iter()
            .map(|(name, node)| (name.clone(), node.to_string()));
        let file = File {
            format: STATE_FORMAT,
            nodes: nodes.collect(),
        };
        *known = next;
        if let Err(error) = state::replace(&self.path, &state::to_json(&file)) {
            // A full disk is no reason to go on without a peer.
            tracing::error!(peer = %name, "which node a peer is is not remembered: {error}");
        }
        Ok(())
    }
}

fn parse(text: &str) -> Result<BTreeMap<String, NodeId>, String> {
    let file: File = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if file.format != STATE_FORMAT {
        return Err(format!("it has format {}", file.format));
    }
    let node = |(name, node): (String, String)| match node.parse() {
        Ok(node) => Ok((name, node)),
        Err(error) => Err(format!("{name}: {error}")),
    };
    file.nodes.into_iter().map(node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_takes_no_other_peer_s_identity_also_after_a_restart() {
        let place = tempfile::tempdir().expect("a directory");
        let node = |number| NodeId([number; 16]);
        let known = Identities::open(place.path()).expect("nothing yet");
        for (name, number) in [("beta", 1), ("gamma", 2), ("beta", 1)] {
            known.claim(name, node(number), |_| true).expect("free");
        }
        let known = Identities::open(place.path()).expect("as it was");
        let refused = known.claim("beta", node(2), |_| true);
        let why = refused.expect_err("it is gamma's");
        assert!(why.contains("peer gamma"), "{why}");
        known.claim("gamma", node(2), |_| true).expect("its own");
        // A node that lost its state is another one, and who is no peer any more claims nothing.
        known.claim("beta", node(3), |_| true).expect("free");
        let is_peer = |name: &str| name != "gamma";
        known.claim("delta", node(2), is_peer).expect("renamed");
        std::fs::write(place.path().join("peers.json"), "{}").expect("written");
        Identities::open(place.path()).expect_err("not understood");
    }
}
