//! Bounded reading and writing of this crate's encodings: little-endian, no padding, no optional
//! forms. A value has exactly one encoding, and a reader accepts no other.
//!
//! Not here: layouts. Each module writes its own, field by field, in one place.

use crate::hash::{DIGEST_BYTES, Digest};

/// Why bytes are not an encoding of what was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// The input ends inside a field.
    #[error("{what}: ends at byte {len}, {needed} more bytes were expected")]
    Short {
        /// What was being read.
        what: &'static str,
        /// Length of the input.
        len: usize,
        /// Bytes that are missing.
        needed: usize,
    },
    /// Bytes follow the end.
    #[error("{what}: {extra} bytes follow its end")]
    Trailing {
        /// What was being read.
        what: &'static str,
        /// Bytes too many.
        extra: usize,
    },
    /// A field holds a value that no encoder writes.
    #[error("{what}: the {field} is invalid")]
    Invalid {
        /// What was being read.
        what: &'static str,
        /// The field.
        field: &'static str,
    },
    /// The version is not one that this build reads.
    #[error("{what}: version {version} is not known to this build; upgrade it")]
    Version {
        /// What was being read.
        what: &'static str,
        /// The version that was found.
        version: u8,
    },
}

/// A cursor over an encoding.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
    len: usize,
}

impl<'a> Reader<'a> {
    /// Starts at the beginning of `bytes`; `what` names the encoding in errors.
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self {
            what,
            rest: bytes,
            len: bytes.len(),
        }
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`DecodeError::Short`] if fewer are left.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let Some((head, tail)) = self.rest.split_at_checked(count) else {
            let needed = count - self.rest.len();
            return Err(DecodeError::Short {
                what: self.what,
                len: self.len,
                needed,
            });
        };
        self.rest = tail;
        Ok(head)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`DecodeError::Short`] if fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// A byte.
    ///
    /// # Errors
    /// [`DecodeError::Short`] at the end.
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// A little-endian number of two bytes.
    ///
    /// # Errors
    /// [`DecodeError::Short`] at the end.
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    /// A little-endian number of four bytes.
    ///
    /// # Errors
    /// [`DecodeError::Short`] at the end.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    /// A little-endian number of eight bytes.
    ///
    /// # Errors
    /// [`DecodeError::Short`] at the end.
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A digest.
    ///
    /// # Errors
    /// [`DecodeError::Short`] at the end.
    pub fn digest(&mut self) -> Result<Digest, DecodeError> {
        self.array::<DIGEST_BYTES>().map(Digest)
    }

    /// `count` digests. The input must hold them all before anything is allocated.
    ///
    /// # Errors
    /// [`DecodeError::Short`] if it does not.
    pub fn digests(&mut self, count: usize) -> Result<Vec<Digest>, DecodeError> {
        let bytes = count
            .checked_mul(DIGEST_BYTES)
            .ok_or_else(|| self.invalid("count"))?;
        let mut inner = Reader::new(self.what, self.take(bytes)?);
        (0..count).map(|_| inner.digest()).collect()
    }

    /// The version byte, which must be `known`.
    ///
    /// # Errors
    /// [`DecodeError::Version`] if it is another.
    pub fn version(&mut self, known: u8) -> Result<(), DecodeError> {
        match self.u8()? {
            version if version == known => Ok(()),
            version => Err(DecodeError::Version {
                what: self.what,
                version,
            }),
        }
    }

    /// A count that may not exceed `most`.
    ///
    /// # Errors
    /// [`DecodeError::Invalid`] naming `field` if it does.
    pub fn count(&mut self, most: usize, field: &'static str) -> Result<usize, DecodeError> {
        let count = usize::try_from(self.u32()?).map_err(|_| self.invalid(field))?;
        if count > most {
            Err(self.invalid(field))
        } else {
            Ok(count)
        }
    }

    /// Bytes not read yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// The error for a field that no encoder writes so.
    #[must_use]
    pub fn invalid(&self, field: &'static str) -> DecodeError {
        DecodeError::Invalid {
            what: self.what,
            field,
        }
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`DecodeError::Trailing`] if bytes are left.
    pub fn finish(self) -> Result<(), DecodeError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(DecodeError::Trailing {
                what: self.what,
                extra,
            }),
        }
    }
}

/// An encoding being written.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// An empty encoding.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// The length of something in memory, in four bytes.
    ///
    /// # Panics
    /// If it exceeds 4 GiB, which the bounds on everything that is encoded here rule out.
    pub fn count(&mut self, count: usize) -> &mut Self {
        self.u32(u32::try_from(count).expect("encoded collections are bounded far below 2^32"))
    }

    /// A digest.
    pub fn digest(&mut self, digest: &Digest) -> &mut Self {
        self.bytes(&digest.0)
    }

    /// Bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Bytes preceded by their length.
    pub fn sized(&mut self, bytes: &[u8]) -> &mut Self {
        self.count(bytes.len()).bytes(bytes)
    }

    /// Bytes written so far.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    /// The encoding.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_refused_before_anything_is_allocated_for_it() {
        let mut reader = Reader::new("test", &[255; 8]);
        assert!(matches!(
            reader.count(16, "count"),
            Err(DecodeError::Invalid { .. })
        ));
        let mut reader = Reader::new("test", &[1; 40]);
        assert!(matches!(
            reader.digests(usize::MAX),
            Err(DecodeError::Invalid { .. })
        ));
        assert!(matches!(
            reader.digests(2),
            Err(DecodeError::Short { needed: 24, .. })
        ));
    }

    #[test]
    fn what_follows_the_end_is_refused() {
        let mut reader = Reader::new("test", &[1, 2]);
        assert_eq!(reader.u8(), Ok(1));
        assert_eq!(
            reader.finish(),
            Err(DecodeError::Trailing {
                what: "test",
                extra: 1
            })
        );
    }
}
