//! The smallest NBD server around the codec: a listener, a thread for each connection, a vector of
//! bytes as the disk. It shows that the codec speaks with real clients before the engine exists,
//! and how the codec is meant to be driven.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use hn4_engine::nbd::Limits;
use hn4_engine::nbd::connection::{Decoded, Decoder};
use hn4_engine::nbd::export::{Export, ExportDirectory, ExportList};
use hn4_engine::nbd::handshake::{BASE_ALLOCATION_ID, Handshake, Session, Status, greeting};
use hn4_engine::nbd::proto::state_flag;
use hn4_engine::nbd::reply::{Extent, Replier};
use hn4_engine::nbd::request::{ByteRange, Command, Cookie, Operation};

/// Reads are cut here, so that zero parts can travel as holes.
const PIECE_BYTES: usize = 64 * 1024;
const RECEIVE_BYTES: usize = 16 * 1024;

/// A disk, and what was done to it.
#[derive(Default)]
pub(crate) struct Disk {
    pub(crate) bytes: Mutex<Vec<u8>>,
    pub(crate) flushes: AtomicU64,
    pub(crate) zeroed_bytes: AtomicU64,
    pub(crate) trimmed_bytes: AtomicU64,
    pub(crate) status_queries: AtomicU64,
    pub(crate) refusals: AtomicU64,
}

struct Shared {
    exports: ExportList,
    disks: Vec<Arc<Disk>>,
    stopping: AtomicBool,
    /// Connections that ended otherwise than a client should end them.
    breaches: Mutex<Vec<String>>,
}

/// A running server. Stops when dropped.
pub(crate) struct Server {
    directory: tempfile::TempDir,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(exports: Vec<Export>) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let listener = UnixListener::bind(directory.path().join("nbd.sock")).expect("bind");
        let disks = exports
            .iter()
            .map(|export| {
                let bytes = vec![0; usize::try_from(export.size_bytes).expect("small")];
                Arc::new(Disk {
                    bytes: Mutex::new(bytes),
                    ..Disk::default()
                })
            })
            .collect();
        let shared = Arc::new(Shared {
            exports: ExportList::new(exports).expect("valid exports"),
            disks,
            stopping: AtomicBool::new(false),
            breaches: Mutex::default(),
        });
        let acceptor = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        });
        Self {
            directory,
            shared,
            acceptor: Some(acceptor),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) fn disk(&self, index: usize) -> &Disk {
        &self.shared.disks[index]
    }

    /// Stops the server and gives the breaches of protocol that it saw.
    pub(crate) fn stop(mut self) -> Vec<String> {
        self.join();
        std::mem::take(&mut *self.shared.breaches.lock().expect("lock"))
    }

    fn join(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            self.shared.stopping.store(true, Ordering::SeqCst);
            drop(UnixStream::connect(self.socket()));
            acceptor.join().expect("no connection panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A client of a failed test may hold its connection; do not wait for it.
            return;
        }
        self.join();
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    let mut connections = Vec::new();
    while !shared.stopping.load(Ordering::SeqCst) {
        let (stream, _) = listener.accept().expect("accept");
        let shared = Arc::clone(shared);
        connections.push(std::thread::spawn(move || {
            if let Err(breach) = serve(stream, &shared) {
                shared.breaches.lock().expect("lock").push(breach);
            }
        }));
    }
    connections
        .into_iter()
        .for_each(|connection| connection.join().expect("connection"));
}

fn serve(mut stream: UnixStream, shared: &Shared) -> Result<(), String> {
    let limits = Limits::default();
    // A client that is gone is no breach: any failure to send ends the connection quietly.
    if stream.write_all(&greeting()).is_err() {
        return Ok(());
    }
    let mut handshake = Handshake::new(&shared.exports, limits);
    let mut buffer = vec![0; RECEIVE_BYTES];
    let mut out = Vec::new();
    loop {
        let received = stream.read(&mut buffer).unwrap_or(0);
        if received == 0 {
            return Ok(());
        }
        let mut at = 0;
        while at < received {
            let progress = handshake.advance(&buffer[at..received], &mut out);
            if stream.write_all(&out).is_err() {
                return Ok(());
            }
            out.clear();
            let progress = progress.map_err(|breach| breach.to_string())?;
            at += progress.consumed;
            match progress.status {
                Status::NeedMore | Status::SendReplies => {}
                Status::Close => return Ok(()),
                Status::Transmission(session) => {
                    let disk = &shared.disks[session.export];
                    let export = shared.exports.export(session.export).expect("chosen");
                    let mut connection = Connection::new(stream, disk, export, &session, limits);
                    return connection.run(&buffer[at..received]);
                }
            }
        }
    }
}

/// A write whose payload is arriving.
struct PendingWrite {
    cookie: Cookie,
    range: ByteRange,
    payload: Vec<u8>,
}

struct Connection<'a> {
    stream: UnixStream,
    disk: &'a Disk,
    decoder: Decoder,
    replier: Replier,
    pending: Option<PendingWrite>,
    out: Vec<u8>,
}

impl<'a> Connection<'a> {
    fn new(
        stream: UnixStream,
        disk: &'a Disk,
        export: &Export,
        session: &Session,
        limits: Limits,
    ) -> Self {
        Self {
            stream,
            disk,
            decoder: Decoder::new(export, session, &limits),
            replier: Replier::new(session, &limits),
            pending: None,
            out: Vec::new(),
        }
    }

    fn run(&mut self, already: &[u8]) -> Result<(), String> {
        let mut buffer = vec![0; RECEIVE_BYTES.max(already.len())];
        buffer[..already.len()].copy_from_slice(already);
        let mut filled = already.len();
        loop {
            let mut at = 0;
            while at < filled {
                let step = self
                    .decoder
                    .decode(&buffer[at..filled])
                    .map_err(|e| e.to_string())?;
                let taken = &buffer[at..at + step.consumed];
                at += step.consumed;
                match step.decoded {
                    Decoded::NeedMore | Decoded::Skip { .. } => {}
                    Decoded::Request(command) => self.execute(command),
                    Decoded::Payload { at, last, .. } => {
                        let write = self.pending.as_mut().expect("a write was decoded");
                        let start = at as usize;
                        write.payload[start..start + taken.len()].copy_from_slice(taken);
                        if last {
                            self.complete_write();
                        }
                    }
                    Decoded::Refused { cookie, refusal } => {
                        self.disk.refusals.fetch_add(1, Ordering::SeqCst);
                        self.replier.error(cookie, refusal, &mut self.out);
                    }
                    Decoded::Disconnect => {
                        // Requests before it are answered; this one is not.
                        drop(self.stream.write_all(&self.out));
                        return Ok(());
                    }
                }
            }
            if self.stream.write_all(&self.out).is_err() {
                return Ok(());
            }
            self.out.clear();
            // What is left of a payload goes straight to where it belongs, past the buffer.
            let left = self.decoder.payload_left() as usize;
            if left > 0 {
                let write = self.pending.as_mut().expect("a write was decoded");
                let start = write.payload.len() - left;
                // In two parts, so that the second begins in the middle.
                let middle = start + left.div_ceil(2);
                for part in [start..middle, middle..start + left] {
                    let length = u32::try_from(part.len()).expect("part of a payload");
                    if self.stream.read_exact(&mut write.payload[part]).is_err() {
                        return Ok(());
                    }
                    self.decoder
                        .payload_received(length)
                        .map_err(|e| e.to_string())?;
                }
                self.complete_write();
                filled = 0;
                continue;
            }
            filled = self.stream.read(&mut buffer).unwrap_or(0);
            if filled == 0 {
                return Ok(());
            }
        }
    }

    fn complete_write(&mut self) {
        let write = self.pending.take().expect("a write was decoded");
        self.disk.bytes.lock().expect("lock")[span(write.range)].copy_from_slice(&write.payload);
        self.out.extend_from_slice(&self.replier.done(write.cookie));
    }

    fn execute(&mut self, command: Command) {
        let cookie = command.cookie;
        match command.operation {
            Operation::Read { range, df } => return self.read(cookie, range, df),
            Operation::BlockStatus { range, req_one } => {
                return self.block_status(cookie, range, req_one);
            }
            Operation::Write { range, .. } => {
                let payload = vec![0; range.length as usize];
                self.pending = Some(PendingWrite {
                    cookie,
                    range,
                    payload,
                });
                return;
            }
            Operation::WriteZeroes { range, .. } => self.zero(range, &self.disk.zeroed_bytes),
            Operation::Trim { range, .. } => self.zero(range, &self.disk.trimmed_bytes),
            Operation::Flush => {
                self.disk.flushes.fetch_add(1, Ordering::SeqCst);
            }
            Operation::Cache { .. } => {}
            Operation::Disconnect => unreachable!("has an event of its own"),
        }
        self.out.extend_from_slice(&self.replier.done(cookie));
    }

    fn zero(&self, range: ByteRange, count: &AtomicU64) {
        self.disk.bytes.lock().expect("lock")[span(range)].fill(0);
        count.fetch_add(u64::from(range.length), Ordering::SeqCst);
    }

    /// Sends zero pieces as holes where the client can take them.
    fn read(&mut self, cookie: Cookie, range: ByteRange, df: bool) {
        let bytes = self.disk.bytes.lock().expect("lock");
        let data = &bytes[span(range)];
        let mut reply = self.replier.read(cookie, range, df);
        for piece in data.chunks(PIECE_BYTES) {
            let length = u32::try_from(piece.len()).expect("a piece is short");
            let zero = piece.iter().all(|byte| *byte == 0);
            if let Some(header) = if zero { reply.hole(length) } else { None } {
                self.out.extend_from_slice(&header);
            } else if let Some(header) = reply.data(length) {
                self.out.extend_from_slice(&header);
                self.out.extend_from_slice(piece);
            } else {
                // One piece is wanted: this is the first, and all of the data follows.
                self.out
                    .extend_from_slice(&reply.rest().expect("nothing was sent yet"));
                self.out.extend_from_slice(data);
                return;
            }
        }
    }

    fn block_status(&mut self, cookie: Cookie, range: ByteRange, req_one: bool) {
        self.disk.status_queries.fetch_add(1, Ordering::SeqCst);
        let bytes = self.disk.bytes.lock().expect("lock");
        let extents = bytes[span(range)].chunks(4096).map(|block| {
            let zero = block.iter().all(|byte| *byte == 0);
            let flags = if zero {
                state_flag::HOLE | state_flag::ZERO
            } else {
                0
            };
            Extent {
                length: block.len() as u64,
                flags,
            }
        });
        let id = BASE_ALLOCATION_ID;
        self.replier
            .block_status(cookie, range, req_one, id, extents, &mut self.out);
    }
}

fn span(range: ByteRange) -> std::ops::Range<usize> {
    let place = |at: u64| usize::try_from(at).expect("the disk is in memory");
    place(range.offset)..place(range.end())
}
