//! fio as a peer: the same job, its own JSON.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Sample;
use super::servers::find_program;

/// Runs a job file with fio on a file.
pub(crate) fn measure(job: &str, file: &Path, scratch: &Path) -> Result<Sample> {
    let program = find_program("fio").context("fio is not installed")?;
    let path = scratch.join("row.fio");
    let end = if job.ends_with('\n') { "" } else { "\n" };
    let name = file.display();
    let text = format!("{job}{end}ioengine=io_uring\nfilename={name}\n");
    std::fs::write(&path, text)?;
    let output = Command::new(program)
        .arg("--output-format=json")
        .arg(&path)
        .stdin(Stdio::null())
        .output()
        .context("starting fio")?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "fio: {}", words.trim());
    let text = String::from_utf8_lossy(&output.stdout);
    parse(&text).with_context(|| format!("what fio printed: {}", words.trim()))
}

/// Notes may stand before the JSON.
fn parse(text: &str) -> Result<Sample> {
    let start = text.find('{').context("no JSON")?;
    let text = text.get(start..).context("no JSON")?;
    let report: Value = serde_json::from_str(text)?;
    let job = report.pointer("/jobs/0").context("no job")?;
    let number = |path: &str| {
        job.pointer(path)
            .and_then(Value::as_f64)
            .with_context(|| format!("no {path}"))
    };
    let (reads, writes) = (number("/read/total_ios")?, number("/write/total_ios")?);
    ensure!(reads + writes > 0.0, "it did nothing");
    let side = if reads > 0.0 { "read" } else { "write" };
    let busy_us = (number("/usr_cpu")? + number("/sys_cpu")?) / 100.0
        * number(&format!("/{side}/runtime"))?
        * 1e3;
    let p99 = number(&format!("/{side}/clat_ns/percentile/99.000000"));
    Ok(Sample {
        iops: number("/read/iops")? + number("/write/iops")?,
        bytes_per_second: number("/read/bw_bytes")? + number("/write/bw_bytes")?,
        p99_us: p99? / 1e3,
        client_us: Some(busy_us / (reads + writes)),
        server_us: None,
        drain: None,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::drive::Outcome;
    use crate::job::JobFile;
    use crate::report;
    use crate::stats::Stats;

    #[test]
    fn our_own_report_is_read_as_fios_is() {
        let job = JobFile::parse("[a]\nrw=write\n")
            .expect("a job")
            .jobs
            .remove(0);
        let mut stats = Stats::new().expect("stats");
        for _ in 0..100 {
            stats.write.record(Duration::from_micros(50), 4096);
        }
        stats.elapsed = Duration::from_secs(1);
        stats.client.total = Duration::from_millis(10);
        let outcomes = [Outcome {
            job,
            stats: vec![stats],
        }];
        let text = format!("fio: a note\n{}", report::json(&outcomes, "raw:x"));
        let sample = parse(&text).expect("a sample");
        assert!((sample.iops - 100.0).abs() < 1e-6);
        assert!((sample.p99_us - 50.0).abs() < 0.1, "{}", sample.p99_us);
        let client_us = sample.client_us.expect("cpu");
        assert!((client_us - 100.0).abs() < 1e-6, "{client_us}");
        assert!(parse("nothing").is_err());
        assert!(parse("{}").is_err());
    }
}
