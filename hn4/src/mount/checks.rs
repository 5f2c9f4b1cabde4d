//! The checks of a mount that read: geometry, epoch, chronicle, state.

use super::{Mount, Reason, TAINT_LIMIT};
use crate::chronicle::{Bounds, verify};
use crate::epoch_ring::{self, EpochRecord, RECORD_BYTES, Verdict};
use crate::layout::EPOCH_RING_BYTES;
use crate::num::round_up;
use crate::plan::{Data, Op, Step};
use crate::status::{Code, Defect, Problem, Region};
use crate::superblock::{MAX_BLOCK_SIZE, state};
use zerocopy::{FromBytes, IntoBytes};

const MIN_MOUNT_CAPACITY: u64 = 2 << 20;
const TAINT_OF_TAMPERING: u32 = 21;
const TAINT_OF_DILATION: u32 = 10;

impl Mount<'_, '_> {
    fn geometry<T>(
        &self,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Result<T, Problem> {
        let advice = "attach the volume to a device of the size and sector size of its format";
        Err(Problem::new(
            Code::Geometry,
            self.at_superblock(),
            found,
            expected,
            advice,
        ))
    }

    /// Step 7 and 8.
    pub(super) fn check_geometry(&self) -> Result<(), Problem> {
        let superblock = &self.superblock;
        let sector = self.medium.device.sector();
        let capacity = superblock.total_capacity.get();
        let block = superblock.block_size.get();
        if !superblock.is_virtual() && capacity > self.medium.device.capacity {
            let found = format!("a capacity of {capacity} bytes");
            let expected = format!("{} at most", self.medium.device.capacity);
            return self.geometry(found, expected);
        }
        if capacity < MIN_MOUNT_CAPACITY {
            return self.geometry(format!("a capacity of {capacity} bytes"), "2 MiB or more");
        }
        if block == 0 || block > MAX_BLOCK_SIZE {
            return self.geometry(format!("blocks of {block} bytes"), "1 byte to 64 MiB");
        }
        let starts = [
            ("epoch ring", superblock.lba_epoch_start.get()),
            ("cortex", superblock.lba_cortex_start.get()),
            ("bitmap", superblock.lba_bitmap_start.get()),
            ("qmask", superblock.lba_qmask_start.get()),
            ("flux", superblock.lba_flux_start.get()),
            ("horizon", superblock.lba_horizon_start.get()),
        ];
        for (name, lba) in starts {
            let outside = lba
                .checked_mul(sector)
                .is_none_or(|offset| offset >= capacity);
            if lba != 0 && outside {
                return self.geometry(format!("{name} at LBA {lba}"), "a place in the volume");
            }
        }
        for pair in starts[..4].windows(2) {
            if let [(before, first), (name, second)] = pair
                && first >= second
            {
                let found = format!("{name} at LBA {second}");
                return self.geometry(found, format!("behind the {before} at LBA {first}"));
            }
        }
        let blocks = capacity.div_ceil(u64::from(block));
        let pointer = superblock.epoch_ring_block_idx.get();
        if pointer >= blocks {
            let advice = "restore the superblock from another copy";
            let found = format!("epoch ring pointer {pointer}");
            let expected = format!("less than {blocks}");
            let at = self.at_superblock();
            return Err(Problem::new(Code::DataRot, at, found, expected, advice));
        }
        Ok(())
    }

    fn read_epoch(&self) -> Result<(u64, EpochRecord), Problem> {
        let superblock = &self.superblock;
        let sector = self.medium.device.sector();
        let block = u64::from(superblock.block_size.get());
        let capacity = superblock.total_capacity.get();
        let spb = block / sector;
        if block < RECORD_BYTES || spb == 0 {
            return self.geometry(format!("blocks of {block} bytes"), "128 bytes and a sector");
        }
        let start = superblock.lba_epoch_start.get();
        // The bound uses 1 MiB for every profile, as the reference's does.
        let ring_end = start / spb + round_up(EPOCH_RING_BYTES, block) / block;
        if ring_end > capacity / block {
            return self.geometry(
                format!("an epoch ring to block {ring_end}"),
                capacity / block,
            );
        }
        let pointer = superblock.epoch_ring_block_idx.get();
        let Some(offset) = pointer
            .checked_mul(block)
            .filter(|&offset| offset < capacity)
        else {
            return self.geometry(format!("epoch pointer {pointer}"), "a block of the volume");
        };
        if !start.is_multiple_of(spb) {
            let advice = "attach the volume to a device with the sector size of its format";
            let found = format!("an epoch ring at LBA {start}");
            let expected = format!("a multiple of {spb} sectors");
            let at = self.at_superblock();
            return Err(Problem::new(
                Code::AlignmentFail,
                at,
                found,
                expected,
                advice,
            ));
        }
        let bytes =
            self.medium
                .read_vec(Region::EpochRing, offset, round_up(RECORD_BYTES, sector))?;
        match EpochRecord::read_from_prefix(&bytes) {
            Ok((record, _)) => Ok((offset, record)),
            Err(_) => self.geometry(format!("{} bytes", bytes.len()), "an epoch record"),
        }
    }

    /// Step 9.
    pub(super) fn check_epoch(&mut self) -> Result<(), Problem> {
        let (offset, record) = self.read_epoch()?;
        let expected = self.superblock.current_epoch_id.get();
        let at = (Region::EpochRing, offset / self.medium.device.sector());
        if !record.is_sound() {
            self.lost_epoch(offset, &record, at);
            return Ok(());
        }
        let disk = record.epoch_id.get();
        let advice = "the superblock and the epoch ring are from different times: \
                      restore both from one copy";
        let problem = |code| {
            Problem::new(
                code,
                at,
                format!("epoch {disk}"),
                format!("epoch {expected}"),
                advice,
            )
        };
        match epoch_ring::compare(disk, expected) {
            Verdict::Current => {}
            Verdict::Ahead(_) => {
                self.taint += TAINT_OF_DILATION;
                self.reasons
                    .push(Reason::Epoch(problem(Code::TimeDilation)));
            }
            Verdict::Behind(_) => {
                self.reasons
                    .push(Reason::Epoch(problem(Code::GenerationSkew)));
            }
            Verdict::Toxic { .. } => return Err(problem(Code::MediaToxic)),
        }
        Ok(())
    }

    fn lost_epoch(&mut self, offset: u64, record: &EpochRecord, at: (Region, u64)) {
        let found = format!("checksum {:#010x}", record.epoch_crc.get());
        let expected = format!("{:#010x}", record.computed_crc());
        let signature = record.has_reference_signature(self.superblock.current_epoch_id.get());
        let mut advice = "restore the epoch ring together with its superblock from another copy";
        if self.corrects() && signature {
            // Defect 4: all is right but the checksum that the reference forgets. No panic; the
            // record is offered for repair.
            advice = "the reference unmounted this volume; repair writes the missing checksum";
            self.corrections.push(Defect(4));
            let sealed = record.sealed();
            let sector = self.medium.device.sector();
            let data = Data::padded(sealed.as_bytes(), round_up(RECORD_BYTES, sector));
            let write = Op::Write { offset, data };
            self.repairs
                .steps
                .extend([write, Op::Flush].map(|op| Step { op, fails: None }));
        } else {
            self.superblock.change_state(state::PANIC, 0);
        }
        let problem = Problem::new(Code::EpochLost, at, found, expected, advice);
        self.reasons.push(Reason::Epoch(problem));
    }

    /// Steps 10 and 11. Never fails the mount.
    pub(super) fn check_chronicle(&mut self) {
        if !self.writable() {
            return;
        }
        let bounds = Bounds::of(&self.superblock, self.medium.device.sector());
        let head = self.superblock.journal_ptr.get();
        if !(bounds.start..bounds.mount_end).contains(&head) {
            self.superblock.change_state(state::PANIC, 0);
            let advice = "heal the superblock from another copy";
            let expected = format!("a head from {} to {}", bounds.start, bounds.mount_end);
            let at = (Region::Chronicle, head);
            let problem = Problem::new(Code::BadSuperblock, at, head, expected, advice);
            self.reasons.push(Reason::Chronicle(problem));
        }
        if head < bounds.start {
            return;
        }
        if head == bounds.start && !self.corrects() {
            self.superblock.last_journal_seq = 0.into();
            return;
        }
        let mut superblock = self.superblock;
        let checked = verify::verify(
            self.medium,
            &mut superblock,
            self.request.conduct,
            &self.request.key,
        );
        if self.corrects() {
            self.note_chronicle_corrections(&checked, superblock.last_journal_seq.get());
        }
        self.superblock = superblock;
        match checked {
            Ok(report) => self.healed_entries = report.healed_entries,
            Err(problem) => {
                self.superblock.change_state(state::PANIC, 0);
                self.taint = TAINT_OF_TAMPERING;
                self.reasons.push(Reason::Chronicle(problem));
            }
        }
    }

    /// Asks what the reference would have said, on a medium of its own.
    fn note_chronicle_corrections(
        &mut self,
        ours: &Result<verify::Report, Problem>,
        our_sequence: u64,
    ) {
        use crate::plan::Medium;
        use crate::status::Conduct::ReferenceCompatible;
        let mut superblock = self.superblock;
        let mut other = Medium::beside(self.medium);
        let start = superblock.journal_start.get();
        let theirs = if superblock.journal_ptr.get() == start {
            superblock.last_journal_seq = 0.into();
            Ok(verify::Report::default())
        } else {
            verify::verify(
                &mut other,
                &mut superblock,
                ReferenceCompatible,
                &self.request.key,
            )
        };
        let healed = |report: &Result<verify::Report, Problem>| {
            report.as_ref().map(|report| report.healed_entries).ok()
        };
        if healed(ours) != healed(&theirs) || superblock.last_journal_seq.get() != our_sequence {
            self.corrections.push(Defect(13));
        }
    }

    /// Steps 12 to 15.
    pub(super) fn check_state(&mut self) -> Result<(), Problem> {
        let flags = self.superblock.state_flags.get();
        let refuse = |code, found: String, expected: &str, advice| {
            Err(Problem::new(
                code,
                (Region::Superblock, 0),
                found,
                expected,
                advice,
            ))
        };
        if flags & state::NEEDS_UPGRADE != 0 {
            self.reasons.push(Reason::State(state::NEEDS_UPGRADE));
        }
        let bad = flags & (state::PANIC | state::TOXIC | state::LOCKED | state::PENDING_WIPE);
        if bad == state::PENDING_WIPE {
            let advice = "the volume is to be wiped; format it, or clear the flag";
            return refuse(
                Code::WipePending,
                "PENDING_WIPE".to_owned(),
                "no such flag",
                advice,
            );
        }
        if bad == state::LOCKED || bad == state::LOCKED | state::PENDING_WIPE {
            let advice = "find out who locked the volume and why";
            return refuse(
                Code::VolumeLocked,
                "LOCKED".to_owned(),
                "no such flag",
                advice,
            );
        }
        if bad != 0 {
            self.reasons.push(Reason::State(bad));
        }
        let incompatible = self.superblock.incompat_flags.get();
        if incompatible != 0 {
            let advice = "use a newer release";
            let found = format!("features {incompatible:#x}");
            return refuse(Code::VersionIncompat, found, "none", advice);
        }
        if flags & state::METADATA_ZEROED == 0 {
            let advice = "format did not finish; format again";
            let found = format!("state {flags:#x}");
            return refuse(Code::Uninitialized, found, "METADATA_ZEROED", advice);
        }
        let flags = if flags & state::UNMOUNTING != 0 {
            flags | state::DIRTY
        } else {
            flags
        };
        if flags & state::CLEAN != 0 && flags & state::DIRTY != 0 {
            self.taint += 1;
            self.reasons.push(Reason::Contradiction);
        }
        if self.taint >= TAINT_LIMIT {
            self.reasons.push(Reason::Tainted(self.taint));
        }
        let features = self.superblock.ro_compat_flags.get();
        if features != 0 {
            self.reasons.push(Reason::ReadOnlyFeatures(features));
        }
        Ok(())
    }
}
