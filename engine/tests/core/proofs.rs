//! Log is kept until it is proven, and clients wait only when three quarters of it are not.

use hn4::log::Role;
use hn4_engine::arena::SlotMemory;
use hn4_engine::core::event::{ProofEvent, Request, Tip};
use hn4_engine::core::{Event, VolumeConfig};

use crate::peers;
use crate::recovery::logged;
use crate::tree::Bench;

const PROVES: fn(&mut VolumeConfig) = |config| {
    config.prove = true;
    config.tree = false;
    config.peers = 0;
};

fn start(bench: &mut Bench) {
    let start = ProofEvent::Start {
        after: Tip::default(),
        credit: 32 << 20,
    };
    bench.step(Event::Proof(start));
}

/// Writes and flushes epochs of 64 blocks until writers are held back. How many there were.
fn fill(bench: &mut Bench) -> u64 {
    for epoch in 0.. {
        for block in 0..64 {
            if !bench.volume.has_room(&bench.mem, 1) {
                return epoch;
            }
            bench.write((64 * (epoch % 16) + block) * 8, 8);
        }
        bench.ask(Request::Flush);
        assert_eq!(bench.done.last(), Some(&(bench.requests, false)), "at once");
        bench.drain();
        assert!(epoch < 1000, "nobody is ever held back");
    }
    unreachable!("the loop ends by itself")
}

#[test]
fn a_prover_that_is_behind_holds_clients_back_at_three_quarters_of_the_log_and_no_sooner() {
    let mut bench = Bench::configured(Role::Primary, PROVES);
    start(&mut bench);
    fill(&mut bench);
    let (used, ring) = bench.volume.log_usage();
    let lag = bench.volume.proof_lag_bytes();
    assert!(bench.volume.is_proof_lagging());
    assert!(lag > ring / 4 * 3 && lag < ring, "{lag} of {ring}");
    assert!(used >= lag, "what is not proven is kept");
    // Neither flushes nor reads wait, nor is it for want of memory.
    assert!(bench.mem.free_slots() > bench.mem.capacity() / 2);
    bench.ask(Request::Flush);
    assert_eq!(bench.done.last(), Some(&(bench.requests, false)));
    let read = bench.read(0, 8);
    assert_eq!(bench.done.last(), Some(&(read, false)));

    // It catches up a little, and they go on; and at last the log is let go.
    let end = bench.volume.tip();
    bench.step(Event::Proof(ProofEvent::Proven(end)));
    assert_eq!(bench.volume.proof_lag_bytes(), 0);
    assert!(bench.volume.has_room(&bench.mem, 1));
    bench.drain();
    assert!(bench.volume.log_usage().0 < ring / 4);
    bench.write(0, 8);
}

#[test]
fn one_that_keeps_up_never_holds_anybody_back() {
    let mut bench = Bench::configured(Role::Primary, PROVES);
    start(&mut bench);
    for epoch in 0..200 {
        assert!(bench.volume.has_room(&bench.mem, 64), "epoch {epoch}");
        for block in 0..64 {
            bench.write((64 * (epoch % 16) + block) * 8, 8);
        }
        bench.ask(Request::Flush);
        let end = bench.volume.tip();
        bench.step(Event::Proof(ProofEvent::Proven(end)));
        bench.step(Event::Proof(ProofEvent::Credit(64 * 4096 + 8192)));
        bench.drain();
    }
    let (used, ring) = bench.volume.log_usage();
    assert!(used < ring, "the log went round {}", 200 * 64 * 4096 / ring);
}

/// A write was lost, and what lies in its place is whole, of the same epoch, and of another
/// history: the prover would take it for what this node has.
#[test]
fn a_whole_frame_of_another_history_counts_as_damage_of_the_log() {
    let (log, _) = logged();
    let frame_of = |after_ms: u64| {
        let mut bench = peers::Bench::on(&mut log.clone(), |config| VolumeConfig {
            peers: 1,
            destage_delay_ms: 3_600_000,
            ..config
        });
        bench.under_way = Some(Vec::new());
        bench.pass(after_ms);
        let epoch = bench.volume.tip().epoch;
        let frame = bench.volume.frame_bytes(epoch, &bench.mem);
        (bench, epoch, frame.expect("it is in memory"))
    };
    let (bench, epoch, own) = frame_of(0);
    let (_, other_epoch, other) = frame_of(1);
    assert_eq!(epoch, other_epoch);
    let read = |frame: &[u8]| {
        let mut frame = frame.to_vec();
        bench.volume.strike_out_foreign(epoch, &mut frame);
        frame
    };
    assert_eq!(read(&own), own);
    let struck = read(&other);
    assert!(struck[..4096].iter().all(|&byte| byte == 0));
    assert_eq!(struck[4096..], other[4096..]);
    let mut rotten = other;
    rotten[100] ^= 1;
    assert_eq!(read(&rotten), rotten, "the prover sees that by itself");
}
