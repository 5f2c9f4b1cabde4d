//! Reading ahead while a log is recovered.
//!
//! Recovery reads from the first frame to the last, and checks and copies what it has read: without
//! this the disk would idle meanwhile, and recovery while the disk reads. Once reads follow each
//! other the next ones are made by threads, a few at a time.
//!
//! Not here: how much is read at once, which recovery decides.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use hn4::types::BLOCK_BYTES;
use zerocopy::IntoBytes;

use super::medium::DeviceMedium;
use crate::core::recovery::{AlignedBlock, Medium};

/// Reads on their way at once, each in a thread.
const DEPTH: usize = 4;
/// Smaller reads are not worth a hand-over between threads.
const LEAST_BLOCKS: usize = 64;

type Blocks = Vec<AlignedBlock>;

/// What a thread is to read.
struct Job {
    offset: u64,
    into: Blocks,
    answer: SyncSender<io::Result<Blocks>>,
}

/// A read that was not asked for yet.
struct Ahead {
    offset: u64,
    count: usize,
    answer: Receiver<io::Result<Blocks>>,
}

/// A thread that reads. It has a descriptor of its own, and with it the device's lock, so it is
/// gone when this is.
struct Reader {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.jobs = None;
        let _nothing_to_tell = self.thread.take().map(JoinHandle::join);
    }
}

/// A [`Medium`] that reads ahead.
pub(super) struct ReadAhead {
    medium: DeviceMedium,
    /// Started with the first reads that follow each other; none if that fails.
    readers: Vec<Reader>,
    /// Whose turn it is.
    turn: usize,
    /// In the order of their offsets, one behind the other.
    ahead: VecDeque<Ahead>,
    spare: Vec<Blocks>,
    /// Where the last read ended.
    end: u64,
}

impl ReadAhead {
    pub(super) fn new(medium: DeviceMedium) -> Self {
        Self {
            medium,
            readers: Vec::new(),
            turn: 0,
            ahead: VecDeque::new(),
            spare: Vec::new(),
            end: 0,
        }
    }

    /// Without what was read ahead.
    pub(super) fn into_inner(self) -> DeviceMedium {
        self.medium
    }

    fn start_readers(&mut self) {
        while self.readers.len() < DEPTH {
            let Ok(file) = self.medium.file.try_clone() else {
                return;
            };
            let (jobs, todo) = channel();
            let read = move || work(&file, &todo);
            let builder = std::thread::Builder::new().name("read-ahead".to_owned());
            let Ok(thread) = builder.spawn(read) else {
                return;
            };
            let (jobs, thread) = (Some(jobs), Some(thread));
            self.readers.push(Reader { jobs, thread });
        }
    }

    /// Has the reads made that would come next.
    fn read_on(&mut self, count: usize) {
        self.start_readers();
        let bytes = count as u64 * BLOCK_BYTES;
        let last = self.ahead.back();
        let mut offset = last.map_or(self.end, |ahead| ahead.offset + bytes);
        while self.ahead.len() < self.readers.len() && offset + bytes <= self.medium.size_bytes() {
            let mut into = self.spare.pop().unwrap_or_default();
            into.resize(count, AlignedBlock([0; 4096]));
            let (answer, wait) = sync_channel(1);
            let job = Job {
                offset,
                into,
                answer,
            };
            self.turn = (self.turn + 1) % self.readers.len();
            let jobs = self.readers[self.turn].jobs.as_ref();
            if jobs.is_none_or(|jobs| jobs.send(job).is_err()) {
                return;
            }
            self.ahead.push_back(Ahead {
                offset,
                count,
                answer: wait,
            });
            offset += bytes;
        }
    }

    /// Fills the blocks with what was read ahead, if it was. A failed read says nothing: it is made
    /// again by who asks for it.
    fn take(&mut self, offset: u64, blocks: &mut [AlignedBlock]) -> bool {
        let fits = |ahead: &Ahead| ahead.offset == offset && ahead.count == blocks.len();
        let Some(ahead) = self.ahead.pop_front().filter(fits) else {
            return false;
        };
        let Ok(Ok(read)) = ahead.answer.recv() else {
            return false;
        };
        blocks.copy_from_slice(&read);
        self.spare.push(read);
        true
    }
}

fn work(file: &File, todo: &Receiver<Job>) {
    for mut job in todo {
        let read = file.read_exact_at(job.into.as_mut_bytes(), job.offset);
        let _no_longer_wanted = job.answer.send(read.map(|()| job.into));
    }
}

impl Medium for ReadAhead {
    fn read(&mut self, offset: u64, blocks: &mut [AlignedBlock]) -> io::Result<()> {
        let follows = offset == self.end && blocks.len() >= LEAST_BLOCKS;
        if !follows || !self.take(offset, blocks) {
            self.ahead.clear();
            self.medium.read(offset, blocks)?;
        }
        self.end = offset + blocks.as_bytes().len() as u64;
        if follows {
            self.read_on(blocks.len());
        }
        Ok(())
    }

    /// What was read ahead may be older than this.
    fn write(&mut self, offset: u64, blocks: &[AlignedBlock]) -> io::Result<()> {
        self.ahead.clear();
        self.medium.write(offset, blocks)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.medium.flush()
    }

    fn size_bytes(&self) -> u64 {
        self.medium.size_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: u64 = 1000;

    fn block(number: u64, round: u8) -> AlignedBlock {
        let mut block = AlignedBlock([round; 4096]);
        block.0[..8].copy_from_slice(&number.to_le_bytes());
        block
    }

    fn medium() -> ReadAhead {
        let file = tempfile::tempfile().expect("a file");
        for number in 0..BLOCKS {
            let at = number * BLOCK_BYTES;
            file.write_all_at(&block(number, 0).0, at).expect("room");
        }
        ReadAhead::new(DeviceMedium {
            file,
            size_bytes: BLOCKS * BLOCK_BYTES,
        })
    }

    /// Reads blocks and says whether each is what was last written there.
    fn check(medium: &mut ReadAhead, from: u64, count: u64, round: impl Fn(u64) -> u8) {
        let mut blocks = vec![AlignedBlock([0xFF; 4096]); usize::try_from(count).expect("few")];
        let read = medium.read(from * BLOCK_BYTES, &mut blocks);
        read.expect("within the file");
        for (number, read) in (from..).zip(&blocks) {
            let expected = block(number, round(number));
            assert!(read.0 == expected.0, "block {number} of {from} + {count}");
        }
    }

    #[test]
    fn what_was_read_ahead_is_what_is_there() {
        let mut medium = medium();
        let unchanged = |_| 0;
        for (from, count) in [(0, 1), (1, 2), (3, 64), (67, 64), (131, 64), (195, 64)] {
            check(&mut medium, from, count, unchanged);
        }
        assert_eq!(medium.ahead.len(), DEPTH, "it does read ahead");
        // Of another size, somewhere else, and on from there to the very end.
        check(&mut medium, 259, 100, unchanged);
        check(&mut medium, 10, 5, unchanged);
        for from in (400..1000).step_by(100) {
            check(&mut medium, from, 100, unchanged);
        }
        assert_eq!(medium.ahead.len(), 0, "nothing lies behind the end");
        let mut blocks = vec![AlignedBlock([0; 4096]); 100];
        let beyond = medium.read(BLOCKS * BLOCK_BYTES, &mut blocks);
        assert!(beyond.is_err());
        check(&mut medium, 0, 64, unchanged);
        assert!(medium.into_inner().file.metadata().is_ok());
    }

    #[test]
    fn what_was_written_since_is_read() {
        let mut medium = medium();
        for from in (0..192).step_by(64) {
            check(&mut medium, from, 64, |_| 0);
        }
        assert_eq!(medium.ahead.len(), DEPTH);
        let written = medium.write(200 * BLOCK_BYTES, &[block(200, 7)]);
        written.expect("room");
        for from in (192..448).step_by(64) {
            check(
                &mut medium,
                from,
                64,
                |number| if number == 200 { 7 } else { 0 },
            );
        }
    }
}
