//! What a dictionary gains on the 4 KiB pages of a file, such as an image of a file system.
#![forbid(unsafe_code)]

use std::time::Instant;

use hn4_proof::scxq2::train::{Renewal, Trainer};
use hn4_proof::scxq2::{Meter, Packer};

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
    for (name, use_it) in [("without", false), ("with", true)] {
        let mut packer = Packer::new(3, true)?;
        if use_it {
            packer.set_dictionary(&dictionary)?;
        }
        let start = Instant::now();
        let measured = pages
            .iter()
            .enumerate()
            .filter(|(at, _)| at / 4 % step != 0);
        for (_, page) in measured {
            packer.pack(page)?;
        }
        let meter = packer.meter();
        let ratio = meter.raw_bytes as f64 / meter.packed_bytes as f64;
        println!(
            "{name:8} ratio {ratio:.2}, {} pages, {:?}",
            meter.raw_bytes / 4096,
            start.elapsed()
        );
    }
    Ok(())
}
