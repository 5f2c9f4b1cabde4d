//! What a first copy costs on the wire: of a volume half of which is holes, and of one that is
//! empty.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use hn4_replicad::quickstart::rig::Plan;

use super::link::Link;
use super::pair::{LIMIT, Pair, first_byte, is_usable};
use super::{MIB, Setup, Table, verdict};
use crate::pattern::Random;
use crate::slow::{SlowFile, missing_tool};

/// Data and holes take turns in pieces of this size.
const STRETCH: u64 = 4 * MIB;
/// What DESIGN 10 asks of two equal sparse volumes of 1 TiB.
const EQUAL_BYTES_MOST: u64 = MIB;
const EQUAL_TIME_MOST: Duration = Duration::from_secs(1);
const EQUAL_MIB: u64 = 1 << 20;
/// Of each request to a slow backing.
const DELAY_MS: u64 = 2;

/// A first copy.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Found {
    size_mib: u64,
    data_bytes: u64,
    wire_bytes: u64,
    /// From the first byte on the line until the copy can be used.
    took: Duration,
}

/// A pair whose replica is to get a first copy of a volume half of which is data, over a line.
/// Gives the bytes of data.
///
/// # Errors
/// If there is no room.
pub(super) fn half_full(setup: &Setup, plan: &Plan) -> Result<(Pair, Link, u64)> {
    let pair = Pair::make(&setup.folder.join("line"), &setup.daemon, plan)?;
    let data = fill_half(&pair.alpha.backing(), plan.size_mib * MIB)?;
    let link = Link::from(&pair.alpha)?;
    Ok((pair, link, data))
}

/// Fills every second stretch of a sparse file.
fn fill_half(backing: &Path, bytes: u64) -> Result<u64> {
    let file = File::options().write(true).open(backing)?;
    let mut random = Random::new(bytes);
    let mut noise = vec![0; 1 << 20];
    let mut filled = 0;
    for at in (0..bytes).step_by(1 << 20) {
        if (at / STRETCH).is_multiple_of(2) {
            random.fill(&mut noise);
            file.write_all_at(&noise, at)?;
            filled += noise.len() as u64;
        }
    }
    file.sync_all()?;
    Ok(filled)
}

/// Has a replica copy where both backings take [`DELAY_MS`] longer for each request, as disks do
/// that are far away. There it counts how many requests are under way.
///
/// # Errors
/// If a node fails.
pub(super) fn on_slow_disks(setup: &Setup) -> Result<Table> {
    let title = format!("first copy, each request to the backings takes {DELAY_MS} ms");
    let head = ["  data MiB", "s", "MiB/s"];
    let mut table = Table::new(&title, &head);
    if let Some(tool) = missing_tool() {
        table.say(&format!("skipped, no {tool} here"));
        return Ok(table);
    }
    let size_mib = setup.milliseconds(128, 512);
    let plan = Plan {
        size_mib,
        sector_bytes: 4096,
        transport: "wss",
        policy: "ack = \"async\"\nassume_strict_flush = true\n".to_owned(),
        ..Plan::default()
    };
    let mut pair = Pair::make(&setup.folder.join("slow"), &setup.daemon, &plan)?;
    let data = fill_half(&pair.alpha.backing(), size_mib * MIB)?;
    let link = Link::from(&pair.alpha)?;
    let backings = [pair.alpha.backing(), pair.beta.backing()];
    let [alpha, beta] = backings.map(|backing| slowed(backing, size_mib * MIB));
    let slow = (alpha?, beta?);
    let found = copied(&mut pair, &link, size_mib, data)?;
    let rate = found.data_bytes as f64 / MIB as f64 / found.took.as_secs_f64().max(1e-9);
    table.row(vec![
        format!("  {}", found.data_bytes / MIB),
        format!("{:.2}", found.took.as_secs_f64()),
        format!("{rate:.0}"),
    ]);
    // The daemons end first.
    drop((pair, slow));
    Ok(table)
}

fn slowed(backing: PathBuf, bytes: u64) -> Result<SlowFile> {
    let data = backing.with_extension("data");
    std::fs::rename(&backing, &data)?;
    let file = data.display().to_string();
    let [reads, writes] = ["rdelay", "wdelay"].map(|delay| format!("{delay}={DELAY_MS}ms"));
    SlowFile::new(backing, bytes, &["file", &file, &reads, &writes])
}

fn copied(pair: &mut Pair, link: &Link, size_mib: u64, data_bytes: u64) -> Result<Found> {
    pair.alpha.start()?;
    pair.beta.spawn()?;
    let begun = first_byte(link)?;
    pair.beta.wait_for("have a full copy", LIMIT, is_usable)?;
    let took = begun.elapsed();
    Ok(Found {
        size_mib,
        data_bytes,
        wire_bytes: link.passed(),
        took,
    })
}

/// Has the replica of [`half_full`] copy, then that of an empty volume of 1 TiB.
///
/// # Errors
/// If a node fails.
pub(super) fn measure(
    setup: &Setup,
    (pair, link, data): (&mut Pair, &Link, u64),
    size_mib: u64,
) -> Result<Table> {
    let half = copied(pair, link, size_mib, data)?;
    let plan = Plan {
        size_mib: EQUAL_MIB,
        transport: "wss",
        ..Plan::default()
    };
    let mut empty = Pair::make(&setup.folder.join("equal"), &setup.daemon, &plan)?;
    let line = Link::from(&empty.alpha)?;
    let equal = copied(&mut empty, &line, EQUAL_MIB, 0)?;
    Ok(show(half, equal))
}

fn show(half: Found, equal: Found) -> Table {
    let mut table = Table::new(
        "first copy, WebSocket without a limit",
        &["  volume", "data MiB", "on the wire bytes", "s", "MiB/s"],
    );
    for found in [half, equal] {
        let (data, seconds) = (found.data_bytes / MIB, found.took.as_secs_f64());
        let rate = data as f64 / seconds.max(1e-9);
        table.row(vec![
            format!("  {} MiB", found.size_mib),
            data.to_string(),
            found.wire_bytes.to_string(),
            format!("{seconds:.2}"),
            if data > 0 {
                format!("{rate:.0}")
            } else {
                "-".to_owned()
            },
        ]);
    }
    let over = half.wire_bytes as f64 / half.data_bytes.max(1) as f64;
    table.say(&format!(
        "the wire had {over:.4} bytes for each byte of data"
    ));
    let text = format!(
        "two empty volumes of 1 TiB: {} bytes and {:.2} s, asked less than {EQUAL_BYTES_MOST} \
         and 1",
        equal.wire_bytes,
        equal.took.as_secs_f64()
    );
    let met = equal.wire_bytes < EQUAL_BYTES_MOST && equal.took < EQUAL_TIME_MOST;
    table.say(&verdict(met, &text));
    table.say(
        "not measured: equal volumes with data in them: a first copy sends all data, unless the \
         replica is created with --seeded",
    );
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn equal(wire_bytes: u64, ms: u64) -> Found {
        Found {
            size_mib: EQUAL_MIB,
            data_bytes: 0,
            wire_bytes,
            took: Duration::from_millis(ms),
        }
    }

    #[test]
    fn equal_volumes_are_judged_by_bytes_and_by_time() {
        let half = Found {
            size_mib: 8,
            data_bytes: 4 * MIB,
            wire_bytes: 5 * MIB,
            took: Duration::from_secs(2),
        };
        let text = |equal| show(half, equal).to_string();
        assert!(text(equal(1000, 900)).contains("verdict: met: two empty"));
        assert!(text(equal(MIB, 900)).contains("verdict: MISSED"));
        assert!(text(equal(1000, 1100)).contains("verdict: MISSED"));
        assert!(text(equal(1000, 1)).contains("1.2500 bytes for each"));
    }

    #[test]
    fn half_of_a_file_is_data() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(16 * MIB).expect("a size");
        let filled = fill_half(file.path(), 16 * MIB).expect("written");
        assert_eq!(filled, 8 * MIB);
        let bytes = std::fs::read(file.path()).expect("read");
        let stretch = usize::try_from(STRETCH).expect("small");
        let hole = bytes.chunks(stretch).nth(1).expect("a second stretch");
        assert!(hole.iter().all(|&byte| byte == 0));
    }
}
