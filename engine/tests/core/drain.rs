//! Writers go on for longer than the overlay has room: how long each of them waits.
//!
//! The core alone, on devices that take their time: a write to the backing lasts as long as any
//! other, whatever its size, and a number of them are under way at once, as on a real one.

use std::collections::BTreeMap;

use hn4::log::Role;
use hn4::types::{BLOCK_BYTES, Lba};
use hn4_engine::arena::{SlotMemory, VecArena};
use hn4_engine::core::event::{Control, Disk, Io, IoToken, Now, Request, RequestId, Time};
use hn4_engine::core::recovery;
use hn4_engine::core::{Action, Actions, Event, Volume, VolumeConfig};

use crate::memory::{Memory, NODE, identity};

const SLOTS: u32 = 4096;
const BLOCKS: u64 = 1 << 16;
/// Writers at the same time.
const WRITERS: usize = 8;
/// Microseconds of a write to the backing, to the log, and of a flush or a superblock.
const BACKING_US: u64 = 400;
const LOG_US: u64 = 100;
const FLUSH_US: u64 = 1000;

struct Machine {
    volume: Volume,
    mem: VecArena,
    now_us: u64,
    /// What is under way, by when it ends.
    under_way: BTreeMap<(u64, u64), IoToken>,
    next: u64,
    answered: Vec<RequestId>,
}

impl Machine {
    fn new() -> Self {
        let identity = identity(BLOCKS * BLOCK_BYTES);
        let mut log = Memory::new_log(identity, Role::Primary, 64 << 20);
        let mut mem = VecArena::new(SLOTS);
        let opened = recovery::open(&mut log, &mut Memory::new(Vec::new()), &mut mem, |header| {
            VolumeConfig::new(identity, NODE, header.ring_bytes, SLOTS as usize)
        });
        Self {
            volume: opened.expect("a volume").0,
            mem,
            now_us: 0,
            under_way: BTreeMap::new(),
            next: 0,
            answered: Vec::new(),
        }
    }

    fn step(&mut self, event: Event) {
        let now = Now {
            time: Time(self.now_us * 1000),
            wall_ms: self.now_us / 1000,
        };
        let mut actions = Actions::default();
        self.volume.step(now, event, &mut self.mem, &mut actions);
        for action in actions.list {
            match action {
                Action::Io { token, io } => {
                    let takes = match io {
                        Io::Fsync { .. } => FLUSH_US,
                        _ if token == IoToken::Superblock => FLUSH_US,
                        Io::Write {
                            disk: Disk::Log, ..
                        } => LOG_US,
                        _ => BACKING_US,
                    };
                    self.next += 1;
                    let ends = (self.now_us + takes, self.next);
                    self.under_way.insert(ends, token);
                }
                Action::Complete { id, result } => {
                    assert_eq!(result, Ok(()));
                    self.answered.push(id);
                }
                _ => {}
            }
        }
    }

    /// Goes on to what ends next. Every device has to do something here, all the time.
    fn pass(&mut self) {
        let ((at, _), token) = self.under_way.pop_first().expect("something is under way");
        self.now_us = at;
        let result = Ok(());
        self.step(Event::IoDone { token, result });
    }

    fn write(&mut self, id: u64) {
        // Spread, so that no two of a sweep are neighbours.
        let block = id.wrapping_mul(40_503) % BLOCKS;
        let slot = self.mem.alloc().expect("there is room");
        let request = Request::Write {
            lba: Lba(block * 8),
            sectors: 8,
            fua: false,
            slots: vec![slot],
        };
        let id = RequestId(id);
        self.step(Event::Request { id, request });
    }
}

/// The longest time in microseconds that a writer has waited, and the time that all took.
fn longest_wait(writes: u64, warm_up: u64) -> (u64, u64) {
    let mut machine = Machine::new();
    let mut since = [0; WRITERS];
    let (mut longest, mut started) = (0, 0);
    for id in 0..writes {
        let writer = usize::try_from(id).expect("a small number") % WRITERS;
        while !machine.volume.admits(&machine.mem, 1) {
            machine.pass();
        }
        machine.write(id);
        assert_eq!(machine.answered.pop(), Some(RequestId(id)));
        if id == warm_up {
            started = machine.now_us;
        }
        if id > warm_up {
            longest = longest.max(machine.now_us - since[writer]);
        }
        since[writer] = machine.now_us;
    }
    (longest, machine.now_us - started)
}

#[test]
fn writers_wait_for_a_few_writes_to_the_backing_and_never_for_a_whole_sweep() {
    let sweep_blocks = u64::from(SLOTS) / 4;
    let (writes, warm_up) = (20 * sweep_blocks, 4 * sweep_blocks);
    let (longest, took) = longest_wait(writes, warm_up);
    // Sixteen are under way at once.
    let sweep_us = sweep_blocks / 16 * BACKING_US;
    assert!(
        longest < sweep_us / 4,
        "a writer waited {longest} us, where a sweep takes {sweep_us} us"
    );
    // And none of the backing's speed is lost, but for what a sweep needs besides.
    let least = (writes - warm_up) / 16 * BACKING_US;
    assert!(
        took < least * 3 / 2,
        "{took} us, where the backing needs {least}"
    );
}

/// Writes that a sweep has on their way at once, at most, after so many blocks were written.
fn widest_sweep(blocks: u64, control: Option<Control>) -> usize {
    let mut machine = Machine::new();
    (0..blocks).for_each(|id| machine.write(id));
    let is_sweep = |token: &&IoToken| matches!(token, IoToken::SweepWrite);
    let mut widest = 0;
    // The open epoch is old enough to be sealed; what is durable has rested.
    for (seconds, control) in [(1, None), (3, control)] {
        machine.now_us = seconds * 1_000_000;
        machine.step(Event::Timer);
        if let Some(control) = control {
            let id = RequestId(blocks);
            machine.step(Event::Control { id, control });
        }
        while !machine.under_way.is_empty() {
            widest = widest.max(machine.under_way.values().filter(is_sweep).count());
            machine.pass();
        }
    }
    widest
}

#[test]
fn a_sweep_leaves_the_disk_to_flushes_until_room_is_scarce_or_somebody_waits_for_it() {
    let few = u64::from(SLOTS) / 8;
    assert_eq!(widest_sweep(few, None), 8);
    assert_eq!(widest_sweep(few, Some(Control::Drain)), 32);
    assert_eq!(widest_sweep(u64::from(SLOTS) / 2, None), 32);
}
