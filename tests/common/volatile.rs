//! A disk with a volatile write cache, as an NBD server in the test's own process.
//!
//! A write is answered when it is in the cache; a flush moves the cache to the medium. When the
//! power fails, each sector in the cache is on the medium or not, as chance will have it: what real
//! disks do, where a cache that loses everything (nbdkit's) is the kindest case. A disk with large
//! physical sectors damages some of those that were being written, and what lay beside the write in
//! them.
//!
//! **Invariant:** a frozen disk answers nothing any more. So whatever its users do after that
//! moment cannot rest on an answer that the power cut came before.
//!
//! A write may also be answered and lost, or go to another place, at places that a test chooses;
//! blocks may become unreadable until they are written again; and flushes may fail.
//!
//! Not here: the mount that makes a file of it ([`super::disk`]).

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use hn4_engine::nbd::Limits;
use hn4_engine::nbd::connection::{Decoded, Decoder};
use hn4_engine::nbd::export::{Export, ExportList, Features};
use hn4_engine::nbd::handshake::{Handshake, Session, Status, greeting};
use hn4_engine::nbd::reply::Replier;
use hn4_engine::nbd::request::{ByteRange, Command, NbdErrno, Operation, Refusal};
use hn4_replicad::quickstart::load::Random;

/// What a disk writes as a whole or not at all.
const SECTOR_BYTES: usize = 512;
/// A large physical sector.
const PHYSICAL_BYTES: usize = 4096;
/// What a damaged one holds.
const DAMAGED: u8 = 0xDB;

/// A write that no flush has followed yet.
struct Unflushed {
    at: usize,
    bytes: Vec<u8>,
}

/// What becomes of a write of a block of 4096 bytes that is answered as if all were well.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// It is written nowhere.
    Lost,
    /// It is written at this byte instead.
    Misdirected(u64),
}

/// The disk's contents.
struct Cells {
    medium: Vec<u8>,
    /// The medium with the cache over it: what reads see.
    seen: Vec<u8>,
    /// In the order of their arrival.
    cache: Vec<Unflushed>,
    is_frozen: bool,
    has_large_sectors: bool,
    /// What happens to the next write of the block at this byte.
    faults: HashMap<u64, Fault>,
    /// Blocks, by their first byte, whose reads fail.
    unreadable: BTreeSet<usize>,
    /// So many flushes fail.
    failing_flushes: u64,
}

impl Cells {
    fn write(&mut self, at: usize, bytes: Vec<u8>) {
        if self.faults.is_empty() {
            return self.put(at, bytes);
        }
        for (block, part) in (at..)
            .step_by(PHYSICAL_BYTES)
            .zip(bytes.chunks(PHYSICAL_BYTES))
        {
            match self.faults.remove(&(block as u64)) {
                None => self.put(block, part.to_vec()),
                Some(Fault::Lost) => {}
                Some(Fault::Misdirected(to)) => self.put(place(to), part.to_vec()),
            }
        }
    }

    fn put(&mut self, at: usize, bytes: Vec<u8>) {
        let whole = |block: &usize| *block >= at && block + PHYSICAL_BYTES <= at + bytes.len();
        self.unreadable.retain(|block| !whole(block));
        self.seen[at..at + bytes.len()].copy_from_slice(&bytes);
        self.cache.push(Unflushed { at, bytes });
    }

    fn is_readable(&self, span: &Range<usize>) -> bool {
        let first = span.start / PHYSICAL_BYTES * PHYSICAL_BYTES;
        self.unreadable.range(first..span.end).next().is_none()
    }

    /// As Linux has it: what a flush could not write is dropped, reads still see it, and the next
    /// flush says that all is well.
    fn flush(&mut self) -> Result<(), Refusal> {
        if self.failing_flushes > 0 {
            self.failing_flushes -= 1;
            self.cache.clear();
            return Err(Refusal::new(NbdErrno::Io, "the test wants it so"));
        }
        for write in self.cache.drain(..) {
            self.medium[write.at..write.at + write.bytes.len()].copy_from_slice(&write.bytes);
        }
        Ok(())
    }

    /// Each sector of each unflushed write is kept with this chance in eighths; a later one may
    /// be lost although an earlier one is kept.
    fn lose(&mut self, kept_eighths: u64, random: &mut Random) {
        let mut damaged = Vec::new();
        for write in self.cache.drain(..) {
            let first = write.at / PHYSICAL_BYTES * PHYSICAL_BYTES;
            for at in (first..write.at + write.bytes.len()).step_by(PHYSICAL_BYTES) {
                if self.has_large_sectors && random.below(8) == 0 {
                    damaged.push(at);
                }
            }
            for (index, sector) in write.bytes.chunks(SECTOR_BYTES).enumerate() {
                if random.below(8) < kept_eighths {
                    let at = write.at + index * SECTOR_BYTES;
                    self.medium[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        for at in damaged {
            self.medium[at..at + PHYSICAL_BYTES].fill(DAMAGED);
        }
        self.seen.copy_from_slice(&self.medium);
    }
}

/// See the module.
pub(crate) struct VolatileDisk {
    cells: Arc<Mutex<Cells>>,
    server: Option<JoinHandle<()>>,
}

fn lock(cells: &Mutex<Cells>) -> MutexGuard<'_, Cells> {
    cells.lock().expect("no server thread panics")
}

impl VolatileDisk {
    /// A disk full of zeroes.
    pub(crate) fn new(bytes: u64) -> Self {
        let bytes = usize::try_from(bytes).expect("a disk in memory");
        let cells = Cells {
            medium: vec![0; bytes],
            seen: vec![0; bytes],
            cache: Vec::new(),
            is_frozen: false,
            has_large_sectors: false,
            faults: HashMap::new(),
            unreadable: BTreeSet::new(),
            failing_flushes: 0,
        };
        Self {
            cells: Arc::new(Mutex::new(cells)),
            server: None,
        }
    }

    /// The same with physical sectors of 4096 bytes, which a power cut damages as a whole.
    pub(crate) fn with_large_sectors(bytes: u64) -> Self {
        let disk = Self::new(bytes);
        lock(&disk.cells).has_large_sectors = true;
        disk
    }

    /// The next write of the block at this byte has a fault.
    pub(crate) fn inject(&self, at: u64, fault: Fault) {
        lock(&self.cells).faults.insert(at, fault);
    }

    /// Faults whose write has not come yet.
    pub(crate) fn waiting_faults(&self) -> usize {
        lock(&self.cells).faults.len()
    }

    /// The block at this byte cannot be read until it is written.
    pub(crate) fn make_unreadable(&self, at: u64) {
        lock(&self.cells).unreadable.insert(place(at));
    }

    /// The next flush fails.
    pub(crate) fn fail_a_flush(&self) {
        lock(&self.cells).failing_flushes = 1;
    }

    /// Flushes that are still to fail.
    pub(crate) fn failing_flushes(&self) -> u64 {
        lock(&self.cells).failing_flushes
    }

    /// Begins to serve one client at a socket.
    pub(crate) fn power_on(&mut self, socket: &Path) {
        let listener = UnixListener::bind(socket).expect("a socket");
        lock(&self.cells).is_frozen = false;
        let cells = Arc::clone(&self.cells);
        self.server = Some(std::thread::spawn(move || {
            // A connection may break at any moment: that is what this is for.
            if let Ok((stream, _)) = listener.accept() {
                let _ = serve(stream, &cells);
            }
        }));
    }

    /// Answers nothing any more.
    pub(crate) fn freeze(&self) {
        lock(&self.cells).is_frozen = true;
    }

    /// Loses of the cache what chance will have. The client must be gone.
    pub(crate) fn power_off(&mut self, random: &mut Random) {
        self.freeze();
        if let Some(server) = self.server.take() {
            server.join().expect("no server thread panics");
        }
        let kept_eighths = [0, 1, 4, 7, 8][usize::try_from(random.below(5)).expect("small")];
        lock(&self.cells).lose(kept_eighths, random);
    }
}

fn export(cells: &Mutex<Cells>) -> ExportList {
    let bytes = lock(cells).medium.len() as u64;
    let mut export = Export::new("", bytes);
    export.features = Features {
        flush: true,
        trim: true,
        write_zeroes: true,
        ..Features::NONE
    };
    ExportList::new(vec![export]).expect("a valid export")
}

fn serve(mut stream: UnixStream, cells: &Mutex<Cells>) -> std::io::Result<()> {
    let (exports, limits) = (export(cells), Limits::default());
    let mut input = BufReader::new(stream.try_clone()?);
    stream.write_all(&greeting())?;
    let mut handshake = Handshake::new(&exports, limits);
    let session = loop {
        let (bytes, mut out) = (input.fill_buf()?, Vec::new());
        if bytes.is_empty() {
            return Ok(());
        }
        let progress = handshake
            .advance(bytes, &mut out)
            .map_err(std::io::Error::other)?;
        input.consume(progress.consumed);
        stream.write_all(&out)?;
        match progress.status {
            Status::NeedMore | Status::SendReplies => {}
            Status::Transmission(session) => break session,
            Status::Close => return Ok(()),
        }
    };
    transmission(&mut input, &mut stream, &exports, &session, cells)
}

fn transmission(
    input: &mut impl BufRead,
    output: &mut impl Write,
    exports: &ExportList,
    session: &Session,
    cells: &Mutex<Cells>,
) -> std::io::Result<()> {
    use hn4_engine::nbd::export::ExportDirectory;
    let limits = Limits::default();
    let export = exports
        .export(session.export)
        .ok_or_else(|| std::io::Error::other("no export"))?;
    let mut decoder = Decoder::new(export, session, &limits);
    let replier = Replier::new(session, &limits);
    loop {
        let bytes = input.fill_buf()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let step = decoder.decode(bytes).map_err(std::io::Error::other)?;
        input.consume(step.consumed);
        let mut out = Vec::new();
        match step.decoded {
            Decoded::NeedMore | Decoded::Skip { .. } | Decoded::Payload { .. } => {}
            Decoded::Refused { cookie, refusal } => replier.error(cookie, refusal, &mut out),
            Decoded::Disconnect => return Ok(()),
            Decoded::Request(command) => {
                let mut payload = vec![0; decoder.payload_left() as usize];
                input.read_exact(&mut payload)?;
                if !payload.is_empty() {
                    decoder
                        .payload_received(decoder.payload_left())
                        .map_err(std::io::Error::other)?;
                }
                let mut cells = lock(cells);
                if cells.is_frozen {
                    drop(cells);
                    // Until the client gives up.
                    return std::io::copy(input, &mut std::io::sink()).map(drop);
                }
                execute(&mut cells, &replier, command, payload, &mut out);
            }
        }
        output.write_all(&out)?;
    }
}

fn execute(
    cells: &mut Cells,
    replier: &Replier,
    command: Command,
    payload: Vec<u8>,
    out: &mut Vec<u8>,
) {
    let cookie = command.cookie;
    match command.operation {
        Operation::Read { range, .. } if !cells.is_readable(&span(range)) => {
            let refusal = Refusal::new(NbdErrno::Io, "the test wants it so");
            return replier.error(cookie, refusal, out);
        }
        Operation::Read { range, df } => {
            let mut reply = replier.read(cookie, range, df);
            out.extend_from_slice(&reply.rest().expect("nothing was sent yet"));
            out.extend_from_slice(&cells.seen[span(range)]);
            return;
        }
        Operation::Write { range, .. } => cells.write(span(range).start, payload),
        Operation::Trim { range, .. } | Operation::WriteZeroes { range, .. } => {
            cells.write(span(range).start, vec![0; span(range).len()]);
        }
        Operation::Flush => {
            if let Err(refusal) = cells.flush() {
                return replier.error(cookie, refusal, out);
            }
        }
        Operation::Cache { .. } | Operation::BlockStatus { .. } | Operation::Disconnect => {}
    }
    out.extend_from_slice(&replier.done(cookie));
}

fn span(range: ByteRange) -> Range<usize> {
    place(range.offset)..place(range.end())
}

fn place(at: u64) -> usize {
    usize::try_from(at).expect("the disk is in memory")
}
