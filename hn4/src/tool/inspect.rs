//! `inspect`: superblocks, vote, layout as a picture, chronicle, verdict and why.

use std::fmt::Write;

use super::json::Json;
use super::{NO_FAULTS, Rendered, problem_json};
use crate::chronicle::verify;
use crate::device::{Device, ReadAt};
use crate::layout::chronicle_end;
use crate::mount::{self, Assessment, Request};
use crate::num::{div, hex, index, round_up};
use crate::plan::Medium;
use crate::profile::{Profile, device_type_name};
use crate::reserve;
use crate::superblock::copies::{self, Cardinal};
use crate::superblock::vote::Copy;
use crate::superblock::{Superblock, intent, state};

/// Cells of the picture.
const PICTURE_CELLS: u64 = 64;

/// `inspect`: always an answer, also for a volume that does not mount.
#[must_use]
pub fn inspect(source: &dyn ReadAt, device: Device, now_ns: u64) -> Rendered {
    let request = Request {
        now_ns,
        ..Request::default()
    };
    let assessment = mount::assess(source, device, NO_FAULTS, &request);
    let sector = device.sector();
    let medium = Medium::new(source, device, NO_FAULTS);
    let best = best_copy(&assessment);
    let mut text = copies_text(&assessment.copies, sector);
    let mut fields = vec![(
        "copies",
        Json::List(
            assessment
                .copies
                .iter()
                .map(|c| copy_json(c, sector))
                .collect(),
        ),
    )];
    if let Some(best) = &best {
        let _ = writeln!(text, "{}", superblock_text(best));
        text.push_str(&layout_text(best, sector));
        let entries = verify::list(&medium, best, 4);
        let newest = entries.last().map_or(0, |entry| entry.entry.sequence.get());
        let head = best.journal_ptr.get();
        let _ = writeln!(text, "chronicle: newest entry {newest}, head at LBA {head}");
        fields.push(("superblock", superblock_json(best)));
        fields.push(("layout", layout_json(best, sector)));
        fields.push(("newest_entry", newest.into()));
    }
    let sound = verdict(&assessment, &mut text, &mut fields);
    Rendered {
        text,
        json: Json::Object(fields),
        sound,
    }
}

fn best_copy(assessment: &Assessment) -> Option<Superblock> {
    if let Ok(volume) = &assessment.verdict {
        return Some(volume.superblock);
    }
    assessment
        .copies
        .iter()
        .find_map(|copy| copy.content.as_deref().ok())
        .copied()
}

fn copies_text(all: &[Copy], sector: u64) -> String {
    let mut text = String::from("superblock copies:\n");
    for copy in all {
        let lba = copy.offset / sector;
        let what = match &copy.content {
            Ok(superblock) => format!(
                "generation {}, state {}, mounted {} ns",
                superblock.copy_generation,
                state_text(superblock.state_flags.get()),
                superblock.last_mount_time,
            ),
            Err(problem) => format!("no vote: {}", problem.found),
        };
        let _ = writeln!(text, "  {:<5} LBA {lba}: {what}", copy.cardinal.name());
    }
    text
}

fn copy_json(copy: &Copy, sector: u64) -> Json {
    let lba = copy.offset / sector;
    let mut fields = vec![("copy", copy.cardinal.name().into()), ("lba", lba.into())];
    match &copy.content {
        Ok(superblock) => {
            fields.push(("valid", true.into()));
            fields.push(("generation", superblock.copy_generation.get().into()));
            fields.push(("uuid", hex(&superblock.uuid()).into()));
        }
        Err(problem) => {
            fields.push(("valid", false.into()));
            fields.push(("problem", problem_json(problem)));
        }
    }
    Json::Object(fields)
}

fn verdict(
    assessment: &Assessment,
    text: &mut String,
    fields: &mut Vec<(&'static str, Json)>,
) -> bool {
    let repair = !assessment.repairs.is_empty();
    let writes = assessment.plan.steps.len();
    let sound = match &assessment.verdict {
        Ok(volume) if volume.is_read_only() => {
            let _ = writeln!(text, "verdict: mounts read-only");
            for reason in &volume.reasons {
                let _ = writeln!(text, "  because {reason}");
            }
            false
        }
        Ok(_) => {
            let _ = writeln!(
                text,
                "verdict: mounts for writing, with {writes} operations"
            );
            true
        }
        Err(problem) => {
            let _ = writeln!(text, "verdict: does not mount: {problem}");
            fields.push(("problem", problem_json(problem)));
            false
        }
    };
    let reasons: Vec<String> = match &assessment.verdict {
        Ok(volume) => volume.reasons.iter().map(ToString::to_string).collect(),
        Err(_) => Vec::new(),
    };
    if repair {
        let _ = writeln!(
            text,
            "a repair is offered: it writes the missing epoch checksum"
        );
    }
    fields.push(("mounts", assessment.verdict.is_ok().into()));
    fields.push(("writable", sound.into()));
    fields.push(("reasons", reasons.into()));
    fields.push(("repair_offered", repair.into()));
    let defects: Vec<u64> = assessment
        .corrections
        .iter()
        .map(|d| u64::from(d.0))
        .collect();
    fields.push(("corrected_defects", defects.into()));
    sound
}

/// The names of the bits of a state.
#[must_use]
pub fn state_text(flags: u32) -> String {
    let names = [
        (state::CLEAN, "CLEAN"),
        (state::DIRTY, "DIRTY"),
        (state::PANIC, "PANIC"),
        (state::DEGRADED, "DEGRADED"),
        (state::LOCKED, "LOCKED"),
        (state::TOXIC, "TOXIC"),
        (state::UNMOUNTING, "UNMOUNTING"),
        (state::METADATA_ZEROED, "METADATA_ZEROED"),
        (state::NEEDS_UPGRADE, "NEEDS_UPGRADE"),
        (state::PENDING_WIPE, "PENDING_WIPE"),
    ];
    let set: Vec<_> = names
        .iter()
        .filter(|(bit, _)| flags & bit != 0)
        .map(|(_, name)| *name)
        .collect();
    if set.is_empty() {
        "none".to_owned()
    } else {
        set.join("|")
    }
}

fn profile_name(superblock: &Superblock) -> &'static str {
    Profile::from_id(superblock.format_profile.get()).map_or("unknown", Profile::name)
}

fn superblock_text(superblock: &Superblock) -> String {
    let flags = superblock.mount_intent.get();
    let wormhole = if flags & intent::WORMHOLE != 0 {
        " WORMHOLE"
    } else {
        ""
    };
    let virtual_ = if flags & intent::VIRTUAL != 0 {
        " VIRTUAL"
    } else {
        ""
    };
    format!(
        "volume {} \"{}\", profile {}, device type {}, blocks of {} bytes, {} bytes, \
         generation {}, epoch {}, state {}, intent {flags:#x}{wormhole}{virtual_}",
        hex(&superblock.uuid()),
        superblock.label(),
        profile_name(superblock),
        device_type_name(superblock.device_type_tag.get()),
        superblock.block_size,
        superblock.total_capacity,
        superblock.copy_generation,
        superblock.current_epoch_id,
        state_text(superblock.state_flags.get()),
    )
}

/// The superblock as JSON.
#[must_use]
pub fn superblock_json(superblock: &Superblock) -> Json {
    Json::Object(vec![
        ("uuid", hex(&superblock.uuid()).into()),
        ("label", superblock.label().into()),
        ("profile", profile_name(superblock).into()),
        (
            "device_type",
            device_type_name(superblock.device_type_tag.get()).into(),
        ),
        ("block_size", superblock.block_size.get().into()),
        ("total_capacity", superblock.total_capacity.get().into()),
        ("generation", superblock.copy_generation.get().into()),
        ("epoch", superblock.current_epoch_id.get().into()),
        ("state_flags", superblock.state_flags.get().into()),
        ("mount_intent", superblock.mount_intent.get().into()),
        ("compat_flags", superblock.compat_flags.get().into()),
        ("dirty_bits", superblock.dirty_bits.get().into()),
        (
            "last_mount_time_ns",
            superblock.last_mount_time.get().into(),
        ),
        ("journal_ptr", superblock.journal_ptr.get().into()),
        ("last_journal_seq", superblock.last_journal_seq.get().into()),
    ])
}

/// Regions with their first sector and the one behind.
fn regions(superblock: &Superblock, sector: u64) -> Vec<(&'static str, char, u64, u64)> {
    let block = u64::from(superblock.block_size.get());
    let starts = [
        ("superblock", 's', 0),
        ("epoch ring", 'e', superblock.lba_epoch_start.get()),
        ("cortex", 'c', superblock.lba_cortex_start.get()),
        ("bitmap", 'b', superblock.lba_bitmap_start.get()),
        ("qmask", 'q', superblock.lba_qmask_start.get()),
        ("flux", '.', superblock.lba_flux_start.get()),
        ("horizon", 'h', superblock.lba_horizon_start.get()),
        ("chronicle", 'l', superblock.journal_start.get()),
        ("tail", 't', div(chronicle_end(superblock), sector)),
        (
            "end",
            ' ',
            div(round_up(superblock.total_capacity.get(), block), sector),
        ),
    ];
    starts
        .windows(2)
        .filter_map(|pair| match pair {
            [(name, sign, start), (_, _, end)] => Some((*name, *sign, *start, *end)),
            _ => None,
        })
        .collect()
}

/// The layout as a picture: one line to scale, one for each region.
#[must_use]
pub fn layout_text(superblock: &Superblock, sector: u64) -> String {
    let capacity = superblock.total_capacity.get();
    let block = u64::from(superblock.block_size.get());
    if block == 0 || sector == 0 || capacity == 0 {
        return "layout: none, the superblock has no size\n".to_owned();
    }
    let all = regions(superblock, sector);
    let cell_bytes = capacity.div_ceil(PICTURE_CELLS).max(1);
    let mut picture: Vec<char> = (0..PICTURE_CELLS)
        .map(|cell| {
            let middle = cell
                .saturating_mul(cell_bytes)
                .saturating_add(cell_bytes / 2)
                / sector;
            let found = all
                .iter()
                .find(|(_, _, start, end)| (*start..*end).contains(&middle));
            found.map_or(' ', |(_, sign, _, _)| *sign)
        })
        .collect();
    let letters = [
        (Cardinal::North, 'N'),
        (Cardinal::East, 'E'),
        (Cardinal::West, 'W'),
        (Cardinal::South, 'S'),
    ];
    for (cardinal, letter) in letters {
        let offset = copies::position(cardinal, capacity, block);
        if let Some(cell) = offset.and_then(|offset| picture.get_mut(index(offset / cell_bytes))) {
            *cell = letter;
        }
    }
    let picture: String = picture.into_iter().collect();
    let mut text = format!("layout: |{picture}|\n");
    for (name, sign, start, end) in all {
        let bytes = end.saturating_sub(start).saturating_mul(sector);
        let _ = writeln!(
            text,
            "  {sign} {name:<11} LBA {start:>12} .. {end:<12} {bytes} bytes"
        );
    }
    let reserved = reserve::reserved(superblock, sector, false);
    // A hostile superblock's ranges may overlap, and be back to front.
    let blocks = reserved.iter().skip(1).fold(0_u64, |sum, range| {
        sum.saturating_add(range.blocks.end.saturating_sub(range.blocks.start))
    });
    let _ = writeln!(
        text,
        "  {blocks} blocks behind the flux start must not hold data"
    );
    text
}

fn layout_json(superblock: &Superblock, sector: u64) -> Json {
    let region = |(name, _, start, end): (&'static str, char, u64, u64)| {
        Json::Object(vec![
            ("region", name.into()),
            ("lba", start.into()),
            ("end", end.into()),
        ])
    };
    Json::List(
        regions(superblock, sector)
            .into_iter()
            .map(region)
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superblock_whose_regions_fill_the_address_space_still_has_a_picture() {
        let mut superblock = Superblock::zeroed();
        superblock.block_size = 512.into();
        superblock.total_capacity = u64::MAX.into();
        superblock.journal_start = u64::MAX.into();
        assert!(layout_text(&superblock, 512).contains("layout: |"));
    }
}
