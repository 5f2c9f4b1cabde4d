//! Instructions per request of the engine's core, counted by callgrind: a figure that a busy
//! machine does not change, so that it can be held to a few percent.
//!
//! What is counted is everything between a decoded request and its answer, with its share of
//! sealing, checksums, log, destage and superblocks; devices answer at once and hold nothing. The
//! program counts itself: valgrind runs it twice, with so many requests and with twice as many,
//! and the difference is what the requests cost, without start and end.
//!
//! **Not here:** the kernel, sockets, and the copy of a payload into its slot.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use hn4::log::{LogIdentity, RING_START, Role};
use hn4::types::{BLOCK_BYTES, Lba, NodeId, SECTORS_PER_BLOCK, VolumeId};
use hn4_engine::arena::{SlotMemory as _, VecArena};
use hn4_engine::core::event::{IoToken, Now, Request, RequestId, Time};
use hn4_engine::core::recovery::{self, AlignedBlock, Medium, NewLog};
use hn4_engine::core::{Action, Actions, Event, Lanes, Volume, VolumeConfig};

use crate::compare::servers::find_program;
use crate::pattern::Random;

/// Requests of the shorter of the two runs.
const REQUESTS: u64 = 8_192;
/// Blocks of the volume.
const BLOCKS: u64 = 1 << 16;
/// Slots of the overlay.
const SLOTS: u32 = 1 << 13;
/// Bytes of the log's ring.
const RING_BYTES: u64 = 32 << 20;
/// Between two requests, on the clock of the core.
const PACE_NS: u64 = 5_000;
/// How far a figure may be from the one that is kept, in percent.
const TOLERANCE_PERCENT: f64 = 5.0;

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Kind {
    /// Random 4 KiB writes, sealed, logged and destaged.
    Write,
    /// One 4 KiB write and one flush.
    WriteFlush,
    /// Random 4 KiB reads of what the overlay has.
    ReadOverlay,
    /// Random 4 KiB reads of what only the backing has.
    ReadBacking,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::WriteFlush => "write-flush",
            Self::ReadOverlay => "read-overlay",
            Self::ReadBacking => "read-backing",
        }
    }
}

/// Options of `hn4-bench instructions`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Compare with the figures in this document, and fail if one is more than 5 % off
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
}

/// Options of the run that is counted.
#[derive(Args, Clone, Copy, Debug)]
pub struct WorkOptions {
    kind: Kind,
    requests: u64,
}

/// A log that is all zeroes at first, in memory, and never written but for its start.
struct Scratch(Vec<AlignedBlock>);

impl Medium for Scratch {
    fn read(&mut self, offset: u64, blocks: &mut [AlignedBlock]) -> io::Result<()> {
        let first = usize::try_from(offset / BLOCK_BYTES).map_err(io::Error::other)?;
        for (at, block) in blocks.iter_mut().enumerate() {
            *block = match self.0.get(first + at) {
                Some(found) => *found,
                None => AlignedBlock([0; 4096]),
            };
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, blocks: &[AlignedBlock]) -> io::Result<()> {
        let first = usize::try_from(offset / BLOCK_BYTES).map_err(io::Error::other)?;
        for (at, block) in blocks.iter().enumerate() {
            let place = self.0.get_mut(first + at);
            *place.ok_or_else(|| io::Error::other("beyond the superblocks"))? = *block;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        RING_START + RING_BYTES
    }
}

/// A volume whose devices answer at once.
struct Bench {
    volume: Volume,
    arena: VecArena,
    actions: Actions,
    answers: VecDeque<IoToken>,
    completed: u64,
    now: Now,
}

impl Bench {
    fn new() -> Result<Self> {
        let start = usize::try_from(RING_START / BLOCK_BYTES)?;
        let mut medium = Scratch(vec![AlignedBlock([0; 4096]); start]);
        let node = NodeId(*b"hn4-bench node 1");
        let new = NewLog {
            identity: LogIdentity {
                volume: VolumeId(*b"hn4-bench volume"),
                birth_nonce: [1; 16],
                size_bytes: BLOCKS * BLOCK_BYTES,
                sector_bytes: 512,
            },
            node,
            lanes: Lanes {
                count: 1,
                stripe_blocks: 256,
            },
            role: Role::Primary,
            seeded: false,
            created_ms: 0,
        };
        recovery::create(&mut medium, &new)?;
        let mut arena = VecArena::new(SLOTS);
        // Nothing was cut off that would have to be written back.
        let mut backing = Scratch(Vec::new());
        let (volume, _) = recovery::open(&mut medium, &mut backing, &mut arena, |header| {
            VolumeConfig::new(header.identity, node, header.ring_bytes, SLOTS as usize)
        })?;
        let mut bench = Self {
            volume,
            arena,
            actions: Actions::default(),
            answers: VecDeque::new(),
            completed: 0,
            now: Now::default(),
        };
        bench.event(Event::Timer);
        Ok(bench)
    }

    /// A step, and the answers of the devices to all that came of it.
    fn event(&mut self, event: Event) {
        let mut next = Some(event);
        while let Some(event) = next {
            self.actions.clear();
            self.volume
                .step(self.now, event, &mut self.arena, &mut self.actions);
            for action in &self.actions.list {
                match action {
                    Action::Complete { result, .. } => self.completed += u64::from(result.is_ok()),
                    Action::Io { token, .. } => self.answers.push_back(*token),
                    _ => {}
                }
            }
            next = self.answers.pop_front().map(|token| Event::IoDone {
                token,
                result: Ok(()),
            });
        }
    }

    fn request(&mut self, id: u64, request: Request) {
        self.now.time = Time(self.now.time.0 + PACE_NS);
        self.event(Event::Request {
            id: RequestId(id),
            request,
        });
    }

    fn write(&mut self, id: u64, block: u64) -> Result<()> {
        ensure!(
            self.volume.admits(&self.arena, 1),
            "the volume has no room though its devices answer at once"
        );
        let slot = self.arena.alloc().context("a free slot")?;
        let request = Request::Write {
            lba: Lba(block * SECTORS_PER_BLOCK),
            sectors: 8,
            fua: false,
            slots: vec![slot],
        };
        self.request(id, request);
        Ok(())
    }

    fn read(&mut self, id: u64, block: u64) -> Result<()> {
        let slot = self.arena.alloc().context("a free slot")?;
        let request = Request::Read {
            lba: Lba(block * SECTORS_PER_BLOCK),
            sectors: 8,
            slots: vec![slot],
        };
        self.request(id, request);
        self.arena.free(slot);
        Ok(())
    }
}

/// The work that is counted.
///
/// # Errors
/// If a request fails, which would make the count meaningless.
pub fn work(options: WorkOptions) -> Result<()> {
    let mut bench = Bench::new()?;
    let mut random = Random::new(7);
    // Few enough that they stay in the overlay.
    let dirty = 1024;
    for block in 0..dirty {
        bench.write(block, block)?;
    }
    let begun = bench.completed;
    let mut expected = options.requests;
    for id in 0..options.requests {
        match options.kind {
            Kind::Write => bench.write(id, random.below(BLOCKS))?,
            Kind::WriteFlush => {
                bench.write(id, random.below(BLOCKS))?;
                bench.request(id, Request::Flush);
                expected += 1;
            }
            Kind::ReadOverlay => bench.read(id, random.below(dirty))?,
            Kind::ReadBacking => bench.read(id, dirty + random.below(BLOCKS - dirty))?,
        }
    }
    let completed = bench.completed - begun;
    ensure!(
        completed == expected,
        "{completed} of {expected} requests were answered"
    );
    Ok(())
}

/// Counts, prints, and checks if asked to.
///
/// # Errors
/// If valgrind is missing, or a figure is too far from the one that is kept.
pub fn run(options: &Options) -> Result<()> {
    let valgrind = find_program("valgrind").context("valgrind is not installed")?;
    let kept = match &options.check {
        Some(path) => {
            Some(std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?)
        }
        None => None,
    };
    let mut off = Vec::new();
    for kind in Kind::value_variants() {
        let once = count(&valgrind, *kind, REQUESTS)?;
        let twice = count(&valgrind, *kind, 2 * REQUESTS)?;
        let found = twice.saturating_sub(once) as f64 / REQUESTS as f64;
        let name = kind.name();
        let Some(kept) = &kept else {
            println!("| {name} | {found:.0} |");
            continue;
        };
        let kept = figure(kept, name)
            .with_context(|| format!("the document has no line \"| {name} | figure |\""))?;
        let percent = (found / kept - 1.0) * 100.0;
        println!("{name}: {found:.0} instructions, {percent:+.1} % against {kept:.0}");
        if percent.abs() > TOLERANCE_PERCENT {
            off.push(name);
        }
    }
    if !off.is_empty() {
        bail!(
            "more than {TOLERANCE_PERCENT} % off: {}; find out why, then keep the new figures",
            off.join(", ")
        );
    }
    Ok(())
}

fn count(valgrind: &Path, kind: Kind, requests: u64) -> Result<u64> {
    let output = Command::new(valgrind)
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["work", kind.name(), &requests.to_string()])
        .output()
        .context("starting valgrind")?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "valgrind: {}", words.trim());
    collected(&words).with_context(|| format!("valgrind said no sum: {}", words.trim()))
}

fn collected(words: &str) -> Option<u64> {
    let line = words.lines().find(|line| line.contains("Collected :"))?;
    line.split_ascii_whitespace().last()?.parse().ok()
}

/// The figure in the second cell of the table line whose first cell is `name`.
fn figure(document: &str, name: &str) -> Option<f64> {
    let mut lines = document.lines();
    let mut cells = lines.find_map(|line| {
        let mut cells = line.strip_prefix('|')?.split('|').map(str::trim);
        (cells.next()? == name).then_some(cells)
    })?;
    cells.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_work_is_answered_in_full() {
        for &kind in Kind::value_variants() {
            let requests = 9000;
            let done = work(WorkOptions { kind, requests });
            assert!(done.is_ok(), "{}: {done:?}", kind.name());
        }
    }

    #[test]
    fn figures_are_found_in_valgrinds_words_and_in_the_document() {
        let words = "==7== Events    : Ir\n==7== Collected : 520274215\n==7==\n";
        assert_eq!(collected(words), Some(520_274_215));
        assert_eq!(collected("==7== no"), None);
        let document = "text\n| request | instructions |\n|---|---|\n| write | 1234 | new |\n";
        assert_eq!(figure(document, "write"), Some(1234.0));
        assert_eq!(figure(document, "write-flush"), None);
    }
}
