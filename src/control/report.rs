//! Turns what a shard says about itself into the report that operators and tools read. Pure.

use std::fmt::Write;

use hn4::log::{CopyState, Role};
use hn4::types::Epoch;
use hn4_engine::core::event::Lag;
use hn4_engine::core::{AckMode, LagState, Obstacle, OnDegraded, OnExceed};
use hn4_engine::shard::{PeerStatus, ShardStatus};
use hn4_transport::driver::LinkStatus;
use hn4_transport::session::CompressionStatus;

use super::api::{
    BehindReport, CompressionReport, CopyReport, Health, LagControl, PeerProgress, PeerReport,
    Policy, RecoveryFacts, Stage, VolumeReport, VolumeState,
};
use super::findings::{Seen, findings};
use crate::config::{PeerSection, VolumeSection, WriteAck, listen_text};

/// The report of a volume.
///
/// `status` is what its shard says, or why there is no shard. `links` are the connections to its
/// peers, in the order of the configuration; missing ones count as not started.
#[must_use]
pub fn report(
    status: Result<&ShardStatus, &str>,
    section: &VolumeSection,
    links: &[LinkStatus],
) -> VolumeReport {
    let findings = findings(&Seen {
        status,
        section,
        links,
    });
    let worst = findings.iter().map(|finding| finding.health).max();
    let peers = section.peers.iter().enumerate();
    let peers = peers.map(|(index, peer)| peer_report(peer, status.ok(), index, links.get(index)));
    VolumeReport {
        name: section.name.clone(),
        health: worst.unwrap_or(Health::Ok),
        backing: section.backing.display().to_string(),
        log: section.log.display().to_string(),
        listen: section.listen.iter().map(listen_text).collect(),
        policy: policy(section),
        state: status.ok().map(state),
        peers: peers.collect(),
        findings,
    }
}

fn policy(section: &VolumeSection) -> Policy {
    let write_ack = match section.write_ack {
        WriteAck::Overlay => "overlay",
        WriteAck::Durable => "durable",
    };
    let on_degraded = match section.on_degraded {
        OnDegraded::Block => "block",
        OnDegraded::Degrade => "degrade",
    };
    Policy {
        write_ack: write_ack.to_owned(),
        ack: ack_text(section.ack).to_owned(),
        ack_peers: section.required_peers() as u64,
        on_degraded: on_degraded.to_owned(),
    }
}

/// As it stands in the configuration.
pub(super) fn ack_text(ack: AckMode) -> &'static str {
    match ack {
        AckMode::Async => "async",
        AckMode::Received => "received",
        AckMode::Durable => "durable",
    }
}

/// A role as it is shown.
#[must_use]
pub fn role_text(role: Role) -> &'static str {
    match role {
        Role::Primary => "primary",
        Role::Replica => "replica",
        Role::Fenced => "fenced",
    }
}

/// Bytes as hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn state(status: &ShardStatus) -> VolumeState {
    let copy = &status.copy;
    let recovery = &status.recovery;
    VolumeState {
        volume_id: status.identity.volume.to_string(),
        birth_nonce: hex(&status.identity.birth_nonce),
        size_bytes: status.identity.size_bytes,
        sector_bytes: status.identity.sector_bytes,
        role: role_text(copy.role).to_owned(),
        term: copy.term.counter,
        term_node: copy.term.node.to_string(),
        incarnation: copy.incarnation.0,
        copy: copy_report(status),
        tip_epoch: copy.tip.epoch.0,
        tip_chain: copy.tip.chain.to_string(),
        durable_epoch: copy.progress.durable.0,
        proven_epoch: copy.progress.proven.0,
        proof: None,
        tree: None,
        behind: behind(status),
        applied_epoch: copy.progress.applied.0,
        waiting_requests: status.waiting as u64,
        degraded: status.degraded,
        dirty_bytes: status.dirty_bytes,
        overlay_bytes: status.overlay_bytes,
        log_used_bytes: status.log_used_bytes,
        log_bytes: status.log_bytes,
        clients: status.clients as u64,
        requests: status.requests,
        written_bytes: status.written_bytes,
        read_bytes: status.read_bytes,
        recovery: RecoveryFacts {
            checkpoint_epoch: recovery.checkpoint.0,
            tip_epoch: recovery.tip.0,
            replayed_epochs: recovery.replayed,
            replayed_bytes: recovery.replayed_bytes,
            torn_tail: recovery.torn_tail,
        },
        log_device: status.log_device.clone(),
        backing_device: status.backing_device.clone(),
        assumed_strict_flush: status.assumed_strict_flush,
    }
}

fn behind(status: &ShardStatus) -> Option<BehindReport> {
    let behind = status.behind?;
    let (announced, progress) = (behind.announced, status.copy.progress);
    let missing = announced.0.saturating_sub(status.copy.tip.epoch.0);
    let unapplied = behind
        .unapplied
        .filter(|_| progress.applied < progress.received);
    let bytes = |lag: &Option<Lag>| lag.map(|lag| lag.bytes);
    let nothing = (progress.applied >= progress.received).then_some(0);
    Some(BehindReport {
        announced_epoch: announced.0,
        missing_epochs: missing,
        unapplied_epochs: announced.0.saturating_sub(progress.applied.0),
        unapplied_bytes: bytes(&unapplied).or(nothing),
        unapplied_ms: unapplied.map(|lag| lag.ms).or(nothing),
        waits_for: waits_for(status, behind.follows, missing).map(str::to_owned),
    })
}

/// The first thing that stands between a replica and having everything in its backing.
fn waits_for(status: &ShardStatus, follows: bool, missing: u64) -> Option<&'static str> {
    let progress = status.copy.progress;
    Some(if status.failed.is_some() {
        "the operator: the volume has failed closed"
    } else if matches!(status.obstacle, Some(Obstacle::Rejected { .. })) {
        "the primary, to send again what was refused"
    } else if status.obstacle.is_some() {
        "the operator, see above"
    } else if !follows {
        "a primary: none sends anything"
    } else if status.copy.copy != CopyState::Usable {
        "the rest of the full copy"
    } else if missing > 0 {
        "epochs that the primary has and that have not arrived"
    } else if progress.durable < progress.received {
        "its own log"
    } else if progress.applied >= progress.durable {
        return None;
    } else if status.pinned_epoch.is_some() {
        "its readers to leave"
    } else if progress.proven < progress.durable {
        "the primary's anchors"
    } else {
        "its next sweep"
    })
}

fn copy_report(status: &ShardStatus) -> CopyReport {
    match status.copy.copy {
        CopyState::Fresh => CopyReport::Fresh,
        CopyState::Seeding {
            cursor_bytes,
            until,
            ..
        } => CopyReport::Seeding {
            received_bytes: status.seeding_bytes.unwrap_or(cursor_bytes),
            kept_bytes: status.kept_bytes,
            durable_bytes: cursor_bytes,
            usable_after_epoch: until.map(|epoch| epoch.0),
        },
        CopyState::Usable => CopyReport::Usable,
        CopyState::Shadowing {
            cursor_bytes,
            shadow_bytes,
            ..
        } => CopyReport::Shadowing {
            compared_bytes: status.seeding_bytes.unwrap_or(cursor_bytes),
            kept_bytes: status.kept_bytes,
            durable_bytes: cursor_bytes,
            shadow_bytes,
        },
        CopyState::Applying { shadow_bytes, .. } => CopyReport::Applying { shadow_bytes },
    }
}

fn peer_report(
    peer: &PeerSection,
    status: Option<&ShardStatus>,
    index: usize,
    link: Option<&LinkStatus>,
) -> PeerReport {
    let seen = status.and_then(|status| status.peers.get(index));
    let primary = status.filter(|status| status.copy.role == Role::Primary);
    PeerReport {
        name: peer.name.clone(),
        address: peer.address.clone(),
        transport: peer.transport.to_string(),
        link: link.map_or_else(|| "not started".to_owned(), link_text),
        connected: seen.is_some_and(|seen| seen.connected),
        live: seen.is_some_and(|seen| seen.live),
        seeding_bytes: seen.and_then(|seen| seen.seeding_bytes),
        kept_bytes: seen.and_then(|seen| seen.kept_bytes),
        progress: primary
            .zip(seen)
            .map(|(status, seen)| progress(status, seen)),
        lag_control: lag_control(peer, seen),
        compression: None,
        compared: None,
    }
}

/// What is told about the compression of a peer's data, if there is any.
#[must_use]
pub fn compression_report(status: &CompressionStatus) -> Option<CompressionReport> {
    let (sent, received) = (status.sent, status.received);
    let raw = sent.raw_bytes + received.raw_bytes;
    let wire = sent.wire_bytes + received.wire_bytes;
    status.agreed.then(|| CompressionReport {
        sent_raw_bytes: sent.raw_bytes,
        sent_wire_bytes: sent.wire_bytes,
        received_raw_bytes: received.raw_bytes,
        received_wire_bytes: received.wire_bytes,
        ratio_percent: (raw * 100).checked_div(wire).unwrap_or(100),
        dictionary_id: status.dictionary.map(|id| id.to_string()),
        peer_dictionary_id: status.peer_dictionary.map(|id| id.to_string()),
    })
}

fn lag_control(peer: &PeerSection, seen: Option<&PeerStatus>) -> Option<LagControl> {
    let policy = peer.lag;
    let state = match seen.map(|seen| seen.lag_state).unwrap_or_default() {
        LagState::Within => "within",
        LagState::Throttling => "throttling",
        LagState::Spilling => "spilling",
        LagState::Detached => "detached",
    };
    policy.is_bounded().then(|| LagControl {
        max_lag_bytes: policy.max_bytes,
        max_lag_seconds: policy.max_ms.map(|ms| ms / 1000),
        on_exceed: on_exceed_text(policy.on_exceed).to_owned(),
        state: state.to_owned(),
    })
}

/// As it stands in the configuration.
fn on_exceed_text(on_exceed: OnExceed) -> &'static str {
    match on_exceed {
        OnExceed::Throttle => "throttle",
        OnExceed::Spill => "spill",
        OnExceed::Detach => "detach",
    }
}

/// What a connection is doing, in words.
#[must_use]
pub fn link_text(link: &LinkStatus) -> String {
    match link {
        LinkStatus::Listening => "waiting for it to connect".to_owned(),
        LinkStatus::Connecting => "connecting".to_owned(),
        LinkStatus::Connected { remote } => format!("connected to {remote}"),
        LinkStatus::Failed { why } => format!("failed: {why}"),
    }
}

fn progress(status: &ShardStatus, peer: &PeerStatus) -> PeerProgress {
    let tip = status.copy.tip.epoch;
    let stage = |epoch: Epoch, measured: Option<Lag>| Stage {
        epoch: epoch.0,
        lag_epochs: tip.0.saturating_sub(epoch.0),
        lag_bytes: measured.map(|lag| lag.bytes),
        lag_ms: measured.map(|lag| lag.ms),
    };
    PeerProgress {
        sent: stage(peer.sent, peer.lags.sent),
        received: stage(peer.progress.received, peer.lags.received),
        durable: stage(peer.progress.durable, peer.lags.durable),
        proven: stage(peer.progress.proven, peer.lags.proven),
        applied: stage(peer.progress.applied, peer.lags.applied),
    }
}
