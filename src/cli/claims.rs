//! Making proofs that a block had a content at an epoch, from a node's files.
//!
//! What is read is the ledger, what the log still keeps, and the state tree; the daemon may run. It
//! goes on meanwhile, so what is read at different moments need not fit together: a proof is
//! checked before it is given out, and else made again.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hn4::log::{LogIdentity, RING_START, Superblock};
use hn4::types::{BlockIndex, ChainHash, Epoch};
use hn4_engine::core::recovery::{self, AlignedBlock, Medium};
use hn4_proof::anchor::Anchor;
use hn4_proof::envelope::aggregate::Aggregate;
use hn4_proof::envelope::block::{Base, BlockProof, Claim, EpochTable, RecordBase};
use hn4_proof::envelope::claim::BlockDocument;
use hn4_proof::fold::{InclusionProof, Kind};
use hn4_proof::hash::Digest;
use hn4_proof::leaf::{EpochBuilder, LeafKind, RecordLeaf, RecordProof, piece_of, pieces};
use hn4_proof::ledger::Body;
use hn4_proof::ledger::scan::Records;
use hn4_proof::ledger::verify::Verifier;
use hn4_proof::prover::{Frame, frame_leaves};
use hn4_proof::tree::keeper::{Keeper, Opened};
use hn4_proof::tree::path::BlockPath;
use hn4_proof::tree::{Geometry, zero_node};
use zerocopy::IntoBytes;

use super::run::AnyError;
use super::shade::Shade;
use crate::daemon::proof::medium::LedgerOnDisk;
use crate::divergence::{Found, Run, Source, read_run};

/// The daemon may be in the middle of something so often.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(100);

/// A log that is only read, whoever has it open.
struct LogFile {
    file: File,
    ring_bytes: u64,
}

impl Medium for LogFile {
    fn read(&mut self, offset: u64, blocks: &mut [AlignedBlock]) -> io::Result<()> {
        self.file.read_exact_at(blocks.as_mut_bytes(), offset)
    }

    fn write(&mut self, _: u64, _: &[AlignedBlock]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn size_bytes(&self) -> u64 {
        // The end of a device is its size, too.
        (&self.file).seek(SeekFrom::End(0)).unwrap_or(0)
    }
}

impl Source for LogFile {
    fn read(&mut self, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
        let mut all = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        let in_ring = at % self.ring_bytes;
        let first = usize::try_from(self.ring_bytes - in_ring).unwrap_or(usize::MAX);
        let first = first.min(all.len());
        let (first, rest) = all.split_at_mut(first);
        self.file.read_exact_at(first, RING_START + in_ring)?;
        self.file.read_exact_at(rest, RING_START)?;
        Ok(all)
    }
}

/// Where the files of a volume lie.
pub(super) struct Files {
    pub(super) log: PathBuf,
    pub(super) ledger: PathBuf,
    /// Folder of the state tree.
    pub(super) tree: PathBuf,
}

/// Makes the document that proves what a block was at an epoch.
///
/// # Errors
/// If the files do not hold what is needed; the message says what.
pub(super) fn prove(
    files: &Files,
    block: BlockIndex,
    epoch: Epoch,
) -> Result<BlockDocument, AnyError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match attempt(files, block, epoch) {
            Err(_) if tries < TRIES => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
}

fn attempt(files: &Files, block: BlockIndex, epoch: Epoch) -> Result<BlockDocument, AnyError> {
    let mut log = Log::open(&files.log)?;
    let ledger = Ledger::read(&files.ledger, log.superblock.retained)?;
    let (leaf, base, mut at) = log.base(files, &ledger, block, epoch)?;
    let start = at;
    let mut since = Vec::new();
    while at < epoch {
        at = at.next();
        since.push(log.table(&ledger, at)?);
    }
    let claim = Claim { block, epoch, leaf };
    let proof = BlockProof { base, since };
    let from_state = matches!(proof.base, Base::State { .. });
    let anchors = ledger.part(&files.ledger, from_state, start, epoch)?;
    let volume = log.identity.volume;
    let document = BlockDocument::new(volume, &claim, &proof, anchors);
    // Also those that the part in question enrols, or that are retired since.
    let keys: Vec<_> = ledger.tip.keyring().all().cloned().collect();
    let policy = hn4_proof::ledger::verify::Policy::default();
    document.verify((volume, block, epoch), &keys, policy)?;
    Ok(document)
}

/// The ledger, and what of it is newer than the beginning of the log.
struct Ledger {
    tip: Verifier,
    /// By record.
    anchors: Vec<(u64, Anchor)>,
    states: Vec<(u64, Epoch)>,
}

impl Ledger {
    fn read(path: &Path, from: Epoch) -> Result<Self, AnyError> {
        let medium = LedgerOnDisk::look(path).map_err(|error| in_file(path, &error))?;
        let mut records = Records::new(&medium)?;
        let mut ledger = Self {
            tip: Verifier::new(records.header(), Default::default()),
            anchors: Vec::new(),
            states: Vec::new(),
        };
        // An append that is on its way counts as not there yet.
        while let Some(Ok(record)) = records.next_record()? {
            ledger.tip.push(&record)?;
            let state = match &record.body {
                Body::Anchor(signed) => {
                    if signed.anchor.last >= from {
                        ledger.anchors.push((record.index, signed.anchor.clone()));
                    }
                    signed.anchor.state.map(|state| state.epoch)
                }
                Body::Checkpoint(signed) => {
                    let checkpoint = &signed.checkpoint;
                    checkpoint.root.map(|_| checkpoint.epoch)
                }
                _ => None,
            };
            ledger
                .states
                .extend(state.map(|epoch| (record.index, epoch)));
            if ledger.states.len() > 4096 {
                ledger.states.drain(..2048);
            }
        }
        Ok(ledger)
    }

    fn anchor(&self, epoch: Epoch) -> Result<&(u64, Anchor), AnyError> {
        let mut all = self.anchors.iter();
        let found = all.find(|(_, anchor)| anchor.first <= epoch && epoch <= anchor.last);
        found.ok_or_else(|| format!("epoch {epoch} is not anchored yet, or not any more").into())
    }

    fn state(&self, epoch: Epoch) -> Option<u64> {
        let mut all = self.states.iter().rev();
        all.find(|(_, of)| *of == epoch).map(|(index, _)| *index)
    }

    /// The records that a proof from an epoch to another stands on.
    fn part(
        &self,
        path: &Path,
        from_state: bool,
        from: Epoch,
        to: Epoch,
    ) -> Result<Aggregate, AnyError> {
        let state = self.state(from).filter(|_| from_state);
        let first = self.anchor(from).map(|(index, _)| *index);
        let last = self.anchor(to)?.0;
        let first = first?.min(state.unwrap_or(last));
        let last = last.max(state.unwrap_or(last));
        let medium = LedgerOnDisk::look(path).map_err(|error| in_file(path, &error))?;
        let mut records = Records::new(&medium)?;
        let mut taken = Vec::new();
        while let Some(Ok(record)) = records.next_record()? {
            if record.index >= first {
                taken.push(records.bytes().to_vec());
            }
            if record.index == last {
                break;
            }
        }
        Ok(Aggregate::with_records(&taken)?)
    }
}

fn in_file(path: &Path, error: &dyn std::fmt::Display) -> String {
    format!("{}: {error}", path.display())
}

/// The log as it was a moment ago.
struct Log {
    file: LogFile,
    identity: LogIdentity,
    superblock: Superblock,
    frames: Vec<Found>,
}

impl Log {
    fn open(path: &Path) -> Result<Self, AnyError> {
        let file = File::open(path).map_err(|error| in_file(path, &error))?;
        let mut file = LogFile {
            file,
            ring_bytes: 0,
        };
        let found = recovery::inspect(&mut file);
        let (header, superblock, _) = found.map_err(|error| in_file(path, &error))?;
        file.ring_bytes = header.ring_bytes;
        let from = superblock.retained_offset.0;
        let run = Run {
            from,
            end: from + header.ring_bytes,
            after: Some((superblock.retained, superblock.retained_chain)),
            sure_through: superblock.durable,
        };
        let frames = read_run(&mut file, &header.identity, run)?;
        Ok(Self {
            file,
            identity: header.identity,
            superblock,
            frames,
        })
    }

    fn frame(&mut self, epoch: Epoch) -> Result<Vec<u8>, AnyError> {
        let mut all = self.frames.iter();
        let found = all.find(|found| found.head.header.epoch == epoch);
        let found = found.ok_or_else(|| {
            let retained = self.superblock.retained;
            format!("the log does not hold epoch {epoch}; it begins after epoch {retained}")
        })?;
        let (at, bytes) = (found.at, found.head.header.frame_bytes);
        Ok(Source::read(&mut self.file, at, bytes)?)
    }

    /// The records of an epoch, and the hash of its frame header.
    fn leaves(&mut self, epoch: Epoch) -> Result<(Vec<RecordLeaf>, ChainHash), AnyError> {
        let bytes = self.frame(epoch)?;
        let (head, leaves) = frame_leaves(&self.identity, Frame::Log(&bytes))?;
        Ok((leaves, head.chain))
    }

    /// Proof that an epoch is in its batch, all of which the log must hold.
    fn in_batch(&mut self, ledger: &Ledger, epoch: Epoch) -> Result<InclusionProof, AnyError> {
        let (_, anchor) = ledger.anchor(epoch)?;
        let mut roots: Vec<Digest> = Vec::new();
        let mut at = anchor.first;
        while at <= anchor.last {
            let (leaves, chain) = self.leaves(at)?;
            let mut builder = EpochBuilder::new(at, chain);
            leaves.iter().try_for_each(|leaf| builder.record(leaf))?;
            roots.push(builder.finish().root);
            at = at.next();
        }
        let index = epoch.0 - anchor.first.0;
        let proof = InclusionProof::build(Kind::Epochs, &roots, index);
        Ok(proof.ok_or("an epoch outside its batch")?)
    }

    fn table(&mut self, ledger: &Ledger, epoch: Epoch) -> Result<EpochTable, AnyError> {
        let (records, chain) = self.leaves(epoch)?;
        Ok(EpochTable {
            chain,
            records,
            epoch_in_batch: self.in_batch(ledger, epoch)?,
        })
    }

    /// What the block was at the latest place up to an epoch for which that can be shown.
    fn base(
        &mut self,
        files: &Files,
        ledger: &Ledger,
        block: BlockIndex,
        epoch: Epoch,
    ) -> Result<(Digest, Base, Epoch), AnyError> {
        let checkpoint = self.superblock.checkpoint;
        let mut touching = None;
        for found in &self.frames {
            let of = found.head.header.epoch;
            let touches = |record: &hn4::log::Record| {
                record.lba.0 < block.lba().0 + 8 && block.lba() < record.end()
            };
            if of <= epoch && found.head.records.iter().any(touches) {
                touching = Some(of);
            }
        }
        let newer = touching.filter(|of| *of > checkpoint || checkpoint > epoch);
        if let Some(of) = newer {
            let (leaf, base) = self.record_base(ledger, block, of)?;
            return Ok((leaf, base, of));
        }
        if checkpoint > epoch {
            return Err(format!(
                "the backing is at epoch {checkpoint} already, and the log no longer holds what \
                 wrote the block before epoch {epoch}"
            )
            .into());
        }
        if ledger.state(checkpoint).is_none() {
            return Err(format!(
                "the state at epoch {checkpoint}, which the backing holds, is not in the ledger; \
                 with tree = \"on\" the primary records it within checkpoint_s"
            )
            .into());
        }
        let geometry = Geometry::new(self.identity.size_bytes)?;
        let medium = Shade::new(files.tree.clone());
        let of = (self.identity.volume, geometry);
        let (mut keeper, found) = Keeper::open(medium, of, checkpoint)?;
        if found != Opened::Whole || keeper.settle()?.is_none() {
            return Err("there is no whole state tree (tree = \"on\")".into());
        }
        let path = BlockPath::build(&keeper.view(), block)?;
        let leaf = keeper.leaves(block.0..block.0 + 1)?;
        let leaf = *leaf.first().ok_or("no such block")?;
        let state = Base::State {
            epoch: checkpoint,
            path,
        };
        Ok((leaf, state, checkpoint))
    }

    fn record_base(
        &mut self,
        ledger: &Ledger,
        block: BlockIndex,
        epoch: Epoch,
    ) -> Result<(Digest, Base), AnyError> {
        let bytes = self.frame(epoch)?;
        let (head, leaves) = frame_leaves(&self.identity, Frame::Log(&bytes))?;
        let covering = leaves.iter().position(|leaf| leaf.at.covers(block.lba()));
        let index = covering.ok_or_else(|| {
            format!(
                "epoch {epoch} wrote only a part of the block; what it is since then can be shown \
                 when it is written back and its state recorded"
            )
        })?;
        let (record, found) = (head.records[index], leaves[index]);
        let (leaf, piece) = match found.at.kind {
            LeafKind::Zeroes | LeafKind::Trim => (zero_node(0), None),
            LeafKind::Data => {
                let payload = bytes.get(head.payload_range(&record));
                let pieces = pieces(record.lba, payload.unwrap_or_default());
                let (_, piece) = piece_of(&found.at, block.lba()).ok_or("no such piece")?;
                let leaf = pieces.get(usize::try_from(piece)?);
                let proof = InclusionProof::build(Kind::Pieces, &pieces, piece);
                (*leaf.ok_or("no such piece")?, proof)
            }
        };
        let proof = RecordProof::build(head.chain, &leaves, index);
        let base = RecordBase {
            record: proof.ok_or("a record outside its epoch")?,
            epoch_in_batch: self.in_batch(ledger, epoch)?,
            piece,
        };
        Ok((leaf, Base::Record(Box::new(base))))
    }
}
