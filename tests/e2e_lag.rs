//! Lag control between real daemons, over a line that is slower than the writers: `throttle` holds
//! the lag at its bound, `spill` lets writers go on, `detach` lets the peer go until it has caught
//! up. Each prints the table that docs/OPERATIONS.md shows.

mod common;
#[path = "common/wire.rs"]
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{LIMIT, folder, is_usable, pair, seed};
use hn4_engine::nbd::client::Submit;
use hn4_replicad::control::api::{PeerReport, VolumeReport};
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce_and_compare};
use wire::Wire;

const MIB: u64 = 1 << 20;
/// Of the line, in bytes a second.
const RATE: u64 = 8 * MIB;
/// Of one write.
const WRITE_BYTES: u64 = 64 << 10;
/// Writes in flight.
const DEPTH: usize = 8;

/// A client that writes noise to random places as fast as it is let, until it is stopped or has
/// written so much.
struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(node: &Node, volume_bytes: u64, seed: u64, most: u64) -> Self {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let mut client = node.client().expect("a client");
        let (own_stop, own_written) = (Arc::clone(&stop), Arc::clone(&written));
        let thread = std::thread::spawn(move || {
            let counter: Arc<AtomicU64> = own_written;
            let mut random = Random::new(seed);
            let mut data = vec![0; usize::try_from(WRITE_BYTES).expect("small")];
            let (mut issued, mut waiting) = (0, 0);
            loop {
                let more = issued < most && !own_stop.load(Ordering::Relaxed);
                if more && waiting < DEPTH {
                    for word in data.chunks_exact_mut(8) {
                        word.copy_from_slice(&random.draw().to_le_bytes());
                    }
                    let offset = random.below(volume_bytes / WRITE_BYTES) * WRITE_BYTES;
                    let fua = false;
                    let data = &data;
                    client
                        .submit(Submit::Write { offset, data, fua })
                        .expect("a write");
                    issued += WRITE_BYTES;
                    waiting += 1;
                } else if waiting > 0 {
                    client
                        .next_reply()
                        .expect("a reply")
                        .result
                        .expect("written");
                    counter.fetch_add(WRITE_BYTES, Ordering::Relaxed);
                    waiting -= 1;
                } else {
                    return;
                }
            }
        });
        Self {
            stop,
            written,
            thread,
        }
    }

    fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the writer ends well");
    }
}

/// What was seen at one moment.
#[derive(Clone, Debug)]
struct Sample {
    ms: u128,
    written: u64,
    lag_bytes: u64,
    lag_ms: u64,
    log_used: u64,
    state: String,
}

/// Looks ten times a second, until told that it is enough.
fn watch(
    node: &Node,
    writer: &Writer,
    limit: Duration,
    mut enough: impl FnMut(&Sample) -> bool,
) -> Vec<Sample> {
    let start = Instant::now();
    let mut all = Vec::new();
    loop {
        let report = node.report().expect("a report");
        let peer: &PeerReport = &report.peers[0];
        let progress = peer.progress.as_ref().expect("a primary knows");
        let state = report.state.as_ref().expect("open");
        let control = peer.lag_control.as_ref().expect("a bound");
        let sample = Sample {
            ms: start.elapsed().as_millis(),
            written: writer.written(),
            lag_bytes: progress.durable.lag_bytes.unwrap_or(0),
            lag_ms: progress.durable.lag_ms.unwrap_or(0),
            log_used: state.log_used_bytes,
            state: control.state.clone(),
        };
        all.push(sample.clone());
        if enough(&sample) {
            return all;
        }
        assert!(start.elapsed() < limit, "not within {limit:?}: {sample:?}");
        // A sampling interval, not a wait.
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn table(title: &str, samples: &[Sample]) {
    println!("\n{title}\n");
    println!("| s | written MiB | writers MiB/s | lag MiB | lag s | log MiB | state |");
    println!("|---|---|---|---|---|---|---|");
    let mut before = &samples[0];
    for (index, sample) in samples.iter().enumerate() {
        let last = index + 1 == samples.len();
        if sample.ms < before.ms + 1000 && index > 0 && !last {
            continue;
        }
        let ms = (sample.ms - before.ms).max(1);
        let rate = u128::from(sample.written - before.written) * 1000 / ms / u128::from(MIB);
        println!(
            "| {}.{} | {} | {rate} | {}.{} | {}.{} | {} | {} |",
            sample.ms / 1000,
            sample.ms % 1000 / 100,
            sample.written / MIB,
            sample.lag_bytes / MIB,
            sample.lag_bytes % MIB * 10 / MIB,
            sample.lag_ms / 1000,
            sample.lag_ms % 1000 / 100,
            sample.log_used / MIB,
            sample.state
        );
        before = sample;
    }
}

fn plan(transport: &'static str) -> Plan {
    Plan {
        size_mib: 128,
        log_mib: 256,
        overlay_mib: 64,
        transport,
        policy: String::new(),
        ..Plan::default()
    }
}

/// Two nodes with a bound for the peer's lag, and the slow line between them.
fn slow_pair(folder: &std::path::Path, plan: &Plan, lines: &str) -> (Node, Node, Wire) {
    let (mut alpha, mut beta) = pair(folder, plan);
    let text = std::fs::read_to_string(alpha.config()).expect("a configuration");
    std::fs::write(alpha.config(), format!("{text}{lines}")).expect("written");
    let wire = Wire::from(&alpha, plan.transport);
    alpha.start().expect("alpha serves");
    beta.start().expect("beta runs");
    beta.wait_for("have a full copy", LIMIT, is_usable)
        .expect("beta is seeded");
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    wire.limit(RATE);
    (alpha, beta, wire)
}

fn finish(mut alpha: Node, mut beta: Node, wire: &Wire) {
    wire.limit(0);
    quiesce_and_compare(&mut alpha, &mut beta, LIMIT).expect("equal copies");
}

fn names(report: &VolumeReport, state: &str) -> bool {
    report.findings.iter().any(|finding| finding.state == state)
}

#[test]
fn throttle_holds_the_lag_at_its_bound_in_bytes() {
    let place = folder();
    let plan = plan("wss");
    let bound = 16 * MIB;
    let lines = format!("max_lag_bytes = {bound}\non_exceed = \"throttle\"\n");
    let (mut alpha, beta, wire) = slow_pair(place.path(), &plan, &lines);
    let writer = Writer::start(&alpha, plan.size_mib * MIB, seed("throttle"), u64::MAX);
    let samples = watch(&alpha, &writer, LIMIT, |sample| sample.ms >= 10_000);
    table("throttle, 16 MiB, line 8 MiB/s", &samples);
    alpha
        .wait_for("say that writers wait", LIMIT, |report| {
            names(report, "lag-throttled")
        })
        .expect("status says so");
    writer.stop();
    let worst = samples.iter().map(|sample| sample.lag_bytes).max();
    // Heads of frames are not known when a write is admitted.
    assert!(worst <= Some(bound + bound / 10), "{worst:?}");
    let late = samples.iter().filter(|sample| sample.ms > 4000);
    let held = late.clone().filter(|sample| sample.lag_bytes > bound / 2);
    assert!(held.count() * 10 > late.count() * 8, "it was not near it");
    finish(alpha, beta, &wire);
}

#[test]
fn throttle_holds_the_lag_at_its_bound_in_seconds() {
    let place = folder();
    let plan = plan("wss");
    let lines = "max_lag_seconds = 2\non_exceed = \"throttle\"\n";
    let (alpha, beta, wire) = slow_pair(place.path(), &plan, lines);
    let writer = Writer::start(&alpha, plan.size_mib * MIB, seed("seconds"), u64::MAX);
    let samples = watch(&alpha, &writer, LIMIT, |sample| sample.ms >= 15_000);
    table("throttle, 2 s, line 8 MiB/s", &samples);
    writer.stop();
    let late = samples.iter().filter(|sample| sample.ms > 5000);
    let worst = late.map(|sample| sample.lag_ms).max();
    assert!(worst <= Some(3000), "{worst:?}");
    let (first, last) = (&samples[samples.len() / 2], &samples[samples.len() - 1]);
    let ms = u64::try_from(last.ms - first.ms).expect("a short time");
    let rate = (last.written - first.written) * 1000 / ms;
    assert!(
        rate > RATE / 2,
        "writers got {rate} bytes/s of the line's {RATE}"
    );
    finish(alpha, beta, &wire);
}

#[test]
fn spill_keeps_writers_at_full_speed_until_the_log_is_full() {
    let place = folder();
    let plan = plan("wss");
    let lines = format!("max_lag_bytes = {}\non_exceed = \"spill\"\n", 16 * MIB);
    let (mut alpha, beta, wire) = slow_pair(place.path(), &plan, &lines);
    let started = Instant::now();
    let writer = Writer::start(&alpha, plan.size_mib * MIB, seed("spill"), u64::MAX);
    let full = plan.log_mib * MIB * 9 / 10;
    let mut samples = watch(&alpha, &writer, LIMIT, |sample| sample.log_used > full);
    let (written, filled) = (writer.written(), started.elapsed());
    let end = samples[samples.len() - 1].ms + 5000;
    let rest = watch(&alpha, &writer, LIMIT, |sample| {
        sample.ms + end >= end + 5000
    });
    let shift = filled.as_millis();
    samples.extend(rest.into_iter().map(|sample| Sample {
        ms: sample.ms + shift,
        ..sample
    }));
    table("spill, 16 MiB, log 256 MiB, line 8 MiB/s", &samples);
    let ms = u64::try_from(filled.as_millis())
        .expect("a short time")
        .max(1);
    let rate = written * 1000 / ms;
    println!("{rate} bytes/s until the log was full");
    assert!(rate > 3 * RATE, "writers got {rate} bytes/s");
    alpha
        .wait_for("say that it spills", LIMIT, |report| {
            names(report, "lag-spilling") && names(report, "log-nearly-full")
        })
        .expect("status says so");
    writer.stop();
    finish(alpha, beta, &wire);
}

#[test]
fn detach_lets_the_peer_go_and_it_comes_back_by_itself() {
    let place = folder();
    let plan = plan("quic");
    let lines = format!("max_lag_bytes = {}\non_exceed = \"detach\"\n", 16 * MIB);
    let (mut alpha, beta, wire) = slow_pair(place.path(), &plan, &lines);
    // As much as the log keeps for a peer that it does not have to keep it for.
    let most = 96 * MIB;
    let writer = Writer::start(&alpha, plan.size_mib * MIB, seed("detach"), most);
    let mut detached_at = None;
    let samples = watch(&alpha, &writer, LIMIT, |sample| {
        if sample.state == "detached" {
            detached_at.get_or_insert(sample.ms);
        }
        sample.written == most && sample.lag_bytes == 0
    });
    table("detach, 16 MiB, 96 MiB written, line 8 MiB/s", &samples);
    assert!(detached_at.is_some(), "it was never let go");
    let done = samples.iter().find(|sample| sample.written == most);
    let done = done.map_or(u128::MAX, |sample| sample.ms);
    let last = samples[samples.len() - 1].clone();
    assert!(
        done * 2 < last.ms,
        "writers were held: {done} of {} ms",
        last.ms
    );
    assert_eq!(last.state, "within", "it counts again");
    let report = alpha.report().expect("a report");
    assert!(!names(&report, "peer-detached"), "{:?}", report.findings);
    writer.stop();
    alpha.wait_for_peer(LIMIT).expect("beta follows");
    finish(alpha, beta, &wire);
}
