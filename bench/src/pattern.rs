//! From a job to its requests: which one comes next, and where.
//!
//! **Invariants.** The same job and seed give the same requests. Every request lies within the
//! region and is aligned to the block size.
//!
//! **Not here:** fio's map of blocks already drawn: random blocks are drawn with repetition, as
//! fio does with `norandommap`.

use crate::job::Job;
use crate::target::Io;

/// A small generator (splitmix64): its quality is plenty for offsets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Every seed is good.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is positive.
    pub fn below(&mut self, limit: u64) -> u64 {
        debug_assert!(limit > 0);
        let product = u128::from(self.draw()) * u128::from(limit);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// Fills a buffer with bytes that no server can compress.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for part in buffer.chunks_mut(8) {
            let bytes = self.draw().to_le_bytes();
            part.copy_from_slice(&bytes[..part.len()]);
        }
    }
}

/// The requests of one thread of a job. It has no end: the driver counts.
#[derive(Clone, Debug)]
pub struct Pattern {
    random: Random,
    blocks: u64,
    block_bytes: u32,
    next_block: u64,
    job: Job,
    writes_since_flush: u32,
}

impl Pattern {
    /// For a region of `region_bytes` from the start of the target; at least one block of it.
    #[must_use]
    pub fn new(job: &Job, region_bytes: u64, thread: u32) -> Self {
        let seed = job.seed ^ (u64::from(thread) << 40);
        Self {
            random: Random::new(seed),
            blocks: (region_bytes / u64::from(job.block_bytes)).max(1),
            block_bytes: job.block_bytes,
            next_block: 0,
            job: job.clone(),
            writes_since_flush: 0,
        }
    }

    /// What comes next.
    pub fn draw(&mut self) -> Io {
        if self.job.flush_every > 0 && self.writes_since_flush == self.job.flush_every {
            self.writes_since_flush = 0;
            return Io::Flush {
                data_only: self.job.data_only,
            };
        }
        let direction = self.job.direction;
        let block = if direction.random {
            self.random.below(self.blocks)
        } else {
            let block = self.next_block;
            self.next_block = (block + 1) % self.blocks;
            block
        };
        let offset = block * u64::from(self.block_bytes);
        let read = match (direction.reads, direction.writes) {
            (true, true) => self.random.below(100) < u64::from(self.job.read_percent),
            (reads, _) => reads,
        };
        if read {
            return Io::Read { offset };
        }
        self.writes_since_flush += 1;
        Io::Write { offset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobFile;

    fn pattern(text: &str, region: u64) -> Pattern {
        let file = JobFile::parse(&format!("[a]\n{text}")).expect("a job");
        Pattern::new(&file.jobs[0], region, 0)
    }

    #[test]
    fn a_sequential_job_covers_the_region_and_starts_over() {
        let mut pattern = pattern("rw=write\nbs=4k\n", 3 * 4096 + 100);
        let offsets: Vec<Io> = (0..4).map(|_| pattern.draw()).collect();
        let expected = [0, 4096, 8192, 0].map(|offset| Io::Write { offset });
        assert_eq!(offsets, expected);
    }

    #[test]
    fn random_requests_are_aligned_within_the_region_and_reach_all_of_it() {
        let mut pattern = pattern("rw=randread\nbs=8k\n", 16 * 8192);
        let mut seen = [false; 16];
        for _ in 0..1000 {
            let Io::Read { offset } = pattern.draw() else {
                panic!("only reads");
            };
            assert_eq!(offset % 8192, 0);
            seen[usize::try_from(offset / 8192).expect("small")] = true;
        }
        assert_eq!(seen, [true; 16]);
    }

    #[test]
    fn a_flush_follows_every_nth_write_and_counts_no_reads() {
        let mut pattern = pattern("rw=randrw\nfsync=3\n", 1 << 20);
        let (mut writes, mut flushes) = (0, 0);
        for _ in 0..2000 {
            match pattern.draw() {
                Io::Write { .. } => writes += 1,
                Io::Read { .. } => {}
                Io::Flush { data_only } => {
                    assert!(!data_only);
                    flushes += 1;
                    assert_eq!(writes, 3 * flushes);
                }
            }
        }
        assert!(flushes > 200, "{flushes}");
    }

    #[test]
    fn the_mix_of_reads_and_writes_is_what_the_job_says() {
        let mut pattern = pattern("rw=randrw\nrwmixread=70\n", 1 << 20);
        let reads = (0..10_000).filter(|_| matches!(pattern.draw(), Io::Read { .. }));
        let reads = reads.count();
        assert!((6700..7300).contains(&reads), "{reads}");
    }
}
