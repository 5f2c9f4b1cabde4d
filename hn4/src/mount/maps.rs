//! Loading what a mounted volume keeps in memory: cortex, bitmap, quality mask, root anchor.

use super::{Mount, Mounted, reproject};
use crate::anchor::{ANCHOR_BYTES, Anchor, ROOT_CLASS, ROOT_PERMISSIONS, Seed, class};
use crate::bitmap::Bitmap;
use crate::num::{div, index};
use crate::plan::Data;
use crate::profile::Profile;
use crate::qmask;
use crate::status::{Code, Problem, Region};
use crate::superblock::state;
use zerocopy::IntoBytes;

/// A larger cortex is not cached.
const MAX_CACHED_CORTEX: u64 = 256 << 20;
/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;

impl Mount<'_, '_> {
    /// Steps 17 to 21.
    pub(super) fn load(&mut self) -> Result<Mounted, Problem> {
        let writable = self.writable();
        let pico = self.superblock.format_profile.get() == Profile::Pico.id();
        let mut cortex_cached = !pico && self.can_cache_cortex();
        let (mut bitmap, mut qmask) = (None, None);
        if !pico {
            bitmap = tolerate(self.load_bitmap(), writable)?;
            qmask = tolerate(self.load_qmask(), writable)?;
        }
        let flags = self.superblock.state_flags.get();
        let unsettled = state::DIRTY | state::PANIC | state::DEGRADED | state::UNMOUNTING;
        if flags & unsettled != 0 {
            cortex_cached = false;
            if let Some(bitmap) = &mut bitmap {
                let found = reproject::reproject(self.medium, &self.superblock, bitmap);
                self.taint += u32::from(found > 0);
            }
        }
        self.check_root(writable)?;
        Ok(Mounted {
            superblock: self.superblock,
            reasons: std::mem::take(&mut self.reasons),
            taint: self.taint,
            healed_entries: self.healed_entries,
            bitmap,
            qmask,
            cortex_cached,
        })
    }

    fn blocks(&self) -> u64 {
        let block = u64::from(self.superblock.block_size.get());
        div(self.superblock.total_capacity.get(), block)
    }

    fn can_cache_cortex(&self) -> bool {
        let sector = self.medium.device.sector();
        let start = self.superblock.lba_cortex_start.get() * sector;
        let end = self.superblock.lba_bitmap_start.get() * sector;
        if end - start > MAX_CACHED_CORTEX {
            return false;
        }
        let mut buffer = vec![0; index(CHUNK)];
        let mut offset = start;
        while offset < end {
            let part = index(CHUNK.min(end - offset));
            if self
                .medium
                .read(Region::Cortex, offset, &mut buffer[..part])
                .is_err()
            {
                return false;
            }
            offset += part as u64;
        }
        true
    }

    fn load_map(
        &self,
        region: Region,
        (start, end): (u64, u64),
        bytes: u64,
        code: Code,
    ) -> Result<Vec<u8>, Problem> {
        let sector = self.medium.device.sector();
        let needed = bytes.div_ceil(sector);
        if start.checked_add(needed).is_none_or(|last| last > end) {
            let found = format!("{needed} sectors needed");
            let expected = format!("an end before LBA {end}");
            let advice = "the superblock's layout is wrong; restore it from another copy";
            return Err(Problem::new(code, (region, start), found, expected, advice));
        }
        self.medium
            .read_vec(region, start.saturating_mul(sector), needed * sector)
    }

    fn load_bitmap(&self) -> Result<Bitmap, Problem> {
        let place = (
            self.superblock.lba_bitmap_start.get(),
            self.superblock.lba_qmask_start.get(),
        );
        let bytes = Bitmap::disk_bytes(self.blocks());
        let map = self.load_map(Region::Bitmap, place, bytes, Code::BitmapCorrupt)?;
        Ok(Bitmap::from_bytes(&map, self.blocks()))
    }

    fn load_qmask(&self) -> Result<Vec<u8>, Problem> {
        let place = (
            self.superblock.lba_qmask_start.get(),
            self.superblock.lba_flux_start.get(),
        );
        let bytes = qmask::disk_bytes(self.blocks());
        let mut mask = self.load_map(Region::Qmask, place, bytes, Code::Geometry)?;
        mask.truncate(index(bytes));
        Ok(mask)
    }

    /// Step 21: slot 0 of the cortex.
    fn check_root(&mut self, writable: bool) -> Result<(), Problem> {
        match self.judge_root() {
            Ok(()) => Ok(()),
            Err(_) if !writable => Ok(()),
            Err(problem) if problem.code == Code::HeaderRot => self.rebuild_root(),
            Err(problem) => Err(problem),
        }
    }

    fn root_offset(&self) -> u64 {
        self.superblock
            .lba_cortex_start
            .get()
            .saturating_mul(self.medium.device.sector())
    }

    fn judge_root(&self) -> Result<(), Problem> {
        let sector = self.medium.device.sector();
        let bytes = self
            .medium
            .read_vec(Region::Cortex, self.root_offset(), sector)?;
        let at = (Region::Cortex, self.superblock.lba_cortex_start.get());
        let advice = "restore the cortex from another copy, or mount for writing to rebuild it";
        let root = Anchor::from_bytes(&bytes).unwrap_or(Anchor::zeroed());
        if !root.is_sound() {
            let found = format!("root anchor checksum {:#010x}", root.checksum.get());
            let expected = format!("{:#010x}", root.computed_checksum());
            return Err(Problem::new(Code::HeaderRot, at, found, expected, advice));
        }
        let is_static = root.data_class.get() & 0xF0 == ROOT_CLASS & 0xF0;
        if root.seed() != Seed::ROOT || !root.has_class(class::VALID) || !is_static {
            let found = format!(
                "anchor {} of class {:#x}",
                root.seed(),
                root.data_class.get()
            );
            return Err(Problem::new(
                Code::NotFound,
                at,
                found,
                "the root anchor",
                advice,
            ));
        }
        Ok(())
    }

    /// The reference forgets the permissions that the format was asked for.
    fn rebuild_root(&mut self) -> Result<(), Problem> {
        let block = u64::from(self.superblock.block_size.get());
        let offset = self.root_offset();
        let mut bytes = self.medium.read_vec(Region::Cortex, offset, block)?;
        let root = Anchor::root(ROOT_PERMISSIONS, self.request.now_ns);
        bytes[..index(ANCHOR_BYTES)].copy_from_slice(root.as_bytes());
        let written = self.medium.write(offset, Data::padded(&bytes, block));
        self.superblock.change_state(state::DEGRADED, 0);
        written.and_then(|()| self.medium.flush()).map_err(|code| {
            let at = (Region::Cortex, self.superblock.lba_cortex_start.get());
            Problem::new(
                code,
                at,
                "a failing write",
                "a rewritten root",
                "check the device",
            )
        })
    }
}

/// A writer needs the map; a reader goes on without.
fn tolerate<T>(loaded: Result<T, Problem>, writable: bool) -> Result<Option<T>, Problem> {
    match loaded {
        Ok(map) => Ok(Some(map)),
        Err(_) if !writable => Ok(None),
        Err(problem) => Err(problem),
    }
}
