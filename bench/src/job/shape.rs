//! What the requests of a job look like: how long they are, where they go, how fast they come.

use std::time::Duration;

use super::value::{bytes, duration, number};
use super::{BLOCK_BYTES_MAX, BLOCK_BYTES_MIN};

/// What `bs` must be.
pub(super) const LENGTHS: &str = "one size, or one for reads and one for writes as in 4k,64k; each \
     a multiple of 512 up to 4m, with k or m as in fio (4ki would be 4000)";
/// What `bssplit` must be.
pub(super) const SPLIT: &str = "sizes with their shares, as in 4k/90:64k/10; the shares of reads \
     and, after a comma, of writes add up to 100";
/// What `random_distribution` must be.
pub(super) const DISTRIBUTION: &str = "random, zipf:THETA with THETA between 0 and 10 but not 1, \
     or zoned:ACCESS/SIZE:.. in percent, both adding up to 100";
/// What `thinktime` must be.
pub(super) const THINK: &str = "a number of microseconds, or with us, ms or s";
/// Checksums that fio knows and that are no more than a reason to compare here.
pub(super) const CHECKSUMS: [&str; 13] = [
    "crc32c",
    "crc32c-intel",
    "crc64",
    "crc32",
    "crc16",
    "crc7",
    "xxhash",
    "md5",
    "sha1",
    "sha256",
    "sha512",
    "sha3-256",
    "sha3-512",
];
/// Most sizes or zones in one list.
const LIST_MAX: usize = 64;

/// A length and how many of a hundred requests have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Portion {
    /// Length in bytes.
    pub bytes: u32,
    /// Share.
    pub percent: u8,
}

/// How long requests are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lengths {
    /// Of reads; the shares add up to 100.
    pub reads: Vec<Portion>,
    /// Of writes, likewise.
    pub writes: Vec<Portion>,
}

impl Lengths {
    /// All of one length.
    #[must_use]
    pub fn all(bytes: u32) -> Self {
        let all = vec![Portion {
            bytes,
            percent: 100,
        }];
        Self {
            reads: all.clone(),
            writes: all,
        }
    }

    fn each(&self) -> impl Iterator<Item = u32> {
        let all = self.reads.iter().chain(&self.writes);
        all.map(|portion| portion.bytes)
    }

    /// The longest one.
    #[must_use]
    pub fn longest(&self) -> u32 {
        self.each().max().unwrap_or(BLOCK_BYTES_MIN)
    }

    /// The shortest one: offsets are multiples of it.
    #[must_use]
    pub fn shortest(&self) -> u32 {
        self.each().min().unwrap_or(BLOCK_BYTES_MIN)
    }
}

/// A part of the region and how many of a hundred requests go there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Zone {
    /// Share of the requests.
    pub access: u8,
    /// Share of the region.
    pub size: u8,
}

/// Where random requests go.
#[derive(Clone, PartialEq, Debug)]
pub enum Distribution {
    /// Everywhere alike.
    Even,
    /// Some blocks far more often than others: the n-th with the weight 1 / n^theta.
    Zipf(f64),
    /// Zone by zone.
    Zoned(Vec<Zone>),
}

fn length(text: &str) -> Option<u32> {
    let value = u32::try_from(bytes(text)?).ok()?;
    let fits = (BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&value);
    (fits && value.is_multiple_of(BLOCK_BYTES_MIN)).then_some(value)
}

/// A list for reads and perhaps one for writes.
fn of_two<T: Clone>(text: &str, read: impl Fn(&str) -> Option<T>) -> Option<[T; 2]> {
    let (reads, writes) = text.split_once(',').unwrap_or((text, text));
    Some([read(reads.trim())?, read(writes.trim())?])
}

pub(super) fn lengths(text: &str) -> Option<Lengths> {
    let [reads, writes] = of_two(text, length)?;
    Some(Lengths {
        reads: Lengths::all(reads).reads,
        writes: Lengths::all(writes).writes,
    })
}

pub(super) fn split(text: &str) -> Option<Lengths> {
    let portions = |text: &str| {
        let mut list = Vec::new();
        for part in text.split(':') {
            let (bytes, percent) = part.split_once('/')?;
            list.push(Portion {
                bytes: length(bytes.trim())?,
                percent: number(percent.trim(), 0, 100)?,
            });
        }
        let sum: u32 = list.iter().map(|portion| u32::from(portion.percent)).sum();
        (sum == 100 && list.len() <= LIST_MAX).then_some(list)
    };
    let [reads, writes] = of_two(text, portions)?;
    Some(Lengths { reads, writes })
}

pub(super) fn distribution(text: &str) -> Option<Distribution> {
    if text == "random" {
        return Some(Distribution::Even);
    }
    if let Some(theta) = text.strip_prefix("zipf:") {
        let theta: f64 = theta.parse().ok()?;
        let good = theta > 0.0 && theta < 10.0 && (theta - 1.0).abs() > 1e-9;
        return good.then_some(Distribution::Zipf(theta));
    }
    let mut zones = Vec::new();
    for part in text.strip_prefix("zoned:")?.split(':') {
        let (access, size) = part.split_once('/')?;
        zones.push(Zone {
            access: number(access.trim(), 0, 100)?,
            size: number(size.trim(), 1, 100)?,
        });
    }
    let sum = |of: fn(&Zone) -> u8| zones.iter().map(|zone| u32::from(of(zone))).sum::<u32>();
    let whole = sum(|zone| zone.access) == 100 && sum(|zone| zone.size) == 100;
    (whole && zones.len() <= LIST_MAX).then_some(Distribution::Zoned(zones))
}

pub(super) fn rates(text: &str) -> Option<[u32; 2]> {
    of_two(text, |text| number(text, 0, u32::MAX))
}

/// fio counts in microseconds here.
pub(super) fn think(text: &str) -> Option<Duration> {
    match text.parse() {
        Ok(micros) => Some(Duration::from_micros(micros)),
        Err(_) => duration(text),
    }
}
