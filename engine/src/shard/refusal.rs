//! What a copy refuses, in the words of NBD.

use crate::core::event::Failure;
use crate::nbd::request::{NbdErrno, Operation, Refusal};

/// Whether it needs a copy that takes writes.
pub(super) fn changes(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::Write { .. } | Operation::Trim { .. } | Operation::WriteZeroes { .. }
    )
}

/// What a client is told of a request that failed.
pub(super) fn refusal_of(failure: Failure) -> Refusal {
    match failure {
        Failure::Io => Refusal::new(
            NbdErrno::Io,
            "the volume failed closed or the medium failed; hn4ctl status says why",
        ),
        Failure::ReadOnly => Refusal::new(
            NbdErrno::Perm,
            "this node is not the primary of the volume; hn4ctl status says who is",
        ),
        Failure::ShuttingDown => Refusal::new(NbdErrno::Shutdown, "the daemon is stopping"),
    }
}
