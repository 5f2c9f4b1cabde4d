//! Capabilities: what is used is what both sides offer, and nothing is assumed.
//!
//= WORMHOLE_SPEC 1
//! Selected = ours ∩ theirs, list by list, in our order of preference. No defaults and no silent
//! downgrade: if either side needs a list and nothing is common, the session is refused, and the
//! refusal names both lists.

use super::api::{Field, FoundBy, Refusal};

/// One list of things a node can do, best first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CapabilityList {
    /// What the list is about, such as `log` or `compression`.
    pub name: String,
    /// Whether a session without anything in common is senseless.
    pub needed: bool,
    /// The values, best first.
    pub values: Vec<String>,
}

impl CapabilityList {
    /// A list that both sides must have something in common of.
    #[must_use]
    pub fn needed(name: &str, values: &[&str]) -> Self {
        Self {
            needed: true,
            ..Self::optional(name, values)
        }
    }

    /// A list that may come out empty.
    #[must_use]
    pub fn optional(name: &str, values: &[&str]) -> Self {
        let values = values.iter().map(|&value| value.to_owned()).collect();
        Self {
            name: name.to_owned(),
            needed: false,
            values,
        }
    }
}

/// The list that says how bulk messages may be compressed.
pub const COMPRESSION: &str = "compression";
/// Its value for SCXQ2.
pub const SCXQ2: &str = "scxq2";

/// What this code offers; SCXQ2 only if it is switched on.
#[must_use]
pub fn offered(scxq2: bool) -> Vec<CapabilityList> {
    let compression: &[&str] = if scxq2 { &[SCXQ2, "none"] } else { &["none"] };
    vec![
        CapabilityList::needed("stream", &["epoch-frames"]),
        CapabilityList::needed(COMPRESSION, compression),
        CapabilityList::optional("copy", &["linear-seed"]),
    ]
}

/// The intersection of what both sides offer, in our order.
///
/// # Errors
///
/// If a list that either side needs has no common value.
pub fn intersect(
    ours: &[CapabilityList],
    theirs: &[CapabilityList],
) -> Result<Vec<CapabilityList>, Refusal> {
    let find =
        |lists: &[CapabilityList], name: &str| lists.iter().find(|list| list.name == name).cloned();
    let empty = |name: &str| CapabilityList::optional(name, &[]);
    // Lists that only the peer has count too, when the peer needs them.
    let only_theirs = theirs
        .iter()
        .filter(|list| find(ours, &list.name).is_none());
    let names = ours
        .iter()
        .chain(only_theirs)
        .map(|list| list.name.as_str());
    names
        .map(|name| {
            let our_list = find(ours, name).unwrap_or_else(|| empty(name));
            let their_list = find(theirs, name).unwrap_or_else(|| empty(name));
            let common = |value: &&String| their_list.values.contains(*value);
            let values: Vec<_> = our_list.values.iter().filter(common).cloned().collect();
            let needed = our_list.needed || their_list.needed;
            if needed && values.is_empty() {
                let describe = |list: &CapabilityList| format!("{name}: {:?}", list.values);
                return Err(Refusal {
                    found_by: FoundBy::Us,
                    field: Field::Capabilities,
                    ours: describe(&our_list),
                    theirs: describe(&their_list),
                });
            }
            Ok(CapabilityList {
                name: name.to_owned(),
                needed,
                values,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negotiation_intersection() {
        let ours = [CapabilityList::needed("x", &["A", "B", "C"])];
        let theirs = [CapabilityList::needed("x", &["B", "C", "D"])];
        let agreed = intersect(&ours, &theirs).expect("something is common");
        assert_eq!(agreed, [CapabilityList::needed("x", &["B", "C"])]);
    }

    #[test]
    fn an_empty_needed_list_is_refused_and_names_both() {
        let ours = [CapabilityList::needed("compression", &["none"])];
        let theirs = [CapabilityList::optional("compression", &["lz4"])];
        let refusal = intersect(&ours, &theirs).expect_err("nothing is common");
        assert_eq!(refusal.field, Field::Capabilities);
        assert!(
            refusal.ours.contains("none") && refusal.theirs.contains("lz4"),
            "{refusal}"
        );
        // Also when only the peer knows the list.
        assert!(intersect(&[], &ours).is_err());
        assert_eq!(
            intersect(&[], &theirs).map(|lists| lists[0].values.len()),
            Ok(0)
        );
    }
}
