//! `keys`, `ledger`, `proof`: what a node signs with, what it has signed, and documents about that
//! for others. None needs the daemon or changes anything, but `keys rotate`.
//!
//! A ledger is read while the daemon appends to it: an append that is on its way counts as not
//! there yet, and so does what a crash left of one.

mod local;
mod succinct;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use hn4::types::{BlockIndex, Epoch, Lba, SECTORS_PER_BLOCK, VolumeId};
use hn4_proof::blocks;
use hn4_proof::envelope::aggregate::Aggregate;
use hn4_proof::envelope::claim::BlockDocument;
use hn4_proof::ledger::scan::{Records, Recovered, recover};
use hn4_proof::ledger::verify::{LedgerError, Policy, Verifier};
use hn4_proof::ledger::xml::Export;
use hn4_proof::ledger::{Body, LedgerHeader, Scope};
use hn4_proof::sign::{Algorithm, PublicKey};

use super::args::Cli;
use super::claims;
use super::run::{AnyError, DONE, ask, load};
use crate::config::attach::attach_records;
use crate::config::keys;
use crate::config::state::NodeState;
use crate::control::Request;
use crate::daemon::proof::local::local_path;
use crate::daemon::proof::medium::{LedgerOnDisk, ledger_path};

/// What to do with keys.
#[derive(Subcommand, Debug)]
pub enum KeysCommand {
    /// Show this node's keys: their ids, and the public keys that verifiers need
    Show,
    /// Replace this node's keys while it runs; the old ones sign nothing after that
    Rotate {
        /// Replace the key of this algorithm only: ed25519, ml-dsa-65 or slh-dsa-sha2-128f
        #[arg(long = "algorithm", value_name = "NAME")]
        algorithms: Vec<Algorithm>,
    },
}

/// What a verifier insists on.
#[derive(Args, Clone, Debug, Default)]
pub struct RequireArg {
    /// Insist on signatures of this algorithm: ml-dsa-65 on every anchor and checkpoint,
    /// slh-dsa-sha2-128f on checkpoints
    #[arg(long = "require", value_name = "NAME")]
    pub require: Vec<Algorithm>,
}

impl RequireArg {
    fn policy(&self) -> Policy {
        let of = |slow: bool| {
            let all = self.require.iter();
            let of = all.filter(move |it| it.is_for_checkpoints() == slow);
            of.copied().collect()
        };
        Policy {
            every_batch: of(false),
            checkpoints: of(true),
        }
    }
}

/// Which ledger.
#[derive(Args, Debug)]
pub struct LedgerArg {
    /// Name of the volume, as in the configuration
    #[arg(required_unless_present = "file")]
    pub volume: Option<String>,
    /// A copy of a ledger; the configuration is not read
    #[arg(long, value_name = "FILE", conflicts_with = "volume")]
    pub file: Option<PathBuf>,
    /// The node's own ledger of the volume, with what deep verifies found, not the shared one
    #[arg(long, conflicts_with = "file")]
    pub local: bool,
}

/// What to do with a ledger.
#[derive(Subcommand, Debug)]
pub enum LedgerCommand {
    /// Check every record, signature and place of a ledger
    Verify {
        #[command(flatten)]
        ledger: LedgerArg,
        /// File with a public key that the ledger must lead to; by default this node's key
        #[arg(long = "key", value_name = "FILE")]
        keys: Vec<PathBuf>,
        #[command(flatten)]
        require: RequireArg,
    },
    /// Write a ledger in another form
    Export {
        #[command(flatten)]
        ledger: LedgerArg,
        /// As IDB.xml
        #[arg(long, required = true)]
        idb_xml: bool,
        /// Where to; by default standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

/// Which epochs, or which block at one.
#[derive(Args, Clone, Copy, Debug)]
pub struct RangeArgs {
    /// First epoch of a range
    #[arg(
        long,
        value_name = "EPOCH",
        required_unless_present = "lba",
        requires = "last"
    )]
    pub first: Option<u64>,
    /// Last epoch of a range
    #[arg(long, value_name = "EPOCH", requires = "first")]
    pub last: Option<u64>,
    /// First sector of a block of 4 KiB: prove what it was, not which epochs there were
    #[arg(long, value_name = "N", requires = "epoch", conflicts_with = "first")]
    pub lba: Option<u64>,
    /// At the end of this epoch
    #[arg(long, value_name = "EPOCH", requires = "lba")]
    pub epoch: Option<u64>,
}

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wanted {
    Range(Epoch, Epoch),
    Block(BlockIndex, Epoch),
}

impl RangeArgs {
    fn wanted(&self) -> Result<Wanted, AnyError> {
        match (self.first, self.last, self.lba, self.epoch) {
            (Some(first), Some(last), None, None) => Ok(Wanted::Range(Epoch(first), Epoch(last))),
            (None, None, Some(lba), Some(epoch)) if lba % SECTORS_PER_BLOCK == 0 => {
                Ok(Wanted::Block(Lba(lba).block(), Epoch(epoch)))
            }
            _ => Err("--lba must be a multiple of 8: a block of 4 KiB begins there".into()),
        }
    }
}

/// How a document is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Format {
    /// One line
    Json,
    /// As proof/schema/proof.proto says
    Protobuf,
}

/// What to do with proofs.
#[derive(Subcommand, Debug)]
pub enum ProofCommand {
    /// Write a proof of a range of epochs, or of what a block was at an epoch, for somebody who has
    /// nothing but a public key
    Export {
        #[command(flatten)]
        ledger: LedgerArg,
        #[command(flatten)]
        range: RangeArgs,
        /// Of the epochs of 2 to 4096 anchors: a succinct proof of the chain of their batch roots,
        /// in place of their records; only in builds with the feature `stark`
        #[arg(long, requires = "first")]
        stark: bool,
        /// json or protobuf
        #[arg(long, value_name = "FORMAT", default_value = "json")]
        format: Format,
        /// Where to; by default standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Check such a proof
    Verify {
        /// The proof
        file: PathBuf,
        /// Id of the volume, a UUID
        #[arg(long, value_name = "UUID")]
        volume: VolumeId,
        #[command(flatten)]
        range: RangeArgs,
        /// File that begins with what the block is said to have been, 4096 bytes
        #[arg(long, value_name = "FILE", requires = "lba")]
        data: Option<PathBuf>,
        /// File with a public key that is trusted
        #[arg(long = "key", value_name = "FILE", required = true)]
        keys: Vec<PathBuf>,
        #[command(flatten)]
        require: RequireArg,
    },
}

/// Carries out `keys`.
pub(super) fn run_keys(cli: &Cli, command: &KeysCommand) -> Result<u8, AnyError> {
    if let KeysCommand::Rotate { algorithms } = command {
        let algorithms = algorithms.iter().map(Algorithm::to_string).collect();
        return ask(cli, &Request::RotateKeys { algorithms });
    }
    let state_dir = load(cli)?.node.state_dir;
    let mut out = io::stdout().lock();
    let mut any = false;
    for algorithm in Algorithm::ALL {
        let Some(key) = keys::node_key(&state_dir, algorithm)? else {
            continue;
        };
        any = true;
        let public = key.public();
        writeln!(
            out,
            "key id      {}\npublic key  {public}\n            {}  (for verifiers)\n\
             secret key  {}  (mode 0600)",
            public.id(),
            keys::public_path(&state_dir, algorithm).display(),
            keys::secret_path(&state_dir, algorithm).display()
        )?;
        if let Some(next) = keys::next_key(&state_dir, algorithm)? {
            let id = next.public().id();
            writeln!(out, "replaced by {id}  when all ledgers have it")?;
        }
    }
    if !any {
        return Err("this node has no key yet; hn4-replicad draws one when it first runs".into());
    }
    let retired = keys::retired_path(&state_dir);
    if retired.exists() {
        for public in keys::public_keys(&retired)? {
            writeln!(out, "retired     {}  {}", public.id(), public.algorithm())?;
        }
    }
    Ok(DONE)
}

fn path_of(cli: &Cli, ledger: &LedgerArg) -> Result<PathBuf, AnyError> {
    let name = match (&ledger.file, &ledger.volume) {
        (Some(file), _) => return Ok(file.clone()),
        (None, Some(name)) => name,
        (None, None) => return Err("name a volume, or a file with --file".into()),
    };
    let config = load(cli)?;
    let state = NodeState::open_or_create(&config.node.state_dir)?;
    let records = attach_records(&state)?;
    let record = records.iter().find(|record| record.name == *name);
    let record = record.ok_or_else(|| format!("this node has not opened a volume {name} yet"))?;
    let path = match ledger.local {
        true => local_path,
        false => ledger_path,
    };
    Ok(path(&config.node.state_dir, record.volume))
}

fn open(path: &Path) -> Result<(LedgerOnDisk, LedgerHeader), AnyError> {
    let opened = LedgerOnDisk::look(path);
    let medium = opened.map_err(|error| format!("{}: {error}", path.display()))?;
    let header = *Records::new(&medium)?.header();
    Ok((medium, header))
}

fn recovered(
    medium: &LedgerOnDisk,
    header: &LedgerHeader,
    policy: Policy,
) -> Result<Recovered, AnyError> {
    let scope = (header.scope, header.volume);
    Ok(recover(medium, scope, policy, None)?)
}

fn public_keys(files: &[PathBuf]) -> Result<Vec<PublicKey>, AnyError> {
    let mut all = Vec::new();
    for file in files {
        all.extend(keys::public_keys(file)?);
    }
    Ok(all)
}

/// Carries out `ledger`.
pub(super) fn run_ledger(cli: &Cli, command: &LedgerCommand) -> Result<u8, AnyError> {
    match command {
        LedgerCommand::Verify {
            ledger,
            keys,
            require,
        } => verify_ledger(cli, ledger, keys, require),
        LedgerCommand::Export { ledger, out, .. } => {
            let (medium, header) = open(&path_of(cli, ledger)?)?;
            let tip = recovered(&medium, &header, Policy::default())?.tip;
            let mut out = output(out.as_deref())?;
            let mut export = Export::begin(header.volume, tip.state(), &mut out)?;
            let mut records = Records::new(&medium)?;
            for _ in 0..tip.next_index() {
                if let Some(Ok(record)) = records.next_record()? {
                    export.step(&record)?;
                }
            }
            export.finish()?;
            out.flush()?;
            Ok(DONE)
        }
    }
}

fn verify_ledger(
    cli: &Cli,
    ledger: &LedgerArg,
    files: &[PathBuf],
    require: &RequireArg,
) -> Result<u8, AnyError> {
    let (medium, header) = open(&path_of(cli, ledger)?)?;
    if header.scope == Scope::Local {
        return verify_local(cli, &medium, files, require);
    }
    let trusted = if files.is_empty() {
        let path = keys::public_path(&load(cli)?.node.state_dir, Algorithm::Ed25519);
        // A replica's key is in the ledger, but need not have signed it: the ledger must hold it.
        public_keys(&[path])?
    } else {
        public_keys(files)?
    };
    let found = recovered(&medium, &header, require.policy())?;
    let (tip, torn) = (found.tip, found.torn);
    if let Some(slow) = require.require.iter().find(|it| it.is_for_checkpoints())
        && tip.vouched().is_none()
    {
        return Err(format!("no checkpoint with an {slow} signature is in the ledger yet").into());
    }
    let holds = trusted.iter().any(|key| tip.keyring().knows(key.id()));
    let (head, leads) = match tip.finish(&trusted) {
        Ok(head) => (head, true),
        // Enrolled by whoever began it: that alone does not tell whose ledger this is.
        Err(LedgerError::Untrusted { .. }) if files.is_empty() && holds => (tip.head(), false),
        Err(LedgerError::Untrusted { .. }) if files.is_empty() => {
            return Err("this node's key is not in the ledger".into());
        }
        Err(error) => return Err(error.into()),
    };
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "ledger of volume {}: {} records, {}",
        header.volume,
        head.size,
        through(&tip)
    )?;
    writeln!(out, "head  blake3:{}", head.root)?;
    if let Some(epoch) = tip.vouched() {
        writeln!(out, "checkpoint at epoch {epoch}")?;
    }
    if let Some(state) = tip.state() {
        let (epoch, root) = (state.epoch, state.root);
        writeln!(out, "state root  blake3:{root}  at epoch {epoch}")?;
    }
    for (key, node) in tip.keyring().active() {
        let node = node.map_or_else(String::new, |node| format!("  of node {node}"));
        writeln!(out, "key   {}{node}", key.id())?;
    }
    writeln!(out, "every record, place and signature is good")?;
    if let Some(torn) = torn {
        writeln!(
            out,
            "not counted: {} bytes from byte {} on are no record ({}): a crash tore it, or it is \
             damaged",
            torn.bytes, torn.offset, torn.reason
        )?;
    }
    if !leads {
        writeln!(
            out,
            "but whose ledger it is was not compared: this node's key signed neither its \
             beginning nor its end; name a key that did with --key"
        )?;
    }
    Ok(DONE)
}

/// A local ledger holds no keys: they are those of the node, also the ones that it had before.
fn verify_local(
    cli: &Cli,
    medium: &LedgerOnDisk,
    files: &[PathBuf],
    require: &RequireArg,
) -> Result<u8, AnyError> {
    let trusted = if files.is_empty() {
        let state_dir = load(cli)?.node.state_dir;
        let all = Algorithm::ALL.map(|it| keys::public_path(&state_dir, it));
        let all = all.into_iter().chain([keys::retired_path(&state_dir)]);
        public_keys(&all.filter(|path| path.exists()).collect::<Vec<_>>())?
    } else {
        public_keys(files)?
    };
    local::verify(medium, &trusted, require.policy(), &mut io::stdout().lock())?;
    Ok(DONE)
}

fn through(tip: &Verifier) -> String {
    match tip.anchored() {
        Some((epoch, _)) => format!("anchored through epoch {epoch}"),
        None => "nothing anchored yet".to_owned(),
    }
}

/// Carries out `proof`.
pub(super) fn run_proof(cli: &Cli, command: &ProofCommand) -> Result<u8, AnyError> {
    match command {
        ProofCommand::Export {
            ledger,
            range,
            stark,
            format,
            out,
        } => {
            let document = match (range.wanted()?, format) {
                (Wanted::Range(first, last), format) if *stark => {
                    let document = succinct::prove(cli, ledger, (first, last))?;
                    match format {
                        Format::Json => document.to_json()?.into_bytes(),
                        Format::Protobuf => document.to_protobuf()?,
                    }
                }
                (Wanted::Range(first, last), format) => {
                    let (medium, header) = open(&path_of(cli, ledger)?)?;
                    let tip = recovered(&medium, &header, Policy::default())?.tip;
                    let records = covering(&medium, &tip, (first.0, last.0))?;
                    let document = Aggregate::with_records(&records)?;
                    match format {
                        Format::Json => document.to_json()?.into_bytes(),
                        Format::Protobuf => document.to_protobuf()?,
                    }
                }
                (Wanted::Block(block, epoch), format) => {
                    let document = claims::prove(&files_of(cli, ledger)?, block, epoch)?;
                    match format {
                        Format::Json => document.to_json()?.into_bytes(),
                        Format::Protobuf => document.to_protobuf()?,
                    }
                }
            };
            let mut out = output(out.as_deref())?;
            out.write_all(&document)?;
            if *format == Format::Json {
                writeln!(out)?;
            }
            out.flush()?;
            Ok(DONE)
        }
        ProofCommand::Verify {
            file,
            volume,
            range,
            data,
            keys,
            require,
        } => {
            let trusted = (public_keys(keys)?, require.policy());
            match range.wanted()? {
                Wanted::Range(first, last) => {
                    verify_epochs(&read(file)?, (*volume, first, last), trusted)
                }
                Wanted::Block(block, epoch) => {
                    let wanted = (*volume, block, epoch);
                    verify_block(&read(file)?, wanted, data.as_deref(), trusted)
                }
            }
        }
    }
}

fn read(file: &Path) -> Result<Vec<u8>, AnyError> {
    let read = std::fs::read(file);
    Ok(read.map_err(|error| format!("{}: {error}", file.display()))?)
}

/// The text of a document in JSON; protobuf begins with another byte.
fn json(bytes: &[u8]) -> Option<&str> {
    let text = str::from_utf8(bytes).ok()?;
    text.trim_start().starts_with('{').then_some(text)
}

fn verify_epochs(
    bytes: &[u8],
    wanted: (VolumeId, Epoch, Epoch),
    (trusted, policy): (Vec<PublicKey>, Policy),
) -> Result<u8, AnyError> {
    if let Some(document) = succinct::read(bytes) {
        return succinct::verify(&document, wanted, (trusted, policy));
    }
    let document = match json(bytes) {
        Some(text) => Aggregate::from_json(text)?,
        None => Aggregate::from_protobuf(bytes)?,
    };
    let proven = document.verify(wanted, &trusted, policy)?;
    let (volume, first, last) = wanted;
    let count = proven.anchors.len();
    writeln!(
        io::stdout(),
        "epochs {first} to {last} of volume {volume} are in {count} anchors, all signed by \
         trusted keys"
    )?;
    Ok(DONE)
}

fn verify_block(
    bytes: &[u8],
    wanted: (VolumeId, BlockIndex, Epoch),
    data: Option<&Path>,
    (trusted, policy): (Vec<PublicKey>, Policy),
) -> Result<u8, AnyError> {
    let document = match json(bytes) {
        Some(text) => BlockDocument::from_json(text)?,
        None => BlockDocument::from_protobuf(bytes)?,
    };
    let claim = document.verify(wanted, &trusted, policy)?;
    let (volume, block, epoch) = wanted;
    if let Some(path) = data {
        let data = read(path)?;
        let content = data
            .first_chunk()
            .ok_or("the data are shorter than a block")?;
        if blocks::leaf(content) != claim.leaf {
            let path = path.display();
            return Err(format!("what {path} begins with is not what the block was").into());
        }
    }
    writeln!(
        io::stdout(),
        "LBA {}-{} of volume {volume} at epoch {epoch}: leaf blake3:{}{}",
        block.lba(),
        block.lba().0 + SECTORS_PER_BLOCK - 1,
        claim.leaf,
        if data.is_some() {
            ", the content that was given"
        } else {
            ""
        }
    )?;
    Ok(DONE)
}

/// Files of a volume of this node.
fn files_of(cli: &Cli, ledger: &LedgerArg) -> Result<claims::Files, AnyError> {
    let name = ledger.volume.as_deref();
    let name = name.ok_or("a proof about a block needs a volume of this node, not a file")?;
    let config = load(cli)?;
    let section = config.volume(name);
    let section = section.ok_or_else(|| format!("the configuration has no volume {name}"))?;
    let path = path_of(cli, ledger)?;
    let volume = path.parent().and_then(Path::file_name).unwrap_or_default();
    Ok(claims::Files {
        log: section.log.clone(),
        tree: config.node.state_dir.join("tree").join(volume),
        ledger: path,
    })
}

/// The records from the anchor that holds the first epoch to the one that holds the last.
fn covering(
    medium: &LedgerOnDisk,
    tip: &Verifier,
    (from, to): (u64, u64),
) -> Result<Vec<Vec<u8>>, AnyError> {
    let mut records = Records::new(medium)?;
    let mut taken = Vec::new();
    for _ in 0..tip.next_index() {
        let Some(Ok(record)) = records.next_record()? else {
            break;
        };
        let anchor = match &record.body {
            Body::Anchor(signed) => Some((signed.anchor.first.0, signed.anchor.last.0)),
            _ => None,
        };
        let begins = anchor.is_some_and(|(first, last)| (first..=last).contains(&from));
        if begins || !taken.is_empty() {
            taken.push(records.bytes().to_vec());
        }
        if !taken.is_empty() && anchor.is_some_and(|(_, last)| last >= to) {
            return Ok(taken);
        }
    }
    let through = through(tip);
    Err(format!("the ledger does not hold epochs {from} to {to}: {through}").into())
}

fn output(path: Option<&Path>) -> Result<Box<dyn Write>, AnyError> {
    Ok(match path {
        Some(path) => {
            let made = File::create_new(path);
            let file = made.map_err(|error| format!("{}: {error}", path.display()))?;
            Box::new(BufWriter::new(file))
        }
        None => Box::new(BufWriter::new(io::stdout())),
    })
}
