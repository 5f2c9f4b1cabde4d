//! What the quickstart prints.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::NOTHING;

use super::Figures;
use super::oracle::Counts;
use super::rig::{Node, VOLUME};

const BAR_WIDTH: u64 = 40;

pub(super) fn step(text: &str) {
    println!("== {text}");
}

pub(super) fn fact(text: &str) {
    println!("   {text}");
}

pub(super) fn time(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}

/// A bar that fills; where there is no terminal only its end is printed.
pub(super) struct Bar {
    label: &'static str,
    total: u64,
    shown: u64,
    started: std::time::Instant,
}

impl Bar {
    pub(super) fn new(label: &'static str, total: u64) -> Self {
        Self {
            label,
            total,
            shown: u64::MAX,
            started: std::time::Instant::now(),
        }
    }

    pub(super) fn at(&mut self, done: u64) {
        let filled = done * BAR_WIDTH / self.total.max(1);
        if filled == self.shown || !std::io::stdout().is_terminal() {
            return;
        }
        self.shown = filled;
        let full = "#".repeat(usize::try_from(filled).unwrap_or_default());
        let rest = "-".repeat(usize::try_from(BAR_WIDTH - filled).unwrap_or_default());
        print!("\r{} [{full}{rest}] {} MiB", self.label, done >> 20);
        // A bar that is not drawn harms nobody.
        let _ = std::io::stdout().flush();
    }

    pub(super) fn end(&self) {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-6);
        let mib = self.total >> 20;
        if std::io::stdout().is_terminal() {
            print!("\r\x1b[K");
        }
        println!("{}: {mib} MiB in {seconds:.1} s", self.label);
    }
}

pub(super) fn table(figures: &Figures, counts: &Counts, total: Duration) {
    let mut table = Table::new();
    table.load_preset(NOTHING);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("image", figures.image.clone());
    row("image written in", time(figures.upload));
    row("random writes issued", counts.issued.to_string());
    let mib = counts.completed_bytes >> 20;
    row("  acknowledged", format!("{}, {mib} MiB", counts.completed));
    row(
        "  made durable by a flush",
        format!("{} ({} flushes)", counts.flushed, counts.flushes),
    );
    row("  flushed and lost", "0".to_owned());
    row(
        "  acknowledged and lost",
        figures.missing_answered.to_string(),
    );
    row(
        "  never acknowledged and gone",
        figures.missing_unanswered.to_string(),
    );
    let replayed = figures.replayed_epochs;
    let recovery = time(figures.recovery);
    row(
        "recovery of the primary",
        format!("{recovery}, {replayed} epochs replayed"),
    );
    row("recovery of the replica", time(figures.replica_recovery));
    row("replica follows again", time(figures.catch_up));
    row("promotion of the replica", time(figures.promotion));
    row("both backings, BLAKE3", figures.hash.clone());
    row("in all", format!("{:.1} s", total.as_secs_f64()));
    println!("\n{table}\n");
}

pub(super) fn how_to_go_on(program: &Path, alpha: &Node, beta: &Node) {
    let program = program.display();
    println!("Everything was kept. To go on:\n");
    for node in [alpha, beta] {
        println!("  {program} run --config {} &", node.config().display());
    }
    println!("  hn4ctl --config {} status", beta.config().display());
    println!("  nbdinfo '{}'", beta.uri());
    println!("\nbeta is the primary of {VOLUME} now; alpha will find itself fenced.");
}
