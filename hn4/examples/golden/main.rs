//! Runs every case of a golden directory against this crate:
//! `cargo run --release -p hn4 --example golden -- DIR`.
//!
//! A case passes when the crate does what the reference does. Where the reference is defective and
//! the crate by default does something else on purpose, reference-compatible conduct must still
//! match, and the case is listed as corrected, with the defect's number. The runner knows the
//! layout of the directory and nothing about its cases.

mod anyhow_lite;
mod chronicle;
mod data;
mod format;
mod json;
mod lifecycle;
mod mounts;
mod sparse;
mod vectors;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow_lite::{Context, Result};
use hn4::status::Defect;
use serde_json::Value;
use sparse::Image;

/// What became of a case.
pub(crate) enum Outcome {
    /// The same as the reference, also with all corrections.
    Passed,
    /// The same as the reference in compatible conduct; corrected by default.
    Corrected(Vec<Defect>, String),
}

/// Counts outcomes and prints what is worth a line.
#[derive(Default)]
pub(crate) struct Tally {
    passed: u64,
    failed: u64,
    corrected: u64,
}

impl Tally {
    pub(crate) fn record(&mut self, name: impl Fn() -> String, outcome: Result<Outcome>) {
        match outcome {
            Ok(Outcome::Passed) => self.passed += 1,
            Ok(Outcome::Corrected(defects, what)) => {
                self.corrected += 1;
                let numbers: Vec<_> = defects.iter().map(ToString::to_string).collect();
                let numbers = if numbers.is_empty() {
                    "unnumbered".to_owned()
                } else {
                    numbers.join(", ")
                };
                println!("corrected  {}: {numbers}: {what}", name());
            }
            Err(failure) => {
                self.failed += 1;
                println!("FAILED     {}: {failure}", name());
            }
        }
    }
}

/// A golden directory, with its images loaded once.
pub(crate) struct Golden {
    root: PathBuf,
    images: RefCell<BTreeMap<String, Image>>,
}

impl Golden {
    /// An image by its file name relative to the directory.
    pub(crate) fn image(&self, file: &str) -> Result<Image> {
        if let Some(image) = self.images.borrow().get(file) {
            return Ok(image.clone());
        }
        let image = Image::load(&self.root.join(file))?;
        self.images
            .borrow_mut()
            .insert(file.to_owned(), image.clone());
        Ok(image)
    }

    /// The image that a case names as its base, with the case's patches.
    pub(crate) fn base(&self, case: &Value) -> Result<Image> {
        let file = match case["base_file"].as_str() {
            Some(file) => file.to_owned(),
            None => format!("images/{}.sparse.zst", json::text_of(case, "base")?),
        };
        let mut image = self.image(&file)?;
        for patch in json::list(case, "patches") {
            let bytes = json::bytes_of(json::text_of(patch, "hex")?)?;
            image.write(json::u64_of(patch, "off")?, &bytes);
        }
        Ok(image)
    }

    /// A manifest, or `None` where the directory does not have it.
    pub(crate) fn manifest(&self, file: &str) -> Result<Option<Value>> {
        let path = self.root.join(file);
        if path.exists() {
            json::load(&path).map(Some)
        } else {
            Ok(None)
        }
    }
}

type Section = fn(&Golden, &mut Tally) -> Result<()>;

fn run(root: &Path) -> Tally {
    let golden = Golden {
        root: root.to_owned(),
        images: RefCell::default(),
    };
    let mut tally = Tally::default();
    let sections: [(&str, Section); 7] = [
        ("vectors", vectors::run),
        ("images", format::run_images),
        ("format", format::run_cases),
        ("chronicle", chronicle::run),
        ("quorum", |golden, tally| {
            mounts::run(golden, tally, "quorum")
        }),
        ("mount", |golden, tally| mounts::run(golden, tally, "mount")),
        ("data", data::run),
    ];
    for (name, section) in sections {
        let (passed, corrected, failed) = (tally.passed, tally.corrected, tally.failed);
        if let Err(failure) = section(&golden, &mut tally) {
            tally.record(|| name.to_owned(), Err(failure));
        }
        let (passed, corrected) = (tally.passed - passed, tally.corrected - corrected);
        let failed = tally.failed - failed;
        if passed + corrected + failed == 0 {
            println!("skipped    {name}: not in this directory");
        } else {
            println!("{name}: {passed} passed, {corrected} corrected, {failed} failed");
        }
    }
    tally
}

fn main() -> Result<()> {
    let root = std::env::args().nth(1).context("usage: golden DIR")?;
    let tally = run(Path::new(&root));
    if tally.corrected > 0 {
        println!(
            "{} corrected (same as the reference in compatible conduct)",
            tally.corrected
        );
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    std::process::exit(i32::from(
        tally.failed > 0 || tally.passed + tally.corrected == 0,
    ))
}
