//! `IDB.xml`: the ledger as the reference's read-only projection. //= WORMHOLE_SPEC 5
//!
//! Every record is a step. Its cause is the hash of the record before it and its effect its own
//! hash, so the document carries the chain; the proof is the batch root for an anchor, and the
//! record's own hash for others. The order of elements is fixed and nothing depends on when or
//! where the export is made: the same ledger gives the same bytes. The schema is
//! `proof/schema/idb.xsd`.
//!
//! No text of a record enters the document, so there is nothing to escape.

use std::io::{self, Write};

use hn4::types::VolumeId;

use super::{Body, Record};
use crate::anchor::{StateAt, blake3_text};
use crate::hash::Digest;
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

/// Writes the document piece by piece: memory does not grow with the ledger.
#[derive(Debug)]
pub struct Export<W> {
    out: W,
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
        Ok(Self { out })
    }

    /// Writes one record.
    ///
    /// # Errors
    /// Of the writer.
    pub fn step(&mut self, record: &Record) -> io::Result<()> {
        let (proof, constraints) = match &record.body {
            Body::Anchor(signed) => (&signed.anchor.proof_hash, "anchor"),
            Body::Key(_) => (&record.hash, "key"),
            Body::Note(_) => (&record.hash, "chain"),
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
            writeln!(self.out, r#"  <constraints id="{id}">"#)?;
            for invariant in invariants {
                writeln!(self.out, "    <invariant>{invariant}</invariant>")?;
            }
            writeln!(self.out, "  </constraints>")?;
        }
        writeln!(self.out, "</idb>")?;
        Ok(self.out)
    }
}
