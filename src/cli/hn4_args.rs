//! The command line of the HN4 tools below `hn4ctl volume`.
//!
//! Not here: what they do (`hn4_tools`) and how a device is opened (`hn4_device`).

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use hn4::anchor::Seed;
use hn4::profile::Profile;
use hn4::superblock::intent;

/// What to do with an HN4 volume on a device or image. None needs daemon or configuration; the
/// device must not be in use.
#[derive(Subcommand, Debug)]
pub enum Hn4Command {
    /// Write a new, empty HN4 volume on a device or image file
    Format(FormatArgs),
    /// Give another device the identity and geometry of an HN4 volume (a wormhole), without data
    Clone(CloneArgs),
    /// Check an HN4 volume without changing it: findings by LBA, exit status 4 if there are any
    Verify(VerifyArgs),
    /// List the files of an HN4 volume: seed, bytes, kind, name
    Ls(LookArgs),
    /// Write the bytes of a file to standard output
    Cat(CatArgs),
    /// Show at which LBA a file's block is
    Where(WhereArgs),
    /// Show what is at an LBA: a file's block, an anchor, a region
    Which(WhichArgs),
    /// Show the chronicle, oldest entry first
    Chronicle(ChronicleArgs),
}

/// How to see a device.
#[derive(Args, Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct MediumArgs {
    /// Sector size that the volume counts in [default: what the volume or the device says, or 512]
    #[arg(long, value_name = "BYTES", requires = "device", value_parser = parse_sector)]
    pub sector_bytes: Option<u32>,
    /// The volume is one for zones of this size
    #[arg(long, value_name = "BYTES", requires = "device",
          value_parser = clap::value_parser!(u32).range(4096..=64 << 20))]
    pub zone_bytes: Option<u32>,
    /// Believe that a flush is strict on a device that cannot be judged
    #[arg(long, requires = "device")]
    pub assume_strict_flush: bool,
}

/// A device or image with an HN4 volume, and how to show what is found.
#[derive(Args, Debug)]
pub struct LookArgs {
    /// Block device or image file
    #[arg(long, value_name = "PATH")]
    pub device: PathBuf,
    /// As JSON, one line
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub medium: MediumArgs,
}

/// What `inspect` looks at.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// Name of the volume, as in the configuration: shows its log
    #[arg(required_unless_present = "device", conflicts_with = "device")]
    pub volume: Option<String>,
    /// Block device or image file: shows the HN4 volume on it
    #[arg(long, value_name = "PATH")]
    pub device: Option<PathBuf>,
    /// The HN4 volume as JSON, one line
    #[arg(long, requires = "device", conflicts_with = "volume")]
    pub json: bool,
    #[command(flatten)]
    pub medium: MediumArgs,
}

/// What to format.
#[derive(Args, Debug)]
pub struct FormatArgs {
    #[command(flatten)]
    pub look: LookArgs,
    /// generic, gaming, ai, archive, pico, system, usb or hyper-cloud
    #[arg(long, value_name = "PROFILE", default_value = "generic", value_parser = parse_profile)]
    pub profile: Profile,
    /// Label, at most 31 bytes
    #[arg(long, value_parser = parse_label)]
    pub label: Option<String>,
    /// Another volume's UUID instead of a new one, as `volume inspect` shows it
    #[arg(long, value_name = "UUID", value_parser = parse_uuid)]
    pub specific_uuid: Option<Uuid>,
    /// Mount intent flags to be stored
    #[arg(long, value_name = "FLAGS", value_delimiter = ',')]
    pub mount_intent: Vec<Intent>,
    /// Capacity of the volume where it is not the device's; with --mount-intent virtual
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub override_capacity_bytes: u64,
    /// Permission bits to be added to the root's, hexadecimal
    #[arg(long, value_name = "BITS", default_value = "0", value_parser = parse_bits)]
    pub root_perms_or: u32,
    /// What the device is, where it is not detected: decides the addresses of the volume
    #[arg(long, value_name = "KIND")]
    pub device_type: Option<MediumKind>,
    /// The device holds data, which the volume may replace
    #[arg(long)]
    pub overwrite: bool,
}

/// What to clone.
#[derive(Args, Debug)]
pub struct CloneArgs {
    #[command(flatten)]
    pub look: LookArgs,
    /// Device or image file that becomes the clone
    #[arg(long, value_name = "PATH")]
    pub to: PathBuf,
    /// The clone's label [default: the parent's]
    #[arg(long, value_parser = parse_label)]
    pub label: Option<String>,
    /// The clone will be written for itself: it gets generations that the parent never reaches
    #[arg(long)]
    pub diverge: bool,
    /// Accept a device of another size; the clone keeps the parent's capacity (VIRTUAL)
    #[arg(long)]
    pub override_capacity: bool,
    /// Write nothing to the parent: its chronicle will not tell of the fork
    #[arg(long)]
    pub leave_parent: bool,
    /// The target holds data, which the clone may replace
    #[arg(long)]
    pub overwrite: bool,
    #[command(flatten)]
    pub key: KeyArgs,
}

/// The secret of a chronicle's links.
#[derive(Args, Debug)]
pub struct KeyArgs {
    /// File with the 64 hexadecimal digits that the chronicle's links are keyed with
    #[arg(long, value_name = "FILE")]
    pub link_key: Option<PathBuf>,
}

/// What to check.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    #[command(flatten)]
    pub look: LookArgs,
    #[command(flatten)]
    pub key: KeyArgs,
}

/// Which file.
#[derive(Args, Debug)]
pub struct CatArgs {
    /// The file's seed, hexadecimal, as `volume ls` shows it
    pub seed: Seed,
    /// Block device or image file
    #[arg(long, value_name = "PATH")]
    pub device: PathBuf,
    #[command(flatten)]
    pub medium: MediumArgs,
}

/// Which block.
#[derive(Args, Debug)]
pub struct WhereArgs {
    /// The file's seed, hexadecimal, and the block's number, decimal
    #[arg(value_name = "SEED[:BLOCK]")]
    pub place: String,
    #[command(flatten)]
    pub look: LookArgs,
}

/// Which sector.
#[derive(Args, Debug)]
pub struct WhichArgs {
    /// In sectors of the volume
    pub lba: u64,
    #[command(flatten)]
    pub look: LookArgs,
}

/// How to show the chronicle.
#[derive(Args, Debug)]
pub struct ChronicleArgs {
    /// Check that no entry is missing, moved or changed; exit status 4 if one is
    #[arg(long)]
    pub verify: bool,
    #[command(flatten)]
    pub look: LookArgs,
    #[command(flatten)]
    pub key: KeyArgs,
}

/// A mount intent flag.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intent {
    /// The volume shares its identity on purpose.
    Wormhole,
    /// Mount read-only.
    ReadOnly,
    /// The capacity is not the device's.
    Virtual,
}

impl Intent {
    /// Its bit.
    #[must_use]
    pub const fn bit(self) -> u64 {
        match self {
            Self::Wormhole => intent::WORMHOLE,
            Self::ReadOnly => intent::READ_ONLY,
            Self::Virtual => intent::VIRTUAL,
        }
    }
}

/// What a device is, as far as addresses depend on it.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum MediumKind {
    /// Flash.
    Ssd,
    /// Rotating.
    Hdd,
    /// Memory.
    Nvm,
}

/// The halves of a UUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Uuid {
    /// The first 8 bytes on disk, little endian.
    pub lo: u64,
    /// The last 8.
    pub hi: u64,
}

/// The 16 bytes, or 32, that hexadecimal digits stand for.
pub(super) fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(bytes)
}

fn parse_uuid(text: &str) -> Result<Uuid, String> {
    let bytes: [u8; 16] = parse_hex(&text.replace('-', ""))
        .ok_or("a UUID is 32 hexadecimal digits, as `hn4ctl volume inspect` shows them")?;
    let half = |from: usize| {
        let mut half = [0; 8];
        half.copy_from_slice(&bytes[from..from + 8]);
        u64::from_le_bytes(half)
    };
    Ok(Uuid {
        lo: half(0),
        hi: half(8),
    })
}

fn parse_profile(text: &str) -> Result<Profile, String> {
    Profile::from_name(&text.replace('-', "_")).ok_or_else(|| {
        let names = Profile::ALL.map(|profile| profile.name().to_lowercase().replace('_', "-"));
        format!("the profiles are {}", names.join(", "))
    })
}

fn parse_label(text: &str) -> Result<String, String> {
    match text.len() {
        0..=31 => Ok(text.to_owned()),
        bytes => Err(format!("has {bytes} bytes; HN4 has room for 31")),
    }
}

fn parse_bits(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text.trim_start_matches("0x"), 16)
        .map_err(|_| "give the bits as up to 8 hexadecimal digits".to_owned())
}

fn parse_sector(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|bytes: &u32| bytes.is_power_of_two() && (512..=65536).contains(bytes))
        .ok_or_else(|| "a sector has 512, 1024, ... or 65536 bytes".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_in_the_order_in_which_inspect_shows_it() {
        let parsed = parse_uuid("0102030405060708-090a0b0c0d0e0f10").expect("a UUID");
        assert_eq!(parsed.lo, 0x0807_0605_0403_0201);
        assert_eq!(parsed.hi, 0x100f_0e0d_0c0b_0a09);
        for wrong in ["", "0102", "zz02030405060708090a0b0c0d0e0f10", "é"] {
            assert!(parse_uuid(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn every_profile_can_be_named_as_the_help_does() {
        for profile in Profile::ALL {
            let name = profile.name().to_lowercase().replace('_', "-");
            assert_eq!(parse_profile(&name), Ok(profile));
        }
        assert!(
            parse_profile("tape")
                .expect_err("unknown")
                .contains("hyper-cloud")
        );
    }
}
