//! What is written, and whether what is read is that.
//!
//! With `verify` every sector's bytes follow from the job's seed and the sector's place: a sector
//! that was lost, misplaced, torn or flipped differs. A second write of the same seed to the same
//! place writes the same again; that one was lost cannot be seen.
//!
//! **Not here:** fio's headers in the data: what fio wrote is not verified here, nor the reverse.

use anyhow::{Result, bail};

use crate::job::Job;
use crate::pattern::Random;

/// The unit of the rule above.
const SECTOR: usize = 512;

/// Makes what one thread writes.
#[derive(Clone, Debug)]
pub struct Contents {
    seed: u64,
    verify: bool,
    data: Vec<u8>,
}

impl Contents {
    /// For a job.
    #[must_use]
    pub fn new(job: &Job) -> Self {
        let mut data = vec![0; job.block_bytes as usize];
        Random::new(job.seed).fill(&mut data);
        Self {
            seed: job.seed,
            verify: job.verify,
            data,
        }
    }

    /// What a write is to write; the length is at most the longest of the job.
    pub fn of_write(&mut self, offset: u64, length: u32, tag: u32) -> &[u8] {
        let length = (length as usize).min(self.data.len());
        let (seed, verify) = (self.seed, self.verify);
        let data = &mut self.data[..length];
        if verify {
            fill(seed, offset, data);
        } else if let Some(stamp) = data.get_mut(..8) {
            // No two writes alike, at the price of one store.
            stamp.copy_from_slice(&(u64::from(tag) ^ offset).to_le_bytes());
        }
        &self.data[..length]
    }

    /// Whether reads are to be compared.
    #[must_use]
    pub fn verifies(&self) -> bool {
        self.verify
    }

    /// Compares what a read brought, piece by piece, each a multiple of a sector.
    ///
    /// # Errors
    /// Names the first sector that differs.
    pub fn check<'a>(&self, offset: u64, pieces: impl Iterator<Item = &'a [u8]>) -> Result<()> {
        let mut at = offset;
        let mut expected = [0; SECTOR];
        for sector in pieces.flat_map(|piece| piece.chunks(SECTOR)) {
            fill(self.seed, at, &mut expected);
            if sector != &expected[..sector.len()] {
                bail!(
                    "verify: the sector at byte {at} is not what a job with randseed={} writes \
                     there",
                    self.seed
                );
            }
            at += SECTOR as u64;
        }
        Ok(())
    }
}

fn fill(seed: u64, offset: u64, data: &mut [u8]) {
    for (sector, index) in data.chunks_mut(SECTOR).zip(offset / SECTOR as u64..) {
        let mut mixed = Random::new(seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        Random::new(mixed.draw()).fill(sector);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_and_a_sector_in_another_place_are_found() {
        let job = Job {
            verify: true,
            ..Job::default()
        };
        let mut contents = Contents::new(&job);
        let mut data = contents.of_write(8192, 4096, 3).to_vec();
        contents.check(8192, data.chunks(1024)).expect("the same");
        let elsewhere = contents.check(4096, [&data[..]].into_iter());
        assert!(elsewhere.is_err());
        data[3000] ^= 1;
        let error = contents.check(8192, [&data[..]].into_iter());
        let error = error.expect_err("a bit was flipped").to_string();
        assert!(error.contains(&format!("byte {}", 8192 + 2560)), "{error}");
    }
}
