//! `IDB.xml`: the ledger as the reference's read-only projection. //= WORMHOLE_SPEC 5
//!
//! Every record is a step. Its cause is the hash of the record before it and its effect its own
//! hash, so the document carries the chain; the proof is the batch root for an anchor, and the
//! record's own hash for others. The order of elements is fixed and nothing depends on when or
//! where the export is made: the same ledger gives the same bytes. The schema is
//! `proof/schema/idb.xsd`.
//!
//! An inspection has a constraint of its own, whose invariants say what was found.
//!
//! No text of a record enters the document, so there is nothing to escape.

use std::io::{self, Write};

use hn4::types::VolumeId;

use super::{Body, Record};
use crate::anchor::{StateAt, blake3_text};
use crate::hash::Digest;
use crate::inspection::{Inspection, Kind};
use crate::time::iso8601;

/// The namespace.
pub const NAMESPACE: &str = "x:scxq7:idb";

/// What every record obeys.
const CHAIN: [&str; 2] = [
    "the cause of a step is the effect of the step before it",
    "the identifiers of the steps count up from 0",
];
/// What anchors obey beside that.
const ANCHOR: [&str; 4] = [
    "epochs continue those of the anchor before, without gap or overlap",
    "log offsets continue those of the anchor before, without gap or overlap",
    "the term is not lower than that of the anchor before",
    "active keys of the term's node signed the anchor",
];
/// What key changes obey beside that.
const KEY: [&str; 2] = [
    "an active key of each algorithm of the authorising node signed the change",
    "a retired key signs no later step",
];

/// What checkpoints obey beside that.
const CHECKPOINT: [&str; 2] = [
    "the epoch is anchored, and its state root is not older than the one before",
    "active keys of the term's node signed the checkpoint, also those for checkpoints only",
];

/// Writes the document piece by piece: memory does not grow with the ledger, but for what
/// inspections found.
#[derive(Debug)]
pub struct Export<W> {
    out: W,
    inspections: Vec<(u64, Vec<String>)>,
    has_checkpoints: bool,
}

/// What an inspection found, as invariants.
fn found(inspection: &Inspection) -> Vec<String> {
    let what = match inspection.kind {
        Kind::DeepVerify => "deep verify",
        Kind::Repair => "repair",
    };
    let (first, last) = (inspection.first, inspection.last);
    let (began, ended) = (iso8601(inspection.began_ms), iso8601(inspection.ended_ms));
    let mut lines = vec![
        format!("{what} by node {} of its copy", inspection.node),
        format!("epochs {first} to {last}, from {began} to {ended}"),
        format!(
            "{} blocks of 4 KiB looked at, {} damaged, {} repaired",
            inspection.blocks, inspection.damaged, inspection.repaired
        ),
    ];
    let place = |lba: u64, sectors: u64| format!("LBA {lba}-{}", lba + sectors - 1);
    let places = inspection.places.iter();
    lines.extend(places.map(|it| place(it.lba.0, it.sectors)));
    let device = inspection.device.iter();
    lines.extend(device.map(|sum| format!("b3sum of the device {}", blake3_text(sum))));
    lines
}

impl<W: Write> Export<W> {
    /// Writes the beginning. `state` is the newest anchored state root, as the verifier found it.
    ///
    /// # Errors
    /// Of the writer.
    pub fn begin(volume: VolumeId, state: Option<StateAt>, mut out: W) -> io::Result<Self> {
        let root = state.map_or(Digest::ZERO, |state| state.root);
        writeln!(out, r#"<?xml version="1.0" encoding="UTF-8"?>"#)?;
        writeln!(out, r#"<idb xmlns="{NAMESPACE}" version="1">"#)?;
        writeln!(out, r#"  <state hash="{}">"#, blake3_text(&root))?;
        writeln!(
            out,
            r#"    <heap encoding="external">object://volume/{volume}</heap>"#
        )?;
        writeln!(out, "  </state>")?;
        writeln!(out, "  <causal>")?;
        Ok(Self {
            out,
            inspections: Vec::new(),
            has_checkpoints: false,
        })
    }

    /// Writes one record.
    ///
    /// # Errors
    /// Of the writer.
    pub fn step(&mut self, record: &Record) -> io::Result<()> {
        let own = format!("inspection-{}", record.index);
        let (proof, constraints) = match &record.body {
            Body::Anchor(signed) => (&signed.anchor.proof_hash, "anchor"),
            Body::Key(_) => (&record.hash, "key"),
            Body::Note(_) => (&record.hash, "chain"),
            Body::Checkpoint(_) => {
                self.has_checkpoints = true;
                (&record.hash, "checkpoint")
            }
            Body::Inspection(signed) => {
                let lines = found(&signed.inspection);
                self.inspections.push((record.index, lines));
                (&record.hash, own.as_str())
            }
        };
        let out = &mut self.out;
        writeln!(
            out,
            r#"    <step id="{}" time="{}">"#,
            record.index,
            iso8601(record.time_ms)
        )?;
        writeln!(
            out,
            r#"      <cause hash="{}"/>"#,
            blake3_text(&record.previous)
        )?;
        writeln!(
            out,
            r#"      <effect hash="{}"/>"#,
            blake3_text(&record.hash)
        )?;
        writeln!(out, r#"      <proof hash="{}"/>"#, blake3_text(proof))?;
        writeln!(out, r#"      <constraints ref="{constraints}"/>"#)?;
        writeln!(out, "    </step>")
    }

    /// Writes the end.
    ///
    /// # Errors
    /// Of the writer.
    pub fn finish(mut self) -> io::Result<W> {
        writeln!(self.out, "  </causal>")?;
        for (id, invariants) in [("chain", &CHAIN[..]), ("anchor", &ANCHOR), ("key", &KEY)] {
            constraints(&mut self.out, id, invariants)?;
        }
        // Ledgers without them have the export that they always had.
        if self.has_checkpoints {
            constraints(&mut self.out, "checkpoint", &CHECKPOINT)?;
        }
        for (index, lines) in &self.inspections {
            constraints(&mut self.out, &format!("inspection-{index}"), lines)?;
        }
        writeln!(self.out, "</idb>")?;
        Ok(self.out)
    }
}

fn constraints<T: AsRef<str>>(out: &mut impl Write, id: &str, invariants: &[T]) -> io::Result<()> {
    writeln!(out, r#"  <constraints id="{id}">"#)?;
    for invariant in invariants {
        let invariant = invariant.as_ref();
        writeln!(out, "    <invariant>{invariant}</invariant>")?;
    }
    writeln!(out, "  </constraints>")
}
