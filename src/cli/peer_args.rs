//! The command line of `hn4ctl peer` and `hn4ctl reload`.

use clap::{Args, Subcommand};

/// What to do with the peers of a volume. The configuration file is changed, comments and all else
/// in it stay, and the daemon takes the change over; if it refuses, the file is as before.
#[derive(Subcommand, Debug)]
pub enum PeerCommand {
    /// Share a volume with one more node, which gets a full copy
    Add(AddPeer),
    /// Share a volume with a node no longer
    Remove(RemovePeer),
    /// Put another node, key or address in the place of a peer
    Replace(ReplacePeer),
}

/// What can be said of a peer.
#[derive(Args, Debug, Default)]
pub struct PeerKeys {
    /// Pin of its key, as `hn4ctl pki issue` prints it
    #[arg(long, value_name = "PIN")]
    pub key_pin: Option<String>,
    /// Where it listens, `host:port`
    #[arg(long, value_name = "ADDRESS")]
    pub address: Option<String>,
    /// `quic` or `wss`
    #[arg(long, value_name = "KIND")]
    pub transport: Option<String>,
    /// What it may be, such as `primary,replica`
    #[arg(long, value_name = "ROLES", value_delimiter = ',')]
    pub roles: Option<Vec<String>>,
    /// How much log it may not have flushed yet
    #[arg(long, value_name = "N")]
    pub max_lag_bytes: Option<u64>,
    /// How old the oldest epoch may be that it lacks
    #[arg(long, value_name = "N")]
    pub max_lag_seconds: Option<u64>,
    /// What happens beyond: `throttle`, `spill` or `detach`
    #[arg(long, value_name = "WHAT")]
    pub on_exceed: Option<String>,
}

/// Whom to add.
#[derive(Args, Debug)]
pub struct AddPeer {
    /// Name of the volume, as in the configuration
    pub volume: String,
    /// Name of the node, as in its certificate
    pub name: String,
    #[command(flatten)]
    pub keys: PeerKeys,
}

/// Whom to remove.
#[derive(Args, Debug)]
pub struct RemovePeer {
    /// Name of the volume, as in the configuration
    pub volume: String,
    /// Name of the peer
    pub name: String,
    #[command(flatten)]
    pub reload: ReloadArgs,
}

/// Whom to replace.
#[derive(Args, Debug)]
pub struct ReplacePeer {
    /// Name of the volume, as in the configuration
    pub volume: String,
    /// Name of the peer that is there
    pub name: String,
    /// Name of the node that takes its place; needs its key's pin
    #[arg(long, value_name = "NAME", requires = "key_pin")]
    pub with: Option<String>,
    #[command(flatten)]
    pub keys: PeerKeys,
    #[command(flatten)]
    pub reload: ReloadArgs,
}

/// How to take it over.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct ReloadArgs {
    /// Go on although what was acknowledged will be on fewer copies than `ack_peers` asks for,
    /// until other peers have caught up: for peers that are lost
    #[arg(long)]
    pub accept_fewer_copies: bool,
}
