//! Plans: the writes, flushes and discards that an operation wants, in order, and the medium they
//! are tried against while the plan is made.
//!
//! Nothing is written here. An operation that must react to failing writes (the superblock quorum)
//! is told beforehand which places fail ([`Faults`]): when a write of a plan fails in reality, add
//! its range and plan again; planning is a pure function of bytes and faults.
//!
//! Invariant: a [`Medium`] reads back what its own plan has written so far.

use crate::device::{Device, ReadAt};
use crate::num::{index, round_up};
use crate::status::{Code, Problem, Region};

/// Bytes to be written: a head, and one byte value that repeats until the end. Superblock copies
/// of 64 MiB blocks would be wasteful otherwise.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Data {
    head: Vec<u8>,
    fill: u8,
    length: u64,
}

impl Data {
    /// `head` padded with zeroes to `length` bytes (never cut).
    #[must_use]
    pub fn padded(head: &[u8], length: u64) -> Self {
        Self {
            head: head.to_vec(),
            fill: 0,
            length: length.max(head.len() as u64),
        }
    }

    /// `length` bytes of one value.
    #[must_use]
    pub fn filled(fill: u8, length: u64) -> Self {
        Self {
            head: Vec::new(),
            fill,
            length,
        }
    }

    /// `head`, then `fill` up to `length`.
    #[must_use]
    pub fn head_and_fill(head: Vec<u8>, fill: u8, length: u64) -> Self {
        let length = length.max(head.len() as u64);
        Self { head, fill, length }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.length
    }

    /// True when there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes that are stored one by one; [`Self::fill`] follows them.
    #[must_use]
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// The value of all bytes behind the head.
    #[must_use]
    pub fn fill(&self) -> u8 {
        self.fill
    }

    /// Copies the bytes from `offset` of this data into `out`, as far as they go.
    pub fn copy_to(&self, offset: u64, out: &mut [u8]) {
        let from = index(offset);
        let stored = self.head.get(from..).unwrap_or_default();
        let copied = stored.len().min(out.len());
        let (now, rest) = out.split_at_mut(copied);
        now.copy_from_slice(&stored[..copied]);
        let remaining = index(self.length.saturating_sub(offset)).saturating_sub(copied);
        let fill = remaining.min(rest.len());
        rest[..fill].fill(self.fill);
    }
}

/// One operation on the device. Offsets and lengths are bytes, multiples of the sector.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Write bytes.
    Write {
        /// Byte offset.
        offset: u64,
        /// What.
        data: Data,
    },
    /// Let the device write zeroes itself (memory devices).
    Zero {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Tell the device that the range is free. What it reads afterwards is the device's choice.
    Discard {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Reset a zone. Length 0 means the zone that holds the offset.
    ZoneReset {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Everything before this is durable before anything after it starts.
    Flush,
}

impl Op {
    /// The byte range that the operation covers; a flush covers nothing, at 0.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::Write { offset, data } => (*offset, data.len()),
            Self::Zero { offset, length }
            | Self::Discard { offset, length }
            | Self::ZoneReset { offset, length } => (*offset, *length),
            Self::Flush => (0, 0),
        }
    }

    fn kind(&self) -> OpKind {
        match self {
            Self::Write { .. } => OpKind::Write,
            Self::Zero { .. } => OpKind::Zero,
            Self::Discard { .. } => OpKind::Discard,
            Self::ZoneReset { .. } => OpKind::ZoneReset,
            Self::Flush => OpKind::Flush,
        }
    }
}

/// Kinds of operations that a fault can hit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OpKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Device-side zeroing.
    Zero,
    /// Discards.
    Discard,
    /// Zone resets.
    ZoneReset,
    /// Flushes.
    Flush,
}

/// A range of sectors where operations of some kinds are known to fail.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// First sector.
    pub first_lba: u64,
    /// First sector behind the range.
    pub end_lba: u64,
    /// What fails there.
    pub kinds: Vec<OpKind>,
    /// The code the device returns.
    pub code: Code,
}

/// All known faults of a device.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Faults(pub Vec<Fault>);

impl Faults {
    fn hit(&self, kind: OpKind, lba: u64, sectors: u64) -> Option<Code> {
        let end = lba.saturating_add(sectors.max(1));
        self.0
            .iter()
            .find(|fault| {
                fault.kinds.contains(&kind) && lba < fault.end_lba && fault.first_lba < end
            })
            .map(|fault| fault.code)
    }
}

/// A step of a plan: an operation, and whether it is already known to fail.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// What to do.
    pub op: Op,
    /// The code with which the device is known to refuse it. The plan is made around it; executing
    /// it again is harmless.
    pub fails: Option<Code>,
}

/// What an operation wants done, in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
}

impl Plan {
    /// True when nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// True when at least one step changes the medium.
    #[must_use]
    pub fn touches_medium(&self) -> bool {
        self.steps
            .iter()
            .any(|step| step.fails.is_none() && step.op != Op::Flush)
    }

    /// Bytes that the plan's writes carry.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.steps
            .iter()
            .filter(|step| step.op.kind() == OpKind::Write)
            .fold(0, |sum, step| sum.saturating_add(step.op.range().1))
    }
}

/// Bytes of a device overlaid with what a plan writes, collecting that plan.
pub struct Medium<'a> {
    source: &'a dyn ReadAt,
    faults: &'a Faults,
    /// The device the plan is for.
    pub device: Device,
    plan: Plan,
}

impl<'a> Medium<'a> {
    /// Starts an empty plan over the bytes of `source`.
    #[must_use]
    pub fn new(source: &'a dyn ReadAt, device: Device, faults: &'a Faults) -> Self {
        Self {
            source,
            faults,
            device,
            plan: Plan::default(),
        }
    }

    /// Another medium with the same bytes, plan included: for asking "what if".
    #[must_use]
    pub fn beside(other: &Self) -> Self {
        let (source, faults) = (other.source, other.faults);
        Self {
            source,
            faults,
            device: other.device,
            plan: other.plan.clone(),
        }
    }

    /// The plan so far.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Ends planning.
    #[must_use]
    pub fn into_plan(self) -> Plan {
        self.plan
    }

    /// Forgets all steps: nothing of the plan shall be done.
    pub fn forget(&mut self) {
        self.plan.steps.clear();
    }

    /// Reads `buffer.len()` bytes at a byte offset, as they will be after the plan so far.
    ///
    /// # Errors
    /// [`Code::HwIo`] when the range leaves the device or the device fails, or the code of a known
    /// fault.
    pub fn read(&self, region: Region, offset: u64, buffer: &mut [u8]) -> Result<(), Problem> {
        let sector = self.device.sector();
        let lba = offset / sector;
        let length = buffer.len() as u64;
        let sectors = length.div_ceil(sector);
        let refuse = |code, found: String| {
            let advice = "check the device; replace it or restore this range from another copy";
            Err(Problem::new(
                code,
                (region, lba),
                found,
                format!("{length} readable bytes"),
                advice,
            ))
        };
        if let Some(code) = self.faults.hit(OpKind::Read, lba, sectors) {
            return refuse(code, "a known read fault".to_owned());
        }
        if offset
            .checked_add(length)
            .is_none_or(|end| end > self.device.capacity)
        {
            return refuse(
                Code::HwIo,
                format!("a device of {} bytes", self.device.capacity),
            );
        }
        if let Err(error) = self.source.read_at(offset, buffer) {
            return refuse(Code::HwIo, format!("read error: {error}"));
        }
        for step in self.plan.steps.iter().filter(|step| step.fails.is_none()) {
            match &step.op {
                Op::Write { offset: at, data } => overlay(*at, data, offset, buffer),
                Op::Zero { offset: at, length } => {
                    overlay(*at, &Data::filled(0, *length), offset, buffer);
                }
                Op::Discard { .. } | Op::ZoneReset { .. } | Op::Flush => {}
            }
        }
        Ok(())
    }

    /// Reads a fresh buffer; see [`Self::read`]. `length` must be bounded by the caller.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_vec(&self, region: Region, offset: u64, length: u64) -> Result<Vec<u8>, Problem> {
        if length > self.device.capacity {
            self.read(region, offset.max(self.device.capacity), &mut [0])?;
        }
        let mut buffer = vec![0; index(length)];
        self.read(region, offset, &mut buffer)?;
        Ok(buffer)
    }

    /// The next byte that may hold data, as [`ReadAt::next_data`], the plan's writes included.
    #[must_use]
    pub fn next_data(&self, offset: u64) -> Option<u64> {
        let planned = self.plan.steps.iter().filter_map(|step| match &step.op {
            Op::Write { offset: at, data } if at.saturating_add(data.len()) > offset => {
                Some(offset.max(*at))
            }
            _ => None,
        });
        planned.chain(self.source.next_data(offset)).min()
    }

    /// Adds an operation. Operations that leave the device or hit a fault are kept, marked as
    /// failing.
    ///
    /// # Errors
    /// The code with which the operation is known to fail.
    pub fn push(&mut self, op: Op) -> Result<(), Code> {
        let sector = self.device.sector();
        let (offset, length) = op.range();
        let sectors = length.div_ceil(sector);
        let mut fails = self.faults.hit(op.kind(), offset / sector, sectors);
        if fails.is_none()
            && offset
                .checked_add(length)
                .is_none_or(|end| end > self.device.capacity)
        {
            fails = Some(Code::HwIo);
        }
        self.plan.steps.push(Step { op, fails });
        fails.map_or(Ok(()), Err)
    }

    /// Adds a write of `data`, padded with zeroes to whole sectors.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn write(&mut self, offset: u64, mut data: Data) -> Result<(), Code> {
        if data.head.len() as u64 == data.length {
            data.length = round_up(data.length, self.device.sector());
        }
        self.push(Op::Write { offset, data })
    }

    /// Adds a flush.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn flush(&mut self) -> Result<(), Code> {
        self.push(Op::Flush)
    }
}

/// Copies the part of `data` at `at` that lies in `buffer`, which starts at `offset`.
fn overlay(at: u64, data: &Data, offset: u64, buffer: &mut [u8]) {
    let end = offset.saturating_add(buffer.len() as u64);
    let (first, last) = (at.max(offset), at.saturating_add(data.len()).min(end));
    if first < last {
        let target = &mut buffer[index(first - offset)..index(last - offset)];
        data.copy_to(first - at, target);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_medium_reads_back_what_its_plan_writes_and_not_what_fails() {
        let bytes = vec![1_u8; 4096];
        let faults = Faults(vec![Fault {
            first_lba: 1,
            end_lba: 2,
            kinds: vec![OpKind::Write],
            code: Code::HwIo,
        }]);
        let mut medium = Medium::new(&bytes, Device::plain(4096, 512), &faults);
        assert_eq!(medium.write(0, Data::padded(&[7; 10], 512)), Ok(()));
        assert_eq!(
            medium.write(512, Data::padded(&[9; 512], 512)),
            Err(Code::HwIo)
        );
        assert_eq!(
            medium.write(4096, Data::padded(&[9; 512], 512)),
            Err(Code::HwIo)
        );
        let read = medium
            .read_vec(Region::Flux, 0, 1024)
            .expect("inside the device");
        assert_eq!(&read[..10], &[7; 10]);
        assert!(read[10..512].iter().all(|&byte| byte == 0));
        assert!(read[512..].iter().all(|&byte| byte == 1));
        assert!(medium.read_vec(Region::Flux, 4000, 512).is_err());
    }
}
