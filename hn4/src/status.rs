//! HN4's result codes, and the one error type of the volume format.
//!
//! Every refusal and every finding is a [`Problem`]: it names the region, the LBA, what was found,
//! what was expected and what to do. Not here: who prints it.
//= HN4_SPEC 13

use std::fmt;

macro_rules! codes {
    ($($name:ident = $value:literal, $text:literal;)*) => {
        /// A result code as the reference returns it.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Code { $(#[doc = $text] $name,)* }

        impl Code {
            /// All codes, in the order of their values.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The numeric value, negative for errors.
            #[must_use]
            pub const fn value(self) -> i32 {
                match self { $(Self::$name => $value,)* }
            }

            /// The name without a prefix, as HN4_SPEC 13 writes it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The code that has this value.
            #[must_use]
            pub fn from_value(value: i32) -> Option<Self> {
                Self::ALL.iter().copied().find(|code| code.value() == value)
            }
        }
    };
}

codes! {
    NoSpace = -0x100, "ENOSPC";
    EventHorizon = -0x101, "EVENT_HORIZON";
    GravityCollapse = -0x102, "GRAVITY_COLLAPSE";
    BitmapCorrupt = -0x103, "BITMAP_CORRUPT";
    AlignmentFail = -0x104, "ALIGNMENT_FAIL";
    WipePending = -0x107, "WIPE_PENDING";
    NotFound = -0x200, "NOT_FOUND";
    Tombstone = -0x201, "TOMBSTONE";
    IdMismatch = -0x202, "ID_MISMATCH";
    AccessDenied = -0x300, "ACCESS_DENIED";
    Immutable = -0x301, "IMMUTABLE";
    VolumeLocked = -0x305, "VOLUME_LOCKED";
    AuditFailure = -0x306, "AUDIT_FAILURE";
    HwIo = -0x400, "HW_IO";
    DataRot = -0x401, "DATA_ROT";
    PhantomBlock = -0x403, "PHANTOM_BLOCK";
    DecompressFail = -0x404, "DECOMPRESS_FAIL";
    ThermalCritical = -0x405, "THERMAL_CRITICAL";
    MediaToxic = -0x407, "MEDIA_TOXIC";
    HeaderRot = -0x450, "HEADER_ROT";
    PayloadRot = -0x451, "PAYLOAD_ROT";
    GenerationSkew = -0x500, "GENERATION_SKEW";
    EpochLost = -0x501, "EPOCH_LOST";
    TimeDilation = -0x504, "TIME_DILATION";
    Tampered = -0x505, "TAMPERED";
    BadSuperblock = -0x600, "BAD_SUPERBLOCK";
    VersionIncompat = -0x601, "VERSION_INCOMPAT";
    ProfileMismatch = -0x604, "PROFILE_MISMATCH";
    Geometry = -0x608, "GEOMETRY";
    InvalidArgument = -0x609, "INVALID_ARGUMENT";
    Uninitialized = -0x60A, "UNINITIALIZED";
    Exists = -0x610, "EEXIST";
    AlgorithmUnknown = -0x612, "ALGO_UNKNOWN";
    Busy = -0x615, "BUSY";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where on the volume something is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Region {
    /// The device itself, its capabilities or its limits.
    Device,
    /// A superblock copy.
    Superblock,
    /// The epoch ring.
    EpochRing,
    /// The cortex (D0): anchors and nano sectors.
    Cortex,
    /// The allocation bitmap.
    Bitmap,
    /// The quality mask.
    Qmask,
    /// The space between the quality mask and the flux region.
    Gap,
    /// The flux region (D1): data blocks.
    Flux,
    /// The horizon (D1.5): overflow blocks.
    Horizon,
    /// The chronicle: the audit log.
    Chronicle,
    /// Bytes behind the chronicle that belong to nothing.
    Tail,
}

impl Region {
    /// The word that texts use for the region.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Superblock => "superblock",
            Self::EpochRing => "epoch ring",
            Self::Cortex => "cortex",
            Self::Bitmap => "bitmap",
            Self::Qmask => "qmask",
            Self::Gap => "gap",
            Self::Flux => "flux",
            Self::Horizon => "horizon",
            Self::Chronicle => "chronicle",
            Self::Tail => "tail",
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One thing that is wrong, or was refused: what, where, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{code} in {region} at LBA {lba}: found {found}, expected {expected}; {advice}")]
pub struct Problem {
    /// HN4's code for it.
    pub code: Code,
    /// The region it lies in.
    pub region: Region,
    /// HN4 LBA: in *device* sectors, not in the 512-byte unit of the delta log.
    pub lba: u64,
    /// What is there.
    pub found: String,
    /// What should be there.
    pub expected: String,
    /// The next safe thing to do.
    pub advice: &'static str,
}

impl Problem {
    /// Builds a problem; the texts are made only when something is wrong.
    #[must_use]
    pub fn new(
        code: Code,
        (region, lba): (Region, u64),
        found: impl fmt::Display,
        expected: impl fmt::Display,
        advice: &'static str,
    ) -> Self {
        let (found, expected) = (found.to_string(), expected.to_string());
        Self {
            code,
            region,
            lba,
            found,
            expected,
            advice,
        }
    }
}

/// A defect of the reference implementation, by its number in HN4_SPEC 11. Where this crate does
/// something else than the reference, it says which one is the reason.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Defect(pub u8);

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "defect {}", self.0)
    }
}

/// Whether to act as the reference does, defects included, or as its seed document promises.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Conduct {
    /// Correct what HN4_SPEC 11 lists. What every tool of ours uses.
    #[default]
    Corrected,
    /// Reproduce the reference byte for byte, for comparison with golden data.
    ReferenceCompatible,
}

impl Conduct {
    /// True when defects are corrected.
    #[must_use]
    pub fn corrects(self) -> bool {
        self == Self::Corrected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_found_by_its_value() {
        for &code in Code::ALL {
            assert_eq!(Code::from_value(code.value()), Some(code));
        }
        assert_eq!(Code::from_value(0), None);
    }
}
