//! The documents in protobuf: the same fields as in JSON. `proof/schema/proof.proto` is the schema.
//!
//! What JSON writes in base64 is bytes here. Readers refuse fields that they do not know, and a
//! field that is there twice without being a list, as they do in JSON.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::aggregate::{Aggregate, MAX_AGGREGATE_BYTES};
use super::claim::{BlockDocument, Sectors};
use super::{
    Compression, Envelope, EnvelopeError, Integrity, MAX_ENVELOPE_BYTES, Proof, SignatureText,
    Subject,
};

/// A message that is being written. Fields that are empty or 0 are left out, as proto3 does.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }

    fn uint(mut self, field: u64, value: u64) -> Self {
        if value != 0 {
            self.varint(field << 3);
            self.varint(value);
        }
        self
    }

    fn double(mut self, field: u64, value: f64) -> Self {
        if value != 0.0 {
            self.varint(field << 3 | 1);
            self.0.extend_from_slice(&value.to_bits().to_le_bytes());
        }
        self
    }

    /// A field that is there even if it is empty: an element of a list, a message.
    fn always(mut self, field: u64, bytes: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    fn bytes(self, field: u64, bytes: &[u8]) -> Self {
        match bytes.is_empty() {
            true => self,
            false => self.always(field, bytes),
        }
    }

    fn text(self, field: u64, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    fn base64(self, field: u64, text: &str) -> Result<Self, EnvelopeError> {
        Ok(self.bytes(field, &decoded(text)?))
    }

    fn each<T>(self, all: &[T], add: impl Fn(Self, &T) -> Self) -> Self {
        all.iter().fold(self, add)
    }
}

fn decoded(text: &str) -> Result<Vec<u8>, EnvelopeError> {
    BASE64
        .decode(text)
        .map_err(|_| EnvelopeError::Field("base64"))
}

#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    Uint(u64),
    Double(f64),
    Bytes(&'a [u8]),
}

/// The fields of a message that was read.
#[derive(Debug, Default)]
struct Fields<'a>(BTreeMap<u64, Vec<Value<'a>>>);

const DAMAGED: EnvelopeError = EnvelopeError::Field("protobuf");

fn varint(bytes: &mut &[u8]) -> Result<u64, EnvelopeError> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(DAMAGED)?;
        *bytes = rest;
        let part = u64::from(byte & 0x7F);
        if part << shift >> shift != part {
            return Err(DAMAGED);
        }
        value |= part << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(DAMAGED)
}

impl<'a> Fields<'a> {
    fn read(mut bytes: &'a [u8]) -> Result<Self, EnvelopeError> {
        let mut fields = Self::default();
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            let value = match key & 7 {
                0 => Value::Uint(varint(&mut bytes)?),
                1 => {
                    let (value, rest) = bytes.split_first_chunk().ok_or(DAMAGED)?;
                    bytes = rest;
                    Value::Double(f64::from_bits(u64::from_le_bytes(*value)))
                }
                2 => {
                    let length = usize::try_from(varint(&mut bytes)?).map_err(|_| DAMAGED)?;
                    let (value, rest) = bytes.split_at_checked(length).ok_or(DAMAGED)?;
                    bytes = rest;
                    Value::Bytes(value)
                }
                _ => return Err(DAMAGED),
            };
            fields.0.entry(key >> 3).or_default().push(value);
        }
        Ok(fields)
    }

    fn one(&mut self, field: u64) -> Result<Option<Value<'a>>, EnvelopeError> {
        match self.0.remove(&field).unwrap_or_default()[..] {
            [] => Ok(None),
            [value] => Ok(Some(value)),
            _ => Err(DAMAGED),
        }
    }

    fn uint(&mut self, field: u64) -> Result<u64, EnvelopeError> {
        match self.one(field)? {
            None => Ok(0),
            Some(Value::Uint(value)) => Ok(value),
            Some(_) => Err(DAMAGED),
        }
    }

    fn double(&mut self, field: u64) -> Result<f64, EnvelopeError> {
        match self.one(field)? {
            None => Ok(0.0),
            Some(Value::Double(value)) if value.is_finite() => Ok(value),
            Some(_) => Err(DAMAGED),
        }
    }

    fn bytes(&mut self, field: u64) -> Result<&'a [u8], EnvelopeError> {
        match self.one(field)? {
            None => Ok(&[]),
            Some(Value::Bytes(value)) => Ok(value),
            Some(_) => Err(DAMAGED),
        }
    }

    fn all(&mut self, field: u64) -> Result<Vec<&'a [u8]>, EnvelopeError> {
        let all = self.0.remove(&field).unwrap_or_default().into_iter();
        let bytes = all.map(|value| match value {
            Value::Bytes(value) => Ok(value),
            Value::Uint(_) | Value::Double(_) => Err(DAMAGED),
        });
        bytes.collect()
    }

    fn text(&mut self, field: u64) -> Result<String, EnvelopeError> {
        text(self.bytes(field)?)
    }

    fn base64(&mut self, field: u64) -> Result<String, EnvelopeError> {
        Ok(BASE64.encode(self.bytes(field)?))
    }

    fn texts(&mut self, field: u64) -> Result<Vec<String>, EnvelopeError> {
        self.all(field)?.into_iter().map(text).collect()
    }

    /// A message that must be there.
    fn message(&mut self, field: u64) -> Result<Fields<'a>, EnvelopeError> {
        match self.one(field)? {
            Some(Value::Bytes(value)) => Fields::read(value),
            _ => Err(DAMAGED),
        }
    }

    fn finish(self) -> Result<(), EnvelopeError> {
        match self.0.is_empty() {
            true => Ok(()),
            false => Err(DAMAGED),
        }
    }
}

fn text(bytes: &[u8]) -> Result<String, EnvelopeError> {
    let text = str::from_utf8(bytes).map_err(|_| DAMAGED)?;
    Ok(text.to_owned())
}

fn bounded(bytes: &[u8], most: usize) -> Result<Fields<'_>, EnvelopeError> {
    if bytes.len() > most {
        return Err(EnvelopeError::TooLong(bytes.len()));
    }
    Fields::read(bytes)
}

impl Subject {
    fn to_message(&self) -> Message {
        Message::default()
            .text(1, &self.object)
            .text(2, &self.version)
            .uint(3, self.byte_length)
    }

    fn from_fields(mut fields: Fields<'_>) -> Result<Self, EnvelopeError> {
        let subject = Self {
            object: fields.text(1)?,
            version: fields.text(2)?,
            byte_length: fields.uint(3)?,
        };
        fields.finish()?;
        Ok(subject)
    }
}

impl Proof {
    fn to_message(&self) -> Result<Message, EnvelopeError> {
        let message = Message::default().text(1, &self.kind);
        message.base64(2, &self.proof_bytes)
    }

    fn from_fields(mut fields: Fields<'_>) -> Result<Self, EnvelopeError> {
        let proof = Self {
            kind: fields.text(1)?,
            proof_bytes: fields.base64(2)?,
        };
        fields.finish()?;
        Ok(proof)
    }
}

impl SignatureText {
    fn to_message(&self) -> Result<Message, EnvelopeError> {
        let message = Message::default()
            .text(1, &self.algorithm)
            .text(2, &self.key_id);
        message.base64(3, &self.signature)
    }

    fn read(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let mut fields = Fields::read(bytes)?;
        let signature = Self {
            algorithm: fields.text(1)?,
            key_id: fields.text(2)?,
            signature: fields.base64(3)?,
        };
        fields.finish()?;
        Ok(signature)
    }

    fn messages(all: &[Self]) -> Result<Vec<Message>, EnvelopeError> {
        all.iter().map(Self::to_message).collect()
    }

    fn read_all(all: Vec<&[u8]>) -> Result<Vec<Self>, EnvelopeError> {
        all.into_iter().map(Self::read).collect()
    }
}

impl Envelope {
    /// The document in protobuf.
    ///
    /// # Errors
    /// [`EnvelopeError::Field`] if what is base64 in it is none.
    pub fn to_protobuf(&self) -> Result<Vec<u8>, EnvelopeError> {
        let mut compression = Message::default().text(1, &self.compression.algorithm);
        if let Some(id) = &self.compression.dictionary_id {
            compression = compression.always(2, id.as_bytes());
        }
        let compression = compression.double(3, self.compression.ratio);
        let integrity = Message::default()
            .text(1, &self.integrity.root_hash)
            .each(&self.integrity.chunk_hashes, |message, hash| {
                message.always(2, hash.as_bytes())
            });
        let signatures = SignatureText::messages(&self.signatures)?;
        let message = Message::default()
            .text(1, &self.schema)
            .always(2, &self.subject.to_message().0)
            .always(3, &compression.0)
            .always(4, &integrity.0)
            .always(5, &self.proof.to_message()?.0)
            .each(&signatures, |message, one| message.always(6, &one.0))
            .text(7, &self.timestamp);
        Ok(message.0)
    }

    /// Reads a document.
    ///
    /// # Errors
    /// [`EnvelopeError`] if it is none.
    pub fn from_protobuf(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let mut fields = bounded(bytes, MAX_ENVELOPE_BYTES)?;
        let (mut compression, mut integrity) = (fields.message(3)?, fields.message(4)?);
        let envelope = Self {
            schema: fields.text(1)?,
            subject: Subject::from_fields(fields.message(2)?)?,
            compression: Compression {
                algorithm: compression.text(1)?,
                dictionary_id: match compression.one(2)? {
                    None => None,
                    Some(Value::Bytes(id)) => Some(text(id)?),
                    Some(_) => return Err(DAMAGED),
                },
                ratio: compression.double(3)?,
            },
            integrity: Integrity {
                root_hash: integrity.text(1)?,
                chunk_hashes: integrity.texts(2)?,
            },
            proof: Proof::from_fields(fields.message(5)?)?,
            signatures: SignatureText::read_all(fields.all(6)?)?,
            timestamp: fields.text(7)?,
        };
        compression.finish()?;
        integrity.finish()?;
        fields.finish()?;
        Ok(envelope)
    }
}

impl Aggregate {
    fn to_message(&self) -> Result<Message, EnvelopeError> {
        let signatures = SignatureText::messages(&self.signatures)?;
        let records = self.records.iter().map(|record| decoded(record));
        let records = records.collect::<Result<Vec<_>, _>>()?;
        Ok(Message::default()
            .text(1, &self.schema)
            .always(2, &self.subject.to_message().0)
            .uint(3, self.count)
            .text(4, &self.root_hash)
            .each(&self.proof_hashes, |message, hash| {
                message.always(5, hash.as_bytes())
            })
            .each(&records, |message, record| message.always(6, record))
            .each(&signatures, |message, one| message.always(7, &one.0))
            .text(8, &self.timestamp))
    }

    fn from_fields(mut fields: Fields<'_>) -> Result<Self, EnvelopeError> {
        let records = fields.all(6)?.into_iter();
        let aggregate = Self {
            schema: fields.text(1)?,
            subject: Subject::from_fields(fields.message(2)?)?,
            count: fields.uint(3)?,
            root_hash: fields.text(4)?,
            proof_hashes: fields.texts(5)?,
            records: records.map(|record| BASE64.encode(record)).collect(),
            signatures: SignatureText::read_all(fields.all(7)?)?,
            timestamp: fields.text(8)?,
        };
        fields.finish()?;
        Ok(aggregate)
    }

    /// The document in protobuf.
    ///
    /// # Errors
    /// [`EnvelopeError::Field`] if what is base64 in it is none.
    pub fn to_protobuf(&self) -> Result<Vec<u8>, EnvelopeError> {
        Ok(self.to_message()?.0)
    }

    /// Reads a document.
    ///
    /// # Errors
    /// [`EnvelopeError`] if it is none.
    pub fn from_protobuf(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        Self::from_fields(bounded(bytes, MAX_AGGREGATE_BYTES)?)
    }
}

impl BlockDocument {
    /// The document in protobuf.
    ///
    /// # Errors
    /// [`EnvelopeError::Field`] if what is base64 in it is none.
    pub fn to_protobuf(&self) -> Result<Vec<u8>, EnvelopeError> {
        let block = Message::default()
            .uint(1, self.block.lba)
            .uint(2, self.block.sectors);
        let message = Message::default()
            .text(1, &self.schema)
            .always(2, &self.subject.to_message().0)
            .always(3, &block.0)
            .text(4, &self.leaf)
            .always(5, &self.proof.to_message()?.0)
            .always(6, &self.anchors.to_message()?.0);
        Ok(message.0)
    }

    /// Reads a document.
    ///
    /// # Errors
    /// [`EnvelopeError`] if it is none.
    pub fn from_protobuf(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let mut fields = bounded(bytes, MAX_AGGREGATE_BYTES)?;
        let mut block = fields.message(3)?;
        let document = Self {
            schema: fields.text(1)?,
            subject: Subject::from_fields(fields.message(2)?)?,
            block: Sectors {
                lba: block.uint(1)?,
                sectors: block.uint(2)?,
            },
            leaf: fields.text(4)?,
            proof: Proof::from_fields(fields.message(5)?)?,
            anchors: Aggregate::from_fields(fields.message(6)?)?,
        };
        block.finish()?;
        fields.finish()?;
        document.known()
    }
}
