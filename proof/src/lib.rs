//! Truth beside real time: everything that makes two copies of a volume *provably* equal.
//!
//! The crate is sans-IO. It never reads a clock, draws a random number (key generation excepted),
//! opens a file or a socket, and nothing in it lies on the path of a write or a flush. Callers hand
//! in bytes and times and carry out what comes back.
//!
//! | module | what it is for |
//! |---|---|
//! | [`hash`] | 32-byte digests, and every hash context in one list |
//! | [`codec`] | bounded reading and writing of the compact encodings |
//! | [`blocks`] | leaf hashes of 4 KiB blocks, many at a time |
//! | [`fold`] | order-sensitive Merkle folds, inclusion and consistency proofs |
//! | [`leaf`] | records to lane roots to epoch roots |
//! | [`batch`] | epoch roots to batch roots, and when a batch closes |
//! | [`tree`] | the state tree over the volume, its sparse storage, and comparing two of them |
//! | [`sign`] | keys, key ids, signatures, and which key may sign at which step |
//! | [`anchor`] | what one batch commits to |
//! | [`checkpoint`] | a signed word on the state at an anchored epoch |
//! | [`inspection`] | what a deep verify or a repair found |
//! | [`ledger`] | the append-only chain of anchors, its recovery, verification and XML export |
//! | [`prover`] | anchoring on a primary, following on a replica: what runs beside a volume |
//! | [`scxq2`] | dictionary compression of lane segments on the wire |
//! | `stark` | with the feature of that name: a succinct proof over the chain of batch roots |
//! | [`envelope`] | proofs as JSON documents, and their verification offline |
//!
//! Each hash is written down for another implementer in `docs/PROOF_FORMAT.md`.
//!
//! Every decoder here takes bytes that a disk or a stranger may have changed: it never panics, it
//! reads only the canonical encoding, and what it allocates is bounded by a constant or by the
//! length of its input.
#![forbid(unsafe_code)]

pub mod anchor;
pub mod batch;
pub mod blocks;
pub mod checkpoint;
pub mod codec;
pub mod envelope;
pub mod fold;
pub mod hash;
pub mod inspection;
pub mod leaf;
pub mod ledger;
pub mod prover;
pub mod scxq2;
pub mod sign;
#[cfg(feature = "stark")]
pub mod stark;
pub mod time;
pub mod tree;
