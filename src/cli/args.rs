//! The command line of `hn4ctl`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use hn4::types::VolumeId;

use super::diff::DiffArgs;
use super::hn4_args::{Hn4Command, InspectArgs};
use super::peer_args::{PeerCommand, ReloadArgs};
use super::proof_commands::{KeysCommand, LedgerCommand, ProofCommand};
use super::token::IdentityToken;
use super::volume::{LOG_MIB_MAX, LOG_MIB_MIN, SIZE_MIB_MAX};

/// Control a node of hn4-replicad.
#[derive(Parser, Debug)]
#[command(name = "hn4ctl", version, about, after_help = EXIT_CODES)]
pub struct Cli {
    /// The daemon's control socket; by default the one in the configuration
    #[arg(long, global = true, value_name = "PATH", conflicts_with = "config")]
    pub socket: Option<PathBuf>,
    /// The daemon's configuration [default: /etc/hn4/replicad.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit status:
  0  done
  1  refused or failed; the message says why, and what to do
  2  wrong usage
  3  hn4-replicad is not running or does not answer
  4  `status --check`, `volume inspect --device`, `volume verify`, `volume chronicle --verify`:
     a volume needs attention";

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Show the node, its volumes and peers, and what to do about what is not as it should be
    Status(StatusArgs),
    /// Make everything that was written durable, and acknowledged as the volume's policy asks
    Flush(VolumeArg),
    /// Write everything that is durable back to the backing
    Drain(VolumeArg),
    /// Compare what the backing of a volume holds with what was written there
    Verify(VerifyArgs),
    /// Make this node the primary of a volume, in a new term
    Promote(PromoteArgs),
    /// Make this node the primary in place of the present one, which hands over in order
    Switchover(SwitchoverArgs),
    /// Make this node, the primary, a replica of a volume
    Demote(VolumeArg),
    /// Wait until the backing of a volume holds an epoch
    Wait(WaitArgs),
    /// Add, remove and replace peers of a volume, also while it runs
    #[command(subcommand)]
    Peer(PeerCommand),
    /// Show in which sectors a fork differs from its volume, or two logs from each other
    Diff(DiffArgs),
    /// Let the daemon take over the peers of its configuration file
    Reload(ReloadArgs),
    /// Create, adopt and look at volumes, without the daemon
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Show what this node signs its anchors with
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Check and export the ledger of a volume
    #[command(subcommand)]
    Ledger(LedgerCommand),
    /// Make and check proofs for somebody who has nothing but a public key
    #[command(subcommand)]
    Proof(ProofCommand),
    /// Make the keys and certificates with which nodes know each other
    #[command(subcommand)]
    Pki(PkiCommand),
}

/// How to show the status.
#[derive(Args, Clone, Copy, Debug)]
pub struct StatusArgs {
    /// As JSON, one line
    #[arg(long)]
    pub json: bool,
    /// Again and again, until interrupted
    #[arg(long)]
    pub watch: bool,
    /// Seconds between two looks with --watch
    #[arg(long, value_name = "N", default_value_t = 2, requires = "watch",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval_s: u64,
    /// Exit with status 4 if a volume needs attention
    #[arg(long, conflicts_with = "watch")]
    pub check: bool,
}

/// A volume.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Read all of it again, in the background
    #[arg(long, required = true)]
    pub deep: bool,
    /// Name of the volume, as in the configuration
    pub volume: String,
}

/// A volume.
#[derive(Args, Debug)]
pub struct VolumeArg {
    /// Name of the volume, as in the configuration
    pub volume: String,
}

/// What to promote.
#[derive(Args, Debug)]
pub struct PromoteArgs {
    /// Name of the volume, as in the configuration
    pub volume: String,
    /// Go on although epochs may be lost that another node has acknowledged
    #[arg(long)]
    pub accept_loss: bool,
}

/// What to take over.
#[derive(Args, Debug)]
pub struct SwitchoverArgs {
    /// Name of the volume, as in the configuration
    pub volume: String,
    /// Give up if the primary has not handed over after so many seconds
    #[arg(long, value_name = "N", default_value_t = 300,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout_s: u64,
}

/// What to wait for.
#[derive(Args, Debug)]
pub struct WaitArgs {
    /// Name of the volume, as in the configuration
    pub volume: String,
    /// The epoch
    #[arg(long, value_name = "EPOCH")]
    pub applied: u64,
    /// Give up after so many seconds
    #[arg(long, value_name = "N", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub timeout_s: u64,
}

/// What to do with a volume. Without --device they read the configuration; none needs the daemon.
#[derive(Subcommand, Debug)]
pub enum VolumeCommand {
    /// Make the log of a volume that the configuration names, on a blank backing
    Create(CreateArgs),
    /// Make the log for a backing that holds data, which becomes the volume; it is not written to
    Adopt(AdoptArgs),
    /// Show the volumes of the configuration and what the node remembers of each
    List,
    /// Show the log of a volume, or with --device an HN4 volume; the daemon must not have it open
    Inspect(InspectArgs),
    /// Confirm that log and backing of a volume are the same ones at other paths
    Reattach(VolumeArg),
    /// Give a volume up on this node; its log and backing are left as they are
    Forget(ForgetArgs),
    #[command(flatten)]
    Hn4(Hn4Command),
}

/// How to make the log.
#[derive(Args, Debug)]
pub struct LogArgs {
    /// Size of the log file to be made, in MiB [default: 1024]; not for a device
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u64).range(LOG_MIB_MIN..=LOG_MIB_MAX))]
    pub log_mib: Option<u64>,
    /// Logical sector size: 512 or 4096 [default: the backing's]
    #[arg(long, value_name = "BYTES")]
    pub sector_bytes: Option<u32>,
    /// Lanes into which the frames of the log are divided [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub lanes: Option<u16>,
}

/// How to create a volume.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Name of the volume, as in the configuration
    pub volume: String,
    #[command(flatten)]
    pub log: LogArgs,
    /// Make the backing file, with this size in MiB
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=SIZE_MIB_MAX))]
    pub size_mib: Option<u64>,
    /// Make the backing as a sparse file; by default it is filled with zeroes
    #[arg(long)]
    pub sparse: bool,
    /// Make a further copy of the volume that --identity names; the primary fills it
    #[arg(long, requires = "identity")]
    pub replica: bool,
    /// What `volume create` printed for the first copy
    #[arg(long, value_name = "TOKEN", requires = "replica")]
    pub identity: Option<IdentityToken>,
    /// Make the replica's backing file, with the size of the volume
    #[arg(long, requires = "replica")]
    pub create_backing: bool,
    /// The replica's backing holds data, which the copy may replace
    #[arg(long, requires = "replica")]
    pub overwrite_backing: bool,
    /// The replica's backing holds a copy of the primary's that was brought there, an older one
    /// perhaps: what is the same is not sent. Needs tree = "on", here and on the primary
    #[arg(long, requires = "replica",
          conflicts_with_all = ["size_mib", "sparse", "create_backing"])]
    pub seeded: bool,
}

/// What to adopt.
#[derive(Args, Debug)]
pub struct AdoptArgs {
    /// Name of the volume, as in the configuration
    pub volume: String,
    #[command(flatten)]
    pub log: LogArgs,
    /// The backing had a log, which is lost: give up what that held after EPOCH, which the refusal
    /// to start names. The backing may be torn if it was not closed in order; check what is on it
    #[arg(long, value_name = "EPOCH")]
    pub discard_log: Option<u64>,
}

/// What to forget.
#[derive(Args, Debug)]
pub struct ForgetArgs {
    /// The volume's id, as `volume list` shows it
    #[arg(value_name = "UUID")]
    pub id: VolumeId,
}

/// What to make.
#[derive(Subcommand, Debug)]
pub enum PkiCommand {
    /// Make an authority: ca.pem and ca.key
    Init {
        /// Folder for the files; made if it is not there
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
    /// Make a node's certificate and key: NAME.pem and NAME.key; prints the key pin
    Issue {
        /// Name of the node, as in its configuration
        name: String,
        /// Folder with ca.key, and for the new files
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
    /// Print this node's key pin, which its peers need
    Pin,
}
