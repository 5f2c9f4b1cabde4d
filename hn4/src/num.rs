//! Small arithmetic that the format needs in several places.
//!
//! The reference rounds with bit masks, which is right only for powers of two (defect 14). These
//! functions use a real modulo, so they agree with it wherever it is sane.

/// A `u64` as an index. On hosts where it does not fit it becomes an index that no slice has.
#[must_use]
pub fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The low 32 bits.
#[must_use]
pub fn low32(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

/// The low 16 bits.
#[must_use]
pub fn low16(value: u64) -> u16 {
    u16::try_from(value & u64::from(u16::MAX)).unwrap_or(u16::MAX)
}

/// The low byte.
#[must_use]
pub fn low8(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

/// The largest multiple of `unit` that is not above `value`; `unit` 0 leaves the value alone.
#[must_use]
pub fn round_down(value: u64, unit: u64) -> u64 {
    match value.checked_rem(unit) {
        Some(rest) => value - rest,
        None => value,
    }
}

/// The smallest multiple of `unit` that is not below `value`, modulo 2^64 as in the reference.
#[must_use]
pub fn round_up(value: u64, unit: u64) -> u64 {
    match value.checked_rem(unit) {
        None | Some(0) => value,
        Some(rest) => value.wrapping_add(unit - rest),
    }
}

/// `value / unit`, with 0 for a unit of 0.
#[must_use]
pub fn div(value: u64, unit: u64) -> u64 {
    value.checked_div(unit).unwrap_or(0)
}

/// HN4's 64-bit mixer.
//= HN4_SPEC 3.6
#[must_use]
pub fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    h ^ (h >> 33)
}

/// Lower-case hexadecimal text of bytes.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}
