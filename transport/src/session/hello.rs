//! Comparing two hellos: may these two nodes talk about this volume at all? And comparing two
//! states of one node: must the peer hear of the later one?
//!
//! Pure. The order of the checks is fixed, so that both sides name the same field: first who, then
//! what, then in which term.

use super::api::{CopyState, Field, FoundBy, LocalState, Refusal};
use super::capability::{self, CapabilityList};
use crate::wire::control::Hello;

/// What two sides have agreed on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Agreed {
    /// The protocol version of the session.
    pub protocol: u32,
    /// What both can do.
    pub capabilities: Vec<CapabilityList>,
    /// The largest epoch, in bytes, that both can take.
    pub max_epoch_bytes: u64,
}

impl Agreed {
    /// Whether both sides take messages that were packed with SCXQ2.
    #[must_use]
    pub fn scxq2(&self) -> bool {
        self.capabilities.iter().any(|list| {
            list.name == capability::COMPRESSION
                && list.values.iter().any(|value| value == capability::SCXQ2)
        })
    }
}

/// Compares our hello with the peer's.
///
/// # Errors
///
/// The first thing that differs and must not.
pub fn compare(ours: &Hello, theirs: &Hello) -> Result<Agreed, Refusal> {
    let low = ours.protocol.0.max(theirs.protocol.0);
    let high = ours.protocol.1.min(theirs.protocol.1);
    if low > high {
        let range = |range: (u32, u32)| format!("{} to {}", range.0, range.1);
        return refuse(
            Field::Protocol,
            range(ours.protocol),
            range(theirs.protocol),
        );
    }
    let capabilities = capability::intersect(&ours.capabilities, &theirs.capabilities)?;
    compare_identity(&ours.state, &theirs.state)?;
    compare_terms(&ours.state, &theirs.state)?;
    let max_epoch_bytes = ours.state.max_epoch_bytes.min(theirs.state.max_epoch_bytes);
    Ok(Agreed {
        protocol: high,
        capabilities,
        max_epoch_bytes,
    })
}

/// Checks that both speak of copies of one volume, at two nodes.
///
/// # Errors
///
/// The first field that differs and must not.
pub fn compare_identity(ours: &LocalState, theirs: &LocalState) -> Result<(), Refusal> {
    if ours.volume != theirs.volume {
        return refuse(Field::VolumeId, ours.volume, theirs.volume);
    }
    if ours.node == theirs.node {
        return refuse(Field::Node, ours.node, theirs.node);
    }
    // A copy that nothing has arrived in yet does not know the nonce.
    let either_fresh = [ours, theirs]
        .iter()
        .any(|state| matches!(state.copy, CopyState::Fresh | CopyState::Surveying));
    if !either_fresh && ours.birth_nonce != theirs.birth_nonce {
        let hex = |nonce: &[u8; 16]| nonce.iter().map(|byte| format!("{byte:02x}")).collect();
        let (ours, theirs): (String, String) = (hex(&ours.birth_nonce), hex(&theirs.birth_nonce));
        return refuse(Field::BirthNonce, ours, theirs);
    }
    if ours.size_bytes != theirs.size_bytes {
        return refuse(Field::SizeBytes, ours.size_bytes, theirs.size_bytes);
    }
    if ours.sector_bytes != theirs.sector_bytes {
        return refuse(Field::SectorBytes, ours.sector_bytes, theirs.sector_bytes);
    }
    if ours.format_version != theirs.format_version {
        return refuse(
            Field::FormatVersion,
            ours.format_version,
            theirs.format_version,
        );
    }
    Ok(())
}

/// Two nodes that were promoted with the same counter have each begun a history of their own.
fn compare_terms(ours: &LocalState, theirs: &LocalState) -> Result<(), Refusal> {
    let is_fork = ours.term.counter == theirs.term.counter
        && ours.term.counter > 0
        && ours.term.node != theirs.term.node;
    if is_fork {
        return refuse(Field::Fork, ours.term, theirs.term);
    }
    Ok(())
}

/// Whether a peer that has heard the state `old` must hear `new`.
pub(super) fn is_news(new: &LocalState, old: &LocalState) -> bool {
    new.term != old.term
        || new.tip.0 < old.tip.0
        || new.incarnation != old.incarnation
        || new.resyncs != old.resyncs
        || copy_kind(new.copy) != copy_kind(old.copy)
}

fn copy_kind(copy: CopyState) -> u8 {
    match copy {
        CopyState::Fresh | CopyState::Surveying => 0,
        CopyState::Seeding { .. } => 1,
        CopyState::Usable | CopyState::Shadowing { .. } => 2,
    }
}

fn refuse<T>(field: Field, ours: impl ToString, theirs: impl ToString) -> Result<T, Refusal> {
    let (ours, theirs) = (ours.to_string(), theirs.to_string());
    Err(Refusal {
        found_by: FoundBy::Us,
        field,
        ours,
        theirs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::testing;

    type Change = fn(&mut Hello);

    fn hello(node: u8) -> Hello {
        Hello {
            protocol: (1, 1),
            capabilities: capability::offered(true),
            state: testing::state(node),
        }
    }

    fn field(ours: &Hello, theirs: &Hello) -> Option<Field> {
        let forth = compare(ours, theirs).err().map(|refusal| refusal.field);
        let back = compare(theirs, ours).err().map(|refusal| refusal.field);
        assert_eq!(forth, back, "both sides must name the same field");
        forth
    }

    #[test]
    fn each_difference_is_refused_by_its_name() {
        let ours = hello(1);
        assert_eq!(field(&ours, &hello(2)), None);
        let cases: [(Field, Change); 9] = [
            (Field::Protocol, |hello| hello.protocol = (2, 3)),
            (Field::Capabilities, |hello| {
                hello.capabilities[0].values.clear()
            }),
            (Field::VolumeId, |hello| hello.state.volume.0[0] ^= 1),
            (Field::Node, |hello| {
                hello.state.node = testing::state(1).node
            }),
            (Field::BirthNonce, |hello| hello.state.birth_nonce[3] ^= 1),
            (Field::SizeBytes, |hello| hello.state.size_bytes += 4096),
            (Field::SectorBytes, |hello| hello.state.sector_bytes = 4096),
            (Field::FormatVersion, |hello| {
                hello.state.format_version += 1
            }),
            (Field::Fork, |hello| {
                hello.state.term.node = hello.state.node
            }),
        ];
        for (expected, change) in cases {
            let mut theirs = hello(2);
            change(&mut theirs);
            assert_eq!(field(&ours, &theirs), Some(expected));
        }
    }

    #[test]
    fn a_fresh_copy_needs_no_birth_nonce() {
        let mut theirs = hello(2);
        theirs.state.birth_nonce = [0; 16];
        theirs.state.copy = CopyState::Fresh;
        assert_eq!(field(&hello(1), &theirs), None);
    }

    #[test]
    fn adjacent_protocol_versions_interoperate() {
        let (mut older, mut newer) = (hello(1), hello(2));
        older.protocol = (1, 2);
        newer.protocol = (2, 3);
        assert_eq!(compare(&older, &newer).map(|agreed| agreed.protocol), Ok(2));
    }
}
