//! Power cuts: log and backing lie on disks that forget what was not flushed, all of it or a random
//! part of it, see [`common::disk`]. The power goes at one moment for the daemon and its disks.
//!
//! **The rig is tested too**: with disks that ignore flushes the same cuts must be found to lose
//! data, and so must daemons with planted bugs (`e2e_planted`).

mod common;

use common::disk::{can_lose_power, can_make_loops};
use common::power::{Cache, Ended, cuts};
use common::{seed, times};

fn survive(cache: Cache, count: u64) {
    if !can_lose_power(&["nbdkit", "nbdfuse"]) {
        return;
    }
    let seed = seed("power");
    let outcome = cuts(cache, count, seed, &[]);
    println!(
        "{}",
        outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"))
    );
}

#[test]
fn a_power_cut_that_loses_all_caches_loses_no_flushed_write() {
    survive(Cache::Lost, times("HN4_CUTS", 10));
}

#[test]
fn a_power_cut_that_keeps_a_random_part_of_the_caches_loses_no_flushed_write() {
    survive(Cache::PartlyLost, times("HN4_CUTS", 10));
}

#[test]
fn a_power_cut_that_damages_physical_sectors_loses_nothing_that_lay_beside_a_write() {
    if can_make_loops() {
        survive(Cache::LargeSectors, times("HN4_CUTS", 10));
    }
}

#[test]
fn a_daemon_that_does_not_know_of_large_sectors_is_caught_by_this_rig() {
    if !can_lose_power(&["nbdkit", "nbdfuse"]) || !can_make_loops() {
        return;
    }
    let found = cuts(Cache::HiddenSectors, 40, seed("hidden sectors"), &[]);
    println!("{found:?}");
    assert!(
        matches!(found, Err(Ended::Promise(_))),
        "40 power cuts that damage physical sectors, and no damage was found: {found:?}"
    );
}

#[test]
#[ignore = "the long run: 200 cuts take many minutes"]
fn two_hundred_power_cuts_lose_no_flushed_write() {
    survive(Cache::Lost, 100);
    survive(Cache::PartlyLost, 100);
    if can_make_loops() {
        survive(Cache::LargeSectors, 100);
    }
}

#[test]
fn a_disk_that_ignores_flushes_is_caught_by_this_rig() {
    if !can_lose_power(&["nbdkit", "nbdfuse"]) {
        return;
    }
    let found = cuts(Cache::Lying, 20, seed("lying disk"), &[]);
    println!("{found:?}");
    let noticed = matches!(found, Err(Ended::Promise(_)));
    assert!(
        noticed,
        "20 power cuts of a disk that lies, and no loss was found: {found:?}"
    );
}
