//! Values in job files: sizes, times, numbers and switches, as fio writes them.

use std::str::FromStr;
use std::time::Duration;

/// What a time must be.
pub(super) const DURATION: &str = "a whole number of seconds, or with us, ms, s, m, h or d";

/// Most percentiles: fio has room for so many.
const PERCENTILES_MAX: usize = 20;

/// A number within limits, both included.
pub(super) fn number<T: FromStr + PartialOrd>(text: &str, least: T, most: T) -> Option<T> {
    let value = text.parse().ok()?;
    (value >= least && value <= most).then_some(value)
}

/// `0` or `1`.
pub(super) fn switch(text: &str) -> Option<bool> {
    match text {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    text.split_at(digits)
}

/// A size in bytes. fio's units are powers of 1024, but `ki` and the like are powers of 1000
/// there: those are refused, for nobody means them.
pub(super) fn bytes(text: &str) -> Option<u64> {
    let (digits, unit) = split_unit(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" => 10,
        "m" | "mb" => 20,
        "g" | "gb" => 30,
        "t" | "tb" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A time. Seconds without a unit.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let (digits, unit) = split_unit(text);
    let count: u64 = digits.parse().ok()?;
    let seconds = match unit.to_ascii_lowercase().as_str() {
        "us" | "usec" => return Some(Duration::from_micros(count)),
        "ms" | "msec" => return Some(Duration::from_millis(count)),
        "" | "s" | "sec" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    Some(Duration::from_secs(count.checked_mul(seconds)?))
}

/// Percentiles, ascending.
pub(super) fn percentiles(text: &str) -> Option<Vec<f64>> {
    let mut list = Vec::new();
    for part in text.split(':') {
        list.push(number::<f64>(part.trim(), 0.0, 100.0)?);
    }
    list.sort_by(f64::total_cmp);
    (list.len() <= PERCENTILES_MAX).then_some(list)
}
