//! A first full copy between real daemons: what it costs on the wire, and that it goes on where it
//! was, whichever side is killed.

mod common;
#[path = "common/wire.rs"]
mod wire;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{LIMIT, folder, is_usable, pair, seed};
use hn4_replicad::control::api::{CopyReport, VolumeReport};
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Plan, quiesce_and_compare};
use wire::Wire;

const MIB: u64 = 1 << 20;
/// Data and holes take turns in pieces of this size.
const STRETCH: u64 = 4 * MIB;

/// Fills every second stretch of a sparse file with noise. Gives the bytes of data.
fn fill_half(backing: &Path, bytes: u64, seed: u64) -> u64 {
    let file = File::options().write(true).open(backing);
    let file = file.expect("a backing");
    let mut random = Random::new(seed);
    let mut noise = vec![0; 1 << 20];
    let mut filled = 0;
    for at in (0..bytes).step_by(1 << 20) {
        if (at / STRETCH).is_multiple_of(2) {
            for word in noise.chunks_exact_mut(8) {
                word.copy_from_slice(&random.draw().to_le_bytes());
            }
            file.write_all_at(&noise, at).expect("written");
            filled += noise.len() as u64;
        }
    }
    file.sync_all().expect("flushed");
    filled
}

/// Bytes of the copy that have arrived; all of them if it is complete.
fn received(report: &VolumeReport, all: u64) -> u64 {
    match report.state.as_ref().map(|state| &state.copy) {
        Some(CopyReport::Usable) => all,
        Some(CopyReport::Seeding { received_bytes, .. }) => *received_bytes,
        Some(_) | None => 0,
    }
}

/// Makes a first copy while one side after the other is killed, and compares what went over the
/// wire with the data there is.
fn copied_with_kills(plan: &Plan, kills: u64, seed: u64) {
    let place = folder();
    let (mut alpha, mut beta) = pair(place.path(), plan);
    let size = plan.size_mib * MIB;
    let data = fill_half(&alpha.backing(), size, seed);
    let wire = Wire::from(&alpha, plan.transport);
    let started = Instant::now();
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    let limit = LIMIT.max(Duration::from_secs(plan.size_mib / 4));
    for kill in 1..=kills {
        let goal = size * kill / (kills + 1);
        beta.wait_for("receive more", limit, |report| {
            received(report, size) >= goal
        })
        .expect("the copy goes on");
        let victim = if kill.is_multiple_of(2) {
            &mut alpha
        } else {
            &mut beta
        };
        victim.kill().expect("killed");
        victim.start().expect("started again");
    }
    beta.wait_for("have a full copy", limit, is_usable)
        .expect("the copy is completed");
    let (passed, took) = (wire.passed(), started.elapsed());
    let hundredths = passed * 100 / data;
    println!(
        "{} {} MiB, {} MiB of data, {kills} kills: {} MiB on the wire both ways, {}.{:02} of the \
         data, {took:.1?}",
        plan.transport,
        plan.size_mib,
        data / MIB,
        passed / MIB,
        hundredths / 100,
        hundredths % 100
    );
    quiesce_and_compare(&mut alpha, &mut beta, limit).expect("equal copies");
    assert!(
        passed * 10 <= data * 11,
        "{passed} bytes on the wire for {data} bytes of data"
    );
}

fn plan(size_mib: u64, overlay_mib: u64, transport: &'static str) -> Plan {
    Plan {
        size_mib,
        overlay_mib,
        transport,
        policy: String::new(),
        ..Plan::default()
    }
}

#[test]
fn a_first_copy_goes_on_where_it_was_after_kills_on_either_side() {
    let seed = seed("e2e_copy");
    copied_with_kills(&plan(384, 4, "quic"), 4, seed);
    copied_with_kills(&plan(384, 4, "wss"), 4, seed);
}

#[test]
#[ignore = "8 GiB and some minutes; run with --release"]
fn a_first_copy_of_8_gib_killed_ten_times_costs_little_more_than_its_data() {
    let seed = seed("e2e_copy");
    for transport in ["quic", "wss"] {
        copied_with_kills(&plan(8192, 64, transport), 10, seed);
    }
}

#[test]
fn a_hole_costs_a_few_messages_however_large_it_is() {
    let place = folder();
    let plan = plan(1 << 18, 8, "wss");
    let (mut alpha, mut beta) = pair(place.path(), &plan);
    let wire = Wire::from(&alpha, plan.transport);
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    beta.wait_for("have a full copy", LIMIT, is_usable)
        .expect("the copy is completed");
    let passed = wire.passed();
    println!("an empty volume of 256 GiB: {passed} bytes on the wire");
    assert!(passed < MIB, "{passed} bytes for nothing but zeroes");
}
