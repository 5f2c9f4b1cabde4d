//! Key files of a node: what it signs its anchors with.
//!
//! ```text
//! <state_dir>/keys/node.ed25519      secret, mode 0600
//! <state_dir>/keys/node.ed25519.pub  the public key, for verifiers
//! ```
//!
//! **Invariant:** a secret key that others may read is not used.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use hn4_proof::sign::{Algorithm, PublicKey, SecretKey};

use super::state::{StateError, create, read, replace};

/// Where the secret key lies.
#[must_use]
pub fn secret_path(state_dir: &Path) -> PathBuf {
    state_dir.join("keys/node.ed25519")
}

/// Where the public key lies.
#[must_use]
pub fn public_path(state_dir: &Path) -> PathBuf {
    state_dir.join("keys/node.ed25519.pub")
}

fn unreadable(path: &Path, why: String) -> StateError {
    let path = path.to_owned();
    StateError::Unreadable { path, why }
}

/// The node's key, if it has one.
///
/// # Errors
/// [`StateError`] if it cannot be read, is damaged, or may be read by others.
pub fn node_key(state_dir: &Path) -> Result<Option<SecretKey>, StateError> {
    let path = secret_path(state_dir);
    let Some(text) = read(&path)? else {
        return Ok(None);
    };
    let metadata = std::fs::metadata(&path).map_err(StateError::os("looking at", &path))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let why = format!(
            "its mode is {mode:03o}, so others can read it; make a new key, or run chmod 600"
        );
        let source = io::Error::new(io::ErrorKind::PermissionDenied, why);
        return Err(StateError::os("using", &path)(source));
    }
    let key = SecretKey::from_text(&text).map_err(|error| unreadable(&path, error.to_string()))?;
    Ok(Some(key))
}

/// The node's key; draws one if there is none.
///
/// # Errors
/// As [`node_key`], or if none can be made.
pub fn node_key_or_new(state_dir: &Path) -> Result<SecretKey, StateError> {
    if let Some(key) = node_key(state_dir)? {
        return Ok(key);
    }
    let secret = secret_path(state_dir);
    let folder = state_dir.join("keys");
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder);
    made.map_err(StateError::os("making", &folder))?;
    let key = SecretKey::generate(Algorithm::Ed25519).map_err(|_| StateError::Random)?;
    create(&secret, &format!("{}\n", key.to_text()))?;
    // Another process may have been first; the file that stands counts.
    let key = node_key(state_dir)?.ok_or(StateError::Random)?;
    let public = key.public();
    replace(&public_path(state_dir), &format!("{public}\n"))?;
    Ok(key)
}

/// Reads a public key file.
///
/// # Errors
/// [`StateError`] if there is none, or it is not one.
pub fn public_key(path: &Path) -> Result<PublicKey, StateError> {
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let text = read(path)?.ok_or_else(|| StateError::os("reading", path)(missing()))?;
    text.parse()
        .map_err(|_| unreadable(path, "it is no public key".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_keeps_its_key_and_the_file_is_private() {
        let root = tempfile::tempdir().expect("a directory");
        let state = root.path();
        assert!(node_key(state).expect("none yet").is_none());
        let first = node_key_or_new(state).expect("a key");
        let second = node_key_or_new(state).expect("the same key");
        assert_eq!(first.public(), second.public());
        let public = public_key(&public_path(state)).expect("written beside it");
        assert_eq!(&public, first.public());
        let mode = |path: PathBuf| std::fs::metadata(path).expect("there").permissions().mode();
        assert_eq!(mode(secret_path(state)) & 0o777, 0o600);
        assert_eq!(mode(state.join("keys")) & 0o777, 0o700);
    }

    #[test]
    fn a_key_that_others_can_read_is_not_used() {
        let root = tempfile::tempdir().expect("a directory");
        node_key_or_new(root.path()).expect("a key");
        let path = secret_path(root.path());
        let open = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(&path, open).expect("opened");
        let error = node_key(root.path()).expect_err("refused");
        assert!(error.to_string().contains("644"), "{error}");
    }
}
