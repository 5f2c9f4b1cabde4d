//! `data/`: volumes with files that the reference wrote.

use hn4::anchor::{Anchor, Seed};
use hn4::block::BlockHeader;
use hn4::cortex;
use hn4::device::ReadAt;
use hn4::num::{index, low8};
use hn4::status::Conduct;
use hn4::volume::{Read, Volume};
use serde_json::Value;
use sha2::{Digest, Sha256};
use zerocopy::IntoBytes;

use crate::anyhow_lite::{Context, Result, bail};
use crate::json::{self, bytes_of, list, number, text_of, u64_of};
use crate::sparse::Image;
use crate::{Golden, Outcome, Tally};

pub(crate) fn run(golden: &Golden, tally: &mut Tally) -> Result<()> {
    let Some(manifest) = golden.manifest("data/manifest.json")? else {
        return Ok(());
    };
    for case in list(&manifest, "images") {
        let name = text_of(case, "name")?;
        let image = golden.image(text_of(case, "file")?)?;
        let device = json::device(&case["device"])?;
        tally.record(|| format!("data {name}"), volume_state(&image, case));
        for block in list(case, "data_blocks") {
            let outcome = data_block(&image, case, block);
            tally.record(|| format!("data {name} block {}", block["block"]), outcome);
        }
        let open = |conduct| {
            let volume = Volume::open(&image, device, conduct);
            volume.map_err(|problem| problem.to_string()).or_else(bail)
        };
        let theirs = open(Conduct::ReferenceCompatible)?;
        let ours = open(Conduct::Corrected)?;
        for file in list(case, "files") {
            let label = format!("data {name} file {}", file["name"]);
            tally.record(|| label.clone(), check_anchor(&theirs, file));
            for read in list(file, "reads") {
                let outcome = check_read(&theirs, &ours, file, read);
                tally.record(|| format!("{label} block {}", read["block"]), outcome);
            }
        }
    }
    Ok(())
}

fn volume_state(image: &Image, case: &Value) -> Result<Outcome> {
    if image.content_sha256() != text_of(case, "content_sha256")? {
        return bail("the image file does not have the content of its manifest");
    }
    Ok(Outcome::Passed)
}

fn block_size(image: &Image) -> Result<u64> {
    let north = crate::mounts::superblock_at(image, 0).context("a superblock")?;
    Ok(u64::from(north.block_size.get()))
}

fn hash(bytes: &[u8]) -> String {
    hn4::num::hex(&Sha256::digest(bytes))
}

fn data_block(image: &Image, _: &Value, block: &Value) -> Result<Outcome> {
    let size = block_size(image)?;
    let mut bytes = vec![0; index(size)];
    image.read_at(u64_of(block, "block")? * size, &mut bytes)?;
    let header = BlockHeader::from_bytes(&bytes).context("a header")?;
    if header.as_bytes() != bytes_of(text_of(block, "header_hex")?)? {
        return bail("another header than the manifest's");
    }
    let seed = Seed {
        lo: u64_of(block, "seed_lo")?,
        hi: u64_of(block, "seed_hi")?,
    };
    let fields = [
        (header.seq_index.get(), u64_of(block, "seq_index")?),
        (header.generation.get(), u64_of(block, "generation")?),
        (
            u64::from(header.comp_meta.get()),
            u64_of(block, "comp_meta")?,
        ),
        (
            u64::from(header.header_crc.get()),
            u64::from(header.computed_crc()),
        ),
        (
            u64::from(header.data_crc.get()),
            u64::from(hn4::crc::crc32(0, &bytes[48..])),
        ),
    ];
    if header.seed() != seed || fields.iter().any(|(found, expected)| found != expected) {
        return bail(format!("header {header:?}"));
    }
    // What we would write for the same bytes is what the reference wrote.
    let generation = u32::try_from(header.generation.get())?;
    if header.algorithm() == 0 {
        let used = header.stored_bytes();
        let built =
            BlockHeader::plain(seed, header.seq_index.get(), generation, &bytes[48..], used);
        if built != header {
            return bail(format!("built {built:?} instead of {header:?}"));
        }
    }
    // The payload is the decompressed one where the block is compressed.
    let mut anchor = Anchor::zeroed();
    (anchor.seed_lo, anchor.seed_hi) = (seed.lo.into(), seed.hi.into());
    anchor.write_gen = generation.into();
    let n = header.seq_index.get();
    let payload = hn4::block::open(&bytes, &anchor, n, 0, Conduct::ReferenceCompatible);
    let payload = payload
        .map_err(|problem| problem.to_string())
        .or_else(bail)?;
    let wanted = text_of(block, "payload_sha256")?;
    if hash(&payload) != wanted && hash(&bytes[48..]) != wanted {
        return bail("another payload than the manifest's");
    }
    Ok(Outcome::Passed)
}

fn anchor_of(file: &Value) -> Result<Anchor> {
    let bytes = bytes_of(text_of(file, "anchor_hex")?)?;
    Anchor::from_bytes(&bytes).context("an anchor of 128 bytes")
}

fn check_anchor(volume: &Volume<'_>, file: &Value) -> Result<Outcome> {
    let expected = anchor_of(file)?;
    if !expected.is_sound() || expected.name() != text_of(file, "name")? {
        return bail(format!("anchor {expected:?}"));
    }
    let found = cortex::find(volume.medium(), volume.superblock(), expected.seed());
    let slots: Vec<_> = list(file, "anchor_slots")
        .iter()
        .filter_map(number)
        .collect();
    if found.is_none_or(|(slot, anchor)| anchor != expected || !slots.contains(&slot)) {
        return bail(format!("found {found:?} instead of one in slots {slots:?}"));
    }
    if !file["nano"].is_null() {
        check_nano(volume, &expected, file)?;
    }
    Ok(Outcome::Passed)
}

fn check_nano(volume: &Volume<'_>, anchor: &Anchor, file: &Value) -> Result<()> {
    let lba = volume
        .nano_lba(anchor)
        .map_err(|problem| problem.to_string())
        .or_else(bail)?;
    if Some(lba) != number(&file["nano_sector_lba"]) {
        return bail(format!(
            "nano sector {lba} instead of {}",
            file["nano_sector_lba"]
        ));
    }
    let payload = volume
        .read_nano(anchor)
        .map_err(|problem| problem.to_string())
        .or_else(bail)?;
    let nano = &file["nano"];
    let (length, k) = (u64_of(nano, "len")?, u64_of(nano, "pattern_k")?);
    let expected: Vec<u8> = (0..length).map(|i| low8((i * k) ^ (i >> 8))).collect();
    if payload == expected {
        Ok(())
    } else {
        bail("another nano payload")
    }
}

type Answer = std::result::Result<Read, hn4::status::Problem>;

fn name_of(read: &Answer) -> String {
    match read {
        Ok(Read { place: None, .. }) => "SPARSE_READ".to_owned(),
        Ok(_) => "SUCCESS".to_owned(),
        Err(problem) => format!("ERR_{}", problem.code),
    }
}

fn check_read(
    theirs: &Volume<'_>,
    ours: &Volume<'_>,
    file: &Value,
    read: &Value,
) -> Result<Outcome> {
    let anchor = anchor_of(file)?;
    let n = u64_of(read, "block")?;
    let answer = theirs.read_block(&anchor, n);
    if name_of(&answer) != text_of(read, "result")? {
        return bail(format!(
            "{} instead of {}",
            name_of(&answer),
            read["result"]
        ));
    }
    if let (Ok(found), Some(expected)) = (&answer, read["payload_sha256"].as_str())
        && hash(&found.payload) != expected
    {
        return bail("another payload");
    }
    let block = |answer: &Answer| answer.as_ref().ok()?.place.map(|place| place.block);
    if let Some(expected) = number(&read["resident_block"])
        && block(&answer) != Some(expected)
    {
        return bail(format!("block {:?} instead of {expected}", block(&answer)));
    }
    let corrected = ours.read_block(&anchor, n);
    let payload = |answer: &Answer| answer.as_ref().ok().map(|read| read.payload.clone());
    if name_of(&corrected) == name_of(&answer) && payload(&corrected) == payload(&answer) {
        return Ok(Outcome::Passed);
    }
    let what = format!("{}, reference {}", name_of(&corrected), name_of(&answer));
    match corrected {
        Ok(read) if !read.corrections.is_empty() => Ok(Outcome::Corrected(read.corrections, what)),
        other => bail(format!(
            "corrected without a named defect: {what}: {:?}",
            other.err()
        )),
    }
}
