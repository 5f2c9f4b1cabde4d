//! A load of random writes over several connections, with an [`Oracle`] that keeps the books.
//!
//! A connection that breaks ends its thread: what was on its way then may or may not have happened,
//! which the oracle allows for. Therefore nothing here gives up a connection to a server that
//! lives: a write that is still on its way could land after a later one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hn4_engine::nbd::client::{Client, ClientError, Submit};
use hn4_engine::nbd::request::NbdErrno;

use super::oracle::{FlushIssued, Oracle, SECTOR_BYTES, Seen, WriteId};
use super::rig::Node;

/// Bytes of one read while an image is fetched.
const READ_BYTES: u32 = 1 << 20;

/// What the clients do.
#[derive(Clone, Copy, Debug)]
pub struct LoadPlan {
    /// Where the watched sectors begin on the volume, in bytes.
    pub offset: u64,
    /// Connections that write at the same time.
    pub connections: usize,
    /// Requests in flight on each.
    pub depth: usize,
    /// Longest write in sectors.
    pub sectors_max: u64,
    /// All writes begin and end at multiples of so many sectors.
    pub align: u64,
    /// One of so many requests is a flush; half as many writes have FUA.
    pub flush_every: u64,
    /// One of so many writes is a TRIM or WRITE ZEROES; 0: none.
    pub zero_every: u64,
    /// Zeroed sectors may give their space back. If not, all zeroings are WRITE ZEROES that keep
    /// it.
    pub holes: bool,
    /// Connections over which one more thread writes in turn, each write after the one before has
    /// completed on another connection.
    pub relay: usize,
    /// Of the random choices.
    pub seed: u64,
}

impl LoadPlan {
    /// A mixed load on a volume with sectors of 512 bytes.
    #[must_use]
    pub fn mixed(seed: u64) -> Self {
        Self {
            offset: 0,
            connections: 3,
            depth: 8,
            sectors_max: 64,
            align: 1,
            flush_every: 50,
            zero_every: 20,
            holes: true,
            relay: 3,
            seed,
        }
    }
}

/// A small generator of random numbers; a run is told by its seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9E37_79B9_7F4A_7C15)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below a positive bound.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound.max(1)
    }

    /// True once in so many times; never for 0.
    pub fn one_in(&mut self, times: u64) -> bool {
        times > 0 && self.below(times) == 0
    }
}

/// An oracle that several threads use.
pub type SharedOracle = Arc<Mutex<Oracle>>;

/// Locks an oracle.
///
/// # Panics
/// If a thread of the load has panicked.
pub fn lock(oracle: &Mutex<Oracle>) -> MutexGuard<'_, Oracle> {
    oracle.lock().expect("no thread of the load panics")
}

/// How a thread of the load ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ended {
    /// It was told to stop and has all its answers.
    Stopped,
    /// Its connection broke.
    Cut,
    /// Its node is not primary any more.
    Refused,
}

/// A load that is running.
pub struct Load {
    threads: Vec<JoinHandle<Result<Ended>>>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
}

enum Asked {
    Write {
        id: WriteId,
        flush: Option<FlushIssued>,
    },
    Flush(FlushIssued),
}

/// Choices of one thread.
struct Chooser {
    plan: LoadPlan,
    random: Random,
    oracle: SharedOracle,
}

struct Worker {
    chooser: Chooser,
    clients: Vec<Client>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
}

impl Load {
    /// Connects all clients and starts.
    ///
    /// # Errors
    /// If the node does not serve the volume.
    pub fn start(node: &Node, oracle: &SharedOracle, plan: LoadPlan) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        let mut groups = vec![1; plan.connections];
        groups.extend((plan.relay > 0).then_some(plan.relay));
        for (index, connections) in (0_u64..).zip(groups) {
            let clients: Result<Vec<Client>> = (0..connections).map(|_| node.client()).collect();
            let worker = Worker {
                chooser: Chooser {
                    plan,
                    random: Random::new(plan.seed.wrapping_mul(1009).wrapping_add(index)),
                    oracle: Arc::clone(oracle),
                },
                clients: clients?,
                stop: Arc::clone(&stop),
                answered: Arc::clone(&answered),
            };
            threads.push(std::thread::spawn(move || worker.run()));
        }
        Ok(Self {
            threads,
            stop,
            answered,
        })
    }

    /// Requests that were answered so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until so many more requests have been answered.
    ///
    /// # Errors
    /// If that takes longer than the limit.
    pub fn wait_for_progress(&self, requests: u64, limit: Duration) -> Result<()> {
        let (goal, deadline) = (self.answered() + requests, Instant::now() + limit);
        while self.answered() < goal {
            let ended = self.threads.iter().all(JoinHandle::is_finished);
            if ended || Instant::now() >= deadline {
                bail!(
                    "{} of {requests} requests answered in {limit:?}",
                    self.answered()
                );
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits for all answers and ends.
    ///
    /// # Errors
    /// If the server refused a request or cut a connection.
    pub fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        match self.join()? {
            [0, 0] => Ok(()),
            [cut, refused] => bail!(
                "{cut} connections broke and {refused} were refused although the server goes on"
            ),
        }
    }

    /// Ends after the server was killed.
    ///
    /// # Errors
    /// If the server refused a request before it died.
    pub fn was_cut(self) -> Result<()> {
        match self.join()? {
            [_, 0] => Ok(()),
            [_, refused] => bail!("{refused} connections were refused before the server died"),
        }
    }

    /// Ends after the server has handed over.
    ///
    /// # Errors
    /// If a request failed for another reason.
    pub fn was_handed_over(self) -> Result<()> {
        self.join().map(drop)
    }

    /// Ends after another node has become primary: what waited was failed, the rest refused.
    ///
    /// # Errors
    /// If a request failed for another reason.
    pub fn was_fenced(self) -> Result<()> {
        for thread in self.threads {
            let ended = thread
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))?;
            if let Err(error) = ended
                && !error.downcast_ref::<ClientError>().is_some_and(is_failed)
            {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Connections that broke, and that were refused.
    fn join(self) -> Result<[usize; 2]> {
        let (mut cut, mut refused) = (0, 0);
        for thread in self.threads {
            let ended = thread
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))?;
            match ended? {
                Ended::Stopped => {}
                Ended::Cut => cut += 1,
                Ended::Refused => refused += 1,
            }
        }
        Ok([cut, refused])
    }
}

/// A request that was chosen, before it is sent.
enum Choice {
    Write {
        id: WriteId,
        offset: u64,
        payload: Vec<u8>,
        flush: Option<FlushIssued>,
    },
    Zero {
        id: WriteId,
        offset: u64,
        length: u32,
        trim: bool,
        no_hole: bool,
    },
    Flush(FlushIssued),
}

impl Chooser {
    fn choose(&mut self) -> Option<Choice> {
        let plan = self.plan;
        let mut oracle = lock(&self.oracle);
        if self.random.one_in(plan.flush_every) {
            return Some(Choice::Flush(oracle.issue_flush()));
        }
        let units = (plan.sectors_max / plan.align).max(1);
        // Short ones more often than long ones.
        let length = 1 + self.random.below(units);
        let length = (1 + self.random.below(length)) * plan.align;
        let places = (oracle.sectors() - length) / plan.align + 1;
        let zero = self.random.one_in(plan.zero_every);
        for _ in 0..16 {
            let first = self.random.below(places) * plan.align;
            let Some(id) = oracle.issue(first, length, zero) else {
                continue;
            };
            let offset = plan.offset + first * SECTOR_BYTES;
            if zero {
                let length = u32::try_from(length * SECTOR_BYTES).unwrap_or(u32::MAX);
                let trim = plan.holes && self.random.one_in(2);
                let no_hole = !plan.holes;
                return Some(Choice::Zero {
                    id,
                    offset,
                    length,
                    trim,
                    no_hole,
                });
            }
            let flush = self
                .random
                .one_in(plan.flush_every * 2)
                .then(|| oracle.issue_flush());
            let payload = oracle.payload(id);
            return Some(Choice::Write {
                id,
                offset,
                payload,
                flush,
            });
        }
        None
    }

    fn finish(&self, asked: &Asked) {
        let mut oracle = lock(&self.oracle);
        match asked {
            Asked::Write { id, flush } => {
                oracle.complete(*id, flush.is_some());
                if let Some(flush) = flush {
                    oracle.complete_flush(*flush);
                }
            }
            Asked::Flush(flush) => oracle.complete_flush(*flush),
        }
    }
}

fn submit(client: &mut Client, choice: &Choice) -> Result<u64, ClientError> {
    client.submit(match choice {
        Choice::Write {
            offset,
            payload,
            flush,
            ..
        } => Submit::Write {
            offset: *offset,
            data: payload,
            fua: flush.is_some(),
        },
        Choice::Zero {
            offset,
            length,
            trim: true,
            ..
        } => Submit::Trim {
            offset: *offset,
            length: *length,
            fua: false,
        },
        Choice::Zero {
            offset,
            length,
            no_hole,
            ..
        } => {
            let (offset, length, no_hole) = (*offset, *length, *no_hole);
            Submit::WriteZeroes {
                offset,
                length,
                fua: false,
                no_hole,
            }
        }
        Choice::Flush(_) => Submit::Flush,
    })
}

fn asked(choice: Choice) -> Asked {
    match choice {
        Choice::Write { id, flush, .. } => Asked::Write { id, flush },
        Choice::Zero { id, .. } => Asked::Write { id, flush: None },
        Choice::Flush(flush) => Asked::Flush(flush),
    }
}

/// Whether an error means that the server does not take writes any more.
fn is_refused(error: &ClientError) -> bool {
    matches!(error, ClientError::Failed { errno, .. } if *errno == NbdErrno::Perm as u32)
}

/// Whether an error means that the server could not keep what it had begun.
fn is_failed(error: &ClientError) -> bool {
    matches!(error, ClientError::Failed { errno, .. } if *errno == NbdErrno::Io as u32)
}

/// Whether an error means that the server is gone.
fn is_cut(error: &ClientError) -> bool {
    matches!(error, ClientError::Io { .. })
}

impl Worker {
    fn run(mut self) -> Result<Ended> {
        let result = if self.clients.len() > 1 {
            self.relay()
        } else {
            self.pipeline()
        };
        match result {
            Ok(()) => Ok(Ended::Stopped),
            Err(error) if is_cut(&error) => Ok(Ended::Cut),
            Err(error) if is_refused(&error) => Ok(Ended::Refused),
            Err(error) => Err(error).context("a client of the load"),
        }
    }

    /// Keeps many requests in flight.
    fn pipeline(&mut self) -> Result<(), ClientError> {
        let client = &mut self.clients[0];
        let mut waiting: HashMap<u64, Asked> = HashMap::new();
        loop {
            let stopping = self.stop.load(Ordering::Relaxed);
            while !stopping && waiting.len() < self.chooser.plan.depth {
                let Some(choice) = self.chooser.choose() else {
                    break;
                };
                waiting.insert(submit(client, &choice)?, asked(choice));
            }
            if waiting.is_empty() && stopping {
                return Ok(());
            }
            if waiting.is_empty() {
                std::thread::yield_now();
                continue;
            }
            let done = client.next_reply()?;
            done.result?;
            if let Some(asked) = waiting.remove(&done.ticket) {
                self.chooser.finish(&asked);
                self.answered.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Writes one after the other, each over the next connection.
    fn relay(&mut self) -> Result<(), ClientError> {
        let connections = self.clients.len();
        for turn in (0..connections).cycle() {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let Some(choice) = self.chooser.choose() else {
                continue;
            };
            let client = &mut self.clients[turn];
            submit(client, &choice)?;
            client.next_reply()?.result?;
            self.chooser.finish(&asked(choice));
            self.answered.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Reads everything that an oracle watches.
///
/// # Errors
/// If the server refuses or the connection breaks.
pub fn fetch(client: &mut Client, offset: u64, bytes: u64) -> Result<Vec<u8>> {
    let mut image = Vec::with_capacity(usize::try_from(bytes)?);
    let mut tickets = HashMap::new();
    let longest = READ_BYTES.min(client.info().max_block_bytes);
    let piece = |at: u64| u32::try_from((bytes - at).min(longest.into())).unwrap_or(longest);
    image.resize(usize::try_from(bytes)?, 0);
    let mut next = 0;
    while next < bytes || !tickets.is_empty() {
        while next < bytes && tickets.len() < 8 {
            let length = piece(next);
            tickets.insert(
                client.submit(Submit::Read {
                    offset: offset + next,
                    length,
                })?,
                next,
            );
            next += u64::from(length);
        }
        let done = client.next_reply()?;
        let data = done.result?;
        let at = tickets
            .remove(&done.ticket)
            .context("an answer to nothing")?;
        let at = usize::try_from(at)?;
        image[at..at + data.len()].copy_from_slice(&data);
    }
    Ok(image)
}

/// Reads and judges what a node serves.
///
/// # Errors
/// If it cannot be read, or breaks a promise.
pub fn check(node: &Node, oracle: &Mutex<Oracle>, offset: u64) -> Result<Seen> {
    let bytes = lock(oracle).sectors() * SECTOR_BYTES;
    let image = fetch(&mut node.client()?, offset, bytes)?;
    Ok(lock(oracle).check(&image)?)
}
