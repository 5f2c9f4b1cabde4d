//! What a job file may say, and what it is told.

use super::*;

const FULL: &str = "; a comment
[global]
ioengine=libaio
direct=1
runtime=30
time_based

[mixed]
rw=randrw
bs=8k
size=1g
iodepth=32
numjobs=4
rwmixread=70
fdatasync=16
ramp_time=500ms
randseed=7
group_reporting
percentile_list=99:50:99.9
filename=/dev/null

# another
[second]
rw=write
bs=1M
size=50%
runtime=2m
";

#[test]
fn every_key_of_the_subset_reaches_the_job() {
    let file = JobFile::parse(FULL).expect("a good file");
    let [mixed, second] = &file.jobs[..] else {
        panic!("two jobs: {file:?}");
    };
    assert_eq!(mixed.name, "mixed");
    assert_eq!(
        mixed.direction,
        Direction {
            random: true,
            reads: true,
            writes: true
        }
    );
    assert_eq!(
        (mixed.block_bytes, mixed.depth, mixed.numjobs),
        (8192, 32, 4)
    );
    assert_eq!(mixed.size, Size::Bytes(1 << 30));
    assert_eq!(mixed.read_percent, 70);
    assert_eq!((mixed.flush_every, mixed.data_only), (16, true));
    assert_eq!(mixed.ramp, Duration::from_millis(500));
    assert_eq!(mixed.runtime, Some(Duration::from_secs(30)));
    assert!(mixed.time_based && mixed.group);
    assert_eq!(mixed.seed, 7);
    assert_eq!(mixed.percentiles, [50.0, 99.0, 99.9]);
    assert_eq!(second.size, Size::Percent(50));
    assert_eq!(second.block_bytes, 1 << 20);
    assert_eq!(second.runtime, Some(Duration::from_secs(120)));
    assert!(second.time_based && !second.group && second.depth == 1);
}

#[test]
fn a_key_without_effect_leaves_a_note_with_its_line() {
    let notes = JobFile::parse(FULL).expect("a good file").notes;
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes[0].starts_with("line 3: ioengine"), "{notes:?}");
    assert!(notes[1].starts_with("line 20: filename"), "{notes:?}");
}

#[test]
fn an_unknown_key_is_an_error_that_names_the_line() {
    let error = JobFile::parse("[a]\nrw=read\nfrobnicate=1\n").expect_err("unknown");
    assert_eq!(
        error,
        JobError::UnknownKey {
            line: 3,
            key: "frobnicate".to_owned()
        }
    );
    assert!(error.to_string().starts_with("line 3: \"frobnicate\""));
}

#[test]
fn what_fio_can_do_and_this_cannot_is_refused_by_name() {
    for line in [
        "direct=0",
        "stonewall",
        "rate=1m",
        "random_distribution=pareto:0.2",
    ] {
        let error = JobFile::parse(&format!("[a]\n{line}\n")).expect_err(line);
        let text = error.to_string();
        assert!(text.starts_with("line 2: "), "{text}");
        assert!(text.contains("is not supported yet"), "{text}");
    }
}

#[test]
fn the_shape_of_requests_reaches_the_job() {
    let text = "[a]\nbssplit=4k/90:64k/10,8k/100\nrandom_distribution=zoned:60/10:40/90\n\
                rate_iops=1000,0\nthinktime=250\nthinktime_blocks=4\nverify=md5\n";
    let job = JobFile::parse(text).expect("a good file").jobs.remove(0);
    let portion = |bytes, percent| Portion { bytes, percent };
    assert_eq!(job.lengths.reads, [portion(4096, 90), portion(65536, 10)]);
    assert_eq!(job.lengths.writes, [portion(8192, 100)]);
    assert_eq!((job.block_bytes, job.lengths.shortest()), (65536, 4096));
    let zone = |access, size| Zone { access, size };
    let zones = vec![zone(60, 10), zone(40, 90)];
    assert_eq!(job.distribution, Distribution::Zoned(zones));
    assert_eq!(job.rate_iops, [1000, 0]);
    assert_eq!(job.think, Duration::from_micros(250));
    assert_eq!((job.think_blocks, job.verify), (4, true));
    let zipf = JobFile::parse("[a]\nbs=4k,16k\nrandom_distribution=zipf:1.2\n");
    let zipf = zipf.expect("a good file").jobs.remove(0);
    assert_eq!(zipf.distribution, Distribution::Zipf(1.2));
    assert_eq!(zipf.lengths.writes, [portion(16384, 100)]);
}

#[test]
fn wrong_values_are_errors_that_name_line_and_key() {
    for line in [
        "bs=4ki",
        "bs=0",
        "bs=100",
        "bs=8m",
        "bs=4k,8k,16k",
        "bs",
        "bssplit=4k/50:8k/49",
        "bssplit=4k",
        "random_distribution=zipf:1.0",
        "random_distribution=zoned:50/50",
        "rate_iops=x",
        "thinktime=-1",
        "verify=sure",
        "size=0",
        "size=101%",
        "size=99999999999999t",
        "iodepth=0",
        "iodepth=1025",
        "iodepth=-1",
        "numjobs=257",
        "rwmixread=101",
        "runtime=1.5",
        "runtime=99999999999999999d",
        "ramp_time=5y",
        "time_based=yes",
        "rw=trim",
        "percentile_list=50:101",
        "percentile_list=",
        "randseed=x",
    ] {
        let error = JobFile::parse(&format!("[a]\n\n{line}\n")).expect_err(line);
        let key = line.split('=').next().unwrap_or_default();
        assert!(
            matches!(&error, JobError::BadValue { line: 3, key: named, .. } if named == key),
            "{line}: {error}"
        );
    }
}

#[test]
fn a_job_that_contradicts_itself_is_refused() {
    for text in [
        "[a]\ntime_based\n",
        "[a]\nbs=1m\nsize=4k\n",
        "[a]\nbs=4m\niodepth=1024\n",
    ] {
        let error = JobFile::parse(text).expect_err(text);
        assert!(
            matches!(error, JobError::Impossible { line: 1, .. }),
            "{text}: {error}"
        );
    }
}

#[test]
fn what_is_no_job_file_is_refused() {
    let parse = |text| JobFile::parse(text).expect_err("refused");
    assert_eq!(parse(""), JobError::Empty);
    assert_eq!(parse("[global]\nbs=4k\n"), JobError::Empty);
    assert_eq!(parse("rw=read\n"), JobError::OutsideSection { line: 1 });
    assert_eq!(parse("[a\n"), JobError::BadSection { line: 1 });
    assert_eq!(parse("\n[]\n"), JobError::BadSection { line: 2 });
}
