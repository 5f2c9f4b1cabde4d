//! The sockets that clients connect to.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{setsockopt, sockopt};

use super::ShardError;
use super::tokens::ACCEPT;
use crate::ring::{FileId, Op, Ring};

/// Where clients come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Listen {
    /// A unix socket at this path.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

/// A socket that is listened on.
pub(super) struct Listener {
    pub(super) file: FileId,
    pub(super) socket: Option<PathBuf>,
}

pub(super) fn start_accept(ring: &mut Ring, index: usize, file: FileId) {
    // A full ring cannot be: connections and the core's operations are bounded far below.
    let _ = ring.submit(Op::Accept { file }, ACCEPT | index as u64);
}

pub(super) fn open_listener(ring: &mut Ring, listen: &Listen) -> Result<Listener, ShardError> {
    let address = match listen {
        Listen::Unix(path) => path.display().to_string(),
        Listen::Tcp(address) => address.to_string(),
    };
    let failed = |source| ShardError::Listen {
        address: address.clone(),
        source,
    };
    let (fd, socket): (OwnedFd, _) = match listen {
        Listen::Unix(path) => {
            remove_stale_socket(path).map_err(failed)?;
            (
                UnixListener::bind(path).map_err(failed)?.into(),
                Some(path.clone()),
            )
        }
        Listen::Tcp(address) => (TcpListener::bind(address).map_err(failed)?.into(), None),
    };
    let file = ring.add_file(fd).map_err(failed)?;
    Ok(Listener { file, socket })
}

/// A socket file that a killed daemon left is removed; one that somebody listens on is not.
fn remove_stale_socket(path: &Path) -> std::io::Result<()> {
    let Ok(metadata) = path.symlink_metadata() else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(std::io::Error::other(
            "there is a file that is no socket; remove it",
        ));
    }
    if UnixStream::connect(path).is_ok() {
        return Err(std::io::Error::other("another process listens there"));
    }
    std::fs::remove_file(path)
}

pub(super) fn no_delay(ring: &Ring, file: FileId) {
    if let Some(fd) = ring.fd(file) {
        // Fails on unix sockets, which do not delay.
        let _ = setsockopt(&fd.as_fd(), sockopt::TcpNoDelay, &true);
    }
}
