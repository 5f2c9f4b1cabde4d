//! `pki init`, `pki issue`, `pki pin`.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use hn4_transport::pki::{PkiError, init_authority, issue_node, write_certificate, write_secret};
use hn4_transport::tls::KeyPin;
use thiserror::Error;

/// Why a file was not made.
#[derive(Debug, Error)]
pub enum IssueError {
    /// The name, or the authority's key.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// There is one already.
    #[error(
        "{} is there already and is not replaced: nodes may rely on it. Choose another folder, or \
         move it away if nothing uses it", .0.display()
    )]
    Exists(PathBuf),
    /// The system.
    #[error("{doing} {}: {source}", path.display())]
    Os {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

fn os(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IssueError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::AlreadyExists => IssueError::Exists(path),
        _ => IssueError::Os {
            doing,
            path,
            source,
        },
    }
}

fn write_pair(certificate: (&Path, &str), key: (&Path, &str)) -> Result<(), IssueError> {
    if certificate.0.symlink_metadata().is_ok() {
        return Err(IssueError::Exists(certificate.0.to_owned()));
    }
    write_secret(key.0, key.1).map_err(os("writing", key.0))?;
    write_certificate(certificate.0, certificate.1).map_err(os("writing", certificate.0))
}

/// Makes an authority in a folder, `ca.pem` and `ca.key`.
///
/// # Errors
/// If there is one already, or the files cannot be written.
pub fn init(folder: &Path) -> Result<(PathBuf, PathBuf), IssueError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(os("making", folder))?;
    let authority = init_authority()?;
    let (certificate, key) = (folder.join("ca.pem"), folder.join("ca.key"));
    write_pair(
        (&certificate, &authority.certificate_pem),
        (&key, &authority.key_pem),
    )?;
    Ok((certificate, key))
}

/// What was made for a node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeFiles {
    /// `NAME.pem`
    pub certificate: PathBuf,
    /// `NAME.key`
    pub key: PathBuf,
    /// For the configuration of its peers.
    pub pin: KeyPin,
}

/// Makes a node's certificate and key in the folder of the authority.
///
/// # Errors
/// If the name is unfit, the authority's key is not there, or the files are.
pub fn issue(folder: &Path, name: &str) -> Result<NodeFiles, IssueError> {
    let authority = folder.join("ca.key");
    let authority_key = std::fs::read_to_string(&authority)
        .map_err(os("reading the authority's key", &authority))?;
    let issued = issue_node(&authority_key, name)?;
    let certificate = folder.join(format!("{name}.pem"));
    let key = folder.join(format!("{name}.key"));
    write_pair(
        (&certificate, &issued.certificate_pem),
        (&key, &issued.key_pem),
    )?;
    Ok(NodeFiles {
        certificate,
        key,
        pin: issued.pin,
    })
}
