//! A block device or image file as the HN4 tools use it: opened and locked, read, and written to
//! by executing a plan.
//!
//! Invariants:
//! - While it is open nobody else has it: a daemon's lock refuses it, and it refuses a daemon.
//! - A plan is checked whole before its first step is executed, and stops at the first failure.
//!
//! Not here: what the bytes mean (`hn4`), and which plan is wanted (`hn4_tools`).

use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hn4::device::{Device, HwFlags, ReadAt};
use hn4::num::index;
use hn4::plan::{Op, Plan};
use hn4::tool;
use hn4_engine::device::{
    Device as EngineDevice, DeviceError, DeviceInfo, DeviceKind, DeviceOptions,
};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};
use thiserror::Error;

use super::hn4_args::{MediumArgs, MediumKind};

const SECTOR_BYTES: u32 = 512;
const PIECE_BYTES: usize = 1 << 20;
/// So much of what may be data is read when looking for some; behind it, samples are looked at.
const LOOK_BYTES: u64 = 256 << 20;
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 64 << 10;

/// Why a device cannot be used.
#[derive(Debug, Error)]
pub enum ToolError {
    /// Opening.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The lock of another process.
    #[error(
        "{}: in use by another process, hn4-replicad most likely. Stop it first; the daemon writes \
         everything back to a backing when it stops", .0.display()
    )]
    InUse(PathBuf),
    /// The system.
    #[error("{}: {doing}: {source}", path.display())]
    Os {
        /// The device.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
    /// A step of a plan that cannot be executed here. Nothing was written.
    #[error("{}: {what}; nothing was written", path.display())]
    Unfit {
        /// The device.
        path: PathBuf,
        /// What is in the way.
        what: String,
    },
    /// A step failed.
    #[error(
        "HW_IO in device at LBA {lba}: found {doing} of {bytes} bytes that fails on {}: {source}, \
         expected success; check the device, then run the command again: until it has succeeded \
         nothing on this device can be relied on", path.display()
    )]
    Step {
        /// The device.
        path: PathBuf,
        /// First sector.
        lba: u64,
        /// The kind of step.
        doing: &'static str,
        /// Its length.
        bytes: u64,
        /// The system's word.
        source: io::Error,
    },
}

/// What it is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Reading; nothing depends on whether a flush is strict.
    Read,
    /// Reading, to tell what a mount on this device would do.
    Judge,
    /// Writing.
    Write,
}

/// A device that is open and locked.
#[derive(Debug)]
pub struct Target {
    file: File,
    path: PathBuf,
    is_block: bool,
    /// The device's own sector.
    logical_bytes: u32,
    /// What HN4 sees.
    pub device: Device,
}

fn os(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> ToolError {
    let path = path.to_owned();
    move |source| ToolError::Os {
        path,
        doing,
        source,
    }
}

impl Target {
    /// Opens and locks a device. Writes nothing.
    ///
    /// # Errors
    /// If it is not there, in use, or no place to write to.
    pub fn open(path: &Path, access: Access, medium: MediumArgs) -> Result<Self, ToolError> {
        let options = DeviceOptions {
            assume_strict_flush: medium.assume_strict_flush,
            read_only: access != Access::Write,
            direct: false,
            lock_patience: Duration::ZERO,
            ..DeviceOptions::default()
        };
        let opened = match EngineDevice::open(path, options) {
            // HN4 itself asks for strict flushes only where a volume is a wormhole.
            Err(DeviceError::CannotJudge { .. }) => {
                let assumed = DeviceOptions {
                    assume_strict_flush: true,
                    ..options
                };
                EngineDevice::open(path, assumed).map(|device| (device, false))
            }
            other => other.map(|device| (device, true)),
        };
        let mut target = match opened {
            Ok((device, strict)) => Self::believed(path, &device, strict)?,
            // What forgets when the power goes can still be read.
            Err(DeviceError::NotStrict { .. }) if access != Access::Write => Self::plain(path)?,
            Err(DeviceError::InUse { .. }) => return Err(ToolError::InUse(path.to_owned())),
            Err(error) => return Err(error.into()),
        };
        if access == Access::Read {
            target.device.hw_flags = target.device.hw_flags.with(HwFlags::STRICT_FLUSH);
        }
        if let Some(zone) = medium.zone_bytes {
            target.device.zone_size = zone;
            target.device.hw_flags = target.device.hw_flags.with(HwFlags::ZNS);
        }
        if let Some(sector) = medium.sector_bytes {
            target.device.sector_size = sector;
        }
        Ok(target)
    }

    fn believed(path: &Path, device: &EngineDevice, strict: bool) -> Result<Self, ToolError> {
        let info = device.info();
        let file = File::from(device.descriptor().map_err(os(path, "opening"))?);
        let mut target = Self::of(path, file, info.size_bytes)?;
        target.device.hw_flags = flags_of(info, strict);
        if target.is_block {
            target.logical_bytes = info.logical_bytes;
            target.device.sector_size = info.logical_bytes;
        }
        Ok(target)
    }

    fn plain(path: &Path) -> Result<Self, ToolError> {
        let mut file = File::open(path).map_err(os(path, "opening"))?;
        match file.try_lock_shared() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ToolError::InUse(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(os(path, "locking")(error)),
        }
        let end = file.seek(SeekFrom::End(0));
        let capacity = end.map_err(os(path, "asking for its size"))?;
        let mut target = Self::of(path, file, capacity)?;
        target.device.hw_flags = HwFlags::default();
        Ok(target)
    }

    fn of(path: &Path, file: File, capacity: u64) -> Result<Self, ToolError> {
        let metadata = file.metadata().map_err(os(path, "looking at it"))?;
        Ok(Self {
            is_block: metadata.file_type().is_block_device(),
            path: path.to_owned(),
            logical_bytes: SECTOR_BYTES,
            device: Device::plain(capacity, SECTOR_BYTES),
            file,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Counts in the sectors of the volume on it, unless the caller knows better.
    #[must_use]
    pub fn in_volume_sectors(mut self, medium: MediumArgs) -> Self {
        if let (None, Some(sector)) = (medium.sector_bytes, tool::probe_sector_size(&self)) {
            self.device.sector_size = sector;
        }
        self
    }

    /// Counts in sectors of this size if the device can.
    #[must_use]
    pub fn in_sectors_of(mut self, bytes: u32) -> Self {
        if bytes >= self.logical_bytes {
            self.device.sector_size = bytes;
        }
        self
    }

    /// Takes the device for what the caller says.
    #[must_use]
    pub fn of_kind(mut self, kind: Option<MediumKind>) -> Self {
        let Some(kind) = kind else { return self };
        let kinds = HwFlags::ROTATIONAL.with(HwFlags::NVM).0;
        let bit = match kind {
            MediumKind::Ssd => HwFlags::default(),
            MediumKind::Hdd => HwFlags::ROTATIONAL,
            MediumKind::Nvm => HwFlags::NVM,
        };
        self.device.hw_flags = HwFlags(self.device.hw_flags.0 & !kinds).with(bit);
        self
    }

    /// Where the device holds anything but zeroes. Of a device with very much data that is all
    /// zeroes, only samples are read.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn first_data(&self) -> Result<Option<u64>, ToolError> {
        let capacity = self.device.capacity;
        let (mut at, mut looked) = (0, 0);
        while looked < LOOK_BYTES {
            let Some(next) = self.next_data(at).filter(|&next| next < capacity) else {
                return Ok(None);
            };
            let length = (PIECE_BYTES as u64).min(capacity - next);
            if let Some(found) = self.data_in(next, length)? {
                return Ok(Some(found));
            }
            (at, looked) = (next + length, looked + length);
        }
        let step = (capacity - at) / SAMPLES;
        for sample in 0..=SAMPLES {
            let length = SAMPLE_BYTES.min(capacity);
            let from = (at + sample * step).min(capacity - length);
            if let Some(found) = self.data_in(from, length)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn data_in(&self, offset: u64, length: u64) -> Result<Option<u64>, ToolError> {
        let mut bytes = vec![0; index(length)];
        self.read_at(offset, &mut bytes)
            .map_err(os(&self.path, "looking for data on it"))?;
        let found = bytes.iter().position(|&byte| byte != 0);
        Ok(found.map(|found| offset + found as u64))
    }

    /// Refuses a plan that cannot be executed here.
    ///
    /// # Errors
    /// [`ToolError::Unfit`].
    pub fn check(&self, plan: &Plan) -> Result<(), ToolError> {
        let unfit = |what: String| {
            Err(ToolError::Unfit {
                path: self.path.clone(),
                what,
            })
        };
        for step in plan.steps.iter().filter(|step| step.fails.is_none()) {
            let (offset, length) = step.op.range();
            if offset
                .checked_add(length)
                .is_none_or(|end| end > self.device.capacity)
            {
                let capacity = self.device.capacity;
                return unfit(format!(
                    "a step at byte {offset} leaves the {capacity} bytes"
                ));
            }
            if self.is_block && matches!(step.op, Op::ZoneReset { .. }) {
                return unfit("zones are reset in image files only, not on devices".to_owned());
            }
        }
        Ok(())
    }

    /// Executes a plan in order; at the end everything is durable.
    ///
    /// # Errors
    /// Before the first step if the plan does not fit, else when a step fails.
    pub fn execute(&self, plan: &Plan) -> Result<(), ToolError> {
        self.check(plan)?;
        // Steps that are known to fail are those that the plan is made around.
        for step in plan.steps.iter().filter(|step| step.fails.is_none()) {
            let (offset, bytes) = step.op.range();
            let (doing, done) = match &step.op {
                Op::Write { offset, data } => {
                    let write = self.write(*offset, data.len(), |at, part| data.copy_to(at, part));
                    ("a write", write)
                }
                Op::Zero { offset, length } => ("a zeroing", self.zero(*offset, *length)),
                Op::Discard { offset, length } => ("a discard", self.discard(*offset, *length)),
                Op::ZoneReset { offset, length } => {
                    let zone = u64::from(self.device.zone_size);
                    let length = if *length == 0 { zone } else { *length };
                    let rest = self.device.capacity.saturating_sub(*offset);
                    ("a zone reset", self.zero(*offset, length.min(rest)))
                }
                Op::Flush => ("a flush", self.file.sync_data()),
            };
            done.map_err(|source| self.failed(offset, doing, bytes, source))?;
        }
        self.file
            .sync_all()
            .map_err(|source| self.failed(0, "a flush", 0, source))
    }

    fn failed(&self, offset: u64, doing: &'static str, bytes: u64, source: io::Error) -> ToolError {
        ToolError::Step {
            path: self.path.clone(),
            lba: offset / self.device.sector(),
            doing,
            bytes,
            source,
        }
    }

    fn write(&self, offset: u64, length: u64, fill: impl Fn(u64, &mut [u8])) -> io::Result<()> {
        let mut buffer = vec![0; PIECE_BYTES.min(index(length))];
        let mut at = 0;
        while at < length {
            let part = buffer.len().min(index(length - at));
            fill(at, &mut buffer[..part]);
            self.file.write_all_at(&buffer[..part], offset + at)?;
            at += part as u64;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
            return Err(Errno::EFBIG);
        };
        fallocate(&self.file, flags, offset, length)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.punch(offset, length) {
            Ok(()) => Ok(()),
            Err(_) => self.write(offset, length, |_, part| part.fill(0)),
        }
    }

    /// What a discarded range reads is the device's choice, so one that cannot discard has done it.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.punch(offset, length) {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn flags_of(info: &DeviceInfo, strict: bool) -> HwFlags {
    let mut flags = HwFlags::default();
    if strict {
        flags = flags.with(HwFlags::STRICT_FLUSH);
    }
    if info.file_system.is_some() {
        flags = flags.with(HwFlags::FILE_BACKED);
    }
    match info.medium {
        DeviceKind::Hdd => flags.with(HwFlags::ROTATIONAL),
        DeviceKind::Pmem => flags.with(HwFlags::NVM),
        _ => flags,
    }
}

impl ReadAt for Target {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> Option<u64> {
        let Ok(at) = i64::try_from(offset) else {
            return Some(offset);
        };
        match lseek64(&self.file, at, Whence::SeekData) {
            Ok(next) => Some(u64::try_from(next).unwrap_or(offset)),
            Err(Errno::ENXIO) => None,
            Err(_) => Some(offset),
        }
    }
}
