//! Properties of addressing over random geometries and anchors.

use std::collections::BTreeMap;

use crate::common::{Writer, formatted, params};
use hn4::address::{Geometry, Path, Space};
use hn4::anchor::Seed;
use hn4::device::{Device, HwFlags};
use hn4::profile::Profile;
use hn4::status::Conduct;
use hn4::superblock::Superblock;
use hn4::tcc;
use hn4::volume::Volume;
use hn4::volume::which::Which;
use proptest::prelude::*;

/// Seconds that the fuzz-like properties run; `HN4_FUZZ_SECONDS=30` in CI.
fn fuzz_seconds() -> u64 {
    std::env::var("HN4_FUZZ_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1)
}

fn device() -> impl Strategy<Value = (Profile, Device)> {
    let pico =
        (4096_u64..16384).prop_map(|sectors| (Profile::Pico, Device::plain(sectors * 512, 512)));
    let generic = (
        0_u64..1024,
        prop_oneof![Just(512), Just(4096)],
        any::<bool>(),
    );
    let generic = generic.prop_map(|(extra, sector, rotates)| {
        let mut device = Device::plain((128 << 20) + extra * 4096, sector);
        if rotates {
            device.hw_flags = device.hw_flags.with(HwFlags::ROTATIONAL);
        }
        (Profile::Generic, device)
    });
    prop_oneof![pico, generic]
}

type File = (u64, u64, u16, usize);

fn files() -> impl Strategy<Value = Vec<File>> {
    let file = (0_u64..40_000, 1_u64..1 << 48, 0_u16..4, 1_usize..6);
    proptest::collection::vec(file, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn which_of_where_is_the_same_block_and_no_two_live_blocks_collide(
        (profile, device) in device(),
        files in files(),
    ) {
        let mut writer = Writer::new(formatted(device, &params(profile, Conduct::Corrected)));
        let mut written = Vec::new();
        for (number, &(g, v, m, blocks)) in (1_u64..).zip(&files) {
            let seed = Seed { lo: number, hi: g };
            let data: Vec<_> = (0..blocks).map(|n| vec![n.to_le_bytes()[0]; 40]).collect();
            if let Some((anchor, places)) = writer.file(seed, (g, v, m), &data) {
                written.push((anchor, places));
            }
        }
        let disk = writer.finish();
        let volume = Volume::open(&disk.bytes, device, Conduct::Corrected).expect("opens");
        let mut owners = BTreeMap::new();
        for (anchor, places) in &written {
            for (n, &(k, block)) in (0_u64..).zip(places) {
                prop_assert_eq!(owners.insert(block, (anchor.seed(), n)), None, "a collision");
                let place = volume.locate(anchor, n).expect("an address").expect("no hole");
                prop_assert_eq!(place.block, block);
                prop_assert!(volume.read_block(anchor, n).is_ok());
                let found = volume.which(place.lba);
                let same = matches!(&found, Which::Block { seed, n: which, .. }
                    if *seed == anchor.seed() && *which == n);
                prop_assert!(same, "{:?} at LBA {}", found, place.lba);
                prop_assert!(volume.preimages(anchor, block).contains(&(n, k)));
            }
        }
    }

    #[test]
    fn the_inverse_finds_exactly_the_blocks_that_lead_there(
        capacity in 1_u64 << 20..1 << 40,
        flux in 0_u64..4096,
        device_type in 0_u32..4,
        (g, v, m, k) in (any::<u64>(), any::<u64>(), 0_u16..12, 0_u8..16),
        n in 0_u64..1 << 20,
    ) {
        let geometry = Geometry {
            capacity, block_size: 512, sector_size: 512, lba_flux_start: flux,
            profile: 0, device_type, hw_caps_flags: 0,
        };
        let Some(space) = Space::new(&geometry, m) else { return Ok(()) };
        let path = Path::new(space, g, v);
        let found = path.inverse(path.block(n, k), k, n + 1);
        let cut = found.len() >= hn4::address::MAX_PREIMAGES;
        prop_assert!(cut || found.contains(&n), "{} not in {:?}", n, found);
        for other in found {
            prop_assert_eq!(path.block(other, k), path.block(n, k));
        }
    }
}

/// Runs `check` over mutations of `seed` bytes until the time is up.
fn mutate(seed: &[u8], mut check: impl FnMut(&[u8])) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(fuzz_seconds());
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut rounds = 0_u64;
    while rounds < 2000 || std::time::Instant::now() < end {
        let mut bytes = seed.to_vec();
        for _ in 0..1 + next() % 8 {
            let at = hn4::num::index(next() % bytes.len() as u64);
            bytes[at] = next().to_le_bytes()[3];
        }
        check(&bytes);
        rounds += 1;
    }
}

#[test]
fn no_superblock_panics_or_loops() {
    let seed = zerocopy::IntoBytes::as_bytes(&Superblock::zeroed()).to_vec();
    mutate(&seed, |bytes| {
        let superblock = Superblock::from_bytes(bytes).expect("8 KiB");
        let _ = superblock.check(512, 0);
        let _ = hn4::tool::inspect::layout_text(&superblock, 512);
        let geometry = Geometry::of(&superblock, 512);
        let _ = Space::new(&geometry, 3).map(|space| Path::new(space, 1, 2).block(3, 4));
    });
}

#[test]
fn no_tcc_stream_panics_or_grows_beyond_its_block() {
    let seed: Vec<u8> = (0..=255).collect();
    mutate(&seed, |bytes| {
        if let Ok(output) = tcc::decode(bytes, 4048) {
            assert!(output.len() <= 4048);
        }
    });
}

#[test]
fn no_anchor_panics_or_leads_a_reader_out_of_the_volume() {
    let device = Device::plain(4 << 20, 512);
    let disk = formatted(device, &params(Profile::Pico, Conduct::Corrected));
    let volume = Volume::open(&disk.bytes, device, Conduct::Corrected).expect("opens");
    mutate(&[1; 128], |bytes| {
        let anchor = hn4::anchor::Anchor::from_bytes(bytes).expect("128 bytes");
        let _ = volume.read_block(&anchor, anchor.mass.get() % 1000);
        let _ = volume.read_nano(&anchor);
        let _ = anchor.name();
    });
}

#[test]
fn no_medium_panics_a_mount_whatever_its_superblock_says() {
    let device = Device::plain(2 << 20, 512);
    let disk = formatted(device, &params(Profile::Pico, Conduct::Corrected));
    let north = disk.bytes[..8192].to_vec();
    let mut target = disk.clone();
    mutate(&north[..280], |bytes| {
        let mut superblock = disk.north();
        zerocopy::IntoBytes::as_mut_bytes(&mut superblock)[..280].copy_from_slice(bytes);
        // Magics and identity stay, so that the checks behind them are reached.
        superblock.magic = hn4::superblock::MAGIC.into();
        superblock.magic_tail = hn4::superblock::MAGIC_TAIL.into();
        let sealed = superblock.sealed();
        target.write(0, zerocopy::IntoBytes::as_bytes(&sealed));
        for conduct in [Conduct::Corrected, Conduct::ReferenceCompatible] {
            let assessment = target.assess(0, crate::common::T0, conduct);
            let refused = assessment.verdict.is_err();
            assert!(!(refused && conduct.corrects() && !assessment.plan.is_empty()));
        }
    });
}

#[test]
fn no_chronicle_panics_the_verifier() {
    let device = Device::plain(2 << 20, 512);
    let mut disk = formatted(device, &params(Profile::Pico, Conduct::Corrected));
    let mut volume = disk.mount(crate::common::T0, Conduct::Corrected);
    let faults = hn4::plan::Faults::default();
    for number in 0..3 {
        let image = disk.bytes.clone();
        let mut medium = hn4::plan::Medium::new(&image, device, &faults);
        let request = hn4::chronicle::append::Request::new(
            hn4::chronicle::OpCode::Snapshot,
            number,
            number,
            7,
            crate::common::T0 + number,
        );
        let key = hn4::chronicle::LinkKey::Public;
        hn4::chronicle::append::append(
            &mut medium,
            &mut volume.superblock,
            &request,
            false,
            Conduct::Corrected,
            &key,
        )
        .expect("an append");
        disk.execute(medium.plan());
    }
    let start = hn4::num::index(volume.superblock.journal_start.get() * 512);
    let log = disk.bytes[start..start + 4 * 512].to_vec();
    let sound = volume.superblock;
    mutate(&log, |bytes| {
        disk.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        let mut medium = hn4::plan::Medium::new(&disk.bytes, device, &faults);
        let mut superblock = sound;
        let key = hn4::chronicle::LinkKey::Public;
        let verdict =
            hn4::chronicle::verify::verify(&mut medium, &mut superblock, Conduct::Corrected, &key);
        // The three entries are covered byte for byte; the slot behind them is free.
        if bytes[..3 * 512] != log[..3 * 512] {
            assert!(verdict.is_err(), "a changed log verified");
        }
    });
}
