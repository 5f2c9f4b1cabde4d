//! What two provers say to each other, through whatever connects their nodes.
//!
//! A replica asks for records after what it has, and asks again when it has taken them; a primary
//! with nothing new keeps the question until it has. So there is at most one question and one
//! answer on its way, however many anchors there are, and none is ever lost with a session.
//!
//! A stranger may have made these bytes: they are decoded with bounds, and are proposals.

use std::collections::VecDeque;

use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::Digest;
use crate::ledger::{HEADER_BYTES, LedgerHeader, Record};
use crate::sign::keyring::KeyOffer;

/// Longest message in bytes.
pub const MAX_BYTES: usize = 60 << 10;
/// Most places that a question names.
pub const MAX_PLACES: usize = 64;
/// Bytes of records in one answer, unless a single record is longer.
pub const RECORD_BYTES: usize = 48 << 10;
const VERSION: u8 = 1;

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// Replica: what follows the newest of these records that you have, too?
    Have {
        /// Hash of the ledger's header; zero if there is none.
        ledger: Digest,
        /// Records by index and hash, newest first.
        places: Vec<(u64, Digest)>,
    },
    /// Primary: these records.
    Records {
        /// Of this ledger.
        header: LedgerHeader,
        /// Index of the first one.
        first: u64,
        /// The records as they lie in the file.
        bytes: Vec<u8>,
    },
    /// Replica: enrol my key.
    Offer(KeyOffer),
}

impl Message {
    /// The encoding.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u8(VERSION);
        match self {
            Self::Have { ledger, places } => {
                writer.u8(1).digest(ledger).count(places.len());
                for (index, hash) in places {
                    writer.u64(*index).digest(hash);
                }
            }
            Self::Records {
                header,
                first,
                bytes,
            } => {
                writer.u8(2).bytes(&header.encode()).u64(*first);
                writer.bytes(bytes);
            }
            Self::Offer(offer) => offer.encode(writer.u8(3)),
        }
        writer.finish()
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("prover message", bytes);
        if bytes.len() > MAX_BYTES {
            return Err(reader.invalid("length"));
        }
        reader.version(VERSION)?;
        let message = match reader.u8()? {
            1 => {
                let ledger = reader.digest()?;
                let count = reader.count(MAX_PLACES, "number of places")?;
                let place = |reader: &mut Reader<'_>| Ok((reader.u64()?, reader.digest()?));
                let places = (0..count).map(|_| place(&mut reader));
                Self::Have {
                    ledger,
                    places: places.collect::<Result<_, _>>()?,
                }
            }
            2 => Self::Records {
                header: LedgerHeader::decode(reader.take(HEADER_BYTES)?)?,
                first: reader.u64()?,
                bytes: reader.rest().to_vec(),
            },
            3 => Self::Offer(KeyOffer::decode(&mut reader)?),
            _ => return Err(reader.invalid("kind")),
        };
        reader.finish()?;
        Ok(message)
    }
}

/// The records of an answer, of which the first has this index, each with its bytes.
pub(super) fn run(first: u64, bytes: &[u8]) -> Result<VecDeque<(Record, Vec<u8>)>, String> {
    let mut rest = bytes;
    let mut records = VecDeque::new();
    while !rest.is_empty() {
        match Record::decode(rest) {
            Ok((record, length))
                if first.checked_add(records.len() as u64) == Some(record.index) =>
            {
                let (whole, later) = rest.split_at(length);
                rest = later;
                records.push_back((record, whole.to_vec()));
            }
            Ok(_) => return Err("ledger records out of order".to_owned()),
            Err(error) => return Err(format!("a ledger record: {error}")),
        }
    }
    Ok(records)
}
