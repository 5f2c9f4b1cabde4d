//! `quorum/` and `mount/`: patched images, mounted for writing and read-only.

use hn4::device::{Device, ReadAt};
use hn4::mount::{self, Assessment, Request};
use hn4::status::Conduct;
use hn4::superblock::copies::{Cardinal, position};
use hn4::superblock::{MAGIC, MAGIC_TAIL, Superblock};
use serde_json::Value;

use crate::anyhow_lite::{Context, Failure, Result, bail};
use crate::json::{self, compare_trace, list, number, text_of, trace, u64_of};
use crate::sparse::Image;
use crate::{Golden, Outcome, Tally};

pub(crate) fn run(golden: &Golden, tally: &mut Tally, folder: &str) -> Result<()> {
    let Some(manifest) = golden.manifest(&format!("{folder}/manifest.json"))? else {
        return Ok(());
    };
    for case in list(&manifest, "cases") {
        run_mounts(golden, tally, folder, case);
    }
    Ok(())
}

/// All mounts of a case, each on a fresh copy of its base.
pub(crate) fn run_mounts(golden: &Golden, tally: &mut Tally, folder: &str, case: &Value) {
    for expected in list(case, "mounts") {
        let name = || {
            format!(
                "{folder} {} flags {}",
                case["name"], expected["mount_flags"]
            )
        };
        tally.record(name, run_mount(golden, case, expected));
    }
}

/// The superblock at a byte offset, valid or not.
pub(crate) fn superblock_at(image: &Image, offset: u64) -> Option<Superblock> {
    let mut bytes = vec![0; 8192];
    image.read_at(offset, &mut bytes).ok()?;
    Superblock::from_bytes(&bytes)
}

/// Valid in the sense of the manifests: magics and checksum.
fn is_valid(superblock: &Superblock) -> bool {
    superblock.magic.get() == MAGIC
        && superblock.magic_tail.get() == MAGIC_TAIL
        && superblock.sb_crc.get() == superblock.computed_crc()
}

fn run_mount(golden: &Golden, case: &Value, expected: &Value) -> Result<Outcome> {
    let image = golden.base(case)?;
    let device = json::device(&case["device"])?;
    let faults = json::faults(case)?;
    let by = |conduct| {
        let request = Request {
            flags: u64_of(expected, "mount_flags")?,
            now_ns: u64_of(case, "now_ns")?,
            conduct,
            ..Request::default()
        };
        Ok::<_, Failure>(mount::assess(&image, device, &faults, &request))
    };
    let (theirs, ours) = (by(Conduct::ReferenceCompatible)?, by(Conduct::Corrected)?);
    let wanted = &expected["expect"];
    if wanted["result"].is_null() {
        // The reference itself did not survive this one.
        let what = format!("{}; here: {}", wanted["result_name"], describe(&ours));
        return Ok(Outcome::Corrected(ours.corrections, what));
    }
    compare(&theirs, wanted, &image, &device)?;
    judge(&theirs, &ours)
}

/// Compares the corrected assessment with the compatible one.
fn judge(theirs: &Assessment, ours: &Assessment) -> Result<Outcome> {
    let same_verdict = match (&theirs.verdict, &ours.verdict) {
        (Ok(theirs), Ok(ours)) => {
            theirs.is_read_only() == ours.is_read_only()
                && theirs.superblock == ours.superblock
                && theirs.taint == ours.taint
        }
        (Err(theirs), Err(ours)) => theirs.code == ours.code,
        _ => false,
    };
    if same_verdict && theirs.plan == ours.plan {
        return Ok(Outcome::Passed);
    }
    if ours.corrections.is_empty() {
        let (theirs, ours) = (describe(theirs), describe(ours));
        return bail(format!(
            "corrected without a named defect: {ours}, reference: {theirs}"
        ));
    }
    Ok(Outcome::Corrected(ours.corrections.clone(), describe(ours)))
}

fn describe(assessment: &Assessment) -> String {
    let writes = assessment.plan.steps.len();
    match &assessment.verdict {
        Err(problem) => format!("{} after {writes} operations", problem.code),
        Ok(volume) => {
            let reasons: Vec<_> = volume.reasons.iter().map(ToString::to_string).collect();
            let mode = if volume.is_read_only() {
                "read-only"
            } else {
                "writable"
            };
            format!("{mode} [{}], {writes} operations", reasons.join("; "))
        }
    }
}

fn check<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    bail(format!("{what}: {found:?} instead of {expected:?}"))
}

/// Compares an assessment with what a manifest says.
pub(crate) fn compare(
    found: &Assessment,
    wanted: &Value,
    image: &Image,
    device: &Device,
) -> Result<()> {
    let code = found
        .verdict
        .as_ref()
        .err()
        .map_or(0, |problem| problem.code.value());
    check(
        "result",
        i64::from(code),
        wanted["result"].as_i64().context("a result")?,
    )?;
    if let Ok(volume) = &found.verdict {
        compare_volume(volume, wanted)?;
    }
    if let Some(io) = wanted["io"].as_array() {
        compare_trace(&trace(&[&found.plan], device), io)?;
    }
    let mut after = image.clone();
    after.apply(&found.plan, true, u64::from(device.zone_size));
    if let Some(written) = wanted["written"].as_array() {
        for range in written {
            let (offset, length) = (u64_of(range, "off")?, u64_of(range, "len")?);
            let hash = after.sha256_of(offset, length);
            check(
                &format!("bytes at {offset}"),
                hash.as_str(),
                text_of(range, "sha256")?,
            )?;
        }
    }
    compare_copies(&after, &wanted["copies_after"], device)
}

/// The state of a mounted volume, field by field; fields that a manifest leaves out do not count.
pub(crate) fn compare_volume(volume: &mount::Mounted, wanted: &Value) -> Result<()> {
    let flags = [
        ("read_only", volume.is_read_only()),
        ("bitmap_loaded", volume.bitmap.is_some()),
        ("qmask_loaded", volume.qmask.is_some()),
        ("cortex_cached", volume.cortex_cached),
    ];
    for (key, found) in flags {
        if let Some(expected) = wanted[key].as_bool() {
            check(key, found, expected)?;
        }
    }
    let counts = [
        ("taint_counter", volume.taint),
        ("heal_count", volume.healed_entries),
    ];
    for (key, found) in counts {
        if let Some(expected) = number(&wanted[key]) {
            check(key, u64::from(found), expected)?;
        }
    }
    compare_fields(&volume.superblock, &wanted["sb"])
}

/// The fields of a superblock that a manifest names.
pub(crate) fn compare_fields(superblock: &Superblock, wanted: &Value) -> Result<()> {
    let Some(wanted) = wanted.as_object() else {
        return Ok(());
    };
    for (key, expected) in wanted {
        let found = match key.as_str() {
            "magic" => superblock.magic.get(),
            "version" => superblock.version.get().into(),
            "block_size" => superblock.block_size.get().into(),
            "uuid_lo" => superblock.uuid_lo.get(),
            "uuid_hi" => superblock.uuid_hi.get(),
            "lba_epoch_start" => superblock.lba_epoch_start.get(),
            "total_capacity" => superblock.total_capacity.get(),
            "lba_cortex_start" => superblock.lba_cortex_start.get(),
            "lba_bitmap_start" => superblock.lba_bitmap_start.get(),
            "lba_flux_start" => superblock.lba_flux_start.get(),
            "lba_horizon_start" => superblock.lba_horizon_start.get(),
            "lba_stream_start" => superblock.lba_stream_start.get(),
            "lba_qmask_start" => superblock.lba_qmask_start.get(),
            "current_epoch_id" => superblock.current_epoch_id.get(),
            "epoch_ring_block_idx" => superblock.epoch_ring_block_idx.get(),
            "copy_generation" => superblock.copy_generation.get(),
            "sentinel_cursor" => superblock.sentinel_cursor.get(),
            "hw_caps_flags" => superblock.hw_caps_flags.get(),
            "state_flags" => superblock.state_flags.get().into(),
            "compat_flags" => superblock.compat_flags.get(),
            "incompat_flags" => superblock.incompat_flags.get(),
            "ro_compat_flags" => superblock.ro_compat_flags.get(),
            "mount_intent" => superblock.mount_intent.get(),
            "dirty_bits" => superblock.dirty_bits.get(),
            "last_mount_time" => superblock.last_mount_time.get(),
            "journal_ptr" => superblock.journal_ptr.get(),
            "journal_start" => superblock.journal_start.get(),
            "endian_tag" => superblock.endian_tag.get().into(),
            "format_profile" => superblock.format_profile.get().into(),
            "device_type_tag" => superblock.device_type_tag.get().into(),
            "generation_ts" => superblock.generation_ts.get(),
            "magic_tail" => superblock.magic_tail.get(),
            "boot_map_ptr" => superblock.boot_map_ptr.get(),
            "last_journal_seq" => superblock.last_journal_seq.get(),
            "sb_crc" => superblock.sb_crc.get().into(),
            "volume_label" => {
                check(
                    key,
                    superblock.label().as_str(),
                    expected.as_str().unwrap_or_default(),
                )?;
                continue;
            }
            // A field that this runner does not know cannot be wrong silently.
            other => return bail(format!("unknown superblock field {other}")),
        };
        check(key, Some(found), number(expected))?;
    }
    Ok(())
}

/// The copies that a manifest lists, at the positions of the device's capacity.
pub(crate) fn compare_copies(image: &Image, wanted: &Value, device: &Device) -> Result<()> {
    let Some(wanted) = wanted.as_object() else {
        return Ok(());
    };
    for (name, expected) in wanted {
        if !expected.is_object() {
            continue;
        }
        let block = u64_of(expected, "block")?;
        let valid = expected["valid"].as_bool().unwrap_or(false);
        // The copy may name another block size than the one that put it there.
        let sizes = number(&expected["block_size"]).into_iter();
        let sizes = sizes.chain(block_sizes_of(name, block, device));
        let found: Vec<_> = sizes
            .filter_map(|size| superblock_at(image, block.checked_mul(size)?))
            .collect();
        let mut outcome = bail(format!("{name}: valid {} instead of {valid}", !valid));
        if found.is_empty() && !valid {
            outcome = Ok(());
        }
        for superblock in found
            .iter()
            .filter(|superblock| is_valid(superblock) == valid)
        {
            let named = || expected.as_object().into_iter().flatten();
            let fields: serde_json::Map<_, _> = named()
                .filter(|(key, _)| valid && !matches!(key.as_str(), "block" | "valid"))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect();
            outcome = compare_fields(superblock, &Value::Object(fields))
                .map_err(|failure| Failure(format!("{name}: {failure}")));
            if outcome.is_ok() {
                break;
            }
        }
        outcome?;
    }
    Ok(())
}

/// Block sizes that put a copy of this name at this block.
fn block_sizes_of(name: &str, block: u64, device: &Device) -> Vec<u64> {
    let cardinal = Cardinal::ALL
        .into_iter()
        .find(|cardinal| name.ends_with(cardinal.name()));
    let Some(cardinal) = cardinal else {
        return Vec::new();
    };
    let sizes = (9..28).map(|shift| 1_u64 << shift);
    let fits = |&size: &u64| position(cardinal, device.capacity, size) == block.checked_mul(size);
    sizes
        .filter(|size| size % device.sector() == 0)
        .filter(fits)
        .collect()
}
