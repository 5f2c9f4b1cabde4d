//! Attach records: which log belongs to which backing on this node.
//!
//! A backing alone cannot say that a log with epochs that it lacks exists. So the state directory
//! remembers, for each volume, where its log and backing were when it was last open, and whether
//! the log may hold what the backing does not. Opening another combination, or making a new log for
//! such a backing, is refused until the operator has said what is meant.
//!
//! **Invariants:** `undestaged` is set durably before a volume is opened, and cleared only after it
//! was closed with everything in its backing. Paths are compared as configured and, if that
//! differs, by what they lead to now, so that stable names of devices (`/dev/disk/by-id/...`) stay
//! valid across restarts.
//!
//! **Limit:** who loses the state directory as well as the log has no warning left but the peers.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hn4::log::{LogHeader, LogIdentity, Superblock};
use hn4::types::{Epoch, VolumeId};
use hn4_engine::core::recovery::{self, RecoveryError};
use hn4_engine::device::{Device, DeviceError, DeviceOptions};
use hn4_engine::shard::DeviceMedium;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::VolumeSection;
use super::state::{self, NodeState, STATE_FORMAT, StateError};

/// Records that are looked at; more than any node can have.
const RECORDS_MAX: usize = 4096;

/// What the node remembers of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttachRecord {
    /// The volume.
    pub volume: VolumeId,
    /// Drawn when the volume was created.
    pub birth_nonce: [u8; 16],
    /// Its name in the configuration, for messages.
    pub name: String,
    /// Where its log was.
    pub log: PathBuf,
    /// Where its backing was.
    pub backing: PathBuf,
    /// The log may hold epochs that the backing lacks.
    pub undestaged: bool,
    /// The backing held this epoch when the volume was last opened; a later one by now.
    pub applied: Epoch,
}

/// The record as it lies in its file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordFile {
    format: u32,
    volume: String,
    birth_nonce: String,
    name: String,
    log: String,
    backing: String,
    undestaged: bool,
    #[serde(default)]
    applied_epoch: u64,
}

/// Why a volume is not opened, or not created.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// Log or backing cannot be used as a device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The log is damaged, or there is none on the device.
    #[error("{log}: {source}")]
    Log {
        /// The log.
        log: String,
        /// What is wrong.
        source: RecoveryError,
    },
    /// A system call.
    #[error("{path}: {source}")]
    Os {
        /// What it was about.
        path: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// The recorded log is gone.
    #[error(
        "volume \"{name}\": there is no usable log at {log} ({why}), but the state directory \
         knows {record}. Bring that log back and set log to its path; or create this copy anew \
         from a peer, with `hn4ctl volume forget {}` and `hn4ctl volume create --replica`; or, if \
         there is no other copy, give up what only the log held and keep the backing as it is, \
         which may be torn after epoch {}: `hn4ctl volume adopt {name} --discard-log {}`",
        record.volume, record.applied.0, record.applied.0
    )]
    LogMissing {
        /// Name of the volume.
        name: String,
        /// Where the log should be.
        log: String,
        /// What was found there.
        why: String,
        /// What is remembered of the backing.
        record: Box<AttachRecord>,
    },
    /// The backing belongs to another volume.
    #[error(
        "volume \"{name}\": the log at {log} is of volume {found}, but its backing is known as \
         that of {record}. Set log to the right path. If the other volume is really given up, name \
         it: `hn4ctl volume forget {}`",
        record.volume
    )]
    OtherLog {
        /// Name of the volume.
        name: String,
        /// The configured log.
        log: String,
        /// Whose log that is.
        found: VolumeId,
        /// What is remembered of the backing.
        record: Box<AttachRecord>,
    },
    /// Log or backing of a known volume stand elsewhere now.
    #[error(
        "volume \"{name}\" ({volume}): its {part} was {was} when it was last open, now it is \
         {now}. If that is the same {part} under another name, say so with `hn4ctl volume \
         reattach {name}`; a copy or an older state of it must not be used"
    )]
    Moved {
        /// Name of the volume.
        name: String,
        /// The volume.
        volume: VolumeId,
        /// Log or backing.
        part: &'static str,
        /// Where it was.
        was: String,
        /// Where it is configured to be.
        now: String,
    },
    /// A new log is wanted for a backing that has one.
    #[error(
        "this backing belongs to {record} already. To give that volume up on this node, name it: \
         `hn4ctl volume forget {}`",
        record.volume
    )]
    Attached {
        /// What is remembered of the backing.
        record: Box<AttachRecord>,
    },
    /// What is to be given up was not named rightly.
    #[error(
        "volume \"{name}\": --discard-log {named} does not fit what is remembered of its backing: \
         {}. Nothing was changed",
        what_is_known(record.as_deref())
    )]
    WrongEpoch {
        /// Name of the volume.
        name: String,
        /// The epoch on the command line.
        named: u64,
        /// What is remembered of the backing.
        record: Option<Box<AttachRecord>>,
    },
    /// The log that is to be given up is there.
    #[error(
        "volume \"{name}\": its log {log} is there and is usable. Start hn4-replicad; nothing has \
         to be given up"
    )]
    LogIsThere {
        /// Name of the volume.
        name: String,
        /// The log.
        log: String,
    },
    /// There is no record to be forgotten.
    #[error("the state directory knows no volume {0}; `hn4ctl volume list` shows what it knows")]
    Unknown(VolumeId),
}

fn what_is_known(record: Option<&AttachRecord>) -> String {
    match record {
        Some(record) => format!("{record}; the epoch to be named is {}", record.applied.0),
        None => "nothing; adopt it without --discard-log".to_owned(),
    }
}

impl fmt::Display for AttachRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { volume, name, .. } = self;
        let (log, backing) = (self.log.display(), self.backing.display());
        write!(
            f,
            "volume {volume} (\"{name}\") with backing {backing} and log {log}, "
        )?;
        f.write_str(if self.undestaged {
            "which may hold acknowledged writes that the backing lacks"
        } else {
            "from which everything had been written back"
        })
    }
}

impl AttachRecord {
    /// The record of a volume that is configured like this and whose log says `identity`.
    #[must_use]
    pub fn new(section: &VolumeSection, identity: &LogIdentity, undestaged: bool) -> Self {
        Self {
            volume: identity.volume,
            birth_nonce: identity.birth_nonce,
            name: section.name.clone(),
            log: section.log.clone(),
            backing: section.backing.clone(),
            undestaged,
            applied: Epoch(0),
        }
    }

    /// The same, with what the backing holds at least.
    #[must_use]
    pub fn with_applied(self, applied: Epoch) -> Self {
        Self { applied, ..self }
    }

    fn is_of(&self, identity: &LogIdentity) -> bool {
        self.volume == identity.volume && self.birth_nonce == identity.birth_nonce
    }

    fn path(&self, state: &NodeState) -> PathBuf {
        state.attach_folder().join(format!("{}.json", self.volume))
    }

    fn to_text(&self) -> String {
        state::to_json(&RecordFile {
            format: STATE_FORMAT,
            volume: self.volume.to_string(),
            birth_nonce: VolumeId(self.birth_nonce).to_string(),
            name: self.name.clone(),
            log: self.log.to_string_lossy().into_owned(),
            backing: self.backing.to_string_lossy().into_owned(),
            undestaged: self.undestaged,
            applied_epoch: self.applied.0,
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: RecordFile = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if file.format != STATE_FORMAT {
            return Err(format!("it has format {}", file.format));
        }
        let id = |text: &str| {
            text.parse::<VolumeId>()
                .map_err(|error| format!("{text:?}: {error}"))
        };
        Ok(Self {
            volume: id(&file.volume)?,
            birth_nonce: id(&file.birth_nonce)?.0,
            name: file.name,
            log: file.log.into(),
            backing: file.backing.into(),
            undestaged: file.undestaged,
            applied: Epoch(file.applied_epoch),
        })
    }
}

/// Whether two paths lead to the same thing now.
fn same_place(a: &Path, b: &Path) -> bool {
    a == b
        || a.canonicalize()
            .ok()
            .zip(b.canonicalize().ok())
            .is_some_and(|(a, b)| a == b)
}

/// All records of the node.
///
/// # Errors
/// If the state directory cannot be read, or a record is damaged.
pub fn attach_records(state: &NodeState) -> Result<Vec<AttachRecord>, StateError> {
    let folder = state.attach_folder();
    let entries = std::fs::read_dir(&folder).map_err(StateError::os("reading", &folder))?;
    let mut records = Vec::new();
    for entry in entries.take(RECORDS_MAX) {
        let path = entry.map_err(StateError::os("reading", &folder))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue; // What an interrupted write left.
        }
        let Some(text) = state::read(&path)? else {
            continue; // It was forgotten in this moment.
        };
        let record =
            AttachRecord::parse(&text).map_err(|why| StateError::Unreadable { path, why })?;
        records.push(record);
    }
    records.sort_by(|a, b| (&a.name, a.volume).cmp(&(&b.name, b.volume)));
    Ok(records)
}

/// Makes a record durable, in the place of an earlier one of the volume.
///
/// # Errors
/// If the state directory cannot be written.
pub fn attach_record_put(state: &NodeState, record: &AttachRecord) -> Result<(), StateError> {
    state::replace(&record.path(state), &record.to_text())
}

/// Forgets a volume. Touches neither its log nor its backing.
///
/// # Errors
/// If there is no such record, or it cannot be removed.
pub fn attach_record_forget(
    state: &NodeState,
    volume: VolumeId,
) -> Result<AttachRecord, AttachError> {
    let records = attach_records(state)?;
    let record = records
        .into_iter()
        .find(|record| record.volume == volume)
        .ok_or(AttachError::Unknown(volume))?;
    state::remove(&record.path(state))?;
    Ok(record)
}

/// Checks that a volume's log, as it was found, may be opened with its backing. `Err` in `found`
/// says why there is no usable log.
///
/// # Errors
/// [`AttachError`] says what is remembered otherwise, and what to do.
pub fn attach_record_check(
    state: &NodeState,
    section: &VolumeSection,
    found: Result<&LogIdentity, &str>,
) -> Result<(), AttachError> {
    let text = |path: &Path| path.display().to_string();
    let records = attach_records(state)?;
    let mut on_backing = records
        .iter()
        .filter(|record| same_place(&record.backing, &section.backing));
    let identity = match found {
        Ok(identity) => identity,
        Err(why) => {
            let on_log = || {
                records
                    .iter()
                    .find(|record| same_place(&record.log, &section.log))
            };
            let Some(record) = on_backing.next().or_else(on_log) else {
                return Ok(());
            };
            return Err(AttachError::LogMissing {
                name: section.name.clone(),
                log: text(&section.log),
                why: why.to_owned(),
                record: Box::new(record.clone()),
            });
        }
    };
    if let Some(record) = on_backing.find(|record| !record.is_of(identity)) {
        return Err(AttachError::OtherLog {
            name: section.name.clone(),
            log: text(&section.log),
            found: identity.volume,
            record: Box::new(record.clone()),
        });
    }
    let Some(record) = records.iter().find(|record| record.is_of(identity)) else {
        return Ok(());
    };
    let parts = [
        ("log", &record.log, &section.log),
        ("backing", &record.backing, &section.backing),
    ];
    for (part, was, now) in parts {
        if !same_place(was, now) {
            return Err(AttachError::Moved {
                name: section.name.clone(),
                volume: record.volume,
                part,
                was: text(was),
                now: text(now),
            });
        }
    }
    Ok(())
}

/// Refuses a backing that is known to have a log.
///
/// # Errors
/// [`AttachError::Attached`] names that log.
pub fn refuse_attached(state: &NodeState, backing: &Path) -> Result<(), AttachError> {
    let records = attach_records(state)?;
    match records
        .into_iter()
        .find(|record| same_place(&record.backing, backing))
    {
        None => Ok(()),
        Some(record) => Err(AttachError::Attached {
            record: Box::new(record),
        }),
    }
}

/// The record of a backing whose log is lost and given up: what it held after `named`, which must
/// be the epoch that is remembered. The caller makes the new log, then forgets the record.
///
/// # Errors
/// If another epoch is remembered, or the log is there after all.
pub fn discard_log(
    state: &NodeState,
    section: &VolumeSection,
    named: Epoch,
) -> Result<AttachRecord, AttachError> {
    let mut records = attach_records(state)?.into_iter();
    let record = match records.find(|record| same_place(&record.backing, &section.backing)) {
        Some(record) if record.applied == named => record,
        record => {
            return Err(AttachError::WrongEpoch {
                name: section.name.clone(),
                named: named.0,
                record: record.map(Box::new),
            });
        }
    };
    let old = VolumeSection {
        log: record.log.clone(),
        ..section.clone()
    };
    let found = inspect_log(&old, section.log_options());
    if found.is_ok_and(|(header, _)| record.is_of(&header.identity)) {
        return Err(AttachError::LogIsThere {
            name: section.name.clone(),
            log: record.log.display().to_string(),
        });
    }
    Ok(record)
}

/// Reads header and superblock of a volume's log, changing nothing.
///
/// # Errors
/// If the log cannot be opened (a running daemon has it locked), or there is none.
pub fn inspect_log(
    section: &VolumeSection,
    options: DeviceOptions,
) -> Result<(LogHeader, Superblock), AttachError> {
    let options = DeviceOptions {
        read_only: true,
        ..options
    };
    let device = Device::open(&section.log, options)?;
    let log = section.log.display().to_string();
    let mut medium = DeviceMedium::new(&device).map_err(|source| AttachError::Os {
        path: log.clone(),
        source,
    })?;
    let (header, superblock, _) =
        recovery::inspect(&mut medium).map_err(|source| AttachError::Log { log, source })?;
    Ok((header, superblock))
}

/// Before the engine opens a volume: checks log and backing, see [`check_before_open`], and
/// remembers durably that the log may hold more than the backing from now on.
///
/// # Errors
/// [`AttachError`] says what is wrong and what to do.
pub fn begin(
    state: &NodeState,
    section: &VolumeSection,
    lock_patience: Duration,
) -> Result<LogIdentity, AttachError> {
    let (header, superblock) = check_before_open(state, section, lock_patience)?;
    let record = AttachRecord::new(section, &header.identity, true);
    attach_record_put(state, &record.with_applied(superblock.checkpoint))?;
    Ok(header.identity)
}

/// After a volume was closed with everything in its backing (applied epoch = tip): remembers that
/// its log holds nothing more.
///
/// # Errors
/// If the state directory cannot be read or written.
pub fn end(
    state: &NodeState,
    section: &VolumeSection,
    identity: &LogIdentity,
) -> Result<(), StateError> {
    let records = attach_records(state)?;
    let old = records.iter().find(|record| record.is_of(identity));
    let applied = old.map_or(Epoch(0), |record| record.applied);
    let record = AttachRecord::new(section, identity, false);
    attach_record_put(state, &record.with_applied(applied))
}

/// All that is to be checked before the engine opens a volume: its log is there and is the one that
/// this node remembers. Gives the log's header and superblock. `lock_patience` is for a predecessor
/// that is about to let go of the log.
///
/// # Errors
/// [`AttachError`] says what is wrong and what to do; nothing was changed.
pub fn check_before_open(
    state: &NodeState,
    section: &VolumeSection,
    lock_patience: Duration,
) -> Result<(LogHeader, Superblock), AttachError> {
    let options = DeviceOptions {
        lock_patience,
        ..section.log_options()
    };
    match inspect_log(section, options) {
        Ok((header, superblock)) => {
            attach_record_check(state, section, Ok(&header.identity))?;
            Ok((header, superblock))
        }
        Err(error) => {
            let is_missing = match &error {
                AttachError::Device(DeviceError::Os { source, .. }) => {
                    source.kind() == std::io::ErrorKind::NotFound
                }
                AttachError::Device(DeviceError::Empty { .. }) => true,
                AttachError::Log { source, .. } => matches!(source, RecoveryError::Header(_)),
                _ => false,
            };
            if is_missing {
                attach_record_check(state, section, Err(&error.to_string()))?;
            }
            Err(error)
        }
    }
}
