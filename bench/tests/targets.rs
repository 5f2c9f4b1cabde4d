//! Short runs on a real file and a real server.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use hn4_bench::compare::servers::find_program;
use hn4_bench::drive::{self, Outcome};
use hn4_bench::job::JobFile;
use hn4_bench::nbd::connect_within;
use hn4_bench::report;
use hn4_bench::target::{NbdUri, Target, TargetSpec};

const SIZE: u64 = 8 << 20;

fn run(text: &str, spec: &TargetSpec, server: Option<u32>) -> Vec<Outcome> {
    let file = JobFile::parse(text).expect("a job file");
    let target = Target::open(spec).expect("the target");
    drive::run(&file.jobs, &target, server).expect("no error")
}

fn raw(folder: &Path) -> TargetSpec {
    let path = folder.join("raw");
    std::fs::write(&path, vec![7; usize::try_from(SIZE).expect("small")]).expect("room");
    TargetSpec::Raw(path)
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

#[test]
fn a_job_with_a_size_does_every_block_once_and_a_flush_after_each_write() {
    let folder = folder();
    let text = "[a]\nrw=write\nbs=64k\nsize=4m\niodepth=4\nfsync=1\n";
    let outcomes = run(text, &raw(folder.path()), None);
    let stats = &outcomes[0].stats[0];
    assert_eq!(stats.write.count(), 64);
    assert_eq!(stats.write.bytes, 4 << 20);
    // Nothing is asked of the last one: the job ends with its bytes.
    assert_eq!(stats.sync.count(), 63);
    assert_eq!(stats.read.count(), 0);
    let bytes = std::fs::read(folder.path().join("raw")).expect("the file");
    let (written, rest) = bytes.split_at(4 << 20);
    assert!(rest.iter().all(|&byte| byte == 7), "beyond the size");
    let untouched = written
        .chunks(4096)
        .filter(|part| part.iter().all(|&byte| byte == 7));
    assert_eq!(untouched.count(), 0);
}

#[test]
fn a_time_based_job_runs_for_its_time_and_threads_are_reported_together() {
    let folder = folder();
    let text = "[a]\nrw=randrw\nbs=4k\niodepth=8\nnumjobs=2\ntime_based\nruntime=200ms\n\
                ramp_time=50ms\ngroup_reporting\n";
    let outcomes = run(text, &raw(folder.path()), Some(std::process::id()));
    assert_eq!(outcomes[0].stats.len(), 1);
    let stats = &outcomes[0].stats[0];
    assert!(stats.elapsed >= Duration::from_millis(200), "{stats:?}");
    assert!(stats.read.count() > 0 && stats.write.count() > 0);
    assert_eq!(stats.per_second().sum::<u64>(), stats.ios());
    assert!(stats.client_us_per_io().is_some_and(|us| us > 0.0));
    assert!(stats.server_us_per_io().is_some());
}

#[test]
fn what_a_job_with_verify_wrote_is_read_back_and_a_flipped_bit_is_found() {
    let folder = folder();
    let spec = raw(folder.path());
    let write = "[a]\nrw=randwrite\nbssplit=4k/70:16k/30\nsize=4m\niodepth=4\nverify=crc32c\n\
                 randseed=5\n";
    let stats = run(write, &spec, None).remove(0).stats.remove(0);
    assert!(stats.verified_bytes > 1 << 20, "{}", stats.verified_bytes);
    let read = "[a]\nrw=read\nbs=4k\nsize=4k\nverify=md5\nrandseed=5\n";
    let whole = "[a]\nrw=write\nbs=4k\nsize=4k\nverify=md5\nrandseed=5\n";
    run(whole, &spec, None);
    run(read, &spec, None);
    let TargetSpec::Raw(path) = &spec else {
        panic!("a raw target");
    };
    let mut bytes = std::fs::read(path).expect("the file");
    bytes[777] ^= 4;
    std::fs::write(path, bytes).expect("room");
    let jobs = JobFile::parse(read).expect("a job file").jobs;
    let target = Target::open(&spec).expect("the target");
    let error = drive::run(&jobs, &target, None).expect_err("a flipped bit");
    assert!(format!("{error:#}").contains("byte 512"), "{error:#}");
}

#[test]
fn a_target_that_is_too_small_is_refused() {
    let folder = folder();
    let file = JobFile::parse("[a]\nrw=read\nsize=1g\n").expect("a job file");
    let target = Target::open(&raw(folder.path())).expect("the target");
    let error = drive::run(&file.jobs, &target, None).expect_err("too small");
    assert!(format!("{error:#}").contains("more than"), "{error:#}");
}

/// A program, or a word that it is missing.
fn tool(name: &str) -> Option<PathBuf> {
    let found = find_program(name);
    if found.is_none() {
        missing(name);
    }
    found
}

/// Tells that something is missing; fails where everything must be there.
fn missing(what: &str) {
    let required = std::env::var_os("HN4_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "{what} is missing, and HN4_REQUIRE_TOOLS=1");
    eprintln!("SKIPPED: {what} is missing");
}

/// Reads and writes of a line of fio's table, which has a count, a sum and a rank for each kind of
/// latency.
fn counts(table: &str, column: &str) -> Vec<u64> {
    let mut lines = table.lines();
    let head = lines.next().expect("a head");
    let names: Vec<&str> = head.split(',').map(str::trim).collect();
    let at = names.iter().position(|name| *name == column);
    let at = at.unwrap_or_else(|| panic!("no column {column} in {head}"));
    let cell = |line: &str| line.split(',').nth(at)?.trim().parse().ok();
    lines.filter_map(cell).collect()
}

#[test]
fn fios_own_program_reads_the_latencies_of_our_report() {
    let Some(program) = tool("fio_jsonplus_clat2csv") else {
        return;
    };
    let folder = folder();
    let text = "[mixed]\nrw=randrw\nbs=4k\nsize=4m\niodepth=4\nrandseed=3\n\
                [reader]\nrw=read\nbs=64k\nsize=1m\n";
    let outcomes = run(text, &raw(folder.path()), None);
    let (json, csv) = (
        folder.path().join("run.json"),
        folder.path().join("run.csv"),
    );
    let report = report::json(&outcomes, "raw:file").to_string();
    std::fs::write(&json, report).expect("room");
    for more in [&[][..], &["--validate"]] {
        let mut command = Command::new(&program);
        command.arg(&json).arg(&csv).args(more);
        let output = command.output().expect("it starts");
        let words = String::from_utf8_lossy(&output.stderr);
        if words.contains("No module named 'six'") {
            // fio's package does not ask for it.
            missing("python3-six, which fio_jsonplus_clat2csv needs,");
            return;
        }
        assert!(output.status.success(), "{command:?}: {words}");
    }
    for (number, outcome) in outcomes.iter().enumerate() {
        let file = folder.path().join(format!("run_job{number}.csv"));
        let table = std::fs::read_to_string(file).expect("a table of each job");
        let stats = &outcome.stats[0];
        let of = |column: &str| counts(&table, column).iter().sum::<u64>();
        assert_eq!(of("read_clat_ns_count"), stats.read.count());
        assert_eq!(of("write_lat_ns_count"), stats.write.count());
        assert_eq!(of("trim_clat_ns_count"), 0);
    }
}

/// The daemon of the same build, which `cargo test --workspace` makes.
fn daemon() -> Option<PathBuf> {
    let own = std::env::current_exe().expect("a program");
    let folder = own.parent().and_then(Path::parent).expect("a build folder");
    let daemon = folder.join("hn4-replicad");
    if !daemon.is_file() {
        missing("hn4-replicad of the same build");
        return None;
    }
    Some(daemon)
}

#[test]
fn a_replicated_volume_takes_a_job_and_its_replica_has_all_of_it() {
    let Some(daemon) = daemon() else {
        return;
    };
    let folder = folder();
    let text = format!(
        "replicated:{}?ack=durable&size_mib=16&overlay_mib=8&log_mib=48&daemon={}",
        folder.path().display(),
        daemon.display()
    );
    let spec: TargetSpec = text.parse().expect("a target");
    let job = "[a]\nrw=randwrite\nbs=4k\nsize=1m\niodepth=4\nfdatasync=4\nverify=crc32c\n";
    let jobs = JobFile::parse(job).expect("a job file").jobs;
    let target = Target::open(&spec).expect("two daemons");
    let outcomes = drive::run(&jobs, &target, target.server_pid()).expect("no error");
    let stats = &outcomes[0].stats[0];
    assert_eq!(stats.write.count(), 256);
    assert!(stats.verified_bytes > 512 << 10, "{}", stats.verified_bytes);
    assert!(stats.server.is_some(), "the primary's CPU time");
    let Target::Replicated(volume) = target else {
        panic!("a replicated target");
    };
    let mut volume = Arc::into_inner(volume).expect("nobody else has it");
    let epochs = volume.settle().expect("the replica has everything");
    // A flush after four writes each, and each seals what came before it.
    assert!(epochs >= 60, "{epochs} epochs on the replica");
}

struct Nbdkit(Child);

impl Drop for Nbdkit {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_nbd_server_is_kept_busy_at_the_depth_of_the_job() {
    let Some(program) = tool("nbdkit") else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("nbd.sock");
    let child = Command::new(program)
        .args(["-f", "--exit-with-parent", "-U"])
        .arg(&socket)
        .args(["memory", "8M"])
        .stdin(Stdio::null())
        .spawn();
    let server = Nbdkit(child.expect("nbdkit starts"));
    let uri: NbdUri = format!("nbd+unix:///?socket={}", socket.display())
        .parse()
        .expect("a URI");
    connect_within(&uri, Duration::from_secs(20), || Ok(())).expect("it serves");
    let spec = TargetSpec::Nbd(uri);
    let text = "[a]\nrw=randrw\nbs=4k\nsize=8m\niodepth=32\nfdatasync=8\n";
    let outcomes = run(text, &spec, Some(server.0.id()));
    let stats = &outcomes[0].stats[0];
    assert_eq!(stats.ios(), SIZE / 4096);
    assert!(stats.sync.count() > 50, "{}", stats.sync.count());
    assert!(stats.server.is_some());
}
