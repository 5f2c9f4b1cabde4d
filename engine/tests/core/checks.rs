//! Reads of the backing that the state tree is to compare, with a tree that the test plays.

use hn4::log::Role;
use hn4::types::{BlockIndex, Lba};
use hn4_engine::arena::SlotMemory;
use hn4_engine::core::event::{Damaged, Request, TreeEvent, TreeWork, Verdict};
use hn4_engine::core::{SAMPLE_BLOCKS, SAMPLE_EVERY, VerifyReads};

use crate::tree::{Bench, ON_BACKING, Seen};

fn bench(verify_reads: VerifyReads) -> Bench {
    let mut bench = Bench::with(Role::Primary, verify_reads);
    bench.take();
    bench.done.clear();
    bench
}

/// What the tree was asked to compare, and nothing else: the read, and its blocks.
fn asked(bench: &mut Bench) -> Vec<(Option<u32>, Vec<u64>)> {
    let seen = bench.take().into_iter();
    let is_read = !bench.unreadable;
    seen.map(|seen| match seen {
        Seen::Tree(TreeWork::Check { read, blocks, segs }) => {
            let given = read.is_some() && is_read;
            assert_eq!(segs.len(), if given { blocks.len() } else { 0 });
            (read, blocks.into_iter().map(|block| block.0).collect())
        }
        other => panic!("{other:?}"),
    })
    .collect()
}

fn answer(bench: &mut Bench, read: u32, verdict: Verdict) {
    bench.tree(TreeEvent::Checked(Some(read), verdict));
}

/// The one read that waits for the tree.
fn waiting(bench: &mut Bench) -> u32 {
    match &asked(bench)[..] {
        [(Some(read), _)] => *read,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_read_is_answered_only_when_all_blocks_that_the_backing_gave_were_compared() {
    let mut bench = bench(VerifyReads::All);
    // Parts of the blocks 4 and 6, and all of block 5.
    let read = bench.read(37, 15);
    let told = asked(&mut bench);
    let [(Some(index), blocks)] = &told[..] else {
        panic!("{told:?}");
    };
    assert_eq!(blocks, &[4, 5, 6]);
    assert_eq!(
        bench.read_from,
        [(4 * 4096, 3 * 4096)],
        "whole, and at once"
    );
    assert_eq!(bench.done, [], "nobody has compared them");
    answer(&mut bench, *index, Verdict::Serve);
    assert_eq!(bench.done, [(read, false)]);
    // An answer that comes twice is nobody's.
    answer(&mut bench, *index, Verdict::Refuse);
    assert_eq!(bench.done.len(), 1);
}

#[test]
fn what_the_overlay_has_is_not_compared_and_is_what_the_client_gets() {
    let mut bench = bench(VerifyReads::All);
    let slot = bench.mem.alloc().expect("a slot");
    bench.mem.bytes_mut(slot).fill(0x11);
    bench.ask(Request::Write {
        lba: Lba(42),
        sectors: 2,
        fua: false,
        slots: vec![slot],
    });
    bench.done.clear();
    let newer = bench.read(42, 2);
    assert_eq!(
        bench.done,
        [(newer, false)],
        "nothing comes from the backing"
    );
    assert_eq!(asked(&mut bench), []);

    bench.read(40, 16);
    let into = bench.read_into.clone();
    assert!(
        bench
            .mem
            .bytes(into[0])
            .iter()
            .all(|byte| *byte == ON_BACKING)
    );
    let index = waiting(&mut bench);
    answer(&mut bench, index, Verdict::Serve);
    let bytes = bench.mem.bytes(into[0]);
    let expected = |at: usize| match at / 512 {
        2 | 3 => 0x11,
        _ => ON_BACKING,
    };
    assert!((0..4096).all(|at| bytes[at] == expected(at)));
    assert!(
        bench
            .mem
            .bytes(into[1])
            .iter()
            .all(|byte| *byte == ON_BACKING)
    );
}

#[test]
fn what_differs_is_never_served_but_read_again_when_it_is_known_why() {
    let mut bench = bench(VerifyReads::All);
    // It only overlapped a sweep.
    let read = bench.read(40, 8);
    let index = waiting(&mut bench);
    answer(&mut bench, index, Verdict::Again);
    assert_eq!((bench.read_from.len(), bench.done.len()), (2, 0));
    let index = waiting(&mut bench);
    answer(&mut bench, index, Verdict::Serve);
    assert_eq!(bench.done, [(read, false)]);
    bench.done.clear();

    // It is damaged, and repaired.
    let read = bench.read(40, 8);
    let index = waiting(&mut bench);
    bench.damage(5, Some(Damaged::Sought));
    answer(&mut bench, index, Verdict::Again);
    assert_eq!(bench.done, [], "it waits for the repair");
    bench.damage(5, None);
    let index = waiting(&mut bench);
    answer(&mut bench, index, Verdict::Serve);
    assert_eq!(bench.done, [(read, false)]);
    bench.done.clear();

    // It is damaged, and there is no good copy.
    let lost = bench.read(40, 8);
    let index = waiting(&mut bench);
    bench.damage(5, Some(Damaged::Sought));
    answer(&mut bench, index, Verdict::Again);
    bench.damage(5, Some(Damaged::Lost));
    let refused = bench.read(80, 8);
    let index = waiting(&mut bench);
    answer(&mut bench, index, Verdict::Refuse);
    assert_eq!(bench.done, [(lost, true), (refused, true)]);
}

#[test]
fn one_read_in_so_many_is_told_to_the_tree_after_it_was_answered() {
    let mut bench = bench(VerifyReads::Sample);
    for turn in 1..=2 * SAMPLE_EVERY {
        let read = bench.read(u64::from(turn) * 8 + 1, 2);
        assert_eq!(bench.done, [(read, false)], "nobody waits");
        bench.done.clear();
        let told = asked(&mut bench);
        match turn % SAMPLE_EVERY {
            0 => assert_eq!(told, [(None, vec![u64::from(turn)])]),
            _ => assert_eq!(told, []),
        }
    }
    assert_eq!(
        bench.read_from[0],
        (4608, 1024),
        "no more than was asked for"
    );
}

#[test]
fn samples_are_bounded_in_number_and_length() {
    let mut bench = bench(VerifyReads::Sample);
    let mut told = 0;
    for _ in 0..40 * SAMPLE_EVERY {
        bench.read(0, 8 * 100);
        let slots = std::mem::take(&mut bench.read_into);
        slots.into_iter().for_each(|slot| bench.mem.free(slot));
        for (_, blocks) in asked(&mut bench) {
            assert_eq!(blocks.len() as u64, SAMPLE_BLOCKS);
            told += 1;
        }
    }
    assert_eq!(told, 16);
    bench.tree(TreeEvent::Checked(None, Verdict::Serve));
    for _ in 0..SAMPLE_EVERY {
        bench.read(0, 8);
    }
    assert_eq!(asked(&mut bench).len(), 1, "there is room again");
}

#[test]
fn a_read_that_the_backing_fails_waits_until_its_blocks_are_repaired() {
    let mut bench = bench(VerifyReads::All);
    bench.unreadable = true;
    let read = bench.read(40, 16);
    let index = waiting(&mut bench);
    assert_eq!(bench.done, []);
    bench.damage(5, Some(Damaged::Sought));
    answer(&mut bench, index, Verdict::Again);
    assert_eq!(bench.done, []);
    bench.unreadable = false;
    bench.damage(5, None);
    let index = waiting(&mut bench);
    answer(&mut bench, index, Verdict::Serve);
    assert_eq!(bench.done, [(read, false)]);

    // A tree that knows nothing of them has nothing to serve either.
    bench.unreadable = true;
    bench.done.clear();
    let read = bench.read(40, 16);
    let index = waiting(&mut bench);
    answer(&mut bench, index, Verdict::Serve);
    assert_eq!(bench.done, [(read, true)]);

    // One that finds nothing damaged: once more, since another read may have had it repaired.
    for readable in [true, false] {
        bench.unreadable = true;
        bench.done.clear();
        let read = bench.read(40, 16);
        let index = waiting(&mut bench);
        bench.unreadable = !readable;
        answer(&mut bench, index, Verdict::Again);
        assert_eq!(bench.done, []);
        let index = waiting(&mut bench);
        let verdict = match readable {
            true => Verdict::Serve,
            false => Verdict::Again,
        };
        answer(&mut bench, index, verdict);
        assert_eq!(bench.done, [(read, !readable)]);
    }
}

#[test]
fn without_the_policy_a_read_that_fails_is_answered_and_the_tree_looks_at_its_blocks() {
    for policy in [VerifyReads::Off, VerifyReads::Sample] {
        let mut bench = bench(policy);
        bench.unreadable = true;
        let read = bench.read(40, 16);
        assert_eq!(bench.done, [(read, true)]);
        assert_eq!(asked(&mut bench), [(None, vec![5, 6])]);
    }
}

#[test]
fn without_the_policy_the_tree_hears_of_no_read() {
    let mut bench = bench(VerifyReads::Off);
    for block in 0..3 * u64::from(SAMPLE_EVERY) {
        bench.read(BlockIndex(block).lba().0, 8);
    }
    assert_eq!(asked(&mut bench), []);
}

#[test]
fn where_damage_is_only_counted_every_read_is_compared_whatever_the_policy_is() {
    for policy in [VerifyReads::Off, VerifyReads::Sample] {
        let mut bench = bench(policy);
        bench.tree(TreeEvent::Unlisted(true));
        let refused = bench.read(40, 8);
        let index = waiting(&mut bench);
        // Another one begins when that is over, and ends before the first.
        bench.tree(TreeEvent::Unlisted(false));
        let served = bench.read(80, 8);
        assert_eq!(bench.done, [(served, false)]);
        bench.done.clear();
        answer(&mut bench, index, Verdict::Refuse);
        assert_eq!(bench.done, [(refused, true)]);
        bench.done.clear();
        let read = bench.read(40, 8);
        assert_eq!(
            (bench.done.pop(), asked(&mut bench)),
            (Some((read, false)), vec![])
        );
    }
}
