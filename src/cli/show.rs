//! Status as people read it. Pure: from reports to text.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets};

use crate::config::Config;
use crate::config::attach::AttachRecord;
use crate::control::api::{
    BehindReport, CompressionReport, CopyReport, Finding, Health, NodeStatus, PeerProgress,
    PeerReport, Policy, ProofReport, ReadsReport, Stage, TreeReport, VolumeReport, VolumeState,
};

/// Bytes with a unit that keeps the number short.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    // In tenths, so that no rounding turns 1023.99 KiB into 1024.0.
    let mut tenths = u128::from(count) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10 * 1024 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// A time in seconds with one decimal, or in larger units.
#[must_use]
pub fn time(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..=119 => format!("{s}.{} s", ms % 1000 / 100),
        120..=7199 => format!("{} min {} s", s / 60, s % 60),
        7200..=172_799 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Ok => "ok",
        Health::Attention => "ATTENTION",
        Health::Failed => "FAILED",
    }
}

/// The whole status.
#[must_use]
pub fn node(status: &NodeStatus) -> String {
    let mut text = format!(
        "node {} ({}), hn4-replicad {}, up {}\n",
        status.node,
        status.node_id,
        status.version,
        time(status.uptime_ms)
    );
    if status.volumes.is_empty() {
        text.push_str("\nno volumes; add a [[volume]] to the configuration\n");
    }
    for report in &status.volumes {
        text.push('\n');
        volume(&mut text, report);
    }
    text
}

fn line(text: &mut String, label: &str, what: impl std::fmt::Display) {
    // Writing to a string does not fail; so it is below.
    let _ = writeln!(text, "  {label:<9}{what}");
}

fn volume(text: &mut String, report: &VolumeReport) {
    let role = report
        .state
        .as_ref()
        .map_or("not open", |state| state.role.as_str());
    let _ = writeln!(
        text,
        "volume {}: {role}, {}",
        report.name,
        health(report.health)
    );
    for finding in &report.findings {
        show_finding(text, finding);
    }
    if let Some(state) = &report.state {
        show_state(text, state);
    }
    line(text, "ack", ack(&report.policy));
    if !report.listen.is_empty() {
        line(text, "listen", report.listen.join(" "));
    }
    match &report.state {
        Some(state) => {
            line(text, "log", &state.log_device);
            line(text, "backing", &state.backing_device);
        }
        None => {
            line(text, "log", &report.log);
            line(text, "backing", &report.backing);
        }
    }
    if !report.peers.is_empty() {
        peers(text, &report.peers);
    }
}

fn show_finding(text: &mut String, finding: &Finding) {
    let mark = if finding.health == Health::Ok {
        "note"
    } else {
        health(finding.health)
    };
    let _ = writeln!(text, "  {mark} {}: {}", finding.state, finding.cause);
    let _ = writeln!(text, "    next: {}", finding.next);
}

fn show_state(text: &mut String, state: &VolumeState) {
    let sectors = state.sector_bytes;
    let size = bytes(state.size_bytes);
    let id = &state.volume_id;
    line(
        text,
        "volume",
        format!("{size}, sectors of {sectors} B, id {id}"),
    );
    let copy = match &state.copy {
        CopyReport::Usable => "usable".to_owned(),
        CopyReport::Fresh => "fresh, not usable".to_owned(),
        CopyReport::Seeding { received_bytes, .. } => {
            format!("seeding {} of {size}, not usable", bytes(*received_bytes))
        }
        CopyReport::Shadowing { compared_bytes, .. } => {
            format!(
                "usable but old, {} of {size} compared",
                bytes(*compared_bytes)
            )
        }
        CopyReport::Applying { shadow_bytes } => {
            format!("being written over with {} of shadow", bytes(*shadow_bytes))
        }
    };
    let (term, incarnation) = (state.term, state.incarnation);
    line(
        text,
        "copy",
        format!("{copy}; term {term}, incarnation {incarnation}"),
    );
    line(
        text,
        "epochs",
        format!(
            "tip {} ({}), durable {}, proven {}, applied {}",
            state.tip_epoch,
            state.tip_chain,
            state.durable_epoch,
            state.proven_epoch,
            state.applied_epoch
        ),
    );
    if let Some(waits_for) = state.behind.as_ref().and_then(behind) {
        line(text, "behind", waits_for);
    }
    if let Some(proof) = &state.proof {
        line(text, "ledger", ledger(proof));
    }
    if let Some(tree) = &state.tree {
        line(text, "tree", self::tree(tree, state.size_bytes));
        line(text, "verified", verified(tree, state.size_bytes));
        if let Some(reads) = &tree.reads {
            line(text, "reads", compared(reads));
        }
    }
    line(
        text,
        "overlay",
        format!(
            "{} of {} in use; log {} of {}",
            bytes(state.dirty_bytes),
            bytes(state.overlay_bytes),
            bytes(state.log_used_bytes),
            bytes(state.log_bytes)
        ),
    );
    line(
        text,
        "clients",
        format!(
            "{}; since the start {} requests, {} written, {} read; {} wait",
            state.clients,
            state.requests,
            bytes(state.written_bytes),
            bytes(state.read_bytes),
            state.waiting_requests
        ),
    );
}

/// How far a replica is behind and what it waits for; nothing if it has everything.
fn behind(behind: &BehindReport) -> Option<String> {
    let waits_for = behind.waits_for.as_ref()?;
    let known = match (behind.unapplied_bytes, behind.unapplied_ms) {
        (Some(count), Some(ms)) => format!(
            "{} and {} here are not written back",
            bytes(count),
            time(ms)
        ),
        _ => "of how much of it is here the log does not tell".to_owned(),
    };
    Some(format!(
        "{} epochs, {} of them have not arrived; {known}. Waits for {waits_for}",
        behind.unapplied_epochs, behind.missing_epochs
    ))
}

fn tree(tree: &TreeReport, size_bytes: u64) -> String {
    let epoch = tree.epoch.unwrap_or_default();
    match (&tree.failed, &tree.root, tree.built_bytes) {
        (Some(why), ..) => format!("none: {why}"),
        (None, Some(root), _) => {
            let start = root.get(..16).unwrap_or(root);
            format!("root {start} at epoch {epoch}; {} leaves", tree.leaves)
        }
        (None, None, Some(built)) => {
            format!("being built: {} of {}", bytes(built), bytes(size_bytes))
        }
        (None, None, None) if tree.leaves > 0 => {
            format!("built, of no epoch yet; {} leaves", tree.leaves)
        }
        (None, None, None) => "none yet".to_owned(),
    }
}

fn verified(tree: &TreeReport, size_bytes: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now_ms = now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    let last = match tree.verified_at_ms {
        Some(at) => format!("{} ago", time(now_ms.saturating_sub(at))),
        None => "never".to_owned(),
    };
    let running = tree.verified_bytes.map_or_else(String::new, |done| {
        format!("; under way: {} of {}", bytes(done), bytes(size_bytes))
    });
    format!("{last}, {} bad blocks{running}", tree.bad_blocks)
}

fn compared(reads: &ReadsReport) -> String {
    let ReadsReport {
        policy,
        checked_blocks,
        unchecked_blocks,
        bad_blocks,
        repeated_blocks,
    } = reads;
    format!(
        "{policy}: {checked_blocks} blocks checked, {unchecked_blocks} unchecked, \
         {bad_blocks} bad, {repeated_blocks} looked at again"
    )
}

fn ledger(proof: &ProofReport) -> String {
    let anchored = match proof.anchored_epoch {
        Some(epoch) => format!("anchored through epoch {epoch}"),
        None => "nothing anchored yet".to_owned(),
    };
    format!(
        "{} records, {anchored}; {} of log not proven",
        proof.ledger_records,
        bytes(proof.lag_bytes)
    )
}

fn ack(policy: &Policy) -> String {
    let here = match policy.write_ack.as_str() {
        "durable" => "durable",
        _ => "in the overlay",
    };
    let peers = match policy.ack_peers {
        0 => return format!("a write when {here}, a flush when durable; peers: async"),
        1 => "1 peer".to_owned(),
        peers => format!("{peers} peers"),
    };
    let flushed = match policy.ack.as_str() {
        "durable" => "durable on",
        _ => "received by",
    };
    format!(
        "a write when {here} and received by {peers}, a flush when durable and {flushed} {peers}; \
         with fewer: {}",
        policy.on_degraded
    )
}

fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table
}

/// The table's lines, indented, without the spaces at their ends.
fn table_text(text: &mut String, table: &Table, indent: &str) {
    for line in table.lines() {
        let _ = writeln!(text, "{indent}{}", line.trim_end());
    }
}

fn peers(text: &mut String, peers: &[PeerReport]) {
    let mut table = plain_table();
    table.set_header([
        "peer", "session", "sent", "received", "durable", "proven", "applied",
    ]);
    for peer in peers {
        let session = match (peer.connected, peer.live, peer.seeding_bytes) {
            (false, ..) => "none".to_owned(),
            (_, _, Some(done)) => match peer.kept_bytes {
                Some(kept) => format!("resync, {} done, {} kept", bytes(done), bytes(kept)),
                None => format!("seeding, {} done", bytes(done)),
            },
            (_, true, _) => "live".to_owned(),
            _ => "open".to_owned(),
        };
        let control = peer.lag_control.as_ref().map(|lag| lag.state.as_str());
        let session = match control {
            None | Some("within") => session,
            Some(state) => format!("{session}, {state}"),
        };
        let mut row = vec![peer.name.clone(), session];
        match &peer.progress {
            Some(progress) => {
                row.extend(stages(progress).map(|(_, stage)| stage.epoch.to_string()));
            }
            None => row.extend(std::iter::repeat_n("-".to_owned(), 5)),
        }
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(2).take(5) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table_text(text, &table, " ");
    for peer in peers {
        let address = peer.address.as_deref().unwrap_or("address not configured");
        let _ = writeln!(
            text,
            "  {}: {} {address}, {}",
            peer.name, peer.transport, peer.link
        );
        if let Some(compared) = &peer.compared {
            let verdict = if compared.equal { "equal" } else { "DIFFERENT" };
            let (epoch, age) = (compared.epoch, time(compared.age_ms));
            let _ = writeln!(text, "    contents: {verdict} at epoch {epoch}, {age} ago");
        }
        if let Some(compression) = &peer.compression {
            let _ = writeln!(text, "    scxq2: {}", packing(compression));
        }
        let progress = peer.progress.iter().flat_map(stages);
        for (name, stage) in progress.filter(|(_, stage)| stage.lag_epochs > 0) {
            let _ = writeln!(text, "    {name:<8} is behind by {}", lag(stage));
        }
    }
}

/// What compression does for a peer.
fn packing(report: &CompressionReport) -> String {
    let ratio = report.ratio_percent;
    let dictionary = report.dictionary_id.as_ref();
    let dictionary = dictionary.or(report.peer_dictionary_id.as_ref());
    let dictionary = match dictionary.and_then(|id| id.get(..19)) {
        Some(start) => format!("dictionary {start}..."),
        None => "no dictionary yet".to_owned(),
    };
    format!(
        "{} saved in this session, ratio {}.{:02}, {dictionary}",
        bytes(report.saved_bytes()),
        ratio / 100,
        ratio % 100
    )
}

/// The stages on the way to a peer, with their names.
fn stages(progress: &PeerProgress) -> impl Iterator<Item = (&'static str, &Stage)> {
    [
        ("sent", &progress.sent),
        ("received", &progress.received),
        ("durable", &progress.durable),
        ("proven", &progress.proven),
        ("applied", &progress.applied),
    ]
    .into_iter()
}

/// How far a stage is behind.
fn lag(stage: &Stage) -> String {
    let epochs = stage.lag_epochs;
    match (stage.lag_bytes, stage.lag_ms) {
        (Some(count), Some(ms)) => format!("{epochs} epochs, {}, {}", bytes(count), time(ms)),
        _ => format!("{epochs} epochs, more than the log still holds"),
    }
}

/// The configured volumes, with what the node remembers of each, and what else it remembers.
#[must_use]
pub fn volume_list(config: &Config, records: &[AttachRecord]) -> String {
    let mut table = plain_table();
    table.set_header(["volume", "id", "log may hold more", "log", "backing"]);
    let mut configured = Vec::new();
    for section in &config.volumes {
        let record = records
            .iter()
            .find(|record| record.name == section.name && record.backing == section.backing);
        let (id, undestaged) = match record {
            Some(record) => (
                record.volume.to_string(),
                if record.undestaged { "yes" } else { "no" },
            ),
            None => ("not created on this node".to_owned(), "-"),
        };
        configured.extend(record.map(|record| record.volume));
        table.add_row([
            section.name.clone(),
            id,
            undestaged.to_owned(),
            section.log.display().to_string(),
            section.backing.display().to_string(),
        ]);
    }
    for record in records {
        if configured.contains(&record.volume) {
            continue;
        }
        table.add_row([
            format!("({}: not configured)", record.name),
            record.volume.to_string(),
            if record.undestaged { "yes" } else { "no" }.to_owned(),
            record.log.display().to_string(),
            record.backing.display().to_string(),
        ]);
    }
    let mut text = String::new();
    table_text(&mut text, &table, "");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_times_are_short_and_never_rounded_up() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes((1 << 20) - 1), "1023.9 KiB");
        assert_eq!(bytes(u64::MAX), "16383.9 PiB");
        assert_eq!(time(1_940), "1.9 s");
        assert_eq!(time(119_999), "119.9 s");
        assert_eq!(time(3_600_000), "60 min 0 s");
        assert_eq!(time(200_000_000), "2 d 7 h");
    }
}
