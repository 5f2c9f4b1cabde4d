//! The promises of opening a device, on this machine's real files, loop devices and memory disks.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hn4::status::Code;
use hn4_engine::arena::{Arena, SlotMemory};
use hn4_engine::device::{
    Device, DeviceError, DeviceKind, DeviceOptions, FlushTrust, create_preallocated,
};
use hn4_engine::ring::{Completion, Memory, Op, Ring, RingConfig, Seg};

const MIB: u64 = 1 << 20;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory below the target")
}

/// Files here need a target directory on a file system whose flush can be judged; anything else is
/// opened with the operator's word, as a container's users would.
fn options() -> DeviceOptions {
    DeviceOptions {
        assume_strict_flush: true,
        lock_patience: Duration::ZERO,
        ..DeviceOptions::default()
    }
}

fn created(directory: &tempfile::TempDir, bytes: u64) -> PathBuf {
    let path = directory.path().join("data");
    create_preallocated(&path, bytes, true).expect("a file");
    path
}

/// A skipped test says so; where tools are required it fails.
fn skip(needs: &str) {
    let required = std::env::var_os("HN4_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "this test needs {needs}");
    eprintln!("SKIPPED: this test needs {needs}");
}

/// A loop device, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .ok()?;
        let name = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let status = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "{} stays attached",
            self.0.display()
        );
    }
}

/// Writes a block through a ring, reads it back, and returns what was read.
fn round_trip(device: &Device) -> Vec<u8> {
    let arena = Arena::new(2).expect("memory");
    let mut ring = Ring::new(RingConfig::default(), arena).expect("a ring");
    let file = ring
        .add_file(device.descriptor().expect("a descriptor"))
        .expect("room");
    let (from, to) = (ring.arena_mut().alloc(), ring.arena_mut().alloc());
    let (from, to) = (from.expect("a slot"), to.expect("a slot"));
    ring.arena_mut().bytes_mut(from).fill(0x5a);
    let (from, to) = ([Seg::whole(from)], [Seg::whole(to)]);
    let memory = Memory::slots(&from);
    ring.submit(
        Op::Write {
            file,
            offset: 8192,
            memory,
            then_sync: true,
        },
        1,
    )
    .expect("room");
    finish(&mut ring);
    let memory = Memory::slots(&to);
    ring.submit(
        Op::Read {
            file,
            offset: 8192,
            memory,
        },
        2,
    )
    .expect("room");
    finish(&mut ring);
    let hn4_engine::ring::SegSource::Slot(slot) = to[0].source else {
        unreachable!()
    };
    ring.arena().bytes(slot).to_vec()
}

fn finish(ring: &mut Ring) {
    let mut out: Vec<Completion> = Vec::new();
    let end = Instant::now() + Duration::from_secs(20);
    while out.is_empty() {
        assert!(Instant::now() < end, "no completion");
        ring.wait(1, Some(Duration::from_secs(1)), &mut out)
            .expect("a working ring");
    }
    assert_eq!(out[0].result, Ok(4096));
}

#[test]
fn a_created_file_is_filled_private_and_never_overwritten() {
    let directory = directory();
    let path = created(&directory, 3 * MIB + 4096);
    let metadata = path.metadata().expect("the file");
    assert_eq!(metadata.len(), 3 * MIB + 4096);
    assert!(
        metadata.blocks() * 512 >= metadata.len(),
        "no holes: {} blocks",
        metadata.blocks()
    );
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert!(
        std::fs::read(&path)
            .expect("the file")
            .iter()
            .all(|&byte| byte == 0)
    );

    File::options()
        .write(true)
        .open(&path)
        .expect("it")
        .write_all_at(b"mine", 0)
        .expect("room");
    let error = create_preallocated(&path, MIB, true).expect_err("it exists");
    assert!(error.to_string().contains("data: creating"), "{error}");
    assert_eq!(&std::fs::read(&path).expect("the file")[..4], b"mine");
    for bytes in [0, 4095, u64::MAX - 4095] {
        let other = directory.path().join("other");
        let error = create_preallocated(&other, bytes, true).expect_err("a wrong size");
        assert!(matches!(error, DeviceError::BadSize { .. }), "{error}");
    }
}

#[test]
fn a_file_left_by_an_interrupted_creation_is_replaced() {
    let directory = directory();
    let partial = directory.path().join("data.partial");
    std::fs::write(&partial, "half").expect("room");
    created(&directory, MIB);
    assert!(!partial.exists());
}

#[test]
fn without_room_nothing_is_left_behind() {
    let directory = directory();
    let path = directory.path().join("data");
    let error = create_preallocated(&path, 1 << 60, true).expect_err("an exbibyte");
    assert!(error.to_string().contains("filling with zeroes"), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).expect("it").count(), 0);
}

#[test]
fn a_file_is_opened_with_its_facts_and_carries_direct_io() {
    let directory = directory();
    let device = Device::open(&created(&directory, MIB), options()).expect("a device");
    let info = device.info();
    assert_eq!((info.kind, info.size_bytes), (DeviceKind::File, MIB));
    for bytes in [info.logical_bytes, info.physical_bytes, info.offset_align] {
        assert!(
            bytes.is_power_of_two() && (512..=65536).contains(&bytes),
            "{info:?}"
        );
    }
    assert!(info.memory_align.is_power_of_two(), "{info:?}");
    assert!(
        info.to_string().contains("data: file, 1048576 bytes, on "),
        "{info}"
    );
    assert_eq!(round_trip(&device), [0x5a; 4096]);
}

#[test]
fn a_device_has_one_writer_or_many_readers() {
    let directory = directory();
    let path = created(&directory, MIB);
    let reader = DeviceOptions {
        read_only: true,
        ..options()
    };
    let first = Device::open(&path, options()).expect("a device");
    for options in [options(), reader] {
        let error = Device::open(&path, options).expect_err("it is locked");
        let text = error.to_string();
        assert!(text.contains("data: in use by another process"), "{text}");
    }
    // The lock lasts as long as any descriptor, such as the ring's.
    let descriptor = first.descriptor().expect("a descriptor");
    drop(first);
    assert!(matches!(
        Device::open(&path, options()),
        Err(DeviceError::InUse { .. })
    ));
    drop(descriptor);
    let readers = [Device::open(&path, reader), Device::open(&path, reader)];
    assert!(readers.iter().all(Result::is_ok));
    assert!(matches!(
        Device::open(&path, options()),
        Err(DeviceError::InUse { .. })
    ));
}

#[test]
fn a_device_that_is_about_to_be_free_is_waited_for() {
    let directory = directory();
    let path = created(&directory, MIB);
    let first = Device::open(&path, options()).expect("a device");
    let (tried, until_tried) = std::sync::mpsc::channel();
    let holder = std::thread::spawn(move || {
        until_tried.recv().expect("the other side");
        drop(first);
    });
    assert!(matches!(
        Device::open(&path, options()),
        Err(DeviceError::InUse { .. })
    ));
    tried.send(()).expect("the holder");
    let patient = DeviceOptions {
        lock_patience: Duration::from_secs(20),
        ..options()
    };
    Device::open(&path, patient).expect("free within the limit");
    holder.join().expect("the holder");
}

#[test]
fn what_is_no_device_is_refused_by_name() {
    let directory = directory();
    let empty = directory.path().join("empty");
    File::create(&empty).expect("room");
    let open = |path: &Path| Device::open(path, options()).expect_err("refused");
    assert!(matches!(open(&empty), DeviceError::Empty { .. }));
    assert!(matches!(
        open(directory.path()),
        DeviceError::WrongType { .. }
    ));
    assert!(matches!(
        open(Path::new("/dev/null")),
        DeviceError::WrongType { .. }
    ));
    let missing = open(&directory.path().join("missing")).to_string();
    assert!(
        missing.contains("missing: looking it up: No such file"),
        "{missing}"
    );
}

#[test]
fn files_in_memory_are_refused_whatever_the_operator_says() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        return skip("a tmpfs at /dev/shm");
    };
    let path = directory.path().join("data");
    std::fs::write(&path, [0; 4096]).expect("room");
    let error = Device::open(&path, options()).expect_err("tmpfs");
    assert_eq!(error.code(), Some(Code::HwIo));
    let text = error.to_string();
    assert!(text.starts_with("HW_IO (-0x400): /dev/shm/"), "{text}");
    assert!(
        text.contains("tmpfs on /dev/shm lives in memory: put it on a disk"),
        "{text}"
    );
    let other = directory.path().join("other");
    let error = create_preallocated(&other, MIB, true).expect_err("tmpfs");
    assert_eq!(error.code(), Some(Code::HwIo));
    assert!(!other.exists());

    match Loop::over(&path) {
        None => skip("root and losetup"),
        Some(device) => {
            let error = Device::open(&device.0, options()).expect_err("a loop over tmpfs");
            let text = error.to_string();
            assert!(
                text.contains(" over /dev/shm/") && text.contains("lives in memory"),
                "{text}"
            );
        }
    }
}

#[test]
fn compressed_memory_is_refused() {
    let zram = Path::new("/dev/zram0");
    if !zram.exists() {
        return skip("a zram device");
    }
    let error = Device::open(zram, options()).expect_err("zram");
    assert_eq!(error.code(), Some(Code::HwIo));
    assert!(
        error
            .to_string()
            .contains("zram0 is backed by compressed memory"),
        "{error}"
    );
}

#[test]
fn what_cannot_be_judged_needs_the_operators_word_and_shows_it() {
    // procfs is neither known to keep a flush nor known to forget it.
    let path = Path::new("/proc/self/status");
    let strict = DeviceOptions {
        direct: false,
        read_only: true,
        ..DeviceOptions::default()
    };
    let error = Device::open(path, strict).expect_err("not judged");
    assert_eq!(error.code(), Some(Code::HwIo));
    assert!(
        error.to_string().contains("set assume_strict_flush = true"),
        "{error}"
    );
    let assumed = DeviceOptions {
        assume_strict_flush: true,
        ..strict
    };
    // Believed now, so that the next obstacle shows.
    assert!(matches!(
        Device::open(path, assumed),
        Err(DeviceError::Empty { .. })
    ));
}

#[test]
fn a_loop_device_over_a_file_is_as_strict_as_the_file_and_claimed_by_one() {
    let directory = directory();
    let path = created(&directory, 4 * MIB);
    let Some(attached) = Loop::over(&path) else {
        return skip("root and losetup");
    };
    let chosen = DeviceOptions {
        kind_override: Some(DeviceKind::Hdd),
        read_only: true,
        // A child that another test starts holds what is open here until it is another program.
        lock_patience: Duration::from_secs(5),
        ..options()
    };
    {
        let device = Device::open(&attached.0, options()).expect("a device");
        let info = device.info();
        assert_eq!((info.kind, info.size_bytes), (DeviceKind::Loop, 4 * MIB));
        let file_trust = Device::open(&path, options())
            .expect("the file itself")
            .info()
            .flush
            .clone();
        let same = matches!(
            (&info.flush, &file_trust),
            (FlushTrust::Recognised, FlushTrust::Recognised)
                | (FlushTrust::Assumed(_), FlushTrust::Assumed(_))
        );
        assert!(same, "{info} but {file_trust:?}");
        let second = Device::open(&attached.0, options());
        assert!(
            matches!(second, Err(DeviceError::InUse { .. })),
            "{second:?}"
        );
        assert_eq!(round_trip(&device), [0x5a; 4096]);
        device.zeroing().expect("an answer");
    }
    let info = Device::open(&attached.0, chosen)
        .expect("a device")
        .info()
        .clone();
    assert_eq!((info.kind, info.kind_overridden), (DeviceKind::Hdd, true));
    assert!(info.to_string().contains("hdd (configured)"), "{info}");
}

#[test]
fn zeroing_is_answered_without_touching_the_device() {
    let directory = directory();
    let path = created(&directory, MIB);
    let before = path.metadata().expect("the file");
    let device = Device::open(&path, options()).expect("a device");
    let support = device.zeroing().expect("an answer");
    let after = path.metadata().expect("the file");
    assert_eq!(before.blocks(), after.blocks());
    assert_eq!(std::fs::read_dir(directory.path()).expect("it").count(), 1);
    if device.info().file_system.as_deref() == Some("ext4") {
        assert!(support.punch_hole && support.zero_range, "{support:?}");
    }
}
