//! `chronicle/`: logs, their verification, the mounts over them, and single appends.

use hn4::chronicle::append::{self, Request as Append};
use hn4::chronicle::verify::{self, list as entries_of};
use hn4::chronicle::{Bounds, LinkKey, Sector};
use hn4::device::Device;
use hn4::mount::{self, Mounted, Request};
use hn4::plan::{Faults, Medium};
use hn4::status::{Conduct, Defect};
use hn4::superblock::{Superblock, intent, state};
use serde_json::Value;

use crate::anyhow_lite::{Context, Result, bail};
use crate::json::{self, bytes_of, compare_trace, i32_of, list, number, text_of, trace, u64_of};
use crate::mounts::{run_mounts, superblock_at};
use crate::sparse::Image;
use crate::{Golden, Outcome, Tally};

const T0: u64 = 1_700_000_000_000_000_000;
const SECOND: u64 = 1_000_000_000;

pub(crate) fn run(golden: &Golden, tally: &mut Tally) -> Result<()> {
    if let Some(manifest) = golden.manifest("chronicle/manifest.json")? {
        for base in list(&manifest, "bases") {
            tally.record(
                || format!("chronicle log {}", base["name"]),
                log(golden, base),
            );
        }
        for case in list(&manifest, "cases") {
            tally.record(
                || format!("chronicle verify {}", case["name"]),
                verified(golden, case),
            );
            run_mounts(golden, tally, "chronicle", case);
        }
    }
    if let Some(manifest) = golden.manifest("chronicle/append.json")? {
        for case in list(&manifest, "cases") {
            tally.record(
                || format!("chronicle append {}", case["name"]),
                appended(golden, case),
            );
        }
    }
    Ok(())
}

fn check<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    bail(format!("{what}: {found:?} instead of {expected:?}"))
}

fn log(golden: &Golden, base: &Value) -> Result<Outcome> {
    let image = golden.image(text_of(base, "file")?)?;
    check(
        "content",
        image.content_sha256().as_str(),
        text_of(base, "content_sha256")?,
    )?;
    let device = json::device(&base["device"])?;
    let faults = Faults::default();
    let medium = Medium::new(&image, device, &faults);
    let north = superblock_at(&image, 0).context("a superblock")?;
    let bounds = Bounds::of(&north, device.sector());
    check(
        "append_ring_end",
        bounds.reference_append_end,
        u64_of(base, "append_ring_end")?,
    )?;
    check(
        "journal_start",
        bounds.start,
        u64_of(base, "journal_start")?,
    )?;
    check(
        "journal_ptr",
        north.journal_ptr.get(),
        u64_of(base, "journal_ptr")?,
    )?;
    check(
        "last_journal_seq",
        north.last_journal_seq.get(),
        u64_of(base, "last_journal_seq")?,
    )?;
    for expected in list(base, "entries") {
        let lba = u64_of(expected, "lba")?;
        let region = hn4::status::Region::Chronicle;
        let size = device.sector();
        let bytes = medium
            .read_vec(region, lba * size, size)
            .map_err(|problem| problem.code);
        let sector = bytes.ok().and_then(|bytes| Sector::parse(bytes, lba));
        compare_entry(sector.as_ref(), expected)?;
    }
    if base["entries_listed"].as_str() == Some("all") {
        replay(golden, base, &image, &device, &north)?;
    }
    let newest = entries_of(&medium, &north, u64::MAX);
    let known = newest
        .last()
        .map_or(0, |sector| sector.entry.sequence.get());
    check("newest entry", known, north.last_journal_seq.get())?;
    Ok(Outcome::Passed)
}

fn compare_entry(sector: Option<&Sector>, expected: &Value) -> Result<()> {
    check(
        "valid",
        sector.is_some(),
        expected["valid"].as_bool().unwrap_or(true),
    )?;
    let Some(sector) = sector else { return Ok(()) };
    let entry = &sector.entry;
    let marker = sector
        .bytes()
        .last_chunk()
        .map(|bytes| u64::from_le_bytes(*bytes));
    let fields = [
        ("sequence", entry.sequence.get()),
        ("timestamp", entry.timestamp.get()),
        ("old_lba", entry.old_lba.get()),
        ("new_lba", entry.new_lba.get()),
        ("self_lba", entry.self_lba.get()),
        ("principal_hash32", entry.principal_hash32.get().into()),
        ("version", entry.version.get().into()),
        ("op_code", entry.op_code.get().into()),
        ("prev_sector_crc", entry.prev_sector_crc.get().into()),
        ("entry_header_crc", entry.entry_header_crc.get().into()),
        ("sector_crc", sector.crc().into()),
        ("commit_marker", marker.unwrap_or(0)),
    ];
    for (key, found) in fields {
        check(key, found, u64_of(expected, key)?)?;
    }
    Ok(())
}

/// Where all entries are listed, appending them to the image that the log came from must give the
/// log, byte for byte.
fn replay(
    golden: &Golden,
    base: &Value,
    wanted: &Image,
    device: &Device,
    north: &Superblock,
) -> Result<()> {
    let from = format!("images/{}.sparse.zst", text_of(base, "from_image")?);
    let mut image = golden.image(&from)?;
    let now = north.last_mount_time.get();
    let mut volume = mounted(&mut image, device, now)?;
    for entry in list(base, "entries") {
        let request = Append {
            op_code: u16::try_from(u64_of(entry, "op_code")?)?,
            old_lba: u64_of(entry, "old_lba")?,
            new_lba: u64_of(entry, "new_lba")?,
            principal: u64_of(entry, "principal_hash32")?,
            now_ns: u64_of(entry, "timestamp")?,
            fork: None,
        };
        append_to(&mut image, device, &mut volume.superblock, &request, false)?;
    }
    check(
        "replayed content",
        image.content_sha256(),
        wanted.content_sha256(),
    )
}

fn mounted(image: &mut Image, device: &Device, now_ns: u64) -> Result<Mounted> {
    let conduct = Conduct::ReferenceCompatible;
    let request = Request {
        now_ns,
        conduct,
        ..Request::default()
    };
    let assessment = mount::assess(image, *device, &Faults::default(), &request);
    let volume = assessment.verdict.map_err(|problem| problem.to_string());
    image.apply(&assessment.plan, true, u64::from(device.zone_size));
    volume.or_else(bail)
}

/// Appends as the reference does; returns the result code and the trace.
fn append_to(
    image: &mut Image,
    device: &Device,
    superblock: &mut Superblock,
    request: &Append,
    read_only: bool,
) -> Result<(i32, Vec<Value>)> {
    let faults = Faults::default();
    let before = image.clone();
    let mut medium = Medium::new(&before, *device, &faults);
    let conduct = Conduct::ReferenceCompatible;
    let key = LinkKey::Public;
    let result = append::append(&mut medium, superblock, request, read_only, conduct, &key);
    let plan = medium.into_plan();
    image.apply(&plan, true, u64::from(device.zone_size));
    Ok((
        result.err().map_or(0, |problem| problem.code.value()),
        trace(&[&plan], device),
    ))
}

type Verdict = std::result::Result<verify::Report, hn4::status::Problem>;

fn compare_verdict(
    wanted: &Value,
    report: &Verdict,
    superblock: &Superblock,
    writes: usize,
) -> Result<()> {
    let code = report
        .as_ref()
        .err()
        .map_or(0, |problem| problem.code.value());
    check("result", code, i32_of(wanted, "result")?)?;
    check(
        "journal_ptr",
        superblock.journal_ptr.get(),
        u64_of(wanted, "journal_ptr")?,
    )?;
    let sequence = superblock.last_journal_seq.get();
    check(
        "last_journal_seq",
        sequence,
        u64_of(wanted, "last_journal_seq")?,
    )?;
    let healed = report
        .as_ref()
        .map_or(0, |report| u64::from(report.healed_entries));
    check("healed_entries", healed, u64_of(wanted, "healed_entries")?)?;
    let panic = superblock.has_state(state::PANIC);
    check("panic_set", Some(panic), wanted["panic_set"].as_bool())?;
    check(
        "superblock_writes",
        writes as u64,
        u64_of(wanted, "superblock_writes")?,
    )
}

/// Verification on a read-only volume: the superblock as it is on disk.
fn verified(golden: &Golden, case: &Value) -> Result<Outcome> {
    let image = golden.base(case)?;
    let device = json::device(&case["device"])?;
    let faults = json::faults(case)?;
    let by = |conduct| {
        let request = Request {
            flags: intent::READ_ONLY,
            conduct,
            ..Request::default()
        };
        let volume = mount::assess(&image, device, &faults, &request).verdict;
        let volume = volume
            .map_err(|problem| problem.to_string())
            .or_else(bail)?;
        let mut superblock = volume.superblock;
        let mut medium = Medium::new(&image, device, &faults);
        let report = verify::verify(&mut medium, &mut superblock, conduct, &LinkKey::Public);
        let writes = medium
            .plan()
            .steps
            .iter()
            .filter(|step| step.op.range().1 > 0)
            .count();
        Ok::<_, crate::anyhow_lite::Failure>((report, superblock, writes))
    };
    let (report, superblock, writes) = by(Conduct::ReferenceCompatible)?;
    compare_verdict(&case["verify"], &report, &superblock, writes)?;

    let (ours, our_superblock, _) = by(Conduct::Corrected)?;
    let outcome = |report: &std::result::Result<verify::Report, hn4::status::Problem>| {
        report
            .as_ref()
            .map(|report| report.healed_entries)
            .map_err(|problem| problem.code)
    };
    let same_head = our_superblock.journal_ptr == superblock.journal_ptr;
    let same_sequence = our_superblock.last_journal_seq == superblock.last_journal_seq;
    if outcome(&ours) == outcome(&report) && same_head && same_sequence {
        return Ok(Outcome::Passed);
    }
    let what = match ours {
        Ok(report) => format!(
            "{} healed, newest {}",
            report.healed_entries, our_superblock.last_journal_seq
        ),
        Err(problem) => problem.to_string(),
    };
    Ok(Outcome::Corrected(vec![Defect(13)], what))
}

/// How the driver may have prepared a volume before an append: the manifest tells the head and the
/// outcome, not the damage done to the entry before it.
const PREPARATIONS: [Preparation; 5] = [
    Preparation::None,
    Preparation::ReadOnly,
    Preparation::NoEntry,
    Preparation::Sequence(u64::MAX),
    Preparation::Sequence(0),
];

#[derive(Clone, Copy)]
enum Preparation {
    None,
    ReadOnly,
    NoEntry,
    Sequence(u64),
}

/// An append must end as the manifest says for one of the possible preparations, and where it
/// succeeds without any.
fn appended(golden: &Golden, case: &Value) -> Result<Outcome> {
    let device_of = |image: &Image| -> Result<Device> {
        let north = superblock_at(image, 0).context("a superblock")?;
        let block = u64::from(north.block_size.get());
        let sector = hn4::num::round_up(8192, block) / north.lba_epoch_start.get();
        Ok(Device::plain(image.size, u32::try_from(sector)?))
    };
    let succeeds = i32_of(case, "result")? == 0;
    let preparations = if succeeds {
        &PREPARATIONS[..1]
    } else {
        &PREPARATIONS[..]
    };
    let mut reason = String::new();
    for preparation in preparations {
        let mut image = golden.base(case)?;
        let device = device_of(&image)?;
        match append_case(case, &mut image, &device, *preparation) {
            Ok(()) => return Ok(Outcome::Passed),
            Err(failure) if reason.is_empty() => reason = failure.to_string(),
            Err(_) => {}
        }
    }
    bail(reason)
}

fn append_case(
    case: &Value,
    image: &mut Image,
    device: &Device,
    preparation: Preparation,
) -> Result<()> {
    let mut volume = mounted(image, device, T0 + 100 * SECOND)?;
    let read_only = case["mounted_read_only"].as_bool().unwrap_or(false);
    check("mounted_read_only", volume.is_read_only(), read_only)?;
    let superblock = &mut volume.superblock;
    let head = u64_of(case, "head_before")?;
    if head != superblock.journal_ptr.get() {
        superblock.journal_ptr = head.into();
    }
    let before = (head - 1) * device.sector();
    match preparation {
        Preparation::None | Preparation::ReadOnly => {}
        Preparation::NoEntry => image.write(before, &[0; 8]),
        Preparation::Sequence(sequence) => {
            let mut bytes = vec![0; hn4::num::index(device.sector())];
            hn4::device::ReadAt::read_at(image, before, &mut bytes)?;
            let mut entry = Sector::parse(bytes, head - 1).context("an entry")?.entry;
            entry.sequence = sequence.into();
            let sector = hn4::chronicle::build_sector(entry, None, None, device.sector());
            image.write(before, &sector);
        }
    }
    let expected_head = case["sector_hex_head_64"]
        .as_str()
        .map(bytes_of)
        .transpose()?;
    let op_code = expected_head
        .as_ref()
        .map_or(2, |bytes| u16::from_le_bytes([bytes[54], bytes[55]]));
    let request = Append {
        op_code,
        old_lba: 111,
        new_lba: 222,
        principal: 0x1122_3344_5566_7788,
        now_ns: T0 + 101 * SECOND,
        fork: None,
    };
    let denied = read_only || matches!(preparation, Preparation::ReadOnly);
    let (result, io) = append_to(image, device, superblock, &request, denied)?;
    check("result", result, i32_of(case, "result")?)?;
    check(
        "head",
        superblock.journal_ptr.get(),
        u64_of(case, "head_after")?,
    )?;
    check(
        "sequence",
        superblock.last_journal_seq.get(),
        u64_of(case, "seq_after")?,
    )?;
    let flags = u64::from(superblock.state_flags.get());
    check("state", Some(flags), number(&case["state_flags_after"]))?;
    compare_trace(&io, list(case, "io"))?;
    if let Some(expected) = expected_head {
        let mut bytes = vec![0; hn4::num::index(device.sector())];
        hn4::device::ReadAt::read_at(image, head * device.sector(), &mut bytes)?;
        check("entry", &bytes[..64], &expected[..])?;
        let marker = bytes_of(text_of(case, "marker_hex")?)?;
        check("marker", &bytes[bytes.len() - 8..], &marker[..])?;
    }
    Ok(())
}
