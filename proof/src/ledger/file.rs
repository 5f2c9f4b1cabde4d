//! A ledger on a medium: appending, finding a record, setting a superseded tail aside.
//!
//! **Invariant:** what [`LedgerFile::append`] returned from is durable. Nothing is overwritten: a
//! tail that a new primary superseded, or a ledger that cannot be used, is set aside first.
//!
//! Memory is one offset for every 64 records.

use std::io;

use hn4::types::VolumeId;

use super::scan::{Records, ScanError, TornTail, recover};
use super::verify::{Policy, Verifier};
use super::{HEADER_BYTES, LedgerHeader, Record, Scope};
use crate::hash::Digest;
use crate::tree::ReadAt;

/// An offset is remembered for every so many records.
const STRIDE: u64 = 64;

/// A file, or what stands for one.
pub trait LedgerMedium: ReadAt {
    /// Writes at the end, which is at `offset`, and makes it durable.
    ///
    /// # Errors
    /// What the medium says; nothing may be believed of what lies behind `offset` then.
    fn append(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Keeps a copy of everything from `offset` on elsewhere, then cuts it off; both durable.
    ///
    /// # Errors
    /// What the medium says.
    fn set_aside(&mut self, offset: u64) -> io::Result<()>;

    /// Cuts off everything from `offset` on, which a crash left of an append; durable.
    ///
    /// # Errors
    /// What the medium says.
    fn cut(&mut self, offset: u64) -> io::Result<()>;
}

/// A medium in memory, for simulations and tests.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MemoryMedium {
    /// What a file would hold.
    pub bytes: Vec<u8>,
    /// What was set aside.
    pub aside: Vec<Vec<u8>>,
}

impl ReadAt for MemoryMedium {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(buffer.len());
        let bytes = self.bytes.get(start..end);
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl LedgerMedium for MemoryMedium {
    fn append(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.cut(offset)?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn set_aside(&mut self, offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let tail = self.bytes.split_off(at.min(self.bytes.len()));
        self.aside.push(tail);
        Ok(())
    }

    fn cut(&mut self, offset: u64) -> io::Result<()> {
        self.bytes
            .truncate(usize::try_from(offset).unwrap_or(usize::MAX));
        Ok(())
    }
}

/// See the module.
#[derive(Debug)]
pub struct LedgerFile<M> {
    medium: M,
    volume: VolumeId,
    header: Option<LedgerHeader>,
    offsets: Vec<u64>,
    records: u64,
    end: u64,
    torn_bytes: u64,
}

/// A ledger, what to append to if there is anything, and what a crash had left of an append.
pub type Opened<M> = (LedgerFile<M>, Option<Verifier>, Option<TornTail>);

impl<M: LedgerMedium> LedgerFile<M> {
    /// Opens the shared ledger of a volume.
    ///
    /// # Errors
    /// [`ScanError`] together with the medium, if the ledger is damaged.
    pub fn open(medium: M, volume: VolumeId) -> Result<Opened<M>, (M, ScanError)> {
        let mut file = Self {
            medium,
            volume,
            header: None,
            offsets: Vec::new(),
            records: 0,
            end: 0,
            torn_bytes: 0,
        };
        match file.load() {
            Ok((tip, torn)) => {
                file.torn_bytes = torn.map_or(0, |torn| torn.bytes);
                Ok((file, tip, torn))
            }
            Err(error) => Err((file.medium, error)),
        }
    }

    fn load(&mut self) -> Result<(Option<Verifier>, Option<TornTail>), ScanError> {
        (self.header, self.records, self.end) = (None, 0, 0);
        self.offsets.clear();
        let length = self.medium.len_bytes()?;
        if length == 0 {
            return Ok((None, None));
        }
        let scope = (Scope::Shared, self.volume);
        let recovered = recover(&self.medium, scope, Policy::default(), None)?;
        if let Some(torn) = recovered.torn {
            self.medium.cut(torn.offset)?;
        }
        let mut records = Records::new(&self.medium)?;
        self.header = Some(*records.header());
        for index in 0..recovered.tip.next_index() {
            if index.is_multiple_of(STRIDE) {
                self.offsets.push(records.offset());
            }
            // They were whole a moment ago.
            if !records.skip_record()? {
                return Err(ScanError::Lost {
                    size: index,
                    known: recovered.tip.next_index(),
                });
            }
        }
        (self.records, self.end) = (recovered.tip.next_index(), recovered.end);
        Ok((Some(recovered.tip), recovered.torn))
    }

    /// The header, once there is a ledger.
    #[must_use]
    pub fn header(&self) -> Option<&LedgerHeader> {
        self.header.as_ref()
    }

    /// How many records there are.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.records
    }

    /// How long the tail was that was cut off when the ledger was opened.
    #[must_use]
    pub fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }

    /// What the ledger lies on.
    #[must_use]
    pub fn medium(&self) -> &M {
        &self.medium
    }

    /// Sets aside what is there, and begins anew.
    ///
    /// # Errors
    /// What the medium says.
    pub fn renew(&mut self, header: &LedgerHeader) -> io::Result<Verifier> {
        if self.medium.len_bytes()? > 0 {
            self.medium.set_aside(0)?;
        }
        self.offsets.clear();
        (self.header, self.records, self.end) = (None, 0, 0);
        self.medium.append(0, &header.encode())?;
        (self.header, self.end) = (Some(*header), HEADER_BYTES as u64);
        Ok(Verifier::new(header, Policy::default()))
    }

    /// Appends whole records, which a verifier has taken, with one flush.
    ///
    /// # Errors
    /// What the medium says; the file must be opened anew then.
    pub fn append(&mut self, records: &[Vec<u8>]) -> io::Result<()> {
        self.medium.append(self.end, &records.concat())?;
        for record in records {
            if self.records.is_multiple_of(STRIDE) {
                self.offsets.push(self.end);
            }
            self.records += 1;
            self.end += record.len() as u64;
        }
        Ok(())
    }

    /// Keeps the first `records`, sets the rest aside, and gives the tip as it is then.
    ///
    /// # Errors
    /// [`ScanError`].
    pub fn cut(&mut self, records: u64) -> Result<Option<Verifier>, ScanError> {
        if let Some((offset, _)) = self.find(records)? {
            self.medium.set_aside(offset)?;
        }
        Ok(self.load()?.0)
    }

    /// The tip as it was after the first `records`; `None` if there is no ledger.
    ///
    /// # Errors
    /// [`ScanError`] if one of them has been damaged since it was written.
    pub fn tip_at(&self, records: u64) -> Result<Option<Verifier>, ScanError> {
        let Some(header) = &self.header else {
            return Ok(None);
        };
        let mut tip = Verifier::new(header, Policy::default());
        let mut all = Records::new(&self.medium)?;
        while tip.next_index() < records.min(self.records) {
            let (index, offset) = (tip.next_index(), all.offset());
            let lost = ScanError::Lost {
                size: index,
                known: self.records,
            };
            let record = all.next_record()?.ok_or(lost)?;
            let record = record.map_err(|reason| ScanError::Damaged {
                index,
                offset,
                reason,
            })?;
            tip.push(&record)?;
        }
        Ok(Some(tip))
    }

    /// Where a record lies, and how long it is; `None` if there is none.
    fn find(&self, index: u64) -> Result<Option<(u64, Record)>, ScanError> {
        if index >= self.records {
            return Ok(None);
        }
        let slot = usize::try_from(index / STRIDE).unwrap_or(usize::MAX);
        let Some(&offset) = self.offsets.get(slot) else {
            return Ok(None);
        };
        let mut records = Records::new(&self.medium)?.starting_at(offset);
        for _ in 0..index % STRIDE {
            if !records.skip_record()? {
                break;
            }
        }
        let at = records.offset();
        match records.next_record()? {
            Some(Ok(record)) if record.index == index => Ok(Some((at, record))),
            Some(Err(reason)) => Err(ScanError::Damaged {
                index,
                offset: at,
                reason,
            }),
            Some(Ok(_)) | None => Ok(None),
        }
    }

    /// Hash of a record.
    ///
    /// # Errors
    /// [`ScanError`] if it has been damaged since it was written.
    pub fn hash_of(&self, index: u64) -> Result<Option<Digest>, ScanError> {
        Ok(self.find(index)?.map(|(_, record)| record.hash))
    }

    /// Whole records from `index` on: as many as fit into so many bytes, but one at least.
    ///
    /// # Errors
    /// [`ScanError`] if one has been damaged since it was written.
    pub fn read(&self, index: u64, most_bytes: usize) -> Result<Vec<u8>, ScanError> {
        let mut bytes = Vec::new();
        let Some((offset, _)) = self.find(index)? else {
            return Ok(bytes);
        };
        let mut records = Records::new(&self.medium)?.starting_at(offset);
        while records.offset() < self.end
            && let Some(Ok(_)) = records.next_record()?
        {
            if !bytes.is_empty() && bytes.len() + records.bytes().len() > most_bytes {
                break;
            }
            bytes.extend_from_slice(records.bytes());
        }
        Ok(bytes)
    }
}
