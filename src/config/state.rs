//! The node's state directory: who this node is.
//!
//! ```text
//! <state_dir>/node.json           the node id, drawn once
//! <state_dir>/peers.json          which node each peer has been, see `identities`
//! <state_dir>/attach/<uuid>.json  one record for each volume, see `attach`
//! <state_dir>/keys/               what the node signs with, see `keys`
//! <state_dir>/proof/<uuid>/       the ledger of each volume
//! ```
//!
//! **Invariant:** a file here is replaced as a whole and durably, or not at all. The node id never
//! changes: it stands in every term that this node was primary in.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hn4::types::NodeId;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Version of the files in the state directory.
pub(super) const STATE_FORMAT: u32 = 1;
/// Largest file that is read here, in bytes, unless its module says another size.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Why the state directory cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// A file or folder.
    #[error("state directory: {doing} {}: {source}", path.display())]
    Os {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// A file that this program did not write, or that is damaged.
    #[error(
        "state directory: {} cannot be understood: {why}. Restore it from a backup; do not delete \
         it: it says what this node has promised",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The system gave no random numbers.
    #[error("the system gives no random numbers")]
    Random,
}

impl StateError {
    pub(super) fn os(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Os {
            doing,
            path,
            source,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeFile {
    format: u32,
    node_id: String,
}

/// The open state directory of a node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeState {
    /// This node.
    pub node_id: NodeId,
    directory: PathBuf,
}

/// 16 random bytes.
///
/// # Errors
/// If the system gives none.
pub fn random_bytes() -> Result<[u8; 16], StateError> {
    let mut bytes = [0; 16];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| StateError::Random)?;
    Ok(bytes)
}

/// A random UUID, version 4.
///
/// # Errors
/// If the system gives no random numbers.
pub fn random_uuid() -> Result<[u8; 16], StateError> {
    let mut bytes = random_bytes()?;
    bytes[6] = (bytes[6] & 0x0F) | 0x40;
    bytes[8] = (bytes[8] & 0x3F) | 0x80;
    Ok(bytes)
}

impl NodeState {
    /// Opens the state directory; makes it, and draws the node's id, if it is not there.
    ///
    /// # Errors
    /// If it cannot be read or written, or holds something that is not understood.
    pub fn open_or_create(directory: &Path) -> Result<Self, StateError> {
        let attach = directory.join("attach");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&attach)
            .map_err(StateError::os("making", &attach))?;
        let path = directory.join("node.json");
        let text = match read(&path)? {
            Some(text) => text,
            None => {
                let file = NodeFile {
                    format: STATE_FORMAT,
                    node_id: NodeId(random_uuid()?).to_string(),
                };
                create(&path, &to_json(&file))?;
                // Another process may have been first; the file that stands counts.
                read(&path)?.unwrap_or_default()
            }
        };
        let node_id = parse(&text).map_err(|why| StateError::Unreadable { path, why })?;
        Ok(Self {
            node_id,
            directory: directory.to_owned(),
        })
    }

    /// Where the state lies.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn attach_folder(&self) -> PathBuf {
        self.directory.join("attach")
    }
}

fn parse(text: &str) -> Result<NodeId, String> {
    let file: NodeFile = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if file.format != STATE_FORMAT {
        return Err(format!("it has format {}", file.format));
    }
    file.node_id
        .parse()
        .map_err(|error: hn4::types::BadUuid| error.to_string())
}

pub(super) fn to_json(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("plain structs become JSON");
    text.push('\n');
    text
}

/// The text of a file; `None` if there is none.
pub(super) fn read(path: &Path) -> Result<Option<String>, StateError> {
    read_at_most(path, FILE_BYTES_MAX)
}

/// The same for a file that may have so many bytes.
pub(super) fn read_at_most(path: &Path, bytes_max: u64) -> Result<Option<String>, StateError> {
    let failed = |source| StateError::Os {
        doing: "reading",
        path: path.to_owned(),
        source,
    };
    let bytes = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if bytes > bytes_max {
        return Err(StateError::Unreadable {
            path: path.to_owned(),
            why: format!("it has {bytes} bytes, more than {bytes_max}"),
        });
    }
    std::fs::read_to_string(path).map(Some).map_err(failed)
}

fn write_beside(path: &Path, text: &str) -> Result<PathBuf, StateError> {
    let suffix: String = random_bytes()?
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{suffix}.new"));
    let beside = PathBuf::from(beside);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
    match written {
        Ok(()) => Ok(beside),
        Err(error) => {
            // The error that counts is the first one; a leftover has a name that nobody reads.
            let _ = std::fs::remove_file(&beside);
            Err(StateError::os("writing", path)(error))
        }
    }
}

pub(super) fn sync_folder(path: &Path) -> Result<(), StateError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(StateError::os("making durable", folder))
}

/// Makes a file unless one is there already, which is left alone.
pub(super) fn create(path: &Path, text: &str) -> Result<(), StateError> {
    let beside = write_beside(path, text)?;
    let linked = match std::fs::hard_link(&beside, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    };
    // See `write_beside` about leftovers.
    let _ = std::fs::remove_file(&beside);
    linked.map_err(StateError::os("creating", path))?;
    sync_folder(path)
}

/// Puts a text in the place of a file, as a whole and durably.
pub(super) fn replace(path: &Path, text: &str) -> Result<(), StateError> {
    let beside = write_beside(path, text)?;
    std::fs::rename(&beside, path).map_err(StateError::os("replacing", path))?;
    sync_folder(path)
}

/// Removes a file durably.
pub(super) fn remove(path: &Path) -> Result<(), StateError> {
    std::fs::remove_file(path).map_err(StateError::os("removing", path))?;
    sync_folder(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_node_keeps_its_id_and_its_directory_is_private() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("deep/state");
        let first = NodeState::open_or_create(&directory).expect("a new state");
        let second = NodeState::open_or_create(&directory).expect("the same state");
        assert_eq!(first, second);
        assert_ne!(first.node_id, NodeId::default());
        let mode = std::fs::metadata(&directory)
            .expect("the directory")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
        let names: Vec<_> = std::fs::read_dir(&directory)
            .expect("the directory")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        assert_eq!(names.len(), 2, "only node.json and attach: {names:?}");
    }

    #[test]
    fn a_damaged_node_file_is_refused_and_not_replaced() {
        let root = tempfile::tempdir().expect("a directory");
        NodeState::open_or_create(root.path()).expect("a new state");
        let path = root.path().join("node.json");
        std::fs::write(&path, "{}").expect("damaged");
        let error = NodeState::open_or_create(root.path()).expect_err("refused");
        assert!(error.to_string().contains("node.json"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).expect("the file"), "{}");
    }

    #[test]
    fn a_random_uuid_says_that_it_is_random() {
        let uuid = random_uuid().expect("random numbers");
        assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (4, 2));
        assert_ne!(uuid, random_uuid().expect("random numbers"));
    }
}
