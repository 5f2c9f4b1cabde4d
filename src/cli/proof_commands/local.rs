//! Checking a node's own ledger, and telling what stands in it.
//!
//! The last record may be torn: a crash cut its append off, or the daemon is writing it. It was
//! never promised to anybody, so all before it counts. A record that is there as a whole and is not
//! what was written is damage, also at the end, and refused.

use std::io::{self, Write};

use hn4_proof::ledger::scan::{Records, ScanError, TornTail, recover};
use hn4_proof::ledger::verify::{Policy, Verifier};
use hn4_proof::ledger::{Body, LedgerHeader, RECORD_HEAD_BYTES, Record, RecordError, Scope};
use hn4_proof::sign::PublicKey;
use hn4_proof::time::iso8601;
use hn4_proof::tree::ReadAt;

use crate::cli::run::AnyError;

/// Checks all records with the keys that are trusted and writes what they say.
///
/// # Errors
/// If the ledger cannot be read, or anything of it is not as it was written.
pub(super) fn verify(
    medium: &impl ReadAt,
    trusted: &[PublicKey],
    policy: Policy,
    out: &mut impl Write,
) -> Result<(), AnyError> {
    let mut records = Records::new(medium)?;
    let header = *records.header();
    let mut tip = Verifier::new(&header, policy).trusting(trusted);
    writeln!(out, "local ledger of volume {}", header.volume)?;
    let mut torn = None;
    while let Some(found) = records.next_record()? {
        match found {
            Ok(record) => {
                tip.push(&record)?;
                show(&record, out)?;
            }
            Err(_) => {
                torn = torn_tail(medium, &header, tip.next_index())?;
                break;
            }
        }
    }
    if let Some(TornTail { offset, bytes, .. }) = torn {
        writeln!(
            out,
            "a torn record at the end was left out, {bytes} bytes at byte {offset}: a crash cut \
             it off, or it is being written"
        )?;
    }
    let size = tip.next_index();
    writeln!(
        out,
        "{size} records; every record, place and signature is good"
    )?;
    Ok(())
}

fn show(record: &Record, out: &mut impl Write) -> io::Result<()> {
    let Body::Inspection(signed) = &record.body else {
        return Ok(());
    };
    let it = &signed.inspection;
    writeln!(
        out,
        "{}  {:?}, epochs {} to {}: {} blocks, {} damaged, {} repaired",
        iso8601(record.time_ms),
        it.kind,
        it.first,
        it.last,
        it.blocks,
        it.damaged,
        it.repaired
    )?;
    match &it.device {
        Some(device) => writeln!(out, "  b3sum of the device: {device}"),
        None => Ok(()),
    }
}

/// What is torn, behind a record that does not check out; nothing if the daemon has mended it
/// since.
fn torn_tail(
    medium: &impl ReadAt,
    header: &LedgerHeader,
    index: u64,
) -> Result<Option<TornTail>, AnyError> {
    let damaged = |index: u64, offset: u64, reason: RecordError| {
        // There is no other copy of this ledger to go to.
        format!("record {index} at byte {offset} is damaged: {reason}").into()
    };
    let scope = (Scope::Local, header.volume);
    match recover(medium, scope, Policy::default(), None) {
        Ok(found) => match found.torn {
            Some(tail) if !is_cut_off(medium, &tail)? => {
                Err(damaged(index, tail.offset, tail.reason))
            }
            torn => Ok(torn),
        },
        Err(ScanError::Damaged {
            index,
            offset,
            reason,
        }) => Err(damaged(index, offset, reason)),
        Err(error) => Err(error.into()),
    }
}

/// Whether the end of a record was never written: the file ends before it, or holds zeroes where
/// its hash would end, which is its commit mark.
fn is_cut_off(medium: &impl ReadAt, tail: &TornTail) -> io::Result<bool> {
    let is_short = matches!(tail.reason, RecordError::Short { .. });
    if is_short || tail.bytes < RECORD_HEAD_BYTES as u64 {
        return Ok(true);
    }
    // Part of the hash may be in the last page that was written. One hash in 2^32 ends so.
    let mut end = [0; 4];
    medium.read_at(tail.offset + tail.bytes - end.len() as u64, &mut end)?;
    Ok(end == [0; 4])
}

#[cfg(test)]
mod tests {
    use hn4::types::{Epoch, NodeId, VolumeId};
    use hn4_proof::inspection::{Inspection, Kind};
    use hn4_proof::ledger::file::MemoryMedium;
    use hn4_proof::sign::{Algorithm, SecretKey};

    use super::*;

    const VOLUME: VolumeId = VolumeId([3; 16]);

    /// A ledger with this many inspections, and where the last one begins.
    fn ledger(key: &SecretKey, count: u64) -> (Vec<u8>, usize) {
        let header = LedgerHeader {
            scope: Scope::Local,
            volume: VOLUME,
            created_ms: 1,
        };
        let mut tip = Verifier::new(&header, Policy::default());
        let (mut bytes, mut last) = (header.encode(), 0);
        for blocks in 0..count {
            let inspection = Inspection {
                volume: VOLUME,
                node: NodeId([4; 16]),
                kind: Kind::DeepVerify,
                first: Epoch(1),
                last: Epoch(2),
                began_ms: 1,
                ended_ms: 2,
                blocks,
                damaged: 0,
                repaired: 0,
                places: Vec::new(),
                device: None,
            };
            let place = (tip.next_index(), &tip.previous());
            let signed = inspection.sign(place, &[key]).expect("signed");
            let record = tip.encode_next(7, &Body::Inspection(Box::new(signed)));
            tip.push_bytes(&record).expect("it fits");
            last = bytes.len();
            bytes.extend(record);
        }
        (bytes, last)
    }

    fn verified(key: &SecretKey, bytes: &[u8]) -> Result<String, String> {
        let bytes = bytes.to_vec();
        let aside = Vec::new();
        let (medium, mut out) = (MemoryMedium { bytes, aside }, Vec::new());
        let trusted = [key.public().clone()];
        let result = verify(&medium, &trusted, Policy::default(), &mut out);
        let text = String::from_utf8(out).expect("text");
        result.map(|()| text).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_crash_left_of_an_append_is_left_out_and_all_before_it_is_verified() {
        let key = SecretKey::generate(Algorithm::Ed25519).expect("a key");
        let (bytes, last) = ledger(&key, 3);
        let whole = verified(&key, &bytes).expect("good");
        assert!(whole.ends_with("3 records; every record, place and signature is good\n"));
        assert!(!whole.contains("torn"), "{whole}");
        for end in last + 1..bytes.len() {
            let text = verified(&key, &bytes[..end]).expect("what is whole is good");
            let torn = format!("left out, {} bytes at byte {last}:", end - last);
            assert!(text.contains(&torn), "{end}: {text}");
            assert!(text.contains("\n2 records; every record"), "{end}: {text}");
            // The file has its new length already, but not its contents.
            for length in [bytes.len(), bytes.len() + 100] {
                let mut unwritten = bytes[..end.min(bytes.len() - 4)].to_vec();
                unwritten.resize(length, 0);
                let text = verified(&key, &unwritten).expect("what is whole is good");
                assert!(text.contains("\n2 records; every record"), "{end}: {text}");
            }
        }
    }

    #[test]
    fn what_is_there_as_a_whole_and_was_changed_is_damage_also_at_the_end() {
        let key = SecretKey::generate(Algorithm::Ed25519).expect("a key");
        let (bytes, last) = ledger(&key, 2);
        let (first, _) = ledger(&key, 0);
        for (index, start) in [(0, first.len()), (1, last)] {
            let mut spoiled = bytes.clone();
            spoiled[start + RECORD_HEAD_BYTES + 3] ^= 1;
            let why = verified(&key, &spoiled).expect_err("refused");
            let place = format!("record {index} at byte {start} is damaged");
            assert!(why.starts_with(&place), "{why}");
        }
        let mut shorter = bytes;
        shorter.drain(first.len()..last);
        verified(&key, &shorter).expect_err("the first record is missing");
        let stranger = SecretKey::generate(Algorithm::Ed25519).expect("a key");
        let (bytes, last) = ledger(&key, 2);
        verified(&stranger, &bytes[..=last]).expect_err("signed by somebody else");
    }
}
