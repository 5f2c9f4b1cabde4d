//! Promise P12: every state that is not the ideal one, with its cause and the next safe command.
//!
//! Pure. What stands in `next` exists and destroys nothing; where nothing is to be done, it
//! says so.

use std::io;

use hn4::log::Role;
use hn4_engine::core::event::Disk;
use hn4_engine::core::{FailedClosed, LagState, Obstacle, OnDegraded};
use hn4_engine::shard::ShardStatus;
use hn4_transport::driver::LinkStatus;

use super::api::{Finding, Health};
use super::copies;
use super::report::ack_text;
use crate::config::{PeerSection, VolumeSection};

/// All that findings are made from.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// What the shard says, or why there is none.
    pub status: Result<&'a ShardStatus, &'a str>,
    /// The volume's configuration.
    pub section: &'a VolumeSection,
    /// The connections to its peers, in the order of the configuration.
    pub links: &'a [LinkStatus],
}

/// Findings of a volume, the worst first.
#[must_use]
pub fn findings(seen: &Seen<'_>) -> Vec<Finding> {
    let status = match seen.status {
        Ok(status) => status,
        Err(why) => return vec![not_open(why)],
    };
    let mut all = Vec::new();
    all.extend(
        status
            .failed
            .as_ref()
            .map(|failed| failed_closed(failed, seen.section)),
    );
    all.extend(fenced(status, seen.section));
    all.extend(copies::copy_state(seen, status));
    all.extend(
        status
            .obstacle
            .as_ref()
            .map(|obstacle| blocked(obstacle, status, seen.section)),
    );
    all.extend(too_few_peers(seen, status));
    all.extend(opening(seen, status));
    all.extend(opened_alone(seen, status));
    all.extend(degraded(seen, status));
    for index in 0..seen.section.peers.len() {
        all.extend(peer(seen, status, index));
        all.extend(lagging(seen, status, index));
    }
    all.extend(lonely_replica(seen, status));
    all.extend(fork_saved(status));
    all.extend(read_here(status));
    all.extend(assumed_flush(status));
    all.extend(nearly_full(seen, status));
    all.extend(torn_tail(status));
    all.sort_by_key(|finding| std::cmp::Reverse(finding.health));
    all
}

pub(super) fn finding(state: &str, health: Health, cause: String, next: String) -> Finding {
    Finding {
        state: state.to_owned(),
        health,
        cause,
        next,
    }
}

fn not_open(why: &str) -> Finding {
    finding(
        "not-open",
        Health::Failed,
        why.to_owned(),
        "remove the cause, then restart hn4-replicad; nothing was changed on the devices"
            .to_owned(),
    )
}

fn failed_closed(failed: &FailedClosed, section: &VolumeSection) -> Finding {
    let (what, path) = match failed.disk {
        Disk::Log => ("log", section.log.display().to_string()),
        Disk::Backing => ("backing", section.backing.display().to_string()),
        Disk::Shadow => ("shadow file", section.shadow_name()),
    };
    let cause = format!(
        "{} failed on the {what} {}: {}. Writes are refused, reads go on",
        failed.doing,
        path,
        io::Error::from_raw_os_error(failed.errno)
    );
    let next = format!(
        "find out from the kernel's log why {} failed and mend it; then restart hn4-replicad, \
         which recovers from the log. If a usable copy is on another node and clients must go on, \
         stop hn4-replicad here first, then `hn4ctl promote {}` there",
        path, section.name
    );
    finding("failed-closed", Health::Failed, cause, next)
}

fn fenced(status: &ShardStatus, section: &VolumeSection) -> Option<Finding> {
    if status.copy.role != Role::Fenced {
        return None;
    }
    let cause = format!(
        "this node was primary until node {} was promoted in term {}. Its log may hold epochs up \
         to {} that the new primary lacks",
        status.copy.term.node, status.copy.term.counter, status.copy.tip.epoch
    );
    let next = format!(
        "let clients use the new primary. When this node can reach it, it becomes a replica by \
         itself (`hn4ctl demote {}` does it at once) and follows; what the new primary lacks is \
         saved in a file first, or it stays as it is, state diverged. Nothing is deleted",
        section.name
    );
    Some(finding("fenced", Health::Failed, cause, next))
}

/// How to make a copy anew, as a part of a sentence.
fn recreate(status: &ShardStatus, section: &VolumeSection) -> String {
    let token = crate::cli::token::IdentityToken(status.identity);
    let name = &section.name;
    format!(
        "move the log {} away, `hn4ctl volume forget {}`, `hn4ctl volume create {name} --replica \
         --identity {token} --overwrite-backing`, and start hn4-replicad",
        section.log.display(),
        status.identity.volume,
    )
}

fn blocked(obstacle: &Obstacle, status: &ShardStatus, section: &VolumeSection) -> Finding {
    let have = status.copy.tip.epoch;
    match obstacle {
        Obstacle::NeedsCopy { oldest } => {
            let no_shadow = status.no_shadow.as_ref();
            let no_shadow = no_shadow.map(|why| format!(". There is no shadow file: {why}"));
            let cause = format!(
                "the primary's log begins at epoch {oldest}, this copy ends at {have}: what lies \
                 between cannot be sent any more{}",
                no_shadow.unwrap_or_default()
            );
            let next = format!(
                "this copy stays what it was at epoch {have}. To bring it back: stop hn4-replicad, \
                 {}",
                recreate(status, section)
            );
            finding("needs-copy", Health::Failed, cause, next)
        }
        Obstacle::NeedsSpace { why } => finding(
            "needs-space",
            Health::Failed,
            format!("what must be kept apart has no room, so nothing was dropped: {why}"),
            "make room; it is tried again by itself".to_owned(),
        ),
        Obstacle::Diverged { epoch } => {
            let cause = format!(
                "the anchored history of this copy is not the primary's; they differ at epoch \
                 {epoch} at the latest. Both are kept, nothing is transferred"
            );
            let next = format!(
                "decide which history counts. If it is the primary's: stop hn4-replicad, save {} \
                 and {} elsewhere if this one may matter, {}",
                section.log.display(),
                section.backing.display(),
                recreate(status, section)
            );
            finding("diverged", Health::Failed, cause, next)
        }
        Obstacle::Rejected { why } => finding(
            "rejected",
            Health::Attention,
            format!("the primary sent something that was not taken: {why}"),
            "nothing at first: it is asked for again. If it stays, compare the versions of both \
             daemons and look into their logs"
                .to_owned(),
        ),
    }
}

/// Fewer peers than acknowledgements need.
fn too_few_peers(seen: &Seen<'_>, status: &ShardStatus) -> Option<Finding> {
    let required = seen.section.required_peers();
    let live = status.peers.iter().filter(|peer| peer.live).count();
    let counts = status.copy.role == Role::Primary && !status.degraded && status.failed.is_none();
    if !counts || live >= required {
        return None;
    }
    let cause = format!(
        "ack = \"{}\" asks for peers: {required}, able to acknowledge: {live}, requests that \
         wait: {}",
        ack_text(seen.section.ack),
        status.waiting
    );
    let (health, next) = match seen.section.on_degraded {
        OnDegraded::Block => (
            Health::Failed,
            "writes and flushes wait until enough peers are back: see each peer below. To go on \
             without them, set on_degraded = \"degrade\" and restart hn4-replicad; acknowledged \
             writes are then on this node only",
        ),
        OnDegraded::Degrade => (
            Health::Attention,
            "see each peer below. Requests that wait longer than peer_timeout_ms go on without \
             the peers",
        ),
    };
    Some(finding("waiting-for-peers", health, cause, next.to_owned()))
}

/// A restarted primary that has not heard enough of its peers.
fn opening(seen: &Seen<'_>, status: &ShardStatus) -> Option<Finding> {
    let waiting = status.waits_for_peers?;
    if status.copy.role != Role::Primary {
        return None;
    }
    let then = match seen.section.start_alone_after_s {
        Some(seconds) => format!("it goes on alone after {seconds} s"),
        None => "it waits as long as it takes".to_owned(),
    };
    let cause = format!(
        "this node was restarted as primary and asks its peers whether it still is, and whether \
         they hold a tail that was lost here: {} of {} have answered; {then}. Clients wait",
        waiting.answers, waiting.needed
    );
    let volume = &seen.section.name;
    let withheld = waiting.withheld.map(|id| usize::from(id.0));
    let withheld = withheld.and_then(|place| seen.section.peers.get(place));
    let (cause, next) = match withheld {
        Some(PeerSection { name: peer, .. }) => (
            format!(
                "this node was restarted as primary, and {peer} holds epochs that are missing \
                 here but cannot send them: its log is damaged, or begins after the end of this \
                 one; {then}. Clients wait"
            ),
            format!(
                "`hn4ctl demote {volume}` here, then `hn4ctl promote {volume}` on {peer}, which \
                 has them. To go on without them: `hn4ctl promote {volume} --accept-loss` here"
            ),
        ),
        None => (
            cause,
            format!(
                "bring the peers back, see each below. If they are gone for good: `hn4ctl promote \
                 {volume} --accept-loss` here"
            ),
        ),
    };
    Some(finding("opening", Health::Failed, cause, next))
}

fn opened_alone(seen: &Seen<'_>, status: &ShardStatus) -> Option<Finding> {
    if !status.opened_alone {
        return None;
    }
    let cause = format!(
        "this primary serves since its restart without having heard all of its peers: one of {} \
         may hold epochs that were lost here, or have been promoted meanwhile",
        seen.section.peers.len()
    );
    let next = "bring the peers back and look here again; two histories, if there are, are both \
                kept";
    Some(finding(
        "opened-alone",
        Health::Attention,
        cause,
        next.to_owned(),
    ))
}

/// What only this node had was saved.
fn fork_saved(status: &ShardStatus) -> Option<Finding> {
    let path = status.fork_file.as_ref()?.display();
    let cause = format!(
        "this node was primary and held epochs that the new history lacks. They were saved in \
         {path} before they were dropped"
    );
    let next = "look at what clients were told about those writes; keep the file as long as it may \
                matter";
    Some(finding(
        "fork-saved",
        Health::Attention,
        cause,
        next.to_owned(),
    ))
}

/// Readers of a replica hold its backing at an epoch.
fn read_here(status: &ShardStatus) -> Option<Finding> {
    let epoch = status.pinned_epoch?;
    let cause = format!(
        "{} clients read this replica and hold its backing at epoch {epoch}; the log ends at {}",
        status.readers, status.copy.tip.epoch
    );
    let next = "nothing: it goes on when they disconnect. If log or overlay get tight, or on \
                `hn4ctl drain`, they are cut off";
    Some(finding(
        "being-read",
        Health::Attention,
        cause,
        next.to_owned(),
    ))
}

fn degraded(seen: &Seen<'_>, status: &ShardStatus) -> Option<Finding> {
    if !status.degraded {
        return None;
    }
    let cause = format!(
        "{} peers did not acknowledge within {} ms, and on_degraded = \"degrade\": what is \
         acknowledged now may be on this node only",
        seen.section.required_peers(),
        seen.section.peer_timeout_ms
    );
    let next = "bring the peers back, see below; it ends by itself when enough of them have \
                everything. Do not promote another node meanwhile";
    Some(finding(
        "degraded",
        Health::Attention,
        cause,
        next.to_owned(),
    ))
}

fn peer(seen: &Seen<'_>, status: &ShardStatus, index: usize) -> Option<Finding> {
    let section = seen.section.peers.get(index)?;
    let peer = status.peers.get(index)?;
    let name = &section.name;
    if peer.connected {
        return connected_peer(seen, status, index);
    }
    let address = section.address.as_deref().unwrap_or("its address");
    let (cause, next) = match seen.links.get(index) {
        None => (
            "the transport has not started".to_owned(),
            "look into the log of hn4-replicad".to_owned(),
        ),
        Some(LinkStatus::Listening) => (
            "it has not connected; of two nodes the one whose name comes first dials, here that \
             one"
            .to_owned(),
            format!(
                "check that hn4-replicad runs on {name} and has this node as a peer with its \
                 address and key pin, and that this node's port is open for it"
            ),
        ),
        Some(LinkStatus::Connecting) => (
            format!("connecting to {address}"),
            format!("nothing at first; if it stays, check that hn4-replicad runs on {name}"),
        ),
        Some(LinkStatus::Failed { why }) => (
            why.clone(),
            format!(
                "it is tried again by itself. Check that hn4-replicad runs on {name}, that \
                 {address} can be reached, and that both nodes pin each other's present key"
            ),
        ),
        Some(LinkStatus::Connected { remote }) => (
            format!("connected to {remote}, but there is no session about this volume"),
            format!(
                "check that {name} has this volume (same volume id in `hn4ctl status`), with this \
                 node among its peers, and look into its log"
            ),
        ),
    };
    let health = Health::Attention;
    let cause = format!("peer {name}: {cause}");
    Some(finding("peer-not-connected", health, cause, next))
}

fn connected_peer(seen: &Seen<'_>, status: &ShardStatus, index: usize) -> Option<Finding> {
    let peer = status.peers.get(index)?;
    let name = &seen.section.peers.get(index)?.name;
    if status.copy.role != Role::Primary || peer.live {
        return None;
    }
    if let Some(bytes) = peer.seeding_bytes {
        let size = status.identity.size_bytes;
        let cause = format!("peer {name} is being sent a full copy: {bytes} of {size} bytes");
        let next = "nothing: it goes on by itself, also after a restart".to_owned();
        return Some(finding("peer-seeding", Health::Attention, cause, next));
    }
    let cause = format!(
        "peer {name} has a session but takes no epochs; it ends at epoch {}",
        peer.progress.durable
    );
    let next = format!("look at `hn4ctl status` on {name}: it says what keeps it");
    Some(finding(
        "peer-not-following",
        Health::Attention,
        cause,
        next,
    ))
}

/// A peer beyond the bound of its lag.
fn lagging(seen: &Seen<'_>, status: &ShardStatus, index: usize) -> Option<Finding> {
    let section = seen.section.peers.get(index)?;
    let peer = status.peers.get(index)?;
    let (name, policy) = (&section.name, section.lag);
    let bounds = [
        policy.max_bytes.map(|most| format!("{most} bytes")),
        policy.max_ms.map(|most| format!("{} s", most / 1000)),
    ];
    let bounds: Vec<String> = bounds.into_iter().flatten().collect();
    let lag = peer.lags.durable.unwrap_or_default();
    let (bytes, ms) = (lag.bytes, lag.ms);
    let bounds = bounds.join(" or ");
    let behind = format!("peer {name} is {bytes} bytes and {ms} ms behind, its bound is {bounds}");
    let (state, what, next) = match peer.lag_state {
        LagState::Within => return None,
        LagState::Throttling => (
            "lag-throttled",
            "new writes wait until it has flushed more (on_exceed = \"throttle\")",
            format!(
                "nothing, if it is slow for a while only. Else look at `hn4ctl status` on {name} \
                 and at the link; to let writers go on, raise the bound or set on_exceed = \
                 \"spill\" or \"detach\" and restart hn4-replicad"
            ),
        ),
        LagState::Spilling => (
            "lag-spilling",
            "writers are not held back before the log is full (on_exceed = \"spill\")",
            format!("nothing at first; if it stays, look at `hn4ctl status` on {name}"),
        ),
        LagState::Detached => (
            "peer-detached",
            "its acknowledgements do not count, and the log is not kept for it once half of it is \
             in use (on_exceed = \"detach\")",
            format!(
                "nothing: it counts again by itself when it has caught up. Do not promote {name} \
                 meanwhile; if it stays, look at `hn4ctl status` there"
            ),
        ),
    };
    let cause = format!("{behind}: {what}");
    Some(finding(state, Health::Attention, cause, next))
}

fn lonely_replica(seen: &Seen<'_>, status: &ShardStatus) -> Option<Finding> {
    let alone = status.copy.role == Role::Replica && seen.section.peers.is_empty();
    alone.then(|| {
        let next = "add the primary as [[volume.peer]] and restart hn4-replicad; or, if this is \
                    the only copy that is left, `hn4ctl promote`";
        finding(
            "no-peers",
            Health::Failed,
            "this copy is a replica and has no peer to follow".to_owned(),
            next.to_owned(),
        )
    })
}

fn assumed_flush(status: &ShardStatus) -> Option<Finding> {
    status.assumed_strict_flush.then(|| {
        let cause = format!(
            "assume_strict_flush = true, and a device cannot be judged: log {}; backing {}",
            status.log_device, status.backing_device
        );
        let next = "nothing, if you know that both keep what was flushed when power fails; else \
                    move them to a device that is recognised";
        finding(
            "assumed-strict-flush",
            Health::Attention,
            cause,
            next.to_owned(),
        )
    })
}

/// Back-pressure, or soon: not a fault, but what a client feels as slowness has its reason here.
fn nearly_full(seen: &Seen<'_>, status: &ShardStatus) -> Vec<Finding> {
    let nearly = |used: u64, all: u64| all > 0 && used >= all - all / 8;
    let mut notes = Vec::new();
    if nearly(status.dirty_bytes, status.overlay_bytes) {
        let cause = format!(
            "{} of {} bytes of the overlay wait to be written back; new writes wait for room",
            status.dirty_bytes, status.overlay_bytes
        );
        let next = "nothing: it drains as fast as the backing takes it. A larger overlay_mib takes \
                    longer bursts, a faster backing more load";
        notes.push(finding(
            "overlay-nearly-full",
            Health::Ok,
            cause,
            next.to_owned(),
        ));
    }
    if nearly(status.log_used_bytes, status.log_bytes) {
        let slowest = status
            .peers
            .iter()
            .zip(&seen.section.peers)
            .filter(|(peer, _)| peer.connected)
            .min_by_key(|(peer, _)| peer.progress.durable);
        let held = slowest.map_or_else(String::new, |(peer, section)| {
            format!(
                ". Of the connected peers {} is the furthest behind, at epoch {}",
                section.name, peer.progress.durable
            )
        });
        let cause = format!(
            "{} of {} bytes of the log are kept: epochs that are not in the backing yet, or that a \
             connected peer has not taken{held}",
            status.log_used_bytes, status.log_bytes
        );
        let next = "nothing: new writes wait for room, and it is freed as the backing and the \
                    peers take it";
        notes.push(finding(
            "log-nearly-full",
            Health::Ok,
            cause,
            next.to_owned(),
        ));
    }
    notes
}

fn torn_tail(status: &ShardStatus) -> Option<Finding> {
    let recovery = &status.recovery;
    recovery.torn_tail.then(|| {
        let cause = format!(
            "when the volume was opened, an incomplete frame after epoch {} was dropped; no flush \
             had been acknowledged for it",
            recovery.tip
        );
        finding(
            "recovered-torn-tail",
            Health::Ok,
            cause,
            "nothing: this is how a crash in mid-write looks".to_owned(),
        )
    })
}
