//! `hn4ctl diff`: what a fork holds that the volume does not, and where two logs part.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use hn4::log::{LogIdentity, RING_START, Superblock};
use hn4::types::{BLOCK_BYTES, Epoch, SECTOR_BYTES};
use hn4_engine::core::recovery::{self, AlignedBlock, Medium};
use hn4_engine::device::{Device, DeviceOptions};
use hn4_engine::nbd::client::{Address, Client, ClientOptions};
use hn4_engine::shard::{DeviceMedium, Listen};
use serde::Serialize;
use zerocopy::IntoBytes;

use super::args::Cli;
use super::run::{AnyError, DONE, connect, load};
use super::token::IdentityToken;
use crate::config::{Config, VolumeSection, attach};
use crate::divergence::{
    Changes, Found, Range, Run, Side, Source, against_volume, between, common, read_run,
};

/// What to compare.
#[derive(Args, Debug)]
pub struct DiffArgs {
    /// Name of the volume, as in the configuration: a fork file of it is compared with the volume
    #[arg(required_unless_present = "logs")]
    pub volume: Option<String>,
    /// The fork file; by default the only one of the volume in the state directory
    #[arg(long, value_name = "FILE")]
    pub fork: Option<PathBuf>,
    /// Compare with this backing or image instead of the volume as the daemon serves it
    #[arg(long, value_name = "PATH")]
    pub image: Option<PathBuf>,
    /// Compare two logs of a volume with each other; no daemon may have them open
    #[arg(long, num_args = 2, value_names = ["LOG", "LOG"],
          conflicts_with_all = ["volume", "fork", "image"])]
    pub logs: Option<Vec<PathBuf>>,
    /// As JSON, one line
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(cli: &Cli, args: &DiffArgs) -> Result<u8, AnyError> {
    let report = match (&args.logs, &args.volume) {
        (Some(logs), _) => {
            let [first, second] = logs.as_slice() else {
                return Err("--logs takes two".into());
            };
            compare_logs(first, second)?
        }
        (None, volume) => compare_fork(cli, volume.as_deref().unwrap_or_default(), args)?,
    };
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        write!(out, "{}", report.text())?;
    }
    Ok(DONE)
}

/// What is told. Fields are added, never renamed.
#[derive(Serialize)]
struct Report {
    /// UUID of the volume.
    volume_id: String,
    /// What `first` and `second` are.
    first: String,
    second: String,
    /// Both have everything up to this epoch. A fork file may hold more that both have: it was
    /// saved from there on.
    common_epoch: u64,
    /// Up to this epoch the fork's backing held more or other than the volume: the fork file has
    /// what a full copy replaced. Then no epoch is known that both have.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_epoch: Option<u64>,
    /// Bytes of the backing that the fork file has.
    backing_bytes: u64,
    first_epochs: Vec<EpochRow>,
    second_epochs: Vec<EpochRow>,
    ranges: Vec<RangeRow>,
    /// Sum over all ranges.
    bytes: u64,
}

#[derive(Serialize)]
struct EpochRow {
    epoch: u64,
    term: u64,
    chain: String,
    sealed_ms: u64,
    records: u64,
    payload_bytes: u64,
}

#[derive(Serialize)]
struct RangeRow {
    lba: u64,
    sectors: u64,
    bytes: u64,
    /// `first`, `second` or `both`: who changed it since.
    changed_by: &'static str,
    first_epoch: Option<u64>,
    second_epoch: Option<u64>,
}

impl Report {
    fn new(identity: &LogIdentity, names: [String; 2], common: Epoch, ranges: &[Range]) -> Self {
        let [first, second] = names;
        Self {
            volume_id: identity.volume.to_string(),
            first,
            second,
            common_epoch: common.0,
            backing_epoch: None,
            backing_bytes: 0,
            first_epochs: Vec::new(),
            second_epochs: Vec::new(),
            bytes: ranges
                .iter()
                .map(|range| range.sectors * SECTOR_BYTES)
                .sum(),
            ranges: ranges.iter().map(range_row).collect(),
        }
    }

    fn text(&self) -> String {
        let common = match self.backing_epoch {
            None => format!("at least up to epoch {}", self.common_epoch),
            Some(epoch) => format!(
                "unknown; the first has {} bytes of its backing as it was at epoch {epoch}",
                self.backing_bytes
            ),
        };
        let mut text = format!(
            "volume  {}\nfirst   {}\nsecond  {}\ncommon  {common}\n",
            self.volume_id, self.first, self.second
        );
        for (name, epochs) in [
            ("first", &self.first_epochs),
            ("second", &self.second_epochs),
        ] {
            if let (Some(from), Some(to)) = (epochs.first(), epochs.last()) {
                let (from, to, term) = (from.epoch, to.epoch, to.term);
                text += &format!("only the {name}: epochs {from} to {to}, term {term}\n");
            }
        }
        if self.ranges.is_empty() {
            return text + "nothing differs\n";
        }
        let header = [
            "LBA",
            "sectors",
            "bytes",
            "changed by",
            "epoch, first",
            "epoch, second",
        ];
        let mut table = Table::new();
        table.load_preset(NOTHING).set_header(header);
        let epoch = |epoch: Option<u64>| epoch.map_or_else(|| "-".to_owned(), |n| n.to_string());
        for row in &self.ranges {
            table.add_row([
                row.lba.to_string(),
                row.sectors.to_string(),
                row.bytes.to_string(),
                row.changed_by.to_owned(),
                epoch(row.first_epoch),
                epoch(row.second_epoch),
            ]);
        }
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        text + &format!(
            "{table}\n{} bytes in {} ranges\n",
            self.bytes,
            self.ranges.len()
        )
    }
}

fn range_row(range: &Range) -> RangeRow {
    RangeRow {
        lba: range.lba,
        sectors: range.sectors,
        bytes: range.sectors * SECTOR_BYTES,
        changed_by: match range.side {
            Side::First => "first",
            Side::Second => "second",
            Side::Both => "both",
        },
        first_epoch: range.first.map(|epoch| epoch.0),
        second_epoch: range.second.map(|epoch| epoch.0),
    }
}

fn epoch_rows<'a>(frames: impl IntoIterator<Item = &'a Found>) -> Vec<EpochRow> {
    let row = |found: &Found| {
        let header = &found.head.header;
        EpochRow {
            epoch: header.epoch.0,
            term: header.term.counter,
            chain: found.head.chain.to_string(),
            sealed_ms: header.sealed_ms,
            records: u64::from(header.records),
            payload_bytes: header.payload_bytes(),
        }
    };
    frames.into_iter().map(row).collect()
}

fn compare_fork(cli: &Cli, name: &str, args: &DiffArgs) -> Result<Report, AnyError> {
    let config = load(cli)?;
    let section = config.volume(name).ok_or_else(|| {
        let path = config.path.display();
        format!("{path} has no volume {name:?}")
    })?;
    let identity = identity(cli, section)?;
    let path = match &args.fork {
        Some(path) => path.clone(),
        None => only_fork(&config, name)?,
    };
    let shown = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let file = File::open(&path).map_err(|error| shown(&error))?;
    let end = file.metadata()?.len();
    let mut fork = OfFile(file);
    let run = Run {
        from: 0,
        end,
        after: None,
        sure_through: Epoch(u64::MAX),
    };
    let frames = read_run(&mut fork, &identity, run).map_err(|error| shown(&error))?;
    let first = frames.first().ok_or_else(|| shown(&"it holds no frame"))?;
    let before = Epoch(first.head.header.epoch.0.saturating_sub(1));
    let (backing, epochs): (Vec<_>, Vec<_>) =
        frames.iter().partition(|found| found.is_of_backing());
    let common = if backing.is_empty() { before } else { Epoch(0) };
    let changes = Changes::of(&frames);
    let (second, ranges) = match &args.image {
        Some(image) => {
            let mut volume = OfFile(File::open(image)?);
            let ranges = against_volume(&changes, &mut fork, &mut volume)?;
            (image.display().to_string(), ranges)
        }
        None => {
            let mut volume = OfExport(serve(section)?);
            let ranges = against_volume(&changes, &mut fork, &mut volume)?;
            (format!("volume {name} as it is served"), ranges)
        }
    };
    let names = [format!("fork {}", path.display()), second];
    Ok(Report {
        first_epochs: epoch_rows(epochs),
        backing_epoch: (!backing.is_empty()).then_some(before.0),
        backing_bytes: backing
            .iter()
            .flat_map(|found| &found.head.records)
            .map(|record| u64::from(record.sectors) * SECTOR_BYTES)
            .sum(),
        ..Report::new(&identity, names, common, &ranges)
    })
}

/// From the daemon if it runs, else from the log.
fn identity(cli: &Cli, section: &VolumeSection) -> Result<LogIdentity, AnyError> {
    let status = connect(cli).and_then(|mut client| Ok(client.status()?));
    let volumes = status.map(|status| status.volumes).unwrap_or_default();
    let state = volumes
        .into_iter()
        .find(|volume| volume.name == section.name);
    if let Some(state) = state.and_then(|volume| volume.state) {
        let (id, nonce) = (state.volume_id, state.birth_nonce);
        let token = format!(
            "hn4v1:{id}:{nonce}:{}:{}",
            state.size_bytes, state.sector_bytes
        );
        return Ok(token.parse::<IdentityToken>()?.0);
    }
    let options = DeviceOptions {
        lock_patience: Duration::ZERO,
        ..section.log_options()
    };
    Ok(attach::inspect_log(section, options)?.0.identity)
}

fn only_fork(config: &Config, name: &str) -> Result<PathBuf, AnyError> {
    let folder = &config.node.state_dir;
    let prefix = format!("{name}-after-epoch-");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let file = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if file.starts_with(&prefix) && file.ends_with(".fork") {
            found.push(path);
        }
    }
    found.sort();
    match found.as_slice() {
        [path] => Ok(path.clone()),
        [] => Err(format!("{} holds no fork of volume {name}", folder.display()).into()),
        many => {
            let names: Vec<String> = many.iter().map(|path| path.display().to_string()).collect();
            Err(format!("choose one with --fork: {}", names.join(", ")).into())
        }
    }
}

/// Connects to the volume as a client.
fn serve(section: &VolumeSection) -> Result<Client, AnyError> {
    let address = match section.listen.first() {
        Some(Listen::Unix(path)) => Address::Unix(path.clone()),
        Some(Listen::Tcp(address)) => Address::Tcp(*address),
        None => return Err("the volume has no listen sockets; use --image".into()),
    };
    let client = Client::connect(&address, &section.name, ClientOptions::default());
    client.map_err(|error| {
        let name = &section.name;
        format!(
            "volume {name} is not served here: {error}; start hn4-replicad, or stop it in order \
             and use --image with the backing"
        )
        .into()
    })
}

fn compare_logs(first: &Path, second: &Path) -> Result<Report, AnyError> {
    let (mut a, mut b) = (OfLog::open(first)?, OfLog::open(second)?);
    if a.identity != b.identity {
        return Err(format!(
            "{} is of volume {}, {} of {}; both must be copies of one",
            first.display(),
            IdentityToken(a.identity),
            second.display(),
            IdentityToken(b.identity)
        )
        .into());
    }
    let identity = a.identity;
    let (frames_a, frames_b) = (a.frames()?, b.frames()?);
    let base = |log: &OfLog| (log.superblock.retained, log.superblock.retained_chain);
    let (epoch, [from_a, from_b]) = common((base(&a), &frames_a), (base(&b), &frames_b))?;
    let (only_a, only_b) = (&frames_a[from_a..], &frames_b[from_b..]);
    let (changes_a, changes_b) = (Changes::of(only_a), Changes::of(only_b));
    let ranges = between((&changes_a, &mut a), (&changes_b, &mut b))?;
    let names = [first, second].map(|path| format!("log {}", path.display()));
    Ok(Report {
        first_epochs: epoch_rows(only_a),
        second_epochs: epoch_rows(only_b),
        ..Report::new(&identity, names, epoch, &ranges)
    })
}

struct OfFile(File);

impl Source for OfFile {
    fn read(&mut self, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        self.0.read_exact_at(&mut buffer, at)?;
        Ok(buffer)
    }
}

struct OfExport(Client);

impl Source for OfExport {
    fn read(&mut self, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
        let bytes = u32::try_from(bytes).map_err(io::Error::other)?;
        self.0.read(at, bytes).map_err(io::Error::other)
    }
}

/// A log that no daemon has open. Addresses are offsets in the log as frames name them.
struct OfLog {
    medium: DeviceMedium,
    identity: LogIdentity,
    superblock: Superblock,
    ring_bytes: u64,
}

impl OfLog {
    fn open(path: &Path) -> Result<Self, AnyError> {
        let options = DeviceOptions {
            read_only: true,
            // A daemon that was killed may hold it for a moment.
            lock_patience: Duration::from_secs(5),
            ..DeviceOptions::default()
        };
        let device = Device::open(path, options)?;
        let mut medium = DeviceMedium::new(&device)?;
        let found = recovery::inspect(&mut medium);
        let (header, superblock, _) =
            found.map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self {
            medium,
            identity: header.identity,
            superblock,
            ring_bytes: header.ring_bytes,
        })
    }

    fn frames(&mut self) -> Result<Vec<Found>, AnyError> {
        let (identity, superblock) = (self.identity, self.superblock);
        let from = superblock.retained_offset.0;
        let run = Run {
            from,
            end: from + self.ring_bytes,
            after: Some((superblock.retained, superblock.retained_chain)),
            sure_through: superblock.durable,
        };
        Ok(read_run(self, &identity, run)?)
    }
}

impl Source for OfLog {
    fn read(&mut self, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
        // Whole blocks are read; contents of a sector may be asked for.
        let (mut from, end) = (at / BLOCK_BYTES * BLOCK_BYTES, at + bytes);
        let skipped = usize::try_from(at - from).map_err(io::Error::other)?;
        let mut all = Vec::new();
        while from < end {
            let in_ring = from % self.ring_bytes;
            let wanted = (end - from).next_multiple_of(BLOCK_BYTES);
            let run = wanted.min(self.ring_bytes - in_ring);
            let count = usize::try_from(run / BLOCK_BYTES).map_err(io::Error::other)?;
            let mut blocks = vec![AlignedBlock([0; 4096]); count];
            self.medium.read(RING_START + in_ring, &mut blocks)?;
            all.extend_from_slice(blocks.as_bytes());
            from += run;
        }
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        all.truncate(skipped + length);
        Ok(all.split_off(skipped))
    }
}
