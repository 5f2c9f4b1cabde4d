//! The statement, the two anchors and the argument in one `scxq2.proof.v1`, verified with public
//! keys only.
//!
//! As with the envelope of one anchor, every other field repeats a part of what is signed, and a
//! verifier rebuilds the document and compares.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hn4::types::{Epoch, NodeId, VolumeId};

use super::chain::Part;
use super::statement::Statement;
use super::{ARGUMENT_BYTES_MAX, StarkError, argument};
use crate::anchor::{Anchor, Phase, SignedAnchor, blake3_text};
use crate::codec::{Reader, Writer};
use crate::envelope::{
    Compression, Envelope, EnvelopeError, Integrity, Proof, SCHEMA, SignatureText, Subject,
    ZK_STARK, ratio,
};
use crate::ledger::verify::Policy;
use crate::sign::keyring::Keyring;
use crate::sign::{PublicKey, SecretKey, Signature};
use crate::time::iso8601;

const VERSION: u8 = 1;

/// What the bytes of the proof hold.
pub(super) struct Parts {
    pub(super) statement: Statement,
    pub(super) first: SignedAnchor,
    pub(super) last: SignedAnchor,
    pub(super) argument: Vec<u8>,
}

impl Parts {
    fn encoded(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        self.statement.encode(writer.u8(VERSION));
        self.first.encode(&mut writer);
        self.last.encode(&mut writer);
        writer.sized(&self.argument);
        writer.finish()
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StarkError> {
        let mut reader = Reader::new("proof", bytes);
        reader.version(VERSION)?;
        let statement = Statement::decode(&mut reader)?;
        let first = SignedAnchor::decode(&mut reader)?;
        let last = SignedAnchor::decode(&mut reader)?;
        let length = reader.count(ARGUMENT_BYTES_MAX, "length of the argument")?;
        let argument = reader.take(length)?.to_vec();
        reader.finish()?;
        Ok(Self {
            statement,
            first,
            last,
            argument,
        })
    }

    /// The document that says this, signed so.
    pub(super) fn envelope(&self, signatures: &[Signature]) -> Envelope {
        let statement = &self.statement;
        let (first, last) = (&self.first.anchor, &self.last.anchor);
        let epochs = (first.first, last.last);
        Envelope {
            schema: SCHEMA.to_owned(),
            subject: Subject::new(statement.volume, epochs, statement.raw_bytes),
            compression: Compression {
                algorithm: "scxq2".to_owned(),
                dictionary_id: None,
                ratio: ratio(statement.raw_bytes, statement.packed_bytes),
            },
            integrity: Integrity {
                root_hash: statement.end.to_string(),
                chunk_hashes: vec![
                    statement.start.to_string(),
                    blake3_text(&first.proof_hash),
                    blake3_text(&last.proof_hash),
                ],
            },
            proof: Proof {
                kind: ZK_STARK.to_owned(),
                proof_bytes: BASE64.encode(self.encoded()),
            },
            signatures: signatures.iter().map(SignatureText::from).collect(),
            timestamp: iso8601(statement.time_ms),
        }
    }
}

/// States what the chain of a part is, signs that with `keys`, one for each algorithm, in order,
/// and proves it. Takes seconds of one core, and hundreds of megabytes for the longest parts.
///
/// # Errors
/// [`StarkError::Sign`], [`StarkError::Prover`], [`StarkError::Security`], [`StarkError::TooLong`].
pub fn make(
    part: &Part,
    (node, keys): (NodeId, &[&SecretKey]),
    time_ms: u64,
) -> Result<Envelope, StarkError> {
    let statement = Statement::new(part, node, time_ms);
    let digest = statement.hash();
    let signatures = keys.iter().map(|key| key.sign(&digest));
    let signatures: Vec<Signature> = signatures.collect::<Result<_, _>>()?;
    let claim = statement.claim(&part.first.anchor, &part.last.anchor);
    let argument = argument::prove(&claim, &part.roots)?;
    // What is given out was verified once: a chain that does not lead where the statement says, or
    // an argument that is too long, is found here.
    argument::verify(&claim, &argument)?;
    let parts = Parts {
        statement,
        first: part.first.clone(),
        last: part.last.clone(),
        argument,
    };
    Ok(parts.envelope(&signatures))
}

/// Verifies a document: the signatures of the statement and of the anchors, that they fit each
/// other and the range in question, that every field says the same, and the argument. Needs nothing
/// but public keys. A policy's algorithms for checkpoints are asked for of the statement, too.
///
/// # Errors
/// [`StarkError`] naming the first thing wrong.
pub fn verify(
    envelope: &Envelope,
    (volume, first, last): (VolumeId, Epoch, Epoch),
    trusted: &[PublicKey],
    policy: &Policy,
) -> Result<Statement, StarkError> {
    for (name, known) in [(&envelope.schema, SCHEMA), (&envelope.proof.kind, ZK_STARK)] {
        if name != known {
            return Err(EnvelopeError::Schema(name.clone()).into());
        }
    }
    let field = |name| StarkError::Document(EnvelopeError::Field(name));
    if envelope.signatures.len() > Signature::MAX {
        return Err(field("signatures"));
    }
    let bytes = BASE64.decode(&envelope.proof.proof_bytes);
    let parts = Parts::decode(&bytes.map_err(|_| field("proof_bytes"))?)?;
    let parsed = envelope.signatures.iter().map(SignatureText::parse);
    let signatures: Vec<Signature> = parsed.collect::<Result<_, _>>()?;
    let statement = parts.statement;
    if statement.volume != volume {
        let (expected, found) = (volume, statement.volume);
        return Err(StarkError::OtherVolume { expected, found });
    }
    check_signatures(&parts, &signatures, (trusted, policy))?;
    let (from, to) = (&parts.first.anchor, &parts.last.anchor);
    if let Some(part) = statement.misfit(from, to) {
        return Err(StarkError::Statement(part));
    }
    if *envelope != parts.envelope(&signatures) {
        return Err(field("subject, compression, integrity, proof or timestamp"));
    }
    let covers = (from.first..=from.last).contains(&first) && (to.first..=to.last).contains(&last);
    if !covers {
        let found = envelope.subject.version.clone();
        return Err(StarkError::Range { first, last, found });
    }
    argument::verify(&statement.claim(from, to), &parts.argument)?;
    Ok(statement)
}

fn check_signatures(
    parts: &Parts,
    signatures: &[Signature],
    (trusted, policy): (&[PublicKey], &Policy),
) -> Result<(), StarkError> {
    let keys = Keyring::trusting(trusted);
    let of_anchor = |anchor: &Anchor| (anchor.term.node, anchor.phase == Phase::Checkpoint);
    let (first, last) = (&parts.first, &parts.last);
    let by = (parts.statement.node, true);
    let signed = [
        ("statement", parts.statement.hash(), by, signatures),
        (
            "first anchor",
            first.anchor.hash(),
            of_anchor(&first.anchor),
            &first.signatures,
        ),
        (
            "last anchor",
            last.anchor.hash(),
            of_anchor(&last.anchor),
            &last.signatures,
        ),
    ];
    for (what, digest, (node, is_checkpoint), signatures) in signed {
        let required = policy.required(is_checkpoint);
        let verified = keys.verify(&digest, node, signatures, &required);
        verified.map_err(|source| StarkError::Key { what, source })?;
    }
    Ok(())
}
