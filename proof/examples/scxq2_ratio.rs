//! What a dictionary gains on the 4 KiB pages of a file, such as an image of a file system, and
//! what packing and unpacking cost at some levels of zstd.
#![forbid(unsafe_code)]

use std::time::Instant;

use hn4_proof::scxq2::train::{Renewal, Trainer};
use hn4_proof::scxq2::{Dictionary, MAX_RAW_BYTES, Meter, Packer, Unpacker};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: scxq2_ratio FILE")?;
    let image = std::fs::read(path)?;
    let pages: Vec<&[u8]> = image
        .chunks_exact(4096)
        .filter(|page| page.iter().any(|byte| *byte != 0))
        .collect();
    // The messages are spread over the file, as writes are; the pages that are measured are others.
    let step = (pages.len() / 400).max(1);
    let mut trainer = Trainer::new(Renewal::default());
    let mut samples = None;
    for message in pages.chunks(4).step_by(step) {
        samples = trainer.see(&message.concat(), &Meter::default());
        if samples.is_some() {
            break;
        }
    }
    let start = Instant::now();
    let dictionary = samples.ok_or("fewer than 100 messages")?.train()?;
    println!(
        "dictionary {} bytes, trained in {:?}",
        dictionary.bytes().len(),
        start.elapsed()
    );
    let measured = || {
        let others = |(at, _): &(usize, _)| at / 4 % step != 0;
        pages
            .iter()
            .enumerate()
            .filter(others)
            .map(|(_, page)| *page)
    };
    for blocks in [1, 2, 16, 64] {
        let messages: Vec<Vec<u8>> = {
            let all: Vec<&[u8]> = measured().collect();
            all.chunks(blocks).map(<[&[u8]]>::concat).collect()
        };
        for level in [1, 3] {
            for dictionary in [None, Some(&dictionary)] {
                cost(&messages, level, dictionary)?;
            }
        }
    }
    Ok(())
}

fn cost(
    messages: &[Vec<u8>],
    level: i32,
    dictionary: Option<&Dictionary>,
) -> Result<(), Box<dyn std::error::Error>> {
    let (mut packer, mut unpacker) = (Packer::new(level, true)?, Unpacker::new()?);
    if let Some(dictionary) = dictionary {
        packer.set_dictionary(dictionary)?;
        unpacker.learn(dictionary.clone())?;
    }
    let start = Instant::now();
    let packed = messages.iter().map(|message| packer.pack(message));
    let packed = packed.collect::<Result<Vec<_>, _>>()?;
    let packing = start.elapsed();
    let start = Instant::now();
    for segment in &packed {
        unpacker.unpack(segment, MAX_RAW_BYTES)?;
    }
    let unpacking = start.elapsed();
    let meter = packer.meter();
    let raw = meter.raw_bytes as f64;
    println!(
        "messages of {:3} KiB, level {level}, {:8} ratio {:.2}, packs {:.0} MiB/s ({:.1} us each), \
         unpacks {:.0} MiB/s",
        messages.first().map_or(0, Vec::len) / 1024,
        if dictionary.is_some() {
            "with:"
        } else {
            "without:"
        },
        raw / meter.packed_bytes as f64,
        raw / packing.as_secs_f64() / 1_048_576.0,
        packing.as_secs_f64() * 1e6 / messages.len().max(1) as f64,
        raw / unpacking.as_secs_f64() / 1_048_576.0
    );
    Ok(())
}
