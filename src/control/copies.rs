//! What there is to be said of a copy that is not complete.

use hn4::log::CopyState;
use hn4_engine::shard::ShardStatus;

use super::api::{Finding, Health};
use super::findings::{Seen, finding};

/// A copy that is to keep what somebody brought, before the full copy.
fn seeded(seen: &Seen<'_>, status: &ShardStatus) -> Finding {
    if !seen.section.tree {
        return finding(
            "not-seeded",
            Health::Attention,
            "what was brought to the backing cannot be compared with the primary, since tree = \
             \"off\": all of the full copy will be sent"
                .to_owned(),
            "set tree = \"on\" here and on the primary and restart hn4-replicad, before the copy \
             begins"
                .to_owned(),
        );
    }
    let cause = match status.copy.surveys {
        true => {
            "a state tree of what was brought to the backing is being built (see tree); then it is \
             compared with the primary's, and what differs is sent"
        }
        false => {
            "what was brought to the backing is known, and waits to be compared with the primary's"
        }
    };
    let next = "nothing, if the primary is connected and has tree = \"on\" too: it goes on by \
                itself, also after a restart. Let nothing else write to the backing. Do not \
                promote this copy";
    finding(
        "surveying",
        Health::Attention,
        cause.to_owned(),
        next.to_owned(),
    )
}

/// What a copy lacks that is not usable, or old.
pub(super) fn copy_state(seen: &Seen<'_>, status: &ShardStatus) -> Option<Finding> {
    match status.copy.copy {
        CopyState::Usable => None,
        CopyState::Fresh if status.copy.seeded => Some(seeded(seen, status)),
        CopyState::Fresh => Some(finding(
            "not-seeded",
            Health::Attention,
            "no full copy of the volume has begun to arrive; this copy holds nothing".to_owned(),
            "nothing, if the primary is connected: it sends one. Do not promote this copy"
                .to_owned(),
        )),
        CopyState::Seeding {
            cursor_bytes,
            until,
            ..
        } => {
            let size = status.identity.size_bytes;
            let cause = match until {
                None => format!("a full copy is being filled in: {cursor_bytes} of {size} bytes"),
                Some(epoch) => format!(
                    "all of the full copy has arrived; it is exact once epoch {epoch} has been \
                     applied, {} is",
                    status.copy.progress.applied
                ),
            };
            let next = "nothing: it goes on by itself, also after a restart. Do not promote this \
                        copy before it is usable";
            Some(finding(
                "seeding",
                Health::Attention,
                cause,
                next.to_owned(),
            ))
        }
        CopyState::Shadowing { cursor_bytes, .. } => Some(finding(
            "shadowing",
            Health::Attention,
            format!(
                "the primary's log no longer reaches back to this copy, which stays at epoch {} \
                 while a full copy comes into the shadow file: {} of {} bytes are compared",
                status.copy.tip.epoch,
                status.seeding_bytes.unwrap_or(cursor_bytes),
                status.identity.size_bytes
            ),
            "nothing: it goes on by itself, also after a restart. A promotion takes the older state"
                .to_owned(),
        )),
        CopyState::Applying { shadow_bytes, .. } => Some(finding(
            "applying",
            Health::Attention,
            format!(
                "a full copy is complete, and its {shadow_bytes} bytes are written over the backing"
            ),
            "nothing: it takes as long as writing that much. Until then it cannot be read or \
             promoted"
                .to_owned(),
        )),
    }
}
