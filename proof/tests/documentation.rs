//! The format's document names everything that is hashed.
#![forbid(unsafe_code)]

use std::path::Path;

use hn4_proof::hash::contexts;

#[test]
fn every_hash_context_is_in_the_document() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/PROOF_FORMAT.md");
    let text = std::fs::read_to_string(path).unwrap();
    for context in contexts() {
        let name = context.text().strip_prefix("hn4-replicad v1 ").unwrap();
        assert!(
            text.contains(&format!("`{name}`")),
            "{name} is not documented"
        );
    }
}
