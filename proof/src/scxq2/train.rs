//! When and from what a dictionary is made.
//!
//! A [`Trainer`] sees messages go by. It samples the first hundred or so; then a dictionary is due,
//! and is trained by a worker, not by whoever sends. After that it is renewed on schedule, or when
//! the ratio has become worse than it was right after the last training.

use super::{Dictionary, Meter, Scxq2Error};

/// Bytes of one sample: a block.
const SAMPLE_BYTES: usize = 4096;
/// Most bytes of samples that are held.
pub const MAX_SAMPLE_BYTES: usize = 2 << 20;
/// Bytes of a trained dictionary. Larger ones gained little on file system pages.
const DICTIONARY_BYTES: usize = 64 << 10;

/// When a dictionary is made and renewed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Renewal {
    /// From so many messages. WORMHOLE_SPEC 4 says 100.
    pub sample_messages: u32,
    /// After so many messages.
    pub every_messages: u64,
    /// When the recent ratio is so many percent worse than the best since the last training.
    pub worse_percent: u32,
    /// But not before so many messages.
    pub least_messages: u64,
}

impl Default for Renewal {
    fn default() -> Self {
        Self {
            sample_messages: 100,
            every_messages: 1_000_000,
            worse_percent: 25,
            least_messages: 10_000,
        }
    }
}

/// Collects samples and says when to train.
#[derive(Debug)]
pub struct Trainer {
    renewal: Renewal,
    samples: Vec<u8>,
    sizes: Vec<usize>,
    sampled: u32,
    // Messages since the last training, and the best ratio since then.
    messages: u64,
    best: f64,
    has_trained: bool,
}

/// Samples that are taken away to be trained from, on another thread if the caller likes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Samples {
    bytes: Vec<u8>,
    sizes: Vec<usize>,
}

impl Trainer {
    /// Begins to sample at once.
    #[must_use]
    pub fn new(renewal: Renewal) -> Self {
        Self {
            renewal,
            samples: Vec::new(),
            sizes: Vec::new(),
            sampled: 0,
            messages: 0,
            best: f64::MAX,
            has_trained: false,
        }
    }

    /// Sees a message. Gives samples when it is time to train: once for each dictionary.
    pub fn see(&mut self, raw: &[u8], meter: &Meter) -> Option<Samples> {
        self.messages += 1;
        if self.has_trained && !self.is_renewal_due(meter) {
            return None;
        }
        for piece in raw
            .chunks(SAMPLE_BYTES)
            .filter(|piece| piece.iter().any(|byte| *byte != 0))
        {
            if self.samples.len() + piece.len() > MAX_SAMPLE_BYTES {
                break;
            }
            self.samples.extend_from_slice(piece);
            self.sizes.push(piece.len());
        }
        self.sampled += 1;
        if self.sampled < self.renewal.sample_messages {
            return None;
        }
        (self.sampled, self.messages, self.best) = (0, 0, f64::MAX);
        self.has_trained = true;
        let (bytes, sizes) = (
            std::mem::take(&mut self.samples),
            std::mem::take(&mut self.sizes),
        );
        Some(Samples { bytes, sizes })
    }

    /// A dictionary came from elsewhere: what was sampled is dropped, renewal is counted from here.
    pub fn has_other(&mut self) {
        *self = Self {
            has_trained: true,
            ..Self::new(self.renewal)
        };
    }

    fn is_renewal_due(&mut self, meter: &Meter) -> bool {
        // Once sampling has begun it goes on until there are enough.
        if self.sampled > 0 || self.messages >= self.renewal.every_messages {
            return true;
        }
        let ratio = meter.recent_ratio();
        self.best = self.best.min(ratio);
        let limit = self.best * (1.0 + f64::from(self.renewal.worse_percent) / 100.0);
        self.messages >= self.renewal.least_messages && ratio > limit
    }
}

impl Samples {
    /// Trains a dictionary: some tenths of a second.
    ///
    /// # Errors
    /// [`Scxq2Error::Zstd`] if the samples are too few or too alike; then none is needed.
    pub fn train(&self) -> Result<Dictionary, Scxq2Error> {
        // zstd wants a dictionary to be much smaller than what it is trained from.
        let most = DICTIONARY_BYTES.min(self.bytes.len() / 8);
        Dictionary::new(zstd::dict::from_continuous(&self.bytes, &self.sizes, most)?)
    }
}
