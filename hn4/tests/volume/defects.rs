//! One promise for each defect of the reference that HN4_SPEC 11 lists, where it is not proven
//! beside the code (5 in `block`, 8 in `bitmap`, 10 in `superblock`).

use crate::common::{Disk, SECOND, T0, Writer, formatted, params, reformat};
use hn4::address::{Geometry, Path, Space, trajectory};
use hn4::anchor::Seed;
use hn4::chronicle::LinkKey;
use hn4::device::{Device, HwFlags};
use hn4::format::{Params, format};
use hn4::plan::{Faults, Medium, Op};
use hn4::profile::Profile;
use hn4::reserve::{is_reserved, reserved};
use hn4::status::{Code, Conduct, Defect};
use hn4::superblock::copies::{Cardinal, position};
use hn4::superblock::{intent, state};
use hn4::unmount::unmount;
use hn4::volume::Volume;
use zerocopy::IntoBytes;

const MIB: u64 = 1 << 20;

fn generic() -> Device {
    Device::plain(128 * MIB, 512)
}

fn corrected(profile: Profile) -> Params {
    params(profile, Conduct::Corrected)
}

fn close(disk: &mut Disk, mut volume: hn4::mount::Mounted, now_ns: u64, conduct: Conduct) {
    let bytes = disk.bytes.clone();
    let faults = Faults::default();
    let mut medium = Medium::new(&bytes, disk.device, &faults);
    unmount(&mut medium, &mut volume, now_ns, conduct, &LinkKey::Public).expect("unmounts");
    disk.execute(medium.plan());
}

#[test]
fn defect_1_no_block_is_placed_on_a_copy_the_chronicle_or_the_horizon() {
    let mut writer = Writer::new(formatted(generic(), &corrected(Profile::Generic)));
    let superblock = writer.superblock;
    let all = reserved(&superblock, 512, false);
    let east = position(Cardinal::East, 128 * MIB, 4096).expect("a copy") / 4096;
    assert!(is_reserved(&all, east) && writer.bitmap.is_used(east));
    // An anchor whose very first address is the East copy.
    let space = Space::new(&writer.geometry(), 0).expect("blocks");
    let g = east - space.first_block();
    assert_eq!(Path::new(space, g, 1).block(0, 0), east);
    let (_, places) = writer
        .file(Seed { lo: 1, hi: 1 }, (g, 1, 0), &[vec![1; 10]])
        .expect("another orbit");
    assert!(
        places.iter().all(|&(_, block)| !is_reserved(&all, block)),
        "{places:?}"
    );
    let disk = writer.finish();
    let volume = Volume::open(&disk.bytes, disk.device, Conduct::Corrected).expect("opens");
    assert_eq!(volume.check(&LinkKey::Public), Vec::new());
}

#[test]
fn defect_2_nothing_is_written_before_every_check_has_passed() {
    let lax = Device {
        hw_flags: HwFlags(0),
        ..generic()
    };
    let wanted = Params {
        mount_intent_flags: intent::WORMHOLE,
        ..corrected(Profile::Generic)
    };
    let blank = Disk::new(lax);
    let refused = format(&blank.bytes, lax, &Faults::default(), &wanted);
    assert_eq!(refused.verdict.expect_err("lax flushes").code, Code::HwIo);
    assert!(refused.plan.is_empty());
    // A mount that fails late leaves the medium alone too.
    let mut disk = formatted(generic(), &corrected(Profile::Generic));
    let root = disk.north().lba_cortex_start.get() * 512;
    disk.write(root, hn4::anchor::Anchor::zeroed().sealed().as_bytes());
    let assessment = disk.assess(0, T0, Conduct::Corrected);
    assert_eq!(
        assessment.verdict.expect_err("no root").code,
        Code::NotFound
    );
    assert!(assessment.plan.is_empty() && assessment.corrections.contains(&Defect(2)));
}

#[test]
fn defect_3_copies_of_a_virtual_volume_are_never_written_at_device_positions() {
    let short = Params {
        mount_intent_flags: intent::VIRTUAL,
        override_capacity_bytes: 128 * MIB,
        ..corrected(Profile::Generic)
    };
    let device = Device::plain(160 * MIB, 512);
    let disk = formatted(device, &short);
    let foreign = position(Cardinal::West, device.capacity, 4096).expect("a position");
    let writes = |conduct| {
        let plan = disk.assess(0, T0, conduct).plan;
        plan.steps
            .iter()
            .any(|step| step.op.range().0 == foreign && step.op != Op::Flush)
    };
    assert!(writes(Conduct::ReferenceCompatible) && !writes(Conduct::Corrected));
}

#[test]
fn defect_4_a_volume_of_the_reference_is_recognised_and_repaired_and_ours_needs_no_repair() {
    let mut disk = formatted(generic(), &corrected(Profile::Generic));
    let volume = disk.mount(T0 + SECOND, Conduct::Corrected);
    let mut theirs = disk.clone();
    close(
        &mut disk,
        volume.clone(),
        T0 + 2 * SECOND,
        Conduct::Corrected,
    );
    let ours = disk.assess(0, T0 + 3 * SECOND, Conduct::Corrected);
    assert!(!ours.verdict.expect("mounts").is_read_only());

    close(
        &mut theirs,
        volume,
        T0 + 2 * SECOND,
        Conduct::ReferenceCompatible,
    );
    let stuck = theirs.assess(0, T0 + 3 * SECOND, Conduct::Corrected);
    assert!(stuck.corrections.contains(&Defect(4)));
    let volume = stuck.verdict.expect("mounts");
    assert!(volume.is_read_only() && !volume.superblock.has_state(state::PANIC));
    theirs.execute(&stuck.repairs);
    let repaired = theirs.assess(0, T0 + 3 * SECOND, Conduct::Corrected);
    assert!(!repaired.verdict.expect("mounts").is_read_only());
}

#[test]
fn defect_6_a_block_is_found_on_an_orbit_that_its_hint_does_not_name() {
    let mut writer = Writer::new(formatted(generic(), &corrected(Profile::Generic)));
    let path = Path::new(Space::new(&writer.geometry(), 0).expect("blocks"), 100, 7);
    // Orbits 0 to 4 of the first block are taken by others.
    for k in 0..5 {
        writer.bitmap.set(path.block(0, k), true);
    }
    let seed = Seed { lo: 5, hi: 6 };
    let (anchor, places) = writer
        .file(seed, (100, 7, 0), &[b"far".to_vec()])
        .expect("a place");
    assert!(
        places[0].0 > 3,
        "an orbit that hints cannot say: {places:?}"
    );
    let disk = writer.finish();
    let volume = Volume::open(&disk.bytes, disk.device, Conduct::Corrected).expect("opens");
    let read = volume.read_block(&anchor, 0).expect("readable");
    assert_eq!(&read.payload[..3], b"far");
    assert!(read.corrections.contains(&Defect(6)));
}

#[test]
fn defect_7_the_first_block_of_a_file_lands_on_its_first_orbit() {
    let mut writer = Writer::new(formatted(generic(), &corrected(Profile::Generic)));
    let file = writer.file(Seed { lo: 1, hi: 2 }, (500, 3, 0), &[vec![1]]);
    assert_eq!(file.expect("a place").1[0].0, 0);
}

#[test]
fn defect_11_addresses_beyond_2_to_the_31_are_whole() {
    let geometry = Geometry {
        capacity: 1 << 50,
        block_size: 4096,
        sector_size: 512,
        lba_flux_start: 8192,
        profile: 0,
        device_type: 0,
        hw_caps_flags: 0,
    };
    let block = trajectory(&geometry, 1 << 37, 1, 5, 0, 0);
    assert_eq!(block, Some(1024 + (1 << 37) + 5));
}

#[test]
fn defect_12_an_older_foreign_north_does_not_win_over_three_mirrors() {
    let mut disk = formatted(generic(), &corrected(Profile::Generic));
    let ours = disk.north();
    let mut newer = ours;
    newer.copy_generation = 9.into();
    for cardinal in Cardinal::MIRRORS {
        let offset = position(cardinal, 128 * MIB, 4096).expect("a copy");
        disk.write(offset, newer.sealed().as_bytes());
    }
    let mut alien = ours;
    alien.uuid_lo = 0xA11E.into();
    alien.copy_generation = 2.into();
    disk.write(0, alien.sealed().as_bytes());
    let by = |conduct| {
        disk.assess(0, T0 + SECOND, conduct)
            .verdict
            .expect("mounts")
            .superblock
    };
    assert_eq!(by(Conduct::ReferenceCompatible).uuid_lo.get(), 0xA11E);
    assert_eq!(by(Conduct::Corrected).uuid(), ours.uuid());
    assert!(
        disk.assess(0, T0, Conduct::Corrected)
            .corrections
            .contains(&Defect(12))
    );
}

#[test]
fn defect_13_a_hole_in_the_chronicle_is_not_the_end_of_history() {
    let mut disk = formatted(generic(), &corrected(Profile::Generic));
    for cycle in 0..3 {
        let now = T0 + (2 * cycle + 1) * SECOND;
        let volume = disk.mount(now, Conduct::Corrected);
        close(&mut disk, volume, now + SECOND, Conduct::Corrected);
    }
    let middle = (disk.north().journal_start.get() + 1) * 512;
    disk.write(middle, &[0; 512]);
    let by = |conduct| {
        disk.assess(0, T0 + 9 * SECOND, conduct)
            .verdict
            .expect("mounts")
    };
    assert!(
        !by(Conduct::ReferenceCompatible).is_read_only(),
        "the reference does not notice"
    );
    assert!(by(Conduct::Corrected).is_read_only());
}

#[test]
fn defect_14_zones_that_bit_masks_cannot_round_are_refused() {
    let mut zoned = Device::plain(960 * MIB, 4096);
    zoned.zone_size = 96 << 20;
    zoned.hw_flags = zoned.hw_flags.with(HwFlags::ZNS);
    let blank: &[u8] = &[];
    let blank = blank.to_vec();
    let refused = format(
        &blank,
        zoned,
        &Faults::default(),
        &corrected(Profile::Generic),
    );
    assert_eq!(
        refused.verdict.expect_err("a zone of 96 MiB").code,
        Code::AlignmentFail
    );
    assert!(refused.plan.is_empty());
}

#[test]
fn defect_15_a_volume_formatted_over_one_with_other_blocks_mounts() {
    for conduct in [Conduct::ReferenceCompatible, Conduct::Corrected] {
        let mut disk = formatted(generic(), &params(Profile::Generic, conduct));
        disk.discard_zeroes = false;
        reformat(&mut disk, &params(Profile::Usb, conduct));
        let verdict = disk
            .assess(0, T0 + SECOND, Conduct::ReferenceCompatible)
            .verdict;
        match conduct {
            Conduct::Corrected => assert!(verdict.is_ok(), "{verdict:?}"),
            Conduct::ReferenceCompatible => {
                assert_eq!(verdict.expect_err("stale copies").code, Code::Tampered);
            }
        }
    }
}

#[test]
fn a_copy_of_block_size_zero_is_refused_where_the_reference_crashes() {
    let mut disk = formatted(generic(), &corrected(Profile::Generic));
    let mut broken = disk.north();
    broken.block_size = 0.into();
    disk.write(0, broken.sealed().as_bytes());
    let verdict = disk.assess(0, T0, Conduct::ReferenceCompatible).verdict;
    assert!(verdict.is_err(), "{verdict:?}");
}
