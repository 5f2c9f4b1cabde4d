//! Where the copies of a superblock lie.
//!
//! East, West and South lie inside the address range of data (defect 1); [`crate::reserve`] keeps
//! blocks away from them.
//= HN4_SPEC 1

use super::SUPERBLOCK_BYTES;
use crate::num::{round_down, round_up};

/// The four places of a copy.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Cardinal {
    /// The start of the volume.
    North,
    /// A third in.
    East,
    /// Two thirds in.
    West,
    /// The end.
    South,
}

impl Cardinal {
    /// All places, in the order in which they are written.
    pub const ALL: [Self; 4] = [Self::North, Self::East, Self::West, Self::South];
    /// All but North.
    pub const MIRRORS: [Self; 3] = [Self::East, Self::West, Self::South];

    /// Its name in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::North => "north",
            Self::East => "east",
            Self::West => "west",
            Self::South => "south",
        }
    }
}

/// Bytes that one copy occupies for a block size.
#[must_use]
pub fn copy_bytes(block_size: u64) -> u64 {
    round_up(SUPERBLOCK_BYTES, block_size)
}

/// Byte offset of a copy for a capacity, or `None` for South where the volume is too small.
#[must_use]
pub fn position(cardinal: Cardinal, capacity: u64, block_size: u64) -> Option<u64> {
    let width = copy_bytes(block_size);
    match cardinal {
        Cardinal::North => Some(0),
        Cardinal::East => Some(round_up((capacity / 100).wrapping_mul(33), block_size)),
        Cardinal::West => Some(round_up((capacity / 100).wrapping_mul(66), block_size)),
        Cardinal::South => {
            (capacity >= width.saturating_mul(16)).then(|| round_down(capacity - width, block_size))
        }
    }
}

/// All copies of a volume that fit in `device_bytes`, with their byte offsets. A zoned volume has
/// North only.
pub fn fitting(
    capacity: u64,
    block_size: u64,
    zoned: bool,
    device_bytes: u64,
) -> impl Iterator<Item = (Cardinal, u64)> {
    let width = copy_bytes(block_size);
    Cardinal::ALL.into_iter().filter_map(move |cardinal| {
        let offset = position(cardinal, capacity, block_size)?;
        let there = cardinal == Cardinal::North
            || (!zoned
                && offset
                    .checked_add(width)
                    .is_some_and(|end| end <= device_bytes));
        there.then_some((cardinal, offset))
    })
}

/// The copies that a format writes: on zoned devices East and West too, although no mount looks at
/// them there again.
pub fn formatted(
    capacity: u64,
    block_size: u64,
    zoned: bool,
    device_bytes: u64,
) -> impl Iterator<Item = (Cardinal, u64)> {
    fitting(capacity, block_size, false, device_bytes)
        .filter(move |&(cardinal, _)| !zoned || cardinal != Cardinal::South)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_volumes_have_no_south() {
        assert_eq!(position(Cardinal::South, 16 * 8192, 512), Some(15 * 8192));
        assert_eq!(position(Cardinal::South, 16 * 8192 - 1, 512), None);
    }

    #[test]
    fn copies_that_do_not_fit_the_device_are_left_out() {
        let all: Vec<_> = fitting(1 << 28, 4096, false, 1 << 27)
            .map(|(c, _)| c)
            .collect();
        assert_eq!(all, [Cardinal::North, Cardinal::East]);
        assert_eq!(fitting(1 << 28, 4096, true, 1 << 28).count(), 1);
    }
}
