//! Key files of a node: what it signs its anchors with.
//!
//! ```text
//! <state_dir>/keys/node.<algorithm>       secret, mode 0600
//! <state_dir>/keys/node.<algorithm>.pub   the public key, for verifiers
//! <state_dir>/keys/node.<algorithm>.next  the secret that is to take its place
//! <state_dir>/keys/retired.pub            public keys that were replaced, one a line
//! ```
//!
//! A key is replaced in two steps, so that a crash leaves no ledger without a key: the next one is
//! drawn and brought into the ledgers while the old one is still there; when all have it, it takes
//! the old one's name, and the old secret is gone.
//!
//! **Invariant:** a secret key that others may read is not used.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use hn4_proof::prover::keys::NodeKeys;
use hn4_proof::sign::{Algorithm, KeyId, PublicKey, SecretKey};

use super::state::{StateError, create, read, read_at_most, replace};

/// Largest file with public keys, in bytes. Replaced ones are kept for ever, up to 2.6 KB each, and
/// a file that could not be read any more would end all rotations: this is enough for one a day in
/// 17 years.
const PUBLIC_BYTES_MAX: u64 = 16 << 20;

/// Where the secret key of an algorithm lies.
#[must_use]
pub fn secret_path(state_dir: &Path, algorithm: Algorithm) -> PathBuf {
    state_dir.join(format!("keys/node.{algorithm}"))
}

/// Where the public key of an algorithm lies.
#[must_use]
pub fn public_path(state_dir: &Path, algorithm: Algorithm) -> PathBuf {
    state_dir.join(format!("keys/node.{algorithm}.pub"))
}

fn next_path(state_dir: &Path, algorithm: Algorithm) -> PathBuf {
    state_dir.join(format!("keys/node.{algorithm}.next"))
}

/// Where public keys lie that were replaced.
#[must_use]
pub fn retired_path(state_dir: &Path) -> PathBuf {
    state_dir.join("keys/retired.pub")
}

fn unreadable(path: &Path, why: String) -> StateError {
    let path = path.to_owned();
    StateError::Unreadable { path, why }
}

fn secret(path: &Path, algorithm: Algorithm) -> Result<Option<SecretKey>, StateError> {
    let Some(text) = read(path)? else {
        return Ok(None);
    };
    let metadata = std::fs::metadata(path).map_err(StateError::os("looking at", path))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let why = format!(
            "its mode is {mode:03o}, so others can read it; make a new key, or run chmod 600"
        );
        let source = io::Error::new(io::ErrorKind::PermissionDenied, why);
        return Err(StateError::os("using", path)(source));
    }
    let key = SecretKey::from_text(&text).map_err(|error| unreadable(path, error.to_string()))?;
    if key.public().algorithm() != algorithm {
        let why = format!("it holds a key of {}", key.public().algorithm());
        return Err(unreadable(path, why));
    }
    Ok(Some(key))
}

/// The node's key of an algorithm, if it has one.
///
/// # Errors
/// [`StateError`] if it cannot be read, is damaged, or may be read by others.
pub fn node_key(state_dir: &Path, algorithm: Algorithm) -> Result<Option<SecretKey>, StateError> {
    secret(&secret_path(state_dir, algorithm), algorithm)
}

/// The key that is to take its place, if it is being replaced.
///
/// # Errors
/// As [`node_key`].
pub fn next_key(state_dir: &Path, algorithm: Algorithm) -> Result<Option<SecretKey>, StateError> {
    secret(&next_path(state_dir, algorithm), algorithm)
}

/// Draws a key into a file, unless one is there: then that one counts.
fn draw(path: &Path, algorithm: Algorithm) -> Result<SecretKey, StateError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(StateError::os("making", folder))?;
    let key = SecretKey::generate(algorithm).map_err(|_| StateError::Random)?;
    create(path, &format!("{}\n", key.to_text()))?;
    secret(path, algorithm)?.ok_or(StateError::Random)
}

/// The node's key of an algorithm; draws one if there is none.
///
/// # Errors
/// As [`node_key`], or if none can be made.
pub fn node_key_or_new(state_dir: &Path, algorithm: Algorithm) -> Result<SecretKey, StateError> {
    let key = match node_key(state_dir, algorithm)? {
        Some(key) => key,
        None => draw(&secret_path(state_dir, algorithm), algorithm)?,
    };
    write_public(state_dir, &key)?;
    Ok(key)
}

fn write_public(state_dir: &Path, key: &SecretKey) -> Result<(), StateError> {
    let path = public_path(state_dir, key.public().algorithm());
    let text = format!("{}\n", key.public());
    if read(&path)?.as_ref() == Some(&text) {
        return Ok(());
    }
    replace(&path, &text)
}

/// What a node signs with that wants these algorithms beside Ed25519. Keys that are missing are
/// drawn.
///
/// # Errors
/// As [`node_key`], or if none can be made.
pub fn node_keys(state_dir: &Path, wanted: &[Algorithm]) -> Result<NodeKeys, StateError> {
    let (mut sign, mut older) = (Vec::new(), Vec::new());
    for algorithm in Algorithm::ALL {
        let next = next_key(state_dir, algorithm)?;
        if algorithm == Algorithm::Ed25519 || wanted.contains(&algorithm) {
            let current = node_key_or_new(state_dir, algorithm)?;
            older.extend(next.is_some().then(|| current.clone()));
            sign.push(next.unwrap_or(current));
        } else {
            older.extend(node_key(state_dir, algorithm)?);
            older.extend(next);
        }
    }
    NodeKeys::new(sign, older).ok_or(StateError::Random)
}

/// Algorithms of which a key is being replaced, with the next key.
///
/// # Errors
/// As [`node_key`].
pub fn rotating(state_dir: &Path) -> Result<Vec<(Algorithm, KeyId)>, StateError> {
    let mut all = Vec::new();
    for algorithm in Algorithm::ALL {
        let next = next_key(state_dir, algorithm)?;
        all.extend(next.map(|next| (algorithm, next.public().id())));
    }
    Ok(all)
}

/// Draws the key that is to take the place of the present one. If one was drawn before and has not
/// taken it yet, nothing changes.
///
/// # Errors
/// As [`node_key`], or if none can be made.
pub fn begin_rotation(state_dir: &Path, algorithm: Algorithm) -> Result<(), StateError> {
    draw(&next_path(state_dir, algorithm), algorithm).map(drop)
}

/// Puts the next key in the place of the present one, which is gone then.
///
/// # Errors
/// [`StateError`]; it can be called again.
pub fn finish_rotation(state_dir: &Path, algorithm: Algorithm) -> Result<(), StateError> {
    let Some(next) = next_key(state_dir, algorithm)? else {
        return Ok(());
    };
    if let Some(old) = node_key(state_dir, algorithm)? {
        let path = retired_path(state_dir);
        let line = format!("{}\n", old.public());
        let mut text = read_at_most(&path, PUBLIC_BYTES_MAX)?.unwrap_or_default();
        if !text.contains(&line) {
            text += &line;
            replace(&path, &text)?;
        }
    }
    write_public(state_dir, &next)?;
    let path = secret_path(state_dir, algorithm);
    let renamed = std::fs::rename(next_path(state_dir, algorithm), &path);
    renamed.map_err(StateError::os("replacing", &path))?;
    super::state::sync_folder(&path)
}

/// Reads a file with public keys, one a line.
///
/// # Errors
/// [`StateError`] if there is none, or it does not hold keys.
pub fn public_keys(path: &Path) -> Result<Vec<PublicKey>, StateError> {
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let text = read_at_most(path, PUBLIC_BYTES_MAX)?;
    let text = text.ok_or_else(|| StateError::os("reading", path)(missing()))?;
    let keys = text.split_whitespace().map(str::parse);
    match keys.collect::<Result<Vec<_>, _>>() {
        Ok(keys) if !keys.is_empty() => Ok(keys),
        _ => Err(unreadable(path, "it is no public key".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ED25519: Algorithm = Algorithm::Ed25519;

    fn mode(path: &Path) -> u32 {
        let metadata = std::fs::metadata(path).expect("there");
        metadata.permissions().mode() & 0o777
    }

    #[test]
    fn a_node_keeps_its_keys_and_the_files_are_private() {
        let root = tempfile::tempdir().expect("a directory");
        let state = root.path();
        assert!(node_key(state, ED25519).expect("none yet").is_none());
        let wanted = [Algorithm::MlDsa65, Algorithm::SlhDsaSha2128f];
        let first = node_keys(state, &wanted).expect("keys");
        let second = node_keys(state, &wanted).expect("the same keys");
        assert_eq!(first.wanted().len(), 3);
        for (first, second) in first.wanted().iter().zip(second.wanted()) {
            assert_eq!(first.public(), second.public());
            let algorithm = first.public().algorithm();
            let public = public_keys(&public_path(state, algorithm)).expect("beside it");
            assert_eq!(&public[..], std::slice::from_ref(first.public()));
            assert_eq!(mode(&secret_path(state, algorithm)), 0o600);
        }
        assert_eq!(mode(&state.join("keys")), 0o700);
    }

    #[test]
    fn a_key_that_others_can_read_is_not_used() {
        let root = tempfile::tempdir().expect("a directory");
        node_key_or_new(root.path(), ED25519).expect("a key");
        let path = secret_path(root.path(), ED25519);
        let open = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(&path, open).expect("opened");
        let error = node_key(root.path(), ED25519).expect_err("refused");
        assert!(error.to_string().contains("644"), "{error}");
    }

    #[test]
    fn a_key_is_replaced_in_two_steps_each_of_which_can_be_repeated() {
        let root = tempfile::tempdir().expect("a directory");
        let state = root.path();
        let old = node_key_or_new(state, ED25519).expect("a key");
        begin_rotation(state, ED25519).expect("begun");
        let [(_, next)] = rotating(state).expect("rotating")[..] else {
            panic!("one key is being replaced");
        };
        begin_rotation(state, ED25519).expect("begun already");
        assert_eq!(rotating(state).expect("rotating"), [(ED25519, next)]);
        assert_eq!(mode(&next_path(state, ED25519)), 0o600);
        let both = node_keys(state, &[]).expect("both");
        assert_eq!(both.main().public().id(), next);
        finish_rotation(state, ED25519).expect("finished");
        finish_rotation(state, ED25519).expect("finished already");
        let now = node_key(state, ED25519).expect("a key").expect("a key");
        assert_eq!(now.public().id(), next);
        let retired = public_keys(&retired_path(state)).expect("kept for verifiers");
        assert_eq!(&retired[..], std::slice::from_ref(old.public()));
        assert!(rotating(state).expect("none").is_empty());
    }

    #[test]
    fn many_replaced_keys_hinder_neither_rotations_nor_verifiers() {
        let root = tempfile::tempdir().expect("a directory");
        let state = root.path();
        let slow = node_key_or_new(state, Algorithm::MlDsa65).expect("a key");
        let old = node_key_or_new(state, ED25519).expect("a key");
        let line = format!("{}\n", slow.public());
        let many = 200_000 / line.len();
        std::fs::write(retired_path(state), line.repeat(many)).expect("written");
        begin_rotation(state, ED25519).expect("begun");
        finish_rotation(state, ED25519).expect("finished");
        let retired = public_keys(&retired_path(state)).expect("kept for verifiers");
        assert_eq!(
            (retired.len(), retired.last()),
            (many + 1, Some(old.public()))
        );
    }

    #[test]
    fn a_key_of_another_algorithm_is_not_taken_for_it() {
        let root = tempfile::tempdir().expect("a directory");
        let state = root.path();
        node_key_or_new(state, ED25519).expect("a key");
        let other = secret_path(state, Algorithm::MlDsa65);
        std::fs::copy(secret_path(state, ED25519), other).expect("copied");
        let error = node_keys(state, &[Algorithm::MlDsa65]).expect_err("refused");
        assert!(error.to_string().contains("ed25519"), "{error}");
    }
}
