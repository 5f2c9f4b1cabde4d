//! A volume opened for reading: its files, their blocks, and what lies where.
//!
//! Opening is a read-only mount: nothing is ever planned here. With [`Conduct::Corrected`] files
//! of several blocks are readable (defect 5) and a block is searched on all orbits when the hint
//! does not lead to it (defect 6); what a read had to correct is part of its answer.
//! Not here: text and JSON ([`crate::tool`]).

pub mod check;
pub mod which;

use crate::address::{Geometry, MAX_ORBIT, Path, Space, hinted_orbit};
use crate::anchor::{Anchor, Seed, class, permission};
use crate::bitmap::{ARMOURED_WORD_BYTES, Bitmap};
use crate::block::{self, BlockHeader, HEADER_BYTES};
use crate::cortex;
use crate::device::{Device, ReadAt};
use crate::mount::{self, Mounted};
use crate::nano;
use crate::num::{index, low32};
use crate::plan::{Faults, Medium};
use crate::profile::Profile;
use crate::status::{Code, Conduct, Defect, Problem, Region};
use crate::superblock::{Superblock, intent};

/// An opened volume.
pub struct Volume<'a> {
    medium: Medium<'a>,
    mounted: Mounted,
    geometry: Geometry,
    conduct: Conduct,
    bitmap: Option<Bitmap>,
}

/// Where a block of a file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Block index on the volume.
    pub block: u64,
    /// First sector.
    pub lba: u64,
    /// Its orbit; `None` in the horizon.
    pub orbit: Option<u8>,
}

/// One block of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Read {
    /// The whole payload area.
    pub payload: Vec<u8>,
    /// Where it is; `None` for a hole.
    pub place: Option<Place>,
    /// Defects of the reference that had to be corrected for it.
    pub corrections: Vec<Defect>,
}

const NO_FAULTS: &Faults = &Faults(Vec::new());

impl<'a> Volume<'a> {
    /// Opens the volume on a device for reading.
    ///
    /// # Errors
    /// Why it cannot be mounted.
    pub fn open(source: &'a dyn ReadAt, device: Device, conduct: Conduct) -> Result<Self, Problem> {
        let request = mount::Request {
            flags: intent::READ_ONLY,
            conduct,
            ..mount::Request::default()
        };
        let mounted = mount::assess(source, device, NO_FAULTS, &request).verdict?;
        let medium = Medium::new(source, device, NO_FAULTS);
        let geometry = Geometry::of(&mounted.superblock, low32(device.sector()));
        let pico = mounted.superblock.format_profile.get() == Profile::Pico.id();
        // The reference does not look at a PICO bitmap when it reads.
        let bitmap = match &mounted.bitmap {
            None if pico && conduct.corrects() => {
                pico_bitmap(&medium, &mounted.superblock, geometry.blocks())
            }
            loaded => loaded.clone(),
        };
        Ok(Self {
            medium,
            mounted,
            geometry,
            conduct,
            bitmap,
        })
    }

    /// The superblock in memory.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.mounted.superblock
    }

    /// The mounted state.
    #[must_use]
    pub fn mounted(&self) -> &Mounted {
        &self.mounted
    }

    /// The bytes of the volume.
    #[must_use]
    pub fn medium(&self) -> &Medium<'a> {
        &self.medium
    }

    /// What addresses depend on.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The allocation bitmap, where there is one.
    #[must_use]
    pub fn bitmap(&self) -> Option<&Bitmap> {
        self.bitmap.as_ref()
    }

    /// Bytes of data in a block.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        u64::from(self.superblock().block_size.get()).saturating_sub(HEADER_BYTES)
    }

    /// All live anchors with their slots, the newest of each seed.
    #[must_use]
    pub fn files(&self) -> Vec<(u64, Anchor)> {
        let mut files: std::collections::BTreeMap<Seed, (u64, Anchor)> =
            std::collections::BTreeMap::new();
        cortex::scan(&self.medium, self.superblock(), |slot, anchor| {
            let known = files.get(&anchor.seed());
            if known.is_none_or(|(_, known)| anchor.is_newer_than(known)) {
                files.insert(anchor.seed(), (slot, *anchor));
            }
            true
        });
        let mut files: Vec<_> = files
            .into_values()
            .filter(|(_, file)| file.is_live())
            .collect();
        files.sort_by_key(|(slot, _)| *slot);
        files
    }

    /// The anchor of a seed.
    ///
    /// # Errors
    /// [`Code::NotFound`], or [`Code::Tombstone`] for a deleted file.
    pub fn find(&self, seed: Seed) -> Result<Anchor, Problem> {
        let found = cortex::find(&self.medium, self.superblock(), seed);
        let at = (Region::Cortex, self.superblock().lba_cortex_start.get());
        let advice = "list the files with ls";
        match found {
            Some((_, anchor)) if anchor.is_live() => Ok(anchor),
            Some(_) => Err(Problem::new(
                Code::Tombstone,
                at,
                "a deleted file",
                seed,
                advice,
            )),
            None => Err(Problem::new(
                Code::NotFound,
                at,
                "no such anchor",
                seed,
                advice,
            )),
        }
    }

    fn place(&self, block: u64, orbit: Option<u8>) -> Place {
        let lba = block.saturating_mul(self.geometry.sectors_per_block());
        Place { block, lba, orbit }
    }

    fn out_of_volume(&self, n: u64) -> Problem {
        let at = (Region::Flux, self.superblock().lba_flux_start.get());
        let advice = "the anchor is wrong: restore the cortex from another copy";
        let found = format!("no address for block {n}");
        Problem::new(Code::Geometry, at, found, "a block of the volume", advice)
    }

    /// The places block `n` may have, the hinted one first.
    fn candidates(&self, anchor: &Anchor, n: u64) -> Vec<Place> {
        let g = anchor.gravity_center.get();
        if anchor.has_class(class::HORIZON) {
            let shift = u32::from(anchor.fractal_scale.get()).min(32);
            let block = g.wrapping_add(n.wrapping_mul(1 << shift));
            let inside = block < self.geometry.blocks();
            return if inside {
                vec![self.place(block, None)]
            } else {
                Vec::new()
            };
        }
        let Some(space) = Space::new(&self.geometry, anchor.fractal_scale.get()) else {
            return Vec::new();
        };
        let path = Path::new(space, g, anchor.v());
        let hint = hinted_orbit(anchor.orbit_hints.get(), n);
        let last = if self.conduct.corrects() {
            MAX_ORBIT
        } else {
            0
        };
        let others = (0..=last).filter(|&k| self.conduct.corrects() && k != hint);
        let mut places: Vec<Place> = Vec::new();
        for k in [hint].into_iter().chain(others) {
            let block = path.block(n, k);
            let known = places.iter().any(|place| place.block == block);
            if space.contains(block) && !known {
                places.push(self.place(block, Some(k)));
            }
        }
        places
    }

    fn is_used(&self, block: u64) -> bool {
        self.bitmap
            .as_ref()
            .is_none_or(|bitmap| bitmap.is_used(block))
    }

    fn header(&self, place: &Place) -> Option<BlockHeader> {
        let mut head = [0; 48];
        let offset = place.block * u64::from(self.geometry.block_size);
        self.medium.read(Region::Flux, offset, &mut head).ok()?;
        BlockHeader::from_bytes(&head)
    }

    /// The place that holds block `n` of a file; `None` for a hole. Corrections are added to
    /// `corrections`.
    fn resident(
        &self,
        anchor: &Anchor,
        n: u64,
        corrections: &mut Vec<Defect>,
    ) -> Result<Option<Place>, Problem> {
        let places = self.candidates(anchor, n);
        let Some(hinted) = places.first() else {
            return Err(self.out_of_volume(n));
        };
        if !self.conduct.corrects() {
            return Ok(self.is_used(hinted.block).then_some(*hinted));
        }
        let claims = |place: &Place| {
            self.is_used(place.block)
                && self
                    .header(place)
                    .is_some_and(|header| header.claims(anchor.seed(), n))
        };
        if claims(hinted) {
            return Ok(Some(*hinted));
        }
        let generation = |place: &Place| {
            self.header(place)
                .map_or(0, |header| header.generation.get())
        };
        let found = places
            .iter()
            .skip(1)
            .filter(|&place| claims(place))
            .max_by_key(|&p| generation(p));
        if found.is_some() || self.is_used(hinted.block) || self.mounted.bitmap.is_none() {
            corrections.push(Defect(6));
        }
        // A used hinted block that nobody claims on any orbit may be this block with a lost header.
        if found.is_none() && self.hinted_is_rotten(hinted) {
            return Ok(Some(*hinted));
        }
        Ok(found.copied())
    }

    /// A used block whose header is not that of any block.
    fn hinted_is_rotten(&self, place: &Place) -> bool {
        self.bitmap.is_some()
            && self.is_used(place.block)
            && self.header(place).is_none_or(|header| {
                header.magic.get() != block::BLOCK_MAGIC
                    || header.header_crc.get() != header.computed_crc()
            })
            && !self.is_reserved(place.block)
    }

    fn is_reserved(&self, block: u64) -> bool {
        let sector = self.medium.device.sector();
        let zoned = self.medium.device.is_zns();
        let reserved = crate::reserve::reserved(self.superblock(), sector, zoned);
        crate::reserve::is_reserved(&reserved, block)
    }

    /// Where block `n` of a file is, or would be read from; `None` for a hole.
    ///
    /// # Errors
    /// [`Code::Geometry`] when the anchor leads out of the volume.
    pub fn locate(&self, anchor: &Anchor, n: u64) -> Result<Option<Place>, Problem> {
        self.resident(anchor, n, &mut Vec::new())
    }

    /// Reads and checks block `n` of a file.
    ///
    /// # Errors
    /// The reference's code for what is wrong with it.
    pub fn read_block(&self, anchor: &Anchor, n: u64) -> Result<Read, Problem> {
        let readable = permission::READ | permission::SOVEREIGN;
        if anchor.permissions.get() & readable == 0 {
            let at = (Region::Cortex, self.superblock().lba_cortex_start.get());
            let advice = "the file's permissions forbid reading";
            let found = format!("permissions {:#x}", anchor.permissions.get());
            return Err(Problem::new(
                Code::AccessDenied,
                at,
                found,
                "READ or SOVEREIGN",
                advice,
            ));
        }
        let mut corrections = Vec::new();
        let Some(place) = self.resident(anchor, n, &mut corrections)? else {
            let payload = vec![0; index(self.payload_bytes())];
            return Ok(Read {
                payload,
                place: None,
                corrections,
            });
        };
        let size = u64::from(self.geometry.block_size);
        let bytes = self
            .medium
            .read_vec(Region::Flux, place.block * size, size)?;
        let payload = block::open(&bytes, anchor, n, place.lba, self.conduct)?;
        let header = BlockHeader::from_bytes(&bytes);
        let newest = u64::from(anchor.write_gen.get());
        if header.is_some_and(|header| header.generation.get() != newest) {
            corrections.push(Defect(5));
        }
        Ok(Read {
            payload,
            place: Some(place),
            corrections,
        })
    }

    /// The sector that holds a nano object.
    ///
    /// # Errors
    /// [`Code::Geometry`] or [`Code::NoSpace`] for an impossible cortex.
    pub fn nano_lba(&self, anchor: &Anchor) -> Result<u64, Problem> {
        let superblock = self.superblock();
        let k = anchor.gravity_center.get();
        if k >= nano::ORBITS {
            let at = (Region::Cortex, superblock.lba_cortex_start.get());
            let advice = "the anchor is wrong: restore the cortex from another copy";
            let expected = format!("less than {}", nano::ORBITS);
            return Err(Problem::new(
                Code::Geometry,
                at,
                format!("nano orbit {k}"),
                expected,
                advice,
            ));
        }
        nano::sector(
            superblock.uuid_lo.get(),
            anchor.seed(),
            k,
            superblock.lba_cortex_start.get(),
            superblock.lba_bitmap_start.get(),
        )
    }

    /// Reads a nano object.
    ///
    /// # Errors
    /// What is wrong with its sector.
    pub fn read_nano(&self, anchor: &Anchor) -> Result<Vec<u8>, Problem> {
        let lba = self.nano_lba(anchor)?;
        let sector = self.medium.device.sector();
        let bytes = self
            .medium
            .read_vec(Region::Cortex, lba.saturating_mul(sector), sector)?;
        nano::open(&bytes, self.superblock().uuid_lo.get(), anchor.seed(), lba)
    }

    /// Hands the bytes of a file to `sink`, block by block, in order. Stops at the first error.
    ///
    /// # Errors
    /// What is wrong with a block. `sink` has received all bytes before it.
    pub fn read_file(
        &self,
        anchor: &Anchor,
        sink: &mut dyn FnMut(&[u8]),
    ) -> Result<Vec<Defect>, Problem> {
        let mut corrections = Vec::new();
        if anchor.has_class(class::NANO) {
            sink(&self.read_nano(anchor)?);
            return Ok(corrections);
        }
        let mut left = anchor.mass.get();
        for n in 0..anchor.logical_blocks(self.payload_bytes()) {
            let read = self.read_block(anchor, n)?;
            let part = index(left).min(read.payload.len());
            sink(&read.payload[..part]);
            left -= part as u64;
            corrections.extend(read.corrections);
        }
        corrections.sort_unstable();
        corrections.dedup();
        Ok(corrections)
    }
}

/// The armoured bitmap of a PICO volume, as far as its region reaches. The rest counts as unknown,
/// which here means that no read may be answered with a hole: no bitmap at all.
fn pico_bitmap(medium: &Medium<'_>, superblock: &Superblock, blocks: u64) -> Option<Bitmap> {
    let sector = medium.device.sector();
    let start = superblock.lba_bitmap_start.get().checked_mul(sector)?;
    let end = superblock.lba_qmask_start.get().checked_mul(sector)?;
    let needed = blocks.div_ceil(64) * ARMOURED_WORD_BYTES;
    let bytes = medium
        .read_vec(Region::Bitmap, start, needed.min(end.checked_sub(start)?))
        .ok()?;
    Some(Bitmap::from_armoured(&bytes, blocks))
}
