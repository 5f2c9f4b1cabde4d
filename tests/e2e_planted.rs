//! The power rig is tested by daemons with planted bugs: each must be caught within 20 cuts.
//!
//! `cargo test --features mutants --test e2e_planted` builds the daemon with the simulator's bugs
//! in it; which one is switched on, a variable of the environment says.

mod common;

use common::disk::can_lose_power;
use common::power::{Cache, Ended, cuts};
use common::seed;

fn is_caught(bug: &str, cache: Cache) {
    if !can_lose_power(&["nbdkit", "nbdfuse"]) {
        return;
    }
    let found = cuts(cache, 20, seed(bug), &[("HN4_PLANTED_BUG", bug)]);
    println!("{bug}: {found:?}");
    assert!(
        matches!(found, Err(Ended::Promise(_))),
        "20 power cuts of a daemon with {bug}, and no loss was found: {found:?}"
    );
}

#[test]
fn a_log_without_flushes_is_caught_by_cuts_that_lose_the_caches() {
    is_caught("NoLogFlush", Cache::Lost);
}

#[test]
fn a_log_without_flushes_is_caught_by_cuts_that_keep_a_random_part() {
    is_caught("NoLogFlush", Cache::PartlyLost);
}

#[test]
fn a_checkpoint_of_an_unflushed_backing_is_caught_by_cuts_that_lose_the_caches() {
    is_caught("NoFlushBeforeCheckpoint", Cache::Lost);
}

#[test]
fn a_checkpoint_of_an_unflushed_backing_is_caught_by_cuts_that_keep_a_random_part() {
    is_caught("NoFlushBeforeCheckpoint", Cache::PartlyLost);
}

#[test]
fn an_early_answer_to_a_flush_is_caught_too() {
    is_caught("AckBeforeLog", Cache::Lost);
}

#[test]
fn without_a_bug_the_same_daemon_loses_nothing() {
    if can_lose_power(&["nbdkit", "nbdfuse"]) {
        let outcome = cuts(Cache::PartlyLost, 5, seed("none"), &[]);
        println!("{}", outcome.unwrap_or_else(|error| panic!("{error}")));
    }
}
