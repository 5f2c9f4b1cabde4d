//! SCXQ2: compression of lane segments on the wire. //= WORMHOLE_SPEC 4
//!
//! A representation, never policy: lossless, each segment decodable by itself, and everything works
//! with it switched off. Segments under 1 KiB, and those that do not shrink by a sixteenth, are
//! sent as they are. Dictionaries are named by the SHA-256 of their bytes, so a wrong one can never
//! be used; a renewed one is sent as a delta against the last.
//!
//! Nothing here authenticates data. A changed segment either fails to decode or decodes to other
//! bytes, which the proof over the *decoded* data then refuses.
//!
//! | file | what it is for |
//! |---|---|
//! | `mod.rs` | dictionaries, packing, unpacking |
//! | [`train`] | when and from what a dictionary is made |

use std::fmt;
use std::io;

use ring::digest::{SHA256, digest};
use zstd::bulk::{Compressor, Decompressor};

use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::Digest;

pub mod train;

/// Segments shorter than this are never compressed.
pub const LEAST_BYTES: usize = 1024;
/// Longest segment, raw.
pub const MAX_RAW_BYTES: usize = 16 << 20;
/// Longest dictionary.
pub const MAX_DICTIONARY_BYTES: usize = 256 << 10;
/// Dictionaries that an [`Unpacker`] keeps.
pub const MAX_DICTIONARIES: usize = 4;
/// Longest encoding of a dictionary: it may not shrink at all.
pub const MAX_DELTA_BYTES: usize = MAX_DICTIONARY_BYTES + 4096;

const VERSION: u8 = 1;
const STORED: u8 = 0;
const PLAIN: u8 = 1;
const WITH_DICTIONARY: u8 = 2;
/// Data is worth compressing if it shrinks by this part of its length.
const WORTH: usize = 16;
const DELTA_LEVEL: i32 = 19;

/// Names a dictionary: SHA-256 of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DictionaryId(pub [u8; 32]);

impl fmt::Display for DictionaryId {
    /// `sha256:<hex>`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", Digest(self.0))
    }
}

impl fmt::Debug for DictionaryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DictionaryId({:?})", Digest(self.0))
    }
}

/// Why something could not be packed or unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Scxq2Error {
    /// No segment or delta.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// It would unpack to more than is allowed here.
    #[error("a segment of {raw} bytes was announced, {most} are allowed")]
    TooLong {
        /// Announced.
        raw: usize,
        /// Allowed.
        most: usize,
    },
    /// The dictionary is not here; ask the peer for it.
    #[error("dictionary {0} is not known here; request it")]
    UnknownDictionary(DictionaryId),
    /// The compressed bytes are damaged, or do not have the announced length.
    #[error("the compressed bytes are damaged")]
    Corrupt,
    /// A delta led to another dictionary than it named.
    #[error("the delta does not lead to dictionary {0}")]
    OtherDictionary(DictionaryId),
    /// zstd failed, for want of memory or of usable samples.
    #[error("zstd: {0}")]
    Zstd(#[from] io::Error),
}

/// A dictionary and its name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dictionary {
    id: DictionaryId,
    bytes: Vec<u8>,
}

impl Dictionary {
    /// From bytes, at most [`MAX_DICTIONARY_BYTES`].
    ///
    /// # Errors
    /// [`Scxq2Error::TooLong`].
    pub fn new(bytes: Vec<u8>) -> Result<Self, Scxq2Error> {
        let (raw, most) = (bytes.len(), MAX_DICTIONARY_BYTES);
        if raw > most {
            return Err(Scxq2Error::TooLong { raw, most });
        }
        let mut id = [0; 32];
        id.copy_from_slice(digest(&SHA256, &bytes).as_ref());
        Ok(Self {
            id: DictionaryId(id),
            bytes,
        })
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> DictionaryId {
        self.id
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// This dictionary as a delta against `base`, or by itself.
    ///
    /// # Errors
    /// [`Scxq2Error::Zstd`].
    pub fn delta(&self, base: Option<&Self>) -> Result<Vec<u8>, Scxq2Error> {
        let base_bytes = base.map_or(&[][..], |base| &base.bytes);
        let packed = Compressor::with_dictionary(DELTA_LEVEL, base_bytes)?.compress(&self.bytes)?;
        let mut writer = Writer::new();
        writer
            .u8(VERSION)
            .u8(u8::from(base.is_some()))
            .bytes(&self.id.0);
        base.iter().for_each(|base| _ = writer.bytes(&base.id.0));
        writer.count(self.bytes.len()).bytes(&packed);
        Ok(writer.finish())
    }

    /// Applies a delta. `find` gives the dictionaries that are known here.
    ///
    /// # Errors
    /// [`Scxq2Error`]; what comes out has the name that the delta gave it.
    pub fn from_delta<'a>(
        delta: &[u8],
        find: impl FnOnce(DictionaryId) -> Option<&'a Self>,
    ) -> Result<Self, Scxq2Error> {
        let mut reader = Reader::new("dictionary delta", delta);
        reader.version(VERSION)?;
        let has_base = reader.u8()?;
        let id = DictionaryId(reader.array()?);
        let base = match has_base {
            0 => None,
            1 => Some(DictionaryId(reader.array()?)),
            _ => return Err(reader.invalid("base flag").into()),
        };
        let length = reader.count(MAX_DICTIONARY_BYTES, "length")?;
        let base = match base {
            Some(id) => Some(find(id).ok_or(Scxq2Error::UnknownDictionary(id))?),
            None => None,
        };
        let base_bytes = base.map_or(&[][..], |base| &base.bytes);
        let mut unpacker = Decompressor::with_dictionary(base_bytes)?;
        let dictionary = Self::new(decompress(&mut unpacker, reader.rest(), length)?)?;
        if dictionary.id == id {
            Ok(dictionary)
        } else {
            Err(Scxq2Error::OtherDictionary(id))
        }
    }
}

/// A dictionary with all that is ever sent of it, made once by whoever trained it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shipment {
    dictionary: Dictionary,
    whole: Vec<u8>,
    // Against the dictionary of this name.
    delta: Option<(DictionaryId, Vec<u8>)>,
}

impl Shipment {
    /// Encodes a dictionary by itself and, if there is one, against the dictionary before it.
    ///
    /// # Errors
    /// [`Scxq2Error::Zstd`].
    pub fn new(dictionary: Dictionary, before: Option<&Dictionary>) -> Result<Self, Scxq2Error> {
        let whole = dictionary.delta(None)?;
        let delta = before
            .map(|base| Ok::<_, Scxq2Error>((base.id, dictionary.delta(Some(base))?)))
            .transpose()?;
        Ok(Self {
            dictionary,
            whole,
            delta,
        })
    }

    /// What is shipped.
    #[must_use]
    pub fn dictionary(&self) -> &Dictionary {
        &self.dictionary
    }

    /// What to send to a peer that was sent the dictionary `has` last.
    #[must_use]
    pub fn for_peer(&self, has: Option<DictionaryId>) -> &[u8] {
        match &self.delta {
            Some((base, delta)) if Some(*base) == has && delta.len() < self.whole.len() => delta,
            _ => &self.whole,
        }
    }
}

/// Decompresses to exactly `length` bytes, which the caller has bounded.
fn decompress(
    unpacker: &mut Decompressor<'_>,
    packed: &[u8],
    length: usize,
) -> Result<Vec<u8>, Scxq2Error> {
    let raw = unpacker
        .decompress(packed, length)
        .map_err(|_| Scxq2Error::Corrupt)?;
    if raw.len() == length {
        Ok(raw)
    } else {
        Err(Scxq2Error::Corrupt)
    }
}

/// Bytes in and out, and whether trying still pays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Meter {
    /// Raw bytes so far.
    pub raw_bytes: u64,
    /// Packed bytes so far, headers included.
    pub packed_bytes: u64,
    segments: u64,
    // Packed per 1024 raw bytes, moving average over about 16 tries.
    recent: u64,
    tries: u64,
}

impl Meter {
    /// Packed per raw byte, recently; 1 before anything was tried.
    #[must_use]
    pub fn recent_ratio(&self) -> f64 {
        if self.tries == 0 {
            1.0
        } else {
            self.recent as f64 / 1024.0
        }
    }

    /// While recent tries saved less than a sixteenth, only one segment in sixteen is tried.
    fn pays(&self) -> bool {
        self.tries < 16
            || self.recent < 1024 - 1024 / WORTH as u64
            || self.segments.is_multiple_of(16)
    }

    fn tried(&mut self, raw: usize, packed: usize) {
        let now = packed as u64 * 1024 / (raw as u64).max(1);
        self.recent = if self.tries == 0 {
            now
        } else {
            (self.recent * 15 + now) / 16
        };
        self.tries += 1;
    }

    fn sent(&mut self, raw: usize, packed: usize) {
        self.segments += 1;
        self.raw_bytes += raw as u64;
        self.packed_bytes += packed as u64;
    }
}

/// Packs segments. One for each volume and direction.
pub struct Packer {
    coder: Compressor<'static>,
    level: i32,
    dictionary: Option<DictionaryId>,
    is_on: bool,
    meter: Meter,
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer")
            .field("dictionary", &self.dictionary)
            .finish_non_exhaustive()
    }
}

impl Packer {
    /// Without a dictionary; `is_on = false` is the off switch: everything is stored.
    ///
    /// # Errors
    /// [`Scxq2Error::Zstd`].
    pub fn new(level: i32, is_on: bool) -> Result<Self, Scxq2Error> {
        let coder = Compressor::new(level)?;
        Ok(Self {
            coder,
            level,
            dictionary: None,
            is_on,
            meter: Meter::default(),
        })
    }

    /// Packs with `dictionary` from now on, which the peer must have.
    ///
    /// # Errors
    /// [`Scxq2Error::Zstd`].
    pub fn set_dictionary(&mut self, dictionary: &Dictionary) -> Result<(), Scxq2Error> {
        self.coder = Compressor::with_dictionary(self.level, &dictionary.bytes)?;
        self.dictionary = Some(dictionary.id);
        self.meter = Meter {
            recent: 0,
            tries: 0,
            ..self.meter
        };
        Ok(())
    }

    /// The dictionary in use.
    #[must_use]
    pub fn dictionary(&self) -> Option<DictionaryId> {
        self.dictionary
    }

    /// What was saved.
    #[must_use]
    pub fn meter(&self) -> Meter {
        self.meter
    }

    /// Packs one segment of at most [`MAX_RAW_BYTES`], or stores it where packing saves nothing.
    ///
    /// # Errors
    /// [`Scxq2Error::TooLong`].
    pub fn pack(&mut self, raw: &[u8]) -> Result<Vec<u8>, Scxq2Error> {
        let (length, most) = (raw.len(), MAX_RAW_BYTES);
        if length > most {
            return Err(Scxq2Error::TooLong { raw: length, most });
        }
        Ok(self.pack_if_smaller(raw).unwrap_or_else(|| {
            let mut writer = Writer::new();
            writer.u8(VERSION).u8(STORED).u16(0).count(length);
            writer.bytes(raw);
            writer.finish()
        }))
    }

    /// Packs one segment; none, if it is as good to send the bytes as they are: they are few, too
    /// many, or do not shrink, or those before them did not.
    pub fn pack_if_smaller(&mut self, raw: &[u8]) -> Option<Vec<u8>> {
        let length = raw.len();
        let mut packed = None;
        let worth_trying = self.is_on && (LEAST_BYTES..=MAX_RAW_BYTES).contains(&length);
        if worth_trying && self.meter.pays() {
            // A failure to compress costs nothing but the gain.
            packed = self.coder.compress(raw).ok();
            self.meter
                .tried(length, packed.as_ref().map_or(length, Vec::len));
        }
        let packed = packed.filter(|packed| packed.len() + 32 <= length - length / WORTH);
        let segment = packed.map(|packed| {
            let form = self.dictionary.map_or(PLAIN, |_| WITH_DICTIONARY);
            let mut writer = Writer::new();
            writer.u8(VERSION).u8(form).u16(0).count(length);
            if let Some(id) = self.dictionary {
                writer.bytes(&id.0);
            }
            writer.bytes(&packed);
            writer.finish()
        });
        self.meter
            .sent(length, segment.as_ref().map_or(length, Vec::len));
        segment
    }
}

/// Unpacks segments, with the dictionaries that it was given.
pub struct Unpacker {
    plain: Decompressor<'static>,
    // Oldest first.
    known: Vec<(Dictionary, Decompressor<'static>)>,
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = self.known.iter().map(|(dictionary, _)| dictionary.id);
        f.debug_list().entries(known).finish()
    }
}

impl Unpacker {
    /// Knows no dictionary.
    ///
    /// # Errors
    /// [`Scxq2Error::Zstd`].
    pub fn new() -> Result<Self, Scxq2Error> {
        Ok(Self {
            plain: Decompressor::new()?,
            known: Vec::new(),
        })
    }

    /// Learns a dictionary; the oldest of more than [`MAX_DICTIONARIES`] is forgotten.
    ///
    /// # Errors
    /// [`Scxq2Error::Zstd`].
    pub fn learn(&mut self, dictionary: Dictionary) -> Result<(), Scxq2Error> {
        if self.find(dictionary.id).is_none() {
            let unpacker = Decompressor::with_dictionary(&dictionary.bytes)?;
            self.known.push((dictionary, unpacker));
            if self.known.len() > MAX_DICTIONARIES {
                self.known.remove(0);
            }
        }
        Ok(())
    }

    /// A dictionary that is known.
    #[must_use]
    pub fn find(&self, id: DictionaryId) -> Option<&Dictionary> {
        self.known
            .iter()
            .map(|(dictionary, _)| dictionary)
            .find(|dictionary| dictionary.id == id)
    }

    /// Unpacks one segment to at most `most` bytes.
    ///
    /// # Errors
    /// [`Scxq2Error`].
    pub fn unpack(&mut self, segment: &[u8], most: usize) -> Result<Vec<u8>, Scxq2Error> {
        let mut reader = Reader::new("scxq2 segment", segment);
        reader.version(VERSION)?;
        let form = reader.u8()?;
        if reader.u16()? != 0 {
            return Err(reader.invalid("reserved bytes").into());
        }
        let most = most.min(MAX_RAW_BYTES);
        let raw = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
        if raw > most {
            return Err(Scxq2Error::TooLong { raw, most });
        }
        match form {
            STORED if reader.remaining() == raw => Ok(reader.rest().to_vec()),
            STORED => Err(Scxq2Error::Corrupt),
            PLAIN => decompress(&mut self.plain, reader.rest(), raw),
            WITH_DICTIONARY => {
                let id = DictionaryId(reader.array()?);
                let known = self
                    .known
                    .iter_mut()
                    .find(|(dictionary, _)| dictionary.id == id);
                let (_, unpacker) = known.ok_or(Scxq2Error::UnknownDictionary(id))?;
                decompress(unpacker, reader.rest(), raw)
            }
            _ => Err(reader.invalid("form").into()),
        }
    }
}

#[cfg(test)]
mod tests;
