//! What acknowledgements of a replica add to a flush.
//!
//! One write of 4 KiB and one flush at a time, on one volume: without its replica, then with each
//! `ack` in turn. Both logs lie on one disk here, so that "one flush of the peer" is taken to be
//! what a flush takes without it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hn4_replicad::quickstart::rig::{Node, Plan};

use super::pair::{LIMIT, Pair};
use super::{Setup, Table, verdict};
use crate::compare::middle;
use crate::stats::Stats;

/// Bytes that go there and back to find out what a round trip takes.
const ROUND_TRIPS: u32 = 500;
/// DESIGN 10 allows a tenth more than the sum of the parts.
const ALLOWANCE: f64 = 1.1;

const JOB: &str = "[flush]\nrw=randwrite\nbs=4k\niodepth=1\nfdatasync=1\nnorandommap\ntime_based\n";

/// Who must have a write before its flush is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// This node; the replica does not run.
    Local,
    /// `ack = "async"`.
    Async,
    /// `ack = "received"`.
    Received,
    /// `ack = "durable"`.
    Durable,
}

const MODES: [Mode; 4] = [Mode::Local, Mode::Async, Mode::Received, Mode::Durable];

impl Mode {
    fn label(self) -> &'static str {
        match self {
            Self::Local => "local, no replica",
            Self::Async => "async",
            Self::Received => "received",
            Self::Durable => "durable",
        }
    }

    fn ack(self) -> &'static str {
        match self {
            Self::Local | Self::Async => "async",
            Self::Received => "received",
            Self::Durable => "durable",
        }
    }
}

/// Microseconds.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Times {
    write: f64,
    flush: f64,
    flush_p99: f64,
}

impl Times {
    fn of(stats: &Stats) -> Self {
        let us = |nanos: u64| nanos as f64 / 1e3;
        Self {
            write: us(stats.write.latency.value_at_percentile(50.0)),
            flush: us(stats.sync.latency.value_at_percentile(50.0)),
            flush_p99: us(stats.sync.latency.value_at_percentile(99.0)),
        }
    }
}

/// Measures over one transport.
///
/// # Errors
/// If a node fails.
pub(super) fn measure(setup: &Setup, transport: &'static str) -> Result<Table> {
    let plan = Plan {
        log_mib: 256,
        transport,
        policy: "ack = \"async\"\n".to_owned(),
        ..Plan::default()
    };
    let folder = setup.folder.join(format!("latency-{transport}"));
    let mut pair = Pair::make(&folder, &setup.daemon, &plan)?;
    pair.start()?;
    let job = format!(
        "{JOB}runtime={}ms\nramp_time=100ms\n",
        setup.milliseconds(400, 700)
    );
    let mut found: Vec<(Mode, Times)> = Vec::new();
    for round in 0..setup.rounds {
        let mut modes = MODES;
        modes.rotate_left(round as usize % MODES.len());
        for mode in modes {
            prepare(&mut pair, mode)?;
            let stats = pair.job(&job).with_context(|| mode.label())?;
            found.push((mode, Times::of(&stats)));
        }
    }
    Ok(show(transport, &found, round_trip_us()?))
}

/// Brings the nodes into the state of a mode. A primary that is started anew asks its peers before
/// it serves, so the replica ends last.
fn prepare(pair: &mut Pair, mode: Mode) -> Result<()> {
    if !pair.beta.is_running() {
        pair.beta.start()?;
    }
    if set_ack(&pair.alpha, mode.ack())? {
        pair.alpha.stop(LIMIT)?;
        pair.alpha.start()?;
    }
    pair.alpha.wait_for_peer(LIMIT)?;
    pair.settle()?;
    if mode == Mode::Local {
        pair.beta.stop(LIMIT)?;
    }
    Ok(())
}

/// Whether it had to be changed.
fn set_ack(node: &Node, ack: &str) -> Result<bool> {
    let config = node.config();
    let text = std::fs::read_to_string(&config)?;
    let line = format!("ack = \"{ack}\"");
    let changed: Vec<&str> = text
        .lines()
        .map(|old| {
            if old.starts_with("ack = ") {
                &line
            } else {
                old
            }
        })
        .collect();
    let changed = changed.join("\n") + "\n";
    if changed == text {
        return Ok(false);
    }
    std::fs::write(&config, changed)?;
    Ok(true)
}

/// Microseconds of a byte there and back over TCP on loopback.
fn round_trip_us() -> Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let echo = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut socket, _) = listener.accept()?;
        socket.set_nodelay(true)?;
        let mut byte = [0];
        while socket.read(&mut byte)? == 1 {
            socket.write_all(&byte)?;
        }
        Ok(())
    });
    let mut socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    let mut times = Vec::new();
    for _ in 0..ROUND_TRIPS {
        let begun = Instant::now();
        socket.write_all(&[1])?;
        socket.read_exact(&mut [0])?;
        times.push(begun.elapsed());
    }
    drop(socket);
    // Its end is the end of the connection; what failed there failed here first.
    let _ = echo.join();
    times.sort_unstable();
    let middle = times.get(times.len() / 2).copied();
    Ok(micros(middle.unwrap_or_default()))
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn show(transport: &str, found: &[(Mode, Times)], round_trip: f64) -> Table {
    let median = |mode, what: fn(&Times) -> f64| {
        let of = found.iter().filter(|(it, _)| *it == mode);
        middle(of.map(|(_, times)| what(times))).map(|spread| spread.median)
    };
    let both = |mode| median(mode, |times| times.write + times.flush);
    let mut table = Table::new(
        &format!("4k write + flush QD1, by who must have it, {transport}"),
        &[
            "  ack",
            "write p50 us",
            "flush p50 us",
            "flush p99 us",
            "both us",
            "added us",
        ],
    );
    for mode in MODES {
        let cell = |value: Option<f64>| value.map_or("-".to_owned(), |us| format!("{us:.0}"));
        let added = both(mode)
            .zip(both(Mode::Local))
            .map(|(it, local)| it - local);
        table.row(vec![
            format!("  {}", mode.label()),
            cell(median(mode, |times| times.write)),
            cell(median(mode, |times| times.flush)),
            cell(median(mode, |times| times.flush_p99)),
            cell(both(mode)),
            cell(added.filter(|_| mode != Mode::Local)),
        ]);
    }
    if let Some((local, durable)) = both(Mode::Local).zip(both(Mode::Durable)) {
        let allowed = (2.0 * local + round_trip) * ALLOWANCE;
        let text = format!(
            "durable takes {durable:.0} us of {allowed:.0} allowed: local {local:.0} + round trip \
             {round_trip:.0} + one flush of the peer {local:.0}, and a tenth"
        );
        table.say(&verdict(durable <= allowed, &text));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(flush: f64) -> Times {
        Times {
            write: 10.0,
            flush,
            flush_p99: flush * 3.0,
        }
    }

    #[test]
    fn a_durable_flush_is_judged_by_two_local_ones_and_a_round_trip() {
        let found = [
            (Mode::Local, times(190.0)),
            (Mode::Async, times(210.0)),
            (Mode::Durable, times(430.0)),
        ];
        // 2 x 200 + 20, and a tenth: 462.
        let text = show("quic", &found, 20.0).to_string();
        assert!(text.contains("met: durable takes 440 us of 462"), "{text}");
        let received = text.lines().find(|line| line.contains("received"));
        assert!(received.is_some_and(|line| line.contains('-')), "{text}");
        assert!(show("quic", &found, 0.0).to_string().contains("met: "));
        let slow = [found[0], (Mode::Durable, times(460.0))];
        let text = show("quic", &slow, 20.0).to_string();
        assert!(text.contains("MISSED: durable takes 470"), "{text}");
    }

    #[test]
    fn a_round_trip_takes_time() {
        assert!(round_trip_us().expect("loopback") > 0.0);
    }

    #[test]
    fn only_the_line_of_the_policy_is_changed() {
        let folder = tempfile::tempdir().expect("a folder");
        let node = Node::existing("alpha", folder.path(), std::path::Path::new("/none"));
        std::fs::write(node.config(), "ack = \"async\"\nack_peers = 1\n").expect("written");
        assert!(!set_ack(&node, "async").expect("read"));
        assert!(set_ack(&node, "durable").expect("changed"));
        let text = std::fs::read_to_string(node.config()).expect("there");
        assert_eq!(text, "ack = \"durable\"\nack_peers = 1\n");
    }
}
