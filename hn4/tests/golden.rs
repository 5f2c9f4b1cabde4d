//! The golden data of the reference, where the checkout has it.

use std::path::Path;
use std::process::Command;

#[test]
fn every_golden_case_passes_or_is_a_corrected_defect() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/hn4");
    if !folder.exists() {
        assert!(
            std::env::var("HN4_REQUIRE_TOOLS").as_deref() != Ok("1"),
            "the golden data is not at {}",
            folder.display()
        );
        eprintln!("skipped: no golden data at {}", folder.display());
        return;
    }
    let output = Command::new(env!("CARGO"))
        .args([
            "run",
            "--quiet",
            "--package",
            "hn4",
            "--example",
            "golden",
            "--",
        ])
        .arg(&folder)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.trim_end().ends_with(" 0 failed"), "{text}");
}
