//! SCXQ2 on the data stream of one session. //= WORMHOLE_SPEC 4
//!
//! Each chunk and piece is packed by itself, when it is sent, so what waits and what is credited
//! is raw. Packing is tried only where both sides have agreed on it; what is short or does not
//! shrink goes as it is. A dictionary is sent right before the first message that may need it, as a
//! delta if this peer was sent the one before it in this session.
//!
//! Not here: training, which takes tenths of a second. The session gives out samples, and whoever
//! runs it gives a dictionary back. Whether the bytes are true: the checks of the raw frames tell.

use std::sync::Arc;

use bytes::Bytes;
use hn4_proof::scxq2::train::{Renewal, Samples, Trainer};
use hn4_proof::scxq2::{
    Dictionary, DictionaryId, MAX_DELTA_BYTES, MAX_RAW_BYTES, Packer, Shipment, Unpacker,
};

use crate::wire::WireError;
use crate::wire::data::DataMessage;

/// Level of zstd, measured: higher ones cost more processor time than a link saves.
const LEVEL: i32 = 1;

/// Bytes of bulk messages in one direction, without their headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// As they were before packing and are after unpacking.
    pub raw_bytes: u64,
    /// As they went over the wire, dictionaries included.
    pub wire_bytes: u64,
}

impl Traffic {
    fn count(&mut self, raw: usize, wire: usize) {
        self.raw_bytes += raw as u64;
        self.wire_bytes += wire as u64;
    }
}

/// What compression has done in a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CompressionStatus {
    /// Both sides have agreed on SCXQ2.
    pub agreed: bool,
    /// To the peer.
    pub sent: Traffic,
    /// From the peer.
    pub received: Traffic,
    /// What is sent is packed with this dictionary.
    pub dictionary: Option<DictionaryId>,
    /// The newest dictionary of the peer.
    pub peer_dictionary: Option<DictionaryId>,
}

/// See the module.
pub(super) struct Compression {
    coders: Option<Coders>,
    renewal: Renewal,
    /// The volume's newest dictionary, until it is sent.
    next: Option<Arc<Shipment>>,
    samples: Option<Samples>,
    status: CompressionStatus,
}

/// What is there once both sides have agreed.
struct Coders {
    packer: Packer,
    unpacker: Unpacker,
    trainer: Trainer,
}

impl Compression {
    pub(super) fn new(renewal: Renewal) -> Self {
        Self {
            coders: None,
            renewal,
            next: None,
            samples: None,
            status: CompressionStatus::default(),
        }
    }

    /// Both sides take packed messages.
    pub(super) fn agree(&mut self) {
        // Without memory for the coders nothing is packed, and the peer's first packed message
        // ends the session.
        if let (Ok(packer), Ok(unpacker)) = (Packer::new(LEVEL, true), Unpacker::new()) {
            self.status.agreed = true;
            let mut trainer = Trainer::new(self.renewal);
            if self.next.is_some() {
                trainer.has_other();
            }
            self.coders = Some(Coders {
                packer,
                unpacker,
                trainer,
            });
        }
    }

    pub(super) fn status(&self) -> CompressionStatus {
        self.status
    }

    pub(super) fn take_samples(&mut self) -> Option<Samples> {
        self.samples.take()
    }

    /// A dictionary is there. The packer goes on with the one it has until this one is sent.
    pub(super) fn trained(&mut self, shipment: Arc<Shipment>) {
        if self.status.dictionary == Some(shipment.dictionary().id()) {
            return;
        }
        if let Some(coders) = &mut self.coders {
            coders.trainer.has_other();
        }
        self.samples = None;
        self.next = Some(shipment);
    }

    /// The dictionary that must be sent before the next packed message, if one waits. What is
    /// packed after this call is packed with it.
    pub(super) fn dictionary_to_send(&mut self) -> Option<DataMessage> {
        let coders = self.coders.as_mut()?;
        let shipment = self.next.take()?;
        let bytes = Bytes::copy_from_slice(shipment.for_peer(self.status.dictionary));
        // Without memory for it the one before goes on.
        coders.packer.set_dictionary(shipment.dictionary()).ok()?;
        self.status.dictionary = Some(shipment.dictionary().id());
        self.status.sent.count(0, bytes.len());
        Some(DataMessage::Dictionary { bytes })
    }

    /// The segment that stands for the raw bytes of a message; none, if they go as they are.
    pub(super) fn pack(&mut self, raw: &Bytes) -> Option<Bytes> {
        let segment = self.coders.as_mut().and_then(|coders| {
            if let Some(samples) = coders.trainer.see(raw, &coders.packer.meter()) {
                self.samples = Some(samples);
            }
            coders.packer.pack_if_smaller(raw)
        });
        let wire = segment.as_ref().map_or(raw.len(), Vec::len);
        self.status.sent.count(raw.len(), wire);
        segment.map(Bytes::from)
    }

    /// A message came that was not packed.
    pub(super) fn received(&mut self, raw: usize, wire: usize) {
        self.status.received.count(raw, wire);
    }

    /// The raw bytes of a packed message, at most so many.
    pub(super) fn unpack(&mut self, segment: &[u8], most: usize) -> Result<Bytes, WireError> {
        let refused = |why: &dyn std::fmt::Display| WireError::Message(format!("scxq2: {why}"));
        let coders = self.coders.as_mut();
        let coders = coders.ok_or_else(|| refused(&"not agreed on"))?;
        let most = most.min(MAX_RAW_BYTES);
        let raw = coders.unpacker.unpack(segment, most);
        let raw = raw.map_err(|error| refused(&error))?;
        self.status.received.count(raw.len(), segment.len());
        Ok(raw.into())
    }

    /// The peer has sent a dictionary.
    ///
    /// # Errors
    ///
    /// Which rule the peer broke.
    pub(super) fn learn(&mut self, delta: &[u8]) -> Result<(), String> {
        let Some(coders) = &mut self.coders else {
            return Err("a dictionary, though compression was not agreed on".to_owned());
        };
        if delta.len() > MAX_DELTA_BYTES {
            return Err(format!("a dictionary of {} bytes", delta.len()));
        }
        let unpacker = &coders.unpacker;
        let dictionary = Dictionary::from_delta(delta, |id| unpacker.find(id));
        let dictionary = dictionary.map_err(|error| format!("scxq2: {error}"))?;
        self.status.peer_dictionary = Some(dictionary.id());
        let learned = coders.unpacker.learn(dictionary);
        learned.map_err(|error| format!("scxq2: {error}"))
    }
}
