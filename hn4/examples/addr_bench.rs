//! How many addresses one core computes in a second:
//! `cargo run --release -p hn4 --example addr_bench`.
//!
//! Counts the time that the core really worked, where the kernel tells it, so that a busy machine
//! does not change the answer. Prints, asserts nothing. The aim is 10 million a second.

use std::hint::black_box;
use std::time::Instant;

use hn4::address::{Geometry, Path, Space, trajectory};

const ROUNDS: u64 = 20_000_000;

fn geometry(capacity: u64, block_size: u32) -> Geometry {
    Geometry {
        capacity,
        block_size,
        sector_size: 512,
        lba_flux_start: 1 << 20,
        profile: 0,
        device_type: 0,
        hw_caps_flags: 0,
    }
}

/// Nanoseconds that this thread has spent on a core.
fn core_nanos() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

fn report(name: &str, count: u64, run: impl FnOnce() -> u64) {
    let (start, worked) = (Instant::now(), core_nanos());
    let sum = black_box(run());
    let wall = start.elapsed().as_nanos();
    let worked = core_nanos()
        .zip(worked)
        .map(|(after, before)| u128::from(after - before));
    let nanos = worked.unwrap_or(wall).max(1);
    let per_second = u128::from(count) * 1_000_000_000 / nanos / 100_000;
    println!(
        "{name:<44} {}.{} million a second (sum {sum:x})",
        per_second / 10,
        per_second % 10
    );
}

fn main() {
    let volumes = [
        ("1 TiB of 4 KiB", 1 << 40, 4096),
        ("8 EiB of 512 B", 1 << 63, 512),
    ];
    for (name, capacity, block_size) in volumes {
        let geometry = geometry(capacity, block_size);
        report(&format!("{name}: blocks of one file"), ROUNDS, || {
            let Some(space) = Space::new(&geometry, 0) else {
                return 0;
            };
            let path = Path::new(space, 0x1234_5678, 0x9ABC_DEF0_1234);
            let blocks = (0..ROUNDS).map(|n| path.block(black_box(n), 0));
            blocks.fold(0, |sum, block| sum ^ block)
        });
        report(
            &format!("{name}: a new file each time, all inputs"),
            ROUNDS,
            || {
                let blocks = (0..ROUNDS).map(|n| {
                    let g = black_box(n).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    trajectory(&geometry, g, g >> 16, n, 0, 1).unwrap_or(0)
                });
                blocks.fold(0, |sum, block| sum ^ block)
            },
        );
    }
}
