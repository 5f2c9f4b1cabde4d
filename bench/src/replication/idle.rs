//! What two daemons cost that have nothing to do.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hn4_replicad::quickstart::rig::Node;

use super::pair::Pair;
use super::{Setup, Table, verdict};

/// What DESIGN 10 allows, in percent of a core.
const PERCENT_MOST: f64 = 0.1;

/// CPU time that the threads of a daemon have used, to the nanosecond.
fn cpu_time(node: &Node) -> Result<Duration> {
    let pid = node.pid().context("the daemon does not run")?;
    let mut all = Duration::ZERO;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // Time on a CPU, time waiting for one, slices. A thread may end in this moment.
        let text = std::fs::read_to_string(task?.path().join("schedstat"));
        let first = text
            .ok()
            .and_then(|text| text.split(' ').next()?.parse().ok());
        all += Duration::from_nanos(first.unwrap_or(0));
    }
    // It has started, so that nothing at all is no figure.
    ensure!(
        !all.is_zero(),
        "the kernel does not tell what the daemon used"
    );
    Ok(all)
}

/// Measures a pair that has been level for a moment.
///
/// # Errors
/// If a daemon ended.
pub(super) fn measure(setup: &Setup, pair: &mut Pair) -> Result<Table> {
    pair.settle()?;
    pair.alpha.drain()?;
    pair.beta.drain()?;
    let time = Duration::from_millis(setup.milliseconds(2000, 10_000));
    // What was begun before goes on for a moment.
    std::thread::sleep(Duration::from_millis(500));
    let nodes = [&pair.alpha, &pair.beta];
    let begun = Instant::now();
    let before = [cpu_time(nodes[0])?, cpu_time(nodes[1])?];
    std::thread::sleep(time);
    let after = [cpu_time(nodes[0])?, cpu_time(nodes[1])?];
    let seconds = begun.elapsed().as_secs_f64();
    let share = |at: usize| {
        let used = after[at].saturating_sub(before[at]).as_secs_f64();
        used / seconds * 100.0
    };
    Ok(show(seconds, [share(0), share(1)]))
}

fn show(seconds: f64, percent: [f64; 2]) -> Table {
    let mut table = Table::new("idle, one volume, one peer", &["  node", "", "% of a core"]);
    for (name, percent) in ["  primary", "  replica"].into_iter().zip(percent) {
        let cell = format!("{percent:.3}");
        table.row(vec![name.to_owned(), String::new(), cell]);
    }
    let most = percent[0].max(percent[1]);
    let text = format!("{most:.3} % in {seconds:.0} s, asked less than {PERCENT_MOST}");
    table.say(&verdict(most < PERCENT_MOST, &text));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busier_node_is_judged() {
        let text = |percent| show(2.0, percent).to_string();
        assert!(text([0.01, 0.02]).contains("met: 0.020 %"));
        assert!(text([0.2, 0.02]).contains("MISSED: 0.200 %"));
        assert!(text([0.02, 0.1]).contains("MISSED: 0.100 %"));
    }
}
