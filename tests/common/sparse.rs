//! Sparse files of a size that nobody reads from one end to the other: compared where there is
//! data.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// Bytes that are read at once.
const PART: u64 = 1 << 20;

/// Where a file may hold something else than zeroes.
pub(crate) fn data(file: &File, bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let seek = |from: u64, whence| -> io::Result<Option<u64>> {
        let from = i64::try_from(from).map_err(io::Error::other)?;
        match lseek(file, from, whence) {
            Ok(found) => Ok(Some(u64::try_from(found).map_err(io::Error::other)?)),
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    };
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(at, Whence::SeekData)? {
        let end = seek(start, Whence::SeekHole)?.unwrap_or(bytes);
        found.push(start..end);
        at = end;
    }
    Ok(found)
}

/// The first byte at which two files differ.
fn first_difference(one: &File, two: &File, within: &Range<u64>) -> io::Result<Option<u64>> {
    let mut at = within.start;
    while at < within.end {
        let length = usize::try_from(PART.min(within.end - at)).map_err(io::Error::other)?;
        let (mut ours, mut theirs) = (vec![0; length], vec![0; length]);
        one.read_exact_at(&mut ours, at)?;
        two.read_exact_at(&mut theirs, at)?;
        if let Some(place) = ours.iter().zip(&theirs).position(|(a, b)| a != b) {
            return Ok(Some(at + place as u64));
        }
        at += length as u64;
    }
    Ok(None)
}

/// Fails unless two sparse files hold the same. Gives how many bytes of them are no holes.
pub(crate) fn assert_equal(one: &Path, two: &Path) -> u64 {
    let open = |path: &Path| {
        let file = File::open(path).expect("a backing");
        let bytes = file.metadata().expect("its size").len();
        let data = data(&file, bytes).expect("a file system that tells where holes are");
        (file, bytes, data)
    };
    let ((one, bytes, ours), (two, same_bytes, theirs)) = (open(one), open(two));
    assert_eq!(bytes, same_bytes, "sizes");
    // What is a hole in one of them may be data in the other one.
    for within in ours.iter().chain(&theirs) {
        let differs = first_difference(&one, &two, within).expect("both can be read");
        assert_eq!(differs, None, "they differ at this byte");
    }
    ours.iter().map(|range| range.end - range.start).sum()
}
