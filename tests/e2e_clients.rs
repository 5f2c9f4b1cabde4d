//! Clients that others have written, against the real daemon.

mod common;

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use common::disk::{Loop, can_lose_power, wait};
use common::{folder, running_pair, seed, single, succeed, tool};
use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{Node, Plan, quiesce_and_compare};

fn plan() -> Plan {
    Plan {
        size_mib: 96,
        log_mib: 64,
        overlay_mib: 48,
        ..Plan::default()
    }
}

fn serving(folder: &Path) -> Node {
    let mut node = single(folder, plan());
    node.start().expect("it serves");
    node
}

/// An image of the volume's size with data and holes of many sizes.
fn image(path: &Path) -> Vec<u8> {
    let mut random = Random::new(11);
    let size = usize::try_from(plan().size_mib << 20).expect("small");
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        let words = 64 * (1 + random.below(4000));
        let is_hole = random.one_in(2);
        for _ in 0..words {
            bytes.extend((if is_hole { 0 } else { random.draw() }).to_le_bytes());
        }
    }
    bytes.truncate(size);
    std::fs::write(path, &bytes).expect("the image");
    bytes
}

#[test]
fn nbdinfo_sees_what_the_volume_offers() {
    let Some(mut nbdinfo) = tool("nbdinfo") else {
        return;
    };
    let place = folder();
    let node = serving(place.path());
    let json = succeed(nbdinfo.arg("--json").arg(node.uri()));
    for part in [
        "\"export-name\": \"vol0\"",
        "\"export-size\": 100663296",
        "\"structured\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"is_read_only\": false",
        "\"block_size_minimum\": 512",
    ] {
        assert!(json.contains(part), "{part} is missing from {json}");
    }
}

#[test]
fn nbdcopy_moves_an_image_both_ways_and_the_copies_agree() {
    let Some(mut there) = tool("nbdcopy") else {
        return;
    };
    let place = folder();
    let (mut alpha, mut beta) = running_pair(place.path(), &plan());
    let (source, found) = (place.path().join("source"), place.path().join("found"));
    let bytes = image(&source);
    succeed(
        there
            .args(["--flush", "--connections=4", "--requests=32"])
            .arg(&source)
            .arg(alpha.uri()),
    );
    let mut back = tool("nbdcopy").expect("it was there");
    succeed(back.arg("--connections=4").arg(alpha.uri()).arg(&found));
    assert!(
        std::fs::read(&found).expect("the copy") == bytes,
        "what came back differs"
    );
    quiesce_and_compare(&mut alpha, &mut beta, common::LIMIT).expect("equal backings");
    assert!(
        std::fs::read(beta.backing()).expect("a backing") == bytes,
        "P3: the same place"
    );
}

/// What nbdinfo says of a volume: ranges in bytes, and whether they are zero.
fn map(node: &Node) -> Vec<(Range<usize>, bool)> {
    let mut nbdinfo = tool("nbdinfo").expect("it was there");
    let json = succeed(nbdinfo.args(["--map", "--json"]).arg(node.uri()));
    let parts: Vec<serde_json::Value> = serde_json::from_str(&json).expect("a list");
    let number = |part: &serde_json::Value, key: &str| {
        let number = part[key].as_u64().expect("a number");
        usize::try_from(number).expect("small")
    };
    let part = |part: &serde_json::Value| {
        let (offset, length) = (number(part, "offset"), number(part, "length"));
        (offset..offset + length, number(part, "type") & 2 != 0)
    };
    parts.iter().map(part).collect()
}

/// A volume in which this is true: what is said to be zero is. Bytes that were said to be.
fn zeroes_are_zero(node: &Node, model: &[u8]) -> usize {
    let parts = map(node);
    let mut next = 0;
    for (range, _) in &parts {
        assert_eq!(range.start, next, "{parts:?}");
        next = range.end;
    }
    assert_eq!(next, model.len());
    let zero = parts.into_iter().filter(|(_, is_zero)| *is_zero);
    let lengths = zero.map(|(range, _)| {
        assert!(
            model[range.clone()].iter().all(|&byte| byte == 0),
            "{range:?}"
        );
        range.len()
    });
    lengths.sum()
}

fn what_need_not_be_read(threads: u64) {
    if tool("nbdinfo").is_none() {
        return;
    }
    let place = folder();
    let mut node = single(place.path(), plan());
    let config = std::fs::read_to_string(node.config()).expect("a configuration");
    std::fs::write(node.config(), format!("{config}threads = {threads}\n")).expect("written");
    node.start().expect("it serves");
    let mut client = node.client().expect("served");
    let mut model = vec![0_u8; usize::try_from(plan().size_mib << 20).expect("small")];
    assert_eq!(
        zeroes_are_zero(&node, &model),
        model.len(),
        "nothing was written"
    );
    let mut random = Random::new(seed("holes"));
    for round in 0..12 {
        for _ in 0..12 {
            let at = random.below(model.len() as u64 / 512 - 8192) * 512;
            let (offset, sectors) = (usize::try_from(at).expect("small"), 1 + random.below(400));
            let kind = random.below(4);
            let long = kind >= 2 && random.one_in(2);
            let length = sectors * 512 * if long { 16 } else { 1 };
            let range = offset..offset + usize::try_from(length).expect("small");
            let short = u32::try_from(length).expect("small");
            model[range.clone()].fill([1, 2, 0, 0][usize::try_from(kind).expect("small")]);
            match kind {
                0 | 1 => client.write(at, &model[range], false).expect("written"),
                2 => client.trim(at, short).expect("trimmed"),
                _ => client.write_zeroes(at, short).expect("zeroed"),
            }
        }
        let known = zeroes_are_zero(&node, &model);
        let blocks = model.chunks(4096);
        let zeroes = blocks.filter(|block| block.iter().all(|&byte| byte == 0));
        let zeroes = zeroes.count() * 4096;
        assert!(
            known * 10 >= zeroes * 9,
            "{known} bytes of {zeroes} are known to be zero"
        );
        if round % 3 == 2 {
            node.drain().expect("all is in the backing");
            let below = zeroes_are_zero(&node, &model);
            assert!(
                below * 10 >= zeroes * 8,
                "{below} of {zeroes}, from the backing"
            );
        }
    }
    // Who copies it reads what is there, and gets all.
    let before = node
        .report()
        .expect("a report")
        .state
        .expect("open")
        .read_bytes;
    let found = place.path().join("found");
    let mut copy = tool("nbdcopy").expect("of the same package");
    succeed(copy.arg(node.uri()).arg(&found));
    assert!(std::fs::read(&found).expect("the copy") == model);
    let read = node
        .report()
        .expect("a report")
        .state
        .expect("open")
        .read_bytes
        - before;
    // It reads in pieces of its own size, of which most hold something.
    assert!(read * 2 < model.len() as u64, "{read} bytes were read");
}

#[test]
fn what_is_zero_is_known_without_reading() {
    what_need_not_be_read(1);
}

#[test]
fn what_is_zero_is_known_without_reading_with_three_threads() {
    what_need_not_be_read(3);
}

#[test]
fn qemu_img_converts_and_compares() {
    let Some(mut convert) = tool("qemu-img") else {
        return;
    };
    let place = folder();
    let node = serving(place.path());
    let source = place.path().join("source");
    image(&source);
    succeed(
        convert
            .args(["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8"])
            .arg(&source)
            .arg(node.uri()),
    );
    let mut compare = tool("qemu-img").expect("it was there");
    let words = succeed(
        compare
            .args(["compare", "-f", "raw", "-F", "raw"])
            .arg(&source)
            .arg(node.uri()),
    );
    assert!(words.contains("identical"), "{words}");
}

#[test]
fn qemu_io_patterns_of_single_sectors_survive_a_restart() {
    let Some(mut write) = tool("qemu-io") else {
        return;
    };
    let place = folder();
    let mut node = serving(place.path());
    let commands = |verb: &str, command: &mut Command| {
        for sector in 0..40_u64 {
            // Neighbours in one block, blocks apart, and across a border of blocks.
            let at = 512 * (sector + sector / 8 * 37);
            command
                .arg("-c")
                .arg(format!("{verb} -P {} {at} 512", sector + 1));
        }
    };
    commands("write", &mut write);
    write.args([
        "-c",
        "write -z 1048576 1536",
        "-c",
        "discard 2097152 512",
        "-c",
        "flush",
    ]);
    let words = succeed(write.args(["-f", "raw"]).arg(node.uri()));
    assert!(!words.contains("error"), "{words}");
    node.kill().expect("killed");
    node.start().expect("it recovers");
    let mut read = tool("qemu-io").expect("it was there");
    commands("read", &mut read);
    read.args(["-c", "read -P 0 1048576 1536", "-c", "read -P 0 512000 512"]);
    let words = succeed(read.args(["-r", "-f", "raw"]).arg(node.uri()));
    assert!(!words.contains("verification failed"), "{words}");
}

#[test]
fn fio_verifies_what_it_wrote_with_many_requests_in_flight() {
    let Some(mut fio) = tool("fio") else { return };
    let engines = succeed(tool("fio").expect("it was there").arg("--enghelp"));
    if !engines.contains("nbd") {
        return common::missing("fio's nbd engine");
    }
    let place = folder();
    let node = serving(place.path());
    succeed(
        fio.current_dir(place.path())
            .args([
                "--name=verify",
                "--ioengine=nbd",
                "--rw=randwrite",
                "--bsrange=512-64k",
            ])
            .args([
                "--bs_unaligned=0",
                "--blockalign=512",
                "--iodepth=32",
                "--size=48m",
            ])
            .args([
                "--verify=crc32c",
                "--verify_fatal=1",
                "--do_verify=1",
                "--fsync=64",
            ])
            .args(["--randseed=7", "--verify_state_save=0"])
            .arg(format!("--uri={}", node.uri())),
    );
    let report = node.report().expect("a report");
    let state = report.state.expect("open");
    assert!(
        state.written_bytes >= 48 << 20,
        "{} bytes were written",
        state.written_bytes
    );
}

#[test]
fn a_client_that_reads_a_replica_is_told_that_it_cannot_write() {
    let Some(mut nbdinfo) = tool("nbdinfo") else {
        return;
    };
    let place = folder();
    let (_alpha, beta) = running_pair(place.path(), &plan());
    let told = succeed(nbdinfo.arg(beta.uri()));
    assert!(told.contains("is_read_only: true"), "{told}");
}

/// nbdfuse, a loop device and a file system on top of a node's export; taken down when dropped.
struct Mounted {
    fuse: std::process::Child,
    file: std::path::PathBuf,
    device: Option<Loop>,
    folder: std::path::PathBuf,
}

impl Mounted {
    /// `None`, said aloud, where loop devices are missing.
    fn export(node: &Node, place: &Path) -> Option<Self> {
        let (file, folder) = (place.join("export"), place.join("tree"));
        std::fs::write(&file, "").expect("a place to mount on");
        std::fs::create_dir_all(&folder).expect("a folder");
        let fuse = Command::new("nbdfuse").arg(&file).arg(node.uri()).spawn();
        let mut mounted = Self {
            fuse: fuse.expect("nbdfuse"),
            file,
            device: None,
            folder,
        };
        wait("nbdfuse to mount", || {
            std::fs::metadata(&mounted.file).is_ok_and(|file| file.len() > 0)
        });
        mounted.device = Some(Loop::over(&mounted.file, &[])?);
        Some(mounted)
    }

    fn device(&self) -> &Path {
        &self
            .device
            .as_ref()
            .expect("there until it is dropped")
            .device
    }

    fn mount(&self) {
        let mut mount = Command::new("mount");
        succeed(mount.arg(self.device()).arg(&self.folder));
    }

    fn unmount(&self) {
        succeed(Command::new("umount").arg(&self.folder));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What is not mounted any more cannot be unmounted.
        let _ = Command::new("umount").arg("-l").arg(&self.folder).output();
        self.device = None;
        let _ = self.fuse.kill();
        let _ = self.fuse.wait();
        let _ = Command::new("umount").arg("-l").arg(&self.file).output();
    }
}

/// Fills a folder with files of many sizes and gives what they hold.
fn fill(folder: &Path, seed: u64) -> Vec<(String, blake3::Hash)> {
    let mut random = Random::new(seed);
    let mut files = Vec::new();
    for number in 0..120 {
        let largest = 1 << (6 + random.below(13));
        let words = (0..random.below(largest)).flat_map(|_| random.draw().to_le_bytes());
        let bytes: Vec<u8> = words.collect();
        let name = format!("{seed}-{number}");
        std::fs::write(folder.join(&name), &bytes).expect("a file");
        files.push((name, blake3::hash(&bytes)));
        if number % 7 == 0 {
            let (name, _) = files.remove(files.len() / 2);
            std::fs::remove_file(folder.join(name)).expect("removed");
        }
    }
    files
}

/// A file system is made, filled and synced; the daemon is killed under it; what was synced is
/// there, and fsck finds no fault.
fn file_system_survives(make: &[&str], check: &[&str]) {
    if !can_lose_power(&["nbdfuse"]) {
        return;
    }
    let (Some(mut mkfs), Some(mut fsck)) = (tool(make[0]), tool(check[0])) else {
        return;
    };
    let place = folder();
    let mut node = single(
        place.path(),
        Plan {
            size_mib: 320,
            ..plan()
        },
    );
    node.start().expect("it serves");
    let Some(export) = Mounted::export(&node, place.path()) else {
        return;
    };
    succeed(mkfs.args(&make[1..]).arg(export.device()));
    export.mount();
    let files = fill(&export.folder, 1);
    succeed(Command::new("sync").arg("-f").arg(&export.folder));
    // Not synced: may be there or not, and must not harm.
    fill(&export.folder, 2);
    node.kill().expect("killed");
    drop(export);
    node.start().expect("it recovers");
    let export = Mounted::export(&node, place.path()).expect("it could be made before");
    export.mount();
    for (name, hash) in &files {
        let bytes = std::fs::read(export.folder.join(name)).expect("a file that was synced");
        assert_eq!(blake3::hash(&bytes), *hash, "{name}");
    }
    succeed(Command::new("fstrim").arg(&export.folder));
    export.unmount();
    succeed(fsck.args(&check[1..]).arg(export.device()));
}

#[test]
fn ext4_on_the_export_keeps_what_was_synced_when_the_daemon_is_killed() {
    file_system_survives(&["mkfs.ext4", "-q", "-F"], &["e2fsck", "-f", "-n"]);
}

#[test]
fn xfs_on_the_export_keeps_what_was_synced_when_the_daemon_is_killed() {
    file_system_survives(&["mkfs.xfs", "-q", "-f"], &["xfs_repair", "-n"]);
}
