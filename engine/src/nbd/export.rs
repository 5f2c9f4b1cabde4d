//! What a server offers: exports, their features, and the list a client chooses from.
//!
//! **Invariant:** an [`ExportList`] holds only exports whose numbers the protocol document allows,
//! so that no later code has to doubt them. Not here: what lies behind an export.

use std::rc::Rc;
use std::sync::Arc;

use thiserror::Error;

use super::proto::transmission_flag as flag;

/// Longest name and longest description of an export, in bytes. The protocol allows 4096 and
/// recommends this.
pub const MAX_NAME_BYTES: usize = 256;
/// Most exports in a list: bounds the answer to `NBD_OPT_LIST`.
pub const MAX_EXPORTS: usize = 1024;
/// Largest minimum block size that the protocol allows, in bytes.
pub const MAX_MIN_BLOCK_BYTES: u32 = 65_536;
/// Longest read or write that is offered unless configured otherwise, in bytes. Clients that do
/// not ask assume this number.
pub const DEFAULT_MAX_BLOCK_BYTES: u32 = 32 * 1024 * 1024;

/// Longest read or write that can be offered, in bytes.
pub const MAX_MAX_BLOCK_BYTES: u32 = 1024 * 1024 * 1024;

/// Commands and command flags that an export offers besides READ, WRITE and DISC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// `NBD_CMD_FLUSH`.
    pub flush: bool,
    /// `NBD_CMD_FLAG_FUA`.
    pub fua: bool,
    /// `NBD_CMD_TRIM`.
    pub trim: bool,
    /// `NBD_CMD_WRITE_ZEROES` with `NBD_CMD_FLAG_NO_HOLE`.
    pub write_zeroes: bool,
    /// `NBD_CMD_FLAG_FAST_ZERO`; needs `write_zeroes`.
    pub fast_zero: bool,
    /// `NBD_CMD_CACHE`.
    pub cache: bool,
    /// Several connections see one cache: a flush on one covers the writes completed on all.
    pub multi_conn: bool,
    /// `NBD_CMD_FLAG_DF`; offered only to clients with structured replies.
    pub df: bool,
}

impl Features {
    /// Everything that the protocol knows.
    pub const ALL: Self = Self {
        flush: true,
        fua: true,
        trim: true,
        write_zeroes: true,
        fast_zero: true,
        cache: true,
        multi_conn: true,
        df: true,
    };
    /// READ, WRITE and DISC alone.
    pub const NONE: Self = Self {
        flush: false,
        fua: false,
        trim: false,
        write_zeroes: false,
        fast_zero: false,
        cache: false,
        multi_conn: false,
        df: false,
    };
}

/// One volume as clients see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    /// Name that clients ask for; at most [`MAX_NAME_BYTES`], no NUL.
    pub name: String,
    /// Text for people; at most [`MAX_NAME_BYTES`], no NUL; may be empty.
    pub description: String,
    /// Size in bytes, a multiple of `min_block_bytes`.
    pub size_bytes: u64,
    /// Writes answer `NBD_EPERM`.
    pub read_only: bool,
    /// The medium rotates.
    pub rotational: bool,
    /// Alignment of every request: the logical sector size of the volume, 512 or 4096. A power of
    /// two up to [`MAX_MIN_BLOCK_BYTES`].
    pub min_block_bytes: u32,
    /// Alignment of efficient requests; a power of two of at least 512 and `min_block_bytes`.
    pub preferred_block_bytes: u32,
    /// Longest read or write; a multiple of `min_block_bytes`, from `preferred_block_bytes` to
    /// [`MAX_MAX_BLOCK_BYTES`].
    pub max_block_bytes: u32,
    /// What the export offers.
    pub features: Features,
}

impl Export {
    /// A writable export with all features, 512-byte sectors and 4 KiB blocks.
    #[must_use]
    pub fn new(name: impl Into<String>, size_bytes: u64) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            size_bytes,
            read_only: false,
            rotational: false,
            min_block_bytes: 512,
            preferred_block_bytes: 4096,
            max_block_bytes: DEFAULT_MAX_BLOCK_BYTES,
            features: Features::ALL,
        }
    }

    /// The transmission flags for a client that did or did not negotiate structured replies.
    /// Commands that write are not offered on a read-only export.
    #[must_use]
    pub fn transmission_flags(&self, structured_replies: bool) -> u16 {
        let features = self.features;
        let write = !self.read_only;
        [
            (true, flag::HAS_FLAGS),
            (self.read_only, flag::READ_ONLY),
            (features.flush, flag::SEND_FLUSH),
            (features.fua, flag::SEND_FUA),
            (self.rotational, flag::ROTATIONAL),
            (features.trim && write, flag::SEND_TRIM),
            (features.write_zeroes && write, flag::SEND_WRITE_ZEROES),
            (features.df && structured_replies, flag::SEND_DF),
            (features.multi_conn, flag::CAN_MULTI_CONN),
            (features.cache, flag::SEND_CACHE),
            (
                features.fast_zero && features.write_zeroes && write,
                flag::SEND_FAST_ZERO,
            ),
        ]
        .into_iter()
        .fold(0, |flags, (set, bit)| if set { flags | bit } else { flags })
    }

    fn check(&self) -> Result<(), ExportError> {
        let name = || self.name.chars().take(64).collect::<String>();
        for text in [&self.name, &self.description] {
            if text.len() > MAX_NAME_BYTES || text.contains('\0') {
                return Err(ExportError::BadText { name: name() });
            }
        }
        let (min, preferred) = (self.min_block_bytes, self.preferred_block_bytes);
        let sizes_hold = min.is_power_of_two()
            && min <= MAX_MIN_BLOCK_BYTES
            && preferred.is_power_of_two()
            && preferred >= min.max(512)
            && (preferred..=MAX_MAX_BLOCK_BYTES).contains(&self.max_block_bytes)
            && self.max_block_bytes.is_multiple_of(min);
        if !sizes_hold {
            return Err(ExportError::BadBlockSizes {
                name: name(),
                min,
                preferred,
                max: self.max_block_bytes,
            });
        }
        if !self.size_bytes.is_multiple_of(u64::from(min)) {
            return Err(ExportError::RaggedSize {
                name: name(),
                size_bytes: self.size_bytes,
                min,
            });
        }
        Ok(())
    }
}

/// What is wrong with an export or a list of them.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ExportError {
    /// Name or description too long, or with a NUL in it.
    #[error("export {name:?}: name and description must be at most 256 bytes, without NUL")]
    BadText {
        /// Start of the export's name.
        name: String,
    },
    /// Block sizes that the protocol does not allow.
    #[error(
        "export {name:?}: block sizes {min}/{preferred}/{max} are not allowed; minimum and \
         preferred are powers of two, 512 <= preferred, minimum <= preferred <= maximum, and the \
         maximum is a multiple of the minimum, at most 1 GiB"
    )]
    BadBlockSizes {
        /// Name of the export.
        name: String,
        /// Minimum, in bytes.
        min: u32,
        /// Preferred, in bytes.
        preferred: u32,
        /// Maximum, in bytes.
        max: u32,
    },
    /// The last bytes could never be addressed.
    #[error("export {name:?}: size {size_bytes} is not a multiple of the block size {min}")]
    RaggedSize {
        /// Name of the export.
        name: String,
        /// Size, in bytes.
        size_bytes: u64,
        /// Minimum block size, in bytes.
        min: u32,
    },
    /// Two exports with one name.
    #[error("two exports are named {name:?}; give each its own name")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// More than [`MAX_EXPORTS`].
    #[error("{count} exports in one list; at most 1024 are served")]
    TooMany {
        /// How many there were.
        count: usize,
    },
    /// The default is not in the list.
    #[error("default export number {index} does not exist; the list has {count}")]
    NoSuchDefault {
        /// The number that was given.
        index: usize,
        /// How many exports there are.
        count: usize,
    },
}

/// Where a handshake looks exports up. Indices are stable for the life of a handshake.
pub trait ExportDirectory {
    /// The export with this index; indices count from 0 without gaps.
    fn export(&self, index: usize) -> Option<&Export>;
    /// The index of a name. The empty name asks for the default export.
    fn find(&self, name: &str) -> Option<usize>;
}

macro_rules! directory_behind {
    ($($pointer:ty),*) => {$(
        impl<D: ExportDirectory + ?Sized> ExportDirectory for $pointer {
            fn export(&self, index: usize) -> Option<&Export> {
                (**self).export(index)
            }
            fn find(&self, name: &str) -> Option<usize> {
                (**self).find(name)
            }
        }
    )*};
}

directory_behind!(&D, Rc<D>, Arc<D>);

/// A checked list of exports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportList {
    exports: Vec<Export>,
    default: Option<usize>,
}

impl ExportList {
    /// Checks the exports. A list of one export has it as its default; of several, none is, until
    /// [`ExportList::with_default`] names one.
    ///
    /// # Errors
    /// Any [`ExportError`].
    pub fn new(exports: Vec<Export>) -> Result<Self, ExportError> {
        if exports.len() > MAX_EXPORTS {
            return Err(ExportError::TooMany {
                count: exports.len(),
            });
        }
        for (index, export) in exports.iter().enumerate() {
            export.check()?;
            if exports
                .iter()
                .take(index)
                .any(|other| other.name == export.name)
            {
                return Err(ExportError::DuplicateName {
                    name: export.name.clone(),
                });
            }
        }
        let default = (exports.len() == 1).then_some(0);
        Ok(Self { exports, default })
    }

    /// Answers the empty name with this export, unless one carries the empty name.
    ///
    /// # Errors
    /// [`ExportError::NoSuchDefault`].
    pub fn with_default(mut self, index: usize) -> Result<Self, ExportError> {
        if index >= self.exports.len() {
            return Err(ExportError::NoSuchDefault {
                index,
                count: self.exports.len(),
            });
        }
        self.default = Some(index);
        Ok(self)
    }
}

impl ExportDirectory for ExportList {
    fn export(&self, index: usize) -> Option<&Export> {
        self.exports.get(index)
    }

    fn find(&self, name: &str) -> Option<usize> {
        let named = self.exports.iter().position(|export| export.name == name);
        if name.is_empty() {
            named.or(self.default)
        } else {
            named
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_name_finds_the_only_export_or_the_chosen_default() {
        let one = ExportList::new(vec![Export::new("a", 4096)]).expect("valid");
        assert_eq!(one.find(""), Some(0));
        let two =
            ExportList::new(vec![Export::new("a", 4096), Export::new("b", 0)]).expect("valid");
        assert_eq!(two.find(""), None);
        assert_eq!(
            two.clone().with_default(1).expect("in range").find(""),
            Some(1)
        );
        assert_eq!(two.find("b"), Some(1));
        assert_eq!(two.find("c"), None);
        assert_eq!(
            two.with_default(2),
            Err(ExportError::NoSuchDefault { index: 2, count: 2 })
        );
    }

    #[test]
    fn numbers_that_the_protocol_forbids_are_refused() {
        let bad = |change: fn(&mut Export)| {
            let mut export = Export::new("v", 1 << 20);
            change(&mut export);
            ExportList::new(vec![export]).expect_err("must be refused")
        };
        for change in [
            (|export: &mut Export| export.min_block_bytes = 0) as fn(&mut Export),
            |export| export.min_block_bytes = 513,
            |export| export.min_block_bytes = 131_072,
            |export| export.min_block_bytes = 8192,
            |export| export.preferred_block_bytes = 256,
            |export| export.preferred_block_bytes = 5000,
            |export| export.max_block_bytes = 2048,
            |export| export.max_block_bytes = 4097,
        ] {
            assert!(matches!(bad(change), ExportError::BadBlockSizes { .. }));
        }
        assert!(matches!(
            bad(|e| e.size_bytes = 1000),
            ExportError::RaggedSize { .. }
        ));
        assert!(matches!(
            bad(|e| e.name = "x".repeat(257)),
            ExportError::BadText { .. }
        ));
        assert!(matches!(
            bad(|e| e.description = "a\0b".into()),
            ExportError::BadText { .. }
        ));
        let twins = vec![Export::new("v", 512), Export::new("v", 512)];
        assert!(matches!(
            ExportList::new(twins),
            Err(ExportError::DuplicateName { .. })
        ));
        let many = vec![Export::new("v", 512); MAX_EXPORTS + 1];
        assert!(matches!(
            ExportList::new(many),
            Err(ExportError::TooMany { count: 1025 })
        ));
    }

    #[test]
    fn flags_offer_df_only_with_structured_replies_and_no_writes_when_read_only() {
        let mut export = Export::new("v", 1 << 20);
        assert_eq!(export.transmission_flags(true), 0b1101_1110_1101);
        assert_eq!(export.transmission_flags(false), 0b1101_0110_1101);
        export.read_only = true;
        export.rotational = true;
        assert_eq!(export.transmission_flags(true), 0b0101_1001_1111);
        export.features = Features::NONE;
        export.read_only = false;
        assert_eq!(export.transmission_flags(true), 0b1_0001);
        export.features.fast_zero = true;
        assert_eq!(
            export.transmission_flags(true),
            0b1_0001,
            "fast zero needs write zeroes"
        );
    }
}
