//! Digests, and the one list of hash contexts.
//!
//! Every hash of this crate is BLAKE3 in its `derive_key` mode, under a context string that is used
//! for exactly one purpose. So a value that was made as one thing can never pass as another: a leaf
//! is not a node, an epoch root is not a batch root, and a node of one fold is not a node of
//! another.
//!
//! Not here: SHA-256, which names dictionaries because the envelope's schema says so
//! (see [`crate::scxq2`]).

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use blake3::Hasher;
use blake3::hazmat::{ContextKey, HasherExt, hash_derive_key_context};

/// Bytes in a [`Digest`].
pub const DIGEST_BYTES: usize = 32;

/// A 256-bit hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub [u8; DIGEST_BYTES]);

impl Digest {
    /// All zero: "nothing before this", never the hash of anything.
    pub const ZERO: Self = Self([0; DIGEST_BYTES]);
}

impl fmt::Display for Digest {
    /// 64 lower-case hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6]
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The text is not a digest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a digest: expected 64 lower-case hexadecimal digits")]
pub struct BadDigest;

impl FromStr for Digest {
    type Err = BadDigest;

    /// Accepts only what [`fmt::Display`] writes, so that one digest has one text.
    fn from_str(text: &str) -> Result<Self, BadDigest> {
        let digits = text.as_bytes();
        if digits.len() != 2 * DIGEST_BYTES {
            return Err(BadDigest);
        }
        let mut digest = [0; DIGEST_BYTES];
        for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
            let [high, low] = [nibble(pair[0])?, nibble(pair[1])?];
            *byte = high << 4 | low;
        }
        Ok(Self(digest))
    }
}

fn nibble(digit: u8) -> Result<u8, BadDigest> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        _ => Err(BadDigest),
    }
}

/// One purpose for which something is hashed.
#[derive(Debug)]
pub struct Context {
    text: &'static str,
    key: OnceLock<ContextKey>,
}

impl Context {
    const fn new(text: &'static str) -> Self {
        Self {
            text,
            key: OnceLock::new(),
        }
    }

    /// The context string, as another implementation passes it to `derive_key`.
    #[must_use]
    pub fn text(&self) -> &'static str {
        self.text
    }

    /// The context key, derived once: the first of `derive_key`'s two passes.
    pub(crate) fn key(&self) -> &ContextKey {
        self.key.get_or_init(|| hash_derive_key_context(self.text))
    }

    /// A hasher to which the key material is fed.
    pub(crate) fn hasher(&self) -> Hasher {
        Hasher::new_from_context_key(self.key())
    }

    /// Hash of the concatenation of `parts`. Callers see to it that the parts have fixed lengths or
    /// are preceded by their lengths.
    pub(crate) fn hash(&self, parts: &[&[u8]]) -> Digest {
        let mut hasher = self.hasher();
        for part in parts {
            hasher.update(part);
        }
        Digest(*hasher.finalize().as_bytes())
    }
}

macro_rules! contexts {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        $($(#[$doc])*
        pub(crate) static $name: Context = Context::new(concat!("hn4-replicad v1 ", $text));)*

        /// Every context that this crate hashes under, for documentation and tests.
        #[must_use]
        pub fn contexts() -> Vec<&'static Context> {
            vec![$(&$name),*]
        }
    };
}

contexts! {
    /// Leaf of the state tree: 4096 bytes.
    STATE_LEAF = "state leaf";
    /// Inner node of the state tree: left, right.
    STATE_NODE = "state node";
    /// Root of the state tree: size in bytes, top node.
    STATE_ROOT = "state root";
    /// A piece of a payload that is not a whole block.
    PIECE = "payload piece";
    /// Inner node over the pieces of a payload.
    FOLD_PIECES = "fold pieces";
    /// A record of an epoch: coordinates and payload hash.
    RECORD = "record leaf";
    /// Inner node over the records of a lane.
    FOLD_RECORDS = "fold records";
    /// A lane of an epoch.
    LANE = "lane leaf";
    /// Inner node over the lanes of an epoch.
    FOLD_LANES = "fold lanes";
    /// The root of an epoch.
    EPOCH = "epoch root";
    /// Inner node over the epochs of a batch.
    FOLD_EPOCHS = "fold epochs";
    /// Inner node over one lane's leaves in the epochs of a batch.
    FOLD_BATCH_LANE = "fold batch lane";
    /// The root of a batch, which anchors call the proof hash.
    BATCH = "batch root";
    /// An anchor.
    ANCHOR = "anchor";
    /// A checkpoint record.
    CHECKPOINT = "checkpoint";
    /// What a node found when it looked at its medium.
    INSPECTION = "inspection";
    /// A record of the ledger.
    LEDGER_RECORD = "ledger record";
    /// The header of the ledger.
    LEDGER_HEADER = "ledger header";
    /// Inner node over the records of a ledger.
    FOLD_LEDGER = "fold ledger";
    /// Inner node over the proof hashes of an aggregate.
    FOLD_AGGREGATE = "fold aggregate";
    /// A public key, for its id.
    KEY_ID = "key id";
    /// The message that a signature over a key change signs.
    KEY_CHANGE = "key change";
    /// The message by which the owner of a key offers it to a ledger.
    KEY_OFFER = "key offer";
    /// The message that the signature of an aggregate signs.
    AGGREGATE = "aggregate";
    /// Where the chain of a volume's batch roots begins.
    CHAIN_START = "chain start";
    /// The message that the signatures of a statement about such a chain sign.
    CHAIN_STATEMENT = "chain statement";
    /// A page of a run file of the state tree.
    RUN_PAGE = "tree run page";
    /// Header, index and trailer of a run file of the state tree.
    RUN_META = "tree run meta";
    /// The manifest of the state tree's run files.
    MANIFEST = "tree manifest";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_hashes_as_blake3_derive_key_does() {
        for context in contexts() {
            let expected = blake3::derive_key(context.text(), b"material");
            assert_eq!(context.hash(&[b"mate", b"rial"]), Digest(expected));
        }
    }

    #[test]
    fn no_two_purposes_share_a_context() {
        let mut texts: Vec<_> = contexts().iter().map(|context| context.text()).collect();
        texts.sort_unstable();
        let all = texts.len();
        texts.dedup();
        assert_eq!(texts.len(), all);
    }

    #[test]
    fn one_digest_has_one_text() {
        let digest = STATE_LEAF.hash(&[]);
        let text = digest.to_string();
        assert_eq!(text.parse(), Ok(digest));
        assert_eq!(text.to_uppercase().parse::<Digest>(), Err(BadDigest));
        assert_eq!(text[1..].parse::<Digest>(), Err(BadDigest));
        assert_eq!(format!("+{}", &text[1..]).parse::<Digest>(), Err(BadDigest));
    }
}
