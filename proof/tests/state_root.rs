//! The state tree against the second implementation, `tests/state_root.py`, and against fixed
//! answers.
#![forbid(unsafe_code)]

mod common;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hn4_proof::blocks;
use hn4_proof::hash::Digest;
use hn4_proof::tree::Geometry;
use hn4_proof::tree::build::SubtreeBuilder;

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/state_root.py")
}

fn by_script(image: &Path) -> Digest {
    let out = Command::new("python3")
        .arg(script())
        .arg(image)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// Contents with zeroes, repeated and distinct blocks.
fn content(size: usize) -> Vec<u8> {
    let byte = |at: usize| match at / 4096 % 5 {
        1 => 0,
        2 => 7,
        _ => (at / 4096 * 31 + at % 4096 * 7 % 253).to_le_bytes()[0],
    };
    (0..size).map(byte).collect()
}

fn root(bytes: &[u8]) -> Digest {
    let geometry = Geometry::new(bytes.len() as u64).unwrap();
    let mut builder = SubtreeBuilder::whole(geometry).unwrap();
    let (whole, rest) = bytes.as_chunks::<4096>();
    for (block, at) in whole.iter().zip(0..) {
        builder.push(at, blocks::leaf(block)).unwrap();
    }
    if !rest.is_empty() {
        builder
            .push(whole.len() as u64, blocks::padded_leaf(rest))
            .unwrap();
    }
    geometry.root(&builder.finish())
}

#[test]
fn the_script_passes_its_own_test() {
    if common::has_tool("python3") {
        let status = Command::new("python3")
            .arg(script())
            .arg("--self-test")
            .status()
            .unwrap();
        assert!(status.success());
    }
}

#[test]
fn script_and_library_agree_for_sizes_that_are_no_powers_of_two() {
    if !common::has_tool("python3") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for size in [
        512,
        4096,
        4608,
        3 * 4096,
        8 * 4096,
        21 * 4096 + 1536,
        67 * 4096 - 512,
    ] {
        let (path, bytes) = (folder.path().join(size.to_string()), content(size));
        File::create(&path).unwrap().write_all(&bytes).unwrap();
        assert_eq!(by_script(&path), root(&bytes), "{size} bytes");
    }
}

#[test]
fn script_and_library_agree_on_a_sparse_tebibyte() {
    if !common::has_tool("python3") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    let geometry = Geometry::new(1 << 40).unwrap();
    assert_eq!(by_script(&path), geometry.zero_root());

    let mut builder = SubtreeBuilder::whole(geometry).unwrap();
    for block in [3_u64, 1 << 20, (1 << 28) - 1] {
        let bytes = [u8::try_from(block % 251).unwrap(); 4096];
        file.write_all_at(&bytes, block * 4096).unwrap();
        builder.push(block, blocks::leaf(&bytes)).unwrap();
    }
    assert_eq!(by_script(&path), geometry.root(&builder.finish()));
}

/// Answers that the script gave; the library gives them with or without python3.
#[test]
fn roots_are_the_golden_ones() {
    let golden = include_str!("golden/state_roots.txt");
    let mut lines = 0;
    for line in golden.lines().filter(|line| !line.starts_with('#')) {
        let (size, expected) = line.split_once(' ').unwrap();
        let bytes = content(size.parse().unwrap());
        assert_eq!(root(&bytes).to_string(), expected, "{size} bytes");
        lines += 1;
    }
    assert_eq!(lines, 5);
}
