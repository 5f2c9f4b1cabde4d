//! The device's `b3sum`, taken in the same pass in which a deep verify reads it.
//!
//! It is that of the device at one epoch. So it is given up when a sweep or a repair writes
//! meanwhile, and when a block cannot be read.

use std::io;

use hn4_proof::hash::Digest;
use hn4_proof::tree::keeper::Device;

/// Bytes of a hole that are hashed at once: a sweep may have to wait for that.
const HOLE_BYTES: u64 = 64 << 20;
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// The sum of what was read so far.
#[derive(Debug, Default)]
pub(super) struct Sum {
    hasher: blake3::Hasher,
    /// Bytes that are in it.
    at: u64,
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.at += bytes.len() as u64;
    }

    fn add_zeroes(&mut self, end: u64) {
        while self.at < end {
            let most = ZEROES.len() as u64;
            let length = usize::try_from((end - self.at).min(most)).unwrap_or(ZEROES.len());
            self.add(&ZEROES[..length]);
        }
    }

    /// The sum of a device of so many bytes, which ends with a hole if not all of it was read.
    pub(super) fn finish(mut self, size_bytes: u64) -> Digest {
        self.add_zeroes(size_bytes);
        Digest(*self.hasher.finalize().as_bytes())
    }
}

/// A device, and the sum that what is read from it goes into.
pub(super) struct Summed<'a, D> {
    pub(super) device: &'a mut D,
    pub(super) sum: &'a mut Option<Sum>,
}

impl<D: Device> Device for Summed<'_, D> {
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let done = self.device.read(offset, buffer);
        // What failed is read again, block by block, and then there is no sum.
        *self.sum = self.sum.take().filter(|_| done.is_ok());
        if let Some(sum) = self.sum {
            sum.add_zeroes(offset);
            sum.add(buffer);
        }
        done
    }

    fn next_data(&mut self, offset: u64) -> io::Result<u64> {
        let found = self.device.next_data(offset)?;
        Ok(match self.sum {
            Some(_) => found.min(offset + HOLE_BYTES),
            None => found,
        })
    }

    fn next_hole(&mut self, offset: u64) -> io::Result<u64> {
        self.device.next_hole(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 4096;

    /// Holes are where all of a block is zero.
    struct Disk {
        bytes: Vec<u8>,
        unreadable: Option<u64>,
    }

    impl Device for Disk {
        fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            if self.unreadable == Some(offset) {
                return Err(io::Error::other("unreadable"));
            }
            let at = usize::try_from(offset).expect("small");
            buffer.copy_from_slice(&self.bytes[at..at + buffer.len()]);
            Ok(())
        }

        fn next_data(&mut self, offset: u64) -> io::Result<u64> {
            let from = usize::try_from(offset).expect("small") / BLOCK;
            let mut blocks = self.bytes.chunks(BLOCK).skip(from);
            let hole = blocks.position(|block| block.iter().any(|byte| *byte != 0));
            let size = self.bytes.len() as u64;
            Ok(hole.map_or(size, |blocks| offset + (blocks * BLOCK) as u64))
        }

        fn next_hole(&mut self, _: u64) -> io::Result<u64> {
            Ok(self.bytes.len() as u64)
        }
    }

    /// Reads all of the disk as a verify does.
    fn sum(disk: &mut Disk) -> Option<Digest> {
        let size = disk.bytes.len() as u64;
        let mut sum = Some(Sum::default());
        let mut summed = Summed {
            device: disk,
            sum: &mut sum,
        };
        let mut at = 0;
        while at < size {
            at = summed.next_data(at).expect("known");
            if at < size {
                let _ = summed.read(at, &mut [0; BLOCK]);
                at += BLOCK as u64;
            }
        }
        sum.map(|sum| sum.finish(size))
    }

    #[test]
    fn holes_count_as_zeroes_and_what_cannot_be_read_leaves_no_sum() {
        let mut disk = Disk {
            bytes: vec![0; 80 << 20],
            unreadable: None,
        };
        let expected = |disk: &Disk| Digest(*blake3::hash(&disk.bytes).as_bytes());
        assert_eq!(sum(&mut disk), Some(expected(&disk)), "one hole");
        for block in [0, 1, 5, 18_000] {
            disk.bytes[block * BLOCK + 77] = 7;
            assert_eq!(sum(&mut disk), Some(expected(&disk)));
        }
        disk.unreadable = Some(5 * BLOCK as u64);
        assert_eq!(sum(&mut disk), None);
    }

    #[test]
    fn a_large_hole_is_passed_in_parts_while_there_is_a_sum() {
        let mut disk = Disk {
            bytes: vec![0; 130 << 20],
            unreadable: None,
        };
        let mut sum = Some(Sum::default());
        let mut summed = Summed {
            device: &mut disk,
            sum: &mut sum,
        };
        assert_eq!(summed.next_data(0).expect("known"), HOLE_BYTES);
        *summed.sum = None;
        assert_eq!(summed.next_data(0).expect("known"), 130 << 20);
    }
}
