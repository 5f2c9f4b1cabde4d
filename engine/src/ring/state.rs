//! Everything about a ring but the kernel's queues: which operations are in flight and what their
//! completions mean.
//!
//! **Invariant:** a flush that failed is never tried again (promise P5). A sync is issued a second
//! time only when the kernel says that the first one was never started.

use std::os::fd::{FromRawFd, OwnedFd};

use io_uring::{Submitter, opcode, squeue, types};
use nix::errno::Errno;

use super::files::{FileId, FileTable};
use super::op::{Completion, OpError, OpId, SegSource};
use super::setup::RingConfig;
use super::slab::{Entry, Kind, Part, Slab, Tag};
use super::sqe::{self, Registered};
use super::wake::Sleeper;
use crate::arena::Arena;

/// How often an operation is tried again when the kernel says EINTR or EAGAIN.
const RETRIES_MAX: u8 = 16;

/// Reads of files end on a multiple of this, in bytes, unless the file ends.
const SECTOR_BYTES: u32 = 512;

/// The tag of the submission that cancels the wake-up read.
const WAKE_CANCEL: Tag = Tag {
    index: 0,
    part: Part::Wake,
    generation: 1,
};

/// What to do with an operation to which the kernel owes nothing more.
enum Next {
    Restart,
    Finish(Result<u32, OpError>),
}

/// The kernel's side, as far as the state needs it.
pub(super) struct Kernel<'a> {
    pub(super) io: Submitter<'a>,
    pub(super) sq: squeue::SubmissionQueue<'a>,
}

pub(super) struct State {
    pub(super) slab: Slab,
    pub(super) arena: Arena,
    pub(super) files: FileTable,
    pub(super) sleeper: Sleeper,
    pub(super) registered: Registered,
    /// Completions that came about without the kernel, until the next wait.
    pub(super) ready: Vec<Completion>,
    /// Operations in flight for which the kernel should count I/O wait.
    pub(super) storage_in_flight: u32,
    /// Submissions so far. The queue holds the last few of them.
    pushed: u64,
    /// Where the wake-up read puts its counter. Boxed, so that it stays where it is.
    wake_value: Box<u64>,
    wake_armed: bool,
    wake_cancelling: bool,
    closing: bool,
}

impl State {
    pub(super) fn new(
        config: &RingConfig,
        arena: Arena,
        sleeper: Sleeper,
        registered: Registered,
    ) -> Self {
        Self {
            slab: Slab::new(config.operations, usize::from(config.segments)),
            arena,
            files: FileTable::new(config.files),
            sleeper,
            registered,
            ready: Vec::with_capacity(config.operations as usize),
            storage_in_flight: 0,
            pushed: 0,
            wake_value: Box::new(0),
            wake_armed: false,
            wake_cancelling: false,
            closing: false,
        }
    }

    fn push(&mut self, kernel: &mut Kernel<'_>, sqe: &squeue::Entry, tag: u64) {
        let sqe = sqe.clone().user_data(tag);
        // SAFETY: what the submission refers to stays valid until its completion. Vectors, headers,
        // times and buffers belong to a slab entry, which is released only when the kernel owes it
        // nothing; slots belong to the arena, which outlives the io_uring instance, and are pinned
        // against use; the wake-up counter is boxed and dropped after the instance.
        let pushed = unsafe { kernel.sq.push(&sqe) };
        pushed.expect("the queue has room for all submissions of all operations");
        self.pushed += 1;
    }

    /// Keeps the wake-up read in flight.
    pub(super) fn arm_wake(&mut self, kernel: &mut Kernel<'_>) {
        if self.wake_armed || self.closing {
            return;
        }
        let fd = types::Fd(self.sleeper.raw_fd());
        let target = std::ptr::from_mut(&mut *self.wake_value).cast();
        self.push(
            kernel,
            &opcode::Read::new(fd, target, 8).build(),
            Tag::WAKE.pack(),
        );
        self.wake_armed = true;
    }

    /// Hands what is left of an operation to the kernel.
    pub(super) fn start(&mut self, kernel: &mut Kernel<'_>, index: u32) {
        let entry = self.slab.get_mut(index);
        let linked = entry.kind == (Kind::Write { then_sync: true }) && !entry.sync_only;
        let file = entry.file;
        if !entry.sync_only {
            let Some(sqe) = sqe::main(entry, &self.registered) else {
                return;
            };
            entry.owed |= Part::Main.bit();
            entry.linked_at = linked.then_some(self.pushed);
            let sqe = if linked {
                sqe.flags(squeue::Flags::IO_LINK)
            } else {
                sqe
            };
            self.push(kernel, &sqe, self.slab.tag(index, Part::Main));
        }
        let entry = self.slab.get_mut(index);
        if linked || entry.sync_only {
            entry.sync_result = None;
            entry.owed |= Part::Sync.bit();
            self.push(
                kernel,
                &sqe::sync(file, true),
                self.slab.tag(index, Part::Sync),
            );
        }
    }

    /// Asks the kernel to give up on an operation. Its completion comes as for any other.
    pub(super) fn cancel(&mut self, kernel: &mut Kernel<'_>, index: u32) {
        let entry = self.slab.get_mut(index);
        entry.cancel_requested = true;
        let part = if entry.owed & Part::Main.bit() != 0 {
            Part::Main
        } else {
            Part::Sync
        };
        // Nothing to cancel in a close; one cancellation at a time is enough.
        if entry.owed & part.bit() == 0 || entry.owed & Part::Cancel.bit() != 0 {
            return;
        }
        entry.owed |= Part::Cancel.bit();
        let sqe = opcode::AsyncCancel::new(self.slab.tag(index, part)).build();
        self.push(kernel, &sqe, self.slab.tag(index, Part::Cancel));
    }

    /// Cancels all operations on a file and closes it after the last.
    pub(super) fn begin_close(
        &mut self,
        kernel: &mut Kernel<'_>,
        index: u32,
        file: FileId,
        out: &mut Vec<Completion>,
    ) {
        if self.files.begin_close(file, index) {
            self.finish_close(kernel, index, out);
            return;
        }
        for other in 0..u32::try_from(self.slab.capacity()).expect("a bounded slab") {
            let entry = self.slab.get(other);
            if entry.file == Some(file) && !matches!(entry.kind, Kind::Free | Kind::Close) {
                self.cancel(kernel, other);
            }
        }
    }

    fn finish_close(&mut self, kernel: &Kernel<'_>, index: u32, out: &mut Vec<Completion>) {
        let entry = self.slab.get(index);
        let (token, file) = (entry.token, entry.file.expect("a close has a file"));
        let closed = self.files.close(&kernel.io, file);
        self.slab.release(index);
        let result = match closed {
            Ok(()) => Ok(0),
            Err(error) => Err(OpError::Os(Errno::from_raw(
                error.raw_os_error().unwrap_or(0),
            ))),
        };
        out.push(Completion {
            token,
            result,
            buf: None,
            file: None,
            more: false,
        });
    }

    /// Takes one completion from the kernel.
    pub(super) fn complete(
        &mut self,
        kernel: &mut Kernel<'_>,
        user_data: u64,
        result: i32,
        out: &mut Vec<Completion>,
    ) {
        let tag = Tag::unpack(user_data).expect("the kernel returns what it was given");
        if tag.part == Part::Wake {
            match tag == WAKE_CANCEL {
                true => self.wake_cancelling = false,
                false => self.wake_armed = false,
            }
            return;
        }
        let entry = self.slab.get_mut(tag.index);
        assert!(
            entry.generation == tag.generation && entry.owed & tag.part.bit() != 0,
            "a completion for an operation that is over: {tag:?}"
        );
        entry.owed &= !tag.part.bit();
        match tag.part {
            Part::Main if entry.kind == Kind::Accept => {
                self.accepted(kernel, tag.index, result, out);
            }
            Part::Main => moved(entry, result),
            Part::Sync => entry.sync_result = Some(result),
            Part::Cancel | Part::Wake => {}
        }
        if self.slab.get(tag.index).owed == 0 {
            match next(self.slab.get_mut(tag.index)) {
                Next::Restart => self.start(kernel, tag.index),
                Next::Finish(result) => self.finish(kernel, tag.index, result, out),
            }
        }
    }

    /// A connection came, or the listening socket has something to say.
    fn accepted(
        &mut self,
        kernel: &Kernel<'_>,
        index: u32,
        result: i32,
        out: &mut Vec<Completion>,
    ) {
        let entry = self.slab.get_mut(index);
        if result < 0 {
            entry.error = match Errno::from_raw(-result) {
                // The connection died in the queue, or nothing happened: listen on.
                Errno::ECONNABORTED | Errno::EINTR | Errno::EAGAIN | Errno::EPROTO => None,
                _ => Some(OpError::from_result(result)),
            };
            return;
        }
        let token = entry.token;
        // SAFETY: the kernel has just opened this descriptor for us; nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(result) };
        let (result, file) = match self.files.add(&kernel.io, fd) {
            Ok(file) => (Ok(0), Some(file)),
            // The table is full: the connection is closed and the caller told.
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::ENFILE);
                (Err(OpError::Os(Errno::from_raw(errno))), None)
            }
        };
        out.push(Completion {
            token,
            result,
            buf: None,
            file,
            more: true,
        });
    }

    fn finish(
        &mut self,
        kernel: &Kernel<'_>,
        index: u32,
        result: Result<u32, OpError>,
        out: &mut Vec<Completion>,
    ) {
        let entry = self.slab.get_mut(index);
        let access = entry.kind.access();
        for seg in &entry.segs {
            if let SegSource::Slot(slot) = seg.source {
                self.arena.unpin(slot, access);
            }
        }
        self.storage_in_flight -= u32::from(entry.kind.is_storage());
        let (token, buf, file) = (entry.token, entry.buf.take(), entry.file);
        self.slab.release(index);
        out.push(Completion {
            token,
            result,
            buf,
            file: None,
            more: false,
        });
        if let Some(close) = file.and_then(|file| self.files.finished(file)) {
            self.finish_close(kernel, close, out);
        }
    }

    /// Notes that the kernel has left `unconsumed` submissions in the queue.
    ///
    /// A write and the sync linked to it are one chain only if the kernel took both at once. If it
    /// stopped between them (it had no memory), they run side by side and the sync proves nothing.
    pub(super) fn consumed_all_but(&mut self, unconsumed: usize) {
        if unconsumed == 0 {
            return;
        }
        let Some(last) = self.pushed.checked_sub(unconsumed as u64 + 1) else {
            return;
        };
        let cut = self
            .slab
            .indices()
            .find(|&index| self.slab.get(index).linked_at == Some(last));
        if let Some(index) = cut {
            self.slab.get_mut(index).chain_cut = true;
        }
    }

    /// Cancels everything, for the end of the ring.
    pub(super) fn begin_shutdown(&mut self, kernel: &mut Kernel<'_>) {
        self.closing = true;
        for index in 0..u32::try_from(self.slab.capacity()).expect("a bounded slab") {
            if self.slab.get(index).kind != Kind::Free {
                self.cancel(kernel, index);
            }
        }
        if self.wake_armed {
            self.wake_cancelling = true;
            let sqe = opcode::AsyncCancel::new(Tag::WAKE.pack()).build();
            self.push(kernel, &sqe, WAKE_CANCEL.pack());
        }
    }

    /// Whether the kernel owes nothing at all.
    pub(super) fn is_drained(&self) -> bool {
        self.slab.in_flight() == 0 && !self.wake_armed && !self.wake_cancelling
    }

    /// The id of an entry in use.
    pub(super) fn id(&self, index: u32) -> OpId {
        OpId {
            index,
            generation: self.slab.get(index).generation,
        }
    }
}

/// Takes the result of an operation's main part into its entry.
fn moved(entry: &mut Entry, result: i32) {
    let Ok(bytes) = u32::try_from(result) else {
        failed(entry, result);
        return;
    };
    match entry.kind {
        Kind::Read | Kind::Write { .. } | Kind::Send if bytes == 0 => {
            let end = entry.kind == Kind::Read;
            entry.error = Some(if end {
                OpError::UnexpectedEof
            } else {
                OpError::WroteNothing
            });
        }
        Kind::Read | Kind::Write { .. } | Kind::Send | Kind::Recv => {
            assert!(
                bytes <= entry.total - entry.done,
                "the kernel moved more than it was given"
            );
            entry.advance(bytes);
            entry.retries = 0;
            let partial_sector = !entry.done.is_multiple_of(SECTOR_BYTES);
            if entry.kind == Kind::Read && entry.done < entry.total && partial_sector {
                // O_DIRECT could not go on from here; only the end of the file stops there.
                entry.error = Some(OpError::UnexpectedEof);
            }
        }
        _ => {}
    }
}

fn failed(entry: &mut Entry, result: i32) {
    let again = matches!(Errno::from_raw(-result), Errno::EINTR | Errno::EAGAIN);
    match entry.kind {
        Kind::Timeout if result == -libc::ETIME => {}
        // A failed flush stays failed, whatever the reason.
        Kind::Sync { .. } => entry.error = Some(OpError::from_result(result)),
        _ if again && entry.retries < RETRIES_MAX && !entry.cancel_requested => {
            entry.retries += 1;
            // Let a thread that may sleep do it, rather than asking in a circle.
            entry.force_async = entry.kind.is_storage();
        }
        _ => entry.error = Some(OpError::from_result(result)),
    }
}

/// What follows from all that came back.
fn next(entry: &mut Entry) -> Next {
    if let Some(error) = entry.error {
        return Next::Finish(Err(error));
    }
    let again = |entry: &Entry| match entry.cancel_requested {
        true => Next::Finish(Err(OpError::Cancelled)),
        false => Next::Restart,
    };
    match entry.kind {
        Kind::Accept => again(entry),
        // The retry count is reset by every transfer.
        Kind::Recv | Kind::Fallocate { .. } if entry.retries > 0 => again(entry),
        Kind::Read | Kind::Write { .. } | Kind::Send if entry.done < entry.total => again(entry),
        Kind::Write { then_sync: true } => {
            let result = entry.sync_result.take().unwrap_or(-libc::ECANCELED);
            let never_ran = result == -libc::ECANCELED && !entry.sync_only;
            if never_ran || (result >= 0 && entry.chain_cut) {
                entry.sync_only = true;
                entry.chain_cut = false;
                return again(entry);
            }
            Next::Finish(match result {
                0.. => Ok(entry.total),
                _ => Err(OpError::from_result(result)),
            })
        }
        _ => Next::Finish(Ok(entry.done)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A linked write of 4096 bytes after both of its completions.
    fn judged(written: i32, synced: i32, change: fn(&mut Entry)) -> (String, bool) {
        let mut slab = Slab::new(1, 1);
        let index = slab.take().expect("a free entry");
        let entry = slab.get_mut(index);
        entry.kind = Kind::Write { then_sync: true };
        entry.total = 4096;
        entry.iov.push(libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 4096,
        });
        change(entry);
        moved(entry, written);
        entry.sync_result = Some(synced);
        let verdict = match next(entry) {
            Next::Restart => "restart".to_owned(),
            Next::Finish(result) => format!("{result:?}"),
        };
        (verdict, entry.sync_only)
    }

    fn same(_: &mut Entry) {}

    #[test]
    fn a_linked_write_succeeds_only_if_all_was_written_and_then_synced() {
        assert_eq!(judged(4096, 0, same), ("Ok(4096)".to_owned(), false));
        assert_eq!(judged(4096, -libc::EIO, same).0, "Err(Os(EIO))");
        assert_eq!(judged(-libc::EIO, -libc::ECANCELED, same).0, "Err(Os(EIO))");
        assert_eq!(judged(0, -libc::ECANCELED, same).0, "Err(WroteNothing)");
        // Short: the rest is written, and synced after that.
        assert_eq!(
            judged(512, -libc::ECANCELED, same),
            ("restart".to_owned(), false)
        );
        // A sync that passed over half the data proves nothing.
        assert_eq!(judged(512, 0, same), ("restart".to_owned(), false));
    }

    #[test]
    fn a_sync_is_repeated_only_if_it_never_started_or_started_too_early() {
        assert_eq!(
            judged(4096, -libc::ECANCELED, same),
            ("restart".to_owned(), true)
        );
        let cut = |entry: &mut Entry| entry.chain_cut = true;
        assert_eq!(judged(4096, 0, cut), ("restart".to_owned(), true));
        assert_eq!(judged(4096, -libc::EIO, cut).0, "Err(Os(EIO))");
        let cancelled = |entry: &mut Entry| entry.cancel_requested = true;
        assert_eq!(
            judged(4096, -libc::ECANCELED, cancelled).0,
            "Err(Cancelled)"
        );
        // The second one counts, whatever it says.
        let mut slab = Slab::new(1, 1);
        let entry = slab.get_mut(0);
        entry.kind = Kind::Write { then_sync: true };
        entry.sync_only = true;
        entry.sync_result = Some(-libc::ECANCELED);
        assert!(matches!(next(entry), Next::Finish(Err(OpError::Cancelled))));
    }

    #[test]
    fn a_sync_of_its_own_is_never_repeated() {
        for errno in [libc::EIO, libc::EINTR, libc::EAGAIN, libc::ENOSPC] {
            let mut slab = Slab::new(1, 1);
            let entry = slab.get_mut(0);
            entry.kind = Kind::Sync { data_only: true };
            moved(entry, -errno);
            assert!(
                matches!(next(entry), Next::Finish(Err(OpError::Os(_)))),
                "{errno}"
            );
        }
    }

    #[test]
    fn a_submission_cut_between_a_write_and_its_sync_is_noticed() {
        let config = RingConfig {
            operations: 4,
            segments: 1,
            files: 1,
            ..RingConfig::default()
        };
        let registered = Registered {
            base: 0,
            len: 0,
            vectored: false,
        };
        for (unconsumed, cut) in [(0, false), (1, true), (2, false)] {
            let arena = Arena::new(1).expect("a page");
            let sleeper = Sleeper::new().expect("an eventfd");
            let mut state = State::new(&config, arena, sleeper, registered);
            // Ten submissions, of which the last two are a write and its sync.
            state.pushed = 10;
            let index = state.slab.take().expect("a free entry");
            let entry = state.slab.get_mut(index);
            entry.kind = Kind::Write { then_sync: true };
            entry.linked_at = Some(8);
            state.consumed_all_but(unconsumed);
            assert_eq!(
                state.slab.get(index).chain_cut,
                cut,
                "{unconsumed} left in the queue"
            );
        }
    }
}
