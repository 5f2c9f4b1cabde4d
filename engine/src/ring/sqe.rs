//! From an entry to what the kernel reads.

use io_uring::{opcode, squeue, types};

use super::files::FileId;
use super::setup::REGISTERED_BYTES;
use super::slab::{Entry, Kind};

/// Where the registered memory is, to choose the cheaper operations.
#[derive(Clone, Copy)]
pub(super) struct Registered {
    /// First byte and length in bytes of the arena; no length if it is not registered.
    pub(super) base: usize,
    pub(super) len: usize,
    pub(super) vectored: bool,
}

impl Registered {
    /// The registered buffer that holds all of the range.
    fn buffer_of(&self, part: &libc::iovec) -> Option<u16> {
        let start = (part.iov_base as usize).checked_sub(self.base)?;
        if start >= self.len || part.iov_len > self.len - start {
            return None;
        }
        let first = start / REGISTERED_BYTES;
        let last = (start + part.iov_len - 1) / REGISTERED_BYTES;
        if first == last {
            u16::try_from(first).ok()
        } else {
            None
        }
    }

    /// The registered buffer that holds all of the vector.
    fn buffer_of_all(&self, parts: &[libc::iovec]) -> Option<u16> {
        if !self.vectored {
            return None;
        }
        let first = self.buffer_of(parts.first()?)?;
        parts
            .iter()
            .all(|part| self.buffer_of(part) == Some(first))
            .then_some(first)
    }
}

/// Lengths that were checked against [`super::op::TRANSFER_BYTES_MAX`] or [`super::SEGMENTS_MAX`].
fn short(len: usize) -> u32 {
    u32::try_from(len).expect("transfers and vectors are bounded when they are submitted")
}

fn target(file: Option<FileId>) -> types::Fixed {
    file.expect("every operation but a timeout has a file")
        .fixed()
}

/// The entry's main submission, for what is not done yet. `None` if the kernel has no part in it.
///
/// Pointers in it refer to the entry and to memory it owns or pins; the caller keeps the entry in
/// its place until the completion.
pub(super) fn main(entry: &mut Entry, registered: &Registered) -> Option<squeue::Entry> {
    let rest = entry.iov.get(entry.iov_next..).unwrap_or_default();
    let sqe = match entry.kind {
        Kind::Free | Kind::Close => return None,
        Kind::Read => read(entry, rest, registered),
        Kind::Write { .. } => write(entry, rest, registered),
        Kind::Sync { data_only } => sync(entry.file, data_only),
        Kind::Fallocate { mode, len } => opcode::Fallocate::new(target(entry.file), len)
            .offset(entry.offset)
            .mode(mode.flags())
            .build(),
        Kind::Accept => opcode::Accept::new(
            target(entry.file),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
        .flags(libc::SOCK_CLOEXEC)
        .build(),
        Kind::Recv => match rest {
            [one] => opcode::Recv::new(target(entry.file), one.iov_base.cast(), short(one.iov_len))
                .build(),
            _ => {
                set_header(entry);
                opcode::RecvMsg::new(target(entry.file), &raw mut entry.header).build()
            }
        },
        Kind::Send => {
            let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
            match rest {
                [one] => opcode::Send::new(
                    target(entry.file),
                    one.iov_base.cast_const().cast(),
                    short(one.iov_len),
                )
                .flags(flags)
                .build(),
                _ => {
                    set_header(entry);
                    opcode::SendMsg::new(target(entry.file), &raw const entry.header)
                        .flags(flags.cast_unsigned())
                        .build()
                }
            }
        }
        Kind::Timeout => opcode::Timeout::new(&raw const entry.time).build(),
    };
    Some(if entry.force_async {
        sqe.flags(squeue::Flags::ASYNC)
    } else {
        sqe
    })
}

/// A sync of the entry's file.
pub(super) fn sync(file: Option<FileId>, data_only: bool) -> squeue::Entry {
    let flags = if data_only {
        types::FsyncFlags::DATASYNC
    } else {
        types::FsyncFlags::empty()
    };
    opcode::Fsync::new(target(file)).flags(flags).build()
}

fn set_header(entry: &mut Entry) {
    let rest = &mut entry.iov[entry.iov_next..];
    entry.header.msg_iov = rest.as_mut_ptr();
    entry.header.msg_iovlen = rest.len();
}

fn read(entry: &Entry, rest: &[libc::iovec], registered: &Registered) -> squeue::Entry {
    let file = target(entry.file);
    let offset = entry.offset + u64::from(entry.done);
    if let [one] = rest {
        let (base, len) = (one.iov_base.cast::<u8>(), short(one.iov_len));
        return match registered.buffer_of(one) {
            Some(index) => opcode::ReadFixed::new(file, base, len, index)
                .offset(offset)
                .build(),
            None => opcode::Read::new(file, base, len).offset(offset).build(),
        };
    }
    let count = short(rest.len());
    match registered.buffer_of_all(rest) {
        Some(index) => opcode::ReadvFixed::new(file, rest.as_ptr(), count, index)
            .offset(offset)
            .build(),
        None => opcode::Readv::new(file, rest.as_ptr(), count)
            .offset(offset)
            .build(),
    }
}

fn write(entry: &Entry, rest: &[libc::iovec], registered: &Registered) -> squeue::Entry {
    let file = target(entry.file);
    let offset = entry.offset + u64::from(entry.done);
    if let [one] = rest {
        let (base, len) = (one.iov_base.cast_const().cast::<u8>(), short(one.iov_len));
        return match registered.buffer_of(one) {
            Some(index) => opcode::WriteFixed::new(file, base, len, index)
                .offset(offset)
                .build(),
            None => opcode::Write::new(file, base, len).offset(offset).build(),
        };
    }
    let count = short(rest.len());
    match registered.buffer_of_all(rest) {
        Some(index) => opcode::WritevFixed::new(file, rest.as_ptr(), count, index)
            .offset(offset)
            .build(),
        None => opcode::Writev::new(file, rest.as_ptr(), count)
            .offset(offset)
            .build(),
    }
}
