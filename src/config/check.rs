//! What sections must not say together.

use std::collections::HashMap;
use std::path::Path;

use hn4_engine::core::{AckMode, VerifyReads};
use hn4_engine::shard::Listen;
use hn4_transport::driver::dials;

use super::read::{Reader, Table};
use super::{NodeSection, PeerSection, VolumeSection};

/// A volume's section with where it stands.
pub(super) struct Parsed<'t> {
    pub(super) section: Table<'t>,
    pub(super) volume: VolumeSection,
    /// The sections of its peers, in the order of `volume.peers`.
    pub(super) peers: Vec<Table<'t>>,
}

pub(super) fn check<'t>(
    reader: &mut Reader<'t>,
    root: &Table<'t>,
    node: &NodeSection,
    volumes: &[Parsed<'t>],
) {
    unique_names(reader, volumes);
    unique_paths(reader, volumes);
    unique_sockets(reader, node, volumes);
    for parsed in volumes {
        loopback_only(reader, parsed);
        enough_peers(reader, parsed);
        reads_need_a_tree(reader, parsed);
        known_transport(reader, root, parsed);
    }
    same_peers(reader, node, volumes);
}

fn unique_names(reader: &mut Reader<'_>, volumes: &[Parsed<'_>]) {
    for (index, parsed) in volumes.iter().enumerate() {
        let name = &parsed.volume.name;
        let earlier = &volumes[..index];
        if !name.is_empty() && earlier.iter().any(|other| other.volume.name == *name) {
            let (section, key) = (&parsed.section, "name");
            let what = format!("another volume is named {name:?} already; choose another name");
            reader.note(section.at_of(key), section.key(key), what);
        }
    }
}

/// No path may be used twice: two writers on one medium destroy each other's data.
fn unique_paths(reader: &mut Reader<'_>, volumes: &[Parsed<'_>]) {
    let mut taken: HashMap<&Path, String> = HashMap::new();
    for Parsed {
        section, volume, ..
    } in volumes
    {
        let shadow = volume.shadow.iter().map(|path| ("shadow", path));
        let paths = [("backing", &volume.backing), ("log", &volume.log)];
        for (key, path) in paths.into_iter().chain(shadow) {
            if path.as_os_str().is_empty() {
                continue;
            }
            if let Some(user) = taken.get(path.as_path()) {
                let what = format!(
                    "{} is used by {user} already; each backing and each log needs a device or \
                     file of its own",
                    path.display()
                );
                reader.note(section.at_of(key), section.key(key), what);
            } else {
                taken.insert(path, section.key(key));
            }
        }
    }
}

fn unique_sockets(reader: &mut Reader<'_>, node: &NodeSection, volumes: &[Parsed<'_>]) {
    let mut taken: Vec<(Listen, String)> = vec![(
        Listen::Unix(node.control_socket.clone()),
        "the control socket".to_owned(),
    )];
    for Parsed {
        section, volume, ..
    } in volumes
    {
        let key = section.key("listen");
        for listen in &volume.listen {
            // Port 0 asks the system for any free port.
            if matches!(listen, Listen::Tcp(address) if address.port() == 0) {
                continue;
            }
            match taken.iter().find(|(other, _)| other == listen) {
                Some((_, user)) => {
                    let name = listen_text(listen);
                    let what = format!("{name} is used by {user} already; choose another one");
                    reader.note(section.at_of("listen"), key.clone(), what);
                }
                None => taken.push((listen.clone(), key.clone())),
            }
        }
    }
}

/// A socket as it stands in the configuration.
#[must_use]
pub fn listen_text(listen: &Listen) -> String {
    match listen {
        Listen::Unix(path) => format!("unix:{}", path.display()),
        Listen::Tcp(address) => format!("tcp:{address}"),
    }
}

fn loopback_only(reader: &mut Reader<'_>, parsed: &Parsed<'_>) {
    let Parsed {
        section, volume, ..
    } = parsed;
    if volume.insecure_tcp {
        return;
    }
    for listen in &volume.listen {
        let Listen::Tcp(address) = listen else {
            continue;
        };
        if !address.ip().to_canonical().is_loopback() {
            let what = format!(
                "tcp:{address} can be reached from other machines, and NBD has neither encryption \
                 nor passwords here; use 127.0.0.1 or a unix socket, or set insecure_tcp = true if \
                 the network is trusted"
            );
            reader.note(section.at_of("listen"), section.key("listen"), what);
        }
    }
}

fn enough_peers(reader: &mut Reader<'_>, parsed: &Parsed<'_>) {
    let Parsed {
        section, volume, ..
    } = parsed;
    let (wanted, have) = (volume.ack_peers, volume.copies());
    if volume.ack != AckMode::Async && have < wanted {
        let key = if section.has("ack_peers") {
            "ack_peers"
        } else {
            "ack"
        };
        let what = format!(
            "acknowledgements of {wanted} {} are asked for, but {have} [[volume.peer]] that may be \
             replica {} configured; add peers, lower ack_peers, or set ack = \"async\"",
            if wanted == 1 { "peer" } else { "peers" },
            if have == 1 { "is" } else { "are" },
        );
        reader.note(section.at_of(key), section.key(key), what);
    }
}

fn reads_need_a_tree(reader: &mut Reader<'_>, parsed: &Parsed<'_>) {
    let Parsed {
        section, volume, ..
    } = parsed;
    if volume.verify_reads != VerifyReads::Off && !volume.tree {
        let key = "verify_reads";
        let what = "reads are compared with the state tree, and this volume has none; set \
                    tree = \"on\", or verify_reads = \"off\"";
        reader.note(section.at_of(key), section.key(key), what.to_owned());
    }
}

fn known_transport(reader: &mut Reader<'_>, root: &Table<'_>, parsed: &Parsed<'_>) {
    if let Some(peer) = parsed.peers.first()
        && !root.has("transport")
    {
        let what = "a peer needs the section [transport] with listen, certificate, key and ca; \
                    `hn4ctl pki` makes the files";
        reader.note(peer.at, peer.label.clone(), what.to_owned());
    }
}

/// A peer is one node with one key, whichever volumes it shares.
fn same_peers(reader: &mut Reader<'_>, node: &NodeSection, volumes: &[Parsed<'_>]) {
    let mut known: Vec<&PeerSection> = Vec::new();
    let mut addresses: HashMap<&str, &str> = HashMap::new();
    for parsed in volumes {
        for peer in &parsed.volume.peers {
            if let Some(address) = &peer.address {
                addresses.entry(&peer.name).or_insert(address);
            }
        }
    }
    for parsed in volumes {
        for (index, (peer, table)) in parsed.volume.peers.iter().zip(&parsed.peers).enumerate() {
            if peer.name.is_empty() {
                continue;
            }
            let twice = parsed.volume.peers[..index]
                .iter()
                .any(|other| other.name == peer.name);
            let known_peer = known.iter().find(|other| other.name == peer.name).copied();
            let same_key = known
                .iter()
                .find(|other| other.key_pin == peer.key_pin && other.name != peer.name);
            let has_pin = table.peek_text("key_pin").is_some();
            let address = addresses.get(peer.name.as_str()).copied();
            let problem = if peer.name == node.name {
                Some((
                    "name",
                    "this is the node itself; name the other node".to_owned(),
                ))
            } else if twice {
                let what = "this volume has a peer of that name already; remove one".to_owned();
                Some(("name", what))
            } else if let Some(other) = same_key.filter(|_| has_pin) {
                let what = format!(
                    "it is the key of {:?} too; each node has its own",
                    other.name
                );
                Some(("key_pin", what))
            } else if let Some((key, what)) = known_peer.and_then(|known| differs(known, peer)) {
                Some((key, what))
            } else if peer
                .address
                .as_deref()
                .is_some_and(|own| Some(own) != address)
            {
                let what = "another volume gives this peer another address; a node has one";
                Some(("address", what.to_owned()))
            } else if address.is_none() && dials(&node.name, &peer.name) {
                let what = format!(
                    "is missing; of two nodes the one whose name comes first dials, here {:?}, so \
                     it needs the address of {:?}",
                    node.name, peer.name
                );
                Some(("address", what))
            } else {
                None
            };
            if let Some((key, what)) = problem {
                reader.note(table.at_of(key), table.key(key), what);
            }
            if known_peer.is_none() {
                known.push(peer);
            }
        }
    }
}

fn differs(known: &PeerSection, peer: &PeerSection) -> Option<(&'static str, String)> {
    let text = |what| format!("another volume gives this peer another {what}; a node has one");
    if known.key_pin != peer.key_pin {
        Some(("key_pin", text("key")))
    } else if known.transport != peer.transport {
        Some(("transport", text("transport")))
    } else {
        None
    }
}
