//! The oracle finds what is wrong and nothing else.

use super::*;

const SECTORS: usize = 8;

/// Writes one sector and completes it.
fn put(oracle: &mut Oracle, sector: u64) -> WriteId {
    let id = oracle.issue(sector, 1, false).expect("not busy");
    oracle.complete(id, false);
    id
}

fn flush(oracle: &mut Oracle) {
    let flush = oracle.issue_flush();
    oracle.complete_flush(flush);
}

/// An image of the given writes, in order.
fn image(oracle: &Oracle, writes: &[WriteId]) -> Vec<u8> {
    let mut image = vec![0; SECTORS * 512];
    for &id in writes {
        let write = *oracle.write_of(id);
        let at = index(write.first * SECTOR_BYTES);
        let bytes = if write.zeroes {
            vec![0; index(write.sectors * SECTOR_BYTES)]
        } else {
            oracle.payload(id)
        };
        image[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    image
}

#[test]
fn every_prefix_is_accepted_and_every_gap_is_found() {
    let mut oracle = Oracle::new(7, SECTORS);
    let writes: Vec<WriteId> = [0, 1, 0, 2, 3, 1].map(|at| put(&mut oracle, at)).to_vec();
    for length in 0..=writes.len() {
        let seen = oracle
            .check(&image(&oracle, &writes[..length]))
            .expect("a prefix");
        assert_eq!(seen.missing, (writes.len() - length) as u64);
    }
    for gap in 0..writes.len() - 1 {
        let mut holey = writes.clone();
        holey.remove(gap);
        let result = oracle.check(&image(&oracle, &holey));
        // A write that a later one covers cannot be missed.
        let covered = writes[gap + 1..]
            .iter()
            .any(|&later| oracle.write_of(later).first == oracle.write_of(writes[gap]).first);
        assert_eq!(result.is_ok(), covered, "gap {gap}: {result:?}");
    }
}

#[test]
fn a_flushed_write_that_is_missing_is_lost_and_an_unflushed_one_is_not() {
    let mut oracle = Oracle::new(7, SECTORS);
    let first = put(&mut oracle, 0);
    flush(&mut oracle);
    put(&mut oracle, 1);
    let result = oracle.check(&image(&oracle, &[]));
    assert!(matches!(
        result,
        Err(Violation::LostFlush {
            sector: 0,
            lost: 1,
            ..
        })
    ));
    let seen = oracle
        .check(&image(&oracle, &[first]))
        .expect("only the unflushed is gone");
    assert_eq!((seen.missing, seen.missing_completed), (1, 1));
}

#[test]
fn a_flush_covers_nothing_that_completed_after_it_was_issued() {
    let mut oracle = Oracle::new(7, SECTORS);
    let flush = oracle.issue_flush();
    put(&mut oracle, 0);
    oracle.complete_flush(flush);
    assert!(oracle.check(&image(&oracle, &[])).is_ok());
    let fua = oracle.issue(1, 1, false).expect("not busy");
    oracle.complete(fua, true);
    let result = oracle.check(&image(&oracle, &[]));
    assert!(
        matches!(result, Err(Violation::LostFlush { sector: 1, .. })),
        "{result:?}"
    );
}

#[test]
fn writes_in_flight_together_may_be_there_in_any_order() {
    let mut oracle = Oracle::new(7, SECTORS);
    let one = oracle.issue(0, 1, false).expect("not busy");
    let two = oracle.issue(1, 1, false).expect("not busy");
    assert_eq!(oracle.issue(1, 2, false), None, "sector 1 is busy");
    oracle.complete(one, false);
    oracle.complete(two, false);
    for part in [vec![], vec![one], vec![two], vec![one, two]] {
        assert!(oracle.check(&image(&oracle, &part)).is_ok());
    }
}

#[test]
fn a_torn_write_and_a_foreign_sector_are_found() {
    let mut oracle = Oracle::new(7, SECTORS);
    let wide = oracle.issue(2, 3, false).expect("not busy");
    let mut torn = image(&oracle, &[wide]);
    torn[4 * 512..5 * 512].fill(0);
    assert!(matches!(
        oracle.check(&torn),
        Err(Violation::Torn { missing_at: 4, .. })
    ));
    let mut foreign = image(&oracle, &[wide]);
    foreign.copy_within(2 * 512..3 * 512, 6 * 512);
    assert!(matches!(
        oracle.check(&foreign),
        Err(Violation::Foreign { sector: 6, .. })
    ));
    let mut half = image(&oracle, &[wide]);
    half[2 * 512..2 * 512 + 256].fill(0);
    assert!(matches!(
        oracle.check(&half),
        Err(Violation::Foreign { sector: 2, .. })
    ));
}

#[test]
fn zeroed_sectors_count_as_the_zeroing_that_complains_least() {
    let mut oracle = Oracle::new(7, SECTORS);
    let data = put(&mut oracle, 0);
    let zero = oracle.issue(0, 1, true).expect("not busy");
    oracle.complete(zero, false);
    let other = put(&mut oracle, 1);
    assert!(oracle.check(&image(&oracle, &[data, zero, other])).is_ok());
    let result = oracle.check(&image(&oracle, &[data, other]));
    assert!(
        matches!(result, Err(Violation::NotAPrefix { .. })),
        "{result:?}"
    );
    flush(&mut oracle);
    let result = oracle.check(&image(&oracle, &[data]));
    assert!(
        matches!(result, Err(Violation::LostFlush { .. })),
        "{result:?}"
    );
}

#[test]
fn what_was_dropped_at_a_crash_must_not_come_back() {
    let mut oracle = Oracle::new(7, SECTORS);
    let kept = put(&mut oracle, 0);
    let dropped = put(&mut oracle, 1);
    let seen = oracle.check(&image(&oracle, &[kept])).expect("a prefix");
    oracle.settle(&seen);
    let result = oracle.check(&image(&oracle, &[kept, dropped]));
    assert!(
        matches!(result, Err(Violation::Foreign { sector: 1, .. })),
        "{result:?}"
    );
    let next = put(&mut oracle, 1);
    assert!(oracle.check(&image(&oracle, &[kept, next])).is_ok());
}

#[test]
fn a_zeroing_that_was_dropped_is_not_held_against_sectors_that_were_zero_before() {
    let mut oracle = Oracle::new(7, SECTORS);
    let data = put(&mut oracle, 0);
    let zeroes = oracle.issue(0, 2, true).expect("not busy");
    oracle.complete(zeroes, false);
    let seen = oracle.check(&image(&oracle, &[data])).expect("a prefix");
    oracle.settle(&seen);
    flush(&mut oracle);
    let seen = oracle
        .check(&image(&oracle, &[data]))
        .expect("nothing has changed");
    oracle.settle(&seen);
    assert!(oracle.check(&image(&oracle, &[data])).is_ok());
}

#[test]
fn what_lies_under_a_zeroing_that_was_dropped_was_dropped_too() {
    let mut oracle = Oracle::new(7, SECTORS);
    let old = put(&mut oracle, 0);
    flush(&mut oracle);
    let between = put(&mut oracle, 1);
    let zeroes = oracle.issue(0, 2, true).expect("not busy");
    oracle.complete(zeroes, false);
    // Sector 1 may be zero since the beginning or by the zeroing; sector 0 tells.
    let seen = oracle.check(&image(&oracle, &[old])).expect("a prefix");
    oracle.settle(&seen);
    flush(&mut oracle);
    assert!(
        oracle.check(&image(&oracle, &[old])).is_ok(),
        "nothing has changed"
    );
    assert!(
        oracle.check(&image(&oracle, &[old, between])).is_err(),
        "it must not come back"
    );
}
