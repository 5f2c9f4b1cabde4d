//! Reading golden manifests: numbers stand there as integers or as `0x` text.

use std::path::Path;

use hn4::device::{Device, HwFlags};
use hn4::plan::{Fault, Faults, Op, OpKind, Plan};
use hn4::status::Code;
use serde_json::{Value, json};

use crate::anyhow_lite::{Context, Failure, Result, bail};

pub(crate) fn load(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

pub(crate) fn number(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) => {
            let digits = text.strip_prefix("0x");
            digits
                .map_or_else(|| text.parse(), |digits| u64::from_str_radix(digits, 16))
                .ok()
        }
        other => other.as_u64(),
    }
}

pub(crate) fn u64_of(value: &Value, key: &str) -> Result<u64> {
    number(&value[key]).with_context(|| format!("{key} is no number"))
}

pub(crate) fn u32_of(value: &Value, key: &str) -> Result<u32> {
    Ok(u32::try_from(u64_of(value, key)?)?)
}

pub(crate) fn i32_of(value: &Value, key: &str) -> Result<i32> {
    let number = value[key]
        .as_i64()
        .with_context(|| format!("{key} is no integer"))?;
    Ok(i32::try_from(number)?)
}

pub(crate) fn text_of<'v>(value: &'v Value, key: &str) -> Result<&'v str> {
    value[key]
        .as_str()
        .with_context(|| format!("{key} is no text"))
}

pub(crate) fn list<'v>(value: &'v Value, key: &str) -> &'v [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// The numbers of a row of a table.
pub(crate) fn row(value: &Value) -> Result<Vec<u64>> {
    let cells = value.as_array().context("a row that is no list")?;
    cells
        .iter()
        .map(|cell| number(cell).context("a cell that is no number"))
        .collect()
}

pub(crate) fn bytes_of(hex: &str) -> Result<Vec<u8>> {
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    };
    hex.as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => digit(*high)
                .zip(digit(*low))
                .map(|(high, low)| high << 4 | low),
            _ => None,
        })
        .collect::<Option<_>>()
        .with_context(|| format!("bad hexadecimal {hex}"))
}

pub(crate) fn device(value: &Value) -> Result<Device> {
    Ok(Device {
        capacity: u64_of(value, "capacity")?,
        sector_size: u32_of(value, "sector_size")?,
        zone_size: u32_of(value, "zone_size").unwrap_or(0),
        hw_flags: HwFlags(u64_of(value, "hw_flags").unwrap_or(0)),
        temperature_celsius: i32_of(value, "temperature").unwrap_or(40),
    })
}

fn kind(name: &str) -> Result<OpKind> {
    Ok(match name {
        "READ" => OpKind::Read,
        "WRITE" => OpKind::Write,
        "ZERO" => OpKind::Zero,
        "DISCARD" => OpKind::Discard,
        "ZRESET" | "ZONE_RESET" => OpKind::ZoneReset,
        "FLUSH" => OpKind::Flush,
        other => return bail(format!("unknown operation {other}")),
    })
}

pub(crate) fn faults(case: &Value) -> Result<Faults> {
    let faults = list(case, "faults").iter().map(|fault| {
        let code = Code::from_value(i32_of(fault, "result")?).context("an unknown fault code")?;
        let names = list(fault, "ops")
            .iter()
            .map(|op| kind(op.as_str().unwrap_or_default()));
        Ok(Fault {
            first_lba: u64_of(fault, "lba_from")?,
            end_lba: u64_of(fault, "lba_to")?,
            kinds: names.collect::<Result<_>>()?,
            code,
        })
    });
    faults.collect::<Result<Vec<_>>>().map(Faults)
}

/// A plan as the manifests write it: operations in sectors, runs of equal ones once.
pub(crate) fn trace(plans: &[&Plan], device: &Device) -> Vec<Value> {
    let sector = device.sector();
    let mut trace: Vec<Value> = Vec::new();
    for step in plans.iter().flat_map(|plan| &plan.steps) {
        let (offset, length) = step.op.range();
        let name = match &step.op {
            Op::Write { .. } => "WRITE",
            Op::Zero { .. } => "ZERO",
            Op::Discard { .. } => "DISCARD",
            Op::ZoneReset { .. } => "ZRESET",
            Op::Flush => "FLUSH",
        };
        let mut entry = match step.op {
            Op::Flush => vec![json!(name)],
            _ => vec![json!(name), json!(offset / sector), json!(length / sector)],
        };
        entry.extend(step.fails.map(|code| json!(code.value())));
        let entry = Value::Array(entry);
        if trace.last() != Some(&entry) {
            trace.push(entry);
        }
    }
    trace
}

/// Manifests keep the first 24 operations where there are more.
const TRACE_LIMIT: usize = 24;

pub(crate) fn compare_trace(found: &[Value], expected: &[Value]) -> Result<()> {
    let cut = expected.len() == TRACE_LIMIT && found.len() > TRACE_LIMIT;
    let found = if cut { &found[..TRACE_LIMIT] } else { found };
    if found == expected {
        return Ok(());
    }
    let at = found
        .iter()
        .zip(expected)
        .take_while(|(a, b)| a == b)
        .count();
    let show = |trace: &[Value]| trace.get(at).map_or("nothing".to_owned(), Value::to_string);
    Err(Failure(format!(
        "io {at}: {} instead of {}",
        show(found),
        show(expected)
    )))
}
