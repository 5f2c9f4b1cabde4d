//! On disks with large physical sectors, blocks that a sweep writes in part are in the merge area
//! before they are written in place, and a start writes back what a power cut damaged.
//!
//! The core alone, on disks in memory whose operations complete at once.

use hn4::log::{CopyState, MERGE_AREA, MERGE_BLOCKS, Role, SUPERBLOCK_0, SUPERBLOCK_1, Superblock};
use hn4::types::{BlockIndex, Lba};
use hn4_engine::arena::{SlotMemory, VecArena};
use hn4_engine::core::event::{Control, Disk, Io, IoToken, Now, Request, RequestId, Time};
use hn4_engine::core::recovery::{self, AlignedBlock, Medium, RecoveryError, RecoveryReport};
use hn4_engine::core::{Action, Actions, Event, Volume, VolumeConfig};

use crate::memory::{Memory, NODE, identity, small};

const RING_BYTES: usize = 8 << 20;
const SLOTS: u32 = 4096;
const BLOCKS: usize = 256;
/// Size of the volume.
const SIZE_BYTES: u64 = BLOCKS as u64 * 4096;
/// What the backing holds at first.
const OLD: u8 = 0x11;

/// What a sweep did, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Did {
    /// A block was read from the backing.
    Read(u64),
    /// So many blocks were written into the merge area and flushed.
    Saved(usize),
    /// Byte offset on the backing and length.
    Wrote(u64, usize),
    Zeroed(u64, u64),
    Flushed,
    Superblock,
}

pub(crate) struct Bench {
    volume: Volume,
    mem: VecArena,
    pub(crate) log: Memory,
    pub(crate) backing: Memory,
    pub(crate) did: Vec<Did>,
    /// Reads of a block for the merge area fail so often.
    failing_reads: u32,
    /// What readers were told, and whether they may read.
    pinned: Vec<(u64, bool)>,
    /// The power goes after so many things that were done.
    dies_after: usize,
    requests: u64,
    pub(crate) now_ms: u64,
}

pub(crate) fn open(
    log: &mut Memory,
    backing: &mut Memory,
    merge: bool,
) -> Result<(Volume, VecArena, RecoveryReport), RecoveryError> {
    open_with(log, backing, merge, SLOTS)
}

pub(crate) fn open_with(
    log: &mut Memory,
    backing: &mut Memory,
    merge: bool,
    slots: u32,
) -> Result<(Volume, VecArena, RecoveryReport), RecoveryError> {
    let mut mem = VecArena::new(slots);
    let (volume, report) = recovery::open(log, backing, &mut mem, |header| VolumeConfig {
        merge,
        ..VolumeConfig::new(
            identity(SIZE_BYTES),
            NODE,
            header.ring_bytes,
            slots as usize,
        )
    })?;
    Ok((volume, mem, report))
}

impl Bench {
    pub(crate) fn new() -> Self {
        let log = Memory::new_log(identity(SIZE_BYTES), Role::Primary, RING_BYTES);
        Self::on(log, Memory::new(vec![OLD; BLOCKS * 4096]), true).0
    }

    fn on(mut log: Memory, mut backing: Memory, merge: bool) -> (Self, RecoveryReport) {
        let (volume, mem, report) = open(&mut log, &mut backing, merge).expect("a volume");
        let mut bench = Self {
            volume,
            mem,
            log,
            backing,
            did: Vec::new(),
            failing_reads: 0,
            pinned: Vec::new(),
            dies_after: usize::MAX,
            requests: 0,
            now_ms: 0,
        };
        bench.step(Event::Timer);
        (bench, report)
    }

    fn step(&mut self, event: Event) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut actions = Actions::default();
            let now = Now {
                time: Time(self.now_ms * 1_000_000),
                wall_ms: self.now_ms,
            };
            self.volume.step(now, event, &mut self.mem, &mut actions);
            for action in std::mem::take(&mut actions.list) {
                match action {
                    Action::Io { token, io } if self.did.len() < self.dies_after => {
                        let result = self.carry_out(token, &io, &actions);
                        events.push_back(Event::IoDone { token, result });
                    }
                    Action::Pinned { id, generation } => {
                        self.pinned.push((id.0, generation.is_some()));
                    }
                    _ => {}
                }
            }
        }
    }

    fn carry_out(&mut self, token: IoToken, io: &Io, actions: &Actions) -> Result<(), i32> {
        let disk = |disk: Disk, log, backing| match disk {
            Disk::Log => log,
            Disk::Backing | Disk::Shadow => backing,
        };
        match io {
            Io::Write {
                disk: on,
                offset,
                segs,
                then_fsync,
            } => {
                let target: &mut Memory = disk(*on, &mut self.log, &mut self.backing);
                let mut at = small(*offset);
                let segs = &actions.segs[segs.clone()];
                for seg in segs {
                    let from = usize::from(seg.offset);
                    let bytes = &self.mem.bytes(seg.slot)[from..from + usize::from(seg.bytes)];
                    target.bytes[at..at + bytes.len()].copy_from_slice(bytes);
                    at += bytes.len();
                }
                match token {
                    IoToken::MergeWrite => {
                        assert!(*then_fsync && *offset == MERGE_AREA && *on == Disk::Log);
                        self.did.push(Did::Saved(segs.len() - 1));
                    }
                    IoToken::SweepWrite => self.did.push(Did::Wrote(*offset, at - small(*offset))),
                    IoToken::Superblock => self.did.push(Did::Superblock),
                    _ => {}
                }
            }
            Io::Read { offset, segs, .. } => {
                assert!(matches!(token, IoToken::MergeRead(_)), "{token:?}");
                if self.failing_reads > 0 {
                    self.failing_reads -= 1;
                    return Err(5);
                }
                let [seg] = &actions.segs[segs.clone()] else {
                    panic!("one block at a time");
                };
                let at = small(*offset);
                let block = &self.backing.bytes[at..at + 4096];
                self.mem.bytes_mut(seg.slot).copy_from_slice(block);
                self.did.push(Did::Read(offset / 4096));
            }
            Io::Fsync {
                disk: Disk::Backing,
            } => self.did.push(Did::Flushed),
            Io::Fsync { .. } => {}
            Io::Zero { offset, bytes, .. } => {
                let (at, end) = (small(*offset), small(offset + bytes));
                self.backing.bytes[at..end].fill(0);
                self.did.push(Did::Zeroed(*offset, *bytes));
            }
        }
        Ok(())
    }

    pub(crate) fn ask(&mut self, request: Request) {
        self.requests += 1;
        let id = RequestId(self.requests);
        self.step(Event::Request { id, request });
    }

    /// Writes sectors of one block.
    pub(crate) fn write(&mut self, lba: u64, sectors: u32, byte: u8) {
        let slot = self.mem.alloc().expect("a slot");
        self.mem.bytes_mut(slot).fill(byte);
        self.ask(Request::Write {
            lba: Lba(lba),
            sectors,
            fua: false,
            slots: vec![slot],
        });
    }

    /// Everything goes to the backing. What the sweep did.
    fn drain(&mut self) -> Vec<Did> {
        self.did.clear();
        let id = RequestId(u64::MAX);
        let control = Control::Drain;
        self.step(Event::Control { id, control });
        let rest = |did: &Did| *did != Did::Superblock;
        self.did.iter().copied().filter(rest).collect()
    }

    fn sector(&self, lba: u64) -> u8 {
        let sector = &self.backing.bytes[small(lba * 512)..small(lba * 512) + 512];
        assert!(sector.iter().all(|&byte| byte == sector[0]), "LBA {lba}");
        sector[0]
    }
}

#[test]
fn a_block_that_is_written_in_part_is_saved_whole_and_durably_before_it_is_written_whole() {
    let mut bench = Bench::new();
    bench.write(8, 8, 1);
    bench.write(18, 1, 2);
    bench.write(21, 2, 3);
    bench.write(24, 8, 4);
    let done = [
        Did::Read(2),
        Did::Saved(1),
        Did::Wrote(4096, 3 * 4096),
        Did::Flushed,
    ];
    assert_eq!(bench.drain(), done);
    let found: Vec<u8> = (16..24).map(|lba| bench.sector(lba)).collect();
    assert_eq!(found, [OLD, OLD, 2, OLD, OLD, 3, 3, OLD]);
}

#[test]
fn whole_blocks_and_blocks_that_are_zeroed_first_cost_nothing() {
    let mut bench = Bench::new();
    bench.write(8, 8, 1);
    // Whole, though in two epochs.
    bench.write(16, 3, 2);
    bench.ask(Request::Flush);
    bench.write(19, 5, 3);
    bench.ask(Request::Zero {
        lba: Lba(64),
        sectors: 16,
        fua: false,
        trim: true,
        edges: Vec::new(),
    });
    bench.ask(Request::Flush);
    bench.write(65, 1, 4);
    bench.ask(Request::Flush);
    let done = bench.drain();
    let costs = |did: &Did| matches!(did, Did::Read(_) | Did::Saved(_));
    assert!(!done.iter().any(costs), "{done:?}");
    let flushes = done.iter().filter(|&&did| did == Did::Flushed).count();
    assert_eq!(flushes, 1);
    assert_eq!((bench.sector(64), bench.sector(65)), (0, 4));
}

#[test]
fn what_is_newer_than_the_cut_is_not_merged() {
    let mut bench = Bench::new();
    bench.write(16, 1, 1);
    bench.drain();
    bench.write(16, 1, 2);
    bench.ask(Request::Flush);
    // In the open epoch while the sweep of the one before it is planned.
    bench.dies_after = 0;
    bench.did.clear();
    bench.write(17, 1, 3);
    bench.dies_after = usize::MAX;
    bench.drain();
    let found: Vec<u8> = (16..19).map(|lba| bench.sector(lba)).collect();
    assert_eq!(found, [2, 3, OLD]);
}

#[test]
fn the_area_is_written_over_only_when_what_it_held_is_flushed_in_place() {
    let mut bench = Bench::new();
    let blocks = 2 * MERGE_BLOCKS as u64 + 1;
    for block in 0..blocks {
        bench.write(16 * block, 1, 5);
    }
    let done = bench.drain();
    let order: Vec<Did> = done
        .into_iter()
        .filter(|did| matches!(did, Did::Saved(_) | Did::Flushed))
        .collect();
    let full = Did::Saved(MERGE_BLOCKS);
    let (last, flush) = (Did::Saved(1), Did::Flushed);
    assert_eq!(order, [full, flush, full, flush, last, flush]);
    // The flush at the end of a sweep counts for the next one.
    bench.write(1, 1, 6);
    let next = [
        Did::Read(0),
        Did::Saved(1),
        Did::Wrote(0, 4096),
        Did::Flushed,
    ];
    assert_eq!(bench.drain(), next);
}

#[test]
fn a_block_that_cannot_be_read_is_written_in_part() {
    let mut bench = Bench::new();
    bench.write(18, 1, 2);
    bench.failing_reads = 2;
    let done = bench.drain();
    assert_eq!(done[..2], [Did::Read(2), Did::Saved(1)], "read again");
    bench.write(18, 1, 3);
    bench.failing_reads = 3;
    assert_eq!(bench.drain(), [Did::Wrote(18 * 512, 512), Did::Flushed]);
    assert!(bench.volume.failed().is_none());
}

/// Cuts the power after each thing that a sweep does, damages whatever it may have been writing,
/// and looks whether everything beside it is there after the next start.
#[test]
fn a_power_cut_at_any_step_damages_nothing_beside_what_was_being_written() {
    let partial: Vec<u64> = (0..2 * MERGE_BLOCKS as u64).map(|at| 3 * at).collect();
    let mut restored = 0;
    for dies_after in 1.. {
        let mut bench = Bench::new();
        for &block in &partial {
            bench.write(8 * block + 2, 1, 7);
        }
        bench.ask(Request::Flush);
        bench.did.clear();
        bench.dies_after = dies_after;
        let id = RequestId(u64::MAX);
        let control = Control::Drain;
        bench.step(Event::Control { id, control });
        let over = bench.did.len() < dies_after;
        let flushed = bench.did.iter().rposition(|&did| did == Did::Flushed);
        for did in &bench.did[flushed.map_or(0, |at| at + 1)..] {
            if let Did::Wrote(offset, bytes) = *did {
                bench.backing.bytes[small(offset)..small(offset) + bytes].fill(0xDB);
            }
        }
        // Started with the override taken back: what was begun is still brought to its end.
        let merge = dies_after % 2 == 0;
        let (mut next, report) = Bench::on(bench.log, bench.backing, merge);
        restored += report.restored_blocks;
        next.drain();
        for block in 0..BlockIndex(3 * partial.len() as u64).0 {
            for lba in 8 * block..8 * block + 8 {
                let written = partial.contains(&block) && lba % 8 == 2;
                let expected = if written { 7 } else { OLD };
                assert_eq!(next.sector(lba), expected, "after {dies_after} at {lba}");
            }
        }
        if over {
            break;
        }
    }
    assert!(restored > 0, "no cut needed the area");
}

#[test]
fn a_batch_of_a_sweep_that_was_recorded_is_never_written_back() {
    let mut bench = Bench::new();
    bench.write(18, 1, 2);
    bench.drain();
    bench.write(16, 8, 3);
    bench.drain();
    let (next, report) = Bench::on(bench.log, bench.backing, true);
    assert_eq!(report.restored_blocks, 0);
    assert!((16..24).all(|lba| next.sector(lba) == 3));
}

#[test]
fn an_area_of_an_earlier_start_is_never_written_back() {
    let mut bench = Bench::new();
    bench.write(18, 1, 2);
    bench.ask(Request::Flush);
    bench.did.clear();
    // Saved, and the power goes.
    bench.dies_after = 3;
    bench.drain();
    let (log, mut backing) = (bench.log, bench.backing);
    let mut once = log.clone();
    let (_, _, report) = open(&mut once, &mut backing, true).expect("a volume");
    assert_eq!(report.restored_blocks, 1);
    let (_, _, report) = open(&mut once, &mut backing, true).expect("a volume");
    assert_eq!(report.restored_blocks, 0, "it was of another session");
    // A torn area counts as none: nothing of it had been written in place.
    let mut torn = log;
    torn.bytes[small(MERGE_AREA) + 4096 + 100] ^= 1;
    let (_, _, report) = open(&mut torn, &mut backing, true).expect("a volume");
    assert_eq!(report.restored_blocks, 0);
}

/// Makes the log that of a replica, as if it had been one when the power went.
fn demote(log: &mut Memory) {
    become_replica(log, CopyState::Usable);
}

pub(crate) fn become_replica(log: &mut Memory, copy: CopyState) {
    record(log, |superblock| {
        superblock.role = Role::Replica;
        superblock.copy = copy;
    });
}

/// Writes the next superblock.
pub(crate) fn record(log: &mut Memory, change: impl FnOnce(&mut Superblock)) {
    let (_, mut superblock, slot) = recovery::inspect(log).expect("a log");
    superblock.generation += 1;
    change(&mut superblock);
    let mut block = AlignedBlock([0; 4096]);
    superblock.encode(&identity(SIZE_BYTES), &mut block.0);
    let other = [SUPERBLOCK_0, SUPERBLOCK_1][1 - slot];
    log.write(other, &[block]).expect("written");
}

#[test]
fn a_reader_of_a_replica_waits_until_a_sweep_that_was_cut_off_is_done_again() {
    let mut bench = Bench::new();
    for block in 0..40 {
        bench.write(16 * block, 8, 7);
    }
    bench.ask(Request::Flush);
    bench.did.clear();
    // The superblock says what is to come, and a few of the writes reach the backing.
    bench.dies_after = 4;
    bench.drain();
    let written = |bench: &Bench| {
        (0..40)
            .filter(|block| bench.sector(16 * block) == 7)
            .count()
    };
    let before = written(&bench);
    assert!((1..40).contains(&before), "{before} of 40: a mix");
    demote(&mut bench.log);
    let (mut next, _) = Bench::on(bench.log, bench.backing, true);
    next.dies_after = 0;
    let id = RequestId(77);
    next.step(Event::Pin { id });
    assert_eq!(next.pinned, [], "the backing is a mix");
    assert_eq!(written(&next), before);
    // Nothing else has to ask for the sweep.
    let (mut next, _) = Bench::on(next.log, next.backing, true);
    next.step(Event::Pin { id });
    assert_eq!(next.pinned, [(77, true)]);
    assert_eq!(written(&next), 40);
}

#[test]
fn a_reader_that_comes_while_memory_is_tight_waits_for_it_for_a_while() {
    let mut log = Bench::new().log;
    demote(&mut log);
    let (mut bench, _) = Bench::on(log, Memory::new(vec![OLD; BLOCKS * 4096]), true);
    let mut taken: Vec<_> = std::iter::from_fn(|| bench.mem.alloc()).collect();
    let pin = |id: u64| Event::Pin { id: RequestId(id) };
    bench.step(pin(1));
    bench.now_ms = 9_000;
    bench.step(pin(2));
    assert_eq!(bench.pinned, [], "they wait");
    bench.now_ms = 10_000;
    bench.step(Event::Timer);
    assert_eq!(bench.pinned, [(1, false)], "not for ever");
    for slot in taken.drain(..) {
        bench.mem.free(slot);
    }
    bench.step(Event::Timer);
    assert_eq!(bench.pinned, [(1, false), (2, true)]);
    assert_eq!(bench.volume.readers(), 1);
}
