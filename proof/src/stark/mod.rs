//! A succinct proof over the chain of batch roots: `scxq2.proof.v1` of type `zk-stark`.
//!
//! A node states, signed, that the chain of its batch roots leads from one link to another over N
//! batches, of which the first and the last are those of two signed anchors; and it proves that it
//! knows N roots of which that is true. What this is worth, and what not, is in section 11 of
//! `docs/PROOF_FORMAT.md`: the roots themselves take less room up to some 3,500 batches, and the
//! proof hides nothing by design.
//!
//! | file | what it is for |
//! |---|---|
//! | `mod.rs` | limits and errors |
//! | `chain` | links, and following them through a ledger |
//! | `air` | the computation that is proven, as constraints over a trace |
//! | `argument` | the parameters; making and checking the STARK |
//! | `shape` | what a STARK of a stranger must look like before anything reads it |
//! | `statement` | what is signed, and whether it fits its anchors |
//! | `document` | all of it in one envelope |

use hn4::types::{Epoch, VolumeId};

use crate::codec::DecodeError;
use crate::envelope::EnvelopeError;
use crate::sign::SignError;
use crate::sign::keyring::KeyError;

mod air;
mod argument;
mod chain;
mod document;
mod shape;
mod statement;

pub use chain::{Collector, Link, Part};
pub use document::{make, verify};
pub use statement::Statement;

/// Fewest batches of a proof. One batch has its anchor.
pub const BATCHES_MIN: usize = 2;
/// Most batches of a proof; memory and time to make it grow with them.
pub const BATCHES_MAX: usize = 4096;
/// Bits of proven security that a proof must have.
pub const SECURITY_BITS: u32 = 96;
/// Longest argument, in bytes.
pub const ARGUMENT_BYTES_MAX: usize = 256 << 10;

/// Why a succinct proof is not made or not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StarkError {
    /// The document, or one of its fields.
    #[error(transparent)]
    Document(#[from] EnvelopeError),
    /// Bytes are not what they should be.
    #[error("the proof is damaged: {0}")]
    Decode(#[from] DecodeError),
    /// It is about another volume.
    #[error("the proof is about volume {found}, not {expected}")]
    OtherVolume {
        /// Asked for.
        expected: VolumeId,
        /// Found.
        found: VolumeId,
    },
    /// It does not cover the epochs that were asked for.
    #[error("the proof covers epochs {found}, not {first} to {last}")]
    Range {
        /// First epoch asked for.
        first: Epoch,
        /// Last epoch asked for.
        last: Epoch,
        /// What it covers.
        found: String,
    },
    /// A signature is missing or wrong.
    #[error("the signature of the {what}: {source}")]
    Key {
        /// What was signed.
        what: &'static str,
        /// What is wrong.
        source: KeyError,
    },
    /// The signed statement contradicts the anchors, or itself.
    #[error("the statement does not fit its anchors: the {0}")]
    Statement(&'static str),
    /// The argument was made with other parameters, or for a chain of another length.
    #[error("the argument has other parameters, or is for another number of batches")]
    Parameters,
    /// The argument is not as safe as it must be.
    #[error("the argument has {0} bits of proven security, fewer than {SECURITY_BITS}")]
    Security(u32),
    /// The argument is longer than any good one.
    #[error("the argument has {0} bytes, more than {ARGUMENT_BYTES_MAX}")]
    TooLong(usize),
    /// The argument does not show what is claimed.
    #[error("the argument does not prove this chain")]
    Argument,
    /// Too few or too many batches.
    #[error(
        "the epochs are in {0} batches, of which a succinct proof takes {BATCHES_MIN} to \
         {BATCHES_MAX}; ask for other epochs, or for a proof with records"
    )]
    Batches(u64),
    /// The ledger does not hold the range.
    #[error("the ledger does not hold epochs {first} to {last}")]
    NotAnchored {
        /// First epoch asked for.
        first: Epoch,
        /// Last epoch asked for.
        last: Epoch,
    },
    /// Proving failed.
    #[error("proving failed: {0}")]
    Prover(String),
    /// Signing failed.
    #[error(transparent)]
    Sign(#[from] SignError),
}

#[cfg(test)]
mod tests;
