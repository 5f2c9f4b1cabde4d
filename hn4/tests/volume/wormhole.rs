//! The wormhole as the seed document promises it: clones, forks, siblings, and their histories.

use crate::common::{Disk, SECOND, T0, Writer, formatted, params};
use hn4::address::{Geometry, trajectory};
use hn4::anchor::Seed;
use hn4::chronicle::{LinkKey, Sector, build_sector, verify};
use hn4::crc::crc32;
use hn4::device::{Device, HwFlags};
use hn4::plan::{Faults, Medium};
use hn4::profile::Profile;
use hn4::status::{Code, Conduct};
use hn4::superblock::Superblock;
use hn4::superblock::intent;
use hn4::tool::{self, CloneOptions, ClonePlans};
use hn4::volume::Volume;
use hn4::wormhole::certificate::Certificate;
use hn4::wormhole::clone::{Purpose, check_chain};
use hn4::wormhole::registry::{Registry, Standing};
use hn4::wormhole::sibling::{Becomes, Rewrite, rewrite};

const MIB: u64 = 1 << 20;

fn hdd() -> Device {
    let plain = Device::plain(128 * MIB, 512);
    Device {
        hw_flags: plain.hw_flags.with(HwFlags::ROTATIONAL),
        ..plain
    }
}

fn ram(capacity: u64) -> Device {
    let plain = Device::plain(capacity, 512);
    Device {
        hw_flags: plain.hw_flags.with(HwFlags::NVM),
        ..plain
    }
}

fn options(purpose: Purpose) -> CloneOptions {
    CloneOptions {
        override_capacity: false,
        label: None,
        purpose,
        record_in_parent: true,
        fork_id: [7; 16],
        now_ns: T0 + 50 * SECOND,
        key: LinkKey::Public,
    }
}

fn parent() -> Disk {
    let mut disk = formatted(hdd(), &params(Profile::Generic, Conduct::Corrected));
    for cycle in 0..2 {
        let now = T0 + (2 * cycle + 1) * SECOND;
        let mut volume = disk.mount(now, Conduct::Corrected);
        let bytes = disk.bytes.clone();
        let faults = Faults::default();
        let mut medium = Medium::new(&bytes, disk.device, &faults);
        let (conduct, key) = (Conduct::Corrected, LinkKey::Public);
        hn4::unmount::unmount(&mut medium, &mut volume, now + SECOND, conduct, &key)
            .expect("unmounts");
        disk.execute(medium.plan());
    }
    disk
}

fn clone_onto(parent: &mut Disk, device: Device, options: &CloneOptions) -> Disk {
    let mut target = Disk::new(device);
    let plans: ClonePlans = tool::clone(
        (&parent.bytes, parent.device),
        (&target.bytes, device),
        options,
    )
    .expect("an isomorphic device");
    target.execute(&plans.clone);
    parent.execute(&plans.parent);
    target
}

fn medium<'a>(disk: &'a Disk, faults: &'a Faults) -> Medium<'a> {
    Medium::new(&disk.bytes, disk.device, faults)
}

fn verdict(disk: &Disk, superblock: &Superblock, conduct: Conduct) -> Result<(), Code> {
    let faults = Faults::default();
    let (mut medium, mut superblock) = (medium(disk, &faults), *superblock);
    verify::verify(&mut medium, &mut superblock, conduct, &LinkKey::Public)
        .map(|_| ())
        .map_err(|problem| problem.code)
}

#[test]
fn a_ram_wormhole_of_a_rotating_disk_computes_the_disks_addresses() {
    let mut parent = parent();
    let before = parent.north();
    let clone = clone_onto(&mut parent, ram(128 * MIB), &options(Purpose::SameTimeline));
    let north = clone.north();
    assert!(north.is_wormhole() && !north.is_virtual());
    assert_eq!(north.uuid(), before.uuid());
    assert_eq!(
        north.copy_generation, before.copy_generation,
        "the same timeline"
    );
    assert_eq!(north.device_type_tag.get(), 1, "the parent's tag");
    let ours = Certificate::of(&north, 512);
    assert_eq!(ours.agree(&Certificate::of(&before, 512)), Ok(()));
    assert_eq!(ours.digest(), Certificate::of(&before, 512).digest());
    let (on_hdd, on_ram) = (Geometry::of(&before, 512), Geometry::of(&north, 512));
    for n in 0..100 {
        let at = |geometry| trajectory(geometry, 77, 991, n, 1, 3);
        assert_eq!(at(&on_hdd), at(&on_ram));
    }
    let mounted = clone.assess(0, T0 + 60 * SECOND, Conduct::Corrected);
    assert!(!mounted.verdict.expect("mounts").is_read_only());
    let reference = clone.assess(0, T0 + 60 * SECOND, Conduct::ReferenceCompatible);
    assert!(
        !reference.verdict.expect("mounts").is_read_only(),
        "valid for the reference too"
    );
}

#[test]
fn a_device_that_cannot_be_isomorphic_is_refused_by_the_name_of_the_field() {
    let parent = parent();
    let lax = Device {
        hw_flags: HwFlags(0),
        ..hdd()
    };
    let refusals = [
        (lax, Code::HwIo, "STRICT_FLUSH"),
        (
            Device::plain(128 * MIB, 4096),
            Code::Geometry,
            "sector size 4096",
        ),
        (
            Device::plain(64 * MIB, 512),
            Code::Geometry,
            "capacity 67108864",
        ),
    ];
    for (device, code, field) in refusals {
        let blank = vec![0; 8192];
        let refused = tool::clone(
            (&parent.bytes, parent.device),
            (&blank, device),
            &options(Purpose::SameTimeline),
        )
        .expect_err("not isomorphic");
        assert_eq!(refused.code, code, "{refused}");
        assert!(refused.found.contains(field), "{refused}");
    }
}

#[test]
fn a_smaller_overlay_claims_the_parents_capacity_when_told_to() {
    let mut parent = parent();
    let wanted = CloneOptions {
        override_capacity: true,
        ..options(Purpose::SameTimeline)
    };
    let overlay = clone_onto(&mut parent, ram(64 * MIB), &wanted);
    let north = overlay.north();
    assert!(north.is_virtual());
    assert_eq!(north.total_capacity.get(), 128 * MIB);
    assert_eq!(
        Certificate::of(&north, 512),
        Certificate::of(&parent.north(), 512)
    );
}

#[test]
fn the_fork_is_chained_into_both_histories_and_tampering_with_either_is_found() {
    let mut parent = parent();
    let clone = clone_onto(&mut parent, ram(128 * MIB), &options(Purpose::Diverge));
    let faults = Faults::default();
    let chain = |parent: &Disk, clone: &Disk| {
        let (ours, theirs) = (medium(parent, &faults), medium(clone, &faults));
        check_chain((&ours, &parent.north()), (&theirs, &clone.north()))
            .map_err(|problem| problem.code)
    };
    assert_eq!(chain(&parent, &clone), Ok(()));
    assert_eq!(
        verdict(&parent, &parent.north(), Conduct::Corrected),
        Ok(())
    );
    assert_eq!(verdict(&clone, &clone.north(), Conduct::Corrected), Ok(()));
    assert_eq!(
        verdict(&clone, &clone.north(), Conduct::ReferenceCompatible),
        Ok(())
    );

    // Another parent does not fit.
    let stranger = formatted(hdd(), &params(Profile::Generic, Conduct::Corrected));
    assert_eq!(chain(&stranger, &clone), Err(Code::AuditFailure));
    // A genesis entry with its CRCs made right again is found by its link, not by the reference.
    let mut forged = clone.clone();
    let lba = clone.north().journal_start.get();
    let at = hn4::num::index(lba * 512);
    let sector = Sector::parse(forged.bytes[at..at + 512].to_vec(), lba).expect("an entry");
    let mut entry = sector.entry;
    entry.timestamp = 1.into();
    let mut bytes = build_sector(entry, None, None, 512);
    bytes[64..504].copy_from_slice(&sector.bytes()[64..504]);
    forged.write(lba * 512, &bytes);
    assert_eq!(
        verdict(&forged, &forged.north(), Conduct::ReferenceCompatible),
        Ok(())
    );
    assert_eq!(
        verdict(&forged, &forged.north(), Conduct::Corrected),
        Err(Code::Tampered)
    );
}

#[test]
fn a_forged_entry_with_every_crc_recomputed_is_found_by_the_links_behind_it() {
    let mut disk = parent();
    let start = disk.north().journal_start.get();
    let at = |lba: u64| hn4::num::index(lba * 512);
    let sector = |disk: &Disk, lba| {
        let bytes = disk.bytes[at(lba)..at(lba) + 512].to_vec();
        Sector::parse(bytes, lba).expect("an entry")
    };
    // Entry 1 is changed and resealed, entry 2 gets the new CRC link and is resealed too.
    let (first, second) = (sector(&disk, start), sector(&disk, start + 1));
    let reseal = |old: &Sector, change: &dyn Fn(&mut hn4::chronicle::Entry)| {
        let mut entry = old.entry;
        change(&mut entry);
        let mut bytes = build_sector(entry, None, None, 512);
        bytes[64..504].copy_from_slice(&old.bytes()[64..504]);
        bytes
    };
    let changed = reseal(&first, &|entry| entry.new_lba = 99.into());
    let relinked = reseal(&second, &|entry| {
        entry.prev_sector_crc = crc32(0, &changed).into()
    });
    disk.write(start * 512, &changed);
    disk.write((start + 1) * 512, &relinked);
    assert_eq!(
        verdict(&disk, &disk.north(), Conduct::ReferenceCompatible),
        Ok(())
    );
    assert_eq!(
        verdict(&disk, &disk.north(), Conduct::Corrected),
        Err(Code::Tampered)
    );
}

#[test]
fn timelines_that_part_never_look_alike() {
    let mut parent = parent();
    let mut fork = clone_onto(&mut parent, ram(128 * MIB), &options(Purpose::Diverge));
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for cycle in 0..5 {
        let now = T0 + (100 + cycle) * SECOND;
        ours.push(
            parent
                .mount(now, Conduct::Corrected)
                .superblock
                .copy_generation
                .get(),
        );
        theirs.push(
            fork.mount(now, Conduct::Corrected)
                .superblock
                .copy_generation
                .get(),
        );
    }
    assert!(
        ours.iter().all(|generation| !theirs.contains(generation)),
        "{ours:?} {theirs:?}"
    );
}

#[test]
fn a_clone_is_registered_as_a_satellite_and_a_raw_copy_is_a_safety_panic() {
    let mut disk = parent();
    let clone = clone_onto(&mut disk, ram(128 * MIB), &options(Purpose::SameTimeline));
    let mut registry = Registry::default();
    let register = |registry: &mut Registry, name, disk: &Disk| {
        registry
            .register(name, &disk.north(), &disk.device)
            .map_err(|problem| problem.code)
    };
    assert_eq!(register(&mut registry, "disk", &disk), Ok(Standing::Owner));
    assert_eq!(register(&mut registry, "copy", &disk), Err(Code::Exists));
    assert_eq!(
        register(&mut registry, "clone", &clone),
        Ok(Standing::Satellite)
    );
}

#[test]
fn a_rewritten_raw_copy_mounts_for_itself_with_its_files_and_a_history_that_continues() {
    let mut writer = Writer::new(parent());
    let seed = Seed { lo: 3, hi: 4 };
    let (anchor, _) = writer
        .file(seed, (50, 3, 0), &[b"kept".to_vec()])
        .expect("a place");
    let source = writer.finish();
    let mut copy = source.clone();
    let faults = Faults::default();
    let request = Rewrite {
        becomes: Becomes::Sibling,
        fork_id: [9; 16],
        now_ns: T0 + 500 * SECOND,
        key: LinkKey::Public,
    };
    let bytes = copy.bytes.clone();
    let mut plan = Medium::new(&bytes, copy.device, &faults);
    let sibling = rewrite(&mut plan, &source.north(), &request).expect("a plan");
    let steps = plan.plan().steps.clone();
    copy.execute(plan.plan());

    // North is the last superblock to be written, behind a flush.
    let norths: Vec<_> = (0_usize..)
        .zip(&steps)
        .filter(|(_, step)| step.op.range() == (0, 8192))
        .map(|(index, _)| index)
        .collect();
    assert_eq!(norths, [steps.len() - 2]);
    assert_eq!(copy.north(), sibling);
    assert_eq!(sibling.mount_intent.get(), intent::WORMHOLE);
    assert!(sibling.copy_generation.get() > source.north().copy_generation.get() + (1 << 31));
    let mounted = copy
        .assess(0, T0 + 600 * SECOND, Conduct::Corrected)
        .verdict
        .expect("mounts");
    assert!(!mounted.is_read_only(), "{:?}", mounted.reasons);
    assert_eq!(
        mounted.superblock.last_journal_seq.get(),
        3,
        "two unmounts and the fork"
    );
    let volume = Volume::open(&copy.bytes, copy.device, Conduct::Corrected).expect("opens");
    assert_eq!(
        &volume.read_block(&anchor, 0).expect("readable").payload[..4],
        b"kept"
    );
}

#[test]
fn every_subcommand_answers_for_a_volume_with_files() {
    let mut writer = Writer::new(parent());
    let seed = Seed {
        lo: 0x1000,
        hi: 0x2000,
    };
    let blocks = [b"hello ".to_vec(), b"world".to_vec()];
    let (_, places) = writer.file(seed, (50, 3, 0), &blocks).expect("a place");
    let disk = writer.finish();
    let (source, device) = (&disk.bytes, disk.device);
    assert_eq!(tool::probe_sector_size(source), Some(512));
    let seen = tool::inspect::inspect(source, device, T0 + 900 * SECOND);
    assert!(
        seen.sound && seen.text.contains("mounts for writing"),
        "{}",
        seen.text
    );
    assert!(
        tool::ls(source, device)
            .expect("ls")
            .text
            .contains(&seed.to_string())
    );
    let place = format!("{seed}:1");
    let found = tool::where_is(source, device, &place).expect("where");
    let lba = places[1].1 * 8;
    assert!(
        found.text.contains(&format!("LBA {lba} ")),
        "{}",
        found.text
    );
    let what = tool::which(source, device, lba).expect("which");
    assert!(
        what.text.contains(&format!("block 1 of file {seed}")),
        "{}",
        what.text
    );
    let mut bytes = Vec::new();
    tool::cat(source, device, seed, &mut |part| {
        bytes.extend_from_slice(part)
    })
    .expect("cat");
    assert_eq!(
        (&bytes[..6], &bytes[4048..4053]),
        (&b"hello "[..], &b"world"[..])
    );
    let checked = tool::verify(source, device, &LinkKey::Public).expect("verify");
    assert!(checked.sound, "{}", checked.text);
    let log = tool::chronicle(source, device, true, &LinkKey::Public).expect("chronicle");
    assert!(
        log.sound && log.text.contains("verified 2 entries"),
        "{}",
        log.text
    );
    assert!(tool::where_is(source, device, "zzz").is_err());
}
