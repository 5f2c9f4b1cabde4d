//! The trajectory function: from an anchor's (G, V, M) and a block number to a place on the disk.
//!
//! Addresses are *block* indices. The volume UUID and the file seed are no inputs, whatever the
//! seed document says: two volumes agree when their geometry, profile, device type tag and anchors
//! agree. [`Space`] holds what belongs to the volume, [`Path`] what belongs to one file, so that
//! the work per address is a handful of operations.
//!
//! Invariant: every function here returns what the reference returns, for all inputs, in 64 bits.
//! Not here: which of the candidates holds the block ([`crate::volume`]).
//= HN4_SPEC 3

use crate::num::{div, low32};
use crate::superblock::Superblock;

/// Offsets between the orbits of a block, before the reduction.
const TRIANGULAR: [u64; 16] = [0, 1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66, 78, 91, 105, 120];
/// Fractal scales from here on have no addresses.
pub const SCALE_LIMIT: u16 = 63;
/// Orbits a writer tries on devices with free random access: k = 0 to this.
pub const MAX_ORBIT: u8 = 12;

const SYSTEM_PROFILE: u32 = 5;

/// The part of the superblock that addresses depend on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Geometry {
    /// Bytes.
    pub capacity: u64,
    /// Bytes in a block.
    pub block_size: u32,
    /// Bytes in a sector; 0 counts as 512.
    pub sector_size: u32,
    /// First sector of the flux region.
    pub lba_flux_start: u64,
    /// Profile number.
    pub profile: u32,
    /// Device type tag.
    pub device_type: u32,
    /// Capability bits of the superblock (0 on every volume that the reference formats).
    pub hw_caps_flags: u64,
}

impl Geometry {
    /// The geometry of a volume on a device with this sector size.
    #[must_use]
    pub fn of(superblock: &Superblock, sector_size: u32) -> Self {
        Self {
            capacity: superblock.total_capacity.get(),
            block_size: superblock.block_size.get(),
            sector_size,
            lba_flux_start: superblock.lba_flux_start.get(),
            profile: superblock.format_profile.get(),
            device_type: superblock.device_type_tag.get(),
            hw_caps_flags: superblock.hw_caps_flags.get(),
        }
    }

    /// Sectors in a block, at least 1.
    #[must_use]
    pub fn sectors_per_block(&self) -> u64 {
        let sector = if self.sector_size == 0 {
            512
        } else {
            self.sector_size
        };
        u64::from(self.block_size / sector).max(1)
    }

    /// Whole blocks in the volume.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        div(self.capacity, u64::from(self.block_size))
    }

    /// True where all orbits below 4 are the same block.
    #[must_use]
    pub fn is_sequential(&self) -> bool {
        matches!(self.device_type & 3, 1..=3)
            || self.hw_caps_flags & 0b101 != 0
            || self.profile == SYSTEM_PROFILE
    }

    /// The highest orbit that a writer tries.
    #[must_use]
    pub fn orbit_limit(&self) -> u8 {
        orbit_limit(self.profile, self.device_type)
    }
}

/// The highest orbit that a writer tries, for a profile number and a device type tag.
#[must_use]
pub fn orbit_limit(profile: u32, device_type: u32) -> u8 {
    const PICO: u32 = 4;
    const USB: u32 = 6;
    if matches!(device_type, 1..=3) || profile == PICO || profile == USB {
        0
    } else {
        MAX_ORBIT
    }
}

/// HN4's pre-swizzle of V ("gravity assist").
#[must_use]
pub fn swizzle(v: u64) -> u64 {
    v.rotate_left(17) ^ 0xA5A5_A5A5_A5A5_A5A5
}

/// Bends `v` away from five small common divisors with `phi`. Not a gcd: earlier primes are not
/// tested again, so the step may still share a divisor with `phi`, and may equal it.
#[must_use]
pub fn adjust(v: u64, phi: u64) -> u64 {
    let mut v = v | 1;
    for prime in [3_u64, 5, 7, 11, 13] {
        if phi.is_multiple_of(prime) && v.is_multiple_of(prime) {
            v = if v > u64::MAX - 2 { 1 } else { v + 2 };
        }
    }
    if phi > 1 && v >= phi {
        v %= phi;
        if v == 0 {
            v = 3;
        }
        v |= 1;
    }
    v
}

/// `a * b mod m`, exact.
fn mul_mod(a: u64, b: u64, m: u64) -> u64 {
    match a.checked_mul(b) {
        Some(product) => product % m,
        None => {
            let rest = u128::from(a) * u128::from(b) % u128::from(m);
            u64::try_from(rest).unwrap_or(0)
        }
    }
}

/// The address space of a volume at one fractal scale.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    scale: u32,
    /// First block, a multiple of the scale's stride.
    first: u64,
    /// Strides in the window: phi.
    strides: u64,
    blocks: u64,
    sequential: bool,
}

impl Space {
    /// The space at scale `m`; `None` where it holds no block.
    #[must_use]
    pub fn new(geometry: &Geometry, m: u16) -> Option<Self> {
        if m >= SCALE_LIMIT {
            return None;
        }
        let stride = 1_u64 << m;
        let blocks = geometry.blocks();
        let flux = geometry.lba_flux_start / geometry.sectors_per_block();
        let first = match flux & (stride - 1) {
            0 => flux,
            // Wraps as in the reference; the comparison below refuses most of it.
            rest => flux.wrapping_add(stride - rest),
        };
        if first >= blocks {
            return None;
        }
        let strides = (blocks - first) >> m;
        let sequential = geometry.is_sequential();
        (strides > 0).then_some(Self {
            scale: u32::from(m),
            first,
            strides,
            blocks,
            sequential,
        })
    }

    /// Number of strides in the window (the specification's phi).
    #[must_use]
    pub fn strides(&self) -> u64 {
        self.strides
    }

    /// First block of the window.
    #[must_use]
    pub fn first_block(&self) -> u64 {
        self.first
    }

    /// True when a block lies before the end of the volume. The function itself may leave it by
    /// less than a stride.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks
    }

    fn theta(&self, k: u8) -> u64 {
        if self.sequential {
            0
        } else if self.strides < 32 {
            u64::from(k) % self.strides
        } else {
            TRIANGULAR[usize::from(k.min(15))] % self.strides
        }
    }
}

/// The orbits of one file: the space, and what of the trajectory does not depend on the block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Path {
    space: Space,
    gravity: u64,
    gravity_low: u64,
    low_mask: u64,
    step: u64,
    far_step: u64,
}

impl Path {
    /// Prepares the trajectory of (G, V) in a space.
    #[must_use]
    pub fn new(space: Space, g: u64, v: u64) -> Self {
        let phi = space.strides;
        let low_mask = (1_u64 << space.scale) - 1;
        Self {
            space,
            gravity: g >> space.scale,
            gravity_low: g & low_mask,
            low_mask,
            step: adjust((v | 1) % phi, phi),
            far_step: adjust((swizzle(v) | 1) % phi, phi),
        }
    }

    /// The block of logical block `n` on orbit `k`. May lie behind the volume by less than a
    /// stride: ask [`Space::contains`].
    #[must_use]
    pub fn block(&self, n: u64, k: u8) -> u64 {
        let phi = self.space.strides;
        let step = if k >= 4 { self.far_step } else { self.step };
        let offset = mul_mod((n >> self.space.scale) % phi, step, phi);
        let sum = self
            .gravity
            .wrapping_add(offset)
            .wrapping_add(self.space.theta(k));
        let stride = sum % phi;
        self.space
            .first
            .wrapping_add(stride << self.space.scale)
            .wrapping_add(n & self.low_mask)
            .wrapping_add(self.gravity_low)
    }

    /// The space that this path lies in.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Logical blocks below `limit` that orbit `k` puts at `block`: the inverse of [`Self::block`].
    /// At most one for each stride where the map is a permutation; up to `MAX_PREIMAGES` otherwise.
    #[must_use]
    pub fn inverse(&self, block: u64, k: u8, limit: u64) -> Vec<u64> {
        let phi = self.space.strides;
        let step = if k >= 4 { self.far_step } else { self.step } % phi;
        let mut found = Vec::new();
        // block = first + t*S + low(N) + low(G): each residue of N gives at most one t.
        let Some(from_first) = block.checked_sub(self.space.first) else {
            return found;
        };
        let Some(from_low) = from_first.checked_sub(self.gravity_low) else {
            return found;
        };
        // t*S + low(N) has one solution, as low(N) < S.
        let (stride, low) = (from_low >> self.space.scale, from_low & self.low_mask);
        if stride >= phi {
            return found;
        }
        let base = self.gravity.wrapping_add(self.space.theta(k)) % phi;
        let wanted = if stride >= base {
            stride - base
        } else {
            stride + (phi - base)
        };
        for cluster in solve(step, wanted, phi) {
            let mut cluster = u128::from(cluster);
            // N >> M counts modulo phi: later laps meet the same block.
            loop {
                let n = (cluster << self.space.scale) + u128::from(low);
                let Some(n) = u64::try_from(n).ok().filter(|&n| n < limit) else {
                    break;
                };
                // The sum wraps at 2^64 before it is reduced: only the forward map decides.
                if self.block(n, k) == block {
                    found.push(n);
                }
                if found.len() >= MAX_PREIMAGES {
                    return found;
                }
                cluster += u128::from(phi);
            }
        }
        found.sort_unstable();
        found
    }
}

/// Bound on the answers of [`Path::inverse`].
pub const MAX_PREIMAGES: usize = 64;

/// All x below `modulus` with `a * x = b (mod modulus)`, at most [`MAX_PREIMAGES`].
fn solve(a: u64, b: u64, modulus: u64) -> Vec<u64> {
    let (gcd, inverse) = extended_gcd(a, modulus);
    if gcd == 0 || !b.is_multiple_of(gcd) {
        return if modulus == 1 { vec![0] } else { Vec::new() };
    }
    let reduced = modulus / gcd;
    let first = if reduced == 1 {
        0
    } else {
        mul_mod(b / gcd % reduced, inverse % reduced, reduced)
    };
    (0..gcd.min(MAX_PREIMAGES as u64))
        .map(|lap| first + lap * reduced)
        .collect()
}

/// The gcd of `a` and `m`, and the inverse of `a/gcd` modulo `m/gcd`.
fn extended_gcd(a: u64, m: u64) -> (u64, u64) {
    let (mut old, mut rest) = (i128::from(a), i128::from(m));
    let (mut old_factor, mut factor) = (1_i128, 0_i128);
    while rest != 0 {
        let quotient = old / rest;
        (old, rest) = (rest, old - quotient * rest);
        (old_factor, factor) = (factor, old_factor - quotient * factor);
    }
    let gcd = u64::try_from(old).unwrap_or(0);
    if gcd == 0 {
        return (0, 0);
    }
    let modulus = i128::from(m / gcd).max(1);
    (
        gcd,
        u64::try_from(old_factor.rem_euclid(modulus)).unwrap_or(0),
    )
}

/// The trajectory function with all its inputs: the block of `n` on orbit `k`, or `None`.
#[must_use]
pub fn trajectory(geometry: &Geometry, g: u64, v: u64, n: u64, m: u16, k: u8) -> Option<u64> {
    Space::new(geometry, m).map(|space| Path::new(space, g, v).block(n, k))
}

/// The 2-bit orbit hint of logical block `n`.
#[must_use]
pub fn hinted_orbit(orbit_hints: u32, n: u64) -> u8 {
    let cluster = low32((n >> 4).min(16));
    if cluster >= 16 {
        return 0;
    }
    crate::num::low8(u64::from((orbit_hints >> (2 * cluster)) & 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            capacity: 128 << 20,
            block_size: 4096,
            sector_size: 512,
            lba_flux_start: 8192,
            profile: 0,
            device_type: 0,
            hw_caps_flags: 0,
        }
    }

    #[test]
    fn scales_without_a_stride_have_no_address() {
        assert_eq!(trajectory(&geometry(), 1, 1, 0, 63, 0), None);
        assert_eq!(trajectory(&geometry(), 1, 1, 0, 40, 0), None);
        assert!(trajectory(&geometry(), 1, 1, 0, 0, 0).is_some());
    }

    #[test]
    fn rotating_devices_have_two_orbits() {
        let hdd = Geometry {
            device_type: 1,
            ..geometry()
        };
        let at = |k| trajectory(&hdd, 77, 991, 5, 0, k);
        assert!((0..4).all(|k| at(k) == at(0)));
        assert!((4..16).all(|k| at(k) == at(4)));
    }

    #[test]
    fn hints_beyond_sixteen_clusters_are_zero() {
        assert_eq!(hinted_orbit(0b10_01, 0), 1);
        assert_eq!(hinted_orbit(0b10_01, 16), 2);
        assert_eq!(hinted_orbit(u32::MAX, 255), 3);
        assert_eq!(hinted_orbit(u32::MAX, 256), 0);
    }
}
