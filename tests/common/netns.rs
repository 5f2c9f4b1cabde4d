//! Nodes in network namespaces of their own, with a line of its own between every two of them.
//!
//! A line is cut by giving the sender a wrong hardware address for the other end: the kernel sends,
//! nobody takes it, and no error is seen, as with a pulled cable behind a switch. So each direction
//! is cut for itself, and no module of the kernel is needed beyond pairs of interfaces.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use hn4_replicad::quickstart::rig::{NODES, Node, Plan, make_nodes};

use super::{missing, program, succeed, tool};

/// Where every node listens, in its own namespace.
const PORT: u16 = 7420;

/// Three nodes' namespaces. They go when this does; so must the daemons before.
pub(crate) struct Net {
    spaces: Vec<String>,
}

/// A direction: from one node to another, by their places.
pub(crate) type Way = (usize, usize);

impl Net {
    /// Three namespaces with three lines; `None`, said aloud, where this machine has none.
    pub(crate) fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        tool("ip")?;
        if !nix::unistd::geteuid().is_root() {
            missing("root, who may make network namespaces,");
            return None;
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut net = Self { spaces: Vec::new() };
        for name in NODES {
            let space = format!("hn4-{}-{number}-{name}", std::process::id());
            let made = Command::new("ip").args(["netns", "add", &space]).output();
            if !made.is_ok_and(|output| output.status.success()) {
                missing("network namespaces");
                return None;
            }
            net.spaces.push(space);
            net.ip(net.spaces.len() - 1, &["link", "set", "lo", "up"]);
        }
        for (one, two) in [(0, 1), (0, 2), (1, 2)] {
            net.connect(one, two);
        }
        Some(net)
    }

    fn connect(&self, one: usize, two: usize) {
        let (here, there) = (interface(two), interface(one));
        let space = self.spaces[two].as_str();
        let make = [
            "link", "add", &here, "type", "veth", "peer", "name", &there, "netns", space,
        ];
        self.ip(one, &make);
        for (from, to) in [(one, two), (two, one)] {
            let address = format!("{}/24", address(from, to));
            self.ip(from, &["addr", "add", &address, "dev", &interface(to)]);
            self.ip(from, &["link", "set", &interface(to), "up"]);
        }
    }

    fn ip(&self, place: usize, args: &[&str]) {
        let mut command = Command::new("ip");
        succeed(command.args(["-n", &self.spaces[place]]).args(args));
    }

    /// Nothing arrives any more that way.
    pub(crate) fn cut(&self, (from, to): Way) {
        let (address, device) = (address(to, from), interface(to));
        let wrong = "02:00:00:00:00:99";
        let args = [
            "neigh", "replace", &address, "lladdr", wrong, "dev", &device,
        ];
        self.ip(from, &[args.as_slice(), &["nud", "permanent"]].concat());
    }

    /// It does again.
    pub(crate) fn heal(&self, (from, to): Way) {
        let (address, device) = (address(to, from), interface(to));
        self.ip(from, &["neigh", "del", &address, "dev", &device]);
    }

    /// Three nodes whose files exist and whose daemons will run in the namespaces.
    pub(crate) fn nodes(&self, folder: &Path, plan: &Plan) -> Vec<Node> {
        let nodes = make_nodes(folder, program(), plan).expect("three nodes");
        let make = |(place, node): (usize, Node)| {
            let text = std::fs::read_to_string(node.config()).expect("a configuration");
            std::fs::write(node.config(), addressed(&text, place)).expect("written");
            Node::existing(&node.name, node.folder(), &self.script(folder, place))
        };
        nodes.into_iter().enumerate().map(make).collect()
    }

    /// A program that is the daemon in a namespace.
    fn script(&self, folder: &Path, place: usize) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.join(format!("run-{place}"));
        let text = format!(
            "#!/bin/sh\nexec ip netns exec {} {} \"$@\"\n",
            self.spaces[place],
            program().display()
        );
        std::fs::write(&path, text).expect("written");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&path, mode).expect("made executable");
        path
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for space in &self.spaces {
            // Nothing is to be done if it fails; the name tells whose it was.
            let _ = Command::new("ip").args(["netns", "del", space]).status();
        }
    }
}

/// Name of the interface towards a node.
fn interface(to: usize) -> String {
    format!("to{to}")
}

/// Address of a node on the line to another one.
fn address(of: usize, on_the_line_to: usize) -> String {
    let line = of + on_the_line_to;
    format!("10.77.{line}.{}", of + 1)
}

/// The configuration of a node with the addresses that it and its peers have here.
fn addressed(text: &str, place: usize) -> String {
    let mut peer = None;
    let mut lines = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("name = \"") {
            peer = NODES
                .iter()
                .position(|node| name.strip_suffix('"') == Some(*node));
        }
        lines.push(if line.starts_with("listen = \"127.") {
            format!("listen = \"0.0.0.0:{PORT}\"")
        } else if let Some(peer) = peer.filter(|_| line.starts_with("address = ")) {
            format!("address = \"{}:{PORT}\"", address(peer, place))
        } else {
            line.to_owned()
        });
    }
    lines.join("\n") + "\n"
}
