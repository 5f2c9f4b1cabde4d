//! Format profiles and the device type tag.
//!
//! The reference's tuning numbers for cortex, horizon and journal are not here: it never uses them.
//= HN4_SPEC 10

use crate::device::{Device, HwFlags};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// The purpose a volume is laid out for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Profile {
    /// General use.
    Generic,
    /// Large sequential assets.
    Gaming,
    /// Model weights: 64 MiB blocks.
    Ai,
    /// Cold data on rotating media or tape.
    Archive,
    /// Small devices, 512-byte blocks, nothing cached.
    Pico,
    /// System volumes.
    System,
    /// Removable media.
    Usb,
    /// Very large volumes.
    HyperCloud,
}

/// The numbers of a profile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spec {
    /// Bytes in a block, before sector and zone size are considered.
    pub block_size: u64,
    /// Smallest capacity, bytes.
    pub min_capacity: u64,
    /// Largest capacity, bytes.
    pub max_capacity: u64,
    /// Alignment of the flux region, bytes.
    pub alignment: u64,
}

impl Profile {
    /// All profiles, by their number on disk.
    pub const ALL: [Self; 8] = [
        Self::Generic,
        Self::Gaming,
        Self::Ai,
        Self::Archive,
        Self::Pico,
        Self::System,
        Self::Usb,
        Self::HyperCloud,
    ];

    /// The profile with this number on disk.
    #[must_use]
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|profile| profile.id() == id)
    }

    /// The number on disk.
    #[must_use]
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The name in capitals.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Generic => "GENERIC",
            Self::Gaming => "GAMING",
            Self::Ai => "AI",
            Self::Archive => "ARCHIVE",
            Self::Pico => "PICO",
            Self::System => "SYSTEM",
            Self::Usb => "USB",
            Self::HyperCloud => "HYPER_CLOUD",
        }
    }

    /// The profile with this name, in any case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|profile| profile.name().eq_ignore_ascii_case(name))
    }

    /// The profile's numbers.
    #[must_use]
    pub const fn spec(self) -> Spec {
        // 18 EiB does not fit in 64 bits and wraps to 2^61 in the reference.
        const WRAPPED_MAX: u64 = 1 << 61;
        let (block_size, min_capacity, max_capacity, alignment) = match self {
            Self::Generic | Self::System => (4 * KIB, 128 * MIB, WRAPPED_MAX, 2 * MIB),
            Self::Gaming => (16 * KIB, GIB, 16 * TIB, 64 * KIB),
            Self::Ai => (64 * MIB, TIB, u64::MAX, 64 * MIB),
            Self::Archive => (64 * MIB, 10 * GIB, WRAPPED_MAX, 64 * MIB),
            Self::Pico => (512, MIB, 2 * GIB, 512),
            Self::Usb => (64 * KIB, 128 * MIB, 2 * TIB, 64 * KIB),
            Self::HyperCloud => (64 * KIB, 100 * GIB, u64::MAX, MIB),
        };
        Spec {
            block_size,
            min_capacity,
            max_capacity,
            alignment,
        }
    }
}

/// The device kinds that change addresses. The tag is part of a volume's geometry: a clone keeps
/// its parent's, whatever it lies on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DeviceType {
    /// Random access is free.
    Ssd,
    /// Rotating.
    Hdd,
    /// Zoned.
    Zns,
    /// Tape.
    Tape,
}

impl DeviceType {
    /// The number on disk.
    #[must_use]
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The tag that the reference derives from a device for a profile.
    #[must_use]
    pub fn of(profile: Profile, device: &Device) -> Self {
        if profile == Profile::Archive {
            Self::Tape
        } else if device.is_zns() {
            match profile {
                Profile::Ai | Profile::HyperCloud => Self::Zns,
                _ => Self::Ssd,
            }
        } else if device.hw_flags.has(HwFlags::ROTATIONAL) {
            Self::Hdd
        } else {
            Self::Ssd
        }
    }
}

/// The name of a device type tag as it stands on disk.
#[must_use]
pub fn device_type_name(tag: u32) -> &'static str {
    match tag {
        0 => "SSD",
        1 => "HDD",
        2 => "ZNS",
        3 => "TAPE",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_disk_and_names_lead_back_to_their_profile() {
        for profile in Profile::ALL {
            assert_eq!(Profile::from_id(profile.id()), Some(profile));
            assert_eq!(
                Profile::from_name(&profile.name().to_lowercase()),
                Some(profile)
            );
        }
        assert_eq!(Profile::from_id(8), None);
    }
}
