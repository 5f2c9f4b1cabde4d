//! Reading a ledger file in O(1) memory, and telling a torn tail from damage.
//!
//! A record that does not check out is a *torn tail* only if nothing valid follows it and the
//! file's owner did not know of more: then it is what a crash left of an append, and nobody was
//! told of it. If a valid record follows, or the ledger was known to be longer, it is *damage*: the
//! ledger is not cut, and its records are fetched from another copy.

use hn4::types::VolumeId;

use super::verify::{LedgerError, Policy, Verifier};
use super::{HEADER_BYTES, LedgerHeader, MAX_RECORD_BYTES, RECORD_HEAD_BYTES, RECORD_MAGIC};
use super::{Record, RecordError, Scope};
use crate::codec::DecodeError;
use crate::fold::{ConsistencyProof, Head, InclusionProof, Kind, ProofBuilder};
use crate::tree::ReadAt;

/// Why a ledger file cannot be used as it is.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The medium failed.
    #[error("cannot read the ledger: {0}")]
    Io(#[from] std::io::Error),
    /// The header is damaged, or not a ledger's.
    #[error("the ledger's header is damaged: {0}; fetch the ledger from a peer")]
    Header(DecodeError),
    /// The ledger of another volume or scope.
    #[error("this is the {0:?} ledger of volume {1}")]
    Foreign(Scope, VolumeId),
    /// A record is damaged although history goes on behind it.
    #[error("record {index} at byte {offset} is damaged: {reason}; fetch the ledger from a peer")]
    Damaged {
        /// The record.
        index: u64,
        /// Where it begins.
        offset: u64,
        /// What is wrong with it.
        reason: RecordError,
    },
    /// The records are whole, but break the rules.
    #[error(transparent)]
    Rule(#[from] LedgerError),
    /// The ledger is shorter than it was known to be, or has another history.
    #[error(
        "the ledger has {size} records, not the {known} it was known to have; fetch it from a peer"
    )]
    Lost {
        /// Records found.
        size: u64,
        /// Records known.
        known: u64,
    },
}

/// What a crash left behind the last whole record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TornTail {
    /// Where it begins: the file is cut here.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
    /// What is wrong with it.
    pub reason: RecordError,
}

/// A ledger file as it was found.
#[derive(Debug)]
pub struct Recovered {
    /// The tip to append to.
    pub tip: Verifier,
    /// Where the next record goes.
    pub end: u64,
    /// Bytes to cut off first.
    pub torn: Option<TornTail>,
}

/// Iterates over the records of a file.
#[derive(Debug)]
pub struct Records<'a, R> {
    source: &'a R,
    header: LedgerHeader,
    offset: u64,
    length: u64,
    buffer: Vec<u8>,
}

impl<'a, R: ReadAt> Records<'a, R> {
    /// Starts at record 0.
    ///
    /// # Errors
    /// [`ScanError::Header`], [`ScanError::Io`].
    pub fn new(source: &'a R) -> Result<Self, ScanError> {
        let length = source.len_bytes()?;
        let mut header = [0; HEADER_BYTES];
        let have = usize::try_from(length)
            .unwrap_or(usize::MAX)
            .min(HEADER_BYTES);
        source.read_at(0, &mut header[..have])?;
        let header = LedgerHeader::decode(&header[..have]).map_err(ScanError::Header)?;
        Ok(Self {
            source,
            header,
            offset: HEADER_BYTES as u64,
            length,
            buffer: Vec::new(),
        })
    }

    /// Goes on at a byte offset at which a record is known to begin.
    #[must_use]
    pub(crate) fn starting_at(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &LedgerHeader {
        &self.header
    }

    /// Where the next record begins.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next record; `None` at the end of the file. After an error the position is unchanged.
    pub fn next_record(&mut self) -> Result<Option<Result<Record, RecordError>>, ScanError> {
        if self.offset >= self.length {
            return Ok(None);
        }
        let found = read_record(self.source, self.offset, self.length, &mut self.buffer)?;
        if found.is_ok() {
            self.offset += self.buffer.len() as u64;
        }
        Ok(Some(found))
    }

    /// Passes over a record that was whole when it was written: only its length is looked at.
    /// Returns whether there was one.
    pub(crate) fn skip_record(&mut self) -> Result<bool, ScanError> {
        let mut head = [0; RECORD_HEAD_BYTES];
        if self.offset + RECORD_HEAD_BYTES as u64 > self.length {
            return Ok(false);
        }
        self.source.read_at(self.offset, &mut head)?;
        let length = Record::length(&head).unwrap_or(usize::MAX) as u64;
        let is_whole = length <= self.length - self.offset;
        self.offset += if is_whole { length } else { 0 };
        Ok(is_whole)
    }

    /// The bytes of the record that was read last.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer
    }
}

fn read_record<R: ReadAt>(
    source: &R,
    offset: u64,
    end: u64,
    buffer: &mut Vec<u8>,
) -> Result<Result<Record, RecordError>, ScanError> {
    let have = end - offset;
    let head = (RECORD_HEAD_BYTES as u64).min(have);
    buffer.resize(usize::try_from(head).unwrap_or(RECORD_HEAD_BYTES), 0);
    source.read_at(offset, buffer)?;
    let need = match Record::length(buffer) {
        Ok(need) => need,
        Err(error) => return Ok(Err(error)),
    };
    if (need as u64) > have {
        return Ok(Err(RecordError::Short {
            have,
            need: need as u64,
        }));
    }
    buffer.resize(need, 0);
    source.read_at(offset, buffer)?;
    Ok(Record::decode(buffer).map(|(record, _)| record))
}

/// Whether a whole record begins anywhere in `from..end`.
fn has_record_after<R: ReadAt>(source: &R, from: u64, end: u64) -> Result<bool, ScanError> {
    const WINDOW: u64 = 64 << 10;
    let mut at = from;
    let mut buffer = Vec::with_capacity(MAX_RECORD_BYTES);
    while at < end {
        // Windows overlap by three bytes, so that no magic number hides between two.
        let length = (end - at).min(WINDOW + 3);
        let mut window = vec![0; usize::try_from(length).unwrap_or(0)];
        source.read_at(at, &mut window)?;
        for (start, bytes) in (at..).zip(window.windows(RECORD_MAGIC.len())) {
            if bytes == RECORD_MAGIC && read_record(source, start, end, &mut buffer)?.is_ok() {
                return Ok(true);
            }
        }
        at += WINDOW;
    }
    Ok(false)
}

/// Verifies a ledger file, rules and signatures, and finds its end. `known` is the head that the
/// caller remembers, from its own state or from a peer.
///
/// # Errors
/// [`ScanError`]. Nothing may be appended or cut then.
pub fn recover<R: ReadAt>(
    source: &R,
    (scope, volume): (Scope, VolumeId),
    policy: Policy,
    known: Option<Head>,
) -> Result<Recovered, ScanError> {
    let mut records = Records::new(source)?;
    let header = records.header;
    if (header.scope, header.volume) != (scope, volume) {
        return Err(ScanError::Foreign(header.scope, header.volume));
    }
    let mut tip = Verifier::new(&header, policy);
    if let Some(head) = known {
        tip = tip.pinned_to(head);
    }
    let mut torn = None;
    while let Some(found) = records.next_record()? {
        let (offset, index) = (records.offset, tip.next_index());
        match found {
            Ok(record) => tip.push(&record)?,
            // The bytes are as they were written, so no crash left them.
            Err(reason @ RecordError::Body(_)) => {
                return Err(ScanError::Damaged {
                    index,
                    offset,
                    reason,
                });
            }
            Err(reason) if has_record_after(source, offset + 1, records.length)? => {
                return Err(ScanError::Damaged {
                    index,
                    offset,
                    reason,
                });
            }
            Err(reason) => {
                torn = Some(TornTail {
                    offset,
                    bytes: records.length - offset,
                    reason,
                });
                break;
            }
        }
    }
    let (size, known) = (tip.next_index(), known.map_or(0, |head| head.size));
    if size < known {
        return Err(ScanError::Lost { size, known });
    }
    Ok(Recovered {
        tip,
        end: records.offset,
        torn,
    })
}

/// Proof that record `index` is in the ledger of the first `size` records. Reads the file once.
///
/// # Errors
/// [`ScanError::Lost`] if there are not so many records, and the others.
pub fn prove_inclusion<R: ReadAt>(
    source: &R,
    index: u64,
    size: u64,
) -> Result<InclusionProof, ScanError> {
    let builder = ProofBuilder::inclusion(Kind::Ledger, index, size);
    let mut builder = builder.ok_or(ScanError::Lost { size, known: index })?;
    let fed = feed(source, size, &mut builder)?;
    builder.finish_inclusion().map_err(|_| ScanError::Lost {
        size: fed,
        known: size,
    })
}

/// Proof that the ledger of the first `size` records begins with its first `old_size`. Reads the
/// file once.
///
/// # Errors
/// [`ScanError::Lost`] if there are not so many records, and the others.
pub fn prove_consistency<R: ReadAt>(
    source: &R,
    old_size: u64,
    size: u64,
) -> Result<ConsistencyProof, ScanError> {
    let builder = ProofBuilder::consistency(Kind::Ledger, old_size, size);
    let mut builder = builder.ok_or(ScanError::Lost {
        size,
        known: old_size,
    })?;
    let fed = feed(source, size, &mut builder)?;
    builder.finish_consistency().map_err(|_| ScanError::Lost {
        size: fed,
        known: size,
    })
}

fn feed<R: ReadAt>(source: &R, size: u64, builder: &mut ProofBuilder) -> Result<u64, ScanError> {
    let mut records = Records::new(source)?;
    for index in 0..size {
        let offset = records.offset;
        match records.next_record()? {
            None => return Ok(index),
            Some(Ok(record)) => builder.push(record.hash),
            Some(Err(reason)) => {
                return Err(ScanError::Damaged {
                    index,
                    offset,
                    reason,
                });
            }
        }
    }
    Ok(size)
}
