//! `vectors/`: pure functions, row by row.

use hn4::address::{self, Geometry};
use hn4::anchor::{Seed, home_slot, probe_slots};
use hn4::bitmap;
use hn4::crc::{crc32, crc32_of_broken_host};
use hn4::device::{Device, HwFlags};
use hn4::epoch_ring::{self, EpochRecord};
use hn4::layout;
use hn4::nano;
use hn4::num::{index, low8, low32};
use hn4::profile::Profile;
use hn4::status::{Code, Conduct};
use hn4::superblock::Superblock;
use hn4::superblock::copies::{Cardinal, position};
use hn4::tcc;
use serde_json::Value;
use sha2::{Digest, Sha256};
use zerocopy::IntoBytes;

use crate::anyhow_lite::{Context, Result, bail};
use crate::json::{bytes_of, i32_of, list, number, row, text_of, u32_of, u64_of};
use crate::{Golden, Outcome, Tally};

type Check = fn(&Golden, &Value, &mut Tally) -> Result<()>;

pub(crate) fn run(golden: &Golden, tally: &mut Tally) -> Result<()> {
    let files: [(&str, Check); 7] = [
        ("addr", addresses),
        ("geometry", geometry),
        ("cardinal", cardinal),
        ("primitives", primitives),
        ("crc", crc),
        ("epoch", epoch),
        ("tcc", tcc_streams),
    ];
    for (name, check) in files {
        if let Some(manifest) = golden.manifest(&format!("vectors/{name}.json"))? {
            check(golden, &manifest, tally)?;
        }
    }
    Ok(())
}

fn equal<T: PartialEq + std::fmt::Debug>(found: &T, expected: &T) -> Result<Outcome> {
    if found == expected {
        return Ok(Outcome::Passed);
    }
    bail(format!("{found:?} instead of {expected:?}"))
}

fn rows(table: &[Value], name: &str, tally: &mut Tally, check: impl Fn(&[u64]) -> Result<Outcome>) {
    for cells in table {
        let outcome = row(cells).and_then(|cells| check(&cells));
        tally.record(|| format!("{name} {cells}"), outcome);
    }
}

fn addresses(_: &Golden, manifest: &Value, tally: &mut Tally) -> Result<()> {
    for case in list(manifest, "geometries") {
        let geometry = Geometry {
            capacity: u64_of(case, "capacity")?,
            block_size: u32_of(case, "block_size")?,
            sector_size: u32_of(case, "sector_size")?,
            lba_flux_start: u64_of(case, "lba_flux_start")?,
            profile: u32_of(case, "profile")?,
            device_type: u32_of(case, "device_type")?,
            hw_caps_flags: u64_of(case, "hw_caps_flags")?,
        };
        let name = format!("addr {}", text_of(case, "name")?);
        rows(list(case, "vectors"), &name, tally, |cells| {
            let &[g, v, n, m, k, expected] = cells else {
                return bail("six columns wanted");
            };
            let (m, k) = (u16::try_from(m)?, u8::try_from(k)?);
            let found = address::trajectory(&geometry, g, v, n, m, k);
            equal(&found.unwrap_or(u64::MAX), &expected)
        });
    }
    Ok(())
}

fn geometry(_: &Golden, manifest: &Value, tally: &mut Tally) -> Result<()> {
    for cells in list(manifest, "rows") {
        let name = || format!("geometry {cells}");
        tally.record(name, geometry_row(cells));
    }
    Ok(())
}

fn geometry_row(cells: &Value) -> Result<Outcome> {
    let cells = cells.as_array().context("a row")?;
    let cell = |at: usize| cells.get(at).and_then(number).context("a number");
    let device = Device {
        capacity: cell(1)?,
        sector_size: low32(cell(2)?),
        zone_size: low32(cell(3)?),
        hw_flags: HwFlags(cell(4)?),
        temperature_celsius: 40,
    };
    let result = cells.get(7).and_then(Value::as_i64).context("a result")?;
    let profile = Profile::from_id(low32(cell(0)?));
    let computed = match profile {
        Some(profile) => layout::compute(profile, &device, cell(5)?, cell(6)?)
            .map_err(|problem| i64::from(problem.code.value())),
        None => Err(i64::from(Code::InvalidArgument.value())),
    };
    let found = computed.map(|layout| {
        let lba = |offset| layout.lba(offset);
        vec![
            layout.block_size,
            layout.capacity,
            lba(layout.epoch),
            lba(layout.cortex),
            lba(layout.bitmap),
            lba(layout.qmask),
            lba(layout.flux),
            lba(layout.horizon),
            lba(layout.chronicle),
            u64::from(layout.device_type.id()),
        ]
    });
    let expected = if result == 0 {
        Ok((8..18).map(cell).collect::<Result<Vec<_>>>()?)
    } else {
        Err(result)
    };
    equal(&found, &expected)
}

fn cardinal(_: &Golden, manifest: &Value, tally: &mut Tally) -> Result<()> {
    for cells in list(manifest, "rows") {
        let check = || {
            let cells = cells.as_array().context("a row")?;
            let (capacity, block) = (number(&cells[0]), number(&cells[1]));
            let (capacity, block) = capacity.zip(block).context("numbers")?;
            let found: Vec<_> = Cardinal::ALL
                .iter()
                .map(|&place| position(place, capacity, block).map(|offset| offset / block))
                .collect();
            let expected: Vec<_> = cells[2..].iter().map(number).collect();
            equal(&found, &expected)
        };
        tally.record(|| format!("cardinal {cells}"), check());
    }
    Ok(())
}

fn seed(lo: u64, hi: u64) -> Seed {
    Seed { lo, hi }
}

fn primitives(_: &Golden, manifest: &Value, tally: &mut Tally) -> Result<()> {
    rows(
        list(manifest, "gravity_assist"),
        "gravity_assist",
        tally,
        |cells| equal(&Some(&address::swizzle(cells[0])), &cells.get(1)),
    );
    rows(list(manifest, "coprime"), "coprime", tally, |cells| {
        let &[v, phi, expected] = cells else {
            return bail("three columns wanted");
        };
        equal(&address::adjust(v, phi), &expected)
    });
    rows(
        list(manifest, "orbit_limit"),
        "orbit_limit",
        tally,
        |cells| {
            let &[profile, device, expected] = cells else {
                return bail("three columns wanted");
            };
            let limit = address::orbit_limit(low32(profile), low32(device));
            equal(&u64::from(limit), &expected)
        },
    );
    rows(
        list(manifest, "hamming_ecc"),
        "hamming_ecc",
        tally,
        |cells| {
            let &[data, expected] = cells else {
                return bail("two columns wanted");
            };
            equal(&u64::from(bitmap::ecc(data)), &expected)
        },
    );
    for cells in list(&manifest["nano_slot"], "rows") {
        tally.record(|| format!("nano_slot {cells}"), nano_slot(cells));
    }
    for cells in list(&manifest["nano_crc"], "rows") {
        let check = || {
            let cell = |at: usize| number(&cells[at]).context("a number");
            let payload = bytes_of(cells[4].as_str().context("hexadecimal")?)?;
            let owner = seed(cell(1)?, cell(2)?);
            let found = nano::payload_crc(cell(0)?, owner, cell(3)?, &payload);
            equal(&u64::from(found), &cell(5)?)
        };
        tally.record(|| format!("nano_crc {cells}"), check());
    }
    anchor_slots(list(&manifest["anchor_slot"], "rows"), tally);
    Ok(())
}

fn nano_slot(cells: &Value) -> Result<Outcome> {
    let cell = |at: usize| number(&cells[at]).context("a number");
    let owner = seed(cell(2)?, cell(3)?);
    let found = nano::sector(cell(0)?, owner, cell(4)?, cell(5)?, cell(6)?);
    let result = cells[7].as_i64().context("a result")?;
    let expected = if result == 0 {
        Ok(cell(8)?)
    } else {
        Err(result)
    };
    equal(
        &found.map_err(|problem| i64::from(problem.code.value())),
        &expected,
    )
}

/// Anchors are inserted in order; slot 0 holds the root.
fn anchor_slots(table: &[Value], tally: &mut Tally) {
    let mut used = vec![0];
    for cells in table {
        let mut check = || {
            let cells = row(cells)?;
            let &[lo, hi, slots, home, slot] = &cells[..] else {
                return bail("five columns");
            };
            let free = probe_slots(seed(lo, hi), slots).find(|slot| !used.contains(slot));
            used.extend(free);
            equal(
                &(home_slot(seed(lo, hi), slots), free),
                &(Some(home), Some(slot)),
            )
        };
        tally.record(|| format!("anchor_slot {cells}"), check());
    }
}

fn pattern(length: u64) -> Vec<u8> {
    (0..length).map(|i| low8(i * 7 + 3)).collect()
}

fn crc(_: &Golden, manifest: &Value, tally: &mut Tally) -> Result<()> {
    for vector in list(manifest, "vectors") {
        let check = || {
            let bytes = match vector["hex"].as_str() {
                Some(hex) => bytes_of(hex)?,
                None => pattern(u64_of(vector, "pattern_len")?),
            };
            equal(
                &crc32(u32_of(vector, "seed")?, &bytes),
                &u32_of(vector, "crc")?,
            )
        };
        tally.record(|| format!("crc {vector}"), check());
    }
    rows(
        list(&manifest["uninitialised_table"], "rows"),
        "broken crc",
        tally,
        |cells| {
            let &[seed, length, expected] = cells else {
                return bail("three columns wanted");
            };
            equal(
                &u64::from(crc32_of_broken_host(low32(seed), index(length))),
                &expected,
            )
        },
    );
    Ok(())
}

fn epoch(golden: &Golden, manifest: &Value, tally: &mut Tally) -> Result<()> {
    for case in list(manifest, "genesis") {
        let check = || {
            let now = u64_of(case, "generation_ts")?;
            let expected = bytes_of(text_of(case, "record_hex")?)?;
            equal(&EpochRecord::genesis(now).as_bytes(), &&expected[..])?;
            let root = hn4::anchor::Anchor::root(hn4::anchor::ROOT_PERMISSIONS, now);
            equal(
                &root.as_bytes(),
                &&bytes_of(text_of(case, "root_anchor_hex")?)?[..],
            )
        };
        tally.record(|| format!("epoch genesis {}", case["image"]), check());
    }
    for case in list(manifest, "advance") {
        let outcome = advance(golden, case);
        tally.record(|| format!("epoch advance {}", case["name"]), outcome);
    }
    Ok(())
}

/// The sector size of an advance: the image's, by its own layout.
fn sector_of(golden: &Golden, case: &Value) -> Result<u64> {
    let image = golden.image(text_of(case, "image")?)?;
    let north = crate::mounts::superblock_at(&image, 0).context("no superblock")?;
    // The epoch ring starts behind North: its sector and its byte offset are both known.
    let block = u64::from(north.block_size.get());
    Ok(hn4::num::round_up(8192, block) / north.lba_epoch_start.get())
}

fn advance(golden: &Golden, case: &Value) -> Result<Outcome> {
    let fields = &case["sb"];
    let mut superblock = Superblock::zeroed();
    superblock.current_epoch_id = u64_of(fields, "current_epoch_id")?.into();
    superblock.epoch_ring_block_idx = u64_of(fields, "epoch_ring_block_idx")?.into();
    superblock.copy_generation = u64_of(fields, "copy_generation")?.into();
    superblock.state_flags = u32_of(fields, "state_flags")?.into();
    superblock.lba_epoch_start = u64_of(fields, "lba_epoch_start")?.into();
    superblock.block_size = u32_of(fields, "block_size")?.into();
    superblock.format_profile = u32_of(fields, "format_profile")?.into();
    let (sector, now) = (sector_of(golden, case)?, u64_of(case, "now_ns")?);
    let read_only = case["read_only"].as_bool().unwrap_or(false);
    let result = i32_of(case, "result")?;
    let by = |conduct| epoch_ring::advance(&superblock, sector, now, read_only, conduct);
    let (theirs, ours) = match (by(Conduct::ReferenceCompatible), by(Conduct::Corrected)) {
        (Ok(theirs), Ok(ours)) => (theirs, ours),
        (theirs, _) => return equal(&theirs.map_err(|p| p.code.value()).err(), &Some(result)),
    };
    equal(&result, &0)?;
    let place = (
        u64_of(case, "new_epoch_id")?,
        u64_of(case, "new_ring_block_idx")?,
    );
    equal(&(theirs.epoch_id, theirs.block), &place)?;
    let expected = |key| bytes_of(text_of(case, key)?);
    equal(
        &theirs.record.as_bytes(),
        &&expected("record_hex_reference")?[..],
    )?;
    equal(
        &ours.record.as_bytes(),
        &&expected("record_hex_with_correct_crc")?[..],
    )?;
    let what = "the record's checksum is written".to_owned();
    Ok(Outcome::Corrected(vec![hn4::status::Defect(4)], what))
}

fn tcc_streams(_: &Golden, manifest: &Value, tally: &mut Tally) -> Result<()> {
    let lexicon: Vec<_> = list(manifest, "lexicon")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    if !lexicon.is_empty() {
        tally.record(
            || "tcc lexicon".to_owned(),
            equal(&&lexicon[..], &&tcc::LEXICON[..]),
        );
    }
    for case in list(manifest, "decode") {
        let check = || {
            let found = tcc::decode(&bytes_of(text_of(case, "hex")?)?, 1 << 16).ok();
            let expected = case["out_hex"].as_str().map(bytes_of).transpose()?;
            equal(&found, &expected)?;
            equal(&(i32_of(case, "result")? == 0), &expected.is_some())
        };
        tally.record(|| format!("tcc decode {}", case["name"]), check());
    }
    for case in list(manifest, "roundtrips") {
        let check = || {
            // Streams that the manifest leaves out cannot be decoded.
            let Some(hex) = case["compressed_hex"].as_str() else {
                return Ok(Outcome::Passed);
            };
            let limit = index(u64_of(case, "raw_len")?);
            let raw = tcc::decode(&bytes_of(hex)?, limit)?;
            let hash = hn4::num::hex(&Sha256::digest(&raw));
            equal(&hash.as_str(), &text_of(case, "raw_sha256")?)
        };
        tally.record(|| format!("tcc roundtrip {}", case["name"]), check());
    }
    Ok(())
}
