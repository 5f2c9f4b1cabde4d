//! From a job to its requests: which one comes next, and where.
//!
//! **Invariants.** The same job and seed give the same requests. Every request lies within the
//! region and is aligned to the block size.
//!
//! **Not here:** fio's map of blocks already drawn: random blocks are drawn with repetition, as
//! fio does with `norandommap`.

use crate::job::{Distribution, Job};
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
    region_bytes: u64,
    align_bytes: u64,
    next: u64,
    zipf: Option<Zipf>,
    job: Job,
    writes_since_flush: u32,
}

impl Pattern {
    /// For a region of `region_bytes` from the start of the target; at least one block of it.
    #[must_use]
    pub fn new(job: &Job, region_bytes: u64, thread: u32) -> Self {
        let seed = job.seed ^ (u64::from(thread) << 40);
        let align_bytes = u64::from(job.lengths.shortest());
        let zipf = match job.distribution {
            Distribution::Zipf(theta) if job.direction.random => {
                Some(Zipf::new(theta, region_bytes / align_bytes))
            }
            _ => None,
        };
        Self {
            random: Random::new(seed),
            region_bytes,
            align_bytes,
            next: 0,
            zipf,
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
        let read = match (direction.reads, direction.writes) {
            (true, true) => self.random.below(100) < u64::from(self.job.read_percent),
            (reads, _) => reads,
        };
        let length = self.length(read);
        let offset = if direction.random {
            self.somewhere(u64::from(length))
        } else {
            let end = self.next + u64::from(length);
            let offset = if end > self.region_bytes {
                0
            } else {
                self.next
            };
            self.next = offset + u64::from(length);
            offset
        };
        if read {
            return Io::Read { offset, length };
        }
        self.writes_since_flush += 1;
        Io::Write { offset, length }
    }

    fn length(&mut self, read: bool) -> u32 {
        let lengths = &self.job.lengths;
        let portions = if read {
            &lengths.reads
        } else {
            &lengths.writes
        };
        if let [only] = portions[..] {
            return only.bytes;
        }
        let mut left = self.random.below(100);
        for portion in portions {
            let percent = u64::from(portion.percent);
            if left < percent {
                return portion.bytes;
            }
            left -= percent;
        }
        lengths.shortest()
    }

    /// A place for a request of so many bytes.
    fn somewhere(&mut self, length: u64) -> u64 {
        let places = (self.region_bytes.saturating_sub(length) / self.align_bytes) + 1;
        let place = match &self.job.distribution {
            Distribution::Even => self.random.below(places),
            Distribution::Zipf(_) => match &self.zipf {
                Some(zipf) => zipf.draw(&mut self.random) % places,
                None => 0,
            },
            Distribution::Zoned(zones) => {
                let mut left = self.random.below(100);
                let mut start = 0;
                let mut found = (0, 100);
                for zone in zones {
                    if left < u64::from(zone.access) {
                        found = (start, u64::from(zone.size));
                        break;
                    }
                    left -= u64::from(zone.access);
                    start += u64::from(zone.size);
                }
                let (start, size) = found;
                let count = (places * size / 100).max(1);
                (places * start / 100 + self.random.below(count)).min(places - 1)
            }
        };
        place * self.align_bytes
    }
}

/// Zipf's law over so many blocks, by the method of Gray and others, "Quickly generating
/// billion-record synthetic databases" (1994). The popular blocks are spread over the region.
#[derive(Clone, Debug)]
struct Zipf {
    theta: f64,
    blocks: f64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    /// More blocks than this are not told apart: the sum below would take too long.
    const BLOCKS_MAX: u64 = 10_000_000;

    fn new(theta: f64, blocks: u64) -> Self {
        let count = blocks.clamp(2, Self::BLOCKS_MAX);
        let weight = |rank: u64| (1.0 / rank as f64).powf(theta);
        let zeta: f64 = (1..=count).map(weight).sum();
        let zeta_of_two = weight(1) + weight(2);
        let blocks = count as f64;
        let eta = (1.0 - (2.0 / blocks).powf(1.0 - theta)) / (1.0 - zeta_of_two / zeta);
        Self {
            theta,
            blocks,
            zeta,
            eta,
        }
    }

    /// A number whose remainder is a block.
    fn draw(&self, random: &mut Random) -> u64 {
        let even = random.below(1 << 53) as f64 / (1_u64 << 53) as f64;
        let scaled = even * self.zeta;
        let rank = if scaled < 1.0 {
            0.0
        } else if scaled < 1.0 + 0.5_f64.powf(self.theta) {
            1.0
        } else {
            let base = self.eta * even - self.eta + 1.0;
            (self.blocks * base.powf(1.0 / (1.0 - self.theta))).floor()
        };
        // The same rank is always the same block, and neighbours in rank are none in place.
        Random::new(rank.to_bits()).draw()
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
        let length = 4096;
        let expected = [0, 4096, 8192, 0].map(|offset| Io::Write { offset, length });
        assert_eq!(offsets, expected);
    }

    #[test]
    fn random_requests_are_aligned_within_the_region_and_reach_all_of_it() {
        let mut pattern = pattern("rw=randread\nbs=8k\n", 16 * 8192);
        let mut seen = [false; 16];
        for _ in 0..1000 {
            let Io::Read { offset, .. } = pattern.draw() else {
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

    #[test]
    fn lengths_follow_their_shares_and_stay_within_the_region() {
        let mut pattern = pattern("rw=randrw\nbssplit=4k/75:16k/25,64k/100\n", 1 << 20);
        let mut long_reads = 0;
        let mut reads = 0;
        for _ in 0..10_000 {
            match pattern.draw() {
                Io::Read { offset, length } => {
                    assert!(offset % 4096 == 0 && offset + u64::from(length) <= 1 << 20);
                    reads += 1;
                    long_reads += u32::from(length == 16384);
                }
                Io::Write { offset, length } => {
                    assert_eq!(length, 65536);
                    assert!(offset + u64::from(length) <= 1 << 20);
                }
                Io::Flush { .. } => panic!("no flush was asked for"),
            }
        }
        let percent = f64::from(long_reads) / f64::from(reads) * 100.0;
        assert!((22.0..28.0).contains(&percent), "{percent}");
    }

    /// How often the tenth of the blocks that is hit most is hit, in percent.
    fn hottest_tenth(text: &str) -> usize {
        let mut pattern = pattern(text, 1000 * 4096);
        let mut hits = vec![0_usize; 1000];
        for _ in 0..50_000 {
            if let Io::Read { offset, .. } = pattern.draw() {
                hits[usize::try_from(offset / 4096).expect("small")] += 1;
            }
        }
        hits.sort_unstable();
        hits.iter().rev().take(100).sum::<usize>() / 500
    }

    #[test]
    fn distributions_have_the_shape_that_they_promise() {
        let even = hottest_tenth("rw=randread\n");
        assert!((10..16).contains(&even), "{even}");
        // 100 of 1000 blocks have 69 % of the weight with theta 0.99 (sum of 1/n^0.99).
        let zipf = hottest_tenth("rw=randread\nrandom_distribution=zipf:0.99\n");
        assert!((62..82).contains(&zipf), "{zipf}");
        let zoned = hottest_tenth("rw=randread\nrandom_distribution=zoned:80/10:20/90\n");
        assert!((79..84).contains(&zoned), "{zoned}");
    }
}
