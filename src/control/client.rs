//! A client of the control socket, blocking: for `hn4ctl` and the quickstart.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use super::RESPONSE_BYTES_MAX;
use super::api::{NodeStatus, Request, Response};

/// A status is answered at once; a daemon that takes longer hangs.
const STATUS_PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no response.
#[derive(Debug, Error)]
pub enum ClientError {
    /// There is no socket, or nobody listens on it.
    #[error(
        "hn4-replicad is not running, or uses another control socket: nobody listens at {}. Start \
         it with `systemctl start hn4-replicad` or `hn4-replicad run --config FILE`, or name the \
         right socket or configuration with --socket or --config", path.display()
    )]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// The socket belongs to somebody else.
    #[error(
        "no permission for the control socket {}: use the user that hn4-replicad runs as, or root",
        path.display()
    )]
    Permission {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon does not answer.
    #[error(
        "hn4-replicad does not answer at {}; look into its log, `journalctl -u hn4-replicad`",
        path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke, most likely because the daemon ended.
    #[error(
        "the connection to hn4-replicad at {} broke: {source}. Whether the request was carried out \
         is not known; look at `hn4ctl status`", path.display()
    )]
    Broken {
        /// The socket.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The response makes no sense.
    #[error(
        "the answer of hn4-replicad is not understood: {why}. Use an hn4ctl of the same version"
    )]
    Response {
        /// What is wrong.
        why: String,
    },
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl ControlClient {
    /// Connects.
    ///
    /// # Errors
    /// If no daemon is there, or it may not be talked to.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let owned = path.to_owned();
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Self {
                stream: BufReader::new(stream),
                path: owned,
            }),
            Err(error) => Err(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NotRunning { path: owned }
                }
                io::ErrorKind::PermissionDenied => ClientError::Permission { path: owned },
                _ => ClientError::Broken {
                    path: owned,
                    source: error,
                },
            }),
        }
    }

    /// Sends a request and waits for its response: for a status at most 10 s, else as long as the
    /// daemon needs.
    ///
    /// # Errors
    /// If there is no response. That the daemon refuses is a response.
    pub fn request(&mut self, request: &Request) -> Result<Response, ClientError> {
        let patience = (*request == Request::Status).then_some(STATUS_PATIENCE);
        let text = self
            .exchange(request, patience)
            .map_err(|source| match source.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Silent {
                    path: self.path.clone(),
                },
                _ => ClientError::Broken {
                    path: self.path.clone(),
                    source,
                },
            })?;
        serde_json::from_slice(&text).map_err(|error| ClientError::Response {
            why: error.to_string(),
        })
    }

    fn exchange(&mut self, request: &Request, patience: Option<Duration>) -> io::Result<Vec<u8>> {
        let socket = self.stream.get_mut();
        socket.set_read_timeout(patience)?;
        socket.set_write_timeout(Some(STATUS_PATIENCE))?;
        let mut line = serde_json::to_vec(request).expect("plain structs become JSON");
        line.push(b'\n');
        socket.write_all(&line)?;
        let mut text = Vec::new();
        (&mut self.stream)
            .take(RESPONSE_BYTES_MAX)
            .read_until(b'\n', &mut text)?;
        if text.last() != Some(&b'\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(text)
    }

    /// The node's status.
    ///
    /// # Errors
    /// As for [`Self::request`], and if the daemon answers something else.
    pub fn status(&mut self) -> Result<NodeStatus, ClientError> {
        match self.request(&Request::Status)? {
            Response::Status(status) => Ok(status),
            other => Err(ClientError::Response {
                why: format!("{other:?}"),
            }),
        }
    }
}
