//! Power cuts: log and backing lie on disks that forget what was not flushed.
//!
//! Each disk is a file behind nbdkit's cache filter in writeback mode: writes stay in nbdkit's
//! memory until a flush. nbdfuse makes a file of it, which the daemon opens with O_DIRECT like any
//! other. The power goes when daemon and nbdkit are killed: whatever was not flushed is gone.
//!
//! **The rig is tested too**: with a cache that ignores flushes (`cache=unsafe`) the same cuts must
//! be found to lose data.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{LIMIT, folder, lonely, oracle, program, seed, times};
use hn4_replicad::quickstart::image::find_program;
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan};

fn plan() -> Plan {
    Plan {
        size_mib: 16,
        log_mib: 24,
        overlay_mib: 8,
        policy: "assume_strict_flush = true\n".to_owned(),
        alone: true,
        ..Plan::default()
    }
}

/// A disk that forgets: a mounted file, and the processes behind it.
struct Disk {
    file: PathBuf,
    mount: PathBuf,
    socket: PathBuf,
    cache: &'static str,
    processes: Vec<Child>,
}

impl Disk {
    fn new(folder: &Path, name: &str, bytes: u64) -> Self {
        let file = folder.join(format!("{name}.disk"));
        std::fs::File::create(&file)
            .and_then(|file| file.set_len(bytes))
            .expect("a disk's file");
        let mount = folder.join(name);
        std::fs::write(&mount, "").expect("a place to mount on");
        let socket = folder.join(format!("{name}.sock"));
        let mut disk = Self {
            file,
            mount,
            socket,
            cache: "writeback",
            processes: Vec::new(),
        };
        disk.power_on();
        disk
    }

    fn power_on(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        let nbdkit = Command::new(find_program("nbdkit").expect("looked for before"))
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(&self.socket)
            .args(["--filter=cache", "file"])
            .arg(&self.file)
            .arg(format!("cache={}", self.cache))
            .stdin(Stdio::null())
            .spawn()
            .expect("nbdkit");
        self.processes.push(nbdkit);
        wait("nbdkit to listen", || self.socket.exists());
        let nbdfuse = Command::new(find_program("nbdfuse").expect("looked for before"))
            .arg(&self.mount)
            .arg("--unix")
            .arg(&self.socket)
            .stdin(Stdio::null())
            .spawn()
            .expect("nbdfuse");
        self.processes.push(nbdfuse);
        wait("the mount", || is_mounted(&self.mount));
    }

    fn power_off(&mut self) {
        // nbdkit first: what it has in memory is gone from this moment on.
        for process in &mut self.processes {
            process.kill().expect("killed");
            process.wait().expect("reaped");
        }
        self.processes.clear();
        unmount(&self.mount);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // It may be gone already.
            let _ = process.kill();
            let _ = process.wait();
        }
        if is_mounted(&self.mount) {
            unmount(&self.mount);
        }
    }
}

fn unmount(mount: &Path) {
    let status = Command::new("umount")
        .arg("--lazy")
        .arg(mount)
        .status()
        .expect("umount");
    assert!(status.success(), "{} cannot be unmounted", mount.display());
}

fn is_mounted(mount: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mounts").expect("the mount table");
    let mount = mount.display().to_string();
    table
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(&mount))
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether such disks can be made here.
fn is_possible() -> bool {
    for name in ["nbdkit", "nbdfuse"] {
        if find_program(name).is_none() {
            common::missing(name);
            return false;
        }
    }
    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    if device.is_err() || !nix::unistd::Uid::effective().is_root() {
        // Not every machine of a build farm allows it, whatever is installed.
        eprintln!("SKIPPED: /dev/fuse cannot be used, or this is not root");
        return false;
    }
    true
}

struct Machine {
    node: Node,
    log: Disk,
    backing: Disk,
}

impl Machine {
    fn new(place: &Path, cache: &'static str) -> Self {
        let plan = plan();
        let (log, backing) = (plan.log_mib << 20, plan.size_mib << 20);
        let node = Node::existing("machine", place, program());
        let text = lonely("machine").replace("overlay_mib = 32\n", "overlay_mib = 8\n");
        std::fs::write(node.config(), text + &plan.policy).expect("a configuration");
        let mut machine = Self {
            log: Disk::new(place, "log", log),
            backing: Disk::new(place, "backing", backing),
            node,
        };
        machine.node.create_on_existing().expect("a volume");
        // A new volume is there in any case; the question is what becomes of writes to it.
        for disk in [&mut machine.log, &mut machine.backing] {
            disk.power_off();
            disk.cache = cache;
            disk.power_on();
        }
        machine
    }

    fn cut_the_power(&mut self) {
        self.node.kill().expect("killed");
        self.log.power_off();
        self.backing.power_off();
    }
}

/// How a series of cuts ended early.
#[derive(Debug, thiserror::Error)]
enum Ended {
    /// Data was lost, or the volume could not be opened any more.
    #[error("a promise was broken: {0}")]
    Promise(String),
    /// The rig did not work.
    #[error("the rig did not work: {0}")]
    Rig(String),
}

/// Cuts the power again and again, until a promise is broken.
fn cuts(cache: &'static str, count: u64, seed: u64) -> Result<String, Ended> {
    let rig = |error: anyhow::Error| Ended::Rig(format!("{error:#}"));
    let broken = |cut, error: anyhow::Error| Ended::Promise(format!("cut {cut}: {error:#}"));
    let place = folder();
    let plan = plan();
    let mut machine = Machine::new(place.path(), cache);
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    let mut slowest = Duration::ZERO;
    let mut dropped = 0;
    machine.node.start().map_err(rig)?;
    for cut in 0..count {
        let mut plan = LoadPlan::mixed(seed + cut);
        // FUSE takes direct transfers of whole pages only.
        (plan.connections, plan.depth, plan.align) = (2, 4, 8);
        // nbdfuse makes a TRIM of a punched hole, and nbdkit's cache does not zero what is trimmed.
        plan.holes = false;
        let load = Load::start(&machine.node, &oracle, plan).map_err(rig)?;
        load.wait_for_progress(100 + random.below(1500), LIMIT)
            .map_err(rig)?;
        machine.cut_the_power();
        load.was_cut().map_err(rig)?;
        machine.log.power_on();
        machine.backing.power_on();
        let started = Instant::now();
        machine.node.start().map_err(|error| broken(cut, error))?;
        slowest = slowest.max(started.elapsed());
        let seen = check(&machine.node, &oracle, 0).map_err(|error| broken(cut, error))?;
        dropped += seen.missing;
        lock(&oracle).settle(&seen);
    }
    let counts = lock(&oracle).counts();
    Ok(format!(
        "{count} cuts: {counts:?}, {dropped} unflushed dropped, slowest {slowest:?}"
    ))
}

#[test]
fn a_power_cut_at_any_moment_loses_no_flushed_write() {
    if !is_possible() {
        return;
    }
    let seed = seed("power");
    let outcome = cuts("writeback", times("HN4_CUTS", 5), seed);
    println!(
        "{}",
        outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"))
    );
}

#[test]
#[ignore = "the long run: 100 cuts take many minutes"]
fn a_hundred_power_cuts_lose_no_flushed_write() {
    if !is_possible() {
        return;
    }
    let seed = seed("power");
    let outcome = cuts("writeback", 100, seed);
    println!(
        "{}",
        outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"))
    );
}

#[test]
fn a_disk_that_ignores_flushes_is_caught_by_this_rig() {
    if !is_possible() {
        return;
    }
    let found = cuts("unsafe", 20, seed("lying disk"));
    println!("{found:?}");
    let noticed = matches!(found, Err(Ended::Promise(_)));
    assert!(
        noticed,
        "20 power cuts of a disk that lies, and no loss was found: {found:?}"
    );
}
