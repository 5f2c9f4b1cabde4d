//! Mount assessment: what a mount would do, and why, as a verdict and a plan.
//!
//! The checks run in the order of the reference, so that the first failure is the same. With
//! [`Conduct::Corrected`] a refused mount plans no write at all (defect 2), and the differences
//! that HN4_SPEC 11 asks for apply; each is named in [`Assessment::corrections`].
//! Not here: doing any of it.
//= HN4_SPEC 9

mod checks;
pub(crate) mod dirty;
mod maps;
mod reproject;

use crate::bitmap::Bitmap;
use crate::chronicle::LinkKey;
use crate::device::{Device, HwFlags, ReadAt};
use crate::plan::{Faults, Medium, Plan};
use crate::status::{Code, Conduct, Defect, Problem, Region};
use crate::superblock::vote::{self, Copy};
use crate::superblock::{GENERATION_LIMIT, Superblock, TAINT_BIT, intent, state};

/// A taint from which on a volume is read-only.
const TAINT_LIMIT: u32 = 20;

/// How to mount.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Request {
    /// See [`intent`].
    pub flags: u64,
    /// Nanoseconds since 1970.
    pub now_ns: u64,
    /// Whether defects are corrected.
    pub conduct: Conduct,
    /// Key of the chronicle's links.
    pub key: LinkKey,
}

/// Why a mount is read-only.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    /// It was asked for.
    Requested,
    /// The device is hot: degrees Celsius.
    Hot(i32),
    /// The epoch record and the superblock are from different times.
    Epoch(Problem),
    /// The chronicle's head or its history is wrong.
    Chronicle(Problem),
    /// The state asks for it: the bits that do.
    State(u32),
    /// CLEAN and DIRTY at once.
    Contradiction,
    /// Too much has gone wrong before.
    Tainted(u32),
    /// Features that only readers may ignore.
    ReadOnlyFeatures(u64),
    /// Too few superblock copies could be marked dirty.
    DirtyQuorum {
        /// Copies that took the mark.
        marked: usize,
    },
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Requested => f.write_str("read-only was asked for"),
            Self::Hot(degrees) => write!(f, "the device is hot: {degrees} C, limit 75 C"),
            Self::Epoch(problem) | Self::Chronicle(problem) => write!(f, "{problem}"),
            Self::State(bits) => write!(f, "state flags {bits:#x} forbid writing"),
            Self::Contradiction => f.write_str("the volume claims to be clean and dirty at once"),
            Self::Tainted(taint) => write!(f, "taint {taint}, limit {TAINT_LIMIT}"),
            Self::ReadOnlyFeatures(bits) => write!(f, "unknown read-only features {bits:#x}"),
            Self::DirtyQuorum { marked } => {
                write!(f, "only {marked} superblock copies could be marked dirty")
            }
        }
    }
}

/// A volume as it is in memory after a mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mounted {
    /// The superblock in memory.
    pub superblock: Superblock,
    /// Why it is read-only; empty when it is not.
    pub reasons: Vec<Reason>,
    /// How much went wrong.
    pub taint: u32,
    /// Chronicle entries that were taken in.
    pub healed_entries: u32,
    /// The bitmap, where it was loaded (never for PICO).
    pub bitmap: Option<Bitmap>,
    /// The quality mask, where it was loaded (never for PICO).
    pub qmask: Option<Vec<u8>>,
    /// True when the cortex is cached: small, readable, and not discarded by re-projection.
    pub cortex_cached: bool,
}

impl Mounted {
    /// True when nothing may be written.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        !self.reasons.is_empty()
    }
}

/// What a mount would do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Assessment {
    /// The mounted volume, or why there is none.
    pub verdict: Result<Mounted, Problem>,
    /// What would be written, in order.
    pub plan: Plan,
    /// All superblock copies that were looked at.
    pub copies: Vec<Copy>,
    /// Repairs that are offered but not part of the mount.
    pub repairs: Plan,
    /// Defects of the reference that this assessment does not share.
    pub corrections: Vec<Defect>,
}

/// The work in progress.
struct Mount<'m, 'a> {
    medium: &'m mut Medium<'a>,
    request: Request,
    superblock: Superblock,
    reasons: Vec<Reason>,
    taint: u32,
    healed_entries: u32,
    copies: Vec<Copy>,
    repairs: Plan,
    corrections: Vec<Defect>,
}

/// Assesses a mount of the volume on a device.
#[must_use]
pub fn assess(
    source: &dyn ReadAt,
    device: Device,
    faults: &Faults,
    request: &Request,
) -> Assessment {
    let mut medium = Medium::new(source, device, faults);
    let (verdict, copies, repairs, corrections) = run(&mut medium, request);
    let mut assessment = Assessment {
        verdict,
        plan: medium.into_plan(),
        copies,
        repairs,
        corrections,
    };
    if assessment.verdict.is_err() && request.conduct.corrects() && !assessment.plan.is_empty() {
        assessment.plan = Plan::default();
        assessment.corrections.push(Defect(2));
    }
    assessment.corrections.sort_unstable();
    assessment.corrections.dedup();
    assessment
}

type Outcome = (Result<Mounted, Problem>, Vec<Copy>, Plan, Vec<Defect>);

fn run(medium: &mut Medium<'_>, request: &Request) -> Outcome {
    let mut reasons = Vec::new();
    let degrees = medium.device.temperature_celsius;
    if degrees > 85 {
        let advice = "cool the device";
        let at = (Region::Device, 0);
        let found = format!("{degrees} C");
        let problem = Problem::new(Code::ThermalCritical, at, found, "85 C at most", advice);
        return (Err(problem), Vec::new(), Plan::default(), Vec::new());
    }
    if degrees > 75 {
        reasons.push(Reason::Hot(degrees));
    }
    if request.flags & intent::READ_ONLY != 0 {
        reasons.push(Reason::Requested);
    }
    let winner = match vote::vote(medium, request.conduct) {
        Ok(winner) => winner,
        Err(problem) => return (Err(problem), Vec::new(), Plan::default(), Vec::new()),
    };
    let mut mount = Mount {
        medium,
        request: *request,
        superblock: winner.superblock,
        reasons,
        taint: 0,
        healed_entries: 0,
        copies: winner.copies,
        repairs: Plan::default(),
        corrections: winner.corrections,
    };
    let verdict = mount.finish();
    (verdict, mount.copies, mount.repairs, mount.corrections)
}

impl Mount<'_, '_> {
    fn writable(&self) -> bool {
        self.reasons.is_empty()
    }

    fn corrects(&self) -> bool {
        self.request.conduct.corrects()
    }

    fn at_superblock(&self) -> (Region, u64) {
        (Region::Superblock, 0)
    }

    fn finish(&mut self) -> Result<Mounted, Problem> {
        self.heal_copies();
        if self.superblock.dirty_bits.get() & TAINT_BIT != 0 {
            self.taint = 1;
        }
        if self.writable() && self.superblock.copy_generation.get() >= GENERATION_LIMIT {
            let found = format!("generation {}", self.superblock.copy_generation.get());
            let expected = format!("less than {GENERATION_LIMIT}");
            let advice = "mount read-only, and copy the data to a new volume";
            let at = self.at_superblock();
            return Err(Problem::new(
                Code::VolumeLocked,
                at,
                found,
                expected,
                advice,
            ));
        }
        self.join_intent()?;
        self.check_geometry()?;
        self.check_epoch()?;
        self.check_chronicle();
        self.check_state()?;
        if self.writable() {
            self.mark_dirty();
        }
        self.load()
    }

    fn heal_copies(&mut self) {
        if !self.writable() {
            return;
        }
        let best = self.superblock;
        let elsewhere = best.total_capacity.get() != self.medium.device.capacity;
        if self.corrects() && best.is_virtual() && elsewhere {
            self.corrections.push(Defect(3));
        }
        let sound = vote::heal(self.medium, &best, self.request.conduct);
        if !sound && best.block_size.get() != 0 {
            self.superblock.change_state(state::DEGRADED, 0);
        }
    }

    fn join_intent(&mut self) -> Result<(), Problem> {
        let joined = self.superblock.mount_intent.get() | self.request.flags;
        self.superblock.mount_intent = joined.into();
        let strict = self.medium.device.hw_flags.has(HwFlags::STRICT_FLUSH);
        if self.superblock.is_wormhole() && !strict {
            let found = "a device without STRICT_FLUSH";
            let expected = "a device whose flushes are kept, for a WORMHOLE volume";
            let advice = "use another device, or assert strict flushes if you know it keeps them";
            return Err(Problem::new(
                Code::HwIo,
                (Region::Device, 0),
                found,
                expected,
                advice,
            ));
        }
        Ok(())
    }
}
