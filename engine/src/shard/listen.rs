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
    /// Connections are being accepted.
    pub(super) is_accepting: bool,
}

impl Listener {
    /// Accepts connections from now on, if there is room in the ring. It may be full of reads.
    pub(super) fn accept(&mut self, ring: &mut Ring, index: usize) {
        if !self.is_accepting {
            let op = Op::Accept { file: self.file };
            self.is_accepting = ring.submit(op, ACCEPT | index as u64).is_ok();
        }
    }
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
    Ok(Listener {
        file,
        socket,
        is_accepting: false,
    })
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use super::*;
    use crate::arena::Arena;
    use crate::ring::RingConfig;

    #[test]
    fn a_full_ring_lets_clients_wait_and_not_for_ever() {
        let config = RingConfig {
            operations: 1,
            ..RingConfig::default()
        };
        let mut ring = Ring::new(config, Arena::new(1).expect("a page")).expect("a ring");
        let any = Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)));
        let mut listener = open_listener(&mut ring, &any).expect("a port");
        let fd = ring.fd(listener.file).expect("open");
        let port = TcpListener::from(fd.try_clone_to_owned().expect("a copy"));
        let address = port.local_addr().expect("bound");
        let mut client = std::net::TcpStream::connect(address).expect("queued");
        let after = Duration::from_millis(1);
        ring.submit(Op::Timeout { after }, 1).expect("room");
        let mut completions = Vec::new();
        listener.accept(&mut ring, 0);
        ring.wait(1, None, &mut completions).expect("a ring");
        assert_eq!(completions.pop().map(|done| done.token), Some(1));
        listener.accept(&mut ring, 0);
        listener.accept(&mut ring, 0);
        ring.wait(1, None, &mut completions).expect("a ring");
        let file = completions.pop().and_then(|done| done.file);
        // It is turned away although accepting takes all of the ring.
        drop(ring.take_file(file.expect("accepted")));
        assert_eq!(client.read(&mut [0]).expect("closed"), 0);
    }
}
