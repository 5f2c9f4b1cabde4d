//! How fast leaves are hashed on this machine, beside plain BLAKE3 over the same bytes.
#![forbid(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use hn4::types::Lba;
use hn4_proof::{blocks, leaf};

fn main() {
    let data: Vec<u8> = (0..64_u32 << 20)
        .map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    let mib = data.len() as f64 / f64::from(1 << 20);
    let time = |name: &str, work: &dyn Fn()| {
        let mut best = f64::MAX;
        for _ in 0..7 {
            let start = Instant::now();
            work();
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("{name:42} {:8.0} MiB/s", mib / best);
    };
    time("blake3, one thread, whole buffer", &|| {
        _ = black_box(blake3::hash(&data))
    });
    time("blake3, 4 KiB at a time", &|| {
        for block in data.as_chunks::<4096>().0 {
            black_box(blake3::hash(block));
        }
    });
    time("leaf, one at a time", &|| {
        for block in data.as_chunks().0 {
            black_box(blocks::leaf(block));
        }
    });
    time("leaves, many at a time", &|| {
        blocks::leaves_of(&data, |leaf| _ = black_box(leaf))
    });
    time("payload hashes, 4 KiB records one by one", &|| {
        for record in data.chunks(4096) {
            black_box(leaf::payload_hash(Lba(0), record));
        }
    });
    time("payload hashes, 32 records of 4 KiB", &|| {
        for frame in data.chunks(32 * 4096) {
            let records: Vec<_> = frame.chunks(4096).collect();
            black_box(leaf::payload_hashes(&records, &vec![1; records.len()]));
        }
    });
    time("payload hash, 1 MiB records", &|| {
        for record in data.chunks(1 << 20) {
            black_box(leaf::payload_hash(Lba(0), record));
        }
    });
}
