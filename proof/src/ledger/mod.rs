//! The ledger: an append-only file of records, each of which names the hash of the one before it.
//!
//! ```text
//! header | record 0 | record 1 | ...
//! ```
//!
//! A record's hash covers all its bytes, and through `previous` all of history; it is stored at the
//! record's end, where it is checksum and commit mark in one. Record 0 of a shared ledger enrols
//! the first key. The *shared* ledger of a volume is copied between nodes byte for byte; what one
//! node finds on its own medium goes into its own *local* ledger, which has notes and inspections
//! only.
//!
//! | file | what it is for |
//! |---|---|
//! | `mod.rs` | header and records, byte by byte |
//! | [`verify`] | the rules that make records a ledger; also its tip, to append to |
//! | [`scan`] | reading a file in O(1) memory, torn tails, damage |
//! | [`mod@file`] | appending to a file, finding records in it, setting a superseded tail aside |
//! | [`xml`] | `IDB.xml` |

use hn4::types::{Epoch, Lba, VolumeId};

use crate::anchor::SignedAnchor;
use crate::checkpoint::SignedCheckpoint;
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, DIGEST_BYTES, Digest};
use crate::inspection::SignedInspection;
use crate::sign::keyring::KeyChange;
use crate::sign::{KeyId, Signature};

pub mod file;
pub mod scan;
pub mod verify;
pub mod xml;

/// Bytes in the header of a ledger file.
pub const HEADER_BYTES: usize = 8 + 1 + 1 + 6 + 16 + 8 + DIGEST_BYTES;
/// Bytes before a record's body.
pub const RECORD_HEAD_BYTES: usize = 4 + 4 + 8 + 8 + 1 + 7 + DIGEST_BYTES;
/// Longest record: an anchor with all lanes and all signatures fits.
pub const MAX_RECORD_BYTES: usize = 256 << 10;
/// Longest text of a note, in bytes.
pub const MAX_TEXT: usize = 256;

const MAGIC: &[u8; 8] = b"HN4LEDG1";
const RECORD_MAGIC: &[u8; 4] = b"HN4R";
const VERSION: u8 = 1;

/// Who shares a ledger.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Scope {
    /// All copies of the volume: keys, anchors, notes of the primary.
    Shared = 1,
    /// One node: notes about its own copy, and what its inspections found.
    Local = 2,
}

/// The header of a ledger file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LedgerHeader {
    /// Who shares it.
    pub scope: Scope,
    /// The volume.
    pub volume: VolumeId,
    /// When it was created, in milliseconds since 1970.
    pub created_ms: u64,
}

impl LedgerHeader {
    fn fields(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer
            .bytes(MAGIC)
            .u8(VERSION)
            .u8(self.scope as u8)
            .bytes(&[0; 6]);
        writer.bytes(&self.volume.0).u64(self.created_ms);
        writer.finish()
    }

    /// Its hash: what record 0 names as the one before it.
    #[must_use]
    pub fn hash(&self) -> Digest {
        hash::LEDGER_HEADER.hash(&[&self.fields()])
    }

    /// The encoding, [`HEADER_BYTES`] long.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.fields();
        bytes.extend_from_slice(&self.hash().0);
        bytes
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one, or was changed.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("ledger header", bytes);
        if reader.array::<8>()? != *MAGIC {
            return Err(reader.invalid("magic"));
        }
        reader.version(VERSION)?;
        let scope = match reader.u8()? {
            1 => Scope::Shared,
            2 => Scope::Local,
            _ => return Err(reader.invalid("scope")),
        };
        if reader.array::<6>()? != [0; 6] {
            return Err(reader.invalid("reserved bytes"));
        }
        let (volume, created_ms) = (VolumeId(reader.array()?), reader.u64()?);
        let header = Self {
            scope,
            volume,
            created_ms,
        };
        if reader.digest()? != header.hash() {
            return Err(reader.invalid("checksum"));
        }
        reader.finish()?;
        Ok(header)
    }
}

/// What a note is about. The numbers are part of the encoding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Event {
    /// A group of blocks does not match its leaves.
    Damaged = 1,
    /// It was repaired, and matches again.
    Repaired = 2,
    /// A deep verify ended; `digest` is the `b3sum` of the device at the epoch.
    DeepVerified = 3,
    /// A node was promoted; `digest` is the chain hash that it adopted.
    Promoted = 4,
    /// A second history was found; `digest` is its chain hash at the epoch.
    Forked = 5,
}

impl Event {
    const ALL: [Self; 5] = [
        Self::Damaged,
        Self::Repaired,
        Self::DeepVerified,
        Self::Promoted,
        Self::Forked,
    ];
}

/// Something that happened to a copy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Note {
    /// What it is about.
    pub event: Event,
    /// Epoch that it refers to.
    pub epoch: Epoch,
    /// First sector, 0 if no place is meant.
    pub lba: Lba,
    /// Number of sectors, 0 if no place is meant.
    pub sectors: u64,
    /// A hash, as the event says; else [`Digest::ZERO`].
    pub digest: Digest,
    /// For a person: which mechanism found it, where the good copy came from. At most [`MAX_TEXT`].
    pub text: String,
}

impl Note {
    fn encode(&self, writer: &mut Writer) {
        writer
            .u8(self.event as u8)
            .u64(self.epoch.0)
            .u64(self.lba.0)
            .u64(self.sectors);
        writer.digest(&self.digest).sized(self.text.as_bytes());
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let code = reader.u8()?;
        let event = Event::ALL.into_iter().find(|event| *event as u8 == code);
        let event = event.ok_or_else(|| reader.invalid("event"))?;
        let (epoch, lba, sectors) = (Epoch(reader.u64()?), Lba(reader.u64()?), reader.u64()?);
        let digest = reader.digest()?;
        let length = reader.count(MAX_TEXT, "length of the text")?;
        let text = str::from_utf8(reader.take(length)?).map_err(|_| reader.invalid("text"))?;
        Ok(Self {
            event,
            epoch,
            lba,
            sectors,
            digest,
            text: text.to_owned(),
        })
    }
}

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// A key comes or goes.
    Key(KeyChange),
    /// A batch is anchored.
    Anchor(Box<SignedAnchor>),
    /// Something happened.
    Note(Note),
    /// The state at an anchored epoch is vouched for.
    Checkpoint(Box<SignedCheckpoint>),
    /// A node has looked at its medium.
    Inspection(Box<SignedInspection>),
}

impl Body {
    fn code(&self) -> u8 {
        match self {
            Self::Key(_) => 1,
            Self::Anchor(_) => 2,
            Self::Note(_) => 3,
            Self::Checkpoint(_) => 4,
            Self::Inspection(_) => 5,
        }
    }

    /// The keys that answer for the record: none for a note, nor for a ledger's first key.
    #[must_use]
    pub fn signers(&self) -> Vec<KeyId> {
        let signatures = match self {
            Self::Key(change) => change.authority(),
            Self::Anchor(signed) => &signed.signatures,
            Self::Checkpoint(signed) => &signed.signatures,
            Self::Inspection(signed) => &signed.signatures,
            Self::Note(_) => &[],
        };
        signatures.iter().map(Signature::key).collect()
    }

    fn encode(&self, writer: &mut Writer) {
        match self {
            Self::Key(change) => change.encode(writer),
            Self::Anchor(anchor) => anchor.encode(writer),
            Self::Note(note) => note.encode(writer),
            Self::Checkpoint(checkpoint) => checkpoint.encode(writer),
            Self::Inspection(inspection) => inspection.encode(writer),
        }
    }

    fn decode(code: u8, reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match code {
            1 => KeyChange::decode(reader).map(Self::Key),
            2 => SignedAnchor::decode(reader).map(Box::new).map(Self::Anchor),
            3 => Note::decode(reader).map(Self::Note),
            4 => SignedCheckpoint::decode(reader)
                .map(Box::new)
                .map(Self::Checkpoint),
            5 => SignedInspection::decode(reader)
                .map(Box::new)
                .map(Self::Inspection),
            _ => Err(reader.invalid("kind")),
        }
    }
}

/// A record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Its place, from 0.
    pub index: u64,
    /// When it was written, in milliseconds since 1970. Informative.
    pub time_ms: u64,
    /// Hash of the record before it; of the header, for record 0.
    pub previous: Digest,
    /// What it says.
    pub body: Body,
    /// Its hash.
    pub hash: Digest,
}

/// The bytes are no record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordError {
    /// More bytes are needed than there are.
    #[error("the record ends after {have} of {need} bytes")]
    Short {
        /// Bytes present.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// The bytes do not begin as a record, or announce an impossible length.
    #[error("no record begins here")]
    Head,
    /// The hash at the end is not the hash of what precedes it.
    #[error("the record's hash does not match its bytes")]
    Checksum,
    /// The hash matches, but this build does not understand the body.
    #[error(transparent)]
    Body(#[from] DecodeError),
}

impl Record {
    /// Encodes a record and gives its bytes.
    #[must_use]
    pub fn encode(index: u64, time_ms: u64, previous: &Digest, body: &Body) -> Vec<u8> {
        let mut inner = Writer::new();
        body.encode(&mut inner);
        let inner = inner.finish();
        let mut writer = Writer::new();
        writer
            .bytes(RECORD_MAGIC)
            .count(RECORD_HEAD_BYTES + inner.len() + DIGEST_BYTES);
        writer
            .u64(index)
            .u64(time_ms)
            .u8(body.code())
            .bytes(&[0; 7])
            .digest(previous);
        writer.bytes(&inner);
        let hash = hash::LEDGER_RECORD.hash(&[writer.as_slice()]);
        writer.digest(&hash);
        writer.finish()
    }

    /// Length of the record that begins with `head`, at least [`RECORD_HEAD_BYTES`] of it.
    ///
    /// # Errors
    /// [`RecordError::Head`] if none does.
    pub fn length(head: &[u8]) -> Result<usize, RecordError> {
        let mut reader = Reader::new("ledger record", head);
        if reader.array::<4>().map_err(|_| RecordError::Head)? != *RECORD_MAGIC {
            return Err(RecordError::Head);
        }
        let length = reader
            .count(MAX_RECORD_BYTES, "length")
            .map_err(|_| RecordError::Head)?;
        let least = RECORD_HEAD_BYTES + DIGEST_BYTES;
        if length < least {
            Err(RecordError::Head)
        } else {
            Ok(length)
        }
    }

    /// Reads the record at the beginning of `bytes`, and says how long it is.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), RecordError> {
        let length = Self::length(bytes)?;
        let (have, need) = (bytes.len() as u64, length as u64);
        let record = bytes
            .get(..length)
            .ok_or(RecordError::Short { have, need })?;
        let (covered, hash) = record.split_at(length - DIGEST_BYTES);
        if hash::LEDGER_RECORD.hash(&[covered]).0 != hash {
            return Err(RecordError::Checksum);
        }
        let mut reader = Reader::new("ledger record", covered);
        reader.take(8)?;
        let (index, time_ms, code) = (reader.u64()?, reader.u64()?, reader.u8()?);
        if reader.array::<7>()? != [0; 7] {
            return Err(reader.invalid("reserved bytes").into());
        }
        let previous = reader.digest()?;
        let body = Body::decode(code, &mut reader)?;
        reader.finish()?;
        let hash = Digest(hash.try_into().map_err(|_| RecordError::Checksum)?);
        Ok((
            Self {
                index,
                time_ms,
                previous,
                body,
                hash,
            },
            length,
        ))
    }
}

#[cfg(test)]
pub(crate) mod tests;
