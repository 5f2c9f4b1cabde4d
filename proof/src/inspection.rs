//! What a node found when it looked at its own medium: a deep verify, or the repair of what one
//! found.
//!
//! It goes into the node's *local* ledger, since it is about one copy only, and is signed by the
//! node, bound to its place there.

use hn4::types::{Epoch, Lba, NodeId, VolumeId};

use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{self, Digest};
use crate::sign::{SecretKey, SignError, Signature};

/// Most places that are named; of more only the number of blocks is told.
pub const MAX_PLACES: usize = 256;
const VERSION: u8 = 1;

/// What was done. The numbers are part of the encoding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Every block was read and compared with its leaf.
    DeepVerify = 1,
    /// Damaged blocks were replaced by good copies.
    Repair = 2,
}

/// A run of sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The first one.
    pub lba: Lba,
    /// How many, at least 1.
    pub sectors: u64,
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inspection {
    /// The volume.
    pub volume: VolumeId,
    /// Whose copy it is.
    pub node: NodeId,
    /// What was done.
    pub kind: Kind,
    /// The backing was at this epoch when it began.
    pub first: Epoch,
    /// And at this one when it ended.
    pub last: Epoch,
    /// When it began, in milliseconds since 1970.
    pub began_ms: u64,
    /// When it ended.
    pub ended_ms: u64,
    /// Blocks of 4 KiB that were looked at; holes and zeroes that need no reading count.
    pub blocks: u64,
    /// Blocks that are not what was written there.
    pub damaged: u64,
    /// Blocks that were made good.
    pub repaired: u64,
    /// Where, ascending and apart from each other; at most [`MAX_PLACES`].
    pub places: Vec<Place>,
    /// `b3sum` of the device, if it was taken, and stood at one epoch while it was.
    pub device: Option<Digest>,
}

impl Inspection {
    fn encode(&self, writer: &mut Writer) {
        writer.u8(VERSION).u8(self.kind as u8);
        writer.bytes(&self.volume.0).bytes(&self.node.0);
        writer.u64(self.first.0).u64(self.last.0);
        writer.u64(self.began_ms).u64(self.ended_ms);
        writer
            .u64(self.blocks)
            .u64(self.damaged)
            .u64(self.repaired)
            .count(self.places.len());
        for place in &self.places {
            writer.u64(place.lba.0).u64(place.sectors);
        }
        match &self.device {
            Some(device) => writer.u8(1).digest(device),
            None => writer.u8(0),
        };
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.version(VERSION)?;
        let kind = match reader.u8()? {
            1 => Kind::DeepVerify,
            2 => Kind::Repair,
            _ => return Err(reader.invalid("kind")),
        };
        let (volume, node) = (VolumeId(reader.array()?), NodeId(reader.array()?));
        let (first, last) = (Epoch(reader.u64()?), Epoch(reader.u64()?));
        let (began_ms, ended_ms) = (reader.u64()?, reader.u64()?);
        let (blocks, damaged, repaired) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let count = reader.count(MAX_PLACES, "number of places")?;
        let place = |reader: &mut Reader<'_>| {
            Ok(Place {
                lba: Lba(reader.u64()?),
                sectors: reader.u64()?,
            })
        };
        let places = (0..count)
            .map(|_| place(reader))
            .collect::<Result<_, _>>()?;
        let device = match reader.u8()? {
            0 => None,
            1 => Some(reader.digest()?),
            _ => return Err(reader.invalid("device flag")),
        };
        let inspection = Self {
            volume,
            node,
            kind,
            first,
            last,
            began_ms,
            ended_ms,
            blocks,
            damaged,
            repaired,
            places,
            device,
        };
        match inspection.malformed() {
            Some(field) => Err(reader.invalid(field)),
            None => Ok(inspection),
        }
    }

    fn malformed(&self) -> Option<&'static str> {
        let end = |place: &Place| place.lba.0.checked_add(place.sectors);
        let whole = self
            .places
            .iter()
            .all(|place| place.sectors > 0 && end(place).is_some());
        let apart = self
            .places
            .is_sorted_by(|a, b| end(a).is_some_and(|end| end < b.lba.0));
        let checks = [
            (self.first <= self.last, "epoch range"),
            (whole && apart, "places"),
            (self.damaged <= self.blocks, "number of damaged blocks"),
            (self.repaired <= self.blocks, "number of repaired blocks"),
        ];
        let wrong = checks.into_iter().find(|(is_good, _)| !is_good);
        wrong.map(|(_, field)| field)
    }

    /// Signs it for a place of a ledger: its index, and the hash of the record before it.
    ///
    /// # Errors
    /// [`SignError`] of a key.
    pub fn sign(
        self,
        (index, previous): (u64, &Digest),
        keys: &[&SecretKey],
    ) -> Result<SignedInspection, SignError> {
        let digest = self.digest(index, previous);
        let signatures = keys.iter().map(|key| key.sign(&digest));
        Ok(SignedInspection {
            signatures: signatures.collect::<Result<_, _>>()?,
            inspection: self,
        })
    }

    /// What the signatures sign.
    #[must_use]
    pub fn digest(&self, index: u64, previous: &Digest) -> Digest {
        let mut writer = Writer::new();
        self.encode(&mut writer);
        hash::INSPECTION.hash(&[&index.to_le_bytes(), &previous.0, writer.as_slice()])
    }
}

/// An inspection with its signatures: the body of a ledger record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SignedInspection {
    /// The inspection.
    pub inspection: Inspection,
    /// One for each algorithm, in the order of the algorithms.
    pub signatures: Vec<Signature>,
}

impl SignedInspection {
    /// Appends the encoding: the inspection, then the signatures.
    pub fn encode(&self, writer: &mut Writer) {
        self.inspection.encode(writer);
        Signature::encode_all(&self.signatures, writer);
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one, or its numbers cannot be.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let inspection = Inspection::decode(reader)?;
        let signatures = Signature::decode_all(reader, Signature::MAX)?;
        Ok(Self {
            inspection,
            signatures,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inspection() -> Inspection {
        let place = |lba, sectors| Place {
            lba: Lba(lba),
            sectors,
        };
        Inspection {
            volume: VolumeId([1; 16]),
            node: NodeId([2; 16]),
            kind: Kind::DeepVerify,
            first: Epoch(3),
            last: Epoch(5),
            began_ms: 10,
            ended_ms: 20,
            blocks: 100,
            damaged: 2,
            repaired: 0,
            places: vec![place(8, 8), place(64, 8)],
            device: Some(Digest([7; 32])),
        }
    }

    fn encoded(inspection: &Inspection) -> Vec<u8> {
        let mut writer = Writer::new();
        inspection.encode(&mut writer);
        writer.finish()
    }

    #[test]
    fn a_flipped_bit_is_another_inspection_or_none() {
        let good = encoded(&inspection());
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut reader = Reader::new("inspection", &bad);
            let read = Inspection::decode(&mut reader);
            let same = read.is_ok_and(|read| reader.finish().is_ok() && read == inspection());
            assert!(!same, "bit {bit}");
        }
        let mut reader = Reader::new("inspection", &good);
        assert_eq!(Inspection::decode(&mut reader), Ok(inspection()));
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        let spoil: [fn(&mut Inspection); 6] = [
            |it| it.last = Epoch(2),
            |it| it.damaged = 101,
            |it| it.repaired = 101,
            |it| it.places.reverse(),
            |it| it.places[0].sectors = 0,
            |it| it.places[1].lba = Lba(u64::MAX - 1),
        ];
        for spoil in spoil {
            let mut bad = inspection();
            spoil(&mut bad);
            let bytes = encoded(&bad);
            assert!(Inspection::decode(&mut Reader::new("inspection", &bytes)).is_err());
        }
        let mut many = inspection();
        let place = |index| Place {
            lba: Lba(index * 16),
            sectors: 8,
        };
        many.places = (0..MAX_PLACES as u64 + 1).map(place).collect();
        let bytes = encoded(&many);
        assert!(Inspection::decode(&mut Reader::new("inspection", &bytes)).is_err());
        many.places.pop();
        let bytes = encoded(&many);
        assert!(Inspection::decode(&mut Reader::new("inspection", &bytes)).is_ok());
    }
}
