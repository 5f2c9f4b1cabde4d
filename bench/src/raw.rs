//! A raw file or block device through the engine's ring, with O_DIRECT.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use hn4_engine::arena::{Arena, SLOT_BYTES, SlotId, SlotMemory};
use hn4_engine::device::{Device, DeviceOptions};
use hn4_engine::ring::{Completion, FileId, Memory, Op, Ring, RingConfig, Seg};

use crate::contents::Contents;
use crate::job::Job;
use crate::pattern::Random;
use crate::target::{Io, Lane};

/// A request that takes longer than this has hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// Opens and locks a file or device.
///
/// # Errors
/// If it is in use, is no file or block device, or cannot do direct I/O.
pub fn open_raw(path: &Path) -> Result<Device> {
    let options = DeviceOptions {
        // Nothing is entrusted to it: a flush is timed, not believed.
        assume_strict_flush: true,
        ..DeviceOptions::default()
    };
    Ok(Device::open(path, options)?)
}

/// One thread's ring, with a fixed buffer for each tag.
pub struct RawLane {
    ring: Ring,
    file: FileId,
    size_bytes: u64,
    /// The slots of each tag's buffer.
    buffers: Vec<Vec<SlotId>>,
    /// What each tag does.
    ios: Vec<Io>,
    contents: Contents,
    segs: Vec<Seg>,
    completions: Vec<Completion>,
}

impl RawLane {
    /// A ring on the calling thread.
    ///
    /// # Errors
    /// If the kernel lacks something, or the block size does not suit the device.
    pub fn new(device: &Device, job: &Job) -> Result<Self> {
        let info = device.info();
        let align = info.offset_align.max(1);
        let lengths = job.lengths.reads.iter().chain(&job.lengths.writes);
        let mut lengths = lengths.map(|portion| portion.bytes);
        if let Some(bad) = lengths.find(|bytes| !bytes.is_multiple_of(align)) {
            bail!(
                "a length of {bad} does not suit {}: direct I/O needs a multiple of {}",
                info.path.display(),
                info.offset_align
            );
        }
        let slot_bytes = u32::try_from(SLOT_BYTES).context("the size of a slot")?;
        let slots_each = job.block_bytes.div_ceil(slot_bytes);
        let mut arena =
            Arena::new_populated(slots_each * job.depth).context("memory for the buffers")?;
        let mut random = Random::new(job.seed);
        let mut buffers = Vec::new();
        for _ in 0..job.depth {
            let mut slots = Vec::new();
            for _ in 0..slots_each {
                let slot = arena.alloc().context("the arena has a slot for each tag")?;
                random.fill(arena.bytes_mut(slot));
                slots.push(slot);
            }
            buffers.push(slots);
        }
        let config = RingConfig {
            operations: job.depth,
            segments: u16::try_from(slots_each).context("bs is too long")?,
            files: 1,
            // As fio hands them over, unless `iodepth_batch` says something else.
            submit_batch: 1,
            read_batch: 1,
            ..RingConfig::default()
        };
        let mut ring = Ring::new(config, arena)?;
        let file = ring.add_file(device.descriptor()?)?;
        Ok(Self {
            ring,
            file,
            size_bytes: info.size_bytes,
            ios: vec![Io::Flush { data_only: true }; buffers.len()],
            buffers,
            contents: Contents::new(job),
            segs: Vec::with_capacity(slots_each as usize),
            completions: Vec::with_capacity(usize::try_from(job.depth)?),
        })
    }
}

impl Lane for RawLane {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn submit(&mut self, io: Io, tag: u32) -> Result<()> {
        let slots = self.buffers.get(tag as usize);
        let slots = slots.context("a tag below the depth")?;
        self.segs.clear();
        let mut left = io.length() as usize;
        for &slot in slots {
            let part = left.min(SLOT_BYTES);
            if part > 0 {
                self.segs.push(Seg::slot(slot, 0, u32::try_from(part)?));
            }
            left -= part;
        }
        if let Io::Write { offset, length } = io
            && self.contents.verifies()
        {
            let data = self.contents.of_write(offset, length, tag);
            for (&slot, part) in slots.iter().zip(data.chunks(SLOT_BYTES)) {
                self.ring.arena_mut().bytes_mut(slot)[..part.len()].copy_from_slice(part);
            }
        }
        if let Some(place) = self.ios.get_mut(tag as usize) {
            *place = io;
        }
        let memory = Memory::slots(&self.segs);
        let file = self.file;
        let op = match io {
            Io::Read { offset, .. } => Op::Read {
                file,
                offset,
                memory,
            },
            Io::Write { offset, .. } => Op::Write {
                file,
                offset,
                memory,
                then_sync: false,
            },
            Io::Flush { data_only } => Op::Sync { file, data_only },
        };
        let taken = self.ring.submit(op, u64::from(tag));
        taken
            .map(drop)
            .map_err(|refused| anyhow!("the ring: {}", refused.why))
    }

    fn wait(&mut self, done: &mut Vec<u32>) -> Result<()> {
        let waited = self.ring.wait(1, Some(PATIENCE), &mut self.completions)?;
        if waited.completions == 0 {
            bail!("no request was completed within {PATIENCE:?}");
        }
        for completion in self.completions.drain(..) {
            let tag = u32::try_from(completion.token).context("a token that was given")?;
            let bytes = completion.result.context("a request failed")?;
            let io = self.ios.get(tag as usize);
            let io = *io.context("a completion of no request")?;
            // A sync moves no bytes; the ring continues what is short.
            if bytes != io.length() {
                bail!("a request of {} bytes moved {bytes}", io.length());
            }
            if let Io::Read { offset, length } = io
                && self.contents.verifies()
            {
                let slots = self.buffers.get(tag as usize).into_iter().flatten();
                let arena = self.ring.arena();
                let mut left = length as usize;
                let pieces = slots.map(|&slot| {
                    let part = left.min(SLOT_BYTES);
                    left -= part;
                    &arena.bytes(slot)[..part]
                });
                self.contents.check(offset, pieces)?;
            }
            done.push(tag);
        }
        Ok(())
    }
}
