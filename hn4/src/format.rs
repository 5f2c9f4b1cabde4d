//! Formatting: from parameters to a plan of discards, writes and flushes.
//!
//! Every check happens before the first operation (defect 2), stale superblocks at the positions of
//! other block sizes are wiped (defect 15), and superblock copies, chronicle and horizon are
//! reserved in the bitmap (defect 1). [`Conduct::ReferenceCompatible`] switches these off.
//! Not here: inheriting from a parent volume ([`crate::wormhole`]).
//= HN4_SPEC 2, 4

use zerocopy::IntoBytes;

use crate::anchor::{ANCHOR_BYTES, Anchor, ROOT_PERMISSIONS};
use crate::bitmap::{ArmouredWord, Bitmap};
use crate::device::{Device, HwFlags, ReadAt};
use crate::epoch_ring::EpochRecord;
use crate::layout::{self, Layout};
use crate::mount::dirty;
use crate::num::{index, low32, round_down, round_up};
use crate::plan::{Data, Faults, Medium, Op, Plan};
use crate::profile::Profile;
use crate::qmask::SILVER_FILL;
use crate::reserve;
use crate::status::{Code, Conduct, Defect, Problem, Region};
use crate::superblock::copies::{self, Cardinal};
use crate::superblock::{
    ENDIAN_TAG, MAGIC, MAGIC_TAIL, MAX_BLOCK_SIZE, Superblock, VERSION, WIPE_WORD, intent, state,
};

/// The label of a volume that was given none.
pub const DEFAULT_LABEL: &str = "HN4_UNNAMED";
const MAX_DISCARD: u64 = 2 << 30;
const MAX_FILL: u64 = 32 << 20;
const ZONES_PER_FLUSH: u64 = 128;
const POISON_PASSES: usize = 3;
const POISON_FILL: u8 = 0xDE;
const PROBED_BLOCK_SIZES: [u64; 3] = [4096, 16384, 65536];

/// Who the new volume is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Identity {
    /// A new one, from two random draws.
    Fresh {
        /// First draw.
        r1: u64,
        /// Second draw.
        r2: u64,
    },
    /// `clone_uuid` and `specific_uuid`: another volume's, verbatim.
    Specific {
        /// Low half.
        lo: u64,
        /// High half.
        hi: u64,
    },
}

impl Identity {
    fn halves(self, now_ns: u64) -> (u64, u64) {
        match self {
            Self::Specific { lo, hi } => (lo, hi),
            // Version 7 and the variant bits, as the reference sets them.
            Self::Fresh { r1, r2 } => {
                let version = (r2 & !0xF000) | 0x7000;
                (r1 ^ now_ns, (version & !(3 << 62)) | 1 << 63)
            }
        }
    }
}

/// What to format, in the seed document's terms.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Params {
    /// Profile number; 8 and above are refused.
    pub profile: u32,
    /// UTF-8, cut at 31 bytes; `None` for the default.
    pub label: Option<String>,
    /// UUID.
    pub identity: Identity,
    /// See [`intent`]; stored verbatim.
    pub mount_intent_flags: u64,
    /// Capacity in bytes; used only with VIRTUAL.
    pub override_capacity_bytes: u64,
    /// Added to the root's permissions.
    pub root_perms_or: u32,
    /// Nanoseconds since 1970.
    pub now_ns: u64,
    /// Whether defects are corrected.
    pub conduct: Conduct,
}

/// What a format would do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Formatted {
    /// The new superblock, or why there is none.
    pub verdict: Result<Superblock, Problem>,
    /// What would be written, in order.
    pub plan: Plan,
    /// Defects of the reference that this format does not share.
    pub corrections: Vec<Defect>,
}

/// Plans a format. `source` is read only to find stale superblocks.
#[must_use]
pub fn format(source: &dyn ReadAt, device: Device, faults: &Faults, params: &Params) -> Formatted {
    let mut medium = Medium::new(source, device, faults);
    let mut corrections = Vec::new();
    let verdict = run(&mut medium, params, None, &mut corrections);
    Formatted {
        verdict,
        plan: medium.into_plan(),
        corrections,
    }
}

/// What a clone changes in the superblock that a format would write.
pub(crate) type Adapt<'f> = &'f dyn Fn(&mut Superblock);

pub(crate) fn run(
    medium: &mut Medium<'_>,
    params: &Params,
    adapt: Option<Adapt<'_>>,
    corrections: &mut Vec<Defect>,
) -> Result<Superblock, Problem> {
    let corrects = params.conduct.corrects();
    let layout = check(&medium.device, params)?;
    let strict = check_strict_flush(&medium.device, params);
    if corrects {
        if strict.is_err() {
            // The reference has discarded the medium before it looks.
            corrections.push(Defect(2));
        }
        strict.clone()?;
        check_mountable(&layout)?;
    }
    let mut superblock = build_superblock(&layout, params);
    if let Some(adapt) = adapt {
        adapt(&mut superblock);
    }
    let writer = Writer {
        params,
        layout,
        superblock,
    };
    writer
        .discard(medium)
        .map_err(|code| failed(code, Region::Device, 0))?;
    strict?;
    writer.regions(medium, corrections)?;
    if corrects {
        writer.wipe_stale(medium, corrections)?;
    }
    writer.superblocks(medium)
}

fn failed(code: Code, region: Region, lba: u64) -> Problem {
    let advice = "check the device; nothing on it can be relied on now: format again";
    Problem::new(
        code,
        (region, lba),
        "a failing operation",
        "success",
        advice,
    )
}

/// All checks that the reference makes before it touches the medium.
fn check(device: &Device, params: &Params) -> Result<Layout, Problem> {
    let at = (Region::Device, 0);
    let Some(profile) = Profile::from_id(params.profile) else {
        let found = format!("profile {}", params.profile);
        let advice = "choose one of the eight profiles";
        return Err(Problem::new(
            Code::InvalidArgument,
            at,
            found,
            "0 to 7",
            advice,
        ));
    };
    let minimum = profile.spec().min_capacity;
    let given = params.override_capacity_bytes;
    if params.mount_intent_flags & intent::VIRTUAL != 0 && given < minimum {
        let found = format!("an override of {given} bytes");
        let expected = format!("{minimum} or more for {}", profile.name());
        let advice = "VIRTUAL needs an override capacity";
        return Err(Problem::new(Code::Geometry, at, found, expected, advice));
    }
    layout::compute(profile, device, params.mount_intent_flags, given)
}

fn check_strict_flush(device: &Device, params: &Params) -> Result<(), Problem> {
    let wormhole = params.mount_intent_flags & intent::WORMHOLE != 0;
    if !wormhole || device.hw_flags.has(HwFlags::STRICT_FLUSH) {
        return Ok(());
    }
    let advice = "use another device, or assert strict flushes if you know it keeps them";
    let expected = "a device whose flushes are kept, for a WORMHOLE volume";
    let found = "a device without STRICT_FLUSH";
    Err(Problem::new(
        Code::HwIo,
        (Region::Device, 0),
        found,
        expected,
        advice,
    ))
}

/// Zones above 64 MiB can be formatted by the reference but never mounted.
fn check_mountable(layout: &Layout) -> Result<(), Problem> {
    if layout.block_size <= u64::from(MAX_BLOCK_SIZE) {
        return Ok(());
    }
    let found = format!("blocks of {} bytes", layout.block_size);
    let advice = "HN4 cannot mount a volume with such zones";
    Err(Problem::new(
        Code::Geometry,
        (Region::Device, 0),
        found,
        "64 MiB at most",
        advice,
    ))
}

fn build_superblock(layout: &Layout, params: &Params) -> Superblock {
    let (uuid_lo, uuid_hi) = params.identity.halves(params.now_ns);
    let lba = |offset: u64| layout.lba(offset).into();
    let mut superblock = Superblock::zeroed();
    superblock.magic = MAGIC.into();
    superblock.version = VERSION.into();
    superblock.block_size = low32(layout.block_size).into();
    superblock.uuid_lo = uuid_lo.into();
    superblock.uuid_hi = uuid_hi.into();
    superblock.lba_epoch_start = lba(layout.epoch);
    superblock.total_capacity = layout.capacity.into();
    superblock.lba_cortex_start = lba(layout.cortex);
    superblock.lba_bitmap_start = lba(layout.bitmap);
    superblock.lba_flux_start = lba(layout.flux);
    superblock.lba_horizon_start = lba(layout.horizon);
    superblock.lba_stream_start = lba(layout.horizon);
    superblock.lba_qmask_start = lba(layout.qmask);
    superblock.current_epoch_id = 1.into();
    superblock.epoch_ring_block_idx = (layout.epoch / layout.block_size).into();
    superblock.copy_generation = 1.into();
    superblock.state_flags = (state::CLEAN | state::METADATA_ZEROED).into();
    superblock.compat_flags = u64::from(params.root_perms_or).into();
    superblock.mount_intent = params.mount_intent_flags.into();
    superblock.last_mount_time = params.now_ns.into();
    superblock.journal_ptr = lba(layout.chronicle);
    superblock.journal_start = lba(layout.chronicle);
    superblock.endian_tag = ENDIAN_TAG.into();
    let label = params.label.as_deref().unwrap_or(DEFAULT_LABEL).as_bytes();
    let length = label.len().min(31);
    superblock.volume_label[..length].copy_from_slice(&label[..length]);
    superblock.format_profile = params.profile.into();
    superblock.device_type_tag = layout.device_type.id().into();
    superblock.generation_ts = params.now_ns.into();
    superblock.magic_tail = MAGIC_TAIL.into();
    superblock
}

struct Writer<'p> {
    params: &'p Params,
    layout: Layout,
    superblock: Superblock,
}

impl Writer<'_> {
    fn problem(&self, region: Region, offset: u64) -> impl Fn(Code) -> Problem {
        let lba = self.layout.lba(offset);
        move |code| failed(code, region, lba)
    }

    fn discard(&self, medium: &mut Medium<'_>) -> Result<(), Code> {
        let device = medium.device;
        let end = self.layout.capacity.min(device.capacity);
        if !device.is_zns() {
            let end = round_down(end, device.sector());
            let mut offset = 0;
            while offset < end {
                let length = MAX_DISCARD.min(end - offset);
                medium.push(Op::Discard { offset, length })?;
                offset += length;
            }
            return Ok(());
        }
        let zone = u64::from(device.zone_size);
        for number in 0..end / zone {
            medium.push(Op::ZoneReset {
                offset: number * zone,
                length: zone,
            })?;
            if number % ZONES_PER_FLUSH == 0 {
                medium.flush()?;
            }
        }
        Ok(())
    }

    /// Fills a byte range, clipped to the device, in pieces.
    fn fill(
        &self,
        medium: &mut Medium<'_>,
        region: Region,
        (start, end): (u64, u64),
        value: u8,
    ) -> Result<(), Problem> {
        let device = medium.device;
        let end = end.min(device.capacity);
        let memory = device.hw_flags.has(HwFlags::NVM) && value == 0;
        let mut offset = start;
        while offset < end {
            let length = if memory {
                end - offset
            } else {
                MAX_FILL.min(end - offset)
            };
            let op = if memory {
                Op::Zero { offset, length }
            } else {
                Op::Write {
                    offset,
                    data: Data::filled(value, length),
                }
            };
            medium.push(op).map_err(self.problem(region, offset))?;
            offset += length;
        }
        Ok(())
    }

    /// Everything but the superblocks.
    fn regions(
        &self,
        medium: &mut Medium<'_>,
        corrections: &mut Vec<Defect>,
    ) -> Result<(), Problem> {
        let layout = &self.layout;
        self.fill(medium, Region::EpochRing, (layout.epoch, layout.cortex), 0)?;
        self.fill(medium, Region::Cortex, (layout.cortex, layout.bitmap), 0)?;
        self.fill(medium, Region::Bitmap, (layout.bitmap, layout.qmask), 0)?;
        self.fill(
            medium,
            Region::Horizon,
            (layout.horizon, layout.chronicle),
            0,
        )?;
        self.fill(
            medium,
            Region::Qmask,
            (layout.qmask, layout.flux),
            SILVER_FILL,
        )?;
        if self.params.conduct.corrects() {
            self.reserve(medium, corrections)?;
            // A discard that does not zero leaves self-consistent old entries behind.
            let chronicle = (layout.chronicle, layout.chronicle_end);
            self.fill(medium, Region::Chronicle, chronicle, 0)?;
        }
        let permissions = ROOT_PERMISSIONS | (self.params.root_perms_or & 0x7F);
        let root = Anchor::root(permissions, self.params.now_ns);
        debug_assert_eq!(root.as_bytes().len() as u64, ANCHOR_BYTES);
        let genesis = EpochRecord::genesis(self.params.now_ns);
        let blocks = [
            (Region::Cortex, layout.cortex, root.as_bytes()),
            (Region::EpochRing, layout.epoch, genesis.as_bytes()),
        ];
        for (region, offset, bytes) in blocks {
            let written = medium.write(offset, Data::padded(bytes, layout.block_size));
            written
                .and_then(|()| medium.flush())
                .map_err(self.problem(region, offset))?;
        }
        Ok(())
    }

    /// Marks what must never hold data (defect 1).
    fn reserve(
        &self,
        medium: &mut Medium<'_>,
        corrections: &mut Vec<Defect>,
    ) -> Result<(), Problem> {
        let layout = &self.layout;
        let zoned = medium.device.is_zns();
        let reserved = reserve::reserved(&self.superblock, layout.sector_size, zoned);
        let mut bitmap = Bitmap::new(layout.capacity / layout.block_size);
        reserve::mark(&mut bitmap, &reserved);
        let mut bytes = bitmap.to_bytes();
        if layout.profile == Profile::Pico {
            // Armoured words, as far as the region reaches: it is too small by half.
            bytes = bytes
                .chunks_exact(8)
                .flat_map(|word| {
                    let word = word
                        .first_chunk()
                        .map_or(0, |word| u64::from_le_bytes(*word));
                    ArmouredWord::new(word).to_bytes()
                })
                .collect();
        }
        let room = (layout.qmask - layout.bitmap).min(medium.device.capacity - layout.bitmap);
        bytes.truncate(index(room));
        let data = Data::padded(&bytes, 0);
        corrections.push(Defect(1));
        medium
            .write(layout.bitmap, data)
            .map_err(self.problem(Region::Bitmap, layout.bitmap))
    }

    /// Overwrites whatever still is a superblock at the positions of any block size (defect 15).
    fn wipe_stale(
        &self,
        medium: &mut Medium<'_>,
        corrections: &mut Vec<Defect>,
    ) -> Result<(), Problem> {
        let device = medium.device;
        let sector = device.sector();
        let mut wiped = Vec::new();
        for size in [sector].into_iter().chain(PROBED_BLOCK_SIZES) {
            if size < sector || size % sector != 0 {
                continue;
            }
            for capacity in [device.capacity, self.layout.capacity] {
                let places = copies::fitting(capacity, size, device.is_zns(), device.capacity);
                for (_, offset) in places.filter(|&(cardinal, _)| cardinal != Cardinal::North) {
                    let stale = crate::superblock::vote::read_copy(medium, offset).is_ok();
                    if stale && !wiped.contains(&offset) {
                        wiped.push(offset);
                    }
                }
            }
        }
        if wiped.is_empty() {
            return Ok(());
        }
        corrections.push(Defect(15));
        for offset in wiped {
            let data = Data::filled(0, round_up(8192, sector));
            let written = medium.push(Op::Write { offset, data });
            written.map_err(self.problem(Region::Superblock, offset))?;
        }
        medium.flush().map_err(self.problem(Region::Superblock, 0))
    }

    fn superblocks(&self, medium: &mut Medium<'_>) -> Result<Superblock, Problem> {
        let device = medium.device;
        let mut superblock = self.superblock.sealed();
        let places: Vec<_> = copies::formatted(
            self.layout.capacity,
            self.layout.block_size,
            device.is_zns(),
            device.capacity,
        )
        .collect();
        let refused = self.problem(Region::Superblock, 0);
        let mut south_lost = false;
        for &(cardinal, offset) in &places {
            let width = copies::copy_bytes(self.layout.block_size);
            let mut written = medium.write(offset, Data::padded(superblock.as_bytes(), width));
            if cardinal == Cardinal::North {
                written = written.and_then(|()| medium.flush());
            }
            match written {
                Ok(()) => {}
                Err(_) if cardinal == Cardinal::South => south_lost = true,
                Err(code) => {
                    self.poison(medium, &places);
                    return Err(refused(code));
                }
            }
        }
        if south_lost {
            superblock.change_state(state::DEGRADED, 0);
            superblock = superblock.sealed();
            for &(_, offset) in places.iter().filter(|(place, _)| *place != Cardinal::South) {
                dirty::write_plain(medium, &superblock, offset).map_err(&refused)?;
            }
        }
        medium.flush().map_err(refused)?;
        Ok(superblock)
    }

    /// Makes copies of a format that failed unreadable.
    fn poison(&self, medium: &mut Medium<'_>, places: &[(Cardinal, u64)]) {
        let width = copies::copy_bytes(self.layout.block_size);
        let mut head = vec![POISON_FILL; index(width)];
        let words = if self.params.conduct.corrects() { 4 } else { 1 };
        for word in head.chunks_exact_mut(4).take(words) {
            word.copy_from_slice(&WIPE_WORD.to_le_bytes());
        }
        if let Some(last) = head.last_chunk_mut() {
            *last = WIPE_WORD.to_le_bytes();
        }
        let crc = crate::crc::crc32(0, &head[..8188]);
        head[8188..8192].copy_from_slice(&crc.to_le_bytes());
        let _ = medium.flush();
        for _ in 0..POISON_PASSES {
            for &(_, offset) in places {
                let _ = medium.write(offset, Data::padded(&head, width));
            }
            let _ = medium.flush();
        }
    }
}
