//! What the tests of this folder share.

use std::process::Command;

/// Whether `tool` can be run. A missing tool is said aloud, and is a failure where all tools are
/// promised to be there (`HN4_REQUIRE_TOOLS=1`).
pub(crate) fn has_tool(tool: &str) -> bool {
    let found = Command::new(tool)
        .arg("--version")
        .output()
        .is_ok_and(|out| out.status.success());
    let is_required = std::env::var("HN4_REQUIRE_TOOLS").is_ok_and(|value| value == "1");
    assert!(
        found || !is_required,
        "{tool} is required here but cannot be run"
    );
    if !found {
        eprintln!("SKIPPED: {tool} cannot be run on this machine");
    }
    found
}
