//! A disk in memory that does what plans say, and volumes with files on it.

use hn4::address::{Geometry, Path, Space};
use hn4::alloc::{claim, record_orbit};
use hn4::anchor::{ANCHOR_BYTES, Anchor, Seed, class, probe_slots};
use hn4::bitmap::{ArmouredWord, Bitmap};
use hn4::block::seal;
use hn4::cortex;
use hn4::device::{Device, ReadAt};
use hn4::format::{Identity, Params, format};
use hn4::mount::{self, Assessment, Request};
use hn4::num::index;
use hn4::plan::{Faults, Op, Plan};
use hn4::profile::Profile;
use hn4::reserve::reserved;
use hn4::status::Conduct;
use hn4::superblock::Superblock;
use zerocopy::IntoBytes;

pub(crate) const T0: u64 = 1_700_000_000_000_000_000;
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Bytes, and whether discards zero them.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) bytes: Vec<u8>,
    pub(crate) device: Device,
    pub(crate) discard_zeroes: bool,
}

impl Disk {
    pub(crate) fn new(device: Device) -> Self {
        Self {
            bytes: vec![0; index(device.capacity)],
            device,
            discard_zeroes: true,
        }
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let at = index(offset);
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn execute(&mut self, plan: &Plan) {
        for step in plan.steps.iter().filter(|step| step.fails.is_none()) {
            let (offset, length) = step.op.range();
            let range = index(offset)..index(offset + length);
            match &step.op {
                Op::Write { data, .. } => data.copy_to(0, &mut self.bytes[range]),
                Op::Zero { .. } => self.bytes[range].fill(0),
                Op::Discard { .. } | Op::ZoneReset { .. } if self.discard_zeroes => {
                    self.bytes[range].fill(0);
                }
                Op::Discard { .. } | Op::ZoneReset { .. } | Op::Flush => {}
            }
        }
    }

    pub(crate) fn assess(&self, flags: u64, now_ns: u64, conduct: Conduct) -> Assessment {
        let request = Request {
            flags,
            now_ns,
            conduct,
            ..Request::default()
        };
        mount::assess(&self.bytes, self.device, &Faults::default(), &request)
    }

    /// Mounts for writing and executes the plan.
    pub(crate) fn mount(&mut self, now_ns: u64, conduct: Conduct) -> mount::Mounted {
        let assessment = self.assess(0, now_ns, conduct);
        let volume = assessment.verdict.expect("a volume that mounts");
        self.execute(&assessment.plan);
        volume
    }

    pub(crate) fn north(&self) -> Superblock {
        let mut bytes = [0; 8192];
        self.bytes.read_at(0, &mut bytes).expect("a disk of 8 KiB");
        Superblock::from_bytes(&bytes).expect("8 KiB")
    }
}

pub(crate) fn params(profile: Profile, conduct: Conduct) -> Params {
    Params {
        profile: profile.id(),
        label: Some("TEST".to_owned()),
        identity: Identity::Specific {
            lo: 0x1122,
            hi: 0x3344,
        },
        mount_intent_flags: 0,
        override_capacity_bytes: 0,
        root_perms_or: 0,
        now_ns: T0,
        conduct,
    }
}

/// A freshly formatted disk.
pub(crate) fn formatted(device: Device, params: &Params) -> Disk {
    let mut disk = Disk::new(device);
    reformat(&mut disk, params);
    disk
}

pub(crate) fn reformat(disk: &mut Disk, params: &Params) -> Superblock {
    let formatted = format(&disk.bytes, disk.device, &Faults::default(), params);
    let superblock = formatted.verdict.expect("a device that can be formatted");
    disk.execute(&formatted.plan);
    superblock
}

/// Puts files on a formatted disk: anchors, blocks and bitmap, as a writer of this crate would.
pub(crate) struct Writer {
    pub(crate) disk: Disk,
    pub(crate) superblock: Superblock,
    pub(crate) bitmap: Bitmap,
    used_slots: Vec<u64>,
}

impl Writer {
    pub(crate) fn new(disk: Disk) -> Self {
        let superblock = disk.north();
        let sector = disk.device.sector();
        let geometry = Geometry::of(&superblock, disk.device.sector_size);
        let start = index(superblock.lba_bitmap_start.get() * sector);
        let bytes = &disk.bytes[start..];
        let blocks = geometry.blocks();
        let bitmap = if superblock.format_profile.get() == Profile::Pico.id() {
            let end = index(superblock.lba_qmask_start.get() * sector);
            Bitmap::from_armoured(&disk.bytes[start..end], blocks)
        } else {
            Bitmap::from_bytes(&bytes[..index(Bitmap::disk_bytes(blocks))], blocks)
        };
        Self {
            disk,
            superblock,
            bitmap,
            used_slots: vec![0],
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry::of(&self.superblock, self.disk.device.sector_size)
    }

    pub(crate) fn payload_bytes(&self) -> u64 {
        u64::from(self.superblock.block_size.get()) - 48
    }

    /// Writes a file of whole blocks; returns its anchor and where each block went. `None` where an
    /// orbit's every place is taken.
    pub(crate) fn file(
        &mut self,
        seed: Seed,
        (g, v, m): (u64, u64, u16),
        blocks: &[Vec<u8>],
    ) -> Option<(Anchor, Vec<(u8, u64)>)> {
        let geometry = self.geometry();
        let path = Path::new(Space::new(&geometry, m)?, g, v);
        let reserved = reserved(&self.superblock, self.disk.device.sector(), false);
        let mut anchor = Anchor::zeroed();
        (anchor.seed_lo, anchor.seed_hi) = (seed.lo.into(), seed.hi.into());
        anchor.gravity_center = g.into();
        anchor.set_v(v);
        anchor.fractal_scale = m.into();
        anchor.permissions = 7.into();
        anchor.data_class = class::VALID.into();
        anchor.write_gen = 1.into();
        anchor.mass = (blocks.len() as u64 * self.payload_bytes()).into();
        let mut places = Vec::new();
        for (n, data) in (0_u64..).zip(blocks) {
            let limit = geometry.orbit_limit();
            let (k, block) = claim(&path, n, limit, &mut self.bitmap, &reserved)?;
            let size = self.superblock.block_size.get();
            let sealed = seal(seed, n, 1, data, size).expect("a payload that fits");
            self.disk.write(block * u64::from(size), &sealed);
            record_orbit(&mut anchor, n, k);
            places.push((k, block));
        }
        self.anchor(anchor.sealed());
        Some((anchor.sealed(), places))
    }

    fn anchor(&mut self, anchor: Anchor) {
        let sector = self.disk.device.sector();
        let slots = cortex::slots(&self.superblock, sector);
        let free = probe_slots(anchor.seed(), slots).find(|slot| !self.used_slots.contains(slot));
        let slot = free.expect("a cortex with room");
        self.used_slots.push(slot);
        let start = self.superblock.lba_cortex_start.get() * sector;
        self.disk
            .write(start + slot * ANCHOR_BYTES, anchor.as_bytes());
    }

    /// Writes the bitmap and returns the disk. A PICO bitmap is cut where its region ends.
    pub(crate) fn finish(mut self) -> Disk {
        let sector = self.disk.device.sector();
        let start = self.superblock.lba_bitmap_start.get() * sector;
        let mut bytes = self.bitmap.to_bytes();
        if self.superblock.format_profile.get() == Profile::Pico.id() {
            let words = bytes
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()));
            bytes = words
                .flat_map(|word| ArmouredWord::new(word).to_bytes())
                .collect();
            let room = self.superblock.lba_qmask_start.get() * sector - start;
            bytes.truncate(index(room));
        }
        self.disk.write(start, &bytes);
        self.disk
    }
}
