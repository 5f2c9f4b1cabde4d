//! `images/` and `format/`: formats from parameters, compared byte for byte.

use hn4::device::Device;
use hn4::format::{Formatted, Identity, Params, format};
use hn4::mount::{self, Request};
use hn4::plan::{Faults, Op};
use hn4::status::Conduct;
use serde_json::Value;

use crate::anyhow_lite::{Result, bail};
use crate::json::{
    self, bytes_of, compare_trace, i32_of, list, number, text_of, trace, u32_of, u64_of,
};
use crate::mounts::{compare_copies, compare_fields, superblock_at};
use crate::sparse::Image;
use crate::{Golden, Outcome, Tally, lifecycle};

pub(crate) fn run_images(golden: &Golden, tally: &mut Tally) -> Result<()> {
    let Some(manifest) = golden.manifest("images/manifest.json")? else {
        return Ok(());
    };
    for case in list(&manifest, "images") {
        tally.record(|| format!("image {}", case["name"]), image(golden, case));
    }
    Ok(())
}

pub(crate) fn run_cases(golden: &Golden, tally: &mut Tally) -> Result<()> {
    let Some(manifest) = golden.manifest("format/manifest.json")? else {
        return Ok(());
    };
    for case in list(&manifest, "cases") {
        tally.record(|| format!("format {}", case["name"]), format_case(case));
    }
    Ok(())
}

fn params(case: &Value, conduct: Conduct) -> Result<Params> {
    let fields = &case["params"];
    // A format without clone_uuid draws its identity: only the outcome tells which.
    let drawn = fields["clone_uuid"].as_bool() == Some(false);
    let told = if drawn {
        &case["superblock_north"]
    } else {
        fields
    };
    let half = |key: &str| number(&told[key]);
    let identity = match half("uuid_lo").zip(half("uuid_hi")) {
        Some((lo, hi)) if !drawn || is_drawn_uuid(hi) => Identity::Specific { lo, hi },
        Some(_) => return bail("a drawn UUID without its version and variant bits"),
        None => Identity::Fresh { r1: 1, r2: 2 },
    };
    let optional = |key| number(&fields[key]).unwrap_or(0);
    Ok(Params {
        profile: u32_of(fields, "profile")?,
        label: fields["label"].as_str().map(str::to_owned),
        identity,
        mount_intent_flags: optional("mount_intent_flags"),
        override_capacity_bytes: optional("override_capacity_bytes"),
        root_perms_or: u32::try_from(optional("root_perms_or"))?,
        now_ns: u64_of(case, "now_ns")?,
        conduct,
    })
}

/// Version 7, and the variant bits where the reference puts them.
fn is_drawn_uuid(hi: u64) -> bool {
    hi >> 12 & 0xF == 7 && hi >> 62 == 0b10
}

fn code(formatted: &Formatted) -> i32 {
    formatted
        .verdict
        .as_ref()
        .err()
        .map_or(0, |problem| problem.code.value())
}

fn check_file(golden: &Golden, case: &Value) -> Result<Image> {
    let image = golden.image(text_of(case, "file")?)?;
    if image.content_sha256() != text_of(case, "content_sha256")? {
        return bail("the image file does not have the content of its manifest");
    }
    if let Some(superblock) = superblock_at(&image, 0) {
        compare_fields(&superblock, &case["superblock_north"])?;
    }
    compare_copies(&image, &case["copies"], &json::device(&case["device"])?)?;
    Ok(image)
}

fn image(golden: &Golden, case: &Value) -> Result<Outcome> {
    let image = check_file(golden, case)?;
    match text_of(case, "op")? {
        "format" => formatted_image(case),
        "reformat" => reformatted_image(case, &image),
        "lifecycle" => lifecycle::run(golden, case),
        other => bail(format!("unknown operation {other}")),
    }
}

fn formatted_image(case: &Value) -> Result<Outcome> {
    let device = json::device(&case["device"])?;
    let mut image = Image::blank(device.capacity);
    let faults = Faults::default();
    let theirs = format(
        &image,
        device,
        &faults,
        &params(case, Conduct::ReferenceCompatible)?,
    );
    let ours = format(&image, device, &faults, &params(case, Conduct::Corrected)?);
    if code(&theirs) != i32_of(case, "result")? {
        return bail(format!(
            "result {} instead of {}",
            code(&theirs),
            case["result"]
        ));
    }
    if let Some(io) = case["io"].as_array() {
        compare_trace(&trace(&[&theirs.plan], &device), io)?;
    }
    image.apply(&theirs.plan, true, u64::from(device.zone_size));
    let (found, expected) = (image.content_sha256(), text_of(case, "content_sha256")?);
    if found != expected {
        return bail(format!("content {found} instead of {expected}"));
    }
    judge(&theirs, &ours)
}

/// A corrected format must end as the reference's does, or name the defect that it does not share.
fn judge(theirs: &Formatted, ours: &Formatted) -> Result<Outcome> {
    let same_end = code(theirs) == code(ours);
    let same_touch = theirs.plan.touches_medium() == ours.plan.touches_medium();
    if same_end && same_touch {
        return Ok(Outcome::Passed);
    }
    let outcome = match &ours.verdict {
        Ok(_) => "formatted".to_owned(),
        Err(problem) => format!(
            "{} after {} operations",
            problem.code,
            ours.plan.steps.len()
        ),
    };
    if ours.corrections.is_empty() {
        return bail(format!("corrected without a named defect: {outcome}"));
    }
    Ok(Outcome::Corrected(ours.corrections.clone(), outcome))
}

/// What was there before a re-format is not told. But on a device whose discards change nothing,
/// formatting the result once more must change nothing either.
fn reformatted_image(case: &Value, image: &Image) -> Result<Outcome> {
    let device = json::device(&case["device"])?;
    let faults = Faults::default();
    let zone = u64::from(device.zone_size);
    let theirs = format(
        image,
        device,
        &faults,
        &params(case, Conduct::ReferenceCompatible)?,
    );
    let zeroes = case["device"]["discard_zeroes"].as_bool().unwrap_or(true);
    let mut again = image.clone();
    again.apply(&theirs.plan, zeroes, zone);
    if code(&theirs) != 0 || again.content_sha256() != image.content_sha256() {
        return bail("formatting again changes the image");
    }
    let ours = format(image, device, &faults, &params(case, Conduct::Corrected)?);
    let mut corrected = image.clone();
    corrected.apply(&ours.plan, zeroes, zone);
    let mounts = |image: &Image| {
        let request = Request {
            now_ns: u64_of(case, "now_ns")?,
            ..Request::default()
        };
        Ok::<_, crate::anyhow_lite::Failure>(
            mount::assess(image, device, &faults, &request).verdict,
        )
    };
    match (mounts(image)?, mounts(&corrected)?) {
        (Err(stale), Ok(_)) => {
            let what = format!(
                "mounts after our format, {} after the reference's",
                stale.code
            );
            let mut defects = ours.corrections;
            defects.retain(|defect| defect.0 != 1);
            Ok(Outcome::Corrected(defects, what))
        }
        (_, Err(problem)) => bail(format!("our own format does not mount: {problem}")),
        (Ok(_), Ok(_)) => Ok(Outcome::Passed),
    }
}

fn format_case(case: &Value) -> Result<Outcome> {
    let device = json::device(&case["device"])?;
    let faults = json::faults(case)?;
    let blank = Image::blank(device.capacity);
    let by = |conduct| Ok(format(&blank, device, &faults, &params(case, conduct)?));
    let (theirs, ours): (_, Result<Formatted>) =
        (by(Conduct::ReferenceCompatible)?, by(Conduct::Corrected));
    compare_format(case, &device, &theirs)?;
    judge(&theirs, &ours?)
}

fn compare_format(case: &Value, device: &Device, found: &Formatted) -> Result<()> {
    let check = |what: &str, same: bool, found: String| {
        if same {
            Ok(())
        } else {
            bail(format!("{what}: {found} instead of {}", case[what]))
        }
    };
    check(
        "result",
        code(found) == i32_of(case, "result")?,
        code(found).to_string(),
    )?;
    compare_trace(&trace(&[&found.plan], device), list(case, "io"))?;
    let operations = found.plan.steps.len() as u64;
    if let Some(expected) = number(&case["io_ops"]) {
        check("io_ops", operations == expected, operations.to_string())?;
    }
    let touched = found.plan.touches_medium();
    if let Some(expected) = case["media_touched"].as_bool() {
        check("media_touched", touched == expected, touched.to_string())?;
    }
    let zeroes = case["device"]["discard_zeroes"].as_bool().unwrap_or(true);
    let erased = found.plan.steps.iter().any(|step| {
        let erases = matches!(step.op, Op::Discard { .. } | Op::ZoneReset { .. });
        erases && zeroes && step.fails.is_none()
    });
    if let Some(expected) = case["previous_content_survives"].as_bool() {
        check(
            "previous_content_survives",
            erased != expected,
            (!erased).to_string(),
        )?;
    }
    let mut image = Image::blank(device.capacity);
    image.apply(&found.plan, zeroes, u64::from(device.zone_size));
    let north = superblock_at(&image, 0);
    if let Some(expected) = case["north_first_16_hex"].as_str() {
        let head = hn4::num::hex(
            &zerocopy::IntoBytes::as_bytes(&north.unwrap_or(hn4::superblock::Superblock::zeroed()))
                [..16],
        );
        check(
            "north_first_16_hex",
            bytes_of(expected)? == bytes_of(&head)?,
            head,
        )?;
    }
    let valid = north.filter(|north| north.check(device.sector(), 0).is_ok());
    if let Some(expected) = number(&case["north_state_flags"]) {
        let flags = valid.map(|north| u64::from(north.state_flags.get()));
        check(
            "north_state_flags",
            flags == Some(expected),
            format!("{flags:?}"),
        )?;
    }
    Ok(())
}
