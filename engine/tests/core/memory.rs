//! Devices in memory, on which the core alone is run.

use std::io;
use std::ops::Range;

use hn4::log::{LogIdentity, RING_START, Role};
use hn4::types::{NodeId, VolumeId};
use hn4_engine::core::Lanes;
use hn4_engine::core::recovery::{self, AlignedBlock, Medium, NewLog};

pub(crate) const NODE: NodeId = NodeId([1; 16]);

/// A device whose operations complete at once.
#[derive(Clone)]
pub(crate) struct Memory {
    pub(crate) bytes: Vec<u8>,
    /// Reads that touch these bytes fail.
    pub(crate) unreadable: Range<usize>,
    /// How often it was read.
    pub(crate) reads: usize,
}

pub(crate) fn small(offset: u64) -> usize {
    usize::try_from(offset).expect("a small device")
}

/// A volume of so many bytes.
pub(crate) fn identity(size_bytes: u64) -> LogIdentity {
    LogIdentity {
        volume: VolumeId([7; 16]),
        birth_nonce: [9; 16],
        size_bytes,
        sector_bytes: 512,
    }
}

impl Memory {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            unreadable: 0..0,
            reads: 0,
        }
    }

    /// The log of a new volume.
    pub(crate) fn new_log(identity: LogIdentity, role: Role, ring_bytes: usize) -> Self {
        Self::new_copy(identity, role, ring_bytes, false)
    }

    /// The log of a new copy, whose backing may hold what somebody brought.
    pub(crate) fn new_copy(
        identity: LogIdentity,
        role: Role,
        ring_bytes: usize,
        seeded: bool,
    ) -> Self {
        let mut log = Self::new(vec![0; small(RING_START) + ring_bytes]);
        let new = NewLog {
            identity,
            node: NODE,
            lanes: Lanes {
                count: 1,
                stripe_blocks: 256,
            },
            role,
            seeded,
            created_ms: 0,
        };
        recovery::create(&mut log, &new).expect("a log");
        log
    }
}

impl Medium for Memory {
    fn read(&mut self, offset: u64, blocks: &mut [AlignedBlock]) -> io::Result<()> {
        self.reads += 1;
        for (at, block) in (small(offset)..).step_by(4096).zip(blocks) {
            if at < self.unreadable.end && self.unreadable.start < at + 4096 {
                return Err(io::Error::other("unreadable"));
            }
            block.0.copy_from_slice(&self.bytes[at..at + 4096]);
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, blocks: &[AlignedBlock]) -> io::Result<()> {
        for (at, block) in (small(offset)..).step_by(4096).zip(blocks) {
            self.bytes[at..at + 4096].copy_from_slice(&block.0);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}
