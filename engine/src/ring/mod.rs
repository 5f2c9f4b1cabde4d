//! The reactor of a shard: one io_uring instance, driven by one thread.
//!
//! [`Ring::submit`] takes operations, [`Ring::wait`] hands them to the kernel in one system call
//! and returns completions as values. Nothing is run inside the reaping loop; an idle ring sleeps
//! in the kernel and uses no CPU (promise P9).
//!
//! Invariants:
//! - **The kernel owns what was submitted.** The ring owns the arena and pins the slots of an
//!   operation; buffers move in and come back. Dropping a ring cancels, reaps to zero, then frees.
//! - **The completion queue cannot overflow.** The number of operations is bounded, each owes at
//!   most three completions, the queue holds them all. Connections are accepted one at a time for
//!   that reason: a multishot accept has no such bound.
//! - **A full ring gives the operation back**, with its buffer; the caller queues it.
//! - **No allocation after opening**, if the vector given to [`Ring::wait`] has room.
//! - Success means all bytes: short reads, writes and sends are continued here.
//!
//! Not here: what the operations mean, retry policy, and opening devices (`device`).
#![expect(
    unsafe_code,
    reason = "submissions carry addresses of memory that the kernel will use"
)]

mod buffer;
mod files;
mod op;
mod setup;
mod slab;
mod sqe;
mod state;
mod wake;

use std::io;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use io_uring::IoUring;
use io_uring::types::{SubmitArgs, Timespec};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

pub use buffer::{BUFFER_ALIGN, BUFFER_BYTES_MAX, OwnedBuf};
pub use files::FileId;
pub use op::{
    Completion, FallocateMode, Memory, Op, OpError, OpId, Refusal, Refused, Seg, SegSource,
    TRANSFER_BYTES_MAX,
};
pub use setup::{BufferMode, RingConfig, RingError, RingFacts, SEGMENTS_MAX};
pub use wake::Waker;

use self::slab::Kind;
use self::sqe::Registered;
use self::state::{Kernel, State};
use self::wake::Sleeper;
use crate::arena::Arena;

/// Flags of `io_uring_enter`, from the kernel's interface.
const ENTER_GETEVENTS: u32 = 1;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_NO_IOWAIT: u32 = 1 << 7;

/// How often the kernel may answer "not now" to one wait before that is an error.
const ENTER_RETRIES_MAX: u32 = 1000;

/// How long dropping a ring waits for a device that does not answer. After that the memory is
/// leaked: the kernel may still write to it.
const DROP_LIMIT: Duration = Duration::from_secs(60);

/// What ended a [`Ring::wait`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Waited {
    /// Completions added to the vector.
    pub completions: usize,
    /// Somebody called [`Waker::wake`]: look at the queues.
    pub woken: bool,
}

/// One io_uring instance with its arena. It stays on the thread that opened it.
pub struct Ring {
    io: ManuallyDrop<IoUring>,
    state: ManuallyDrop<State>,
    facts: RingFacts,
    segments: usize,
    /// Operations on files after which the kernel is told without waiting for the next wait.
    submit_batch: u32,
    /// The same if the last of them is a read.
    read_batch: u32,
    /// Operations on files since it was told.
    unsubmitted: u32,
    /// A single issuer: the kernel refuses other threads.
    thread: PhantomData<*const ()>,
}

impl Ring {
    /// Opens a ring on the calling thread, raises the memlock and open-files limits to what is
    /// allowed, and registers the arena if that suffices ([`Ring::facts`] tells).
    ///
    /// # Errors
    /// [`RingError`] names what the kernel lacks or forbids, and what to do.
    pub fn new(config: RingConfig, arena: Arena) -> Result<Self, RingError> {
        let (io, facts) = setup::open(&config, &arena)?;
        let sleeper = Sleeper::new().map_err(|errno| RingError::Os {
            what: "opening an eventfd",
            source: errno.into(),
        })?;
        let in_use = facts.buffers == BufferMode::Registered;
        let registered = Registered {
            base: arena.base() as usize,
            len: if in_use { arena.len_bytes() } else { 0 },
            vectored: facts.vectored_registered,
        };
        Ok(Self {
            io: ManuallyDrop::new(io),
            state: ManuallyDrop::new(State::new(&config, arena, sleeper, registered)),
            facts,
            segments: usize::from(config.segments),
            submit_batch: config.submit_batch,
            read_batch: config.read_batch,
            unsubmitted: 0,
            thread: PhantomData,
        })
    }

    /// What the ring found when it was opened.
    #[must_use]
    pub fn facts(&self) -> &RingFacts {
        &self.facts
    }

    /// The slots.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.state.arena
    }

    /// The slots, to allocate, fill and free.
    #[must_use]
    pub fn arena_mut(&mut self) -> &mut Arena {
        &mut self.state.arena
    }

    /// A handle that makes [`Ring::wait`] return, for other threads.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.state.sleeper.waker()
    }

    /// Operations in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.state.slab.in_flight()
    }

    /// Operations that can still be submitted.
    #[must_use]
    pub fn room(&self) -> usize {
        self.state.slab.capacity() - self.state.slab.in_flight()
    }

    /// Takes a file or socket. It is set to blocking: the ring waits in its place.
    ///
    /// # Errors
    /// `ENFILE` when the ring has as many files as it was made for.
    pub fn add_file(&mut self, fd: OwnedFd) -> io::Result<FileId> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
        }
        self.state.files.add(&self.io.submitter(), fd)
    }

    /// The descriptor behind a file, for socket options and the like.
    #[must_use]
    pub fn fd(&self, file: FileId) -> Option<BorrowedFd<'_>> {
        self.state.files.fd(file)
    }

    /// Gives a file or socket back, at once and also where the ring is full.
    ///
    /// # Errors
    /// `EBUSY` while operations on it are in flight, `EBADF` if it is not there; what else the
    /// kernel says, and then the file is closed.
    pub fn take_file(&mut self, file: FileId) -> io::Result<OwnedFd> {
        self.state.files.take(&self.io.submitter(), file)
    }

    /// Takes an operation; the kernel gets it with the next [`Ring::wait`], or earlier if
    /// [`RingConfig::submit_batch`] says so.
    ///
    /// # Errors
    /// [`Refused`] gives the operation back with its buffer.
    ///
    /// # Panics
    /// If a segment names a slot that is not allocated or leaves it: the caller has lost track of
    /// its memory.
    pub fn submit<'a>(&mut self, op: Op<'a>, token: u64) -> Result<OpId, Refused<'a>> {
        if let Err(why) = self.check(&op) {
            return Err(Refused { op, why });
        }
        let state = &mut *self.state;
        let Some(index) = state.slab.take() else {
            return Err(Refused {
                op,
                why: Refusal::Full,
            });
        };
        let id = state.id(index);
        state.slab.get_mut(index).token = token;
        let (io, sq, _) = self.io.split();
        let mut kernel = Kernel { io, sq };
        if let Op::Close { file } = op {
            let entry = state.slab.get_mut(index);
            entry.kind = Kind::Close;
            entry.file = Some(file);
            let mut ready = std::mem::take(&mut state.ready);
            state.begin_close(&mut kernel, index, file, &mut ready);
            state.ready = ready;
            return Ok(id);
        }
        op::fill(state, index, op);
        state.start(&mut kernel, index);
        drop(kernel);
        let kind = self.state.slab.get(index).kind;
        if kind.is_storage() {
            self.unsubmitted += 1;
            let batch = match kind {
                Kind::Read => self.read_batch,
                _ => self.submit_batch,
            };
            if self.unsubmitted >= batch {
                // Whatever is wrong shows again, and is reported, in the next wait.
                let _ = self.enter(false, 0, None);
            }
        }
        Ok(id)
    }

    fn check(&self, op: &Op<'_>) -> Result<(), Refusal> {
        let known = |file: &FileId| match self.state.files.is_open(*file) {
            true => Ok(()),
            false => Err(Refusal::NoSuchFile),
        };
        match op {
            Op::Read {
                file,
                offset,
                memory,
            }
            | Op::Write {
                file,
                offset,
                memory,
                ..
            } => {
                known(file)?;
                let total = memory.check(self.segments)?;
                offset
                    .checked_add(u64::from(total))
                    .filter(|&end| i64::try_from(end).is_ok())
                    .map_or(Err(Refusal::TooLong), |_| Ok(()))
            }
            Op::Recv { file, memory } | Op::Send { file, memory } => {
                known(file)?;
                memory.check(self.segments).map(|_| ())
            }
            Op::Sync { file, .. }
            | Op::Fallocate { file, .. }
            | Op::Accept { file }
            | Op::Close { file } => known(file),
            Op::Timeout { .. } => Ok(()),
        }
    }

    /// Asks the kernel to give up on an operation; its completion comes all the same, with its true
    /// result if it was too late. False if the operation is over or is a close.
    pub fn cancel(&mut self, id: OpId) -> bool {
        let Some(index) = self.state.slab.find(id) else {
            return false;
        };
        if self.state.slab.get(index).kind == Kind::Close {
            return false;
        }
        let (io, sq, _) = self.io.split();
        self.state.cancel(&mut Kernel { io, sq }, index);
        true
    }

    /// Hands new operations to the kernel and appends completions to `out`. Blocks until there are
    /// at least `min` of them, `timeout` has passed (never, if `None`), or somebody wakes the ring.
    /// With `min = 0` it does not block.
    ///
    /// Completions come in the order in which the kernel reported them.
    ///
    /// # Errors
    /// [`RingError::Os`] when the kernel refuses the call itself: the ring is then of no more use.
    pub fn wait(
        &mut self,
        min: usize,
        timeout: Option<Duration>,
        out: &mut Vec<Completion>,
    ) -> Result<Waited, RingError> {
        let before = out.len();
        let deadline = match timeout {
            Some(timeout) if min > 0 => Instant::now().checked_add(timeout),
            _ => None,
        };
        let mut expired = timeout == Some(Duration::ZERO);
        let mut woken = false;
        let mut entered = false;
        let mut retries = 0;
        out.append(&mut self.state.ready);
        loop {
            let unsubmitted = self.reap(out);
            let have = out.len() - before;
            woken |= self.state.sleeper.wake_up();
            let satisfied = have >= min || woken || expired;
            if satisfied && (entered || (unsubmitted == 0 && have + usize::from(woken) > 0)) {
                return Ok(Waited {
                    completions: have,
                    woken,
                });
            }
            let block = !satisfied && self.state.sleeper.fall_asleep();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            match self.enter(block, ENTER_GETEVENTS, left) {
                Ok(()) => entered = true,
                Err(error) => match error.raw_os_error() {
                    Some(libc::ETIME) => (expired, entered) = (true, true),
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) if retries < ENTER_RETRIES_MAX => {
                        retries += 1;
                        std::thread::yield_now();
                    }
                    _ => {
                        return Err(RingError::Os {
                            what: "waiting",
                            source: error,
                        });
                    }
                },
            }
        }
    }

    /// Takes over all completions the kernel has ready. Returns the number of submissions that it
    /// has not seen yet.
    fn reap(&mut self, out: &mut Vec<Completion>) -> usize {
        let (io, sq, mut cq) = self.io.split();
        let mut kernel = Kernel { io, sq };
        // Taking one may submit more, but the kernel adds no completions until it is entered.
        for cqe in &mut cq {
            self.state
                .complete(&mut kernel, cqe.user_data(), cqe.result(), out);
        }
        self.state.arm_wake(&mut kernel);
        kernel.sq.len()
    }

    /// One system call: submits all, with [`ENTER_GETEVENTS`] runs what the kernel has deferred,
    /// and waits for a completion if asked to.
    fn enter(&mut self, block: bool, flags: u32, timeout: Option<Duration>) -> io::Result<()> {
        let quiet = self.facts.quiet_wait && self.state.storage_in_flight == 0;
        let (io, mut sq, _) = self.io.split();
        sq.sync();
        let to_submit = u32::try_from(sq.len()).expect("a queue has at most 32768 entries");
        let flags = flags | if quiet { ENTER_NO_IOWAIT } else { 0 };
        let result = match timeout.filter(|_| block) {
            None => {
                // SAFETY: no argument is passed; what the submissions refer to was seen to when
                // they were queued.
                unsafe { io.enter::<libc::sigset_t>(to_submit, u32::from(block), flags, None) }
            }
            Some(timeout) => {
                let time = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&time);
                // SAFETY: the argument has the layout that EXT_ARG announces and outlives the call.
                unsafe {
                    io.enter(
                        to_submit,
                        u32::from(block),
                        flags | ENTER_EXT_ARG,
                        Some(&args),
                    )
                }
            }
        };
        sq.sync();
        self.state.consumed_all_but(sq.len());
        self.unsubmitted = 0;
        result.map(|_| ())
    }

    /// Cancels everything and waits for the kernel to let go. False if it does not.
    fn shut_down(&mut self) -> bool {
        let deadline = Instant::now() + DROP_LIMIT;
        let mut out = Vec::new();
        {
            let (io, sq, _) = self.io.split();
            self.state.begin_shutdown(&mut Kernel { io, sq });
        }
        while Instant::now() < deadline {
            self.reap(&mut out);
            out.clear();
            if self.state.is_drained() {
                // The kernel tears an instance down in its own time. What it held is let go now,
                // so that whoever drops a ring can open its files again. Failure only delays that.
                let _ = self.io.submitter().unregister_files();
                let _ = self.io.submitter().unregister_buffers();
                return true;
            }
            if let Err(error) = self.enter(true, ENTER_GETEVENTS, Some(Duration::from_secs(1))) {
                match error.raw_os_error() {
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return false,
                }
            }
        }
        false
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let drained = self.shut_down();
        // SAFETY: dropped here once and never used again.
        unsafe { ManuallyDrop::drop(&mut self.io) };
        if drained {
            // SAFETY: as above. The kernel owes nothing, so nothing refers to this memory.
            unsafe { ManuallyDrop::drop(&mut self.state) };
        }
        // Else the kernel may still write to slots and buffers: they are leaked.
    }
}

impl std::os::fd::AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the instance is open as long as the ring lives.
        unsafe { BorrowedFd::borrow_raw(self.io.as_raw_fd()) }
    }
}
