//! The golden data of the reference, where the checkout has it.

use std::path::{Path, PathBuf};
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
    let output = Command::new(example())
        .arg(&folder)
        .output()
        .expect("the example runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.trim_end().ends_with(" 0 failed"), "{text}");
}

/// The example, up to date. Built for the workspace, since Cargo would give it other features
/// alone, and build all that it needs once more.
fn example() -> PathBuf {
    let this = std::env::current_exe().expect("a test program");
    let folder = this.ancestors().nth(2).expect("the folder of a profile");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--workspace", "--example", "golden"]);
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    let built = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status();
    assert!(built.expect("cargo runs").success());
    folder.join("examples/golden")
}
