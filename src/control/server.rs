//! The daemon's end of the control socket.
//!
//! Reads requests, hands each with a place for its response to the daemon, writes the response.
//!
//! **Invariants:** the socket never exists with a mode that lets others in; a socket that another
//! process listens on is left alone, one that nobody listens on is replaced; lines, clients and the
//! silence of a client are bounded, and a client that is gone waits for nothing, so that no client
//! can keep the operator out.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::REQUEST_BYTES_MAX;
use super::api::{Request, Response};

/// Clients at the same time; more are told to try again.
const CLIENTS_MAX: usize = 32;
/// A client that says nothing, or takes nothing, for this long is cut off.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// While an answer is pending it is looked so often whether its client is still there.
const LOOK: Duration = Duration::from_secs(1);
/// Pause after the system has refused a connection, for lack of descriptors most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A request, and where its response goes.
pub type Asked = (Request, oneshot::Sender<Response>);

/// Why the control socket cannot be used.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Somebody listens there.
    #[error(
        "the control socket {} is in use: another hn4-replicad runs with this configuration; stop \
         it, or set another node.control_socket", .0.display()
    )]
    InUse(PathBuf),
    /// There is something else.
    #[error("{} is no socket; move it away, or set another node.control_socket", .0.display())]
    NotASocket(PathBuf),
    /// The system.
    #[error("control socket {}: {doing}: {source}", path.display())]
    Os {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
}

/// The control socket, bound. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        // A socket file that nobody listens on only misleads; the next start removes it too.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn os(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    let path = path.to_owned();
    move |source| ServeError::Os {
        path,
        doing,
        source,
    }
}

fn remove_stale(path: &Path) -> Result<(), ServeError> {
    let Ok(metadata) = path.symlink_metadata() else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(ServeError::NotASocket(path.to_owned()));
    }
    if StdStream::connect(path).is_ok() {
        return Err(ServeError::InUse(path.to_owned()));
    }
    std::fs::remove_file(path).map_err(os(path, "removing what a killed daemon left"))
}

fn bind_private(path: &Path) -> io::Result<StdListener> {
    let fd: OwnedFd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    // Linux gives the socket's file the mode that the descriptor has when it is bound, so there is
    // no moment in which others could connect.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(64)?)?;
    Ok(fd.into())
}

impl ControlServer {
    /// Makes the socket, with mode 0600. Its folder is made if it is not there. Must be called on a
    /// tokio runtime.
    ///
    /// # Errors
    /// If another daemon has it, or the path cannot be used.
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(os(path, "making its folder"))?;
        }
        remove_stale(path)?;
        let listener = bind_private(path).map_err(os(path, "binding"))?;
        let listener = UnixListener::from_std(listener).map_err(os(path, "listening"))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Serves clients until `requests` is closed at its other end. Dropping the future ends all
    /// clients.
    pub async fn serve(self, requests: mpsc::Sender<Asked>) {
        let places = Arc::new(Semaphore::new(CLIENTS_MAX));
        let mut clients = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = requests.closed() => return,
            };
            while clients.try_join_next().is_some() {}
            let Ok((mut stream, _)) = accepted else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                // Refused at once; whether the client hears it is its own affair.
                let _ = stream.try_write(&line(&busy()));
                let _ = stream.shutdown().await;
                continue;
            };
            let requests = requests.clone();
            clients.spawn(async move {
                // A client that is gone is no error of the daemon's.
                let _ = client(stream, requests).await;
                drop(place);
            });
        }
    }
}

/// Binds the socket and serves it, see [`ControlServer`].
///
/// # Errors
/// If the socket cannot be made.
pub async fn serve(path: PathBuf, requests: mpsc::Sender<Asked>) -> Result<(), ServeError> {
    ControlServer::bind(&path)?.serve(requests).await;
    Ok(())
}

fn line(response: &Response) -> Vec<u8> {
    let mut text = serde_json::to_vec(response).expect("plain structs become JSON");
    text.push(b'\n');
    text
}

fn busy() -> Response {
    Response::Error {
        what: "the request was not read".to_owned(),
        why: format!("{CLIENTS_MAX} clients are connected already"),
        next: "end one of them, or try again".to_owned(),
    }
}

fn not_understood(why: String) -> Response {
    Response::Error {
        what: "the request was not understood".to_owned(),
        why,
        next: "use an hn4ctl of the same version as hn4-replicad".to_owned(),
    }
}

async fn client(stream: UnixStream, requests: mpsc::Sender<Asked>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let mut text = Vec::new();
        let mut bounded = (&mut read).take(REQUEST_BYTES_MAX);
        let reading = bounded.read_until(b'\n', &mut text);
        let Ok(read) = timeout(SILENCE_MAX, reading).await else {
            return Ok(());
        };
        if read? == 0 {
            return Ok(());
        }
        let whole = text.last() == Some(&b'\n');
        let response = if whole {
            // The answer first: a request that was read is handed on, also for who leaves at once.
            tokio::select! {
                biased;
                response = answer(&text, &requests) => response,
                () = gone(&write) => return Ok(()),
            }
        } else {
            not_understood(format!(
                "it is cut off, or longer than {REQUEST_BYTES_MAX} bytes"
            ))
        };
        let answer = line(&response);
        match timeout(SILENCE_MAX, write.write_all(&answer)).await {
            Ok(written) => written?,
            Err(_) => return Ok(()),
        }
        if !whole {
            return Ok(());
        }
    }
}

/// Waits until nothing that is written can reach the client any more. One that only says that it
/// will ask for nothing more, as `socat` does at the end of its input, is still there.
async fn gone(write: &OwnedWriteHalf) {
    loop {
        match write.ready(Interest::WRITABLE).await {
            Ok(ready) if !ready.is_write_closed() => tokio::time::sleep(LOOK).await,
            Ok(_) | Err(_) => return,
        }
    }
}

async fn answer(text: &[u8], requests: &mpsc::Sender<Asked>) -> Response {
    let request = match serde_json::from_slice::<Request>(text) {
        Ok(request) => request,
        Err(error) => return not_understood(error.to_string()),
    };
    let (give, response) = oneshot::channel();
    // Both fail only when the daemon ends.
    if requests.send((request, give)).await.is_ok()
        && let Ok(response) = response.await
    {
        return response;
    }
    Response::Error {
        what: "the request was not carried out, or not to its end".to_owned(),
        why: "hn4-replicad is stopping".to_owned(),
        next: "start it again, then look at `hn4ctl status`".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::control::ControlClient;
    use crate::control::client::ClientError;

    /// A daemon that answers every request with its own text.
    fn echo() -> mpsc::Sender<Asked> {
        let (send, mut receive) = mpsc::channel::<Asked>(8);
        tokio::spawn(async move {
            while let Some((request, give)) = receive.recv().await {
                let message = format!("{request:?}");
                // A client may be gone already.
                let _ = give.send(Response::Done { message });
            }
        });
        send
    }

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("run/control.sock");
        (folder, path)
    }

    async fn raw(path: &Path, text: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.expect("a connection");
        stream.write_all(text).await.expect("written");
        let mut line = String::new();
        let mut reader = BufReader::new(stream);
        reader.read_line(&mut line).await.expect("a response");
        line
    }

    #[tokio::test]
    async fn several_clients_get_their_own_answers_over_a_private_socket() {
        let (_folder, path) = folder();
        let server = ControlServer::bind(&path).expect("bound");
        let mode = std::fs::metadata(&path).expect("there").permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        let serving = tokio::spawn(server.serve(echo()));
        let ask = |volume: &'static str| {
            let path = path.clone();
            tokio::task::spawn_blocking(move || {
                let mut client = ControlClient::connect(&path).expect("connected");
                let volume = volume.to_owned();
                let request = Request::Flush { volume };
                [&request, &Request::Status].map(|request| client.request(request))
            })
        };
        let (one, two) = (ask("one"), ask("two"));
        for (asked, name) in [(one, "one"), (two, "two")] {
            let [flush, status] = asked.await.expect("no panic");
            let text = |response| match response {
                Ok(Response::Done { message }) => message,
                other => panic!("{other:?}"),
            };
            assert_eq!(text(flush), format!("Flush {{ volume: {name:?} }}"));
            assert_eq!(text(status), "Status");
        }
        serving.abort();
        // The socket goes with its server.
        assert!(serving.await.expect_err("aborted").is_cancelled());
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn garbage_and_endless_lines_are_answered_with_an_error() {
        let (_folder, path) = folder();
        let server = ControlServer::bind(&path).expect("bound");
        let serving = tokio::spawn(server.serve(echo()));
        let endless = vec![b'x'; usize::try_from(REQUEST_BYTES_MAX).expect("small")];
        for bad in [
            b"no json\n".as_slice(),
            b"{\"request\":\"explode\"}\n",
            &endless,
        ] {
            let answer = raw(&path, bad).await;
            assert!(answer.contains("was not understood"), "{answer}");
        }
        let good = raw(&path, b"{\"request\":\"status\"}\n").await;
        assert!(good.contains("\"done\""), "{good}");
        serving.abort();
    }

    /// The next flush that the daemon was asked for, which is answered only by the test.
    async fn flush(asked: &mut mpsc::Receiver<Asked>) -> oneshot::Sender<Response> {
        let next = timeout(10 * LOOK, asked.recv()).await.expect("in time");
        let (request, give) = next.expect("a request");
        assert!(matches!(request, Request::Flush { .. }), "{request:?}");
        give
    }

    const FLUSH: &[u8] = b"{\"request\":\"flush\",\"volume\":\"vol0\"}\n";

    #[tokio::test]
    async fn clients_that_went_away_give_their_places_to_others() {
        let (_folder, path) = folder();
        let server = ControlServer::bind(&path).expect("bound");
        let (send, mut asked) = mpsc::channel::<Asked>(CLIENTS_MAX);
        let serving = tokio::spawn(server.serve(send));
        let (mut clients, mut pending) = (Vec::new(), Vec::new());
        for _ in 0..CLIENTS_MAX {
            let mut client = UnixStream::connect(&path).await.expect("a connection");
            client.write_all(FLUSH).await.expect("written");
            pending.push(flush(&mut asked).await);
            clients.push(client);
        }
        let refused = raw(&path, b"").await;
        assert!(refused.contains("connected already"), "{refused}");
        drop(clients);
        for give in &mut pending {
            let closed = timeout(10 * LOOK, give.closed()).await;
            closed.expect("nobody waits for this answer any more");
        }
        // All the others are still not answered.
        let answering = async {
            let message = "flushed".to_owned();
            let given = flush(&mut asked).await.send(Response::Done { message });
            given.expect("somebody waits");
        };
        let (answer, ()) = tokio::join!(raw(&path, FLUSH), answering);
        assert!(answer.contains("flushed"), "{answer}");
        serving.abort();
    }

    #[tokio::test]
    async fn a_client_that_has_only_stopped_asking_gets_its_answer() {
        let (_folder, path) = folder();
        let server = ControlServer::bind(&path).expect("bound");
        let (send, mut asked) = mpsc::channel::<Asked>(1);
        let serving = tokio::spawn(server.serve(send));
        let mut client = UnixStream::connect(&path).await.expect("a connection");
        client.write_all(FLUSH).await.expect("written");
        client.shutdown().await.expect("half closed");
        let mut give = flush(&mut asked).await;
        // Longer than the daemon needs to look at it again.
        let dropped = timeout(2 * LOOK, give.closed()).await;
        assert!(dropped.is_err(), "the client is still there");
        let message = "flushed".to_owned();
        give.send(Response::Done { message })
            .expect("somebody waits");
        let mut line = String::new();
        let mut reader = BufReader::new(client);
        reader.read_line(&mut line).await.expect("a response");
        assert!(line.contains("flushed"), "{line}");
        serving.abort();
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
        let (_folder, path) = folder();
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        drop(StdListener::bind(&path).expect("a socket that nobody listens on"));
        let server = ControlServer::bind(&path).expect("replaced");
        let error = ControlServer::bind(&path).expect_err("in use");
        assert!(matches!(error, ServeError::InUse(_)), "{error}");
        drop(server);
        std::fs::write(&path, "precious").expect("a file");
        let error = ControlServer::bind(&path).expect_err("no socket");
        assert!(matches!(error, ServeError::NotASocket(_)), "{error}");
        assert_eq!(std::fs::read_to_string(&path).expect("kept"), "precious");
    }

    #[tokio::test]
    async fn a_daemon_that_is_stopping_says_so_and_one_that_is_gone_is_named() {
        let (_folder, path) = folder();
        let server = ControlServer::bind(&path).expect("bound");
        let (send, mut receive) = mpsc::channel::<Asked>(1);
        let serving = tokio::spawn(server.serve(send));
        let dropped = tokio::spawn(async move { receive.recv().await.map(drop) });
        let answer = raw(&path, b"{\"request\":\"status\"}\n").await;
        assert!(answer.contains("is stopping"), "{answer}");
        dropped.await.expect("no panic");
        serving.await.expect("ends with the daemon");
        let asked = path.clone();
        let gone = tokio::task::spawn_blocking(move || ControlClient::connect(&asked));
        let error = gone.await.expect("no panic").expect_err("nobody is there");
        assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
    }
}
