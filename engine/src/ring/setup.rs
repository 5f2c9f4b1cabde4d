//! Opening a ring: what the kernel must offer, what is used if it is there, and a clear word when
//! something stands in the way.
//!
//! Required, since Linux 6.1: single issuer and deferred task work (completions are handed over
//! when the shard asks for them, never by interrupting it), and every operation of [`REQUIRED`].
//! They are probed by asking for them; the version is only quoted in messages. Used when there:
//! registered buffers (as far as the memlock limit goes), vectored registered I/O (6.15), waiting
//! without counting as I/O wait (6.15).

use std::fmt;
use std::io;

use io_uring::{IoUring, Probe, opcode};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use super::slab::{CQES_PER_OP, ENTRIES_MAX};
use crate::arena::Arena;

/// The kernel's limit for one registered buffer. The arena is registered in pieces of this size.
pub(super) const REGISTERED_BYTES: usize = 1 << 30;

/// Most segments an operation can be made for: the kernel takes no longer vectors.
pub const SEGMENTS_MAX: u16 = 1024;

/// Limits of a ring. All memory for them is taken when it is opened.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// Most operations in flight, 1 to 8192.
    pub operations: u32,
    /// Most segments of one operation after merging, 1 to [`SEGMENTS_MAX`].
    pub segments: u16,
    /// Most files and sockets.
    pub files: u16,
    /// Register the arena with the kernel as far as the memlock limit allows. Off: never.
    pub register_buffers: bool,
    /// Hand operations on files to the kernel after so many, without waiting for the next
    /// [`Ring::wait`](super::Ring::wait). Small batches keep the device busy while the shard still
    /// prepares the next ones; larger ones save system calls. 0: only when waiting.
    pub submit_batch: u32,
    /// The same if the last of them is a read: somebody waits for it.
    pub read_batch: u32,
}

impl Default for RingConfig {
    /// Room for a MiB of scattered slots with its header in each of 256 operations.
    fn default() -> Self {
        Self {
            operations: 256,
            segments: 272,
            files: 256,
            register_buffers: true,
            submit_batch: 4,
            read_batch: 4,
        }
    }
}

/// Why a ring could not be opened or has stopped working.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The configuration is out of range.
    #[error("ring configuration: {what} must be {range}")]
    Config {
        /// The field.
        what: &'static str,
        /// What it may be.
        range: &'static str,
    },
    /// The kernel does not know a flag or an operation.
    #[error(
        "kernel {kernel} lacks {what} of io_uring; Linux 6.1 or later is needed: update the kernel"
    )]
    KernelTooOld {
        /// The running kernel's release.
        kernel: String,
        /// What is missing.
        what: &'static str,
    },
    /// A sysctl forbids io_uring.
    #[error(
        "io_uring is disabled by sysctl kernel.io_uring_disabled = {value}: set it to 0, or to 1 \
         with the daemon's group in kernel.io_uring_group"
    )]
    Disabled {
        /// The sysctl's value.
        value: String,
    },
    /// A sandbox forbids io_uring.
    #[error(
        "io_uring is refused by a seccomp filter or security module ({source}): allow \
         io_uring_setup, io_uring_enter and io_uring_register for this service or container"
    )]
    Forbidden {
        /// The kernel's word.
        source: io::Error,
    },
    /// The kernel could not account the ring's memory.
    #[error(
        "no memory for a ring of {operations} operations ({source}); the memlock limit is {limit}: \
         raise LimitMEMLOCK of the service, or lower the number of operations"
    )]
    Memory {
        /// Operations asked for.
        operations: u32,
        /// The limit, in words.
        limit: String,
        /// The kernel's word.
        source: io::Error,
    },
    /// The table of files could not be registered.
    #[error("registering a table of {files} files: {source}; raise LimitNOFILE of the service")]
    Files {
        /// Places asked for.
        files: u16,
        /// The kernel's word.
        source: io::Error,
    },
    /// Anything else.
    #[error("io_uring: {what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
}

/// Whether the arena is registered with the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BufferMode {
    /// The kernel holds the arena's pages; no page is looked up per operation.
    Registered,
    /// Turned off in the configuration.
    Off,
    /// The kernel refused; each operation looks up its pages.
    Refused {
        /// Its word, and the limit that stood in the way.
        why: String,
    },
}

/// What a ring found, for status output.
#[derive(Clone, Debug)]
pub struct RingFacts {
    /// The running kernel's release.
    pub kernel: String,
    /// The state of the arena.
    pub buffers: BufferMode,
    /// Scattered slots can use the registration too.
    pub vectored_registered: bool,
    /// An idle ring does not show up as I/O wait.
    pub quiet_wait: bool,
}

impl fmt::Display for RingFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "io_uring on Linux {}, buffers ", self.kernel)?;
        match &self.buffers {
            BufferMode::Registered if self.vectored_registered => {
                f.write_str("registered (vectors too)")
            }
            BufferMode::Registered => f.write_str("registered"),
            BufferMode::Off => f.write_str("not registered by configuration"),
            BufferMode::Refused { why } => write!(f, "not registered: {why}"),
        }
    }
}

const REQUIRED: [(u8, &str); 15] = [
    (opcode::Read::CODE, "READ"),
    (opcode::Write::CODE, "WRITE"),
    (opcode::Readv::CODE, "READV"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::ReadFixed::CODE, "READ_FIXED"),
    (opcode::WriteFixed::CODE, "WRITE_FIXED"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
    (opcode::Accept::CODE, "ACCEPT"),
    (opcode::Recv::CODE, "RECV"),
    (opcode::Send::CODE, "SEND"),
    (opcode::RecvMsg::CODE, "RECVMSG"),
    (opcode::SendMsg::CODE, "SENDMSG"),
    (opcode::Timeout::CODE, "TIMEOUT"),
    (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
];

fn proc_value(path: &str) -> String {
    std::fs::read_to_string(path).map_or_else(|_| "?".to_owned(), |text| text.trim().to_owned())
}

fn kernel() -> String {
    proc_value("/proc/sys/kernel/osrelease")
}

fn in_words(limit: u64) -> String {
    if limit == RLIM_INFINITY {
        "unlimited".to_owned()
    } else {
        format!("{limit} bytes")
    }
}

/// Raises a soft limit to the hard one and returns what it is then.
fn raise(resource: Resource) -> u64 {
    let Ok((soft, hard)) = getrlimit(resource) else {
        return 0;
    };
    if soft < hard && setrlimit(resource, hard, hard).is_ok() {
        hard
    } else {
        soft
    }
}

fn check(config: &RingConfig) -> Result<(), RingError> {
    let wrong = |what, range| Err(RingError::Config { what, range });
    if !(1..=ENTRIES_MAX).contains(&config.operations) {
        return wrong("operations", "1 to 8192");
    }
    if !(1..=SEGMENTS_MAX).contains(&config.segments) {
        return wrong("segments", "1 to 1024");
    }
    if config.files == 0 {
        return wrong("files", "at least 1");
    }
    Ok(())
}

fn refused(source: io::Error, operations: u32) -> RingError {
    let disabled = proc_value("/proc/sys/kernel/io_uring_disabled");
    match source.raw_os_error() {
        Some(libc::EINVAL) => RingError::KernelTooOld {
            kernel: kernel(),
            what: "SINGLE_ISSUER or DEFER_TASKRUN",
        },
        Some(libc::EPERM) if disabled != "0" && disabled != "?" => {
            RingError::Disabled { value: disabled }
        }
        Some(libc::EPERM | libc::EACCES) => RingError::Forbidden { source },
        // A filter may answer ENOSYS as well; a kernel of 5.1 or later always has the call, and
        // the sysctl is there from 6.6 on.
        Some(libc::ENOSYS) if disabled != "?" => RingError::Forbidden { source },
        Some(libc::ENOSYS) => RingError::KernelTooOld {
            kernel: kernel(),
            what: "all",
        },
        Some(libc::ENOMEM) => RingError::Memory {
            operations,
            limit: in_words(raise(Resource::RLIMIT_MEMLOCK)),
            source,
        },
        _ => RingError::Os {
            what: "opening a ring",
            source,
        },
    }
}

/// Opens a ring whose queues hold every submission and completion that `operations` operations can
/// ever have at the same time.
pub(super) fn open(config: &RingConfig, arena: &Arena) -> Result<(IoUring, RingFacts), RingError> {
    check(config)?;
    let memlock = raise(Resource::RLIMIT_MEMLOCK);
    raise(Resource::RLIMIT_NOFILE);
    // One more for the wake-up read and one for its cancellation.
    let queue = (config.operations * CQES_PER_OP + 2).next_power_of_two();
    let io = IoUring::builder()
        .dontfork()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .setup_submit_all()
        .setup_cqsize(queue)
        .build(queue)
        .map_err(|source| refused(source, config.operations))?;
    assert!(io.params().cq_entries() >= queue && io.params().sq_entries() >= queue);

    let mut probe = Probe::new();
    io.submitter()
        .register_probe(&mut probe)
        .map_err(|source| RingError::Os {
            what: "probing its operations",
            source,
        })?;
    let missing = REQUIRED.iter().find(|(code, _)| !probe.is_supported(*code));
    if let Some(&(_, what)) = missing {
        return Err(RingError::KernelTooOld {
            kernel: kernel(),
            what,
        });
    }
    let params = io.params();
    if !(params.is_feature_nodrop() && params.is_feature_ext_arg()) {
        return Err(RingError::KernelTooOld {
            kernel: kernel(),
            what: "EXT_ARG or NODROP",
        });
    }
    io.submitter()
        .register_files_sparse(u32::from(config.files))
        .map_err(|source| RingError::Files {
            files: config.files,
            source,
        })?;
    let buffers = register_arena(&io, config, arena, memlock);
    let facts = RingFacts {
        kernel: kernel(),
        vectored_registered: buffers == BufferMode::Registered
            && probe.is_supported(opcode::ReadvFixed::CODE)
            && probe.is_supported(opcode::WritevFixed::CODE),
        buffers,
        quiet_wait: io.params().is_feature_no_iowait(),
    };
    Ok((io, facts))
}

fn register_arena(io: &IoUring, config: &RingConfig, arena: &Arena, memlock: u64) -> BufferMode {
    if !config.register_buffers {
        return BufferMode::Off;
    }
    let pieces: Vec<libc::iovec> = (0..arena.len_bytes())
        .step_by(REGISTERED_BYTES)
        .map(|start| libc::iovec {
            iov_base: arena.base().wrapping_add(start).cast(),
            iov_len: REGISTERED_BYTES.min(arena.len_bytes() - start),
        })
        .collect();
    // SAFETY: the pieces lie in the arena's mapping, and the ring unmaps the arena only after it
    // has closed the io_uring instance.
    match unsafe { io.submitter().register_buffers(&pieces) } {
        Ok(()) => BufferMode::Registered,
        Err(error) => BufferMode::Refused {
            why: format!(
                "{error}; {} bytes are needed and the memlock limit is {}: raise LimitMEMLOCK of \
                 the service, operations cost a little more CPU until then",
                arena.len_bytes(),
                in_words(memlock)
            ),
        },
    }
}
